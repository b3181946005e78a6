"""
Chapter 4's exercises: each check's docstring is what a student reads, its asserts are what a failed answer is told.

The references are slow and obvious: one sample, one number at a time.
"""
import torch

from tests.exercises import equal, generator, lively


def path(flow):
    """The path: a straight line between a sample and its noise (rectified flow, 2209.03003, equation 1). z_t is the data at
    t = 0 and the noise at t = 1; its velocity is dz/dt. t holds one time a sample: it is to be shaped so that it
    multiplies data of any number of axes."""
    data, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    z, velocity = flow.path(data, noise, t)
    for i, time in enumerate(t.tolist()):
        equal(z[i], (1 - time) * data[i] + time * noise[i], f'z at t = {time:g} (0 is data, 1 is noise)')
    assert not torch.allclose(velocity, data - noise), 'the velocity points from noise to data; time runs from data to noise'
    equal(velocity, noise - data, 'the velocity dz/dt')
    z, velocity = flow.path(data[:, 0, 0], noise[:, 0, 0], t)
    equal(z[1], 0.75 * data[1, 0, 0] + 0.25 * noise[1, 0, 0], 'z of vectors (B, d) at t = 0.25')


def normal_cdf(x):
    return (1 + torch.erf(x / 2 ** 0.5)) / 2


def sample_times(flow):
    """Time sampling: n times, in three steps.
    1. n numbers u in 0..1, one in each n-th of that range, i / n .. (i + 1) / n, in random order: a random permutation
       plus uniform draws, by n. Keep them off 0 and 1 by 1e-6.
    2. kind 'uniform': u is the time. 'logit_normal': the normal number below which a share u of all lie
       (torch.special.ndtri), through the sigmoid (2403.03206, section 3.1).
    3. All are moved by `shifted`."""
    n = 64
    for kind in ('uniform', 'logit_normal'):
        t = flow.sample_times(n, kind, 1.0, generator())
        assert t.shape == (n,), f'{kind}: the times have shape {tuple(t.shape)}, should have {(n,)}'
        assert ((t > 0) & (t < 1)).all(), f'{kind}: times from {t.min():.3g} to {t.max():.3g}; all should lie within 0 and 1'
        u = t if kind == 'uniform' else normal_cdf(t.logit())
        bins = (u.sort().values * n).floor().long().tolist()
        many = torch.cat([flow.sample_times(n, kind, 1.0, generator(i)) for i in range(50)])
        share = ((many > 0.25) & (many < 0.75)).double().mean().item()
        expected = 0.5 if kind == 'uniform' else 0.728
        assert abs(share - expected) < 0.01, (
            f'{kind}: {share:.1%} of the times lie between 0.25 and 0.75; it should be {expected:.1%}')
        assert sum(b == i for i, b in enumerate(bins)) > n - 3, (
            f'{kind}: there should be one time in each of {n} parts of equal probability, but some have none and some several')
        assert (t.diff() < 0).any(), f'{kind}: the times rise within the batch: their order should be random'
        same, other = (flow.sample_times(n, kind, 1.0, generator(seed)) for seed in (0, 1))
        assert torch.equal(t, same) and not torch.equal(t, other), (
            f'{kind}: the draws should come from `generator`, and only from it')
        equal(flow.sample_times(n, kind, 3.0, generator()), 3 * t / (1 + 2 * t), f'{kind} times with shift 3')


def stub(flow, net, **changes):
    """A Flow of points in the plane with any function as its network."""
    model = flow.Flow(flow.Config(image_size=0, channels=2, n_classes=3, n_layer=1, n_embd=8, **changes))
    model.net = torch.nn.Module()
    model.net.forward = net
    return model


def Flow_forward(flow):
    """The loss: squared error of the velocity. Put the points on their paths, ask for the velocity there,
    self.velocity(z, t, label, before), before being t where the batch holds none, and take the mean over a sample's
    numbers, (B,), then over samples. With config.mean the target is self.mean_velocity(z, velocity, t, label, before),
    and the loss the mean of error / (error.detach() + 0.01).
    Logs, detached: 'loss', the sum and number of the errors where before == t; 't_0_0.25', 't_0.25_0.5', 't_0.5_0.75'
    and 't_0.75_1', the same of those in each quarter of the time; 'tokens', B times the number of a
    picture's patches (of vectors, B), and 1."""
    seen = []

    def net(z, t, label, before):
        seen.append((z, t, label, before))
        return weight * z + t[:, None] + label[:, None]
    weight = torch.tensor([0.5, -2.0], requires_grad=True)
    batch = dict(data=torch.randn(4, 2), noise=torch.randn(4, 2), time=torch.tensor([0.1, 0.3, 0.6, 0.7]),
                 label=torch.tensor([0, 1, 2, 3]))
    loss, logs = stub(flow, net)(dict(batch))
    errors = []
    for x, e, t, label in zip(*batch.values()):
        z = (1 - t) * x + t * e
        errors.append((weight * z + t + label - (e - x)).square().mean())
    errors = torch.stack(errors).detach()
    z, t, label, before = seen[0]
    equal(z[2], 0.4 * batch['data'][2] + 0.6 * batch['noise'][2], 'what the network is shown of a sample at t = 0.6')
    assert torch.equal(t, batch['time']) and torch.equal(label, batch['label']), (
        "the network should be told the batch's times and labels")
    assert torch.equal(before, t), "without batch['before'] the network's fourth argument should be the time"
    equal(loss, errors.mean(), 'the loss')
    grad, = torch.autograd.grad(loss, weight)
    assert grad.abs().sum() > 0, 'no gradient reaches the network'
    equal(logs['loss'], torch.stack((errors.sum(), torch.tensor(4.0))), "logs['loss'], sum and number of the samples' errors")
    equal(logs['t_0.5_0.75'], torch.stack((errors[2:].sum(), torch.tensor(2.0))), "logs['t_0.5_0.75']")
    equal(logs['t_0.75_1'], torch.zeros(2), "logs['t_0.75_1'], of no samples,")
    assert not any(value.requires_grad for value in logs.values()), 'logs should be detached: they keep the graph alive'

    model, target = stub(flow, net, mean=0.5), torch.randn(4, 2)
    model.mean_velocity = lambda *arguments: target
    batch['before'] = torch.tensor([0.1, 0.1, 0.6, 0.2])
    loss, logs = model(dict(batch))
    error = (net(z, batch['time'], batch['label'], None) - target).square().mean(1)
    assert torch.equal(seen[1][3], batch['before']), "the network's fourth argument should be batch['before'] where there is one"
    equal(loss, (error / (error + 0.01)).mean(), 'with config.mean, the loss')
    equal(torch.autograd.grad(loss, weight)[0], torch.autograd.grad((error / (error.detach() + 0.01)).mean(), weight)[0],
          'with config.mean, the gradient (is the denominator detached?)')
    equal(logs['loss'], torch.stack((error[[0, 2]].sum(), torch.tensor(2.0))),
          "with config.mean, logs['loss'], where before == t,")


def Block_forward(flow):
    """adaLN-Zero: a condition steers each branch of a block (DiT, 2212.09748, figure 3). self.modulation makes six vectors
    of a sample's c (B, D): shift, scale, gate of the attention, then shift, scale, gate of the MLP. Each branch reads
    norm(x) times (1 + scale) plus shift; what it writes, times (1 + gate), is added to x (B, N, D). (DiT's gates start
    at zero; here the modulation and the branches' output matrices do.)"""
    block = lively(flow.Block(flow.Config(n_embd=16, n_head=2, mlp_width=24))).double()
    x, c = torch.randn(2, 4, 16).double(), torch.randn(2, 16).double()
    turn = [part.double() for part in flow.rotary(torch.arange(4)[:, None], 8, 100)]
    names = [f'nothing but a {what} of the {branch}' for branch in ('attention', 'MLP') for what in ('shift', 'scale', 'gate')]
    everything, bias = block.modulation.weight.data.clone(), torch.randn(6, 16).double()
    for only in ('no modulation', *names, 'all six'):
        part = torch.tensor([only in (name, 'all six') for name in names])
        block.modulation.weight.data = everything * part.repeat_interleave(16)[:, None]
        block.modulation.bias.data = (bias * part[:, None]).flatten()
        six = (c @ block.modulation.weight.T + block.modulation.bias).view(2, 6, 1, 16)
        shift, scale, gate, shift2, scale2, gate2 = six.unbind(1)
        y = x + (1 + gate) * block.attention(flow.norm(x) * (1 + scale) + shift, turn)
        y = y + (1 + gate2) * block.mlp(flow.norm(y) * (1 + scale2) + shift2)
        equal(block(x, c, turn), y, f'x behind the block, with {only}')


def euler(flow):
    """Euler: one step of length h for dz/dt = velocity(z, t), by the velocity at its beginning. From noise to data h is
    negative."""
    z = torch.tensor([1.0, 2.0])
    got = flow.euler(lambda z, t: 3 * z + t, z, 0.5, -0.1)
    equal(got, torch.tensor([1 - 0.1 * 3.5, 2 - 0.1 * 6.5]), 'z = (1, 2) after a step of h = -0.1 from t = 0.5, dz/dt = 3 z + t,')


def solve(flow):
    """Euler's loop, and that of every other method. From each of the times to the next by step(velocity, z, t, h), where
    METHODS[method] is (step, evaluations a step). Returns all states, the first one too, (S + 1, B, ...), and the number of
    evaluations in all."""
    calls = []

    def velocity(z, t):
        calls.append(t)
        return 2 * z + t
    times, z = torch.tensor([1.0, 0.7, 0.5, 0.0]), torch.tensor([[1.0, -1.0]])
    states, evaluations = flow.solve(velocity, z, times)
    expected = [z]
    for a, b in ((1.0, 0.7), (0.7, 0.5), (0.5, 0.0)):
        expected.append(expected[-1] + (b - a) * (2 * expected[-1] + a))
    equal(states, torch.stack(expected), 'the trajectory by Euler through the times 1, 0.7, 0.5, 0')
    assert evaluations == 3 == len(calls), f'3 steps by Euler: {len(calls)} evaluations, {evaluations} reported, should be 3'
    for method in ('midpoint', 'heun'):
        calls.clear()
        states, evaluations = flow.solve(velocity, z, times, method)
        assert len(states) == 4, f'{method}: 3 steps have 4 states, these are {len(states)}'
        assert evaluations == 6 == len(calls), (
            f'3 steps by {method}: {len(calls)} evaluations, {evaluations} reported, should be 6')


def guided(flow):
    """Guidance: away from what would be drawn without a label (2207.12598), within an interval of times (2404.07724). Returns
    a function field(z, t, before=None) of numbers t and before (t where it is None); velocity wants (B,) of each.
    Guided, v = v_without + scale * (v_label - v_without), v_without being that of the label `none`: one evaluation, of a
    batch twice as large. Where scale is 1, or t outside the interval (its ends belong to it), the velocity of the
    label: one evaluation of the batch as it is."""
    sizes, table = [], torch.tensor([1.0, 10.0, 100.0])

    def velocity(z, t, label, before):
        assert t.shape == label.shape == before.shape == (len(z),), (
            f'velocity wants a time, a label and a `before` for each of {len(z)} samples, but is given shapes {tuple(t.shape)}, '
            f'{tuple(label.shape)}, {tuple(before.shape)}')
        sizes.append(len(z))
        return z * table[label][:, None] + t[:, None] + 7 * before[:, None]
    z, label = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    given, without = z * table[label][:, None] + 8 * 0.5, z * 100 + 8 * 0.5
    for scale in (0.0, 2.0, 5.0):
        equal(flow.guided(velocity, label, 2, scale)(z, 0.5), without + scale * (given - without),
              f'the velocity at scale {scale:g} (0 is without a label)')
    assert sizes == [4, 4, 4], 'with and without the label: one evaluation of a batch twice as large'
    sizes.clear()
    equal(flow.guided(velocity, label, 2, 1.0)(z, 0.5), given, 'the velocity at scale 1, which is none,')
    assert sizes == [2], 'scale 1 needs one evaluation of the batch as it is'
    inside = flow.guided(velocity, label, 2, 3.0, (0.2, 0.5))
    equal(inside(z, 0.5), without + 3 * (given - without), 'the velocity at the end of the interval (0.2, 0.5)')
    for t in (0.1, 0.9):
        equal(inside(z, t), z * table[label][:, None] + 8 * t, f'the velocity at t = {t}, outside of the interval (0.2, 0.5),')
    equal(flow.guided(velocity, label, 2, 1.0)(z, 0.5, 0.25), given - 7 * 0.25, 'the velocity with before = 0.25')
    equal(flow.guided(velocity, label, 2, 2.0)(z, 0.5, 0.25), 2 * given - without - 7 * 0.25,
          'the guided velocity with before = 0.25')


EXERCISES = {
    'path': (2, path),
    'sample_times': (3, sample_times),
    'Flow.forward': (4, Flow_forward),
    'Block.forward': (4, Block_forward),
    'euler': (1, euler),
    'solve': (2, solve),
    'guided': (4, guided),
}
