"""
Checkpoints: self-describing files. A kill during a write loses nothing; reading executes no code.
"""
import dataclasses
import difflib
import hashlib
import os
import time
import zipfile
from contextlib import contextmanager, suppress
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

FORMAT = 3  # of a checkpoint; other formats are refused
# fields of a chapter's Config that change what the same weights compute: a run that starts from weights keeps them
WITH_WEIGHTS = ('n_head', 'vision_head', 'activation', 'vision_activation', 'qk_norm', 'vision_qk_norm',
                'tie_embeddings', 'prediction', 'logits')


class Damaged(UserError):
    """The file of a checkpoint is incomplete or its contents have changed."""


# ---------------------------------------------------------------------------------------------------------------------
# Files

def replace(new, path):
    """os.replace, tried for a second: on Windows it is refused while another program reads the file."""
    for _ in range(10):
        with suppress(PermissionError):
            return os.replace(new, path)
        time.sleep(0.1)
    os.replace(new, path)


def save(path, checkpoint):
    """Writes a checkpoint to a temporary file, syncs it and renames it, so that the previous file is never lost. Raises
    UserError."""
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error}); the checkpoint before it is untouched. Free disk space, '
                        'end a program that reads it, or choose another out_dir; then run the same command again')


def sync_folder(path):
    """So that the names of new files survive a power cut, too. Some systems and network drives cannot."""
    with suppress(OSError, AttributeError):
        folder = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path):
    """A checkpoint as a dict: settings, meta, step, weights and all other state of a run. Raises UserError, or its
    subclass Damaged if another checkpoint has to be used."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes checksums, but torch.load does not compare them
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if {'settings', 'model_config', 'meta', 'step', 'weights'} - checkpoint.keys():
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        existing = {str(file) for file in (*Path('out').glob('*/ckpt_*.pt'), *path.parent.glob('ckpt_*.pt'))}
        near = ', '.join(difflib.get_close_matches(str(path), existing, 5, 0))
        raise UserError(f'{path}: no such checkpoint; ' + (f'the nearest are {near}' if near else
                        'train first, and start this in the folder of the repository, whose out/ holds the runs'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error})')
    except Exception as error:  # the unpickler fails in many ways
        others = ', '.join(file.name for file in others_of(path))
        remedy = f'the others in its folder are {others}' if others else 'its folder has no other one' + (
            '; --init_from=scratch moves a run aside and starts again' * (path.name == 'ckpt_last.pt'))
        raise Damaged(f'{path}: damaged, truncated or not a checkpoint of this repository ({type(error).__name__}); '
                      + remedy)
    if checkpoint.get('format') != FORMAT:
        raise UserError(f'{path}: a checkpoint of another edition of this repository (format '
                        f'{checkpoint.get("format", 1)}, not {FORMAT}): train again, with another --out_dir= or '
                        '--init_from=scratch, or use the edition that wrote it')
    return checkpoint


def others_of(path):
    """The other checkpoints of a run folder with which the run can be resumed; ckpt_fault.pt only if it is alone."""
    others = sorted(file for file in path.parent.glob('ckpt_*.pt') if file != path)
    return [file for file in others if file.name != 'ckpt_fault.pt'] or others


def read_newest(out_dir):
    """(path, checkpoint) from which the run in out_dir continues: ckpt_last.pt or, if it is damaged or missing, the
    intact checkpoint of the latest step; (None, None) if there is no checkpoint. Raises Damaged if all are."""
    last, newest, faults = out_dir / 'ckpt_last.pt', (None, None), []
    for path in [last] * last.is_file() + others_of(last):
        try:
            checkpoint = read(path)
        except Damaged as error:
            faults.append(error)
            continue
        if path == last:
            return last, checkpoint
        if not newest[1] or checkpoint['step'] > newest[1]['step']:
            newest = path, checkpoint
    if faults and not newest[1]:
        raise faults[0]
    return newest


def digest(path):
    """SHA-256 of a file's contents."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def check_readable(path):
    """Raises UserError if there is such a file, but the system does not open it, as one of another user."""
    try:
        open(path, 'rb').close()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass  # the program that reads it says what is missing
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}): get permission to read it, or use another folder')


def find(name):
    """The path of ckpt_last.pt of the run with this name (in out/) or folder, or of the checkpoint with this file.
    Weights that prepare/NAME.py downloads are downloaded on their first use."""
    if Path(name).is_file():
        return Path(name)
    paths = Path('out', name, 'ckpt_last.pt'), Path(name, 'ckpt_last.pt')
    path = next(filter(Path.is_file, paths), paths[Path(name).is_dir()])
    if not path.is_file() and name in processes.scripts('out'):
        processes.make_once(name, path)
    return path


def load_network(path, build, what, remedy=''):
    """A small network of a data set from its file, in evaluation mode: build(saved) constructs it, then
    saved['weights'] are loaded. Raises UserError."""
    check_readable(path)
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

# not strict: parameters that the loss does not depend on have no optimizer state
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def gather(model, ema_model, optimizers, scaler):
    """Weights, EMA and optimizer states by parameter name, unsharded, in the memory of process 0; the same for any
    number of processes. A collective operation."""
    stepped = any(optimizer.state for optimizer in optimizers)  # without a state, PyTorch would take a step to make one
    state = dict(scaler=scaler.state_dict(), weights=get_model_state_dict(model, options=FULL),
                 optimizers=get_optimizer_state_dict(model, optimizers, options=FULL) if stepped else {})
    return state | (dict(ema=get_model_state_dict(ema_model, options=FULL)) if ema_model is not model else {})


def scatter(checkpoint, model, ema_model, optimizers, scaler):
    """The inverse of `gather`: each process loads its shard. Learning rates must be numbers, not tensors. Raises
    ValueError if the model has other parameters."""
    if other := checkpoint['weights'].keys() ^ model.state_dict().keys():  # PyTorch ignores these
        raise ValueError(f'parameters in one of them alone: {", ".join(sorted(other)[:3])}')
    set_model_state_dict(model, checkpoint['weights'], options=FULL)
    if ema_model is not model:
        set_model_state_dict(ema_model, checkpoint['ema'], options=FULL)
    if checkpoint['optimizers']:
        set_optimizer_state_dict(model, optimizers, checkpoint['optimizers'], options=FULL)
    scaler.load_state_dict(checkpoint['scaler'] or scaler.state_dict())  # empty if the run was not in float16


def save_all(out_dir, names, checkpoint):
    """Writes a checkpoint under several names, in process 0. The other processes wait: torchrun and srun end all
    processes when the first one exits."""
    for name in names if processes.is_main() else ():
        save(out_dir / name, checkpoint)
    processes.barrier()


def describe(settings, model, meta, dtype):
    """The entries of a checkpoint that describe the run."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return dict(format=FORMAT, settings=settings, model_config=dataclasses.asdict(model.config), meta=meta,
                dtype=str(dtype), threads=torch.get_num_threads() * world, job=processes.job())


# ---------------------------------------------------------------------------------------------------------------------
# Models

def load_model(path):
    """(model, checkpoint) from a file, the model in evaluation mode on the CPU, with the EMA of its weights if there
    is one."""
    checkpoint = read(path)
    with same_code(path):
        chapter = config.chapter(checkpoint['settings']['model'])
        model = chapter.Model(chapter.Config(**checkpoint['model_config']))
        model.load_state_dict(checkpoint.get('ema') or checkpoint['weights'])
    return model.eval(), checkpoint


@contextmanager
def same_code(path):
    """Raises UserError if the contents of a checkpoint do not fit the model, because its code has changed."""
    try:
        yield
    except (ImportError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f'{path} does not fit the code as it is now ({str(error).splitlines()[-1].strip()}): undo the '
                        'change, or train again, with another --out_dir= or --init_from=scratch')


def read_sources(init_from):
    """{part of the model: checkpoint that it starts from} from the setting init_from; the part '' is the whole
    model."""
    return {part: read(find(name)) for part, name in map(split_part, init_from.split(','))}


def split_part(entry):
    """(part, run) of PART:RUN; ('', run) of RUN, whose path may hold a colon: C:\\runs\\a is no part C."""
    part, _, name = entry.partition(':')
    return (part, name) if name and len(part) > 1 and not Path(entry).exists() else ('', entry)


def start_from(model, sources, folder, meta):
    """Loads the weights of other runs."""
    for part, source in sources.items():
        load_part(model, part, source, folder, meta)


def load_part(model, part, source, folder, meta):
    """Loads the weights of another run (their EMA if there is one, which was evaluated), or of the same part of it,
    into a part of the model ('': the whole model). If they embed or predict tokens, both runs must have the same
    encoding or the same data."""
    prefix, weights = f'{part}.', source.get('ema') or source['weights']
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    weights = own or weights
    tokens = not part or any(name.endswith('head.weight') for name in weights)
    now, before = ({name: value for name, value in one.items() if name != 'sums'} for one in (meta, source['meta']))
    equal = meta.get('sums') and meta['sums'] == source['meta'].get('sums')  # made again, perhaps from another path
    if tokens and not equal and now.get('encoding', now) != before.get('encoding', before):
        name, _, start = before.get('encoding', '').partition('-')  # bpe-1A2B3C4D: trained on that text
        own = Path('data', source['settings']['dataset'], 'encoding.json')
        gone = start and not (own.is_file() and digest(own).startswith(start))
        remedy = (f'. {own.parent} has another one now: prepare that text again, with another --out=, and name that '
                  'folder as --encoding=' if gone else
                  f', as prepare.text does with --encoding={own.parent.as_posix() if start else name}' if name else '')
        raise UserError(f'{folder} has other tokens than the run that init_from names '
                        f'({now.get("encoding", "its own")}, not {before.get("encoding", "these")}): make it with the '
                        f'same encoding{remedy}')
    for field in WITH_WEIGHTS if not part else ():
        value = getattr(model.config, field, None)
        if (trained := source['model_config'].get(field, value)) != value:
            raise UserError(f'the weights that init_from names were trained with {field}={trained!r}, not {value!r}: '
                            'leave it out')
    try:
        model.get_submodule(part).load_state_dict(weights)
    except AttributeError:
        raise UserError(f'init_from: the model has no part {part!r}; there are '
                        f'{", ".join(name for name, _ in model.named_children())}')
    except RuntimeError as error:
        raise UserError('the weights that init_from names are for other sizes: leave the model\'s settings out ('
                        f'{str(error).splitlines()[1].strip()})')
