"""
Chapter 5's exercises: each check's docstring is what a student reads, its asserts are what a failed answer is told.

The references are slow and obvious: one conversation at a time, without a cache.
"""
import torch

from tests.exercises import equal, generator, lively


def small(vlm, **changes):
    config = dict(vocab_size=12, image_token=10, block_size=14, n_layer=1, n_head=2, n_embd=16, image_size=16, patch=4, pool=2,
                  eyes_layer=1, eyes_head=2, eyes_embd=8)
    return lively(vlm.VLM(vlm.Config(**(config | changes))))


def pictures(*shape):
    return torch.randint(256, (*shape, 16, 16, 3))


def pixel_shuffle(vlm):
    """The projector, first half: squares of pool x pool patches become one vector each (as in Idefics3, 2408.12637). The
    N = side * side patches of a picture come row by row, and so do the squares, (B, N / pool^2, pool^2 D). Number d of
    the patch in row i and column j of its square stands at d * pool^2 + i * pool + j, the order of F.pixel_unshuffle."""
    patches = torch.arange(16.0).view(1, 16, 1)  # their own numbers, 4 x 4
    got = vlm.pixel_shuffle(patches, 2)
    assert isinstance(got, torch.Tensor) and got.shape == (1, 4, 4), (
        f'16 patches of 1 number in squares of 2 x 2 should be (1, 4, 4), not {tuple(getattr(got, "shape", ()))}')
    for square, expected in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15])):
        found = [int(i) for i in got[0, square].tolist()]
        assert sorted(found) == expected, (
            f'of patches 0 to 15 in 4 rows, square {square} should hold {expected}, but it holds {found}')
    x = torch.randn(2, 36, 5)
    got, expected = vlm.pixel_shuffle(x, 3), torch.empty(2, 4, 45)
    for square in range(4):
        for i in range(3):
            for j in range(3):
                row, column = square // 2 * 3 + i, square % 2 * 3 + j
                expected[:, square, i * 3 + j::9] = x[:, row * 6 + column]
    equal(got, expected, 'the order of numbers in a vector (5 numbers a patch, squares of 3 x 3)')
    equal(vlm.pixel_shuffle(x, 1), x, 'with pool=1, x')


def VLM_look(vlm):
    """The projector, second half: from pixels to what the language model reads (LLaVA, 2304.08485, section 4.1). self.eyes,
    which takes pictures (B m, H, W, C), then `pixel_shuffle` with config.pool, then the matrix self.projector. A row has
    one picture, (B, H, W, C), or m, (B, m, H, W, C); its m pictures stand one behind the other, (B, m P, D)."""
    model, images = small(vlm, n_images=2), pictures(3, 2)
    seen = model.look(images)
    assert isinstance(seen, torch.Tensor) and seen.shape == (3, 8, 16), (
        f'3 rows with 2 pictures a row, of 4 tokens each, should be (3, 8, 16), not {tuple(getattr(seen, "shape", ()))}')
    for row in range(3):
        for i in range(2):
            expected = model.projector(vlm.pixel_shuffle(model.eyes(images[row, i][None]), 2))[0]
            equal(seen[row, 4 * i:4 * i + 4], expected, f'what is read of picture {i} of row {row}')
    equal(model.look(images[:, 0]), seen[:, :4], 'what is read of pictures (B, H, W, C)')


def make_room(vlm):
    """The splice, first half: a picture's token stands once in a text and is to become P tokens. Returns where the tokens
    of the longer sequence come from, indices into L, (B, L + m (P - 1)): those of a picture's token P times, all others
    once, in their order.
    ValueError where a row does not have exactly n_images = m pictures."""
    tokens = torch.tensor([[9, 1, 2, -1, 9], [3, 9, 9, 5, 6]])
    got = vlm.make_room(tokens, 9, 3, 2)
    expected = [[0, 0, 0, 1, 2, 3, 4, 4, 4], [0, 1, 1, 1, 2, 2, 2, 3, 4]]
    assert got.tolist() == expected, (
        f'for {tokens.tolist()}, 9 being a picture of P=3 tokens, the places should be {expected}, but they are {got.tolist()}')
    equal(vlm.make_room(tokens, 9, 1, 2), torch.arange(5).expand(2, 5), 'the places when a picture is P=1 token')
    for n in (1, 3):
        try:
            vlm.make_room(tokens, 9, 3, n)
        except ValueError:
            continue
        raise AssertionError(f'rows tell of 2 pictures, n_images={n}: that should raise a ValueError')


def VLM_trunk(vlm):
    """The splice, second half: pictures among words. Words are embedded by self.language.embedding (-1 as 0); where the
    tokens are config.image_token, the vectors seen (B, m P, D) stand instead, in their order.
    self.language.trunk(tokens, cache, x) reads them. Without seen, all are words."""
    model = small(vlm)
    tokens, seen = torch.tensor([[10, 10, 10, 10, 1, 2], [3, 4, 10, 10, 10, 10]]), torch.randn(2, 4, 16)
    x = model.language.embedding(tokens)
    words = model.trunk(tokens)
    equal(words, model.language.trunk(tokens), 'what is read of words alone')
    got = model.trunk(tokens, seen)
    assert not torch.allclose(got, words), 'seen changes nothing: the picture is not read'
    x[0, :4], x[1, 2:] = seen[0], seen[1]
    expected = model.language.trunk(tokens, None, x)
    equal(got[0], expected[0], 'what is read of a picture and two words')
    equal(got[1], expected[1], 'what is read of a picture behind two words')
    cache = vlm.KVCache(model.length, ragged=True)
    parts = model.trunk(tokens[:1, :4], seen[:1], cache), model.trunk(tokens[:1, 4:], cache=cache)
    equal(torch.cat(parts, 1), expected[:1], 'with a cache, two words after a picture')
    assert torch.isfinite(model.trunk(torch.tensor([[1, 2, -1]]))).all(), (
        'behind the end of a text tokens are -1, which is no row of the table')


def VLM_draw(vlm):
    """The loss mask: answers are learned, questions and pictures only read. `make_room` for the pictures, in tokens and
    counted alike: (B, T). The token after each of the first T - 1 places is its target where it is counted (> 0) and not
    -1. Returns a dictionary of
    image, tokens  as they were; with room, (B, T);
    rows, targets  (R,) the numbers, among B (T - 1), of the places that have a target, from first to last; the targets;
    weight         (R,) such that the sum of weight * loss is the mean over a conversation's targets, then over
                   conversations.
    Where the batch has names (B, m P, n), the targets of a picture's token are its names instead: up to n rows for one
    place, in their order, -1 being none. The last three are filled up with zeros to a multiple of 64."""
    model, images = small(vlm), pictures(2)
    tokens = torch.tensor([[10, 1, 2, 3, 4, 5, 6, -1], [10, 7, 8, 3, -1, -1, -1, -1]])
    counted = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1]])

    def check(drawn, triples, what):
        missing = {'image', 'tokens', 'rows', 'targets', 'weight'} - set(drawn)
        assert not missing, f'the drawn batch lacks {", ".join(sorted(missing))}'
        n, expected = len(triples), [list(column) for column in zip(*triples)]
        got = [drawn[name][:n].tolist() for name in ('rows', 'targets', 'weight')]
        assert got[0] == expected[0], f'{what}: rows should begin with {expected[0]}, but they are {got[0]}'
        assert got[1] == expected[1], f'{what}: targets should begin with {expected[1]}, but they are {got[1]}'
        equal(drawn['weight'][:n], torch.tensor(expected[2]), f'{what}: weight')
        assert not drawn['weight'][n:].any(), (
            f'{what}: there are {int((drawn["weight"] > 0).sum())} targets in rows, should be {n}')
        assert len(drawn['rows']) == len(drawn['targets']) == len(drawn['weight']) == 64, (
            f'{what}: should be filled up to 64 targets')
    batch = dict(image=images, tokens=tokens, counted=counted)
    drawn = model.draw(dict(batch), None, None)
    equal(drawn['tokens'], torch.cat((torch.full((2, 3), 10), tokens), 1), 'tokens, with room for the picture')
    # T - 1 = 10 places a row: 4 of the picture, then the words; the token after place 4 of row 0 is 2
    check(drawn, [(4, 2, 1 / 8), (5, 3, 1 / 8), (7, 5, 1 / 8), (8, 6, 1 / 8), (14, 8, 1 / 4), (15, 3, 1 / 4)],
          'answers of 4 and 2 tokens')
    assert drawn['image'] is not None and torch.equal(drawn['image'], images), 'image should be as it was'
    named = small(vlm, n_names=2, n_named=4)
    names = torch.tensor([[[1, 2], [3, -1], [-1, -1], [4, 5]]])
    batch = dict(image=images[:1], tokens=torch.tensor([[10, 6, 7]]), counted=torch.tensor([[0, 0, 1]]), names=names)
    drawn = named.draw(batch, None, None)
    check(drawn, [(row, target, 1 / 6) for row, target in ((0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 7))],
          'with names of two words')


def next_logits(model, images, tokens):
    """Of what comes after one conversation, tokens (L,) with -1 cut off, all read at once."""
    tokens = tokens[tokens >= 0]
    if images is None:
        return model.language.logits(model.trunk(tokens[None]))[0, -1]
    tokens = torch.cat([torch.full((model.P,), 10) if token == 10 else token[None] for token in tokens])
    return model.language.logits(model.trunk(tokens[None], model.look(images[None])))[0, -1]


@torch.no_grad()
def VLM_read(vlm):
    """The cache: read pictures and prompt once, for many questions. With images (B, m, H, W, C): `make_room` in the tokens,
    and, unless config.blind, `look`. One KVCache for all of them, ragged, since prompts (B, L) have -1 in front of shorter
    ones. The trunk reads all into the cache. Then cache.repeat(n), and return it."""
    model, images = small(vlm, n_images=1), pictures(2, 1)
    prompts, after = torch.tensor([[-1, 10, 1], [10, 2, 3]]), torch.tensor([[4], [5]])
    cache = model.read(prompts, images)
    assert isinstance(cache, vlm.KVCache), f'read should return the cache, not {type(cache).__name__}'
    assert cache.filled == 6, f'3 tokens, one of them a picture of 4: cache.filled should be 6, but it is {cache.filled}'
    got = model.language.logits(model.trunk(after, cache=cache))[:, -1]
    for row in range(2):
        expected = next_logits(model, images[row], torch.cat((prompts[row], after[row])))
        equal(got[row], expected, f'the logits after reading prompt {row} and a word more')
    cache, asked = model.read(prompts, images, 2), torch.tensor([[4], [5], [6], [7]])
    got = model.language.logits(model.trunk(asked, cache=cache))[:, -1]
    for row in range(4):
        expected = next_logits(model, images[row // 2], torch.cat((prompts[row // 2], asked[row])))
        equal(got[row], expected, f'the logits of question {row}, with 2 questions about each of 2 pictures,')
    got = model.language.logits(model.trunk(after, cache=model.read(torch.tensor([[-1, 1], [2, 3]]))))[:, -1]
    for row, prompt in enumerate(([1, 4], [2, 3, 5])):
        equal(got[row], next_logits(model, None, torch.tensor(prompt)), f'the logits after prompt {row}, without a picture,')
    blind = small(vlm, blind=True)
    first, second = (blind.language.logits(blind.trunk(after, cache=blind.read(prompts, pictures(2, 1)))) for _ in range(2))
    assert torch.equal(first, second), 'a blind model should not look at pictures'


@torch.no_grad()
def VLM_step(vlm):
    """What comes next? self.language.step(tokens, cache) reads tokens (B, T) after what the cache holds and gives the logits
    of the next token (B, V). That of a picture is -inf: it cannot be said."""
    model, images = small(vlm), pictures(2, 1)
    prompts, asked = torch.tensor([[10], [10]]), torch.tensor([[1, 4], [2, 3]])
    got = model.step(asked, model.read(prompts, images))
    for row in range(2):
        expected = next_logits(model, images[row], torch.cat((prompts[row], asked[row])))
        expected[10] = -torch.inf
        assert got.shape == (2, len(expected)), f'logits of 2 rows: shape {tuple(got.shape)}, should be (2, {len(expected)})'
        assert got[row, 10] == -torch.inf, 'the token of a picture cannot be said: its logit should be -inf'
        equal(got[row, :10], expected[:10], f'the logits of words after a picture and a question, row {row},')


@torch.no_grad()
def VLM_stream(vlm):
    """Generation: the answer, token by token. Returns chapter 1's generator `decode`, whose arguments are self, tokens, the
    cache, ended, a number of tokens, and all that follows max_new_tokens here.
    1. ended: False for each of the B rows.
    2. The number is max_new_tokens, or fewer: tokens (B, T0) and all new ones but the last, which is not read, must fit
       into self.length behind what the cache holds.
    3. cache.length is the number of positions that it will then hold."""
    model, images = small(vlm), pictures(2, 1)
    prompts, asked = torch.tensor([[10], [10]]), torch.tensor([[-1, 4], [2, 3]])

    def answer(n, end=-1, **settings):
        steps = [*model.stream(asked, model.read(prompts, images), n, end=end, **settings)]
        assert all(isinstance(step, torch.Tensor) and step.shape == (2,) for step in steps), (
            'each `yield` should give a token a row, shape (2,)')
        return torch.stack(steps, 1).tolist()

    def by_hand(row, n, end=-1):
        tokens, new = torch.cat((prompts[row], asked[row])), []
        for _ in range(n):
            logits = next_logits(model, images[row], torch.cat((tokens, torch.tensor(new, dtype=torch.long))))
            logits[10] = -torch.inf
            new.append(-1 if end in new else int(logits.argmax()))
        return new
    expected, got = [by_hand(row, 5) for row in range(2)], answer(5)
    assert got == expected, f'after questions about two pictures {expected} should come, not {got}'
    for row in range(2):
        end = expected[row][2]
        wanted = [by_hand(row, 5, end) for row in range(2)]
        stop = max(new.index(end) + 1 if end in new else 5 for new in wanted)
        wanted, got = [new[:stop] for new in wanted], answer(5, end)
        assert got == wanted, f'with end={end}, {wanted} should come, not {got}'
    flat = [answer(9, temperature=2.0, generator=generator(seed)) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], 'at temperature 2 the same generator should sample the same tokens, another seed others'
    got = answer(30)
    assert len(got[0]) == 12, (f'the context holds {model.length} tokens, of which 6 are read: of 30 new ones asked for, '
                               f'11 have room and one more can be drawn, not {len(got[0])}')
    model.language.head.weight.data[10] = 100 * model.language.head.weight.data[10].abs() + 1
    drawn = [token for _ in range(5) for row in answer(5, temperature=1.0) for token in row]
    assert 10 not in drawn, 'it says the token of a picture, which cannot be said'
    cache = model.read(prompts, images)
    new = [*model.stream(asked, cache, 3)]
    assert len(new) == 3 and cache.length == 8, f'6 tokens and 2 of 3 new ones are read: cache.length should be 8, not {cache.length}'


EXERCISES = {
    'pixel_shuffle': (3, pixel_shuffle),
    'VLM.look': (2, VLM_look),
    'make_room': (3, make_room),
    'VLM.trunk': (3, VLM_trunk),
    'VLM.draw': (4, VLM_draw),
    'VLM.read': (2, VLM_read),
    'VLM.step': (1, VLM_step),
    'VLM.stream': (2, VLM_stream),
}
