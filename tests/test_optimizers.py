"""Muon and AdamW: which parameter gets which, the schedule, the average of the weights, and short runs of small networks."""
import pytest
import torch

import fourm
import train
from config import UserError
from engine import devices, optimizers


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_muon_is_torchs(dtype):
    """Three steps on matrices of two shapes: the same up to the rounding of bfloat16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 96), (32, 96), (64, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = optimizers.Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=dtype)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn='original')
    for step in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step(), reference.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * 0.02 * 3 * min(a.shape) ** 0.5  # 2 % of three steps of length sqrt(rank) * 0.02


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_muon_computes_in_the_dtype_of_the_run(dtype, monkeypatch):
    """Also on hardware where the other one is the default; float16 has too narrow a range."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(devices, 'find_dtype', lambda name, device: other)
    made = [optimizers.make(net(), train.SETTINGS, each)[-1] for each in (dtype, torch.float16)]
    assert [muon.dtype for muon in made] == [dtype, other]
    used = []
    monkeypatch.setattr(optimizers, 'newton_schulz', lambda x, dtype: used.append(dtype) or x)
    for group in made[0].param_groups:
        for p in group['params']:
            p.grad = torch.ones_like(p)
    made[0].step()
    assert set(used) == {dtype}


def test_muon_gets_the_hidden_matrices_alone():
    model = fourm.FourM(fourm.Config(n_embd=32, n_head=2))
    adamw, muon = optimizers.make(model, train.SETTINGS, torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in muon.param_groups:
        assert all(names[id(p)].startswith(('encoder.', 'decoder.')) for p in group['params'])
    total = sum(len(group['params']) for optimizer in (adamw, muon) for group in optimizer.param_groups)
    assert total == len(names) and len(optimizers.make(model, train.SETTINGS | dict(muon=False), torch.float32)) == 1


def net():
    return torch.nn.ModuleDict(dict(eyes=torch.nn.Linear(2, 3), mouth=torch.nn.Linear(3, 2)))


def test_rates():
    """The last entry that a name begins with holds; a parameter whose rate is 0 is frozen and in no optimizer."""
    model = net()
    multipliers = optimizers.lr_multipliers(model, 'eyes:0 eyes.bias:0.5')
    assert [multipliers[p] for p in model.parameters()] == [0, 0.5, 1, 1]
    optimizers.freeze(model, 'eyes:0 eyes.bias:0.5')
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    opts = optimizers.make(model, train.SETTINGS | dict(lr_multipliers='eyes:0 eyes.bias:0.5'), torch.float32)
    rates = {p: group['lr'] for group in optimizers.param_groups(opts) for p in group['params']}
    assert rates == {model.eyes.bias: 1.5e-3, model.mouth.weight: 0.02, model.mouth.bias: 3e-3}


@pytest.mark.parametrize('text, message', [
    ('nose:2', "no parameter begins with 'nose'; the parts are eyes, mouth"), ('eyes:-1', 'multipliers must be at least 0'),
    ('eyes:0 mouth:0', 'multipliers must be at least 0, and one above 0'),
    ('eyes:much', "entry 'eyes:much': lr_multipliers='much' is not of type float"),
    ('eyes', 'not of type float')])
def test_faulty_rates(text, message):
    with pytest.raises(UserError, match=message):
        optimizers.freeze(net(), text)


def test_schedule():
    settings = train.SETTINGS | dict(max_iters=100, warmup_iters=10, decay=0.5, min_lr=0.1)
    factors = [optimizers.lr_factor(step, settings) for step in range(101)]
    assert [factors[step] for step in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1, 1, 0.55, 0.1])


def test_update_ema():
    """The first steps count for little: after n steps of weights 1, 2, ... the average is near the last of them."""
    ema_model, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    ema_model.register_buffer('running_mean', torch.zeros(1)), model.register_buffer('running_mean', torch.tensor([7.0]))
    expected = ema_model.weight.item()
    for step in range(20):
        torch.nn.init.constant_(model.weight, step)
        optimizers.update_ema(ema_model, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema_model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert ema_model.running_mean == 7 and ema_model.running_mean is not model.running_mean


# ---------------------------------------------------------------------------------------------------------------------
# A whole run of a small network

def squares(model, x):
    return (model(x) - x).square().mean()


def fit(steps=40, **changes):
    torch.manual_seed(0)
    return optimizers.fit(torch.nn.Linear(4, 4), squares, lambda: [torch.randn(16, 4)], steps, 'identity', **changes)


def test_fit_trains(capsys):
    model = fit(300, device='cpu')
    assert not model.training and squares(model, torch.eye(4)) < 0.01 and 'train identity: 100%' in capsys.readouterr().err


@pytest.fixture
def attention():
    yield
    devices.use_fused_attention(True)


@pytest.mark.parametrize('fused', [True, False])
def test_fit_leaves_the_attention_kernel_as_it_was(attention, fused):
    """Its choice is the whole process's: a run that trains a parser before it is scored has to be as fast as one that does not.
    After a fault, too."""
    def choice():
        return torch.backends.cuda.flash_sdp_enabled(), torch.compiler.config.cache_key_tag
    devices.use_fused_attention(fused)
    before, within = choice(), []
    assert before == (fused, f'fused={fused}')

    def batch_of():
        within.append(torch.backends.cuda.flash_sdp_enabled())
        return [torch.randn(2, 4)]
    optimizers.fit(torch.nn.Linear(4, 4), squares, batch_of, 2, 'x', device='cpu')
    assert choice() == before and within == [False, False]  # short sequences: the formula written out
    with pytest.raises(ZeroDivisionError):
        optimizers.fit(torch.nn.Linear(4, 4), squares, lambda: 1 / 0, 2, 'x', device='cpu')
    assert choice() == before


def test_fit_trains_on_the_device_that_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, 'find', lambda name='auto', find=devices.find: asked.append(name) or find('cpu'))
    fit(), fit(device='cpu'), fit(device='cuda:1')
    assert asked == ['auto', 'cpu', 'cuda:1']
    monkeypatch.undo()
    with pytest.raises(UserError, match="device='gpu': choose auto, cuda, mps or cpu"):
        fit(device='gpu')


def test_settings_of_fit_are_train_pys():
    """The tokenizers are trained with the defaults of train.py, but for a shorter warm-up and a decay from the first step on."""
    differ = {name for name, value in optimizers.FIT.items() if train.SETTINGS[name] != value}
    assert differ == {'warmup_iters', 'decay'}
