# Flow matching on CIFAR-10, 32x32 in color: 12 M parameters, about the course's size, with 256 tokens a picture.
# 78,000 steps x 64 pictures = 5 M pictures, 100 epochs of 50,000: 8 M parameters in the blocks' matrices x 6 x 256 tokens x 5 M
# = 6e16 FLOP, one to two hours of one GPU at 10 to 20 TFLOP/s. Not yet run to its end: no GPU was at hand
# (flow_cifar10_small.py is for a CPU). To aim for: 3.15 bits/dim or less.
model = 'flow'
dataset = 'cifar10'
patch = 2
n_layer = 8
n_head = 6
n_embd = 288
mlp_width = 768
batch_size = 64
micro_batch_size = 64
max_iters = 78_000
ema = 0.9995
eval_interval = 7800
eval_iters = 40
log_interval = 100
