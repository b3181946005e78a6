"""
Homework: a chapter with blanks, and a grader that says what is right and why the rest is not yet.

    python -m tests.homework --exercises                     all exercises with their points; after a chapter's name, that one's
    python -m tests.homework fourm --out=homework/           the repository's files, the ideas of fourm.py blank
    python -m tests.homework fourm --grade=homework/         the score card; exit code 0 if all exercises passed, otherwise 1

An exercise is one function of a chapter's file, found there by its name, such as FourM.encode. tests/exercises/CHAPTER.py
lists a chapter's exercises: the docstring of each check is the exercise's text, its asserts are the reasons on the score card.

Each is graded by itself, in a process that cannot harm the others: the student's file, whatever else it defines, in which all
other exercises are replaced by the solutions, this repository's own. A solution's line numbers are far beyond the file's end, so
that a line named in a reason is always one that the student wrote.
"""
import ast
import difflib
import functools
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
import threading
import traceback
import types
from pathlib import Path

import torch

import config
from config import UserError

SETTINGS = dict(
    chapter='',       # gpt, maskgit, fourm, flow or vlm; its name alone will do
    exercises=False,  # list the exercises
    out='',           # a new folder that receives the homework
    grade='',         # a folder, or a chapter's file, to grade
    limit=30.0,       # seconds that an exercise may take
)
ROOT = Path(__file__).parent.parent
CHAPTERS = dict(gpt='nanoGPT', maskgit='MaskGIT', fourm='nano4M', flow='nanoFlow', vlm='nanoVLM')
NEEDED = ('*.py', '*.md', '*.txt', '*.toml', 'LICENSE', '.gitignore', 'config/*', 'docs/*', 'docs/*/*', 'engine/*.py', 'lab/*.py',
          'prepare/*.py', 'tests/*.py', 'tests/exercises/*.py')  # what a student gets; tests/test_homework.py, which knows the answers, not
BLANK = 'not attempted'
BEYOND = 10 ** 6  # is added to the line numbers of solutions


def exercises(chapter):
    """{name: (points, check)} in the course's order."""
    return importlib.import_module(f'tests.exercises.{chapter}').EXERCISES


def find(tree, name):
    """The last definition of 'path' or 'FourM.encode' in a module's tree; None where there is none. '' is the module."""
    for part in name.split('.') if name else ():
        tree = next((node for node in reversed(getattr(tree, 'body', ())) if getattr(node, 'name', None) == part), None)
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# A chapter with blanks

def blank(text, chapter):
    """A chapter's text with its exercises' bodies replaced by their texts and an error; all the rest as it is, to the letter."""
    lines, tree = text.splitlines(True), ast.parse(text)
    places = {name: find(tree, name) for name in exercises(chapter)}
    for name, node in sorted(places.items(), key=lambda item: -item[1].lineno):  # from below: what is above keeps its number
        points, check = exercises(chapter)[name]
        first = node.body[ast.get_docstring(node) is not None]
        start, indent = first.lineno - 1, ' ' * first.col_offset
        while lines[start - 1].lstrip()[:1] in ('', '#'):  # remarks before the first statement belong to the body
            start -= 1
        task = [f'Exercise, {points} point{"s" * (points > 1)}.', *inspect.getdoc(check).splitlines()]
        lines[start:node.end_lineno] = [*(f'{indent}# {line}\n' for line in task),
                                        f"{indent}raise NotImplementedError('exercise {name}: its body is yours to write')\n"]
    return ''.join(lines)


def hand_out(chapter, out):
    """Writes the files that a student needs into the folder out, which must be new or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f'{out} exists and is not an empty folder; nothing was written: name a new one with --out')
    needed = [path for pattern in NEEDED for path in ROOT.glob(pattern) if path.is_file() and path.name != 'test_homework.py']
    for path in needed:
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    text = (ROOT / f'{chapter}.py').read_text(encoding='utf-8')
    (out / f'{chapter}.py').write_text(blank(text, chapter), encoding='utf-8')
    print(f'wrote {len(needed)} files; in {out / chapter}.py {len(exercises(chapter))} exercises are blank:',
          ', '.join(exercises(chapter)))
    print(f'to see what is right so far: python -m tests.homework {chapter} --grade={out}')


# ---------------------------------------------------------------------------------------------------------------------
# One exercise, graded

@functools.cache
def solutions(chapter):
    """{name: the definition that solves it}, with line numbers far beyond those of any student's file."""
    tree = ast.parse((ROOT / f'{chapter}.py').read_text(encoding='utf-8'))
    return {name: ast.increment_lineno(node, BEYOND) for name in exercises(chapter) if (node := find(tree, name))}


def solve_others(tree, chapter, name):
    """Replaces, in the tree of a student's file, every exercise but one by its solution."""
    for other, solution in solutions(chapter).items():
        parent, node = find(tree, other.rpartition('.')[0]), find(tree, other)
        if other == name or not parent:
            continue
        if node:
            parent.body[parent.body.index(node)] = solution
        else:  # it was deleted: before all that may use it
            first = next(i for i, part in enumerate(parent.body) if isinstance(part, (ast.FunctionDef, ast.ClassDef)))
            parent.body.insert(first, solution)


def is_blank(node):
    """Has a function nothing but a docstring, and the error that it was handed out with, or pass, or an ellipsis?"""
    body = node.body[ast.get_docstring(node) is not None:]
    return all(ast.unparse(part).startswith(('pass', '...', "raise NotImplementedError('exercise ")) for part in body)


def attempt(chapter, name, text, path):
    """What is to be said of an exercise in a student's file, its text read from path: '' if it is right, BLANK, or a reason."""
    try:
        tree = ast.parse(text, str(path))
        if sum(find(tree, each) is not None for each in exercises(chapter)) < 2:  # some chapters share a name
            return f'{path.name} is not {chapter}.py: it does not have its exercises'
        answer = find(tree, name)
        if not isinstance(answer, ast.FunctionDef):
            return f'{path.name} has no function {name} any more; take it again from a fresh homework'
        if is_blank(answer):
            return BLANK
        solve_others(tree, chapter, name)
        module = types.ModuleType(f'homework_{chapter}')
        sys.modules[module.__name__] = module  # where a dataclass looks if its annotations are strings
        exec(compile(tree, str(path), 'exec'), module.__dict__)
        torch.manual_seed(0)
        exercises(chapter)[name][1](module)
    except BaseException as error:  # a student's code may do anything, and call sys.exit
        return reason(error, name, path)
    return ''


def reason(error, name, path):
    """An error as one line: what, and on which line of the student's file."""
    what = f'{type(error).__name__}: {error}'.strip().splitlines()[0][:200]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f'{path.name}, line {error.lineno}: {error.msg}; nothing can be graded before this is mended'
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, AssertionError) and Path(frames[-1][0]).parent.name == 'exercises':
        return ' '.join(str(error).split())
    blank = re.match('exercise (.*?):', str(error))
    if blank and blank[1] != name:  # where the solutions are blank too: in a student's copy
        return f'it needs {blank[1]}, which is still blank'
    own = [line for file, line in frames if file == str(path) and line < BEYOND]
    return f'{path.name}, line {own[-1]}: {what}' if own else f'{name} cannot be used as it is: {what}'


def child(sender, chapter, name, text, path, limit):
    """Attempts an exercise and sends what is to be said of it, silently, and before the time is over."""
    for stream in range(3):  # what a student's code prints, or asks for, is not part of the score card
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(os.devnull, 'w'), open(os.devnull, 'w')
    sys.path[:] = [str(ROOT), *sys.path, str(path.parent)]
    torch.compiler.set_stance('force_eager')  # to compile takes longer than the limit
    torch.set_num_threads(1)
    student = threading.get_ident()

    def too_long():
        own = [line for frame, line in traceback.walk_stack(sys._current_frames()[student])
               if frame.f_code.co_filename == str(path) and line < BEYOND]
        where = f', in {path.name}, line {own[0]}' if own else ''
        sender.send(f'still running after {limit:g} s{where}: an endless loop?')
        os._exit(1)
    timer = threading.Timer(limit, too_long)
    timer.daemon = True
    timer.start()
    sender.send(attempt(chapter, name, text, path))
    os._exit(0)


def judge(chapter, name, text, path, limit):
    """`attempt` in a process of its own; whatever becomes of it, something is said."""
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')  # a fork need not import torch again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, chapter, name, text, path, limit))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit + 60) else f'still running after {limit:g} s'
    except EOFError:
        process.join()
        return f'Python ended before the exercise did, with exit code {process.exitcode}'
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------------------------------

def grade(chapter, path, limit):
    """Prints the score card of a student's file, or of that in a folder; returns how many exercises did not pass."""
    path = path / f'{chapter}.py' if path.is_dir() else path
    if not path.is_file() or path.suffix != '.py':
        raise UserError(f'{path}: no such Python file; --grade takes the folder that {chapter}.py is in, or the file itself')
    text = path.read_bytes().decode('utf-8-sig', errors='replace')
    print(f'{CHAPTERS[chapter]}, {path}')
    scored, total, passed, before = 0, 0, 0, None
    for name, (points, _) in exercises(chapter).items():
        said = judge(chapter, name, text, path.absolute(), limit)
        scored, total, passed = scored + points * (not said), total + points, passed + (not said)
        verdict = 'passed' if not said else said if said == BLANK else f'failed: {"as above" if said == before else said}'
        before = said
        print(textwrap.fill(verdict, 130, initial_indent=f'{points * (not said)} of {points}  {name:<20} ',
                            subsequent_indent=' ' * 26), flush=True)
    print(f'{scored} of {total} points, {passed} of {len(exercises(chapter))} exercises passed')
    return len(exercises(chapter)) - passed


def show(chapters):
    """Prints the exercises of chapters with their points and the first sentence of each text."""
    for chapter in chapters:
        print(f'{CHAPTERS[chapter]}, {chapter}.py: {sum(points for points, _ in exercises(chapter).values())} points')
        for name, (points, check) in exercises(chapter).items():
            print(f'{points}  {name:<20} {" ".join(inspect.getdoc(check).split()).partition(". ")[0].rstrip(".")}')


def settings_of(arguments, overrides=None):
    """As config.read and config.apply, and a word is a chapter, --exercises one that needs no value."""
    arguments = [argument if argument.startswith('--') else f'--chapter={argument}' for argument in arguments]
    arguments = ['--exercises=True' if argument == '--exercises' else argument for argument in arguments]
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    chapter, asked = settings['chapter'], [name for name in ('exercises', 'out', 'grade') if settings[name]]
    if len(asked) != 1:
        raise UserError('say one of --exercises, --out=FOLDER (to get a homework) and --grade=FOLDER (to see what is right)')
    if chapter not in (CHAPTERS if asked != ['exercises'] else ('', *CHAPTERS)):
        near = difflib.get_close_matches(chapter, CHAPTERS, n=1, cutoff=0.4)
        raise UserError((f'there is no chapter {chapter!r}: ' if chapter else 'which chapter? ')
                        + f'name one of {", ".join(CHAPTERS)}' + (f'; did you mean {near[0]}?' if near else ''))
    return settings


def main(*arguments, **overrides):
    """Lists, hands out or grades; returns how many exercises did not pass."""
    settings = settings_of(arguments, overrides)
    chapter = settings['chapter']
    if settings['exercises']:
        return show([chapter] if chapter else CHAPTERS)
    if settings['out']:
        return hand_out(chapter, Path(settings['out']))
    return grade(chapter, Path(settings['grade']), settings['limit'])


if __name__ == '__main__':
    sys.exit(bool(config.run(main)))
