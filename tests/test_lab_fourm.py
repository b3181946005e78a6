"""lab/fourm.py on a tiny run: grids, chains, editing, faults in one line."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lab
import sample
import train
from config import UserError
from lab import retrieval
from lab.chains import generate
from lab.fourm import AnyToAny, given_ids, own_ids, read_chains, replace_words
from tests import toys
from tests.tiny import TINY


@pytest.fixture(scope='module')
def out_dir(work):
    train.main(**(TINY | dict(out_dir='out/sampled', max_iters=2, pictures=True)))
    return 'out/sampled'


@pytest.fixture
def run(out_dir):
    return lab.open_run(Path(out_dir, 'ckpt_last.pt'), 'cpu')


def draw(out_dir, *arguments, steps=2):
    return toys.draw(out_dir, '--n=2', f'--steps={steps}', *arguments)


def test_training_draws(out_dir):
    assert list(Path(out_dir).glob('sample_*.png'))


def test_grids(out_dir, capsys):
    everything = draw(out_dir)
    assert everything.size == (14 * 132 - 4, 18 + 2 * 132 - 4)  # rgb; truth and result of 5; caption; truth and result
    chain = draw(out_dir, '--chain=rgb>depth:2,normal:2:confidence,scene_desc')
    assert chain.size[0] == 7 * 132 - 4
    text = draw(out_dir, '--given=caption', '--text=two large red metal spheres', '--target=rgb,depth')
    assert text.size[0] == 3 * 132 - 4
    assert 'a large red metal sphere and a large red metal sphere' in capsys.readouterr().out
    Image.new('L', (32, 32)).save('own.png')
    assert draw(out_dir, '--given=rgb', '--image=own.png', '--target=depth').size[0] == 2 * 132 - 4
    both = draw(out_dir, '--given=rgb,caption', '--image=own.png', '--text=a small red metal cube', '--target=depth')
    assert both.size[0] == 3 * 132 - 4
    assert draw(out_dir, '--target=rgb,caption').size[0] == 2 * 132 - 4  # from nothing


def test_one_modality_is_generated_from_nothing(work):
    train.main(**(TINY | dict(out_dir='out/one', max_iters=1, train_modalities='depth', pictures=True)))
    assert list(Path('out/one').glob('sample_*.png')) and draw('out/one').size == (132 - 4, 18 + 2 * 132 - 4)


def test_chains_of_every_kind(out_dir):
    chain = draw(out_dir, '--chain=caption:w3,depth:w-1>normal:2:halton:t0.5,segmentation:mean3,rgb:2:best2:g1..3')
    assert chain.size[0] == 8 * 132 - 4
    assert draw(out_dir, '--chain=rgb>depth:mean2;caption>depth').size[0] == (1 + 2 + 2) * 132 - 4  # the truth once


def test_what_is_hidden_is_generated_and_the_rest_stays(run, monkeypatch):
    """Inside a box, around it, and where an object is: the patches that are given come back as they were."""
    def hidden(hide, given='rgb'):
        settings = AnyToAny(given=given, hide=hide, steps=2)
        chain, = read_chains(run, settings)
        ids = given_ids(run, settings, chain, np.arange(2), torch.Generator().manual_seed(0))
        found, _ = generate(run, ids, chain, torch.Generator().manual_seed(0))
        name = hide.split('=')[0]
        unknown, truth = ids[name] < 0, run.ids(name, np.arange(2))
        assert torch.equal(found[name][~unknown], truth[~unknown])
        assert name not in ('rgb', 'depth') or (found[name] >= 0).all()
        return unknown
    box = torch.zeros(8, 8, dtype=torch.bool)
    box[1:5, 2:4] = True
    assert torch.equal(hidden('rgb=16,12,32,40'), box.flatten().expand(2, -1))  # every patch that the box touches
    assert torch.equal(hidden('rgb= 16, 12, 32, 40'), box.flatten().expand(2, -1))
    layer = Image.new('RGBA', (64, 64), (0, 0, 0, 0))
    layer.paste('white', (16, 8, 32, 40))  # white on a transparent layer
    layer.save('LAYER.PNG')
    monkeypatch.setenv('HOME', str(Path.cwd())), monkeypatch.setenv('USERPROFILE', str(Path.cwd()))
    assert torch.equal(hidden('rgb=~/LAYER.PNG'), box.flatten().expand(2, -1))
    wide = Image.new('L', (1400, 700))  # cropped as an image is; a thin stroke counts
    wide.paste('white', (350 + 180, 100, 350 + 181, 430))
    wide.save('wide.png')
    assert torch.equal(hidden('rgb=wide.png'), box.flatten().expand(2, -1) & (torch.arange(64) % 8 == 2))
    whole = torch.zeros(8, 8, dtype=torch.bool)
    whole[1:5, 2:4] = True
    assert torch.equal(hidden('depth=outside 16,8,32,40', 'rgb,depth'), ~whole.flatten().expand(2, -1))
    segmentation = run.dataset.decode('segmentation', run.ids('segmentation', np.arange(2)))
    there = (segmentation > 0).reshape(2, 8, 8, 8, 8).any((2, 4)).reshape(2, 64)
    assert torch.equal(hidden('rgb=objects', 'rgb,segmentation'), torch.from_numpy(there))
    assert hidden('caption=6', 'rgb,caption')[:, 6:].all() and not hidden('caption=6', 'rgb,caption')[:, :6].any()
    words = hidden('caption=large,small', 'rgb,caption')
    truth = run.ids('caption', np.arange(2))
    assert [run.dataset.decode('caption', row[one][None])[0].split() for row, one in zip(truth, words)] == [
        [word for word in run.dataset.decode('caption', row[None])[0].split() if word in ('large', 'small')]
        for row in truth]


def test_images_before_and_after(out_dir, capsys):
    columns = np.asarray(draw(out_dir, '--given=rgb', '--hide=rgb=16,16,48,48'))[18:]
    assert columns.shape[1] == 3 * 132 - 4
    given = columns[:128, 132:132 + 128]
    truth = columns[:128, :128].copy()
    truth[32:96, 32:96] = 128
    assert (given == truth).all()  # not the tokenizer's decoding of the visible tokens, whose colors differ beside the hole
    draw(out_dir, '--given=caption,depth', '--replace=large=small', '--target=rgb')
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith('caption: ')]
    assert texts and all(' small ' in text and ' large ' not in text for text in texts)
    Image.new('L', (32, 32)).save('own.png')
    draw(out_dir, '--given=caption', '--text=a large red ...', '--target=caption,rgb', '--temperature=0')
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith('caption: ')]
    assert texts and all(text.startswith('caption: a large red') for text in texts)
    assert draw(out_dir, '--given=rgb', '--image=own.png', '--hide=rgb=outside 8,8,32,32').size[0] == 2 * 132 - 4


@pytest.mark.parametrize('change, text, expected', [
    (r'C=D\data', 'a C, no CD', r'a D\data, no CD'), ('狗=猫', '一只狗在跑', '一只猫在跑'), ('🙂=:)', 'well🙂done', 'well:)done'),
    ('кот=пёс', 'кот и которые', 'пёс и которые'), ('C++=Rust', 'C++ code', 'Rust code')])
def test_words_of_all_scripts_are_replaced(change, text, expected):
    same = SimpleNamespace(dataset=SimpleNamespace(decode=lambda name, rows: rows, read_text=lambda name, text: torch.tensor([*text.encode()])))
    found = replace_words(same, change, dict(caption=[text]), dict(caption=[text]))
    assert bytes(found['caption'].tolist()).decode() == expected


def test_a_text_is_one_line_as_captions_are():
    caption = SimpleNamespace(is_text=True, vocab_size=9)
    run = SimpleNamespace(model=SimpleNamespace(modality=dict(caption=caption)),
                          dataset=SimpleNamespace(read_text=lambda name, text: torch.tensor([[*text.encode()]])))
    for text in ('a  dog\n on grass ', ' a dog on\tgrass ...'):
        assert bytes(own_ids(run, AnyToAny(text=text), ['caption'])['caption'][0].tolist()) == b'a dog on grass'


def test_a_change_that_changes_nothing_gets_a_line(out_dir, run, capsys):
    texts = [{*text.split()} for text in run.dataset.truth('val', 'caption', slice(None))]
    word = sorted(set.union(*texts) - texts[0] - texts[1])[0]
    for change in (f'--replace={word}=red', '--hide=caption=26'):
        draw(out_dir, '--given=caption', '--target=depth', change)
        assert 'nothing of what is given changes: name what these scenes have, or show others' in capsys.readouterr().out
    draw(out_dir, '--given=caption', '--target=depth', '--hide=caption=3')
    assert 'nothing of what is given changes' not in capsys.readouterr().out


def test_the_nearest_scenes(out_dir, monkeypatch):
    monkeypatch.setattr(retrieval.train_towers, '__defaults__', ('cpu', 20, 32, 0))
    for arguments in (['--text=two large red spheres'], ['--by=embedding']):
        assert draw(out_dir, '--retrieve=rgb', '--given=caption', *arguments).size[0] == 11 * 132 - 4
    draw(out_dir, '--init_from=sampled', '--retrieve=rgb', '--given=caption')  # the index of these weights


def test_same_seed_same_image(out_dir):
    a, b, c = (np.asarray(draw(out_dir, '--target=rgb', f'--seed={seed}')) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize('arguments, message', [
    (['--given=sound'], "there is no modality 'sound'; this model has rgb, depth"),
    (['--chain=rgb>rgb'], "'rgb' stands twice"),
    (['--chain=rgb'], 'write given>target'),
    (['--chain=rgb>depth:many'], "'depth:many': 'many' is none of a number of steps, an order"),
    (['--chain=rgb>depth:2:fast'], "'fast' is none of"),
    (['--chain=rgb>depth:0'], "'depth:0': steps, mean and best are at least 1"),
    (['--chain=rgb>depth:best0'], 'steps, mean and best are at least 1'),
    (['--chain=rgb>depth:t-1'], "temperature='-1': must be 0, or from 1e-6"),
    (['--chain=rgb>depth:t0.7..0.' + 44 * '0' + '1'], 'at the first and at the last step'),
    (['--chain=rgb>depth:t0.9..-1'], "temperature='0.9..-1': must be 0, or from 1e-6"),
    (['--chain=rgb>depth:g1..' + '9' * 50], "guidance='1..9+': must be from -1000 to 1000"),
    (['--chain=rgb>depth:g1...3'], "'g1...3' is none of a number of steps"), (['--chain=rgb>depth:t.5'], "'t.5' is none of"),
    (['--given=rgb', '--guidance=1...3'], "'1...3': write a number, or the first and the last, as in 0.9..0.3"),
    (['--given=rgb', '--temperature=1.5...5'], "'1.5...5': write a number"),
    (['--chain=rgb:w1001>depth'], 'a weight is from -1000 to 1000'),
    (['--chain=rgb>depth:mean1001'], 'mean and best at most 1000'),
    (['--given=rgb', '--temperature=0.7..1e-45'], "temperature='0.7..1e-45': must be 0, or from 1e-6"),
    (['--given=rgb', '--guidance=inf'], "guidance='inf': must be"), (['--given=rgb', '--guidance=nan'], "guidance='nan': must be"),
    (['--given=rgb', '--steps=-3'], 'steps, mean and best are at least 1'),
    (['--chain=rgb>depth:mean2:best2'], 'not both'),
    (['--chain=rgb>caption:mean2'], 'mean is for images'),
    (['--chain=>rgb:best2'], 'best needs something given'),
    (['--chain=rgb:8>depth'], 'has nothing but a weight'),
    (['--chain=rgb>depth:w2'], 'nothing follows depth that its weight could be for'),
    (['--chain=depth:w2>rgb,sound:w2'], "there is no modality 'sound'"),
    (['--given=rgb', '--hide=depth=1,1,9,9'], 'NAME one of what is given .rgb.'),
    (['--given=rgb', '--hide=rgb=9,1,9,9'], 'a box is x0,y0,x1,y1'),
    (['--given=rgb', '--hide=rgb=red house'], "'house' is no color"),
    (['--given=rgb', '--replace=red=blue'], 'replace needs a text'),
    (['--given=caption', '--replace=red'], 'write OLD=NEW'),
    (['--given=rgb,caption', '--target=depth', '--replace=redd=blue'],
     "'redd' is no word of caption; one such text is 'a "),
    (['--given=caption', '--text=a red cube', '--replace=green=blue', '--target=depth'],
     "'green' is no word of caption"),
    (['--given=caption', '--hide=caption=large,rubbber'], "'rubbber' is no token of caption; the nearest are rubber"),
    (['--retrieve=rgb'], 'one modality each'),
    (['--retrieve=rgb', '--given=rgb'], 'one modality each'),
    (['--retrieve=rgb', '--given=caption', '--by=luck'], 'by is one of likelihood, embedding'),
    (['--retrieve=rgb', '--given=caption', '--hide=caption=red'], 'retrieve and hide do not go together'),
    (['--text=hello'], 'need --given=NAME'),
    (['--given=caption', '--image=x.png'], '--given=caption needs --text'),
    (['--given=caption', '--text=' + 'red ' * 30], 'has 32 tokens with its end token, the modality holds 26'),
    (['--given=caption', '--text=a large purpel cube'], "'purpel' is not in the vocabulary of this data set: did you mean 'purple'?"),
    (['--given=caption', '--text=a unicorn'], "'unicorn' is not in the vocabulary of this data set: it has a, and, large, small, "),
    (['--scene=32'], 'scene=32: this split has the scenes 0 to 31'),
    (['--given=rgb', '--hide=rgb=nothing.png'], 'nothing.png: no such image'),
    (['--given=rgb', '--hide=rgb=black.png'], "the mask's central square is empty: paint white what is changed"),
    (['--given=rgb', '--hide=rgb=BLACK.JPG'], 'central square is empty'), (['--given=rgb', '--hide=rgb=nothing.jpg'], 'no such image'),
    (['--given=caption', '--target=depth', '--text=a red cube', '--image=own.png'], '--text and --image together need'),
    (['--given=rgb', '--target=depth', '--text=a red cube', '--image=own.png'], '--text and --image together need'),
    (['--retrieve=rgb', '--given=caption', '--text=a red cube', '--image=own.png'], 'text and image do not go together'),
    (['--given=depth', '--image=own.png'], '--image gives the modality rgb'),
    (['--target=rgb', '--order=fast'], 'order is one of'),
    (['--chain=rgb>depth', '--given=caption'], 'chain and given do not go together'),
    (['--chain=rgb>rgb:best4', '--hide=rgb=8,8,24,24'], 'best needs something given that it is judged by'),
    (['--temperature=-1'], "temperature='-1': must be 0"),
    (['--temperature=warm'], "'warm': write a number"),
    (['--top_p=2'], 'top_p=2.0'),
])
def test_faults(out_dir, arguments, message):
    Image.new('L', (32, 32)).save('own.png')
    Image.new('L', (32, 32)).save('black.png'), Image.new('L', (32, 32)).save('BLACK.JPG')
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={out_dir}', *arguments)
    assert '\n' not in str(error.value)
