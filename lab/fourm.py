"""
Chapter 3's models at work: any modality from any others, in-painting, editing, retrieval, scores with their bounds.

    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"
    python sample.py --out_dir=out/nano4m --given=caption --text="two large red metal spheres" --target=depth,rgb
    python sample.py --out_dir=out/nano4m --given=rgb --hide=rgb=16,16,48,48
    python sample.py --out_dir=out/nano4m --retrieve=rgb --given=caption --text="two large red metal spheres"
    python -m lab.score --out_dir=out/nano4m --given=rgb
"""
import difflib
import os
import re
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import lab
from config import UserError
from lab import options, retrieval
from lab.chains import generate, parse_chain, stream
from lab.figures import save_grid
from lab.statistics import alone, bootstrap, judged
from prepare.pictures import ENDINGS, read_picture, squares


@dataclass
class Decoding(options.Sampling):
    steps: int | None = None   # decoding steps of an image; None: 1 if rgb is known, otherwise 8
    order: str = 'random'      # of decoding: random (ROAR), confidence (MaskGIT), raster, halton
    schedule: str = 'linear'   # how many tokens each step fills: linear, cosine, constant
    temperature: str | None = None  # also 0.9..0.3, from the first to the last step; None: 0 for texts and if rgb is
                                    # known (0.7 for the best of several), otherwise 0.2
    guidance: str | None = None  # scale of guidance by all that is given; also 1..3, from the first to the last step;
                                 # None: 1 for texts and if rgb is known, otherwise 2
    plan: bool = True          # before an image from texts alone, without weights, generate the model's other texts


@dataclass
class AnyToAny(Decoding):
    given: str = ''            # modalities given, as rgb or caption,depth; '': none, or examples if nothing else is set
    target: str = ''           # modalities to generate, in this order; '': all others
    chain: str = ''            # both at once, with settings for each target: 'caption>depth:8,rgb:25:halton:t0.7'
                               # (lab/chains.py); several with semicolons between
    hide: str = ''             # a part of what is given that is generated again: 'rgb=16,16,48,48' (x0,y0,x1,y1 in
                               # pixels), 'rgb=outside 16,16,48,48', 'rgb=red cube', 'rgb=FILE.png' (where the file
                               # is white), 'caption=red'; 'caption=7' keeps seven tokens
    replace: str = ''          # a word of the given texts and its replacement: 'red=blue'
    text: str = ''             # your text for the given text modality; it may go on if it ends in '...'
    image: str = ''            # your image file for the given rgb
    retrieve: str = ''         # a modality: shows the held-out scenes that are nearest to what is given
    by: str = 'likelihood'     # how nearness is measured: likelihood, embedding
    n: int = 6                 # scenes, a row each
    scene: int = 0             # the number of the first one


@dataclass
class Scores(Decoding):
    given: str = ''            # from which modalities; '': from each
    target: str = ''           # which modalities; '': each
    chain: str = ''            # these chains instead, separated by semicolons (lab/chains.py), in a file of their own
    hide: str = ''             # as in sample.py: a part of what is given that is generated again
    replace: str = ''          # as in sample.py: a word of the given texts and its replacement
    n_score: int = 200         # held-out scenes; 1000, for the record, also gives recall of retrieval
    told = 'n_score', 'given', 'target', 'chain'  # by the names of scores, or n


def settings_of(run):
    return AnyToAny()


def scores_of(run):
    return Scores()


def draw(run, settings, path):
    """The image at `path` that the settings ask for; without any: each modality from rgb alone, and rgb from the
    caption."""
    options.apart(settings, 'chain', 'given', 'target')
    options.apart(settings, 'retrieve', 'chain', 'target', 'hide', 'replace')
    index = held_out(run, settings)
    if settings.retrieve:
        options.apart(settings, 'text', 'image')
        return save_grid(nearest_scenes(run, settings, index), path)
    columns, chains = {}, read_chains(run, settings)
    kinds = {run.model.modality[link.name].is_text for chain in chains for link in chain[0]}
    if settings.text and settings.image and kinds != {True, False}:
        raise UserError('--text and --image together need --given=NAME,NAME, a text and an image')
    for i, chain in enumerate(chains):
        for title, images in columns_of(run, settings, chain, index).items():
            generated = not title.endswith(')')  # given and true columns are shown once, generated ones for each chain
            columns[f'{title}, chain {i + 1}' if generated and title in columns else title] = images
    save_grid(columns, path)


def held_out(run, settings):
    """The numbers of the scenes that are shown. Raises UserError."""
    n = len(run.dataset.load(run.split, run.model.batch_keys[0]))
    if not 0 <= settings.scene < n:
        raise UserError(f'scene={settings.scene}: this split has the scenes 0 to {n - 1}')
    return np.arange(settings.scene, min(settings.scene + settings.n, n))


def scene_image(run, i):
    """The rgb image (H, W, 3) of a held-out scene."""
    return run.dataset.picture('rgb', run.dataset.truth(run.split, 'rgb', [i])[0])


def names_in(text):
    """'a, b' -> ['a', 'b']"""
    return [name.strip() for name in text.split(',') if name.strip()]


def hidden_name(settings):
    """The modality that `hide` names, in a list; [] if none."""
    return [settings.hide.partition('=')[0]] if settings.hide else []


def read_chains(run, settings):
    """The chains that the settings name, or those of the grid of examples."""
    model, chains = run.model, settings.chain or f'{settings.given}>{settings.target}'
    if chains == '>' and not any((settings.text, settings.image, settings.hide, settings.replace)):
        first, *others = model.batch_keys
        chains = ';'.join([f'{first}>{name}' for name in others] + [f'caption>{first}'] * ('caption' in others)) or '>'
    begun = [m.name for m in model.modalities if m.is_text] if settings.text.endswith('...') else []
    return [parse_chain(chain, settings, model, hidden_name(settings), begun) for chain in chains.split(';')]


# ---------------------------------------------------------------------------------------------------------------------
# What is given, whole or in part

def own_ids(run, settings, names):
    """The user's text and image as ids (1, max_tokens) of the given modalities; {} if there are none. After a text that
    ends in '...' all is unknown. Raises UserError."""
    own = {}
    for name in names if settings.text or settings.image else []:
        m = run.model.modality[name]
        if m.is_text and settings.text:
            own[name] = run.dataset.read_text(name, ' '.join(settings.text.removesuffix('...').split()))
            if settings.text.endswith('...'):
                own[name] = own[name].masked_fill(own[name] == m.vocab_size - 1, -1)
        elif not m.is_text and settings.image:
            own[name] = run.dataset.read_image(name, settings.image)
        else:
            raise UserError(f'--given={name} needs {"--text" if m.is_text else "--image"} beside '
                            f'{"--image" if m.is_text else "--text"}; or give neither, for held-out scenes')
    if (settings.text or settings.image) and not own:
        raise UserError('--text and --image need --given=NAME, the modality that they are')
    return own


def replace_words(run, text, ids, known):
    """Texts, {name: (B, max_tokens)}, with a word replaced as in text='red=blue'; it has to be a word of the texts
    `known`, {name: list}. Raises UserError."""
    old, _, new = text.partition('=')
    if not old or not new:
        raise UserError(f'replace={text!r}: write OLD=NEW, as in "red=blue"')
    first, last = (r'\b' * (c.isalnum() and c < '\u0e00') for c in (old[0], old[-1]))  # beyond: Thai to Chinese, emoji
    word, all_texts = re.compile(first + re.escape(old) + last), [one for texts in known.values() for one in texts]
    if not any(map(word.search, all_texts)):
        raise UserError(f'replace={text!r}: {old!r} is no word of {", ".join(known)}; one such text is '
                        f'{all_texts[0]!r}')
    return {name: torch.cat([run.dataset.read_text(name, word.sub(lambda _: new, one))
                             for one in run.dataset.decode(name, rows)]) for name, rows in ids.items()}


def hidden_words(run, m, ids, what):
    """Which tokens (B, max_tokens) of a text modality m are hidden: words, 'large,red', or all after the first seven,
    '7'."""
    if what.isdecimal():
        return torch.arange(m.max_tokens).expand_as(ids) >= int(what)
    words = [word.strip() for word in run.dataset.decode(m.name, torch.arange(m.vocab_size)[:, None])]
    hidden = names_in(what)
    if unknown := [word for word in hidden if word not in words]:
        near = difflib.get_close_matches(unknown[0], filter(None, words), 3, 0)
        raise UserError(f'hide={m.name}={what}: {unknown[0]!r} is no token of {m.name}; the nearest are '
                        f'{", ".join(near)}')
    return torch.tensor([word in hidden for word in words])[ids.clamp(min=0)] & (ids >= 0)


def hidden_pixels(run, settings, ids, m, what, generator):
    """Which pixels (B, H, W) of an image modality m are hidden: a box x0,y0,x1,y1, all 'outside' it, a file's white
    pixels (1, S, S), or objects, 'red cube', by the segmentation that is given or predicted."""
    height, width = run.dataset.picture(m.name, run.dataset.decode(m.name, ids[m.name][:1])[0]).shape[:2]
    if box := re.fullmatch(r'(outside )?(\d+),(\d+),(\d+),(\d+)', re.sub(' *, *', ',', what.strip())):
        x0, y0, x1, y1 = map(int, box.groups()[1:])
        if not (x0 < x1 <= width and y0 < y1 <= height):
            raise UserError(f'hide={settings.hide!r}: a box is x0,y0,x1,y1 with x0 < x1 <= {width} and '
                            f'y0 < y1 <= {height}')
        pixels = np.full((len(ids[m.name]), height, width), bool(box[1]))
        pixels[:, y0:y1, x0:x1] ^= True
        return pixels
    if what.lower().endswith(ENDINGS):
        mask = read_picture(os.path.expanduser(what), 'black').convert('L')
        if not (pixels := squares(mask, min(mask.size), 1, None) > 127).any():  # (1, S, S), cropped as images are
            raise UserError(f"hide={settings.hide!r}: the mask's central square is empty: paint white what is changed")
        return pixels
    if 'segmentation' not in run.model.batch_keys or not hasattr(run.dataset, 'classes_named'):
        raise UserError(f'hide={settings.hide!r}: no box x0,y0,x1,y1 in whole pixels and no file {", ".join(ENDINGS)}; '
                        'this model has no segmentation that could find objects')
    if 'segmentation' in ids:
        classes = run.dataset.decode('segmentation', ids['segmentation'])
    else:
        chain = parse_chain(f'{",".join(ids)}>segmentation', settings, run.model)
        classes = generate(run, ids, chain, generator)[1]['segmentation']
    return np.isin(classes, run.dataset.classes_named(what))


def hide(run, settings, ids, generator):
    """The ids {name: (B, max_tokens)} without the part that settings.hide names: -1 there. Raises UserError."""
    name, _, what = settings.hide.partition('=')
    if name not in ids or not what:
        raise UserError(f'hide={settings.hide!r}: write NAME=WHAT, NAME one of what is given ({", ".join(ids)}), '
                        'WHAT a box x0,y0,x1,y1, "outside" and a box, objects, as "red cube"; of a text words, or how '
                        'many are kept')
    m = run.model.modality[name]
    if m.is_text:
        hidden = hidden_words(run, m, ids[name], what)
    else:
        pixels = hidden_pixels(run, settings, ids, m, what, generator)
        pixels = torch.from_numpy(pixels.astype(np.float32))[:, None]  # (B or 1, 1, H, W)
        hidden = F.adaptive_max_pool2d(pixels, m.grid).flatten(1) > 0  # (B or 1, max_tokens)
    return ids | {name: ids[name].masked_fill(hidden, -1)}


def given_ids(run, settings, chain, index, generator, own={}):
    """The ids that a chain starts from, {name: (B, max_tokens)}: the user's own, or those of held-out scenes; words are
    replaced, parts hidden. Raises UserError."""
    ids = {name: row.repeat(len(index), 1) for name, row in own.items()}
    ids = ids or {link.name: run.ids(link.name, index) for link in chain[0]}
    if settings.replace:
        texts = {m.name: ids[m.name] for m in run.model.modalities if m.is_text and m.name in ids}
        if not texts:
            raise UserError('replace needs a text among what is given')
        known = {name: run.dataset.decode(name, own[name]) if own else run.dataset.truth(run.split, name, slice(None))
                 for name in texts}
        ids |= replace_words(run, settings.replace, texts, known)
    if settings.hide:
        ids = hide(run, settings, ids, generator)
    if not ids:  # from nothing
        name = chain[1][0].name
        ids = {name: torch.full((len(index), run.model.modality[name].max_tokens), -1)}
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Images

def to_images(run, name, ids):
    """Ids (B, max_tokens) of a modality as images (H, W, 3)."""
    return [run.dataset.picture(name, one) for one in run.dataset.decode(name, ids)]


def given_images(run, name, ids, whole):
    """What is given of a modality as images: a text of the given ids (B, max_tokens), an image of the list `whole` with
    its hidden part grey."""
    m = run.model.modality[name]
    return to_images(run, name, ids) if m.is_text else list(lab.grey_out(np.stack(whole), ids, m.grid))


def columns_of(run, settings, chain, index):
    """Columns {title: images} of one chain: what is given, then the truth of each target beside what was generated."""
    for columns, texts in stream_columns(run, settings, chain, index):
        pass
    if len(index) <= 2 or settings.text or settings.image:
        print('\n'.join(f'{name}: {text}' for name, rows in texts.items() for text in dict.fromkeys(rows)))
    return columns


def stream_columns(run, settings, chain, index, every_step=False):
    """Yields the columns of a chain and its texts, {name: list}, while it runs: see lab.chains.stream."""
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    own = own_ids(run, settings, [link.name for link in chain[0]])
    ids = given_ids(run, settings, chain, index, generator, own)
    if settings.hide or settings.replace:
        whole = given_ids(run, replace(settings, hide='', replace=''), chain, index, generator, own)
        if all(torch.equal(ids[name], whole[name]) for name in ids):
            print(f'hide={settings.hide!r}, replace={settings.replace!r}: nothing of what is given changes: name what '
                  'these scenes have, or show others by --scene=')
    for found, raw in stream(run, ids, chain, generator, every_step):
        yield arrange(run, settings, chain, index, own, ids, found, raw)


def arrange(run, settings, chain, index, own, ids, found, raw):
    """Columns and texts of a chain that has come to the ids `found` and the values `raw`, from ids given."""
    columns, texts = {}, {}
    names, changed = [link.name for link in chain[0]], settings.replace or settings.hide
    targets = [link.name for link in chain[1]]
    for name in dict.fromkeys([*names, *(name for name in found if name in targets)]):
        truth = [] if own else [run.dataset.picture(name, one) for one in run.dataset.truth(run.split, name, index)]
        if truth and names and (name in targets or changed):
            columns[f'{name} (truth)'] = truth
        if name in names:
            whole = truth or to_images(run, name, own[name])
            plain = truth and not changed
            columns[f'{name} (given)'] = truth if plain else given_images(run, name, ids[name], whole)
        if name in raw:
            columns[name] = [run.dataset.picture(name, one) for one in raw[name]]
        elif name in targets:  # unfinished
            columns[name] = given_images(run, name, found[name], to_images(run, name, found[name].clamp(min=0)))
        if run.model.modality[name].is_text:
            texts[name] = raw[name] if name in raw else run.dataset.decode(name, found[name])
    return columns, texts


def open_index(run, *names):
    return retrieval.open_index(run.model, run.folder, run.path, *names, run.split)


def nearest_scenes(run, settings, index):
    """Columns: queries, held-out or the user's own, and the ten held-out scenes nearest to each. Raises UserError."""
    names, gallery = names_in(settings.given), settings.retrieve
    if (len(names) != 1 or {*names, gallery} - {*run.model.batch_keys} or gallery in names
            or settings.by not in retrieval.WAYS):
        raise UserError(f'retrieve={gallery!r} and given={settings.given!r}: one modality each, two different ones of '
                        f'{", ".join(run.model.batch_keys)}; by is one of {", ".join(retrieval.WAYS)}')
    ids = own_ids(run, settings, names).get(names[0], run.ids(names[0], index))
    pairs = open_index(run, names[0], gallery)
    nearest = retrieval.nearness(run.model, pairs, names[0], ids, settings.by).topk(min(10, pairs['n'])).indices.numpy()
    columns = {f'{names[0]} (query)': to_images(run, names[0], ids)}
    for i, column in enumerate(nearest.T):  # the nearest of all queries, then the second nearest
        truth = run.dataset.truth(run.split, gallery, column)
        columns[str(i + 1)] = [run.dataset.picture(gallery, one) for one in truth]
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yields scores, cell by cell: every modality from every other, or the chains named, each target's metrics with
    ceiling, baseline and shuffled condition; also the parser's own scores on true renders, and recall of retrieval."""
    options.apart(settings, 'chain', 'given', 'target')
    index, bounds = np.arange(min(settings.n_score, run.data().n)), {}
    for cell, chain in tqdm(cells_of(run, settings).items(), desc='score', unit='cell'):
        found, shuffled, milliseconds = score_chain(run, settings, chain, index)
        for name, metrics in found.items():
            if name not in bounds:
                bounds[name] = bounds_of(run, name, index)
                if name == 'rgb' and hasattr(type(run.dataset), 'parser'):  # the judge of images, itself judged
                    yield parser_scores(run, index)
            title = f'{cell}/' + f'{name}/' * (len(found) > 1)
            yield {f'{title}{key}': bootstrap(parts) | bounds[name][key]
                   | (dict(shuffled=bootstrap(shuffled[name][key], 1)['value']) if len(index) > 1 else {})
                   for key, parts in metrics.items()}
        yield {f'{cell}/ms a scene': alone(milliseconds, len(index))}
    every = not (settings.chain or settings.given or settings.target)
    if every and {'rgb', 'caption'} <= {*run.model.batch_keys} and settings.n_score >= retrieval.GALLERY:
        yield judged(retrieval.recalls(run.model, open_index(run, 'caption', 'rgb')))


def cells_of(run, settings):
    """{'a>b': chain} of all pairs, or of the chains that the settings name."""
    names = run.model.batch_keys
    if settings.chain:
        cells = settings.chain.split(';')
    else:
        sources, targets = names_in(settings.given) or names, names_in(settings.target) or names
        cells = [f'{a}>{b}' for b in targets for a in sources if a.partition(':')[0] != b.partition(':')[0]]
    if not cells:
        raise UserError(f'given={settings.given!r} and target={settings.target!r}: name two different modalities')
    return {cell: parse_chain(cell, settings, run.model, hidden_name(settings)) for cell in cells}


def score_chain(run, settings, chain, index):
    """{target: {metric: (n, k, 2)}} of the scenes with these indices, the same against the truth of other scenes (as if
    each had been generated from another scene's condition), and milliseconds a scene."""
    parts, shuffled, seconds = {}, {}, 0
    for part in np.array_split(index, max(1, len(index) // 250)):
        generator = torch.Generator(run.device).manual_seed(settings.seed)
        ids = given_ids(run, settings, chain, part, generator)
        started = time.perf_counter()
        _, raw = generate(run, ids, chain, generator)
        seconds += time.perf_counter() - started
        for name, values in raw.items():
            for rows_of, truth in (parts, part), (shuffled, np.roll(part, 1)):
                for key, rows in run.dataset.score(name, values, run.split, truth).items():
                    rows_of.setdefault(name, {}).setdefault(key, []).append(rows)
    found, shuffled = ({name: {key: np.concatenate(rows) for key, rows in metrics.items()}
                        for name, metrics in rows_of.items()} for rows_of in (parts, shuffled))
    return found, shuffled, 1000 * seconds / len(index)


def bounds_of(run, name, index):
    """{metric: dict(ceiling, baseline)}: what the true tokens reach (the tokenizer's reconstruction, or the text
    itself), and a predictor that sees nothing."""
    dataset, split = run.dataset, run.split
    ceiling = dataset.score(name, dataset.decode(name, run.ids(name, index)), split, index)
    baseline = dataset.score(name, dataset.baseline(name, split, index), split, index)
    return {key: dict(ceiling=bootstrap(ceiling[key], 1)['value'], baseline=bootstrap(baseline[key], 1)['value'])
            for key in ceiling}


def parser_scores(run, index):
    """What the parser, which reads objects back from generated images, finds in true ones."""
    found = run.dataset.score('rgb', run.dataset.truth(run.split, 'rgb', index), run.split, index)
    return {f'parser on true renders/{key}': bootstrap(parts) for key, parts in found.items()}
