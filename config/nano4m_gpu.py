# nano4M for one large GPU (H100, H200) and about ten minutes, on ten times the scenes: first
#     python -m prepare.scenes --n_train=200000 --out=data/scenes_large
# 64.1 M parameters. A sample has 80 input and 236 target tokens on average: 6 x (80 x 38 M + 236 x 25 M) = 54 GFLOP.
# At a quarter of 770 TFLOP/s that is 3,600 samples a second: 8,000 steps x 256 samples = 2.0 M, 10 epochs, in 9.5
# minutes. Not run: no GPU was at hand; only its first steps, on a CPU.
model = 'fourm'
dataset = 'scenes_large'
n_layer_encoder = 12
n_layer_decoder = 8
n_head = 8
n_embd = 512
dropout = 0.05
batch_size = 256
micro_batch_size = 256
max_iters = 8000
muon_learning_rate = 0.01
eval_interval = 2000
