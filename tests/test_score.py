"""lab/score.py: what it prints and keeps, cell by cell; the cells of nano4M; interruptions."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import lab
import train
from config import UserError
from lab import fourm, retrieval, score
from lab.statistics import read_scores
from tests.tiny import TINY


@pytest.fixture(scope='module')
def out_dir(work):
    train.main(**(TINY | dict(out_dir='out/scored', max_iters=2)))
    return 'out/scored'


def cells(scores):
    return {name.split('/')[0] for name in scores if '>' in name}


def test_every_cell(out_dir, capsys):
    scores = score.main(f'--out_dir={out_dir}', '--n_score=6', '--steps=2')
    assert scores == read_scores(Path(out_dir, 'scores.json')) and len(cells(scores)) == 30
    scores = {name.removeprefix('--steps=2 '): one for name, one in scores.items()}
    for name, one in scores.items():
        assert one['low'] <= one['value'] <= one['high'] and one['n'] == 6, name
        if '>' in name and not name.endswith('/ms a scene'):
            assert {'ceiling', 'baseline'} <= one.keys()
    assert scores['caption>scene_desc/attributes']['ceiling'] == 1 and 'parser on true renders/attributes' in scores
    printed = capsys.readouterr().out
    assert printed.count('95 % interval') == 1 and printed.count('rgb>depth/absrel_objects') == 1
    assert not any('recall' in name for name in scores)  # for the record alone


def test_some_cells(out_dir):
    """They are added to those that are there, also by other settings; chains have a file of their own."""
    score.main(f'--out_dir={out_dir}', '--n_score=6', '--target=normal')
    plain = score.main(f'--out_dir={out_dir}', '--n_score=4', '--given=depth,rgb', '--target=normal')
    both = score.main(f'--out_dir={out_dir}', '--n_score=4', '--given=rgb', '--target=normal', '--hide=rgb=outside 8,8,32,32')
    assert both.items() > plain.items() and "'--hide=rgb=outside 8,8,32,32' rgb>normal/ms a scene" in both
    assert {name.split('/')[0] for name, one in plain.items() if one['n'] == 4} == {'depth>normal', 'rgb>normal'}
    assert {name.split('/')[0] for name, one in both.items() if one['n'] == 6} >= {'caption>normal', 'segmentation>normal'}
    score.main(f'--out_dir={out_dir}', '--n_score=4', '--chain=caption>segmentation,rgb:g3;caption>rgb:g3')
    chains = read_scores(Path(out_dir, 'scores_chains.json'))
    assert {'caption>segmentation,rgb:g3/segmentation/miou_objects', 'caption>segmentation,rgb:g3/rgb/attributes',
            'caption>rgb:g3/attributes', 'caption>rgb:g3/ms a scene'} <= chains.keys()
    assert read_scores(Path(out_dir, 'scores.json')) == both


def test_an_interruption_keeps_what_is_finished(out_dir, monkeypatch):
    """After each cell all is on the disk: Ctrl-C in the third, and a fault in the fourth, lose that one alone."""
    Path(out_dir, 'scores.json').unlink(missing_ok=True)
    for error, third in ((KeyboardInterrupt, 'scene_desc'), (ValueError('no luck'), 'caption')):
        def score_chain(run, settings, chain, index, before=fourm.score_chain):
            if chain[0][0].name == third:
                raise error
            return before(run, settings, chain, index)
        monkeypatch.setattr(fourm, 'score_chain', score_chain)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
            score.main(f'--out_dir={out_dir}', '--n_score=2', '--target=segmentation')
        monkeypatch.undo()
    assert cells(read_scores(Path(out_dir, 'scores.json'))) == {f'{name}>segmentation' for name in ('rgb', 'depth', 'normal', 'scene_desc')}


def test_the_record_has_recalls(out_dir, monkeypatch):
    """With 1,000 scenes. An index of other weights, as of ckpt_best.pt after ckpt_last.pt, is made again: nothing is lost."""
    monkeypatch.setattr(fourm, 'score_chain', lambda *_: ({}, {}, 0.0))
    monkeypatch.setattr(retrieval.train_towers, '__defaults__', ('cpu', 20, 32, 0))
    for checkpoint in ('ckpt_last.pt', 'ckpt_best.pt'):
        scores = score.main(f'--out_dir={out_dir}', '--n_score=1000', f'--checkpoint={checkpoint}')
        assert {'caption>rgb/recall at 1 of 32', 'rgb>caption/recall at 10 of 32 by embedding'} <= scores.keys()
        index = Path(out_dir, 'index_rgb_caption_val.pt')
        index.write_bytes(index.read_bytes()[:-9])  # damaged
    assert Path(out_dir, 'scores_ckpt_best.json').exists()


def test_scores_are_those_of_the_weights(out_dir, tmp_path):
    """Other weights in the same file drop them; a copied run keeps them."""
    score.main(f'--out_dir={out_dir}', '--n_score=2', '--given=rgb', '--target=depth')
    kept = json.loads(Path(out_dir, 'scores.json').read_text())
    assert kept['checkpoint'] == lab.checkpoints.digest(Path(out_dir, 'ckpt_last.pt'))


@pytest.mark.parametrize('arguments, message', [
    (['--n_score=0'], 'n_score=0: must be at least 1'),
    (['--given=sound'], "there is no modality 'sound'"),
    (['--given=rgb', '--target=rgb'], "given='rgb' and target='rgb': name two different modalities"),
    (['--chain=rgb'], 'write given>target'),
    (['--chain=rgb>depth', '--target=depth'], 'chain and target do not go together'),
    (['--text=two red spheres', '--given=caption'], 'text is a setting of sample.py; here are those of lab/fourm.py .Scores.'),
    (['--text_only_run=out/x'], 'text_only_run is a setting of lab/vlm.py .Scores.'),
    (['--split=test'], "split='test': data/scenes has train, val"),
    (['--out_dir=out/none'], 'no such checkpoint'),
])
def test_faults(out_dir, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        score.main(f'--out_dir={out_dir}', *arguments)
    assert '\n' not in str(error.value)


def test_a_chapter_without_scores(out_dir, monkeypatch):
    monkeypatch.delattr(sys.modules['lab.fourm'], 'score')
    with pytest.raises(UserError, match='lab/fourm.py has no scores: it needs `scores_of` and `score`'):
        score.main(f'--out_dir={out_dir}')


def test_a_shuffled_condition(out_dir, monkeypatch):
    """A perfect generator scores 1, and less against other scenes; one that ignores its condition scores the same with both."""
    def constant(run, ids, chain, generator):
        return ids, {'scene_desc': [run.dataset.truth('val', 'scene_desc', np.arange(1))[0]] * len(ids['rgb'])}

    def perfect(run, ids, chain, generator):
        return ids, {'scene_desc': run.dataset.truth('val', 'scene_desc', np.arange(len(ids['rgb'])))}
    for generate, check in (perfect, lambda one: one['shuffled'] < 0.9 < one['value'] == 1), (
            constant, lambda one: abs(one['shuffled'] - one['value']) < 1e-9):
        monkeypatch.setattr(fourm, 'generate', generate)
        found = score.main(f'--out_dir={out_dir}', '--n_score=8', '--chain=rgb>scene_desc')
        assert check(found['rgb>scene_desc/attributes']), found
    found = score.main(f'--out_dir={out_dir}', '--n_score=1', '--chain=rgb>scene_desc')
    assert 'shuffled' not in found['rgb>scene_desc/attributes']  # there is no other scene
