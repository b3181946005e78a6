"""
Text as tokens, through tiktoken: GPT-2's byte-pair encoding, or a small closed vocabulary written for a data set.

A closed vocabulary lists its words, spaces included (' red', ' Shape: cube'); each is one token, whatever its length. Any other
text falls back to single bytes, so that no input can fail. Ids: 0..255 the bytes, then the words, then the end token.
"""
import json
import os
import re
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError


def cache_folder():
    """Where downloads are kept: NANO_CACHE, or a folder in the user's cache directory."""
    return Path(os.environ.get('NANO_CACHE') or Path.home() / '.cache' / 'nanofm')


def word_encoding(name, words):
    """A tiktoken.Encoding of these words, with all 256 single bytes before them; the last id is the end token."""
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    assert len(ranks) == 256 + len(words), 'words are to differ from each other and from single bytes'
    longest_first = sorted(words, key=len, reverse=True)
    pattern = '|'.join([*map(re.escape, longest_first), r' ?\w+', r'\s|[^\s\w]+'])
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={'<|end|>': len(ranks)})


def save_words(path, words):
    Path(path).write_text(json.dumps(words))


def load_words(path):
    """The encoding of the words in a JSON file; tiktoken's own loader would cache it by path, and serve an old one."""
    try:
        return word_encoding(Path(path).stem, json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: missing or not a vocabulary ({error}); delete {Path(path).parent} to make it anew')


def gpt2_encoding():
    """GPT-2's encoding; its two files are fetched once, or found in NANO_CACHE/tiktoken on a machine without internet."""
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(cache_folder() / 'tiktoken'))
    try:
        return tiktoken.get_encoding('gpt2')
    except OSError as error:
        raise UserError(f'GPT-2\'s encoding is neither in {os.environ["TIKTOKEN_CACHE_DIR"]} nor to be downloaded ({error})')


def encode_rows(encoding, texts, length):
    """Texts -> (n, length) rows of ids: tokens, one end token, then -1. Raises UserError where a text is too long."""
    rows = np.full((len(texts), length), -1, np.int32)
    for row, text in zip(rows, texts):
        ids = encoding.encode_ordinary(text) + [encoding.n_vocab - 1]
        if len(ids) > length:
            raise UserError(f'the text {text[:60]!r}... has {len(ids)} tokens with its end token, the modality holds {length}')
        row[:len(ids)] = ids
    return rows


def decode_row(encoding, ids):
    """One row of ids -> its text, up to the end token."""
    ids = [int(i) for i in ids if i >= 0]
    end = encoding.n_vocab - 1
    return encoding.decode(ids[:ids.index(end)] if end in ids else ids)
