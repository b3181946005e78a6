# GPT on TinyStories, byte-pair encoding with 4,096 tokens: 4.7 M parameters in 6 blocks, 2.1 M in embedding and head.
# 4,000 steps x 16 x 256 = 16.4 M tokens, about 3 % of the stories: each is used at most once, so there is no
# regularization. The course's size, 25.2 M + 4.2 M parameters and 1,000 M tokens = 15,259 steps x 256 x 256, for two
# GPUs (2 x 128):
#     torchrun --nproc_per_node=2 train.py config/gpt_tinystories.py --out_dir=out/gpt_tinystories_long \
#         --n_layer=8 --n_head=8 --n_embd=512 --batch_size=256 --micro_batch_size=128 --max_iters=15259
# A loss in nats per token depends on the encoding: bits per byte = loss / ln 2 / bytes_per_token (in meta.json).
model = 'gpt'
dataset = 'tinystories'
n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
batch_size = 16
max_iters = 4000
eval_interval = 1000
eval_iters = 50
