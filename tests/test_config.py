"""Settings: what is known is applied, what is not is named."""
import importlib
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

import bench
import config
import train
from config import UserError
from tests import homework

ROOT = Path(__file__).parent.parent
PAGES = '\n'.join(path.read_text() for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
                  if path.stem != 'yours')  # about code that is not there yet: see tests/test_docs.py


def settings_of(*arguments, **overrides):
    return train.resolve(config.read(arguments, overrides))[0]


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


def test_model_fields_are_settings():
    assert settings_of(model='gpt', n_layer=3)['n_layer'] == 3
    assert settings_of('--model=fourm', '--use=rgb depth')['use'] == 'rgb depth'


@pytest.mark.parametrize('arguments, message', [
    (['--batchsize=3'], "unknown setting 'batchsize'; did you mean 'batch_size'"),
    (['--model=gpt', '--input_slots=3'], "unknown setting 'input_slots'"),  # another model's key
    (['--max_iters=1.5'], 'not of type int'),
    (['--max_iters=many'], 'not of type int'),
    (['--compile=1'], 'not True or False'),
    (['--max_iters'], '--name=value'),
    (['--max_iters=0'], 'at least 1'),
    (['--model=gtp'], 'choose one of flow, fourm, gpt, maskgit, vlm'),
    (['no_such.py'], 'no such config file'),
])
def test_faults_from_the_shell(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        settings_of(*arguments)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('batchsize = 3', "my.py: unknown setting 'batchsize'; did you mean 'batch_size'"),
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


@pytest.mark.parametrize('error, code, line', [
    (UserError('what, where'), 'error: what, where', ''), (FileNotFoundError('x.npy'), 'error: x.npy', ''),
    (KeyboardInterrupt(), 130, '\nstopped\n')])
def test_programs_end_with_a_line(monkeypatch, capsys, error, code, line):
    def main(*arguments, **overrides):
        assert (arguments, overrides) == (('--n=3',), dict(fashion=True))
        raise error
    monkeypatch.setattr(sys, 'argv', ['program', '--n=3'])
    with pytest.raises(SystemExit) as end:
        config.run(main, fashion=True)
    assert end.value.code == code and capsys.readouterr().err == line


def test_all_programs_do():
    programs = [path for path in (ROOT / 'sample.py', *ROOT.glob('prepare/*.py')) if '__main__' in path.read_text()]
    assert len(programs) > 15 and all('\n    config.run(' in path.read_text() for path in programs)


def test_shipped_configs_are_valid():
    for path in train.Path(config.__file__).parent.glob('*.py'):
        if path.stem != '__init__':
            settings_of(str(path))


COMMANDS = sorted(set(re.findall(r'^(?:\$ |.* && )?((?:python|torchrun) .*?)(?:  #.*)?(?:   .*)?$(?!\nerror: )', PAGES, re.M)
                      + re.findall(r'`(python [^`]*)`', PAGES)))


@pytest.mark.parametrize('command', COMMANDS)
def test_the_pages_commands_use_settings_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program = next(word for word in words if word.endswith('.py') or word.startswith(('prepare.', 'tests.')))
    arguments = words[words.index(program) + 1:]
    if program == 'train.py':
        train.resolve(config.read(arguments))
    elif program == 'bench.py':  # its own settings, and those of what it measures
        assigned = config.read(arguments)
        config.apply({name: assigned.pop(name) for name in bench.SETTINGS if name in assigned}, bench.SETTINGS)
        bench.resolve(assigned) if 'model' in assigned else config.apply(assigned, bench.SIZES)
    elif program == 'tests.homework':
        homework.settings_of(arguments)
    else:
        config.apply(config.read(arguments), importlib.import_module(program.removesuffix('.py')).SETTINGS)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 30


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
    settings, _ = train.resolve(config.read(words[words.index('train.py') + 1:]))
    assert settings['batch_size'] % settings['micro_batch_size'] == 0
    assert settings['batch_size'] // settings['micro_batch_size'] % processes == 0
