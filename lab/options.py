"""
The settings of sample.py and lab/score.py: those of the program, and the dataclass of the opened run's chapter.

A field of a dataclass has a type, a default that fits the opened model, and a comment after it, which --help shows.
Only nano4M has fields that may be None: `steps: int | None = None`.
"""
import dataclasses
import math
import typing

import config
import lab
from config import UserError


def apply(assigned, settings, defaults):
    """Applies the assignments to the settings of a program, {name: default}, and of a chapter, the dataclass
    `defaults`. Returns (dict, dataclass). If a name is in both, the chapter's default is used. Raises UserError."""
    types = {field.name: field.type for field in dataclasses.fields(defaults)}
    known = settings | {name: getattr(defaults, name) for name in types}
    for name in types:
        if known[name] is None:  # the value is an int or a str, by its type `int | None`
            known[name] = typing.get_args(types[name])[0]()
    for name, (value, where) in assigned.items():
        if name not in known and (owners := owners_of(name, type(defaults))):
            raise UserError(f'{where}: {name} is a setting of {owners}; here are those of {title(type(defaults))}')
        if isinstance(known.get(name), str) and isinstance(value, (int, float)):  # in a call: temperature=0.7
            assigned = assigned | {name: (str(value), where)}
    values = config.apply(assigned, known)
    for name in ('n', 'n_score'):
        if values.get(name, 1) < 1:
            raise UserError(f'{name}={values[name]}: must be at least 1')
    own = {name: values[name] for name in types if name in assigned}
    return {name: values[name] for name in settings}, dataclasses.replace(defaults, **own)


def title(kind):
    """A dataclass as text: 'lab/gpt.py (Text)'."""
    return f'{source_of(kind)} ({kind.__name__})'


def source_of(kind):
    return f'{kind.__module__.replace(".", "/")}.py'


def all_settings():
    """The dataclasses of settings of all chapters."""
    modules = [lab.module_of(path.stem) for path in sorted(lab.HERE.glob('*.py'))
               if (lab.HERE.parent / path.name).is_file()]
    return [kind for module in modules for kind in vars(module).values()
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__]


def owners_of(name, kind):
    """Other owners of a setting of this name, as text, '' if there are none: other dataclasses of the program that
    `kind` belongs to, or the other program. lab/score.py takes the dataclasses `Scores`, sample.py all others."""
    owners = [other for other in all_settings() if name in other.__dataclass_fields__]
    scoring = kind.__name__ == 'Scores'
    same = [title(other) for other in owners if (other.__name__ == 'Scores') == scoring]
    return ', '.join(same) or ('sample.py' if scoring else 'python -m lab.score') * bool(owners)


def help_of(defaults):
    """Lines of help for the settings of a chapter."""
    kind = type(defaults)
    return ['', f'settings of this run, {title(kind)}:',
            *config.describe(source_of(kind), kind.__name__, vars(defaults))]


# ---------------------------------------------------------------------------------------------------------------------
# Values

def apart(settings, name, *others):
    """Raises UserError if this setting and one of the others are both set."""
    for other in others:
        if getattr(settings, name) and getattr(settings, other):
            raise UserError(f'{name} and {other} do not go together: leave one of them out')


def ends(text):
    """'0.9..0.3' -> (0.9, 0.3), the values at the first and the last step; '0.7' -> (0.7, 0.7). Raises UserError."""
    first, dots, last = text.partition('..')
    try:
        values = float(first), float(last if dots else first)
        assert all(map(math.isfinite, values))
    except (ValueError, AssertionError):
        raise UserError(f'{text!r}: write a number, or the first and the last, as in 0.9..0.3')
    return values


def labels(text, n_classes):
    """Classes as text, '3,5' -> [3, 5]; '' -> all of them. Raises UserError."""
    known = {str(c): c for c in range(n_classes)}
    if unknown := [c for c in text.split(',') if c and c not in known]:
        raise UserError(f'labels: there is no class {unknown[0]!r} (classes are 0 to {n_classes - 1})')
    return [known[c] for c in text.split(',') if c] or list(range(n_classes))


def counts(text):
    """'1,4,8' -> [1, 4, 8]. Raises UserError."""
    found = [int(count) if count.strip().isdecimal() else 0 for count in text.split(',')]
    if not min(found):
        raise UserError(f'{text!r}: write numbers of steps, at least 1, as in 4,8,16')
    return found
