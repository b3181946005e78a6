# nano4M on rendered scenes: any of rgb, depth, normal, segmentation, scene_desc, caption -> any other. 1.8 M parameters.
# 2,800 steps x 16 scenes x (60 input + 230 target tokens) = 13 M tokens, 2.2 passes over 20,000 scenes.
model = 'fourm'
dataset = 'scenes'
batch_size = 16
micro_batch_size = 16
max_iters = 2800
eval_interval = 1400
