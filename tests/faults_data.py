"""
    python -m tests.faults_data --rounds=200

The data side of tests/faults.py: every prepare script, killed at random, two at once, or making its data set again while a
model trains on it. Each script has two versions, with other contents of about the same size.

A round counts as right if no mixture is ever accepted: whenever data/NAME has a meta.json, every file is, bit for bit, that of
one version, which is the one that meta.json describes; if the run that trained meanwhile ended as on one version undisturbed,
or was refused in one line; if it continues on the same contents and is refused on others; and if the script, given again, either
makes its data set or says that there is one.
"""
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import config
from config import UserError
from prepare import (
    arrays,
    cifar10,
    cifar10_modalities,
    folder,
    image_tokenizers,
    judge,
    mnist,
    multiclevr,
    pictures,
    scenes,
    scenes_align,
    scenes_qa,
    scenes_render,
    shakespeare,
    text,
    tinystories,
    toy2d,
    vqa,
)
from prepare.text_tokenizers import END, word_encoding
from tests import faults
from tests.test_mnist import toy_digits
from tests.test_multiclevr import make_tree

SETTINGS = dict(
    rounds=20,  # script by script in turn
    seed=0,
)


def words(version):
    return 'the cat sat on the mat ' * 40 if version else 'the mat sat on the cat ' * 40


def make_sources():
    """What the scripts read, for both versions, and data/base, the scenes about which questions are asked."""
    for version in (0, 1):
        Path(f'in/{version}/pictures').mkdir(parents=True)
        Path(f'in/{version}/a.txt').write_text(words(version))
        Path(f'in/{version}/stories.txt').write_text(f'{words(version)}\n{END}\n' * 5)
        generator = np.random.default_rng(version)
        for i in range(6):
            picture = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            pictures.Image.fromarray(picture).save(f'in/{version}/pictures/{i}.png')
            Path(f'in/{version}/pictures/{i}.txt').write_text(f'picture {i}')
        lines = [json.dumps(dict(image=f'{i}.png', turns=[['Is it?', ('yes', 'no')[i % 2]]])) for i in range(6)]
        Path(f'in/{version}/talks.jsonl').write_text('\n'.join(lines))
        make_tree(f'in/{version}/tree', train=4 + version, val=3)
    scenes.main(n_train=40, n_val=20, size=32, max_objects=3, workers=1, out='data/base')


def simplify():
    """Small networks, few steps and no downloads, in this process and those that are forked from it."""
    image_tokenizers.SPECS = {name: (*spec[:3], 2) for name, spec in image_tokenizers.SPECS.items()}
    image_tokenizers.train_field.__defaults__ = 0, 4
    pictures.train_tokenizer.__defaults__ = 0, 4
    judge.train_judge.__defaults__ = 0, 2, 8
    scenes.make = lambda n, seed, size, K, workers: scenes_render.make_chunk((n, seed, 0, size, K))  # without a pool
    load_template = vqa.load_template

    def small_template(name, folder=None, thinks=False):
        encoding = word_encoding('small', [' Question:', ' Answer:', ' yes', ' no', ' Is', ' it'])
        small = vqa.Template(encoding, encoding.n_vocab - 1, encoding.n_vocab)
        return small if name == 'smollm2' else load_template(name, folder, thinks)
    vqa.load_template = small_template


def make(name, version):
    """Runs a prepare script."""
    source, out = Path(f'in/{version}'), f'data/{name}'
    generator = np.random.default_rng(version)
    mnist.read_part = lambda part, fashion: toy_digits(60 if part == 'train' else 20, version)
    photographs = {split: (generator.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8), np.arange(n).astype(np.uint8) % 10)
                   for split, n in (('train', 20), ('val', 10))}
    cifar10.fetch = cifar10_modalities.fetch = lambda: photographs
    shakespeare.download = tinystories.download = lambda url, name, digest='': source / (
        'a.txt' if name == 'tinyshakespeare.txt' else 'stories.txt')
    dict(
        toy2d=lambda: toy2d.main(n_train=4000, n_val=400, seed=version),
        text=lambda: text.main(input=source / 'a.txt', encoding='bpe', vocab_size=270),
        shakespeare=shakespeare.main,
        tinystories=lambda: tinystories.main(vocab_size=270),
        mnist=lambda: mnist.main(views=2, seed=version),
        cifar10=lambda: cifar10.main(seed=version),
        cifar10_modalities=lambda: cifar10_modalities.main(steps=2, vocab_size=270, seed=version),
        folder=lambda: folder.main(source=source / 'pictures', size=16, views=2, steps=2, vocab_size=270),
        vqa=lambda: vqa.main(input=source / 'talks.jsonl', images=source / 'pictures', size=16, length=40, val_share=0.3),
        scenes=lambda: scenes.main(n_train=12, n_val=6, size=32, max_objects=3, workers=1, seed=version, out=out),
        more_scenes=lambda: scenes.main(extra='layout', out=out),
        scenes_qa=lambda: scenes_qa.main(scenes='data/base', n_turns=3, seed=version),
        scenes_align=lambda: scenes_align.main(scenes='data/base', n_where=1, seed=version),
        multiclevr=lambda: multiclevr.main(source=source / 'tree', workers=1),
    )[name]()


READERS = dict(toy2d='flow', text='gpt', shakespeare='gpt', tinystories='gpt', mnist='maskgit', cifar10='flow',
               cifar10_modalities='fourm', folder='fourm', vqa='vlm', scenes='fourm', more_scenes='fourm', scenes_qa='vlm',
               scenes_align='vlm', multiclevr='fourm')  # script: the chapter that trains on its data


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def as_a_program(name, version):
    """A script in a process of its own: exit code 0, 2 for a UserError, 1 for anything else."""
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    try:
        make(name, version)
    except UserError:
        os._exit(2)
    except BaseException as error:
        print(f'{type(error).__name__}: {error}', file=open(f'fault_{name}', 'a'))
        os._exit(1)
    os._exit(0)


def start(name, version):
    process = multiprocessing.get_context('fork').Process(target=as_a_program, args=(name, version))
    process.start()
    return process


def train(name, out_dir, max_iters=12):
    return faults.start(READERS[name], out_dir, dataset=name, max_iters=max_iters, eval_interval=3, micro_batch_size=8,
                        **dict(gpt=dict(block_size=8)).get(READERS[name], {}) | dict(scenes_align=dict(patch_size=4)).get(name, {}))


def contents(name):
    """{file: SHA-256} of data/NAME, without meta.json, the lock and what a killed process left unfinished."""
    root = Path('data', name)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob('*'))
            if path.is_file() and path.suffix != '.tmp' and path.name not in ('lock', 'meta.json', 'texts.jsonl')}


def accepted(name, known):
    """The version of data/NAME, None if there is none, or a line about what is wrong."""
    if not Path('data', name, 'meta.json').is_file():
        return None
    meta, found = arrays.read_meta(Path('data', name)), contents(name)
    versions = [version for version, (files, described) in enumerate(known)
                if arrays.holds(described, meta) and all(found.get(file) == files[file] for file in files if file in meta['sums']
                                                         or not file.endswith(('.npy', 'SUMS', '.json')))]
    wrong = [file for file, digest in meta['sums'].items() if '..' not in file and found.get(file) != digest]
    if wrong or not versions:
        return f'a mixture is accepted: {wrong[:3] or "the files of no version"}'
    return versions[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rounds

def kill(process, seconds, draw):
    """SIGKILL after a random time; whether it hit."""
    process.join(draw.uniform(0, seconds))
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join(120)
    return alive


def prepare_before(name, known, draw):
    """data/NAME as it was before: version 0 complete, or nothing."""
    shutil.rmtree(f'data/{name}', ignore_errors=True)
    if name == 'more_scenes' or draw.random() < 0.6:
        shutil.copytree(f'data_before/{name}', f'data/{name}')


def play(name, kind, out_dir, known, ended, seconds, draw):
    """One round: what was wrong, '' if nothing was."""
    prepare_before(name, known, draw)
    if kind == 'training' and not Path('data', name).exists():
        shutil.copytree(f'data_before/{name}', f'data/{name}')
    trained = train(name, out_dir) if kind == 'training' else None
    if trained:
        time.sleep(draw.uniform(0, 1.5))
    makers = [start(name, version) for version in ((1, 0) if kind == 'two at once' else (1,))]
    if draw.random() < dict(killed=1, training=0.3).get(kind, 0.5):
        kill(makers[0], seconds, draw)
    for process in makers:
        process.join(120)
        if process.exitcode not in (0, 2, -signal.SIGKILL):
            return f'{name} ended with exit code {process.exitcode}'
    now = accepted(name, known)
    if isinstance(now, str):
        return now
    if trained:
        trained.join(120)
        if trained.exitcode not in (0, 2):
            return f'training ended with exit code {trained.exitcode}'
        if trained.exitcode == 0:
            result = faults.result(out_dir)
            on = [version for version in (0, 1) if faults.same(result, ended[version])]
            if not on:
                return 'training ended otherwise than on one version undisturbed'
            more = train(name, out_dir, max_iters=15)
            more.join(120)
            same = now in on or name == 'more_scenes'  # to which only a modality is added
            if more.exitcode != (0 if same else 2):
                return f'version {now}, trained on {on}: continuing ended with exit code {more.exitcode}'
    again = start(name, 1)
    again.join(120)
    now = accepted(name, known)
    return '' if again.exitcode in (0, 2) and now in (0, 1) else f'given again: exit code {again.exitcode}, version {now}'


def rounds(n, draw):
    """Plays n rounds, script by script in turn, in the current folder; prints a line for each fault and a summary; returns the
    number of faults."""
    simplify()
    make_sources()
    known, ended, seconds, counts, wrong, kinds = {}, {}, {}, {}, 0, ('killed', 'two at once', 'training')
    for name in READERS:
        known[name], ended[name] = [], []
        for version in (0, 1):
            shutil.rmtree(f'data/{name}', ignore_errors=True)
            if name == 'more_scenes':
                shutil.copytree('data/base', 'data/more_scenes')
            began = time.monotonic()
            if (name, version) != ('more_scenes', 0):  # data/base as it is
                process = start(name, version)
                process.join()
                assert process.exitcode == 0, (name, version)
            seconds[name] = time.monotonic() - began
            known[name].append((contents(name), arrays.read_meta(Path('data', name))))
            if version == 0:
                shutil.copytree(f'data/{name}', f'data_before/{name}')
            run = train(name, f'out/{name}{version}')
            run.join()
            assert run.exitcode == 0, (name, version, run.exitcode)
            ended[name].append(faults.result(f'out/{name}{version}'))
    for i in range(n):
        name, kind = list(READERS)[i % len(READERS)], kinds[i // len(READERS) % 3]
        fault = play(name, kind, f'out/round{i}', known[name], ended[name], seconds[name], draw)
        wrong += bool(fault)
        counts[kind] = counts.get(kind, 0) + 1
        if fault:
            print(f'round {i}, {name}, {kind}: {fault}', flush=True)
        shutil.rmtree(f'out/round{i}', ignore_errors=True)
    print(f'{n} rounds of {", ".join(READERS)}: {", ".join(f"{count} {kind}" for kind, count in counts.items())}; {wrong} wrong')
    return wrong


def main(*arguments, **overrides):
    """Plays the rounds in a temporary folder; returns the number of faults."""
    settings, before = config.apply(config.read(arguments, overrides), SETTINGS), Path.cwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return rounds(settings['rounds'], random.Random(settings['seed']))
        finally:
            os.chdir(before)


if __name__ == '__main__':
    sys.exit(bool(config.run(main)))
