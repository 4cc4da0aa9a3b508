"""Any backbone is pre-trained: shapes, gradients of every weight, and refusals that name the reason."""
import pytest
import timm
import torch
from reference import SHALLOW
from timm.layers import DropPath

from caretrans.config import TrainConfig
from caretrans.errors import ConfigError
from caretrans.selfsup import Design, Pretraining
from caretrans.selfsup.pretraining import Encoder, measure_spread
from caretrans.training.classification import build_model

SIZES = dict(img_size=64, hidden=24, out=16, blocks=2)
BACKBONES = [
    ('care_s0', dict(depths=SHALLOW), 128, 1024), ('casvit_xs', dict(depths=SHALLOW), 112, 220),
    ('mlla_t', dict(depths=SHALLOW), 256, 512), ('test_resnet', {}, 192, 96), ('test_convnext', {}, None, None),
    ('test_efficientnet', {}, None, None), ('test_mambaout', {}, None, None)]


@pytest.mark.parametrize('name, args, channels, features', BACKBONES, ids=[row[0] for row in BACKBONES])
@pytest.mark.parametrize('method', ['care', 'byol'])
def test_every_weight_of_a_backbone_learns(name, args, channels, features, method):
    module = Pretraining(Design(model=name, model_args=args, method=method, **SIZES))
    losses = module(*torch.randn(2, 4, 3, 64, 64), details=True)
    losses['loss'].backward()
    assert set(losses) == (
        {'loss', 'c', 'spread_c'} if method == 'byol' else
        {'loss', 'c', 't', 'attention', 'spread_c', 'spread_t', 'attention_student'})
    assert [key for key, p in module.student.named_parameters() if p.grad is None] == []
    assert [key for key, p in module.teacher.named_parameters() if p.grad is not None or p.requires_grad] == []
    if method == 'care' and channels:
        block = module.student.trans.net[0]
        assert (block.net[0].in_channels, block.net[-1].num_features) == (channels, features)
    assert len(module.student.fc1) == 8 and len(module.teacher.fc1) == 4


def test_the_teacher_starts_as_a_copy_and_moves_with_the_momentum():
    module = Pretraining(Design(model='test_resnet', **SIZES))
    student, teacher = (dict(part.named_parameters()) for part in (module.student, module.teacher))
    assert all(torch.equal(p, student[key]) for key, p in teacher.items()) and set(teacher) < set(student)
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in module.modules()
               if isinstance(norm, torch.nn.BatchNorm2d))
    for p in student.values():
        p.data += 1
    before = {key: p.clone() for key, p in teacher.items()}
    module.update_teacher(5, 10)  # momentum 0.995
    for key, p in teacher.items():
        torch.testing.assert_close(p, .995 * before[key] + .005 * student[key])
    before = {key: p.clone() for key, p in teacher.items()}
    module.update_teacher(10, 10)  # 1
    assert all(torch.equal(p, before[key]) for key, p in teacher.items())


def test_statistics_are_of_one_view_at_a_time():
    module = Pretraining(Design(model='test_resnet', **SIZES))
    views = torch.randn(4, 3, 64, 64), 5 + 3 * torch.randn(4, 3, 64, 64)
    norms = [next(part for part in encoder.modules() if isinstance(part, torch.nn.BatchNorm2d))
             for encoder in (module.student, module.teacher)]
    means = []
    hook = norms[0].register_forward_hook(lambda _, args, y: means.append(args[0].mean((0, 2, 3)).detach()))
    module(*views)
    hook.remove()
    assert len(means) == 2 and (means[0] - means[1]).abs().max() > .1
    torch.testing.assert_close(norms[0].running_mean, .09 * means[0] + .1 * means[1])
    torch.testing.assert_close(norms[1].running_mean, .09 * means[1] + .1 * means[0])


def test_stochastic_depth_is_off_unless_asked_for():
    """Swin has a rate of 0.1 by default."""
    name, small = 'swin_tiny_patch4_window7_224', dict(embed_dim=24, depths=(1, 1, 2, 1), img_size=64, window_size=2)
    for rate in (0., .3):
        rates = dict(drop_path_rate=rate) if rate else {}
        classifier = build_model(TrainConfig(model=name, model_args=small, img_size=64, drop_path=rate), 2)
        encoder = Encoder(Design(model=name, model_args={**small, **rates}, **SIZES))
        for model in (classifier, encoder):
            found = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
            assert found and max(found) == pytest.approx(rate)


def test_spread_tells_a_collapse():
    assert .9 < measure_spread(torch.nn.functional.normalize(torch.randn(256, 64))) < 1.05
    assert measure_spread(torch.ones(8, 64) / 8) == 0


@pytest.mark.parametrize('design, message', [
    (dict(model='no_such'), "No model 'no_such'"),
    (dict(model='resnet18', img_size=72), 'the T-stream halves the first to the second: use an img_size that'),
    (dict(model='test_vit'), 'or --method byol'),
    (dict(model='mlla_t', img_size=40, model_args=dict(depths=SHALLOW)), 'img_size that is a multiple of 32'),
    (dict(model='test_resnet', method='simclr'), "method is 'simclr': choose from care, byol"),
    (dict(model='test_resnet', blocks=0), 'blocks is 0 but must be at least 1'),
    (dict(model='test_resnet', model_args=dict(no_such=1)), 'test_resnet: '),
    (dict(model='test_resnet', model_args=dict(global_pool='')), 'does not pool its features')])
def test_what_cannot_be_is_named(design, message):
    with pytest.raises(ConfigError, match=message):
        Pretraining(Design(**{**SIZES, **design}))


def test_a_model_without_maps_is_named(monkeypatch):
    monkeypatch.delattr(timm.models.ResNet, 'forward_intermediates')
    with pytest.raises(ConfigError, match='test_resnet has no forward_intermediates, from which the T-stream takes'):
        Pretraining(Design(model='test_resnet', **SIZES))
    assert Pretraining(Design(model='test_resnet', method='byol', **SIZES)).student.fc1


def test_a_plain_transformer_learns_without_t_stream():
    losses = Pretraining(Design(model='test_vit', method='byol', **dict(SIZES, img_size=160)))(
        *torch.randn(2, 2, 3, 160, 160))
    losses['loss'].backward()
    assert losses['loss'].isfinite()
