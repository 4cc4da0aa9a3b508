"""Training steps compute what the published code computes, and deliberate errors are noticed."""
from copy import deepcopy

import pytest
import torch
from published import SMALL, error, golden, layout, probe, published_file, views
from timm.optim import create_optimizer_v2

from caretrans.selfsup import Design, Pretraining, load_pretraining, optimizer, pretraining
from caretrans.selfsup.optimizer import build_optimizer
from caretrans.selfsup.tstream import Attention

BOUND = 1e-8


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    path = published_file(Pretraining(SMALL), tmp_path_factory.mktemp('small') / 'small.pth.tar')
    return load_pretraining(path).double()


def published_key(name: str) -> str:
    return name.removeprefix('trunk.')


def find(encoder) -> dict:
    """The parameters of an encoder under published keys."""
    return {published_key(name): p for name, p in encoder.named_parameters()}


def statistics(module) -> dict:
    """Running means and variances of both encoders under published keys."""
    return {f'{owner}_encoder.{published_key(name)}': buffer for owner in ('student', 'teacher')
            for name, buffer in getattr(module, owner).named_buffers() if 'running' in name}


def norms(tensors: dict, keys) -> torch.Tensor:
    return torch.stack([tensors[key].norm() for key in keys])


def dots(tensors: dict, keys, owner: str) -> torch.Tensor:
    return torch.stack([(tensors[key] * probe(f'{owner}_encoder.{key}', tensors[key].shape)).sum() for key in keys])


def gradient_errors(module, arrays) -> dict:
    """Of norms, relative, and of dots, relative to the norm; biases before a BatchNorm have a gradient of 0."""
    grads, keys = {key: p.grad for key, p in find(module.student).items()}, list(arrays['grad_keys'])
    assert set(keys) == set(grads)
    wanted = torch.from_numpy(arrays['grad_norms'])
    scale = torch.where(wanted > 1e-10, wanted, 1.)
    return dict(grads=float(((norms(grads, keys) - wanted) / scale).abs().max()),
                grad_dots=float(((dots(grads, keys, 'student') - torch.from_numpy(arrays['grad_dots'])) / scale)
                                .abs().max()))


def output_errors(seen, arrays, every) -> dict:
    """Of everything that the first step computes on the way, as `watch` saw it."""
    errors = {}
    for owner, order in (('student', (1, 2)), ('teacher', (2, 1))):
        for v, (outputs, maps, tmap, attentions) in zip(order, seen[owner], strict=True):
            found = {'c': outputs.c, 't': outputs.t, 'c5_mean': maps[1].mean((2, 3))[:, ::every]}
            if owner == 'student':
                found.update(c4_mean=maps[0].mean((2, 3))[:, ::every], tmap_mean=tmap.mean((2, 3))[:, ::every])
                assert list(tmap.shape) == list(arrays['student_tmap_shape'])
            errors.update({f'{owner}_{name}_v{v}': error(y, arrays[f'{owner}_{name}_v{v}'])
                           for name, y in found.items()})
            for b, y in enumerate(attentions if (owner, v) == ('student', 1) else ()):
                assert list(y.shape) == list(arrays[f'attn{b}_shape'])
                errors[f'attn{b}'] = max(error(y.mean((2, 3))[:, ::every], arrays[f'attn{b}_mean']),
                                         error(y[:, ::every][:, :8, :2, :2], arrays[f'attn{b}_crop']))
    return errors


def watch(module) -> dict:
    """For each encoder, a list of (outputs, maps, map of the T-stream, attentions) of each of its calls."""
    seen = dict(student=[], teacher=[])
    for owner in seen:
        encoder, parts = getattr(module, owner), {}
        for name, layer in (('c4', encoder.trunk.layer3), ('c5', encoder.trunk.layer4), ('t', encoder.trans)):
            layer.register_forward_hook(lambda _, args, y, name=name, parts=parts: parts.update({name: y.detach()}))
        for layer in encoder.modules():
            if isinstance(layer, Attention):
                layer.register_forward_hook(
                    lambda _, args, y, parts=parts: parts.setdefault('attn', []).append(y.detach()))
        encoder.register_forward_hook(lambda _, args, y, owner=owner, parts=parts: seen[owner].append(
            (y, (parts['c4'], parts['c5']), parts['t'], parts.pop('attn'))))
    return seen


def train(module, name, steps=None, offset=0, every=4, details=True, **options) -> dict:
    """The errors of a golden run: of its first step in detail, of all losses, and of the state after the last step."""
    arrays, errors = golden(name), {}
    total, first, steps = int(arrays['total_iters']), int(arrays['first_iter']), steps or len(arrays['losses'])
    sgd = build_optimizer(module.student, lr=1., **options)
    seen = watch(module)
    for k in range(steps):
        module.update_teacher(first + k + offset, total)
        if k == 0 and details:
            errors['teacher_0'] = error(norms(find(module.teacher), arrays['teacher_keys']), arrays['teacher_norms_0'])
        losses = module(*views(arrays, k))
        found = torch.stack([losses[name] for name in ('loss', 'c', 't', 'attention')])
        errors[f'losses_{k}'] = error(found, arrays['losses'][k])
        sgd.zero_grad()
        losses['loss'].backward()
        if k == 0 and details:
            errors.update(output_errors(seen, arrays, every), **gradient_errors(module, arrays))
            errors['bn'] = error(norms(statistics(module), arrays['bn_keys']), arrays['bn_norms'])
        for group in sgd.param_groups:
            group['lr'] = float(arrays['lrs'][k])
        sgd.step()
    if steps == len(arrays['losses']):
        keys = arrays['teacher_keys']
        counts = [getattr(module, owner).trunk.bn1.num_batches_tracked for owner in ('student', 'teacher')]
        assert [int(count) for count in counts] == list(arrays['num_batches_tracked_end'])
        errors.update(
            student_end=error(norms(find(module.student), arrays['grad_keys']), arrays['student_norms_end']),
            teacher_end=error(norms(find(module.teacher), keys), arrays['teacher_norms_end']),
            teacher_dots_end=error(dots(find(module.teacher), keys, 'teacher'), arrays['teacher_dots_end']),
            bn_end=error(norms(statistics(module), arrays['bn_keys']), arrays['bn_norms_end']))
    return errors


def test_five_steps_of_a_small_network(small):
    errors = train(deepcopy(small), 'care_r18_small')
    print({key: f'{value:.1e}' for key, value in errors.items()})
    assert len(errors) > 30 and max(errors.values()) < BOUND


@pytest.mark.slow
def test_two_steps_of_resnet50_at_its_published_size(tmp_path):
    module = Pretraining(Design())
    wanted = layout('care_r50_100e_file_layout')
    path = published_file(module, tmp_path / 'care_r50_100e.pth.tar')
    written = torch.load(path, weights_only=True)['model']
    assert {key: list(value.shape) for key, value in written.items()} == wanted['model']
    assert list(written) == list(wanted['model'])
    assert [published_key(name) for name, _ in module.student.named_parameters()] == wanted['optimizer']['order']
    errors = train(load_pretraining(path).double(), 'care_r50', every=16)
    print({key: f'{value:.1e}' for key, value in errors.items()})
    assert len(errors) > 30 and max(errors.values()) < BOUND


# Deliberate errors ----------------------------------------------------------------------------------------------------

def show_the_teacher_the_same_view(monkeypatch):
    distance = pretraining._distance
    monkeypatch.setattr(pretraining, '_distance', lambda student, teacher: distance(student, teacher[::-1]))


def let_the_t_stream_learn_from_attention(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'detach', lambda self: self)


def decay_matrices_only(monkeypatch):
    monkeypatch.setattr(optimizer, 'create_optimizer_v2', lambda *args, **options: create_optimizer_v2(
        *args, **dict(options, filter_bias_and_bn=True)))


@pytest.mark.parametrize('change, options, steps, noticed', [
    (show_the_teacher_the_same_view, {}, 1, 'losses_0'),
    (None, dict(offset=1), 1, 'teacher_0'),
    (let_the_t_stream_learn_from_attention, {}, 1, 'grads'),
    (None, dict(opt='sgd'), 3, 'losses_2'),
    (decay_matrices_only, {}, 3, 'losses_2')], ids=['views', 'momentum', 'detached', 'nesterov', 'decay'])
def test_an_error_is_noticed(change, options, steps, noticed, small, monkeypatch):
    if change is not None:
        change(monkeypatch)
    errors = train(deepcopy(small), 'care_r18_small', steps, details=steps == 1, **options)
    print({key: f'{value:.1e}' for key, value in errors.items()})
    assert errors[noticed] > 10 * BOUND
