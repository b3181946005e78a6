# nanoVLM, stage 1, from scratch: eyes and language model learn to see from descriptions, and from the names of what each of a
# picture's 64 tokens shows, and point at things. 1.7 M parameters; 1,500 steps x 16 pictures, nearly twice each of 12,618.
# Expect a val_loss of 0.24 after eleven minutes on one core.
model = 'vlm'
dataset = 'scenes_align'
batch_size = 16
micro_batch_size = 16
max_iters = 1500
eval_interval = 500
