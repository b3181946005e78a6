# SigLIP-B/16 (93 M weights) + one matrix of 3,072 x 576 (1.8 M) + SmolLM2-135M (163 M, lm_head untied): the course's
# nanoVLM, on your own conversations or LLaVA-Instruct's. Make the data first:
#     python -m prepare.vqa --input=llava_instruct_150k.json --images=FOLDER
#     torchrun --nproc_per_node=2 train.py config/vlm_smol.py
# 196 patches become 49 tokens (pixel_shuffle_factor 2). 258 M weights, of which 165 M are trained, need 3 GB per GPU
# with gradients and AdamW's moments, and the activations of 32 conversations of 49 + 256 tokens. 4,000 steps x 256
# conversations = 1 M. The vision encoder is frozen. LLaVA's first stage trains the projector alone:
#     --lr_multipliers="vision_encoder:0 language_model:0" --max_iters=500 --out_dir=out/vlm_smol_align
# then --init_from=vlm_smol_align starts from its weights. Not trained yet: its parts are tested, its result is unknown.
model = 'vlm'
dataset = 'vqa'
init_from = 'vision_encoder:siglip,language_model:smollm2'
pixel_shuffle_factor = 2
batch_size = 256
micro_batch_size = 32
max_iters = 4000
muon = False  # orthogonal updates would move trained weights too far
learning_rate = 1e-3
lr_multipliers = 'vision_encoder:0 language_model:0.05'
warmup_iters = 100
eval_interval = 1000
eval_iters = 20
