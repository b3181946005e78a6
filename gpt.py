"""
Chapter 1. GPT: a decoder-only Transformer that predicts the next token.

A text (or a picture cut into tokens) is a sequence of integers. At each position the model sees the tokens so far and gives
a probability to every possible next one; it is trained to make the true next token likely, and writes by drawing from
its own predictions again and again. Attention is the only place where positions exchange information, and the mask
that keeps it causal (no position sees its future) is what lets one pass train on all T positions at once.

A batch is {'tokens': (B, T + 1) integers}: positions 0..T-1 are the input, positions 1..T the targets; -1 is no token.

    python train.py config/gpt_shakespeare.py
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"

Paper: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). What changed since then and is used
here: RMSNorm without gains (1910.07467), rotary positions (2104.09864), normalised queries and keys (2010.04245), ReLU^2
(2109.08668), residual branches that start at zero (1901.09321), token shift (2305.13048), no biases.

`Attention`, `MLP`, `rotary` and `sample_token` are the core that every later chapter builds on.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int = 65   # V, number of token ids; set by the data set
    block_size: int = 256  # T, the longest context in tokens
    n_layer: int = 6       # number of blocks
    n_head: int = 4        # nh, attention heads a block; the head size hd is n_embd / n_head
    n_embd: int = 256      # D, the width
    dropout: float = 0.0   # of channels of each residual branch; worth having once the data is seen many times
    # what real weights need (prepare/smollm2.py, prepare/siglip.py) and models of our own may leave as it is
    n_kv_head: int = 0           # heads of keys and values, each shared by n_head / n_kv_head query heads; 0 is n_head
    mlp: str = 'relu2'           # or swiglu, gelu_tanh
    mlp_width: int = 0           # hidden units of the MLP; 0 is 4 n_embd
    qk_norm: bool = True         # normalise queries and keys
    bias: bool = False           # a vector added to what each matrix of a block gives
    rope_theta: float = 10000.0  # the slowest rotary pair turns once in about 2 pi theta tokens; 0 turns none
    norm_eps: float = 1e-6       # of RMSNorm
    token_shift: bool = True     # each token also brings a share of its predecessor's embedding
    tied: bool = False           # one matrix is both embedding and head


# ---------------------------------------------------------------------------------------------------------------------
# The core

def norm(x, eps=1e-6):
    """RMSNorm without a gain: each vector along the last axis is scaled to mean square 1 (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary(coordinates, head_size, theta):
    """Angles of the rotary embedding (arXiv 2104.09864, section 3.2), for any number of axes.

    coordinates (..., A): a token's place on each of A axes (1 for text, row and column for a picture). The hd / 2 pairs of
    a head are dealt out to the axes in turn, each axis from fast to slow frequencies; theta 0 turns nothing. Returns cos, sin
    (..., hd / 2).
    """
    n_axes, pairs = coordinates.size(-1), head_size // 2
    i = torch.arange(pairs, device=coordinates.device)
    frequency = theta ** -((i // n_axes) / (pairs / n_axes)) if theta else torch.zeros_like(i)
    angle = coordinates[..., i % n_axes].float() * frequency  # (..., hd / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns pair i of each head, (x[i], x[i + hd/2]), by its angle: x (B, nh, T, hd), cos and sin (T, hd / 2)
    or, where rows differ, (B, 1, T, hd / 2).

    The dot product of a query and a key so turned depends on the difference of their coordinates alone.
    """
    a, b = x.chunk(2, dim=-1)  # times float32 angles: float32 whatever x is
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2), the one core of all chapters: softmax(12 cos(q, k)) v.

    x (B, T, D) attends to itself, or, where `cross`, to a context (B, S, D). `causal` hides the future; without it every
    token sees every other. Training sets this flag but passes no mask tensor, so that the fastest kernel always applies. With
    fewer heads of keys and values than of queries (arXiv 2305.13245) the cache of generation shrinks by the same factor.
    """
    def __init__(self, n_embd, n_head, n_kv_head=0, cross=False, qk_norm=True, bias=False):
        super().__init__()
        n_kv_head = n_kv_head or n_head
        assert n_embd % (2 * n_head) == 0, f'n_embd={n_embd} must be a multiple of 2 * n_head={2 * n_head}'
        assert n_head % n_kv_head == 0, f'n_head={n_head} must be a multiple of n_kv_head={n_kv_head}'
        self.n_head, self.n_kv_head, self.head_size, self.qk_norm = n_head, n_kv_head, n_embd // n_head, qk_norm
        rows = n_kv_head * self.head_size  # of keys, and of values
        self.q = nn.Linear(n_embd, n_embd, bias) if cross else None
        self.qkv = nn.Linear(n_embd, 2 * rows if cross else n_embd + 2 * rows, bias)  # one matmul
        self.out = nn.Linear(n_embd, n_embd, bias)
        nn.init.zeros_(self.out.weight)  # a block starts as the identity
        # keys start equal to queries: a token first looks at what is like it and near it
        queries = (self.q if cross else self.qkv).weight.data[:n_embd].view(n_kv_head, -1, self.head_size, n_embd)
        start = 0 if cross else n_embd
        self.qkv.weight.data[start:start + rows] = queries[:, 0].flatten(0, 1)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, nh, T, hd)

    def turned(self, x, turn):
        """Queries or keys (B, nh, T, hd), normalised and turned to their places. Normalising them bounds the logits (arXiv
        2010.04245), so that high learning rates do no harm (2309.14322)."""
        return rotate(norm(x) if self.qk_norm else x, *turn).type_as(x)

    def forward(self, x, turn, context=None, context_turn=None, causal=False, mask=None, cache=None):
        """turn: (cos, sin) of x's places, context_turn of the context's; mask and cache belong to generation, see `KVCache`."""
        nh, nkv = self.n_head, self.n_kv_head
        if context is None:  # queries and keys have the same places and are turned at once
            qk, v = self.heads(self.qkv(x)).split((nh + nkv, nkv), dim=1)
            q, k = self.turned(qk, turn).split((nh, nkv), dim=1)
        else:
            k, v = self.heads(self.qkv(context)).chunk(2, dim=1)
            q, k = self.turned(self.heads(self.q(x)), turn), self.turned(k, context_turn)
        if cache is not None:
            k, v = cache.append(self, k, v)
        # normalised vectors have length sqrt(hd), so that 1 / sqrt(hd) would hold every logit below sqrt(hd): too flat to pick
        # one token among hundreds. This scale lets them reach 12 whatever the head size.
        scale = 12 / self.head_size if self.qk_norm else self.head_size ** -0.5
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=nkv < nh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """Two layers with ReLU^2 between them: sparse, and cheaper than a gated unit of equal quality (arXiv 2109.08668); or, for
    weights that come with it, the gated SwiGLU (arXiv 2002.05202) or GELU by its tanh formula (1606.08415)."""
    def __init__(self, n_embd, width=0, kind='relu2', bias=False):
        super().__init__()
        assert kind in ('relu2', 'swiglu', 'gelu_tanh'), f'mlp={kind!r} must be relu2, swiglu or gelu_tanh'
        width, self.kind = width or 4 * n_embd, kind
        self.up = nn.Linear(n_embd, 2 * width if kind == 'swiglu' else width, bias)  # gated: the gate's rows come first
        self.down = nn.Linear(width, n_embd, bias)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        if self.kind == 'swiglu':
            gate, x = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        if self.kind == 'gelu_tanh':
            return self.down(F.gelu(self.up(x), approximate='tanh'))
        x = F.relu(self.up(x))
        return self.down(x * x)  # not square(): on a GPU autocast computes that in float32


class Dropout(nn.Dropout1d):
    """Zeroes some channels of x (B, T, D), the same at all places of a sample (arXiv 1512.05287): one draw for T numbers. One
    for each took a seventh of a training step on a CPU."""
    def forward(self, x):
        return super().forward(x.mT).mT  # (B, T, D)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Divides logits (..., V) by the temperature, then hides all but the top_k largest and their equals; all but the nucleus, the
    fewest tokens that hold top_p of the probability (arXiv 1904.09751); and all below min_p of the likeliest one's
    (2407.01082)."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of all likelier tokens: 0 for the first
        logits = logits.masked_fill((before >= top_p).gather(-1, index.argsort(-1)), -torch.inf)
    if min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The law, a distribution over tokens, that `sample_token` draws from: logits (..., V) -> (..., V)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws ids (...) from logits (..., V); temperature 0 takes the likeliest.

    Give token i a clock that rings after E_i / p_i, E_i exponential of rate 1: it is the first to ring with probability p_i.
    torch.multinomial does the same and makes the same draws, but it also checks p, for which a GPU has to be waited for.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature, top_k, top_p, min_p)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def accept(p, q, guesses, generator=None):
    """Speculative sampling (arXiv 2211.17192, section 2.3): the first k guesses, then one token more, (k + 1,), each of law p.

    guesses (n,) were drawn from q (n, V); p (n + 1, V) is wanted. A guess x is kept with probability min(1, p(x) / q(x)). The
    first that is not is replaced by a draw from what q gives too rarely, max(p - q, 0); behind n kept ones comes one from p.
    """
    at = torch.arange(len(guesses), device=guesses.device)
    u = torch.rand(len(guesses), generator=generator, device=p.device)
    kept = (u * q[at, guesses] < p[at, guesses]).long().cumprod(0).sum()
    rest = (p - F.pad(q, (0, 0, 0, 1)))[kept].clamp(min=0) + 1e-30 * p[kept]  # not all zero, however p and q are rounded
    return torch.cat((guesses[:kept], torch.multinomial(rest, 1, generator=generator)))


# ---------------------------------------------------------------------------------------------------------------------
# The model

class Block(nn.Module):
    """Look around (attention), then think (MLP); both add to the residual stream."""
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head, config.n_kv_head, qk_norm=config.qk_norm, bias=config.bias)
        self.mlp = MLP(config.n_embd, config.mlp_width, config.mlp, config.bias)
        self.dropout = Dropout(config.dropout)
        self.eps = config.norm_eps

    def forward(self, x, turn, causal=True, mask=None, cache=None):
        x = x + self.dropout(self.attention(norm(x, self.eps), turn, causal=causal, mask=mask, cache=cache))
        return x + self.dropout(self.mlp(norm(x, self.eps)))


class KVCache:
    """Keys and values of all layers for up to `length` positions, so that each new token costs one position's work.

    Prompts of different lengths (`ragged`) are filled up in front with -1, which no token sees and no token's place counts: a
    token's place is the number of real ones before it.
    """
    def __init__(self, length, ragged=False):
        self.length, self.ragged = -(-length // 64) * 64, ragged  # rounded up to what a GPU's kernels like
        self.filled, self.store = 0, {}  # positions in use; of each layer its keys and values (2, B, nkv, length, hd)
        self.valid = self.last = None  # which of them are real tokens (B, length); the last embedding (B, 1, D), for token shift

    def append(self, layer, k, v):
        """Adds k and v (B, nkv, T, hd) of one layer; returns all of its keys and values so far."""
        if layer not in self.store:
            B, n, _, hd = k.shape
            self.store[layer] = k.new_zeros(2, B, n, self.length, hd)
        store, end = self.store[layer], self.filled + k.size(2)
        store[0, :, :, self.filled:end], store[1, :, :, self.filled:end] = k, v
        return store[:, :, :, :end]  # keys (B, nkv, end, hd) and values

    def mask(self, tokens):
        """(causal, mask) for attention from these new tokens (B, T) to themselves and all before; a mask, (B or 1, 1, T, end)
        with True for what is seen, only where neither causal nor full attention says the same. Where ragged, it also notes which
        tokens are real."""
        T, start = tokens.size(1), self.filled
        if not self.ragged and (start == 0 or T == 1):
            return start == 0 and T > 1, None
        place = torch.arange(start + T, device=tokens.device)
        seen = place <= place[start:, None]  # (T, end)
        if self.ragged:
            self.valid = tokens.new_zeros(len(tokens), self.length).bool() if start == 0 else self.valid
            self.valid[:, start:start + T] = tokens >= 0
            # each sees itself: no row without a key
            seen = seen & self.valid[:, None, :start + T] | (place == place[start:, None])
        return False, seen.view(-1, 1, T, start + T)

    def places(self, T):
        """Of the T newest tokens, once `mask` has seen them: a slice, or (B, T)."""
        if self.ragged:
            return (self.valid[:, :self.filled + T].cumsum(1)[:, -T:] - 1).clamp(min=0)
        return slice(self.filled, self.filled + T)

    def repeat(self, n):
        """Each row n times, so that n texts can go on from what one row has read."""
        self.store = {layer: store.repeat_interleave(n, 1) for layer, store in self.store.items()}
        self.valid, self.last = (x if x is None else x.repeat_interleave(n, 0) for x in (self.valid, self.last))


def nll(x, head, targets):  # by itself, since train.py compiles it
    return F.cross_entropy(F.linear(x, head).float(), targets, ignore_index=-1, reduction='none')


def cross_entropy(x, head, targets, most=0):
    """-ln p(target) in nats (R,) of rows x (R, D) with a head (V, D); targets (R,), -1 is none and costs 0.

    At most `most` logits exist at a time: where R x V is more, rows are taken in chunks, whose logits are thrown away and
    computed anew in the backward pass: on a CPU a vocabulary of 64k so needs megabytes where it took gigabytes. 0 is 2^24, or
    on a GPU as many as fill a quarter of its memory at 16 bytes each: larger chunks, so that fewer kernels have to be called.
    """
    most = most or (torch.cuda.get_device_properties(x.device).total_memory // 64 if x.is_cuda else 2 ** 24)
    rows = max(1, most // len(head))
    if len(x) <= rows or x.is_meta:  # meta: only to be counted
        return nll(x, head, targets)
    return torch.cat([checkpoint(nll, part, head, some, use_reentrant=False, preserve_rng_state=False)
                      for part, some in zip(x.split(rows), targets.split(rows))])


class GPT(nn.Module):
    fields = 'tokens',  # what a batch holds

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.head.weight, std=0.02)  # as in GPT-2: first logits near 0
        else:
            nn.init.zeros_(self.head.weight)  # the first loss is ln(V), exactly
        if config.token_shift:
            self.shift = nn.Parameter(torch.zeros(config.n_embd))
        turn = rotary(torch.arange(config.block_size)[:, None], config.n_embd // config.n_head, config.rope_theta)
        self.register_buffer('turn', torch.stack(turn), persistent=False)  # (2, T, hd / 2)

    def embed(self, tokens, cache=None, x=None):
        """tokens (B, T), or what stands for them, x (B, T, D) -> (B, T, D). With token shift (RWKV, arXiv 2305.13048, section
        3.1) each brings a share of the embedding before it, so that the first block already sees pairs of tokens, which a head
        would first have to learn to fetch."""
        x = self.embedding(tokens.clamp(min=0)) if x is None else x
        if not self.config.token_shift:
            return x
        before = cache.last if cache and cache.filled else torch.zeros_like(x[:, :1])
        if cache and cache.ragged:
            x = torch.where((tokens >= 0)[..., None], x, before)  # padding hands on what was before it: at first nothing
        if cache:
            cache.last = x[:, -1:]
        return x + self.shift * torch.cat((before, x[:, :-1]), dim=1)

    def trunk(self, tokens, cache=None, x=None):
        """tokens (B, T) -> (B, T, D), what the head reads; with a cache they follow what is in it. x (B, T, D), where given, is
        read instead of the tokens' own embeddings: of what a picture shows, for example (vlm.py)."""
        causal, mask = cache.mask(tokens) if cache else (True, None)
        turn = self.turn[:, cache.places(tokens.size(1)) if cache else slice(tokens.size(1))]
        turn = turn.unsqueeze(2) if turn.ndim == 4 else turn  # (2, T, hd / 2), or (2, B, 1, T, hd / 2) where rows differ
        x = self.embed(tokens, cache, x)
        for block in self.blocks:
            x = block(x, turn, causal, mask, cache)
        if cache:
            cache.filled += tokens.size(1)
        return norm(x, self.config.norm_eps)

    def logits(self, x):
        return self.head(x).float()

    @staticmethod
    def draw(batch, generator, shared):
        """The chapter's randomness: none, every position is a target."""
        return batch

    def forward(self, batch):
        """batch['tokens'] (B, T + 1) -> the mean of -ln p(next token) in nats, and its sum and count as a log."""
        tokens = batch['tokens'].long()
        x, targets = self.trunk(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        total, count = cross_entropy(x, self.head.weight, targets).sum(), (targets >= 0).sum()
        logs = {'loss': torch.stack((total.detach(), count)), 'tokens': torch.stack((count, torch.ones_like(count)))}
        return total / count, logs

    @torch.no_grad()
    def log_prob(self, tokens):
        """ln p in nats of tokens[:, 1:], each given those before it: (B, T + 1) -> (B,)."""
        nll = cross_entropy(self.trunk(tokens[:, :-1]).flatten(0, 1), self.head.weight, tokens[:, 1:].flatten())
        return -nll.view(len(tokens), -1).sum(1)

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None, chunk=1024):
        """Continues each row of tokens (B, T0 >= 1), -1 in front of shorter ones; yields the next token of each row, (B,), up to
        max_new_tokens times. A row that has drawn the token `end` gets -1 from then on; when all have, it stops.

        When the context is full it starts anew from its last half, so that the cache stays valid at fixed positions. Prompts
        are read in chunks, since what attention needs for a chunk grows with its length.
        """
        T, ended = self.config.block_size, tokens.new_zeros(len(tokens), dtype=torch.bool)
        fresh = tokens if tokens.size(1) <= T else tokens[:, -(T // 2):]  # what the model has yet to read
        read = Recorded(self.trunk, KVCache(T, bool((fresh < 0).any())))
        for _ in range(max_new_tokens):
            if read.filled + fresh.size(1) > T:
                fresh = tokens[:, -(T // 2):]
                read = Recorded(self.trunk, KVCache(T, bool((fresh < 0).any())))
            for part in fresh.split(chunk, dim=1):
                x = read(part)
            drawn = sample_token(self.logits(x[:, -1]), temperature, top_k, top_p, min_p, generator)  # (B,)
            drawn = drawn.masked_fill(ended, -1)
            yield drawn
            ended |= drawn == end
            if end >= 0 and ended.all():
                return
            fresh = drawn[:, None]
            tokens = torch.cat((tokens, fresh), dim=1)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None,
                 chunk=1024):
        """All that `stream` yields, behind the prompts: (B, T0 + n), n <= max_new_tokens."""
        new = list(self.stream(tokens, max_new_tokens, temperature, top_k, top_p, min_p, end, generator, chunk))
        return torch.cat((tokens, torch.stack(new, dim=1)), dim=1) if new else tokens

    @torch.no_grad()
    def speculate(self, draft, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None,
                  ahead=4):
        """As `stream` for a single row, tokens (1, T0), with the same law, in fewer passes: a small GPT of no shorter context,
        `draft`, guesses `ahead` tokens one by one; one pass of this model, little dearer than for one, says which to keep."""
        law, T, left = (temperature, top_k, top_p, min_p), self.config.block_size, max_new_tokens
        context, caches = tokens if tokens.size(1) <= T else tokens[:, -(T // 2):], (KVCache(T), KVCache(T))
        while left > 0:
            if context.size(1) > T:  # starts anew at the same places as `stream`
                context, caches = context[:, -(T // 2):], (KVCache(T), KVCache(T))
            known, q = context.size(1), []
            n = min(ahead, T - known, left - 1)
            for _ in range(n):
                x = draft.trunk(context[:, caches[0].filled:], caches[0])  # the draft reads what it has not read yet
                q.append(probabilities(draft.logits(x[:, -1]), *law))  # (1, V)
                context = torch.cat((context, torch.multinomial(q[-1], 1, generator=generator)), dim=1)
            x = self.trunk(context[:, caches[1].filled:], caches[1])[0, -n - 1:]
            p = probabilities(self.logits(x), *law)  # (n + 1, V)
            new = accept(p, torch.cat(q) if q else p[:0], context[0, known:], generator)
            context, left = torch.cat((context[:, :known], new[None]), dim=1), left - len(new)
            for model, cache in zip((draft, self), caches):  # forget the guesses that were not kept
                cache.filled = min(cache.filled, context.size(1) - 1)
                cache.last = model.embedding(context[:, cache.filled - 1:cache.filled])  # for the token shift
            for token in new.split(1):
                yield token
                if token == end:
                    return


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: a pass in one call. To be skipped at first: what comes out is the same

GRAPHS = 'cuda'  # the kind of device that has them


def record(run, pool=None, device=None):
    """Does run() and notes its kernels as a CUDA graph: (what it returns, replay, the tensors that replay() writes that into). To
    call hundreds of kernels one by one takes a GPU's host many times as long as they take; a replay is one call, on the same
    memory. Graphs that never run at once may share a pool."""
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # where what is only done the first time does no harm
            now = run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool, capture_error_mode='thread_local'):  # other threads may go on meanwhile
            later = run()  # nothing is computed, though Python's own effects do happen again
    return now, graph.replay, later


class Recorded(KVCache):
    """trunk(tokens, cache=cache), on a GPU for one token more a row as a CUDA graph. Such a token's place is a number on the GPU,
    `at`; it looks at `reach` places, and a mask hides those to come. All calls have to be within one autocast, whose copies of
    the weights are read; what is returned, (B, 1, D), stands until the next call."""
    def __init__(self, trunk, cache):
        self.__dict__ = cache.__dict__  # one state, used in two ways
        self.trunk, self.at, self.reach = trunk, None, 0

    def append(self, layer, k, v):
        if self.at is None:
            return super().append(layer, k, v)
        self.store[layer].index_copy_(3, self.at, torch.stack((k, v)))
        return self.store[layer][:, :, :, :self.reach]

    def mask(self, tokens):
        if self.at is None:
            return super().mask(tokens)
        seen = torch.arange(self.reach, device=tokens.device) <= self.at  # (reach,)
        if self.ragged:
            self.valid.index_copy_(1, self.at, tokens >= 0)
            seen = seen & self.valid[:, :self.reach]  # (B, reach)
        kind = next(iter(self.store.values())).dtype  # numbers to add to the logits, which each layer would make of booleans
        return False, torch.zeros_like(seen, dtype=kind).masked_fill(~seen, -torch.inf).view(-1, 1, 1, self.reach)

    def places(self, T):
        if self.at is None:
            return super().places(T)
        return self.valid.sum(1, keepdim=True) - 1 if self.ragged else self.at

    def begin(self, tokens):
        self.reach, self.at = min(self.length, max(256, 2 * self.filled)), tokens.new_empty(1)
        self.tokens, self.before, self.calls = torch.empty_like(tokens), None if self.last is None else self.last.clone(), 0

    def run(self):
        self.last = self.before  # of the token before; always in the same memory
        x = self.trunk(self.tokens, cache=self)
        self.filled -= 1  # counted by each call, not here
        if self.before is not None:
            self.last = self.before.copy_(self.last)
        return x

    def __call__(self, tokens):
        if tokens.device.type != GRAPHS or tokens.size(1) > 1 or not self.filled:
            return self.trunk(tokens, cache=self)
        if self.filled >= self.reach:
            self.begin(tokens)
        self.tokens.copy_(tokens)
        self.at.fill_(self.filled)
        self.calls += 1
        if self.calls <= 2:
            x = self.run()  # an answer of a word or two is not worth a recording
        elif self.calls == 3:
            x, self.replay, self.x = record(self.run, device=tokens.device)
        else:
            self.replay()
            x = self.x
        self.filled += 1
        return x


Model = GPT
