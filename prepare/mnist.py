"""
MNIST as images and as tokens: 28x28 handwritten digits, and the same in 14x14 binary pixels, one token per 2x2 patch.

    python -m prepare.mnist                            60,000 digits to train on, 10,000 for validation
    python -m prepare.mnist --subset=t10k --views=8    only the small files: 9,000 and 1,000, for slow connections
    python -m prepare.fashion_mnist                    clothes instead of digits (Xiao et al., 1708.07747)

A row of tokens is the class (0..9), then 49 patches in raster order: 10 + the four bits of the patch, also in raster
order, the first the most significant. The vocabulary has 26 tokens. Training rows have --views views: view 0 is the
image itself, the others are cropped and resized at random. They help if there are few images; with all 60,000, whose
likelihood crops do not have, they cost 0.01 nats per token. Beside the tokens the folder contains image.npy (n, 28,
28), label.npy (n,) and two evaluation classifiers (prepare/judge.py), one per representation. The files (LeCun et al.,
1998) are downloaded once into the cache folder.
"""
import gzip
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from prepare import arrays, judge
from prepare.download import download
from prepare.files import making
from prepare.pictures import read_square

MAKES = 'data/mnist'
SETTINGS = dict(
    subset='',      # 't10k': the small files alone, 9,000 digits to train on
    fashion=False,  # FashionMNIST's clothes
    views=1,        # of each training image: the image itself, then random crops
    seed=0,
    out='',         # the data folder; '' is data/mnist or data/fashion_mnist
)
MNIST = 'https://ossci-datasets.s3.amazonaws.com/mnist/'
FASHION = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/'
MD5 = {  # of the decompressed contents: mirrors compress them again
    'train-images-idx3-ubyte.gz': '6bbc9ace898e44ae57da46a324031adb',
    'train-labels-idx1-ubyte.gz': 'a25bea736e30d166cdddb491f175f624',
    't10k-images-idx3-ubyte.gz': '2646ac647ad5339dbf082846283269ea',
    't10k-labels-idx1-ubyte.gz': '27ae3e4e09519cfbb04c329615203637',
    'fashion/train-images-idx3-ubyte.gz': 'f4a8712d7a061bf5bd6d2ca38dc4d50a',
    'fashion/train-labels-idx1-ubyte.gz': '9018921c3c673c538a1fc5bad174d6f9',
    'fashion/t10k-images-idx3-ubyte.gz': '8181f5470baa50b63fa0f6fddb340f0a',
    'fashion/t10k-labels-idx1-ubyte.gz': '15d484375f8d13e6eb1aabb0c3f46965'}
CLASSES = dict(mnist=list('0123456789'),
               fashion_mnist='t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot'.split())
JUDGES = {28: 'grey', 14: 'binary'}  # the two representations, by pixels per side


# ---------------------------------------------------------------------------------------------------------------------
# The files

def read_idx(path, md5):
    """A gzipped idx file of bytes: two zeros, the type (8), the number of axes, their lengths as big-endian int32, the
    values. Raises UserError if its contents have another md5."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f'{path}: truncated or not a gzip file ({type(error).__name__}); delete it and run this again')
    if (found := hashlib.md5(data).hexdigest()) != md5:
        raise UserError(f'{path}: the md5 of its decompressed contents is {found}, expected {md5}; delete it and run '
                        'this again, or copy the right file there')
    shape = np.frombuffer(data, '>u4', data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_part(part, fashion):
    """Images (n, 28, 28) and labels (n,) of 'train' or 't10k'; FashionMNIST's files have the names of MNIST's."""
    url, prefix = (FASHION, 'fashion/') if fashion else (MNIST, '')
    names = f'{part}-images-idx3-ubyte.gz', f'{part}-labels-idx1-ubyte.gz'
    return [read_idx(download(url + name, prefix + name), MD5[prefix + name]) for name in names]


def read_splits(settings):
    """{'train': (images, labels), 'val': (images, labels)}"""
    if settings['subset'] == 't10k':  # its halves have different writers: shuffled
        images, labels = read_part('t10k', settings['fashion'])
        order = np.random.default_rng((settings['seed'], 0)).permutation(len(images))
        cut = len(order) * 9 // 10
        return {split: (images[ids], labels[ids]) for split, ids in (('train', order[:cut]), ('val', order[cut:]))}
    try:
        return {'train': read_part('train', settings['fashion']), 'val': read_part('t10k', settings['fashion'])}
    except UserError as error:
        name = 'fashion_mnist' if settings['fashion'] else 'mnist'
        raise UserError(f'{error}; or make the small data set: python -m prepare.{name} --subset=t10k')


# ---------------------------------------------------------------------------------------------------------------------
# Images and tokens

def halve(images):
    """(n, 28, 28) -> (n, 14, 14) means of 2x2 pixels, float32."""
    return images.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)


def random_crops(images, random):
    """(n, 28, 28) -> (n, 14, 14): a random crop of 0.9 to 1 of the area with aspect ratio 0.9 to 1.1, resized to 28x28
    by bilinear interpolation and then halved, so that thin strokes are kept."""
    area, ratio = random.uniform(0.9, 1, len(images)), np.exp(random.uniform(math.log(0.9), math.log(1.1), len(images)))
    size = np.minimum(np.sqrt([area * ratio, area / ratio]), 1)  # (2, n) width and height as fractions of the image
    theta = np.zeros((len(images), 2, 3), np.float32)
    theta[:, [0, 1], [0, 1]] = size.T
    theta[:, :, 2] = (random.uniform(-1, 1, size.shape) * (1 - size)).T
    grid = F.affine_grid(torch.from_numpy(theta), (len(images), 1, 28, 28), align_corners=False)
    return halve(F.grid_sample(torch.tensor(images)[:, None].float(), grid, align_corners=False).numpy())


def binary(images):
    """(n, 28, 28) -> (n, 14, 14) uint8 of 0 and 255."""
    return np.where(halve(images) > 127.5, 255, 0).astype(np.uint8)


def to_tokens(images, labels):
    """Images (n, 14, 14) of values 0..255, white above 127.5, and labels (n,) -> (n, 50) uint8."""
    bits = (images > 127.5).reshape(-1, 7, 2, 7, 2).swapaxes(2, 3).reshape(-1, 49, 4)
    return np.column_stack((labels, 10 + bits @ [8, 4, 2, 1])).astype(np.uint8)


def to_images(tokens):
    """Tokens (n, 50), or (n, 49) without the class -> images (n, 14, 14) uint8 of 0 and 255. Tokens that are not
    patches, as untrained models generate, are black."""
    tokens = np.asarray(tokens)[:, -49:].astype(int)
    patches = np.where((tokens >= 10) & (tokens < 26), tokens - 10, 0)
    bits = patches[..., None] >> np.arange(3, -1, -1) & 1  # (n, 49, 4)
    return (255 * bits.reshape(-1, 7, 7, 2, 2).swapaxes(2, 3).reshape(-1, 14, 14)).astype(np.uint8)


def view_tokens(images, labels, views, random):
    """Images (n, 28, 28) -> tokens (n, views, 50): the image itself, then random crops."""
    return np.stack([to_tokens(random_crops(images, random) if view else halve(images), labels)
                     for view in range(views)], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and scoring, for sample.py and lab/

class Dataset:
    """Decodes and scores the tokens of a data folder. Images are (n, H, H) uint8: H = 14 binary, H = 28 grey."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.classes = json.loads((self.folder / 'meta.json').read_text(encoding='utf-8'))['classes']  # ten names

    def load(self, split, name):
        return arrays.load(self.folder / split / f'{name}.npy')

    def decode(self, tokens):
        """Tokens (n, 50) or (n, 49), on the CPU -> binary images (n, 14, 14), see to_images."""
        return to_images(tokens)

    @staticmethod
    def read_image(path):
        """A user's image file of a white digit on black or transparent -> tokens (1, 49). Raises UserError."""
        image = read_square(path, 28, 'black').convert('L').resize((28, 28), Image.BOX)
        return torch.from_numpy(to_tokens(halve(np.asarray(image)[None]), [0])[:, 1:]).long()

    @staticmethod
    def binary(images):
        """Grey images (n, 28, 28) -> binary images (n, 14, 14), as the tokens represent them."""
        return binary(images)

    def real(self, split, size, view=0):
        """The images (n, size, size) of a split."""
        return to_images(self.load(split, 'tokens')[:, view]) if size == 14 else self.load(split, 'image')

    def score(self, images, labels, split='val'):
        """judge.score of images (n, H, H) uint8 generated for labels (n,); H determines the classifier. Images beyond
        the size of the split are not scored, so that both sets have the same size. Raises ValueError if H is neither
        14 nor 28."""
        size, n = images.shape[1], min(len(images), len(self.load(split, 'label')))
        if size not in JUDGES:
            raise ValueError(f'images of {size} pixels per side: there are classifiers for {list(JUDGES)}')
        views = self.load('train', 'tokens').shape[1] if size == 14 else 1
        return judge.score(
            judge.Judge.load(self.folder / f'judge_{JUDGES[size]}.pt'), images[:n], np.asarray(labels)[:n],
            self.real(split, size)[:n], self.load(split, 'label')[:n],
            [self.real('train', size, view) for view in range(views)], self.load('train', 'label'))


# ---------------------------------------------------------------------------------------------------------------------
# Making the data set

@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if settings['subset'] not in ('', 't10k'):
        raise UserError(f'subset={settings["subset"]!r}: it is t10k or empty')
    kind = 'fashion_mnist' if settings['fashion'] else 'mnist'
    folder = Path(settings['out'] or f'data/{kind}')
    random = np.random.default_rng((settings['seed'], 1))
    splits = read_splits(settings)
    arrays.begin(folder, 'mnist')
    for split, (images, labels) in splits.items():
        views = settings['views'] if split == 'train' else 1
        parts = [view_tokens(images[i:i + 5000], labels[i:i + 5000], views, random)
                 for i in range(0, len(images), 5000)]
        arrays.write(folder / split, dict(tokens=np.concatenate(parts), image=images, label=labels))
    quality = {}
    for size, name in JUDGES.items():
        (images, labels), (held_out, truth) = ((x if size == 28 else binary(x), y) for x, y in splits.values())
        network = judge.train_judge(images, labels, settings['seed'])
        network.save(folder / f'judge_{name}.pt')
        quality[f'judge_{name}'] = float((network.logits(held_out).argmax(1) == truth).mean())
        print(f'evaluation classifier of {name} {size}x{size} images: {quality[f"judge_{name}"]:.1%} of {len(truth):,} '
              'held-out images right')
    facts = dict(vocab_size=26, block_size=49, grid='7x7', n_classes=10, image_size=28, channels=1)
    meta = dict(kind='rows', fields=dict(tokens=26, image=256, label=10), views=dict(tokens=settings['views']),
                config=facts, prepare='mnist', classes=CLASSES[kind], quality=quality, settings=settings)
    arrays.save_meta(folder, meta)


if __name__ == '__main__':
    config.run(main)
