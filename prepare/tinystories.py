"""
TinyStories (Eldan and Li, arXiv 2305.07759): 2.7 million short stories in the words of a small child, written by GPT-4.

    python -m prepare.tinystories                                       4,096 tokens of byte-pair encoding
    python -m prepare.tinystories --encoding=gpt2 --n_stories=100000    GPT-2's 50,257 tokens; fewer training stories

Two public files, 2.2 GB and 22 MB, are downloaded once into the cache folder NANO_CACHE. The stories are concatenated
into one sequence of tokens, with an end token after each.
"""
from itertools import islice
from pathlib import Path

import config
from config import UserError
from prepare import arrays
from prepare.download import download
from prepare.files import making
from prepare.text import Dataset, check_vocab_size, make_encoding, pack, write  # Dataset: for sample.py
from prepare.text_tokenizers import END

URL = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/'
FILES = dict(train='TinyStoriesV2-GPT4-train.txt', val='TinyStoriesV2-GPT4-valid.txt')
MAKES = 'data/tinystories'
SETTINGS = dict(
    encoding='bpe',   # bpe (trained on the stories) or gpt2
    vocab_size=4096,  # of bpe
    n_stories=0,      # for training; 0 is all
    out=MAKES,        # the data folder
)


def stories(path):
    """Yields the stories of a file, without white space around them. Raises UserError."""
    rest = ''
    try:
        with open(path, encoding='utf-8') as file:
            while block := file.read(1 << 20):
                *whole, rest = (rest + block).split(END)
                yield from filter(None, map(str.strip, whole))
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: damaged or truncated, not UTF-8 text ({error}); delete it and run this again')
    if rest.strip():
        yield rest.strip()


@making()
def main(*arguments, **overrides):
    assigned = config.read(arguments, overrides)
    settings = config.apply(assigned, SETTINGS)
    check_vocab_size(assigned, settings['encoding'])
    if settings['encoding'] not in ('bpe', 'gpt2') or settings['n_stories'] < 0:
        raise UserError('encoding must be bpe or gpt2, n_stories at least 0 (all)')
    folder, paths = Path(settings['out']), {split: download(URL + name, name) for split, name in FILES.items()}
    for path in paths.values():
        if next(stories(path), None) is None:
            raise UserError(f'{path}: holds no stories; delete it and run this again')
    encoding = make_encoding(settings['encoding'], stories(paths['train']), settings['vocab_size'])
    documents = dict(train=islice(stories(paths['train']), settings['n_stories'] or None), val=stories(paths['val']))
    arrays.begin(folder, 'tinystories')
    splits = {split: pack(folder / f'{split}.tmp', encoding, documents[split]) for split in FILES}
    write(folder, encoding, splits, dict(prepare='tinystories', encoding=settings['encoding'], settings=settings))
    del splits  # Windows deletes no file that is mapped
    for split in FILES:
        (folder / f'{split}.tmp').unlink()


if __name__ == '__main__':
    config.run(main)
