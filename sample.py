"""
One sampler for all chapters: draws what a trained model generates, and scores it.

    python sample.py --out_dir=out/nano4m                                        any-to-any grid on held-out scenes
    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"
    python sample.py --out_dir=out/nano4m --given=caption --text="two large red metal spheres" --target=depth,rgb
    python sample.py --out_dir=out/nano4m --given=rgb --image=FILE.png --target=depth,caption
    python sample.py --out_dir=out/nano4m --score=True                           every modality from every other, with ceilings
    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"
    python sample.py --out_dir=out/gpt_mnist                                     ten digits of each class
    python sample.py --out_dir=out/gpt_mnist --complete=0.5                      held-out digits, completed from their upper half
    python sample.py --init_from=smollm2 --prompt="The capital of France is"
    python sample.py --out_dir=out/vlm_scenes                                    held-out scenes with questions and answers
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"      or --chat=True

A chain names what is given, then targets with optional steps and order (random, confidence, raster), each of which, once
generated, conditions the next. Pictures are written as PNG into the run's folder, scores as scores.json; the path is printed.
"""
import importlib
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
from config import UserError
from prepare.report import alone, bootstrap, save_answers, save_grid, save_scores
from train import Data, autocast, check_data, find_device, find_dtype, find_weights, load_model, read_meta, set_up

SETTINGS = dict(
    out_dir='out/nano4m',     # the run
    init_from='',             # instead of a run: weights by name, 'smollm2'
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    seed=0,
    device='auto', dtype='auto',
    n=0,                      # texts, or rows of a picture; 0 chooses: 1 text, 6 scenes, 10 digits a class
    split='val',              # held-out scenes
    # what to generate from what (nano4M)
    given='',                 # modalities given, e.g. rgb or caption,depth
    target='',                # modalities to generate, in this order; '' is all others
    chain='',                 # both at once: 'rgb>depth:8,normal:8:confidence,scene_desc'
    text='',                  # a text of your own for the given text modality; nanoVLM: a question
    image='',                 # a picture file of your own for the given rgb; nanoVLM: one, or several with commas between
    chat=False,               # nanoVLM: ask about the picture until you enter nothing
    blind='',                 # nanoVLM: a run with blind=True, whose scores are to stand beside these
    # how
    steps=0,                  # decoding steps of an image; 0 chooses these three for each target, see `manner`
    temperature=math.nan,     # 0 takes the likeliest token; nan chooses (GPT: 0.8 for text, 1 for pictures)
    guidance=0.0,             # above 1 what is given counts for more than in training; 0 chooses
    top_k=0, top_p=1.0,
    min_p=0.0,                # GPT
    order='random',           # random (ROAR), confidence (MaskGIT), raster
    schedule='linear',        # linear, cosine: how many tokens a step
    prompt='',                # GPT: the text to go on with; '' is the beginning of a text
    prompts='',               # GPT: a file with one prompt a line, all continued in one batch; nanoVLM: one question a line
    max_new_tokens=500,       # GPT, nanoVLM
    complete=0.0,             # GPT on pictures: the share of held-out pictures that is given
    score=False,              # compute and save the scores, of all pairs or those that given and target name
    n_score=1000,             # held-out scenes, or generated digits, to score
)
ORDERS = ('random', 'confidence', 'raster')
BELONGS = dict(  # the chapters that a setting means something to; to all, where it is not named
    given='fourm', target='fourm', chain='fourm', text='fourm vlm', image='fourm vlm', guidance='fourm', steps='fourm',
    order='fourm', schedule='fourm', min_p='gpt vlm', prompt='gpt', prompts='gpt vlm', max_new_tokens='gpt vlm', complete='gpt',
    chat='vlm', blind='vlm')


def chosen_temperature(settings, default):
    return default if math.isnan(settings['temperature']) else settings['temperature']


def exact(settings, device):
    """Autocast for a GPT: float32 on a CPU unless asked otherwise; one token at a time has no use for faster matrix products."""
    cpu = settings['dtype'] == 'auto' and device.type == 'cpu'
    return autocast(device, torch.float32 if cpu else find_dtype(settings['dtype'], device))


# ---------------------------------------------------------------------------------------------------------------------
# GPT

def sampler(model, settings, temperature, end=-1):
    """model.stream's arguments after the tokens and their number."""
    generator = torch.Generator(model.turn.device).manual_seed(settings['seed'])
    return (chosen_temperature(settings, temperature), settings['top_k'], settings['top_p'], settings['min_p'], end, generator)


def read_prompts(model, fields, settings):
    """The prompts as rows of ids (B, T0), shorter ones filled up in front with -1."""
    texts = [settings['prompt']] * (settings['n'] or 1)
    if settings['prompts']:
        try:
            texts = Path(settings['prompts']).read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'{settings["prompts"]}: not UTF-8 text ({error}); write one prompt a line')
    prompts = [fields.encode(text).tolist() or [fields.start] for text in texts]
    if not prompts:
        raise UserError(f'{settings["prompts"]}: no prompts; write one a line')
    longest = max(map(len, prompts))
    if longest > model.config.block_size:
        raise UserError(f'the prompt has {longest} tokens, the context of this model holds {model.config.block_size}: shorten it')
    return torch.tensor([[-1] * (longest - len(prompt)) + prompt for prompt in prompts])


def write_texts(model, fields, settings):
    """Continues the prompts and prints them; a single one appears as it is written. Returns the texts."""
    if settings['complete']:
        raise UserError('complete is for models of pictures, this one is of text: leave it out')
    tokens = read_prompts(model, fields, settings).to(model.turn.device)
    device, alone, end = tokens.device, len(tokens) == 1, -1 if fields.end is None else fields.end
    rows, waiting = tokens.tolist(), tokens[0].tolist()
    with exact(settings, device):
        for new in model.stream(tokens, settings['max_new_tokens'], *sampler(model, settings, 0.8, end)):
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
        truth = fields.load('val', 'tokens')[:n, 0]
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
    if not hasattr(fields, 'classes'):
        return write_texts(model, fields, settings)
    if settings['prompt'] or settings['prompts']:
        raise UserError('prompt and prompts are for models of text, this one is of pictures: leave them out')
    draw_digits(model, fields, settings, path)


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
    else:
        scores['nats/image given the class'] = bootstrap(nll / [1, 49])
        labels, started = np.arange(settings['n_score']) % 10, time.perf_counter()
        tokens = torch.cat([generate_pictures(model, settings | dict(seed=settings['seed'] + i), part[:, None])
                            for i, part in enumerate(np.array_split(labels, -(-len(labels) // 500)))])
        rate = tokens[:, 1:].numel() / (time.perf_counter() - started)
        for name, score in fields.score(fields.decode(tokens), labels).items():
            scores[name] = (bootstrap(score.pop('parts')) if 'parts' in score else alone(score.pop('value'), len(labels))) | score
        scores['generation, tokens/s'] = alone(rate, len(labels))
    save_scores(scores, path)


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: chains

def parse_chain(settings, model):
    """The given modalities and the targets as (name, steps, order), checked against those of the model."""
    names = [m.name for m in model.modalities]
    given, target = settings['chain'].split('>') if settings['chain'].count('>') == 1 else (settings['given'], settings['target'])
    if settings['chain'] and settings['chain'].count('>') != 1:
        raise UserError(f'--chain={settings["chain"]!r}: write given>target,target:steps:order, as in "rgb>depth:8,scene_desc"')
    given = [name for name in given.split(',') if name]
    targets = []
    for entry in target.split(',') if target else [name for name in names if name not in given]:
        name, *rest = entry.split(':')
        steps, order = (rest + [''] * 2)[:2] if len(rest) < 3 else ('?', '')
        if (steps and not steps.isdecimal()) or (order and order not in ORDERS):
            raise UserError(f'target {entry!r}: write name:steps:order with a number of steps and one of {", ".join(ORDERS)}')
        targets.append((name, int(steps or settings['steps']), order or settings['order']))  # 0 steps: chosen by `manner`
    for name in given + [name for name, *_ in targets]:
        if name not in names:
            raise UserError(f'there is no modality {name!r}; this model has {", ".join(names)}')
    asked = given + [name for name, *_ in targets]
    if repeated := [name for name in asked if asked.count(name) > 1]:
        raise UserError(f'{repeated[0]!r} stands twice among given and targets')
    return given, targets


def manner(model, name, known, steps, settings):
    """(steps, temperature, guidance) for a target. Where the rgb picture is known, hardly more than one answer is right: the likeliest
    one, at once. Otherwise many are, and a picture's tokens have to agree with each other: a few at a time, drawn at random."""
    is_text = next(m.is_text for m in model.modalities if m.name == name)
    chosen = (1, 0.0, 1.0) if is_text or name != 'rgb' and 'rgb' in known else (8, 0.4, 2.0)
    return steps or chosen[0], chosen_temperature(settings, chosen[1]), settings['guidance'] or chosen[2]


def generate(model, given, targets, settings, generator=None):
    """Runs a chain: {name: ids} for the given and all generated modalities."""
    known, device = dict(given), model.turn.device
    for name, steps, order in targets:
        steps, temperature, guidance = manner(model, name, known, steps, settings)
        with autocast(device, find_dtype(settings['dtype'], device)):
            known |= model.generate(known, [name], steps, temperature, settings['top_k'], settings['top_p'], order,
                                    settings['schedule'], guidance, generator)
    return known


def read_ids(fields, name, split, index):
    return torch.from_numpy(fields.load(split, name)[index].astype(np.int64))


def columns_for(model, fields, settings, given, targets, index, own=None):
    """Columns {title: [pictures]} of one chain: what is given, then each target's truth beside what was generated."""
    ids = own or {name: read_ids(fields, name, settings['split'], index) for name in given}
    ids = ids or {targets[0][0]: torch.full((settings['n'], fields.load('val', targets[0][0]).shape[1]), -1)}
    generator = torch.Generator(model.turn.device).manual_seed(settings['seed'])
    found = generate(model, ids, targets, settings, generator)
    columns = {}
    for name in [*given, *(name for name, *_ in targets)]:
        raw = fields.decode(name, found[name])
        drawn = [fields.picture(name, one) for one in raw]
        if own is None and given:
            truth = [fields.picture(name, one) for one in fields.truth(settings['split'], name, index)]
            columns[f'{name} (given)' if name in given else f'{name} (truth)'] = truth
        if name not in given or own is not None:
            columns[f'{name} (given)' if name in given else name] = drawn
        if isinstance(raw, list) and (own is not None or len(index) <= 2):
            print('\n'.join(dict.fromkeys(f'{name}: {text}' for text in raw)))  # equal ones once
    return columns


def draw_fourm(model, fields, settings, path):
    """The picture that the settings ask for; without given and target: each from rgb alone, and rgb from the caption."""
    settings, own = settings | dict(n=settings['n'] or 6), own_input(model, fields, settings)
    index = np.arange(settings['n'])
    if settings['chain'] or settings['given'] or settings['target'] or own:
        chains = [parse_chain(settings, model)]
    else:
        names = [m.name for m in model.modalities]
        first = names[0]
        chains = [([first], [(name, settings['steps'], settings['order'])]) for name in names[1:]]
        if 'caption' in names[1:]:
            chains.append((['caption'], [(first, settings['steps'], settings['order'])]))
    columns = {}
    for given, targets in chains:
        columns |= columns_for(model, fields, settings, given, targets, index, own)
    save_grid(columns, path)


def own_input(model, fields, settings):
    """The user's text or picture as the given modality; None where there is none."""
    if not (settings['text'] or settings['image']):
        return None
    given, _ = parse_chain(settings, model)
    own = {}
    for name in given:
        is_text = next(m.is_text for m in model.modalities if m.name == name)
        if is_text and settings['text']:
            own[name] = fields.read_text(name, settings['text'])
        elif not is_text and settings['image']:
            own[name] = fields.read_image(name, settings['image'])
        else:
            raise UserError(f'--given={name} needs {"--text" if is_text else "--image"} beside '
                            f'{"--image" if is_text else "--text"}; or give neither, for held-out scenes')
    if not own:
        raise UserError('--text and --image need --given=NAME, the modality that they are')
    return {name: ids.repeat(settings['n'] or 6, 1) for name, ids in own.items()}


# ---------------------------------------------------------------------------------------------------------------------
# nano4M: scores

def retrieval(model, fields, settings, n, gallery=100):
    """Recall@1 of captions by pictures and of pictures by captions within galleries of 100 held-out scenes, ranked by
    ln p(caption | rgb) - ln p(caption); equal captions count as the same."""
    hits = {'rgb>caption': [], 'caption>rgb': []}
    for start in range(0, n - n % gallery, gallery):
        index = np.arange(start, start + gallery)
        rgb, captions = (read_ids(fields, name, settings['split'], index) for name in ('rgb', 'caption'))
        with autocast(model.turn.device, find_dtype(settings['dtype'], model.turn.device)):
            ratio = (model.log_prob({'rgb': rgb}, 'caption', captions)
                     - model.log_prob({'rgb': torch.full_like(rgb[:1], -1)}, 'caption', captions)).cpu()
        same = (captions[:, None] == captions[None]).all(-1)
        hits['rgb>caption'] += same[range(gallery), ratio.argmax(1)].tolist()
        hits['caption>rgb'] += same[range(gallery), ratio.argmax(0)].tolist()
    return {f'{way}/recall_at_1_of_{gallery}': np.stack((np.array(h, float), np.ones(len(h))), -1)[:, None] for way, h in hits.items()}


def score_fourm(model, fields, settings, data, path):
    """Every modality from every other: each cell's metrics with ceiling (the tokenizer's own reconstruction, or the text itself) and
    baseline (a predictor that sees nothing). Prints a table and writes scores.json."""
    names, split = model.fields, settings['split']
    index = np.arange(min(settings['n_score'], data.n))
    scores, bounds = {}, {}
    for name in names:  # what a perfect and what a blind model would reach
        ceiling = fields.score(name, fields.decode(name, read_ids(fields, name, split, index)), split, index)
        blind = fields.score(name, fields.baseline(name, split, index), split, index)
        bounds[name] = {key: dict(ceiling=bootstrap(ceiling[key], 1)['value'], baseline=bootstrap(blind[key], 1)['value'])
                        for key in ceiling}
    real = fields.score('rgb', fields.truth(split, 'rgb', index), split, index) if 'rgb' in names else {}
    scores |= {f'parser on true renders/{key}': bootstrap(parts) for key, parts in real.items()}
    parse_chain(settings, model)  # complains of unknown names
    sources, targets = (settings[key].split(',') if settings[key] else names for key in ('given', 'target'))
    cells = [(a, b) for b in names for a in names if a != b and a in sources and b in targets]
    for a, b in tqdm(cells, desc='score', unit='cell'):
        parts = []
        for part in np.array_split(index, max(1, len(index) // 250)):
            given = {a: read_ids(fields, a, split, part)}
            generator = torch.Generator(model.turn.device).manual_seed(settings['seed'])
            ids = generate(model, given, [(b, settings['steps'], settings['order'])], settings, generator)[b]
            parts.append(fields.score(b, fields.decode(b, ids), split, part))
        for key in parts[0]:
            scores[f'{a}>{b}/{key}'] = bootstrap(np.concatenate([part[key] for part in parts])) | bounds[b][key]
    if {'rgb', 'caption'} <= set(names) and len(index) >= 100:
        scores |= {key: bootstrap(parts) | dict(baseline=0.01) for key, parts in retrieval(model, fields, settings, len(index)).items()}
    save_scores(scores, path)


# ---------------------------------------------------------------------------------------------------------------------
# nanoVLM

def pad_in_front(rows):
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + row for row in rows])


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
    how = (chosen_temperature(settings, 0.0), settings['top_k'], settings['top_p'], settings['min_p'])
    generator = torch.Generator(device).manual_seed(settings['seed'])
    return model.stream(tokens.to(device), cache, settings['max_new_tokens'], *how, fields.template.end, generator)


def answers(model, fields, images, questions, settings):
    """One answer each to S lists of n questions about S pictures (S, m, H, W, C): lists of lists of texts."""
    n = len(questions[0])
    with exact(settings, model.language.turn.device):
        drawn = list(ask(model, fields, look(model, fields, images, n), [q for row in questions for q in row], settings))
    texts = [fields.decode(ids) for ids in torch.stack(drawn, 1).tolist()]
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def chat(model, fields, images, settings):
    """Questions from the keyboard, answers word by word; pictures and all turns before stay in the cache."""
    cache, last = look(model, fields, images), []
    print('Ask about the picture; an empty line ends.')
    for question in iter(lambda: input('> ').strip(), ''):
        ids = []
        try:
            stream = ask(model, fields, cache, [question], settings, last)
        except UserError:  # full: only the pictures are kept
            cache, last = look(model, fields, images), []
            stream = ask(model, fields, cache, [question], settings)
        for token in stream:
            before, ids = fields.decode(ids), [*ids, int(token)]
            print(fields.decode(ids)[len(before):], end='', flush=True)
        last = ids[-1:]  # not in the cache yet
        print()


def in_rows(images, n):
    """Pictures of n conversations, one (H, W, C) or several each -> (n, m, H, W, C)."""
    return images.reshape(n, -1, *images.shape[-3:])


def own_questions(model, fields, settings):
    """Answers to the user's questions about the user's pictures; each question is asked about each picture."""
    images, m = np.stack([fields.read_image(file) for file in settings['image'].split(',')]), model.config.n_images
    if len(images) % m:
        raise UserError(f'{len(images)} pictures, and this model reads {m} at a time')
    images = in_rows(images, len(images) // m)
    if settings['chat']:
        return chat(model, fields, images[:1], settings)
    texts = [settings['text']]
    if settings['prompts']:
        texts = Path(settings['prompts']).read_text(encoding='utf-8').splitlines()
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
    talks = [dict.fromkeys((q, answer, truth) for (q, truth), answer in zip(turns, row)) for turns, row in zip(asked, found)]
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
            for (_, truth), family, answer in zip(line['turns'], line['families'], row):
                for key in {family or 'all', 'all'}:
                    families.setdefault(key, np.zeros((len(lines), 1, 2)))[i, 0] += (answer == truth, 1)
                total += 1
    return families, total / (time.perf_counter() - started)


def majority(fields):
    """{family: its most frequent answer in training}, and of all."""
    heard = {}
    for line in fields.questions('train')[:5000]:
        for (_, answer), family in zip(line['turns'], line['families']):
            heard.setdefault(family or 'all', Counter())[answer] += 1
    return {family: counter.most_common(1)[0][0] for family, counter in heard.items()}


def score_vlm(model, fields, settings, data, path):
    """Share of answers that are right to the letter, each question asked by itself, by family; beside it the family's most
    frequent answer, what the model says to another picture, and what a model says that was trained without pictures."""
    settings = settings | dict(max_new_tokens=min(settings['max_new_tokens'], 32))
    (found, rate), usual = right_answers(model, fields, settings), majority(fields)
    lines = fields.questions(settings['split'])[:settings['n_score']]
    guesses = [(family or 'all', truth == usual[family or 'all'])
               for line in lines for (_, truth), family in zip(line['turns'], line['families'])]
    blind = {family: float(np.mean([hit for name, hit in guesses if family in (name, 'all')])) for family in found}
    scores = {family: bootstrap(parts) | dict(baseline=blind[family]) for family, parts in sorted(found.items())}
    more = {'another picture': right_answers(model, fields, settings, shift=1)[0]}
    if settings['blind']:
        other = load_model(Path(settings['blind'], settings['checkpoint']))[0].to(model.language.turn.device)
        more['no picture'] = right_answers(other, fields, settings)[0]
    if Path(fields.folder, settings['split'], 'new_pairs.jsonl').is_file():
        more['new pairs'] = right_answers(model, fields, settings, 'new_pairs')[0]
    scores |= {f'{name}: {family}': bootstrap(parts) for name, part in more.items() for family, parts in sorted(part.items())}
    save_scores(scores | {'answers/s': alone(rate, len(guesses))}, path)


# ---------------------------------------------------------------------------------------------------------------------
# All chapters

DRAW = dict(gpt=draw_gpt, fourm=draw_fourm, vlm=draw_vlm)  # (model, fields, settings, path): a picture there, or returns texts
SCORE = dict(gpt=score_gpt, fourm=score_fourm, vlm=score_vlm)  # (model, fields, settings, validation data, path of scores.json)


def chapter_of(model):
    return type(model).__module__


def fields_of(folder, meta):
    """The data set's own decoder and judge, from the prepare module that made it."""
    return importlib.import_module(f'prepare.{meta["prepare"]}').Fields(folder)


def draw(model, folder, meta, path):
    """What train.py draws at an evaluation: a picture at `path`, or a text beside it."""
    texts = DRAW[chapter_of(model)](model, fields_of(folder, meta), SETTINGS | dict(max_new_tokens=300), path)
    if texts:
        path.with_suffix('.txt').write_text(texts[0])


def check(settings, model):
    """Raises UserError where a setting has no meaning, or none for this model."""
    if settings['order'] not in ORDERS or settings['schedule'] not in ('linear', 'cosine'):
        raise UserError(f'order is one of {", ".join(ORDERS)}, schedule linear or cosine')
    if settings['n'] < 0 or settings['steps'] < 0 or settings['max_new_tokens'] < 1 or settings['n_score'] < 1:
        raise UserError('n and steps must be at least 0, max_new_tokens and n_score at least 1')
    if not 0 < settings['top_p'] <= 1 or not 0 <= settings['min_p'] <= 1 or settings['temperature'] < 0:
        raise UserError('top_p must be in (0, 1], min_p in [0, 1], temperature at least 0')
    most = getattr(model.config, 'vocab_size', None)
    if settings['top_k'] < 0 or most and settings['top_k'] > most:
        raise UserError(f'top_k={settings["top_k"]} must be 0 (all) to {most or "the size of the vocabulary"}')
    if not 0 <= settings['complete'] < 1:
        raise UserError(f'complete={settings["complete"]} must be at least 0 and below 1')
    for name, chapters in BELONGS.items():
        if settings[name] != SETTINGS[name] and chapter_of(model) not in chapters.split():
            raise UserError(f'{name} is a setting of {chapters.replace(" ", ", ")}, this run is of {chapter_of(model)}: leave it out')


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    device = find_device(settings['device'])
    set_up(device, training=False)
    path = find_weights(settings['init_from']) if settings['init_from'] else Path(settings['out_dir'], settings['checkpoint'])
    model, checkpoint = load_model(path)
    model.to(device)
    folder, meta, out_dir = Path('data', checkpoint['settings']['dataset']), checkpoint['meta'], path.parent
    if not settings['init_from']:
        check_data(folder, read_meta(folder), checkpoint)
    fields = fields_of(folder, meta)
    check(settings, model)
    if settings['score']:
        data = Data(folder, settings['split'], meta, model.fields, getattr(model.config, 'block_size', 0))
        SCORE[chapter_of(model)](model, fields, settings, data, out_dir / 'scores.json')
    else:
        DRAW[chapter_of(model)](model, fields, settings, out_dir / time.strftime('sample_%Y%m%d_%H%M%S.png'))


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
