"""The sampler's commands, on a tiny run."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gpt
import sample
import train
from config import UserError
from prepare import judge, mnist, report, text
from tests.test_mnist import toy_digits
from tests.test_train import TINY


@pytest.fixture(scope='module')
def out_dir(work):
    train.main(**(TINY | dict(out_dir='out/sampled', max_iters=2, pictures=True)))
    return 'out/sampled'


def pictures(out_dir):
    return set(Path(out_dir).glob('sample_*.png'))


def draw(out_dir, *arguments, steps=2):
    before = pictures(out_dir)
    sample.main(f'--out_dir={out_dir}', '--n=2', f'--steps={steps}', *arguments)
    new, = pictures(out_dir) - before
    picture = Image.open(new)
    new.unlink()
    return picture


def test_training_draws(out_dir):
    assert pictures(out_dir)


def test_grids(out_dir, capsys):
    everything = draw(out_dir)
    assert everything.size == (14 * 132 - 4, 18 + 2 * 132 - 4)  # rgb; truth and result of 5; caption; truth and result
    chain = draw(out_dir, '--chain=rgb>depth:2,normal:2:confidence,scene_desc')
    assert chain.size[0] == 7 * 132 - 4
    text = draw(out_dir, '--given=caption', '--text=two large red metal spheres', '--target=rgb,depth')
    assert text.size[0] == 3 * 132 - 4 and 'a large red metal sphere and a large red metal sphere' in capsys.readouterr().out
    Image.new('L', (32, 32)).save('own.png')
    assert draw(out_dir, '--given=rgb', '--image=own.png', '--target=depth').size[0] == 2 * 132 - 4
    both = draw(out_dir, '--given=rgb,caption', '--image=own.png', '--text=a small red metal cube', '--target=depth')
    assert both.size[0] == 3 * 132 - 4
    assert draw(out_dir, '--target=rgb,caption').size[0] == 2 * 132 - 4  # from nothing


def test_links_of_a_chain():
    link = sample.read_link('rgb:25:halton:cosine:t0.9..0.3:g1..3:w-0.5:best8', sample.SETTINGS)
    assert {name: link[name] for name in ('steps', 'order', 'schedule', 'temperature', 'temperature_end', 'guidance_start',
                                          'guidance', 'weight', 'best', 'mean')} == dict(
        steps=25, order='halton', schedule='cosine', temperature=0.9, temperature_end=0.3, guidance_start=1, guidance=3,
        weight=-0.5, best=8, mean=1)
    plain = sample.read_link('depth', sample.SETTINGS | dict(order='raster'))
    assert plain['order'] == 'raster' and plain['steps'] == 0 and plain['weight'] == 1


def test_chains_of_every_kind(out_dir):
    chain = draw(out_dir, '--chain=caption:w3,depth:w-1>normal:2:halton:t0.5,segmentation:mean3,rgb:2:best2:g1..3')
    assert chain.size[0] == 8 * 132 - 4
    assert draw(out_dir, '--chain=rgb>depth:mean2;caption>depth').size[0] == (1 + 2 + 2) * 132 - 4  # the truth once


def test_the_mean_of_draws():
    depth = np.random.default_rng(0).random((2, 5, 4, 4)).astype(np.float32)
    assert np.allclose(sample.mean_of('depth', depth), depth.mean(1))
    classes = np.array([3, 1, 1, 0, 3, 3]).reshape(1, 6, 1, 1).repeat(2, 2).astype(np.uint8)
    assert (sample.mean_of('segmentation', classes) == 3).all() and sample.mean_of('segmentation', classes).shape == (1, 2, 1)


def test_the_best_draw_is_the_one_that_tells_its_condition(out_dir):
    model, _ = train.load_model(Path(out_dir, 'ckpt_last.pt'))
    torch.manual_seed(0)
    for head in model.heads.values():
        torch.nn.init.normal_(head.out[0].weight)
    fields = sample.fields_of(Path('data/scenes'), train.read_meta(Path('data/scenes')))
    given = {'caption': sample.read_ids(fields, 'caption', 'val', np.arange(3))}
    ids = torch.randint(4096, (12, 64))
    best = sample.likeliest(model, given, 'depth', ids, 4)
    for i in range(3):
        log_p = [model.log_prob(model.ask({'depth': row[None]}, 'caption'), 'caption', given['caption'][i:i + 1]).item()
                 for row in ids[4 * i:4 * i + 4]]
        assert torch.equal(best[i], ids[4 * i + int(np.argmax(log_p))])


def test_what_is_hidden_is_made_anew_and_the_rest_stays(out_dir):
    """Inside a box, around it, and where an object is: the patches that are given come back as they were."""
    model, _ = train.load_model(Path(out_dir, 'ckpt_last.pt'))
    fields = sample.fields_of(Path('data/scenes'), train.read_meta(Path('data/scenes')))

    def run(hide, names='rgb'):
        settings = sample.SETTINGS | dict(hide=hide, steps=2)
        chain = sample.parse_chain(f'{names}>', settings, model)
        ids, own = sample.read_given(model, fields, settings, chain, np.arange(2), torch.Generator().manual_seed(0))
        found, _ = sample.generate(model, fields, ids, chain, torch.Generator().manual_seed(0))
        name = hide.split('=')[0]
        hidden, truth = ids[name] < 0, sample.read_ids(fields, name, 'val', np.arange(2))
        assert torch.equal(found[name][~hidden], truth[~hidden])
        assert name not in ('rgb', 'depth') or (found[name] >= 0).all()
        return hidden
    box = torch.zeros(8, 8, dtype=torch.bool)
    box[1:5, 2:4] = True
    assert torch.equal(run('rgb=16,12,32,40'), box.flatten().expand(2, -1))  # every patch that the box touches
    whole = torch.zeros(8, 8, dtype=torch.bool)
    whole[1:5, 2:4] = True
    assert torch.equal(run('depth=outside 16,8,32,40', 'rgb,depth'), ~whole.flatten().expand(2, -1))
    segmentation = fields.decode('segmentation', sample.read_ids(fields, 'segmentation', 'val', np.arange(2)))
    there = (segmentation > 0).reshape(2, 8, 8, 8, 8).any((2, 4)).reshape(2, 64)
    assert torch.equal(run('rgb=objects', 'rgb,segmentation'), torch.from_numpy(there))
    assert run('caption=6', 'rgb,caption')[:, 6:].all() and not run('caption=6', 'rgb,caption')[:, :6].any()
    words = run('caption=large,small', 'rgb,caption')
    truth = sample.read_ids(fields, 'caption', 'val', np.arange(2))
    assert [fields.decode('caption', row[hidden][None])[0].split() for row, hidden in zip(truth, words)] == [
        [word for word in fields.decode('caption', row[None])[0].split() if word in ('large', 'small')] for row in truth]


def test_pictures_before_and_after(out_dir, capsys):
    columns = np.asarray(draw(out_dir, '--given=rgb', '--hide=rgb=16,16,48,48'))[18:]
    assert columns.shape[1] == 3 * 132 - 4
    given = columns[:128, 132:132 + 128]
    assert (given[32:96, 32:96] == 128).all() and not (given[:32] == 128).all()
    draw(out_dir, '--given=caption,depth', '--replace=large=small', '--target=rgb')
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith('caption: ')]
    assert texts and all(' small ' in text and ' large ' not in text for text in texts)
    Image.new('L', (32, 32)).save('own.png')
    draw(out_dir, '--given=caption', '--text=a large red ...', '--target=caption,rgb', '--temperature=0')
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith('caption: ')]
    assert texts and all(text.startswith('caption: a large red') for text in texts)
    assert draw(out_dir, '--given=rgb', '--image=own.png', '--hide=rgb=outside 8,8,32,32').size[0] == 2 * 132 - 4


def test_same_seed_same_picture(out_dir):
    a, b, c = (np.asarray(draw(out_dir, '--target=rgb', f'--seed={seed}')) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_scores(out_dir, capsys):
    sample.main(f'--out_dir={out_dir}', '--score=True', '--n_score=6', '--steps=2')
    scores = json.loads(Path(out_dir, 'scores.json').read_text())
    cells = {name.split('/')[0] for name in scores if '>' in name}
    assert len(cells) == 30
    for name, score in scores.items():
        assert score['low'] <= score['value'] <= score['high'] and score['n'] == 6, name
        if '>' in name and not name.endswith('/ms a scene'):
            assert {'ceiling', 'baseline'} <= score.keys()
    assert scores['caption>scene_desc/attributes']['ceiling'] == 1
    assert 'rgb>depth/absrel_objects' in capsys.readouterr().out
    sample.main(f'--out_dir={out_dir}', '--score=True', '--n_score=4', '--given=depth,rgb', '--target=normal')
    pairs = Path(out_dir, 'scores.json').read_text()
    again = {name: score['n'] for name, score in json.loads(pairs).items() if '>' in name}
    assert {name.split('/')[0] for name, n in again.items() if n == 4} == {'depth>normal', 'rgb>normal'}
    assert len({name.split('/')[0] for name, n in again.items() if n == 6}) == 28  # the others stay
    sample.main(f'--out_dir={out_dir}', '--score=True', '--n_score=4', '--chain=caption>segmentation,rgb:g3;caption>rgb:g3')
    chains = json.loads(Path(out_dir, 'scores_chains.json').read_text())
    assert {'caption>segmentation,rgb:g3/segmentation/miou_objects', 'caption>segmentation,rgb:g3/rgb/attributes',
            'caption>rgb:g3/attributes', 'caption>rgb:g3/ms a scene'} <= chains.keys()
    assert Path(out_dir, 'scores.json').read_text() == pairs


def test_scores_are_added_to_those_of_the_same_weights(tmp_path, capsys):
    path, one = tmp_path / 'scores.json', report.alone(1.0, 5)
    report.save_scores(dict(a=one, b=one), path)
    report.save_scores(dict(b=report.alone(2.0, 5)), path)
    assert {name: score['value'] for name, score in json.loads(path.read_text()).items()} == dict(a=1, b=2)
    assert capsys.readouterr().out.endswith('scores.json (others that stay there: 1)\n')
    (tmp_path / 'ckpt_last.pt').touch()
    os.utime(path, ns=(0, 0))
    report.save_scores(dict(c=one), path)
    assert list(json.loads(path.read_text())) == ['c']
    path.write_text('{"a": 1}')  # damaged
    report.save_scores(dict(c=one), path)
    assert list(json.loads(path.read_text())) == ['c'] and not list(tmp_path.glob('*.tmp'))


def test_bootstrap():
    parts = np.stack((np.arange(100.0), np.full(100, 2.0)), -1)[:, None]
    score = report.bootstrap(parts)
    assert score['value'] == pytest.approx(49.5 / 2) and score['n'] == 100
    error = np.arange(100).std() / 2 / 10
    assert score['high'] - score['low'] == pytest.approx(2 * 1.96 * error, rel=0.15)


GPT = dict(model='gpt', n_layer=1, n_head=2, n_embd=16, batch_size=4, max_iters=2, device='cpu', dtype='float32', compile=False)


@pytest.fixture(scope='module')
def text_run(work):
    """A GPT that has seen a few steps of byte-pair tokens."""
    Path('story.txt').write_text('The cat sat on the mat. Straße. ' * 300)
    text.main(input='story.txt', encoding='bpe', vocab_size=280, out='data/story')
    train.main(**GPT, dataset='story', block_size=16, out_dir='out/story')
    return 'out/story'


def test_texts(text_run, capsys):
    assert Path(text_run, 'sample_000002.txt').exists()
    capsys.readouterr()
    sample.main(f'--out_dir={text_run}', '--prompt=The cat', '--max_new_tokens=40')
    one = capsys.readouterr().out
    assert one.startswith('The cat') and len(one) > 20
    sample.main(f'--out_dir={text_run}', '--prompt=The cat', '--max_new_tokens=40', '--n=3')
    assert capsys.readouterr().out.count('-----\nThe cat') == 2
    Path('prompts.txt').write_text('The\nThe cat sat on the\n')
    sample.main(f'--out_dir={text_run}', '--prompts=prompts.txt', '--max_new_tokens=5', '--temperature=0')
    first, second = capsys.readouterr().out.split('\n-----\n')
    for prompt, together in (('The', first), ('The cat sat on the', second)):
        sample.main(f'--out_dir={text_run}', f'--prompt={prompt}', '--max_new_tokens=5', '--temperature=0')
        assert capsys.readouterr().out.strip() == together.strip()
    sample.main(f'--out_dir={text_run}', '--prompts=prompts.txt', '--max_new_tokens=5', '--n=2')
    texts = capsys.readouterr().out.split('\n-----\n')
    assert [text.startswith('The cat sat on the') for text in texts] == [False, False, True, True]


def test_compiled_passes(text_run, capsys, monkeypatch):
    """The same text by --compile, in both number formats; all layers share what is compiled: five take no more than two."""
    frames = torch._dynamo.utils.counters['frames']
    for kind in gpt.KVCache, gpt.Recorded:
        monkeypatch.setattr(kind, 'append', kind.append)  # to be as they were afterwards
    for layers, more in ((2, True), (5, False)):
        train.main(**(GPT | dict(n_layer=layers)), dataset='story', block_size=16, out_dir=f'out/story_{layers}', pictures=False)
        capsys.readouterr()
        before = frames['ok']
        for dtype in ('float32', 'bfloat16'):
            texts = []
            for compiled in (False, True):
                sample.main(f'--out_dir=out/story_{layers}', '--prompt=The cat', '--max_new_tokens=12', '--temperature=0',
                            f'--dtype={dtype}', f'--compile={compiled}')
                texts.append(capsys.readouterr().out)
            assert texts[0] == texts[1]
        assert (frames['ok'] > before) == more


def test_a_draft_changes_nothing_but_the_speed(text_run, capsys):
    train.main(**(GPT | dict(n_head=1, n_embd=8)), dataset='story', block_size=16, out_dir='out/story_draft', pictures=False)
    train.main(**GPT, dataset='story', block_size=8, out_dir='out/story_short', pictures=False)
    Path('other.txt').write_text('abcab' * 100)
    text.main(input='other.txt', out='data/other')
    train.main(**GPT, dataset='other', block_size=16, out_dir='out/other', pictures=False)
    capsys.readouterr()
    for draft in ('', '--draft=story_draft'):
        sample.main(f'--out_dir={text_run}', '--prompt=The cat', '--max_new_tokens=40', '--temperature=0', *draft.split())
    once, again = capsys.readouterr().out.split('The cat')[1:3]
    assert once == again
    for arguments, message in ((['--draft=story_short'], 'must be a GPT with a context of at least 16 tokens'),
                               (['--draft=other'], 'has other tokens than this run'),
                               (['--draft=nowhere'], 'no such checkpoint'),
                               (['--draft=story_draft', '--n=2'], 'draft makes a single text faster')):
        with pytest.raises(UserError, match=message):
            sample.main(f'--out_dir={text_run}', *arguments)


def test_a_text_without_lines(work, capsys):
    """Its alphabet has no line's end to begin with; training draws all the same."""
    Path('flat.txt').write_text('abcab' * 100)
    text.main(input='flat.txt', out='data/flat')
    train.main(**GPT, dataset='flat', block_size=8, out_dir='out/flat')
    assert Path('out/flat/sample_000002.txt').exists()
    sample.main('--out_dir=out/flat', '--prompt=ab', '--max_new_tokens=5')
    assert len(capsys.readouterr().out.split('\n')[-2]) == 7


def test_exact_score_of_a_text(text_run):
    """Every token of the validation set but the first, once: as the loop's own val_loss, and by a sum over windows written out."""
    sample.main(f'--out_dir={text_run}', '--score=True')
    scores = json.loads(Path(text_run, 'scores.json').read_text())
    model, checkpoint = train.load_model(Path(text_run, 'ckpt_last.pt'))
    tokens = torch.from_numpy(np.load('data/story/val/tokens.npy').astype(np.int64))
    total = 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start:start + 17]
        logits = model.logits(model.trunk(window[None, :-1]))[0]
        total -= logits.log_softmax(-1)[range(len(window) - 1), window[1:]].sum().item()
    assert scores['nats/token']['value'] == pytest.approx(total / (len(tokens) - 1), rel=1e-4)
    sample.main(f'--out_dir={text_run}', '--score=True', '--checkpoint=ckpt_best.pt', '--split=train')
    assert json.loads(Path(text_run, 'scores.json').read_text()) == scores  # other weights, other samples: another file
    other = json.loads(Path(text_run, 'scores_ckpt_best_train.json').read_text())
    assert other['nats/token']['n'] != scores['nats/token']['n']
    log = [json.loads(line) for line in Path(text_run, 'log.jsonl').read_text().splitlines()]
    assert scores['nats/token']['value'] == pytest.approx(log[-1]['val_loss'], rel=1e-4)
    assert scores['bits/byte']['value'] == pytest.approx(total / np.log(2) / len(text.Fields('data/story').decode(tokens.tolist())), rel=0.05)


@pytest.mark.parametrize('arguments, message', [
    (['--top_k=281'], 'top_k=281 must be 0 .all. to 278'),
    (['--prompt=' + 'xyz' * 9], 'the prompt has 27 tokens, the context of this model holds 16: shorten it'),
    (['--complete=1'], 'complete=1.0 must be at least 0 and below 1'),
    (['--complete=0.5'], 'complete is for models of pictures, this one is of text'),
    (['--prompts=latin.txt'], 'latin.txt: not UTF-8 text'),
    (['--min_p=2'], r'min_p in \[0, 1\]'),
])
def test_faults_of_texts(text_run, arguments, message):
    Path('latin.txt').write_bytes(b'caf\xe9')
    with pytest.raises(UserError, match=message):
        sample.main(f'--out_dir={text_run}', *arguments)


@pytest.fixture(scope='module')
def digits(work):
    """Toy digits and a briefly trained judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, 'read_part', lambda part, fashion: toy_digits(200 if part == 'train' else 60, len(part)))
        patch.setattr(judge.train_judge, '__defaults__', (0, 5, 32))
        mnist.main(views=2, out='data/toy_mnist')


def test_digits(digits):
    train.main(**GPT, dataset='toy_mnist', out_dir='out/toy_mnist', pictures=False)
    grid = draw('out/toy_mnist', steps=0)
    assert grid.size == (10 * 60 - 4, 18 + 2 * 60 - 4)
    half = draw('out/toy_mnist', '--complete=0.5', steps=0)
    assert half.size == (5 * 60 - 4, 18 + 2 * 60 - 4)
    given, truth = (np.asarray(half)[18:74, x:x + 56] for x in (0, 4 * 60))
    known = given[..., 0] != 128
    assert known[:24].all() and not known[32:].any() and (given[known] == truth[known]).all()
    sample.main('--out_dir=out/toy_mnist', '--score=True', '--n_score=40')
    scores = json.loads(Path('out/toy_mnist/scores.json').read_text())
    assert scores['nats/image given the class']['value'] == pytest.approx(49 * scores['nats/token']['value'])
    assert {'accuracy', 'frechet', 'generation, tokens/s'} <= scores.keys() and 'floor' in scores['frechet']


@pytest.fixture(scope='module')
def masked_digits(digits):
    train.main(**(GPT | dict(model='maskgit')), dataset='toy_mnist', out_dir='out/masked', pictures=True)
    return 'out/masked'


def test_masked_digits(masked_digits, capsys):
    assert Path(masked_digits, 'sample_000002.png').exists()
    assert draw(masked_digits).size == (10 * 60 - 4, 18 + 2 * 60 - 4)
    for shape in ('half', 'box', 'random'):
        columns = np.asarray(draw(masked_digits, '--complete=0.5', f'--shape={shape}'))[18:]
        truth, given, *drawn = (columns[:56, x:x + 56] for x in range(0, 5 * 60, 60))
        known = given[..., 0] != 128
        assert 0.4 < known.mean() < 0.6 and all((picture[known] == truth[known]).all() for picture in [given, *drawn])
        assert (drawn[0] != drawn[1]).any()
    assert draw(masked_digits, '--show=swap', '--guidance=2').size == (12 * 60 - 4, 18 + 2 * 60 - 4)
    sample.main(f'--out_dir={masked_digits}', '--n=2', '--steps=4', '--show=gif', '--order=confidence')
    gif, = Path(masked_digits).glob('*.gif')
    assert Image.open(gif).n_frames == 5
    gif.unlink()
    sample.main(f'--out_dir={masked_digits}', '--n=2', '--steps=2', '--show=gif', '--complete=0.5')
    gif, = Path(masked_digits).glob('*.gif')
    frames = Image.open(gif)
    assert frames.size == (29 * 4, 14 * 4)  # two held-out pictures
    first, last = (np.asarray([frames.seek(i), frames.convert('L')][1])[:24, :56] for i in (0, 2))
    assert (abs(first - 128.0) > 20).all() and (abs(last - first.astype(float)) < 20).all()  # the upper half, as it was given
    assert 'wrote' in capsys.readouterr().out


def test_scores_of_masked_digits(masked_digits, monkeypatch):
    """A bound on the bound of a uniform guess; every order and number of steps; the exact value of a GPT beside it."""
    monkeypatch.setattr(sample, 'SWEEP', (1, 3))
    Path('exact.json').write_text(json.dumps({'nats/token': dict(value=0.5)}))
    sample.main(f'--out_dir={masked_digits}', '--score=True', '--n_score=20', '--against=exact.json')
    scores = json.loads(Path(masked_digits, 'scores.json').read_text())
    assert scores['nats/token, at most']['value'] < np.log(26) and scores['nats/token, at most']['floor'] == 0.5
    assert scores['nats/image given the class, at most']['value'] == pytest.approx(49 * scores['nats/token, at most']['value'])
    for order in ('confidence', 'random', 'raster', 'halton'):
        assert {f'{order}, {steps} steps: {name}' for steps in (1, 3) for name in ('accuracy', 'frechet', 'seconds/image')} <= set(scores)
        assert Path(masked_digits, f'sweep_{order}.png').exists()


def test_masked_scenes(work):
    """Codes of four digits, no classes, and so nothing to be guided by or to swap."""
    train.main(**(GPT | dict(model='maskgit')), dataset='scenes', out_dir='out/masked_scenes')
    assert Image.open('out/masked_scenes/sample_000002.png').size == (6 * 68 - 4, 18 + 10 * 68 - 4)
    assert draw('out/masked_scenes', '--complete=0.5').size == (5 * 68 - 4, 18 + 2 * 68 - 4)
    sample.main('--out_dir=out/masked_scenes', '--score=True')
    scores = json.loads(Path('out/masked_scenes/scores.json').read_text())
    assert scores['nats/image, at most']['value'] < 64 * np.log(65536) + 1
    for argument, message in (('--guidance=2', 'has not learnt to draw without a class'), ('--show=swap', 'needs a model of classes')):
        with pytest.raises(UserError, match=message):
            sample.main('--out_dir=out/masked_scenes', argument)


def test_masked_texts(text_run, capsys):
    train.main(**(GPT | dict(model='maskgit')), dataset='story', block_size=16, out_dir='out/masked_story')
    assert Path('out/masked_story/sample_000002.txt').exists()
    capsys.readouterr()
    sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--n=2')
    assert [text.startswith('The cat') for text in capsys.readouterr().out.split('\n-----\n')] == [True, True]
    sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--after= mat.', '--gap=3')
    assert ' mat.' in capsys.readouterr().out
    sample.main('--out_dir=out/masked_story', '--score=True')
    scores = json.loads(Path('out/masked_story/scores.json').read_text())
    assert list(scores) == ['nats/token, at most'] and scores['nats/token, at most']['value'] < np.log(278) + 0.01
    with pytest.raises(UserError, match='prompt, gap and after have 54 tokens, this model fills 16: shorten them'):
        sample.main('--out_dir=out/masked_story', '--prompt=The cat', '--after= mat.')
    with pytest.raises(UserError, match='complete and show are for models of pictures'):
        sample.main('--out_dir=out/masked_story', '--complete=0.5')


@pytest.mark.parametrize('arguments, message', [
    (['--steps=50'], 'steps=50: there are 49 tokens to fill'),
    (['--steps=30', '--complete=0.5'], 'steps=30: there are 25 tokens to fill'),
    (['--order=fast'], 'order is one of confidence, random, raster, halton'),
    (['--shape=round'], 'shape is one of half, box, random'),
    (['--prompt=hello'], 'prompt and after are for models of text'),
    (['--score=True', '--against=broken.json'], "against='broken.json': not a scores.json"),
    (['--chain=rgb>depth'], 'chain is a setting of fourm, this run is of maskgit'),
    (['--choice_temperature=-1'], 'temperatures at least 0'),
    (['--min_p=0.1'], 'min_p is a setting of gpt, vlm'),
])
def test_faults_of_masks(masked_digits, arguments, message):
    Path('broken.json').write_text('[1]')
    with pytest.raises(UserError, match=message):
        sample.main(f'--out_dir={masked_digits}', *arguments)


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='no such checkpoint; train first, and start this in the folder of the repository'):
        sample.main()
    with pytest.raises(UserError, match='data/mine was made by prepare/gone.py, which is no longer there: restore it'):
        sample.fields_of(Path('data/mine'), dict(prepare='gone'))


@pytest.mark.parametrize('arguments, message', [
    (['--given=sound'], "there is no modality 'sound'; this model has rgb, depth"),
    (['--chain=rgb>rgb'], "'rgb' stands twice"),
    (['--chain=rgb'], 'write given>target'),
    (['--chain=rgb>depth:many'], "'depth:many': 'many' is none of a number of steps, an order"),
    (['--chain=rgb>depth:2:fast'], "'fast' is none of"),
    (['--chain=rgb>depth:0'], "'0' is too small"),
    (['--chain=rgb>depth:g0'], "'g0' is too small"),
    (['--chain=rgb>depth:t-1'], "'t-1' is too small"),
    (['--chain=rgb>depth:mean2:best2'], 'not both'),
    (['--chain=rgb>caption:mean2'], 'mean is for pictures'),
    (['--chain=>rgb:best2'], 'best needs something given'),
    (['--chain=rgb:8>depth'], 'has nothing but a weight'),
    (['--chain=rgb>depth:w2'], 'nothing follows depth that its weight could be for'),
    (['--chain=depth:w2>rgb,sound:w2'], "there is no modality 'sound'"),
    (['--given=rgb', '--hide=depth=1,1,9,9'], 'NAME one of what is given .rgb.'),
    (['--given=rgb', '--hide=rgb=9,1,9,9'], 'a box is x0,y0,x1,y1'),
    (['--given=rgb', '--hide=rgb=red house'], "'house' is no color"),
    (['--given=rgb', '--replace=red=blue'], 'replace needs a text'),
    (['--given=caption', '--replace=red'], 'write OLD=NEW'),
    (['--given=rgb,caption', '--target=depth', '--replace=redd=blue'], "'redd' is no word of caption; one such text is 'a "),
    (['--given=caption', '--text=a red cube', '--replace=green=blue', '--target=depth'], "'green' is no word of caption"),
    (['--given=caption', '--hide=caption=large,rubbber'], "'rubbber' is no token of caption; the nearest are rubber"),
    (['--retrieve=rgb'], 'one modality each'),
    (['--retrieve=rgb', '--given=rgb'], 'one modality each'),
    (['--by=luck'], 'by is one of likelihood, embedding'),
    (['--split=test'], "split='test': data/scenes has train, val"),
    (['--score=True', '--given=caption', '--text=two red spheres'], 'score and text do not go together'),
    (['--text=hello'], 'need --given=NAME'),
    (['--given=caption', '--image=x.png'], '--given=caption needs --text'),
    (['--given=caption', '--text=' + 'x' * 100], 'has 101 tokens with its end token, the modality holds 26'),
    (['--given=depth', '--image=own.png'], '--image gives the modality rgb'),
    (['--order=fast'], 'order is one of'),
    (['--n=-1'], 'n, steps and top_k must be at least 0'),
    (['--compare=out/sampled', '--n_score=0'], 'n_score and gap at least 1'),
    (['--chain=rgb>depth', '--given=caption'], 'chain and given do not go together'),
    (['--report=True', '--score=True'], 'score and report do not go together'),
    (['--chain=caption>rgb:g2..0'], "'g2..0' is too small"),
    (['--chain=rgb>rgb:best4', '--hide=rgb=8,8,24,24'], 'best needs something given that it is judged by'),
    (['--temperature=-1'], 'temperatures at least 0'),
    (['--temperature=1e-44'], 'temperature=1e-44 must be 0'),
    (['--temperature_end=1e-44'], 'temperature_end=1e-44 must be 0'),
    (['--checkpoint=ckpt_none.pt'], 'no such checkpoint; the nearest are out/sampled/ckpt_'),
    (['--out_dir=out/sampeld'], 'out/sampeld/ckpt_last.pt: no such checkpoint; the nearest are out/sampled/ckpt_last.pt'),
    (['--stepss=3'], "did you mean 'steps'"),
])
def test_faults(out_dir, arguments, message):
    Image.new('L', (32, 32)).save('own.png')
    with pytest.raises(UserError, match=message) as error:
        sample.main(f'--out_dir={out_dir}', *arguments)
    assert '\n' not in str(error.value)
