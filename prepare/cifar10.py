"""
CIFAR-10 (Krizhevsky, 2009): 32x32 color photographs of ten classes, 50,000 for training, 10,000 for validation.

    python -m prepare.cifar10

The binary version of the public archive: files of records, each a byte for the class and 3 x 1,024 bytes of red, green
and blue. Nothing is unpickled, and only members with known names are read from the archive, into memory. image.npy is
(n, views, 32, 32, 3): two views for training, the image and its mirror image, one for validation; label.npy is (n,).
The archive is downloaded once into the cache folder. prepare/cifar10_modalities.py makes six modalities of the same
photographs.
"""
import tarfile
from pathlib import Path

import numpy as np

import config
from config import UserError
from prepare import arrays, judge
from prepare.download import download
from prepare.files import making

MAKES = 'data/cifar10'
SETTINGS = dict(
    seed=0,     # of the evaluation classifier
    out=MAKES,  # the data folder
)
URL, ARCHIVE = 'https://www.cs.toronto.edu/~kriz/', 'cifar-10-binary.tar.gz'
MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
FILES = dict(train=[f'data_batch_{i}.bin' for i in range(1, 6)], val=['test_batch.bin'])
RECORD = 1 + 3 * 32 * 32  # bytes
CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
JUDGE_STEPS = 4000


def read_archive(path):
    """{split: (images (n, 32, 32, 3) uint8, labels (n,) uint8)}, from the known members of the archive."""
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive
                       if member.isfile() and member.size <= 10_000 * RECORD}
            content = {name: archive.extractfile(members[name]).read() for names in FILES.values() for name in names}
    except (OSError, EOFError, tarfile.TarError, KeyError) as error:
        raise UserError(f'{path}: not the binary version of CIFAR-10 ({type(error).__name__}: '
                        f'{" ".join(str(error).split())}); delete it and run this again')
    splits = {}
    for split, names in FILES.items():
        data = b''.join(content[name] for name in names)
        records = np.frombuffer(data[:len(data) // RECORD * RECORD], np.uint8).reshape(-1, RECORD)
        if len(data) % RECORD or not len(records) or records[:, 0].max() > 9:
            raise UserError(f'{path}: its {split} records are damaged; delete it and run this again')
        splits[split] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), records[:, 0].copy()
    return splits


def fetch():
    """The result of read_archive for the archive in the cache folder, which is downloaded once."""
    return read_archive(download(URL + ARCHIVE, ARCHIVE, MD5))


def views(images, split):
    """(n, H, H, 3) -> (n, views, H, H, 3): in training also the mirror image."""
    return np.stack((images, images[:, :, ::-1]), 1) if split == 'train' else images[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring, for sample.py and lab/

class Dataset:
    """Scores images (n, 32, 32, 3) uint8 with a data folder."""
    def __init__(self, folder):
        self.folder, self.classes = Path(folder), CLASSES

    def load(self, split, name):
        return arrays.load(self.folder / split / f'{name}.npy')

    def score(self, images, labels, split='val'):
        """judge.score of images (n, 32, 32, 3) uint8 generated for labels (n,)."""
        n, train = min(len(images), len(self.load(split, 'label'))), self.load('train', 'image')
        return judge.score(judge.Judge.load(self.folder / 'judge.pt'), images[:n], np.asarray(labels)[:n],
                           self.load(split, 'image')[:n, 0], self.load(split, 'label')[:n], [train[:, 0], train[:, 1]],
                           self.load('train', 'label'))


# ---------------------------------------------------------------------------------------------------------------------
# Making the data set

@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    splits = fetch()
    folder = Path(settings['out'])
    arrays.begin(folder, 'cifar10')
    for split, (images, labels) in splits.items():
        arrays.write(folder / split, dict(image=views(images, split), label=labels))
    network = judge.train_judge(*splits['train'], settings['seed'], JUDGE_STEPS)
    network.save(folder / 'judge.pt')
    held_out, truth = splits['val']
    right = float((network.logits(held_out).argmax(1) == truth).mean())
    print(f'evaluation classifier of 32x32 images: {right:.1%} of {len(truth):,} held-out images right')
    meta = dict(kind='rows', fields=dict(image=256, label=10), views=dict(image=2), prepare='cifar10', classes=CLASSES,
                config=dict(image_size=32, channels=3, n_classes=10), quality=dict(judge=right), settings=settings)
    arrays.save_meta(folder, meta)


if __name__ == '__main__':
    config.run(main)
