"""Pages of runs: curves, tables, the command that makes a run again, which generator, and faults in one line."""
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import config
import train
from config import UserError
from engine import checkpoints
from lab import figures, report
from lab.statistics import save_scores
from prepare import judge, mnist, text
from tests.test_mnist import toy_digits

RUN = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, max_iters=4, eval_interval=2, log_interval=1, device='cpu',
           dtype='float32', compile=False)
GPT = RUN | dict(model='gpt', dataset='report_text', block_size=8, out_dir='out/report gpt')
FOURM = dict(model='fourm', dataset='scenes', n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, num_input_tokens='16,32',
             num_target_tokens='16', batch_size=8, micro_batch_size=4, max_iters=2, eval_interval=1, eval_iters=1, log_interval=1,
             device='cpu', dtype='float32', compile=False, out_dir='out/report_fourm')


@pytest.fixture(scope='module')
def runs(work):
    """A GPT's run, whose folder has a space in its name, and one of nano4M."""
    Path('report.txt').write_text('so long | lives this, and this gives life to thee. ' * 20)
    text.main(input='report.txt', out='data/report_text')
    train.main(**GPT)
    train.main(**FOURM)
    return GPT['out_dir'], FOURM['out_dir']


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the GPT's run, to be damaged."""
    return Path(shutil.copytree(runs[0], tmp_path / 'run'))


def page_of(folder):
    report.main(f'--out_dir={folder}')
    return Path(folder, 'report.md').read_text()


def add_scores(folder, **scores):
    save_scores(scores, Path(folder, 'scores.json'), checkpoints.digest(Path(folder, 'ckpt_last.pt')))


SCORE = {'nats|token': dict(value=1.25, low=1.0, high=1.5, n=9, floor=0.5, baseline=4.0)}


def test_a_report(run):
    add_scores(run, **SCORE)
    found = page_of(run)
    assert '| model, data | gpt, report_text |' in found and '| steps, samples in each | 4, 4 |' in found
    assert '| nats\\|token | 1.25 [1, 1.5]; floor 0.5; baseline 4 |' in found
    checkpoint = checkpoints.read(run / 'ckpt_last.pt')
    assert f'| tokens | {checkpoint["tokens"]} |' in found and f'{checkpoint["best"]:.4f} |' in found
    assert (run / 'sample_000004.txt').read_text() in found  # the newest text
    for name in re.findall(r'!\[.*?\]\((.*?)\)', found):
        assert (run / name).is_file()


def test_addresses_in_a_page(tmp_path, monkeypatch):
    assert report.address(Path('out/my run/a.png'), Path('out/compare.md')) == 'my%20run/a.png'

    def other_drive(*_):
        raise ValueError('path is on mount')
    monkeypatch.setattr(report.os.path, 'relpath', other_drive)
    assert report.address(tmp_path / 'a b.png', Path('out/compare.md')) == f'file://{tmp_path}/a%20b.png'


def test_only_scores_of_these_weights(run, tmp_path, capsys):
    add_scores(run, **SCORE)
    assert '1.25 [1, 1.5]' in page_of(shutil.copytree(run, tmp_path / 'copy', copy_function=shutil.copy))
    assert 'left out' not in capsys.readouterr().out
    checkpoint = checkpoints.read(run / 'ckpt_last.pt')
    next(iter(checkpoint['weights'].values())).add_(1)
    checkpoints.save(run / 'ckpt_last.pt', checkpoint)
    assert '## Scores' not in page_of(run) and 'scores.json: left out' in capsys.readouterr().out


def test_a_sample_with_a_fence(run):
    (run / 'sample_000009.txt').write_text('code:\n````\nx\n````\n')
    assert '\n`````\ncode:\n````\nx\n````\n\n`````\n' in page_of(run)


@pytest.mark.parametrize('i', [0, 1])
def test_the_command_makes_the_same_run(runs, i):
    line, = re.findall(r'^python train.py (.*)$', page_of(runs[i]), re.M)
    settings, _ = config.resolve(config.read(shlex.split(line)), train.SETTINGS)
    before = checkpoints.read(Path(runs[i], 'ckpt_last.pt'))
    for decided in before['meta']['config']:  # by the data set
        settings.pop(decided, None), before['settings'].pop(decided, None)
    assert settings == before['settings']


def test_a_config_file_shortens_the_command(work, tmp_path, monkeypatch):
    read, files = config.execute, []
    monkeypatch.setattr(config, 'execute', lambda path: files.append(path) or read(path))
    settings, _ = config.resolve(config.read(['config/gpt_shakespeare_budget.py', '--max_iters=7']), train.SETTINGS)
    defaults, _ = config.resolve({}, train.SETTINGS)
    checkpoint = dict(settings=settings, meta=dict(config={}))
    run = report.Record(tmp_path / 'other', checkpoint, 1, [], {}, defaults)
    expected = f'python train.py config/gpt_shakespeare_budget.py --max_iters=7 --out_dir={tmp_path}/other'
    assert report.command(run) == expected
    assert 'config/nano4m.py' in files and 'config/__init__.py' not in files


def test_runs_side_by_side(runs):
    report.main(f'--compare={",".join(runs)}')
    found = Path('out/compare.md').read_text()
    assert '|  | report gpt | report_fourm |' in found and '| model, data | gpt, report_text | fourm, scenes |' in found
    assert 'Which generator' not in found and len(re.findall('^python train.py', found, re.M)) == 2
    assert re.search(r'^\| last val_loss_rgb \|  \| \d', found, re.M)
    for name in re.findall(r'!\[.*?\]\((.*?)\)', found):
        assert Path('out', name).is_file()
    colors = {color for _, color in Image.open('out/compare_loss.png').convert('RGB').getcolors(1 << 24)}
    for color in figures.COLORS[:2]:
        assert tuple(int(color[i:i + 2], 16) for i in (1, 3, 5)) in colors


def test_which_generator(work, monkeypatch, capsys):
    monkeypatch.setattr(mnist, 'read_part', lambda part, fashion: toy_digits(200 if part == 'train' else 60, len(part)))
    monkeypatch.setattr(judge.train_judge, '__defaults__', (0, 5, 32))
    mnist.main(views=2, out='data/report_digits')
    names = [f'digits_{model}' for model in ('gpt', 'maskgit', 'flow')]
    for name in names:
        model = name.removeprefix('digits_')
        train.main(**RUN | dict(model=model, dataset='report_digits', out_dir=f'out/{name}', max_iters=1, eval_iters=1,
                                pictures=False) | (dict(patch_size=14) if model == 'flow' else {}))
    add_scores('out/digits_flow', **{'bits/dim given the class': dict(value=5.432, low=5, high=6, n=9)})
    report.main(f'--compare={",".join(f"out/{name}" for name in names)}', '--n_score=100')
    printed = capsys.readouterr().out
    assert all(re.search(rf'^\| {name} \| \d\.\d\d M \| \d+ s \|', printed, re.M) for name in names)
    assert '5.43 bits/dim given the class' in printed and re.search(r'^\| real digits \|  \|  \|  \| \d', printed, re.M)
    assert Image.open('out/compare.png').size[0] == 4 * 302 - 4
    found = Path('out/compare.md').read_text()
    assert '## Which generator?' in found and '![digits](compare.png)' in found
    for arguments, message in ((['--n_score=0'], 'must be at least 1'), (['--n_score=4'], 'too few to score')):
        with pytest.raises(UserError, match=message):
            report.main(f'--compare=out/{names[0]},out/{names[1]}', *arguments)


@pytest.mark.parametrize('broken', ['{"step": 1', '[1]', '{"step": "one"}', 'null', '', ' ', '\0\0', '{"loss": 2}'])
def test_a_broken_line(run, broken, capsys):
    """It is left out, with its number, unless it is blank."""
    whole, log = page_of(run), run / 'log.jsonl'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([*lines[:3], broken, *lines[3:]]) + '\n')
    capsys.readouterr()
    assert page_of(run) == whole
    assert ('no lines of a training log: 4\n' in capsys.readouterr().out) == bool(broken.strip())


def test_a_value_that_was_not_finite(run):
    log = run / 'log.jsonl'
    log.write_text(log.read_text() + '{"step": 5, "seconds": 1, "train_loss": null, "grad_norm": null}\n'
                                     '{"step": 6, "seconds": 2, "val_loss": null, "val_loss_rgb": null}\n')
    assert '| last val_loss_rgb | not finite |' in page_of(run)


def test_other_faults(run, tmp_path):
    log = run / 'log.jsonl'
    whole = log.read_text()
    log.write_text(whole + '{"step": 5, "train')  # cut off while it was written
    page_of(run)
    (run / 'scores.json').write_text('{"accuracy": 1}')
    with pytest.raises(UserError, match='not a file of scores'):
        page_of(run)
    log.write_text('{"step": 1, "train_loss": 3.0}\n')
    with pytest.raises(UserError, match='no evaluation yet'):
        page_of(run)
    log.unlink()
    with pytest.raises(UserError, match='log.jsonl: missing'):
        page_of(run)
    with pytest.raises(UserError, match='no such checkpoint'):
        report.main(f'--compare={tmp_path / "nothing"},{run}')
