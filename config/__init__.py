"""
Settings: Python files of assignments, then --name=value from the command line, each checked against the known settings.

    python train.py config/nano4m.py --batch_size=32
    python train.py config/nano4m.py --help

A config file is executed as Python, so `max_iters = 20 * 1000` and comments work. An unknown name is an error that
names the nearest known one. --help reads a program's source: the commands of its docstring, its settings and their
comments.
"""
import ast
import dataclasses
import difflib
import errno
import importlib
import io
import math
import os
import re
import sys
import textwrap
import time
import tokenize
from contextlib import suppress
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# OpenMP threads spin at a barrier until the last one arrives. On a busy machine they take the core of that thread: a
# training step was 50 times as slow. This limit costs nothing on an idle machine. Set it before importing torch.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and what to do. Programs print this
    line and exit with code 1 (`run`); in a notebook it is an exception like any other."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking

RANGES = dict(  # smallest and largest value, in every program
    seed=(0, 2 ** 63 - 1), threads=(0, 1024), batch_size=(1, 2 ** 24), micro_batch_size=(1, 2 ** 24),
    max_iters=(1, 10 ** 12), eval_interval=(1, 10 ** 12), log_interval=(1, 10 ** 12),
    n=(1, 10 ** 5), n_score=(1, 10 ** 6), max_new_tokens=(0, 10 ** 9),
    min_lr=(0, 1), decay=(0, 1), n_layer=(1, 1000), n_layer_encoder=(1, 1000), n_layer_decoder=(1, 1000),
    vision_layer=(1, 1000), n_head=(1, 1000), vision_head=(1, 1000), n_embd=(1, 2 ** 16), vision_embd=(1, 2 ** 16),
    block_size=(0, 2 ** 20), vocab_size=(0, 2 ** 24), length=(2, 2 ** 20), size=(1, 4096), views=(1, 1000),
    n_train=(1, 10 ** 8), n_val=(1, 10 ** 8), n_turns=(1, 1000), n_where=(0, 1000), workers=(0, 1024),
    repeats=(1, 10 ** 6), seconds=(0, 10 ** 6), limit=(1, 10 ** 6))
LISTS = dict(  # smallest and largest of several numbers with commas between, in a str
    num_input_tokens=(1, 2 ** 14), num_target_tokens=(1, 2 ** 14), dirichlet_alphas=(1e-6, 1e6))
DASHES = '-', '\u2013', '\u2014'  # a word processor makes a longer dash of two
PATHS = {  # settings that are files or folders: ~ is the home folder, which shells do not expand in --out_dir=~/runs
    'out_dir', 'out', 'init_from', 'dataset', 'checkpoint', 'input', 'images', 'image', 'source', 'prompts', 'draft',
    'against', 'compare', 'text_only_run', 'save', 'trace', 'plot', 'decoder', 'encoding', 'scenes', 'data', 'grade',
    'train', 'run'}


def read(arguments, overrides=None):
    """['config/x.py', '--name=value', ...] and {name: value} -> {name: (value, where it was set)}. The command line
    counts more than the files, wherever it names them; of several files the last one counts."""
    from_files, given = {}, {}
    print_anything()
    for argument in map(str, arguments):
        if argument.startswith(DASHES) or '=' in argument and not argument.endswith('.py'):
            name, equals, value = argument.lstrip(''.join(DASHES)).partition('=')
            if not equals or not argument.startswith('--'):
                raise UserError(f'{argument}: settings are written --{name}={value or "value"}; --help lists them')
            if name == 'config':
                raise UserError(f'{argument}: name the file alone: python train.py {value or "config/nano4m.py"}')
            given[name] = (value, 'command line')
        else:
            from_files |= {name: (value, argument) for name, value in execute(argument).items()}
    return from_files | given | {name: (value, 'call') for name, value in (overrides or {}).items()}


def print_anything():
    """From here on printing never fails, whatever the terminal's encoding."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a notebook's stream, or None; a closed file
            stream.reconfigure(errors='backslashreplace')


def elsewhere():
    """A hint for messages about missing files, '' if the working folder may well be that of the repository."""
    return '' if Path('prepare').is_dir() else f' (start programs in the folder of the repository: cd {ROOT})'


def files():
    """The config files of this folder."""
    return [path.as_posix() for path in python_files('config')]


def python_files(folder):
    """The Python files of a folder, sorted; not the hidden copies of editors and systems."""
    return sorted(path for path in Path(folder).glob('[!._]*.py') if path.is_file())


def files_with(folder, pattern):
    """The names of the Python files of a folder that have a line which begins with a regular expression."""
    return [path.stem for path in python_files(folder)
            if re.search(f'^{pattern}', path.read_text(encoding='utf-8', errors='replace'), re.M)]


def execute(path):
    """The public names that a config file assigns, without modules, functions and classes."""
    if not str(path).endswith('.py'):
        raise UserError(f'{path} is no config file (NAME.py): settings are written --name=value; --help lists them')
    if not Path(path).is_file():
        there = f'; there are {", ".join(files())}' if files() else ''
        raise UserError(f'{path}: no such config file{there}{elsewhere()}')
    names = {'__file__': path}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8-sig'), path, 'exec'), names)  # -sig: with a BOM, too
    except Exception as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}')
    return {name: value for name, value in names.items()
            if not (name.startswith('_') or isinstance(value, ModuleType) or callable(value))}


def nameless(path):
    """Whether a file or folder, or one of several with commas between, lacks a name that can be read: it consists of
    spaces, or has control characters such as a newline."""
    return any(part.isspace() for part in path.replace(',', '/').split('/')) or any(
        ord(character) < 32 or ord(character) == 127 for character in path)


def convert(name, value, where, default):
    """Converts a value to the type of the setting's default: 1e4 for an int, 1 for a float, strings from the command
    line."""
    kind = type(default)
    if name in PATHS and isinstance(value, (str, Path)) and (nameless(str(value)) or default and not str(value)):
        raise UserError(f'{where}: {name}={str(value)!r} is no name of a file or folder')
    try:
        if kind is str:
            if isinstance(value, (str, Path)):
                return ','.join(map(os.path.expanduser, str(value).split(','))) if name in PATHS else str(value)
        elif kind is bool:
            if str(value) in ('True', 'False'):
                return str(value) == 'True'
        elif kind is int and str(value).strip().lstrip('+-').isdecimal():
            return int(value)  # exact, also above 2^53, where a float is not
        elif not isinstance(value, bool) and kind(number := float(value)) == number and math.isfinite(number):
            return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    expected = {bool: 'True or False', float: 'of type float and finite'}.get(kind, f'of type {kind.__name__}')
    raise UserError(f'{where}: {name}={value!r} is not {expected}')


def apply(assigned, known):
    """All settings: `known`, {name: default}, with the values assigned. Raises UserError at the first fault."""
    for name, (_, where) in assigned.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f'{where}: unknown setting {name!r}' + (f'; did you mean {near[0]!r}?' if near else '')
                            + '; the name of a helper variable begins with _' * where.endswith('.py'))
    settings = known | {name: convert(name, value, where, known[name]) for name, (value, where) in assigned.items()}
    for name, value in settings.items():
        low, high = RANGES.get(name, (value, value))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(f'{name}={value}: must be at {f"least {low}" if value < low else f"most {high}"}')
    for name, (low, high) in LISTS.items():
        text = settings.get(name, str(low))
        numbers = [convert(name, part, repr(text), low) for part in text.split(',')]
        if not low <= min(numbers) <= max(numbers) <= high:
            raise UserError(f'{name}={text!r}: each number must be from {low} to {high}')
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# A run's settings and its model

def chapter(name):
    """The module of a chapter: a top-level file that contains `Model = ...`. Raises UserError for any other name."""
    chapters = files_with(ROOT, r'Model\s*=')
    if name not in chapters:
        raise UserError(f'model={name!r}: choose one of {", ".join(chapters)}')
    return importlib.import_module(name)


def resolve(assigned, known, sources={}):
    """(all settings, module of the chapter). The settings are those of train.py, `known` {name: default}, and the
    fields of the chapter's Config. If the run starts from the weights of other runs, `sources` {part: checkpoint},
    their sizes are the defaults. Raises UserError."""
    name = assigned.get('model', (known['model'],))[0]
    module = chapter(name)
    own = dataclasses.asdict(module.Config())
    for part, source in sources.items():
        if not part and source['settings']['model'] != name:
            raise UserError(f'init_from names a run of model={source["settings"]["model"]!r}, not {name!r}')
        own |= {key: value for key, value in source['model_config'].items() if key in own}
    settings = apply(assigned, known | own)
    for key, value in settings.items():
        if not isinstance(value, (int, float)):
            continue
        if value < (low := min(0, (known | own)[key])):
            raise UserError(f'{key}={value}: must be at least {low}')
        if key.endswith('_prob') and value > 1:
            raise UserError(f'{key}={value}: must be at most 1')
        if key in ('beta1', 'beta2', 'momentum', 'ema', 'dropout', 'label_dropout') and value >= 1:
            raise UserError(f'{key}={value}: must be below 1')
    settings['micro_batch_size'] = min(settings['micro_batch_size'], settings['batch_size'])
    return settings, module


def build(module, settings, meta, assigned):
    """The chapter's model. Settings that the data set determines cannot be assigned. Raises UserError."""
    for name, value in meta['config'].items():
        if name in assigned and settings[name] != value:
            raise UserError(f'{assigned[name][1]}: {name} is decided by the data set ({value!r}); leave it out')
    names = [field.name for field in dataclasses.fields(module.Config)]
    own = {name: meta['config'].get(name, settings[name]) for name in names}
    try:
        return module.Model(module.Config(**own))
    except (AssertionError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'model={settings["model"]!r} cannot be built: {reason}')


# ---------------------------------------------------------------------------------------------------------------------
# Help, from the source

def definition(path, name):
    """The settings that a file defines as `NAME = dict(...)` or as a dataclass NAME: (source, [(setting, ast node of
    its default)])."""
    source = Path(ROOT, path).read_text(encoding='utf-8')
    for node in ast.parse(source).body:
        if (isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == name
                and isinstance(node.value, ast.Call)):
            return source, [(keyword.arg, keyword.value) for keyword in node.value.keywords if keyword.arg]
        if isinstance(node, ast.ClassDef) and node.name == name:
            return source, [(line.target.id, line.value) for line in node.body if isinstance(line, ast.AnnAssign)]
    return source, []


def defaults(path, name='SETTINGS'):
    """{setting: default} of a program, without an import: no module imports train.py."""
    return {setting: ast.literal_eval(node) for setting, node in definition(path, name)[1]}


def remarks(source):
    """{line number: comment} of the comments after code. Further lines of a comment, in the same column and alone in
    their lines, are joined to it."""
    found, start, column, end = {}, 0, -1, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, (line, place) = token.string.lstrip('# '), token.start
            alone = not token.line[:place].strip()
            if alone and place == column and line == end + 1:
                found[start] += f' {text}'
            elif not alone:
                found[line], start, column = text, line, place
            end = line
    return found


def explain(path, name='SETTINGS'):
    """{setting: (default as source text, comment)} of the settings NAME of a file."""
    source, settings = definition(path, name)
    comments = remarks(source)
    return {setting: (ast.unparse(node), comments.get(node.end_lineno, '')) for setting, node in settings}


def explain_class(kind):
    """`explain` of a dataclass: its own settings, then those that it inherits."""
    found = {}
    for each in kind.__mro__[:-1]:
        own = explain(sys.modules[each.__module__].__file__, each.__name__)
        found |= {setting: own[setting] for setting in own if setting not in found}
    return found


def describe(explained, values=()):
    """Lines of help: each setting with its value (its default, if it has none) and its comment."""
    lines = []
    for setting, (default, comment) in explained.items():
        head = f'  --{setting}={repr(values[setting]) if setting in values else default}'
        wrapped = textwrap.wrap(comment, 90) or ['']
        lines.append(f'{head:<34}{wrapped[0]}'.rstrip() if len(head) < 34 else head)
        lines += [' ' * 34 + text for text in (wrapped if len(head) >= 34 else wrapped[1:]) if text]
    return lines


def help_text(program, module, arguments):
    """The text of --help for a program whose SETTINGS are in `module`: usage, commands, and the settings after the
    config files of the command line."""
    path = Path(program.__file__).resolve().relative_to(ROOT)
    name = path.as_posix() if len(path.parts) == 1 else f'-m {".".join(path.with_suffix("").parts)}'
    paragraphs = program.__doc__.strip().split('\n\n')
    commands = [line for text in paragraphs for line in text.splitlines()
                if line.lstrip().startswith(('python ', 'torchrun ', 'sbatch '))]
    assigned = read(word for word in arguments if '=' in word or word.endswith('.py'))  # the command may be incomplete
    settings = getattr(module, 'SETTINGS', {})
    values = {name: convert(name, value, where, settings[name])
              for name, (value, where) in assigned.items() if name in settings}
    own = describe(explain(module.__file__), settings | values)
    more = module.help(assigned) if hasattr(module, 'help') else []
    usage = f'usage: python {name}{" [config/NAME.py]" * (name == "train.py")} [--name=value ...]'
    return '\n'.join([usage, '', paragraphs[0], '', *commands, *(['', 'settings:', *own] if own else []), *more])


# ---------------------------------------------------------------------------------------------------------------------
# Programs

CLOSED = errno.EPIPE, errno.EIO, errno.EINVAL  # writing to a pipe whose reader has ended, to a terminal; on Windows


def flush(text=''):
    """Prints a text and flushes standard output; at the exit of Python, a fault would be a traceback. Returns the
    fault, if there is one; later output is then discarded."""
    try:
        print(text, end='', flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error


def run(main, stopped='stopped', **overrides):
    """Runs main(*arguments of the command line, **overrides) as a program and returns its result. A UserError ends the
    program with one line and exit code 1, Ctrl-C with code 130, a closed pipe silently with code 141; -h and --help
    print help instead."""
    for stream in ('stdout', 'stderr'):
        if getattr(sys, stream) is None:  # closed, as by 2>&-
            setattr(sys, stream, open(os.devnull, 'w', encoding='utf-8'))
    arguments = [argument for argument in sys.argv[1:] if argument not in ('-h', '--help')]
    try:
        if len(arguments) < len(sys.argv) - 1:
            print(help_text(sys.modules['__main__'], sys.modules[main.__module__], arguments))
            sys.exit(flush() and 141)
        result = main(*arguments, **overrides)
        if (fault := flush()) and fault.errno not in CLOSED:
            raise fault
        return result
    except Exception as error:
        if os.environ.get('RANK', '0') != '0':  # process 0 has the same fault: its line, then its end ends this one,
            time.sleep(60)  # within half a minute on a busy machine
        if isinstance(error, MemoryError):
            error = UserError(f'not enough memory ({error or "no number is known"}): choose smaller sizes')
        if isinstance(error, PermissionError):
            error = UserError(f'{error}: close a program that has it open, ask its owner for permission, or use a copy '
                              'of its folder')
        if not isinstance(error, (UserError, OSError)):
            raise
        closed = getattr(error, 'errno', 0) in CLOSED
        if flush('\n' * closed) and closed:  # as in `| head -1`
            sys.exit(141)  # 128 + SIGPIPE
        sys.exit(f'error: {str(error).removesuffix(elsewhere())}{elsewhere()}')
    except KeyboardInterrupt:
        print(f'\n{stopped}', file=sys.stderr)
        sys.exit(130)
