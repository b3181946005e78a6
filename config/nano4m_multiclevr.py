# nano4M on the course's data (prepare/multiclevr.py): rgb, depth, normal as 256 tokens of 64,000 codes each,
# scene_desc, caption. The course's sizes: 6 + 6 layers of width 512, 128 + 128 tokens per sample, 512 samples per step;
# 38,146 steps x 131,072 tokens = 5,000 M. In the course's padded batches 64.5 + 64.5 of the slots held real
# tokens on average; here about 77 + 128 do, so --max_iters=24000 processes as many. 40 M parameters
# instead of 110 M: codes are embedded and predicted by their digits.
#     python -m prepare.multiclevr --source=.../datasets/clevr_com_304
#     sbatch config/scitas.sbatch config/nano4m_multiclevr.py
#     torchrun --nproc_per_node=2 train.py config/nano4m_multiclevr.py
# On one H100 (80 GB) with random data, a step takes 81 ms with --micro_batch_size=512 (18 GB), 71 ms with --graphs=True
# too: 52 or 45 minutes in total without evaluations. Four micro-batches of 128 took 224 ms before the last changes. Not
# trained yet at this size. For comparison, the course's loss is 3.5 (rgb 5.8, depth 4.05, normal 3.9, text 0.28).
model = 'fourm'
dataset = 'multiclevr'
n_layer_encoder = 6
n_layer_decoder = 6
n_head = 8
n_embd = 512
num_input_tokens = '128'  # '128,320' also fits a complete image, 256 tokens, and a text, as needed for rgb -> depth
num_target_tokens = '128'
batch_size = 512
micro_batch_size = 128
max_iters = 5000 * 10 ** 6 // (512 * (128 + 128))
warmup_iters = 500
eval_interval = 2000
