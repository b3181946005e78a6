# GPT on Tiny Shakespeare, by characters: 2.7 M parameters, 16 x 256 = 4,096 characters per step.
# 1,020 steps = 4.2 M characters, four epochs. Expect a val_loss of 1.441 after twelve minutes on two cores, with
# bfloat16 after five (nanoGPT's own recipe: 1.4697 with 10.7 M parameters and 82 M characters).
model = 'gpt'
dataset = 'shakespeare'
n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
batch_size = 16
max_iters = 1020
learning_rate = 6e-3
dropout = 0.05
weight_decay = 0.1
eval_interval = 340
