# nanoVLM, stage 2: what stage 1 has left in out/vlm_scenes_align learns to look, to think and to answer, ten questions about each
# picture; the eyes stay as they are. 1,800 steps x 16 conversations. Expect a val_loss of 0.122 after 14 minutes on one core
# (compiled), and 86 % of held-out questions right.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
rates = 'eyes:0.3'
batch_size = 16
micro_batch_size = 16
max_iters = 1800
eval_interval = 900
