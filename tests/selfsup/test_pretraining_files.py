"""Files of pre-training: published ones and ours, both ways, their trunk everywhere else, and detectron2's names."""
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from photos import FRUIT
from published import SMALL, layout, published_file

from caretrans.__main__ import main
from caretrans.checkpoint import CheckpointError, create_from_checkpoint, load_checkpoint, save_checkpoint
from caretrans.dense import create_dense_backbone
from caretrans.selfsup import Design, Pretraining, load_pretraining, save_pretraining
from caretrans.selfsup.features import Features, load_trunk
from caretrans.selfsup.weights import name_for_detectron2

TINY = replace(SMALL, img_size=32, hidden=8, out=4, blocks=2, head_dim=4)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A published file, and one of ours."""
    folder = tmp_path_factory.mktemp('files')
    module = Pretraining(Design(model='test_resnet', img_size=64, hidden=16, out=8, blocks=1))
    save_pretraining(folder / 'ours.pth.tar', module, epoch=3)
    return dict(published=published_file(Pretraining(TINY), folder / 'published.pth.tar'), ours=folder / 'ours.pth.tar')


@pytest.mark.parametrize('change', [
    {}, dict(model='resnet34'), dict(relative=True), dict(heads=2, head_dim=8, factor=2), dict(method='byol')], ids=str)
def test_the_design_of_a_published_file_is_read_from_its_shapes(change, tmp_path):
    design = replace(TINY, **change)
    found = load_pretraining(published_file(Pretraining(design), tmp_path / 'x.pth')).design
    wanted = design if design.method == 'care' else Design(model=design.model, method='byol', hidden=8, out=4)
    assert found == wanted


def test_names_of_the_wrapper_and_old_names_are_read(files, tmp_path):
    weights = torch.load(files['published'], weights_only=True)['model']
    module = load_pretraining(files['published'])
    for change in (lambda key: key.removeprefix('module.'), lambda key: key.replace('.trans.', '.bot.')):
        torch.save({change(key): value for key, value in weights.items()}, tmp_path / 'x.pth')
        for key, value in load_pretraining(tmp_path / 'x.pth').state_dict().items():
            assert torch.equal(value, module.state_dict()[key])


def test_files_are_converted_both_ways(files, tmp_path, capsys):
    ours, back = tmp_path / 'ours.pth.tar', tmp_path / 'back.pth.tar'
    assert main(['convert', str(files['published']), str(ours), '--to', 'caretrans']) == 0
    assert main(['convert', str(ours), str(back), '--to', 'published']) == 0
    assert 'care with resnet18 at 32 pixels' in capsys.readouterr().out
    before, after = (torch.load(path, weights_only=True) for path in (files['published'], back))
    assert list(before['model']) == list(after['model']) and after['start_epoch'] == 100
    assert all(torch.equal(value, after['model'][key]) for key, value in before['model'].items())
    assert main(['convert', str(ours), str(back), '--to', 'published']) == 2
    assert main(['convert', str(ours), str(tmp_path / 'x.pth'), '--to', 'mmpretrain']) == 2
    assert main(['convert', str(ours), str(tmp_path / 'x.pth'), '--to', 'published', '--img-size', '64']) == 2
    assert main(['convert', str(files['ours']), str(tmp_path / 'x.pth'), '--to', 'published']) == 2
    messages = capsys.readouterr().err
    for part in ('already exists', 'has no mmpretrain layout', '--img-size cannot be used with a pre-training',
                 'test_resnet has no published layout'):
        assert part in messages


def test_what_has_no_layout_of_detectron2_is_one_line(files, tmp_path, capsys):
    model = timm.create_model('test_resnet')
    save_checkpoint(tmp_path / 'x.pth', model, arch='test_resnet')
    assert main(['convert', str(tmp_path / 'x.pth'), str(tmp_path / 'x.pkl'), '--to', 'detectron2']) == 2
    assert 'a classifier has no detectron2 layout: use ' in capsys.readouterr().err.splitlines()[-1]
    save_pretraining(tmp_path / 'r.pth', Pretraining(TINY))
    assert main(['convert', str(tmp_path / 'r.pth'), str(tmp_path / 'no' / 'x.pkl'), '--to', 'detectron2']) == 2
    assert 'no/x.pkl: could not be written' in capsys.readouterr().err.splitlines()[-1]


def test_names_of_detectron2(files, tmp_path):
    wanted = layout('trunk_to_detectron2')
    assert {key: name_for_detectron2(key) for key in wanted} == wanted
    target = tmp_path / 'x.pkl'
    assert main(['convert', str(files['published']), str(target), '--to', 'detectron2']) == 0
    found = pickle.loads(target.read_bytes())
    trunk = load_pretraining(files['published']).student.trunk.state_dict()
    assert found['matching_heuristics'] is True and len(found['model']) == len(trunk)
    assert np.array_equal(found['model']['stem.conv1.norm.running_var'], trunk['bn1.running_var'].numpy())


def test_the_trunk_of_resnet50_is_that_of_timm():
    wanted = layout('trunk_r50_layout')
    with torch.device('meta'):
        trunk = timm.create_model('resnet50', num_classes=0)
    assert {key: list(value.shape) for key, value in trunk.state_dict().items()} == wanted


def test_a_file_of_ours_is_a_checkpoint_of_its_trunk(files, tmp_path, caplog):
    module, x = load_pretraining(files['ours']).eval(), torch.randn(2, 3, 64, 64)
    model, checkpoint = create_from_checkpoint(files['ours'])
    assert model.num_classes == 0 and checkpoint.meta['epoch'] == 3
    wanted = Features(module.student.trunk)(x)
    assert torch.equal(model.eval()(x), wanted)
    classifier = timm.create_model('test_resnet', num_classes=5)
    load_checkpoint(classifier, files['ours'], new_heads=True)
    assert torch.equal(Features(classifier.eval())(x), wanted)
    timm.models.load_checkpoint(timm.create_model('test_resnet', num_classes=0), str(files['ours']))
    backbone = create_dense_backbone('test_resnet', files['ours'], out_indices=(3,), norm='none').eval()
    assert torch.equal(backbone(x)[0], module.student.trunk.forward_features(x))


def test_other_commands_say_what_a_pre_training_is(files, capsys):
    image = str(next((FRUIT / 'val' / 'orange').glob('*.jpg')))
    assert main(['predict', '--checkpoint', str(files['ours']), image]) == 2
    assert 'has no classes: train it first (train.py --checkpoint FILE --new-heads)' in capsys.readouterr().err
    assert main(['predict', '--checkpoint', str(files['published']), image]) == 2
    assert 'is a published self-supervised pre-training: `python -m caretrans convert' in capsys.readouterr().err
    with pytest.raises(CheckpointError, match='is a published self-supervised pre-training'):
        load_checkpoint(timm.create_model('resnet18', num_classes=5), files['published'], new_heads=True)


@pytest.mark.parametrize('teacher', [False, True])
def test_the_trunk_of_student_or_teacher_is_taken(files, teacher):
    trunk, preparation = load_trunk(str(files['published']), teacher=teacher)
    assert preparation.size == (32, 32) and preparation.interpolation == 'bilinear'
    module = load_pretraining(files['published'])
    wanted = (module.teacher if teacher else module.student).trunk.conv1.weight
    assert torch.equal(trunk.conv1.weight, wanted) and not torch.equal(
        wanted, (module.student if teacher else module.teacher).trunk.conv1.weight)


@pytest.mark.parametrize('change, message', [
    (lambda weights: weights.pop('module.student_encoder.fc1.0.weight'), r'lacks student_encoder.fc1.0.weight'),
    (lambda weights: weights.pop('module.teacher_encoder.fc2.3.bias'), '1 missing: teacher.fc2.3.bias'),
    (lambda weights: weights.update({'module.student_encoder.conv1.weight': torch.zeros(8, 3, 7, 7)}), 'its trunk is')])
def test_half_a_file_is_refused(change, message, files, tmp_path):
    weights = torch.load(files['published'], weights_only=True)['model']
    change(weights)
    torch.save(dict(model=weights), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=message):
        load_pretraining(tmp_path / 'x.pth')


def test_files_of_other_kinds_are_refused(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='is no file of self-supervised pre-training'):
        load_pretraining(tmp_path / 'x.pth')
