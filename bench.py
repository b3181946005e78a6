"""
What the parts of chapters 1 and 5 cost on this machine, each beside the plain way to do the same.

    python bench.py                           all of it, about five minutes on two CPU cores
    python bench.py --part=generation         training, generation, cross_entropy or answers

Training: a step of the GPT of config/gpt_shakespeare.py, float32 and eager against bfloat16 and compiled. Generation: with a KV
cache against running the whole context for every token, and by batch. Cross-entropy: a large vocabulary with all logits at once
against chunks of rows. Answers: 32 questions about four pictures, each looked at once, against all anew for
each token. Times are medians; both sides are checked to compute the same thing.
"""
import multiprocessing
import resource
import statistics
import sys
import time

import torch

import config
import sample
import train
from config import UserError
from gpt import GPT, Config, cross_entropy
from vlm import VLM
from vlm import Config as VLMConfig

SETTINGS = dict(
    part='all',               # training, generation, cross_entropy, answers
    device='auto',
    n_layer=6, n_head=4, n_embd=256,
    n_kv_head=0,              # fewer heads of keys and values make the cache smaller; 0 is n_head
    block_size=256,           # context of the training step
    batch_size=16,
    max_new_tokens=1000,      # generated in a context of 1,024
    vocab_size=65536,         # of the cross-entropy
    rows=4096,
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


def gradient_of_head(chunked, settings, device, queue):
    """Loss, seconds and peak memory in GiB of a large head's forward and backward pass, in a process of its own."""
    torch.manual_seed(0)
    device, V = torch.device(device), settings['vocab_size']
    x = torch.randn(settings['rows'], settings['n_embd'], device=device, requires_grad=True)
    head = torch.randn(V, settings['n_embd'], device=device, requires_grad=True)
    targets = torch.randint(V, (settings['rows'],), device=device)

    def memory():
        if device.type == 'cuda':
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = memory()

    def step():
        x.grad = head.grad = None
        loss = cross_entropy(x, head, targets, most=2 ** 24 if chunked else settings['rows'] * V).mean()
        loss.backward()
        return loss
    took = median_seconds(step, device, 3)
    queue.put((step().item(), took, (memory() - before) / 2 ** 30))


def bench_cross_entropy(settings, device):
    """Forward and backward pass of a head with a large vocabulary, in float32."""
    context, losses, against = multiprocessing.get_context('spawn'), [], 0
    for chunked in (False, True):
        queue = context.Queue()
        process = context.Process(target=gradient_of_head, args=(chunked, settings, str(device), queue))
        process.start()
        loss, seconds, gib = queue.get()
        process.join()
        losses.append(loss)
        against = against or seconds / settings['rows']
        report(f'head of {settings["vocab_size"]:,}, {"in chunks" if chunked else "at once"}: {gib:.2f} GiB', seconds,
               settings['rows'], against)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]


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


PARTS = dict(training=bench_training, generation=bench_generation, cross_entropy=bench_cross_entropy, answers=bench_answers)


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if settings['part'] not in ('all', *PARTS):
        raise UserError(f'part={settings["part"]!r}: choose all or one of {", ".join(PARTS)}')
    device = train.find_device(settings['device'])
    train.set_up(device)
    for dtype in (torch.float32, torch.bfloat16):
        print(f'matmul in {str(dtype)[6:]}: {train.matmul_rate(device, dtype) / 1e9:,.0f} GFLOP/s')
    for name, part in PARTS.items():
        if settings['part'] in ('all', name):
            part(settings, device)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
