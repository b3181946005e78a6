"""Transfer of a nano4M's encoder to a task: the four ways to train, files, faults."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import UserError
from fourm import Config, FourM
from lab import transfer
from lab.statistics import read_scores
from lab.transfer import Classifier, read_split, train_all, train_probe


@pytest.fixture(scope='module')
def tiny_run(work):
    train.main(model='fourm', dataset='scenes', n_layer_encoder=1, n_layer_decoder=1, n_embd=32, n_head=2,
               num_input_tokens='64', num_target_tokens='64', batch_size=4, micro_batch_size=4, max_iters=1,
               eval_iters=1, device='cpu', dtype='float32', compile=False, pictures=False, out_dir='out/transfer')
    return 'out/transfer'


def tiny():
    torch.manual_seed(0)
    return FourM(Config('caption:300:5 rgb:8:2x2', n_embd=16, n_head=2, n_layer_encoder=1, n_layer_decoder=1))


def sample(n=120):
    """Pictures of the tokens 0 to 3, or 4 to 7."""
    labels = torch.arange(n) % 2
    return 4 * labels[:, None] + torch.from_numpy(np.random.default_rng(0).integers(0, 4, (n, 4))), labels


def test_a_probe_changes_the_linear_layer_alone():
    ids, labels = sample()
    model, classifier = tiny(), Classifier(tiny(), 'rgb', 2)
    assert (classifier(ids) - classifier.head.bias).abs().max() == 0 and classifier.token_slice == slice(5, 9)
    train_probe(classifier, ids, labels)
    assert (classifier(ids).argmax(1) == labels).float().mean() > 0.8
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), classifier.model.parameters()))


def test_finetuning_changes_the_encoder_and_nothing_unused():
    ids, labels = sample()
    model, classifier = tiny(), Classifier(tiny(), 'rgb', 2)
    train_all(classifier, ids, labels, dict(seed=0, batch_size=32, steps=60), 'test', 'model:0.5')
    assert (classifier(ids).argmax(1) == labels).float().mean() > 0.8
    changed = {name.split('.')[0] for name, parameter in classifier.model.named_parameters()
               if not torch.equal(parameter, model.get_parameter(name))}
    assert changed == {'embedding', 'pos_embedding', 'encoder'}


def test_classes(work):
    objects = np.load(work / 'data/scenes/val/raw_objects.npy')
    ids, counts = read_split(work / 'data/scenes', 'val', 'depth', 'count')
    assert ids.shape == (32, 64)
    assert counts.tolist() == [sum(shape >= 0 for shape in row) for row in objects[:, :, 0].tolist()]
    assert read_split(work / 'data/scenes', 'val', 'rgb', 'color')[1].tolist() == objects[:, 0, 1].tolist()


def test_the_program(tiny_run, capsys):
    fused = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(True)  # as in generation
    arguments = f'--out_dir={tiny_run}', '--labels=8,40', '--steps=1', '--batch_size=4', '--n_val=20', '--device=cpu'
    transfer.main(*arguments)
    assert torch.backends.cuda.flash_sdp_enabled()  # training changes nothing for later timings
    torch.backends.cuda.enable_flash_sdp(fused)
    scores = read_scores(Path(tiny_run, 'transfer_count.json'))
    assert {*scores} == {f'--steps=1 --batch_size=4 {way}, {n} labels' for way in ('probe', 'random', 'finetune', 'scratch') for n in (8, 40)}
    assert all(0 <= score['low'] <= score['value'] <= score['high'] <= 1 for score in scores.values())
    assert all(score['n'] == 20 for score in scores.values())
    assert np.ptp(np.asarray(Image.open(f'{tiny_run}/transfer_count.png').convert('L'))) > 200
    printed = capsys.readouterr().out
    assert printed.startswith('  ') and printed.count(' labels  ') == 8 and 'transfer_count.png' in printed
    transfer.main(*arguments)
    assert read_scores(Path(tiny_run, 'transfer_count.json')) == scores  # the same seed


def test_an_interruption_keeps_what_is_finished(tiny_run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(transfer, 'train_all', stop)
    with pytest.raises(KeyboardInterrupt):
        transfer.main(f'--out_dir={tiny_run}', '--task=shape', '--labels=40', '--n_val=20')
    assert [*read_scores(Path(tiny_run, 'transfer_shape.json'))] == ['probe, 40 labels', 'random, 40 labels']


@pytest.mark.parametrize('setting, message', [
    ('--task=size', 'task is one of count, shape, color, label, given one of rgb, depth'),
    ('--given=caption', 'given one of rgb'), ('--task=label', 'label.npy: this data set has no label; it has caption'),
    ('--labels=2', 'labels=2: numbers from 4 to 96'), ('--labels=50,1000', 'numbers from 4 to 96'),
    ('--labels=many', 'not of type int'), ('--steps=0', 'at least 1'), ('--out_dir=out/none', 'no such checkpoint')])
def test_faults(tiny_run, setting, message):
    with pytest.raises(UserError, match=message) as error:
        transfer.main(f'--out_dir={tiny_run}', setting)
    assert '\n' not in str(error.value)
