"""
Points in the plane with a known distribution: what a generative model has learned can be plotted and measured exactly.

    python -m prepare.toy2d                                        eight Gaussians on a circle, in data/toy2d
    python -m prepare.toy2d --name=moons --out=data/moons          also checkerboard, spirals

`point` holds (n, 2) float32. Eight Gaussians and the checkerboard have a density in closed form; moons and spirals
have none here. All four have a variance of 0.86 to 1.27 on each axis, near that of the noise from which they are
generated, 1.
"""
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import config
from config import UserError
from prepare.arrays import begin, save_meta, write
from prepare.files import making

MAKES = 'data/toy2d'
SETTINGS = dict(
    name='gaussians',                # gaussians, checkerboard, moons or spirals
    n_train=200_000, n_val=20_000,  # points
    seed=0,
    out=MAKES,                       # the data folder
)
RADIUS, WIDTH = 1.4, 0.1  # of the eight Gaussians
EXTENT = 2.4              # images show -EXTENT .. EXTENT


# ---------------------------------------------------------------------------------------------------------------------
# The distributions: samples (n, 2)

def gaussians(n, random):
    return centres()[random.integers(0, 8, n)] + WIDTH * random.normal(size=(n, 2))


def centres():
    angle = np.arange(8) * math.pi / 4
    return RADIUS * np.stack((np.cos(angle), np.sin(angle)), -1)  # (8, 2)


def checkerboard(n, random):
    """Every second one of 4 x 4 squares with sides of 0.9."""
    column, row = random.integers(0, 4, n), random.integers(0, 2, n)
    corner = np.stack((column, 2 * row + column % 2), -1) - 2
    return 0.9 * (corner + random.random((n, 2)))


def moons(n, random):
    upper, angle = random.integers(0, 2, n), math.pi * random.random(n)
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return 1.3 * np.stack((x, 1.5 * y), -1) + 0.07 * random.normal(size=(n, 2))


def spirals(n, random):
    side, angle = 2 * random.integers(0, 2, n) - 1, 3 * math.pi * np.sqrt(random.random(n))
    points = (0.2 * side * angle)[:, None] * np.stack((np.cos(angle), np.sin(angle)), -1)
    return points + 0.05 * random.normal(size=(n, 2))


DRAW = dict(gaussians=gaussians, checkerboard=checkerboard, moons=moons, spirals=spirals)


def log_density(name, points):
    """ln p in nats of points (n, 2), -inf outside of the support; None if unknown."""
    if name == 'gaussians':
        square = ((points[:, None] - centres()) ** 2).sum(-1) / WIDTH ** 2  # (n, 8)
        least = square.min(1)
        return np.log(np.exp((least[:, None] - square) / 2).mean(1)) - least / 2 - math.log(2 * math.pi * WIDTH ** 2)
    if name == 'checkerboard':
        column, row = np.floor(points / 0.9 + 2).T
        inside = (np.minimum(column, row) >= 0) & (np.maximum(column, row) < 4) & ((row - column) % 2 == 0)
        return np.where(inside, -math.log(8 * 0.9 ** 2), -np.inf)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def assignment(cost):
    """For each row of cost (n, n), its column in the optimal assignment. Rows are added one by one, each along the
    shortest augmenting path (Jonker & Volgenant, 1987). u, v are dual variables: cost - u - v >= 0, 0 if assigned."""
    n = len(cost)
    row_of, u, v = np.full(n, -1), np.zeros(n), np.zeros(n)
    for start in range(n):
        slack, before, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, column, path = start, -1, []
        while row >= 0:
            new = cost[row] - u[row] - v
            nearer = ~done & (new < slack)
            slack[nearer], before[nearer] = new[nearer], column
            column = int(np.where(done, np.inf, slack).argmin())
            least = slack[column]
            u[[start, *row_of[path]]] += least
            v[path] -= least
            slack[~done] -= least
            done[column], row = True, row_of[column]
            path.append(column)
        while column >= 0:  # augment along the path back to the added row
            row_of[column] = row_of[before[column]] if before[column] >= 0 else start
            column = before[column]
    return np.argsort(row_of)


def wasserstein(a, b):
    """Exact 2-Wasserstein distance of two sets of n points (n, 2)."""
    cost = ((a[:, None].astype(float) - b) ** 2).sum(-1)
    return math.sqrt(cost[np.arange(len(a)), assignment(cost)].mean())


# ---------------------------------------------------------------------------------------------------------------------
# The data set in use

class Dataset:
    """Samples, plots and scores points of a data folder's distribution."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.name = json.loads((self.folder / 'meta.json').read_text(encoding='utf-8'))['settings']['name']

    def fresh(self, n, seed):
        """n new samples (n, 2) float32."""
        return DRAW[self.name](n, np.random.default_rng((seed, 9))).astype(np.float32)

    def log_density(self, points):
        return log_density(self.name, points)

    def score(self, points, pairs=20):
        """Split points (n, 2) into `pairs` parts: the Wasserstein-2 distance (pairs,) of each from new samples. It
        depends on the size of the parts: compare with the distance between two sets of samples."""
        pairs = min(pairs, len(points))
        reals = np.array_split(self.fresh(len(points), 1), pairs)
        return np.array([wasserstein(a, b) for a, b in zip(np.array_split(points, pairs), reals)])

    @staticmethod
    def grid(side):
        """The centres (side * side, 2) of an image's pixels, from the upper left."""
        line = (np.arange(side) + 0.5) / side * 2 * EXTENT - EXTENT
        return np.stack(np.meshgrid(line, -line), -1).reshape(-1, 2).astype(np.float32)

    @staticmethod
    def heat(density, top):
        """Densities (side, side) as an image (side, side, 3) uint8, from white at 0 to dark blue at `top`."""
        darkness = (density / top).clip(0, 1)[..., None] ** 0.7
        return (255 - darkness * (255 - np.array([16, 40, 130]))).astype(np.uint8)

    @staticmethod
    def scatter(points, side):
        """Points (n, 2) as an image (side, side, 3) uint8: a pixel with more points is darker."""
        histogram = np.histogram2d(-points[:, 1], points[:, 0], side, [[-EXTENT, EXTENT]] * 2)[0]
        return (255 - (1 - 0.5 ** histogram[..., None]) * (255 - np.array([16, 40, 130]))).astype(np.uint8)

    @staticmethod
    def arrows(points, velocity, side):
        """Arrows at points (n, 2) along a velocity (n, 2), as an image (side, side, 3), a dot at the start."""
        canvas = Image.new('RGB', (4 * side, 4 * side), 'white')
        draw, scale = ImageDraw.Draw(canvas), 2 * side / EXTENT
        for (x, y), (dx, dy) in zip(points * [1, -1] * scale + 2 * side, velocity * [1, -1] * 0.12 * scale):
            draw.line((x, y, x + dx, y + dy), fill=(16, 40, 130), width=3)
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(16, 40, 130))
        return np.asarray(canvas.resize((side, side), Image.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------------
# The command

@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if settings['name'] not in DRAW:
        raise UserError(f'name={settings["name"]!r}: choose one of {", ".join(DRAW)}')
    folder = Path(settings['out'])
    begin(folder, 'toy2d')
    for i, split in enumerate(('train', 'val')):
        points = DRAW[settings['name']](settings[f'n_{split}'], np.random.default_rng((settings['seed'], i)))
        write(folder / split, dict(point=points.astype(np.float32)))
    meta = dict(kind='rows', fields=dict(point=0), config=dict(image_size=0, channels=2, n_classes=0), prepare='toy2d',
                settings=settings)
    save_meta(folder, meta)


if __name__ == '__main__':
    config.run(main)
