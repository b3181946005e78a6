"""
Chapter 2's exercises: each check's docstring is what a student reads, its asserts are what a failed answer is told.

The references are slow and obvious: one sample, one token at a time.
"""
import math

import torch

from tests.exercises import equal, generator, lively


def hide(maskgit):
    """The mask: which tokens of each sample are hidden (MaskGIT, 2202.04200, section 3.1). (B, N) booleans, True = hidden. The
    mask ratio is LAWS[law][0](u), u (B, 1) from 0 to 1. That share of the tokens that are present, rounded up, at least one,
    is hidden: those whose noise (B, N) is smallest. What is not present is never hidden, and does not count."""
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.5, 0.7, 0.2]] * 2)
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
    for law, ratio in dict(uniform=lambda u: 1 - u, cosine=lambda u: math.cos(math.pi / 2 * u)).items():
        for u in (0.0, 0.3, 0.6, 1.0):
            mask = maskgit.hide(present, torch.full((2, 1), u), noise, law)
            assert mask.shape == (2, 6) and mask.dtype == torch.bool, (
                f'the mask is {mask.dtype} {tuple(mask.shape)}, should be bool (2, 6)')
            assert not (mask & ~present).any(), 'tokens that are not present are hidden: there is nothing to predict'
            for row in range(2):
                there = [i for i in range(6) if present[row, i]]
                count = max(1, math.ceil(ratio(u) * len(there) - 1e-6))
                got = [i for i in range(6) if mask[row, i]]
                assert len(got) == count, (
                    f'law {law}, u = {u}: {len(got)} of {len(there)} tokens are hidden; {count} should be hidden')
                expected = sorted(sorted(there, key=lambda i: noise[row, i])[:count])
                assert got == expected, f'tokens {got} are hidden, should be those of the smallest noise, {expected}'


def small(maskgit, **changes):
    config = dict(vocab_size=12, levels='3*4', grid='2x3', n_classes=5, n_layer=1, n_head=2, n_embd=16, label_dropout=0.5)
    return lively(maskgit.MaskGIT(maskgit.Config(**(config | changes))))


def MaskGIT_draw(maskgit):
    """The masked loss, first half: what a training step is to predict. Of each row the last N tokens are the sample. Hide
    some of those that are present (>= 0), by `hide_in_pairs` with config.law. Returns a dictionary of
    tokens        (B, N), -1 where hidden;
    rows, ids     (R,) the hidden places of the whole batch, as numbers among its B * N, from first to last; what was
                  there;
    weight        (R,) such that the sum of weight * loss is the mean over a sample's hidden tokens, then over the
                  samples;
    bound_weight  (R,) the same times the sample's `law_weight`; with config.bound it is the weight too;
    classes       (B,) the first of each row, and drop (B,), True for a share config.label_dropout of them, drawn from
                  the generator after the mask; both only where config.n_classes is not 0."""
    for bound in (False, True):
        model = small(maskgit, law='cosine', bound=bound)
        batch = torch.cat((torch.randint(5, (40, 1)), torch.randint(12, (40, 6))), 1)
        batch[0, 5:] = -1
        drawn = model.draw(dict(tokens=batch.clone()), generator(), None)
        missing = {'tokens', 'rows', 'ids', 'weight', 'bound_weight', 'classes', 'drop'} - set(drawn)
        assert not missing, f'the drawn batch lacks {", ".join(sorted(missing))}'
        tokens, truth, rows = drawn['tokens'], batch[:, 1:], drawn['rows']
        assert tokens.shape == (40, 6), f'tokens (40, 6) should be the last 6 of each row, but they are {tuple(tokens.shape)}'
        assert (tokens[tokens >= 0] == truth[tokens >= 0]).all(), (
            'tokens that are not hidden have changed (the last 6 of a row are the sample)')
        hidden = (tokens < 0) & (truth >= 0)
        expected = maskgit.hide_in_pairs(truth >= 0, 'cosine', generator())
        assert torch.equal(hidden, expected), (
            'the hidden tokens, -1, are not those of the mask of hide_in_pairs with this generator')
        equal(rows, hidden.flatten().nonzero()[:, 0], 'rows')
        equal(drawn['ids'], truth.flatten()[rows], 'ids')
        each = torch.stack([1 / hidden[row // 6].sum() / 40 for row in rows.tolist()])
        law = maskgit.law_weight(hidden, truth >= 0, 'cosine')[rows // 6]
        equal(drawn['weight'], each * law if bound else each, f'weight (config.bound={bound})')
        equal(drawn['bound_weight'], each * law, 'bound_weight')
        equal(drawn['classes'], batch[:, 0], 'classes, the first token of each row,')
    for share in (0.0, 0.2):
        drop = small(maskgit, label_dropout=share).draw(dict(tokens=batch.repeat(50, 1)), generator(), None)['drop']
        got = drop.double().mean().item()
        assert abs(got - share) < share / 4 + 1e-9, f'with label_dropout={share}, drop is True for {got:.0%} of the samples'
    assert 'drop' not in small(maskgit, n_classes=0).draw(dict(tokens=batch), generator(), None), (
        'without classes nothing is to drop')


def MaskGIT_forward(maskgit):
    """The masked loss, second half: -ln p of what was hidden, and of nothing else. What the trunk makes of tokens and
    classes, at the hidden places `rows` alone, goes to self.head(h, ids), which gives -ln p of each: the loss is their
    sum, weighted by batch['weight']. In training (self.training), and only then, the samples of batch['drop'] have the
    class n_classes, "none".
    Logs, detached: 'loss', B times the loss, and B; 'bound', the same weighted by bound_weight; 'pooled', the plain sum
    of all -ln p and their number; 'tokens', how many tokens there are, seen and hidden, and 1."""
    model = small(maskgit)
    tokens = torch.tensor([[-1, -1, -1, -1, -1, 3], [1, -1, 2, 3, 4, 5], [7, 8, -1, -1, 9, 10]])
    rows = (tokens < 0).flatten().nonzero()[:, 0]
    ids, classes, drop = torch.randint(12, (8,)), torch.tensor([0, 1, 2]), torch.tensor([True, False, True])
    weight = torch.tensor([1 / 5 / 3] * 5 + [1 / 3] + [1 / 2 / 3] * 2)
    batch = dict(tokens=tokens, rows=rows, ids=ids, weight=weight, bound_weight=3 * weight, classes=classes, drop=drop)

    def by_hand(classes):
        h = model.trunk(tokens, classes)
        return torch.cat([model.head(h[row // 6, row % 6][None], ids[i:i + 1]) for i, row in enumerate(rows.tolist())])
    nll = by_hand(classes)
    loss, logs = model(dict(batch))
    expected = torch.stack((nll[:5].mean(), nll[5:6].mean(), nll[6:].mean())).mean()
    assert not torch.isclose(loss, nll.mean()), (
        "the loss is the mean over all hidden tokens together; take it over a sample's first, then over samples (the weights do)")
    equal(loss, expected,
          'the loss, not in training: the mean over the hidden tokens of each sample, then over 3 samples; of 5, 1, 2 tokens')
    equal(logs['loss'], torch.stack((3 * expected, torch.tensor(3.0))), "logs['loss']")
    equal(logs['bound'], torch.stack((9 * expected, torch.tensor(3.0))), "logs['bound']")
    equal(logs['pooled'], torch.stack((nll.sum(), torch.tensor(8.0))), "logs['pooled']")
    equal(logs['tokens'], torch.tensor([18.0, 1.0]), "logs['tokens']")
    assert not any(value.requires_grad for value in logs.values()), 'logs should be detached: they keep the graph alive'
    loss.backward()
    assert model.mask_embedding.grad.abs().sum() > 0, 'no gradient reaches the mask embedding'
    model.train()
    equal(model(dict(batch))[0], (by_hand(torch.tensor([5, 1, 5])) * weight).sum(),
          'the loss, in training, where two samples hide their class,')


def filled_after(maskgit):
    """The schedule: how many tokens are filled after each step (MaskGIT, section 3.3). Of a sample's `total` (B, 1), after step
    s = 1 .. S, whole numbers (B, S). Rounded up, where 10 (1 - cos(pi / 2)) is 10 whatever floating-point numbers say:
    cosine    total (1 - cos(pi / 2 * s / S));
    linear    total s / S;
    constant  s times (total / S, rounded up).
    But each step fills at least one token while any are left, and leaves at least one for each later step; after the
    last all are filled. A sample of fewer tokens than steps is finished after as many."""
    def by_hand(total, steps, schedule):
        filled = []
        for s in range(1, steps + 1):
            wish = dict(cosine=total * (1 - math.cos(math.pi / 2 * s / steps)) - 1e-9, linear=total * s / steps - 1e-9,
                        constant=-(-total // steps) * s)[schedule]
            filled.append(min(max(min(math.ceil(wish), total - steps + s), s), total))
        return filled
    for schedule in ('cosine', 'linear', 'constant'):
        for total, steps in ((10, 4), (49, 8), (10, 10), (13, 5), (7, 1), (64, 16)):
            got = maskgit.filled_after(torch.tensor([[total], [2]]), steps, schedule)
            assert got.shape == (2, steps), (
                f'for 2 samples and {steps} steps the shape is {tuple(got.shape)}, should be {(2, steps)}')
            assert not got.is_floating_point(), f'the numbers are {got.dtype}, should be whole'
            expected = by_hand(total, steps, schedule)
            assert got[0].tolist() == expected, (
                f'{schedule}, {total} tokens in {steps} steps: {got[0].tolist()} are filled after each, should be {expected}')
            expected = by_hand(2, steps, schedule)
            assert got[1].tolist() == expected, (
                f'{schedule}, {steps} steps, but only 2 tokens: {got[1].tolist()}, should be {expected}')


def unmask(maskgit):
    """Decoding: one loop for every order. A generator function that yields the tokens (B, N) after each step.
    1. predict(tokens, progress) draws a token for every place and gives its ln p, both (B, N); progress goes evenly from
       0 to 1.
    2. `filled_after` says how many of a sample's unknown tokens, -1, are to be filled by then.
    3. Fill so many, those whose turn comes first: the greatest ln p (confidence), one random draw at the beginning
       (random), `halton_rank` (halton), or from the left (raster). Known tokens never change.
    4. choice_temperature, with confidence: ln p plus Gumbel noise, -log of exponential draws, times it, times
       (1 - progress).
    ValueError for an unknown order or schedule, and for fewer than 1 step or more than the most unknown tokens of a
    sample."""
    N, seen = 9, []
    log_p = torch.stack([torch.randperm(N, generator=generator(seed)) for seed in (1, 2)]).double().log_softmax(-1)

    def predict(tokens, progress):
        seen.append((tokens.clone(), progress))
        return 100 * len(seen) + torch.arange(N).expand(2, N), log_p
    start = torch.tensor([[-1] * 9, [50, -1, -1, 51, -1, 52, -1, -1, -1]])
    ranks = dict(confidence=(-log_p).argsort(-1).argsort(-1), raster=torch.arange(N).expand(2, N),
                 halton=maskgit.halton_rank([3, 3]).expand(2, N))
    for order, rank in ranks.items():
        seen.clear()
        states = [*maskgit.unmask(start.clone(), predict, [3, 3], 4, order, 'linear')]
        assert len(states) == 4, f'4 steps should yield 4 states, not {len(states)}'
        assert [progress for _, progress in seen] == [0, 1 / 3, 2 / 3, 1], (
            f'progress goes {[round(p, 2) for _, p in seen]}, should go 0 .. 1')
        tokens = start.clone()
        for step, state in enumerate(states):
            assert torch.equal(state[start >= 0], start[start >= 0]), (
                f'order {order}: tokens that were given have changed in step {step + 1}')
            assert torch.equal(seen[step][0], tokens), (
                f'order {order}: in step {step + 1} predict should see what has been filled so far')
            for row, total in enumerate((9, 6)):
                filled = -(-total * (step + 1) // 4)
                turn = sorted((i for i in range(N) if start[row, i] < 0), key=lambda i: rank[row, i])[:filled]
                for place in turn:
                    if tokens[row, place] < 0:
                        tokens[row, place] = 100 * (step + 1) + place
            assert torch.equal(state, tokens), (
                f'order {order}, after step {step + 1} of 4 (linear): {state.tolist()}, should be {tokens.tolist()} '
                '(hundreds: the step that a token is from; -1: still unknown)')

    for order, noise in (('random', 0.0), ('confidence', 50.0)):
        a, b, c = (torch.stack([*maskgit.unmask(start.clone(), predict, [3, 3], 4, order, 'cosine', noise, generator(seed))]) < 0
                   for seed in (0, 0, 1))
        assert torch.equal(a, b), f'order {order}, choice_temperature={noise}: the same generator should choose the same places'
        assert not torch.equal(a, c), f'order {order}, choice_temperature={noise}: another seed should choose other places'

    def four(tokens, progress):  # token 0 always comes first, token 3 last; in the second step, at progress 1/3, 1 meets 2
        return torch.zeros_like(tokens), torch.tensor([50.0, 0.0, -1.0, -100.0]).expand(tokens.shape)
    _, second, *_ = maskgit.unmask(torch.full((4000, 4), -1), four, [4], 4, 'confidence', 'linear', 1.0, generator())
    share, expected = (second[:, 2] >= 0).double().mean().item(), 1 / (1 + math.exp(1 / (1 - 1 / 3)))
    assert abs(share - expected) < 0.03, (
        f'at choice_temperature 1 and progress 1/3 a token whose ln p is lower by 1 comes first in {share:.0%} of the samples; '
        f'Gumbel noise that fades by (1 - progress) makes it {expected:.0%}')
    for setting in (dict(order='up'), dict(schedule='up'), dict(steps=0), dict(steps=10)):
        try:
            [*maskgit.unmask(start.clone(), predict, [3, 3], **(dict(steps=4) | setting))]
        except ValueError:
            continue
        raise AssertionError(f'with 9 and 6 unknown tokens {setting} should raise a ValueError')


EXERCISES = {
    'hide': (4, hide),
    'MaskGIT.draw': (4, MaskGIT_draw),
    'MaskGIT.forward': (3, MaskGIT_forward),
    'filled_after': (4, filled_after),
    'unmask': (5, unmask),
}
