"""sample.py: the run that is opened, its settings and their help, a model of one's own, faults in one line."""
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import lab
import sample
import train
from config import UserError
from engine import checkpoints
from lab import options
from tests.conftest import ROOT
from tests.toys import GPT, draw, make_digits, make_story


@pytest.fixture(scope='module')
def runs(work):
    """A GPT of texts and a MaskGIT of digits."""
    make_story(), make_digits()
    train.main(**GPT, dataset='story', block_size=16, out_dir='out/told', pictures=False)
    train.main(**(GPT | dict(model='maskgit')), dataset='toy_mnist', out_dir='out/dotted', pictures=False)
    return 'out/told', 'out/dotted'


def says(*arguments, **settings):
    """The one line of a fault."""
    with pytest.raises(UserError) as error:
        sample.main(*arguments, **settings)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_from_a_notebook(runs, capsys):
    """Keywords are settings; a schedule may be a number."""
    sample.main(out_dir=runs[0], prompt='The', max_new_tokens=3, temperature=0)
    assert capsys.readouterr().out.startswith('The')
    sample.main(out_dir=runs[1], n=1, steps=2, temperature=0.5, guidance='1..2')
    path, = Path(runs[1]).glob('sample_*.png')
    path.unlink()
    assert says(out_dir=runs[1], steps='many') == "call: steps='many' is not of type int"


def test_none_is_a_default_like_others():
    """Of the chapters' settings nano4M's alone may be None; what is assigned has the type that stands beside it."""
    settings, chosen = options.apply(config.read([], dict(steps='4', temperature=0.5)), sample.SETTINGS, lab.module_of('fourm').AnyToAny())
    assert (chosen.steps, chosen.temperature, chosen.guidance) == (4, '0.5', None) and chosen.n == 6 and settings.keys() == sample.SETTINGS.keys()
    with pytest.raises(UserError, match="steps='x' is not of type int"):
        options.apply(config.read(['--steps=x']), sample.SETTINGS, lab.module_of('fourm').AnyToAny())


def test_a_name_that_is_unknown_here(runs):
    told, dotted = (f'--out_dir={run}' for run in runs)
    assert says(told, '--temperatur=1') == "command line: unknown setting 'temperatur'; did you mean 'temperature'?"
    assert says(told, '--chain=a>b') == (
        'command line: chain is a setting of lab/fourm.py (AnyToAny); here are those of lab/gpt.py (Text)')
    assert 'lab/gpt.py (Images), lab/maskgit.py (Images); here' in says(told, '--complete=0.5')
    assert says(dotted, '--n_score=9') == (
        'command line: n_score is a setting of python -m lab.score; here are those of lab/maskgit.py (Images)')


def test_each_setting_has_a_remark():
    """The help is read from the source: no field of a dataclass of settings goes without an explanation."""
    kinds = options.all_settings()
    assert len(kinds) == 13
    for kind in kinds:
        for line in options.help_of(kind())[2:]:
            assert len(line) > 34 or line.startswith('  --'), (kind, line)
        for each in kind.__mro__[:-1]:
            source, settings = config.definition(sys.modules[each.__module__].__file__, each.__name__)
            missing = [name for name, node in settings if not config.remarks(source).get(node.end_lineno)]
            assert settings and not missing, (each, missing)
        assert sorted(re.findall('^  --(.*?)=', '\n'.join(options.help_of(kind())), re.M)) == sorted(kind.__dataclass_fields__)


def test_help(runs):
    def printed(*arguments):
        return subprocess.run([sys.executable, ROOT / 'sample.py', *arguments, '--help'], capture_output=True, text=True, check=True).stdout
    everything = printed(f'--out_dir={runs[1]}')
    assert '  --out_dir=' in everything and '  --guidance=\'1.5\'' in everything and 'lab/maskgit.py (Images)' in everything
    assert 'python sample.py --out_dir=out/nano4m --help' in everything
    assert 'more settings: python sample.py --out_dir=RUN --help' in printed('--out_dir=out/nowhere')
    nowhere = printed('--out_dir=out/nowhere')
    assert 'no such checkpoint' in nowhere and '  --checkpoint=' in nowhere


@pytest.mark.parametrize('arguments, message', [
    (['--n=0'], 'n=0: must be at least 1'), (['--n=1e9'], 'n=1000000000: must be at most 100000'),
    (['--max_new_tokens=-5'], 'max_new_tokens=-5: must be at least 0'),
    (['--seed=-1'], 'seed=-1: must be at least 0'),
    (['--split=test'], "split='test': data/story has train, val"),
    (['--device=abacus'], "device='abacus': choose auto, cuda, mps or cpu"),
    (['--dtype=float8'], "dtype='float8': choose auto"),
    (['--checkpoint=ckpt_none.pt'], 'no such checkpoint; the nearest are out/told/ckpt_'),
    (['--init_from=told', '--checkpoint=ckpt_best.pt'], 'init_from takes ckpt_last.pt'),
])
def test_faults(runs, arguments, message):
    assert message in says(f'--out_dir={runs[0]}', *arguments)


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'no such checkpoint; train first, and start this in the folder of the repository' in says()


# ---------------------------------------------------------------------------------------------------------------------
# The run that is opened

def test_the_data_have_to_be_those_of_the_run(runs, tmp_path, monkeypatch, capsys):
    """Tokens of other tokenizers would decode into something else, without a word; by whatever name the run is opened."""
    for name in ('data', 'out'):
        shutil.copytree(name, tmp_path / name, ignore=shutil.ignore_patterns('scenes*'))
    monkeypatch.chdir(tmp_path)
    for arguments in (['--out_dir=out/told'], ['--init_from=told']):
        sample.main(*arguments, '--max_new_tokens=1')
    meta = Path('data/story/meta.json')
    meta.write_text(meta.read_text().replace('278', '279'))
    for arguments in (['--out_dir=out/told'], ['--init_from=told'], ['--init_from=out/told']):
        assert 'data/story is not the data that this run was trained on' in says(*arguments)
    shutil.rmtree('data/story')
    assert re.search('data/story is missing, the data of this run.* .start programs in the folder', says('--init_from=told'))


def test_weights_without_data(runs, tmp_path, monkeypatch, capsys):
    """As prepare/smollm2.py leaves them: step 0, a tokenizer of their own, no data folder."""
    from prepare import smollm2
    text = checkpoints.read(Path(runs[0], 'ckpt_last.pt'))
    dataset = lab.open_run(Path(runs[0], 'ckpt_last.pt')).dataset
    monkeypatch.setattr(smollm2, 'Dataset', lambda folder: dataset)
    monkeypatch.chdir(tmp_path)
    Path('out/fetched').mkdir(parents=True)
    meta = dict(kind='stream', fields=dict(tokens=278), config={}, prepare='smollm2', encoding='smollm2')
    checkpoints.save(Path('out/fetched/ckpt_last.pt'), text | dict(settings=dict(model='gpt', dataset='smollm2'), meta=meta, step=0))
    sample.main('--init_from=fetched', '--prompt=The', '--max_new_tokens=2')
    assert capsys.readouterr().out.startswith('The')


def test_compiled(runs, monkeypatch):
    """A model without blocks has nothing to compile; drawing goes on if no compiler works."""
    monkeypatch.setattr(lab.graphs, 'compile_blocks', lambda model, device: False)
    assert draw(runs[1], '--compile=True', '--n=1', '--steps=1')
    monkeypatch.setattr(lab.devices, 'is_block', lambda module: False)
    assert 'compile is for Transformers, and this model is none' in says(f'--out_dir={runs[1]}', '--compile=True')


# ---------------------------------------------------------------------------------------------------------------------
# A model of one's own

MINE = '''
from dataclasses import dataclass
import numpy as np
from lab.figures import save_grid

@dataclass
class Squares:
    n: int = 3        # squares
    shade: int = 100  # of grey
    seed: int = 0     # of nothing

def settings_of(run):
    return Squares()

def draw(run, settings, path):
    save_grid({'mine': [np.full((8, 8, 3), settings.shade, np.uint8)] * settings.n}, path, 1)
'''


def test_a_model_of_ones_own(runs, tmp_path, monkeypatch):
    """lab/NAME.py is found by the chapter's name; its settings are as good as any, and are told when another chapter lacks them."""
    model = lab.open_run(Path(runs[0], 'ckpt_last.pt')).model
    mine = type('Mine', (type(model),), dict(__module__='mine'))
    with pytest.raises(UserError, match='there is no lab/mine.py yet.*docs/yours.md shows how to write one'):
        lab.module_of(mine(model.config))
    (tmp_path / 'mine.py').write_text('')
    (tmp_path / 'lab').mkdir()
    (tmp_path / 'lab/mine.py').write_text(MINE)
    monkeypatch.setattr(lab, 'HERE', tmp_path / 'lab')
    monkeypatch.setattr(lab, '__path__', [*lab.__path__, str(tmp_path / 'lab')])
    monkeypatch.setattr(lab, 'chapter_of', lambda model: 'mine')
    assert np.asarray(draw(runs[0], '--shade=7', '--n=2')).shape == (18 + 2 * 12 - 4, 8, 3)
    monkeypatch.undo()
    assert sys.modules.pop('lab.mine')


def test_what_training_draws(runs, tmp_path):
    """The same as sample.py, with shorter texts."""
    run = lab.open_run(Path(runs[0], 'ckpt_last.pt'), 'cpu')
    torch.manual_seed(0)
    lab.draw(run.model, run.folder, run.meta, tmp_path / 'sample_000001.png')
    text = (tmp_path / 'sample_000001.txt').read_bytes().decode()
    assert [text] == lab.module_of('gpt').draw(run, lab.module_of('gpt').Text(max_new_tokens=300), None)


def test_names_of_samples_never_collide(tmp_path, monkeypatch):
    """Several in a second, and even at the same moment; a text or an animation takes a name, too."""
    monkeypatch.setattr(sample, 'datetime', type('Frozen', (), dict(now=staticmethod(lambda: datetime(2026, 1, 2, 3, 4, 5, 6)))))
    paths = []
    for suffix in ('.png', '.gif', '.txt', '.png'):
        paths.append(sample.new_path(tmp_path))
        paths[-1].with_suffix(suffix).touch()
    assert len(set(paths)) == 4 and paths[0].name == 'sample_20260102_030405_000006.png'


def test_commas_in_names(tmp_path, monkeypatch):
    """A comma separates files, unless it is part of a name that exists."""
    monkeypatch.chdir(tmp_path)
    for name in ('a, b.png', 'a', 'c.png', 'd,e,f.png', 'e'):
        (tmp_path / name).touch()
    assert options.paths('a, b.png,c.png,d,e,f.png') == ['a, b.png', 'c.png', 'd,e,f.png']
    assert options.paths('a,c.png,none,e') == ['a', 'c.png', 'none', 'e'] and options.paths('') == ['']
    assert options.paths(','.join(['c.png'] * 500)) == ['c.png'] * 500  # longer than a name may be
