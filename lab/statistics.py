"""
Scores: 95 % intervals, the file scores.json, tables as text and as Markdown.

A score is dict(value, low, high, n): a value and its 95 % interval from n samples. It may also hold the keys floor or
ceiling, the value of real data; baseline, the value without a model; and shuffled, the value if the model is given the
condition of another sample: a model that ignores its condition has the same value with both.
"""
import json
import shlex

import numpy as np

from config import UserError
from engine.checkpoints import replace

BOUNDS = 'floor', 'ceiling', 'baseline', 'shuffled'


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def wilson(p, n):
    """The 95 % interval of a proportion p of n independent trials (Wilson, 1927): never empty, also for p = 0 and 1."""
    z2 = 1.96 ** 2 / n
    middle, half = (p + z2 / 2) / (1 + z2), (z2 * (p * (1 - p) + z2 / 4)) ** 0.5 / (1 + z2)
    return middle - half if p > 0 else 0.0, middle + half if p < 1 else 1.0


def bootstrap(parts, draws=1000):
    """The score of a metric given as numerators and denominators (n, k, 2) of n samples: the mean over k of the ratio
    of their sums. The interval is from `draws` bootstrap resamples; if each sample is one trial, right or wrong, it is
    Wilson's, and also if all counts are right or all are wrong, where resamples would all be equal."""
    n, random = len(parts), np.random.default_rng(0)

    def value(weight):  # (n,)
        numerator, denominator = np.einsum('n,nkc->ck', weight, parts)
        return np.nanmean(np.where(denominator > 0, numerator / np.maximum(denominator, 1e-12), np.nan))
    whole, (numerator, denominator) = float(value(np.ones(n))), np.moveaxis(parts, -1, 0)
    counts = parts.shape[1] == 1 and (denominator >= numerator).all() and (numerator >= 0).all() and np.any(denominator)
    counts = counts and (parts == np.round(parts)).all()
    if counts and (denominator.max() == 1 or whole in (0, 1)):
        low, high = wilson(whole, (denominator > 0).sum())
    else:
        resampled = [value(random.multinomial(n, np.ones(n) / n).astype(float)) for _ in range(draws)]
        low, high = np.percentile(resampled, (2.5, 97.5))
    return dict(value=whole, low=float(low), high=float(high), n=n)


def alone(value, n):
    """A score without an interval."""
    return dict(value=value, low=value, high=value, n=n)


def judged(metrics):
    """The result of an evaluation in prepare/, {metric: dict(parts or value, bounds)}, as scores."""
    n = max(len(metric.get('parts', ())) for metric in metrics.values())
    return {name: (bootstrap(metric['parts']) if 'parts' in metric else alone(metric['value'], n))
            | {bound: metric[bound] for bound in BOUNDS if bound in metric} for name, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# scores.json

def scores_path(checkpoint, split='val'):
    """The file for the scores of a checkpoint on a split: scores.json for ckpt_last.pt and val, otherwise
    scores_CHECKPOINT_SPLIT.json, in the folder of the checkpoint."""
    parts = ['scores'] + [checkpoint.stem] * (checkpoint.stem != 'ckpt_last') + [split] * (split != 'val')
    return checkpoint.with_name(f'{"_".join(parts)}.json')


def read_scores(path, digest=None):
    """The scores of a file, {} if it does not exist; with a digest only those of that checkpoint. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        scores = found.get('scores', found)  # the files in docs/logs hold the scores alone
        if not all(isinstance(score[key], (int, float))
                   for score in scores.values() for key in ('value', 'low', 'high')):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not a file of scores ({type(error).__name__}); delete it and score again')
    return scores if digest in (None, found.get('checkpoint')) else {}


def save_scores(scores, path, digest):
    """Adds scores to a file, {'checkpoint': digest, 'scores': {...}}, atomically; cheap enough to be called after each
    metric. Scores of the same checkpoint in the file are kept, those of other weights removed. Returns all scores of
    the file.

    digest: checkpoints.digest of the checkpoint, computed when the model was loaded: training may continue while it is
    scored.
    """
    try:
        scores = read_scores(path, digest) | scores
    except UserError:  # damaged
        pass
    new = path.with_suffix('.tmp')
    new.write_text(json.dumps(dict(checkpoint=digest, scores=scores), indent=1), encoding='utf-8')
    replace(new, path)
    return scores


def with_settings(scores, settings, defaults, told):
    """The same scores, each name after the settings {name: value} that differ from the defaults: '--plan=False
    caption>rgb/attributes'. So scores by other settings stand beside each other. `told`: settings that are left out,
    because names or n tell them."""
    changed = [f'--{name}={value}' for name, value in settings.items() if value != defaults[name] and name not in told]
    return {' '.join([*map(shlex.quote, changed), name]): score for name, score in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables

TABLE_HEAD = f'{"":42}{"value":>9}{"95 % interval":>20}' + ''.join(f'{bound:>10}' for bound in BOUNDS)


def table_row(name, score):
    """A score as a line of text under TABLE_HEAD."""
    interval = f'{score["low"]:.4g} .. {score["high"]:.4g}' * (score['low'] < score['high'])  # none of one sample
    bounds = ''.join(f'{score[bound]:10.4g}' if bound in score else f'{"":10}' for bound in BOUNDS)
    return f'{name:42}{score["value"]:9.4g}{interval:>20}{bounds}'


def table(scores):
    """Scores as text."""
    return '\n'.join([TABLE_HEAD, *(table_row(name, score) for name, score in scores.items())])


def cell(value):
    """A value as text in a Markdown table: floats with at least two significant digits, None empty."""
    if isinstance(value, float) and 0 < abs(value) < 0.1:
        return f'{value:.2g}'
    if isinstance(value, float):
        return f'{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}'
    return '' if value is None else str(value).replace('|', '\\|')


def markdown_row(values):
    return f'| {" | ".join(map(cell, values))} |'


def markdown_head(columns):
    """The two header lines of a table that is printed row by row."""
    return f'{markdown_row(columns)}\n|{"---|" * len(columns)}'


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table, '' if there are no rows; a missing column is an empty cell."""
    if not rows:
        return ''
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return '\n'.join([markdown_head(columns), *(markdown_row(row.get(name) for name in columns) for row in rows)])
