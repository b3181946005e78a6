# nanoVLM, stage 2 as in vlm_scenes.py, four times as long. Not run to its end.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
rates = 'eyes:0.3'
batch_size = 16
micro_batch_size = 16
max_iters = 5000
eval_interval = 2500
