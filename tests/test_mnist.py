"""MNIST's files, tokens and views; the judge and its scores."""
import gzip
import hashlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from config import UserError
from engine import processes
from prepare import arrays, judge, mnist
from prepare.download import cache_folder

REAL = cache_folder() / 't10k-images-idx3-ubyte.gz'


def idx(array):
    """An array of bytes in the files' format."""
    return b'\0\0\x08' + bytes([array.ndim]) + np.array(array.shape, '>i4').tobytes() + array.tobytes()


def toy_digits(n, seed=0):
    """Pictures (n, 28, 28) of a block whose height and width tell the class, which is all that a judge needs to learn."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, n).astype(np.uint8)
    images = random.integers(0, 60, (n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels):
        (y, x), height, width = random.integers(2, 6, 2), 4 + 4 * (label % 5), 4 + 10 * (label // 5)
        image[y:y + height, x:x + width] = 255
    return images, labels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts these contents, compressed, into an empty cache folder, where their md5 is the expected one."""
    monkeypatch.setenv('NANO_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(mnist, 'MD5', dict(mnist.MD5))

    def put(name, content):
        path = tmp_path / 'cache' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content))
        mnist.MD5[name] = hashlib.md5(content).hexdigest()
    return put


def put_part(put, part, images, labels):
    put(f'{part}-images-idx3-ubyte.gz', idx(images))
    put(f'{part}-labels-idx1-ubyte.gz', idx(labels))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A data folder of 400 + 200 toy digits with briefly trained judges."""
    where = tmp_path_factory.mktemp('mnist')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, 'read_part', lambda part, fashion: toy_digits(400 if part == 'train' else 200, len(part)))
        train_judge = judge.train_judge
        patch.setattr(judge, 'train_judge', lambda *arguments: train_judge(*arguments, steps=100, batch_size=32))
        mnist.main(out=str(where), views=3)
    return where


# ---------------------------------------------------------------------------------------------------------------------
# The files

def test_read_idx_and_its_errors(tmp_path):
    path, array = tmp_path / 'x.gz', np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    md5 = hashlib.md5(idx(array)).hexdigest()
    for level in (1, 9):  # mirrors compress again: other bytes, the same contents
        path.write_bytes(gzip.compress(idx(array), level, mtime=level))
        assert (mnist.read_idx(path, md5) == array).all()
    good = path.read_bytes()
    for content in (b'', b'<html>', good[:-9], good[:12] + b'\xff\xff' + good[14:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='x.gz: (truncated or not a gzip file|the md5 of its decompressed contents)'):
            mnist.read_idx(path, md5)
    path.write_bytes(gzip.compress(idx(array + 1)))
    with pytest.raises(UserError, match=f'x.gz: the md5 of its .* contents is [0-9a-f]*, expected {md5}; delete it') as error:
        mnist.read_idx(path, md5)
    assert '\n' not in str(error.value)


def test_splits(cache):
    images, labels = toy_digits(60)
    put_part(cache, 't10k', images, labels)
    splits = mnist.read_splits(dict(subset='t10k', fashion=False, seed=0))
    assert [len(splits[split][0]) for split in ('train', 'val')] == [54, 6]
    mixed = np.concatenate([splits[split][0] for split in ('train', 'val')])
    assert (mixed != images).any() and {x.tobytes() for x in mixed} == {x.tobytes() for x in images}
    again = mnist.read_splits(dict(subset='t10k', fashion=False, seed=0))
    assert (again['val'][1] == splits['val'][1]).all()
    put_part(cache, 'train', images[:50], labels[:50])
    splits = mnist.read_splits(dict(subset='', fashion=False, seed=0))
    assert (splits['train'][0] == images[:50]).all() and (splits['val'][1] == labels).all()


def test_fashion_has_its_own_files(cache):
    images, labels = toy_digits(10)
    for name, array in (('images-idx3', images), ('labels-idx1', labels)):
        cache(f'fashion/t10k-{name}-ubyte.gz', idx(array))
    assert (mnist.read_part('t10k', True)[0] == images).all()


def test_training_makes_fashion_mnist(cache, tmp_path, monkeypatch):
    """dataset=fashion_mnist starts prepare/fashion_mnist.py (here in this process): prepare/mnist.py with other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prepare').symlink_to(Path(mnist.__file__).parent)
    for part, n in (('train', 200), ('t10k', 60)):
        put_part(cache, f'fashion/{part}', *toy_digits(n))
    monkeypatch.setattr(judge.train_judge, '__defaults__', (0, 5, 32))
    monkeypatch.setattr(processes.subprocess, 'run', lambda words: SimpleNamespace(
        returncode=not runpy.run_module(words[2], run_name='__main__')))
    monkeypatch.setattr(sys, 'argv', ['prepare/fashion_mnist.py'])
    folder, meta = arrays.find('fashion_mnist')
    assert str(folder) == 'data/fashion_mnist' and meta['classes'][0] == 't-shirt' and meta['prepare'] == 'mnist'
    assert arrays.Data(folder, 'train', meta, ['tokens']).n == 200 and mnist.Dataset(folder).load('val', 'label').shape == (60,)
    monkeypatch.setattr(sys, 'argv', ['prepare/fashion_mnist.py', '--subset=t20k'])
    with pytest.raises(SystemExit, match="error: subset='t20k'"):
        runpy.run_module('prepare.fashion_mnist', run_name='__main__')
    from prepare import fashion_mnist  # in a notebook
    monkeypatch.setattr(mnist, 'main', lambda *arguments, **overrides: (arguments, overrides))
    assert fashion_mnist.main('--views=2', out='x') == (('--views=2',), dict(out='x', fashion=True))


def test_file_errors(cache, monkeypatch):
    images, labels = toy_digits(10)
    put_part(cache, 't10k', images, labels)
    mnist.MD5['t10k-labels-idx1-ubyte.gz'] = '0' * 32
    with pytest.raises(UserError, match='t10k-labels-idx1-ubyte.gz: .* expected 0000'):
        mnist.main(subset='t10k')

    def no_internet(url, name):
        raise UserError(f'{url} cannot be had')
    monkeypatch.setattr(mnist, 'download', no_internet)
    with pytest.raises(UserError, match='train-images-idx3-ubyte.gz cannot be had; or .* --subset=t10k'):
        mnist.main()
    with pytest.raises(UserError, match="subset='t20k'"):
        mnist.main('--subset=t20k')
    with pytest.raises(UserError, match='views=0'):
        mnist.main('--views=0')


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tokens

def test_order_of_bits_and_patches():
    image = np.zeros((1, 14, 14), np.uint8)
    image[0, 0, 0] = 255                       # patch 0, upper left: 8
    image[0, 0, 3] = 255                       # patch 1, upper right: 4
    image[0, 3, 0] = 255                       # patch 7, lower left: 2
    image[0, 13, 13] = image[0, 12, 12] = 255  # patch 48, lower right and upper left: 1 + 8
    image[0, 6, 6] = 127                       # patch 24: below the middle
    tokens = mnist.to_tokens(image, [5])[0].tolist()
    assert tokens[:3] == [5, 18, 14] and tokens[1 + 7] == 12 and tokens[49] == 19 and tokens[1 + 24] == 10
    assert sum(tokens[1:]) == 490 + 8 + 4 + 2 + 9


@given(st.lists(st.lists(st.integers(10, 25), min_size=49, max_size=49), min_size=1, max_size=4), st.integers(0, 9))
def test_tokens_to_pictures_and_back(patches, label):
    tokens = np.array([[label, *row] for row in patches], np.uint8)
    images = mnist.to_images(tokens)
    assert images.shape == (len(tokens), 14, 14) and set(np.unique(images)) <= {0, 255}
    assert (mnist.to_tokens(images, [label] * len(tokens)) == tokens).all()
    assert (mnist.to_images(tokens[:, 1:]) == images).all()
    assert (mnist.to_images(torch.from_numpy(tokens).long()) == images).all()


def test_what_is_no_patch_is_black():
    tokens = np.full((1, 50), 25)
    tokens[0, 1:4] = 9, 26, -1
    image = mnist.to_images(tokens)[0]
    assert (image[:2, :6] == 0).all() and (image == 255).sum() == 46 * 4


def test_views():
    images = toy_digits(50)[0]
    tokens = mnist.view_tokens(images, np.arange(50) % 10, 4, np.random.default_rng(0))
    assert tokens.shape == (50, 4, 50) and tokens.dtype == np.uint8 and (tokens[..., 0].T == np.arange(50) % 10).all()
    assert (mnist.to_images(tokens[:, 0]) == mnist.binary(images)).all()
    assert all((tokens[:, a] != tokens[:, b]).any() for a in range(4) for b in range(a))


def test_crops(monkeypatch):
    images = toy_digits(20)[0]
    crops = mnist.random_crops(images, np.random.default_rng(0))
    assert crops.shape == (20, 14, 14) and 5 < np.abs(crops - mnist.halve(images)).mean() < 40

    class Whole:
        """Draws the largest box: the whole picture."""
        def uniform(self, low, high, size):
            return np.full(size, 0.0 if low < 0 else 1.0)
    monkeypatch.setattr(mnist.math, 'log', lambda x: -1.0)  # a ratio of exp(0)
    assert mnist.random_crops(images, Whole()) == pytest.approx(mnist.halve(images), abs=1e-2)
    assert mnist.halve(np.arange(784).reshape(1, 28, 28))[0, 0, 0] == (0 + 1 + 28 + 29) / 4


# ---------------------------------------------------------------------------------------------------------------------
# The judge

def test_frechet_is_that_of_gaussians():
    random = np.random.default_rng(0)
    white = random.normal(size=(500, 3))
    white = np.linalg.solve(np.linalg.cholesky(np.cov(white.T)), (white - white.mean(0)).T).T  # mean 0 and covariance 1 exactly
    assert judge.frechet(white, white) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(white, 3 * white + [1, 2, 0]) == pytest.approx(5 + 3 * (3 - 1) ** 2)
    rope = np.linalg.qr(random.normal(size=(3, 3)))[0]
    a, b = white * [1, 2, 3] @ rope, white * [2, 2, 5] @ rope  # covariances that commute: the deviations' squared differences
    assert judge.frechet(a, b) == pytest.approx(1 + 0 + 4) == judge.frechet(b, a)
    flat = white * [1, 0, 0]  # a singular covariance
    assert judge.frechet(flat, flat) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall():
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, 200, 2)) + np.array([[[0, 0]], [[100, 0]]])
    both = np.concatenate((left, right))

    def shares(real, fake):
        return [hits.mean() for hits in judge.precision_recall(real, fake)]
    assert shares(both, both) == [1, 1]
    assert shares(left, right) == [0, 0]
    assert shares(both, left) == [1, 0.5]  # a mode is missing
    assert shares(left, both) == [0.5, 1]  # a mode is invented


def test_copies_are_found():
    random = np.random.default_rng(0)
    train = [255 * random.integers(0, 2, (600, 14, 14)).astype(np.uint8) for _ in range(2)]
    images = 255 * random.integers(0, 2, (600, 14, 14)).astype(np.uint8)
    images[3], images[4] = train[0][7], train[1][8]
    images[4, 0, :2] = 255 - images[4, 0, :2]
    distance = judge.distance_to(images, train)
    assert distance[3] == pytest.approx(0, abs=1e-3) and distance[4] == pytest.approx(2, abs=1e-3)
    assert (np.delete(distance, [3, 4]) > 30).all()


def test_independent_pixels_have_the_classes_means():
    images, labels = toy_digits(2000)
    blind = judge.independent_pixels(images, labels, np.repeat([0, 9], 500))
    assert blind[:500].mean(0) == pytest.approx(images[labels == 0].mean(0), abs=30)
    assert blind[500:].mean() > 3 * blind[:500].mean()


@pytest.mark.parametrize('ground', [(0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 255, 0)])
def test_a_digit_of_the_user(tmp_path, ground):
    """White on black, or on a transparent layer."""
    Image.new('RGBA', (28, 28), ground).save(tmp_path / 'a.png')
    image = Image.open(tmp_path / 'a.png')
    image.paste('white', (4, 8, 8, 12))  # one of 7 x 7 patches
    image.save(tmp_path / 'a.png')
    assert mnist.Dataset.read_image(tmp_path / 'a.png')[0].tolist() == [25 if i == 2 * 7 + 1 else 10 for i in range(49)]


def test_the_folder(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['kind'] == 'rows' and meta['fields'] == dict(tokens=26, image=256, label=10) and meta['prepare'] == 'mnist'
    assert meta['config']['vocab_size'] == 26 and meta['config']['block_size'] == 49 and meta['settings']['views'] == 3
    assert meta['quality']['judge_grey'] > 0.8 and meta['quality']['judge_binary'] > 0.8  # learnt in 100 steps; chance is 0.1
    dataset = mnist.Dataset(folder)
    assert dataset.load('train', 'tokens').shape == (400, 3, 50) and dataset.load('val', 'tokens').shape == (200, 1, 50)
    tokens, images, labels = (dataset.load('val', name) for name in ('tokens', 'image', 'label'))
    assert (tokens[:, 0, 0] == labels).all() and images.dtype == labels.dtype == np.uint8
    assert (mnist.to_tokens(dataset.decode(tokens[:, 0]), labels) == tokens[:, 0]).all()
    assert (dataset.decode(tokens[:, 0]) == mnist.binary(images)).all() and len(dataset.classes) == 10
    with pytest.raises(UserError, match='absent.npy: this data set has no absent; it has image, label, tokens'):
        dataset.load('val', 'absent')
    (folder / 'bad.pt').write_bytes(b'no judge')
    with pytest.raises(UserError, match='bad.pt: missing, truncated or not an evaluation classifier'):
        judge.Judge.load(folder / 'bad.pt')


@pytest.mark.parametrize('size', [14, 28])
def test_scores(folder, size):
    dataset = mnist.Dataset(folder)
    held_out, labels = dataset.real('val', size), dataset.load('val', 'label')
    scores = dataset.score(held_out, labels)
    assert list(scores) == ['accuracy', 'precision', 'recall', 'frechet', 'copies', 'near_copies']
    means = {name: one['value'] if name == 'frechet' else one['parts'][..., 0].mean() for name, one in scores.items()}
    assert means['precision'] == means['recall'] == 1 and means['frechet'] == pytest.approx(0, abs=1e-4)
    assert means['accuracy'] == scores['accuracy']['ceiling'] > 0.8
    assert means['copies'] == scores['copies']['floor'] and 0.05 <= means['near_copies'] == scores['near_copies']['floor']
    assert 0 < scores['frechet']['floor'] < scores['frechet']['baseline']
    assert all(one['parts'].shape == (200, 1, 2) for name, one in scores.items() if name != 'frechet')

    copied = dataset.score(dataset.real('train', size)[:30], dataset.load('train', 'label')[:30])
    assert (copied['copies']['parts'] == 1).all() and copied['copies']['parts'].shape == (30, 1, 2)
    wrong = dataset.score(held_out, (labels + 1) % 10)['accuracy']['parts']
    assert wrong[..., 0].mean() < 0.2
    with pytest.raises(UserError, match='2 images are too few'):
        dataset.score(held_out[:2], labels[:2])


def test_saved_judge_says_the_same(folder, tmp_path):
    one, images = judge.Judge.load(folder / 'judge_binary.pt'), mnist.Dataset(folder).real('val', 14)
    one.save(tmp_path / 'again.pt')
    assert (judge.Judge.load(tmp_path / 'again.pt').logits(images) == one.logits(images)).all()
    assert one.features(images).shape == (200, 64) and one.logits(images).shape == (200, 10)


@pytest.mark.parametrize('fashion, part, n', [(False, 't10k', 10_000), (False, 'train', 60_000), (True, 'train', 60_000)])
def test_real_images(fashion, part, n):
    if not (cache_folder() / ('fashion/' * fashion + f'{part}-images-idx3-ubyte.gz')).is_file():
        pytest.skip('the cache folder does not hold these files')
    images, labels = mnist.read_part(part, fashion)  # checks the contents
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if part == 't10k' else None
    counts = counts or ([6000] * 10 if fashion else [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
    assert np.bincount(labels).tolist() == counts and images.shape == (n, 28, 28)
    assert 0.1 < (mnist.binary(images) > 0).mean() < (0.5 if fashion else 0.2)
