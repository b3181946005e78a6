"""What a run measures: exact means, FLOPs and rates between two lines of the log."""
import math

import pytest
import torch

import gpt
import train
from config import UserError
from engine import devices, meters

LOGS = dict(loss=torch.tensor([6.0, 2]), tokens=torch.tensor([9, 1]))


def test_what_has_no_targets_has_no_loss():
    values, tokens = meters.means(dict(loss_a=torch.tensor([6.0, 2]), loss_b=torch.zeros(2), tokens=torch.tensor([9.0, 1])))
    assert values == dict(loss_a=3.0) and tokens == 9
    assert meters.mean_loss(values) == 3 and math.isnan(meters.mean_loss({}))


def test_means_over_micro_batches_of_different_sizes():
    """Sums and counts are added, not means; a log that only one of them has counts there alone."""
    total = {}
    for logs in (dict(loss=(6.0, 3), tokens=(3.0, 1)), dict(loss=(1.0, 1), tokens=(1.0, 1), more=(8.0, 2))):
        total = meters.add_logs(total, {name: torch.tensor(pair) for name, pair in logs.items()})
    assert meters.means(total) == (dict(loss=1.75, more=4.0), 4)
    assert meters.mean_loss(dict(loss_a=1.0, loss_b=3.0, accuracy=9.0)) == 2


@pytest.mark.parametrize('outputs', [
    torch.tensor(1.0), (torch.tensor([1.0, 2.0]), LOGS), (torch.tensor(1.0), None), (torch.tensor(1.0), dict(tokens=LOGS['tokens'])),
    (torch.tensor(1.0), dict(loss=LOGS['loss'])), (torch.tensor(1.0), LOGS | dict(accuracy=(3, 4))),
    (torch.tensor(1.0), LOGS | dict(accuracy=torch.tensor(0.5)))])
def test_what_forward_returns_is_checked(outputs):
    """In a chapter of a student's own."""
    assert meters.logs_of((torch.tensor(1.0), LOGS)) is LOGS
    with pytest.raises(UserError, match='forward must return the loss, .*a dict of tensors .sum, count.* docs/yours.md') as error:
        meters.logs_of(outputs)
    assert '\n' not in str(error.value)


def test_a_line(monkeypatch):
    """Two micro-batches in two seconds, of which half a second was spent waiting for data."""
    clock = [100.0]
    monkeypatch.setattr(meters, 'time', type('Clock', (), dict(perf_counter=staticmethod(lambda: clock[0]))))
    monkeypatch.setattr(devices, 'matmul_rate', lambda device, dtype: 1e6)
    model, state = gpt.GPT(gpt.Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)), train.State(step=7, tokens=5)
    meter = meters.Meter(model, torch.device('cpu'), torch.float32)

    def slow():
        for _ in range(2):
            clock[0] += 0.25
            yield dict(tokens=torch.zeros(3, 9, dtype=torch.int64))
    batches = slow()
    for _ in range(2):
        batch = meter.take(batches)
        loss, logs = model(batch)
        meter.add(logs)
        clock[0] += 0.75
    line = meter.line(state, math.inf, 0.1)
    flops = devices.count_flops(model, batch)
    assert flops > 2 * 3 * 8 * 3 * 16 * 16 * 4  # more than the MLP's forward pass of 24 tokens
    assert line['mfu'] == pytest.approx(2 * flops / 2.0 / 1e6, abs=1e-4) and line['data_wait'] == 0.25
    assert line['tokens_per_second'] == 24 and line['grad_norm'] == math.inf and line['seconds'] == 2.0 and 'skipped' not in line
    assert (state.tokens, state.seconds, line['step'], line['tokens']) == (53, 2.0, 7, 53)
    assert line['train_loss'] == pytest.approx(loss.item(), rel=1e-5) and 'loss' not in line
    assert meter.total == {} and meter.work == 0


def test_the_line_of_an_evaluation():
    state = train.State(step=3, tokens=9, seconds=1.234)
    assert meters.evaluation_line(state, dict(loss_a=1.0, loss_b=3.0, share=0.5)) == dict(
        step=3, tokens=9, seconds=1.23, val_loss=2.0, val_loss_a=1.0, val_loss_b=3.0, val_share=0.5)
