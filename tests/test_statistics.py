"""Scores: intervals, the file that belongs to one checkpoint, tables."""
import json
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


def test_tables():
    score = dict(value=1.25, low=1.0, high=1.5, n=9, ceiling=4.0)
    head, row = statistics.table({'nats/token': score}).splitlines()
    assert row.split() == ['nats/token', '1.25', '1', '..', '1.5', '4'] and len(head) == len(row) == 101
    assert row.index('4') == head.index('ceiling') + len('ceiling') - 1
    assert statistics.markdown_table([]) == ''
    rows = [dict(name='a|b', speed=1234.5, n=3), dict(name='c', share=0.1234, none=None)]
    assert statistics.markdown_table(rows).splitlines() == [
        '| name | speed | n | share | none |', '|---|---|---|---|---|',
        '| a\\|b | 1,234 | 3 |  |  |', '| c |  |  | 0.12 |  |']
