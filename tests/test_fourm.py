"""nano4M: masking for hundreds of random configurations, the digits, the losses, and generation against a slow reference."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskgit
from fourm import Config, FourM, Modality, budget_keys, draw_masks, log_dirichlet, smallest
from maskgit import halton_rank

SPEC = 'rgb:4*4*3:2x3 depth:7:3x3 caption:12:8'


def small(**changes):
    torch.manual_seed(0)
    return FourM(Config(**(dict(modalities=SPEC, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, input_slots='4,8,12',
                                target_slots='6') | changes))).eval()


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
        batch[m.name] = torch.randint(m.vocabulary - m.is_text, (B, m.size), generator=generator)
        if m.is_text:  # some tokens, the end token, then nothing
            end = torch.randint(m.size, (B, 1), generator=generator)
            at = torch.arange(m.size)
            batch[m.name] = torch.where(at < end, batch[m.name], torch.where(at == end, m.vocabulary - 1, -1))
    return batch


def generators(seed):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Masking

@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5), K=st.integers(1, 40),
       M=st.integers(1, 40), whole=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
       empty=st.one_of(st.just(0.0), st.floats(0, 1)), alpha=st.sampled_from(['0.01', '0.3,5', '100']),
       seed=st.integers(0, 10 ** 6))
def test_masks(sizes, K, M, whole, empty, alpha, seed):
    generator, B, sections, start = torch.Generator().manual_seed(seed), 6, [], 0
    for size, _ in sizes:
        sections.append(slice(start, start + size))
        start += size
    N, is_text = start, torch.tensor([text for _, text in sizes])
    present = torch.ones(B, N, dtype=torch.bool)
    for section, (size, text) in zip(sections, sizes):
        if text:  # each text has at least its end token
            present[:, section] = torch.arange(size) <= torch.randint(size, (B, 1), generator=generator)
    config = Config(whole=whole * (1 - empty), empty=empty, alphas=alpha)
    inputs, targets = draw_masks(present, sections, is_text, K, M, config, generator)
    assert inputs.shape == (B, K) and targets.shape == (B, M)
    for row, seen, asked in zip(present, inputs.tolist(), targets.tolist()):
        seen, asked = [i for i in seen if i < N], [i for i in asked if i < N]
        assert len(set(seen)) == len(seen) and len(set(asked)) == len(asked) and not set(seen) & set(asked)
        assert all(row[i] for i in seen + asked)
        assert asked == sorted(asked)  # sorted by modality
        left = int(row.sum()) - len(seen)
        assert len(asked) == min(M, left) > 0  # exact: target slots are null only where nothing is left, and something is
    if empty == 1:
        assert (inputs == N).all()
    modality = torch.cat([torch.full((s.stop - s.start,), m) for m, s in enumerate(sections)])
    if empty == 0 and whole == 1:  # one modality as a whole, unless it does not fit, and at most one other
        for row, seen in zip(present, inputs):
            of = modality[seen[seen < N]]
            assert len(of.unique()) <= 2
            assert len(of) == min(K, row.sum() - 1) or any((of == m).sum() == row[s].sum() for m, s in enumerate(sections))
    if empty == 0 and whole == 0:
        assert ((inputs < N).sum(1) == (present.sum(1) - 1).clamp(max=K)).all()


def test_budgets_follow_the_shares():
    """With room enough each modality gets K times its share, to within rounding; what one cannot supply goes to the others."""
    generator = torch.Generator().manual_seed(0)
    sections, B, K = [slice(0, 100), slice(100, 200), slice(200, 300)], 500, 60
    log_share = log_dirichlet(torch.full((B,), 2.0), 3, generator)
    keys = budget_keys(torch.ones(B, 300, dtype=torch.bool), sections, log_share, torch.zeros(B, 3, dtype=torch.bool), generator)
    chosen = smallest(keys, K, K)
    count = torch.stack([((chosen >= s.start) & (chosen < s.stop)).sum(1) for s in sections], 1)
    assert (count.sum(1) == K).all() and ((count - K * log_share.exp()).abs() <= 1.5).all()
    available = torch.ones(B, 300, dtype=torch.bool)
    available[:, 5:100] = False  # the first modality is short
    count = (smallest(keys.masked_fill(~available, torch.inf), K, K) < 100).sum(1)
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
    keys = budget_keys(available, [slice(0, 10)], torch.zeros(50, 1), torch.ones(50, 1, dtype=torch.bool), generator)
    for row, there in zip(smallest(keys, 4, 4).tolist(), available.sum(1).tolist()):
        assert row == sorted(list(range(min(4, there))) + [10] * (4 - min(4, there)))


def test_drawn_rows_answer_their_modality():
    model = small()
    batch, N = fake_batch(model, 16), model.N
    ids = torch.cat([batch[m.name] for m in model.modalities], 1)
    drawn = model.draw(batch, *generators(0))
    inputs = drawn['input_index']
    assert torch.equal(drawn['input_ids'][inputs < N], ids.gather(1, inputs.clamp(max=N - 1))[inputs < N])
    flat, total = drawn['target_index'].flatten(), 0
    for m in model.modalities:
        weight, rows = drawn[f'weight_{m.name}'], drawn[f'rows_{m.name}']
        real = weight > 0
        places = flat[rows[real]]
        assert ((places >= m.places.start) & (places < m.places.stop)).all()
        assert torch.equal(drawn[f'ids_{m.name}'][real], ids[rows[real] // 6, places])
        total += weight.sum().item()
        assert len(rows) % (16 * 6 // 16) == 0
    assert total == pytest.approx(1, abs=1e-5)  # a mean over samples


def test_same_seeds_same_batch_and_k_from_shared():
    model = small()
    a, b = (model.draw(fake_batch(model, 8), *generators(5)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    sizes = {model.draw(fake_batch(model, 4), torch.Generator().manual_seed(0), torch.Generator().manual_seed(s))['input_index'].size(1)
             for s in range(30)}
    assert sizes == {4, 8, 12}


# ---------------------------------------------------------------------------------------------------------------------
# The model

def test_first_loss_is_ln_v():
    model = small()
    _, logs = model(model.draw(fake_batch(model, 32), *generators(0)))
    for m in model.modalities:
        total, count = logs[f'loss_{m.name}']
        assert (total / count).item() == pytest.approx(math.log(m.vocabulary), abs=1e-5)


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
    drawn = model.draw(fake_batch(model, 8), *generators(2))
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        half = {name: drawn[name][part] for name in ('input_ids', 'input_index', 'target_index')}
        for m in model.modalities:
            rows, ids, weight = (drawn[f'{name}_{m.name}'] for name in ('rows', 'ids', 'weight'))
            own = (rows // 6 >= part.start) & (rows // 6 < part.stop) & (weight > 0)
            half |= {f'rows_{m.name}': rows[own] - 6 * part.start, f'ids_{m.name}': ids[own], f'weight_{m.name}': 2 * weight[own]}
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
    model = small(use='rgb caption', target_slots='1', empty=1.0, whole=0.0)
    drawn = model.draw(fake_batch(model, 1), *generators(0))
    assert min((drawn[f'weight_{name}'] > 0).sum() for name in ('rgb', 'caption')) == 0
    loss, logs = model(drawn)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(logs) == {'loss_rgb', 'loss_caption', 'null_share', 'tokens'}


def test_null_tokens_are_few():
    model = FourM(Config(modalities='rgb:64:8x8 depth:64:8x8 normal:64:8x8 scene_desc:300:31 caption:300:26', n_embd=32, n_head=2))
    shares = [(model.draw(fake_batch(model, 64), *generators(i))['input_index'] == model.N).float().mean() for i in range(20)]
    assert sum(shares) / 20 < 0.2  # 0.05 of it is the empty condition


def test_overfits_one_batch():
    model = small(n_layer_encoder=2, n_layer_decoder=2, n_embd=64)
    drawn = model.draw(fake_batch(model, 4), *generators(1))
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
    """One sample, one place at a time; the tokens of a step are drawn from the same knowledge. Greedy. `longest` is the largest
    number of given tokens in the batch, which decides how many null tokens stand beside them."""
    known = {}
    for other in model.modalities:
        if other.name in given:
            known |= {other.places.start + i: int(t) for i, t in enumerate(given[other.name]) if t >= 0}
    before = len(known)
    places = list(range(m.places.start, m.places.stop))
    query = torch.tensor([places])

    def answers():
        most = longest + len(known) - before
        K = min([k for k in model.input_sizes if k >= most], default=most)
        index = torch.tensor([sorted(known) + [model.N] * (K - len(known))])
        ids = torch.tensor([[known.get(i, 0) for i in index[0].tolist()]])
        h = model.decode(model.encode(ids, index), index, query)[0]
        result = []
        for vector in h:
            nll = model.heads[m.name](vector.expand(m.vocabulary, -1), torch.arange(m.vocabulary))
            greedy, state = 0, vector
            for d, level in enumerate(m.levels):
                digit = model.heads[m.name].logits(state, d).argmax()
                greedy, state = greedy * level + int(digit), model.heads[m.name].tell(state, d, digit)
            result.append((greedy, nll[greedy].item()))
        return result
    if m.is_text:
        for i, place in enumerate(places):
            if place not in known:
                known[place] = answers()[i][0]
            if known[place] == m.vocabulary - 1:
                break
    else:
        unknown = [p for p in places if p not in known]
        steps = min(steps, len(unknown))
        for step in range(steps):
            left = [p for p in places if p not in known]
            found = dict(zip(places, answers()))
            now = math.ceil(len(unknown) * (step + 1) / steps) - (len(unknown) - len(left))
            key = {'raster': lambda p: p, 'confidence': lambda p: found[p][1], 'random': lambda p: random[p - places[0]],
                   'halton': lambda p: halton_rank(m.grid)[p - places[0]]}[order]
            for place in sorted(left, key=key)[:now]:
                known[place] = found[place][0]
    return [known.get(p, -1) for p in places]


@pytest.mark.parametrize('order', ['random', 'confidence', 'raster', 'halton'])
@pytest.mark.parametrize('steps', [1, 2, 4, 9, 100])
def test_generate_equals_the_slow_reference(order, steps):
    model = lively(small())
    batch = fake_batch(model, 3, seed=7)
    partial = batch['depth'].clone()
    partial[:, [1, 4]] = -1
    given = {'rgb': batch['rgb'], 'depth': partial} if order != 'raster' else {'caption': batch['caption']}
    longest = max((model.join(given) >= 0).sum(1).tolist())
    for name in ('depth', 'caption') if order != 'raster' else ('rgb',):
        m = model.modality[name]
        found = model.generate(given, [name], steps=steps, temperature=0, order=order,
                               generator=torch.Generator().manual_seed(4))[name]
        random = torch.rand(3, m.size, generator=torch.Generator().manual_seed(4))
        slow = [slow_generate(model, {k: v[i] for k, v in given.items()}, m, steps, order, random[i], longest) for i in range(3)]
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
    both = model.generate({'rgb': out['rgb']}, ['caption', 'depth'], steps=3, temperature=0, generator=torch.Generator().manual_seed(1))
    second = model.generate({'rgb': out['rgb'], 'caption': first['caption']}, ['depth'], steps=3, temperature=0,
                            generator=torch.Generator().manual_seed(1))
    assert torch.equal(both['depth'], second['depth'])


def test_log_prob_is_the_loss():
    model = lively(small())
    batch = fake_batch(model, 3)
    answers = model.ask({'rgb': batch['rgb']}, 'caption')
    m = model.modalities[2]
    context, places = model.look(model.join({'rgb': batch['rgb']}))
    h = model.decode(context, places, torch.arange(m.places.start, m.places.stop).expand(3, -1))
    for i in range(3):
        found = model.log_prob(answers[i].expand(3, -1, -1), 'caption', batch['caption'])
        for j in range(3):
            there = batch['caption'][j] >= 0
            nll = model.heads['caption'](h[i][there], batch['caption'][j][there]).sum()
            assert found[j].item() == pytest.approx(-nll.item(), rel=1e-4)


def test_an_embedding_sees_all_that_is_known_and_nothing_else():
    model = lively(small())
    batch = fake_batch(model, 3)
    both, one = model.embed({name: batch[name] for name in ('rgb', 'caption')}), model.embed({'rgb': batch['rgb']})
    assert both.shape == one.shape == (3, 32) and (both - one).abs().min(1).values.max() > 0
    alone = torch.cat([model.embed({'rgb': row}) for row in batch['rgb'].split(1)])
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def logits_of(model, given, name):
    """Of the first digit, at all places of a modality that is to be generated from what is given."""
    return model.heads[name].logits(model.ask(given, name), 0)


def drawn_logits(model, given, name, monkeypatch, **how):
    """The logits that generate draws its first tokens from."""
    seen, plain = [], maskgit.sample_token
    with monkeypatch.context() as patch:
        patch.setattr(maskgit, 'sample_token', lambda logits, *rest, **more: seen.append(logits) or plain(logits, *rest, **more))
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
                          (dict(weights={'caption': -1.0}), full - 2 * (full - only['rgb'])),
                          (dict(weights={'caption': 0.0}), only['rgb']),
                          (dict(guidance=2.0, weights={'rgb': 2.5, 'caption': 1.0}), full + (full - none) + 1.5 * (full - only['caption'])),
                          (dict(guidance=3.0, guidance_start=0.0), none)):
        torch.testing.assert_close(drawn_logits(model, given, 'depth', monkeypatch, **how), expected, rtol=1e-4, atol=1e-4)
    one = {'rgb': given['rgb']}  # of a single condition, its weight is the guidance
    torch.testing.assert_close(drawn_logits(model, one, 'depth', monkeypatch, weights={'rgb': 4.0}),
                               drawn_logits(model, one, 'depth', monkeypatch, guidance=4.0), rtol=1e-4, atol=1e-4)


def test_a_temperature_that_falls():
    """Hot at first, and at the end so cold that the last of the steps takes the likeliest token."""
    model = lively(small())
    given = {'caption': fake_batch(model, 40)['caption']}
    draw = [model.generate(given, ['rgb'], steps=6, temperature=1e3, temperature_end=0.0, order='raster',
                           generator=torch.Generator().manual_seed(seed))['rgb'] for seed in (1, 2)]
    assert (draw[0][:, 0] != draw[1][:, 0]).float().mean() > 0.5
    again = model.generate(given | {'rgb': draw[0].index_fill(1, torch.tensor([5]), -1)}, ['rgb'], steps=1, temperature=0)['rgb']
    assert torch.equal(draw[0], again)


@pytest.mark.parametrize('spec, use, message', [
    ('rgb:16', '', 'write name:vocabulary:size'), ('rgb:x:8x8', '', 'write name:vocabulary:size'),
    (SPEC, 'rgb sound', "no modality 'sound'; there are rgb, depth, caption")])
def test_bad_modalities(spec, use, message):
    with pytest.raises(ValueError, match=message):
        FourM(Config(modalities=spec, use=use))


def test_use_chooses_a_subset():
    model = small(use='caption rgb')
    assert [m.name for m in model.modalities] == ['rgb', 'caption'] and Modality('a:3:5', 0).size == 5
