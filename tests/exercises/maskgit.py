"""
Chapter 2's exercises: each check's docstring is what a student reads, its asserts are the reasons for a failed answer.

The references are slow and obvious: one sample, one token at a time.
"""
import math

import torch

from tests.exercises import equal, generator, lively


def random_mask(maskgit):
    """The mask: which tokens of each sample to mask (MaskGIT, 2202.04200, section 3.1). (B, N) booleans, True = masked.
    The mask ratio is gamma(u), u (B, 1) from 0 to 1, gamma = MASK_SCHEDULES[mask_schedule][0]. Of a sample's n valid
    tokens mask ceil(gamma(u) n), at least one: those with the smallest noise (B, N). Padding, which is not valid, is
    never masked and does not count."""
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.5, 0.7, 0.2]] * 2)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
    for schedule, gamma in dict(uniform=lambda u: 1 - u, cosine=lambda u: math.cos(math.pi / 2 * u)).items():
        for u in (0.0, 0.3, 0.6, 1.0):
            mask = maskgit.random_mask(valid, torch.full((2, 1), u), noise, schedule)
            assert mask.shape == (2, 6) and mask.dtype == torch.bool, (
                f'the mask is {mask.dtype} {tuple(mask.shape)}, should be bool (2, 6)')
            assert not (mask & ~valid).any(), 'tokens that are not valid are masked: padding is no target'
            for row in range(2):
                candidates = [i for i in range(6) if valid[row, i]]
                n_masked = max(1, math.ceil(gamma(u) * len(candidates) - 1e-6))
                got = [i for i in range(6) if mask[row, i]]
                assert len(got) == n_masked, (
                    f'mask_schedule {schedule}, u = {u}: {len(got)} of {len(candidates)} tokens are masked; '
                    f'{n_masked} should be masked')
                expected = sorted(sorted(candidates, key=lambda i: noise[row, i])[:n_masked])
                assert got == expected, f'tokens {got} are masked, should be those with the smallest noise, {expected}'


def small(maskgit, **changes):
    config = dict(vocab_size=12, levels='3*4', grid='2x3', n_classes=5, n_layer=1, n_head=2, n_embd=16,
                  label_dropout=0.5)
    return lively(maskgit.MaskGIT(maskgit.Config(**(config | changes))))


def MaskGIT_prepare_batch(maskgit):
    """The masked loss, first half: the input and the targets of a training step. The last N tokens of a row are the
    sample. Mask some of the valid ones (>= 0), by `antithetic_masks` with config.mask_schedule. Returns a dict of
    tokens          (B, N), -1 if masked;
    token_idx, ids  (R,) the masked positions among the B * N of the batch, ascending; the original tokens there;
    weight          (R,) such that sum(weight * loss) is the mean over a sample's masked tokens, then over samples;
    elbo_weight     (R,) the same times the sample's `importance_weight`; if config.elbo, it is the weight too;
    classes         (B,) the first of each row, and drop_class (B,), True for a fraction config.label_dropout of them,
                    sampled with the generator after the mask; both only if config.n_classes is not 0."""
    for elbo in (False, True):
        model = small(maskgit, mask_schedule='cosine', elbo=elbo)
        batch = torch.cat((torch.randint(5, (40, 1)), torch.randint(12, (40, 6))), 1)
        batch[0, 5:] = -1
        prepared = model.prepare_batch(dict(tokens=batch.clone()), generator(), None)
        missing = {'tokens', 'token_idx', 'ids', 'weight', 'elbo_weight', 'classes', 'drop_class'} - set(prepared)
        assert not missing, f'the prepared batch lacks {", ".join(sorted(missing))}'
        tokens, truth, token_idx = prepared['tokens'], batch[:, 1:], prepared['token_idx']
        assert tokens.shape == (40, 6), f'tokens are {tuple(tokens.shape)}, should be the last 6 of each row, (40, 6)'
        assert (tokens[tokens >= 0] == truth[tokens >= 0]).all(), (
            'tokens that are not masked have changed (the last 6 of a row are the sample)')
        mask = (tokens < 0) & (truth >= 0)
        expected = maskgit.antithetic_masks(truth >= 0, 'cosine', generator())
        assert torch.equal(mask, expected), (
            'the masked tokens, -1, are not those of antithetic_masks with this generator')
        equal(token_idx, mask.flatten().nonzero()[:, 0], 'token_idx')
        equal(prepared['ids'], truth.flatten()[token_idx], 'ids')
        weight = torch.stack([1 / mask[i // 6].sum() / 40 for i in token_idx.tolist()])
        importance = maskgit.importance_weight(mask, truth >= 0, 'cosine')[token_idx // 6]
        equal(prepared['weight'], weight * importance if elbo else weight, f'weight (config.elbo={elbo})')
        equal(prepared['elbo_weight'], weight * importance, 'elbo_weight')
        equal(prepared['classes'], batch[:, 0], 'classes, the first token of each row,')
    for fraction in (0.0, 0.2):
        model = small(maskgit, label_dropout=fraction)
        dropped = model.prepare_batch(dict(tokens=batch.repeat(50, 1)), generator(), None)['drop_class']
        got = dropped.double().mean().item()
        assert abs(got - fraction) < fraction / 4 + 1e-9, (
            f'with label_dropout={fraction}, drop_class is True for {got:.0%} of the samples')
    prepared = small(maskgit, n_classes=0).prepare_batch(dict(tokens=batch), generator(), None)
    assert 'drop_class' not in prepared, 'without classes there is no drop_class'


def MaskGIT_forward(maskgit):
    """The masked loss, second half: -ln p of the masked tokens alone. Run the backbone on tokens and classes, and take
    its output h at the masked positions `token_idx`; self.head(h, ids) gives -ln p of each. The loss is their sum,
    weighted by batch['weight']. In training (self.training), and only then, replace the classes of the samples of
    batch['drop_class'] by n_classes, "no class".
    Logs, detached pairs (sum, count): 'loss', B times the loss, and B; 'elbo', the same weighted by elbo_weight;
    'token_mean_loss', the plain sum of -ln p and R; 'tokens', the number of tokens, masked or not, and 1."""
    model = small(maskgit)
    tokens = torch.tensor([[-1, -1, -1, -1, -1, 3], [1, -1, 2, 3, 4, 5], [7, 8, -1, -1, 9, 10]])
    token_idx = (tokens < 0).flatten().nonzero()[:, 0]
    ids, classes, drop_class = torch.randint(12, (8,)), torch.tensor([0, 1, 2]), torch.tensor([True, False, True])
    weight = torch.tensor([1 / 5 / 3] * 5 + [1 / 3] + [1 / 2 / 3] * 2)
    batch = dict(tokens=tokens, token_idx=token_idx, ids=ids, weight=weight, elbo_weight=3 * weight, classes=classes,
                 drop_class=drop_class)

    def by_hand(classes):
        h = model.backbone(tokens, classes).flatten(0, 1)
        return torch.cat([model.head(h[i][None], ids[r:r + 1]) for r, i in enumerate(token_idx.tolist())])
    nll = by_hand(classes)
    loss, logs = model(dict(batch))
    expected = torch.stack((nll[:5].mean(), nll[5:6].mean(), nll[6:].mean())).mean()
    assert not torch.isclose(loss, nll.mean()), (
        "the loss is the mean over all masked tokens together; take it over a sample's first, then over samples "
        '(the weights do)')
    equal(loss, expected,
          'the loss, not in training: the mean over the masked tokens of each sample (5, 1 and 2), then over 3 samples')
    equal(logs['loss'], torch.stack((3 * expected, torch.tensor(3.0))), "logs['loss']")
    equal(logs['elbo'], torch.stack((9 * expected, torch.tensor(3.0))), "logs['elbo']")
    equal(logs['token_mean_loss'], torch.stack((nll.sum(), torch.tensor(8.0))), "logs['token_mean_loss']")
    equal(logs['tokens'], torch.tensor([18.0, 1.0]), "logs['tokens']")
    assert not any(value.requires_grad for value in logs.values()), 'logs should be detached: they keep the graph alive'
    loss.backward()
    assert model.mask_token.grad.abs().sum() > 0, 'no gradient reaches the mask token'
    model.train()
    equal(model(dict(batch))[0], (by_hand(torch.tensor([5, 1, 5])) * weight).sum(),
          'the loss, in training, where the class of two samples is dropped,')


def unmask_schedule(maskgit):
    """The schedule: how many tokens are unmasked after each step (MaskGIT, section 3.3). Of a sample's `total` (B, 1),
    after step s = 1..S, integers (B, S), rounded up, where 10 (1 - cos(pi/2)) is 10 in spite of floating-point errors:
    cosine    total (1 - cos(pi/2 s/S));
    linear    total s/S;
    constant  s ceil(total/S).
    But each step unmasks at least one token while any is masked, and leaves at least one for each later step; after the
    last step all are unmasked. A sample of fewer tokens than steps is finished after as many steps as it has tokens."""
    def by_hand(total, steps, schedule):
        n_unmasked = []
        for s in range(1, steps + 1):
            n = dict(cosine=total * (1 - math.cos(math.pi / 2 * s / steps)) - 1e-9, linear=total * s / steps - 1e-9,
                     constant=-(-total // steps) * s)[schedule]
            n_unmasked.append(min(max(min(math.ceil(n), total - steps + s), s), total))
        return n_unmasked
    for schedule in ('cosine', 'linear', 'constant'):
        for total, steps in ((10, 4), (49, 8), (10, 10), (13, 5), (7, 1), (64, 16)):
            got = maskgit.unmask_schedule(torch.tensor([[total], [2]]), steps, schedule)
            assert got.shape == (2, steps), (
                f'for 2 samples and {steps} steps the shape is {tuple(got.shape)}, should be {(2, steps)}')
            assert not got.is_floating_point(), f'the dtype is {got.dtype}, should be an integer type'
            expected = by_hand(total, steps, schedule)
            assert got[0].tolist() == expected, (
                f'{schedule}, {total} tokens in {steps} steps: {got[0].tolist()} are unmasked after each, should be '
                f'{expected}')
            expected = by_hand(2, steps, schedule)
            assert got[1].tolist() == expected, (
                f'{schedule}, {steps} steps, but only 2 tokens: {got[1].tolist()}, should be {expected}')


def iterative_decode(maskgit):
    """Iterative decoding: one loop for every order. A generator function that yields the tokens (B, N) after each step.
    1. predict(tokens, progress) returns a sampled token for each position and its ln p, (B, N) each; progress goes
       linearly from 0 at the first step to 1 at the last.
    2. `unmask_schedule` gives how many of a sample's unknown tokens, -1, are unmasked after this step.
    3. Keep as many of the sampled tokens as are missing to that number, those of the smallest priority: -ln p
       (confidence), one random number per position sampled at the beginning (random), `halton_order` (halton), or the
       position itself (raster). Known tokens never change.
    4. choice_temperature, with confidence: add Gumbel noise, -ln of a sample of Exp(1), times choice_temperature times
       (1 - progress), to ln p.
    ValueError for an unknown order or schedule, and for fewer than 1 step or more than the largest number of unknown
    tokens of a sample."""
    N, seen = 9, []
    log_p = torch.stack([torch.randperm(N, generator=generator(seed)) for seed in (1, 2)]).double().log_softmax(-1)

    def predict(tokens, progress):
        seen.append((tokens.clone(), progress))
        return 100 * len(seen) + torch.arange(N).expand(2, N), log_p

    def decode(order, schedule, *settings, **changes):
        arguments = dict(tokens=start.clone(), predict=predict, grid=[3, 3], steps=4) | changes
        return [*maskgit.iterative_decode(*arguments.values(), order, schedule, *settings)]
    start = torch.tensor([[-1] * 9, [50, -1, -1, 51, -1, 52, -1, -1, -1]])
    ranks = dict(confidence=(-log_p).argsort(-1).argsort(-1), raster=torch.arange(N).expand(2, N),
                 halton=maskgit.halton_order([3, 3]).expand(2, N))
    for order, rank in ranks.items():
        seen.clear()
        states = decode(order, 'linear')
        assert len(states) == 4, f'4 steps should yield 4 states, not {len(states)}'
        assert [progress for _, progress in seen] == [0, 1 / 3, 2 / 3, 1], (
            f'progress is {[round(p, 2) for _, p in seen]}, should go from 0 to 1')
        tokens = start.clone()
        for step, state in enumerate(states):
            assert torch.equal(state[start >= 0], start[start >= 0]), (
                f'order {order}: tokens that were given have changed in step {step + 1}')
            assert torch.equal(seen[step][0], tokens), (
                f'order {order}: in step {step + 1} the input of predict should be the tokens unmasked so far')
            for row, total in enumerate((9, 6)):
                n_unmasked = -(-total * (step + 1) // 4)
                unknown = [i for i in range(N) if start[row, i] < 0]
                for position in sorted(unknown, key=lambda i: rank[row, i])[:n_unmasked]:
                    if tokens[row, position] < 0:
                        tokens[row, position] = 100 * (step + 1) + position
            assert torch.equal(state, tokens), (
                f'order {order}, after step {step + 1} of 4 (linear): {state.tolist()}, should be {tokens.tolist()} '
                '(hundreds: the step in which a token was sampled; -1: still unknown)')

    for order, noise in (('random', 0.0), ('confidence', 50.0)):
        a, b, c = (torch.stack(decode(order, 'cosine', noise, generator(seed))) < 0 for seed in (0, 0, 1))
        assert torch.equal(a, b), (
            f'order {order}, choice_temperature={noise}: the same generator should choose the same positions')
        assert not torch.equal(a, c), (
            f'order {order}, choice_temperature={noise}: another seed should choose other positions')

    def four(tokens, progress):  # token 0 is first, token 3 last; step 2, at progress 1/3, chooses 1 or 2
        return torch.zeros_like(tokens), torch.tensor([50.0, 0.0, -1.0, -100.0]).expand(tokens.shape)
    empty = torch.full((4000, 4), -1)
    second = decode('confidence', 'linear', 1.0, generator(), tokens=empty, predict=four, grid=[4])[1]
    fraction, expected = (second[:, 2] >= 0).double().mean().item(), 1 / (1 + math.exp(1 / (1 - 1 / 3)))
    assert abs(fraction - expected) < 0.03, (
        f'at choice_temperature 1 and progress 1/3 a token whose ln p is lower by 1 comes first in {fraction:.0%} of '
        f'the samples; Gumbel noise that decays with (1 - progress) makes it {expected:.0%}')
    for order, schedule, steps in (('up', 'cosine', 4), ('random', 'up', 4), ('random', 'cosine', 0),
                                   ('random', 'cosine', 10)):
        try:
            decode(order, schedule, steps=steps)
        except ValueError:
            continue
        raise AssertionError(f'with 9 and 6 unknown tokens order={order}, schedule={schedule}, steps={steps} should '
                             'raise a ValueError')


EXERCISES = {
    'random_mask': (4, random_mask),
    'MaskGIT.prepare_batch': (4, MaskGIT_prepare_batch),
    'MaskGIT.forward': (3, MaskGIT_forward),
    'unmask_schedule': (4, unmask_schedule),
    'iterative_decode': (5, iterative_decode),
}
