"""The ray caster against geometry that is known otherwise."""
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from config import UserError
from engine import threads
from prepare import scenes_render
from prepare.scenes_render import (FOCAL, choose, draw_attributes, make, make_chunk, object_normal, open_pool, render,
                                   sample_scenes)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def scenes():
    return sample_scenes(48, np.random.default_rng(3))


@pytest.fixture(scope='module')
def views(scenes):
    return render(scenes)


def points(scenes, views, size=64):
    """Pixels back into camera space by the depth alone: (S, H, W, 3), z towards the viewer."""
    grid = (np.arange(size) + 0.5) / (size / 2) - 1
    depth = views['depth'].astype(float)
    return np.stack((grid[None, None, :] * depth / FOCAL, -grid[None, :, None] * depth / FOCAL, -depth), -1)


def test_depth_and_normals_agree_by_finite_differences(scenes, views):
    p = points(scenes, views)
    found = np.cross(p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, :-2, 1:-1] - p[:, 2:, 1:-1])
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    normal, instance = views['normal'][:, 1:-1, 1:-1], views['instance']
    inside = np.ones(normal.shape[:3], bool)
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            inside &= instance[:, dy:dy + 62, dx:dx + 62] == instance[:, 1:-1, 1:-1]
    angle = np.degrees(np.arccos(np.clip((found * normal).sum(-1), -1, 1)))
    assert np.median(angle[inside & (instance[:, 1:-1, 1:-1] == 0)]) < 0.1   # the ground is a plane
    smooth = angle[inside & (instance[:, 1:-1, 1:-1] > 0)]
    assert np.median(smooth) < 3 and np.mean(smooth < 15) > 0.8              # an object's edges and curves differ more
    assert np.abs(np.linalg.norm(views['normal'], axis=-1) - 1).max() < 1e-4


def test_instances_agree_with_depth(scenes, views):
    """The ground's depth is known from the camera alone: background pixels have it, all others are nearer."""
    right, up, back = (scenes['axes'][:, i] for i in range(3))
    grid = (np.arange(64) + 0.5) / 32 - 1
    for s in range(48):
        z = grid[None, :] * right[2, s] - grid[:, None] * up[2, s] - FOCAL * back[2, s]
        ground = np.broadcast_to(FOCAL * scenes['eye'][2, s] / -z, (64, 64))
        background = views['instance'][s] == 0
        np.testing.assert_allclose(views['depth'][s][background], ground[background], rtol=1e-3)
        assert (views['depth'][s][~background] < ground[~background]).all()


def test_a_known_pixel_of_a_known_scene():
    """A red sphere of radius 1 at the origin's height, seen level from distance 5 by a picture with an odd number of pixels."""
    f32 = np.float32
    scene = dict(shape=np.array([[1]]), color=np.array([[6]]), material=np.array([[1]]), size=np.array([[0]]),
                 center=f32([[[0]], [[0]], [[1]]]), half=f32([[1]]), angle=f32([[0]]), eye=f32([[0], [-5], [1]]),
                 axes=f32([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T[:, :, None], light=f32([[0], [-0.6], [0.8]]))
    view = render(scene, size=33, antialias=False)
    assert view['instance'][0, 16, 16] == 1 and view['instance'][0, 0, 0] == 0
    assert view['depth'][0, 16, 16] == pytest.approx(4, abs=1e-4)
    np.testing.assert_allclose(view['normal'][0, 16, 16], [0, 0, 1], atol=1e-4)
    np.testing.assert_allclose(view['pixel'][0, 0], [16, 16], atol=1e-4)
    edge = 16.5 * FOCAL / np.sqrt(5 ** 2 - 1)  # the silhouette of a sphere: a disc of this radius in pixels
    assert abs((view['instance'] == 1).sum() - np.pi * edge ** 2) < 0.05 * np.pi * edge ** 2
    red, green, blue = view['rgb'][0, 16, 16].astype(int)
    assert red > 3 * green and abs(green - blue) <= 1


def test_normals_of_the_three_shapes():
    scene = dict(shape=np.array([[0, 1, 2]]), center=np.zeros((3, 1, 3), np.float32), half=np.ones((1, 3), np.float32),
                 angle=np.zeros((1, 3), np.float32))
    s, at = np.zeros(4, int), np.array([[1, 0.2, 0.1], [0, 0.6, 0.8], [0.3, 0.3, 1], [0.6, 0.8, 0.2]], np.float32).T
    normal = object_normal(scene, s, np.array([0, 1, 2, 2]), at)
    np.testing.assert_allclose(normal.T, [[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1], [0.6, 0.8, 0]], atol=1e-6)


def test_every_object_is_visible_and_left_to_right(scenes, views):
    for k in range(5):
        there = scenes['shape'][:, k] >= 0
        assert ((views['instance'] == k + 1).sum((1, 2))[there] >= 20).all()
    x = np.where(scenes['shape'] >= 0, views['pixel'][..., 0], 1e9)  # absent objects last
    assert (np.diff(x, axis=1) >= 0).all()
    assert 0.2 < (views['instance'] > 0).mean() < 0.35


@pytest.mark.parametrize('most', [3, 10])
def test_counts_are_uniform_and_attributes_independent(most):
    drawn = draw_attributes(6000, np.random.default_rng(0), most)
    counts = np.bincount((drawn['shape'] >= 0).sum(1))[2:] / 6000
    np.testing.assert_allclose(counts, 1 / (most - 1), atol=0.03)
    there = drawn['shape'] >= 0
    table = np.histogram2d(drawn['shape'][there], drawn['color'][there], (3, 8))[0]
    np.testing.assert_allclose(table / table.sum(), 1 / 24, atol=0.01)


@pytest.mark.parametrize('n', [2, 3, 5, 9])
def test_cameras_stay_whole_for_any_number_of_scenes(n):
    """Objects are sorted, cameras and lights are not: also if scenes, objects and coordinates are three each."""
    scenes = sample_scenes(n, np.random.default_rng(1), 3)
    axes = scenes['axes']  # (3 axes, 3 coordinates, S)
    np.testing.assert_allclose(np.einsum('acs,bcs->sab', axes, axes), np.tile(np.eye(3), (n, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scenes['light'], axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scenes['eye'] - [[0], [0], [0.25]], axis=0), 7.5, atol=0.31)


def test_rejection_keeps_attributes():
    """Scenes whose objects were hidden get new places, not new objects."""
    kept = sample_scenes(64, np.random.default_rng(5))
    drawn = draw_attributes(64, np.random.default_rng(5), 5)
    for name in ('shape', 'color'):
        assert (np.sort(kept[name], 1) == np.sort(drawn[name], 1)).all()


def test_same_seed_same_scenes_on_any_number_of_workers():
    one, two = make(140, 9, workers=1), make(140, 9, workers=2)
    assert all((one[name] == two[name]).all() for name in one)
    other = make_chunk((12, 10, 0, 64, 5))
    assert not (one['rgb'][:12] == other['rgb']).all()


def test_ten_objects_and_other_sizes():
    scenes = sample_scenes(128, np.random.default_rng(0), max_objects=10)  # large ones would fit nowhere, and take for ever
    view = render(choose(scenes, np.arange(2)), size=96)
    assert view['rgb'].shape == (2, 96, 96, 3) and view['depth'].dtype == np.float32


def test_a_worker_that_is_killed_ends_the_pool():
    """A pool of multiprocessing would wait for its answer for ever."""
    with pytest.raises(UserError, match='a worker process has ended early.*fewer --workers='):
        with open_pool(1) as pool:
            list(pool.map(os._exit, [1]))


def test_the_number_of_workers(monkeypatch):
    """0 is one per core that the process may use, as in a job of a cluster. Windows allows 61."""
    asked = []

    def pool(workers, *_):
        asked.append(workers)
        return SimpleNamespace(shutdown=lambda **_: 0)
    monkeypatch.setattr(scenes_render, 'ProcessPoolExecutor', pool)
    monkeypatch.setattr(threads, 'cores', lambda: range(96))
    for platform in ('win32', 'linux'):
        monkeypatch.setattr(scenes_render, 'sys', SimpleNamespace(platform=platform))
        for workers in (0, 64):
            with open_pool(workers):
                pass
    assert asked == [61, 61, 96, 64]


def test_workers_end_with_their_parent():
    code = ('import os, time; from prepare.scenes_render import open_pool\n'
            'with open_pool(1) as pool:\n    print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)')
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
            ended = 'Z' in Path(f'/proc/{worker}/stat').read_text().rpartition(')')[2][:3]  # nobody has waited for it
        except OSError:
            ended = True
        if ended:
            break
        time.sleep(0.1)
    assert ended


def test_a_script_without_its_guard(tmp_path, monkeypatch):
    """Each worker runs the script from its first line, and would make the data set again."""
    monkeypatch.chdir(tmp_path)
    Path('own.py').write_text("from prepare import scenes\nprint('first line')\nscenes.main(n_train=4, n_val=4, size=32, workers=1)")
    done = subprocess.run([sys.executable, 'own.py'], env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode and done.stdout.count('first line') == 2 and done.stderr.count('Traceback') == 1
    assert 'put the calls in a file, under "if __name__ == \'__main__\':"' in done.stderr.splitlines()[-1]
