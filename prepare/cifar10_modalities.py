"""
The photographs of CIFAR-10 in six modalities for nano4M: rgb, grey, edges, palette, low resolution, and the class as a
caption, made by prepare/folder.py as for your own images. A token is a patch of 4x4 pixels; the mirror image is a
second view.

    python -m prepare.cifar10_modalities    (train.py runs this if data/cifar10_modalities is missing)
    python train.py config/nano4m_cifar10.py
"""
from pathlib import Path

import config
from config import UserError
from prepare.arrays import begin, write
from prepare.cifar10 import CLASSES, fetch, views
from prepare.files import making
from prepare.folder import check, make

MAKES = 'data/cifar10_modalities'
SETTINGS = dict(
    out=MAKES,         # the data folder
    steps=800,         # of the training of each image tokenizer
    vocab_size=512,    # of the captions' encoding
    caption_tokens=8,  # of the longest caption, with its end token
    seed=0,
)


@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out = Path(settings['out'])
    if (out / 'meta.json').is_file():
        raise UserError(f'{out} exists already: delete it, or choose another --out')
    check(settings)
    splits = fetch()
    begin(out, 'folder')
    for split, (_, labels) in splits.items():
        write(out / split, dict(label=labels))  # for lab/transfer.py
    captions = [f'a photo of {"an" if name[0] in "aeiou" else "a"} {name}' for name in CLASSES]
    make(out, {split: (views(images, split), [captions[label] for label in labels])
               for split, (images, labels) in splits.items()}, settings)


if __name__ == '__main__':
    config.run(main)
