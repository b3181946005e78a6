"""lab/maskgit.py on tiny runs: digits, images of codes, texts, scores by order and steps, errors in one line."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lab
import sample
import train
from config import UserError
from lab import score
from tests.toys import GPT, draw, make_digits, make_story

RUN = GPT | dict(model='maskgit')


@pytest.fixture(scope='module')
def digits(work):
    make_digits()
    train.main(**RUN, dataset='toy_mnist', out_dir='out/masked', pictures=True)
    return 'out/masked'


def test_digits(digits):
    assert Path(digits, 'sample_000002.png').exists()
    assert draw(digits, '--n=2', '--steps=2').size == (10 * 60 - 4, 18 + 2 * 60 - 4)
    for shape in ('half', 'box', 'random'):
        columns = np.asarray(draw(digits, '--n=2', '--steps=2', '--complete=0.5', f'--shape={shape}'))[18:]
        truth, given, *samples = (columns[:56, x:x + 56] for x in range(0, 5 * 60, 60))
        known = given[..., 0] != 128
        assert 0.4 < known.mean() < 0.6 and all((image[known] == truth[known]).all() for image in [given, *samples])
        assert (samples[0] != samples[1]).any()
    assert draw(digits, '--n=2', '--show=swap', '--guidance=2').size == (12 * 60 - 4, 18 + 2 * 60 - 4)
    Image.new('L', (28, 28), 255).save('own.png')
    assert draw(digits, '--n=1', '--steps=2', '--show=swap', '--image=own.png', '--labels=3, 5').size == (4 * 60 - 4, 18 + 2 * 60 - 4)


def test_a_schedule_is_written_as_two_ends(digits):
    """'1..3' is guidance 1 at the first step and 3 at the last."""
    one, two, three = (np.asarray(draw(digits, '--n=2', '--steps=3', f'--guidance={s}', f'--temperature={t}'))
                       for s, t in (('2', '0.9'), ('2..2', '0.9..0.9'), ('1..3', '0.9..0.1')))
    assert (one == two).all() and (one != three).any()
    for wrong in ('1..2..3', 'a', '1..', 'nan', '1..inf'):
        with pytest.raises(UserError, match='write a number, or the first and the last, as in 0.9..0.3|guidance=.* must be from -1000 to 1000'):
            draw(digits, f'--guidance={wrong}')


def test_more_steps_than_tokens_unmask_one_token_each(digits):
    one, two = (np.asarray(draw(digits, '--n=2', '--complete=0.5', f'--steps={steps}')) for steps in (25, 49))
    assert (one == two).all()


def test_gifs(digits):
    assert draw(digits, '--n=2', '--steps=4', '--show=gif', '--order=confidence', kind='gif').n_frames == 5
    frames = draw(digits, '--n=2', '--steps=2', '--show=gif', '--complete=0.5', kind='gif')
    assert frames.size == (29 * 4, 14 * 4)  # two held-out images


def test_given_tokens_stay(digits):
    sample.main(f'--out_dir={digits}', '--n=2', '--steps=2', '--show=gif', '--complete=0.5')
    path, = Path(digits).glob('sample_*.gif')
    frames = Image.open(path)
    first, last = (np.asarray([frames.seek(i), frames.convert('L')][1])[:24, :56] for i in (0, 2))
    path.unlink()
    assert (abs(first - 128.0) > 20).all() and (abs(last - first.astype(float)) < 20).all()  # the upper half


def test_too_many_intermediate_states(digits):
    run, module = lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu'), lab.module_of('maskgit')
    tokens = torch.full((1, 49), -1).expand(60_000, 49)
    with pytest.raises(UserError, match='147,000,000 tokens of intermediate states would take 1 GiB: lower n or steps'):
        module.generate(run, module.Images(steps=49), tokens, return_intermediates=True)


def test_binary_digits(digits):
    run = lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu')
    images = lab.module_of('maskgit').digits(run, np.arange(5), 1)
    assert images.shape == (5, 14, 14) and set(np.unique(images)) <= {0, 255}


def test_defaults_fit_the_model(digits):
    settings = lab.module_of('maskgit').settings_of(lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu'))
    assert (settings.steps, settings.temperature, settings.guidance) == (16, '0.8', '1.5')


def test_scores(digits, monkeypatch):
    """A bound below that of a uniform guess; every order and number of steps; the exact value of a GPT beside it."""
    exact = dict(value=0.5, low=0.4, high=0.6, n=9)
    Path('exact.json').write_text(json.dumps({'nats/token': exact}))
    scores = score.main(f'--out_dir={digits}', '--n_score=20', '--steps=1,3', '--against=exact.json')
    assert scores['nats/token, at most']['value'] < np.log(26) and scores['nats/token, at most']['floor'] == 0.5
    per_token, per_image = (scores[f'nats/{name}, at most']['value'] for name in ('token', 'image given the class'))
    assert per_image == pytest.approx(49 * per_token)
    for order in ('confidence', 'random', 'raster', 'halton'):
        names = ('accuracy', 'frechet', 'seconds/image')
        assert {f'{order}, {steps} steps: {name}' for steps in (1, 3) for name in names} <= set(scores)
        assert Path(digits, f'sweep_{order}.png').exists()
    before = len(scores)
    after = score.main(f'--out_dir={digits}', '--n_score=20', '--steps=2', '--order=raster')
    assert len(after) > before  # the others stay
    for arguments, message in ((['--steps=0,4'], 'write numbers of steps'), (['--order=fast'], 'order is one of'),
                               (['--order=raster, fast'], 'order is one of'), (['--steps=8,50'], 'steps=8,50: at most 49'),
                               (['--n_score=4'], 'too few to score'), (['--temperature=a'], 'write a number'),
                               (['--choice_temperature=4'], 'needs order=confidence'),
                               (['--against=none.json'], 'no such file'), (['--against=other.json'], 'has no nats/token'),
                               (['--against=broken.json'], 'not a file of scores')):
        Path('broken.json').write_text('[1]'), Path('other.json').write_text(json.dumps({'accuracy': exact}))
        monkeypatch.setattr(lab.module_of('maskgit'), 'bounds', None)  # all are refused before any work
        with pytest.raises(UserError, match=message):
            score.main(f'--out_dir={digits}', *arguments)


def test_images_of_codes(work):
    """Codes of four digits and no classes: no guidance and nothing to swap."""
    train.main(**RUN, dataset='scenes', out_dir='out/masked_scenes')
    assert Image.open('out/masked_scenes/sample_000002.png').size == (6 * 68 - 4, 18 + 10 * 68 - 4)
    columns = draw('out/masked_scenes', '--n=2', '--steps=2', '--complete=0.5')
    assert columns.size == (5 * 68 - 4, 18 + 2 * 68 - 4)
    truth, given = (np.asarray(columns)[18:18 + 32, x:x + 64] for x in (0, 68))  # the upper half is given
    assert (truth == given).all()  # the colors beside the hole, too
    assert score.main('--out_dir=out/masked_scenes')['nats/image, at most']['value'] < 64 * np.log(65536) + 1
    for argument, message in (('--guidance=2', 'needs a model trained with classes and label_dropout'),
                              ('--labels=3', "labels='3': this model has no classes: leave it out"),
                              ('--show=swap', 'needs a model with classes')):
        with pytest.raises(UserError, match=message):
            sample.main('--out_dir=out/masked_scenes', argument)


def test_texts(work, capsys):
    make_story()
    train.main(**RUN, dataset='story', block_size=16, out_dir='out/masked_story')
    assert Path('out/masked_story/sample_000002.txt').exists()
    capsys.readouterr()
    sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--n=2')
    assert [text.startswith('The cat') for text in capsys.readouterr().out.split('\n-----\n')] == [True, True]
    sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--after= mat.', '--gap=3')
    assert ' mat.' in capsys.readouterr().out
    scores = score.main('--out_dir=out/masked_story')
    assert list(scores) == ['nats/token, at most'] and scores['nats/token, at most']['value'] < np.log(278) + 0.01
    with pytest.raises(UserError, match='the prompt fills all 16 tokens that this model generates: shorten it'):
        sample.main('--out_dir=out/masked_story', f'--prompt={lab.open_run(Path("out/masked_story/ckpt_last.pt"), "cpu").dataset.decode([1] * 16)}')
    with pytest.raises(UserError, match='gap=3 needs after'):
        sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--gap=3')
    for argument, message in (('--gap=50', 'prompt, gap and after have 54 tokens, this model generates 16'),
                              ('--gap=0', 'at least 1'), ('--complete=0.5', 'complete is a setting of')):
        with pytest.raises(UserError, match=message):
            sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--after= mat.', argument)


@pytest.mark.parametrize('arguments, message', [
    (['--steps=0'], 'steps=0: 49 tokens are unknown'),
    (['--order=fast'], "order is one of .'confidence', 'random', 'raster', 'halton'"),
    (['--schedule=fast'], "schedule one of .'cosine', 'linear', 'constant'"),
    (['--shape=round'], 'shape one of half, box, random'),
    (['--show=all'], 'show is one of grid, gif, swap'),
    (['--complete=1'], 'complete=1.0 must be at least 0 and below 1'),
    (['--complete=0.999'], 'complete=0.999: all 49 tokens are given: lower it'),
    (['--image=none.png'], 'image and shape need complete'), (['--shape=box'], 'image and shape need complete'),
    (['--labels=3', '--complete=0.5'], 'held-out images are completed in their own classes'),
    (['--choice_temperature=-1'], 'choice_temperature in 0..1000'), (['--choice_temperature=5'], 'choice_temperature=5.0 needs order=confidence'),
    (['--temperature=-1'], "temperature='-1': must be 0"),
    (['--prompt=hello'], 'prompt is a setting of'),
    (['--chain=rgb>depth'],
     r'chain is a setting of lab/fourm.py \(AnyToAny\); here are those of lab/maskgit.py \(Images\)'),
    (['--min_p=0.1'], r'min_p is a setting of lab/gpt.py \(Text\), lab/gpt.py \(Images\), lab/vlm.py'),
    (['--against=exact.json'], 'against is a setting of python -m lab.score'),
])
def test_faults(digits, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={digits}', *arguments)
    assert '\n' not in str(error.value)
