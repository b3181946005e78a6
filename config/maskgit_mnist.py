# MaskGIT on MNIST's tokens by class: generates, completes and changes digits; 1.0 M parameters.
# 1,000 steps x 64 images x 49 tokens = 3.1 M tokens: each of 9,000 digits (--subset=t10k) 7 times, in 8 views.
# Expect a val_loss of 0.528 nats per masked token, so at most 25.9 nats per image, after eight minutes on one core
# without bfloat16.
model = 'maskgit'
dataset = 'mnist'
n_layer = 5
n_head = 4
n_embd = 128
batch_size = 64
max_iters = 1000
learning_rate = 6e-3
eval_interval = 500
