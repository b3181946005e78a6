"""
The machine: device, dtype, attention kernel on a CPU, peak FLOP/s; and the FLOPs of a model.
"""
import ctypes
import os
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import UserError
from engine import threads

KINDS = 'cuda', 'mps', 'cpu'  # what programs can run on


def find(name='auto'):
    """The torch.device of this name; under torchrun, the GPU of this process. Raises UserError."""
    changed = {'torch.set_default_dtype': torch.get_default_dtype() != torch.float32,
               'torch.set_default_device': torch.get_default_device().type != 'cpu',
               'torch.autocast': torch.is_autocast_enabled('cpu') or torch.is_autocast_enabled('cuda')}
    for call in filter(changed.get, changed):  # results would be others, silently
        raise UserError(f'{call} is in effect, from an earlier line: call this without it, or restart the notebook')
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name == 'cuda':  # one GPU per process
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    if str(name).partition(':')[0] not in KINDS:
        raise UserError(f'device={name!r}: choose auto, cuda, mps or cpu')
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device={name!r} does not work here: {str(error).splitlines()[0]}')


def find_dtype(name, device):
    """The torch.dtype of this name; 'auto' is bfloat16 if the hardware computes it natively, otherwise float32.
    Emulated bfloat16 is slower than float32, native bfloat16 several times as fast. Raises UserError."""
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


def set_up(device, training=True, length=0):
    """Process-wide settings for sequences of `length` tokens.

    A CPU has two kernels for attention: a fused one, which never stores all T x T weights, and plain matrix products
    ("math"). In training, the plain one is faster for short sequences. Backward pass of the fused kernel, relative to
    the plain one (PyTorch 2.13): in bfloat16 5 times as long at 64 tokens, 1.4 times at 256, half as long at 1,024; in
    float32 equal up to 128 tokens, 0.6 to 0.75 of the time at 512. In generation, 32 texts at once, the fused kernel
    is faster.
    """
    torch.set_float32_matmul_precision('high')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if device.type == 'cpu':
        if not training:  # engine/threads.py; a training loop looks between its steps
            threads.adapt(pause=0)
        keep_memory()
        use_fused_attention(not training or length >= (192 if find_dtype('auto', device) == torch.float32 else 1024))
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # products in bfloat16 itself, not in float32


def use_fused_attention(fused):
    """Chooses the attention kernel of the CPU, see `set_up`; returns the previous choice."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused)  # also for the CPU, despite the name
    torch.compiler.config.cache_key_tag = f'fused={fused}'  # code cached on disk for the other kernel does not fit
    return before


def keep_memory():
    """Keeps freed memory in this process. By default the C library of Linux returns large blocks to the system, and
    gets them back page by page, filled with zeros. This takes up to a sixth of the time of a training step."""
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    except (OSError, AttributeError):
        pass  # another system, another allocator


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def synchronize(device):
    """Waits until the device has finished all its work."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype, seconds=0.5):
    """Peak FLOP/s of this machine: the best time of a large square matrix product, within about `seconds`."""
    def once(a, b):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        return time.perf_counter() - start
    end, n, best = time.perf_counter() + seconds, 128, 0.0
    while n < (8192 if device.type == 'cuda' else 2048) and best < seconds / 20:
        n *= 2  # starts small: an emulated dtype may take a thousand times as long
        pair = torch.randn(2, n, n, device=device).to(dtype)
        best = min(once(*pair), once(*pair))
    while time.perf_counter() < end:
        best = min(best, once(*pair))
    return 2 * n ** 3 / best


def count_flops(model, batch):
    """FLOPs of a forward and backward pass, counted operator by operator. Attention uses plain matrix products, so
    that they are counted on every device: the counter does not support the fused CPU kernel."""
    counter = FlopCounterMode(display=False)
    with (torch.compiler.set_stance('force_eager'), sdpa_kernel(SDPBackend.MATH), counter,
          torch.autograd.set_detect_anomaly(False)):  # it reads values, which tensors on the meta device lack
        model(batch)[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def context_length(model):
    """Context length of a model; 0 for models without one, whose sequences are short."""
    return getattr(model, 'max_seq_len', getattr(model.config, 'block_size', 0))


def is_block(module):
    """Whether a module is a Transformer block, the unit of compilation and sharding: the name of its class ends in
    Block."""
    return type(module).__name__.endswith('Block')
