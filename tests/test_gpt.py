"""The attention core against softmax written out in float64, and GPT's generation against one without a cache."""
import math

import pytest
import torch

from gpt import GPT, Attention, Config, filter_logits, rotary, rotate, sample_token


def written_out(layer, x, turn, context=None, context_turn=None, causal=False):
    """Attention by the formula, one head and one query at a time."""
    D, nh = x.size(-1), layer.n_head
    hd = D // nh
    source = x if context is None else context
    q, kv = (layer.q(x), layer.qkv(source)) if context is not None else (layer.qkv(x)[..., :D], layer.qkv(x)[..., D:])
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for h in range(nh):
            part = slice(h * hd, (h + 1) * hd)
            k, v = kv[b, :, part], kv[b, :, D:][:, part]

            def turned(vector, at):
                vector = vector / (vector.square().mean() + torch.finfo(vector.dtype).eps).sqrt()
                z = torch.complex(vector[:hd // 2], vector[hd // 2:]) * torch.complex(*at)
                return torch.cat((z.real, z.imag))
            place = context_turn if context is not None else turn
            keys = torch.stack([turned(k[j], (place[0][j], place[1][j])) for j in range(len(k))])
            for i in range(x.size(1)):
                query = turned(q[b, i, part], (turn[0][i], turn[1][i]))
                logits = 12 * keys @ query / hd
                if causal:
                    logits = logits[:i + 1]
                out[b, i, part] = logits.softmax(0) @ v[:len(logits)]
    return layer.out(out)


@pytest.mark.parametrize('cross, causal', [(False, False), (False, True), (True, False)])
def test_core_against_softmax(cross, causal):
    torch.manual_seed(0)
    layer = Attention(16, 2, cross=cross).double()
    torch.nn.init.normal_(layer.out.weight)
    x, context = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double() if cross else None
    turn, context_turn = ([t.double() for t in rotary(torch.rand(n, 2) * 9, 8, 100)] for n in (5, 7))
    results = []
    for function in (layer, lambda *a, **k: written_out(layer, *a, **k)):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        y = function(inputs, turn, context, context_turn if cross else None, causal=causal)
        y.square().sum().backward()
        results.append((y, inputs.grad, layer.qkv.weight.grad.clone()))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_rotary_depends_on_differences_alone():
    q, k = torch.randn(2, 1, 1, 1, 32)
    def product(a, b):
        return (rotate(q, *rotary(torch.tensor([a]), 32, 100)) * rotate(k, *rotary(torch.tensor([b]), 32, 100))).sum()
    torch.testing.assert_close(product([3., 7.], [1., 2.]), product([13., 107.], [11., 102.]), rtol=1e-4, atol=1e-4)
    assert abs(product([3., 7.], [1., 2.]) - product([3., 7.], [1., 3.])) > 1e-3


def small(**changes):
    torch.manual_seed(1)
    model = GPT(Config(**(dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16) | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_first_loss_is_ln_v():
    model = GPT(Config(vocab_size=50304, n_layer=1, n_embd=32, block_size=8))
    loss, logs = model({'tokens': torch.randint(50304, (2, 9))})
    assert loss.item() == pytest.approx(math.log(50304), abs=1e-4) and logs['tokens'][0] == 16


def test_no_position_sees_its_future():
    model = small()
    tokens = torch.randint(11, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 11
    a, b = model.trunk(tokens), model.trunk(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_generate_equals_the_uncached_reference():
    """Also far beyond block_size, where the cache is refilled from the last half of the context."""
    model, T = small(), 12
    for length in (1, 5, 12, 20):
        start = torch.randint(11, (3, length))
        tokens, context = start, start[:, -T:] if length < T else start[:, -(T // 2):]
        for _ in range(30):
            if context.size(1) > T:
                context = tokens[:, -(T // 2):]
            token = model.head(model.trunk(context))[:, -1].argmax(-1, keepdim=True)
            tokens, context = torch.cat((tokens, token), 1), torch.cat((context, token), 1)
        assert torch.equal(model.generate(start, 30, temperature=0), tokens)


def test_filters():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, top_p=0.65).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, top_p=0.01).isfinite().tolist() == [[False, True, False, False]]
    assert filter_logits(logits, temperature=0.1, top_p=0.9).isfinite().sum() == 1  # temperature first
    assert sample_token(logits, temperature=0) == 1
    drawn = sample_token(logits.expand(20000, -1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount() / 20000, logits[0].exp(), atol=0.02, rtol=0)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=17, block_size=16, n_layer=2, n_head=2, n_embd=32))
    batch = {'tokens': (torch.randperm(17) + torch.arange(4)[:, None]) % 17}  # no token twice in a row
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
