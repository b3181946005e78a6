# nanoVLM, stage 1, from scratch: eyes and language model learn to see from descriptions, and from the names of what each of a
# picture's 64 tokens shows. 1.7 M parameters, 97 tokens a picture.
model = 'vlm'
dataset = 'scenes_align'
batch_size = 16
micro_batch_size = 16
max_iters = 1000
eval_interval = 1000
