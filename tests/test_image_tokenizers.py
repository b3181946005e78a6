"""FSQ's arithmetic, and the autoencoder around it."""
import itertools

import numpy as np
import pytest
import torch

from config import UserError
from prepare.image_tokenizers import (CLASSES, Config, ImageTokenizer, digits_to_ids, from_network, ids_to_digits, quantize,
                                      reconstruction_loss, to_network)

LEVELS = [(2, 2), (8, 8, 8), (5, 4, 3), (16, 16, 16), (8, 5, 5, 5)]


def small(**changes):
    torch.manual_seed(0)
    return ImageTokenizer(Config(**(dict(size=16, patch=8, channels=3, levels='8*8*5', n_embd=32, n_head=2) | changes)))


@pytest.mark.parametrize('levels', LEVELS)
def test_ids_and_codes_are_inverse(levels):
    levels = torch.tensor(levels, dtype=torch.float)
    ids = torch.arange(int(levels.prod()))
    digits = ids_to_digits(ids, levels)
    assert torch.equal(digits_to_ids(digits, levels), ids)
    assert np.array_equal(digits.numpy().T, np.unravel_index(ids.numpy(), levels.long().tolist()))  # the first digit leads


@pytest.mark.parametrize('levels', LEVELS[:3])
def test_every_code_is_reachable(levels):
    levels = torch.tensor(levels, dtype=torch.float)
    grid = torch.tensor(list(itertools.product(torch.linspace(-6, 6, 60).tolist(), repeat=len(levels))))
    ids = digits_to_ids(quantize(grid, levels), levels)
    assert len(ids.unique()) == levels.prod()


def test_quantizer_stays_in_float32_and_passes_gradients():
    levels = torch.tensor([16., 7.])
    z = torch.randn(50, 2, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        digits = quantize(z, levels)
    assert digits.dtype == torch.float32
    torch.testing.assert_close(digits, digits.round(), atol=1e-5, rtol=0)
    digits.sum().backward()
    s = z.detach().sigmoid()
    torch.testing.assert_close(z.grad, s * (1 - s) * (levels - 1))  # that of the bounded latent: straight through the rounding


def test_shapes_and_faults():
    tokenizer = small()
    images = torch.randn(2, 3, 16, 16)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 4) and ids.max() < tokenizer.vocabulary == 320 and tokenizer.decode(ids).shape == images.shape
    with pytest.raises(ValueError, match=r'\(3, 8, 8\).*\(3, 16, 16\)'):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))


def test_save_and_load(tmp_path):
    tokenizer, images = small(), torch.randn(4, 3, 16, 16)
    tokenizer.save(tmp_path / 'rgb.pt')
    assert torch.equal(ImageTokenizer.load(tmp_path / 'rgb.pt').encode(images), tokenizer.encode(images))
    for damage in (lambda b: b[:len(b) // 2], lambda b: b'', lambda b: b'not a tokenizer'):
        (tmp_path / 'bad.pt').write_bytes(damage((tmp_path / 'rgb.pt').read_bytes()))
        with pytest.raises(UserError, match='bad.pt: missing, truncated'):
            ImageTokenizer.load(tmp_path / 'bad.pt')


@pytest.mark.parametrize('channels', [3, CLASSES])
def test_overfits_one_batch(channels):
    tokenizer = small(channels=channels, n_layer_encoder=1, n_layer_decoder=1)
    labels = torch.randint(CLASSES, (4, 2, 2)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = to_network('segmentation', labels.numpy()) if channels == CLASSES else labels[:, None].expand(-1, 3, -1, -1) / 12.5 - 1
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    first = None
    for _ in range(200):
        optimizer.zero_grad()
        loss = reconstruction_loss(tokenizer, images, torch.ones(4, 16, 16))
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.03 * first


def test_fields_to_the_network_and_back():
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(from_network('rgb', to_network('rgb', rgb)), rgb)
    depth = random.uniform(4, 18, (2, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(from_network('depth', to_network('depth', depth)), depth, rtol=1e-5)
    labels = random.integers(0, CLASSES, (2, 8, 8), dtype=np.uint8)
    assert np.array_equal(from_network('segmentation', to_network('segmentation', labels)), labels)
    normal = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    np.testing.assert_allclose(from_network('normal', to_network('normal', normal)), normal, atol=1e-5)
