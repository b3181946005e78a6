"""
Fast paths beside the slow ways that compute the same: seconds, memory, and whether both agree.

    python -m tests.comparisons --part=generation      a KV cache against the whole context for every token
    python -m tests.comparisons --part=unmasking       images of 49 tokens: MaskGIT in few steps against a GPT with a cache
    python -m tests.comparisons --part=cross_entropy   the head of a large vocabulary: logits at once, in chunks, PyTorch's own
    python -m tests.comparisons --part=padding         nano4M against padded slots, masks and one head for all codes
    python -m tests.comparisons --part=answers         32 questions about 4 images, each encoded once, against once a token
    python -m tests.comparisons --part=speculation --run=gpt_shakespeare --draft=gpt_draft

Times are medians. The last column is the speed relative to the first row.
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import fourm
import lab
import maskgit
import vlm
from config import UserError
from engine import batches, checkpoints, devices, graphs, optimizers
from gpt import GPT, Config, chunked_cross_entropy, rms_norm
from lab.speculate import generate_speculative
from lab.speed import bytes_of_weights
from lab.timing import find_peaks, peak_bytes, timed

SETTINGS = dict(
    part='generation',        # generation, unmasking, cross_entropy, padding, answers, speculation
    device='auto',            # cuda, mps or cpu
    n_layer=6, n_head=4,      # generation, unmasking
    n_embd=256,               # generation, unmasking, cross_entropy
    n_kv_head=0,              # generation: fewer heads of keys and values make the cache smaller; 0 is n_head
    max_new_tokens=1000,      # generation, speculation: in a context of 1,024
    vocab_size=65536,         # cross_entropy
    rows=4096,                # cross_entropy
    samples=8,                # padding: in a step of nano4M
    run='gpt_shakespeare',    # speculation: a trained GPT
    draft='gpt_draft',        # speculation: a small one
    temperature=0.8,          # speculation
    repeats=5,                # speculation: texts, each with its own seed
)


def report(name, seconds, n, first, unit='tokens'):
    """Prints a row: n units took so many seconds; `first` is the seconds a unit of the first row."""
    print(f'{name:48}{seconds:10.3f} s{n / seconds:12,.0f} {unit}/s{first / seconds * n:8.2f} x', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 1

@torch.no_grad()
def uncached(model, tokens, n):
    """Greedy generation that computes the whole context for every token; without cuDNN, which compiles for each length."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for _ in range(n):
            tokens = torch.cat((tokens, model.logits(model.backbone(tokens)[:, -1:]).argmax(-1)), 1)
    return tokens


def compare_generation(settings, device):
    """max_new_tokens in a context of 1,024, as sample.py generates them."""
    own, n = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_kv_head')}, settings['max_new_tokens']
    if n > 1023:
        raise UserError(f'max_new_tokens={n}: the context of this benchmark holds 1,024, of which one is the prompt')
    model = GPT(Config(vocab_size=65, block_size=1024, **own)).to(device).eval()
    for parameter in model.parameters():  # zero-initialised outputs would make all tokens alike
        nn.init.normal_(parameter, std=0.05)
    graphs.graph_decoding(model)
    copy_rate, start = find_peaks(device)['copy'], torch.zeros(1, 1, dtype=torch.long, device=device)
    with lab.exact(device):
        begin = time.perf_counter()
        slow = uncached(model, start, n)
        devices.synchronize(device)
        seconds = time.perf_counter() - begin
        report('generation, batch 1, without a cache', seconds, n, seconds / n)
        fast = model.generate(start, n, temperature=0)
        print(f'the same tokens: the first {(slow == fast)[0, 1:].long().cumprod(0).sum():,}')
        for compiled in ('', ', compiled'):
            if compiled and not lab.compile_passes(model):
                break
            for batch in (1, 8, 32):
                took = timed(lambda: model.generate(start.repeat(batch, 1), n, temperature=0), 0.1).median
                report(f'generation, batch {batch}, KV cache{compiled}', took, batch * n, seconds / n)
                print(f'    weights are read at {n * bytes_of_weights(model) / took / copy_rate:.1%} of the rate of a copy')


def ways_of_cross_entropy(settings, dtype):
    """{name: a function (x, head, targets) -> sum of the losses}."""
    def own(x, head, targets, options):
        """Autocast does not reach this kernel; it computes the gradients in the forward pass."""
        return F.linear_cross_entropy(x.to(dtype), head.to(dtype), targets, reduction='sum', options=options).float()
    rows = max(1, 2 ** 24 // settings['vocab_size'])
    ways = {'at once': lambda *batch: chunked_cross_entropy(*batch, max_logits=settings['rows'] * settings['vocab_size']).sum(),
            'in chunks of 2^24 logits (chapter 1)': lambda *batch: chunked_cross_entropy(*batch, max_logits=2 ** 24).sum()}
    if hasattr(F, 'linear_cross_entropy'):  # PyTorch 2.13
        Options = nn.LinearCrossEntropyOptions
        ways['linear_cross_entropy, its own chunks'] = lambda *batch: own(*batch, Options())
        ways['linear_cross_entropy, chunks of 2^24'] = lambda *batch: own(*batch, Options(batch_chunk_size=rows))
    return ways


def compare_cross_entropy(settings, device):
    """Forward and backward pass of a head with a large vocabulary, in float32 and in the dtype of training; relative errors
    of the loss and of the gradients of x and head against the first way, all logits at once in float32."""
    torch.manual_seed(0)
    V, D, R = settings['vocab_size'], settings['n_embd'], settings['rows']
    x, head = torch.randn(R, D, device=device), torch.randn(V, D, device=device) * D ** -0.5
    x.requires_grad_(), head.requires_grad_()
    targets, expected, first = torch.randint(V, (R,), device=device), None, None
    for dtype in dict.fromkeys((torch.float32, devices.find_dtype('auto', device))):
        for name, way in ways_of_cross_entropy(settings, dtype).items():
            def step():
                x.grad = head.grad = None
                with devices.autocast(device, dtype):
                    loss = way(x, head, targets) / R
                loss.backward()
                return loss.detach(), x.grad, head.grad
            found = [value.clone() for value in step()]
            expected = expected or found
            apart = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]
            seconds, gib = timed(step).median, peak_bytes(step, device) / 2 ** 30
            first = first or seconds / R
            report(f'{name}, {str(dtype)[6:]}', seconds, R, first)
            print(f'    {gib:.2f} GiB; apart by {", ".join(f"{value:.1e}" for value in apart)}')
            assert max(apart) < (1e-4 if dtype == torch.float32 else 0.1)


def compare_speculation(settings, device):
    """Texts of a trained run with a draft's tokens and without, in turns; at temperature 0 the tokens must be the same."""
    model, draft = (checkpoints.load_model(checkpoints.find(settings[name]))[0].to(device) for name in ('run', 'draft'))
    start, n, times, texts = torch.zeros(1, 1, dtype=torch.long, device=device), settings['max_new_tokens'], {}, {}
    for seed in range(settings['repeats']):
        for n_draft in (0, 2, 4, 6):
            sampling = dict(temperature=settings['temperature'], generator=torch.Generator(device).manual_seed(seed))
            begin = time.perf_counter()
            if n_draft:
                texts[n_draft] = list(generate_speculative(model, draft, start, n, n_draft=n_draft, **sampling))
            else:
                texts[n_draft] = list(model.stream(start, n, **sampling))
            devices.synchronize(device)
            times.setdefault(n_draft, []).append(time.perf_counter() - begin)
        assert settings['temperature'] or len({tuple(map(int, text)) for text in texts.values()}) == 1
    first = statistics.median(times[0]) / n
    for n_draft, took in times.items():
        name = f'{n_draft} draft tokens a pass' if n_draft else 'without a draft'
        report(f'generation, {name}', statistics.median(took), n, first)


# ---------------------------------------------------------------------------------------------------------------------
# Chapters 2 and 5

def compare_unmasking(settings, device):
    """Images of 7x7 tokens, one and 64 at once. A GPT takes 49 steps and computes each token once; MaskGIT takes 8 steps and
    computes all tokens in each: 8 times the work in a sixth of the steps."""
    own = {name: settings[name] for name in ('n_layer', 'n_head', 'n_embd')}
    model = GPT(Config(vocab_size=26, block_size=49, **own)).to(device).eval()
    graphs.graph_decoding(model)
    masked = maskgit.MaskGIT(maskgit.Config(vocab_size=26, grid='7x7', n_classes=10, **own)).to(device).eval()
    with lab.exact(device):
        for batch in (1, 64):
            start = torch.zeros(batch, 1, dtype=torch.long, device=device)
            hidden = torch.full((batch, 49), -1, device=device)
            slow = timed(lambda: model.generate(start, 49)).median
            report(f'images, batch {batch}, GPT, 49 steps, KV cache', slow, batch * 49, slow / (batch * 49))
            for steps in (1, 4, 8, 16):
                fast = timed(lambda: masked.generate(hidden, start[:, 0], steps)).median
                report(f'images, batch {batch}, MaskGIT, {steps} steps', fast, batch * 49, slow / (batch * 49))


@torch.no_grad()
def compare_answers(settings, device):
    """The model of config/vlm_scenes.py, 8 questions of 10 tokens about each of 4 images, answers of two tokens."""
    model, image = vlm.VLM(vlm.Config(vocab_size=341, image_token=340, block_size=128)).to(device).eval(), 340
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    images, questions = (torch.randint(256, shape, device=device) for shape in ((4, 1, 64, 64, 3), (32, 10)))

    def fast():
        return model.generate(questions, model.prefill(questions.new_full((4, 1), image), images, 8), 2)

    def slow():
        tokens = torch.cat((questions.new_full((32, model.tokens_per_image), image), questions), 1)
        for _ in range(2):
            x = model.backbone(tokens, model.encode_images(images.repeat_interleave(8, 0)))
            tokens = torch.cat((tokens, model.language_model.logits(x[:, -1])[:, :image].argmax(-1, keepdim=True)), 1)
        return tokens[:, -2:]
    assert torch.equal(fast(), slow())
    seconds = timed(slow).median
    report('32 answers, all again for each token', seconds, 32, seconds / 32, 'answers')
    report('32 answers, each image encoded once, a cache', timed(fast).median, 32, seconds / 32, 'answers')


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 3

class Padded(nn.Module):
    """The slow way: a FourM's own blocks and positions, but masks for empty slots, one table of embeddings and one head for the
    ids of all modalities, and all logits at once, for empty targets too."""
    def __init__(self, model, vocabulary, D):
        super().__init__()
        self.N, self.rope_at = model.N, model.rope_at
        self.encoder, self.decoder = model.encoder, model.decoder
        self.pos_embedding, self.query_embedding = model.pos_embedding, model.query_embedding
        self.embedding, self.head = nn.Embedding(vocabulary, D), nn.Linear(D, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch):
        inputs, targets = batch['input_position_ids'], batch['target_position_ids']  # (B, K) and (B, M), N if empty
        mask = (inputs < self.N)[:, None, None]  # (B, 1, 1, K)
        rope, context_rope = self.rope_at(targets), self.rope_at(inputs)
        x = rms_norm(self.embedding(batch['input_ids']) + self.pos_embedding(inputs))
        for block in self.encoder:
            x = x + block.attention(rms_norm(x), context_rope, mask=mask)
            x = x + block.mlp(rms_norm(x))
        context, x = rms_norm(x) + self.pos_embedding(inputs), rms_norm(self.query_embedding(targets))
        for block in self.decoder:
            x = x + block.cross(rms_norm(x), rope, context, context_rope, mask=mask)
            x = x + block.mlp(rms_norm(x))
        logits = self.head(rms_norm(x)).float()  # (B, M, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1), batch['target_ids'].flatten(), ignore_index=-1), {}


def nano4m(samples, padded, empty):
    """(model, batch) of config/nano4m_multiclevr.py on 64 real inputs and 64 real targets of each sample; the padded one with
    `empty` more slots of both."""
    torch.manual_seed(0)
    names = 'rgb', 'depth', 'normal'
    modalities = ' '.join(f'{name}:5*5*5*8*8*8:16x16' for name in names)
    model = fourm.FourM(fourm.Config(modalities, n_layer_encoder=6, n_layer_decoder=6, n_head=8, n_embd=512,
                                     num_input_tokens='64', num_target_tokens='64', full_modality_prob=0.0,
                                     unconditional_prob=0.0))
    ids = {name: torch.randint(64000, (samples, 256)) for name in names}
    batch = model.prepare_batch(ids, torch.Generator().manual_seed(0), torch.Generator())
    assert (batch['input_position_ids'] < model.N).all()  # 64 + 64 real tokens
    assert (batch['target_position_ids'] < model.N).all()
    if not padded:
        return model, batch
    batch['target_ids'] = torch.cat([ids[name] for name in names], 1).gather(1, batch['target_position_ids'])
    nothing = dict(input_ids=0, input_position_ids=model.N, target_position_ids=model.N, target_ids=-1)
    return Padded(model, 64000, 512), {name: F.pad(batch[name], (0, empty), value=value) for name, value in nothing.items()}


def compare_padding(settings, device):
    """A training step of the course's nano4M at its size, the same real tokens in all; padded as its batches are, half empty.
    AdamW alone: Muon takes the same time in all, most of it if samples are few."""
    devices.set_up(device)
    losses, first, targets = [], None, 64 * settings['samples']
    options, dtype = optimizers.FIT | dict(muon=False, lr_multipliers='', max_iters=1), devices.find_dtype('auto', device)
    for name, padded, empty in (('half empty, all logits', True, 64), ('all logits', True, 0), ('as in chapter 3', False, 0)):
        model, batch = nano4m(settings['samples'], padded, empty)
        model, batch = model.to(device), batches.to_device(batch, device)
        adamw = optimizers.make(model, options, dtype)

        def step():
            with devices.autocast(device, dtype):
                loss = model(batch)[0]
            loss.backward()
            optimizers.set_lr(adamw, options, 0)
            optimizers.optimizer_step(adamw)
            return loss
        losses.append(step().item())
        seconds, gib = timed(step, 5).median, peak_bytes(step, device) / 2 ** 30
        first = first or seconds / targets
        report(f'nano4M, {name}: {gib:.2f} GiB', seconds, targets, first)
    assert max(losses) - min(losses) < 1e-3  # ln 64,000


PARTS = dict(generation=compare_generation, unmasking=compare_unmasking, cross_entropy=compare_cross_entropy,
             padding=compare_padding, answers=compare_answers, speculation=compare_speculation)


def read(arguments, overrides=None):
    """The settings. Raises UserError."""
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if settings['part'] not in PARTS:
        raise UserError(f'part={settings["part"]!r}: choose one of {", ".join(PARTS)}')
    return settings


def main(*arguments, **overrides):
    settings = read(arguments, overrides)
    device = devices.find(settings['device'])
    devices.set_up(device, training=False)
    PARTS[settings['part']](settings, device)


if __name__ == '__main__':
    config.run(main)
