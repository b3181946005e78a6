"""
Muon for hidden matrices, AdamW for the rest, their learning rates, and the exponential moving average (EMA) of the
weights.
"""
import math
import warnings

import torch
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm

import config
from config import UserError
from engine import devices, threads

FIT = dict(  # settings of `fit`, see train.py
    muon=True, muon_learning_rate=0.02, learning_rate=3e-3, min_lr=0.0, warmup_iters=30, decay=1.0, weight_decay=0.0,
    beta1=0.9, beta2=0.95, momentum=0.95)


# ---------------------------------------------------------------------------------------------------------------------
# Muon

def newton_schulz(x, dtype):
    """Approximately orthogonalizes matrices x (n, rows, columns): U S V' -> U V' (Jordan et al., "Muon", 2024).

    Five steps of X <- aX + bXX'X + c(XX')^2 X bring all singular values into 0.7 .. 1.2. X always equals Y X_0 with a
    square matrix Y of the smaller side, and (Y X_0)(Y X_0)' = Y (X_0 X_0') Y'. For wide matrices in float32 the steps
    therefore update Y alone, which is cheaper; in bfloat16 that form would lose the small singular values.
    """
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    factored = dtype == torch.float32 and x.size(1) < x.size(2)
    y, gram = (torch.ones_like(x[:, :, 0]).diag_embed(), x @ x.mT) if factored else (x, None)
    for _ in range(5):
        square = y @ gram @ y.mT if factored else y @ y.mT  # (n, rows, rows)
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    x = y @ x if factored else y
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum, computed in `dtype`. torch.optim.Muon does the same, but always in
    bfloat16 and one matrix at a time: on a CPU that emulates bfloat16 it took 24 times as long, three quarters of a
    training step."""
    def __init__(self, matrices, lr, momentum, weight_decay, dtype):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # `closure` is unused: torch.distributed.checkpoint calls step(closure=None)
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:  # as in torch.optim: parameters without a gradient are not changed
                    shapes.setdefault(p.shape, []).append(p)
            for same_shape in shapes.values():
                self.update(group, same_shape)

    def update(self, group, matrices):
        """One step for matrices of the same shape, as one batch."""
        rows, columns = matrices[0].shape
        for p in matrices:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        averages = [self.state[p]['momentum_buffer'] for p in matrices]
        gradients = [p.grad for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group['momentum'])
        nesterov = torch.stack(torch._foreach_lerp(gradients, averages, group['momentum']))
        if sharded := isinstance(nesterov, DTensor):  # from some rows of each matrix to some whole matrices
            nesterov = nesterov.redistribute(placements=[Shard(0)])
        steps = newton_schulz(nesterov, self.dtype).to(nesterov.dtype)
        steps = steps.mul_(group['lr'] * max(1, rows / columns) ** 0.5)
        steps = (steps.redistribute(placements=[Shard(1)]) if sharded else steps).unbind()
        torch._foreach_mul_(matrices, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_sub_(matrices, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Which parameter gets which optimizer and learning rate

def lr_multipliers(model, text):
    """'vision_encoder:0.3' -> {parameter: multiplier of its learning rate}. Of several entries with which a
    parameter's name begins, the last one counts; without any it is 1. Raises UserError."""
    multipliers = {parameter: 1.0 for parameter in model.parameters()}
    for entry in text.split():
        part, _, factor = entry.partition(':')
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(part)]
        if not found:
            raise UserError(f'lr_multipliers={text!r}: no parameter begins with {part!r}; the parts are '
                            f'{", ".join(name for name, _ in model.named_children())}')
        multipliers |= dict.fromkeys(found, config.convert('lr_multipliers', factor, f'entry {entry!r}', 1.0))
    if min(multipliers.values()) < 0 or not any(multipliers.values()):
        raise UserError(f'lr_multipliers={text!r}: multipliers must be at least 0, and one above 0')
    return multipliers


def freeze(model, text):
    """Switches off the gradient of parameters whose multiplier is 0."""
    for parameter, multiplier in lr_multipliers(model, text).items():
        parameter.requires_grad_(parameter.requires_grad and multiplier > 0)


def make(model, settings, dtype):
    """[AdamW, Muon], or one of them, for all parameters that have a gradient, in a run with this dtype.

    Muon is for matrices between hidden vectors. Q, K and V are one fused matrix and are orthogonalized together.
    Embeddings and heads are matrices too, but each of their rows belongs to one token: they are for AdamW, as vectors
    are.
    """
    if dtype == torch.float16:  # too narrow a range for the products of Newton-Schulz
        dtype = devices.find_dtype('auto', next(model.parameters()).device)
    groups, multipliers = {}, lr_multipliers(model, settings['lr_multipliers'])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and not any(word in name for word in ('embedding', 'head'))
            key = hidden and settings['muon'], parameter.ndim < 2, multipliers[parameter]
            groups.setdefault(key, []).append(parameter)
    groups = sorted(groups.items(), key=lambda item: item[0])
    adamw = [dict(params=group, lr=settings['learning_rate'] * multiplier,
                  weight_decay=0.0 if vector else settings['weight_decay'])
             for (hidden, vector, multiplier), group in groups if not hidden]
    muon = [dict(params=group, lr=settings['muon_learning_rate'] * multiplier)
            for (hidden, _, multiplier), group in groups if hidden]
    optimizers, betas = [], (settings['beta1'], settings['beta2'])
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, settings['learning_rate'], betas, fused=True))
    if muon:
        lr, momentum = settings['muon_learning_rate'], settings['momentum']
        optimizers.append(Muon(muon, lr, momentum, settings['weight_decay'], dtype))
    for group in param_groups(optimizers):
        group |= dict(initial_lr=group['lr'], capturable=False)
    return optimizers


def param_groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


# ---------------------------------------------------------------------------------------------------------------------
# A step

def lr_factor(step, settings):
    """The learning rate schedule, 0..1: linear warm-up, constant, linear decay to min_lr in the last fraction
    `decay`."""
    left = (settings['max_iters'] - step) / max(1, settings['decay'] * settings['max_iters'])
    return min(1, (step + 1) / max(1, settings['warmup_iters']), settings['min_lr'] + (1 - settings['min_lr']) * left)


def lr_on_device(optimizers, device):
    """Keeps the learning rates as tensors on the device, for CUDA graphs; as numbers if the device is None."""
    # the first steps, before the capture, would warn
    warnings.filterwarnings('ignore', 'This instance was constructed with capturable=True')
    for group in param_groups(optimizers):
        group['lr'] = torch.tensor(group['initial_lr'], device=device) if device else group['initial_lr']
        group['capturable'] = bool(device)  # AdamW's name for a state that CUDA graphs can read


def set_lr(optimizers, settings, step):
    for group in param_groups(optimizers):
        lr = group['initial_lr'] * lr_factor(step, settings)
        group['lr'] = group['lr'].fill_(lr) if isinstance(group['lr'], torch.Tensor) else lr


def clip(model, optimizers, scaler, max_norm):
    """Clips the gradient to the norm max_norm, 0 for no clipping; returns the norm before. Divides by the scaler's
    scale."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def optimizer_step(optimizers, scaler=torch.amp.GradScaler(enabled=False), set_to_none=True):
    """One step of all optimizers, then clears the gradients; with set_to_none=False they become zeros at the same
    address.

    In float16 the scaler multiplies the loss by a scale, so that small gradients do not underflow; after many finite
    steps it raises that scale.
    """
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)
    scaler.update()


@torch.no_grad()
def update_ema(ema_model, model, decay, step):
    """ema <- decay * ema + (1 - decay) * weights; the decay is smaller in the first steps, to forget the initial
    weights. Buffers, such as the running means of BatchNorm, are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)
    for ema_buffer, buffer in zip(ema_model.buffers(), model.buffers()):
        ema_buffer.copy_(buffer)


# ---------------------------------------------------------------------------------------------------------------------
# A whole training run of a small network

def fit(model, loss_of, batch_of, steps, name, lr_multipliers='', device='auto'):
    """Trains a small network with the loss loss_of(model, *batch_of()); the learning rates decay linearly to zero.

    Returns the network in evaluation mode on the CPU. Eager: in a short run, compilation takes longer than it saves.
    Restores the choice of the attention kernel.
    """
    settings = FIT | dict(max_iters=steps, lr_multipliers=lr_multipliers)
    device = devices.find(device)
    dtype = devices.find_dtype('auto', device)
    fused = torch.backends.cuda.flash_sdp_enabled()
    devices.set_up(device)
    try:
        model.to(device).train()
        freeze(model, lr_multipliers)
        optimizers = make(model, settings, dtype)
        bar = tqdm(range(steps), desc=f'train {name}', unit='step')
        for step in bar:
            batch = [tensor.to(device) for tensor in batch_of()]
            with devices.autocast(device, dtype):
                loss = loss_of(model, *batch)
            loss.backward()
            set_lr(optimizers, settings, step)
            optimizer_step(optimizers)
            threads.adapt()
            if step % 20 == 0:
                bar.set_postfix(loss=f'{loss.item():.4f}')
    finally:
        devices.use_fused_attention(fused)
    return model.cpu().eval()
