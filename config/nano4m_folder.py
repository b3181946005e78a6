# nano4M on your own images with captions (prepare/folder.py): any of rgb, grey, edges, palette, low, caption -> any
# other. 2,000 steps x 16 images x (60 input + 190 target tokens) = 8 M tokens, 1.8 M parameters: for a few thousand
# images.
model = 'fourm'
dataset = 'folder'
num_target_tokens = '192'  # about all tokens that are not input: an image has 261, and a caption
batch_size = 16
micro_batch_size = 16
max_iters = 2000
eval_interval = 1000
