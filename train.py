"""
The training loop of all chapters: on the CPU of a laptop, one GPU, or several processes under torchrun.

    python train.py config/nano4m.py --batch_size=32
    torchrun --nproc_per_node=4 train.py config/nano4m.py --micro_batch_size=4
    python train.py config/nano4m.py --help

Settings come from a config file and the command line (config/__init__.py), the data from data/NAME (made by
prepare/NAME.py on the first run), the model from the chapter named by `model`. Checkpoints, log.jsonl and samples are
written to the run folder, out/CONFIGNAME. Ctrl-C or a signal of the cluster saves a checkpoint and stops. The same
command resumes the run: bit for bit on a CPU in float32.

All randomness is a function of (seed, step, micro-batch). The global batch of a step is a list of micro-batches; which
process computes which of them makes no difference. `run` is the loop; engine/ holds its parts.
"""
import copy
import math
import signal
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import config  # before torch: it sets how OpenMP's threads wait

import torch
from tqdm import tqdm

import lab
from config import UserError
from engine import batches, checkpoints, devices, graphs, meters, optimizers, processes, runs, threads
from engine.processes import is_main
from prepare import arrays

SETTINGS = dict(
    model='gpt',              # the chapter: gpt, maskgit, fourm, flow, vlm
    dataset='shakespeare',    # data/NAME, made by prepare/NAME.py
    out_dir='',               # run folder; '' is out/CONFIGNAME
    init_from='resume',       # 'resume' continues the run in out_dir; 'scratch' moves that run aside; the name or
                              # folder of another run (or 'smollm2') starts a new run from its weights; parts of a model
                              # may come from several runs: 'vision_encoder:siglip,language_model:smollm2'
    seed=0,                   # of the initial weights, the order of the data and all sampling
    # length and batches
    max_iters=2000,           # optimizer steps
    batch_size=64,            # samples per step, over all micro-batches and processes
    micro_batch_size=64,      # samples per forward pass: lower it if memory is short
    # optimizer: Muon for hidden matrices, AdamW for embeddings, heads and vectors
    muon=True,                # False: AdamW for all parameters
    muon_learning_rate=0.02,  # of Muon: a step is this times an orthogonalized matrix
    learning_rate=3e-3,       # of AdamW
    min_lr=0.0,               # end of the decay, as a fraction of each learning rate
    warmup_iters=50,          # steps of linear warm-up
    decay=0.6,                # fraction of max_iters, at the end, in which the learning rates decay linearly
    lr_multipliers='',        # of both learning rates, by prefix of a parameter's name: 'PART:0 PART:0.3'; 0 freezes
    weight_decay=0.0,         # decoupled, for matrices
    beta1=0.9, beta2=0.95,    # of AdamW
    momentum=0.95,            # of Muon
    grad_clip=1.0,            # largest norm of the gradient; 0 is no clipping
    ema=0.0,                  # decay of the exponential moving average that is evaluated and sampled from; 0 is none
    # evaluation and logs
    eval_interval=500,        # steps between evaluations; the last step is always evaluated
    eval_iters=0,             # micro-batches per evaluation, always the same ones; 0 is the whole validation set
    log_interval=10,          # steps between lines in log.jsonl
    target_loss=0.0,          # stop when val_loss reaches it; 0 is never
    keep_checkpoints=0,       # the newest N evaluations also keep their checkpoint as ckpt_STEP.pt
    max_skipped_steps=0,      # steps with a gradient that is not finite to skip before the run stops
    pictures=True,            # generate samples after each evaluation
    wandb_log=False,          # also log to Weights & Biases
    # machine
    device='auto',            # cuda, mps or cpu
    dtype='auto',             # bfloat16 if the hardware computes it natively, otherwise float32; or float16
    compile=True,             # torch.compile
    graphs=False,             # CUDA graphs, for a single GPU: small models are several times as fast; `forward` must
                              # depend only on its batch and torch's random numbers
    shard=False,              # FSDP, for large models: processes share weights, gradients and optimizer states
    threads=0,                # of a CPU run; 0 is one per core that other programs leave free (engine/threads.py)
)
FREE = {  # settings that may change when a run is resumed
    'init_from', 'out_dir', 'max_iters', 'micro_batch_size', 'eval_interval', 'eval_iters', 'log_interval', 'pictures',
    'target_loss', 'keep_checkpoints', 'max_skipped_steps', 'wandb_log', 'device', 'dtype', 'compile', 'graphs',
    'shard', 'threads'}
TRAINING = threading.Lock()  # one run at a time in a process


@dataclass
class State:
    """The progress of a run, saved in every checkpoint."""
    step: int = 0
    best: float = math.inf  # lowest val_loss so far
    seconds: float = 0.0    # of training, without evaluations
    tokens: int = 0
    skipped: int = 0        # steps with a gradient that was not finite
    wandb_id: str | None = None


def help(assigned):
    """--help: the settings of the chapter, too."""
    settings, chapter = config.resolve(assigned, SETTINGS)
    explained = config.explain_class(chapter.Config)
    return ['', f'settings of {settings["model"]}.py:', *config.describe(explained, settings)]


@torch.inference_mode(False)  # switches gradients on, which an earlier line may have switched off
def main(*arguments, **overrides):
    """Trains as the config files and settings say. Returns the values of the last evaluation, {'stopped': signal
    number}, or {} if the run was finished before. Raises UserError."""
    with ExitStack() as stack:  # in the end it restores signal handlers, releases locks, leaves the process group
        if not TRAINING.acquire(blocking=False):
            raise UserError('a run is being trained in another thread of this process, whose random numbers and output '
                            'it needs for itself: wait for it, or start another process')
        stack.callback(TRAINING.release)
        runs.keep_printing(stack)
        signals = []  # the numbers of those that ask the run to stop
        try:
            return run(config.read(arguments, overrides), arguments, stack, signals)
        except Exception as error:
            if not signals or isinstance(error, UserError):
                raise
            say(f'stopped by signal ({type(error).__name__}); the same command continues from the last checkpoint')
            return {'stopped': signals[0]}  # it also ended the compiler, or another process


def run(assigned, arguments, stack, signals):
    # settings: a misspelt name stops here, before data are made
    s, chapter = config.resolve(assigned, SETTINGS)
    out_dir = runs.folder_of(s, arguments)
    sources = runs.sources_of(s, out_dir)  # {part of the model: checkpoint whose sizes it has}
    s, chapter = config.resolve(assigned, SETTINGS, sources)
    if s['pictures']:
        lab.module_of(s['model'])  # raises UserError if the chapter cannot be sampled from
    device = devices.find(s['device'])
    dtype = devices.find_dtype(s['dtype'], device)
    folder, meta = arrays.find(s['dataset'])  # made by prepare/NAME.py on the first run

    # processes and the run folder
    rank, world = processes.join(device, stack)  # (0, 1) without torchrun
    n_micro, local_micro = batches.share(s, rank, world)  # micro-batches per step; the indices of those of this process
    runs.listen(signals, stack)
    checkpoint = runs.enter(out_dir, s, FREE, stack)  # the checkpoint to resume from, or None
    meta = arrays.agree(folder, meta, checkpoint)
    if not processes.same(meta.get('sums')):
        raise UserError(f'{folder}: the processes find different data there; put data/ on a file system that all nodes '
                        'share, or copy it')

    # model and data
    stack.enter_context(torch.random.fork_rng([device] if device.type == 'cuda' else []))  # a notebook's go on after it
    torch.manual_seed(s['seed'])
    model = config.build(chapter, s, meta, assigned)
    if not checkpoint:
        checkpoints.start_from(model, sources, folder, meta)
    sources.clear()  # as large as the model
    threads.choose(s['threads'], checkpoint, world)
    stack.callback(devices.use_fused_attention, torch.backends.cuda.flash_sdp_enabled())  # the earlier kernel
    devices.set_up(device, length=devices.context_length(model))
    train_data, val_data = arrays.open_splits(folder, meta, model.batch_keys, s.get('block_size', 0), s['seed'])
    optimizers.freeze(model, s['lr_multipliers'])
    meter = meters.Meter(model, device, dtype)
    ema_model = copy.deepcopy(model) if s['ema'] else model  # evaluated and sampled from
    sharded = s['shard'] and world > 1
    for each in dict.fromkeys((model, ema_model)):
        processes.place(each, device, dtype, sharded)
    runs.check_room(out_dir, model)

    # optimizers and the state of the run
    opts = optimizers.make(model, s, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State()
    if checkpoint:
        with checkpoints.same_code(out_dir):
            checkpoints.scatter(checkpoint, model, ema_model, opts, scaler)
        state = State(**{name: checkpoint[name] for name in asdict(state)})
        del checkpoint  # as large as the model and its optimizers
    first = state.step
    if finished := runs.finished(out_dir, s, state):
        return say(finished) or {}
    say(f'{s["model"]}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
        f'{train_data.n:,} training samples, {device}, {str(dtype)[6:]}, {meter.peak_flops / 1e9:,.0f} GFLOP/s of '
        f'matmul; run folder {out_dir}' + f', continues from step {first}' * (first > 0))
    log = runs.open_log(out_dir, s, state, stack)

    # the parts of a step
    if s['compile']:
        graphs.compile_blocks(model, device, stack)
    net = processes.replicate(model, sharded)  # DistributedDataParallel if there are several replicas

    def forward_backward(batch):
        with devices.autocast(device, dtype):
            loss, logs = net(batch)
        scaler.scale(loss * world / n_micro).backward()  # DDP and FSDP average the gradients over the processes
        return logs

    use_graphs = s['graphs'] and graphs.possible(device, world)
    optimizers.lr_on_device(opts, device if use_graphs else None)
    optimizer_step = partial(optimizers.optimizer_step, opts, scaler, set_to_none=not use_graphs)
    if use_graphs:
        forward_backward = graphs.GraphedSteps(forward_backward)
        if not scaler.is_enabled():  # a scaler needs a host-device sync
            optimizer_step = graphs.GraphedSteps(optimizer_step)

    def save(*names):
        facts = checkpoints.describe(s, model, meta, dtype) | asdict(state)
        checkpoints.save_all(out_dir, names, facts | checkpoints.gather(model, ema_model, opts, scaler))

    jobs = ((train_data, model, s, step, j) for step in range(first, s['max_iters']) for j in local_micro)
    micro_batches = batches.prefetched(batches.micro_batch, jobs, device)
    bar = stack.enter_context(tqdm(desc='train', initial=first, total=s['max_iters'], unit='step', disable=rank > 0))
    meter.restart()
    for step in range(first, s['max_iters'] + 1):
        state.step, last = step, step == s['max_iters']

        # evaluate, save, sample
        if last or step % s['eval_interval'] == 0 and (step > first or step == 0):
            values = evaluate(ema_model, val_data, s, rank, world, device, dtype)
            val_loss = meters.mean_loss(values)
            log(meters.evaluation_line(state, values))
            say(f'step {step}: val_loss {val_loss:.4f}  '
                + '  '.join(f'{name} {value:.3f}' for name, value in values.items() if name != 'loss'))
            improved, state.best = val_loss < state.best, min(state.best, val_loss)  # in this order: nan is never best
            reached = val_loss <= s['target_loss'] > 0
            if step or reached:
                best, numbered = ['ckpt_best.pt'] * improved, [f'ckpt_{step:06d}.pt'] * (s['keep_checkpoints'] > 0)
                save(*best, *numbered, 'ckpt_last.pt')  # the last one last: a run that is killed here writes all again
                runs.prune(out_dir, s['keep_checkpoints'], step)
                sample(out_dir, step, s, folder, meta, device)
            if last or reached:
                break
            meter.restart()  # evaluation is not training time

        # stop if a signal asks for it; only after a line of the log, so that the resumed log is the same
        logged = not step % s['log_interval'] or not step % s['eval_interval']
        if step > first and logged and processes.any_of(signals, device):
            save('ckpt_last.pt')
            without = ', without --init_from=scratch,' * (s['init_from'] == 'scratch')
            say(f'stopped by signal after step {step}; the same command{without} continues from here')
            return {'stopped': signals[0] if signals else signal.SIGTERM}

        # the gradient of the mean loss over all micro-batches of all processes
        for j in local_micro:
            batch = meter.take(micro_batches)
            batches.seed_dropout(s['seed'], step, j)
            with processes.no_sync(net, last=j == local_micro[-1]):
                meter.add(forward_backward(batch))
        norm = optimizers.clip(model, opts, scaler, s['grad_clip'])

        # optimizer step
        if math.isfinite(norm):
            optimizers.set_lr(opts, s, step)
            optimizer_step()
            if s['ema']:
                optimizers.update_ema(ema_model, model, s['ema'], step)
        else:
            skip_or_stop(state, norm, s, scaler, train_data, log, save, out_dir)
            model.zero_grad(set_to_none=not use_graphs)
        bar.update()

        # log; also before an evaluation: the meter.restart() after it forgets what is not logged
        state.step = step + 1
        if state.step == s['max_iters'] or not state.step % s['log_interval'] or not state.step % s['eval_interval']:
            line = meter.line(state, norm, s['learning_rate'] * optimizers.lr_factor(step, s))
            log(line)
            threads.adapt()  # to what other programs leave free
            bar.set_postfix_str(f'loss={line["train_loss"]:.3f}, tok_s={line["tokens_per_second"]:,}, '
                                f'mfu={line["mfu"]:.0%}', refresh=False)
    bar.close()
    say(f'{step} steps, {state.tokens:,} tokens, {state.seconds:.1f} s of training; val_loss {val_loss:.4f}'
        + f' <= target_loss {s["target_loss"]:g}' * reached + f', best {state.best:.4f}; see {out_dir}')
    return values


def skip_or_stop(state, norm, s, scaler, data, log, save, out_dir):
    """Skips a step whose gradient is not finite, up to max_skipped_steps times; then saves the state before it and
    stops: UserError."""
    if scaler.is_enabled():  # float16: the scaled loss overflowed
        skip, remedy = scaler.get_scale() >= 1, '--dtype=float32'  # a scale below 1 does not help
    else:
        skip = state.skipped < s['max_skipped_steps']
        remedy = f'--max_skipped_steps={s["max_skipped_steps"] + 10}, which skips such steps'
    if skip:
        state.skipped += 1
        return scaler.update()  # lowers the scale
    save('ckpt_fault.pt')
    samples = data.ids(state.step * s['batch_size'], s['batch_size'])
    log({'step': state.step, 'grad_norm': norm, 'samples': samples})
    raise UserError(f'step {state.step}: the gradient is not finite ({norm}). The state before it is in '
                    f'{out_dir}/ckpt_fault.pt, its samples in log.jsonl; continue with {remedy}, or start again '
                    'with lower learning rates: --init_from=scratch')


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # few steps, many shapes: compilation takes longer than it saves
def evaluate(model, data, s, rank, world, device, dtype):
    """{name: mean} of the model's logs over the validation set, or over its first eval_iters micro-batches."""
    model.eval()
    total, n = {}, -(-data.n // s['micro_batch_size'])
    n = min(s['eval_iters'] or n, n)
    local_micro = range(rank, n + -n % world, world)  # FSDP: equally many in each process; those >= n are not counted
    jobs = [(data, model, s, j % n) for j in local_micro]
    for j, batch in zip(local_micro, batches.prefetched(batches.evaluation_batch, jobs, device)):
        with devices.autocast(device, dtype):
            logs = meters.logs_of(model(batches.to_device(batch, device)))
        total = meters.add_logs(total, {name: value * (j < n) for name, value in logs.items()})
    model.train()
    return meters.means(total)[0]


def say(text):
    """Prints a line above the progress bar, in process 0."""
    if is_main():
        tqdm.write(text)


def sample(out_dir, step, s, folder, meta, device):
    """Generates samples with the checkpoint that was just saved, in process 0. If that fails, training continues."""
    if other := arrays.changed(folder, meta):
        return say(f'step {step}: {other}. Training continues with the data that it began with, without samples')
    if not s['pictures'] or not is_main():
        return
    try:
        with tqdm.external_write_mode():
            model = checkpoints.load_model(out_dir / 'ckpt_last.pt')[0].to(device)
            lab.draw(model, folder, meta, out_dir / f'sample_{step:06d}.png')
    except Exception as error:  # any fault of the chapter's lab module
        say(f'step {step}: no samples ({type(error).__name__}: {error}); training continues')


if __name__ == '__main__':
    stopped = config.run(main, 'stopped at once; the same command continues from the last checkpoint').get('stopped')
    sys.exit(128 + stopped if stopped else 0)
