"""Tiny data sets in the current folder, made once, and tiny runs: shared by the tests of sample.py and lab/."""
from pathlib import Path

import pytest
from PIL import Image

import sample
from prepare import judge, mnist, text
from tests.test_mnist import toy_digits

GPT = dict(model='gpt', n_layer=1, n_head=2, n_embd=16, batch_size=4, max_iters=2, device='cpu', dtype='float32', compile=False)


def make_story():
    """data/story: byte-pair tokens."""
    if not Path('data/story').exists():
        Path('story.txt').write_text('The cat sat on the mat. Straße. ' * 300)
        text.main(input='story.txt', encoding='bpe', vocab_size=280, out='data/story')


def make_digits():
    """data/toy_mnist: toy digits and a briefly trained judge."""
    if not Path('data/toy_mnist').exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mnist, 'read_part', lambda part, fashion: toy_digits(200 if part == 'train' else 60, len(part)))
            patch.setattr(judge.train_judge, '__defaults__', (0, 5, 32))
            mnist.main(views=2, out='data/toy_mnist')


def draw(out_dir, *arguments, kind='png'):
    """The image that sample.py writes, loaded; its files are removed."""
    before = set(Path(out_dir).glob('sample_*'))
    sample.main(f'--out_dir={out_dir}', '--device=cpu', *arguments)
    new = set(Path(out_dir).glob('sample_*')) - before
    path, = (path for path in new if path.suffix == f'.{kind}')
    image = Image.open(path)
    image.load()
    for file in new:
        file.unlink()
    return image
