# nano4M on rendered scenes: any of rgb, depth, normal, segmentation, scene_desc, caption -> any other.
# 1.8 M parameters; 2,800 steps x 16 scenes x (60 input + 230 target tokens) = 13 M tokens, 2.2 epochs of 20,000 scenes.
# Expect a val_loss of 2.12 after 6 to 8 minutes on two cores; from rgb: depth error 3.2 %, normals 12 degrees,
# mIoU 0.73, 67 % of objects.
model = 'fourm'
dataset = 'scenes'
batch_size = 16
micro_batch_size = 16
max_iters = 5000
eval_interval = 2500
