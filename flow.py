"""
Chapter 4. Flow matching: generate continuous data by following a learned velocity field from noise to data.

A line z_t = (1 - t) x + t e connects a data sample x to a noise sample e. From z_t and t, a network learns the line's
velocity e - x by least squares; where lines cross it learns the mean E[e - x | z_t], the marginal velocity field.
To sample from the data distribution, solve dz/dt = v_theta(z, t) from noise at t = 1 to t = 0.

    loss = mean of (v - v_theta(z_t, t))^2 over x, e, t and values,    z_t = (1 - t) x + t e,    v = e - x

A batch is {'image': (B, H, W) or (B, H, W, C) integers 0..255} or {'point': (B, d)}, and 'label': (B,) if any.
prepare_batch samples noise, t (B,) and labels to drop (B,); forward: z_t, the loss; train.py: backward, a step, EMA.

    python train.py config/flow_mnist.py
    python sample.py --out_dir=out/flow_mnist --steps=20

Papers: flow matching (2210.02747), rectified flow (2209.03003), DiT (2212.09748), logit-normal t (2403.03206), guidance
(2207.12598) in an interval (2404.07724), minibatch OT (2302.00482), likelihood (1810.01367), x-prediction (2511.13720).
What differs: time runs from data (t = 0) to noise (t = 1), in many of these papers the reverse; timesteps are
stratified; OT pairs are approximate; pixels, not DiT's latents; gpt.py's layers; adaLN gates start at 1, not at 0.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import MLP, Attention, rms_norm, rope_cos_sin

MARGIN, SCALE = 1e-6, 6  # dequantize's logits / SCALE end at ln(1e-6) / 6 = -2.3 and 2.3


@dataclass
class Config:
    image_size: int = 28          # H = W, pixels; 0: the data are vectors; set by the data set
    channels: int = 1             # C of an image, d of a vector; set by the data set
    n_classes: int = 10           # 0: no labels; set by the data set
    patch_size: int = 4           # p, pixels; an image has N = (image_size / p)^2 tokens
    n_layer: int = 4              # number of blocks; for vectors, of D x D layers
    n_head: int = 4               # nh, attention heads per block
    n_embd: int = 128             # D, the width
    mlp_hidden_dim: int = 256     # hidden units of SwiGLU
    logits: bool = False          # logit-transform the pixels: needed for a good likelihood of digits
    prediction: str = 'velocity'  # what the network outputs: velocity, or x, the data (for patches of > D values)
    label_dropout: float = 0.1    # fraction of training samples without their label; guidance needs some
    timestep_sampling: str = 'logit_normal'  # logit_normal (good samples in few steps), uniform (good likelihood)
    timestep_shift: float = 1.0   # > 1: more timesteps and solver steps near the noise; for large images
    ot_rounds: int = 0            # rounds of exchanges that pair noise with data by minibatch OT; 0: independent pairs


def interpolate(data, noise, t):
    """z_t and its velocity dz/dt, both (B, ...), at t (B,), on straight lines from data to noise (2209.03003, eq. 1).
    Data 2, noise -2, t = 0.25: z = 0.75 * 2 + 0.25 * -2 = 1, velocity = -4."""
    t = t.view(-1, *[1] * (data.ndim - 1))  # (B, 1, ...)
    return (1 - t) * data + t * noise, noise - data


def flow_matching_loss(velocity, data, noise, t, label):
    """Squared error (B,) of velocity(z (B, ...), t (B,), label (B,)), mean over a sample's values (2210.02747)."""
    z, target = interpolate(data, noise, t)
    return (velocity(z, t, label) - target).square().flatten(1).mean(1)


def euler(velocity_fn, z, t, h):
    """One step from t to t + h of dz/dt = velocity_fn(z, t), t a number; from noise to data h < 0."""
    return z + h * velocity_fn(z, t)


def cfg_velocity(velocity, label, null_label, guidance_scale, guidance_interval=(0.0, 1.0)):
    """velocity_fn(z, t), t a number, with classifier-free guidance, uncond + s (cond - uncond) (2207.12598): a batch of
    2B, twice the cost. s = 1 is no guidance; outside of the interval there is none (2404.07724)."""
    def velocity_fn(z, t):
        time = z.new_full((len(label),), t)  # (B,)
        if guidance_scale == 1 or not guidance_interval[0] <= t <= guidance_interval[1]:
            return velocity(z, time, label)
        labels = torch.cat((label, torch.full_like(label, null_label)))  # (2B,)
        cond, uncond = velocity(torch.cat((z, z)), time.repeat(2), labels).chunk(2)  # (B, ...) each
        return uncond + guidance_scale * (cond - uncond)
    return velocity_fn


def shift_timesteps(t, timestep_shift):
    """Move times towards the noise, 0.5 to 0.75 by a shift of 3: larger images need more noise (2403.03206, eq. 23)."""
    return timestep_shift * t / (1 + (timestep_shift - 1) * t)


def sample_timesteps(n, timestep_sampling, timestep_shift, generator):
    """Times (n,): uniform, or sigmoid(N(0, 1)), more in the middle (2403.03206, section 3.1). Stratified: one u in
    each of n equal parts of 0..1, so that the loss is less noisy: for n = 2, one time is below the median."""
    u = ((torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n).clamp(1e-6, 1 - 1e-6)
    return shift_timesteps(u if timestep_sampling == 'uniform' else torch.special.ndtri(u).sigmoid(), timestep_shift)


def ot_pairing(data, noise, label, ot_rounds, generator):
    """Indices (B,) of the noise (B, d) for data (B, d): approximate minibatch optimal transport (2302.00482), so that
    lines cross less. In a round, random pairs of equal label swap noise if that lowers the sum of squared lengths, i.e.
    (x_i - x_j) . (e_i - e_j) < 0. Data 0, 1, noise 5, 3: -1 * 2 < 0: swap to 3, 5, as 9 + 16 < 25 + 4."""
    order = torch.arange(len(data))
    pairs = (label + torch.rand(ot_rounds, len(data), generator=generator)).argsort()[:, :len(data) // 2 * 2]
    first, second = pairs.view(ot_rounds, -1, 2).unbind(2)  # (ot_rounds, B / 2): neighbours, sorted by label
    delta = (data[first] - data[second]) * (label[first] == label[second])[..., None]  # 0, no swap, if labels differ
    for i, j, dx in zip(first, second, delta):
        a, b = order[i], order[j]  # (B / 2,): noise of i, of j
        swap = (dx * (noise[a] - noise[b])).sum(1) < 0
        order[i], order[j] = torch.where(swap, b, a), torch.where(swap, a, b)
    return order


# ----- Solvers of dz/dt = velocity_fn(z, t), and the likelihood -------------------------------------------------------
def midpoint(velocity_fn, z, t, h):
    return z + h * velocity_fn(z + h / 2 * velocity_fn(z, t), t + h / 2)


def heun(velocity_fn, z, t, h):
    k = velocity_fn(z, t)
    return z + h / 2 * (k + velocity_fn(z + h * k, t + h))


SOLVERS = dict(euler=(euler, 1), midpoint=(midpoint, 2), heun=(heun, 2))  # step, evaluations per step


def solve(velocity_fn, z, times, method='euler'):
    """z (B, ...) at times[0] -> trajectory (S + 1, B, ...) at times (S + 1,), and nfe, the function evaluations."""
    (step, evaluations), trajectory = SOLVERS[method], [z]
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        trajectory.append(step(velocity_fn, trajectory[-1], t, t_next - t))
    return torch.stack(trajectory), evaluations * (len(times) - 1)


# Dormand and Prince (1980): weights of the slopes k for stages 2 to 7; the last row is also the solution of order 5
DORMAND_PRINCE = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561,
    -212 / 729), (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
ERROR_COEFFS = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4


def dopri5(velocity_fn, z, start, end, tolerance=1e-4, max_nfe=1000):
    """z at `end`, and nfe. An adaptive step is accepted if error / (tolerance (1 + |z|)) has a root mean square of at
    most 1 over the batch. Raises ValueError beyond max_nfe evaluations or if steps vanish."""
    def mix(weights, k):
        return sum(w * k_i for w, k_i in zip(weights, k) if w)
    t, h, k, nfe = start, (end - start) / 20, [velocity_fn(z, start)], 1
    while abs(end - t) > 1e-9:
        if nfe + 6 > max_nfe or not math.isfinite(h) or abs(h) < 1e-9:
            raise ValueError(f'dopri5 is at t={t:.4g} after {nfe} evaluations: raise {max_nfe=} or {tolerance=:g}')
        h = min(h, end - t) if end > start else max(h, end - t)
        for weights in DORMAND_PRINCE:
            z_next = z + h * mix(weights, k)
            k.append(velocity_fn(z_next, t + h * sum(weights)))  # a row's sum is its stage's time
        scale = tolerance * (1 + torch.maximum(z.abs(), z_next.abs()))
        error, nfe = (h * mix(ERROR_COEFFS, k) / scale).square().mean().sqrt().item(), nfe + 6
        t, z, k = (t + h, z_next, k[-1:]) if error <= 1 else (t, z, k[:1])  # the last slope is the next step's first
        h *= min(5, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
    return z, nfe


def divergence(velocity_fn, z, t, probes=None):
    """v and div v (B,) at z (B, ...): the sum of p^T J p, J = dv/dz, over probes p (n, B, ...), one backward pass each.
    Exact for the unit vectors (default), unbiased for random signs / sqrt(n) (Hutchinson; 1810.01367, sec. 3.1)."""
    if probes is None:
        probes = torch.eye(z[0].numel(), device=z.device).view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity_fn(z, t)
        products = [torch.autograd.grad(v, z, p, retain_graph=True)[0] * p for p in probes]
    return v.detach(), sum(product.flatten(1).sum(1) for product in products)


def log_likelihood(velocity_fn, x, probes=None, tolerance=1e-4, max_nfe=1000):
    """ln p(x) in nats (B,), and nfe: ln N(z_1; 0, I) + integral of div v over t in 0..1 on the trajectory from z_0 = x,
    as d ln p / dt = -div v (1806.07366, theorem 1). Raises ValueError, see `dopri5`."""
    def augmented(state, t):  # (B, d + 1): z, and the integral up to t
        v, div = divergence(velocity_fn, state[:, :-1].view(x.shape), t, probes)
        return torch.cat((v.flatten(1), div[:, None]), 1)
    state, nfe = dopri5(augmented, F.pad(x.flatten(1), (0, 1)), 0.0, 1.0, tolerance, max_nfe)
    z, integral = state[:, :-1], state[:, -1]
    return integral - z.square().sum(1) / 2 - z.size(1) / 2 * math.log(2 * math.pi), nfe


# ----- Networks and model ---------------------------------------------------------------------------------------------
def dequantize(image, generator, logits=False):
    """Integers (B, H, W) or (B, H, W, C) -> x = (integer + U(0, 1)) / 128 - 1, (B, C, H, W) in [-1, 1] (1511.01844), or
    logit((x + 1) / 2) / SCALE (1605.08803, section 4.1): widens grey level 0 from 0.008, too thin to learn, to 1.4."""
    x = torch.rand(image.shape, generator=generator).add_(image).div_(128).sub_(1)
    x = torch.logit(0.5 + (0.5 - MARGIN) * x) / SCALE if logits else x
    return x[:, None] if x.ndim == 3 else x.movedim(-1, 1)


class ConditionEmbedder(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.label_embedding = nn.Embedding(config.n_classes + 1, D)  # the last row: no label
        self.timestep_mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t, label):
        sinusoids = torch.cat(rope_cos_sin(100 * t[:, None], self.label_embedding.embedding_dim, rope_base=1000), -1)
        return self.timestep_mlp(sinusoids) + self.label_embedding(label)  # (B, D): timestep and label


class Block(nn.Module):
    """Block with adaLN (2212.09748, fig. 3): c (B, D) gives each branch a shift, a scale, a gate; x (B, N, D)."""
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.n_embd, config.n_head)
        self.mlp = MLP(config.n_embd, config.mlp_hidden_dim, 'swiglu')
        self.modulation = nn.Linear(config.n_embd, 6 * config.n_embd)

    def forward(self, x, c, rope):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + (1 + gate_msa) * self.attention(rms_norm(x) * (1 + scale_msa) + shift_msa, rope)  # (B, N, D)
        return x + (1 + gate_mlp) * self.mlp(rms_norm(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    """Prediction for images z (B, C, H, W), t (B,) and label (B,): shaped like z."""
    def __init__(self, config):
        super().__init__()
        D, p, H = config.n_embd, config.patch_size, config.image_size
        assert p > 0 and H % p == 0, f'image_size={H} must be a multiple of patch_size={p}'
        self.patch_size, self.side, patch_dim = p, H // p, config.channels * p ** 2  # N = side^2
        self.condition = ConditionEmbedder(config)
        self.patch_embedding = nn.Linear(patch_dim, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, patch_dim)
        # a block is the identity at first: gpt.py's output matrices are 0, gates 1 (DiT: gates 0; both 0: no gradient)
        for layer in (*(block.modulation for block in self.blocks), self.final_modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        positions = torch.cartesian_prod(torch.arange(self.side), torch.arange(self.side))  # (N, 2): row, column
        self.register_buffer('rope', torch.stack(rope_cos_sin(positions, D // config.n_head, 100)), persistent=False)

    def forward(self, z, t, label):
        c = F.silu(self.condition(t, label))  # (B, D)
        x = F.pixel_unshuffle(z, self.patch_size)  # (B, C p p, H / p, W / p): MNIST (B, 1, 28, 28) -> (B, 16, 7, 7)
        x = self.patch_embedding(x.flatten(2).mT)  # (B, N, D): (B, 49, 16) -> (B, 49, 128)
        for block in self.blocks:
            x = block(x, c, self.rope)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = self.head(rms_norm(x) * (1 + scale) + shift)  # (B, N, C p p)
        return F.pixel_shuffle(x.mT.unflatten(2, (self.side, self.side)), self.patch_size).float()  # (B, C, H, W)


class MLPNet(nn.Module):
    """Prediction for vectors z (B, d), t (B,) and label (B,): (B, d)."""
    def __init__(self, config):
        super().__init__()
        assert not config.logits, 'logits=True is for images, and these data are points: leave it out'
        self.condition, D = ConditionEmbedder(config), config.n_embd
        self.embedding = nn.Linear(config.channels, D)
        self.layers = nn.Sequential(*(nn.Sequential(nn.SiLU(), nn.Linear(D, D)) for _ in range(config.n_layer)))
        self.head = nn.Linear(D, config.channels)
        nn.init.zeros_(self.head.weight)

    def forward(self, z, t, label):
        return self.head(F.silu(self.layers(self.embedding(z) + self.condition(t, label)))).float()  # (B, d)


class Flow(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name, choices in dict(timestep_sampling=('uniform', 'logit_normal'), prediction=('velocity', 'x')).items():
            assert getattr(config, name) in choices, f'{name}={getattr(config, name)!r} must be {" or ".join(choices)}'
        assert 0 <= config.label_dropout < 1, f'label_dropout={config.label_dropout} must be at least 0 and below 1'
        assert config.timestep_shift > 0 and config.ot_rounds >= 0, 'timestep_shift must be > 0, ot_rounds at least 0'
        self.config, H = config, config.image_size
        self.shape = (config.channels, H, H) if H else (config.channels,)  # of one sample
        self.batch_keys = ('image' if H else 'point', *['label'] * (config.n_classes > 0))
        self.net = (DiT if H else MLPNet)(config)

    def prepare_batch(self, batch, generator, step_generator):
        """Dequantize; sample noise, pairs, drops and timesteps; step_generator: unused."""
        config, B = self.config, len(batch[self.batch_keys[0]])
        data = dequantize(batch['image'], generator, config.logits) if config.image_size else batch['point']
        label = batch['label'] if config.n_classes else torch.zeros(B, dtype=torch.long)
        noise = torch.randn(data.shape, generator=generator)
        if config.ot_rounds:
            noise = noise[ot_pairing(data.flatten(1), noise.flatten(1), label, config.ot_rounds, generator)]
        dropped = torch.rand(B, generator=generator) < config.label_dropout
        t = sample_timesteps(B, config.timestep_sampling, config.timestep_shift, generator)
        return dict(data=data, noise=noise, label=label, dropped=dropped, t=t)

    def velocity(self, z, t, label):
        """Velocity (B, ...) at z, t (B,), label (B,); from a prediction of x, (z - x) / t. Noise fills all dimensions,
        data lie near a manifold of few: a network narrower than a patch can predict x, but not v (2511.13720)."""
        prediction, t = self.net(z, t, label), t.clamp(min=0.02).view(-1, *[1] * (z.ndim - 1))  # no division by 0
        return prediction if self.config.prediction == 'velocity' else (z - prediction) / t

    def forward(self, batch):
        """A prepared batch -> the loss, and logs, (sum, count) each: loss, the loss by quarters of t, tokens."""
        label, t_bin = batch['label'], (4 * batch['t']).long().clamp(max=3)  # t = 0.3 is in bin 1
        if self.training:  # like dropout, not in evaluation: replace by the null label
            label = label.masked_fill(batch['dropped'], self.config.n_classes)
        error = flow_matching_loss(self.velocity, batch['data'], batch['noise'], batch['t'], label)  # (B,)
        logs = {f't_{i / 4:g}_{(i + 1) / 4:g}': t_bin == i for i in range(4)} | {'loss': t_bin >= 0}
        logs = {name: torch.stack((error.detach().where(rows, 0).sum(), rows.sum())) for name, rows in logs.items()}
        tokens = error.new_full((), len(error) * max(1, self.config.image_size // self.config.patch_size) ** 2)
        return error.mean(), logs | {'tokens': torch.stack((tokens, torch.ones_like(tokens)))}

    def velocity_fn(self, label, guidance=1.0, guidance_interval=(0.0, 1.0)):
        """velocity_fn(z, t) for labels (B,); n_classes: null label. Raises ValueError if out of range."""
        null_label = self.config.n_classes
        if len(label) and not 0 <= label.min() <= label.max() <= null_label or not abs(guidance) <= 1e3:
            raise ValueError(f'{guidance=} must be from -1000 to 1000, labels from 0 to {null_label} (no label)')
        if guidance != 1 and not (self.config.label_dropout and null_label):
            raise ValueError('guidance needs a model that was trained with labels, and with label_dropout above 0')
        return cfg_velocity(self.velocity, label, null_label, guidance, guidance_interval)

    @torch.no_grad()
    def generate(self, label, steps=20, method='euler', guidance=1.0, guidance_interval=(0.0, 1.0), generator=None):
        """Noise to data for labels (B,): trajectory (steps + 1, B, ...) and nfe. Raises ValueError if out of range."""
        if steps < 1 or not 0 <= guidance_interval[0] < guidance_interval[1] <= 1 or method not in SOLVERS:
            raise ValueError(f'{steps=} must be > 0, {method=} in {[*SOLVERS]}, {guidance_interval=} rising in 0..1')
        noise = torch.randn(len(label), *self.shape, generator=generator, device=label.device)
        times = shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.double), self.config.timestep_shift)
        return solve(self.velocity_fn(label, guidance, guidance_interval), noise, times, method)


Model = Flow
