# GPT on MNIST's tokens, the class first: 1.8 M parameters draw digits of a class that you choose, patch by patch.
# 1,500 steps x 128 pictures x 49 tokens = 9.4 M tokens.
model = 'gpt'
dataset = 'mnist'
n_layer = 4
n_head = 6
n_embd = 192
dropout = 0.1
weight_decay = 0.1
batch_size = 128
micro_batch_size = 128
max_iters = 1500
eval_interval = 500
