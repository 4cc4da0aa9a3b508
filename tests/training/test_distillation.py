"""Distillation: the loss written out, the choice of teachers, and every loss without a teacher."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from caretrans.checkpoint import save_checkpoint
from caretrans.config import TrainConfig
from caretrans.errors import ConfigError
from caretrans.training.losses import build_task, build_teacher
from caretrans.training.classification import build_mixup

CPU = torch.device('cpu')
CLASSES = 5


@pytest.fixture(scope='module')
def teacher_file(tmp_path_factory):
    """A teacher of another architecture, with weights that predict different classes for different images."""
    torch.manual_seed(1)
    model = timm.create_model('regnety_002', num_classes=CLASSES)
    nn.init.normal_(model.head.fc.weight)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(model.state_dict(), path)
    return path


def make_student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('care_s0', num_classes=CLASSES, depths=(1, 1, 1, 1), ls_init_value=0.1)


def make_config(teacher_file, **settings) -> TrainConfig:
    return TrainConfig(**{**dict(
        teacher='regnety_002', teacher_checkpoint=str(teacher_file), smoothing=0.1, epochs=10), **settings})


def make_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 64, 64, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


@pytest.mark.parametrize('weight', [0.5, 0.8])
@pytest.mark.parametrize('mixed', [False, True])
def test_the_loss_equals_its_definition(teacher_file, mixed, weight):
    """w CE(head, smoothed and mixed labels) + (1 - w) CE(dist_head, argmax of the teacher on the same mixed image)."""
    config = make_config(teacher_file, task_weight=weight, **(dict(mixup=0.8, cutmix=1.0) if mixed else {}))
    student = make_student()
    task = build_task(config, student, CPU).train()
    x, labels = make_batch()
    soft = torch.full((8, CLASSES), 0.1 / CLASSES).scatter(1, labels[:, None], 0.9 + 0.1 / CLASSES)
    target = labels
    if mixed:
        x, target = build_mixup(config, CLASSES)(x, labels)
        lam = (target[0, labels[0]] - 0.1 / CLASSES) / 0.9 if labels[0] != labels[-1] else None
        soft = soft * lam + soft.flip(0) * (1 - lam)
        assert torch.allclose(soft, target, atol=1e-6)
    torch.manual_seed(7)
    loss = task(x, target)['loss']

    teacher = build_teacher(config, CLASSES)
    predictions = teacher(x).argmax(dim=1)
    assert len(predictions.unique()) > 1, 'a teacher that predicts one class would verify little'
    torch.manual_seed(7)
    head, dist_head = student.train()(x)
    by_hand = weight * -(soft * head.log_softmax(dim=1)).sum(dim=1).mean() \
        + (1 - weight) * -dist_head.log_softmax(dim=1)[range(8), predictions].mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_only_the_student_learns_and_both_heads_do(teacher_file):
    student = make_student()
    task = build_task(make_config(teacher_file), student, CPU).train()
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    task(*make_batch())['loss'].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in (student.head.fc.weight, student.head_dist.fc.weight))
    assert all(p.grad is None for p in task.teacher.parameters()) and not task.teacher.model.training
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())


def test_our_teachers_predict_with_the_mean_of_their_heads(tmp_path):
    torch.manual_seed(4)
    model = timm.create_model('care_s1', num_classes=CLASSES)
    save_checkpoint(tmp_path / 'ours.pth.tar', model, arch='care_s1')
    teacher = build_teacher(make_config(tmp_path / 'ours.pth.tar', teacher='care_s1'), CLASSES)
    x, _ = make_batch()
    assert torch.equal(teacher(x), model.eval()(x)) and not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_computes_in_the_precision_of_the_student(teacher_file):
    task = build_task(make_config(teacher_file), make_student(), CPU).train()
    seen = []
    task.teacher.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        task(*make_batch())
    task(*make_batch())
    assert seen == [torch.bfloat16, torch.float32]


def test_a_compiled_student_has_a_compiled_teacher(teacher_file):
    plain, compiled = (build_task(make_config(teacher_file), make_student(), CPU).train() for _ in range(2))
    compiled.compile(backend='eager')  # as `Trainer` does for --compile, without the slow code generation
    assert hasattr(compiled.teacher.model, '_orig_mod') and hasattr(compiled.get_trainable_module(), '_orig_mod')
    losses = []
    for task in (plain, compiled):
        torch.manual_seed(7)
        losses.append(task(*make_batch())['loss'].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_teacher_gets_its_own_normalisation(teacher_file):
    student = make_student()
    task = build_task(make_config(teacher_file), student, CPU)
    given = []
    task.teacher.mean_kd.fill_(0.5)
    task.teacher.std_kd.fill_(0.25)
    task.teacher.model.stem.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    x, labels = make_batch()
    task(x, labels)
    mean, std = (torch.tensor(student.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    assert torch.allclose(given[0], (x * std + mean - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize('settings, message', [
    (dict(teacher='resnet1'), "No teacher 'resnet1'"),
    (dict(teacher='care_s0'), 'teacher.pth'),
    (dict(model='mobilenetv2_100'), 'mobilenetv2_100 has no second head'),
    (dict(model='casvit_xs'), 'casvit_xs has one head, .* --model-args distilled=true'),
])
def test_teachers_that_cannot_teach_are_refused(teacher_file, settings, message):
    config = make_config(teacher_file, **settings)
    student = make_student() if config.model == 'care_s0' else timm.create_model(config.model, num_classes=CLASSES)
    with pytest.raises(ValueError, match=message):
        build_task(config, student, CPU)


@pytest.mark.parametrize('name, arguments', [
    ('casvit_xs', dict(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16))),
    ('mlla_t', dict(depths=(1, 1, 1, 1), width=32))])
def test_the_second_head_of_other_networks_learns_the_predictions_of_the_teacher(teacher_file, name, arguments):
    student = timm.create_model(name, num_classes=CLASSES, distilled=True, **arguments)
    task = build_task(make_config(teacher_file, model=name), student, CPU).train()
    x, labels = make_batch()
    result = task(x, labels)
    head, head_dist = student(x)
    predictions = task.teacher(x).argmax(dim=1)
    expected = 0.5 * F.cross_entropy(head, labels, label_smoothing=0.1) + 0.5 * F.cross_entropy(head_dist, predictions)
    assert result['loss'].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_of_other_classes_is_refused(teacher_file):
    with pytest.raises(ConfigError, match='regnety_002 has 5 classes, the data 14'):
        build_teacher(make_config(teacher_file), 14)


def test_weights_that_cannot_be_downloaded_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ConfigError, match='regnety_160.deit_in1k could not be downloaded .* --teacher-checkpoint'):
        build_teacher(TrainConfig(teacher='regnety_160.deit_in1k'), 1000)


@pytest.mark.parametrize('loss', ['ce', 'bce'])
@pytest.mark.parametrize('smoothing', [0., 0.1])
@pytest.mark.parametrize('mixup', [0., 0.8])
def test_every_loss_without_a_teacher_equals_its_definition(loss, smoothing, mixup):
    config = TrainConfig(loss=loss, smoothing=smoothing, mixup=mixup, epochs=10)
    student = make_student()
    task = build_task(config, student, CPU).train()
    x, labels = make_batch()
    soft = torch.full((8, CLASSES), smoothing / CLASSES)
    soft = soft.scatter(1, labels[:, None], 1 - smoothing + smoothing / CLASSES)
    target = labels
    if mixup:
        x, target = build_mixup(config, CLASSES)(x, labels)
        soft = target
    logits = student(x)
    expected = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean() if loss == 'ce' else \
        -(soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits)).mean()
    assert task(x, target)['loss'].item() == pytest.approx(expected.item(), rel=1e-5)
