"""
A data set on disk: data/NAME/meta.json and data/NAME/{train,val[,test]}/KEY.npy, written and read here alone.

meta.json says: kind ('rows': the first axis is samples; 'stream': one long run of tokens), the module in prepare/ that made it,
fields {name: vocabulary size, 0 for real numbers} and, in `config`, the settings of every model that the data decide. Optional:
    files {field: the array on disk, if it has another name; '{split}' is replaced by the split's}
    views {field: number of pre-made variants, along a second axis}
    index {field: the array that says which of its rows belongs to a sample, if samples share rows, as questions share images}
"""
import hashlib
import importlib
import json
from pathlib import Path

import numpy as np
import torch

from config import UserError
from engine import processes

# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write(folder, arrays):
    """{name: array} as the .npy files of a split's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f'{name}.npy', array)


def save_meta(folder, meta):
    """The last step of every preparation: SHA256SUMS of all arrays, for `sha256sum -c`; then meta.json, whose presence says that
    the data set is complete."""
    folder, lines = Path(folder), []
    for path in sorted(folder.rglob('*.npy')):
        with open(path, 'rb') as file:
            lines.append(f'{hashlib.file_digest(file, "sha256").hexdigest()}  {path.relative_to(folder).as_posix()}\n')
    (folder / 'SHA256SUMS').write_text(''.join(lines))
    new = folder / 'meta.tmp'
    new.write_text(json.dumps(meta, indent=1))
    new.replace(folder / 'meta.json')  # atomically: a folder to which something is added always has one


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_meta(folder):
    """data/NAME/meta.json as a dict. Raises UserError."""
    path = Path(folder, 'meta.json')
    try:
        meta = json.loads(path.read_text())
        assert meta['kind'] in ('rows', 'stream') and meta['prepare'] and meta['fields'] and meta['config'] is not None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f'{path}: not the description of a data set ({type(error).__name__}); delete {folder} and run '
                        f'python -m prepare.{Path(folder).name}')
    return meta


def find(dataset):
    """(folder, meta) of data/NAME, which prepare/NAME.py makes on its first use. Raises UserError."""
    folder, known = Path('data', dataset), processes.scripts('data')
    if dataset not in known and not (folder / 'meta.json').is_file():
        raise UserError(f'dataset={dataset!r}: there is neither {folder}/meta.json nor a script prepare/{dataset}.py that makes it '
                        f'(there are {", ".join(known)})')
    processes.make_once(dataset, folder / 'meta.json')
    return folder, read_meta(folder)


def load(path):
    """A memory-mapped array. Raises UserError."""
    try:
        array = np.load(path, mmap_mode='r')
        assert array.ndim and array.dtype.kind in 'iufb', f'not an array of numbers: {array.dtype}'
    except Exception as error:  # NumPy fails in many ways
        folder = Path(path).parent.parent
        remedy = f'delete {folder} to make it again' if folder.exists() else f'run python -m prepare.{folder.name} first'
        raise UserError(f'{path}: missing or damaged ({str(error) or type(error).__name__}); {remedy}')
    return array


def open_fields(folder, meta):
    """The `Fields` of the prepare module that made a data set: decodes, draws and scores its fields. Raises UserError."""
    name = meta['prepare']  # which a checkpoint may hold, too: nothing but a module of this folder is imported
    there = name in {path.stem for path in Path(__file__).parent.glob('*.py')}
    module = importlib.import_module(f'prepare.{name}') if there else None
    if not hasattr(module, 'Fields'):
        raise UserError(f'{folder} was made by prepare/{name}.py, which is no longer there or has no Fields: restore it')
    return module.Fields(folder)


def holds(now, before):
    """Whether a description of data still says what it said before; it may say more, as after adding a modality."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(holds(now.get(name), value) for name, value in before.items())
    if isinstance(before, str) and isinstance(now, str):
        return set(before.split()) <= set(now.split())
    return now == before


def agree(folder, meta, checkpoint):
    """What a run knows of its data: meta; or, if it continues from a checkpoint, what it knew then, which must still hold: tokens mean
    something only to the tokenizers that made them. Raises UserError."""
    if checkpoint and not holds(meta, checkpoint['meta']):
        raise UserError(f'{folder} is not the data that this run was trained on (its meta.json differs): restore that data, or '
                        'train again')
    return checkpoint['meta'] if checkpoint else meta


class Data:
    """One split as memory-mapped arrays of the fields that the model reads; samples and their order follow from the seed alone.

    rows: sample i is row i of each field. A field in meta's `views` has pre-made variants along a second axis; an epoch takes one of
    them, the same for all fields, and evaluation the first. stream: one long run of tokens, cut into windows of T + 1. Each epoch
    shifts the grid of windows, so that a token is predicted from every distance; evaluation predicts each token once.
    """
    def __init__(self, folder, split, meta, names, block_size=0, seed=0):
        self.meta, self.block_size, self.seed, self.orders = meta, block_size, seed, {}
        if missing := [name for name in names if name not in meta['fields']]:
            raise UserError(f'{folder} has no {missing[0]!r}, which this model reads (it has {", ".join(meta["fields"])}): '
                            'choose another dataset or model')

        def path(name):
            return Path(folder, split, meta.get('files', {}).get(name, name).format(split=split) + '.npy')
        self.arrays = {name: self.read(path(name), meta['fields'][name]) for name in names}
        self.index = {name: self.read(path(index), len(self.arrays[name])) for name, index in meta.get('index', {}).items()
                      if name in names}
        sizes = {name: len(self.index.get(name, array)) for name, array in self.arrays.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'{Path(folder, split)}: the fields differ in length ({sizes}); delete {folder} to make it again')
        self.length = self.n = sizes.popitem()[1]
        if meta['kind'] == 'stream':  # room for the shift in training; in evaluation the last window may be shorter
            if block_size < 1:
                raise UserError(f'{folder} is cut into windows: block_size={block_size} must be at least 1')
            self.n = self.length // block_size - 1 if split == 'train' else -(-(self.length - 1) // block_size)
        if self.n < 1:
            raise UserError(f'{Path(folder, split)}: {self.length} tokens are too few for a context of {block_size}: training '
                            'takes twice as many; lower block_size, or give more text')

    @staticmethod
    def read(path, vocabulary):
        """An array whose values are checked, since an id out of range would end a GPU's program without a word."""
        array = load(path)
        low, high = array.min(initial=0), array.max(initial=0)
        if vocabulary and (low < -1 or high >= vocabulary):  # -1 is padding after the end of a text
            raise UserError(f'{path}: token ids run from {low} to {high}, outside the vocabulary of {vocabulary}')
        if not np.isfinite(low + high):
            raise UserError(f'{path}: holds values that are not finite; delete {path.parent.parent} to make it again')
        return array

    def rows(self, ids, shift=0, view=0):
        """{field: (B, ...)} of the samples with these ids, integers as int64, reals as float32; -1 is after the end of a stream."""
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
        """The epoch's permutation of sample ids, the shift of a stream's windows, and the view of each sample."""
        order = self.orders.get(epoch)
        if not order:
            random = np.random.default_rng((self.seed, epoch))
            order = (random.permutation(self.n), int(random.integers(max(1, self.block_size))),
                     random.integers(max(self.meta.get('views', {'': 1}).values()), size=self.n))
            self.orders = {epoch: order}  # only the newest, in one assignment: several threads take batches
        return order

    def ids(self, start, count):
        """[epoch, ids] of samples start .. start + count - 1 of the endless run over all epochs; a batch may lie in two."""
        epochs, positions = np.divmod(np.arange(start, start + count), self.n)
        return [[int(epoch), self.order(epoch)[0][positions[epochs == epoch]].tolist()] for epoch in np.unique(epochs)]

    def take(self, start, count):
        """These samples as a batch."""
        parts = []
        for epoch, ids in self.ids(start, count):
            _, shift, views = self.order(epoch)
            parts.append(self.rows(np.array(ids), shift, views[ids]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
