"""lab/flow.py on tiny runs: digits, points, sweeps, scores, faults in one line."""
from pathlib import Path

import numpy as np
import pytest

import lab
import sample
import train
from config import UserError
from lab import score
from prepare import toy2d
from tests.test_flow import RUN
from tests.toys import draw, make_digits


@pytest.fixture(scope='module')
def digits(work):
    make_digits()
    train.main(**RUN | dict(pictures=True), dataset='toy_mnist', out_dir='out/flow_digits', patch=14)
    return 'out/flow_digits'


@pytest.fixture(scope='module')
def points(work):
    toy2d.main(n_train=300, n_val=300, out='data/points')
    train.main(**RUN, dataset='points', out_dir='out/points', label_drop=0.0)
    return 'out/points'


def test_images_of_digits(digits):
    assert Path(digits, 'sample_000002.png').exists()
    assert draw(digits, '--n=2', '--steps=2').size == (10 * 60 - 4, 18 + 2 * 60 - 4)
    assert draw(digits, '--n=2', '--steps=2', '--labels=3,5', '--guidance=2', '--interval=0.2,0.8').size[0] == 2 * 60 - 4
    assert draw(digits, '--n=2', '--show=guidance', '--steps=1').size[0] == 7 * 60 - 4
    assert draw(digits, '--n=2', '--show=steps').size[0] == 7 * 60 - 4
    assert draw(digits, '--n=2', '--show=path', '--steps=4').size[0] == 5 * 60 - 4
    assert draw(digits, '--n=2', '--show=path', '--steps=4', kind='gif').n_frames > 1


def test_guidance_may_be_0(digits):
    """Which knows no label: all classes alike but for the noise, and not what 1 gives."""
    columns = [np.asarray(draw(digits, '--n=1', '--show=guidance', '--labels=3', f'--seed={seed}')) for seed in (1, 1)]
    assert (columns[0] == columns[1]).all()
    run = lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu')
    for parameter in run.model.parameters():
        parameter.data += 0.1
    settings = lab.module_of('flow').Images(guidance=0.0, steps=2)
    three, five = (lab.module_of('flow').samples(run, settings, np.array([label])) for label in (3, 5))
    assert (three == five).all()


def test_defaults_fit_the_model(digits, points):
    module, images, some = lab.module_of('flow'), *(lab.open_run(Path(run, 'ckpt_last.pt'), 'cpu') for run in (digits, points))
    assert module.settings_of(images) == module.Images(guidance=2.0, steps=20, n=10)
    assert module.settings_of(some) == module.Points(guidance=1.0, steps=40, n=4000)
    assert module.scores_of(images).steps == '1,2,4,10,20' and module.scores_of(some).steps == '1,2,4,20'
    images.model.config.mean = 0.5
    assert module.settings_of(images) == module.Images(method='jump', steps=1)


def test_scores_of_digits(digits):
    scores = score.main(f'--out_dir={digits}', '--n_score=20', '--steps=1,2')
    assert {'squared error', 'squared error, t in 0.25..0.5', 'bits/dim given the class', '1 steps: frechet', '2 steps: precision',
            '2 steps: seconds/image'} <= scores.keys()
    assert '1 steps: precision' not in scores


def test_points(points):
    scores = score.main(f'--out_dir={points}', '--n_score=20')
    assert {'squared error', 'KL(data || model), nats', 'W2, 1 steps', 'W2, 20 steps'} <= scores.keys()
    assert scores['W2, 1 steps']['floor'] > 0 and scores['KL(data || model), nats']['value'] > 0
    assert draw(points, '--n=50', '--steps=4').size == (6 * 204 - 4, 18 + 2 * 204 - 4)
    for argument, message in (('--compile=True', 'this model is none'), ('--show=path', 'show is a setting of'),
                              ('--labels=1', 'labels is a setting of')):
        with pytest.raises(UserError, match=message):
            sample.main(f'--out_dir={points}', argument)


def test_scenes(work):
    train.main(**RUN | dict(pictures=True), dataset='scenes', out_dir='out/flow_scenes_test', patch=8)
    assert Path('out/flow_scenes_test/sample_000002.png').exists()


@pytest.mark.parametrize('arguments, message', [
    (['--steps=-1'], 'steps=-1 must be at least 1'), (['--labels=3,12'], "there is no class '12'"),
    (['--interval=1'], 'write two times from 0 to 1'), (['--interval=0,1,2'], 'write two times from 0 to 1'),
    (['--interval=0.8,0.1'], 'the lower first'), (['--method=rk4'], 'choose one of euler'),
    (['--method=jump'], 'jump needs a model trained with mean'),
    (['--show=all'], 'show is one of grid'), (['--labels=x'], 'labels'), (['--labels=10'], 'labels'),
    (['--order=raster'], 'order is a setting of lab/fourm.py .AnyToAny., lab/maskgit.py .Text., lab/maskgit.py .Images.; here'),
    (['--temperature=0.5'], 'temperature is a setting of lab/fourm.py'),
    (['--n_score=5'], 'n_score is a setting of python -m lab.score')])
def test_faults(digits, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={digits}', *arguments)
    assert '\n' not in str(error.value)
