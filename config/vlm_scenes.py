# nanoVLM, stage 2: what stage 1 has left in out/vlm_scenes_align learns to look, to think and to answer, ten questions about each
# picture; the eyes learn on, slowly. 1,800 steps x 16 conversations. Expect a val_loss of 0.067 after 15 minutes on one idle core
# (compiled), and 94 % of held-out questions right.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
rates = 'eyes:0.3'
batch_size = 16
micro_batch_size = 16
max_iters = 1800
eval_interval = 900
