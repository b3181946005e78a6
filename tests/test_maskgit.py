"""MaskGIT: masks, laws, orders and schedules for all sizes, the bound by enumeration, generation against a slow reference."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit import (LAWS, ORDERS, SCHEDULES, Config, MaskGIT, digits_of, filled_after, halton_rank, hide, hide_in_pairs,
                     law_weight, unmask)


def small(**changes):
    torch.manual_seed(0)
    base = dict(vocab_size=12, levels='4*3', grid='2x3', n_classes=3, n_layer=1, n_head=2, n_embd=32)
    return MaskGIT(Config(**(base | changes)))


def lively(model):
    """Weights that no longer start at zero, so that every part matters."""
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


def nothing(model, B):
    return torch.full((B, model.N), -1), torch.arange(B) % 3


# ---------------------------------------------------------------------------------------------------------------------
# Masking

@settings(max_examples=200, deadline=None)
@given(B=st.integers(1, 9), N=st.integers(1, 30), law=st.sampled_from(list(LAWS)), full=st.booleans(),
       seed=st.integers(0, 10 ** 6))
def test_masks(B, N, law, full, seed):
    present = torch.rand(B, N, generator=generator(seed)) < 0.7
    present[:, 0] = True
    present |= full
    mask = hide_in_pairs(present, law, generator(seed))
    assert not (mask & ~present).any() and (mask.sum(1) >= 1).all()
    first, second = mask[:B - B % 2:2], mask[1::2]
    if full:  # each place is asked for in each pair
        assert (first | second).all()
        if law == 'uniform':  # and only one of them twice: a batch of pairs has the same number of targets whatever was drawn
            assert ((first & second).sum(1) == 1).all()


@pytest.mark.parametrize('law', LAWS)
def test_laws(law):
    """Mean mask ratios; a function and its inverse; weights that turn the law's mean into the uniform one's."""
    N, B = 20, 20000
    present = torch.ones(B, N, dtype=torch.bool)
    mask = hide(present, torch.rand(B, 1, generator=generator()), torch.rand(B, N, generator=generator(1)), law)
    k = mask.sum(1).float()
    assert k.mean().item() / N == pytest.approx({'uniform': 0.525}.get(law, 2 / math.pi + 0.02), abs=0.012)
    to, back = LAWS[law]
    u = torch.linspace(0, 1, 50)
    torch.testing.assert_close(back(to(u)), u, atol=1e-3, rtol=0)
    weight = law_weight(mask, present, law)
    assert weight.mean().item() == pytest.approx(1, abs=0.03)
    assert (weight * k).mean().item() == pytest.approx((N + 1) / 2, rel=0.02)
    every = torch.arange(N) <= torch.arange(N)[:, None]  # one mask of each size
    assert (1 / law_weight(every, torch.ones_like(every), law)).sum().item() == pytest.approx(N, rel=1e-4)


def test_ratios_are_spread_over_a_batch():
    mask = hide_in_pairs(torch.ones(64, 49, dtype=torch.bool), 'uniform', generator())
    gaps = mask.sum(1).sort().values.float().diff()
    assert gaps.max() <= 3 and mask.sum() == 32 * 50


def test_drawn_rows():
    model = small()
    batch = fake_batch(model, 8)
    batch['tokens'][3, 4:] = -1  # the end of a text's validation set
    drawn, again = (model.draw(batch, generator(5), generator(6)) for _ in range(2))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    tokens, rows = batch['tokens'][:, 1:], drawn['rows']
    assert torch.equal(drawn['ids'], tokens.flatten()[rows]) and (drawn['ids'] >= 0).all()
    assert (drawn['tokens'].flatten()[rows] == -1).all()
    seen = drawn['tokens'] >= 0
    assert torch.equal(drawn['tokens'][seen], tokens[seen]) and seen.sum() + len(rows) == 8 * 6 - 3
    assert drawn['weight'].sum().item() == pytest.approx(1) and torch.equal(drawn['classes'], batch['tokens'][:, 0])
    assert torch.zeros(8).index_add(0, rows // 6, drawn['weight']).tolist() == pytest.approx([1 / 8] * 8)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def test_schedules_sum_for_all_sizes():
    for steps, schedule in itertools.product(range(1, 301), SCHEDULES):
        total = torch.arange(steps, 301)[:, None]
        filled = filled_after(total, steps, schedule)
        assert filled.shape == (len(total), steps) and torch.equal(filled[:, -1:], total), (steps, schedule)
        assert (filled.diff(dim=1, prepend=torch.zeros_like(total)) >= 1).all(), (steps, schedule)
    few = filled_after(torch.tensor([[2], [0]]), 5, 'cosine')  # samples with fewer tokens to fill than steps
    assert few.tolist() == [[1, 2, 2, 2, 2], [0] * 5]
    counts = {name: filled_after(torch.tensor([[49]]), 8, name)[0].diff(prepend=torch.tensor([0])).tolist() for name in SCHEDULES}
    assert counts == dict(cosine=[1, 3, 5, 6, 7, 9, 9, 9], linear=[7, 6, 6, 6, 6, 6, 6, 6], constant=[7, 7, 7, 7, 7, 7, 6, 1])


@pytest.mark.parametrize('grid', [[1], [2], [50], [256], [1, 1], [7, 7], [8, 8], [16, 16], [3, 11]])
def test_halton(grid):
    rank, N = halton_rank(grid), math.prod(grid)
    assert rank.sort().values.tolist() == list(range(N))
    if N > 40:  # places that follow each other lie far apart
        place = rank.argsort()
        at = torch.stack((place // grid[-1], place % grid[-1]), 1).double()
        assert (at.diff(dim=0).norm(dim=1)).mean() > 0.3 * max(grid)
        assert torch.cdist(at, at[:N // 4]).min(1).values.max() <= 0.35 * max(grid)  # and the first of them cover all


@settings(max_examples=100, deadline=None)
@given(order=st.sampled_from(ORDERS), schedule=st.sampled_from(SCHEDULES), size=st.integers(1, 40), steps=st.integers(1, 40),
       share=st.floats(0, 1), seed=st.integers(0, 10 ** 6), noise=st.sampled_from([0.0, 3.0]))
def test_every_order_fills_every_place_once(order, schedule, size, steps, share, seed, noise):
    B, known = 4, torch.rand(4, size, generator=generator(seed)) < share
    known[0, 0] = False
    tokens = torch.where(known, 7, -1)
    most, calls = int((~known).sum(1).max()), []
    steps = min(steps, most)

    def predict(tokens, progress):  # a token is the number of the step that it is drawn in
        calls.append(progress)
        return torch.full((B, size), 100 + len(calls) - 1), -torch.rand(B, size, generator=generator(seed + len(calls)))
    states = list(unmask(tokens, predict, [size], steps, order, schedule, noise, generator(seed)))
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


def test_confidence_keeps_the_likeliest():
    log_p = -torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    states = unmask(torch.full((1, 4), -1), lambda *_: (torch.arange(4)[None], log_p), [4], 4, 'confidence', 'linear')
    assert [(state[0] >= 0).tolist() for state in states] == [[False, True, False, False], [False, True, True, False],
                                                              [True, True, True, False], [True] * 4]


def slow_generate(model, tokens, label, steps, schedule, order, ranks):
    """One sample, one place at a time; greedy."""
    unknown = [i for i, token in enumerate(tokens) if token < 0]
    filled = filled_after(torch.tensor([[len(unknown)]]), steps, schedule)[0].tolist()
    for step in range(steps):
        h = model.trunk(torch.tensor([tokens]), torch.tensor([label]))[0]
        left, found = [i for i in range(len(tokens)) if tokens[i] < 0], {}
        for i in left:
            id, state = 0, h[i]
            for d, level in enumerate(model.levels):
                digit = model.head.logits(state, d).argmax()
                id, state = id * level + int(digit), model.head.tell(state, d, digit)
            found[i] = id, model.head(h[i:i + 1], torch.tensor([id])).item()
        key = {'confidence': lambda i: found[i][1], 'raster': lambda i: i}.get(order, lambda i: ranks[i])
        for i in sorted(left, key=key)[:filled[step] - (len(unknown) - len(left))]:
            tokens = tokens[:i] + [found[i][0]] + tokens[i + 1:]
    return tokens


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('steps, schedule', [(1, 'cosine'), (2, 'constant'), (3, 'cosine'), (4, 'linear')])
def test_generate_equals_the_slow_reference(order, steps, schedule):
    model = lively(small())
    tokens = fake_batch(model, 3)['tokens'][:, 1:]
    tokens[0, 1:], tokens[1] = -1, -1
    tokens[2, :4] = -1
    classes, random = torch.tensor([2, 0, 1]), torch.rand(3, 6, generator=generator(4))
    found = model.generate(tokens, classes, steps, temperature=0, order=order, schedule=schedule, generator=generator(4))
    ranks = random.tolist() if order == 'random' else [halton_rank(model.grid).tolist()] * 3
    assert found.tolist() == [slow_generate(model, row.tolist(), int(c), steps, schedule, order, r)
                              for row, c, r in zip(tokens, classes, ranks)]


def test_guidance_of_one_is_none():
    """By the short way, and by the formula itself."""
    model, without = lively(small()), lively(small(label_dropout=0.0))
    one, none, strong = (m.generate(*nothing(model, 20), steps=3, guidance=s, generator=generator())
                         for m, s in ((model, 1.0), (without, 1.0), (model, 5.0)))
    assert torch.equal(one, none) and not torch.equal(one, strong)
    h, other = torch.randn(2, 20, 6, 32, generator=generator())
    draws = [model.head.sample([h, other], [s, 1 - s], 1.0, 0, 1.0, generator())[0] for s in (1.0, 1.0 + 1e-6)]
    assert torch.equal(*draws)
    rising = model.generate(*nothing(model, 20), steps=3, guidance=5.0, guidance_start=1.0, generator=generator(), history=True)
    flat = model.generate(*nothing(model, 20), steps=3, generator=generator(), history=True)
    assert torch.equal(rising[1], flat[1]) and not torch.equal(rising[-1], flat[-1])


def test_temperatures():
    model = lively(small())
    cold = model.generate(*nothing(model, 9), steps=3, temperature=0, order='halton')
    end = model.generate(*nothing(model, 9), steps=6, temperature=2.0, temperature_end=0.0, order='raster', generator=generator())
    last = model.generate(end.clone().index_fill_(1, torch.tensor([5]), -1), torch.arange(9) % 3, steps=1, temperature=0)
    assert torch.equal(end, last)  # the last step took the likeliest
    assert torch.equal(cold, model.generate(*nothing(model, 9), steps=3, top_k=1, order='halton', generator=generator(8)))


def test_history():
    model = lively(small())
    tokens, classes = nothing(model, 4)
    states = model.generate(tokens, classes, steps=4, generator=generator(), history=True)
    assert states.shape == (5, 4, 6) and torch.equal(states[0], tokens)
    assert torch.equal(states[-1], model.generate(tokens, classes, steps=4, generator=generator()))
    assert ((states >= 0).sum(-1).diff(dim=0) >= 1).all()


@pytest.mark.parametrize('changes, arguments, message', [
    ({}, dict(steps=7), 'steps=7: there are 6 tokens to fill, and each step fills at least one'),
    ({}, dict(steps=0), 'steps=0: there are 6 tokens'),
    ({}, dict(tokens=torch.zeros(2, 6).long()), 'nothing to fill: all tokens are given'),
    ({}, dict(classes=torch.tensor([0, 3])), 'each sample needs a class from 0 to 2'),
    ({}, dict(classes=torch.tensor([0, -1])), 'each sample needs a class from 0 to 2'),
    ({}, dict(classes=None), 'each sample needs a class from 0 to 2'),
    ({}, dict(tokens=torch.full((1, 6), -1).expand(2 ** 24, 6), history=True), 'a history of 301,989,888 tokens would fill 2 GiB'),
    (dict(label_dropout=0.0), dict(guidance=2.0), 'guidance=2.0: this model has not learnt to draw without a class'),
    (dict(label_dropout=0.0), dict(guidance_start=2.0), 'this model has not learnt to draw without a class'),
    (dict(n_classes=0), dict(guidance=2.0), r'guidance=2.0: .* \(n_classes=0'),
    ({}, dict(order='spiral'), 'order is one of confidence, random, raster, halton'),
    ({}, dict(schedule='square'), 'schedule one of cosine, linear, constant'),
])
def test_faulty_input(changes, arguments, message):
    model = small(**changes)
    tokens, classes = nothing(model, 2)
    with pytest.raises(ValueError, match=message) as error:
        model.generate(**(dict(tokens=tokens, classes=classes, steps=2) | arguments))
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The model

def test_digits():
    levels = [4, 5, 3]
    digits = torch.stack(digits_of(torch.arange(60), levels), -1)
    assert torch.equal(digits @ torch.tensor([15, 3, 1]), torch.arange(60))
    assert (digits < torch.tensor(levels)).all() and len(digits.unique(dim=0)) == 60


@pytest.mark.parametrize('changes', [{}, dict(levels='', law='cosine', bound=True), dict(grid='', block_size=9, n_classes=0)])
def test_first_loss_is_ln_v_and_every_parameter_takes_part(changes):
    model = small(**changes)
    loss, logs = model(model.draw(fake_batch(model, 32), generator(), generator()))
    if not changes.get('bound'):
        assert loss.item() == pytest.approx(math.log(12), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(logs) == {'loss', 'bound', 'pooled', 'tokens'} and logs['tokens'].tolist() == [32 * model.N, 1]


def test_classes_are_dropped_in_training_alone():
    model = lively(small(label_dropout=1.0))
    drawn = model.draw(fake_batch(model, 8), generator(), generator())
    other = drawn | dict(classes=(drawn['classes'] + 1) % 3)
    assert model.train()(drawn)[0] == model(other)[0]
    assert model.eval()(drawn)[0] != model(other)[0]


def test_a_split_batch_has_the_same_gradient():
    """The loss is a mean over samples: the mean of two halves' gradients is the whole's."""
    model = lively(small())
    drawn, gradients = model.draw(fake_batch(model, 8), generator(), generator()), []
    halves = []
    for start in (0, 4):
        own = (drawn['rows'] // 6 >= start) & (drawn['rows'] // 6 < start + 4)
        halves.append({name: drawn[name][start:start + 4] for name in ('tokens', 'classes', 'drop')}
                      | dict(rows=drawn['rows'][own] - 6 * start, ids=drawn['ids'][own])
                      | {name: 2 * drawn[name][own] for name in ('weight', 'bound_weight')})
    for batches in ([drawn], halves):
        model.zero_grad()
        sum(model(batch)[0] / len(batches) for batch in batches).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('law', LAWS)
def test_the_bound_is_the_mean_over_all_orders(law):
    """Told one by one, in each of the 720 orders; the same as forward's `bound`, whatever the law of its masks."""
    model = lively(small(law=law))
    row = fake_batch(model, 1)['tokens']
    tokens, classes, total = row[:, 1:], row[:, 0], 0
    masks = torch.tensor([[bool(i >> j & 1) for j in range(6)] for i in range(64)])
    nll = torch.stack([model.head(h, tokens[0]) for h in model.trunk(tokens.masked_fill(masks, -1), classes.expand(64))])  # (64, 6)
    for order in itertools.permutations(range(6)):
        hidden = 63
        for place in order:
            total += nll[hidden, place].item() / 720
            hidden -= 1 << place
    found = model.log_prob_bound(tokens.expand(1000, -1), classes.expand(1000), 16, generator()).mean().item()
    assert found == pytest.approx(total, rel=0.01)
    logs = model(model.draw({'tokens': row.expand(20000, -1)}, generator(), generator()))[1]
    assert 6 * (logs['bound'][0] / logs['bound'][1]).item() == pytest.approx(total, rel=0.02)


def test_overfits_one_batch():
    model = small(n_layer=2, n_embd=64)
    drawn = model.draw(fake_batch(model, 4), generator(1), generator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = model(drawn)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize('changes, message', [(dict(levels='4*4'), "levels='4.4' do not make vocab_size=12"),
                                              (dict(law='square'), "law='square' must be one of uniform, cosine, arccos")])
def test_bad_config(changes, message):
    with pytest.raises(AssertionError, match=message):
        small(**changes)
