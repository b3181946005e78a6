"""A data set on disk: windows, views, index; damaged arrays; the sums of all arrays; a data set made on its first use."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

import config
import train
from config import UserError
from engine import checkpoints, processes
from prepare import arrays, files, multiclevr, scenes, text, toy2d
from tests.tiny import GPT, losses, run, save_data


def test_stream_windows(tmp_path):
    """Every token but the ends is a target once an epoch, the grid moves from epoch to epoch; each is one in evaluation."""
    meta = save_data(tmp_path, 'stream', np.arange(1000), np.arange(96))
    data = arrays.Data(tmp_path, 'train', meta, ['tokens'], 10)
    first, second = data.take(0, data.n)['tokens'], data.take(data.n, data.n)['tokens']
    assert first.shape == (99, 11) and len(first[:, 1:].unique()) == 990
    assert (first[:, 1:] - first[:, :-1] == 1).all() and set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert torch.equal(data.take(90, 16)['tokens'], torch.cat((first[90:], second[:7])))  # a batch that straddles epochs
    val = arrays.Data(tmp_path, 'val', meta, ['tokens'], 10)
    rows = val.rows(np.arange(val.n))['tokens']
    assert rows[:, 1:][rows[:, 1:] >= 0].tolist() == list(range(1, 96))
    assert rows[-1].tolist() == [90, 91, 92, 93, 94, 95] + [-1] * 5
    with pytest.raises(UserError, match='96 tokens are too few for a context of 96'):
        save_data(tmp_path, 'stream', np.arange(96), np.arange(96))
        arrays.Data(tmp_path, 'train', meta, ['tokens'], 96)


def test_a_stream_needs_a_context(tmp_path):
    (tmp_path / 'train').mkdir()
    np.save(tmp_path / 'train/tokens.npy', np.zeros(9, np.uint8))
    with pytest.raises(UserError, match='block_size=0 must be at least 1'):
        arrays.Data(tmp_path, 'train', dict(kind='stream', fields=dict(tokens=65)), ('tokens',))


def test_views(tmp_path):
    """One view a sample and epoch, the same for a resumed run; evaluation sees the first."""
    array = np.arange(600).reshape(50, 4, 3)
    meta = save_data(tmp_path, 'rows', array, array[:, :1], views={'tokens': 4})
    data = arrays.Data(tmp_path, 'train', meta, ['tokens'])
    rows = torch.cat([data.take(50 * epoch, 50)['tokens'] for epoch in range(30)])
    assert rows.shape == (1500, 3) and (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert all(sorted((rows[50 * e:50 * e + 50, 0] // 12).tolist()) == list(range(50)) for e in range(30))
    assert (rows[:, 0] // 3 % 4).bincount().min() > 300
    assert torch.equal(arrays.Data(tmp_path, 'train', meta, ['tokens']).take(70, 9)['tokens'], rows[70:79])
    val = arrays.Data(tmp_path, 'val', meta, ['tokens'])
    assert torch.equal(val.rows(np.arange(50))['tokens'], torch.from_numpy(array[:, 0]))


def test_reals_and_other_names_on_disk(tmp_path):
    """A field of real numbers beside integers, under another name, without views where another field has them."""
    meta = save_data(tmp_path, 'rows', np.arange(600).reshape(50, 4, 3), np.arange(30).reshape(10, 1, 3), views={'tokens': 4},
                     fields=dict(tokens=1000, point=0), files=dict(point='raw_point'))
    for split, n in (('train', 50), ('val', 10)):
        np.save(tmp_path / split / 'raw_point.npy', np.arange(n)[:, None] / 2)
    batch = arrays.Data(tmp_path, 'train', meta, ['point', 'tokens']).take(0, 8)
    assert batch['point'].dtype == torch.float32 and batch['tokens'].dtype == torch.int64
    assert torch.equal(batch['point'][:, 0] * 2, batch['tokens'][:, 0] // 12)
    with pytest.raises(UserError, match="has no 'image', which this model reads .it has tokens, point"):
        arrays.Data(tmp_path, 'train', meta, ['image'])
    np.save(tmp_path / 'val/raw_point.npy', np.array([[0.0], [np.nan]]))
    with pytest.raises(UserError, match='raw_point.npy: holds values that are not finite'):
        arrays.Data(tmp_path, 'val', meta, ['point'])


def test_rows_that_several_samples_share(tmp_path):
    meta = save_data(tmp_path, 'rows', np.arange(6)[:, None] + [0, 1], np.arange(2)[:, None] + [0, 1], fields=dict(tokens=1000, image=256),
                     index=dict(image='raw_image'))
    np.save(tmp_path / 'train/image.npy', np.array([[10], [20]], np.uint8))
    np.save(tmp_path / 'train/raw_image.npy', np.array([0, 0, 0, 1, 1, 1]))
    batch = arrays.Data(tmp_path, 'train', meta, ['image', 'tokens']).take(0, 6)
    assert torch.equal(batch['image'], 10 + 10 * (batch['tokens'][:, :1] > 2))
    np.save(tmp_path / 'train/raw_image.npy', np.array([0, 0, 0, 1, 1, 2]))
    with pytest.raises(UserError, match='raw_image.npy: token ids run from 0 to 2, outside the vocabulary of 2'):
        arrays.Data(tmp_path, 'train', meta, ['image', 'tokens'])


def test_damaged_data(here):
    scenes = Path('data/scenes')
    rgb = np.load(scenes / 'train/rgb.npy')
    np.save(scenes / 'train/rgb.npy', rgb + 70000)
    with pytest.raises(UserError, match=r'rgb.npy: token ids run from .* outside the vocabulary of 4096'):
        run('out/a')
    np.save(scenes / 'train/rgb.npy', rgb[:50])
    with pytest.raises(UserError, match='the fields differ in length'):
        run('out/a')
    (scenes / 'train/rgb.npy').write_bytes((scenes / 'val/rgb.npy').read_bytes()[:300])
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'train/rgb.npy').unlink()
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'meta.json').write_text('{"kind": "something"}')
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):
        run('out/a')


@pytest.mark.parametrize('entry', [dict(fields=['tokens']), dict(views=['tokens']), dict(views=dict(tokens=0)), dict(views=dict(a=2, b=4)), dict(fields=dict(tokens=9.5)),
                                   dict(files=dict(tokens=3)), dict(index=3), dict(files=dict(tokens='{x}')), dict(files=dict(tokens='{}')), dict(config=[]),
                                   dict(sums=[]), dict(prepare=['x']), dict(kind='stream', views=dict(tokens=2))])
def test_meta_json_of_a_wrong_kind(tmp_path, entry):
    save_data(tmp_path, **dict(kind='rows') | entry, train_array=np.zeros((9, 9), int), val_array=np.zeros((9, 9), int))
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):
        arrays.read_meta(tmp_path)


@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied'), OSError(24, 'Too many open files')])
def test_files_that_the_system_does_not_open(tmp_path, monkeypatch, error):
    """As those of another user: nothing is wrong with them, and none has to be deleted."""
    def refuse(path, mode):
        raise error
    save_data(tmp_path, 'rows', np.zeros((9, 9), int), np.zeros((9, 9), int))
    monkeypatch.setattr(checkpoints, 'open', refuse, raising=False)
    for read in (lambda: arrays.read_meta(tmp_path), lambda: arrays.load(tmp_path / 'train/tokens.npy'),
                 lambda: checkpoints.load_network(tmp_path / 'meta.json', None, 'a network')):
        with pytest.raises(UserError, match=f': cannot be read .{error.strerror}.: get permission to read it, or use another folder$'):
            read()


def test_fields_that_belong_together(tmp_path):
    """Chapter 5: an image token per image, and as many flags as tokens."""
    config = dict(vocab_size=9, block_size=6, image_token=8, image_size=4, channels=3, n_images=1)
    made = dict(image=np.zeros((3, 4, 4, 3), np.uint8), tokens=np.array([[8, 1, 2, 3, 4, -1]] * 3), loss_mask=np.ones((3, 6), int))

    def opened(**changes):
        meta = save_data(tmp_path, 'rows', made['tokens'], made['tokens'], fields=dict(image=256, tokens=9, loss_mask=2), config=config)
        arrays.write(tmp_path / 'train', made | changes)
        return arrays.Data(tmp_path, 'train', meta, ['image', 'tokens', 'loss_mask'])
    assert opened().n == 3
    for tokens in ([[7, 1, 2, 3, 4, -1]] * 3, [[8, 8, 2, 3, 4, -1]] * 3):
        with pytest.raises(UserError, match='tokens.npy: each row must have 1 tokens 8, for its images'):
            opened(tokens=np.array(tokens))
    with pytest.raises(UserError, match=r'loss_mask.npy: \(3, 5\) is not the shape of the tokens, \(3, 6\)'):
        opened(loss_mask=np.ones((3, 5), int))
    meta = save_data(tmp_path, 'rows', np.zeros((3, 9), int), np.zeros((3, 9), int), config=dict(vocab_size=9, grid='3x3', n_classes=2))
    with pytest.raises(UserError, match='is not the shape of rows of 10 to inf'):
        arrays.Data(tmp_path, 'train', meta, ['tokens'])
    meta['config']['block_size'] = 8
    with pytest.raises(UserError, match='is not the shape of rows of 10 to 10 .block_size . 1. tokens; block_size must be at least 9$'):
        arrays.Data(tmp_path, 'train', meta, ['tokens'])


@pytest.mark.parametrize('array', [np.array(3), np.array(['a', 'b']), np.array([None])])
def test_arrays_of_numbers_alone_are_loaded(tmp_path, array):
    """Objects are stored as a pickle, which is never executed."""
    np.save(tmp_path / 'a.npy', array, allow_pickle=True)
    with pytest.raises(UserError, match='a.npy: missing or damaged'):
        arrays.load(tmp_path / 'a.npy')


def refuse(folder, match, field, value, **meta):
    """A data set in which one array is replaced has to be refused in one line."""
    folder.mkdir(exist_ok=True)
    made = dict(image=np.zeros((9, 8, 8, 3), np.uint8), label=np.arange(9) % 3, tokens=np.zeros((9, 17), int),
                point=np.zeros((9, 2)), rgb=np.zeros((9, 2, 16), int)) | {field: value}
    for split in ('train', 'val'):
        arrays.write(folder / split, made)
    config = dict(image_size=8, channels=3, block_size=16, vocab_size=40, modalities='rgb:3*3:4x4') | ({'channels': 2} if field == 'point' else {})
    fields = dict(image=256, label=3, tokens=50, point=0, rgb=20)
    arrays.save_meta(folder, dict(kind='rows', prepare='x', fields=fields, config=config, views=dict(rgb=2)) | meta)
    with pytest.raises(UserError, match=f'train/{field}.npy: .*{match}'):
        arrays.open_splits(folder, arrays.read_meta(folder), [field])


@pytest.mark.parametrize('field, value, match', [
    ('image', np.random.default_rng(0).random((9, 8, 8, 3)), r'real numbers, 0 to 0.9.*, where meta.json has 256 ids: write integ'),
    ('image', np.zeros((9, 8, 8, 3), bool), r'pixels must be integers from 0 to 255'),
    ('tokens', np.ones((9, 17)), 'real numbers, 0 to 1, where meta.json has 40 ids'),
    ('label', np.arange(9) % 4 - 1, 'token ids run from -1 to 2, outside the vocabulary of 3'),
    ('image', np.zeros((9, 8, 8), np.uint8), r'\(9, 8, 8\) is not the shape of 8x8 pixels of 3 channels'),
    ('image', np.zeros((9, 16, 4, 3), np.uint8), r'\(9, 16, 4, 3\) is not the shape of 8x8 pixels of 3 channels'),
    ('point', np.zeros((9, 3)), r'\(9, 3\) is not the shape of points of 2 numbers, \(n, 2\)'),
    ('tokens', np.zeros((9, 18), int), r'\(9, 18\) is not the shape of rows of 2 to 17 .block_size . 1. tokens'),
    ('tokens', np.zeros((9, 2, 8), int), 'is not the shape of rows'),
    ('tokens', np.zeros((9, 1), int), 'is not the shape of rows'),
    ('image', np.zeros((9, 3, 8, 8), np.uint8), 'is not the shape of 8x8 pixels of 3 channels'),
    ('rgb', np.full((9, 2, 16), 9), 'token ids run from 0 to 9, outside the vocabulary of 9'),
    ('tokens', np.full((9, 17), 49), 'token ids run from 0 to 49, outside the vocabulary of 40'),
    ('label', np.zeros((9, 1), int), r'\(9, 1\) is not the shape of labels, \(n,\)'),
    ('rgb', np.zeros((9, 2, 25), int), r'is not the shape of rgb, 4x4 tokens, \(n, 16\)'),
    ('rgb', np.zeros((9, 1, 16), int), r'is not the shape of 2 views, \(n, 2, ...\)'),
    ('point', np.array([[0, 1e300]] * 9), 'holds values that are not finite in float32'),
])
def test_types_of_own_data(tmp_path, field, value, match):
    """Looked at before the first step: each of these was a traceback in the middle of it, or trained on nonsense."""
    refuse(tmp_path / 'data', match, field, value)


@pytest.mark.parametrize('ids', [0, 2])
def test_pixels_are_integers_up_to_255(tmp_path, ids):
    """Real numbers from 0 to 1 and two levels would be all but black."""
    image = np.zeros((9, 8, 8, 3), np.float32 if not ids else np.uint8)
    refuse(tmp_path / 'data', 'pixels must be integers from 0 to 255, and image 256 in the fields of meta.json', 'image', image,
           fields=dict(image=ids))


def test_what_a_message_says_how_to_make(tmp_path, monkeypatch):
    """No script that does not exist, no array of another data set."""
    monkeypatch.chdir(tmp_path)
    save_data(Path('data/mine'), 'rows', np.zeros((9, 9), int), np.zeros((9, 9), int), sums={
        'train/tokens.npy': '', 'train/../../scenes/train/raw_rgb.npy': ''})
    with pytest.raises(UserError, match='this data set has no raw_rgb; it has tokens$'):
        arrays.load('data/mine/train/raw_rgb.npy')
    with pytest.raises(UserError, match='FileNotFoundError|No such file.*; there is no data set in data/none: make it again$'):
        arrays.load('data/none/train/tokens.npy')
    Path('data/mine/meta.json').write_text('{}')
    with pytest.raises(UserError, match='correct it or delete data/mine and make it again$'):
        arrays.read_meta('data/mine')
    Path('prepare').symlink_to(Path(arrays.__file__).parent)
    Path('data/mine').rename('data/text')
    with pytest.raises(UserError, match='correct it or delete data/text and run python -m prepare.text$'):
        arrays.read_meta('data/text')


def test_what_may_be(tmp_path):
    """Padding, shorter rows, grey images with and without an axis of channels, integers as real values, unsigned ids."""
    for field, value, config in (('tokens', np.array([[3, 4, -1, -1, -1]] * 9), dict(block_size=16)), ('label', np.zeros(9, np.uint8), {}),
                                 ('image', np.zeros((9, 8, 8, 1), np.uint8), dict(image_size=8, channels=1)),
                                 ('image', np.zeros((9, 8, 8), '>u2'), dict(image_size=8, channels=1)),
                                 ('tokens', np.zeros((9, 30), int), dict(grid='5x5')), ('point', np.zeros((9, 2), int), {})):
        folder = tmp_path / f'{field}{value.ndim}{len(config)}'
        for split in ('train', 'val'):
            arrays.write(folder / split, {field: value})
        arrays.save_meta(folder, dict(kind='rows', prepare='x', fields={field: 0 if field == 'point' else 256}, config=config))
        train, _ = arrays.open_splits(folder, arrays.read_meta(folder), [field])
        assert train.take(0, 4)[field].dtype == (torch.float32 if field == 'point' else torch.int64)
    with pytest.raises(UserError, match='is not the shape of a stream'):
        meta = save_data(tmp_path / 'stream', 'stream', np.zeros((9, 9), int), np.zeros(9, int))
        arrays.Data(tmp_path / 'stream', 'train', meta, ['tokens'], 4)
    with pytest.raises(UserError, match='train: holds no samples'):
        meta = save_data(tmp_path / 'rows', 'rows', np.zeros((0, 9), int), np.zeros((0, 9), int))
        arrays.Data(tmp_path / 'rows', 'train', meta, ['tokens'], 16)


def test_every_row_has_a_target(tmp_path):
    """Padding alone, or a loss mask of zeros: the loss of such a row would be 0 without a word, of such a batch not a number."""
    def opened(fields, config, **made):
        meta = save_data(tmp_path, 'rows', np.zeros((3, 4), int), np.zeros((3, 4), int), fields=fields, config=config)
        arrays.write(tmp_path / 'train', {name: np.array(array) for name, array in made.items()})
        return arrays.Data(tmp_path, 'train', meta, [*fields])
    text, talk, chain = (dict(tokens=9), dict(vocab_size=9)), (dict(tokens=9, loss_mask=2), {}), (
        dict(a=8, b=9), dict(modalities='a:8:2x2 b:9:2'))
    digits = dict(tokens=9), dict(vocab_size=9, grid='1x3', n_classes=2)
    full, none = [[1, 2, 3, 4]] * 3, [[1, -1, -1, -1]] * 2 + [[-1] * 4]
    assert opened(*text, tokens=full).n == opened(*talk, tokens=full, loss_mask=[[0, 0, 1, 0]] * 3).n == 3
    assert opened(*chain, a=full, b=[[-1, -1]] * 3).n == opened(*chain, a=[[-1] * 4] * 3, b=[[1, -1]] * 3).n == 3
    for match, case, made in (
            ('tokens.npy: 3 of 3 rows have no target, row 0 first: only padding .-1.$', text, dict(tokens=none)),
            ('tokens.npy: 1 of 3 rows have no target, row 2 first', text, dict(tokens=full[:2] + none[2:])),
            ('tokens.npy: 3 of 3 rows have no target', digits, dict(tokens=[[1, -1, -1, -1]] * 3)),
            ('a.npy: 1 of 3 rows have no target, row 1 first', chain, dict(a=[[1] * 4, [-1] * 4, [1] * 4], b=[[-1, -1]] * 3)),
            ('loss_mask.npy: 3 of 3 rows have no target, .* or a loss mask of 0', talk, dict(tokens=full, loss_mask=[[0] * 4] * 3)),
            ('loss_mask.npy: 3 of 3 rows', talk, dict(tokens=full, loss_mask=[[1, 0, 0, 0]] * 3)),  # nothing predicts the first
            ('loss_mask.npy: 3 of 3 rows', talk, dict(tokens=[[1, 2, 3, -1]] * 3, loss_mask=[[0, 0, 0, 1]] * 3)),
            ('tokens.npy: each row must begin with its class, from 0 to 1', digits, dict(tokens=[[1, 2, 3, 4], [2, 2, 3, 4]] * 3)),
            ('tokens.npy: each row must begin with its class', digits, dict(tokens=[[1, 2, 3, 4], [-1, 2, 3, 4]] * 3))):
        with pytest.raises(UserError, match=f'train/{match}') as error:
            opened(*case, **made)
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='token ids run from -1 to 0, outside the vocabulary of 1000'):  # a stream has no padding
        arrays.Data(tmp_path, 'train', save_data(tmp_path, 'stream', np.zeros(99, int) - np.eye(1, 99, 5, int)[0], np.zeros(99, int)),
                    ['tokens'], 8)


# ---------------------------------------------------------------------------------------------------------------------
# Other data

def write_text(letters, path='a.txt'):
    Path(path).write_text(letters * 300)
    text.main(input=path, out='data/toy')


def test_data_that_are_made_again_under_a_run(tmp_path, monkeypatch, capsys):
    """The run goes on with what it has opened, says so in a line, and is not resumed on the other data."""
    monkeypatch.chdir(tmp_path)
    write_text('abcdefgh')
    settings = GPT | dict(dataset='toy', eval_interval=2, max_iters=6)
    whole = train.main(out_dir='out/a', **settings)
    evaluate, calls = train.evaluate, []

    def evaluate_and_rebuild(*arguments):
        calls.append(0)
        if len(calls) == 3:
            write_text('hgfedcba')  # of the same size and alphabet
        return evaluate(*arguments)
    monkeypatch.setattr(train, 'evaluate', evaluate_and_rebuild)
    capsys.readouterr()
    assert train.main(out_dir='out/b', **settings) == whole and losses('out/a') == losses('out/b')
    said = [line for line in capsys.readouterr().out.splitlines() if 'made again' in line]
    assert said == [f'step {step}: data/toy has been made again: train/tokens.npy has other contents. Training continues with the '
                    'data that it began with, without samples' for step in (4, 6)]
    with pytest.raises(UserError, match='data/toy is not the data that this run was trained on .train/tokens.npy has other'):
        train.main(out_dir='out/b', **settings | dict(max_iters=8))
    write_text('abcdefgh', 'b.txt')  # the same again, from another path
    train.main(out_dir='out/b', **settings | dict(max_iters=8))
    Path('data/toy/meta.json').unlink()
    assert arrays.changed('data/toy', {}) == 'data/toy is being made again'


def test_data_without_sums_are_not_compared(tmp_path, monkeypatch):
    """Older data sets and checkpoints have none."""
    monkeypatch.chdir(tmp_path)
    write_text('abcdefgh')
    path = Path('data/toy/meta.json')
    with_sums = path.read_text()
    meta = json.loads(with_sums)
    path.write_text(json.dumps({name: value for name, value in meta.items() if name != 'sums'}))
    train.main(out_dir='out/a', **GPT)
    path.write_text(with_sums)
    train.main(out_dir='out/a', **GPT | dict(max_iters=4))
    train.main(out_dir='out/c', init_from='out/a', **GPT | dict(max_iters=4))


def test_another_version_between_two_arrays(tmp_path, monkeypatch):
    """A rebuild while a run opens its arrays."""
    monkeypatch.chdir(tmp_path)
    write_text('abcdefgh')
    load, meta = arrays.load, arrays.read_meta('data/toy')
    monkeypatch.setattr(arrays, 'load', lambda path: load(path) if 'train' in str(path) else write_text('hgfedcba') or load(path))
    with pytest.raises(UserError, match='data/toy has been made again: .*: run this again'):
        arrays.open_splits('data/toy', meta, ['tokens'], 8)


def test_data_that_refer_to_other_data(tmp_path, monkeypatch):
    """Questions about images that have been rendered again since are not used."""
    monkeypatch.chdir(tmp_path)

    def write_images(value):
        for split in ('train', 'val'):
            arrays.write(Path('data/images', split), dict(raw=np.full((4, 8, 8), value, np.uint8)))
        arrays.save_meta('data/images', dict(kind='rows', prepare='x', fields=dict(raw=256), config={}))
    write_images(1)
    for split in ('train', 'val'):
        arrays.write(Path('data/asked', split), dict(tokens=np.zeros((4, 9), int)))
    meta = dict(kind='rows', prepare='asked', fields=dict(tokens=9, image=256), config={}, files=dict(image='../../images/{split}/raw'))
    arrays.save_meta('data/asked', meta)
    folder, meta = Path('data/asked'), arrays.read_meta('data/asked')
    assert len(meta['sums']) == 4
    assert arrays.agree(folder, meta, None) == meta and not arrays.changed(folder, meta)
    write_images(2)
    with pytest.raises(UserError, match='data/asked was made from other data than data/images holds now: run python -m prepare.asked'):
        arrays.agree(folder, meta, None)
    write_images(1)
    arrays.agree(folder, meta, None)


def test_a_full_disk(tmp_path, monkeypatch):
    """The file is named, and the older one is still there."""
    arrays.write(tmp_path / 'train', dict(a=np.arange(3)))

    def full(file, array):
        file.write(b'some')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(arrays.np, 'save', full)
    with pytest.raises(UserError, match='train/a.npy: cannot be written .No space left on device.; free disk space, or'):
        arrays.write(tmp_path / 'train', dict(a=np.arange(4)))
    assert arrays.load(tmp_path / 'train/a.npy').shape == (3,)
    assert [path.name for path in (tmp_path / 'train').iterdir()] == ['a.npy']


def test_links_to_other_disks(tmp_path, monkeypatch):
    """A split whose folder is a link is in the sums, and a rebuild of it removes meta.json."""
    monkeypatch.chdir(tmp_path)
    Path('data/toy').mkdir(parents=True), Path('big').mkdir()
    Path('data/toy/train').symlink_to(tmp_path / 'big')
    write_text('abcdefgh')
    assert {*arrays.read_meta('data/toy')['sums']} == {'encoding.json', 'train/tokens.npy', 'val/tokens.npy'}
    arrays.write('data/toy/train', dict(tokens=np.arange(3)))
    assert not Path('data/toy/meta.json').exists() and len(np.load('big/tokens.npy')) == 3
    files.release('data/toy')


def test_rows_one_by_one(tmp_path):
    whole = np.random.default_rng(0).integers(0, 99, (1234, 5, 3)).astype(np.int16)
    arrays.write_rows(tmp_path / 'train', 'a', iter(whole))
    assert (np.load(tmp_path / 'train/a.npy') == whole).all()
    with pytest.raises(UserError, match='nothing is left to write as b'):
        arrays.write_rows(tmp_path / 'train', 'b', iter([]))


def test_other_data_than_the_runs_own(here):
    """Without sums, settings are compared."""
    path = Path('data/scenes/meta.json')
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != 'sums'}))
    run('out/a', max_iters=3)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    with pytest.raises(UserError, match='data/scenes is not the data that this run was trained on'):
        run('out/a')


def test_data_to_which_a_modality_was_added_are_still_the_runs(here):
    run('out/a', max_iters=1)
    path = Path('data/scenes/meta.json')
    meta = json.loads(path.read_text())
    meta['fields']['grey'] = 256
    meta['config']['modalities'] += ' grey:256:4x4'
    path.write_text(json.dumps(meta))
    assert run('out/a', max_iters=2)['loss_rgb'] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Sums

def sums():
    return subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd='data/scenes', capture_output=True, text=True)


def test_sums_of_all_arrays(here):
    """`sha256sum -c SHA256SUMS` in the data folder, as the pages say it: right as made, a changed file is found by its name."""
    shutil.copyfile('data/scenes/rgb.pt', 'rgb.pt')
    done = sums()
    listed = [line.partition('  ')[2] for line in Path('data/scenes/SHA256SUMS').read_text().splitlines()]
    assert done.returncode == 0 and done.stdout.count(': OK\n') == len(listed)
    assert [name for name in listed if name.endswith('.npy')] == sorted(
        path.relative_to('data/scenes').as_posix() for path in Path('data/scenes').rglob('*.npy'))
    assert [name for name in listed if not name.endswith('.npy')] == [
        'caption.json', 'depth.pt', 'normal.pt', 'rgb.pt', 'scene_desc.json', 'segmentation.pt']  # vocabularies and tokenizers
    Path('data/scenes/rgb.pt').write_bytes(Path('data/scenes/depth.pt').read_bytes())
    with pytest.raises(UserError, match='rgb.pt has changed since this data set was made: restore it, or delete data/scenes to'):
        arrays.open_dataset(Path('data/scenes'), arrays.read_meta('data/scenes'))
    assert 'rgb.pt: FAILED' in sums().stdout
    shutil.copyfile('rgb.pt', 'data/scenes/rgb.pt')
    path = Path('data/scenes/val/rgb.npy')
    tokens = np.load(path)
    tokens.flat[7] = (tokens.flat[7] + 1) % 100  # a legal token, but another one
    np.save(path, tokens)
    done = sums()
    wrong = [line for line in done.stdout.splitlines() if not line.endswith(': OK')]
    assert done.returncode == 1 and wrong == ['val/rgb.npy: FAILED']
    path.unlink()
    assert sums().returncode == 1 and 'val/rgb.npy: FAILED open or read' in sums().stdout


def test_meta_json_comes_last_and_at_once(tmp_path, monkeypatch):
    """Its presence says that the data set is complete: removed first, written last; one that is replaced is never incomplete."""
    (tmp_path / 'meta.json').write_text('older')
    arrays.begin(tmp_path)
    with pytest.raises(UserError, match='nothing is left to write'):
        arrays.write_rows(tmp_path / 'train', 'a', iter([]))
    assert (tmp_path / 'meta.json').read_text() == 'older'
    arrays.write(tmp_path / 'train', dict(a=np.arange(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lock', 'train']
    meta = dict(kind='rows', prepare='text', fields={}, config={})
    replaced = []
    monkeypatch.setattr(arrays.os, 'replace', lambda new, path, replace=os.replace: replaced.append(
        (path.name, new.read_text())) or replace(new, path))
    arrays.save_meta(tmp_path, meta)
    digest = hashlib.sha256((tmp_path / 'train/a.npy').read_bytes()).hexdigest()
    assert [name for name, _ in replaced] == ['SHA256SUMS', 'meta.json']
    assert json.loads(replaced[1][1]) == meta | dict(sums={'train/a.npy': digest})
    assert replaced[0][1] == f'{digest}  train/a.npy\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['SHA256SUMS', 'lock', 'meta.json', 'train']
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):  # it has no fields
        arrays.read_meta(tmp_path)


MAKER = """
import sys
from pathlib import Path
import numpy as np
import config
from prepare import arrays

def main():
    arrays.write(Path('data/x/train'), dict(a=np.arange(3)))
    print('begun', flush=True)
    sys.stdin.read()
    arrays.save_meta('data/x', dict(kind='rows', prepare='x', fields=dict(a=3), config={}))
config.run(main)
"""


def test_one_process_makes_a_data_set(tmp_path, monkeypatch):
    """A second one is refused; after a kill the next may start, and arrays of both without a meta.json are no data set."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | dict(PYTHONPATH=str(Path(arrays.__file__).parent.parent))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    first = subprocess.Popen([sys.executable, '-c', MAKER], **pipes)
    assert first.stdout.readline() == 'begun\n'
    with pytest.raises(UserError, match='data/x: another process is making this data set'):
        arrays.begin('data/x')
    first.kill(), first.wait()
    assert not Path('data/x/meta.json').exists()
    second = subprocess.Popen([sys.executable, '-c', MAKER], **pipes)
    assert second.communicate()[1] == '' and second.returncode == 0 and arrays.read_meta('data/x')['prepare'] == 'x'
    with pytest.raises(UserError, match='data/x holds a data set of prepare/x.py: choose another --out='):
        arrays.begin('data/x', 'text')
    for folder in 'data', 'data/x/y':
        with pytest.raises(UserError, match=f'^{folder} holds other data sets, or is inside one: choose another --out='):
            arrays.begin(folder, 'text')
    assert not Path('data/x/y').exists()
    assert Path('data/x/meta.json').exists()
    arrays.begin('data/x', 'x', keep_meta=True)
    assert Path('data/x/meta.json').exists()


@pytest.mark.parametrize('off', [torch.inference_mode, torch.no_grad])
def test_a_script_can_train_networks(off):
    """Whatever an earlier cell of a notebook has switched off."""
    @files.making()
    def main():
        return torch.ones(1, requires_grad=True).sum().requires_grad
    with off():
        assert main() and not torch.is_grad_enabled()


def test_a_field_that_a_data_set_never_had(tmp_path):
    arrays.write(tmp_path / 'train', dict(a=np.arange(3)))
    arrays.save_meta(tmp_path, dict(kind='rows', prepare='text', fields=dict(a=3), config={}))
    with pytest.raises(UserError, match='train/label.npy: this data set has no label; it has a$'):
        arrays.load(tmp_path / 'train/label.npy')
    (tmp_path / 'train/a.npy').unlink()
    with pytest.raises(UserError, match='a.npy: missing or damaged .* delete'):
        arrays.load(tmp_path / 'train/a.npy')


def test_a_rebuild_that_fails_keeps_the_older_data_set(tmp_path, monkeypatch):
    """Whatever fails before the first array is written."""
    monkeypatch.chdir(tmp_path)
    toy2d.main(n_train=20, n_val=10)
    before = Path('data/toy2d/meta.json').read_bytes()

    def fail(n, random):
        raise MemoryError('Unable to allocate 14.6 TiB')
    monkeypatch.setitem(toy2d.DRAW, 'gaussians', fail)
    monkeypatch.setattr(sys, 'argv', ['toy2d'])
    with pytest.raises(SystemExit, match='error: not enough memory .Unable to allocate 14.6 TiB.: choose smaller sizes'):
        config.run(toy2d.main)
    assert Path('data/toy2d/meta.json').read_bytes() == before
    with pytest.raises(UserError, match='n_train=1000000000000: must be at most'):
        toy2d.main(n_train=1e12)


def test_a_data_set_of_another_script_is_no_own_one(tmp_path):
    arrays.write(tmp_path / 'train', dict(a=np.arange(3)))
    arrays.save_meta(tmp_path, dict(kind='rows', prepare='text', fields=dict(a=3), config={}, settings={}))
    for main in (lambda: multiclevr.main(source='docs', out=tmp_path), lambda: scenes.main(out=tmp_path, n_train=3, extra='grey')):
        with pytest.raises(UserError, match='holds a data set of prepare/text.py: choose another --out='):
            main()
    assert (tmp_path / 'meta.json').is_file()


def test_arrays_are_replaced_under_a_reader(tmp_path):
    """A run that has mapped the older file keeps reading it, where a truncated file would end the process (SIGBUS)."""
    arrays.write(tmp_path / 'train', dict(a=np.arange(100_000)))
    mapped = arrays.load(tmp_path / 'train/a.npy')
    arrays.write(tmp_path / 'train', dict(a=np.zeros(3, int)))
    assert mapped[99_999] == 99_999 and arrays.load(tmp_path / 'train/a.npy').shape == (3,)
    assert [path.name for path in (tmp_path / 'train').iterdir()] == ['a.npy']


# ---------------------------------------------------------------------------------------------------------------------
# Made on first use

def test_only_scripts_that_make_a_data_set_are_run(here, monkeypatch):
    """A module of prepare/ with another purpose, or one that makes weights, is no data set."""
    monkeypatch.setattr(processes.subprocess, 'run', lambda *arguments: pytest.fail(f'ran {arguments}'))
    for name in ('transfer', 'judge', 'scenes_parser', 'image_tokenizers', 'download', 'siglip', 'smollm2', 'arrays', '__init__'):
        with pytest.raises(UserError, match=f"dataset='{name}': .* nor a script prepare/{name}.py that makes it"):
            arrays.find(name)
    for name in ('data/mnist', 'data\\mnist'):
        with pytest.raises(UserError, match='; leave out the data/ before the name$'):
            arrays.find(name)


def test_every_script_makes_what_its_name_says():
    """make_once waits for data/NAME/meta.json or out/NAME/ckpt_last.pt; a program without MAKES makes neither."""
    folder = Path(arrays.__file__).parent
    made = {}
    for path in folder.glob('*.py'):
        made[path.stem] = [line for line in path.read_text().splitlines() if line.startswith('MAKES = ')]
        if '__main__' not in path.read_text():
            assert not made[path.stem], path
    for name, line in made.items():
        assert line in ([], [f"MAKES = 'data/{name}'"], [f"MAKES = 'out/{name}'"]), name
    assert {name for name, line in made.items() if "MAKES = 'out/" in ''.join(line)} == {'siglip', 'smollm2'}
    assert len([name for name, line in made.items() if line]) >= 15


def test_the_module_that_made_the_data(here):
    meta = arrays.read_meta('data/scenes')
    assert type(arrays.open_dataset(Path('data/scenes'), meta)).__module__ == 'prepare.scenes'
    for name in ('sneaky', '../train', 'download', 'os'):
        with pytest.raises(UserError, match='data/scenes was made by prepare/'):
            arrays.open_dataset(Path('data/scenes'), meta | dict(prepare=name))


def test_no_folder_stays_locked_after_an_error(tmp_path, monkeypatch):
    """In a notebook, where the process lives on: another process may make the data set."""
    monkeypatch.chdir(tmp_path)
    Path('short.txt').write_text('too short', encoding='utf-8')
    before = {*arrays.LOCKS}
    with pytest.raises(UserError):
        text.main(input='short.txt', out='data/x', val_share=0.0)
    with FileLock(Path('data/x/lock')).acquire(timeout=0):
        assert {*arrays.LOCKS} == before


def test_a_file_that_another_program_reads(tmp_path, monkeypatch):
    """As on Windows: the older data set stays complete."""
    monkeypatch.chdir(tmp_path)
    write_text('abcdefgh')
    before = Path('data/toy/meta.json').read_bytes()

    def refuse(new, path):
        raise PermissionError(13, 'Access is denied')
    monkeypatch.setattr(files, 'replace', refuse)
    arrays.begin('data/toy')
    with pytest.raises(UserError, match='train/tokens.npy: cannot be written .Access is denied.; get permission, end a program that reads it, or'):
        arrays.write('data/toy/train', dict(tokens=np.zeros(4, np.uint8)))
    arrays.release('data/toy')
    assert Path('data/toy/meta.json').read_bytes() == before
