"""
A run's folder and its life: the lock, the checkpoint to continue from, signals, the log.
"""
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from config import UserError
from engine import checkpoints, processes
from engine.processes import is_main


# ---------------------------------------------------------------------------------------------------------------------
# The folder

def folder_of(settings, arguments):
    """out_dir, or out/NAME of the last config file, or of the model."""
    named = [Path(argument).stem for argument in map(str, arguments) if not argument.startswith('--')]
    return Path(settings['out_dir'] or f'out/{(named or [settings["model"]])[-1]}')


def lock(out_dir):
    """Held while a run writes into its folder, and released by the system however the process ends."""
    out_dir.mkdir(parents=True, exist_ok=True)
    held = FileLock(out_dir / 'lock')
    try:
        return held.acquire(timeout=0)
    except Timeout:
        raise UserError(f'{out_dir}: another process is training there; wait for it, or choose another --out_dir=')


def enter(out_dir, settings, free, stack):
    """The checkpoint of the run in out_dir, which continues, or None; process 0 locks the folder until `stack` ends. All settings but
    those in `free` have to be those of before. Raises UserError."""
    last = out_dir / 'ckpt_last.pt'
    again = any(os.environ.get(f'{who}_RESTART_COUNT', '0') != '0' for who in ('TORCHELASTIC', 'SLURM'))
    scratch = settings['init_from'] == 'scratch' and not again  # a run that torchrun or SLURM has restarted continues
    if scratch and last.exists() and is_main():
        aside = next(path for i in range(1, 10 ** 6) if not (path := Path(f'{out_dir}.{i}')).exists())
        with lock(out_dir):
            out_dir.rename(aside)
        print(f'{out_dir} held another run: moved to {aside}')
    if is_main():
        stack.enter_context(lock(out_dir))
    processes.barrier()
    if scratch or not last.exists():
        return None
    checkpoint = checkpoints.read(last)
    before = checkpoint['settings']
    if changed := [name for name in settings if name not in free and settings[name] != before.get(name)]:
        differ = ', '.join(f'{name}={before.get(name)!r}, not {settings[name]!r}' for name in changed[:3])
        raise UserError(f'{out_dir} holds a run with {differ}: choose another --out_dir=, or --init_from=scratch moves it aside')
    return checkpoint


def check_room(out_dir, model):
    """Raises UserError if the disk lacks room for checkpoints: weights, moments and EMA are 16 bytes a parameter, three times."""
    needed = 48 * sum(p.numel() for p in model.parameters())
    if is_main() and shutil.disk_usage(out_dir).free < needed:
        raise UserError(f'{out_dir}: less than {needed / 1e9:.1f} GB free, which its checkpoints may need: make room')


def prune(out_dir, keep):
    """Leaves the newest `keep` of the numbered checkpoints; all of them if keep is 0."""
    if is_main() and keep:
        for old in sorted(out_dir.glob('ckpt_[0-9]*.pt'), key=lambda path: (len(path.name), path))[:-keep]:
            old.unlink(missing_ok=True)


def finished(out_dir, settings, state):
    """A line that says so if there is nothing left to do, otherwise ''."""
    all_steps, reached = state.step >= settings['max_iters'], state.best <= settings['target_loss'] > 0
    todo = ['raise max_iters'] * all_steps + ['lower target_loss'] * reached
    return todo and (f'{out_dir}: finished at step {state.step}, best val_loss {state.best:.4f}; {" and ".join(todo)} to go on, or '
                     '--init_from=scratch to start again')


# ---------------------------------------------------------------------------------------------------------------------
# Signals

def listen(stack):
    """A list that receives the number of each signal that asks this process to stop. The run then saves and leaves; a second signal
    ends it at once, unless it comes within two seconds: torchrun repeats a Ctrl-C that the process has already had."""
    asked, times = [], []

    def note(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            raise KeyboardInterrupt
        if not asked and is_main():
            os.write(2, b'\nstopping at the next line of the log; once more stops at once\n')  # print is not reentrant
        asked.append(number)
    if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, 'SIGUSR1') else [])):
            stack.callback(signal.signal, number, signal.signal(number, note))
    return asked


# ---------------------------------------------------------------------------------------------------------------------
# The log

def trim_log(path, step):
    """Cuts off the lines of later steps, which a killed run did after its last checkpoint: they are done again."""
    if path.exists() and is_main():
        kept = [line for line in path.read_bytes().splitlines(True) if line.endswith(b'\n') and json.loads(line)['step'] <= step]
        os.truncate(path, sum(map(len, kept)))  # in place: a kill here loses nothing


def open_log(out_dir, settings, state, stack):
    """log(line): appends a line to log.jsonl and sends it to Weights & Biases if asked; in process 0 alone."""
    path = out_dir / 'log.jsonl'
    trim_log(path, state.step or -1)
    if settings['wandb_log'] and is_main():
        import wandb
        state.wandb_id = wandb.init(project='nanofm', name=out_dir.name, config=settings, id=state.wandb_id, resume='allow').id
        stack.callback(wandb.finish)  # offline it says how to send the run later

    def log(line):
        if is_main():
            with open(path, 'a') as file:
                file.write(json.dumps(line) + '\n')
            if settings['wandb_log']:
                wandb.log(line, step=line['step'])
    return log
