"""Micro-batches: the same samples and random numbers whichever process computes them, other ones for every seed."""
import pytest
import torch

import gpt
import train
from config import UserError
from engine import batches
from prepare import arrays


def test_a_split_of_the_batch():
    settings = dict(batch_size=24, micro_batch_size=4)
    assert batches.share(settings, 0, 1) == (6, range(6))
    shares = [batches.share(settings, rank, 3)[1] for rank in range(3)]
    assert sorted(j for share in shares for j in share) == list(range(6)) and {len(share) for share in shares} == {2}
    for changes, world, remedy in ((dict(), 4, 'so that their number is a multiple of 4'),
                                   (dict(micro_batch_size=5), 1, 'a --micro_batch_size= that divides batch_size')):
        with pytest.raises(UserError, match=f'does not split into micro-batches of .*{remedy}'):
            batches.share(settings | changes, 0, world)


def toy_data(toy):
    settings = toy('maskgit') | dict(micro_batch_size=2, seed=0)
    meta = arrays.read_meta('data/maskgit')
    model = train.config.build(train.config.chapter('maskgit'), train.config.resolve(
        {name: (value, '') for name, value in settings.items()}, train.SETTINGS)[0], meta, {})
    return arrays.Data('data/maskgit', 'train', meta, model.batch_keys, seed=0), model, settings


def test_a_micro_batch_follows_from_seed_step_and_j(toy):
    data, model, settings = toy_data(toy)

    def made(step, j, **changes):
        return batches.micro_batch(data, model, settings | changes, step, j)
    first, again = made(3, 1), made(3, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (made(3, 0), made(2, 1), made(3, 1, seed=1)):
        assert any(not torch.equal(first[name], other[name]) for name in first if first[name].shape == other[name].shape)
    a, b = (batches.evaluation_batch(data, model, settings | dict(seed=seed), 2) for seed in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)  # every run is evaluated alike


def test_prefetched_batches_come_in_order():
    jobs = [(i,) for i in range(7)]
    for device in ('cpu', 'meta'):
        found = list(batches.prefetched(lambda i: dict(x=torch.tensor(i)), jobs, torch.device(device)))
        assert [batch['x'].item() for batch in found] == list(range(7))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout

def test_seeds_of_dropout_are_all_different():
    keys = [(seed, step, j) for seed in range(4) for step in range(40) for j in range(8)]
    assert len({batches.seed_of(seed, batches.DROPOUT, step, j) for seed, step, j in keys}) == len(keys)


def dropout_seeds(monkeypatch, toy, **changes):
    """{(step, j): state of torch's generator} as a forward pass in training finds it."""
    found, forward = [], gpt.GPT.forward

    def spy(self, batch):
        if torch.is_grad_enabled() and self.lm_head.weight.device.type != 'meta':
            found.append(torch.initial_seed())
        return forward(self, batch)
    monkeypatch.setattr(gpt.GPT, 'forward', spy)
    settings = toy | dict(max_iters=4, eval_iters=1, out_dir=f'out/{len(changes)}{changes}') | changes
    train.main(**settings)
    monkeypatch.undo()
    n_micro = settings['batch_size'] // settings['micro_batch_size']
    return {divmod(i, n_micro): seed for i, seed in enumerate(found)}


def test_seeds_share_no_masks_and_these_do_not_depend_on_n_micro(toy):
    """They were seed + step * n_micro + j: seed 1 had the masks of seed 0, one micro-batch later."""
    settings = toy('gpt')
    with pytest.MonkeyPatch.context() as patch:
        zero = dropout_seeds(patch, settings)
        one = dropout_seeds(patch, settings, seed=1)
        more = dropout_seeds(patch, settings, batch_size=16, micro_batch_size=4)
    assert len(zero) == 8 and len(set(zero.values())) == 8 and not set(zero.values()) & set(one.values())
    assert len(more) == 16 and all(more[key] == seed for key, seed in zero.items())
