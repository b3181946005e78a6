# nano4M on CIFAR-10 (prepare/cifar10_modalities.py): any of rgb, grey, edges, palette, low, caption -> any other.
# 4.0 M parameters; 10,000 steps x 64 images x (60 input + 190 target tokens) = 160 M tokens, 13 epochs of 50,000.
# Five hours on two CPU cores without bfloat16 at 9,000 tokens/s. Run so far: 1,000 steps (docs/fourm.md).
model = 'fourm'
dataset = 'cifar10_modalities'
n_layer_decoder = 4
n_head = 6
n_embd = 192
num_target_tokens = '192'  # about all tokens that are not input: an image has 261, and a caption
batch_size = 64
micro_batch_size = 64
max_iters = 10000
eval_interval = 2500
eval_iters = 32
