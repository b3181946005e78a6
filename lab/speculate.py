"""
Speculative decoding (Leviathan et al., arXiv 2211.17192): fewer passes of a GPT for the same distribution of texts.

A small GPT, the draft, samples n_draft tokens one by one. One pass of the large model gives its distributions p at all
of these positions, at little more than the cost of one token. A draft token x ~ q is accepted with probability
min(1, p(x) / q(x)); otherwise a sample from the residual max(p - q, 0) replaces it. The resulting token follows p.

    python sample.py --out_dir=out/gpt_shakespeare --draft=out/gpt_shakespeare_draft --prompt="ROMEO:"
"""
import torch
import torch.nn.functional as F

from gpt import KVCache, filter_logits


def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Return the distribution that gpt.sample_token samples from: logits (..., V) -> (..., V). Raises ValueError."""
    logits = filter_logits(logits, temperature or 1.0, top_k, top_p, min_p)
    return logits.softmax(-1) if temperature else F.one_hot(logits.argmax(-1), logits.size(-1)).float()


def speculative_accept(p, q, draft_tokens, generator=None):
    """Speculative sampling (section 2.3): return the accepted draft tokens and one more token, (n_accepted + 1,).

    draft_tokens (n,) are samples of q (n, V); the target is p (n + 1, V). The first rejected token is replaced by a
    sample from the residual; if all n are accepted, a sample from p[n] follows. Example: p = (.8, .2), q = (.5, .5):
    draft token 0 is always accepted, 1 with probability .4; the residual (.3, 0) then gives 0: .5 + .5 * .6 = .8.
    """
    index = torch.arange(len(draft_tokens), device=draft_tokens.device)
    u = torch.rand(len(draft_tokens), generator=generator, device=p.device)
    n_accepted = (u * q[index, draft_tokens] < p[index, draft_tokens]).long().cumprod(0).sum()
    residual = (p - F.pad(q, (0, 0, 0, 1)))[n_accepted].clamp(min=0)  # (V,)
    residual = residual + 1e-30 * p[n_accepted]  # not all zero, even if rounding makes p <= q
    return torch.cat((draft_tokens[:n_accepted], torch.multinomial(residual, 1, generator=generator)))


@torch.no_grad()
def generate_speculative(model, draft, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                         eos_id=-1, generator=None, n_draft=4):
    """Yield the tokens, (1,), that continue a single row tokens (1, T0), with the same distribution as model.stream.

    draft: a GPT with the same vocabulary and a context at least as long as the model's; it samples n_draft tokens per
    pass of the model. Raises ValueError.
    """
    T, remaining, sampling = model.config.block_size, max_new_tokens, (temperature, top_k, top_p, min_p)
    if len(tokens) > 1 or draft.config.block_size < T:
        raise ValueError(f'{len(tokens)} rows: must be 1; a context of {draft.config.block_size}: must be at least {T}')
    context, caches = tokens[:, -T:], None
    while remaining > 0:
        if context.size(1) > T:  # a new cache at the same positions as in model.stream
            context, caches = context[:, -max(1, T // 2):], None
        known, q = context.size(1), []
        caches = caches or [KVCache(min(T, known + remaining - 1)) for _ in range(2)]
        n = min(n_draft, T - known, remaining - 1)
        for _ in range(n):
            x = draft.backbone(context[:, caches[0].cur_len:], caches[0])  # the tokens that are not in its cache
            q.append(token_probs(draft.logits(x[:, -1]), *sampling))  # (1, V)
            context = torch.cat((context, torch.multinomial(q[-1], 1, generator=generator)), dim=1)
        x = model.backbone(context[:, caches[1].cur_len:], caches[1])[0, -n - 1:]
        p = token_probs(model.logits(x), *sampling)  # (n + 1, V)
        new_tokens = speculative_accept(p, torch.cat(q) if q else p[:0], context[0, known:], generator)
        context, remaining = torch.cat((context[:, :known], new_tokens[None]), dim=1), remaining - len(new_tokens)
        for network, cache in zip((draft, model), caches):  # remove rejected tokens from the caches
            cache.cur_len = min(cache.cur_len, context.size(1) - 1)
            last = context[:, cache.cur_len - 1:cache.cur_len]
            cache.prev_embedding = network.token_embedding(last)  # for the token shift
        for token in new_tokens.split(1):
            yield token
            if token == eos_id:
                return
