"""
Measurements of a run: exact means over micro-batches and processes, tokens per second, MFU, the time spent waiting for
data.
"""
import copy
import math
import time

import torch
import torch.distributed as dist

from config import UserError
from engine import devices
from engine.batches import to_device
from engine.processes import is_main


def logs_of(outputs):
    """The logs of what a chapter's `forward` returns, its loss and its logs. Raises UserError."""
    loss, logs = outputs if isinstance(outputs, (tuple, list)) and len(outputs) == 2 else (None, None)
    if not (isinstance(loss, torch.Tensor) and loss.ndim == 0 and isinstance(logs, dict)
            and 'tokens' in logs and any(name.startswith('loss') for name in logs)
            and all(isinstance(log, torch.Tensor) and log.shape == (2,) for log in logs.values())):
        raise UserError('forward must return the loss, a tensor with one value, and the logs, a dict of tensors (sum, '
                        'count) that has `tokens` and a name that begins with `loss`: see docs/yours.md')
    return logs


def add_logs(total, logs):
    """Adds logs {name: (sum, count)} on the device. Sums and counts keep every mean exact and need no host-device
    sync."""
    return total | {name: total.get(name, 0) + value for name, value in logs.items()}


def means(total):
    """({name: mean}, number of tokens) as floats, over the micro-batches of all processes. A host-device sync."""
    names = sorted(total)
    sums = torch.stack([total[name].float() for name in names])
    if dist.is_initialized():
        dist.all_reduce(sums)
    sums = dict(zip(names, sums.tolist()))
    tokens = sums.pop('tokens')[0]
    return {name: value / count for name, (value, count) in sums.items() if count}, tokens


def mean_loss(values):
    """The loss by which evaluations are compared: the mean over all logs named loss... (one per modality in nano4M)."""
    losses = [value for name, value in values.items() if name.startswith('loss')]
    return sum(losses) / len(losses) if losses else math.nan


def others(values):
    """The logs without `loss`, which has its own name in a line of log.jsonl."""
    return {name: value for name, value in values.items() if name != 'loss'}


def progress(state):
    """The first entries of a line of log.jsonl."""
    return {'step': state.step, 'tokens': state.tokens, 'seconds': round(state.seconds, 2)}


def evaluation_line(state, values):
    """The line of an evaluation in log.jsonl."""
    return progress(state) | {'val_loss': mean_loss(values)} | {f'val_{name}': value for name, value in values.items()}


class Meter:
    """Sums over the steps between two lines of the log, from `restart` to `line`."""
    def __init__(self, model, device, dtype):
        self.meta_model = copy.deepcopy(model).to('meta')  # without values: counting its FLOPs costs no time or memory
        self.flops = {}  # {shapes of a micro-batch: FLOPs}
        self.device, self.peak_flops = device, devices.matmul_rate(device, dtype) if is_main() else 1
        self.restart()

    def restart(self):
        self.total, self.work, self.waited, self.since = {}, 0, 0.0, time.perf_counter()

    def take(self, batches):
        """The next micro-batch, on the device."""
        began = time.perf_counter()
        batch = to_device(next(batches), self.device)
        self.waited += time.perf_counter() - began
        shapes = tuple(tensor.shape for tensor in batch.values() if tensor.ndim > 1)  # 1-D: lists of targets
        if shapes not in self.flops:
            self.flops[shapes] = devices.count_flops(self.meta_model, to_device(batch, torch.device('meta')))
        self.work += self.flops[shapes]
        return batch

    def add(self, logs):
        self.total = add_logs(self.total, logs)

    def line(self, state, norm, lr):
        """The line of log.jsonl for the steps since the last one. Adds their seconds and tokens to the state."""
        values, n_tokens = means(self.total)
        seconds = time.perf_counter() - self.since
        state.tokens, state.seconds = state.tokens + round(n_tokens), state.seconds + seconds
        line = progress(state) | {
            'train_loss': mean_loss(values), 'lr': lr, 'grad_norm': norm,
            'tokens_per_second': round(n_tokens / seconds), 'mfu': round(self.work / seconds / self.peak_flops, 4),
            'data_wait': round(self.waited / seconds, 4)}
        if self.device.type == 'cpu':
            line['threads'] = torch.get_num_threads()
        self.restart()
        return line | ({'skipped': state.skipped} if state.skipped else {}) | others(values)
