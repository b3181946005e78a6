"""
Tiny Shakespeare as characters: 65 symbols, 1,003,854 for training and 111,540 for validation.

    python -m prepare.shakespeare

The text (Karpathy's char-rnn, 2015) is downloaded once into the cache folder NANO_CACHE. On a machine without
internet, copy it there as tinyshakespeare.txt. Its hash is checked in both cases.
"""
from pathlib import Path

import config
from prepare.download import download
from prepare.files import making
from prepare.text import Dataset, make_encoding, write_split  # Dataset: for sample.py

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
MAKES = 'data/shakespeare'


@making()
def main(*arguments, **overrides):
    config.apply(config.read(arguments, overrides), {})  # no settings
    text = download(URL, 'tinyshakespeare.txt', SHA256).read_text(encoding='utf-8')
    meta = dict(prepare='shakespeare', encoding='characters')
    write_split(Path(MAKES), make_encoding('characters', [text], 0), [text], 0.1, meta)


if __name__ == '__main__':
    config.run(main)
