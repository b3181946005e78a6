"""
Checkpoints: self-describing files, written so that a kill at any moment loses nothing, read without executing anything.
"""
import dataclasses
import difflib
import hashlib
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import config
from config import UserError
from engine import processes

FORMAT = 2  # of a checkpoint; an older one is refused


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save(path, checkpoint):
    """Written beside its place, synced, then renamed: the file before is never lost. Raises UserError."""
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, 'O_DIRECTORY'):  # the new name, too, has to survive a power cut
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error}); the checkpoint before it is untouched. Make room or choose '
                        'another out_dir, then run the same command again')


def read(path):
    """A checkpoint as a dict: settings, meta, step, weights and all else that a run needs to continue. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes checksums, but torch.load does not look at them
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        assert {'settings', 'model_config', 'meta', 'step', 'weights'} <= checkpoint.keys()
    except FileNotFoundError:
        there = {str(file) for file in (*Path('out').glob('*/ckpt_*.pt'), *path.parent.glob('ckpt_*.pt'))}
        near = ', '.join(difflib.get_close_matches(str(path), there, 5, 0))
        raise UserError(f'{path}: no such checkpoint; ' + (f'the nearest are {near}' if near else
                        'train first, and start this in the folder of the repository, whose out/ holds the runs'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error})')
    except Exception as error:  # the unpickler fails in many ways
        raise UserError(f'{path}: damaged, truncated or not a checkpoint of this repository ({type(error).__name__}); '
                        'delete it, or use another one in its folder')
    if checkpoint.get('format') != FORMAT:
        raise UserError(f'{path}: a checkpoint of another edition of this repository (format {checkpoint.get("format", 1)}, not '
                        f'{FORMAT}): train again, with another --out_dir= or --init_from=scratch, or use the edition that wrote it')
    return checkpoint


def digest(path):
    """SHA-256 of a file's contents."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def find(name):
    """The checkpoint of the run with this name or folder; weights that prepare/NAME.py fetches are fetched on their first use."""
    path = Path(name if Path(name).is_dir() else f'out/{name}', 'ckpt_last.pt')
    if not path.is_file() and name in processes.scripts('out'):
        processes.make_once(name, path)
    return path


def load_network(path, build, what, remedy=''):
    """A small network of a data set from its file, in evaluation mode: build(saved) makes it, saved['weights'] are loaded into it.
    Raises UserError."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        network = build(saved)
        network.load_state_dict(saved['weights'])
    except Exception as error:  # the unpickler fails in many ways
        raise UserError(f'{path}: missing, truncated or not {what} ({type(error).__name__}); '
                        + (remedy or f'delete {Path(path).parent} to make it again'))
    return network.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # strict: layers that the loss does not reach have none


def gather(model, ema_model, optimizers, scaler):
    """Weights, EMA and optimizer states by parameter name, whole in the memory of process 0 and the same however many processes
    share the model; every process calls this."""
    stepped = any(optimizer.state for optimizer in optimizers)  # otherwise PyTorch would count a first step to make a state
    state = dict(scaler=scaler.state_dict(), weights=get_model_state_dict(model, options=FULL),
                 optimizers=get_optimizer_state_dict(model, optimizers, options=FULL) if stepped else {})
    return state | (dict(ema=get_model_state_dict(ema_model, options=FULL)) if ema_model is not model else {})


def scatter(checkpoint, model, ema_model, optimizers, scaler):
    """The inverse of `gather`: each process takes its share. Learning rates have to be numbers, not tensors. Raises ValueError if
    the model has other parameters."""
    if other := checkpoint['weights'].keys() ^ model.state_dict().keys():  # PyTorch passes over these
        raise ValueError(f'parameters in one of them alone: {", ".join(sorted(other)[:3])}')
    set_model_state_dict(model, checkpoint['weights'], options=FULL)
    if ema_model is not model:
        set_model_state_dict(ema_model, checkpoint['ema'], options=FULL)
    if checkpoint['optimizers']:
        set_optimizer_state_dict(model, optimizers, checkpoint['optimizers'], options=FULL)
    scaler.load_state_dict(checkpoint['scaler'] or scaler.state_dict())  # empty if the run was not in float16 so far


def save_all(out_dir, names, checkpoint):
    """Writes the same checkpoint under several names, in process 0; the others wait, since torchrun and srun end all processes when
    the first one leaves."""
    for name in names if processes.is_main() else ():
        save(out_dir / name, checkpoint)
    processes.barrier()


def describe(settings, model, meta, dtype):
    """What a checkpoint says about itself."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return dict(format=FORMAT, settings=settings, model_config=dataclasses.asdict(model.config), meta=meta, dtype=str(dtype),
                threads=torch.get_num_threads() * world)


# ---------------------------------------------------------------------------------------------------------------------
# Models

def load_model(path):
    """The model of a checkpoint (with the EMA of its weights, if it has one), in evaluation mode on the CPU, and the checkpoint."""
    checkpoint = read(path)
    with same_code(path):
        chapter = config.chapter(checkpoint['settings']['model'])
        model = chapter.Model(chapter.Config(**checkpoint['model_config']))
        model.load_state_dict(checkpoint.get('ema') or checkpoint['weights'])
    return model.eval(), checkpoint


@contextmanager
def same_code(path):
    """Says so if the contents of a checkpoint no longer fit the model: its code has changed since."""
    try:
        yield
    except (ImportError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f'{path} does not fit the code as it is now ({str(error).splitlines()[-1].strip()}): undo the change, or '
                        'train again, with another --out_dir= or --init_from=scratch')


def read_sources(assigned):
    """{part of the model: checkpoint that it starts from} by the setting init_from; the part '' is the whole model."""
    init_from = str(assigned.get('init_from', ('resume',))[0])
    if init_from in ('resume', 'scratch'):
        return {}
    names = [entry.rpartition(':') for entry in init_from.split(',')]
    return {part: read(find(name)) for part, _, name in names}


def start_from(model, sources, folder, meta):
    """Loads the weights of other runs; `sources` is emptied, since these may be as large as the model."""
    for part in list(sources):
        load_part(model, part, sources.pop(part), folder, meta)


def load_part(model, part, source, folder, meta):
    """The weights of another run, or of the same part of it, into a part of the model, '' for all of it. If these read or predict
    tokens, the tokens must mean the same: made by the same encoding, or the same data."""
    own = {name.removeprefix(f'{part}.'): tensor for name, tensor in source['weights'].items() if name.startswith(f'{part}.')}
    weights = own or source['weights']
    tokens = not part or 'head.weight' in weights
    if tokens and meta.get('encoding', meta) != source['meta'].get('encoding', source['meta']):
        raise UserError(f'{folder} has other tokens than the run that init_from names ({meta.get("encoding", "its own")}, not '
                        f'{source["meta"].get("encoding", "these")}): make it with the same encoding')
    try:
        model.get_submodule(part).load_state_dict(weights)
    except AttributeError:
        raise UserError(f'init_from: the model has no part {part!r}; there are '
                        f'{", ".join(name for name, _ in model.named_children())}')
    except RuntimeError as error:
        raise UserError('the weights that init_from names are for other sizes: leave the model\'s settings out ('
                        f'{str(error).splitlines()[1].strip()})')
