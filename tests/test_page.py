"""Pages of runs: curves, the table, the command that makes a run again, and faults in one line."""
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
import sample
import train
from config import UserError
from prepare import page, text
from tests.test_train import TINY

GPT = dict(model='gpt', dataset='page_text', block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=4, max_iters=4,
           eval_interval=2, log_interval=1, device='cpu', compile=False, out_dir='out/page gpt')


@pytest.fixture(scope='module')
def runs(work):
    """A GPT's run, whose folder has a space in its name, and one of nano4M."""
    Path('page.txt').write_text('so long | lives this, and this gives life to thee. ' * 20)
    text.main(input='page.txt', out='data/page_text')
    train.main(**GPT)
    train.main(**TINY | dict(out_dir='out/page_fourm', max_iters=2, pictures=True))
    return 'out/page gpt', 'out/page_fourm'


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the GPT's run, to be damaged."""
    return Path(shutil.copytree(runs[0], tmp_path / 'run'))


def report(folder):
    sample.main(f'--out_dir={folder}', '--report=True')
    return Path(folder, 'report.md').read_text()


def test_a_report(runs):
    score = dict(value=1.25, low=1.0, high=1.5, n=9, floor=0.5, baseline=4.0)
    Path(runs[0], 'scores.json').write_text(json.dumps({'nats/token': score}))
    found = report(runs[0])
    assert '| model, data | gpt, page_text |' in found and '| steps, samples in each | 4, 4 |' in found
    assert '| nats/token | 1.25 [1, 1.5]; floor 0.5; baseline 4 |' in found
    checkpoint = train.read_checkpoint(Path(runs[0], 'ckpt_last.pt'))
    assert f'| tokens | {checkpoint["tokens"]} |' in found and f'{checkpoint["best"]:.4f} |' in found
    assert Path(runs[0], 'sample_000004.txt').read_text() in found  # the newest text
    for name in re.findall(r'!\[.*?\]\((.*?)\)', found):
        assert Path(runs[0], name).is_file()


@pytest.mark.parametrize('i', [0, 1])
def test_the_command_makes_the_same_run(runs, i):
    line, = re.findall(r'^python train.py (.*)$', report(runs[i]), re.M)
    settings = train.resolve(config.read(shlex.split(line)))[0]
    before = train.read_checkpoint(Path(runs[i], 'ckpt_last.pt'))
    for decided in before['meta']['config']:  # by the data set
        settings.pop(decided, None), before['settings'].pop(decided, None)
    assert settings == before['settings']


def test_a_config_file_shortens_the_command(runs, tmp_path):
    settings = train.resolve(config.read(['config/gpt_shakespeare_budget.py', '--max_iters=7']))[0]
    defaults = train.resolve({})[0]
    checkpoint = dict(settings=settings, meta=dict(config={}))
    lines = [json.dumps(dict(step=0, seconds=0, val_loss=4.0))]
    for name in ('gpt_shakespeare_budget', 'other'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(lines) + '\n')
    run = page.Run(tmp_path / 'other', checkpoint, 1, defaults)
    assert page.command(run) == f'python train.py config/gpt_shakespeare_budget.py --max_iters=7 --out_dir={tmp_path}/other'


def test_runs_side_by_side(runs):
    sample.main(f'--compare={",".join(runs)}')
    found = Path('out/compare.md').read_text()
    assert '|  | page gpt | page_fourm |' in found and '| model, data | gpt, page_text | fourm, scenes |' in found
    assert 'Which generator' not in found and len(re.findall('^python train.py', found, re.M)) == 2
    assert re.search(r'^\| last val_loss_rgb \|  \| \d', found, re.M)
    for name in re.findall(r'!\[.*?\]\((.*?)\)', found):
        assert Path('out', name).is_file()
    colors = {color for _, color in Image.open('out/compare_loss.png').convert('RGB').getcolors(1 << 24)}
    for color in page.COLORS[:2]:
        assert tuple(int(color[i:i + 2], 16) for i in (1, 3, 5)) in colors


@pytest.mark.parametrize('low, high, log', [(1.4, 4.2, True), (0.15, 0.16, True), (1e-5, 30, True), (0, 4500, False),
                                            (-3, 2, False), (0, 1, False), (7.9, 8.0, True)])
def test_ticks(low, high, log):
    found = page.ticks(low, high, log)
    assert 2 <= len(found) <= 12 and found == sorted(found) and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(len(f'{value:.4g}'.strip('-0.').replace('.', '')) <= 3 for value in found if 'e' not in f'{value:.4g}')  # round


@pytest.mark.parametrize('losses', [[2.0], [2.0, 2.0], [-1.0, 3.0], [5.0, float('nan'), 4.0], [1e-8, 1e8]])
def test_curves_of_any_losses(losses, tmp_path):
    lines = [dict(step=i, seconds=0.5 * i, val_loss=loss, train_loss=loss) for i, loss in enumerate(losses)]
    page.plot({'a': lines}, tmp_path / 'a.png')
    picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
    blue = (abs(picture - [0x2a, 0x5c, 0xaa]).sum(-1) < 30).any(0)
    assert blue[:picture.shape[1] // 2].any() and blue[picture.shape[1] // 2:].any()  # something in both halves


@pytest.mark.parametrize('broken, message', [
    ('{"step": 1', 'line 4: not a line'), ('[1]', 'line 4: not a line'), ('{"step": "one"}', 'line 4: not a line'),
    ('null', 'line 4: not a line'), ('', 'line 4: not a line'), ('{"loss": 2}', 'line 4: not a line')])
def test_a_broken_line(run, broken, message):
    log = run / 'log.jsonl'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([*lines[:3], broken, *lines[3:]]) + '\n')
    with pytest.raises(UserError, match=message) as error:
        report(run)
    assert '\n' not in str(error.value)


def test_other_faults(run, tmp_path):
    log = run / 'log.jsonl'
    whole = log.read_text()
    log.write_text(whole + '{"step": 5, "train')  # cut off while it was written
    report(run)
    (run / 'scores.json').write_text('{"accuracy": 1}')
    with pytest.raises(UserError, match='not a file of scores'):
        report(run)
    log.write_text('{"step": 1, "train_loss": 3.0}\n')
    with pytest.raises(UserError, match='no evaluation yet'):
        report(run)
    log.unlink()
    with pytest.raises(UserError, match='log.jsonl: missing'):
        report(run)
    with pytest.raises(UserError, match='no such checkpoint'):
        sample.main(f'--compare={tmp_path / "nothing"},{run}')
