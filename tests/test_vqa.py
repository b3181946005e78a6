"""Conversations of the user's own: rows, images of all kinds, broken lines; questions and answers about scenes."""
import io
import json
import re
import struct
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import lab
import train
from config import UserError
from lab import vlm as lab_vlm
from prepare import arrays, scenes_align, scenes_qa, smollm2, vqa
from prepare.scenes import MATERIALS, SHAPES, SIZES, COLOR_NAMES
from prepare.text_tokenizers import save_words, word_encoding
from tests.test_smollm2 import TOKENIZER


@pytest.fixture
def template():
    encoding = word_encoding('small', [' Question:', ' Answer:', ' yes', ' no', ' Is', ' it'])
    return vqa.Template(encoding, encoding.n_vocab - 1, encoding.n_vocab)


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def test_a_conversation_is_one_row(template):
    (tokens, loss_mask), = template.rows([('is it?', 'yes'), ('Is it?', ' no ')], 20, n_images=2)
    marks = {template.image: '#', template.end: '.', -1: ''}
    text = ''.join(marks[i] if i in marks else template.encoding.decode([i]) for i in tokens)
    assert text == '## Question: Is it? Answer: yes. Question: Is it? Answer: no.'
    learned = [i for i, flag in zip(tokens, loss_mask) if flag]
    assert [template.encoding.decode([i]) if i != template.end else '.' for i in learned] == [' yes', '.', ' no', '.']
    assert tokens[:7] == template.encode_question('is it?', 2)  # the same in chat as in training
    assert tokens[7:9] == template.encode_reply('yes')
    assert len(tokens) == len(loss_mask) == 20 and tokens[16:] == [-1] * 4
    assert len(template.encode_question('Is' + ' ' * 1_000_001 + 'it?')) > 1_000_000  # tiktoken itself panics


def test_a_long_conversation_goes_on_in_the_next_row(template):
    rows = template.rows([('Is it?', 'yes')] * 3 + [('x' * 30, 'no'), ('Is it?', 'no')], 16)
    starts = [tokens[:2] for tokens, _ in rows]
    assert len(rows) == 2 and starts == [[template.image, template.encoding.encode_ordinary(' Question:')[0]]] * 2
    assert [tokens.count(template.end) for tokens, _ in rows] == [2, 2]  # the turn of 30 letters is in none
    assert template.rows([('x' * 30, 'no')], 16) == []


@pytest.mark.parametrize('question', ['', '  \n'])
def test_an_empty_question(template, question):
    with pytest.raises(UserError, match='an empty question'):
        template.encode_question(question)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def test_images_of_all_modes(tmp_path):
    red, path = Image.new('RGB', (40, 20), (200, 0, 0)), tmp_path / 'x.png'
    for image, kind in ((red, 'png'), (red.convert('CMYK'), 'jpeg'), (red.convert('P'), 'gif')):
        path = tmp_path / f'x.{kind}'
        image.save(path)
        pixels = vqa.read_resized(path, 8)
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert abs(pixels.astype(int) - (200, 0, 0)).max() < 12
    red.putalpha(0)
    red.save(path := tmp_path / 'clear.png')
    assert (vqa.read_resized(path, 8) == 255).all()  # transparent: white
    Image.new('LA', (9, 9), (0, 255)).save(path)
    assert (vqa.read_resized(path, 8) == 0).all()
    for value, grey in ((65535, 255), (300, 1), (0, 0)):
        Image.fromarray(np.full((9, 9), value, np.uint16)).save(path)
        assert (vqa.read_resized(path, 8) == grey).all()  # 16 bits: a dark picture stays dark
    for value, grey in ((0.5, 128), (1.0000001, 255), (100, 100), (6e4, 233), *map(np.int32, [(200, 200), (65535, 255)])):
        Image.fromarray(np.full((9, 9), value, getattr(value, 'dtype', np.float32))).save(tmp_path / 'real.tiff')
        assert (vqa.read_resized(tmp_path / 'real.tiff', 8) == grey).all()
    for wrong in (np.nan, -0.5):
        values = np.full((9, 9), 0.5, np.float32)
        values[3, 3] = wrong
        Image.fromarray(values).save(tmp_path / 'real.tiff')
        with pytest.raises(UserError, match='real.tiff: .*holds values that are not finite, or negative'):
            vqa.read_resized(tmp_path / 'real.tiff', 8)
    upright = Image.fromarray(np.repeat(np.arange(0, 250, 10, dtype=np.uint8)[:, None, None], 25, 1).repeat(3, 2))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter
    upright.save(tmp_path / 'turned.jpg', exif=exif, quality=95)
    turned = vqa.read_resized(tmp_path / 'turned.jpg', 8).astype(int)[..., 0]
    assert (np.diff(turned, axis=1) < 0).all() and abs(np.diff(turned, axis=0)).max() < 6


def test_faults_of_images(tmp_path):
    Image.effect_noise((90, 90), 50).save(tmp_path / 'good.png')
    whole = (tmp_path / 'good.png').read_bytes()
    (tmp_path / 'half.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'folder.png').mkdir()
    Image.new('RGB', (1, 1)).save(tmp_path / 'dot.png')
    header = io.BytesIO(whole)
    (tmp_path / 'huge.png').write_bytes(header.getvalue()[:16] + struct.pack('>II', 60000, 60000) + whole[24:])
    for name, message in (('none', 'no such image'), ('half', 'truncated'),
                          ('text', 'truncated, too large or not an image'), ('empty', 'not an image'),
                          ('dot', '1x1 pixels show nothing'), ('folder', 'a folder; name an image in it'), ('huge', 'too large')):
        with pytest.raises(UserError, match=rf'{name}.png: .*{message}') as error:
            vqa.read_resized(tmp_path / f'{name}.png', 8)
        assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize('line, message', [
    ('{"image": "a.png"', 'line 2: '),
    ('[1]', 'line 2: write {"image"'),
    ('{"image": "a.png"}', 'line 2: write {"image"'),
    ('{"image": 3, "turns": [["q", "a"]]}', 'line 2: image=3 is no file name'),
    ('{"image": [], "turns": [["q", "a"]]}', r'line 2: image=\[\] is no file name'),
    ('{"image": "a.png", "turns": []}', 'line 2: turns is not a list'),
    ('{"image": "a.png", "turns": [["q", "a", "b"]]}', 'line 2: the turn .* is not .question, answer.'),
    ('{"image": "a.png", "turns": [["", "a"]]}', 'line 2: the turn .* is not .question, answer.'),
    ('{"image": ["a.png", "b.png"], "turns": [["q", "a"]]}', 'conversations have 1 to 2 images'),
])
def test_broken_lines(tmp_path, line, message):
    path = tmp_path / 'talk.jsonl'
    path.write_text('{"image": "a.png", "turns": [["q", "a"]]}\n' + line + '\n')
    with pytest.raises(UserError, match=message) as error:
        vqa.read_conversations(path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


def test_faults_of_files(tmp_path, capsys):
    with pytest.raises(UserError, match='which conversations'):
        vqa.main()
    with pytest.raises(UserError, match='No such file'):
        vqa.main(input=str(tmp_path / 'none.jsonl'))
    (tmp_path / 'empty.jsonl').write_text('\n')
    with pytest.raises(UserError, match='holds no conversations'):
        vqa.main(input=str(tmp_path / 'empty.jsonl'))
    said = '"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
    (tmp_path / 'x.json').write_text(f'[{{"images": ["a.png"], {said}}}, {{{said}}}]')
    assert vqa.read_conversations(tmp_path / 'x.json') == [(['a.png'], [['q', 'a']])]
    assert capsys.readouterr().out == f'left out: {tmp_path}/x.json: 1 conversations without an image\n'
    (tmp_path / 'x.json').write_text('[{"image": "a", "conversations": [{"from": "gpt", "value": "x"}]}]')
    with pytest.raises(UserError, match='x.json, entry 1: human and gpt do not take turns'):
        vqa.main(input=str(tmp_path / 'x.json'))
    for part in ('{"from": "human", "value": 3}', '{"from": "human"}', '"Is it?"'):
        (tmp_path / 'x.json').write_text('[{"image": "a", "conversations": [%s]}]' % part)
        with pytest.raises(UserError, match='x.json, entry 1: conversations is not a list of {"from"'):
            vqa.main(input=str(tmp_path / 'x.json'))


def test_llava_becomes_a_data_set(tmp_path, monkeypatch):
    """LLaVA-Instruct's JSON with images becomes rows that train.py reads; a model is trained on them."""
    monkeypatch.setattr(smollm2, 'download', lambda *_: tmp_path / 'tokenizer.json')
    tokenizer = json.loads(json.dumps(TOKENIZER).replace('<special 5>', '<filename>'))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tokenizer))
    entries = [dict(id=1, conversations=[])]  # text alone: left out
    for i in range(6):
        Image.new('RGB', (30, 30), (40 * i, 0, 0)).save(tmp_path / f'{i}.png')
        talk = [('human', '<image>\nIs it?'), ('gpt', 'Answer: Yes. '), ('human', 'Red?'), ('gpt', 'No\ud800.')]
        entries.append(dict(image=f'{i}.png', conversations=[dict(zip(('from', 'value'), part)) for part in talk]))
    (tmp_path / 'llava.json').write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    vqa.main(input='llava.json', size=32, length=60, val_share=0.3)
    dataset = vqa.Dataset('data/vqa')
    assert len(dataset.questions('train')) == 4
    assert dataset.questions('val')[0]['turns'] == [['Is it?', 'Answer: Yes.'], ['Red?', 'No\ufffd.']]
    tokens, loss_mask = (np.load(f'data/vqa/train/{name}.npy')[0] for name in ('tokens', 'loss_mask'))
    assert dataset.decode(tokens[loss_mask > 0]) == 'Answer: Yes.'
    train.main(model='vlm', dataset='vqa', out_dir='out/x', n_layer=1, n_head=2, n_embd=16, vision_layer=1,
               vision_embd=16, patch_size=8, batch_size=2, max_iters=1, compile=False, device='cpu', threads=1,
               pictures=False)
    for name in ('train', 'val'):
        assert np.load(f'data/vqa/{name}/images.npy').shape == ({'train': 4, 'val': 2}[name], 32, 32, 3)
    monkeypatch.setattr(lab_vlm, 'answers', lambda run, images, questions, settings: [['Answer: Yes.', 'No\ufffd.']] * len(images))
    run = lab.open_run(Path('out/x/ckpt_last.pt'), 'cpu')
    assert lab_vlm.right_answers(run, lab_vlm.Scores())[0]['all'].tolist() == [[[2, 2]]] * 2


def test_every_layout_of_json(tmp_path):
    """One array or a line each, ours or LLaVA's, whatever the file's name; paths as Windows writes them."""
    ours = [dict(image=f'.\\a\\{i}.png', turns=[['Is it?', 'Yes.']]) for i in range(3)]
    theirs = [dict(image=f'a/{i}.png', conversations=[{'from': 'human', 'value': '<image>Is it?'}, {'from': 'gpt', 'value': 'Yes.'}])
              for i in range(3)]
    expected = [([f'a/{i}.png'], [['Is it?', 'Yes.']]) for i in range(3)]
    for lines in (ours, theirs):
        for name, written in (('x.json', '\n'.join(map(json.dumps, lines))), ('x.jsonl', json.dumps(lines, indent=1))):
            (tmp_path / name).write_text(written)
            assert vqa.read_conversations(tmp_path / name) == expected
    (tmp_path / 'deep.jsonl').write_text('[' * 100_000)
    with pytest.raises(UserError, match='deep.jsonl: .*recursion'):
        vqa.read_conversations(tmp_path / 'deep.jsonl')


def test_two_images_per_conversation(tmp_path, monkeypatch):
    """Each is stored once, for any number of conversations about it, and a batch has both."""
    monkeypatch.setattr(smollm2, 'download', lambda *_: tmp_path / 'tokenizer.json')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(TOKENIZER).replace('<special 5>', '<filename>'))
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        Image.new('RGB', (9, 9), (50 * i, 0, 0)).save(f'{i}.png')
    pairs = (0, 1), (1, 2), (2, 0), (3, 4)
    lines = [dict(image=[f'{i}.png', f'{j}.png'], turns=[['Same?', 'No.']]) for i, j in pairs]
    (tmp_path / 'two.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    vqa.main(input='two.jsonl', size=16, length=40, val_share=0.25)
    meta = arrays.read_meta('data/vqa')
    batch = arrays.Data('data/vqa', 'train', meta, ('image', 'tokens', 'loss_mask')).rows(np.arange(3))
    assert batch['image'].shape == (3, 2, 16, 16, 3) and meta['config']['n_images'] == 2
    assert len(np.load('data/vqa/train/images.npy')) == 3 and len(np.load('data/vqa/val/images.npy')) == 2
    assert ((batch['tokens'] == meta['config']['image_token']).sum(1) == 2).all()
    assert (batch['image'][:, 0, 0, 0, 0] - batch['image'][:, 1, 0, 0, 0] != 0).all()


def test_pictures_that_cannot_be_read_are_left_out(tmp_path, monkeypatch, capsys):
    """One of many ends nothing: it is named, and its conversations are in neither rows nor questions."""
    monkeypatch.setattr(smollm2, 'download', lambda *_: tmp_path / 'tokenizer.json')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(TOKENIZER).replace('<special 5>', '<filename>'))
    monkeypatch.chdir(tmp_path)
    for i in range(9):
        Image.new('RGB', (9, 9), (20 * i, 0, 0)).save(f'{i}.png')
    Path('3.png').write_bytes(b'no picture')
    lines = [dict(image=f'{i}.png', turns=[['Red?', 'Yes.' * (i + 1)]]) for i in range(9)] + [
        dict(image=name, turns=[['Red?', 'No.']]) for name in ('./0.png', str(tmp_path / '1.png'), 'copy.png', 'gone.png')]
    Path('copy.png').write_bytes(Path('2.png').read_bytes())
    Path('some.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    for seed in range(4):  # before the split, which would hold out 3.png alone
        Path('few.jsonl').write_text('\n'.join(map(json.dumps, lines[2:5])))
        vqa.main(input='few.jsonl', size=16, length=90, out=f'few{seed}', seed=seed)
    Path('few.jsonl').write_text(json.dumps(lines[3]))
    with pytest.raises(UserError, match='few.jsonl: no conversation has images that can be read'):
        vqa.main(input='few.jsonl', size=16, length=90)
    capsys.readouterr()
    vqa.main(input='some.jsonl', size=16, length=90, val_share=0.3)
    said = capsys.readouterr().out
    assert 'left out: 3.png: truncated' in said and 'left out: gone.png: no such image' in said
    found = {}
    for split in ('train', 'val'):
        dataset, pixels = vqa.Dataset('data/vqa'), np.load(f'data/vqa/{split}/images.npy')
        tokens, scene = (np.load(f'data/vqa/{split}/{name}.npy') for name in ('tokens', 'scene'))
        found[split] = dataset.questions(split)
        assert len(tokens) == len(scene) == len(found[split])
        for row, number, line in zip(tokens, scene[:, 0], found[split]):
            assert line['image'] == [number] and dataset.decode(row).endswith(line['turns'][0][1])
            assert line['turns'][0][1] == 'No.' or pixels[number, 0, 0, 0] == 20 * (line['turns'][0][1].count('Yes') - 1)
    assert len(found['train']) + len(found['val']) == 11 and not list(Path('data/vqa').rglob('*.tmp'))
    assert sum(len(np.load(f'data/vqa/{split}/images.npy')) for split in found) == 8  # ./0.png and copies are stored once


def test_two_unicode_forms_of_a_name_are_one_file(tmp_path, capsys):
    """A Mac may write é as two characters where the file of conversations has one, or the other way round."""
    one, two = 'caf\u00e9', 'cafe\u0301'
    for name, color in ((f'{two}1.png', 'red'), (f'{one}2.png', 'blue')):
        Image.new('RGB', (9, 9), color).save(tmp_path / name)
    found = vqa.find_copies(tmp_path, [f'{one}1.png', f'{two}1.png', f'{two}2.png', f'{one}3.png'], 8)
    assert {*found} == {f'{one}1.png', f'{two}1.png', f'{two}2.png'} and all((tmp_path / file).exists() for file in found.values())
    assert len({*found.values()}) == 2 and f'left out: {tmp_path}/{one}3.png: no such image' in capsys.readouterr().out


def test_splits_share_no_image():
    """At most n_val conversations for validation, in whole groups: those about a, b and c are one group."""
    images = ['a', 'b'], ['d', 'd'], ['b', 'c'], ['e', 'e'], ['c', 'a'], ['f', 'f'], ['d', 'd'], ['a', 'a']
    conversations = [(names, []) for names in images]
    found = set()
    for seed in range(20):
        splits = vqa.split_by_image(conversations, 2, np.random.default_rng(seed))
        names = {split: {name for i in part for name in images[i]} for split, part in splits.items()}
        assert sorted(splits['train'] + splits['val']) == list(range(8)) and not names['train'] & names['val']
        found.add(''.join(sorted(names['val'])))
    assert found == {'d', 'ef'}
    assert sorted(vqa.split_by_image(conversations[:2] + conversations[6:7], 1, np.random.default_rng(0))['val']) == [0]
    assert vqa.split_by_image(conversations[:1] + conversations[4:5], 1, np.random.default_rng(0))['train'] == []


def test_long_turns_are_in_neither_rows_nor_questions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, 'download', lambda *_: tmp_path / 'tokenizer.json')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(TOKENIZER).replace('<special 5>', '<filename>'))
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        Image.new('RGB', (9, 9), (i, 0, 0)).save(f'{i}.png')
    lines = [dict(image=f'{i}.png', turns=[['x' * 50, 'No.'], ['Red?', 'No.']][:1 + (i < 3)]) for i in range(4)]
    Path('long.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    vqa.main(input='long.jsonl', size=16, length=40, val_share=0.3)
    assert '4 of 7 turns are left out: they have more than --length=40 tokens' in capsys.readouterr().out
    for split, n in (('val', 1), ('train', 2)):
        found = vqa.Dataset('data/vqa').questions(split)
        assert [line['turns'] for line in found] == [[['Red?', 'No.']]] * n
        assert all(len(np.load(f'data/vqa/{split}/{name}.npy')) == n for name in ('images', 'tokens'))
    with pytest.raises(UserError, match='no turn fits into 9 tokens: raise --length'):
        vqa.main(input='long.jsonl', size=16, length=9)
    Path('one.jsonl').write_text('\n'.join(json.dumps(dict(image='0.png', turns=[['Red?', 'No.']])) for _ in range(3)))
    with pytest.raises(UserError, match='3 conversations are too few for training and validation without a common'):
        vqa.main(input='one.jsonl', size=16, length=40)


def test_data_of_the_first_edition_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / 'data/old'
    folder.mkdir(parents=True)
    meta = dict(kind='rows', prepare='scenes_qa', fields=dict(tokens=9, counted=2, image=256),
                config=dict(vocab_size=9, block_size=8, image_token=8, image_size=16, channels=3, n_images=1))
    (folder / 'meta.json').write_text(json.dumps(meta))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/old has no 'loss_mask'.* delete data/old and run .*prepare.scenes_qa"):
        train.main(model='vlm', dataset='old', out_dir='out/x', device='cpu', compile=False)


# ---------------------------------------------------------------------------------------------------------------------
# Questions about scenes

@pytest.fixture(scope='module')
def talks():
    """300 scenes' objects and a conversation about each."""
    random = np.random.default_rng(0)
    made = [sample_objects(random) for _ in range(300)]
    counts = {}
    return made, [scenes_qa.converse(scenes_qa.Scene(objects, random, 64), counts, 12) for objects in made]


def sample_objects(random):
    n = random.integers(2, 6)
    rows = np.stack([random.integers(0, k, n) for k in (3, 8, 2, 2, 64, 64)], 1)
    return np.concatenate((rows[rows[:, 4].argsort()], np.full((5 - n, 6), -1)))


def described(text, objects):
    """Which objects (n,) a noun phrase fits, read word by word."""
    fits = np.ones(len(objects), bool)
    for word in text.split():
        for column, words in enumerate((SHAPES, COLOR_NAMES, MATERIALS, SIZES)):
            if word in words or word[:-1] in words:
                fits &= objects[:, column] == words.index(word if word in words else word[:-1])
    return fits


def solve(family, question, objects):
    """The answer by an independent reading of the question."""
    def the(text):
        k, = described(text, objects).nonzero()[0]
        return objects[k]

    def beside(side, anchor):
        column, sign = {'left of': (4, -1), 'right of': (4, 1), 'in front of': (5, 1), 'behind': (5, -1)}[side]
        return sign * (objects[:, column] - anchor[column]) > 0

    def value(name, row):
        words = dict(shape=SHAPES, color=COLOR_NAMES, material=MATERIALS, size=SIZES)[name]
        return words[row[('shape', 'color', 'material', 'size').index(name)]]
    sides = '(left of|right of|in front of|behind) the'
    yes_no = ('no', 'yes')
    if family == 'exist':
        return yes_no[bool(described(question[:-1], objects).any())]
    if family == 'count':
        return str(described(question, objects).sum())
    if family == 'query':
        name, phrase = re.match(r'What (?:is the )?(\w+) (?:is|of) the (.*)\?', question).groups()
        return value(name, the(phrase))
    if family == 'compare':
        a, b, name = re.match(r'(?:Do|Are) the (.*) and the (.*) (?:have the|of the) same (\w+)\?', question).groups()
        return yes_no[value(name, the(a)) == value(name, the(b))]
    if family == 'number':
        word, a, b = re.match(r'Are there (more|fewer|as many) (.*) (?:than|as) (.*)\?', question).groups()
        a, b = described(a, objects).sum(), described(b, objects).sum()
        return yes_no[bool(dict([('more', a > b), ('fewer', a < b), ('as many', a == b)])[word])]
    if family == 'relation':
        a, side, b = re.match(rf'Is the (.*) {sides} (.*)\?', question).groups()
        return yes_no[bool((beside(side, the(b)) & described(a, objects)).any())]
    start, side, b = re.match(rf'(.*) {sides} (.*)\?', question).groups()
    found = beside(side, the(b))
    if start.startswith('Are there any'):
        return yes_no[bool((found & described(start, objects)).any())]
    name, a = re.match(r'What (?:is the )?(\w+) (?:is|of) the (.*)', start).groups()
    k, = (found & described(a, objects)).nonzero()[0]
    return value(name, objects[k])


def test_answers_are_right(talks):
    for objects, talk in zip(*talks):
        objects = objects[objects[:, 0] >= 0]
        for family, question, answer, _ in talk:
            assert solve(family, question, objects) == answer, (question, objects)


def test_thoughts_look_at_what_is_asked_about(talks):
    """A thought has each object that a question names by itself, in the order of the words, and others only in hops."""
    for objects, talk in zip(*talks):
        objects = objects[objects[:, 0] >= 0]
        cells = [f'row {y // 8} column {x // 8}' for *_, x, y in objects.tolist()]

        def where(mask):
            return ' '.join(cells[k] for k in mask.nonzero()[0]) or 'nowhere'
        for family, question, answer, thought in talk:
            phrases = re.findall(r'((?:(?:%s) )*\w*?(?:cube|sphere|cylinder|thing|object))' % '|'.join(
                (*SIZES, *COLOR_NAMES, *MATERIALS)), question)
            masks = [described(text, objects) for text in phrases]
            if family == 'number':
                assert thought == ' '.join(f'{where(mask)} {mask.sum()}' for mask in masks)
            elif family == 'compare':
                (i,), (j,) = (mask.nonzero()[0] for mask in masks)
                found = re.fullmatch(f'{cells[i]} (\\w+) {cells[j]} (\\w+)', thought)
                assert (found[1] == found[2]) == (answer == 'yes') and {found[1], found[2]} <= {
                    *SHAPES, *COLOR_NAMES, *MATERIALS, *SIZES}
            elif family == 'hop':
                anchor, rest = where(masks[1]), thought[len(where(masks[1])) + 1:]
                assert thought.startswith(anchor) and (rest == 'nowhere') == (answer == 'no')
                assert rest == 'nowhere' or all(cell in cells for cell in re.findall(r'row \d column \d', rest))
            else:
                assert thought == ' '.join(map(where, masks)), question


def test_a_thought_comes_before_its_answer(tmp_path):
    save_words(tmp_path / 'words.json', scenes_qa.vocabulary())
    template = vqa.load_template('', tmp_path)
    turn = 'is the cube left of the blue thing?', 'no', 'row 0 column 7 row 5 column 1'
    question = ' Question: Is the cube left of the blue thing?'
    assert template.encoding.decode(template.encode_question(turn[0])) == f'{question} Answer:'
    template = vqa.load_template('', tmp_path, thinks=True)
    (tokens, loss_mask), = template.rows([turn], 30)
    assert template.encoding.decode([i for i in tokens[1:] if i >= 0]) == (
        ' Question: Is the cube left of the blue thing? row 0 column 7 row 5 column 1 Answer: no<|end|>')
    learned = template.encoding.decode([i for i, flag in zip(tokens, loss_mask) if flag])
    assert learned == ' row 0 column 7 row 5 column 1 Answer: no<|end|>'  # also when to answer
    run = Mock(dataset=Mock(template=template))
    assert lab_vlm.final_answer(run, learned.removesuffix('<|end|>')) == 'no' == lab_vlm.final_answer(run, ' no')


def test_no_prior_helps(talks):
    counts = {}
    for talk in talks[1]:
        for family, _, answer, _ in talk:
            counts.setdefault(family, Counter())[answer] += 1
        assert len(talk) >= 8 and len({question for _, question, *_ in talk}) == len(talk)
    assert counts.keys() == scenes_qa.FAMILIES.keys()
    for family in ('exist', 'compare', 'number', 'relation'):
        assert abs(counts[family]['yes'] - counts[family]['no']) < 0.05 * sum(counts[family].values())
    assert max(counts['count'].values()) < 1.25 * min(counts['count'].values()) and len(counts['count']) == 6
    assert abs(counts['hop']['yes'] - counts['hop']['no']) < 0.1 * counts['hop']['yes']


def test_the_vocabulary_is_closed(talks):
    encoding = word_encoding('closed', scenes_qa.vocabulary())
    texts = [f' {text}' for talk in talks[1] for turn in talk for text in turn[1:]]
    texts += [f' {scenes_align.describe(objects, 64)}' for objects in talks[0]] + [f' {scenes_align.QUESTION}']
    texts += [f' {text}' for objects in talks[0] for text in scenes_qa.where(scenes_qa.Scene(objects, np.random, 64))]
    ids = [encoding.encode_ordinary(text) for text in texts]
    assert {i for row in ids for i in row if i < 256} == {ord('?')} and max(map(len, ids)) < 32
    assert [encoding.decode(row) for row in ids] == texts


def test_new_pairs():
    objects = np.full((3, 2, 6), -1)
    objects[0, 0, :2] = SHAPES.index('cube'), COLOR_NAMES.index('purple')
    objects[1, 0, :2] = SHAPES.index('cube'), COLOR_NAMES.index('cyan')
    objects[1, 1, :2] = SHAPES.index('sphere'), COLOR_NAMES.index('purple')
    objects[2, 1, :2] = SHAPES.index('cylinder'), COLOR_NAMES.index('yellow')
    assert scenes_qa.has_new_pair(objects).tolist() == [True, False, True]


def test_scenes_are_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prepare').symlink_to(Path(scenes_qa.__file__).parent)  # the script exists
    for module in (scenes_qa, scenes_align):
        with pytest.raises(UserError, match='run python -m prepare.scenes$'):
            module.main()


def test_scenes_on_another_drive(tmp_path, monkeypatch):
    def other_drive(*_):
        raise ValueError('path is on mount')
    monkeypatch.setattr(scenes_qa.os.path, 'relpath', other_drive)
    monkeypatch.setattr(scenes_qa, 'load', lambda path: np.zeros((1, 8)))
    monkeypatch.setattr(scenes_qa, 'read_meta', lambda folder: {})
    with pytest.raises(UserError, match='out refers to .*/scenes: choose an --out= on the same drive'):
        scenes_qa.begin(dict(out=tmp_path / 'out', scenes=tmp_path / 'scenes'), 'scenes_qa')
    assert not list(tmp_path.iterdir())


def test_description():
    assert scenes_align.describe([[0, 6, 0, 0, 15, -2], [1, 0, 1, 1, 70, 33], [-1] * 6], 64) == (
        'row 0 column 1 large red metal cube row 4 column 7 small blue rubber sphere')
