"""
The data set `scenes`: CLEVR-like pictures with exact ground truth in six modalities, rendered and tokenized on this machine.

    python -m prepare.scenes                      (train.py runs it by itself when data/scenes is missing)
    python -m prepare.scenes --n_train=2000 --n_val=200 --max_objects=3 --out=data/scenes_small

    rgb           the picture                            64x64, 64 tokens
    depth         distance along the optical axis        64x64, 64 tokens
    normal        surface normals in the camera's frame  64x64, 64 tokens
    segmentation  ground, or shape x colour              64x64, 64 tokens
    scene_desc    "Object 1 - Position: x=20 y=31 Shape: cube Color: blue Material: metal. Object 2 - ..."
    caption       "a large red metal sphere, a small blue rubber cube and a large gray metal cylinder", from left to right

Besides the tokens (FIELD.npy) the folder keeps what they were made from (raw_FIELD.npy, raw_instance.npy, the objects' attributes
and positions in raw_objects.npy), the tokenizers and, once scores have been asked for, the parser that reads objects back from
any picture. `Fields` decodes, draws and scores tokens for sample.py.
"""
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import config
from config import UserError
from prepare import image_tokenizers, scenes_parser
from prepare.pictures import read_square
from prepare.scenes_render import COLORS, MATERIALS, SHAPES, SIZES, make
from prepare.text_tokenizers import decode_row, encode_rows, load_words, save_words

COLOR_NAMES = tuple(COLORS)
NAMES = dict(shape=SHAPES, color=COLOR_NAMES, material=MATERIALS, size=SIZES)  # the columns of raw_objects, before x and y
SETTINGS = dict(n_train=20000, n_val=1000, size=64, max_objects=5, seed=0, out='data/scenes', workers=0)
IMAGES = ('rgb', 'depth', 'normal', 'segmentation')
TEXTS = ('scene_desc', 'caption')


# ---------------------------------------------------------------------------------------------------------------------
# Text: an object is a row of integers (shape, color, material, size, x, y), -1 where unknown

def caption(objects):
    """One sentence about a scene's objects, left to right."""
    phrases = [f'a {SIZES[size]} {COLOR_NAMES[color]} {MATERIALS[material]} {SHAPES[shape]}'
               for shape, color, material, size, *_ in objects if shape >= 0]
    return ', '.join(phrases[:-1]) + ' and ' * (len(phrases) > 1) + phrases[-1]


def scene_desc(objects):
    """The grammar of the course's MultiCLEVR: positions are pixels of the stored picture."""
    return ' '.join(f'Object {i + 1} - Position: x={x} y={y} Shape: {SHAPES[shape]} Color: {COLOR_NAMES[color]} '
                    f'Material: {MATERIALS[material]}.' for i, (shape, color, material, _, x, y) in enumerate(objects) if shape >= 0)


def words(name, size, max_objects):
    """The closed vocabulary of a text field: whole phrases where the grammar leaves no choice, so that texts are short."""
    colors, materials, shapes = ([f' {word}' for word in group] for group in (COLORS, MATERIALS, SHAPES))
    if name == 'caption':
        return [', a', ' and a', *(f' {word}' for word in SIZES), *colors, *materials, *shapes]
    numbers = [f'{" " * (i > 0)}Object {i + 1} - Position:' for i in range(max_objects)]
    return [*numbers, *(f' {axis}={i}' for axis in 'xy' for i in range(-size // 8, size + size // 8)),
            *(f' Shape:{word}' for word in shapes), *(f' Color:{word}' for word in colors),
            *(f' Material:{word}.' for word in materials)]


def text_length(name, max_objects):
    return (5 if name == 'caption' else 6) * max_objects + 1  # tokens an object, and the end token


def spell_out(text):
    """User text towards the caption's grammar: 'Two red spheres' becomes 'a red sphere and a red sphere'."""
    counts = dict(one=1, two=2, three=3, four=4, five=5)

    def repeat(match):
        return ', '.join([f'a {match[2]}'] * counts[match[1]])
    text = re.sub(rf'\b({"|".join(counts)}) ((?:\w+ )*?(?:{"|".join(SHAPES)}))s?\b', repeat, text.strip().lower().rstrip('.'))
    return text if ' and ' in text else ' and '.join(text.rsplit(', ', 1))  # the last object comes after an "and"


def parse_text(name, text):
    """The objects (n, 6) that a caption or scene_desc tells of; malformed parts are left out."""
    def choice(group):
        return '(' + '|'.join(NAMES[group]) + ')'
    if name == 'caption':
        found = re.findall(f'{choice("size")} {choice("color")} {choice("material")} {choice("shape")}', text)
        rows = [(SHAPES.index(sh), COLOR_NAMES.index(c), MATERIALS.index(m), SIZES.index(si), -1, -1) for si, c, m, sh in found]
    else:
        found = re.findall(rf'x=(-?\d+) y=(-?\d+) Shape: {choice("shape")} Color: {choice("color")} Material: {choice("material")}', text)
        rows = [(SHAPES.index(sh), COLOR_NAMES.index(c), MATERIALS.index(m), -1, int(x), int(y)) for x, y, sh, c, m in found]
    return np.array(rows, np.int64).reshape(-1, 6)


def drawing(name, text, side):
    """Objects of a text as symbols in a picture (side, side, 3): at their positions, or, where the text has none, in a row."""
    objects = parse_text(name, text)
    canvas = Image.new('RGB', (4 * side, 4 * side), (225, 225, 225))
    draw = ImageDraw.Draw(canvas)
    for i, (shape, color, material, size, x, y) in enumerate(objects):
        x, y = (x, y) if name == 'scene_desc' else (side * (i + 0.5) / len(objects), side / 2)
        r = (0.09 if size == 0 else 0.065) * 4 * side if name == 'caption' else 0.08 * 4 * side
        box = (4 * x - r, 4 * y - r, 4 * x + r, 4 * y + r)
        outline = 'white' if MATERIALS[material] == 'metal' else 'black'
        style = dict(fill=COLORS[COLOR_NAMES[color]], outline=outline, width=side // 10)
        if SHAPES[shape] == 'cylinder':
            draw.rounded_rectangle((box[0] + r / 4, box[1], box[2] - r / 4, box[3]), radius=r / 2, **style)
        else:
            (draw.rectangle if SHAPES[shape] == 'cube' else draw.ellipse)(box, **style)
    return np.asarray(canvas.resize((side, side), Image.LANCZOS))


def typical(objects):
    """What a predictor that sees nothing says: the most frequent number of objects (n, K, 6), and of each the most frequent
    attributes. Returns rows of integers."""
    count = np.bincount((objects[..., 0] >= 0).sum(1)).argmax()
    return [[np.bincount(column[column >= 0] if j < 4 else column.clip(0)).argmax() for j, column in enumerate(slot.T)]
            for slot in objects[:, :count].transpose(1, 0, 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Scores: every metric is a sum of numerators over a sum of denominators, (n, k, 2) for n samples and k classes

def match(truth, found):
    """How many attributes agree in each pair of the best alignment of two lists of objects that keeps both left to right.

    truth (a, 4) and found (b, 4): an attribute counts where both know it. Returns a list of (agreeing, known) a true object.
    """
    a, b = len(truth), len(found)
    best = np.zeros((a + 1, b + 1))  # the longest-common-subsequence recursion, with attributes for letters
    agree = ((truth[:, None] == found[None]) & (found[None] >= 0)).sum(-1)  # (a, b)
    for i in range(a):
        for j in range(b):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + agree[i, j])
    pairs, i, j = [0] * a, a, b
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs[i] = agree[i, j]
    return np.array(pairs)


def score_objects(truths, founds):
    """Attribute accuracy (missing and surplus objects count as wrong), share of objects with all attributes right, share
    of scenes with exactly the right objects. An attribute that a field does not tell (size in scene_desc) is left out."""
    rows = []
    for truth, found in zip(truths, founds):
        truth, found = truth[truth[:, 0] >= 0, :4], found[:, :4]
        known = 4 if not len(found) or (found[:, 3] >= 0).any() else 3
        right = match(truth[:, :known], found[:, :known])
        most = max(len(truth), len(found))
        exact = len(truth) == len(found) and (right == known).all()
        rows.append([[right.sum(), known * most], [(right == known).sum(), most], [exact, 1]])
    rows = np.array(rows, float)
    return dict(attributes=rows[:, 0:1], objects=rows[:, 1:2], scenes=rows[:, 2:3])


def over_pixels(error, mask):
    """The numerator and denominator (n, 1, 2) of a mean over the pixels of a mask, both (n, H, W)."""
    return np.stack(((error * mask).sum((1, 2)), mask.sum((1, 2))), -1)[:, None].astype(float)


def score_depth(truth, found, objects):
    error, ratio = np.abs(found - truth) / truth, np.maximum(found / truth, truth / found) < 1.25
    return dict(absrel_objects=over_pixels(error, objects), delta_objects=over_pixels(ratio, objects),
                absrel_all=over_pixels(error, objects >= 0), delta_all=over_pixels(ratio, objects >= 0))


def score_normal(truth, found, objects):
    lengths = np.linalg.norm(truth, axis=-1) * np.maximum(np.linalg.norm(found, axis=-1), 1e-6)
    angle = np.degrees(np.arccos(np.clip((truth * found).sum(-1) / lengths, -1, 1)))
    return dict(angle_objects=over_pixels(angle, objects), angle_all=over_pixels(angle, objects >= 0))


def score_segmentation(truth, found, objects):
    """Mean intersection over union of the classes, over the pixels of objects and over all."""
    def overlap(mask):
        return np.stack([np.stack((((truth == c) & (found == c) & mask).sum((1, 2)),
                                   (((truth == c) | (found == c)) & mask).sum((1, 2))), -1)
                         for c in range(1 + len(SHAPES) * len(COLORS))], 1).astype(float)  # (n, 25, 2)
    return dict(miou_objects=overlap(objects)[:, 1:], miou_all=overlap(objects >= 0))


# ---------------------------------------------------------------------------------------------------------------------
# The folder as sample.py sees it

class Fields:
    """Decodes, encodes, draws and scores the tokens of a data folder.

    `raw` values: pictures (n, H, W, 3) uint8, depth (n, H, W) float, normals (n, H, W, 3) float, segmentation (n, H, W) integers,
    texts a list of n strings.
    """
    def __init__(self, folder):
        self.folder = Path(folder)
        self.tokenizers = {name: image_tokenizers.ImageTokenizer.load(self.folder / f'{name}.pt') for name in IMAGES}
        self.encodings = {name: load_words(self.folder / f'{name}.json') for name in TEXTS}
        self.size = self.tokenizers['rgb'].config.size

    @functools.cached_property
    def parser(self):
        """The judge of pictures; trained, in about a minute, when the first score asks for it: training needs none."""
        path = self.folder / 'parser.pt'
        if not path.is_file():
            torch.manual_seed(0)
            new = scenes_parser.Parser(self.size)
            scenes_parser.train_parser(self.folder, new, 'raw_rgb', scenes_parser.pixel_patches).save(path)
        return scenes_parser.Parser.load(path)

    def load(self, split, name):
        path = self.folder / split / f'{name}.npy'
        try:
            return np.load(path, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: missing or damaged ({error}); delete {self.folder} to make it anew')

    def truth(self, split, name, index):
        """The raw values of the samples with these indices."""
        if name in TEXTS:
            return self.decode(name, torch.from_numpy(self.load(split, name)[index].astype(np.int64)))
        raw = self.load(split, f'raw_{name}')[index]
        if name == 'normal':
            return raw.astype(np.float32) / 127  # stored in bytes
        return raw.astype(np.float32) if name == 'depth' else raw

    def decode(self, name, ids):
        """Token ids (n, size) -> raw values."""
        if name in TEXTS:
            return [decode_row(self.encodings[name], row) for row in ids.tolist()]
        parts = [image_tokenizers.from_network(name, self.tokenizers[name].decode(part)) for part in ids.cpu().split(100)]
        return np.concatenate(parts)

    def encode(self, name, raw):
        """Raw values -> token ids (n, size)."""
        if name in TEXTS:
            length = self.load('val', name).shape[1]
            return torch.from_numpy(encode_rows(self.encodings[name], raw, length)).long()
        return self.tokenizers[name].encode(image_tokenizers.to_network(name, raw))

    def read_text(self, name, text):
        """A user's text -> token ids (1, size)."""
        return self.encode(name, [spell_out(text) if name == 'caption' else text])

    def read_image(self, name, path):
        """A user's picture file -> token ids (1, size); any mode, and any size that is square, is brought to the data's."""
        if name != 'rgb':
            raise UserError(f'--image gives the modality rgb, not {name}')
        image = read_square(path, self.size)
        return self.encode('rgb', np.asarray(image.resize((self.size, self.size), Image.BICUBIC))[None])

    def picture(self, name, raw):
        """One raw value as an RGB picture (H, W, 3) uint8; a scene_desc is drawn at its coordinates, a caption as text."""
        if name == 'rgb':
            return raw
        if name == 'depth':
            near = 1 - (np.log(raw) - np.log(4.5)) / (np.log(18) - np.log(4.5))
            return np.repeat((255 * near.clip(0, 1)).astype(np.uint8)[..., None], 3, -1)
        if name == 'normal':
            return np.round((raw + 1) * 127.5).clip(0, 255).astype(np.uint8)
        if name == 'segmentation':
            palette = np.array([(140, 140, 140)] + [np.array(rgb) * (0.6 + 0.2 * s) for s in range(3) for rgb in COLORS.values()])
            return palette[raw].astype(np.uint8)
        return drawing(name, raw, self.size)

    def classes_named(self, words):
        """The classes of a segmentation that words such as 'red cube', 'cube', 'red' or 'object' mean."""
        asked = {*words.lower().replace('objects', 'object').split()} - {'object'}
        if unknown := asked - {*SHAPES, *COLORS}:
            raise UserError(f'{words!r}: {unknown.pop()!r} is no colour ({", ".join(COLORS)}), no shape ({", ".join(SHAPES)}) '
                            'and not "object"')
        kinds = [{shape, color} for shape in SHAPES for color in COLORS]
        return [1 + i for i, kind in enumerate(kinds) if asked <= kind]  # 0 is the ground

    def score(self, name, raw, split, index):
        """Metrics of raw values against the truth: {metric: (n, k, 2)}, numerators and denominators."""
        objects = self.load(split, 'raw_instance')[index] > 0
        if name == 'depth':
            return score_depth(self.truth(split, name, index), raw, objects)
        if name == 'normal':
            return score_normal(self.truth(split, name, index), raw, objects)
        if name == 'segmentation':
            return score_segmentation(self.truth(split, name, index), raw, objects)
        found = self.parser.read(raw) if name == 'rgb' else [parse_text(name, text) for text in raw]
        return score_objects(self.load(split, 'raw_objects')[index], found)

    def baseline(self, name, split, index):
        """Raw values by a predictor that sees nothing: the training set's mean, majority class or most frequent objects; for rgb, whose
        mean shows no objects to read, the pictures of other scenes."""
        if name == 'rgb':
            return self.truth(split, name, np.roll(index, 1))
        if name in IMAGES:
            raw = self.truth('train', name, slice(2000))
            constant = raw.mean(0) if name != 'segmentation' else np.array(
                [[np.bincount(pixel).argmax() for pixel in row] for row in raw.transpose(1, 2, 0)])
            return np.repeat(constant[None], len(index), 0)
        rows = typical(self.load('train', 'raw_objects')[:2000])
        return [dict(caption=caption, scene_desc=scene_desc)[name](rows)] * len(index)


# ---------------------------------------------------------------------------------------------------------------------
# Making it

def write(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f'{name}.npy', array)


def raw_arrays(made):
    """The renderer's arrays as they are stored: class labels from instances, one table of objects."""
    objects = np.concatenate([made[name][..., None] for name in NAMES] + [made['pixel']], -1).astype(np.int16)  # (n, K, 6)
    objects[made['shape'] < 0] = -1
    label = np.where(made['shape'] < 0, 0, 1 + made['shape'].astype(np.int64) * len(COLORS) + made['color'])
    label = np.pad(label, ((0, 0), (1, 0)))  # instance 0 is the ground
    segmentation = np.take_along_axis(label[:, None, :], made['instance'].astype(np.int64).reshape(len(label), 1, -1), -1)
    return dict(raw_rgb=made['rgb'], raw_depth=made['depth'], raw_normal=made['normal'], raw_instance=made['instance'],
                raw_segmentation=segmentation.reshape(made['instance'].shape).astype(np.uint8), raw_objects=objects)


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    size, K, folder = settings['size'], settings['max_objects'], Path(settings['out'])
    if not 2 <= K <= 10 or size % 8 or size < 32 or min(settings['n_train'], settings['n_val']) < 1:
        raise UserError('max_objects must be 2..10, size a multiple of 8 from 32, n_train and n_val at least 1')
    pictures = set()
    for split, n, seed in (('val', settings['n_val'], 2 * settings['seed'] + 1), ('train', settings['n_train'], 2 * settings['seed'])):
        arrays = raw_arrays(make(n, seed, size, K, settings['workers'] or None))
        hashes = {picture.tobytes() for picture in arrays['raw_rgb']}
        assert not hashes & pictures, 'a scene stands in both splits'
        pictures = hashes if split == 'val' else pictures
        write(folder / split, arrays)

    meta = dict(kind='rows', prepare='scenes', fields={}, config={}, quality={}, settings=settings)
    entries = []
    for name in IMAGES:
        tokenizer, quality = image_tokenizers.train_field(folder, name, size, settings['seed'])
        print(f'{name}: ' + ', '.join(f'{key} {value:.4g}' for key, value in quality.items()))
        tokenizer.save(folder / f'{name}.pt')
        for split in ('train', 'val'):
            write(folder / split, {name: image_tokenizers.encode_all(tokenizer, name, folder / split)})
        meta['quality'][name], meta['fields'][name] = quality, tokenizer.vocabulary
        entries.append(f'{name}:{tokenizer.config.levels}:{size // tokenizer.config.patch}x{size // tokenizer.config.patch}')
    for name, tell in (('scene_desc', scene_desc), ('caption', caption)):
        save_words(folder / f'{name}.json', words(name, size, K))
        encoding, length = load_words(folder / f'{name}.json'), text_length(name, K)
        for split in ('train', 'val'):
            texts = [tell(objects) for objects in np.load(folder / split / 'raw_objects.npy').tolist()]
            write(folder / split, {name: encode_rows(encoding, texts, length)})
        meta['fields'][name] = encoding.n_vocab
        entries.append(f'{name}:{encoding.n_vocab}:{length}')
    _, levels, grid = entries[0].split(':')  # chapters that know one modality get rgb, as tokens or as the picture itself
    meta['config'] = dict(modalities=' '.join(entries), vocab_size=meta['fields']['rgb'], levels=levels, grid=grid,
                          block_size=(size // tokenizer.config.patch) ** 2 - 1, image_size=size, channels=3, n_classes=0)
    meta['fields'] |= dict(tokens=meta['fields']['rgb'], image=256)
    meta['files'] = dict(tokens='rgb', image='raw_rgb')
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1))  # last: its presence says that all is there


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
