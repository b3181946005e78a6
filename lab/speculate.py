"""
Speculative decoding (Leviathan et al., arXiv 2211.17192): the same text from a GPT in fewer passes.

A small GPT, the draft, samples a few tokens one by one. One pass of the large model gives its distribution at all of these
positions, at little more than the cost of one token. Draft tokens are accepted or rejected such that the text follows the
large model's distribution exactly.

    python sample.py --out_dir=out/gpt_shakespeare --draft=out/gpt_shakespeare_draft --prompt="ROMEO:"
"""
import torch
import torch.nn.functional as F

from gpt import KVCache, filter_logits


def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that gpt.sample_token samples from: logits (..., V) -> (..., V). Raises ValueError."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)


def speculative_accept(p, q, draft_tokens, generator=None):
    """Speculative sampling (section 2.3): the first n_accepted draft tokens, then one more token, (n_accepted + 1,).

    draft_tokens (n,) are samples of q (n, V); p (n + 1, V) is wanted. A draft token x is accepted with probability
    min(1, p(x) / q(x)). The first that is not is replaced by a sample from the residual max(p - q, 0); after n accepted ones
    follows a sample from p.
    """
    index = torch.arange(len(draft_tokens), device=draft_tokens.device)
    u = torch.rand(len(draft_tokens), generator=generator, device=p.device)
    n_accepted = (u * q[index, draft_tokens] < p[index, draft_tokens]).long().cumprod(0).sum()
    residual = (p - F.pad(q, (0, 0, 0, 1)))[n_accepted].clamp(min=0)  # (V,)
    residual = residual + 1e-30 * p[n_accepted]  # not all zero, however p and q are rounded
    return torch.cat((draft_tokens[:n_accepted], torch.multinomial(residual, 1, generator=generator)))


@torch.no_grad()
def generate_speculative(model, draft, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, end=-1,
                         generator=None, n_draft=4):
    """Yields the tokens, (1,), that follow a single row tokens (1, T0), with the same distribution as model.stream.

    draft: a GPT with the same vocabulary and a context no shorter than the model's; it samples n_draft tokens per pass of
    the model. Raises ValueError.
    """
    T, left, sampling = model.config.block_size, max_new_tokens, (temperature, top_k, top_p, min_p)
    if len(tokens) > 1 or draft.config.block_size < T:
        raise ValueError(f'{len(tokens)} rows: must be 1; a context of {draft.config.block_size}: must be at least {T}')
    context, caches = tokens[:, -T:], None
    while left > 0:
        if context.size(1) > T:  # starts again at the same positions as model.stream
            context, caches = context[:, -max(1, T // 2):], None
        known, q = context.size(1), []
        caches = caches or [KVCache(min(T, known + left - 1)) for _ in range(2)]
        n = min(n_draft, T - known, left - 1)
        for _ in range(n):
            x = draft.trunk(context[:, caches[0].filled:], caches[0])  # reads what it has not read yet
            q.append(token_probs(draft.logits(x[:, -1]), *sampling))  # (1, V)
            context = torch.cat((context, torch.multinomial(q[-1], 1, generator=generator)), dim=1)
        x = model.trunk(context[:, caches[1].filled:], caches[1])[0, -n - 1:]
        p = token_probs(model.logits(x), *sampling)  # (n + 1, V)
        new = speculative_accept(p, torch.cat(q) if q else p[:0], context[0, known:], generator)
        context, left = torch.cat((context[:, :known], new[None]), dim=1), left - len(new)
        for network, cache in zip((draft, model), caches):  # rejected tokens leave the caches
            cache.filled = min(cache.filled, context.size(1) - 1)
            cache.last = network.embedding(context[:, cache.filled - 1:cache.filled])  # for the token shift
        for token in new.split(1):
            yield token
            if token == end:
                return
