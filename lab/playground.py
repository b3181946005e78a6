"""
The playground: a page in the browser for trained models of every chapter. It needs gradio: pip install gradio

    python -m lab.playground --out_dir=out/nano4m
    python -m lab.playground --out_dir=out/nano4m,out/gpt_shakespeare,out/vlm_scenes        a tab for each run

nano4M: any modality to any other, in-painting, retrieval. GPT: text with the probability of each token. MaskGIT, flow
matching: each step of a generation. VLM: a chat about an image. Settings and defaults are those of sample.py, and each
result has the command that repeats it. The page is for this machine alone, unless --host says otherwise, and contacts
no other: no sharing link, no telemetry, no fonts from the web.
"""
import hashlib
import os
import shlex
import tempfile
import time
from functools import partial
from pathlib import Path

import config
from config import UserError  # before torch, see config/__init__.py

import numpy as np
from PIL import Image, ImageOps

import lab
from engine import devices
from flow import SOLVERS
from lab import figures, flow, fourm, gpt, maskgit, options, retrieval, vlm
from maskgit import ORDERS, SCHEDULES
from prepare.pictures import read_picture

os.environ |= dict(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1')  # read by the import of gradio
try:
    import gradio as gr
except ModuleNotFoundError:
    gr = None

SETTINGS = dict(
    out_dir='out/nano4m',       # the run; several with commas between
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    device='auto',              # cuda, mps or cpu
    host='127.0.0.1',           # the address of the page; 0.0.0.0 opens it to the network
    port=7860,                  # of the page
)
CHOICES = dict(order=ORDERS, schedule=SCHEDULES, method=SOLVERS, shape=maskgit.SHAPES, by=retrieval.WAYS)


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a widget for each field of a chapter's dataclass, and back; images of the user's

def settings_of(run):
    return lab.module_of(run.model).settings_of(run)


def widget(defaults, name):
    """A widget for one setting, with its comment and its default."""
    kind, value = type(defaults), getattr(defaults, name)
    look = dict(label=name, info=config.explain_class(kind)[name][1], min_width=220)
    if name in CHOICES:
        return gr.Dropdown([*CHOICES[name]], value=value, **look)
    if type(value) is int:
        return gr.Number(value, precision=0, **look)
    return {bool: gr.Checkbox, float: gr.Number}.get(type(value), gr.Textbox)(value, **look)


def read(run, values):
    """The settings with these values, and the command of sample.py for them. Raises UserError."""
    defaults = vars(settings_of(run))
    values = {name: value for name, value in values.items()
              if name in defaults and value not in (None, defaults[name], defaults[name] or '')}
    _, settings = options.apply({name: (value, 'this page') for name, value in values.items()}, {}, settings_of(run))
    program, usual = dict(checkpoint=run.path.name, device=run.device.type), devices.find('auto').type
    values = {name: value for name, value in program.items() if value not in (SETTINGS[name], usual)} | values
    words = [f'--{name}={shlex.quote(str(value))}' for name, value in values.items()]
    return settings, ' '.join(['python sample.py', f'--out_dir={shlex.quote(run.path.parent.as_posix())}', *words])


def save(run, image):
    """The path of an image of the user's, saved in the run's folder for the command of sample.py."""
    path = run.path.parent / 'playground' / f'{hashlib.sha256(image.tobytes()).hexdigest()[:12]}.png'
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return path.as_posix()


def painted(run, cells, scale):
    """The path of an image in which painted cells, '1' in '0110...', are white squares of `scale` pixels."""
    square = np.array([*cells], np.uint8).reshape(2 * [round(len(cells) ** 0.5)])
    return save(run, Image.fromarray(np.kron(255 * square, np.ones((scale, scale), np.uint8))))


def canvas(side, image='data:,'):
    return gr.HTML('0' * side ** 2, html_template=figures.CELLS, js_on_load=figures.PAINT, side=side, image=image)


def pick(run, picture, n, side=0):
    """Widgets to choose one of n held-out images or to upload one, with side x side cells to paint on: {'scene': its
    number, 'image': the path of the upload or '', 'cells': '0110...'}."""
    number, own = gr.Slider(0, n - 1, 0, step=1, label='held-out scene'), gr.State('')
    cells, upload = canvas(side, figures.address(picture(0))), gr.UploadButton('or upload an image', size='sm')
    note = gr.Markdown()

    def show(image, path=''):
        return path, gr.HTML('0' * side ** 2, image=figures.address(np.asarray(image))), ''

    def take(file):
        try:
            image = read_picture(file)
            image = ImageOps.fit(image, [min(*image.size, 512)] * 2)  # the central square
            return show(image, save(run, image))
        except (UserError, OSError) as error:
            return gr.skip(), gr.skip(), f'⚠ {error}'.replace(file, Path(file).name)
    number.change(lambda i: show(picture(int(i))), number, [own, cells, note], show_progress='hidden')
    upload.upload(take, upload, [own, cells, note], show_progress='hidden')
    return dict(scene=number, image=own, cells=cells)


# ---------------------------------------------------------------------------------------------------------------------
# The tabs. Each function makes the main widgets and returns them, {name: widget}; the names of settings that the page
# does not show; values_of(values of widgets), the values of settings; show(settings, values), which yields HTML; a hint

def first_of(names):
    """rgb, or the first of a model without rgb."""
    return 'rgb' if 'rgb' in names else names[0]


def any_to_any(run):
    """nano4M: from any modalities to any others; painted patches of rgb are generated again."""
    names, texts = [*run.model.batch_keys], [m.name for m in run.model.modalities if m.is_text]
    first = first_of(names)
    side = run.model.modality['rgb'].grid[0] if 'rgb' in names else 0  # of the cells to paint on
    inputs = pick(run, partial(fourm.scene_image, run), run.data().n, side) | dict(
        given=gr.CheckboxGroup(names, value=[first], label='given'),
        text=gr.Textbox(label='a text of your own', placeholder='two large red metal spheres'),
        target=gr.CheckboxGroup(names, value=[name for name in names if name != first], label='to be generated'))

    def tick(text, given, target):
        return (given, target) if not text.strip() or {*given} & {*texts} else (texts[-1:], [first])
    given, target = inputs['given'], inputs['target']
    inputs['text'].change(tick, [inputs['text'], given, target], [given, target], queue=False, show_progress='hidden')

    def values_of(values):
        given, target = ([name for name in names if name in values[key]] for key in ('given', 'target'))
        paints = '1' in values['cells'] and 'rgb' in given
        if not target:
            raise UserError('tick what is to be generated')
        if 'rgb' in given and 'rgb' in target and not paints:
            raise UserError('rgb is given and generated: paint over the part of the image that is to be new')
        hide = f'rgb={painted(run, values["cells"], 8)}' if paints else ''
        return own_or_scene(values) | dict(given=','.join(given), target=','.join(target), hide=hide)

    def show(settings, values):
        chain, = fourm.read_chains(run, settings)
        for found in fourm.stream_columns(run, settings, chain, fourm.held_out(run, settings), every_step=True):
            yield figures.cards_html(*found)
    return inputs, 'chain hide retrieve by n', values_of, show, (
        'Tick what is given and what is to be generated. To in-paint, tick rgb twice and paint over the image.')


def own_or_scene(values):
    """One scene: the chosen one, or the user's own text or image in its place."""
    text = values['text'].strip()
    return values | dict(n=1, text=text, scene=0 if values['image'] or text else values['scene'])


def search(run):
    """nano4M: the held-out scenes that are nearest to a text or an image."""
    names = [*run.model.batch_keys]
    inputs = dict(given=gr.Radio(names, value=names[-1], label='query'),
                  text=gr.Textbox(label='a text of your own', placeholder='two large red metal spheres'))

    def show(settings, values):
        yield figures.cards_html(fourm.nearest_scenes(run, settings, fourm.held_out(run, settings)))

    def values_of(values):
        return own_or_scene(values | {'image' if run.model.modality[values['given']].is_text else 'text': ''})
    inputs |= pick(run, partial(fourm.scene_image, run), run.data().n)
    inputs |= dict(retrieve=gr.Radio(names, value=first_of(names), label='retrieve'), by=widget(settings_of(run), 'by'))
    return inputs, None, values_of, show, 'The ten nearest held-out scenes. The first search makes an index: minutes.'


def write(run):
    """GPT: a text, token by token, then the probabilities of its tokens."""
    def show(settings, values):
        last = 0
        for ids, in gpt.stream_rows(run, settings):
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                yield figures.tokens_html([(run.dataset.decode(ids), [])], 0)
        yield figures.tokens_html(gpt.token_rows(run, ids), len(run.dataset.encode(settings.prompt)))
    return dict(prompt=gr.Textbox(label='prompt', lines=4)), 'prompts n draft', dict, show, (
        'Hover over a token for its probability and the most probable others. Improbable tokens are red.')


def by_steps(run):
    """MaskGIT and flow matching: all steps of a generation, with a slider; MaskGIT also completes a digit."""
    inputs, module = {}, lab.module_of(run.model)
    if run.model.config.n_classes:
        classes = [(name, str(c)) for c, name in enumerate(run.dataset.classes)]
        inputs['labels'] = gr.Radio(classes, value='3', label='class')
        if module == maskgit:
            with gr.Accordion('draw a digit, of which the upper part is given', open=False):
                inputs['cells'] = canvas(14)

    def values_of(values):
        draws = '1' in values.get('cells', '')
        own = dict(image=painted(run, values['cells'], 2), complete=values['complete'] or 0.5) if draws else {}
        return values | own | dict(show='gif' if module == maskgit else 'path')

    def show(settings, values):
        yield figures.states_html(module.frames_of(run, settings))
    return inputs, 'image show', values_of, show, 'Move the slider through the steps.'


def chat(run):
    """VLM: questions about an image; earlier ones about the same image are read again."""
    lines = run.dataset.questions(run.split)

    def picture(i):
        return run.dataset.images(run.split, [lines[i]['image']]).reshape(-1, *2 * [run.dataset.size], 3)[0]

    def values_of(values):
        return values | dict(image=values['image'] or save(run, Image.fromarray(picture(values['scene']))))

    def show(settings, values):
        turns = values['turns'].setdefault(settings.image, [])  # of this user: the value of a gr.State
        images, before = vlm.in_rows(run.dataset.read_image(settings.image)[None], 1), list(turns)
        asked = run.dataset.own_question(settings.text)
        for ids in vlm.stream_reply(run, images, before, asked, settings):
            turns[len(before):] = [(asked, list(ids))]
            yield figures.talk_html((question, run.dataset.decode(reply)) for question, reply in turns)
    inputs = pick(run, picture, len(lines)) | dict(text=gr.Textbox(lines[0]['turns'][0][0], label='question'))
    return inputs | dict(turns=gr.State({})), 'prompts chat n', values_of, show, 'Ask about the image.'


def draw(run):
    """Any other run: the image or the texts of sample.py."""
    def show(settings, values):
        with tempfile.TemporaryDirectory() as folder:
            texts = lab.module_of(run.model).draw(run, settings, Path(folder, 'sample.png')) or []
            images = [np.asarray(Image.open(path)) for path in Path(folder).glob('*.png')]
        yield figures.states_html([('', images)]) if images else figures.tokens_html([('\n\n'.join(texts), [])], 0)
    return {}, 'chat', dict, show, ''


TABS = {fourm.AnyToAny: (any_to_any, search), gpt.Text: (write,), maskgit.Images: (by_steps,), flow.Images: (by_steps,),
        flow.Points: (by_steps,), vlm.Answers: (chat,)}


def tabs_of(run):
    """The tabs of a run. A model that reads several images at a time has no chat, which is about one."""
    several = getattr(run.model.config, 'n_images', 1) > 1
    return (draw,) if several else TABS.get(type(settings_of(run)), (draw,))


def build_tab(run, tab):
    """Widgets on the left, results on the right. One generation at a time; other users wait in the queue."""
    with gr.Column(scale=2, min_width=320):
        inputs, hidden, values_of, show, hint = tab(run)
        button, defaults = gr.Button('Generate', variant='primary'), settings_of(run)
        with gr.Accordion('settings', open=len(inputs) < 3, visible=hidden is not None), gr.Row():
            inputs |= {name: widget(defaults, name) for name in vars(defaults)
                       if hidden is not None and name not in {*inputs, *hidden.split()}}
    with gr.Column(scale=5, min_width=480):
        note, shown = gr.Markdown(hint, elem_classes='note'), gr.HTML()
        command = gr.Code(language='shell', label='the same by sample.py', interactive=False, lines=1, wrap_lines=True,
                          show_line_numbers=False, visible=False)

    def generate(*values):
        started, values = time.perf_counter(), dict(zip(inputs, values))
        try:
            settings, line = read(run, values_of(values))
            for found in show(settings, values):
                yield '...', found, gr.Code(line, visible=True)
            yield f'{time.perf_counter() - started:.2f} s', gr.skip(), gr.skip()
        except (UserError, ValueError, OSError) as error:
            yield f'⚠ {error}', gr.skip(), gr.skip()
    button.click(generate, [*inputs.values()], [note, shown, command], concurrency_id='model', concurrency_limit=1,
                 show_progress='minimal', show_progress_on=note)


def serve(runs, host='127.0.0.1', port=None):
    """Serve the page, in threads of this process, and return it. Raises UserError."""
    with gr.Blocks(title='nanoFM', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown('## nanoFM playground')
        for run in runs:
            for tab in tabs_of(run):
                with gr.Tab(f'{run.path.parent.name}{": search" * (tab == search)}'), gr.Row():
                    build_tab(run, tab)
    theme = gr.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    try:
        page.launch(server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, theme=theme,
                    css=figures.CSS, footer_links=[], ssr_mode=False)
    except OSError as error:
        raise UserError(f'{host}:{port}: {error}')
    return page


def main(*arguments, **overrides):
    s = config.apply(config.read(arguments, overrides), SETTINGS)
    if gr is None:
        raise UserError('the playground needs gradio, which is not in requirements.txt: pip install gradio')
    device = devices.find(s['device'])
    devices.set_up(device, training=False)
    runs = [lab.open_run(Path(folder, s['checkpoint']), device) for folder in s['out_dir'].split(',')]
    page = serve(runs, s['host'], s['port'])
    print(f'the playground: {page.local_url} (Ctrl-C ends it)')
    page.block_thread()


if __name__ == '__main__':
    config.run(main)
