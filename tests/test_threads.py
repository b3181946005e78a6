"""The number of CPU threads beside other programs."""
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train
from engine import checkpoints, threads


@pytest.fixture
def machine(monkeypatch):
    """Two cores, two threads; `machine['others']` cores are in use by other programs, in looks a second apart."""
    state = dict(others=0.0, time=0.0, seconds=0.0)

    def passes(seconds):
        state['time'], state['seconds'] = state['time'] + seconds, state['seconds'] + seconds * state['others']
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(threads, 'time', SimpleNamespace(perf_counter=lambda: state['time'], sleep=passes))
    monkeypatch.setattr(threads, 'others_seconds', lambda: state['seconds'])
    monkeypatch.setattr(threads, 'cores', lambda: {0, 1})
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, 'watch', threads.Watch())

    def second():
        passes(1.001)
        threads.adapt()
        return torch.get_num_threads()
    state |= dict(second=second, passes=passes)
    return state


def test_one_thread_beside_a_busy_program(machine, capfd):
    assert machine['second']() == 2  # idle
    machine['others'] = 0.2
    assert machine['second']() == 2  # a little on one core
    assert capfd.readouterr().err == ''
    machine['others'] = 1.0
    assert machine['second']() == 1
    assert capfd.readouterr().err == 'other programs use 1.0 of 2 cores: from here on 1 thread, not 2\n'
    assert machine['second']() == 1 and capfd.readouterr().err == ''  # said once
    machine['others'] = 0.0
    assert [machine['second']() for _ in range(5)] == [1, 1, 1, 2, 2]  # back, but not at the first quiet second
    assert capfd.readouterr().err == 'other programs use 0.2 of 2 cores: from here on 2 threads, not 1\n'
    machine['others'] = 7.0
    assert machine['second']() == 1


def test_one_thread_for_each_free_core(machine, monkeypatch):
    monkeypatch.setattr(threads, 'cores', lambda: set(range(8)))
    torch.set_num_threads(6)
    assert machine['second']() == 6
    for others, number in (2.0, 6), (3.0, 5), (5.5, 2):
        machine['others'] = others
        assert machine['second']() == number


def test_looks_are_a_second_apart(machine):
    machine['others'], machine['time'], machine['seconds'] = 1.0, 0.5, 0.5
    threads.adapt()
    assert torch.get_num_threads() == 2
    threads.adapt(pause=0)
    assert torch.get_num_threads() == 1


def test_the_users_choice_stays(machine, monkeypatch):
    machine['others'] = 1.0
    threads.choose(2, None, 1)
    assert machine['second']() == 2  # the setting
    threads.choose(0, dict(settings=dict(threads=2), threads=2), 1)
    assert machine['second']() == 2  # that of the run before
    threads.choose(0, None, 2)
    assert machine['second']() == 2  # several processes share the cores
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    threads.choose(0, None, 1)
    assert machine['second']() == 2
    threads.choose(0, dict(settings={}, threads=1), 1)
    assert machine['second']() == 2  # also on resume
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert machine['second']() == 1
    machine['others'] = 0.0
    assert [machine['second']() for _ in range(4)][-1] == 2
    torch.set_num_threads(1)  # in a notebook
    assert machine['second']() == 1


def test_threads_of_a_run_that_continues(machine, monkeypatch):
    """As many in all as before, spread over the processes of now, at most one a core; the setting counts before that."""
    def chosen(*arguments):
        threads.choose(*arguments)
        return torch.get_num_threads()
    monkeypatch.setattr(threads, 'cores', lambda: set(range(8)))
    torch.set_num_threads(8)
    before = dict(settings={}, threads=6)
    assert chosen(3, before, 1) == 3
    assert [chosen(0, before, world) for world in (1, 2, 4, 16)] == [6, 3, 1, 1]
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert chosen(0, dict(settings={}, threads=64), 4) == 2


def test_a_run_beside_a_busy_program(machine, toy, tmp_path, monkeypatch):
    """It goes on with one thread; the log and the checkpoint hold the number, and the resumed run begins with it."""
    def line(meter, *arguments, line=train.meters.Meter.line):  # log lines take a second; others work from step 4 on
        machine['others'] = float(arguments[0].step >= 4)
        machine['passes'](1.001)
        return line(meter, *arguments)
    settings = toy('gpt') | dict(threads=0, log_interval=2, max_iters=8, eval_interval=8, out_dir='out/busy')
    monkeypatch.setattr(train.meters.Meter, 'line', line)
    train.main(**settings)
    lines = [json.loads(line) for line in open('out/busy/log.jsonl', encoding='utf-8')]
    assert [line['threads'] for line in lines if 'train_loss' in line] == [2, 2, 1, 1]
    assert checkpoints.read(tmp_path / 'out/busy/ckpt_last.pt')['threads'] == 1
    train.main(**settings | dict(max_iters=12))
    lines = [json.loads(line) for line in open('out/busy/log.jsonl', encoding='utf-8')]
    assert [line['threads'] for line in lines if 'train_loss' in line] == [2, 2, 1, 1, 1, 1]


def test_cpu_time_of_other_programs(tmp_path, monkeypatch):
    """That of all programs on the cores of this process, without waiting, less that of this process and its children."""
    (tmp_path / 'stat').write_text('cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 5000 600 7 8 90 0 0\n'
                                   'cpu1 1 2 3 4 5 6 7 8 9 10\ncpu10 200 0 0 0 0 0 0 0 0 0\nintr 1 2 3\n', encoding='utf-8')
    monkeypatch.setattr(threads, 'STAT', tmp_path / 'stat')
    monkeypatch.setattr(threads, 'cores', lambda: {0, 10})
    monkeypatch.setattr(threads.os, 'sysconf', lambda name: 100)
    monkeypatch.setattr(threads.os, 'times', lambda: (0.5, 0.25, 0.125, 0.0625, 1e6))
    assert threads.others_seconds() == pytest.approx(1.65 + 2.0 - 0.9375)
    monkeypatch.setattr(threads, 'STAT', tmp_path / 'none')
    assert threads.others_seconds() == 0


@pytest.mark.skipif(not threads.STAT.is_file(), reason='other programs are counted on Linux')
def test_a_real_busy_machine():
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in threads.cores()]
    try:
        time.sleep(0.2)
        watch = threads.Watch()
        watch.look()
        assert watch.others > 0.6 * len(threads.cores())
    finally:
        for process in busy:
            process.kill()
            process.wait()
