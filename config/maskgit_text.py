# MaskGIT on Tiny Shakespeare, by characters: generates windows of 128 characters in any order; 1.0 M parameters.
# 600 steps x 24 x 128 = 1.8 M characters, almost two epochs: a short run that learns syllables and short words.
# Expect a val_loss of 2.16 nats per character (a bound) after five minutes on one core without bfloat16.
model = 'maskgit'
dataset = 'shakespeare'
block_size = 128
n_layer = 5
n_head = 4
n_embd = 128
batch_size = 24
max_iters = 600
learning_rate = 6e-3
eval_interval = 300
