"""
One training loop for all chapters: a laptop's CPU, one GPU, or many under torchrun.

    python train.py config/nano4m.py --batch_size=32
    torchrun --nproc_per_node=4 train.py config/nano4m.py --micro_batch_size=4

Settings come from a config file and the command line (config/__init__.py), the data from data/NAME (made on the first run by
prepare/NAME.py), the model from the chapter that `model` names. The run folder out/CONFIGNAME receives checkpoints, log.jsonl
and pictures. Ctrl-C, or a signal of the cluster, lets it save and leave; the same command goes on where a stopped run was, bit
for bit on a CPU in float32.

Everything random follows from (seed, step, micro-batch): the global batch of a step is a list of micro-batches, and each
has the same samples, masks and noise whichever process computes it.
"""
import copy
import ctypes
import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import config
import gpt
from config import UserError

SETTINGS = dict(
    model='gpt',              # the chapter: gpt, maskgit, fourm, flow, vlm
    dataset='shakespeare',    # data/NAME, made by prepare/NAME.py
    out_dir='',               # the run's folder; '' is out/CONFIGNAME
    init_from='resume',       # 'resume' goes on with the run in out_dir if there is one; 'scratch' moves that one aside; the name
                              # or folder of another run (or 'smollm2'): a new run starts from its weights; parts of a
                              # model from several runs: 'eyes:siglip,language:smollm2'
    seed=0,                   # of the weights, the order of the data and all draws
    # length and batches
    max_iters=2000,           # optimizer steps
    batch_size=64,            # samples a step, over all micro-batches and processes
    micro_batch_size=64,      # samples in one forward pass: lower it until the memory suffices
    # optimizer: Muon for the hidden matrices, AdamW for embeddings, heads and vectors
    muon=True,                # False: AdamW for everything
    muon_learning_rate=0.02,  # of a matrix whose update has orthonormal rows or columns
    learning_rate=3e-3,       # of AdamW
    min_lr=0.0,               # where the decay ends, as a share of each rate
    warmup_iters=50,          # linear warm-up
    decay=0.6,                # share of max_iters, at the end, over which the rates fall linearly
    rates='',                 # factors of both by the beginning of a parameter's name: 'eyes:0 language:0.3'; 0 freezes
    weight_decay=0.0,         # decoupled, on matrices
    beta1=0.9, beta2=0.95,    # of AdamW
    momentum=0.95,            # of Muon
    grad_clip=1.0,            # largest norm of the gradient; 0 switches clipping off
    ema=0.0,                  # evaluate, draw and sample with a running mean of the weights, of this decay a step; 0 is none
    # evaluation and logs
    eval_interval=500,        # steps between evaluations; the last step is always evaluated
    eval_iters=0,             # micro-batches an evaluation, always the same ones; 0 is the whole validation set
    log_interval=10,          # steps between lines in log.jsonl
    target_loss=0.0,          # stop when val_loss reaches it
    keep=0,                   # so many of the newest evaluations also leave their checkpoint as ckpt_STEP.pt
    skip=0,                   # steps whose gradient is not finite that are skipped before the run stops
    pictures=True,            # draw samples at each evaluation
    wandb_log=False,          # also log to Weights & Biases
    # machine
    device='auto',            # cuda, mps or cpu
    dtype='auto',             # bfloat16 where the hardware computes it natively, otherwise float32; float16 for GPUs without it
    compile=True,             # torch.compile
    graphs=False,             # on a single GPU: small models several times as fast, as CUDA graphs; what `forward` does must then
                              # follow from its batch and from torch's random numbers alone
    shard=False,              # for models that do not fit: of weights, gradients and moments each process keeps only its share
    checksum=False,           # read all data once before the first step and compare them with what prepare/ made
    threads=0,                # of a CPU run; 0 is as many as before, at first PyTorch's choice: one for each core
)


# ---------------------------------------------------------------------------------------------------------------------
# The machine

def find_device(name='auto'):
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name == 'cuda':  # one GPU a process
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device={name!r} does not work here: {str(error).splitlines()[0]}')


def find_dtype(name, device):
    """bfloat16 where it is native: there its matmuls are several times faster than float32's, elsewhere slower."""
    if name == 'auto':
        native = False
        if device.type == 'cuda':
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == 'cpu':
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if name not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype={name!r}: choose auto, float32, bfloat16 or float16')
    return getattr(torch, name)


def set_up(device, threads=0, training=True, length=0):
    """Process-wide choices; on a CPU also whether attention is fused, one kernel that never holds all T x T weights, or written
    out. In training the latter is faster for short sequences: compared with it, the backward pass of PyTorch 2.13's fused kernel
    took, in bfloat16, 5 times as long at 64 tokens, 1.4 times at 256, half as long at 1,024; in float32 the fused core, forward
    and backward, as long up to 128 tokens, 0.6 to 0.75 of the time at 512. Its memory grows with the length, not with its square.
    In generation, 32 texts at once, it is the faster one."""
    torch.set_float32_matmul_precision('high')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if device.type == 'cpu':
        if threads:
            torch.set_num_threads(threads)
        keep_memory()
        fused = not training or length >= (192 if find_dtype('auto', device) == torch.float32 else 1024)
        torch.backends.cuda.enable_flash_sdp(fused)  # named after CUDA, but it holds for the CPU as well
        torch.compiler.config.cache_key_tag = f'fused={fused}'  # what was compiled on disk for the other way is not ours
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # bfloat16 products without a detour by float32


def length_of(model):
    """Tokens that attend to each other in chapters 1, 2 and 5; 0 where these are few."""
    return getattr(model, 'length', getattr(model.config, 'block_size', 0))


def keep_memory():
    """Freed memory stays with this process. The C library of Linux gives large pieces back to the system, which hands them out
    again page by page, filled with zeros: up to a sixth of a training step."""
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no piece is mapped for itself
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    except (OSError, AttributeError):
        pass  # another system, another allocator


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def synchronize(device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype, seconds=0.5):
    """The machine's own limit: FLOP/s of a large square matrix product, the best of what fits into the time given."""
    def once(a, b):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        return time.perf_counter() - start
    end, n, best = time.perf_counter() + seconds, 128, 0.0
    while n < (8192 if device.type == 'cuda' else 2048) and best < seconds / 20:
        n *= 2  # not at once: a number format that has to be emulated may take a thousand times as long
        pair = torch.randn(2, n, n, device=device).to(dtype)
        best = min(once(*pair), once(*pair))
    while time.perf_counter() < end:
        best = min(best, once(*pair))
    return 2 * n ** 3 / best


def count_flops(model, batch):
    """FLOPs of a forward and backward pass, counted operator by operator; the written-out attention, so that its products count
    on every device (the fused CPU kernel is unknown to the counter)."""
    with torch.compiler.set_stance('force_eager'), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def is_block(module):
    return type(module).__name__.endswith('Block')


def compile_blocks(model, device):
    """torch.compile for every Transformer block of a model, in place, and on a GPU for the cross-entropy, which by itself writes
    its 16-bit logits once more in 32 bits, and reads these. All blocks of a kind share one compiled function, so that this
    takes seconds where compiling a whole model took minutes. Returns whether a compiler works; if not, a line says so."""
    try:
        torch.compile(lambda x: (x @ x).relu())(torch.ones(2, 2, device=device))
    except Exception as error:
        if is_main():
            print(f'torch.compile does not work here ({type(error).__name__}): going on without it, more slowly')
        return False
    torch._dynamo.config.recompile_limit = 64  # one for each combination of shapes; chapters keep these few
    for module in model.modules():
        if is_block(module):
            module.compile(dynamic=True)
    if device.type == 'cuda':
        gpt.nll = torch.compile(gpt.nll, dynamic=True)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Data

def read_meta(folder):
    """data/NAME/meta.json: kind ('rows' or 'stream'), the module in prepare/ that made it, fields {name: vocabulary size, 0 for
    real numbers}, and in `config` the settings that it decides for every model that has them. Optional: files {field: the array
    on disk, where it has another name; '{split}' is the split's}, views {field: number of pre-made views}, index {field: the
    array that says which of its rows is a sample's, where several samples share them, as questions do pictures}."""
    path = Path(folder, 'meta.json')
    try:
        meta = json.loads(path.read_text())
        assert meta['kind'] in ('rows', 'stream') and meta['prepare'] and meta['fields'] and meta['config'] is not None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f'{path}: not the description of a data set ({type(error).__name__}); delete {folder} and run '
                        f'python -m prepare.{Path(folder).name}')
    return meta


def prepare(dataset):
    """Makes data/NAME on the first run; under torchrun process 0 does and the others wait for meta.json, written last."""
    folder = Path('data', dataset)
    known = sorted(path.stem for path in Path('prepare').glob('*.py') if '__main__' in path.read_text())
    if dataset not in known and not (folder / 'meta.json').is_file():
        raise UserError(f'dataset={dataset!r}: there is neither {folder}/meta.json nor a script prepare/{dataset}.py (there are '
                        f'{", ".join(known)})')
    make_once(dataset, folder / 'meta.json')
    return folder, read_meta(folder)


def make_once(name, path):
    """Runs python -m prepare.NAME where the file that it writes last is missing."""
    if not path.is_file() and os.environ.get('RANK', '0') == '0':
        print(f'{path} is missing: running python -m prepare.{name}', flush=True)
        path.parent.parent.mkdir(exist_ok=True)
        with FileLock(f'{path.parent}.lock'):  # of two runs that begin at once the second waits for the first one's data
            if not path.is_file() and subprocess.run([sys.executable, '-m', f'prepare.{name}']).returncode:
                raise UserError(f'python -m prepare.{name} failed: see its message above')
        if not path.is_file():
            raise UserError(f'python -m prepare.{name} does not make {path}: is {name!r} what you meant?')
    while not path.is_file():
        time.sleep(1)


class Data:
    """One split as memory-mapped arrays, of the fields that the model reads; samples and their order follow from the seed alone.

    rows: sample i is row i of each field; a field in meta's `views` has so many pre-made variants along a second axis, of which
    each epoch takes one, the same for all fields, and evaluation the first. stream: one long run of tokens, cut into windows of
    T + 1; each epoch shifts the grid of windows, so that every token gets to be predicted from every distance; in evaluation
    each is predicted once.
    """
    def __init__(self, folder, split, meta, names, block_size=0, seed=0):
        self.meta, self.block_size, self.seed, self.orders = meta, block_size, seed, {}
        if missing := [name for name in names if name not in meta['fields']]:
            raise UserError(f'{folder} has no {missing[0]!r}, which this model reads (it has {", ".join(meta["fields"])}): '
                            'choose another dataset or model')

        def path(name):
            return Path(folder, split, meta.get('files', {}).get(name, name).format(split=split) + '.npy')
        self.arrays = {name: self.read(path(name), meta['fields'][name]) for name in names}
        self.index = {name: self.read(path(index), len(self.arrays[name])) for name, index in meta.get('index', {}).items()
                      if name in names}
        sizes = {name: len(self.index.get(name, array)) for name, array in self.arrays.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f'{Path(folder, split)}: the fields differ in length ({sizes}); delete {folder} to make it anew')
        self.length = self.n = sizes.popitem()[1]
        if meta['kind'] == 'stream':  # room for the shift in training; the last window in evaluation may be filled in part
            if block_size < 1:
                raise UserError(f'{folder} is cut into windows: block_size={block_size} must be at least 1')
            self.n = self.length // block_size - 1 if split == 'train' else -(-(self.length - 1) // block_size)
        if self.n < 1:
            raise UserError(f'{Path(folder, split)}: {self.length} tokens are too few for a context of {block_size}: training '
                            'takes twice as many; lower block_size, or give more text')

    @staticmethod
    def read(path, vocabulary):
        try:
            array = np.load(path, mmap_mode='r')
            low, high = array.min(initial=0), array.max(initial=0)
            assert array.ndim and array.dtype.kind in 'iuf', f'not an array of numbers: {array.dtype}'
        except Exception as error:  # NumPy fails in many ways
            raise UserError(f'{path}: missing or damaged ({str(error) or type(error).__name__}); delete {path.parent.parent} to '
                            'make it anew')
        if vocabulary and (low < -1 or high >= vocabulary):  # -1 marks the places after the end of a text
            raise UserError(f'{path}: token ids run from {low} to {high}, outside the vocabulary of {vocabulary}')
        if not np.isfinite(low + high):  # of real numbers
            raise UserError(f'{path}: holds numbers that are not finite; delete {path.parent.parent} to make it anew')
        return array

    def rows(self, ids, shift=0, view=0):
        """{field: (B, ...)} of the samples with these ids, integers as int64, reals as float32; -1 is behind a stream's end."""
        views, over = self.meta.get('views', {}), None
        if self.meta['kind'] == 'stream':
            ids = shift + ids[:, None] * self.block_size + np.arange(self.block_size + 1)  # (B, T + 1)
            over = ids >= self.length
            ids = np.where(over, 0, ids)
        batch = {}
        for name, array in self.arrays.items():
            array = array[(ids, view) if name in views else self.index[name][ids] if name in self.index else ids]
            array = array.astype(np.float32 if array.dtype.kind == 'f' else np.int64)
            batch[name] = torch.from_numpy(array if over is None else np.where(over, -1, array))
        return batch

    def order(self, epoch):
        """The epoch's permutation of sample ids, the shift of a stream's windows, and the view of each sample."""
        order = self.orders.get(epoch)
        if not order:
            random = np.random.default_rng((self.seed, epoch))
            order = (random.permutation(self.n), int(random.integers(max(1, self.block_size))),
                     random.integers(max(self.meta.get('views', {'': 1}).values()), size=self.n))
            self.orders = {epoch: order}  # the last one alone, at once: several threads take batches
        return order

    def ids(self, start, count):
        """[epoch, ids] of samples start .. start + count - 1 of the endless run over all epochs; a batch may straddle two."""
        epochs, places = np.divmod(np.arange(start, start + count), self.n)
        return [[int(epoch), self.order(epoch)[0][places[epochs == epoch]].tolist()] for epoch in np.unique(epochs)]

    def take(self, start, count):
        """These samples as a batch."""
        parts = []
        for epoch, ids in self.ids(start, count):
            _, shift, views = self.order(epoch)
            parts.append(self.rows(np.array(ids), shift, views[ids]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def generator(*key):
    """A random generator for this key of integers, independent of those for other keys (zeros at the end do not count)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def micro_batch(data, model, settings, step, j):
    """Micro-batch j of a step, with all that the model draws for it: masks, noise."""
    seed, size = settings['seed'], settings['micro_batch_size']
    batch = data.take(step * settings['batch_size'] + j * size, size)
    return model.draw(batch, generator(seed, 1, step, j), shared=generator(seed, 2, step))


def evaluation_batch(data, model, settings, j):
    """The same samples, masks and noise in every evaluation of every run that has this micro_batch_size."""
    size = settings['micro_batch_size']
    batch = data.rows(np.arange(j * size, min((j + 1) * size, data.n)))
    return model.draw(batch, generator(3, j), shared=generator(4, j))


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=device.type == 'cuda') for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, checkpoint):
    """Written beside its place, synced, then renamed: what was there before is never lost."""
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


def read_checkpoint(path):
    """A checkpoint as a dict: settings, meta, step, weights and all else that a run needs to go on."""
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
    return checkpoint


def find_weights(name):
    """The checkpoint of the run with this name or folder; weights that prepare/NAME.py fetches are fetched on their first use."""
    path = Path(name if Path(name).is_dir() else f'out/{name}', 'ckpt_last.pt')
    if not path.is_file() and Path('prepare', f'{name}.py').is_file():
        make_once(name, path)
    return path


def holds(now, before):
    """Whether a description of data still says what it said before; it may say more, as when modalities were added."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(holds(now.get(name), value) for name, value in before.items())
    if isinstance(before, str) and isinstance(now, str):
        return set(before.split()) <= set(now.split())
    return now == before


def check_sums(folder, rank, world):
    """Reads this process's share of the arrays and compares them with SHA256SUMS, which prepare/ left beside meta.json."""
    path = folder / 'SHA256SUMS'
    if not path.is_file():
        raise UserError(f'{path} is missing: make the data anew, or trust them as they are: cd {folder}; '
                        f'sha256sum */*.npy > {path.name}')
    sums = {name: digest for digest, _, name in (line.partition('  ') for line in path.read_text(errors='replace').splitlines())}
    if unlisted := {array.relative_to(folder).as_posix() for array in folder.rglob('*.npy')} - sums.keys():
        raise UserError(f'{path} does not tell of {min(unlisted)}: delete {folder} to make it anew')
    for name, digest in list(sums.items())[rank::world]:
        array = folder / name
        with open(array, 'rb') if array.is_file() else nullcontext() as file:
            if not file or hashlib.file_digest(file, 'sha256').hexdigest() != digest:
                raise UserError(f'{array} is not what {path} tells of: copy it again, or delete {folder} to make it anew')


def check_data(folder, meta, checkpoint):
    """Tokens mean something only to the tokenizers that made them."""
    if not holds(meta, checkpoint['meta']):
        raise UserError(f'{folder} is not the data that this run was trained on (its meta.json differs): restore that data, or '
                        'train anew')


def load_model(path):
    """The model of a checkpoint (with its mean weights, if it has any), in evaluation mode on the CPU, and the checkpoint."""
    checkpoint = read_checkpoint(path)
    with same_code(path):
        chapter = importlib.import_module(checkpoint['settings']['model'])
        model = chapter.Model(chapter.Config(**checkpoint['model_config']))
        model.load_state_dict(checkpoint.get('ema') or checkpoint['weights'])
    return model.eval(), checkpoint


@contextmanager
def same_code(path):
    """Says so where what a checkpoint holds no longer fits the model: you have changed its code since."""
    try:
        yield
    except (ImportError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f'{path} does not fit the code as it is now ({str(error).splitlines()[-1].strip()}): undo the change, or '
                        'train anew, with another --out_dir= or --init_from=scratch')


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers

def read_rates(model, text):
    """'eyes:0 language:0.3' -> {parameter: factor of its learning rate}; the last entry that a name begins with holds, 1 without.
    Raises UserError."""
    rates = {parameter: 1.0 for parameter in model.parameters()}
    for entry in text.split():
        part, _, factor = entry.partition(':')
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(part)]
        if not found:
            raise UserError(f'rates={text!r}: no parameter begins with {part!r}; the parts are '
                            f'{", ".join(name for name, _ in model.named_children())}')
        rates |= dict.fromkeys(found, config.convert('rates', factor, f'entry {entry!r}', 1.0))
    if min(rates.values()) < 0 or not any(rates.values()):
        raise UserError(f'rates={text!r}: factors must be at least 0, and one above it')
    return rates


def orthogonal(x, dtype):
    """Matrices x (n, rows, columns) -> about the nearest ones with orthonormal rows or columns (Newton-Schulz, as in Jordan et
    al., "Muon", 2024): five times, aX + bXX'X + c(XX')^2 X brings all singular values nearer to 1, in the end to 0.7 .. 1.2.

    What has become of X is always YX, Y a square as small as X has rows, and (YX)(YX)' = Y(XX')Y': where X is wide, the rounds
    need small matrices alone, and X itself only in the end. In bfloat16 that way would lose the small singular values.
    """
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    apart = dtype == torch.float32 and x.size(1) < x.size(2)
    y, gram = (torch.ones_like(x[:, :, 0]).diag_embed(), x @ x.mT) if apart else (x, None)
    for _ in range(5):
        square = y @ gram @ y.mT if apart else y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    x = y @ x if apart else y
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum, as torch.optim.Muon does, which computes in bfloat16 alone, one matrix after the
    other: on a CPU that has to emulate bfloat16 it took 24 times as long, three quarters of a training step."""
    def __init__(self, matrices, lr, momentum, weight_decay):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:  # as in all of torch.optim: what the loss does not reach stays as it is
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), some in shapes.items():  # matrices of one shape together
                for p in some:
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                averages = [self.state[p]['momentum_buffer'] for p in some]
                gradients = [p.grad for p in some]
                torch._foreach_lerp_(averages, gradients, 1 - group['momentum'])
                ahead = torch.stack(torch._foreach_lerp(gradients, averages, group['momentum']))  # Nesterov: one step further
                if sharded := isinstance(ahead, DTensor):  # from some rows of all matrices to all rows of some matrices
                    ahead = ahead.redistribute(placements=[Shard(0)])
                steps = orthogonal(ahead, find_dtype('auto', ahead.device)).to(ahead.dtype)
                steps = steps.mul_(group['lr'] * max(1, rows / columns) ** 0.5)
                steps = (steps.redistribute(placements=[Shard(1)]) if sharded else steps).unbind()
                torch._foreach_mul_(some, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_sub_(some, steps)


def make_optimizers(model, settings):
    """Muon for the matrices between hidden vectors, AdamW for the rest; what has the rate 0 is frozen. Q, K and V are one fused
    matrix and are orthogonalised together. Embeddings and heads are matrices too, but their rows belong to single tokens: they
    are AdamW's."""
    groups, rates = {}, read_rates(model, settings['rates'])
    for name, parameter in model.named_parameters():
        rate = rates[parameter] * parameter.requires_grad
        hidden = parameter.ndim == 2 and not any(word in name for word in ('embedding', 'head'))
        parameter.requires_grad_(rate > 0)
        if rate:
            groups.setdefault((hidden and settings['muon'], parameter.ndim < 2, rate), []).append(parameter)
    groups = sorted(groups.items(), key=lambda item: item[0])
    adamw = [dict(params=group, lr=settings['learning_rate'] * rate, weight_decay=0.0 if vector else settings['weight_decay'])
             for (hidden, vector, rate), group in groups if not hidden]
    muon = [dict(params=group, lr=settings['muon_learning_rate'] * rate) for (hidden, _, rate), group in groups if hidden]
    optimizers, betas = [], (settings['beta1'], settings['beta2'])
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, settings['learning_rate'], betas, fused=True))
    if muon:
        optimizers.append(Muon(muon, settings['muon_learning_rate'], settings['momentum'], settings['weight_decay']))
    for group in groups_of(optimizers):
        group['initial_lr'] = group['lr']
    return optimizers


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def schedule(step, settings):
    """The learning rates' factor: linear warm-up, constant, linear decay to min_lr over the last share of the run."""
    left = (settings['max_iters'] - step) / max(1, settings['decay'] * settings['max_iters'])
    return min(1, (step + 1) / max(1, settings['warmup_iters']), settings['min_lr'] + (1 - settings['min_lr']) * left)


def hold_rates(optimizers, device=None):
    """Learning rates as numbers on the device, where a CUDA graph finds them, or as Python's."""
    warnings.filterwarnings('ignore', 'This instance was constructed with capturable=True')  # the first steps are not recorded
    for group in groups_of(optimizers):
        group['lr'] = torch.tensor(group['initial_lr'], device=device) if device else group['initial_lr']
        group['capturable'] = bool(device)  # AdamW's name for that


def set_rates(optimizers, settings, step):
    for group in groups_of(optimizers):
        rate = group['initial_lr'] * schedule(step, settings)
        group['lr'] = group['lr'].fill_(rate) if isinstance(group['lr'], torch.Tensor) else rate


def advance(optimizers, scaler=torch.amp.GradScaler(enabled=False), none=True):
    """One step of all optimizers, and clean gradients for the next: none, or zeros in the same place. In float16 the loss was
    scaled up so that small gradients do not vanish; after many good steps the scaler tries more."""
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=none)
    scaler.update()


@torch.no_grad()
def follow(mean, model, decay, step):
    """Moves the running mean of the weights towards those after this step; the first steps are soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes

def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def any_process(value, device):
    """Whether the value is true in any process."""
    flag = torch.tensor(float(bool(value)), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def shard(model, device, dtype):
    """FSDP2 (arXiv 2304.11277), in place: each process keeps some rows of every parameter. Those of a block, and of what is
    outside of all blocks, are gathered when it begins to compute and dropped again when it has."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if is_block(module)]
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # autocast would keep whole matrices meanwhile
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def summed(model, last):
    """A context for a micro-batch; the gradients are summed over all processes in the last one's backward pass only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def whole(value):
    """The value with all sharded tensors in it made whole in process 0's memory, one after the other; every process has to call
    this. So a checkpoint is the same file however many processes wrote it."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    if not isinstance(value, DTensor):
        return value
    tensor = value.full_tensor()
    return tensor.cpu() if is_main() else None


def shares(state, optimizer):
    """An optimizer's whole state -> this process's share: each moment is sharded like its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]

    def share(tensor, p):
        if not isinstance(p, DTensor) or tensor.shape != p.shape:
            return tensor
        return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # all have it: nothing is sent
    return state | dict(state={i: {name: share(tensor, parameters[i]) for name, tensor in moments.items()}
                               for i, moments in state['state'].items()})


def clip(model, most):
    """Scales the gradient down where its norm is above `most`, 0 for never; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def add_logs(total, logs):
    """logs: name -> (sum, count) on the device; adding keeps every mean exact, and needs no wait for the device."""
    return total | {name: total.get(name, 0) + value for name, value in logs.items()}


def means(total):
    """({name: mean}, number of tokens), as floats, over the micro-batches of all processes; waits for the device."""
    names = sorted(total)
    sums = torch.stack([total[name].float() for name in names])
    if dist.is_initialized():
        dist.all_reduce(sums)
    sums = dict(zip(names, sums.tolist()))
    tokens = sums.pop('tokens')[0]
    return {name: value / count for name, (value, count) in sums.items() if count}, tokens


def loss_of(values):
    """A model's loss for comparisons: the plain mean over its logs named loss... (one a modality in nano4M)."""
    losses = [value for name, value in values.items() if name.startswith('loss')]
    return sum(losses) / len(losses) if losses else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# The run

FREE = {'init_from', 'out_dir', 'max_iters', 'micro_batch_size', 'eval_interval', 'eval_iters', 'log_interval', 'target_loss',
        'keep', 'skip', 'pictures', 'wandb_log', 'device', 'dtype', 'compile', 'graphs', 'threads', 'shard', 'checksum'}  # may change


def read_sources(init_from):
    """{part of the model: checkpoint that it starts from}; the part '' is the whole model."""
    if init_from in ('resume', 'scratch'):
        return {}
    names = [entry.rpartition(':') for entry in init_from.split(',')]
    return {part: read_checkpoint(find_weights(name)) for part, _, name in names}


def resolve(assigned, sources={}):
    """All settings (train.py's and the model's own, which have the names of its Config) and the chapter's module. Where the run
    starts from the weights of other runs, their sizes are the defaults."""
    chapters = sorted(path.stem for path in Path(__file__).resolve().parent.glob('*.py') if '\nModel = ' in path.read_text())
    name = assigned.get('model', (SETTINGS['model'],))[0]
    if name not in chapters:
        raise UserError(f'model={name!r}: choose one of {", ".join(chapters)}')
    chapter = importlib.import_module(name)
    own = dataclasses.asdict(chapter.Config())
    for part, source in sources.items():
        if not part and source['settings']['model'] != name:
            raise UserError(f'init_from names a run of model={source["settings"]["model"]!r}, not {name!r}')
        own |= {key: value for key, value in source['model_config'].items() if key in own}
    settings = config.apply(assigned, SETTINGS | own)
    for key in SETTINGS:
        least = int(key in ('max_iters', 'batch_size', 'micro_batch_size', 'eval_interval', 'log_interval'))
        if not isinstance(settings[key], str) and settings[key] < least:
            raise UserError(f'{key}={settings[key]}: must be at least {least}')
    for key in ('beta1', 'beta2', 'momentum', 'ema'):
        if settings[key] >= 1:
            raise UserError(f'{key}={settings[key]}: must be below 1')
    settings['micro_batch_size'] = min(settings['micro_batch_size'], settings['batch_size'])
    return settings, chapter


def make_model(chapter, settings, meta, assigned):
    """The model with the settings of its Config; those that the data set decides cannot be set by hand."""
    for name, value in meta['config'].items():
        if name in assigned and settings[name] != value:
            raise UserError(f'{assigned[name][1]}: {name} is decided by the data set ({value!r}); leave it out')
    own = {field.name: meta['config'].get(field.name, settings[field.name]) for field in dataclasses.fields(chapter.Config)}
    try:
        return chapter.Model(chapter.Config(**own))
    except (AssertionError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f'model={settings["model"]!r} cannot be built: {str(error).splitlines()[0]}')


def load_weights(model, part, source, folder, meta):
    """The weights of another run, or the same part of it, into a part of the model, '' for all of it; where they read or write
    tokens these must mean the same: made by the same encoding, or the same data."""
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


def lock(out_dir):
    """Held while a run writes into its folder, and released by the system however the process ends."""
    out_dir.mkdir(parents=True, exist_ok=True)
    held = FileLock(out_dir / 'lock')
    try:
        return held.acquire(timeout=0)
    except Timeout:
        raise UserError(f'{out_dir}: another process is training there; wait for it, or choose another --out_dir=')


def find_run(out_dir, settings, stack):
    """The checkpoint of the run in out_dir, which is to go on, or None; process 0 locks the folder until `stack` ends."""
    last = out_dir / 'ckpt_last.pt'
    again = any(os.environ.get(f'{who}_RESTART_COUNT', '0') != '0' for who in ('TORCHELASTIC', 'SLURM'))
    scratch = settings['init_from'] == 'scratch' and not again  # what torchrun or SLURM has started again is to go on
    if scratch and last.exists() and is_main():
        aside = next(path for i in range(1, 10 ** 6) if not (path := Path(f'{out_dir}.{i}')).exists())
        with lock(out_dir):
            out_dir.rename(aside)
        print(f'{out_dir} held another run: moved to {aside}')
    if is_main():
        stack.enter_context(lock(out_dir))
    if dist.is_initialized():
        dist.barrier()
    if scratch or not last.exists():
        return None
    checkpoint = read_checkpoint(last)
    before = checkpoint['settings']
    if changed := [name for name in settings if name not in FREE and settings[name] != before.get(name)]:
        differ = ', '.join(f'{name}={before.get(name)!r}, not {settings[name]!r}' for name in changed[:3])
        raise UserError(f'{out_dir} holds a run with {differ}: choose another --out_dir=, or --init_from=scratch moves it aside')
    return checkpoint


def forget(log, step):
    """Cuts off what the log says of later steps, which a killed run did after its last checkpoint: they are done again."""
    if log.exists() and is_main():
        kept = [line for line in log.read_bytes().splitlines(True) if line.endswith(b'\n') and json.loads(line)['step'] <= step]
        os.truncate(log, sum(map(len, kept)))  # in place: a kill here loses nothing


def listen(stack):
    """A list that will hold the number of each signal that asks this process to stop. The run then saves and leaves; a second
    signal ends it at once, unless it comes with the first: torchrun passes on a Ctrl-C that the process has already had."""
    asked, times = [], []

    def note(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            raise KeyboardInterrupt
        if not asked and is_main():
            os.write(2, b'\nstopping at the next line of the log; once more stops at once\n')  # not print: it may be at it
        asked.append(number)
    if threading.current_thread() is threading.main_thread():  # others may not
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, 'SIGUSR1') else [])):
            stack.callback(signal.signal, number, signal.signal(number, note))
    return asked


class Graphs:
    """run(batch), or run(), on a GPU as CUDA graphs (gpt.record): one for each set of shapes that has come up twice already, as
    long as there are fewer than `most`. What it changes, gradients or weights, has to stay where it is."""
    def __init__(self, run, most=64):
        self.run, self.most, self.seen, self.graphs = run, most, Counter(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *batches):
        shapes = tuple(tensor.shape for batch in batches for tensor in batch.values())
        if shapes in self.graphs:
            own, replay, result = self.graphs[shapes]
            for mine, batch in zip(own, batches):
                for name, tensor in batch.items():
                    mine[name].copy_(tensor)
            replay()
            return result
        self.seen[shapes] += 1
        try:
            if self.seen[shapes] < 3 or len(self.graphs) >= self.most:
                return self.run(*batches)
            torch.cuda.empty_cache()  # a graph has its own memory
            own = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
            now, replay, result = gpt.record(lambda: self.run(*own), self.pool)
        except RuntimeError as error:  # what failed while it was noted cannot be done again: the GPU's state is not sure any more
            raise UserError(f'graphs=True: this step fails ({str(error).splitlines()[0]}): most likely something in it waits for '
                            'the GPU, or its memory is full; leave --graphs out')
        self.graphs[shapes] = own, replay, result
        return now


def prefetched(make, jobs, device):
    """make(*job), a batch, for each job in turn; where the caller works on a GPU, two threads make the next ones meanwhile. More
    of them get in each other's way: where draws are many small operations, Python lets one thread run at a time."""
    if device.type == 'cpu':  # there a second thread's worker threads would only get in the way of the first one's
        yield from (make(*job) for job in jobs)
        return

    def batch(job):
        if device.type != 'cuda':
            return make(*job)
        torch.cuda.set_device(device)  # a thread begins with the first one
        return {name: tensor.pin_memory() for name, tensor in make(*job).items()}  # a GPU copies that while it computes
    with ThreadPoolExecutor(2) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(batch, job))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def main(*arguments, **overrides):
    """Trains as the config files and settings say; returns the last evaluation's values, or {'stopped': number of the signal}.
    Raises UserError."""
    with ExitStack() as stack:  # gives back signals, the lock and the process group, however the run ends
        return run(config.read(arguments, overrides), [path for path in map(str, arguments) if not path.startswith('--')], stack)


def run(assigned, files, stack):
    sources = read_sources(str(assigned.get('init_from', ('resume',))[0]))
    settings, chapter = resolve(assigned, sources)
    out_dir = Path(settings['out_dir'] or Path('out', Path(files[-1]).stem if files else settings['model']))
    device = find_device(settings['device'])  # what is wrong with these is to be said before data are made, which takes minutes
    dtype = find_dtype(settings['dtype'], device)
    folder, meta = prepare(settings['dataset'])

    # the processes
    if 'RANK' in os.environ and not dist.is_initialized():
        gpu, (store, rank, world) = device.type == 'cuda', next(dist.rendezvous('env://'))
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)  # no addresses of those that died
        dist.init_process_group('nccl' if gpu else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=10), device_id=device if gpu else None)
        stack.callback(dist.destroy_process_group)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    asked = listen(stack)
    checkpoint = find_run(out_dir, settings, stack)
    if checkpoint:
        check_data(folder, meta, checkpoint)
        meta = checkpoint['meta']
    if settings['checksum']:
        check_sums(folder, rank, world)

    # data, model, optimizers
    size = settings['micro_batch_size']
    n_micro = settings['batch_size'] // size
    if settings['batch_size'] % size or n_micro % world:
        raise UserError(f'batch_size={settings["batch_size"]} does not split into micro-batches of {size} on {world} '
                        f'processes: choose --micro_batch_size= so that their number is a multiple of {world}')
    torch.manual_seed(settings['seed'])
    raw_model = make_model(chapter, settings, meta, assigned)
    for part in list(sources):
        load_weights(raw_model, part, sources.pop(part), folder, meta)  # and forgotten: it may be as large as the model
    threads = settings['threads']
    if checkpoint and not threads:  # as many in all as before, if there are as many cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        threads = max(1, min(checkpoint['threads'] // world, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    set_up(device, threads, length=length_of(raw_model))
    block_size = settings.get('block_size', 0)
    train_data, val_data = (Data(folder, split, meta, raw_model.fields, block_size, settings['seed'])
                            for split in ('train', 'val'))
    ghost = copy.deepcopy(raw_model).to('meta')  # without numbers: to count FLOPs costs neither time nor memory
    make_optimizers(ghost, settings)  # freezes what is not trained
    mean = copy.deepcopy(raw_model) if settings['ema'] else raw_model  # the model that is evaluated and sampled from
    models = dict(weights=raw_model) | (dict(ema=mean) if settings['ema'] else {})  # as a checkpoint names them
    sharded = settings['shard'] and world > 1
    for name, each in models.items():
        if checkpoint:
            with same_code(out_dir):
                each.load_state_dict(checkpoint[name])
        shard(each, device, dtype) if sharded else each.to(device)
    optimizers = make_optimizers(raw_model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = dict(step=0, best=math.inf, seconds=0.0, tokens=0, skipped=0, wandb_id=None)
    if checkpoint:
        for optimizer, before in zip(optimizers, checkpoint['optimizers']):
            optimizer.load_state_dict(shares(before, optimizer))
        scaler.load_state_dict(checkpoint['scaler'] or scaler.state_dict())  # empty where the run was not in float16 so far
        state |= {name: checkpoint[name] for name in state}
        del checkpoint  # as large as what it was loaded into
    start, best, seconds, tokens, skipped, wandb_id = state.values()
    graphs = settings['graphs'] and device.type == gpt.GRAPHS and world == 1
    if settings['graphs'] and not graphs and is_main():
        print('graphs=True is for a run on a single GPU: going on without')
    hold_rates(optimizers, device if graphs else None)
    forget(out_dir / 'log.jsonl', start or -1)
    if settings['compile']:
        stack.callback(setattr, gpt, 'nll', gpt.nll)
        compile_blocks(raw_model, device)
    model = DistributedDataParallel(raw_model) if world > 1 and not sharded else raw_model

    def passes(batch):
        """Adds to the gradients what a micro-batch gives; its logs."""
        with autocast(device, dtype):
            loss, logs = model(batch)
        scaler.scale(loss * world / n_micro).backward()
        return logs
    finish = partial(advance, optimizers, scaler, none=not graphs)
    if graphs:
        passes = Graphs(passes)
    if graphs and not scaler.is_enabled():  # which waits for the GPU, as a graph cannot
        finish = Graphs(finish)
    limit = matmul_rate(device, dtype) if is_main() else 1
    if is_main():
        count = sum(p.numel() for p in raw_model.parameters())
        if shutil.disk_usage(out_dir).free < 48 * count:  # weights, moments, mean: 16 bytes each, in up to three checkpoints
            raise UserError(f'{out_dir}: less than {48 * count / 1e9:.1f} GB free, which its checkpoints may need: make room')
        print(f'{settings["model"]}: {count / 1e6:.2f} M parameters, {train_data.n:,} training samples, {device}, '
              f'{str(dtype)[6:]}, {limit / 1e9:,.0f} GFLOP/s of matmul; run folder {out_dir}')
        if settings['wandb_log']:
            import wandb
            wandb_id = wandb.init(project='nanofm', name=out_dir.name, config=settings, id=wandb_id, resume='allow').id
            stack.callback(wandb.finish)  # offline it says how to send the run later

    def log(line):
        if is_main():
            with open(out_dir / 'log.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')
            if settings['wandb_log']:
                wandb.log(line, step=line['step'])

    @torch.no_grad()
    @torch.compiler.set_stance('force_eager')  # few steps, many shapes: not worth compiling
    def evaluate():
        mean.eval()
        total, batches = {}, -(-val_data.n // size)
        n = min(settings['eval_iters'] or batches, batches)
        turns = range(rank, n + -n % world, world)  # of each process equally many, as sharding needs; some may not count
        for j, batch in zip(turns, prefetched(evaluation_batch, [(val_data, raw_model, settings, j % n) for j in turns], device)):
            with autocast(device, dtype):
                logs = mean(to_device(batch, device))[1]
            total = add_logs(total, {name: value * (j < n) for name, value in logs.items()})
        mean.train()
        return means(total)[0]

    def save(step, *names):
        checkpoint = whole(dict(
            settings=settings, model_config=dataclasses.asdict(raw_model.config), meta=meta, step=step, best=best,
            seconds=seconds, tokens=int(tokens), skipped=skipped, dtype=str(dtype), threads=torch.get_num_threads() * world,
            optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=scaler.state_dict(), wandb_id=wandb_id)
            | {name: each.state_dict() for name, each in models.items()})
        if is_main():
            for name in names:
                save_checkpoint(out_dir / name, checkpoint)
        any_process(False, device)  # nobody leaves before it is written: torchrun and srun end all when the first one does

    if start >= settings['max_iters'] or best <= settings['target_loss'] > 0:
        if is_main():
            todo = ['raise max_iters'] if start >= settings['max_iters'] else []
            todo += ['lower target_loss'] if best <= settings['target_loss'] else []
            print(f'{out_dir}: finished at step {start}, best val_loss {best:.4f}; {" and ".join(todo)} to go on, or '
                  '--init_from=scratch to start anew')
        return {}
    mine = range(rank, n_micro, world)
    jobs = ((train_data, raw_model, settings, step, j) for step in range(start, settings['max_iters']) for j in mine)
    batches = prefetched(micro_batch, jobs, device)
    bar = stack.enter_context(tqdm(total=settings['max_iters'], initial=start, desc='train', unit='step', disable=not is_main()))
    flops = {}  # of a micro-batch, by its shapes
    total, work, waited, since = {}, 0, 0.0, time.perf_counter()  # since the last log line
    for step in range(start, settings['max_iters'] + 1):

        # evaluate, save, draw
        if step == settings['max_iters'] or (step % settings['eval_interval'] == 0 and (step > start or step == 0)):
            values = evaluate()
            val_loss = loss_of(values)
            log({'step': step, 'tokens': int(tokens), 'seconds': round(seconds, 2), 'val_loss': val_loss}
                | {f'val_{name}': value for name, value in values.items()})
            if is_main():
                tqdm.write(f'step {step}: val_loss {val_loss:.4f}  '
                           + '  '.join(f'{name} {value:.3f}' for name, value in values.items() if name != 'loss'))
            improved, best = val_loss < best, min(best, val_loss)  # in this order a nan does not stay
            if step:
                names = ['ckpt_best.pt'] if improved else []
                names += [f'ckpt_{step:06d}.pt'] if settings['keep'] else []
                save(step, *names, 'ckpt_last.pt')  # the last one last: a run killed in between evaluates this step again
                kept = sorted(out_dir.glob('ckpt_[0-9]*.pt'), key=lambda path: (len(path.name), path))
                for old in kept[:-settings['keep']]:  # none where keep is 0: [:-0] is empty
                    old.unlink(missing_ok=True)
                if settings['pictures'] and is_main():
                    import sample
                    with tqdm.external_write_mode():  # and without a name: a second model is not to stay in memory
                        sample.draw(load_model(out_dir / 'ckpt_last.pt')[0].to(device), folder, meta,
                                    out_dir / f'sample_{step:06d}.png')
            reached = val_loss <= settings['target_loss'] > 0
            if reached and is_main():
                tqdm.write(f'val_loss {val_loss:.4f} <= target_loss after {int(tokens):,} tokens, {seconds:.1f} s')
            if step == settings['max_iters'] or reached:
                break
            since = time.perf_counter()

        # asked to stop: between two lines of the log, so that it continues without a seam
        if step > start and step % settings['log_interval'] == 0 and any_process(asked, device):
            save(step, 'ckpt_last.pt')
            if is_main():
                without = ', without --init_from=scratch,' if settings['init_from'] == 'scratch' else ''
                tqdm.write(f'stopped by signal after step {step}; the same command{without} goes on from here')
            return {'stopped': asked[0] if asked else signal.SIGTERM}

        # one step: the gradient of the mean over all micro-batches of all processes
        for j in mine:
            began = time.perf_counter()
            batch = to_device(next(batches), device)
            waited += time.perf_counter() - began
            shapes = tuple(tensor.shape for tensor in batch.values() if tensor.ndim > 1)  # not R, always another
            if shapes not in flops:
                flops[shapes] = count_flops(ghost, to_device(batch, torch.device('meta')))
            work += flops[shapes]
            torch.manual_seed(settings['seed'] + step * n_micro + j)  # dropout
            with summed(model, j == mine[-1]):
                total = add_logs(total, passes(batch))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = clip(raw_model, settings['grad_clip'])
        if math.isfinite(norm):
            set_rates(optimizers, settings, step)
            finish()
        else:
            skipped += 1
            hopeless = scaler.get_scale() < 1 if scaler.is_enabled() else skipped > settings['skip']  # at 1 nothing overflows
            if hopeless:
                save(step, 'ckpt_fault.pt')
                samples = train_data.ids(step * settings['batch_size'], settings['batch_size'])
                log({'step': step, 'grad_norm': str(norm), 'samples': samples})
                raise UserError(f'step {step}: the gradient is not finite ({norm}). The state before it is in '
                                f'{out_dir}/ckpt_fault.pt, its samples in log.jsonl; lower the learning rates, or leave such '
                                'steps out by --skip=10')
            scaler.update()  # float16: a lower scale
            raw_model.zero_grad(set_to_none=not graphs)
        if settings['ema']:
            follow(mean, raw_model, settings['ema'], step)
        bar.update()

        # log; before an evaluation too, whose time and step are so kept apart
        done = step + 1
        if done == settings['max_iters'] or not done % settings['log_interval'] or not done % settings['eval_interval']:
            now = time.perf_counter()
            values, count = means(total)
            took, tokens = now - since, tokens + count
            seconds += took
            line = {'step': done, 'tokens': int(tokens), 'seconds': round(seconds, 2), 'train_loss': loss_of(values),
                    'lr': settings['learning_rate'] * schedule(step, settings),
                    'grad_norm': norm if math.isfinite(norm) else str(norm),
                    'tokens_per_second': round(count / took), 'mfu': round(work / took / limit, 4),
                    'data_wait': round(waited / took, 4)} | ({'skipped': skipped} if skipped else {})
            log(line | {name: value for name, value in values.items() if name != 'loss'})
            shown = dict(loss=f'{line["train_loss"]:.3f}', tok_s=f'{line["tokens_per_second"]:,}', mfu=f'{line["mfu"]:.0%}')
            bar.set_postfix(shown, refresh=False)
            total, work, waited, since = {}, 0, 0.0, now
    bar.close()
    if is_main():
        print(f'{step} steps, {int(tokens):,} tokens, {seconds:.1f} s of training; val_loss {val_loss:.4f}, best {best:.4f}; '
              f'see {out_dir}')
    return values


if __name__ == '__main__':
    stopped = config.run(main, 'stopped at once; the same command goes on from the last checkpoint').get('stopped')
    sys.exit(128 + stopped if stopped else 0)
