"""
The parser: predicts the objects of a scene from an image, to score generated images.

Objects are points (CenterNet, Zhou et al., 1904.07850): for each cell of a grid, four pixels wide, a small Transformer
predicts whether an object's centre is in it, and the object's shape, color, material and size. It is trained on
rendered images only, independently of tokenizers and models. Its accuracy on held-out renders is the ceiling of every
score.

    python -m prepare.scenes_parser    (trains the same network on rgb tokens instead of pixels: what the tokens encode)
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
from config import UserError
from engine.checkpoints import load_network, save
from engine.optimizers import fit
from gpt import rms_norm, rope_cos_sin
from prepare.arrays import load
from prepare.image_tokenizers import Block, Config, ImageTokenizer, ids_to_digits, to_network

SETTINGS = dict(
    data='data/scenes',  # the scenes
    steps=2000,          # of the probe's training
    seed=0,
)
PATCH, CELL = 8, 4                                    # pixels per side: of a patch, of a cell for a centre
CLASSES = dict(shape=3, color=8, material=2, size=2)  # the first columns of raw_objects
RADIUS = 2.0                                          # pixels: standard deviation of the target around a centre


class Parser(nn.Module):
    """Predicts objects from an image of `size` pixels per side, given as patches of `inputs` values each."""
    def __init__(self, size, inputs=3 * PATCH ** 2, n_embd=128, n_layer=4):
        super().__init__()
        self.size, side = size, size // PATCH
        outputs = 3 + sum(CLASSES.values())  # a centre's logit, its offset in x and y, classes
        self.patch_embedding = nn.Linear(inputs, n_embd)
        self.blocks = nn.ModuleList(Block(Config(n_embd=n_embd, n_head=4)) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, outputs * (PATCH // CELL) ** 2)
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        self.register_buffer('rope', torch.stack(rope_cos_sin(grid, n_embd // 4, rope_base=100)), persistent=False)

    def forward(self, patches):
        """Patches (B, N, inputs) -> (B, outputs, H / 4, W / 4)."""
        x = self.patch_embedding(patches)  # (B, N, D)
        for block in self.blocks:
            x = block(x, self.rope)
        side = self.size // PATCH
        x = self.head(rms_norm(x)).float().transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(x, PATCH // CELL)

    @torch.no_grad()
    def read(self, rgb, threshold=0.3):
        """Images (n, H, W, 3) uint8 -> a list of n arrays (objects, 6): shape, color, material, size, x, y; left to
        right."""
        found = []
        for start in range(0, len(rgb), 100):
            out = self(pixel_patches(rgb[start:start + 100]))
            heat = out[:, 0].sigmoid()
            peak = (heat == F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]) & (heat > threshold)
            for image, peaks in zip(out, peak):
                rows, columns = peaks.nonzero(as_tuple=True)
                values = image[:, rows, columns]  # (outputs, objects)
                classes = [part.argmax(0) for part in values[3:].split(list(CLASSES.values()))]
                x, y = columns * CELL + CELL / 2 - 0.5 + values[1], rows * CELL + CELL / 2 - 0.5 + values[2]
                objects = torch.stack([*classes, x.round().long(), y.round().long()], -1)
                found.append(objects[x.argsort()].numpy())
        return found

    def save(self, path):
        save(path, dict(size=self.size, weights=self.state_dict()))

    @classmethod
    def load(cls, path):
        return load_network(path, lambda saved: cls(saved['size']), 'a parser', 'delete it to train it again')


def pixel_patches(rgb):
    """Images (n, H, W, 3) uint8 -> (n, N, 3 * PATCH ** 2)."""
    return F.pixel_unshuffle(to_network('rgb', rgb), PATCH).flatten(2).transpose(1, 2)


def token_patches(ids, levels):
    """Token ids (n, N) of an image tokenizer with these levels -> their digits, one-hot (n, N, sum of levels)."""
    digits = ids_to_digits(torch.from_numpy(ids.astype(np.int64)), levels).long().unbind(-1)
    return torch.cat([F.one_hot(digit, level).float() for digit, level in zip(digits, levels.int().tolist())], -1)


def targets(objects, size):
    """Objects (B, K, 6) -> heat (B, h, w), a Gaussian around each centre; offset (B, 2, h, w) and classes (B, 4, h, w)
    of the nearest object."""
    at = torch.arange(size // CELL, device=objects.device) * CELL + CELL / 2 - 0.5
    there = (objects[..., 0] >= 0)[..., None, None]
    dx = objects[..., 4, None, None] - at[None, None, None, :]  # (B, K, 1, w)
    dy = objects[..., 5, None, None] - at[None, None, :, None]
    distance = (dx ** 2 + dy ** 2).masked_fill(~there, 1e6)  # (B, K, h, w)
    nearest, index = distance.min(1)
    def of_nearest(values):
        return values.expand_as(distance).gather(1, index[:, None])[:, 0]  # (B, h, w)
    offset = torch.stack([of_nearest(d) for d in (dx, dy)], 1)
    classes = torch.stack([of_nearest(objects[..., i, None, None]) for i in range(4)], 1)
    return (-nearest / (2 * RADIUS ** 2)).exp(), offset, classes.clamp(min=0)


def parser_loss(parser, patches, objects):
    """Cross-entropy of the heat in all cells; near centres, cross-entropy of classes and squared error of offsets."""
    out = parser(patches)
    heat, offset, classes = targets(objects, parser.size)
    loss = 20 * F.binary_cross_entropy_with_logits(out[:, 0], heat)
    near = heat / heat.sum()
    loss = loss + 0.1 * (near * (out[:, 1:3] - offset).square().sum(1)).sum()
    for logits, truth in zip(out[:, 3:].split(list(CLASSES.values()), 1), classes.unbind(1)):
        loss = loss + (near * F.cross_entropy(logits, truth, reduction='none')).sum()
    return loss


def train_parser(folder, parser, field, patches_of, seed=0, steps=500, batch_size=64, device='auto'):
    """Trains a parser on a field of a data folder's training split, read as patches_of(rows of the field)."""
    random = np.random.default_rng((seed, 6))
    rows, objects = (load(folder / 'train' / f'{name}.npy') for name in (field, 'raw_objects'))

    def batch_of():
        ids = random.integers(0, len(rows), batch_size)
        return patches_of(rows[ids]), torch.from_numpy(objects[ids].astype(np.int64))
    return fit(parser, parser_loss, batch_of, steps, f'parser of {field}', device=device)


def load_or_train(folder, size, device):
    """The parser of a data folder, trained on the first call and kept there. In a folder that is read-only it is
    trained again by each program."""
    path = folder / 'parser.pt'
    if path.is_file():
        return Parser.load(path)
    torch.manual_seed(0)
    parser = train_parser(folder, Parser(size), 'raw_rgb', pixel_patches, device=device)
    try:
        parser.save(path)
    except UserError:
        print(f'{path}: cannot be written, so the next program trains the parser again; make the folder writable once')
    return parser


@torch.no_grad()
def accuracy(parser, folder, field, patches_of):
    """Fraction of the objects of a split whose shape, color, material and size are predicted correctly at their
    centre."""
    rows, objects = (load(folder / f'{name}.npy') for name in (field, 'raw_objects'))
    right = []
    for start in range(0, len(rows), 100):
        truth = torch.from_numpy(objects[start:start + 100].astype(np.int64))
        scene, slot = (truth[..., 0] >= 0).nonzero(as_tuple=True)
        truth = truth[scene, slot]  # (objects, 6)
        x, y = (truth[:, 4:] // CELL).clamp(0, parser.size // CELL - 1).unbind(1)
        logits = parser(patches_of(rows[start:start + 100]))[scene, 3:, y, x].split(list(CLASSES.values()), 1)
        right.append(torch.stack([part.argmax(1) for part in logits], 1) == truth[:, :4])
    right = torch.cat(right)
    return dict(zip(CLASSES, right.float().mean(0).tolist())) | {'all four': right.all(1).float().mean().item()}


def main(*arguments, **overrides):
    """Prints the accuracy of a probe for shape, color, material and size from rgb tokens, and from pixels."""
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    folder = Path(settings['data'])
    tokenizer = ImageTokenizer.load(folder / 'rgb.pt')
    size, levels = tokenizer.config.size, tokenizer.levels
    for field, inputs, patches_of in (('rgb', int(levels.sum()), lambda ids: token_patches(ids, levels)),
                                      ('raw_rgb', 3 * PATCH ** 2, pixel_patches)):
        torch.manual_seed(settings['seed'])
        parser = train_parser(folder, Parser(size, inputs), field, patches_of, settings['seed'], settings['steps'])
        found = accuracy(parser, folder / 'val', field, patches_of)
        print(f'read from {dict(rgb="rgb tokens", raw_rgb="pixels")[field]} after {settings["steps"]} steps: '
              + ', '.join(f'{name} {fraction:.1%}' for name, fraction in found.items()))


if __name__ == '__main__':
    config.run(main)
