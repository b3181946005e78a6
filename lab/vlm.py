"""
Chapter 5's models at work: answers to questions about images, a chat, and accuracy by family of questions.

    python sample.py --out_dir=out/vlm_scenes
    python sample.py --out_dir=out/vlm_scenes --image=FILE.png --text="How many red cubes are there?"
    python -m lab.score --out_dir=out/vlm_scenes --text_only_run=out/vlm_scenes_text_only
"""
import sys
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
class Sampling(options.Sampling):
    temperature: float = 0.0   # 0: always the most probable token
    min_p: float = 0.0         # only tokens with at least this fraction of the largest probability


@dataclass
class Answers(Sampling):
    image: str = ''            # your image file; several with commas between; '': held-out images and their questions
    text: str = ''             # a question about it
    prompts: str = ''          # a file with one question a line, each asked about each image
    chat: bool = False         # questions from the keyboard, until an empty line
    n: int = 6                 # held-out images
    max_new_tokens: int = 500  # the longest answer


@dataclass
class Scores(Sampling):
    n_score: int = 1000        # held-out images
    text_only_run: str = ''    # a run of the same data with text_only=True, whose scores are shown beside these
    max_new_tokens: int = 32   # the longest answer
    told = 'n_score', 'text_only_run'  # by the names of scores, or n


def settings_of(run):
    return Answers()


def scores_of(run):
    return Scores()


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers

def prefill_images(run, images, n=1):
    """Encode images (S, m, H, W, C) once; return the cache that n questions about each continue. Raises UserError."""
    if images.shape[1] != (m := run.model.config.n_images):
        raise UserError(f'{images.shape[1]} images, and this model reads {m} at a time')
    prompt = torch.full(images.shape[:2], run.dataset.template.image)
    return run.model.prefill(prompt.to(run.device), torch.as_tensor(np.array(images)).to(run.device), n)


def answer_stream(run, cache, questions, settings, first=()):
    """Yield the next token (B,) of answers to B questions of any lengths, after the cache and the tokens `first`.
    Raises UserError if a question is longer than the rest of the context."""
    template = run.dataset.template
    tokens = lab.left_pad([[*first, *template.encode_question(question)] for question in questions])
    room = run.model.max_seq_len - cache.cur_len
    if tokens.size(1) >= room:
        raise UserError(f'the question has {tokens.size(1)} tokens, and the context has room for {room}, the answer '
                        'included: shorten it')
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    return run.model.stream(tokens.to(run.device), cache, settings.max_new_tokens, settings.temperature, settings.top_k,
                            settings.top_p, settings.min_p, template.end, generator)


def answers(run, images, questions, settings):
    """Answer S lists of n questions about S conversations' images (S, m, H, W, C); return S lists of n texts."""
    n = len(questions[0])
    with run.exact():
        cache = prefill_images(run, images, n)
        tokens = list(answer_stream(run, cache, [question for row in questions for question in row], settings))
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * n * len(questions)  # none: max_new_tokens=0
    texts = [run.dataset.decode(ids) for ids in rows]
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def stream_reply(run, images, turns, question, settings):
    """Yield the growing ids of a reply about images (1, m, H, W, C), after earlier turns [(question, ids), ...], which
    are left out if the context cannot hold them. Raises UserError."""
    template, ids = run.dataset.template, []
    first = [i for earlier, reply in turns for i in (*template.encode_question(earlier), *reply)]
    with run.exact():
        cache = prefill_images(run, images)
    try:
        stream = answer_stream(run, cache, [question], settings, first)
    except UserError:
        stream = answer_stream(run, cache, [question], settings)
    for token in lab.in_exact(run, stream):
        ids.append(int(token))
        yield ids


def final_answer(run, reply):
    """Return the answer of a reply, without its chain of thought if the model was trained to write one."""
    return (reply.rpartition('Answer:')[2] if run.dataset.template.thinks else reply).strip()


def in_rows(images, n):
    """Group the images of n conversations, one (H, W, C) or several each: (n, m, H, W, C)."""
    return images.reshape(n, -1, *images.shape[-3:])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and chatting

def draw(run, settings, path):
    """Save held-out images with questions, answers and marks at `path`; or print answers about the user's images."""
    options.apart(settings, 'chat', 'text', 'prompts')
    options.apart(settings, 'prompts', 'text')
    if settings.image:
        return own_questions(run, settings)
    if settings.chat or settings.text or settings.prompts:
        raise UserError('questions need --image=FILE, the image that they are about')
    lines = run.dataset.questions(run.split)[:settings.n]
    images = in_rows(run.dataset.images(run.split, [line['image'] for line in lines]), len(lines))
    turns = [(6 * line['turns'])[:6] for line in lines]  # the same number for each image
    replies = answers(run, images, [[question for question, _ in row] for row in turns], settings)
    talks = [list(dict.fromkeys((question, final_answer(run, reply), truth) for (question, truth), reply in zip(*rows)))
             for rows in zip(turns, replies)]
    save_answers(images[:, 0], talks, path)


def own_questions(run, settings):
    """Print and return answers to each of the user's questions about each of the user's images."""
    m = run.model.config.n_images
    images = np.stack([run.dataset.read_image(file) for file in options.paths(settings.image)])
    if len(images) % m:
        raise UserError(f'{len(images)} images, and this model reads {m} at a time')
    images = in_rows(images, len(images) // m)
    if settings.chat and len(images) > 1:
        raise UserError(f'a chat is about {m} image{"s" * (m > 1)}, and {len(images) * m} are named: choose some')
    if settings.chat:
        with run.exact():
            return chat(run, images, settings)
    texts = lab.read_lines(settings.prompts) if settings.prompts else [settings.text]
    if settings.prompts and (empty := [i for i, text in enumerate(texts, 1) if not text.strip()]):
        raise UserError(f'{settings.prompts}: line {empty[0]} is empty: write one question a line')
    texts = [run.dataset.own_question(text) for text in texts]
    replies = [reply for row in answers(run, images, [texts] * len(images), settings) for reply in row]
    print('\n'.join(replies))
    return replies


def read_question(dataset):
    """Return a question from the keyboard, the next one if the data set refuses it; '' after Ctrl-D or Ctrl-C."""
    while True:
        try:
            return dataset.own_question(input('> ').strip())
        except UserError as error:
            print(error)
        except (EOFError, KeyboardInterrupt):
            return ''


def chat(run, images, settings):
    """Answer questions from the keyboard, token by token; images and all earlier turns stay in the cache."""
    cache, last = prefill_images(run, images), []
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='replace')  # bytes that are not UTF-8
    print('Ask about the image; an empty line ends.')
    while question := read_question(run.dataset):
        ids, shown = [], ''
        try:
            stream = answer_stream(run, cache, [question], settings, last)
        except UserError:  # the context is full: only the images are kept
            images_alone = prefill_images(run, images)
            try:
                stream = answer_stream(run, images_alone, [question], settings)
            except UserError as error:
                print(error)
                continue
            cache = images_alone
            print('the context is full: earlier turns are left out')
        for token in stream:
            ids.append(int(token))
            text = run.dataset.decode(ids)
            if not text.endswith('\ufffd'):  # otherwise the token ends within a character
                print(text[len(shown):], end='', flush=True)
                shown = text
        last = ids[-1:]  # sampled, not yet in the cache
        print(run.dataset.decode(ids)[len(shown):])


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(run, settings):
    """Yield accuracies by family of questions: the fraction of answers that equal the ground truth exactly, without
    earlier turns. The baseline is the family's most frequent answer. Then the same with other images, for a model
    trained without images, and for new pairs of color and shape."""
    other = open_text_only(run, settings.text_only_run) if settings.text_only_run else None
    (found, rate), baselines = right_answers(run, settings), majority_scores(run, settings)
    yield {family: bootstrap(parts) | dict(baseline=baselines[family]) for family, parts in sorted(found.items())} | {
        'answers/s': alone(rate, int(found['all'][..., 1].sum()))}
    lines = run.dataset.questions(run.split)[:settings.n_score]
    if None not in (shown := other_images(lines)):
        yield titled('another image', right_answers(run, settings, shown=shown)[0])
    if other:
        yield titled('text only', right_answers(other, settings)[0])
    if Path(run.folder, run.split, 'new_pairs.jsonl').is_file():
        yield titled('new pairs', right_answers(run, settings, 'new_pairs')[0])


def titled(title, families):
    return {f'{title}: {family}': bootstrap(parts) for family, parts in sorted(families.items())}


def other_images(lines):
    """For each line the image of the last line before it (cyclically) that is about another one; None if all are about
    the same."""
    images = [line['image'] for line in lines]
    return [next((one for one in (images[i + 1:] + images[:i])[::-1] if one != image), None)
            for i, image in enumerate(images)]


def right_answers(run, settings, name='questions', shown=None):
    """Return {family: (n, 1, 2)}, the number of right and of all answers per image, and answers per second. `shown` are
    the images in place of those of the lines."""
    lines, families, total = run.dataset.questions(run.split, name)[:settings.n_score], {}, 0
    shown, started = shown or [line['image'] for line in lines], time.perf_counter()
    for start in tqdm(range(0, len(lines), 32), desc=f'score {name}', unit='batch', leave=False):
        part = lines[start:start + 32]
        n_turns = max(len(line['turns']) for line in part)
        images = in_rows(run.dataset.images(run.split, shown[start:start + 32]), len(part))
        questions = [[question for question, _ in (n_turns * line['turns'])[:n_turns]] for line in part]
        for i, (line, row) in enumerate(zip(part, answers(run, images, questions, settings)), start):
            for (_, truth), family, reply in zip(line['turns'], line['families'], row):
                right = final_answer(run, reply) == truth
                for key in {family or 'all', 'all'}:
                    families.setdefault(key, np.zeros((len(lines), 1, 2)))[i, 0] += (right, 1)
                total += 1
    return families, total / (time.perf_counter() - started)


def majority_scores(run, settings):
    """Return {family: the fraction of questions whose answer is the family's most frequent one in training}."""
    counts, hits = {}, {}
    for line in run.dataset.questions('train')[:5000]:
        for (_, answer), family in zip(line['turns'], line['families']):
            counts.setdefault(family or 'all', Counter())[answer] += 1
    guess = {family: answers.most_common(1)[0][0] for family, answers in counts.items()}
    for line in run.dataset.questions(run.split)[:settings.n_score]:
        for (_, truth), family in zip(line['turns'], line['families']):
            for key in {family or 'all', 'all'}:
                hits.setdefault(key, []).append(truth == guess.get(family or 'all'))  # None: not in training
    return {family: float(np.mean(right)) for family, right in hits.items()}


def open_text_only(run, folder):
    """Return this run with the model of another run, which ignores images. Raises UserError."""
    other = lab.open_run(Path(folder, run.path.name), run.device)
    if (lab.chapter_of(other.model) != 'vlm' or not other.model.config.text_only
            or other.meta['encoding'] != run.meta['encoding']):
        raise UserError(f'text_only_run={folder!r}: must be a run of vlm with --text_only=True on the same data')
    return replace(run, model=other.model)
