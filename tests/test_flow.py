"""Flow matching: solvers against equations with known solutions, guidance, likelihoods, the network, the data."""
import io
import math
import tarfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import flow
import sample
import train
from config import UserError
from lab import flow as lab_flow
from lab import score, transfer
from lab.statistics import read_scores
from prepare import cifar10, cifar10_modalities, folder, judge, pictures, toy2d
from tests.test_download import server  # noqa: F401, a fixture

TINY = dict(n_layer=2, n_head=2, n_embd=16, mlp_hidden_dim=16, patch_size=4, image_size=8)
RUN = dict(model='flow', n_layer=1, n_head=2, n_embd=16, mlp_hidden_dim=16, batch_size=8, micro_batch_size=8,
           max_iters=2, eval_iters=1, ema=0.9, device='cpu', dtype='float32', compile=False, pictures=False)


def random_model(**changes):
    """A small model whose zero-initialised matrices have moved."""
    torch.manual_seed(0)
    model = flow.Flow(flow.Config(**(TINY | changes)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Solvers

def decay(z, t):
    """dz/dt = -z cos t: z(t) = z(0) exp(-sin t)."""
    return -z * math.cos(t)


@pytest.mark.parametrize('method, order', [('euler', 1), ('midpoint', 2), ('heun', 2)])
def test_order_of_convergence(method, order):
    start, truth, errors = torch.ones(3, dtype=torch.float64), math.exp(-math.sin(2)), []
    for steps in (20, 40, 80):
        trajectory, nfe = flow.solve(decay, start, torch.linspace(0, 2, steps + 1, dtype=torch.float64), method)
        assert trajectory.shape == (steps + 1, 3) and nfe == steps * order and (trajectory[0] == start).all()
        errors.append(abs(trajectory[-1, 0].item() - truth))
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_adaptive_order_and_count():
    errors, calls = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        n = [0]

        def velocity(z, t):
            n[0] += 1
            return decay(z, t)
        end, nfe = flow.dopri5(velocity, torch.ones(2, dtype=torch.float64), 2.0, 0.0, tolerance)
        assert nfe == n[0]
        errors.append(abs(end[0].item() - math.exp(math.sin(2))))
        calls.append(nfe)
    assert errors[0] < 1e-3 and errors[1] < 1e-5 and errors[2] < 1e-7 and calls[0] < calls[1] < calls[2]
    assert calls[2] / calls[0] < 10  # of order 5: a ten-thousandth of the error for 10000^(1/5) = 6 times the steps


def test_dormand_prince_is_of_order_5():
    errors = []
    for steps in (4, 8, 16):  # fixed steps: a tolerance that accepts all, one call a step
        z = torch.ones(1, dtype=torch.float64)
        for i in range(steps):
            t, h, k = 2 * i / steps, 2 / steps, [decay(z, 2 * i / steps)]
            for weights in flow.DORMAND_PRINCE:
                z_next = z + h * sum(w * k_i for w, k_i in zip(weights, k))
                k.append(decay(z_next, t + h * sum(weights)))
            z = z_next
        errors.append(abs(z.item() - math.exp(-math.sin(2))))
    assert math.log2(errors[1] / errors[2]) > 4.5
    assert sum(flow.ERROR_COEFFS) == pytest.approx(0, abs=1e-12)


def test_the_adaptive_solver_gives_up_in_one_line():
    with pytest.raises(ValueError, match='after 97 evaluations: raise max_nfe=100 or tolerance=1e-08') as error:
        flow.dopri5(lambda z, t: 1000 * torch.cos(1000 * z + t), torch.ones(4), 0.0, 1.0, 1e-8, 100)
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='dopri5 is at t=0 after'):
        flow.dopri5(lambda z, t: z * math.nan, torch.ones(4), 0.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Interpolation, timesteps, pairs

def test_interpolation_and_timesteps():
    data, noise = torch.zeros(5, 3, 2, 2), torch.ones(5, 3, 2, 2)
    z, velocity = flow.interpolate(data, noise, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert (z[:, 0, 0, 0] == torch.tensor([0, 0.25, 0.5, 0.75, 1])).all() and (velocity == 1).all()
    generator = torch.Generator().manual_seed(0)
    uniform = flow.sample_timesteps(1000, 'uniform', 1.0, generator)
    normal = flow.sample_timesteps(1000, 'logit_normal', 1.0, generator)
    assert uniform.sort().values.sub(torch.linspace(0, 1, 1000)).abs().max() < 2e-3  # one from each thousandth
    assert normal.logit().mean().abs() < 0.02 and normal.logit().std() == pytest.approx(1, abs=0.03)
    assert flow.sample_timesteps(1000, 'uniform', 3.0, generator).mean() > 0.6
    assert flow.shift_timesteps(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0, 1]


def test_ot_pairs_are_nearly_optimal():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(64, 2, generator=generator), torch.randn(64, 2, generator=generator)
    one = torch.zeros(64).long()
    order = flow.ot_pairing(data, noise, one, 200, generator)
    assert order.sort().values.equal(torch.arange(64))
    cost = (data[:, None] - noise).square().sum(-1)
    found, best = cost[range(64), order].mean(), cost[range(64), toy2d.assignment(cost.numpy())].mean()
    assert best <= found < 1.25 * best < 0.2 * cost.mean()  # no exchange of two is left, one of three may be
    label = torch.arange(64) % 4
    order = flow.ot_pairing(data, noise, label, 200, generator)
    assert (label == label[order]).all()  # noise is exchanged within a class alone


def test_exact_assignment():
    random = np.random.default_rng(0)
    for n in (1, 2, 6):
        for _ in range(5):
            cost = random.random((n, n))
            best = min(cost[range(n), list(columns)].sum() for columns in permutations(range(n)))
            found = toy2d.assignment(cost)
            assert sorted(found) == list(range(n)) and cost[range(n), found].sum() == pytest.approx(best)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood and guidance

def gaussian_velocity(mean, std):
    """The exact velocity field between N(mean, std^2) and noise: E[noise - data | z_t]."""
    def velocity_fn(z, t):
        variance = (1 - t) ** 2 * std ** 2 + t ** 2
        return -mean + (t - (1 - t) * std ** 2) / variance * (z - (1 - t) * mean)
    return velocity_fn


def test_likelihood_of_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.3 * torch.randn(200, 2, generator=generator)
    truth = -(x - 0.5).square().sum(1) / 2 / 0.09 - math.log(2 * math.pi * 0.09)
    velocity_fn = gaussian_velocity(0.5, 0.3)
    found, nfe = flow.log_likelihood(velocity_fn, x, tolerance=1e-5)
    assert (found - truth).abs().max() < 0.01 * 2 and nfe < 200  # nats; 2 dimensions
    noise = flow.dopri5(velocity_fn, x, 0.0, 1.0)[0]
    assert (flow.dopri5(velocity_fn, noise, 1.0, 0.0)[0] - x).abs().max() < 1e-2  # there and back


def test_hutchinson_agrees_with_the_exact_trace():
    model, generator = random_model(), torch.Generator().manual_seed(0)
    x, label = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1, torch.tensor([0, 3, 9, 10])

    def log_prob(probes=None):
        return flow.log_likelihood(model.velocity_fn(label), x, probes, 1e-3)[0]
    exact = log_prob()
    estimates = torch.stack([log_prob(lab_flow.rademacher_probes(x, 1, generator)) for _ in range(24)])
    error = estimates.std(0) / 24 ** 0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error + 1e-2).all() and (error > 0).all()


def test_guidance():
    model, label = random_model(channels=3), torch.tensor([1, 2])
    z, t = torch.randn(2, 3, 8, 8), 0.4
    with torch.no_grad():
        cond, uncond = model.velocity_fn(label)(z, t), model.velocity_fn(torch.full_like(label, 10))(z, t)
        assert torch.equal(model.velocity_fn(label, 1.0)(z, t), cond)  # s = 1 is no guidance
        guided = model.velocity_fn(label, 3.0)(z, t)
        assert torch.allclose(guided, uncond + 3 * (cond - uncond), atol=1e-5)
        assert ((guided - cond).abs().amax((0, 2, 3)) > 1e-4).all()  # on all channels
        assert torch.equal(model.velocity_fn(label, 3.0, (0.5, 0.9))(z, t), cond)  # outside of its interval


def test_generation():
    model, label = random_model(), torch.tensor([3, 4, 5])
    for method, evaluations in (('euler', 6), ('heun', 12)):
        a, nfe = model.generate(label, 6, method, 2.0, generator=torch.Generator().manual_seed(1))
        b, _ = model.generate(label, 6, method, 2.0, generator=torch.Generator().manual_seed(1))
        assert a.shape == (7, 3, 1, 8, 8) and nfe == evaluations and torch.equal(a, b)  # same seed, same image
    assert not torch.equal(a, model.generate(label, 6, method, 2.0, generator=torch.Generator().manual_seed(2))[0])


@pytest.mark.parametrize('changes, arguments, message', [
    ({}, dict(steps=0), 'steps=0 must be > 0'),
    ({}, dict(label=torch.tensor([11])), 'labels from 0 to 10'),
    ({}, dict(label=torch.tensor([-1])), 'labels from 0 to 10'),
    ({}, dict(method='rk4'), "method='rk4' in ..euler', 'midpoint', 'heun'"),
    ({}, dict(guidance_interval=(0.8, 0.1)), 'guidance_interval=.0.8, 0.1. rising in 0..1'),
    *[({}, dict(guidance=s), 'must be from -1000 to 1000') for s in (math.inf, -math.inf, math.nan, 1e50, 1001)],
    (dict(label_dropout=0.0), dict(guidance=2.0), 'guidance needs a model that was trained with labels'),
    (dict(n_classes=0), dict(guidance=2.0, label=torch.tensor([0])), 'guidance needs a model'),
])
def test_faults_of_generation(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        random_model(**changes).generate(**(dict(label=torch.tensor([1])) | arguments))


@pytest.mark.parametrize('changes, message', [
    (dict(patch_size=3), 'image_size=8 must be a multiple of patch_size=3'),
    (dict(timestep_sampling='normal'), "timestep_sampling='normal' must be uniform or logit_normal"),
    (dict(prediction='noise'), "prediction='noise' must be velocity or x"), (dict(label_dropout=1.0), 'below 1'),
    (dict(image_size=0, logits=True), 'logits=True is for images, and these data are points: leave it out'),
    (dict(timestep_shift=0.0), 'timestep_shift must be > 0'), (dict(ot_rounds=-1), 'ot_rounds at least 0')])
def test_faults_of_the_config(changes, message):
    with pytest.raises(AssertionError, match=message):
        flow.Flow(flow.Config(**(TINY | changes)))


# ---------------------------------------------------------------------------------------------------------------------
# The network

def test_prepared_batch_and_first_loss():
    model = flow.Flow(flow.Config(**TINY | dict(channels=3, label_dropout=0.5)))
    generator = torch.Generator().manual_seed(0)
    raw = dict(image=torch.randint(256, (40, 8, 8, 3)), label=torch.arange(40) % 10)
    batch = model.prepare_batch(raw, generator, None)
    assert batch['data'].shape == batch['noise'].shape == (40, 3, 8, 8) and batch['data'].abs().max() <= 1
    assert torch.equal(lab_flow.to_uint8(batch['data']).long(), raw['image'])
    assert torch.equal(batch['label'], raw['label']) and 8 < batch['dropped'].sum() < 32
    loss, logs = model(batch)
    expected = (batch['noise'] - batch['data']).square().mean().item()  # the first prediction is 0
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sum(logs[name][1] for name in logs if name.startswith('t_')) == 40 and logs['tokens'][0] == 40 * 4
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_labels_are_dropped_in_training_only():
    model, generator = random_model(label_dropout=0.5), torch.Generator().manual_seed(0)
    raw = dict(image=torch.randint(256, (20, 8, 8)), label=torch.arange(20) % 10)
    batch = model.prepare_batch(raw, generator, None)
    with torch.no_grad():
        trained, (validated, _) = model.train()(batch)[0], model.eval()(batch)
        assert validated == model.train()(batch | dict(dropped=torch.zeros(20, dtype=torch.bool)))[0] != trained
        label = torch.where(batch['dropped'], 10, batch['label'])
        assert trained == model.eval()(batch | dict(label=label))[0]


@pytest.mark.parametrize('changes', [{}, dict(prediction='x'), dict(image_size=0, channels=2, ot_rounds=5, n_embd=32)])
def test_learns_one_sample(changes):
    """Each kind of model learns to generate the only sample of its training data."""
    torch.manual_seed(0)
    model = flow.Flow(flow.Config(**TINY | dict(image_size=4, patch_size=2, n_embd=32, n_layer=1) | changes))
    image = torch.zeros(1, 4, 4, dtype=torch.long)
    image[:, 1:3] = 255
    row = dict(image=image) if model.config.image_size else dict(point=torch.tensor([[0.5, -1.0]]))
    row = {name: x.repeat(64, *[1] * (x.ndim - 1)) for name, x in (row | dict(label=torch.tensor([0]))).items()}
    optimizer, generator = torch.optim.Adam(model.parameters(), 2e-2), torch.Generator().manual_seed(0)
    for step in range(80):
        optimizer.param_groups[0]['lr'] = 2e-2 * (1 - step / 80)
        loss, logs = model(model.prepare_batch(row, generator, None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = model.generate(torch.zeros(4, dtype=torch.long), generator=generator)[0][-1]
    truth = image[:, None] / 127.5 - 1 if model.config.image_size else row['point'][:1]
    assert (samples - truth).abs().mean() < 0.6 * truth.abs().mean()


@pytest.mark.parametrize('shape', [dict(channels=3), dict(image_size=0, channels=2)])
def test_x_prediction(shape):
    model = flow.Flow(flow.Config(**TINY | shape | dict(prediction='x'))).eval()
    generator = torch.Generator().manual_seed(0)
    data, noise, label = *torch.randn(2, 5, *model.shape, generator=generator), torch.zeros(5, dtype=torch.long)
    model.net = torch.nn.Module()
    model.net.forward = lambda z, t, label: data  # a perfect prediction
    t = torch.tensor([1.0, 0.7, 0.3, 0.05, 0.02])
    z, velocity = flow.interpolate(data, noise, t)
    assert torch.allclose(model.velocity(z, t, label), velocity, atol=1e-4)
    assert model(dict(data=data, noise=noise, t=t, label=label))[0] < 1e-8
    assert model.velocity(z, 0 * t, label).isfinite().all()
    for times in (torch.tensor([1.0, 0.0]), torch.linspace(1, 0, 11)):
        end = flow.solve(model.velocity_fn(label), noise, times)[0][-1]
        assert torch.allclose(end, data, atol=1e-5)  # for any number of steps


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_densities_of_the_toys():
    grid = toy2d.Dataset.grid(480)
    for name in ('gaussians', 'checkerboard'):
        assert np.exp(toy2d.log_density(name, grid)).sum() * (2 * toy2d.EXTENT / 480) ** 2 == pytest.approx(1, abs=0.01)
        assert np.isfinite(toy2d.log_density(name, toy2d.DRAW[name](500, np.random.default_rng(0)))).all()
    assert toy2d.log_density('moons', grid) is None


def archive_of(files):
    """A gzipped tar of {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def toy_cifar(n=20):
    """Files of CIFAR-10's names and format: a bright channel and its half tell the class."""
    files, random = {}, np.random.default_rng(0)
    for name in ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5', 'test_batch'):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = random.integers(0, 50, (n, 3, 32, 32)).astype(np.uint8)
        for image, label in zip(images, labels):
            image[label % 3, :, 16 * (label // 5):][:, 4 * (label % 5):] = 255
        records = np.concatenate((labels[:, None], images.reshape(n, -1)), 1)
        files[f'cifar-10-batches-bin/{name}.bin'] = records.tobytes()
    return files


@pytest.fixture
def cifar(server, work, monkeypatch):  # noqa: F811
    """A function that serves an archive of these files, and makes a data set from it."""
    monkeypatch.setattr(cifar10, 'URL', server.url)
    monkeypatch.setattr(cifar10, 'MD5', '')
    monkeypatch.setattr(cifar10, 'JUDGE_STEPS', 3)
    monkeypatch.setattr(judge.train_judge, '__defaults__', (0, 3, 16))

    def make(files, module=cifar10, out='data/toy_cifar', **settings):
        server.files[cifar10.ARCHIVE] = files if isinstance(files, bytes) else archive_of(files)
        module.main(out=out, **settings)
    return make


def test_cifar10_end_to_end(cifar, capsys):
    cifar(toy_cifar() | {'../../outside.txt': b'x', '/absolute.txt': b'x'})
    assert not Path('../outside.txt').exists() and not Path('outside.txt').exists()
    first = np.frombuffer(toy_cifar()['cifar-10-batches-bin/data_batch_1.bin'], np.uint8)[1:3073].reshape(3, 32, 32)
    images = np.load('data/toy_cifar/train/image.npy')
    assert images.shape == (100, 2, 32, 32, 3) and (images[0, 0].transpose(2, 0, 1) == first).all()
    assert (images[:, 1] == images[:, 0, :, ::-1]).all() and np.load('data/toy_cifar/val/label.npy').shape == (20,)
    train.main(**RUN, dataset='toy_cifar', out_dir='out/flow_cifar', patch_size=8)
    scores = score.main('--out_dir=out/flow_cifar', '--n_score=20', '--steps=2')
    assert {'squared error', 'bits/dim given the class', '2 steps, NFE 2x2: accuracy',
            '2 steps, NFE 2x2: frechet'} <= scores.keys()


def test_cifar10_in_six_modalities(cifar, monkeypatch):
    monkeypatch.setattr(pictures.train_tokenizer, '__defaults__', (0, 8))  # pictures a step
    cifar(toy_cifar(), cifar10_modalities, 'data/photos', steps=2)
    dataset, index = folder.Dataset('data/photos'), np.arange(20)
    assert dataset.truth('val', 'caption', index)[7] == 'a photo of a horse'
    assert np.load('data/photos/val/label.npy')[7] == 7
    assert dataset.truth('val', 'low', index).shape == (20, 8, 8, 3)
    assert np.load('data/photos/train/edges.npy').shape == (100, 2, 64)
    train.main('config/nano4m_cifar10.py', dataset='photos', max_iters=1, batch_size=4, micro_batch_size=4, n_embd=48,
               eval_iters=1, device='cpu', dtype='float32', compile=False, out_dir='out/photos')
    assert Path('out/photos/sample_000001.png').is_file()
    sample.main('--out_dir=out/photos', '--given=caption', '--text=a photo of a cat', '--target=low', '--n=1')
    transfer.main('--out_dir=out/photos', '--task=label', '--labels=20', '--steps=1', '--n_val=20')
    assert '--steps=1 scratch, 20 labels' in read_scores(Path('out/photos/transfer_label.json'))
    with pytest.raises(UserError, match='data/photos exists already'):
        cifar(toy_cifar(), cifar10_modalities, 'data/photos')


@pytest.mark.parametrize('damage, message', [
    (lambda files: b'no archive', 'not the binary version of CIFAR-10'),
    (lambda files: archive_of(files)[:5000], 'not the binary version of CIFAR-10'),
    (lambda files: {name: files[name] for name in list(files)[:-1]}, "KeyError: 'test_batch.bin'"),
    (lambda files: files | {'cifar-10-batches-bin/test_batch.bin': b'\0' * 3074}, 'its val records are damaged'),
    (lambda files: files | {'cifar-10-batches-bin/test_batch.bin': b'\x0a' * 3073}, 'its val records are damaged')])
def test_damaged_archives(cifar, damage, message):
    with pytest.raises(UserError, match=message) as error:
        cifar(damage(toy_cifar()))
    assert '\n' not in str(error.value)


def test_data_that_is_not_a_number(work):
    toy2d.main(n_train=20, n_val=20, out='data/nan')
    points = np.load('data/nan/train/point.npy')
    points[3, 1] = np.nan
    np.save('data/nan/train/point.npy', points)
    with pytest.raises(UserError, match='holds values that are not finite'):
        train.main(**RUN, dataset='nan', out_dir='out/nan')
    with pytest.raises(UserError, match='choose one of gaussians'):
        toy2d.main(name='circle')
