"""
Chapter 3. nano4M: one encoder-decoder that turns any set of modalities into any other.

A scene is known in several ways at once: its picture, its depth, its surface normals, a sentence about it. Each of these
modalities is cut into discrete tokens, so that all look alike to a Transformer. In training a random part of all the tokens of
a sample is the input and another part, disjoint from it, the target: depth from a picture, a picture from a
sentence and three patches, a sentence from half of itself. Who learns to predict any part from any other part can then
generate any modality from any other by filling in a few tokens at a time.

The encoder reads K visible tokens. The decoder is asked by M queries that say only "which modality, which place": each looks
into the encoder's output and gives a distribution over the tokens of its own modality.

A batch is {name: (B, size) integers}, one entry a modality; -1 stands after the end of a text. `draw` turns it into
input slots, target slots and, sorted by modality, the rows that each output head has to answer.

    python train.py config/nano4m.py
    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"

Papers: 4M (Mizrahi et al., 2312.06647), 4M-21 (2406.09406). What differs: image tokens are FSQ codes (2309.15505), embedded and
predicted digit by digit; rotary positions beside the added ones; input slots that a sample cannot fill hold a learned null token
instead of padding behind a mask. The encoder's block, the head and the loop that fills pictures in are chapter 2's.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import MLP, Attention, Dropout, norm, rotary
from maskgit import Block, Head, between, digit_vectors, unmask


@dataclass
class Config:
    modalities: str = 'rgb:16*16*16*16:8x8 caption:320:48'  # name:vocabulary:size of each; set by the data set
    use: str = ''                   # names of the modalities to train on, separated by spaces; '' is all of them
    n_layer_encoder: int = 4        # blocks that read the input
    n_layer_decoder: int = 3        # blocks that answer the queries
    n_head: int = 4                 # nh, attention heads a block
    n_embd: int = 128               # D, the width
    input_slots: str = '32,64,88'   # K: each step draws one of these; the largest holds a whole image and the beginning of a text
    target_slots: str = '256'       # M: the same for the targets; a query costs half a token, and an encoder's pass serves all
    alphas: str = '0.1,1,10'        # of a sample's Dirichlets, one for its input and one for its targets; small: few modalities
    whole: float = 0.8              # share of samples whose input is one modality as a whole, and a part of a second one
    lead: float = 0.75              # share of those that start from the first modality of the list, if it fits: most tasks do
    empty: float = 0.05             # share of samples without any input
    dropout: float = 0.0            # of channels of each residual branch


class Modality:
    """One entry of Config.modalities, 'rgb:16*16*16*16:8x8' or 'caption:320:48'.

    The vocabulary is a product of levels, an id's digits in mixed radix, first digit most significant: an FSQ code has as many
    digits as its quantizer has channels, a text token one. The size is a grid of rows x columns or the longest text,
    whose last id, V - 1, is the end token.
    """
    def __init__(self, entry, start):
        try:
            self.name, levels, size = entry.split(':')
            self.levels = [int(level) for level in levels.split('*')]
            self.grid = [int(n) for n in size.split('x')]
        except ValueError:
            raise ValueError(f'modality {entry!r}: write name:vocabulary:size, as in rgb:4096:8x8 or caption:320:48') from None
        self.is_text = len(self.grid) == 1
        self.vocabulary, self.size = math.prod(self.levels), math.prod(self.grid)
        self.places = slice(start, start + self.size)  # among the N places of all modalities

    def coordinates(self):
        """Place in the text, row, column: (size, 3); a patch is worth two words, since its neighbours are to be told apart."""
        if self.is_text:
            return F.pad(torch.arange(self.size)[:, None], (0, 2))
        return F.pad(2 * torch.cartesian_prod(*map(torch.arange, self.grid)), (1, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Masking (4M, section 2.3 and appendix): which tokens are seen, which are asked for

def log_dirichlet(alpha, n, generator):
    """Logarithms of B draws from the symmetric Dirichlet over n modalities, alpha (B,) -> (B, n).

    By gammas; Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha), in logarithms, holds for the smallest alphas too.
    """
    alpha = alpha[:, None].expand(-1, n)
    uniform = torch.rand(alpha.shape, generator=generator).clamp(min=1e-30)
    return (torch._standard_gamma(alpha + 1, generator).log() + uniform.log() / alpha).log_softmax(-1)


def budget_keys(available, sections, log_share, ordered, generator):
    """Keys (B, N) whose smallest entries are a sample's tokens: for any K, each modality gets its share of the K smallest.

    Within a modality the available tokens are ranked at random, or, where `ordered` (B, modalities), from first to last.
    Token number r of a modality with share p gets the key r / p (here its logarithm), so that the K smallest hold K p tokens
    of it; what a short modality cannot supply falls to the others by itself. Unavailable tokens get infinity.
    """
    place, start = torch.arange(available.size(1)), torch.tensor([section.start for section in sections])
    m = torch.bucketize(place, start, right=True) - 1  # (N,): whose each place is
    noise = torch.rand(available.shape, generator=generator)
    noise = torch.where(ordered[:, m], (place - start[m]) / len(place), noise).masked_fill(~available, 1)
    order = (2 * m + noise.double()).argsort(-1)  # of all modalities at once, one after the other
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order)) - start[m]
    return ((rank + 0.5).log() - log_share[:, m]).masked_fill(~available, torch.inf)


def smallest(keys, k, limit):
    """Indices (B, k) of the smallest keys (B, N), at most limit (B, 1) of them, in ascending order; N, for no token, where the
    limit or infinite keys leave slots over."""
    value, index = keys.topk(min(k, keys.size(1)), largest=False)
    over = value.isinf() | (torch.arange(index.size(1), device=keys.device) >= limit)
    return F.pad(index.masked_fill(over, keys.size(1)), (0, k - index.size(1)), value=keys.size(1)).sort(-1).values


def whole_first(count, is_text, K, lead, random):
    """For samples that know one modality as a whole, if it fits, and something of a second one: the beginning of a text beside a
    picture, some patches beside a text. count (B, n) tokens of each modality -> log shares (B, n) that put all of the first
    before any of the second, and how many tokens (B, 1) the two give together: the second gets a random share of the slots that
    the first leaves, none in a fifth of the samples.
    """
    B, n = count.shape
    score = random(B, n) + ((count <= K) & (3 * count >= K))  # first: one that fills a third of the slots or more,
    score[:, 0] += 2 * (count[:, 0] <= K) * (random(B) < lead)  # most often the one that most tasks start from
    first = score.argmax(1, keepdim=True)  # (B, 1)
    score = random(B, n) + 0.5 * (is_text != is_text[first])  # second: more often a text beside a picture, and the reverse
    second = score.scatter(1, first, -1).argmax(1, keepdim=True)
    room = (K - count.gather(1, first)) * (1.25 * random(B, 1) - 0.25).clamp(min=0)
    limit = count.gather(1, first) + room.ceil().minimum(count.gather(1, second))
    # e^20, the ratio of the shares, is more than there are tokens
    return torch.zeros(B, n).scatter(1, second, 20).scatter(1, first, 40), limit


def draw_masks(present, sections, is_text, K, M, config, generator):
    """Input places (B, K) and target places (B, M), disjoint, as indices into the N places of present (B, N); N is none.

    A mixture. Most samples (`whole`) are like the tasks that come later, see above; the others deal their slots out to all
    modalities by Dirichlet shares; a few (`empty`) know nothing. Targets: Dirichlet shares of what is left.
    """
    def random(*shape):
        return torch.rand(shape, generator=generator)
    B, n, kind = present.size(0), len(sections), random(present.size(0), 1)
    count = torch.stack([present[:, s].sum(1) for s in sections], 1)
    whole = (kind >= config.empty) & (kind < config.empty + config.whole)
    log_share, limit = whole_first(count, is_text, K, config.lead, random)
    limit = torch.where(whole, limit, torch.where(kind < config.empty, 0, K))
    limit = limit.minimum(count.sum(1, keepdim=True) - 1)  # one token at least is left to ask for
    ordered = is_text & (random(B, n) < 0.75)  # most texts are read from left to right
    alphas = torch.tensor([float(alpha) for alpha in config.alphas.split(',')])
    alphas = alphas[torch.randint(len(alphas), (2, B), generator=generator)]
    log_share = torch.where(whole, log_share, log_dirichlet(alphas[0], n, generator))
    inputs = smallest(budget_keys(present, sections, log_share, ordered, generator), K, limit)
    left = F.pad(present, (0, 1)).scatter(1, inputs, False)[:, :-1]
    targets = smallest(budget_keys(left, sections, log_dirichlet(alphas[1], n, generator), ordered, generator), M, M)
    return inputs, targets


# ---------------------------------------------------------------------------------------------------------------------
# Layers

class DecoderBlock(nn.Module):
    """Queries look at the encoder's output, not at each other: they hold no content that another one could use, and so an
    answer never depends on what else is asked (4M's decoder also has self-attention; here it cost time and helped no score)."""
    def __init__(self, config):
        super().__init__()
        self.cross = Attention(config.n_embd, config.n_head, cross=True)
        self.mlp = MLP(config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, turn, context, context_turn):
        x = x + self.dropout(self.cross(norm(x), turn, context, context_turn))
        return x + self.dropout(self.mlp(norm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# The model

class FourM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.modalities = parse(config)
        self.modality = {m.name: m for m in self.modalities}
        self.fields = tuple(self.modality)  # what a batch holds
        self.N = self.modalities[-1].places.stop  # places of all modalities together; index N is the null token
        self.sections = [m.places for m in self.modalities]
        self.is_text = torch.tensor([m.is_text for m in self.modalities])
        self.input_sizes, self.target_sizes = ([int(k) for k in text.split(',')]
                                               for text in (config.input_slots, config.target_slots))
        D, n = config.n_embd, len(self.modalities)

        # what the digits of an id are in each modality, as rows of one embedding table; row 0 stays zero
        width = max(len(m.levels) for m in self.modalities)
        divisor, levels, offset = (torch.full((n + 1, width), value) for value in (1, 1, 0))
        rows = 1
        for i, m in enumerate(self.modalities):
            for d, level in enumerate(m.levels):
                divisor[i, d], levels[i, d], offset[i, d] = math.prod(m.levels[d + 1:]), level, rows
                rows += level
        modality_of = torch.cat([torch.full((m.size,), i) for i, m in enumerate(self.modalities)] + [torch.tensor([n])])
        coordinates = torch.cat([m.coordinates() for m in self.modalities] + [torch.zeros(1, 3, dtype=torch.long)])
        for name, tensor in dict(divisor=divisor, levels=levels, offset=offset, modality_of=modality_of,
                                 turn=torch.stack(rotary(coordinates, D // config.n_head, theta=100))).items():
            self.register_buffer(name, tensor, persistent=False)

        # modality + place, for tokens and for queries: learned, and at first alike for places that lie near each other
        self.embedding = nn.Embedding(rows, D, padding_idx=0)
        for i, m in enumerate(self.modalities):
            for start, level in zip(offset[i].tolist(), m.levels if len(m.levels) > 1 else []):
                self.embedding.weight.data[start:start + level] = digit_vectors(level, D)
        waves = torch.cat(rotary(coordinates, D, theta=100), -1)  # (N + 1, D)
        self.place_embedding = nn.Embedding.from_pretrained(waves + torch.randn(n + 1, D)[modality_of], freeze=False)
        self.query_embedding = nn.Embedding.from_pretrained(waves + torch.randn(n + 1, D)[modality_of], freeze=False)
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.n_layer_encoder))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer_decoder))
        self.heads = nn.ModuleDict({m.name: Head(m.levels, D) for m in self.modalities})

    def turns(self, index):
        return self.turn[:, index].unsqueeze(2)  # cos and sin (2, B, 1, T, hd / 2)

    def encode(self, ids, index):
        """Tokens (B, K) at places (B, K), N for none -> what the decoder looks at (B, K, D)."""
        m = self.modality_of[index]
        digits = ids[..., None] // self.divisor[m] % self.levels[m] + self.offset[m]  # (B, K, digits)
        place = self.place_embedding(index)
        x, turn = norm(self.embedding(digits).sum(-2) + place), self.turns(index)
        for block in self.encoder:
            x = block(x, turn)
        return norm(x) + place  # as in 4M: the queries look for places too

    def decode(self, context, context_index, index):
        """Answers (B, M, D) to queries at places (B, M)."""
        x, turn, context_turn = norm(self.query_embedding(index)), self.turns(index), self.turns(context_index)
        for block in self.decoder:
            x = block(x, turn, context, context_turn)
        return norm(x)

    @torch.no_grad()
    def draw(self, batch, generator, shared):
        """Input and target slots of a micro-batch, where the batch lies (train.py: in host memory, so that the number of rows
        of each head is known without waiting for a GPU). K and M come from `shared`, the rest from `generator`.

        Returns input_ids, input_index (B, K), target_index (B, M), and for each modality NAME its targets in the whole batch:
        rows_NAME (R,) indices into the B * M answers, ids_NAME (R,), weight_NAME (R,). R is rounded up, with weights 0.
        """
        ids = torch.cat([batch[m.name].flatten(1) for m in self.modalities], 1)  # (B, N)
        K, M = (sizes[torch.randint(len(sizes), (1,), generator=shared)] for sizes in (self.input_sizes, self.target_sizes))
        inputs, targets = draw_masks(ids >= 0, self.sections, self.is_text, K, M, self.config, generator)
        ids = F.pad(ids, (0, 1))  # the null token
        drawn = dict(input_ids=ids.gather(1, inputs), input_index=inputs, target_index=targets)
        asked = torch.stack([(targets >= s.start) & (targets < s.stop) for s in self.sections])  # (modalities, B, M)
        count = asked.sum(-1)  # (modalities, B)
        weight = 1 / (count * (count > 0).sum(0) * len(ids))  # mean over tokens, then modalities, then samples
        flat = ids.gather(1, targets).flatten()
        step = max(1, flat.numel() // 16)
        for m, mask, w in zip(self.modalities, asked, weight):
            rows = mask.flatten().nonzero()[:, 0]
            spare = (-len(rows) % step) if len(rows) else step
            drawn |= {f'rows_{m.name}': F.pad(rows, (0, spare)), f'ids_{m.name}': F.pad(flat[rows], (0, spare)),
                      f'weight_{m.name}': F.pad(w.repeat_interleave(targets.size(1))[rows], (0, spare))}
        return drawn

    def forward(self, batch):
        """A drawn batch -> the loss in nats a token, and logs: the loss of each modality, the share of null input slots."""
        inputs, targets = batch['input_index'], batch['target_index']
        h = self.decode(self.encode(batch['input_ids'], inputs), inputs, targets).flatten(0, 1)  # (B * M, D)
        loss, logs = 0, {}
        for m in self.modalities:
            rows, ids, weight = (batch[f'{part}_{m.name}'] for part in ('rows', 'ids', 'weight'))
            nll = self.heads[m.name](h.index_select(0, rows), ids)  # (R,)
            loss = loss + (nll * weight).sum()
            real = (weight > 0).float()
            logs[f'loss_{m.name}'] = torch.stack(((nll.detach() * real).sum(), real.sum()))
        null = (inputs == self.N).sum()
        logs['null_share'] = torch.stack((null, null.new_full((), inputs.numel())))
        tokens = inputs.numel() - null + (targets < self.N).sum()
        logs['tokens'] = torch.stack((tokens, torch.ones_like(tokens)))
        return loss, logs

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def look(self, ids):
        """Encodes the known tokens of ids (B, N), -1 where unknown: what the decoder looks at (B, K, D), its places (B, K)."""
        known = ids >= 0
        most = int(known.sum(1).max())
        K = min([size for size in self.input_sizes if size >= most], default=most)  # null tokens as in training
        inputs = smallest(torch.where(known, 0.0, torch.inf), K, K)
        return self.encode(F.pad(ids, (0, 1), value=0).gather(1, inputs), inputs), inputs

    def join(self, given):
        """{name: (B, size) ids, -1 where unknown} -> (B, N)."""
        B, device = len(next(iter(given.values()))), self.turn.device
        ids = torch.full((B, self.N), -1, device=device)
        for name, some in given.items():
            ids[:, self.modality[name].places] = some.to(device).flatten(1)
        return ids

    @torch.no_grad()
    def generate(self, given, targets, steps=8, temperature=1.0, temperature_end=None, top_k=0, top_p=1.0, order='random',
                 schedule='linear', guidance=1.0, guidance_start=None, weights=None, generator=None):
        """Generates the modalities named in the list `targets`, one after the other, each conditioning the next, as
        4M chains them.

        given: {name: (B, size) ids}; -1 marks what is unknown, so that parts of a target may be given too. Images are filled in
        `steps` steps by chapter 2's `unmask`: order random (ROAR), confidence (MaskGIT), raster or halton; schedule linear,
        cosine or constant. Texts are written from left to right and stop at their end token. The temperature goes from
        `temperature` to temperature_end, guidance from guidance_start to `guidance`; guidance > 1 makes the other modalities
        count for more than they did in training, weights {name: w} does so for single ones: see `draw_tokens`.
        Returns {name: (B, size) ids}, -1 after the end of a text. Raises KeyError for a modality that the model has not.
        """
        ids = self.join(given)
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

        def predict(m, index, progress):
            now = how | dict(temperature=between(temperature, temperature_end, progress))
            return self.draw_tokens(ids, m, index, between(guidance_start, guidance, progress), weights or {}, **now)
        for m in [self.modality[name] for name in targets]:
            index = torch.arange(m.places.start, m.places.stop, device=ids.device).expand(len(ids), -1)  # (B, size)
            if m.is_text:
                self.write(ids, m, index, predict)
            else:
                self.fill(ids, m, index, predict, steps, order, schedule, generator)
        return {m.name: ids[:, m.places] for m in self.modalities if m.name in targets}

    def draw_tokens(self, ids, m, index, guidance, weights, **how):
        """Tokens (B, Q) at places index of modality m, given all known ones, and their ln p.

        Logits are l + (guidance - 1) (l - l without any other modality) + sum_i (w_i - 1) (l - l without modality i). For a
        single condition both are classifier-free guidance (2207.12598). 4M weighs each condition against none; here each is
        weighed against all the others, so that weights of 1 leave what the model has learned about them together. A weight
        below 1 weakens a condition, 0 removes it, a negative one leads away from it.
        """
        def answers(hidden):
            without = ids.clone()
            for name in hidden:
                without[:, self.modality[name].places] = -1
            context, places = self.look(without)
            return self.decode(context, places, index)
        others = [other.name for other in self.modalities if other is not m]
        extra = [(scale - 1, hidden) for scale, hidden in [(guidance, others), *((w, [name]) for name, w in weights.items())]
                 if scale != 1]
        scales = [1 + sum(scale for scale, _ in extra), *(-scale for scale, _ in extra)]
        return self.heads[m.name].sample([answers([]), *(answers(hidden) for _, hidden in extra)], scales, **how)

    def fill(self, ids, m, index, predict, steps, order, schedule, generator):
        """Fills the unknown tokens of image modality m into ids, in place; in fewer steps where fewer tokens are unknown."""
        def draw(tokens, progress):
            ids[:, m.places] = tokens
            return predict(m, index, progress)
        if unknown := int((ids[:, m.places] < 0).sum(1).max()):
            steps = min(steps, unknown)
            *_, ids[:, m.places] = unmask(ids[:, m.places], draw, m.grid, steps, order, schedule, generator=generator)

    def write(self, ids, m, index, predict):
        """Writes text modality m into ids from left to right, in place; nothing stands after an end token."""
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for i in range(m.size):
            now = ids[:, m.places.start + i]
            if (todo := ~ended & (now < 0)).any():
                token = predict(m, index[:, i:i + 1], i / max(1, m.size - 1))[0][:, 0]
                now.copy_(torch.where(todo, token, now))
            ended |= now == m.vocabulary - 1
            if ended.all():
                break

    # -----------------------------------------------------------------------------------------------------------------
    # Likelihood, and what a sample is like

    @torch.no_grad()
    def ask(self, given, name):
        """Answers (B, size, D) to all places of modality `name` at once, of which nothing is known."""
        m = self.modality[name]
        ids = self.join(given)
        ids[:, m.places] = -1
        context, places = self.look(ids)
        return self.decode(context, places, torch.arange(m.places.start, m.places.stop, device=ids.device).expand(len(ids), -1))

    @torch.no_grad()
    def log_prob(self, answers, name, ids):
        """ln p (B,) of ids (B, size) of modality `name` after answers (B, size, D) of `ask`, its tokens taken as
        independent of each other. Queries carry no content, so that the answers of one pass score any number of candidates."""
        ids = ids.to(answers.device)
        nll = self.heads[name](answers.flatten(0, 1), ids.clamp(min=0).flatten()).view(ids.shape)
        return -(nll * (ids >= 0)).sum(1)

    @torch.no_grad()
    def embed(self, given):
        """The mean of the encoder's outputs over all known tokens, (B, D)."""
        context, places = self.look(self.join(given))
        known = (places < self.N)[..., None]
        return (context * known).sum(1) / known.sum(1).clamp(min=1)


def parse(config):
    """The modalities of a Config, in its order; those in `use` alone if it names any."""
    modalities, start = [], 0
    entries = config.modalities.split()
    names, used = [entry.split(':')[0] for entry in entries], config.use.split()
    if missing := [name for name in used if name not in names]:
        raise ValueError(f'use={config.use!r}: there is no modality {missing[0]!r}; there are {", ".join(names)}')
    for entry in entries:
        if not used or entry.split(':')[0] in used:
            modalities.append(Modality(entry, start))
            start = modalities[-1].places.stop
    return modalities


Model = FourM
