"""The glossary docs/words.md: every name in its code column exists."""
import importlib
import re
from pathlib import Path

import pytest

import train

TEXT = Path(__file__).parent.parent.joinpath('docs/words.md').read_text(encoding='utf-8')
ROWS = [line.strip('| ').split(' | ') for line in TEXT.splitlines() if line.startswith('| ') and '`' in line]
NAMES = sorted({name for row in ROWS for name in re.findall('`([^`]+)`', ' '.join(row[2:]))})


def find(name):
    """A name such as prepare.judge.frechet or gpt.Config.qk_norm; raises AttributeError or ModuleNotFoundError."""
    parts = name.split('.')
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_table_is_read():
    assert len(NAMES) > 60 and len(ROWS) > 60 and len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize('name', NAMES)
def test_the_name_exists(name):
    if name.startswith('--'):
        assert name[2:] in train.SETTINGS
    else:
        find(name)


def test_a_wrong_name_is_found():
    for name in ('gpt.Config.wings', 'gpt.fly', 'nothing.at_all'):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            find(name)
