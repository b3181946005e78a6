"""
Timers, memory and the peak rates of this machine, for bench.py, lab/speed.py and tests/comparisons.py. Results are rows
{column: value}, printed one by one as a Markdown table.
"""
import collections
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from config import UserError
from engine import devices
from engine.processes import make_folder
from lab.statistics import markdown_head, markdown_row, markdown_table


def timed(run, seconds=2.0):
    """Times run(). Returns a Measurement of torch.utils.benchmark, with `median` and `iqr`. A fast run() is repeated
    within a sample, so that a GPU does not wait for its host. Takes at least four samples and continues until the IQR
    is a tenth of the median; stops after `seconds` in any case."""
    run()  # compiles, allocates
    timer = Timer('run()', globals=dict(run=run), num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(min_run_time=0.2, max_run_time=seconds)


def spread(times):
    """Half of the interquartile range in ms, '' for a single time."""
    low, high = np.percentile(times, (25, 75))
    return 500 * float(high - low) if len(times) > 1 else ''


def find_peaks(device):
    """The peak rates of this machine: {dtype: FLOP/s of a matrix product, 'copy': bytes/s of a copy, read and
    written}."""
    native = devices.find_dtype('auto', device)
    if native == torch.float32:
        print('bfloat16 is not native here: only float32 is measured')
    peaks = {dtype: devices.matmul_rate(device, dtype) for dtype in dict.fromkeys((torch.float32, native))}
    x = torch.empty(2 ** 28 if device.type == 'cuda' else 2 ** 25, device=device)  # float32, larger than any cache
    y = x.clone()
    return peaks | {'copy': 2 * x.nbytes / min(timed(lambda: y.copy_(x)).times)}


def machine_row(device, peaks):
    name = (torch.cuda.get_device_name() if device.type == 'cuda'
            else f'{device.type}, {torch.backends.cpu.get_cpu_capability()}')
    rates = {f'matmul in {str(dtype)[6:]}, GFLOP/s': rate / 1e9 for dtype, rate in peaks.items() if dtype != 'copy'}
    return {'device': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__, **rates,
            'copy, GB/s': peaks['copy'] / 1e9}


@contextmanager
def silent():
    """Discards stderr, to which the C++ code of PyTorch's profiler prints its start and end."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(run, device):
    """Peak memory in bytes of the tensors that run() allocates; on a CPU from the profiler's list of allocations."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def write_trace(path, run):
    """Writes a profile of run(), for ui.perfetto.dev."""
    with silent(), profile() as trace:
        run()
    trace.export_chrome_trace(path)
    print(f'{path}: open it at ui.perfetto.dev')


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step

class Clock:
    """Measures the seconds of the parts of a step; on a GPU by CUDA events, without a host-device sync."""
    def __init__(self, device):
        self.device, self.marks = device, collections.defaultdict(list)

    def now(self):
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name):
        start = self.now()
        with record_function(name):
            yield
        self.marks[name].append((start, self.now()))

    def seconds(self):
        """{part: array of seconds, one per repeat}."""
        devices.synchronize(self.device)

        def elapsed(start, end):
            return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        return {name: np.array([elapsed(*pair) for pair in pairs]) for name, pairs in self.marks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The roof of a training step: its matrix products alone

class Products(TorchDispatchMode):
    """Counts the matrix products inside this context: {(shape, is it transposed) of both factors: times}."""
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
    """(FLOPs, products) of a forward and backward pass, with attention as plain matrix products."""
    with Products() as products:
        return devices.count_flops(model, batch), products.found


def roof_seconds(products, device, dtype):
    """Seconds that these products take with nothing between them."""
    def factor(shape, transposed):
        x = torch.randn(*shape[:-2], *(shape[:-3:-1] if transposed else shape[-2:]), device=device).to(dtype)
        return x.mT if transposed else x
    total = 0.0
    for pair, n in products.items():
        a, b = (factor(*one) for one in pair)
        timer = Timer('a @ b', globals=dict(a=a, b=b), num_threads=torch.get_num_threads())
        total += n * timer.blocked_autorange(min_run_time=0.01).median
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def show(row, first):
    """Prints a row, below the head of its table if it is the first."""
    if first:
        print(markdown_head(row))
    print(markdown_row(row.values()), flush=True)


def make_folders(*paths):
    """Creates the folders of files that a program writes at its end, so that an impossible path stops it at once.
    Raises UserError."""
    for path in map(str, filter(None, paths)):
        if path.endswith(('/', os.sep)) or Path(path).is_dir():
            raise UserError(f'{path} is a folder: name a file in it')
        make_folder(Path(path).parent, 'name a file elsewhere')


def save(path, tables):
    """Saves tables {title: rows} as PATH.json and PATH.md."""
    text = '\n'.join(f'### {title}\n\n{markdown_table(rows)}\n' for title, rows in tables.items())
    Path(f'{path}.md').write_text(text, encoding='utf-8')
    Path(f'{path}.json').write_text(json.dumps(tables, indent=1), encoding='utf-8')
