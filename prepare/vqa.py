"""
Your own images with questions and answers: a JSONL file. Each line has one image (or several) and a conversation.

    {"image": "cat.jpg", "turns": [["What is on the sofa?", "A cat."], ["Which color is it?", "Black."]]}

    python -m prepare.vqa --input=FILE.jsonl --images=FOLDER        to data/vqa; FOLDER is the file's own if left out
    python -m prepare.vqa --input=llava_instruct_150k.json --images=FOLDER     LLaVA-Instruct's JSON is read as it is
    python train.py config/vlm_smol.py

`Template` turns a conversation into tokens, here, in prepare/scenes_qa.py and in sample.py's chat:

    IMAGE Question: What is on the sofa? Answer: A cat. END Question: Which color is it? Answer: Black. END

A conversation longer than --length tokens continues in another row, which repeats the image; a turn longer than a row
is left out. Images of any size and mode are resized to size x size RGB without keeping their proportions, as in SigLIP;
each picture is stored once. All conversations about it, or about a copy, are in the same split: training or
validation. Pictures that cannot be read are named and left out with their conversations.
"""
import hashlib
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from prepare import arrays
from prepare.files import making, tell
from prepare.pictures import read_picture
from prepare.text_tokenizers import encode, known_words, load_words

MAKES = 'data/vqa'
SETTINGS = dict(
    input='',        # the file of conversations
    images='',       # the folder of its images
    out=MAKES,       # the data folder
    size=224,        # pixels per side
    length=256,      # tokens per row, images included
    val_share=0.02,  # fraction of the conversations that is held out
    seed=0,
)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations as tokens

class Template:
    """Turns of question and answer as ids; `image` is the image token, `end` follows each answer. If `thinks`, the
    model generates a chain of thought and ' Answer:' before the answer (prepare/scenes_qa.py)."""
    def __init__(self, encoding, end, image, thinks=False):
        self.encoding, self.end, self.image, self.thinks = encoding, end, image, thinks

    def encode_question(self, question, n_images=0):
        """Return the ids before a reply: image tokens, question, ' Answer:' unless it thinks. Raises UserError."""
        question = question.strip()
        if not question:
            raise UserError('an empty question: write one')
        text = f' Question: {question[0].upper()}{question[1:]}' + ' Answer:' * (not self.thinks)
        return [self.image] * n_images + encode(self.encoding, text)

    def encode_reply(self, answer, thought=''):
        """Return the ids of an answer, after its thought if there is one, and of the end: the targets of training."""
        words = [*thought.split(), 'Answer:', answer.strip()] if self.thinks else [answer.strip()]
        return encode(self.encoding, ' ' + ' '.join(words)) + [self.end]

    def decode(self, ids):
        """Return the text of a reply's ids up to the end token, with its thought if there is one."""
        ids = [int(i) for i in ids if i >= 0]
        return self.encoding.decode(ids[:ids.index(self.end)] if self.end in ids else ids).strip()

    def fits(self, turn, length, n_images=1):
        """Return whether a row of `length` tokens can hold the turn (question, answer[, thought]) and its images."""
        question, *reply = turn
        return len(self.encode_question(question, n_images)) + len(self.encode_reply(*reply)) <= length

    def rows(self, turns, length, n_images=1):
        """Turn [(question, answer[, thought]), ...] into rows [(tokens, loss_mask), ...], both (length,). Each row
        begins with the image tokens. A turn that does not fit is left out."""
        rows, tokens, loss_mask = [], [], []
        for question, *reply in (turn for turn in turns if self.fits(turn, length, n_images)):
            question, reply = self.encode_question(question), self.encode_reply(*reply)
            if tokens and len(tokens) + len(question) + len(reply) > length:
                rows.append((tokens, loss_mask))
                tokens, loss_mask = [], []
            question = question if tokens else [self.image] * n_images + question
            tokens, loss_mask = tokens + question + reply, loss_mask + [0] * len(question) + [1] * len(reply)
        rows += [(tokens, loss_mask)] if tokens else []
        return [(ids + [-1] * (length - len(ids)), mask + [0] * (length - len(ids))) for ids, mask in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Images

def read_resized(path, size):
    """Return an image file of any kind as (size, size, 3) uint8, see pictures.read_picture. Raises UserError."""
    image = read_picture(path)
    if min(image.size) < 2:
        raise UserError(f'{path}: {image.width}x{image.height} pixels show nothing; give a larger image')
    return np.asarray(image.resize((size, size), Image.BICUBIC))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, for sample.py and lab/

class Dataset:
    """Encodes questions, decodes answers and reads images, for any data folder of conversations."""
    def __init__(self, folder):
        self.folder, self.meta = Path(folder), json.loads(Path(folder, 'meta.json').read_text(encoding='utf-8'))
        self.size = self.meta['config']['image_size']
        self.template = load_template(self.meta['encoding'], self.folder, self.meta.get('thinks', False))

    def images(self, split, index):
        """Return the images with these numbers: (n, H, W, 3) uint8, or (n, m, H, W, 3) for an index (n, m)."""
        return arrays.load(Path(self.folder, split, self.meta['files']['image'].format(split=split) + '.npy'))[index]

    def read_image(self, path):
        return read_resized(path, self.size)

    def questions(self, split, name='questions'):
        """Return the lines of a JSONL file of questions: dicts with image (its number), turns and families."""
        text = Path(self.folder, split, f'{name}.jsonl').read_text(encoding='utf-8')
        return [json.loads(line) for line in text.splitlines()]

    def own_question(self, text):
        """Return a user's question; for a closed vocabulary as the data set's are: with a capital, single spaces and a
        question mark. Raises UserError if its words or bytes are not those of the data set."""
        if self.meta['encoding'] == 'smollm2' or not text.strip():
            return text
        text = ' '.join(text.split())
        text = f' {text[0].upper()}{text[1:]}' + '?' * (text[-1] not in '.?')
        examples = [f' {question}' for line in self.questions('val')[:100] for question, _ in line['turns']]
        return known_words(self.template.encoding, text, examples).strip()

    def decode(self, ids):
        return self.template.decode(ids)


def load_template(name, folder=None, thinks=False):
    """Return a Template of an encoding: SmolLM2's, or the vocabulary of the folder's words.json and an image token."""
    if name == 'smollm2':
        from prepare import smollm2  # tiktoken alone is needed for it
        encoding = smollm2.encoding()
        return Template(encoding, encoding.eot_token, encoding.encode_single_token('<filename>'), thinks)
    encoding = load_words(folder / 'words.json')
    return Template(encoding, encoding.n_vocab - 1, encoding.n_vocab, thinks)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing

def check_line(line):
    """Turn {"image": name or names, "turns": [[q, a], ...]} into (names, turns). Raises ValueError with the fault."""
    if not isinstance(line, dict) or {'image', 'turns'} - line.keys():
        raise ValueError('write {"image": ..., "turns": [[question, answer], ...]}')
    names = line['image'] if isinstance(line['image'], list) else [line['image']]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'image={line["image"]!r} is no file name')
    if not isinstance(line['turns'], list) or not line['turns']:
        raise ValueError('turns is not a list of questions and answers')
    for turn in line['turns']:
        texts = turn if isinstance(turn, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'the turn {str(turn)[:60]} is not [question, answer], two texts that are not empty')
    names = [os.path.normpath(name.replace('\\', '/')) for name in names]  # a.png and .\\a.png are one image
    return names, line['turns']


def from_llava(entry):
    """Turn an entry of LLaVA-Instruct's JSON into a line of ours, {} if it has no image. Raises ValueError. Some
    programs write "images" for "image"."""
    if not isinstance(entry, dict) or not isinstance(entry.get('conversations'), list):
        raise ValueError('not an entry of LLaVA-Instruct: it has no conversations')
    if not {'image', 'images'} & entry.keys():
        return {}
    image = entry.get('image', entry.get('images'))
    if not all(isinstance(part, dict) and isinstance(part.get('value'), str) for part in entry['conversations']):
        raise ValueError('conversations is not a list of {"from": "human" or "gpt", "value": "a text"}')
    said = [(part.get('from'), part['value'].replace('<image>', '').strip()) for part in entry['conversations']]
    if [who for who, _ in said] != ['human', 'gpt'] * (len(said) // 2):
        raise ValueError('human and gpt do not take turns')
    return dict(image=image, turns=[[q, a] for (_, q), (_, a) in zip(said[::2], said[1::2])])


def read_conversations(path):
    """Return the file's conversations as [(names, turns), ...]. Raises UserError with the place of the first fault."""
    conversations, place = [], path
    try:
        text = path.read_text(encoding='utf-8-sig')
        array = text.lstrip().startswith('[')  # one JSON array, or a JSON object per line
        if array:
            entries = [(f'{path}, entry {i}', entry) for i, entry in enumerate(json.loads(text), 1)]
        else:
            entries = [(f'{path}, line {i}', line) for i, line in enumerate(text.split('\n'), 1) if line.strip()]
        for place, entry in entries:
            line = entry if array else json.loads(entry)
            if isinstance(line, dict) and 'conversations' in line:
                line = from_llava(line)
            if line:
                conversations.append(check_line(line))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{place}: {error}')
    tell([f'{path}: {n} conversations without an image'] if (n := len(entries) - len(conversations)) else [])
    if not conversations:
        raise UserError(f'{path}: holds no conversations about images')
    if len(counts := {len(names) for names, _ in conversations}) > 1:
        raise UserError(f'{path}: conversations have {min(counts)} to {max(counts)} images; give each the same number')
    return conversations


def split_by_image(conversations, n_val, random):
    """Return the indices of the conversations (names, turns) in each split, {split: list}, in random order.
    Conversations that share an image, directly or through others, are one group, which is in one split. Groups with at
    most n_val conversations in total are for validation, or else the smallest group."""
    leader = {}  # image -> another image of its group, or itself: a union-find structure

    def find(name):
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name
    for names, _ in conversations:
        for name in names:
            leader[find(name)] = find(names[0])
    groups = [find(names[0]) for names, _ in conversations]
    order, sizes, chosen = random.permutation(len(conversations)).tolist(), Counter(groups), set()
    for i in order:
        if groups[i] not in chosen and sizes[groups[i]] <= n_val:
            chosen.add(groups[i])
            n_val -= sizes[groups[i]]
    chosen = chosen or {min(sizes, key=sizes.get)}
    return dict(val=[i for i in order if groups[i] in chosen], train=[i for i in order if groups[i] not in chosen])


def write_rows(folder, rows, image_index):
    """Write a split's rows [(tokens, loss_mask)] and the numbers of their images, (n,) or (n, m)."""
    if not rows:
        raise UserError(f'{folder}: no conversations are left to write; give more of them')
    if not all(rows):
        raise UserError(f'{folder}: a conversation without a turn that fits: raise --length, ask at least one question')
    tokens, loss_mask = (np.array(part) for part in zip(*rows))
    arrays.write(folder, dict(tokens=tokens.astype(np.int32), loss_mask=loss_mask.astype(np.uint8), scene=image_index))


def find_copies(images, names, size):
    """Return {name: the first file of the same pixels} of the pictures in the folder `images` that can be read. Prints
    a line for each other one."""
    first, copies, faults = {}, {}, []
    for name in tqdm(names, desc='check images', unit='image'):
        forms = name, *(unicodedata.normalize(form, name) for form in ('NFC', 'NFD'))  # é as one character or as two
        file = next((file for file in forms if (images / file).exists()), name)
        try:
            copies[name] = first.setdefault(hashlib.sha256(read_resized(images / file, size)).digest(), file)
        except UserError as error:
            faults.append(error)
    tell(faults)
    return copies


def write_questions(path, images, talks, families=None):
    """Write the conversations as text, one per line, for scores and drawings: numbers of images, turns, families."""
    families = families or [[''] * len(talk) for talk in talks]
    lines = [json.dumps(dict(image=image, turns=talk, families=names))
             for image, talk, names in zip(images, talks, families)]
    with arrays.writing(path) as file:
        file.write(''.join(f'{line}\n' for line in lines).encode())


@making()
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if not settings['input']:
        raise UserError('which conversations? python -m prepare.vqa --input=FILE.jsonl --images=FOLDER')
    if not 0 < settings['val_share'] < 1:
        raise UserError(f'val_share={settings["val_share"]} must be between 0 and 1')
    path, out, length, size = Path(settings['input']), Path(settings['out']), settings['length'], settings['size']
    images, conversations = Path(settings['images'] or path.parent), read_conversations(path)
    template = load_template('smollm2')
    conversations = drop_long_turns(conversations, template, length, path)
    copies = find_copies(images, dict.fromkeys(name for names, _ in conversations for name in names), size)
    conversations = [([copies[name] for name in names], turns) for names, turns in conversations
                     if copies.keys() >= set(names)]
    if not conversations:
        raise UserError(f'{path}: no conversation has images that can be read')
    splits = split_by_image(conversations, max(1, round(settings['val_share'] * len(conversations))),
                            np.random.default_rng(settings['seed']))
    if not splits['train']:
        raise UserError(f'{path}: {len(conversations)} conversations are too few for training and validation without a '
                        'common image')
    arrays.begin(out, 'vqa')
    for split, part in splits.items():
        part = [conversations[i] for i in part]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(name for names, _ in part for name in names))}
        arrays.write_rows(out / split, 'images', (
            read_resized(images / name, size) for name in tqdm(numbers, desc=f'{split} images', unit='image')))
        index = [[numbers[name] for name in names] for names, _ in part]
        rows = [template.rows(turns, length, len(names)) for names, turns in part]
        write_rows(out / split, [row for some in rows for row in some],
                   np.repeat(np.array(index, np.int32), [len(some) for some in rows], axis=0))
        talks = [[[question, template.decode(template.encode_reply(answer))] for question, answer in turns]
                 for _, turns in part]  # answers as a model can reproduce them
        write_questions(out / split / 'questions.jsonl', index, talks)
    write_meta(out, template, 'smollm2', length, size, len(conversations[0][0]), 'vqa', settings, 'images')


def drop_long_turns(conversations, template, length, path):
    """Return the conversations without the turns that are longer than a row; print their number. Raises UserError."""
    short = [(names, [turn for turn in turns if template.fits(turn, length, len(names))])
             for names, turns in conversations]
    before, after = (sum(len(turns) for _, turns in some) for some in (conversations, short))
    if not after:
        raise UserError(f'{path}: no turn fits into {length} tokens: raise --length')
    if after < before:
        print(f'{before - after} of {before} turns are left out: they have more than --length={length} tokens')
    return [(names, turns) for names, turns in short if turns]


def write_meta(out, template, encoding, length, size, n_images, prepare, settings, images, n_patch_labels=0,
               max_label_tokens=0):
    """Write meta.json, last: it marks the data set as complete. `images` is the name of their file. In some data sets
    patch_labels.npy has max_label_tokens words for each of n_patch_labels tokens of an image."""
    V = max(template.encoding.n_vocab, template.image + 1)
    fields = dict(tokens=V, loss_mask=2, image=256) | (dict(patch_labels=V) if max_label_tokens else {})
    model_config = dict(vocab_size=V, block_size=length, image_token=template.image, image_size=size, channels=3,
                        n_images=n_images, n_patch_labels=n_patch_labels, max_label_tokens=max_label_tokens)
    meta = dict(kind='rows', prepare=prepare, encoding=encoding, thinks=template.thinks, fields=fields,
                files=dict(image=images), index=dict(image='scene'), settings=settings, config=model_config)
    arrays.save_meta(out, meta)


if __name__ == '__main__':
    config.run(main)
