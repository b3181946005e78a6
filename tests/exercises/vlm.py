"""
Chapter 5's exercises: a check's docstring is what a student reads, its asserts are what a wrong answer is told.

The references are slow and simple: one conversation at a time, without a cache.
"""
import torch

from tests.exercises import equal, generator, lively


def small(vlm, **changes):
    config = dict(vocab_size=12, image_token=10, block_size=14, n_layer=1, n_head=2, n_embd=16, image_size=16,
                  patch_size=4, pixel_shuffle_factor=2, vision_layer=1, vision_head=2, vision_embd=8)
    return lively(vlm.VLM(vlm.Config(**(config | changes))))


def random_images(*shape):
    return torch.randint(256, (*shape, 16, 16, 3))


def pixel_shuffle(vlm):
    """The projector, first half: concatenate each square of factor x factor patches to one vector (as in Idefics3,
    2408.12637). The N = side * side patches of an image are in raster order, and so are the squares of the result,
    (B, N / factor^2, factor^2 D). Element d of the patch in row i and column j of its square has the index
    d * factor^2 + i * factor + j, the order of F.pixel_unshuffle."""
    patches = torch.arange(16.0).view(1, 16, 1)  # their own numbers, 4 x 4
    got = vlm.pixel_shuffle(patches, 2)
    assert isinstance(got, torch.Tensor) and got.shape == (1, 4, 4), (
        f'16 patches of 1 value in squares of 2 x 2 should be (1, 4, 4), not {tuple(getattr(got, "shape", ()))}')
    for square, expected in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15])):
        found = [int(i) for i in got[0, square].tolist()]
        assert sorted(found) == expected, (
            f'of patches 0 to 15 in 4 rows, square {square} should have {expected}, but it has {found}')
    x = torch.randn(2, 36, 5)
    got, expected = vlm.pixel_shuffle(x, 3), torch.empty(2, 4, 45)
    for square in range(4):
        for i in range(3):
            for j in range(3):
                row, column = square // 2 * 3 + i, square % 2 * 3 + j
                expected[:, square, i * 3 + j::9] = x[:, row * 6 + column]
    equal(got, expected, 'the order of values in a vector (5 values a patch, squares of 3 x 3)')
    equal(vlm.pixel_shuffle(x, 1), x, 'with factor=1, x')


def VLM_encode_images(vlm):
    """The projector, second half: from pixels to image embeddings (LLaVA, 2304.08485, section 4.1). Apply
    self.vision_encoder, which takes images (B m, H, W, C), then `pixel_shuffle` with config.pixel_shuffle_factor, then
    the linear layer self.projector. A row has one image, (B, H, W, C), or m, (B, m, H, W, C); the embeddings of its m
    images are concatenated, (B, m P, D)."""
    model, images = small(vlm, n_images=2), random_images(3, 2)
    image_embeds = model.encode_images(images)
    assert isinstance(image_embeds, torch.Tensor) and image_embeds.shape == (3, 8, 16), (
        '3 rows with 2 images a row, of 4 tokens each, should be (3, 8, 16), not '
        f'{tuple(getattr(image_embeds, "shape", ()))}')
    for row in range(3):
        for i in range(2):
            expected = model.projector(vlm.pixel_shuffle(model.vision_encoder(images[row, i][None]), 2))[0]
            equal(image_embeds[row, 4 * i:4 * i + 4], expected, f'the embeddings of image {i} of row {row}')
    equal(model.encode_images(images[:, 0]), image_embeds[:, :4], 'the embeddings of images (B, H, W, C)')


def expand_image_tokens(vlm):
    """The splice, first half: a text has one image token per image, which is to become P = tokens_per_image tokens.
    Return the indices into L of the tokens of the longer sequence, (B, L + m (P - 1)): that of an image token P times,
    all others once, in their order.
    Raise ValueError if a row has a number of image tokens other than n_images = m."""
    tokens = torch.tensor([[9, 1, 2, -1, 9], [3, 9, 9, 5, 6]])
    got = vlm.expand_image_tokens(tokens, 9, 3, 2)
    expected = [[0, 0, 0, 1, 2, 3, 4, 4, 4], [0, 1, 1, 1, 2, 2, 2, 3, 4]]
    assert got.tolist() == expected, (
        f'for {tokens.tolist()}, image_token=9 and P=3, the indices should be {expected}, but they are {got.tolist()}')
    equal(vlm.expand_image_tokens(tokens, 9, 1, 2), torch.arange(5).expand(2, 5), 'the indices for P=1 token per image')
    for n in (1, 3):
        try:
            vlm.expand_image_tokens(tokens, 9, 3, n)
        except ValueError:
            continue
        raise AssertionError(f'rows have 2 image tokens, n_images={n}: that should raise a ValueError')


def VLM_backbone(vlm):
    """The splice, second half: images between words. Embed tokens by self.language_model.token_embedding (-1 as 0);
    where tokens equal config.image_token, use image_embeds (B, m P, D) instead, in their order. Then
    self.language_model.backbone(tokens, cache, x). Without image_embeds all tokens are words."""
    model = small(vlm)
    tokens, image_embeds = torch.tensor([[10, 10, 10, 10, 1, 2], [3, 4, 10, 10, 10, 10]]), torch.randn(2, 4, 16)
    x = model.language_model.token_embedding(tokens)
    words = model.backbone(tokens)
    equal(words, model.language_model.backbone(tokens), 'the output for words alone')
    got = model.backbone(tokens, image_embeds)
    assert not torch.allclose(got, words), 'image_embeds changes nothing: the image is not read'
    x[0, :4], x[1, 2:] = image_embeds[0], image_embeds[1]
    expected = model.language_model.backbone(tokens, None, x)
    equal(got[0], expected[0], 'the output for an image and two words')
    equal(got[1], expected[1], 'the output for an image after two words')
    cache = vlm.KVCache(model.max_seq_len, left_padded=True)
    parts = model.backbone(tokens[:1, :4], image_embeds[:1], cache), model.backbone(tokens[:1, 4:], cache=cache)
    equal(torch.cat(parts, 1), expected[:1], 'with a cache, two words after an image')
    assert torch.isfinite(model.backbone(torch.tensor([[1, 2, -1]]))).all(), (
        'after the end of a text tokens are -1, which is no row of the embedding table')


def VLM_prepare_batch(vlm):
    """The loss mask: only answers are targets, questions and images are input. Three parts:
    1. `expand_image_tokens`, for tokens and loss_mask: (B, T).
    2. The target of each of the first T - 1 positions is the next token if its loss_mask is > 0 and it is not -1.
       If the batch has patch_labels (B, m P, n), the targets of image tokens are their labels instead: up to n targets
       for one position, in their order; -1 is none.
    3. Flatten. Return a dictionary of
       image, tokens       image as it was; tokens expanded, (B, T)
       token_idx, targets  (R,) the positions, among B (T - 1), that have a target, from first to last; the targets
       weight              (R,) such that the sum of weight * loss is the mean over a conversation's targets, then over
                           conversations
       The last three are padded with zeros to a multiple of 64."""
    model, images = small(vlm), random_images(2)
    tokens = torch.tensor([[10, 1, 2, 3, 4, 5, 6, -1], [10, 7, 8, 3, -1, -1, -1, -1]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1]])

    def check(found, triples, name):
        missing = {'image', 'tokens', 'token_idx', 'targets', 'weight'} - set(found)
        assert not missing, f'the prepared batch lacks {", ".join(sorted(missing))}'
        n, expected = len(triples), [list(column) for column in zip(*triples)]
        got = [found[key][:n].tolist() for key in ('token_idx', 'targets', 'weight')]
        assert got[0] == expected[0], f'{name}: token_idx should begin with {expected[0]}, but it is {got[0]}'
        assert got[1] == expected[1], f'{name}: targets should begin with {expected[1]}, but they are {got[1]}'
        equal(found['weight'][:n], torch.tensor(expected[2]), f'{name}: weight')
        assert not found['weight'][n:].any(), (
            f'{name}: there are {int((found["weight"] > 0).sum())} targets in token_idx, should be {n}')
        assert len(found['token_idx']) == len(found['targets']) == len(found['weight']) == 64, (
            f'{name}: should be padded to 64 targets')
    batch = dict(image=images, tokens=tokens, loss_mask=loss_mask)
    found = model.prepare_batch(dict(batch), None, None)
    equal(found['tokens'], torch.cat((torch.full((2, 3), 10), tokens), 1), 'tokens, with the image token expanded')
    # T - 1 = 10 positions a row: 4 of the image, then the words; the token after position 4 of row 0 is 2
    check(found, [(4, 2, 1 / 8), (5, 3, 1 / 8), (7, 5, 1 / 8), (8, 6, 1 / 8), (14, 8, 1 / 4), (15, 3, 1 / 4)],
          'answers of 4 and 2 tokens')
    assert found['image'] is not None and torch.equal(found['image'], images), 'image should be as it was'
    labelled = small(vlm, max_label_tokens=2, n_patch_labels=4)
    labels = torch.tensor([[[1, 2], [3, -1], [-1, -1], [4, 5]]])
    batch = dict(image=images[:1], tokens=torch.tensor([[10, 6, 7]]), loss_mask=torch.tensor([[0, 0, 1]]),
                 patch_labels=labels)
    found = labelled.prepare_batch(batch, None, None)
    check(found, [(row, target, 1 / 6) for row, target in ((0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (4, 7))],
          'with patch labels of two words')


def next_logits(model, images, tokens):
    """Logits of the token after one conversation, tokens (L,) without -1, read in one pass."""
    tokens = tokens[tokens >= 0]
    if images is None:
        return model.language_model.logits(model.backbone(tokens[None]))[0, -1]
    tokens = torch.cat([torch.full((model.tokens_per_image,), 10) if token == 10 else token[None] for token in tokens])
    return model.language_model.logits(model.backbone(tokens[None], model.encode_images(images[None])))[0, -1]


@torch.no_grad()
def VLM_prefill(vlm):
    """Prefill: read images and prompts into a cache once, for several questions. With images (B, m, H, W, C):
    `expand_image_tokens` for the tokens and, unless config.text_only, `encode_images`. One KVCache for all rows,
    left_padded, since shorter prompts among (B, L) begin with -1. The backbone reads all into the cache. Then
    cache.repeat_batch(n_repeat), and return the cache."""
    model, images = small(vlm, n_images=1), random_images(2, 1)
    prompts, after = torch.tensor([[-1, 10, 1], [10, 2, 3]]), torch.tensor([[4], [5]])
    cache = model.prefill(prompts, images)
    assert isinstance(cache, vlm.KVCache), f'prefill should return the cache, not {type(cache).__name__}'
    assert cache.cur_len == 6, f'3 tokens, one of them an image of 4: cache.cur_len should be 6, not {cache.cur_len}'
    got = model.language_model.logits(model.backbone(after, cache=cache))[:, -1]
    for row in range(2):
        expected = next_logits(model, images[row], torch.cat((prompts[row], after[row])))
        equal(got[row], expected, f'the logits after reading prompt {row} and one more word')
    cache, questions = model.prefill(prompts, images, 2), torch.tensor([[4], [5], [6], [7]])
    got = model.language_model.logits(model.backbone(questions, cache=cache))[:, -1]
    for row in range(4):
        expected = next_logits(model, images[row // 2], torch.cat((prompts[row // 2], questions[row])))
        equal(got[row], expected, f'the logits of question {row}, with 2 questions about each of 2 images,')
    cache = model.prefill(torch.tensor([[-1, 1], [2, 3]]))
    got = model.language_model.logits(model.backbone(after, cache=cache))[:, -1]
    for row, prompt in enumerate(([1, 4], [2, 3, 5])):
        expected = next_logits(model, None, torch.tensor(prompt))
        equal(got[row], expected, f'the logits after prompt {row}, without an image,')
    ignoring = small(vlm, text_only=True)
    caches = [ignoring.prefill(prompts, random_images(2, 1)) for _ in range(2)]
    first, second = (ignoring.language_model.logits(ignoring.backbone(after, cache=cache)) for cache in caches)
    assert torch.equal(first, second), 'a text_only model should ignore images'


@torch.no_grad()
def VLM_step(vlm):
    """Decode, one step: self.language_model.step(tokens, cache) reads tokens (B, T) after those in the cache,
    and returns the logits of the next token (B, V). Set the logit of the image token to -inf: it is never sampled."""
    model, images = small(vlm), random_images(2, 1)
    prompts, questions = torch.tensor([[10], [10]]), torch.tensor([[1, 4], [2, 3]])
    got = model.step(questions, model.prefill(prompts, images))
    for row in range(2):
        expected = next_logits(model, images[row], torch.cat((prompts[row], questions[row])))
        expected[10] = -torch.inf
        assert got.shape == (2, len(expected)), (
            f'logits of 2 rows: shape {tuple(got.shape)}, should be (2, {len(expected)})')
        assert got[row, 10] == -torch.inf, 'the image token is never sampled: its logit should be -inf'
        equal(got[row, :10], expected[:10], f'the logits of words after an image and a question, row {row},')


@torch.no_grad()
def VLM_stream(vlm):
    """Decode: the answer, token by token. Return chapter 1's generator `decode`, whose arguments are self, tokens, the
    cache, finished, a number of tokens, and all that follows max_new_tokens here.
    1. finished: False for each of the B rows.
    2. The number is max_new_tokens, or less: tokens (B, T0) and all new ones but the last, which is not read, must fit
       into self.max_seq_len after those in the cache.
    3. cache.max_len is the number of positions that the cache will then hold."""
    model, images = small(vlm), random_images(2, 1)
    prompts, questions = torch.tensor([[10], [10]]), torch.tensor([[-1, 4], [2, 3]])

    def answer(n, eos_id=-1, **settings):
        steps = [*model.stream(questions, model.prefill(prompts, images), n, eos_id=eos_id, **settings)]
        assert all(isinstance(step, torch.Tensor) and step.shape == (2,) for step in steps), (
            'each `yield` should give a token a row, shape (2,)')
        return torch.stack(steps, 1).tolist()

    def by_hand(row, n, eos_id=-1):
        tokens, new = torch.cat((prompts[row], questions[row])), []
        for _ in range(n):
            logits = next_logits(model, images[row], torch.cat((tokens, torch.tensor(new, dtype=torch.long))))
            logits[10] = -torch.inf
            new.append(-1 if eos_id in new else int(logits.argmax()))
        return new
    expected, got = [by_hand(row, 5) for row in range(2)], answer(5)
    assert got == expected, f'after questions about two images {expected} should follow, not {got}'
    for row in range(2):
        eos_id = expected[row][2]
        wanted = [by_hand(row, 5, eos_id) for row in range(2)]
        stop = max(new.index(eos_id) + 1 if eos_id in new else 5 for new in wanted)
        wanted, got = [new[:stop] for new in wanted], answer(5, eos_id)
        assert got == wanted, f'with eos_id={eos_id}, {wanted} should follow, not {got}'
    flat = [answer(9, temperature=2.0, generator=generator(seed)) for seed in (1, 1, 2)]
    assert flat[0] == flat[1] != flat[2], (
        'at temperature 2 the same generator should sample the same tokens, another seed others')
    got = answer(30)
    assert len(got[0]) == 12, (f'the context has {model.max_seq_len} tokens, of which 6 are read: of 30 new ones, '
                               f'11 fit and one more can be sampled, not {len(got[0])}')
    model.language_model.lm_head.weight.data[10] = 100 * model.language_model.lm_head.weight.data[10].abs() + 1
    sampled = [token for _ in range(5) for row in answer(5, temperature=1.0) for token in row]
    assert 10 not in sampled, 'it samples the image token'
    cache = model.prefill(prompts, images)
    new = [*model.stream(questions, cache, 3)]
    assert len(new) == 3 and cache.max_len == 8, (
        f'6 tokens and 2 of 3 new ones are read: cache.max_len should be 8, not {cache.max_len}')


EXERCISES = {
    'pixel_shuffle': (3, pixel_shuffle),
    'VLM.encode_images': (2, VLM_encode_images),
    'expand_image_tokens': (3, expand_image_tokens),
    'VLM.backbone': (3, VLM_backbone),
    'VLM.prepare_batch': (4, VLM_prepare_batch),
    'VLM.prefill': (2, VLM_prefill),
    'VLM.step': (1, VLM_step),
    'VLM.stream': (2, VLM_stream),
}
