# nano4M on rendered scenes: any of rgb, depth, normal, segmentation, scene_desc, caption -> any other.
# 20,000 scenes x ~300 tokens. 
model = 'fourm'
dataset = 'scenes'
batch_size = 64
micro_batch_size = 64
max_iters = 1500
eval_interval = 500
