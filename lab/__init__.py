"""
Work with trained models. Each chapter X.py has a module lab/X.py, which generates, draws and scores:

    run = lab.open_run(Path('out/gpt_mnist/ckpt_last.pt'))
    module = lab.module_of(run.model)            lab/gpt.py
    settings = module.settings_of(run)           a dataclass: how this model generates, with defaults that fit it
    module.draw(run, settings, Path('x.png'))    an image at this path; or texts, printed and returned
    module.score(run, module.scores_of(run))     yields {metric: score}, piece by piece

For a model of your own, mine.py, write lab/mine.py with `settings_of` and `draw`; nothing has to be registered.
"""
import importlib
from dataclasses import dataclass
from pathlib import Path

import config  # before torch, see config/__init__.py
from config import UserError

import numpy as np
import torch

from engine import checkpoints, devices, graphs
from gpt import KVCache  # not `import gpt`: lab.gpt is lab/gpt.py
from prepare import arrays

HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# A run

@dataclass
class Run:
    """A trained model and its data."""
    path: Path              # its checkpoint
    model: torch.nn.Module  # on the device, in evaluation mode
    checkpoint: dict
    folder: Path            # data/NAME
    meta: dict              # of the data that it was trained on
    dataset: object         # decodes, draws and scores its modalities: `Dataset` of prepare/NAME.py
    split: str = 'val'      # where held-out samples come from
    dtype: str = 'auto'     # of autocast

    @property
    def device(self):
        return next(self.model.parameters()).device

    def exact(self):
        return exact(self.device, self.dtype)

    def ids(self, name, index):
        """Token ids of held-out samples, int64."""
        return torch.from_numpy(self.dataset.load(self.split, name)[index].astype(np.int64))

    def data(self):
        """The split as arrays of the fields that the model reads. Raises UserError."""
        block_size = getattr(self.model.config, 'block_size', 0)
        return arrays.Data(self.folder, self.split, self.meta, self.model.batch_keys, block_size)


def open_run(path, device='auto', split='val', dtype='auto'):
    """The run with this checkpoint; its data must be those of its training. Raises UserError."""
    model, checkpoint = checkpoints.load_model(path)
    model.to(devices.find(device))
    folder, meta = Path('data', checkpoint['settings']['dataset']), checkpoint['meta']
    if checkpoint['step']:  # otherwise downloaded weights, with their own tokenizer
        if not folder.is_dir():
            raise UserError(f'{folder} is missing, the data of this run, with its tokenizer: copy it from where '
                            f'the run was trained, or make it in the same way (python -m prepare.{meta["prepare"]})'
                            + config.elsewhere())
        arrays.agree(folder, arrays.read_meta(folder), checkpoint)
        splits = sorted(part.name for part in folder.glob('*/'))
        if split not in splits:
            raise UserError(f'split={split!r}: {folder} has {", ".join(splits)}')
    run = Run(Path(path), model, checkpoint, folder, meta, arrays.open_dataset(folder, meta), split, dtype)
    run.dataset.device = device  # for a judge that it may have to train first
    graphs.graph_decoding(model)
    return run


def chapter_of(model):
    return type(model).__module__


def module_of(model):
    """lab/NAME.py of a model, or of a chapter by its name. Raises UserError if there is none."""
    name = model if isinstance(model, str) else chapter_of(model)
    if not (HERE / f'{name}.py').is_file():
        raise UserError(f'there is no lab/{name}.py yet, which generates and draws for model={name!r}: docs/yours.md '
                        'shows how to write one; --pictures=False trains without it')
    return importlib.import_module(f'lab.{name}')


def draw(model, folder, meta, path):
    """The samples of train.py after an evaluation: an image at `path`, or a text beside it."""
    run = Run(path, model, {}, folder, meta, arrays.open_dataset(folder, meta))
    module = module_of(model)
    settings = module.settings_of(run)
    if hasattr(settings, 'max_new_tokens'):
        settings.max_new_tokens = 300  # shorter than in sample.py, to save time
    graphs.graph_decoding(model)
    texts = module.draw(run, settings, path)
    if texts:
        path.with_suffix('.txt').write_text(texts[0], encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# Precision and compilation

def exact_dtype(device, name='auto'):
    """The dtype of generation; 'auto' is float32 on a CPU, where generating one token at a time is not faster in
    bfloat16."""
    return torch.float32 if name == 'auto' and device.type == 'cpu' else devices.find_dtype(name, device)


def exact(device, name='auto'):
    """The autocast of generation."""
    return devices.autocast(device, exact_dtype(device, name))


def in_exact(run, stream):
    """The items of a generator, each computed within run.exact(). Autocast must not be held around a yield: the next
    item may be asked for from another thread."""
    while True:
        with run.exact():
            item = next(stream, None)
        if item is None:
            return
        yield item


def compile_passes(model, dtype='auto'):
    """Compiles the blocks of a model permanently; returns whether a compiler works. `update`, which has a dictionary of
    layers, is not compiled: otherwise each layer would be compiled separately. Raises UserError for a model without
    blocks."""
    blocks = [module for module in model.modules() if devices.is_block(module)]
    if not blocks:
        raise UserError('compile is for Transformers, and this model is none: leave it out')
    device = next(model.parameters()).device
    if not graphs.compile_blocks(model, device):
        return False
    for kind in KVCache, graphs.GraphedCache:
        kind.update = torch.compiler.disable(kind.update)
    model.requires_grad_(False)  # a likelihood of chapter 4 takes the gradient for its inputs only,
    torch._functorch.config.donated_buffer = False  # several times per forward pass
    if hasattr(model, 'stream'):  # always within `exact`, and compiled code would cast the weights again in each pass
        for block in blocks:
            block.to(exact_dtype(device, dtype))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Parts that several chapters share

def read_lines(path):
    """The lines of a file of prompts or questions. Raises UserError."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')  # without a byte order mark
        if '\0' in text:
            raise ValueError('it holds zero bytes, as UTF-16 does')
    except ValueError as error:
        raise UserError(f'{path}: not UTF-8 text ({error}); write one prompt a line')
    if not text:
        raise UserError(f'{path}: no prompts; write one a line')
    return text.removesuffix('\n').split('\n')  # not splitlines(), which also cuts at form feeds and U+2028


def left_pad(rows):
    """Lists of ids -> (n, longest), shorter ones padded with -1 on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + row for row in rows])


def grey_out(images, tokens, grid):
    """Makes the patches of unknown tokens (n, N) of a grid grey in images (n, H, W, 3) uint8."""
    rows, columns = (np.arange(side) * n // side for side, n in zip(images.shape[1:], grid))
    unknown = (tokens < 0).view(-1, *grid).numpy()[:, rows][:, :, columns, None]
    return np.where(unknown, np.uint8(128), images)
