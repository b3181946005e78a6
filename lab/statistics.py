"""
Scores: bootstrap intervals, the file scores.json, tables as text and as Markdown.

A score is dict(value, low, high, n), where low and high are a 95 % interval from n samples. It may also hold the bounds floor
and ceiling, what real data reach, and baseline, what chance does.
"""
import json
import os

import numpy as np

from config import UserError

BOUNDS = 'floor', 'ceiling', 'baseline'


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def bootstrap(parts, draws=1000):
    """The score of a metric given as numerators and denominators (n, k, 2) of n samples: the mean over k of the ratio of their
    sums. The interval comes from `draws` resamplings of the n samples."""
    n, random = len(parts), np.random.default_rng(0)

    def value(weight):  # (n,)
        numerator, denominator = np.einsum('n,nkc->ck', weight, parts)
        return np.nanmean(np.where(denominator > 0, numerator / np.maximum(denominator, 1e-12), np.nan))
    resampled = [value(random.multinomial(n, np.ones(n) / n).astype(float)) for _ in range(draws)]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return dict(value=float(value(np.ones(n))), low=float(low), high=float(high), n=n)


def alone(value, n):
    """A score without an interval."""
    return dict(value=value, low=value, high=value, n=n)


def judged(metrics):
    """What a judge of prepare/ returns, {metric: dict(parts or value, bounds)}, as scores."""
    n = max(len(metric.get('parts', ())) for metric in metrics.values())
    return {name: (bootstrap(metric['parts']) if 'parts' in metric else alone(metric['value'], n))
            | {bound: metric[bound] for bound in BOUNDS if bound in metric} for name, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# scores.json

def scores_path(checkpoint, split='val'):
    """The file for the scores of a checkpoint on a split: scores.json in its folder for ckpt_last.pt and val, otherwise
    scores_CHECKPOINT_SPLIT.json."""
    parts = ['scores'] + [checkpoint.stem] * (checkpoint.stem != 'ckpt_last') + [split] * (split != 'val')
    return checkpoint.with_name(f'{"_".join(parts)}.json')


def read_scores(path, digest=None):
    """The scores of a file, {} if it does not exist; with a digest only those of that checkpoint. Raises UserError."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
        scores = found.get('scores', found)  # the files in docs/logs hold the scores alone
        assert all(isinstance(score[key], (int, float)) for score in scores.values() for key in ('value', 'low', 'high'))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f'{path}: not a file of scores ({type(error).__name__}); delete it and compute the scores again')
    return scores if digest in (None, found.get('checkpoint')) else {}


def save_scores(scores, path, digest):
    """Writes {'checkpoint': digest, 'scores': scores}, atomically and cheaply enough to be called after each metric. Scores of the
    same checkpoint that are in the file stay; those of other weights go. Returns all that the file holds.

    digest: checkpoints.digest of the checkpoint, computed when the model was loaded: a run may go on while it is scored.
    """
    try:
        scores = read_scores(path, digest) | scores
    except UserError:  # damaged
        pass
    new = path.with_suffix('.tmp')
    new.write_text(json.dumps(dict(checkpoint=digest, scores=scores), indent=1))
    os.replace(new, path)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Tables

TABLE_HEAD = f'{"":42}{"value":>9}{"95 % interval":>20}' + ''.join(f'{bound:>10}' for bound in BOUNDS)


def table_row(name, score):
    """A score as a line of text below TABLE_HEAD."""
    interval = f'{score["low"]:.4g} .. {score["high"]:.4g}'
    bounds = ''.join(f'{score[bound]:10.4g}' if bound in score else f'{"":10}' for bound in BOUNDS)
    return f'{name:42}{score["value"]:9.4g}{interval:>20}{bounds}'


def table(scores):
    """Scores as text."""
    return '\n'.join([TABLE_HEAD, *(table_row(name, score) for name, score in scores.items())])


def cell(value):
    """A value as text in a Markdown table: floats with two or three significant digits, None empty."""
    if isinstance(value, float):
        return f'{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}'
    return '' if value is None else str(value).replace('|', '\\|')


def markdown_row(values):
    return f'| {" | ".join(map(cell, values))} |'


def markdown_head(columns):
    """The two lines above the rows of a table that is printed row by row."""
    return f'{markdown_row(columns)}\n|{"---|" * len(columns)}'


def markdown_table(rows):
    """Rows [{column: value}] as a Markdown table, '' if there are none; a cell is empty if its row lacks the column."""
    if not rows:
        return ''
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return '\n'.join([markdown_head(columns), *(markdown_row(row.get(name) for name in columns) for row in rows)])
