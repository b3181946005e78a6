"""
Your own pictures: a folder of them, each with its caption in a text file of the same name, as six modalities for nano4M.

    python -m prepare.folder --source=FOLDER    FOLDER/NAME.jpg (png, webp, ...; folders in it too) with NAME.txt beside it
    python train.py config/nano4m_folder.py

    rgb       the picture                                  8x8 tokens of 16^4 codes, by a tokenizer trained here
    grey      how light it is                              8x8 tokens of 8^4 codes, the same
    edges     where that changes (Sobel)                   8x8 tokens of 8^4 codes, the same
    palette   its five colours (median cut), in order      1x5 tokens, each one of 16^3 colours
    low       the picture in 8x8 pixels                    8x8 tokens, each one of 16^3 colours
    caption   byte-pair tokens, learned from the captions  up to 64

Of each picture there are a few square views, the first from its middle, the others a little smaller and anywhere, so that few
pictures last longer. All modalities are functions of pictures (n, H, W, 3) alone: another data set's script can use them too.
What cannot be read is named and left out. All passes through memory: for some ten thousand pictures, not for millions.
"""
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
from config import UserError
from prepare.image_tokenizers import Config, ImageTokenizer, fit, from_network, reconstruction_loss, to_network
from prepare.meta import save_meta
from prepare.pictures import read_picture
from prepare.text_tokenizers import decode_row, encode_rows, load_encoding, save_encoding, train_bpe

SETTINGS = dict(source='', out='data/folder', size=64, views=4, steps=400, vocab_size=1024, caption_tokens=64, seed=0)
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')
SIDE = 8  # tokens of a picture's side


# ---------------------------------------------------------------------------------------------------------------------
# Modalities: pictures (n, H, W, 3) uint8 -> uint8

def grey(rgb):
    """(n, H, W, 1): luminance, ITU-R BT.601."""
    return np.round(rgb @ np.array((0.299, 0.587, 0.114), np.float32)).astype(np.uint8)[..., None]


def edges(rgb):
    """(n, H, W, 1): length of the gradient of the grey picture by Sobel's filters, 255 for four fifths of the largest step."""
    g = np.pad(grey(rgb)[..., 0].astype(np.float32), ((0, 0), (1, 1), (1, 1)), 'edge')
    across, down = g[:, :, 2:] - g[:, :, :-2], g[:, 2:] - g[:, :-2]  # (n, H + 2, W), (n, H, W + 2)
    dx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    dy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return (np.hypot(dx, dy) / 3.2).clip(0, 255).astype(np.uint8)[..., None]


def palette(rgb, colors=5):
    """(n, 1, 5, 3): colours of each picture by median cut, the most frequent first; one of few colours repeats them."""
    rows = []
    for picture in rgb:
        image = Image.fromarray(picture).quantize(colors)
        table = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        rows.append(np.resize(table[[i for _, i in sorted(image.getcolors(), reverse=True)]], (1, colors, 3)))
    return np.stack(rows)


def low(rgb):
    """(n, 8, 8, 3): means of squares."""
    n, H, W, _ = rgb.shape
    return np.round(rgb.reshape(n, SIDE, H // SIDE, SIDE, W // SIDE, 3).mean((2, 4))).astype(np.uint8)


TOKENIZED = dict(rgb=(lambda rgb: rgb, 3, '16*16*16*16'), grey=(grey, 1, '8*8*8*8'), edges=(edges, 1, '8*8*8*8'))
COLORS = dict(palette=(palette, '1x5'), low=(low, f'{SIDE}x{SIDE}'))  # a pixel is a token: four bits of each channel
MAKE = {name: spec[0] for name, spec in (TOKENIZED | COLORS).items()}


def color_tokens(pixels):
    """(n, h, w, 3) uint8 -> ids (n, h * w) of the levels 16*16*16."""
    return ((pixels >> 4).astype(np.int32) @ [256, 16, 1]).reshape(len(pixels), -1)


def token_colors(ids, shape):
    """The inverse: ids (n, h * w) -> (n, *shape, 3) uint8."""
    return (17 * np.stack((ids >> 8, ids >> 4 & 15, ids & 15), -1)).astype(np.uint8).reshape(len(ids), *shape, 3)


def train_tokenizer(name, rgb, steps, seed=0, batch_size=64):
    """An image tokenizer for one modality of pictures (n, views, H, H, 3)."""
    make, channels, levels = TOKENIZED[name]
    torch.manual_seed(seed)
    random, size = np.random.default_rng((seed, 5)), rgb.shape[2]

    def batch_of():
        pictures = rgb[random.integers(0, len(rgb), batch_size), random.integers(0, rgb.shape[1], batch_size)]
        return to_network('rgb', make(pictures)), torch.ones(batch_size, size, size)
    model = ImageTokenizer(Config(size=size, patch=size // SIDE, channels=channels, levels=levels))
    return fit(model, reconstruction_loss, batch_of, steps, name)


def tokenize(name, rgb, tokenizer=None):
    """Tokens (n, size) int32 of one modality of pictures (n, H, H, 3)."""
    if name in COLORS:
        return color_tokens(MAKE[name](rgb))
    parts = [tokenizer.encode(to_network('rgb', MAKE[name](rgb[i:i + 100]))) for i in range(0, len(rgb), 100)]
    return torch.cat(parts).int().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_caption(path):
    """One line. Raises UserError."""
    try:
        return ' '.join(path.read_text(encoding='utf-8').split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: no caption in UTF-8 ({type(error).__name__})')


def squares(image, size, views, random):
    """(views, size, size, 3): the square in the middle, then random ones, of at least 0.8 of its side."""
    pictures = []
    for view in range(views):
        side = min(image.size) * (random.uniform(0.8, 1) if view else 1)
        left, top = (np.array(image.size) - side) * (random.uniform(size=2) if view else 0.5)
        box = left, top, min(left + side, image.width), min(top + side, image.height)
        pictures.append(np.asarray(image.resize((size, size), Image.BICUBIC, box)))
    return np.stack(pictures)


def read_folder(source, size, views, random):
    """Pictures (n, views, size, size, 3) and their n captions, in the order of their names. Prints a line for each fault."""
    files = sorted(path for path in source.rglob('*') if not path.name.startswith('.'))
    paths = [path for path in files if path.suffix.lower() in ENDINGS]
    stems, pictures, captions = {path.with_suffix('') for path in paths}, [], []
    faults = [f'{path}: no picture beside it' for path in files if path.suffix == '.txt' and path.with_suffix('') not in stems]
    for path in tqdm(paths, 'read', unit='picture'):
        try:
            caption, image = read_caption(path.with_suffix('.txt')), read_picture(path)
        except UserError as error:
            faults.append(str(error))
            continue
        pictures.append(squares(image, size, views, random))
        captions.append(caption)
    print(''.join(f'left out: {fault}\n' for fault in faults), end='')
    if len(pictures) < 2:
        raise UserError(f'{source}: {len(pictures)} pictures with captions, at least 2 are needed: NAME{ENDINGS[0]} and NAME.txt')
    return np.stack(pictures), captions


def shorten(text, encoding, most):
    """The text without the last words that do not fit into so many tokens, the end token included."""
    while len(encoding.encode_ordinary(text)) >= most:
        text = text.rpartition(' ')[0]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The folder as sample.py sees it; of each picture the first view

class Fields:
    """Decodes, encodes, draws and scores the tokens of a data folder. `raw` values: pictures (n, h, w, 1 or 3) uint8, of as many
    pixels as the modality has; captions a list of n strings."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.encoding = load_encoding(self.folder / 'caption.json')
        self.tokenizers = {name: ImageTokenizer.load(self.folder / f'{name}.pt') for name in TOKENIZED}
        self.size = self.tokenizers['rgb'].config.size

    def load(self, split, name):
        path = self.folder / split / f'{name}.npy'
        try:
            array = np.load(path, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: missing or damaged ({error}); delete {self.folder} to make it anew')
        return array if name == 'caption' else array[:, 0]

    def truth(self, split, name, index):
        """The raw values of the samples with these indices."""
        if name == 'caption':
            return self.decode(name, self.load(split, name)[index])
        return MAKE[name](self.load(split, 'raw_rgb')[index])

    def decode(self, name, ids):
        """Token ids (n, size) -> raw values."""
        if name == 'caption':
            return [decode_row(self.encoding, row) for row in ids.tolist()]
        if name in COLORS:
            return token_colors(ids.cpu().numpy(), [int(n) for n in COLORS[name][1].split('x')])
        return np.concatenate([from_network('rgb', self.tokenizers[name].decode(part)) for part in ids.cpu().split(100)])

    def read_text(self, name, text):
        """A user's text -> token ids (1, size)."""
        return torch.from_numpy(encode_rows(self.encoding, [text], self.load('val', name).shape[1])).long()

    def read_image(self, name, path):
        """The modality of a user's picture file, of its middle -> token ids (1, size)."""
        picture = squares(read_picture(path), self.size, 1, None)
        return torch.from_numpy(tokenize(name, picture, self.tokenizers.get(name))).long()

    def picture(self, name, raw):
        """One raw value as an RGB picture (H, W, 3) uint8: pixels enlarged, a caption written out."""
        if name == 'caption':
            canvas = Image.new('RGB', (128, 128), 'white')
            ImageDraw.Draw(canvas).text((4, 2), '\n'.join(textwrap.wrap(raw, 20)), fill='black')
            return np.asarray(canvas)
        rows, columns = (np.arange(self.size) * n // self.size for n in raw.shape[:2])
        return np.repeat(raw[rows][:, columns], 3 // raw.shape[-1], -1)

    def score(self, name, raw, split, index):
        """{metric: (n, 1, 2)}, numerators and denominators: of pictures the mean difference of a pixel's value (of 255), of
        captions the words shared with the true one as a share of all words of both, and whether they are the same."""
        truth = self.truth(split, name, index)
        if name != 'caption':
            error = np.abs(truth.astype(np.float64) - raw).mean((1, 2, 3))
            return dict(error=np.stack((error, np.ones(len(error))), -1)[:, None])
        bags = [(Counter(a.lower().split()), Counter(b.lower().split())) for a, b in zip(truth, raw)]
        return dict(words=np.array([[[(a & b).total(), (a | b).total()]] for a, b in bags], float),
                    exact=np.array([[[a == b, 1]] for a, b in bags], float))

    def baseline(self, name, split, index):
        """Raw values by a predictor that sees nothing: the training pictures' mean, their most frequent caption."""
        raw = self.truth('train', name, slice(2000))
        if name == 'caption':
            return [Counter(raw).most_common(1)[0][0]] * len(index)
        return np.repeat(raw.mean(0)[None], len(index), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Making it

def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    source, folder, size, views = Path(settings['source']), Path(settings['out']), settings['size'], settings['views']
    if not settings['source'] or not source.is_dir():
        raise UserError(f'--source={settings["source"]}: name a folder with pictures, NAME.jpg, and their captions, NAME.txt')
    if size < SIDE or size % SIDE or min(views, settings['steps']) < 1 or settings['caption_tokens'] < 2:
        raise UserError(f'size must be a multiple of {SIDE}, views and steps at least 1, caption_tokens at least 2')
    if (folder / 'meta.json').is_file():
        raise UserError(f'{folder} exists already: delete it, or choose another --out')
    pictures, captions = read_folder(source, size, views, np.random.default_rng((settings['seed'], 1)))
    order = np.random.default_rng((settings['seed'], 0)).permutation(len(pictures))
    n_val = max(1, len(order) // 10)
    splits = dict(val=order[:n_val], train=order[n_val:])
    train = pictures[splits['train']]
    encoding = train_bpe([captions[i] for i in splits['train']], settings['vocab_size'])
    captions = [shorten(text, encoding, settings['caption_tokens']) for text in captions]
    L = 1 + max(len(encoding.encode_ordinary(text)) for text in captions)
    tokenizers = {name: train_tokenizer(name, train, settings['steps'], settings['seed']) for name in TOKENIZED}
    for split, ids in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        np.save(folder / split / 'raw_rgb.npy', pictures[ids])
        np.save(folder / split / 'caption.npy', encode_rows(encoding, [captions[i] for i in ids], L))
        for name in MAKE:
            tokens = tokenize(name, pictures[ids].reshape(-1, size, size, 3), tokenizers.get(name))
            np.save(folder / split / f'{name}.npy', tokens.reshape(len(ids), views, -1))
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / f'{name}.pt')
    save_encoding(folder / 'caption.json', encoding)
    fields = Fields(folder)
    rebuilt = {name: fields.decode(name, torch.from_numpy(fields.load('val', name).astype(np.int64))) for name in MAKE}
    quality = {name: float(fields.score(name, raw, 'val', slice(None))['error'][..., 0].mean()) for name, raw in rebuilt.items()}
    print('mean error after tokenizing, of 255: ' + ', '.join(f'{name} {error:.1f}' for name, error in quality.items()))
    entries = ([f'{name}:{levels}:{SIDE}x{SIDE}' for name, (_, _, levels) in TOKENIZED.items()]
               + [f'{name}:16*16*16:{grid}' for name, (_, grid) in COLORS.items()] + [f'caption:{encoding.n_vocab}:{L}'])
    vocabularies = {name: 4096 for name in MAKE} | dict(rgb=65536, tokens=65536, image=256)
    facts = dict(modalities=' '.join(entries), vocab_size=65536, levels=TOKENIZED['rgb'][2], grid=f'{SIDE}x{SIDE}',
                 block_size=SIDE * SIDE - 1, n_classes=0, image_size=size, channels=3)  # other chapters: rgb's tokens, or pixels
    meta = dict(kind='rows', prepare='folder', fields=vocabularies | dict(caption=encoding.n_vocab), config=facts,
                views=dict.fromkeys(vocabularies, views), files=dict(tokens='rgb', image='raw_rgb'), quality=quality,
                settings=settings)
    save_meta(folder, meta)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
