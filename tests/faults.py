"""
What is lost when runs are killed? Real processes, of a tiny model of each chapter, receive signals at random moments.

    python -m tests.faults --rounds=200 --fuzz=100000

A round starts a training run, sends it SIGKILL, SIGTERM, SIGINT or SIGUSR1 after a random time, and gives the same command
again until it ends by itself, sometimes after further signals. It counts as right if every checkpoint found on the way could be
read, at most one evaluation interval was done twice after each kill, and weights, their average and the log are, bit for
bit, those of a run that nobody disturbed. Fuzzing reads damaged files and odd settings: each has to be understood, or refused by
one UserError. tests/test_train.py plays a few rounds of both.
"""
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._dynamo  # which every run needs: once here takes a second less of each
from PIL import Image

import config
import gpt
import train
from config import UserError
from engine import checkpoints, devices
from lab.gpt import Text, read_prompts
from prepare import arrays, pictures, text, text_tokenizers

SETTINGS = dict(
    rounds=20,  # runs that are killed, chapter by chapter in turn
    fuzz=2000,  # damaged files and settings
    seed=0,
)
RUN = dict(batch_size=8, micro_batch_size=4, max_iters=60, eval_interval=15, log_interval=3, warmup_iters=2, device='cpu',
           dtype='float32', compile=False, pictures=False, threads=1)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SMALL = dict(n_layer=1, n_head=2, n_embd=16)
CASES = {  # chapter: what its data are, and its settings
    'gpt': (dict(kind='stream', fields=dict(tokens=50), config=dict(vocab_size=50)), SMALL | dict(block_size=16, dropout=0.1)),
    'maskgit': (dict(kind='rows', fields=dict(tokens=50), config=dict(vocab_size=50, grid='4x4')),
                SMALL | dict(dropout=0.1)),
    'fourm': (dict(kind='rows', fields=dict(a=64, b=20), config=dict(modalities='a:8*8:4x4 b:20:8')),
              dict(n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=16, num_input_tokens='16', num_target_tokens='16', dropout=0.1)),
    'flow': (dict(kind='rows', fields=dict(point=0), config=dict(image_size=0, channels=16, n_classes=0)),
             SMALL | dict(ema=0.9)),
    'vlm': (dict(kind='rows', fields=dict(image=256, tokens=50, loss_mask=2),
                 config=dict(vocab_size=50, image_token=49, image_size=16, channels=3, block_size=16)),
            SMALL | dict(patch_size=8, vision_layer=1, vision_head=2, vision_embd=16, dropout=0.1)),
}


def make_data(chapter, meta):
    """data/CHAPTER: random numbers of the right shapes."""
    draw, folder = np.random.default_rng(0), Path('data', chapter)
    for split, n in (('train', 200), ('val', 40)):
        arrays = {name: draw.integers(0, 20, (n * 17,) if meta['kind'] == 'stream' else (n, 8 if name == 'b' else 16))
                  for name in meta['fields']}
        if 'point' in arrays:
            arrays['point'] = draw.normal(size=(n, 16)).astype(np.float32)
        if 'image' in arrays:
            arrays |= dict(image=draw.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), loss_mask=arrays['tokens'] % 2)
            arrays['tokens'][:, 0] = 49
        (folder / split).mkdir(parents=True)
        for name, array in arrays.items():
            np.save(folder / split / f'{name}.npy', array)
    (folder / 'meta.json').write_text(json.dumps(meta | dict(prepare='none')))


def start(chapter, out_dir, environment={}, **changes):
    """The run as a process; forked, so that nothing has to be imported again, but with signals and files of its own."""
    process = multiprocessing.get_context('fork').Process(target=as_a_program, args=(chapter, out_dir, environment, changes))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it has begun
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def as_a_program(chapter, out_dir, environment, changes):
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    os.environ |= environment
    devices.matmul_rate = lambda device, dtype: 1e9  # half a second of each start
    settings = RUN | CASES[chapter][1] | dict(model=chapter, dataset=chapter, out_dir=out_dir) | changes
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        stopped = train.main(**settings).get('stopped')
    except UserError:
        os._exit(2)
    except KeyboardInterrupt:
        os._exit(99)
    os._exit(128 + stopped if stopped else 0)


def result(out_dir):
    """What two equal runs have in common: the checkpoints' contents, and the log without times."""
    kept = [checkpoints.read(Path(out_dir, f'ckpt_{name}.pt')) for name in ('last', 'best')]
    lines = [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]
    state = ('step', 'best', 'tokens', 'weights', 'ema', 'optimizers')
    timed = ('seconds', 'tokens_per_second', 'mfu', 'data_wait')
    return ([{name: checkpoint.get(name) for name in state} for checkpoint in kept],
            [{name: value for name, value in line.items() if name not in timed} for line in lines])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def play(chapter, out_dir, whole, seconds, draw):
    """One round: the number of signals sent, steps done twice, and what was wrong, '' if nothing was."""
    signals = repeated = 0
    while True:
        process, number = start(chapter, out_dir), draw.choice(SIGNALS)
        if signals < 5 and draw.random() < 0.8:
            process.join(draw.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid, number)
                signals += 1
        process.join(120)
        if process.is_alive():
            process.kill()
            return signals, repeated, 'a process hung'
        for path in Path(out_dir).glob('ckpt_*.pt'):
            try:
                checkpoints.read(path)
            except UserError as error:
                return signals, repeated, str(error)
        if process.exitcode == 0:
            return signals, repeated, '' if same(result(out_dir), whole) else 'it ended otherwise than undisturbed'
        if process.exitcode not in (-number, 128 + number, 99):
            return signals, repeated, f'exit code {process.exitcode} after {number.name}'
        last, log = Path(out_dir, 'ckpt_last.pt'), Path(out_dir, 'log.jsonl')
        saved = checkpoints.read(last)['step'] if last.exists() else 0
        lines = log.read_text().splitlines(True) if log.exists() else []
        done = max((json.loads(line)['step'] for line in lines if line.endswith('\n')), default=0)
        repeated += done - saved
        if done - saved > RUN['eval_interval']:
            return signals, repeated, f'{done - saved} steps lost'


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing

def damaged(data, draw):
    """Bytes with a few of them flipped, cut out, doubled or made up."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        i, n = draw.randrange(len(data) + 1), draw.choice([1, 1, 4, 30])
        data[i:i + n] = draw.choice([b'', bytes(data[i:i + n] * 2), draw.randbytes(n), bytes(byte ^ 1 << draw.randrange(8)
                                                                                              for byte in data[i:i + n])])
    return bytes(data)


def readers():
    """name: (a good input, what reads a file of such)."""
    Path('good').mkdir()
    np.save('good/a.npy', np.arange(60).reshape(20, 3))
    Image.new('RGB', (28, 28), 'red').save('good/a.png')
    Image.new('L', (28, 28)).save('good/a.jpg')
    meta = json.dumps(CASES['gpt'][0] | dict(prepare='none'))
    Path('encoding').mkdir()
    text_tokenizers.save_encoding(Path('encoding/encoding.json'), text_tokenizers.Characters(list('abc é')))
    trained = SimpleNamespace(model=gpt.GPT(gpt.Config(block_size=8)), dataset=text.Dataset('encoding'))
    return dict(
        setting=(b'--learning_rate=3e-3', lambda path: config.apply(config.read([path.read_bytes().decode(errors='replace')]),
                                                                    train.SETTINGS) if path.read_bytes()[:2] == b'--' else None),
        meta=(meta.encode(), lambda path: arrays.read_meta(path.parent)),
        array=(Path('good/a.npy').read_bytes(), lambda path: arrays.Data.read(path, 60)),
        checkpoint=(Path('out/gpt/ckpt_last.pt').read_bytes(), checkpoints.read),
        png=(Path('good/a.png').read_bytes(), pictures.read_picture),
        jpeg=(Path('good/a.jpg').read_bytes(), pictures.read_picture),
        prompts=('ab c\né\n'.encode(), lambda path: read_prompts(trained, Text(prompts=str(path)))),
        encoding=(Path('encoding/encoding.json').read_bytes(), text_tokenizers.load_encoding))


def fuzz(n, draw):
    """Damaged inputs for each reader in turn; returns the number of those that ended in anything but an answer or a UserError."""
    faults, kinds = 0, readers()
    names = dict(meta='meta.json')
    for i in range(n):
        name = list(kinds)[i % len(kinds)]
        good, read = kinds[name]
        path = Path('bad', names.get(name, name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged(good, draw))
        try:
            with warnings.catch_warnings(action='ignore'):
                read(path)
        except UserError as error:
            assert str(error)
        except Exception as error:
            faults += 1
            print(f'{name}: {type(error).__name__}: {str(error)[:200]} from {path.read_bytes()[:300]}', flush=True)
    return faults


# ---------------------------------------------------------------------------------------------------------------------

def main(*arguments, **overrides):
    """Plays the rounds, chapter by chapter in turn; prints a line for each fault and a summary; returns the number of faults."""
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    draw, before, faults, signals, repeated = random.Random(settings['seed']), Path.cwd(), 0, 0, 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            chapters, whole = [c for c in CASES if Path(train.__file__).with_name(f'{c}.py').is_file()], {}
            for chapter in chapters:
                make_data(chapter, CASES[chapter][0])
                began, process = time.monotonic(), start(chapter, f'out/{chapter}')
                process.join()
                whole[chapter] = result(f'out/{chapter}'), time.monotonic() - began
            for i in range(settings['rounds']):
                chapter = chapters[i % len(chapters)]
                sent, again, wrong = play(chapter, f'out/{i}', *whole[chapter], draw)
                signals, repeated, faults = signals + sent, repeated + again, faults + bool(wrong)
                if wrong:
                    print(f'round {i}, {chapter}: {wrong}', flush=True)
                shutil.rmtree(f'out/{i}', ignore_errors=True)
            odd = fuzz(settings['fuzz'], draw)
        finally:
            os.chdir(before)
    print(f'{settings["rounds"]} rounds of {", ".join(chapters)}: {signals} signals, {repeated} steps done twice, {faults} wrong')
    print(f'{settings["fuzz"]} damaged inputs: {odd} not refused properly')
    return faults + odd


if __name__ == '__main__':
    sys.exit(bool(config.run(main)))
