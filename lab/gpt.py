"""
Chapter 1's models at work: texts that continue a prompt, images token by token, and exact likelihoods.

    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"
    python sample.py --out_dir=out/gpt_mnist --complete=0.5
    python -m lab.score --out_dir=out/gpt_mnist
"""
import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import lab
from config import UserError
from engine import checkpoints
from lab import options
from lab.figures import save_grid
from lab.speculate import generate_speculative
from lab.statistics import alone, bootstrap, judged


@dataclass
class Text:
    prompt: str = ''           # the text to continue; '': a new text
    prompts: str = ''          # a file with one prompt a line, all continued in one batch
    n: int = 1                 # texts for each prompt
    max_new_tokens: int = 500  # the longest continuation
    temperature: float = 0.8   # 0: always the most probable token
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability
    draft: str = ''            # the run of a smaller GPT on the same data: speculative decoding, which makes a single text on a
                               # CPU faster; the distribution stays the same
    seed: int = 0              # of everything random


@dataclass
class Images:
    n: int = 10                # images of each class, or held-out ones
    complete: float = 0.0      # the fraction of held-out images that is given, from above; 0: images from nothing
    temperature: float = 1.0   # 0: always the most probable token
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability
    seed: int = 0              # of everything random


@dataclass
class Scores:
    n_score: int = 1000        # digits that are generated for the classifier
    temperature: float = 1.0   # of these digits, as are the next three
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability
    seed: int = 0              # of everything random


def settings_of(run):
    """Text or Images, with defaults that fit the opened model."""
    if hasattr(run.fields, 'classes'):
        return Images()
    return Images(n=6) if hasattr(run.fields, 'tokenizers') else Text()


def scores_of(run):
    return Scores()


def sampling(run, settings, end=-1):
    """The arguments of model.stream after the tokens and their number."""
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    return settings.temperature, settings.top_k, settings.top_p, settings.min_p, end, generator


def draw(run, settings, path):
    """Texts on the screen, which are returned; or an image at `path`."""
    if isinstance(settings, Text):
        return write_texts(run, settings)
    if not 0 <= settings.complete < 1:
        raise UserError(f'complete={settings.complete} must be at least 0 and below 1')
    if hasattr(run.fields, 'classes'):
        columns = digits_from_above(run, settings) if settings.complete else digits_of_classes(run, settings)
        save_grid(columns, path, scale=4)
    else:
        save_grid(images_from_above(run, settings), path)


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def read_prompts(run, settings):
    """The prompts as rows of ids (B, T0), shorter ones padded with -1 on the left. Raises UserError."""
    options.apart(settings, 'prompts', 'prompt')
    texts = lab.read_lines(settings.prompts) if settings.prompts else [settings.prompt]
    rows = [run.fields.encode(text).tolist() or [run.fields.start] for text in texts for _ in range(settings.n)]
    tokens, T = lab.left_pad(rows), run.model.config.block_size
    if tokens.size(1) > T:
        raise UserError(f'the prompt has {tokens.size(1)} tokens, the context of this model holds {T}: shorten it')
    return tokens


def read_draft(run, settings):
    """The smaller GPT of another run, whose tokens have to be the same. Raises UserError."""
    draft = lab.open_run(checkpoints.find(settings.draft), run.device)
    own, its = run.model.config, draft.model.config
    if lab.chapter_of(draft.model) != 'gpt' or its.block_size < own.block_size:
        raise UserError(f'draft={settings.draft!r}: must be a GPT with a context of at least {own.block_size} tokens')
    ids = range(own.vocab_size)
    if its.vocab_size != len(ids) or any(draft.fields.decode([i]) != run.fields.decode([i]) for i in ids):
        raise UserError(f'draft={settings.draft!r} has other tokens than this run: train it on the same data')
    return draft.model


def write_texts(run, settings):
    """Continues the prompts and prints them; a single text appears while it is generated. Returns the texts."""
    tokens, stream = read_prompts(run, settings).to(run.device), run.model.stream
    single, rows, shown = len(tokens) == 1, tokens.tolist(), 0
    if settings.draft:
        if not single:
            raise UserError('draft makes a single text faster: leave it out, or give one prompt and no n')
        stream = partial(generate_speculative, run.model, read_draft(run, settings))
    end = -1 if run.fields.end is None else run.fields.end
    with run.exact():
        for new in stream(tokens, settings.max_new_tokens, *sampling(run, settings, end)):
            for row, token in zip(rows, new.tolist()):
                row.append(token)
            text = run.fields.decode(rows[0][shown:]) if single else ''
            if not text.endswith('\ufffd'):  # otherwise the token ends within a character of several bytes
                print(text, end='', flush=True)
                shown = len(rows[0])
    texts = [run.fields.decode(row) for row in rows]
    print(run.fields.decode(rows[0][shown:]) if single else '\n-----\n'.join(texts))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Images

def generate_images(run, settings, tokens):
    """Rows of tokens (n, T0), a class and perhaps the first patches, completed to (n, 1 + patches)."""
    rest = run.model.config.block_size + 1 - tokens.shape[1]
    with run.exact():
        tokens = torch.from_numpy(np.array(tokens, np.int64)).to(run.device)
        return run.model.generate(tokens, rest, *sampling(run, settings)).cpu()


def digits(run, labels, seed=0):
    """Binary images (n, 14, 14) of digits with these labels (n,), by the default settings."""
    return run.fields.decode(generate_images(run, Images(seed=seed), labels[:, None]))


def in_color(run, tokens):
    """Rows of tokens (n, 50) as images (n, 14, 14, 3)."""
    return np.repeat(run.fields.decode(tokens)[..., None], 3, -1)


def digits_of_classes(run, settings):
    """Columns of images, one for each class."""
    classes = run.fields.classes
    images = in_color(run, generate_images(run, settings, np.repeat(np.arange(len(classes)), settings.n)[:, None]))
    return dict(zip(classes, images.reshape(len(classes), settings.n, *images.shape[1:])))


def digits_from_above(run, settings):
    """Columns: what is given of held-out images, three completions, the truth."""
    truth = run.fields.load(run.split, 'tokens')[:settings.n, 0]
    length = 1 + round(settings.complete * 49)
    known = np.where(np.arange(50) < length, 25, 10) * np.ones_like(truth)  # white patches where the image is given
    columns = {'given': np.where(in_color(run, known), in_color(run, truth), 128).astype(np.uint8)}
    for i in (1, 2, 3):
        again = replace(settings, seed=settings.seed + i)
        columns[f'drawn {i}'] = in_color(run, generate_images(run, again, truth[:, :length]))
    return columns | {'truth': in_color(run, truth)}


def images_from_above(run, settings):
    """Columns: held-out images without classes, and their completions from the first patch on, or from more."""
    truth = run.ids('rgb', slice(settings.n))
    tokens = generate_images(run, settings, truth[:, :max(1, round(settings.complete * truth.size(1)))].numpy())
    return dict(truth=list(run.fields.decode('rgb', truth)), drawn=list(run.fields.decode('rgb', tokens)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yields scores: the exact negative log-likelihood of all held-out data, each token predicted once; for digits also the
    classifier's scores of generated ones, and the speed."""
    data, nll = run.data(), []
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 32)), desc='likelihood', unit='batch', leave=False):
        tokens = data.rows(ids)['tokens'].to(run.device)
        with run.exact():
            nll.append(torch.stack((-run.model.log_prob(tokens), (tokens[:, 1:] >= 0).sum(1)), -1).cpu())
    nll = torch.cat(nll)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each window or image
    yield {'nats/token': bootstrap(nll) | dict(baseline=math.log(run.model.config.vocab_size))}
    if run.meta['kind'] == 'stream':
        yield {'bits/byte': bootstrap(nll / [math.log(2), 1 / run.meta['bytes_per_token']]) | dict(baseline=8.0)}
    elif hasattr(run.fields, 'classes'):
        yield {'nats/image given the class': bootstrap(nll / [1, 49])}
        yield score_digits(run, settings)


def score_digits(run, settings):
    """The classifier's scores of n_score generated digits, and tokens per second."""
    labels, started = np.arange(settings.n_score) % 10, time.perf_counter()
    tokens = torch.cat([generate_images(run, replace(settings, seed=settings.seed + i), part[:, None])
                        for i, part in enumerate(np.array_split(labels, -(-len(labels) // 500)))])
    rate = tokens[:, 1:].numel() / (time.perf_counter() - started)
    found = judged(run.fields.score(run.fields.decode(tokens), labels))
    return found | {'generation, tokens/s': alone(rate, len(labels))}
