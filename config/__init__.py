"""Settings: plain Python files of assignments, then --name=value from the shell, each checked against what is known.

    python train.py config/nano4m.py --batch_size=32
    python train.py config/nano4m.py --help

A file is executed, so `max_iters = 20 * 1000` works and a remark is a remark. A mistyped name never passes: the error names the
nearest known one. --help is read from the source of a program: its docstring's commands, its settings and their remarks.
"""
import ast
import dataclasses
import difflib
import importlib
import io
import sys
import textwrap
import tokenize
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A fault that the user can mend: one line that says what is wrong, where, and what to do. Programs print the line and
    leave with exit code 1 (`run`); in a notebook it is raised like any other error."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking

def read(arguments, overrides=None):
    """['config/x.py', '--name=value', ...] and {name: value} -> {name: (value, where it was set)}; the last one wins."""
    assigned = {}
    for argument in map(str, arguments):
        if argument.startswith('-'):
            name, equals, value = argument.lstrip('-').partition('=')
            if not equals or not argument.startswith('--'):
                raise UserError(f'{argument}: settings are written --name=value; --help lists them')
            assigned[name] = (value, 'command line')
        else:
            assigned |= {name: (value, argument) for name, value in execute(argument).items()}
    return assigned | {name: (value, 'call') for name, value in (overrides or {}).items()}


def files():
    """The config files of this folder."""
    return sorted(path.as_posix() for path in Path('config').glob('[!_]*.py'))


def execute(path):
    """The public names that a config file assigns."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such config file; there are {", ".join(files())}')
    names = {}
    try:
        exec(compile(Path(path).read_text(), path, 'exec'), names)
    except Exception as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}')
    return {name: value for name, value in names.items() if not name.startswith('_') and not isinstance(value, ModuleType)}


def convert(name, value, where, default):
    """value as the type of the setting's default: int takes 1e4, float takes 1, from the shell all come as strings."""
    kind = type(default)
    try:
        if kind is str:
            if isinstance(value, (str, Path)):
                return str(value)
        elif kind is bool:
            if str(value) in ('True', 'False'):
                return str(value) == 'True'
        elif not isinstance(value, bool) and kind(number := float(value)) == number:
            return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f'{where}: {name}={value!r} is not {"True or False" if kind is bool else "of type " + kind.__name__}')


def apply(assigned, known):
    """Checks assigned against known {name: default} and returns all settings. Raises UserError at the first fault."""
    for name, (_, where) in assigned.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f'{where}: unknown setting {name!r}' + (f'; did you mean {near[0]!r}?' if near else ''))
    settings = known | {name: convert(name, value, where, known[name]) for name, (value, where) in assigned.items()}
    if settings.get('seed', 0) < 0:  # NumPy's generators take no other
        raise UserError(f'seed={settings["seed"]}: must be at least 0')
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# A run's settings and its model

def chapter(name):
    """The module of a chapter: a file at the top level that ends with `Model = ...`. Raises UserError for any other name."""
    chapters = sorted(path.stem for path in ROOT.glob('*.py') if '\nModel = ' in path.read_text(encoding='utf-8'))
    if name not in chapters:
        raise UserError(f'model={name!r}: choose one of {", ".join(chapters)}')
    return importlib.import_module(name)


def resolve(assigned, known, sources={}):
    """(all settings, the chapter's module): train.py's settings `known`, {name: default}, and those of the model, which are its Config's
    fields. If the run starts from the weights of other runs, {part: checkpoint}, their sizes are the defaults. Raises UserError."""
    name = assigned.get('model', (known['model'],))[0]
    module = chapter(name)
    own = dataclasses.asdict(module.Config())
    for part, source in sources.items():
        if not part and source['settings']['model'] != name:
            raise UserError(f'init_from names a run of model={source["settings"]["model"]!r}, not {name!r}')
        own |= {key: value for key, value in source['model_config'].items() if key in own}
    settings = apply(assigned, known | own)
    for key in known:
        least = int(key in ('max_iters', 'batch_size', 'micro_batch_size', 'eval_interval', 'log_interval'))
        if not isinstance(settings[key], str) and settings[key] < least:
            raise UserError(f'{key}={settings[key]}: must be at least {least}')
    for key in ('beta1', 'beta2', 'momentum', 'ema'):
        if settings[key] >= 1:
            raise UserError(f'{key}={settings[key]}: must be below 1')
    settings['micro_batch_size'] = min(settings['micro_batch_size'], settings['batch_size'])
    return settings, module


def build(module, settings, meta, assigned):
    """The chapter's model. The settings that the data set decides cannot be set by hand. Raises UserError."""
    for name, value in meta['config'].items():
        if name in assigned and settings[name] != value:
            raise UserError(f'{assigned[name][1]}: {name} is decided by the data set ({value!r}); leave it out')
    own = {field.name: meta['config'].get(field.name, settings[field.name]) for field in dataclasses.fields(module.Config)}
    try:
        return module.Model(module.Config(**own))
    except (AssertionError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f'model={settings["model"]!r} cannot be built: {str(error).splitlines()[0]}')


# ---------------------------------------------------------------------------------------------------------------------
# Help, from the source

def definition(path, name):
    """The settings that a file defines as `NAME = dict(...)` or as the dataclass NAME: (lines of source, [(setting, node of its
    default)])."""
    source = Path(ROOT, path).read_text(encoding='utf-8')
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == name and isinstance(node.value, ast.Call):
            return source, [(keyword.arg, keyword.value) for keyword in node.value.keywords if keyword.arg]
        if isinstance(node, ast.ClassDef) and node.name == name:
            return source, [(line.target.id, line.value) for line in node.body if isinstance(line, ast.AnnAssign)]
    return source, []


def defaults(path, name='SETTINGS'):
    """{setting: default} of a program, without importing it: nobody imports train.py."""
    return {setting: ast.literal_eval(node) for setting, node in definition(path, name)[1]}


def remarks(source):
    """{line number: remark}; a remark that goes on below, in the same column and with nothing before it, is joined."""
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


def describe(path, name, values=None, without=()):
    """Lines of help for the settings NAME of a file: each with its value, the default if none is given, and its remark."""
    source, settings = definition(path, name)
    said, lines = remarks(source), []
    for setting, node in settings:
        if setting in without:
            continue
        value = (values or {}).get(setting, ast.unparse(node))
        text = f'{value!r}' if values and setting in values else value
        head = f'  --{setting}={text}'
        wrapped = textwrap.wrap(said.get(node.end_lineno, ''), 90) or ['']
        lines.append(f'{head:<34}{wrapped[0]}'.rstrip() if len(head) < 34 else head)
        lines += [' ' * 34 + text for text in (wrapped if len(head) >= 34 else wrapped[1:]) if text]
    return lines


def describe_class(kind, values):
    """The same for a dataclass: its own settings, then those that it inherits."""
    lines, seen = [], set()
    for each in kind.__mro__[:-1]:
        path = sys.modules[each.__module__].__file__
        lines += describe(path, each.__name__, values, seen)
        seen |= {setting for setting, _ in definition(path, each.__name__)[1]}
    return lines


def help_text(program, module, arguments):
    """What --help prints for a program whose SETTINGS are in `module`: usage, commands, and the settings after the config files that
    are named beside it."""
    path = Path(program.__file__).resolve().relative_to(ROOT)
    name = path.as_posix() if len(path.parts) == 1 else f'-m {".".join(path.with_suffix("").parts)}'
    paragraphs = program.__doc__.strip().split('\n\n')
    commands = [line for text in paragraphs for line in text.splitlines() if line.lstrip().startswith(('python ', 'torchrun ', 'sbatch '))]
    assigned = read(word for word in arguments if '=' in word or word.endswith('.py'))  # --help may come after half a command
    settings = getattr(module, 'SETTINGS', {})
    values = {key: convert(key, value, where, settings[key]) for key, (value, where) in assigned.items() if key in settings}
    own = describe(module.__file__, 'SETTINGS', settings | values)
    more = module.help(assigned) if hasattr(module, 'help') else []
    return '\n'.join([f'usage: python {name}{" [config/NAME.py]" * (name == "train.py")} [--name=value ...]', '', paragraphs[0], '',
                      *commands, *(['', 'settings:', *own] if own else []), *more])


# ---------------------------------------------------------------------------------------------------------------------
# Programs

def run(main, stopped='stopped', **overrides):
    """A program, from the shell: a fault that the user can mend ends it with one line and exit code 1, Ctrl-C with 130. Returns
    what main returns; -h and --help print help instead."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ('-h', '--help')]
    try:
        if len(arguments) < len(sys.argv) - 1:
            print(help_text(sys.modules['__main__'], sys.modules[main.__module__], arguments))
            sys.exit(0)
        return main(*arguments, **overrides)
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print(f'\n{stopped}', file=sys.stderr)
        sys.exit(130)
