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
from gpt import chunked_cross_entropy  # not `import gpt`: lab.gpt is this file
from lab import options
from lab.figures import save_grid
from lab.speculate import generate_speculative
from lab.statistics import alone, bootstrap, judged
from prepare.judge import check_number


@dataclass
class Sampling(options.Sampling):
    temperature: float = 1.0   # 0: always the most probable token
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability


@dataclass
class Text(Sampling):
    prompt: str = ''           # the text to continue; '': a new text
    prompts: str = ''          # a file with one prompt a line, all continued in one batch
    n: int = 1                 # texts for each prompt
    max_new_tokens: int = 500  # the longest continuation
    temperature: float = 0.8   # 0: always the most probable token
    draft: str = ''            # the run of a smaller GPT on the same data, for speculative decoding: faster for a
                               # single text on a CPU, with the same distribution


@dataclass
class Images(Sampling):
    n: int = 10                # images per class, or held-out images
    complete: float = 0.0      # the fraction of held-out images that is given, from the top; 0: images from their
                               # class alone, or without classes from the first patch of held-out images


@dataclass
class Scores(Sampling):
    n_score: int = 1000        # generated digits for the evaluation classifier, sampled as follows
    told = 'n_score',  # by the names of scores, or n


def settings_of(run):
    """Text or Images, with the defaults for the opened model."""
    if hasattr(run.dataset, 'classes'):
        return Images()
    return Images(n=6) if hasattr(run.dataset, 'tokenizers') else Text()


def scores_of(run):
    return Scores()


def sampling(run, settings, eos_id=-1):
    """The arguments of model.stream after the tokens and their number."""
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    return settings.temperature, settings.top_k, settings.top_p, settings.min_p, eos_id, generator


def draw(run, settings, path):
    """Print texts and return them, or save an image at `path`."""
    if isinstance(settings, Text):
        return write_texts(run, settings)
    if not 0 <= settings.complete < 1:
        raise UserError(f'complete={settings.complete} must be at least 0 and below 1')
    if hasattr(run.dataset, 'classes'):
        columns = complete_digits(run, settings) if settings.complete else digits_of_classes(run, settings)
        save_grid(columns, path, scale=4)
    else:
        save_grid(complete_images(run, settings), path)


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def read_prompts(run, settings):
    """The prompts as ids (B, T0), left-padded with -1. Raises UserError."""
    options.apart(settings, 'prompts', 'prompt')
    texts = lab.read_lines(settings.prompts) if settings.prompts else [settings.prompt]
    rows = [run.dataset.encode(text).tolist() or [run.dataset.start] for text in texts for _ in range(settings.n)]
    tokens, T = lab.left_pad(rows), run.model.config.block_size
    if tokens.size(1) > T:
        raise UserError(f'the prompt has {tokens.size(1)} tokens, the context of this model holds {T}: shorten it')
    return tokens


def read_draft(run, settings):
    """The smaller GPT of another run; its vocabulary must be the same. Raises UserError."""
    with torch.autocast(run.device.type, enabled=False):  # the text is written within one
        draft = lab.open_run(checkpoints.find(settings.draft), run.device)
    own, its = run.model.config, draft.model.config
    if lab.chapter_of(draft.model) != 'gpt' or its.block_size < own.block_size:
        raise UserError(f'draft={settings.draft!r}: must be a GPT with a context of at least {own.block_size} tokens')
    ids = range(own.vocab_size)
    if its.vocab_size != len(ids) or any(draft.dataset.decode([i]) != run.dataset.decode([i]) for i in ids):
        raise UserError(f'draft={settings.draft!r} has other tokens than this run: train it on the same data')
    return draft.model


def stream_rows(run, settings):
    """Yield the ids of all texts, lists that grow, before and after each token. Raises UserError."""
    tokens, stream = read_prompts(run, settings).to(run.device), run.model.stream
    if settings.draft:
        if len(tokens) > 1:
            raise UserError('draft makes a single text faster: leave it out, or give one prompt and no n')
        stream = partial(generate_speculative, run.model, read_draft(run, settings))
    eos_id, rows = -1 if run.dataset.end is None else run.dataset.end, tokens.tolist()
    yield rows
    for new_tokens in lab.in_exact(run, stream(tokens, settings.max_new_tokens, *sampling(run, settings, eos_id))):
        for row, token in zip(rows, new_tokens.tolist()):
            row.append(token)
        yield rows


def write_texts(run, settings):
    """Continue the prompts, print the texts and return them; a single text is printed while it is generated."""
    shown = 0
    with run.exact():  # weights are cast once
        for rows in stream_rows(run, settings):
            single = len(rows) == 1
            text = run.dataset.decode(rows[0][shown:]) if single else ''
            if not text.endswith('\ufffd'):  # otherwise the last character is incomplete in UTF-8
                print(text, end='', flush=True)
                shown = len(rows[0])
    texts = [run.dataset.decode(row) for row in rows]
    print(run.dataset.decode(rows[0][shown:]) if single else '\n-----\n'.join(texts))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Images

def generate_images(run, settings, tokens):
    """Complete tokens (n, T0), a class and optionally the first patches, to (n, 1 + patches)."""
    n_new = run.model.config.block_size + 1 - tokens.shape[1]
    if n_new < 1:
        raise UserError(f'complete={settings.complete}: all patches are given: lower it')
    with run.exact():
        tokens = torch.from_numpy(np.array(tokens, np.int64)).to(run.device)
        return run.model.generate(tokens, n_new, *sampling(run, settings)).cpu()


def digits(run, labels, seed=0):
    """Generate binary images (n, 14, 14) of digits with labels (n,), with the default settings."""
    return run.dataset.decode(generate_images(run, Images(seed=seed), labels[:, None]))


def in_color(run, tokens):
    """Tokens (n, 50) -> images (n, 14, 14, 3)."""
    return np.repeat(run.dataset.decode(tokens)[..., None], 3, -1)


def digits_of_classes(run, settings):
    """Generated images, a column for each class."""
    classes = run.dataset.classes
    images = in_color(run, generate_images(run, settings, np.repeat(np.arange(len(classes)), settings.n)[:, None]))
    return dict(zip(classes, images.reshape(len(classes), settings.n, *images.shape[1:])))


def complete_digits(run, settings):
    """Columns: the given part of held-out images, three completions, the true images."""
    truth = run.dataset.load(run.split, 'tokens')[:settings.n, 0]
    n_given = 1 + round(settings.complete * 49)  # the class and the first patches
    known = np.where(np.arange(50) < n_given, 25, 10) * np.ones_like(truth)  # given patches are white
    columns = {'given': np.where(in_color(run, known), in_color(run, truth), 128).astype(np.uint8)}
    for i in (1, 2, 3):
        again = replace(settings, seed=settings.seed + i)
        columns[f'drawn {i}'] = in_color(run, generate_images(run, again, truth[:, :n_given]))
    return columns | {'truth': in_color(run, truth)}


def complete_images(run, settings):
    """Columns: held-out images without classes, and their completions from the first patch or more."""
    truth = run.ids('rgb', slice(settings.n))
    tokens = generate_images(run, settings, truth[:, :max(1, round(settings.complete * truth.size(1)))].numpy())
    return dict(truth=list(run.dataset.decode('rgb', truth)), drawn=list(run.dataset.decode('rgb', tokens)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@torch.no_grad()
def log_prob(model, tokens):
    """ln p in nats of tokens[:, 1:], each given all tokens before it: (B, T + 1) -> (B,)."""
    x, targets = model.backbone(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    return -chunked_cross_entropy(x, model.lm_head.weight, targets).view(len(tokens), -1).sum(1)


@torch.no_grad()
def top_tokens(model, tokens, k=6):
    """For all tokens (T0,) but the first: p (T0 - 1,), and the k most probable tokens in its place and their p, both
    (T0 - 1, k). Each is predicted from all tokens before it, or from the last T / 2 of them or more."""
    half, p, top = model.config.block_size // 2 or 1, [], []
    for start in range(0, len(tokens) - 1, half):
        first, targets = max(0, start - half), tokens[start + 1:start + half + 1]
        x = model.backbone(tokens[None, first:start + len(targets)])[0, start - first:]
        probs = model.logits(x).softmax(-1)  # (at most T / 2, V)
        p.append(probs.gather(1, targets[:, None])[:, 0])
        top.append(probs.topk(min(k, probs.size(1))))
    return torch.cat(p), torch.cat([one.indices for one in top]), torch.cat([one.values for one in top])


def token_rows(run, ids):
    """A text's tokens, each with the probabilities in its place: [(token, [(token, p), (other, p), ...]), ...], of the
    token itself and of the five most probable others."""
    decode, rows, shown = run.dataset.decode, [], ''
    with run.exact():
        p, top, top_p = (x.tolist() for x in top_tokens(run.model, torch.tensor(ids, device=run.device)))
    for i, token in enumerate(ids):
        text = decode(ids[:i + 1])
        if text.endswith('\ufffd') and i + 1 < len(ids):  # the token ends within a character, which the next one shows
            text = shown
        others = [(decode([j]), q) for j, q in zip(top[i - 1], top_p[i - 1]) if j != token][:5] if i else []
        rows.append((text[len(shown):], [(decode([token]), p[i - 1]), *others] if i else []))
        shown = text
    return rows


def score(run, settings):
    """Yield scores: the exact negative log-likelihood of all held-out data, each token predicted once; for digits also
    the evaluation classifier's scores of generated digits, and the speed."""
    data, nll = run.data(), []
    if hasattr(run.dataset, 'classes'):  # settings are checked before the work
        check_number(settings.n_score)
        generate_images(run, settings, np.zeros((1, 1)))
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 32)), desc='likelihood', unit='batch', leave=False):
        tokens = data.rows(ids)['tokens'].to(run.device)
        with run.exact():
            nll.append(torch.stack((-log_prob(run.model, tokens), (tokens[:, 1:] >= 0).sum(1)), -1).cpu())
    nll = torch.cat(nll)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each window or image
    yield {'nats/token': bootstrap(nll) | dict(baseline=math.log(run.model.config.vocab_size))}
    if run.meta['kind'] == 'stream':
        n_bytes = run.meta['bytes_per_token']
        n_bytes = n_bytes[run.split] if isinstance(n_bytes, dict) else n_bytes  # older data have one number
        yield {'bits/byte': bootstrap(nll / [math.log(2), 1 / n_bytes]) | dict(baseline=8.0)}
    elif hasattr(run.dataset, 'classes'):
        yield {'nats/image given the class': bootstrap(nll / [1, 49])}
        yield score_digits(run, settings)


def score_digits(run, settings):
    """The evaluation classifier's scores of n_score generated digits, and tokens per second."""
    labels, started = np.arange(settings.n_score) % 10, time.perf_counter()
    tokens = torch.cat([generate_images(run, replace(settings, seed=settings.seed + i), part[:, None])
                        for i, part in enumerate(np.array_split(labels, -(-len(labels) // 500)))])
    rate = tokens[:, 1:].numel() / (time.perf_counter() - started)
    found = judged(run.dataset.score(run.dataset.decode(tokens), labels))
    return found | {'generation, tokens/s': alone(rate, len(labels))}
