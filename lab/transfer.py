"""
Transfer: how useful is a trained nano4M's encoder in a task that it was not trained for, if labels are few?

    python -m lab.transfer --out_dir=out/nano4m                                  how many objects does the image show?
    python -m lab.transfer --out_dir=out/nano4m --task=shape                     what shape has the leftmost one?
    python -m lab.transfer --out_dir=out/nano4m_cifar10 --task=label             which of CIFAR-10's classes is it?

The decoder is not used (4M, 2312.06647, section 4): a linear layer classifies the mean of the encoder's outputs for the
tokens of one modality. Four ways to train it, each with 50, 200, 1,000 and 5,000 labels:

    probe     the linear layer alone, on the encoder as it is
    random    the same, on an encoder of random weights: what the architecture contributes by itself
    finetune  the encoder too, at a fraction of the learning rates
    scratch   the same network, from random weights

Accuracies on held-out images go to transfer_TASK.json in the run's folder, and, as curves, to transfer_TASK.png. In the
file, names begin with the settings that differ from the defaults.
"""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import lab
from config import UserError
from engine import checkpoints, devices, optimizers
from lab.figures import save_curves
from lab.retrieval import read_tokens
from lab.statistics import TABLE_HEAD, bootstrap, save_scores, table_row, with_settings
from prepare import arrays

SETTINGS = dict(
    out_dir='out/nano4m',       # the run, whose ckpt_last.pt is read
    task='count',               # count, shape, color: of scenes; label: of data that has a label.npy
    given='',                   # the modality that the encoder reads; '' is the run's first
    labels='50 200 1000 5000',  # numbers of training samples with a label
    steps=300,                  # of finetune and scratch, for any number of labels
    batch_size=32,              # samples in each of these steps
    rate=0.05,                  # factor of the learning rates in finetune
    n_val=1000,                 # held-out images
    seed=0,                     # of random weights, batches and which samples have a label
    device='auto',              # cuda, mps or cpu
)
TASKS = dict(  # an array on disk, and how to get the class from it; the first object is the leftmost one
    count=('raw_objects', lambda objects: (objects[:, :, 0] >= 0).sum(1)),
    shape=('raw_objects', lambda objects: objects[:, 0, 0]),
    color=('raw_objects', lambda objects: objects[:, 0, 1]),
    label=('label', lambda labels: labels))
TOLD = 'out_dir', 'task', 'labels', 'n_val', 'device'  # settings that a score's name, n or file tells
UNUSED = 'model.decoder:0 model.heads:0 model.query_embedding:0'  # learning rates of what the encoder does not need


class Classifier(nn.Module):
    """The encoder of a copy of a nano4M and a linear layer: tokens (B, N) of one modality -> logits (B, classes)."""
    def __init__(self, model, given, classes):
        super().__init__()
        self.model, self.head = copy.deepcopy(model), nn.Linear(model.config.n_embd, classes, device=model.rope.device)
        nn.init.zeros_(self.head.weight)
        self.token_slice = model.modality[given].token_slice

    def features(self, ids):
        position_ids = torch.arange(self.model.N, device=ids.device)[self.token_slice].expand(len(ids), -1)
        return self.model.encode(ids, position_ids).mean(1)  # (B, D)

    def forward(self, ids):
        return self.head(self.features(ids))


@torch.no_grad()
def in_parts(function, ids, device):
    """A function of tokens (n, N), computed on the device in parts; the result is on the CPU."""
    return torch.cat([function(part.to(device)).float().cpu() for part in ids.split(250)])


def train_probe(classifier, ids, labels):
    """Fits the linear layer alone, to the end: on standardized features the loss has one minimum, which L-BFGS
    finds."""
    x = in_parts(classifier.features, ids, classifier.head.weight.device)
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
    """Trains encoder and linear layer on random batches of the labelled samples."""
    random, device = np.random.default_rng((settings['seed'], 9)), classifier.head.weight.device

    def batch_of():
        chosen = torch.from_numpy(random.integers(0, len(ids), settings['batch_size']))
        return ids[chosen], labels[chosen]

    def loss_of(classifier, ids, labels):
        return F.cross_entropy(classifier(ids).float(), labels)
    optimizers.fit(classifier, loss_of, batch_of, settings['steps'], name, f'{rates} {UNUSED}', device)
    classifier.to(device)


def read_split(folder, split, given, task):
    """Tokens (n, N) and classes (n,) of a split. Raises UserError."""
    name, class_of = TASKS[task]
    return read_tokens(folder, split, given), class_of(arrays.load(folder / split / f'{name}.npy'))


def check(settings, run):
    """The modality that is read. Raises UserError."""
    if min(settings[name] for name in ('steps', 'batch_size', 'n_val')) < 1:
        raise UserError('steps, batch_size and n_val must be at least 1')
    if lab.chapter_of(run.model) != 'fourm':
        raise UserError(f'{run.path}: a run of {lab.chapter_of(run.model)}; transfer is for nano4M, that is fourm')
    given = settings['given'] or run.model.batch_keys[0]
    images = [m.name for m in run.model.modalities if not m.is_text]
    if settings['task'] not in TASKS or given not in images:
        raise UserError(f'task is one of {", ".join(TASKS)}, given one of {", ".join(images)}')
    return given


def read_counts(settings, least, most):
    """The numbers of labels. Raises UserError."""
    counts = [config.convert('labels', count, 'labels', 0) for count in settings['labels'].replace(',', ' ').split()]
    if not counts or min(counts) < least or max(counts) > most:
        raise UserError(f'labels={settings["labels"]}: numbers from {least} to {most:,}, of the samples to train on')
    return counts


def predictions(model, given, ids, labels, val_ids, counts, settings):
    """Trains in all four ways with these numbers of labels; yields (way, number, class of each held-out sample)."""
    torch.manual_seed(settings['seed'])
    device = model.rope.device
    random = type(model)(model.config).to(device).eval()
    order = np.random.default_rng((settings['seed'], 8)).permutation(len(ids))  # fewer labels are a part of more
    for n in counts:
        samples = ids[order[:n]], torch.from_numpy(labels[order[:n]])
        for way, start in dict(probe=model, random=random, finetune=model, scratch=random).items():
            classifier = Classifier(start, given, labels.max() + 1)
            if way != 'scratch':
                train_probe(classifier, *samples)
            if way in ('finetune', 'scratch'):
                rates = f'model:{settings["rate"]} head:{settings["rate"]}' if way == 'finetune' else ''
                train_all(classifier, *samples, settings, f'{way} {n}', rates)
            yield way, n, in_parts(classifier, val_ids, device).argmax(1).numpy()


@torch.inference_mode(False)
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    device, task = devices.find(settings['device']), settings['task']
    checkpoint = Path(settings['out_dir'], 'ckpt_last.pt')
    devices.set_up(device, training=False)
    run = lab.open_run(checkpoint, device)
    given, digest = check(settings, run), checkpoints.digest(checkpoint)
    (ids, classes), (val_ids, truth) = (read_split(run.folder, split, given, task) for split in ('train', 'val'))
    val_ids, truth = val_ids[:settings['n_val']], truth[:settings['n_val']]
    names, labels = np.unique(classes, return_inverse=True)
    counts = read_counts(settings, len(names), len(ids))
    baseline, curves = float((truth == names[np.bincount(labels).argmax()]).mean()), {}
    path = checkpoint.with_name(f'transfer_{task}.json')
    print(TABLE_HEAD)
    for way, n, predicted in predictions(run.model, given, ids, labels, val_ids, counts, settings):
        right = names[predicted] == truth
        score = bootstrap(np.stack((right, np.ones(len(right))), -1)[:, None]) | dict(baseline=baseline)
        print(table_row(f'{way}, {n} labels', score), flush=True)
        named = with_settings({f'{way}, {n} labels': score}, settings, SETTINGS, TOLD)
        save_scores(named, path, digest)  # an interruption keeps what is finished
        curves.setdefault(way, {})[f'{n:,}'] = score
    print(f'wrote {path}')
    save_curves(curves, path.with_suffix('.png'), f'accuracy of {task}, read from {given}, with 95 % intervals',
                'training samples with a label', ('most frequent class', baseline))


if __name__ == '__main__':
    config.run(main)
