"""
Chapter 2. MaskGIT: an encoder-only Transformer that fills in hidden tokens, and generates by filling in a few at a time.

Some tokens of a sample are replaced by a learned mask token; the model, in which every place sees every other, is trained to
tell what was there. How many are hidden is drawn anew for each sample, from one to all, so that the same model can go on from
any state between an empty picture and a finished one. To generate, start with everything hidden, predict all places at once, keep
some of the tokens drawn, and predict again: eight such steps may do what takes a GPT one step a token. And since any tokens may
be given, in-painting, out-painting and filling a gap in a text need nothing new.

A batch is {'tokens': (B, T) integers}: the last N of a row are the sample, -1 is no token. Where there are classes, the first
of the row is the sample's class. A text is N tokens cut from a stream, so that there is no padding.

    python train.py config/maskgit_mnist.py
    python sample.py --out_dir=out/maskgit_mnist --order=random --steps=16

Papers: MaskGIT (Chang et al., 2202.04200); the likelihood bound: autoregressive diffusion (Hoogeboom et al., 2110.02037), masked
diffusion (Shi et al., 2406.04329); the Halton order (Besnier et al., 2503.17076). What differs: the blocks are those of chapter
1; codes of many digits are embedded and predicted digit by digit.

`unmask`, the one decoding loop, and `Head` serve chapter 3 as well.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import MLP, Attention, Dropout, norm, rotary, sample_token


@dataclass
class Config:
    vocab_size: int = 65        # V, number of token ids; set by the data set
    levels: str = ''            # '16*16*16*16': ids are numbers of such digits; '' is one digit; set by the data set
    grid: str = ''              # '7x7': rows x columns of a picture; '' is a text of block_size tokens; set by the data set
    block_size: int = 256       # N of a text
    n_classes: int = 0          # classes, if rows begin with one; set by the data set
    n_layer: int = 4            # number of blocks
    n_head: int = 6             # nh, attention heads a block
    n_embd: int = 192           # D, the width
    dropout: float = 0.0        # of channels of each residual branch
    label_dropout: float = 0.1  # share of training samples that hide their class; guidance needs some
    law: str = 'uniform'        # of the mask ratio: uniform, cosine or arccos; the last two hide more
    bound: bool = False         # weigh samples so that the loss is a bound on -ln p whatever the law


# ---------------------------------------------------------------------------------------------------------------------
# Masking (MaskGIT, section 3.1)

def uniform(x):
    return 1 - x


def cosine(x):
    return torch.cos(math.pi / 2 * x)


def arccos(x):
    return torch.arccos(x) * 2 / math.pi


LAWS = dict(uniform=(uniform, uniform), cosine=(cosine, arccos), arccos=(arccos, cosine))  # u in 0..1 -> mask ratio; and back


def hide(present, u, noise, law):
    """Which tokens to hide, (B, N) booleans: of those present (B, N) a share that u (B, 1) in [0, 1) decides, one at least; those
    whose noise (B, N) is smallest."""
    count = (LAWS[law][0](u) * present.sum(1, keepdim=True)).ceil().clamp(min=1)
    return present & (noise.masked_fill(~present, torch.inf).argsort(-1).argsort(-1) < count)


def hide_in_pairs(present, law, generator):
    """Masks (B, N) for a batch, in complementary pairs: under the uniform law one sample hides what its neighbour shows, and one
    place more, since each must hide some. So each pair asks for every place and each batch for the same number of tokens. Mask
    ratios are spread evenly over the batch (Kingma et al., 2107.00630, appendix I): the loss varies less from step to step."""
    B, N = present.shape
    pairs = -(-B // 2)
    u = (torch.rand(1, generator=generator) + torch.arange(pairs) / pairs).remainder(1)
    draws = torch.cat((u[:, None], torch.rand(pairs, N, generator=generator)), 1)
    draws = torch.stack((draws, 1 - draws), 1).flatten(0, 1)[:B]  # (B, 1 + N)
    return hide(present, draws[:, :1], draws[:, 1:], law)


def law_weight(mask, present, law):
    """What to multiply a sample's loss by, (B,), so that its mean is that of the uniform law: how much likelier that law is to
    hide just this many, 1 / n over the probability with which `law` hides k of n tokens."""
    k, n = mask.sum(1).float(), present.sum(1).float()
    back = LAWS[law][1]
    return 1 / (n * (back((k - 1) / n) - back(k / n)).clamp(min=1e-9))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one loop for every order and schedule

ORDERS, SCHEDULES = ('confidence', 'random', 'raster', 'halton'), ('cosine', 'linear', 'constant')


def filled_after(total, steps, schedule):
    """How many of `total` (B, 1) tokens are filled after each step: (B, steps), all after the last, at least one a step while
    any are left. cosine fills few first (MaskGIT, section 3.3), linear as evenly as whole numbers allow, constant the same
    number each time for as long as that goes."""
    step = torch.arange(1, steps + 1, device=total.device)
    if schedule == 'cosine':  # less 1e-9, so that a whole number, rounded up, stays what it is
        filled = (total * (1 - torch.cos(math.pi / 2 * step.double() / steps)) - 1e-9).ceil().long()
    else:  # rounded up, in integers
        filled = -(-total * step // steps) if schedule == 'linear' else -(-total // steps) * step
    return filled.minimum(total - steps + step).maximum(step).minimum(total)


def halton_rank(grid):
    """The rank (N,) of each place of a grid (rows, columns), or (length,) of a text, in the order in which the Halton sequence
    visits them: each far from those just before, so that tokens of one step depend little on each other (2503.17076, 3.2)."""
    N, number = math.prod(grid), torch.arange(16 * math.prod(grid)) + 1  # so many visit every place
    cell = torch.zeros_like(number)
    for base, size in zip((2, 3), grid):
        point, rest, scale = torch.zeros(len(number), dtype=torch.double), number, 1.0
        while rest.any():  # the number's digits, mirrored at the point
            scale /= base
            point, rest = point + rest % base * scale, rest // base
        cell = cell * size + (point * size).long()
    first = torch.full((N,), len(number)).scatter_reduce(0, cell, number, 'amin')
    return first.argsort(stable=True).argsort()


def between(start, end, progress):
    """start at progress 0, end at progress 1, linear between; where one of them is None, always the other."""
    if start is None or end is None:
        return end if start is None else start
    return start + (end - start) * progress


def unmask(tokens, predict, grid, steps, order='random', schedule='cosine', choice_temperature=0.0, generator=None):
    """Fills the unknown tokens, -1 in tokens (B, N), in so many steps; yields the tokens (B, N) after each.

    predict(tokens, progress) draws a token for each place and returns them with their ln p, (B, N) each; progress goes from 0 at
    the first step to 1 at the last. Which are kept: the likeliest ones (confidence: MaskGIT, with Gumbel noise of
    choice_temperature that fades out), or those whose turn it is: random (as in MAR, 2406.11838), raster, halton. Known tokens
    never change. A sample with fewer unknown tokens than others is finished sooner. Raises ValueError for an unknown order or
    schedule, where nothing is unknown, and where every sample has fewer unknown tokens than there are steps.
    """
    total = (tokens < 0).sum(1, keepdim=True)  # (B, 1)
    most = int(total.max())
    if order not in ORDERS or schedule not in SCHEDULES or choice_temperature < 0:
        raise ValueError(f'order is one of {", ".join(ORDERS)}, schedule one of {", ".join(SCHEDULES)}; choice_temperature at least 0')
    if not 1 <= steps <= most:
        raise ValueError(f'steps={steps}: there are {most} tokens to fill, and each step fills at least one' if most else
                         'nothing to fill: all tokens are given')
    turn = torch.rand(tokens.shape, generator=generator, device=tokens.device) if order == 'random' else (
        halton_rank(grid).to(tokens.device) if order == 'halton' else torch.arange(tokens.size(1), device=tokens.device))
    plan = filled_after(total.cpu(), steps, schedule).to(tokens.device)  # (B, steps); Apple's GPUs have no float64
    for step, filled in enumerate(plan.unbind(1)):
        progress = step / max(1, steps - 1)
        drawn, log_p = predict(tokens, progress)
        if order == 'confidence':
            turn = -log_p
            if choice_temperature:
                gumbel = -torch.empty_like(log_p).exponential_(generator=generator).log()
                turn = turn - choice_temperature * (1 - progress) * gumbel
        unknown = tokens < 0
        now = filled[:, None] - (total - unknown.sum(1, keepdim=True))  # (B, 1): how many each fills in this step
        rank = torch.where(unknown, turn.float(), torch.inf).argsort(-1).argsort(-1)
        tokens = torch.where(unknown & (rank < now), drawn, tokens)
        yield tokens


# ---------------------------------------------------------------------------------------------------------------------
# Layers

class Block(nn.Module):
    """Every token looks at every other: attention without a direction."""
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head)
        self.mlp = MLP(config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, turn):
        x = x + self.dropout(self.attention(norm(x), turn))
        return x + self.dropout(self.mlp(norm(x)))


class Head(nn.Module):
    """Distribution over token ids, digit by digit: p(id | h) = prod_d p(digit_d | h, digits before d). Most ids are one digit.

    An FSQ code (2309.15505) has as many as its quantizer has channels. Each digit drawn is added, as a vector, to what the next
    one is predicted from, as in NADE (Larochelle & Murray, 2011): no digit is taken as independent of the others, and 65,536
    codes need 64 logits.
    """
    def __init__(self, levels, n_embd):
        super().__init__()
        self.levels = levels
        self.out = nn.ModuleList(nn.Linear(n_embd, level, bias=False) for level in levels)
        self.embedding = nn.ModuleList(nn.Embedding(level, n_embd) for level in levels[:-1])
        for out in self.out:
            nn.init.zeros_(out.weight)  # the first loss is ln(V), exactly

    def logits(self, h, d):
        return self.out[d](F.gelu(h)).float()  # (..., levels[d])

    def tell(self, h, d, digit):
        """Lets the digits after number d know its value; the last one needs not be told."""
        if d == len(self.embedding):
            return h
        # a product, as the gradient of a look-up in so small a table takes a GPU longer
        return h + F.one_hot(digit, self.levels[d]).type_as(h) @ self.embedding[d].weight

    def forward(self, h, ids):
        """-ln p(ids | h) in nats: h (R, D) and ids (R,) -> (R,)."""
        nll = 0
        for d, digit in enumerate(digits_of(ids, self.levels)):
            nll = nll + F.cross_entropy(self.logits(h, d), digit, reduction='none')
            h = self.tell(h, d, digit)
        return nll

    def sample(self, hs, scales, temperature, top_k, top_p, generator):
        """Draws ids (B, Q), each digit with this temperature, top_k and top_p; returns their ln p too.

        hs is a list of h (B, Q, D), what one condition or another has led to; logits are added up with their scales, whose sum
        is 1. Classifier-free guidance (2207.12598) is [with the condition, without] and [s, 1 - s].
        """
        ids = log_p = 0
        for d, level in enumerate(self.levels):
            logits = sum(scale * self.logits(h, d) for scale, h in zip(scales, hs))
            digit = sample_token(logits, temperature, top_k, top_p, generator=generator)
            log_p = log_p + logits.log_softmax(-1).gather(-1, digit[..., None])[..., 0]
            ids = ids * level + digit
            hs = [self.tell(h, d, digit) for h in hs]
        return ids, log_p


def digits_of(ids, levels):
    """Mixed-radix digits of ids, most significant first: a list of tensors shaped like ids."""
    digits = []
    for level in reversed(levels):
        digits.append(ids % level)
        ids = ids // level
    return digits[::-1]


def digit_vectors(level, D):
    """First embeddings (level, D) of an FSQ digit. Its levels have an order, so neighbours start alike. The random matrix
    gives each digit directions of its own: the vectors of an id's digits are added up, and have to stay apart."""
    waves = torch.cat(rotary(torch.arange(level)[:, None] * 2 * math.pi / level, D, theta=100), -1)  # (level, D)
    return waves @ torch.randn(D, D) / D ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The model

class MaskGIT(nn.Module):
    fields = 'tokens',  # what a batch holds

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.levels = [int(level) for level in (config.levels or str(config.vocab_size)).split('*')]
        self.grid = [int(side) for side in (config.grid or str(config.block_size)).split('x')]
        self.N, D = math.prod(self.grid), config.n_embd
        assert math.prod(self.levels) == config.vocab_size, f'levels={config.levels!r} do not make vocab_size={config.vocab_size}'
        assert config.law in LAWS, f'law={config.law!r} must be one of {", ".join(LAWS)}'
        coordinates = torch.cartesian_prod(*map(torch.arange, self.grid)).view(self.N, -1)  # (N, axes)
        # theta 100, here and in later chapters, not 10,000: so few places would hardly turn the slower pairs
        self.register_buffer('turn', torch.stack(rotary(coordinates, D // config.n_head, theta=100)), persistent=False)

        self.embedding = nn.ModuleList(nn.Embedding(level, D) for level in self.levels)  # of a token: the sum of its digits'
        if len(self.levels) > 1:
            for embedding, level in zip(self.embedding, self.levels):
                embedding.weight.data = digit_vectors(level, D)
        self.mask_embedding = nn.Parameter(torch.randn(D))
        # else all tokens would look the same while all are hidden; starts out similar for neighbouring places
        self.place_embedding = nn.Parameter(torch.cat(rotary(coordinates, D, theta=100), -1))  # (N, D)
        if config.n_classes:
            self.class_embedding = nn.Embedding(config.n_classes + 1, D)  # the last one: no class
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = Head(self.levels, D)

    def trunk(self, tokens, classes=None):
        """Tokens (B, N), -1 where hidden, and classes (B,) -> (B, N, D), what the head reads."""
        x = sum(table(digit) for table, digit in zip(self.embedding, digits_of(tokens.clamp(min=0), self.levels)))
        x = torch.where((tokens < 0)[..., None], self.mask_embedding, x) + self.place_embedding
        if self.config.n_classes:
            x = x + self.class_embedding(classes)[:, None]
        x = norm(x)
        for block in self.blocks:
            x = block(x, self.turn)
        return norm(x)

    @torch.no_grad()
    def draw(self, batch, generator, shared):
        """Hides tokens. Returns tokens (B, N), -1 where hidden; rows (R,), their places among the B * N; ids (R,), what was
        there; weight (R,) and bound_weight (R,), see forward; classes (B,) and which of them to drop (B,) in training."""
        tokens = batch['tokens'][:, -self.N:]  # (B, N)
        present = tokens >= 0
        mask = hide_in_pairs(present, self.config.law, generator)
        rows = mask.flatten().nonzero()[:, 0]  # (R,)
        each = 1 / (mask.sum(1) * len(mask))  # mean over a sample's hidden tokens, then over samples
        bound = each * law_weight(mask, present, self.config.law)
        drawn = dict(tokens=tokens.masked_fill(mask, -1), rows=rows, ids=tokens.flatten()[rows],
                     weight=(bound if self.config.bound else each)[rows // self.N], bound_weight=bound[rows // self.N])
        if self.config.n_classes:
            drop = torch.rand(len(mask), generator=generator) < self.config.label_dropout
            drawn |= dict(classes=batch['tokens'][:, 0], drop=drop)
        return drawn

    def forward(self, batch):
        """A drawn batch -> the loss in nats a hidden token, and logs: loss; bound, which is the uniform law's loss whatever the
        law, and times N bounds -ln p of a sample (see log_prob_bound); pooled, the mean over the hidden tokens of all samples."""
        tokens, classes = batch['tokens'], batch.get('classes')
        if self.config.n_classes and self.training:  # as dropout
            classes = classes.masked_fill(batch['drop'], self.config.n_classes)
        h = self.trunk(tokens, classes).flatten(0, 1).index_select(0, batch['rows'])  # (R, D)
        nll, B = self.head(h, batch['ids']), batch['rows'].new_full((), len(tokens))  # filled on the device: no wait for it
        loss, bound = (nll * batch['weight']).sum(), (nll.detach() * batch['bound_weight']).sum()
        count = (tokens >= 0).sum() + len(nll)
        pooled = nll.detach().sum(), B.new_full((), len(nll))
        return loss, dict(loss=torch.stack((loss.detach() * B, B)), bound=torch.stack((bound * B, B)),
                          pooled=torch.stack(pooled), tokens=torch.stack((count, torch.ones_like(count))))

    @torch.no_grad()
    def log_prob_bound(self, tokens, classes=None, draws=16, generator=None):
        """An upper bound on -ln p(tokens | class) in nats, (B,): the mean over `draws` masks, whose sizes are spread evenly.
        Its expectation is what it costs to tell the tokens one by one, averaged over all orders (2110.02037, section 3)."""
        present, total = tokens >= 0, 0
        for i in range(draws):
            u, noise = (torch.rand(len(tokens), n, generator=generator).to(tokens.device) for n in (1, self.N))
            mask = hide(present, (i + u) / draws, noise, 'uniform')
            h = self.trunk(tokens.masked_fill(mask, -1), classes)[mask]  # (R, D)
            nll = torch.zeros(tokens.shape, device=h.device).masked_scatter(mask, self.head(h, tokens[mask]))
            total = total + nll.sum(1) / mask.sum(1) * present.sum(1) / draws
        return total

    @torch.no_grad()
    def generate(self, tokens, classes=None, steps=8, temperature=1.0, temperature_end=None, top_k=0, top_p=1.0, order='random',
                 schedule='cosine', guidance=1.0, guidance_start=None, choice_temperature=0.0, generator=None, history=False):
        """Fills what is unknown, -1, in tokens (B, N), for classes (B,): see `unmask`. Returns (B, N), or, with `history`, all
        states from the given one on, (steps + 1, B, N).

        The temperature goes from `temperature` to temperature_end; guidance (uncond + s (cond - uncond)) from guidance_start to
        `guidance`, evenly over the steps. Raises ValueError for faulty input.
        """
        config, size = self.config, (steps + 1) * tokens.numel()
        if history and size > 2 ** 27:
            raise ValueError(f'a history of {size:,} tokens would fill {size >> 27} GiB: ask for it with fewer samples or steps')
        if config.n_classes and (classes is None or classes.min() < 0 or classes.max() >= config.n_classes):
            raise ValueError(f'each sample needs a class from 0 to {config.n_classes - 1}')
        if not {guidance, guidance_start} <= {1, None} and not (config.n_classes and config.label_dropout):
            raise ValueError(f'guidance={guidance}: this model has not learnt to draw without a class '
                             f'(n_classes={config.n_classes}, label_dropout={config.label_dropout}); leave guidance at 1')

        def predict(tokens, progress):
            s = between(guidance_start, guidance, progress)
            hs = [self.trunk(tokens, classes)]
            if s != 1:
                hs.append(self.trunk(tokens, torch.full_like(classes, config.n_classes)))
            now = between(temperature, temperature_end, progress)
            return self.head.sample(hs, [s, 1 - s][:len(hs)], now, top_k, top_p, generator)
        states = unmask(tokens, predict, self.grid, steps, order, schedule, choice_temperature, generator)
        if history:
            return torch.stack((tokens, *states))
        *_, tokens = states
        return tokens


Model = MaskGIT
