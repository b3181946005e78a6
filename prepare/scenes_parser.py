"""
Reads the objects back from a picture of a scene: the independent judge of pictures that models of this repository draw.

Objects are points (CenterNet, Zhou et al., 1904.07850): on a grid of cells, four pixels wide, a small Transformer says where an
object's centre lies, and of which shape, colour, material and size it is there. It is trained on true renders alone, knows
nothing of any tokenizer or model, and its accuracy on held-out renders is the ceiling of every score that it gives.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import UserError
from gpt import norm, rotary
from prepare.image_tokenizers import Block, Config, fit, to_network

CELL = 4                                              # pixels
CLASSES = dict(shape=3, color=8, material=2, size=2)  # the first columns of raw_objects
RADIUS = 2.0                                          # pixels: how sharply a centre is to be located


class Parser(nn.Module):
    def __init__(self, size, n_embd=128, n_layer=4):
        super().__init__()
        self.size, self.patch = size, 8
        side, outputs = size // self.patch, 3 + sum(CLASSES.values())  # a centre's logit, its offset in x and y, classes
        config = Config(n_embd=n_embd, n_head=4)
        self.patch_embedding = nn.Linear(3 * self.patch ** 2, n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, outputs * (self.patch // CELL) ** 2)
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        self.register_buffer('turn', torch.stack(rotary(grid, n_embd // 4, theta=100)), persistent=False)

    def forward(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, outputs, H / 4, W / 4)."""
        x = self.patch_embedding(F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2))  # (B, N, D)
        for block in self.blocks:
            x = block(x, self.turn)
        side = self.size // self.patch
        x = self.head(norm(x)).float().transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(x, self.patch // CELL)

    @torch.no_grad()
    def read(self, rgb, threshold=0.3):
        """Pictures (n, H, W, 3) uint8 -> a list of n arrays (objects, 6): shape, color, material, size, x, y; left to right."""
        found = []
        for part in torch.from_numpy(np.ascontiguousarray(rgb)).split(100):
            out = self(to_network('rgb', part.numpy()))
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
        torch.save(dict(size=self.size, weights=self.state_dict()), path)

    @classmethod
    def load(cls, path):
        try:
            saved = torch.load(path, map_location='cpu', weights_only=True)
            parser = cls(saved['size'])
            parser.load_state_dict(saved['weights'])
        except Exception as error:  # the unpickler fails in many ways
            raise UserError(f'{path}: missing, truncated or not a parser ({type(error).__name__}); delete {path.parent} '
                            'to make it anew')
        return parser.eval()


def targets(objects, size):
    """Objects (B, K, 6) -> heat (B, h, w), 1 at centres and falling with distance; the nearest object's offset (B, 2, h, w) and
    classes (B, 4, h, w)."""
    at = torch.arange(size // CELL, device=objects.device) * CELL + CELL / 2 - 0.5
    there = (objects[..., 0] >= 0)[..., None, None]
    dx = objects[..., 4, None, None] - at[None, None, None, :]  # (B, K, 1, w)
    dy = objects[..., 5, None, None] - at[None, None, :, None]
    distance = (dx ** 2 + dy ** 2).masked_fill(~there, 1e6)  # (B, K, h, w)
    nearest, index = distance.min(1)
    offset = torch.stack([d.expand_as(distance).gather(1, index[:, None])[:, 0] for d in (dx, dy)], 1)
    classes = torch.stack([objects[..., i, None, None].expand_as(distance).gather(1, index[:, None])[:, 0] for i in range(4)], 1)
    return (-nearest / (2 * RADIUS ** 2)).exp(), offset, classes.clamp(min=0)


def parser_loss(parser, images, objects):
    """Cross-entropy of the heat in all cells; of classes, and the offsets' squared error, near centres."""
    out = parser(images)
    heat, offset, classes = targets(objects, parser.size)
    loss = 20 * F.binary_cross_entropy_with_logits(out[:, 0], heat)
    near = heat / heat.sum()
    loss = loss + 0.1 * (near * (out[:, 1:3] - offset).square().sum(1)).sum()
    for logits, truth in zip(out[:, 3:].split(list(CLASSES.values()), 1), classes.unbind(1)):
        loss = loss + (near * F.cross_entropy(logits, truth, reduction='none')).sum()
    return loss


def train_parser(folder, seed, steps=500, batch_size=64):
    """Trains a parser on the true renders of a data folder."""
    torch.manual_seed(seed)
    random = np.random.default_rng((seed, 6))
    rgb, objects = (np.load(folder / 'train' / f'raw_{name}.npy', mmap_mode='r') for name in ('rgb', 'objects'))

    def batch_of():
        ids = random.integers(0, len(rgb), batch_size)
        return to_network('rgb', rgb[ids]), torch.from_numpy(objects[ids].astype(np.int64))
    return fit(Parser(rgb.shape[1]), parser_loss, batch_of, steps, 'parser')
