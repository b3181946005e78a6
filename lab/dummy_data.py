"""
Random values in the shapes of missing data and weights, for lab/speed.py: speed does not depend on the values.

`write` writes a folder as prepare/NAME.py does. `resolve` finds the settings of a config, `find_sizes` those of the
runs that it starts from.
"""
from pathlib import Path

import numpy as np

import config
import fourm
from config import UserError
from engine import checkpoints
from prepare import arrays

SCENES = ('rgb:8*8*8*8:8x8 depth:8*8*8*8:8x8 normal:8*8*8*8:8x8 segmentation:8*8*8*8:8x8 scene_desc:435:31 '
          'caption:274:26')
FOLDER = 'rgb:16*16*16*16:8x8 grey:8*8*8*8:8x8 edges:8*8*8*8:8x8 palette:16*16*16:1x5 low:16*16*16:8x8 caption:300:26'
CLEVR = (' '.join(f'{name}:5*5*5*8*8*8:16x16' for name in ('rgb', 'depth', 'normal'))
         + ' scene_desc:500:128 caption:500:64')
IMAGE = dict(image_size=64, channels=3)
TALK = dict(vocab_size=341, image_token=340, n_images=1, n_patch_labels=0, max_label_tokens=0)
# NAME: ({field: (number of ids, 0 for real values; shape of a sample)}, {} for a stream of tokens; meta['config'])
DATA = {
    'shakespeare': ({}, dict(vocab_size=65)),
    'tinystories': ({}, dict(vocab_size=4096)),
    'text': ({}, dict(vocab_size=49152)),
    'mnist': (dict(tokens=(10, (50,)), image=(256, (28, 28)), label=(10, ())),
              dict(vocab_size=26, block_size=49, grid='7x7', n_classes=10, image_size=28, channels=1)),
    'cifar10': (dict(image=(256, (32, 32, 3)), label=(10, ())), dict(image_size=32, channels=3, n_classes=10)),
    'toy2d': (dict(point=(0, (2,))), dict(image_size=0, channels=2, n_classes=0)),
    'scenes': (dict(tokens=(4096, (64,)), image=(256, (64, 64, 3))),
               IMAGE | dict(modalities=SCENES, vocab_size=4096, levels='8*8*8*8', grid='8x8', block_size=63,
                            n_classes=0)),
    'folder': (dict(image=(256, (64, 64, 3))), dict(modalities=FOLDER)),
    'cifar10_modalities': (dict(image=(256, (32, 32, 3))), dict(modalities=FOLDER)),
    'multiclevr': (dict(image=(256, (64, 64, 3))), dict(modalities=CLEVR)),
    'scenes_align': (dict(tokens=(340, (104,)), loss_mask=(2, (104,)), image=(256, (64, 64, 3)),
                          patch_labels=(340, (64, 4))),
                     IMAGE | TALK | dict(block_size=104, n_patch_labels=64, max_label_tokens=4)),
    'scenes_qa': (dict(tokens=(340, (160,)), loss_mask=(2, (160,)), image=(256, (64, 64, 3))),
                  IMAGE | TALK | dict(block_size=160)),
    'vqa': (dict(tokens=(49151, (256,)), loss_mask=(2, (256,)), image=(256, (224, 224, 3))),
            TALK | dict(vocab_size=49152, image_token=49151, image_size=224, channels=3, block_size=256)),
}
DATA['scenes_large'] = DATA['scenes']
WEIGHTS = dict(
    smollm2=dict(vocab_size=49152, block_size=8192, n_layer=30, n_head=9, n_embd=576, n_kv_head=3, activation='swiglu',
                 mlp_hidden_dim=1536, qk_norm=False, rope_base=1e5, norm_eps=1e-5, token_shift=False),
    siglip=dict(image_size=224, channels=3, patch_size=16, vision_embd=768, vision_layer=12, vision_head=12,
                vision_activation='gelu_tanh', vision_mlp_hidden_dim=3072, vision_norm_eps=1e-6, vision_bias=True,
                vision_qk_norm=False, vision_rope_base=0.0))


def write(folder, name, block_size, n=64):
    """Writes a folder like data/NAME with n random training samples; in a stream, windows of block_size tokens. Raises
    UserError."""
    if name not in DATA:
        raise UserError(f'data/{name} is not there and its shapes are unknown: make it first, as its prepare script '
                        'says')
    (fields, decided), random = DATA[name], np.random.default_rng(0)
    kind = 'rows' if fields else 'stream'
    fields = dict(fields) or dict(tokens=(decided['vocab_size'], (block_size + 1,)))
    if 'modalities' in decided:
        modalities = fourm.parse_modalities(fourm.Config(decided['modalities']))
        fields |= {m.name: (m.vocab_size, (m.max_tokens,)) for m in modalities}
    made = {}
    for field, (ids, shape) in fields.items():
        array = (random.integers(ids, size=(n, *shape), dtype=np.int32) if ids
                 else random.random((n, *shape), dtype=np.float32))
        if field == 'tokens' and 'image_token' in decided:
            array[:, 0] = decided['image_token']
        made[field] = array if kind == 'rows' else array.flatten()
    arrays.write(Path(folder, 'train'), made)
    vocabularies = {field: ids for field, (ids, _) in fields.items()}
    if 'tokens' in fields:  # the image token is above all others
        vocabularies['tokens'] = decided['vocab_size']
    arrays.save_meta(folder, dict(kind=kind, prepare=name, fields=vocabularies, config=decided))


def find_sizes(init_from):
    """{part: checkpoint} of the runs that a config starts from, for config.resolve. For published weights, and for the
    run of a config that is not trained yet, the entry has only the model settings. Raises UserError for other missing
    runs."""
    found = {}
    entries = [] if init_from in ('', 'resume', 'scratch') else init_from.split(',')
    for part, name in map(checkpoints.split_part, entries):
        path = config.ROOT / f'config/{name}.py'
        if name in WEIGHTS:
            found[part] = dict(settings=dict(model='gpt'), model_config=WEIGHTS[name])
        elif path.is_file() and not checkpoints.find(name).is_file():
            settings = resolve(config.read([path]))[0]
            found[part] = dict(settings=settings, model_config=settings)
        else:
            found[part] = checkpoints.read(checkpoints.find(name))
    return found


def resolve(assigned):
    """(settings of train.py and the model, chapter) of a config, without its data and weights. Raises UserError."""
    return config.resolve(assigned, config.defaults('train.py'), find_sizes(str(assigned.get('init_from', ('',))[0])))
