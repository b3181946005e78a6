"""The attention core against softmax written out in float64, and GPT's generation against one without a cache."""
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, MLP, Attention, Config, Dropout, KVCache, accept, cross_entropy, filter_logits, rotary, rotate, sample_token


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
    fresh = start if start.size(1) <= T else start[:, -(T // 2):]
    for tokens in fresh:
        context, new, room = tokens, [], T - len(tokens)
        for _ in range(n):
            if room < 0:  # all rows of a batch start anew together, from what fills the last half of the context
                context = torch.cat((tokens, torch.tensor(new)))[-(T // 2):]
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
@pytest.mark.parametrize('length', [1, 5, 12, 20])
def test_generate_equals_the_uncached_reference(length, changes):
    """Also far beyond block_size, where the cache is refilled from the last half of the context."""
    model, start = small(**changes), torch.randint(11, (3, length))
    assert torch.equal(model.generate(start, 30, temperature=0)[:, length:], reference(model, start, 30)[0])


@torch.no_grad()
def test_prompts_of_different_lengths_and_chunks():
    model, start = small(n_kv_head=1), torch.randint(11, (3, 9))
    start[0, :4] = start[2, :8] = -1
    expected, logits = reference(model, start, 25)
    assert torch.equal(model.generate(start, 25, temperature=0)[:, 9:], expected)
    for chunk in (1, 2, 4, 9):
        assert torch.equal(model.generate(start, 25, temperature=0, chunk=chunk)[:, 9:], expected)
        cache = KVCache(12, ragged=True)
        for part in start.split(chunk, 1):
            x = model.trunk(part, cache)
        torch.testing.assert_close(model.logits(x[:, -1]), logits, rtol=1e-4, atol=1e-4)
    full = start.clamp(min=0)
    for chunk in (2, 5):  # without padding no row needs a mask of its own
        assert torch.equal(model.generate(full, 25, temperature=0, chunk=chunk), model.generate(full, 25, temperature=0))


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
@pytest.mark.parametrize('ahead', [1, 3, 7])
def test_speculation_at_temperature_0_changes_no_token(ahead):
    """Whatever the draft: one of its own, the model itself, or one without token shift; beyond block_size too."""
    model, other = small(), small(n_layer=1, token_shift=False, block_size=20)
    torch.nn.init.normal_(other.embedding.weight, std=0.5)
    for length in (1, 5, 12, 20):
        start = torch.randint(11, (1, length))
        expected = model.generate(start, 40, temperature=0)[0, length:]
        for draft in (other, model):
            assert torch.equal(torch.cat(list(model.speculate(draft, start, 40, temperature=0, ahead=ahead))), expected)
        end = expected[7].item()
        until = expected[:expected.tolist().index(end) + 1]
        assert torch.equal(torch.cat(list(model.speculate(other, start, 40, temperature=0, end=end, ahead=ahead))), until)


def accepted_law(p, q):
    """The law of what `accept` returns, {tokens: probability}, over all guesses, each kept or not, and all draws that replace one."""
    law, V = {}, p.size(-1)

    def go_on(before, chance):
        i = len(before)
        for x in range(V):  # a guess, or behind all guesses the last draw
            if i == len(q):
                law[before + (x,)] = law.get(before + (x,), 0) + chance * p[i, x].item()
                continue
            keep = min(1, (p[i, x] / q[i, x]).item())
            go_on(before + (x,), chance * q[i, x].item() * keep)
            rest = (p[i] - q[i]).clamp(min=0)
            for y in range(V if keep < 1 else 0):
                law[before + (y,)] = law.get(before + (y,), 0) + chance * q[i, x].item() * (1 - keep) * (rest[y] / rest.sum()).item()
    go_on((), 1.0)
    return {key: chance for key, chance in law.items() if chance}


def chi_square(counts, law):
    """Of counts {outcome: n} against {outcome: probability}, in standard deviations of its own law."""
    n = sum(counts.values())
    assert set(counts) <= set(law)
    value = sum((counts.get(key, 0) - n * chance) ** 2 / (n * chance) for key, chance in law.items())
    return (value - (len(law) - 1)) / math.sqrt(2 * (len(law) - 1))


def test_accepted_tokens_follow_p():
    """As the formula says, in which the first token has exactly the law p; and as the function draws."""
    p, q = torch.randn(3, 4).mul(1.5).softmax(-1), torch.randn(2, 4).mul(1.5).softmax(-1)
    law = accepted_law(p, q)
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    for x in range(4):
        assert sum(chance for key, chance in law.items() if key[0] == x) == pytest.approx(p[0, x].item(), abs=1e-5)
        second = [chance for key, chance in law.items() if len(key) > 1 and key[1] == x]
        kept = sum(chance for key, chance in law.items() if len(key) > 1)
        assert sum(second) / kept == pytest.approx(p[1, x].item(), abs=1e-5)
    generator, drawn = torch.Generator().manual_seed(0), Counter()
    for _ in range(4000):
        guesses = torch.multinomial(q, 1, generator=generator)[:, 0]
        drawn[tuple(accept(p, q, guesses, generator).tolist())] += 1
    assert chi_square(drawn, law) < 4
    assert accept(p[:1], q[:0], torch.zeros(0).long()).shape == (1,)
    same = torch.eye(4)[:2]
    assert accept(same[[0, 1, 0]], same, torch.tensor([0, 1])).tolist() == [0, 1, 0]  # nothing is left of p - q


@torch.no_grad()
def test_speculation_draws_from_the_models_law():
    """The joint law of three tokens by chi-square against the product of their probabilities, in a context that overflows."""
    model, draft = small(vocab_size=3, block_size=4, n_layer=1), small(vocab_size=3, block_size=4, n_layer=1, token_shift=False)
    torch.nn.init.normal_(draft.head.weight, std=0.5)
    start, law = torch.tensor([[1, 2, 0]]), {}
    for new in itertools.product(range(3), repeat=3):
        tokens, chance = torch.cat((start, torch.tensor([new])), 1), 1.0
        for i in range(3, 6):
            context = tokens[:, :i] if i <= 4 else tokens[:, i - 2:i]
            chance *= filter_logits(model.logits(model.trunk(context)[0, -1]), 0.9, 2).softmax(-1)[tokens[0, i]].item()
        law[new] = law.get(new, 0) + chance
    law, drawn, generator = {new: chance for new, chance in law.items() if chance}, Counter(), torch.Generator().manual_seed(0)
    for _ in range(600):
        drawn[tuple(torch.cat(list(model.speculate(draft, start, 3, 0.9, 2, generator=generator, ahead=2))).tolist())] += 1
    assert len(law) == 8 and chi_square(drawn, law) < 4


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


def test_dropout_is_of_channels():
    """All places of a sample lose the same ones, other samples other ones, and the mean stays; only training loses any."""
    torch.manual_seed(0)
    dropout, x = Dropout(0.25), torch.ones(8, 5, 1000)
    y = dropout(x)
    assert torch.equal(y, y[:, :1].expand_as(y)) and not torch.equal(y[0], y[1])
    assert torch.allclose(y[y > 0], torch.tensor(4 / 3)) and (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)
