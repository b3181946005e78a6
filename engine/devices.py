"""
The machine: device, dtype, threads, the attention kernel of a CPU, peak FLOP/s and the FLOPs of a model.
"""
import ctypes
import os
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import UserError


def find(name='auto'):
    """The torch.device of this name; under torchrun the GPU of this process. Raises UserError."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name == 'cuda':  # one GPU a process
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device={name!r} does not work here: {str(error).splitlines()[0]}')


def find_dtype(name, device):
    """'auto' is bfloat16 if the hardware computes it natively: its matmuls are then several times as fast as in float32,
    otherwise slower. Raises UserError."""
    if name == 'auto':
        native = False
        if device.type == 'cuda':
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == 'cpu':
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if name not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype={name!r}: choose auto, float32, bfloat16 or float16')
    return getattr(torch, name)


def find_threads(threads, checkpoint, world):
    """CPU threads of this process: the setting; or, if that is 0, those of the run that continues from a checkpoint, spread over its
    processes and at most one a core; or 0, PyTorch's choice."""
    if threads or not checkpoint:
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(checkpoint['threads'] // world, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def set_up(device, threads=0, training=True, length=0):
    """Process-wide settings for sequences of `length` tokens.

    A CPU has two kernels for attention: a fused one that never holds all T x T weights, and the formula written out. In training the
    formula is faster for short sequences. PyTorch 2.13, backward pass of the fused kernel against the formula: in bfloat16 5 times
    as long at 64 tokens, 1.4 times at 256, half as long at 1,024; in float32 equal up to 128 tokens, 0.6 to 0.75 of the time at
    512. In generation, 32 texts at once, the fused one is faster.
    """
    torch.set_float32_matmul_precision('high')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if device.type == 'cpu':
        if threads:
            torch.set_num_threads(threads)
        keep_memory()
        use_fused_attention(not training or length >= (192 if find_dtype('auto', device) == torch.float32 else 1024))
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # bfloat16 products without a detour by float32


def use_fused_attention(fused):
    """The CPU's attention kernel, see `set_up`; returns the choice before."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused)  # named after CUDA, but it holds for the CPU as well
    torch.compiler.config.cache_key_tag = f'fused={fused}'  # code compiled on disk for the other kernel does not fit
    return before


def keep_memory():
    """Freed memory stays with this process. The C library of Linux gives large pieces back to the system, which hands them out
    again page by page, filled with zeros: up to a sixth of a training step."""
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no piece is mapped for itself
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    except (OSError, AttributeError):
        pass  # another system, another allocator


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def synchronize(device):
    """Waits until the device has computed all that was asked of it."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype, seconds=0.5):
    """Peak FLOP/s of this machine: a large square matrix product, the best of those that fit into the time given."""
    def once(a, b):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        return time.perf_counter() - start
    end, n, best = time.perf_counter() + seconds, 128, 0.0
    while n < (8192 if device.type == 'cuda' else 2048) and best < seconds / 20:
        n *= 2  # from small to large: an emulated dtype may take a thousand times as long
        pair = torch.randn(2, n, n, device=device).to(dtype)
        best = min(once(*pair), once(*pair))
    while time.perf_counter() < end:
        best = min(best, once(*pair))
    return 2 * n ** 3 / best


def count_flops(model, batch):
    """FLOPs of a forward and backward pass, counted operator by operator. Attention is written out, so that its products count on
    every device (the counter does not know the fused CPU kernel)."""
    with torch.compiler.set_stance('force_eager'), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def context_length(model):
    """Tokens that attend to each other in a model with a context; 0 for the others, whose sequences are short."""
    return getattr(model, 'length', getattr(model.config, 'block_size', 0))


def is_block(module):
    """Whether a module is a Transformer block, which is compiled and sharded as one: its class's name ends in Block."""
    return type(module).__name__.endswith('Block')
