"""
Chapter 1's exercises: the docstring of a check is the exercise's text, its asserts are the reasons on the score card.

The references are slow and obvious: attention one head at a time with an explicit mask, generation without a cache.
"""
import torch

from tests.exercises import equal, generator, lively


def MLP_forward(gpt):
    """The MLP: two linear layers, self.up and self.down, with a nonlinearity between. x (..., D) keeps its shape. By
    self.activation:
    relu2      ReLU, squared;
    gelu_tanh  GELU by its tanh approximation;
    swiglu     the first half of self.up's output is the gate: silu(gate) times the second half."""
    for activation in ('relu2', 'gelu_tanh', 'swiglu'):
        mlp, x = lively(gpt.MLP(6, 8, activation, bias=True)).double(), 3 * torch.randn(2, 3, 6).double()
        hidden = x @ mlp.up.weight.T + mlp.up.bias
        if activation == 'relu2':
            hidden = torch.where(hidden > 0, hidden * hidden, 0)
        elif activation == 'gelu_tanh':
            hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
        else:
            gate, value = hidden[..., :8], hidden[..., 8:]
            hidden = gate / (1 + torch.exp(-gate)) * value
        equal(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias, f'the output of the MLP with activation {activation}')


def apply_rope(gpt):
    """RoPE: rotate the pairs of a head by angles (2104.09864, section 3.2). A head of hd values has hd / 2 pairs,
    (a, b) = (x[i], x[i + hd/2]): the first half with the second. Rotate each counter-clockwise, to
    (a cos - b sin, a sin + b cos)."""
    x = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])  # the pairs (1, 0) and (0, 0)
    quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])  # cos and sin of 90 degrees
    equal(gpt.apply_rope(x, *quarter), torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]]),
          '(1, 0, 0, 0), whose pairs are (1, 0) and (0, 0), rotated by 90 degrees,')
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)
    expected = torch.cat((rotated.real, rotated.imag), -1)
    equal(gpt.apply_rope(x, angle.cos(), angle.sin()), expected, 'heads (B, nh, T, hd) rotated')


def rope_at(*positions, hd):
    """cos and sin (n, hd / 2) for these positions, as in `rope_cos_sin`."""
    angle = torch.tensor(positions).double()[:, None] * 100.0 ** -(torch.arange(hd // 2) / (hd / 2)).double()
    return angle.cos(), angle.sin()


def written_out(layer, x, rope, context, context_rope, mask):
    """Attention one sample and one head at a time; mask (T, S): True where a query attends to a key."""
    def heads_of(y, rope=None):  # (T, width) -> a list of (T, hd)
        heads = y.split(layer.head_dim, -1)
        if rope is None:
            return heads
        if layer.qk_norm:
            heads = [head / (head.square().mean(-1, keepdim=True) + 1e-6).sqrt() for head in heads]
        half = layer.head_dim // 2
        rotated = [torch.complex(head[:, :half], head[:, half:]) * torch.complex(*rope) for head in heads]
        return [torch.cat((head.real, head.imag), -1) for head in rotated]
    rows = []
    for sample, other in zip(x, x if context is None else context):
        if context is None:
            kv_dim = layer.n_kv_head * layer.head_dim
            heads = layer.qkv(sample).split([layer.n_head * layer.head_dim, kv_dim, kv_dim], -1)
        else:
            heads = layer.q(sample), *layer.qkv(other).chunk(2, -1)
        q, k, v = heads_of(heads[0], rope), heads_of(heads[1], context_rope), heads_of(heads[2])
        scale, group = 12 / layer.head_dim if layer.qk_norm else layer.head_dim ** -0.5, len(q) // len(k)
        logits = [(q[h] @ k[h // group].T * scale).masked_fill(~mask, -torch.inf) for h in range(len(q))]
        rows.append(layer.out(torch.cat([logits[h].softmax(-1) @ v[h // group] for h in range(len(q))], -1)))
    return torch.stack(rows)


def Attention_forward(gpt):
    """Multi-head attention (1706.03762, section 3.2).
    1. Self-attention: queries, keys and values come from self.qkv(x), cut into heads by self.split_heads: first
       self.n_head heads of queries, then self.n_kv_head of keys and self.n_kv_head of values. With a context: queries
       come from self.q(x), keys and values from self.qkv(context), half each.
    2. self.norm_and_rope normalises and rotates queries and keys: by rope; keys of a context by context_rope.
    3. With a cache, add keys and values to it by cache.update(self, k, v), and attend to all that it returns.
    4. F.scaled_dot_product_attention with the mask, is_causal=causal, enable_gqa=True if keys have fewer heads, and a
       scale: 12 / hd with qk_norm, 1 / sqrt(hd) without.
    5. Concatenate the heads to (B, T, D) and apply self.out."""
    def layer_of(**changes):
        return lively(gpt.Attention(16, 4, **changes)).double()
    x, context, rope = torch.randn(2, 5, 16).double(), torch.randn(2, 3, 16).double(), rope_at(*range(5), hd=4)
    other = rope_at(7, 2, 4, hd=4)
    full, causal = torch.ones(5, 5).bool(), torch.ones(5, 5).tril().bool()
    layer = layer_of()
    y = layer(x, rope, causal=True)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape, (
        f'for x (2, 5, 16) it returns shape {tuple(getattr(y, "shape", ()))}')
    changed = x.clone()
    changed[:, 3] += 1
    leak = (layer(changed, rope, causal=True) - y).abs().amax((0, 2))  # (T,)
    assert leak[:3].max() < 1e-9, (
        'causal: a change of token 3 changes the output at positions before it; no position attends to later ones')
    own = layer.qkv(x[:, 0])[..., -16:]
    equal(y[:, 0], layer.out(own), 'causal: position 0, which attends to itself alone,')
    assert leak[4] > 1e-9, (
        'causal: a change of token 3 does not change the output at position 4; each position attends to all before it')
    assert (layer(changed, rope) - layer(x, rope)).abs().amax((0, 2)).min() > 1e-9, (
        'without causal every position should attend to every other')
    equal(y, written_out(layer, x, rope, None, rope, causal), 'causal attention')
    equal(layer(x, rope), written_out(layer, x, rope, None, rope, full), 'full attention')
    plain, shared, cross = layer_of(qk_norm=False), layer_of(n_kv_head=2), layer_of(cross=True)
    equal(plain(x, rope, causal=True), written_out(plain, x, rope, None, rope, causal), 'without qk_norm, attention')
    equal(shared(x, rope, causal=True), written_out(shared, x, rope, None, rope, causal),
          'with 2 heads of keys for 4 of queries, attention')
    expected = written_out(cross, x, rope, context, other, full[:, :3])
    equal(cross(x, rope, context, other), expected, 'attention to a context')
    odd = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    equal(layer(x, rope, mask=odd), written_out(layer, x, rope, None, rope, odd), 'attention with a mask')
    cache = gpt.KVCache(5)
    layer(x[:, :4], [part[:4] for part in rope], causal=True, cache=cache)
    cache.cur_len = 4
    last = layer(x[:, 4:], [part[4:] for part in rope], cache=cache)
    equal(last, y[:, 4:], 'the fifth token alone, after four in the cache,')


def Block_forward(gpt):
    """A block: two branches, attention and then the MLP, add to the residual stream x (B, T, D). The input of each is
    `rms_norm` of x with self.eps; its output goes through self.dropout before it is added. Pass causal, mask and
    cache on to the attention."""
    config = gpt.Config(n_layer=1, n_head=2, n_embd=8, norm_eps=0.1, dropout=0.5)
    block, x, rope = lively(gpt.Block(config)).double(), torch.randn(2, 4, 8).double(), rope_at(*range(4), hd=4)
    for causal in (True, False):
        y = x + block.attention(gpt.rms_norm(x, 0.1), rope, causal=causal)
        equal(block(x, rope, causal), y + block.mlp(gpt.rms_norm(y, 0.1)), f'x after the block, causal={causal},')
    cache = gpt.KVCache(4)
    block(x[:, :3], [part[:3] for part in rope], cache=cache)
    cache.cur_len = 3
    equal(block(x[:, 3:], [part[3:] for part in rope], False, None, cache), block(x, rope)[:, 3:],
          'the fourth token, after three in the cache,')
    mask = torch.eye(4).bool()
    y = x + block.attention(gpt.rms_norm(x, 0.1), rope, mask=mask)
    equal(block(x, rope, False, mask), y + block.mlp(gpt.rms_norm(y, 0.1)), 'x after the block, with a mask,')
    block.dropout.p = 1.0
    equal(block.train()(x, rope), x, 'x after the block when dropout drops all channels of the branches')


def small(gpt, **changes):
    return lively(gpt.GPT(gpt.Config(**(dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8) | changes))))


def backbone_by_hand(gpt, model, tokens):
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x, model.rope[:, :tokens.size(1)], True)
    return gpt.rms_norm(x, model.config.norm_eps)


def GPT_backbone(gpt):
    """The causal model, from tokens to hidden states: self.embed(tokens, cache, inputs_embeds), then the blocks, then
    `rms_norm` with config.norm_eps. Without a cache, attention is causal without a mask, and the tokens have the first
    T positions of self.rope (2, block_size, hd / 2). With a cache, cache.prepare(tokens) returns causal, mask and the
    position ids, a slice or (B, 1, T). At the end cache.cur_len grows by T."""
    model, tokens = small(gpt, norm_eps=0.1), torch.randint(11, (2, 6))
    y, changed = model.backbone(tokens), tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    equal(y, backbone_by_hand(gpt, model, tokens), 'the backbone of 6 tokens')
    equal(model.backbone(changed)[:, :3], y[:, :3], 'positions 0 to 2, when only token 3 has changed,')
    cache, parts = gpt.KVCache(8), []
    for part in tokens.split((3, 1, 2), 1):
        parts.append(model.backbone(part, cache))
    equal(torch.cat(parts, 1), y, '6 tokens read as 3 + 1 + 2 into a cache')
    assert cache.cur_len == 6, f'after 6 tokens cache.cur_len is {cache.cur_len}'
    x = torch.randn(2, 6, 8)
    own = model.backbone(tokens, inputs_embeds=model.token_embedding(tokens))
    equal(own, y, "the backbone with the tokens' own embeddings as inputs_embeds,")
    assert not torch.allclose(model.backbone(tokens, inputs_embeds=x), y), 'inputs_embeds is not used'
    padded = torch.cat((torch.tensor([[-1, -1], [3, 4]]), tokens), 1)
    left_padded = model.backbone(padded, gpt.KVCache(8, left_padded=True))[0, 2:]
    equal(left_padded, y[0], 'a row after two -1 of left padding')


def GPT_forward(gpt):
    """The loss: the mean of -ln p of the next token. Tokens 0 to T - 1 of a row are the input; the target of each
    position is the next token; -1 is no target. Tokens may have any integer dtype. `chunked_cross_entropy` takes rows
    (R, D), the head's matrix and targets (R,), and returns -ln p of each, 0 if there is no target.
    Return the sum over all targets divided by their number, and logs: 'loss', that sum, detached, and the number;
    'tokens', the number and 1."""
    model = small(gpt)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -1, -1]])
    loss, logs = model({'tokens': tokens.to(torch.int16)})
    log_p = model.logits(backbone_by_hand(gpt, model, tokens)).log_softmax(-1)
    pairs = [(0, i, i + 2) for i in range(4)] + [(1, 0, 7), (1, 1, 8)]
    nll = torch.stack([-log_p[row, position, target] for row, position, target in pairs])
    copied = -log_p[0, range(4), tokens[0, :4]].mean()
    assert not torch.isclose(model({'tokens': tokens[:1]})[0], copied), (
        'the targets are the input tokens, not the next ones')
    assert not torch.isclose(loss, nll.sum() / 8), 'the loss is a mean over all positions, even without a target (-1)'
    equal(loss, nll.mean(), 'the loss of a row of 4 targets and a row of 2 (followed by -1)')
    equal(logs['loss'], torch.stack((nll.sum(), torch.tensor(6.0))).detach(), "logs['loss'], the sum and the number,")
    equal(logs['tokens'], torch.tensor([6.0, 1.0]), "logs['tokens']")
    assert not logs['loss'].requires_grad, 'logs should be detached: they keep the graph alive'
    loss.backward()
    assert model.token_embedding.weight.grad.abs().sum() > 0, 'no gradient reaches the embedding'


def filter_logits(gpt):
    """Sampling: temperature, top-k, top-p and min-p. Divide the logits (..., V) by the temperature, in float32. Then
    set to -inf, in this order,
    top_k  all but the top_k largest (0, or at least V: none);
    top_p  all but the nucleus, the fewest most probable tokens with a total probability of at least top_p
           (1.0: none; one token always stays, also with 0.0);
    min_p  all whose probability is below min_p times the largest (0.0: none).
    The order of the V tokens does not change. Raise ValueError for settings out of range."""
    known = '[0.05, 0.5, 0.15, 0.3] and [0.3, 0.05, 0.5, 0.15]'
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.3, 0.05, 0.5, 0.15]])

    def kept(logits=p.log(), **settings):
        filtered = gpt.filter_logits(logits, **settings).tolist()
        return [[i for i, x in enumerate(row) if x > -torch.inf] for row in filtered]
    equal(gpt.filter_logits(p.log(), 0.5), 2 * p.log(), 'logits at temperature 0.5, which makes differences larger,')
    for settings, expected in (
            (dict(top_k=0), [[0, 1, 2, 3]] * 2), (dict(top_k=2), [[1, 3], [0, 2]]), (dict(top_k=9), [[0, 1, 2, 3]] * 2),
            (dict(top_p=0.7), [[1, 3], [0, 2]]), (dict(top_p=0.9), [[1, 2, 3], [0, 2, 3]]),
            (dict(top_p=0.01), [[1], [2]]),
            (dict(top_p=0), [[1], [2]]),
            (dict(min_p=0.2), [[1, 2, 3], [0, 2, 3]]), (dict(min_p=0.9), [[1], [2]]),
            (dict(temperature=0.5, top_p=0.7), [[1, 3], [0, 2]]), (dict(temperature=0.5, top_p=0.6), [[1], [2]]),
            (dict(temperature=2.0, top_p=0.7), [[1, 2, 3], [0, 2, 3]]), (dict(top_k=2, top_p=0.6), [[1], [2]])):
        got = kept(**settings)
        assert got == expected, f'probabilities {known} with {settings}: tokens {got} are kept, should be {expected}'
    try:
        gpt.filter_logits(p.log(), top_p=1.5)
    except ValueError:
        pass
    else:
        raise AssertionError('top_p=1.5 should raise a ValueError')
    equal(gpt.filter_logits(p.log(), top_k=2).softmax(-1), torch.tensor([[0, 0.625, 0, 0.375], [0.375, 0, 0.625, 0]]),
          'the probabilities with top_k=2')
    dtype = gpt.filter_logits(p.log().bfloat16()).dtype
    assert dtype == torch.float32, f'logits in bfloat16 come back as {dtype}, should be float32'


def without_cache(gpt, model, tokens, n, eos_id=-1):
    """Greedy decoding of one row (T0,), with a pass over the whole context for each token."""
    T, new = model.config.block_size, []
    context = tokens[-T:]
    for _ in range(n):
        if len(context) > T:
            context = context[-(T // 2):]
        logits = model.logits(backbone_by_hand(gpt, model, context[None]))[0, -1]
        new.append(-1 if eos_id in new else int(logits.argmax()))
        context = torch.cat((context, torch.tensor(new[-1:])))
    return new


def listed(steps, B):
    """The tokens of a stream (B, n) as lists."""
    steps = [*steps]
    assert all(isinstance(step, torch.Tensor) and step.shape == (B,) for step in steps), (
        f'for {B} rows each `yield` should return {B} tokens, shape ({B},)')
    return torch.stack(steps, 1).tolist()


@torch.no_grad()
def decode(gpt):
    """Generation, one token at a time. A generator function: each `yield` returns the next token of every row, (B,), at
    most max_new_tokens times.
    1. model.step(tokens, cache) reads tokens (B, T0) into the cache and returns the logits of the next one (B, V):
       sample it with `sample_token`. From then on read only the token just sampled, (B, 1).
    2. finished (B,) belongs to the caller and is changed in place: True for a row that has sampled eos_id. Such a row
       yields -1 from the next token on. When all rows are finished, and eos_id >= 0, stop."""
    model, tokens = small(gpt, block_size=32), torch.randint(11, (2, 3))

    def new(n, tokens=tokens, temperature=0, top_k=0, eos_id=-1, generator=None, finished=None):
        finished = torch.zeros(len(tokens), dtype=torch.bool) if finished is None else finished
        cache = gpt.KVCache(8)
        return gpt.decode(model, tokens, cache, finished, n, temperature, top_k, 1.0, 0.0, eos_id, generator)
    expected, got = [without_cache(gpt, model, row, 5) for row in tokens], listed(new(5), 2)
    assert [len(row) for row in got] == [5, 5], f'5 new tokens expected, got {len(got[0])}'
    assert got == expected, f'after prompts {tokens.tolist()} the most probable tokens are {expected}, not {got}'
    for row in range(2):
        eos_id = without_cache(gpt, model, tokens[row], 5)[1]
        expected = [without_cache(gpt, model, prompt, 5, eos_id) for prompt in tokens]
        stop = max(new.index(eos_id) + 1 if eos_id in new else 5 for new in expected)  # then all are finished
        finished = torch.zeros(2, dtype=torch.bool)
        expected, got = [row[:stop] for row in expected], listed(new(5, eos_id=eos_id, finished=finished), 2)
        assert got == expected, f'with eos_id={eos_id}, expected {expected}, got {got}'
        assert finished.tolist() == [eos_id in row for row in expected], (
            f'with eos_id={eos_id}, `finished` should be changed in place')
    got = listed(new(3, finished=torch.tensor([True, False])), 2)
    assert got[0] == [-1] * 3 and -1 not in got[1], f'a row that was finished before yields -1, not {got[0]}'
    got = listed(new(4, tokens[:1], 1.0, 1, generator=generator()), 1)
    assert got == [without_cache(gpt, model, tokens[0], 4)], 'with top_k=1 expected the most probable tokens'
    flat = [listed(new(5, temperature=2.0, generator=generator(seed)), 2) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], (
        'at temperature 2 the same seed of the generator should give the same tokens, another seed other ones')


@torch.no_grad()
def GPT_stream(gpt):
    """Generation in a context of T = block_size tokens. A generator function that yields the tokens of `decode`, at
    most max_new_tokens. Start from the last T tokens of the prompt:
    1. Create a KVCache for these and the new tokens, at most T, left_padded if there is a -1, and call `decode`.
    2. When T tokens are read and one more is sampled, the context is full. Go on with a new cache, which starts from
       the last T // 2 of all tokens so far, prompt and new ones.
    3. One `finished`, at first False for each row, serves all caches. Stop when all rows are finished."""
    def greedy(tokens, n, **settings):
        return listed(model.stream(tokens, n, temperature=0, **settings), len(tokens))
    model, tokens = small(gpt), torch.randint(11, (2, 3))
    expected, got = [without_cache(gpt, model, row, 5) for row in tokens], greedy(tokens, 5)
    assert got == expected, f'after prompts {tokens.tolist()} the most probable tokens are {expected}, not {got}'
    for length, n in ((13, 1), (6, 14), (8, 2), (9, 12)):
        long = torch.randint(11, (1, length))
        expected, got = [without_cache(gpt, model, long[0], n)], greedy(long, n)
        assert got == expected, (
            f'{n} tokens after a prompt of {length}, with room for 8: expected {expected[0]}, got {got[0]}; '
            'the last 8 of the prompt are read, and when the context is full the last 4 of all tokens')
    padded = torch.tensor([[-1, -1, 5], [1, 2, 3]])
    expected, got = [without_cache(gpt, model, row[row >= 0], 4) for row in padded], greedy(padded, 4)
    assert got == expected, f'after prompts of 1 and 3 tokens the most probable tokens are {expected}, not {got}'
    long = torch.randint(11, (2, 8))
    eos_id = without_cache(gpt, model, long[0], 1)[0]
    expected = [without_cache(gpt, model, row, 6, eos_id) for row in long]
    stop = max(new.index(eos_id) + 1 if eos_id in new else 6 for new in expected)  # then all are finished
    expected, got = [row[:stop] for row in expected], greedy(long, 6, eos_id=eos_id)
    assert got == expected, (
        f'with eos_id={eos_id}, a row that is finished in the old cache should yield -1 with the new one, not {got}')
    got = [*model.stream(long[:1], 6, temperature=0, eos_id=eos_id)]
    assert len(got) == 1, f'one row that is finished after 1 token: expected no more tokens, got {len(got) - 1}'
    flat = [listed(model.stream(tokens, 6, 2.0, generator=generator(seed)), 2) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], (
        'at temperature 2 the same seed of the generator should give the same tokens, another seed other ones')


EXERCISES = {
    'MLP.forward': (1, MLP_forward),
    'apply_rope': (2, apply_rope),
    'Attention.forward': (4, Attention_forward),
    'Block.forward': (2, Block_forward),
    'GPT.backbone': (3, GPT_backbone),
    'GPT.forward': (3, GPT_forward),
    'filter_logits': (2, filter_logits),
    'decode': (2, decode),
    'GPT.stream': (1, GPT_stream),
}
