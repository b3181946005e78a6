# GPT as in gpt_shakespeare.py, longer: 2,300 steps = 9.4 M characters, nine times the text, so with more dropout.
# With dropout of 0.2, but of single numbers instead of channels, it came to 1.430 after 21 minutes on two cores (not run since).
model = 'gpt'
dataset = 'shakespeare'
n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
batch_size = 16
max_iters = 2300
learning_rate = 6e-3
dropout = 0.1
weight_decay = 0.1
eval_interval = 575
