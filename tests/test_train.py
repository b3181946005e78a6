"""The loop: exact resume, the same step on one and two processes, checkpoints that survive, and faults in one line each."""
import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fourm
import train
from config import UserError
from prepare.meta import save_meta
from tests import faults

TINY = dict(model='fourm', dataset='scenes', n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, input_slots='16,32',
            target_slots='16', batch_size=8, micro_batch_size=4, max_iters=6, eval_interval=3, eval_iters=2, log_interval=1,
            warmup_iters=2, device='cpu', dtype='float32', compile=False, pictures=False)


def run(out_dir, **changes):
    return train.main(**(TINY | dict(out_dir=str(out_dir)) | changes))


def weights(out_dir, name='ckpt_last.pt'):
    return train.read_checkpoint(Path(out_dir, name))['weights']


def lines(out_dir):
    return [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]


@pytest.fixture
def here(work, tmp_path):
    """A working folder of its own, with a copy of the tiny data set."""
    shutil.copytree(work / 'data', tmp_path / 'data')
    for name in ('config', 'prepare'):
        (tmp_path / name).symlink_to(work / name)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_a_run_and_its_folder(here):
    values = run('out/a')
    assert {'loss_rgb', 'loss_caption', 'null_share'} <= values.keys()
    log = lines('out/a')
    evaluations = [line for line in log if 'val_loss' in line]
    assert [line['step'] for line in evaluations] == [0, 3, 6] and evaluations[-1]['val_loss'] < evaluations[0]['val_loss']
    steps = [line for line in log if 'train_loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {'tokens', 'seconds', 'lr', 'grad_norm', 'tokens_per_second', 'mfu', 'data_wait'} <= steps[0].keys()
    assert 0 < steps[-1]['mfu'] < 1 and steps[-1]['tokens'] > steps[0]['tokens'] > 0
    assert {path.name for path in Path('out/a').iterdir()} == {'log.jsonl', 'ckpt_last.pt', 'ckpt_best.pt', 'lock'}


@pytest.mark.parametrize('killed_after', ['ckpt_best.pt', 'ckpt_last.pt'])  # each as soon as it was written
def test_resume_is_bit_identical(here, killed_after):
    run('out/whole', dropout=0.1)
    run('out/parts', dropout=0.1, max_iters=6, target_loss=100.0)  # stops at the evaluation of step 0: nothing saved yet
    run('out/parts', dropout=0.1)
    shutil.rmtree('out/parts')
    full = train.main

    class Stop(Exception):
        pass
    saved = train.save_checkpoint

    def save_then_stop(path, checkpoint):
        saved(path, checkpoint)
        if path.name == killed_after:
            raise Stop
    train.save_checkpoint = save_then_stop
    try:
        with pytest.raises(Stop):
            full(**(TINY | dict(out_dir='out/parts', dropout=0.1)))
    finally:
        train.save_checkpoint = saved
    assert train.read_checkpoint(Path('out/parts', killed_after))['step'] == 3
    run('out/parts', dropout=0.1)
    for name in ('ckpt_last.pt', 'ckpt_best.pt'):
        assert faults.same(weights('out/whole', name), weights('out/parts', name))
    assert [line.get('val_loss') for line in lines('out/whole')] == [line.get('val_loss') for line in lines('out/parts')]
    assert [line.get('train_loss') for line in lines('out/whole')] == [line.get('train_loss') for line in lines('out/parts')]


KILLER = """
import os as _os, pathlib as _pathlib, threading as _threading, time as _time
def _die():
    while not _pathlib.Path('out/two/ckpt_last.pt').exists():
        _time.sleep(0.01)
    _pathlib.Path('killed').touch()
    _os.kill(_os.getpid(), 9)
if _os.environ['RANK'] == '1' and _os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    _threading.Thread(target=_die, daemon=True).start()
"""


def test_torchrun_goes_on_after_a_process_was_killed(tmp_path, monkeypatch):
    """A config file is code: this one kills the second process. The job ends like one that ran on a single process."""
    monkeypatch.chdir(tmp_path)
    faults.make_data('gpt', faults.CASES['gpt'][0])
    Path('killer.py').write_text(KILLER)
    settings = faults.RUN | faults.CASES['gpt'][1] | dict(model='gpt', dataset='gpt')
    train.main(**settings, out_dir='out/one')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=2',
                           train.__file__, 'killer.py', '--out_dir=out/two', *(f'--{name}={value}' for name, value in settings.items())],
                          capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=300)
    assert done.returncode == 0 and Path('killed').exists(), done.stderr[-2000:]
    for (name, a), b in zip(weights('out/one').items(), weights('out/two').values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    one, two = ([(line['step'], line.get('train_loss', line.get('val_loss'))) for line in lines(f'out/{run}')] for run in ('one', 'two'))
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=1e-3)
    assert lines('out/one')[-1]['tokens'] == lines('out/two')[-1]['tokens']


def test_as_in_a_notebook(tmp_path, monkeypatch, capsys):
    """main returns or raises, and can be called again: after an error, after an interruption, in the same folder."""
    monkeypatch.chdir(tmp_path)
    faults.make_data('gpt', faults.CASES['gpt'][0])
    settings = faults.RUN | faults.CASES['gpt'][1] | dict(model='gpt', dataset='gpt', out_dir='out/a')
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train.main(**settings | dict(max_iters=3))['loss'] > 0
    assert 'train: 100%' in capsys.readouterr().err
    with pytest.raises(UserError, match='n_embd=16, not 32'):
        train.main(**settings | dict(n_embd=32))
    set_rates = train.set_rates
    monkeypatch.setattr(train, 'set_rates', lambda *arguments: signal.raise_signal(signal.SIGINT) or set_rates(*arguments))
    assert train.main(**settings | dict(max_iters=9)) == {'stopped': signal.SIGINT}
    monkeypatch.setattr(train, 'set_rates', lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(**settings | dict(max_iters=9))
    monkeypatch.setattr(train, 'set_rates', set_rates)
    assert train.main(**settings | dict(max_iters=9))['loss'] > 0 and lines('out/a')[-1]['step'] == 9
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_what_a_killed_run_logged_is_done_again(tmp_path):
    log = tmp_path / 'log.jsonl'
    log.write_text('{"step": 0}\n{"step": 3}\n{"step": 6}\n{"st')
    train.forget(log, 3)
    assert log.read_text() == '{"step": 0}\n{"step": 3}\n'
    train.forget(log, -1)  # it had no checkpoint yet
    assert log.read_text() == ''


def test_checksums(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults.make_data('gpt', faults.CASES['gpt'][0])
    settings = faults.RUN | faults.CASES['gpt'][1] | dict(model='gpt', dataset='gpt', out_dir='out/a', max_iters=1, checksum=True)
    with pytest.raises(UserError, match='data/gpt/SHA256SUMS is missing'):
        train.main(**settings)
    save_meta('data/gpt', faults.CASES['gpt'][0] | dict(prepare='none'))
    assert subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd='data/gpt', capture_output=True).returncode == 0
    assert train.main(**settings)['loss'] > 0
    path = Path('data/gpt/val/tokens.npy')
    tokens = np.load(path)
    tokens[7] = (tokens[7] + 1) % 20  # a legal token, but another one
    np.save(path, tokens)
    for damage in (lambda: None, path.unlink):
        damage()
        with pytest.raises(UserError, match='data/gpt/val/tokens.npy is not what data/gpt/SHA256SUMS tells of'):
            train.main(**settings)
    Path('data/gpt/SHA256SUMS').write_text('')
    with pytest.raises(UserError, match='SHA256SUMS does not tell of train/tokens.npy'):
        train.main(**settings)


@pytest.mark.parametrize('chapter', faults.CASES)
def test_every_split_over_processes_is_the_same_step(tmp_path, monkeypatch, chapter):
    """Four micro-batches on one process, two, four, or two that share the model between them: the loss and every gradient of the
    first step, dropout included, to rounding, and the weights after it."""
    monkeypatch.chdir(tmp_path)
    faults.make_data(chapter, faults.CASES[chapter][0])
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, most):
        parameters = list(parameters)
        torch.save(train.whole([p.grad for p in parameters]), f'gradients_{os.environ["RANK"]}.pt')
        return clip(parameters, most)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', spy)
    for name, world in dict(one=1, two=2, four=4, shards=2).items():
        together(world, chapter, f'out/{name}', max_iters=1, log_interval=1, eval_iters=3, shard=name == 'shards')
        found = torch.load('gradients_0.pt')
        log = [line.get('train_loss', line.get('val_loss')) for line in lines(f'out/{name}')]
        if world == 1:
            expected, losses = found, log
        assert log[:2] == pytest.approx(losses[:2], rel=1e-6) and log[2] == pytest.approx(losses[2], rel=1e-4)
        for a, b in zip(expected, found):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * a.abs().max().item() + 1e-12)
        for (key, a), b in zip(weights('out/one').items(), weights(f'out/{name}').values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_shards_resume_on_any_number_of_processes(tmp_path, monkeypatch, dtype):
    """Two processes that share a model, then one, then two, with a running mean and frozen parts: the files are one process's."""
    monkeypatch.chdir(tmp_path)
    faults.make_data('fourm', faults.CASES['fourm'][0])
    settings = dict(dtype=dtype, ema=0.9, rates='place_embedding:0', decay=1e-9, eval_iters=2, eval_interval=2, log_interval=1)
    together(1, 'fourm', 'out/whole', max_iters=6, **settings)
    for steps, world in ((2, 2), (4, 1), (6, 2)):
        together(world, 'fourm', 'out/parts', max_iters=steps, shard=True, **settings)
    whole, parts = (train.read_checkpoint(Path(f'out/{name}/ckpt_last.pt')) for name in ('whole', 'parts'))
    assert faults.same(shapes(whole['optimizers']), shapes(parts['optimizers'])) and whole['scaler'] == parts['scaler']
    for key in ('weights', 'ema'):
        for name in whole[key]:
            torch.testing.assert_close(whole[key][name], parts[key][name], rtol=5e-3, atol=5e-3 if dtype == 'float16' else 2e-4)
    losses = [[line['val_loss'] for line in lines(f'out/{name}') if 'val_loss' in line] for name in ('whole', 'parts')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def together(world, chapter, out_dir, **changes):
    """The run on so many processes, with micro-batches of two."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = [faults.start(chapter, out_dir, dict(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank),
                                                     MASTER_ADDR='localhost', MASTER_PORT=str(port)),
                              micro_batch_size=2, **changes) for rank in range(world)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def shapes(value):
    if isinstance(value, dict):
        return {name: shapes(item) for name, item in value.items()}
    return [shapes(item) for item in value] if isinstance(value, list) else getattr(value, 'shape', None)


def test_target_loss_stops(here, capsys):
    run('out/a', target_loss=100.0)
    assert 'target_loss after 0 tokens' in capsys.readouterr().out
    run('out/b', max_iters=3)
    run('out/b', target_loss=100.0)
    assert 'out/b: finished at step 3' in capsys.readouterr().out


def test_what_has_no_targets_has_no_loss():
    values, tokens = train.means(dict(loss_a=torch.tensor([6.0, 2]), loss_b=torch.zeros(2), tokens=torch.tensor([9.0, 1])))
    assert values == dict(loss_a=3.0) and tokens == 9 and train.loss_of(values) == 3 and math.isnan(train.loss_of({}))


def test_layers_that_the_loss_does_not_reach(here, monkeypatch):
    build, kept = fourm.FourM.__init__, []

    def grown(self, config):
        build(self, config)
        self.more = torch.nn.Linear(4, 4)
        kept.append(self.more.weight.detach().clone())
    monkeypatch.setattr(fourm.FourM, '__init__', grown)
    run('out/a', max_iters=2)
    run('out/a', max_iters=3)
    assert torch.equal(weights('out/a')['more.weight'], kept[0])


def test_a_blind_model_trains_without_eyes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults.make_data('vlm', faults.CASES['vlm'][0])
    train.main(**(faults.RUN | faults.CASES['vlm'][1] | dict(max_iters=1)), model='vlm', dataset='vlm', out_dir='out/a', blind=True)
    optimizers = train.read_checkpoint(Path('out/a/ckpt_last.pt'))['optimizers']
    whole = train.load_model(Path('out/a/ckpt_last.pt'))[0]
    assert sum(len(group['params']) for one in optimizers for group in one['param_groups']) == len([*whole.language.parameters()])


def test_what_was_started_again_goes_on(here, monkeypatch):
    """A job that began with init_from=scratch does not begin anew when SLURM or torchrun starts it once more."""
    run('out/a', max_iters=2, init_from='scratch')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    run('out/a', max_iters=3, init_from='scratch')
    assert [line['step'] for line in lines('out/a') if 'train_loss' in line] == [1, 2, 3] and not Path('out/a.1').exists()


def test_the_newest_are_kept(here):
    Path('out/a').mkdir(parents=True)
    for step in (999999, 1000000):
        Path(f'out/a/ckpt_{step}.pt').touch()
    run('out/a', max_iters=1, keep=2)
    assert sorted(path.name for path in Path('out/a').glob('ckpt_[0-9]*.pt')) == ['ckpt_1000000.pt', 'ckpt_999999.pt']


def test_finished_scratch_and_changed_settings(here, capsys):
    run('out/a', max_iters=3)
    run('out/a', max_iters=3)
    assert 'finished at step 3' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'holds a run with n_embd=32, not 64: choose another --out_dir='):
        run('out/a', n_embd=64, max_iters=3)
    run('out/a', n_embd=64, max_iters=3, init_from='scratch')
    assert Path('out/a.1/ckpt_last.pt').exists() and weights('out/a')['place_embedding.weight'].shape[1] == 64


def save_data(folder, kind, train_array, val_array, **meta):
    """A data folder of one field, tokens."""
    for split, array in (('train', train_array), ('val', val_array)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        np.save(folder / split / 'tokens.npy', array)
    meta = dict(kind=kind, prepare='shakespeare', fields=dict(tokens=1000), config=dict(vocab_size=1000)) | meta
    (folder / 'meta.json').write_text(json.dumps(meta))
    return meta


def test_stream_windows(tmp_path):
    """Every token but the ends is a target once an epoch, the grid moves from epoch to epoch; in evaluation every token is one."""
    meta = save_data(tmp_path, 'stream', np.arange(1000), np.arange(96))
    data = train.Data(tmp_path, 'train', meta, ['tokens'], 10)
    first, second = data.take(0, data.n)['tokens'], data.take(data.n, data.n)['tokens']
    assert first.shape == (99, 11) and len(first[:, 1:].unique()) == 990
    assert (first[:, 1:] - first[:, :-1] == 1).all() and set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert torch.equal(data.take(90, 16)['tokens'], torch.cat((first[90:], second[:7])))  # a batch that straddles epochs
    val = train.Data(tmp_path, 'val', meta, ['tokens'], 10)
    rows = val.rows(np.arange(val.n))['tokens']
    assert rows[:, 1:][rows[:, 1:] >= 0].tolist() == list(range(1, 96)) and rows[-1].tolist() == [90, 91, 92, 93, 94, 95] + [-1] * 5
    with pytest.raises(UserError, match='96 tokens are too few for a context of 96'):
        save_data(tmp_path, 'stream', np.arange(96), np.arange(96))
        train.Data(tmp_path, 'train', meta, ['tokens'], 96)


def test_views(tmp_path):
    """One view a sample and epoch, the same for a resumed run; evaluation sees the first."""
    array = np.arange(600).reshape(50, 4, 3)
    meta = save_data(tmp_path, 'rows', array, array[:, :1], views={'tokens': 4})
    data = train.Data(tmp_path, 'train', meta, ['tokens'])
    rows = torch.cat([data.take(50 * epoch, 50)['tokens'] for epoch in range(30)])
    assert rows.shape == (1500, 3) and (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert all(sorted((rows[50 * e:50 * e + 50, 0] // 12).tolist()) == list(range(50)) for e in range(30))
    assert (rows[:, 0] // 3 % 4).bincount().min() > 300
    assert torch.equal(train.Data(tmp_path, 'train', meta, ['tokens']).take(70, 9)['tokens'], rows[70:79])
    assert torch.equal(train.Data(tmp_path, 'val', meta, ['tokens']).rows(np.arange(50))['tokens'], torch.from_numpy(array[:, 0]))


def test_reals_and_other_names_on_disk(tmp_path):
    """A field of real numbers beside integers, under another name, without views where another field has them."""
    meta = save_data(tmp_path, 'rows', np.arange(600).reshape(50, 4, 3), np.arange(30).reshape(10, 1, 3), views={'tokens': 4},
                     fields=dict(tokens=1000, point=0), files=dict(point='raw_point'))
    for split, n in (('train', 50), ('val', 10)):
        np.save(tmp_path / split / 'raw_point.npy', np.arange(n)[:, None] / 2)
    batch = train.Data(tmp_path, 'train', meta, ['point', 'tokens']).take(0, 8)
    assert batch['point'].dtype == torch.float32 and batch['tokens'].dtype == torch.int64
    assert torch.equal(batch['point'][:, 0] * 2, batch['tokens'][:, 0] // 12)
    with pytest.raises(UserError, match="has no 'image', which this model reads .it has tokens, point"):
        train.Data(tmp_path, 'train', meta, ['image'])
    np.save(tmp_path / 'val/raw_point.npy', np.array([[0.0], [np.nan]]))
    with pytest.raises(UserError, match='raw_point.npy: holds numbers that are not finite'):
        train.Data(tmp_path, 'val', meta, ['point'])


def test_mean_of_the_weights(here):
    """Evaluated and sampled from; the weights of training go on as without it; it survives a stop."""
    run('out/plain')
    run('out/mean', ema=0.9)
    checkpoint = train.read_checkpoint(Path('out/mean/ckpt_last.pt'))
    assert all(torch.equal(value, checkpoint['weights'][name]) for name, value in weights('out/plain').items())
    model, _ = train.load_model(Path('out/mean/ckpt_last.pt'))
    assert torch.equal(model.state_dict()['place_embedding.weight'], checkpoint['ema']['place_embedding.weight'])
    run('out/parts', ema=0.9, max_iters=3, decay=1e-9)
    run('out/parts', ema=0.9, decay=1e-9)
    run('out/whole', ema=0.9, decay=1e-9)
    whole, parts = (train.read_checkpoint(Path(f'out/{name}/ckpt_last.pt'))['ema'] for name in ('whole', 'parts'))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_muon_is_torchs(dtype, monkeypatch):
    """Three steps on matrices of two shapes: to bfloat16's rounding the same, whichever format its products are in."""
    monkeypatch.setattr(train, 'find_dtype', lambda name, device: dtype)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 96), (32, 96), (64, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = train.Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn='original')
    for step in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step(), reference.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * 0.02 * 3 * min(a.shape) ** 0.5  # 2 % of three steps of length sqrt(rank) * 0.02


def test_compiled_attention_is_the_chosen_one():
    """PyTorch's cache of compiled code does not know whether attention was fused: without a tag it would hand out the other's."""
    def attend(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def kernels(length):
        torch._dynamo.reset()
        train.set_up(torch.device('cpu'), length=length)
        compiled, q = torch.compile(attend), torch.randn(1, 1, 16, 8, requires_grad=True)
        compiled(q).sum().backward()  # only what has a backward pass is kept
        with torch.profiler.profile() as trace:
            compiled(q)
        return {event.key for event in trace.key_averages()}
    names = [any('flash' in key for key in kernels(length)) for length in (0, 2048, 0)]
    train.set_up(torch.device('cpu'))
    assert names == [False, True, False]


def test_follow():
    """The first steps count for little: after n steps of weights 1, 2, ... the mean is near the last of them."""
    mean, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    expected = mean.weight.item()
    for step in range(20):
        torch.nn.init.constant_(model.weight, step)
        train.follow(mean, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert mean.weight.item() == pytest.approx(expected, rel=1e-5)


def test_stopped_by_a_signal(here):
    """The same command then ends with the weights and the log of a run that nobody stopped."""
    changes = dict(max_iters=60, eval_interval=20, log_interval=2, dropout=0.1)
    run('out/whole', **changes)
    whole = weights('out/whole')
    kept = ('step', 'tokens', 'train_loss', 'val_loss', 'grad_norm', 'lr')
    log = [{name: line[name] for name in kept if name in line} for line in lines('out/whole')]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        out_dir = Path(f'out/{number.name}')
        settings = TINY | changes | dict(out_dir=out_dir)
        process = subprocess.Popen([sys.executable, train.__file__, *(f'--{name}={value}' for name, value in settings.items())],
                                   env=os.environ | {'OMP_NUM_THREADS': '1'}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while not (out_dir / 'ckpt_last.pt').exists():
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
        step = train.read_checkpoint(out_dir / 'ckpt_last.pt')['step']
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL and step == 20
        elif process.returncode:  # 0: it had finished before the signal came
            assert process.returncode == 128 + number and f'stopped by signal after step {step}' in printed and step % 2 == 0
        run(out_dir, **changes)
        assert all(torch.equal(value, whole[name]) for name, value in weights(out_dir).items())
        assert log == [{name: line[name] for name in kept if name in line} for line in lines(out_dir)]


def test_killed_at_random():
    assert faults.main(rounds=5) == 0


def test_a_flipped_bit_is_found(here):
    run('out/a', max_iters=1)
    path = Path('out/a/ckpt_last.pt')
    whole = path.read_bytes()
    place = whole.index(weights('out/a')['query_embedding.weight'].numpy().tobytes()[:64])
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
    with pytest.raises(UserError, match='ckpt_last.pt: damaged, truncated or not a checkpoint of this repository .BadZipFile.'):
        run('out/a')


def test_scitas(here):
    """The batch script against stand-ins of SLURM's commands: two processes, saved and queued again at USR1, finished by the same."""
    (here / 'bin').mkdir()
    stubs = dict(scontrol='[ "$1" = requeue ] && echo "$2" > requeued || echo localhost', srun="""
        shift; pids=(); trap 'kill -USR1 "${pids[@]}"' USR1
        for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids+=($!); done
        wait "${pids[@]}"; wait "${pids[@]}" """)
    for name, body in stubs.items():
        (here / 'bin' / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
        (here / 'bin' / name).chmod(0o755)
    (here / 'train.py').symlink_to(train.__file__)
    environment = {name: value for name, value in os.environ.items() if name != 'WANDB_MODE'} | dict(
        PATH=f'{here}/bin:{Path(sys.executable).parent}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='localhost', SLURM_JOB_ID='19612',
        OMP_NUM_THREADS='1', USER='student')
    settings = TINY | dict(out_dir='out/a', max_iters=400, eval_interval=20, log_interval=2)
    job = ['bash', 'config/scitas.sbatch', *(f'--{name}={value}' for name, value in settings.items())]
    process = subprocess.Popen(job, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not Path('out/a/ckpt_last.pt').exists():
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=60)
    step = train.read_checkpoint(Path('out/a/ckpt_last.pt'))['step']
    assert process.returncode == 0 and Path('requeued').read_text() == '19612\n', printed
    assert f'stopped by signal after step {step}' in printed[0] and 20 <= step < 400
    done = subprocess.run([*job, f'--max_iters={step + 2}'], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f'{step + 2} steps' in done.stdout, done.stderr[-500:]
    assert subprocess.run(['bash', 'config/scitas.sbatch'], capture_output=True).returncode == 2


def test_two_signals_end_it_at_once(tmp_path):
    with contextlib.ExitStack() as stack:
        asked = train.listen(stack)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's copy of the first
        assert asked == [signal.SIGTERM] * 2
        train.time, kept = type('Later', (), dict(monotonic=staticmethod(lambda: time.monotonic() + 3))), train.time
        try:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            train.time = kept
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_run_a_folder(here):
    with train.lock(Path('out/a')):
        with pytest.raises(UserError, match='out/a: another process is training there'):
            run('out/a')
    run('out/a', max_iters=1)
    assert not train.lock(Path('out/a')).lock.release()  # released at the end of the run


def test_a_gradient_that_is_not_finite(here, monkeypatch):
    """It stops the run, and leaves the state before it and the samples' names; allowed, the step is left out."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments):
        calls.append(0)
        return clip(*arguments) * (float('nan') if len(calls) == 5 else 1)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', broken)
    with pytest.raises(UserError, match='step 4: the gradient is not finite .nan.. The state before it is in out/a/ckpt_fault.pt'):
        run('out/a')
    assert train.read_checkpoint(Path('out/a/ckpt_fault.pt'))['step'] == 4 and weights('out/a').keys()
    assert sum(len(ids) for _, ids in lines('out/a')[-1]['samples']) == 8
    calls.clear()
    run('out/b', skip=1)
    assert [line.get('skipped') for line in lines('out/b') if 'train_loss' in line] == [None] * 4 + [1, 1]
    assert train.read_checkpoint(Path('out/b/ckpt_last.pt'))['skipped'] == 1


def test_older_checkpoints_are_kept(here):
    run('out/a', eval_interval=1, keep=2)
    assert sorted(path.name for path in Path('out/a').glob('ckpt_0*.pt')) == ['ckpt_000005.pt', 'ckpt_000006.pt']


def test_float16(here):
    run('out/a', dtype='float16', max_iters=3)
    losses = [line['train_loss'] for line in lines('out/a') if 'train_loss' in line]
    checkpoint = train.read_checkpoint(Path('out/a/ckpt_last.pt'))
    assert losses[-1] < losses[0] and checkpoint['scaler']['scale'] > 1 and checkpoint['dtype'] == 'torch.float16'


def test_float16_begins_in_the_middle(here):
    run('out/a', max_iters=2)
    run('out/a', max_iters=3, dtype='float16')
    assert [train.read_checkpoint(Path('out/a/ckpt_last.pt'))[name] for name in ('step', 'dtype')] == [3, 'torch.float16']


def test_float16_overflow_of_one_optimizer_stops_both(here, monkeypatch):
    """The gradient of one of Muon's matrices is infinite: AdamW must not step either, by what clipping makes of its gradients."""
    build, before = fourm.FourM.__init__, {}

    def faulty(self, config):
        build(self, config)
        self.encoder[0].mlp.up.weight.register_hook(lambda gradient: gradient * math.inf)
        before.update({name: value.clone() for name, value in self.state_dict().items()})
    monkeypatch.setattr(fourm.FourM, '__init__', faulty)
    run('out/a', dtype='float16', max_iters=1)
    checkpoint = train.read_checkpoint(Path('out/a/ckpt_last.pt'))
    assert all(torch.equal(value, before[name]) for name, value in checkpoint['weights'].items())
    assert checkpoint['skipped'] == 1 and checkpoint['scaler']['scale'] == 2 ** 15


def test_an_evaluation_between_two_lines(here):
    """A line before it, so that neither counts the other's time or steps."""
    run('out/a', log_interval=4, eval_interval=3)
    log = lines('out/a')
    assert [(line['step'], 'val_loss' in line) for line in log] == [
        (0, True), (3, False), (3, True), (4, False), (6, False), (6, True)]
    assert log[2]['tokens'] == log[1]['tokens'] > 0 and log[2]['seconds'] == log[1]['seconds']
    assert log[3]['tokens'] - log[1]['tokens'] < log[1]['tokens']


def test_an_evaluation_that_is_not_a_number(here, monkeypatch):
    """It is not the best, and a later one may be."""
    found = iter((4.0, 3.0, math.nan, 2.0))
    monkeypatch.setattr(train, 'means', lambda total, means=train.means: (
        dict(loss=next(found)), 1.0) if 'tokens' in total and not torch.is_grad_enabled() else means(total))
    run('out/a', max_iters=3, eval_interval=1)
    assert train.read_checkpoint(Path('out/a/ckpt_best.pt'))['step'] == 3


def test_a_disk_that_is_nearly_full(here, monkeypatch):
    monkeypatch.setattr(train.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(UserError, match='out/a: less than 0.0 GB free, which its checkpoints may need'):
        run('out/a')


GPT = dict(model='gpt', dataset='toy', n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=3, device='cpu', compile=False,
           dtype='float32', pictures=False)


def test_a_run_from_another_runs_weights(here):
    random = np.random.default_rng(0)
    save_data(Path('data/toy'), 'stream', random.integers(0, 9, 500), random.integers(0, 9, 100), config=dict(vocab_size=9))
    train.main(**GPT, out_dir='out/first')
    first = weights('out/first')
    train.main('--init_from=first', **(GPT | dict(max_iters=2, learning_rate=0.0, muon_learning_rate=0.0, out_dir='out/next')))
    assert all(torch.equal(first[name], value) for name, value in weights('out/next').items())
    sizes = {name: value for name, value in GPT.items() if name not in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    train.main(**sizes, init_from='out/first', out_dir='out/sizes')  # they come with the weights
    assert train.read_checkpoint(Path('out/sizes/ckpt_last.pt'))['model_config']['n_embd'] == 16
    with pytest.raises(UserError, match='the weights that init_from names are for other sizes'):
        train.main(**(GPT | dict(n_embd=32)), init_from='first', out_dir='out/wider')
    with pytest.raises(UserError, match='no such checkpoint'):
        train.main(**GPT, init_from='nowhere', out_dir='out/nowhere')
    with pytest.raises(UserError, match="init_from names a run of model='gpt', not 'fourm'"):
        run('out/b', init_from='first')
    save_data(Path('data/toy'), 'stream', random.integers(0, 9, 500), random.integers(0, 9, 100), config=dict(vocab_size=9), encoding='bpe')
    with pytest.raises(UserError, match='data/toy has other tokens than the run that init_from names'):
        train.main(**GPT, init_from='first', out_dir='out/other')


def test_schedule():
    settings = train.SETTINGS | dict(max_iters=100, warmup_iters=10, decay=0.5, min_lr=0.1)
    rates = [train.schedule(step, settings) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 and rates[50] == 1 and rates[75] == pytest.approx(0.55) and rates[100] == 0.1


def test_muon_gets_the_hidden_matrices_alone():
    import fourm
    model = fourm.FourM(fourm.Config(n_embd=32, n_head=2))
    adamw, muon = train.make_optimizers(model, train.SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in muon.param_groups:
        assert all(names[id(p)].startswith(('encoder.', 'decoder.')) for p in group['params'])
    total = sum(len(group['params']) for optimizer in (adamw, muon) for group in optimizer.param_groups)
    assert total == len(names) and len(train.make_optimizers(model, train.SETTINGS | dict(muon=False))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Faults

def test_a_failed_write_keeps_the_checkpoint_before(here, monkeypatch):
    run('out/a', max_iters=3)
    before = Path('out/a/ckpt_last.pt').read_bytes()

    def full_disk(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(train.os, 'fsync', full_disk)
    with pytest.raises(UserError, match='ckpt_best.pt: cannot be written .*No space left'):
        run('out/a', max_iters=6)
    assert Path('out/a/ckpt_last.pt').read_bytes() == before and not list(Path('out/a').glob('*.tmp'))


@pytest.mark.parametrize('damage', [lambda b: b[:1000], lambda b: b'', lambda b: b'garbage' * 100])
def test_damaged_checkpoints(here, damage):
    run('out/a', max_iters=3)
    path = Path('out/a/ckpt_last.pt')
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match='ckpt_last.pt: damaged, truncated or not a checkpoint'):
        run('out/a')


def test_code_that_has_changed_since(here, monkeypatch):
    run('out/a', max_iters=2)
    build = fourm.FourM.__init__

    def grown(self, config):
        build(self, config)
        self.more = torch.nn.Linear(2, 2)
    monkeypatch.setattr(fourm.FourM, '__init__', grown)
    with pytest.raises(UserError, match='out/a does not fit the code as it is now .Missing key.* "more.weight", "more.bias"'):
        run('out/a', max_iters=3)
    with pytest.raises(UserError, match='ckpt_last.pt does not fit the code'):
        train.load_model(Path('out/a/ckpt_last.pt'))
    monkeypatch.undo()
    checkpoint = train.read_checkpoint(Path('out/a/ckpt_last.pt'))
    checkpoint['model_config']['softness'] = 1
    torch.save(checkpoint, 'out/a/ckpt_last.pt')
    with pytest.raises(UserError, match="unexpected keyword argument 'softness'"):
        train.load_model(Path('out/a/ckpt_last.pt'))


def test_checkpoint_of_another_model(here):
    run('out/a', max_iters=3)
    with pytest.raises(UserError, match="out/a holds a run with model='fourm', not 'gpt'"):
        train.main(out_dir='out/a', model='gpt', dataset='scenes', device='cpu')


def test_damaged_data(here):
    scenes = Path('data/scenes')
    rgb = np.load(scenes / 'train/rgb.npy')
    np.save(scenes / 'train/rgb.npy', rgb + 70000)
    with pytest.raises(UserError, match=r'rgb.npy: token ids run from .* outside the vocabulary of 65536'):
        run('out/a')
    np.save(scenes / 'train/rgb.npy', rgb[:50])
    with pytest.raises(UserError, match='the fields differ in length'):
        run('out/a')
    (scenes / 'train/rgb.npy').write_bytes((scenes / 'val/rgb.npy').read_bytes()[:300])
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'train/rgb.npy').unlink()
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'meta.json').write_text('{"kind": "something"}')
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):
        run('out/a')


@pytest.mark.parametrize('changes, message', [
    (dict(dataset='scnes'), "dataset='scnes': there is neither data/scnes/meta.json nor a script prepare/scnes.py"),
    (dict(dataset='download'), 'nor a script prepare/download.py .there are cifar10, cifar10_modalities'),
    (dict(modalities='rgb:4:2x2'), 'modalities is decided by the data set'),
    (dict(use='rgb sound'), "there is no modality 'sound'"),
    (dict(micro_batch_size=3), 'does not split into micro-batches of 3'),
    (dict(n_head=5), 'must be a multiple'), (dict(n_head=0), 'cannot be built'), (dict(n_embd=-8), 'cannot be built'),
    (dict(device='gpu'), "device='gpu' does not work here"),
    (dict(dtype='float8'), 'choose auto, float32, bfloat16 or float16'),
    (dict(grad_clip=-1.0), 'grad_clip=-1.0: must be at least 0'),
    (dict(seed=-1), 'seed=-1: must be at least 0'), (dict(beta2=1.0), 'beta2=1.0: must be below 1'),
    (dict(init_from=Path('out/nobody')), 'out/nobody/ckpt_last.pt: no such checkpoint'),
])
def test_faulty_settings(here, changes, message):
    with pytest.raises(UserError, match=message):
        run('out/a', **changes)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    def refused(path):
        raise PermissionError('not yours')
    monkeypatch.setattr(train.zipfile, 'ZipFile', refused)
    with pytest.raises(UserError, match='ckpt_last.pt: cannot be read .not yours'):
        train.read_checkpoint(Path('out/a/ckpt_last.pt'))


def test_a_stream_needs_a_context(tmp_path):
    (tmp_path / 'train').mkdir()
    np.save(tmp_path / 'train/tokens.npy', np.zeros(9, np.uint8))
    with pytest.raises(UserError, match='block_size=0 must be at least 1'):
        train.Data(tmp_path, 'train', dict(kind='stream', fields=dict(tokens=65)), ('tokens',))


def test_the_command_line_prints_one_line(here):
    done = subprocess.run([sys.executable, str(Path(train.__file__)), '--batchsize=3'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: command line: unknown setting 'batchsize'; did you mean 'batch_size'?\n"
    done = subprocess.run([sys.executable, str(Path(train.__file__)), '--model=fourm', '--dataset=scenes', '--out_dir=/dev/null/out'],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: [Errno 20] Not a directory: '/dev/null/out'\n"


def test_other_data_than_the_runs_own(here):
    run('out/a', max_iters=3)
    path = Path('data/scenes/meta.json')
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    with pytest.raises(UserError, match='data/scenes is not the data that this run was trained on'):
        run('out/a')
