"""Entries of other projects under names that this one uses too: ignored, or refused in one line."""
import numpy as np
import pytest
import timm
import torch

from caretrans.__main__ import main
from caretrans.checkpoint import CheckpointError, create_from_checkpoint, read_checkpoint
from caretrans.errors import ConfigError
from caretrans.evaluation import EvalConfig, evaluate_checkpoint, load_for_evaluation
from photos import copy_images


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(0)
    return timm.create_model('casvit_xs', num_classes=2).state_dict()


def save(path, weights, **rest):
    torch.save(dict(arch='casvit_xs', state_dict=weights, **rest), path)
    return str(path)


@pytest.mark.parametrize('rest', [dict(config='configs/x.yaml'), dict(config=[1]), dict(eval_config='imagenet')])
def test_settings_of_other_kinds_are_ignored(tmp_path, weights, rest):
    file = save(tmp_path / 'x.pth', weights, **rest)
    result = evaluate_checkpoint(EvalConfig(
        file, str(copy_images(tmp_path / 'data', per_class=2)), workers=0, img_size=32))
    assert result.images == 4


def test_arguments_of_another_model_are_named(tmp_path, weights):
    with pytest.raises(CheckpointError, match=r"model_args \{'width': 3\} do not fit casvit_xs"):
        create_from_checkpoint(save(tmp_path / 'x.pth', weights, model_args=dict(width=3)))


def test_a_size_that_a_network_does_not_take_is_one_line(tmp_path):
    model = timm.create_model('deit_tiny_patch16_224', num_classes=2)
    torch.save(dict(arch='deit_tiny_patch16_224', state_dict=model.state_dict()), tmp_path / 'x.pth')
    with pytest.raises(ConfigError, match='does not take images of 64 x 64 pixels .*: use another size'):
        load_for_evaluation(str(tmp_path / 'x.pth'), img_size=64)
    assert load_for_evaluation(str(tmp_path / 'x.pth'))[2].size == (224, 224)


def test_names_of_classes_may_be_an_array(tmp_path, weights):
    names = read_checkpoint(save(tmp_path / 'x.pth', weights, class_names=np.array(['apple', 'pear'])))
    assert names.get_class_names(2) == ['apple', 'pear'] and names.get_class_names(3) is None
    named = read_checkpoint(save(tmp_path / 'y.pth', weights, class_names={0: 'apple', 1: 'pear'}))
    assert named.get_class_names(2) is None


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied', str(tmp_path / 'secret'))
    monkeypatch.setattr('caretrans.evaluation.predict.predict_images', refuse)
    assert main(['predict', 'x.jpg', '--pretrained', '--model', 'care_s0']) == 2
    assert capsys.readouterr().err.endswith('secret: Permission denied: check the path and its permissions.\n')
