"""Text data sets: encodings, packing, bad input, TinyStories from a local server."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken.load
from hypothesis import given, settings, strategies as st

from config import UserError
from prepare import arrays, shakespeare, text, text_tokenizers, tinystories
from prepare.files import visible
from prepare.text import Dataset, first, pieces
from prepare.text_tokenizers import END, GPT2_PATTERN, Characters, load_encoding, load_words, merge, save_encoding, train_bpe
from tests.test_download import server  # noqa: F401, a fixture

CORPUS = "the cat sat on the mat; the cats' hats aaaa aaa aaaaa banana bandana 2026\n\n  the end, said the élan. " * 3
BPE = train_bpe([CORPUS], 330)


def naive_merges(corpus, n):
    """The first n merges, each by counting all pairs of all words anew."""
    counts, merges = Counter(regex.findall(GPT2_PATTERN, corpus)), []
    words = {word: list(word.encode()) for word in counts}
    for _ in range(n):
        pairs = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {word: merge(ids, best, 256 + len(merges)) for word, ids in words.items()}
        merges.append(best)
    return merges


@settings(deadline=None)
@given(st.lists(st.sampled_from(['a', 'b', 'ab', 'aab', ' ', '\n', 'é']), min_size=8, max_size=60).map(''.join))
def test_bpe_like_the_naive_one(corpus):
    encoding = train_bpe([corpus], 280)
    tokens = [bytes([i]) for i in range(256)]
    for a, b in naive_merges(corpus, encoding.n_vocab - 257):
        tokens.append(tokens[a] + tokens[b])
    assert encoding._mergeable_ranks == {token: i for i, token in enumerate(tokens)}
    assert encoding.eot_token == len(tokens)


def test_bpe_compresses():
    assert BPE.decode(BPE.encode_ordinary(' the')) == ' the' and len(BPE.encode_ordinary(' the')) == 1
    assert train_bpe(['ab'], 1000).n_vocab == 258  # no more pairs than there are
    with pytest.raises(UserError, match='vocab_size=256: byte-pair encoding needs at least 257'):
        train_bpe([CORPUS], 256)


@settings(deadline=None)
@given(st.text())
def test_bpe_round_trip(any_text):
    assert BPE.decode(BPE.encode_ordinary(any_text)) == any_text


def test_special_tokens_in_user_text_are_text(tmp_path):
    save_encoding(tmp_path / 'encoding.json', BPE)
    dataset = Dataset(tmp_path)
    ids = dataset.encode(f'a{END}b').tolist()
    assert dataset.end == BPE.n_vocab - 1 and dataset.end not in ids
    assert dataset.decode([*ids, dataset.end, -1, *ids]) == f'a{END}b' * 2


@settings(deadline=None)
@given(st.text('aé \n', max_size=300), st.integers(1, 20))
def test_pieces_do_not_change_the_tokens(document, size):
    parts = list(pieces(document, size))
    assert ''.join(parts) == document and all(parts)
    assert [i for part in parts for i in BPE.encode_ordinary(part)] == BPE.encode_ordinary(document)


def test_saved_encodings(tmp_path):
    for encoding in (BPE, Characters('ab\n')):
        save_encoding(tmp_path / 'encoding.json', encoding)
        again = load_encoding(tmp_path / 'encoding.json')
        assert again.n_vocab == encoding.n_vocab and again.eot_token == encoding.eot_token
        assert again.encode_ordinary('ab\nba') == (ids := encoding.encode_ordinary('ab\nba')) and again.decode(ids) == 'ab\nba'
    save_encoding(tmp_path / 'encoding.json', BPE)
    saved = json.loads((tmp_path / 'encoding.json').read_text())
    gap, twice = ({token: new if i == 99 else i for token, i in saved['ranks'].items()} for new in (-1, 98))
    for broken in ('{"ranks"', '[]', '{}', *(json.dumps(saved | part) for part in (
            dict(ranks=gap), dict(ranks=twice), dict(ranks={}), dict(specials={}), dict(specials=[])))):
        (tmp_path / 'encoding.json').write_text(broken)
        with pytest.raises(UserError, match='encoding.json: missing or no encoding'):
            load_encoding(tmp_path / 'encoding.json')
    for broken in ('[1]', '["ab", "ab"]', '3'):
        (tmp_path / 'words.json').write_text(broken)
        with pytest.raises(UserError, match='words.json: missing or not a vocabulary'):
            load_words(tmp_path / 'words.json')


def test_first():
    assert list(first(iter(['abc', 'def', 'ghi']), 5)) == ['abc', 'de']
    assert list(first(iter(['abc', 'def', 'ghi']), 6)) == ['abc', 'def']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files in a folder of texts, and the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in/deep').mkdir(parents=True)
    for name, content in (('b.txt', 'second one'), ('a.MD', '\ufefffirst'), ('deep/c.txt', 'third\r\n'), ('image.png', '\x00')):
        (tmp_path / 'in' / name).write_bytes(content.encode())
    return tmp_path


def stored(out):
    """All tokens of a data folder, its Dataset and its meta.json."""
    tokens = [np.load(out / split / 'tokens.npy') for split in ('train', 'val')]
    return np.concatenate(tokens), Dataset(out), json.loads((out / 'meta.json').read_text())


@pytest.mark.parametrize('encoding', ['bpe', 'gpt2', 'smollm2'])
def test_a_folder_of_texts(folder, encoding, monkeypatch):
    monkeypatch.setattr(text, 'gpt2_encoding', lambda: BPE)
    monkeypatch.setattr('prepare.smollm2.encoding', lambda: BPE)
    text.main('--input=in', f'--encoding={encoding}', *['--vocab_size=265'] * (encoding == 'bpe'), '--out=data/mine',
              '--val_share=0.25')
    tokens, dataset, meta = stored(folder / 'data/mine')
    places = np.flatnonzero(tokens == dataset.end)
    assert [dataset.decode(part.tolist()) for part in np.split(tokens, places + 1)[:-1]] == ['first', 'second one', 'third\n']
    assert places[-1] == len(tokens) - 1 and tokens.dtype == np.uint16
    assert meta['kind'] == 'stream' and meta['prepare'] == 'text' and meta['encoding'].split('-')[0] == encoding
    assert meta['fields']['tokens'] == meta['config']['vocab_size'] == dataset.end + 1
    assert meta['sizes'] == dict(train=int(0.75 * len(tokens)), val=len(tokens) - int(0.75 * len(tokens)))
    assert not list(folder.glob('data/mine/*.tmp'))


def test_the_encoding_of_another_data_set(folder):
    """To fine-tune: the same tokens, under the same name; characters that it lacks are refused."""
    text.main(input='in', encoding='bpe', vocab_size=265, out='data/first')
    (folder / 'in/b.txt').write_text('another text of second thoughts')
    text.main(input='in', encoding='data/first', out='data/second')
    (_, one, before), (tokens, two, now) = (stored(folder / f'data/{name}') for name in ('first', 'second'))
    assert now['encoding'] == before['encoding'] and one.encoding._mergeable_ranks == two.encoding._mergeable_ranks
    assert 'another text of second thoughts' in one.decode(tokens.tolist())
    text.main(input='in/deep', out='data/third', val_share=0.4)
    with pytest.raises(UserError, match="the character '.' is not in the alphabet"):
        text.main(input='in', encoding='data/third', out='data/fourth')


def test_bytes_per_token_of_each_split(folder, monkeypatch):
    """Exact: tokens that are parts of a character, too; the end token has none."""
    (folder / 'mixed.txt').write_text('plain ascii ' * 9 + '😀Ж中' * 12, encoding='utf-8')
    text.main(input='mixed.txt', encoding='bpe', vocab_size=300, val_share=0.4)
    _, dataset, meta = stored(folder / 'data/text')
    for split, measured in meta['bytes_per_token'].items():
        tokens = np.load(f'data/text/{split}/tokens.npy').tolist()
        n_bytes = len(dataset.encoding.decode_bytes([i for i in tokens if i != dataset.end]))
        assert measured == pytest.approx(n_bytes / len(tokens))
    assert meta['bytes_per_token']['train'] != meta['bytes_per_token']['val']
    (folder / 'letters.txt').write_text('ab' * 6 + 'é' * 8, encoding='utf-8')
    text.main(input='letters.txt', val_share=0.2)
    assert stored(folder / 'data/text')[2]['bytes_per_token'] == dict(train=1.25, val=2)


def test_an_exchanged_vocabulary(folder):
    """Of the same size, so that nothing else differs."""
    text.main(input='in')
    meta, path = arrays.read_meta('data/text'), folder / 'data/text/encoding.json'
    assert arrays.open_dataset(folder / 'data/text', meta).encode('one').tolist()
    path.write_text(path.read_text().replace('e', 'E'))
    with pytest.raises(UserError, match='encoding.json has changed since this data set was made: restore it, or delete'):
        arrays.open_dataset(folder / 'data/text', meta)


def test_characters(folder):
    text.main(input='in')
    tokens, dataset, meta = stored(folder / 'data/text')
    assert dataset.decode(tokens.tolist()) == 'firstsecond onethird\n' and dataset.end is None and tokens.dtype == np.uint8
    assert dataset.encode('one').tolist() == [dataset.encode(c).item() for c in 'one'] and dataset.encode('').shape == (0,)
    assert meta['bytes_per_token'] == dict(train=1, val=1)
    with pytest.raises(UserError, match="the character 'Z' is not in the alphabet '\\\\n cdef"):
        dataset.encode('oZe')


@pytest.mark.parametrize('arguments, message', [
    ([], 'which text\\? python -m prepare.text --input=FILE_OR_FOLDER'),
    (['--input=nowhere'], 'nowhere: neither a file nor a folder with text files'),
    (['--input=in/deep/none'], 'neither a file nor'),
    (['--input=in', '--encoding=words'], "encoding='words': choose one of characters, bpe, gpt2, smollm2"),
    (['--input=in', '--encoding=bpe', '--vocab_size=9'], 'vocab_size=9'),
    (['--input=in', '--val_share=1'], 'val_share=1.0 of 21 tokens leaves fewer than 2 for training or validation: change it, or'),
    (['--input=in', '--val_share=0.04'], 'val_share=0.04 of 21 tokens leaves fewer than 2'),
    (['--input=in', '--vocab_size=512'], "vocab_size is for --encoding=bpe, and encoding='characters' has a size of its own"),
    (['--input=in', '--encoding=data/none'], "encoding='data/none': choose one of .*, or the folder of a data set of text"),
    (['--input=in', '--vocabsize=9'], "unknown setting 'vocabsize'; did you mean 'vocab_size'"),
    (['--input=empty.txt'], 'empty.txt: holds no text; leave it out'),
    (['--input=latin.txt'], 'latin.txt: not UTF-8 text .*0xe9.*; convert it, or leave it out'),
    (['--input=wide.txt'], 'wide.txt: holds zero bytes: not text, or UTF-16; convert it to UTF-8'),
])
def test_bad_input(folder, arguments, message):
    (folder / 'empty.txt').write_text(' \n')
    (folder / 'latin.txt').write_bytes('élan'.encode('latin-1'))
    (folder / 'wide.txt').write_bytes('without a mark'.encode('utf-16-le'))
    with pytest.raises(UserError, match=message):
        text.main(*arguments)
    assert not (folder / 'data/text/meta.json').exists() and not list(folder.glob('data/text/*.tmp'))


def test_linked_texts(folder, capsys):
    """Links to folders are followed, in a circle and twice, too; a link to nothing is named."""
    (folder / 'other').mkdir()
    (folder / 'other/z.txt').write_text('linked')
    for name, target in (('z', 'other'), ('zz', 'other'), ('circle', 'in'), ('none.txt', 'nowhere')):
        (folder / 'in' / name).symlink_to(folder / target)
    found = visible(folder / 'in')
    assert [path.name for path in found].count('z.txt') == 1 and len(found) == len(set(path.resolve() for path in found))
    assert f'left out: {folder}/in/none.txt: a link to nothing\n' == capsys.readouterr().out


@pytest.mark.parametrize('content, message', [(b'', 'holds no stories'), ('Once, é'.encode()[:-1], 'damaged or truncated, not UTF-8')])
def test_damaged_stories(folder, monkeypatch, content, message):
    (folder / 'stories.txt').write_bytes(content)
    monkeypatch.setattr(tinystories, 'download', lambda url, name: folder / 'stories.txt')
    with pytest.raises(UserError, match=f'stories.txt: {message}.*delete it and run this again'):
        tinystories.main()


def test_hidden_copies_are_no_texts(folder):
    for name in ('.ipynb_checkpoints/b-checkpoint.txt', '._b.txt', '__MACOSX/b.txt'):
        (folder / 'in' / name).parent.mkdir(exist_ok=True)
        (folder / 'in' / name).write_bytes(b'\xff\xfe')
    text.main(input='in')
    assert stored(folder / 'data/text')[1].decode(stored(folder / 'data/text')[0].tolist()) == 'firstsecond onethird\n'


def test_copies_are_left_out(folder, capsys):
    """A copy would put text of training into validation."""
    (folder / 'in/deep/z (1).txt').write_text('third\r\n', newline='')
    text.main(input='in')
    assert stored(folder / 'data/text')[1].decode(stored(folder / 'data/text')[0].tolist()) == 'firstsecond onethird\n'
    assert 'left out: in/deep/z (1).txt: the same text as in/deep/c.txt' in capsys.readouterr().out


def test_files_of_other_kinds_are_counted(folder, capsys):
    for name in ('code.py', 'deep/more.py', 'Makefile'):
        (folder / 'in' / name).write_text('x')
    assert len(text.find_files(Path('in'))) == 3
    assert capsys.readouterr().out == ('left out: in: 4 of its files (2 .py, 1 no suffix, 1 .png); text files are *.txt, *.md, '
                                       '*.rst, *.tex\n')


@pytest.mark.parametrize('encoding, expected', [
    ('bpe', ['first', 'second one', 'new', 'last\n']), ('characters', [f'firstsecond one{END}\nnew\n{END}last\n'])])
def test_end_tokens_within_a_file(folder, encoding, expected):
    """They end a document, if the encoding has an end token; else they are text like any other."""
    (folder / 'in/b.txt').write_text(f'second one{END}\nnew\n{END}')
    (folder / 'in/deep/c.txt').write_text('last\n')
    text.main(input='in', encoding=encoding, val_share=0.3)
    tokens, dataset, _ = stored(folder / 'data/text')
    parts = [part for part in np.split(tokens, np.flatnonzero(tokens == dataset.end) + 1) if len(part)]
    assert [dataset.decode(part.tolist()) for part in parts] == expected


def test_a_large_alphabet():
    with pytest.raises(UserError, match="the character 'x' is not in the alphabet '.{100}' ... of 5000 characters"):
        Characters(''.join(map(chr, range(0x4e00, 0x4e00 + 5000)))).encode_ordinary('x')


@pytest.mark.parametrize('document', ['x' * 400_000, ' ' * 1_100_000, 'ab ' * 9 + '\n' * 230_000 + 'a' * 99_999 + ' b'])
def test_long_runs(document):
    """tiktoken panics at a million spaces, and takes hours for words of millions of characters."""
    parts = list(pieces(document, 300_000))
    assert ''.join(parts) == document and max(map(len, regex.findall(r'\s+|\S+', max(parts, key=len)))) <= text_tokenizers.LONGEST_RUN
    assert ''.join(map(BPE.decode, map(BPE.encode_ordinary, parts))) == document


def test_a_prompt_of_a_million_spaces(tmp_path):
    save_encoding(tmp_path / 'encoding.json', BPE)
    assert Dataset(tmp_path).decode(Dataset(tmp_path).encode('a' + ' ' * 1_000_001).tolist()) == 'a' + ' ' * 1_000_001


def test_bpe_of_words_without_end(monkeypatch):
    """DNA, base64: the pairs are those of the parts of LONGEST characters."""
    monkeypatch.setattr(text_tokenizers, 'LONGEST', 4)
    assert train_bpe(['abcdefabcd xy'], 270)._mergeable_ranks == train_bpe(['abcd', 'efab', 'cd', ' xy'], 270)._mergeable_ranks


def test_what_fails_keeps_the_older_data(folder):
    """A file that cannot be read is found before anything is replaced."""
    text.main(input='in')
    before = (folder / 'data/text/meta.json').read_text()
    (folder / 'in/c.txt').write_bytes(b'\xff')
    for encoding in ('characters', 'gpt2'):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match='c.txt: not UTF-8'):
            patch.setattr(text, 'gpt2_encoding', lambda: BPE)
            text.main(input='in', encoding=encoding)
    assert (folder / 'data/text/meta.json').read_text() == before and not list(folder.rglob('data/text/*.tmp'))


def test_a_fault_while_a_file_is_mapped(folder, monkeypatch):
    """Windows then deletes no file; the fault is reported all the same."""
    def fault(*_):
        raise UserError('disk full')

    def refused(*_, **__):
        raise PermissionError
    monkeypatch.setattr(text, 'write', fault)
    monkeypatch.setattr(Path, 'unlink', refused)
    with pytest.raises(UserError, match='disk full'):
        text.write_split(Path('data/new'), BPE, ['a text'] * 9, 0.5, dict(prepare='text'))


def test_shakespeare(folder, server, monkeypatch):  # noqa: F811
    content = b'To be, or not to be'
    server.files['input.txt'] = content
    monkeypatch.setattr(shakespeare, 'URL', server.url + 'input.txt')
    with pytest.raises(UserError, match='sha256 is .*, expected 86c4'):
        shakespeare.main()
    monkeypatch.setattr(shakespeare, 'SHA256', '')
    shakespeare.main()
    tokens, dataset, meta = stored(folder / 'data/shakespeare')
    assert dataset.decode(tokens.tolist()) == content.decode() and meta['config'] == dict(vocab_size=len(set(content)))
    assert meta['sizes'] == dict(train=17, val=2) and shakespeare.Dataset is Dataset


def test_tinystories(folder, server, monkeypatch):  # noqa: F811
    told = [f'Once upon a time, cat {i} saw a big dog.\nThey played all day.' for i in range(40)]
    for name, part in zip(tinystories.FILES.values(), (told[:30], told[30:])):
        server.files[name] = f'\n{END}\n'.join(part + ['\n']).encode()
    monkeypatch.setattr(tinystories, 'URL', server.url)
    tinystories.main('--vocab_size=300', '--n_stories=20')
    dataset = tinystories.Dataset('data/tinystories')
    for split, expected in (('train', told[:20]), ('val', told[30:])):
        tokens = np.load(f'data/tinystories/{split}/tokens.npy')
        parts = np.split(tokens, np.flatnonzero(tokens == dataset.end) + 1)
        assert [dataset.decode(part.tolist()) for part in parts[:-1]] == expected and len(parts[-1]) == 0
    meta = json.loads((folder / 'data/tinystories/meta.json').read_text())
    assert meta['prepare'] == 'tinystories' and meta['config']['vocab_size'] == 300 and meta['bytes_per_token']['val'] > 2
    with pytest.raises(UserError, match='encoding must be bpe or gpt2'):
        tinystories.main('--encoding=characters')
    with pytest.raises(UserError, match='vocab_size is for --encoding=bpe'):
        tinystories.main('--encoding=gpt2', '--vocab_size=300')


def test_stories_across_blocks(tmp_path):
    long = 'x' * (1 << 20)
    (tmp_path / 'stories.txt').write_text(f'{long[:-5]}{END}a{END}\n\n{END}{long}b')  # the first end lies across two blocks
    assert list(tinystories.stories(tmp_path / 'stories.txt')) == [long[:-5], 'a', long + 'b']


def test_gpt2_from_a_network_with_a_login(tmp_path, monkeypatch):
    """The folder is asked for at each call: NANO_CACHE may be set after a first failure."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, 'gpt2', raising=False)
    monkeypatch.setattr(tiktoken.load, 'read_file', lambda url: b'<html>Login')
    for name, value, folder in (('NANO_CACHE', 'a', 'a/tiktoken'), ('NANO_CACHE', 'b', 'b/tiktoken'), ('TIKTOKEN_CACHE_DIR', '~/c', '/h/c')):
        monkeypatch.setenv('HOME', '/h')
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f'is not in {folder} and .* .Hash mismatch .*; run this again, or copy .*: 6d1c.* and 6c7e'):
            text_tokenizers.gpt2_encoding()


def test_gpt2_from_the_cache(monkeypatch):
    if not (text_tokenizers.cache_folder() / 'tiktoken').is_dir():
        pytest.skip('GPT-2\'s two files are not in the cache')
    encoding = text_tokenizers.gpt2_encoding()
    assert encoding.n_vocab == 50257 and encoding.encode_ordinary('Hello world') == [15496, 995] and encoding.eot_token == 50256
