"""The slow ways compute what the fast ones compute."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import config
import lab
from config import UserError
from fourm import Config, FourM
from lab import timing
from tests import comparisons, pretend
from tests.comparisons import Padded

CPU, THERE = torch.device('cpu'), torch.device('meta')


@pytest.mark.parametrize('part, small, n, device', [
    ('generation', dict(max_new_tokens=4), 4, CPU), ('generation', dict(max_new_tokens=4), 4, THERE), ('unmasking', {}, 10, CPU),
    ('cross_entropy', dict(vocab_size=50, rows=8), 2, CPU), ('cross_entropy', dict(vocab_size=50, rows=8), 2, THERE),
    ('answers', {}, 2, CPU), ('answers', {}, 2, THERE)])
def test_parts(part, small, n, device, monkeypatch, capsys):
    """Each asserts that both sides agree, on the pretended device too; padding and speculation take minutes or a trained run."""
    monkeypatch.setattr(comparisons, 'timed', lambda run, seconds=0: timing.timed(run, 0.01))
    monkeypatch.setattr(comparisons, 'find_peaks', lambda device: dict(copy=1e9))
    monkeypatch.setattr(lab, 'compile_passes', lambda model: False)
    if device != CPU:
        monkeypatch.setattr(comparisons, 'peak_bytes', lambda run, device: run() and 1)
    with nullcontext() if device == CPU else pretend.device():
        comparisons.PARTS[part](comparisons.SETTINGS | dict(n_layer=1, n_embd=32) | small, device)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(' x') for line in lines) >= n and lines[0].endswith('1.00 x')


def test_empty_slots_change_nothing():
    torch.manual_seed(0)
    model = FourM(Config('rgb:4*4*4:4x4 depth:4*4*4:4x4', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2,
                         num_input_tokens='6', num_target_tokens='7', full_modality_prob=0.0, unconditional_prob=0.0))
    batch = {name: torch.randint(64, (3, 16)) for name in model.batch_keys}
    batch |= model.prepare_batch(batch, torch.Generator().manual_seed(0), torch.Generator())
    batch['target_ids'] = torch.cat((batch['rgb'], batch['depth']), 1).gather(1, batch['target_position_ids'])
    slow = Padded(model, 64, 32)
    for parameter in slow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    empty = dict(input_ids=0, input_position_ids=model.N, target_position_ids=model.N, target_ids=-1)
    padded = {name: F.pad(batch[name], (0, 5), value=value) for name, value in empty.items()}
    assert slow(padded)[0].item() == pytest.approx(slow(batch)[0].item(), rel=1e-5) and slow(batch)[0] > 1


@pytest.mark.parametrize('arguments, message', [
    (['--part=trainin'], 'choose one of generation, unmasking'), (['--sample=3'], "did you mean 'samples'"),
    (['config/gpt_mnist.py'], "config/gpt_mnist.py: unknown setting 'model'")])
def test_faults(arguments, message, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    with pytest.raises(UserError, match=message):
        comparisons.main(*arguments)
