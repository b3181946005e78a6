"""
The data set `scenes_align`: descriptions of the pictures of data/scenes, from which the eyes of chapter 5 learn to see.

    python -m prepare.scenes_align       (train.py runs it by itself when data/scenes_align is missing)

    Question: Describe the picture. Answer: row 3 column 1 large red metal sphere row 5 column 6 small blue rubber cube
    Question: Where are the small things? Answer: row 5 column 6

From left to right, where each object's middle is, in cells of 8x8 to a picture, then what it is: the place comes first, since
who knows where to look learns soon what is there. The other way round, from words to places (pointing, as in Molmo, 2409.17146),
is what every later question begins with. An answer to such a question tells one bit or two of a picture, a description 50.
Beside the text each of the 8x8 cells has a name (names.npy), for models with a token a cell. The vocabulary, and the pictures
that are held out, are those of prepare/scenes_qa.py.
"""
import numpy as np

import config
from prepare.arrays import load
from prepare.scenes import COLOR_NAMES, MATERIALS, SHAPES, SIZES
from prepare.scenes_qa import Scene, begin, cell, encoding_name, has_new_pair, link, place, where
from prepare.vqa import Fields, write_meta, write_questions, write_rows  # noqa: F401  (Fields: for sample.py)

MAKES = 'data/scenes_align'
SETTINGS = dict(
    scenes='data/scenes',  # the scenes that are described
    out=MAKES,             # the data folder
    n_where=8,             # questions about positions beside each description
    length=104,            # longest conversation, in tokens
    seed=0,
)
QUESTION = 'Describe the picture.'


def describe(objects, size):
    """Objects (K, 6) of a picture of `size` pixels -> text."""
    return ' '.join(f'{place(x, y, size)} {SIZES[z]} {COLOR_NAMES[c]} {MATERIALS[m]} {SHAPES[s]}'
                    for s, c, m, z, x, y in objects if s >= 0)


def names(objects, size, way):
    """Objects (n, K, 6) -> (n, 64, 4) ids, a name for each of 8x8 cells: size, color, material and shape where an object has its
    middle, elsewhere ' ground'. Where two share a cell the nearer one is named."""
    ids = np.full((len(objects), 64, 4), -1, np.int16)
    word = way.encoding.encode_single_token
    ids[..., 0] = word(' ground')
    words = [[word(f' {name}') for name in group] for group in (SIZES, COLOR_NAMES, MATERIALS, SHAPES)]
    for scene, rows in zip(ids, objects.tolist()):
        for s, c, m, z, x, y in sorted(rows, key=lambda row: row[5]):  # the lower in the picture, the nearer
            if s >= 0:
                scene[8 * cell(y, size) + cell(x, size)] = [group[i] for group, i in zip(words, (z, c, m, s))]
    return ids


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out, scenes, way, size = begin(settings)
    for split, seed in (('val', 1), ('train', 0)):
        objects, random = load(scenes / split / 'raw_objects.npy'), np.random.default_rng((settings['seed'], 2, seed))
        index, turns = (~has_new_pair(objects)).nonzero()[0], []
        for i in index:
            scene = Scene(objects[i], random, size)
            points = [where(scene) for _ in range(settings['n_where'])]
            turns.append([(QUESTION, describe(objects[i].tolist(), size)), *points])
        write_rows(out / split, [next(iter(way.rows(turn, settings['length'])), None) for turn in turns], index.astype(np.int32))
        np.save(out / split / 'names.npy', names(objects[index], size, way))
        families = [['describe', *['where'] * settings['n_where']]] * len(index)
        write_questions(out / split / 'questions.jsonl', index.tolist(), turns, families)
    write_meta(out, way, encoding_name(out), settings['length'], size, 1, 'scenes_align', settings, link(scenes, out),
               n_named=64, n_names=4)


if __name__ == '__main__':
    config.run(main)
