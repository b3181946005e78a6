"""
Numbers that describe a scene, as modalities of the data set `scenes`: a short text, one token per "column=value".

    boxes     "shape=cube left=3 top=20 right=17 bottom=33 shape=sphere left=..."   from left to right
    metadata  "objects=3 cover=27 depth=98 light=52 elevation=36"
    layout    "y0=30 y1=33 ... y5=36 cb0=31 cb1=32 cb2=32 cr0=33 cr1=30 cr2=32"     a global image feature

A table of integers (n, K, columns) is measured from the raw arrays of n scenes and written row by row, as 4M-21
(2406.09406) does with boxes and metadata. To add a modality, write the function that measures it and add its columns
to NUMBERS.
"""
import re
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from prepare.pictures import LUMINANCE, SIDE, low
from prepare.scenes_render import COLORS, SHAPES

BINS = 64  # of a coordinate, for any image size
# from RGB; the range of each channel is 256
YCBCR = np.stack((LUMINANCE, ((0, 0, 1) - LUMINANCE) / 1.772, ((1, 0, 0) - LUMINANCE) / 1.402), 1)
LAYOUT = dict(y=6, cb=3, cr=3)  # number of the lowest frequencies kept: (channel, frequency down, frequency across)
CHANNEL, DOWN, ACROSS = np.array([(c, *place) for c, many in enumerate(LAYOUT.values())
                                  for place in ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2))[:many]]).T
STEP = np.array([32] + 11 * [8])  # quantization step
# the cosine transform (frequency, position)
WAVES = np.cos(np.pi / SIDE * np.arange(SIDE)[:, None] * (np.arange(SIDE) + 0.5)) * (2 / SIDE) ** 0.5
WAVES[0] /= 2 ** 0.5  # orthonormal


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: raw arrays {rgb, depth, normal, instance, segmentation, objects} of n scenes -> (n, K, columns)

def boxes(raw):
    """The shape and the bounding box of each object; -1 if there is none."""
    shape, size = raw['objects'][..., :1], raw['instance'].shape[1]
    seen = raw['instance'][:, None] == np.arange(1, 1 + shape.shape[1])[:, None, None]  # (n, K, H, W)
    columns, rows = seen.any(2), seen.any(3)
    ends = [columns.argmax(-1), rows.argmax(-1),
            size - 1 - columns[..., ::-1].argmax(-1), size - 1 - rows[..., ::-1].argmax(-1)]
    return np.where(shape < 0, -1, np.concatenate((shape, np.stack(ends, -1) * BINS // size), -1))


def metadata(raw):
    """Number of objects; percent of the pixels that they cover; mean depth in tenths; mean brightness in percent;
    elevation of the camera in degrees, from the ground's normal in the camera's frame."""
    up = (raw['normal'] * (raw['instance'] == 0)[..., None]).sum((1, 2), dtype=float)  # (n, 3)
    columns = [(raw['objects'][..., 0] >= 0).sum(1), 100 * (raw['instance'] > 0).mean((1, 2)),
               10 * raw['depth'].mean((1, 2), dtype=np.float32), raw['rgb'].mean((1, 2, 3)) / 2.55,
               np.degrees(np.arctan2(up[:, 2], up[:, 1]))]
    return np.round(np.stack(columns, -1))[:, None].astype(int)  # (n, 1, 5)


def layout(raw):
    """MPEG-7's color layout descriptor (Manjunath et al., "Color and Texture Descriptors", 2001), a global feature for
    image search: the lowest frequencies (cosine transform) of the image in 8x8 pixels, six of luminance, three of each
    color difference. Zero is stored as 32."""
    found = np.einsum('fi,nijc,gj->ncfg', WAVES, low(raw['rgb']) @ YCBCR - (128, 0, 0), WAVES)
    return np.round(32 + found[:, CHANNEL, DOWN, ACROSS] / STEP).clip(0, 63)[:, None].astype(int)  # (n, 1, 12)


def from_layout(numbers):
    """The inverse of layout: twelve numbers -> the image (8, 8, 3) without other frequencies."""
    found = np.zeros((3, SIDE, SIDE))
    found[CHANNEL, DOWN, ACROSS] = (numbers - 32) * STEP
    pixels = np.einsum('fi,cfg,gj->ijc', WAVES, found, WAVES) + (128, 0, 0)
    return (pixels @ np.linalg.inv(YCBCR)).round().clip(0, 255).astype(np.uint8)


NUMBERS = dict(  # the function that measures it; number of values of each column
    boxes=(boxes, dict(shape=len(SHAPES), left=BINS, top=BINS, right=BINS, bottom=BINS)),
    metadata=(metadata, dict(objects=11, cover=101, depth=201, light=101, elevation=91)),
    layout=(layout, {f'{part}{i}': 64 for part, many in LAYOUT.items() for i in range(many)}))


# ---------------------------------------------------------------------------------------------------------------------
# Tables as texts

def word(column, value):
    return f'{column}={SHAPES[value] if column == "shape" else value}'


def words(name):
    """The closed vocabulary; only the first word of a text has no space before it."""
    columns = NUMBERS[name][1]
    first, *_ = columns
    found = [word(column, value) for column, many in columns.items() for value in range(many)]
    return [*(one for one in found if one.startswith(first)), *(f' {one}' for one in found)]


def to_text(name, table):
    """Table (K, columns) of a scene, a list -> text; rows that begin with -1 are left out."""
    return ' '.join(word(column, value) for row in table if row[0] >= 0 for column, value in zip(NUMBERS[name][1], row))


def read(name, text):
    """The inverse of to_text: text -> (K, columns); malformed rows are left out."""
    pattern = ' '.join(rf'{column}=({"|".join(SHAPES) if column == "shape" else "[0-9]+"})'
                       for column in NUMBERS[name][1])
    rows = [[SHAPES.index(value) if value in SHAPES else int(value) for value in row]
            for row in re.findall(pattern, text)]
    return np.array(rows, int).reshape(-1, len(NUMBERS[name][1]))


def middle(tables):
    """The constant predictor: the most frequent number of rows, and the median of each entry."""
    most = Counter(map(len, tables)).most_common(1)[0][0]
    return np.median([table for table in tables if len(table) == most], 0).astype(int)


def drawing(name, text, side):
    """Draws a text as an image (side, side, 3): boxes as frames, red for cubes, blue for spheres, green for cylinders;
    a layout as the blurred image that it encodes; other numbers as text, one per line."""
    for numbers in read('layout', text):
        return np.asarray(Image.fromarray(from_layout(numbers)).resize((side, side), Image.BICUBIC))
    canvas = Image.new('RGB', (side, side), (225, 225, 225))
    draw, scale, colors = ImageDraw.Draw(canvas), side / BINS, [COLORS[color] for color in ('red', 'blue', 'green')]
    if name != 'boxes':
        draw.text((2, 2), text.replace(' ', '\n'), fill='black', spacing=1)
    for shape, *ends in read('boxes', text):
        left, top, right, bottom = (end * scale for end in ends)
        draw.rectangle((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), outline=colors[shape],
                       width=max(1, side // BINS))
    return np.asarray(canvas)
