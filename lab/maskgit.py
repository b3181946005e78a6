"""
Sample and score chapter 2's models: generation, in-painting and infilling; scores by order and number of steps.

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
from maskgit import ORDERS, random_mask
from prepare.judge import check_number

SHAPES, SHOWS = ('half', 'box', 'random'), ('grid', 'gif', 'swap')


@dataclass
class Decoding(options.Sampling):
    order: str = 'random'      # of decoding: random, confidence (MaskGIT), raster, halton
    schedule: str = 'cosine'   # of the number of tokens to unmask: cosine, linear, constant
    temperature: str = '1'     # 0: always the most probable token; from the first to the last step: 1..0.5
    choice_temperature: float = 0.0  # of the Gumbel noise on confidences; needs order=confidence


@dataclass
class Text(Decoding):
    prompt: str = ''           # the beginning of the text
    after: str = ''            # the text after the gap
    gap: int = 50              # tokens between prompt and after
    n: int = 1                 # texts
    steps: int = 64            # decoding steps


@dataclass
class Images(Decoding):
    n: int = 10                # images of each class, or held-out ones
    labels: str = ''           # classes to generate, '3,5'; '': all
    complete: float = 0.0      # fraction of tokens of held-out images that are given; 0: generate all (show=swap: 0.3)
    image: str = ''            # your image file in place of held-out images, n for each class
    shape: str = 'half'        # of the given part: half (the upper one), box (all around a box), random (tokens)
    show: str = 'grid'         # grid, gif (the steps of decoding), swap (held-out images with other classes)
    steps: int = 16            # decoding steps; at most one for each masked token
    guidance: str = '1'        # scale of classifier-free guidance; from the first to the last step: 1..3


@dataclass
class Scores(Decoding):
    n_score: int = 1000        # generated images for each order and number of steps
    steps: str = '1,4,8,16,32,49'  # numbers of decoding steps, for each order
    order: str = ','.join(ORDERS)  # orders of decoding
    guidance: str = '1'        # scale of classifier-free guidance; from the first to the last step: 1..3
    against: str = ''          # scores.json of a GPT on the same data: its exact values are the floor
    told = 'n_score', 'steps', 'order', 'against'  # by the names of scores, or n


def settings_of(run):
    """Text or Images, with defaults that fit the opened model."""
    N = run.model.N
    return Text(steps=-(-N // 2)) if len(run.model.grid) == 1 else Images(steps=min(16, N), **guided(run.model.config))


def scores_of(run):
    counts = [count for count in (1, 4, 8, 16, 32, 49) if count <= run.model.N]
    return Scores(steps=','.join(map(str, counts)), **guided(run.model.config))


def guided(config):
    """Defaults of a model that supports classifier-free guidance."""
    return dict(temperature='0.8', guidance='1.5') if config.n_classes and config.label_dropout else {}


def generate(run, settings, tokens, classes=None, return_intermediates=False):
    """model.generate with these settings for tokens (n, N), -1 if masked, and classes (n,). Raises UserError for more
    than 2^27 tokens of intermediate states, which is 1 GiB."""
    device, steps = run.device, min(settings.steps, int((tokens < 0).sum(1).max()))
    size = (steps + 1) * tokens.numel()
    if return_intermediates and size > 2 ** 27:
        raise UserError(f'{size:,} tokens of intermediate states would take {size >> 27} GiB: lower n or steps')
    if settings.choice_temperature > 0 and settings.order != 'confidence':
        raise UserError(f'choice_temperature={settings.choice_temperature} needs order=confidence')
    temperature, temperature_end = options.temperatures(settings.temperature)
    guidance, guidance_end = options.scales(getattr(settings, 'guidance', '1'))  # texts have none
    with run.exact():
        return run.model.generate(
            tokens.to(device), None if classes is None else classes.to(device), steps, temperature, temperature_end,
            settings.top_k, settings.top_p, settings.order, settings.schedule, guidance, guidance_end,
            settings.choice_temperature, torch.Generator(device).manual_seed(settings.seed), return_intermediates).cpu()


def draw(run, settings, path):
    """Print and return texts, or save an image at `path`."""
    if isinstance(settings, Text):
        return generate_texts(run, settings)
    if settings.show not in SHOWS or settings.shape not in SHAPES:
        raise UserError(f'show is one of {", ".join(SHOWS)}, shape one of {", ".join(SHAPES)}')
    if not 0 <= settings.complete < 1:
        raise UserError(f'complete={settings.complete} must be at least 0 and below 1')
    if not settings.complete and settings.show != 'swap' and (settings.image or settings.shape != 'half'):
        raise UserError('image and shape need complete, the fraction that is given, as in --complete=0.5')
    if settings.complete and settings.labels and not settings.image and settings.show != 'swap':
        raise UserError('labels: held-out images are completed in their own classes: leave it out, or take show=swap')
    scale = max(1, 60 // to_images(run, masked_tokens(run, 1)).shape[1])
    if settings.show == 'gif':
        return save_gif([image for _, (image,) in frames_of(run, settings)], path.with_suffix('.gif'), scale)
    columns = swapped if settings.show == 'swap' else completed if settings.complete else generated
    save_grid(columns(run, settings), path, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Texts

def generate_texts(run, settings):
    """Generate texts of N tokens around settings.prompt and settings.after; print and return them."""
    prompt, after, N = run.dataset.encode(settings.prompt), run.dataset.encode(settings.after), run.model.N
    start = len(prompt) + (settings.gap if settings.after else 0)
    if settings.gap < 1 or start + len(after) > N:
        raise UserError(f'prompt, gap and after have {start + len(after)} tokens, this model generates {N}, and a '
                        'gap has at least 1: shorten them')
    if settings.gap != Text.gap and not settings.after:
        raise UserError(f'gap={settings.gap} needs after, the text that follows the gap')
    if len(prompt) == N:
        raise UserError(f'the prompt fills all {N} tokens that this model generates: shorten it')
    tokens = masked_tokens(run, settings.n)
    tokens[:, :len(prompt)], tokens[:, start:start + len(after)] = prompt, after
    texts = [run.dataset.decode(row) for row in generate(run, settings, tokens).tolist()]
    print('\n-----\n'.join(texts))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Images

def masked_tokens(run, n):
    return torch.full((n, run.model.N), -1)


def to_images(run, tokens, whole=0):
    """Images (n, H, W, 3) uint8 of tokens (n, N), grey where they are masked. `whole` holds the tokens that are masked:
    a tokenizer's decoder sees neighbours, so without them the rest has other colors."""
    if run.model.config.n_classes:
        images = np.repeat(run.dataset.decode(tokens)[..., None], 3, -1)
    else:
        images = run.dataset.decode('rgb', tokens.where(tokens >= 0, whole))
    return lab.grey_out(images, tokens, run.model.grid)


def digits(run, labels, seed=0):
    """Generate binary images (n, 14, 14) of digits with these labels (n,), with the default settings."""
    settings = replace(settings_of(run), seed=seed)
    return run.dataset.decode(generate(run, settings, masked_tokens(run, len(labels)), torch.as_tensor(labels)))


def read_labels(run, settings):
    return options.labels(settings.labels, run.model.config.n_classes)


def classes_of(run, settings):
    """Classes of n images each, or None if there are no classes."""
    labels = read_labels(run, settings)
    return torch.tensor(labels).repeat_interleave(settings.n) if labels else None


def all_masked(run, settings, groups):
    """Masked tokens and classes of n images for each class, or for each of `groups` groups if there are no classes."""
    classes = classes_of(run, settings)
    return masked_tokens(run, settings.n * groups if classes is None else len(classes)), classes


def generated(run, settings):
    """Columns of images, one for each class, or six."""
    images = to_images(run, generate(run, settings, *all_masked(run, settings, 6)))
    names = [run.dataset.classes[c] for c in read_labels(run, settings)] or [f'sample {i + 1}' for i in range(6)]
    return dict(zip(names, images.reshape(-1, settings.n, *images.shape[1:])))


def masked_positions(grid, fraction, shape, seed):
    """Positions (N,) of a grid to mask so that a fraction is given: the lower ones, a box in the middle, or random."""
    N = math.prod(grid)
    if shape == 'box':
        scale = (1 - fraction) ** 0.5
        y, x = ((torch.arange(side) + 0.5 - side / 2).abs() <= max(1, side * scale) / 2 for side in grid)
        return (y[:, None] & x).flatten()
    order = torch.arange(N) if shape == 'half' else torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return order >= round(fraction * N)


def held_out(run, settings):
    """n held-out images: their tokens (n, N), the same with -1 if masked, classes (n,) or None; or the user's image, n
    times for each class. Raises UserError."""
    if settings.image:
        classes = classes_of(run, settings)
        own = run.dataset.read_image(*['rgb'] * (classes is None), settings.image)
        truth = own.repeat(settings.n if classes is None else len(classes), 1)
    elif run.model.config.n_classes:
        tokens = run.ids('tokens', slice(settings.n))[:, 0]
        truth, classes = tokens[:, 1:], tokens[:, 0]
    else:
        truth, classes = run.ids('rgb', slice(settings.n)), None
    mask = masked_positions(run.model.grid, settings.complete or 0.3, settings.shape, settings.seed)
    if not mask.any():
        raise UserError(f'complete={settings.complete}: all {run.model.N} tokens are given: lower it')
    return truth, truth.masked_fill(mask, -1), classes


def completed(run, settings):
    """Columns: held-out images, the given part, three samples of the rest."""
    truth, given, classes = held_out(run, settings)
    columns = dict(truth=truth, given=given)
    for i in (1, 2, 3):
        columns[f'sample {i}'] = generate(run, replace(settings, seed=settings.seed + i), given, classes)
    return {title: to_images(run, tokens, truth) for title, tokens in columns.items()}


def swapped(run, settings):
    """Columns: held-out images, the given part, samples of the rest for each class."""
    truth, given, classes = held_out(run, settings)
    if classes is None:
        raise UserError('show=swap needs a model with classes: choose grid or gif')
    columns = dict(truth=truth, given=given)
    for c in read_labels(run, settings):
        columns[run.dataset.classes[c]] = generate(run, settings, given, classes * 0 + c)
    return {title: to_images(run, tokens, truth) for title, tokens in columns.items()}


def frames_of(run, settings):
    """At the start and after each step: its title and one image, with a row for each class or of held-out images."""
    start = held_out(run, settings)[1:] if settings.complete else all_masked(run, settings, settings.n)
    states = generate(run, settings, *start, return_intermediates=True)  # (steps + 1, n, N)
    return [(f'step {i}', [tile(to_images(run, tokens, states[-1]), settings.n)]) for i, tokens in enumerate(states)]


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yield scores: the upper bound on the nats of held-out data beside the exact value of a GPT; if there are classes,
    scores of generated images by the evaluation classifier for each order and number of steps, and the speed."""
    floors, sweep = read_floors(settings.against), options.counts(settings.steps)
    orders = [order.strip() for order in settings.order.split(',')] if run.model.config.n_classes else []
    shared = ('schedule', 'temperature', 'choice_temperature', 'guidance', 'top_k', 'top_p', 'seed')
    images = Images(**{name: getattr(settings, name) for name in shared})
    for order in orders:  # settings are checked before the work
        check_number(settings.n_score)
        if max(sweep) > run.model.N:
            raise UserError(f'steps={settings.steps}: at most {run.model.N}, the number of tokens, each')
        generate(run, replace(images, order=order, steps=1), masked_tokens(run, 1), torch.tensor([0]))
    yield {f'{name}, at most': score | floors.get(name, {}) for name, score in bounds(run, settings).items()}
    for order in orders:
        columns = {}
        for steps in sweep:
            found, tokens = score_images(run, replace(images, order=order, steps=steps), settings.n_score)
            title = f'{steps}: {found["accuracy"]["value"]:.0%} {found["frechet"]["value"]:.2f}'
            columns[title] = to_images(run, tokens[:run.model.config.n_classes])
            yield {f'{order}, {steps} steps: {name}': score for name, score in found.items()}
        save_grid(columns, run.path.with_name(f'sweep_{order}.png'), 6)


def read_floors(path):
    """{metric: dict(floor=value)} of a file of scores. Raises UserError."""
    if path and not Path(path).is_file():
        raise UserError(f'against={path!r}: no such file')
    floors = {name: dict(floor=score['value']) for name, score in read_scores(Path(path)).items()} if path else {}
    if path and 'nats/token' not in floors:
        raise UserError(f'against={path!r}: has no nats/token: name the scores of a GPT on the same data')
    return floors


@torch.no_grad()
def nll_upper_bound(model, tokens, classes=None, n_samples=16, generator=None):
    """Unbiased estimate of an upper bound on -ln p(tokens | class) in nats, (B,): the cost of encoding tokens (B, N)
    one by one, averaged over all orders (2110.02037, section 3), from n_samples masks of stratified sizes."""
    valid, total = tokens >= 0, 0
    for i in range(n_samples):
        u, noise = (torch.rand(len(tokens), n, generator=generator).to(tokens.device) for n in (1, model.N))
        mask = random_mask(valid, (i + u) / n_samples, noise, 'uniform')
        h = model.backbone(tokens.masked_fill(mask, -1), classes)[mask]  # (R, D)
        nll = torch.zeros(tokens.shape, device=h.device).masked_scatter(mask, model.head(h, tokens[mask]))
        total = total + nll.sum(1) / mask.sum(1) * valid.sum(1) / n_samples
    return total


def bounds(run, settings):
    """{metric: score} of `nll_upper_bound` on the held-out data, from 16 masks a sample, fewer if there are many."""
    model, config, data, found = run.model, run.model.config, run.data(), []
    n_samples = min(16, max(2, 16_000 // data.n))
    generator = torch.Generator().manual_seed(settings.seed)
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 64)), desc='bound', unit='batch', leave=False):
        rows = data.rows(ids)['tokens'].to(run.device)
        tokens, classes = rows[:, -model.N:], rows[:, 0] if config.n_classes else None
        with run.exact():
            bound = nll_upper_bound(model, tokens, classes, n_samples, generator)
        found.append(torch.stack((bound, (tokens >= 0).sum(1)), -1).cpu())
    nll = torch.cat(found)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each sample
    scores = {'nats/token': bootstrap(nll) | dict(baseline=math.log(config.vocab_size))}
    if len(model.grid) == 2:
        scores['nats/image given the class' if config.n_classes else 'nats/image'] = bootstrap(nll / [1, model.N])
    return scores


def score_images(run, images, n):
    """Scores of n images generated with the settings `images` by the evaluation classifier, with seconds/image; and the
    images' tokens."""
    classes, started = torch.arange(n) % run.model.config.n_classes, time.perf_counter()
    tokens = torch.cat([generate(run, replace(images, seed=images.seed + i), masked_tokens(run, len(part)), part)
                        for i, part in enumerate(classes.split(64))])
    seconds = time.perf_counter() - started
    found = judged(run.dataset.score(run.dataset.decode(tokens), classes.numpy()))
    return found | {'seconds/image': alone(seconds / len(classes), len(classes))}, tokens
