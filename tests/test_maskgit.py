"""MaskGIT: masks, schedules and orders for all sizes, the bound by enumeration, generation against a slow reference."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.maskgit import nll_upper_bound
from maskgit import (MASK_SCHEDULES, ORDERS, SCHEDULES, Config, MaskGIT, antithetic_masks, halton_order, id_to_digits,
                     importance_weight, iterative_decode, lerp, random_mask, unmask_schedule)


def small(**changes):
    torch.manual_seed(0)
    base = dict(vocab_size=12, levels='4*3', grid='2x3', n_classes=3, n_layer=1, n_head=2, n_embd=32)
    return MaskGIT(Config(**(base | changes)))


def lively(model):
    """Random weights instead of zeros, so that every part matters."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if 'embedding' not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def fake_batch(model, B, seed=0):
    tokens = torch.randint(model.config.vocab_size, (B, model.N + 1), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] %= max(1, model.config.n_classes)
    return {'tokens': tokens}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def all_masked(model, B):
    return torch.full((B, model.N), -1), torch.arange(B) % 3


# ---------------------------------------------------------------------------------------------------------------------
# Masking

@settings(max_examples=200, deadline=None)
@given(B=st.integers(1, 9), N=st.integers(1, 30), mask_schedule=st.sampled_from(list(MASK_SCHEDULES)),
       full=st.booleans(), seed=st.integers(0, 10 ** 6))
def test_masks(B, N, mask_schedule, full, seed):
    valid = torch.rand(B, N, generator=generator(seed)) < 0.7
    valid[:, 0] = True
    valid |= full
    mask = antithetic_masks(valid, mask_schedule, generator(seed))
    assert not (mask & ~valid).any() and (mask.sum(1) >= 1).all()
    first, second = mask[:B - B % 2:2], mask[1::2]
    if full:  # a pair masks every position
        assert (first | second).all()
        if mask_schedule == 'uniform':  # and one of them twice: a batch of pairs always has the same number of targets
            assert ((first & second).sum(1) == 1).all()


def test_random_mask_as_in_its_example():
    noise, valid = torch.tensor([[0.2, 0.9, 0.1, 0.3, 0.0]]), torch.tensor([[True, True, True, True, False]])
    assert random_mask(valid, torch.tensor([[0.4]]), noise, 'uniform').tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize('mask_schedule', MASK_SCHEDULES)
def test_mask_schedules(mask_schedule):
    """Mean mask ratios; gamma and its inverse; importance weights that make the mean that of the uniform schedule."""
    N, B = 20, 20000
    valid = torch.ones(B, N, dtype=torch.bool)
    u, noise = torch.rand(B, 1, generator=generator()), torch.rand(B, N, generator=generator(1))
    mask = random_mask(valid, u, noise, mask_schedule)
    k = mask.sum(1).float()
    assert k.mean().item() / N == pytest.approx({'uniform': 0.525}.get(mask_schedule, 2 / math.pi + 0.02), abs=0.012)
    gamma, inverse = MASK_SCHEDULES[mask_schedule]
    u = torch.linspace(0, 1, 50)
    torch.testing.assert_close(inverse(gamma(u)), u, atol=1e-3, rtol=0)
    weight = importance_weight(mask, valid, mask_schedule)
    assert weight.mean().item() == pytest.approx(1, abs=0.03)
    assert (weight * k).mean().item() == pytest.approx((N + 1) / 2, rel=0.02)
    every_size = torch.arange(N) <= torch.arange(N)[:, None]
    weight = importance_weight(every_size, torch.ones_like(every_size), mask_schedule)
    assert (1 / weight).sum().item() == pytest.approx(N, rel=1e-4)


def test_mask_ratios_are_stratified():
    mask = antithetic_masks(torch.ones(64, 49, dtype=torch.bool), 'uniform', generator())
    gaps = mask.sum(1).sort().values.float().diff()
    assert gaps.max() <= 3 and mask.sum() == 32 * 50


def test_prepared_batch():
    model = small()
    batch = fake_batch(model, 8)
    batch['tokens'][3, 4:] = -1  # padding
    prepared, again = (model.prepare_batch(batch, generator(5), generator(6)) for _ in range(2))
    assert all(torch.equal(prepared[name], again[name]) for name in prepared)
    tokens, token_idx = batch['tokens'][:, 1:], prepared['token_idx']
    assert torch.equal(prepared['ids'], tokens.flatten()[token_idx]) and (prepared['ids'] >= 0).all()
    assert (prepared['tokens'].flatten()[token_idx] == -1).all()
    unmasked = prepared['tokens'] >= 0
    assert torch.equal(prepared['tokens'][unmasked], tokens[unmasked]) and unmasked.sum() + len(token_idx) == 8 * 6 - 3
    assert torch.equal(prepared['classes'], batch['tokens'][:, 0])
    assert prepared['weight'].sum().item() == pytest.approx(1)
    assert torch.zeros(8).index_add(0, token_idx // 6, prepared['weight']).tolist() == pytest.approx([1 / 8] * 8)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def test_schedules_sum_for_all_sizes():
    for steps, schedule in itertools.product(range(1, 301), SCHEDULES):
        total = torch.arange(steps, 301)[:, None]
        n_unmasked = unmask_schedule(total, steps, schedule)
        assert n_unmasked.shape == (len(total), steps) and torch.equal(n_unmasked[:, -1:], total), (steps, schedule)
        assert (n_unmasked.diff(dim=1, prepend=torch.zeros_like(total)) >= 1).all(), (steps, schedule)
    fewer = unmask_schedule(torch.tensor([[2], [0]]), 5, 'cosine')  # samples with fewer tokens than steps
    assert fewer.tolist() == [[1, 2, 2, 2, 2], [0] * 5]
    n_unmasked = {name: unmask_schedule(torch.tensor([[49]]), 8, name)[0] for name in SCHEDULES}
    assert n_unmasked['cosine'].tolist() == [1, 4, 9, 15, 22, 31, 40, 49]  # the docstring's example
    counts = {name: n.diff(prepend=torch.tensor([0])).tolist() for name, n in n_unmasked.items()}
    assert counts == dict(cosine=[1, 3, 5, 6, 7, 9, 9, 9], linear=[7, 6, 6, 6, 6, 6, 6, 6],
                          constant=[7, 7, 7, 7, 7, 7, 6, 1])


def slow_halton(grid):
    """Ranks by the definition: the radical inverse of 1, 2, 3, ... in bases 2 and 3, in floating point."""
    order, number = [], 0
    while len(order) < math.prod(grid):
        number, cell = number + 1, 0
        for base, size in zip((2, 3), grid):
            point, rest, scale = 0.0, number, 1.0
            while rest:
                scale /= base
                point, rest = point + rest % base * scale, rest // base
            cell = cell * size + int(point * size)
        if cell not in order:
            order.append(cell)
    return [order.index(cell) for cell in range(len(order))]


@pytest.mark.parametrize('grid', [[1], [2], [50], [256], [1, 1], [7, 7], [8, 8], [16, 16], [3, 11]])
def test_halton(grid):
    rank, N = halton_order(grid), math.prod(grid)
    assert rank.sort().values.tolist() == list(range(N)) and rank.tolist() == slow_halton(grid)
    if N > 40:  # consecutive positions are far apart
        flat = rank.argsort()
        position = torch.stack((flat // grid[-1], flat % grid[-1]), 1).double()
        assert (position.diff(dim=0).norm(dim=1)).mean() > 0.3 * max(grid)
        to_first = torch.cdist(position, position[:N // 4]).min(1).values
        assert to_first.max() <= 0.35 * max(grid)  # the first quarter covers the grid


def test_lerp():
    assert [lerp(2.0, 1.0, progress) for progress in (0, 0.25, 1)] == [2.0, 1.75, 1.0]
    assert [lerp(2.0, None, progress) for progress in (0, 1)] == [2.0, 2.0]


@settings(max_examples=100, deadline=None)
@given(order=st.sampled_from(ORDERS), schedule=st.sampled_from(SCHEDULES), size=st.integers(1, 40),
       steps=st.integers(1, 40), known_fraction=st.floats(0, 1), seed=st.integers(0, 10 ** 6),
       noise=st.sampled_from([0.0, 3.0]))
def test_every_order_unmasks_every_position_once(order, schedule, size, steps, known_fraction, seed, noise):
    B, known = 4, torch.rand(4, size, generator=generator(seed)) < known_fraction
    known[0, 0] = False
    tokens = torch.where(known, 7, -1)
    max_unknown, calls = int((~known).sum(1).max()), []
    steps = min(steps, max_unknown)

    def predict(tokens, progress):  # a token is the number of the step in which it is sampled
        calls.append(progress)
        return torch.full((B, size), 100 + len(calls) - 1), -torch.rand(B, size, generator=generator(seed + len(calls)))
    states = list(iterative_decode(tokens, predict, [size], steps, order, schedule, noise, generator(seed)))
    assert len(states) == steps == len(calls) and calls == [i / max(1, steps - 1) for i in range(steps)]
    before = tokens
    for i, state in enumerate(states):
        new = state != before
        assert (before[new] == -1).all() and (state[new] == 100 + i).all()
        assert new[~known.all(1) & ((~known).sum(1) >= steps)].any(1).all()  # no empty step
        before = state
    assert (before >= 0).all() and (before[known] == 7).all()
    if order == 'raster':
        assert all((row[row >= 100].diff() >= 0).all() for row in before)


def test_confidence_keeps_the_most_probable():
    log_p = -torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    empty, predict = torch.full((1, 4), -1), lambda *_: (torch.arange(4)[None], log_p)
    states = iterative_decode(empty, predict, [4], 4, 'confidence', 'linear')
    assert [(state[0] >= 0).tolist() for state in states] == [[False, True, False, False], [False, True, True, False],
                                                              [True, True, True, False], [True] * 4]


@pytest.mark.parametrize('exponential', [torch.Tensor.exponential_, lambda self, **_: self.zero_()])  # 0: on some devices
def test_confidence_unmasks_tokens_of_probability_zero(monkeypatch, exponential):
    """They come before given tokens, which are never replaced."""
    monkeypatch.setattr(torch.Tensor, 'exponential_', exponential)
    start = torch.tensor([[7, -1, 7, -1, -1]])
    log_p = torch.tensor([[0.0, -torch.inf, 0.0, -1.0, -torch.inf]])
    for noise in (0.0, 2.0):
        states = iterative_decode(start, lambda *_: (torch.arange(5)[None], log_p), [5], 3, 'confidence', 'linear',
                                  noise, generator())
        assert list(states)[-1].tolist() == [[7, 1, 7, 3, 4]]


def slow_generate(model, tokens, label, steps, schedule, order, ranks):
    """One sample, one position at a time; greedy."""
    n_unknown = sum(token < 0 for token in tokens)
    n_unmasked = unmask_schedule(torch.tensor([[n_unknown]]), steps, schedule)[0].tolist()
    for step in range(steps):
        h = model.backbone(torch.tensor([tokens]), torch.tensor([label]))[0]
        unknown, predicted = [i for i in range(len(tokens)) if tokens[i] < 0], {}
        for i in unknown:
            id, state = 0, h[i]
            for d, level in enumerate(model.levels):
                digit = model.head.logits(state, d).argmax()
                id, state = id * level + int(digit), model.head.condition_on_digit(state, d, digit)
            predicted[i] = id, model.head(h[i:i + 1], torch.tensor([id])).item()
        key = {'confidence': lambda i: predicted[i][1], 'raster': lambda i: i}.get(order, lambda i: ranks[i])
        for i in sorted(unknown, key=key)[:n_unmasked[step] - (n_unknown - len(unknown))]:
            tokens = tokens[:i] + [predicted[i][0]] + tokens[i + 1:]
    return tokens


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('steps, schedule', [(1, 'cosine'), (2, 'constant'), (3, 'cosine'), (4, 'linear')])
def test_generate_equals_the_slow_reference(order, steps, schedule):
    model = lively(small())
    tokens = fake_batch(model, 3)['tokens'][:, 1:]
    tokens[0, 1:], tokens[1] = -1, -1
    tokens[2, :4] = -1
    classes, random = torch.tensor([2, 0, 1]), torch.rand(3, 6, generator=generator(4))
    found = model.generate(tokens, classes, steps, temperature=0, order=order, schedule=schedule,
                           generator=generator(4))
    ranks = random.tolist() if order == 'random' else [halton_order(model.grid).tolist()] * 3
    assert found.tolist() == [slow_generate(model, row.tolist(), int(c), steps, schedule, order, r)
                              for row, c, r in zip(tokens, classes, ranks)]


def test_guidance_of_one_is_none():
    """Without the second pass, and by the formula itself."""
    model, unguided = lively(small()), lively(small(label_dropout=0.0))
    one, none, strong = (m.generate(*all_masked(model, 20), steps=3, guidance=s, generator=generator())
                         for m, s in ((model, 1.0), (unguided, 1.0), (model, 5.0)))
    assert torch.equal(one, none) and not torch.equal(one, strong)
    cond, uncond = torch.randn(2, 20, 6, 32, generator=generator())
    ids = [model.head.sample([cond, uncond], [s, 1 - s], 1.0, 0, 1.0, generator())[0] for s in (1.0, 1.0 + 1e-6)]
    assert torch.equal(*ids)
    rising, flat = (model.generate(*all_masked(model, 20), steps=3, guidance=1.0, guidance_end=end,
                                   generator=generator(), return_intermediates=True) for end in (5.0, None))
    assert torch.equal(rising[1], flat[1]) and not torch.equal(rising[-1], flat[-1])


def test_temperatures():
    model = lively(small())
    cold = model.generate(*all_masked(model, 9), steps=3, temperature=0, order='halton')
    end = model.generate(*all_masked(model, 9), steps=6, temperature=2.0, temperature_end=0.0, order='raster',
                         generator=generator())
    start = end.clone().index_fill_(1, torch.tensor([5]), -1)
    last = model.generate(start, torch.arange(9) % 3, steps=1, temperature=0)
    assert torch.equal(end, last)  # the last step took the most probable ones
    top = model.generate(*all_masked(model, 9), steps=3, top_k=1, order='halton', generator=generator(8))
    assert torch.equal(cold, top)


def test_intermediates():
    model = lively(small())
    tokens, classes = all_masked(model, 4)
    states = model.generate(tokens, classes, steps=4, generator=generator(), return_intermediates=True)
    assert states.shape == (5, 4, 6) and torch.equal(states[0], tokens)
    assert torch.equal(states[-1], model.generate(tokens, classes, steps=4, generator=generator()))
    assert ((states >= 0).sum(-1).diff(dim=0) >= 1).all()


@pytest.mark.parametrize('changes, arguments, message', [
    ({}, dict(steps=7), 'steps=7: 6 tokens are unknown, and each step unmasks at least one'),
    ({}, dict(steps=0), 'steps=0: 6 tokens are unknown'),
    ({}, dict(tokens=torch.zeros(2, 6).long()), 'steps=2: 0 tokens are unknown'),
    ({}, dict(classes=torch.tensor([0, 3])), 'each sample needs a class from 0 to 2'),
    ({}, dict(classes=torch.tensor([0, -1])), 'each sample needs a class from 0 to 2'),
    ({}, dict(classes=None), 'each sample needs a class from 0 to 2'),
    (dict(label_dropout=0.0), dict(guidance=2.0), 'guidance needs a model trained with classes and label_dropout'),
    (dict(label_dropout=0.0), dict(guidance_end=2.0), 'needs a model trained with classes and label_dropout'),
    (dict(n_classes=0), dict(guidance=2.0), 'guidance needs a model trained with classes and label_dropout'),
    ({}, dict(order='spiral'), "order is one of .'confidence', 'random', 'raster', 'halton'"),
    ({}, dict(schedule='square'), "schedule one of .'cosine', 'linear', 'constant'"),
    ({}, dict(choice_temperature=-1), 'choice_temperature in 0..1000'), ({}, dict(choice_temperature=math.inf), 'in 0..1000'),
    ({}, dict(guidance=math.inf), 'keep them from -1000 to 1000'), ({}, dict(guidance_end=1e50), 'keep them from -1000 to 1000'),
    ({}, dict(guidance=math.nan), 'keep them from -1000 to 1000'),
])
def test_faulty_input(changes, arguments, message):
    model = small(**changes)
    tokens, classes = all_masked(model, 2)
    with pytest.raises(ValueError, match=message) as error:
        model.generate(**(dict(tokens=tokens, classes=classes, steps=2) | arguments))
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The model

def test_digits():
    levels = [4, 5, 3]
    digits = torch.stack(id_to_digits(torch.arange(60), levels), -1)
    assert torch.equal(digits @ torch.tensor([15, 3, 1]), torch.arange(60))
    assert (digits < torch.tensor(levels)).all() and len(digits.unique(dim=0)) == 60


@pytest.mark.parametrize('changes', [
    {}, dict(levels='', mask_schedule='cosine', elbo=True), dict(grid='', block_size=9, n_classes=0)])
def test_first_loss_is_ln_v_and_every_parameter_takes_part(changes):
    model = small(**changes)
    loss, logs = model(model.prepare_batch(fake_batch(model, 32), generator(), generator()))
    if not changes.get('elbo'):
        assert loss.item() == pytest.approx(math.log(12), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(logs) == {'loss', 'elbo', 'token_mean_loss', 'tokens'} and logs['tokens'].tolist() == [32 * model.N, 1]


def test_classes_are_dropped_in_training_alone():
    model = lively(small(label_dropout=1.0))
    prepared = model.prepare_batch(fake_batch(model, 8), generator(), generator())
    other = prepared | dict(classes=(prepared['classes'] + 1) % 3)
    assert model.train()(prepared)[0] == model(other)[0]
    assert model.eval()(prepared)[0] != model(other)[0]


def test_a_split_batch_has_the_same_gradient():
    """The loss is a mean over samples: the mean of two halves' gradients is the whole's."""
    model = lively(small())
    prepared, gradients = model.prepare_batch(fake_batch(model, 8), generator(), generator()), []
    halves = []
    for start in (0, 4):
        own = (prepared['token_idx'] // 6 >= start) & (prepared['token_idx'] // 6 < start + 4)
        halves.append({name: prepared[name][start:start + 4] for name in ('tokens', 'classes', 'drop_class')}
                      | dict(token_idx=prepared['token_idx'][own] - 6 * start, ids=prepared['ids'][own])
                      | {name: 2 * prepared[name][own] for name in ('weight', 'elbo_weight')})
    for batches in ([prepared], halves):
        model.zero_grad()
        sum(model(batch)[0] / len(batches) for batch in batches).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('mask_schedule', MASK_SCHEDULES)
def test_the_bound_is_the_mean_over_all_orders(mask_schedule):
    """Encoded one by one, in each of the 720 orders; the same as forward's `elbo` for every mask schedule."""
    model = lively(small(mask_schedule=mask_schedule))
    row = fake_batch(model, 1)['tokens']
    tokens, classes, total = row[:, 1:], row[:, 0], 0
    masks = torch.tensor([[bool(i >> j & 1) for j in range(6)] for i in range(64)])
    h = model.backbone(tokens.masked_fill(masks, -1), classes.expand(64))
    nll = torch.stack([model.head(h_i, tokens[0]) for h_i in h])  # (64, 6)
    for order in itertools.permutations(range(6)):
        masked = 63
        for position in order:
            total += nll[masked, position].item() / 720
            masked -= 1 << position
    bound = nll_upper_bound(model, tokens.expand(1000, -1), classes.expand(1000), 16, generator()).mean().item()
    assert bound == pytest.approx(total, rel=0.01)
    logs = model(model.prepare_batch({'tokens': row.expand(20000, -1)}, generator(), generator()))[1]
    assert 6 * (logs['elbo'][0] / logs['elbo'][1]).item() == pytest.approx(total, rel=0.02)


def test_overfits_one_batch():
    model = small(n_layer=2, n_embd=64)
    prepared = model.prepare_batch(fake_batch(model, 4), generator(1), generator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = model(prepared)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize('changes, message', [
    (dict(levels='4*4'), 'levels=4.4 must make config.vocab_size=12'),
    (dict(mask_schedule='square'), 'mask_schedule must be one of uniform, cosine, arccos')])
def test_bad_config(changes, message):
    with pytest.raises(AssertionError, match=message):
        small(**changes)
