"""
The files of a user's folder, and what is said of those that cannot be used.
"""
import os
from pathlib import Path


def visible(folder):
    """The files of a user's folder and its subfolders, sorted; not the hidden copies of editors and systems. Links to
    folders are followed, each folder is read once."""
    found, seen, faults = [], set(), []
    for parent, folders, names in os.walk(folder, onerror=faults.append, followlinks=True):
        folders[:], names = ([name for name in some if not name.startswith(('.', '__MACOSX'))]
                             for some in (folders, names))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(parent, name) for name in names]
    tell([f'{error.filename}: cannot be read ({error.strerror})' for error in faults]
         + [f'{path}: a link to nothing' for path in sorted(found) if path.is_symlink() and not path.exists()])
    return sorted(path for path in found if path.is_file())


def tell(faults, most=20):
    """Prints the first of a list of faults of a user's files, and the number of the others."""
    more = [f'and {len(faults) - most} more'] * (len(faults) > most)
    print(''.join(f'left out: {fault}\n' for fault in [*faults[:most], *more]), end='')
