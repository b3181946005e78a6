# Flow matching on CIFAR-10 by class, 32x32 RGB: 12 M parameters, about the course's size, 256 tokens per image.
# 78,000 steps x 64 images = 5 M images, 100 epochs of 50,000: 8 M parameters in the blocks' matrices x 6 x 256 tokens
# x 5 M = 6e16 FLOP, one to two hours on one GPU at 10 to 20 TFLOP/s. Not yet run to its end: no GPU was available
# (flow_cifar10_small.py is for a CPU). Target: at most 3.15 bits/dim.
model = 'flow'
dataset = 'cifar10'
patch_size = 2
n_layer = 8
n_head = 6
n_embd = 288
mlp_hidden_dim = 768
batch_size = 64
micro_batch_size = 64
max_iters = 78_000
ema = 0.9995
eval_interval = 7800
eval_iters = 40
log_interval = 100
