"""
SigLIP (Zhai et al., 2303.15343), eyes trained on billions of pictures with their captions, as the eyes of chapter 5.

    python -m prepare.siglip                   SigLIP-B/16 at 224 pixels, 93 M weights, to out/siglip/ckpt_last.pt
    python train.py config/vlm_smol.py         beside SmolLM2

Only the patches' features are kept: no text tower, no pooling. They are those of vlm.Eyes with biases and GELU, but for norms:
SigLIP's subtract the mean, and have a gain and a bias. Ours do and have nothing of this, and need not: what writes into the
residual stream can write vectors of mean zero, since each norm would take their mean away (2401.15024, section 3.1), and a gain
and a bias can be multiplied into the matrix behind the norm. Only the last norm's stay, as Eyes.gain and Eyes.shift.
"""
import json
from pathlib import Path

import torch

import config
from config import UserError
from engine import checkpoints
from prepare.download import download
from vlm import Config, Eyes

MAKES = 'out/siglip'
SETTINGS = dict(
    out=MAKES,  # folder of the checkpoint
)
URL = 'https://huggingface.co/google/siglip-base-patch16-224/resolve/main/{}'
DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
                image_size=224, patch_size=16, layer_norm_eps=1e-6, hidden_act='gelu_pytorch_tanh')  # where config.json is silent


def read_config(path):
    """A SigLIP's config.json -> the settings of Eyes in vlm.py, as a dict. Raises UserError."""
    try:
        file = json.loads(Path(path).read_text(encoding='utf-8'))
        c = DEFAULTS | file.get('vision_config', file)
        if c['hidden_act'] != 'gelu_pytorch_tanh' or c['model_type'] not in ('siglip_vision_model', 'siglip'):
            raise ValueError(f'{c["model_type"]} with {c["hidden_act"]}')
        return dict(image_size=c['image_size'], channels=c['num_channels'], patch=c['patch_size'], eyes_embd=c['hidden_size'],
                    eyes_layer=c['num_hidden_layers'], eyes_head=c['num_attention_heads'], eyes_mlp='gelu_tanh',
                    eyes_mlp_width=c['intermediate_size'], eyes_norm_eps=c['layer_norm_eps'], eyes_bias=True, eyes_qk_norm=False,
                    eyes_rope_theta=0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not the description of a SigLIP ({type(error).__name__}: {error}); delete it, run this again')


def centred(weight):
    """What is written into the residual stream without its mean over the width, the first axis of a matrix (D, ...)."""
    return weight - weight.mean(0)


def behind(weight, bias, gain, shift):
    """A layer's weight and bias with the gain and bias of the norm before it multiplied in."""
    return weight * gain, bias + weight @ shift


def convert(take, n_layer):
    """{name in vlm.Eyes: float32 tensor}; take(name) gives SigLIP's tensors in float64."""
    patches = take('embeddings.patch_embedding.weight').flatten(1)  # (D, C patch^2)
    weights = {'patch_embedding.weight': centred(patches),
               'patch_embedding.bias': centred(take('embeddings.patch_embedding.bias')),
               'place_embedding': centred(take('embeddings.position_embedding.weight').T).T,
               'gain': take('post_layernorm.weight'), 'shift': take('post_layernorm.bias')}
    for i in range(n_layer):
        siglip, ours = f'encoder.layers.{i}', f'blocks.{i}'

        def norm(name):
            return take(f'{siglip}.{name}.weight'), take(f'{siglip}.{name}.bias')
        qkv = [torch.cat([take(f'{siglip}.self_attn.{part}_proj.{kind}') for part in 'qkv']) for kind in ('weight', 'bias')]
        up = [take(f'{siglip}.mlp.fc1.{kind}') for kind in ('weight', 'bias')]
        for name, pair in (('attention.qkv', behind(*qkv, *norm('layer_norm1'))), ('mlp.up', behind(*up, *norm('layer_norm2')))):
            weights |= dict(zip((f'{ours}.{name}.weight', f'{ours}.{name}.bias'), pair))
        for name, part in (('attention.out', 'self_attn.out_proj'), ('mlp.down', 'mlp.fc2')):
            weights |= {f'{ours}.{name}.{kind}': centred(take(f'{siglip}.{part}.{kind}')) for kind in ('weight', 'bias')}
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def read_weights(path, settings):
    """A SigLIP's model.safetensors -> weights of vlm.Eyes. Raises UserError where it is damaged or not of these settings."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError('SigLIP\'s weights are a safetensors file: pip install safetensors, then run this again')
    try:
        with safe_open(path, 'pt') as file:
            names = {name.removeprefix('vision_model.'): name for name in file.keys()}

            def take(name):
                if name not in names:
                    raise UserError(f'{path}: {name} is missing: it is no SigLIP, or does not belong to its config.json')
                return file.get_tensor(names[name]).double()
            weights = convert(take, settings['eyes_layer'])
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: not a safetensors file ({error}); delete it and run this again')
    with torch.device('meta'):
        expected = {name: tensor.shape for name, tensor in Eyes(Config(**settings)).state_dict().items()}
    for name in expected:
        if weights[name].shape != expected[name]:
            raise UserError(f'{path}: {name} is {tuple(weights[name].shape)}, expected {tuple(expected[name])}: it does not '
                            'belong to its config.json')
    return weights


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out = Path(settings['out'])
    files = [download(URL.format(name), f'siglip-b16-224/{name}') for name in ('config.json', 'model.safetensors')]
    model_config = read_config(files[0])
    weights = read_weights(files[1], model_config)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = dict(format=checkpoints.FORMAT, settings=dict(model='vlm', dataset='siglip'), model_config=model_config, meta={}, step=0, weights=weights)
    checkpoints.save(out / 'ckpt_last.pt', checkpoint)
    print(f'{out}/ckpt_last.pt: SigLIP, {sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights')


if __name__ == '__main__':
    config.run(main)
