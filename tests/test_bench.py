"""What the attention core is compared with computes the same, costs are those by hand, and faults end in one clear line."""
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench
import config
from config import UserError
from lab import speed, timing
from tests import pretend

ROOT, CPU, THERE = config.ROOT, torch.device('cpu'), torch.device('meta')
PEAKS = {torch.float32: 1e10, 'copy': 1e9}
CASES = {'causal': (2, 24, 24), 'full': (2, 24, 24), 'cross': (2, 24, 10), 'prefill': (1, 24, 24), 'decode': (1, 1, 24)}


@pytest.mark.parametrize('kind', CASES)
def test_all_ways_agree(kind, monkeypatch):
    """Output and gradients; a way that computes something else is found out."""
    case = kind, *CASES[kind], 2, 16
    core, kernel, forward = bench.make_core(*case, CPU, torch.float32)
    B, T, S = CASES[kind]
    assert core()[0].shape == (B, T, 32) and kernel()[0].shape == forward()[0].shape == (B, 2, T, 16) and len(forward()) == 1
    assert len(core()) == {'prefill': 1, 'decode': 1, 'cross': 6}.get(kind, 4)  # gradients of x, matrices and context
    monkeypatch.setattr(bench, 'timed', lambda run: timing.timed(run, 0.01))
    row = bench.measure_core(kind, case, bench.find_ways('flash,math', CPU), CPU, torch.float32, PEAKS)
    assert list(row) == ['case', 'ms', '+-', 'GFLOP/s', 'of limit %', 'FLOP/byte', 'MiB', 'kernel alone ms', 'its forward ms',
                         'kernel of limit %', 'its forward %', 'written out ms', 'times', 'its MiB', 'flash ms', 'math ms']
    assert all(value > 0 for column, value in row.items() if column not in ('case', '+-'))
    monkeypatch.setattr(bench, 'softmax_attention', lambda q, k, v, *_, **__: q + 2 * v.mean(2, keepdim=True))
    with pytest.raises(AssertionError, match='written out differs'):
        bench.measure_core(kind, case, bench.find_ways('flash,math', CPU), CPU, torch.float32, PEAKS)


@pytest.mark.parametrize('kind', CASES)
def test_on_a_device_that_is_not_the_cpu(kind, monkeypatch):
    monkeypatch.setattr(bench, 'timed', lambda run: timing.timed(run, 0.01))
    monkeypatch.setattr(timing, 'peak_bytes', lambda run, device: run() and 1)
    B, T, S = CASES[kind]
    with pretend.device():
        row = bench.measure_core(kind, (kind, 1, T, S, 2, 16), bench.find_ways('', CPU), THERE, torch.float32, PEAKS)
    assert row['ms'] > 0 and row['written out ms'] > 0


def test_a_kernel_that_is_missing_leaves_a_dash(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError('No available kernel. Aborting execution.')
    monkeypatch.setattr(bench, 'timed', lambda run: timing.timed(run, 0.01))
    monkeypatch.setattr(bench, 'softmax_attention', missing)
    row = bench.measure_core('full', ('full', 1, 8, 8, 2, 16), bench.find_ways('', CPU), CPU, torch.float32, PEAKS)
    assert row['written out ms'] == row['times'] == row['its MiB'] == '-' and row['ms'] > 0


def test_cost_of_the_core():
    """FLOPs by hand: four projections, two products; causal needs half of these two, training three times the forward pass."""
    for kind, times in (('prefill', 1), ('causal', 3)):
        flops, attention, moved = bench.cost_of_core(kind, 1, 24, 24, 2, 16, torch.float32)
        assert flops == times * (2 * 24 * 4 * 32 * 32 + 2 * 24 * 24 * 32)
        assert attention == 2 * 24 * 24 * 32
        assert moved == times * 4 * (2 * 24 * 32 + 4 * 32 * 32)


def test_memory_of_the_core():
    """Fused it grows with the length, written out with its square."""
    def most(way, T):
        core, *_ = bench.make_core('full', 1, T, T, 2, 16, CPU, torch.float32)
        with bench.find_ways('flash', CPU)[way]():
            core()
            return timing.peak_bytes(core, CPU)
    assert most('flash', 2048) < 2.2 * most('flash', 1024) and most('written out', 2048) > 3.5 * most('written out', 1024)


def test_shipped_shapes_are_those_of_the_configs():
    for name, (kind, B, T, S, heads, head_dim) in bench.CONFIGS.items():
        settings, _ = speed.resolve(config.read([str(ROOT / 'config' / f'{name.split()[0]}.py')]))
        assert heads == settings['n_head'] and heads * head_dim == settings['n_embd'], name
        assert B in (settings['batch_size'], settings['micro_batch_size']), name


def test_roofline(tmp_path):
    cases = {'causal 64': 0.5, 'decode 64': 99.0, 'flow_scenes': 9.0}
    rows = [{'case': name, 'GFLOP/s': 10.0, 'FLOP/byte': x} for name, x in cases.items()]
    bench.draw_roofline(rows, 8e10, 1e10, tmp_path / 'x.png')
    picture = Image.open(tmp_path / 'x.png').convert('RGB')
    assert {(255, 0, 0), (128, 0, 128), (0, 0, 255)} <= {color for _, color in picture.getcolors(10 ** 6)}


def test_the_command(tmp_path, monkeypatch, capsys):
    """Peaks, a table, and three files, one case in place of all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'timed', lambda run: timing.timed(run, 0.01))
    monkeypatch.setattr(timing, 'find_peaks', lambda device: PEAKS | {torch.bfloat16: 1e10})
    monkeypatch.setattr(bench, 'find_cases', lambda device: {'full 8': ('full', 1, 8, 8, 2, 16)})
    monkeypatch.setitem(bench.CONFIGS, 'gpt_shakespeare', ('causal', 1, 8, 8, 2, 16))
    bench.main('--device=cpu', '--save=new/t', '--plot=new/x.png', '--trace=new/x.json')
    printed = capsys.readouterr().out
    assert '| full 8 |' in printed and 'wrote new/x.png' in printed and 'new/x.json: open it at ui.perfetto.dev' in printed
    assert sorted(path.name for path in Path('new').iterdir()) == ['t.json', 't.md', 'x.json', 'x.png']
    assert '### Machine' in Path('new/t.md').read_text() and '### Attention core' in Path('new/t.md').read_text()


@pytest.mark.parametrize('arguments, message', [
    (['--n_embd=64'], "unknown setting 'n_embd'"),
    (['--backend=cudnn', '--device=cpu'], "backend='cudnn': on cpu there are flash, math"),
    (['--plot=x.gif'], 'name a file that ends in .png'), (['--dtype'], 'are written --dtype=value'),
    (['config/nope.py'], 'config/nope.py: no such config file'), (['config/gpt_mnist.py', '--n_hed=2'], "did you mean 'n_head'"),
    (['config/gpt_mnist.py', '--all=True', '--n_head=2'], 'n_head: with --all=True configs are measured as they are')])
def test_faults(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(timing, 'find_peaks', lambda device: 1 / 0)
    with pytest.raises(UserError, match=message):
        bench.main(*arguments)
