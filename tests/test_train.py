"""The loop: a run and its folder, exact resume, evaluation, a stop by a signal, and faults in one line each."""
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fourm
import lab
import train
from config import UserError
from engine import checkpoints, devices, meters, optimizers
from tests import faults
from tests.tiny import GPT, TINY, lines, losses, read, run, save_data, weights


def test_a_run_and_its_folder(here):
    values = run('out/a')
    assert {'loss_rgb', 'loss_caption', 'null_fraction'} <= values.keys()
    log = lines('out/a')
    evaluations = [line for line in log if 'val_loss' in line]
    assert [line['step'] for line in evaluations] == [0, 3, 6] and evaluations[-1]['val_loss'] < evaluations[0]['val_loss']
    steps = [line for line in log if 'train_loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {'tokens', 'seconds', 'lr', 'grad_norm', 'tokens_per_second', 'mfu', 'data_wait'} <= steps[0].keys()
    assert 0 < steps[-1]['mfu'] < 1 and steps[-1]['tokens'] > steps[0]['tokens'] > 0
    assert {path.name for path in Path('out/a').iterdir()} == {'log.jsonl', 'ckpt_last.pt', 'ckpt_best.pt', 'lock'}


# ---------------------------------------------------------------------------------------------------------------------
# Resume

class Stop(Exception):
    pass


@pytest.mark.parametrize('killed_after', ['ckpt_best.pt', 'ckpt_last.pt'])  # each as soon as it was written
def test_resume_is_bit_identical(here, monkeypatch, killed_after):
    run('out/whole', dropout=0.1)
    run('out/parts', dropout=0.1, max_iters=6, target_loss=100.0)  # stops at the evaluation of step 0
    run('out/parts', dropout=0.1)
    shutil.rmtree('out/parts')
    saved = checkpoints.save

    def save_then_stop(path, checkpoint):
        saved(path, checkpoint)
        if path.name == killed_after:
            raise Stop
    monkeypatch.setattr(checkpoints, 'save', save_then_stop)
    with pytest.raises(Stop):
        run('out/parts', dropout=0.1)
    monkeypatch.setattr(checkpoints, 'save', saved)
    assert read('out/parts', killed_after)['step'] == 3
    run('out/parts', dropout=0.1)
    for name in ('ckpt_last.pt', 'ckpt_best.pt'):
        assert faults.same(weights('out/whole', name), weights('out/parts', name))
    for name in ('val_loss', 'train_loss'):
        assert losses('out/whole', name) == losses('out/parts', name)


def test_as_in_a_notebook(toy, monkeypatch, capsys):
    """main returns or raises, and can be called again: after an error, after an interruption, in the same folder."""
    settings = toy('gpt') | dict(out_dir='out/a')
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    random = torch.random.get_rng_state()
    devices.use_fused_attention(True)  # PyTorch's default; a context of 8 tokens is trained without it
    assert train.main(**settings | dict(max_iters=3))['loss'] > 0
    assert torch.equal(torch.random.get_rng_state(), random)
    assert 'train: 100%' in capsys.readouterr().err
    with pytest.raises(UserError, match='n_embd=16, not 32'):
        train.main(**settings | dict(n_embd=32))
    set_lr = optimizers.set_lr
    monkeypatch.setattr(optimizers, 'set_lr', lambda *arguments: signal.raise_signal(signal.SIGINT) or set_lr(*arguments))
    assert train.main(**settings | dict(max_iters=9)) == {'stopped': signal.SIGINT}
    monkeypatch.setattr(optimizers, 'set_lr', lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(**settings | dict(max_iters=9))
    monkeypatch.setattr(optimizers, 'set_lr', set_lr)
    assert train.main(**settings | dict(max_iters=9))['loss'] > 0 and lines('out/a')[-1]['step'] == 9
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] and torch.backends.cuda.flash_sdp_enabled()


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
                                   env=os.environ | {'OMP_NUM_THREADS': '1'}, text=True,
                                   stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while not (out_dir / 'ckpt_last.pt').exists():
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
        step = read(out_dir)['step']
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL and step == 20
        elif process.returncode:  # 0: it had finished before the signal came
            assert process.returncode == 128 + number and f'stopped by signal after step {step}' in printed and step % 2 == 0
        run(out_dir, **changes)
        assert faults.same(weights(out_dir), whole)
        assert log == [{name: line[name] for name in kept if name in line} for line in lines(out_dir)]


def test_killed_at_random():
    assert faults.main(rounds=5) == 0


def test_a_finished_run_says_so_first(here, monkeypatch, capsys):
    """Before anything is compiled or a run of Weights & Biases is opened, and whatever else the command asks for."""
    run('out/a', max_iters=3)

    def never(*arguments, **more):
        raise AssertionError('too early')
    monkeypatch.setattr(train.graphs, 'compile_blocks', never)
    monkeypatch.setitem(sys.modules, 'wandb', type('wandb', (), dict(init=never)))
    assert run('out/a', max_iters=3, compile=True, wandb_log=True) == {}
    assert 'out/a: finished at step 3' in capsys.readouterr().out


def test_finished_scratch_and_changed_settings(here, capsys):
    run('out/a', max_iters=3)
    run('out/a', max_iters=3)
    assert 'finished at step 3' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'holds a run with n_embd=32, not 64: choose another --out_dir='):
        run('out/a', n_embd=64, max_iters=3)
    run('out/a', n_embd=64, max_iters=3, init_from='scratch')
    assert Path('out/a.1/ckpt_last.pt').exists() and weights('out/a')['pos_embedding.weight'].shape[1] == 64


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, pictures, the end

@pytest.mark.parametrize('off', [torch.inference_mode, torch.no_grad])
def test_gradients_that_an_earlier_cell_switched_off(here, off):
    run('out/a', max_iters=4)
    with off():
        run('out/b', max_iters=4)
        assert not torch.is_grad_enabled()
    assert losses('out/a') == losses('out/b')


def test_one_run_at_a_time(toy, monkeypatch):
    """Another one in a thread would change its random numbers and its output."""
    settings, set_lr, said = toy('gpt') | dict(max_iters=1), optimizers.set_lr, []

    def other():
        with pytest.raises(UserError, match='a run is being trained in another thread of this process.*wait for it') as error:
            train.main(**settings, out_dir='out/b')
        said.append(str(error.value))

    def set_lr_meanwhile(*arguments):
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
        set_lr(*arguments)
    monkeypatch.setattr(optimizers, 'set_lr', set_lr_meanwhile)
    train.main(**settings, out_dir='out/a')
    assert len(said) == 1 and '\n' not in said[0] and not Path('out/b').exists()
    monkeypatch.setattr(optimizers, 'set_lr', set_lr)
    assert train.main(**settings, out_dir='out/b')['loss'] > 0


@pytest.mark.parametrize('stream', [None, io.StringIO()])
def test_output_that_is_gone(toy, monkeypatch, stream):
    """As in a program without a terminal, or after a cell that closed it."""
    if stream:
        stream.close()
    monkeypatch.setattr(sys, 'stdout', stream), monkeypatch.setattr(sys, 'stderr', stream)
    assert train.main(**toy('gpt') | dict(max_iters=1), out_dir='out/a')['loss'] > 0


def test_a_signal_stops_at_an_evaluation_too(here, monkeypatch):
    """However far apart the other lines of the log are."""
    set_lr = optimizers.set_lr
    monkeypatch.setattr(optimizers, 'set_lr', lambda *arguments: signal.raise_signal(signal.SIGTERM) or set_lr(*arguments))
    assert run('out/a', log_interval=100) == {'stopped': signal.SIGTERM} and read('out/a')['step'] == 3


def test_a_signal_that_ends_the_compiler_stops_the_run(here, monkeypatch, capsys):
    """Ctrl-C reaches g++ too: an error of the first step."""
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError('g++ failed')
    monkeypatch.setattr(train.processes, 'no_sync', interrupted)
    assert run('out/a') == {'stopped': signal.SIGINT}
    assert 'stopped by signal (RuntimeError); the same command continues' in capsys.readouterr().out


def test_target_loss_stops(here, capsys):
    run('out/a', target_loss=100.0)
    assert ' <= target_loss 100, best' in capsys.readouterr().out and read('out/a')['step'] == 0
    run('out/a', target_loss=100.0)
    assert 'out/a: finished at step 0' in capsys.readouterr().out
    run('out/b', max_iters=3)
    run('out/b', target_loss=100.0)
    assert 'out/b: finished at step 3' in capsys.readouterr().out


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
    monkeypatch.setattr(meters, 'means', lambda total, means=meters.means: (
        dict(loss=next(found)), 1.0) if 'tokens' in total and not torch.is_grad_enabled() else means(total))
    run('out/a', max_iters=3, eval_interval=1)
    assert read('out/a', 'ckpt_best.pt')['step'] == 3


def test_the_ema_is_evaluated_and_kept(here):
    """Evaluated and sampled from; the weights of training go on as without it; it survives a stop."""
    run('out/plain')
    run('out/ema', ema=0.9)
    checkpoint = read('out/ema')
    assert faults.same(weights('out/plain'), checkpoint['weights'])
    model, _ = checkpoints.load_model(Path('out/ema/ckpt_last.pt'))
    assert torch.equal(model.state_dict()['pos_embedding.weight'], checkpoint['ema']['pos_embedding.weight'])
    assert losses('out/plain') == losses('out/ema') and losses('out/plain', 'val_loss') != losses('out/ema', 'val_loss')
    run('out/parts', ema=0.9, max_iters=3, decay=1e-9)
    run('out/parts', ema=0.9, decay=1e-9)
    run('out/whole', ema=0.9, decay=1e-9)
    assert faults.same(read('out/whole')['ema'], read('out/parts')['ema'])


def test_older_checkpoints_are_kept(here):
    run('out/a', eval_interval=1, keep_checkpoints=2)
    assert sorted(path.name for path in Path('out/a').glob('ckpt_0*.pt')) == ['ckpt_000005.pt', 'ckpt_000006.pt']


def test_a_picture_that_cannot_be_drawn(here, monkeypatch, capsys):
    """A message, and training continues as without samples."""
    def broken(*arguments):
        raise ZeroDivisionError('no ink')
    monkeypatch.setattr(lab, 'draw', broken)
    run('out/a', pictures=True)
    printed = capsys.readouterr().out
    assert all(f'step {step}: no samples (ZeroDivisionError: no ink); training continues' in printed for step in (3, 6))
    run('out/b')
    assert faults.same(weights('out/a'), weights('out/b'))


def test_pictures_need_a_drawer(here, monkeypatch):
    """Without one this is said before the first step, and before data are made; without pictures nobody needs it."""
    made = []
    monkeypatch.setattr(lab, 'HERE', here)
    monkeypatch.setattr(train.arrays, 'find', lambda dataset, find=train.arrays.find: made.append(dataset) or find(dataset))
    with pytest.raises(UserError, match=r'there is no lab/fourm.py yet.*--pictures=False trains without it'):
        run('out/a', pictures=True)
    assert not made and not Path('out').exists()
    assert run('out/a', max_iters=1)['loss_rgb'] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and number formats

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


def test_a_text_only_model_trains_no_vision_encoder(toy):
    train.main(**(toy('vlm') | dict(max_iters=1)), out_dir='out/a', text_only=True)
    groups = read('out/a')['optimizers']['param_groups']
    names = {name for group in groups for name in group['params']}
    whole = checkpoints.load_model(Path('out/a/ckpt_last.pt'))[0]
    assert names == {f'language_model.{name}' for name, _ in whole.language_model.named_parameters()}


def broken_clip(monkeypatch, call):
    """The norm of the gradient is not a number in this call; returns the list of calls."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments):
        calls.append(0)
        return clip(*arguments) * (float('nan') if len(calls) == call else 1)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', broken)
    return calls


def test_a_gradient_that_is_not_finite(here, monkeypatch):
    """It stops the run, and leaves the state before it and the samples' names; allowed, the step is left out."""
    calls = broken_clip(monkeypatch, 5)
    with pytest.raises(UserError, match='step 4: the gradient is not finite .nan.. The state before it is in out/a/ckpt_fault.*; continue with '
                                        '--max_skipped_steps=10, which skips such steps, or start again'):
        run('out/a', eval_interval=6)
    assert read('out/a', 'ckpt_fault.pt')['step'] == 4 and not Path('out/a/ckpt_last.pt').exists()
    assert sum(len(ids) for _, ids in lines('out/a')[-1]['samples']) == 8
    calls[:] = [0] * 4
    run('out/a', eval_interval=6, max_skipped_steps=1)  # continues from there, and skips the step
    assert [line['step'] for line in lines('out/a')] == [0, 1, 2, 3, 4, 4, 5, 6, 6] and read('out/a')['skipped'] == 1
    calls.clear()
    run('out/b', max_skipped_steps=1)
    assert [line.get('skipped') for line in lines('out/b') if 'train_loss' in line] == [None] * 4 + [1, 1]
    assert read('out/b')['skipped'] == 1


def test_a_stop_before_the_first_optimizer_step(here, monkeypatch):
    """The first step is skipped: a checkpoint after it has no moments yet, and must not count a step of theirs."""
    calls = broken_clip(monkeypatch, 1)
    run('out/whole', max_skipped_steps=1, max_iters=4, eval_interval=4, decay=1e-9)
    calls.clear()
    for steps in (1, 4):
        run('out/parts', max_skipped_steps=1, max_iters=steps, eval_interval=4, decay=1e-9)
    assert read('out/parts')['skipped'] == 1 and faults.same(weights('out/whole'), weights('out/parts'))
    assert faults.same(read('out/whole')['optimizers'], read('out/parts')['optimizers'])


def test_the_ema_does_not_move_on_skipped_steps(here, monkeypatch):
    broken_clip(monkeypatch, 3)
    moved, update = [], optimizers.update_ema
    monkeypatch.setattr(optimizers, 'update_ema', lambda *arguments: moved.append(arguments[-1]) or update(*arguments))
    run('out/a', max_skipped_steps=1, ema=0.9)
    assert moved == [0, 1, 3, 4, 5]


def test_float16(here):
    run('out/a', dtype='float16', max_iters=3)
    checkpoint = read('out/a')
    assert losses('out/a')[-1] < losses('out/a')[0]
    assert checkpoint['scaler']['scale'] > 1 and checkpoint['dtype'] == 'torch.float16'


def test_float16_begins_in_the_middle(here):
    run('out/a', max_iters=2)
    run('out/a', max_iters=3, dtype='float16')
    assert [read('out/a')[name] for name in ('step', 'dtype')] == [3, 'torch.float16']


def test_float16_overflow_of_one_optimizer_stops_both(here, monkeypatch):
    """The gradient of one of Muon's matrices is infinite: AdamW must not step either, by what clipping makes of its gradients."""
    build, before = fourm.FourM.__init__, {}

    def faulty(self, config):
        build(self, config)
        self.encoder[0].mlp.up.weight.register_hook(lambda gradient: gradient * math.inf)
        before.update({name: value.clone() for name, value in self.state_dict().items()})
    monkeypatch.setattr(fourm.FourM, '__init__', faulty)
    run('out/a', dtype='float16', max_iters=1)
    checkpoint = read('out/a')
    assert all(torch.equal(value, before[name]) for name, value in checkpoint['weights'].items())
    assert checkpoint['skipped'] == 1 and checkpoint['scaler']['scale'] == 2 ** 15


# ---------------------------------------------------------------------------------------------------------------------
# Weights of other runs

def test_a_run_from_another_runs_weights(here):
    random = np.random.default_rng(0)
    data = Path('data/toy'), 'stream', random.integers(0, 9, 500), random.integers(0, 9, 100)
    save_data(*data, config=dict(vocab_size=9))
    train.main(**GPT, out_dir='out/first')
    train.main('--init_from=first', **(GPT | dict(max_iters=2, learning_rate=0.0, muon_learning_rate=0.0, out_dir='out/next')))
    assert faults.same(weights('out/first'), weights('out/next'))
    train.main(**GPT | dict(ema=0.9), out_dir='out/averaged')  # what was evaluated
    train.main('--init_from=averaged', **(GPT | dict(max_iters=2, learning_rate=0.0, muon_learning_rate=0.0, out_dir='out/last')))
    assert faults.same(read('out/averaged')['ema'], weights('out/last'))
    sizes = {name: value for name, value in GPT.items() if name not in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    train.main(**sizes, init_from='out/first', out_dir='out/sizes')  # they come with the weights
    assert read('out/sizes')['model_config']['n_embd'] == 16
    train.main(**sizes | dict(max_iters=5), out_dir='out/sizes')  # and stay, however it is resumed
    assert read('out/sizes')['step'] == 5
    with pytest.raises(UserError, match='the weights that init_from names are for other sizes'):
        train.main(**(GPT | dict(n_embd=32)), init_from='first', out_dir='out/wider')
    for name, value in dict(n_head=1, tie_embeddings=True, qk_norm=False, activation='gelu_tanh').items():  # of the same shapes
        with pytest.raises(UserError, match=f'the weights that init_from names were trained with {name}=.*: leave it out'):
            train.main(**GPT | {name: value}, init_from='first', out_dir='out/nonsense')
    train.main(**GPT | dict(block_size=4, dropout=0.1), init_from='first', out_dir='out/shorter')
    with pytest.raises(UserError, match='no such checkpoint'):
        train.main(**GPT, init_from='nowhere', out_dir='out/nowhere')
    with pytest.raises(UserError, match="init_from names a run of model='gpt', not 'fourm'"):
        run('out/b', init_from='first')
    for path, source in (('a', 'scratch'), ('b', 'out/a')):  # equal data from another path
        save_data(*data, config=dict(vocab_size=9), sums={'train/tokens.npy': '0'}, settings=dict(input=path))
        train.main(**GPT, init_from=source, out_dir=f'out/{path}')
    save_data(*data, config=dict(vocab_size=9), encoding='bpe')
    with pytest.raises(UserError, match='data/toy has other tokens than the run that init_from names .*with the same encoding$'):
        train.main(**GPT, init_from='first', out_dir='out/other')
    Path('data/toy/encoding.json').write_text('{}')
    own = f'bpe-{checkpoints.digest("data/toy/encoding.json")[:8]}'
    for encoding, remedy in ((own, ', as prepare.text does with --encoding=data/toy'), ('smollm2', ', as prepare.text does with --encoding=smollm2'),
                             ('bpe-0a1b2c3d', '. data/toy has another one now: prepare that text again, with another --out=, and name that folder as --encoding=')):
        source = read('out/first') | dict(meta=dict(encoding=encoding))
        with pytest.raises(UserError, match=f'with the same encoding{re.escape(remedy)}$'):
            checkpoints.start_from(None, {'': source}, 'data/toy', dict(encoding='gpt2'))


# ---------------------------------------------------------------------------------------------------------------------
# Faults

@pytest.mark.parametrize('changes, message', [
    (dict(dataset='scnes'), "dataset='scnes': there is neither data/scnes/meta.json nor a script prepare/scnes.py"),
    (dict(dataset='download'), 'nor a script prepare/download.py that makes it .there are cifar10, cifar10_modalities'),
    (dict(modalities='rgb:4:2x2'), 'modalities is decided by the data set'),
    (dict(train_modalities='rgb sound'), "there is no modality 'sound'"),
    (dict(micro_batch_size=3), 'does not split into micro-batches of 3'),
    (dict(n_head=5), 'must be a multiple'), (dict(n_head=0), 'n_head=0: must be at least 1'), (dict(n_embd=-8), 'n_embd=-8: must be at least 1'),
    (dict(n_layer_encoder=0), 'n_layer_encoder=0: must be at least 1'), (dict(min_lr=5.0), 'min_lr=5.0: must be at most 1'),
    (dict(decay=2.0), 'decay=2.0: must be at most 1'),
    (dict(device='gpu'), "device='gpu': choose auto, cuda, mps or cpu"),
    (dict(dtype='float8'), 'choose auto, float32, bfloat16 or float16'),
    (dict(grad_clip=-1.0), 'grad_clip=-1.0: must be at least 0'),
    (dict(seed=-1), 'seed=-1: must be at least 0'), (dict(seed=2 ** 64), 'seed=18446744073709551616: must be at most'),
    (dict(batch_size=10 ** 18), 'batch_size=1000000000000000000: must be at most 16777216'),
    (dict(batch_size=0), 'batch_size=0: must be at least 1'), (dict(max_iters=0), 'max_iters=0: must be at least 1'),
    (dict(threads=100_000), 'threads=100000: must be at most 1024'), (dict(beta2=1.0), 'beta2=1.0: must be below 1'),
    (dict(checksum=True), "unknown setting 'checksum'"),
    (dict(init_from=Path('out/nobody')), 'out/nobody/ckpt_last.pt: no such checkpoint'),
])
def test_faulty_settings(here, changes, message):
    with pytest.raises(UserError, match=message) as error:
        run('out/a', **changes)
    assert '\n' not in str(error.value)


def test_the_command_line_prints_one_line(here):
    done = subprocess.run([sys.executable, train.__file__, '--batchsize=3'], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: command line: unknown setting 'batchsize'; did you mean 'batch_size'?\n"
    done = subprocess.run([sys.executable, train.__file__, '--model=fourm', '--dataset=scenes', '--out_dir=/dev/null/out'],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: /dev/null is a file or a link to nothing: remove it, or choose another --out_dir=\n"
