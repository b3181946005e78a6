# SmolLM2-135M, fine-tuned on your own text. The weights are downloaded on the first run.
# Make the data first:
#     python -m prepare.text --input=FILE --encoding=smollm2
# 8 x 256 = 2,048 tokens per step, 150 steps = 307 k tokens: one pass over 1 MB of English. 163 M weights need 2.6 GB
# with gradients and AdamW's two moments, 4.5 GB with the activations of 4 x 256 tokens (float32: 5.2 GB). A checkpoint
# has 2 GB. On two CPU cores a step takes 7 s in bfloat16, 13 s in float32: 18 or 33 minutes in total. The model's sizes
# are loaded with its weights.
model = 'gpt'
init_from = 'smollm2'
dataset = 'text'
block_size = 256
batch_size = 8
micro_batch_size = 4
max_iters = 150
muon = False  # orthogonal updates would move trained weights too far
learning_rate = 3e-5
warmup_iters = 10
eval_interval = 50
eval_iters = 16
