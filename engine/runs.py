"""
A run folder and the life of a run: lock, checkpoint to resume from, signals, log.
"""
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from config import UserError
from engine import checkpoints, optimizers, processes
from engine.processes import is_main


# ---------------------------------------------------------------------------------------------------------------------
# The folder

def folder_of(settings, arguments):
    """out_dir; if it is '', out/NAME of the last config file, or of the model."""
    names = [Path(argument).stem for argument in map(str, arguments) if not argument.startswith('--')]
    return Path(settings['out_dir'] or f'out/{(names or [settings["model"]])[-1]}')


def lock(out_dir):
    """The lock of a run folder. The system releases it when the process ends, also after a crash. Raises UserError."""
    try:
        return processes.acquire(out_dir / 'lock', 0, 'choose another --out_dir=')
    except Timeout:
        srun = 'RANK' not in os.environ and os.environ.get('SLURM_NTASKS', '1') != '1'
        raise UserError(f'{out_dir}: another process is training there; wait for it, or choose another --out_dir='
                        f' (if it died on another node, delete {out_dir}/lock)'
                        + '. Under srun each process needs RANK, LOCAL_RANK, WORLD_SIZE: config/scitas.sbatch' * srun)


def restarted(out_dir):
    """Whether SLURM or torchrun has started this job again and the run in out_dir is its own: it continues, also if
    init_from is 'scratch'."""
    if all(os.environ.get(f'{who}_RESTART_COUNT', '0') == '0' for who in ('TORCHELASTIC', 'SLURM')):
        return False
    checkpoint = checkpoints.read_newest(out_dir)[1]
    return not checkpoint or checkpoint.get('job', '') == processes.job()


def sources_of(settings, out_dir):
    """{part of the model: checkpoint whose sizes it has}: those that init_from names or, if the run has begun, its own,
    so that the same command, or init_from='resume', resumes it when its sources have changed or are gone."""
    own = None if settings['init_from'] == 'scratch' else checkpoints.read_newest(out_dir)[1]
    names = own['settings']['init_from'] if own and settings['init_from'] == 'resume' else settings['init_from']
    if names in ('resume', 'scratch'):
        return {}
    return {'own': {'model_config': own['model_config']}} if own else checkpoints.read_sources(names)


def enter(out_dir, settings, free, stack):
    """The checkpoint from which the run in out_dir continues, or None for a new run. Process 0 locks the folder until
    `stack` closes. A folder with a checkpoint never gets a new run unless init_from is 'scratch', which moves it
    aside. Settings outside `free` must be those of the checkpoint. Raises UserError."""
    scratch = settings['init_from'] == 'scratch' and not restarted(out_dir)
    processes.barrier()  # all have read
    if scratch and any(out_dir.glob('ckpt_*.pt')) and is_main():
        aside = next(path for i in range(1, 10 ** 6) if not (path := Path(f'{out_dir}.{i}')).exists())
        try:
            with lock(out_dir):
                pass  # no process trains there; Windows does not rename a folder with an open file
            out_dir.rename(aside)
        except OSError as error:
            raise UserError(f'{out_dir}: cannot be moved aside ({error.strerror}); choose another --out_dir=')
        print(f'{out_dir} held another run: moved to {aside}'
              + f', a link; the new {out_dir} is a folder beside it' * aside.is_symlink())
    if is_main():
        stack.enter_context(lock(out_dir))
    processes.barrier()
    if scratch:
        return None
    path, checkpoint = checkpoints.read_newest(out_dir)
    if not processes.same(checkpoint and checkpoint['step']):
        raise UserError(f'{out_dir}: the processes find different checkpoints; choose an --out_dir= on a file system '
                        'that all nodes share')
    if not checkpoint:
        return None
    if path.name != 'ckpt_last.pt' and is_main():
        print(f'{out_dir}/ckpt_last.pt is damaged or missing: continuing from {path}, step {checkpoint["step"]}')
    before, source = checkpoint['settings'], settings['init_from']
    if source not in ('resume', 'scratch', before['init_from']):
        raise UserError(f'{out_dir} holds a run with init_from={before["init_from"]!r}, not {source!r}: name '
                        'the former to continue it, or choose another --out_dir=')
    if source == 'resume' and before['init_from'] != 'scratch':
        settings['init_from'] = before['init_from']  # kept in its checkpoints
    if changed := [name for name in settings if name not in free and settings[name] != before.get(name)]:
        differences = ', '.join(f'{name}={before.get(name)!r}, not {settings[name]!r}' for name in changed[:3])
        raise UserError(f'{out_dir} holds a run with {differences}: choose another --out_dir=, or --init_from=scratch '
                        'moves it aside')
    if (message := new_rates(before, settings, checkpoint['step'])) and is_main():
        print(message)
    evaluated, now = (each['eval_iters'] * each['micro_batch_size'] for each in (before, settings))
    if evaluated != now and checkpoint['step'] < settings['max_iters']:
        checkpoint['best'] = math.inf
        if is_main():
            print(f'eval_iters x micro_batch_size is {now}, not {evaluated} as before: val_loss is a mean over other '
                  'samples, and the next evaluation counts as the best so far')
    return checkpoint


def save_weights(out_dir, checkpoint):
    """Downloaded weights as a run of step 0, in place of none or of such a run. Raises UserError."""
    path = out_dir / 'ckpt_last.pt'
    with lock(out_dir):
        with suppress(checkpoints.Damaged):
            if path.is_file() and checkpoints.read(path)['settings'] != checkpoint['settings']:
                raise UserError(f'{out_dir} holds another run: choose another --out=')
        checkpoints.save(path, checkpoint)


def check_room(out_dir, model):
    """Raises UserError if the disk lacks room for three checkpoints of 16 bytes per parameter (weights, moments, EMA),
    less those that they replace."""
    replaced = sum(path.stat().st_size for path in map(out_dir.joinpath, ('ckpt_best.pt', 'ckpt_last.pt'))
                   if path.is_file())
    needed = 48 * sum(p.numel() for p in model.parameters()) - replaced
    if is_main() and shutil.disk_usage(out_dir).free < needed:
        raise UserError(f'{out_dir}: less than {needed / 1e6:,.1f} MB free, which checkpoints may need: free disk '
                        'space')


def prune(out_dir, keep, step):
    """Deletes all checkpoints ckpt_STEP.pt except the newest `keep`, no copies of other names; none if keep is 0. Those
    after `step` go first: the run went back to an earlier checkpoint."""
    steps = {int(path.stem[5:]): path for path in out_dir.glob('ckpt_*.pt') if re.fullmatch(r'ckpt_\d{6,}', path.stem)}
    if is_main() and keep:
        for other in sorted(steps, key=lambda other: (other <= step, other))[:-keep]:
            with suppress(OSError):  # on Windows, while another program reads it: the next evaluation tries again
                steps[other].unlink()


def finished(out_dir, settings, state):
    """A message if nothing is left to do, otherwise a false value."""
    all_steps, reached = state.step >= settings['max_iters'], state.best <= settings['target_loss'] > 0
    todo = ' and '.join(['raise max_iters'] * all_steps + ['lower target_loss'] * reached)
    rates = ' (learning rates then rise again: the schedule becomes longer)' * all_steps
    return todo and (f'{out_dir}: finished at step {state.step}, best val_loss {state.best:.4f}; {todo} to continue'
                     f'{rates}, or --init_from=scratch to start again')


def new_rates(before, settings, step):
    """A message if another max_iters changes the learning rates after `step`, otherwise a false value."""
    if step >= settings['max_iters']:
        return ''
    was, same, now = (optimizers.lr_factor(i, each)
                      for i, each in ((step - 1, before), (step - 1, settings), (step, settings)))
    return abs(was - same) > 0.005 and (
        f'max_iters={settings["max_iters"]}, not {before["max_iters"]} as before, changes the schedule: the learning '
        f'rates, {was:.0%} of their peak at the last step, continue at {now:.0%}')


# ---------------------------------------------------------------------------------------------------------------------
# Signals and the terminal

class Unfailing:
    """A text stream whose failures are ignored. A run outlives its terminal, and `tee` in a pipe, which Ctrl-C ends."""
    FAILURES = OSError, ValueError, AttributeError  # of a device, of a stream that is closed, of None

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(*self.FAILURES):
            self.stream.write(text)

    def flush(self):
        with suppress(*self.FAILURES):
            self.stream.flush()


def keep_printing(stack):
    """Ignores all failures of standard output and standard error until `stack` closes."""
    stack.enter_context(redirect_stdout(Unfailing(sys.stdout)))
    stack.enter_context(redirect_stderr(Unfailing(sys.stderr)))


def listen(received, stack):
    """From here until `stack` closes, the list `received` gets the number of each signal that asks this process to
    stop; the run then saves and stops. A second signal ends it at once, unless it comes within two seconds: torchrun
    sends a Ctrl-C again that the process already has, a shell the SIGHUP of a closed terminal."""
    times = []

    def handler(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            raise KeyboardInterrupt
        if not received and is_main():
            with suppress(OSError):  # print is not reentrant
                os.write(2, b'\nstopping at the next line of the log; once more stops at once\n')
        received.append(number)
    if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has two of them
            if number is None or name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN:  # nohup ignores it
                continue
            stack.callback(signal.signal, number, signal.signal(number, handler))


# ---------------------------------------------------------------------------------------------------------------------
# The log

def log_lines(path):
    """[(bytes, entry)] of the complete lines of a log.jsonl; the entry of a blank or damaged line is None."""
    lines = []
    for line in path.read_bytes().splitlines(True):
        try:
            entry = json.loads(line)
            entry = entry if entry['step'] >= 0 else None
        except (ValueError, TypeError, KeyError):
            entry = None
        lines += [(line, entry)] * line.endswith(b'\n')
    return lines


def trim_log(path, step):
    """Removes the lines after `step`: a killed run logged them after its last checkpoint, and the resumed run will
    again."""
    if path.exists() and is_main():
        lines = log_lines(path)
        later = [i for i, (_, entry) in enumerate(lines) if entry and entry['step'] > step]
        kept = lines[:min(later, default=len(lines))]
        os.truncate(path, sum(len(line) for line, _ in kept))  # in place: a kill here loses nothing


def finite(line):
    """A line of the log without nan and inf, which JSON lacks: None is in their place."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()}


def name_offline_parts(folder, wandb_id):
    """Prints how to upload a run of Weights & Biases that was resumed offline: each part has a folder of its own."""
    parts = sorted(map(str, folder.glob(f'offline-run-*-{wandb_id}')))
    if len(parts) > 1:
        print(f'all {len(parts)} parts of this run: wandb sync {" ".join(parts)}')


def open_log(out_dir, settings, state, stack):
    """A function log(line) that appends a line to log.jsonl and, if wandb_log is set, sends it to Weights & Biases;
    in process 0."""
    path = out_dir / 'log.jsonl'
    trim_log(path, state.step or -1)
    if settings['wandb_log'] and is_main():
        try:
            import wandb
            wandb_run = wandb.init(project='nanofm', name=out_dir.name, config=settings, id=state.wandb_id,
                                   resume='allow')
        except Exception as error:  # not installed, not logged in, no connection
            raise UserError('wandb_log=True: Weights & Biases does not start (' + str(error).partition('\n')[0] + '): '
                            'pip install wandb, then wandb login, or set WANDB_MODE=offline, or leave wandb_log out')
        state.wandb_id = wandb_run.id
        stack.callback(name_offline_parts, Path(wandb_run.dir).parent.parent, wandb_run.id)
        stack.callback(wandb.finish)  # before it: offline, prints how to upload the last part later

    unwritten = bytearray()  # what the file does not have yet, as on a full disk

    def log(line):
        if is_main():
            late = bool(unwritten)
            unwritten.extend(json.dumps(finite(line), allow_nan=False).encode() + b'\n')
            try:
                with open(path, 'ab', buffering=0) as file:
                    del unwritten[:file.write(unwritten)]
            except OSError as error:
                if not late:
                    tqdm.write(f'{path} cannot be written ({error.strerror}): training continues, and each line of the '
                               'log tries again; free disk space, or close a program that has the file open')
            if settings['wandb_log']:
                wandb.log(line, step=line['step'])
    return log
