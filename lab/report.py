"""
Writes a report on a run as a Markdown page: loss curves, cost of training, settings, scores, samples, and the command
that repeats the run. Several runs are shown side by side. Generators of the same digits are also compared by one
classifier.

    python -m lab.report --out_dir=out/gpt_mnist                                 out/gpt_mnist/report.md
    python -m lab.report --compare=out/nano4m,out/nano4m_long                    out/compare.md
    python -m lab.report --compare=out/gpt_mnist,out/maskgit_mnist,out/flow_mnist --n_score=500       which generator?
"""
import contextlib
import os
import platform
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

import config
import lab
from config import UserError
from engine import checkpoints, devices
from engine.runs import log_lines
from lab import options
from lab.figures import points, save_grid, save_losses, tile
from lab.statistics import BOUNDS, judged, markdown_table, read_scores, scores_path

SETTINGS = dict(
    out_dir='out/nano4m',     # the run
    compare='',               # several runs, 'out/a,out/b', instead of out_dir: side by side in out/compare.md
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    n_score=1000,             # digits per generator for the classifier
    seed=0,                   # of these digits
    device='auto',            # for generating them: cuda, mps or cpu
)


# ---------------------------------------------------------------------------------------------------------------------
# Facts about a run

@dataclass
class Record:
    folder: Path
    checkpoint: dict
    parameters: int
    log: list       # lines of log.jsonl
    scores: dict    # of this checkpoint
    defaults: dict  # of all settings of train.py and the chapter

    @property
    def settings(self):
        return self.checkpoint['settings']


def read_record(path):
    """The Record of the run with this checkpoint. Raises UserError."""
    model, checkpoint = checkpoints.load_model(path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log, file, known = read_log(path.with_name('log.jsonl')), scores_path(path), config.defaults('train.py')
    scores = read_scores(file, checkpoints.digest(path))
    if not scores and file.is_file():
        print(f'{file}: left out, it has scores of other weights; for new ones: python -m lab.score '
              f'--out_dir={path.parent}')
    defaults, _ = config.resolve(dict(model=(checkpoint['settings']['model'], path)), known)
    return Record(path.parent, checkpoint, parameters, log, scores, defaults | dict(model=known['model']))


def read_log(path):
    """The lines of a log.jsonl, without damaged ones and an incomplete last one. Raises UserError."""
    if not path.is_file():
        raise UserError(f'{path}: missing; a report needs the folder of a run of train.py')
    found = log_lines(path)
    lines = [entry for _, entry in found if entry]
    if damaged := [i for i, (line, entry) in enumerate(found, 1) if line.strip() and not entry]:
        print(f'{path}: left out, no lines of a training log: {", ".join(map(str, damaged))}')
    if not points(lines, 'step', 'val_loss'):
        raise UserError(f'{path}: has no evaluation yet; let the run come to one')
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Settings and command

def changed(run, base):
    """{setting: value} where a run differs from the settings `base`, without those that the data set determines."""
    base = base | dict(micro_batch_size=min(base['micro_batch_size'], run.settings['batch_size']))
    return {name: value for name, value in run.settings.items()
            if name in base and value != base[name] and name not in {'out_dir', *run.checkpoint['meta']['config']}}


def command(run):
    """The shortest command that starts this run: the best of all config files."""
    commands, folder = [], run.folder.as_posix()
    for file in ['', *config.files()]:
        try:
            base = config.apply(config.read([file] if file else []), run.defaults)
        except UserError:  # another chapter's settings
            continue
        assigned = changed(run, base)
        if folder != (base['out_dir'] or f'out/{Path(file).stem or run.settings["model"]}'):
            assigned['out_dir'] = folder
        commands.append([*[file] * bool(file), *(f'--{name}={value}' for name, value in assigned.items())])
    return shlex.join(['python', 'train.py', *min(commands, key=len)])


def facts(run):
    """{fact: text} of a run."""
    checkpoint, settings, seconds = run.checkpoint, run.settings, run.checkpoint['seconds']
    train, val = (points(run.log, 'step', f'{split}_loss') for split in ('train', 'val'))
    last = next(line for line in reversed(run.log) if 'val_loss' in line)
    return {
        'model, data': f'{settings["model"]}, {settings["dataset"]}',
        'parameters': f'{run.parameters / 1e6:.2f} M',
        'steps, samples in each': f'{checkpoint["step"]:,}, {settings["batch_size"]}',
        'tokens': f'{checkpoint["tokens"]:,}',
        'seconds of training': f'{seconds:,.0f} ({checkpoint["tokens"] / max(seconds, 1e-9):,.0f} tokens/s)',
        'computed in': f'{checkpoint["dtype"].removeprefix("torch.")}, {checkpoint["threads"]} CPU threads',
        'last training loss': f'{train[-1][1]:.4f}' if train else '',
        'validation loss: last, best': f'{val[-1][1]:.4f}, {min(loss for _, loss in val):.4f}'
    } | {f'last {name}': 'not finite' if value is None else f'{value:.4f}' for name, value in last.items()
         if name.startswith('val_') and name != 'val_loss'}


# ---------------------------------------------------------------------------------------------------------------------
# Which generator?

def digits_of(run):
    """The function digits(run, labels, seed) -> (n, 14, 14) of the run's chapter; None if it has none."""
    with contextlib.suppress(UserError):  # a model of your own without lab/NAME.py
        return getattr(lab.module_of(run.settings['model']), 'digits', None)


def same_digits(runs):
    """Whether all runs generate digits of the same data set."""
    meta = runs[0].checkpoint['meta']
    return meta['prepare'] == 'mnist' and all(run.checkpoint['meta'] == meta and digits_of(run) for run in runs)


def compare_generators(runs, settings, path):
    """Compares generators of digits. Each run has a row: size, training time, likelihood (comparable only in equal
    units), the classifier's scores of its digits as 14x14 binary images, speed. Returns Markdown; saves the digits to
    `path`."""
    device, labels = devices.find(settings['device']), np.arange(settings['n_score']) % 10
    devices.set_up(device, training=False)
    rows, columns, order = [], {}, np.argsort(labels[:100], kind='stable')
    for name, run in runs.items():
        opened = lab.open_run(run.folder / settings['checkpoint'], device)
        parts, started = np.array_split(labels, -(-len(labels) // 64)), time.perf_counter()
        images = np.concatenate([digits_of(run)(opened, part, settings['seed'] + i) for i, part in enumerate(parts)])
        seconds = (time.perf_counter() - started) / len(labels)
        scores = judged(opened.dataset.score(images, labels))
        rows.append(generator_row(name, run, scores, seconds))
        columns[name] = [sheet(images[:100][order])]
    dataset = opened.dataset
    order = np.concatenate([np.flatnonzero(dataset.load('val', 'label') == c)[:10] for c in range(10)])
    columns['held out'] = [sheet(dataset.real('val', 14)[order])]
    real = {metric: score.get('ceiling', score.get('floor')) for metric, score in scores.items()}
    rows.append({'': 'real digits', **quality(real)})
    table = markdown_table(rows)
    print(table)
    save_grid(columns, path)
    return f'## Which generator?\n\n{table}\n\n![digits]({path.name})'


def generator_row(name, run, scores, seconds):
    """A row of the table of generators."""
    likelihood = next((f'{score["value"]:.3g} {metric}' for metric, score in run.scores.items()
                       if 'nats/image' in metric or 'bits/dim' in metric), '-')
    return {'': name, 'parameters': f'{run.parameters / 1e6:.2f} M', 'training': f'{run.checkpoint["seconds"]:.0f} s',
            'likelihood, given the class': likelihood,
            **quality({metric: score['value'] for metric, score in scores.items()}),
            'an image': f'{seconds * 1000:.0f} ms'}


def quality(values):
    return {'class accuracy': f'{values["accuracy"]:.1%}', 'Fréchet': f'{values["frechet"]:.3f}',
            'precision, recall': f'{values["precision"]:.3f}, {values["recall"]:.3f}'}


def sheet(images):
    """Binary images (n, H, W) in rows of ten: (H', W', 3)."""
    return np.repeat(tile(images, 10)[..., None], 3, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The page

def side_by_side(runs, texts_of):
    """texts_of(run) -> {row: text} of runs {name: Record} as a Markdown table, a column for each run."""
    columns = {name: texts_of(run) for name, run in runs.items()}
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    return markdown_table([{'': row, **{name: column.get(row) for name, column in columns.items()}} for row in rows])


def choices(run):
    """{setting: value} where a run differs from the defaults, apart from model and data."""
    return {name: f'`{value}`' for name, value in changed(run, run.defaults).items()
            if name not in ('model', 'dataset')}


def score_texts(run):
    """{metric: its value, interval and bounds}."""
    return {metric: f'{score["value"]:.4g}'
            + f' [{score["low"]:.4g}, {score["high"]:.4g}]' * (score['low'] < score['high'])
            + ''.join(f'; {bound} {score[bound]:.4g}' for bound in BOUNDS if bound in score)
            for metric, score in run.scores.items()}


def address(file, page):
    """The address of a file in a page: relative, unless the two are on different drives of Windows."""
    try:
        return quote(Path(os.path.relpath(file, page.parent)).as_posix())
    except ValueError:
        return file.resolve().as_uri()


def newest_samples(run, page):
    """The newest image, animation and text in the run folder, as Markdown."""
    found = []
    for kind in ('png', 'gif', 'txt'):
        files = sorted(run.folder.glob(f'sample_*.{kind}'), key=lambda file: (file.stat().st_mtime, file.name))
        for file in files[-1:]:
            if kind == 'txt':
                text = file.read_text(encoding='utf-8', errors='replace')
                fence = max(re.findall('`+', text) + ['``'], key=len) + '`'  # longer than any in the text
                found.append(f'{fence}\n{text}\n{fence}')
            else:
                found.append(f'![{file.name}]({address(file, page)})')
    return found


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}, PyTorch {torch.__version__}'


def write_page(runs, path, more=''):
    """Writes the page of runs {name: Record} to `path` and its loss curves beside it. `more` is Markdown after the
    table of facts."""
    curves = path.with_name(f'{path.stem}_loss.png')
    save_losses({name: run.log for name, run in runs.items()}, curves)
    text = [f'# {", ".join(runs)}', f'![losses]({curves.name})', side_by_side(runs, facts), more,
            '## Settings that differ from the defaults', side_by_side(runs, choices) or 'None.',
            '\n'.join(['```', *map(command, runs.values()), '```'])]
    if any(run.scores for run in runs.values()):
        text += ['## Scores', 'Value and 95 % interval.', side_by_side(runs, score_texts)]
    for name, run in runs.items():
        if samples := newest_samples(run, path):
            text += [f'## Samples of {name}', *samples]
    text.append(f'*Written on {machine()}.*')
    path.write_text('\n\n'.join(filter(None, text)) + '\n', encoding='utf-8')
    print(f'wrote {path}')


@torch.inference_mode(False)
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if not settings['compare']:
        folder = Path(settings['out_dir'])
        return write_page({folder.name: read_record(folder / settings['checkpoint'])}, folder / 'report.md')
    folders = list(map(Path, options.paths(settings['compare'])))
    short = len({folder.name for folder in folders}) == len(folders)
    runs = {folder.name if short else folder.as_posix(): read_record(folder / settings['checkpoint'])
            for folder in folders}
    path = Path('out/compare.md')
    path.parent.mkdir(exist_ok=True)
    more = compare_generators(runs, settings, path.with_suffix('.png')) if same_digits([*runs.values()]) else ''
    write_page(runs, path, more)


if __name__ == '__main__':
    config.run(main)
