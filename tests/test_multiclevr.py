"""MultiCLEVR's layout on a generated tree: packed, checked, gone on with, trained on, drawn."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from config import UserError
from lab import score
from prepare import multiclevr
from prepare.scenes import caption, scene_desc


def make_tree(root, **splits):
    """The course's layout with random tokens and true grammar; objects move from crop to crop, and some leave the picture."""
    random = np.random.default_rng(0)
    for split, n in splits.items():
        for folder in multiclevr.FOLDERS.values():
            os.makedirs(f'{root}/{split}/{folder}')
        for i in range(n):
            for name in multiclevr.IMAGES:
                np.save(f'{root}/{split}/{multiclevr.FOLDERS[name]}/{i:06d}.npy', random.integers(0, 64000, (10, 256)))
            count = random.integers(3, 11)
            objects = np.stack([random.integers(0, many, count) for many in (3, 8, 2, 2, 225, 225)], 1)
            crops = [objects[:max(1, len(objects) - crop // 3)] + [0, 0, 0, 0, -crop, crop] for crop in range(10)]
            for name, tell in (('scene_desc', scene_desc), ('caption', caption)):
                Path(f'{root}/{split}/{name}/{i:06d}.json').write_text(json.dumps([tell(crop.tolist()) for crop in crops]))


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp('tree')
    make_tree(root, train=60, val=7, test=5)
    return root


@pytest.fixture
def faulty(tree, tmp_path):
    """A copy of the tree to damage."""
    return Path(shutil.copytree(tree, tmp_path / 'source'))


def pack(source, out, **settings):
    multiclevr.main(source=str(source), out=str(out), workers=1, **settings)


@pytest.fixture(scope='module')
def packed(tree, tmp_path_factory):
    """A working folder with data/multiclevr."""
    folder = tmp_path_factory.mktemp('work')
    before = Path.cwd()
    (folder / 'prepare').symlink_to(before / 'prepare')
    os.chdir(folder)
    pack(tree, 'data/multiclevr')
    yield Path('data/multiclevr')
    os.chdir(before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob('*')) if path.is_file()}


def test_everything_is_packed(tree, packed):
    meta = json.loads((packed / 'meta.json').read_text())
    assert list(meta['fields']) == [*multiclevr.IMAGES, *multiclevr.TEXTS] and set(meta['views'].values()) == {10}
    dataset = multiclevr.Dataset(packed)
    for split, n in dict(train=60, val=7, test=5).items():
        assert not (packed / split / 'texts.jsonl').exists()
        for name, folder in multiclevr.FOLDERS.items():
            whole = np.load(packed / split / f'{name}.npy', mmap_mode='r')
            assert whole.shape[:2] == (n, 10) and whole.max() < meta['fields'][name]
            for i in (0, n - 1):
                path = tree / split / folder / f'{i:06d}'
                if name in multiclevr.IMAGES:
                    assert (np.load(path.with_suffix('.npy')) == whole[i]).all()
                else:
                    texts = json.loads(path.with_suffix('.json').read_text())
                    assert dataset.decode(name, torch.from_numpy(np.array(whole[i]))) == texts
    assert (whole < 0).any() and ((whole >= 256) | np.isin(whole, [-1, ord('a'), ord(',')])).all()  # captions are words


def test_a_stopped_run_goes_on(tree, packed, tmp_path, monkeypatch):
    class Stop(Exception):
        pass
    read, calls = multiclevr.read_texts, []

    def stopping(path):
        calls.append(path)
        if len(calls) == 2 * 52:
            raise Stop
        return read(path)
    monkeypatch.setattr(multiclevr, 'read_texts', stopping)
    with pytest.raises(Stop):
        pack(tree, tmp_path / 'out')
    (first,) = [path for path in contents(tmp_path / 'out') if path.suffix == '.jsonl']
    with open(tmp_path / 'out' / first, 'a') as file:
        file.write('["000050", ["cut of')
    calls.clear()
    pack(tree, tmp_path / 'out')
    assert len(calls) == 2 * (10 + 7 + 5)  # only what was left
    assert contents(tmp_path / 'out') == contents(packed)
    pack('', tmp_path / 'out')  # complete: nothing is read or written
    assert contents(tmp_path / 'out') == contents(packed)


def test_another_source_is_no_continuation(tree, faulty, tmp_path):
    (faulty / 'val/caption/000003.json').write_text('[]')
    with pytest.raises(UserError, match='000003.json: expected a list of 10 strings'):
        pack(faulty, tmp_path / 'out')
    for folder in multiclevr.FOLDERS.values():
        (path,) = (faulty / 'train' / folder).glob('000000.*')
        path.unlink()
    with pytest.raises(UserError, match='begun with other samples'):
        pack(faulty, tmp_path / 'out')
    for damaged in (b'\x00\xff\n', b'3\n', b'[]\n'):
        (tmp_path / 'out/train/texts.jsonl').write_bytes(damaged)
        with pytest.raises(UserError, match='texts.jsonl: damaged, or begun with other samples'):
            pack(tree, tmp_path / 'out')


def test_workers_pack_the_same(tree, packed, tmp_path):
    multiclevr.main(source=str(tree), out=str(tmp_path / 'out'), workers=2)
    assert contents(tmp_path / 'out') == contents(packed)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize('file, damage, line', [
    ('train/tok_rgb@256/000004.npy', Path.unlink, r'tok_rgb@256/000004.npy: missing, while other fields have this'),
    ('train/tok_depth@256/000004.npy', truncate, 'tok_depth@256/000004.npy: unreadable, truncated'),
    ('train/tok_depth@256/000004.npy', lambda path: path.write_bytes(b''), '000004.npy: unreadable, truncated'),
    ('train/tok_normal@256/000004.npy', lambda path: np.save(path, np.zeros((10, 16, 16), int)),
     r'000004.npy: int64 of shape \(10, 16, 16\), expected integers of shape \(10, 256\)'),
    ('train/tok_normal@256/000004.npy', lambda path: np.save(path, np.zeros((10, 256))), '000004.npy: float64 of shape'),
    ('train/tok_rgb@256/000004.npy', lambda path: np.save(path, np.full((10, 256), 64000)), 'tokens from 64000 to 64000, exp'),
    ('train/tok_rgb@256/000004.npy', lambda path: np.save(path, np.full((10, 256), -1)), 'tokens from -1 to -1'),
    ('val/caption/000004.json', lambda path: path.write_text('["a",'), 'caption/000004.json: unreadable or no JSON'),
    ('val/scene_desc/000004.json', lambda path: path.write_text('["a", 1]'), '000004.json: expected a list of 10 strings'),
    ('val/scene_desc/000004.json', lambda path: path.write_text(json.dumps(['x' * 2001] * 10)), 'a text of 2,001 characters'),
    ('val/scene_desc/000004.json', lambda path: path.write_bytes(b'\xff'), '000004.json: unreadable or no JSON'),
])
def test_faults_are_named(faulty, tmp_path, file, damage, line):
    damage(faulty / file)
    with pytest.raises(UserError, match=line):
        pack(faulty, tmp_path / 'out')


def test_folders_are_checked_first(faulty, tmp_path):
    shutil.rmtree(faulty / 'val/tok_depth@256')
    with pytest.raises(UserError, match='val/tok_depth@256: no such folder; --source=ROOT'):
        pack(faulty, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(UserError, match='no public download'):
        pack('', tmp_path / 'out')
    with pytest.raises(UserError, match='no such file'):
        pack(faulty, tmp_path / 'out', decoder='absent.jit')


def test_column_major_and_other_integers(faulty, tmp_path):
    tokens = np.arange(2560).reshape(10, 256)
    for dtype in (np.int32, np.uint16, '>i8'):
        np.save(tmp_path / 'x.npy', tokens.astype(dtype))
        assert (multiclevr.read_tokens(tmp_path / 'x.npy') == tokens).all()
        np.save(tmp_path / 'x.npy', np.asfortranarray(tokens.astype(dtype)))
        assert (multiclevr.read_tokens(tmp_path / 'x.npy') == tokens).all()


RUN = dict(model='fourm', dataset='multiclevr', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2, num_input_tokens='32',
           num_target_tokens='32', batch_size=4, max_iters=2, device='cpu', dtype='float32', compile=False, out_dir='out/clevr')


def test_a_run(packed, capsys):
    """Training with pictures, a chain, a user's text, scores; then with a decoder."""
    values = train.main(**RUN)
    assert np.isfinite(list(values.values())).all()
    first = json.loads(Path('out/clevr/log.jsonl').read_text().splitlines()[0])
    assert first['val_loss_rgb'] == pytest.approx(np.log(64000), abs=1e-4)
    assert Image.open('out/clevr/sample_000002.png').size == (12 * 260 - 4, 18 + 6 * 260 - 4)
    sample.main('--out_dir=out/clevr', '--n=2', '--chain=rgb>depth:2,caption')
    sample.main('--out_dir=out/clevr', '--n=2', '--given=caption', '--text=a large red metal cube', '--target=scene_desc')
    assert 'caption: a large red metal cube\n' in capsys.readouterr().out
    scores = score.main('--out_dir=out/clevr', '--n_score=4', '--given=scene_desc', '--target=rgb,caption')
    assert scores['scene_desc>caption/objects']['ceiling'] == scores['scene_desc>rgb/tokens']['ceiling'] == 1
    assert scores['scene_desc>rgb/digits']['baseline'] > scores['scene_desc>rgb/tokens']['baseline']
    with pytest.raises(UserError, match='own.png: images of your own need'):
        sample.main('--out_dir=out/clevr', '--given=rgb', '--image=own.png', '--target=depth')


class Decoder(torch.nn.Module):
    """16x16 tokens -> a picture as grey as the token is large."""
    def forward(self, tokens):
        grey = tokens.float() / 32000 - 1
        return grey[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)


def test_an_external_decoder(packed, tmp_path):
    torch.jit.script(Decoder()).save(tmp_path / 'decoder.jit')
    before = contents(packed)
    multiclevr.main(out=str(packed), decoder=str(tmp_path / 'decoder.jit'))
    dataset = multiclevr.Dataset(packed)
    raw = dataset.truth('val', 'rgb', [0])[0]
    picture = dataset.picture('rgb', raw)
    assert picture.shape == (128, 128, 3) and abs(picture[::8, ::8, 0].flatten() - raw / 32000 * 127.5).max() <= 1
    (packed / 'decoder.jit').write_bytes(b'no program')
    with pytest.raises(UserError, match='decoder.jit: not a TorchScript file'):
        multiclevr.Dataset(packed).picture('rgb', raw)
    torch.jit.script(torch.nn.Linear(2, 2)).save(packed / 'decoder.jit')
    with pytest.raises(UserError, match='decoder.jit: cannot turn integers'):
        multiclevr.Dataset(packed).picture('rgb', raw)
    (packed / 'decoder.jit').unlink()
    assert contents(packed) == before


def test_captions_of_another_grammar(tree, tmp_path):
    """Words outside any grammar of ours: packed, drawn, scored."""
    source = Path(shutil.copytree(tree, tmp_path / 'source'))
    for path in source.glob('*/caption/*.json'):
        path.write_text(json.dumps(['There is nothing here, élan!'] * 10))
    pack(source, tmp_path / 'out')
    dataset = multiclevr.Dataset(tmp_path / 'out')
    texts = dataset.truth('val', 'caption', np.arange(3))
    assert texts == ['There is nothing here, élan!'] * 3
    assert dataset.baseline('caption', 'val', [0]) == [''] and dataset.picture('caption', texts[0]).ndim == 3
    assert dataset.score('caption', texts, 'val', np.arange(3))['scenes'].tolist() == [[[1, 0]]] * 3
