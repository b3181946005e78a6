# nanoVLM, stage 1, from scratch: vision encoder, projector and language model learn from descriptions, labels of an
# image's 64 tokens and from questions about positions. 1.7 M parameters; 1,500 steps x 16 images, nearly two epochs of
# 12,618. Expect a val_loss of 0.24 after eleven minutes on one core.
model = 'vlm'
dataset = 'scenes_align'
batch_size = 16
micro_batch_size = 16
max_iters = 1500
eval_interval = 500
