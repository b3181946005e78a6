"""What the checks of all chapters' exercises are written with; see tests/homework.py."""
import torch


def equal(got, expected, what):
    """Asserts that `what` is the tensor that it should be; otherwise says how it differs."""
    assert isinstance(got, torch.Tensor), f'{what}: should be a tensor, but is {type(got).__name__}'
    assert got.shape == expected.shape, f'{what}: has shape {tuple(got.shape)}, should have {tuple(expected.shape)}'
    a, b = got.detach().double(), expected.detach().double()
    wrong = ~torch.isclose(a, b, rtol=1e-4, atol=1e-5)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        many = f' ({int(wrong.sum())} of {wrong.numel()} numbers differ)' if wrong.numel() > 1 else ''
        place = f' at {list(at)}' if at else ''
        raise AssertionError(f'{what}: {a[at].item():.4g}{place}, should be {b[at].item():.4g}{many}')


def lively(model):
    """A model whose weights are all random: what starts at zero would hide mistakes."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
