"""
Fewer calls from Python: CUDA graphs for steps of training and of decoding, and torch.compile for a model's blocks.

On a GPU the host takes several times as long to call hundreds of small kernels as the GPU takes to run them. A CUDA graph is a
sequence of kernels that is captured once and then launched by one call, on the same memory. What is computed is the same.
"""
from collections import Counter
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

import gpt
from config import UserError
from engine.devices import is_block
from engine.processes import is_main

DEVICE = 'cuda'  # the type of device that has CUDA graphs; tests set another


def capture_cuda_graph(run, pool=None, device=None):
    """Runs run() and captures its kernels: (what it returns, replay, the tensors that replay() writes that into). Graphs
    that never run at the same time may share a memory pool."""
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a warm-up: what happens only the first time must not be captured
            result = run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool, capture_error_mode='thread_local'):  # other threads may use the GPU meanwhile
            static_result = run()  # nothing is computed, though Python's own effects do happen again
    return result, graph.replay, static_result


def possible(device, world):
    """Whether a run can use CUDA graphs: on a single GPU. If not, prints one line."""
    if device.type == DEVICE and world == 1:
        return True
    if is_main():
        print('graphs=True is for a run on a single GPU: going on without')
    return False


class GraphedSteps:
    """run(*batches) as CUDA graphs: one for each combination of shapes, captured when it comes the third time, at most
    max_graphs. What run changes, gradients or weights, has to keep its address. Raises UserError."""
    def __init__(self, run, max_graphs=64):
        self.run, self.max_graphs, self.seen, self.graphs = run, max_graphs, Counter(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *batches):
        shapes = tuple(tensor.shape for batch in batches for tensor in batch.values())
        if shapes in self.graphs:
            static_batches, replay, static_result = self.graphs[shapes]
            for static, batch in zip(static_batches, batches):
                for name, tensor in batch.items():
                    static[name].copy_(tensor)
            replay()
            return static_result
        self.seen[shapes] += 1
        if self.seen[shapes] < 3 or len(self.graphs) >= self.max_graphs:
            return self.run(*batches)
        return self.capture(shapes, batches)

    def capture(self, shapes, batches):
        torch.cuda.empty_cache()  # a graph has its own memory
        static_batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
        try:
            result, replay, static_result = capture_cuda_graph(lambda: self.run(*static_batches), self.pool)
        except RuntimeError as error:  # after a failed capture the state of the GPU is unknown: it cannot be tried again
            raise UserError(f'graphs=True: this step fails ({str(error).splitlines()[0]}): most likely something in it waits for '
                            'the GPU, or its memory is full; leave --graphs out')
        self.graphs[shapes] = static_batches, replay, static_result
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def graph_decoding(model):
    """From now on, a GPT or VLM on a GPU decodes by CUDA graphs in `stream` and `generate`; other models stay as they are.
    All steps of a stream have to be within one autocast, since a graph reads its copies of the weights."""
    if not any(isinstance(module, gpt.GPT) for module in model.modules()):
        return
    step, graphs = type(model).step.__get__(model), WeakKeyDictionary()  # {KVCache: its GraphedCache}

    def graphed_step(tokens, cache):
        grows = not cache.filled or cache.filled == next(iter(cache.store.values())).size(3)
        if tokens.device.type != DEVICE or tokens.size(1) > 1 or grows:
            graphs.pop(cache, None)  # the cache may move to other memory
            return step(tokens, cache)
        graph = graphs.get(cache)
        if graph is None or graph.store is not cache.store or cache.filled >= graph.kv_len:
            graph = graphs[cache] = GraphedCache(step, cache, tokens)
        cache.filled += 1
        return graph(tokens, cache.filled - 1)
    model.step = graphed_step


class GraphedCache:
    """A KVCache for decoding steps of one token per row. The token's position is a value on the GPU, `cache_pos`; attention
    always reads `kv_len` positions, and a mask hides those after the token. What a step returns is overwritten by the next
    one."""
    def __init__(self, step, cache, tokens):
        self.step, self.store, self.ragged, self.filled = step, cache.store, cache.ragged, cache.filled
        kv = next(iter(self.store.values()))  # (2, B, nkv, S, hd)
        self.kv_len, self.dtype = min(kv.size(3), max(256, 2 * self.filled)), kv.dtype
        self.tokens, self.cache_pos, self.calls = torch.empty_like(tokens), tokens.new_empty(1), 0
        for kv in self.store.values():
            kv[:, :, :, self.filled:self.kv_len] = 0  # not written so far: may be nan, and 0 * nan is nan
        if self.ragged:
            self.valid = cache.valid = F.pad(cache.valid[:, :self.filled], (0, self.kv_len - self.filled))  # (B, kv_len)
        self.last = cache.last = None if cache.last is None else cache.last.clone()

    def append(self, layer, k, v):
        self.store[layer].index_copy_(3, self.cache_pos, torch.stack((k, v)))
        return self.store[layer][:, :, :, :self.kv_len]

    def prepare(self, tokens):
        seen, places = torch.arange(self.kv_len, device=tokens.device) <= self.cache_pos, self.cache_pos  # (kv_len,), (1,)
        if self.ragged:
            self.valid.index_copy_(1, self.cache_pos, tokens >= 0)
            seen, places = seen & self.valid, self.valid.sum(1).view(-1, 1, 1) - 1  # (B, kv_len), (B, 1, 1)
        # added to the logits: each layer would make that of booleans
        mask = torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -torch.inf)
        return False, mask.view(-1, 1, 1, self.kv_len), places

    def run(self):
        last = self.last
        logits = self.step(self.tokens, self)
        if last is not None:
            self.last = last.copy_(self.last)  # the token's embedding, for the next token shift: always in the same memory
        return logits

    def __call__(self, tokens, position):
        self.tokens.copy_(tokens)
        self.cache_pos.fill_(position)
        self.calls += 1
        if self.calls <= 2:  # an answer of one or two words is not worth a capture
            return self.run()
        if self.calls == 3:
            logits, self.replay, self.logits = capture_cuda_graph(self.run, device=tokens.device)
            return logits
        self.replay()
        return self.logits


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile

def compile_blocks(model, device, stack=None):
    """torch.compile for every Transformer block of a model, in place, and on a GPU for the cross-entropy, which in eager
    mode writes its 16-bit logits once more in 32 bits and reads these; when `stack`, an ExitStack, closes, that is undone.

    All blocks of a kind share one compiled function: seconds, where compiling a whole model took minutes. Returns whether a
    compiler works; if not, prints one line.
    """
    try:
        torch.compile(lambda x: (x @ x).relu())(torch.ones(2, 2, device=device))
    except Exception as error:
        if is_main():
            print(f'torch.compile does not work here ({type(error).__name__}): going on without it, more slowly')
        return False
    torch._dynamo.config.recompile_limit = 64  # one for each combination of shapes; chapters keep these few
    for module in model.modules():
        if is_block(module):
            module.compile(dynamic=True)
    if device.type == DEVICE:
        if stack:
            stack.callback(setattr, gpt, 'nll', gpt.nll)
        gpt.nll = torch.compile(gpt.nll, dynamic=True)
    return True
