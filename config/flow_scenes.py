# Flow matching on the rgb images of the scenes, 64x64, without labels: 1.2 M parameters, 64 tokens per image.
# 4,000 steps x 32 images = 128,000 images, six epochs of 20,000. Expect a val_loss of 0.060 after 18 minutes on a core.
# A patch of 8x8 has 192 values, more than the width: noise does not fit through it. With prediction = 'velocity' the
# loss is 0.430 after 600 steps, and samples are noise; with prediction = 'x' it is 0.080 after half as many images.
model = 'flow'
dataset = 'scenes'
patch_size = 8
prediction = 'x'
timestep_shift = 2.0    # large images need more noise
batch_size = 32
micro_batch_size = 32
max_iters = 4000
ema = 0.999
eval_interval = 2000
log_interval = 20
