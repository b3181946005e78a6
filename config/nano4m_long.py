# nano4M as in nano4m.py, trained longer: 4,000 steps x 32 scenes, 6.4 passes over the data.
model = 'fourm'
dataset = 'scenes'
n_layer_decoder = 4
batch_size = 32
micro_batch_size = 32
max_iters = 4000
eval_interval = 1000
