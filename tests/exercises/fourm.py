"""
Chapter 3's exercises: each check's docstring is what a student reads, its asserts are the reasons for a failed answer.

The references are slow and obvious: one sample, one token at a time.
"""
import torch

from tests.exercises import equal, generator, lively


def budget_sort_keys(fourm):
    """Masking: how a budget of tokens is split between modalities without a loop over samples (4M, 2312.06647,
    section 2.3). Number the available tokens of each modality 0, 1, 2 ...: at random, by one uniform value per
    position, or in ascending order where prefix_order (B, modalities). Each slice of the N positions is a
    modality. Token number r of a modality with proportion p has the key (r + 1/2) / p, here its logarithm, so
    that about K p of the K smallest keys are of this modality. Unavailable tokens have the key infinity and no
    number."""
    sections, B, K = [slice(0, 40), slice(40, 80), slice(80, 120)], 60, 30
    available, shuffled = torch.ones(B, 120).bool(), torch.zeros(B, 3).bool()
    share = fourm.log_dirichlet(torch.full((B,), 2.0), 3, generator()).exp()
    keys = fourm.budget_sort_keys(available, sections, share.log(), shuffled, generator(1))
    assert keys.shape == (B, 120), f'keys have shape {tuple(keys.shape)}, should be {(B, 120)}'

    def counts(keys):
        smallest = keys.topk(K, largest=False).indices
        return torch.stack([((smallest >= s.start) & (smallest < s.stop)).sum(1) for s in sections], 1)
    off = (counts(keys) - K * share).abs().amax(1)
    row = int(off.argmax())
    assert off[row] <= 1.6, (f'of the {K} smallest keys each modality should have its share: with proportions '
                             f'{[round(p, 2) for p in share[row].tolist()]} they hold {counts(keys)[row].tolist()}')
    tiny = torch.tensor([1e-9, 0.5, 0.5]).log().expand(B, 3)
    count = counts(fourm.budget_sort_keys(available, sections, tiny, shuffled, generator(1)))
    assert (count[:, 0] == 0).all(), (
        f'a modality whose proportion is next to nothing has {count[0, 0]} of the {K} smallest keys')
    half = torch.rand(B, 120, generator=generator(2)) < 0.8
    keys = fourm.budget_sort_keys(half, sections, share.log(), shuffled, generator(1))
    assert (keys[~half] == torch.inf).all(), 'the key of an unavailable token should be infinity'
    assert keys[half].isfinite().all(), 'the key of an available token should be finite'
    there = torch.stack([half[:, s].sum(1) for s in sections], 1)
    fits = (K * share + 2 < there).all(1)
    off = ((counts(keys) - K * share).abs().amax(1) * fits)
    assert off.max() <= 1.6, (
        'if only some tokens are available, each modality should still have its share of the smallest keys')
    for s in sections:
        first = fourm.budget_sort_keys(available, sections, share.log(), shuffled, generator(3))[:, s].argmin(1)
        assert len(first.unique()) > 15, (
            'without prefix_order, tokens should be numbered at random, differently in each sample')
    prefix_order = torch.tensor([True, False, True]).expand(B, 3)
    keys = fourm.budget_sort_keys(half, sections, share.log(), prefix_order, generator(1))
    for i in (0, 2):
        row = keys[0, sections[i]]
        row = row[row.isfinite()]
        assert (row.diff() > 0).all(), (
            'with prefix_order, keys should increase from the first to the last available token')
    assert not (keys[0, sections[1]][half[0, sections[1]]].diff() > 0).all(), (
        'a modality without prefix_order should be numbered at random')


def draw_masks(fourm):
    """Masking: the position ids of inputs (B, K) and of targets (B, M), a mixture of three kinds of samples.
    unconditional: with probability config.unconditional_prob a sample has no input;
    full: with probability config.full_modality_prob log proportions and budget are those of
    complete_first(count, weights, K_min, K, generator), count (B, n) being the number of tokens of each modality,
    weights (n,) config.first_modality_weight for modality 0, config.text_weight for other texts, 1 for other images;
    others: K tokens by the proportions of `log_dirichlet`, whose alpha is sampled for each sample from the list
    config.dirichlet_alphas.
    Inputs: `take_budget` of the `budget_sort_keys`, K slots, within the budget, which leaves at least one token
    as a target. A text has prefix_order with probability PREFIX_PROB. Targets: the same from the tokens that
    are not inputs, M slots, a budget of M, Dirichlet proportions of another alpha. Position id N is no
    token."""
    sections, is_text = [slice(0, 12), slice(12, 24), slice(24, 32)], torch.tensor([False, False, True])
    N, B, K, M = 32, 400, 14, 10
    present = torch.ones(B, N).bool()
    present[:, 24:] = torch.arange(8) <= torch.randint(8, (B, 1), generator=generator(5))

    def draw(M=M, seed=0, **changes):
        config = fourm.Config(**(dict(full_modality_prob=0.0, unconditional_prob=0.0, dirichlet_alphas='10') | changes))
        inputs, targets = fourm.draw_masks(present, sections, is_text, 1, K, M, config, generator(seed))
        assert inputs.shape == (B, K) and targets.shape == (B, M), (
            f'inputs and targets are {tuple(inputs.shape)}, {tuple(targets.shape)}; should be {(B, K)}, {(B, M)}')
        seen, asked = ([[i for i in row if i < N] for row in rows.tolist()] for rows in (inputs, targets))
        for row in range(B):
            assert not set(seen[row]) & set(asked[row]), 'a token is both input and target: the model could copy it'
            assert len(set(seen[row])) == len(seen[row]) and len(set(asked[row])) == len(asked[row]), (
                'a token is taken twice')
            assert present[row, seen[row] + asked[row]].all(), 'a token is taken that is not present'
        return seen, asked

    def of(tokens, section):
        return [i for i in tokens if section.start <= i < section.stop]
    alike, none, one, mixed = (draw(), draw(unconditional_prob=1.0), draw(full_modality_prob=1.0),
                               draw(unconditional_prob=0.3, full_modality_prob=0.7))
    for seen, asked in (alike, none, one, mixed):
        for row in range(B):
            left = int(present[row].sum()) - len(seen[row])
            assert len(asked[row]) == min(M, left), (
                f'{len(asked[row])} of {M} target slots are used, with {left} tokens left')
    assert draw() == alike != draw(seed=1), 'the same seed should give the same masks, another seed others'
    assert not any(none[0]), 'with unconditional_prob=1 no sample should have an input'
    share = sum(not row for row in mixed[0]) / B
    assert abs(share - 0.3) < 0.12, f'with unconditional_prob=0.3, {share:.0%} of the samples are without input'
    seen, _ = alike
    assert all(len(row) == K for row in seen), f'with Dirichlet proportions all {K} input slots should be used'
    assert sum(bool(of(row, sections[0]) and of(row, sections[1])) for row in seen) > 0.9 * B, (
        'with dirichlet_alphas=10, which makes proportions similar, nearly all inputs should have both images')
    text = [of(row, sections[2]) for row in seen]
    part = [(row == list(range(24, 24 + len(row)))) for row, there in zip(text, present.sum(1) - 24)
            if 0 < len(row) < there]
    share = sum(part) / len(part)
    assert abs(share - 0.76) < 0.17, (
        f'of texts of which a part is input, {share:.0%} are a prefix: 75% should be, and some by chance')
    seen, _ = one
    for row in range(B):
        counts, there = [len(of(seen[row], s)) for s in sections], [int(present[row, s].sum()) for s in sections]
        assert any(count == all_of_it for count, all_of_it in zip(counts, there)), (
            f'with full_modality_prob=1 the input should have a complete modality: {counts} tokens')
        assert sum(0 < count < all_of_it for count, all_of_it in zip(counts, there)) <= 1, (
            f'with full_modality_prob=1 one modality at most should be input in part: {counts} of {there} tokens')
    heavy, _ = draw(full_modality_prob=1.0, first_modality_weight=1e6)
    assert all(len(of(row, sections[0])) == 12 for row in heavy), (
        'with a large first_modality_weight modality 0 should be the complete one')
    heavy, _ = draw(full_modality_prob=1.0, text_weight=1e6)
    assert all(len(of(row, sections[2])) == int(there) for row, there in zip(heavy, present[:, 24:].sum(1))), (
        'with a large text_weight the text should be the complete modality')
    for what, rows in zip(('inputs', 'targets'), draw(M=8, dirichlet_alphas='1e-3,1000')):
        single = sum(max(len(of(row, s)) for s in sections[:2]) > 7 for row in rows) / B
        both = sum(abs(len(of(row, sections[0])) - len(of(row, sections[1]))) < 4 for row in rows) / B
        assert single > 0.1 and both > 0.26, (
            f'dirichlet_alphas of 0.001 and 1000, one a sample: some {what} should be of one modality, some of all')


SPEC = 'rgb:4*3:2x3 depth:7:2x2 caption:12:5'


def small(fourm, **changes):
    return lively(fourm.FourM(fourm.Config(**(dict(modalities=SPEC, n_layer_encoder=2, n_layer_decoder=2, n_head=2,
                                                   n_embd=16, num_input_tokens='4,8',
                                                   num_target_tokens='6') | changes))))


def inputs_of(blocks):
    """The arguments of the first of these blocks, as a dict that its next call fills: {'x': ..., 'rope':
    ...}."""
    seen, names = {}, ('x', 'rope', 'context', 'context_rope')
    blocks[0].register_forward_pre_hook(lambda block, arguments: seen.update(zip(names, arguments)))
    return seen


def embedded(fourm, model, ids, position_ids):
    """One token after the other: the sum of its digits' rows and of its position's embedding."""
    levels, rows = [[4, 3], [7], [12]], []
    for token, position in zip(ids.tolist(), position_ids.tolist()):
        x = model.pos_embedding.weight[position]
        if position < model.N:
            i = [position in range(m.token_slice.start, m.token_slice.stop) for m in model.modalities].index(True)
            digits = [token // 3, token % 3] if i == 0 else [token]
            start = 1 + sum(sum(part) for part in levels[:i])
            for digit, level in zip(digits, levels[i]):
                x, start = x + model.embedding.weight[start + digit], start + level
        rows.append(x)
    return fourm.rms_norm(torch.stack(rows))


def FourM_encode(fourm):
    """The encoder: token ids (B, K) and their position ids (B, K) -> the decoder's context (B, K, D).
    1. A token's embedding is the sum of its digits' embeddings, rows of self.embedding, and of
       self.pos_embedding of its position. With m = self.modality_of[position_ids], digit d of an id is the row
       id // divisor % levels + offset, these three from self.digit_table[m, d] (row 0, zero, for digits that a
       modality lacks).
    2. `rms_norm`, the blocks with self.rope_at(position_ids), `rms_norm`.
    3. The position embeddings are added again, as in 4M."""
    model = small(fourm)
    model.embedding.weight.data[0] = 0
    position_ids = torch.tensor([[0, 3, 5, 7, 10, 12, 15], [2, 8, 11, 13, 14, 15, 15]])  # 15: no token
    ids = torch.tensor([[11, 5, 2, 6, 11, 3, 0], [7, 4, 0, 8, 11, 0, 0]])
    seen = inputs_of(model.encoder)
    out = model.encode(ids, position_ids)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 7, 16), f'encode should give (B, K, D), {(2, 7, 16)}'
    x = torch.stack([embedded(fourm, model, *row) for row in zip(ids, position_ids)])
    equal(seen['x'], x, 'the embedded tokens, before the blocks,')
    for block in model.encoder:
        x = block(x, model.rope[:, position_ids].unsqueeze(2))
    assert not torch.allclose(out, fourm.rms_norm(x), atol=1e-5), (
        'the position embedding is missing: it should be added again after the last norm')
    equal(out, fourm.rms_norm(x) + model.pos_embedding(position_ids), 'what the encoder gives')


def FourM_decode(fourm):
    """The decoder: queries at position_ids (B, M), which attend to the context (B, K, D), what encode gives ->
    (B, M, D). A query is the `rms_norm` of self.query_embedding of its position id. Each block takes x, the cos
    and sin of the queries' positions (self.rope_at), the context and the cos and sin of the context's
    positions. `rms_norm` at the end."""
    model, context = small(fourm), torch.randn(2, 5, 16)
    context_position_ids = torch.tensor([[0, 2, 9, 11, 15], [1, 3, 4, 12, 15]])
    position_ids = torch.tensor([[1, 7, 13], [0, 8, 14]])
    seen = inputs_of(model.decoder)
    out = model.decode(context, context_position_ids, position_ids)
    equal(seen['x'], fourm.rms_norm(model.query_embedding(position_ids)), 'the queries, before the blocks,')
    equal(seen['context'], context, 'the context of the first block')
    x, rope, context_rope = seen['x'], *map(model.rope_at, (position_ids, context_position_ids))
    for block in model.decoder:
        x = block(x, rope, context, context_rope)
    equal(out, fourm.rms_norm(x), 'the outputs')
    equal(model.decode(context, context_position_ids, position_ids[:, 1:2]), out[:, 1:2],
          'the output of a single query, which should be that of the same query among others,')


def fake_batch(B):
    caption = torch.randint(11, (B, 5))
    caption[:, 3:] = -1
    caption[:, 2] = 11  # the end
    return dict(rgb=torch.randint(12, (B, 2, 3)), depth=torch.randint(7, (B, 2, 2)), caption=caption)


def target_weights(fourm):
    """The weights of the loss, w (n, B) for n modalities and B samples: the sum over targets of w * -ln p
    should be the mean over a sample's targets of one modality, then over the modalities of which the sample has
    targets, then over samples. is_target (n, B, M) is True for the targets of a modality. For a modality
    without targets in a sample w is not used."""
    is_target = torch.rand(3, 1, 8, generator=generator()) < torch.tensor([0.9, 0.4, 0.2, 0.0]).view(1, 4, 1)
    is_target[0, :, 0], is_target[1, 3] = True, torch.arange(8) > 3
    weights, nll = fourm.target_weights(is_target), torch.rand(3, 4, 8, generator=generator(1))
    assert weights.shape == (3, 4), (
        f'the weights have shape {tuple(weights.shape)}, should be (3, 4), as modalities and samples')
    loss = sum(weights[i, j] * nll[i, j][is_target[i, j]].sum() for i in range(3) for j in range(4)
               if is_target[i, j].any())
    samples = [[nll[i, j][is_target[i, j]].mean() for i in range(3) if is_target[i, j].any()] for j in range(4)]
    equal(loss, sum(sum(means) / len(means) for means in samples) / 4, 'the loss by these weights')


def FourM_prepare_batch(fourm):
    """The batch of a training step. The ids of all modalities, concatenated, are (B, N).
    1. K is one of self.input_sizes, M one of self.target_sizes, sampled with `step_generator`.
    2. input_position_ids (B, K) and target_position_ids (B, M) are those of `draw_masks`, with `generator`;
       input_ids (B, K) are the ids there, 0 for the null token N.
    3. For each modality NAME: token_idx_NAME, ascending indices of its targets among the B * M of the batch;
       ids_NAME, their ids; weight_NAME, their `target_weights`. All are padded with zeros to a multiple of
       max(1, B * M // 16), and to at least one such multiple, so that there are few shapes to compile for."""
    model, batch, names = small(fourm, unconditional_prob=0.2), fake_batch(16), ('rgb', 'depth', 'caption')
    all_ids = torch.cat([batch[name].flatten(1) for name in names], 1)

    def prepare(a, b):
        return model.prepare_batch({name: ids.clone() for name, ids in batch.items()}, generator(a), generator(b))
    prepared = prepare(1, 2)
    inputs, targets = prepared['input_position_ids'], prepared['target_position_ids']
    assert len({prepare(seed, 0)['input_position_ids'].size(1) for seed in range(6)}) == 1, (
        'K should come from `step_generator`: with the same one, all micro-batches have the same shapes')
    assert len({prepare(0, seed)['input_position_ids'].size(1) for seed in range(9)}) == 2, (
        'K should be sampled from self.input_sizes, 4 and 8')
    assert not torch.equal(prepare(7, 2)['target_position_ids'], targets), 'the masks should come from `generator`'
    for row in range(16):
        for position, token in zip(inputs[row].tolist(), prepared['input_ids'][row].tolist()):
            expected = int(all_ids[row, position]) if position < 15 else 0
            assert token == expected, f'input_ids: {token} at position id {position}, should be {expected}'
    multiple = 16 * 6 // 16
    counts = [[int(((row >= s.start) & (row < s.stop)).sum()) for s in model.token_slices] for row in targets]
    for i, (name, token_slice) in enumerate(zip(names, model.token_slices)):
        token_idx, ids, weight = (prepared[f'{key}_{name}'] for key in ('token_idx', 'ids', 'weight'))
        expected = [j for j, position in enumerate(targets.flatten().tolist())
                    if token_slice.start <= position < token_slice.stop]
        n = len(expected)
        assert token_idx[:n].tolist() == expected, (
            f'token_idx_{name} should be {expected[:6]}..., but is {token_idx[:6].tolist()}...')
        assert len(token_idx) == len(ids) == len(weight) == max(multiple, -(-n // multiple) * multiple), (
            f'{name}: {n} targets should be padded to a multiple of {multiple}, but there are {len(token_idx)}')
        assert (weight[n:] == 0).all(), f'{name}: padding should have weight 0'
        truth = torch.stack([all_ids[j // 6, int(targets[j // 6, j % 6])] for j in expected])
        equal(ids[:n], truth, f'ids_{name}, the ids of the targets,')
        each = torch.tensor([1 / counts[j // 6][i] / sum(count > 0 for count in counts[j // 6]) / 16 for j in expected])
        equal(weight[:n], each, f'weight_{name}')


def FourM_forward(fourm):
    """The loss: encode, decode, and the heads. Of the decoder's outputs as rows (B * M, D), those at
    token_idx_NAME go to self.heads[NAME](h, ids), which returns their -ln p; the loss is the sum of all, times
    weights.
    Logs, detached:
    loss_NAME      the sum of -ln p, and the number, of those whose weight is not 0;
    null_fraction  the number of input slots that are null (position id self.N), and of all;
    tokens         the number of inputs and targets that are not null, together, and 1."""
    model = small(fourm)
    inputs, targets = torch.tensor([[0, 2, 7, 15], [3, 11, 15, 15]]), torch.tensor([[1, 4, 8, 12], [6, 10, 13, 15]])
    input_ids = torch.tensor([[5, 11, 3, 0], [2, 9, 0, 0]])
    rows = dict(rgb=([0, 1, 0], [3, 7, 0], [.125, .125, 0]), depth=([2, 4, 0], [6, 1, 0], [.25, .125, 0]),
                caption=([3, 5, 6], [2, 8, 11], [0.1, 0.15, 0.125]))  # token_idx, ids, weight
    batch = dict(input_ids=input_ids, input_position_ids=inputs, target_position_ids=targets)
    for name, values in rows.items():
        batch |= {f'{key}_{name}': torch.tensor(value) for key, value in zip(('token_idx', 'ids', 'weight'), values)}
    loss, logs = model(dict(batch))
    h = model.decode(model.encode(input_ids, inputs), inputs, targets)
    expected, real = 0, {}
    for name, (token_idx, ids, weights) in rows.items():
        nll = [model.heads[name](h[i // 4, i % 4][None], torch.tensor([id_]))[0] for i, id_ in zip(token_idx, ids)]
        expected = expected + sum(one * weight for one, weight in zip(nll, weights))
        real[name] = torch.stack([one for one, weight in zip(nll, weights) if weight > 0])
    equal(loss, expected, 'the loss, the sum of all -ln p times their weights')
    for name, nll in real.items():
        equal(logs[f'loss_{name}'], torch.stack((nll.sum(), torch.tensor(float(len(nll))))),
              f"logs['loss_{name}'], sum and number,")
    equal(logs['null_fraction'], torch.tensor([3.0, 8.0]), "logs['null_fraction']")
    equal(logs['tokens'], torch.tensor([12.0, 1.0]), "logs['tokens']")
    assert not any(value.requires_grad for value in logs.values()), (
        'logs should be detached: they keep the graph in memory')
    loss.backward()
    assert model.embedding.weight.grad.abs().sum() > 0, 'no gradient reaches the embedding'


def FourM_generate_image(fourm):
    """ROAR and MaskGIT: generate an image a few tokens at a time. ids (B, N) holds all modalities, -1 if
    unknown; generate the unknown ones of m, ids[:, m.token_slice], in place, by chapter 2's `iterative_decode`
    with m.grid. In each step sample all tokens of m, sample(m, position_ids, progress), which reads ids: these
    must hold the tokens so far. If fewer tokens are unknown than there are steps, take fewer steps; if none is,
    do nothing."""
    model, calls, m = small(fourm), [], small(fourm).modalities[0]
    position_ids = torch.arange(6).expand(2, 6)

    def sample(m, given_ids, progress):
        assert given_ids is position_ids, 'sample should be called with the position_ids that were given'
        calls.append(ids.clone())
        return 100 * len(calls) + position_ids, torch.zeros(2, 6)
    for steps, expected in ((3, [100, 101, 202, 203, 304, 305]), (9, [100, 201, 302, 403, 504, 605]),
                            (1, [*range(100, 106)])):
        calls.clear()
        ids = torch.full((2, 15), -1)
        ids[1, 0], ids[:, 8] = 50, 3
        try:
            model.generate_image(ids, m, position_ids, sample, steps, 'raster', 'linear', generator())
        except ValueError as error:
            raise AssertionError(f'{steps} steps for 6 unknown tokens raise a ValueError: {error}')
        assert len(calls) == min(steps, 6), (
            f'{len(calls)} steps are taken for 6 unknown tokens, should be {min(steps, 6)}')
        assert (ids[:, :6] >= 0).all(), 'tokens of m are still unknown: ids should be changed in place'
        assert (ids[:, 6:8] < 0).all() and (ids[:, 8] == 3).all() and ids[1, 0] == 50, (
            'other modalities, or known tokens, have changed')
        for before, after in zip(calls, calls[1:]):
            assert (after[:, :6] >= 0).sum() > (before[:, :6] >= 0).sum(), (
                'each step should find the tokens generated before in ids')
        assert ids[0, :6].tolist() == expected, (
            f'in raster order, {steps} steps: {ids[0, :6].tolist()}, should be {expected} (hundreds: the step)')
    calls.clear()
    model.generate_image(ids, m, position_ids, sample, 4, 'raster', 'linear', generator())
    assert not calls, 'nothing is unknown, but tokens are sampled'
    found = []
    for seed in (0, 0, 1):
        calls.clear()
        ids = torch.full((2, 15), -1)
        model.generate_image(ids, m, position_ids, sample, 3, 'random', 'linear', generator(seed))
        found.append(ids[:, :6].tolist())
    assert found[0] == found[1] != found[2], 'a random order should come from the generator'


def FourM_generate(fourm):
    """Chained generation: each generated modality conditions the next (4M, section 3.1). `pack_modalities`
    turns the known modalities into ids (B, N). Generate the targets, in the order of the list, into these ids:
    texts by self.generate_text(ids, m, position_ids, sample), images by self.generate_image(ids, m,
    position_ids, sample, steps, order, schedule, generator), where position_ids (B, max_tokens) are those of
    m's tokens. Write sample(m, position_ids, progress): what self.sample_tokens(ids, m, position_ids,
    guidance, condition_weights, temperature, top_k, top_p, generator) returns. Guidance and temperature
    are `lerp` from guidance to guidance_end and from temperature to temperature_end; condition_weights None is
    {}. Return {name: (B, max_tokens)} of the targets alone."""
    model, calls, g = small(fourm), [], generator()

    def stub(kind):
        def call(ids, m, position_ids, sample, *arguments):
            calls.append((kind, m.name, ids.clone(), position_ids, sample, arguments))
            ids[:, m.token_slice] = torch.where(ids[:, m.token_slice] < 0, len(calls), ids[:, m.token_slice])
        return call
    model.generate_image, model.generate_text = stub('image'), stub('text')
    model.sample_tokens = lambda ids, m, *arguments: (ids.clone(), m.name, *arguments)
    rgb = torch.randint(12, (2, 6))
    rgb[0, 2] = -1
    settings = dict(steps=5, temperature=0.5, temperature_end=0.7, top_k=3, top_p=0.9, order='halton',
                    schedule='cosine', guidance=4.0, guidance_end=2.0, condition_weights=dict(rgb=3.0), generator=g)
    out = model.generate(dict(rgb=rgb.clone()), ['caption', 'depth'], **settings)
    assert [name for _, name, *_ in calls] == ['caption', 'depth'], (
        f"targets ['caption', 'depth'] should be generated in their order, not {[name for _, name, *_ in calls]}")
    assert [kind for kind, *_ in calls] == ['text', 'image'], (
        'texts should be generated by self.generate_text, images by self.generate_image')
    (_, _, first, position_ids, sample, _), (_, _, second, _, _, arguments) = calls
    assert torch.equal(first[:, :6], rgb) and (first[:, 6:] < 0).all(), (
        'for the first target only the known tokens should be in ids')
    assert torch.equal(second[:, :6], rgb), 'the known tokens should still be in ids for the second target'
    assert (second[:, 10:] == 1).all(), (
        'the first target is not in ids for the second: each generated modality conditions the next')
    assert position_ids.tolist() == [[*range(10, 15)]] * 2, (
        f'the position ids of caption are 10 to 14 in both samples, not {position_ids.tolist()}')
    assert arguments == (5, 'halton', 'cosine', g), (
        f'self.generate_image should get steps, order, schedule and generator, but gets {arguments}')
    for progress, temperature, guidance in ((0.0, 0.5, 4.0), (0.5, 0.6, 3.0), (1.0, 0.7, 2.0)):
        seen, name, at, s, weights, T, *rest = sample(model.modalities[2], position_ids[:, :1], progress)
        assert name == 'caption' and torch.equal(at, position_ids[:, :1]), (
            'sample should use the position_ids that it is given')
        assert (seen[:, 6:] > 0).all(), 'sample should use the ids that are being generated'
        assert weights == dict(rgb=3.0) and rest == [3, 0.9, g], (
            f'sample_tokens should get condition_weights, temperature, top_k, top_p, generator, '
            f'but gets {weights}, {T}, {rest}')
        assert abs(T - temperature) < 1e-6 and abs(s - guidance) < 1e-6, (
            f'temperature from 0.5 to 0.7, guidance from 4 to 2: at progress {progress:g} they are {T:g} and {s:g}, '
            f'should be {temperature:g} and {guidance:g}')
    assert set(out) == {'caption', 'depth'}, f'it returns {sorted(out)}, should be the targets, caption and depth'
    assert (out['caption'] == 1).all() and out['caption'].shape == (2, 5), (
        'the caption returned is not the one generated, (B, 5)')
    assert (out['depth'] == 2).all() and out['depth'].shape == (2, 4), (
        'the depth returned is not the one generated, (B, 4)')
    model.generate({'rgb': rgb}, ['depth'])
    assert calls[-1][4](model.modalities[1], position_ids, 0.0)[4] == {}, (
        'without condition_weights sample_tokens should get {}')


EXERCISES = {
    'budget_sort_keys': (4, budget_sort_keys),
    'draw_masks': (3, draw_masks),
    'FourM.encode': (3, FourM_encode),
    'FourM.decode': (2, FourM_decode),
    'target_weights': (1, target_weights),
    'FourM.prepare_batch': (1, FourM_prepare_batch),
    'FourM.forward': (2, FourM_forward),
    'FourM.generate_image': (2, FourM_generate_image),
    'FourM.generate': (2, FourM_generate),
}
