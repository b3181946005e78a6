"""
One training loop for all chapters: a laptop's CPU, one GPU, or several under torchrun.

    python train.py config/nano4m.py --batch_size=32
    torchrun --nproc_per_node=4 train.py config/nano4m.py --micro_batch_size=4
    python train.py config/nano4m.py --help

Settings come from a config file and the command line (config/__init__.py), the data from data/NAME (made on the first run by
prepare/NAME.py), the model from the chapter that `model` names. The run folder out/CONFIGNAME receives checkpoints, log.jsonl
and sample pictures. Ctrl-C, or a signal of the cluster, lets it save and leave; the same command continues a stopped run, bit for
bit on a CPU in float32.

All randomness follows from (seed, step, micro-batch): the global batch of a step is a list of micro-batches, and each has the
same samples, masks and noise whichever process computes it. `run` is the story; engine/ holds its parts.
"""
import copy
import math
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import torch
from tqdm import tqdm

import config
import lab
from config import UserError
from engine import batches, checkpoints, devices, graphs, meters, optimizers, processes, runs
from engine.processes import is_main
from prepare import arrays

SETTINGS = dict(
    model='gpt',              # the chapter: gpt, maskgit, fourm, flow, vlm
    dataset='shakespeare',    # data/NAME, made by prepare/NAME.py
    out_dir='',               # the run's folder; '' is out/CONFIGNAME
    init_from='resume',       # 'resume' continues the run in out_dir if there is one; 'scratch' moves that one aside; the name or
                              # folder of another run (or 'smollm2'): a new run starts from its weights; parts of a model
                              # from several runs: 'eyes:siglip,language:smollm2'
    seed=0,                   # of the weights, the order of the data and all sampling
    # length and batches
    max_iters=2000,           # optimizer steps
    batch_size=64,            # samples a step, over all micro-batches and processes
    micro_batch_size=64,      # samples in one forward pass: lower it until the memory suffices
    # optimizer: Muon for the hidden matrices, AdamW for embeddings, heads and vectors
    muon=True,                # False: AdamW for everything
    muon_learning_rate=0.02,  # of a matrix whose update has orthonormal rows or columns
    learning_rate=3e-3,       # of AdamW
    min_lr=0.0,               # where the decay ends, as a fraction of each rate
    warmup_iters=50,          # linear warm-up
    decay=0.6,                # fraction of max_iters, at the end, over which the rates fall linearly
    rates='',                 # factors of both by the beginning of a parameter's name: 'eyes:0 language:0.3'; 0 freezes
    weight_decay=0.0,         # decoupled, on matrices
    beta1=0.9, beta2=0.95,    # of AdamW
    momentum=0.95,            # of Muon
    grad_clip=1.0,            # largest norm of the gradient; 0 switches clipping off
    ema=0.0,                  # evaluate and sample with an exponential moving average of the weights, of this decay a step; 0: none
    # evaluation and logs
    eval_interval=500,        # steps between evaluations; the last step is always evaluated
    eval_iters=0,             # micro-batches an evaluation, always the same ones; 0 is the whole validation set
    log_interval=10,          # steps between lines in log.jsonl
    target_loss=0.0,          # stop when val_loss reaches it
    keep=0,                   # number of evaluations, the newest, that also leave their checkpoint as ckpt_STEP.pt
    skip=0,                   # steps whose gradient is not finite that are skipped before the run stops
    pictures=True,            # sample at each evaluation
    wandb_log=False,          # also log to Weights & Biases
    # machine
    device='auto',            # cuda, mps or cpu
    dtype='auto',             # bfloat16 if the hardware computes it natively, otherwise float32; float16 for GPUs without it
    compile=True,             # torch.compile
    graphs=False,             # on a single GPU: small models several times as fast, by CUDA graphs; `forward` must then be a function
                              # of its batch and torch's random numbers alone
    shard=False,              # for models that do not fit: each process keeps a shard of weights, gradients and moments
    threads=0,                # of a CPU run; 0 is as many as before, at first PyTorch's choice: one for each core
)
FREE = {'init_from', 'out_dir', 'max_iters', 'micro_batch_size', 'eval_interval', 'eval_iters', 'log_interval', 'target_loss',
        'keep', 'skip', 'pictures', 'wandb_log', 'device', 'dtype', 'compile', 'graphs', 'threads', 'shard'}  # may change in a run


@dataclass
class State:
    """Where a run is; saved in every checkpoint."""
    step: int = 0
    best: float = math.inf  # the lowest val_loss so far
    seconds: float = 0.0    # of training, evaluations apart
    tokens: int = 0
    skipped: int = 0        # steps whose gradient was not finite
    wandb_id: str | None = None


def help(assigned):
    """--help: the settings of the chapter, too."""
    settings, chapter = config.resolve(assigned, SETTINGS)
    return ['', f'settings of {settings["model"]}.py:', *config.describe_class(chapter.Config, settings)]


def main(*arguments, **overrides):
    """Trains as the config files and settings say; returns the last evaluation's values, or {'stopped': number of the signal}.
    Raises UserError."""
    with ExitStack() as stack:  # gives back signals, the lock and the process group, however the run ends
        return run(config.read(arguments, overrides), arguments, stack)


def run(assigned, arguments, stack):
    # what is asked for: a misspelt setting stops here, before data are made
    sources = checkpoints.read_sources(assigned)
    s, chapter = config.resolve(assigned, SETTINGS, sources)
    if s['pictures']:
        lab.module_of(s['model'])  # a chapter without one cannot draw
    device = devices.find(s['device'])
    dtype = devices.find_dtype(s['dtype'], device)
    folder, meta = arrays.find(s['dataset'])  # made by prepare/NAME.py on the first run
    rank, world = processes.join(device, stack)  # (0, 1) without torchrun
    n_micro, mine = batches.share(s, rank, world)  # the micro-batches of each step that are this process's
    signals = runs.listen(stack)
    out = runs.folder_of(s, arguments)
    before = runs.enter(out, s, FREE, stack)  # the checkpoint to continue from, or None
    meta = arrays.agree(folder, meta, before)

    # model, data
    torch.manual_seed(s['seed'])
    model = config.build(chapter, s, meta, assigned)
    checkpoints.start_from(model, sources, folder, meta)
    devices.set_up(device, devices.find_threads(s['threads'], before, world), length=devices.context_length(model))
    train_data, val_data = (arrays.Data(folder, split, meta, model.fields, s.get('block_size', 0), s['seed'])
                            for split in ('train', 'val'))
    optimizers.freeze(model, s['rates'])
    meter = meters.Meter(model, device, dtype)
    ema_model = copy.deepcopy(model) if s['ema'] else model  # the model that is evaluated and sampled from
    sharded = s['shard'] and world > 1
    for each in dict.fromkeys((model, ema_model)):
        processes.place(each, device, dtype, sharded)
    runs.check_room(out, model)

    # optimizers, and where the run was
    opts = optimizers.make(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State()
    if before:
        with checkpoints.same_code(out):
            checkpoints.scatter(before, model, ema_model, opts, scaler)
        state, before = State(**{name: before[name] for name in asdict(state)}), None  # it is as large as the model and its optimizers
    first = state.step
    if finished := runs.finished(out, s, state):
        return say(finished) or {}
    say(f'{s["model"]}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {train_data.n:,} training samples, '
        f'{device}, {str(dtype)[6:]}, {meter.peak_flops / 1e9:,.0f} GFLOP/s of matmul; run folder {out}')
    log = runs.open_log(out, s, state, stack)

    # forward and backward pass of a micro-batch, an optimizer step, saving
    if s['compile']:
        graphs.compile_blocks(model, device, stack)
    net = processes.replicate(model, sharded)

    def passes(batch):
        with devices.autocast(device, dtype):
            loss, logs = net(batch)
        scaler.scale(loss * world / n_micro).backward()
        return logs
    by_graphs = s['graphs'] and graphs.possible(device, world)
    optimizers.lr_on_device(opts, device if by_graphs else None)
    finish = partial(optimizers.optimizer_step, opts, scaler, set_to_none=not by_graphs)
    if by_graphs:
        passes = graphs.GraphedSteps(passes)
        finish = finish if scaler.is_enabled() else graphs.GraphedSteps(finish)  # a scaler needs a host-device sync

    def save(*names):
        facts = checkpoints.describe(s, model, meta, dtype) | asdict(state)
        checkpoints.save_all(out, names, facts | checkpoints.gather(model, ema_model, opts, scaler))

    jobs = ((train_data, model, s, step, j) for step in range(first, s['max_iters']) for j in mine)
    ahead = batches.prefetched(batches.micro_batch, jobs, device)
    bar = stack.enter_context(tqdm(total=s['max_iters'], initial=first, desc='train', unit='step', disable=not is_main()))
    meter.restart()
    for step in range(first, s['max_iters'] + 1):
        state.step, last = step, step == s['max_iters']

        # evaluate, save, draw
        if last or step % s['eval_interval'] == 0 and (step > first or step == 0):
            values = evaluate(ema_model, val_data, s, rank, world, device, dtype)
            val_loss = meters.mean_loss(values)
            log(meters.evaluation_line(state, values))
            say(f'step {step}: val_loss {val_loss:.4f}  ' + '  '.join(f'{k} {v:.3f}' for k, v in values.items() if k != 'loss'))
            improved, state.best = val_loss < state.best, min(state.best, val_loss)  # in this order a nan does not stay
            if step:
                save(*['ckpt_best.pt'] * improved, *[f'ckpt_{step:06d}.pt'] * bool(s['keep']), 'ckpt_last.pt')  # the last one last
                runs.prune(out, s['keep'])
                draw(out, step, s, folder, meta, device)
            if last or val_loss <= s['target_loss'] > 0:
                break
            meter.restart()  # evaluation is no training time

        # asked to stop: between two lines of the log, so that it continues without a seam
        if step > first and step % s['log_interval'] == 0 and processes.any_of(signals, device):
            save('ckpt_last.pt')
            without = ', without --init_from=scratch,' * (s['init_from'] == 'scratch')
            say(f'stopped by signal after step {step}; the same command{without} continues from here')
            return {'stopped': signals[0] if signals else signal.SIGTERM}

        # learn: the gradient of the mean over all micro-batches of all processes
        for j in mine:
            batch = meter.take(ahead)
            batches.seed_dropout(s['seed'], step, j)
            with processes.no_sync(net, last=j == mine[-1]):
                meter.add(passes(batch))
        norm = optimizers.clip(model, opts, scaler, s['grad_clip'])
        if math.isfinite(norm):
            optimizers.set_lr(opts, s, step)
            finish()
            if s['ema']:
                optimizers.update_ema(ema_model, model, s['ema'], step)
        else:
            skip_or_stop(state, norm, s, scaler, train_data, log, save, out)
            model.zero_grad(set_to_none=not by_graphs)
        bar.update()

        # log; before an evaluation too, whose time and step are so kept apart
        state.step = step + 1
        if state.step == s['max_iters'] or not state.step % s['log_interval'] or not state.step % s['eval_interval']:
            line = meter.line(state, norm, s['learning_rate'] * optimizers.lr_factor(step, s))
            log(line)
            bar.set_postfix_str(f'loss={line["train_loss"]:.3f}, tok_s={line["tokens_per_second"]:,}, mfu={line["mfu"]:.0%}', False)
    bar.close()
    reached = f' <= target_loss {s["target_loss"]:g}' * (val_loss <= s['target_loss'] > 0)
    say(f'{step} steps, {state.tokens:,} tokens, {state.seconds:.1f} s of training; val_loss {val_loss:.4f}{reached}, best '
        f'{state.best:.4f}; see {out}')
    return values


def skip_or_stop(state, norm, s, scaler, data, log, save, out):
    """A gradient that is not finite: the step is left out if it may be; otherwise the run ends with the state before it."""
    state.skipped += 1
    if scaler.is_enabled() and scaler.get_scale() >= 1 or not scaler.is_enabled() and state.skipped <= s['skip']:
        return scaler.update()  # float16: a lower scale, as the loss overflowed; at a scale of 1 it cannot
    save('ckpt_fault.pt')
    log({'step': state.step, 'grad_norm': str(norm), 'samples': data.ids(state.step * s['batch_size'], s['batch_size'])})
    raise UserError(f'step {state.step}: the gradient is not finite ({norm}). The state before it is in {out}/ckpt_fault.pt, its '
                    'samples in log.jsonl; lower the learning rates, or leave such steps out by --skip=10')


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # few steps, many shapes: not worth compiling
def evaluate(model, data, s, rank, world, device, dtype):
    """{name: mean} of the model's logs over the validation set, or its first eval_iters micro-batches."""
    model.eval()
    total, n = {}, -(-data.n // s['micro_batch_size'])
    n = min(s['eval_iters'] or n, n)
    mine = range(rank, n + -n % world, world)  # equally many for each process, as sharding needs; those from n on do not count
    jobs = [(data, model, s, j % n) for j in mine]
    for j, batch in zip(mine, batches.prefetched(batches.evaluation_batch, jobs, device)):
        with devices.autocast(device, dtype):
            logs = model(batches.to_device(batch, device))[1]
        total = meters.add_logs(total, {name: value * (j < n) for name, value in logs.items()})
    model.train()
    return meters.means(total)[0]


def say(text):
    """A line above the progress bar, from process 0."""
    if is_main():
        tqdm.write(text)


def draw(out, step, s, folder, meta, device):
    """Samples of the checkpoint that was just saved, in process 0; training goes on if they fail."""
    if not s['pictures'] or not is_main():
        return
    try:
        with tqdm.external_write_mode():
            model = checkpoints.load_model(out / 'ckpt_last.pt')[0].to(device)
            lab.draw(model, folder, meta, out / f'sample_{step:06d}.png')
    except Exception as error:  # whatever a drawer does wrong
        say(f'step {step}: no picture ({type(error).__name__}: {error}); training goes on')


if __name__ == '__main__':
    stopped = config.run(main, 'stopped at once; the same command goes on from the last checkpoint').get('stopped')
    sys.exit(128 + stopped if stopped else 0)
