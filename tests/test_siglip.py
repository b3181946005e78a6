"""SigLIP's conversion against Hugging Face's implementation on a small random model; skipped without transformers."""
import json

import pytest
import torch

from config import UserError
from engine import checkpoints
from prepare import siglip
from vlm import Config, VisionEncoder

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
             patch_size=8)


@pytest.fixture
def saved(tmp_path):
    """A random SigLIP as transformers saves it, its norms not at rest, and the model."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('safetensors')
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if 'norm' in name and 'weight' in name else 0.0, 0.3)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@torch.no_grad()
def test_features_agree(saved, monkeypatch):
    folder, theirs = saved
    monkeypatch.setattr(siglip, 'download', lambda url, name: folder / name.split('/')[1])
    monkeypatch.chdir(folder)
    siglip.main()
    sources = checkpoints.read_sources('vision_encoder:siglip,projector:out/siglip')
    checkpoint = sources['vision_encoder']
    assert checkpoints.find('siglip').is_file()
    ours = VisionEncoder(Config(**checkpoint['model_config'])).eval()
    ours.load_state_dict(checkpoint['weights'])
    images = torch.randint(256, (3, 32, 32, 3))
    expected = theirs(pixel_values=images.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('content, message', [
    ('no json', 'not the description of a SigLIP'),
    (json.dumps(dict(model_type='clip_vision_model', hidden_act='quick_gelu')), 'clip_vision_model with quick_gelu'),
    ('[]', 'not the description of a SigLIP'),
])
def test_another_model(tmp_path, content, message):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=message):
        siglip.read_config(tmp_path / 'config.json')


def test_damaged_weights(saved):
    folder, _ = saved
    settings = siglip.read_config(folder / 'config.json')
    with pytest.raises(UserError, match='encoder.layers.2.self_attn.q_proj.weight is missing'):
        siglip.read_weights(folder / 'model.safetensors', settings | dict(vision_layer=3))
    with pytest.raises(UserError, match=r'pos_embedding is \(16, 32\), expected \(64, 32\)'):
        siglip.read_weights(folder / 'model.safetensors', settings | dict(image_size=64))
    (folder / 'half.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:1000])
    with pytest.raises(UserError, match='not a safetensors file'):
        siglip.read_weights(folder / 'half.safetensors', settings)
