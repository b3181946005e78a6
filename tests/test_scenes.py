"""The data set: its texts, its files, its scores, more modalities."""
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from config import UserError
from engine import checkpoints
from lab import score
from prepare import arrays, pictures, scenes, scenes_numbers, scenes_parser
from prepare.scenes import caption, parse_text, scene_desc, spell_out, text_length, words
from prepare.scenes_scores import (match, score_boxes, score_depth, score_normal, score_numbers, score_objects,
                                   score_segmentation)
from prepare.image_tokenizers import ids_to_digits
from prepare.scenes_parser import targets
from prepare.text_tokenizers import decode_row, encode_rows, word_encoding

OBJECTS = np.array([(0, 0, 0, 0, -2, 31), (1, 6, 1, 1, 40, 9), (2, 4, 0, 1, 63, 50), (-1, -1, -1, -1, -1, -1)])


def value(parts):
    """A metric of numerators and denominators (n, k, 2), as report.bootstrap computes it."""
    num, den = parts.sum(0).T
    return (num[den > 0] / den[den > 0]).mean()


def test_texts_and_back():
    assert caption(OBJECTS) == 'a large blue metal cube, a small red rubber sphere and a small green metal cylinder'
    assert scene_desc(OBJECTS[:2]) == ('Object 1 - Position: x=-2 y=31 Shape: cube Color: blue Material: metal. '
                                       'Object 2 - Position: x=40 y=9 Shape: sphere Color: red Material: rubber.')
    assert (parse_text('caption', caption(OBJECTS))[:, :4] == OBJECTS[:3, :4]).all()
    assert (parse_text('scene_desc', scene_desc(OBJECTS))[:, [0, 1, 2, 4, 5]] == OBJECTS[:3][:, [0, 1, 2, 4, 5]]).all()
    assert len(parse_text('caption', 'a large blue')) == 0


@pytest.mark.parametrize('name, tell', [('caption', caption), ('scene_desc', scene_desc)])
def test_vocabulary_holds_every_text_in_words(name, tell):
    encoding = word_encoding(name, words(name, 64, 10))
    random = np.random.default_rng(0)
    texts = [tell(np.stack([random.integers(0, many, 10) for many in (3, 8, 2, 2)] + [random.integers(-8, 72, 10)] * 2, 1))
             for _ in range(50)]
    rows = encode_rows(encoding, texts, text_length(name, 10))
    assert [decode_row(encoding, row) for row in rows] == texts
    assert ((rows == -1) | (rows >= 256) | (rows == ord('a'))).all()  # no other byte, so every phrase is one token
    assert (rows[:, -1] == encoding.n_vocab - 1).all()                # ten objects fill the row exactly


def test_unknown_words_fall_back_to_bytes():
    encoding = word_encoding('caption', words('caption', 64, 5))
    for text in ('a pink élan 像', '', '\x00\ud7ff'):
        assert decode_row(encoding, encode_rows(encoding, [text], 40)[0]) == text
    with pytest.raises(UserError, match='has 51 tokens with its end token, the modality holds 26'):
        encode_rows(encoding, ['?' * 50], 26)


def test_spell_out():
    assert spell_out('Two large red metal spheres and a small cyan rubber cube.') == (
        'a large red metal sphere, a large red metal sphere and a small cyan rubber cube')
    assert spell_out('two red spheres, a blue cube') == 'a red sphere, a red sphere and a blue cube'
    assert spell_out('a large red metal sphere') == 'a large red metal sphere'
    for text in ('red cube and blue sphere', 'A red  cube, and a blue sphere!', 'an red cube,blue sphere ?'):
        assert spell_out(text) == 'a red cube and a blue sphere'
    assert (spell_out('large'), spell_out('a red cube and a'), spell_out(' .')) == ('a large', 'a red cube and a', '')


@pytest.mark.parametrize('name, right, wrong', [
    ('caption', 'red cube', 'a red cube; a red cube'), ('caption', 'a  red cube!', 'a red-cube'),
    ('scene_desc', scene_desc([(1, 1, 0, 0, 3, 4)]), 'x=3 y=4 Shape:cube'), ('scene_desc', 'Object 1 - Position: x=3', 'Object 9')])
def test_texts_of_bytes_are_refused(name, right, wrong, monkeypatch):
    """Bytes that no text of the data has; the line shows a right text."""
    texts = [(caption if name == 'caption' else scene_desc)([(0, 0, 0, 0, 5, 6)] * 2)]
    monkeypatch.setattr(scenes.Dataset, '__init__', lambda self: None)
    dataset = scenes.Dataset()
    dataset.encodings, dataset.truth = {name: word_encoding(name, words(name, 64, 9))}, lambda *_: texts
    dataset.load = lambda *_: np.zeros((1, 64))
    assert set(dataset.read_text(name, right)[0].tolist()) & {*range(256)} <= {ord('a')}
    with pytest.raises(UserError, match=f'is not worded as the texts of this data set; one of them is .{texts[0][:40]}'):
        dataset.read_text(name, wrong)


def test_match_keeps_left_to_right():
    agree = np.array([[4, 0, 1], [1, 4, 0], [0, 2, 4]])
    assert match(agree).tolist() == [4, 4, 4]
    assert match(agree[:, [0, 2]]).tolist()[::2] == [4, 4]  # a missing object costs only itself
    assert match(agree[[0, 2]]).tolist() == [4, 4]
    assert match(agree[:, ::-1]).tolist() == [1, 4, 0]      # the order counts
    assert match(np.zeros((2, 0))).tolist() == [0, 0]


def test_object_scores():
    perfect = score_objects([OBJECTS], [OBJECTS[:3]])
    assert all(value(parts) == 1 for parts in perfect.values())
    wrong = OBJECTS[:3].copy()
    wrong[1, 1] = 5  # one color of twelve attributes
    scores = {name: value(parts) for name, parts in score_objects([OBJECTS], [wrong]).items()}
    assert scores == dict(attributes=pytest.approx(11 / 12), objects=pytest.approx(2 / 3), scenes=0)
    surplus = {name: value(parts) for name, parts in score_objects([OBJECTS], [np.concatenate((OBJECTS[:3], OBJECTS[:1]))]).items()}
    assert surplus == dict(attributes=pytest.approx(3 / 4), objects=pytest.approx(3 / 4), scenes=0)
    sizeless = OBJECTS[:3].copy()
    sizeless[:, 3] = -1  # as scene_desc tells them
    assert value(score_objects([OBJECTS], [sizeless])['scenes']) == 1


def test_dense_scores():
    objects = np.zeros((2, 4, 4), bool)
    objects[:, 1:3, 1:3] = True
    truth = np.full((2, 4, 4), 10.0)
    found = np.where(objects, 11.0, 14.0)
    scores = {name: value(parts) for name, parts in score_depth(truth, found, objects).items()}
    assert scores == dict(absrel_objects=pytest.approx(0.1), delta_objects=1, absrel_all=pytest.approx(0.325), delta_all=0.25)
    up, tilted = np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 3))
    up[..., 2], tilted[..., 2], tilted[..., 0] = 1, 2, 2  # lengths do not matter
    assert value(score_normal(up, tilted, objects)['angle_objects']) == pytest.approx(45)
    labels = np.where(objects, 3, 0)
    assert value(score_segmentation(labels, labels, objects)['miou_all']) == 1
    half = labels.copy()
    half[:, 1, 1:3] = 0
    assert value(score_segmentation(labels, half, objects)['miou_objects']) == pytest.approx(0.5)


RAW = dict(objects=np.array([[(1, 0, 0, 0, 5, 9), (0, 0, 0, 0, 20, 9), (-1,) * 6]]), rgb=np.full((1, 32, 32, 3), 51),
           instance=np.zeros((1, 32, 32), int), depth=np.full((1, 32, 32), 8.26, np.float16),
           normal=np.tile(np.array((0, 110, 64), np.int8), (1, 32, 32, 1)))  # of a ground seen from 30 degrees
RAW['instance'][0, 8:12, 2:6], RAW['instance'][0, 4:31, 20:22] = 1, 2


def test_numbers_and_back():
    table = scenes_numbers.boxes(RAW)
    assert table.tolist() == [[[1, 4, 16, 10, 22], [0, 40, 8, 42, 60], [-1] * 5]]  # 64 bins of 32 pixels
    assert scenes_numbers.metadata(RAW).tolist() == [[[2, 7, 83, 20, 30]]]
    grey = scenes_numbers.layout(RAW)  # 51 of 255, everywhere
    assert grey.tolist() == [[[32 + round((51 - 128) / 4)] + [32] * 11]]
    ramp = np.broadcast_to(np.arange(0, 256, 8)[None, None, :, None], (1, 32, 32, 3)).astype(np.uint8)  # from left to right
    dark_first, light_first = (scenes_numbers.layout(dict(rgb=rgb))[0, 0] for rgb in (ramp, ramp[:, :, ::-1]))
    changed = (dark_first != light_first).nonzero()[0].tolist()
    assert 1 in changed and set(changed) <= {0, 1} and dark_first[1] < 32 < light_first[1]
    assert scenes_numbers.layout(dict(rgb=ramp * (1, 0, 0)))[0, 0, 10] < 32  # the first red difference across
    numbers = np.array([40, 30, 36, 33, 31, 35, 37, 30, 31, 27, 34, 33])
    blurred = np.repeat(np.repeat(scenes_numbers.from_layout(numbers), 4, 0), 4, 1)
    assert scenes_numbers.layout(dict(rgb=blurred[None])).tolist() == [[numbers.tolist()]]
    text = scenes_numbers.to_text('boxes', table[0].tolist())
    assert text == 'shape=sphere left=4 top=16 right=10 bottom=22 shape=cube left=40 top=8 right=42 bottom=60'
    assert scenes_numbers.read('boxes', text).tolist() == table[0, :2].tolist()
    assert scenes_numbers.read('boxes', text[:-3] + ' top=3').tolist() == table[0, :1].tolist()  # malformed: left out
    for name in scenes_numbers.NUMBERS:
        encoding = word_encoding(name, scenes_numbers.words(name))
        text = scenes_numbers.to_text(name, scenes_numbers.NUMBERS[name][0](RAW)[0].tolist())
        assert min(encoding.encode_ordinary(text)) >= 256 and encoding.decode(encoding.encode_ordinary(text)) == text
    assert scenes_numbers.middle([table[0, :2], table[0, :2] + 2, table[0, :1]]).tolist() == (table[0, :2] + 1).tolist()


def test_scores_of_numbers():
    truth = np.array([[0, 0, 0, 9, 9], [1, 20, 0, 29, 9]])
    found = np.array([[0, 5, 0, 14, 9], [2, 20, 0, 29, 9], [1, 60, 60, 61, 61]])
    perfect, wrong, none = (score_boxes([truth], [boxes]) for boxes in (truth, found, truth[:0]))
    assert value(perfect['iou']) == value(perfect['found']) == 1 and value(none['iou']) == 0
    assert value(wrong['iou']) == pytest.approx(50 / 150 / 3) and value(wrong['found']) == 0  # another shape, one too many
    assert value(score_boxes([truth], [truth[:1]])['found']) == 0.5
    errors = score_numbers('metadata', [np.array([[3, 20, 80, 50, 36]])] * 2, [np.array([[4, 20, 82, 50, 36]]), np.zeros((0, 5))])
    assert {name: value(parts) for name, parts in errors.items()} == dict(objects_error=2, cover_error=10, depth_error=41,
                                                                          light_error=25, elevation_error=18)


def test_parser_targets():
    heat, offset, classes = targets(torch.tensor(OBJECTS)[None], 64)
    row, column = 9 // 4, 40 // 4
    assert heat[0, row, column] > 0.7 and heat[0].max() <= 1 and heat[0, 15, 0] < 1e-3
    at = torch.tensor([column, row]) * 4 + 1.5 + offset[0, :, row, column]
    assert at.tolist() == [40, 9] and classes[0, :, row, column].tolist() == [1, 6, 1, 1]


def test_the_parser_of_a_read_only_folder(work, tmp_path, monkeypatch, capsys):
    """It is kept in memory; where it can be written, it is read the next time."""
    (tmp_path / 'train').symlink_to(work / 'data/scenes/train')
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, 'replace', mock.Mock(side_effect=PermissionError))
        kept = scenes_parser.load_or_train(tmp_path, 64, 'cpu')
    assert capsys.readouterr().out == (f'{tmp_path}/parser.pt: cannot be written, so the next program trains the parser again; make '
                                       'the folder writable once\n')
    for _ in range(2):
        parser = scenes_parser.load_or_train(tmp_path, 64, 'cpu')
        assert all(torch.equal(a, b) for a, b in zip(parser.state_dict().values(), kept.state_dict().values()))
        monkeypatch.setattr(scenes_parser, 'train_parser', mock.Mock())
    assert capsys.readouterr().out == ''


def test_the_folder(work):
    meta = json.loads((work / 'data/scenes/meta.json').read_text())
    assert meta['kind'] == 'rows' and list(meta['fields']) == [*scenes.IMAGES, *scenes.TEXTS, 'tokens', 'image']
    dataset = scenes.Dataset(work / 'data/scenes')
    index = np.arange(10)
    for name in scenes.IMAGES + scenes.TEXTS:
        ids = dataset.load('val', name)
        assert len(ids) == 32 and ids.max() < meta['fields'][name]
        raw = dataset.decode(name, torch.from_numpy(np.array(ids[:10])).long())
        again, stored = dataset.encode(name, dataset.truth('val', name, index)), torch.from_numpy(np.array(ids[:10])).long()
        if name in scenes.TEXTS:
            assert torch.equal(again, stored)
        else:  # the stored tokens are those of the stored raw values, but for digits on the edge between two levels
            levels = dataset.tokenizers[name].levels
            assert (ids_to_digits(again, levels) - ids_to_digits(stored, levels)).abs().max() <= 1
        if name == 'normal':
            assert np.linalg.norm(dataset.truth('val', name, index), axis=-1) == pytest.approx(1, abs=0.01)
        for one in raw:
            picture = dataset.picture(name, one)
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert all(np.isfinite(value(parts)) for parts in dataset.score(name, raw, 'val', index).values())
        dataset.picture(name, dataset.baseline(name, 'val', index)[0])
    objects, instance = np.load(work / 'data/scenes/val/raw_objects.npy'), np.load(work / 'data/scenes/val/raw_instance.npy')
    labels = np.load(work / 'data/scenes/val/raw_segmentation.npy')
    assert labels[0][instance[0] == 2][0] == 1 + objects[0, 1, 0] * 8 + objects[0, 1, 1]
    assert ((labels == 0) == (instance == 0)).all()


def counts(raw):
    """How many cubes, spheres and cylinders: a modality of one function and one entry, as docs/fourm.md shows it."""
    return (raw['objects'][..., :1] == np.arange(3)).sum(1, keepdims=True)


def test_more_modalities(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scenes_numbers.NUMBERS, 'counts', (counts, dict(cubes=11, spheres=11, cylinders=11)))
    monkeypatch.setattr(scenes, 'EXTRA', (*scenes.EXTRA, 'counts'))
    monkeypatch.setattr(scenes, 'EXTRA_STEPS', 3)
    monkeypatch.setattr(pictures.train_tokenizer, '__defaults__', (0, 8))
    out, names = work / 'data/scenes_more', ('edges', 'palette', 'low', 'boxes', 'metadata', 'layout', 'counts')
    shutil.copytree(work / 'data/scenes', out)
    tiny = dict(model='fourm', dataset='scenes_more', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2, num_input_tokens='64',
                num_target_tokens='64', batch_size=4, micro_batch_size=4, device='cpu', dtype='float32', compile=False, eval_iters=1)
    train.main(**tiny, max_iters=1, pictures=False, out_dir='out/older')
    before, stamps = json.loads((out / 'meta.json').read_text()), {path: path.stat().st_mtime_ns for path in out.rglob('*.npy')}
    scenes.main(f'--out={out}', '--extra=' + ' '.join(names))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    meta, dataset, index = json.loads((out / 'meta.json').read_text()), scenes.Dataset(out), np.arange(10)
    assert list(meta['fields']) == [*before['fields'], *names] and meta['settings'] == before['settings']
    assert meta['config']['modalities'].startswith(before['config']['modalities'] + ' edges:8*8*8*8:8x8 palette:16*16*16:1x5 ')
    for name in names:
        ids, truth = torch.from_numpy(np.array(dataset.load('val', name)[:10])).long(), dataset.truth('val', name, index)
        raw, blind = dataset.decode(name, ids), dataset.baseline(name, 'val', index)
        perfect, worse = (dataset.score(name, some, 'val', index) for some in (truth, blind))
        for metric, parts in perfect.items():
            best = 0 if 'error' in metric else 1
            assert value(parts) == best and abs(value(worse[metric]) - best) > 0.02
        assert (dataset.encode(name, truth) != ids).float().mean() < 0.02  # but for digits on the edge between two levels
        assert name not in scenes.NUMBERS or raw == truth
        assert all(dataset.picture(name, one).shape == (64, 64, 3) for one in raw)
    train.main(**tiny, max_iters=2, pictures=False, out_dir='out/older')  # an older run's data, and more: it goes on
    assert checkpoints.load_model(work / 'out/older/ckpt_last.pt')[0].batch_keys == scenes.IMAGES + scenes.TEXTS
    with pytest.raises(UserError, match='is not the data that this run was trained on'):
        arrays.agree(out, before, dict(meta=meta))
    train.main(**tiny, train_modalities='rgb palette boxes metadata', max_iters=1, out_dir='out/more')
    scores = score.main('--out_dir=out/more', '--n_score=2', '--given=rgb', '--target=palette,boxes,metadata')
    assert scores['rgb>boxes/found']['ceiling'] == 1 and scores['rgb>metadata/depth_error']['ceiling'] == 0
    Image.new('RGB', (64, 64)).save(tmp_path / 'x.png')
    sample.main('--out_dir=out/more', '--given=palette', f'--image={tmp_path}/x.png', '--target=metadata', '--n=1')
    capsys.readouterr()
    scenes.main(f'--out={out}', '--extra=edges')
    assert 'scenes_more has edges already' in capsys.readouterr().out
    (out / 'val/raw_instance.npy').unlink()
    for arguments, message in ((['--extra=edgse'], "there is no modality 'edgse'; there are grey, edges, palette, low, boxes"),
                               (['--extra=grey', '--n_train=7'], 'has n_train=96: leave n_train out'),
                               ([], 'exists already: delete it, choose another --out, or add modalities by --extra=')):
        with pytest.raises(UserError, match=message):
            scenes.main(f'--out={out}', *arguments)
    (out / 'meta.json').write_text(json.dumps(before))
    with pytest.raises(UserError, match='raw_instance.npy: missing or damaged'):
        scenes.main(f'--out={out}', '--extra=boxes')


def test_user_pictures(work, tmp_path):
    dataset = scenes.Dataset(work / 'data/scenes')
    for mode, size in (('RGBA', 64), ('L', 100), ('P', 17)):
        Image.new(mode, (size, size)).save(tmp_path / 'x.png')
        assert dataset.read_image('rgb', tmp_path / 'x.png').shape == (1, 64)
    Image.new('RGB', (64, 48)).save(tmp_path / 'wide.png')
    with pytest.raises(UserError, match='wide.png: 64x48 pixels; give a square image'):
        dataset.read_image('rgb', tmp_path / 'wide.png')
    (tmp_path / 'text.png').write_text('no picture')
    for path, message in (('text.png', 'truncated, too large or not an image'), ('absent.png', 'no such image')):
        with pytest.raises(UserError, match=f'{path}: {message}'):
            dataset.read_image('rgb', tmp_path / path)


def test_bad_settings(work):
    with pytest.raises(UserError, match='max_objects must be 2..10'):
        scenes.main('--max_objects=11')
    with pytest.raises(UserError, match="unknown setting 'ntrain'; did you mean 'n_train'"):
        scenes.main('--ntrain=11')


def test_the_gate_reads_tokens_and_pixels(work, capsys):
    levels = torch.tensor([2, 3])
    assert scenes_parser.token_patches(np.array([[5, 0]]), levels).tolist() == [[[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]]
    scenes_parser.main(steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(' after')[0] for line in lines] == ['read from rgb tokens', 'read from pixels']
    assert all(part in lines[0] for part in ('shape', 'color', 'material', 'size', 'all four'))
