"""
Chapter 1. GPT: a decoder-only Transformer that predicts the next token.

A text (or an image cut into tokens) is a sequence of integers. At each position the model reads the tokens so far and
outputs a probability for every possible next one. Only attention and token shift move information between positions,
and never from a later one (both are causal), so one pass trains all positions. Generation samples one token at a time.

    loss  = -1/T sum_t ln p(x_t+1 | x_0, ..., x_t)    in nats per token; ln(V) before the first step
    batch = {'tokens': (B, T + 1) integers}           positions 0..T-1 are the input, 1..T the targets; -1 pads ends

    python train.py config/gpt_shakespeare.py
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"

How this is trained (train.py, for all chapters):
    batch = model.prepare_batch(batch, generator, step_generator)    # generators: one per batch, one per step; unused
    loss, logs = model(batch)                                        # forward pass; logs: sums and counts
    loss.backward()                                                  # gradients of all weights
    optimizer.step()                                                 # Muon: hidden matrices; AdamW: the rest

Paper: GPT-2 (Radford et al., 2019). What differs, and how each part differs from its own paper: RMSNorm (1910.07467)
without gains; RoPE (2104.09864) rotates halves (x[i], x[i + hd/2]), not pairs (x[2i], x[2i + 1]); QK-norm (2010.04245)
with a fixed scale of 12, not a learned one; ReLU^2 (2109.08668); token shift (RWKV, 2305.13048) once, on embeddings,
not in each block; residual outputs and head start at zero (1901.09321), keys equal queries; other weights start as in
PyTorch; no biases; an untied head; dropout (1512.05287) of whole channels of residual branches only; Muon and AdamW.
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
    n_head: int = 4        # nh, attention heads per block; head_dim hd = n_embd / n_head
    n_embd: int = 256      # D, the width
    dropout: float = 0.0   # fraction of channels dropped from each residual branch; for data that is seen many times
    token_shift: bool = True      # add a learned fraction of the previous token's embedding
    # mostly for pretrained weights (prepare/smollm2.py, prepare/siglip.py):
    n_kv_head: int = 0            # heads of keys and values, each shared by n_head / n_kv_head query heads; 0: n_head
    activation: str = 'relu2'     # or swiglu (arXiv 2002.05202), gelu_tanh (1606.08415)
    mlp_hidden_dim: int = 0       # hidden units of the MLP; 0: 4 n_embd
    qk_norm: bool = True          # normalize queries and keys
    bias: bool = False            # biases in the linear layers of blocks
    rope_base: float = 10000.0    # every RoPE pair turns once in at most 2 pi rope_base tokens; 0: no rotation
    norm_eps: float = 1e-6        # of RMSNorm
    tie_embeddings: bool = False  # one matrix is both token_embedding and lm_head


def rms_norm(x, eps=1e-6):
    """RMSNorm without a gain: scales each vector along the last axis to mean square 1 (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rope_cos_sin(positions, head_dim, rope_base):
    """cos, sin (..., hd / 2) of RoPE (2104.09864, section 3.2) at positions (..., A): A = 1 of a sequence; A = 2, row
    and column, of a grid. Pair i rotates with axis i mod A; an axis' frequencies fall from 1 towards 1 / rope_base.
    Example: hd = 4, rope_base = 100: position 3 gives the angles (3, 0.3); row 2, column 5 gives (2, 5)."""
    n_axes, pairs = positions.size(-1), head_dim // 2
    i = torch.arange(pairs, device=positions.device)
    frequency = rope_base ** -((i // n_axes) / (pairs / n_axes)) if rope_base else torch.zeros_like(i)
    angle = positions[..., i % n_axes].float() * frequency  # (..., hd / 2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates each pair (x[i], x[i + hd/2]) of x (B, nh, T, hd) by its angle; cos, sin (T, hd / 2), or if rows have
    different positions (B, 1, T, hd / 2). Then q . k depends on positions only through their difference.
    Example: hd = 4, both angles 90 degrees: (1, 2, 3, 4) has the pairs (1, 3) and (2, 4) and becomes (-3, -4, 1, 2)."""
    a, b = x.chunk(2, dim=-1)  # times float32 angles: float32 whatever the dtype of x
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Multi-head attention (1706.03762, section 3.2), softmax(12 cos(q, k)) v, of x (B, T, D) to x or, if `cross`, to a
    context (B, S, D). Training passes no mask tensor, so SDPA can use its fastest kernel. GQA: 2305.13245."""
    def __init__(self, n_embd, n_head, n_kv_head=0, cross=False, qk_norm=True, bias=False, layer_idx=0):
        super().__init__()
        n_kv_head = n_kv_head or n_head
        assert n_embd % (2 * n_head) == 0, f'{n_embd=} must be a multiple of 2 * n_head={2 * n_head}'
        assert n_head % n_kv_head == 0, f'{n_head=} must be a multiple of {n_kv_head=}'
        self.n_head, self.n_kv_head, self.head_dim, self.qk_norm = n_head, n_kv_head, n_embd // n_head, qk_norm
        self.layer_idx, kv_dim = layer_idx, n_kv_head * self.head_dim
        self.q = nn.Linear(n_embd, n_embd, bias) if cross else None
        self.qkv = nn.Linear(n_embd, 2 * kv_dim if cross else n_embd + 2 * kv_dim, bias)  # one matmul
        self.out = nn.Linear(n_embd, n_embd, bias)
        nn.init.zeros_(self.out.weight)  # a block starts as the identity
        # keys start equal to queries: at first a token attends to similar and near tokens
        queries = (self.q if cross else self.qkv).weight.data[:n_embd].view(n_kv_head, -1, self.head_dim, n_embd)
        self.qkv.weight.data[-2 * kv_dim:-kv_dim] = queries[:, 0].flatten(0, 1)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, nh, T, hd)

    def norm_and_rope(self, x, rope):  # QK-norm (2010.04245) keeps high learning rates stable
        return apply_rope(rms_norm(x) if self.qk_norm else x, *rope).type_as(x)

    def forward(self, x, rope, context=None, context_rope=None, causal=False, mask=None, cache=None):
        """rope: (cos, sin) of x's positions, context_rope: of the context's; mask and cache: see KVCache."""
        nh, nkv = self.n_head, self.n_kv_head
        if context is None:  # queries and keys have the same positions and are rotated together
            qk, v = self.split_heads(self.qkv(x)).split((nh + nkv, nkv), dim=1)
            q, k = self.norm_and_rope(qk, rope).split((nh, nkv), dim=1)
        else:
            k, v = self.split_heads(self.qkv(context)).chunk(2, dim=1)  # (B, nkv, S, hd)
            q, k = self.norm_and_rope(self.split_heads(self.q(x)), rope), self.norm_and_rope(k, context_rope)
        k, v = (k, v) if cache is None else cache.update(self, k, v)
        # |q| = |k| = sqrt(hd): scale 1 / sqrt(hd) bounds scores by sqrt(hd), too flat a softmax; 12 / hd bounds by 12
        scale = 12 / self.head_dim if self.qk_norm else self.head_dim ** -0.5
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=nkv < nh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """Linear, ReLU^2, linear: (B, T, D) -> (B, T, D). ReLU^2 (arXiv 2109.08668) needs no matrix for a gate."""
    def __init__(self, n_embd, hidden_dim=0, activation='relu2', bias=False):
        super().__init__()
        assert activation in ('relu2', 'swiglu', 'gelu_tanh'), f'{activation=} must be relu2, swiglu or gelu_tanh'
        hidden_dim, self.activation = hidden_dim or 4 * n_embd, activation
        self.up = nn.Linear(n_embd, 2 * hidden_dim if activation == 'swiglu' else hidden_dim, bias)
        self.down = nn.Linear(hidden_dim, n_embd, bias)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        if self.activation == 'swiglu':
            gate, x = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        if self.activation == 'gelu_tanh':
            return self.down(F.gelu(self.up(x), approximate='tanh'))
        x = F.relu(self.up(x))
        return self.down(x * x)  # not square(): autocast on a GPU computes that in float32


class ChannelDropout(nn.Dropout1d):  # drops a channel at all positions of a sample (arXiv 1512.05287)
    def forward(self, x):
        return super().forward(x.mT).mT  # (B, T, D)


class Block(nn.Module):
    """Attention, then an MLP; both read the normalized residual stream x (B, T, D) and add to it."""
    def __init__(self, config, layer_idx=0):
        super().__init__()
        c, self.eps, self.dropout = config, config.norm_eps, ChannelDropout(config.dropout)
        self.attention = Attention(c.n_embd, c.n_head, c.n_kv_head, False, c.qk_norm, c.bias, layer_idx)
        self.mlp = MLP(c.n_embd, c.mlp_hidden_dim, c.activation, c.bias)

    def forward(self, x, rope, causal=True, mask=None, cache=None):
        x = x + self.dropout(self.attention(rms_norm(x, self.eps), rope, causal=causal, mask=mask, cache=cache))
        return x + self.dropout(self.mlp(rms_norm(x, self.eps)))


def token_nll(x, head, targets):  # a function of its own because engine/graphs.py compiles it
    return F.cross_entropy(F.linear(x, head).float(), targets, ignore_index=-1, reduction='none')


def chunked_cross_entropy(x, head, targets, max_logits=0):
    """-ln p(target) in nats (R,) of rows x (R, D), head (V, D), targets (R,); a target of -1 costs 0. Only max_logits
    logits exist at a time: the backward pass recomputes them. 0: 2^24, or 1/16 of a GPU's memory in float32.
    Example: 16,384 rows at V = 50,000 are 3.3 GB of float32; in 49 chunks of 2^24 // V = 335 rows, 67 MB at a time."""
    max_logits = max_logits or (torch.cuda.get_device_properties(x.device).total_memory // 64 if x.is_cuda else 2 ** 24)
    rows = max(1, max_logits // len(head))
    if len(x) <= rows or x.is_meta:  # meta tensors: only FLOPs are counted
        return token_nll(x, head, targets)
    return torch.cat([checkpoint(token_nll, part, head, target, use_reentrant=False, preserve_rng_state=False)
                      for part, target in zip(x.split(rows), targets.split(rows))])


class GPT(nn.Module):
    batch_keys = 'tokens',  # what a batch holds

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)  # the first loss is exactly ln(V)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
            nn.init.normal_(self.lm_head.weight, std=0.02)  # as in GPT-2; the input token's own logit is about D / 50
        if config.token_shift:
            self.token_shift_weight = nn.Parameter(torch.zeros(config.n_embd))
        rope = rope_cos_sin(torch.arange(config.block_size)[:, None], config.n_embd // config.n_head, config.rope_base)
        self.register_buffer('rope', torch.stack(rope), persistent=False)  # (2, T, hd / 2)

    def embed(self, tokens, cache=None, inputs_embeds=None):
        """Tokens (B, T) and, if given, inputs_embeds (B, T, D) -> (B, T, D). Token shift (2305.13048, section 3.1)
        adds a learned fraction of the previous token's embedding: the first block already reads pairs of tokens."""
        x = self.token_embedding(tokens.clamp(min=0)) if inputs_embeds is None else inputs_embeds
        if not self.config.token_shift:
            return x
        previous = cache.prev_embedding if cache and cache.cur_len else torch.zeros_like(x[:, :1])
        if cache:
            x = torch.where((tokens >= 0)[..., None], x, previous)  # padding repeats previous
            cache.prev_embedding = x[:, -1:]
        return x + self.token_shift_weight * torch.cat((previous, x[:, :-1]), dim=1)

    def backbone(self, tokens, cache=None, inputs_embeds=None):
        """Tokens (B, T), after those in the cache -> hidden states (B, T, D), the input of lm_head."""
        causal, mask, position_ids = cache.prepare(tokens) if cache else (True, None, slice(tokens.size(1)))
        x, rope = self.embed(tokens, cache, inputs_embeds), self.rope[:, position_ids]  # (B, T, D), (2, ..., T, hd / 2)
        for block in self.blocks:
            x = block(x, rope, causal, mask, cache)
        if cache:
            cache.cur_len += tokens.size(1)
        return rms_norm(x, self.config.norm_eps)

    def prepare_batch(self, batch, generator, step_generator):
        return batch  # nothing is random: all positions are targets

    def forward(self, batch):
        """Mean of -ln p(next token) in nats, and logs {name: (sum, count)}. Shapes: tokens (B, T) -> embed (B, T, D) ->
        blocks (B, T, D) -> rms_norm (B, T, D) -> lm_head (B T, V) -> nll (B T,). In a block: qkv (B, T, 3 D) -> q, k, v
        (B, nh, T, hd) -> attention (B, nh, T, hd) -> out (B, T, D); up (B, T, 4 D) -> ReLU^2 -> down (B, T, D)."""
        tokens = batch['tokens'].long()  # (B, T + 1)
        x, targets = self.backbone(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()  # (B T, D), (B T,)
        total, count = chunked_cross_entropy(x, self.lm_head.weight, targets).sum(), (targets >= 0).sum()
        logs = {'loss': torch.stack((total.detach(), count)), 'tokens': torch.stack((count, torch.ones_like(count)))}
        return total / count, logs

    def logits(self, x):
        return self.lm_head(x).float()  # (..., V)

    def step(self, tokens, cache, prefill_chunk=1024):
        """Reads tokens (B, T) into the cache, in chunks to bound memory; returns logits of the next token (B, V)."""
        for chunk in tokens.split(prefill_chunk, dim=1):
            x = self.backbone(chunk, cache)
        return self.logits(x[:, -1])

    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, eos_id=-1, generator=None):
        """Continues the last T of tokens (B, T0 >= 1), left-padded with -1; yields like `decode`. The model knows
        only T positions: when T tokens are in the cache, a new cache starts from the last T / 2."""
        T, finished = self.config.block_size, tokens.new_zeros(len(tokens), dtype=torch.bool)
        context = tokens[:, -T:]
        while max_new_tokens > 0 and not (eos_id >= 0 and finished.all()):
            n = min(max_new_tokens, T - context.size(1) + 1)  # the last one is sampled, but not read
            cache = KVCache(context.size(1) + n - 1, left_padded=bool((context < 0).any()))
            for token in decode(self, context, cache, finished, n, temperature, top_k, top_p, min_p, eos_id, generator):
                tokens = torch.cat((tokens, token[:, None]), dim=1)
                yield token
            context, max_new_tokens = tokens[:, -max(1, T // 2):], max_new_tokens - n

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0, eos_id=-1, generator=None):
        """The prompts and all that `stream` yields: (B, T0) -> (B, T0 + n), n <= max_new_tokens."""
        new_tokens = self.stream(tokens, max_new_tokens, temperature, top_k, top_p, min_p, eos_id, generator)
        return torch.cat((tokens, *(token[:, None] for token in new_tokens)), dim=1)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Divides logits (..., V) by the temperature, then keeps, one filter after the other: the top_k largest (0: all);
    the nucleus, the fewest of total probability >= top_p (1904.09751); those >= min_p times the largest (2407.01082).
    Example: p = (.5, .3, .15, .05), top_p = .7: the mass before each is (0, .5, .8, .95): two stay. One always does."""
    if not (1e-6 <= temperature < torch.inf and top_k >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f'{temperature=} must be 0 or >= 1e-6, {top_k=} at least 0, {top_p=} and {min_p=} in [0, 1]')
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all more probable tokens
        logits = logits.masked_fill(((before >= top_p) & (before > 0)).gather(-1, index.argsort(-1)), -torch.inf)
    p = logits.softmax(-1)
    return logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Samples ids (...) from logits (..., V); temperature 0 is argmax. Exponential race (equivalent to Gumbel-max):
    argmax_i p_i / E_i, E_i ~ Exp(1), as in torch.multinomial, whose checks are a host-device sync."""
    logits = filter_logits(logits, temperature or 1.0, top_k, top_p, min_p)
    if temperature > 0:
        logits = logits.softmax(-1).div_(torch.empty_like(logits).exponential_(generator=generator).clamp_(1e-30))
    return logits.argmax(-1)


@torch.no_grad()
def decode(model, tokens, cache, finished, max_new_tokens, temperature, top_k, top_p, min_p, eos_id, generator):
    """Reads tokens (B, T0) into the cache, samples the next of each row, reads it, and so on; yields each, (B,), up to
    max_new_tokens times. A row that samples eos_id is marked in finished (B,), in place, and yields -1 from then on."""
    for _ in range(max_new_tokens):
        if eos_id >= 0 and finished.all():
            return
        logits = model.step(tokens, cache)  # (B, V)
        token = sample_token(logits, temperature, top_k, top_p, min_p, generator).masked_fill(finished, -1)
        yield token
        finished |= token == eos_id
        tokens = token[:, None]  # (B, 1)


class KVCache:
    """Keys and values of all layers, so that only new tokens are computed. Grows beyond max_len. left_padded: padding
    (-1) is not attended to nor counted: rows (-1, 5, 6) and (7, 8, 9) have position_ids (0, 0, 1) and (0, 1, 2)."""
    def __init__(self, max_len, left_padded=False):
        self.max_len, self.left_padded = max_len, left_padded
        self.cur_len, self.kv = 0, []  # positions in use; per layer, keys and values (2, B, nkv, allocated length, hd)
        self.is_token = self.prev_embedding = None  # (B, cur_len) if left_padded; (B, 1, D) for token shift

    def update(self, layer, k, v):
        """Adds k and v (B, nkv, T, hd) of a layer; returns all of them up to S = cur_len + T: (2, B, nkv, S, hd)."""
        i, start, S, new_kv = layer.layer_idx, self.cur_len, self.cur_len + k.size(2), torch.stack((k, v))
        if i == len(self.kv):
            self.kv.append(new_kv[:, :, :, :0])
        if self.kv[i].size(3) < S:  # grows to a multiple of 64, which is faster on a GPU
            self.kv[i] = F.pad(self.kv[i][:, :, :, :start], (0, 0, 0, -(-max(self.max_len, S) // 64) * 64 - start))
        self.kv[i][:, :, :, start:S] = new_kv
        return self.kv[i][:, :, :, :S]

    def prepare(self, tokens):
        """Returns for new tokens (B, T), S = cur_len + T: causal, SDPA's flag; mask (B or 1, 1, T, S), True: attend, or
        None if the flag is enough; position_ids, a slice or, if left_padded, (B, 1, T)."""
        start, S = self.cur_len, self.cur_len + tokens.size(1)
        if not self.left_padded and (start == 0 or S == start + 1):
            return S > start + 1, None, slice(start, S)
        k_idx, q_idx = torch.arange(S, device=tokens.device), torch.arange(start, S, device=tokens.device)[:, None]
        if not self.left_padded:
            return False, (k_idx <= q_idx)[None, None], slice(start, S)
        self.is_token = torch.cat((self.is_token[:, :start], tokens >= 0), dim=1) if start else tokens >= 0  # (B, S)
        mask = (k_idx <= q_idx) & self.is_token[:, None] | (k_idx == q_idx)  # softmax over no key would be nan
        return False, mask[:, None], (self.is_token.cumsum(1)[:, None, start:] - 1).clamp(min=0)

    def repeat_batch(self, n):  # n continuations of each row share one prefill
        self.kv = [kv.repeat_interleave(n, 1) for kv in self.kv]
        self.is_token = None if self.is_token is None else self.is_token.repeat_interleave(n, 0)
        self.prev_embedding = None if self.prev_embedding is None else self.prev_embedding.repeat_interleave(n, 0)


Model = GPT
