"""nanoVLM: its parts against references, answers with a cache against answers without, training in two stages."""
import io
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
from prepare import scenes, scenes_align, scenes_qa, toy2d
from prepare.scenes_render import make
from tests.conftest import ROOT
from tests.test_flow import RUN

TINY = dict(n_layer=1, n_head=2, n_embd=16, vision_layer=1, vision_head=2, vision_embd=16, batch_size=8,
            micro_batch_size=4, max_iters=3, eval_interval=3, eval_iters=2, device='cpu', dtype='float32',
            compile=False, threads=1)


def small(**changes):
    torch.manual_seed(1)
    config = dict(vocab_size=11, image_token=10, block_size=14, n_layer=2, n_head=2, n_embd=16, image_size=16,
                  patch_size=4, pixel_shuffle_factor=2, vision_layer=1, vision_head=2, vision_embd=8)
    model = vlm.VLM(vlm.Config(**(config | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_images(B, m=1, size=16):
    return torch.randint(256, (B, m, size, size, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Parts

def test_pixel_shuffle_keeps_squares_together():
    x = torch.arange(36.0).view(1, 36, 1)  # a 6 x 6 image of one channel
    assert vlm.pixel_shuffle(x, 3)[0].tolist()[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert torch.equal(vlm.pixel_shuffle(x, 1), x)


def test_expanded_image_tokens():
    tokens = torch.tensor([[9, 1, 2, -1], [3, 9, 4, 5]])
    idx = vlm.expand_image_tokens(tokens, 9, 3, 1)
    assert tokens.gather(1, idx).tolist() == [[9, 9, 9, 1, 2, -1], [3, 9, 9, 9, 4, 5]]
    for wrong in (2, 0):
        with pytest.raises(ValueError, match=rf'rows have \[1, 1\] image tokens, each should have n_images={wrong}'):
            vlm.expand_image_tokens(tokens, 9, 3, wrong)
    with pytest.raises(AssertionError, match='image_size=16 must be a multiple of patch_size . pixel_shuffle.* = 12'):
        small(patch_size=4, pixel_shuffle_factor=3)


@torch.no_grad()
def test_the_language_model_alone_is_chapter_1():
    model = small()
    alone = gpt.GPT(gpt.Config(vocab_size=11, block_size=17, n_layer=2, n_head=2, n_embd=16)).eval()
    alone.load_state_dict(model.language_model.state_dict())
    tokens = torch.randint(10, (3, 9))
    assert torch.equal(model.language_model.logits(model.backbone(tokens)), alone.logits(alone.backbone(tokens)))


@torch.no_grad()
def test_every_image_is_read_at_its_position():
    model, tokens = small(n_images=2), torch.tensor([[10, 1, 10, 2, 3]])
    images = random_images(1, 2)
    batch = model.prepare_batch(dict(image=images, tokens=tokens, loss_mask=torch.ones_like(tokens)), None, None)
    x = model.backbone(batch['tokens'], model.encode_images(images))
    assert x.size(1) == 5 + 2 * 3
    swapped = model.backbone(batch['tokens'], model.encode_images(images.flip(1)))
    assert not torch.allclose(x[:, 3], swapped[:, 3]) and not torch.allclose(x[:, -1], swapped[:, -1])
    images[:, 1] = 0  # the second image does not change what is before it: 4 tokens, a word
    other = model.backbone(batch['tokens'], model.encode_images(images))
    torch.testing.assert_close(x[:, :5], other[:, :5])
    assert not torch.allclose(x[:, 5], other[:, 5])


def test_the_loss_is_of_answers_alone():
    """As written out; tokens after an answer's end and those of a question are no targets."""
    model, images = small(), random_images(2)[:, 0]
    tokens = torch.tensor([[10, 1, 2, 3, 4, 5, 6, -1], [10, 7, 8, 3, -1, -1, -1, -1]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]])

    def loss_of(tokens, loss_mask):
        return model(model.prepare_batch(dict(image=images, tokens=tokens, loss_mask=loss_mask), None, None))
    loss, logs = loss_of(tokens, loss_mask)
    x = model.backbone(torch.cat((torch.full((2, 3), 10), tokens), 1), model.encode_images(images))
    log_p = model.language_model.logits(x).log_softmax(-1)[:, 3:-1]  # of tokens 1 and after
    nll = -log_p.gather(-1, tokens[:, 1:, None].clamp(min=0))[..., 0]
    expected = (nll[0, [1, 2, 4, 5]].mean() + nll[1, [1, 2]].mean()) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs['loss'], torch.stack((2 * expected, torch.tensor(2.0))))
    after, flags = tokens.clone(), loss_mask.clone()
    after[1, 4:], after[0, 7] = 9, 9  # other tokens after the end; and padding with a loss_mask of 1
    torch.testing.assert_close(loss_of(after, loss_mask)[0], loss)
    flags[1, 5:] = 1
    torch.testing.assert_close(loss_of(tokens, flags)[0], loss)


def test_patch_labels_are_predicted_at_their_image_token():
    """All words of a label are predicted at the image token, in the same mean as the answers."""
    model, images = small(max_label_tokens=2, n_patch_labels=4), random_images(1)[:, 0]
    labels = torch.tensor([[[1, 2], [3, -1], [-1, -1], [4, 5]]])
    tokens, loss_mask = torch.tensor([[10, 6, 7]]), torch.tensor([[0, 0, 1]])
    batch = dict(image=images, tokens=tokens, loss_mask=loss_mask, patch_labels=labels)
    loss, _ = model(model.prepare_batch(batch, None, None))
    x = model.backbone(torch.tensor([[10] * 4 + [6, 7]]), model.encode_images(images))
    log_p = model.language_model.logits(x)[0].log_softmax(-1)
    pairs = [(0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 7)]
    torch.testing.assert_close(loss, -torch.stack([log_p[i, word] for i, word in pairs]).mean())
    with pytest.raises(AssertionError, match='4 embeddings an image, 9 patch labels: change patch_size or pixel_shuffle'):
        small(max_label_tokens=2, n_patch_labels=9)


def test_text_only_ignores_images():
    model, tokens = small(text_only=True), torch.tensor([[10, 1, 2, 3]])
    batches = [dict(image=random_images(1), tokens=tokens, loss_mask=tokens < 9) for _ in range(2)]
    first, second = (model(model.prepare_batch(batch, None, None))[0] for batch in batches)
    assert first == second


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def reference(model, image, prompt, n, end):
    """Answers without a cache, one at a time: the whole sequence is read again for each token."""
    tokens, new = torch.cat((torch.full((model.tokens_per_image * len(image),), 10), prompt)), []
    while len(new) < n and end not in new:
        x = model.backbone(tokens[None], model.encode_images(image[None]))
        new.append(model.language_model.logits(x[0, -1])[:10].argmax().item())  # 10 is the image token
        tokens = torch.cat((tokens, torch.tensor(new[-1:])))
    return new + [-1] * (n - len(new))


@torch.no_grad()
@pytest.mark.parametrize('changes', [
    {}, dict(n_images=2), dict(token_shift=False, n_kv_head=1, pixel_shuffle_factor=1)])
def test_cached_answers_are_the_uncached_ones(changes):
    """Questions of different lengths, three about each image, which is encoded once."""
    model, S, n = small(**changes), 2, 3
    m, images = model.config.n_images, random_images(2, model.config.n_images)
    encoded = []
    model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    cache = model.prefill(torch.full((S, m), 10), images, n)
    assert len(encoded) == 1
    questions = torch.randint(9, (S * n, 5))
    for row, short in enumerate((0, 4, 2, 1, 3, 0)):
        questions[row, :short] = -1
    new = model.generate(questions, cache, 6, eos_id=7)
    for row in range(S * n):
        expected = reference(model, images[row // n], questions[row][questions[row] >= 0], new.size(1), 7)
        assert new[row].tolist() == expected
    assert len(encoded) == 1 + sum(min(len([t for t in row if t >= 0]), 6) for row in new.tolist())


@torch.no_grad()
def test_turns_go_on_in_the_cache():
    model, image = small(), random_images(1)
    cache = model.prefill(torch.tensor([[10]]), image)
    first = model.generate(torch.tensor([[1, 2]]), cache, 2)
    second = model.generate(torch.cat((first[:, -1:], torch.tensor([[3, 4]])), 1), cache, 2)
    prompt = torch.cat((torch.tensor([1, 2]), first[0], torch.tensor([3, 4])))
    assert second[0].tolist() == reference(model, image[0], prompt, 2, -2)
    assert len(list(model.stream(torch.tensor([[5]]), cache, 99))) > 0 and cache.cur_len == model.max_seq_len


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = vlm.VLM(vlm.Config(vocab_size=12, image_token=10, block_size=8, n_layer=2, n_head=2, n_embd=32,
                               image_size=16, patch_size=4, pixel_shuffle_factor=2, vision_layer=1, vision_head=2,
                               vision_embd=32))
    tokens = torch.cat((torch.tensor([[10, 1, 2]] * 4), torch.arange(3, 7)[:, None], torch.full((4, 1), 9)), 1)
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    batch = dict(image=colors.view(4, 1, 1, 3).expand(-1, 16, 16, -1), tokens=tokens,
                 loss_mask=torch.tensor([[0, 0, 0, 1, 1]] * 4))
    batch = model.prepare_batch(batch, None, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):  # the same question about four images: the answer depends on the image alone
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Training and answering

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A working folder with images of 60 + 30 scenes, their descriptions and questions."""
    folder, before = tmp_path_factory.mktemp('vlm'), Path.cwd()
    for name in ('config', 'prepare'):
        (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)
    for split, n, seed in (('train', 60, 0), ('val', 30, 1)):
        arrays = scenes.raw_arrays(make(n, seed, 64, 5, workers=1))
        scenes.write(Path('data/scenes', split), {name: arrays[name] for name in ('raw_rgb', 'raw_objects')})
    scenes.save_meta(Path('data/scenes'), dict(kind='rows', prepare='scenes', fields=dict(image=256), config={}))
    scenes_align.main()
    scenes_qa.main(n_turns=4, length=60)
    yield folder
    os.chdir(before)


@pytest.fixture(scope='module')
def run(here):
    train.main(**TINY, model='vlm', dataset='scenes_align', out_dir='out/align', pictures=False,
               lr_multipliers='language_model:0')
    train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/qa', init_from='align',
               lr_multipliers='vision_encoder:0 projector:0.5')
    train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/text_only', text_only=True, pictures=False,
               lr_multipliers='vision_encoder:0 projector:0')
    train.main(model='gpt', dataset='scenes_qa', out_dir='out/words', pictures=False, n_layer=1, n_head=2, n_embd=24,
               batch_size=4, max_iters=1, compile=False, device='cpu', threads=1)
    return 'out/qa'


def weights(out_dir):
    return checkpoints.read(Path(out_dir, 'ckpt_last.pt'))['weights']


def test_two_stages(run):
    align, answer = weights('out/align'), weights(run)
    same = {name: torch.equal(align[name], answer[name]) for name in align}
    assert all(equal == name.startswith('vision_encoder') for name, equal in same.items())
    assert len(list(Path(run).glob('sample_*.png'))) == 1
    torch.manual_seed(0)
    fresh = vlm.VLM(vlm.Config(**checkpoints.read(Path('out/align/ckpt_last.pt'))['model_config'])).state_dict()
    assert all(torch.equal(fresh[name], align[name]) for name in align if name.startswith('language_model'))


def test_parts_from_other_runs(run):
    sizes = {name: value for name, value in TINY.items() if name not in ('n_layer', 'n_head', 'n_embd', 'vision_layer')}
    train.main(**sizes, model='vlm', dataset='scenes_qa', out_dir='out/parts', pictures=False,
               lr_multipliers='vision_encoder:0 language_model:0',
               init_from='vision_encoder:align,language_model:words')
    parts, align, words = weights('out/parts'), weights('out/align'), weights('out/words')
    assert all(torch.equal(parts[f'language_model.{name}'], words[name]) for name in words)
    assert all(torch.equal(parts[name], align[name]) for name in align if name.startswith('vision_encoder'))


@pytest.mark.parametrize('changes, message', [
    (dict(lr_multipliers='nose:0'),
     "no parameter begins with 'nose'; the parts are vision_encoder, projector, language_model"),
    (dict(lr_multipliers='vision_encoder:fast'), "lr_multipliers='fast' is not of type float"),
    (dict(lr_multipliers='vision_encoder:-1'), 'multipliers must be at least 0, and one above 0'),
    (dict(lr_multipliers='vision_encoder:0 projector:0 language_model:0'),
     'multipliers must be at least 0, and one above 0'),
    (dict(init_from='nose:align'), "the model has no part 'nose'; there are vision_encoder, projector, language_model"),
    (dict(init_from='vision_encoder:align', vision_embd=32), 'for other sizes'),
    (dict(init_from='vision_encoder:none'), 'no such checkpoint'),
    (dict(patch_size=7), 'image_size=64 must be a multiple of patch_size . pixel_shuffle_factor = 7'),
    (dict(image_size=32), 'image_size is decided by the data set'),
])
def test_faults_of_training(run, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.main(**(TINY | dict(model='vlm', dataset='scenes_qa', out_dir='out/fault', pictures=False) | changes))
    assert '\n' not in str(error.value)


def test_index_beyond_the_images(run, here):
    path = Path('data/scenes_qa/val/scene.npy')
    good = np.load(path)
    np.save(path, good + 1000)
    with pytest.raises(UserError, match='outside the vocabulary of 30'):
        train.main(**TINY, model='vlm', dataset='scenes_qa', out_dir='out/fault', pictures=False)
    np.save(path, good)


def test_answers(run, capsys):
    Image.new('RGBA', (300, 200), (200, 30, 30, 120)).save('own.png')
    Path('asked.txt').write_text('How many red cubes are there?\nwhat color is the large sphere\n')
    Image.new('L', (9, 9)).save('red, blue.png')
    for extra, n in ((['--text=How many red cubes are there?'], 1), (['--prompts=asked.txt', '--image=own.png,own.png'], 4),
                     (['--prompts=asked.txt', '--image=own.png,red, blue.png,own.png'], 6)):
        capsys.readouterr()
        sample.main(f'--out_dir={run}', '--image=own.png', *extra, '--max_new_tokens=3')
        assert capsys.readouterr().out.count('\n') == n
    sample.main(f'--out_dir={run}', '--image=own.png', '--text=Is the cube red?', '--max_new_tokens=0')
    assert capsys.readouterr().out == '\n'


def test_own_questions(run):
    dataset = lab.open_run(Path(run, 'ckpt_last.pt'), 'cpu').dataset
    for text in ('how many  red\ncubes are there', 'How many red cubes are there?'):
        assert dataset.own_question(text) == 'How many red cubes are there?'
    for line in dataset.questions('train')[:20]:
        assert [dataset.own_question(question) for question, _ in line['turns']] == [question for question, _ in line['turns']]


def test_chat(run, capsys, monkeypatch):
    Image.new('L', (20, 20)).save('grey.png')
    asked = b'What \xe9?\n' + 3 * b'are there  any cubes\n' + b'Are there any' + 97 * b' red' + b' cubes' + 6 * b'\nAre there any cubes?'
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(asked), 'utf-8'))
    sample.main(f'--out_dir={run}', '--image=grey.png', '--chat=True', '--max_new_tokens=3')
    said, full = capsys.readouterr().out, 'the context is full: earlier turns are left out\n'
    assert "'What \ufffd?' is not worded as the texts of this data set; one of them is 'What" in said
    assert said.count('the question has 101 tokens, and the context has room for 59') == 1
    assert 1 <= said.count(full) < 5  # more turns than the context holds
    assert said.replace(full, '').count('\n') == 1 + 1 + 3 + 1 + 6


def test_chat_shows_no_half_characters(run, capsys, monkeypatch):
    said, answer = iter(['What is it?', '']), 'né 🙂.'.encode() + b'\xf0\x9f'  # a token a byte; ends within a character
    dataset = mock.Mock(decode=lambda ids: bytes(ids).decode(errors='replace'), own_question=str)
    monkeypatch.setattr('builtins.input', lambda _: next(said))
    module = lab.module_of('vlm')
    monkeypatch.setattr(module, 'prefill_images', mock.Mock())
    monkeypatch.setattr(module, 'answer_stream', lambda *_: torch.tensor(list(answer)))
    module.chat(mock.Mock(dataset=dataset), None, module.Answers())
    assert capsys.readouterr().out.endswith('\nné 🙂.\ufffd\n')


def test_long_answers_stay_in_the_picture(tmp_path):
    talks = [[('What is there?', 'a large red metal sphere, ' * 40, 'nothing')] * 2,
             [('Is there a cube?', 'yes', 'yes')]]
    figures.save_answers(np.zeros((2, 64, 64, 3), np.uint8), talks, tmp_path / 'long.png')
    picture = np.asarray(Image.open(tmp_path / 'long.png'))
    inked = (picture[:, 160:] < 255).any((1, 2))
    assert (picture[:, -20:] == 255).all()
    assert 30 * 13 < inked[:-168].nonzero()[0].max() < len(inked) - 168  # 15 lines each


def test_scores(run):
    scores = score.main(f'--out_dir={run}', '--text_only_run=out/text_only')
    for kind in ('', 'another image: ', 'text only: ', 'new pairs: '):
        assert 0 <= scores[f'{kind}all']['low'] <= scores[f'{kind}all']['value'] <= scores[f'{kind}all']['high'] <= 1
    assert {'count', 'exist', 'hop', 'query', 'answers/s'} <= scores.keys() and 0 < scores['exist']['baseline'] < 1
    assert score.main('--out_dir=out/align', '--n_score=4')['all']['n'] == 4
    toy2d.main(n_train=60, n_val=20, out='data/points')
    train.main(**RUN, dataset='points', out_dir='out/numbers', label_dropout=0.0)
    for folder, message in (('nothing', 'no such checkpoint; the nearest are out/'),
                            ('numbers', 'must be a run of vlm with --text_only=True on the same data'),
                            ('words', 'must be a run of vlm with --text_only=True on the same data'),
                            ('qa', 'must be a run of vlm with --text_only=True on the same data')):
        with pytest.raises(UserError, match=message):
            score.main(f'--out_dir={run}', f'--text_only_run=out/{folder}')


def test_another_image_is_another_one(run, monkeypatch):
    """Several lines may be about one image; a family may be missing in training."""
    module = lab.module_of('vlm')
    assert module.other_images([dict(image=i) for i in (5, 5, 6, 7, 7)]) == [7, 7, 5, 6, 6]
    lines = [dict(image=3, turns=[['Is it?', 'yes']], families=['new'])] * 2
    assert module.other_images(lines) == [None, None]
    questions = type(lab.open_run(Path(run, 'ckpt_last.pt'), 'cpu').dataset).questions
    monkeypatch.setattr('prepare.vqa.Dataset.questions', lambda self, split, name='questions': lines if split == 'val' and name == 'questions' else questions(self, split, name))
    found = score.main(f'--out_dir={run}', '--n_score=2', '--max_new_tokens=2', '--seed=7')
    assert found['--seed=7 --max_new_tokens=2 new']['baseline'] == 0 and not any('--seed=7' in name and 'another image' in name for name in found)


@pytest.mark.parametrize('arguments, message', [
    (['--image=none.png', '--text=Is it?'], 'none.png: no such image'),
    (['--image=own.png'], 'an empty question'),
    (['--image=own.png', '--text=Is there red cube?'], "'Is there red cube.' is not worded as the texts of this data set; one of them is '.*.'"),
    (['--image=own.png', '--text=Is there a red cube?'], "'a' is not in the vocabulary of this data set: .* One of its texts is '.*.'"),
    (['--image=own.png', '--text=Are there any' + ' red' * 98 + ' cubes?'],
     'the question has 102 tokens, and the context has room for 59, the answer'),
    (['--image=own.png', '--prompts=latin.txt'], 'latin.txt: not UTF-8 text'),
    (['--image=own.png', '--prompts=empty.txt'], 'empty.txt: no prompts'),
    (['--image=own.png', '--prompts=gap.txt'], 'gap.txt: line 2 is empty: write one question a line'),
    (['--image=own.png,own.png', '--chat=True'], 'a chat is about 1 image, and 2 are named'),
    (['--image=own.png', '--text=Is it?', '--chat=True'], 'chat and text do not go together'),
    (['--image=own.png', '--text=Is it?', '--prompts=asked.txt'], 'prompts and text do not go together'),
    (['--text=Is it?'], 'questions need --image=FILE'),
    (['--chat=True'], 'questions need --image=FILE'),
    (['--given=rgb'], r'given is a setting of lab/fourm.py \(AnyToAny\); here are those of lab/vlm.py \(Answers\)'),
])
def test_faults_of_answering(run, arguments, message):
    Image.new('RGB', (64, 64)).save('own.png')
    Path('latin.txt').write_bytes(b'caf\xe9'), Path('empty.txt').write_text('')
    Path('gap.txt').write_text('Is it?\n\nIs it?\n')
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={run}', *arguments)
    assert '\n' not in str(error.value)
