"""Heads: pooling, one classifier or two, their replacement, and what distilled training returns."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import SHALLOW, shallow_model
from registered import (
    CARE, assert_same, classifiers_of, each_care_model, each_file, each_model, images, on_meta, one_of_each_file)


@each_model
def test_forward_is_features_then_head(name):
    model = shallow_model(name)
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(x)
        assert_same(model.forward_head(features), logits)
    assert features.shape[:2] == (2, model.num_features)
    assert pooled.shape == (2, model.head_hidden_size)
    assert logits.shape == (2, model.num_classes) == (2, 1000)


@each_model
def test_no_classes_return_pooled_features_and_no_pooling_returns_maps(name):
    x = images(2, 3, 64, 96, device='meta')
    model = on_meta(name, num_classes=0)
    assert model.num_classes == 0 and model(x).shape == (2, model.num_features)
    model = on_meta(name, num_classes=0, global_pool='')
    assert model(x).shape == (2, model.num_features, 2, 3)


@each_care_model
def test_pooling_that_leaves_nothing_to_classify_is_refused(name):
    with pytest.raises(ValueError, match='num_classes must be 0, not 1000'):
        on_meta(name, global_pool='')
    with pytest.raises(ValueError, match='catavgmax'):
        on_meta(name, global_pool='catavgmax')


@each_file
@pytest.mark.parametrize('arguments', [(7, 'catavgmax'), (7, '')])
def test_refused_reset_leaves_the_model_as_it_was(name, arguments):
    model = shallow_model(name)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises((ValueError, AssertionError)):
            model.reset_classifier(*arguments)
        assert model.num_classes == 1000 and torch.equal(model(x), expected)


@each_file
def test_reset_classifier_keeps_features_device_dtype_and_mode(name):
    model = shallow_model(name).double()
    x = images(2, 3, 64, 64).double()
    with torch.no_grad():
        expected = model.forward_features(x)
        for num_classes in (7, 0, 3):
            model.reset_classifier(num_classes)
            assert model.num_classes == num_classes
            assert model(x).shape == (2, num_classes or model.num_features)
        assert torch.equal(model.forward_features(x), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    model = on_meta(name).train()
    model.reset_classifier(5)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert all(module.training for module in model.modules())


@each_file
def test_reset_classifier_changes_the_pooling_only_when_asked(name):
    model = shallow_model(name, global_pool='max')
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        model.reset_classifier(5)
        assert_same(model.forward_head(features, pre_logits=True), features.amax(dim=(2, 3)))
        model.reset_classifier(5, 'avg')
        assert_same(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))
        model.reset_classifier(0, '')
        assert torch.equal(model(x), features)
        model.reset_classifier(5)  # something must be pooled to classify
        assert model(x).shape == (2, 5)


@each_model
def test_get_classifier_returns_the_linear_layers(name):
    model = on_meta(name, num_classes=11)
    classifiers = classifiers_of(model)
    assert len(classifiers) == (2 if model.distilled else 1) and model.distilled == (name in CARE)
    assert all(isinstance(fc, nn.Linear) and fc.out_features == 11 for fc in classifiers)
    model.reset_classifier(0)
    assert all(isinstance(fc, nn.Identity) for fc in classifiers_of(model))


@each_model
def test_plain_labels_train_every_parameter_of_both_heads(name):
    """Without distillation the mean of the heads is trained: plain cross entropy, and nothing to set."""
    model = timm.create_model(name, num_classes=10, depths=SHALLOW).train()
    logits = model(images(4, 3, 64, 64))
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    if name in CARE:
        assert torch.equal(model.head.fc.bias.grad, model.head_dist.fc.bias.grad)


def two_headed(name, **kwargs):
    return timm.create_model(name, depths=SHALLOW, **kwargs, **({} if name in CARE else dict(distilled=True)))


@each_file
def test_only_distilled_training_returns_a_pair(name):
    model = two_headed(name, num_classes=10)
    x = images(2, 3, 64, 64)
    assert model.train()(x).shape == model.eval()(x).shape == (2, 10)
    model.set_distilled_training(True)
    assert model.eval()(x).shape == (2, 10)
    head, head_dist = model.train()(x)
    assert head.shape == head_dist.shape == (2, 10) and not torch.equal(head, head_dist)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    model.set_distilled_training(False)
    assert torch.equal(model(x), (head + head_dist) / 2)


@each_file
def test_a_second_head_has_the_layers_of_the_first(name):
    model = two_headed(name, num_classes=10)
    head, head_dist = model.get_classifier()
    assert head.weight.shape == head_dist.weight.shape and not torch.equal(head.weight, head_dist.weight)
    assert model.pretrained_cfg['classifier'] == tuple(
        key for key, module in model.named_modules() if module in (head, head_dist))
    model.reset_classifier(3)
    assert [fc.out_features for fc in model.get_classifier()] == [3, 3]


@pytest.mark.parametrize('name', sorted(set(one_of_each_file()) - set(CARE)))
def test_one_head_cannot_be_distilled(name):
    with pytest.raises(ValueError, match='distilled=True'):
        timm.create_model(name).set_distilled_training(True)
