"""
The files of a data set while they are made, and those of a user's folder.
"""
import multiprocessing
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from config import UserError
from engine.checkpoints import replace
from engine.processes import make_folder

LOCKS = {}  # {data folder: its lock} of the data sets that this process is making
KEEPS_META = {}  # {data folder: whether a script only adds fields to it}


def release(folder):
    if lock := LOCKS.pop(Path(folder).resolve(), None):
        lock.release(force=True)


@contextmanager
def making():
    """Decorates the main of a script: however it ends, in a notebook too, it leaves no data folder locked. It can
    train networks, though an earlier line may have switched gradients off."""
    if getattr(multiprocessing.current_process(), '_inheriting', False):  # a worker runs a script without its
        sys.exit(1)                                                       # if __name__ == '__main__': see open_pool
    before = {*LOCKS}
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for folder in {*LOCKS} - before:
            release(folder)


@contextmanager
def writing(path):
    """A file that replaces `path` when it is complete: a run that has mapped the older one can still read it. The first
    one of a data set removes its meta.json. Raises UserError, and leaves all as it was, if that is impossible: the disk
    is full, or on Windows a program reads the older file."""
    new, meta, text = Path(f'{path}.tmp'), None, None
    for folder in map(Path.resolve, Path(path).parents[:2]):  # of the data set, or of a split, which may be a link
        if folder in LOCKS and not KEEPS_META[folder] and Path(path).suffix != '.tmp':
            meta = folder / 'meta.json'
    make_folder(new.parent, 'choose another --out=')
    try:
        with open(new, 'wb') as file:
            yield file
        if meta and meta.is_file():
            text = meta.read_bytes()
            meta.unlink()
        replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if text:
            meta.write_bytes(text)
        forbidden = isinstance(error, PermissionError)
        remedy = 'get permission, end a program that reads it' if forbidden else 'free disk space'
        raise UserError(f'{path}: cannot be written ({getattr(error, "strerror", "") or error}); {remedy}, or choose '
                        'another --out=')
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


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
