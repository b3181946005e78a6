"""
Several processes under torchrun or srun: the process group, replicas (DDP) or shards (FSDP2) of a model, and work that
one process does for all.
"""
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import config
from config import UserError
from engine.devices import is_block


def join(device, stack):
    """Joins the process group of torchrun or srun, if there is one, until `stack` closes: (rank, number of processes).
    Raises UserError."""
    if 'RANK' in os.environ and not dist.is_initialized():
        if missing := [name for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]:
            raise UserError(f"RANK={os.environ['RANK']} is set, but not {', '.join(missing)}: unset RANK, or start "
                            'with torchrun')
        gpu = device.type == 'cuda'
        try:
            store, rank, world = next(dist.rendezvous('env://'))
        except (ValueError, RuntimeError) as error:
            names = 'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
            found, (reason, *_) = ', '.join(f'{name}={os.environ[name]}' for name in names), str(error).split('\n')
            raise UserError(f'the processes cannot meet with {found}: {reason}')
        # the prefix: after a restart, no addresses of the processes that died
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group('nccl' if gpu else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=10), device_id=device if gpu else None)
        stack.callback(dist.destroy_process_group)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def job():
    """What identifies a job of SLURM or of torchrun, also after a restart; '' for other processes."""
    return os.environ.get('SLURM_JOB_ID') or os.environ.get('TORCHELASTIC_RUN_ID', '')


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def any_of(value, device):
    """Whether the value is true in any process. A collective operation."""
    flag = torch.tensor(float(bool(value)), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def same(value):
    """Whether the value is equal in all processes. A collective operation."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values.count(value) == len(values)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def make_folder(folder, remedy):
    """Makes a folder, and those above it, unless it exists. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
        raise UserError(f'{there} is a file or a link to nothing: remove it, or {remedy}')
    except OSError as error:
        raise UserError(f'{folder} cannot be made ({error.strerror}): {remedy}')


def acquire(path, timeout, remedy):
    """Holds the lock file `path`, as a context; makes its folder. Raises Timeout after `timeout` seconds, UserError if
    the file cannot be written, as one of another user."""
    make_folder(Path(path).parent, remedy)
    try:
        return FileLock(path).acquire(timeout=timeout)
    except Timeout:  # an OSError, too
        raise
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}): ask its owner for permission, or {remedy}')


@contextmanager
def waiting(path, remedy='use a folder of your own'):
    """Holds the lock file `path`. While another process has it, this one waits, and says so."""
    try:
        held = acquire(path, 1, remedy)
    except Timeout:
        if is_main():
            print(f'waiting for the process that holds {path} (if it died on another node, delete this file)',
                  flush=True)
        held = acquire(path, -1, remedy)
    with held:
        yield


@contextmanager
def exit_on_sigterm():
    """SIGTERM raises SystemExit, so that subprocess.run ends its child, too. Only the main thread can set this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_once(name, path):
    """Runs python -m prepare.NAME if `path`, the file that it writes last, is missing. Of several processes or runs,
    one runs it and the others wait for its lock. If it fails, the next one tries, so that none waits forever. Raises
    UserError."""
    if path.is_file():
        return
    with waiting(f'{path.parent}.lock'), exit_on_sigterm():
        if path.is_file():
            return
        print(f'{path} is missing: running python -m prepare.{name}', flush=True)
        if subprocess.run([sys.executable, '-m', f'prepare.{name}']).returncode:
            raise UserError(f'python -m prepare.{name} failed: see its message above')
    if not path.is_file():
        raise UserError(f'python -m prepare.{name} does not make {path}: is {name!r} what you meant?')


def scripts(makes):
    """Names of the prepare scripts that make a data set ('data') or a run with weights ('out')."""
    return config.files_with('prepare', rf'MAKES\s*=\s*[\'"]{makes}')


def remake(folder):
    """In words, how a data folder is made again."""
    name = Path(folder).name
    return f'run python -m prepare.{name}' if name in scripts('data') else 'make it again'


# ---------------------------------------------------------------------------------------------------------------------
# The model

def place(model, device, dtype, sharded):
    """Moves a model to the device: the whole model, or the shard of this process."""
    if sharded:
        shard(model, device, dtype)
    else:
        model.to(device)


def shard(model, device, dtype):
    """FSDP2 (arXiv 2304.11277), in place: each process keeps some rows of every parameter. The parameters of a block,
    and those outside all blocks, are gathered before use and freed afterwards."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if is_block(module)]
    # a policy and not autocast, which would keep copies of unsharded matrices
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def replicate(model, sharded):
    """The module to call in training: DistributedDataParallel if there are several replicas, otherwise the model."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return DistributedDataParallel(model) if several and not sharded else model


def no_sync(model, last):
    """A context for the passes of a micro-batch: gradients are averaged over the processes in the `last` one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
