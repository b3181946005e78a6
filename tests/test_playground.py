"""lab/playground.py: what a click yields, with gradio's components replaced by plain values; the page itself in a headless browser,
if gradio, playwright and Chromium are installed."""
import base64
import html
import io
import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

import lab
import sample
import train
from config import UserError
from lab import chains, figures, fourm, gpt, playground, retrieval
from lab import vlm as lab_vlm
from prepare import scenes_qa, toy2d
from tests import test_flow, test_vlm, toys
from tests.tiny import TINY


# ---------------------------------------------------------------------------------------------------------------------
# Tiny runs of all chapters

@pytest.fixture(scope='module')
def runs(work):
    toys.make_story()
    toys.make_digits()
    toy2d.main(n_train=300, n_val=300, out='data/points')
    scenes_qa.main(n_turns=4, length=60)
    few = dict(max_iters=2, pictures=False)
    train.main(**TINY | few | dict(out_dir='out/play_fourm'))
    train.main(**TINY | few | dict(out_dir='out/play_blind', train_modalities='depth caption'))
    train.main(**toys.GPT | few, dataset='story', block_size=16, out_dir='out/play_gpt')
    train.main(**toys.GPT | few | dict(model='maskgit'), dataset='toy_mnist', out_dir='out/play_maskgit')
    train.main(**test_flow.RUN | few, dataset='toy_mnist', out_dir='out/play_flow', patch_size=14)
    train.main(**test_flow.RUN | few, dataset='points', out_dir='out/play_points', label_dropout=0.0)
    train.main(**test_vlm.TINY, model='vlm', dataset='scenes_qa', out_dir='out/play_vlm', pictures=False)
    train.main(**toys.GPT | few, dataset='toy_mnist', out_dir='out/play_digits')
    names = ('fourm', 'blind', 'gpt', 'maskgit', 'flow', 'points', 'vlm', 'digits')
    return {name: lab.open_run(Path(f'out/play_{name}/ckpt_last.pt'), 'cpu') for name in names}


def images_of(page, name='.*?'):
    """Images (H, W, 3) of some HTML, of the card of a modality if it is named."""
    page = re.search(rf'data-name="{name}".*?(?=<div class="card"|$)', page, re.S)[0] if name != '.*?' else page
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))
            for data in re.findall('base64,([^"]+)"', page)]


def run_command(command, kind='png'):
    """What the command of sample.py writes."""
    program, file, *words = shlex.split(command)
    assert (program, file) == ('python', 'sample.py')
    folder = words[0].removeprefix('--out_dir=')
    return toys.draw(folder, *words[1:], kind=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Without gradio

class Plain:
    """gradio, with components that only know their first value."""
    def __getattr__(self, name):
        def component(*args, **kwargs):
            made = MagicMock()
            first = args[0] if args else '' if name == 'Textbox' else None
            made.value = kwargs.get('value', args[2] if name == 'Slider' else first)
            made.visible, made.image = kwargs.get('visible'), kwargs.get('image')
            return made
        return component

    def skip(self):
        return None


@pytest.fixture
def click(runs, monkeypatch):
    """click(run, tab, **changes of values): all (note, HTML, command) that a click yields, without what is unchanged."""
    monkeypatch.setattr(playground, 'gr', Plain())

    def make(name, tab, **changes):
        made, buttons = {}, []
        monkeypatch.setattr(playground.gr, 'Button', lambda *args, **kwargs: buttons.append(MagicMock()) or buttons[-1], raising=False)

        def remember(run):
            found = tab(run)
            made['inputs'] = found[0]
            return found
        playground.build_tab(runs[name], remember)
        function, inputs = buttons[-1].click.call_args.args[:2]
        names = {id(widget): key for key, widget in made['inputs'].items()}
        values = [changes.get(names.get(id(widget)), widget.value) for widget in inputs]
        steps = list(function(*values))
        notes, pages, commands = zip(*steps)
        return notes, [page for page in pages if page], [one.value for one in commands if one]
    return make


def test_a_widget_for_every_setting(runs, monkeypatch):
    """Names, defaults and comments are those of the dataclass."""
    made = []
    monkeypatch.setattr(playground, 'gr', MagicMock())
    for kind in ('Number', 'Textbox', 'Dropdown', 'Checkbox'):
        monkeypatch.setattr(playground.gr, kind, lambda *args, kind=kind, **kwargs: made.append((kind, args, kwargs)))
    for name in ('steps', 'order', 'top_k', 'top_p', 'temperature'):
        playground.widget(fourm.AnyToAny(), name)
    assert [kind for kind, _, _ in made] == ['Textbox', 'Dropdown', 'Number', 'Number', 'Textbox']
    assert made[0][2]['info'] == 'decoding steps of an image; None: 1 if rgb is known, otherwise 8'
    assert made[1][2]['value'] == 'random' and 'halton' in made[1][1][0] and made[2][2]['precision'] == 0


def test_values_become_settings_and_a_command(runs):
    settings, command = playground.read(runs['fourm'], dict(given='rgb', steps='8', top_k=0, temperature='', text='two cubes', cells='01'))
    assert settings == fourm.AnyToAny(given='rgb', steps=8, text='two cubes')
    assert command == "python sample.py --out_dir=out/play_fourm --given=rgb --steps=8 --text='two cubes'"
    with pytest.raises(UserError, match="this page: steps='many' is not of type int"):
        playground.read(runs['fourm'], dict(steps='many'))
    with pytest.raises(UserError, match='seed=-1: must be at least 0'):
        playground.read(runs['fourm'], dict(seed=-1))


def test_any_to_any_step_by_step(click, runs):
    """The last picture is that of the command; before it come the steps, with unknown tokens in grey."""
    notes, pages, commands = click('fourm', playground.any_to_any, scene=3, given=['rgb'], target=['caption', 'depth'], steps='4',
                                   temperature='1')
    assert re.fullmatch(r'\d+\.\d\d s', notes[-1]) and len(pages) == 1 + 1 + 4 + 1 + 1  # given; depth: start, steps, end; caption
    assert '--scene=3' in commands[-1] and '--target=depth,caption' in commands[-1]
    grey = [(images_of(page, 'depth')[0] == 128).all(-1).mean() for page in pages[1:7]]
    assert grey[0] == 1 and grey[-1] < 0.1 and grey == sorted(grey, reverse=True) and len(set(grey)) >= 4
    grid = np.asarray(run_command(commands[-1]))[18:18 + 128]
    generated, truth = images_of(pages[-1], 'depth')
    assert (grid[::2, 132:260:2] == truth).all() and (grid[::2, 264:392:2] == generated).all()  # rgb, depth (truth), depth


def test_the_steps_of_an_image_are_those_of_generate(runs):
    """chains.image_steps against model.generate, for all orders, with guidance and weights."""
    run, given = runs['fourm'], {name: runs['fourm'].ids(name, np.arange(2)) for name in ('caption', 'depth')}
    given['rgb'] = run.ids('rgb', np.arange(2))
    given['rgb'][:, 10:30] = -1
    for entry in ('rgb:5:random:t1', 'rgb:3:confidence:t0.9..0.3:g1..3', 'rgb:64:raster:t0', 'rgb:4:halton:cosine:t1'):
        chain = chains.parse_chain(f'rgb,caption:w2,depth>{entry}', fourm.AnyToAny(), run.model, ['rgb'])
        end, _ = chains.generate(run, given, chain, torch.Generator().manual_seed(5))
        *steps, (last, raw) = chains.stream(run, given, chain, torch.Generator().manual_seed(5), every_step=True)
        assert torch.equal(last['rgb'], end['rgb']) and 'rgb' in raw
        unknown = [(known['rgb'] < 0).sum().item() for known, _ in steps]
        assert unknown[0] == unknown[1] == 40 and unknown[-1] == 0 and unknown == sorted(unknown, reverse=True)


def test_a_model_without_rgb(click):
    notes, pages, commands = click('blind', playground.any_to_any)
    assert notes[-1].endswith(' s') and len(images_of(pages[-1], 'caption')) == 2 and '--given=depth --target=caption' in commands[-1]
    notes, *_ = click('blind', playground.any_to_any, given=['caption'], target=['depth'], text='a large red cube')
    assert notes[-1].endswith(' s')
    made = playground.search(lab.open_run(Path('out/play_blind/ckpt_last.pt'), 'cpu'))[0]
    assert (made['given'].value, made['retrieve'].value) == ('caption', 'depth')


def test_in_painting_changes_the_mask_alone(click, runs):
    cells = np.zeros((8, 8), int)
    cells[2:5, 3:6] = 1
    _, pages, commands = click('fourm', playground.any_to_any, cells=''.join(map(str, cells.flat)), given=['rgb'], target=['rgb'],
                               temperature='1')
    generated, given, truth = images_of(pages[-1], 'rgb')
    mask = np.kron(cells, np.ones((8, 8))) > 0
    assert (given[mask] == 128).all() and (given[~mask] == truth[~mask]).all() and (generated[mask] != 128).any()
    grid = np.asarray(run_command(commands[-1]))[18:18 + 128:2]
    assert (grid[:, 264:392:2] == generated).all()
    settings, _ = playground.read(runs['fourm'], dict(given='rgb', hide=re.search('--hide=([^ ]+)', commands[-1])[1]))
    chain, = fourm.read_chains(runs['fourm'], settings)
    ids = fourm.given_ids(runs['fourm'], settings, chain, np.arange(1), torch.Generator())
    assert ((ids['rgb'] < 0).view(8, 8).numpy() == cells).all()
    found, _ = chains.generate(runs['fourm'], ids, chain, torch.Generator().manual_seed(0))
    assert (found['rgb'] == runs['fourm'].ids('rgb', np.arange(1)))[ids['rgb'] >= 0].all()  # the decoder sees neighbours


@pytest.mark.parametrize('changes, message', [
    (dict(target=[]), 'tick what is to be generated'),
    (dict(target=['rgb']), 'paint over the part of the image that is to be new'),
    (dict(given=['caption'], target=['rgb'], text='a large purpel cube'), "'purpel' is not in the vocabulary of this data set: did"),
    (dict(given=['rgb'], text='a large red cube'), '--given=rgb needs --image beside --text'),
    (dict(given=['caption'], target=['rgb'], steps='many'), "steps='many' is not of type int"),
    (dict(given=['rgb'], target=['depth'], steps='0'), 'steps, mean and best are at least 1'),
    (dict(given=['caption'], target=['rgb'], temperature='-3'), "temperature='-3'"),
])
def test_faults_become_a_note(click, changes, message):
    notes, *_ = click('fourm', playground.any_to_any, **changes)
    assert notes[-1].startswith('⚠ ') and re.search(message, notes[-1]), notes


def test_uploads(runs, monkeypatch, tmp_path):
    """The central square is kept; what is no image becomes a note that does not show the server's folders."""
    upload = MagicMock()
    gr = Plain()
    monkeypatch.setattr(playground, 'gr', gr)
    monkeypatch.setattr(gr, 'UploadButton', lambda *args, **kwargs: upload, raising=False)
    playground.pick(runs['fourm'], lambda i: np.zeros((64, 64, 3), np.uint8), 5, 8)
    take = upload.upload.call_args.args[0]
    wide = Image.new('RGB', (90, 60), 'red')
    wide.paste('blue', (15, 0, 75, 60))
    wide.save(tmp_path / 'wide.png')
    path, canvas, note = take(str(tmp_path / 'wide.png'))
    saved = np.asarray(Image.open(path))
    assert saved.shape == (60, 60, 3) and (saved == (0, 0, 255)).all() and note == '' and canvas.value == '0' * 64
    (tmp_path / 'notes.png').write_text('no image')
    path, canvas, note = take(str(tmp_path / 'notes.png'))
    assert path is canvas is None and note.startswith('⚠ notes.png: truncated, too large or not an image')


def test_a_text_of_ones_own_is_ticked(runs, monkeypatch):
    gr, boxes = Plain(), []
    monkeypatch.setattr(playground, 'gr', gr)
    monkeypatch.setattr(gr, 'Textbox', lambda *args, **kwargs: boxes.append(MagicMock()) or boxes[-1], raising=False)
    playground.any_to_any(runs['fourm'])
    tick = boxes[0].change.call_args.args[0]
    assert tick('two cubes', ['rgb'], ['depth']) == (['caption'], ['rgb'])
    assert tick('two cubes', ['scene_desc'], ['depth']) == (['scene_desc'], ['depth']) and tick(' ', ['rgb'], []) == (['rgb'], [])


def test_search(click, monkeypatch):
    monkeypatch.setattr(retrieval.train_towers, '__defaults__', ('cpu', 20, 32, 0))
    notes, pages, commands = click('fourm', playground.search, text='two large red metal spheres')
    assert len(images_of(pages[-1])) == 11 and '--retrieve=rgb' in commands[-1] and notes[-1].endswith(' s')
    grid = np.asarray(run_command(commands[-1]))[18::2]
    for i, image in enumerate(images_of(pages[-1])):
        assert (grid[:64, 132 * i:132 * i + 128:2] == image).all()


def test_texts_and_their_probabilities(click, runs, capsys):
    notes, pages, commands = click('gpt', playground.write, prompt='The cat', max_new_tokens=30)
    capsys.readouterr()
    sample.main(*shlex.split(commands[-1])[2:])
    shown = html.unescape(re.sub('<[^>]*>', '', pages[-1]))
    assert shown + '\n' == capsys.readouterr().out and shown.startswith('The cat') and 'class="prompt"' in pages[-1]


def test_probabilities_of_tokens(runs):
    """Those of one pass over the text; in a long text, of windows of half a context or more; they sum to at most 1."""
    model = runs['gpt'].model
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(model.config.vocab_size, (43,))
    p, top, top_p = gpt.top_tokens(model, ids, k=5)
    assert p.shape == (42,) and top.shape == top_p.shape == (42, 5)
    for i in (0, 7, 8, 20, 41):
        start = 0 if i < 16 else i // 8 * 8 - 8  # T = 16
        with torch.no_grad():
            expected = model.logits(model.backbone(ids[None, start:i + 1]))[0, -1].softmax(-1)
        assert torch.allclose(p[i], expected[ids[i + 1]], atol=1e-6) and torch.equal(top[i], expected.topk(5).indices)
    rows = gpt.token_rows(runs['gpt'], ids.tolist())
    assert len(rows) == 43 and all(5 <= len(probs) <= 6 and abs(probs[0][1] - q) < 1e-6 for (_, probs), q in zip(rows[1:], p.tolist()))


@pytest.mark.parametrize('name, changes', [('maskgit', dict(labels='3', n=4, steps=5)), ('flow', dict(labels='3', n=4, steps=5)),
                                           ('maskgit', dict(labels='7', n=3, steps=4, cells='1' * 30 + '0' * 166))])
def test_digits_step_by_step(click, name, changes):
    """The states are the frames of the command's GIF."""
    _, pages, commands = click(name, playground.by_steps, **changes)
    states, gif = images_of(pages[-1]), run_command(commands[-1], 'gif')
    assert len(states) == changes['steps'] + 1 >= gif.n_frames > 1  # equal frames of a GIF become one
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert('RGB'))
    scale = last.shape[0] // states[-1].shape[0]
    difference = np.abs(last[::scale, ::scale].astype(int) - states[-1])
    assert difference.max() <= (0 if name == 'maskgit' else 40)  # a GIF has 24 colors
    if 'cells' in changes:  # the upper half is given
        assert (states[0] == states[-1])[:6].all() and (states[0][8:] == 128).all()


def test_points_and_their_velocities(click):
    _, pages, _ = click('points', playground.by_steps, n=50, steps=40)
    assert len(images_of(pages[-1])) == 2 * 21 and '<figcaption>t = 1.00</figcaption>' in pages[-1]


def test_a_chat(click, runs, capsys):
    turns = {}
    question = runs['vlm'].dataset.questions('val')[1]['turns'][0][0]
    notes, pages, commands = click('vlm', playground.chat, scene=1, text=question, turns=turns)
    ((asked, ids),), = turns.values()
    capsys.readouterr()
    sample.main(*shlex.split(commands[-1])[2:])
    assert asked == question and runs['vlm'].dataset.decode(ids) == capsys.readouterr().out.strip('\n')
    click('vlm', playground.chat, scene=1, text=question, turns=turns)
    click('vlm', playground.chat, scene=2, text=question, turns=turns)
    assert [len(rows) for rows in turns.values()] == [2, 1]  # earlier turns about the same image are context


def test_a_model_of_several_images_has_no_chat(runs, click):
    Image.new('L', (9, 9)).save('own.png')
    _, pages, _ = click('vlm', playground.draw, image='own.png', text='How many cubes are there?', max_new_tokens=3)
    texts = lab_vlm.own_questions(runs['vlm'], lab_vlm.Answers(image='own.png', text='How many cubes are there?', max_new_tokens=3))
    assert pages[-1] == figures.tokens_html([(texts[0], [])], 0)
    assert playground.tabs_of(runs['vlm']) == (playground.chat,)
    runs['vlm'].model.config.n_images = 2
    assert playground.tabs_of(runs['vlm']) == (playground.draw,)
    with pytest.raises(UserError, match='1 images, and this model reads 2 at a time'):
        lab_vlm.prefill_images(runs['vlm'], np.zeros((1, 1, 64, 64, 3), np.uint8))
    runs['vlm'].model.config.n_images = 1


def test_any_other_run(click):
    _, pages, commands = click('digits', playground.draw, n=2)
    assert (images_of(pages[-1])[0] == np.asarray(run_command(commands[-1]))).all()


def test_without_gradio_one_line_says_how(monkeypatch):
    monkeypatch.setattr(playground, 'gr', None)
    with pytest.raises(UserError, match='needs gradio, which is not in requirements.txt: pip install gradio'):
        playground.main('--out_dir=out/play_fourm')


def test_html_is_escaped():
    page = figures.tokens_html([('<b>', []), ('&', [('"', 0.5)])], 1) + figures.talk_html([('<i>', 'a Answer: <u>')])
    assert all(f'&lt;{tag}&gt;' in page for tag in 'biu') and '<i>' not in page and '<u>' not in page and '&amp;' in page
    assert 'data-tip=" 50.0%  &#x27;&quot;&#x27;"' in page


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    pytest.importorskip('gradio')
    playwright = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM:
        pytest.skip('no Chromium')
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield found
        found.close()


@pytest.fixture(scope='module')
def address(browser, runs):
    page = playground.serve(list(runs.values()))
    yield page.local_url
    page.close()


class User:
    """Somebody at the page, in a window of their own; no other address than that of the page may be contacted."""
    def __init__(self, browser, address):
        self.page, self.foreign, self.errors = browser.new_context().new_page(), [], []
        self.page.set_default_timeout(60_000)
        self.page.on('request', lambda request: None if request.url.startswith((address, 'data:', 'blob:'))
                     else self.foreign.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector('.cells')
        self.tab('play_fourm')

    def tab(self, name):
        self.page.get_by_role('tab', name=name, exact=True).click()

    def check(self, label, which, value=True):
        self.page.get_by_label(label, exact=True).locator('visible=true').nth(which).set_checked(value)

    def start(self):
        self.page.locator('button:visible', has_text='Generate').click()

    def wait(self, pattern=r'\d s$'):
        """The visible note, once it matches."""
        return self.page.wait_for_function(
            f"() => [...document.querySelectorAll('.note')].filter(e => e.offsetParent).map(e => e.innerText.trim())"
            f".find(text => /{pattern}/.test(text) && !/processing|queue/.test(text))").json_value()

    def generate(self, pattern=r'\d s$'):
        self.page.evaluate("document.querySelectorAll('.note p').forEach(e => e.innerText = '')")
        self.start()
        return self.wait(pattern)

    def html(self):
        return self.page.locator('.cards:visible, .states:visible, .tokens:visible, .question:visible').first.evaluate('e => e.outerHTML')

    def command(self):
        return ' '.join(self.page.locator('.cm-content:visible').inner_text().split())

    def paint(self, x0, y0, x1, y1):
        box = self.page.locator('.cells:visible').bounding_box()
        x, y, side = box['x'], box['y'], box['width']
        self.page.mouse.move(x + x0 * side, y + y0 * side)
        self.page.mouse.down()
        self.page.mouse.move(x + x1 * side, y + y1 * side, steps=12)
        self.page.mouse.up()


@pytest.fixture
def user(browser, address):
    one = User(browser, address)
    yield one
    assert one.foreign == [] and one.errors == []
    one.page.context.close()


def test_each_tab_gives_a_result(user):
    for tab, patterns in (('play_fourm', 'card'), ('play_gpt', 'data-tip'), ('play_maskgit', 'type="range"'), ('play_flow', 'type="range"'),
                          ('play_points', 'type="range"'), ('play_vlm', 'question'), ('play_digits', 'type="range"')):
        user.tab(tab)
        if tab == 'play_gpt':
            user.page.get_by_label('prompt').fill('The cat')
        assert re.fullmatch(r'\d+\.\d\d s', user.generate()), tab
        assert patterns in user.html(), tab
        assert user.command().startswith(f'python sample.py --out_dir=out/{tab}'), tab
        if tab == 'play_gpt':  # hovering shows the probability and five others
            token = user.page.locator('.tokens span[data-tip*="%"]').filter(has_text=re.compile('[a-z]')).first
            token.hover()
            assert token.evaluate("e => getComputedStyle(e, '::after').content").count('%') == 6
        if tab == 'play_flow':  # the slider shows each state
            user.page.locator('.states:visible input').fill('7')
            assert user.page.locator('.states figcaption:visible').all_inner_texts()[-1] == 't = 0.65'


def test_in_painting_in_the_browser(user):
    """What is painted is generated, the rest stays, and the command gives the same picture."""
    user.paint(0.3, 0.4, 0.6, 0.4)
    user.paint(0.3, 0.55, 0.6, 0.55)
    for i in range(1, 6):
        user.page.locator('input[type=checkbox]:visible').nth(6 + i).uncheck()
    user.check('rgb', 1)
    assert user.generate().endswith(' s')
    generated, given, truth = images_of(user.html(), 'rgb')
    mask = np.zeros((64, 64), bool)
    mask[24:40, 16:40] = True
    assert (given[mask] == 128).all() and (given[~mask] == truth[~mask]).all()
    assert (np.asarray(run_command(user.command()))[18:18 + 128:2, 264:392:2] == generated).all()


def test_faults_leave_the_page_alive(user, tmp_path):
    (tmp_path / 'notes.png').write_text('no image')
    user.page.locator('input[type=file]').first.set_input_files(tmp_path / 'notes.png')
    user.page.get_by_text('⚠ notes.png: truncated, too large or not an image').wait_for()
    user.check('rgb', 1)
    assert 'paint over the part of the image' in user.generate('⚠')
    user.check('rgb', 1, False)
    user.page.get_by_label('a text of your own').locator('visible=true').fill('a large purpel cube')
    user.page.wait_for_function("[...document.querySelectorAll('input:checked')].filter(e => e.offsetParent).length == 2")
    assert "did you mean 'purple'?" in user.generate('⚠')
    user.page.get_by_label('a text of your own').locator('visible=true').fill('a large purple cube')
    assert user.generate().endswith(' s') and len(images_of(user.html(), 'rgb')) == 1
    Image.new('RGB', (90, 60), 'red').save(tmp_path / 'own.png')
    user.page.get_by_label('a text of your own').locator('visible=true').fill('')
    user.page.locator('input[type=file]').first.set_input_files(tmp_path / 'own.png')
    user.page.wait_for_function("document.querySelector('.cells').style.backgroundImage.length > 100")
    user.check('caption', 0, False)
    user.check('rgb', 0)
    user.check('rgb', 1, False)
    user.check('depth', 1)
    assert user.generate().endswith(' s') and '--image=out/play_fourm/playground/' in user.command()


def test_two_users_at_the_same_time(browser, address, user):
    other = User(browser, address)
    user.start()
    other.start()
    assert user.wait().endswith(' s') and other.wait().endswith(' s')
    assert user.html() == other.html() and len(images_of(user.html())) == 11
    other.page.context.close()
