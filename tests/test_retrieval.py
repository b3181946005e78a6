"""Retrieval, on a tiny run: against the slow way, and its index."""
import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import UserError
from engine import checkpoints
from lab import retrieval

RUN = dict(model='fourm', dataset='scenes', n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32,
           num_input_tokens='16,32', num_target_tokens='16', batch_size=8, micro_batch_size=4, max_iters=40,
           eval_interval=40, eval_iters=1, device='cpu', dtype='float32', compile=False, pictures=False,
           out_dir='out/found')


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(retrieval.train_towers, '__defaults__', ('cpu', 20, 32, 0))


@pytest.fixture(scope='module')
def path(work):
    train.main(**RUN)
    return Path('out/found/ckpt_last.pt')


@pytest.fixture(scope='module')
def model(path):
    return checkpoints.load_model(path)[0]


@pytest.fixture
def index(model, path):
    return retrieval.open_index(model, 'data/scenes', path, 'caption', 'rgb', 'val')


def test_nearness_is_the_likelihood_ratio(model, index):
    """Pair by pair: ln p(caption | rgb) - ln p(caption), from both sides; the second lacks what is the same for all
    images."""
    assert index['names'] == ['rgb', 'caption'] and index['n'] == 32
    rgb, caption = (index['ids'][name] for name in ('rgb', 'caption'))
    from_rgb = retrieval.nearness(model, index, 'rgb', rgb[:3])
    from_caption = retrieval.nearness(model, index, 'caption', caption[:3])
    nothing = retrieval.decode_modality(model, {'rgb': torch.full((1, 64), -1)}, 'caption')
    for i in range(3):
        for j in range(3):
            decoder_out = retrieval.decode_modality(model, {'rgb': rgb[i:i + 1]}, 'caption')
            log_prob = retrieval.log_prob(model, decoder_out, 'caption', caption[j:j + 1])
            ratio = log_prob - retrieval.log_prob(model, nothing, 'caption', caption[j:j + 1])
            assert from_rgb[i, j].item() == pytest.approx(ratio.item(), abs=0.02)
            assert from_caption[j, i].item() == pytest.approx(log_prob.item(), abs=0.1)  # stored in half precision


def test_recall_counts_equal_texts_as_the_same():
    table = torch.tensor([[3.0, 2, 1], [5, 4, 1], [9, 8, 7]])
    same = torch.eye(3, dtype=torch.bool)
    found = [retrieval.hits(table, same, k).tolist() for k in (1, 2, 3)]
    assert found == [[True, False, False], [True, True, False], [True] * 3]
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


def test_towers_change_no_global_state():
    features = [torch.randn(40, 16) for _ in range(2)]
    before, fused = torch.get_rng_state(), torch.backends.cuda.flash_sdp_enabled()
    first = retrieval.train_towers(features)
    assert torch.equal(torch.get_rng_state(), before) and torch.backends.cuda.flash_sdp_enabled() == fused
    torch.manual_seed(5)
    again = retrieval.train_towers(features)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_the_program(index, capsys):
    retrieval.main('--out_dir=out/found', '--device=cpu')
    printed = capsys.readouterr().out
    assert 'caption>rgb/recall at 10 of 32' in printed and 'rgb>caption/recall at 1 of 32 by embedding' in printed
    assert 'making it' not in printed  # the index is there


def test_chance(model, index):
    found = retrieval.recalls(model, index)
    ids = np.load('data/scenes/val/caption.npy')
    same = (ids[:, None] == ids[None]).all(-1).sum(1)  # captions that are equal are as right
    assert found['caption>rgb/recall at 1 of 32']['baseline'] == pytest.approx((same / 32).mean())
    assert found['caption>rgb/recall at 10 of 32']['baseline'] == pytest.approx(
        np.mean([1 - math.comb(32 - n, 10) / math.comb(32, 10) for n in same]), rel=1e-4)


def test_an_index_is_made_again(model, index, path, tmp_path, capsys):
    """If it is of other weights, as after more training, or damaged; not for a copied run or another file of the same
    weights."""
    def opened(model=model, name='ckpt_last.pt'):
        found = retrieval.open_index(model, 'data/scenes', tmp_path / 'run' / name, 'rgb', 'caption', 'val')
        assert found['weights'] == retrieval.digest(model)
        return capsys.readouterr().out
    shutil.copytree(path.parent, tmp_path / 'run', copy_function=shutil.copy)
    assert opened() == '' and opened(name='ckpt_best.pt') == ''
    other = copy.deepcopy(model)
    next(other.parameters()).data[0, 0] += 1e-3
    assert opened(other).splitlines() == [f'{tmp_path}/run/index_rgb_caption_val.pt is of other weights: making it']
    assert opened(other) == '' and 'other weights' in opened()
    file = tmp_path / 'run/index_rgb_caption_val.pt'
    file.write_bytes(file.read_bytes()[:1000])
    assert 'is damaged' in opened() and opened() == ''
    torch.save([1], file)
    assert 'is damaged' in opened()


def test_faults(path):
    for pair in ('rgb', 'rgb,rgb', 'rgb,sound'):
        with pytest.raises(UserError, match='two modalities of a run of fourm'):
            retrieval.main(out_dir='out/found', pair=pair)
    with pytest.raises(UserError, match="split='none'"):
        retrieval.main(out_dir='out/found', split='none')


def test_an_empty_gallery(model, path):
    empty = Path('data/empty/val')
    empty.mkdir(parents=True)
    for name in ('rgb', 'caption'):
        np.save(empty / f'{name}.npy', np.load(f'data/scenes/val/{name}.npy')[:0])
    with pytest.raises(UserError, match='an empty gallery'):
        retrieval.make_index(model, 'data/empty', ['rgb', 'caption'], 'val')
