"""
Chapter 1. GPT: a decoder-only Transformer that predicts the next token.

A text (or an image cut into tokens) is a sequence of integers. At each position the model sees the tokens so far and gives a
probability to every possible next one. loss = mean of -ln p(next token). It generates by sampling one token at a time.
Attention is the only place where positions exchange information. It is causal: no position attends to later ones, so that
one pass trains all T positions at once.

A batch is {'tokens': (B, T + 1) integers}: positions 0..T-1 are the input, positions 1..T the targets; -1 is no token.

    python train.py config/gpt_shakespeare.py
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"

Paper: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). What changed since then and is used
here: RMSNorm without gains (1910.07467), rotary positions (2104.09864), normalised queries and keys (2010.04245), ReLU^2
(2109.08668), residual branches that start at zero (1901.09321), token shift (2305.13048), no biases.
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
    token_shift: bool = True     # add a learned fraction of the previous token's embedding
    tied: bool = False           # one matrix is both embedding and head


def norm(x, eps=1e-6):
    """RMSNorm without a gain: scales each vector along the last axis to mean square 1 (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary(coordinates, head_size, theta):
    """cos and sin (..., hd / 2) of the rotary position embedding (arXiv 2104.09864, section 3.2) at coordinates (..., A):
    positions on A axes, 1 for text, row and column for an image. The hd / 2 pairs of a head are dealt out to the axes in
    turn, each axis from fast to slow frequencies; theta 0 rotates nothing."""
    n_axes, pairs = coordinates.size(-1), head_size // 2
    i = torch.arange(pairs, device=coordinates.device)
    frequency = theta ** -((i // n_axes) / (pairs / n_axes)) if theta else torch.zeros_like(i)
    angle = coordinates[..., i % n_axes].float() * frequency  # (..., hd / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates pair i of each head, (x[i], x[i + hd/2]), by its angle: x (B, nh, T, hd), cos and sin (T, hd / 2), or if rows
    differ (B, 1, T, hd / 2). A rotated query times a rotated key depends on the difference of their positions alone."""
    a, b = x.chunk(2, dim=-1)  # times float32 angles: float32 whatever x is
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2), the one core of all chapters: softmax(12 cos(q, k)) v.
    x (B, T, D) attends to itself or, if `cross`, to a context (B, S, D). Training passes no mask tensor, so that the fastest
    kernel always applies. Fewer heads of keys and values, n_kv_head (arXiv 2305.13245), make the cache smaller."""
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
        # keys start equal to queries: a token first attends to what is like it and near it
        queries = (self.q if cross else self.qkv).weight.data[:n_embd].view(n_kv_head, -1, self.head_size, n_embd)
        self.qkv.weight.data[-2 * rows:-rows] = queries[:, 0].flatten(0, 1)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, nh, T, hd)

    def turned(self, x, turn):
        """Queries or keys (B, nh, T, hd), normalised (arXiv 2010.04245: stable at high learning rates) and rotated."""
        return rotate(norm(x) if self.qk_norm else x, *turn).type_as(x)

    def forward(self, x, turn, context=None, context_turn=None, causal=False, mask=None, cache=None):
        """turn: (cos, sin) of x's positions, context_turn of the context's; mask and cache: see `KVCache`."""
        nh, nkv = self.n_head, self.n_kv_head
        if context is None:  # queries and keys have the same positions and are rotated at once
            qk, v = self.heads(self.qkv(x)).split((nh + nkv, nkv), dim=1)
            q, k = self.turned(qk, turn).split((nh, nkv), dim=1)
        else:
            k, v = self.heads(self.qkv(context)).chunk(2, dim=1)
            q, k = self.turned(self.heads(self.q(x)), turn), self.turned(k, context_turn)
        if cache is not None:
            k, v = cache.append(self, k, v)
        # normalised vectors have length sqrt(hd): 1 / sqrt(hd) bounds logits by sqrt(hd), too flat for many tokens; this, by 12
        scale = 12 / self.head_size if self.qk_norm else self.head_size ** -0.5
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=nkv < nh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """Two layers with ReLU^2 between them: sparse, and cheaper than a gated unit of equal quality (arXiv 2109.08668); or,
    for weights that come with it, the gated SwiGLU (arXiv 2002.05202) or GELU by its tanh formula (1606.08415)."""
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
    """Zeroes some channels of x (B, T, D), the same at all positions of a sample (arXiv 1512.05287): T times fewer draws."""
    def forward(self, x):
        return super().forward(x.mT).mT  # (B, T, D)


class Block(nn.Module):
    """Attention, then an MLP; both read the normalised residual stream and add to it."""
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head, config.n_kv_head, qk_norm=config.qk_norm, bias=config.bias)
        self.mlp = MLP(config.n_embd, config.mlp_width, config.mlp, config.bias)
        self.dropout = Dropout(config.dropout)
        self.eps = config.norm_eps

    def forward(self, x, turn, causal=True, mask=None, cache=None):
        x = x + self.dropout(self.attention(norm(x, self.eps), turn, causal=causal, mask=mask, cache=cache))
        return x + self.dropout(self.mlp(norm(x, self.eps)))


# ---------------------------------------------------------------------------------------------------------------------
# The loss, and the model

def nll(x, head, targets):  # by itself, since engine/graphs.py compiles it
    return F.cross_entropy(F.linear(x, head).float(), targets, ignore_index=-1, reduction='none')


def cross_entropy(x, head, targets, most=0):
    """-ln p(target) in nats (R,) of rows x (R, D) with a head (V, D); targets (R,), -1 is none and costs 0. At most `most`
    logits exist at a time, since chunks of rows compute theirs again in the backward pass: megabytes, not gigabytes at
    V = 64k. 0 is 2^24, or on a GPU a quarter of its memory at 16 bytes each, which takes fewer kernels."""
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
        """tokens (B, T), or x (B, T, D) in place of their embeddings -> (B, T, D). Token shift (RWKV, arXiv 2305.13048, section
        3.1) adds a learned fraction of the previous embedding, so that the first block already reads pairs of tokens."""
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
        """tokens (B, T) -> (B, T, D), what the head reads; with a cache they follow what is in it. x (B, T, D), if given,
        replaces the tokens' own embeddings (vlm.py)."""
        causal, mask, places = cache.prepare(tokens) if cache else (True, None, slice(tokens.size(1)))
        x, turn = self.embed(tokens, cache, x), self.turn[:, places]  # (B, T, D), (2, T, hd / 2) or (2, B, 1, T, hd / 2)
        for block in self.blocks:
            x = block(x, turn, causal, mask, cache)
        if cache:
            cache.filled += tokens.size(1)
        return norm(x, self.config.norm_eps)

    def logits(self, x):
        return self.head(x).float()  # (..., V)

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

    def step(self, tokens, cache):
        """Reads tokens (B, T) into the cache; returns the logits of the next token (B, V)."""
        return self.logits(self.trunk(tokens, cache)[:, -1])

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None, chunk=1024):
        """Continues each row of tokens (B, T0 >= 1), left-padded with -1; yields as `decode` does, max_new_tokens times. Of a
        prompt the last T tokens are read. When T are in the cache, a new one starts from the last T / 2 of all tokens, since
        cached positions are fixed. Prompts are read in chunks, which bounds the memory of activations and masks."""
        T, ended = self.config.block_size, tokens.new_zeros(len(tokens), dtype=torch.bool)
        context = tokens[:, -T:]
        while max_new_tokens > 0:
            n, new = min(max_new_tokens, T - context.size(1) + 1), []
            cache = KVCache(context.size(1) + n - 1, bool((context < 0).any()))  # the last new token is not read
            *parts, last = context.split(chunk, dim=1)
            for part in parts:
                self.trunk(part, cache)
            for token in decode(self, last, cache, ended, n, temperature, top_k, top_p, min_p, end, generator):
                new.append(token)
                yield token
            if len(new) < n:  # all rows have ended
                return
            tokens, max_new_tokens = torch.cat((tokens, torch.stack(new, dim=1)), dim=1), max_new_tokens - n
            context = tokens[:, -max(1, T // 2):]

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1, generator=None):
        """The prompts and all that `stream` yields: (B, T0 + n), n <= max_new_tokens."""
        new = list(self.stream(tokens, max_new_tokens, temperature, top_k, top_p, min_p, end, generator))
        return torch.cat((tokens, torch.stack(new, dim=1)), dim=1) if new else tokens


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def check_sampling(temperature, top_k, top_p, min_p):
    if not (1e-6 <= temperature < torch.inf and top_k >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f'temperature={temperature} must be 0 or at least 1e-6, top_k={top_k} at least 0, '
                         f'top_p={top_p} and min_p={min_p} in [0, 1]')


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Divides logits (..., V) by the temperature, then sets to -inf all but the top_k largest and their equals (0 keeps
    all); all but the nucleus, the fewest tokens that hold top_p of the probability (arXiv 1904.09751); and all below min_p
    of the largest probability (2407.01082). The most probable token always stays. Raises ValueError."""
    check_sampling(temperature, top_k, top_p, min_p)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of all more probable tokens: 0 for the first
        logits = logits.masked_fill(((before >= top_p) & (before > 0)).gather(-1, index.argsort(-1)), -torch.inf)
    if min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Samples ids (...) from logits (..., V); temperature 0 is argmax. Raises ValueError. Exponential race (equivalent to
    Gumbel-max): argmax_i p_i / E_i, E_i ~ Exp(1), as in torch.multinomial, whose checks are a host-device sync."""
    if temperature == 0:
        check_sampling(1.0, top_k, top_p, min_p)
        return logits.argmax(-1)
    p = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
    return p.div_(torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def decode(model, tokens, cache, ended, max_new_tokens, temperature, top_k, top_p, min_p, end, generator):
    """Reads tokens (B, T0) into the cache, samples the next of each row, reads it, and so on; yields each, (B,), up to
    max_new_tokens. A row that samples `end` is noted in ended (B,) and gets -1 from then on; when all have, it stops."""
    for _ in range(max_new_tokens):
        if end >= 0 and ended.all():
            return
        logits = model.step(tokens, cache)  # (B, V)
        drawn = sample_token(logits, temperature, top_k, top_p, min_p, generator).masked_fill(ended, -1)
        yield drawn
        ended |= drawn == end
        tokens = drawn[:, None]


class KVCache:
    """Keys and values of all layers, so that each new token costs one position's work. `length`: the number of positions
    expected; a cache that is too short grows. If `ragged`, prompts are left-padded with -1: no token attends to padding,
    and a token's position is the number of real ones before it."""
    def __init__(self, length, ragged=False):
        self.length, self.ragged = length, ragged
        self.filled, self.store = 0, {}  # positions in use; {layer: its keys and values (2, B, nkv, S, hd), S >= filled}
        self.valid = self.last = None  # real tokens, not padding (B, filled); the last embedding (B, 1, D), for token shift

    def append(self, layer, k, v):
        """Adds k and v (B, nkv, T, hd) of one layer; returns all of its keys and values so far."""
        (B, n, T, hd), start, old = k.shape, self.filled, self.store.get(layer)
        if old is None or old.size(3) < start + T:
            S = -(-max(self.length, start + T) // 64) * 64  # a multiple of 64: faster on a GPU
            self.store[layer] = k.new_empty(2, B, n, S, hd)
            if start:
                self.store[layer][:, :, :, :start] = old[:, :, :, :start]
        store = self.store[layer]
        store[0, :, :, start:start + T], store[1, :, :, start:start + T] = k, v
        return store[:, :, :, :start + T]  # keys (B, nkv, start + T, hd) and values

    def prepare(self, tokens):
        """For attention of new tokens (B, T) to themselves and all before: causal; the mask (B or 1, 1, T, S), True for what is
        seen, None if causal or full attention suffices; and the tokens' positions, a slice or, if rows differ, (B, 1, T)."""
        start, S = self.filled, self.filled + tokens.size(1)
        if not self.ragged and (start == 0 or S == start + 1):
            return S > start + 1, None, slice(start, S)
        place, places = torch.arange(S, device=tokens.device), slice(start, S)
        seen = place <= place[start:, None]  # (T, S)
        if self.ragged:
            self.valid = torch.cat((self.valid[:, :start], tokens >= 0), dim=1) if start else tokens >= 0
            seen = seen & self.valid[:, None] | (place == place[start:, None])  # each sees itself: no row without a key
            places = (self.valid.cumsum(1)[:, None, start:] - 1).clamp(min=0)
        return False, seen.view(-1, 1, S - start, S), places

    def repeat(self, n):
        """Each row n times, so that n texts can go on from what one row has read."""
        self.store = {layer: store.repeat_interleave(n, 1) for layer, store in self.store.items()}
        self.valid, self.last = (x if x is None else x.repeat_interleave(n, 0) for x in (self.valid, self.last))


Model = GPT
