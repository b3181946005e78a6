"""nanoVLM: its parts against what they should be, answers with a cache against answers without, training in two stages."""
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import gpt
import lab
import sample
import train
import vlm
from config import UserError
from engine import checkpoints
from lab import figures, score
from prepare import scenes, scenes_align, scenes_qa
from prepare.scenes_render import make
from tests.conftest import ROOT

TINY = dict(n_layer=1, n_head=2, n_embd=16, eyes_layer=1, eyes_head=2, eyes_embd=16, batch_size=8, micro_batch_size=4,
            max_iters=3, eval_interval=3, eval_iters=2, device='cpu', dtype='float32', compile=False, threads=1)


def small(**changes):
    torch.manual_seed(1)
    config = vlm.Config(**(dict(vocab_size=11, image_token=10, block_size=14, n_layer=2, n_head=2, n_embd=16, image_size=16,
                                patch=4, pool=2, eyes_layer=1, eyes_head=2, eyes_embd=8) | changes))
    model = vlm.VLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pictures(B, m=1, size=16):
    return torch.randint(256, (B, m, size, size, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Parts

def test_pixel_shuffle_keeps_squares_together():
    x = torch.arange(36.0).view(1, 36, 1)  # a 6 x 6 picture of one channel
    assert vlm.pixel_shuffle(x, 3)[0].tolist()[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert torch.equal(vlm.pixel_shuffle(x, 1), x)


def test_room_for_pictures():
    tokens = torch.tensor([[9, 1, 2, -1], [3, 9, 4, 5]])
    place = vlm.make_room(tokens, 9, 3, 1)
    assert tokens.gather(1, place).tolist() == [[9, 9, 9, 1, 2, -1], [3, 9, 9, 9, 4, 5]]
    for wrong in (2, 0):
        with pytest.raises(ValueError, match=rf'tells of \[1, 1\] pictures and brings {wrong}'):
            vlm.make_room(tokens, 9, 3, wrong)
    with pytest.raises(AssertionError, match='image_size=16 must be a multiple of patch . pool = 12'):
        small(patch=4, pool=3)


@torch.no_grad()
def test_the_language_model_alone_is_chapter_1():
    model = small()
    alone = gpt.GPT(gpt.Config(vocab_size=11, block_size=17, n_layer=2, n_head=2, n_embd=16)).eval()
    alone.load_state_dict(model.language.state_dict())
    tokens = torch.randint(10, (3, 9))
    assert torch.equal(model.language.logits(model.trunk(tokens)), alone.logits(alone.trunk(tokens)))


@torch.no_grad()
def test_every_picture_counts_and_in_its_place():
    model, tokens = small(n_images=2), torch.tensor([[10, 1, 10, 2, 3]])
    images = pictures(1, 2)
    batch = model.draw(dict(image=images, tokens=tokens, counted=torch.ones_like(tokens)), None, None)
    x = model.trunk(batch['tokens'], model.look(images))
    assert x.size(1) == 5 + 2 * 3
    swapped = model.trunk(batch['tokens'], model.look(images.flip(1)))
    assert not torch.allclose(x[:, 3], swapped[:, 3]) and not torch.allclose(x[:, -1], swapped[:, -1])
    images[:, 1] = 0  # the second one is not seen before its place: 4 tokens, a word
    other = model.trunk(batch['tokens'], model.look(images))
    torch.testing.assert_close(x[:, :5], other[:, :5])
    assert not torch.allclose(x[:, 5], other[:, 5])


def test_the_loss_is_of_answers_alone():
    """As written out; what stands after an answer's end, and what a question says, is no target."""
    model, images = small(), pictures(2)[:, 0]
    tokens = torch.tensor([[10, 1, 2, 3, 4, 5, 6, -1], [10, 7, 8, 3, -1, -1, -1, -1]])
    counted = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]])

    def loss_of(tokens, counted):
        return model(model.draw(dict(image=images, tokens=tokens, counted=counted), None, None))
    loss, logs = loss_of(tokens, counted)
    x = model.trunk(torch.cat((torch.full((2, 3), 10), tokens), 1), model.look(images))
    log_p = model.language.logits(x).log_softmax(-1)[:, 3:-1]  # of tokens 1 and after
    nll = -log_p.gather(-1, tokens[:, 1:, None].clamp(min=0))[..., 0]
    expected = (nll[0, [1, 2, 4, 5]].mean() + nll[1, [1, 2]].mean()) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs['loss'], torch.stack((2 * expected, torch.tensor(2.0))))
    after, flags = tokens.clone(), counted.clone()
    after[1, 4:], after[0, 7] = 9, 9  # other tokens after the end, not counted; and pads that are counted by mistake
    torch.testing.assert_close(loss_of(after, counted)[0], loss)
    flags[1, 5:] = 1
    torch.testing.assert_close(loss_of(tokens, flags)[0], loss)


def test_names_are_learned_where_they_stand():
    """The words of a picture's token are predicted at that token, in the same mean as the answers."""
    model, images = small(n_names=2, n_named=4), pictures(1)[:, 0]
    names = torch.tensor([[[1, 2], [3, -1], [-1, -1], [4, 5]]])
    tokens, counted = torch.tensor([[10, 6, 7]]), torch.tensor([[0, 0, 1]])
    loss, _ = model(model.draw(dict(image=images, tokens=tokens, counted=counted, names=names), None, None))
    x = model.trunk(torch.tensor([[10] * 4 + [6, 7]]), model.look(images))
    log_p = model.language.logits(x)[0].log_softmax(-1)
    pairs = [(0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 7)]
    torch.testing.assert_close(loss, -torch.stack([log_p[i, word] for i, word in pairs]).mean())
    with pytest.raises(AssertionError, match='4 tokens a picture, but the data set names 9: choose another patch or pool'):
        small(n_names=2, n_named=9)


def test_blind_does_not_look():
    model, tokens = small(blind=True), torch.tensor([[10, 1, 2, 3]])
    losses = [model(model.draw(dict(image=pictures(1), tokens=tokens, counted=tokens < 9), None, None))[0] for _ in range(2)]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def reference(model, image, prompt, n, end):
    """Answers without a cache, one at a time: all is read anew for each token."""
    tokens, new = torch.cat((torch.full((model.P * len(image),), 10), prompt)), []
    while len(new) < n and end not in new:
        x = model.trunk(tokens[None], model.look(image[None]))
        new.append(model.language.logits(x[0, -1])[:10].argmax().item())  # 10 stands for a picture
        tokens = torch.cat((tokens, torch.tensor(new[-1:])))
    return new + [-1] * (n - len(new))


@torch.no_grad()
@pytest.mark.parametrize('changes', [{}, dict(n_images=2), dict(token_shift=False, n_kv_head=1, pool=1)])
def test_cached_answers_are_the_uncached_ones(changes):
    """Questions of different lengths, three about each picture after one look."""
    model, S, n = small(**changes), 2, 3
    m, images = model.config.n_images, pictures(2, model.config.n_images)
    looks = []
    model.eyes.register_forward_hook(lambda *_: looks.append(1))
    cache = model.read(torch.full((S, m), 10), images, n)
    assert len(looks) == 1
    questions = torch.randint(9, (S * n, 5))
    for row, short in enumerate((0, 4, 2, 1, 3, 0)):
        questions[row, :short] = -1
    new = model.generate(questions, cache, 6, end=7)
    for row in range(S * n):
        expected = reference(model, images[row // n], questions[row][questions[row] >= 0], new.size(1), 7)
        assert new[row].tolist() == expected
    assert len(looks) == 1 + sum(min(len([t for t in row if t >= 0]), 6) for row in new.tolist())


@torch.no_grad()
def test_turns_go_on_in_the_cache():
    model, image = small(), pictures(1)
    cache = model.read(torch.tensor([[10]]), image)
    first = model.generate(torch.tensor([[1, 2]]), cache, 2)
    second = model.generate(torch.cat((first[:, -1:], torch.tensor([[3, 4]])), 1), cache, 2)
    prompt = torch.cat((torch.tensor([1, 2]), first[0], torch.tensor([3, 4])))
    assert second[0].tolist() == reference(model, image[0], prompt, 2, -2)
    assert len(list(model.stream(torch.tensor([[5]]), cache, 99))) > 0 and cache.filled == model.length


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = vlm.VLM(vlm.Config(vocab_size=12, image_token=10, block_size=8, n_layer=2, n_head=2, n_embd=32, image_size=16,
                               patch=4, pool=2, eyes_layer=1, eyes_head=2, eyes_embd=32))
    tokens = torch.cat((torch.tensor([[10, 1, 2]] * 4), torch.arange(3, 7)[:, None], torch.full((4, 1), 9)), 1)
    images = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]).view(4, 1, 1, 3).expand(-1, 16, 16, -1)
    batch = model.draw(dict(image=images, tokens=tokens, counted=torch.tensor([[0, 0, 0, 1, 1]] * 4)), None, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):  # the same question about four pictures: only the picture tells the answers apart
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Training and answering

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A working folder with pictures of 60 + 30 scenes, their descriptions and questions."""
    folder, before = tmp_path_factory.mktemp('vlm'), Path.cwd()
    for name in ('config', 'prepare'):
        (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)
    for split, n, seed in (('train', 60, 0), ('val', 30, 1)):
        arrays = scenes.raw_arrays(make(n, seed, 64, 5, workers=1))
        scenes.write(Path('data/scenes', split), {name: arrays[name] for name in ('raw_rgb', 'raw_objects')})
    scenes_align.main()
    scenes_qa.main(n_turns=4, length=60)
    yield folder
    os.chdir(before)


@pytest.fixture(scope='module')
def run(here):
    train.main(**TINY, model='vlm', dataset='scenes_align', out_dir='out/align', pictures=False, rates='language:0')
    train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/qa', init_from='align', rates='eyes:0 projector:0.5')
    train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/blind', blind=True, pictures=False,
               rates='eyes:0 projector:0')
    train.main(model='gpt', dataset='scenes_qa', out_dir='out/words', pictures=False, n_layer=1, n_head=2, n_embd=24,
               batch_size=4, max_iters=1, compile=False, device='cpu', threads=1)
    return 'out/qa'


def weights(out_dir):
    return checkpoints.read(Path(out_dir, 'ckpt_last.pt'))['weights']


def test_two_stages(run):
    align, answer = weights('out/align'), weights(run)
    same = {name: torch.equal(align[name], answer[name]) for name in align}
    assert all(equal == name.startswith('eyes') for name, equal in same.items())
    assert len(list(Path(run).glob('sample_*.png'))) == 1
    torch.manual_seed(0)
    fresh = vlm.VLM(vlm.Config(**checkpoints.read(Path('out/align/ckpt_last.pt'))['model_config'])).state_dict()
    assert all(torch.equal(fresh[name], align[name]) for name in align if name.startswith('language'))


def test_parts_from_other_runs(run):
    sizes = {name: value for name, value in TINY.items() if name not in ('n_layer', 'n_head', 'n_embd', 'eyes_layer')}
    train.main(**sizes, model='vlm', dataset='scenes_qa', out_dir='out/parts', pictures=False, rates='eyes:0 language:0',
               init_from='eyes:align,language:words')
    parts, align, words = weights('out/parts'), weights('out/align'), weights('out/words')
    assert all(torch.equal(parts[f'language.{name}'], words[name]) for name in words)
    assert all(torch.equal(parts[name], align[name]) for name in align if name.startswith('eyes'))


@pytest.mark.parametrize('changes, message', [
    (dict(rates='nose:0'), "no parameter begins with 'nose'; the parts are eyes, projector, language"),
    (dict(rates='eyes:fast'), "rates='fast' is not of type float"),
    (dict(rates='eyes:-1'), 'factors must be at least 0, and one above it'),
    (dict(rates='eyes:0 projector:0 language:0'), 'factors must be at least 0, and one above it'),
    (dict(init_from='nose:align'), "the model has no part 'nose'; there are eyes, projector, language"),
    (dict(init_from='eyes:align', eyes_embd=32), 'for other sizes'),
    (dict(init_from='eyes:none'), 'no such checkpoint'),
    (dict(patch=7), 'image_size=64 must be a multiple of patch . pool = 7'),
    (dict(image_size=32), 'image_size is decided by the data set'),
])
def test_faults_of_training(run, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.main(**(TINY | dict(model='vlm', dataset='scenes_qa', out_dir='out/fault', pictures=False) | changes))
    assert '\n' not in str(error.value)


def test_index_beyond_the_pictures(run, here):
    path = Path('data/scenes_qa/val/scene.npy')
    good = np.load(path)
    np.save(path, good + 1000)
    with pytest.raises(UserError, match='outside the vocabulary of 30'):
        train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/fault', pictures=False)
    np.save(path, good)


def test_answers(run, capsys):
    Image.new('RGBA', (300, 200), (200, 30, 30, 120)).save('own.png')
    Path('asked.txt').write_text('How many red cubes are there?\nwhat color is the large sphere\n')
    for extra in (['--text=How many red cubes are there?'], ['--prompts=asked.txt', '--image=own.png,own.png']):
        capsys.readouterr()
        sample.main(f'--out_dir={run}', '--image=own.png', *extra, '--max_new_tokens=3')
        assert capsys.readouterr().out.count('\n') == (4 if 'own.png,own' in str(extra) else 1)


def test_chat(run, capsys, monkeypatch):
    Image.new('L', (20, 20)).save('grey.png')
    said = iter(['Are there any cubes?'] * 9 + [''])  # more turns than the context holds
    monkeypatch.setattr('builtins.input', lambda _: next(said))
    sample.main(f'--out_dir={run}', '--image=grey.png', '--chat=True', '--max_new_tokens=3')
    assert capsys.readouterr().out.count('\n') == 10


def test_chat_shows_no_half_characters(run, capsys, monkeypatch):
    said, answer = iter(['What is it?', '']), 'né 🙂.'.encode()  # a token a byte
    fields = mock.Mock(decode=lambda ids: bytes(ids).decode(errors='replace'))
    monkeypatch.setattr('builtins.input', lambda _: next(said))
    module = lab.module_of('vlm')
    monkeypatch.setattr(module, 'look', mock.Mock())
    monkeypatch.setattr(module, 'ask', lambda *_: torch.tensor(list(answer)))
    module.chat(mock.Mock(fields=fields), None, module.Answers())
    assert capsys.readouterr().out.endswith('\nné 🙂.\n')


def test_long_answers_stay_in_the_picture(tmp_path):
    talks = [[('What is there?', 'a large red metal sphere, ' * 40, 'nothing')] * 2, [('Is there a cube?', 'yes', 'yes')]]
    figures.save_answers(np.zeros((2, 64, 64, 3), np.uint8), talks, tmp_path / 'long.png')
    picture = np.asarray(Image.open(tmp_path / 'long.png'))
    inked = (picture[:, 160:] < 255).any((1, 2))
    assert (picture[:, -20:] == 255).all() and 30 * 13 < inked[:-168].nonzero()[0].max() < len(inked) - 168  # 15 lines each


def test_scores(run):
    scores = score.main(f'--out_dir={run}', '--blind=out/blind')
    for kind in ('', 'another picture: ', 'no picture: ', 'new pairs: '):
        assert 0 <= scores[f'{kind}all']['low'] <= scores[f'{kind}all']['value'] <= scores[f'{kind}all']['high'] <= 1
    assert {'count', 'exist', 'hop', 'query', 'answers/s'} <= scores.keys() and 0 < scores['exist']['baseline'] < 1
    assert score.main('--out_dir=out/align', '--n_score=4')['all']['n'] == 4
    for folder, message in (('nothing', 'no such checkpoint; the nearest are out/'),
                            ('words', 'must be a run of vlm with --blind=True on the same data'),
                            ('qa', 'must be a run of vlm with --blind=True on the same data')):
        with pytest.raises(UserError, match=message):
            score.main(f'--out_dir={run}', f'--blind=out/{folder}')


@pytest.mark.parametrize('arguments, message', [
    (['--image=none.png', '--text=Is it?'], 'none.png: no such picture'),
    (['--image=own.png'], 'an empty question'),
    (['--image=own.png', '--text=' + 'x' * 100], 'the question has 102 tokens, and the context has room for 59, the answer'),
    (['--image=own.png', '--prompts=latin.txt'], 'latin.txt: not UTF-8 text'),
    (['--image=own.png', '--prompts=empty.txt'], 'empty.txt: no prompts'),
    (['--image=own.png', '--text=Is it?', '--chat=True'], 'chat and text do not go together'),
    (['--image=own.png', '--text=Is it?', '--prompts=asked.txt'], 'prompts and text do not go together'),
    (['--text=Is it?'], 'questions need --image=FILE'),
    (['--chat=True'], 'questions need --image=FILE'),
    (['--given=rgb'], r'given is a setting of lab/fourm.py \(AnyToAny\); here are those of lab/vlm.py \(Answers\)'),
])
def test_faults_of_answering(run, arguments, message):
    Image.new('RGB', (64, 64)).save('own.png')
    Path('latin.txt').write_bytes(b'caf\xe9'), Path('empty.txt').write_text('')
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={run}', *arguments)
    assert '\n' not in str(error.value)
