"""The attention core against softmax written out in float64, and GPT's generation against one without a cache."""
import math

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import GPT, MLP, Attention, Config, Dropout, KVCache, cross_entropy, filter_logits, rotary, rotate, sample_token


def written_out(layer, x, turn, context=None, context_turn=None, causal=False):
    """Attention by the formula, one head and one query at a time."""
    D, hd = x.size(-1), layer.head_size
    source = x if context is None else context
    q, kv = (layer.q(x), layer.qkv(source)) if context is not None else (layer.qkv(x)[..., :D], layer.qkv(x)[..., D:])
    k, v = kv.chunk(2, -1)
    group = D // k.size(-1)  # query heads for each head of keys and values
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for h in range(D // hd):
            part, shared = slice(h * hd, (h + 1) * hd), slice(h // group * hd, (h // group + 1) * hd)

            def turned(vector, at):
                if layer.qk_norm:
                    vector = vector / (vector.square().mean() + 1e-6).sqrt()
                z = torch.complex(vector[:hd // 2], vector[hd // 2:]) * torch.complex(*at)
                return torch.cat((z.real, z.imag))
            place = context_turn if context is not None else turn
            keys = torch.stack([turned(key, at) for key, at in zip(k[b, :, shared], zip(*place))])
            for i in range(x.size(1)):
                query = turned(q[b, i, part], (turn[0][i], turn[1][i]))
                logits = keys @ query * (12 / hd if layer.qk_norm else hd ** -0.5)
                if causal:
                    logits = logits[:i + 1]
                out[b, i, part] = logits.softmax(0) @ v[b, :len(logits), shared]
    return layer.out(out)


@pytest.mark.parametrize('cross, causal, n_kv_head, qk_norm', [
    (False, False, 0, True), (False, True, 0, True), (True, False, 0, True), (False, True, 2, True), (False, True, 1, False)])
def test_core_against_softmax(cross, causal, n_kv_head, qk_norm):
    torch.manual_seed(0)
    layer = Attention(32, 4, n_kv_head, cross, qk_norm).double()
    torch.nn.init.normal_(layer.out.weight)
    x, context = torch.randn(2, 5, 32).double(), torch.randn(2, 7, 32).double() if cross else None
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


def test_swiglu():
    mlp = MLP(8, 12, 'swiglu')
    torch.nn.init.normal_(mlp.down.weight)
    x = torch.randn(3, 8)
    gate, up = mlp.up.weight[:12], mlp.up.weight[12:]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)


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
    tied = GPT(Config(vocab_size=50304, n_layer=1, n_embd=32, block_size=8, tied=True))
    assert tied({'tokens': torch.randint(50304, (2, 9))})[0].item() == pytest.approx(math.log(50304), abs=0.1)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tied.parameters()) == 50304 * 32


def test_no_position_sees_its_future():
    model = small()
    tokens = torch.randint(11, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 11
    a, b = model.trunk(tokens), model.trunk(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def reference(model, start, n, end=-1):
    """Greedy generation without a cache, each row by itself, its padding cut off; and the logits of the first new tokens."""
    T, rows, first = model.config.block_size, [], []
    for tokens in start[:, -T:]:
        context, new, room = tokens, [], T - len(tokens)
        for _ in range(n):
            if room < 0:  # all rows of a batch start anew together, from what fills the last half of the context
                context = torch.cat((tokens, torch.tensor(new)))[-max(1, T // 2):]
                room = T - len(context)
            if end in new:
                new.append(-1)
            else:
                logits = model.logits(model.trunk(context[context >= 0][None]))[0, -1]
                first += [logits] if not new else []
                new.append(logits.argmax().item())
            context, room = torch.cat((context, torch.tensor(new[-1:]))), room - 1
        rows.append(new)
    return torch.tensor(rows), torch.stack(first)


@pytest.mark.parametrize('changes', [{}, dict(n_kv_head=1), dict(mlp='swiglu', qk_norm=False, tied=True, token_shift=False)])
@pytest.mark.parametrize('length', [1, 5, 12, 13, 20])
def test_generate_equals_the_uncached_reference(length, changes):
    """Also far beyond block_size, where a new cache starts from the last half of the context; of a longer prompt the last
    block_size tokens are read."""
    model, start = small(**changes), torch.randint(11, (3, length))
    assert torch.equal(model.generate(start, 30, temperature=0)[:, length:], reference(model, start, 30)[0])


def in_chunks(model, tokens, chunk):
    return torch.stack(list(model.stream(tokens, 25, temperature=0, chunk=chunk)), 1)


@torch.no_grad()
def test_prompts_of_different_lengths_and_chunks():
    model, start = small(n_kv_head=1), torch.randint(11, (3, 9))
    start[0, :4] = start[2, :8] = -1
    expected, logits = reference(model, start, 25)
    assert torch.equal(model.generate(start, 25, temperature=0)[:, 9:], expected)
    for chunk in (1, 2, 4, 9):
        assert torch.equal(in_chunks(model, start, chunk), expected)
        cache = KVCache(12, ragged=True)
        for part in start.split(chunk, 1):
            x = model.trunk(part, cache)
        torch.testing.assert_close(model.logits(x[:, -1]), logits, rtol=1e-4, atol=1e-4)
    full = start.clamp(min=0)
    for chunk in (2, 5):  # without padding no row needs a mask of its own
        assert torch.equal(in_chunks(model, full, chunk), model.generate(full, 25, temperature=0)[:, 9:])


def test_rows_end_by_themselves():
    model, start = small(), torch.randint(11, (4, 3))
    free = model.generate(start, 20, temperature=0)[:, 3:]
    end = free[0, 5].item()
    new = model.generate(start, 20, temperature=0, end=end)[:, 3:]
    assert torch.equal(new, reference(model, start, 20, end)[0][:, :new.size(1)])
    assert all(row[row.tolist().index(end) + 1:].eq(-1).all() for row in new if end in row)
    alone = model.generate(start[:1], 20, temperature=0, end=end)
    assert alone[0, -1] == end and alone.size(1) == 3 + free[0].tolist().index(end) + 1  # stops when every row has ended
    assert torch.equal(torch.stack(list(model.stream(start, 20, temperature=0, end=end)), 1), new)
    assert torch.equal(model.generate(start, 0), start)


@torch.no_grad()
def test_rows_that_have_ended_stay_so_in_a_new_cache():
    """Also a row whose `end` is the last token before the new cache; and in the shortest context."""
    for T in (12, 1):
        model, start = small(block_size=T), torch.randint(11, (4, T))
        for end in model.generate(start, 1, temperature=0)[:, -1].tolist():
            new = model.generate(start, 30, temperature=0, end=end)[:, T:]
            assert torch.equal(new, reference(model, start, 30, end)[0][:, :new.size(1)])


def test_a_cache_is_as_long_as_the_text(monkeypatch):
    """min(T, prompt + new tokens), the last of which is not read, rounded up to 64. What is not written is not read: nan
    here."""
    model, start, lengths = small(block_size=300, n_layer=1), torch.randint(11, (2, 60)), []
    ragged = start.clone()
    ragged[0, :9] = -1

    class Watched(KVCache):
        def append(self, layer, k, v):
            new, end = layer not in self.store, self.filled + k.size(2)
            super().append(layer, k, v)
            if new:
                lengths.append(self.store[layer].size(3))
                self.store[layer][:, :, :, end:] = torch.nan
            return self.store[layer][:, :, :, :end]
    for tokens, n, expected in ((start, 3, [64]), (start, 5, [64]), (start, 6, [128]), (ragged, 100, [192]), (start, 241, [320]),
                                (start[:, :1], 1, [64]), (start, 250, [320, 192])):  # the last: 241, then 9 after the last 150
        plain = model.generate(tokens, n, temperature=0)
        lengths.clear()
        with monkeypatch.context() as patch:
            patch.setattr(gpt, 'KVCache', Watched)
            assert torch.equal(model.generate(tokens, n, temperature=0), plain) and lengths == expected


@torch.no_grad()
@pytest.mark.parametrize('ragged', (False, True))
def test_a_cache_grows(ragged):
    model, tokens, cache = small(block_size=200), torch.randint(11, (2, 150)), KVCache(1, ragged)
    parts = [model.trunk(part, cache) for part in tokens.split([60, 4, 1, 63, 1, 21], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.trunk(tokens), rtol=1e-4, atol=1e-4)
    assert {store.size(3) for store in cache.store.values()} == {192}


def test_chunked_cross_entropy_has_the_same_gradient():
    x, head, targets = torch.randn(50, 8), torch.randn(300, 8), torch.randint(300, (50,))
    targets[::7] = -1
    results = []
    for most in (2 ** 24, 300 * 7, 1):
        a, b = x.clone().requires_grad_(), head.clone().requires_grad_()
        loss = cross_entropy(a, b, targets, most=most).sum()
        loss.backward()
        results.append((loss, a.grad, b.grad))
    expected = -(x @ head.T).log_softmax(-1)[targets >= 0, targets[targets >= 0]].sum()
    for loss, *gradients in results:
        torch.testing.assert_close(loss, expected)
        for one, other in zip(gradients, results[0][1:]):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_targets_that_are_none_do_not_count():
    model = small()
    tokens = torch.randint(11, (1, 13))
    short = torch.cat((tokens[:, :8], torch.full((1, 5), -1)), 1)
    (a, logs), (b, _) = model({'tokens': short}), model({'tokens': tokens[:, :8]})
    torch.testing.assert_close(a, b)
    assert logs['loss'][1] == logs['tokens'][0] == 7


def test_filters():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, top_p=0.65).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, top_p=0.01).isfinite().tolist() == [[False, True, False, False]]
    assert filter_logits(logits, min_p=0.6).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, temperature=0.1, top_p=0.9).isfinite().sum() == 1  # temperature first
    assert filter_logits(logits, temperature=9.0, min_p=0.6).isfinite().all()
    assert torch.equal(filter_logits(logits, top_k=99), logits)
    for strict in (dict(top_k=1), dict(top_p=0), dict(top_p=1e-12), dict(min_p=1), dict(temperature=1e-6), dict(top_p=0, min_p=1)):
        assert filter_logits(logits, **strict).softmax(-1).tolist() == [[0, 1, 0, 0]]  # one token stays
    assert sample_token(logits, temperature=0) == 1
    drawn = sample_token(logits.expand(20000, -1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount() / 20000, logits[0].exp(), atol=0.02, rtol=0)


@pytest.mark.parametrize('wrong', [
    dict(temperature=-1.0), dict(temperature=1e-40), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=-1),
    dict(top_p=-0.1), dict(top_p=1.1), dict(top_p=math.nan), dict(min_p=-0.1), dict(min_p=1.5), dict(min_p=math.nan)])
def test_arguments_out_of_range(wrong):
    """Also those that temperature 0 has no use for."""
    (name, value), logits = *wrong.items(), torch.zeros(1, 11)
    for sample in (lambda: filter_logits(logits, **wrong), lambda: sample_token(logits, **wrong),
                   lambda: sample_token(logits, **(dict(temperature=0) | wrong)),
                   lambda: small().generate(torch.zeros(1, 3).long(), 2, **wrong)):
        with pytest.raises(ValueError, match=f'{name}={value} '):
            sample()
    with pytest.raises(ValueError, match='temperature=0 '):
        filter_logits(logits, temperature=0)


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


def test_dropout_is_of_channels():
    """All places of a sample lose the same ones, other samples other ones, and the mean stays; only training loses any."""
    torch.manual_seed(0)
    dropout, x = Dropout(0.25), torch.ones(8, 5, 1000)
    y = dropout(x)
    assert torch.equal(y, y[:, :1].expand_as(y)) and not torch.equal(y[0], y[1])
    assert torch.allclose(y[y > 0], torch.tensor(4 / 3)) and (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)
