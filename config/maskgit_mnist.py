# MaskGIT on MNIST's tokens by class: generates, completes and changes digits; 1.6 M parameters.
# 4,000 steps x 64 images x 49 tokens = 12.5 M tokens: each of 60,000 digits 4.3 times, with other masks.
# Expect a val_loss of 0.484 nats per masked token, so at most 23.7 nats per image, after eleven minutes on one shared
# core of a CPU with AVX512-BF16.
model = 'maskgit'
dataset = 'mnist'
n_layer = 8
n_head = 4
n_embd = 128
batch_size = 64
max_iters = 4000
learning_rate = 6e-3
eval_interval = 1000
