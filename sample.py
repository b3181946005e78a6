"""
Generates samples from a trained model of any chapter: images, as PNG files in the run folder, or texts.

    python sample.py --out_dir=out/gpt_shakespeare --prompt="ROMEO:"
    python sample.py --out_dir=out/gpt_mnist                                    ten digits of each class
    python sample.py --out_dir=out/gpt_mnist --complete=0.5                     held-out digits, from their upper half
    python sample.py --init_from=smollm2 --prompt="The capital of France is"
    python sample.py --out_dir=out/maskgit_mnist --order=halton --steps=16      ten digits of each class
    python sample.py --out_dir=out/maskgit_mnist --complete=0.5 --shape=box     held-out digits, in-painted around a box
    python sample.py --out_dir=out/maskgit_mnist --show=gif                     step by step; also swap: other classes
    python sample.py --out_dir=out/maskgit_text --prompt="ROMEO:" --after="JULIET:" --gap=100
    python sample.py --out_dir=out/nano4m                                       any-to-any grid on held-out scenes
    python sample.py --out_dir=out/nano4m --chain="rgb>depth:8,normal:8,scene_desc"
    python sample.py --out_dir=out/nano4m --given=caption --text="two large red metal spheres" --target=depth,rgb
    python sample.py --out_dir=out/nano4m --given=rgb --image=FILE.png --target=depth,caption
    python sample.py --out_dir=out/nano4m --given=rgb --hide=rgb=16,16,48,48    in-painting; also objects, words
    python sample.py --out_dir=out/nano4m --retrieve=rgb --given=caption --text="two large red metal spheres"
    python sample.py --out_dir=out/flow_mnist --steps=20 --guidance=2           digits, from noise in 20 steps
    python sample.py --out_dir=out/flow_mnist --show=path                       noise to digit; also steps, guidance
    python sample.py --out_dir=out/flow_toy2d                                   points, velocities, the learned density
    python sample.py --out_dir=out/vlm_scenes                                   held-out scenes, questions, answers
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"     or --chat=True
    python sample.py --out_dir=out/nano4m --help                                all settings of this run

Each chapter adds its own settings to those below: a dataclass in lab/CHAPTER.py, whose defaults fit the opened model.
Scores: python -m lab.score. A page about a run: python -m lab.report.
"""
from datetime import datetime
from pathlib import Path

import config  # before torch: it sets how OpenMP's threads wait

import torch

import lab
from config import UserError
from engine import checkpoints
from lab import options

SETTINGS = dict(
    out_dir='out/nano4m',     # run folder
    init_from='',             # instead of out_dir: name of a run, or of downloaded weights (smollm2)
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    seed=0,                   # of all random numbers
    device='auto',            # cuda, mps or cpu
    dtype='auto',             # bfloat16, float16 or float32
    compile=False,            # torch.compile for the blocks: takes seconds, helps long texts on a GPU (docs/bench.md)
    split='val',              # of the data, from which held-out samples are taken
    n=1,                      # number of texts, of scenes, of images per class; the default depends on the run
)


def open_run(assigned):
    """The run named by the settings, and its lab module. Raises UserError."""
    s = options.common(assigned, SETTINGS)
    if s['init_from'] and s['checkpoint'] != SETTINGS['checkpoint']:
        raise UserError('init_from takes ckpt_last.pt: name the run by --out_dir= to choose a checkpoint')
    path = checkpoints.find(s['init_from']) if s['init_from'] else Path(s['out_dir'], s['checkpoint'])
    return options.open_run(path, s)


def help(assigned):
    """The settings of the run's chapter, if the run can be opened."""
    try:
        run, module = open_run(assigned)
        return options.help_of(module.settings_of(run))
    except UserError as error:
        return ['', 'more settings: python sample.py --out_dir=RUN --help', *[str(error)] * ('out_dir' in assigned)]


def new_path(folder):
    """A file name that is not in use: the time, to the microsecond, and if need be a number."""
    stem = f'sample_{datetime.now():%Y%m%d_%H%M%S_%f}'
    stems = (stem, *(f'{stem}_{i}' for i in range(2, 1000)))
    return folder / next(f'{name}.png' for name in stems if not any(folder.glob(f'{name}.*')))


@torch.inference_mode(False)
def main(*arguments, **overrides):
    """Writes an image to the run folder, or prints texts. Raises UserError."""
    assigned = config.read(arguments, overrides)
    run, module = open_run(assigned)
    common, settings = options.apply(assigned, SETTINGS, module.settings_of(run))
    if common['compile']:
        lab.compile_passes(run.model, run.dtype)
    try:
        module.draw(run, settings, new_path(run.path.parent))
    except ValueError as error:  # a chapter's check of its arguments
        raise UserError(str(error)) from error


if __name__ == '__main__':
    config.run(main)
