"""
The data set `scenes_qa`: questions and answers about the images of data/scenes, made from the scenes' ground truth.

    python -m prepare.scenes_qa          (train.py runs this if data/scenes_qa is missing)
    python -m prepare.scenes_qa --scenes=data/scenes_small --out=data/scenes_small_qa

    exist         Are there any large cubes?                           yes, no
    count         How many metal things are there?                     0 to 5
    query         What color is the small cube?                        a color, shape, material or size
    compare       Do the red cube and the sphere have the same size?   yes, no
    number        Are there more cubes than red things?                yes, no
    relation      Is the red cube left of the small sphere?            yes, no
    hop           What material is the cube behind the red sphere?     as query; Are there any cubes behind it? yes, no

These are CLEVR's families (Johnson et al., 1612.06890). Answers are balanced, so that a model without the image does no
better than chance: of several random questions, the one whose answer is the rarest so far for its kind is taken. The
questions about a scene are one conversation with one image. Images are not copied but read from data/scenes.

A chain of thought precedes each answer (Wei et al., 2201.11903): the cell, in a grid of 8x8, of each object that the
question is about, and its attributes if needed. A question of several steps thus becomes several simple predictions
(counting by pointing, as in Molmo, 2409.17146). Only the answer is scored.

    Question: Is the red cube left of the small sphere? row 3 column 1 row 5 column 6 Answer: yes
    Question: Are there more cubes than red things? row 3 column 1 row 2 column 5 2 row 3 column 1 1 Answer: yes

No training image has the pairs of color and shape in HELD_OUT, as in CLEVR-CoGenT: val/questions.jsonl is about images
without them, val/new_pairs.jsonl about images with them.
"""
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from config import UserError
from prepare import arrays
from prepare.arrays import load, read_meta
from prepare.files import making
from prepare.scenes import COLOR_NAMES, MATERIALS, NAMES, SHAPES, SIZES
from prepare.text_tokenizers import save_words
from prepare.vqa import Dataset, load_template, write_meta, write_questions, write_rows  # noqa: F401  (Dataset: lab)

MAKES = 'data/scenes_qa'
SETTINGS = dict(
    scenes='data/scenes',  # the scenes that the questions are about
    out=MAKES,             # the data folder
    n_turns=12,            # questions about each training scene, at most
    length=160,            # longest conversation, in tokens
    seed=0,
)
HELD_OUT = (('purple', 'cube'), ('cyan', 'sphere'), ('yellow', 'cylinder'))
SHAPE, COLOR, MATERIAL, SIZE = range(4)  # the columns of raw_objects, before x and y
ATTRIBUTES = tuple(NAMES)
WORDS = tuple(NAMES.values())
# filters: the attributes of an object that a question gives, -1 if not given; the kind is which attributes are given
FILTERS = np.array([(s, c, m, z) for s in range(-1, len(SHAPES)) for c in range(-1, len(COLOR_NAMES))
                    for m in range(-1, len(MATERIALS)) for z in range(-1, len(SIZES))])
KINDS = (FILTERS >= 0) @ [1, 2, 4, 8]
SIDES = {  # column, sign
    ' left of the': (4, -1), ' right of the': (4, 1), ' in front of the': (5, 1), ' behind the': (5, -1)}
MARGIN = 3  # pixels by which two objects must differ for left of, right of, in front of and behind


# ---------------------------------------------------------------------------------------------------------------------
# English

def phrase(f, plural=False, noun='thing'):
    """Return ' large red metal cubes' for the filter with this number."""
    shape, color, material, size = FILTERS[f]
    words = [words[i] for words, i in ((SIZES, size), (COLOR_NAMES, color), (MATERIALS, material)) if i >= 0]
    return ' ' + ' '.join([*words, (SHAPES[shape] if shape >= 0 else noun) + 's' * plural])


def vocabulary():
    """Return the closed vocabulary; phrases that the grammar fixes are one token, so that questions are short."""
    nouns = [*SHAPES, 'thing', 'object']
    cells = [f' {axis} {i}' for axis in ('row', 'column') for i in range(8)]
    words = [*nouns, *(f'{noun}s' for noun in nouns), *SIZES, *COLOR_NAMES, *MATERIALS, 'yes', 'no', *'012345',
             'ground', 'nowhere', 'the', 'and', 'than', 'as', *ATTRIBUTES]
    return [f' {word}' for word in words] + cells + [
        *SIDES, ' Question:', ' Answer:', ' Are there any', ' Do you see any', ' How many', ' What number of',
        ' are there?', ' do you see?', ' What', ' is the', ' What is the', ' of the', ' Do the', ' have the same',
        ' Are the', ' of the same', ' Are there more', ' Are there fewer', ' Are there as many', ' Is the', ' to the',
        ' Describe the picture.', ' Where are the']


# ---------------------------------------------------------------------------------------------------------------------
# Families: each returns a random question about a scene, (kind, question, thought, answer), or None if it finds none

class Scene:
    """One scene's objects (K, 6) in an image of `size` pixels, and which and how many of them each filter matches."""
    def __init__(self, objects, random, size):
        self.objects, self.size = objects[objects[:, 0] >= 0], size
        self.fits = ((FILTERS[:, None] == self.objects[None, :, :4]) | (FILTERS[:, None] < 0)).all(-1)  # (filters, K)
        self.count, self.random = self.fits.sum(1), random
        self.names = [{} for _ in self.objects]  # of each object: kind -> filters that match it alone
        for f in (self.count == 1).nonzero()[0].tolist():
            self.names[self.fits[f].argmax()].setdefault(KINDS[f], []).append(f)

    def choose(self, options):
        """Return a random element of a list or an array; None if it is empty."""
        return options[int(self.random.random() * len(options))] if len(options) else None

    def the(self, silent=None, other=None):
        """Return a filter that matches one object only, without attribute `silent`, and the object; or (None, None)."""
        k = self.choose([k for k in range(len(self.objects)) if k != other])
        kind = self.choose([kind for kind in self.names[k] if silent is None or not kind >> silent & 1])
        return (None, None) if kind is None else (self.choose(self.names[k][kind]), k)

    def beside(self, side, k):
        """Return which objects (K,) are on this side of object k; None if one is too near to decide."""
        column, sign = SIDES[side]
        gap = sign * (self.objects[:, column] - self.objects[k, column])
        return None if (np.abs(np.delete(gap, k)) < MARGIN).any() else gap > 0

    def noun(self):
        return self.choose(('thing', 'object'))

    def places(self, chosen):
        """Return the cells of these objects, a mask (K,) or numbers: 'row 3 column 1 row 5 column 6', or 'nowhere'."""
        return ' '.join(cell_words(x, y, self.size) for x, y in self.objects[chosen, 4:].tolist()) or 'nowhere'


def exist(scene):
    kind = scene.choose(KINDS[1:])
    same, answer = KINDS == kind, scene.random.random() < 0.5
    yes, no = (same & (scene.count > 0)).nonzero()[0], (same & (scene.count == 0)).nonzero()[0]
    if len(yes) and len(no):
        start = scene.choose((' Are there any', ' Do you see any'))
        f = scene.choose(yes if answer else no)
        text = f'{start}{phrase(f, True, scene.noun())}?'
        return kind, text, scene.places(scene.fits[f]), 'yes' if answer else 'no'


def count(scene):
    n = scene.choose(range(6))
    fine = (scene.count == n).nonzero()[0]
    fine = fine[KINDS[fine] == scene.choose(KINDS[fine])] if len(fine) else fine
    if len(fine):
        start = scene.choose((' How many', ' How many', ' What number of'))
        end = scene.choose((' are there?', ' do you see?'))
        f = scene.choose(fine)
        return '', f'{start}{phrase(f, True, scene.noun())}{end}', scene.places(scene.fits[f]), str(n)


def ask_attribute(scene, a, subject):
    return scene.choose((f' What {ATTRIBUTES[a]} is the{subject}?', f' What is the {ATTRIBUTES[a]} of the{subject}?'))


def query(scene):
    a = scene.choose(range(4))
    f, k = scene.the(silent=a)
    if f is not None:
        text = ask_attribute(scene, a, phrase(f, noun=scene.noun()))
        return a, text, scene.places([k]), WORDS[a][scene.objects[k, a]]


def compare(scene):
    a = scene.choose(range(4))
    (f, i), (g, j) = scene.the(silent=a), (None, None)
    if f is not None:
        g, j = scene.the(silent=a, other=i)
    if g is not None:
        one, two = (phrase(x, noun=scene.noun()) for x in (f, g))
        text = scene.choose((f' Do the{one} and the{two} have the same', f' Are the{one} and the{two} of the same'))
        u, v = (WORDS[a][scene.objects[k, a]] for k in (i, j))
        thought = f'{scene.places([i])} {u} {scene.places([j])} {v}'
        return a, f'{text} {ATTRIBUTES[a]}?', thought, 'yes' if u == v else 'no'


def number(scene):
    kind = scene.choose((1, 2, 4, 8, 1, 2, 4, 8, 3, 5, 9))  # one attribute, or the shape and another one
    fine = ((KINDS == kind) | (KINDS == scene.choose((1, 4, 8)))).nonzero()[0]
    f, g = scene.choose(fine), scene.choose(fine)
    a, b = scene.count[f], scene.count[g]
    if f != g and a + b:
        word, holds = scene.choose(((' more', a > b), (' fewer', a < b), (' as many', a == b)))
        link = ' as' if word == ' as many' else ' than'
        thought = ' '.join(f'{scene.places(scene.fits[x])} {scene.count[x]}' for x in (f, g))
        return word, f' Are there{word}{phrase(f, True)}{link}{phrase(g, True)}?', thought, 'yes' if holds else 'no'


def relation(scene):
    f, i = scene.the()
    g, j = scene.the(other=i)
    side = scene.choose(list(SIDES))
    beside = None if f is None or g is None else scene.beside(side, j)
    if beside is not None:
        text = f' Is the{phrase(f, noun=scene.noun())}{side}{phrase(g, noun=scene.noun())}?'
        return side, text, scene.places([i, j]), 'yes' if beside[i] else 'no'


def hop(scene):
    g, j = scene.the()
    side, a = scene.choose(list(SIDES)), scene.choose((*range(4), None, None))
    beside = None if g is None else scene.beside(side, j)
    if beside is None:
        return None
    here = (scene.fits & beside).sum(1)  # (filters,) number of matching objects beside it
    if a is None:  # for 'no', one that is elsewhere in the image
        wanted = here > 0 if scene.random.random() < 0.5 else (here == 0) & (scene.count > scene.fits[:, j])
        f = scene.choose(wanted.nonzero()[0])
        if f is None:
            return None
        thought = f'{scene.places([j])} {scene.places(scene.fits[f] & beside)}'
        return KINDS[f], f' Are there any{phrase(f, True)}{side}{phrase(g)}?', thought, 'yes' if here[f] else 'no'
    f = scene.choose(((here == 1) & (FILTERS[:, a] < 0)).nonzero()[0])
    if f is not None:
        k = (scene.fits[f] & beside).argmax()
        text = ask_attribute(scene, a, f'{phrase(f)}{side}{phrase(g)}')
        return a, text, scene.places([j, k]), WORDS[a][scene.objects[k, a]]


def cell(pixel, size):
    return min(max(8 * pixel // size, 0), 7)


def cell_words(x, y, size):
    """Return the words for the cell, in a grid of 8x8, of a pixel in an image of `size` pixels."""
    return f'row {cell(y, size)} column {cell(x, size)}'


def where(scene):
    """Return a question about the positions of all objects that match a filter, and its answer."""
    wanted = scene.count > 0 if scene.random.random() < 0.85 else scene.count == 0
    f = scene.choose((wanted & (KINDS == scene.choose(KINDS[wanted]))).nonzero()[0])
    return f'Where are the{phrase(f, True, scene.noun())}?', scene.places(scene.fits[f])


FAMILIES = dict(exist=exist, count=count, query=query, compare=compare, number=number, relation=relation, hop=hop)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def converse(scene, answer_counts, n_turns, tries=8):
    """Return n_turns questions about a scene, [(family, question, answer, thought), ...]. answer_counts, a Counter per
    (family, kind), is read and updated: of several questions the one with the rarest answer so far is taken, and none
    whose answer is much more frequent than its opposite."""
    turns, asked = [], set()
    rounds = range(1 + n_turns // len(FAMILIES))
    families = [name for _ in rounds for name in scene.random.permutation(list(FAMILIES)).tolist()]
    for family in families * 2:
        found = [one for one in (FAMILIES[family](scene) for _ in range(tries)) if one]
        found = [(lead(answer_counts.setdefault((family, kind), Counter()), answer), i, kind, question, thought, answer)
                 for i, (kind, question, thought, answer) in enumerate(found) if question not in asked]
        if found:
            ahead, _, kind, question, thought, answer = min(found)
            if ahead <= 5 or answer not in ('yes', 'no'):
                answer_counts[family, kind][answer] += 1
                asked.add(question)
                turns.append((family, question.strip(), answer, thought))
        if len(turns) == n_turns:
            break
    return turns


def lead(answer_counts, answer):
    """Return by how much an answer is more frequent than the mean, or than its opposite."""
    if answer in ('yes', 'no'):
        return answer_counts[answer] - answer_counts['no' if answer == 'yes' else 'yes']
    return answer_counts[answer] - sum(answer_counts.values()) / max(1, len(answer_counts))


def has_new_pair(objects):
    """Return which scenes (n,) of objects (n, K, 6) have a held-out pair of color and shape."""
    colors, shapes = objects[..., COLOR], objects[..., SHAPE]  # (n, K)
    return np.any([((colors == COLOR_NAMES.index(color)) & (shapes == SHAPES.index(shape))).any(1)
                   for color, shape in HELD_OUT], 0)


def encoding_name(out):
    """Return the name of a folder's vocabulary: runs on data with the same name can start from each other."""
    return 'scenes-' + hashlib.sha256((out / 'words.json').read_bytes()).hexdigest()[:8]


def link(scenes, out):
    """Return the path of one folder's images relative to a split of another folder. Raises UserError."""
    try:
        scenes = Path(os.path.relpath(scenes.resolve(), out.resolve().parent)).as_posix()  # on Windows, too
    except ValueError:
        raise UserError(f'{out} refers to {scenes}: choose an --out= on the same drive')
    return f'../../{scenes}/{{split}}/raw_rgb'


def first_rows(template, talks, length):
    """Return the first row of each conversation, None if no turn fits."""
    return [next(iter(template.rows(turns, length)), None) for turns in talks]


def write_split(out, template, objects, index, name, random, settings, size):
    """Write conversations about the scenes with these numbers: NAME.jsonl, and the rows that train.py reads."""
    answer_counts = {}
    talks = [converse(Scene(objects[i], random, size), answer_counts, settings['n_turns'])
             for i in tqdm(index, desc=name, unit='scene')]
    if name != 'new_pairs':
        rows = first_rows(template, [[turn[1:] for turn in talk] for talk in talks], settings['length'])
        write_rows(out, rows, index.astype(np.int32))
    write_questions(out / f'{name}.jsonl', index.tolist(), [[turn[1:3] for turn in talk] for talk in talks],
                    [[turn[0] for turn in talk] for talk in talks])


def begin(settings, prepare, thinks=False):
    """Return the folder of conversations, with a vocabulary in it, the folder of scenes, template and image size."""
    out, scenes = Path(settings['out']), Path(settings['scenes'])
    size = load(scenes / 'val' / 'raw_rgb.npy').shape[1]
    read_meta(scenes)  # complete
    link(scenes, out)  # possible
    arrays.begin(out, prepare)
    save_words(out / 'words.json', vocabulary())
    return out, scenes, load_template('', out, thinks), size


@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out, scenes, template, size = begin(settings, 'scenes_qa', thinks=True)
    for split, seed in (('val', 1), ('train', 0)):
        objects, random = load(scenes / split / 'raw_objects.npy'), np.random.default_rng((settings['seed'], seed))
        new = has_new_pair(objects)
        write_split(out / split, template, objects, (~new).nonzero()[0], 'questions', random, settings, size)
        if split == 'val':
            write_split(out / split, template, objects, new.nonzero()[0], 'new_pairs', random, settings, size)
    write_meta(out, template, encoding_name(out), settings['length'], size, 1, 'scenes_qa', settings, link(scenes, out))


if __name__ == '__main__':
    config.run(main)
