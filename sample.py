"""
One sampler for all chapters: draws what a trained model generates, and scores it.

    python sample.py --out_dir=out/nano4m                                        any-to-any grid on held-out scenes
    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"
    python sample.py --out_dir=out/nano4m --given=rgb --hide=rgb=16,16,48,48     in-painting; also out-painting, objects, words
    python sample.py --out_dir=out/nano4m --retrieve=rgb --given=caption --text="two large red metal spheres"
    python sample.py --out_dir=out/nano4m --given=caption --text="two large red metal spheres" --target=depth,rgb
    python sample.py --out_dir=out/nano4m --given=rgb --image=FILE.png --target=depth,caption
    python sample.py --out_dir=out/nano4m --score=True                           every modality from every other, with ceilings
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"
    python sample.py --out_dir=out/gpt_mnist                                     ten digits of each class
    python sample.py --out_dir=out/gpt_mnist --complete=0.5                      held-out digits, completed from their upper half
    python sample.py --init_from=smollm2 --prompt="The capital of France is"
    python sample.py --out_dir=out/maskgit_mnist --order=halton --steps=16       ten digits of each class
    python sample.py --out_dir=out/maskgit_mnist --complete=0.5 --shape=box      held-out digits, filled in around a box
    python sample.py --out_dir=out/maskgit_mnist --show=gif                      how pictures come about; also swap: other classes
    python sample.py --out_dir=out/maskgit_text --prompt="ROMEO:" --after="JULIET:" --gap=100
    python sample.py --out_dir=out/flow_mnist --steps=20 --guidance=2            digits, from noise in 20 steps
    python sample.py --out_dir=out/flow_mnist --show=path                        how they come about; also steps, guidance: sweeps
    python sample.py --out_dir=out/flow_toy2d                                    points, their velocities, the learned density
    python sample.py --out_dir=out/gpt_mnist --report=True                       a page: curves, scores, samples, the command
    python sample.py --compare=out/gpt_mnist,out/flow_mnist                      the same of several; digits: which generator?
    python sample.py --out_dir=out/vlm_scenes                                    held-out scenes with questions and answers
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"      or --chat=True

A chain names what is given, then targets, each of which, once generated, conditions the next; `read_link` says what may stand
behind a name. Pictures are written as PNG into the run's folder, scores as scores.json; the path is printed.

There is one section a chapter, with its draw_CHAPTER and score_CHAPTER; each can be read alone, and the last section calls them.
"""
import difflib
import importlib.util
import json
import math
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import flow
from config import UserError
from gpt import KVCache, Recorded
from maskgit import ORDERS, SCHEDULES
from prepare import page, retrieval
from prepare.report import alone, bootstrap, judged, save_answers, save_gif, save_grid, save_scores, tile
from train import (Data, add_logs, autocast, check_data, compile_blocks, evaluation_batch, find_device, find_dtype, find_weights,
                   is_block, load_model, means, read_meta, resolve, set_up, to_device)

SETTINGS = dict(
    out_dir='out/nano4m',     # the run
    init_from='',             # instead of a run: weights by name, 'smollm2'
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    seed=0,
    device='auto', dtype='auto',
    compile=False,            # the blocks, by torch.compile: seconds more at first; pays in long texts on a GPU (docs/bench.md)
    n=0,                      # texts (of each prompt), or rows of a picture; 0 chooses: 1 text, 6 scenes, 10 digits a class
    split='val',              # held-out scenes
    # what to generate from what (nano4M)
    given='',                 # modalities given, e.g. rgb or caption,depth
    target='',                # modalities to generate, in this order; '' is all others
    chain='',                 # both at once: 'rgb>depth:8,normal:8:confidence,scene_desc'; several with semicolons between
    hide='',                  # part of what is given, to be generated anew: 'rgb=16,16,48,48', 'rgb=red cube', 'caption=red'
    replace='',               # a word of the given texts, and what takes its place: 'red=blue'
    retrieve='',              # a modality: the held-out scenes that are nearest to what is given
    by='likelihood',          # how nearness is measured: likelihood, embedding
    text='',                  # a text of your own for the given text modality, open if it ends in '...'; nanoVLM: a question
    image='',                 # a picture file of your own for the given rgb; nanoVLM: one, or several with commas between
    chat=False,               # nanoVLM: ask about the picture until you enter nothing
    blind='',                 # nanoVLM: a run with blind=True, whose scores are to stand beside these
    # how
    steps=0,                  # decoding steps; 0 chooses (nano4M: for each target this and the next two, see `manner`)
    temperature=math.nan,     # 0 takes the likeliest token; nan chooses (GPT: 0.8 for text, 1 for pictures)
    guidance=0.0,             # above 1 what is given counts for more than in training; 0 chooses
    top_k=0, top_p=1.0,
    min_p=0.0,                # GPT
    order='random',           # random (ROAR), confidence (MaskGIT), raster, halton
    schedule='',              # linear, cosine, constant: how many tokens a step; '' is linear (nano4M) or cosine (MaskGIT)
    temperature_end=math.nan,  # MaskGIT, nano4M: of the last step; nan is that of the first
    guidance_start=math.nan,  # MaskGIT, nano4M: guidance of the first step; nan is that of the last
    choice_temperature=0.0,   # MaskGIT: of the noise on confidences
    prompt='',                # the text to go on with; '' is the beginning of a text (MaskGIT: nothing)
    prompts='',               # GPT: a file with one prompt a line, all continued in one batch; nanoVLM: one question a line
    max_new_tokens=500,       # GPT, nanoVLM
    draft='',                 # GPT on a CPU: a small model's run on the same data, whose guesses speed a text up, its law kept
    complete=0.0,             # pictures: the share of held-out pictures that is given
    shape='half',             # MaskGIT: which share: half (from above), box (around it), random (patches)
    after='',                 # MaskGIT: the text behind a gap
    gap=50,                   # MaskGIT: tokens between prompt and after
    show='grid',              # MaskGIT: grid, gif (how pictures come about), swap (held-out pictures with other classes)
                              # flow: grid (classes), path (from noise to picture, also as GIF), steps, guidance (sweeps)
    labels='',                # flow: classes to draw, '3,5'; '' is all
    method='',                # flow: euler, midpoint, heun, or jump, where the model knows mean velocities; '' is jump or euler
    interval='0,1',           # flow: the times between which guidance acts
    score=False,              # compute the scores, of all pairs or those that given and target name, and add them to scores.json
    n_score=1000,             # held-out scenes, or generated digits, to score
    against='',               # MaskGIT: scores.json of a GPT on the same data, whose exact values then stand as floor
    report=False,             # one page of the run: loss curves, what it took, scores, newest samples, the command
    compare='',               # the same of several, 'out/gpt_mnist,out/flow_mnist'; of generators of digits also who is best
)
BELONGS = dict(  # settings that mean nothing to the chapters that do not name them
    gpt='prompt prompts max_new_tokens temperature top_k top_p min_p draft complete',
    maskgit='steps order schedule guidance guidance_start temperature temperature_end choice_temperature top_k top_p prompt after '
            'gap complete shape show against',
    fourm='given target chain hide replace retrieve by text image steps order schedule guidance guidance_start temperature '
          'temperature_end top_k top_p',
    flow='steps guidance interval method labels show',
    vlm='text image chat blind prompts max_new_tokens temperature top_k top_p min_p')
APART = dict(  # settings beside which others would be ignored
    score='report compare retrieve text image chat prompt prompts draft', compare='report compile', chain='given target',
    retrieve='hide replace', prompts='prompt text', chat='text prompts', compile='report draft')
SHOWS = dict(maskgit=('grid', 'gif', 'swap'), flow=('grid', 'path', 'steps', 'guidance'))


def chosen(settings, name, default=None):
    """A setting, or the default where it is nan, left open."""
    return default if math.isnan(settings[name]) else settings[name]


def exact_dtype(settings, device):
    """float32 on a CPU unless asked otherwise: one token at a time has no use for faster matrix products."""
    cpu = settings['dtype'] == 'auto' and device.type == 'cpu'
    return torch.float32 if cpu else find_dtype(settings['dtype'], device)


def exact(settings, device):
    return autocast(device, exact_dtype(settings, device))


def compile_passes(model, settings, device):
    """--compile: the model's blocks, for good; returns whether a compiler works. `append`, which looks its layer up, stays as it is,
    or each layer would be compiled by itself."""
    if not compile_blocks(model, device):
        return False
    for kind in KVCache, Recorded:
        kind.append = torch.compiler.disable(kind.append)
    model.requires_grad_(False)  # flow's likelihoods ask for the gradients of its inputs alone,
    torch._functorch.config.donated_buffer = False  # several times of one pass
    if hasattr(model, 'stream'):  # always within `exact`, whose copies of the matrices compiled code would make anew in each pass
        for block in filter(is_block, model.modules()):
            block.to(exact_dtype(settings, device))
    return True


def read_ids(fields, name, split, index):
    return torch.from_numpy(fields.load(split, name)[index].astype(np.int64))


def read_lines(path):
    """The lines of a file of prompts or questions. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 text ({error}); write one prompt a line')
    if not lines:
        raise UserError(f'{path}: no prompts; write one a line')
    return lines


def pad_in_front(rows):
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + row for row in rows])


def grey_out(pictures, tokens, grid):
    """Pictures (n, H, W, 3) uint8, grey where tokens (n, N) of a grid are unknown."""
    rows, columns = (np.arange(side) * n // side for side, n in zip(pictures.shape[1:], grid))
    unknown = (tokens < 0).view(-1, *grid).numpy()[:, rows][:, :, columns, None]
    return np.where(unknown, np.uint8(128), pictures)


# ---------------------------------------------------------------------------------------------------------------------
# GPT

def sampler(model, settings, temperature, end=-1):
    """model.stream's arguments after the tokens and their number."""
    generator = torch.Generator(model.turn.device).manual_seed(settings['seed'])
    return (chosen(settings, 'temperature', temperature), settings['top_k'], settings['top_p'], settings['min_p'], end, generator)


def read_prompts(model, fields, settings):
    """The prompts as rows of ids (B, T0), shorter ones filled up in front with -1."""
    texts = read_lines(settings['prompts']) if settings['prompts'] else [settings['prompt']]
    tokens = pad_in_front([fields.encode(text).tolist() or [fields.start] for text in texts for _ in range(settings['n'] or 1)])
    if tokens.size(1) > model.config.block_size:
        raise UserError(f'the prompt has {tokens.size(1)} tokens, the context of this model holds {model.config.block_size}: '
                        'shorten it')
    return tokens


def read_draft(model, fields, settings):
    """The small GPT of another run, whose tokens have to mean the same."""
    draft, checkpoint = load_model(find_weights(settings['draft']))
    if chapter_of(draft) != 'gpt' or draft.config.block_size < model.config.block_size:
        raise UserError(f'draft={settings["draft"]!r}: must be a GPT with a context of at least {model.config.block_size} tokens')
    theirs = fields_of(Path('data', checkpoint['settings']['dataset']), checkpoint['meta'])
    if [theirs.decode([i]) for i in range(draft.config.vocab_size)] != [fields.decode([i]) for i in range(model.config.vocab_size)]:
        raise UserError(f'draft={settings["draft"]!r} has other tokens than this run: train it on the same data')
    return draft.to(model.turn.device)


def write_texts(model, fields, settings):
    """Continues the prompts and prints them; a single one appears as it is written. Returns the texts."""
    if settings['complete']:
        raise UserError('complete is for models of pictures, this one is of text: leave it out')
    tokens = read_prompts(model, fields, settings).to(model.turn.device)
    device, alone, end = tokens.device, len(tokens) == 1, -1 if fields.end is None else fields.end
    rows, waiting, stream = tokens.tolist(), tokens[0].tolist(), model.stream
    if settings['draft']:
        if not alone:
            raise UserError('draft makes a single text faster: leave it out, or give one prompt and no n')
        stream = partial(model.speculate, read_draft(model, fields, settings))
    with exact(settings, device):
        for new in stream(tokens, settings['max_new_tokens'], *sampler(model, settings, 0.8, end)):
            for row, token in zip(rows, new.tolist()):
                row.append(token)
            waiting.append(rows[0][-1])
            text = fields.decode(waiting)
            if alone and not text.endswith('\ufffd'):  # else a token ended within a character: its other bytes are to come
                print(text, end='', flush=True)
                waiting = []
    texts = [fields.decode(row) for row in rows]
    print(fields.decode(waiting) if alone else '\n-----\n'.join(texts))
    return texts


def generate_pictures(model, settings, tokens):
    """Rows of tokens (n, T0), the class and perhaps the first patches, completed to (n, 50)."""
    device, rest = model.turn.device, model.config.block_size + 1 - tokens.shape[1]
    with exact(settings, device):
        tokens = torch.from_numpy(np.array(tokens, np.int64)).to(device)
        return model.generate(tokens, rest, *sampler(model, settings, 1.0)).cpu()


def draw_digits(model, fields, settings, path):
    """Pictures of each class as columns; or, with `complete`, held-out ones: what is given, three completions, the truth."""
    n = settings['n'] or 10

    def pictures(tokens):
        return np.repeat(fields.decode(tokens)[..., None], 3, -1)  # (n, 14, 14, 3)
    if settings['complete']:
        truth = fields.load(settings['split'], 'tokens')[:n, 0]
        length = 1 + round(settings['complete'] * 49)
        known = np.where(np.arange(50) < length, 25, 10) * np.ones_like(truth)  # white patches where the picture is given
        columns = {'given': np.where(pictures(known), pictures(truth), 128).astype(np.uint8)}
        for i in (1, 2, 3):
            again = settings | dict(seed=settings['seed'] + i)
            columns[f'drawn {i}'] = pictures(generate_pictures(model, again, truth[:, :length]))
        columns['truth'] = pictures(truth)
    else:
        drawn = pictures(generate_pictures(model, settings, np.repeat(np.arange(10), n)[:, None]))
        columns = dict(zip(fields.classes, drawn.reshape(10, n, *drawn.shape[1:])))
    save_grid(columns, path, scale=4)


def draw_gpt(model, fields, settings, path):
    """Pictures at `path`, or texts on the screen; returns these."""
    if not hasattr(fields, 'classes') and not hasattr(fields, 'tokenizers'):
        return write_texts(model, fields, settings)
    if settings['prompt'] or settings['prompts'] or settings['draft']:
        raise UserError('prompt, prompts and draft are for models of text, this one is of pictures: leave them out')
    if hasattr(fields, 'classes'):
        return draw_digits(model, fields, settings, path)
    truth = read_ids(fields, 'rgb', settings['split'], slice(settings['n'] or 6))  # no class to begin with: their first patches
    tokens = generate_pictures(model, settings, truth[:, :max(1, round(settings['complete'] * truth.size(1)))].numpy())
    save_grid(dict(truth=list(fields.decode('rgb', truth)), drawn=list(fields.decode('rgb', tokens))), path)


def score_gpt(model, fields, settings, data, path):
    """The exact negative log-likelihood of the whole validation set, each token predicted once; of digits also what the judge
    says of generated ones, and how fast they were generated."""
    device, nll = model.turn.device, []
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 32)), desc='score', unit='batch'):
        tokens = data.rows(ids)['tokens'].to(device)
        with exact(settings, device):
            nll.append(torch.stack((-model.log_prob(tokens), (tokens[:, 1:] >= 0).sum(1)), -1).cpu())
    nll = torch.cat(nll)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each window or picture
    scores = {'nats/token': bootstrap(nll) | dict(baseline=math.log(model.config.vocab_size))}
    if data.meta['kind'] == 'stream':
        scores['bits/byte'] = bootstrap(nll / [math.log(2), 1 / data.meta['bytes_per_token']]) | dict(baseline=8.0)
    elif hasattr(fields, 'classes'):
        scores['nats/image given the class'] = bootstrap(nll / [1, 49])
        labels, started = np.arange(settings['n_score']) % 10, time.perf_counter()
        tokens = torch.cat([generate_pictures(model, settings | dict(seed=settings['seed'] + i), part[:, None])
                            for i, part in enumerate(np.array_split(labels, -(-len(labels) // 500)))])
        rate = tokens[:, 1:].numel() / (time.perf_counter() - started)
        scores |= judged(fields.score(fields.decode(tokens), labels))
        scores['generation, tokens/s'] = alone(rate, len(labels))
    save_scores(scores, path)


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT

SHAPES, SWEEP = ('half', 'box', 'random'), (1, 4, 8, 16, 32, 49)


def fill(model, settings, tokens, classes=None, history=False):
    """model.generate as the settings say, for tokens (n, N) and classes (n,). What is left open: pictures in 16 steps, those of a
    class at temperature 0.8 and guided by 1.5; texts in one step for two tokens."""
    device, most = model.turn.device, int((tokens < 0).sum(1).max())
    steps = settings['steps'] or min(16 if len(model.grid) == 2 else -(-most // 2), most)
    guided = model.config.n_classes and model.config.label_dropout
    try:
        with exact(settings, device):
            return model.generate(
                tokens.to(device), None if classes is None else classes.to(device), steps,
                chosen(settings, 'temperature', 0.8 if guided else 1.0), chosen(settings, 'temperature_end'), settings['top_k'],
                settings['top_p'], settings['order'], settings['schedule'] or 'cosine',
                settings['guidance'] or (1.5 if guided else 1.0), chosen(settings, 'guidance_start'),
                settings['choice_temperature'], torch.Generator(device).manual_seed(settings['seed']), history).cpu()
    except ValueError as error:
        raise UserError(str(error))


def pictures_of(model, fields, tokens):
    """Pictures (n, H, W, 3) uint8 of tokens (n, N), grey where they are unknown."""
    if model.config.n_classes:
        pictures = np.repeat(fields.decode(tokens)[..., None], 3, -1)
    else:
        pictures = fields.decode('rgb', tokens.clamp(min=0))
    return grey_out(pictures, tokens, model.grid)


def held_out(model, fields, settings, n):
    """The first n held-out samples: tokens (n, N) and classes (n,), None where there are none."""
    if model.config.n_classes:
        tokens = read_ids(fields, 'tokens', settings['split'], slice(n))[:, 0]
        return tokens[:, 1:], tokens[:, 0]
    return read_ids(fields, 'rgb', settings['split'], slice(n)), None


def hidden_places(grid, share, shape, seed):
    """Which places (N,) of a grid are not given when a share of them is: the lower ones, a box in the middle, or random ones."""
    N = math.prod(grid)
    if shape == 'box':
        scale = (1 - share) ** 0.5
        y, x = ((torch.arange(side) + 0.5 - side / 2).abs() <= max(1, side * scale) / 2 for side in grid)
        return (y[:, None] & x).flatten()
    order = torch.arange(N) if shape == 'half' else torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return order >= round(share * N)


def draw_pictures(model, fields, settings, path):
    """Pictures of each class; or held-out ones, what is given of them and three completions; or under other classes; or a GIF."""
    n, empty = settings['n'] or 10, torch.full((1, model.N), -1)
    classes = torch.arange(model.config.n_classes).repeat_interleave(n) if model.config.n_classes else None
    scale = max(1, 60 // pictures_of(model, fields, empty).shape[1])
    if not settings['complete'] and settings['show'] == 'grid':
        drawn = pictures_of(model, fields, fill(model, settings, empty.repeat(n * (model.config.n_classes or 6), 1), classes))
        names = fields.classes if model.config.n_classes else [f'drawn {i + 1}' for i in range(6)]
        return save_grid(dict(zip(names, drawn.reshape(-1, n, *drawn.shape[1:]))), path, scale)
    truth, labels = held_out(model, fields, settings, n)
    given = truth.masked_fill(hidden_places(model.grid, settings['complete'] or 0.3, settings['shape'], settings['seed']), -1)
    columns = dict(truth=truth, given=given)
    if settings['show'] == 'gif':
        start = (given, labels) if settings['complete'] else (empty.repeat(n * (model.config.n_classes or n), 1), classes)
        states = fill(model, settings, *start, history=True)
        frames = [tile(pictures_of(model, fields, tokens), n) for tokens in states]  # a row a class; or of held-out pictures
        return save_gif(frames, path.with_suffix('.gif'), scale)
    if settings['show'] == 'swap':
        if labels is None:
            raise UserError('show=swap needs a model of classes: choose grid or gif')
        columns |= {name: fill(model, settings, given, labels * 0 + i) for i, name in enumerate(fields.classes)}
    else:
        seeds = {f'drawn {i}': settings['seed'] + i for i in (1, 2, 3)}
        columns |= {name: fill(model, settings | dict(seed=seed), given, labels) for name, seed in seeds.items()}
    save_grid({title: pictures_of(model, fields, tokens) for title, tokens in columns.items()}, path, scale)


def fill_texts(model, fields, settings):
    """Texts of the model's whole length, from a prompt, a gap and what stands behind it; prints and returns them."""
    prompt, after = fields.encode(settings['prompt']), fields.encode(settings['after'])
    start = len(prompt) + (settings['gap'] if settings['after'] else 0)
    if start + len(after) > model.N:
        raise UserError(f'prompt, gap and after have {start + len(after)} tokens, this model fills {model.N}: shorten them')
    tokens = torch.full((settings['n'] or 1, model.N), -1)
    tokens[:, :len(prompt)], tokens[:, start:start + len(after)] = prompt, after
    texts = [fields.decode(row) for row in fill(model, settings, tokens).tolist()]
    print('\n-----\n'.join(texts))
    return texts


def draw_maskgit(model, fields, settings, path):
    """Pictures at `path`, or texts on the screen; returns these."""
    if len(model.grid) == 1:
        if settings['complete'] or settings['show'] != 'grid':
            raise UserError('complete and show are for models of pictures, this one is of text: leave them out')
        return fill_texts(model, fields, settings)
    if settings['prompt'] or settings['after']:
        raise UserError('prompt and after are for models of text, this one is of pictures: leave them out')
    draw_pictures(model, fields, settings, path)


def score_maskgit(model, fields, settings, data, path):
    """The likelihood bound on the validation set beside the exact value of a GPT; where the data has a judge, what it says of
    pictures drawn in each order in 1, 4, 8 ... steps, and the time that they took; a picture of each order shows some."""
    device, found, floors = model.turn.device, [], read_floors(settings['against'])
    generator = torch.Generator().manual_seed(settings['seed'])
    for ids in tqdm(np.array_split(np.arange(data.n), -(-data.n // 64)), desc='bound', unit='batch'):
        tokens = data.rows(ids)['tokens'].to(device)
        with exact(settings, device):
            bound = model.log_prob_bound(tokens[:, -model.N:], tokens[:, 0] if model.config.n_classes else None, 16, generator)
        found.append(torch.stack((bound, (tokens[:, -model.N:] >= 0).sum(1)), -1).cpu())
    nll = torch.cat(found)[:, None].double().numpy()  # (n, 1, 2): nats and tokens of each sample
    scores = {'nats/token': bootstrap(nll) | dict(baseline=math.log(model.config.vocab_size))}
    if len(model.grid) == 2:
        scores['nats/image given the class' if model.config.n_classes else 'nats/image'] = bootstrap(nll / [1, model.N])
    scores = {f'{name}, at most': score | floors.get(name, {}) for name, score in scores.items()}
    if model.config.n_classes:
        scores |= score_samples(model, fields, settings, path.with_name('sweep.png'))
    save_scores(scores, path)


def read_floors(path):
    """{metric: dict(floor=value)} of a scores.json."""
    try:
        return {name: dict(floor=score['value']) for name, score in json.loads(Path(path).read_text()).items()} if path else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'against={path!r}: not a scores.json ({type(error).__name__})')


def score_samples(model, fields, settings, path):
    """The judge's scores of n_score pictures for each order and number of steps; where steps are set, for these and the order."""
    classes, scores = torch.arange(settings['n_score']) % model.config.n_classes, {}
    sweep = [settings['steps']] if settings['steps'] else [steps for steps in SWEEP if steps <= model.N]
    for order in [settings['order']] if settings['steps'] else ORDERS:
        columns = {}
        for steps in tqdm(sweep, desc=order, unit='sweep'):
            again, started = settings | dict(order=order, steps=steps), time.perf_counter()
            tokens = torch.cat([fill(model, again | dict(seed=settings['seed'] + i), torch.full((len(part), model.N), -1), part)
                                for i, part in enumerate(classes.split(64))])
            seconds, pictures = time.perf_counter() - started, fields.decode(tokens)
            found = judged(fields.score(pictures, classes.numpy()))
            found['seconds/image'] = alone(seconds / len(classes), len(classes))
            scores |= {f'{order}, {steps} steps: {name}': score for name, score in found.items()}
            title = f'{steps}: {found["accuracy"]["value"]:.0%} {found["frechet"]["value"]:.2f}'
            columns[title] = pictures_of(model, fields, tokens[:model.config.n_classes])
        save_grid(columns, path.with_stem(f'{path.stem}_{order}'), 6)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: chains

NUMBER = r'-?\d+(?:\.\d+)?'
LINK = re.compile(  # what may stand between the colons of a link, and the setting that it is for this link alone
    rf'(?P<steps>\d+)|(?P<order>{"|".join(ORDERS)})|(?P<schedule>{"|".join(SCHEDULES)})|mean(?P<mean>\d+)|best(?P<best>\d+)|'
    rf't(?P<temperature>{NUMBER})(\.\.(?P<temperature_end>{NUMBER}))?|g((?P<guidance_start>{NUMBER})\.\.)?(?P<guidance>{NUMBER})|'
    rf'w(?P<weight>{NUMBER})')


def read_link(entry, settings):
    """'rgb:25:halton:t0.7:g1..3:best8' -> the settings of this link of a chain, with its name, weight, mean and best."""
    name, *parts = entry.split(':')
    link = settings | dict(name=name, weight=1.0, mean=1, best=1)
    for part in parts:
        found = LINK.fullmatch(part)
        if not found:
            raise UserError(f'{entry!r}: {part!r} is none of a number of steps, an order ({", ".join(ORDERS)}), a schedule '
                            f'({", ".join(SCHEDULES)}), t0.7 or t0.9..0.3 (temperature), g2 or g1..3 (guidance), w-1 (weight as a '
                            'condition), mean8, best8 (of so many draws)')
        said = {key: type(link[key])(value) for key, value in found.groupdict().items() if value}
        link |= said
        if link['temperature'] < 0 or link['temperature_end'] < 0 or min(link['mean'], link['best']) < 1 or (
                0 in (said.get('steps'), said.get('guidance'))):
            raise UserError(f'{entry!r}: {part!r} is too small')  # guidance 0, which knows no condition, is to give none
    if min(link['mean'], link['best']) > 1:
        raise UserError(f'{entry!r}: the mean of several draws or the best of them, not both')
    return link


def check_chain(chain, given, targets, partly, model):
    """Raises UserError where the links of a chain do not fit the model or each other; those in `partly` may stand on both sides."""
    names, asked = ([link['name'] for link in links] for links in (given, targets))
    texts = [m.name for m in model.modalities if m.is_text]
    if unknown := [name for name in names + asked if name not in model.fields]:
        raise UserError(f'there is no modality {unknown[0]!r}; this model has {", ".join(model.fields)}')
    if repeated := [name for name in names + asked if max(names.count(name), asked.count(name)) > 1
                    or name in names and name in asked and name not in partly]:
        raise UserError(f'{repeated[0]!r} stands twice among given and targets')
    if re.search(r':(?!w)', chain.partition('>')[0]):
        raise UserError(f'chain={chain!r}: what is given has nothing but a weight, as in "caption:w2>rgb"')
    if targets and targets[-1]['weight'] != 1:
        raise UserError(f'chain={chain!r}: nothing follows {asked[-1]} that its weight could be for')
    if wrong := [link['name'] for i, link in enumerate(targets) if link['mean'] > 1 and link['name'] in texts
                 or link['best'] > 1 and not {*names, *asked[:i]} - {link['name']}]:
        raise UserError(f'{wrong[0]}: mean is for pictures, and best needs something given that it is judged by')


def parse_chain(chain, settings, model):
    """'caption,depth:w2>rgb:25' -> links given, links to generate. Without targets: all others, or what is to be filled in."""
    if chain.count('>') != 1:
        raise UserError(f'chain={chain!r}: write given>target,target:steps:order, as in "rgb>depth:8,scene_desc"')
    given, targets = ([entry.strip() for entry in side.split(',') if entry.strip()] for side in chain.split('>'))
    given, hidden = [read_link(entry, settings) for entry in given], [settings['hide'].partition('=')[0]] * bool(settings['hide'])
    names = [link['name'] for link in given]
    targets = [read_link(entry, settings)
               for entry in targets or hidden or [name for name in model.fields if name not in names]]
    begun = [m.name for m in model.modalities if m.is_text] if settings['text'].endswith('...') else []
    check_chain(chain, given, targets, hidden + begun, model)
    return given, targets


def parse_chains(settings, model):
    """The chains that the settings name, separated by semicolons."""
    chains = settings['chain'] or f'{settings["given"]}>{settings["target"]}'
    return [parse_chain(chain, settings, model) for chain in chains.split(';')]


def manner(model, link, known, weighted):
    """Arguments of model.generate for a link. Where the rgb picture is known, hardly more than one answer is right: the likeliest
    one, at once. Otherwise many are, and a picture's tokens have to agree with each other: a few at a time, drawn at random."""
    is_text = model.modality[link['name']].is_text
    sure = is_text or link['name'] != 'rgb' and (known.get('rgb', -torch.ones(1)) >= 0).all()
    steps, temperature, guidance = (1, 0.0, 1.0) if sure else (8, 0.4, 1.0 if weighted else 2.0)
    if link['mean'] > 1:  # of what may be, not of the likeliest
        temperature, guidance = 1.0, 1.0
    elif link['best'] > 1:
        temperature = temperature or 0.7
    return dict(steps=link['steps'] or steps, temperature=chosen(link, 'temperature', temperature),
                temperature_end=chosen(link, 'temperature_end'), top_k=link['top_k'], top_p=link['top_p'], order=link['order'],
                schedule=link['schedule'] or 'linear', guidance=link['guidance'] or guidance,
                guidance_start=chosen(link, 'guidance_start'))


def likeliest(model, known, name, ids, draws):
    """Of each sample's draws, ids (B * draws, size), the one from which the conditions are likeliest: (B, size)."""
    total = sum(model.log_prob(model.ask({name: ids}, other), other, condition.repeat_interleave(draws, 0))
                for other, condition in known.items() if other != name)
    return ids.view(-1, draws, ids.size(1))[torch.arange(len(ids) // draws), total.view(-1, draws).argmax(1).cpu()]


def mean_of(name, raw):
    """Several draws (B, draws, ...) of a modality as one (B, ...): their mean, or, of classes, the most frequent one."""
    if name == 'segmentation':
        return np.stack([(raw == c).sum(1) for c in range(raw.max() + 1)]).argmax(0).astype(raw.dtype)
    return raw.mean(1) if raw.dtype.kind == 'f' else raw.mean(1).round().astype(raw.dtype)


def generate(model, fields, given, chain, generator=None):
    """Runs a chain from ids given, {name: (B, size)}: ids of all modalities known in the end, raw values of those generated."""
    known, raw, weights, device = dict(given), {}, {link['name']: link['weight'] for link in chain[0]}, model.turn.device
    for link in chain[1]:
        name, draws = link['name'], max(link['mean'], link['best'])
        others = {other: weight for other, weight in weights.items() if weight != 1 and other != name}
        many = {other: ids.repeat_interleave(draws, 0) for other, ids in known.items()}
        with autocast(device, find_dtype(link['dtype'], device)):
            how = manner(model, link, known, bool(others))
            ids = model.generate(many, [name], **how, weights=others, generator=generator)[name].cpu()
            if link['best'] > 1:
                ids = likeliest(model, known, name, ids, draws)
        raw[name] = fields.decode(name, ids)
        if link['mean'] > 1:
            if not hasattr(fields, 'encode'):
                raise UserError(f'{name}: this data set has no encoder, which the mean of several draws would need')
            raw[name] = mean_of(name, raw[name].reshape(-1, draws, *raw[name].shape[1:]))
            ids = fields.encode(name, raw[name])  # what the next links of the chain see
        known[name], weights[name] = ids, link['weight']
    return known, raw


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: what is given, whole or in part

def read_own(model, fields, settings, names):
    """The user's text and picture as ids of the given modalities, one row; {} where there are none. A text that ends in '...' may
    go on in any way: nothing is known behind it."""
    if not (settings['text'] or settings['image']):
        return {}
    own = {}
    for name in names:
        m = model.modality[name]
        if m.is_text and settings['text']:
            text = settings['text']
            own[name] = fields.read_text(name, text.removesuffix('...').strip())
            if text.endswith('...'):
                own[name] = own[name].masked_fill(own[name] == m.vocabulary - 1, -1)
        elif not m.is_text and settings['image']:
            own[name] = fields.read_image(name, settings['image'])
        else:
            raise UserError(f'--given={name} needs {"--text" if m.is_text else "--image"} beside '
                            f'{"--image" if m.is_text else "--text"}; or give neither, for held-out scenes')
    if not own:
        raise UserError('--text and --image need --given=NAME, the modality that they are')
    return own


def replace_words(fields, settings, ids):
    """Texts, {name: (B, size)}, in which a word is replaced by another, as in replace='red=blue'."""
    old, _, new = settings['replace'].partition('=')
    if not old or not new:
        raise UserError(f'replace={settings["replace"]!r}: write OLD=NEW, as in "red=blue"')
    word, texts = re.compile(rf'\b{re.escape(old)}\b'), {name: fields.decode(name, rows) for name, rows in ids.items()}
    known = texts if settings['text'] else {name: fields.truth(settings['split'], name, slice(None)) for name in texts}
    if not any(word.search(text) for some in known.values() for text in some):
        raise UserError(f'replace={settings["replace"]!r}: {old!r} is no word of {", ".join(texts)}; one such text is '
                        f'{next(iter(texts.values()))[0]!r}')
    return {name: torch.cat([fields.read_text(name, word.sub(new, text)) for text in some]) for name, some in texts.items()}


def hidden_part(model, fields, settings, ids, generator):
    """The modality and which of its tokens (B, size) `hide` takes away from ids {name: (B, size)}: patches that a box touches,
    rgb=16,16,48,48 (x0,y0,x1,y1 in pixels), or those around it, rgb=outside 16,16,48,48; objects, rgb=red cube, found by the
    segmentation that is given or predicted; a text's words, caption=red, or all from a number on, caption=7."""
    name, _, what = settings['hide'].partition('=')
    if name not in ids or not what:
        raise UserError(f'hide={settings["hide"]!r}: write NAME=WHAT, NAME one of what is given ({", ".join(ids)}), WHAT a box '
                        'x0,y0,x1,y1, "outside" and a box, objects such as "red cube"; of a text words, or how many are kept')
    m = model.modality[name]
    if m.is_text:
        if what.isdecimal():
            return name, torch.arange(m.size).expand_as(ids[name]) >= int(what)
        words = [word.strip() for word in fields.decode(name, torch.arange(m.vocabulary)[:, None])]
        hidden = [word.strip() for word in what.split(',')]
        if unknown := [word for word in hidden if word not in words]:
            near = difflib.get_close_matches(unknown[0], filter(None, words), 3, 0)
            raise UserError(f'hide={settings["hide"]!r}: {unknown[0]!r} is no token of {name}; the nearest are {", ".join(near)}')
        return name, torch.tensor([word in hidden for word in words])[ids[name].clamp(min=0)] & (ids[name] >= 0)
    B, (height, width) = len(ids[name]), fields.picture(name, fields.decode(name, ids[name][:1])[0]).shape[:2]
    if box := re.fullmatch(r'(outside )?(\d+),(\d+),(\d+),(\d+)', what):
        x0, y0, x1, y1 = map(int, box.groups()[1:])
        if not (x0 < x1 <= width and y0 < y1 <= height):
            raise UserError(f'hide={settings["hide"]!r}: a box is x0,y0,x1,y1 with x0 < x1 <= {width} and y0 < y1 <= {height}')
        pixels = np.full((B, height, width), bool(box[1]))
        pixels[:, y0:y1, x0:x1] ^= True
    else:
        if 'segmentation' not in model.fields or not hasattr(fields, 'classes_named'):
            raise UserError(f'hide={settings["hide"]!r}: this model has no segmentation that could find objects: give a box')
        if 'segmentation' in ids:
            classes = fields.decode('segmentation', ids['segmentation'])
        else:
            chain = parse_chain(f'{",".join(ids)}>segmentation', settings | dict(hide='', text=''), model)
            classes = generate(model, fields, ids, chain, generator)[1]['segmentation']
        pixels = np.isin(classes, fields.classes_named(what))
    patches = F.adaptive_max_pool2d(torch.from_numpy(pixels)[:, None].float(), m.grid)
    return name, patches.flatten(1) > 0


def read_given(model, fields, settings, chain, index, generator):
    """The ids that a chain starts from, {name: (B, size)}, words replaced and parts hidden; and whether they are the user's own."""
    names = [link['name'] for link in chain[0]]
    own = read_own(model, fields, settings, names)
    ids = {name: row.repeat(len(index), 1) for name, row in own.items()} or {
        name: read_ids(fields, name, settings['split'], index) for name in names}
    if settings['replace']:
        texts = {m.name: ids[m.name] for m in model.modalities if m.is_text and m.name in ids}
        if not texts:
            raise UserError('replace needs a text among what is given')
        ids |= replace_words(fields, settings, texts)
    if settings['hide']:
        name, hidden = hidden_part(model, fields, settings, ids, generator)
        ids[name] = ids[name].masked_fill(hidden, -1)
    if not ids:  # from nothing: as many as asked for
        name = chain[1][0]['name']
        ids = {name: torch.full((len(index), model.modality[name].size), -1)}
    return ids, bool(own)


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: pictures

def pictures_of_ids(model, fields, name, ids, filled):
    """Ids (B, size) of a modality as pictures (H, W, 3), grey where they are unknown; `filled` is what a tokenizer's decoder,
    which sees neighbours, is shown there."""
    m = model.modality[name]
    drawn = [fields.picture(name, raw) for raw in fields.decode(name, ids if m.is_text else torch.where(ids < 0, filled, ids))]
    return drawn if m.is_text else list(grey_out(np.stack(drawn), ids, m.grid))


def columns_for(model, fields, settings, chain, index):
    """Columns {title: [pictures]} of one chain: what is given, then each target's truth beside what was generated."""
    generator, columns = torch.Generator(model.turn.device).manual_seed(settings['seed']), {}
    ids, own = read_given(model, fields, settings, chain, index, generator)
    found, raw = generate(model, fields, ids, chain, generator)
    names, changed = [link['name'] for link in chain[0]], settings['replace'] or settings['hide']
    for name in dict.fromkeys([*names, *raw]):
        truth = [] if own else [fields.picture(name, one) for one in fields.truth(settings['split'], name, index)]
        if truth and names and (name in raw or changed):
            columns[f'{name} (truth)'] = truth
        if name in names:
            columns[f'{name} (given)'] = truth if truth and not changed else pictures_of_ids(
                model, fields, name, ids[name], found[name].clamp(min=0))
        if name in raw:
            columns[name] = [fields.picture(name, one) for one in raw[name]]
        if model.modality[name].is_text and (own or len(index) <= 2):
            texts = raw[name] if name in raw else fields.decode(name, found[name])
            print('\n'.join(dict.fromkeys(f'{name}: {text}' for text in texts)))  # equal ones once
    return columns


def draw_fourm(model, fields, settings, path):
    """The picture that the settings ask for; without given and target: each from rgb alone, and rgb from the caption."""
    index = np.arange(min(settings['n'] or 6, len(fields.load(settings['split'], model.fields[0]))))
    if settings['retrieve']:
        return draw_nearest(model, fields, settings, index, path)
    if not any(settings[name] for name in ('chain', 'given', 'target', 'text', 'image', 'hide', 'replace')):
        first, *others = model.fields
        chains = [f'{first}>{name}' for name in others] + [f'caption>{first}'] * ('caption' in others)
        settings = settings | dict(chain=';'.join(chains))
    columns = {}
    for i, chain in enumerate(parse_chains(settings, model)):
        for title, pictures in columns_for(model, fields, settings, chain, index).items():
            drawn = not title.endswith(')')  # what is given and true is shown once, what another chain draws beside it
            columns[f'{title}, chain {i + 1}' if drawn and title in columns else title] = pictures
    save_grid(columns, path)


def open_index(model, fields, settings, *names):
    return retrieval.open_index(model, fields.folder, Path(settings['out_dir'], settings['checkpoint']), *names, settings['split'])


def draw_nearest(model, fields, settings, index, path):
    """Queries, held-out or the user's own, and the ten held-out scenes nearest to each, as the modality `retrieve`."""
    names, gallery = [name for name in settings['given'].split(',') if name], settings['retrieve']
    if len(names) != 1 or {*names, gallery} - {*model.fields} or gallery in names or settings['chain'] or settings['target']:
        raise UserError(f'retrieve={gallery!r} and given={settings["given"]!r}: one modality each, two different ones of '
                        f'{", ".join(model.fields)}; no chain, no target')
    ids = read_own(model, fields, settings, names)
    ids = ids[names[0]] if ids else read_ids(fields, names[0], settings['split'], index)
    pairs = open_index(model, fields, settings, names[0], gallery)
    nearest = retrieval.nearness(model, pairs, names[0], ids, settings['by']).topk(min(10, pairs['n'])).indices.numpy()
    columns = {f'{names[0]} (query)': pictures_of_ids(model, fields, names[0], ids, ids.clamp(min=0))}
    for i, column in enumerate(nearest.T):  # the nearest of all queries, then the second nearest
        columns[str(i + 1)] = [fields.picture(gallery, one) for one in fields.truth(settings['split'], gallery, column)]
    save_grid(columns, path)


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: scores

def score_chain(model, fields, settings, chain, index):
    """{target: {metric: (n, k, 2)}} of the scenes with these indices, and milliseconds a scene."""
    parts, seconds = {}, 0
    for part in np.array_split(index, max(1, len(index) // 250)):
        generator = torch.Generator(model.turn.device).manual_seed(settings['seed'])
        ids, _ = read_given(model, fields, settings, chain, part, generator)
        started = time.perf_counter()
        _, raw = generate(model, fields, ids, chain, generator)
        seconds += time.perf_counter() - started
        for name, values in raw.items():
            for key, rows in fields.score(name, values, settings['split'], part).items():
                parts.setdefault(name, {}).setdefault(key, []).append(rows)
    found = {name: {key: np.concatenate(rows) for key, rows in metrics.items()} for name, metrics in parts.items()}
    return found, 1000 * seconds / len(index)


def bounds_of(fields, name, split, index):
    """{metric: what a perfect model would reach (the tokenizer's reconstruction, or the text itself), and what a blind one}."""
    ceiling = fields.score(name, fields.decode(name, read_ids(fields, name, split, index)), split, index)
    blind = fields.score(name, fields.baseline(name, split, index), split, index)
    return {key: dict(ceiling=bootstrap(ceiling[key], 1)['value'], baseline=bootstrap(blind[key], 1)['value']) for key in ceiling}


def score_fourm(model, fields, settings, data, path):
    """Every modality from every other, or the chains named: each target's metrics with ceiling and baseline. Prints a table and
    fills scores.json; those of chains go to scores_chains.json beside it."""
    names, split = model.fields, settings['split']
    index, scores, bounds = np.arange(min(settings['n_score'], data.n)), {}, {}
    if settings['chain']:
        cells, path = settings['chain'].split(';'), path.with_stem(f'{path.stem}_chains')
    else:
        parse_chains(settings, model)  # complains of unknown names
        sources, targets = ([entry.strip() for entry in settings[key].split(',') if entry.strip()] or names
                            for key in ('given', 'target'))
        cells = [f'{a}>{b}' for b in targets for a in sources if a.partition(':')[0] != b.partition(':')[0]]
    for cell, chain in tqdm([(cell, parse_chain(cell, settings, model)) for cell in cells], desc='score', unit='cell'):
        found, each = score_chain(model, fields, settings, chain, index)
        for name, metrics in found.items():
            bounds[name] = bounds.get(name) or bounds_of(fields, name, split, index)
            title = f'{cell}/' + f'{name}/' * (len(found) > 1)
            scores |= {f'{title}{key}': bootstrap(parts) | bounds[name][key] for key, parts in metrics.items()}
        scores[f'{cell}/ms a scene'] = alone(each, len(index))
    if 'rgb' in bounds and hasattr(type(fields), 'parser'):  # the judge of pictures, itself judged
        real = fields.score('rgb', fields.truth(split, 'rgb', index), split, index)
        scores |= {f'parser on true renders/{key}': bootstrap(parts) for key, parts in real.items()}
    every = not any(settings[name] for name in ('chain', 'given', 'target'))
    if every and {'rgb', 'caption'} <= {*names} and settings['n_score'] >= 100:
        pairs = open_index(model, fields, settings, 'caption', 'rgb')
        scores |= judged(retrieval.recalls(model, pairs))
    save_scores(scores, path)


# ---------------------------------------------------------------------------------------------------------------------
# Flow

COUNTS = (1, 2, 4, 10, 20, 50, 100)  # evaluations of the network in pictures; the first five also in scores
SCALES = (0, 1, 1.5, 2, 3, 5, 10)    # of guidance


def follow(model, labels, settings):
    """model.generate as the settings say, for labels (n,): the trajectory (steps + 1, n, ...). What is left open: 20 evaluations of
    the network, by Euler's method, guidance 2 where there are classes; a single one, without guidance, where the model knows mean
    velocities."""
    device, mean = model.net.head.weight.device, model.config.mean > 0
    method = settings['method'] or ('jump' if mean else 'euler')
    guidance = settings['guidance'] or (2.0 if model.config.label_drop and model.config.n_classes and not mean else 1.0)
    steps = settings['steps'] or (1 if method == 'jump' else 10 if method in ('midpoint', 'heun') else 20)
    try:
        interval = tuple(map(float, settings['interval'].split(',')))
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f'interval={settings["interval"]!r}: write two times from 0 to 1, the lower first, as in 0.1,0.8')
        with exact(settings, device):
            return model.generate(torch.as_tensor(labels, device=device), steps, method, guidance, interval,
                                  torch.Generator(device).manual_seed(settings['seed']))[0].cpu()
    except ValueError as error:
        raise UserError(str(error))


def flow_samples(model, labels, settings, size=64):
    """Only where the trajectories end: pictures (n, H, W) or (n, H, W, 3) uint8, or points (n, d)."""
    ends = torch.cat([follow(model, part, settings | dict(seed=settings['seed'] + i))[-1]
                      for i, part in enumerate(np.array_split(labels, -(-len(labels) // size)))])
    return (flow.to_pixels(ends).squeeze(-1) if model.config.image_size else ends).numpy()


def draw_flow(model, fields, settings, path):
    """Pictures of each class; or, by `show`, how some come about, what more evaluations bring, what guidance does."""
    if not model.config.image_size:
        return draw_points(model, fields, settings, path)
    classes, size, show = model.config.n_classes, model.config.image_size, settings['show']
    known = {str(c): c for c in range(classes)}
    if unknown := [c for c in settings['labels'].split(',') if c and c not in known]:
        raise UserError(f'labels: there is no class {unknown[0]!r} (classes are 0 to {classes - 1})')
    labels = [known[c] for c in settings['labels'].split(',') if c] or list(range(classes)) or [0] * 8
    scale, n = max(1, 56 // size), settings['n'] or (8 if show == 'grid' else 10)
    some = np.resize(labels, n)

    def frames(labels, changes={}):  # (steps + 1, n, H, W, 3)
        pixels = flow.to_pixels(follow(model, labels, settings | changes)).numpy()
        return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
    if show == 'grid':
        drawn = frames(np.repeat(labels, n))[-1]
        names = [fields.classes[c] for c in labels] if classes else [f'drawn {i + 1}' for i in range(len(labels))]
        columns = dict(zip(names, drawn.reshape(len(labels), n, *drawn.shape[1:])))
    elif show == 'path':
        states = frames(some)
        save_gif([tile(state, -(-n // 2)) for state in states], path.with_suffix('.gif'), scale)
        kept = np.linspace(0, len(states) - 1, min(11, len(states))).round().astype(int)
        columns = {f'step {i}': states[i] for i in kept}
    elif show == 'steps':
        columns = {str(count): frames(some, dict(steps=count))[-1] for count in COUNTS}
    else:  # guidance=0 would leave the choice open
        columns = {f's = {s}': frames(some, dict(guidance=s or 1e-9))[-1] for s in SCALES}
    save_grid(columns, path, scale)


def draw_points(model, fields, settings, path, side=200):
    """Where points are, and where to, at up to five times; beside them the density that the model has learned and the true one."""
    if settings['show'] != 'grid' or settings['labels']:
        raise UserError('show and labels are for models of pictures, this one is of points: leave them out')
    trajectory = follow(model, np.zeros(settings['n'] or 4000, int), settings | dict(steps=settings['steps'] or 40))
    save_gif([fields.scatter(points.numpy(), side) for points in trajectory], path.with_suffix('.gif'))
    device, last, columns = model.net.head.weight.device, len(trajectory) - 1, {}
    corners = torch.from_numpy(fields.grid(14)).to(device)
    for share in (0, 0.25, 0.5, 0.75, 1):
        place = round(share * last)
        t = flow.shifted(1 - place / last, model.config.shift)  # as model.generate has them
        velocity = -model.field(torch.zeros(len(corners), dtype=torch.long, device=device))(corners, t).detach().cpu()
        columns[f't = {t:.2f}: points, -v'] = [fields.scatter(trajectory[place].numpy(), side),
                                               fields.arrows(corners.cpu().numpy(), velocity.numpy(), side)]
    points = fields.grid(side // 2)
    learned = np.exp(likelihoods(model, torch.from_numpy(points), torch.zeros(len(points), dtype=torch.long)).numpy())
    truth = fields.log_density(points)
    top = np.exp(truth).max() if truth is not None else np.quantile(learned, 0.995)
    blank = np.full((side // 2, side // 2, 3), 255, np.uint8)
    columns['learned density, true'] = [fields.heat(learned.reshape(side // 2, -1), top), blank if truth is None else
                                        fields.heat(np.exp(truth).reshape(side // 2, -1), top)]
    save_grid(columns, path, 1)


def likelihoods(model, x, labels, tolerance=1e-4, size=2500):
    """ln p in nats (n,) of x (n, ...) as the network sees it: with the exact divergence of points, a random probe of pictures."""
    found, random, device = [], torch.Generator().manual_seed(0), model.net.head.weight.device
    for part, label in zip(x.to(device).split(size), labels.to(device).split(size)):
        probe = flow.unit_probes(part) if part[0].numel() <= 8 else flow.random_probes(part, 1, random)
        try:
            found.append(model.log_prob(part, label, probe, tolerance).cpu())
        except ValueError as error:
            raise UserError(str(error))
    return torch.cat(found).double()


def score_flow(model, fields, settings, data, path):
    """The squared error by time, the likelihood, and how good samples are by the number of evaluations."""
    total, size, device = {}, 250, model.net.head.weight.device
    for j in range(-(-data.n // size)):
        with torch.no_grad(), exact(settings, device):
            batch = evaluation_batch(data, model, dict(micro_batch_size=size), j)
            total = add_logs(total, model(to_device(batch, device))[1])
    errors, _ = means(total)
    scores = {('squared error' if name == 'loss' else f'squared error, t in {name[2:].replace("_", "..")}'): alone(value, data.n)
              for name, value in sorted(errors.items())}
    scores |= (score_pictures if model.config.image_size else score_points)(model, fields, settings, data)
    save_scores(scores, path)


def score_points(model, fields, settings, data):
    """KL(data || model) by the exact trace; Wasserstein-2 distances by evaluations, beside that of real points from others."""
    points = torch.from_numpy(np.array(data.arrays['point'][:settings['n_score'] * 10]))
    learned = likelihoods(model, points, torch.zeros(len(points), dtype=torch.long)).numpy()
    truth = fields.log_density(points.numpy())
    parts = np.stack((-learned if truth is None else truth - learned, np.ones(len(points))), -1)[:, None]
    scores = {'nats/point' if truth is None else 'KL(data || model), nats': bootstrap(parts)}
    n = min(6000, settings['n_score'] * 6)
    floor = fields.score(fields.fresh(n, 2)).mean()
    for steps in [settings['steps']] if settings['steps'] else (1, 2, 4, 20):
        found = fields.score(flow_samples(model, np.zeros(n, int), settings | dict(steps=steps), n))
        scores[f'W2, {steps} steps'] = bootstrap(np.stack((found, np.ones(len(found))), -1)[:, None]) | dict(floor=floor)
    return scores


def score_pictures(model, fields, settings, data):
    """Bits a number by Hutchinson's estimate; where the data has a judge, what it says by the number of evaluations."""
    config, n = model.config, min(data.n, max(8, settings['n_score'] // 16))
    batch = data.rows(np.arange(n))
    x = flow.from_pixels(batch['image'], torch.Generator().manual_seed(0))
    labels = batch.get('label', torch.zeros(n, dtype=torch.long))
    nats = likelihoods(model, x, labels, tolerance=1e-3, size=32).numpy() / x[0].numel()
    bits = np.stack((7 - nats / math.log(2), np.ones(n)), -1)[:, None]  # 7: one of 256 levels is 2 / 256 wide
    scores = {'bits/dim' + ' given the class' * (config.n_classes > 0): bootstrap(bits) | dict(baseline=8.0)}
    if not config.n_classes:
        return scores
    labels = np.arange(settings['n_score']) % config.n_classes
    for count in [settings['steps']] if settings['steps'] else COUNTS[:5]:
        started = time.perf_counter()
        drawn = flow_samples(model, labels, settings | dict(steps=count))
        seconds = (time.perf_counter() - started) / len(labels)
        for name, score in judged(fields.score(drawn, labels)).items():
            if name in ('accuracy', 'frechet') or count in (20, settings['steps']):
                scores[f'{count} steps: {name}'] = score
        scores[f'{count} steps: seconds/image'] = alone(seconds, len(labels))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# nanoVLM

def look(model, fields, images, n=1):
    """Reads pictures (S, m, H, W, C) once, for n questions about each; returns the cache behind which these go."""
    prompt = torch.full(images.shape[:2], fields.template.image)
    return model.read(prompt.to(model.language.turn.device), torch.as_tensor(np.array(images)).to(model.language.turn.device), n)


def ask(model, fields, cache, questions, settings, first=()):
    """The stream of answers (B,) to B questions of any lengths, behind what the cache holds and the tokens `first`."""
    tokens = pad_in_front([[*first, *fields.template.ask(question)] for question in questions])
    room, device = model.length - cache.filled, model.language.turn.device
    if tokens.size(1) >= room:
        raise UserError(f'the question has {tokens.size(1)} tokens, and the context has room for {room}, the answer included: '
                        'shorten it')
    how = (chosen(settings, 'temperature', 0.0), settings['top_k'], settings['top_p'], settings['min_p'])
    generator = torch.Generator(device).manual_seed(settings['seed'])
    return model.stream(tokens.to(device), cache, settings['max_new_tokens'], *how, fields.template.end, generator)


def answers(model, fields, images, questions, settings):
    """One reply each to S lists of n questions about S pictures (S, m, H, W, C): lists of lists of texts."""
    n = len(questions[0])
    with exact(settings, model.language.turn.device):
        drawn = list(ask(model, fields, look(model, fields, images, n), [q for row in questions for q in row], settings))
    texts = [fields.decode(ids) for ids in torch.stack(drawn, 1).tolist()]
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def final(reply):
    """What a reply says in the end, after the thought if there is one."""
    return reply.rpartition('Answer:')[2].strip()


def read_question():
    """A line from the keyboard; '' where it ends, by Ctrl-D or Ctrl-C."""
    try:
        return input('> ').strip()
    except (EOFError, KeyboardInterrupt):
        return ''


def chat(model, fields, images, settings):
    """Questions from the keyboard, answers word by word; pictures and all turns before stay in the cache."""
    cache, last = look(model, fields, images), []
    print('Ask about the picture; an empty line ends.')
    while question := read_question():
        ids, shown = [], ''
        try:
            stream = ask(model, fields, cache, [question], settings, last)
        except UserError:  # full: only the pictures are kept
            cache, last = look(model, fields, images), []
            stream = ask(model, fields, cache, [question], settings)
        for token in stream:
            ids.append(int(token))
            text = fields.decode(ids)
            if not text.endswith('\ufffd'):  # else a token ended within a character
                print(text[len(shown):], end='', flush=True)
                shown = text
        last = ids[-1:]  # not in the cache yet
        print()


def in_rows(images, n):
    """Pictures of n conversations, one (H, W, C) or several each -> (n, m, H, W, C)."""
    return images.reshape(n, -1, *images.shape[-3:])


def own_questions(model, fields, settings):
    """Answers to the user's questions about the user's pictures; each question is asked about each picture."""
    if settings['n']:
        raise UserError('n is the number of held-out pictures, and these are yours: leave it out')
    images, m = np.stack([fields.read_image(file) for file in settings['image'].split(',')]), model.config.n_images
    if len(images) % m:
        raise UserError(f'{len(images)} pictures, and this model reads {m} at a time')
    images = in_rows(images, len(images) // m)
    if settings['chat']:
        with exact(settings, model.language.turn.device):
            return chat(model, fields, images[:1], settings)
    texts = read_lines(settings['prompts']) if settings['prompts'] else [settings['text']]
    for row in answers(model, fields, images, [texts] * len(images), settings):
        print('\n'.join(row))


def draw_vlm(model, fields, settings, path):
    """Held-out pictures with questions, answers and marks; or the user's own."""
    if settings['image']:
        return own_questions(model, fields, settings)
    if settings['chat'] or settings['text'] or settings['prompts']:
        raise UserError('questions need --image=FILE, the picture that they are about')
    lines = fields.questions(settings['split'])[:settings['n'] or 6]
    images = in_rows(fields.pictures(settings['split'], [line['image'] for line in lines]), len(lines))
    asked = [(6 * line['turns'])[:6] for line in lines]  # equally many about each
    found = answers(model, fields, images, [[question for question, _ in turns] for turns in asked], settings)
    talks = [dict.fromkeys((q, final(reply), truth) for (q, truth), reply in zip(turns, row)) for turns, row in zip(asked, found)]
    save_answers(images[:, 0], [list(talk) for talk in talks], path)


def right_answers(model, fields, settings, name='questions', shift=0):
    """{family: (n, 1, 2)} right and all answers about each picture, and answers a second; shift > 0 shows another picture."""
    lines, families, total = fields.questions(settings['split'], name)[:settings['n_score']], {}, 0
    shown, started = np.roll([line['image'] for line in lines], shift, 0), time.perf_counter()
    for start in tqdm(range(0, len(lines), 32), desc=f'score {name}', unit='batch', leave=False):
        part = lines[start:start + 32]
        most = max(len(line['turns']) for line in part)
        images = in_rows(fields.pictures(settings['split'], shown[start:start + 32]), len(part))
        asked = [[question for question, _ in (most * line['turns'])[:most]] for line in part]
        for i, (line, row) in enumerate(zip(part, answers(model, fields, images, asked, settings)), start):
            for (_, truth), family, reply in zip(line['turns'], line['families'], row):
                for key in {family or 'all', 'all'}:
                    families.setdefault(key, np.zeros((len(lines), 1, 2)))[i, 0] += (final(reply) == truth, 1)
                total += 1
    return families, total / (time.perf_counter() - started)


def majority(fields):
    """{family: its most frequent answer in training}, and of all."""
    heard = {}
    for line in fields.questions('train')[:5000]:
        for (_, answer), family in zip(line['turns'], line['families']):
            heard.setdefault(family or 'all', Counter())[answer] += 1
    return {family: counter.most_common(1)[0][0] for family, counter in heard.items()}


def read_blind(model, fields, settings):
    """The model of another run, of the same data, that never looks."""
    other, checkpoint = load_model(Path(settings['blind'], settings['checkpoint']))
    if chapter_of(other) != 'vlm' or not other.config.blind or checkpoint['meta']['encoding'] != fields.meta['encoding']:
        raise UserError(f'blind={settings["blind"]!r}: must be a run of vlm with --blind=True on the same data')
    return other.to(model.language.turn.device)


def score_vlm(model, fields, settings, data, path):
    """Share of answers that are right to the letter, each question asked by itself, by family; beside it the family's most
    frequent answer, what the model says to another picture, and what a model says that was trained without pictures."""
    settings = settings | dict(max_new_tokens=min(settings['max_new_tokens'], 32))
    other = read_blind(model, fields, settings) if settings['blind'] else None
    (found, rate), usual = right_answers(model, fields, settings), majority(fields)
    lines = fields.questions(settings['split'])[:settings['n_score']]
    guesses = [(family or 'all', truth == usual[family or 'all'])
               for line in lines for (_, truth), family in zip(line['turns'], line['families'])]
    blind = {family: float(np.mean([hit for name, hit in guesses if family in (name, 'all')])) for family in found}
    scores = {family: bootstrap(parts) | dict(baseline=blind[family]) for family, parts in sorted(found.items())}
    more = {'another picture': right_answers(model, fields, settings, shift=1)[0]}
    if other:
        more['no picture'] = right_answers(other, fields, settings)[0]
    if Path(fields.folder, settings['split'], 'new_pairs.jsonl').is_file():
        more['new pairs'] = right_answers(model, fields, settings, 'new_pairs')[0]
    scores |= {f'{name}: {family}': bootstrap(parts) for name, part in more.items() for family, parts in sorted(part.items())}
    save_scores(scores | {'answers/s': alone(rate, len(guesses))}, path)


# ---------------------------------------------------------------------------------------------------------------------
# All chapters

# (model, fields, settings, path of a picture): writes it, or returns texts
DRAW = dict(gpt=draw_gpt, maskgit=draw_maskgit, fourm=draw_fourm, flow=draw_flow, vlm=draw_vlm)
# (model, fields, settings, validation data, path of scores.json)
SCORE = dict(gpt=score_gpt, maskgit=score_maskgit, fourm=score_fourm, flow=score_flow, vlm=score_vlm)


def chapter_of(model):
    return type(model).__module__


def fields_of(folder, meta):
    """The data set's own decoder and judge, from the prepare module that made it."""
    module = f'prepare.{meta["prepare"]}'
    if not importlib.util.find_spec(module):
        raise UserError(f'{folder} was made by {module.replace(".", "/")}.py, which is no longer there: restore it')
    return importlib.import_module(module).Fields(folder)


def section(model, functions):
    """The function of the model's chapter, of DRAW or SCORE. Raises UserError for a model of your own that has none yet."""
    if chapter_of(model) not in functions:
        raise UserError(f'sample.py has no function for model={chapter_of(model)!r} yet: docs/yours.md shows how to add one; '
                        '--pictures=False trains without it')
    return functions[chapter_of(model)]


def draw(model, folder, meta, path):
    """What train.py draws at an evaluation: a picture at `path`, or a text beside it."""
    texts = section(model, DRAW)(model, fields_of(folder, meta), SETTINGS | dict(max_new_tokens=300), path)
    if texts:
        path.with_suffix('.txt').write_text(texts[0], encoding='utf-8')


def check(settings, model):
    """Raises UserError where a setting has no meaning, or none for this model."""
    chapter = chapter_of(model)
    for name in set(' '.join(BELONGS.values()).split()) - set(BELONGS.get(chapter, '').split()):
        if settings[name] not in [SETTINGS[name]]:  # in: nan is itself
            others = ', '.join(other for other, names in BELONGS.items() if name in names.split())
            raise UserError(f'{name} is a setting of {others}, this run is of {chapter}: leave it out')
    words = dict(order=ORDERS, schedule=('', *SCHEDULES), shape=SHAPES, show=SHOWS.get(chapter, ('grid',)), by=retrieval.WAYS)
    for name, known in words.items():
        if settings[name] not in known:
            raise UserError(f'{name} is one of {", ".join(filter(None, known))}')
    most = getattr(model.config, 'vocab_size', settings['top_k'])
    if settings['top_k'] > most:
        raise UserError(f'top_k={settings["top_k"]} must be 0 (all) to {most}')
    if settings['compile'] and not any(map(is_block, model.modules())):
        raise UserError('compile is for Transformers, and this model is none: leave it out')


def check_ranges(settings):
    """Raises UserError where a setting has no meaning for any model, or none beside another one."""
    for name, others in APART.items():
        if both := [other for other in others.split() if settings[name] and settings[other]]:
            raise UserError(f'{name} and {both[0]} do not go together: leave one of them out')
    for name in ('blind', 'against'):
        if settings[name] and not settings['score']:
            raise UserError(f'{name} stands beside scores: add --score=True')
    if settings['init_from'] and settings['checkpoint'] != SETTINGS['checkpoint']:
        raise UserError('init_from takes ckpt_last.pt: name the run by --out_dir= to choose a checkpoint')
    if min(settings[name] for name in ('n', 'steps', 'top_k')) < 0 or min(
            settings[name] for name in ('max_new_tokens', 'n_score', 'gap')) < 1:
        raise UserError('n, steps and top_k must be at least 0, max_new_tokens, n_score and gap at least 1')
    if not 0 < settings['top_p'] <= 1 or not 0 <= settings['min_p'] <= 1 or settings['temperature'] < 0 or (
            settings['temperature_end'] < 0 or settings['choice_temperature'] < 0):
        raise UserError('top_p must be in (0, 1], min_p in [0, 1], temperatures at least 0')
    for name in ('temperature', 'temperature_end'):
        if 0 < settings[name] < 1e-6:  # logits divided by less may not be finite
            raise UserError(f'{name}={settings[name]} must be 0, which takes the likeliest token, or at least 1e-6')
    if not 0 <= settings['complete'] < 1:
        raise UserError(f'complete={settings["complete"]} must be at least 0 and below 1')


# ---------------------------------------------------------------------------------------------------------------------
# Pages of runs; and which generator of digits is best

BINARY = dict(  # (model, fields, labels, settings) -> binary pictures (n, 14, 14), whatever the chapter works on
    gpt=lambda model, fields, labels, settings: fields.decode(generate_pictures(model, settings, labels[:, None])),
    maskgit=lambda model, fields, labels, settings: fields.decode(
        fill(model, settings, torch.full((len(labels), model.N), -1), torch.as_tensor(labels))),
    flow=lambda model, fields, labels, settings: fields.binary(flow_samples(model, labels, settings)))


def generators(runs, settings):
    """The runs each in a row: size, training time, likelihood in its own representation (those of two rows compare only where
    these are the same), the judge of 14x14 binary pictures, to which all are reduced, and speed. Returns the table."""
    rows, columns, labels = [], {}, np.arange(settings['n_score']) % 10
    for run, model, fields in runs:
        chapter, likelihood = chapter_of(model), [name for name in run.scores if 'nats/image' in name or 'bits/dim' in name]
        own = next((f'{run.scores[name]["value"]:.3g} {name}' for name in likelihood), '-')
        started = time.perf_counter()
        drawn = np.concatenate([BINARY[chapter](model, fields, part, settings | dict(seed=settings['seed'] + i))
                                for i, part in enumerate(np.array_split(labels, -(-len(labels) // 64)))])
        seconds = (time.perf_counter() - started) / len(labels)
        scores = judged(fields.score(drawn, labels))
        found = {name: score['value'] for name, score in scores.items()}
        rows.append(f'| {run.folder.name} | {run.parameters / 1e6:.2f} M | {run.checkpoint["seconds"]:.0f} s | {own} | '
                    f'{found["accuracy"]:.1%} | {found["frechet"]:.3f} | {found["precision"]:.3f}, {found["recall"]:.3f} | '
                    f'{seconds * 1000:.0f} ms |')
        order = np.argsort(labels[:100], kind='stable')
        columns[run.folder.name] = [np.repeat(tile(drawn[:100][order], 10)[..., None], 3, -1)]
    order = np.concatenate([np.flatnonzero(fields.load('val', 'label') == c)[:10] for c in range(10)])
    columns['held out'] = [np.repeat(tile(fields.real('val', 14)[order], 10)[..., None], 3, -1)]
    rows.append(f'| real digits | | | | {scores["accuracy"]["ceiling"]:.1%} | {scores["frechet"]["floor"]:.3f} | '
                f'{scores["precision"]["ceiling"]:.3f}, {scores["recall"]["ceiling"]:.3f} | |')  # the same for all runs
    head = '| | parameters | training | likelihood, given the class | class accuracy | Fréchet | precision, recall | an image |'
    table = '\n'.join([head, '|---' * 8 + '|', *rows])
    print(table)
    Path('out').mkdir(exist_ok=True)
    save_grid(columns, Path('out/compare.png'))
    return f'## Which generator?\n\n{table}\n\n![digits](compare.png)'


def read_run(path):
    """What a page tells of the run with this checkpoint; and its model."""
    model, checkpoint = load_model(path)
    defaults = resolve(dict(model=(chapter_of(model), '')))[0] | dict(model=resolve({})[0]['model'])
    return page.Run(path.parent, checkpoint, sum(p.numel() for p in model.parameters()), defaults), model


def compare(settings, device):
    """A page of the runs named by `compare`; where all are generators of the same digits, these are compared as well."""
    runs = [read_run(Path(name, settings['checkpoint'])) for name in settings['compare'].split(',')]
    checkpoints = [run.checkpoint for run, _ in runs]
    folder, meta = Path('data', checkpoints[0]['settings']['dataset']), checkpoints[0]['meta']
    digits = meta['prepare'] == 'mnist' and all(one['meta'] == meta for one in checkpoints)
    more = ''
    if digits and all(chapter_of(model) in BINARY for _, model in runs):
        check_data(folder, read_meta(folder), checkpoints[0])
        more = generators([(run, model.to(device), fields_of(folder, meta)) for run, model in runs], settings)
    page.write([run for run, _ in runs], Path('out/compare.md'), more)


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    check_ranges(settings)
    device = find_device(settings['device'])
    set_up(device, training=False)
    if settings['compare']:
        return compare(settings, device)
    path = find_weights(settings['init_from']) if settings['init_from'] else Path(settings['out_dir'], settings['checkpoint'])
    settings |= dict(out_dir=str(path.parent), checkpoint=path.name)  # init_from names them too; an index lies beside them
    if settings['report']:
        return page.write([read_run(path)[0]], path.with_name('report.md'))
    model, checkpoint = load_model(path)
    model.to(device)
    folder, meta, out_dir = Path('data', checkpoint['settings']['dataset']), checkpoint['meta'], path.parent
    if not settings['init_from']:
        check_data(folder, read_meta(folder), checkpoint)
    fields = fields_of(folder, meta)
    check(settings, model)
    if settings['compile']:
        compile_passes(model, settings, device)
    splits = sorted(part.name for part in folder.glob('*/'))
    if not settings['init_from'] and settings['split'] not in splits:
        raise UserError(f'split={settings["split"]!r}: {folder} has {", ".join(splits)}')
    if settings['score']:
        data = Data(folder, settings['split'], meta, model.fields, getattr(model.config, 'block_size', 0))
        of = [Path(settings['checkpoint']).stem] * (settings['checkpoint'] != SETTINGS['checkpoint'])
        of += [settings['split']] * (settings['split'] != SETTINGS['split'])  # other weights, other samples: another file
        section(model, SCORE)(model, fields, settings, data, out_dir / f'{"_".join(["scores", *of])}.json')
    else:
        section(model, DRAW)(model, fields, settings, out_dir / time.strftime('sample_%Y%m%d_%H%M%S.png'))


if __name__ == '__main__':
    config.run(main)
