"""Many processes: the same step however it is split, restarts, SLURM, and data that one of them makes."""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from config import UserError
from engine import devices, processes, runs
from prepare import arrays, files
from tests import faults
from tests.tiny import TINY, lines, losses, read, weights

KILLER = """
import os as _os, pathlib as _pathlib, threading as _threading, time as _time
def _die():
    while not _pathlib.Path('out/two/ckpt_last.pt').exists():
        _time.sleep(0.01)
    _pathlib.Path('killed').touch()
    _os.kill(_os.getpid(), 9)
if _os.environ['RANK'] == '1' and _os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    _threading.Thread(target=_die, daemon=True).start()
"""


def test_torchrun_goes_on_after_a_process_was_killed(toy):
    """A config file is code: this one kills the second process. The job ends like one that ran on a single process."""
    settings = toy('gpt')
    Path('killer.py').write_text(KILLER)
    train.main(**settings, out_dir='out/one')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=2']
    command = [train.__file__, 'killer.py', '--out_dir=out/two', *(f'--{name}={value}' for name, value in settings.items())]
    done = subprocess.run(torchrun + command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and Path('killed').exists(), done.stderr[-2000:]
    for (name, a), b in zip(weights('out/one').items(), weights('out/two').values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    one, two = ([(line['step'], line.get('train_loss', line.get('val_loss'))) for line in lines(run)]
                for run in ('out/one', 'out/two'))
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=1e-3)
    assert lines('out/one')[-1]['tokens'] == lines('out/two')[-1]['tokens']


def test_torchrun_prints_one_line_for_a_fault(toy):
    """The folder is in use: process 0 says so and ends; process 1, which waits for it, loses its connection."""
    settings = toy('gpt')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [train.__file__, '--out_dir=out/held', *(f'--{name}={value}' for name, value in settings.items())]
    with runs.lock(Path('out/held')):
        done = subprocess.run(torchrun + command, capture_output=True, text=True, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'})
    own = done.stderr.partition('torch/distributed/elastic')[0].rpartition('\n')[0]  # what follows is torchrun's
    assert done.returncode == 1 and len(own.splitlines()) == 1, done.stderr
    assert own.startswith('error: out/held: another process is training there; wait for it, or choose another --out_dir=')


def free_port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def together(world, chapter, out_dir, **changes):
    """The run on so many processes, with micro-batches of two."""
    port = free_port()
    started = [faults.start(chapter, out_dir, dict(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank),
                                                   MASTER_ADDR='localhost', MASTER_PORT=str(port)),
                            micro_batch_size=2, **changes) for rank in range(world)]
    for process in started:
        process.join(60)
        assert process.exitcode == 0


@pytest.fixture
def exact_muon(monkeypatch):
    """In bfloat16, Muon would rope the last bit of a gradient into a hundredth of its step."""
    monkeypatch.setattr(devices, 'find_dtype', lambda name, device, find=devices.find_dtype: find(
        'float32' if name == 'auto' else name, device))


@pytest.mark.parametrize('chapter', faults.CASES)
def test_every_split_over_processes_is_the_same_step(tmp_path, monkeypatch, exact_muon, chapter):
    """Four micro-batches on one process, two, four, or two that share the model between them: the loss and every gradient of the
    first step, dropout included, to rounding, and the weights after it."""
    monkeypatch.chdir(tmp_path)
    faults.make_data(chapter, faults.CASES[chapter][0])
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        gradients = [p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad for p in parameters]
        torch.save(gradients, f'gradients_{os.environ["RANK"]}.pt')
        return clip(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', spy)
    for name, world in dict(one=1, two=2, four=4, shards=2).items():
        together(world, chapter, f'out/{name}', max_iters=1, log_interval=1, eval_iters=3, shard=name == 'shards')
        found = torch.load('gradients_0.pt')
        log = [line.get('train_loss', line.get('val_loss')) for line in lines(f'out/{name}')]
        if world == 1:
            expected, first = found, log
        assert log[:2] == pytest.approx(first[:2], rel=1e-6) and log[2] == pytest.approx(first[2], rel=1e-4)
        for a, b in zip(expected, found):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * a.abs().max().item() + 1e-12)
        for (key, a), b in zip(weights('out/one').items(), weights(f'out/{name}').values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_shards_resume_on_any_number_of_processes(tmp_path, monkeypatch, exact_muon, dtype):
    """Two processes that share a model, then one, then two, with an average of the weights and frozen parts: the files are one
    process's."""
    monkeypatch.chdir(tmp_path)
    faults.make_data('fourm', faults.CASES['fourm'][0])
    settings = dict(dtype=dtype, ema=0.9, lr_multipliers='pos_embedding:0', decay=1e-9, eval_iters=2, eval_interval=2, log_interval=1)
    together(1, 'fourm', 'out/whole', max_iters=6, **settings)
    for steps, world in ((2, 2), (4, 1), (6, 2)):
        together(world, 'fourm', 'out/parts', max_iters=steps, shard=True, **settings)
    whole, parts = read('out/whole'), read('out/parts')
    assert faults.same(shapes(whole['optimizers']), shapes(parts['optimizers'])) and whole['scaler'] == parts['scaler']
    for key in ('weights', 'ema'):
        assert whole[key].keys() == parts[key].keys()
        for name in whole[key]:
            torch.testing.assert_close(whole[key][name], parts[key][name], rtol=5e-3, atol=5e-3 if dtype == 'float16' else 2e-4)
    assert losses('out/whole', 'val_loss') == pytest.approx(losses('out/parts', 'val_loss'), rel=1e-3)


def shapes(value):
    if isinstance(value, dict):
        return {name: shapes(item) for name, item in value.items()}
    return [shapes(item) for item in value] if isinstance(value, (list, tuple)) else getattr(value, 'shape', None)


def test_scitas(here):
    """The batch script against stand-ins of SLURM's commands: two processes, saved and queued again at USR1, then finished."""
    job_id = str(40000 + free_port() % 10000)  # its MASTER_PORT is 50000 to 59999
    (here / 'bin').mkdir()
    stubs = dict(scontrol='[ "$1" = requeue ] && echo "$2" > requeued || echo localhost', srun="""
        shift; pids=(); trap 'kill -USR1 "${pids[@]}"' USR1
        for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids+=($!); done
        wait "${pids[@]}"; wait "${pids[@]}" """)
    for name, body in stubs.items():
        (here / 'bin' / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
        (here / 'bin' / name).chmod(0o755)
    (here / 'train.py').symlink_to(train.__file__)
    environment = {name: value for name, value in os.environ.items() if name != 'WANDB_MODE'} | dict(
        PATH=f'{here}/bin:{Path(sys.executable).parent}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='localhost',
        SLURM_JOB_ID=job_id, OMP_NUM_THREADS='1', USER='student')
    settings = TINY | dict(out_dir='out/a', max_iters=400, eval_interval=20, log_interval=2)
    job = ['bash', 'config/scitas.sbatch', *(f'--{name}={value}' for name, value in settings.items())]
    process = subprocess.Popen(job, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(3000):
        if Path('out/a/ckpt_last.pt').exists():
            break
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=60)
    step = read('out/a')['step']
    assert process.returncode == 0 and Path('requeued').read_text() == f'{job_id}\n', printed
    assert f'stopped by signal after step {step}' in printed[0] and 20 <= step < 400
    done = subprocess.run([*job, f'--max_iters={step + 2}'], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f'{step + 2} steps' in done.stdout, done.stderr[-500:]
    assert subprocess.run(['bash', 'config/scitas.sbatch'], capture_output=True).returncode == 2


# ---------------------------------------------------------------------------------------------------------------------
# Data that one process makes and all need

def make_data(code, queue, seconds=0.5):
    """A process that needs data/toy: the script takes half a second and ends with this exit code. What became of it."""
    def script(words):
        with open('calls', 'a') as file:
            file.write(f'{words[-1]}\n')
        time.sleep(seconds)
        if not code:
            Path('data/toy').mkdir()
            Path('data/toy/meta.json').touch()
        return SimpleNamespace(returncode=code)
    processes.subprocess = SimpleNamespace(run=script)
    try:
        processes.make_once('toy', Path('data/toy/meta.json'))
        queue.put('made')
    except UserError as error:
        queue.put(str(error))


@pytest.mark.parametrize('code', [0, 3])
def test_no_process_waits_for_data_that_another_failed_to_make(tmp_path, monkeypatch, code, capfd):
    """Three processes that nobody supervises, as under srun: one makes the data and the others take them; if it fails, each says
    so. They used to wait for ever for what process 0 had not made."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    started = []
    for rank in range(3):
        monkeypatch.setenv('RANK', str(rank))
        started.append(context.Process(target=make_data, args=(code, queue)))
        started[-1].start()
    for process in started:
        process.join(20)
        assert process.exitcode == 0
    calls = Path('calls').read_text().splitlines()
    found = {queue.get(timeout=5) for _ in started}
    assert (calls, found) == ((['prepare.toy'], {'made'}) if code == 0 else
                              (['prepare.toy'] * 3, {'python -m prepare.toy failed: see its message above'}))


def test_who_waits_says_for_what(tmp_path, capsys):
    """Where locks are only files, that of a process that died on another node stays."""
    ready, released = threading.Event(), []

    def other():
        with processes.FileLock(tmp_path / 'x.lock'):
            ready.set()
            time.sleep(1.5)
            released.append(True)
    threading.Thread(target=other).start()
    ready.wait()
    with processes.waiting(tmp_path / 'x.lock'):
        assert released
    assert f'waiting for the process that holds {tmp_path}/x.lock (if it died on another node, delete' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['data', 'data/x', 'data/x/train'])
@pytest.mark.parametrize('make', [Path.touch, lambda path: path.symlink_to('/nowhere/at/all')])
def test_something_else_in_the_place_of_a_folder(tmp_path, monkeypatch, name, make):
    """For a data set, its script and its arrays."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    calls = [lambda: processes.make_once('x', Path('data/x/meta.json'))] * (name == 'data') + [
        lambda: arrays.write('data/x/train', {'a': np.arange(3)})]
    for call in calls:
        with pytest.raises(UserError, match=f'^{name} is a file or a link to nothing: remove it, or '):
            call()
    files.release('data/x')


def test_a_lock_file_of_another_user(tmp_path, monkeypatch):
    def forbid(path):
        raise PermissionError(13, 'Permission denied', path)
    monkeypatch.setattr(processes, 'FileLock', forbid)
    for call in (lambda: arrays.begin(tmp_path / 'x'), lambda: processes.make_once('x', tmp_path / 'x/meta.json'),
                 lambda: runs.lock(tmp_path / 'x')):
        with pytest.raises(UserError, match='lock cannot be written .Permission denied.: ask its owner for permission, or '):
            call()


def test_a_script_that_makes_something_else_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes.subprocess, 'run', lambda words: SimpleNamespace(returncode=0))
    with pytest.raises(UserError, match="python -m prepare.toy does not make data/toy/meta.json: is 'toy' what you meant"):
        processes.make_once('toy', Path('data/toy/meta.json'))


def test_a_script_ends_with_the_program_that_waits_for_it(tmp_path, monkeypatch):
    """After `kill PID`. Without this the script would make the data alone, and keep the cores."""
    monkeypatch.chdir(tmp_path)
    code = 'import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(5); open("alone", "w")'
    run, received = subprocess.run, []
    monkeypatch.setattr(processes.subprocess, 'run', lambda words: run([sys.executable, '-c', code]))
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with pytest.raises(SystemExit) as end:
            processes.make_once('toy', Path('data/toy/meta.json'))
        signal.raise_signal(signal.SIGTERM)  # the former handler is back
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143 and received == [1] and not Path('alone').exists()


def test_alone():
    """Without a process group everything is one process's."""
    assert processes.is_main() and processes.any_of([1], torch.device('cpu')) and not processes.any_of([], torch.device('cpu'))
    model = torch.nn.Linear(1, 1)
    assert processes.replicate(model, sharded=False) is model and processes.barrier() is None


@pytest.mark.parametrize('changes, message', [
    (dict(RANK='abc'), "RANK=abc, .*: invalid literal"), (dict(MASTER_PORT='99999'), 'MASTER_PORT=99999: port must have value'),
    (dict(), 'the processes cannot meet with RANK=0, .*address already in use')])
def test_processes_that_cannot_meet(monkeypatch, changes, message):
    with socket.socket() as other:
        other.bind(('localhost', 0))
        other.listen()
        environment = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT=str(other.getsockname()[1]))
        for name, value in (environment | changes).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message) as error:
            processes.join(torch.device('cpu'), None)
    assert '\n' not in str(error.value)
