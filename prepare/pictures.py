"""
Image files, and modalities that are functions of an image, for all data sets and for your own images. To add a
modality, write a function of images and add it to TOKENIZED or COLORS.
"""
import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from tqdm import tqdm

from config import UserError
from engine.optimizers import fit
from prepare.image_tokenizers import Config, ImageTokenizer, from_network, reconstruction_loss, to_network

SIDE = 8  # tokens per side of an image; pixels per side in low resolution
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif', '.jfif')  # of files
LUMINANCE = np.array((0.299, 0.587, 0.114), np.float32)  # of red, green and blue (ITU-R BT.601)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_picture(path, background='white'):
    """Reads an image file of any mode as an RGB Image: values of more than 8 bits are scaled to 0..255 by `top`, the
    background is seen through transparent parts, the rotation by a camera (EXIF) is undone. Raises UserError."""
    try:
        with Image.open(path) as file:
            tags, image = getattr(file, 'tag_v2', {}), ImageOps.exif_transpose(file)  # tags of a TIFF
            if image.mode.startswith(('I', 'F')):  # more than 8 bits
                values = np.asarray(image, np.float32)
                white = top(values.max(), image.mode, tags.get(BITSPERSAMPLE, [16])[0])
                if not np.isfinite(values).all() or values.min() < -0.01 * white:
                    raise ValueError('holds values that are not finite, or negative')
                if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # the value 0 is white
                    values = white - values
                clear = values == image.info.get('transparency', np.nan)  # of 16-bit grey: one value
                image = Image.fromarray(np.round(values * (255 / white)).clip(0, 255).astype(np.uint8))
                image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
            if 'A' in image.mode or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, background), image)
            return image.convert('RGB')
    except FileNotFoundError:
        raise UserError(f'{path}: no such image')
    except IsADirectoryError:
        raise UserError(f'{path}: a folder; name an image in it')
    except Exception as error:  # Pillow fails in many ways
        raise UserError(f'{path}: truncated, too large or not an image that Pillow can read ({type(error).__name__}: '
                        f'{error})')


def top(largest, mode, bits):
    """The value that is white: 4,095 of 12 bits, 65,535 of 16; of real numbers and of 32 bits one of several, as the
    largest value tells, which may be 1% larger by rounding. Not the largest value itself: a dark picture stays dark."""
    ranges = dict(F=(1, 255, 65535), I=(255, 65535, 2 ** 31)).get(mode, (2 ** bits - 1,))
    return next((value for value in ranges if largest <= 1.01 * value), largest)


def read_square(path, best, background='white'):
    """read_picture for an image that must be square; `best` is the recommended side in the error message. Raises
    UserError."""
    image = read_picture(path, background)
    if image.width != image.height:
        raise UserError(f'{path}: {image.width}x{image.height} pixels; give a square image ({best}x{best} is best)')
    return image


def squares(image, size, views, random):
    """(views, size, size, 3), without the 3 if it is grey: the central square, then random squares of at least 0.8 of
    its side."""
    pictures = []
    for view in range(views):
        side = min(image.size) * (random.uniform(0.8, 1) if view else 1)
        left, top = (np.array(image.size) - side) * (random.uniform(size=2) if view else 0.5)
        box = left, top, min(left + side, image.width), min(top + side, image.height)
        pictures.append(np.asarray(image.resize((size, size), Image.BICUBIC, box)))
    return np.stack(pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Modalities: images (n, H, W, 3) uint8 -> uint8

def grey(rgb):
    """(n, H, W, 1): luminance."""
    return np.round(rgb @ LUMINANCE).astype(np.uint8)[..., None]


def edges(rgb):
    """(n, H, W, 1): length of the gradient of the luminance by Sobel filters, 255 from 816 on; at a vertical or
    horizontal border of black and white it is 1,020."""
    g = np.pad(grey(rgb)[..., 0].astype(np.float32), ((0, 0), (1, 1), (1, 1)), 'edge')
    across, down = g[:, :, 2:] - g[:, :, :-2], g[:, 2:] - g[:, :-2]  # (n, H + 2, W), (n, H, W + 2)
    dx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    dy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return (np.hypot(dx, dy) / 3.2).clip(0, 255).astype(np.uint8)[..., None]


def palette(rgb, colors=5):
    """(n, 1, 5, 3): colors of each image by median cut, the most frequent first; repeated if there are fewer."""
    rows = []
    for picture in rgb:
        image = Image.fromarray(picture).quantize(colors)
        table = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        rows.append(np.resize(table[[i for _, i in sorted(image.getcolors(), reverse=True)]], (1, colors, 3)))
    return np.stack(rows)


def low(rgb):
    """(n, 8, 8, 3): means over square blocks."""
    n, H, W, _ = rgb.shape
    return np.round(rgb.reshape(n, SIDE, H // SIDE, SIDE, W // SIDE, 3).mean((2, 4))).astype(np.uint8)


TOKENIZED = dict(rgb=(lambda rgb: rgb, 3, '16*16*16*16'), grey=(grey, 1, '8*8*8*8'), edges=(edges, 1, '8*8*8*8'))
COLORS = dict(palette=(palette, '1x5'), low=(low, f'{SIDE}x{SIDE}'))  # one token per pixel: four bits per channel
MAKE = {name: spec[0] for name, spec in (TOKENIZED | COLORS).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Their tokens

def color_tokens(pixels):
    """(n, h, w, 3) uint8 -> ids (n, h * w) of the levels 16*16*16."""
    return ((pixels >> 4).astype(np.int32) @ [256, 16, 1]).reshape(len(pixels), -1)


def token_colors(ids, shape):
    """The inverse of color_tokens: ids (n, h * w) -> (n, *shape, 3) uint8."""
    return (17 * np.stack((ids >> 8, ids >> 4 & 15, ids & 15), -1)).astype(np.uint8).reshape(len(ids), *shape, 3)


def train_tokenizer(name, rgb, steps, seed=0, batch_size=64):
    """Trains an image tokenizer for one modality of images (n, views, H, H, 3)."""
    make, channels, levels = TOKENIZED[name]
    torch.manual_seed(seed)
    random, size = np.random.default_rng((seed, 5)), rgb.shape[2]

    def batch_of():
        pictures = rgb[random.integers(0, len(rgb), batch_size), random.integers(0, rgb.shape[1], batch_size)]
        return to_network('rgb', make(pictures)), torch.ones(batch_size, size, size)
    model = ImageTokenizer(Config(size=size, patch=size // SIDE, channels=channels, levels=levels))
    return fit(model, reconstruction_loss, batch_of, steps, name)


def to_tokens(name, raw, tokenizer=None):
    """Images of one modality (n, h, w, 1 or 3) uint8 -> ids (n, size)."""
    return color_tokens(raw) if name in COLORS else tokenizer.encode(to_network('rgb', raw)).int().numpy()


def from_tokens(name, ids, tokenizer=None):
    """The inverse of to_tokens: ids (n, size) -> (n, h, w, 1 or 3) uint8."""
    if name in COLORS:
        return token_colors(ids.cpu().numpy(), [int(n) for n in COLORS[name][1].split('x')])
    return np.concatenate([from_network('rgb', tokenizer.decode(part)) for part in ids.cpu().split(100)])


def tokenize(name, rgb, tokenizer=None):
    """Ids (n, size) of one modality of images (n, H, H, 3)."""
    starts = tqdm(range(0, len(rgb), 100), f'encode {name}', unit='x100', leave=False, disable=len(rgb) <= 100)
    return np.concatenate([to_tokens(name, MAKE[name](rgb[i:i + 100]), tokenizer) for i in starts])


def entry(name):
    """The entry of a modality in Config.modalities of chapter 3."""
    return f'{name}:16*16*16:{COLORS[name][1]}' if name in COLORS else f'{name}:{TOKENIZED[name][2]}:{SIDE}x{SIDE}'


def enlarged(raw, side):
    """A modality (h, w, 1 or 3) of one image as an RGB image (side, side, 3)."""
    rows, columns = (np.arange(side) * n // side for n in raw.shape[:2])
    return np.repeat(raw[rows][:, columns], 3 // raw.shape[-1], -1)


def pixel_error(truth, found):
    """Mean absolute difference of pixel values, of 255: {metric: (n, 1, 2)}, numerators and denominators."""
    error = np.abs(truth.astype(np.float32) - found).mean((1, 2, 3))
    return dict(error=np.stack((error, np.ones(len(error))), -1)[:, None])
