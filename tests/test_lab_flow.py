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
    train.main(**RUN | dict(pictures=True), dataset='toy_mnist', out_dir='out/flow_digits', patch_size=14)
    return 'out/flow_digits'


@pytest.fixture(scope='module')
def points(work):
    toy2d.main(n_train=300, n_val=300, out='data/points')
    train.main(**RUN, dataset='points', out_dir='out/points', label_dropout=0.0)
    return 'out/points'


def test_images_of_digits(digits):
    assert Path(digits, 'sample_000002.png').exists()
    assert draw(digits, '--n=2', '--steps=2').size == (10 * 60 - 4, 18 + 2 * 60 - 4)
    two = draw(digits, '--n=2', '--steps=2', '--labels=3,5', '--guidance=2', '--guidance_interval=0.2,0.8')
    assert two.size[0] == 2 * 60 - 4
    assert draw(digits, '--n=2', '--show=guidance', '--steps=1').size[0] == 7 * 60 - 4
    assert draw(digits, '--n=2', '--show=steps').size[0] == 7 * 60 - 4
    assert draw(digits, '--n=2', '--show=path', '--steps=4').size[0] == 5 * 60 - 4
    assert draw(digits, '--n=2', '--show=path', '--steps=4', kind='gif').n_frames > 1


def test_guidance_may_be_0(digits):
    """Scale 0 ignores the label: all classes give the same image."""
    columns = [np.asarray(draw(digits, '--n=1', '--show=guidance', '--labels=3', f'--seed={seed}')) for seed in (1, 1)]
    assert (columns[0] == columns[1]).all()
    run = lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu')
    for parameter in run.model.parameters():
        parameter.data += 0.1
    settings = lab.module_of('flow').Images(guidance=0.0, steps=2)
    three, five = (lab.module_of('flow').samples(run, settings, np.array([label])) for label in (3, 5))
    assert (three == five).all()


def test_defaults_fit_the_model(digits, points):
    module = lab.module_of('flow')
    images, plane = (lab.open_run(Path(run, 'ckpt_last.pt'), 'cpu') for run in (digits, points))
    assert module.settings_of(images) == module.Images(guidance=2.0, steps=20, n=10)
    assert module.settings_of(plane) == module.Points(guidance=1.0, steps=40, n=4000)
    assert module.scores_of(images).steps == '1,2,4,10,20' and module.scores_of(plane).steps == '1,2,4,20'


def test_guided_evaluations_count_twice():
    module = lab.module_of('flow')
    assert module.nfe(module.Images(steps=20, guidance=2.0)) == 'NFE 20x2'
    assert module.nfe(module.Images(steps=20, method='heun')) == 'NFE 40'


def test_scores_of_digits(digits):
    scores = score.main(f'--out_dir={digits}', '--n_score=20', '--steps=1,2')
    assert {'squared error', 'squared error, t in 0.25..0.5', 'bits/dim given the class', '1 steps, NFE 1x2: frechet',
            '2 steps, NFE 2x2: precision', '2 steps, NFE 2x2: seconds/image'} <= scores.keys()
    assert '1 steps, NFE 1x2: precision' not in scores


def test_points(points):
    scores = score.main(f'--out_dir={points}', '--n_score=20')
    assert {'squared error', 'KL(data || model), nats', 'W2, 1 steps, NFE 1', 'W2, 20 steps, NFE 20'} <= scores.keys()
    assert scores['W2, 1 steps, NFE 1']['floor'] > 0 and scores['KL(data || model), nats']['value'] > 0
    assert draw(points, '--n=50', '--steps=4').size == (6 * 204 - 4, 18 + 2 * 204 - 4)
    for argument, message in (('--compile=True', 'this model is none'), ('--show=path', 'show is a setting of'),
                              ('--labels=1', 'labels is a setting of')):
        with pytest.raises(UserError, match=message):
            sample.main(f'--out_dir={points}', argument)


def test_scenes(work):
    train.main(**RUN | dict(pictures=True), dataset='scenes', out_dir='out/flow_scenes_test', patch_size=8)
    assert Path('out/flow_scenes_test/sample_000002.png').exists()


@pytest.mark.parametrize('arguments, message', [
    (['--steps=-1'], 'steps=-1 must be at least 1'), (['--labels=3,12'], "there is no class '12'"),
    (['--guidance_interval=1'], 'write two times from 0 to 1'),
    (['--guidance_interval=0,1,2'], 'write two times from 0 to 1'),
    (['--guidance_interval=0.8,0.1'], 'guidance_interval=.0.8, 0.1. in 0..1'),
    (['--method=rk4'], "method='rk4' in ..euler', 'midpoint', 'heun'"),
    (['--guidance=inf'], "guidance='inf' is not of type float and finite"), (['--guidance=1e50'], 'guidance=1e.50 must be from -1000 to 1000'),
    (['--show=all'], 'show is one of grid'), (['--labels=x'], 'labels'), (['--labels=10'], 'labels'),
    (['--order=raster'],
     'order is a setting of lab/fourm.py .AnyToAny., lab/maskgit.py .Text., lab/maskgit.py .Images.; here'),
    (['--temperature=0.5'], 'temperature is a setting of lab/fourm.py'),
    (['--n_score=5'], 'n_score is a setting of python -m lab.score')])
def test_faults(digits, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={digits}', *arguments)
    assert '\n' not in str(error.value)
