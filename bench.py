"""
Profiles the fused attention core of gpt.py: time, memory and FLOP/s of forward and backward pass, beside this
machine's peak.

    python bench.py                               by sequence length and for the shapes of the shipped configs
    python bench.py --plot=roofline.png --trace=attention.json
    python bench.py config/nano4m.py              a training step of this config and its generation (lab/speed.py)
    python bench.py --all=True                    the same for every config, to out/bench_all.json and out/bench_all.md

First the peaks are measured: large matrix products in each dtype that the machine computes natively, and copies. Each
case is then compared with the formula written out, which computes the same, and with the kernel alone, without
projections, norms and RoPE. `of limit` is the FLOP/s of the core over that of the large product. Times are medians,
`+-` half of the interquartile range.

In the roofline plot (Williams et al., 2009) a case below the slope is limited by memory traffic, below the flat part
by matmul.
"""
from contextlib import nullcontext
from unittest import mock

import config  # before torch, see there

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import UserError
from engine import devices
from gpt import Attention, KVCache, rope_cos_sin
from lab import speed, timing
from lab.timing import timed

SETTINGS = dict(
    device='auto',            # cuda, mps or cpu
    backend='',               # attention kernels: flash, cudnn, efficient, math, several with commas; '': all on a GPU
    save='',                  # write the table as SAVE.json and SAVE.md
    trace='',                 # write a profile of one case, to be opened at ui.perfetto.dev
    plot='',                  # write a roofline plot, FILE.png
)
BACKENDS = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION,
                efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
KINDS = dict(causal='red', full='blue', cross='green', prefill='orange', decode='purple')  # colors in the plot
TRAINED = 'causal', 'full', 'cross'  # forward and backward pass; the others are generation, forward only
LENGTHS = (64, 256, 1024, 4096)
CONFIGS = {  # the shapes of the shipped configs: kind, batch, queries, keys, heads, head size
    'gpt_shakespeare': ('causal', 16, 256, 256, 6, 32), 'gpt_tinystories': ('causal', 16, 256, 256, 4, 64),
    'maskgit_mnist': ('full', 64, 49, 49, 4, 32), 'nano4m reads': ('full', 16, 64, 64, 4, 32),
    'nano4m answers': ('cross', 16, 256, 64, 4, 32), 'nano4m_multiclevr': ('full', 128, 128, 128, 8, 64),
    'flow_scenes': ('full', 32, 64, 64, 4, 32), 'vlm_scenes': ('causal', 16, 222, 222, 4, 32),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured

def find_cases(device):
    """{name: kind, batch, queries, keys, heads, head size}; the same number of tokens at each length."""
    tokens, heads = (16384, (16, 64)) if device.type == 'cuda' else (4096, (4, 64))
    cases = {f'{kind} {T}': (kind, tokens // T, T, T, *heads) for kind in TRAINED for T in LENGTHS}
    cases |= {f'prefill {T}': ('prefill', 1, T, T, *heads) for T in LENGTHS}
    cases |= {f'decode {T}': ('decode', 1, 1, T, *heads) for T in LENGTHS}
    wide = {f'{kind} 4096, head 128': (kind, tokens // 4096, 4096, 4096, heads[0] // 2, 128)
            for kind in ('causal', 'full')}
    return cases | wide | CONFIGS


def softmax_attention(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula as it is written (arXiv 1706.03762, equation 1), with all T x S weights at once."""
    logits = q @ k.mT * scale  # (B, nh, T, S)
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1).type_as(v) @ v


def find_ways(backends, device):
    """{name: a context in which the core computes attention that way}. Raises UserError."""
    here = list(BACKENDS) if device.type == 'cuda' else ['flash', 'math']
    default = here if device.type == 'cuda' else []  # on a CPU the core is flash, and math is the formula
    chosen = backends.split(',') if backends else default
    if unknown := [name for name in chosen if name not in here]:
        raise UserError(f'backend={unknown[0]!r}: on {device.type} there are {", ".join(here)}')
    ways = {'core': nullcontext,
            'written out': lambda: mock.patch.object(F, 'scaled_dot_product_attention', softmax_attention)}
    return ways | {name: lambda name=name: sdpa_kernel(BACKENDS[name]) for name in chosen}


def passes(forward, inputs, dtype):
    """A function that computes [forward()] and, if the inputs require them, all gradients."""
    def run():
        with devices.autocast(inputs[0].device, dtype), torch.set_grad_enabled(inputs[0].requires_grad):
            y = forward()
        for x in inputs:
            x.grad = None
        if not y.requires_grad:
            return [y]
        y.backward(y.detach())  # any gradient will do
        return [y, *(x.grad for x in inputs)]
    return run


def make_core(kind, B, T, S, heads, head_dim, device, dtype):
    """Three such functions: the core of gpt.py, the kernel alone and the kernel's forward pass."""
    torch.manual_seed(0)
    D, trains = heads * head_dim, kind in TRAINED
    core = Attention(D, heads, cross=kind == 'cross').to(device).requires_grad_(trains)
    nn.init.normal_(core.out.weight, std=D ** -0.5)
    x, context = (torch.randn(B, n, D, device=device, requires_grad=trains) for n in (T, S))
    positions = torch.arange(max(T, S), device=device)[:, None]
    rope = torch.stack(rope_cos_sin(positions, head_dim, 10000.0))  # (2, max(T, S), hd / 2)
    options, inputs = dict(causal=kind in ('causal', 'prefill')), [x, *core.parameters()]
    if kind == 'cross':
        options |= dict(context=context, context_rope=rope[:, :S])
        inputs.append(context)
    if not trains:
        options['cache'] = KVCache(S)
        options['cache'].update(core, *torch.randn(2, B, heads, S, head_dim, device=device, dtype=dtype))
        options['cache'].cur_len = S - T
    q, k, v = (torch.randn(B, heads, n, head_dim, device=device, dtype=dtype, requires_grad=trains) for n in (T, S, S))

    def kernel():
        return F.scaled_dot_product_attention(q, k, v, is_causal=options['causal'], scale=12 / head_dim)
    return (passes(lambda: core(x, rope[:, -T:], **options), inputs, dtype), passes(kernel, [q, k, v], dtype),
            passes(kernel, [x.detach() for x in (q, k, v)], dtype))


def cost_of_core(kind, B, T, S, heads, head_dim, dtype):
    """(FLOPs of all products, FLOPs of attention's forward pass, bytes). Causal attention counts half of the products;
    each value is read or written once."""
    D, rounds = heads * head_dim, 3 if kind in TRAINED else 1  # backward is twice forward
    projections = 4 * B * (T + (S if kind == 'cross' else T)) * D * D
    attention = 4 * B * T * S * D // (2 if kind in ('causal', 'prefill') else 1)
    values = 2 * B * T * D + 4 * D * D + B * S * D * {'cross': 1, 'decode': 2}.get(kind, 0)
    return rounds * (projections + attention), attention, rounds * values * dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def check_same(name, way, results, expected, dtype):
    """Outputs and gradients of one way against those of the core."""
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True))
    assert error < (1e-3 if dtype == torch.float32 else 0.1), f'{name}: {way} differs by {error:.1e}'


def core_columns(case, dtype, peaks, core, kernel, forward, memory):
    """The core's own columns, and those of the kernel alone; core, kernel and forward are Measurements."""
    flops, attention, moved = cost_of_core(*case, dtype)
    rounds, peak = 3 if case[0] in TRAINED else 1, peaks[dtype]
    return {'ms': 1000 * core.median, '+-': timing.spread(core.times), 'GFLOP/s': flops / core.median / 1e9,
            'of limit %': 100 * flops / core.median / peak, 'FLOP/byte': flops / moved, 'MiB': memory / 2 ** 20,
            'kernel alone ms': 1000 * kernel.median, 'its forward ms': 1000 * forward.median,
            'kernel of limit %': 100 * rounds * attention / kernel.median / peak,
            'its forward %': 100 * attention / forward.median / peak}


def measure_core(name, case, ways, device, dtype, peaks):
    """A row of the table: the core, then the other ways to compute the same."""
    core, kernel, forward = make_core(*case, device, dtype)
    row, expected = {'case': name}, core()
    for way, context in ways.items():
        try:
            with context():
                check_same(name, way, core(), expected, dtype)
                time, memory = timed(core), timing.peak_bytes(core, device)
        except RuntimeError:  # no such kernel for these shapes, or not enough memory
            missing = ('written out ms', 'times', 'its MiB') if way == 'written out' else (f'{way} ms',)
            row |= dict.fromkeys(missing, '-')
            continue
        if way == 'core':
            row |= core_columns(case, dtype, peaks, time, timed(kernel), timed(forward), memory)
        else:
            row[f'{way} ms'] = 1000 * time.median
        if way == 'written out':
            row |= {'times': row['written out ms'] / row['ms'], 'its MiB': memory / 2 ** 20}
    return row


def draw_roofline(rows, peak, copy, path):
    """Plots the FLOP/s of each case over its FLOPs per byte, below the limits of copies (the slope) and of matrix
    products (the flat part)."""
    figure = Figure(figsize=(9, 5.6), layout='constrained')
    axes = figure.subplots()
    intensity = [row['FLOP/byte'] for row in rows]
    edges = min(intensity) / 2, peak / copy, 4 * max(*intensity, peak / copy)
    axes.loglog(edges, [min(peak, x * copy) / 1e9 for x in edges], color='black')
    for row in rows:
        kind, _, length = row['case'].partition(' ')
        shipped = row['case'] in CONFIGS
        color, label = KINDS[CONFIGS[row['case']][0] if shipped else kind], row['case'] if shipped else length
        axes.plot(row['FLOP/byte'], row['GFLOP/s'], 'o', color=color, fillstyle='none' if shipped else 'full')
        axes.annotate(label, (row['FLOP/byte'], row['GFLOP/s']), (5, 4), textcoords='offset points', color=color,
                      fontsize=8)
    for kind, color in KINDS.items():
        axes.plot([], [], 'o', color=color, label=kind)
    axes.set(xlabel='FLOP/byte', ylabel='GFLOP/s',
             title='Attention core; numbers are lengths, rings the shapes of configs')
    axes.grid(color='lightgrey')
    axes.legend(loc='lower right')
    figure.savefig(path, dpi=100)
    print(f'wrote {path}')


def bench_core(settings, device, peaks):
    """Rows: the attention core by length and by config."""
    devices.set_up(device, training=False)
    ways, dtype, rows = find_ways(settings['backend'], device), devices.find_dtype('auto', device), []
    for name, case in find_cases(device).items():
        rows.append(measure_core(name, case, ways, device, dtype, peaks))
        timing.show(rows[-1], len(rows) == 1)
    if settings['trace']:
        timing.write_trace(settings['trace'], make_core(*CONFIGS['gpt_shakespeare'], device, dtype)[0])
    if settings['plot']:
        draw_roofline(rows, peaks[dtype], peaks['copy'], settings['plot'])
    return rows


def help(assigned):
    """Further lines of --help."""
    explained = config.explain('lab/speed.py')
    return ['', 'settings beside a config or --all=True (lab/speed.py):', *config.describe(explained)]


def read(arguments, overrides):
    """The settings. Raises UserError."""
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    find_ways(settings['backend'], devices.find(settings['device']))
    if settings['plot'] and not settings['plot'].endswith('.png'):
        raise UserError(f'plot={settings["plot"]!r}: name a file that ends in .png')
    return settings


def main(*arguments, **overrides):
    if speed.wanted(arguments, overrides):
        return speed.main(*arguments, **overrides)
    settings = read(arguments, overrides)
    timing.make_folders(settings['save'], settings['trace'], settings['plot'])
    device = devices.find(settings['device'])
    devices.set_up(device)
    peaks = timing.find_peaks(device)
    tables = {'Machine': [timing.machine_row(device, peaks)]}
    timing.show(tables['Machine'][0], True)
    tables['Attention core'] = bench_core(settings, device, peaks)
    if settings['save']:
        timing.save(settings['save'], tables)


if __name__ == '__main__':
    config.run(main)
