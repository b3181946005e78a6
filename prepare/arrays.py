"""
A data set on disk: data/NAME/meta.json and data/NAME/{train,val[,test]}/KEY.npy, written and read only in this file.

meta.json holds: kind ('rows': the first axis is samples; 'stream': one long sequence of tokens); prepare, the module
of prepare/ that made it; fields {name: vocabulary size, 0 for real values}; config, the model settings that the data
determine. Optional:
    files {field: name of its array on disk, if it differs; '{split}' is replaced by the split}
    views {field: number of pre-made augmentations, along a second axis}
    index {field: name of an array with the row of each sample, if samples share rows, as questions share images}
"""
import hashlib
import importlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from config import UserError
from engine import processes

# ---------------------------------------------------------------------------------------------------------------------
# Writing: `begin`, then `write` for each split, then `save_meta`. meta.json exists only while the data set is complete.

LOCKS = {}  # {data folder: its lock} of the data sets that this process is making


def begin(folder, prepare='', keep_meta=False):
    """Locks a data folder until `save_meta` and removes its meta.json; keep_meta is for a script that only adds
    fields. Raises UserError if another process is making the data set, or if another script than `prepare` made it."""
    folder = Path(folder)
    if folder.resolve() in LOCKS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    meta = folder / 'meta.json'
    if prepare and meta.is_file() and (other := read_meta(folder)['prepare']) != prepare:
        raise UserError(f'{folder} holds a data set of prepare/{other}.py: choose another --out=, or delete it')
    lock = FileLock(folder / 'lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f'{folder}: another process is making this data set; wait for it, or choose another --out=')
    LOCKS[folder.resolve()] = lock
    if not keep_meta:
        meta.unlink(missing_ok=True)


def write(folder, arrays):
    """{name: array} as the .npy files of a split's folder. Each replaces an older file at once: a run that has mapped
    the older one can still read it."""
    begin(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        new = folder / f'{name}.tmp'
        with open(new, 'wb') as file:
            np.save(file, array)
        os.replace(new, folder / f'{name}.npy')


def save_meta(folder, meta):
    """The last step of every preparation: SHA256SUMS of all arrays, for `sha256sum -c`; then meta.json. Releases the
    lock."""
    folder, lines = Path(folder), []
    for path in sorted(folder.rglob('*.npy')):
        with open(path, 'rb') as file:
            lines.append(f'{hashlib.file_digest(file, "sha256").hexdigest()}  {path.relative_to(folder).as_posix()}\n')
    (folder / 'SHA256SUMS').write_text(''.join(lines), encoding='utf-8')
    new = folder / 'meta.tmp'
    new.write_text(json.dumps(meta, indent=1), encoding='utf-8')
    new.replace(folder / 'meta.json')  # atomically: a data set to which fields are added always has one
    if lock := LOCKS.pop(folder.resolve(), None):
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_meta(folder):
    """data/NAME/meta.json as a dict. Raises UserError."""
    path = Path(folder, 'meta.json')
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        assert meta['kind'] in ('rows', 'stream') and meta['prepare'] and meta['fields'] and meta['config'] is not None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f'{path}: not the description of a data set ({type(error).__name__}); delete {folder} and run '
                        f'python -m prepare.{Path(folder).name}')
    return meta


def find(dataset):
    """(folder, meta) of data/NAME, made by prepare/NAME.py on its first use. Raises UserError."""
    folder, known = Path('data', dataset), processes.scripts('data')
    if dataset not in known and not (folder / 'meta.json').is_file():
        raise UserError(f'dataset={dataset!r}: there is neither {folder}/meta.json nor a script prepare/{dataset}.py '
                        f'that makes it (there are {", ".join(known)})')
    processes.make_once(dataset, folder / 'meta.json')
    return folder, read_meta(folder)


def load(path):
    """A memory-mapped array. Raises UserError."""
    try:
        array = np.load(path, mmap_mode='r')
        assert array.ndim and array.dtype.kind in 'iufb', f'not an array of numbers: {array.dtype}'
    except Exception as error:  # NumPy fails in many ways
        folder = Path(path).parent.parent
        make = f'run python -m prepare.{folder.name} first'
        remedy = f'delete {folder} to make it again' if folder.exists() else make
        raise UserError(f'{path}: missing or damaged ({str(error) or type(error).__name__}); {remedy}')
    return array


def open_dataset(folder, meta):
    """The `Dataset` of the prepare module that made a data set: decodes, draws and scores its fields. Raises
    UserError."""
    name = meta['prepare']  # it may come from a checkpoint: only modules of this folder are imported
    exists = name in {path.stem for path in Path(__file__).parent.glob('*.py')}
    module = importlib.import_module(f'prepare.{name}') if exists else None
    if not hasattr(module, 'Dataset'):
        raise UserError(f'{folder} was made by prepare/{name}.py, which is missing or has no Dataset: restore it')
    return module.Dataset(folder)


def holds(now, before):
    """Whether meta.json still contains all entries of an earlier version; it may have more, as after adding a
    modality."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(holds(now.get(name), value) for name, value in before.items())
    if isinstance(before, str) and isinstance(now, str):
        return set(before.split()) <= set(now.split())
    return now == before


def agree(folder, meta, checkpoint):
    """The meta of a run: that of the data or, if it continues from a checkpoint, that of the checkpoint. The two must
    agree, because tokens have a meaning only with the tokenizers that made them. Raises UserError."""
    if checkpoint and not holds(meta, checkpoint['meta']):
        raise UserError(f'{folder} is not the data that this run was trained on (its meta.json differs): restore that '
                        'data, or train again')
    return checkpoint['meta'] if checkpoint else meta


class Data:
    """One split as memory-mapped arrays of the fields that a model reads. Samples and their order are a function of
    the seed.

    rows: sample i is row i of each field. A field in meta's `views` has augmentations along a second axis: an epoch
    takes one per sample, the same for all fields, and evaluation takes the first. stream: a long sequence of tokens,
    cut into windows of T + 1. Each epoch shifts the grid of windows, so that tokens are predicted from all context
    lengths; evaluation predicts each token once.
    """
    def __init__(self, folder, split, meta, names, block_size=0, seed=0):
        self.meta, self.block_size, self.seed, self.orders = meta, block_size, seed, {}
        if missing := [name for name in names if name not in meta['fields']]:
            raise UserError(f'{folder} has no {missing[0]!r}, which this model reads (it has '
                            f'{", ".join(meta["fields"])}): choose another dataset or model; if an older version made '
                            f'it, delete {folder} and run python -m prepare.{meta["prepare"]}')

        def path(name):
            return Path(folder, split, meta.get('files', {}).get(name, name).format(split=split) + '.npy')
        self.arrays = {name: self.read(path(name), meta['fields'][name]) for name in names}
        self.index = {name: self.read(path(index), len(self.arrays[name]))
                      for name, index in meta.get('index', {}).items() if name in names}
        sizes = {name: len(self.index.get(name, array)) for name, array in self.arrays.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'{Path(folder, split)}: the fields differ in length ({sizes}); delete {folder} to make it '
                            'again')
        self.length = self.n = sizes.popitem()[1]
        if meta['kind'] == 'stream':  # in training, room for the shift; in evaluation, the last window may be shorter
            if block_size < 1:
                raise UserError(f'{folder} is cut into windows: block_size={block_size} must be at least 1')
            self.n = self.length // block_size - 1 if split == 'train' else -(-(self.length - 1) // block_size)
        if self.n < 1:
            raise UserError(f'{Path(folder, split)}: {self.length} tokens are too few for a context of {block_size}: '
                            'training takes twice as many; lower block_size, or give more text')

    @staticmethod
    def read(path, vocabulary):
        """Checks the values of an array: an id out of range would end a program on a GPU without a message."""
        array = load(path)
        low, high = array.min(initial=0), array.max(initial=0)
        if vocabulary and (low < -1 or high >= vocabulary):  # -1 is padding
            raise UserError(f'{path}: token ids run from {low} to {high}, outside the vocabulary of {vocabulary}')
        if not np.isfinite(low + high):
            raise UserError(f'{path}: holds values that are not finite; delete {path.parent.parent} to make it again')
        return array

    def rows(self, ids, shift=0, view=0):
        """{field: (B, ...)} of the samples with these ids: int64, or float32 for reals; -1 after the end of a
        stream."""
        views, over = self.meta.get('views', {}), None
        if self.meta['kind'] == 'stream':
            ids = shift + ids[:, None] * self.block_size + np.arange(self.block_size + 1)  # (B, T + 1)
            over = ids >= self.length
            ids = np.where(over, 0, ids)
        batch = {}
        for name, array in self.arrays.items():
            array = array[(ids, view) if name in views else self.index[name][ids] if name in self.index else ids]
            array = array.astype(np.float32 if array.dtype.kind == 'f' else np.int64)
            batch[name] = torch.from_numpy(array if over is None else np.where(over, -1, array))
        return batch

    def order(self, epoch):
        """Of an epoch: the permutation of sample ids, the shift of the windows of a stream, the view of each sample."""
        order = self.orders.get(epoch)
        if not order:
            random = np.random.default_rng((self.seed, epoch))
            order = (random.permutation(self.n), int(random.integers(max(1, self.block_size))),
                     random.integers(max(self.meta.get('views', {'': 1}).values()), size=self.n))
            self.orders = {epoch: order}  # only the newest; one assignment, as several threads read it
        return order

    def ids(self, start, count):
        """[[epoch, ids], ...] of samples start .. start + count - 1 of the sequence of all epochs; a batch may lie in
        two."""
        epochs, positions = np.divmod(np.arange(start, start + count), self.n)
        return [[int(epoch), self.order(epoch)[0][positions[epochs == epoch]].tolist()]
                for epoch in np.unique(epochs)]

    def take(self, start, count):
        """These samples as a batch."""
        parts = []
        for epoch, ids in self.ids(start, count):
            _, shift, views = self.order(epoch)
            parts.append(self.rows(np.array(ids), shift, views[ids]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
