"""
How chapter 4's models are sampled and scored: images and points from noise, sweeps of steps and guidance, likelihoods.

    python sample.py --out_dir=out/flow_mnist --steps=20 --guidance=2
    python sample.py --out_dir=out/flow_mnist --show=path
    python sample.py --out_dir=out/flow_toy2d
    python -m lab.score --out_dir=out/flow_mnist --steps=1,20

NFE is the number of function evaluations. Under guidance each one runs the network on twice the samples, with and
without the label: "NFE 20x2" costs as much as 40 evaluations without guidance. "NFE 20x2 in 0.1,0.8": twice the samples
at these times alone.
"""
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import flow
from config import UserError
from engine.batches import evaluation_batch, to_device
from engine.meters import add_logs, means
from lab import options
from lab.figures import save_gif, save_grid, tile
from lab.statistics import alone, bootstrap, judged
from prepare.judge import check_number

STEPS = (1, 2, 4, 10, 20, 50, 100)   # with show=steps
GUIDANCE = (0, 1, 1.5, 2, 3, 5, 10)  # with show=guidance
SHOWS = ('grid', 'path', 'steps', 'guidance')


@dataclass
class Solver:
    method: str = 'euler'           # the solver: euler, or midpoint or heun with two evaluations per step
    guidance: float = 1.0           # scale of classifier-free guidance, if there are labels; 1 is none
    guidance_interval: str = '0,1'  # the times between which guidance is used
    seed: int = 0                   # of everything random


@dataclass
class Images(Solver):
    n: int = 10                     # images per class; in all, if show is not grid
    labels: str = ''                # classes, '3,5'; '': all
    show: str = 'grid'              # grid (of classes), path (from noise, also a GIF), steps or guidance (a sweep)
    steps: int = 20                 # of the solver


@dataclass
class Points(Solver):
    n: int = 4000                   # points; of class 0, if the data have labels
    steps: int = 40                 # of the solver


@dataclass
class Scores(Solver):
    n_score: int = 1000             # samples generated for each number of steps
    seed: int = 0                   # of the samples; errors and likelihoods always have the same noise
    steps: str = '1,2,4,10,20'      # numbers of steps; precision and recall for the last one
    told = 'n_score', 'steps'  # by the names of scores, or n


def settings_of(run):
    """Images or Points, with defaults for the opened model."""
    return (Images if run.model.config.image_size else Points)(guidance=default_guidance(run.model.config))


def scores_of(run):
    steps = '1,2,4,10,20' if run.model.config.image_size else '1,2,4,20'
    return Scores(steps=steps, guidance=default_guidance(run.model.config))


def default_guidance(config):
    return 2.0 if config.label_dropout and config.n_classes else 1.0


def trajectories(run, settings, labels):
    """model.generate with these settings, for labels (n,): the trajectory (steps + 1, n, ...), of images as pixels in
    [-1, 1]. Raises UserError."""
    try:
        start, end = map(float, settings.guidance_interval.split(','))
    except ValueError:
        raise UserError(f'guidance_interval={settings.guidance_interval!r}: write two times from 0 to 1, the lower one '
                        'first, as in 0.1,0.8')
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    labels = torch.as_tensor(labels, device=run.device)
    arguments = labels, settings.steps, settings.method, settings.guidance, (start, end), generator
    with run.exact():
        trajectory = run.model.generate(*arguments)[0].cpu()
    return from_logits(trajectory) if run.model.config.logits else trajectory


def nfe(settings):
    """The number of function evaluations as text: 'NFE 20', under guidance 'NFE 20x2', in an interval of times 'NFE
    20x2 in 0.1,0.8'."""
    _, evaluations = flow.SOLVERS.get(settings.method, (None, 1))  # generate refuses an unknown method
    guided = 'x2' + f' in {settings.guidance_interval}' * (settings.guidance_interval != Solver.guidance_interval)
    return f'NFE {settings.steps * evaluations}' + guided * (settings.guidance != 1)


def from_logits(y):
    """Logits as flow.dequantize makes them -> pixels in [-1, 1]."""
    return ((flow.SCALE * y).sigmoid() - 0.5) / (0.5 - flow.MARGIN)


def to_uint8(x):
    """Invert flow.dequantize: (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C)."""
    return ((x.movedim(-3, -1) + 1) * 128).clamp(0, 255).to(torch.uint8)


def samples(run, settings, labels, size=64):
    """The last states of trajectories: images (n, H, W) or (n, H, W, 3) uint8, or points (n, d)."""
    ends = torch.cat([trajectories(run, replace(settings, seed=settings.seed + i), part)[-1]
                      for i, part in enumerate(np.array_split(labels, -(-len(labels) // size)))])
    return (to_uint8(ends).squeeze(-1) if run.model.config.image_size else ends).numpy()


def digits(run, labels, seed=0):
    """Binary images (n, 14, 14) of digits with these labels (n,), by the default settings."""
    return run.dataset.binary(samples(run, replace(settings_of(run), seed=seed), labels))


def draw(run, settings, path):
    """Save an image at `path`, and a GIF of trajectories."""
    if isinstance(settings, Points):
        return draw_points(run, settings, path)
    if settings.show not in SHOWS:
        raise UserError(f'show is one of {", ".join(SHOWS)}')
    labels, scale = read_labels(run, settings), max(1, 56 // run.model.config.image_size)
    shown = np.resize(labels, settings.n)
    if settings.show == 'grid':
        columns = columns_of_classes(run, settings, labels)
    elif settings.show == 'path':
        states = states_of(run, settings, shown)
        save_gif([sheet(state) for state in states], path.with_suffix('.gif'), scale)
        shown_steps = np.linspace(0, len(states) - 1, min(11, len(states))).round().astype(int)
        columns = {f'step {i}': states[i] for i in shown_steps}
    elif settings.show == 'steps':
        sweep = [replace(settings, steps=steps) for steps in STEPS]
        columns = {nfe(one): states_of(run, one, shown)[-1] for one in sweep}
    else:
        columns = {f's = {s:g}': states_of(run, replace(settings, guidance=float(s)), shown)[-1] for s in GUIDANCE}
    save_grid(columns, path, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def read_labels(run, settings):
    """The classes to sample; eight zeros for a model without classes. Raises UserError."""
    return options.labels(settings.labels, run.model.config.n_classes) or [0] * 8


def states_of(run, settings, labels):
    """The states of trajectories as images (steps + 1, n, H, W, 3)."""
    pixels = to_uint8(trajectories(run, settings, labels)).numpy()
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def sheet(images):
    """Images (n, H, W, 3) in two rows."""
    return tile(images, -(-len(images) // 2))


def frames_of(run, settings):
    """The start and at most 20 steps: the time, and an image of all images; or of points, and of their velocities."""
    if isinstance(settings, Points):
        states = trajectories(run, settings, np.zeros(settings.n, int))
    else:
        states = states_of(run, settings, np.resize(read_labels(run, settings), settings.n))
    last, frames = len(states) - 1, []
    for step in np.linspace(0, last, min(21, last + 1)).round().astype(int):
        t, state = time_after(run, step, last), states[step]
        points = isinstance(settings, Points)
        frames.append((f't = {t:.2f}', [run.dataset.scatter(state.numpy(), 360), velocities(run, t, 360)] if points
                       else [sheet(state)]))
    return frames


def columns_of_classes(run, settings, labels):
    """Columns of n images each."""
    images = states_of(run, settings, np.repeat(labels, settings.n))[-1]
    names = [run.dataset.classes[c] if run.model.config.n_classes else f'sample {i}' for i, c in enumerate(labels, 1)]
    return dict(zip(names, images.reshape(len(labels), settings.n, *images.shape[1:])))


# ---------------------------------------------------------------------------------------------------------------------
# Points

def draw_points(run, settings, path, side=200):
    """Points and their velocities at five times; beside them the learned density and the true one."""
    trajectory = trajectories(run, settings, np.zeros(settings.n, int))
    save_gif([run.dataset.scatter(points.numpy(), side) for points in trajectory], path.with_suffix('.gif'))
    last, columns = len(trajectory) - 1, {}
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        step = round(fraction * last)
        t = time_after(run, step, last)
        points = run.dataset.scatter(trajectory[step].numpy(), side)
        columns[f't = {t:.2f}: points, -v'] = [points, velocities(run, t, side)]
    columns['learned density, true'] = densities(run, side // 2)
    save_grid(columns, path, 1)


def time_after(run, step, steps):
    """The time t after this step of model.generate."""
    return flow.shift_timesteps(1 - step / steps, run.model.config.timestep_shift)


def velocities(run, t, side):
    """An image of the velocities at time t, from noise to data."""
    corners = torch.from_numpy(run.dataset.grid(14)).to(run.device)
    velocity_fn = run.model.velocity_fn(torch.zeros(len(corners), dtype=torch.long, device=run.device))
    velocity = -velocity_fn(corners, t).detach().cpu()
    return run.dataset.arrows(corners.cpu().numpy(), velocity.numpy(), side)


def densities(run, side):
    """Two images, of the learned density and of the true one; the latter is white if unknown."""
    points = run.dataset.grid(side)
    learned = np.exp(likelihoods(run, torch.from_numpy(points), torch.zeros(len(points), dtype=torch.long)).numpy())
    truth = run.dataset.log_density(points)
    if truth is None:
        white = np.full((side, side, 3), 255, np.uint8)
        return [run.dataset.heat(learned.reshape(side, -1), np.quantile(learned, 0.995)), white]
    return [run.dataset.heat(density.reshape(side, -1), np.exp(truth).max()) for density in (learned, np.exp(truth))]


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def rademacher_probes(z, n_probes, generator):
    """Random signs / sqrt(n_probes), (n_probes, B, ...): flow.divergence is unbiased with them (1810.01367, 3.1)."""
    signs = torch.randint(2, (n_probes, *z.shape), generator=generator) * 2.0 - 1
    return signs.to(z.device) / n_probes ** 0.5


def likelihoods(run, x, labels, tolerance=1e-4, size=2500):
    """ln p in nats (n,) of x (n, ...): with the exact divergence for points, one random probe for images. Of images as
    logits y: the density of the pixels, ln p(y) + ln |dy/dx|."""
    found, generator = [], torch.Generator().manual_seed(0)
    for part, label in zip(x.to(run.device).split(size), labels.to(run.device).split(size)):
        probes = None if part[0].numel() <= 8 else rademacher_probes(part, 1, generator)
        found.append(flow.log_likelihood(run.model.velocity_fn(label), part, probes, tolerance)[0].cpu())
    nats = torch.cat(found).double()
    return nats + log_slopes(x.double()).flatten(1).sum(1).cpu() if run.model.config.logits else nats


def log_slopes(y):
    """ln dy/dx of logits y of pixels x: g = sigmoid(SCALE y) = 0.5 + (0.5 - MARGIN) x, dg/dy = SCALE g (1 - g)."""
    return math.log((0.5 - flow.MARGIN) / flow.SCALE) - F.logsigmoid(flow.SCALE * y) - F.logsigmoid(-flow.SCALE * y)


def score(run, settings):
    """Yield scores: the squared error by time, the likelihood, and the quality of samples by the number of steps."""
    sampling = Images(method=settings.method, guidance=settings.guidance, guidance_interval=settings.guidance_interval,
                      seed=settings.seed)
    data, sweep, config = run.data(), options.counts(settings.steps), run.model.config
    trajectories(run, replace(sampling, steps=1), [0])  # settings are checked before the work
    if config.image_size and config.n_classes:
        check_number(settings.n_score)
    yield squared_errors(run, data)
    yield from (score_images if config.image_size else score_points)(run, settings, sampling, data, sweep)


def squared_errors(run, data, size=250):
    """The loss, in all and by quarters of t; no label is dropped."""
    total = {}
    for j in range(-(-data.n // size)):
        with torch.no_grad(), run.exact():
            batch = evaluation_batch(data, run.model, dict(micro_batch_size=size), j)
            total = add_logs(total, run.model(to_device(batch, run.device))[1])
    titles = {'loss': 'squared error'}  # the others are named t_0.25_0.5
    return {titles.get(name, f'squared error, t in {name[2:].replace("_", "..")}'): alone(value, data.n)
            for name, value in sorted(means(total)[0].items())}


def score_points(run, settings, sampling, data, sweep):
    """KL(data || model) with the exact divergence; Wasserstein-2 distances by steps, and of real points as floor.
    For points without labels."""
    points = torch.from_numpy(np.array(data.arrays['point'][:settings.n_score * 10]))
    learned = likelihoods(run, points, torch.zeros(len(points), dtype=torch.long)).numpy()
    truth = run.dataset.log_density(points.numpy())
    parts = np.stack((-learned if truth is None else truth - learned, np.ones(len(points))), -1)[:, None]
    yield {'nats/point' if truth is None else 'KL(data || model), nats': bootstrap(parts)}
    n = min(6000, settings.n_score * 6)
    floor = run.dataset.score(run.dataset.fresh(n, 2)).mean()
    for steps in sweep:
        one = replace(sampling, steps=steps)
        found = run.dataset.score(samples(run, one, np.zeros(n, int), n))
        distance = bootstrap(np.stack((found, np.ones(len(found))), -1)[:, None])
        yield {f'W2, {steps} steps, {nfe(one)}': distance | dict(floor=floor)}


def score_images(run, settings, sampling, data, sweep):
    """Bits per dimension by Hutchinson's estimate; with classes, the evaluation classifier's scores by steps."""
    n_classes, n = run.model.config.n_classes, min(data.n, max(8, settings.n_score // 16))
    batch = data.rows(np.arange(n))
    x = flow.dequantize(batch['image'], torch.Generator().manual_seed(0), run.model.config.logits)
    labels = batch.get('label', torch.zeros(n, dtype=torch.long))
    nats = likelihoods(run, x, labels, tolerance=1e-3, size=32).numpy() / x[0].numel()
    bits = np.stack((7 - nats / math.log(2), np.ones(n)), -1)[:, None]  # 7: one of 256 levels is 2 / 256 wide
    yield {'bits/dim' + ' given the class' * (n_classes > 0): bootstrap(bits) | dict(baseline=8.0)}
    for steps in sweep if n_classes else []:
        labels, started = np.arange(settings.n_score) % n_classes, time.perf_counter()
        one = replace(sampling, steps=steps)
        images = samples(run, one, labels)
        seconds = (time.perf_counter() - started) / len(labels)
        found = judged(run.dataset.score(images, labels))
        scores = {name: found[name] for name in (found if steps == sweep[-1] else ('accuracy', 'frechet'))}
        scores['seconds/image'] = alone(seconds, len(labels))
        yield {f'{steps} steps, {nfe(one)}: {name}': value for name, value in scores.items()}
