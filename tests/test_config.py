"""Settings: what is known is applied, what is not is named; --help of every program."""
import dataclasses
import importlib
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import config
import lab
import sample
import train
from config import UserError
from engine import processes
from lab import options
from lab import speed
from prepare import toy2d
from tests import homework

ROOT = Path(__file__).parent.parent
PAGES = '\n'.join(path.read_text() for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
                  if path.stem != 'yours')  # about code that is not there yet: see tests/test_docs.py
CHAPTERS = ('gpt', 'maskgit', 'fourm', 'flow', 'vlm')


def resolve(arguments):
    return config.resolve(config.read(arguments), train.SETTINGS)[0]


def settings_of(*arguments, **overrides):
    return config.resolve(config.read(arguments, overrides), train.SETTINGS)[0]


def write(tmp_path, text):
    path = tmp_path / 'my.py'
    path.write_text(text)
    return str(path)


def test_order_and_types(tmp_path):
    path = write(tmp_path, 'max_iters = 1e4\nlearning_rate = 1\nmodel = "gpt"  # a remark\n_private = 3\n')
    settings = settings_of(path, '--max_iters=2e3', '--compile=False', '--out_dir=here')
    assert settings['max_iters'] == 2000 and isinstance(settings['max_iters'], int)
    assert settings['learning_rate'] == 1.0 and isinstance(settings['learning_rate'], float)
    assert settings['compile'] is False and settings['out_dir'] == 'here'
    assert settings_of('--max_iters=2e3', path)['max_iters'] == 2000  # the command line counts more, wherever it names the file
    other = tmp_path / 'other.py'
    other.write_text('max_iters = 7\n')
    assert settings_of(path, '--batch_size=2', str(other))['max_iters'] == 7 and settings_of(other, path)['max_iters'] == 10 ** 4


def test_a_config_file_may_import(tmp_path):
    """Functions, classes and modules are no settings; the file knows where it is."""
    path = write(tmp_path, 'import math\nfrom math import log\nfrom pathlib import Path\nmax_iters = int(log(math.e)) + 1\n'
                           'out_dir = Path(__file__).with_suffix("")\n')
    assert config.execute(path) == dict(max_iters=2, out_dir=tmp_path / 'my')
    assert settings_of(path)['out_dir'] == str(tmp_path / 'my')


def test_integers_are_exact():
    """Not rounded as a float rounds them, above 2^53."""
    for seed in (2 ** 53 + 1, 2 ** 63 - 1):
        assert settings_of(f'--seed={seed}')['seed'] == settings_of(seed=seed)['seed'] == seed
    assert settings_of('--seed=1e6')['seed'] == settings_of(seed=1e6)['seed'] == 10 ** 6


def test_model_fields_are_settings():
    assert settings_of(model='gpt', n_layer=3)['n_layer'] == 3
    assert settings_of('--model=fourm', '--train_modalities=rgb depth')['train_modalities'] == 'rgb depth'


@pytest.mark.parametrize('arguments, message', [
    (['--batchsize=3'], "unknown setting 'batchsize'; did you mean 'batch_size'"),
    (['--model=gpt', '--num_input_tokens=3'], "unknown setting 'num_input_tokens'"),  # another model's key
    (['--max_iters=1.5'], 'not of type int'),
    (['--max_iters=many'], 'not of type int'),
    (['--compile=1'], 'not True or False'),
    (['--max_iters'], 'settings are written --max_iters=value'),
    (['-n=3'], 'settings are written --n=3'),
    (['batch_size=4'], 'batch_size=4: settings are written --batch_size=4'),
    (['\u2014batch_size=4'], 'settings are written --batch_size=4'), (['\u2013batch_size=4'], 'settings are written --batch_size=4'),
    (['--dropout=1'], 'dropout=1.0: must be below 1'),
    (['--model=maskgit', '--label_dropout=1'], 'label_dropout=1.0: must be below 1'),
    (['--model=fourm', '--unconditional_prob=5'], 'unconditional_prob=5.0: must be at most 1'),
    (['--model=fourm', '--full_modality_prob=2'], 'full_modality_prob=2.0: must be at most 1'),
    *[(['--model=fourm', f'--dirichlet_alphas={alphas}'], message) for alphas, message in (
        ('a', "dirichlet_alphas='a' is not of type float and finite"), ('', "dirichlet_alphas='' is not of type"),
        ('0', "dirichlet_alphas='0': each number must be from 1e-06 to 1000000"), ('1,-1', "'1,-1': each number must be from"),
        ('inf', "dirichlet_alphas='inf' is not of type float and finite"))],
    (['--model=fourm', '--num_input_tokens=0'], "num_input_tokens='0': each number must be from 1 to 16384"),
    (['--model=fourm', '--num_input_tokens=100000'], "num_input_tokens='100000': each number must be from 1 to 16384"),
    (['--model=fourm', '--num_target_tokens=64,'], "'64,': num_target_tokens='' is not of type int"),
    (['--seed=9223372036854775808'], 'seed=9223372036854775808: must be at most 9223372036854775807'),
    (['--max_iters=0'], 'at least 1'),
    (['--n_layer=-1'], 'n_layer=-1: must be at least 1'),
    (['--n_head=0'], 'n_head=0: must be at least 1'), (['--n_embd=0'], 'n_embd=0: must be at least 1'),
    (['--model=gtp'], 'choose one of flow, fourm, gpt, maskgit, vlm'),
    (['--model=os'], 'choose one of flow, fourm, gpt, maskgit, vlm'),
    (['--model=train'], 'choose one of flow, fourm, gpt, maskgit, vlm'),
    (['no_such.py'], 'no such config file'),
    (['LICENSE'], 'LICENSE is no config file .NAME.py.: settings are written --name=value'),
])
def test_faults_from_the_shell(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        settings_of(*arguments)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('batchsize = 3', "my.py: unknown setting 'batchsize'; did you mean 'batch_size'.*; the name of a helper variable begins with _$"),
    ('out_dir = 3', 'my.py: out_dir=3 is not of type str'),
    ('compile = 0', 'my.py: compile=0 is not True or False'),
    ('max_iters = True', 'my.py: max_iters=True is not of type int'),
    ('max_iters = ', 'my.py: SyntaxError'),
    ('max_iters = nothing', 'my.py: NameError'),
])
def test_faults_from_a_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        settings_of(write(tmp_path, text))


def test_paths_from_a_notebook(tmp_path):
    path = write(tmp_path, 'batch_size = 3\n')
    settings = settings_of(Path(path), out_dir=Path('out', 'mine'))
    assert settings['out_dir'] == str(Path('out/mine')) and settings['batch_size'] == 3


MINE = """
from dataclasses import dataclass

@dataclass
class Config:
    sizes: tuple = (1, 2)
    path: str | None = None
    dropout: float | None = None
    offset: float = -0.5
    scale: float = 1.0

Model=dict
"""


def test_a_chapter_of_ones_own(tmp_path, monkeypatch):
    """Between the files of editors and systems; with fields of other types, and a default below 0."""
    for folder in (tmp_path, tmp_path / 'prepare', tmp_path / 'config'):
        (folder / 'folder.py').mkdir(parents=True)
        (folder / '._mine.py').write_bytes(b'\x00\x05\x16\x07\xff')
        (folder / '.#mine.py').symlink_to('somebody@somewhere')
        (folder / 'helper.py').write_bytes('# Straße\n'.encode('latin-1'))
    (tmp_path / 'mine.py').write_text(MINE)
    (tmp_path / 'prepare/sorting.py').write_text('MAKES="data/sorting"\n')
    monkeypatch.chdir(tmp_path), monkeypatch.syspath_prepend(tmp_path), monkeypatch.setattr(config, 'ROOT', tmp_path)
    settings = settings_of(model='mine', scale=2)
    assert [settings[name] for name in ('sizes', 'path', 'dropout', 'offset', 'scale')] == [(1, 2), None, None, -0.5, 2.0]
    for changes, message in ((dict(offset=-0.6), 'offset=-0.6: must be at least -0.5'), (dict(scale=-1), 'scale=-1.0: must be at least 0'),
                             (dict(path='x'), "path='x' is not of type NoneType")):
        with pytest.raises(UserError, match=message):
            settings_of(model='mine', **changes)
    with pytest.raises(UserError, match="model='gpt': choose one of mine$"):
        settings_of(model='gpt')
    assert processes.scripts('data') == ['sorting'] and processes.scripts('out') == [] and config.files() == ['config/helper.py']
    monkeypatch.delitem(sys.modules, 'mine')


def test_a_model_that_cannot_be_built(monkeypatch):
    """PyTorch's KeyErrors for names of modules, too."""
    settings, chapter = config.resolve(dict(model=('fourm', 'x')), train.SETTINGS)
    for name in ('a.b', 'keys'):
        with pytest.raises(UserError, match=f"model='fourm' cannot be built: .*{name}"):
            config.build(chapter, settings, dict(config=dict(modalities=f'{name}:4:2')), {})

    def model(c):
        raise AssertionError
    monkeypatch.setattr(chapter, 'Model', model)
    with pytest.raises(UserError, match="cannot be built: AssertionError$"):
        config.build(chapter, settings, dict(config={}), {})


def test_shipped_configs_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(config.files()) > 20 and 'config/__init__.py' not in config.files()
    for path in config.files():
        settings_of(path)


def test_defaults_without_an_import():
    assert config.defaults('train.py') == train.SETTINGS and config.defaults('sample.py') == sample.SETTINGS


# ---------------------------------------------------------------------------------------------------------------------
# Programs

def test_elsewhere_a_fault_says_once_where_to_start(tmp_path, monkeypatch):
    """Also in a notebook, where nothing but the exception is seen."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='gone.py: no such config file .start programs in the folder of the repository: cd'):
        config.read(['gone.py'])
    monkeypatch.setattr(sys, 'argv', ['program', 'gone.py'])
    with pytest.raises(SystemExit) as end:
        config.run(lambda *arguments: config.read(arguments))
    assert end.value.code.count('start programs in the folder') == 1


@pytest.mark.parametrize('error, code, line', [
    (UserError('what, where'), 'error: what, where', ''), (FileNotFoundError('x.npy'), 'error: x.npy', ''),
    (PermissionError(13, 'Permission denied', 'out/x/sample.gif'), "error: [Errno 13] Permission denied: 'out/x/sample.gif': close a "
     'program that has it open, ask its owner for permission, or use a copy of its folder', ''),
    (KeyboardInterrupt(), 130, '\nstopped\n')])
def test_programs_end_with_a_line(monkeypatch, capsys, error, code, line):
    def main(*arguments, **overrides):
        assert (arguments, overrides) == (('--n=3',), dict(fashion=True))
        raise error
    monkeypatch.setattr(sys, 'argv', ['program', '--n=3'])
    with pytest.raises(SystemExit) as end:
        config.run(main, fashion=True)
    assert end.value.code == code and capsys.readouterr().err == line


PRINTS = """
import config, sys, time
def main(*arguments):
    print('one', flush=True)
    sys.stdin.read()  # until the reader of the output has ended
    print('two', flush='flush' in arguments)
    if 'fault' in arguments:
        raise config.UserError('what, where')
    return 3
if __name__ == '__main__':
    sys.exit(config.run(main))
"""


@pytest.fixture
def program(tmp_path):
    """program(*arguments, ...) starts PRINTS."""
    Path(tmp_path, 'prints.py').write_text(PRINTS)

    def start(*arguments, unbuffered='', **streams):
        return subprocess.Popen([sys.executable, tmp_path / 'prints.py', *arguments], text=True, stderr=subprocess.PIPE, **streams,
                                env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': unbuffered})
    return start


@pytest.mark.parametrize('arguments, unbuffered, code, line', [
    ([], '', 3, ''), (['flush'], '', 141, ''), (['fault'], '', 1, 'error: what, where'), ([], '1', 141, '')])
def test_a_reader_that_ends_early(program, arguments, unbuffered, code, line):
    """program | head -1"""
    process = program(*arguments, unbuffered=unbuffered, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == 'one\n'
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read().partition(' (start')[0].strip() == line and process.wait(20) == code


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='Linux')
@pytest.mark.parametrize('arguments', [[], ['flush']])
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_cannot_be_written(program, arguments, unbuffered):
    with open('/dev/full', 'w') as full:
        process = program(*arguments, unbuffered=unbuffered, stdin=subprocess.DEVNULL, stdout=full)
    printed = process.communicate(timeout=20)[1]
    assert printed.startswith('error: [Errno 28] No space left') and printed.count('\n') == 1 and process.returncode == 1


def test_one_line_for_all_processes(monkeypatch, capsys):
    """Processes after the first wait before they print theirs: its end ends them."""
    waited = []
    monkeypatch.setattr(config, 'time', type('Clock', (), dict(sleep=staticmethod(waited.append))))
    monkeypatch.setattr(sys, 'argv', ['program'])
    for rank, error, raised in (('0', UserError('x'), SystemExit), ('1', UserError('x'), SystemExit), ('1', KeyError('x'), KeyError)):
        monkeypatch.setenv('RANK', rank)

        def main():
            raise error
        with pytest.raises(raised):
            config.run(main)
    assert waited == [60, 60]


def test_the_home_folder(monkeypatch):
    """bash leaves ~ in --out_dir=~/runs as it is; a text that begins with ~ is a text."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    assert settings_of('--out_dir=~/runs')['out_dir'] == '/home/me/runs' and settings_of('--out_dir=a~')['out_dir'] == 'a~'
    assert config.convert('compare', '~/a,~/b', 'call', '') == '/home/me/a,/home/me/b'
    assert config.convert('prompt', '~/a', 'call', '') == '~/a'


def test_all_paths_are_known():
    """Settings whose default or remark names a file or a folder; exceptions: what is read within a longer text, and remarks about
    other files."""
    explained = [config.explain(path) for path in PROGRAMS]
    explained += [config.explain(f'lab/{chapter}.py', kind.__name__) for chapter in CHAPTERS for kind in kinds(chapter)]
    found = {name for each in explained for name, (default, remark) in each.items()
             if re.match("MAKES|'(data|out|config)/", default) or default[0] == "'" and re.search(r'\b(file|folder)s?\b', remark)}
    assert found > {'out_dir', 'input', 'scenes', 'grade'} and found - config.PATHS == {'split', 'subset', 'chain', 'hide'}
    assert config.PATHS <= {name for each in explained for name in each}


@pytest.mark.parametrize('value', [' ', '\t', 'out/ ', 'a, ,b', 'a\nb', 'a\0', '\x7f'])
def test_names_that_cannot_be_read(value):
    """Each was a folder of that name, some a line in two parts, one a traceback."""
    for name, default in (('out_dir', ''), ('out', 'data/toy2d'), ('image', ''), ('dataset', 'shakespeare')):
        with pytest.raises(UserError, match=f'^call: {name}=.* is no name of a file or folder$') as error:
            config.convert(name, value, 'call', default)
        assert '\n' not in str(error.value)
    assert config.convert('prompt', value, 'call', '') == value


def test_an_empty_name(tmp_path, monkeypatch):
    """The prepare scripts wrote beside train.py."""
    monkeypatch.chdir(tmp_path)
    for program, name in ((toy2d, 'out'), (sample, 'out_dir'), (sample, 'checkpoint')):
        with pytest.raises(UserError, match=f"command line: {name}='' is no name of a file or folder"):
            program.main(f'--{name}=')
    assert settings_of('--out_dir=')['out_dir'] == '' and settings_of('--out_dir=a b')['out_dir'] == 'a b'


@pytest.mark.parametrize('value', ['inf', '-inf', 'nan', '1e999'])
def test_settings_are_finite(value):
    for name, kind in (('learning_rate', 'float and finite'), ('max_iters', 'int')):
        with pytest.raises(UserError, match=f'{name}=.* is not of type {kind}'):
            settings_of(f'--{name}={value}')


PROGRAMS = [path.relative_to(ROOT).as_posix() for folder in ('', 'engine/', 'prepare/', 'lab/', 'tests/')
            for path in sorted(ROOT.glob(f'{folder}*.py'))
            if not path.stem.startswith('test_') and "\nif __name__ == '__main__':" in path.read_text()]


def test_all_programs_are_found():
    assert {'train.py', 'sample.py', 'bench.py', 'prepare/mnist.py', 'lab/score.py', 'lab/report.py', 'lab/retrieval.py',
            'lab/transfer.py', 'lab/speed.py', 'tests/homework.py', 'tests/comparisons.py', 'tests/faults.py'} <= set(PROGRAMS)
    assert len([path for path in PROGRAMS if path.startswith('prepare/')]) >= 17


@pytest.mark.parametrize('path', PROGRAMS)
def test_every_program_ends_with_a_line(path):
    """Its main is run by config.run, which turns a UserError into one line and knows --help."""
    text = (ROOT / path).read_text()
    assert re.search(r"\nif __name__ == '__main__':\n(    .*\n)*.*\bconfig\.run\(", text), path


def help_of(monkeypatch, capsys, path, *arguments):
    """What a program prints for these arguments; it runs as from the shell, in this process."""
    monkeypatch.setattr(sys, 'argv', [path, *arguments])
    with pytest.raises(SystemExit) as end:
        if '/' in path:
            runpy.run_module(path.removesuffix('.py').replace('/', '.'), run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(str(ROOT / path), run_name='__main__')
    printed = capsys.readouterr()
    assert end.value.code in (0, None), printed.err or end.value.code
    return printed.out


def settings_in(path):
    """The SETTINGS of a program."""
    if path == 'prepare/fashion_mnist.py':  # runs mnist's
        path = 'prepare/mnist.py'
    return getattr(importlib.import_module(path.removesuffix('.py').replace('/', '.')), 'SETTINGS', {})


@pytest.mark.filterwarnings('ignore:.*found in sys.modules after import of package')
@pytest.mark.parametrize('path', PROGRAMS)
def test_help(monkeypatch, capsys, path):
    """Usage, the commands of the docstring, and each setting with its default."""
    monkeypatch.chdir(ROOT)
    printed = help_of(monkeypatch, capsys, path, '--help')
    program = f'-m {path.removesuffix(".py").replace("/", ".")}' if '/' in path else path
    assert printed.startswith(f'usage: python {program} [')
    commands = re.findall(r'^ +((?:python|torchrun) .*)$', (ROOT / path).read_text().split('"""')[1], re.M)
    assert commands and all(command in printed for command in commands)
    for setting, value in settings_in(path).items():
        assert re.search(rf'^  --{setting}={re.escape(repr(value))}( |$)', printed, re.M), setting
    assert help_of(monkeypatch, capsys, path, '-h') == printed


def bare(path, name):
    """The settings of a file that have no remark."""
    source, settings = config.definition(path, name)
    said = config.remarks(source)
    return [setting for setting, node in settings if setting != 'seed' and not said.get(node.end_lineno)]


@pytest.mark.parametrize('path', PROGRAMS)
def test_every_setting_has_a_remark(path):
    if path not in ('prepare/fashion_mnist.py', 'prepare/shakespeare.py'):  # mnist's settings, and none
        assert config.definition(path, 'SETTINGS')[1]
    assert not bare(path, 'SETTINGS')


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_every_setting_of_a_chapter_has_a_remark(chapter):
    """Of its model, and of how it generates."""
    assert config.definition(f'{chapter}.py', 'Config')[1] and not bare(f'{chapter}.py', 'Config')
    for kind in kinds(chapter):
        assert not bare(f'lab/{chapter}.py', kind.__name__), kind


def test_a_remark_may_go_on_below(tmp_path):
    path = tmp_path / 'my.py'
    path.write_text('one, two = 1, 2\none.more = 3\nSETTINGS = dict(\n    # a heading\n    one=1,  # the first,\n'
                    "            # in two lines\n    # another heading\n    two='#',  # with a sharp\n    three=3,\n)\n")
    assert config.remarks(path.read_text()) == {5: 'the first, in two lines', 8: 'with a sharp'}
    lines = [' '.join(line.split()) for line in config.describe(config.explain(path), dict(one=7))]
    assert lines == ['--one=7 the first, in two lines', "--two='#' with a sharp", '--three=3']


@pytest.mark.parametrize('name', ['gpt_mnist', 'maskgit_mnist', 'nano4m', 'flow_mnist', 'vlm_scenes'])
def test_help_shows_the_values_after_the_config(monkeypatch, capsys, name):
    """Those of train.py and of the chapter's Config, what it inherits included, each once."""
    monkeypatch.chdir(ROOT)
    printed = help_of(monkeypatch, capsys, 'train.py', f'config/{name}.py', '--batch_size=77', '--help')
    settings, chapter = config.resolve(config.read([f'config/{name}.py', '--batch_size=77']), train.SETTINGS)
    del settings['micro_batch_size']  # at most batch_size
    for setting, value in settings.items():
        assert len(re.findall(rf'^  --{setting}={re.escape(repr(value))}( |$)', printed, re.M)) == 1, setting
    assert {field.name for field in dataclasses.fields(chapter.Config)} < settings.keys()


@pytest.mark.filterwarnings('ignore:.*found in sys.modules after import of package')
def test_help_after_half_a_command(monkeypatch, capsys):
    """What cannot be read yet is passed over."""
    monkeypatch.chdir(ROOT)
    for command in ('tests/homework.py gpt --help', 'sample.py --prompt -h', 'train.py -h --compile'):
        assert help_of(monkeypatch, capsys, *command.split()).startswith('usage: ')


@pytest.mark.parametrize('command', ['train.py --help', '-m prepare.fashion_mnist -h', '-m tests.homework --help'])
def test_help_from_the_shell(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f'usage: python {command.rpartition(" ")[0]} [')


# ---------------------------------------------------------------------------------------------------------------------
# The pages

COMMANDS = sorted(set(re.findall(r'^(?:\$ |.* && )?((?:python|torchrun) .*?)(?:  #.*)?(?:   .*)?$(?!\nerror: )', PAGES, re.M)
                      + re.findall(r'`(python [^`]*)`', PAGES)))


def kinds(chapter):
    """The dataclasses of lab/CHAPTER.py: how its models generate, and `Scores`."""
    module = lab.module_of(chapter)
    return [kind for kind in vars(module).values() if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__]


def chapters_of(assigned):
    """The chapter of the run that a command names, if it has a config's name; otherwise all."""
    name = Path(str(assigned.get('init_from', assigned.get('out_dir', ('out/nano4m',)))[0])).name
    if (ROOT / f'config/{name}.py').is_file():
        return [settings_of(str(ROOT / f'config/{name}.py'))['model']]
    return ['gpt'] if name.startswith('smollm2') else CHAPTERS


def check_generation(assigned, settings, scores):
    """One of the dataclasses of the run's chapter has all that the program itself does not know."""
    refused = []
    for kind in [kind for chapter in chapters_of(assigned) for kind in kinds(chapter) if (kind.__name__ == 'Scores') == scores]:
        try:
            return options.apply(assigned, settings, kind())
        except UserError as error:
            refused.append(str(error))
    pytest.fail(', '.join(refused))


def check(program, arguments):
    """Raises UserError if a command has a setting that its program does not know, or a value of another type."""
    if program == 'train.py':
        resolve(arguments)
    elif program == 'bench.py' and not speed.wanted(arguments, {}):
        config.apply(config.read(arguments), bench.SETTINGS)
    elif program in ('bench.py', 'lab.speed'):
        speed.read(arguments, {})
    elif program in ('sample.py', 'lab.score'):
        module = importlib.import_module(program.removesuffix('.py'))
        check_generation(config.read(arguments), module.SETTINGS, program == 'lab.score')
    elif program == 'tests.homework':
        homework.settings_of(arguments)
    else:
        config.apply(config.read(arguments), settings_in(f'{program.replace(".", "/")}.py'))


@pytest.mark.parametrize('command', COMMANDS)
def test_the_pages_commands_use_settings_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program = next(word for word in words if word.endswith('.py') or word.startswith(('prepare.', 'lab.', 'tests.')))
    arguments = words[words.index(program) + 1:]
    assert program.removesuffix('.py').replace('.', '/') + '.py' in PROGRAMS
    if arguments[-1:] != ['--help']:
        check(program, arguments)


DOCSTRINGS = [(path, command) for path in PROGRAMS
              for command in re.findall(r'^ +(python .*)$', (ROOT / path).read_text().split('"""')[1], re.M)]


@pytest.mark.parametrize('path, command', DOCSTRINGS, ids=[command for _, command in DOCSTRINGS])
def test_the_docstrings_commands_use_settings_that_exist(path, command, monkeypatch):
    """What --help shows can be typed. A remark stands after three spaces, what may be left out in brackets."""
    test_the_pages_commands_use_settings_that_exist(re.sub(r'   .*|[][]', '', command), monkeypatch)


@pytest.mark.parametrize('command, message', [
    ('python -m prepare.scenes --n_trian=3', "unknown setting 'n_trian'; did you mean 'n_train'"),
    ('python -m lab.report --out_dr=out/a', "did you mean 'out_dir'"),
    ('python bench.py --backend=flash --configs=True', 'unknown setting')])
def test_a_page_with_a_wrong_setting_is_found(command, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        test_the_pages_commands_use_settings_that_exist(command, monkeypatch)


def test_a_page_with_another_chapters_setting_is_found(monkeypatch):
    for command in ('python sample.py --out_dir=out/gpt_mnist --guidance=2',
                    'python -m lab.score --out_dir=out/nano4m --text_only_run=out/a'):
        with pytest.raises(pytest.fail.Exception, match='is a setting of|unknown setting'):
            test_the_pages_commands_use_settings_that_exist(command, monkeypatch)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 30 and len(DOCSTRINGS) > 50


def test_the_table_of_chapters_counts_lines_right():
    rows = re.findall(r'^\| \d \| \[(\w+\.py)\]\(\1\) \| [^|]* \| (\d+) \|', (ROOT / 'README.md').read_text(), re.M)
    assert len(rows) == 5
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


@pytest.mark.parametrize('command', [command for command in COMMANDS if command.startswith('torchrun')])
def test_processes_of_the_pages_commands_share_the_batch(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    processes = math.prod(int(n) for n in re.findall(r'--(?:nnodes|nproc_per_node)=(\d+)', command))
    settings = resolve(words[words.index('train.py') + 1:])
    assert settings['batch_size'] % settings['micro_batch_size'] == 0
    assert settings['batch_size'] // settings['micro_batch_size'] % processes == 0


# ---------------------------------------------------------------------------------------------------------------------
# A newcomer's commands

def command(*words, cwd=ROOT, **environment):
    """(exit code, stderr) of a program."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize('path', ['prepare/scenes.py', 'prepare/text.py', 'prepare/toy2d.py', 'lab/score.py', 'lab/report.py'])
def test_a_script_started_as_a_file_names_the_command(path):
    module = path.removesuffix('.py').replace('/', '.')
    assert command(path) == (1, f'error: start it in the folder of the repository as python -m {module}\n')


def test_started_in_another_folder(tmp_path):
    code, line = command(str(ROOT / 'train.py'), '--device=cpu', cwd=tmp_path)
    assert code == 1 and line.count('\n') == 1 and line.endswith(f'(start programs in the folder of the repository: cd {ROOT})\n')
    assert not list(tmp_path.iterdir())


def test_a_config_file_as_a_setting():
    with pytest.raises(UserError, match='--config=config/x.py: name the file alone: python train.py config/x.py'):
        config.read(['--config=config/x.py'])


def test_files_in_utf_8_whatever_the_locale(tmp_path):
    """Sources and configs, with a byte order mark or without; output that the terminal's encoding lacks is escaped."""
    (tmp_path / 'mine.py').write_bytes('\ufeff# Frédéric\nmax_iters = 7\n'.encode())
    assert config.read([str(tmp_path / 'mine.py')]) == dict(max_iters=(7, str(tmp_path / 'mine.py')))
    path = str(tmp_path / 'mine.py')
    assert command('train.py', path, '--help', PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0') == (0, '')
    code, line = command('train.py', '--model=ü', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    assert code == 1 and line.startswith("error: model='\\xfc': choose one of")


def test_rank_alone():
    """As in a shell inside a SLURM job."""
    environment = {name: value for name, value in os.environ.items() if name not in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
    code = 'import config, torch\nfrom engine import processes\nconfig.run(lambda: processes.join(torch.device("cpu"), None))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment | dict(RANK='0'), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, 'error: RANK=0 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: unset RANK, or start with torchrun\n')


@pytest.mark.parametrize('program', ['train', 'sample', 'bench', 'lab.score', 'prepare.scenes'])
def test_openmp_is_told_before_torch_is_imported(program):
    """A limit of spinning counts only then; a user's own choice wins."""
    code = (f'import os, sys, importlib.abc\n'
            f'class Watch(importlib.abc.MetaPathFinder):\n'
            f'    def find_spec(self, name, path, target=None):\n'
            f'        if name == "torch":\n'
            f'            print(os.environ.get("GOMP_SPINCOUNT")), os._exit(0)\n'
            f'sys.meta_path.insert(0, Watch())\n'
            f'import {program}\n').replace('print(os.environ.get("GOMP_SPINCOUNT"))',
                                           'print(os.environ.get("GOMP_SPINCOUNT"), flush=True)')
    environment = {name: value for name, value in os.environ.items() if name != 'GOMP_SPINCOUNT'}
    for own, expected in ({}, '10000'), (dict(GOMP_SPINCOUNT='7'), '7'):
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment | own, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='a shell of POSIX')
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_closed_streams(tmp_path, closed):
    """What a program prints is then discarded."""
    program = tmp_path / 'program.py'
    program.write_text('import sys\nimport config\ndef main():\n    print("a")\n    print("b", file=sys.stderr)\n'
                       '    sys.stdout.write("c"), sys.stderr.write("d")\n    open("done", "w").close()\nconfig.run(main)\n')
    environment = os.environ | dict(PYTHONPATH=str(config.ROOT))
    done = subprocess.run(f'"{sys.executable}" program.py {closed}', shell=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and (tmp_path / 'done').exists()


def test_printing_never_fails_in_a_call(monkeypatch):
    """Not only on the command line: a script of a student prints to a terminal of another encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
    monkeypatch.setattr(sys, 'stdout', stream)
    config.read([])
    print('\N{GRINNING FACE}', flush=True)
    assert stream.buffer.getvalue() == b'\\U0001f600\n'
