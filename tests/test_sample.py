"""The sampler's commands, on a tiny run."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train
from config import UserError
from tests.test_train import TINY


@pytest.fixture(scope='module')
def out_dir(work):
    train.main(**(TINY | dict(out_dir='out/sampled', max_iters=2, pictures=True)))
    return 'out/sampled'


def pictures(out_dir):
    return set(Path(out_dir).glob('sample_*.png'))


def draw(out_dir, *arguments):
    before = pictures(out_dir)
    sample.main(f'--out_dir={out_dir}', '--n=2', '--steps=2', *arguments)
    new, = pictures(out_dir) - before
    picture = Image.open(new)
    new.unlink()
    return picture


def test_training_draws(out_dir):
    assert pictures(out_dir)


def test_grids(out_dir, capsys):
    everything = draw(out_dir)
    assert everything.size == (14 * 132 - 4, 18 + 2 * 132 - 4)  # rgb; truth and result of 5; caption; truth and result
    chain = draw(out_dir, '--chain=rgb>depth:2,normal:2:confidence,scene_desc')
    assert chain.size[0] == 7 * 132 - 4
    text = draw(out_dir, '--given=caption', '--text=two large red metal spheres', '--target=rgb,depth')
    assert text.size[0] == 3 * 132 - 4 and 'a large red metal sphere and a large red metal sphere' in capsys.readouterr().out
    Image.new('L', (32, 32)).save('own.png')
    assert draw(out_dir, '--given=rgb', '--image=own.png', '--target=depth').size[0] == 2 * 132 - 4
    both = draw(out_dir, '--given=rgb,caption', '--image=own.png', '--text=a small red metal cube', '--target=depth')
    assert both.size[0] == 3 * 132 - 4
    assert draw(out_dir, '--target=rgb,caption').size[0] == 2 * 132 - 4  # from nothing


def test_same_seed_same_picture(out_dir):
    a, b, c = (np.asarray(draw(out_dir, '--target=rgb', f'--seed={seed}')) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_scores(out_dir, capsys):
    sample.main(f'--out_dir={out_dir}', '--score=True', '--n_score=12', '--steps=2')
    scores = json.loads(Path(out_dir, 'scores.json').read_text())
    cells = {name.split('/')[0] for name in scores if '>' in name}
    assert len(cells) == 30
    for name, score in scores.items():
        assert score['low'] <= score['value'] <= score['high'] and score['n'] == 12, name
        if '>' in name:
            assert {'ceiling', 'baseline'} <= score.keys()
    assert scores['caption>scene_desc/attributes']['ceiling'] == 1
    assert 'rgb>depth/absrel_objects' in capsys.readouterr().out
    sample.main(f'--out_dir={out_dir}', '--score=True', '--n_score=4', '--given=depth,rgb', '--target=normal')
    assert {name.split('/')[0] for name in json.loads(Path(out_dir, 'scores.json').read_text()) if '>' in name} == {
        'depth>normal', 'rgb>normal'}


def test_bootstrap():
    parts = np.stack((np.arange(100.0), np.full(100, 2.0)), -1)[:, None]
    score = sample.bootstrap(parts)
    assert score['value'] == pytest.approx(49.5 / 2) and score['n'] == 100
    error = np.arange(100).std() / 2 / 10
    assert score['high'] - score['low'] == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize('arguments, message', [
    (['--given=sound'], "there is no modality 'sound'; this model has rgb, depth"),
    (['--chain=rgb>rgb'], "'rgb' stands twice"),
    (['--chain=rgb'], 'write given>target'),
    (['--chain=rgb>depth:many'], 'write name:steps:order'),
    (['--chain=rgb>depth:2:fast'], 'write name:steps:order'),
    (['--text=hello'], 'need --given=NAME'),
    (['--given=caption', '--image=x.png'], '--given=caption needs --text'),
    (['--given=caption', '--text=' + 'x' * 100], 'has 101 tokens with its end token, the modality holds 26'),
    (['--given=depth', '--image=own.png'], '--image gives the modality rgb'),
    (['--order=fast'], 'order is one of'),
    (['--n=0'], 'must be at least 1'),
    (['--checkpoint=ckpt_none.pt'], 'no such checkpoint'),
    (['--stepss=3'], "did you mean 'steps'"),
])
def test_faults(out_dir, arguments, message):
    Image.new('L', (32, 32)).save('own.png')
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={out_dir}', *arguments)
    assert '\n' not in str(error.value)
