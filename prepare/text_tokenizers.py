"""
Text as tokens: characters, byte-pair encodings (through tiktoken), or a small closed vocabulary written for a data set.

A byte-pair encoding starts from the 256 bytes and gives an id to the most frequent pair of neighbours, again and again (arXiv
1508.07909): `train_bpe` does so for any text, `gpt2_encoding` is the one that GPT-2 was trained with.

A closed vocabulary lists its words, spaces included (' red', ' Shape: cube'); each is one token, whatever its length. Any other
text falls back to single bytes, so that no input can fail. Ids: 0..255 the bytes, then the words, then the end token.
"""
import heapq
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # tiktoken requires it too; re knows no \p{L}
import tiktoken
from tqdm import tqdm

from config import UserError
from prepare.download import cache_folder

END = '<|endoftext|>'
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # no token crosses these words


class Characters:
    """One id a character of the alphabet, no end token; in what is used here it looks like a tiktoken.Encoding."""
    eot_token = None

    def __init__(self, alphabet):
        self.ids, self.n_vocab = {c: i for i, c in enumerate(alphabet)}, len(alphabet)

    def encode_ordinary(self, text):
        if unknown := sorted(set(text) - set(self.ids)):
            raise UserError(f'the character {unknown[0]!r} is none of this text\'s; its alphabet is {"".join(self.ids)!r}')
        return [self.ids[c] for c in text]

    def decode(self, ids):
        alphabet = list(self.ids)
        return ''.join(alphabet[i] for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# Byte-pair encodings

def gpt2_encoding():
    """GPT-2's encoding; its two files are fetched once, or found in NANO_CACHE/tiktoken on a machine without internet."""
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(cache_folder() / 'tiktoken'))
    try:
        return tiktoken.get_encoding('gpt2')
    except OSError as error:
        raise UserError(f'GPT-2\'s encoding is neither in {os.environ["TIKTOKEN_CACHE_DIR"]} nor to be downloaded ({error})')


def merge(ids, pair, new):
    """ids with each occurrence of the pair, from left to right, replaced by the id `new`, which is none of the pair's."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def merges(words, counts):
    """Yields the pairs to merge, the most frequent one first, among equals that of smallest ids; the first one gets the id 256.

    words: lists of ids, merged in place; counts: how often each stands in the text. A merge changes the counts of only those
    words that hold its pair, and the most frequent pair comes from a heap, whose outdated entries are passed over.
    """
    pairs, places, changed, heap = Counter(), defaultdict(set), set(), []  # places: the words in which a pair is, or once was

    def count(w, sign):
        for pair in zip(words[w], words[w][1:]):
            pairs[pair] += sign * counts[w]
            places[pair].add(w)
            changed.add(pair)
    for w in range(len(words)):
        count(w, 1)
    for new in itertools.count(256):
        for pair in changed:
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        while heap and heap[0][0] != -pairs[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:
            return
        pair = heapq.heappop(heap)[1]
        for w in places.pop(pair):
            merged = merge(words[w], pair, new)
            if len(merged) < len(words[w]):
                count(w, -1)
                words[w] = merged
                count(w, 1)
        yield pair


def train_bpe(texts, vocab_size):
    """A tiktoken.Encoding of at most vocab_size tokens: the 256 bytes, the pairs merged in order, the end token."""
    if vocab_size < 257:
        raise UserError(f'vocab_size={vocab_size}: byte-pair encoding needs at least 257, for all bytes and the end token')
    counts = Counter(match[0] for text in texts for match in regex.finditer(GPT2_PATTERN, text))
    words, tokens, n = [list(word.encode()) for word in counts], [bytes([i]) for i in range(256)], vocab_size - 257
    for a, b in tqdm(itertools.islice(merges(words, list(counts.values())), n), 'train bpe', n, unit='merge'):
        tokens.append(tokens[a] + tokens[b])
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding('bpe', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def save_encoding(path, encoding):
    """Characters or a tiktoken.Encoding as JSON; bytes are written as the characters of the same number."""
    if isinstance(encoding, Characters):
        saved = dict(alphabet=''.join(encoding.ids))
    else:
        saved = dict(pattern=encoding._pat_str, specials=encoding._special_tokens,
                     ranks={token.decode('latin-1'): i for token, i in encoding._mergeable_ranks.items()})
    Path(path).write_text(json.dumps(saved))


def load_encoding(path):
    """What save_encoding wrote; tiktoken's own loader would cache it by path, and serve an old one. Raises UserError."""
    try:
        saved = json.loads(Path(path).read_text())
        if 'alphabet' in saved:
            return Characters(saved['alphabet'])
        ranks = {token.encode('latin-1'): i for token, i in saved['ranks'].items()}
        return tiktoken.Encoding('saved', pat_str=saved['pattern'], mergeable_ranks=ranks, special_tokens=saved['specials'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: missing or no encoding ({type(error).__name__}); delete {Path(path).parent} to make it anew')


# ---------------------------------------------------------------------------------------------------------------------
# Closed vocabularies, and short texts as rows

def word_encoding(name, words):
    """A tiktoken.Encoding of these words, with all 256 single bytes before them; the last id is the end token."""
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    assert len(ranks) == 256 + len(words), 'words are to differ from each other and from single bytes'
    longest_first = sorted(words, key=len, reverse=True)
    pattern = '|'.join([*map(re.escape, longest_first), r' ?\w+', r'\s|[^\s\w]+'])
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={'<|end|>': len(ranks)})


def frequent_words(texts, most=4000):
    """Words for a closed vocabulary of these texts, the most frequent first; after a space, a word includes it."""
    pieces, counts = Counter(), Counter()
    for text in texts:
        pieces.update(text.replace(' ', '\0 ').split('\0'))  # 'A cube, too' -> 'A', ' cube,', ' too': few, so that the regex is
    for piece, n in pieces.items():
        for word in re.findall(r' ?\w+|[^\w\s]+', piece):
            counts[word] += n
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(word.encode()) > 1][:most]


def save_words(path, words):
    Path(path).write_text(json.dumps(words))


def load_words(path):
    """The encoding of the words in a JSON file; tiktoken's own loader would cache it by path, and serve an old one."""
    try:
        return word_encoding(Path(path).stem, json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: missing or not a vocabulary ({error}); delete {Path(path).parent} to make it anew')


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
