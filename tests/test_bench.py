"""What is compared computes the same, tables are complete, and faults end in one clear line. No test asserts a time."""
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench
import config
import flow
import fourm
import gpt
import maskgit
import train
import vlm
from bench import Padded
from config import UserError
from fourm import Config, FourM
from prepare import stand_in

ROOT, CPU = Path(bench.__file__).parent, torch.device('cpu')
LIMITS = {torch.float32: 1e10, 'copy': 1e9}
SETTINGS = bench.SETTINGS | dict(repeats=2, device='cpu')
TINY = '''
model, dataset = 'gpt', 'shakespeare'
n_layer, n_head, n_embd, block_size, batch_size, micro_batch_size = 1, 2, 32, 16, 4, 2
'''
SMALL = dict(n_layer=1, n_head=2, n_embd=32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: no data, no config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'prepare').symlink_to(ROOT / 'prepare')
    return tmp_path


def test_empty_slots_change_nothing():
    torch.manual_seed(0)
    model = FourM(Config('rgb:4*4*4:4x4 depth:4*4*4:4x4', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2,
                         input_slots='6', target_slots='7', whole=0.0, empty=0.0))
    batch = {name: torch.randint(64, (3, 16)) for name in model.fields}
    batch |= model.draw(batch, torch.Generator().manual_seed(0), torch.Generator())
    batch['target_ids'] = torch.cat((batch['rgb'], batch['depth']), 1).gather(1, batch['target_index'])
    slow = Padded(model, 64, 32)
    for parameter in slow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    empty = dict(input_ids=0, input_index=model.N, target_index=model.N, target_ids=-1)
    padded = {name: F.pad(batch[name], (0, 5), value=value) for name, value in empty.items()}
    assert slow(padded)[0].item() == pytest.approx(slow(batch)[0].item(), rel=1e-5) and slow(batch)[0] > 1


# ---------------------------------------------------------------------------------------------------------------------
# The attention core

CASES = {'causal': (2, 24, 24), 'full': (2, 24, 24), 'cross': (2, 24, 10), 'prefill': (1, 24, 24), 'decode': (1, 1, 24)}


@pytest.mark.parametrize('kind', CASES)
def test_all_ways_agree(kind, monkeypatch):
    """Output and gradients; a way that computes something else is found out."""
    case = kind, *CASES[kind], 2, 16
    core, kernel, forward = bench.make_core(*case, CPU, torch.float32)
    B, T, S = CASES[kind]
    assert core()[0].shape == (B, T, 32) and kernel()[0].shape == forward()[0].shape == (B, 2, T, 16) and len(forward()) == 1
    assert len(core()) == {'prefill': 1, 'decode': 1, 'cross': 6}.get(kind, 4)  # gradients of x, matrices and context
    row = bench.measure_core(kind, case, bench.find_ways('flash,math', CPU), CPU, torch.float32, LIMITS, 2)
    assert list(row) == ['case', 'ms', '+-', 'GFLOP/s', 'of limit %', 'FLOP/byte', 'MiB', 'kernel alone ms',
                         'its forward ms', 'kernel of limit %', 'its forward %', 'written out ms', 'times', 'its MiB', 'flash ms', 'math ms']
    monkeypatch.setattr(bench, 'softmax_attention', lambda q, k, v, *_, **__: q + 2 * v.mean(2, keepdim=True))
    with pytest.raises(AssertionError, match='written out differs'):
        bench.measure_core(kind, case, bench.find_ways('flash,math', CPU), CPU, torch.float32, LIMITS, 2)


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
            return bench.peak_bytes(core, CPU)
    assert most('flash', 2048) < 2.2 * most('flash', 1024) and most('written out', 2048) > 3.5 * most('written out', 1024)


def test_shipped_shapes_are_those_of_the_configs():
    for name, (kind, B, T, S, heads, head_size) in bench.CONFIGS.items():
        settings, _ = train.resolve(config.read([str(ROOT / 'config' / f'{name.split()[0]}.py')]))
        assert heads == settings['n_head'] and heads * head_size == settings['n_embd'], name
        assert B in (settings['batch_size'], settings['micro_batch_size']), name


def test_roofline():
    rows = [{'case': name, 'GFLOP/s': 10.0, 'FLOP/byte': x} for name, x in (('causal 64', 0.5), ('decode 64', 99.0))]
    picture = bench.draw_roofline(rows, 8e10, 1e10)
    assert picture.size == (900, 560) and {(255, 0, 0), (128, 0, 128)} <= {color for _, color in picture.getcolors(10 ** 6)}


# ---------------------------------------------------------------------------------------------------------------------
# A config

def test_products_are_all_of_a_step():
    """x W in the forward pass, x' g and g W' in the backward pass; their FLOPs are those that PyTorch counts."""
    class Model(torch.nn.Module):
        def forward(self, x):
            return layers(x).sum(),
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4))
    flops, products = bench.count_products(Model(), torch.randn(4, 8))
    assert sum(products.values()) == 5  # no gradient of x
    assert flops == sum(2 * a[0][0] * a[0][1] * b[0][1] * n for (a, b), n in products.items())
    assert bench.chain_seconds(products, CPU, torch.float32) > 0


def test_random_data_stands_in_for_all(here):
    """Every shipped config finds the fields that its model reads, within the vocabularies, and draws a batch."""
    for path in sorted((ROOT / 'config').glob('[!_]*.py')):
        assigned = config.read([str(path)])
        sizes = stand_in.find_sizes(assigned.get('init_from', ('',))[0])
        assert len(sizes) == {'gpt_finetune': 1, 'vlm_smol': 2}.get(path.stem, 0)
        assigned |= {name: (1, 'test') for name in ('n_layer', 'n_layer_encoder', 'n_layer_decoder', 'eyes_layer')
                     if name in train.resolve(assigned, sizes)[0]}
        if 'smol' in path.stem or 'finetune' in path.stem:
            continue  # tested by their sizes alone: hundreds of megabytes
        with bench.built(assigned, CPU) as (options, model, data):
            loss, logs = model(train.micro_batch(data, model, options | dict(batch_size=2, micro_batch_size=2), 0, 0))
        assert loss.isfinite() and logs['tokens'][0] > 0, path


def test_sizes_of_weights():
    def resolve(name, init_from):
        return train.resolve(config.read([str(ROOT / f'config/{name}.py')]), stand_in.find_sizes(init_from))[0]
    both = resolve('vlm_smol', 'eyes:siglip,language:smollm2')
    assert both['eyes_embd'] == 768 and both['n_layer'] == 30 and both['mlp'] == 'swiglu' and both['block_size'] == 8192
    assert resolve('gpt_finetune', 'smollm2')['n_kv_head'] == 3


@pytest.mark.parametrize('chapter, settings, n', [
    (gpt, dict(block_size=16), 15), (maskgit, dict(vocab_size=26, grid='3x3'), 9), (flow, {}, 1),
    (vlm, dict(vocab_size=9, image_token=8, eyes_layer=1, eyes_head=2, eyes_embd=32), 16),
    (fourm, dict(modalities='rgb:4*4:4x4 depth:4*4:3x3', n_layer_encoder=1, n_layer_decoder=1), 9)])
def test_generation_of_each_chapter(chapter, settings, n):
    small = {name: value for name, value in SMALL.items() if name in chapter.Config.__dataclass_fields__}
    model = chapter.Model(chapter.Config(**small | settings))
    rows = bench.bench_generation('x', False, model, SETTINGS | dict(seconds=0.0), CPU, LIMITS)
    assert len(rows) == 1 and rows[0]['batch'] == 1 and rows[0]['a second'] == pytest.approx(1000 * n / rows[0]['ms'])
    assert bench.generation(model, 3)[1] == 3 * n


def test_table_of_all(here, capfd):
    """One config by random data, one whose data nobody knows: said, and the rest goes on."""
    Path('config/a.py').write_text(TINY.replace('shakespeare', 'nowhere'))
    Path('config/b.py').write_text(TINY + 'compile = False\nema = 0.9\n')
    tables = dict(Machine=[bench.machine_row(CPU, LIMITS)])
    jobs = {path: config.read([path]) for path in ('config/a.py', 'config/b.py')}
    bench.bench_configs(jobs, SETTINGS | dict(all=True, save='out/t', seconds=1e4), CPU, LIMITS, tables)
    printed = capfd.readouterr().out
    assert 'config/a.py: data/nowhere is not there and its shapes are unknown' in printed
    assert 'data/shakespeare is not there: random numbers of the same shapes instead' in printed
    saved, text = json.loads(Path('out/t.json').read_text()), Path('out/t.md').read_text()
    assert list(saved) == ['Machine', 'Left out', 'Training steps', 'Generation'] and saved['Left out'][0]['config'] == 'a'
    step, = saved['Training steps']
    assert all(step[f'{part} %'] > 0 for part in ('data', 'forward', 'backward', 'optimizer')) and step['of roof %'] > 0
    assert step['samples'] == '2 of 4' and step['MiB'] > 0 and step['compiled'] == 'no'
    assert step['tokens/s'] == pytest.approx(16 * step['samples/s'])
    assert [row['batch'] for row in saved['Generation']] == [1, 8, 32]
    assert '| ' + ' | '.join(step) + ' |' in text and text.count('### ') == 4


def test_configs_are_compiled_before_they_are_measured(here, monkeypatch, capsys):
    """In as many processes as half of the threads, here played in turn; what fails there is not told there."""
    class Here(bench.ProcessPoolExecutor):
        def __init__(self, workers, *_, **__):
            self.workers = workers
        def submit(self, run, *arguments):
            done.append((self.workers, run(*arguments)))
            future = Future()
            future.set_exception(bench.BrokenProcessPool()) if len(done) > 2 else future.set_result(None)
            return future
        def shutdown(self, wait=True):
            pass
    done, seen, nll = [], [], gpt.nll
    monkeypatch.setattr(bench, 'ProcessPoolExecutor', Here)
    monkeypatch.setattr(train, 'compile_blocks', lambda model, device: seen.append(model) or True)
    for name, text in (('a', TINY.replace('shakespeare', 'nowhere')), ('b', TINY), ('c', TINY + 'compile = False\n')):
        Path(f'config/{name}.py').write_text(text)
    jobs = {path: config.read([path]) for path in ('config/a.py', 'config/b.py', 'config/c.py')}
    for threads, n in ((2, 0), (4, 3)):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        bench.compile_all(jobs, SETTINGS | dict(all=True), LIMITS)
        assert done == [(2, None)] * n
    model, = seen  # of b alone
    assert all(parameter.grad is not None for parameter in model.parameters()) and gpt.nll is nll
    said, lost = capsys.readouterr().out.strip().splitlines()
    assert said == 'compiling for 3 configs, 2 at a time' and lost.startswith('the system ended a compiler')


def test_no_compiler_leaves_the_eager_rows(here, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', broken)
    Path('config/b.py').write_text(TINY)
    tables = bench.measure('b', config.read(['config/b.py']), SETTINGS, LIMITS)
    assert [row['compiled'] for row in tables['Training steps']] == ['no']
    assert 'torch.compile does not work here (RuntimeError): going on without it' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, message', [
    (['--part=trainin'], 'choose one of generation, unmasking'), (['config/nope.py'], 'config/nope.py: no such config file'),
    (['--n_embd=64'], "unknown setting 'n_embd'"), (['--part=padding', '--sample=3'], "did you mean 'samples'"),
    (['--backend=cudnn', '--device=cpu'], "backend='cudnn': on cpu there are flash, math"),
    (['config/gpt_mnist.py', '--n_hed=2'], "did you mean 'n_head'"),
    (['config/gpt_mnist.py', '--part=padding'], "config/gpt_mnist.py: unknown setting 'model'"),
    (['config/gpt_mnist.py', '--all=True', '--n_head=2'], 'n_head: with --all=True configs are measured as they are'), (['--dtype'], 'are written --name=value')])
def test_faults(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, 'find_limits', lambda device: LIMITS)
    with pytest.raises(UserError, match=message):
        bench.main(*arguments)


def test_reasons():
    assert 'does not fit in memory' in bench.reason(torch.OutOfMemoryError('CUDA out of memory'))
    assert 'does not fit in memory' in bench.reason(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert 'its process' in bench.reason(bench.BrokenProcessPool()) and bench.reason(UserError('x')) == 'x'
    assert bench.reason(RuntimeError('a bug')) is None


def test_peak_bytes():
    def run():
        a = torch.ones(10 ** 5)
        b = a + a
        del a
        return b + b
    assert bench.peak_bytes(run, CPU) == pytest.approx(800_000, rel=1e-3)
