"""The house: which file may import which, how long a file may be, what lies at the top level.

    config <- engine <- prepare <- lab <- train, sample, bench        (A <- B: B may import A)
    gpt <- maskgit <- fourm    gpt <- flow, vlm                       chapters: PyTorch, the standard library, earlier chapters

The programs at the top and lab may import chapters; nobody imports a program. Tests may import anything, and nothing imports
them. What is not so yet is named below; each list may only shrink.
"""
import ast
import fnmatch
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ('config', 'engine', 'prepare', 'lab')
PROGRAMS = ('train', 'sample', 'bench')
CHAPTERS = {'gpt': (), 'maskgit': ('gpt',), 'fourm': ('gpt', 'maskgit'), 'flow': ('gpt',), 'vlm': ('gpt',)}  # may import
BUDGET = {'gpt.py': 330, 'maskgit.py': 300, 'fourm.py': 340, 'flow.py': 320, 'vlm.py': 220, 'train.py': 400, 'sample.py': 200,
          'bench.py': 350}  # lines
TOGETHER, OTHERS = 2600, 400
ENTRIES = {*BUDGET, *LAYERS, 'docs', 'tests', 'README.md', 'LICENSE', 'requirements.txt', 'pyproject.toml'}
OPTIONAL = {'safetensors', 'gradio'}  # README.md, Requirements
PLUGINS = {'pytest-xdist'}  # which pytest imports
DISTRIBUTIONS = {'PIL': 'pillow'}  # where pip's name is another

# What is not so yet
IMPORTS = {  # file: what it imports against the order
    'engine/graphs.py': {'gpt'},              # wraps its KVCache
    'prepare/image_tokenizers.py': {'gpt'},   # networks of chapter 1's blocks
    'prepare/scenes_parser.py': {'gpt'},
    'prepare/smollm2.py': {'gpt'},            # converts weights for it
    'prepare/siglip.py': {'vlm'},             # the same
}
LONGER = {}  # file, or 'together': its lines today
STRAY = set()  # entries of the top level


# ---------------------------------------------------------------------------------------------------------------------
# Reading a tree

def sources(root):
    """The Python files of a tree, as relative paths; `data/`, `out/` and hidden folders hold none."""
    found = [*root.glob('*.py'), *(path for folder in (*LAYERS, 'tests') for path in (root / folder).rglob('*.py'))]
    return sorted(path.relative_to(root).as_posix() for path in found)


def module_of(path):
    """'lab/gpt.py' -> 'lab.gpt', 'lab/__init__.py' -> 'lab'."""
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def imports(root, path):
    """The modules that a file imports, at any depth of its code, as full names; `from lab import gpt` is lab and lab.gpt."""
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split('/')[:-node.level] if node.level else []
            base = '.'.join([*package, *([node.module] if node.module else [])])
            found |= {base, *(f'{base}.{name.name}' for name in node.names)}
    return found


def graph(root):
    """{file: files of the tree that it imports}, packages included: lab.gpt is lab/__init__.py and lab/gpt.py."""
    paths = {module_of(path): path for path in sources(root)}
    found = {}
    for path in paths.values():
        names = {'.'.join(name.split('.')[:n + 1]) for name in imports(root, path) for n in range(name.count('.') + 1)}
        found[path] = {paths[name] for name in names if name in paths} - {path}
    return found


def place(path):
    """'lab', 'gpt', 'train', 'tests': the room of a file."""
    return Path(path.split('/')[0]).stem


def may_import(importer, imported):
    """Whether a file of one room may import one of another."""
    if importer == 'tests' or importer == imported and importer in LAYERS:
        return True
    if imported in CHAPTERS:
        return imported in CHAPTERS.get(importer, ()) or importer in ('lab', *PROGRAMS)
    if imported in LAYERS:
        return importer in PROGRAMS or importer in LAYERS and LAYERS.index(imported) < LAYERS.index(importer)
    return False  # programs, tests, and what is not in the house


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong in a tree: lines of text

def wrong_imports(root, excepted):
    """Arrows against the order, foreign packages in a chapter, and exceptions that nobody needs."""
    wrong, used, own = [], set(), {place(path) for path in sources(root)}
    for path, imported in graph(root).items():
        for target in sorted(imported):
            if not may_import(place(path), place(target)):
                if place(target) in excepted.get(path, ()):
                    used.add((path, place(target)))
                else:
                    wrong.append(f'{path} imports {target}')
        if place(path) in CHAPTERS:
            foreign = {name.split('.')[0] for name in imports(root, path)} - {'torch', *sys.stdlib_module_names, *own}
            wrong += [f'{path} imports {name}: a chapter has PyTorch and the standard library' for name in sorted(foreign)]
    unused = {(path, name) for path, names in excepted.items() for name in names} - used
    return wrong + [f'{path} no longer imports {name}: take it out of IMPORTS' for path, name in sorted(unused)]


def circles(root):
    """Files that import each other in a circle, each circle once."""
    edges, done, found = graph(root), set(), []

    def visit(path, trail):
        if path in trail:
            found.append(' -> '.join([*trail[trail.index(path):], path]))
        elif path not in done:
            for target in sorted(edges[path]):
                visit(target, [*trail, path])
            done.add(path)
    for path in edges:
        visit(path, [])
    return found


def wrong_lengths(root, excepted):
    """Files above their budget, the top-level ones together too, and exceptions that have to be lowered or taken out."""
    paths = [path for path in sources(root) if place(path) != 'tests']
    lines = {path: len((root / path).read_text(encoding='utf-8').splitlines()) for path in paths}
    limits = {path: BUDGET.get(path, OTHERS) for path in lines} | dict(together=TOGETHER)
    lines['together'] = sum(n for path, n in lines.items() if path in BUDGET)
    wrong = [f'{path}: {n} lines, at most {excepted.get(path, limits[path])}' for path, n in lines.items()
             if n > excepted.get(path, limits[path])]
    for path, allowed in excepted.items():
        n = lines.get(path, 0)
        if n <= limits.get(path, OTHERS):
            wrong.append(f'{path}: {n} lines are within its budget: take it out of LONGER')
        elif n < allowed:
            wrong.append(f'{path}: {n} lines: lower its number in LONGER')
    return wrong


def wrong_entries(root, excepted):
    """What lies at the top level beside the house, hidden files and what .gitignore names."""
    ignored = [line.rstrip('/') for line in (root / '.gitignore').read_text().split()] if (root / '.gitignore').exists() else []
    there = {path.name for path in root.iterdir() if not path.name.startswith('.')}
    stray = {name for name in there - ENTRIES if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    return ([f'{name}: not in the house' for name in sorted(stray - excepted)]
            + [f'{name} is gone: take it out of STRAY' for name in sorted(excepted - stray)])


def wrong_requirements(root):
    """Packages that the code imports and requirements.txt does not name, and the other way round."""
    own = {place(path) for path in sources(root)}
    imported = {name.split('.')[0] for path in sources(root) for name in imports(root, path)} - own - set(sys.stdlib_module_names)
    needed = {DISTRIBUTIONS.get(name, name) for name in imported} - OPTIONAL
    named = {re.split('[=<>~\\[; ]', line)[0] for line in (root / 'requirements.txt').read_text().splitlines()}
    return ([f'{name}: imported, not in requirements.txt' for name in sorted(needed - named)]
            + [f'{name}: in requirements.txt, not imported' for name in sorted(named - needed - PLUGINS)])


# ---------------------------------------------------------------------------------------------------------------------
# This tree

def test_imports_go_one_way():
    assert '\n'.join(wrong_imports(ROOT, IMPORTS)) == ''


def test_no_circle():
    assert '\n'.join(circles(ROOT)) == ''


def test_lengths():
    assert '\n'.join(wrong_lengths(ROOT, LONGER)) == ''


def test_top_level():
    assert '\n'.join(wrong_entries(ROOT, STRAY)) == ''


def test_requirements():
    """A package that comes along with another today may not tomorrow."""
    assert '\n'.join(wrong_requirements(ROOT)) == ''


def test_text_files_are_utf_8():
    """Whatever the locale: each file that the code reads or writes as text names its encoding."""
    wrong = []
    for path in sources(ROOT):
        if place(path) == 'tests':
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
                opens = isinstance(node.func, ast.Name) and name == 'open'
                text = name in ('read_text', 'write_text') and not any(isinstance(one, ast.Name) and one.id == 'name'
                                                                       for one in node.args)
                binary = any('b' in ast.unparse(one) for one in node.args[1:2])
                if (opens and not binary or text) and not any(word.arg == 'encoding' for word in node.keywords):
                    wrong.append(f'{path}:{node.lineno}')
    assert wrong == []


def test_asserts_check_no_input():
    """python -O leaves them out: none is what a try waits for, and none has a side effect."""
    wrong = []
    for path in (path for path in sources(ROOT) if place(path) != 'tests'):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8'))):
            caught = [*map(ast.walk, node.body)] if isinstance(node, ast.Try) else []
            wrong += [f'{path}:{one.lineno}' for part in caught for one in part if isinstance(one, ast.Assert)]
            if isinstance(node, ast.Assert) and any(isinstance(one, ast.NamedExpr) for one in ast.walk(node)):
                wrong.append(f'{path}:{node.lineno}')
    assert wrong == []


def test_all_files_are_seen():
    there = sources(ROOT)
    assert {'train.py', 'config/__init__.py', 'engine/runs.py', 'prepare/arrays.py', 'tests/exercises/gpt.py'} <= set(there)
    assert len(graph(ROOT)['train.py']) > 8 and 'gpt.py' in graph(ROOT)['maskgit.py']


# ---------------------------------------------------------------------------------------------------------------------
# Whether these find anything: small trees

HOUSE = {
    'config/__init__.py': 'import sys', 'engine/__init__.py': '', 'engine/a.py': 'import config\nfrom engine import b',
    'engine/b.py': 'import torch', 'prepare/data.py': 'from config import UserError\nfrom engine import a',
    'lab/__init__.py': 'import gpt\nfrom prepare import data',
    'lab/gpt.py': 'import lab', 'gpt.py': 'import math\nimport torch.nn as nn', 'maskgit.py': 'from gpt import norm',
    'fourm.py': 'import maskgit, gpt', 'flow.py': 'import gpt', 'vlm.py': 'import gpt',
    'train.py': 'import config, lab\nfrom engine import a', 'sample.py': 'import lab.gpt', 'bench.py': 'import gpt',
    'tests/test_a.py': 'import train, sample\nfrom lab import gpt',
    '.gitignore': 'data/\nout/\n.venv*/\n', 'README.md': '', 'data/scenes/meta.json': '', '.ci/run': '', 'out/a/log.jsonl': '',
}


@pytest.fixture
def house(tmp_path):
    """A small house in order; build(changes) rebuilds some of its files."""
    def build(changes):
        for name, text in changes.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path
    build(HOUSE)
    return build


def test_a_house_in_order(house):
    root = house({})
    assert [*wrong_imports(root, {}), *circles(root), *wrong_lengths(root, {}), *wrong_entries(root, set())] == []


@pytest.mark.parametrize('path, code, found', [
    ('config/__init__.py', 'import engine.b', 'engine/b.py'), ('engine/b.py', 'from prepare import data', 'prepare/data.py'),
    ('engine/b.py', 'from prepare.data import x', 'prepare/data.py'), ('prepare/data.py', 'import lab', 'lab/__init__.py'),
    ('engine/a.py', 'def f():\n    if x:\n        import gpt', 'gpt.py'),
    ('engine/a.py', 'from ..prepare import data', 'prepare/data.py'), ('lab/__init__.py', 'import sample', 'sample.py'),
    ('bench.py', 'import train', 'train.py'), ('train.py', 'from tests import test_a', 'tests/test_a.py'),
    ('gpt.py', 'import maskgit', 'maskgit.py'), ('flow.py', 'from maskgit import mask', 'maskgit.py'),
    ('vlm.py', 'import config', 'config/__init__.py'),
    ('fourm.py', 'class A:\n    from engine import b', 'engine/b.py')])
def test_an_import_the_other_way_is_found(house, path, code, found):
    assert f'{path} imports {found}' in wrong_imports(house({path: code}), {})


def test_a_foreign_package_in_a_chapter_is_found(house):
    assert wrong_imports(house({'flow.py': 'import numpy as np\nimport torch.nn'}), {}) == [
        'flow.py imports numpy: a chapter has PyTorch and the standard library']
    assert wrong_imports(house({'flow.py': '', 'lab/gpt.py': 'import numpy'}), {}) == []


def test_exceptions_of_imports_may_only_shrink(house):
    root = house({'prepare/data.py': 'from gpt import norm'})
    assert wrong_imports(root, {'prepare/data.py': {'gpt'}}) == []
    assert wrong_imports(root, {'prepare/data.py': {'gpt', 'vlm'}}) == [
        'prepare/data.py no longer imports vlm: take it out of IMPORTS']
    assert len(wrong_imports(root, {'prepare/gone.py': {'gpt'}})) == 2


@pytest.mark.parametrize('changes, circle', [
    ({'engine/b.py': 'import engine.a'}, 'engine/a.py -> engine/b.py -> engine/a.py'),
    ({'lab/__init__.py': 'def f():\n    from lab import gpt'}, 'lab/__init__.py -> lab/gpt.py -> lab/__init__.py'),
    ({'prepare/data.py': 'from prepare import more', 'prepare/more.py': 'import prepare.third',
      'prepare/third.py': 'from prepare.data import x'},
     'prepare/data.py -> prepare/more.py -> prepare/third.py -> prepare/data.py')])
def test_a_circle_is_found(house, changes, circle):
    assert circles(house(changes)) == [circle]


def test_a_file_too_long_is_found(house):
    assert wrong_lengths(house({'gpt.py': 'x = 1\n' * 331}), {}) == ['gpt.py: 331 lines, at most 330']
    assert wrong_lengths(house({'gpt.py': 'x = 1\n' * 330, 'engine/a.py': '#\n' * 401, 'tests/test_a.py': '#\n' * 999}), {}) == [
        'engine/a.py: 401 lines, at most 400']


def test_all_together_too_long_are_found(house):
    """The budgets of the files add up to less, but an exception must not lengthen the whole."""
    root = house({path: '#\n' * lines for path, lines in BUDGET.items()} | {'train.py': '#\n' * 541})
    assert wrong_lengths(root, {'train.py': 541}) == ['together: 2601 lines, at most 2600']


def test_exceptions_of_lengths_may_only_shrink(house):
    root = house({'gpt.py': '#\n' * 350})
    assert wrong_lengths(root, {'gpt.py': 350}) == []
    assert wrong_lengths(root, {'gpt.py': 349}) == ['gpt.py: 350 lines, at most 349']
    assert wrong_lengths(root, {'gpt.py': 351}) == ['gpt.py: 350 lines: lower its number in LONGER']
    assert wrong_lengths(house({'gpt.py': '#\n' * 330}), {'gpt.py': 350}) == [
        'gpt.py: 330 lines are within its budget: take it out of LONGER']
    assert wrong_lengths(root, {'lab/gone.py': 500}) == ['lab/gone.py: 0 lines are within its budget: take it out of LONGER']


def test_a_stray_entry_is_found(house):
    root = house({'notes.txt': '', 'assets/a.png': '', '.venv3/x': '', '.hidden': ''})
    assert wrong_entries(root, set()) == ['assets: not in the house', 'notes.txt: not in the house']
    assert wrong_entries(root, {'assets', 'logs'}) == ['notes.txt: not in the house', 'logs is gone: take it out of STRAY']


def test_a_missing_requirement_is_found(house):
    root = house({'requirements.txt': 'torch==2.13.0\npillow==13\nwandb==0.31.0\n',
                  'lab/gpt.py': 'from PIL import Image\nimport filelock\n'})
    assert wrong_requirements(root) == ['filelock: imported, not in requirements.txt', 'wandb: in requirements.txt, not imported']


def test_lines_fit_a_page():
    wide = [f'{path}:{i}' for path in sources(ROOT) if place(path) != 'tests'
            for i, line in enumerate((ROOT / path).read_text(encoding='utf-8').splitlines(), 1) if len(line) > 120]
    assert not wide
