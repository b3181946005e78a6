"""
The scores of a run, with 95 % intervals, floors, ceilings and baselines: printed as they are computed, kept in
scores.json. A score's name begins with the settings that differ from the defaults: scores by other settings replace
none.

    python -m lab.score --out_dir=out/gpt_shakespeare                     exact likelihoods
    python -m lab.score --out_dir=out/nano4m                              every modality from every other
    python -m lab.score --out_dir=out/nano4m --n_score=1000               the same for the record, on more scenes
    python -m lab.score --out_dir=out/nano4m --given=rgb                  from rgb alone
    python -m lab.score --out_dir=out/nano4m --chain="caption>rgb:g1;caption>rgb:g2"
    python -m lab.score --out_dir=out/maskgit_mnist --steps=8,16 --against=docs/logs/gpt_mnist_scores.json
    python -m lab.score --out_dir=out/vlm_scenes --text_only_run=out/vlm_scenes_text_only
    python -m lab.score --out_dir=out/flow_mnist --help                   the settings of this run

The scores are defined in lab/CHAPTER.py, `score`. After an interruption, finished scores are kept.
"""
from pathlib import Path

import torch
from tqdm import tqdm

import config
import lab
from config import UserError
from engine import checkpoints, threads
from lab import options
from lab.statistics import TABLE_HEAD, save_scores, scores_path, table_row, with_settings

SETTINGS = dict(
    out_dir='out/nano4m',     # the run
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt, whose scores have a file of their own
    split='val',              # of the data; another one has a file of its own
    device='auto',            # cuda, mps or cpu
    dtype='auto',             # bfloat16, float16 or float32
    compile=False,            # torch.compile for the blocks
)


def open_run(assigned):
    """The run named by the settings, and its lab module, which must have scores. Raises UserError."""
    s = options.common(assigned, SETTINGS)
    run, module = options.open_run(Path(s['out_dir'], s['checkpoint']), s)
    if not hasattr(module, 'score'):
        raise UserError(f'lab/{lab.chapter_of(run.model)}.py has no scores: it needs `scores_of` and `score`')
    return run, module


def help(assigned):
    """The settings of the run's chapter, if the run can be opened."""
    try:
        run, module = open_run(assigned)
        return options.help_of(module.scores_of(run))
    except UserError as error:
        return ['', 'more settings: python -m lab.score --out_dir=RUN --help', *[str(error)] * ('out_dir' in assigned)]


@torch.inference_mode(False)
def main(*arguments, **overrides):
    """Computes the scores and returns all scores in the file. Raises UserError."""
    assigned = config.read(arguments, overrides)
    run, module = open_run(assigned)
    defaults = module.scores_of(run)
    common, settings = options.apply(assigned, SETTINGS, defaults)
    if common['compile']:
        lab.compile_passes(run.model, run.dtype)
    path, digest = scores_path(run.path, run.split), checkpoints.digest(run.path)
    if 'chain' in assigned:
        path = path.with_stem(f'{path.stem}_chains')
    kept = {}
    try:
        for scores in module.score(run, settings):
            threads.adapt()
            scores = with_settings(scores, vars(settings), vars(defaults), getattr(settings, 'told', ()))
            first, kept = not kept, save_scores(scores, path, digest)
            tqdm.write('\n'.join([TABLE_HEAD] * first + [table_row(name, score) for name, score in scores.items()]))
    except ValueError as error:  # a chapter's check of its arguments
        raise UserError(str(error)) from error
    print(f'{path}: {len(kept)} scores')
    return kept


if __name__ == '__main__':
    config.run(main, 'stopped; the scores that were printed are kept')
