# Flow matching on the rgb pictures of the scenes, 64x64, without labels: 1.1 M parameters, 256 tokens a picture.
# 3,000 steps x 16 pictures = 48,000 pictures, two and a half passes over 20,000. Expect a val_loss of 0.056
# after 43 minutes on one core without bfloat16 that was shared, compiled.
# A patch has to be much smaller than the width: with patches of 8, 192 numbers of noise do not pass through 160, and the
# pictures stay noise (0.267 after 900 steps of 32).
model = 'flow'
dataset = 'scenes'
patch = 4
shift = 2.0             # a large picture shows through more noise than a small one
batch_size = 16
micro_batch_size = 16
max_iters = 3000
ema = 0.999
eval_interval = 1500
log_interval = 20
