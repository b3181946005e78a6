"""
The speed of a config on this machine: a training step part by part, eager and compiled, and generation.

    python -m lab.speed config/nano4m.py                       takes the config's settings too: --n_embd=256
    python -m lab.speed config/nano4m.py --trace=step.json
    python -m lab.speed --all=True                             every config, to out/bench_all.json and out/bench_all.md
    python -m lab.speed --all=True config/nano4m.py config/flow_mnist.py

First the peaks of the machine are measured: large matrix products in each dtype that it computes natively, and copies.
FLOPs are counted operator by operator. `of limit` is the FLOP/s of the step over that of the large product. `of roof`
is the FLOP/s of the step over that of its own matrix products, run one after the other with nothing between them.
Times are medians, `+-` half of the interquartile range. Missing data, and weights that a script or a config makes, are
replaced by random values of the same shapes.

With --all=True each config has its own process: if one does not fit in memory, the others are still measured.
"""
import copy
import functools
import itertools
import multiprocessing
import re
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import config
import lab
from config import UserError
from engine import batches, devices, graphs, optimizers
from lab import dummy_data, timing
from lab.dummy_data import resolve
from lab.timing import timed
from prepare import arrays

SETTINGS = dict(
    all=False,                # every file of config/, or those named, in two variants each: the slowest and the fastest
    device='auto',            # cuda, mps or cpu
    repeats=5,                # number of timed steps
    seconds=10.0,             # a micro-batch that would take longer at the machine's peak is cut
    save='',                  # write the tables as SAVE.json and SAVE.md; with --all=True '' is out/bench_all
    trace='',                 # write a profile of a step, to be opened at ui.perfetto.dev
)


# ---------------------------------------------------------------------------------------------------------------------
# A config's model and data

@contextmanager
def built(assigned, device):
    """(settings, model, data) as in training; random values if the data are missing."""
    options, chapter = resolve(assigned)
    name, block_size = options['dataset'], options.get('block_size', 0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare:
        folder = Path('data', name)
        if not (folder / 'meta.json').is_file():
            folder = Path(spare)
            dummy_data.write(folder, name, block_size)
            print(f'data/{name} is not there: random values of the same shapes instead', flush=True)
        meta = arrays.read_meta(folder)
        torch.manual_seed(options['seed'])
        model = config.build(chapter, options, meta, {}).to(device)
        devices.set_up(device, length=devices.context_length(model))
        optimizers.freeze(model, options['lr_multipliers'])
        yield options, model, arrays.Data(folder, 'train', meta, model.batch_keys, block_size)


def dtypes_of(peaks):
    """The dtypes that are measured, the fastest last."""
    return [dtype for dtype in peaks if dtype != 'copy']


def find_job(options, model, data, settings, device, peaks):
    """The arguments of batches.micro_batch. The micro-batch is made smaller if it would take longer than `seconds` at
    peak FLOP/s."""
    one = options | dict(batch_size=1, micro_batch_size=1)
    flops = devices.count_flops(model, batches.to_device(batches.micro_batch(data, model, one, 0, 0), device))
    fitting = int(settings['seconds'] * peaks[dtypes_of(peaks)[-1]] / flops)
    return data, model, options | dict(micro_batch_size=max(1, min(options['micro_batch_size'], fitting))), 0, 0


# ---------------------------------------------------------------------------------------------------------------------
# A training step

class Steps:
    """Training steps as in train.py, always of the first micro-batch. With `graphed`, forward and backward pass are
    one part, `both`."""
    def __init__(self, model, job, options, device, dtype, graphed):
        self.model, self.options, self.device, self.dtype, self.graphed = model, options, device, dtype, graphed
        self.clock, self.losses = timing.Clock(device), []
        self.batches = batches.prefetched(batches.micro_batch, itertools.repeat(job), device)
        self.optimizers, self.scaler = optimizers.make(model, options, dtype), torch.amp.GradScaler(enabled=False)
        self.ema_model = copy.deepcopy(model) if options['ema'] else None
        self.passes = self.whole_pass if graphed else self.timed_pass
        self.finish = functools.partial(optimizers.optimizer_step, self.optimizers, self.scaler,
                                        set_to_none=not graphed)
        if graphed:
            optimizers.lr_on_device(self.optimizers, device)
            self.passes, self.finish = graphs.GraphedSteps(self.passes), graphs.GraphedSteps(self.finish)

    def whole_pass(self, batch, part=lambda name: nullcontext()):
        """(loss, tokens); adds to the gradients."""
        with part('forward'), devices.autocast(self.device, self.dtype):
            loss, logs = self.model(batch)
        with part('backward'):
            loss.backward()
        return loss.detach(), logs['tokens'][0]

    def timed_pass(self, batch):
        return self.whole_pass(batch, self.clock.part)

    def step(self):
        """One step; returns its tokens, on the device."""
        with self.clock.part('data'):
            batch = batches.to_device(next(self.batches), self.device)
        with self.clock.part('both') if self.graphed else nullcontext():
            loss, tokens = self.passes(batch)
        with self.clock.part('optimizer'):
            optimizers.clip(self.model, self.optimizers, self.scaler, self.options['grad_clip'])
            optimizers.set_lr(self.optimizers, self.options, 0)
            self.finish()
            if self.ema_model:
                optimizers.update_ema(self.ema_model, self.model, self.options['ema'], 0)
        self.losses.append(loss.clone())
        return tokens

    def held_bytes(self):
        """Bytes of weights, buffers, EMA and optimizer states."""
        held = [*self.model.parameters(), *self.model.buffers(),
                *(self.ema_model.parameters() if self.ema_model else ())]
        held += [x for optimizer in self.optimizers for state in optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in held)


def time_steps(steps, settings):
    """dict(seconds={part: one per repeat}, memory in bytes, tokens, losses of the first five steps)."""
    for _ in range(4 if steps.graphed else 2):  # compiles, captures
        tokens = float(steps.step())
    steps.clock.marks.clear()
    for _ in range(settings['repeats']):
        steps.step()
    seconds, losses = steps.clock.seconds(), torch.stack(steps.losses[:5]).tolist()
    memory = steps.held_bytes() + timing.peak_bytes(steps.step, steps.device)
    if settings['trace']:
        timing.write_trace(settings['trace'], steps.step)
    return dict(seconds=seconds, memory=memory, tokens=tokens, losses=losses)


def step_row(name, variant, options, measured, flops, roof, peak):
    """A row of the table: a step is `scale` of the measured micro-batches and the optimizer."""
    (dtype, compiled, graphed), size, samples = variant, options['micro_batch_size'], options['batch_size']
    scale, parts = samples / size, dict(measured['seconds'])
    optimizer = np.median(parts.pop('optimizer'))
    passes = scale * sum(parts.values())  # one per repeat
    without = np.median(passes)
    whole = without + optimizer
    names = ('data', 'forward', 'backward', 'both') if torch.cuda.is_available() else ('data', 'forward', 'backward')
    shares = {f'{part} %': 100 * scale * np.median(parts[part]) / whole if part in parts else '' for part in names}
    return {'config': name, 'format': str(dtype)[6:],
            'compiled': 'and a graph' if graphed else 'yes' if compiled else 'no',
            'samples': f'{size} of {samples}', 'ms a step': 1000 * whole, '+-': timing.spread(passes),
            'samples/s': samples / whole, 'tokens/s': scale * measured['tokens'] / whole, 'GFLOP': scale * flops / 1e9,
            'of limit %': 100 * scale * flops / whole / peak, 'of roof %': 100 * scale * roof / whole,
            'of roof % without optimizer': 100 * scale * roof / without, **shares,
            'optimizer %': 100 * optimizer / whole,
            'MiB': '' if graphed else measured['memory'] / 2 ** 20}  # a graph has its own memory


def find_variants(dtypes, settings, device):
    """[(dtype, compiled, by CUDA graphs), ...]: each dtype, eager and compiled; with --all=True the slowest and the
    fastest."""
    variants = [(dtype, compiled, False) for compiled in (False, True) for dtype in dtypes]
    variants = [variants[0], variants[-1]] if settings['all'] else variants
    return variants + ([(dtypes[-1], True, True)] if device.type == 'cuda' else [])


def bench_steps(name, options, model, data, settings, device, peaks):
    """Rows, one for each variant. Asserts that all variants have the same losses."""
    job = find_job(options, model, data, settings, device, peaks)
    flops, products = timing.count_products(model, batches.to_device(batches.micro_batch(*job), device))
    roofs = {dtype: timing.roof_seconds(products, device, dtype) for dtype in dtypes_of(peaks)}
    rows, expected, start = [], None, copy.deepcopy(model.state_dict())
    works = functools.cache(lambda: options['compile'] and graphs.compile_blocks(model, device))
    for variant in find_variants(dtypes_of(peaks), settings, device):
        dtype, compiled, graphed = variant
        if compiled and not works():
            continue
        model.load_state_dict(start)
        torch.manual_seed(0)
        measured = time_steps(Steps(model, job, options, device, dtype, graphed), settings)
        losses = measured['losses']
        expected = expected or losses
        assert all(abs(a - b) < 0.05 * abs(b) for a, b in zip(losses, expected)), f'{name}: {losses}, not {expected}'
        rows.append(step_row(name, variant, job[2], measured, flops, roofs[dtype], peaks[dtype]))
        timing.show(rows[-1], len(rows) == 1)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def generation(model, B):
    """(a function that generates B samples, number of units, their name, number of forward passes); None for a chapter
    without a case here."""
    device, c = next(model.parameters()).device, model.config
    zeros = torch.zeros(B, 1, dtype=torch.long, device=device)
    match lab.chapter_of(model):
        case 'gpt':
            n = min(c.block_size - 1, 64)
            return lambda: model.generate(zeros, n), B * n, 'tokens', n
        case 'maskgit':
            classes = zeros[:, 0] if c.n_classes else None
            return lambda: model.generate(zeros.expand(-1, model.N) - 1, classes, steps=8), B * model.N, 'tokens', 8
        case 'fourm':
            given, wanted = model.modalities[:2]
            given = {given.name: zeros.expand(-1, given.max_tokens)}
            return lambda: model.generate(given, [wanted.name], 8), B * wanted.max_tokens, 'tokens', 8
        case 'flow':
            return lambda: model.generate(zeros[:, 0], steps=20), B, 'samples', 20
        case 'vlm':
            images = torch.zeros(B, 1, c.image_size, c.image_size, c.channels, device=device)
            return lambda: model.generate(zeros, model.prefill(zeros + c.image_token, images), 16), B * 16, 'tokens', 17


def bytes_of_weights(model):
    """Bytes of weights that each forward pass reads: all matrices of products, in the dtype of generation."""
    device, tables = next(model.parameters()).device, {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    size = 4 if device.type == 'cpu' else devices.find_dtype('auto', device).itemsize
    return size * sum(p.numel() for p in model.parameters() if p not in tables - heads)


def bench_generation(name, compiles, model, settings, device, peaks):
    """Rows: latency and throughput by batch size, at the defaults of a chapter's `generate`, eager and compiled."""
    if not generation(model, 1):
        print(f'{name}: no generation is timed: `generation` in lab/speed.py has no case for '
              f'{lab.chapter_of(model)}.py')
        return []
    rows, weights = [], bytes_of_weights(model.eval())
    graphs.graph_decoding(model)
    for compiled in (False, True) if compiles else (False,):
        if compiled and not lab.compile_passes(model):
            break
        with lab.exact(device), torch.compiler.set_stance('default' if compiled else 'force_eager'):
            for B in (1, 8, 32):
                run, n, what, rounds = generation(model, B)
                time = timed(run)
                rows.append({'config': name, 'compiled': 'yes' if compiled else 'no', 'batch': B,
                             'ms': 1000 * time.median, '+-': timing.spread(time.times), 'what': what,
                             'a second': n / time.median,
                             'weights of copy rate %': 100 * rounds * weights / time.median / peaks['copy']})
                timing.show(rows[-1], len(rows) == 1)
                if time.median > settings['seconds'] / 8:  # the next would take too long
                    break
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# One config, or every one

def out_of_memory(error):
    """Whether a GPU, Python or PyTorch's allocator on the CPU had no memory left."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or bool(re.search('DefaultCPUAllocator: .* memory: you tried to allocate', str(error))))


def measure(name, assigned, settings, peaks):
    """Both tables of one config. Raises UserError."""
    device = devices.find(settings['device'])
    try:
        with built(assigned, device) as (options, model, data):
            steps = bench_steps(name, options, model, data, settings, device, peaks)
        devices.set_up(device, training=False)
        compiles = options['compile'] and not settings['all'] and any(map(devices.is_block, model.modules()))
        rows = bench_generation(name, compiles, model, settings, device, peaks)
        return {'Training steps': steps} | ({'Generation': rows} if rows else {})
    except Exception as error:
        if out_of_memory(error):
            raise UserError(f'{name} does not fit in memory: lower micro_batch_size')
        raise


def attempt(path, settings, peaks):
    """The tables of one config; if it cannot be measured, a table with the reason."""
    try:
        return measure(Path(path).stem, config.read([path]), settings, peaks)
    except (UserError, OSError) as error:
        return left_out(path, str(error))
    except Exception as error:
        traceback.print_exc()
        return left_out(path, f'{type(error).__name__}, see above')


def left_out(path, why):
    print(f'{path}: {why}', flush=True)
    return {'Left out': [{'config': Path(path).stem, 'why': why}]}


def in_child(function, *arguments):
    """function(*arguments) in a process of its own. Raises BrokenProcessPool if the system ends it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(paths, settings, peaks, tables):
    """Adds the rows of each config to the tables and saves them. A config that fails or is killed is reported and left
    out."""
    for path in paths:
        print(f'\n{Path(path).stem}', flush=True)
        try:
            found = in_child(attempt, path, settings, peaks)
        except BrokenProcessPool:
            found = left_out(path, 'the system ended its process, most likely for want of memory: lower '
                                   'micro_batch_size')
        for title, rows in found.items():
            tables.setdefault(title, []).extend(rows)
        timing.save(settings['save'], tables)


def wanted(arguments, overrides):
    """Whether a command of bench.py is for this program: it names a config, or sets `all`."""
    named = [argument for argument in map(str, arguments)
             if not argument.startswith('-') or argument.startswith('--all=')]
    return bool(named) or 'all' in overrides


def read(arguments, overrides):
    """(settings, settings of the config, config files). Raises UserError."""
    assigned = config.read(arguments, overrides)
    files = [path for path in map(str, arguments) if not path.startswith('--')]
    settings = config.apply({name: assigned.pop(name) for name in SETTINGS if name in assigned}, SETTINGS)
    if settings['all']:
        if extra := [name for name, (_, where) in assigned.items() if where not in files]:
            raise UserError(f'{extra[0]}: with --all=True configs are measured as they are; leave it out')
        settings['save'] = settings['save'] or 'out/bench_all'
        return settings, {}, files or config.files()
    if not files:
        raise UserError('name a config, such as config/nano4m.py, or --all=True for every one')
    resolve(assigned)  # a misspelt setting stops here
    if ignored := [name for name in ('dtype', 'graphs', 'shard') if assigned.get(name, ('', files[0]))[1] not in files]:
        raise UserError(f'{ignored[0]}: leave it out; every dtype and CUDA graphs are measured, on one device')
    return settings, assigned, files


@torch.inference_mode(False)
def main(*arguments, **overrides):
    settings, assigned, files = read(arguments, overrides)
    timing.make_folders(settings['save'], settings['trace'])
    device = devices.find(settings['device'])
    devices.set_up(device)
    if not settings['all'] and (number := resolve(assigned)[0]['threads']):
        torch.set_num_threads(number)
    peaks = timing.find_peaks(device)
    tables = {'Machine': [timing.machine_row(device, peaks)]}
    timing.show(tables['Machine'][0], True)
    if settings['all']:
        return measure_all(files, settings, peaks, tables)
    tables |= measure(Path(files[-1]).stem, assigned, settings, peaks)
    if settings['save']:
        timing.save(settings['save'], tables)


if __name__ == '__main__':
    config.run(main)
