"""A run's folder and its life: the lock, the run that continues, room on the disk, signals, the log."""
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from config import UserError
from engine import processes, runs
from tests.tiny import GPT, TINY, lines, losses, read, run, save_data


def test_what_a_killed_run_logged_is_done_again(tmp_path):
    log = tmp_path / 'log.jsonl'
    log.write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"st')
    runs.trim_log(log, 3)
    assert log.read_text() == '{"step": 0}\n{"step": 3}\n'
    runs.trim_log(log, -1)  # it had no checkpoint yet
    assert log.read_text() == ''


def test_a_damaged_line_of_the_log_ends_no_run(here):
    """Blank, or broken by a power cut: it stays where it is, and the run continues."""
    run('out/a', max_iters=3)
    log = Path('out/a/log.jsonl')
    first, *rest = log.read_bytes().splitlines(True)
    log.write_bytes(b''.join([first, b'\n', b'\0\0\n', *rest, b'{"step": 2}\n{"step": 4}\n\n']))
    run('out/a', max_iters=4)
    found = log.read_bytes().splitlines(True)
    assert found[:-2] == [first, b'\n', b'\0\0\n', *rest, b'{"step": 2}\n'] and b'val_loss' in found[-1]


def test_the_log_is_json(tmp_path):
    """JSON has no nan and no inf: null."""
    with contextlib.ExitStack() as stack:
        runs.open_log(tmp_path, dict(wandb_log=False), SimpleNamespace(step=0), stack)(
            dict(step=1, val_loss=math.nan, grad_norm=-math.inf, lr=0.5, samples=[3]))
    assert (tmp_path / 'log.jsonl').read_text() == (
        '{"step": 1, "val_loss": null, "grad_norm": null, "lr": 0.5, "samples": [3]}\n')


def test_a_log_that_cannot_be_written(tmp_path, capsys):
    """Its lines are kept and written later; one message for a series of faults."""
    with contextlib.ExitStack() as stack:
        log = runs.open_log(tmp_path / 'a', dict(wandb_log=False), SimpleNamespace(step=0), stack)
        for step in range(4):
            if step == 2:
                (tmp_path / 'a').mkdir()
            log(dict(step=step))
    assert (tmp_path / 'a/log.jsonl').read_text() == ''.join(f'{{"step": {step}}}\n' for step in range(4))
    assert capsys.readouterr().out == (
        f'{tmp_path}/a/log.jsonl cannot be written (No such file or directory): training continues, and each line of the log '
        'tries again; free disk space, or close a program that has the file open\n')


@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='POSIX')
def test_a_disk_that_takes_a_part_of_a_line(tmp_path):
    """The next line begins with the rest. A limit on the size of files is like a full disk."""
    import resource
    old, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGXFSZ, before)
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, old)
        log = runs.open_log(tmp_path, dict(wandb_log=False), SimpleNamespace(step=0), stack)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
        log(dict(step=0))
        log(dict(step=1))
        assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0}\n{"step":'
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        log(dict(step=2))
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_the_folder_of_a_run():
    settings = dict(out_dir='', model='gpt')
    assert runs.folder_of(settings, ()) == Path('out/gpt')
    assert runs.folder_of(settings, (Path('config/nano4m.py'), 'config/mine.py', '--seed=3')) == Path('out/mine')
    assert runs.folder_of(settings | dict(out_dir='there'), ('config/mine.py',)) == Path('there')


def test_a_link_to_nothing(here):
    Path('out').mkdir(exist_ok=True)
    Path('out/gone').symlink_to('/nowhere/at/all')
    with pytest.raises(UserError, match='out/gone is a file or a link to nothing: remove it, or choose another --out_dir='):
        run('out/gone')


def test_one_run_a_folder(here, monkeypatch):
    with runs.lock(Path('out/a')):
        with pytest.raises(UserError, match='out/a: another process is training there.*choose another --out_dir= .if it died on another node, delete out/a/lock.$'):
            run('out/a')
        monkeypatch.setenv('SLURM_NTASKS', '2')
        with pytest.raises(UserError, match='Under srun each process needs RANK'):
            run('out/a')
    run('out/a', max_iters=1)
    assert not runs.lock(Path('out/a')).lock.release()  # released at the end of the run


def test_what_was_started_again_goes_on(here, monkeypatch):
    """A job that began with init_from=scratch continues when SLURM or torchrun restarts it."""
    run('out/a', max_iters=2, init_from='scratch')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    run('out/a', max_iters=3, init_from='scratch')
    assert [line['step'] for line in lines('out/a') if 'train_loss' in line] == [1, 2, 3] and not Path('out/a.1').exists()


def test_nodes_without_a_common_folder(here, monkeypatch):
    """Process 0 finds a checkpoint of step 1, the other process none."""
    def gather(values, value):
        values[:] = value, None
    run('out/a', max_iters=1)
    monkeypatch.setattr(processes, 'dist', SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2, barrier=lambda: 0, all_gather_object=gather))
    settings = read('out/a')['settings'] | dict(init_from='resume')
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match='on a file system that all nodes share'):
        runs.enter(Path('out/a'), settings, (), stack)


def test_weights_replace_no_other_run(here):
    run('out/a', max_iters=1)
    weights = read('out/a') | dict(step=0)
    runs.save_weights(Path('out/a'), weights)
    weights['settings'] = dict(model='vlm', dataset='siglip')
    with pytest.raises(UserError, match='out/a holds another run: choose another --out='):
        runs.save_weights(Path('out/a'), weights)
    Path('out/a/ckpt_last.pt').write_bytes(b'damaged')
    runs.save_weights(Path('out/a'), weights)
    assert read('out/a')['settings']['dataset'] == 'siglip'
    with runs.lock(Path('out/a')), pytest.raises(UserError, match='out/a: another process'):
        runs.save_weights(Path('out/a'), weights)


@pytest.fixture
def toy_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    save_data(Path('data/toy'), 'stream', random.integers(0, 9, 500), random.integers(0, 9, 100), config=dict(vocab_size=9))


def test_the_same_command_continues_a_fine_tuned_run(toy_data, capsys):
    """Also if its source is gone, also after init_from was left out; but a run that began otherwise is not continued in its
    name, nor one of another model."""
    sizes = {name: value for name, value in GPT.items() if name not in ('n_layer', 'n_head', 'n_embd', 'block_size', 'max_iters')}
    train.main(**GPT, out_dir='out/source')
    train.main(**sizes, init_from='out/source', out_dir='out/tuned', max_iters=1)
    Path('out/source').rename('out/moved')
    train.main(**sizes, init_from='out/source', out_dir='out/tuned', max_iters=2)
    train.main(**GPT | dict(max_iters=3), vocab_size=9, out_dir='out/tuned')
    train.main(**sizes, init_from='out/source', out_dir='out/tuned', max_iters=4)
    assert read('out/tuned')['step'] == 4 and read('out/tuned')['settings']['init_from'] == 'out/source'
    with pytest.raises(UserError, match="out/moved holds a run with init_from='resume', not 'out/tuned': name the former to continue it"):
        train.main(**sizes, init_from='out/tuned', out_dir='out/moved', max_iters=6)
    capsys.readouterr()
    train.main(**GPT | dict(max_iters=1), vocab_size=9, out_dir='out/tuned')  # fewer steps than it has made
    assert 'finished at step 4' in (said := capsys.readouterr().out) and 'learning rates, ' not in said


def test_a_restarted_job_continues_its_own_run_alone(toy_data, monkeypatch, capsys):
    monkeypatch.setenv('SLURM_JOB_ID', '1')
    train.main(**GPT, out_dir='out/a')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    train.main(**GPT | dict(max_iters=4), out_dir='out/a', init_from='scratch')
    assert read('out/a')['step'] == 4 and not Path('out/a.1').exists()
    monkeypatch.setenv('SLURM_JOB_ID', '2')
    train.main(**GPT, out_dir='out/a', init_from='scratch')
    assert 'out/a held another run: moved to out/a.1' in capsys.readouterr().out and read('out/a')['step'] == 3


def test_the_folder_itself_cannot_be_moved_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('ckpt_last.pt').touch()
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=r'^\.: cannot be moved aside .*another --out_dir=$'):
        runs.enter(Path('.'), dict(init_from='scratch'), (), stack)


def test_the_newest_are_kept(tmp_path):
    names = ['ckpt_999999.pt', 'ckpt_1000000.pt', 'ckpt_1000001.pt', 'ckpt_last.pt', 'ckpt_best.pt', 'ckpt_3.pt', 'ckpt_1000002_good.pt']
    for name in names:
        (tmp_path / name).touch()
    runs.prune(tmp_path, 0, 1000001)
    assert len(list(tmp_path.iterdir())) == 7
    runs.prune(tmp_path, 2, 1000001)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    runs.prune(tmp_path, 1, 1000000)  # the run went back to an earlier checkpoint
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:]} - {'ckpt_1000001.pt'}


def test_an_old_checkpoint_that_another_program_reads(tmp_path, monkeypatch):
    """Windows does not delete it then."""
    def forbid(path, missing_ok=False):
        raise PermissionError(13, 'The process cannot access the file', path)
    for step in (1, 2):
        (tmp_path / f'ckpt_{step:06d}.pt').touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', forbid)
        runs.prune(tmp_path, 1, 2)
    runs.prune(tmp_path, 1, 2)  # at the next evaluation
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt_000002.pt']


def test_a_disk_that_is_nearly_full(here, monkeypatch):
    """A resumed run replaces two of the three checkpoints."""
    model, usage = torch.nn.Linear(1000, 1000, bias=False), SimpleNamespace(free=10 ** 7)
    monkeypatch.setattr(runs.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(UserError, match='out/a: less than 48.0 MB free, which checkpoints may need'):
        runs.check_room(Path('out/a'), model)
    Path('out/a').mkdir(parents=True)
    for name in ('ckpt_last.pt', 'ckpt_best.pt', 'ckpt_fault.pt'):
        Path('out/a', name).write_bytes(bytes(16 * 10 ** 6))
    with pytest.raises(UserError, match='out/a: less than 16.0 MB free'):
        runs.check_room(Path('out/a'), model)
    usage.free = 17 * 10 ** 6
    runs.check_room(Path('out/a'), model)


def test_nothing_left_to_do():
    def left(**changes):
        state = type('State', (), dict(step=3, best=2.0) | {k: v for k, v in changes.items() if k in ('step', 'best')})
        return runs.finished(Path('out/a'), dict(max_iters=6, target_loss=0.0) | changes, state)
    assert not left() and not left(target_loss=1.0)
    assert left(step=6) == ('out/a: finished at step 6, best val_loss 2.0000; raise max_iters to continue (learning rates then rise '
                            'again: the schedule becomes longer), or --init_from=scratch to start again')
    assert 'lower target_loss to continue' in left(target_loss=2.5)
    assert 'raise max_iters and lower target_loss to continue' in left(step=6, target_loss=2.5)


def test_another_number_of_steps_changes_the_learning_rates(here, capsys):
    """decay=0.6: at the last of 6 steps 1 is left of the 3.6 in which they fall; of 12 steps, 6 of 7.2."""
    run('out/a', warmup_iters=1)
    run('out/a', warmup_iters=1)  # finished
    assert 'changes the schedule' not in capsys.readouterr().out
    run('out/a', warmup_iters=1, max_iters=12)
    assert ('max_iters=12, not 6 as before, changes the schedule: the learning rates, 28% of their '
            'peak at the last step, continue at 83%\n'
            in capsys.readouterr().out)
    run('out/b', warmup_iters=1, decay=1e-9, max_iters=3)  # no decay, no change
    run('out/b', warmup_iters=1, decay=1e-9, max_iters=3, eval_iters=1)
    run('out/b', warmup_iters=1, decay=1e-9, max_iters=4)
    assert 'changes the schedule' not in capsys.readouterr().out


def test_losses_over_other_samples_are_not_compared(here, capsys):
    """Of two evaluations, 2 x 4 and 1 x 2 samples, the later one is the best; the same samples in other micro-batches go on."""
    def best(**changes):
        run('out/a', learning_rate=0.0, muon_learning_rate=0.0, warmup_iters=1, decay=1e-9, **changes)
        return read('out/a')['best'], 'over other samples, and the next' in capsys.readouterr().out
    first = best(max_iters=3)[0]
    assert best(max_iters=4, eval_iters=1, micro_batch_size=8) == (min(first, losses('out/a', 'val_loss')[-1]), False)
    assert best(max_iters=4, eval_iters=1, micro_batch_size=2)[1] is False  # finished: nothing is evaluated
    assert best(max_iters=5, eval_iters=1, micro_batch_size=2) == (losses('out/a', 'val_loss')[-1], True)


def test_weights_and_biases_that_does_not_start(here, monkeypatch):
    """Not installed, or not logged in."""
    def init(**arguments):
        raise RuntimeError('No API key configured.\nMore lines')
    for module, message in ((None, 'import of wandb halted'), (SimpleNamespace(init=init), 'No API key configured.')):
        monkeypatch.setitem(sys.modules, 'wandb', module)
        with pytest.raises(UserError, match=f'does not start .{message}.*pip install wandb, then wandb login') as error:
            run('out/a', max_iters=2, wandb_log=True)
        assert '\n' not in str(error.value)


def test_offline_parts_of_a_run(here, monkeypatch, capsys):
    """Offline, Weights & Biases knows the last part of a run that was killed and resumed; the command names all."""
    def init(project, name, config, id, resume):
        folder = Path(f'wandb/offline-run-{len(list(Path("wandb").glob("*")))}-{id or "abc"}/files')
        folder.mkdir(parents=True)
        return SimpleNamespace(id=id or 'abc', dir=str(folder))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, log=lambda line, step: 0, finish=lambda: print('finished')))
    run('out/a', max_iters=2, wandb_log=True)
    assert 'parts of this run' not in capsys.readouterr().out
    run('out/a', max_iters=3, wandb_log=True)
    assert 'finished\nall 2 parts of this run: wandb sync wandb/offline-run-0-abc wandb/offline-run-1-abc\n' in capsys.readouterr().out


def test_two_signals_end_it_at_once(monkeypatch):
    with contextlib.ExitStack() as stack:
        asked = []
        runs.listen(asked, stack)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's copy of the first
        assert asked == [signal.SIGTERM] * 2
        monkeypatch.setattr(runs, 'time', type('Later', (), dict(monotonic=staticmethod(lambda: time.monotonic() + 3))))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def start(name, *arguments, **more):
    """A tiny run without end and without a checkpoint, in a process of its own."""
    settings = TINY | dict(out_dir=f'out/{name}', max_iters=10 ** 6, eval_interval=10 ** 6, log_interval=2)
    command = [sys.executable, train.__file__, *(f'--{name}={value}' for name, value in settings.items())]
    return subprocess.Popen([*arguments, *command], env=os.environ | {'OMP_NUM_THREADS': '1'}, **more)


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='Windows')
def test_terminals_and_pipes_that_are_closed(here):
    """SIGHUP saves and stops, though nothing can be printed any more. Under nohup it does not. Ctrl-C saves, though in
    `train.py 2>&1 | tee log.txt` it ends tee first."""
    import pty
    terminal, end = pty.openpty()
    null = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    closed = start('closed', stdin=end, stdout=end, stderr=end, start_new_session=True)
    nohup, tee = start('nohup', 'nohup', **null), start('tee', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGHUP, before)
    processes = dict(closed=closed, nohup=nohup, tee=tee)
    while any(not Path(f'out/{name}/log.jsonl').exists() or len(lines(f'out/{name}')) < 3 for name in processes):
        assert not any(process.poll() for process in processes.values())
        time.sleep(0.02)
    os.close(end), os.close(terminal), tee.stdout.close()  # from here on each output fails
    nohup.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert [process.poll() for process in processes.values()] == [None] * 3
    closed.send_signal(signal.SIGHUP), nohup.terminate(), tee.send_signal(signal.SIGINT)
    assert [process.wait(180) for process in processes.values()] == [128 + 1, 128 + 15, 128 + 2]
    assert all(read(f'out/{name}')['step'] > 2 for name in processes)
