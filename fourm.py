"""
Chapter 3. nano4M: an encoder-decoder Transformer that generates any modality from any others.

A scene has several modalities: image, depth, surface normals, caption. All are tokenized: a sample is N tokens. In
training up to K are the input and up to M others the targets: depth from the image, the image from the caption and
some patches, half of a caption from the rest. To generate a modality, predict a few of its unknown tokens at a time.

    loss = mean over samples of mean over modalities of mean over the modality's targets i of -ln p(x_i | input tokens)

A batch is {modality: (B, max_tokens) integers}; -1 is padding after the end of a text. The encoder reads K tokens, ids
and position ids (B, K), and returns a context (B, K, D). The decoder has M queries, embeddings of modality and
position of a target, that attend to the context: (B, M, D). One head per modality maps them to distributions over ids.

    python train.py config/nano4m.py
    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"    (8 steps each; texts need none)

Papers: 4M (Mizrahi et al., 2312.06647), 4M-21 (Bachmann et al., 2406.09406). What differs (4M first):
- decoder: targets of a modality also attend to each other, in texts causally, with teacher forcing; here none do;
- text: random spans are masked, as in T5; here in most cases all tokens after a prefix, else random single tokens;
- loss: a modality's mean is over its targets in the batch; here over those of a sample first;
- input: Dirichlet proportions; here mostly (`full_modality_prob`) complete modalities, then a part of one;
- unused slots: masked in attention; here a learned null token (unlike registers, which are always added);
- guidance by several conditions: each alone minus no condition; here all minus all but that one (`sample_tokens`);
- here only: FSQ codes (2309.15505), digit by digit; RoPE beside position embeddings; chapter 1's attention.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import MLP, Attention, ChannelDropout, rms_norm, rope_cos_sin
from maskgit import Block, Head, init_level_embeddings, iterative_decode, lerp


@dataclass
class Config:
    modalities: str = 'rgb:16*16*16*16:8x8 caption:320:48'  # name:levels:grid of each; set by the data set
    train_modalities: str = ''      # names of those to train on, separated by spaces; '' is all of them
    n_layer_encoder: int = 4        # blocks of the encoder
    n_layer_decoder: int = 3        # blocks of the decoder
    n_head: int = 4                 # nh, attention heads per block
    n_embd: int = 128               # D, the width
    num_input_tokens: str = '32,64,96,128'  # K, drawn once per step; 128 hold an image and two texts of the scenes
    num_target_tokens: str = '256'  # M, drawn once per step; a target costs little more than half an input token
    dirichlet_alphas: str = '0.1,1,10'  # one drawn per input, one per target set; small: few modalities
    full_modality_prob: float = 0.8  # fraction of samples whose input is complete modalities and a part of one
    first_modality_weight: float = 12.0  # odds that modality 0 is next in complete_first; other images: 1
    text_weight: float = 4.0        # odds that a text is next
    unconditional_prob: float = 0.05  # fraction of samples without input
    dropout: float = 0.0            # fraction of channels dropped from each residual branch


class Modality:
    """An entry of Config.modalities, name:levels:grid. Levels: how many values each digit of an id has, the most
    significant first (FSQ; else 1 digit). Grid: rows x columns, or a text's length; id vocab_size - 1 ends a text."""
    def __init__(self, entry, start):
        try:
            self.name, levels, grid = entry.split(':')
            self.levels, self.grid = [int(n) for n in levels.split('*')], [int(n) for n in grid.split('x')]
        except ValueError:
            raise ValueError(f'modality {entry!r}: write name:levels:grid, as rgb:4096:8x8, caption:320:48') from None
        self.is_text = len(self.grid) == 1
        self.vocab_size, self.max_tokens = math.prod(self.levels), math.prod(self.grid)
        self.token_slice = slice(start, start + self.max_tokens)  # its position ids among the N of all modalities
        axes = torch.cartesian_prod(*map(torch.arange, self.grid)).view(self.max_tokens, -1)
        # index in the text, row, column (max_tokens, 3) for RoPE; rows and columns are doubled: neighbours differ more
        self.positions = F.pad(axes, (0, 2)) if self.is_text else F.pad(2 * axes, (1, 0))


def parse_modalities(config):
    """The modalities of a Config, in its order; if `train_modalities` names any, only those. Raises ValueError."""
    entries, modalities = {entry.split(':')[0]: entry for entry in config.modalities.split()}, []
    selected = config.train_modalities.split() or [*entries]
    if unknown := [name for name in selected if name not in entries]:
        raise ValueError(f'train_modalities: there is no modality {unknown[0]!r}; there are {", ".join(entries)}')
    for name in [name for name in entries if name in selected]:
        modalities.append(Modality(entries[name], modalities[-1].token_slice.stop if modalities else 0))
    return modalities


# ---------------------------------------------------------------------------------------------------------------------
# The idea (4M, section 2.3 and appendix): which tokens are input, which are targets, how the loss weighs them

PREFIX_PROB = 0.75  # fraction of texts whose input is a prefix and whose targets are what follows


def log_dirichlet(alpha, n, generator):
    """Logarithms (B, n) of Dirichlet samples, parameter alpha (B,). Gamma(a) ~ Gamma(a + 1) U^(1 / a): no underflow."""
    alpha, uniform = alpha[:, None].expand(-1, n), torch.rand(len(alpha), n, generator=generator).clamp(min=1e-30)
    return (torch._standard_gamma(alpha + 1, generator).log() + uniform.log() / alpha).log_softmax(-1)


def budget_sort_keys(available, token_slices, log_proportions, prefix_order, generator):
    """Sort keys (B, N) whose K smallest split a budget of K by proportions p, for every K (Sainte-Lague): token number
    r = 0, 1, ... of a modality has (r + 1/2) / p, here its logarithm. r numbers tokens at random, or from left to right
    if prefix_order (B, n). Unavailable tokens have infinity: unused budget is redistributed to the other modalities.
    Example: p = 0.75, 0.25 -> keys ln of 0.67, 2, 3.3, 4.7 ... and 2, 6 ...: a budget of 4 is split 3 + 1."""
    position, start = torch.arange(available.size(1)), torch.tensor([s.start for s in token_slices])
    m = torch.bucketize(position, start, right=True) - 1  # (N,): modality of each position
    noise = torch.rand(available.shape, generator=generator)
    noise = torch.where(prefix_order[:, m], (position - start[m]) / len(position), noise).masked_fill(~available, 1)
    order = (2 * m + noise.double()).argsort(-1)  # (B, N): one modality after the other, in each by noise
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order)) - start[m]  # r of each token
    return ((rank + 0.5).log() - log_proportions[:, m]).masked_fill(~available, torch.inf)


def take_budget(sort_keys, n_slots, budget):
    """Position ids (B, n_slots), ascending, of the `budget` (int or (B, 1)) smallest sort_keys (B, N); N: none.
    Example: keys 0.7, inf, 0.2, 0.9 with 3 slots and a budget of 2 -> 0, 2, 4."""
    N = sort_keys.size(1)
    keys, position_ids = sort_keys.topk(min(n_slots, N), largest=False)
    empty = keys.isinf() | (torch.arange(keys.size(1), device=keys.device) >= budget)
    return F.pad(position_ids.masked_fill(empty, N), (0, n_slots - keys.size(1)), value=N).sort(-1).values


def complete_first(count, weights, K_min, K, generator):
    """Inputs as in generation: complete modalities in turn, the last one cut where the budget ends: count (B, n) tokens
    of each, weights (n,) -> log proportions (B, n), budget (B, 1). The order is random by weights; modalities larger
    than K come last. The budget is uniform in K_min..K, but holds the first modality if K does.
    Example: K_min = 65, K = 96, order rgb (64), caption (20), depth (64): rgb, 1-20 of caption, 0-12 of depth."""
    race = torch.empty(count.shape).exponential_(generator=generator) / weights  # smallest first: see gpt.sample_token
    order = (race + 1000 * (count > K)).argsort(1)  # (B, n)
    budget = torch.randint(K_min, K + 1, (len(count), 1), generator=generator)
    budget = budget.maximum(count.gather(1, order[:, :1])).clamp(max=K)
    return -20 * order.argsort(1).float(), budget  # -20 x rank; e^20 > N: a modality comes wholly before the next


def draw_masks(is_token, token_slices, is_text, K_min, K, M, config, generator):
    """Sample disjoint position ids of inputs (B, K) and targets (B, M), N: none; is_token (B, N): not padding. Inputs
    are complete modalities and a part of one, or nothing, or K tokens by Dirichlet proportions."""
    B, n, u = len(is_token), len(token_slices), torch.rand(len(is_token), 1, generator=generator)
    count = torch.stack([is_token[:, s].sum(1) for s in token_slices], 1)  # (B, n)
    unconditional = u < config.unconditional_prob
    full = ~unconditional & (u < config.unconditional_prob + config.full_modality_prob)
    weights = torch.where(is_text, config.text_weight, 1.0)
    weights[0] = config.first_modality_weight
    log_proportions, budget = complete_first(count, weights, K_min, K, generator)
    budget = torch.where(full, budget, torch.where(unconditional, 0, K))
    budget = budget.minimum(count.sum(1, keepdim=True) - 1)  # at least one target is left
    prefix_order = is_text & (torch.rand(B, n, generator=generator) < PREFIX_PROB)
    alphas = torch.tensor([float(alpha) for alpha in config.dirichlet_alphas.split(',')])
    alphas = alphas[torch.randint(len(alphas), (2, B), generator=generator)]  # for inputs, for targets
    log_proportions = torch.where(full, log_proportions, log_dirichlet(alphas[0], n, generator))
    inputs = take_budget(budget_sort_keys(is_token, token_slices, log_proportions, prefix_order, generator), K, budget)
    rest = F.pad(is_token, (0, 1)).scatter(1, inputs, False)[:, :-1]  # neither padding nor input
    log_proportions = log_dirichlet(alphas[1], n, generator)
    return inputs, take_budget(budget_sort_keys(rest, token_slices, log_proportions, prefix_order, generator), M, M)


def target_weights(is_target):
    """Weights w (n, B) with loss = sum over targets of -w ln p: is_target (n, B, M) booleans for n modalities.
    Example: one of 2 samples has 3 rgb targets, 1 depth target: 1/3 * 1/2 * 1/2 for rgb, 1/1 * 1/2 * 1/2 for depth."""
    count = is_target.sum(-1)  # (n, B)
    n_modalities = (count > 0).sum(0)  # (B,): those with targets
    return 1 / (count * n_modalities * count.size(1))  # infinite, and not used, if there is no target


# ---------------------------------------------------------------------------------------------------------------------
# The model. For each micro-batch train.py calls `prepare_batch` on the CPU (K and M are constant within a step) and
# `forward`, blocks compiled, on the device (only dropout is random), then loss.backward(); per step Muon and AdamW.
# Shapes, B = 16, K = 64, M = 256, D = 128: ids (16, 64) -> encoder (16, 64, 128), the context; queries (16, 256, 128)
# -> decoder (16, 256, 128) -> each modality's R targets (R, 128) -> its head: -ln p (R,) -> times weights (R,), summed.

class DecoderBlock(nn.Module):
    """Cross-attention and an MLP. Queries do not attend to each other: an output does not depend on the others."""
    def __init__(self, config):
        super().__init__()
        self.cross = Attention(config.n_embd, config.n_head, cross=True)
        self.mlp = MLP(config.n_embd)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x, rope, context, context_rope):
        x = x + self.dropout(self.cross(rms_norm(x), rope, context, context_rope))
        return x + self.dropout(self.mlp(rms_norm(x)))


class FourM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.n_embd
        self.modalities = parse_modalities(config)
        self.modality = {m.name: m for m in self.modalities}
        self.batch_keys, self.token_slices = tuple(self.modality), [m.token_slice for m in self.modalities]
        self.N, n = self.token_slices[-1].stop, len(self.modalities)  # N tokens; position id N is the null token
        self.is_text = torch.tensor([m.is_text for m in self.modalities])
        self.input_sizes, self.target_sizes = ([int(size) for size in sizes.split(',')] for sizes in (
            config.num_input_tokens, config.num_target_tokens))
        modality_of = torch.repeat_interleave(torch.tensor([m.max_tokens for m in self.modalities] + [1]))  # (N + 1,)
        positions = F.pad(torch.cat([m.positions for m in self.modalities]), (0, 0, 0, 1))  # (N + 1, 3)
        rope = torch.stack(rope_cos_sin(positions, D // config.n_head, rope_base=100))  # (2, N + 1, hd / 2)
        # digit d of id i of modality m: embedding row i // divisor % levels + offset, these three in
        # digit_table[m, d]; row 0 is zero: no digit. Example 'rgb:4*3:2x3 caption:12:8': rgb has rows 1-4, 5-7,
        # caption 8-19; rgb's id 7 = 2 * 3 + 1 is rows 3 and 6, caption's id 7 rows 15 and 0
        self.embedding = nn.Embedding(1 + sum(sum(m.levels) for m in self.modalities), D, padding_idx=0)
        digit_table, row = torch.tensor([1, 1, 0]).repeat(n + 1, max(len(m.levels) for m in self.modalities), 1), 1
        for m, digits in zip(self.modalities, digit_table):
            for d, level in enumerate(m.levels):
                digits[d] = torch.tensor([math.prod(m.levels[d + 1:]), level, row])
                if len(m.levels) > 1:
                    self.embedding.weight.data[row:row + level] = init_level_embeddings(level, D)
                row += level
        for name, x in dict(digit_table=digit_table, modality_of=modality_of, rope=rope).items():
            self.register_buffer(name, x, persistent=False)
        # two learned vectors per position id (N: the null token), for tokens and queries; at first modality + sinusoids
        sinusoids = torch.cat(rope_cos_sin(positions, D, rope_base=100), -1)  # (N + 1, D)
        self.pos_embedding, self.query_embedding = (nn.Embedding.from_pretrained(
            sinusoids + torch.randn(n + 1, D)[modality_of], freeze=False) for _ in range(2))
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.n_layer_encoder))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer_decoder))
        self.heads = nn.ModuleDict({m.name: Head(m.levels, D) for m in self.modalities})

    def rope_at(self, position_ids):
        return self.rope[:, position_ids].unsqueeze(2)  # cos and sin (2, B, 1, T, hd / 2)

    def encode(self, ids, position_ids):
        """Token ids and their position ids (B, K), N for null tokens -> the decoder's context (B, K, D)."""
        divisor, levels, offset = self.digit_table[self.modality_of[position_ids]].unbind(-1)  # (B, K, digits) each
        rows = ids[..., None] // divisor % levels + offset
        pos_embedding = self.pos_embedding(position_ids)  # (B, K, D)
        x, rope = rms_norm(self.embedding(rows).sum(-2) + pos_embedding), self.rope_at(position_ids)
        for block in self.encoder:
            x = block(x, rope)
        return rms_norm(x) + pos_embedding  # added again, as in 4M

    def decode(self, context, context_position_ids, position_ids):
        """Outputs (B, M, D) for queries at position_ids (B, M), given a context (B, K, D) at position ids (B, K)."""
        rope, context_rope = self.rope_at(position_ids), self.rope_at(context_position_ids)
        x = rms_norm(self.query_embedding(position_ids))  # (B, M, D)
        for block in self.decoder:
            x = block(x, rope, context, context_rope)
        return rms_norm(x)

    @torch.no_grad()
    def prepare_batch(self, batch, generator, step_generator):
        """Sample input_ids, input_position_ids (B, K), target_position_ids (B, M), and for the R targets of each
        modality NAME: token_idx_NAME (among the B * M), ids_NAME, weight_NAME, (R,) each, padded with weight 0. K and M
        come from step_generator, the rest from generator. On the CPU, R needs no host-device sync."""
        ids = torch.cat([batch[m.name].flatten(1) for m in self.modalities], 1)  # (B, N)
        K, M = (s[torch.randint(len(s), (1,), generator=step_generator)] for s in (self.input_sizes, self.target_sizes))
        K_min = 1 + max((size for size in self.input_sizes if size < K), default=0)  # fewer would fit a smaller K
        inputs, targets = draw_masks(ids >= 0, self.token_slices, self.is_text, K_min, K, M, self.config, generator)
        ids = F.pad(ids, (0, 1))  # (B, N + 1): the null token has id 0
        prepared = dict(input_ids=ids.gather(1, inputs), input_position_ids=inputs, target_position_ids=targets)
        is_target = torch.stack([(targets >= s.start) & (targets < s.stop) for s in self.token_slices])  # (n, B, M)
        target_ids, multiple = ids.gather(1, targets).flatten(), max(1, targets.numel() // 16)  # few shapes, for graphs
        for m, mask, weight in zip(self.modalities, is_target.flatten(1), target_weights(is_target)):
            token_idx = mask.nonzero()[:, 0]  # (R,)
            n_pad = -len(token_idx) % multiple if len(token_idx) else multiple
            values = dict(token_idx=token_idx, ids=target_ids[token_idx], weight=weight[token_idx // M])
            prepared |= {f'{key}_{m.name}': F.pad(value, (0, n_pad)) for key, value in values.items()}
        return prepared

    def forward(self, batch):
        """A prepared batch -> loss in nats per token, logs (sum, count): -ln p by modality, null_fraction, tokens."""
        inputs, targets = batch['input_position_ids'], batch['target_position_ids']
        context = self.encode(batch['input_ids'], inputs)  # (B, K, D)
        decoder_out = self.decode(context, inputs, targets).flatten(0, 1)  # (B * M, D)
        loss, logs = 0, {}
        for m in self.modalities:
            token_idx, ids, weight = (batch[f'{key}_{m.name}'] for key in ('token_idx', 'ids', 'weight'))  # (R,) each
            nll = self.heads[m.name](decoder_out.index_select(0, token_idx), ids)  # (R,)
            loss = loss + (nll * weight).sum()
            is_target = (weight > 0).float()  # not padding
            logs[f'loss_{m.name}'] = torch.stack(((nll.detach() * is_target).sum(), is_target.sum()))
        n_null, n_inputs, one = (inputs == self.N).sum(), *(targets.new_full((), x) for x in (inputs.numel(), 1))
        n_tokens = n_inputs - n_null + (targets < self.N).sum()
        return loss, logs | dict(null_fraction=torch.stack((n_null, n_inputs)), tokens=torch.stack((n_tokens, one)))

    # Generation (4M-21, section 3.1)
    def pack_modalities(self, known):
        """{name: (B, max_tokens) ids, -1 if unknown} -> (B, N) ids, -1 if unknown."""
        ids = torch.full((len(next(iter(known.values()))), self.N), -1, device=self.rope.device)
        for name, modality_ids in known.items():
            ids[:, self.modality[name].token_slice] = modality_ids.to(ids.device).flatten(1)
        return ids

    def encode_known(self, ids):
        """Encode the known tokens of ids (B, N), -1 if unknown -> the context (B, K, D) and its position ids (B, K)."""
        max_known = int((ids >= 0).sum(1).max())
        K = min([K for K in self.input_sizes if K >= max_known], default=max_known)  # null tokens as in training
        position_ids = take_budget(torch.where(ids >= 0, 0.0, torch.inf), K, K)
        return self.encode(F.pad(ids, (0, 1), value=0).gather(1, position_ids), position_ids), position_ids

    @torch.no_grad()
    def generate(self, known, targets, steps=8, temperature=1.0, temperature_end=None, top_k=0, top_p=1.0,
                 order='random', schedule='linear', guidance=1.0, guidance_end=None, condition_weights=None,
                 generator=None):
        """Generate the modalities in the list `targets`, each given all before it: {name: (B, max_tokens) ids}. known
        has this form, with -1 for unknown; parts of targets may be known. Images: `steps` steps of `iterative_decode`;
        texts: from left to right, -1 after the end. temperature and guidance go linearly to *_end; for guidance and
        condition_weights {name: w} see `sample_tokens`. KeyError: unknown modality; ValueError: bad setting."""
        def sample(m, position_ids, progress):
            scale, T = lerp(guidance, guidance_end, progress), lerp(temperature, temperature_end, progress)
            return self.sample_tokens(ids, m, position_ids, scale, condition_weights or {}, T, top_k, top_p, generator)
        ids = self.pack_modalities(known)  # (B, N), which `sample` reads
        for m in [self.modality[name] for name in targets]:
            position_ids = torch.arange(self.N, device=ids.device)[m.token_slice].expand(len(ids), -1)
            if m.is_text:
                self.generate_text(ids, m, position_ids, sample)
            else:
                self.generate_image(ids, m, position_ids, sample, steps, order, schedule, generator)
        return {name: ids[:, self.modality[name].token_slice] for name in targets}

    def sample_tokens(self, ids, m, position_ids, guidance, condition_weights, temperature, top_k, top_p, generator):
        """Sample tokens of modality m at position_ids (B, Q) given the known tokens of ids (B, N): tokens, their ln p.
        Logits: cond + (guidance - 1) (cond - uncond) + sum_i (w_i - 1) (cond - dropped_i). cond: given all known
        tokens; uncond: m's alone; dropped_i: all but modality i's. guidance: 1 + w in 2207.12598."""
        def decode_without(dropped):
            kept = ids.clone()
            for name in dropped:
                kept[:, self.modality[name].token_slice] = -1
            return self.decode(*self.encode_known(kept), position_ids)  # (B, Q, D)
        others = [other.name for other in self.modalities if other is not m]
        deltas = [(guidance - 1, others), *((w - 1, [name]) for name, w in condition_weights.items())]
        deltas = [(scale, dropped) for scale, dropped in deltas if scale != 0]
        outs = [decode_without([]), *(decode_without(dropped) for _, dropped in deltas)]
        scales = [1 + sum(scale for scale, _ in deltas), *(-scale for scale, _ in deltas)]  # of the outs
        return self.heads[m.name].sample(outs, scales, temperature, top_k, top_p, generator)

    def generate_image(self, ids, m, position_ids, sample, steps, order, schedule, generator):
        """Generate the unknown tokens of image m into ids (B, N), in place; in fewer steps if fewer are unknown."""
        if n_unknown := int((ids[:, m.token_slice] < 0).sum(1).max()):
            for tokens in iterative_decode(ids[:, m.token_slice], lambda _, progress: sample(m, position_ids, progress),
                                           m.grid, min(steps, n_unknown), order, schedule, generator=generator):
                ids[:, m.token_slice] = tokens  # where the next sample reads them

    def generate_text(self, ids, m, position_ids, sample):
        """Generate the unknown tokens of text m into ids (B, N), in place, from left to right up to the end token."""
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for i, token in enumerate(ids[:, m.token_slice].unbind(1)):  # (B,), a view of ids
            unknown = ~finished & (token < 0)
            if unknown.any():
                sampled, _ = sample(m, position_ids[:, i:i + 1], i / max(1, m.max_tokens - 1))  # (B, 1)
                token.copy_(torch.where(unknown, sampled[:, 0], token))
            finished |= token == m.vocab_size - 1


Model = FourM
