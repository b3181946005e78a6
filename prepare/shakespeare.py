"""
Tiny Shakespeare as characters: 65 symbols, 1,003,854 for training and 111,540 for validation.

    python -m prepare.shakespeare

The text (Karpathy's char-rnn, 2015) is downloaded once into the cache folder NANO_CACHE, or found there under the name
tinyshakespeare.txt on a machine without internet; its hash is checked either way.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import requests
import torch

from config import UserError
from prepare.text_tokenizers import cache_folder

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
FOLDER = Path('data/shakespeare')


def download(url, path, sha256):
    """The file at `path`, fetched from url if it is not there yet; UserError where it cannot be had or differs."""
    if not path.is_file():
        print(f'downloading {url}')
        try:
            answer = requests.get(url, timeout=30)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise UserError(f'{url} cannot be reached ({type(error).__name__}); copy the file to {path}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.part').write_bytes(answer.content)
        os.replace(path.with_suffix('.part'), path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f'{path}: sha256 is {found}, expected {sha256}; delete it and run this again')
    return path


class Fields:
    """Characters of the data folder: text -> ids (T,), ids -> text."""
    def __init__(self, folder):
        self.alphabet = json.loads(Path(folder, 'meta.json').read_text())['alphabet']

    def encode(self, text):
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise UserError(f'the character {unknown[0]!r} never occurs in the training text; its alphabet is {self.alphabet!r}')
        return torch.tensor([self.alphabet.index(c) for c in text])

    def decode(self, ids):
        return ''.join(self.alphabet[i] for i in ids)


def main():
    text = download(URL, cache_folder() / 'tinyshakespeare.txt', SHA256).read_text()
    alphabet = ''.join(sorted(set(text)))
    ids = np.array([alphabet.index(c) for c in text], np.uint8)
    for split, part in (('train', ids[:1003854]), ('val', ids[1003854:])):
        (FOLDER / split).mkdir(parents=True, exist_ok=True)
        np.save(FOLDER / split / 'tokens.npy', part)
    meta = dict(kind='stream', fields=dict(tokens=len(alphabet)), config=dict(vocab_size=len(alphabet)), alphabet=alphabet)
    (FOLDER / 'meta.json').write_text(json.dumps(meta, indent=1))  # last: its presence says that all is there
    print(f'{FOLDER}: {len(alphabet)} symbols, {len(ids):,} characters')


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
