"""
Chapter 1. GPT: a decoder-only Transformer that predicts the next token.

A text (or a picture cut into tokens) is a sequence of integers. At each position the model sees the tokens so far and gives
a probability to every possible next one; it is trained to make the true next token likely, and writes by drawing from
its own predictions again and again. Attention is the only place where positions exchange information, and the mask
that keeps it causal (no position sees its future) is what lets one pass train on all T positions at once.

A batch is {'tokens': (B, T + 1) integers}: positions 0..T-1 are the input, positions 1..T the targets.

    python train.py config/gpt_shakespeare.py
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"

Paper: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). What changed since then and is used
here: RMSNorm without gains (1910.07467), rotary positions (2104.09864), normalised queries and keys (2010.04245), ReLU^2
(2109.08668), residual branches that start at zero (1901.09321), no biases.

`Attention`, `MLP`, `rotary` and `sample_token` are the core that every later chapter builds on.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int = 65   # number of token ids; set by the data set
    block_size: int = 256  # T, the longest context in tokens
    n_layer: int = 6       # number of blocks
    n_head: int = 4        # nh, attention heads a block; the head size is n_embd / n_head
    n_embd: int = 256      # D, the width
    dropout: float = 0.0   # on the output of each residual branch; worth having once the data is seen many times


# ---------------------------------------------------------------------------------------------------------------------
# The core

def norm(x):
    """RMSNorm without a gain: each vector along the last axis is scaled to mean square 1 (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(coordinates, head_size, theta):
    """Angles of the rotary embedding (arXiv 2104.09864, section 3.2), for any number of axes.

    coordinates (..., A): a token's place on each of A axes (1 for text, row and column for a picture). The hd / 2 pairs of
    a head are dealt out to the axes in turn, each axis from fast to slow frequencies. Returns cos, sin (..., hd / 2).
    """
    n_axes, pairs = coordinates.size(-1), head_size // 2
    axis = torch.arange(pairs) % n_axes
    frequency = theta ** -((torch.arange(pairs) // n_axes) / (pairs / n_axes))
    angle = coordinates[..., axis].float() * frequency.to(coordinates.device)  # (..., hd / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns pair i of each head, (x[i], x[i + hd/2]), by its angle: x (B, nh, T, hd), cos and sin (T or B, 1, T, hd / 2).

    The dot product of a query and a key so turned depends on the difference of their coordinates alone.
    """
    a, b = x.chunk(2, dim=-1)  # times float32 angles: computed in float32 whatever x is
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2), the one core of all chapters: softmax(12 cos(q, k)) v.

    x (B, T, D) attends to itself, or, where `cross`, to a context (B, S, D). `causal` hides the future; without it every
    token sees every other. No mask is ever passed in training, so that the fastest kernel always applies.
    """
    def __init__(self, n_embd, n_head, cross=False):
        super().__init__()
        assert n_embd % (2 * n_head) == 0, f'n_embd={n_embd} must be a multiple of 2 * n_head={2 * n_head}'
        self.n_head = n_head
        self.q = nn.Linear(n_embd, n_embd, bias=False) if cross else None
        self.qkv = nn.Linear(n_embd, (2 if cross else 3) * n_embd, bias=False)  # one matmul; cross: keys and values
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        k = 0 if cross else n_embd  # keys start equal to queries: a token first looks at what is like it and near it
        self.qkv.weight.data[k:k + n_embd] = (self.q if cross else self.qkv).weight.data[:n_embd]
        nn.init.zeros_(self.out.weight)  # a block starts as the identity

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)  # (B, nh, T, hd)

    def forward(self, x, turn, context=None, context_turn=None, causal=False, cache=None):
        """turn: (cos, sin) of x's places, context_turn of the context's; cache: keys and values so far, see `KVCache`."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(x), self.qkv(context).chunk(2, dim=-1)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        q = rotate(norm(q), *turn)  # the norm keeps logits small whatever the learning rate (arXiv 2010.04245)
        k = rotate(norm(k), *(turn if context is None else context_turn))
        if cache is not None:
            k, v = cache.append(self, k, v)
        # normalised vectors have length sqrt(hd), so that 1 / sqrt(hd) would hold every logit below sqrt(hd): too flat to pick
        # one token among hundreds. This scale lets them reach 12 whatever the head size.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=12 / q.size(-1))  # (B, nh, T, hd)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """Two layers with ReLU^2 between them: sparse, and cheaper than a gated unit of equal quality (arXiv 2109.08668)."""
    def __init__(self, n_embd):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Divides logits (..., V) by the temperature, then hides all but the top_k largest, then all but the nucleus: the
    fewest tokens that hold top_p of the probability (arXiv 1904.09751). top_k = 0 and top_p = 1 hide nothing."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of all likelier tokens: 0 for the first
        logits = logits.masked_fill((before >= top_p).gather(-1, index.argsort(-1)), -torch.inf)
    return logits


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draws ids (...) from logits (..., V); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# The model

class Block(nn.Module):
    """Look around (attention), then think (MLP); both add to the residual stream."""
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head)
        self.mlp = MLP(config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, turn, cache=None):
        causal = x.size(1) > 1  # one token at a time sees the whole cache: full attention
        x = x + self.dropout(self.attention(norm(x), turn, causal=causal, cache=cache))
        return x + self.dropout(self.mlp(norm(x)))


class KVCache:
    """Keys and values of all layers for up to T positions, so that each new token costs one position's work."""
    def __init__(self, length):
        self.length, self.filled, self.store = length, 0, {}

    def append(self, layer, k, v):
        if layer not in self.store:
            B, nh, _, hd = k.shape
            self.store[layer] = k.new_empty(2, B, nh, self.length, hd)
        store, end = self.store[layer], self.filled + k.size(2)
        store[0, :, :, self.filled:end], store[1, :, :, self.filled:end] = k, v
        return store[:, :, :, :end]  # keys (B, nh, end, hd) and values


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(V), exactly
        turn = rotary(torch.arange(config.block_size)[:, None], config.n_embd // config.n_head, theta=10000)
        self.register_buffer('turn', torch.stack(turn), persistent=False)  # (2, T, hd / 2)

    def trunk(self, tokens, cache=None):
        start = cache.filled if cache else 0
        cos, sin = self.turn[:, start:start + tokens.size(1)]
        x = norm(self.embedding(tokens))  # (B, T, D)
        for block in self.blocks:
            x = block(x, (cos, sin), cache)
        if cache:
            cache.filled += tokens.size(1)
        return norm(x)

    @staticmethod
    def draw(batch, generator, shared):
        """The chapter's randomness: none, every position is a target."""
        return batch

    def forward(self, batch):
        """batch['tokens'] (B, T + 1) -> the mean of -ln p(next token) in nats, and its sum and count as a log."""
        tokens = batch['tokens'].long()
        logits = self.head(self.trunk(tokens[:, :-1])).float()  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        count = loss.new_tensor(tokens[:, 1:].numel())
        return loss, {'loss': torch.stack((loss.detach() * count, count)), 'tokens': torch.stack((count, count / count))}

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Continues each row of tokens (B, T0 >= 1) by max_new_tokens; returns (B, T0 + max_new_tokens).

        When the context is full it starts anew from its last half, so that the cache stays valid at fixed positions.
        """
        T = self.config.block_size
        fresh = tokens[:, -T:] if tokens.size(1) < T else tokens[:, -(T // 2):]  # what the model has yet to read
        cache = KVCache(T)
        for _ in range(max_new_tokens):
            if cache.filled + fresh.size(1) > T:
                cache, fresh = KVCache(T), tokens[:, -(T // 2):]
            logits = self.head(self.trunk(fresh, cache)[:, -1])  # (B, V)
            fresh = sample_token(logits, temperature, top_k, top_p, generator)[:, None]
            tokens = torch.cat((tokens, fresh), dim=1)
        return tokens


Model = GPT
