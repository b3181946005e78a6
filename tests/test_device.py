"""All chapters on a simulated device (tests/pretend.py): no operator mixes devices, and host-device syncs are rare."""
from pathlib import Path

import pytest
import torch

import flow
import fourm
import gpt
import maskgit
import train
import vlm
from engine import checkpoints, devices
from lab import gpt as lab_gpt
from lab import maskgit as lab_maskgit
from lab import retrieval, speculate
from tests import faults, pretend

THERE = torch.device('meta')


def test_the_simulated_device():
    with pretend.device() as waits:
        a, b = torch.randn(3, 4, device=THERE), torch.nn.Linear(4, 5).to(THERE)
        loss = b(a).square().mean()
        loss.backward()
        assert b.weight.grad.device == THERE and not waits
        assert loss.item() > 0 and sum(waits.values()) == 1
        with pytest.raises(RuntimeError, match='tensors of two devices'):
            a + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match='generator is on another device'):
            torch.rand(3, device=THERE, generator=torch.Generator())
        with pytest.raises(RuntimeError, match='generator is on another device'):
            torch.rand(3, generator=torch.Generator(THERE).manual_seed(0))
    loss = torch.nn.functional.linear(a.inner, b.weight.inner.requires_grad_(), b.bias.inner).square().mean()
    torch.testing.assert_close(b.weight.grad.inner, torch.autograd.grad(loss, b.weight.inner)[0])


@pytest.mark.parametrize('chapter', faults.CASES)
def test_training_has_one_sync_per_step(chapter, tmp_path, monkeypatch):
    """For the gradient's norm: two more steps, two more syncs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, 'matmul_rate', lambda *_: 1e9)
    faults.make_data(chapter, faults.CASES[chapter][0])
    settings = faults.RUN | faults.CASES[chapter][1] | dict(
        model=chapter, dataset=chapter, device='meta', ema=0.9, log_interval=9)
    found = []
    for steps in (2, 4):
        with pretend.device() as waits:
            train.main(**(settings | dict(max_iters=steps, eval_interval=steps, out_dir=f'out/{steps}')))
        found.append(waits)
    assert sum((found[1] - found[0]).values()) == 2, found[1] - found[0]
    assert checkpoints.read(Path('out/4/ckpt_last.pt'))['step'] == 4


SMALL = dict(n_layer=1, n_head=2, n_embd=16)


def test_generation():
    with pretend.device():
        def there(model):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            return model.to(THERE).eval(), torch.Generator(THERE).manual_seed(0)
        model, generator = there(gpt.GPT(gpt.Config(vocab_size=9, block_size=16, **SMALL)))
        tokens = torch.tensor([[1, 2, 3], [-1, -1, 4]], device=THERE)
        assert model.generate(tokens, 20, 0.8, 5, 0.9, 0.01, 8, generator).device == THERE
        assert len(list(speculate.generate_speculative(model, model, tokens[:1], 9, generator=generator))) == 9
        lab_gpt.log_prob(model, tokens)

        model, generator = there(maskgit.MaskGIT(maskgit.Config(vocab_size=9, grid='3x3', n_classes=2, **SMALL)))
        hidden, classes = torch.full((2, 9), -1, device=THERE), torch.tensor([0, 1], device=THERE)
        for order in maskgit.ORDERS:
            model.generate(hidden, classes, 4, order=order, guidance=2.0, choice_temperature=1.0, generator=generator)
        lab_maskgit.nll_upper_bound(model, hidden.clamp(min=0), classes, 2)

        model, generator = there(fourm.FourM(fourm.Config(
            'a:4*4:3x3 b:9:6', n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=16)))
        known = model.generate({'a': hidden.clamp(min=0)}, ['b'], generator=generator)
        known = model.generate(known, ['a'], 4, order='halton', guidance=2.0, condition_weights=dict(b=2.0),
                               generator=generator)
        decoded = retrieval.decode_modality(model, known, 'b')
        retrieval.log_prob(model, decoded, 'b', torch.zeros(2, 6, dtype=torch.long))
        retrieval.pooled_embedding(model, known)

        model, generator = there(flow.Flow(flow.Config(image_size=4, patch_size=2, n_classes=2, **SMALL)))
        for method in ('euler', 'midpoint', 'heun'):
            trajectory, _ = model.generate(classes, 2, method, 2.0, (0.2, 0.8), generator)
        flow.log_likelihood(model.velocity_fn(classes), trajectory[-1], torch.ones_like(trajectory[:1]), 0.1)

        model, generator = there(vlm.VLM(vlm.Config(
            vocab_size=9, image_token=8, image_size=16, block_size=16, vision_layer=1, vision_head=2, vision_embd=16,
            **SMALL)))
        images = torch.zeros(2, 1, 16, 16, 3, device=THERE)
        cache = model.prefill(torch.full((2, 1), 8, device=THERE), images, 2)
        assert model.generate(tokens.repeat(2, 1), cache, 3, 1.0, generator=generator).shape == (4, 3)
