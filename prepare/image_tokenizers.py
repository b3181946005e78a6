"""
Image tokenizers: autoencoders with finite scalar quantization (FSQ, Mentzer et al., 2309.15505).

The image is cut into patches. An encoder of MLPs maps each patch to a latent vector of d values between 0 and 1; each
value is rounded to one of a few levels. A Transformer decoder reconstructs the image from the rounded values of all
patches. The rounded values of a patch are the digits of one integer, its token. No codebook has to be learned, and
none can collapse: every combination of digits is a code.

The reconstruction is the best image that a model of these tokens can generate: its quality is the ceiling of all later
scores.
"""
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from engine.checkpoints import load_network
from engine.optimizers import fit
from gpt import MLP, Attention, rms_norm, rope_cos_sin
from prepare.arrays import load


@dataclass
class Config:
    size: int = 64                # H = W, pixels of a side
    patch: int = 8                # pixels per side of a patch; N = (size / patch)^2 tokens
    channels: int = 3             # C
    levels: str = '16*16*16*16'   # of each digit; their product is the vocabulary
    n_embd: int = 128             # width
    n_head: int = 4
    n_layer_encoder: int = 2
    n_layer_decoder: int = 3


# ---------------------------------------------------------------------------------------------------------------------
# Finite scalar quantization

def quantize(z, levels):
    """Latents z (..., d) -> digits (..., d), float32 with integer values 0..level - 1.

    digit = round(sigmoid(z) (level - 1)). The sigmoid reaches the first and the last level for any number of levels;
    section 3.1 has tanh and a shift for even numbers. Rounding has the gradient of the identity (straight-through
    estimator).
    """
    with torch.autocast(z.device.type, enabled=False):
        bounded = z.float().sigmoid() * (levels - 1)
        return bounded + (bounded.round() - bounded).detach()


def digits_to_ids(digits, levels):
    """Digits (..., d) -> ids (...), the first digit the most significant."""
    ids = torch.zeros(digits.shape[:-1], dtype=torch.long, device=digits.device)
    for digit, level in zip(digits.round().long().unbind(-1), levels.long().tolist()):
        ids = ids * level + digit
    return ids


def ids_to_digits(ids, levels):
    """The inverse of digits_to_ids: ids (...) -> digits (..., d), as floats."""
    digits = []
    for level in reversed(levels.long().tolist()):
        digits.append(ids % level)
        ids = ids // level
    return torch.stack(digits[::-1], -1).float()


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head)
        self.mlp = MLP(config.n_embd)

    def forward(self, x, rope):
        x = x + self.attention(rms_norm(x), rope)
        return x + self.mlp(rms_norm(x))


class ImageTokenizer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        side, pixels = config.size // config.patch, config.channels * config.patch ** 2
        levels = [int(level) for level in config.levels.split('*')]
        self.vocabulary, self.tokens = math.prod(levels), side * side
        self.patch_embedding = nn.Linear(pixels, config.n_embd)
        self.encoder = nn.ModuleList(MLP(config.n_embd) for _ in range(config.n_layer_encoder))
        self.to_latent_head = nn.Linear(config.n_embd, len(levels))
        self.digit_embedding = nn.Linear(len(levels), config.n_embd)
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.n_layer_decoder))
        self.to_pixels_head = nn.Linear(config.n_embd, pixels)
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        self.register_buffer('levels', torch.tensor(levels, dtype=torch.float), persistent=False)
        rope = torch.stack(rope_cos_sin(grid, config.n_embd // config.n_head, rope_base=100))
        self.register_buffer('rope', rope, persistent=False)

    def latents(self, images):
        """Images (B, C, H, W) -> latents (B, N, d)."""
        c = self.config
        if images.shape[1:] != (c.channels, c.size, c.size):
            raise ValueError(f'images of shape {tuple(images.shape[1:])}, but this tokenizer takes '
                             f'{(c.channels, c.size, c.size)}')
        x = self.patch_embedding(F.pixel_unshuffle(images, c.patch).flatten(2).transpose(1, 2))  # (B, N, D)
        for mlp in self.encoder:
            x = x + mlp(rms_norm(x))
        return self.to_latent_head(rms_norm(x)).float()

    def rebuild(self, digits):
        """Digits (B, N, d) -> images (B, C, H, W)."""
        c = self.config
        x = self.digit_embedding(2 * digits / (self.levels - 1) - 1)
        for block in self.decoder:
            x = block(x, self.rope)
        side = c.size // c.patch
        x = self.to_pixels_head(rms_norm(x)).float().transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(x, c.patch)

    def forward(self, images):
        return self.rebuild(quantize(self.latents(images), self.levels))

    @torch.no_grad()
    def encode(self, images):
        """Images (B, C, H, W) -> ids (B, N). Raises ValueError for another size."""
        return digits_to_ids(quantize(self.latents(images), self.levels), self.levels)

    @torch.no_grad()
    def decode(self, ids):
        """Ids (B, N) -> images (B, C, H, W)."""
        return self.rebuild(ids_to_digits(ids, self.levels))

    def save(self, path):
        torch.save(dict(config=dataclasses.asdict(self.config), weights=self.state_dict()), path)

    @classmethod
    def load(cls, path):
        return load_network(path, lambda saved: cls(Config(**saved['config'])), 'an image tokenizer')


# ---------------------------------------------------------------------------------------------------------------------
# Raw arrays as inputs of the autoencoder, and back

DEPTH_MEAN, DEPTH_SCALE = 2.1, 0.4  # of the logarithm of depth, so that errors are relative
CLASSES = 25                        # of segmentation: ground, and shape x color
SPECS = dict(  # channels, levels, weight of object pixels (ground: 1), training steps
    rgb=(3, '8*8*8*8', 8, 550),  # 16^4 codes: 0.8 dB better, but half of a code's bits are noise to a model of them
    depth=(1, '8*8*8*8', 4, 250),
    normal=(3, '8*8*8*8', 4, 350),
    segmentation=(CLASSES, '8*8*8*8', 2, 280))


def to_network(name, raw):
    """Raw images (B, H, W[, C]) of a field -> (B, C, H, W) float, about -1..1; classes one-hot."""
    raw = torch.from_numpy(np.array(raw))  # a copy: memory-mapped arrays are read-only
    if name == 'depth':
        return ((raw.float().log() - DEPTH_MEAN) / DEPTH_SCALE)[:, None]
    if name == 'segmentation':
        return F.one_hot(raw.long(), CLASSES).permute(0, 3, 1, 2).float()
    raw = raw.permute(0, 3, 1, 2)
    return raw / 127.5 - 1 if name == 'rgb' else raw / 127. if raw.dtype == torch.int8 else raw.float()


def from_network(name, x):
    """The inverse, for the output of a network (B, C, H, W): rgb uint8, depth float, unit normals float, argmax of
    classes."""
    if name == 'depth':
        return (x[:, 0] * DEPTH_SCALE + DEPTH_MEAN).exp().numpy()
    if name == 'segmentation':
        return x.argmax(1).numpy()
    x = x.permute(0, 2, 3, 1)
    return F.normalize(x, dim=-1).numpy() if name == 'normal' else ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def reconstruction_loss(tokenizer, images, weight):
    """Squared error, or cross-entropy of classes, weighted by (B, H, W): object pixels are few, and scores depend on
    them."""
    out = tokenizer(images)
    if images.size(1) == CLASSES:
        error = F.cross_entropy(out, images.argmax(1), reduction='none')
    else:
        error = (out - images).square().mean(1)
    return (error * weight).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Training

def train_field(folder, name, size, seed=0, batch_size=64):
    """Trains the tokenizer of one image field of a data folder. Returns it and its quality on the validation scenes."""
    channels, levels, object_weight, steps = SPECS[name]
    torch.manual_seed(seed)
    random = np.random.default_rng((seed, 5))
    raw, instance = (load(folder / 'train' / f'raw_{part}.npy') for part in (name, 'instance'))

    def batch_of():
        ids = random.integers(0, len(raw), batch_size)
        weight = 1 + (object_weight - 1) * torch.from_numpy(instance[ids] > 0).float()
        return to_network(name, raw[ids]), weight
    model = ImageTokenizer(Config(size=size, channels=channels, levels=levels))
    tokenizer = fit(model, reconstruction_loss, batch_of, steps, name)
    return tokenizer, quality(tokenizer, name, folder / 'val')


def encode_all(tokenizer, name, folder):
    """The token ids (n, N) int32 of all images of one field in the folder of a split."""
    raw = load(folder / f'raw_{name}.npy')
    parts = [tokenizer.encode(to_network(name, raw[i:i + 100]))
             for i in tqdm(range(0, len(raw), 100), desc=f'encode {name}', unit='x100', leave=False)]
    return torch.cat(parts).int().numpy()


def quality(tokenizer, name, folder):
    """Quality of the reconstruction of a split, on object pixels and on all: PSNR in dB, relative depth error, angle
    in degrees, mIoU; and the number of distinct codes in use."""
    raw, ids = load(folder / f'raw_{name}.npy'), torch.from_numpy(encode_all(tokenizer, name, folder)).long()
    rebuilt = np.concatenate([from_network(name, tokenizer.decode(part)) for part in ids.split(100)])
    objects = load(folder / 'raw_instance.npy') > 0
    used = dict(codes_used=ids.unique().numel())
    if name == 'segmentation':
        classes = [(raw == c, rebuilt == c) for c in range(CLASSES)]
        return dict(miou=float(np.mean([(a & b).sum() / n for a, b in classes if (n := (a | b).sum())]))) | used
    if name == 'rgb':
        error = ((rebuilt.astype(np.float32) - raw) ** 2).mean(-1)
        return {key: float(10 * np.log10(255 ** 2 / error[mask].mean()))
                for key, mask in (('psnr_objects', objects), ('psnr_all', objects >= 0))} | used
    raw = raw.astype(np.float32)
    if name == 'depth':
        error = np.abs(rebuilt - raw) / raw
        return dict(absrel_objects=float(error[objects].mean()), absrel_all=float(error.mean())) | used
    cosine = (rebuilt * raw).sum(-1) / np.linalg.norm(raw, axis=-1)
    angle = np.degrees(np.arccos(cosine.clip(-1, 1)))
    return dict(angle_objects=float(angle[objects].mean()), angle_all=float(angle.mean())) | used
