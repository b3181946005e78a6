"""
Text tokenizers: characters, byte-pair encodings (with tiktoken), and closed vocabularies for a data set.

A byte-pair encoding (BPE, arXiv 1508.07909) starts with the 256 bytes and repeatedly merges the most frequent pair of
adjacent tokens into a new token. `train_bpe` trains one on any text; `gpt2_encoding` returns the one of GPT-2.

A closed vocabulary is a list of words, spaces included (' red', ' Shape: cube'); each is one token. Other text is
encoded as single bytes, so that every input can be encoded. Ids: 0..255 the bytes, then the words, then the end token.
"""
import difflib
import heapq
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # tiktoken requires it too; re has no \p{L}
import tiktoken
from tqdm import tqdm

from config import UserError
from engine.checkpoints import check_readable
from prepare.arrays import writing
from prepare.download import cache_folder

END = '<|endoftext|>'
LONGEST = 100  # characters of a word in the training of a byte-pair encoding
LONGEST_RUN = 50_000  # characters
LONG_RUN = re.compile(rf'(?<!\S)\S{{{LONGEST_RUN},}}|(?<!\s)\s{{{LONGEST_RUN},}}')
GPT2_FILES = '6d1cbeee0f20b3d9449abfede4726ed8212e3aee', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6'  # tiktoken's names
# words: a token never extends over two words
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Characters:
    """One id per character, without an end token; has the methods of tiktoken.Encoding that are used here."""
    eot_token = None

    def __init__(self, alphabet):
        self.ids, self.n_vocab = {c: i for i, c in enumerate(alphabet)}, len(alphabet)

    def encode_ordinary(self, text):
        if unknown := sorted(set(text) - set(self.ids)):
            alphabet = ''.join(self.ids)
            raise UserError(f'the character {unknown[0]!r} is not in the alphabet {alphabet[:100]!r}'
                            + f' ... of {len(alphabet)} characters' * (len(alphabet) > 100))
        return [self.ids[c] for c in text]

    def decode(self, ids):
        alphabet = list(self.ids)
        return ''.join(alphabet[i] for i in ids)


def pieces(document, size=1 << 20):
    """Yields pieces of about `size` characters, cut before single white space between words, where no token crosses;
    and in runs of more than LONGEST_RUN characters without white space, or of white space, which end tiktoken."""
    start = 0
    while start < len(document):
        cut = re.compile(r'(?<=\S)[ \n](?=\S)').search(document, start + size)
        end = cut.start() if cut else len(document)
        for run in LONG_RUN.finditer(document, start, end):
            for stop in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield document[start:stop]
                start = stop
        yield document[start:end]
        start = end


def encode(encoding, text):
    """Text of any length -> a list of ids."""
    return [i for piece in pieces(text) for i in encoding.encode_ordinary(piece)]


# ---------------------------------------------------------------------------------------------------------------------
# Byte-pair encodings

def gpt2_encoding():
    """The encoding of GPT-2. Its two files are downloaded once; without internet, copy them to NANO_CACHE/tiktoken."""
    before = os.environ.get('TIKTOKEN_CACHE_DIR', '')
    os.environ['TIKTOKEN_CACHE_DIR'] = folder = os.path.expanduser(before or cache_folder() / 'tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:  # ValueError: another hash, as of a page for a login
        os.environ['TIKTOKEN_CACHE_DIR'] = before  # NANO_CACHE may be another one in the next call
        raise UserError(f'GPT-2\'s encoding is not in {folder} and cannot be downloaded ({error}); run this again, or '
                        f'copy its two files there from a machine that has them: {" and ".join(GPT2_FILES)}')


def merge(ids, pair, new):
    """Replaces each occurrence of the pair in ids, from left to right, by the id `new`."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def merges(words, counts):
    """Yields the pairs to merge, the most frequent first; of equally frequent pairs, the one with the smallest ids. The
    first gets id 256.

    words: lists of ids, merged in place; counts: number of occurrences of each word. A merge changes only the counts
    of words that contain its pair. The most frequent pair is taken from a heap; outdated entries of the heap are
    skipped.
    """
    pairs, places, changed, heap = Counter(), defaultdict(set), set(), []  # places: words that have or had a pair

    def count(w, ids, sign):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += sign * counts[w]
            places[pair].add(w)
            changed.add(pair)
    for w, word in enumerate(words):
        count(w, word, 1)
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
            if len(merged) < len(words[w]):  # count from the id before the first new one to the id after the last
                start, end = max(0, merged.index(new) - 1), max(0, merged[::-1].index(new) - 1)
                count(w, words[w][start:len(words[w]) - end], -1)
                count(w, merged[start:len(merged) - end], 1)
                words[w] = merged
        yield pair


def train_bpe(texts, vocab_size):
    """A tiktoken.Encoding of at most vocab_size tokens: the 256 bytes, the pairs merged in order, the end token."""
    if vocab_size < 257:
        raise UserError(f'vocab_size={vocab_size}: byte-pair encoding needs at least 257, for all bytes and the end '
                        'token')
    counts = Counter(match[0] for text in texts for match in regex.finditer(GPT2_PATTERN, text))
    for word in [word for word in counts if len(word) > LONGEST]:  # DNA, base64: in parts, or each merge takes seconds
        n = counts.pop(word)
        for i in range(0, len(word), LONGEST):
            counts[word[i:i + LONGEST]] += n
    words, tokens, n = [list(word.encode()) for word in counts], [bytes([i]) for i in range(256)], vocab_size - 257
    for a, b in tqdm(itertools.islice(merges(words, list(counts.values())), n), 'train bpe', n, unit='merge'):
        tokens.append(tokens[a] + tokens[b])
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding('bpe', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def save_encoding(path, encoding):
    """Writes Characters or a tiktoken.Encoding as JSON; byte b is written as the character with code b."""
    if isinstance(encoding, Characters):
        saved = dict(alphabet=''.join(encoding.ids))
    else:
        saved = dict(pattern=encoding._pat_str, specials=encoding._special_tokens,
                     ranks={token.decode('latin-1'): i for token, i in encoding._mergeable_ranks.items()})
    with writing(path) as file:
        file.write(json.dumps(saved).encode())


def load_encoding(path):
    """Reads a file of save_encoding. tiktoken's own loader caches files by path and could return an old one. Raises
    UserError: tiktoken itself panics at some damaged files."""
    check_readable(path)
    try:
        saved = json.loads(Path(path).read_text(encoding='utf-8'))
        if 'alphabet' in saved:
            return Characters(saved['alphabet'])
        ranks = {token.encode('latin-1'): i for token, i in saved['ranks'].items()}
        ids = *ranks.values(), *saved['specials'].values()
        if END not in saved['specials'] or sorted(ids) != list(range(len(ids))):
            raise ValueError
        return tiktoken.Encoding('saved', pat_str=saved['pattern'], mergeable_ranks=ranks,
                                 special_tokens=saved['specials'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: missing or no encoding ({type(error).__name__}); delete {Path(path).parent} to make '
                        'it again')


def token_lengths(encoding):
    """Bytes of each token in UTF-8, (V,); the end token has none."""
    if isinstance(encoding, Characters):
        return np.array([len(c.encode()) for c in encoding.ids])
    return np.array([0 if i == encoding.eot_token else len(encoding.decode_single_token_bytes(i))
                     for i in range(encoding.n_vocab)])


# ---------------------------------------------------------------------------------------------------------------------
# Closed vocabularies, and short texts as rows of ids

def word_encoding(name, words):
    """A tiktoken.Encoding of all 256 bytes, then these words; the last id is the end token."""
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    assert len(ranks) == 256 + len(words), 'words must differ from each other and from single bytes'
    longest_first = sorted(words, key=len, reverse=True)
    pattern = '|'.join([*map(re.escape, longest_first), r' ?\w+', r'\s|[^\s\w]+'])
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={'<|end|>': len(ranks)})


def frequent_words(texts, most=4000):
    """The most frequent words of texts, for a closed vocabulary; a word includes a space before it."""
    parts, counts = Counter(), Counter()
    for text in texts:
        parts.update(text.replace(' ', '\0 ').split('\0'))  # few parts: less work for the regex
    for part, n in parts.items():
        for word in re.findall(r' ?\w+|[^\w\s]+', part):
            counts[word] += n
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ordered if len(word.encode()) > 1][:most]


def save_words(path, words):
    with writing(path) as file:
        file.write(json.dumps(words).encode())


def load_words(path):
    """The encoding of the words in a JSON file. Raises UserError."""
    check_readable(path)
    try:
        return word_encoding(Path(path).stem, json.loads(Path(path).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f'{path}: missing or not a vocabulary ({error}); delete {Path(path).parent} to make it again')


def known_words(encoding, text, examples):
    """The text, if its words occur in this closed vocabulary, and single bytes only if `examples`, texts of the data
    set, have them: a model has seen no others. Raises UserError."""
    shown = repr(examples[0][:90].strip())
    known = re.findall(r'\w+', ' '.join(encoding.decode([i]) for i in range(256, encoding.n_vocab - 1)))
    if unknown := [word for word in re.findall(r'\w+', text) if word not in known]:
        near, words = difflib.get_close_matches(unknown[0], known, 1), [word for word in known if word.isalpha()]
        raise UserError(f'{unknown[0][:40]!r} is not in the vocabulary of this data set: '
                        + (f'did you mean {near[0]!r}?' if near else f'it has {", ".join(dict.fromkeys(words))}.')
                        + f' One of its texts is {shown}')
    seen = {i for example in examples for i in encode(encoding, example)}
    if any(i < 256 and i not in seen for i in encode(encoding, text)):
        raise UserError(f'{text[:60].strip()!r} is not worded as the texts of this data set; one of them is {shown}')
    return text


def encode_rows(encoding, texts, length):
    """Texts -> (n, length) rows of ids: tokens, one end token, then -1. Raises UserError if a text is too long."""
    rows = np.full((len(texts), length), -1, np.int32)
    for row, text in zip(rows, texts):
        ids = encode(encoding, text) + [encoding.n_vocab - 1]
        if len(ids) > length:
            raise UserError(f'the text {text[:60]!r}... has {len(ids)} tokens with its end token, the modality holds '
                            f'{length}')
        row[:len(ids)] = ids
    return rows


def decode_row(encoding, ids):
    """One row of ids -> its text, up to the end token."""
    ids = [int(i) for i in ids if i >= 0]
    end = encoding.n_vocab - 1
    return encoding.decode(ids[:ids.index(end)] if end in ids else ids)
