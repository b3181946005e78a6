"""
What things cost on this machine, beside what it can do at most.

    python bench.py                        the attention core by length and by config, against the formula and the kernel alone
    python bench.py config/nano4m.py       a training step of this config and generation with its model; takes its settings too
    python bench.py --all=True             the same of every config, or of those named, to out/bench_all.json and .md
    python bench.py --part=generation      a comparison: generation, unmasking, cross_entropy, padding, answers
    python bench.py --part=speculation --run=gpt_shakespeare --draft=gpt_draft

First of all the limits are measured: large matrix products in each number format that the machine computes natively, and copies.
FLOPs are counted operator by operator. `of limit` is their rate over that of the large product; `of roof` over that of the
config's own matrix products, run one after the other without anything between them: what is missing to 100 % is not matmul.
Times are medians, `+-` half of the distance between their quartiles. Data that is not there is replaced by random numbers.

The comparisons: generation with a KV cache against running the whole context for every token, by batch, and compiled; pictures of 49
tokens unmasked in a few steps against a GPT with its cache; a large vocabulary with all logits at once against chunks of rows;
nano4M with every slot filled and codes by their digits against padded slots and one head for all codes; 32 questions about four
pictures, each looked at once, against all anew for each token; a text with a draft's guesses against without. Both sides compute
the same.
"""
import collections
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import config
import fourm
import gpt
import maskgit
import sample
import train
from config import UserError
from gpt import GPT, Attention, Config, KVCache, cross_entropy, norm, rotary
from prepare import stand_in
from vlm import VLM
from vlm import Config as VLMConfig

SETTINGS = dict(
    all=False,                # every file of config/
    part='',                  # one of the comparisons
    device='auto',
    backend='',               # of the attention kernel: flash,cudnn,efficient,math or some of them; '' is all on a GPU
    seconds=10.0,             # a micro-batch that would take longer at the machine's limit is cut
    repeats=5,                # times that each thing is timed, at least
    save='',                  # write the tables as SAVE.json and SAVE.md
    trace='',                 # write a profile for ui.perfetto.dev
    plot='',                  # of the attention core: a roofline picture
)
SIZES = dict(                 # of the comparisons
    n_layer=6, n_head=4, n_embd=256,
    n_kv_head=0,              # fewer heads of keys and values make the cache smaller; 0 is n_head
    max_new_tokens=1000,      # generated in a context of 1,024
    vocab_size=65536,         # of the cross-entropy
    rows=4096,
    samples=8,                # in a step of nano4M
    run='gpt_shakespeare', draft='gpt_draft',  # of speculation: a trained GPT and a small one
    temperature=0.8,          # of speculation
)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def times_of(run, device, least, seconds=0.2):
    """Times of run(), which has run before: at least so many, and more while `seconds` are not used up. Where a GPU takes less
    than 10 ms, of several runs in a row: while it computes one, the host already calls the next."""
    def once(n):
        train.synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            run()
        train.synchronize(device)
        return (time.perf_counter() - start) / n
    n = math.ceil(0.01 / once(1)) if device.type == 'cuda' else 1
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        times.append(once(n))
    return times


def median_seconds(run, device, repeats):
    run()
    return statistics.median(times_of(run, device, repeats, 0))


def spread(times):
    """Half of the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return (high - low) / 2


@contextmanager
def silent():
    """Nothing from PyTorch's C++ on stderr: the profiler announces there that it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(run, device):
    """Bytes of tensors that run() allocates, at their most; on a CPU the profiler's list of allocations tells."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with silent(), profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = sorted((event for event in trace.profiler.kineto_results.events() if event.name() == '[memory]'),
                    key=lambda event: event.start_ns())
    total = most = 0
    for event in events:
        total += event.nbytes()
        most = max(most, total)
    return most


def find_limits(device):
    """What this machine does at most: FLOP/s of matrix products by number format, bytes/s of a copy, read and written."""
    native = train.find_dtype('auto', device)
    if native == torch.float32:
        print('bfloat16 is not native here: float32 alone is measured')
    limits = {dtype: train.matmul_rate(device, dtype) for dtype in dict.fromkeys((torch.float32, native))}
    x = torch.empty(2 ** 28 if device.type == 'cuda' else 2 ** 25, device=device)  # float32, larger than any cache
    y = x.clone()
    return limits | {'copy': 2 * x.nbytes / min(times_of(lambda: y.copy_(x), device, 5))}


def machine_row(device, limits):
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'{device.type}, {torch.backends.cpu.get_cpu_capability()}'
    rates = {f'matmul in {str(dtype)[6:]}, GFLOP/s': rate / 1e9 for dtype, rate in limits.items() if dtype != 'copy'}
    return {'device': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__, **rates,
            'copy, GB/s': limits['copy'] / 1e9}


def cell(value):
    if not isinstance(value, float):
        return str(value)
    return f'{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}'


def show(row, first):
    """A row {column: value} as a line of a Markdown table, below its head where it is the first."""
    if first:
        print('| ' + ' | '.join(row) + ' |\n|' + '---|' * len(row))
    print('| ' + ' | '.join(map(cell, row.values())) + ' |', flush=True)


def save(path, tables):
    """Tables {title: list of rows} as PATH.json and PATH.md."""
    lines = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [f'### {title}', '', '| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
        lines += ['| ' + ' | '.join(cell(row.get(name, '')) for name in columns) + ' |' for row in rows] + ['']
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f'{path}.md').write_text('\n'.join(lines))
    Path(f'{path}.json').write_text(json.dumps(tables, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# The attention core

BACKENDS = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION,
                math=SDPBackend.MATH)
LENGTHS = (64, 256, 1024, 4096)
CONFIGS = {  # what the shipped configs ask of it: kind, batch, queries, keys, heads, head size
    'gpt_shakespeare': ('causal', 16, 256, 256, 6, 32), 'gpt_tinystories': ('causal', 16, 256, 256, 4, 64),
    'maskgit_mnist': ('full', 64, 49, 49, 4, 32), 'nano4m reads': ('full', 16, 64, 64, 4, 32),
    'nano4m answers': ('cross', 16, 256, 64, 4, 32), 'nano4m_multiclevr': ('full', 128, 128, 128, 8, 64),
    'flow_scenes': ('full', 32, 64, 64, 4, 32), 'vlm_scenes': ('causal', 16, 222, 222, 4, 32),
}


def find_cases(device):
    """{name: kind, batch, queries, keys, heads, head size}; the same number of tokens at each length."""
    tokens, heads = (16384, (16, 64)) if device.type == 'cuda' else (4096, (4, 64))
    cases = {f'{kind} {T}': (kind, tokens // T, T, T, *heads) for kind in ('causal', 'full', 'cross') for T in LENGTHS}
    cases |= {f'prefill {T}': ('prefill', 1, T, T, *heads) for T in LENGTHS}
    cases |= {f'decode {T}': ('decode', 1, 1, T, *heads) for T in LENGTHS}
    wide = {f'{kind} 4096, head 128': (kind, tokens // 4096, 4096, 4096, heads[0] // 2, 128) for kind in ('causal', 'full')}
    return cases | wide | CONFIGS


def softmax_attention(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula as it is written (arXiv 1706.03762, equation 1), with all T x S weights at once."""
    logits = q @ k.mT * scale  # (B, nh, T, S)
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return logits.softmax(-1).type_as(v) @ v


@functools.cache
def causal_blocks(T, device):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


@functools.cache
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64  # one for each kind of case; beyond it, it would be timed uncompiled
    return torch.compile(flex_attention)


def flex(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    blocks = causal_blocks(q.size(2), q.device) if is_causal else None
    return compiled_flex()(q.type_as(v), k.type_as(v), v, block_mask=blocks, scale=scale)


def find_ways(text, device):
    """{name: a context in which the core computes attention that way}. Raises UserError."""
    here = list(BACKENDS) if device.type == 'cuda' else ['flash', 'math']
    chosen = text.split(',') if text else here if device.type == 'cuda' else []  # a CPU's core is flash, its math the formula
    if unknown := [name for name in chosen if name not in here]:
        raise UserError(f'backend={unknown[0]!r}: on {device.type} there are {", ".join(here)}')
    ways = {'core': nullcontext, 'written out': lambda: mock.patch.object(F, 'scaled_dot_product_attention', softmax_attention)}
    ways |= {name: lambda name=name: sdpa_kernel(BACKENDS[name]) for name in chosen}
    if device.type == 'cuda' and not text:
        ways['flex'] = lambda: mock.patch.object(F, 'scaled_dot_product_attention', flex)
    return ways


def passes(forward, inputs, dtype):
    """A function that computes forward() and, where the inputs ask for them, all gradients."""
    def run():
        with train.autocast(inputs[0].device, dtype), torch.set_grad_enabled(inputs[0].requires_grad):
            y = forward()
        for x in inputs:
            x.grad = None
        if not y.requires_grad:
            return [y]
        y.backward(y.detach())  # any gradient will do
        return [y, *(x.grad for x in inputs)]
    return run


def make_core(kind, B, T, S, heads, head_size, device, dtype):
    """(the core of gpt.py, the kernel alone, its forward pass) as such functions, in training forward and backward, in generation
    forward."""
    torch.manual_seed(0)
    D, trains = heads * head_size, kind not in ('prefill', 'decode')
    core = Attention(D, heads, cross=kind == 'cross').to(device).requires_grad_(trains)
    nn.init.normal_(core.out.weight, std=D ** -0.5)
    x, context = (torch.randn(B, n, D, device=device, requires_grad=trains) for n in (T, S))
    turn = torch.stack(rotary(torch.arange(max(T, S), device=device)[:, None], head_size, 10000.0))  # (2, max(T, S), hd / 2)
    options, inputs = dict(causal=kind in ('causal', 'prefill')), [x, *core.parameters()]
    if kind == 'cross':
        options |= dict(context=context, context_turn=turn[:, :S])
        inputs.append(context)
    if not trains:
        options['cache'] = KVCache(S)
        options['cache'].append(core, *torch.randn(2, B, heads, S, head_size, device=device, dtype=dtype))
        options['cache'].filled = S - T
    q, k, v = (torch.randn(B, heads, n, head_size, device=device, dtype=dtype, requires_grad=trains) for n in (T, S, S))

    def kernel():
        return F.scaled_dot_product_attention(q, k, v, is_causal=options['causal'], scale=12 / head_size)
    return (passes(lambda: core(x, turn[:, -T:], **options), inputs, dtype), passes(kernel, [q, k, v], dtype),
            passes(kernel, [x.detach() for x in (q, k, v)], dtype))


def cost_of_core(kind, B, T, S, heads, head_size, dtype):
    """FLOPs of the products, half of attention's where it is causal; attention's alone, in the forward pass; and the fewest
    bytes: each number read or written once."""
    D, rounds = heads * head_size, 1 if kind in ('prefill', 'decode') else 3  # backward is twice forward
    projections = 4 * B * (T + (S if kind == 'cross' else T)) * D * D
    attention = 4 * B * T * S * D // (2 if kind in ('causal', 'prefill') else 1)
    numbers = 2 * B * T * D + 4 * D * D + B * S * D * {'cross': 1, 'decode': 2}.get(kind, 0)
    return rounds * (projections + attention), attention, rounds * numbers * dtype.itemsize


def measure_core(name, case, ways, device, dtype, limits, repeats):
    """A row of the table: the core, then what else computes the same."""
    core, kernel, forward = make_core(*case, device, dtype)
    flops, attention, moved = cost_of_core(*case, dtype)
    row, expected = {'case': name}, core()
    for way, context in ways.items():
        if way == 'flex' and (case[0] not in ('causal', 'full') or case[2] < 1024):
            row['flex ms'] = ''  # to compile it takes seconds each time, and it has never been the fastest
            continue
        with context():
            try:
                differ = max(((a - b).norm() / b.norm()).item() for a, b in zip(core(), expected))
                assert differ < (1e-3 if dtype == torch.float32 else 0.1), f'{name}: {way} differs by {differ:.1e}'
                times, most = times_of(core, device, repeats), peak_bytes(core, device)
            except RuntimeError:  # no such kernel for these shapes, or not enough memory
                row |= dict.fromkeys(('written out ms', 'times', 'its MiB') if way == 'written out' else (f'{way} ms',), '-')
                continue
        ms = 1000 * statistics.median(times)
        if way == 'core':
            rate = flops / ms * 1000
            row |= {'ms': ms, '+-': 1000 * spread(times), 'GFLOP/s': rate / 1e9, 'of limit %': 100 * rate / limits[dtype],
                    'FLOP/byte': flops / moved, 'MiB': most / 2 ** 20}
            row['kernel alone ms'] = 1000 * median_seconds(kernel, device, repeats)
            row['its forward ms'] = 1000 * median_seconds(forward, device, repeats)
            rate = attention / limits[dtype] * 1000
            row['kernel of limit %'] = 100 * rate * (1 if case[0] in ('prefill', 'decode') else 3) / row['kernel alone ms']
            row['its forward %'] = 100 * rate / row['its forward ms']
        elif way == 'written out':
            row |= {'written out ms': ms, 'times': ms / row['ms'], 'its MiB': most / 2 ** 20}
        else:
            row[f'{way} ms'] = ms
    return row


def bench_core(settings, device, limits):
    """Rows: the attention core by length and by config."""
    train.set_up(device, training=False)
    ways, dtype, rows = find_ways(settings['backend'], device), train.find_dtype('auto', device), []
    for name, case in find_cases(device).items():
        rows.append(measure_core(name, case, ways, device, dtype, limits, settings['repeats']))
        show(rows[-1], len(rows) == 1)
    if settings['trace']:
        write_trace(settings['trace'], make_core(*CONFIGS['gpt_shakespeare'], device, dtype)[0])
    if settings['plot']:
        draw_roofline(rows, limits[dtype], limits['copy']).save(settings['plot'])
    return rows


def write_trace(path, run):
    with silent(), profile() as trace:
        run()
    trace.export_chrome_trace(path)
    print(f'{path}: open it at ui.perfetto.dev')


def draw_roofline(rows, rate, copy, width=900, height=560):
    """What each case reaches over what its FLOPs a byte allow, both axes logarithmic: below the slope copies are the limit,
    below the flat part matrix products are."""
    picture = Image.new('RGB', (width, height), 'white')
    pen, margin = ImageDraw.Draw(picture), 60
    intensity, reached = ([row[name] for row in rows] for name in ('FLOP/byte', 'GFLOP/s'))
    left, right = math.floor(math.log10(min(intensity))), math.ceil(math.log10(max(intensity)))
    bottom, top = math.floor(math.log10(min(reached))) + 9, math.ceil(math.log10(rate))

    def at(intensity, flops):
        return (margin + (math.log10(intensity) - left) / (right - left) * (width - 2 * margin),
                height - margin - (math.log10(flops) - bottom) / (top - bottom) * (height - 2 * margin))
    for power in range(left, right + 1):
        pen.line((at(10.0 ** power, 10 ** bottom), at(10.0 ** power, 10 ** top)), fill='lightgrey')
        pen.text(at(10.0 ** power, 10 ** bottom), f'{10.0 ** power:g}', fill='black')
    for power in range(bottom, top + 1):
        pen.line((at(10.0 ** left, 10 ** power), at(10 ** right, 10 ** power)), fill='lightgrey')
        pen.text((5, at(1, 10 ** power)[1] - 6), f'{10.0 ** (power - 9):g}', fill='black')
    edge = rate / copy  # FLOP a byte from which on products are the limit
    foot = max(10.0 ** left, 10 ** bottom / copy)
    pen.line((at(foot, foot * copy), at(edge, rate), at(10 ** right, rate)), fill='black', width=2)
    colors = dict(causal='red', full='blue', cross='green', prefill='orange', decode='purple')
    for i, (kind, color) in enumerate(colors.items()):
        pen.text((margin + 80 * i, 20), kind, fill=color)
    for row in rows:
        x, y = at(row['FLOP/byte'], row['GFLOP/s'] * 1e9)
        kind, *length = [CONFIGS[row['case']][0]] if row['case'] in CONFIGS else row['case'].split()
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colors[kind] if length else 'white', outline=colors[kind])
        pen.text((x + 6, y - 6), ' '.join(length), fill=colors[kind])
    pen.text((margin, height - 25), 'across: FLOP a byte; upwards: GFLOP/s; numbers: lengths; rings: configs', fill='black')
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# A config's training step and its generation

def resolve(assigned):
    """(settings, chapter) of a config, without its weights."""
    return train.resolve(assigned, stand_in.find_sizes(assigned.get('init_from', ('',))[0]))


@contextmanager
def built(assigned, device):
    """(settings of train.py and the model, model, data), all as in training; without data, random numbers."""
    options, chapter = resolve(assigned)
    name, block_size = options['dataset'], options.get('block_size', 0)
    compiled = mock.patch.object(gpt, 'nll', gpt.nll)  # what is compiled for this config stays here
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare, compiled:
        folder = Path('data', name)
        if not (folder / 'meta.json').is_file():
            folder = Path(spare)
            stand_in.write(folder, name, block_size)
            print(f'data/{name} is not there: random numbers of the same shapes instead', flush=True)
        meta = train.read_meta(folder)
        torch.manual_seed(options['seed'])
        model = train.make_model(chapter, options, meta, {}).to(device)
        train.set_up(device, length=train.length_of(model))
        yield options, model, train.Data(folder, 'train', meta, model.fields, block_size)


def formats_of(limits):
    """The number formats that are measured, the fastest last."""
    return [dtype for dtype in limits if dtype != 'copy']


def find_job(options, model, data, settings, device, limits):
    """What train.micro_batch is asked for: a micro-batch, cut if it would take longer than `seconds` at the machine's limit."""
    one = options | dict(batch_size=1, micro_batch_size=1)
    flops = train.count_flops(model, train.to_device(train.micro_batch(data, model, one, 0, 0), device))
    most = int(settings['seconds'] * limits[formats_of(limits)[-1]] / flops)
    return data, model, options | dict(micro_batch_size=max(1, min(options['micro_batch_size'], most))), 0, 0


class Products(TorchDispatchMode):
    """Notes the matrix products of all that is computed inside: {shape and layout of both factors: how often}."""
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            pair = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.found[tuple((tuple(x.shape), x.stride(-1) != 1) for x in pair)] += 1
        return function(*args, **(kwargs or {}))


def count_products(model, batch):
    """(FLOPs, products) of a forward and backward pass, attention written out."""
    with Products() as products:
        return train.count_flops(model, batch), products.found


def chain_seconds(products, device, dtype):
    """Seconds that these products take with nothing between them."""
    def factor(shape, turned):
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=device).to(dtype).mT if turned else torch.randn(
            shape, device=device).to(dtype)
    total = 0
    for pair, n in products.items():
        a, b = (factor(*one) for one in pair)
        total += median_seconds(lambda: [a @ b for _ in range(n)], device, 3)
    return total


@contextmanager
def clock(part, marks, device):
    """Notes when this part of a step begins and ends; a GPU notes it itself, on its way."""
    def now():
        if device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    start = now()
    with record_function(part):
        yield
    marks[part].append((start, now()))


def elapsed(start, end):
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def time_steps(model, job, options, device, dtype, settings, graphs=False):
    """(seconds {part: [one a repeat]}, bytes, tokens, losses) of a step of one micro-batch, by train.py's own functions; with
    graphs forward and backward are one part, `both`."""
    optimizers, marks, losses = train.make_optimizers(model, options), collections.defaultdict(list), []
    mean = copy.deepcopy(model) if options['ema'] else None
    batches = train.prefetched(train.micro_batch, itertools.repeat(job), device)

    def passes(batch, clock=clock):
        with clock('forward', marks, device), train.autocast(device, dtype):
            loss, logs = model(batch)
        with clock('backward', marks, device):
            loss.backward()
        return loss.detach(), logs['tokens'][0]
    finish = functools.partial(train.advance, optimizers, none=not graphs)
    if graphs:
        train.hold_rates(optimizers, device)
        passes = train.Graphs(functools.partial(passes, clock=lambda *_: nullcontext()))
        finish = train.Graphs(finish)

    def step():
        with clock('data', marks, device):
            batch = train.to_device(next(batches), device)
        with clock('both', marks, device) if graphs else nullcontext():
            loss, tokens = passes(batch)
        with clock('optimizer', marks, device):
            train.clip(model, options['grad_clip'])
            train.set_rates(optimizers, options, 0)
            finish()
            if mean:
                train.follow(mean, model, options['ema'], 0)
        losses.append(loss.clone())
        return tokens
    for _ in range(4 if graphs else 2):
        tokens = float(step())
    marks.clear()
    for _ in range(settings['repeats']):
        step()
    train.synchronize(device)
    seconds = {part: [elapsed(*pair) for pair in pairs] for part, pairs in marks.items()}
    held = [*model.parameters(), *model.buffers(), *(mean.parameters() if mean else ())]
    held += [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    memory = sum(x.nbytes for x in held) + peak_bytes(step, device)
    if settings['trace']:
        write_trace(settings['trace'], step)
    return seconds, memory, tokens, torch.stack(losses[:5]).tolist()


def step_row(name, variant, options, measured, flops, roof, limit):
    """A row of the table: a step is `scale` of the measured micro-batches and the optimizer."""
    seconds, memory, tokens, _ = measured
    (dtype, compiled, graphs), size, samples = variant, options['micro_batch_size'], options['batch_size']
    scale = samples / size
    optimizer = statistics.median(seconds.pop('optimizer'))
    passes = [scale * sum(parts) for parts in zip(*seconds.values())]
    whole = statistics.median(passes) + optimizer
    return {'config': name, 'format': str(dtype)[6:], 'compiled': 'and a graph' if graphs else 'yes' if compiled else 'no',
            'samples': f'{size} of {samples}', 'ms a step': 1000 * whole, '+-': 1000 * spread(passes),
            'samples/s': samples / whole, 'tokens/s': scale * tokens / whole, 'GFLOP': scale * flops / 1e9,
            'of limit %': 100 * scale * flops / whole / limit, 'of roof %': 100 * scale * roof / whole,
            'of roof % without optimizer': 100 * scale * roof / statistics.median(passes),
            **{f'{part} %': 100 * scale * statistics.median(seconds[part]) / whole if part in seconds else ''
               for part in ('data', 'forward', 'backward', *['both'] * torch.cuda.is_available())},
            'optimizer %': 100 * optimizer / whole, 'MiB': '' if graphs else memory / 2 ** 20}  # a graph has its own memory


def bench_steps(name, options, model, data, settings, device, limits):
    """Rows, one for each number format, eager and compiled, and on a GPU with CUDA graphs."""
    formats, rows, first = formats_of(limits), [], None
    job = find_job(options, model, data, settings, device, limits)
    flops, products = count_products(model, train.to_device(train.micro_batch(*job), device))
    roofs, start = {dtype: chain_seconds(products, device, dtype) for dtype in formats}, copy.deepcopy(model.state_dict())
    variants = [(dtype, compiled, False) for compiled in (False, True) for dtype in formats]
    variants = [variants[0], variants[-1]] if settings['all'] else variants  # in the table of all: the slowest and the fastest
    variants += [(formats[-1], True, True)] if device.type == 'cuda' else []
    works = functools.cache(lambda: options['compile'] and train.compile_blocks(model, device))
    for dtype, compiled, graphs in variants:
        if compiled and not works():
            continue
        model.load_state_dict(start)
        torch.manual_seed(0)
        measured = time_steps(model, job, options, device, dtype, settings, graphs)
        first = first or measured[-1]
        assert all(abs(a - b) < 0.05 * abs(b) for a, b in zip(measured[-1], first)), f'{name}: {measured[-1]}, not {first}'
        rows.append(step_row(name, (dtype, compiled, graphs), job[2], measured, flops, roofs[dtype], limits[dtype]))
        show(rows[-1], len(rows) == 1)
    return rows


def generation(model, B):
    """(function that generates B samples, how many of what, how often it reads the weights)."""
    device, c = next(model.parameters()).device, model.config
    zeros = torch.zeros(B, 1, dtype=torch.long, device=device)
    match type(model).__name__:
        case 'GPT':
            n = min(c.block_size - 1, 64)
            return lambda: model.generate(zeros, n), B * n, 'tokens', n
        case 'MaskGIT':
            classes = zeros[:, 0] if c.n_classes else None
            return lambda: model.generate(zeros.expand(-1, model.N) - 1, classes, steps=8), B * model.N, 'tokens', 8
        case 'FourM':
            given, wanted = model.modalities[:2]
            given = {given.name: zeros.expand(-1, given.size)}
            return lambda: model.generate(given, [wanted.name], 8), B * wanted.size, 'tokens', 8
        case 'Flow':
            return lambda: model.generate(zeros[:, 0], steps=20), B, 'samples', 20
        case 'VLM':
            look = torch.zeros(B, 1, c.image_size, c.image_size, c.channels, device=device)
            return lambda: model.generate(zeros, model.read(zeros + c.image_token, look), 16), B * 16, 'tokens', 17


def bytes_of_weights(model):
    """What each pass has to read: all matrices that are multiplied with, in the number format of generation."""
    device, tables = next(model.parameters()).device, {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    size = 4 if device.type == 'cpu' else train.find_dtype('auto', device).itemsize
    return size * sum(p.numel() for p in model.parameters() if p not in tables - heads)


def bench_generation(name, compiles, model, settings, device, limits):
    """Rows: latency and throughput by batch, at the defaults of a chapter's `generate`, eager and compiled."""
    rows, model, weights = [], model.eval(), bytes_of_weights(model)
    for compiled in (False, True) if compiles else (False,):
        if compiled and not sample.compile_passes(model, dict(dtype='auto'), device):
            break
        with sample.exact(dict(dtype='auto'), device), torch.compiler.set_stance('default' if compiled else 'force_eager'):
            for B in (1, 8, 32):
                run, n, what, rounds = generation(model, B)
                run()
                times = times_of(run, device, 2)
                seconds = statistics.median(times)
                rows.append({'config': name, 'compiled': 'yes' if compiled else 'no', 'batch': B, 'ms': 1000 * seconds,
                             '+-': 1000 * spread(times), 'what': what, 'a second': n / seconds,
                             'weights of copy rate %': 100 * rounds * weights / seconds / limits['copy']})
                show(rows[-1], len(rows) == 1)
                if seconds > settings['seconds'] / 8:  # the next would take too long
                    break
    return rows


def measure(name, assigned, settings, limits):
    """Both tables of one config."""
    device = train.find_device(settings['device'])
    try:
        with built(assigned, device) as (options, model, data):
            steps = bench_steps(name, options, model, data, settings, device, limits)
        train.set_up(device, training=False)
        compiles = options['compile'] and not settings['all']  # the table of all has no time for it
        return {'Training steps': steps, 'Generation': bench_generation(name, compiles, model, settings, device, limits)}
    except RuntimeError as error:  # those of torch.compile cannot be sent to another process
        raise RuntimeError(f'{type(error).__name__}: {error}') from None


def compile_ahead(assigned, settings, limits):
    """Leaves in PyTorch's cache on disk what a config's compiled step needs. What goes wrong is told when it is measured."""
    device = train.find_device(settings['device'])
    torch._inductor.config.compile_threads = 2  # each of several such processes has its own
    with suppress(Exception), redirect_stdout(io.StringIO()), built(assigned, device) as (options, model, data):
        batch = train.to_device(train.micro_batch(*find_job(options, model, data, settings, device, limits)), device)
        if options['compile'] and train.compile_blocks(model, device):
            with train.autocast(device, formats_of(limits)[-1]):
                loss = model(batch)[0]
            loss.backward()


def compile_all(jobs, settings, limits):
    """Several configs at a time, before any is measured: to compile takes most of the time of all, and one core of the host."""
    workers, done = min(8, torch.get_num_threads() // 2, len(jobs)), []
    if workers > 1:
        print(f'\ncompiling for {len(jobs)} configs, {workers} at a time', flush=True)
        with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), initializer=signal.signal,
                                 initargs=(signal.SIGINT, signal.SIG_DFL)) as pool:  # Ctrl-C ends them at once
            done = [pool.submit(compile_ahead, assigned, settings, limits) for assigned in jobs.values()]
    if any(isinstance(one.exception(), BrokenProcessPool) for one in done):
        print('the system ended a compiler, most likely for want of memory: the rest is compiled as it is measured', flush=True)


def reason(error):
    """Why a config could not be measured, where that is no fault of this program, else None."""
    if isinstance(error, BrokenProcessPool):
        return 'the system ended its process, most likely for want of memory: lower micro_batch_size'
    if isinstance(error, MemoryError) or 'memory' in str(error):  # torch.OutOfMemoryError on a GPU, RuntimeError on a CPU
        return 'does not fit in memory: lower micro_batch_size'
    return str(error) if isinstance(error, (UserError, OSError)) else None


def bench_configs(jobs, settings, device, limits, tables):
    """Adds to the tables the rows of each config, {path: assigned}, in a process whose end ends nothing else."""
    pool = None
    if settings['all']:
        compile_all(jobs, settings, limits)
    for path, assigned in jobs.items():
        name, pool = Path(path).stem, pool or ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
        print(f'\n{name}', flush=True)
        try:
            for title, rows in pool.submit(measure, name, assigned, settings, limits).result().items():
                tables.setdefault(title, []).extend(rows)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if not (why := reason(error)):
                raise
            if not settings['all']:
                raise UserError(f'{path}: {why}')
            print(f'{path}: {why}', flush=True)
            tables.setdefault('Left out', []).append({'config': name, 'why': why})
            pool = None if isinstance(error, BrokenProcessPool) else pool
        if settings['save']:
            save(settings['save'], tables)
    if pool:
        pool.shutdown()  # left to Python's end, its thread may find its pipe closed


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons

def report(name, seconds, tokens, against, unit='tokens'):
    print(f'{name:44}{seconds:10.3f} s{tokens / seconds:12,.0f} {unit}/s{against / seconds * tokens:8.2f} x', flush=True)


@torch.no_grad()
def uncached(model, tokens, n):
    """Greedy generation that runs the whole context for every token; without cuDNN, which prepares anew for each length."""
    with sdpa_kernel([kernel for name, kernel in BACKENDS.items() if name != 'cudnn']):
        for _ in range(n):
            tokens = torch.cat((tokens, model.logits(model.trunk(tokens)[:, -1:]).argmax(-1)), 1)
    return tokens


def compare_generation(settings, device):
    """max_new_tokens in a context of 1,024, as sample.py generates them."""
    train.set_up(device, training=False)
    own, n = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_kv_head')}, settings['max_new_tokens']
    model = GPT(Config(vocab_size=65, block_size=1024, **own)).to(device).eval()
    if n > 1023:
        raise UserError(f'max_new_tokens={n}: the context of this benchmark holds 1,024, of which one is the prompt')
    for parameter in model.parameters():  # zero-initialised outputs would make all tokens alike
        torch.nn.init.normal_(parameter, std=0.05)
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    with sample.exact(dict(dtype='auto'), device):
        begin = time.perf_counter()
        slow = uncached(model, start, n)
        train.synchronize(device)
        seconds = time.perf_counter() - begin
        report('generation, batch 1, without a cache', seconds, n, seconds / n)
        fast = model.generate(start, n, temperature=0)
        print(f'the same tokens: the first {(slow != fast)[0].long().cumsum(0).eq(0).sum() - 1:,}')
        for compiled in ('', ', compiled'):
            if compiled and not sample.compile_passes(model, dict(dtype='auto'), device):
                break
            for batch in (1, 8, 32):
                took = median_seconds(lambda: model.generate(start.repeat(batch, 1), n, temperature=0), device, 1)
                report(f'generation, batch {batch}, KV cache{compiled}', took, batch * n, seconds / n)
                print(f'    weights are read at {n * bytes_of_weights(model) / took / settings["copy"]:.1%} of the rate of a copy')


def compare_unmasking(settings, device):
    """Pictures of 7x7 tokens, one and 64 at once. A GPT takes 49 steps and computes each token once; MaskGIT takes 8 steps and
    computes all tokens in each: 8 times the work in a sixth of the steps."""
    train.set_up(device, training=False)
    own = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd')}
    gpt = GPT(Config(vocab_size=26, block_size=49, **own)).to(device).eval()
    masked = maskgit.MaskGIT(maskgit.Config(vocab_size=26, grid='7x7', n_classes=10, **own)).to(device).eval()
    with sample.exact(dict(dtype='auto'), device):
        for batch in (1, 64):
            start = torch.zeros(batch, 1, dtype=torch.long, device=device)
            hidden = torch.full((batch, 49), -1, device=device)
            slow = median_seconds(lambda: gpt.generate(start, 49), device, settings['repeats'])
            report(f'pictures, batch {batch}, GPT, 49 steps, KV cache', slow, batch * 49, slow / (batch * 49))
            for steps in (1, 4, 8, 16):
                fast = median_seconds(lambda: masked.generate(hidden, start[:, 0], steps), device, settings['repeats'])
                report(f'pictures, batch {batch}, MaskGIT, {steps} steps', fast, batch * 49, slow / (batch * 49))


def gradient_of_head(chunked, settings, device):
    """Loss, seconds and peak memory in GiB of a large head's forward and backward pass."""
    torch.manual_seed(0)
    V = settings['vocab_size']
    x = torch.randn(settings['rows'], settings['n_embd'], device=device, requires_grad=True)
    head = torch.randn(V, settings['n_embd'], device=device, requires_grad=True)
    targets = torch.randint(V, (settings['rows'],), device=device)

    def step():
        x.grad = head.grad = None
        loss = cross_entropy(x, head, targets, most=2 ** 24 if chunked else settings['rows'] * V).mean()
        loss.backward()
        return loss
    return step().item(), median_seconds(step, device, 3), peak_bytes(step, device) / 2 ** 30


def compare_cross_entropy(settings, device):
    """Forward and backward pass of a head with a large vocabulary, in float32."""
    losses, against = [], 0
    for chunked in (False, True):
        loss, seconds, gib = gradient_of_head(chunked, settings, device)
        losses.append(loss)
        against = against or seconds / settings['rows']
        report(f'head of {settings["vocab_size"]:,}, {"in chunks" if chunked else "at once"}: {gib:.2f} GiB', seconds,
               settings['rows'], against)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]


class Padded(nn.Module):
    """The slow way: a FourM's own blocks and places, but masks hide slots that are empty, and one table of 64,000 embeddings and
    one head of 64,000 serve all codes: all logits at once, for empty targets too."""
    def __init__(self, model, vocabulary, D):
        super().__init__()
        self.N, self.turns = model.N, model.turns
        self.encoder, self.decoder = model.encoder, model.decoder
        self.place_embedding, self.query_embedding = model.place_embedding, model.query_embedding
        self.embedding, self.head = nn.Embedding(vocabulary, D), nn.Linear(D, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch):
        inputs, targets = batch['input_index'], batch['target_index']  # (B, K) and (B, M), N where empty
        mask = (inputs < self.N)[:, None, None]  # (B, 1, 1, K)
        turn, context_turn = self.turns(targets), self.turns(inputs)
        x = norm(self.embedding(batch['input_ids']) + self.place_embedding(inputs))
        for block in self.encoder:
            x = x + block.attention(norm(x), context_turn, mask=mask)
            x = x + block.mlp(norm(x))
        context, x = norm(x) + self.place_embedding(inputs), norm(self.query_embedding(targets))
        for block in self.decoder:
            x = x + block.cross(norm(x), turn, context, context_turn, mask=mask)
            x = x + block.mlp(norm(x))
        logits = self.head(norm(x)).float()  # (B, M, 64000)
        return F.cross_entropy(logits.flatten(0, 1), batch['target_ids'].flatten(), ignore_index=-1), {}


def step_of_nano4m(plain, empty, settings, device):
    """Loss, seconds and peak memory in GiB of a step of config/nano4m_multiclevr.py on 64 real inputs and 64 real targets of each
    sample, the plain way with `empty` more slots for both. AdamW alone: Muon takes the same time in all, most of it where
    samples are few."""
    torch.manual_seed(0)
    train.set_up(device)
    names, B = ('rgb', 'depth', 'normal'), settings['samples']
    modalities = ' '.join(f'{name}:5*5*5*8*8*8:16x16' for name in names)
    model = fourm.FourM(fourm.Config(modalities, n_layer_encoder=6, n_layer_decoder=6, n_head=8, n_embd=512, empty=0.0,
                                     input_slots='64', target_slots='64', whole=0.0)).to(device)
    ids = {name: torch.randint(64000, (B, 256)) for name in names}
    batch = model.draw(ids, torch.Generator().manual_seed(0), torch.Generator())
    assert (batch['input_index'] < model.N).all() and (batch['target_index'] < model.N).all()  # 64 + 64 real ones
    if plain:
        batch['target_ids'] = torch.cat([ids[name] for name in names], 1).gather(1, batch['target_index'])
        nothing = dict(input_ids=0, input_index=model.N, target_index=model.N, target_ids=-1)
        batch = {name: F.pad(batch[name], (0, empty), value=value) for name, value in nothing.items()}
        model = Padded(model, 64000, 512)
    model, batch = model.to(device), train.to_device(batch, device)
    options = train.SETTINGS | dict(muon=False)
    optimizers, dtype = train.make_optimizers(model, options), train.find_dtype('auto', device)

    def step():
        with train.autocast(device, dtype):
            loss = model(batch)[0]
        loss.backward()
        train.set_rates(optimizers, options, 0)
        train.advance(optimizers)
        return loss
    first = step().item()
    return first, median_seconds(step, device, settings['repeats']), peak_bytes(step, device) / 2 ** 30


def compare_padding(settings, device):
    """A training step of the course's nano4M at its size, the same real tokens in all; padded as its batches are, half empty."""
    against, losses, targets = 0, [], 64 * settings['samples']
    for name, plain, empty in (('half empty, all logits', True, 64), ('all logits', True, 0), ('as in chapter 3', False, 0)):
        loss, seconds, gib = step_of_nano4m(plain, empty, settings, device)
        losses.append(loss)
        against = against or seconds / targets
        report(f'nano4M, {name}: {gib:.2f} GiB', seconds, targets, against)
    assert max(losses) - min(losses) < 1e-3  # ln 64,000


@torch.no_grad()
def compare_answers(settings, device):
    """The model of config/vlm_scenes.py, 8 questions of 10 tokens about each of 4 pictures, answers of two tokens."""
    train.set_up(device, training=False)
    model, picture = VLM(VLMConfig(vocab_size=341, image_token=340, block_size=128)).to(device).eval(), 340
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    images, questions = (torch.randint(256, shape, device=device) for shape in ((4, 1, 64, 64, 3), (32, 10)))

    def fast():
        return model.generate(questions, model.read(questions.new_full((4, 1), picture), images, 8), 2)

    def slow():
        tokens = torch.cat((questions.new_full((32, model.P), picture), questions), 1)
        for _ in range(2):
            x = model.trunk(tokens, model.look(images.repeat_interleave(8, 0)))
            tokens = torch.cat((tokens, model.language.logits(x[:, -1])[:, :picture].argmax(-1, keepdim=True)), 1)
        return tokens[:, -2:]
    assert torch.equal(fast(), slow())
    seconds = median_seconds(slow, device, settings['repeats'])
    report('32 answers, all anew for each token', seconds, 32, seconds / 32, 'answers')
    took = median_seconds(fast, device, settings['repeats'])
    report('32 answers, one look a picture and a cache', took, 32, seconds / 32, 'answers')


def compare_speculation(settings, device):
    """A text of a trained run with the guesses of a draft and without, in turns; at temperature 0 the tokens must be the same."""
    train.set_up(device, training=False)
    model, draft = (train.load_model(train.find_weights(settings[name]))[0].to(device) for name in ('run', 'draft'))
    start, n, times, texts = torch.zeros(1, 1, dtype=torch.long, device=device), settings['max_new_tokens'], {}, {}
    for seed in range(settings['repeats']):
        for ahead in (0, 2, 4, 6):
            law = dict(temperature=settings['temperature'], generator=torch.Generator(device).manual_seed(seed))
            stream = model.speculate(draft, start, n, **law, ahead=ahead) if ahead else model.stream(start, n, **law)
            begin = time.perf_counter()
            texts[ahead] = torch.cat(list(stream)).tolist()
            times.setdefault(ahead, []).append(time.perf_counter() - begin)
        assert settings['temperature'] or len(set(map(tuple, texts.values()))) == 1
    against = statistics.median(times[0]) / n
    for ahead, took in times.items():
        name = f'{ahead} guesses a pass' if ahead else 'without a draft'
        report(f'generation, {name}', statistics.median(took), n, against)


PARTS = dict(generation=compare_generation, unmasking=compare_unmasking, cross_entropy=compare_cross_entropy,
             padding=compare_padding, answers=compare_answers, speculation=compare_speculation)


def main(*arguments, **overrides):
    assigned, files = config.read(arguments, overrides), [path for path in map(str, arguments) if not path.startswith('--')]
    settings = config.apply({name: assigned.pop(name) for name in SETTINGS if name in assigned}, SETTINGS)
    if settings['part'] not in ('', *PARTS):
        raise UserError(f'part={settings["part"]!r}: choose one of {", ".join(PARTS)}')
    if settings['part'] or not files:
        settings |= config.apply(assigned, SIZES if settings['part'] else {})
    elif not settings['all']:
        resolve(assigned)  # a misspelt setting stops here
    elif extra := [name for name, (_, where) in assigned.items() if where not in files]:
        raise UserError(f'{extra[0]}: with --all=True configs are measured as they are; leave it out')
    if settings['all']:
        settings['save'] = settings['save'] or 'out/bench_all'
    device = train.find_device(settings['device'])
    train.set_up(device)
    limits = find_limits(device)
    tables = {'Machine': [machine_row(device, limits)]}
    show(tables['Machine'][0], True)
    if settings['part']:
        PARTS[settings['part']](settings | dict(copy=limits['copy']), device)
    elif not files:
        tables['Attention core'] = bench_core(settings, device, limits)
    if settings['save']:
        save(settings['save'], tables)
    if files or settings['all']:
        files = files or sorted(map(str, Path('config').glob('[!_]*.py')))
        jobs = {file: config.read([file]) for file in files} if settings['all'] else {files[-1]: assigned}
        bench_configs(jobs, settings, device, limits, tables)


if __name__ == '__main__':
    config.run(main)
