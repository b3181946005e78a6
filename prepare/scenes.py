"""
The data set `scenes`: CLEVR-like images with exact ground truth in six modalities, rendered and tokenized here.

    python -m prepare.scenes                      (train.py runs this if data/scenes is missing)
    python -m prepare.scenes --n_train=2000 --n_val=200 --max_objects=3 --out=data/scenes_small
    python -m prepare.scenes --extra="edges palette boxes metadata layout"     (adds modalities to data/scenes)

    rgb           the image                              64x64, 64 tokens
    depth         distance along the optical axis        64x64, 64 tokens
    normal        surface normals in the camera's frame  64x64, 64 tokens
    segmentation  ground, or shape x color              64x64, 64 tokens
    scene_desc    "Object 1 - Position: x=20 y=31 Shape: cube Color: blue Material: metal. Object 2 - ..."
    caption       "a large red metal sphere, a small blue rubber cube and a large gray metal cylinder", left to right

--extra adds modalities that are functions of an image (grey, edges, palette, low: prepare/pictures.py) and modalities
that are numbers (boxes, metadata, layout: prepare/scenes_numbers.py).

The folder contains tokens (FIELD.npy), raw arrays (raw_FIELD.npy, raw_instance.npy, attributes and positions of objects
in raw_objects.npy), the tokenizers and, after the first scoring, the parser, which predicts objects from images.
"""
import functools
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import config
from config import UserError
from prepare import image_tokenizers, pictures, scenes_numbers, scenes_parser
from prepare.arrays import begin, load, read_meta, save_meta, write
from prepare.files import making
from prepare.pictures import read_square
from prepare.scenes_numbers import NUMBERS
from prepare.scenes_render import COLORS, MATERIALS, SHAPES, SIZES, make
from prepare.scenes_scores import score_boxes, score_depth, score_normal
from prepare.scenes_scores import score_numbers, score_objects, score_segmentation
from prepare.text_tokenizers import decode_row, encode_rows, known_words, load_words, save_words

COLOR_NAMES = tuple(COLORS)
NAMES = dict(shape=SHAPES, color=COLOR_NAMES, material=MATERIALS, size=SIZES)  # columns of raw_objects, before x and y
MAKES = 'data/scenes'
SETTINGS = dict(
    n_train=20000, n_val=1000,  # scenes
    size=64,        # pixels per side
    max_objects=5,  # per scene; at least 2
    seed=0,
    out=MAKES,      # the data folder
    workers=0,      # processes that render; 0 is one per core
    extra='',       # more modalities: grey edges palette low boxes metadata layout
)
EXTRA_STEPS = 250  # of training the tokenizer of a modality of --extra
IMAGES = ('rgb', 'depth', 'normal', 'segmentation')
TEXTS = ('scene_desc', 'caption')
EXTRA = tuple(name for name in (*pictures.MAKE, *NUMBERS) if name not in IMAGES)


# ---------------------------------------------------------------------------------------------------------------------
# Text: an object is a row of integers (shape, color, material, size, x, y), -1 if unknown

def caption(objects):
    """One sentence that lists the objects of a scene from left to right."""
    phrases = [f'a {SIZES[size]} {COLOR_NAMES[color]} {MATERIALS[material]} {SHAPES[shape]}'
               for shape, color, material, size, *_ in objects if shape >= 0]
    return ', '.join(phrases[:-1]) + ' and ' * (len(phrases) > 1) + phrases[-1]


def scene_desc(objects):
    """The grammar of the course's MultiCLEVR; positions are pixels of the stored image."""
    return ' '.join(f'Object {i + 1} - Position: x={x} y={y} Shape: {SHAPES[shape]} Color: {COLOR_NAMES[color]} '
                    f'Material: {MATERIALS[material]}.'
                    for i, (shape, color, material, _, x, y) in enumerate(objects) if shape >= 0)


def words(name, size, max_objects):
    """The closed vocabulary of a text field; fixed phrases of the grammar are one token, so that texts are short."""
    colors, materials, shapes = ([f' {word}' for word in group] for group in (COLORS, MATERIALS, SHAPES))
    if name == 'caption':
        return [', a', ' and a', *(f' {word}' for word in SIZES), *colors, *materials, *shapes]
    numbers = [f'{" " * (i > 0)}Object {i + 1} - Position:' for i in range(max_objects)]
    return [*numbers, *(f' {axis}={i}' for axis in 'xy' for i in range(-size // 8, size + size // 8)),
            *(f' Shape:{word}' for word in shapes), *(f' Color:{word}' for word in colors),
            *(f' Material:{word}.' for word in materials)]


def text_length(name, max_objects):
    return (5 if name == 'caption' else 6) * max_objects + 1  # tokens per object, and the end token


def spell_out(text):
    """Rewrites user text in the grammar of captions: 'Two red spheres, blue cube.' becomes 'a red sphere, a red sphere
    and a blue cube'."""
    counts = dict(one=1, two=2, three=3, four=4, five=5)

    def repeat(match):
        return ', '.join([match[2]] * counts[match[1]])
    text = re.sub(rf'\b({"|".join(counts)}) ((?:\w+ )*?(?:{"|".join(SHAPES)}))s?\b', repeat,
                  ' '.join(text.lower().split()).rstrip(' .!?'))
    phrases = filter(None, map(str.strip, re.split(r',|\band\b', text)))
    phrases = [re.sub(r'^(an?\b)? *', 'a ', phrase).strip() for phrase in phrases]
    return ' and '.join(', '.join(phrases).rsplit(', ', 1))  # the last object comes after an "and"


def parse_text(name, text):
    """The objects (n, 6) of a caption or scene_desc; malformed parts are ignored."""
    def choice(group):
        return '(' + '|'.join(NAMES[group]) + ')'
    if name == 'caption':
        found = re.findall(f'{choice("size")} {choice("color")} {choice("material")} {choice("shape")}', text)
        rows = [(SHAPES.index(sh), COLOR_NAMES.index(c), MATERIALS.index(m), SIZES.index(si), -1, -1)
                for si, c, m, sh in found]
    else:
        found = re.findall(rf'x=(-?\d+) y=(-?\d+) Shape: {choice("shape")} Color: {choice("color")} '
                           f'Material: {choice("material")}', text)
        rows = [(SHAPES.index(sh), COLOR_NAMES.index(c), MATERIALS.index(m), -1, int(x), int(y))
                for x, y, sh, c, m in found]
    return np.array(rows, np.int64).reshape(-1, 6)


def drawing(name, text, side):
    """Draws the objects of a text as symbols (side, side, 3): at their positions or, if the text has none, in a row."""
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
    """The constant predictor: the most frequent number of objects (n, K, 6) and attributes of each, as rows."""
    count = np.bincount((objects[..., 0] >= 0).sum(1)).argmax()
    slots = objects[:, :count].transpose(1, 0, 2)
    return [[np.bincount(column.clip(0)).argmax() for column in slot[slot[:, 0] >= 0].T] for slot in slots]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, drawing and scoring, for sample.py and lab/

class Dataset:
    """Decodes, encodes, draws and scores the tokens of a data folder. `raw` values: images (n, H, W, 3) uint8, depth
    (n, H, W) float, normals (n, H, W, 3) float, segmentation (n, H, W) integers, texts a list of n strings."""
    def __init__(self, folder):
        self.folder, self.device, names = Path(folder), 'auto', read_meta(folder)['fields']  # device: trains the parser
        self.tokenizers = {name: image_tokenizers.ImageTokenizer.load(self.folder / f'{name}.pt') for name in names
                           if name in IMAGES or name in pictures.TOKENIZED}
        self.encodings = {name: load_words(self.folder / f'{name}.json') for name in names
                          if name in TEXTS or name in NUMBERS}
        self.size = self.tokenizers['rgb'].config.size

    @functools.cached_property
    def parser(self):
        """The parser, which predicts objects from images; trained on first use, in about a minute."""
        return scenes_parser.load_or_train(self.folder, self.size, self.device)

    def load(self, split, name):
        return load(self.folder / split / f'{name}.npy')

    def truth(self, split, name, index):
        """The raw values of the samples with these indices."""
        if name in self.encodings:
            return self.decode(name, torch.from_numpy(self.load(split, name)[index].astype(np.int64)))
        if name in EXTRA:
            return pictures.MAKE[name](self.load(split, 'raw_rgb')[index])
        raw = self.load(split, f'raw_{name}')[index]
        if name == 'normal':
            return raw.astype(np.float32) / 127  # stored in bytes
        return raw.astype(np.float32) if name == 'depth' else raw

    def decode(self, name, ids):
        """Token ids (n, size) -> raw values."""
        if name in self.encodings:
            return [decode_row(self.encodings[name], row) for row in ids.tolist()]
        if name in EXTRA:
            return pictures.from_tokens(name, ids, self.tokenizers.get(name))
        return np.concatenate([image_tokenizers.from_network(name, self.tokenizers[name].decode(part))
                               for part in ids.cpu().split(100)])

    def encode(self, name, raw):
        """Raw values -> token ids (n, size)."""
        if name in self.encodings:
            length = self.load('val', name).shape[1]
            return torch.from_numpy(encode_rows(self.encodings[name], raw, length)).long()
        if name in EXTRA:
            return torch.from_numpy(pictures.to_tokens(name, raw, self.tokenizers.get(name))).long()
        return self.tokenizers[name].encode(image_tokenizers.to_network(name, raw))

    def read_text(self, name, text):
        """A user's text, in words of the vocabulary -> token ids (1, size). Raises UserError."""
        text = spell_out(text) if name == 'caption' else text
        return self.encode(name, [known_words(self.encodings[name], text, self.truth('val', name, slice(20)))])

    def read_image(self, name, path):
        """A user's image file -> token ids (1, size); any mode and any square size are converted."""
        if name not in pictures.MAKE:
            raise UserError('--image gives the modality rgb, or a function of it '
                            f'({", ".join(pictures.MAKE)}), not {name}')
        image = read_square(path, self.size)
        image = np.asarray(image.resize((self.size, self.size), Image.BICUBIC))[None]
        return torch.from_numpy(pictures.tokenize(name, image, self.tokenizers.get(name))).long()

    def picture(self, name, raw):
        """One raw value as an RGB image (H, W, 3) uint8; objects of a scene_desc at their positions, else in a row."""
        if name == 'rgb':
            return raw
        if name == 'depth':
            near = 1 - (np.log(raw) - np.log(4.5)) / (np.log(18) - np.log(4.5))
            return np.repeat((255 * near.clip(0, 1)).astype(np.uint8)[..., None], 3, -1)
        if name == 'normal':
            return np.round((raw + 1) * 127.5).clip(0, 255).astype(np.uint8)
        if name == 'segmentation':
            palette = [(140,) * 3] + [np.array(rgb) * (0.6 + 0.2 * s) for s in range(3) for rgb in COLORS.values()]
            return np.array(palette)[raw].astype(np.uint8)
        if name in NUMBERS:
            return scenes_numbers.drawing(name, raw, self.size)
        return pictures.enlarged(raw, self.size) if name in EXTRA else drawing(name, raw, self.size)

    def classes_named(self, words):
        """The classes of a segmentation that match words such as 'red cube', 'cube', 'red' or 'object'."""
        wanted = {*words.lower().replace('objects', 'object').split()} - {'object'}
        if unknown := wanted - {*SHAPES, *COLORS}:
            raise UserError(f'{words!r}: {unknown.pop()!r} is no color ({", ".join(COLORS)}), no shape '
                            f'({", ".join(SHAPES)}) and not "object"')
        kinds = [{shape, color} for shape in SHAPES for color in COLORS]
        return [1 + i for i, kind in enumerate(kinds) if wanted <= kind]  # 0 is the ground

    def score(self, name, raw, split, index):
        """Metrics of raw values against the truth: {metric: (n, k, 2)}, numerators and denominators."""
        if name in NUMBERS:
            tables = ([scenes_numbers.read(name, text) for text in texts]
                      for texts in (self.truth(split, name, index), raw))
            return score_boxes(*tables) if name == 'boxes' else score_numbers(name, *tables)
        if name in EXTRA:
            return pictures.pixel_error(self.truth(split, name, index), raw)
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
        """Raw values of the constant predictor: the mean, majority class or most frequent objects of the training set;
        for rgb, whose mean has no objects, the images of other scenes."""
        if name == 'rgb':
            return self.truth(split, name, index - 1)
        if name in NUMBERS:
            some = [scenes_numbers.read(name, text) for text in self.truth('train', name, slice(2000))]
            return [scenes_numbers.to_text(name, scenes_numbers.middle(some).tolist())] * len(index)
        if name in IMAGES or name in EXTRA:
            raw = self.truth('train', name, slice(2000))
            constant = raw.mean(0) if name != 'segmentation' else np.array(
                [[np.bincount(pixel).argmax() for pixel in row] for row in raw.transpose(1, 2, 0)])
            return np.repeat(constant[None], len(index), 0)
        rows = typical(self.load('train', 'raw_objects')[:2000])
        return [dict(caption=caption, scene_desc=scene_desc)[name](rows)] * len(index)


# ---------------------------------------------------------------------------------------------------------------------
# Making the data set

def raw_arrays(made):
    """The renderer's arrays in the stored form: classes instead of instances, one table of objects (n, K, 6)."""
    objects = np.concatenate([made[name][..., None] for name in NAMES] + [made['pixel']], -1).astype(np.int16)
    objects[made['shape'] < 0] = -1
    label = np.where(made['shape'] < 0, 0, 1 + made['shape'].astype(np.int64) * len(COLORS) + made['color'])
    label = np.pad(label, ((0, 0), (1, 0)))  # instance 0 is the ground
    instance = made['instance'].astype(np.int64).reshape(len(label), 1, -1)
    segmentation = np.take_along_axis(label[:, None, :], instance, -1)
    return dict(raw_rgb=made['rgb'], raw_depth=made['depth'], raw_normal=made['normal'], raw_instance=made['instance'],
                raw_segmentation=segmentation.reshape(made['instance'].shape).astype(np.uint8), raw_objects=objects)


def add(meta, name, levels, size, vocabulary):
    """Adds a modality to meta.json, as an entry of Config.modalities."""
    meta['fields'][name] = vocabulary
    meta['config']['modalities'] = f'{meta["config"].get("modalities", "")} {name}:{levels}:{size}'.strip()


def add_image(folder, meta, name, size, seed):
    """Trains a tokenizer for one of the rendered modalities and adds its tokens."""
    tokenizer, meta['quality'][name] = image_tokenizers.train_field(folder, name, size, seed)
    print(f'{name}: ' + ', '.join(f'{key} {value:.4g}' for key, value in meta['quality'][name].items()))
    tokenizer.save(folder / f'{name}.pt')
    for split in ('train', 'val'):
        write(folder / split, {name: image_tokenizers.encode_all(tokenizer, name, folder / split)})
    side = size // tokenizer.config.patch
    add(meta, name, tokenizer.config.levels, f'{side}x{side}', tokenizer.vocabulary)


def add_text(folder, meta, name, vocabulary, texts, length):
    """Adds texts {split: [text, ...]} of at most `length` tokens in a closed vocabulary."""
    save_words(folder / f'{name}.json', vocabulary)
    encoding = load_words(folder / f'{name}.json')
    for split, some in texts.items():
        write(folder / split, {name: encode_rows(encoding, some, length)})
    add(meta, name, encoding.n_vocab, length, encoding.n_vocab)


def add_numbers(folder, meta, name):
    """Adds numbers measured from the raw arrays, as text."""
    measure, columns = NUMBERS[name]
    tables = {}
    for split in ('train', 'val'):
        raw = {part: load(folder / split / f'raw_{part}.npy') for part in (*IMAGES, 'instance', 'objects')}
        tables[split] = np.concatenate([measure({part: array[i:i + 500] for part, array in raw.items()})
                                        for i in range(0, len(raw['rgb']), 500)])
    texts = {split: [scenes_numbers.to_text(name, table) for table in some.tolist()] for split, some in tables.items()}
    add_text(folder, meta, name, scenes_numbers.words(name), texts, tables['val'].shape[1] * len(columns) + 1)


def add_picture(folder, meta, name, seed):
    """Adds a modality that is a function of an image."""
    rgb, tokenizer = {split: load(folder / split / 'raw_rgb.npy') for split in ('train', 'val')}, None
    if name in pictures.TOKENIZED:
        tokenizer = pictures.train_tokenizer(name, rgb['train'][:, None], EXTRA_STEPS, seed)
        tokenizer.save(folder / f'{name}.pt')
    for split, some in rgb.items():
        tokens = pictures.tokenize(name, some, tokenizer)
        write(folder / split, {name: tokens})
    rebuilt = pictures.from_tokens(name, torch.from_numpy(tokens).long(), tokenizer)
    error = float(pictures.pixel_error(pictures.MAKE[name](rgb['val']), rebuilt)['error'][..., 0].mean())
    print(f'{name}: mean error {error:.3g} of 255')
    meta['quality'][name] = dict(error=error)
    _, levels, size = pictures.entry(name).split(':')
    add(meta, name, levels, size, 4096)  # 8^4 codes, or 16^3 colors


def make_scenes(settings):
    """Renders the scenes and makes the six modalities of every folder; returns the contents of meta.json."""
    size, K, folder, seen = settings['size'], settings['max_objects'], Path(settings['out']), set()
    begin(folder, 'scenes')
    seeds = dict(val=2 * settings['seed'] + 1, train=2 * settings['seed'])
    for split, seed in seeds.items():
        n = settings[f'n_{split}']
        arrays = raw_arrays(make(n, seed, size, K, settings['workers']))
        hashes = {picture.tobytes() for picture in arrays['raw_rgb']}
        assert not hashes & seen, 'a scene is in both splits'
        seen = hashes if split == 'val' else seen
        write(folder / split, arrays)
    meta = dict(kind='rows', prepare='scenes', fields={}, config={}, quality={}, settings=settings)
    for name in IMAGES:
        add_image(folder, meta, name, size, settings['seed'])
    for name, text_of in (('scene_desc', scene_desc), ('caption', caption)):
        objects = {split: load(folder / split / 'raw_objects.npy').tolist() for split in ('train', 'val')}
        texts = {split: [text_of(one) for one in some] for split, some in objects.items()}
        add_text(folder, meta, name, words(name, size, K), texts, text_length(name, K))
    # models of one modality read rgb, as tokens or as pixels
    _, levels, grid = meta['config']['modalities'].split()[0].split(':')
    meta['config'] |= dict(vocab_size=meta['fields']['rgb'], levels=levels, grid=grid, block_size=(size // 8) ** 2 - 1,
                           image_size=size, channels=3, n_classes=0)
    meta['fields'] |= dict(tokens=meta['fields']['rgb'], image=256)
    meta['files'] = dict(tokens='rgb', image='raw_rgb')
    save_meta(folder, meta)
    return meta


@making()
def main(*arguments, **overrides):
    assigned = config.read(arguments, overrides)
    settings = config.apply(assigned, SETTINGS)
    extra, folder, size = settings.pop('extra').replace(',', ' ').split(), Path(settings['out']), settings['size']
    there = (folder / 'meta.json').is_file()
    if unknown := [name for name in extra if name not in EXTRA]:
        raise UserError(f'extra: there is no modality {unknown[0]!r}; there are {", ".join(EXTRA)}')
    if not 2 <= settings['max_objects'] <= 10 or size % 8 or size < 32:
        raise UserError('max_objects must be 2..10, size a multiple of 8 from 32')
    if there and not extra:
        raise UserError(f'{folder} exists already: delete it, choose another --out, or add modalities by --extra=')
    meta = read_meta(folder) if there else make_scenes(settings)
    for name in set(assigned) - {'extra', 'out', 'workers'} if meta['prepare'] == 'scenes' else ():  # else: see `begin`
        if settings[name] != meta['settings'][name]:
            raise UserError(f'{folder} has {name}={meta["settings"][name]}: leave {name} out, or choose another --out')
    for name in dict.fromkeys(extra):
        begin(folder, 'scenes', keep_meta=True)
        meta = read_meta(folder)  # another process may have added modalities since
        if name in meta['fields']:
            print(f'{folder} has {name} already')
        elif name in NUMBERS:
            add_numbers(folder, meta, name)
        else:
            add_picture(folder, meta, name, meta['settings']['seed'])
        save_meta(folder, meta)


if __name__ == '__main__':
    config.run(main)
