"""Settings: plain Python files of assignments, then --name=value from the shell, each checked against what is known.

    python train.py config/nano4m.py --batch_size=32

A file is executed, so `max_iters = 20 * 1000` works and a remark is a remark. A mistyped name never passes: it is named
together with the nearest known one.
"""
import difflib
import sys
from pathlib import Path
from types import ModuleType


class UserError(Exception):
    """A fault that the user can mend: one line that says what is wrong, where, and what to do. Programs print the line and
    leave with exit code 1 (`run`); in a notebook it is raised like any other error."""


def read(arguments, overrides=None):
    """['config/x.py', '--name=value', ...] and {name: value} -> {name: (value, where it was set)}; the last one wins."""
    assigned = {}
    for argument in map(str, arguments):
        if argument.startswith('--'):
            name, equals, value = argument[2:].partition('=')
            if not equals:
                raise UserError(f'{argument}: settings are written --name=value; all stand, with remarks, at the top of each '
                                'script and in the Config of each model')
            assigned[name] = (value, 'command line')
        else:
            assigned |= {name: (value, argument) for name, value in execute(argument).items()}
    return assigned | {name: (value, 'call') for name, value in (overrides or {}).items()}


def execute(path):
    """The public names that a config file assigns."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such config file; there are {", ".join(sorted(map(str, Path("config").glob("[!_]*.py"))))}')
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


def run(main, stopped='stopped', **overrides):
    """A program, from the shell: a fault that the user can mend ends it with one line and exit code 1, Ctrl-C with 130. Returns
    what main returns."""
    try:
        return main(*sys.argv[1:], **overrides)
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print(f'\n{stopped}', file=sys.stderr)
        sys.exit(130)
