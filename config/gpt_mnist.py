# GPT on MNIST's tokens, after a class token: generates digits of a given class, patch by patch; 1.6 M parameters.
# 4,500 steps x 64 images x 49 tokens = 14.1 M tokens: each of 60,000 digits 4.8 times. Without dropout it would learn
# them by heart.
# Expect a val_loss of 0.449 after 15 minutes on one shared core of a CPU with AVX512-BF16, eight on two idle cores.
model = 'gpt'
dataset = 'mnist'
n_layer = 8
n_head = 8
n_embd = 128
dropout = 0.1
batch_size = 64
max_iters = 4500
learning_rate = 6e-3
eval_interval = 900
