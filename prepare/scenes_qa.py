"""
The data set `scenes_qa`: questions and answers about the pictures of data/scenes, made from the scenes' ground truth.

    python -m prepare.scenes_qa          (train.py runs it by itself when data/scenes_qa is missing)
    python -m prepare.scenes_qa --scenes=data/scenes_small --out=data/scenes_small_qa

    exist         Are there any large cubes?                              yes, no
    count         How many metal things are there?                        0 to 5
    query         What color is the small cube?                           a color, shape, material or size
    compare       Do the red cube and the sphere have the same size?      yes, no
    number        Are there more cubes than red things?                   yes, no
    relation      Is the red cube left of the small sphere?               yes, no
    hop           What material is the cube behind the red sphere?        as query; Are there any cubes behind it? yes, no

These are CLEVR's families (Johnson et al., 1612.06890). No prior is to help: of several random questions the one is asked whose
answer was heard least so far in questions of its kind. A scene's questions make one conversation, which shows the picture once;
pictures are not copied but read from data/scenes.

Before it answers, the model says what it looks at, cell by cell of 8x8, and what it finds there: a thought of a few words, by
which a question of several steps becomes several easy ones (chain of thought, Wei et al., 2201.11903; counting by pointing, as in
Molmo, 2409.17146). Only the answer is scored.

    Question: Is the red cube left of the small sphere? row 3 column 1 row 5 column 6 Answer: yes
    Question: Are there more cubes than red things? row 3 column 1 row 2 column 5 2 row 3 column 1 1 Answer: yes

Some pairs of color and shape (HELD_OUT) are in no training picture, as in CLEVR-CoGenT: val/questions.jsonl asks about pictures
without them, val/new_pairs.jsonl about pictures with them.
"""
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from prepare.arrays import load
from prepare.scenes import COLOR_NAMES, MATERIALS, NAMES, SHAPES, SIZES
from prepare.text_tokenizers import save_words
from prepare.vqa import Fields, template, write_meta, write_questions, write_rows  # noqa: F401  (Fields: for sample.py)

MAKES = 'data/scenes_qa'
SETTINGS = dict(
    scenes='data/scenes',  # the scenes that are asked about
    out=MAKES,             # the data folder
    n_turns=12,            # questions about each training scene, at most
    length=160,            # longest conversation, in tokens
    seed=0,
)
HELD_OUT = (('purple', 'cube'), ('cyan', 'sphere'), ('yellow', 'cylinder'))
SHAPE, COLOR, MATERIAL, SIZE = range(4)  # the columns of raw_objects, before x and y
ATTRIBUTES = tuple(NAMES)
WORDS = tuple(NAMES.values())
# what a question may say of an object: each attribute, or -1 for silence; how many attributes it names, and which, is its kind
FILTERS = np.array([(s, c, m, z) for s in range(-1, len(SHAPES)) for c in range(-1, len(COLOR_NAMES))
                    for m in range(-1, len(MATERIALS)) for z in range(-1, len(SIZES))])
KINDS = (FILTERS >= 0) @ [1, 2, 4, 8]
SIDES = {' left of the': (4, -1), ' right of the': (4, 1), ' in front of the': (5, 1), ' behind the': (5, -1)}  # column, sign
MARGIN = 3  # pixels by which two objects differ before one is said to be left of or behind the other


# ---------------------------------------------------------------------------------------------------------------------
# English

def phrase(f, plural=False, noun='thing'):
    """' large red metal cubes' for the filter with this number."""
    shape, color, material, size = FILTERS[f]
    words = [words[i] for words, i in ((SIZES, size), (COLOR_NAMES, color), (MATERIALS, material)) if i >= 0]
    return ' ' + ' '.join([*words, (SHAPES[shape] if shape >= 0 else noun) + 's' * plural])


def vocabulary():
    """The closed vocabulary: phrases where the grammar leaves no choice, so that a question has few tokens; for captions too."""
    nouns = [*SHAPES, 'thing', 'object']
    cells = [f' {axis} {i}' for axis in ('row', 'column') for i in range(8)]
    words = [*nouns, *(f'{noun}s' for noun in nouns), *SIZES, *COLOR_NAMES, *MATERIALS, 'yes', 'no', *'012345', 'ground',
             'nowhere', 'the', 'and', 'than', 'as', *ATTRIBUTES]
    return [f' {word}' for word in words] + cells + [
        *SIDES, ' Question:', ' Answer:', ' Are there any', ' Do you see any', ' How many', ' What number of', ' are there?',
        ' do you see?', ' What', ' is the', ' What is the', ' of the', ' Do the', ' have the same', ' Are the', ' of the same',
        ' Are there more', ' Are there fewer', ' Are there as many', ' Is the', ' to the', ' Describe the picture.',
        ' Where are the']


# ---------------------------------------------------------------------------------------------------------------------
# Families: each draws a random question about a scene, as (kind, question, thought, answer), or None where it finds none

class Scene:
    """One scene's objects (K, 6) in a picture of `size` pixels, and for each filter which and how many of them it fits."""
    def __init__(self, objects, random, size):
        self.objects, self.size = objects[objects[:, 0] >= 0], size
        self.fits = ((FILTERS[:, None] == self.objects[None, :, :4]) | (FILTERS[:, None] < 0)).all(-1)  # (filters, K)
        self.count, self.random = self.fits.sum(1), random
        self.names = [{} for _ in self.objects]  # of each object: kind -> filters that fit it alone
        for f in (self.count == 1).nonzero()[0].tolist():
            self.names[self.fits[f].argmax()].setdefault(KINDS[f], []).append(f)

    def choose(self, options):
        """One of a list or an array; None where it is empty."""
        return options[int(self.random.random() * len(options))] if len(options) else None

    def the(self, silent=None, other=None):
        """A filter that fits one object alone and is silent about one attribute, and the object; (None, None) without any."""
        k = self.choose([k for k in range(len(self.objects)) if k != other])
        kind = self.choose([kind for kind in self.names[k] if silent is None or not kind >> silent & 1])
        return (None, None) if kind is None else (self.choose(self.names[k][kind]), k)

    def beside(self, side, k):
        """Which objects (K,) lie on this side of object k; None where one is too near to tell."""
        column, sign = SIDES[side]
        gap = sign * (self.objects[:, column] - self.objects[k, column])
        return None if (np.abs(np.delete(gap, k)) < MARGIN).any() else gap > 0

    def noun(self):
        return self.choose(('thing', 'object'))

    def places(self, chosen):
        """Where these objects are, a mask (K,) or their numbers: 'row 3 column 1 row 5 column 6', 'nowhere'."""
        return ' '.join(place(x, y, self.size) for x, y in self.objects[chosen, 4:].tolist()) or 'nowhere'


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
        return a, f'{text} {ATTRIBUTES[a]}?', f'{scene.places([i])} {u} {scene.places([j])} {v}', 'yes' if u == v else 'no'


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
    here = (scene.fits & beside).sum(1)  # (filters,) how many of those beside it fit
    if a is None:  # no: one that is elsewhere in the picture
        wanted = here > 0 if scene.random.random() < 0.5 else (here == 0) & (scene.count > scene.fits[:, j])
        f = scene.choose(wanted.nonzero()[0])
        thought = None if f is None else f'{scene.places([j])} {scene.places(scene.fits[f] & beside)}'
        return thought and (KINDS[f], f' Are there any{phrase(f, True)}{side}{phrase(g)}?', thought, 'yes' if here[f] else 'no')
    f = scene.choose(((here == 1) & (FILTERS[:, a] < 0)).nonzero()[0])
    if f is not None:
        k = (scene.fits[f] & beside).argmax()
        text = ask_attribute(scene, a, f'{phrase(f)}{side}{phrase(g)}')
        return a, text, scene.places([j, k]), WORDS[a][scene.objects[k, a]]


def cell(place, size):
    return min(max(8 * place // size, 0), 7)


def place(x, y, size):
    """Pixels of a picture of `size` pixels -> the words for one of 8x8 cells."""
    return f'row {cell(y, size)} column {cell(x, size)}'


def where(scene):
    """A question about the places of all objects that some words fit, and its answer."""
    wanted = scene.count > 0 if scene.random.random() < 0.85 else scene.count == 0
    f = scene.choose((wanted & (KINDS == scene.choose(KINDS[wanted]))).nonzero()[0])
    return f'Where are the{phrase(f, True, scene.noun())}?', scene.places(scene.fits[f])


FAMILIES = dict(exist=exist, count=count, query=query, compare=compare, number=number, relation=relation, hop=hop)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def converse(scene, heard, n_turns, tries=8):
    """n_turns questions about a scene: [(family, question, answer, thought), ...]. heard: how often each answer was given, a
    Counter a (family, kind), which this goes on with; of several questions the one with the rarest answer is asked, and none
    whose answer is ahead of its opposite."""
    turns, asked = [], set()
    families = [name for _ in range(1 + n_turns // len(FAMILIES)) for name in scene.random.permutation(list(FAMILIES)).tolist()]
    for family in families * 2:
        found = [one for one in (FAMILIES[family](scene) for _ in range(tries)) if one]
        found = [(lead(heard.setdefault((family, kind), Counter()), answer), i, kind, question, thought, answer)
                 for i, (kind, question, thought, answer) in enumerate(found) if question not in asked]
        if found:
            ahead, _, kind, question, thought, answer = min(found)
            if ahead <= 5 or answer not in ('yes', 'no'):
                heard[family, kind][answer] += 1
                asked.add(question)
                turns.append((family, question.strip(), answer, thought))
        if len(turns) == n_turns:
            break
    return turns


def lead(heard, answer):
    """By how much an answer was heard more often than the mean, or than its opposite."""
    if answer in ('yes', 'no'):
        return heard[answer] - heard['no' if answer == 'yes' else 'yes']
    return heard[answer] - sum(heard.values()) / max(1, len(heard))


def has_new_pair(objects):
    """Which scenes (n,) of objects (n, K, 6) show a pair of color and shape that is held out."""
    return np.any([((objects[..., COLOR] == COLOR_NAMES.index(color)) & (objects[..., SHAPE] == SHAPES.index(shape))).any(1)
                   for color, shape in HELD_OUT], 0)


def encoding_name(out):
    """The name of the vocabulary in a folder: runs on data with the same one can start from each other."""
    return 'scenes-' + hashlib.sha256((out / 'words.json').read_bytes()).hexdigest()[:8]


def link(scenes, out):
    """The path of the pictures of one folder as seen from a split of another."""
    return f'../../{os.path.relpath(scenes.resolve(), out.resolve().parent)}/{{split}}/raw_rgb'


def write_split(out, way, objects, index, name, random, settings, size):
    """Conversations about the scenes with these numbers: NAME.jsonl, and the rows that train.py reads."""
    heard = {}
    talks = [converse(Scene(objects[i], random, size), heard, settings['n_turns']) for i in tqdm(index, desc=name, unit='scene')]
    if name != 'new_pairs':
        rows = [next(iter(way.rows([turn[1:] for turn in talk], settings['length'])), None) for talk in talks]
        write_rows(out, rows, index.astype(np.int32))
    write_questions(out / f'{name}.jsonl', index.tolist(), [[turn[1:3] for turn in talk] for talk in talks],
                    [[turn[0] for turn in talk] for talk in talks])


def begin(settings, thinks=False):
    """The folder of conversations with its vocabulary, the folder of scenes, the template, the pixels of a picture's side."""
    out, scenes = Path(settings['out']), Path(settings['scenes'])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'meta.json').unlink(missing_ok=True)
    save_words(out / 'words.json', vocabulary())
    return out, scenes, template('', out, thinks), load(scenes / 'val' / 'raw_rgb.npy').shape[1]


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out, scenes, way, size = begin(settings, thinks=True)
    for split, seed in (('val', 1), ('train', 0)):
        objects, random = load(scenes / split / 'raw_objects.npy'), np.random.default_rng((settings['seed'], seed))
        new = has_new_pair(objects)
        write_split(out / split, way, objects, (~new).nonzero()[0], 'questions', random, settings, size)
        if split == 'val':
            write_split(out / split, way, objects, new.nonzero()[0], 'new_pairs', random, settings, size)
    write_meta(out, way, encoding_name(out), settings['length'], size, 1, 'scenes_qa', settings, link(scenes, out))


if __name__ == '__main__':
    config.run(main)
