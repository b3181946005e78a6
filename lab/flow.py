"""
Chapter 4's models at work: images and points from noise, what more steps and guidance change, likelihoods and scores.

    python sample.py --out_dir=out/flow_mnist --steps=20 --guidance=2
    python sample.py --out_dir=out/flow_mnist --show=path
    python sample.py --out_dir=out/flow_toy2d
    python -m lab.score --out_dir=out/flow_mnist --steps=1,20
"""
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

import flow
from config import UserError
from engine.batches import evaluation_batch, to_device
from engine.meters import add_logs, means
from lab import options
from lab.figures import save_gif, save_grid, tile
from lab.statistics import alone, bootstrap, judged

COUNTS = (1, 2, 4, 10, 20, 50, 100)  # of steps, with show=steps
SCALES = (0, 1, 1.5, 2, 3, 5, 10)    # of guidance, with show=guidance
SHOWS = ('grid', 'path', 'steps', 'guidance')


@dataclass
class Images:
    n: int = 10                # images of each class; or, if another show than grid, in all
    labels: str = ''           # classes, '3,5'; '': all
    show: str = 'grid'         # grid (of classes), path (from noise to image, also a GIF), steps, guidance (a sweep of each)
    steps: int = 20            # of the solver
    method: str = 'euler'      # the solver: euler, midpoint, heun (both evaluate the network twice a step), or jump for a model
                               # of mean velocities
    guidance: float = 1.0      # scale of classifier-free guidance
    interval: str = '0,1'      # the times between which guidance acts
    seed: int = 0              # of everything random


@dataclass
class Points:
    n: int = 4000              # points
    steps: int = 40            # of the solver
    method: str = 'euler'      # the solver: euler, midpoint, heun, or jump for a model of mean velocities
    guidance: float = 1.0      # scale of classifier-free guidance, if points have labels
    interval: str = '0,1'      # the times between which guidance acts
    seed: int = 0              # of everything random


@dataclass
class Scores:
    n_score: int = 1000        # samples that are generated for each number of steps
    steps: str = '1,2,4,10,20'  # numbers of steps; precision and recall with the last one
    method: str = 'euler'      # the solver: euler, midpoint, heun, or jump for a model of mean velocities
    guidance: float = 1.0      # scale of classifier-free guidance
    interval: str = '0,1'      # the times between which guidance acts
    seed: int = 0              # of everything random


def settings_of(run):
    """Images or Points, with defaults that fit the opened model."""
    if not run.model.config.image_size:
        return Points(**solver_of(run.model.config))
    steps = dict(steps=1) if run.model.config.mean else {}
    return Images(**steps, **solver_of(run.model.config))


def scores_of(run):
    steps = '1,2,4,10,20' if run.model.config.image_size else '1,2,4,20'
    return Scores(steps=steps, **solver_of(run.model.config))


def solver_of(config):
    """Defaults of a model that knows mean velocities, or that can be guided."""
    return dict(method='jump') if config.mean else dict(guidance=2.0) if config.label_drop and config.n_classes else {}


def follow(run, settings, labels):
    """model.generate with these settings, for labels (n,): the trajectory (steps + 1, n, ...). Raises UserError."""
    try:
        start, end = map(float, settings.interval.split(','))
    except ValueError:
        raise UserError(f'interval={settings.interval!r}: write two times from 0 to 1, the lower first, as in 0.1,0.8')
    generator, labels = torch.Generator(run.device).manual_seed(settings.seed), torch.as_tensor(labels, device=run.device)
    with run.exact():
        return run.model.generate(labels, settings.steps, settings.method, settings.guidance, (start, end), generator)[0].cpu()


def samples(run, settings, labels, size=64):
    """The ends of trajectories: images (n, H, W) or (n, H, W, 3) uint8, or points (n, d)."""
    ends = torch.cat([follow(run, replace(settings, seed=settings.seed + i), part)[-1]
                      for i, part in enumerate(np.array_split(labels, -(-len(labels) // size)))])
    return (flow.to_pixels(ends).squeeze(-1) if run.model.config.image_size else ends).numpy()


def digits(run, labels, seed=0):
    """Binary images (n, 14, 14) of digits with these labels (n,), by the default settings."""
    return run.fields.binary(samples(run, replace(settings_of(run), seed=seed), labels))


def draw(run, settings, path):
    """An image at `path`; of trajectories also a GIF."""
    if isinstance(settings, Points):
        return draw_points(run, settings, path)
    if settings.show not in SHOWS:
        raise UserError(f'show is one of {", ".join(SHOWS)}')
    labels, scale = read_labels(run, settings), max(1, 56 // run.model.config.image_size)
    some = np.resize(labels, settings.n)
    if settings.show == 'grid':
        columns = columns_of_classes(run, settings, labels)
    elif settings.show == 'path':
        states = states_of(run, settings, some)
        save_gif([tile(state, -(-len(some) // 2)) for state in states], path.with_suffix('.gif'), scale)
        kept = np.linspace(0, len(states) - 1, min(11, len(states))).round().astype(int)
        columns = {f'step {i}': states[i] for i in kept}
    elif settings.show == 'steps':
        columns = {str(count): states_of(run, replace(settings, steps=count), some)[-1] for count in COUNTS}
    else:
        columns = {f's = {s}': states_of(run, replace(settings, guidance=s), some)[-1] for s in SCALES}
    save_grid(columns, path, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def read_labels(run, settings):
    """The classes that are drawn; eight zeros for a model without classes. Raises UserError."""
    n_classes = run.model.config.n_classes
    known = {str(c): c for c in range(n_classes)}
    if unknown := [c for c in settings.labels.split(',') if c and c not in known]:
        raise UserError(f'labels: there is no class {unknown[0]!r} (classes are 0 to {n_classes - 1})')
    return [known[c] for c in settings.labels.split(',') if c] or list(range(n_classes)) or [0] * 8


def states_of(run, settings, labels):
    """The states of trajectories as images (steps + 1, n, H, W, 3)."""
    pixels = flow.to_pixels(follow(run, settings, labels)).numpy()
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def columns_of_classes(run, settings, labels):
    """Columns of n images each."""
    images = states_of(run, settings, np.repeat(labels, settings.n))[-1]
    names = [run.fields.classes[c] if run.model.config.n_classes else f'drawn {i}' for i, c in enumerate(labels, 1)]
    return dict(zip(names, images.reshape(len(labels), settings.n, *images.shape[1:])))


# ---------------------------------------------------------------------------------------------------------------------
# Points

def draw_points(run, settings, path, side=200):
    """Points and their velocities at five times; beside them the density that the model has learned and the true one."""
    trajectory = follow(run, settings, np.zeros(settings.n, int))
    save_gif([run.fields.scatter(points.numpy(), side) for points in trajectory], path.with_suffix('.gif'))
    last, columns = len(trajectory) - 1, {}
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        step = round(fraction * last)
        t = flow.shifted(1 - step / last, run.model.config.shift)  # as in model.generate
        columns[f't = {t:.2f}: points, -v'] = [run.fields.scatter(trajectory[step].numpy(), side), velocities(run, t, side)]
    columns['learned density, true'] = densities(run, side // 2)
    save_grid(columns, path, 1)


def velocities(run, t, side):
    """An image of the velocities at time t, from noise to data."""
    corners = torch.from_numpy(run.fields.grid(14)).to(run.device)
    velocity = -run.model.field(torch.zeros(len(corners), dtype=torch.long, device=run.device))(corners, t).detach().cpu()
    return run.fields.arrows(corners.cpu().numpy(), velocity.numpy(), side)


def densities(run, side):
    """Two images, of the learned density and of the true one; white if that is unknown."""
    points = run.fields.grid(side)
    learned = np.exp(likelihoods(run, torch.from_numpy(points), torch.zeros(len(points), dtype=torch.long)).numpy())
    truth = run.fields.log_density(points)
    if truth is None:
        white = np.full((side, side, 3), 255, np.uint8)
        return [run.fields.heat(learned.reshape(side, -1), np.quantile(learned, 0.995)), white]
    return [run.fields.heat(density.reshape(side, -1), np.exp(truth).max()) for density in (learned, np.exp(truth))]


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def likelihoods(run, x, labels, tolerance=1e-4, size=2500):
    """ln p in nats (n,) of x (n, ...) as the network reads it: with the exact divergence for points, a random probe for
    images."""
    found, generator = [], torch.Generator().manual_seed(0)
    for part, label in zip(x.to(run.device).split(size), labels.to(run.device).split(size)):
        probes = flow.unit_probes(part) if part[0].numel() <= 8 else flow.random_probes(part, 1, generator)
        found.append(run.model.log_prob(part, label, probes, tolerance).cpu())
    return torch.cat(found).double()


def score(run, settings):
    """Yields scores: the squared error by time, the likelihood, and how good samples are by the number of steps."""
    data = run.data()
    yield squared_errors(run, data)
    how = Images(method=settings.method, guidance=settings.guidance, interval=settings.interval, seed=settings.seed)
    yield from (score_images if run.model.config.image_size else score_points)(run, settings, how, data)


def squared_errors(run, data, size=250):
    """The loss, in all and by quarters of the time."""
    total = {}
    for j in range(-(-data.n // size)):
        with torch.no_grad(), run.exact():
            batch = evaluation_batch(data, run.model, dict(micro_batch_size=size), j)
            total = add_logs(total, run.model(to_device(batch, run.device))[1])
    titles = {'loss': 'squared error'}  # the others are called t_0.25_0.5
    return {titles.get(name, f'squared error, t in {name[2:].replace("_", "..")}'): alone(value, data.n)
            for name, value in sorted(means(total)[0].items())}


def score_points(run, settings, how, data):
    """KL(data || model) by the exact trace; Wasserstein-2 distances by steps, beside that of real points from others."""
    points = torch.from_numpy(np.array(data.arrays['point'][:settings.n_score * 10]))
    learned = likelihoods(run, points, torch.zeros(len(points), dtype=torch.long)).numpy()
    truth = run.fields.log_density(points.numpy())
    parts = np.stack((-learned if truth is None else truth - learned, np.ones(len(points))), -1)[:, None]
    yield {'nats/point' if truth is None else 'KL(data || model), nats': bootstrap(parts)}
    n = min(6000, settings.n_score * 6)
    floor = run.fields.score(run.fields.fresh(n, 2)).mean()
    for steps in options.counts(settings.steps):
        found = run.fields.score(samples(run, replace(how, steps=steps), np.zeros(n, int), n))
        yield {f'W2, {steps} steps': bootstrap(np.stack((found, np.ones(len(found))), -1)[:, None]) | dict(floor=floor)}


def score_images(run, settings, how, data):
    """Bits a dimension by Hutchinson's estimate; if there are classes, the classifier's scores by the number of steps."""
    n_classes, n = run.model.config.n_classes, min(data.n, max(8, settings.n_score // 16))
    batch = data.rows(np.arange(n))
    x = flow.from_pixels(batch['image'], torch.Generator().manual_seed(0))
    labels = batch.get('label', torch.zeros(n, dtype=torch.long))
    nats = likelihoods(run, x, labels, tolerance=1e-3, size=32).numpy() / x[0].numel()
    bits = np.stack((7 - nats / math.log(2), np.ones(n)), -1)[:, None]  # 7: one of 256 levels is 2 / 256 wide
    yield {'bits/dim' + ' given the class' * (n_classes > 0): bootstrap(bits) | dict(baseline=8.0)}
    sweep = options.counts(settings.steps) if n_classes else []
    for steps in sweep:
        labels, started = np.arange(settings.n_score) % n_classes, time.perf_counter()
        images = samples(run, replace(how, steps=steps), labels)
        seconds = (time.perf_counter() - started) / len(labels)
        found = judged(run.fields.score(images, labels))
        kept = {name: found[name] for name in (found if steps == sweep[-1] else ('accuracy', 'frechet'))}
        kept['seconds/image'] = alone(seconds, len(labels))
        yield {f'{steps} steps: {name}': score for name, score in kept.items()}
