"""
The evaluation classifier: a small convolutional network trained on the images of a data set, and scores of generated
images.

No pretrained network is downloaded. Fréchet distances are therefore comparable only if the classifier is the same.
Every score is reported with the value of real images (ceiling or floor) and of a generator of independent pixels
(baseline). There is one classifier per representation: 28x28 grey levels, 14x14 binary images (MNIST's tokens), 32x32
in color.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import UserError
from engine.checkpoints import load_network
from engine.optimizers import fit
from prepare.arrays import writing


def convolution(inputs, outputs, stride=1):
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Judge(nn.Module):
    """Classifies images of `size` (14, 28 or 32) pixels per side, uint8, into 10 classes; for color it is twice as
    wide."""
    def __init__(self, size, channels=1):
        super().__init__()
        self.size, self.channels, D = size, channels, 64 if channels == 1 else 128
        self.body = nn.Sequential(
            *convolution(channels, D // 4, stride=size // 14), *convolution(D // 4, D // 4),  # (B, D/4, 14 or 16, same)
            *convolution(D // 4, D // 2, stride=2), *convolution(D // 2, D // 2),             # (B, D / 2, 7, 7)
            *convolution(D // 2, D, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())         # (B, D)
        self.head = nn.Linear(D, 10)

    def see(self, images):
        """(B, H, W) or (B, H, W, C) uint8 tensor -> features before the head (B, D), in float32 on every machine."""
        with torch.autocast(images.device.type, enabled=False):
            return self.body(images.reshape(*images.shape[:3], self.channels).movedim(-1, 1) / 255)

    def forward(self, images):
        """(B, H, W) or (B, H, W, C) uint8 tensor -> logits (B, 10)."""
        return self.head(self.see(images))

    @torch.no_grad()
    def features(self, images):
        """(n, H, W) or (n, H, W, C) uint8 array -> (n, D) float32 array of the features in which distances are
        measured."""
        return torch.cat([self.see(part) for part in torch.tensor(images).split(1000)]).numpy()

    @torch.no_grad()
    def logits(self, images):
        """(n, H, W) or (n, H, W, C) uint8 array -> (n, 10) float32 array."""
        return self.head(torch.from_numpy(self.features(images))).numpy()

    def save(self, path):
        with writing(path) as file:
            torch.save(dict(size=self.size, channels=self.channels, weights=self.state_dict()), file)

    @classmethod
    def load(cls, path):
        return load_network(path, lambda saved: cls(saved['size'], saved.get('channels', 1)),
                            'an evaluation classifier')


def train_judge(images, labels, seed=0, steps=1500, batch_size=128):
    """Trains a classifier on images (n, H, H) or (n, H, H, C) uint8 with labels (n,), with random shifts of up to H/14
    pixels."""
    size, reach = images.shape[1], images.shape[1] // 14
    padded = F.pad(torch.tensor(images), (0,) * 2 * (images.ndim - 3) + (reach,) * 4)
    labels, place, random = torch.tensor(labels).long(), torch.arange(size), np.random.default_rng((seed, 7))

    def batch_of():
        ids = torch.from_numpy(random.integers(0, len(images), batch_size))
        y, x = torch.from_numpy(random.integers(0, 2 * reach + 1, (2, batch_size, 1))) + place  # (B, H) each
        return padded[ids[:, None, None], y[:, :, None], x[:, None, :]], labels[ids]

    def loss_of(judge, images, labels):
        return F.cross_entropy(judge(images), labels, label_smoothing=0.05)
    torch.manual_seed(seed)
    return fit(Judge(size, *images.shape[3:]), loss_of, batch_of, steps, f'judge {size}x{size}')


# ---------------------------------------------------------------------------------------------------------------------
# Scores of a set of images, or of their features, against a set of real ones

def frechet(a, b):
    """Fréchet (2-Wasserstein) distance of the Gaussians fitted to features a (n, F) and b (m, F).

    |mean difference|^2 + tr(A + B - 2 (A B)^1/2): Dowson & Landau, 1982; of image features: Heusel et al., 1706.08500,
    eq. 6. The trace of (A B)^1/2 equals that of (A^1/2 B A^1/2)^1/2, which is symmetric. The distance is biased
    upwards for few samples: compare only distances of the same number of samples.
    """
    a, b = a.astype(float), b.astype(float)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(A)
    root = vectors * values.clip(0) ** 0.5 @ vectors.T
    cross = np.linalg.eigvalsh(root @ B @ root).clip(0) ** 0.5  # rounding leaves eigenvalues slightly below 0
    return max(0.0, float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * cross.sum()))


def to_rows(x):
    """(n, ...) array or tensor -> (n, -1) float32 tensor."""
    return torch.as_tensor(x).flatten(1).float()


def neighbour(points, others, k):
    """Distance (n,) from each point (n, ...) to the k-th nearest of the others (m, ...)."""
    others = to_rows(others)
    return torch.cat([torch.cdist(part, others).kthvalue(k, 1).values for part in to_rows(points).split(500)])


def inside(points, centres, k):
    """Whether points (n, F) are in the manifold of the centres (m, F): nearer to a centre than its k-th neighbour.
    (n,)."""
    radius, centres = neighbour(centres, centres, k + 1), to_rows(centres)  # + 1: the first is the point itself
    return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in to_rows(points).split(500)]).numpy()


def precision_recall(real, fake, k=3):
    """Whether fakes (n,) are in the manifold of the real features, and real ones (m,) in that of the fakes, from
    features (m, F) and (n, F). Precision and recall are the means of these booleans (Kynkäänniemi et al., 1904.06991,
    eqs. 1 and 2)."""
    return inside(fake, real, k), inside(real, fake, k)


def distance_to(images, train):
    """Squared distance (n,) of each image to the nearest one in `train`, a list of arrays (m, H, W) uint8. Black to
    white is 1, so the distance of binary images is the number of pixels that differ."""
    distances = [neighbour(images / np.float32(255), part / np.float32(255), 1) for part in train]
    return np.min([distance.square().numpy() for distance in distances], 0)


def independent_pixels(images, labels, wanted, seed=0):
    """The baseline: for each label (n,), an image whose pixels are each taken from a random real image of the class."""
    random, out = np.random.default_rng((seed, 8)), np.zeros((len(wanted), *images.shape[1:]), np.uint8)
    for label in np.unique(wanted):
        own, place = images[labels == label], wanted == label
        out[place] = np.take_along_axis(own, random.integers(0, len(own), out[place].shape), 0)
    return out


def check_number(n):
    """Raises UserError if n images are too few to score."""
    if n < 5:
        raise UserError(f'{n} images are too few to score: give at least 5')


def score(judge, images, labels, held_out, truth, train, train_labels):
    """Scores of images (n, H, H) uint8 generated for labels (n,), with the scores of the same number of real images.

    held_out (n, H, H) with labels truth (n,); train: a list of arrays (m, H, H), view 0 first, with labels (m,).
    Returns {metric: dict(parts=(n, 1, 2) numerators and denominators, or value=float; baseline=float; ceiling= or
    floor=float)}:

        accuracy       fraction classified as the label; ceiling: of the held-out images
        precision      fraction in the manifold of the held-out images; ceiling: of training images
        recall         fraction of the held-out images in the manifold of the samples; ceiling: of training images
        frechet        distance to the held-out images; floor: of training images
        copies         fraction equal to a training image, in any view; floor: of the held-out images
        near_copies    fraction as near to a training image as the nearest 5 % of held-out images, which are the floor

    The baseline is `independent_pixels`. A ceiling is the value of real images, not a bound: typical images of a class
    are the easiest to classify, so a generator of typical images only has a higher score. Raises UserError for fewer
    than 5 images.
    """
    n = len(images)
    check_number(n)
    features, usual = judge.features(held_out), distance_to(held_out, train)
    near = np.quantile(usual, 0.05)

    def right(images, labels):
        return judge.logits(images).argmax(1) == labels

    def measure(images, labels, distance):
        found = judge.features(images)
        precision, recall = precision_recall(features, found)
        return dict(accuracy=right(images, labels), precision=precision, recall=recall,
                    frechet=frechet(features, found), copies=distance < 0.5, near_copies=distance <= near)  # 0.5: equal
    blind = independent_pixels(train[0], train_labels, labels)
    blind = measure(blind, labels, distance_to(blind, train))
    real = measure(train[0][:n], train_labels[:n], usual) | dict(accuracy=right(held_out, truth))
    scores = {}
    for name, hits in measure(images, labels, distance_to(images, train)).items():
        value = dict(value=hits) if name == 'frechet' else dict(parts=np.stack((hits, np.ones(n)), -1)[:, None])
        bound = 'ceiling' if name in ('accuracy', 'precision', 'recall') else 'floor'
        scores[name] = value | {bound: float(np.mean(real[name])), 'baseline': float(np.mean(blind[name]))}
    return scores
