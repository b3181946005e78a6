"""A tiny data set of scenes, rendered and tokenized once for all tests, in a folder of its own."""
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402, F401  (before torch, see there)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def float32_threads():
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    """A working folder that sees the repository's files and holds data/scenes: 96 + 32 scenes, briefly trained tokenizers."""
    import prepare.image_tokenizers
    import prepare.scenes
    import prepare.scenes_parser
    folder = tmp_path_factory.mktemp('work')
    for name in ('config', 'prepare'):
        (folder / name).symlink_to(ROOT / name)
    before = Path.cwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    specs = {name: (*spec[:3], 25) for name, spec in prepare.image_tokenizers.SPECS.items()}
    patch.setattr(prepare.image_tokenizers, 'SPECS', specs)
    patch.setattr(prepare.image_tokenizers.train_field, '__defaults__', (0, 8))  # pictures a step
    fit = prepare.scenes_parser.fit
    patch.setattr(prepare.scenes_parser, 'fit', lambda model, loss_of, batch_of, steps, *rest, **more: fit(
        model, loss_of, batch_of, 10, *rest, **more))
    prepare.scenes.main(n_train=96, n_val=32, workers=1)
    yield folder
    patch.undo()
    os.chdir(before)


@pytest.fixture
def here(work, tmp_path):
    """A working folder of its own, with a copy of the tiny data set."""
    shutil.copytree(work / 'data', tmp_path / 'data')
    for name in ('config', 'prepare'):
        (tmp_path / name).symlink_to(work / name)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A working folder with random numbers for one chapter, by name: settings of a tiny run."""
    from tests import faults
    monkeypatch.chdir(tmp_path)

    def make(chapter):
        faults.make_data(chapter, faults.CASES[chapter][0])
        return faults.RUN | faults.CASES[chapter][1] | dict(model=chapter, dataset=chapter)
    return make
