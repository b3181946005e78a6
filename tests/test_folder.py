"""A folder of pictures of all kinds: modalities, faults, a run."""
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from config import UserError
from lab import score
from prepare import folder, pictures
from prepare.files import tell
from prepare.folder import shorten
from prepare.pictures import COLORS, MAKE, color_tokens, edges, grey, low, palette, squares, token_colors
from prepare.text_tokenizers import train_bpe

HALVES = np.zeros((1, 16, 16, 3), np.uint8)  # left black, right red
HALVES[:, :, 8:, 0] = 255


def make_folder(root):
    """24 pictures in several modes and formats, and five that cannot be used."""
    random, modes = np.random.default_rng(0), ('RGB', 'RGBA', 'L', 'CMYK', 'P', 'LA', '1')
    (root / 'more').mkdir(parents=True)
    for i in range(24):
        mode = modes[i % len(modes)]
        pixels = random.integers(0, 128, (20, 30, 1)) + np.linspace(0, 120, 30)[:, None] * random.random(3)
        path = root / ('more' if i % 2 else '') / f'{i}{".JPG" if mode in ("RGB", "CMYK", "L") else ".png"}'
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)
        path.with_suffix('.txt').write_text(f'a {mode} picture,\nthe number {i} of all')
    (root / 'cut.jpg').write_bytes(path.read_bytes()[:-100])
    (root / 'text.jpg').write_text('no picture')
    Image.new('RGB', (8, 8)).save(root / 'latin.png')
    for name in ('cut', 'text', 'gone'):
        (root / f'{name}.txt').write_text('a caption')
    (root / 'latin.txt').write_bytes('élan'.encode('latin-1'))
    Image.new('RGB', (8, 8)).save(root / 'mute.png')


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A working folder with data/folder."""
    here, before = tmp_path_factory.mktemp('work'), Path.cwd()
    (here / 'prepare').symlink_to(before / 'prepare')
    os.chdir(here)
    make_folder(here / 'mine')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.train_tokenizer, '__defaults__', (0, 8))  # pictures a step
        folder.main('--source=mine', size=32, views=2, steps=4)
    yield here
    os.chdir(before)


def test_modalities():
    assert grey(HALVES)[0, 0, ::15, 0].tolist() == [0, 76]
    found = edges(HALVES)[0, :, :, 0]
    assert (found[:, 7:9] == int(4 * 76 / 3.2)).all() and found.sum() == 2 * found[:, 7].sum()  # the seam and nothing else
    assert (edges(HALVES.swapaxes(1, 2))[0, :, :, 0] == found.T).all()
    colors = palette(HALVES)[0, 0]
    assert colors.shape == (5, 3) and {tuple(color) for color in colors.tolist()} == {(0, 0, 0), (255, 0, 0)}
    small = low(HALVES)
    assert small.shape == (1, 8, 8, 3) and small[0, 0, ::7, 0].tolist() == [0, 255]
    assert color_tokens(small)[0, ::7][:2].tolist() == [0, 15 * 256]
    pixels = 17 * np.random.default_rng(0).integers(0, 16, (2, 1, 5, 3)).astype(np.uint8)
    assert (token_colors(color_tokens(pixels), (1, 5)) == pixels).all()


def test_views_are_squares():
    wide = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    views = squares(wide, 10, 20, np.random.default_rng(0))
    assert views.shape == (20, 10, 10, 3) and views[0].mean() == pytest.approx(44.5, abs=1)
    assert np.ptp(views[:, :, :, 0].mean((1, 2))) > 20  # everywhere
    assert squares(Image.new('RGB', (1, 700)), 8, 3, np.random.default_rng(0)).shape == (3, 8, 8, 3)


def test_captions_are_shortened_by_words():
    encoding = train_bpe(['the cat sat on the mat. ' * 20], 300)
    short = shorten('the cat sat on the mat', encoding, 4)
    assert 'the cat sat on the mat'.startswith(short + ' ') and len(encoding.encode_ordinary(short)) < 4
    assert shorten('照片 ' + '猫' * 39, encoding, 12) == '照片 猫'  # a byte a token; the space belongs to a word
    started = time.perf_counter()
    assert shorten('the cat ' * 10_000, encoding, 4) == shorten('the cat ' * 4, encoding, 4) and time.perf_counter() < started + 1
    assert shorten('the', encoding, 4) == 'the' and shorten('x' * 99, encoding, 4) == 'xxx'


def test_faults_are_named_and_left_out(work, tmp_path, capsys):
    make_folder(tmp_path / 'mine')
    pictures, captions = folder.read_folder(tmp_path / 'mine', 8, 1, np.random.default_rng(0))
    assert len(pictures) == len(captions) == 24 and 'a RGBA picture, the number 1 of all' in captions
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line in ('gone.txt: no image beside it that is .jpg, .jpeg, .png', 'cut.jpg: truncated', 'text.jpg: truncated', 'latin.txt: no caption',
                 'mute.txt: no caption'):
        assert any(line in found for found in lines), line
    with pytest.raises(UserError, match='0 images with captions'):
        folder.read_folder(tmp_path / 'mine/none', 8, 1, None)
    for settings, line in ((dict(source=''), 'name a folder'), (dict(source='mine', size=20), 'size=20 must be a multiple of 8'),
                           (dict(source='mine', steps=0), 'steps=0: must be at least 1'),
                           (dict(source='mine', vocab_size=10), 'vocab_size=10: must be at least 257'),
                           (dict(source='mine', caption_tokens=1), 'caption_tokens=1: must be at least 2'),
                           (dict(source='mine'), 'exists already')):
        with pytest.raises(UserError, match=line):
            folder.main(**settings)


def test_hidden_copies_and_pictures_of_one_name(tmp_path, capsys):
    """Copies of editors and systems are nobody's pictures; of p.jpg, p.png and p.webp with one p.txt the first is taken."""
    names = 'p.jpg', 'p.png', 'p.webp', 'q.png', 'r.png', '.ipynb_checkpoints/q.png', '__MACOSX/q.png', '._q.png', 's.bmp'
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8), 'red' if path.stem in 'qs' else 'blue').save(path)
        path.with_suffix('.txt').write_text(f'caption of {path.stem}')
    (tmp_path / 'q.txt').rename(tmp_path / 'q.TXT')
    (tmp_path / 'r.txt').write_text(' \n')
    Image.new('RGB', (8, 8), 'green').save(tmp_path / 't.png')
    (tmp_path / 't.txt').write_bytes('caption of t'.encode('utf-16-le'))
    (tmp_path / 'folder.png').mkdir()
    pair = 'zy' if (tmp_path / 'FOLDER.PNG').exists() else 'zZ'  # where case matters, names that differ in it alone
    for name, size in zip(pair, ((10, 20), (20, 10))):  # the same bytes
        Image.new('RGB', size).save(tmp_path / f'{name}.png')
        (tmp_path / f'{name}.txt').write_text(f'caption of {name}')
    Image.new('RGB', (9, 9)).save(tmp_path / 'Photo.png')
    (tmp_path / 'photo.txt').write_text('caption of a photo')
    Image.new('RGB', (7, 7)).save(tmp_path / 'Cafe\u0301.png')  # as a Mac writes é: two characters
    (tmp_path / 'caf\u00e9.txt').write_text('caption of a cafe')
    captions = folder.read_folder(tmp_path, 8, 1, None)[1]
    assert sorted(captions) == sorted(f'caption of {name}' for name in ('a photo', 'a cafe', 'p', 'q', *pair))
    said = capsys.readouterr().out
    for line in ('p.png: p.jpg has the same name', 'p.webp: p.jpg has the same', 'r.txt: no caption in UTF-8 (empty)',
                 f's.bmp: the same picture as {tmp_path}/q.png', 't.txt: no caption in UTF-8 (it holds zero bytes'):
        assert line in said
    assert said.count('left out') == 5


def test_many_faults_are_counted(capsys):
    tell(list(range(150)))
    assert capsys.readouterr().out.splitlines()[-2:] == ['left out: 19', 'left out: and 130 more']


def test_the_folder(work):
    meta = json.loads(Path('data/folder/meta.json').read_text())
    dataset = folder.Dataset('data/folder')
    random = np.arange(2)
    for name in [*MAKE, 'caption']:
        ids, truth = dataset.load('val', name), dataset.truth('val', name, random)
        assert ids.shape[0] == 2 and ids.max() < meta['fields'][name]
        raw = dataset.decode(name, torch.from_numpy(np.array(ids)).long())
        assert raw == truth if name == 'caption' else raw.shape == truth.shape and raw.dtype == np.uint8
        assert dataset.picture(name, raw[0]).shape == ((128, 128, 3) if name == 'caption' else (32, 32, 3))
        perfect, blind = (dataset.score(name, values, 'val', random) for values in (truth, dataset.baseline(name, 'val', random)))
        for key, parts in perfect.items():
            assert parts[:, 0, 0].tolist() == ([0, 0] if key == 'error' else parts[:, 0, 1].tolist())
            assert blind[key].shape == parts.shape
        if name in COLORS:
            assert np.abs(raw.astype(int) - truth).max() < 16  # four bits of eight


def test_a_run(work, capsys):
    train.main(model='fourm', dataset='folder', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2, num_input_tokens='64',
               num_target_tokens='64', batch_size=4, max_iters=2, device='cpu', dtype='float32', compile=False, out_dir='out/mine')
    assert Path('out/mine/sample_000002.png').is_file()
    sample.main('--out_dir=out/mine', '--n=2', '--given=grey', '--image=mine/more/1.png', '--target=low,palette')
    sample.main('--out_dir=out/mine', '--n=2', '--given=caption', '--text=a picture', '--target=edges')
    assert 'caption: a picture\n' in capsys.readouterr().out
    sample.main('--out_dir=out/mine', '--n=2', '--chain=rgb>grey:mean2,low:mean2')
    for part in ('1.5,2,5,5', 'mask.tga'):
        with pytest.raises(UserError, match='no box x0,y0,x1,y1 in whole pixels and no file .jpg, .jpeg, '):
            sample.main('--out_dir=out/mine', '--given=rgb', f'--hide=rgb={part}')
    sample.main('--out_dir=out/mine', '--n=2', '--retrieve=rgb', '--given=caption')
    scores = score.main('--out_dir=out/mine', '--n_score=2', '--given=rgb', '--target=caption,palette')
    assert scores['rgb>caption/words']['ceiling'] == 1 and scores['rgb>palette/error']['ceiling'] < 16
    train.main(model='gpt', dataset='folder', n_layer=1, n_embd=32, n_head=2, batch_size=4, max_iters=1, device='cpu',
               dtype='float32', compile=False, out_dir='out/gpt')  # other chapters read tokens, or pixels
    assert Path('out/gpt/sample_000001.png').is_file()
    sample.main('--out_dir=out/gpt', '--complete=0.5', '--n=2')


def test_transparency_of_16_bits(tmp_path):
    """One value of a grey PNG is transparent: there the background is seen, elsewhere nothing changes."""
    values = np.full((8, 8), 30000, np.uint16)
    values[0] = 1000
    Image.fromarray(values).save(tmp_path / 'a.png', transparency=1000)
    seen = np.asarray(pictures.read_picture(tmp_path / 'a.png'))
    assert (seen[0] == 255).all() and (seen[1:] == round(30000 * 255 / 65535)).all()


@pytest.mark.parametrize('bits, photometric, grey', [(12, 1, [0, 255]), (16, 1, [0, 16]), (16, 0, [255, 239])])
def test_tiff_of_many_bits(tmp_path, bits, photometric, grey):
    """Pixels 0 and 4095: white is 2^bits - 1, or 0 if the photometric interpretation is 0."""
    pixels = bytes([0x00, 0x0F, 0xFF]) if bits == 12 else struct.pack('<2H', 0, 4095)
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / 'a.tif').write_bytes(struct.pack('<2sHI', b'II', 42, 8 + 4) + pixels.ljust(4, b'\0')
                                     + struct.pack('<H', len(tags)) + entries + bytes(4))
    assert np.asarray(pictures.read_picture(tmp_path / 'a.tif'))[0, :, 0].tolist() == grey
