"""The slow ways that bench.py measures against are slow only."""
import pytest
import torch
import torch.nn.functional as F

from bench import Padded
from fourm import Config, FourM


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
