"""
Chapter 3's exercises: each check's docstring is what a student reads, its asserts are what a failed answer is told.

The references are slow and obvious: one sample, one token at a time.
"""
import torch

from tests.exercises import equal, generator, lively


def budget_keys(fourm):
    """Masking: how a budget of tokens is dealt out to modalities, without a loop over samples (4M,
    2312.06647, section 2.3). Within each section (a slice of the N places, one a modality) rank the available tokens 0, 1,
    2 ...: at random, by one uniform draw a place, or from first to last where ordered. Number r of a
    modality with share p gets the key (r + 1/2) / p, here its logarithm, so that among the K smallest keys there are K p
    of it. Unavailable tokens get infinity, and take no rank from others."""
    sections, B, K = [slice(0, 40), slice(40, 80), slice(80, 120)], 60, 30
    available, shuffled = torch.ones(B, 120).bool(), torch.zeros(B, 3).bool()
    share = fourm.log_dirichlet(torch.full((B,), 2.0), 3, generator()).exp()
    keys = fourm.budget_keys(available, sections, share.log(), shuffled, generator(1))
    assert keys.shape == (B, 120), f'keys have shape {tuple(keys.shape)}, should be {(B, 120)}'

    def counts(keys):
        smallest = keys.topk(K, largest=False).indices
        return torch.stack([((smallest >= s.start) & (smallest < s.stop)).sum(1) for s in sections], 1)
    off = (counts(keys) - K * share).abs().amax(1)
    row = int(off.argmax())
    assert off[row] <= 1.6, (f'of the {K} smallest keys each modality should have its share: with shares '
                             f'{[round(p, 2) for p in share[row].tolist()]} they hold {counts(keys)[row].tolist()} of them')
    tiny = torch.tensor([1e-9, 0.5, 0.5]).log().expand(B, 3)
    count = counts(fourm.budget_keys(available, sections, tiny, shuffled, generator(1)))
    assert (count[:, 0] == 0).all(), f'a modality whose share is next to nothing has {count[0, 0]} of the {K} smallest keys'
    half = torch.rand(B, 120, generator=generator(2)) < 0.8
    keys = fourm.budget_keys(half, sections, share.log(), shuffled, generator(1))
    assert (keys[~half] == torch.inf).all(), 'the key of an unavailable token should be infinity'
    assert keys[half].isfinite().all(), 'the key of an available token should be finite'
    there = torch.stack([half[:, s].sum(1) for s in sections], 1)
    fits = (K * share + 2 < there).all(1)
    off = ((counts(keys) - K * share).abs().amax(1) * fits)
    assert off.max() <= 1.6, (
        'where only some tokens are available, the modalities should have their share of the smallest keys all the same')
    for s in sections:
        first = fourm.budget_keys(available, sections, share.log(), shuffled, generator(3))[:, s].argmin(1)
        assert len(first.unique()) > 15, 'where not ordered, tokens should be ranked at random, differently in each sample'
    ordered = torch.tensor([True, False, True]).expand(B, 3)
    keys = fourm.budget_keys(half, sections, share.log(), ordered, generator(1))
    for i in (0, 2):
        row = keys[0, sections[i]]
        row = row[row.isfinite()]
        assert (row.diff() > 0).all(), 'where ordered, keys should rise from the first to the last available token'
    assert not (keys[0, sections[1]][half[0, sections[1]]].diff() > 0).all(), (
        'a modality that is not ordered should be ranked at random')


def draw_masks(fourm):
    """Masking: what is seen and what is asked for, a mixture of three kinds of samples.
    empty   with probability config.empty a sample has no input;
    whole   with probability config.whole shares and limit are those of
            whole_first(count, is_text, K, config.lead, random), count (B, n) being how many tokens each modality has,
            random(*shape) uniform draws from the generator;
    others  take K tokens by shares of `log_dirichlet`, whose alpha is drawn for each sample from the list config.alphas.
    Inputs (B, K): the `smallest` of the `budget_keys`, up to the limit; a text is ordered in 75 % of the samples.
    Targets (B, M): the same from what is present and not an input, by Dirichlet shares of another alpha, up to M. The
    index N stands for no token."""
    sections, is_text = [slice(0, 12), slice(12, 24), slice(24, 32)], torch.tensor([False, False, True])
    N, B, K, M = 32, 400, 14, 10
    present = torch.ones(B, N).bool()
    present[:, 24:] = torch.arange(8) <= torch.randint(8, (B, 1), generator=generator(5))

    def draw(M=M, seed=0, **changes):
        config = fourm.Config(**(dict(whole=0.0, empty=0.0, alphas='10') | changes))
        inputs, targets = fourm.draw_masks(present, sections, is_text, K, M, config, generator(seed))
        assert inputs.shape == (B, K) and targets.shape == (B, M), (
            f'inputs and targets are {tuple(inputs.shape)}, {tuple(targets.shape)}; should be {(B, K)}, {(B, M)}')
        seen, asked = ([[i for i in row if i < N] for row in rows.tolist()] for rows in (inputs, targets))
        for row in range(B):
            assert not set(seen[row]) & set(asked[row]), 'a token is both input and target: the model could copy it'
            assert len(set(seen[row])) == len(seen[row]) and len(set(asked[row])) == len(asked[row]), 'a token is taken twice'
            assert present[row, seen[row] + asked[row]].all(), 'a token is taken that is not present'
        return seen, asked

    def of(tokens, section):
        return [i for i in tokens if section.start <= i < section.stop]
    alike, none, one, mixed = draw(), draw(empty=1.0), draw(whole=1.0), draw(empty=0.3, whole=0.7)
    for seen, asked in (alike, none, one, mixed):
        for row in range(B):
            left = int(present[row].sum()) - len(seen[row])
            assert len(asked[row]) == min(M, left), (
                f'{len(asked[row])} of {M} target slots are used, with {left} tokens left to ask for')
    assert draw() == alike != draw(seed=1), 'the same generator should draw the same masks, another seed others'
    assert not any(none[0]), 'with empty=1 no sample should have an input'
    share = sum(not row for row in mixed[0]) / B
    assert abs(share - 0.3) < 0.12, f'with empty=0.3, {share:.0%} of the samples are without input'
    seen, _ = alike
    assert all(len(row) == K for row in seen), f'with Dirichlet shares all {K} input slots should be used'
    assert sum(bool(of(row, sections[0]) and of(row, sections[1])) for row in seen) > 0.9 * B, (
        'with alphas=10, which makes shares alike, nearly every sample should see some of both pictures')
    text = [of(row, sections[2]) for row in seen]
    part = [(row == list(range(24, 24 + len(row)))) for row, there in zip(text, present.sum(1) - 24) if 0 < len(row) < there]
    share = sum(part) / len(part)
    assert abs(share - 0.76) < 0.17, (
        f'of texts that are seen in part, {share:.0%} begin at their beginning: 75% should, and some by chance')
    seen, _ = one
    for row in range(B):
        counts, there = [len(of(seen[row], s)) for s in sections], [int(present[row, s].sum()) for s in sections]
        assert any(count == all_of_it for count, all_of_it in zip(counts, there)), (
            f'with whole=1 a sample should see one modality whole: {counts}')
        assert sum(count > 0 for count in counts) <= 2, (
            f'with whole=1 a sample should see two modalities at most: {counts} tokens')
    for what, rows in zip(('inputs', 'targets'), draw(M=8, alphas='1e-3,1000')):
        single = sum(max(len(of(row, s)) for s in sections[:2]) > 7 for row in rows) / B
        both = sum(abs(len(of(row, sections[0])) - len(of(row, sections[1]))) < 4 for row in rows) / B
        assert single > 0.1 and both > 0.26, (
            f'alphas of 0.001 and 1000, one a sample: some {what} should be of one modality, some of all')


SPEC = 'rgb:4*3:2x3 depth:7:2x2 caption:12:5'


def small(fourm, **changes):
    return lively(fourm.FourM(fourm.Config(**(dict(modalities=SPEC, n_layer_encoder=2, n_layer_decoder=2, n_head=2, n_embd=16,
                                                   input_slots='4,8', target_slots='6') | changes))))


def read_by(blocks):
    """Makes the first of these blocks remember what it is given: {'x': the last x, 'turn': ...}."""
    seen, names = {}, ('x', 'turn', 'context', 'context_turn')
    blocks[0].register_forward_pre_hook(lambda block, arguments: seen.update(zip(names, arguments)))
    return seen


def embedded(fourm, model, ids, index):
    """One token after the other: the sum of its digits' rows, and its place."""
    levels, rows = [[4, 3], [7], [12]], []
    for token, place in zip(ids.tolist(), index.tolist()):
        x = model.place_embedding.weight[place]
        if place < model.N:
            i = [place in range(m.places.start, m.places.stop) for m in model.modalities].index(True)
            digits = [token // 3, token % 3] if i == 0 else [token]
            start = 1 + sum(sum(part) for part in levels[:i])
            for digit, level in zip(digits, levels[i]):
                x, start = x + model.embedding.weight[start + digit], start + level
        rows.append(x)
    return fourm.norm(torch.stack(rows))


def FourM_encode(fourm):
    """The encoder: tokens (B, K) at places (B, K) -> what the decoder looks at, (B, K, D).
    1. A token is the sum of its digits' embeddings, rows of self.embedding, and of its place's. With
       m = self.modality_of[index], digit d of an id is the row
       id // self.divisor[m, d] % self.levels[m, d] + self.offset[m, d] (digits that a modality does not have come out as
       row 0, which is zero).
    2. `norm`, then the blocks with the rotary angles self.turns(index), then `norm` again.
    3. The places' embeddings are added once more, as in 4M."""
    model = small(fourm)
    model.embedding.weight.data[0] = 0
    index = torch.tensor([[0, 3, 5, 7, 10, 12, 15], [2, 8, 11, 13, 14, 15, 15]])  # 15: no token
    ids = torch.tensor([[11, 5, 2, 6, 11, 3, 0], [7, 4, 0, 8, 11, 0, 0]])
    seen = read_by(model.encoder)
    out = model.encode(ids, index)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 7, 16), f'encode should give (B, K, D), {(2, 7, 16)}'
    x = torch.stack([embedded(fourm, model, *row) for row in zip(ids, index)])
    equal(seen['x'], x, 'the embedded tokens, before the blocks,')
    for block in model.encoder:
        x = block(x, model.turn[:, index].unsqueeze(2))
    assert not torch.allclose(out, fourm.norm(x), atol=1e-5), (
        'the place is missing: it should be added again behind the last norm')
    equal(out, fourm.norm(x) + model.place_embedding(index), 'what the encoder gives')


def FourM_decode(fourm):
    """The decoder: queries at places index (B, M) -> answers (B, M, D). A query is the `norm` of self.query_embedding of
    its place, nothing more. Each block takes x, the angles of the queries' places, the context (what the encoder gave,
    (B, K, D)) and the angles of the context's places. A last `norm`."""
    model, context = small(fourm), torch.randn(2, 5, 16)
    context_index, index = torch.tensor([[0, 2, 9, 11, 15], [1, 3, 4, 12, 15]]), torch.tensor([[1, 7, 13], [0, 8, 14]])
    seen = read_by(model.decoder)
    out = model.decode(context, context_index, index)
    equal(seen['x'], fourm.norm(model.query_embedding(index)), 'the queries, before the blocks,')
    equal(seen['context'], context, 'the context that the blocks are given')
    x, turn, context_turn = seen['x'], *(model.turn[:, where].unsqueeze(2) for where in (index, context_index))
    for block in model.decoder:
        x = block(x, turn, context, context_turn)
    equal(out, fourm.norm(x), 'the answers')
    equal(model.decode(context, context_index, index[:, 1:2]), out[:, 1:2],
          'a query asked alone; its answer should be what it was among others:')


def fake_batch(B):
    caption = torch.randint(11, (B, 5))
    caption[:, 3:] = -1
    caption[:, 2] = 11  # the end
    return dict(rgb=torch.randint(12, (B, 2, 3)), depth=torch.randint(7, (B, 2, 2)), caption=caption)


def FourM_draw(fourm):
    """The loss, first half: what a training step reads, and what it is to answer. Side by side the modalities' ids are
    (B, N).
    1. K is one of self.input_sizes, M one of self.target_sizes, drawn from the generator `shared`.
    2. input_index (B, K) and target_index (B, M) are those of `draw_masks`, with `generator`; input_ids (B, K) are the
       ids there, 0 for the null token N.
    3. For each modality NAME: rows_NAME, where its targets are among the B * M of the batch, from first to last;
       ids_NAME, what is right there; weight_NAME, such that the sum of all weight * loss is the mean over a sample's
       targets of one modality, then over the modalities that the sample has targets in, then over samples. Each list is
       filled up with zeros to a multiple of max(1, B * M // 16), at least once that, so that shapes are few."""
    model, batch, names = small(fourm, empty=0.2), fake_batch(16), ('rgb', 'depth', 'caption')
    everything = torch.cat([batch[name].flatten(1) for name in names], 1)
    drawn = model.draw({name: ids.clone() for name, ids in batch.items()}, generator(1), generator(2))
    inputs, targets = drawn['input_index'], drawn['target_index']
    sizes = {tuple(model.draw(batch, generator(seed), generator(0))['input_index'].shape) for seed in range(6)}
    assert len(sizes) == 1, 'K should come from `shared`: with the same one, all micro-batches have the same shapes'
    assert len({model.draw(batch, generator(0), generator(seed))['input_index'].size(1) for seed in range(9)}) == 2, (
        'K should be drawn from self.input_sizes, 4 and 8')
    again = model.draw(batch, generator(7), generator(2))
    assert not torch.equal(again['target_index'], targets), 'the masks should come from `generator`'
    for row in range(16):
        for place, token in zip(inputs[row].tolist(), drawn['input_ids'][row].tolist()):
            expected = int(everything[row, place]) if place < 15 else 0
            assert token == expected, f'input_ids: {token} at place {place}, should be {expected}'
    step, counts = 16 * 6 // 16, [[int(((row >= s.start) & (row < s.stop)).sum()) for s in model.sections] for row in targets]
    for i, (name, section) in enumerate(zip(names, model.sections)):
        rows, ids, weight = (drawn[f'{part}_{name}'] for part in ('rows', 'ids', 'weight'))
        expected = [j for j, place in enumerate(targets.flatten().tolist()) if section.start <= place < section.stop]
        n = len(expected)
        assert rows[:n].tolist() == expected, f'rows_{name} should be {expected[:6]}..., but they are {rows[:6].tolist()}...'
        assert len(rows) == len(ids) == len(weight) == max(step, -(-n // step) * step), (
            f'{name}: {n} targets should be filled up to a multiple of {step}, but there are {len(rows)}')
        assert (weight[n:] == 0).all(), f'{name}: what only fills up should have weight 0'
        truth = torch.stack([everything[j // 6, int(targets[j // 6, j % 6])] for j in expected])
        equal(ids[:n], truth, f'ids_{name}, the right answers,')
        each = torch.tensor([1 / counts[j // 6][i] / sum(count > 0 for count in counts[j // 6]) / 16 for j in expected])
        equal(weight[:n], each, f'weight_{name}')


def FourM_forward(fourm):
    """The loss, second half: encode, decode, and ask each modality's head. Of the answers, as rows (B * M, D), those of
    modality NAME go to self.heads[NAME](h, ids), which gives -ln p of each; the loss is the sum of all, times weights.
    Logs, detached:
    loss_NAME   the sum of -ln p, and the number, of those whose weight is not 0;
    null_share  how many input slots are null (place self.N), and how many there are;
    tokens      how many inputs and targets are not null, together, and 1."""
    model = small(fourm)
    index, targets = torch.tensor([[0, 2, 7, 15], [3, 11, 15, 15]]), torch.tensor([[1, 4, 8, 12], [6, 10, 13, 15]])
    ids = torch.tensor([[5, 11, 3, 0], [2, 9, 0, 0]])
    answers = dict(rgb=([0, 1, 0], [3, 7, 0], [.125, .125, 0]), depth=([2, 4, 0], [6, 1, 0], [.25, .125, 0]),
                   caption=([3, 5, 6], [2, 8, 11], [0.1, 0.15, 0.125]))
    batch = dict(input_ids=ids, input_index=index, target_index=targets)
    for name, (rows, right, weight) in answers.items():
        batch |= {f'rows_{name}': torch.tensor(rows), f'ids_{name}': torch.tensor(right), f'weight_{name}': torch.tensor(weight)}
    loss, logs = model(dict(batch))
    h = model.decode(model.encode(ids, index), index, targets)
    expected, sums = 0, {}
    for name, triples in answers.items():
        nll = [model.heads[name](h[row // 4, row % 4][None], torch.tensor([right]))[0] for row, right, _ in zip(*triples)]
        expected = expected + sum(one * weight for one, weight in zip(nll, triples[2]))
        sums[name] = torch.stack([one for one, weight in zip(nll, triples[2]) if weight > 0])
    equal(loss, expected, 'the loss, the sum of all -ln p times their weights')
    for name, real in sums.items():
        equal(logs[f'loss_{name}'], torch.stack((real.sum(), torch.tensor(float(len(real))))),
              f"logs['loss_{name}'], the sum and number,")
    equal(logs['null_share'], torch.tensor([3.0, 8.0]), "logs['null_share']")
    equal(logs['tokens'], torch.tensor([12.0, 1.0]), "logs['tokens']")
    assert not any(value.requires_grad for value in logs.values()), 'logs should be detached: they keep the graph alive'
    loss.backward()
    assert model.embedding.weight.grad.abs().sum() > 0, 'no gradient reaches the embedding'


def FourM_fill(fourm):
    """ROAR and MaskGIT: a picture is filled in a few tokens at a time. ids (B, N) holds all modalities, -1 where unknown; fill
    those of m, ids[:, m.places], in place, by chapter 2's `unmask` with m.grid. What `unmask` calls puts the tokens so far
    into ids and asks for all places of m at once, predict(m, index, progress), which looks at ids. Where fewer tokens are
    unknown than there are steps, take fewer steps; where none is, do nothing."""
    model, calls, m = small(fourm), [], small(fourm).modalities[0]
    places = torch.arange(6).expand(2, 6)

    def predict(m, index, progress):
        assert index is places, 'predict should be asked for all places of m: the index that was given'
        calls.append((ids.clone(), progress))
        return 100 * len(calls) + places, torch.zeros(2, 6)
    for steps, expected in ((3, [100, 101, 202, 203, 304, 305]), (9, [100, 201, 302, 403, 504, 605]), (1, [*range(100, 106)])):
        calls.clear()
        ids = torch.full((2, 15), -1)
        ids[1, 0], ids[:, 8] = 50, 3
        try:
            model.fill(ids, m, places, predict, steps, 'raster', 'linear', generator())
        except ValueError as error:
            raise AssertionError(f'{steps} steps for 6 unknown tokens raise a ValueError: {error}')
        assert len(calls) == min(steps, 6), f'{len(calls)} steps are taken for 6 unknown tokens, should be {min(steps, 6)}'
        assert (ids[:, :6] >= 0).all(), 'tokens of m are still unknown: ids should be filled in place'
        assert (ids[:, 6:8] < 0).all() and (ids[:, 8] == 3).all() and ids[1, 0] == 50, (
            'other modalities, or tokens given, have changed')
        for (before, _), (after, _) in zip(calls, calls[1:]):
            assert (after[:, :6] >= 0).sum() > (before[:, :6] >= 0).sum(), 'each step should see, in ids, what was filled before'
        assert ids[0, :6].tolist() == expected, (
            f'in raster order, {steps} steps: {ids[0, :6].tolist()}, should be {expected} (hundreds: the step)')
    calls.clear()
    model.fill(ids, m, places, predict, 4, 'raster', 'linear', generator())
    assert not calls, 'nothing is unknown, but tokens are drawn'
    drawn = []
    for seed in (0, 0, 1):
        calls.clear()
        ids = torch.full((2, 15), -1)
        model.fill(ids, m, places, predict, 3, 'random', 'linear', generator(seed))
        drawn.append(ids[:, :6].tolist())
    assert drawn[0] == drawn[1] != drawn[2], 'in random order, the places should be drawn from the generator'


def FourM_generate(fourm):
    """Chains: each modality, once generated, conditions the next (4M, section 3.1). `join` what is given to ids (B, N). Then
    generate the targets in the order of the list, each into the same ids, index (B, size) being the places of m: texts by
    self.write(ids, m, index, predict), pictures by self.fill(ids, m, index, predict, steps, order, schedule, generator).
    predict(m, index, progress) is yours too: what self.draw_tokens(ids, m, index, guidance, weights, **how) returns, how
    being temperature, top_k, top_p and generator. Temperature and guidance are those of this progress, which `between`
    finds; weights are {} where None. Returns {name: (B, size)} of the targets alone."""
    model, calls, g = small(fourm), [], generator()

    def stub(kind):
        def call(ids, m, index, predict, *how):
            calls.append((kind, m.name, ids.clone(), index, predict, how))
            ids[:, m.places] = torch.where(ids[:, m.places] < 0, len(calls), ids[:, m.places])
        return call
    model.fill, model.write = stub('fill'), stub('write')
    model.draw_tokens = lambda ids, m, index, guidance, weights, **how: (ids.clone(), m.name, index, guidance, weights, how)
    rgb = torch.randint(12, (2, 6))
    rgb[0, 2] = -1
    settings = dict(steps=5, temperature=0.5, temperature_end=0.7, top_k=3, top_p=0.9, order='halton', schedule='cosine',
                    guidance=2.0, guidance_start=4.0, weights=dict(rgb=3.0), generator=g)
    out = model.generate(dict(rgb=rgb.clone()), ['caption', 'depth'], **settings)
    assert [name for _, name, *_ in calls] == ['caption', 'depth'], (
        f"targets ['caption', 'depth'] should be generated in their order, but these are: {[name for _, name, *_ in calls]}")
    assert [kind for kind, *_ in calls] == ['write', 'fill'], 'texts should be generated by self.write, pictures by self.fill'
    (_, _, first, places, predict, _), (_, _, second, _, _, how) = calls
    assert torch.equal(first[:, :6], rgb) and (first[:, 6:] < 0).all(), 'the first target should see what is given, no more'
    assert torch.equal(second[:, :6], rgb), 'the second target should see what is given'
    assert (second[:, 10:] == 1).all(), 'the second target does not see the first: each, once generated, conditions the next'
    assert places.tolist() == [[*range(10, 15)]] * 2, f'the places of caption are 10 to 14 in both samples, not {places.tolist()}'
    assert how == (5, 'halton', 'cosine', g), f'self.fill should get steps, order, schedule and generator, but gets {how}'
    for progress, temperature, guidance in ((0.0, 0.5, 4.0), (0.5, 0.6, 3.0), (1.0, 0.7, 2.0)):
        seen, name, index, s, weights, how = predict(model.modalities[2], places[:, :1], progress)
        assert name == 'caption' and torch.equal(index, places[:, :1]), 'predict should ask for the places that it is called with'
        assert (seen[:, 6:] > 0).all(), 'predict should look at the ids that are being filled'
        assert weights == dict(rgb=3.0) and how.keys() == {'temperature', 'top_k', 'top_p', 'generator'}, (
            f'draw_tokens should get weights, temperature, top_k, top_p, generator, but gets {weights} and {", ".join(how)}')
        assert abs(how['temperature'] - temperature) < 1e-6 and abs(s - guidance) < 1e-6, (
            f'temperature from 0.5 to 0.7, guidance from 4 to 2: at progress {progress:g} they are {how["temperature"]:g} and '
            f'{s:g}, should be {temperature:g} and {guidance:g}')
    assert set(out) == {'caption', 'depth'}, f'it returns {sorted(out)}, should be the targets, caption and depth'
    assert (out['caption'] == 1).all() and out['caption'].shape == (2, 5), 'the caption returned is not the one generated, (B, 5)'
    assert (out['depth'] == 2).all() and out['depth'].shape == (2, 4), 'the depth returned is not the one generated, (B, 4)'
    model.generate({'rgb': rgb}, ['depth'])
    assert calls[-1][4](model.modalities[1], places, 0.0)[4] == {}, 'without weights draw_tokens should get {}'


EXERCISES = {
    'budget_keys': (4, budget_keys),
    'draw_masks': (3, draw_masks),
    'FourM.encode': (3, FourM_encode),
    'FourM.decode': (2, FourM_decode),
    'FourM.draw': (2, FourM_draw),
    'FourM.forward': (2, FourM_forward),
    'FourM.fill': (2, FourM_fill),
    'FourM.generate': (2, FourM_generate),
}
