# Flow matching on the rgb pictures of the scenes, 64x64, without labels: 1.6 M parameters, 64 tokens a picture.
# 3,000 steps x 32 pictures = 96,000 pictures, five passes over 20,000.
model = 'flow'
dataset = 'scenes'
patch = 8
n_embd = 160
n_head = 5
mlp_width = 320
shift = 2.0             # a large picture shows through more noise than a small one
batch_size = 32
micro_batch_size = 32
max_iters = 3000
ema = 0.999
eval_interval = 1500
log_interval = 20
