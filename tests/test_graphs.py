"""CUDA graphs, recorded and replayed on a CPU: training and decoding give the same results as without."""
import contextlib
import copy
import pickle
import signal
from pathlib import Path

import pytest
import torch

import flow
import gpt
import train
import vlm
from engine import checkpoints, devices, graphs, optimizers
from tests import faults, pretend

SMALL = dict(n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def replays(monkeypatch):
    """CUDA graphs without a GPU. Yields a list with one entry per replay."""
    replays = []

    def capture(*arguments, **settings):
        now, replay, later = pretend.capture_cuda_graph(*arguments, **settings)
        return now, lambda: replays.append(replay()), later
    for where, name, value in ((graphs, 'DEVICE', 'cpu'), (graphs, 'capture_cuda_graph', capture),
                               (torch.cuda, 'graph_pool_handle', lambda: None),
                               (torch.cuda, 'empty_cache', lambda: None)):
        monkeypatch.setattr(where, name, value)
    return replays


@pytest.mark.parametrize('chapter', faults.CASES)
def test_training_by_graphs(chapter, tmp_path, monkeypatch, replays):
    """The same weights up to rounding, with warm-up and decay of learning rates; also if a run continues without."""
    monkeypatch.chdir(tmp_path)
    # Muon in bfloat16 would make rounding differences larger
    monkeypatch.setattr(devices, 'find_dtype', lambda name, device: torch.float32)
    faults.make_data(chapter, faults.CASES[chapter][0])
    settings = faults.RUN | faults.CASES[chapter][1] | dict(model=chapter, dataset=chapter, max_iters=16, ema=0.9)
    train.main(**settings, out_dir='out/plain')
    train.main(**settings, out_dir='out/graphs', graphs=True)
    assert len(replays) > 10
    set_lr = optimizers.set_lr

    def stop(opts, settings, step):
        set_lr(opts, settings, step)
        if step == 8:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(optimizers, 'set_lr', stop)
    assert 'stopped' in train.main(**settings, out_dir='out/both', graphs=True)
    monkeypatch.setattr(optimizers, 'set_lr', set_lr)
    train.main(**settings, out_dir='out/both')
    plain, *others = (checkpoints.read(Path(f'out/{name}/ckpt_last.pt')) for name in ('plain', 'graphs', 'both'))
    for other in others:
        assert other['tokens'] == plain['tokens']
        for part in ('weights', 'ema'):
            for name, weight in plain[part].items():
                torch.testing.assert_close(other[part][name], weight, rtol=1e-3, atol=1e-3)


def test_graphs_see_each_batch(replays):
    """A combination of shapes is captured at its third occurrence; results are those of each batch, in any order of
    shapes."""
    total = torch.zeros(1)

    def run(batch):
        total.add_(batch['a'].sum())
        return batch['a'].max()
    recorded, expected = graphs.GraphedSteps(run), 0.0
    for i, n in enumerate((2, 3, 2, 2, 3, 2, 3, 2, 3)):
        batch = dict(a=torch.arange(n) + float(i))
        expected += batch['a'].sum()
        assert recorded(batch) == batch['a'].max() and total == expected
    assert len(replays) == 3 and len(recorded.graphs) == 2
    full = graphs.GraphedSteps(run, max_graphs=0)
    assert [float(full(dict(a=torch.ones(2)))) for _ in range(5)] == [1.0] * 5 and len(replays) == 3


def random_model(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_vlm(**changes):
    config = dict(vocab_size=9, image_token=8, image_size=16, block_size=40, vision_layer=1, vision_head=2,
                  vision_embd=16)
    return random_model(vlm.VLM(vlm.Config(**(SMALL | config | changes))))


@pytest.mark.parametrize('shift', (True, False))
def test_generation_by_graphs(shift, replays):
    """The same tokens as without graphs, with prompts of different lengths, beyond the positions of the first graph,
    and beyond the context."""
    model = random_model(gpt.GPT(gpt.Config(vocab_size=50, block_size=300, n_kv_head=1, token_shift=shift, **SMALL)))

    def texts():
        for prompt, n in (([[1, 2]], 320), ([[-1, -1, 3], [4, 5, 6]], 40)):
            generator = torch.Generator().manual_seed(1)
            yield model.generate(torch.tensor(prompt), n, eos_id=7 if len(prompt) > 1 else -1, generator=generator)
    plain = list(texts())
    for _ in range(2):  # a second call changes nothing
        graphs.graph_decoding(model)
    assert not replays and all(torch.equal(*pair) for pair in zip(plain, texts(), strict=True)) and len(replays) > 300


@pytest.mark.parametrize('shift', (True, False))
def test_a_graph_is_captured_again_when_its_cache_is_reallocated(shift, replays):
    """Turns of a chat: prompts of one token and of several; the cache grows while a graph is in use, or not."""
    model = make_vlm(token_shift=shift, block_size=200)
    images = torch.arange(2 * 16 * 16 * 3).view(2, 1, 16, 16, 3) % 256

    def chat():
        cache = model.prefill(torch.full((2, 1), 8), images, 2)
        for turn, n in (([[1, 2, 3], [-1, -1, 4]], 9), ([[5], [6]], 41), ([[5], [6]], 19), ([[-1, 7], [6, 5]], 20),
                        ([[3], [2]], 99)):
            yield model.generate(torch.tensor(turn).repeat(2, 1), cache, n)
        cache.repeat_batch(2)
        yield model.generate(torch.tensor([[4]]).expand(8, 1), cache, 5)
    plain = list(chat())
    graphs.graph_decoding(model)
    found = list(chat())
    assert all(torch.equal(*pair) for pair in zip(plain, found, strict=True)) and len(replays) > 150


def test_two_streams_at_once_have_their_own_graphs(replays):
    model = random_model(gpt.GPT(gpt.Config(vocab_size=50, block_size=64, **SMALL)))
    prompts = [torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])]
    plain = [list(model.stream(prompt, 20, temperature=0)) for prompt in prompts]
    graphs.graph_decoding(model)
    both = zip(*(model.stream(prompt, 20, temperature=0) for prompt in prompts))
    assert [list(new) for new in zip(*both)] == plain and len(replays) > 20


def test_unwritten_positions_are_not_read(replays, monkeypatch):
    class Dirty(gpt.KVCache):
        def update(self, layer, k, v):
            i, new = layer.layer_idx, layer.layer_idx == len(self.kv)
            kv = super().update(layer, k, v)
            if new:
                self.kv[i][:, :, :, self.cur_len + k.size(2):] = torch.nan
            return kv
    model, prompt = random_model(gpt.GPT(gpt.Config(vocab_size=50, block_size=64, **SMALL))), torch.tensor([[1, 2, 3]])
    plain = model.generate(prompt, 20, temperature=0)
    graphs.graph_decoding(model)
    monkeypatch.setattr(gpt, 'KVCache', Dirty)
    assert torch.equal(model.generate(prompt, 20, temperature=0), plain) and replays


def test_other_models_are_unchanged(monkeypatch):
    class Mine(torch.nn.Module):
        def step(self, x):
            return x
    class Wrapped(torch.nn.Module):  # a GPT, but no step
        def __init__(self):
            super().__init__()
            self.gpt = gpt.GPT(gpt.Config(**SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(graphs, 'DEVICE', 'cpu')
        for model in (Mine(), Wrapped(), flow.Flow(flow.Config(image_size=4, patch_size=2, **SMALL))):
            graphs.graph_decoding(model)
            assert 'step' not in vars(model)
    graphs.graph_decoding(on_cpu := gpt.GPT(gpt.Config(**SMALL)))
    assert 'step' not in vars(on_cpu)


@pytest.mark.parametrize('make', [lambda: random_model(gpt.GPT(gpt.Config(vocab_size=50, block_size=64, **SMALL))), make_vlm])
def test_a_copy_generates_with_its_own_weights(replays, make):
    model = make()
    graphs.graph_decoding(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.step.__self__ is copied
        with torch.no_grad():
            cache = gpt.KVCache(64)
            model.step(torch.tensor([[1]]), cache), model.step(torch.tensor([[2]]), cache)
            for parameter in copied.parameters():
                parameter.zero_()
            assert not copied.step(torch.tensor([[3]]), cache)[0, :8].any()  # on the original's cache, too
            assert model.step(torch.tensor([[3]]), cache)[0, :8].any()


def test_training_by_graphs_needs_one_gpu(monkeypatch, capsys):
    assert not graphs.possible(torch.device('cpu'), 1) and capsys.readouterr().out.count('going on without') == 1
    monkeypatch.setattr(graphs, 'DEVICE', 'cpu')
    assert graphs.possible(torch.device('cpu'), 1) and not graphs.possible(torch.device('cpu'), 2)


def test_the_compiled_cross_entropy_is_restored(monkeypatch):
    plain, blocks = gpt.token_nll, []
    monkeypatch.setattr(torch, 'compile', lambda function, **_: lambda *arguments: function(*arguments))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module, **_: blocks.append(module))
    monkeypatch.setattr(graphs, 'DEVICE', 'cpu')
    with contextlib.ExitStack() as stack:
        assert graphs.compile_blocks(make_vlm(), torch.device('cpu'), stack)
        assert gpt.token_nll is not plain and [type(block).__name__ for block in blocks] == ['Block', 'Block']
    assert gpt.token_nll is plain
