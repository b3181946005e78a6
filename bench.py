"""
What the parts of the chapters cost on this machine, each beside the plain way to do the same.

    python bench.py                           all of it, about five minutes on two CPU cores
    python bench.py --part=generation         training, generation, unmasking, cross_entropy, padding or answers
    python bench.py --part=speculation --run=gpt_shakespeare --draft=gpt_draft

Training: a step of the GPT of config/gpt_shakespeare.py, float32 and eager against bfloat16 and compiled. Generation: with a KV
cache against running the whole context for every token, and by batch. Unmasking: pictures of 49 tokens by MaskGIT in a few steps
against a GPT of the same size with its cache. Cross-entropy: a large vocabulary with all logits at once against chunks of rows.
Padding: nano4M with every slot filled and codes by their digits against the same model with padded slots and one head for all
codes, 64 real targets a sample. Answers: 32 questions about four pictures, each looked at once, against all anew for each token.
Speculation, of two trained runs: a text with a draft's guesses against without, in turns. Times are medians; both sides are checked to compute the same thing.
"""
import multiprocessing
import resource
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import fourm
import maskgit
import sample
import train
from config import UserError
from gpt import GPT, Config, cross_entropy, norm
from vlm import VLM
from vlm import Config as VLMConfig

SETTINGS = dict(
    part='all',               # training, generation, unmasking, cross_entropy, padding, answers; speculation only by name
    device='auto',
    n_layer=6, n_head=4, n_embd=256,
    n_kv_head=0,              # fewer heads of keys and values make the cache smaller; 0 is n_head
    block_size=256,           # context of the training step
    batch_size=16,
    max_new_tokens=1000,      # generated in a context of 1,024
    vocab_size=65536,         # of the cross-entropy
    rows=4096,
    samples=8,                # in a step of nano4M
    run='gpt_shakespeare', draft='gpt_draft',  # of speculation: a trained GPT and a small one
    temperature=0.8,          # of speculation
    repeats=5,
)


def median_seconds(run, device, repeats):
    """The median time of run() after a first call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        train.synchronize(device)
        start = time.perf_counter()
        run()
        train.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def report(name, seconds, tokens, against, unit='tokens'):
    print(f'{name:44}{seconds:10.3f} s{tokens / seconds:12,.0f} {unit}/s{against / seconds * tokens:8.2f} x', flush=True)


def sizes(settings):
    return {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_kv_head')}


def bench_training(settings, device):
    """One step, optimizer included, in float32 and bfloat16, eager and compiled."""
    tokens = settings['batch_size'] * settings['block_size']
    batch = {'tokens': torch.randint(65, (settings['batch_size'], settings['block_size'] + 1), device=device)}
    against, losses = 0, []
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
        torch.manual_seed(0)
        model = GPT(Config(vocab_size=65, block_size=settings['block_size'], **sizes(settings))).to(device)
        optimizers = train.make_optimizers(model, train.SETTINGS)
        if compiled:
            train.compile_blocks(model, device)

        def step():
            with train.autocast(device, dtype):
                loss = model(batch)[0]
            loss.backward()
            train.update(optimizers, train.SETTINGS, 0)
            return loss.item()
        losses.append(step())
        seconds = median_seconds(step, device, settings['repeats'])
        against = against or seconds / tokens
        report(f'training step, {str(dtype)[6:]}, {"compiled" if compiled else "eager"}', seconds, tokens, against)
    assert max(losses) - min(losses) < 1e-3  # ln 65, whatever the number format


@torch.no_grad()
def uncached(model, tokens, n):
    """Greedy generation that runs the whole context for every token."""
    for _ in range(n):
        tokens = torch.cat((tokens, model.logits(model.trunk(tokens)[:, -1:]).argmax(-1)), 1)
    return tokens


def bench_generation(settings, device):
    """max_new_tokens in a context of 1,024, as sample.py generates them."""
    train.set_up(device, training=False)
    model, n = GPT(Config(vocab_size=65, block_size=1024, **sizes(settings))).to(device).eval(), settings['max_new_tokens']
    if n > 1023:
        raise UserError(f'max_new_tokens={n}: the context of this benchmark holds 1,024, of which one is the prompt')
    for parameter in model.parameters():  # zero-initialised outputs would make all tokens alike
        torch.nn.init.normal_(parameter, std=0.05)
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    with sample.exact(dict(dtype='auto'), device):
        begin = time.perf_counter()
        slow = uncached(model, start, n)
        train.synchronize(device)
        seconds = time.perf_counter() - begin
        report('generation, batch 1, without a cache', seconds, n, seconds / n)
        fast = model.generate(start, n, temperature=0)
        print(f'the same tokens: the first {(slow != fast)[0].long().cumsum(0).eq(0).sum() - 1:,}')
        for batch in (1, 8, 32):
            took = median_seconds(lambda: model.generate(start.repeat(batch, 1), n, temperature=0), device, 1)
            report(f'generation, batch {batch}, KV cache', took, batch * n, seconds / n)


def bench_unmasking(settings, device):
    """Pictures of 7x7 tokens, one and 64 at once. A GPT takes 49 steps and computes each token once; MaskGIT takes 8 steps and
    computes all tokens in each: 8 times the work in a sixth of the steps."""
    train.set_up(device, training=False)
    own = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd')}
    gpt = GPT(Config(vocab_size=26, block_size=49, **own)).to(device).eval()
    masked = maskgit.MaskGIT(maskgit.Config(vocab_size=26, grid='7x7', n_classes=10, **own)).to(device).eval()
    with sample.exact(dict(dtype='auto'), device):
        for batch in (1, 64):
            start = torch.zeros(batch, 1, dtype=torch.long, device=device)
            hidden = torch.full((batch, 49), -1, device=device)
            slow = median_seconds(lambda: gpt.generate(start, 49), device, settings['repeats'])
            report(f'pictures, batch {batch}, GPT, 49 steps, KV cache', slow, batch * 49, slow / (batch * 49))
            for steps in (1, 4, 8, 16):
                fast = median_seconds(lambda: masked.generate(hidden, start[:, 0], steps), device, settings['repeats'])
                report(f'pictures, batch {batch}, MaskGIT, {steps} steps', fast, batch * 49, slow / (batch * 49))


def peak_memory(device):
    """GiB, of this process so far."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def in_a_process(work, *arguments):
    """What work(*arguments, queue) puts into the queue, in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=work, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def gradient_of_head(chunked, settings, device, queue):
    """Loss, seconds and peak memory in GiB of a large head's forward and backward pass, in a process of its own."""
    torch.manual_seed(0)
    device, V = torch.device(device), settings['vocab_size']
    x = torch.randn(settings['rows'], settings['n_embd'], device=device, requires_grad=True)
    head = torch.randn(V, settings['n_embd'], device=device, requires_grad=True)
    targets = torch.randint(V, (settings['rows'],), device=device)
    before = peak_memory(device)

    def step():
        x.grad = head.grad = None
        loss = cross_entropy(x, head, targets, most=2 ** 24 if chunked else settings['rows'] * V).mean()
        loss.backward()
        return loss
    took = median_seconds(step, device, 3)
    queue.put((step().item(), took, peak_memory(device) - before))


def bench_cross_entropy(settings, device):
    """Forward and backward pass of a head with a large vocabulary, in float32."""
    losses, against = [], 0
    for chunked in (False, True):
        loss, seconds, gib = in_a_process(gradient_of_head, chunked, settings, str(device))
        losses.append(loss)
        against = against or seconds / settings['rows']
        report(f'head of {settings["vocab_size"]:,}, {"in chunks" if chunked else "at once"}: {gib:.2f} GiB', seconds,
               settings['rows'], against)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]


class Padded(nn.Module):
    """The slow way: a FourM's own blocks and places, but masks hide slots that are empty, and one table of 64,000 embeddings and
    one head of 64,000 serve all codes: all logits at once, for empty targets too."""
    def __init__(self, model, vocabulary, D):
        super().__init__()
        self.N, self.turns = model.N, model.turns
        self.encoder, self.decoder = model.encoder, model.decoder
        self.place_embedding, self.query_embedding = model.place_embedding, model.query_embedding
        self.embedding, self.head = nn.Embedding(vocabulary, D), nn.Linear(D, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch):
        inputs, targets = batch['input_index'], batch['target_index']  # (B, K) and (B, M), N where empty
        mask = (inputs < self.N)[:, None, None]  # (B, 1, 1, K)
        turn, context_turn = self.turns(targets), self.turns(inputs)
        x = norm(self.embedding(batch['input_ids']) + self.place_embedding(inputs))
        for block in self.encoder:
            x = x + block.attention(norm(x), context_turn, mask=mask)
            x = x + block.mlp(norm(x))
        context, x = norm(x) + self.place_embedding(inputs), norm(self.query_embedding(targets))
        for block in self.decoder:
            x = x + block.cross(norm(x), turn, context, context_turn, mask=mask)
            x = x + block.mlp(norm(x))
        logits = self.head(norm(x)).float()  # (B, M, 64000)
        return F.cross_entropy(logits.flatten(0, 1), batch['target_ids'].flatten(), ignore_index=-1), {}


def step_of_nano4m(plain, empty, settings, device, queue):
    """Loss, seconds and peak memory in GiB of a step of config/nano4m_multiclevr.py on 64 real inputs and 64 real targets of each
    sample, the plain way with `empty` more slots for both. AdamW alone: Muon takes the same time in all, most of it where
    samples are few."""
    torch.manual_seed(0)
    train.set_up(torch.device(device))
    device, names, B = torch.device(device), ('rgb', 'depth', 'normal'), settings['samples']
    before = peak_memory(device)
    modalities = ' '.join(f'{name}:5*5*5*8*8*8:16x16' for name in names)
    model = fourm.FourM(fourm.Config(modalities, n_layer_encoder=6, n_layer_decoder=6, n_head=8, n_embd=512, empty=0.0,
                                     input_slots='64', target_slots='64', whole=0.0))
    ids = {name: torch.randint(64000, (B, 256)) for name in names}
    batch = model.draw(ids, torch.Generator().manual_seed(0), torch.Generator())
    assert (batch['input_index'] < model.N).all() and (batch['target_index'] < model.N).all()  # 64 + 64 real ones
    if plain:
        batch['target_ids'] = torch.cat([ids[name] for name in names], 1).gather(1, batch['target_index'])
        nothing = dict(input_ids=0, input_index=model.N, target_index=model.N, target_ids=-1)
        batch = {name: F.pad(batch[name], (0, empty), value=value) for name, value in nothing.items()}
        model = Padded(model, 64000, 512)
    model, batch = model.to(device), train.to_device(batch, device)
    options = train.SETTINGS | dict(muon=False)
    optimizers, dtype = train.make_optimizers(model, options), train.find_dtype('auto', device)

    def step():
        with train.autocast(device, dtype):
            loss = model(batch)[0]
        loss.backward()
        train.update(optimizers, options, 0)
        return loss
    first = step().item()
    queue.put((first, median_seconds(step, device, settings['repeats']), peak_memory(device) - before))


def bench_padding(settings, device):
    """A training step of the course's nano4M at its size, the same real tokens in all; padded as its batches are, half empty."""
    against, losses, targets = 0, [], 64 * settings['samples']
    for name, plain, empty in (('half empty, all logits', True, 64), ('all logits', True, 0), ('as in chapter 3', False, 0)):
        loss, seconds, gib = in_a_process(step_of_nano4m, plain, empty, settings, str(device))
        losses.append(loss)
        against = against or seconds / targets
        report(f'nano4M, {name}: {gib:.2f} GiB', seconds, targets, against)
    assert max(losses) - min(losses) < 1e-3  # ln 64,000


@torch.no_grad()
def bench_answers(settings, device):
    """The model of config/vlm_scenes.py, 8 questions of 10 tokens about each of 4 pictures, answers of two tokens."""
    model, picture = VLM(VLMConfig(vocab_size=341, image_token=340, block_size=128)).to(device).eval(), 340
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    images, questions = (torch.randint(256, shape, device=device) for shape in ((4, 1, 64, 64, 3), (32, 10)))

    def fast():
        return model.generate(questions, model.read(questions.new_full((4, 1), picture), images, 8), 2)

    def slow():
        tokens = torch.cat((questions.new_full((32, model.P), picture), questions), 1)
        for _ in range(2):
            x = model.trunk(tokens, model.look(images.repeat_interleave(8, 0)))
            tokens = torch.cat((tokens, model.language.logits(x[:, -1])[:, :picture].argmax(-1, keepdim=True)), 1)
        return tokens[:, -2:]
    assert torch.equal(fast(), slow())
    seconds = median_seconds(slow, device, settings['repeats'])
    report('32 answers, all anew for each token', seconds, 32, seconds / 32, 'answers')
    took = median_seconds(fast, device, settings['repeats'])
    report('32 answers, one look a picture and a cache', took, 32, seconds / 32, 'answers')


def bench_speculation(settings, device):
    """A text of a trained run with the guesses of a draft and without, in turns; at temperature 0 the tokens must be the same."""
    train.set_up(device, training=False)
    model, draft = (train.load_model(train.find_weights(settings[name]))[0].to(device) for name in ('run', 'draft'))
    start, n, times, texts = torch.zeros(1, 1, dtype=torch.long, device=device), settings['max_new_tokens'], {}, {}
    for seed in range(settings['repeats']):
        for ahead in (0, 2, 4, 6):
            law = dict(temperature=settings['temperature'], generator=torch.Generator(device).manual_seed(seed))
            stream = model.speculate(draft, start, n, **law, ahead=ahead) if ahead else model.stream(start, n, **law)
            begin = time.perf_counter()
            texts[ahead] = torch.cat(list(stream)).tolist()
            times.setdefault(ahead, []).append(time.perf_counter() - begin)
        assert settings['temperature'] or len(set(map(tuple, texts.values()))) == 1
    against = statistics.median(times[0]) / n
    for ahead, took in times.items():
        report(f'generation, {ahead} guesses a pass' if ahead else 'generation, without a draft', statistics.median(took), n, against)


PARTS = dict(training=bench_training, generation=bench_generation, unmasking=bench_unmasking, cross_entropy=bench_cross_entropy,
             padding=bench_padding, answers=bench_answers, speculation=bench_speculation)


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if settings['part'] not in ('all', *PARTS):
        raise UserError(f'part={settings["part"]!r}: choose all or one of {", ".join(PARTS)}')
    device = train.find_device(settings['device'])
    train.set_up(device)
    for dtype in (torch.float32, torch.bfloat16):
        print(f'matmul in {str(dtype)[6:]}: {train.matmul_rate(device, dtype) / 1e9:,.0f} GFLOP/s')
    for name, part in PARTS.items():
        if settings['part'] == name or settings['part'] == 'all' and name != 'speculation':
            part(settings, device)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
