"""lab/flow.py on tiny runs: digits, points, sweeps, scores, logits, faults in one line."""
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flow
import lab
import sample
import train
from config import UserError
from lab import flow as lab_flow
from lab import score
from prepare import toy2d
from tests.test_flow import RUN, gaussian_velocity
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


@pytest.mark.parametrize('off', [torch.inference_mode, torch.no_grad])
def test_gradients_that_an_earlier_cell_switched_off(points, off):
    """A likelihood needs them."""
    with off():
        assert draw(points, '--n=20', '--steps=2')
        assert math.isfinite(score.main(out_dir=points, device='cpu', n_score=1, steps='1')['KL(data || model), nats']['value'])


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
    assert module.nfe(module.Images(steps=20, method='heun', guidance_interval='0.1,0.8')) == 'NFE 40'
    assert module.nfe(module.Images(steps=2, guidance=2.0, guidance_interval='0.1,0.8')) == 'NFE 2x2 in 0.1,0.8'


def test_scores_of_digits(digits, monkeypatch):
    scores = score.main(f'--out_dir={digits}', '--n_score=20', '--steps=1,2')
    assert {'squared error', 'squared error, t in 0.25..0.5', 'bits/dim given the class', '1 steps, NFE 1x2: frechet',
            '2 steps, NFE 2x2: precision', '2 steps, NFE 2x2: seconds/image'} <= scores.keys()
    assert '1 steps, NFE 1x2: precision' not in scores
    monkeypatch.setattr(lab_flow, 'squared_errors', None)
    for argument, message in (('--n_score=4', '4 images are too few'), ('--steps=a', 'write numbers of steps'),
                              ('--method=rk4', 'rk4'), ('--guidance_interval=1', 'write two times')):  # before any work
        with pytest.raises(UserError, match=message):
            score.main(f'--out_dir={digits}', argument)


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


# ---------------------------------------------------------------------------------------------------------------------
# Images as logits

def logit_run(**model):
    """A run whose model sees one pixel as a logit."""
    return SimpleNamespace(device='cpu', exact=nullcontext,
                           model=SimpleNamespace(config=flow.Config(image_size=1, patch_size=1, logits=True), **model))


def test_all_grey_levels_survive_as_logits():
    image = torch.arange(256).repeat(400).view(1, 320, 320)
    y = flow.dequantize(image, torch.Generator().manual_seed(0), True)
    assert y.isfinite().all() and y.abs().max() < 2.31 and y[:, image == 0].std() > 0.15  # of pixels: 0.0023
    assert torch.equal(lab_flow.to_uint8(lab_flow.from_logits(y))[..., 0].long(), image)
    run = logit_run(generate=lambda label, *settings: (y[None], 1))
    assert torch.equal(lab_flow.to_uint8(lab_flow.trajectories(run, lab_flow.Images(), [0]))[0, ..., 0].long(), image)


def test_the_density_of_pixels_is_that_of_their_logits_times_the_slope():
    run = logit_run(velocity_fn=lambda label: gaussian_velocity(-0.3, 0.4))
    x = torch.linspace(-1, 1, 20_001, dtype=torch.double)[:-1, None, None, None] + 5e-5  # middles of intervals
    y = torch.logit(0.5 + (0.5 - flow.MARGIN) * x) / flow.SCALE
    found = lab_flow.likelihoods(run, y, torch.zeros(len(y)).long(), 1e-6, len(y))
    slope = (y.diff(dim=0, append=2 * y[-1:] - y[-2:-1]) / 1e-4).log()
    truth = slope - ((y + 0.3) / 0.4).square() / 2 - math.log(0.4 * math.sqrt(2 * math.pi))
    assert (found - truth.flatten())[1000:-1000].abs().max() < 1e-2  # the slope by differences
    assert found.exp().mean().item() * 2 == pytest.approx(1, abs=1e-3)  # a density of x in -1..1


def test_a_run_on_logits(work):
    make_digits()
    train.main(**RUN, dataset='toy_mnist', out_dir='out/flow_logits', patch_size=14, logits=True)
    assert draw('out/flow_logits', '--n=2', '--steps=2').size[0] == 10 * 60 - 4
    assert score.main('--out_dir=out/flow_logits', '--n_score=20', '--steps=1')['bits/dim given the class']['value'] < 8


@pytest.mark.parametrize('arguments, message', [
    (['--steps=-1'], 'steps=-1 must be > 0'), (['--labels=3,12'], "there is no class '12'"),
    (['--labels=3,5,3'], "labels='3,5,3': name each class once; n is the number of images of each"),
    (['--guidance_interval=1'], 'write two times from 0 to 1'),
    (['--guidance_interval=0,1,2'], 'write two times from 0 to 1'),
    (['--guidance_interval=0.8,0.1'], 'guidance_interval=.0.8, 0.1. rising in 0..1'),
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
