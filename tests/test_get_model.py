"""`caretrans.get_model`: models by our names and those of OpenMMLab, with the weights of a file, and their features."""
import pytest
import timm
import torch
from reference import published_state_dict

import caretrans
from caretrans.checkpoint import CheckpointError, convert_checkpoint
from caretrans.errors import ConfigError


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Files of casvit_xs, published and in the layout of mmpretrain, and the network with their weights."""
    folder = tmp_path_factory.mktemp('published')
    path, mm = folder / 'rcvit_xs.pth', folder / 'mm.pth'
    weights = {key: value for key, value in published_state_dict('rcvit_xs').items() if 'dist' not in key}
    torch.save(dict(model=weights), path)
    convert_checkpoint(path, mm, 'mmpretrain')
    model = timm.create_model('casvit_xs')
    model.load_state_dict(weights)
    return (path, str(mm)), model.eval()


@pytest.mark.parametrize('name', ['casvit-xsmall_8xb256_in1k', 'casvit_xs', 'rcvit_xs', 'casvit_xs.r384_in1k'])
@torch.no_grad()
def test_a_file_of_any_layout_loads_by_every_name(name, published):
    files, expected = published
    x = torch.randn(2, 3, 100, 132)
    for file in files:
        model = caretrans.get_model(name, pretrained=file)
        assert not model.training and torch.equal(model(x), expected(x))
        features = model.extract_feat(x)
        assert isinstance(features, tuple) and len(features) == 1 and features[0].shape == (2, 220)
        assert torch.equal(model.head(features[0]), expected(x))
        normalised = expected.norm(expected.forward_intermediates(x, [3], intermediates_only=True)[0])
        assert torch.allclose(features[0], normalised.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize('name, model, features', [
    ('casvit-small_8xb256_in1k', 'casvit_s', 256), ('casvit-middle_8xb256_in1k', 'casvit_m', 384),
    ('casvit-tiny_8xb256_in1k', 'casvit_t', 512), ('care_s0', 'care_s0', 1024), ('mlla_t', 'mlla_t', 512)])
@torch.no_grad()
def test_names_and_numbers_of_features(name, model, features):
    found = caretrans.get_model(name)
    assert found.pretrained_cfg['architecture'] == model and not found.training
    assert found.extract_feat(torch.randn(1, 3, 64, 64))[0].shape == (1, features)


@pytest.mark.parametrize('name', ['casvit-large_8xb256_in1k', 'resnet18', ''])
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=f"no model '{name}': choose from casvit-xsmall_8xb256_in1k, ") as error:
        caretrans.get_model(name)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['casvit-small_8xb256_in1k', 'care_s0'])
def test_a_file_of_another_model_is_refused(name, published):
    with pytest.raises(CheckpointError, match='is a checkpoint of casvit_xs, not'):
        caretrans.get_model(name, pretrained=published[0][0])
