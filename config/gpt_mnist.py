# GPT on MNIST's tokens, after a class token: generates digits of a given class, patch by patch; 1.8 M parameters.
# 1,800 steps x 64 images x 49 tokens = 5.6 M tokens: each of 9,000 digits (--subset=t10k) 13 times, in 8 views.
# Expect a val_loss of 0.473 after six minutes on two cores, and 96 % of the generated digits in their class.
model = 'gpt'
dataset = 'mnist'
n_layer = 4
n_head = 6
n_embd = 192
batch_size = 64
max_iters = 1800
learning_rate = 6e-3
eval_interval = 600
