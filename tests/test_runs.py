"""A run's folder and its life: the lock, the run that continues, room on the disk, signals, the log."""
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from config import UserError
from engine import runs
from tests.tiny import lines, read, run


def test_what_a_killed_run_logged_is_done_again(tmp_path):
    log = tmp_path / 'log.jsonl'
    log.write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"st')
    runs.trim_log(log, 3)
    assert log.read_text() == '{"step": 0}\n{"step": 3}\n'
    runs.trim_log(log, -1)  # it had no checkpoint yet
    assert log.read_text() == ''


def test_the_folder_of_a_run():
    settings = dict(out_dir='', model='gpt')
    assert runs.folder_of(settings, ()) == Path('out/gpt')
    assert runs.folder_of(settings, (Path('config/nano4m.py'), 'config/mine.py', '--seed=3')) == Path('out/mine')
    assert runs.folder_of(settings | dict(out_dir='there'), ('config/mine.py',)) == Path('there')


def test_one_run_a_folder(here):
    with runs.lock(Path('out/a')):
        with pytest.raises(UserError, match='out/a: another process is training there'):
            run('out/a')
    run('out/a', max_iters=1)
    assert not runs.lock(Path('out/a')).lock.release()  # released at the end of the run


def test_what_was_started_again_goes_on(here, monkeypatch):
    """A job that began with init_from=scratch continues when SLURM or torchrun restarts it."""
    run('out/a', max_iters=2, init_from='scratch')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    run('out/a', max_iters=3, init_from='scratch')
    assert [line['step'] for line in lines('out/a') if 'train_loss' in line] == [1, 2, 3] and not Path('out/a.1').exists()


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


def test_the_newest_are_kept(tmp_path):
    names = ['ckpt_999999.pt', 'ckpt_1000000.pt', 'ckpt_1000001.pt', 'ckpt_last.pt', 'ckpt_best.pt']
    for name in names:
        (tmp_path / name).touch()
    runs.prune(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 5
    runs.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_disk_that_is_nearly_full(here, monkeypatch):
    monkeypatch.setattr(runs.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(UserError, match='out/a: less than 0.0 GB free, which checkpoints may need'):
        run('out/a')


def test_nothing_left_to_do():
    def left(**changes):
        state = type('State', (), dict(step=3, best=2.0) | {k: v for k, v in changes.items() if k in ('step', 'best')})
        return runs.finished(Path('out/a'), dict(max_iters=6, target_loss=0.0) | changes, state)
    assert not left() and not left(target_loss=1.0)
    assert 'out/a: finished at step 6, best val_loss 2.0000; raise max_iters to continue' in left(step=6)
    assert 'lower target_loss to continue' in left(target_loss=2.5)
    assert 'raise max_iters and lower target_loss to continue' in left(step=6, target_loss=2.5)


def test_two_signals_end_it_at_once(monkeypatch):
    with contextlib.ExitStack() as stack:
        asked = runs.listen(stack)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's copy of the first
        assert asked == [signal.SIGTERM] * 2
        monkeypatch.setattr(runs, 'time', type('Later', (), dict(monotonic=staticmethod(lambda: time.monotonic() + 3))))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
