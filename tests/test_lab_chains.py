"""nano4M's chains: the grammar, and what a chain generates."""
from pathlib import Path

import numpy as np
import pytest
import torch

import lab
import train
from lab.chains import best_samples, generate, mean_of, parse_chain, plan_of, read_link, sampling_of
from lab.fourm import AnyToAny
from lab.retrieval import decode_modality, log_prob
from tests.tiny import TINY


@pytest.fixture(scope='module')
def run(work):
    train.main(**(TINY | dict(out_dir='out/chains', max_iters=2)))
    return lab.open_run(Path('out/chains/ckpt_last.pt'), 'cpu')


def test_links():
    link = read_link('rgb:25:halton:cosine:t0.9..0.3:g1..3:w-0.5:best8', AnyToAny())
    expected = dict(steps=25, order='halton', schedule='cosine', temperature='0.9..0.3', guidance='1..3', weight=-0.5,
                    best=8, mean=1)
    assert {name: getattr(link, name) for name in expected} == expected
    plain = read_link('depth', AnyToAny(order='raster', steps=7))
    assert plain.order == 'raster' and plain.steps == 7 and plain.weight == 1 and plain.guidance is None


def test_what_a_link_leaves_open_follows_from_its_target(run):
    """One step and no choice if rgb is known, a few sampled ones otherwise; whatever a link or the settings say
    counts."""
    rgb, patches = torch.zeros(2, 64, dtype=torch.long), torch.full((2, 64), -1)

    def sampling(entry, known, weighted=False, **settings):
        found = sampling_of(run.model, read_link(entry, AnyToAny(**settings)), known, weighted)
        return [found[name] for name in ('steps', 'temperature', 'temperature_end', 'guidance', 'guidance_end')]
    assert sampling('depth', dict(rgb=rgb)) == sampling('caption', {}) == [1, 0, 0, 1, 1]
    assert sampling('depth', dict(rgb=patches)) == sampling('rgb', dict(rgb=rgb)) == [8, 0.2, 0.2, 2, 2]
    assert sampling('rgb', {}, weighted=True) == [8, 0.2, 0.2, 1, 1]
    assert sampling('depth:mean3', dict(rgb=rgb)) == [1, 1, 1, 1, 1]
    assert sampling('caption:best3', {}) == [1, 0.7, 0.7, 1, 1]
    assert sampling('rgb:best3', {}) == [8, 0.2, 0.2, 2, 2]
    assert sampling('depth', dict(rgb=rgb), steps=4, temperature='0.9..0.1', guidance='0') == [4, 0.9, 0.1, 0, 0]
    assert sampling('depth:2:t0:g1..3', dict(rgb=rgb), steps=4, temperature='1', guidance='5') == [2, 0, 0, 1, 3]


def test_the_mean_of_samples():
    depth = np.random.default_rng(0).random((2, 5, 4, 4)).astype(np.float32)
    assert np.allclose(mean_of('depth', depth), depth.mean(1))
    classes = np.array([3, 1, 1, 0, 3, 3]).reshape(1, 6, 1, 1).repeat(2, 2).astype(np.uint8)
    assert (mean_of('segmentation', classes) == 3).all() and mean_of('segmentation', classes).shape == (1, 2, 1)


def test_the_best_sample_makes_its_condition_most_probable(run):
    model, _ = lab.checkpoints.load_model(run.path)
    torch.manual_seed(0)
    for head in model.heads.values():
        torch.nn.init.normal_(head.out[0].weight)
    given = {'caption': run.ids('caption', np.arange(3))}
    ids = torch.randint(4096, (12, 64))
    best = best_samples(model, given, 'depth', ids, 4)
    for i in range(3):
        caption = given['caption'][i:i + 1]
        log_p = [log_prob(model, decode_modality(model, {'depth': row[None]}, 'caption'), 'caption', caption).item()
                 for row in ids[4 * i:4 * i + 4]]
        assert torch.equal(best[i], ids[4 * i + int(np.argmax(log_p))])


def test_an_image_from_texts_alone_has_a_plan(run, monkeypatch):
    """The other texts are generated first and are conditions, but are no output; nothing else has a plan."""
    monkeypatch.setattr(run.model, 'input_sizes', [32, 128])
    rgb, caption, scene_desc = (run.ids(name, np.arange(3)) for name in ('rgb', 'caption', 'scene_desc'))

    def plan(entry, known, weighted=False, **settings):
        return plan_of(run.model, read_link(entry, AnyToAny(**settings)), known, weighted)
    assert plan('rgb', dict(caption=caption)) == plan('depth', dict(caption=caption)) == ['scene_desc']
    assert not plan('rgb', dict(caption=caption), plan=False) and not plan('rgb', dict(caption=caption), weighted=True)
    assert not plan('rgb', dict(caption=caption, scene_desc=scene_desc)) and not plan('scene_desc', dict(caption=caption))
    assert not plan('depth', dict(caption=caption, rgb=rgb)) and not plan('rgb', {})
    known, raw = generate(run, dict(caption=caption), parse_chain('caption>rgb', AnyToAny(), run.model))
    assert known.keys() == {'caption', 'scene_desc', 'rgb'} and raw.keys() == {'rgb'}
    assert (known['scene_desc'] >= 0).any(1).all() and torch.equal(known['caption'], caption)
    known, _ = generate(run, dict(caption=caption), parse_chain('caption:w0>rgb', AnyToAny(), run.model))
    assert known.keys() == {'caption', 'rgb'}  # a plan would bring the caption back
    monkeypatch.setattr(run.model, 'input_sizes', [64])  # a caption, a scene_desc and an image do not fit
    assert not plan('rgb', dict(caption=caption))
