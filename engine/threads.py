"""
The number of CPU threads: one for each core that other programs leave free.

The threads of an operation wait for the last of them. Beside a busy program one of them gets no core for milliseconds,
in each of the hundreds of operations of a training step: two threads on two cores are then several times as slow as
one (docs/train.md has a table). The system counts the CPU time of all programs, so no trial is needed, and an idle
machine pays nothing. A number that the user chose stays.
"""
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

STAT = Path('/proc/stat')  # on Linux; elsewhere other programs are not seen
SHARE = 0.3                # of a core: what other programs may use of it while a thread has it, too


def cores():
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count())


def others_seconds():
    """CPU seconds that other programs have used so far on the cores of this process."""
    if not STAT.is_file():
        return 0.0
    names, ticks = {f'cpu{core}' for core in cores()}, 0
    for name, *counts in map(str.split, STAT.read_text(encoding='utf-8').splitlines()):
        if name in names:
            user, nice, system, idle, iowait, irq, softirq = map(int, counts[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf('SC_CLK_TCK') - sum(os.times()[:4])  # less this process and its children


class Watch:
    """The other programs, as of the last look, and the number of threads that was set."""
    def __init__(self):
        self.fixed = False
        self.most = self.number = torch.get_num_threads()
        self.others = 0.0  # cores that other programs use
        self.time, self.seconds = time.perf_counter(), others_seconds()

    def look(self):
        """Updates `others` by the time since the last look. It rises at once and falls over several looks."""
        time.sleep(max(0, self.time + 0.2 - time.perf_counter()))  # the system counts in units of 10 ms
        now, seconds = time.perf_counter(), others_seconds()
        self.others = max((seconds - self.seconds) / (now - self.time), 0.7 * self.others)
        self.time, self.seconds = now, seconds

    def set(self, number):
        torch.set_num_threads(number)
        self.number = number


watch = Watch()


def choose(threads, checkpoint, world):
    """Sets the threads of a training run: the setting `threads`, which stays, also on resume; if that is 0, on resume
    without OMP_NUM_THREADS, the number in the checkpoint, divided among the processes and at most one per core;
    otherwise as `adapt`."""
    before = checkpoint['settings'].get('threads', 0) if checkpoint else 0
    watch.fixed = bool(threads or before) or world > 1
    if checkpoint and not threads and 'OMP_NUM_THREADS' not in os.environ:
        local = len(cores()) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        threads = max(1, min(checkpoint['threads'] // world, local))
    if threads:
        watch.set(threads)
    else:
        adapt(pause=0)


def adapt(pause=1.0):
    """Between two steps: sets one thread for each core that other programs have left free since the last look, and
    prints a line if that changes their number. Looks once in `pause` seconds."""
    if watch.fixed or 'OMP_NUM_THREADS' in os.environ or time.perf_counter() < watch.time + pause:
        return
    watch.look()
    before = torch.get_num_threads()
    if before != watch.number:  # set elsewhere, by the user
        watch.most = before
    watch.set(max(1, min(watch.most, math.floor(len(cores()) - watch.others + SHARE))))
    if watch.number != before:
        tqdm.write(f'other programs use {watch.others:.1f} of {len(cores())} cores: from here on '
                   f'{watch.number} thread{"s" * (watch.number > 1)}, not {before}', file=sys.stderr)
