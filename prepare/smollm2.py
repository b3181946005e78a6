"""
SmolLM2 (arXiv 2502.02737), a language model trained on 2 to 4 trillion tokens: its weights and tokenizer for gpt.py.

    python -m prepare.smollm2                  135 M parameters, to out/smollm2/ckpt_last.pt
    python -m prepare.smollm2 --size=360M      to out/smollm2-360m
    python sample.py --init_from=smollm2 --prompt="The capital of France is"
    python train.py config/gpt_finetune.py

It is a Llama (arXiv 2302.13971): the GPT of gpt.py with SwiGLU, grouped-query attention, no QK-norm, and a gain in each
RMSNorm. gpt.py has no gains: a gain multiplies the input of the next matrix, so it is multiplied into that matrix's
columns. The final norm's gain goes into lm_head, which is therefore no longer tied to the embedding.
"""
import json
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

import config
from config import UserError
from engine import checkpoints, runs
from gpt import Config
from prepare.download import download
from prepare.text_tokenizers import encode

MAKES = 'out/smollm2'
SETTINGS = dict(
    size='135M',  # or 360M
    out='',       # folder of the checkpoint; '' is out/smollm2, or out/smollm2-360m
)
URL = 'https://huggingface.co/HuggingFaceTB/SmolLM2-{}/resolve/main/{}'
LLAMA = dict(model_type='llama', hidden_act='silu', attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
             rope_type='default', rope_scaling=None, rope_interleaved=False)  # other values: another model


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# GPT-2's alphabet for bytes: a printable byte is its own character, the other 68 are the characters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}

# Bytes without a token, because the tokenizer's training text lacked them, and the characters that need them: six
# control characters and the unassigned planes 4 to 11. The pattern skips these characters and so removes them.
NO_TOKEN = {4, 6, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1, 0xf2, *range(0xf5, 256)}
SKIPPED = r'\x04\x06\x13\x14\x16\x1D\x{40000}-\x{BFFFF}'

# A text is first split at every digit of any script, then by GPT-2's pattern between digits. As one pattern: a space is
# not joined to the digit after it, and white space ends at a digit as it does at the end of a text.
PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}" + SKIPPED + r"]+|\s+(?![^\s\p{N}])|\s+"


def encoding(path=None):
    """Load SmolLM2's 49,152 tokens as a tiktoken.Encoding, from a tokenizer.json, by default the published one.

    Raises UserError if the file describes another kind of tokenizer.
    """
    path = path or download(URL.format('135M', 'tokenizer.json'), 'smollm2-135m/tokenizer.json')
    try:
        file = json.loads(Path(path).read_text(encoding='utf-8'))
        ids, merges = file['model']['vocab'], [''.join(pair).replace(' ', '') for pair in file['model']['merges']]
        special = {token['content']: token['id'] for token in file['added_tokens']}
        tokens = sorted(ids, key=ids.get)
        first = len(tokens) - len(merges)  # before it: special tokens, then single bytes
        digits, level = file['pre_tokenizer']['pretokenizers']
        split = [digits['type'], digits['individual_digits'],
                 level['type'], level['add_prefix_space'], level['use_regex']]
        ranks = {bytes(BYTES[c] for c in token): ids[token] for token in tokens if token not in special}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not SmolLM2's tokenizer ({type(error).__name__}: {error}); delete it and run again")
    for what, found, expected in (
            ('normalizer', file.get('normalizer'), None),
            ('way to split a text', split, ['Digits', True, 'ByteLevel', False, True]),
            ('numbering', [ids[token] for token in tokens], list(range(len(tokens)))),
            ('list of special tokens', special, {token: i for i, token in enumerate(tokens[:len(special)])}),
            ('set of bytes', {*tokens[len(special):first]}, {c for c, b in BYTES.items() if b not in NO_TOKEN}),
            ('order of merges', merges, tokens[first:])):  # tiktoken merges in the order of ids
        if found != expected:
            raise UserError(f"{path}: another {what} than SmolLM2's; this script cannot convert it")
    return tiktoken.Encoding('smollm2', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


class Dataset:
    """Text -> ids (T,), a list of ids -> text; `end` is the id after each document and the `start` of the next. It
    has no data folder."""
    def __init__(self, folder=None):
        self.encoding = encoding()
        self.start = self.end = self.encoding.eot_token

    def encode(self, text):
        return torch.tensor(encode(self.encoding, text), dtype=torch.long)

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i >= 0 and i != self.end])


# ---------------------------------------------------------------------------------------------------------------------
# Weights

def read_config(path):
    """A Llama's config.json -> the Config of the same model in gpt.py. Raises UserError for a model gpt.py lacks."""
    try:
        llama = json.loads(Path(path).read_text(encoding='utf-8'))
        llama |= llama.get('rope_parameters') or {}  # in newer files
        model_config = Config(
            vocab_size=llama['vocab_size'], block_size=llama['max_position_embeddings'],
            n_layer=llama['num_hidden_layers'], n_head=llama['num_attention_heads'], n_embd=llama['hidden_size'],
            n_kv_head=llama['num_key_value_heads'], activation='swiglu', mlp_hidden_dim=llama['intermediate_size'],
            qk_norm=False, rope_base=float(llama['rope_theta']), norm_eps=llama['rms_norm_eps'], token_shift=False)
        expected = LLAMA | {'head_dim': model_config.n_embd // model_config.n_head}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not the config of a Llama ({type(error).__name__}: {error}); delete it and run again')
    for name, value in expected.items():
        if llama.get(name) not in (None, value):
            raise UserError(f'{path}: {name} is {llama[name]!r}, gpt.py supports only {value!r}; choose another model')
    return model_config


def read_weights(path, c):
    """A Llama's model.safetensors -> {name in gpt.py: float32 tensor}, with gains multiplied into the next matrices.

    c: the Config. Raises UserError if the file is damaged, or a tensor is missing, unexpected or has another shape.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("SmolLM2's weights are a safetensors file: pip install safetensors, then run this again")
    D, kv = c.n_embd, c.n_kv_head * c.n_embd // c.n_head
    try:
        with safe_open(path, 'pt') as file:
            left = set(file.keys())

            def take(name, *shape):
                found = tuple(file.get_slice(f'{name}.weight').get_shape()) if f'{name}.weight' in left else 'missing'
                if found != shape:
                    raise UserError(f'{path}: {name}.weight is {found}, expected {shape}, which its config.json says')
                left.remove(f'{name}.weight')
                return file.get_tensor(f'{name}.weight').float()

            embedding = take('model.embed_tokens', c.vocab_size, D)
            weights = {'token_embedding.weight': embedding, 'lm_head.weight': embedding * take('model.norm', D)}
            for i in range(c.n_layer):
                llama, ours = f'model.layers.{i}', f'blocks.{i}'
                qkv = [take(f'{llama}.self_attn.{name}_proj', rows, D)
                       for name, rows in (('q', D), ('k', kv), ('v', kv))]
                up = [take(f'{llama}.mlp.{name}_proj', c.mlp_hidden_dim, D) for name in ('gate', 'up')]
                weights |= {
                    f'{ours}.attention.qkv.weight': torch.cat(qkv) * take(f'{llama}.input_layernorm', D),
                    f'{ours}.attention.out.weight': take(f'{llama}.self_attn.o_proj', D, D),
                    f'{ours}.mlp.up.weight': torch.cat(up) * take(f'{llama}.post_attention_layernorm', D),
                    f'{ours}.mlp.down.weight': take(f'{llama}.mlp.down_proj', D, c.mlp_hidden_dim)}
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: not a safetensors file ({error}); delete it and run again')
    if left:
        raise UserError(f'{path}: {min(left)} has no counterpart in gpt.py; choose another model')
    return weights


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    size = settings['size']
    if size not in ('135M', '360M'):
        raise UserError(f'size={size!r}: choose 135M or 360M')
    out = Path(settings['out'] or ('out/smollm2' if size == '135M' else 'out/smollm2-360m'))
    files = [download(URL.format(size, name), f'smollm2-{size.lower()}/{name}')
             for name in ('config.json', 'model.safetensors')]
    model_config, tokens = read_config(files[0]), encoding().n_vocab
    meta = dict(kind='stream', fields={'tokens': tokens}, config={'vocab_size': tokens}, prepare='smollm2',
                encoding='smollm2')
    weights = read_weights(files[1], model_config)
    checkpoint = dict(format=checkpoints.FORMAT, settings=dict(model='gpt', dataset='smollm2'), meta=meta, step=0,
                      model_config=asdict(model_config), weights=weights)
    runs.save_weights(out, checkpoint)
    print(f'{out}/ckpt_last.pt: SmolLM2-{size}, {sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights')


if __name__ == '__main__':
    config.run(main)
