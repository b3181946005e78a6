# GPT as in gpt_shakespeare.py, trained longer: 2,300 steps = 9.4 M characters, nine epochs, with more dropout.
# Expect a val_loss of 1.42 after 30 minutes on two cores without bfloat16.
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
