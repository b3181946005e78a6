"""
nano4M's chains: modalities that are given, and targets, each of which is generated from all that stand before it.

    caption:w2,depth>segmentation:mean8,rgb:25:halton:t0.7..0.3:g1..3:best4

The parts after a target's name replace the settings of sample.py for this target; a given modality may have a weight.

    25                    decoding steps of an image
    halton, confidence    order of decoding
    cosine, linear        schedule: how many tokens each step fills
    t0.7, t0.9..0.3       temperature; from the first to the last step
    g2, g1..3             scale of guidance by all other modalities; from the first to the last step
    w2, w0, w-1           weight as a condition of what follows; 1 if left out
    mean8                 the mean of 8 samples
    best8                 of 8 samples the one that makes all known modalities most probable

An image that is generated from texts alone, none with a weight, has a plan (`plan_of`): the model's other texts are
generated first.
"""
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from config import UserError
from engine import devices
from lab import options
from lab.retrieval import decode_modality, log_prob
from maskgit import ORDERS, SCHEDULES, iterative_decode, lerp

NUMBER = r'-?\d+(?:\.\d+)?'
RANGE = rf'{NUMBER}(?:\.\.{NUMBER})?'
PART = re.compile(rf'(?P<steps>\d+)|(?P<order>{"|".join(ORDERS)})|(?P<schedule>{"|".join(SCHEDULES)})|'
                  rf'mean(?P<mean>\d+)|best(?P<best>\d+)|t(?P<temperature>{RANGE})|'
                  rf'g(?P<guidance>{RANGE})|w(?P<weight>{NUMBER})')
PLAN_TEMPERATURE = 0.3  # of texts that are generated before an image


@dataclass
class Link:
    """A target, or a given modality."""
    name: str
    steps: int | None        # None, also of the next two: see `sampling_of`
    temperature: str | None
    guidance: str | None
    order: str
    schedule: str
    top_k: int
    top_p: float
    plan: bool
    weight: float = 1.0
    mean: int = 1
    best: int = 1


# ---------------------------------------------------------------------------------------------------------------------
# The grammar

def read_link(entry, settings):
    """'rgb:25:halton:t0.7:g1..3:best8' -> a Link; `settings` holds what the entry leaves out. Raises UserError."""
    name, *parts = entry.split(':')
    link = Link(name, settings.steps, settings.temperature, settings.guidance, settings.order, settings.schedule,
                settings.top_k, settings.top_p, settings.plan)
    types = dict(steps=int, mean=int, best=int, weight=float)
    for part in parts:
        found = PART.fullmatch(part)
        if not found:
            raise UserError(f'{entry!r}: {part!r} is none of a number of steps, an order ({", ".join(ORDERS)}), a '
                            f'schedule ({", ".join(SCHEDULES)}), t0.7 or t0.9..0.3 (temperature), g2 or g1..3 '
                            '(guidance), w-1 (weight as a condition), mean8, best8 (of 8 samples)')
        link = replace(link, **{key: types.get(key, str)(value) for key, value in found.groupdict().items() if value})
    steps = 1 if link.steps is None else link.steps
    if min(steps, link.mean, link.best) < 1 or max(link.mean, link.best) > 1000:
        raise UserError(f'{entry!r}: steps, mean and best are at least 1, mean and best at most 1000')
    if abs(link.weight) > 1000:
        raise UserError(f'{entry!r}: a weight is from -1000 to 1000')
    options.temperatures(link.temperature or '0'), options.scales(link.guidance or '1')  # refused before any work
    if min(link.mean, link.best) > 1:
        raise UserError(f'{entry!r}: the mean of several samples or the best of them, not both')
    return link


def parse_chain(chain, settings, model, hidden=(), begun=()):
    """'caption,depth:w2>rgb:25' -> links given, links to generate. If it has no targets, these are the modalities
    `hidden`, which are given in part, or else all others. Those in `hidden` and `begun` (texts to be continued) may
    stand on both sides. Raises UserError."""
    if chain.count('>') != 1:
        raise UserError(f'chain={chain!r}: write given>target,target:steps:order, as in "rgb>depth:8,scene_desc"')
    given, targets = ([entry.strip() for entry in side.split(',') if entry.strip()] for side in chain.split('>'))
    if any(re.search(r':(?!w)', entry) for entry in given):
        raise UserError(f'chain={chain!r}: what is given has nothing but a weight, as in "caption:w2>rgb"')
    given = [read_link(entry, settings) for entry in given]
    names = [link.name for link in given]
    targets = targets or hidden or [name for name in model.batch_keys if name not in names]
    targets = [read_link(entry, settings) for entry in targets]
    check_chain(chain, given, targets, {*hidden, *begun}, model)
    return given, targets


def check_chain(chain, given, targets, both_sides, model):
    """Raises UserError if the links of a chain do not fit the model or each other."""
    left, right = ([link.name for link in links] for links in (given, targets))
    if unknown := [name for name in left + right if name not in model.batch_keys]:
        raise UserError(f'there is no modality {unknown[0]!r}; this model has {", ".join(model.batch_keys)}')
    for name in left + right:
        if left.count(name) > 1 or right.count(name) > 1 or name in left and name in right and name not in both_sides:
            raise UserError(f'{name!r} stands twice among given and targets')
    if targets and targets[-1].weight != 1:
        raise UserError(f'chain={chain!r}: nothing follows {right[-1]} that its weight could be for')
    for i, link in enumerate(targets):
        alone = not {*left, *right[:i]} - {link.name}
        if link.mean > 1 and model.modality[link.name].is_text or link.best > 1 and alone:
            raise UserError(f'{link.name}: mean is for images, and best needs something given that it is judged by')


# ---------------------------------------------------------------------------------------------------------------------
# Generation along a chain

def sampling_of(model, link, known, weighted):
    """The arguments of model.generate for a link. Of a text, or if the rgb image is known, the most probable output, in
    one step. Otherwise many outputs are right, and the tokens of an image have to fit each other: a few are
    sampled at a time. known: ids {name: (B, max_tokens)}; weighted: whether a condition has a weight of its own, which
    takes the place of guidance."""
    is_text = model.modality[link.name].is_text
    certain = is_text or link.name != 'rgb' and (known.get('rgb', -torch.ones(1)) >= 0).all()
    steps, temperature, guidance = (1, '0', '1') if certain else (8, '0.2', '1' if weighted else '2')
    if link.mean > 1:  # the mean of the whole distribution
        temperature, guidance = '1', '1'
    elif link.best > 1 and certain:
        temperature = '0.7'
    temperature, temperature_end = options.temperatures(temperature if link.temperature is None else link.temperature)
    guidance, guidance_end = options.scales(guidance if link.guidance is None else link.guidance)
    return dict(steps=steps if link.steps is None else link.steps, temperature=temperature,
                temperature_end=temperature_end, top_k=link.top_k, top_p=link.top_p, order=link.order,
                schedule=link.schedule, guidance=guidance, guidance_end=guidance_end)


def best_samples(model, known, name, ids, n):
    """Of each scene's n samples of modality `name`, ids (B * n, max_tokens), the one that makes the known tokens most
    probable: (B, max_tokens)."""
    total = sum(log_prob(model, decode_modality(model, {name: ids}, other), other, condition.repeat_interleave(n, 0))
                for other, condition in known.items() if other != name)
    return ids.view(-1, n, ids.size(1))[torch.arange(len(ids) // n), total.view(-1, n).argmax(1).cpu()]


def mean_of(name, raw):
    """Several samples (B, n, ...) of a modality as one (B, ...): their mean, or the most frequent class."""
    if name == 'segmentation':
        return np.stack([(raw == c).sum(1) for c in range(raw.max() + 1)]).argmax(0).astype(raw.dtype)
    return raw.mean(1) if raw.dtype.kind == 'f' else raw.mean(1).round().astype(raw.dtype)


def plan_of(model, link, known, weighted=False):
    """The texts that are generated before an image if only texts are known: the model's others, if all fit into the
    input; none if a condition is weighted, which a plan made from it would undo. Scenes: a caption does not say where
    objects are; tokens of an image that are sampled in one step fit each other only if that is known."""
    texts = {m.name: m for m in model.modalities if m.is_text}
    fits = sum(m.max_tokens for m in (*texts.values(), model.modality[link.name])) <= max(model.input_sizes)
    plan = link.plan and not weighted and fits and link.name not in texts and known and {*known} <= {*texts}
    return [name for name in texts if name not in known] if plan else []


def generate(run, given, chain, generator=None):
    """Runs a chain from ids given, {name: (B, max_tokens)}: the ids of all modalities known in the end, and the raw
    values of those that were generated. Raises UserError."""
    for known, raw in stream(run, given, chain, generator):
        pass
    return known, raw


def autocast(run):
    return devices.autocast(run.device, devices.find_dtype(run.dtype, run.device))


@torch.no_grad()
def image_steps(run, known, name, steps, temperature, temperature_end, top_k, top_p, order, schedule, guidance,
                guidance_end, condition_weights, generator):
    """Yields the ids (B, max_tokens) of an image, -1 if unknown, before and after each step of model.generate with the
    same arguments."""
    model, ids = run.model, run.model.pack_modalities(known)
    m = model.modality[name]
    position_ids = torch.arange(model.N, device=ids.device)[m.token_slice].expand(len(ids), -1)

    def predict(tokens, progress):
        ids[:, m.token_slice] = tokens
        scale, T = lerp(guidance, guidance_end, progress), lerp(temperature, temperature_end, progress)
        with autocast(run):  # not around a yield
            return model.sample_tokens(ids, m, position_ids, scale, condition_weights, T, top_k, top_p, generator)
    start = ids[:, m.token_slice].clone()
    yield start.cpu()
    if n_unknown := int((start < 0).sum(1).max()):
        for tokens in iterative_decode(start, predict, m.grid, min(steps, n_unknown), order, schedule,
                                       generator=generator):
            yield tokens.cpu()


def stream(run, given, chain, generator=None, every_step=False):
    """Yields what `generate` returns at the start and after each target; with every_step also after each step of an
    image."""
    known, raw, weights = dict(given), {}, {link.name: link.weight for link in chain[0]}
    yield dict(known), dict(raw)
    for link in chain[1]:
        name, n = link.name, max(link.mean, link.best)
        others = {other: weight for other, weight in weights.items() if weight != 1 and other != name}
        if plan := plan_of(run.model, link, known, bool(others)):
            with autocast(run):
                known |= run.model.generate(known, plan, temperature=PLAN_TEMPERATURE, generator=generator)
        repeated = {other: ids.repeat_interleave(n, 0) for other, ids in known.items()}
        sampling = sampling_of(run.model, link, known, bool(others))
        if every_step and n == 1 and not run.model.modality[name].is_text:
            for ids in image_steps(run, known, name, **sampling, condition_weights=others, generator=generator):
                yield known | {name: ids}, raw
        else:
            with autocast(run):
                ids = run.model.generate(repeated, [name], **sampling, condition_weights=others, generator=generator)
            ids = ids[name].cpu()
        if link.best > 1:
            with autocast(run):
                ids = best_samples(run.model, known, name, ids, n)
        raw[name] = run.dataset.decode(name, ids)
        if link.mean > 1:
            if not hasattr(run.dataset, 'encode'):
                raise UserError(f'{name}: this data set has no encoder, which the mean of several samples needs')
            raw[name] = mean_of(name, raw[name].reshape(-1, n, *raw[name].shape[1:]))
            ids = run.dataset.encode(name, raw[name])  # what the next links see
        known[name], weights[name] = ids, link.weight
        yield dict(known), dict(raw)
