"""Everything on a device that is not the CPU, by the pretended one: no tensors of two devices meet, and the host hardly waits."""
import math
import signal
from pathlib import Path

import pytest
import torch

import bench
import flow
import fourm
import gpt
import maskgit
import sample
import train
import vlm
from tests import faults, pretend

THERE = torch.device('meta')


def test_the_pretended_device():
    with pretend.device() as waits:
        a, b = torch.randn(3, 4, device=THERE), torch.nn.Linear(4, 5).to(THERE)
        loss = b(a).square().mean()
        loss.backward()
        assert b.weight.grad.device == THERE and not waits
        assert loss.item() > 0 and sum(waits.values()) == 1
        with pytest.raises(RuntimeError, match='tensors of two devices'):
            a + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match='generator is on another device'):
            torch.rand(3, device=THERE, generator=torch.Generator())
        with pytest.raises(RuntimeError, match='generator is on another device'):
            torch.rand(3, generator=torch.Generator(THERE).manual_seed(0))
    torch.testing.assert_close(b.weight.grad.inner, torch.autograd.grad(
        torch.nn.functional.linear(a.inner, b.weight.inner.requires_grad_(), b.bias.inner).square().mean(), b.weight.inner)[0])


@pytest.mark.parametrize('chapter', faults.CASES)
def test_training_waits_once_a_step(chapter, tmp_path, monkeypatch):
    """For the gradient's norm: two steps more, two waits more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'matmul_rate', lambda *_: 1e9)
    faults.make_data(chapter, faults.CASES[chapter][0])
    settings = faults.RUN | faults.CASES[chapter][1] | dict(model=chapter, dataset=chapter, device='meta', ema=0.9, log_interval=9)
    found = []
    for steps in (2, 4):
        with pretend.device() as waits:
            train.main(**(settings | dict(max_iters=steps, eval_interval=steps, out_dir=f'out/{steps}')))
        found.append(waits)
    assert sum((found[1] - found[0]).values()) == 2, found[1] - found[0]
    assert train.read_checkpoint(Path('out/4/ckpt_last.pt'))['step'] == 4


SMALL = dict(n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs without a GPU. Gives how often one was played."""
    replays = []

    def record(*arguments, **settings):
        now, replay, later = pretend.record(*arguments, **settings)
        return now, lambda: replays.append(replay()), later
    for where, name, value in ((gpt, 'GRAPHS', 'cpu'), (gpt, 'record', record), (torch.cuda, 'graph_pool_handle', lambda: None),
                               (torch.cuda, 'empty_cache', lambda: None)):
        monkeypatch.setattr(where, name, value)
    return replays


@pytest.mark.parametrize('chapter', faults.CASES)
def test_training_by_graphs(chapter, tmp_path, monkeypatch, graphs):
    """The same weights but for rounding, while rates rise and fall; and when a run goes on without them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'find_dtype', lambda name, device: torch.float32)  # Muon in bfloat16 would make roundings larger
    faults.make_data(chapter, faults.CASES[chapter][0])
    settings = faults.RUN | faults.CASES[chapter][1] | dict(model=chapter, dataset=chapter, max_iters=16, ema=0.9)
    train.main(**settings, out_dir='out/plain')
    train.main(**settings, out_dir='out/graphs', graphs=True)
    assert len(graphs) > 10
    set_rates = train.set_rates

    def stop(optimizers, settings, step):
        set_rates(optimizers, settings, step)
        if step == 8:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train, 'set_rates', stop)
    assert 'stopped' in train.main(**settings, out_dir='out/both', graphs=True)
    monkeypatch.setattr(train, 'set_rates', set_rates)
    train.main(**settings, out_dir='out/both')
    plain, *others = (train.read_checkpoint(Path(f'out/{name}/ckpt_last.pt')) for name in ('plain', 'graphs', 'both'))
    for other in others:
        assert other['tokens'] == plain['tokens']
        for part in ('weights', 'ema'):
            for name, weight in plain[part].items():
                torch.testing.assert_close(other[part][name], weight, rtol=1e-3, atol=1e-3)


def test_graphs_see_each_batch(graphs):
    """A set of shapes is recorded when it comes the third time; sums are those of each batch, whatever the order of shapes."""
    total = torch.zeros(1)

    def run(batch):
        total.add_(batch['a'].sum())
        return batch['a'].max()
    recorded, expected = train.Graphs(run), 0.0
    for i, n in enumerate((2, 3, 2, 2, 3, 2, 3, 2, 3)):
        batch = dict(a=torch.arange(n) + float(i))
        expected += batch['a'].sum()
        assert recorded(batch) == batch['a'].max() and total == expected
    assert len(graphs) == 3 and len(recorded.graphs) == 2
    full = train.Graphs(run, most=0)
    assert [float(full(dict(a=torch.ones(2)))) for _ in range(5)] == [1.0] * 5 and len(graphs) == 3


@pytest.mark.parametrize('shift', (True, False))
def test_generation_by_graphs(shift, graphs, monkeypatch):
    """The same tokens as one pass after the other, with prompts of different lengths, past the place up to which the first graph
    reaches, and past the context; in chapter 5 over two turns."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(vocab_size=50, block_size=300, n_kv_head=1, token_shift=shift, **SMALL)).eval()
    eyes = vlm.VLM(vlm.Config(vocab_size=9, image_token=8, image_size=16, block_size=40, eyes_layer=1, eyes_head=2, eyes_embd=16,
                              token_shift=shift, **SMALL)).eval()
    for parameter in (*model.parameters(), *eyes.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)

    def texts():
        for prompt, n in (([[1, 2]], 320), ([[-1, -1, 3], [4, 5, 6]], 40)):
            generator = torch.Generator().manual_seed(1)
            yield model.generate(torch.tensor(prompt), n, end=7 if len(prompt) > 1 else -1, generator=generator)
        images = torch.arange(2 * 16 * 16 * 3).view(2, 1, 16, 16, 3) % 256
        cache = eyes.read(torch.full((2, 1), 8), images, 2)
        yield eyes.generate(torch.tensor([[1, 2, 3], [-1, -1, 4]]).repeat(2, 1), cache, 9)
        yield eyes.generate(torch.tensor([[5, 6]]).expand(4, -1), cache, 9)
    found = list(texts())
    assert len(graphs) > 300
    monkeypatch.setattr(gpt, 'GRAPHS', 'none')
    assert all(torch.equal(*pair) for pair in zip(found, texts(), strict=True))


def test_generation():
    with pretend.device():
        def there(model):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            return model.to(THERE).eval(), torch.Generator(THERE).manual_seed(0)
        model, generator = there(gpt.GPT(gpt.Config(vocab_size=9, block_size=16, **SMALL)))
        tokens = torch.tensor([[1, 2, 3], [-1, -1, 4]], device=THERE)
        assert model.generate(tokens, 20, 0.8, 5, 0.9, 0.01, 8, generator).device == THERE
        assert len(list(model.speculate(model, tokens[:1], 9, generator=generator))) == 9
        model.log_prob(tokens)

        model, generator = there(maskgit.MaskGIT(maskgit.Config(vocab_size=9, grid='3x3', n_classes=2, **SMALL)))
        hidden, classes = torch.full((2, 9), -1, device=THERE), torch.tensor([0, 1], device=THERE)
        for order in maskgit.ORDERS:
            model.generate(hidden, classes, 4, order=order, guidance=2.0, choice_temperature=1.0, generator=generator)
        model.log_prob_bound(hidden.clamp(min=0), classes, 2)

        model, generator = there(fourm.FourM(fourm.Config('a:4*4:3x3 b:9:6', n_layer_encoder=1, n_layer_decoder=1, n_head=2,
                                                          n_embd=16)))
        known = model.generate({'a': hidden.clamp(min=0)}, ['b'], generator=generator)
        known = model.generate(known, ['a'], 4, order='halton', guidance=2.0, weights=dict(b=2.0), generator=generator)
        model.log_prob(model.ask(known, 'b'), 'b', torch.zeros(2, 6, dtype=torch.long)), model.embed(known)

        model, generator = there(flow.Flow(flow.Config(image_size=4, patch=2, n_classes=2, **SMALL)))
        for method in ('euler', 'midpoint', 'heun'):
            trajectory, _ = model.generate(classes, 2, method, 2.0, (0.2, 0.8), generator)
        model.log_prob(trajectory[-1], classes, flow.random_probes(trajectory[-1], 1, torch.Generator()), 0.1)

        model, generator = there(vlm.VLM(vlm.Config(vocab_size=9, image_token=8, image_size=16, block_size=16, eyes_layer=1,
                                                    eyes_head=2, eyes_embd=16, **SMALL)))
        images = torch.zeros(2, 1, 16, 16, 3, device=THERE)
        cache = model.read(torch.full((2, 1), 8, device=THERE), images, 2)
        assert model.generate(tokens.repeat(2, 1), cache, 3, 1.0, generator=generator).shape == (4, 3)


def test_bench(monkeypatch):
    """The core, and the comparisons that are small enough."""
    monkeypatch.setattr(bench, 'peak_bytes', lambda run, device: run() and 1)
    monkeypatch.setattr(sample, 'compile_blocks', lambda model, device: False)  # there is no compiler for this device
    limits, small = {torch.float32: 1e11, 'copy': 1e10}, dict(max_new_tokens=4, copy=1e10, vocab_size=50, rows=8, samples=1, n_layer=1, n_embd=32)
    with pretend.device():
        for name in ('generation', 'cross_entropy', 'answers'):
            bench.PARTS[name](bench.SETTINGS | bench.SIZES | small | dict(repeats=1), THERE)
        for kind in ('causal', 'full', 'cross', 'prefill', 'decode'):
            case = kind, 1, 1 if kind == 'decode' else 8, 8, 2, 16
            ways = bench.find_ways('', torch.device('cpu'))
            assert math.isfinite(bench.measure_core(kind, case, ways, THERE, torch.float32, limits, 1)['ms'])
