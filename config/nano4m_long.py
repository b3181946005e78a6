# nano4M as in nano4m.py, wider, deeper and trained for an hour.
model = 'fourm'
dataset = 'scenes'
n_layer_decoder = 4
n_head = 6
n_embd = 192
batch_size = 16
micro_batch_size = 16
max_iters = 6000
eval_interval = 3000
