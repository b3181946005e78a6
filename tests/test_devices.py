"""The machine: which device, dtype and kernels."""
import contextlib

import pytest
import torch

from config import UserError
from engine import devices


def test_compiled_attention_is_the_chosen_one():
    """PyTorch's cache of compiled code does not know whether attention was fused: without a tag it would hand out the other's."""
    def attend(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def kernels(length):
        torch._dynamo.reset()
        devices.set_up(torch.device('cpu'), length=length)
        compiled, q = torch.compile(attend), torch.randn(1, 1, 16, 8, requires_grad=True)
        compiled(q).sum().backward()  # only what has a backward pass is kept
        with torch.profiler.profile() as trace:
            compiled(q)
        return {event.key for event in trace.key_averages()}
    names = [any('flash' in key for key in kernels(length)) for length in (0, 2048, 0)]
    devices.set_up(torch.device('cpu'))
    assert names == [False, True, False]


def test_devices_and_dtypes():
    assert devices.find('cpu') == devices.find(torch.device('cpu')) == torch.device('cpu') and devices.find() == devices.find('auto')
    assert devices.find_dtype('float16', torch.device('cpu')) == torch.float16
    for find, message in ((lambda: devices.find('gpu'), "device='gpu': choose auto, cuda, mps or cpu"),
                          (lambda: devices.find('meta'), "device='meta': choose auto, cuda, mps or cpu"),
                          (lambda: devices.find('cuda:x'), "device='cuda:x' does not work here"),
                          (lambda: devices.find_dtype('float8', torch.device('cpu')), "dtype='float8': choose auto, float32")):
        with pytest.raises(UserError, match=message) as error:
            find()
        assert '\n' not in str(error.value)


def test_one_gpu_a_process(monkeypatch):
    """Under torchrun the name cuda is this process's GPU."""
    monkeypatch.setenv('LOCAL_RANK', '3')
    asked = []
    monkeypatch.setattr(torch, 'empty', lambda n, device: asked.append(device) or torch.zeros(n))
    devices.find('cuda'), devices.find('cuda:1')
    assert asked == ['cuda:3', 'cuda:1']


def test_flops_are_counted_without_numbers():
    """Of a model on the meta device: 6 a weight and token for forward and backward pass, less the gradient of the input."""
    class Model(torch.nn.Linear):
        def forward(self, batch):
            return super().forward(batch['x']).sum(), {}
    model = Model(8, 4, bias=False, device='meta')
    with torch.autograd.set_detect_anomaly(True):  # an earlier cell of a notebook may have done so
        devices.count_flops(model, dict(x=torch.zeros(3, 8, device='meta')))
    assert devices.count_flops(model, dict(x=torch.zeros(3, 8, device='meta'))) == 4 * 3 * 8 * 4


def test_the_matmul_rate_is_a_rate():
    assert 1e8 < devices.matmul_rate(torch.device('cpu'), torch.float32, seconds=0.05) < 1e14


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('call, context', [
    ('torch.set_default_dtype', default_dtype()), ('torch.set_default_device', torch.device('meta')),
    ('torch.autocast', torch.autocast('cpu', torch.bfloat16))])
def test_what_an_earlier_cell_of_a_notebook_has_changed(call, context):
    """Autocast around a whole run would keep its first copies of the weights, so that it learns nothing."""
    with context:
        with pytest.raises(UserError, match=f'{call} is in effect') as error:
            devices.find('cpu')
    assert '\n' not in str(error.value) and devices.find('cpu') == torch.device('cpu')
