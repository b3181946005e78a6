"""
Your own images with captions, in text files of the same names, as six modalities for nano4M.

    python -m prepare.folder --source=FOLDER    FOLDER/NAME.jpg (png, webp, ...; also in subfolders) and NAME.txt
    python train.py config/nano4m_folder.py

    rgb       the image                                    8x8 tokens of 16^4 codes, by a tokenizer trained here
    grey      its luminance                                8x8 tokens of 8^4 codes, the same
    edges     the gradient of luminance (Sobel)            8x8 tokens of 8^4 codes, the same
    palette   five colors (median cut), most frequent first  1x5 tokens, each one of 16^3 colors
    low       the image in 8x8 pixels                      8x8 tokens, each one of 16^3 colors
    caption   BPE tokens, trained on the captions          up to 64

Each training image has several square views: the first is the central crop, the others are slightly smaller random
crops, as augmentation. All modalities but captions are functions of images (n, H, W, 3), so that scripts of other data
sets can use them. Files that cannot be read are reported and left out. All images are held in memory: tens of
thousands, not millions.
"""
import hashlib
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
from config import UserError
from prepare import arrays
from prepare.files import making, tell, visible
from prepare.image_tokenizers import ImageTokenizer
from prepare.pictures import (
    ENDINGS,
    MAKE,
    SIDE,
    TOKENIZED,
    enlarged,
    entry,
    from_tokens,
    pixel_error,
    read_picture,
    squares,
    to_tokens,
    tokenize,
    train_tokenizer,
)
from prepare.text_tokenizers import decode_row, encode_rows, load_encoding, save_encoding, train_bpe

MAKES = 'data/folder'
SETTINGS = dict(
    source='',          # your folder of images and captions
    out=MAKES,          # the data folder
    size=64,            # pixels per side
    views=4,            # crops per training image; 1 is the central crop alone
    steps=400,          # of the training of each image tokenizer
    vocab_size=1024,    # of the captions' encoding
    caption_tokens=64,  # of the longest caption, with its end token
    seed=0,
)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_caption(path):
    """A caption as one line. Raises UserError."""
    try:
        text = path.read_text(encoding='utf-8-sig')
        if '\0' in text or not text.split():
            raise ValueError('it holds zero bytes, as UTF-16 does' if '\0' in text else 'empty')
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: no caption in UTF-8 ({getattr(error, "strerror", "") or error})')
    return ' '.join(text.split())


def name_key(stem):
    """A name without case, in one Unicode form: photo.txt belongs to Photo.jpg, and é may be one character or two."""
    return unicodedata.normalize('NFC', str(stem)).casefold()


def read_folder(source, size, views, random):
    """Images (n, views, size, size, 3) and their n captions, sorted by name. Prints a line for each file that is left
    out."""
    files, pictures, captions = visible(source), [], []
    paths = [path for path in files if path.suffix.lower() in ENDINGS]
    stems, texts = ({path.with_suffix(''): path for path in reversed(some)}  # the first one of each name
                    for some in (paths, [path for path in files if path.suffix.lower() == '.txt']))
    mute = {name_key(stem) for stem in stems if stem not in texts}
    loose = {name_key(stem): path for stem, path in texts.items() if stem not in stems}
    faults = [f'{path}: no image beside it that is {", ".join(ENDINGS)}' for name, path in loose.items()
              if name not in mute]
    first = {}  # size and contents -> its path
    for path in tqdm(paths, 'read', unit='image'):
        stem = path.with_suffix('')
        try:
            if stems[stem] != path:
                raise UserError(f'{path}: {stems[stem].name} has the same name, and the same caption')
            text = texts.get(stem) or loose.get(name_key(stem), path.with_suffix('.txt'))
            caption, image = read_caption(text), read_picture(path)
            if (other := first.setdefault((image.size, hashlib.sha256(image.tobytes()).digest()), path)) != path:
                raise UserError(f'{path}: the same picture as {other}')
        except UserError as error:
            faults.append(error)
            continue
        pictures.append(squares(image, size, views, random))
        captions.append(caption)
    tell(faults)
    if len(pictures) < 2:
        raise UserError(f'{source}: {len(pictures)} images with captions, at least 2 are needed: NAME{ENDINGS[0]} and '
                        'NAME.txt')
    return np.stack(pictures), captions


def shorten(text, encoding, most):
    """Removes words at the end until the text has fewer than `most` tokens, so that an end token fits. Characters, as
    long as the last word is more than half of the text."""
    text = text[:most * max(map(len, encoding.token_byte_values()))]  # more never fits: each token has some bytes
    while len(encoding.encode_ordinary(text)) >= most:
        rest = text.rpartition(' ')[0]
        text = rest if 2 * len(rest) >= len(text) else text[:-1]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, drawing and scoring of the first view of each image, for sample.py and lab/

class Dataset:
    """Decodes, encodes, draws and scores the tokens of a data folder. `raw` values: images (n, h, w, 1 or 3) uint8 in
    the modality's own size; captions as a list of n strings."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.encoding = load_encoding(self.folder / 'caption.json')
        self.tokenizers = {name: ImageTokenizer.load(self.folder / f'{name}.pt') for name in TOKENIZED}
        self.size = self.tokenizers['rgb'].config.size

    def load(self, split, name):
        array = arrays.load(self.folder / split / f'{name}.npy')
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
        return from_tokens(name, ids, self.tokenizers.get(name))

    def encode(self, name, raw):
        """Raw images -> token ids (n, size)."""
        return torch.from_numpy(to_tokens(name, raw, self.tokenizers.get(name))).long()

    def read_text(self, name, text):
        """A user's text -> token ids (1, size)."""
        return torch.from_numpy(encode_rows(self.encoding, [text], self.load('val', name).shape[1])).long()

    def read_image(self, name, path):
        """The central square of a user's image file -> token ids (1, size) of a modality."""
        picture = squares(read_picture(path), self.size, 1, None)
        return torch.from_numpy(tokenize(name, picture, self.tokenizers.get(name))).long()

    def picture(self, name, raw):
        """One raw value as an RGB image (H, W, 3) uint8: enlarged pixels, or the text of a caption."""
        if name == 'caption':
            canvas = Image.new('RGB', (128, 128), 'white')
            ImageDraw.Draw(canvas).text((4, 2), '\n'.join(textwrap.wrap(raw, 20)), fill='black')
            return np.asarray(canvas)
        return enlarged(raw, self.size)

    def score(self, name, raw, split, index):
        """{metric: (n, 1, 2)}, numerators and denominators. Images: mean absolute difference of pixel values (of 255).
        Captions: intersection over union of the words, and whether the captions are equal."""
        truth = self.truth(split, name, index)
        if name != 'caption':
            return pixel_error(truth, raw)
        bags = [(Counter(a.lower().split()), Counter(b.lower().split())) for a, b in zip(truth, raw)]
        return dict(words=np.array([[[(a & b).total(), (a | b).total()]] for a, b in bags], float),
                    exact=np.array([[[a == b, 1]] for a, b in bags], float))

    def baseline(self, name, split, index):
        """Raw values of the constant predictor: the mean of the training images, their most frequent caption."""
        raw = self.truth('train', name, slice(2000))
        if name == 'caption':
            return [Counter(raw).most_common(1)[0][0]] * len(index)
        return np.repeat(raw.mean(0)[None], len(index), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Making the data set

def check(settings):
    """Raises UserError for settings of `make` that are too small, before images are read."""
    for name, least in dict(steps=1, caption_tokens=2, vocab_size=257).items():
        if settings[name] < least:
            raise UserError(f'{name}={settings[name]}: must be at least {least}')


def make(folder, splits, settings):
    """Writes a data folder from images with captions, {split: (images (n, views, H, H, 3), captions)}."""
    arrays.begin(folder, 'folder')
    train, texts = splits['train']
    encoding = train_bpe(texts, settings['vocab_size'])
    texts = {split: [shorten(text, encoding, settings['caption_tokens']) for text in some]
             for split, (_, some) in splits.items()}
    if cut := sum(len(a) > len(b) for split, some in texts.items() for a, b in zip(splits[split][1], some)):
        print(f'{cut} captions are cut to --caption_tokens={settings["caption_tokens"]}')
    L = 1 + max(len(encoding.encode_ordinary(text)) for some in texts.values() for text in some)
    tokenizers = {name: train_tokenizer(name, train, settings['steps'], settings['seed']) for name in TOKENIZED}
    for split, (images, _) in splits.items():
        arrays.write(folder / split, dict(raw_rgb=images, caption=encode_rows(encoding, texts[split], L)))
        for name in MAKE:
            tokens = tokenize(name, images.reshape(-1, *images.shape[2:]), tokenizers.get(name))
            arrays.write(folder / split, {name: tokens.reshape(*images.shape[:2], -1)})
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / f'{name}.pt')
    save_encoding(folder / 'caption.json', encoding)
    dataset = Dataset(folder)
    rebuilt = {name: dataset.decode(name, torch.from_numpy(dataset.load('val', name).astype(np.int64)))
               for name in MAKE}
    quality = {name: float(dataset.score(name, raw, 'val', slice(None))['error'][..., 0].mean())
               for name, raw in rebuilt.items()}
    print('mean error after tokenizing, of 255: ' + ', '.join(f'{name} {error:.1f}' for name, error in quality.items()))
    vocabularies = {name: 4096 for name in MAKE} | dict(rgb=65536, tokens=65536, image=256)
    facts = dict(modalities=' '.join([*map(entry, MAKE), f'caption:{encoding.n_vocab}:{L}']), vocab_size=65536,
                 levels=TOKENIZED['rgb'][2], grid=f'{SIDE}x{SIDE}', block_size=SIDE * SIDE - 1, n_classes=0,
                 image_size=train.shape[2], channels=3)  # other chapters: rgb's tokens, or pixels
    meta = dict(kind='rows', prepare='folder', fields=vocabularies | dict(caption=encoding.n_vocab), config=facts,
                views=dict.fromkeys(vocabularies, train.shape[1]), files=dict(tokens='rgb', image='raw_rgb'),
                quality=quality, settings=settings)
    arrays.save_meta(folder, meta)


@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    source, folder, size, views = Path(settings['source']), Path(settings['out']), settings['size'], settings['views']
    if not settings['source'] or not source.is_dir():
        raise UserError(f'--source={settings["source"]}: name a folder with images, NAME.jpg, and their captions, '
                        'NAME.txt')
    if size % SIDE:
        raise UserError(f'size={size} must be a multiple of {SIDE}')
    check(settings)
    if (folder / 'meta.json').is_file():
        raise UserError(f'{folder} exists already: delete it, or choose another --out')
    pictures, captions = read_folder(source, size, views, np.random.default_rng((settings['seed'], 1)))
    order = np.random.default_rng((settings['seed'], 0)).permutation(len(pictures))
    n_val = max(1, len(order) // 10)
    splits = dict(val=order[:n_val], train=order[n_val:])
    make(folder, {split: (pictures[ids], [captions[i] for i in ids]) for split, ids in splits.items()}, settings)


if __name__ == '__main__':
    config.run(main)
