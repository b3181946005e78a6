"""The attention core against softmax written out in float64, and GPT's generation against one without a cache."""
import math

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import (GPT, MLP, Attention, ChannelDropout, Config, KVCache, apply_rope, chunked_cross_entropy, filter_logits,
                 rope_cos_sin, sample_token)


def written_out(layer, x, rope, context=None, context_rope=None, causal=False):
    """Attention by its formula, one head and one query at a time."""
    D, hd = x.size(-1), layer.head_dim
    source = x if context is None else context
    q, kv = (layer.q(x), layer.qkv(source)) if context is not None else (layer.qkv(x)[..., :D], layer.qkv(x)[..., D:])
    k, v = kv.chunk(2, -1)
    group = D // k.size(-1)  # query heads for each head of keys and values
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for h in range(D // hd):
            part, shared = slice(h * hd, (h + 1) * hd), slice(h // group * hd, (h // group + 1) * hd)

            def norm_and_rope(vector, at):
                if layer.qk_norm:
                    vector = vector / (vector.square().mean() + 1e-6).sqrt()
                z = torch.complex(vector[:hd // 2], vector[hd // 2:]) * torch.complex(*at)
                return torch.cat((z.real, z.imag))
            place = context_rope if context is not None else rope
            keys = torch.stack([norm_and_rope(key, at) for key, at in zip(k[b, :, shared], zip(*place))])
            for i in range(x.size(1)):
                query = norm_and_rope(q[b, i, part], (rope[0][i], rope[1][i]))
                logits = keys @ query * (12 / hd if layer.qk_norm else hd ** -0.5)
                if causal:
                    logits = logits[:i + 1]
                out[b, i, part] = logits.softmax(0) @ v[b, :len(logits), shared]
    return layer.out(out)


@pytest.mark.parametrize('cross, causal, n_kv_head, qk_norm', [
    (False, False, 0, True), (False, True, 0, True), (True, False, 0, True), (False, True, 2, True),
    (False, True, 1, False)])
def test_core_against_softmax(cross, causal, n_kv_head, qk_norm):
    torch.manual_seed(0)
    layer = Attention(32, 4, n_kv_head, cross, qk_norm).double()
    torch.nn.init.normal_(layer.out.weight)
    x, context = torch.randn(2, 5, 32).double(), torch.randn(2, 7, 32).double() if cross else None
    rope, context_rope = ([t.double() for t in rope_cos_sin(torch.rand(n, 2) * 9, 8, 100)] for n in (5, 7))
    results = []
    for function in (layer, lambda *a, **k: written_out(layer, *a, **k)):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        y = function(inputs, rope, context, context_rope if cross else None, causal=causal)
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


def test_rope_depends_on_differences_alone():
    q, k = torch.randn(2, 1, 1, 1, 32)

    def product(a, b):
        rope_a, rope_b = (rope_cos_sin(torch.tensor([position]), 32, 100) for position in (a, b))
        return (apply_rope(q, *rope_a) * apply_rope(k, *rope_b)).sum()
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
    tied = GPT(Config(vocab_size=50304, n_layer=1, n_embd=32, block_size=8, tie_embeddings=True))
    assert tied({'tokens': torch.randint(50304, (2, 9))})[0].item() == pytest.approx(math.log(50304), abs=0.1)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tied.parameters()) == 50304 * 32


def test_no_position_attends_to_later_ones():
    model = small()
    tokens = torch.randint(11, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 11
    a, b = model.backbone(tokens), model.backbone(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def reference(model, start, n, eos_id=-1):
    """Greedy generation without a cache, row by row without padding; and the logits of the first new tokens."""
    T, rows, first = model.config.block_size, [], []
    for tokens in start[:, -T:]:
        context, new, room = tokens, [], T - len(tokens)
        for _ in range(n):
            if room < 0:  # as for the whole batch: start again from the last half of the context
                context = torch.cat((tokens, torch.tensor(new)))[-max(1, T // 2):]
                room = T - len(context)
            if eos_id in new:
                new.append(-1)
            else:
                logits = model.logits(model.backbone(context[context >= 0][None]))[0, -1]
                first += [logits] if not new else []
                new.append(logits.argmax().item())
            context, room = torch.cat((context, torch.tensor(new[-1:]))), room - 1
        rows.append(new)
    return torch.tensor(rows), torch.stack(first)


@pytest.mark.parametrize('changes', [
    {}, dict(n_kv_head=1), dict(activation='swiglu', qk_norm=False, tie_embeddings=True, token_shift=False)])
@pytest.mark.parametrize('length', [1, 5, 12, 13, 20])
def test_generate_equals_the_uncached_reference(length, changes):
    """Also far beyond block_size, when a new cache starts from the last half of the context; of a longer prompt the
    last block_size tokens are read."""
    model, start = small(**changes), torch.randint(11, (3, length))
    assert torch.equal(model.generate(start, 30, temperature=0)[:, length:], reference(model, start, 30)[0])


def in_chunks(model, tokens, chunk, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GPT.step, '__defaults__', (chunk,))
        return torch.stack(list(model.stream(tokens, 25, temperature=0)), 1)


@torch.no_grad()
def test_prompts_of_different_lengths_and_chunks(monkeypatch):
    model, start = small(n_kv_head=1), torch.randint(11, (3, 9))
    start[0, :4] = start[2, :8] = -1
    expected, logits = reference(model, start, 25)
    assert torch.equal(model.generate(start, 25, temperature=0)[:, 9:], expected)
    for chunk in (1, 2, 4, 9):
        assert torch.equal(in_chunks(model, start, chunk, monkeypatch), expected)
        cache = KVCache(12, left_padded=True)
        for part in start.split(chunk, 1):
            x = model.backbone(part, cache)
        torch.testing.assert_close(model.logits(x[:, -1]), logits, rtol=1e-4, atol=1e-4)
    full = start.clamp(min=0)
    for chunk in (2, 5):  # without padding all rows have the same mask
        assert torch.equal(in_chunks(model, full, chunk, monkeypatch), model.generate(full, 25, temperature=0)[:, 9:])


def test_each_row_ends_at_its_own_end_token():
    model, start = small(), torch.randint(11, (4, 3))
    free = model.generate(start, 20, temperature=0)[:, 3:]
    eos_id = free[0, 5].item()
    new = model.generate(start, 20, temperature=0, eos_id=eos_id)[:, 3:]
    assert torch.equal(new, reference(model, start, 20, eos_id)[0][:, :new.size(1)])
    assert all(row[row.tolist().index(eos_id) + 1:].eq(-1).all() for row in new if eos_id in row)
    alone = model.generate(start[:1], 20, temperature=0, eos_id=eos_id)
    n = free[0].tolist().index(eos_id) + 1
    assert alone[0, -1] == eos_id and alone.size(1) == 3 + n  # stops when all rows are finished
    assert torch.equal(torch.stack(list(model.stream(start, 20, temperature=0, eos_id=eos_id)), 1), new)
    assert torch.equal(model.generate(start, 0), start)


@torch.no_grad()
def test_finished_rows_stay_finished_in_a_new_cache():
    """Also a row whose `eos_id` is the last token before the new cache; and in the shortest context."""
    for T in (12, 1):
        model, start = small(block_size=T), torch.randint(11, (4, T))
        for eos_id in model.generate(start, 1, temperature=0)[:, -1].tolist():
            new = model.generate(start, 30, temperature=0, eos_id=eos_id)[:, T:]
            assert torch.equal(new, reference(model, start, 30, eos_id)[0][:, :new.size(1)])


def test_a_cache_is_as_long_as_the_text(monkeypatch):
    """min(T, prompt + new tokens - 1), rounded up to 64, because the last token is not read. Positions that are not
    written, here nan, are not read."""
    model, start, lengths = small(block_size=300, n_layer=1), torch.randint(11, (2, 60)), []
    left_padded = start.clone()
    left_padded[0, :9] = -1

    class Watched(KVCache):
        def update(self, layer, k, v):
            i, new = layer.layer_idx, layer.layer_idx == len(self.kv)
            kv = super().update(layer, k, v)
            if new:
                lengths.append(self.kv[i].size(3))
                self.kv[i][:, :, :, self.cur_len + k.size(2):] = torch.nan
            return kv
    for tokens, n, expected in (
            (start, 3, [64]), (start, 5, [64]), (start, 6, [128]), (left_padded, 100, [192]), (start, 241, [320]),
            (start[:, :1], 1, [64]), (start, 250, [320, 192])):  # the last: 241, then 9 after the last 150
        plain = model.generate(tokens, n, temperature=0)
        lengths.clear()
        with monkeypatch.context() as patch:
            patch.setattr(gpt, 'KVCache', Watched)
            assert torch.equal(model.generate(tokens, n, temperature=0), plain) and lengths == expected


@torch.no_grad()
@pytest.mark.parametrize('left_padded', (False, True))
def test_a_cache_grows(left_padded):
    model, tokens, cache = small(block_size=200), torch.randint(11, (2, 150)), KVCache(1, left_padded)
    parts = [model.backbone(part, cache) for part in tokens.split([60, 4, 1, 63, 1, 21], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.backbone(tokens), rtol=1e-4, atol=1e-4)
    assert {kv.size(3) for kv in cache.kv} == {192}


def test_chunked_cross_entropy_has_the_same_gradient():
    x, head, targets = torch.randn(50, 8), torch.randn(300, 8), torch.randint(300, (50,))
    targets[::7] = -1
    results = []
    for max_logits in (2 ** 24, 300 * 7, 1):
        a, b = x.clone().requires_grad_(), head.clone().requires_grad_()
        loss = chunked_cross_entropy(a, b, targets, max_logits=max_logits).sum()
        loss.backward()
        results.append((loss, a.grad, b.grad))
    expected = -(x @ head.T).log_softmax(-1)[targets >= 0, targets[targets >= 0]].sum()
    for loss, *gradients in results:
        torch.testing.assert_close(loss, expected)
        for one, other in zip(gradients, results[0][1:]):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_targets_of_minus_1_do_not_count():
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
    for strict in (dict(top_k=1), dict(top_p=0), dict(top_p=1e-12), dict(min_p=1), dict(temperature=1e-6),
                   dict(top_p=0, min_p=1)):
        assert filter_logits(logits, **strict).softmax(-1).tolist() == [[0, 1, 0, 0]]  # one token stays
    assert sample_token(logits, temperature=0) == 1
    drawn = sample_token(logits.expand(20000, -1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount() / 20000, logits[0].exp(), atol=0.02, rtol=0)


def test_noise_of_zero_selects_no_filtered_token(monkeypatch):
    """Exponential noise may be exactly 0 on some devices, and 0 / 0 is nan, which argmax prefers."""
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self, **_: self.zero_())
    assert sample_token(torch.tensor([[-math.inf, 1.0, -math.inf]])) == 1


@pytest.mark.parametrize('wrong', [
    dict(temperature=-1.0), dict(temperature=1e-40), dict(temperature=math.nan), dict(temperature=math.inf),
    dict(top_k=-1),
    dict(top_p=-0.1), dict(top_p=1.1), dict(top_p=math.nan), dict(min_p=-0.1), dict(min_p=1.5), dict(min_p=math.nan)])
def test_arguments_out_of_range(wrong):
    """Also those that temperature 0 does not use."""
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
    """The same at all positions of a sample, different between samples, mean preserved; none in evaluation."""
    torch.manual_seed(0)
    dropout, x = ChannelDropout(0.25), torch.ones(8, 5, 1000)
    y = dropout(x)
    assert torch.equal(y, y[:, :1].expand_as(y)) and not torch.equal(y[0], y[1])
    assert torch.allclose(y[y > 0], torch.tensor(4 / 3))
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)
