"""
Picture files of any kind: one way to read them, for all data sets and for the user's own.
"""
import numpy as np
from PIL import Image, ImageOps

from config import UserError


def read_picture(path):
    """A picture file as an upright RGB Image, whatever its mode: 16-bit values are brought to 0..255, transparent parts become
    white, cameras' rotation (EXIF) is undone. Raises UserError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(('I', 'F')):  # 16 bits and more
                values = np.asarray(image, np.float32)
                image = Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype(np.uint8))
            if 'A' in image.mode or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except FileNotFoundError:
        raise UserError(f'{path}: no such picture')
    except Exception as error:  # Pillow fails in many ways
        raise UserError(f'{path}: truncated, too large or not a picture that Pillow can read ({type(error).__name__}: {error})')


def read_square(path, best):
    """read_picture for what has to be square; `best` is the side that the message recommends. Raises UserError."""
    image = read_picture(path)
    if image.width != image.height:
        raise UserError(f'{path}: {image.width}x{image.height} pixels; give a square picture ({best}x{best} is best)')
    return image
