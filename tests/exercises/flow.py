"""
Chapter 4's exercises: a check's docstring is the exercise's text, its asserts are the reasons on the score card.

The references are slow and obvious: one sample, one value at a time.
"""
import torch

from tests.exercises import equal, generator, lively


def interpolate(flow):
    """Interpolation: z_t = (1 - t) data + t noise (rectified flow, 2209.03003, equation 1), and its velocity dz/dt.
    Time runs from data, t = 0, to noise, t = 1. t (B,) has one time per sample: reshape it so that it multiplies data
    with any number of axes."""
    data, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    z, velocity = flow.interpolate(data, noise, t)
    for i, time in enumerate(t.tolist()):
        equal(z[i], (1 - time) * data[i] + time * noise[i], f'z at t = {time:g} (0 is data, 1 is noise)')
    assert not torch.allclose(velocity, data - noise), 'the velocity should point from data to noise, as time does'
    equal(velocity, noise - data, 'the velocity dz/dt')
    z, velocity = flow.interpolate(data[:, 0, 0], noise[:, 0, 0], t)
    equal(z[1], 0.75 * data[1, 0, 0] + 0.25 * noise[1, 0, 0], 'z of vectors (B, d) at t = 0.25')


def normal_cdf(x):
    return (1 + torch.erf(x / 2 ** 0.5)) / 2


def sample_timesteps(flow):
    """Timestep sampling in three steps.
    1. Stratified sampling: n values u in 0..1, one in each interval i / n .. (i + 1) / n, in random order: a random
       permutation plus uniform noise, divided by n. Clamp u to 1e-6 .. 1 - 1e-6.
    2. timestep_sampling 'uniform': t = u. 'logit_normal': t = sigmoid(quantile u of the standard normal
       distribution), torch.special.ndtri (2403.03206, section 3.1).
    3. Apply `shift_timesteps`."""
    n = 64
    for kind in ('uniform', 'logit_normal'):
        t = flow.sample_timesteps(n, kind, 1.0, generator())
        assert t.shape == (n,), f'{kind}: the times have shape {tuple(t.shape)}, should have {(n,)}'
        assert ((t > 0) & (t < 1)).all(), (
            f'{kind}: times from {t.min():.3g} to {t.max():.3g}; all should lie within 0 and 1')
        u = t if kind == 'uniform' else normal_cdf(t.logit())
        bins = (u.sort().values * n).floor().long().tolist()
        many = torch.cat([flow.sample_timesteps(n, kind, 1.0, generator(i)) for i in range(50)])
        fraction = ((many > 0.25) & (many < 0.75)).double().mean().item()
        expected = 0.5 if kind == 'uniform' else 0.728
        assert abs(fraction - expected) < 0.01, (
            f'{kind}: {fraction:.1%} of the times lie between 0.25 and 0.75; it should be {expected:.1%}')
        assert sum(b == i for i, b in enumerate(bins)) > n - 3, (
            f'{kind}: there should be one time in each of {n} parts of equal probability, but some have none')
        assert (t.diff() < 0).any(), f'{kind}: the times rise within the batch: their order should be random'
        same, other = (flow.sample_timesteps(n, kind, 1.0, generator(seed)) for seed in (0, 1))
        assert torch.equal(t, same) and not torch.equal(t, other), (
            f'{kind}: random values should come from `generator`, and only from it')
        equal(flow.sample_timesteps(n, kind, 3.0, generator()), 3 * t / (1 + 2 * t), f'{kind} times with shift 3')


def stub(flow, net, **changes):
    """A Flow of points in the plane with any function as its network."""
    model = flow.Flow(flow.Config(image_size=0, channels=2, n_classes=3, n_layer=1, n_embd=8, **changes))
    model.net = torch.nn.Module()
    model.net.forward = net
    return model


def flow_matching_loss(flow):
    """The loss: interpolate between data and noise at t, evaluate velocity(z, t, label) there, and return each sample's
    squared error of the velocity, the mean over its values: (B,)."""
    seen = []

    def velocity(z, t, label):
        seen.append((z, t, label))
        return weight * z + t[:, None] + label[:, None]
    weight, data, noise = torch.tensor([0.5, -2.0], requires_grad=True), torch.randn(4, 2), torch.randn(4, 2)
    t, label = torch.tensor([0.1, 0.3, 0.6, 0.7]), torch.tensor([0, 1, 2, 3])
    error = flow.flow_matching_loss(velocity, data, noise, t, label)
    expected = []
    for x, e, time, y in zip(data, noise, t, label):
        z = (1 - time) * x + time * e
        expected.append((weight * z + time + y - (e - x)).square().mean())
    expected = torch.stack(expected)
    equal(seen[0][0][2], 0.4 * data[2] + 0.6 * noise[2], 'the input z of the network for a sample at t = 0.6')
    assert torch.equal(seen[0][1], t) and torch.equal(seen[0][2], label), 'velocity should receive t and label'
    equal(error, expected, "the samples' errors")
    equal(torch.autograd.grad(error.sum(), weight)[0], torch.autograd.grad(expected.sum(), weight)[0], 'the gradient')


def stub(flow, net, **changes):
    """A Flow of points in the plane with any function as its network."""
    model = flow.Flow(flow.Config(image_size=0, channels=2, n_classes=3, n_layer=1, n_embd=8, **changes))
    model.net = torch.nn.Module()
    model.net.forward = net
    return model


def Flow_forward(flow):
    """The training loss: the mean of `flow_matching_loss` with self.velocity over the batch's data, noise, t and label.
    If self.training, labels with batch['dropped'] are replaced by n_classes, the null label.
    Logs, detached: 'loss', the sum and number of the samples' errors; 't_0_0.25', 't_0.25_0.5', 't_0.5_0.75' and
    't_0.75_1', the same for the samples in each quarter of t; 'tokens', B times the number of patches of an image (of
    vectors, B), and 1."""
    seen = []

    def net(z, t, label):
        seen.append(label)
        return weight * z + t[:, None] + label[:, None]
    weight = torch.tensor([0.5, -2.0], requires_grad=True)
    batch = dict(data=torch.randn(4, 2), noise=torch.randn(4, 2), t=torch.tensor([0.1, 0.3, 0.6, 0.7]),
                 label=torch.tensor([0, 1, 2, 0]), dropped=torch.tensor([False, True, False, True]))
    model = stub(flow, net)
    model.eval()(dict(batch))
    assert torch.equal(seen.pop(), batch['label']), 'in evaluation no label should be dropped'
    loss, logs = model.train()(dict(batch))
    labels = torch.tensor([0, 3, 2, 3])
    assert torch.equal(seen[0], labels), 'in training, dropped labels should become the null label, n_classes = 3'
    errors = []
    for x, e, t, label in zip(batch['data'], batch['noise'], batch['t'], labels):
        z = (1 - t) * x + t * e
        errors.append((weight * z + t + label - (e - x)).square().mean())
    errors = torch.stack(errors).detach()
    equal(loss, errors.mean(), 'the loss')
    assert torch.autograd.grad(loss, weight)[0].abs().sum() > 0, 'no gradient reaches the network'
    equal(logs['loss'], torch.stack((errors.sum(), torch.tensor(4.0))), "logs['loss'], sum and number of errors,")
    equal(logs['t_0.5_0.75'], torch.stack((errors[2:].sum(), torch.tensor(2.0))), "logs['t_0.5_0.75']")
    equal(logs['t_0.75_1'], torch.zeros(2), "logs['t_0.75_1'], of no samples,")
    equal(logs['tokens'], torch.tensor([4.0, 1.0]), "logs['tokens'] of 4 vectors")
    assert not any(value.requires_grad for value in logs.values()), 'logs should be detached: they keep the graph alive'


def Block_forward(flow):
    """Adaptive normalisation, adaLN (DiT, 2212.09748, figure 3): the condition c (B, D) modulates both branches of a
    block. self.modulation gives six vectors per sample: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp.
    The input of a branch is rms_norm(x) * (1 + scale) + shift; its output, times (1 + gate), is added to x (B, N, D).
    (DiT's gates are 0 at initialisation; here self.modulation and the output matrices of the branches are.)"""
    block = lively(flow.Block(flow.Config(n_embd=16, n_head=2, mlp_hidden_dim=24))).double()
    x, c = torch.randn(2, 4, 16).double(), torch.randn(2, 16).double()
    rope = [part.double() for part in flow.rope_cos_sin(torch.arange(4)[:, None], 8, 100)]
    names = [f'only a {what} of the {branch}' for branch in ('attention', 'MLP') for what in ('shift', 'scale', 'gate')]
    everything, bias = block.modulation.weight.data.clone(), torch.randn(6, 16).double()
    for only in ('no modulation', *names, 'all six'):
        part = torch.tensor([only in (name, 'all six') for name in names])
        block.modulation.weight.data = everything * part.repeat_interleave(16)[:, None]
        block.modulation.bias.data = (bias * part[:, None]).flatten()
        six = (c @ block.modulation.weight.T + block.modulation.bias).view(2, 6, 1, 16)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six.unbind(1)
        y = x + (1 + gate_msa) * block.attention(flow.rms_norm(x) * (1 + scale_msa) + shift_msa, rope)
        y = y + (1 + gate_mlp) * block.mlp(flow.rms_norm(y) * (1 + scale_mlp) + shift_mlp)
        equal(block(x, c, rope), y, f'the output x of the block, with {only}')


def euler(flow):
    """Euler's method: one step of length h for dz/dt = velocity_fn(z, t), by the velocity at its start. From noise to
    data h is negative."""
    z = torch.tensor([1.0, 2.0])
    expected = torch.tensor([1 - 0.1 * 3.5, 2 - 0.1 * 6.5])
    equal(flow.euler(lambda z, t: 3 * z + t, z, 0.5, -0.1), expected,
          'z = (1, 2) after a step of h = -0.1 from t = 0.5, dz/dt = 3 z + t,')


def solve(flow):
    """The loop of every fixed-step solver: go from each of the times to the next by step(velocity_fn, z, t, h).
    SOLVERS[method] is (step, evaluations per step). Return the trajectory (S + 1, B, ...), which includes the first z,
    and nfe, the number of function evaluations."""
    calls = []

    def velocity_fn(z, t):
        calls.append(t)
        return 2 * z + t
    times, z = torch.tensor([1.0, 0.7, 0.5, 0.0]), torch.tensor([[1.0, -1.0]])
    states, nfe = flow.solve(velocity_fn, z, times)
    expected = [z]
    for a, b in ((1.0, 0.7), (0.7, 0.5), (0.5, 0.0)):
        expected.append(expected[-1] + (b - a) * (2 * expected[-1] + a))
    equal(states, torch.stack(expected), 'the trajectory by Euler through the times 1, 0.7, 0.5, 0')
    assert nfe == 3 == len(calls), f'3 steps by Euler: {len(calls)} evaluations, nfe = {nfe}, should be 3'
    for method in ('midpoint', 'heun'):
        calls.clear()
        states, nfe = flow.solve(velocity_fn, z, times, method)
        assert len(states) == 4, f'{method}: 3 steps have 4 states, these are {len(states)}'
        assert nfe == 6 == len(calls), f'3 steps by {method}: {len(calls)} evaluations, nfe = {nfe}, should be 6'


def cfg_velocity(flow):
    """Classifier-free guidance (2207.12598) within an interval of times (2404.07724). Return velocity_fn(z, t) of a
    number t; velocity(z, t, label) needs one time per sample, (B,).
    Guided: uncond + guidance_scale * (cond - uncond), where uncond is the velocity for null_label, from one evaluation
    of a batch of 2B samples. If the scale is 1, or t is outside of the interval (closed: its ends are inside), the
    velocity for the label, from one evaluation of the batch of B."""
    sizes, table = [], torch.tensor([1.0, 10.0, 100.0])

    def velocity(z, t, label):
        assert t.shape == label.shape == (len(z),), (
            f'velocity needs one time and one label for each of {len(z)} samples, but received shapes '
            f'{tuple(t.shape)} and {tuple(label.shape)}')
        sizes.append(len(z))
        return z * table[label][:, None] + t[:, None]
    z, label = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    cond, uncond = z * table[label][:, None] + 0.5, z * 100 + 0.5
    for scale in (0.0, 2.0, 5.0):
        equal(flow.cfg_velocity(velocity, label, 2, scale)(z, 0.5), uncond + scale * (cond - uncond),
              f'the velocity at scale {scale:g} (0 ignores the label)')
    assert sizes == [4, 4, 4], 'with and without the label: one evaluation of a batch twice as large'
    sizes.clear()
    equal(flow.cfg_velocity(velocity, label, 2, 1.0)(z, 0.5), cond, 'the velocity at scale 1, no guidance,')
    assert sizes == [2], 'scale 1 needs one evaluation of the batch as it is'
    inside = flow.cfg_velocity(velocity, label, 2, 3.0, (0.2, 0.5))
    equal(inside(z, 0.5), uncond + 3 * (cond - uncond), 'the velocity at the end of the interval (0.2, 0.5)')
    for t in (0.1, 0.9):
        equal(inside(z, t), z * table[label][:, None] + t, f'the velocity at t = {t}, outside of the interval,')


EXERCISES = {
    'interpolate': (2, interpolate),
    'flow_matching_loss': (2, flow_matching_loss),
    'euler': (1, euler),
    'cfg_velocity': (4, cfg_velocity),
    'sample_timesteps': (3, sample_timesteps),
    'solve': (2, solve),
    'Block.forward': (4, Block_forward),
    'Flow.forward': (2, Flow_forward),
}
