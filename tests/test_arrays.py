"""A data set on disk: windows, views, index; damaged arrays; the sums of all arrays; a data set made on its first use."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config import UserError
from engine import processes
from prepare import arrays
from tests.tiny import run, save_data


def test_stream_windows(tmp_path):
    """Every token but the ends is a target once an epoch, the grid moves from epoch to epoch; each is one in evaluation."""
    meta = save_data(tmp_path, 'stream', np.arange(1000), np.arange(96))
    data = arrays.Data(tmp_path, 'train', meta, ['tokens'], 10)
    first, second = data.take(0, data.n)['tokens'], data.take(data.n, data.n)['tokens']
    assert first.shape == (99, 11) and len(first[:, 1:].unique()) == 990
    assert (first[:, 1:] - first[:, :-1] == 1).all() and set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert torch.equal(data.take(90, 16)['tokens'], torch.cat((first[90:], second[:7])))  # a batch that straddles epochs
    val = arrays.Data(tmp_path, 'val', meta, ['tokens'], 10)
    rows = val.rows(np.arange(val.n))['tokens']
    assert rows[:, 1:][rows[:, 1:] >= 0].tolist() == list(range(1, 96))
    assert rows[-1].tolist() == [90, 91, 92, 93, 94, 95] + [-1] * 5
    with pytest.raises(UserError, match='96 tokens are too few for a context of 96'):
        save_data(tmp_path, 'stream', np.arange(96), np.arange(96))
        arrays.Data(tmp_path, 'train', meta, ['tokens'], 96)


def test_a_stream_needs_a_context(tmp_path):
    (tmp_path / 'train').mkdir()
    np.save(tmp_path / 'train/tokens.npy', np.zeros(9, np.uint8))
    with pytest.raises(UserError, match='block_size=0 must be at least 1'):
        arrays.Data(tmp_path, 'train', dict(kind='stream', fields=dict(tokens=65)), ('tokens',))


def test_views(tmp_path):
    """One view a sample and epoch, the same for a resumed run; evaluation sees the first."""
    array = np.arange(600).reshape(50, 4, 3)
    meta = save_data(tmp_path, 'rows', array, array[:, :1], views={'tokens': 4})
    data = arrays.Data(tmp_path, 'train', meta, ['tokens'])
    rows = torch.cat([data.take(50 * epoch, 50)['tokens'] for epoch in range(30)])
    assert rows.shape == (1500, 3) and (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert all(sorted((rows[50 * e:50 * e + 50, 0] // 12).tolist()) == list(range(50)) for e in range(30))
    assert (rows[:, 0] // 3 % 4).bincount().min() > 300
    assert torch.equal(arrays.Data(tmp_path, 'train', meta, ['tokens']).take(70, 9)['tokens'], rows[70:79])
    val = arrays.Data(tmp_path, 'val', meta, ['tokens'])
    assert torch.equal(val.rows(np.arange(50))['tokens'], torch.from_numpy(array[:, 0]))


def test_reals_and_other_names_on_disk(tmp_path):
    """A field of real numbers beside integers, under another name, without views where another field has them."""
    meta = save_data(tmp_path, 'rows', np.arange(600).reshape(50, 4, 3), np.arange(30).reshape(10, 1, 3), views={'tokens': 4},
                     fields=dict(tokens=1000, point=0), files=dict(point='raw_point'))
    for split, n in (('train', 50), ('val', 10)):
        np.save(tmp_path / split / 'raw_point.npy', np.arange(n)[:, None] / 2)
    batch = arrays.Data(tmp_path, 'train', meta, ['point', 'tokens']).take(0, 8)
    assert batch['point'].dtype == torch.float32 and batch['tokens'].dtype == torch.int64
    assert torch.equal(batch['point'][:, 0] * 2, batch['tokens'][:, 0] // 12)
    with pytest.raises(UserError, match="has no 'image', which this model reads .it has tokens, point"):
        arrays.Data(tmp_path, 'train', meta, ['image'])
    np.save(tmp_path / 'val/raw_point.npy', np.array([[0.0], [np.nan]]))
    with pytest.raises(UserError, match='raw_point.npy: holds values that are not finite'):
        arrays.Data(tmp_path, 'val', meta, ['point'])


def test_rows_that_several_samples_share(tmp_path):
    meta = save_data(tmp_path, 'rows', np.arange(6)[:, None], np.arange(2)[:, None], fields=dict(tokens=1000, image=256),
                     index=dict(image='raw_image'))
    np.save(tmp_path / 'train/image.npy', np.array([[10], [20]], np.uint8))
    np.save(tmp_path / 'train/raw_image.npy', np.array([0, 0, 0, 1, 1, 1]))
    batch = arrays.Data(tmp_path, 'train', meta, ['image', 'tokens']).take(0, 6)
    assert torch.equal(batch['image'], 10 + 10 * (batch['tokens'] > 2))
    np.save(tmp_path / 'train/raw_image.npy', np.array([0, 0, 0, 1, 1, 2]))
    with pytest.raises(UserError, match='raw_image.npy: token ids run from 0 to 2, outside the vocabulary of 2'):
        arrays.Data(tmp_path, 'train', meta, ['image', 'tokens'])


def test_damaged_data(here):
    scenes = Path('data/scenes')
    rgb = np.load(scenes / 'train/rgb.npy')
    np.save(scenes / 'train/rgb.npy', rgb + 70000)
    with pytest.raises(UserError, match=r'rgb.npy: token ids run from .* outside the vocabulary of 4096'):
        run('out/a')
    np.save(scenes / 'train/rgb.npy', rgb[:50])
    with pytest.raises(UserError, match='the fields differ in length'):
        run('out/a')
    (scenes / 'train/rgb.npy').write_bytes((scenes / 'val/rgb.npy').read_bytes()[:300])
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'train/rgb.npy').unlink()
    with pytest.raises(UserError, match='rgb.npy: missing or damaged'):
        run('out/a')
    (scenes / 'meta.json').write_text('{"kind": "something"}')
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):
        run('out/a')


@pytest.mark.parametrize('array', [np.array(3), np.array(['a', 'b']), np.array([None])])
def test_arrays_of_numbers_alone_are_loaded(tmp_path, array):
    """Objects are stored as a pickle, which is never executed."""
    np.save(tmp_path / 'a.npy', array, allow_pickle=True)
    with pytest.raises(UserError, match='a.npy: missing or damaged'):
        arrays.load(tmp_path / 'a.npy')


def test_other_data_than_the_runs_own(here):
    run('out/a', max_iters=3)
    path = Path('data/scenes/meta.json')
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    with pytest.raises(UserError, match='data/scenes is not the data that this run was trained on'):
        run('out/a')


def test_data_to_which_a_modality_was_added_are_still_the_runs(here):
    run('out/a', max_iters=1)
    path = Path('data/scenes/meta.json')
    meta = json.loads(path.read_text())
    meta['fields']['grey'] = 256
    meta['config']['modalities'] += ' grey:256:4x4'
    path.write_text(json.dumps(meta))
    assert run('out/a', max_iters=2)['loss_rgb'] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Sums

def sums():
    return subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd='data/scenes', capture_output=True, text=True)


def test_sums_of_all_arrays(here):
    """`sha256sum -c SHA256SUMS` in the data folder, as the pages say it: right as made, a changed file is found by its name."""
    done = sums()
    listed = [line.partition('  ')[2] for line in Path('data/scenes/SHA256SUMS').read_text().splitlines()]
    assert done.returncode == 0 and done.stdout.count(': OK\n') == len(listed)
    assert listed == sorted(path.relative_to('data/scenes').as_posix() for path in Path('data/scenes').rglob('*.npy'))
    path = Path('data/scenes/val/rgb.npy')
    tokens = np.load(path)
    tokens.flat[7] = (tokens.flat[7] + 1) % 100  # a legal token, but another one
    np.save(path, tokens)
    done = sums()
    wrong = [line for line in done.stdout.splitlines() if not line.endswith(': OK')]
    assert done.returncode == 1 and wrong == ['val/rgb.npy: FAILED']
    path.unlink()
    assert sums().returncode == 1 and 'val/rgb.npy: FAILED open or read' in sums().stdout


def test_meta_json_comes_last_and_at_once(tmp_path, monkeypatch):
    """Its presence says that the data set is complete: removed first, written last; one that is replaced is never incomplete."""
    (tmp_path / 'meta.json').write_text('older')
    arrays.write(tmp_path / 'train', dict(a=np.arange(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lock', 'train']
    meta = dict(kind='rows', prepare='text', fields={}, config={})
    replaced = []
    monkeypatch.setattr(Path, 'replace', lambda new, path, replace=Path.replace: replaced.append(
        ((tmp_path / 'SHA256SUMS').is_file(), path.name, json.loads(new.read_text()))) or replace(new, path))
    arrays.save_meta(tmp_path, meta)
    assert replaced == [(True, 'meta.json', meta)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['SHA256SUMS', 'lock', 'meta.json', 'train']
    with pytest.raises(UserError, match='meta.json: not the description of a data set'):  # it has no fields
        arrays.read_meta(tmp_path)


MAKER = """
import sys
from pathlib import Path
import numpy as np
import config
from prepare import arrays

def main():
    arrays.write(Path('data/x/train'), dict(a=np.arange(3)))
    print('begun', flush=True)
    sys.stdin.read()
    arrays.save_meta('data/x', dict(kind='rows', prepare='x', fields=dict(a=3), config={}))
config.run(main)
"""


def test_one_process_makes_a_data_set(tmp_path, monkeypatch):
    """A second one is refused; after a kill the next may start, and arrays of both without a meta.json are no data set."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | dict(PYTHONPATH=str(Path(arrays.__file__).parent.parent))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    first = subprocess.Popen([sys.executable, '-c', MAKER], **pipes)
    assert first.stdout.readline() == 'begun\n'
    with pytest.raises(UserError, match='data/x: another process is making this data set'):
        arrays.begin('data/x')
    first.kill(), first.wait()
    assert not Path('data/x/meta.json').exists()
    second = subprocess.Popen([sys.executable, '-c', MAKER], **pipes)
    assert second.communicate()[1] == '' and second.returncode == 0 and arrays.read_meta('data/x')['prepare'] == 'x'
    with pytest.raises(UserError, match='data/x holds a data set of prepare/x.py: choose another --out='):
        arrays.begin('data/x', 'text')
    assert Path('data/x/meta.json').exists()
    arrays.begin('data/x', 'x', keep_meta=True)
    assert Path('data/x/meta.json').exists()


def test_arrays_are_replaced_under_a_reader(tmp_path):
    """A run that has mapped the older file keeps reading it, where a truncated file would end the process (SIGBUS)."""
    arrays.write(tmp_path / 'train', dict(a=np.arange(100_000)))
    mapped = arrays.load(tmp_path / 'train/a.npy')
    arrays.write(tmp_path / 'train', dict(a=np.zeros(3, int)))
    assert mapped[99_999] == 99_999 and arrays.load(tmp_path / 'train/a.npy').shape == (3,)
    assert [path.name for path in (tmp_path / 'train').iterdir()] == ['a.npy']


# ---------------------------------------------------------------------------------------------------------------------
# Made on first use

def test_only_scripts_that_make_a_data_set_are_run(here, monkeypatch):
    """A module of prepare/ with another purpose, or one that makes weights, is no data set."""
    monkeypatch.setattr(processes.subprocess, 'run', lambda *arguments: pytest.fail(f'ran {arguments}'))
    for name in ('transfer', 'judge', 'scenes_parser', 'image_tokenizers', 'download', 'siglip', 'smollm2', 'arrays', '__init__'):
        with pytest.raises(UserError, match=f"dataset='{name}': .* nor a script prepare/{name}.py that makes it"):
            arrays.find(name)


def test_every_script_makes_what_its_name_says():
    """make_once waits for data/NAME/meta.json or out/NAME/ckpt_last.pt; a program without MAKES makes neither."""
    folder = Path(arrays.__file__).parent
    made = {}
    for path in folder.glob('*.py'):
        made[path.stem] = [line for line in path.read_text().splitlines() if line.startswith('MAKES = ')]
        if '__main__' not in path.read_text():
            assert not made[path.stem], path
    for name, line in made.items():
        assert line in ([], [f"MAKES = 'data/{name}'"], [f"MAKES = 'out/{name}'"]), name
    assert {name for name, line in made.items() if "MAKES = 'out/" in ''.join(line)} == {'siglip', 'smollm2'}
    assert len([name for name, line in made.items() if line]) >= 15


def test_the_module_that_made_the_data(here):
    meta = arrays.read_meta('data/scenes')
    assert type(arrays.open_dataset(Path('data/scenes'), meta)).__module__ == 'prepare.scenes'
    for name in ('sneaky', '../train', 'download', 'os'):
        with pytest.raises(UserError, match='data/scenes was made by prepare/'):
            arrays.open_dataset(Path('data/scenes'), meta | dict(prepare=name))
