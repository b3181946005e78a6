# nanoVLM, stage 2: what stage 1 has left in out/vlm_scenes_align learns to answer, nine questions and two places to point at
# about each picture; the eyes stay as they are. 1,800 steps x 16 conversations. Expect a val_loss of 0.25 after 17 minutes on
# one core, and 70 % of held-out questions right (measured as 1,000 steps, and then on to 1,800); nothing has plateaued then.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
rates = 'eyes:0'
batch_size = 16
micro_batch_size = 16
max_iters = 1800
eval_interval = 900
