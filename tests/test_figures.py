"""Figures: sizes, colors, text that stays inside, and curves of any values."""
import sys

import numpy as np
import pytest
from PIL import Image

from lab import figures
from lab.statistics import alone


def read(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def has(image, color):
    """Whether a color '#rrggbb' is in an image."""
    return (image == [int(color[i:i + 2], 16) for i in (1, 3, 5)]).all(-1).any()


def test_a_grid(tmp_path):
    images = [np.full((4, 6, 3), value, np.uint8) for value in (50, 100, 150)]
    figures.save_grid(dict(one=images, two=images), tmp_path / 'x.png', scale=3)
    image = read(tmp_path / 'x.png')
    assert image.shape == (18 + 3 * 16 - 4, 2 * 22 - 4, 3)
    assert [image[18 + 16 * i, 22, 0] for i in range(3)] == [50, 100, 150]
    figures.save_grid(dict(one=images[:1], small=[np.zeros((2, 3, 3), np.uint8)]), tmp_path / 'x.png', scale=3)
    assert (read(tmp_path / 'x.png')[18:, 22:] == 0).all()  # as large as the first


def test_a_gif(tmp_path):
    figures.save_gif(np.arange(3, dtype=np.uint8).reshape(3, 1, 1).repeat(5, 1).repeat(7, 2) * 100, tmp_path / 'x.gif')
    image = Image.open(tmp_path / 'x.gif')
    assert image.n_frames == 3 and image.size == (14, 10)
    image.seek(2)
    assert image.convert('L').getpixel((0, 0)) == 200


def test_tiles():
    sheet = figures.tile(np.full((3, 2, 2), 7, np.uint8), 2)
    assert sheet.shape == (5, 5) and (sheet == 7).sum() == 12 and sheet[0, 2] == 128


def test_long_answers_stay_in_the_image(tmp_path):
    talks = [[('What is there?', 'a large red metal sphere, ' * 40, 'nothing')] * 2, [('Is there a cube?', 'yes', 'yes')]]
    figures.save_answers(np.zeros((2, 64, 64, 3), np.uint8), talks, tmp_path / 'long.png')
    image = read(tmp_path / 'long.png')
    inked = (image[:, 160:] < 255).any((1, 2))
    assert (image[:, -20:] == 255).all() and 30 * 13 < inked[:-168].nonzero()[0].max() < len(inked) - 168  # 15 lines each


@pytest.mark.parametrize('losses', [[2.0], [2.0, 2.0], [-1.0, 3.0], [5.0, float('nan'), 4.0], [1e-8, 1e8], [7.9, 7.95]])
def test_losses_of_any_size(losses, tmp_path):
    lines = [dict(step=i, seconds=5000.0 * i, val_loss=loss, train_loss=loss) for i, loss in enumerate(losses)]
    figures.save_losses({'a': lines}, tmp_path / 'a.png')
    image = read(tmp_path / 'a.png')[100:]  # below the legend
    assert (tmp_path / 'a.png').stat().st_size < 100_000 and 1200 < image.shape[1] < 2000
    near = (abs(image - [0x2a, 0x5c, 0xaa]).sum(-1) < 30).any(0)
    assert near[:len(near) // 2].any() and near[len(near) // 2:].any()  # in both panels


def test_losses_of_several_runs(tmp_path):
    """Each in its own color; one that has no training losses yet; no state of pyplot."""
    lines = [dict(step=100 * i, seconds=i, val_loss=2.0 ** -i, train_loss=2.0 ** -i) for i in range(5)]
    figures.save_losses(dict(a=lines, b=[line | dict(train_loss=None) for line in lines[:1]]), tmp_path / 'a.png')
    assert all(has(read(tmp_path / 'a.png'), color) for color in figures.COLORS[:2])
    assert 'matplotlib.pyplot' not in sys.modules


def test_ticks_are_few_and_plain():
    for low, high in ((1.4, 4.2), (0.15, 0.16), (1e-5, 30), (0.05, 10), (-3, 2), (0, 1), (7.9, 8.0), (2, 2)):
        figure, (axes,) = figures.plot(5, 4)
        axes.plot([0, 1], [low, high])
        figures.scale_losses(axes, low, high)
        figure.draw_without_rendering()
        bottom, top = sorted(axes.get_ylim())
        shown = [tick.get_text() for place, tick in zip(axes.get_yticks(), axes.get_yticklabels()) if bottom <= place <= top]
        assert 2 <= len(shown) <= 10 and all(len(text) <= 6 for text in shown), (low, high, shown)


def test_score_curves(tmp_path):
    curves = {way: {x: alone(value, 9) | dict(low=value - 0.1, high=value + 0.1) for x, value in (('50', 0.4), ('1,000', 0.8))}
              for way in ('probe', 'scratch')}
    figures.save_curves(curves, tmp_path / 'x.png', 'title', 'labels', ('chance', 0.1))
    image = read(tmp_path / 'x.png')
    assert all(has(image, color) for color in (*figures.COLORS[:2], '#888888'))
