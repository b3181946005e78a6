"""
Scores of generated modalities of scenes. Every metric is a sum of numerators over a sum of denominators, (n, k, 2) for
n samples and k classes.
"""
import numpy as np

from prepare.scenes_numbers import NUMBERS
from prepare.scenes_render import COLORS, SHAPES


def match(agree):
    """Aligns two lists of objects, both from left to right, with the largest total agreement, agree (a, b). Returns
    the agreement of each pair (a,), 0 for a true object without a partner."""
    a, b = agree.shape
    best = np.zeros((a + 1, b + 1))  # dynamic programming, as for the longest common subsequence
    for i in range(a):
        for j in range(b):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + agree[i, j])
    pairs, i, j = [0] * a, a, b
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs[i] = agree[i, j]
    return np.array(pairs)


def score_objects(truths, founds):
    """Fraction of attributes that are correct (missing and surplus objects count as wrong), of objects with all
    attributes correct, of scenes with exactly the true objects. An attribute that the field does not contain (size in
    scene_desc) is left out."""
    rows, known = [], 3 + any((found[:, 3] >= 0).any() for found in founds)
    for truth, found in zip(truths, founds):
        truth, found = truth[truth[:, 0] >= 0, :4], found[:, :4]
        truth, found = truth[:, :known], found[:, :known]
        right = match(((truth[:, None] == found) & (found >= 0)).sum(-1))
        most = max(len(truth), len(found))
        exact = len(truth) == len(found) and (right == known).all()
        rows.append([[right.sum(), known * most], [(right == known).sum(), most], [exact, most > 0]])
    rows = np.array(rows, float)
    return dict(attributes=rows[:, 0:1], objects=rows[:, 1:2], scenes=rows[:, 2:3])


def score_boxes(truths, founds):
    """Intersection over union (IoU) with the true box, for tables (K, 5) of shapes and box edges, and the fraction of
    boxes with IoU >= 0.5. IoU is 0 if the shape differs. Missing and surplus boxes count as wrong."""
    rows = []
    for truth, found in zip(truths, founds):
        low, high = np.maximum(truth[:, None, 1:3], found[:, 1:3]), np.minimum(truth[:, None, 3:], found[:, 3:])
        both = (high - low + 1).clip(0).prod(-1)  # (a, b)
        a, b = ((box[:, 3:] - box[:, 1:3] + 1).clip(0).prod(-1) for box in (truth, found))
        iou = match(both / (a[:, None] + b - both) * (truth[:, None, 0] == found[:, 0]))
        rows.append([[iou.sum(), max(len(a), len(b))], [(iou >= 0.5).sum(), max(len(a), len(b))]])
    rows = np.array(rows, float)
    return dict(iou=rows[:, :1], found=rows[:, 1:])


def score_numbers(name, truths, founds):
    """The mean absolute error of each column of tables of one row; a missing number counts as 0."""
    found = [table[0] if len(table) else np.zeros(len(NUMBERS[name][1])) for table in founds]
    error = np.abs(np.concatenate(truths) - np.stack(found)).astype(float)
    parts = np.stack((error, np.ones_like(error)), -1)  # (n, columns, 2)
    return {f'{column}_error': parts[:, i:i + 1] for i, column in enumerate(NUMBERS[name][1])}


def over_pixels(error, mask):
    """The numerator and denominator (n, 1, 2) of a mean over the pixels of a mask, both (n, H, W)."""
    return np.stack(((error * mask).sum((1, 2)), mask.sum((1, 2))), -1)[:, None].astype(float)


def score_depth(truth, found, objects):
    error, ratio = np.abs(found - truth) / truth, np.maximum(found / truth, truth / found) < 1.25
    return dict(absrel_objects=over_pixels(error, objects), delta_objects=over_pixels(ratio, objects),
                absrel_all=over_pixels(error, objects >= 0), delta_all=over_pixels(ratio, objects >= 0))


def score_normal(truth, found, objects):
    lengths = np.linalg.norm(truth, axis=-1) * np.maximum(np.linalg.norm(found, axis=-1), 1e-6)
    angle = np.degrees(np.arccos(np.clip((truth * found).sum(-1) / lengths, -1, 1)))
    return dict(angle_objects=over_pixels(angle, objects), angle_all=over_pixels(angle, objects >= 0))


def score_segmentation(truth, found, objects):
    """Mean intersection over union of the classes, over the pixels of objects and over all."""
    def overlap(mask):
        return np.stack([np.stack((((truth == c) & (found == c) & mask).sum((1, 2)),
                                   (((truth == c) | (found == c)) & mask).sum((1, 2))), -1)
                         for c in range(1 + len(SHAPES) * len(COLORS))], 1).astype(float)  # (n, 25, 2)
    return dict(miou_objects=overlap(objects)[:, 1:], miou_all=overlap(objects >= 0))
