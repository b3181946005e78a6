"""
The course's data: MultiCLEVR of EPFL's COM-304 on SCITAS, already tokenized, packed into one array per field.

    python -m prepare.multiclevr --source=ROOT                          ROOT/{train,val,test}/FOLDER/STEM.npy or .json
    python -m prepare.multiclevr --source=ROOT --decoder=decoder.jit    also copies the decoder of image tokens

    rgb, depth, normal    tok_rgb@256, tok_depth@256, tok_normal@256: integers (10, 256), 10 crops of 16x16 tokens
    scene_desc, caption   the same names: a list of ten texts

The ten crops are aligned over all fields and become the views: train.py samples one per sample and step, evaluation
uses the first, the centre crop. 50,000 samples are 250,000 small files. They are read once, checked, and written to
memory-mapped arrays (n, 10, 256). The texts are first written to texts.jsonl, one line per sample, because their
vocabulary is known only after all have been read; then they become arrays (n, 10, L) of tokens. The number of lines
is the number of samples that an interrupted run has finished.

The image tokens are those of an external tokenizer with 64,000 codes, assumed to be a product of levels as in FSQ
(2309.15505). The usual levels for 64,000 codes are 8, 8, 8, 5, 5, 5, with the first channel as the least significant
digit in public implementations. In chapter 3 the first digit is the most significant: 5*5*5*8*8*8. The files do not
contain the levels. If the assumption is wrong, codes are still unique, but tokens with a common digit are less related.
"""
import functools
import io
import json
import os
import shutil
from array import array
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from engine import threads
from engine.processes import make_folder
from prepare import arrays
from prepare.files import making
from prepare.scenes import caption, drawing, parse_text, scene_desc, typical, words
from prepare.scenes_render import open_pool
from prepare.scenes_scores import score_objects
from prepare.text_tokenizers import decode_row, encode_rows, frequent_words, load_words, save_words

MAKES = 'data/multiclevr'
SETTINGS = dict(
    source='',   # the course's folder
    out=MAKES,   # the data folder
    decoder='',  # the course's image decoder, to draw images; '' for none
    workers=0,   # processes; 0 is one per core
)
FOLDERS = dict(rgb='tok_rgb@256', depth='tok_depth@256', normal='tok_normal@256', scene_desc='scene_desc',
               caption='caption')
IMAGES, TEXTS = ('rgb', 'depth', 'normal'), ('scene_desc', 'caption')
CROPS, SIDE, LEVELS, CODES = 10, 16, '5*5*5*8*8*8', 64000
SHAPE = (CROPS, SIDE * SIDE)
LONGEST = 2000  # characters; ten objects take about 800
SHOWN = 128  # pixels per side of a drawn image


# ---------------------------------------------------------------------------------------------------------------------
# The course's files

def path_of(source, split, name, stem):
    return f'{source}/{split}/{FOLDERS[name]}/{stem}.{"npy" if name in IMAGES else "json"}'


def find_stems(source, split):
    """The sorted names of the samples of a split, which must be the same in all fields."""
    stems = {}
    for name in FOLDERS:
        folder, ending = os.path.split(path_of(source, split, name, ''))
        try:
            stems[name] = {file.removesuffix(ending) for file in os.listdir(folder)
                           if file.endswith(ending) and file[0] != '.'}
        except OSError:
            raise UserError(f'{folder}: no such folder; --source=ROOT names the one that holds '
                            f'train/{FOLDERS["rgb"]}/STEM.npy and its like')
    every = set.union(*stems.values())
    for name, there in stems.items():
        if absent := sorted(every - there):
            raise UserError(f'{path_of(source, split, name, absent[0])}: missing, while other fields have this sample '
                            f'({len(absent):,} such of {len(every):,})')
    if not every:
        raise UserError(f'{source}/{split}: holds no samples')
    return sorted(every)


def read_bytes(path):
    with open(path, 'rb', buffering=0) as file:  # half the time of Path.read_bytes
        return file.read()


@functools.lru_cache
def read_header(header):
    """The header of a .npy file -> (shape, column-major, dtype). Cached: it is the same in nearly all files, and
    parsing it takes longer than the rest."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def read_tokens(path):
    """A .npy file -> (10, 256) uint16. Raises UserError."""
    try:
        data = read_bytes(path)
        start = 10 + int.from_bytes(data[8:10], 'little')
        shape, column_major, dtype = read_header(data[:start])
        if shape != SHAPE or dtype.kind not in 'iu':
            raise UserError(f'{path}: {dtype} of shape {shape}, expected integers of shape {SHAPE}')
        tokens = np.frombuffer(data, dtype, offset=start).reshape(shape, order='F' if column_major else 'C')
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f'{path}: unreadable, truncated or no .npy file ({error})')
    if tokens.min() < 0 or tokens.max() >= CODES:
        raise UserError(f'{path}: tokens from {tokens.min()} to {tokens.max()}, expected 0 to {CODES - 1}')
    return tokens.astype(np.uint16)


def read_texts(path):
    """A .json file -> ten strings. Raises UserError."""
    try:
        texts = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: unreadable or no JSON ({error})')
    if not isinstance(texts, list) or len(texts) != CROPS or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{path}: expected a list of {CROPS} strings')
    if max(map(len, texts)) > LONGEST:  # all rows would be padded to this length
        raise UserError(f'{path}: a text of {max(map(len, texts)):,} characters, at most {LONGEST:,} are expected')
    return texts


def read_chunk(job):
    """Reads samples: tokens (3, n, 10, 256), and their lines of texts.jsonl, [stem, scene_descs, captions]."""
    source, split, stems = job
    tokens = [[read_tokens(path_of(source, split, name, stem)) for stem in stems] for name in IMAGES]
    return np.array(tokens), [
        json.dumps([stem, *(read_texts(path_of(source, split, name, stem)) for name in TEXTS)]) + '\n'
        for stem in stems]


# ---------------------------------------------------------------------------------------------------------------------
# Packing

def count_done(path, stems):
    """The number of samples that an interrupted run has written to texts.jsonl. Removes an incomplete last line."""
    done = end = 0
    path.touch()
    with open(path, 'rb') as file:
        for line in file:
            if not line.endswith(b'\n'):
                break
            try:
                same = json.loads(line)[0] == stems[done]
            except (ValueError, LookupError, TypeError):  # damaged, or more samples
                same = False
            if not same:
                raise UserError(f'{path}: damaged, or begun with other samples than those of --source; delete '
                                f'{path.parent.parent}, or choose another --out')
            done, end = done + 1, end + len(line)
    os.truncate(path, end)
    return done


def pack(source, folder, split, stems, pool, size=50):
    """Reads the remaining samples of a split into FIELD.npy and texts.jsonl. The lines of a chunk are written last."""
    path = folder / split
    make_folder(path, 'choose another --out')
    done = count_done(path / 'texts.jsonl', stems)
    try:
        wholes = [np.lib.format.open_memmap(path / f'{name}.npy', 'r+' if done else 'w+', np.uint16,
                                            (len(stems), *SHAPE)) for name in IMAGES]
        if any(len(whole) != len(stems) for whole in wholes):
            raise ValueError('samples were added to the source since')
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: the files of an earlier run do not fit ({error}); delete {folder}, or choose another '
                        '--out')
    needed = (len(stems) - done) * 3 * 2 * CROPS * SIDE ** 2  # bytes; a full disk under a map is SIGBUS
    if shutil.disk_usage(path).free < needed:
        raise UserError(f'{path}: less than {needed / 1e9:.1f} GB free: free disk space, or choose another --out')
    jobs = [(source, split, stems[start:start + size]) for start in range(done, len(stems), size)]
    bar = tqdm(total=len(stems), initial=done, desc=f'pack {split}', unit='sample')
    with bar, open(path / 'texts.jsonl', 'a', encoding='utf-8') as file:
        for tokens, lines in (pool.map if pool else map)(read_chunk, jobs):
            for whole, part in zip(wholes, tokens):
                whole[done:done + len(lines)] = part
            file.write(''.join(lines))
            file.flush()
            done += len(lines)
            bar.update(len(lines))


def lines_of(folder, split):
    """(scene_descs, captions) of each sample, from texts.jsonl."""
    with open(folder / split / 'texts.jsonl', encoding='utf-8') as file:
        for line in file:
            yield json.loads(line)[1:]


def encode_texts(folder, splits):
    """texts.jsonl -> FIELD.npy (n, 10, L) of both text fields, L the longest text of all splits. Returns {name: (V,
    L)}."""
    save_words(folder / 'scene_desc.json', words('scene_desc', 256, 10))
    save_words(folder / 'caption.json',
               frequent_words(text for _, texts in lines_of(folder, 'train') for text in texts))
    encodings, flat = [load_words(folder / f'{name}.json') for name in TEXTS], {}
    for split in splits:
        flat[split] = [(array('h'), array('h')) for _ in TEXTS]  # all tokens, and the number of each text
        for sample in tqdm(lines_of(folder, split), f'tokenize {split}', unit='sample'):
            for (tokens, lengths), encoding, texts in zip(flat[split], encodings, sample):
                for text in texts:
                    ids = encoding.encode_ordinary(text) + [encoding.n_vocab - 1]
                    tokens.fromlist(ids)
                    lengths.append(len(ids))
    sizes = {}
    for i, (name, encoding) in enumerate(zip(TEXTS, encodings)):
        L = max(max(flat[split][i][1]) for split in splits)
        for split in splits:
            tokens, lengths = (np.array(part) for part in flat[split][i])
            rows = np.full((len(lengths), L), -1, np.int16)
            rows[np.arange(L) < lengths[:, None]] = tokens
            arrays.write(folder / split, {name: rows.reshape(-1, CROPS, L)})
        sizes[name] = encoding.n_vocab, L
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, drawing and scoring of the first view of each sample, for sample.py and lab/

def digits(tokens):
    """Tokens (...) -> the digits of their codes (6, ...)."""
    return np.array(np.unravel_index(tokens, [int(level) for level in LEVELS.split('*')]))


class Dataset:
    """Decodes, encodes, draws and scores the tokens of a data folder. `raw` values: texts a list of n strings, images
    their tokens (n, 256), because only an external decoder can decode them. This decoder is decoder.jit in the folder,
    a TorchScript file that maps integers (B, 16, 16) to images (B, 3, H, W) from -1 to 1."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.encodings = {name: load_words(self.folder / f'{name}.json') for name in TEXTS}

    @functools.cached_property
    def decoder(self):
        path = self.folder / 'decoder.jit'
        try:
            return torch.jit.load(path, map_location='cpu').eval() if path.is_file() else None
        except (RuntimeError, ValueError) as error:
            raise UserError(f'{path}: not a TorchScript file ({str(error).splitlines()[0]}); delete it to draw without')

    def load(self, split, name):
        return arrays.load(self.folder / split / f'{name}.npy')[:, 0]

    def truth(self, split, name, index):
        return self.decode(name, torch.from_numpy(self.load(split, name)[index].astype(np.int64)))

    def decode(self, name, ids):
        """Token ids (n, size) -> raw values."""
        return [decode_row(self.encodings[name], row) for row in ids.tolist()] if name in TEXTS else ids.cpu().numpy()

    def read_text(self, name, text):
        """A user's text -> token ids (1, size)."""
        return torch.from_numpy(encode_rows(self.encodings[name], [text], self.load('val', name).shape[1])).long()

    def read_image(self, name, path):
        raise UserError(f'{path}: images of your own need the tokenizer that made MultiCLEVR\'s tokens; give a text '
                        'instead')

    @functools.cached_property
    def side(self):
        """Pixels per side of the images that scene_desc describes: one more than the largest coordinate."""
        return 1 + max((int(row[4:].max()) for row in chain(*self.some_objects('scene_desc'))), default=255)

    def some_objects(self, name):
        return [parse_text(name, text) for text in self.truth('train', name, slice(2000))]

    def picture(self, name, raw):
        """One raw value as an RGB image (H, W, 3) uint8."""
        if name in TEXTS:
            return drawing(name, raw, self.side)
        if self.decoder:
            return self.rebuild(torch.from_numpy(raw).long())
        mosaic = (digits(raw)[3:].T * 255 // 7).astype(np.uint8).reshape(SIDE, SIDE, 3)  # three channels as colors
        return mosaic.repeat(SHOWN // SIDE, 0).repeat(SHOWN // SIDE, 1)

    @torch.no_grad()
    def rebuild(self, tokens):
        """Tokens (256,) -> (128, 128, 3) uint8 by the external decoder."""
        try:
            image = self.decoder(tokens.view(1, SIDE, SIDE))
            pixels = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            return np.asarray(Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.BOX))
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f'{self.folder}/decoder.jit: cannot turn integers (1, {SIDE}, {SIDE}) into an image '
                            f'(1, 3, H, W): {str(error).strip().splitlines()[-1]}')

    def score(self, name, raw, split, index):
        """Texts: attributes, objects and scenes right, as in prepare/scenes.py; images: the fraction of tokens that
        are right, and of their digits. Returns {metric: (n, k, 2)}, numerators and denominators."""
        truth = self.truth(split, name, index)
        if name in TEXTS:
            return score_objects(*([parse_text(name, text) for text in texts] for texts in (truth, raw)))
        same = dict(tokens=(truth == raw)[None], digits=digits(truth) == digits(raw))  # (1 or 6, n, 256)
        return {key: np.stack((right.mean((0, 2)), np.ones(len(raw))), -1)[:, None] for key, right in same.items()}

    def baseline(self, name, split, index):
        """Raw values of the constant predictor: the most frequent token of the training set at each position; the most
        frequent objects, or an empty text if captions have none."""
        if name in IMAGES:
            tokens = self.truth('train', name, slice(2000))
            return np.repeat([[np.bincount(column).argmax() for column in tokens.T]], len(index), 0)
        objects = self.some_objects(name)
        table = np.full((len(objects), max(map(len, objects)), 6), -1)
        for row, some in zip(table, objects):
            row[:len(some)] = np.where(some < 0, 0, some)  # 0 for attributes that the text does not contain
        rows = typical(table)
        return [dict(caption=caption, scene_desc=scene_desc)[name](rows) if rows else ''] * len(index)


# ---------------------------------------------------------------------------------------------------------------------
# Making the data set

@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    source, folder = settings['source'], Path(settings['out'])
    if settings['decoder'] and not Path(settings['decoder']).is_file():
        raise UserError(f'--decoder={settings["decoder"]}: no such file')
    if (folder / 'meta.json').is_file():
        arrays.begin(folder, 'multiclevr')  # raises UserError if another script made it
        print(f'{folder} is complete; to pack another source, choose another --out')
    elif not source:
        raise UserError('MultiCLEVR is no public download: --source=ROOT names the folder with its train, val and test')
    else:
        splits = [split for split in ('train', 'val', 'test') if split != 'test' or Path(source, split).is_dir()]
        stems = {split: find_stems(source, split) for split in splits}
        arrays.begin(folder, 'multiclevr')
        workers = settings['workers'] or len(threads.cores())
        with open_pool(workers) if workers > 1 else nullcontext() as pool:
            for split in splits:
                pack(source, folder, split, stems[split], pool)
        sizes = encode_texts(folder, splits)
        entries = [f'{name}:{LEVELS}:{SIDE}x{SIDE}' for name in IMAGES]
        entries += [f'{name}:{V}:{L}' for name, (V, L) in sizes.items()]
        fields = {name: CODES for name in IMAGES} | {name: V for name, (V, _) in sizes.items()}
        meta = dict(kind='rows', prepare='multiclevr', fields=fields, views=dict.fromkeys(fields, CROPS),
                    config=dict(modalities=' '.join(entries)), settings=dict(source=source))
        arrays.save_meta(folder, meta)
        for split in splits:
            (folder / split / 'texts.jsonl').unlink()
    if settings['decoder']:
        shutil.copyfile(settings['decoder'], folder / 'decoder.jit')


if __name__ == '__main__':
    config.run(main, stopped='stopped; the same command continues from here')
