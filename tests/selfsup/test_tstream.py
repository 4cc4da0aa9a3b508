"""The T-stream computes what the published one computes: outputs, attentions and gradients."""
import pytest
import torch
from published import TAG, error, fill, golden, layout, probe
from reference import filled_input

from caretrans.selfsup.tstream import Attention, TStream

STACKS = {
    'abs': ((3, 32, 6, 4), dict(dim=32, out_dim=64, size=(6, 4), blocks=3, head_dim=4)),
    'rel': ((3, 32, 6, 4), dict(dim=32, out_dim=64, size=(6, 4), blocks=2, head_dim=4, relative=True)),
    'flat': ((2, 64, 5, 5), dict(dim=64, out_dim=64, size=(5, 5), blocks=2, heads=2, head_dim=8, downsample=False))}


def watch(stack) -> list:
    """(input, output) of each attention in later calls."""
    seen = []
    for module in stack.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    return seen


@pytest.mark.parametrize('name', STACKS)
def test_a_stack_computes_what_the_published_one_computes(name):
    shape, options = STACKS[name]
    stack, arrays, prefix = TStream(**options), golden('tstream'), f'{TAG}.stack_{name}'
    assert {key: list(value.shape) for key, value in stack.state_dict().items()} == layout(f'stack_{name}_layout')
    fill(stack, f'{prefix}.')
    x = filled_input(shape, prefix).double().requires_grad_()
    errors = {'eval': error(stack.eval()(x), arrays[f'{name}_eval'])}
    seen = watch(stack)
    y = stack.train()(x)
    errors['train'] = error(y, arrays[f'{name}_train'])
    for i, (before, after) in enumerate(seen):
        errors[f'attn{i}'] = max(
            error(before, arrays[f'{name}_attn{i}_in']), error(after, arrays[f'{name}_attn{i}_out']))
    (y * probe(prefix, y.shape)).sum().backward()
    errors['input_grad'] = error(x.grad, arrays[f'{name}_input_grad'])
    norms = {key: p.grad.norm() for key, p in stack.named_parameters()}
    errors['grads'] = error(torch.stack([norms[key] for key in arrays[f'{name}_keys']]), arrays[f'{name}_grad_norms'])
    print(name, {key: f'{value:.1e}' for key, value in errors.items()})
    assert len(errors) > 4 and max(errors.values()) < 1e-8


def test_a_map_of_another_size_is_named():
    with pytest.raises(ValueError, match='The map is 4 x 4, but the position code was made for 6 x 4'):
        Attention(8, (6, 4), 2, 4)(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match='map of 5 x 4, whose sides must be even'):
        TStream(8, 16, (5, 4))
