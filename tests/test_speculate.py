"""Speculative decoding: the same tokens at temperature 0, and the same distribution as the model alone."""
import itertools
import math
from collections import Counter

import pytest
import torch

from gpt import filter_logits
from lab.speculate import generate_speculative, speculative_accept, token_probs
from tests.test_gpt import small


@torch.no_grad()
@pytest.mark.parametrize('n_draft', [1, 3, 7])
def test_temperature_0_gives_the_tokens_of_the_model(n_draft):
    """With the model itself as draft, or a different model with a longer context; also beyond block_size."""
    model, other = small(), small(n_layer=1, token_shift=False, block_size=20)
    torch.nn.init.normal_(other.token_embedding.weight, std=0.5)
    for length in (1, 5, 12, 20):
        start = torch.randint(11, (1, length))
        expected = model.generate(start, 40, temperature=0)[0, length:]
        for draft in (other, model):
            found = generate_speculative(model, draft, start, 40, temperature=0, n_draft=n_draft)
            assert torch.equal(torch.cat(list(found)), expected)
        eos_id = expected[7].item()
        until = expected[:expected.tolist().index(eos_id) + 1]
        found = generate_speculative(model, other, start, 40, temperature=0, eos_id=eos_id, n_draft=n_draft)
        assert torch.equal(torch.cat(list(found)), until)


def test_arguments_out_of_range():
    model, tokens = small(), torch.zeros(2, 3).long()
    for draft, rows in ((small(), tokens), (small(block_size=8), tokens[:1])):
        with pytest.raises(ValueError, match='must be'):
            next(generate_speculative(model, draft, rows, 5))
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match='top_p=2'):
            next(generate_speculative(model, model, tokens[:1], 5, temperature, top_p=2))


def accepted(p, q):
    """The distribution of the result of speculative_accept, {tokens: probability}: the sum over all draft tokens,
    accepted or rejected, and all replacements."""
    found, V = {}, p.size(-1)

    def visit(before, chance):
        i = len(before)
        for x in range(V):  # a draft token, or after all of them the last sample
            if i == len(q):
                found[before + (x,)] = found.get(before + (x,), 0) + chance * p[i, x].item()
                continue
            accept = min(1, (p[i, x] / q[i, x]).item())
            visit(before + (x,), chance * q[i, x].item() * accept)
            residual = (p[i] - q[i]).clamp(min=0)
            for y in range(V if accept < 1 else 0):
                replaced = chance * q[i, x].item() * (1 - accept) * (residual[y] / residual.sum()).item()
                found[before + (y,)] = found.get(before + (y,), 0) + replaced
    visit((), 1.0)
    return {key: chance for key, chance in found.items() if chance}


def chi_square(counts, expected):
    """Chi-square of counts {outcome: n} against {outcome: probability}, in its standard deviations from its mean."""
    n = sum(counts.values())
    assert set(counts) <= set(expected)
    value = sum((counts.get(key, 0) - n * chance) ** 2 / (n * chance) for key, chance in expected.items())
    return (value - (len(expected) - 1)) / math.sqrt(2 * (len(expected) - 1))


def test_accepted_tokens_follow_p():
    """By exact enumeration, in which each token has the distribution p; and by samples of the function."""
    torch.manual_seed(0)
    p, q = torch.randn(3, 4).mul(1.5).softmax(-1), torch.randn(2, 4).mul(1.5).softmax(-1)
    expected = accepted(p, q)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    for x in range(4):
        assert sum(chance for key, chance in expected.items() if key[0] == x) == pytest.approx(p[0, x].item(), abs=1e-5)
        second = [chance for key, chance in expected.items() if len(key) > 1 and key[1] == x]
        n_accepted = sum(chance for key, chance in expected.items() if len(key) > 1)
        assert sum(second) / n_accepted == pytest.approx(p[1, x].item(), abs=1e-5)
    generator, found = torch.Generator().manual_seed(0), Counter()
    for _ in range(4000):
        draft_tokens = torch.multinomial(q, 1, generator=generator)[:, 0]
        found[tuple(speculative_accept(p, q, draft_tokens, generator).tolist())] += 1
    assert chi_square(found, expected) < 4
    assert speculative_accept(p[:1], q[:0], torch.zeros(0).long()).shape == (1,)
    same = torch.eye(4)[:2]
    assert speculative_accept(same[[0, 1, 0]], same, torch.tensor([0, 1])).tolist() == [0, 1, 0]  # the residual is zero


@torch.no_grad()
def test_samples_follow_the_model():
    """The joint distribution of three tokens, by chi-square against the product of their probabilities; the context
    overflows."""
    settings = dict(vocab_size=3, block_size=4, n_layer=1)
    model, draft = small(**settings), small(**settings, token_shift=False)
    torch.nn.init.normal_(draft.lm_head.weight, std=0.5)
    start, expected = torch.tensor([[1, 2, 0]]), {}
    for new in itertools.product(range(3), repeat=3):
        tokens, chance = torch.cat((start, torch.tensor([new])), 1), 1.0
        for i in range(3, 6):
            context = tokens[:, :i] if i <= 4 else tokens[:, i - 2:i]
            logits = model.logits(model.backbone(context)[0, -1])
            chance *= filter_logits(logits, 0.9, 2).softmax(-1)[tokens[0, i]].item()
        expected[new] = chance
    expected, found = {new: chance for new, chance in expected.items() if chance}, Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        new = torch.cat(list(generate_speculative(model, draft, start, 3, 0.9, 2, generator=generator, n_draft=2)))
        found[tuple(new.tolist())] += 1
    assert len(expected) == 8 and chi_square(found, expected) < 4


def test_token_probs_are_those_of_sampling():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.4, 0.1]]).log()
    assert token_probs(logits, 0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(token_probs(logits, top_k=2)[0], torch.tensor([0, 4 / 7, 3 / 7, 0]))
    with pytest.raises(ValueError, match='temperature=1e-40'):
        token_probs(logits, 1e-40)
