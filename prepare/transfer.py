"""
Transfer: what a trained nano4M's encoder is worth in a task that it was never trained for, when labels are few.

    python -m prepare.transfer --run=out/nano4m                              how many objects does the picture show?
    python -m prepare.transfer --run=out/nano4m --task=shape                 what shape has the leftmost one?
    python -m prepare.transfer --run=out/nano4m_cifar10 --task=label         which of CIFAR-10's classes is it?

The decoder is left out (4M, 2312.06647, section 4): a linear layer reads the class off the mean of what the encoder makes of a
modality's tokens. Four ways to train it, each with 50, 200, 1,000 and 5,000 labels:

    probe     the linear layer alone, on the encoder as it is
    random    the same, on an encoder of random weights: what the architecture knows by itself
    finetune  the encoder too, at a fraction of the learning rates
    scratch   the same network, from random weights

Accuracies on held-out pictures go to transfer_TASK.json in the run's folder, and, as curves, to transfer_TASK.png.
"""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
from config import UserError
from prepare.image_tokenizers import fit
from prepare.report import bootstrap, save_curves, save_scores
from prepare.scenes import load
from train import check_data, load_model, read_meta

SETTINGS = dict(
    run='out/nano4m',
    task='count',             # count, shape, color: of scenes; label: of data that has a label.npy
    given='',                 # the modality that the encoder reads; '' is the run's first
    labels='50 200 1000 5000',
    steps=300,                # of finetune and scratch, whatever the number of labels
    batch_size=32,
    rate=0.05,                # when it is finetuned, as a factor of the learning rates
    n_val=1000,
    seed=0)
TASKS = dict(  # an array on disk, and how to read the class off it; the first object is the leftmost one
    count=('raw_objects', lambda objects: (objects[:, :, 0] >= 0).sum(1)),
    shape=('raw_objects', lambda objects: objects[:, 0, 0]),
    color=('raw_objects', lambda objects: objects[:, 0, 1]),
    label=('label', lambda labels: labels))
UNUSED = 'model.decoder:0 model.heads:0 model.query_embedding:0'  # learning rates of what the encoder does not need


class Classifier(nn.Module):
    """The encoder of a copy of a nano4M and a linear layer: tokens (B, N) of one modality -> logits (B, classes)."""
    def __init__(self, model, given, classes):
        super().__init__()
        self.model, self.head = copy.deepcopy(model), nn.Linear(model.config.n_embd, classes)
        nn.init.zeros_(self.head.weight)
        self.places = model.modality[given].places

    def features(self, ids):
        index = torch.arange(self.places.start, self.places.stop, device=ids.device).expand(len(ids), -1)
        return self.model.encode(ids, index).mean(1)  # (B, D)

    def forward(self, ids):
        return self.head(self.features(ids))


def train_probe(classifier, ids, labels):
    """Fits the linear layer alone, to the end: on standardized features the loss has one minimum, which L-BFGS finds."""
    x = over_parts(classifier.features, ids)
    mean, std = x.mean(0), x.std(0) + 1e-6
    linear = nn.Linear(x.size(1), classifier.head.out_features)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear((x - mean) / std), labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    weight = linear.weight.data / std  # the same layer, for features as they are
    classifier.head.load_state_dict(dict(weight=weight, bias=linear.bias.data - weight @ mean))


def train_all(classifier, ids, labels, settings, name, rates=''):
    """Trains encoder and linear layer on batches drawn from the labelled samples."""
    random = np.random.default_rng((settings['seed'], 9))

    def batch_of():
        chosen = torch.from_numpy(random.integers(0, len(ids), settings['batch_size']))
        return ids[chosen], labels[chosen]

    def loss_of(classifier, ids, labels):
        return F.cross_entropy(classifier(ids).float(), labels)
    fit(classifier, loss_of, batch_of, settings['steps'], name, f'{rates} {UNUSED}')


@torch.no_grad()
def over_parts(function, ids):
    return torch.cat([function(part).float() for part in ids.split(250)])


def read_split(folder, split, given, task):
    """Tokens (n, N) and classes (n,) of a split."""
    name, class_of = TASKS[task]
    ids = load(folder / split, given)
    ids = ids[:, 0] if ids.ndim == 3 else ids  # the first view
    return torch.from_numpy(ids.astype(np.int64)), class_of(load(folder / split, name))


def open_run(settings):
    """The run's model, its data folder, and the modality that is read. Raises UserError."""
    run, task = Path(settings['run']), settings['task']
    if min(settings[name] for name in ('steps', 'batch_size', 'n_val')) < 1:
        raise UserError('steps, batch_size and n_val must be at least 1')
    model, checkpoint = load_model(run / 'ckpt_last.pt')
    folder = Path('data', checkpoint['settings']['dataset'])
    if checkpoint['settings']['model'] != 'fourm':
        raise UserError(f'{run}: a run of {checkpoint["settings"]["model"]}; transfer is for nano4M, that is fourm')
    check_data(folder, read_meta(folder), checkpoint)
    given = settings['given'] or model.fields[0]
    pictures = [m.name for m in model.modalities if not m.is_text]
    if task not in TASKS or given not in pictures:
        raise UserError(f'task is one of {", ".join(TASKS)}, given one of {", ".join(pictures)}')
    return model, folder, given


def read_counts(settings, least, most):
    """The numbers of labels. Raises UserError."""
    counts = [config.convert('labels', count, 'labels', 0) for count in settings['labels'].replace(',', ' ').split()]
    if not counts or min(counts) < least or max(counts) > most:
        raise UserError(f'labels={settings["labels"]}: numbers from {least} to {most:,}, of the samples to train on')
    return counts


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    model, folder, given = open_run(settings)
    (ids, classes), (held_out, truth) = (read_split(folder, split, given, settings['task']) for split in ('train', 'val'))
    held_out, truth = held_out[:settings['n_val']], truth[:settings['n_val']]
    names, labels = np.unique(classes, return_inverse=True)
    counts = read_counts(settings, len(names), len(ids))
    order = np.random.default_rng((settings['seed'], 8)).permutation(len(ids))  # fewer labels are a part of more
    torch.manual_seed(settings['seed'])
    starts = dict(probe=model, random=type(model)(model.config), finetune=model)
    starts['scratch'] = starts['random']
    baseline, curves = float((truth == names[np.bincount(labels).argmax()]).mean()), {way: {} for way in starts}
    for n in counts:
        some = ids[order[:n]], torch.from_numpy(labels[order[:n]])
        for way, start in starts.items():
            classifier = Classifier(start, given, len(names))
            if way != 'scratch':
                train_probe(classifier, *some)
            if way in ('finetune', 'scratch'):
                train_all(classifier, *some, settings, f'{way} {n}', f'model:{settings["rate"]} head:{settings["rate"]}' * (way == 'finetune'))
            right = names[over_parts(classifier, held_out).argmax(1)] == truth
            print(f'{way}, {n:,} labels: {right.mean():.1%} of {len(right):,} right', flush=True)
            curves[way][f'{n:,}'] = bootstrap(np.stack((right, np.ones(len(right))), -1)[:, None]) | dict(baseline=baseline)
    path = Path(settings['run'], f'transfer_{settings["task"]}.json')
    save_scores({f'{way}, {n} labels': score for way, curve in curves.items() for n, score in curve.items()}, path)
    save_curves(curves, path.with_suffix('.png'), f'{settings["task"]} right, from {given}, with so many labels')


if __name__ == '__main__':
    config.run(main)
