"""
Chapter 2's models at work: images and texts filled in step by step, and how good they are by order and number of steps.

    python sample.py --out_dir=out/maskgit_mnist --order=halton --steps=16
    python sample.py --out_dir=out/maskgit_text --prompt="ROMEO:" --after="JULIET:" --gap=100
    python -m lab.score --out_dir=out/maskgit_mnist --steps=8 --order=random,halton
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lab
from config import UserError
from lab import options
from lab.figures import save_gif, save_grid, tile
from lab.statistics import alone, bootstrap, judged, read_scores
from maskgit import ORDERS

SHAPES, SHOWS = ('half', 'box', 'random'), ('grid', 'gif', 'swap')


@dataclass
class Text:
    prompt: str = ''           # the beginning of the text
    after: str = ''            # the text after a gap
    gap: int = 50              # tokens between prompt and after
    n: int = 1                 # texts
    steps: int = 64            # decoding steps
    order: str = 'random'      # of decoding: random, confidence (MaskGIT), raster, halton
    schedule: str = 'cosine'   # how many tokens each step fills: cosine, linear, constant
    temperature: str = '1'     # 0: always the most probable token; from the first to the last step: 1..0.5
    choice_temperature: float = 0.0  # of the noise on confidences
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    seed: int = 0              # of everything random


@dataclass
class Images:
    n: int = 10                # images of each class, or held-out ones
    complete: float = 0.0      # the fraction of held-out images that is given; 0: images from nothing (show=swap: 0.3)
    shape: str = 'half'        # what is given: half (the upper one), box (all around one), random (patches)
    show: str = 'grid'         # grid, gif (the steps of decoding), swap (held-out images with other classes)
    steps: int = 16            # decoding steps, at most one for each token that is not given
    order: str = 'random'      # of decoding: random, confidence (MaskGIT), raster, halton
    schedule: str = 'cosine'   # how many tokens each step fills: cosine, linear, constant
    temperature: str = '1'     # 0: always the most probable token; from the first to the last step: 1..0.5
    choice_temperature: float = 0.0  # of the noise on confidences
    guidance: str = '1'        # scale of classifier-free guidance; from the first to the last step: 1..3
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    seed: int = 0              # of everything random


@dataclass
class Scores:
    n_score: int = 1000        # images that are generated for the classifier, in each order and number of steps
    steps: str = '1,4,8,16,32,49'  # numbers of decoding steps, for each order
    order: str = ','.join(ORDERS)  # orders of decoding
    schedule: str = 'cosine'   # how many tokens each step fills: cosine, linear, constant
    temperature: str = '1'     # 0: always the most probable token; from the first to the last step: 1..0.5
    choice_temperature: float = 0.0  # of the noise on confidences
    guidance: str = '1'        # scale of classifier-free guidance; from the first to the last step: 1..3
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    against: str = ''          # scores.json of a GPT on the same data, whose exact values are shown as the floor
    seed: int = 0              # of everything random


def settings_of(run):
    """Text or Images, with defaults that fit the opened model."""
    N = run.model.N
    return Text(steps=-(-N // 2)) if len(run.model.grid) == 1 else Images(steps=min(16, N), **guided(run.model.config))


def scores_of(run):
    counts = [count for count in (1, 4, 8, 16, 32, 49) if count <= run.model.N]
    return Scores(steps=','.join(map(str, counts)), **guided(run.model.config))


def guided(config):
    """Defaults of a model that can be guided."""
    return dict(temperature='0.8', guidance='1.5') if config.n_classes and config.label_dropout else {}


def fill(run, settings, tokens, classes=None, history=False):
    """model.generate with these settings, for tokens (n, N) and classes (n,)."""
    device, steps = run.device, min(settings.steps, int((tokens < 0).sum(1).max()))
    temperature, temperature_end = options.ends(settings.temperature)
    guidance_start, guidance = options.ends(getattr(settings, 'guidance', '1'))  # texts have none
    with run.exact():
        return run.model.generate(
            tokens.to(device), None if classes is None else classes.to(device), steps, temperature, temperature_end,
            settings.top_k, settings.top_p, settings.order, settings.schedule, guidance, guidance_start,
            settings.choice_temperature, torch.Generator(device).manual_seed(settings.seed), history).cpu()


def draw(run, settings, path):
    """Texts on the screen, which are returned; or an image at `path`."""
    if isinstance(settings, Text):
        return fill_texts(run, settings)
    if settings.show not in SHOWS or settings.shape not in SHAPES:
        raise UserError(f'show is one of {", ".join(SHOWS)}, shape one of {", ".join(SHAPES)}')
    if not 0 <= settings.complete < 1:
        raise UserError(f'complete={settings.complete} must be at least 0 and below 1')
    scale = max(1, 60 // to_images(run, unknown(run, 1)).shape[1])
    if settings.show == 'gif':
        frames = [tile(to_images(run, tokens), settings.n) for tokens in decoding_steps(run, settings)]
        return save_gif(frames, path.with_suffix('.gif'), scale)  # a row for each class, or of held-out images
    columns = swapped(run, settings) if settings.show == 'swap' else completed(run, settings) if settings.complete else (
        from_nothing(run, settings))
    save_grid(columns, path, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def fill_texts(run, settings):
    """Texts of the model's whole length from a prompt, a gap and what follows; prints and returns them."""
    prompt, after, N = run.fields.encode(settings.prompt), run.fields.encode(settings.after), run.model.N
    start = len(prompt) + (settings.gap if settings.after else 0)
    if settings.gap < 1 or start + len(after) > N:
        raise UserError(f'prompt, gap and after have {start + len(after)} tokens, this model fills {N}, and a gap has at least '
                        '1: shorten them')
    tokens = unknown(run, settings.n)
    tokens[:, :len(prompt)], tokens[:, start:start + len(after)] = prompt, after
    texts = [run.fields.decode(row) for row in fill(run, settings, tokens).tolist()]
    print('\n-----\n'.join(texts))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Images

def unknown(run, n):
    return torch.full((n, run.model.N), -1)


def to_images(run, tokens):
    """Images (n, H, W, 3) uint8 of tokens (n, N), grey where they are unknown."""
    if run.model.config.n_classes:
        images = np.repeat(run.fields.decode(tokens)[..., None], 3, -1)
    else:
        images = run.fields.decode('rgb', tokens.clamp(min=0))
    return lab.grey_out(images, tokens, run.model.grid)


def digits(run, labels, seed=0):
    """Binary images (n, 14, 14) of digits with these labels (n,), by the default settings."""
    settings = replace(settings_of(run), seed=seed)
    return run.fields.decode(fill(run, settings, unknown(run, len(labels)), torch.as_tensor(labels)))


def nothing_given(run, n, groups):
    """Unknown tokens and classes of n images in each group: the classes, or `groups` groups if there are none."""
    C = run.model.config.n_classes
    return unknown(run, n * (C or groups)), torch.arange(C).repeat_interleave(n) if C else None


def from_nothing(run, settings):
    """Columns of images, one for each class, or six."""
    images = to_images(run, fill(run, settings, *nothing_given(run, settings.n, 6)))
    names = run.fields.classes if run.model.config.n_classes else [f'drawn {i + 1}' for i in range(6)]
    return dict(zip(names, images.reshape(-1, settings.n, *images.shape[1:])))


def hidden_places(grid, fraction, shape, seed):
    """The places (N,) of a grid that are not given if a fraction of them is: the lower ones, a box in the middle, or
    random."""
    N = math.prod(grid)
    if shape == 'box':
        scale = (1 - fraction) ** 0.5
        y, x = ((torch.arange(side) + 0.5 - side / 2).abs() <= max(1, side * scale) / 2 for side in grid)
        return (y[:, None] & x).flatten()
    order = torch.arange(N) if shape == 'half' else torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return order >= round(fraction * N)


def held_out(run, settings):
    """n held-out images: all tokens (n, N), those that are given, classes (n,) or None."""
    if run.model.config.n_classes:
        tokens = run.ids('tokens', slice(settings.n))[:, 0]
        truth, classes = tokens[:, 1:], tokens[:, 0]
    else:
        truth, classes = run.ids('rgb', slice(settings.n)), None
    hidden = hidden_places(run.model.grid, settings.complete or 0.3, settings.shape, settings.seed)
    return truth, truth.masked_fill(hidden, -1), classes


def completed(run, settings):
    """Columns: held-out images, what is given of them, three completions."""
    truth, given, classes = held_out(run, settings)
    columns = dict(truth=truth, given=given)
    for i in (1, 2, 3):
        columns[f'drawn {i}'] = fill(run, replace(settings, seed=settings.seed + i), given, classes)
    return {title: to_images(run, tokens) for title, tokens in columns.items()}


def swapped(run, settings):
    """Columns: held-out images, what is given of them, completions as each class."""
    truth, given, classes = held_out(run, settings)
    if classes is None:
        raise UserError('show=swap needs a model of classes: choose grid or gif')
    columns = dict(truth=truth, given=given)
    for i, name in enumerate(run.fields.classes):
        columns[name] = fill(run, settings, given, classes * 0 + i)
    return {title: to_images(run, tokens) for title, tokens in columns.items()}


def decoding_steps(run, settings):
    """The tokens (steps + 1, n, N) after each step."""
    start = held_out(run, settings)[1:] if settings.complete else nothing_given(run, settings.n, settings.n)
    return fill(run, settings, *start, history=True)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yields scores: the bound on the likelihood of the held-out data, beside the exact value of a GPT; if there are
    classes, the classifier's scores of images that were generated in each order and number of steps, and the speed."""
    floors, sweep = read_floors(settings.against), options.counts(settings.steps)
    yield {f'{name}, at most': score | floors.get(name, {}) for name, score in bounds(run, settings).items()}
    for order in settings.order.split(',') if run.model.config.n_classes else []:
        columns = {}
        for steps in sweep:
            found, tokens = score_images(run, settings, order, steps)
            title = f'{steps}: {found["accuracy"]["value"]:.0%} {found["frechet"]["value"]:.2f}'
            columns[title] = to_images(run, tokens[:run.model.config.n_classes])
            yield {f'{order}, {steps} steps: {name}': score for name, score in found.items()}
        save_grid(columns, run.path.with_name(f'sweep_{order}.png'), 6)


def read_floors(path):
    """{metric: dict(floor=value)} of a file of scores. Raises UserError."""
    if path and not Path(path).is_file():
        raise UserError(f'against={path!r}: no such file')
    return {name: dict(floor=score['value']) for name, score in read_scores(Path(path)).items()} if path else {}


def bounds(run, settings):
    """{metric: score} of the bound, by a mean over 16 masks for each sample."""
    model, config, data, found = run.model, run.model.config, run.data(), []
    generator = torch.Generator().manual_seed(settings.seed)
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 64)), desc='bound', unit='batch', leave=False):
        tokens = data.rows(ids)['tokens'].to(run.device)
        with run.exact():
            bound = model.log_prob_bound(tokens[:, -model.N:], tokens[:, 0] if config.n_classes else None, 16, generator)
        found.append(torch.stack((bound, (tokens[:, -model.N:] >= 0).sum(1)), -1).cpu())
    nll = torch.cat(found)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each sample
    scores = {'nats/token': bootstrap(nll) | dict(baseline=math.log(config.vocab_size))}
    if len(model.grid) == 2:
        scores['nats/image given the class' if config.n_classes else 'nats/image'] = bootstrap(nll / [1, model.N])
    return scores


def score_images(run, settings, order, steps):
    """The classifier's scores of n_score generated images, with seconds an image; and the tokens of the images."""
    how = Images(steps=steps, order=order, schedule=settings.schedule, temperature=settings.temperature, top_k=settings.top_k,
                 top_p=settings.top_p, guidance=settings.guidance, choice_temperature=settings.choice_temperature)
    classes, started = torch.arange(settings.n_score) % run.model.config.n_classes, time.perf_counter()
    tokens = torch.cat([fill(run, replace(how, seed=settings.seed + i), unknown(run, len(part)), part)
                        for i, part in enumerate(classes.split(64))])
    seconds, images = time.perf_counter() - started, run.fields.decode(tokens)
    found = judged(run.fields.score(images, classes.numpy()))
    return found | {'seconds/image': alone(seconds / len(classes), len(classes))}, tokens
