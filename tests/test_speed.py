"""Steps and generation of every chapter are measured, tables complete, faults reported. No test asserts a time."""
import json
import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import config
import flow
import fourm
import gpt
import maskgit
import train
import vlm
from config import UserError
from engine import batches, graphs
from lab import dummy_data, speed, timing
from tests import pretend

ROOT, CPU = config.ROOT, torch.device('cpu')
PEAKS = {torch.float32: 1e10, 'copy': 1e9}
SETTINGS = speed.SETTINGS | dict(repeats=2, device='cpu')
TINY = '''
model, dataset = 'gpt', 'shakespeare'
n_layer, n_head, n_embd, block_size, batch_size, micro_batch_size = 1, 2, 32, 16, 4, 2
'''
SMALL = dict(n_layer=1, n_head=2, n_embd=32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: no data, no config; little time for each measurement."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, 'timed', lambda run: timing.timed(run, 0.01))
    (tmp_path / 'config').mkdir()
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Timing

def test_peak_bytes():
    def run():
        a = torch.ones(10 ** 5)
        b = a + a
        del a
        return b + b
    assert timing.peak_bytes(run, CPU) == pytest.approx(800_000, rel=1e-3)


def test_timed():
    runs = []
    measured = timing.timed(lambda: runs.append(1), 0.01)
    assert 0 < measured.median < 1e-3 and measured.iqr >= 0 and len(runs) > len(measured.times) * measured.number_per_run
    assert timing.spread([1, 2, 3, 4, 5]) == 1000 and timing.spread([1]) == ''


def test_products_are_all_of_a_step():
    """x W in the forward pass, x' g and g W' in the backward pass; their FLOPs are those that PyTorch counts."""
    class Model(torch.nn.Module):
        def forward(self, x):
            return layers(x).sum(),
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4))
    flops, products = timing.count_products(Model(), torch.randn(4, 8))
    assert sum(products.values()) == 5  # no gradient of x
    assert flops == sum(2 * a[0][0] * a[0][1] * b[0][1] * n for (a, b), n in products.items())
    assert timing.roof_seconds(products, CPU, torch.float32) > 0


def test_tables(tmp_path, capsys):
    rows = [{'a': 1, 'b': 0.5}, {'a': 2, 'c': 'x'}]
    timing.make_folders(tmp_path / 'new/t', '')
    for folder in (f'{tmp_path}/other/', tmp_path / 'new'):
        with pytest.raises(UserError, match='is a folder: name a file in it'):
            timing.make_folders(tmp_path / 'new/t', folder)
    timing.save(tmp_path / 'new/t', {'One': rows})
    assert json.loads((tmp_path / 'new/t.json').read_text()) == {'One': rows}
    assert (tmp_path / 'new/t.md').read_text() == '### One\n\n| a | b | c |\n|---|---|---|\n| 1 | 0.50 |  |\n| 2 |  | x |\n'
    timing.show(rows[0], True)
    timing.show({'a': 1234.5, 'b': 12.34}, False)
    assert capsys.readouterr().out == '| a | b |\n|---|---|\n| 1 | 0.50 |\n| 1,234 | 12.3 |\n'


# ---------------------------------------------------------------------------------------------------------------------
# Random values in place of data

def test_dummy_data_fit_every_config(here):
    """Every shipped config finds the fields that its model reads, within the vocabularies, and draws a batch."""
    for path in sorted((ROOT / 'config').glob('[!_]*.py')):
        assigned = config.read([str(path)])
        sizes = dummy_data.find_sizes(assigned.get('init_from', ('',))[0])
        assert len(sizes) == {'gpt_finetune': 1, 'vlm_smol': 2, 'vlm_scenes': 1, 'vlm_scenes_long': 1}.get(path.stem, 0)
        if 'smol' in path.stem or 'finetune' in path.stem:
            continue  # tested by their sizes alone: hundreds of megabytes
        assigned |= {name: (1, 'test') for name in ('n_layer', 'n_layer_encoder', 'n_layer_decoder', 'vision_layer')
                     if name in speed.resolve(assigned)[0]}
        with speed.built(assigned, CPU) as (options, model, data):
            loss, logs = model(batches.micro_batch(data, model, options | dict(batch_size=2, micro_batch_size=2), 0, 0))
        assert loss.isfinite() and logs['tokens'][0] > 0, path


def test_sizes_of_weights():
    both, _ = speed.resolve(config.read([str(ROOT / 'config/vlm_smol.py')]))
    assert both['vision_embd'] == 768 and both['n_layer'] == 30 and both['activation'] == 'swiglu' and both['block_size'] == 8192
    assert speed.resolve(config.read([str(ROOT / 'config/gpt_finetune.py')]))[0]['n_kv_head'] == 3


def test_sizes_of_runs(here, toy):
    """A run that a config starts from is found as train.py finds it; a missing one is named."""
    train.main(**toy('gpt') | dict(max_iters=1, n_embd=32, out_dir='there/mine'))
    shutil.copytree('there/mine', 'out/mine')
    for name in ('mine', 'there/mine', 'there/mine/ckpt_last.pt'):
        assert speed.resolve(config.read([], dict(init_from=name)))[0]['n_embd'] == 32
    for name in ('resume', 'scratch'):
        assert dummy_data.find_sizes(name) == {}
    with pytest.raises(UserError, match='out/mien/ckpt_last.pt: no such checkpoint; the nearest are out/mine/ckpt_last.pt'):
        speed.resolve(config.read([], dict(init_from='mien')))


# ---------------------------------------------------------------------------------------------------------------------
# Steps

def test_steps_by_graphs(here, monkeypatch):
    """Without a GPU: the same losses, forward and backward as one part, and later steps are replayed."""
    replays = []

    def capture(*arguments, **settings):
        result, replay, later = pretend.capture_cuda_graph(*arguments, **settings)
        return result, lambda: replays.append(replay()), later
    monkeypatch.setattr(graphs, 'capture_cuda_graph', capture)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    Path('config/b.py').write_text(TINY + 'ema = 0.9\nmuon = False\n')
    found = {}
    for graphed in (False, True):
        with speed.built(config.read(['config/b.py']), CPU) as (options, model, data):
            job = speed.find_job(options, model, data, SETTINGS, CPU, PEAKS)
            steps = speed.Steps(model, job, options, CPU, torch.float32, graphed)
            found[graphed] = speed.time_steps(steps, SETTINGS | dict(repeats=3))
    assert list(found[False]['seconds']) == ['data', 'forward', 'backward', 'optimizer'] and len(replays) > 4
    assert list(found[True]['seconds']) == ['data', 'both', 'optimizer'] and len(found[True]['seconds']['both']) == 3
    assert found[True]['losses'] == pytest.approx(found[False]['losses'], rel=1e-4) and found[True]['tokens'] == 32


# ---------------------------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize('chapter, settings, n', [
    (gpt, dict(block_size=16), 15), (maskgit, dict(vocab_size=26, grid='3x3'), 9), (flow, {}, 1),
    (vlm, dict(vocab_size=9, image_token=8, vision_layer=1, vision_head=2, vision_embd=32), 16),
    (fourm, dict(modalities='rgb:4*4:4x4 depth:4*4:3x3', n_layer_encoder=1, n_layer_decoder=1), 9)])
def test_generation_of_each_chapter(chapter, settings, n, here):
    small = {name: value for name, value in SMALL.items() if name in chapter.Config.__dataclass_fields__}
    model = chapter.Model(chapter.Config(**small | settings))
    rows = speed.bench_generation('x', False, model, SETTINGS | dict(seconds=0.0), CPU, PEAKS)
    assert len(rows) == 1 and rows[0]['batch'] == 1 and rows[0]['a second'] == pytest.approx(1000 * n / rows[0]['ms'])
    assert speed.generation(model, 3)[1] == 3 * n


def test_a_model_of_ones_own_has_no_generation_to_time(here, capsys):
    class Mine(gpt.GPT):
        __module__ = 'mine'
    assert speed.bench_generation('x', True, Mine(gpt.Config(**SMALL)), SETTINGS, CPU, PEAKS) == []
    assert 'x: no generation is timed: `generation` in lab/speed.py has no case for mine.py' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Configs

def test_one_config(here, monkeypatch, capsys):
    """Eager alone where there is no compiler; a trace and tables are written."""
    def broken(*_, **__):
        raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setattr(timing, 'find_peaks', lambda device: PEAKS)
    Path('config/b.py').write_text(TINY + 'ema = 0.9\n')
    chosen = []
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    speed.main('config/b.py', '--repeats=2', '--threads=3', '--device=cpu', '--save=new/t', '--trace=new/x.json')
    assert chosen[0] == 3
    assert 'torch.compile does not work here (RuntimeError): going on without it' in capsys.readouterr().out
    assert Path('new/x.json').is_file()
    saved = json.loads(Path('new/t.json').read_text())
    assert list(saved) == ['Machine', 'Training steps', 'Generation']
    step, = saved['Training steps']
    assert all(step[f'{part} %'] > 0 for part in ('data', 'forward', 'backward', 'optimizer')) and step['of roof %'] > 0
    assert step['samples'] == '2 of 4' and step['MiB'] > 0 and step['compiled'] == 'no'
    assert step['tokens/s'] == pytest.approx(16 * step['samples/s'])
    assert [row['batch'] for row in saved['Generation']] == [1, 8, 32]
    assert '| ' + ' | '.join(step) + ' |' in Path('new/t.md').read_text()


def test_every_config(here, monkeypatch, capsys):
    """Data of unknown shapes are reported, a process that is killed too, and the next config is measured."""
    def in_child(function, path, *arguments):
        if path == 'config/c.py':
            raise BrokenProcessPool
        return function(path, *arguments)
    monkeypatch.setattr(speed, 'in_child', in_child)
    monkeypatch.setattr(timing, 'find_peaks', lambda device: PEAKS)
    Path('config/__init__.py').write_text('raise SystemExit("no config")')
    Path('config/a.py').write_text(TINY.replace('shakespeare', 'nowhere'))
    Path('config/b.py').write_text(TINY + 'compile = False\n')
    Path('config/c.py').write_text(TINY)
    Path('config/d.py').write_text(TINY + 'compile = False\n')
    speed.main('--all=True', '--device=cpu', '--repeats=2', '--seconds=1e4')
    printed = capsys.readouterr().out
    assert 'config/a.py: data/nowhere is not there and its shapes are unknown' in printed
    assert 'data/shakespeare is not there: random values of the same shapes instead' in printed
    assert 'config/c.py: the system ended its process, most likely for want of memory' in printed
    saved, text = json.loads(Path('out/bench_all.json').read_text()), Path('out/bench_all.md').read_text()
    assert list(saved) == ['Machine', 'Left out', 'Training steps', 'Generation'] and text.count('### ') == 4
    assert [row['config'] for row in saved['Left out']] == ['a', 'c']
    assert [row['config'] for row in saved['Training steps']] == ['b', 'd'] and len(saved['Generation']) == 6


def test_children(here):
    """What a child process returns comes back, the end of one that is killed is noticed."""
    Path('config/a.py').write_text(TINY.replace('shakespeare', 'nowhere'))
    assert speed.in_child(speed.attempt, 'config/a.py', SETTINGS, PEAKS)['Left out'][0]['config'] == 'a'
    with pytest.raises(BrokenProcessPool):
        speed.in_child(os._exit, 1)


def test_why_a_config_is_left_out(here, monkeypatch, capsys):
    """Memory and the user's faults by their message, others with their traceback."""
    def fails(error):
        def built(*_):
            raise error
        monkeypatch.setattr(speed, 'built', built)
        return speed.attempt('config/b.py', SETTINGS, PEAKS)['Left out'][0]['why']
    Path('config/b.py').write_text(TINY)
    assert fails(torch.OutOfMemoryError('CUDA out of memory')) == 'b does not fit in memory: lower micro_batch_size'
    assert fails(MemoryError()) == 'b does not fit in memory: lower micro_batch_size'
    assert fails(UserError('x')) == 'x' and not capsys.readouterr().err
    assert fails(RuntimeError('shared memory is missing')) == 'RuntimeError, see above'
    assert 'RuntimeError: shared memory is missing' in capsys.readouterr().err


def test_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10 ** 15)
    assert speed.out_of_memory(caught.value)
    assert speed.out_of_memory(RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.'))
    assert not speed.out_of_memory(RuntimeError('expected contiguous memory format'))


@pytest.mark.parametrize('arguments, message', [
    ([], 'name a config, such as config/nano4m.py, or --all=True'), (['--repeats=3'], 'name a config'),
    (['config/b.py', '--n_hed=2'], "did you mean 'n_head'"), (['config/b.py', '--part=padding'], "unknown setting 'part'"),
    (['config/b.py', '--seconds=-1'], 'seconds=-1.0: must be at least 0'),
    (['config/b.py', '--dtype=float32'], 'dtype: leave it out'), (['config/b.py', '--repeats=0'], 'repeats=0: must be at least 1'),
    (['--all=True', '--n_head=2'], 'n_head: with --all=True configs are measured as they are')])
def test_faults(arguments, message, here):
    Path('config/b.py').write_text(TINY)
    with pytest.raises(UserError, match=message):
        speed.main(*arguments)


def test_which_commands_of_bench_are_for_this_program():
    assert speed.wanted(['config/b.py'], {}) and speed.wanted(['--all=True'], {}) and speed.wanted([], dict(all=True))
    assert not speed.wanted(['--device=cpu', '--save=x'], {}) and not speed.wanted([], dict(device='cpu'))
