"""
Your own text as one sequence of tokens: a file, or all text files of a folder.

    python -m prepare.text --input=notes.txt --out=data/notes                       one token per character
    python -m prepare.text --input=folder --encoding=bpe --vocab_size=4096 --out=data/folder
    python train.py config/gpt_shakespeare.py --dataset=folder --out_dir=out/folder

    characters  the alphabet of the text; no end token between documents
    bpe         byte-pair encoding with vocab_size tokens, trained on the first 20 million characters
    gpt2        the 50,257 tokens of GPT-2
    smollm2     the 49,152 tokens of SmolLM2, to fine-tune it
    data/NAME   those of another data set of text, to fine-tune a model that was trained on it

Byte-pair encodings have an end token after each document: each file, or each of its parts between <|endoftext|>. The
last fraction val_share of all tokens is for validation. All data sets of plain text use the functions of this file and
its `Dataset`, which encodes prompts and decodes ids.
"""
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
from config import UserError
from engine.checkpoints import digest
from prepare import arrays
from prepare.files import making, tell, visible
from prepare.text_tokenizers import (
    END,
    Characters,
    encode,
    gpt2_encoding,
    load_encoding,
    pieces,
    save_encoding,
    token_lengths,
    train_bpe,
)

MAKES = 'data/text'
SETTINGS = dict(
    input='',               # a text file, or a folder of them
    encoding='characters',  # characters, bpe (trained on the text), gpt2, smollm2, or data/NAME
    vocab_size=4096,        # of bpe
    out=MAKES,              # the data folder
    val_share=0.1,          # fraction at the end of the text that is held out
)
SUFFIXES = ('.txt', '.md', '.rst', '.tex')  # in a folder; a single file may have any
ENCODINGS = ('characters', 'bpe', 'gpt2', 'smollm2')
BPE_SAMPLE = 20_000_000  # characters


class Dataset:
    """Encodes and decodes text for a data folder. `end`: id of the end token, or None. `start`: id of the token before
    a text: the end token; without one, a newline; without newlines, any character."""
    def __init__(self, folder):
        self.encoding = load_encoding(Path(folder, 'encoding.json'))
        self.end = self.encoding.eot_token
        self.start = self.encoding.ids.get('\n', 0) if self.end is None else self.end

    def encode(self, text):
        """Text -> ids (T,). Raises UserError if a character is not in the alphabet."""
        return torch.tensor(encode(self.encoding, text), dtype=torch.long)

    def decode(self, ids):
        """A list of ids -> text, without end tokens and padding (-1)."""
        return self.encoding.decode([i for i in ids if i >= 0 and i != self.end])


# ---------------------------------------------------------------------------------------------------------------------
# From documents to a data folder, with one document at a time in memory

def make_encoding(name, documents, vocab_size):
    """The encoding of this name or data folder: Characters or a tiktoken.Encoding. documents: an iterator of
    strings."""
    if name == 'characters':
        alphabet = set()
        for document in documents:
            alphabet.update(document)
        return Characters(sorted(alphabet))
    if name == 'bpe':
        return train_bpe(first(documents, BPE_SAMPLE), vocab_size)
    if name == 'gpt2':
        return gpt2_encoding()
    if name == 'smollm2':
        from prepare import smollm2
        return smollm2.encoding()
    if Path(name, 'encoding.json').is_file():
        return load_encoding(Path(name, 'encoding.json'))
    raise UserError(f'encoding={name!r}: choose one of {", ".join(ENCODINGS)}, or the folder of a data set of text')


def check_vocab_size(assigned, encoding):
    """Raises UserError if vocab_size is assigned, and the encoding is not to be trained."""
    if 'vocab_size' in assigned and encoding != 'bpe':
        raise UserError(f'{assigned["vocab_size"][1]}: vocab_size is for --encoding=bpe, and encoding={encoding!r} has '
                        'a size of its own; leave it out')


def first(documents, size):
    """The first `size` characters of the documents."""
    for document in documents:
        yield document[:size]
        size -= len(document)
        if size <= 0:
            return


def pack(path, encoding, documents):
    """Encodes documents into a file, with an end token after each; returns it as a memory-mapped array (T,)."""
    dtype = np.min_scalar_type(encoding.n_vocab - 1)
    end = [] if encoding.eot_token is None else [encoding.eot_token]
    with arrays.writing(path) as file:
        for document in tqdm(documents, desc='encode', unit='document'):
            for piece in pieces(document):
                np.array(encoding.encode_ordinary(piece), dtype).tofile(file)
            np.array(end, dtype).tofile(file)
    if not path.stat().st_size:
        path.unlink()
        raise UserError(f'{path.parent}: nothing to write: the documents hold no text')
    return np.memmap(path, dtype, mode='r')


def write(folder, encoding, splits, meta):
    """Writes a data folder: splits {'train': (T,), 'val': (T,)}, encoding, and meta.json with the entries `meta`."""
    arrays.begin(folder, meta['prepare'])
    for split, tokens in splits.items():
        arrays.write(folder / split, dict(tokens=tokens))
    save_encoding(folder / 'encoding.json', encoding)
    sizes = {split: len(tokens) for split, tokens in splits.items()}
    # bits per byte = nats per token / ln 2 / bytes_per_token
    bytes_per_token = {split: mean_length(tokens, encoding) for split, tokens in splits.items()}
    if meta['encoding'] in ('characters', 'bpe'):  # specific to this text
        meta['encoding'] += '-' + digest(folder / 'encoding.json')[:8]
    meta = dict(kind='stream', fields=dict(tokens=encoding.n_vocab), config=dict(vocab_size=encoding.n_vocab),
                sizes=sizes, bytes_per_token=bytes_per_token) | meta
    arrays.save_meta(folder, meta)
    print(f'{folder}: {encoding.n_vocab:,} symbols; {sizes["train"]:,} tokens for training, {sizes["val"]:,} for '
          f'validation, of {bytes_per_token["val"]:.2f} bytes each')


def mean_length(tokens, encoding):
    """Bytes per token of tokens (T,), in blocks to bound memory."""
    blocks = (tokens[i:i + (1 << 20)] for i in range(0, len(tokens), 1 << 20))
    counts = sum(np.bincount(block, minlength=encoding.n_vocab) for block in blocks)  # (V,)
    return float(counts @ token_lengths(encoding) / len(tokens))


def write_split(folder, encoding, documents, val_share, meta):
    """`write` for one sequence of documents, whose last fraction val_share is for validation. Raises UserError if a
    split would have fewer than 2 tokens."""
    arrays.begin(folder, meta['prepare'])
    tokens = pack(folder / 'tokens.tmp', encoding, documents)
    cut = int(len(tokens) * (1 - val_share))
    try:
        if not 2 <= cut <= len(tokens) - 2:  # the second one is predicted from the first
            raise UserError(f'val_share={val_share} of {len(tokens)} tokens leaves fewer than 2 for training or '
                            'validation: change it, or give more text')
        write(folder, encoding, dict(train=tokens[:cut], val=tokens[cut:]), meta)
    finally:
        del tokens  # Windows deletes no file that is mapped
        with suppress(PermissionError):  # there, the fault that ends this function still holds it
            (folder / 'tokens.tmp').unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Your own files

def find_files(path):
    """The file itself, or all text files in a folder and its subfolders, sorted, but no hidden ones. Prints how many
    files of other kinds are left out. Raises UserError if there are no text files."""
    if path.is_file():
        return [path]
    found, kinds = visible(path), ', '.join('*' + suffix for suffix in SUFFIXES)
    files = [file for file in found if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f'{path}: neither a file nor a folder with text files ({kinds})')
    if others := Counter(file.suffix or 'no suffix' for file in found if file.suffix.lower() not in SUFFIXES):
        names = ', '.join(f'{n} {suffix}' for suffix, n in others.most_common(5))
        tell([f'{path}: {others.total()} of its files ({names}); text files are {kinds}'])
    return without_copies(files)


def without_copies(files):
    """The files without those that have the contents of an earlier one: a copy would be in both splits."""
    first, faults = {}, []
    for path in files:
        if (other := first.setdefault(digest(path), path)) != path:
            faults.append(f'{path}: the same text as {other}')
    tell(faults)
    return list(first.values())


def read_files(files):
    """Yields the text of each file. Raises UserError if a file is empty or not UTF-8."""
    for file in files:
        try:
            text = file.read_text(encoding='utf-8-sig')  # without a byte order mark
        except OSError as error:
            raise UserError(f'{file}: cannot be read ({error.strerror})')
        except UnicodeDecodeError as error:
            raise UserError(f'{file}: not UTF-8 text ({error}); convert it, or leave it out')
        if '\0' in text:  # UTF-16 without a byte order mark reads as UTF-8, each letter followed by a zero
            raise UserError(f'{file}: holds zero bytes: not text, or UTF-16; convert it to UTF-8, or leave it out')
        if not text.strip():
            raise UserError(f'{file}: holds no text; leave it out')
        yield text


def read_documents(files, split):
    """Yields the documents: the text of each file or, if `split`, of each of its parts between <|endoftext|>, without
    white space around them."""
    for text in read_files(files):
        yield from filter(None, map(str.strip, text.split(END))) if split and END in text else [text]


@making()
def main(*arguments, **overrides):
    assigned = config.read(arguments, overrides)
    settings = config.apply(assigned, SETTINGS)
    check_vocab_size(assigned, settings['encoding'])
    if not settings['input']:
        raise UserError('which text? python -m prepare.text --input=FILE_OR_FOLDER (--help: its encodings)')
    files = find_files(Path(settings['input']))
    name = settings['encoding']
    encoding = make_encoding(name, read_documents(files, name == 'bpe'), settings['vocab_size'])
    name = name if name in ENCODINGS else arrays.read_meta(name)['encoding']
    meta = dict(prepare='text', encoding=name, settings=settings)
    documents = read_documents(files, encoding.eot_token is not None)
    write_split(Path(settings['out']), encoding, documents, settings['val_share'], meta)


if __name__ == '__main__':
    config.run(main)
