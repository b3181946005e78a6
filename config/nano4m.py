# nano4M on rendered scenes: any of rgb, depth, normal, segmentation, scene_desc, caption -> any other.
# 1,600 steps x 32 scenes x (about 60 input + 64 target tokens) = 6.3 M tokens, 2.6 passes over 20,000 scenes, 1.8 M parameters.
model = 'fourm'
dataset = 'scenes'
batch_size = 32
micro_batch_size = 32
max_iters = 1600
eval_interval = 400
