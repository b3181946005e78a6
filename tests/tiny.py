"""A tiny run of nano4M, data of random numbers for chapter 1, and what a run leaves behind: shared by the tests of the loop."""
import json
from pathlib import Path

import numpy as np

import train
from engine import checkpoints

TINY = dict(model='fourm', dataset='scenes', n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, num_input_tokens='16,32',
            num_target_tokens='16', batch_size=8, micro_batch_size=4, max_iters=6, eval_interval=3, eval_iters=2, log_interval=1,
            warmup_iters=2, device='cpu', dtype='float32', compile=False, pictures=False)
GPT = dict(model='gpt', dataset='toy', n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=3, device='cpu',
           compile=False, dtype='float32', pictures=False)


def run(out_dir, **changes):
    return train.main(**(TINY | dict(out_dir=str(out_dir)) | changes))


def read(out_dir, name='ckpt_last.pt'):
    return checkpoints.read(Path(out_dir, name))


def weights(out_dir, name='ckpt_last.pt'):
    return read(out_dir, name)['weights']


def lines(out_dir):
    return [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]


def losses(out_dir, name='train_loss'):
    return [line[name] for line in lines(out_dir) if name in line]


def save_data(folder, kind, train_array, val_array, **meta):
    """A data folder of one field, tokens; returns its meta."""
    for split, array in (('train', train_array), ('val', val_array)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        np.save(folder / split / 'tokens.npy', array)
    meta = dict(kind=kind, prepare='shakespeare', fields=dict(tokens=1000), config=dict(vocab_size=1000)) | meta
    (folder / 'meta.json').write_text(json.dumps(meta))
    return meta
