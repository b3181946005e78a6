"""
The data set `scenes_align`: descriptions of the images of data/scenes, for stage 1 of chapter 5.

    python -m prepare.scenes_align       (train.py runs this if data/scenes_align is missing)

    Question: Describe the picture. Answer: row 3 column 1 large red metal sphere row 5 column 6 small blue rubber cube
    Question: Where are the small things? Answer: row 5 column 6

A description lists the objects from left to right: the cell of the object's center in a grid of 8x8, then its
attributes. After the cell, the model has to attend to one image token only, and learns the attributes sooner. The
second kind of question maps words to positions (pointing, as in Molmo, 2409.17146), the first step of each chain of
thought in scenes_qa. An answer in scenes_qa has 1 or 2 bits of information about the image, a description has 50. Each
of the 8x8 cells also has a label (patch_labels.npy), for models with one image token per cell. Vocabulary and held-out
images are those of prepare/scenes_qa.py.
"""
import numpy as np

import config
from prepare.arrays import load, write
from prepare.files import making
from prepare.scenes import COLOR_NAMES, MATERIALS, SHAPES, SIZES
from prepare.scenes_qa import Scene, begin, cell, cell_words, encoding_name, first_rows, has_new_pair, link, where
from prepare.vqa import Dataset, write_meta, write_questions, write_rows  # noqa: F401  (Dataset: for sample.py)

MAKES = 'data/scenes_align'
SETTINGS = dict(
    scenes='data/scenes',  # the scenes that are described
    out=MAKES,             # the data folder
    n_where=8,             # questions about positions after each description
    length=104,            # longest conversation, in tokens
    seed=0,
)
QUESTION = 'Describe the picture.'


def describe(objects, size):
    """Describe the objects (K, 6) of an image of `size` pixels as text."""
    return ' '.join(f'{cell_words(x, y, size)} {SIZES[z]} {COLOR_NAMES[c]} {MATERIALS[m]} {SHAPES[s]}'
                    for s, c, m, z, x, y in objects if s >= 0)


def patch_labels(objects, size, template):
    """Label each of 8x8 cells: objects (n, K, 6) -> ids (n, 64, 4), size, color, material and shape of the object whose
    center is in the cell, ' ground' if there is none. If two share a cell, the nearer one is the label."""
    ids = np.full((len(objects), 64, 4), -1, np.int16)
    word = template.encoding.encode_single_token
    ids[..., 0] = word(' ground')
    words = [[word(f' {name}') for name in group] for group in (SIZES, COLOR_NAMES, MATERIALS, SHAPES)]
    for scene, rows in zip(ids, objects.tolist()):
        for s, c, m, z, x, y in sorted(rows, key=lambda row: row[5]):  # the lower in the image, the nearer
            if s >= 0:
                scene[8 * cell(y, size) + cell(x, size)] = [group[i] for group, i in zip(words, (z, c, m, s))]
    return ids


@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out, scenes, template, size = begin(settings, 'scenes_align')
    for split, seed in (('val', 1), ('train', 0)):
        objects, random = load(scenes / split / 'raw_objects.npy'), np.random.default_rng((settings['seed'], 2, seed))
        index, turns = (~has_new_pair(objects)).nonzero()[0], []
        for i in index:
            scene = Scene(objects[i], random, size)
            points = [where(scene) for _ in range(settings['n_where'])]
            turns.append([(QUESTION, describe(objects[i].tolist(), size)), *points])
        write_rows(out / split, first_rows(template, turns, settings['length']), index.astype(np.int32))
        write(out / split, dict(patch_labels=patch_labels(objects[index], size, template)))
        families = [['describe', *['where'] * settings['n_where']]] * len(index)
        write_questions(out / split / 'questions.jsonl', index.tolist(), turns, families)
    write_meta(out, template, encoding_name(out), settings['length'], size, 1, 'scenes_align', settings,
               link(scenes, out), n_patch_labels=64, max_label_tokens=4)


if __name__ == '__main__':
    config.run(main)
