"""SmolLM2's conversion against Hugging Face's implementations, on small random models and a small trained tokenizer.

Those tests need `pip install safetensors transformers tokenizers`, else they are skipped; the others need no package.
"""
import copy
import json
import random
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from engine.checkpoints import load_model, read, save
from gpt import Config
from prepare import smollm2

SPECIAL = ['<|endoftext|>', *(f'<special {i}>' for i in range(16))]
LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
SINGLE = [c for c, b in smollm2.BYTES.items() if b not in smollm2.NO_TOKEN]
MERGES = ['Ġ t', 'h e', 'Ġt he', 'Ġ Ġ']
TOKENIZER = dict(
    added_tokens=[dict(id=i, content=token) for i, token in enumerate(SPECIAL)], normalizer=None,
    pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, LEVEL]},
    model=dict(vocab={token: i for i, token in enumerate([*SPECIAL, *SINGLE, 'Ġt', 'he', 'Ġthe', 'ĠĠ'])},
               merges=MERGES))
LLAMA = dict(model_type='llama', vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
             rope_theta=100000, rope_scaling=None,
             hidden_act='silu', tie_word_embeddings=True)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

def pieces(encoding, text):
    return [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)]


def test_digits_stand_alone_and_take_no_space(tmp_path):
    encoding = smollm2.encoding(write(tmp_path / 'tokenizer.json', TOKENIZER))
    assert encoding.n_vocab == 17 + 235 + 4
    assert pieces(encoding, 'the 12  the') == ['t', 'he', ' ', '1', '2', ' ', ' the']
    assert pieces(encoding, 'the   1') == ['t', 'he', '  ', ' ', '1']
    assert pieces(encoding, 'x   the')[1:] == ['  ', ' the']
    assert len(encoding.encode_ordinary('<|endoftext|>')) == 13  # in a text it is text
    assert encoding.decode(encoding.encode_ordinary('naïve ٣ ½\n\n\t👍🏽 \r\n')) == 'naïve ٣ ½\n\n\t👍🏽 \r\n'
    assert pieces(encoding, 'a\x04b\U00040000c') == ['a', 'b', 'c']  # nothing in the vocabulary could stand for them


def test_merges_as_pairs_are_the_same(tmp_path):
    pairs = copy.deepcopy(TOKENIZER)
    pairs['model']['merges'] = [merge.split(' ') for merge in MERGES]
    a, b = (smollm2.encoding(write(tmp_path / 'tokenizer.json', content)) for content in (TOKENIZER, pairs))
    assert a._mergeable_ranks == b._mergeable_ranks


def test_fields(tmp_path, monkeypatch):
    path = write(tmp_path / 'tokenizer.json', TOKENIZER)
    monkeypatch.setattr(smollm2, 'download', lambda url, name: path)
    dataset = smollm2.Dataset(tmp_path)
    ids = dataset.encode('the the')
    assert ids.dtype == torch.long and ids.shape == (3,) and dataset.encode('').shape == (0,)
    assert dataset.encode('the' + ' ' * 1_000_001).shape[0] > 1000  # tiktoken itself panics
    assert dataset.end == 0 and dataset.decode([*ids.tolist(), 0, -1, -1]) == 'the the'


@pytest.mark.parametrize('change, word', [
    (lambda t: t.pop('model'), 'model'),
    (lambda t: t.update(normalizer={'type': 'NFC'}), 'normalizer'),
    (lambda t: t['pre_tokenizer']['pretokenizers'].pop(), 'not enough values'),
    (lambda t: t['pre_tokenizer']['pretokenizers'].reverse(), 'individual_digits'),
    (lambda t: t['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True), 'split a text'),
    (lambda t: t['model']['vocab'].update({'he': 999}), 'numbering'),
    (lambda t: t['added_tokens'][0].update(id=16), 'special tokens'),
    (lambda t: t['model']['vocab'].update({SINGLE[-1]: 252, 'Ġt': 251}), 'bytes'),
    (lambda t: t['model']['merges'].reverse(), 'order of merges')])
def test_another_tokenizer_is_refused(tmp_path, change, word):
    content = copy.deepcopy(TOKENIZER)
    change(content)
    with pytest.raises(UserError, match=f'tokenizer.json: .*{word}'):
        smollm2.encoding(write(tmp_path / 'tokenizer.json', content))


def test_damaged_tokenizer(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{"model": ')
    for path in (tmp_path / 'tokenizer.json', tmp_path / 'absent.json'):
        with pytest.raises(UserError, match=f'{path.name}: not SmolLM2'):
            smollm2.encoding(path)


def random_texts(count):
    """Letters, numbers and white space of all scripts in random order. Characters newer than Python's Unicode are
    excluded: implementations disagree about them (tokenizers 0.23.3: 13 characters, numbers since 2025)."""
    known = [chr(i) for i in range(0x40000) if unicodedata.category(chr(i)) not in ('Cn', 'Cs', 'Cc')]
    kinds = (known, [chr(i) for i in range(32, 127)], [c for c in known if c.isnumeric()],
             [c for c in known if c.isspace()], [' ', '  ', '    ', '\n', '\t', '\r\n', '\x0b', '\x1c', '\x85'],
             ["'s", "'ll", "'S", " don't", ' the', ' THE'],
             ['é', 'e\u0301', '\u200d', '👩‍👩‍👧', '👍🏽', '🇨🇭', '½', '٣', '一'])
    return [''.join(random.choice(random.choice(kinds)) for _ in range(random.randrange(1, 30))) for _ in range(count)]


def test_ids_equal_those_of_tokenizers(tmp_path):
    """Only what holds a byte without token may differ: there, ours begins a new piece and theirs does not."""
    tokenizers = pytest.importorskip('tokenizers')
    random.seed(0)
    texts = random_texts(5000)
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = tokenizers.pre_tokenizers
    reference.pre_tokenizer = steps.Sequence([
        steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)])
    reference.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=SINGLE, limit_alphabet=235, show_progress=False))
    reference.save(str(tmp_path / 'tokenizer.json'))
    encoding = smollm2.encoding(tmp_path / 'tokenizer.json')
    assert encoding.n_vocab == 1500
    for text in random_texts(5000):
        assert encoding.encode_ordinary(text) == reference.encode(text).ids, repr(text)
    assert encoding.encode_ordinary('!\x04 \x06') == reference.encode('!\x04 \x06').ids


# ---------------------------------------------------------------------------------------------------------------------
# Weights

@pytest.mark.parametrize('change', [
    dict(model_type='qwen2'), dict(hidden_act='gelu'), dict(attention_bias=True), dict(mlp_bias=True),
    dict(head_dim=16),
    dict(rope_scaling={'type': 'linear', 'factor': 2.0}),
    dict(rope_parameters={'rope_type': 'llama3', 'rope_theta': 1e5}),
    dict(rope_interleaved=True), dict(tie_word_embeddings=False), dict(hidden_size='32'), dict(rope_theta=None)])
def test_another_llama_is_refused(tmp_path, change):
    path = write(tmp_path / 'config.json', LLAMA)
    assert smollm2.read_config(path).n_kv_head == 2
    with pytest.raises(UserError, match='config.json: '):
        smollm2.read_config(write(path, LLAMA | change))
    with pytest.raises(UserError, match='config.json: '):
        smollm2.read_config(write(path, []))


def test_missing_safetensors_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        model_config = smollm2.read_config(write(tmp_path / 'config.json', LLAMA))
        smollm2.read_weights(tmp_path / 'model.safetensors', model_config)


def test_unknown_size():
    with pytest.raises(UserError, match='135M or 360M'):
        smollm2.main(size='1B')


def test_the_weights_replace_no_other_run(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, 'download', lambda url, name: tmp_path / name)
    monkeypatch.setattr(smollm2, 'encoding', lambda: SimpleNamespace(n_vocab=256))
    monkeypatch.setattr(smollm2, 'read_config', lambda path: Config(vocab_size=256))
    monkeypatch.setattr(smollm2, 'read_weights', lambda path, c: {})
    for size in ('135M', '360M'):  # one takes the place of the other
        smollm2.main(size=size, out=str(tmp_path))
    save(tmp_path / 'ckpt_last.pt', read(tmp_path / 'ckpt_last.pt') | dict(settings=dict(model='gpt', dataset='text')))
    with pytest.raises(UserError, match='holds another run: choose another --out='):
        smollm2.main(out=str(tmp_path))
    assert read(tmp_path / 'ckpt_last.pt')['settings']['dataset'] == 'text'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_logits_and_text_equal_those_of_transformers(tmp_path, monkeypatch, dtype):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('safetensors')
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | dict(eos_token_id=None)))
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, mean='norm' in name, std=0.3)  # gains around 1, logits that differ
    reference.to(dtype).save_pretrained(tmp_path)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    write(tmp_path / 'tokenizer.json', TOKENIZER)
    monkeypatch.setattr(smollm2, 'download', lambda url, name: tmp_path / name.split('/')[-1])
    smollm2.main(out=str(tmp_path))
    model, checkpoint = load_model(tmp_path / 'ckpt_last.pt')
    assert checkpoint['meta']['config'] == {'vocab_size': 256} and checkpoint['meta']['prepare'] == 'smollm2'
    tokens = torch.randint(256, (3, 40))
    with torch.no_grad():
        theirs = reference(tokens).logits
        torch.testing.assert_close(model.logits(model.backbone(tokens)), theirs, atol=1e-4, rtol=1e-4)
    assert theirs.std() > 0.5
    written = reference.generate(tokens[:, :8], attention_mask=torch.ones(3, 8), do_sample=False, max_new_tokens=40)
    assert torch.equal(model.generate(tokens[:, :8], 40, temperature=0), written)


def test_other_tensors_are_refused(tmp_path):
    torch_files = pytest.importorskip('safetensors.torch')
    llama, path = smollm2.read_config(write(tmp_path / 'config.json', LLAMA)), tmp_path / 'model.safetensors'
    path.write_bytes(b'<html>')
    with pytest.raises(UserError, match='not a safetensors file'):
        smollm2.read_weights(path, llama)
    D, shapes = 32, {'self_attn.q_proj': (32, 32), 'self_attn.k_proj': (16, 32), 'self_attn.v_proj': (16, 32),
                     'self_attn.o_proj': (32, 32), 'mlp.gate_proj': (48, 32), 'mlp.up_proj': (48, 32),
                     'mlp.down_proj': (32, 48), 'input_layernorm': (32,), 'post_attention_layernorm': (32,)}
    good = {f'model.layers.{i}.{name}.weight': torch.zeros(shape) for i in range(2) for name, shape in shapes.items()}
    good |= {'model.embed_tokens.weight': torch.zeros(256, D), 'model.norm.weight': torch.zeros(D)}
    torch_files.save_file(good, path)
    assert smollm2.read_weights(path, llama)['blocks.1.attention.qkv.weight'].shape == (64, D)
    for change, word in (({'model.norm.weight': torch.zeros(1)}, r'\(1,\), expected \(32,\)'),
                         ({'model.layers.0.self_attn.q_proj.bias': torch.zeros(D)}, 'q_proj.bias has no counterpart'),
                         ({'lm_head.weight': torch.zeros(256, D)}, 'lm_head.weight has no counterpart')):
        torch_files.save_file(good | change, path)
        with pytest.raises(UserError, match=word):
            smollm2.read_weights(path, llama)
    del good['model.layers.1.mlp.up_proj.weight']
    torch_files.save_file(good, path)
    with pytest.raises(UserError, match='up_proj.weight is missing'):
        smollm2.read_weights(path, llama)
