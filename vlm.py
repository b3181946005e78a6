"""
Chapter 5. nanoVLM: a language model that sees.

A picture becomes words that nobody speaks. The eyes, a Transformer over patches, look at the whole picture and give one vector a
patch; the projector, one matrix, turns each small square of these into a vector as wide as the language model's embeddings; and
the language model, chapter 1's GPT as it is, reads them where the text says "here is a picture", and goes on with the question.
It never knows that these vectors were not tokens. Only its answers are trained on (in stage 1 also names of what a picture
shows), and the gradient goes all the way back to the eyes.

A batch is one conversation a row:
    image    (B, H, W, C) or (B, m, H, W, C)  0..255, m pictures a row
    tokens   (B, L)   Config.image_token once for each picture, then questions and answers in turn; -1 after the last
    counted  (B, L)   1 where a token is to be learned: answers and their end tokens
    names    (B, m P, n_names)  where the data set has them: words for what each of a picture's tokens shows, -1 is none
so that one look at a picture serves all questions about it. `draw` makes room for the pictures: T = L + m (P - 1).

    python train.py config/vlm_scenes_align.py     stage 1: to see, from descriptions
    python train.py config/vlm_scenes.py           stage 2: to answer
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"

Papers: LLaVA (Liu et al., 2304.08485), ViT (2010.11929), pixel shuffle as in Idefics3 (2408.12637); for eyes with a past, SigLIP
(2303.15343). Simplified: one size of pictures, one resolution, no chat beyond question and answer.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
from gpt import GPT, Block, KVCache, cross_entropy, decode, norm, rotary


@dataclass
class Config(gpt.Config):
    """All settings of chapter 1, for the language model, and those of the eyes. block_size is that of the text alone."""
    n_layer: int = 4        # of the language model
    n_embd: int = 128       # its width
    image_token: int = 0    # the id that stands for a picture; set by the data set, as are the next three
    n_images: int = 1       # m, pictures a conversation
    image_size: int = 64    # H = W, pixels
    channels: int = 3       # C
    patch: int = 8          # side of a patch in pixels; the eyes see (image_size / patch)^2 of them
    pool: int = 1           # side of the square of patches that makes one token: P = (image_size / patch / pool)^2
    eyes_layer: int = 4     # blocks
    eyes_head: int = 4      # attention heads a block
    eyes_embd: int = 128    # width
    n_named: int = 0        # P where the data set names what each of a picture's tokens shows, else 0
    n_names: int = 0        # the most words that a name has
    blind: bool = False     # never look: what can be known from the questions alone
    # what real weights need (prepare/siglip.py)
    eyes_mlp: str = 'relu2'         # as chapter 1's settings without `eyes_`, for the vision encoder
    eyes_mlp_width: int = 0         # the same
    eyes_bias: bool = False         # the same
    eyes_qk_norm: bool = True       # the same
    eyes_rope_theta: float = 100.0  # the same
    eyes_norm_eps: float = 1e-6     # the same


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a picture

def pixel_shuffle(x, pool):
    """Squares of pool x pool patches as one vector each: (B, N, D) -> (B, N / pool^2, pool^2 D). Nothing is lost, and the
    language model has fewer tokens to read. (The papers' name; in PyTorch this direction is pixel_unshuffle.)"""
    side = round(x.size(1) ** 0.5)
    x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
    return F.pixel_unshuffle(x, pool).flatten(2).transpose(1, 2)


def make_room(tokens, image_token, P, n_images):
    """Where the tokens of a sequence with pictures come from: (B, L) -> (B, L + m (P - 1)) indices into L, those of a picture's
    token P times. Raises ValueError where a row tells of another number of pictures than n_images = m."""
    image = tokens == image_token
    if (image.sum(1) != n_images).any():
        raise ValueError(f'a row tells of {image.sum(1).tolist()} pictures and brings {n_images}')
    place = torch.arange(tokens.size(1), device=tokens.device).repeat(len(tokens))
    return place.repeat_interleave(torch.where(image, P, 1).flatten()).view(len(tokens), -1)


class Eyes(nn.Module):
    """A Vision Transformer (arXiv 2010.11929): chapter 1's blocks, looking both ways, over the patches of a picture."""
    def __init__(self, config):
        super().__init__()
        c = gpt.Config(n_head=config.eyes_head, n_embd=config.eyes_embd, dropout=config.dropout, mlp=config.eyes_mlp,
                       mlp_width=config.eyes_mlp_width, bias=config.eyes_bias, qk_norm=config.eyes_qk_norm,
                       norm_eps=config.eyes_norm_eps)
        side, D = config.image_size // config.patch, c.n_embd
        self.patch, self.eps = config.patch, c.norm_eps
        self.patch_embedding = nn.Linear(config.channels * config.patch ** 2, D)
        self.blocks = nn.ModuleList(Block(c) for _ in range(config.eyes_layer))
        self.gain, self.shift = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))  # of what the projector reads
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
        # places: learned, and at first alike for patches that lie near each other
        self.place_embedding = nn.Parameter(torch.cat(rotary(grid, D, theta=100), -1))  # (N, D)
        self.register_buffer('turn', torch.stack(rotary(grid, D // c.n_head, config.eyes_rope_theta)), persistent=False)

    def forward(self, images):
        """Pictures (B, H, W, C) of values 0..255 -> (B, N, D)."""
        x = F.pixel_unshuffle(images.movedim(-1, 1) / 127.5 - 1, self.patch)  # (B, C patch^2, H / patch, W / patch)
        x = self.patch_embedding(x.flatten(2).transpose(1, 2)) + self.place_embedding  # (B, N, D)
        for block in self.blocks:
            x = block(x, self.turn, causal=False)
        return norm(x, self.eps) * self.gain + self.shift


# ---------------------------------------------------------------------------------------------------------------------
# The model

class VLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.image_size % (config.patch * config.pool) == 0, (
            f'image_size={config.image_size} must be a multiple of patch * pool = {config.patch * config.pool}')
        self.config = config
        self.fields = ('image', 'tokens', 'counted', 'names')[:3 + (config.n_names > 0)]  # what a batch holds
        self.P = (config.image_size // config.patch // config.pool) ** 2
        assert config.n_named in (0, self.P), (
            f'{self.P} tokens a picture, but the data set names {config.n_named}: choose another patch or pool')
        self.length = config.block_size + config.n_images * (self.P - 1)  # the language model's context, pictures included
        self.eyes = Eyes(config)
        self.projector = nn.Linear(config.pool ** 2 * config.eyes_embd, config.n_embd)
        self.language = GPT(replace(config, block_size=self.length))
        if config.blind:  # nothing of these is used, or learned
            for part in (self.eyes, self.projector):
                part.requires_grad_(False)

    @torch.no_grad()
    def draw(self, batch, generator, shared):
        """Makes room for the pictures and lists what is to be learned, where the batch lies (train.py: in host memory, so that
        its amount is known without waiting for a GPU): rows (R,), indices into the B (T - 1) places that something is predicted
        from, their targets (R,), and weight (R,), which gives each conversation the same share. R is rounded up, with weights 0,
        so that shapes are few. Nothing is random."""
        place = make_room(batch['tokens'], self.config.image_token, self.P, self.config.n_images)
        tokens, counted = (batch[name].gather(1, place) for name in ('tokens', 'counted'))  # (B, T)
        target = torch.where(counted > 0, tokens, -1)[:, 1:, None]  # (B, T - 1, 1): the token after each
        if 'names' in batch:  # of a picture's tokens: the words that name what is there
            target = F.pad(target, (0, self.config.n_names - 1), value=-1)
            target[tokens[:, :-1] == self.config.image_token] = batch['names'].flatten(0, -2)
        flat, real = target.flatten(), target >= 0  # (B, T - 1, words of a place)
        share = real / real.sum((1, 2), keepdim=True).clamp(min=1) / len(tokens)
        chosen = (flat >= 0).nonzero()[:, 0]
        spare = (0, -len(chosen) % 64)
        return dict(image=batch['image'], tokens=tokens, rows=F.pad(chosen // target.size(2), spare),
                    targets=F.pad(flat[chosen], spare), weight=F.pad(share.flatten()[chosen], spare))

    def look(self, images):
        """Pictures (B, H, W, C) or (B, m, H, W, C) -> what the language model reads of them (B, m P, D)."""
        x = self.eyes(images.reshape(-1, *images.shape[-3:]))  # (B m, N, D of the eyes)
        return self.projector(pixel_shuffle(x, self.config.pool)).reshape(len(images), -1, self.config.n_embd)

    def trunk(self, tokens, seen=None, cache=None):
        """Tokens (B, T), and where they hold pictures what was seen in these (B, m P, D) -> (B, T, D), what the head reads."""
        x = self.language.embedding(tokens.clamp(min=0))
        if seen is not None:
            image = tokens == self.config.image_token
            number = (image.flatten().cumsum(0) - 1).clamp(min=0)  # of all that was seen; masked_scatter would wait for the GPU
            x = torch.where(image[..., None], seen.flatten(0, 1).index_select(0, number).view_as(x), x)
        return self.language.trunk(tokens, cache, x)

    def forward(self, batch):
        """A drawn batch -> the mean over conversations of the mean of -ln p, in nats, of answers and names; and logs."""
        seen = None if self.config.blind else self.look(batch['image'])
        x = self.trunk(batch['tokens'][:, :-1], seen).flatten(0, 1).index_select(0, batch['rows'])  # (R, D)
        nll = cross_entropy(x, self.language.head.weight, batch['targets'])  # (R,)
        loss, B, real = (nll * batch['weight']).sum(), len(batch['tokens']), (batch['tokens'] >= 0).sum()
        logs = {'loss': torch.stack((B * loss.detach(), loss.new_full((), B)))}
        return loss, logs | {'tokens': torch.stack((real, torch.ones_like(real)))}

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def read(self, tokens, images=None, n=1):
        """Prompts (B, L), -1 in front of shorter ones, with their pictures (B, m, H, W, C), into a cache that `stream` goes on
        from; each row n times, so that n questions can be asked after one look."""
        if images is not None:
            tokens = tokens.gather(1, make_room(tokens, self.config.image_token, self.P, images.size(1)))
        seen = None if images is None or self.config.blind else self.look(images)
        cache = KVCache(tokens.size(1), ragged=True)
        self.trunk(tokens, seen, cache)
        cache.repeat(n)
        return cache

    def step(self, tokens, cache):
        """Logits (B, V) of the token after tokens (B, T), which follow what is in the cache; a picture cannot be said."""
        logits = self.language.step(tokens, cache)
        logits[:, self.config.image_token] = -torch.inf
        return logits

    def stream(self, tokens, cache, max_new_tokens=16, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None):
        """Goes on with tokens (B, T0), -1 in front of shorter ones, behind what the cache holds; yields the next token of each
        row, (B,), up to max_new_tokens times and while there is room in the context, see gpt.decode. The last token drawn is not
        in the cache yet: a next turn begins with it."""
        n = min(max_new_tokens, self.length - cache.filled - tokens.size(1) + 1)
        cache.length, ended = cache.filled + tokens.size(1) + n - 1, tokens.new_zeros(len(tokens), dtype=torch.bool)
        return decode(self, tokens, cache, ended, n, temperature, top_k, top_p, min_p, end, generator)

    def generate(self, tokens, cache, max_new_tokens=16, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None):
        """All that `stream` yields: (B, n), n <= max_new_tokens."""
        new = list(self.stream(tokens, cache, max_new_tokens, temperature, top_k, top_p, min_p, end, generator))
        return torch.stack(new, 1) if new else tokens[:, :0]


Model = VLM
