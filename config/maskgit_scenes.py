# MaskGIT on the rgb tokens of rendered scenes, FSQ codes of four digits: generates and completes scenes; 0.8 M
# parameters. 300 steps x 32 scenes x 64 tokens = 0.6 M tokens, half an epoch of 20,000 scenes: a short run that learns
# the ground and blobs. Expect a val_loss of 3.46 nats per token (ln 4,096 = 8.3 at the start) after two minutes on
# one core.
model = 'maskgit'
dataset = 'scenes'
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 32
max_iters = 300
learning_rate = 6e-3
eval_interval = 150
