model = 'vlm'
dataset = 'scenes_align'
batch_size = 32
micro_batch_size = 32
max_iters = 600
eval_interval = 200
