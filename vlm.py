"""
Chapter 5. nanoVLM: a language model that reads images.

The vision encoder, a Transformer over patches, makes one vector per patch. The projector, a linear layer, maps each
square of f x f vectors to one image embedding, as wide as a token's. The language model, chapter 1's GPT unchanged,
reads an image's P embeddings in place of its image token, then questions and answers as text. Answers are the targets
(in stage 1, patch labels too). The gradient reaches the vision encoder through the language model.

    loss = mean over conversations b, then over targets i of b, of -ln p(token_i | tokens before i, images of b)

A batch of B conversations with m images each (prepare_batch repeats each image token P times: T = L + m (P - 1)):
    image         (B, H, W, C) or (B, m, H, W, C)  values 0..255
    tokens        (B, L)  image_token once per image, then questions and answers in turn; -1 after the last
    loss_mask     (B, L)  1 where a token is a target: answers and the end token of each
    patch_labels  (B, m P, max_label_tokens)  in some data sets: words that each image embedding predicts; -1: none

    python train.py config/vlm_scenes_align.py     stage 1: descriptions of images
    python train.py config/vlm_scenes.py           stage 2: questions and answers
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"

How it is trained: train.py repeats these lines, in stage 2 from the weights of stage 1 (init_from).
    batch = model.prepare_batch(batch, ...)  # on the host: expand image tokens, list the targets
    loss, logs = model(batch)                # vision encoder, projector, language model, cross-entropy
    loss.backward()                          # gradients of all three
    optimizer.step()                         # stage 2: the vision encoder at 0.3 of the learning rate (lr_multipliers)

Papers: LLaVA (2304.08485), ViT (2010.11929), pixel shuffle as in Idefics3 (2408.12637), without tiles. What differs:
- LLaVA freezes a pretrained CLIP; stage 1 trains the projector alone, stage 2 also a pretrained language model. Here
  all parts learn in both stages, from scratch, stage 1 with patch labels. The loss is a mean per conversation first.
- ViT has a class token (none here), LayerNorm (RMSNorm here) and randomly initialized position embeddings. Here these
  start as cosines and sines, RoPE by row and column is added, and blocks are chapter 1's.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
from gpt import GPT, Block, KVCache, chunked_cross_entropy, decode, rms_norm, rope_cos_sin


@dataclass
class Config(gpt.Config):
    """Chapter 1's settings for the language model, then the vision encoder's. block_size counts an image as 1 token."""
    n_layer: int = 4               # blocks of the language model
    n_embd: int = 128              # D, its width
    image_token: int = 0           # id of the image token; set by the data set, as are the next three
    n_images: int = 1              # m, images per conversation
    image_size: int = 64           # H = W, pixels
    channels: int = 3              # C
    patch_size: int = 8            # side of a patch in pixels; N = (image_size / patch_size)^2 patches
    pixel_shuffle_factor: int = 1  # f, side in patches of the square that becomes one image embedding: P = N / f^2
    vision_layer: int = 4          # blocks of the vision encoder
    vision_head: int = 4           # its attention heads
    vision_embd: int = 128         # Dv, its width
    n_patch_labels: int = 0        # P if the data set has patch labels, else 0; set by it, as is the next
    max_label_tokens: int = 0      # the most words of a label
    text_only: bool = False        # ignore images: a baseline that answers from the question alone
    # only for pretrained weights (prepare/siglip.py): chapter 1's settings for the vision encoder
    vision_activation: str = 'relu2'   # of the MLP; or swiglu, gelu_tanh
    vision_mlp_hidden_dim: int = 0     # hidden units of the MLP; 0: 4 vision_embd
    vision_bias: bool = False          # biases in the linear layers of a block
    vision_qk_norm: bool = True        # normalize queries and keys
    vision_rope_base: float = 100.0    # of RoPE by row and column of a patch; 0: no rotation
    vision_norm_eps: float = 1e-6      # of RMSNorm


def pixel_shuffle(x, factor):
    """Join the patches of each factor x factor square, channel by channel: (B, N, D) -> (B, N / factor^2, factor^2 D).
    4 x 4 patches 0..15, factor 2: [0 1 4 5], [2 3 6 7], [8 9 12 13], [10 11 14 15]. PyTorch: pixel_unshuffle."""
    side = round(x.size(1) ** 0.5)
    x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
    return F.pixel_unshuffle(x, factor).flatten(2).transpose(1, 2)  # (B, N / factor^2, factor^2 D)


def expand_image_tokens(tokens, image_token, tokens_per_image, n_images):
    """Return indices (B, T) into tokens (B, L) that repeat each image token tokens_per_image = P times.
    If P = 3 and image_token = 9, then tokens [5 9 1 2] have indices [0 1 1 1 2 3]; gather gives [5 9 9 9 1 2].
    Raises ValueError if a row has a number of image tokens other than n_images."""
    is_image = tokens == image_token
    if (is_image.sum(1) != n_images).any():
        raise ValueError(f'rows have {is_image.sum(1).tolist()} image tokens, each should have n_images={n_images}')
    position = torch.arange(tokens.size(1), device=tokens.device).repeat(len(tokens))  # (B L,)
    return position.repeat_interleave(torch.where(is_image, tokens_per_image, 1).flatten()).view(len(tokens), -1)


class VisionEncoder(nn.Module):
    """A Vision Transformer (arXiv 2010.11929): chapter 1's blocks with full attention over the patches of an image."""
    def __init__(self, config):
        super().__init__()
        c = gpt.Config(n_head=config.vision_head, n_embd=config.vision_embd, dropout=config.dropout,
                       activation=config.vision_activation, mlp_hidden_dim=config.vision_mlp_hidden_dim,
                       bias=config.vision_bias, qk_norm=config.vision_qk_norm, norm_eps=config.vision_norm_eps)
        side, D = config.image_size // config.patch_size, c.n_embd  # here D is Dv, the vision encoder's width
        self.patch_size, self.eps = config.patch_size, c.norm_eps
        self.patch_embedding = nn.Linear(config.channels * config.patch_size ** 2, D)
        self.blocks = nn.ModuleList(Block(c) for _ in range(config.vision_layer))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))  # of the last norm
        positions = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2) row and column
        self.pos_embedding = nn.Parameter(torch.cat(rope_cos_sin(positions, D, rope_base=100), -1))  # (N, Dv) learned
        rope = rope_cos_sin(positions, D // c.n_head, config.vision_rope_base)
        self.register_buffer('rope', torch.stack(rope), persistent=False)  # (2, N, hd / 2)

    def forward(self, images):
        """Encode images (B, H, W, C), values 0..255, as one vector per patch, (B, N, Dv)."""
        x = F.pixel_unshuffle(images.movedim(-1, 1) / 127.5 - 1, self.patch_size)  # (B, C patch_size^2, side, side)
        x = self.patch_embedding(x.flatten(2).transpose(1, 2)) + self.pos_embedding  # (B, N, Dv)
        for block in self.blocks:
            x = block(x, self.rope, causal=False)
        return rms_norm(x, self.eps) * self.norm_weight + self.norm_bias


class VLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        square = config.patch_size * config.pixel_shuffle_factor  # pixels per side of one image embedding
        assert config.image_size % square == 0, (
            f'image_size={config.image_size} must be a multiple of patch_size * pixel_shuffle_factor = {square}')
        P = (config.image_size // square) ** 2
        assert config.n_patch_labels in (0, P), (
            f'{P} embeddings an image, {config.n_patch_labels} patch labels: change patch_size or pixel_shuffle_factor')
        self.config, self.tokens_per_image = config, P
        self.batch_keys = ('image', 'tokens', 'loss_mask', 'patch_labels')[:4 if config.max_label_tokens else 3]
        self.max_seq_len = config.block_size + config.n_images * (P - 1)  # T, images included
        self.vision_encoder = VisionEncoder(config)
        self.projector = nn.Linear(config.pixel_shuffle_factor ** 2 * config.vision_embd, config.n_embd)
        self.language_model = GPT(replace(config, block_size=self.max_seq_len))
        if config.text_only:  # no gradient
            self.vision_encoder.requires_grad_(False), self.projector.requires_grad_(False)

    @torch.no_grad()
    def prepare_batch(self, batch, generator, step_generator):
        """Expand the image tokens and list the R targets of a batch; nothing is random.
        Returns image, tokens (B, T) and, each (R,): targets; token_idx, which of the B (T - 1) input positions predicts
        each; weight, 1 / B in total per conversation. R is padded to a multiple of 64 (weight 0): few shapes."""
        c = self.config
        # 1. expand: each image token becomes P positions
        idx = expand_image_tokens(batch['tokens'], c.image_token, self.tokens_per_image, c.n_images)
        tokens, loss_mask = batch['tokens'].gather(1, idx), batch['loss_mask'].gather(1, idx)  # (B, T)
        # 2. loss mask and labels: the targets of each position, -1 is none
        targets = torch.where(loss_mask > 0, tokens, -1)[:, 1:, None]  # (B, T - 1, 1) the next token
        if 'patch_labels' in batch:  # an image embedding predicts all words of its label
            targets = F.pad(targets, (0, c.max_label_tokens - 1), value=-1)  # (B, T - 1, max_label_tokens)
            targets[tokens[:, :-1] == c.image_token] = batch['patch_labels'].flatten(0, -2)
        # 3. flatten, with weights: the mean over a conversation's targets, then over conversations
        valid = targets >= 0
        weight = valid / valid.sum((1, 2), keepdim=True).clamp(min=1) / len(tokens)
        target_idx = valid.flatten().nonzero()[:, 0]  # (R,)
        padding = (0, -len(target_idx) % 64)
        return dict(image=batch['image'], tokens=tokens, token_idx=F.pad(target_idx // targets.size(2), padding),
                    targets=F.pad(targets.flatten()[target_idx], padding),
                    weight=F.pad(weight.flatten()[target_idx], padding))

    def encode_images(self, images):
        """Turn images (B, H, W, C) or (B, m, H, W, C) into image embeddings (B, m P, D)."""
        x = self.vision_encoder(images.reshape(-1, *images.shape[-3:]))  # (B m, N, Dv)
        x = pixel_shuffle(x, self.config.pixel_shuffle_factor)  # (B m, P, f^2 Dv)
        return self.projector(x).reshape(len(images), -1, self.config.n_embd)  # (B, m P, D)

    def backbone(self, tokens, image_embeds=None, cache=None):
        """Read tokens (B, T), with image_embeds (B, m P, D) in place of image tokens, in their order -> (B, T, D)."""
        x = self.language_model.token_embedding(tokens.clamp(min=0))
        if image_embeds is not None:
            is_image = tokens == self.config.image_token
            image_embed_idx = (is_image.flatten().cumsum(0) - 1).clamp(min=0)  # (B T,); masked_scatter would sync
            image_embeds = image_embeds.flatten(0, 1).index_select(0, image_embed_idx).view_as(x)  # (B, T, D)
            x = torch.where(is_image[..., None], image_embeds, x)
        return self.language_model.backbone(tokens, cache, x)

    def forward(self, batch):
        """Return the loss in nats and logs of a prepared batch, step by step:
        image (B, m, H, W, C) -> patches (B m, N, Dv) -> pixel shuffle (B m, P, f^2 Dv) -> projector (B, m P, D)
        tokens (B, T - 1) -> embeddings (B, T - 1, D), image embeddings in place -> language model (B, T - 1, D)
        -> the R positions that have a target (R, D) -> logits (R, V) -> -ln p(target) (R,) -> weighted sum ()"""
        image_embeds = None if self.config.text_only else self.encode_images(batch['image'])  # (B, m P, D)
        x = self.backbone(batch['tokens'][:, :-1], image_embeds)  # (B, T - 1, D)
        x = x.flatten(0, 1).index_select(0, batch['token_idx'])  # (R, D)
        nll = chunked_cross_entropy(x, self.language_model.lm_head.weight, batch['targets'])  # (R,)
        loss, B, n_tokens = (nll * batch['weight']).sum(), len(batch['tokens']), (batch['tokens'] >= 0).sum()
        return loss, {'loss': torch.stack((B * loss.detach(), loss.new_full((), B))),
                      'tokens': torch.stack((n_tokens, torch.ones_like(n_tokens)))}

    # ---- Prefill: read images and prompts into the cache
    @torch.no_grad()
    def prefill(self, tokens, images=None, n_repeat=1):
        """Read left-padded prompts (B, L) and images (B, m, H, W, C); return the cache, each row n_repeat times."""
        if images is not None:
            idx = expand_image_tokens(tokens, self.config.image_token, self.tokens_per_image, images.size(1))
            tokens = tokens.gather(1, idx)  # (B, T)
        image_embeds = None if images is None or self.config.text_only else self.encode_images(images)
        cache = KVCache(tokens.size(1), left_padded=True)
        self.backbone(tokens, image_embeds, cache)
        cache.repeat_batch(n_repeat)
        return cache

    # ---- Decode: sample one token at a time
    def step(self, tokens, cache):
        """Read tokens (B, T) into the cache; return logits (B, V) of the next token, -inf for the image token."""
        logits = self.language_model.step(tokens, cache)
        logits[:, self.config.image_token] = -torch.inf
        return logits

    def stream(self, tokens, cache, max_new_tokens=16, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, eos_id=-1,
               generator=None):
        """Continue tokens (B, T0), left-padded with -1, after the cache; yield each next token (B,) as gpt.decode does,
        until the context is full. The last token is not in the cache: a next question must begin with it."""
        n = min(max_new_tokens, self.max_seq_len - cache.cur_len - tokens.size(1) + 1)
        cache.max_len = cache.cur_len + tokens.size(1) + n - 1  # how much to allocate
        finished = tokens.new_zeros(len(tokens), dtype=torch.bool)
        return decode(self, tokens, cache, finished, n, temperature, top_k, top_p, min_p, eos_id, generator)

    def generate(self, tokens, cache, max_new_tokens=16, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, eos_id=-1,
                 generator=None):
        """Return all tokens that `stream` yields, (B, n), n <= max_new_tokens."""
        new = list(self.stream(tokens, cache, max_new_tokens, temperature, top_k, top_p, min_p, eos_id, generator))
        return torch.stack(new, dim=1) if new else tokens[:, :0]


Model = VLM
