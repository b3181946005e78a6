"""The documentation runs: snippets print what stands behind them, commands do something, names exist, changes apply."""
import contextlib
import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import maskgit
import lab
import sample
import train
from engine import checkpoints, devices
from prepare import judge, mnist, text, toy2d
from tests.conftest import ROOT
from tests.test_config import COMMANDS, PAGES
from tests.test_mnist import REAL, toy_digits

README, CHAPTER_0, YOURS = (Path(ROOT, name).read_text() for name in ('README.md', 'docs/pytorch.md', 'docs/yours.md'))


def snippets(page):
    """[(Python code, the output that stands behind it)] of a page."""
    return re.findall(r'^```python\n(.*?)^```\n(?:```\n(.*?)^```)?', page, re.S | re.M)


def find(name):
    """What a name such as prepare.judge.Judge stands for; AttributeError or ModuleNotFoundError where there is no such thing."""
    parts = name.split('.')
    cut = 2 if parts[0] in ('engine', 'lab', 'prepare') else 1
    thing = importlib.import_module('.'.join(parts[:cut]))
    for part in parts[cut:]:
        thing = getattr(thing, part)
    return thing


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 0

@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A working folder with data/mnist as `prepare.mnist --subset=t10k` leaves it, without judges; or toys."""
    splits = mnist.read_splits(dict(subset='t10k', fashion=False, seed=0)) if REAL.exists() else {
        'train': toy_digits(2000), 'val': toy_digits(200, 1)}
    for split, arrays in splits.items():
        (tmp_path / 'data' / 'mnist' / split).mkdir(parents=True)
        for name, array in zip(('image', 'label'), arrays):
            np.save(tmp_path / 'data' / 'mnist' / split / f'{name}.npy', array)
    monkeypatch.chdir(tmp_path)


def test_chapter_0_prints_what_it_says(digits, capsys):
    found, names = snippets(CHAPTER_0), {}
    assert len(found) > 15
    for code, output in found:
        exec(code, names)
        assert capsys.readouterr().out == output, code


def test_no_other_page_has_snippets_of_python():
    tested = {'pytorch': len(snippets(CHAPTER_0)), 'cluster': 1, 'homework': 1, 'yours': 3}  # homework's: tests/test_homework.py
    for path in Path(ROOT, 'docs').glob('*.md'):
        assert path.read_text().count('```python') == tested.get(path.stem, 0), path
    assert len(snippets(README)) == 1


def test_from_a_notebook(work):
    (code, _), = snippets(README)
    short = code.replace('max_iters=100', 'max_iters=1, batch_size=2, eval_iters=1, n_layer_encoder=1, n_layer_decoder=1, '
                         'n_embd=32, compile=False, pictures=False')
    assert short != code
    exec(short, {})
    assert list(Path('out/try').glob('sample_*.png'))


def test_from_a_notebook_on_a_server(toys):
    (code, _), = snippets(Path(ROOT, 'docs/cluster.md').read_text())
    code = re.sub(r'max_iters=(\d)00', r'max_iters=\1, batch_size=2, n_embd=32, n_head=2, n_layer=1, compile=False, pictures=False', code)
    exec(code, {})
    assert checkpoints.read(Path('out/server/ckpt_last.pt'))['step'] == 2 and list(Path('out/server').glob('sample_*.png'))


def test_from_a_notebook_as_the_setting_up_says(toys):
    code = re.search(r'^    (import train.*\n(?:    .*\n)+)', Path(ROOT, 'docs/setup.md').read_text(), re.M)[1]
    code = code.replace('\n    ', '\n')
    assert 'max_iters=500' in code
    exec(code.replace('max_iters=500', 'max_iters=1, batch_size=8, micro_batch_size=8, pictures=False, n_embd=8'), {})
    assert list(Path('out/first').glob('sample_*.png'))


# ---------------------------------------------------------------------------------------------------------------------
# Names

FILES = 'gpt|maskgit|fourm|flow|vlm|train|sample|bench|config|engine|lab|prepare'


def test_names_of_the_code_exist():
    names = sorted(set(re.findall(rf'`((?:{FILES})(?:\.\w+)+)`', PAGES + YOURS)))
    assert len(names) > 30
    for name in names:
        if not name.endswith(('.py', '.md', '.sbatch')):
            find(name)


TABLES = {path.stem: page.split('## Where the paper is in the code')[1] for path in sorted(Path(ROOT, 'docs').glob('*.md'))
          if '## Where the paper is in the code' in (page := path.read_text())}


@pytest.mark.parametrize('chapter', TABLES)
def test_equations_have_a_place_in_the_file(chapter):
    table = re.search(r'(?:^\|.*\n)+', TABLES[chapter], re.M)[0]
    rows = [row.split('|')[2:3] for row in table.splitlines()[2:]]
    assert len(rows) > 5
    for place, in rows:
        names = re.findall(r'`([\w.]+)`', place)
        assert names, place
        for name in names:
            find(name if name.startswith('lab.') else f'{chapter}.{name}')


def test_each_chapter_has_such_a_table():
    assert len(TABLES) >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Commands

SHORT = dict(max_iters=1, batch_size=2, micro_batch_size=2, eval_iters=1, compile=False, pictures=False, device='cpu',
             dtype='float32', n_layer=1, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, mlp_hidden_dim=32, ot_rounds=1)
TOYS = ('shakespeare', 'mnist', 'toy2d', 'scenes')


def arguments_of(command):
    words = shlex.split(command)
    program = next(i for i, word in enumerate(words) if word.endswith('.py') or word.startswith(('lab.', 'prepare.', 'tests.')))
    return words[program], words[program + 1:]


def trains_on(command):
    program, arguments = arguments_of(command)
    return config.read(arguments).get('dataset', ('',))[0] if program == 'train.py' else ''


def folder_of(arguments):
    settings = config.read(arguments)
    return settings['out_dir'][0] if 'out_dir' in settings else f'out/{Path(arguments[0]).stem}'


with contextlib.chdir(ROOT):  # where the config files are
    TRAIN = {folder_of(arguments_of(command)[1]): command for command in COMMANDS if trains_on(command) in TOYS}
SAMPLE = [command for command in COMMANDS if 'sample.py' in command and not re.search('--retrieve|--help', command) and any(
    f'--out_dir={folder}' in shlex.split(command) for folder in TRAIN)]


@pytest.fixture(scope='module')
def toys(work):
    """The data sets that the commands name, in small, and files of the names that they use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, 'read_part', lambda part, fashion: toy_digits(200 if part == 'train' else 60, len(part)))
        patch.setattr(judge.train_judge, '__defaults__', (0, 2, 16))
        mnist.main(views=2)
    Path('toy.txt').write_text('ROMEO: JULIET, my lord! KING RICHARD: My lady? ' * 60)
    text.main(input='toy.txt', out='data/shakespeare')
    toy2d.main(n_train=200, n_val=50)
    Image.new('RGB', (64, 64)).save('FILE.png'), Image.new('L', (64, 64), 255).save('MASK.png')
    Path('FILE').write_text('ROMEO:\nJULIET\n')


@pytest.fixture
def trained(toys, monkeypatch):
    """A function that trains a run of the pages for one step, in its own folder."""
    monkeypatch.setattr(devices, 'matmul_rate', lambda *_: 1e9)

    def run(folder):
        if not Path(folder, 'ckpt_last.pt').exists():
            arguments = arguments_of(TRAIN[folder])[1]
            known = config.resolve(config.read(arguments), train.SETTINGS)[0]
            train.main(*arguments, **{name: value for name, value in SHORT.items() if name in known}, out_dir=folder)
    return run


@pytest.mark.parametrize('folder', TRAIN)
def test_train_commands_run(folder, trained):
    trained(folder)
    assert Path(folder, 'log.jsonl').is_file()


@pytest.mark.parametrize('command', SAMPLE)
def test_sample_commands_run(command, trained, capsys):
    _, arguments = arguments_of(command)
    for draft in re.findall(r'--draft=(\S+)', command):
        trained(f'out/{draft}')
    trained(folder := folder_of(arguments))
    capsys.readouterr()
    model = checkpoints.read(Path(folder, 'ckpt_last.pt'))['settings']['model']
    run = lab.open_run(Path(folder, 'ckpt_last.pt'))
    known = ['n', *(field.name for field in dataclasses.fields(lab.module_of(model).settings_of(run)))]
    sample.main(*arguments, **{name: value for name, value in dict(n=1, max_new_tokens=4, steps=2).items() if name in known})
    assert capsys.readouterr().out


def test_a_folder_has_one_run(monkeypatch):
    """Commands that train in the same folder train the same model on the same data."""
    monkeypatch.chdir(ROOT)
    runs = {}
    for program, arguments in map(arguments_of, [*COMMANDS, *re.findall('^python train.py .*', YOURS, re.M)]):
        if program == 'train.py':
            assigned = {name: value for name, (value, _) in config.read(arguments).items()}
            model, dataset = (assigned.get(name, train.SETTINGS[name]) for name in ('model', 'dataset'))
            file = next((word for word in arguments if word.endswith('.py')), model)
            folder, run = assigned.get('out_dir', f'out/{Path(file).stem}'), (model, dataset)
            assert runs.setdefault(folder, run) == run, arguments
    assert len(runs) > 20


def test_most_commands_are_run():
    assert len(TRAIN) > 10 and len(SAMPLE) > 20


FAULTS = re.findall(r'^\$ (python .*)\n(error: .*)$', PAGES, re.M)


@pytest.mark.parametrize('command, answer', FAULTS)
def test_faults_are_those_shown(command, answer):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, '', f'{answer}\n')


# ---------------------------------------------------------------------------------------------------------------------
# Make it yours

@pytest.fixture
def mine(tmp_path):
    """A copy of the repository's code with the changes of docs/yours.md."""
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    for name in ('config', 'engine', 'lab', 'prepare'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    for kind, name, body in re.findall(r'^```(python|diff) (\S+)\n(.*?)^```', YOURS, re.S | re.M):
        path = tmp_path / name
        if kind == 'python':
            path.write_text(body)
            continue
        for hunk in body.split('@@\n'):
            before, after = (''.join(f'{line[1:]}\n' for line in hunk.splitlines() if line[0] in ' ' + sign) for sign in '-+')
            code = path.read_text()
            assert code.count(before) == 1, f'{name} no longer has these lines once: {before}'
            path.write_text(code.replace(before, after))
    return tmp_path


def python(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(path):
    """A module from a file, beside the repository's own of the same name."""
    spec = importlib.util.spec_from_file_location(f'my_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_order(mine):
    changed = load(mine / 'maskgit.py')
    assert changed.spiral_order([3, 3]).tolist() == [1, 2, 3, 8, 0, 4, 7, 6, 5]
    for grid in ([7, 7], [4, 6], [9]):
        rank = changed.spiral_order(grid)
        assert sorted(rank.tolist()) == list(range(len(rank)))
    empty = torch.full((1, 49), -1)
    states = list(changed.iterative_decode(empty, lambda tokens, _: (torch.ones_like(tokens), None), [7, 7], 49, 'spiral'))
    assert (states[0] >= 0).nonzero().tolist() == [[0, 24]] and (states[-1] >= 0).all()  # the middle first
    with pytest.raises(ValueError, match='order is one of'):
        next(maskgit.iterative_decode(empty, None, [7, 7], 7, 'spiral'))


def test_meanflow(mine):
    """The changed chapter trains a step, on intervals for the set fraction of samples, and generates in one step."""
    changed, generator = load(mine / 'flow.py'), torch.Generator().manual_seed(0)
    for shape in (dict(image_size=8, n_head=2, n_layer=1), dict(image_size=0, channels=2, n_layer=2)):
        model = changed.Flow(changed.Config(n_embd=16, mlp_hidden_dim=16, meanflow=0.25, **shape))
        data = dict(image=torch.randint(256, (40, 8, 8))) if model.config.image_size else dict(point=torch.randn(40, 2))
        batch = model.prepare_batch(data | dict(label=torch.arange(40) % 10), generator, None)
        assert (batch['r'] < batch['t']).sum() == 10 == (batch['r'] != batch['t']).sum()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            loss, logs = model(batch)
            assert logs['loss'][1] == 30 and loss.isfinite()
            loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        for guidance in (1.0, 2.0):
            states, nfe = model.generate(torch.arange(4), 1, 'meanflow', guidance, generator=generator)
            assert nfe == 1 and states.shape == (2, 4, *model.shape) and states.isfinite().all()


def test_meanflow_targets_agree_with_finite_differences(mine):
    changed = load(mine / 'flow.py')
    torch.manual_seed(0)
    model = changed.Flow(changed.Config(image_size=8, n_head=2, n_layer=2, n_embd=16, mlp_hidden_dim=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    z, v, label = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    t, r, h = torch.tensor([0.5, 0.7, 0.9]), torch.tensor([0.5, 0.2, 0.0]), 5e-4
    with torch.no_grad():
        ahead, back = (model.velocity(z + d * v, torch.stack((t + d, r), 1), label) for d in (h, -h))
    target = model.meanflow_target(z, v, t, r, label)
    assert torch.allclose(target, v - (t - r).view(3, 1, 1, 1) * (ahead - back) / (2 * h), atol=0.02)
    assert torch.equal(target[0], v[0])


def test_a_new_data_set_and_a_new_model(mine, toys):
    (mine / 'data').mkdir()
    (mine / 'data' / 'mnist').symlink_to(Path('data', 'mnist').resolve())
    printed = python(mine, '-c', '''
import torch, train, sample
from lab import report
short = dict(device='cpu', compile=False, batch_size=8, max_iters=60, warmup_iters=1, n_embd=32)
train.main(model='gpt', dataset='sorting', n_layer=1, n_head=2, **short)
sample.main('--out_dir=out/gpt', '--prompt=47193028>', '--max_new_tokens=8', '--temperature=0')
values = train.main(model='vae', dataset='mnist', **short)
assert 50 < values['loss'] < 480, values  # 784 ln 2 = 543 before training
sample.main(out_dir='out/vae', n=20)
report.main(out_dir='out/vae')
''')
    assert re.search(r'^47193028>[0-9>]{8}$', printed, re.M)
    assert (mine / 'out' / 'vae' / 'report.md').is_file() and list((mine / 'out' / 'vae').glob('sample_*.png'))
