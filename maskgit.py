"""
Chapter 2. MaskGIT: an encoder-only Transformer that predicts masked tokens, and generates by unmasking a few per step.

In training, a random subset of a sample's tokens is replaced by a mask token, and the model, whose attention is full,
predicts the originals. The mask ratio is random, so one model can continue from every state between an empty image and
a finished one. To generate, start with all tokens masked, predict all positions in parallel, keep some of the sampled
tokens, repeat: 8 steps instead of one per token. Any tokens may be given: in-painting needs no other model.

    loss = mean over samples of  1/k sum_{i masked} -ln p(x_i | unmasked tokens, class),  k masked tokens in the sample

A batch is {'tokens': (B, T) integers}: a class first, if any; then N of the sample; -1, padding, is seen as masked.
A training step: `prepare_batch` samples masks (B, N); `forward`: embeddings (B, N, D) -> blocks -> the R masked
positions (R, D) -> head: -ln p (R,) -> loss; train.py calls loss.backward() and optimizer.step().

    python train.py config/maskgit_mnist.py
    python sample.py --out_dir=out/maskgit_mnist --order=random --steps=16

Paper: MaskGIT (Chang et al., 2202.04200). What differs: mask ratios are uniform by default, not cosine, and the loss is
a mean over each sample first, so that it bounds -ln p (2110.02037, 2406.04329); masks in antithetic pairs; no label
smoothing; the class is added to every token, not a token of its own; classifier-free guidance; random order by default,
not confidence; chapter 1's attention and MLP; output weights not tied to embeddings; FSQ codes digit by digit.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import MLP, Attention, ChannelDropout, rms_norm, rope_cos_sin, sample_token


@dataclass
class Config:
    vocab_size: int = 65        # V, number of token ids; set by the data set
    levels: str = ''            # '16*16*16*16': an id has four digits (FSQ); '' is one digit; set by the data set
    grid: str = ''              # '7x7': rows x columns of an image; '' is a text; set by the data set
    block_size: int = 256       # N of a text
    n_classes: int = 0          # number of classes; 0: rows do not start with a class; set by the data set
    n_layer: int = 4            # number of blocks
    n_head: int = 6             # nh, attention heads per block
    n_embd: int = 192           # D, the width
    dropout: float = 0.0        # fraction of channels dropped from each residual branch
    label_dropout: float = 0.1  # fraction of training samples without their class; guidance needs some
    mask_schedule: str = 'uniform'  # distribution of the mask ratio: uniform, cosine or arccos; the last two mask more
    elbo: bool = False          # weight samples so that N times the loss bounds -ln p under every mask schedule


# ----------------------------------------------------------------------------------------------------------------------
# Masking (MaskGIT, section 3.1)

COSINE, ARCCOS = lambda u: torch.cos(math.pi / 2 * u), lambda u: torch.arccos(u) * 2 / math.pi  # mutually inverse
MASK_SCHEDULES = dict(  # gamma: u in 0..1 -> mask ratio; and gamma^-1
    uniform=(lambda u: 1 - u, lambda ratio: 1 - ratio), cosine=(COSINE, ARCCOS), arccos=(ARCCOS, COSINE))


def random_mask(valid, u, noise, mask_schedule):
    """Mask ceil(gamma(u) n) >= 1 of the n valid tokens: valid, noise (B, N), u (B, 1) in [0, 1] -> (B, N) booleans.
    Example: n = 4, uniform, u = 0.4 -> ceil(0.6 * 4) = 3 masked tokens, those with the smallest noise."""
    n_masked = (MASK_SCHEDULES[mask_schedule][0](u) * valid.sum(1, keepdim=True)).ceil().clamp(min=1)  # (B, 1)
    order = noise.masked_fill(~valid, torch.inf).argsort(-1)  # positions in a random order, padding last
    rank = order.argsort(-1)  # of each position in that order
    return valid & (rank < n_masked)


def antithetic_masks(valid, mask_schedule, generator):
    """Sample masks (B, N) in antithetic pairs: two samples get (u, noise) and (1 - u, 1 - noise); u is evenly spaced
    over pairs (2107.00630, appendix I). If gamma is uniform, a pair covers all positions and overlaps in one."""
    (B, N), n_pairs = valid.shape, math.ceil(len(valid) / 2)
    u = (torch.rand(1, generator=generator) + torch.arange(n_pairs) / n_pairs).remainder(1)  # (n_pairs,)
    half = torch.cat((u[:, None], torch.rand(n_pairs, N, generator=generator)), 1)  # (n_pairs, 1 + N)
    u_and_noise = torch.stack((half, 1 - half), 1).flatten(0, 1)[:B]  # (B, 1 + N)
    return random_mask(valid, u_and_noise[:, :1], u_and_noise[:, 1:], mask_schedule)


def importance_weight(mask, valid, mask_schedule):
    """p_uniform(k) / p_schedule(k), (B,), for k of n tokens masked. So weighted, the mean loss is that of the uniform
    schedule. p_uniform(k) = 1/n, p_schedule(k) = gamma^-1((k - 1)/n) - gamma^-1(k/n)."""
    k, n, inverse = mask.sum(1).float(), valid.sum(1).float(), MASK_SCHEDULES[mask_schedule][1]
    return 1 / (n * (inverse((k - 1) / n) - inverse(k / n)).clamp(min=1e-9))


# ----------------------------------------------------------------------------------------------------------------------
# Iterative decoding (MaskGIT, section 3.2): one loop for every order and schedule

ORDERS, SCHEDULES = ('confidence', 'random', 'raster', 'halton'), ('cosine', 'linear', 'constant')


def unmask_schedule(total, steps, schedule):
    """How many of n = `total` (B, 1) tokens are unmasked after step s = 1..S, (B, S): cosine n (1 - cos(pi/2 s/S)),
    linear n s/S, rounded up; constant s ceil(n/S). Each step >= 1. Cosine, 49, S = 8: 1, 4, 9, 15, 22, 31, 40, 49."""
    step = torch.arange(1, steps + 1, device=total.device)
    if schedule == 'cosine':  # minus 1e-9: a whole number must not be rounded up
        n_unmasked = (total * (1 - torch.cos(math.pi / 2 * step.double() / steps)) - 1e-9).ceil().long()
    else:
        n_unmasked = -(-total * step // steps) if schedule == 'linear' else -(-total // steps) * step
    return n_unmasked.minimum(total - steps + step).maximum(step).minimum(total)  # at least one in every step


def halton_order(grid):
    """Rank (N,) of each position of a grid (rows, columns) or (length,) in the Halton sequence. Successive ranks are
    far apart, so tokens unmasked in one step depend little on each other (Besnier et al., 2503.17076, section 3.2)."""
    number, place, cell = torch.arange(16 * math.prod(grid))[:, None] + 1, torch.arange(20), 0  # 16 N points reach all
    for base, size in zip((2, 3), grid):
        digits = number // base ** place % base  # (16 N, 20)
        cell = cell * size + (digits * base ** place.flip(0)).sum(1) * size // base ** 20  # 6 = 110 -> 0.011 = 3/8
    first_visit = torch.full((math.prod(grid),), len(number)).scatter_reduce(0, cell, number[:, 0], 'amin')
    return first_visit.argsort(stable=True).argsort()


def lerp(start, end, progress):  # start at progress 0, end at progress 1; constant if end is None
    return start if end is None else start + (end - start) * progress


def iterative_decode(tokens, predict, grid, steps, order='random', schedule='cosine', choice_temperature=0.0,
                     generator=None):
    """Unmask the unknown tokens, -1 in tokens (B, N), in `steps` steps; yield the tokens (B, N) after each.
    predict(tokens, progress) samples a token for each position and returns them with their ln p, (B, N) each; progress
    goes from 0 to 1. A step keeps the next tokens in an order: random (MAR, 2406.11838), raster, halton, or the most
    probable (confidence: MaskGIT; plus Gumbel noise times choice_temperature, decaying to 0). Known tokens stay.
    Raises ValueError if steps is not in 1 .. the largest number of unknown tokens of a sample."""
    total = (tokens < 0).sum(1, keepdim=True).cpu()  # (B, 1); Apple's GPUs have no float64
    if order not in ORDERS or schedule not in SCHEDULES or not 0 <= choice_temperature <= 1000:
        raise ValueError(f'order is one of {ORDERS}, schedule one of {SCHEDULES}, choice_temperature in 0..1000')
    if not 1 <= steps <= total.max():
        raise ValueError(f'steps={steps}: {total.max()} tokens are unknown, and each step unmasks at least one')
    priority = (halton_order(grid) if order == 'halton' else torch.arange(tokens.size(1))).to(tokens.device).float()
    if order == 'random':
        priority = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    n_new = unmask_schedule(total, steps, schedule).diff(prepend=torch.zeros_like(total)).to(tokens.device)  # (B, S)
    for step in range(steps):
        progress = step / max(1, steps - 1)
        sampled, log_p = predict(tokens, progress)
        if order == 'confidence':
            priority = -log_p.clamp(min=-1e30)  # finite: an unknown token with ln p = -inf comes before known ones
            if choice_temperature:
                gumbel = -torch.empty_like(log_p).exponential_(generator=generator).clamp_(1e-30).log()
                priority = priority - choice_temperature * (1 - progress) * gumbel
        rank = torch.where(tokens < 0, priority, torch.inf).argsort(-1).argsort(-1)  # known tokens last
        tokens = torch.where(rank < n_new[:, step, None], sampled, tokens)
        yield tokens


class Block(nn.Module):  # a Transformer block with full attention
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head)
        self.mlp = MLP(config.n_embd)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x, rope):
        x = x + self.dropout(self.attention(rms_norm(x), rope))
        return x + self.dropout(self.mlp(rms_norm(x)))


def id_to_digits(ids, levels):
    """Mixed-radix digits of ids (FSQ's dimensions), most significant first. Example: 7, levels 2, 4 -> 1, 3."""
    return [ids // math.prod(levels[d + 1:]) % level for d, level in enumerate(levels)]


def init_level_embeddings(level, D):
    """Initial embeddings (level, D) of an FSQ digit (2309.15505): its levels are ordered, so neighbours start similar.
    A random matrix gives each digit its own directions, since the embeddings of an id's digits are added."""
    sinusoids = torch.cat(rope_cos_sin(torch.arange(level)[:, None] * 2 * math.pi / level, D, 100), -1)  # (level, D)
    return sinusoids @ torch.randn(D, D) / D ** 0.5


class Head(nn.Module):
    """p(id | h) = prod_d p(digit_d | h, digits before d), each a softmax of a linear layer of GELU(h). Without `levels`
    an id is 1 digit. A digit's embedding is added to h for the next (as in NADE). 65,536 FSQ codes: 4 x 16 logits."""
    def __init__(self, levels, n_embd):
        super().__init__()
        self.levels = levels
        self.out = nn.ModuleList(nn.Linear(n_embd, level, bias=False) for level in levels)
        self.embedding = nn.ModuleList(nn.Embedding(level, n_embd) for level in levels[:-1])
        for out in self.out:
            nn.init.zeros_(out.weight)  # the first loss is ln(V), exactly

    def logits(self, h, d):
        return self.out[d](F.gelu(h)).float()  # (..., levels[d])

    def condition_on_digit(self, h, d, digit):
        if d == len(self.embedding):
            return h  # no digit follows the last one
        return h + F.one_hot(digit, self.levels[d]).type_as(h) @ self.embedding[d].weight  # faster than a look-up

    def forward(self, h, ids):
        """-ln p(ids | h) in nats: h (R, D) and ids (R,) -> (R,)."""
        nll = 0
        for d, digit in enumerate(id_to_digits(ids, self.levels)):
            nll = nll + F.cross_entropy(self.logits(h, d), digit, reduction='none')
            h = self.condition_on_digit(h, d, digit)
        return nll

    def sample(self, hs, scales, temperature, top_k, top_p, generator):
        """Sample ids; return them and their ln p before `temperature` and filters, (B, N) each. hs: one h (B, N, D) per
        condition; logits are summed, times `scales`. Guidance (2207.12598): hs [cond, uncond], scales [s, 1 - s]."""
        if not all(abs(scale) <= 1e4 for scale in scales):
            raise ValueError(f'guidance and weights give logits the factors {scales}: keep them from -1000 to 1000')
        ids = log_p = 0
        for d, level in enumerate(self.levels):
            logits = sum(scale * self.logits(h, d) for scale, h in zip(scales, hs))
            digit = sample_token(logits, temperature, top_k, top_p, generator=generator)
            log_p = log_p + logits.log_softmax(-1).gather(-1, digit[..., None])[..., 0]
            ids = ids * level + digit
            hs = [self.condition_on_digit(h, d, digit) for h in hs]
        return ids, log_p


class MaskGIT(nn.Module):
    batch_keys = 'tokens',  # what a batch holds

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.levels = [int(level) for level in (config.levels or str(config.vocab_size)).split('*')]
        self.grid = [int(side) for side in (config.grid or str(config.block_size)).split('x')]
        self.N, D = math.prod(self.grid), config.n_embd
        assert math.prod(self.levels) == config.vocab_size, f'levels={config.levels} must make {config.vocab_size=}'
        assert config.mask_schedule in MASK_SCHEDULES, f'mask_schedule must be one of {", ".join(MASK_SCHEDULES)}'
        positions = torch.cartesian_prod(*map(torch.arange, self.grid)).view(self.N, -1)  # (N, axes)
        rope = torch.stack(rope_cos_sin(positions, D // config.n_head, rope_base=100))  # not 10,000: positions are few
        self.register_buffer('rope', rope, persistent=False)
        self.embedding = nn.ModuleList(nn.Embedding(level, D) for level in self.levels)  # summed over a token's digits
        if len(self.levels) > 1:
            for embedding, level in zip(self.embedding, self.levels):
                embedding.weight.data = init_level_embeddings(level, D)
        self.mask_token = nn.Parameter(torch.randn(D))
        # (N, D), learned, starts as sinusoids: without it all positions of an empty image would be equal
        self.pos_embedding = nn.Parameter(torch.cat(rope_cos_sin(positions, D, rope_base=100), -1))
        if config.n_classes:
            self.class_embedding = nn.Embedding(config.n_classes + 1, D)  # the last one: no class
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = Head(self.levels, D)

    def backbone(self, tokens, classes=None):
        """Tokens (B, N), -1 if masked, and classes (B,) -> (B, N, D), the input of the head."""
        x = sum(table(digit) for table, digit in zip(self.embedding, id_to_digits(tokens.clamp(min=0), self.levels)))
        x = torch.where((tokens < 0)[..., None], self.mask_token, x) + self.pos_embedding  # (B, N, D)
        if self.config.n_classes:
            x = x + self.class_embedding(classes)[:, None]
        x = rms_norm(x)
        for block in self.blocks:
            x = block(x, self.rope)
        return rms_norm(x)

    @torch.no_grad()
    def prepare_batch(self, batch, generator, step_generator):
        """Mask tokens. Returns tokens (B, N), -1 if masked; token_idx (R,), the masked positions among the B * N; ids
        (R,), the originals; weight, elbo_weight (R,), factors of nll in loss and elbo; classes, drop_class (B,)."""
        tokens = batch['tokens'][:, -self.N:]  # (B, N)
        valid = tokens >= 0
        mask = antithetic_masks(valid, self.config.mask_schedule, generator)
        token_idx = mask.flatten().nonzero()[:, 0]  # (R,)
        weight = 1 / (mask.sum(1) * len(mask))  # (B,): mean over a sample's masked tokens, then over samples
        elbo_weight = weight * importance_weight(mask, valid, self.config.mask_schedule)
        weight = elbo_weight if self.config.elbo else weight
        prepared = dict(tokens=tokens.masked_fill(mask, -1), token_idx=token_idx, ids=tokens.flatten()[token_idx],
                        weight=weight[token_idx // self.N], elbo_weight=elbo_weight[token_idx // self.N])
        if self.config.n_classes:
            prepared['classes'] = batch['tokens'][:, 0]
            prepared['drop_class'] = torch.rand(len(mask), generator=generator) < self.config.label_dropout
        return prepared

    def forward(self, batch):
        """A prepared batch -> the loss in nats per masked token, and logs: loss; elbo, the negative ELBO / N (an upper
        bound on -ln p / N) under every mask schedule; token_mean_loss, the mean over all masked tokens."""
        tokens, classes = batch['tokens'], batch.get('classes')
        if self.config.n_classes and self.training:  # in training only, like dropout
            classes = classes.masked_fill(batch['drop_class'], self.config.n_classes)
        h = self.backbone(tokens, classes).flatten(0, 1).index_select(0, batch['token_idx'])  # (R, D)
        nll = self.head(h, batch['ids'])  # (R,)
        loss, elbo = (nll * batch['weight']).sum(), (nll.detach() * batch['elbo_weight']).sum()
        B, R, one = (batch['token_idx'].new_full((), n) for n in (len(tokens), len(nll), 1))  # no host-device sync
        logs = dict(loss=(loss.detach() * B, B), elbo=(elbo * B, B), token_mean_loss=(nll.detach().sum(), R),
                    tokens=((tokens >= 0).sum() + R, one))  # each (sum, count)
        return loss, {name: torch.stack(pair) for name, pair in logs.items()}

    @torch.no_grad()
    def generate(self, tokens, classes=None, steps=8, temperature=1.0, temperature_end=None, top_k=0, top_p=1.0,
                 order='random', schedule='cosine', guidance=1.0, guidance_end=None, choice_temperature=0.0,
                 generator=None, return_intermediates=False):
        """Unmask unknown tokens, -1 in tokens (B, N), for classes (B,): see `iterative_decode`. Return (B, N), or all
        states (steps + 1, B, N). Guidance s: uncond + s (cond - uncond); s and temperature go linearly to *_end."""
        if self.config.n_classes and (classes is None or classes.min() < 0 or classes.max() >= self.config.n_classes):
            raise ValueError(f'each sample needs a class from 0 to {self.config.n_classes - 1}')
        if not {guidance, guidance_end} <= {1, None} and not (self.config.n_classes and self.config.label_dropout):
            raise ValueError('guidance needs a model trained with classes and label_dropout: leave it at 1')

        def predict(tokens, progress):
            s = lerp(guidance, guidance_end, progress)
            conditions = [classes] if s == 1 else [classes, torch.full_like(classes, self.config.n_classes)]
            hs, scales = [self.backbone(tokens, condition) for condition in conditions], [s, 1 - s][:len(conditions)]
            return self.head.sample(hs, scales, lerp(temperature, temperature_end, progress), top_k, top_p, generator)
        decode = iterative_decode(tokens, predict, self.grid, steps, order, schedule, choice_temperature, generator)
        states = [tokens, *decode]
        return torch.stack(states) if return_intermediates else states[-1]


Model = MaskGIT
