"""
SigLIP (Zhai et al., 2303.15343), pretrained on billions of images with captions, as the vision encoder of chapter 5.

    python -m prepare.siglip                   SigLIP-B/16 at 224 pixels, 93 M weights, to out/siglip/ckpt_last.pt
    python train.py config/vlm_smol.py         with SmolLM2 as language model

Only the features of patches are kept: no text encoder, no pooling. vlm.VisionEncoder with biases and GELU computes the
same except for the norms: SigLIP's LayerNorms subtract the mean and have a weight and a bias, our RMSNorms do not. They
are equivalent once the weights are converted. All that is added to the residual stream gets mean zero, since each
LayerNorm would subtract that mean anyway (2401.15024, section 3.1). Weight and bias of a LayerNorm are multiplied into
the matrix after it. Only those of the last norm stay, as VisionEncoder.norm_weight and norm_bias.
"""
import json
from pathlib import Path

import torch

import config
from config import UserError
from engine import checkpoints, runs
from prepare.download import download
from vlm import Config, VisionEncoder

MAKES = 'out/siglip'
SETTINGS = dict(
    out=MAKES,  # folder of the checkpoint
)
URL = 'https://huggingface.co/google/siglip-base-patch16-224/resolve/main/{}'
DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
                image_size=224, patch_size=16, layer_norm_eps=1e-6, hidden_act='gelu_pytorch_tanh')


def read_config(path):
    """Turn a SigLIP's config.json into the settings of vlm.VisionEncoder, a dict. Raises UserError."""
    try:
        file = json.loads(Path(path).read_text(encoding='utf-8'))
        c = DEFAULTS | file.get('vision_config', file)
        if c['hidden_act'] != 'gelu_pytorch_tanh' or c['model_type'] not in ('siglip_vision_model', 'siglip'):
            raise ValueError(f'{c["model_type"]} with {c["hidden_act"]}')
        return dict(image_size=c['image_size'], channels=c['num_channels'], patch_size=c['patch_size'],
                    vision_embd=c['hidden_size'], vision_layer=c['num_hidden_layers'],
                    vision_head=c['num_attention_heads'], vision_activation='gelu_tanh',
                    vision_mlp_hidden_dim=c['intermediate_size'], vision_norm_eps=c['layer_norm_eps'], vision_bias=True,
                    vision_qk_norm=False, vision_rope_base=0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not the description of a SigLIP ({type(error).__name__}: {error}); delete it, run '
                        'this again')


def centered(weight):
    """Subtract the mean over the width, the first axis of a matrix (D, ...) that writes into the residual stream."""
    return weight - weight.mean(0)


def fold_norm(weight, bias, norm_weight, norm_bias):
    """Return a linear layer's weight and bias with those of the norm before it multiplied in."""
    return weight * norm_weight, bias + weight @ norm_bias


def convert(take, n_layer):
    """Return {name in vlm.VisionEncoder: float32 tensor}; take(name) returns SigLIP's tensors in float64."""
    patches = take('embeddings.patch_embedding.weight').flatten(1)  # (D, C patch^2)
    weights = {'patch_embedding.weight': centered(patches),
               'patch_embedding.bias': centered(take('embeddings.patch_embedding.bias')),
               'pos_embedding': centered(take('embeddings.position_embedding.weight').T).T,
               'norm_weight': take('post_layernorm.weight'), 'norm_bias': take('post_layernorm.bias')}
    for i in range(n_layer):
        siglip, ours = f'encoder.layers.{i}', f'blocks.{i}'

        def norm(name):
            return take(f'{siglip}.{name}.weight'), take(f'{siglip}.{name}.bias')
        kinds = 'weight', 'bias'
        qkv = [torch.cat([take(f'{siglip}.self_attn.{part}_proj.{kind}') for part in 'qkv']) for kind in kinds]
        up = [take(f'{siglip}.mlp.fc1.{kind}') for kind in kinds]
        for name, pair in (('attention.qkv', fold_norm(*qkv, *norm('layer_norm1'))),
                           ('mlp.up', fold_norm(*up, *norm('layer_norm2')))):
            weights |= dict(zip((f'{ours}.{name}.weight', f'{ours}.{name}.bias'), pair))
        for name, part in (('attention.out', 'self_attn.out_proj'), ('mlp.down', 'mlp.fc2')):
            weights |= {f'{ours}.{name}.{kind}': centered(take(f'{siglip}.{part}.{kind}')) for kind in kinds}
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def read_weights(path, settings):
    """Turn a SigLIP's model.safetensors into weights of vlm.VisionEncoder. Raises UserError if the file is damaged or
    has other settings."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError('SigLIP\'s weights are a safetensors file: pip install safetensors, then run this again')
    try:
        with safe_open(path, 'pt') as file:
            names = {name.removeprefix('vision_model.'): name for name in file.keys()}

            def take(name):
                if name not in names:
                    raise UserError(f'{path}: {name} is missing: it is no SigLIP, or does not belong to its '
                                    'config.json')
                return file.get_tensor(names[name]).double()
            weights = convert(take, settings['vision_layer'])
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: not a safetensors file ({error}); delete it and run this again')
    with torch.device('meta'):
        expected = {name: tensor.shape for name, tensor in VisionEncoder(Config(**settings)).state_dict().items()}
    for name in expected:
        if weights[name].shape != expected[name]:
            found, right = tuple(weights[name].shape), tuple(expected[name])
            raise UserError(f'{path}: {name} is {found}, expected {right}: it does not belong to its config.json')
    return weights


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    out = Path(settings['out'])
    files = [download(URL.format(name), f'siglip-b16-224/{name}') for name in ('config.json', 'model.safetensors')]
    model_config = read_config(files[0])
    weights = read_weights(files[1], model_config)
    checkpoint = dict(format=checkpoints.FORMAT, settings=dict(model='vlm', dataset='siglip'), meta={}, step=0,
                      model_config=model_config, weights=weights)
    runs.save_weights(out, checkpoint)
    print(f'{out}/ckpt_last.pt: SigLIP, {sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights')


if __name__ == '__main__':
    config.run(main)
