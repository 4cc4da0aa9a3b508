"""Counting: parameters, multiply-adds by part and kind, activations."""
import pytest
import timm
import torch
import torch.nn as nn
from registered import CARE, gmacs

from caretrans.measure import count_operations, count_parameters, counts as measure, list_parts, make_empty


class OneOfEach(nn.Module):
    """A layer of each kind, on 8 x 8 images, with a product of activations at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, (5, 1), padding=(2, 0), groups=6))
        self.fc = nn.Linear(6, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.blocks(self.stem(x)).flatten(2)  # (1, 6, 64)
        return self.fc((x @ x.transpose(1, 2)).mean(1))


def test_kinds_parts_and_activations_are_those_worked_out_by_hand():
    counts = count_operations(OneOfEach(), (8, 8))
    assert counts.macs == {
        ('stem', 'conv other'): 4 * 64 * 3 * 9, ('blocks.0', 'conv 1x1'): 6 * 64 * 4,
        ('blocks.1', 'conv depth-wise'): 6 * 64 * 5, ('fc', 'linear'): 6 * 10,
        (measure.OUTSIDE, 'attention'): 6 * 6 * 64}
    assert counts.activations == 64 * (4 + 6 + 6) + 36 + 10
    assert counts.gmacs == pytest.approx(sum(counts.sum_by_stage().values()))


@pytest.mark.parametrize('name', [*CARE, 'mobilenetv2_100', 'fastvit_t8', 'deit_tiny_distilled_patch16_224'])
def test_sums_equal_the_counts_of_pytorch(name):
    model = make_empty(name)
    assert next(model.parameters()).is_meta
    counts, expected = count_operations(model, (224, 224)), gmacs(model)['total']
    assert counts.gmacs == pytest.approx(expected)
    assert sum(counts.sum_by_stage().values()) == pytest.approx(expected)
    assert sum(counts.sum_by_kind().values()) == pytest.approx(expected)
    assert counts.sum_by_kind()['attention'] > 0 or name in ('mobilenetv2_100', 'fastvit_t8')
    assert measure.OUTSIDE not in counts.sum_by_stage()


def test_care_has_its_multiply_adds_in_the_stages_and_in_1x1_convolutions():
    counts = count_operations(make_empty('care_s1'), (224, 224))
    assert list(counts.sum_by_stage()) == [
        'stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3', 'head', 'head_dist']
    assert counts.sum_by_kind()['conv 1x1'] > 0.9 * counts.gmacs


def test_oblong_images_and_batches_scale_the_count():
    model = make_empty('care_s0')
    per_image = count_operations(model, (64, 128))
    assert count_operations(model, (64, 128), batch=3).macs == {k: 3 * v for k, v in per_image.macs.items()}
    assert count_operations(model, (64, 64)).gmacs < per_image.gmacs < count_operations(model, (128, 128)).gmacs


def test_an_operation_that_is_not_sorted_is_noticed(monkeypatch):
    known = {op: formula for op, formula in measure.flop_registry.items() if op != torch.ops.aten.bmm}
    monkeypatch.setattr(measure, 'flop_registry', known)
    with pytest.raises(RuntimeError, match='PyTorch counts'):
        count_operations(make_empty('care_s0'), (64, 64))


def test_an_operation_sorted_into_another_part_is_noticed(monkeypatch):
    model = OneOfEach()
    parts = {'stem': 'stem', 'blocks.0': 'blocks.1', 'blocks.1': 'blocks.1', 'fc': 'fc'}
    counter = measure._KindCounter

    class Wrong(counter):
        def __init__(self, *args):
            super().__init__(*args)
            self.parts = {name: parts.get(part, part) for name, part in self.parts.items()}

    monkeypatch.setattr(measure, '_KindCounter', Wrong)
    with pytest.raises(RuntimeError, match='blocks.1'):
        count_operations(model, (8, 8))


def test_parameters_are_counted_with_and_without_the_head_of_distillation():
    model = timm.create_model('care_s0')
    assert count_parameters(model) == dict(parameters=7_340_000, parameters_one_head=6_312_952)
    assert count_parameters(model, nn.Linear(3, 4))['parameters_fused'] == 16
    plain = count_parameters(make_empty('mobilenetv2_100'))
    assert plain['parameters'] == plain['parameters_one_head'] == 3_504_872


def test_parts_are_children_and_contents_of_containers():
    assert list_parts(OneOfEach()) == ['stem', 'blocks.0', 'blocks.1', 'fc', 'unused']


def test_a_model_that_cannot_be_made_without_values_is_made_on_the_cpu(monkeypatch):
    def create(name):
        model = OneOfEach()
        float(model.fc.bias[0])  # not possible on meta
        return model

    monkeypatch.setattr(measure.timm, 'create_model', create)
    assert next(make_empty('any').parameters()).device.type == 'cpu'
