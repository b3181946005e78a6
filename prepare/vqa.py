"""
Pictures with questions and answers of your own: a JSONL file, one picture (or several) and its conversation a line.

    {"image": "cat.jpg", "turns": [["What is on the sofa?", "A cat."], ["Which color is it?", "Black."]]}

    python -m prepare.vqa --input=FILE.jsonl --images=FOLDER        to data/vqa; FOLDER is the file's own if left out
    python -m prepare.vqa --input=llava_instruct_150k.json --images=FOLDER     LLaVA-Instruct's JSON is read as it is
    python train.py config/vlm_smol.py

`Template` is how a conversation becomes tokens, here, in prepare/scenes_qa.py and in sample.py's chat alike:

    PICTURE Question: What is on the sofa? Answer: A cat. END Question: Which color is it? Answer: Black. END

A conversation longer than --length tokens goes on in a further row, which shows the picture again. Pictures of any size and mode
become size x size RGB, without regard to their proportions, as SigLIP has them; each file is stored once.
"""
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from prepare import arrays
from prepare.pictures import read_picture
from prepare.text_tokenizers import load_words

MAKES = 'data/vqa'
SETTINGS = dict(
    input='',        # the file of conversations
    images='',       # the folder of its images
    out=MAKES,       # the data folder
    size=224,        # pixels of a side
    length=256,      # longest conversation, in tokens
    val_share=0.02,  # fraction of the conversations that is held out
    seed=0,
)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations as tokens

class Template:
    """Turns of question and answer as ids; `image` is the id that stands for a picture, `end` closes an answer. One that `thinks`
    leaves it to the model to say ' Answer:', when it has thought (prepare/scenes_qa.py)."""
    def __init__(self, encoding, end, image, thinks=False):
        self.encoding, self.end, self.image, self.thinks = encoding, end, image, thinks

    def ask(self, question, n_images=0):
        """The ids that lead to a reply: pictures, the question, and the word that asks for the answer. Raises UserError."""
        question = question.strip()
        if not question:
            raise UserError('an empty question: write one')
        text = f' Question: {question[0].upper()}{question[1:]}' + ' Answer:' * (not self.thinks)
        return [self.image] * n_images + self.encoding.encode_ordinary(text)

    def reply(self, answer, thought=''):
        """The ids of an answer, with the thought before it, and of its end: what is learned."""
        words = [*thought.split(), 'Answer:', answer.strip()] if self.thinks else [answer.strip()]
        return self.encoding.encode_ordinary(' ' + ' '.join(words)) + [self.end]

    def rows(self, turns, length, n_images=1):
        """Turns [(question, answer[, thought]), ...] -> rows [(tokens, counted), ...], both (length,), as many as needed, each
        with its pictures in front; a turn that no row can hold is left out."""
        rows, tokens, counted = [], [], []
        for question, *answer in turns:
            ask, reply = self.ask(question), self.reply(*answer)
            if n_images + len(ask) + len(reply) > length:
                continue
            if tokens and len(tokens) + len(ask) + len(reply) > length:
                rows.append((tokens, counted))
                tokens, counted = [], []
            ask = ask if tokens else [self.image] * n_images + ask
            tokens, counted = tokens + ask + reply, counted + [0] * len(ask) + [1] * len(reply)
        rows += [(tokens, counted)] if tokens else []
        return [(ids + [-1] * (length - len(ids)), flags + [0] * (length - len(ids))) for ids, flags in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def read_resized(path, size):
    """A picture file of any kind -> (size, size, 3) uint8, see pictures.read_picture. Raises UserError."""
    image = read_picture(path)
    if min(image.size) < 2:
        raise UserError(f'{path}: {image.width}x{image.height} pixels show nothing; give a larger picture')
    return np.asarray(image.resize((size, size), Image.BICUBIC))


# ---------------------------------------------------------------------------------------------------------------------
# The folder as sample.py sees it

class Fields:
    """Encodes questions, decodes answers and reads pictures, for any data folder of conversations."""
    def __init__(self, folder):
        self.folder, self.meta = Path(folder), json.loads(Path(folder, 'meta.json').read_text())
        self.size = self.meta['config']['image_size']
        self.template = template(self.meta['encoding'], self.folder, self.meta.get('thinks', False))

    def pictures(self, split, index):
        """The pictures with these numbers: (n, H, W, 3) uint8, or (n, m, H, W, 3) for an index (n, m)."""
        return arrays.load(Path(self.folder, split, self.meta['files']['image'].format(split=split) + '.npy'))[index]

    def read_image(self, path):
        return read_resized(path, self.size)

    def questions(self, split, name='questions'):
        """The lines of a JSONL file of questions: dicts with image (its number), turns and, where there are any, families."""
        return [json.loads(line) for line in Path(self.folder, split, f'{name}.jsonl').read_text().splitlines()]

    def decode(self, ids):
        """A reply's ids -> its text, with the thought if there is one."""
        ids = [int(i) for i in ids if i >= 0]
        return self.template.encoding.decode(ids[:ids.index(self.template.end)] if self.template.end in ids else ids).strip()


def template(name, folder=None, thinks=False):
    """The Template of an encoding: SmolLM2's, or the closed vocabulary in the folder's words.json, then a picture."""
    if name == 'smollm2':
        from prepare import smollm2  # tiktoken alone is needed for it
        encoding = smollm2.encoding()
        return Template(encoding, encoding.eot_token, encoding.encode_single_token('<filename>'), thinks)
    encoding = load_words(folder / 'words.json')
    return Template(encoding, encoding.n_vocab - 1, encoding.n_vocab, thinks)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing

def check_line(line):
    """({"image": name or names, "turns": [[q, a], ...]}) -> (names, turns). Raises ValueError that says what is wrong."""
    if not isinstance(line, dict) or {'image', 'turns'} - line.keys():
        raise ValueError('write {"image": ..., "turns": [[question, answer], ...]}')
    names = line['image'] if isinstance(line['image'], list) else [line['image']]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'image={line["image"]!r} is no file name')
    if not isinstance(line['turns'], list) or not line['turns']:
        raise ValueError('turns is not a list of questions and answers')
    for turn in line['turns']:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) and text.strip() for text in turn):
            raise ValueError(f'the turn {str(turn)[:60]} is not [question, answer], two texts that are not empty')
    return names, line['turns']


def from_llava(entry):
    """One entry of LLaVA-Instruct's JSON -> a line of ours, {} where it has no picture. Raises ValueError."""
    if not isinstance(entry, dict) or not isinstance(entry.get('conversations'), list):
        raise ValueError('not an entry of LLaVA-Instruct: it has no conversations')
    if 'image' not in entry:
        return {}
    said = [(part['from'], part['value'].replace('<image>', '').strip()) for part in entry['conversations']]
    if [who for who, _ in said] != ['human', 'gpt'] * (len(said) // 2):
        raise ValueError('human and gpt do not take turns')
    return dict(image=entry['image'], turns=[[q, a] for (_, q), (_, a) in zip(said[::2], said[1::2])])


def read_conversations(path):
    """The file's conversations as [(names, turns), ...]. Raises UserError with the place of the first fault."""
    conversations, place = [], path
    try:
        text = path.read_text(encoding='utf-8-sig')
        if path.suffix == '.json':
            entries = [(f'{path}, entry {i}', entry) for i, entry in enumerate(json.loads(text), 1)]
        else:
            entries = [(f'{path}, line {i}', line) for i, line in enumerate(text.split('\n'), 1) if line.strip()]
        for place, entry in entries:
            line = from_llava(entry) if path.suffix == '.json' else json.loads(entry)
            if line:
                conversations.append(check_line(line))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{place}: {error}')
    if not conversations:
        raise UserError(f'{path}: holds no conversations')
    if len(counts := {len(names) for names, _ in conversations}) > 1:
        raise UserError(f'{path}: conversations have {min(counts)} to {max(counts)} pictures; give each equally many')
    return conversations


def write_rows(folder, rows, image_index):
    """One split's rows [(tokens, counted)] and the numbers of their pictures (n,) or (n, m)."""
    if not rows:
        raise UserError(f'{folder}: no conversations are left to write; take more scenes')
    if not all(rows):
        raise UserError(f'{folder}: a conversation without a turn that fits: raise --length, ask at least one question')
    folder.mkdir(parents=True, exist_ok=True)
    tokens, counted = (np.array(part) for part in zip(*rows))
    for name, array in dict(tokens=tokens.astype(np.int32), counted=counted.astype(np.uint8), scene=image_index).items():
        np.save(folder / f'{name}.npy', array)


def write_questions(path, images, talks, families=None):
    """The conversations once more as text, a line each, to score and draw: numbers of pictures, turns, families of questions."""
    families = families or [[''] * len(talk) for talk in talks]
    lines = [json.dumps(dict(image=image, turns=talk, families=kinds)) for image, talk, kinds in zip(images, talks, families)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{line}\n' for line in lines))


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    if not settings['input']:
        raise UserError('which conversations? python -m prepare.vqa --input=FILE.jsonl --images=FOLDER')
    if settings['size'] < 1:
        raise UserError(f'size={settings["size"]}: must be at least 1')
    path, out, size = Path(settings['input']), Path(settings['out']), settings['size']
    conversations, images, way = read_conversations(path), Path(settings['images'] or path.parent), template('smollm2')
    (out / 'meta.json').unlink(missing_ok=True)
    order = np.random.default_rng(settings['seed']).permutation(len(conversations))
    n_val = max(1, round(settings['val_share'] * len(order)))
    if n_val >= len(order):
        raise UserError(f'{path}: {len(order)} conversations are too few for training and validation')
    for split, part in (('val', order[:n_val]), ('train', order[n_val:])):
        rows, index = [], []
        numbers = {name: i for i, name in enumerate(dict.fromkeys(name for i in part for name in conversations[i][0]))}
        for i in part:
            names, turns = conversations[i]
            new = way.rows(turns, settings['length'], len(names))
            rows += new
            index += [[numbers[name] for name in names]] * len(new)
        if not rows:
            raise UserError(f'{path}: no turn fits into {settings["length"]} tokens: raise --length')
        write_rows(out / split, rows, np.array(index, np.int32))
        pictures = np.lib.format.open_memmap(out / split / 'pictures.npy', 'w+', np.uint8, (len(numbers), size, size, 3))
        for name, i in tqdm(numbers.items(), desc=f'{split} pictures', unit='picture'):
            pictures[i] = read_resized(images / name, size)
        write_questions(out / split / 'questions.jsonl', [[numbers[name] for name in conversations[i][0]] for i in part],
                        [conversations[i][1] for i in part])
    write_meta(out, way, 'smollm2', settings['length'], size, len(conversations[0][0]), 'vqa', settings, 'pictures')


def write_meta(out, way, encoding, length, size, n_images, prepare, settings, pictures, n_named=0, n_names=0):
    """meta.json, last: its presence says that all is there. `pictures` names the file that holds them; where there is names.npy,
    it has n_names words for each of n_named tokens of a picture."""
    V = max(way.encoding.n_vocab, way.image + 1)
    fields = dict(tokens=V, counted=2, image=256) | (dict(names=V) if n_names else {})
    model_config = dict(vocab_size=V, block_size=length, image_token=way.image, image_size=size, channels=3, n_images=n_images,
                        n_named=n_named, n_names=n_names)
    meta = dict(kind='rows', prepare=prepare, encoding=encoding, thinks=way.thinks, fields=fields, files=dict(image=pictures),
                index=dict(image='scene'), settings=settings, config=model_config)
    arrays.save_meta(out, meta)


if __name__ == '__main__':
    config.run(main)
