# Flow matching on the rgb pictures of the scenes, 64x64, without labels: 1.2 M parameters, 64 tokens a picture.
# 4,000 steps x 32 pictures = 128,000 pictures, six passes over 20,000. Expect a val_loss of 0.060 after 18 minutes on one core.
# Patches of 8 are 192 numbers, more than the width: noise does not pass through it, and a network that is to say the velocity
# is at 0.430 after 600 steps, and draws noise. One that says the data is at 0.080 after half as many pictures.
model = 'flow'
dataset = 'scenes'
patch = 8
predict = 'data'
shift = 2.0             # a large picture shows through more noise than a small one
batch_size = 32
micro_batch_size = 32
max_iters = 4000
ema = 0.999
eval_interval = 2000
log_interval = 20
