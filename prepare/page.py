"""
Runs as one page of Markdown, for a hand-in or side by side: loss curves, what they took, settings, scores, samples, and the
command that makes each of them again.

    python sample.py --out_dir=out/gpt_mnist --report=True                       out/gpt_mnist/report.md
    python sample.py --compare=out/nano4m,out/nano4m_long                        out/compare.md
"""
import json
import math
import os
import platform
import shlex
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

import config
from config import UserError
from prepare.report import COLORS, Pen, read_scores


@dataclass
class Run:
    folder: Path
    checkpoint: dict
    parameters: int
    defaults: dict  # of all settings that its model has

    def __post_init__(self):
        self.log, self.scores = read_log(self.folder / 'log.jsonl'), read_scores(self.folder / 'scores.json')
        self.settings = self.checkpoint['settings']


def read_log(path):
    """The lines of a log.jsonl; the end of one that was cut off does not count. Raises UserError."""
    if not path.is_file():
        raise UserError(f'{path}: missing; a report needs the folder of a run of train.py, by --out_dir=')
    lines = []
    for i, text in enumerate(path.read_text(encoding='utf-8', errors='replace').split('\n')[:-1], 1):
        try:
            lines.append(json.loads(text))
            assert lines[-1]['step'] >= 0
        except (ValueError, TypeError, KeyError, AssertionError):
            raise UserError(f'{path}, line {i}: not a line of a training log ({text[:40]!r}); delete it')
    if not points(lines, 'step', 'val_loss'):
        raise UserError(f'{path}: tells of no evaluation yet; let the run come to one')
    return lines


def points(lines, x, y):
    """[(x, y), ...] of the lines that hold both as finite numbers."""
    pairs = [(line.get(x), line.get(y)) for line in lines]
    return [pair for pair in pairs if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)]


# ---------------------------------------------------------------------------------------------------------------------
# Curves

def ticks(low, high, log):
    """Round numbers from low to high, about five."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
            some = [digit * 10.0 ** decade for decade in decades for digit in digits if low <= digit * 10.0 ** decade <= high]
            if len(some) > 3:
                return some
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(size * digit for digit in (0.5, 1, 2, 5) if (high - low) / (size * digit) <= 7)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


LEFT, WIDTH, HEIGHT, LINE = 56, 380, 250, 20  # of a panel; of the legend's lines


def plot(curves, path):
    """Curves {name: log lines} of the losses as a PNG, by steps and by seconds: lines for training, dots for validation, on a
    logarithmic axis where all are positive."""
    losses = [y for lines in curves.values() for name in ('train_loss', 'val_loss') for _, y in points(lines, 'step', name)]
    scale = math.log if min(losses) > 0 else float
    low, high = scale(min(losses)), scale(max(losses))
    margin, top = 0.05 * (high - low) + 1e-3, 26 + LINE * len(curves)
    pen = Pen(2 * (LEFT + WIDTH + 10), top + HEIGHT + 48)
    for i, ((name, lines), color) in enumerate(zip(curves.items(), cycle(COLORS))):
        pen.line([(LEFT, 16 + LINE * i), (LEFT + 24, 16 + LINE * i)], color, 1.4)
        pen.dot(LEFT + 12, 16 + LINE * i, color)
        pen.text(LEFT + 32, 16 + LINE * i, f'{name}: {points(lines, "step", "val_loss")[-1][1]:.4g}', 'lm')
    pen.text(2 * (LEFT + WIDTH) + 10, 16, 'line: training loss, dots: validation loss', 'rm', '#888888')
    for left, axis, title in ((LEFT, 'step', 'steps'), (2 * LEFT + WIDTH + 10, 'seconds', 'seconds of training')):
        panel(pen, curves, axis, title, left, top + HEIGHT, scale, low - margin, high + margin)
    pen.save(path)


def panel(pen, curves, axis, title, x0, y0, scale, low, high):
    """The curves by `axis` upon the corner x0, y0; losses between low and high once scaled."""
    pairs = {(name, kind): points(lines, axis, f'{kind}_loss') for name, lines in curves.items() for kind in ('train', 'val')}
    far = max((x for some in pairs.values() for x, _ in some), default=0) or 1

    def place(x, y):
        return x0 + WIDTH * x / far, y0 - HEIGHT * (scale(y) - low) / (high - low)
    log = scale is math.log
    for y in ticks(*(math.exp(v) if log else v for v in (low, high)), log):
        pen.line([place(0, y), place(far, y)], '#e6e6e6', 0.8)
        pen.text(x0 - 8, place(0, y)[1], f'{y:.4g}', 'rm')
    for value in ticks(0, far, False):
        x = x0 + WIDTH * value / far
        pen.line([(x, y0), (x, y0 + 4)], '#999999', 0.8)
        pen.text(x, y0 + 8, f'{value:,.6g}', 'mt')
    pen.line([(x0, y0), (x0 + WIDTH, y0)], '#999999', 0.8)
    pen.text(x0 + WIDTH / 2, y0 + 28, title, 'mt')
    for name, color in zip(curves, cycle(COLORS)):
        pen.line([place(*pair) for pair in pairs[name, 'train']], color, 1.2)
        for pair in pairs[name, 'val']:
            pen.dot(*place(*pair), color)


# ---------------------------------------------------------------------------------------------------------------------
# What made the run

def changed(run, base):
    """{setting: value} where the run's differ from the settings `base`; what the data set decides is not a choice."""
    base = base | dict(micro_batch_size=min(base['micro_batch_size'], run.settings['batch_size']))
    return {name: value for name, value in run.settings.items()
            if name in base and value != base[name] and name not in {'out_dir', *run.checkpoint['meta']['config']}}


def command(run):
    """The shortest command that starts this run: with the config file that leaves the fewest settings to be said."""
    found, folder = [], run.folder.as_posix()
    for file in ['', *sorted(path.as_posix() for path in Path('config').glob('*.py'))]:
        try:
            base = config.apply(config.read([file] if file else []), run.defaults)
        except UserError:  # another chapter's settings
            continue
        said = {name: str(value) for name, value in changed(run, base).items()}
        if folder != (base['out_dir'] or f'out/{Path(file).stem or run.settings["model"]}'):
            said['out_dir'] = folder
        found.append([*[file] * bool(file), *(f'--{name}={value}' for name, value in said.items())])
    return shlex.join(['python', 'train.py', *min(found, key=len)])


def facts(run):
    """{what: text} of a run, in the order of the table."""
    checkpoint, settings, log = run.checkpoint, run.settings, run.log
    train, val = (points(log, 'step', f'{split}_loss') for split in ('train', 'val'))
    last = next(line for line in reversed(log) if 'val_loss' in line)
    seconds = checkpoint['seconds']
    return {
        'model, data': f'{settings["model"]}, {settings["dataset"]}',
        'parameters': f'{run.parameters / 1e6:.2f} M',
        'steps, samples in each': f'{checkpoint["step"]:,}, {settings["batch_size"]}',
        'tokens': f'{checkpoint["tokens"]:,}',
        'seconds of training': f'{seconds:,.0f} ({checkpoint["tokens"] / max(seconds, 1e-9):,.0f} tokens/s)',
        'computed in': f'{checkpoint["dtype"].removeprefix("torch.")}, {checkpoint["threads"]} CPU threads',
        'last training loss': f'{train[-1][1]:.4f}' if train else '',
        'validation loss: last, best': f'{val[-1][1]:.4f}, {min(loss for _, loss in val):.4f}'
    } | {f'last {name}': f'{value:.4f}' for name, value in last.items() if name.startswith('val_') and name != 'val_loss'}


# ---------------------------------------------------------------------------------------------------------------------
# The page

def told(scores):
    """{metric: its value, interval and bounds as text}"""
    return {name: f'{score["value"]:.4g} [{score["low"]:.4g}, {score["high"]:.4g}]' + ''.join(
                f'; {bound} {score[bound]:.4g}' for bound in ('floor', 'ceiling', 'baseline') if bound in score)
            for name, score in scores.items()}


def table(columns):
    """{title: {row: text}} as Markdown; '' where a column lacks a row."""
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    lines = ['', *columns], ['---'] * (len(columns) + 1), *([row, *(column.get(row, '') for column in columns.values())]
                                                              for row in rows)
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines)


def newest(run, page):
    """The newest picture, animation and text that the run has drawn, as Markdown."""
    found = []
    for kind in ('png', 'gif', 'txt'):
        if files := sorted(run.folder.glob(f'sample_*.{kind}'), key=lambda file: (file.stat().st_mtime, file.name)):
            file = files[-1]
            found.append(f'```\n{file.read_text(encoding="utf-8", errors="replace")}\n```' if kind == 'txt' else
                         f'![{file.name}]({Path(os.path.relpath(file, page.parent)).as_posix()})')
    return found


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}, PyTorch {torch.__version__}'


def write(runs, path, more=''):
    """The page at `path`, its curves beside it; `more` is Markdown to stand behind the table of facts."""
    names = [run.folder.name for run in runs]
    names = names if len(set(names)) == len(names) else [run.folder.as_posix() for run in runs]
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = path.with_name(f'{path.stem}_loss.png')
    plot({name: run.log for name, run in zip(names, runs)}, curves)
    settings = [{name: f'`{value}`' for name, value in changed(run, run.defaults).items() if name not in ('model', 'dataset')}
                for run in runs]
    text = [f'# {", ".join(names)}', f'![losses]({curves.name})', table(dict(zip(names, map(facts, runs)))), more,
            '## Settings that differ from the defaults', table(dict(zip(names, settings))),
            '\n'.join(['```', *map(command, runs), '```'])]
    scores = {name: told(run.scores) for name, run in zip(names, runs)}
    text += ['## Scores', 'Value and 95 % interval.', table(scores)] if any(scores.values()) else []
    for name, run in zip(names, runs):
        if drawn := newest(run, path):
            text += [f'## Drawn by {name}', *drawn]
    text += [f'*Written on {machine()}.*']
    path.write_text('\n\n'.join(filter(None, text)) + '\n', encoding='utf-8')
    print(f'wrote {path}')
