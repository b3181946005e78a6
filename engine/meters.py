"""
What a run measures: exact means over micro-batches and processes, tokens per second, MFU, the time spent waiting for data.
"""
import copy
import math
import time

import torch
import torch.distributed as dist

from engine import devices
from engine.batches import to_device
from engine.processes import is_main


def add_logs(total, logs):
    """logs: {name: (sum, count)} on the device; adding them keeps every mean exact and needs no host-device sync."""
    return total | {name: total.get(name, 0) + value for name, value in logs.items()}


def means(total):
    """({name: mean}, number of tokens), as floats, over the micro-batches of all processes; a host-device sync."""
    names = sorted(total)
    sums = torch.stack([total[name].float() for name in names])
    if dist.is_initialized():
        dist.all_reduce(sums)
    sums = dict(zip(names, sums.tolist()))
    tokens = sums.pop('tokens')[0]
    return {name: value / count for name, (value, count) in sums.items() if count}, tokens


def mean_loss(values):
    """A model's loss for comparisons: the plain mean over its logs named loss... (one a modality in nano4M)."""
    losses = [value for name, value in values.items() if name.startswith('loss')]
    return sum(losses) / len(losses) if losses else math.nan


def others(values):
    """The logs beside `loss`, which has a name of its own in a line."""
    return {name: value for name, value in values.items() if name != 'loss'}


def evaluation_line(state, values):
    """The line of log.jsonl of an evaluation."""
    line = {'step': state.step, 'tokens': state.tokens, 'seconds': round(state.seconds, 2), 'val_loss': mean_loss(values)}
    return line | {f'val_{name}': value for name, value in values.items()}


class Meter:
    """Sums of what happens between two lines of the log, from `restart` to `line`."""
    def __init__(self, model, device, dtype):
        self.ghost = copy.deepcopy(model).to('meta')  # without values: FLOPs are counted at no cost of time or memory
        self.flops = {}  # of a micro-batch, by its shapes
        self.device, self.peak_flops = device, devices.matmul_rate(device, dtype) if is_main() else 1
        self.restart()

    def restart(self):
        self.total, self.work, self.waited, self.since = {}, 0, 0.0, time.perf_counter()

    def take(self, batches):
        """The next micro-batch, on the device."""
        began = time.perf_counter()
        batch = to_device(next(batches), self.device)
        self.waited += time.perf_counter() - began
        shapes = tuple(tensor.shape for tensor in batch.values() if tensor.ndim > 1)  # not of lists of targets: always another
        if shapes not in self.flops:
            self.flops[shapes] = devices.count_flops(self.ghost, to_device(batch, torch.device('meta')))
        self.work += self.flops[shapes]
        return batch

    def add(self, logs):
        self.total = add_logs(self.total, logs)

    def line(self, state, norm, lr):
        """The line of log.jsonl of the steps since the last one; adds their seconds and tokens to the state."""
        now = time.perf_counter()
        values, count = means(self.total)
        took = now - self.since
        state.tokens, state.seconds = state.tokens + round(count), state.seconds + took
        line = {'step': state.step, 'tokens': state.tokens, 'seconds': round(state.seconds, 2), 'train_loss': mean_loss(values),
                'lr': lr, 'grad_norm': norm if math.isfinite(norm) else str(norm), 'tokens_per_second': round(count / took),
                'mfu': round(self.work / took / self.peak_flops, 4), 'data_wait': round(self.waited / took, 4)}
        self.restart()
        return line | ({'skipped': state.skipped} if state.skipped else {}) | others(values)
