"""
A data set on disk: data/NAME/meta.json and data/NAME/{train,val[,test]}/KEY.npy, written and read only in this file.

meta.json holds: kind ('rows': the first axis is samples; 'stream': one long sequence of tokens); prepare, the module
of prepare/ that made it; fields {name: vocabulary size, 0 for real values}; config, the model settings that the data
determine. Optional:
    files {field: name of its array on disk, if it differs; '{split}' is replaced by the split}
    views {field: number of pre-made augmentations, along a second axis}
    index {field: name of an array with the row of each sample, if samples share rows, as questions share images}
`save_meta` adds sums {file: SHA-256} of all arrays, vocabularies and tokenizers. A run keeps meta.json in its
checkpoints and is not resumed on other contents. Data of an older version, or of a script without `save_meta`, have no
sums: their contents are not compared.
"""
import importlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout

from config import UserError, elsewhere
from engine import processes
from engine.checkpoints import check_readable, digest
from prepare.files import KEEPS_META, LOCKS, release, writing

# of meta.json, where sums compare the contents: paths, and what was measured
UNCOMPARED = 'settings', 'quality', 'bytes_per_token'


# ---------------------------------------------------------------------------------------------------------------------
# Writing: `begin`, then `write` for each split, then `save_meta`. meta.json exists only while the data set is complete:
# the first file that is replaced removes it, and a script that fails before leaves the older data set as it was.

def begin(folder, prepare='', keep_meta=False):
    """Locks a data folder until `save_meta`, or until the script ends (`making`); keep_meta is for a script that only
    adds fields. Raises UserError if another process is making the data set, or if another script than `prepare` made
    it."""
    folder = Path(folder)
    if any(folder.glob('*/meta.json')) or (folder.parent / 'meta.json').is_file():
        raise UserError(f'{folder} holds other data sets, or is inside one: choose another --out=')
    try:
        if folder.resolve() not in LOCKS:
            LOCKS[folder.resolve()] = processes.acquire(folder / 'lock', 0, 'choose another --out=').lock
    except Timeout:
        raise UserError(f'{folder}: another process is making this data set; wait for it, or choose another --out= '
                        f'(if it died on another node, delete {folder}/lock)')
    if prepare and (folder / 'meta.json').is_file() and (other := read_meta(folder)['prepare']) != prepare:
        release(folder)
        raise UserError(f'{folder} holds a data set of prepare/{other}.py: choose another --out=, or delete it')
    KEEPS_META[folder.resolve()] = keep_meta


def write(folder, arrays):
    """{name: array} as the .npy files of a split's folder."""
    if Path(folder).parent.resolve() not in LOCKS:
        begin(Path(folder).parent)
    for name, array in arrays.items():
        with writing(Path(folder, f'{name}.npy')) as file:
            np.save(file, array)


def write_rows(folder, name, rows):
    """The same for one array whose rows come from an iterator, so that only one is in memory."""
    n = 0
    with writing(folder / f'{name}.npy') as file:
        for n, row in enumerate(rows, 1):
            if n == 1:
                write_header(file, row, 0)
            file.write(row.tobytes())
        if not n:
            raise UserError(f'{folder}: nothing is left to write as {name}; see above')
        file.seek(0)
        write_header(file, row, n)  # as long as the first one: NumPy leaves room for the number of rows


def write_header(file, row, n):
    np.lib.format.write_array_header_1_0(file, dict(descr=row.dtype.str, fortran_order=False, shape=(n, *row.shape)))


def sums_of(folder, meta):
    """{file: SHA-256} of all arrays in a folder, of its vocabularies (*.json) and tokenizers (FIELD.pt), and of the
    arrays of other data sets to which its meta.json refers."""
    files = [path.relative_to(folder).as_posix() for path in sorted([*folder.glob('*.npy'), *folder.glob('*/*.npy')])]
    own = [*folder.glob('*.json'), *(folder / f'{name}.pt' for name in meta['fields'])]
    files += [path.name for path in sorted(own) if path.name != 'meta.json' and path.is_file()]
    links = [name for name in meta.get('files', {}).values() if name.startswith('..')]
    files += [f'{split.name}/{name.format(split=split.name)}.npy' for name in links
              for split in sorted(folder.glob('*/')) if (split / f'{name.format(split=split.name)}.npy').is_file()]
    return {name: digest(folder / name) for name in files}


def save_meta(folder, meta):
    """The last step of every preparation: SHA256SUMS of `sums_of`, for `sha256sum -c`; then meta.json. Releases the
    lock."""
    folder = Path(folder)
    sums = sums_of(folder, meta)
    with writing(folder / 'SHA256SUMS') as file:
        file.write(''.join(f'{digest}  {name}\n' for name, digest in sums.items()).encode())
    with writing(folder / 'meta.json') as file:
        file.write(json.dumps(meta | dict(sums=sums), indent=1).encode())
    release(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_meta(folder):
    """data/NAME/meta.json as a dict. Raises UserError."""
    path = Path(folder, 'meta.json')
    check_readable(path)
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        if meta['kind'] not in ('rows', 'stream') or not meta['fields']:
            raise ValueError('its kind is unknown, or it has no fields')
        if not isinstance(meta['prepare'], str) or not isinstance(meta['config'], dict):
            raise ValueError('prepare is no name, or config no dict')
        for name, kind, least in (('fields', int, 0), ('views', int, 1), ('files', str, ''), ('index', str, ''),
                                  ('sums', str, '')):
            if not all(isinstance(value, kind) and value >= least for value in meta.get(name, {}).values()):
                raise ValueError(f'{name} are not of type {kind.__name__}, or too small')
        for file in meta.get('files', {}).values():
            file.format(split='train')  # raises KeyError for another {word}
        views = set(meta.get('views', {}).values())
        if len(views) > 1 or views and meta['kind'] == 'stream':
            raise ValueError('its fields have different numbers of views, or those of a stream have views')
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not the description of a data set ({str(error) or type(error).__name__}); correct it '
                        f'or delete {folder} and {processes.remake(folder)}')
    return meta


def find(dataset):
    """(folder, meta) of data/NAME, made by prepare/NAME.py on its first use. Raises UserError."""
    folder, known = Path('data', dataset), processes.scripts('data')
    if dataset not in known and not (folder / 'meta.json').is_file():
        raise UserError(f'dataset={dataset!r}: there is neither {folder}/meta.json nor a script prepare/{dataset}.py '
                        f'that makes it (there are {", ".join(known)}){elsewhere()}'
                        + '; leave out the data/ before the name' * dataset.startswith(('data/', 'data\\')))
    processes.make_once(dataset, folder / 'meta.json')
    return folder, read_meta(folder)


def load(path):
    """A memory-mapped array. Raises UserError."""
    check_readable(path)
    try:
        array = np.load(path, mmap_mode='r')
        if not array.ndim or array.dtype.kind not in 'iufb':
            raise ValueError(f'not an array of numbers: {array.dtype}')
    except Exception as error:  # NumPy fails in many ways
        folder = Path(path).parent.parent
        remedy = f'delete {folder} and {processes.remake(folder)}' if folder.exists() else (
            f'there is no data set in {folder}: {processes.remake(folder)}')
        sums = read_meta(folder).get('sums') if (folder / 'meta.json').is_file() else None
        if sums and Path(path).relative_to(folder).as_posix() not in sums:
            there = ', '.join(sorted({Path(name).stem for name in sums if name.endswith('.npy') and '..' not in name}))
            raise UserError(f'{path}: this data set has no {Path(path).stem}; it has {there}')
        raise UserError(f'{path}: missing or damaged ({str(error) or type(error).__name__}); {remedy}')
    return array


def open_dataset(folder, meta):
    """The `Dataset` of the prepare module that made a data set: decodes, draws and scores its fields. Raises
    UserError."""
    name = meta['prepare']  # it may come from a checkpoint: only modules of this folder are imported
    exists = name in {path.stem for path in Path(__file__).parent.glob('*.py')}
    module = importlib.import_module(f'prepare.{name}') if exists else None
    if not hasattr(module, 'Dataset'):
        raise UserError(f'{folder} was made by prepare/{name}.py, which is missing or has no class Dataset: restore '
                        'it, or write one (docs/yours.md)')
    for file in (Path(folder, name) for name in meta.get('sums', {}) if name.endswith(('.json', '.pt'))):
        if file.is_file() and digest(file) != meta['sums'][file.name]:
            raise UserError(f'{file} has changed since this data set was made: restore it, or delete {folder} to make '
                            'it again')
    return module.Dataset(folder)


def holds(now, before):
    """Whether meta.json still contains all entries of an earlier version; it may have more, as after adding a
    modality."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(holds(now.get(name), value) for name, value in before.items())
    if isinstance(before, str) and isinstance(now, str):
        return set(before.split()) <= set(now.split())
    return now == before


def difference(now, before):
    """In words, what `holds` misses first; '' if nothing. With sums, the entries of UNCOMPARED may differ."""
    sums, other = (meta.get('sums', {}) for meta in (before, now))
    changed = [name for name in sums if other.get(name) != sums[name]]
    before = {name: value for name, value in before.items() if not (sums and name in UNCOMPARED)}
    return '' if holds(now, before) else f'{changed[0]} has other contents' if changed else 'its meta.json differs'


def check_links(folder, meta):
    """Raises UserError if another data set, to whose arrays meta.json refers, has been made again since."""
    for name, before in meta.get('sums', {}).items():
        linked = Path(folder, name).parent.parent
        if '..' in name and read_meta(linked).get('sums', {}).get('/'.join(Path(name).parts[-2:]), before) != before:
            raise UserError(f'{folder} was made from other data than {os.path.normpath(linked)} holds now: run python '
                            f'-m prepare.{meta["prepare"]} again')


def agree(folder, meta, checkpoint):
    """The meta of a run: that of the data or, if it continues from a checkpoint, that of the checkpoint. The two must
    agree, because tokens have a meaning only with the tokenizers that made them. Raises UserError."""
    check_links(folder, meta)
    if checkpoint and (fault := difference(meta, checkpoint['meta'])):
        raise UserError(f'{folder} is not the data that this run was trained on ({fault}): restore that data, or train '
                        'again, in another --out_dir=')
    return checkpoint['meta'] if checkpoint else meta


def changed(folder, meta):
    """What has happened since to the data set with this meta.json, '' if nothing: another one is being made in its
    place, or has been."""
    try:
        check_links(folder, now := read_meta(folder))
    except UserError:
        return f'{folder} is being made again'
    return difference(now, meta) and f'{folder} has been made again: {difference(now, meta)}'


def open_splits(folder, meta, names, block_size=0, seed=0):
    """[training data, validation data], both of the same version. Raises UserError."""
    splits = [Data(folder, split, meta, names, block_size, seed) for split in ('train', 'val')]
    if fault := changed(folder, meta):
        raise UserError(f'{fault}: run this again')
    return splits


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
        axes = {name: 1 + (name in meta.get('views', {})) for name in names}  # before those of tokens or pixels
        self.arrays = {name: self.read(path(name), self.vocabulary(name), axes[name]) for name in names}
        self.index = {name: self.read(path(index), len(self.arrays[name]), math.inf)
                      for name, index in meta.get('index', {}).items() if name in names}
        if 'image' in names and (meta['fields']['image'] != 256 or self.arrays['image'].dtype == bool):
            raise UserError(f'{path("image")}: pixels must be integers from 0 to 255, and image 256 in the fields of '
                            'meta.json')
        for name, array in self.arrays.items():
            if fault := self.misfit(name, array.shape, axes[name], split):
                raise UserError(f'{path(name)}: {array.shape} is not the shape of {fault}')
        sizes = {name: len(self.index.get(name, array)) for name, array in self.arrays.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'{Path(folder, split)}: the fields differ in length ({sizes}); delete {folder} to make it '
                            'again')
        self.length = self.n = sizes.popitem()[1]
        if meta['kind'] == 'stream':  # in training, room for the shift; in evaluation, the last window may be shorter
            if block_size < 1:
                raise UserError(f'{folder} is cut into windows: block_size={block_size} must be at least 1')
            self.n = self.length // block_size - 1 if split == 'train' else -(-(self.length - 1) // block_size)
        elif self.n < 1:
            raise UserError(f'{Path(folder, split)}: holds no samples; delete {folder} to make it again')
        else:
            self.check_rows(path)
        if self.n < 1:
            raise UserError(f'{Path(folder, split)}: {self.length} tokens are too few for a context of {block_size}: '
                            'training takes twice as many; lower block_size, or give more text')

    def vocabulary(self, name):
        """The number of ids of a field, by meta's fields and by its config, with which the model is built."""
        config = self.meta.get('config', {})
        levels = {entry.split(':')[0]: entry.split(':')[1] for entry in config.get('modalities', '').split()}
        limits = dict(tokens=config.get('vocab_size'), label=config.get('n_classes')) | {
            key: math.prod(map(int, value.split('*'))) for key, value in levels.items()}
        return min(self.meta['fields'][name], limits.get(name) or math.inf)

    @staticmethod
    def read(path, vocabulary, axes=0):
        """Checks the values of an array: an id out of range would end a program on a GPU without a message. An array
        with more than `axes` axes may hold -1, padding."""
        array = load(path)
        low, high = array.min(initial=0), array.max(initial=0)
        if vocabulary and array.dtype.kind == 'f':
            raise UserError(f'{path}: real numbers, {low:g} to {high:g}, where meta.json has {vocabulary} ids: write '
                            'integers (for pixels 0 to 255), or for another field than image 0 in meta.json')
        if vocabulary and (low < -(array.ndim > axes) or high >= vocabulary):
            raise UserError(f'{path}: token ids run from {low} to {high}, outside the vocabulary of {vocabulary}')
        largest = float(np.finfo(np.float32).max)
        if not -largest <= float(low) <= float(high) <= largest:  # nan, inf, 1e300
            raise UserError(f'{path}: holds values that are not finite in float32; delete {path.parent.parent} to make '
                            'it again')
        return array

    def misfit(self, name, shape, axes, split):
        """In words, the shape that an array must have by meta.json; '' if `shape` is right, or if it does not say."""
        meta = self.meta
        if meta['kind'] == 'stream':
            return '' if len(shape) == 1 else 'a stream, (n,)'
        views, config = meta.get('views', {}).get(name, 1), meta['config']
        if axes > 1 and (len(shape) < 2 or shape[1] < (views if split == 'train' else 1)):
            return f'{views} views, (n, {views}, ...)'
        sample = (*self.index[name].shape[1:], *shape[1:]) if name in self.index else shape[axes:]
        H, C, n = (config.get(key, default) for key, default in (('image_size', 0), ('channels', 0), ('n_images', 1)))
        sizes = dict(entry.split(':')[::2] for entry in config.get('modalities', '').split())  # {modality: '8x8'}
        tokens = self.arrays.get('tokens')
        if name == 'image' and H and C:
            picture = f'{H}x{H} pixels of {C} channels' + f', {n} a sample' * (n > 1)
            right = sample[-3:] == (H, H, C) or C == 1 and sample[-2:] == (H, H)
            return '' if right and math.prod(sample) == n * H * H * C else picture
        if name == 'point' and C:
            return '' if sample == (C,) else f'points of {C} numbers, (n, {C})'
        if name == 'label':
            return '' if sample == () else 'labels, (n,)'
        if name in sizes:
            N = math.prod(map(int, sizes[name].split('x')))
            return '' if math.prod(sample) == N else f'{name}, {sizes[name]} tokens, (n, {N})'
        if name == 'loss_mask' and tokens is not None:
            return '' if shape == tokens.shape else f'the tokens, {tokens.shape}'
        if name == 'tokens':
            grid = math.prod(map(int, config.get('grid', '0').split('x')))
            most = 1 + (config.get('block_size') or (not grid and self.block_size) or math.inf)
            least = grid + (config.get('n_classes', 0) > 0) if grid else 2 if most < math.inf else 1  # class, grid
            right = len(sample) == 1 and least <= sample[0] <= most
            needed = f'; block_size must be at least {least - 1}' * (least > most)
            return '' if right else f'rows of {least} to {max(least, most)} (block_size + 1) tokens{needed}'
        return ''

    def check_rows(self, path):
        """Raises UserError unless each row has its class, its image tokens, and a target of the loss."""
        config, tokens, empty = self.meta['config'], self.arrays.get('tokens'), np.ones(self.n, bool)
        n_classes, n_images, image_token = (config.get(*pair) for pair in (
            ('n_classes', 0), ('n_images', 1), ('image_token', -1)))
        if tokens is not None and n_classes and not ((tokens[..., 0] >= 0) & (tokens[..., 0] < n_classes)).all():
            raise UserError(f'{path("tokens")}: each row must begin with its class, from 0 to {n_classes - 1}')
        if 'image' in self.arrays and image_token >= 0 and ((tokens == image_token).sum(1) != n_images).any():
            raise UserError(f'{path("tokens")}: each row must have {n_images} tokens {image_token}, for its images')
        modalities = [entry.split(':')[0] for entry in config.get('modalities', '').split()]
        sources = ('loss_mask', 'patch_labels', *modalities)  # of targets; without any, tokens
        names = [name for name in sources if name in self.arrays] or ['tokens'] * (tokens is not None)
        for name in names:
            valid = (self.arrays[name] > 0) & (tokens >= 0) if name == 'loss_mask' else self.arrays[name] >= 0
            valid = valid[..., 1:] if name in ('loss_mask', 'tokens') else valid  # the first may be a class, or given
            empty &= ~valid.reshape(len(valid), -1).any(1)[self.index.get(name, slice(None))]
        if names and empty.any():
            raise UserError(f'{path(names[0])}: {empty.sum():,} of {self.n:,} rows have no target, row {empty.argmax()}'
                            f' first: only padding (-1){", or a loss mask of 0" * (names[0] == "loss_mask")}')

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
            array = array.astype(np.int64 if self.meta['fields'][name] else np.float32)
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
