"""Retrieval, on a tiny run: against the slow way, and its index."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from config import UserError
from prepare import retrieval
from tests.test_train import TINY


@pytest.fixture(scope='module')
def run(work):
    train.main(**(TINY | dict(out_dir='out/found', max_iters=40, pictures=False)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval.train_towers, '__defaults__', (20, 32, 0))
        path = Path('out/found/ckpt_last.pt')
        model, _ = train.load_model(path)
        return model, path, retrieval.open_index(model, 'data/scenes', path, 'caption', 'rgb', 'val')


def test_nearness_is_the_likelihood_ratio(run):
    """Pair by pair: ln p(caption | rgb) - ln p(caption), from both sides; the second lacks what is the same for all pictures."""
    model, _, index = run
    assert index['names'] == ['rgb', 'caption'] and index['n'] == 32
    rgb, caption = (index['ids'][name] for name in ('rgb', 'caption'))
    from_rgb = retrieval.nearness(model, index, 'rgb', rgb[:3])
    from_caption = retrieval.nearness(model, index, 'caption', caption[:3])
    nothing = model.ask({'rgb': torch.full((1, 64), -1)}, 'caption')
    for i in range(3):
        for j in range(3):
            told = model.log_prob(model.ask({'rgb': rgb[i:i + 1]}, 'caption'), 'caption', caption[j:j + 1])
            ratio = told - model.log_prob(nothing, 'caption', caption[j:j + 1])
            assert from_rgb[i, j].item() == pytest.approx(ratio.item(), abs=0.02)
            assert from_caption[j, i].item() == pytest.approx(told.item(), abs=0.1)  # answers are kept in half precision


def test_recall_counts_equal_texts_as_the_same():
    table = torch.tensor([[3.0, 2, 1], [5, 4, 1], [9, 8, 7]])
    same = torch.eye(3, dtype=torch.bool)
    assert [retrieval.hits(table, same, k).tolist() for k in (1, 2, 3)] == [[True, False, False], [True, True, False], [True] * 3]
    same[1, 0] = True
    assert retrieval.hits(table, same, 1).tolist() == [True, True, False]


def test_towers_learn_which_belong_together():
    """Two linear views of the same 4 numbers, told apart after a few steps where chance is one in 200."""
    torch.manual_seed(0)
    hidden = torch.randn(600, 4)
    views = [hidden @ torch.randn(4, 16) for _ in range(2)]
    towers = retrieval.train_towers([view[:400] for view in views], steps=200, batch_size=200)
    a, b = (torch.nn.functional.normalize(t(view[400:]), dim=1) for t, view in zip(towers, views))
    assert retrieval.hits(a @ b.T, torch.eye(200, dtype=torch.bool), 1).float().mean() > 0.3


def test_commands(run, capsys):
    retrieval.main(out_dir='out/found')
    printed = capsys.readouterr().out
    assert 'caption>rgb/recall at 10 of 32' in printed and 'rgb>caption/recall at 1 of 32 by embedding' in printed
    for arguments in (['--given=caption', '--text=two large red spheres'], ['--given=caption', '--by=embedding', '--n=2']):
        before = set(Path('out/found').glob('sample_*.png'))
        sample.main('--out_dir=out/found', '--retrieve=rgb', *arguments)
        new, = set(Path('out/found').glob('sample_*.png')) - before
        assert Image.open(new).size[0] == 11 * 132 - 4
        new.unlink()
    sample.main('--init_from=found', '--retrieve=rgb', '--given=caption', '--n=1')  # the index beside these weights, no other's


def test_scores_hold_recalls(run, monkeypatch):
    monkeypatch.setattr(sample, 'score_chain', lambda *_: ({}, 0.0))
    sample.main('--out_dir=out/found', '--score=True', '--n_score=100')
    scores = json.loads(Path('out/found/scores.json').read_text())
    ids = np.load('data/scenes/val/caption.npy')
    same = (ids[:, None] == ids[None]).all(-1).sum(1)  # captions that are equal are as right
    assert scores['caption>rgb/recall at 1 of 32']['baseline'] == pytest.approx((same / 32).mean())
    assert scores['caption>rgb/recall at 10 of 32']['baseline'] == pytest.approx(
        np.mean([1 - math.comb(32 - n, 10) / math.comb(32, 10) for n in same]), rel=1e-4)


def test_faults(run):
    model, path, _ = run
    for pair in ('rgb', 'rgb,rgb', 'rgb,sound'):
        with pytest.raises(UserError, match='two modalities of a run of fourm'):
            retrieval.main(out_dir='out/found', pair=pair)
    index = Path('out/found/index_rgb_caption_val.pt')
    kept = index.read_bytes()
    other = Path('out/found/ckpt_other.pt')
    other.write_bytes(path.read_bytes() + b'0')
    with pytest.raises(UserError, match='is the index of another checkpoint; delete it'):
        retrieval.open_index(model, 'data/scenes', other, 'caption', 'rgb', 'val')
    index.write_bytes(kept[:1000])
    with pytest.raises(UserError, match='damaged'):
        retrieval.open_index(model, 'data/scenes', path, 'caption', 'rgb', 'val')
    index.write_bytes(kept)
    empty = Path('data/empty/val')
    empty.mkdir(parents=True)
    for name in ('rgb', 'caption'):
        np.save(empty / f'{name}.npy', np.load(f'data/scenes/val/{name}.npy')[:0])
    with pytest.raises(UserError, match='an empty gallery'):
        retrieval.make_index(model, 'data/empty', ['rgb', 'caption'], 'val')
