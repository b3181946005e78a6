"""Scores: intervals, the file that belongs to one checkpoint, tables."""
import json
import math
import shutil

import numpy as np
import pytest

from config import UserError
from engine import checkpoints
from lab import statistics
from lab.statistics import alone, read_scores, save_scores


def values(scores):
    return {name: score['value'] for name, score in scores.items()}


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a checkpoint and scores of it."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'ckpt_last.pt').write_bytes(b'weights')
    save_scores(dict(a=alone(1.0, 5), b=alone(1.0, 5)), folder / 'scores.json', checkpoints.digest(folder / 'ckpt_last.pt'))
    return folder


def add(folder, **scores):
    """Saves scores of the checkpoint as it is now; returns the values in the file."""
    save_scores({name: alone(value, 5) for name, value in scores.items()}, folder / 'scores.json',
                checkpoints.digest(folder / 'ckpt_last.pt'))
    return values(read_scores(folder / 'scores.json'))


def test_scores_of_the_same_weights_are_kept(run):
    assert add(run, b=2.0, c=3.0) == dict(a=1, b=2, c=3) and not list(run.glob('*.tmp'))


@pytest.mark.parametrize('copy', [shutil.copy, shutil.copy2])
def test_a_copied_run_keeps_its_scores(run, tmp_path, copy):
    moved = tmp_path / 'moved'
    moved.mkdir()
    for name in ('scores.json', 'ckpt_last.pt'):  # without times the checkpoint is the newer file
        copy(run / name, moved / name)
    assert add(moved, c=3.0) == dict(a=1, b=1, c=3)
    assert add(shutil.copytree(run, tmp_path / 'tree'), c=3.0) == dict(a=1, b=1, c=3)


def test_scores_of_other_weights_go(run):
    (run / 'ckpt_last.pt').write_bytes(b'weights after more training')
    digest = checkpoints.digest(run / 'ckpt_last.pt')
    assert read_scores(run / 'scores.json', digest) == {} and values(read_scores(run / 'scores.json')) == dict(a=1, b=1)
    assert add(run, c=3.0) == dict(c=3)


@pytest.mark.parametrize('text', [
    '{', '[1]', '{"a": 1}', '{"scores": {"a": {"value": 1}}}', '{"a": {"value": "x", "low": 1, "high": 1}}'])
def test_a_damaged_file(run, text):
    (run / 'scores.json').write_text(text)
    with pytest.raises(UserError, match='not a file of scores') as error:
        read_scores(run / 'scores.json')
    assert '\n' not in str(error.value) and add(run, c=3.0) == dict(c=3)


def test_files_of_scores_alone(tmp_path):
    """As those in docs/logs: no checkpoint is known."""
    (tmp_path / 'x.json').write_text(json.dumps(dict(a=alone(1.0, 5))))
    assert values(read_scores(tmp_path / 'x.json')) == dict(a=1) and read_scores(tmp_path / 'none.json') == {}


def test_paths(tmp_path):
    assert statistics.scores_path(tmp_path / 'ckpt_last.pt').name == 'scores.json'
    assert statistics.scores_path(tmp_path / 'ckpt_best.pt').name == 'scores_ckpt_best.json'
    assert statistics.scores_path(tmp_path / 'ckpt_best.pt', 'test') == tmp_path / 'scores_ckpt_best_test.json'


def test_bootstrap():
    parts = np.stack((np.arange(100.0), np.full(100, 2.0)), -1)[:, None]
    score = statistics.bootstrap(parts)
    assert score['value'] == pytest.approx(49.5 / 2) and score['n'] == 100
    error = np.arange(100).std() / 2 / 10
    assert score['high'] - score['low'] == pytest.approx(2 * 1.96 * error, rel=0.15)


def proportion(right, n):
    """The score of `right` of n independent trials."""
    return statistics.bootstrap(np.stack((np.arange(n) < right, np.ones(n)), -1)[:, None].astype(float))


def test_intervals_of_proportions():
    """Wilson's; the reference values are from R's binom.confint(..., methods='wilson')."""
    for right, n, low, high in ((100, 100, 0.9630, 1.0), (0, 100, 0.0, 0.0370), (5, 10, 0.2366, 0.7634), (49, 50, 0.8950, 0.9965)):
        score = proportion(right, n)
        assert (score['value'], score['n']) == (right / n, n)
        assert score['low'] == pytest.approx(low, abs=1e-4) and score['high'] == pytest.approx(high, abs=1e-4)


def test_the_interval_of_a_proportion_covers_it():
    """In 92 % of all experiments with 50 trials of probability 0.98; the bootstrap's would in 65 %."""
    scores = [proportion(right, 50) for right in range(51)]
    chance = [math.comb(50, right) * 0.98 ** right * 0.02 ** (50 - right) for right in range(51)]
    assert sum(p for p, score in zip(chance, scores) if score['low'] <= 0.98 <= score['high']) > 0.92


def test_intervals_of_other_ratios():
    """Several objects per sample: resampled, unless all are right; trials that do not count are left out of n."""
    parts = np.array([[[3.0, 3.0]]] * 20)
    assert statistics.bootstrap(parts)['low'] == pytest.approx(20 / (20 + 1.96 ** 2)) and statistics.bootstrap(parts)['high'] == 1
    parts[:10, 0, 0] = 1
    score = statistics.bootstrap(parts)
    assert score['value'] == pytest.approx(2 / 3) and 0.5 < score['low'] < 0.6 and 0.7 < score['high'] < 0.82
    parts = np.concatenate((np.stack((np.ones(20), np.ones(20)), -1), np.zeros((20, 2))))[:, None]
    assert statistics.bootstrap(parts)['low'] == pytest.approx(20 / (20 + 1.96 ** 2))
    parts = np.array([[[0.2, 1.0]], [[0.9, 1.0]]] * 20)  # not counts
    assert statistics.bootstrap(parts)['value'] == pytest.approx(0.55) and statistics.bootstrap(parts)['low'] > 0.4
    assert statistics.bootstrap(np.ones((9, 2, 2)))['low'] == 1  # a mean over two classes


def test_tables():
    score = dict(value=1.25, low=1.0, high=1.5, n=9, ceiling=4.0)
    head, row = statistics.table({'nats/token': score}).splitlines()
    assert row.split() == ['nats/token', '1.25', '1', '..', '1.5', '4'] and len(head) == len(row) == 111
    assert row.index('4') == head.index('ceiling') + len('ceiling') - 1
    assert statistics.markdown_table([]) == ''
    rows = [dict(name='a|b', speed=1234.5, n=3), dict(name='c', share=0.1234, none=None), dict(name=0.0, share=0.0042)]
    assert statistics.markdown_table(rows).splitlines() == [
        '| name | speed | n | share | none |', '|---|---|---|---|---|',
        '| a\\|b | 1,234 | 3 |  |  |', '| c |  |  | 0.12 |  |', '| 0.00 |  |  | 0.0042 |  |']


def test_one_sample_has_no_interval():
    score = statistics.bootstrap(np.array([[[2.068, 1.0]]]))
    assert statistics.table_row('nll', score).split() == ['nll', '2.068'] and score['n'] == 1
    assert '..' in statistics.table_row('nll', statistics.bootstrap(np.array([[[2.0, 1.0]], [[3.0, 1.0]]])))
