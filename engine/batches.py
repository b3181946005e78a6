"""
Micro-batches: their samples and their random numbers.

The global batch of a step is a list of micro-batches. Micro-batch j of a step is a function of (seed, step, j) only.
The number of processes and an interruption of the run therefore do not change it.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from config import UserError

DRAW, STEP, EVALUATION, EVALUATION_STEP, DROPOUT = 1, 2, 3, 4, 5  # use of random numbers: part of a generator's key


def generator(*key):
    """A random generator for a key of integers, independent of those for other keys (trailing zeros do not count)."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def share(settings, rank, world):
    """(number of micro-batches per step, indices of those of this process). Raises UserError if the batch cannot be
    split evenly."""
    size = settings['micro_batch_size']
    n_micro = settings['batch_size'] // size
    if settings['batch_size'] % size or n_micro % world:
        right = f'so that their number is a multiple of {world}' if world > 1 else 'that divides batch_size'
        raise UserError(f'batch_size={settings["batch_size"]} does not split into micro-batches of {size} on {world} '
                        f'processes: choose a --micro_batch_size= {right}')
    return n_micro, range(rank, n_micro, world)


def micro_batch(data, model, settings, step, j):
    """Micro-batch j of a step, with the random numbers of the chapter: masks, noise."""
    seed, size = settings['seed'], settings['micro_batch_size']
    batch = data.take(step * settings['batch_size'] + j * size, size)
    return model.prepare_batch(batch, generator(seed, DRAW, step, j), step_generator=generator(seed, STEP, step))


def evaluation_batch(data, model, settings, j):
    """Micro-batch j of every evaluation: the same samples, masks and noise in all runs with this micro_batch_size."""
    size = settings['micro_batch_size']
    batch = data.rows(np.arange(j * size, min((j + 1) * size, data.n)))
    return model.prepare_batch(batch, generator(EVALUATION, j), step_generator=generator(EVALUATION_STEP, j))


def seed_dropout(seed, step, j):
    torch.manual_seed(seed_of(seed, DROPOUT, step, j))


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=device.type == 'cuda') for name, tensor in batch.items()}


def prefetched(make, jobs, device):
    """Yields the batch make(*job) for each job. For a GPU, two threads prepare the next batches in the background.
    More threads would be slower: preparation is many small operations, and Python runs one thread at a time."""
    if device.type == 'cpu':  # the worker threads of a second thread would slow down those of the first
        yield from (make(*job) for job in jobs)
        return

    def batch(job):
        if device.type != 'cuda':
            return make(*job)
        torch.cuda.set_device(device)  # a new thread starts with GPU 0
        return {name: tensor.pin_memory() for name, tensor in make(*job).items()}  # pinned: copied asynchronously
    with ThreadPoolExecutor(2) as pool:
        queue = deque()
        for job in jobs:
            queue.append(pool.submit(batch, job))
            if len(queue) > 2:
                yield queue.popleft().result()
        yield from (future.result() for future in queue)
