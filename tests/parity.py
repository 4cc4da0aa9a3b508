"""Compare a network with the reference, array by array: what the parity tests check and the mutation tests break."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import filled_input, golden

from caretrans.models.care import PUBLISHED_KEYS
from caretrans.models.published_keys import rename_keys

Arrays = dict[str, np.ndarray]

NOT_OUTPUTS = {'float32_max_abs_err'}  # what float32 cost the published network
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# Logits, loss and the output of the stem are of the order of 1: their errors are absolute. Features reach 4e4 and the
# gradient of the input 6e-3: their errors are taken relative to the largest value of the array. Norms lie in between:
# relative above 1, absolute below. Of the gradient, the end of the longest way, 10 times the tolerance is asked, which
# is less than 1e-9 and 1e-5 of absolute error: float32 costs 1e-5, more or less so with the number of threads.
RELATIVE = ('stage', 'input_grad')
NORMS = ('grad_norms', 'bn_norms')
LOOSER = {'input_grad': 10}


def evaluation_arrays(model: nn.Module) -> Arrays:
    """Everything that `*_golden.npz` holds, as `model` computes it: logits, both heads, stem and stages."""
    x = filled_input((2, 3, 224, 224)).to(next(model.parameters()).dtype)
    seen = {}
    watched = dict(stem=model.stem, head=model.head, dist_head=model.head_dist)
    watched.update({f'stage{i}': stage for i, stage in enumerate(model.stages)})
    hooks = [module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
             for name, module in watched.items()]
    with torch.no_grad():
        arrays = dict(logits=model(x), head=seen.pop('head'), dist_head=seen.pop('dist_head'))
    for hook in hooks:
        hook.remove()
    arrays['stem_mean'] = seen.pop('stem').mean((2, 3))
    for name, features in seen.items():
        arrays[f'{name}_mean'] = features.double().mean((2, 3))
        arrays[f'{name}_std'] = features.double().flatten(2).std(-1)
        arrays[f'{name}_crop'] = features[:, :, :3, :3]
        arrays[f'{name}_shape'] = torch.tensor(features.shape)
    return {name: array.numpy() for name, array in arrays.items()}


def training_arrays(model: nn.Module) -> Arrays:
    """Everything that `care_s0_train_golden.npz` holds, from one training step on two different targets."""
    x = filled_input((4, 3, 128, 128), 'train').to(next(model.parameters()).dtype).requires_grad_()
    model.train().set_distilled_training(True)
    head, head_dist = model(x)
    target = 7 * torch.arange(4) % 1000
    target_dist = (3 * target + 1) % 1000
    loss = 0.5 * F.cross_entropy(head, target) + 0.5 * F.cross_entropy(head_dist, target_dist)
    loss.backward()
    parameters = rename_keys(dict(model.named_parameters()), PUBLISHED_KEYS, to_published=True)
    buffers = rename_keys(dict(model.named_buffers()), PUBLISHED_KEYS, to_published=True)
    grad_norms = {key: p.grad.double().norm().item() for key, p in parameters.items() if p.grad is not None}
    bn_norms = {key: b.double().norm().item() for key, b in buffers.items() if b.is_floating_point()}
    return dict(
        head=head.detach().numpy(), dist_head=head_dist.detach().numpy(), loss=loss.detach().numpy(),
        input_grad=x.grad[..., ::16, ::16].numpy(),
        grad_keys=np.array(list(grad_norms)), grad_norms=np.array(list(grad_norms.values())),
        bn_keys=np.array(list(bn_norms)), bn_norms=np.array(list(bn_norms.values())),
        none=np.array([key for key, p in parameters.items() if p.grad is None]))


def _in_order_of(expected: Arrays, found: Arrays) -> Arrays:
    """Put the norms of `found` in the order of the keys of `expected`."""
    found = dict(found)
    for keys, norms in ('grad_keys', 'grad_norms'), ('bn_keys', 'bn_norms'):
        if keys in expected:
            by_key = dict(zip(found[keys], found[norms], strict=True))
            assert set(by_key) == set(expected[keys]), f'{keys}: {set(by_key) ^ set(expected[keys])}'
            found[keys], found[norms] = expected[keys], np.array([by_key[key] for key in expected[keys]])
    return found


def assert_parity(expected: Arrays, found: Arrays, tolerance: float) -> dict[str, float]:
    """Check every array against the reference and return the errors by name.

    Raises:
        AssertionError: An array is missing, of another shape or type, or off by more than `tolerance`.
    """
    assert set(found) == set(expected) - NOT_OUTPUTS, f'arrays: {set(found) ^ set(expected)}'
    found, errors = _in_order_of(expected, found), {}
    for name, array in found.items():
        reference = expected[name]
        assert array.shape == reference.shape, f'{name}: shape {array.shape}, expected {reference.shape}'
        if reference.dtype.kind != 'f' or reference.size == 0:  # shapes, keys
            assert np.array_equal(array, reference), f'{name}: {array}, expected {reference}'
            continue
        scale = np.abs(reference).max() if name.startswith(RELATIVE) else 1.
        scale = np.maximum(np.abs(reference), 1.) if name in NORMS else scale
        errors[name] = float((np.abs(array - reference) / scale).max())
        allowed = tolerance * LOOSER.get(name, 1)
        assert errors[name] <= allowed, f'{name}: off by {errors[name]:.1e}, allowed are {allowed:.0e}'
    return errors


def assert_evaluation_parity(model: nn.Module, name: str) -> dict[str, float]:
    """Check the published outputs of the model `name`, to the tolerance of the dtype of its parameters."""
    return assert_parity(golden(name), evaluation_arrays(model), TOLERANCE[next(model.parameters()).dtype])


def assert_training_parity(model: nn.Module, name: str) -> dict[str, float]:
    """Check the published training step of the model `name`; it is left in training mode, with gradients."""
    return assert_parity(golden(f'{name}_train'), training_arrays(model), TOLERANCE[next(model.parameters()).dtype])


def largest(errors: dict[str, float]) -> tuple[str, float]:
    """The array with the largest error, and the error."""
    return max(errors.items(), key=lambda item: item[1])
