"""lab/gpt.py on tiny runs: texts, digits, exact scores, faults in one line."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt
import lab
import sample
import train
from config import UserError
from engine import checkpoints, graphs
from lab import score
from lab.statistics import read_scores
from prepare import arrays, text
from tests.toys import GPT, draw, make_digits, make_story


@pytest.fixture(scope='module')
def story(work):
    """A GPT after a few training steps on byte-pair tokens."""
    make_story()
    train.main(**GPT, dataset='story', block_size=16, out_dir='out/story')
    return 'out/story'


@pytest.fixture(scope='module')
def digits(work):
    make_digits()
    train.main(**GPT, dataset='toy_mnist', out_dir='out/gpt_digits', pictures=False)
    return 'out/gpt_digits'


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def test_texts(story, capsys):
    assert Path(story, 'sample_000002.txt').exists()
    capsys.readouterr()
    sample.main(f'--out_dir={story}', '--prompt=The cat', '--max_new_tokens=40')
    one = capsys.readouterr().out
    assert one.startswith('The cat') and len(one) > 20
    sample.main(f'--out_dir={story}', '--prompt=The cat', '--max_new_tokens=40', '--n=3')
    assert capsys.readouterr().out.count('-----\nThe cat') == 2
    Path('prompts.txt').write_text('The\nThe cat sat on the\n')
    sample.main(f'--out_dir={story}', '--prompts=prompts.txt', '--max_new_tokens=5', '--temperature=0')
    first, second = capsys.readouterr().out.split('\n-----\n')
    for prompt, together in (('The', first), ('The cat sat on the', second)):
        sample.main(f'--out_dir={story}', f'--prompt={prompt}', '--max_new_tokens=5', '--temperature=0')
        assert capsys.readouterr().out.strip() == together.strip()
    sample.main(f'--out_dir={story}', '--prompts=prompts.txt', '--max_new_tokens=5', '--n=2')
    texts = capsys.readouterr().out.split('\n-----\n')
    assert [text.startswith('The cat sat on the') for text in texts] == [False, False, True, True]


def test_lines_of_prompts(work):
    """Only line breaks end a prompt, on every system; a byte order mark is part of none."""
    Path('lines.txt').write_bytes('\ufeffROMEO:\r\n\na\fb\u2028c\x85d\n'.encode())
    assert lab.read_lines('lines.txt') == ['ROMEO:', '', 'a\fb\u2028c\x85d']


def test_texts_are_returned(story):
    run = lab.open_run(Path(story, 'ckpt_last.pt'), 'cpu')
    settings = lab.module_of('gpt').Text(prompt='The', max_new_tokens=9, seed=5)
    one, again = (lab.module_of(run.model).draw(run, settings, None) for _ in range(2))
    assert one == again and one[0].startswith('The')


def test_compiled_passes(story, capsys, monkeypatch):
    """The same text with --compile, in both dtypes; all layers share compiled code: five need no more than two."""
    frames = torch._dynamo.utils.counters['frames']
    for kind in gpt.KVCache, graphs.GraphedCache:
        monkeypatch.setattr(kind, 'update', kind.update)  # restored after the test
    for layers, more in ((2, True), (5, False)):
        train.main(**(GPT | dict(n_layer=layers)), dataset='story', block_size=16, out_dir=f'out/story_{layers}',
                   pictures=False)
        capsys.readouterr()
        before = frames['ok']
        for dtype in ('float32', 'bfloat16'):
            texts = []
            for compiled in (False, True):
                sample.main(f'--out_dir=out/story_{layers}', '--prompt=The cat', '--max_new_tokens=12',
                            '--temperature=0', f'--dtype={dtype}', f'--compile={compiled}')
                texts.append(capsys.readouterr().out)
            assert texts[0] == texts[1]
        assert (frames['ok'] > before) == more


def test_a_draft_changes_nothing_but_the_speed(story, capsys):
    train.main(**(GPT | dict(n_head=1, n_embd=8)), dataset='story', block_size=16, out_dir='out/story_draft',
               pictures=False)
    train.main(**GPT, dataset='story', block_size=8, out_dir='out/story_short', pictures=False)
    Path('other.txt').write_text('abcab' * 100)
    text.main(input='other.txt', out='data/other')
    train.main(**GPT, dataset='other', block_size=16, out_dir='out/other', pictures=False)
    capsys.readouterr()
    for draft in ('', '--draft=story_draft'):
        sample.main(f'--out_dir={story}', '--prompt=The cat', '--max_new_tokens=40', '--temperature=0', *draft.split())
    once, again = capsys.readouterr().out.split('The cat')[1:3]
    assert once == again
    sample.main(f'--out_dir={story}', '--prompt=The cat', '--draft=story_draft', '--dtype=bfloat16')  # opened within no autocast
    for arguments, message in ((['--draft=story_short'], 'must be a GPT with a context of at least 16 tokens'),
                               (['--draft=other'], 'has other tokens than this run'),
                               (['--draft=nowhere'], 'no such checkpoint'),
                               (['--draft=story_draft', '--n=2'], 'draft makes a single text faster')):
        with pytest.raises(UserError, match=message):
            sample.main(f'--out_dir={story}', *arguments)


def test_a_text_without_lines(work, capsys):
    """A vocabulary without a line break, the default first token; training samples texts all the same."""
    Path('flat.txt').write_text('abcab' * 100)
    text.main(input='flat.txt', out='data/flat')
    train.main(**GPT, dataset='flat', block_size=8, out_dir='out/flat')
    assert Path('out/flat/sample_000002.txt').exists()
    sample.main('--out_dir=out/flat', '--prompt=ab', '--max_new_tokens=5')
    assert len(capsys.readouterr().out.split('\n')[-2]) == 7


@pytest.mark.parametrize('arguments, message', [
    (['--top_k=-1'], 'top_k=-1'),
    (['--min_p=2'], 'min_p=2.0'),
    (['--temperature=-1'], 'temperature=-1.0 must be'),
    (['--temperature=1e-44'], 'temperature=1e-44 must be'),
    (['--prompt=' + 'xyz' * 9], 'the prompt has 27 tokens, the context of this model holds 16: shorten it'),
    (['--prompt=a', '--prompts=latin.txt'], 'prompts and prompt do not go together'),
    (['--prompts=latin.txt'], 'latin.txt: not UTF-8 text'),
    (['--prompts=wide.txt'], 'wide.txt: not UTF-8 text .it holds zero bytes, as UTF-16 does'),
    (['--complete=0.5'], r'complete is a setting of lab/gpt.py \(Images\), .*; here are those of lab/gpt.py \(Text\)'),
])
def test_faults_of_texts(story, arguments, message):
    Path('latin.txt').write_bytes(b'caf\xe9'), Path('wide.txt').write_bytes('The\n'.encode('utf-16-le'))
    with pytest.raises(UserError, match=message):
        sample.main(f'--out_dir={story}', *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def test_digits(digits):
    assert draw(digits).size == (10 * 60 - 4, 18 + 10 * 60 - 4)
    half = draw(digits, '--complete=0.5', '--n=2')
    assert half.size == (5 * 60 - 4, 18 + 2 * 60 - 4)
    given, truth = (np.asarray(half)[18:74, x:x + 56] for x in (0, 4 * 60))
    known = given[..., 0] != 128
    assert known[:24].all() and not known[32:].any() and (given[known] == truth[known]).all()
    with pytest.raises(UserError, match='complete=1.0 must be at least 0 and below 1'):
        draw(digits, '--complete=1')
    with pytest.raises(UserError, match='complete=0.999: all patches are given: lower it'):
        draw(digits, '--complete=0.999')
    with pytest.raises(UserError, match='prompt is a setting of'):
        draw(digits, '--prompt=a')


def test_binary_digits(digits):
    """What lab/report.py compares generators by."""
    run = lab.open_run(Path(digits, 'ckpt_last.pt'), 'cpu')
    one, two, other = (lab.module_of('gpt').digits(run, np.arange(5), seed) for seed in (1, 1, 2))
    assert one.shape == (5, 14, 14) and set(np.unique(one)) <= {0, 255} and (one == two).all() and (one != other).any()


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def test_exact_score_of_a_text(story):
    """Every token of the validation set but the first, once: equal to val_loss, and to a sum over explicit windows."""
    scores = score.main(f'--out_dir={story}')
    assert scores == read_scores(Path(story, 'scores.json'))
    model, _ = checkpoints.load_model(Path(story, 'ckpt_last.pt'))
    tokens = torch.from_numpy(np.load('data/story/val/tokens.npy').astype(np.int64))
    total = 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start:start + 17]
        logits = model.logits(model.backbone(window[None, :-1]))[0]
        total -= logits.log_softmax(-1)[range(len(window) - 1), window[1:]].sum().item()
    assert scores['nats/token']['value'] == pytest.approx(total / (len(tokens) - 1), rel=1e-4)
    log = [json.loads(line) for line in Path(story, 'log.jsonl').read_text().splitlines()]
    assert scores['nats/token']['value'] == pytest.approx(log[-1]['val_loss'], rel=1e-4)
    n_bytes = len(text.Dataset('data/story').decode(tokens.tolist()))
    assert scores['bits/byte']['value'] == pytest.approx(total / np.log(2) / n_bytes, rel=0.05)
    score.main(f'--out_dir={story}', '--checkpoint=ckpt_best.pt', '--split=train')
    assert read_scores(Path(story, 'scores.json')) == scores  # other weights or split: another file
    others, lengths = read_scores(Path(story, 'scores_ckpt_best_train.json')), arrays.read_meta('data/story')['bytes_per_token']
    assert others['nats/token']['n'] != scores['nats/token']['n']
    for split, found in (('val', scores), ('train', others)):
        assert found['bits/byte']['value'] == pytest.approx(found['nats/token']['value'] / np.log(2) / lengths[split])


def test_scores_of_digits(digits, monkeypatch):
    scores = score.main(f'--out_dir={digits}', '--n_score=40')
    assert scores['nats/image given the class']['value'] == pytest.approx(49 * scores['nats/token']['value'])
    assert {'accuracy', 'frechet', 'generation, tokens/s'} <= scores.keys() and 'floor' in scores['frechet']
    monkeypatch.setattr(lab.module_of('gpt'), 'log_prob', None)
    for argument, message in (('--n_score=4', '4 images are too few'), ('--top_k=-1', 'top_k=-1')):  # before any work
        with pytest.raises(UserError, match=message):
            score.main(f'--out_dir={digits}', argument)
