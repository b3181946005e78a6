"""
The settings of sample.py and lab/score.py: those of the program, and the dataclass of the opened run's chapter.

A field of a dataclass has a type, a default that fits the opened model, and a comment after it, which --help shows.
Only nano4M has fields that may be None: `steps: int | None = None`.
"""
import dataclasses
import os
import typing

import config
import lab
from config import UserError
from engine import devices


def common(assigned, settings):
    """The settings of a program alone, {name: default} with its assignments, before a run is opened. Raises
    UserError."""
    return config.apply({name: value for name, value in assigned.items() if name in settings}, settings)


def open_run(path, settings):
    """The run of a checkpoint, and its lab module: settings are device, dtype and split. Raises UserError."""
    device = devices.find(settings['device'])
    devices.set_up(device, training=False)
    run = lab.open_run(path, device, settings['split'], settings['dtype'])
    return run, lab.module_of(run.model)


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
    own = {name: values[name] for name in types if name in assigned}
    return {name: values[name] for name in settings}, dataclasses.replace(defaults, **own)


def title(kind):
    """A dataclass as text: 'lab/gpt.py (Text)'."""
    return f'{kind.__module__.replace(".", "/")}.py ({kind.__name__})'


def all_settings():
    """The dataclasses of settings of all chapters, without the bases of others."""
    modules = [lab.module_of(path.stem) for path in config.python_files(lab.HERE)
               if (lab.HERE.parent / path.name).is_file()]
    return [kind for module in modules for kind in vars(module).values()
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__ and not kind.__subclasses__()]


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
            *config.describe(config.explain_class(kind), vars(defaults))]


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the chapters

@dataclasses.dataclass
class Sampling:
    """How a token is sampled: the base of dataclasses of settings."""
    top_k: int = 0     # only the k most probable tokens, or values of an FSQ code's digit; 0: all
    top_p: float = 1.0  # only the most probable tokens that together hold this probability
    seed: int = 0      # of everything random


def apart(settings, name, *others):
    """Raises UserError if this setting and one of the others are both set."""
    for other in others:
        if getattr(settings, name) and getattr(settings, other):
            raise UserError(f'{name} and {other} do not go together: leave one of them out')


def ends(text):
    """'0.9..0.3' -> (0.9, 0.3), the values at the first and the last step; '0.7' -> (0.7, 0.7). Raises UserError."""
    first, dots, last = text.partition('..')
    try:
        if last.startswith('.'):  # 1...3
            raise ValueError
        return float(first), float(last if dots else first)
    except ValueError:
        raise UserError(f'{text!r}: write a number, or the first and the last, as in 0.9..0.3')


def temperatures(text):
    """`ends` of a temperature. Raises UserError."""
    values = ends(text)
    if not all(value == 0 or 1e-6 <= value <= 1e6 for value in values):
        raise UserError(f'temperature={text!r}: must be 0, or from 1e-6 to 1e6, at the first and at the last step')
    return values


def scales(text):
    """`ends` of a guidance scale. Raises UserError."""
    values = ends(text)
    if not all(abs(value) <= 1000 for value in values):
        raise UserError(f'guidance={text!r}: must be from -1000 to 1000, at the first and at the last step')
    return values


def labels(text, n_classes):
    """Classes as text, '3,5' -> [3, 5]; '' -> all of them. Raises UserError."""
    known = {str(c): c for c in range(n_classes)}
    if text and not known:
        raise UserError(f'labels={text!r}: this model has no classes: leave it out')
    chosen = [c.strip() for c in text.split(',') if c.strip()]
    if unknown := [c for c in chosen if c not in known]:
        raise UserError(f'labels: there is no class {unknown[0]!r} (classes are 0 to {n_classes - 1})')
    found = [known[c] for c in chosen]
    if len(found) > len({*found}):
        raise UserError(f'labels={text!r}: name each class once; n is the number of images of each')
    return found or list(range(n_classes))


def counts(text):
    """'1,4,8' -> [1, 4, 8]. Raises UserError."""
    found = [int(count) if count.strip().isdecimal() else 0 for count in text.split(',')]
    if not min(found):
        raise UserError(f'{text!r}: write numbers of steps, at least 1, as in 4,8,16')
    return found


def paths(text):
    """'a.png,b.png' -> ['a.png', 'b.png']; a comma may also be part of the name of a file or folder that exists."""
    found, parts = [], text.split(',')
    while parts:
        names = [','.join(parts[:n]) for n in range(len(parts), 0, -1)]
        found.append(next(filter(os.path.exists, names), parts[0]))
        parts = parts[found[-1].count(',') + 1:]
    return found
