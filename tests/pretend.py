"""
A simulated accelerator for machines without one: its tensors report device 'meta' and compute on the CPU; an operator
that mixes them with CPU tensors or CPU generators raises; every host-device sync is counted.

    with pretend.device() as waits:
        train.main(..., device='meta')

And `capture_cuda_graph`, CUDA graphs without a GPU: operators are recorded and replayed on the same memory,
without Python.

Not simulated: kernels, their speed, dtypes, memory.
"""
import contextlib
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from engine import checkpoints, devices

ROOT = str(Path(__file__).parent.parent)
MIXES = {'_to_copy', 'copy_'}  # operators that copy between devices
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal'}  # the host needs their values or sizes


def away(device):
    return device is not None and torch.device(device).type == 'meta'


class Tensor(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values."""
    @staticmethod
    def __new__(cls, inner):
        new = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device='meta')
        new.inner = inner
        return new

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError('NumPy needs a CPU tensor')

    def __format__(self, form):
        return format(self.item(), form)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Device.now.__torch_dispatch__(function, types, args, kwargs)


class Generator(torch.Generator):
    """A generator on the simulated device, recognised by its seed: operators do not receive the same Python object."""
    seeds = set()

    def manual_seed(self, seed):
        self.seeds.add(seed + 2 ** 40)
        return super().manual_seed(seed + 2 ** 40)


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits, Device.now = Counter(), self

    def wait(self, name):
        """Count a sync under the line of our code that caused it."""
        ours = [frame for frame in traceback.extract_stack()
                if frame.filename.startswith(ROOT) and 'tests' not in frame.filename]
        self.waits[f'{Path(ours[-1].filename).name}: {ours[-1].line}' if ours else name] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(x, Tensor) for x in leaves)
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Tensor) and x.ndim]
        if there and here and name not in MIXES:
            raise RuntimeError(f'{name}: tensors of two devices')
        stays = away(kwargs['device']) if kwargs.get('device') is not None else there  # where the result is
        for x in leaves:
            if isinstance(x, Generator.__base__) and (x.initial_seed() in Generator.seeds) != stays:
                raise RuntimeError(f'{name}: the random generator is on another device')
        if there and (name in WAITS or not stays):
            self.wait(name)
        if stays and 'device' in kwargs:
            kwargs['device'] = torch.device('cpu')
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Tensor) else x, (args, kwargs))
        result = function(*inner_args, **inner_kwargs)
        if name.endswith('_') and not name.startswith('_foreach'):
            return args[0]
        return tree_map(lambda x: Tensor(x) if stays and isinstance(x, torch.Tensor) else x, result)


class Tape(TorchDispatchMode):
    """Records the operators with their tensors, and the memory contents before them."""
    def __init__(self):
        super().__init__()
        self.calls, self.memory = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            if storage.data_ptr() not in self.memory:
                self.memory[storage.data_ptr()] = storage, storage.clone()
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        """Run the same operators on the same memory, without Python code."""
        for function, args, kwargs, result in self.calls:
            there = {storage.data_ptr() for storage in storages((args, kwargs))}
            if 'empty' not in function.overloadpacket.__name__:
                for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in there:
                        old.copy_(new)


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def capture_cuda_graph(run, pool=None, device=None):
    """engine.graphs.capture_cuda_graph without a GPU."""
    now, state = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, run()), torch.get_rng_state()
    with Tape() as tape:
        later = run()
    torch.set_rng_state(state)
    for storage, before in tape.memory.values():  # a GPU computes nothing during capture
        storage.copy_(before)
    return now, tape.replay, later


def inner(tree):
    return tree_map(lambda x: x.inner if isinstance(x, Tensor) else x, tree)


@contextlib.contextmanager
def device():
    """Yield the counter of syncs, {line of code: number}."""
    tensor, adamw, generator = torch.tensor, torch.optim.AdamW, torch.Generator
    patches = {  # code that handles devices outside of operators
        (torch, 'tensor'): lambda *args, device=None, **kwargs: tensor(*args, **kwargs).to(device or 'cpu'),
        (torch, 'Generator'): lambda device='cpu': Generator() if away(device) else generator(),
        (torch.optim, 'AdamW'): lambda *args, fused, **kwargs: adamw(*args, **kwargs),
        (devices, 'KINDS'): (*devices.KINDS, 'meta'), (devices, 'autocast'): lambda *_: contextlib.nullcontext(), (devices, 'synchronize'): lambda device: None,
        (checkpoints, 'get_model_state_dict'): lambda model, options: inner(model.state_dict()),
        (checkpoints, 'get_optimizer_state_dict'):
            lambda model, optimizers, options: [inner(o.state_dict()) for o in optimizers],
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in patches.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield stack.enter_context(Device()).waits
