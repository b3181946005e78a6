"""
Figures: image grids, animations and answers with Pillow, curves of losses and scores with matplotlib; in HTML the
modalities of a scene, states of a generation, texts with the probabilities of their tokens.
"""
import base64
import html
import io
import math
import textwrap
from itertools import cycle

import numpy as np
from PIL import Image, ImageDraw

COLORS = '#2a5caa', '#d1495b', '#2e8b57', '#e08e0b', '#7a4fa3', '#3d9bb3', '#8c5a44', '#666666'


# ---------------------------------------------------------------------------------------------------------------------
# Images

def save_image(image, path):
    image.save(path, optimize=True)
    print(f'wrote {path}')


def resized(image, width, height):
    """An Image whose pixels stay sharp squares."""
    return image.resize((width, height), Image.NEAREST)


def save_grid(columns, path, scale=2):
    """Saves columns {title: images} below their titles as one PNG. Each image has the size of the first, scaled."""
    images, gap, head = next(iter(columns.values())), 4, 18
    height, width = (side * scale for side in images[0].shape[:2])
    canvas = Image.new('RGB', (len(columns) * (width + gap) - gap, head + len(images) * (height + gap) - gap), 'white')
    draw = ImageDraw.Draw(canvas)
    for x, (title, column) in enumerate(columns.items()):
        draw.text((x * (width + gap) + 2, 3), title, fill='black')
        for y, image in enumerate(column):
            canvas.paste(resized(Image.fromarray(image), width, height), (x * (width + gap), head + y * (height + gap)))
    save_image(canvas, path)


def save_gif(frames, path, scale=2, seconds=3.0):
    """Saves frames (T, H, W) or (T, H, W, 3) uint8 as an animation of about `seconds`; the last frame is shown
    longer."""
    # few colors and no dithering: noise compresses badly
    frames = [Image.fromarray(frame).convert('RGB').quantize(24, dither=Image.Dither.NONE)
              for frame in np.asarray(frames)]
    frames = [resized(frame, frame.width * scale, frame.height * scale) for frame in frames]
    duration = max(20, int(1000 * seconds / len(frames)))  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:],
                   duration=[duration] * (len(frames) - 1) + [1500], loop=0)
    print(f'wrote {path}')


def tile(images, columns, gap=1):
    """Images (n, H, W, ...) side by side in rows of `columns`, on grey: one image."""
    images = np.asarray(images)
    n, H, W = images.shape[:3]
    rows = -(-n // columns)
    sheet = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, *images.shape[3:]), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = image
    return sheet


def save_answers(images, talks, path, side=160):
    """Images (n, H, W, 3) uint8 beside their questions, talks [[(question, answer, truth), ...], ...]. Right answers
    are green. Wrong answers are red and followed by the truth."""
    width, line, columns = 620, 13, []
    for talk in talks:
        texts = [(text, x, color) for question, answer, truth in talk for text, x, color in (
            (question, 8, 'black'),
            (answer, 20, 'green') if answer == truth else (f'{answer} (right: {truth})', 20, 'red'))]
        columns.append([(part, x, color) for text, x, color in texts for part in textwrap.wrap(text, 72)])
    heights = [max(side, line * len(column) + 4) + 8 for column in columns]
    canvas = Image.new('RGB', (width, sum(heights)), 'white')
    draw, y = ImageDraw.Draw(canvas), 0
    for image, column, height in zip(images, columns, heights):
        canvas.paste(resized(Image.fromarray(image), side, side), (0, y))
        for j, (text, x, color) in enumerate(column):
            draw.text((side + x, y + j * line), text, fill=color)
        y += height
    save_image(canvas, path)


# ---------------------------------------------------------------------------------------------------------------------
# Plots

def plot(width, height, columns=1):
    """A Figure of width x height inches and its row of Axes, without pyplot and its global state."""
    from matplotlib.figure import Figure  # here: the import takes half a second, and only plots need it
    figure = Figure((width, height), dpi=160, layout='constrained')
    row = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for axes in row:
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#e6e6e6')
        axes.set_axisbelow(True)
    return figure, row


def save_plot(figure, path):
    """Saves a Figure as PNG with a palette, a third of the size without one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
    save_image(image.quantize(128, dither=Image.Dither.NONE), path)


def points(lines, x, y):
    """[(x, y), ...] of the log lines that hold both as finite numbers."""
    pairs = [(line.get(x), line.get(y)) for line in lines]
    return [pair for pair in pairs if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)]


def scale_losses(axes, low, high):
    """Sets the y axis for losses from low to high: logarithmic if all are positive, with a few plain labels."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    if low > 0:
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 4 * low else
                                     LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter('{x:.4g}')


def draw_losses(axes, curves, x, unit=1):
    """Plots training losses as lines and validation losses as circles, over x in units of `unit`."""
    for (name, lines), color in zip(curves.items(), cycle(COLORS)):
        train, val = (np.array(points(lines, x, y)).reshape(-1, 2).T for y in ('train_loss', 'val_loss'))
        circles = dict(color=color, marker='o', markersize=4.5, markerfacecolor='white')
        label = f'{name}, val_loss {val[1, -1]:.4g}' if val.size else name
        axes.plot(train[0] / unit, train[1], color=color, linewidth=1)
        axes.plot(val[0] / unit, val[1], linestyle='', clip_on=False, zorder=3, **circles)
        axes.plot([], [], linewidth=1, label=label, **circles)  # for the legend only
    axes.xaxis.set_major_formatter('{x:,g}')


def save_losses(curves, path):
    """Plots the losses of runs, {name: log lines}, over steps and over time."""
    figure, (by_step, by_time) = plot(10, 3.8 + 0.1 * len(curves), 2)
    losses = [y for lines in curves.values() for name in ('train_loss', 'val_loss')
              for _, y in points(lines, 'step', name)]
    longest = max((x for lines in curves.values() for x, _ in points(lines, 'seconds', 'val_loss')), default=0)
    unit, name = (3600, 'hours') if longest > 3 * 3600 else (60, 'minutes') if longest > 600 else (1, 'seconds')
    scale_losses(by_step, min(losses), max(losses))
    draw_losses(by_step, curves, 'step')
    draw_losses(by_time, curves, 'seconds', unit)
    by_step.set(xlabel='steps', ylabel='loss (lines: training, circles: validation)')
    by_time.set(xlabel=f'training time, {name}')
    figure.legend(*by_step.get_legend_handles_labels(), loc='outside upper left', ncols=3, frameon=False)
    save_plot(figure, path)


def save_curves(curves, path, title, x_label, baseline):
    """Plots scores from 0 to 1 with their intervals, curves {name: {x: score}}, and the baseline (name, value) as a
    dashed line. The values of x are equally spaced."""
    figure, (axes,) = plot(5.2, 3.9)
    xs = list(next(iter(curves.values())))
    for i, ((name, curve), color) in enumerate(zip(curves.items(), cycle(COLORS))):
        value, low, high = (np.array([curve[x][key] for x in xs]) for key in ('value', 'low', 'high'))
        places = np.arange(len(xs)) + 0.03 * (i - (len(curves) - 1) / 2)  # side by side: intervals do not overlap
        axes.errorbar(places, value, (value - low, high - value), color=color, linewidth=1.5, marker='o',
                      markersize=3.5, capsize=2, label=name)
    axes.axhline(baseline[1], color='#888888', linestyle='--', linewidth=1, label=baseline[0])
    axes.set(title=title, xlabel=x_label, ylim=(0, 1), xlim=(-0.4, len(xs) - 0.6))
    axes.set_xticks(range(len(xs)), xs)
    axes.yaxis.set_major_formatter('{x:.0%}')
    figure.legend(loc='outside lower center', frameon=False, ncols=3)
    save_plot(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# HTML (lab/playground.py)

CSS = """
.cards {display: grid; grid-template-columns: repeat(auto-fill, 262px); gap: 12px} figure {margin: 0}
.card {border: 1px solid #e4e4e7; border-radius: 8px; padding: 8px 10px} .card h4 {margin: 0 0 6px; font-weight: 600}
.card div, .states div {display: flex; gap: 6px} .card img, .states img {image-rendering: pixelated; border-radius: 4px}
.card p, figcaption {font-size: 12px; color: #71717a}
.states input {width: 100%} .states > figure:not(.on) {display: none}
.tokens {font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; padding-bottom: 130px}
.tokens span {position: relative} [data-tip]:hover {background: #bfdbfe !important} .prompt {color: #71717a}
[data-tip]:hover::after {content: attr(data-tip); position: absolute; left: 0; top: 1.7em; z-index: 9;
  padding: 6px 10px; border-radius: 6px; background: #18181b; color: white; white-space: pre; font-size: 12px}
.gradio-container {max-width: 1320px !important; margin: auto} .note {min-height: 1.6em}
.question {background: #f4f4f5; border-radius: 8px; padding: 6px 10px; width: fit-content} .thought {color: #a1a1aa}
.cells {display: grid; max-width: 300px; aspect-ratio: 1; background: black 0 0 / cover; image-rendering: pixelated;
  border-radius: 6px; overflow: hidden; touch-action: none; user-select: none; cursor: crosshair}
.cells i {box-shadow: inset 0 0 0 .5px #ffffff30} .cells i.on {background: #ffffffd0}
"""
CELLS = """<div class="cells" style="grid-template-columns: repeat(${side}, 1fr); background-image: url(${image})">
${[...value].map((bit, i) => `<i data-i="${i}" class="${bit == 1 ? 'on' : ''}"></i>`).join('')}</div>"""
PAINT = """
let cells = null, ink = 1;
const paint = event => {
  const cell = document.elementFromPoint(event.clientX, event.clientY);
  if (cells && cell && element.contains(cell) && cell.dataset.i) {
    cells[cell.dataset.i] = ink; cell.classList.toggle('on', ink == 1); } };
element.addEventListener('pointerdown', event => {
  cells = [...element.querySelectorAll('i')].map(cell => +cell.classList.contains('on'));
  ink = event.target.classList.contains('on') ? 0 : 1; event.preventDefault(); paint(event); });
element.addEventListener('pointermove', paint);
window.addEventListener('pointerup', () => {
  if (cells) { props.value = cells.join(''); cells = null; trigger('input'); } });
"""  # of gradio's HTML component: `value`, '0110...', says which cells over the image are painted
SLIDE = "this.parentNode.querySelectorAll('.state').forEach((one, i) => one.classList.toggle('on', i == this.value))"


def address(image):
    """The address of an image (H, W, 3) uint8 that contains the image itself."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def figure_html(image, caption='', width=117):
    return (f'<figure><img src="{address(image)}" width="{width}"><figcaption>{html.escape(caption)}</figcaption>'
            '</figure>')


def cards_html(columns, texts={}):
    """Columns {'depth (truth)': images, 'depth': images} of a scene: a card for each modality, with its text."""
    found = {}
    for title, images in columns.items():
        name, _, kind = title.rstrip(')').partition(' (')
        found.setdefault(name, []).insert(0, figure_html(images[0], kind or 'generated' * (not name.isdecimal())))
    texts = {name: f'<p>{html.escape(rows[0])}</p>' for name, rows in texts.items()}
    return '<div class="cards">' + ''.join(
        f'<div class="card" data-name="{name}" style="grid-column: span {1 + (len(figures) > 2)}"><h4>{name}</h4><div>'
        f'{"".join(figures)}</div>{texts.get(name, "")}</div>' for name, figures in found.items()) + '</div>'


def states_html(states, width=720):
    """A slider through [(title, images)], at the last one."""
    last = len(states) - 1
    return f'<div class="states"><input type="range" max="{last}" value="{last}" oninput="{SLIDE}">' + ''.join(
        f'<figure class="state {"on" * (i == last)}"><div>'
        + ''.join(figure_html(image, '', width // len(images)) for image in images)
        + f'</div><figcaption>{title}</figcaption></figure>' for i, (title, images) in enumerate(states)) + '</div>'


def tokens_html(rows, n_prompt):
    """A text as rows (token, [(token, p), ...]): hovering over a token shows the list, its own probability first. The
    first n_prompt are grey, of the others improbable ones red."""
    spans = []
    for i, (token, probs) in enumerate(rows):
        tip = html.escape('\n'.join(f'{p:6.1%}  {other!r}' for other, p in probs))
        tip = f' data-tip="{tip}"' * bool(probs)
        red = 0.25 * (1 - probs[0][1]) ** 3 if probs else 0
        look = 'class="prompt"' if i < n_prompt else f'style="background: rgba(220, 38, 38, {red:.2f})"'
        spans.append(f'<span {look}{tip}>{html.escape(token)}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def talk_html(turns):
    """Questions and replies, a chain of thought in grey."""
    rows = []
    for question, reply in turns:
        thought, mark, answer = reply.rpartition('Answer:')
        rows.append(f'<p class="question">{html.escape(question)}</p><p><span class="thought">'
                    f'{html.escape(thought + mark)}</span> <b>{html.escape(answer)}</b></p>')
    return ''.join(rows)
