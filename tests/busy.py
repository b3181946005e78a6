"""
A training step beside no, one and two busy programs: with the threads that engine/threads.py chooses, with all, with one.

    python -m tests.busy                                          nano4M
    GOMP_SPINCOUNT=300000 python -m tests.busy --rounds=1         the same, waiting as libgomp does if nothing is set
    python -m tests.busy --train=config/gpt_shakespeare.py

The three ways take turns, `rounds` times. A line of JSON for each turn: the median of its steps, in ms, the threads of
the last step, the cores that other programs used meanwhile, the load average. What else runs on the machine counts,
too. On Linux.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import config
from engine import devices, graphs, optimizers, threads
from lab import speed

SETTINGS = dict(
    train='config/nano4m.py',  # a config
    compile=True,              # torch.compile, as in training
    rounds=3,                  # turns of each way
    steps=8,                   # of a turn
    seconds=6.0,               # after which a turn ends
    save='',                   # a file to append the lines to
)


@contextmanager
def busy_programs(n):
    """Functions that start and stop 1 .. n programs, each in a session of its own, as from another terminal."""
    programs = [subprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True) for _ in range(n)]

    def run(count):
        for i, program in enumerate(programs):
            program.send_signal(signal.SIGCONT if i < count else signal.SIGSTOP)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends them, too
    try:
        run(0)
        yield run
    finally:
        for program in programs:
            program.kill()
            program.wait()


def turn(step, number, settings):
    """Some steps with this number of threads; 0: as chosen in the second before, and between the steps."""
    threads.watch = threads.Watch()
    threads.watch.most = len(threads.cores())
    threads.watch.set(number or threads.watch.most)
    def steps(least, most, seconds):
        """The times of at least `least` steps, at most `most`, for `seconds`."""
        start, times = time.perf_counter(), []
        while len(times) < least or len(times) < most and time.perf_counter() < start + seconds:
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
            if not number:
                threads.adapt()
        return times
    before, used = time.perf_counter(), threads.others_seconds()
    steps(0, 1000, 1.2)
    times = steps(1, settings['steps'], settings['seconds'])
    others = (threads.others_seconds() - used) / (time.perf_counter() - before)
    return dict(threads=threads.watch.number, ms=round(1e3 * statistics.median(times)), steps=len(times),
                others=round(others, 1))


def main(*arguments, **overrides):
    settings, device = config.apply(config.read(arguments, overrides), SETTINGS), devices.find('cpu')
    with speed.built(config.read([settings['train']]), device) as (options, model, data), busy_programs(2) as run:
        if settings['compile']:
            graphs.compile_blocks(model, device)
        dtype = devices.find_dtype('auto', device)
        options |= optimizers.FIT | dict(max_iters=10 ** 6)
        steps = speed.Steps(model, (data, model, options, 0, 0), options, device, dtype, False)
        steps.step()
        for _ in range(settings['rounds']):
            for busy in 0, 1, 2:
                for name, number in ('chosen', 0), ('all', len(threads.cores())), ('one', 1):
                    run(busy)
                    line = dict(busy=busy, way=name) | turn(steps.step, number, settings)
                    line |= dict(load=round(os.getloadavg()[0], 1), spin=int(os.environ['GOMP_SPINCOUNT']))
                    run(0)
                    print(json.dumps(line), flush=True)
                    if settings['save']:
                        with open(settings['save'], 'a', encoding='utf-8') as file:
                            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    config.run(main)
