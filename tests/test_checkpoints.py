"""Checkpoints: written whole or not at all, read without executing anything, refused in one line if they do not fit."""
import hashlib
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch

import fourm
import lab
import train
from config import UserError
from engine import checkpoints, processes
from tests import faults
from tests.tiny import losses, read, run, weights


def test_a_failed_write_keeps_the_checkpoint_before(here, monkeypatch):
    run('out/a', max_iters=3)
    before = Path('out/a/ckpt_last.pt').read_bytes()

    def full_disk(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoints.os, 'fsync', full_disk)
    with pytest.raises(UserError, match='ckpt_best.pt: cannot be written .*No space left'):
        run('out/a', max_iters=6)
    assert Path('out/a/ckpt_last.pt').read_bytes() == before and not list(Path('out/a').glob('*.tmp'))


def test_folders_that_cannot_be_synced(tmp_path, monkeypatch):
    """Some network drives refuse, which loses nothing but the certainty after a power cut."""
    sync = os.fsync

    def refuse(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(22, 'Invalid argument')
        sync(file)
    monkeypatch.setattr(checkpoints.os, 'fsync', refuse)
    checkpoints.save(tmp_path / 'ckpt_last.pt', dict(step=3))
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt_last.pt']


def flipped(data):
    """The contents of a file with one bit changed in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1:]


DAMAGES = [lambda data: data[:1000], lambda data: b'', lambda data: b'garbage' * 100, flipped]


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checkpoints(here, damage):
    run('out/a', max_iters=3)
    path = Path('out/a/ckpt_last.pt')
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match='ckpt_last.pt: damaged, .*the others in its folder are ckpt_best.pt') as error:
        read('out/a')
    assert 'delete' not in str(error.value)
    Path('out/a/ckpt_best.pt').unlink()
    with pytest.raises(UserError, match='its folder has no other one; --init_from=scratch moves a run aside') as error:
        run('out/a')
    assert '\n' not in str(error.value) and path.is_file()
    run('out/a', init_from='scratch', max_iters=1)
    assert Path('out/a.1/ckpt_last.pt').is_file() and read('out/a')['step'] == 1


@pytest.mark.parametrize('damage', [*DAMAGES, None])
def test_a_run_whose_newest_checkpoint_is_damaged_continues_from_the_one_before(here, capsys, damage):
    """Of the intact ones the latest; nothing that the folder holds is lost, and the result is that of an undamaged run. Also
    if the file is missing, which is no new run."""
    changes = dict(eval_interval=1, keep_checkpoints=3, decay=1e-9)
    run('out/whole', **changes)
    run('out/a', max_iters=5, **changes)
    for name in ('ckpt_last.pt', 'ckpt_000005.pt'):
        path = Path('out/a', name)
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    Path('out/a/ckpt_best.pt').unlink()
    first = Path('out/a/log.jsonl').read_text(encoding='utf-8').splitlines()[0]
    run('out/a', **changes)
    printed = capsys.readouterr().out
    assert 'out/a/ckpt_last.pt is damaged or missing: continuing from out/a/ckpt_000004.pt, step 4' in printed
    assert faults.same(weights('out/a'), weights('out/whole'))
    assert Path('out/a/log.jsonl').read_text(encoding='utf-8').splitlines()[0] == first
    assert losses('out/a') == losses('out/whole')


def test_a_flipped_bit_is_found(here):
    run('out/a', max_iters=1)
    path = Path('out/a/ckpt_last.pt')
    whole = path.read_bytes()
    place = whole.index(weights('out/a')['query_embedding.weight'].numpy().tobytes()[:64])
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
    with pytest.raises(UserError, match='ckpt_last.pt: damaged, truncated or not a checkpoint of this repository .BadZipFile.'):
        read('out/a')


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    def refused(path):
        raise PermissionError('not yours')
    monkeypatch.setattr(checkpoints.zipfile, 'ZipFile', refused)
    with pytest.raises(UserError, match='ckpt_last.pt: cannot be read .not yours'):
        read('out/a')


def test_the_nearest_checkpoint_is_named(here):
    run('out/tiny', max_iters=1)
    for reader in (lambda: read('out/tinny'), lambda: lab.open_run('out/tinny/ckpt_last.pt')):
        with pytest.raises(UserError, match='out/tinny/ckpt_last.pt: no such checkpoint; the nearest are out/tiny/ckpt_last.pt'):
            reader()
    assert lab.open_run('out/tiny/ckpt_last.pt', 'cpu').path.parent == Path('out/tiny')


@pytest.mark.parametrize('before', [dict(), dict(format=1), dict(format=checkpoints.FORMAT + 1)])
def test_checkpoints_of_another_edition(here, before):
    """The first edition's have no format number."""
    run('out/a', max_iters=1)
    checkpoint = read('out/a')
    del checkpoint['format']
    torch.save(checkpoint | before, 'out/a/ckpt_last.pt')
    message = f'ckpt_last.pt: a checkpoint of another edition of this repository .format {before.get("format", 1)}, not '
    for reader in (lambda: run('out/a', max_iters=2), lambda: checkpoints.load_model(Path('out/a/ckpt_last.pt')),
                   lambda: run('out/b', init_from='out/a')):
        with pytest.raises(UserError, match=message) as error:
            reader()
        assert '\n' not in str(error.value)


def test_a_checkpoint_may_name_only_chapters(here, monkeypatch):
    """What it names is imported, and would be executed: a file beside it, a module of Python, a program of this folder."""
    run('out/a', max_iters=1)
    checkpoint = read('out/a')
    (here / 'sneaky.py').write_text('from pathlib import Path\nPath("executed").touch()\n\nModel = Config = dict\n')
    monkeypatch.syspath_prepend(here)
    for name in ('sneaky', 'antigravity', 'train', 'tests.sneaky', '../sneaky'):
        checkpoint['settings']['model'] = name
        torch.save(checkpoint, 'out/a/ckpt_last.pt')
        with pytest.raises(UserError, match=f"model='{name}': choose one of flow, fourm, gpt, maskgit, vlm"):
            checkpoints.load_model(Path('out/a/ckpt_last.pt'))
    assert not Path('executed').exists() and not {'sneaky', 'antigravity'} & sys.modules.keys()


def test_code_that_has_changed_since(here, monkeypatch):
    run('out/a', max_iters=2)
    build = fourm.FourM.__init__

    def grown(self, config):
        build(self, config)
        self.more = torch.nn.Linear(2, 2)
    monkeypatch.setattr(fourm.FourM, '__init__', grown)
    message = 'out/a does not fit the code as it is now .parameters in one of them alone: more.bias, more.weight'
    with pytest.raises(UserError, match=message):
        run('out/a', max_iters=3)
    with pytest.raises(UserError, match='ckpt_last.pt does not fit the code'):
        checkpoints.load_model(Path('out/a/ckpt_last.pt'))
    monkeypatch.undo()
    checkpoint = read('out/a')
    checkpoint['model_config']['softness'] = 1
    torch.save(checkpoint, 'out/a/ckpt_last.pt')
    with pytest.raises(UserError, match="unexpected keyword argument 'softness'"):
        checkpoints.load_model(Path('out/a/ckpt_last.pt'))


def test_checkpoint_of_another_model(here):
    run('out/a', max_iters=3)
    with pytest.raises(UserError, match="out/a holds a run with model='fourm', not 'gpt'"):
        train.main(out_dir='out/a', model='gpt', dataset='scenes', device='cpu')


def test_a_checkpoint_describes_itself(here):
    run('out/a', max_iters=1, ema=0.9)
    checkpoint = read('out/a')
    assert checkpoint['format'] == checkpoints.FORMAT and checkpoint['settings']['n_embd'] == checkpoint['model_config']['n_embd'] == 32
    assert checkpoint['meta']['prepare'] == 'scenes' and checkpoint['step'] == 1 and checkpoint['threads'] >= 1
    names = checkpoint['weights'].keys()
    assert names == checkpoint['ema'].keys() and all('.' in name for name in names)
    assert {name for group in checkpoint['optimizers']['param_groups'] for name in group['params']} == names


def test_the_digest_follows_the_contents(tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    a.write_bytes(b'weights')
    b.write_bytes(b'weights')
    assert checkpoints.digest(a) == checkpoints.digest(b) == hashlib.sha256(b'weights').hexdigest()
    b.write_bytes(b'other weights')
    assert checkpoints.digest(a) != checkpoints.digest(b)


def test_a_small_network_or_a_line(tmp_path):
    path = tmp_path / 'data' / 'net.pt'
    path.parent.mkdir()

    def load(build=lambda saved: torch.nn.Linear(2, saved['size']), **more):
        return checkpoints.load_network(path, build, 'a net', **more)
    with pytest.raises(UserError, match='net.pt: missing, truncated or not a net .FileNotFoundError.; delete .*data to make it'):
        load()
    torch.save(dict(size=3, weights=torch.nn.Linear(2, 3).state_dict()), path)
    assert load().weight.shape == (3, 2) and not load().training
    with pytest.raises(UserError, match='not a net .KeyError.; do this'):
        load(lambda saved: saved['width'], remedy='do this')
    with pytest.raises(UserError, match='not a net .RuntimeError.'):
        load(lambda saved: torch.nn.Linear(9, 9))
    path.write_bytes(b'garbage')
    with pytest.raises(UserError, match='not a net'):
        load()


def test_fetched_weights_are_fetched_by_their_own_script(here, monkeypatch):
    """init_from=mnist or =judge names no script that makes weights: nothing is run."""
    asked = []
    monkeypatch.setattr(processes, 'make_once', lambda name, path: asked.append((name, path)))
    for name in ('mnist', 'judge', 'scenes_parser', 'download', 'siglip', 'smollm2'):
        with pytest.raises(UserError, match=f'out/{name}/ckpt_last.pt: no such checkpoint'):
            run('out/a', init_from=name)
    assert asked == [(name, Path(f'out/{name}/ckpt_last.pt')) for name in ('siglip', 'smollm2')]


def test_a_run_by_its_file(here, monkeypatch):
    """init_from takes a name, a folder or a checkpoint's file, whose path may hold a colon, as on Windows."""
    run('out/a', max_iters=1)
    shutil.copytree('out/a', 'C:runs')
    for name in ('a', 'out/a', 'out/a/', 'out/a/ckpt_last.pt', 'out/a/ckpt_best.pt', 'C:runs', 'C:runs/ckpt_last.pt'):
        sources = checkpoints.read_sources(name)
        assert list(sources) == [''] and sources['']['step'] == 1
    Path('a').mkdir()  # a folder without a checkpoint
    assert checkpoints.find('a') == Path('out/a/ckpt_last.pt') and checkpoints.find('C:runs') == Path('C:runs/ckpt_last.pt')
    assert [checkpoints.split_part(entry) for entry in ('vision:C:\\runs\\a', 'D:\\runs\\a', 'a')] == [
        ('vision', 'C:\\runs\\a'), ('', 'D:\\runs\\a'), ('', 'a')]
    with pytest.raises(UserError, match='no such checkpoint; the nearest are out/a/ckpt_'):
        checkpoints.read(Path('out/a/ckpt_last.pt/ckpt_last.pt'))
