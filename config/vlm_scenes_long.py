# nanoVLM, stage 2 as in vlm_scenes.py, for longer.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
batch_size = 16
micro_batch_size = 16
max_iters = 8000
eval_interval = 4000
