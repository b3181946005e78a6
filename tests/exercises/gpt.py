"""
Chapter 1's exercises: each check's docstring is what a student reads, its asserts are what a failed answer is told.

The references are slow and obvious: attention one head at a time with a mask written out, generation without a cache.
"""
import torch

from tests.exercises import equal, generator, lively


def MLP_forward(gpt):
    """The MLP: two matrices, self.up and self.down, and a nonlinearity between them. x (..., D) keeps its shape. By self.kind:
    relu2      what ReLU leaves, squared;
    gelu_tanh  GELU by its tanh formula;
    swiglu     the first half of what self.up gives is the gate: silu(gate) times the second half."""
    for kind in ('relu2', 'gelu_tanh', 'swiglu'):
        mlp, x = lively(gpt.MLP(6, 8, kind, bias=True)).double(), 3 * torch.randn(2, 3, 6).double()
        hidden = x @ mlp.up.weight.T + mlp.up.bias
        if kind == 'relu2':
            hidden = torch.where(hidden > 0, hidden * hidden, 0)
        elif kind == 'gelu_tanh':
            hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
        else:
            gate, value = hidden[..., :8], hidden[..., 8:]
            hidden = gate / (1 + torch.exp(-gate)) * value
        equal(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias, f'what the MLP of kind {kind} gives')


def rotate(gpt):
    """Rotary positions: turn the pairs of a head by angles (2104.09864, section 3.2). A head of hd numbers is hd / 2 pairs,
    (a, b) = (x[i], x[i + hd/2]): the first half against the second. Turn each counter-clockwise, to
    (a cos - b sin, a sin + b cos)."""
    x = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])  # the pairs (1, 0) and (0, 0)
    quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])  # cos and sin of 90 degrees
    equal(gpt.rotate(x, *quarter), torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]]),
          '(1, 0, 0, 0), whose pairs are (1, 0) and (0, 0), turned by 90 degrees,')
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)
    equal(gpt.rotate(x, angle.cos(), angle.sin()), torch.cat((turned.real, turned.imag), -1), 'heads (B, nh, T, hd) turned')


def turns(*places, hd):
    """cos and sin (n, hd / 2) for these places, as `rotary` makes them."""
    angle = torch.tensor(places).double()[:, None] * 100.0 ** -(torch.arange(hd // 2) / (hd / 2)).double()
    return angle.cos(), angle.sin()


def written_out(layer, x, turn, context, context_turn, seen):
    """Attention one sample and one head at a time; seen (T, S): which keys a query may look at."""
    def heads_of(y, turn=None):  # (T, width) -> a list of (T, hd)
        heads = y.split(layer.head_size, -1)
        if turn is None:
            return heads
        if layer.qk_norm:
            heads = [head / (head.square().mean(-1, keepdim=True) + 1e-6).sqrt() for head in heads]
        half = layer.head_size // 2
        turned = [torch.complex(head[:, :half], head[:, half:]) * torch.complex(*turn) for head in heads]
        return [torch.cat((head.real, head.imag), -1) for head in turned]
    rows = []
    for sample, other in zip(x, x if context is None else context):
        if context is None:
            heads = layer.qkv(sample).split([layer.n_head * layer.head_size, *2 * [layer.n_kv_head * layer.head_size]], -1)
        else:
            heads = layer.q(sample), *layer.qkv(other).chunk(2, -1)
        q, k, v = heads_of(heads[0], turn), heads_of(heads[1], context_turn), heads_of(heads[2])
        scale, share = 12 / layer.head_size if layer.qk_norm else layer.head_size ** -0.5, len(q) // len(k)
        logits = [(q[h] @ k[h // share].T * scale).masked_fill(~seen, -torch.inf) for h in range(len(q))]
        rows.append(layer.out(torch.cat([logits[h].softmax(-1) @ v[h // share] for h in range(len(q))], -1)))
    return torch.stack(rows)


def Attention_forward(gpt):
    """Multi-head attention: who looks at whom (1706.03762, section 3.2).
    1. Queries, keys, values: all from self.qkv(x), cut into heads by self.heads: first self.n_head of queries, then
       self.n_kv_head of keys and as many of values. With a context, queries from self.q(x), keys and values from
       self.qkv(context), half each.
    2. self.turned normalises queries and keys and rotates them: by turn, or keys by context_turn where there is a context.
    3. With a cache, add keys and values to it, cache.append(self, k, v), and look at all that this returns.
    4. F.scaled_dot_product_attention with the mask, is_causal=causal, enable_gqa=True where keys have fewer heads, and a
       scale: 12 / hd with qk_norm, 1 / sqrt(hd) without.
    5. The heads side by side again, (B, T, D), through self.out."""
    def layer_of(**changes):
        return lively(gpt.Attention(16, 4, **changes)).double()
    x, context, turn = torch.randn(2, 5, 16).double(), torch.randn(2, 3, 16).double(), turns(*range(5), hd=4)
    other = turns(7, 2, 4, hd=4)
    all_of_it, past = torch.ones(5, 5).bool(), torch.ones(5, 5).tril().bool()
    layer = layer_of()
    y = layer(x, turn, causal=True)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape, (
        f'for x (2, 5, 16) it returns shape {tuple(getattr(y, "shape", ()))}')
    changed = x.clone()
    changed[:, 3] += 1
    leak = (layer(changed, turn, causal=True) - y).abs().amax((0, 2))  # (T,)
    assert leak[:3].max() < 1e-9, (
        'causal: a change of token 3 changes what comes out at places before it; no place sees its future')
    own = layer.qkv(x[:, 0])[..., -16:]
    equal(y[:, 0], layer.out(own), 'causal: place 0, which sees itself and nothing else,')
    assert leak[4] > 1e-9, 'causal: a change of token 3 does not change what comes out at place 4; each place sees all before it'
    assert (layer(changed, turn) - layer(x, turn)).abs().amax((0, 2)).min() > 1e-9, (
        'without causal every place should see every other')
    equal(y, written_out(layer, x, turn, None, turn, past), 'causal attention')
    equal(layer(x, turn), written_out(layer, x, turn, None, turn, all_of_it), 'full attention')
    plain, shared, cross = layer_of(qk_norm=False), layer_of(n_kv_head=2), layer_of(cross=True)
    equal(plain(x, turn, causal=True), written_out(plain, x, turn, None, turn, past), 'without qk_norm, attention')
    equal(shared(x, turn, causal=True), written_out(shared, x, turn, None, turn, past),
          'with 2 heads of keys for 4 of queries, attention')
    equal(cross(x, turn, context, other), written_out(cross, x, turn, context, other, all_of_it[:, :3]), 'attention to a context')
    odd = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    equal(layer(x, turn, mask=odd), written_out(layer, x, turn, None, turn, odd), 'attention with a mask')
    cache = gpt.KVCache(5)
    layer(x[:, :4], [part[:4] for part in turn], causal=True, cache=cache)
    cache.filled = 4
    equal(layer(x[:, 4:], [part[4:] for part in turn], cache=cache), y[:, 4:], 'the fifth token alone, after four in the cache,')


def Block_forward(gpt):
    """A block: two branches, attention and then the MLP, that add to the residual stream x (B, T, D). Each reads the `norm`
    of x, with self.eps; what it gives goes through self.dropout before it is added. Hand causal, mask and cache on to
    the attention."""
    config = gpt.Config(n_layer=1, n_head=2, n_embd=8, norm_eps=0.1, dropout=0.5)
    block, x, turn = lively(gpt.Block(config)).double(), torch.randn(2, 4, 8).double(), turns(*range(4), hd=4)
    for causal in (True, False):
        y = x + block.attention(gpt.norm(x, 0.1), turn, causal=causal)
        equal(block(x, turn, causal), y + block.mlp(gpt.norm(y, 0.1)), f'x behind the block, causal={causal},')
    cache = gpt.KVCache(4)
    block(x[:, :3], [part[:3] for part in turn], cache=cache)
    cache.filled = 3
    equal(block(x[:, 3:], [part[3:] for part in turn], False, None, cache), block(x, turn)[:, 3:],
          'the fourth token, after three in the cache,')
    mask = torch.eye(4).bool()
    y = x + block.attention(gpt.norm(x, 0.1), turn, mask=mask)
    equal(block(x, turn, False, mask), y + block.mlp(gpt.norm(y, 0.1)), 'x behind the block, with a mask,')
    block.dropout.p = 1.0
    equal(block.train()(x, turn), x, 'x behind the block when dropout drops everything that the branches give')


def small(gpt, **changes):
    return lively(gpt.GPT(gpt.Config(**(dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8) | changes))))


def trunk_by_hand(gpt, model, tokens):
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x, model.turn[:, :tokens.size(1)], True)
    return gpt.norm(x, model.config.norm_eps)


def GPT_trunk(gpt):
    """The causal model: from tokens to what the head reads. self.embed(tokens, cache, x), then the blocks, then `norm` with
    config.norm_eps. Without a cache all is causal and without a mask, and the T tokens stand at the first T places of
    self.turn (2, block_size, hd / 2). With a cache, cache.prepare(tokens) gives causal, mask and their places, a slice or
    (B, 1, T). At the end cache.filled grows by T."""
    model, tokens = small(gpt, norm_eps=0.1), torch.randint(11, (2, 6))
    y, changed = model.trunk(tokens), tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    equal(y, trunk_by_hand(gpt, model, tokens), 'the trunk of 6 tokens')
    equal(model.trunk(changed)[:, :3], y[:, :3], 'places 0 to 2, when only token 3 has changed,')
    cache, parts = gpt.KVCache(8), []
    for part in tokens.split((3, 1, 2), 1):
        parts.append(model.trunk(part, cache))
    equal(torch.cat(parts, 1), y, '6 tokens read as 3 + 1 + 2 into a cache')
    assert cache.filled == 6, f'after 6 tokens cache.filled is {cache.filled}'
    x = torch.randn(2, 6, 8)
    equal(model.trunk(tokens, x=model.embedding(tokens)), y, "the trunk of x, the tokens' own embeddings,")
    assert not torch.allclose(model.trunk(tokens, x=x), y), 'x is not read in place of the embeddings'
    ragged = torch.cat((torch.tensor([[-1, -1], [3, 4]]), tokens), 1)
    equal(model.trunk(ragged, gpt.KVCache(8, ragged=True))[0, 2:], y[0], 'a row behind two -1, in a ragged cache,')


def GPT_forward(gpt):
    """The loss: the mean of -ln p of the next token. Tokens 0 to T - 1 of a row are read, and at each place the token after
    it is the target; -1 is no target. Tokens come as any kind of integers. `cross_entropy` takes rows (R, D), the head's
    matrix and targets (R,), and gives -ln p of each, 0 where there is no target.
    Returns the sum over all targets by their number, and logs: 'loss', that sum, detached, and number; 'tokens', the
    number and 1."""
    model = small(gpt)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -1, -1]])
    loss, logs = model({'tokens': tokens.to(torch.int16)})
    log_p = model.logits(trunk_by_hand(gpt, model, tokens)).log_softmax(-1)
    pairs = [(0, i, i + 2) for i in range(4)] + [(1, 0, 7), (1, 1, 8)]
    nll = torch.stack([-log_p[row, place, target] for row, place, target in pairs])
    copied = -log_p[0, range(4), tokens[0, :4]].mean()
    assert not torch.isclose(model({'tokens': tokens[:1]})[0], copied), (
        'the targets are the tokens read, not those that come next')
    assert not torch.isclose(loss, nll.sum() / 8), 'the loss is a mean over all places, those without a target (-1) too'
    equal(loss, nll.mean(), 'the loss of a row of 4 targets and one of 2 (and -1 behind them)')
    equal(logs['loss'], torch.stack((nll.sum(), torch.tensor(6.0))).detach(), "logs['loss'], the sum and the number,")
    equal(logs['tokens'], torch.tensor([6.0, 1.0]), "logs['tokens']")
    assert not logs['loss'].requires_grad, 'logs should be detached: they keep the graph alive'
    loss.backward()
    assert model.embedding.weight.grad.abs().sum() > 0, 'no gradient reaches the embedding'


def filter_logits(gpt):
    """Generation: temperature, top-k, top-p and min-p. Divide the logits (..., V) by the temperature, in float32. Then set
    to -inf, in this order,
    top_k  all but the top_k largest (0, or V and more, hides none);
    top_p  all but the nucleus, the fewest likeliest tokens that together hold top_p or more
           (1.0 hides none; one stays at least, also with 0.0);
    min_p  all whose probability is below min_p times that of the likeliest (0.0 hides none).
    The V tokens stay where they are. `check_sampling` raises ValueError for what is out of range."""
    known = '[0.05, 0.5, 0.15, 0.3] and [0.3, 0.05, 0.5, 0.15]'
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.3, 0.05, 0.5, 0.15]])

    def kept(logits=p.log(), **settings):
        return [[i for i, x in enumerate(row) if x > -torch.inf] for row in gpt.filter_logits(logits, **settings).tolist()]
    equal(gpt.filter_logits(p.log(), 0.5), 2 * p.log(), 'logits at temperature 0.5, which makes differences larger,')
    for settings, expected in (
            (dict(top_k=0), [[0, 1, 2, 3], [0, 1, 2, 3]]), (dict(top_k=2), [[1, 3], [0, 2]]), (dict(top_k=9), [[0, 1, 2, 3]] * 2),
            (dict(top_p=0.7), [[1, 3], [0, 2]]), (dict(top_p=0.9), [[1, 2, 3], [0, 2, 3]]), (dict(top_p=0.01), [[1], [2]]),
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
          'what is left of the probabilities with top_k=2')
    dtype = gpt.filter_logits(p.log().bfloat16()).dtype
    assert dtype == torch.float32, f'logits in bfloat16 come back as {dtype}, should be float32'


def without_cache(gpt, model, tokens, n, end=-1):
    """Greedy, one row (T0,) at a time, all read again for each token."""
    T, new = model.config.block_size, []
    context = tokens[-T:]
    for _ in range(n):
        if len(context) > T:
            context = context[-(T // 2):]
        logits = model.logits(trunk_by_hand(gpt, model, context[None]))[0, -1]
        new.append(-1 if end in new else int(logits.argmax()))
        context = torch.cat((context, torch.tensor(new[-1:])))
    return new


def listed(steps, B):
    """The tokens of a stream (B, n) as lists."""
    steps = [*steps]
    assert all(isinstance(step, torch.Tensor) and step.shape == (B,) for step in steps), (
        f'for {B} rows each `yield` should give {B} tokens, shape ({B},)')
    return torch.stack(steps, 1).tolist()


@torch.no_grad()
def decode(gpt):
    """Generation: one token after the other. A generator function: each `yield` gives the next token of every row, (B,), up to
    max_new_tokens times.
    1. model.step(tokens, cache) reads the tokens (B, T0) and gives the logits of the next one (B, V): sample it with
       `sample_token`. From then on read only the token just sampled, (B, 1).
    2. ended (B,) is a tensor of the caller, to be changed in place: True for a row that has sampled `end`. Such a row yields -1
       from the next token on. When all rows have ended, and end >= 0, stop."""
    model, tokens = small(gpt, block_size=32), torch.randint(11, (2, 3))

    def new(n, tokens=tokens, temperature=0, top_k=0, end=-1, generator=None, ended=None):
        ended = torch.zeros(len(tokens), dtype=torch.bool) if ended is None else ended
        return gpt.decode(model, tokens, gpt.KVCache(8), ended, n, temperature, top_k, 1.0, 0.0, end, generator)
    expected, got = [without_cache(gpt, model, row, 5) for row in tokens], listed(new(5), 2)
    assert [len(row) for row in got] == [5, 5], f'5 new tokens are asked for, {len(got[0])} come'
    assert got == expected, f'after prompts {tokens.tolist()} the most probable tokens are {expected}, not {got}'
    for row in range(2):
        end = without_cache(gpt, model, tokens[row], 5)[1]
        expected = [without_cache(gpt, model, prompt, 5, end) for prompt in tokens]
        stop = max(new.index(end) + 1 if end in new else 5 for new in expected)  # then all have ended
        ended = torch.zeros(2, dtype=torch.bool)
        expected, got = [row[:stop] for row in expected], listed(new(5, end=end, ended=ended), 2)
        assert got == expected, f'with end={end}, {expected} should come, not {got}'
        assert ended.tolist() == [end in row for row in expected], f'with end={end}, `ended` should be changed in place'
    got = listed(new(3, ended=torch.tensor([True, False])), 2)
    assert got[0] == [-1] * 3 and -1 not in got[1], f'a row that has ended before yields -1, not {got[0]}'
    got = listed(new(4, tokens[:1], 1.0, 1, generator=generator()), 1)
    assert got == [without_cache(gpt, model, tokens[0], 4)], 'with top_k=1 the most probable tokens should come'
    flat = [listed(new(5, temperature=2.0, generator=generator(seed)), 2) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], 'at temperature 2 the same generator should sample the same tokens, another seed others'


@torch.no_grad()
def GPT_stream(gpt):
    """Generation in a context of T = block_size tokens. A generator function that yields what `decode` yields, max_new_tokens
    times. From the last T tokens of the prompt:
    1. Make a KVCache for these and the new tokens, at most T, ragged if there is a -1. Read all but the last `chunk` or
       fewer tokens by self.trunk, `chunk` at a time, and the last ones by `decode`.
    2. T tokens are read and one more is sampled: the context is full. Go on with a new cache, which begins with the last
       T // 2 of all tokens so far, prompt and new.
    3. One `ended`, at first False for each row, serves all caches. Stop when all rows have ended."""
    def greedy(tokens, n, **settings):
        return listed(model.stream(tokens, n, temperature=0, **settings), len(tokens))
    model, tokens = small(gpt), torch.randint(11, (2, 3))
    expected, got = [without_cache(gpt, model, row, 5) for row in tokens], greedy(tokens, 5)
    assert got == expected, f'after prompts {tokens.tolist()} the most probable tokens are {expected}, not {got}'
    got = greedy(tokens, 5, chunk=2)
    assert got == expected, f'with chunk=2 the same tokens {expected} should come, not {got}'
    for length, n in ((13, 1), (6, 14), (8, 2), (9, 12)):
        long = torch.randint(11, (1, length))
        expected, got = [without_cache(gpt, model, long[0], n)], greedy(long, n)
        assert got == expected, (f'{n} tokens after a prompt of {length}, with room for 8: {expected[0]} should come, not {got[0]}; '
                                 'the last 8 of the prompt are read, and when the room is full the last 4 of all')
    ragged = torch.tensor([[-1, -1, 5], [1, 2, 3]])
    expected, got = [without_cache(gpt, model, row[row >= 0], 4) for row in ragged], greedy(ragged, 4)
    assert got == expected, f'after prompts of 1 and 3 tokens the most probable tokens are {expected}, not {got}'
    long = torch.randint(11, (2, 8))
    end = without_cache(gpt, model, long[0], 1)[0]
    expected, got = without_cache(gpt, model, long[0], 6, end), greedy(long, 6, end=end)[0]
    assert got == expected[:len(got)], f'with end={end}, a row that ends with the old cache should yield -1 with the new one, not {got}'
    flat = [listed(model.stream(tokens, 6, 2.0, generator=generator(seed)), 2) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], 'at temperature 2 the same generator should sample the same tokens, another seed others'


EXERCISES = {
    'MLP.forward': (1, MLP_forward),
    'rotate': (2, rotate),
    'Attention.forward': (4, Attention_forward),
    'Block.forward': (2, Block_forward),
    'GPT.trunk': (3, GPT_trunk),
    'GPT.forward': (3, GPT_forward),
    'filter_logits': (2, filter_logits),
    'decode': (2, decode),
    'GPT.stream': (1, GPT_stream),
}
