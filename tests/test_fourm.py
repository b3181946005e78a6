"""nano4M: masking for hundreds of random configurations, digits, losses, and generation against a slow reference."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskgit
from fourm import Config, FourM, Modality, budget_sort_keys, draw_masks, log_dirichlet, take_budget, target_weights
from lab import retrieval
from maskgit import halton_order

SPEC = 'rgb:4*4*3:2x3 depth:7:3x3 caption:12:8'


def small(**changes):
    torch.manual_seed(0)
    return FourM(Config(**(dict(modalities=SPEC, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32,
                                num_input_tokens='4,8,12', num_target_tokens='6') | changes))).eval()


def lively(model):
    """Weights that no longer start at zero, so that every part matters."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if 'embedding' not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def fake_batch(model, B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for m in model.modalities:
        batch[m.name] = torch.randint(m.vocab_size - m.is_text, (B, m.max_tokens), generator=generator)
        if m.is_text:  # some tokens, the end token, then nothing
            end = torch.randint(m.max_tokens, (B, 1), generator=generator)
            at = torch.arange(m.max_tokens)
            batch[m.name] = torch.where(at < end, batch[m.name], torch.where(at == end, m.vocab_size - 1, -1))
    return batch


def generators(seed):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Masking

@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5), K=st.integers(1, 40),
       M=st.integers(1, 40), full=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
       empty=st.one_of(st.just(0.0), st.floats(0, 1)), alpha=st.sampled_from(['0.01', '0.3,5', '100']),
       seed=st.integers(0, 10 ** 6))
def test_masks(sizes, K, M, full, empty, alpha, seed):
    generator, B, sections, start = torch.Generator().manual_seed(seed), 6, [], 0
    for size, _ in sizes:
        sections.append(slice(start, start + size))
        start += size
    N, is_text = start, torch.tensor([text for _, text in sizes])
    present = torch.ones(B, N, dtype=torch.bool)
    for section, (size, text) in zip(sections, sizes):
        if text:  # each text has at least its end token
            present[:, section] = torch.arange(size) <= torch.randint(size, (B, 1), generator=generator)
    config = Config(full_modality_prob=full * (1 - empty), unconditional_prob=empty, dirichlet_alphas=alpha)
    K_min = 1 + seed % K
    inputs, targets = draw_masks(present, sections, is_text, K_min, K, M, config, generator)
    assert inputs.shape == (B, K) and targets.shape == (B, M)
    for row, seen, asked in zip(present, inputs.tolist(), targets.tolist()):
        seen, asked = [i for i in seen if i < N], [i for i in asked if i < N]
        assert len(set(seen)) == len(seen) and len(set(asked)) == len(asked) and not set(seen) & set(asked)
        assert all(row[i] for i in seen + asked)
        assert asked == sorted(asked)  # sorted by modality
        left = int(row.sum()) - len(seen)
        assert len(asked) == min(M, left) > 0  # target slots are null only if no token is left, and some are
    if empty == 1:
        assert (inputs == N).all()
    modality = torch.cat([torch.full((s.stop - s.start,), m) for m, s in enumerate(sections)])
    if empty == 0 and full == 1:  # complete modalities, at least one if it fits, and one in part
        for row, seen in zip(present, inputs):
            of = modality[seen[seen < N]]
            assert sum(0 < (of == m).sum() < row[s].sum() for m, s in enumerate(sections)) <= 1
            assert len(of) >= min(K_min, row.sum() - 1)
            assert (len(of) == min(K, row.sum() - 1)
                    or any((of == m).sum() == row[s].sum() for m, s in enumerate(sections)))
    if empty == 0 and full == 0:
        assert ((inputs < N).sum(1) == (present.sum(1) - 1).clamp(max=K)).all()


def test_budgets_follow_the_proportions():
    """Each modality gets K times its proportion, to within rounding; unused budget goes to the others."""
    generator = torch.Generator().manual_seed(0)
    sections, B, K = [slice(0, 100), slice(100, 200), slice(200, 300)], 500, 60
    log_proportions = log_dirichlet(torch.full((B,), 2.0), 3, generator)
    available, prefix_order = torch.ones(B, 300, dtype=torch.bool), torch.zeros(B, 3, dtype=torch.bool)
    keys = budget_sort_keys(available, sections, log_proportions, prefix_order, generator)
    chosen = take_budget(keys, K, K)
    count = torch.stack([((chosen >= s.start) & (chosen < s.stop)).sum(1) for s in sections], 1)
    assert (count.sum(1) == K).all() and ((count - K * log_proportions.exp()).abs() <= 1.5).all()
    available[:, 5:100] = False  # the first modality is short
    count = (take_budget(keys.masked_fill(~available, torch.inf), K, K) < 100).sum(1)
    assert (count <= 5).all()


@pytest.mark.parametrize('alpha', [0.05, 0.5, 1.0, 10.0])
def test_dirichlet_moments(alpha):
    n, B = 4, 40000
    share = log_dirichlet(torch.full((B,), alpha), n, torch.Generator().manual_seed(1)).exp()
    torch.testing.assert_close(share.sum(1), torch.ones(B))
    assert share.mean(0).sub(1 / n).abs().max() < 0.01
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert share.var(0).mean().item() == pytest.approx(variance, rel=0.05)


def test_ordered_text_is_a_prefix():
    generator = torch.Generator().manual_seed(0)
    available = torch.arange(10) < torch.randint(1, 11, (50, 1), generator=generator)
    prefix_order = torch.ones(50, 1, dtype=torch.bool)
    keys = budget_sort_keys(available, [slice(0, 10)], torch.zeros(50, 1), prefix_order, generator)
    for row, there in zip(take_budget(keys, 4, 4).tolist(), available.sum(1).tolist()):
        assert row == sorted(list(range(min(4, there))) + [10] * (4 - min(4, there)))


def test_prepared_targets_are_those_of_their_modality():
    model = small()
    batch, N = fake_batch(model, 16), model.N
    ids = torch.cat([batch[m.name] for m in model.modalities], 1)
    drawn = model.prepare_batch(batch, *generators(0))
    inputs = drawn['input_position_ids']
    assert torch.equal(drawn['input_ids'][inputs < N], ids.gather(1, inputs.clamp(max=N - 1))[inputs < N])
    flat, total = drawn['target_position_ids'].flatten(), 0
    for m in model.modalities:
        weight, token_idx = drawn[f'weight_{m.name}'], drawn[f'token_idx_{m.name}']
        real = weight > 0
        position_ids = flat[token_idx[real]]
        assert ((position_ids >= m.token_slice.start) & (position_ids < m.token_slice.stop)).all()
        assert torch.equal(drawn[f'ids_{m.name}'][real], ids[token_idx[real] // 6, position_ids])
        total += weight.sum().item()
        assert len(token_idx) % (16 * 6 // 16) == 0
    assert total == pytest.approx(1, abs=1e-5)  # a mean over samples


def test_target_weights():
    """The docstring's example: 3 targets of rgb and 1 of depth in one of two samples."""
    is_target = torch.tensor([[[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 0, 0, 1], [0, 0, 0, 0]]]).bool()
    assert target_weights(is_target).tolist() == [pytest.approx([1 / 12, 1 / 8]), pytest.approx([1 / 4, math.inf])]


def test_same_seeds_same_batch_and_k_from_step_generator():
    model = small()
    a, b = (model.prepare_batch(fake_batch(model, 8), *generators(5)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    generator = torch.Generator
    batches = [model.prepare_batch(fake_batch(model, 4), generator().manual_seed(0), generator().manual_seed(s))
               for s in range(30)]
    sizes = {batch['input_position_ids'].size(1) for batch in batches}
    assert sizes == {4, 8, 12}


# ---------------------------------------------------------------------------------------------------------------------
# The model

def test_first_loss_is_ln_v():
    model = small()
    _, logs = model(model.prepare_batch(fake_batch(model, 32), *generators(0)))
    for m in model.modalities:
        total, count = logs[f'loss_{m.name}']
        assert (total / count).item() == pytest.approx(math.log(m.vocab_size), abs=1e-5)


def test_head_is_a_distribution():
    """The probabilities of all V ids sum to 1, and sampling follows them."""
    head = lively(small()).heads['rgb']
    h = torch.randn(32)
    p = (-head(h.expand(48, -1), torch.arange(48))).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    ids, log_p = head.sample([h.expand(1, 50000, -1)], [1.0], 1.0, 0, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ids[0].bincount(minlength=48) / 50000, p, atol=0.01, rtol=0)
    torch.testing.assert_close(log_p[0].exp(), p[ids[0]], rtol=1e-3, atol=1e-5)


def test_a_split_batch_has_the_same_gradient():
    """The loss is a mean over samples: the mean of two halves' gradients is the whole's."""
    model = lively(small())
    drawn = model.prepare_batch(fake_batch(model, 8), *generators(2))
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        half = {name: drawn[name][part] for name in ('input_ids', 'input_position_ids', 'target_position_ids')}
        for m in model.modalities:
            token_idx, ids, weight = (drawn[f'{name}_{m.name}'] for name in ('token_idx', 'ids', 'weight'))
            own = (token_idx // 6 >= part.start) & (token_idx // 6 < part.stop) & (weight > 0)
            half |= {f'token_idx_{m.name}': token_idx[own] - 6 * part.start, f'ids_{m.name}': ids[own],
                     f'weight_{m.name}': 2 * weight[own]}
        halves.append(half)
    gradients = []
    for batches in ([drawn], halves):
        model.zero_grad()
        sum(model(batch)[0] / len(batches) for batch in batches).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_every_parameter_takes_part_in_every_step():
    """Also where a modality has no target in the batch, as on one rank of two, and where there is no input at all."""
    model = small(train_modalities='rgb caption', num_target_tokens='1', unconditional_prob=1.0, full_modality_prob=0.0)
    drawn = model.prepare_batch(fake_batch(model, 1), *generators(0))
    assert min((drawn[f'weight_{name}'] > 0).sum() for name in ('rgb', 'caption')) == 0
    loss, logs = model(drawn)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(logs) == {'loss_rgb', 'loss_caption', 'null_fraction', 'tokens'}


def test_null_tokens_are_few():
    model = FourM(Config(modalities='rgb:64:8x8 depth:64:8x8 normal:64:8x8 scene_desc:300:31 caption:300:26', n_embd=32,
                         n_head=2))
    batches = [model.prepare_batch(fake_batch(model, 64), *generators(i)) for i in range(20)]
    fractions = [(batch['input_position_ids'] == model.N).float().mean() for batch in batches]
    assert sum(fractions) / 20 < 0.2  # 0.05 of it is the empty condition


def test_overfits_one_batch():
    model = small(n_layer_encoder=2, n_layer_decoder=2, n_embd=64)
    drawn = model.prepare_batch(fake_batch(model, 4), *generators(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = model(drawn)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def slow_generate(model, given, m, steps, order, random, longest):
    """One sample, one position at a time; greedy; all tokens of a step have the same condition. `longest` is the
    largest number of known tokens in the batch, which determines the number of null tokens."""
    known = {}
    for other in model.modalities:
        if other.name in given:
            known |= {other.token_slice.start + i: int(t) for i, t in enumerate(given[other.name]) if t >= 0}
    before = len(known)
    positions = list(range(m.token_slice.start, m.token_slice.stop))
    query = torch.tensor([positions])

    def outputs():
        most = longest + len(known) - before
        K = min([k for k in model.input_sizes if k >= most], default=most)
        index = torch.tensor([sorted(known) + [model.N] * (K - len(known))])
        ids = torch.tensor([[known.get(i, 0) for i in index[0].tolist()]])
        h = model.decode(model.encode(ids, index), index, query)[0]
        result = []
        for vector in h:
            nll = model.heads[m.name](vector.expand(m.vocab_size, -1), torch.arange(m.vocab_size))
            greedy, state = 0, vector
            for d, level in enumerate(m.levels):
                digit = model.heads[m.name].logits(state, d).argmax()
                greedy, state = greedy * level + int(digit), model.heads[m.name].condition_on_digit(state, d, digit)
            result.append((greedy, nll[greedy].item()))
        return result
    if m.is_text:
        for i, position in enumerate(positions):
            if position not in known:
                known[position] = outputs()[i][0]
            if known[position] == m.vocab_size - 1:
                break
    else:
        unknown = [p for p in positions if p not in known]
        steps = min(steps, len(unknown))
        for step in range(steps):
            left = [p for p in positions if p not in known]
            found = dict(zip(positions, outputs()))
            now = math.ceil(len(unknown) * (step + 1) / steps) - (len(unknown) - len(left))
            key = {'raster': lambda p: p, 'confidence': lambda p: found[p][1],
                   'random': lambda p: random[p - positions[0]],
                   'halton': lambda p: halton_order(m.grid)[p - positions[0]]}[order]
            for position in sorted(left, key=key)[:now]:
                known[position] = found[position][0]
    return [known.get(p, -1) for p in positions]


@pytest.mark.parametrize('order', ['random', 'confidence', 'raster', 'halton'])
@pytest.mark.parametrize('steps', [1, 2, 4, 9, 100])
def test_generate_equals_the_slow_reference(order, steps):
    model = lively(small())
    batch = fake_batch(model, 3, seed=7)
    partial = batch['depth'].clone()
    partial[:, [1, 4]] = -1
    given = {'rgb': batch['rgb'], 'depth': partial} if order != 'raster' else {'caption': batch['caption']}
    longest = max((model.pack_modalities(given) >= 0).sum(1).tolist())
    for name in ('depth', 'caption') if order != 'raster' else ('rgb',):
        m = model.modality[name]
        found = model.generate(given, [name], steps=steps, temperature=0, order=order,
                               generator=torch.Generator().manual_seed(4))[name]
        random = torch.rand(3, m.max_tokens, generator=torch.Generator().manual_seed(4))
        slow = [slow_generate(model, {k: v[i] for k, v in given.items()}, m, steps, order, random[i], longest)
                for i in range(3)]
        assert found.tolist() == slow


def test_generate_from_nothing_and_chains():
    model = lively(small())
    nothing = {'rgb': torch.full((2, 6), -1)}
    out = model.generate(nothing, ['rgb', 'caption', 'depth'], generator=torch.Generator().manual_seed(0))
    assert (out['rgb'] >= 0).all() and (out['rgb'] < 48).all() and (out['depth'] < 7).all()
    for row in out['caption'].tolist():
        if 11 in row:
            assert all(i == -1 for i in row[row.index(11) + 1:])  # nothing after the end token
    first = model.generate({'rgb': out['rgb']}, ['caption'], temperature=0)
    both = model.generate({'rgb': out['rgb']}, ['caption', 'depth'], steps=3, temperature=0,
                          generator=torch.Generator().manual_seed(1))
    second = model.generate({'rgb': out['rgb'], 'caption': first['caption']}, ['depth'], steps=3, temperature=0,
                            generator=torch.Generator().manual_seed(1))
    assert torch.equal(both['depth'], second['depth'])


def test_log_prob_is_the_loss():
    model = lively(small())
    batch = fake_batch(model, 3)
    decoder_out = retrieval.decode_modality(model, {'rgb': batch['rgb']}, 'caption')
    m = model.modalities[2]
    context, positions = model.encode_known(model.pack_modalities({'rgb': batch['rgb']}))
    h = model.decode(context, positions, torch.arange(m.token_slice.start, m.token_slice.stop).expand(3, -1))
    for i in range(3):
        found = retrieval.log_prob(model, decoder_out[i].expand(3, -1, -1), 'caption', batch['caption'])
        for j in range(3):
            there = batch['caption'][j] >= 0
            nll = model.heads['caption'](h[i][there], batch['caption'][j][there]).sum()
            assert found[j].item() == pytest.approx(-nll.item(), rel=1e-4)


def test_an_embedding_sees_all_that_is_known_and_nothing_else():
    model = lively(small())
    batch = fake_batch(model, 3)
    both = retrieval.pooled_embedding(model, {name: batch[name] for name in ('rgb', 'caption')})
    one = retrieval.pooled_embedding(model, {'rgb': batch['rgb']})
    assert both.shape == one.shape == (3, 32) and (both - one).abs().min(1).values.max() > 0
    alone = torch.cat([retrieval.pooled_embedding(model, {'rgb': row}) for row in batch['rgb'].split(1)])
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def logits_of(model, given, name):
    """Of the first digit, at all positions of a modality that is to be generated from what is given."""
    return model.heads[name].logits(retrieval.decode_modality(model, given, name), 0)


def drawn_logits(model, given, name, monkeypatch, **how):
    """The logits that generate draws its first tokens from."""
    seen, plain = [], maskgit.sample_token
    with monkeypatch.context() as patch:
        patch.setattr(maskgit, 'sample_token',
                      lambda logits, *rest, **more: seen.append(logits) or plain(logits, *rest, **more))
        model.generate(given, [name], steps=1, temperature=0, **how)
    return seen[0]


def test_guidance_and_weights_are_their_formula(monkeypatch):
    """Written out: l + (s - 1) (l - l of nothing) + sum over conditions of (w - 1) (l - l without it)."""
    model = lively(small())
    given = {name: fake_batch(model, 2)[name] for name in ('rgb', 'caption')}
    nothing = {'rgb': torch.full((2, 6), -1)}
    full, none = logits_of(model, given, 'depth'), logits_of(model, nothing, 'depth')
    only = {name: logits_of(model, {name: given[name]}, 'depth') for name in given}
    for how, expected in ((dict(), full),
                          (dict(guidance=3.0), none + 3 * (full - none)),
                          (dict(condition_weights={'caption': -1.0}), full - 2 * (full - only['rgb'])),
                          (dict(condition_weights={'caption': 0.0}), only['rgb']),
                          (dict(guidance=2.0, condition_weights={'rgb': 2.5, 'caption': 1.0}),
                           full + (full - none) + 1.5 * (full - only['caption'])),
                          (dict(guidance=0.0, guidance_end=3.0), none)):
        found = drawn_logits(model, given, 'depth', monkeypatch, **how)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one = {'rgb': given['rgb']}  # of a single condition, its weight is the guidance
    torch.testing.assert_close(drawn_logits(model, one, 'depth', monkeypatch, condition_weights={'rgb': 4.0}),
                               drawn_logits(model, one, 'depth', monkeypatch, guidance=4.0), rtol=1e-4, atol=1e-4)


def test_a_temperature_that_falls():
    """High at first, 0 at the end: the last step takes the most probable token."""
    model = lively(small())
    given = {'caption': fake_batch(model, 40)['caption']}
    draw = [model.generate(given, ['rgb'], steps=6, temperature=1e3, temperature_end=0.0, order='raster',
                           generator=torch.Generator().manual_seed(seed))['rgb'] for seed in (1, 2)]
    assert (draw[0][:, 0] != draw[1][:, 0]).float().mean() > 0.5
    known = given | {'rgb': draw[0].index_fill(1, torch.tensor([5]), -1)}
    again = model.generate(known, ['rgb'], steps=1, temperature=0)['rgb']
    assert torch.equal(draw[0], again)


@pytest.mark.parametrize('spec, use, message', [
    ('rgb:16', '', 'write name:levels:grid'), ('rgb:x:8x8', '', 'write name:levels:grid'),
    (SPEC, 'rgb sound', "no modality 'sound'; there are rgb, depth, caption")])
def test_bad_modalities(spec, use, message):
    with pytest.raises(ValueError, match=message):
        FourM(Config(modalities=spec, train_modalities=use))


def test_train_modalities_choose_a_subset():
    model = small(train_modalities='caption rgb')
    assert [m.name for m in model.modalities] == ['rgb', 'caption'] and Modality('a:3:5', 0).max_tokens == 5


@pytest.mark.parametrize('arguments', [
    dict(guidance=math.inf), dict(guidance_end=1e50), dict(guidance=math.nan), dict(condition_weights=dict(caption=math.inf))])
def test_guidance_and_weights_have_limits(arguments):
    """Otherwise logits are nan, and each token is silently 0."""
    with pytest.raises(ValueError, match='keep them from -1000 to 1000'):
        model = small()
        caption = torch.zeros(2, model.modality['caption'].max_tokens).long()
        model.generate(dict(caption=caption), ['rgb'], steps=2, **arguments)
