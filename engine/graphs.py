"""
Lower launch overhead: CUDA graphs for training steps and decoding steps, and torch.compile for a model's blocks.

The host takes several times as long to launch hundreds of small kernels as a GPU takes to run them. A CUDA graph is a
sequence of kernels that is captured once and then launched by one call, on the same memory. The results are the same.
"""
from collections import Counter
from types import MethodType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

import gpt
from config import UserError
from engine.devices import is_block
from engine.processes import is_main

DEVICE = 'cuda'  # the type of device that has CUDA graphs; tests set another
CACHES = WeakKeyDictionary()  # {KVCache: GraphedCache}


def capture_cuda_graph(run, pool=None, device=None):
    """Run run() once and capture its kernels. Returns its result, replay, and static_result, which replay() overwrites.
    Graphs that never run at the same time may share a memory pool."""
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: one-time work must not be captured
            result = run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool, capture_error_mode='thread_local'):  # other threads may use the GPU
            static_result = run()  # launches no kernel, but Python's side effects happen again
    return result, graph.replay, static_result


def possible(device, world):
    """Return whether a run can use CUDA graphs: on a single GPU. If not, print one line."""
    if device.type == DEVICE and world == 1:
        return True
    if is_main():
        print('graphs=True needs a run on a single GPU: going on without')
    return False


class GraphedSteps:
    """run(*batches) as CUDA graphs: one for each combination of shapes, captured at its third occurrence, at most
    max_graphs. Tensors that run() changes (gradients, weights) must keep their addresses. Raises UserError."""
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
        torch.cuda.empty_cache()  # a graph has its own memory pool
        static_batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
        try:
            result, replay, static_result = capture_cuda_graph(lambda: self.run(*static_batches), self.pool)
        except RuntimeError as error:  # the state of the GPU is unknown: no second try
            raise UserError(f'graphs=True: capture failed ({str(error).splitlines()[0]}): most likely the step has a '
                            'host-device sync, or the GPU is out of memory; leave --graphs out')
        self.graphs[shapes] = static_batches, replay, static_result
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def graph_decoding(model):
    """Let a GPT or VLM on a GPU decode by CUDA graphs in `stream` and `generate`; other models stay unchanged.
    All steps of a stream must run within one autocast context, because a graph reads its copies of the weights."""
    own = hasattr(model, 'step') and any(isinstance(module, gpt.GPT) for module in model.modules())
    if own and next(model.parameters()).device.type == DEVICE:
        model.step = MethodType(step, model)  # a method, so that a copy of the model steps with its own weights


def step(model, tokens, cache):  # pickled by this name: a model that is loaded has the step of its class
    """model.step(tokens, cache), by a CUDA graph for one token per row."""
    grows = not cache.cur_len or cache.cur_len == cache.kv[0].size(3)
    if tokens.device.type != DEVICE or tokens.size(1) > 1 or grows:
        CACHES.pop(cache, None)  # the cache may be reallocated
        return type(model).step(model, tokens, cache)
    graph = CACHES.get(cache)
    if graph is None or graph.model is not model or graph.kv is not cache.kv or cache.cur_len >= graph.kv_len:
        graph = CACHES[cache] = GraphedCache(model, cache, tokens)
    cache.cur_len += 1
    return graph(tokens, cache.cur_len - 1)


class GraphedCache:
    """A KVCache for decoding steps of one token per row. `cache_pos`, the token's position, is a tensor on the GPU;
    attention always reads `kv_len` positions, and a mask excludes those after the token. The next step overwrites the
    logits of a step."""
    def __init__(self, model, cache, tokens):
        self.model, self.kv, self.left_padded, self.cur_len = model, cache.kv, cache.left_padded, cache.cur_len
        S, self.dtype = self.kv[0].size(3), self.kv[0].dtype  # each (2, B, nkv, S, hd)
        self.kv_len = min(S, max(256, 2 * self.cur_len))
        self.tokens, self.cache_pos, self.calls = torch.empty_like(tokens), tokens.new_empty(1), 0
        for kv in self.kv:
            kv[:, :, :, self.cur_len:self.kv_len] = 0  # not written yet: may be nan, and 0 * nan is nan
        if self.left_padded:
            self.is_token = F.pad(cache.is_token[:, :self.cur_len], (0, self.kv_len - self.cur_len))  # (B, kv_len)
            cache.is_token = self.is_token
        if cache.prev_embedding is not None:
            cache.prev_embedding = cache.prev_embedding.clone()
        self.prev_embedding = cache.prev_embedding

    def update(self, layer, k, v):
        kv = self.kv[layer.layer_idx]
        kv.index_copy_(3, self.cache_pos, torch.stack((k, v)))
        return kv[:, :, :, :self.kv_len]

    def prepare(self, tokens):
        mask = torch.arange(self.kv_len, device=tokens.device) <= self.cache_pos  # (kv_len,)
        position_ids = self.cache_pos  # (1,)
        if self.left_padded:
            self.is_token.index_copy_(1, self.cache_pos, tokens >= 0)
            mask, position_ids = mask & self.is_token, self.is_token.sum(1).view(-1, 1, 1) - 1  # (B, kv_len), (B, 1, 1)
        # added to logits; computed once, while each layer would convert a boolean mask
        bias = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, -torch.inf)
        return False, bias.view(-1, 1, 1, self.kv_len), position_ids

    def run(self):
        static = self.prev_embedding
        logits = type(self.model).step(self.model, self.tokens, self)
        if static is not None:
            self.prev_embedding = static.copy_(self.prev_embedding)  # for the next token shift, at the same address
        return logits

    def __call__(self, tokens, position):
        self.tokens.copy_(tokens)
        self.cache_pos.fill_(position)
        self.calls += 1
        if self.calls <= 2:  # for one or two tokens, a capture takes longer than it saves
            return self.run()
        if self.calls == 3:
            logits, self.replay, self.logits = capture_cuda_graph(self.run, device=tokens.device)
            return logits
        self.replay()
        return self.logits


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile

def compile_blocks(model, device, stack=None):
    """Compile every Transformer block of a model in place, and on a GPU the cross-entropy, until `stack`, an ExitStack,
    closes: in eager mode it writes its 16-bit logits again in 32 bits.

    All blocks of a class share one compiled function: seconds instead of minutes for a whole model. Returns whether a
    compiler works; if not, prints one line.
    """
    try:
        torch.compile(lambda x: (x @ x).relu())(torch.ones(2, 2, device=device))
    except Exception as error:
        if is_main():
            print(f'torch.compile does not work here ({type(error).__name__}): going on without it, more slowly')
        return False
    torch._inductor.config.cpp.dynamic_threads = True  # not C++ for one number: engine/threads.py may change it
    torch._dynamo.config.recompile_limit = 64  # one for each combination of shapes; chapters have few
    for module in model.modules():
        if is_block(module):
            module.compile(dynamic=True)
    if device.type == DEVICE:
        if stack:
            stack.callback(setattr, gpt, 'token_nll', gpt.token_nll)
        gpt.token_nll = torch.compile(gpt.token_nll, dynamic=True)
    return True
