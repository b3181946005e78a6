"""
What sample.py leaves behind: grids of pictures and GIFs, and tables of scores with bootstrap intervals.
"""
import contextlib
import json
import textwrap
from itertools import cycle

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import UserError

COLORS = '#2a5caa', '#d1495b', '#2e8b57', '#e08e0b', '#7a4fa3', '#3d9bb3', '#8c5a44', '#666666'


class Pen:
    """Draws on paper S times as large as its units; what is kept is half as large, so that lines come out smooth."""
    S = 4

    def __init__(self, width, height):
        self.paper = Image.new('RGB', (self.S * width, self.S * height), 'white')
        self.draw, self.font = ImageDraw.Draw(self.paper), ImageFont.load_default(12 * self.S)

    def text(self, x, y, words, anchor, color='#444444'):
        self.draw.text((self.S * x, self.S * y), words, color, self.font, anchor)

    def line(self, points, color, thick):
        self.draw.line([(self.S * x, self.S * y) for x, y in points], color, round(self.S * thick), joint='curve')

    def dot(self, x, y, color):
        self.draw.circle((self.S * x, self.S * y), 3.4 * self.S, 'white', color, round(1.8 * self.S))

    def save(self, path):
        self.paper.resize((self.paper.width // 2, self.paper.height // 2), Image.LANCZOS).save(path, optimize=True)
        print(f'wrote {path}')


def save_grid(columns, path, scale=2):
    """Columns of equally large pictures under their titles, as one PNG."""
    some = next(iter(columns.values()))
    side, rows, gap, head = some[0].shape[0] * scale, len(some), 4, 18
    canvas = Image.new('RGB', (len(columns) * (side + gap) - gap, head + rows * (side + gap) - gap), 'white')
    draw = ImageDraw.Draw(canvas)
    for x, (title, pictures) in enumerate(columns.items()):
        draw.text((x * (side + gap) + 2, 3), title, fill='black')
        for y, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture).resize((side, side), Image.NEAREST), (x * (side + gap), head + y * (side + gap)))
    canvas.save(path, optimize=True)
    print(f'wrote {path}')


def save_gif(frames, path, scale=2, seconds=3.0):
    """Frames (T, H, W) or (T, H, W, 3) uint8 as an animation of about so many seconds, the last one shown longer."""
    large = [Image.fromarray(frame).convert('RGB').quantize(24, dither=Image.Dither.NONE)  # few colors: noise does not compress
             .resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.NEAREST) for frame in np.asarray(frames)]
    each = max(20, int(1000 * seconds / len(large)))  # milliseconds
    large[0].save(path, save_all=True, append_images=large[1:], duration=[each] * (len(large) - 1) + [1500], loop=0)
    print(f'wrote {path}')


def tile(pictures, columns, gap=1):
    """Pictures (n, H, W, ...) side by side in rows of `columns`, on grey: one picture."""
    pictures = np.asarray(pictures)
    n, H, W = pictures.shape[:3]
    rows = -(-n // columns)
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, *pictures.shape[3:]), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = picture
    return sheet


def save_curves(curves, path, title):
    """Curves {name: {x: score}} of scores from 0 to 1 with their intervals as a PNG; the values of x stand equally far apart."""
    width, height, left, top = 420, 240, 52, 60
    pen, xs = Pen(left + width + 20, top + height + 30), list(next(iter(curves.values())))

    def place(x, score):
        return left + width * (xs.index(x) + 0.5) / len(xs), top + height * (1 - score)
    pen.text(left, 16, title, 'lm')
    for tenth in range(0, 11, 2):
        y = top + height * (1 - tenth / 10)
        pen.line([(left, y), (left + width, y)], '#e6e6e6', 0.8)
        pen.text(left - 8, y, f'{tenth * 10} %', 'rm')
    for i, ((name, curve), color) in enumerate(zip(curves.items(), cycle(COLORS))):
        pen.line([place(x, score['value']) for x, score in curve.items()], color, 2)
        for x, score in curve.items():
            pen.line([place(x, score['low']), place(x, score['high'])], color, 1)
        pen.text(left + 110 * i, 38, name, 'lm', color)
    for x in xs:
        pen.text(place(x, 0)[0], top + height + 8, x, 'mt')
    pen.save(path)


def save_answers(pictures, talks, path, side=160):
    """Pictures (n, H, W, 3) uint8 with what was asked about them, talks [[(question, answer, truth), ...], ...]: right answers
    green, wrong ones red with the truth behind. Long ones take several lines."""
    width, line, columns = 620, 13, []
    for talk in talks:
        said = [(text, x, color) for question, answer, truth in talk for text, x, color in (
            (question, 8, 'black'), (answer, 20, 'green') if answer == truth else (f'{answer} (right: {truth})', 20, 'red'))]
        columns.append([(part, x, color) for text, x, color in said for part in textwrap.wrap(text, 72)])
    high = [max(side, line * len(column) + 4) + 8 for column in columns]
    canvas = Image.new('RGB', (width, sum(high)), 'white')
    draw = ImageDraw.Draw(canvas)
    for i, (picture, column) in enumerate(zip(pictures, columns)):
        y = sum(high[:i])
        canvas.paste(Image.fromarray(picture).resize((side, side), Image.NEAREST), (0, y))
        for j, (text, x, color) in enumerate(column):
            draw.text((side + x, y + j * line), text, fill=color)
    canvas.save(path, optimize=True)
    print(f'wrote {path}')


def bootstrap(parts, draws=1000):
    """Value and bootstrap 95 % interval of a metric given as (n, k, 2) numerators and denominators: the mean over k of the ratio
    of sums over the n samples."""
    n, random = len(parts), np.random.default_rng(0)

    def value(weight):  # (n,)
        num, den = np.einsum('n,nkc->ck', weight, parts)
        return np.nanmean(np.where(den > 0, num / np.maximum(den, 1e-12), np.nan))
    resampled = [value(random.multinomial(n, np.ones(n) / n).astype(float)) for _ in range(draws)]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return dict(value=float(value(np.ones(n))), low=float(low), high=float(high), n=n)


def alone(value, n):
    """A score without an interval, in the form of the others."""
    return dict(value=value, low=value, high=value, n=n)


def judged(found):
    """What a judge says, {metric: dict(parts or value, bounds)}, as scores."""
    n = max(len(score.get('parts', ())) for score in found.values())
    return {name: (bootstrap(score['parts']) if 'parts' in score else alone(score['value'], n))
            | {bound: value for bound, value in score.items() if bound not in ('parts', 'value')} for name, score in found.items()}


def table(scores):
    """scores.json as lines of text."""
    lines = [f'{"":42}{"value":>9}{"95 % interval":>20}{"floor":>10}{"ceiling":>10}{"baseline":>10}']
    for name, score in scores.items():
        interval = f'{score["low"]:.4g} .. {score["high"]:.4g}'
        bounds = ''.join(f'{score[key]:10.4g}' if key in score else f'{"":10}' for key in ('floor', 'ceiling', 'baseline'))
        lines.append(f'{name:42}{score["value"]:9.4g}{interval:>20}{bounds}')
    return '\n'.join(lines)


def read_scores(path):
    """scores.json, {} where there is none. Raises UserError."""
    try:
        scores = json.loads(path.read_text()) if path.is_file() else {}
        assert all(isinstance(score[key], (int, float)) for score in scores.values() for key in ('value', 'low', 'high'))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f'{path}: not a file of scores ({type(error).__name__}); make it anew with --score=True')
    return scores


def save_scores(scores, path):
    """Adds the scores to those in scores.json, and shows them as a table. What is older than the run's checkpoint was of other
    weights, and goes."""
    kept, weights = {}, max((file.stat().st_mtime_ns for file in path.parent.glob('ckpt_*.pt')), default=0)
    if path.is_file() and path.stat().st_mtime_ns > weights:
        with contextlib.suppress(UserError):  # damaged
            kept = read_scores(path)
    new = path.with_suffix('.tmp')
    new.write_text(json.dumps(kept | scores, indent=1))
    new.replace(path)  # at once: what was there is never lost
    others = len(kept.keys() - scores.keys())
    print(f'{table(scores)}\nwrote {path}' + f' (others that stay there: {others})' * (others > 0))
