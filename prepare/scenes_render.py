"""
A ray caster for CLEVR-like scenes (Johnson et al., 1612.06890) with exact ground truth, in numpy.

A scene has 2 to max_objects spheres, cubes and cylinders on a ground plane, a camera and a light; both have small
random offsets. `trace` casts rays, `shade` computes the colors of the hit points. Depth, normals and instances are
those of the rays through the pixel centres; the image is the mean of four rays per pixel.

Vectors are stored with x, y, z on the first axis: (3, ...). World: z up, ground z = 0, unit about one object.
A dict `scenes` holds, for S scenes of up to K objects:
    shape, color, material, size (S, K) integers, -1 if there is no object;  center (3, S, K), half (S, K), angle (S, K)
    eye (3, S), axes (3, 3, S) the camera's right, up and backward vectors;  light (3, S) the direction to the light

Simplifications: one distant light with hard shadows; reflections of a gradient instead of traced ones.
"""
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from config import UserError
from engine import threads

SHAPES = ('cube', 'sphere', 'cylinder')
COLORS = {'blue': (42, 75, 215), 'brown': (129, 74, 25), 'cyan': (41, 208, 208), 'gray': (87, 87, 87),
          'green': (29, 105, 20), 'purple': (129, 38, 192), 'red': (173, 35, 35), 'yellow': (255, 238, 51)}  # CLEVR's
MATERIALS = ('metal', 'rubber')
SIZES = ('large', 'small')
RADIUS = np.array((0.75, 0.48))            # of a large and a small sphere or cylinder; times 0.85: half side of a cube
DISTANCE, ELEVATION, FOCAL = 7.5, 36, 3.05  # of the camera: from the centre; degrees; in half image widths
CHUNK = 8                                  # scenes rendered together: they fit in the cache
INFINITY = np.float32(1e9)
PER_OBJECT = ('shape', 'color', 'material', 'size', 'center', 'half', 'angle')  # arrays whose last axis is objects
SCENE_AXIS = dict.fromkeys(PER_OBJECT, 0) | dict(center=1, eye=1, axes=2, light=1)  # the axis of scenes in each array


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(v):
    return v / np.sqrt(dot(v, v))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def draw_attributes(n, rng, max_objects):
    """Counts uniform in 2..max_objects, attributes uniform and independent; -1 in unused slots."""
    unused = np.arange(max_objects) >= rng.integers(2, max_objects + 1, n)[:, None]
    kinds = dict(shape=len(SHAPES), color=len(COLORS), material=len(MATERIALS), size=len(SIZES))
    return {name: np.where(unused, -1, rng.integers(0, many, (n, max_objects))) for name, many in kinds.items()}


def place(attributes, rng):
    """Adds positions, camera and light to n scenes. Also returns in which scenes no two objects touch."""
    n, K = attributes['shape'].shape
    shrink = min(1, 5 / K)  # more than 5 objects are smaller, or they would not fit
    radius = shrink * RADIUS[attributes['size']]
    half = np.where(attributes['shape'] == 0, 0.85 * radius, radius)
    reach = np.where(attributes['shape'] == 0, 2 ** 0.5 * half, radius)  # corners of a cube
    ground = rng.uniform(-1.65, 1.65, (40, 2, n, K))  # 40 candidates for each object, tried in turn
    x, y, ok = np.zeros((n, K)), np.zeros((n, K)), np.ones(n, bool)
    for k in range(K):
        gap = np.hypot(ground[:, 0, :, k, None] - x[:, :k], ground[:, 1, :, k, None] - y[:, :k])  # (40, n, k)
        free = (gap > reach[:, k, None] + reach[:, :k] + 0.15).all(-1)
        first = free.argmax(0)
        x[:, k], y[:, k] = ground[first, :, np.arange(n), k].T
        ok &= free.any(0) | (attributes['shape'][:, k] < 0)
    azimuth, elevation = np.radians(rng.uniform(-8, 8, n)), np.radians(ELEVATION + rng.uniform(-6, 6, n))
    back = np.stack((np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)))
    right = np.stack((np.cos(azimuth), np.sin(azimuth), np.zeros(n)))
    up = np.cross(back, right, axis=0)
    light = unit(np.array((-0.55, -0.45, 0.9))[:, None] + rng.uniform(-0.15, 0.15, (3, n)))
    eye = (DISTANCE + rng.uniform(-0.3, 0.3, n)) * back + np.array((0, 0, 0.25))[:, None]
    scenes = attributes | dict(center=np.stack((x, y, half)), half=half, angle=rng.uniform(0, 2 * np.pi, (n, K)),
                               eye=eye, axes=np.stack((right, up, back)).swapaxes(0, 1), light=light)
    return {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in scenes.items()}, ok


def project(scenes, points, size):
    """Pixel coordinates x, y (2, S, ...) of world points (3, S, ...), and the depth along the optical axis (S, ...)."""
    more = (slice(None),) * 2 + (None,) * (points.ndim - 2)
    right, up, back = (dot(points - scenes['eye'][more], scenes['axes'][:, i][more]) for i in range(3))
    scale = FOCAL * size / 2 / -back
    return np.stack((size / 2 + right * scale - 0.5, size / 2 - up * scale - 0.5)), -back


def choose(scenes, index):
    """The scenes with these indices."""
    return {name: np.take(v, index, SCENE_AXIS[name]) for name, v in scenes.items()}


def sample_scenes(n, rng, max_objects=5, least=20):
    """n scenes in which at least `least` of 64 x 64 pixels of each object are visible, objects ordered from left to
    right.

    Rejected scenes get new positions and a new camera but keep their attributes, so that these stay independent.
    """
    attributes, scenes, todo = draw_attributes(n, rng, max_objects), None, np.arange(n)
    while len(todo):
        attempt, ok = place({name: v[todo] for name, v in attributes.items()}, rng)
        for start in range(0, len(todo), CHUNK):
            part = slice(start, start + CHUNK)
            hit = trace(choose(attempt, np.arange(len(todo))[part]), 64)['object']
            visible = np.stack([(hit == k).sum(-1) for k in range(max_objects)], -1)  # (S, K)
            ok[part] &= ((visible >= least) | (attempt['shape'][part] < 0)).all(-1)
        scenes = attempt if scenes is None else scenes
        for name, v in choose(attempt, ok.nonzero()[0]).items():
            axis = SCENE_AXIS[name]
            np.moveaxis(scenes[name], axis, 0)[todo[ok]] = np.moveaxis(v, axis, 0)
        todo = todo[~ok]
    column = np.where(scenes['shape'] < 0, np.inf, project(scenes, scenes['center'], 64)[0][0])
    order = column.argsort(-1)
    for name in PER_OBJECT:
        scenes[name] = np.take_along_axis(scenes[name], order[None] if name == 'center' else order, -1)
    return scenes


# ---------------------------------------------------------------------------------------------------------------------
# Casting rays

def hit_sphere(o, d, h):
    """Distance along rays o + t d (3, R) to a sphere of radius h (R,) around the origin; INFINITY if they miss it."""
    b, c = dot(o, d), dot(o, o) - h * h
    root = b * b - c
    t = -b - np.sqrt(np.maximum(root, 0))
    return np.where((root > 0) & (t > 1e-3), t, INFINITY)


def slab(o, d, h):
    """The interval of t in which rays are in |x| < h, for one coordinate."""
    inverse = 1 / np.where(np.abs(d) < 1e-6, np.float32(1e-6), d)
    a, b = (-h - o) * inverse, (h - o) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def hit_cube(o, d, h):
    """The same for a cube of half side h: the intersection of three slabs."""
    enter, leave = zip(*(slab(o[i], d[i], h) for i in range(3)))
    near = np.maximum(np.maximum(enter[0], enter[1]), enter[2])
    far = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
    return np.where((near < far) & (near > 1e-3), near, INFINITY)


def hit_cylinder(o, d, h):
    """The same for an upright cylinder of radius and half height h: the intersection of an infinite cylinder and a
    slab."""
    a, b = d[0] * d[0] + d[1] * d[1] + 1e-9, o[0] * d[0] + o[1] * d[1]
    root = b * b - a * (o[0] * o[0] + o[1] * o[1] - h * h)
    width = np.sqrt(np.maximum(root, 0))
    enter, leave = slab(o[2], d[2], h)
    near, far = np.maximum((-b - width) / a, enter), np.minimum((-b + width) / a, leave)
    return np.where((root > 0) & (near < far) & (near > 1e-3), near, INFINITY)


def local(v, angle):
    """Vectors (3, R) in the frame of an object that is rotated by angle (R,) about the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack((c * v[0] + s * v[1], c * v[1] - s * v[0], v[2]))


def hit_objects(scenes, s, k, origin, direction):
    """Distance (R,) along each ray to object k of scene s, both (R,)."""
    angle, half = scenes['angle'][s, k], scenes['half'][s, k]
    o, d = local(origin - scenes['center'][:, s, k], angle), local(direction, angle)
    t = np.full(len(s), INFINITY)
    for shape, hit in enumerate((hit_cube, hit_sphere, hit_cylinder)):
        chosen = (scenes['shape'][s, k] == shape).nonzero()[0]
        t[chosen] = hit(o[:, chosen], d[:, chosen], half[chosen])
    return t


def object_normal(scenes, s, k, point):
    """Outward unit normals (3, R) at points (3, R) on the surface of object k of scene s."""
    angle, half, shape = scenes['angle'][s, k], scenes['half'][s, k], scenes['shape'][s, k]
    p = local(point - scenes['center'][:, s, k], angle) / half
    face = np.abs(p).argmax(0) == np.arange(3)[:, None]                     # cube: the coordinate that is 1
    side = np.stack((p[0], p[1], np.zeros_like(half)))                      # cylinder: outward, or up on its lid
    lid = np.stack((np.zeros_like(half), np.zeros_like(half), np.ones_like(half)))
    top = (p[2] > 1 - 1e-3) & (dot(side, side) < 1 - 1e-3)
    normal = np.where(shape == 0, face * np.sign(p), np.where(shape == 1, p, np.where(top, lid, side)))
    return unit(local(normal, -angle))


def trace(scenes, size):
    """Casts one ray through the centre of each pixel. Returns t and object (S, size^2), the distance to the nearest
    surface and its object (-1: ground), and direction (3, S, size^2), unit vectors. Objects are tested only in their
    screen boxes."""
    S, K = scenes['shape'].shape
    grid = (np.arange(size, dtype=np.float32) + 0.5) / (size / 2) - 1
    right, up, back = (scenes['axes'][:, i, :, None] for i in range(3))
    direction = unit(np.tile(grid, size) * right - np.repeat(grid, size) * up - np.float32(FOCAL) * back)
    t = scenes['eye'][2][:, None] / np.maximum(-direction[2], 1e-3)  # the ground
    seen = np.full((S, size * size), -1, np.int8)
    reach = np.where(scenes['shape'] == 1, 1, 3 ** 0.5) * scenes['half']  # of a bounding sphere
    middle, depth = project(scenes, scenes['center'], size)
    radius = FOCAL * size / 2 * reach / (depth - reach)  # in pixels, a little too large
    for k in range(K):
        low = np.clip(np.floor(middle[:, :, k] - radius[:, k]), 0, size - 1).astype(int)
        wide, high = np.clip(np.ceil(middle[:, :, k] + radius[:, k]), 0, size - 1).astype(int) - low + 1
        rays = wide * high * (scenes['shape'][:, k] >= 0)
        s = np.repeat(np.arange(S), rays)
        i = np.arange(len(s)) - np.repeat(rays.cumsum() - rays, rays)  # counts from 0 in each box
        pixel = (low[1][s] + i // wide[s]) * size + low[0][s] + i % wide[s]
        near = hit_objects(scenes, s, np.full_like(s, k), scenes['eye'][:, s], direction[:, s, pixel])
        closer = near < t[s, pixel]
        s, pixel = s[closer], pixel[closer]
        t[s, pixel], seen[s, pixel] = near[closer], k
    return dict(t=t, object=seen, direction=direction)


# ---------------------------------------------------------------------------------------------------------------------
# Colors

def surface(scenes, rays):
    """Hit points and normals (3, S, P) of traced rays."""
    point = scenes['eye'][:, :, None] + rays['t'] * rays['direction']
    normal = np.zeros_like(point)
    normal[2] = 1
    s, p = (rays['object'] >= 0).nonzero()
    normal[:, s, p] = object_normal(scenes, s, rays['object'][s, p], point[:, s, p])
    return point, normal


def in_shadow(scenes, point, normal):
    """Which points (3, S, P) are in shadow; objects are tested only for points near their axis of shadow."""
    dark = dot(normal, scenes['light'][:, :, None]) <= 0
    start = point + 2e-3 * normal
    reach = (np.where(scenes['shape'] == 1, 1, 3 ** 0.5) * scenes['half']) ** 2
    for k in range(scenes['shape'].shape[1]):
        away = scenes['center'][:, :, k, None] - start
        along = dot(away, scenes['light'][:, :, None])
        near = (dot(away, away) - along * along < reach[:, k, None]) & ~dark & (scenes['shape'][:, k, None] >= 0)
        s, p = near.nonzero()
        dark[s, p] = hit_objects(scenes, s, np.full_like(s, k), start[:, s, p], scenes['light'][:, s]) < INFINITY
    return dark


def shade(scenes, rays):
    """Linear colors (3, S, P): Lambert and ambient light; for metal, Blinn-Phong and the reflection of a gradient."""
    point, normal = surface(scenes, rays)
    light, view = scenes['light'][:, :, None], rays['direction']
    lit = np.where(in_shadow(scenes, point, normal), 0, np.maximum(dot(normal, light), 0))
    fade = 1 / (1 + 0.008 * (point[0] ** 2 + point[1] ** 2))  # brightest in the middle
    color = np.full_like(point, 0.58) * ((0.45 + 0.72 * lit) * fade)
    s, p = (rays['object'] >= 0).nonzero()
    k, n, v, lit = rays['object'][s, p], normal[:, s, p], view[:, s, p], lit[s, p]
    albedo = (np.array(tuple(COLORS.values()), np.float32).T / 255)[:, scenes['color'][s, k]]
    matte = albedo * (0.42 + 0.17 * n[2] + 0.75 * lit)
    mirrored = (v - 2 * dot(n, v) * n)[2]  # z of the reflected ray: dark floor, bright sky
    sky = 0.15 + 1.1 / (1 + np.exp(-7 * (mirrored - 0.25)))
    shine = np.maximum(dot(n, unit(light[:, s, 0] - v)), 0) ** 40 * (lit > 0)
    metal = albedo * (0.1 + 0.2 * lit) + (0.55 * albedo + 0.25) * sky + 0.7 * shine
    color[:, s, p] = np.where(scenes['material'][s, k] == MATERIALS.index('metal'), metal, matte)
    return color


def render(scenes, size=64, antialias=True):
    """Images and exact ground truth of S scenes.

    Returns rgb (S, size, size, 3) uint8; depth (S, size, size) float32 along the optical axis; normal (S, size, size,
    3) float32, unit vectors in the camera's frame (x right, y up, z towards the viewer); instance (S, size, size)
    uint8, 0 the ground and k the k-th object; pixel (S, K, 2) float32, x and y of the projected centres in pixels.
    """
    S = len(scenes['shape'])
    rays = trace(scenes, size)
    point, normal = surface(scenes, rays)
    fine = shade(scenes, trace(scenes, 2 * size) if antialias else rays)  # (3, S, P)
    fine = np.clip(fine, 0, 1).reshape(3, S, size, -1, size, 2 if antialias else 1).mean((3, 5))
    camera = np.stack([dot(normal, scenes['axes'][:, i, :, None]) for i in range(3)], -1)
    return dict(rgb=np.moveaxis(np.round(fine * 255), 0, -1).astype(np.uint8),
                depth=project(scenes, point, size)[1].reshape(S, size, size),
                normal=camera.reshape(S, size, size, 3),
                instance=(rays['object'] + 1).astype(np.uint8).reshape(S, size, size),
                pixel=np.moveaxis(project(scenes, scenes['center'], size)[0], 0, -1))


def make_chunk(job):
    """One chunk of scenes as compact arrays; its random numbers are a function of the seed and the index of the
    chunk."""
    n, seed, chunk, size, max_objects = job
    scenes = sample_scenes(n, np.random.default_rng((seed, chunk)), max_objects)
    parts = [render(choose(scenes, np.arange(start, min(start + CHUNK, n))), size) for start in range(0, n, CHUNK)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays |= dict(depth=arrays['depth'].astype(np.float16), normal=np.round(arrays['normal'] * 127).astype(np.int8),
                   pixel=np.round(arrays['pixel']).astype(np.int16))
    return arrays | {name: scenes[name].astype(np.int8) for name in ('shape', 'color', 'material', 'size')}


def start_worker():
    """A worker ignores Ctrl-C, which its parent process handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def open_pool(workers):
    """A pool of processes; 0 is one per core that this process may use. Raises UserError if one of them is killed, or
    cannot start."""
    workers = workers or len(threads.cores())
    if sys.platform == 'win32':
        workers = min(workers, 61)  # it allows no more
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError('a worker process has ended early. In a script of your own, put the calls in a file, under "if '
                        '__name__ == \'__main__\':", as each worker runs the lines outside it; otherwise it was '
                        'killed, as for lack of memory: give fewer --workers=') from None
    finally:
        pool.shutdown(cancel_futures=True)


def make(n, seed, size=64, max_objects=5, workers=0):
    """n rendered scenes as a dict of arrays, on all cores, with a progress bar; the same for any number of workers."""
    jobs = [(min(128, n - start), seed, start // 128, size, max_objects) for start in range(0, n, 128)]
    arrays = None
    with open_pool(workers) as pool, tqdm(total=n, desc='render', unit='scene') as bar:
        for i, part in enumerate(pool.map(make_chunk, jobs)):
            arrays = arrays or {name: np.empty((n, *v.shape[1:]), v.dtype) for name, v in part.items()}
            for name, v in part.items():
                arrays[name][128 * i:128 * i + len(v)] = v
            bar.update(jobs[i][0])
    return arrays
