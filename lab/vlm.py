"""
Chapter 5's models at work: answers to questions about images, a chat, and scores by kind of question.

    python sample.py --out_dir=out/vlm_scenes
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"
    python -m lab.score --out_dir=out/vlm_scenes --blind=out/vlm_scenes_blind
"""
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lab
from config import UserError
from lab import options
from lab.figures import save_answers
from lab.statistics import alone, bootstrap


@dataclass
class Answers:
    image: str = ''            # your image file; several with commas between; '': held-out images and their questions
    text: str = ''             # a question about it
    prompts: str = ''          # a file with one question a line, each asked about each image
    chat: bool = False         # questions from the keyboard, until an empty line
    n: int = 6                 # held-out images
    max_new_tokens: int = 500  # the longest answer
    temperature: float = 0.0   # 0: always the most probable token
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability
    seed: int = 0              # of everything random


@dataclass
class Scores:
    n_score: int = 1000        # held-out images
    blind: str = ''            # a run of the same data with blind=True, whose scores are shown beside these
    max_new_tokens: int = 32   # the longest answer
    temperature: float = 0.0   # 0: always the most probable token
    top_k: int = 0             # only the k most probable tokens; 0: all
    top_p: float = 1.0         # only the most probable tokens that together hold this probability
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability
    seed: int = 0              # of everything random


def settings_of(run):
    return Answers()


def scores_of(run):
    return Scores()


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers

def look(run, images, n=1):
    """Reads images (S, m, H, W, C) once, for n questions about each; returns the cache that these continue."""
    prompt = torch.full(images.shape[:2], run.fields.template.image)
    return run.model.read(prompt.to(run.device), torch.as_tensor(np.array(images)).to(run.device), n)


def ask(run, cache, questions, settings, first=()):
    """The stream of answers (B,) to B questions of any lengths, after what the cache holds and the tokens `first`."""
    template = run.fields.template
    tokens = lab.left_pad([[*first, *template.ask(question)] for question in questions])
    room = run.model.length - cache.filled
    if tokens.size(1) >= room:
        raise UserError(f'the question has {tokens.size(1)} tokens, and the context has room for {room}, the answer included: '
                        'shorten it')
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    return run.model.stream(tokens.to(run.device), cache, settings.max_new_tokens, settings.temperature, settings.top_k,
                            settings.top_p, settings.min_p, template.end, generator)


def answers(run, images, questions, settings):
    """One reply each to S lists of n questions about S images (S, m, H, W, C): lists of lists of texts."""
    n = len(questions[0])
    with run.exact():
        tokens = list(ask(run, look(run, images, n), [question for row in questions for question in row], settings))
    texts = [run.fields.decode(ids) for ids in torch.stack(tokens, 1).tolist()]
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def final(reply):
    """The answer of a reply, without the thought if there is one."""
    return reply.rpartition('Answer:')[2].strip()


def in_rows(images, n):
    """Images of n conversations, one (H, W, C) or several each -> (n, m, H, W, C)."""
    return images.reshape(n, -1, *images.shape[-3:])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and chatting

def draw(run, settings, path):
    """Held-out images with questions, answers and marks at `path`; or answers about the user's own, on the screen."""
    options.apart(settings, 'chat', 'text', 'prompts')
    options.apart(settings, 'prompts', 'text')
    if settings.image:
        return own_questions(run, settings)
    if settings.chat or settings.text or settings.prompts:
        raise UserError('questions need --image=FILE, the image that they are about')
    lines = run.fields.questions(run.split)[:settings.n]
    images = in_rows(run.fields.pictures(run.split, [line['image'] for line in lines]), len(lines))
    turns = [(6 * line['turns'])[:6] for line in lines]  # equally many about each
    replies = answers(run, images, [[question for question, _ in row] for row in turns], settings)
    talks = [list(dict.fromkeys((question, final(reply), truth) for (question, truth), reply in zip(*rows)))
             for rows in zip(turns, replies)]
    save_answers(images[:, 0], talks, path)


def own_questions(run, settings):
    """Answers to the user's questions about the user's images; each question is asked about each image."""
    images, m = np.stack([run.fields.read_image(file) for file in settings.image.split(',')]), run.model.config.n_images
    if len(images) % m:
        raise UserError(f'{len(images)} images, and this model reads {m} at a time')
    images = in_rows(images, len(images) // m)
    if settings.chat:
        with run.exact():
            return chat(run, images[:1], settings)
    texts = lab.read_lines(settings.prompts) if settings.prompts else [settings.text]
    for row in answers(run, images, [texts] * len(images), settings):
        print('\n'.join(row))


def read_question():
    """A line from the keyboard; '' after Ctrl-D or Ctrl-C."""
    try:
        return input('> ').strip()
    except (EOFError, KeyboardInterrupt):
        return ''


def chat(run, images, settings):
    """Questions from the keyboard, answers word by word; images and all earlier turns stay in the cache."""
    cache, last = look(run, images), []
    print('Ask about the image; an empty line ends.')
    while question := read_question():
        ids, shown = [], ''
        try:
            stream = ask(run, cache, [question], settings, last)
        except UserError:  # the context is full: only the images are kept
            cache = look(run, images)
            stream = ask(run, cache, [question], settings)
        for token in stream:
            ids.append(int(token))
            text = run.fields.decode(ids)
            if not text.endswith('\ufffd'):  # otherwise the token ends within a character
                print(text[len(shown):], end='', flush=True)
                shown = text
        last = ids[-1:]  # not in the cache yet
        print()


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yields scores: the fraction of answers that are right to the letter, each question asked by itself, by family; as
    baseline the family's most frequent answer; then answers about another image, and those of a model that was trained
    without images."""
    other = open_blind(run, settings.blind) if settings.blind else None
    (found, rate), baselines = right_answers(run, settings), majority_scores(run, settings)
    yield {family: bootstrap(parts) | dict(baseline=baselines[family]) for family, parts in sorted(found.items())} | {
        'answers/s': alone(rate, int(found['all'][..., 1].sum()))}
    yield titled('another picture', right_answers(run, settings, shift=1)[0])
    if other:
        yield titled('no picture', right_answers(other, settings)[0])
    if Path(run.folder, run.split, 'new_pairs.jsonl').is_file():
        yield titled('new pairs', right_answers(run, settings, 'new_pairs')[0])


def titled(title, families):
    return {f'{title}: {family}': bootstrap(parts) for family, parts in sorted(families.items())}


def right_answers(run, settings, name='questions', shift=0):
    """{family: (n, 1, 2)}, right and all answers about each image, and answers a second; shift > 0 shows another image."""
    lines, families, total = run.fields.questions(run.split, name)[:settings.n_score], {}, 0
    shown, started = np.roll([line['image'] for line in lines], shift, 0), time.perf_counter()
    for start in tqdm(range(0, len(lines), 32), desc=f'score {name}', unit='batch', leave=False):
        part = lines[start:start + 32]
        most = max(len(line['turns']) for line in part)
        images = in_rows(run.fields.pictures(run.split, shown[start:start + 32]), len(part))
        questions = [[question for question, _ in (most * line['turns'])[:most]] for line in part]
        for i, (line, row) in enumerate(zip(part, answers(run, images, questions, settings)), start):
            for (_, truth), family, reply in zip(line['turns'], line['families'], row):
                for key in {family or 'all', 'all'}:
                    families.setdefault(key, np.zeros((len(lines), 1, 2)))[i, 0] += (final(reply) == truth, 1)
                total += 1
    return families, total / (time.perf_counter() - started)


def majority_scores(run, settings):
    """{family: the fraction of questions whose answer is the family's most frequent one in training}."""
    counts, hits = {}, {}
    for line in run.fields.questions('train')[:5000]:
        for (_, answer), family in zip(line['turns'], line['families']):
            counts.setdefault(family or 'all', Counter())[answer] += 1
    for line in run.fields.questions(run.split)[:settings.n_score]:
        for (_, truth), family in zip(line['turns'], line['families']):
            for key in {family or 'all', 'all'}:
                hits.setdefault(key, []).append(truth == counts[family or 'all'].most_common(1)[0][0])
    return {family: float(np.mean(some)) for family, some in hits.items()}


def open_blind(run, folder):
    """This run with the model of another one, which reads no images. Raises UserError."""
    other = lab.open_run(Path(folder, run.path.name), run.device)
    if lab.chapter_of(other.model) != 'vlm' or not other.model.config.blind or other.meta['encoding'] != run.meta['encoding']:
        raise UserError(f'blind={folder!r}: must be a run of vlm with --blind=True on the same data')
    return replace(run, model=other.model)
