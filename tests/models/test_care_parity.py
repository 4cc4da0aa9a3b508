"""The network is the published one: its outputs, gradients, parameters and multiply-adds."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from parity import TOLERANCE, assert_evaluation_parity, assert_parity, assert_training_parity, largest
from reference import golden, published_layout, published_model, published_state_dict
from registered import CARE, gmacs

from caretrans.models.care import PUBLISHED_KEYS
from caretrans.models.published_keys import rename_keys

PARAMETERS = {'care_s0': 7_340_000, 'care_s1': 9_602_424, 'care_s2': 19_481_288}  # both heads
PARAMETERS_ONE_HEAD = {'care_s0': 6_312_952, 'care_s1': 8_575_376, 'care_s2': 17_941_216}
GMACS = {'care_s0': 0.7178, 'care_s1': 1.0286, 'care_s2': 1.9231}  # at 224 x 224
GMACS_ATTENTION = {'care_s0': 0.0025, 'care_s1': 0.0033, 'care_s2': 0.0049}

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', CARE)
def test_evaluation_reproduces_every_published_array(name, dtype):
    errors = assert_evaluation_parity(published_model(name, dtype), name)
    print(f'{name} {dtype}: logits {errors["logits"]:.1e}, largest {largest(errors)}')


@pytest.mark.parametrize('dtype', DTYPES)
def test_training_step_reproduces_every_published_array(dtype):
    errors = assert_training_parity(published_model('care_s0', dtype), 'care_s0')
    print(f'care_s0 {dtype}: ' + ', '.join(f'{key} {error:.1e}' for key, error in errors.items()))


def test_gradients_and_buffers_of_the_training_step_are_all_of_them():
    expected, layout = golden('care_s0_train'), published_layout('care_s0')
    buffers = [key for key in layout if 'running_' in key]
    assert set(expected['bn_keys']) == set(buffers)
    assert set(expected['grad_keys']) == {key for key in layout if 'num_batches' not in key} - set(buffers)
    assert expected['none'].size == 0


def test_training_step_counts_one_batch():
    model = published_model('care_s0')
    assert_training_parity(model, 'care_s0')
    counts = {key: value.item() for key, value in model.named_buffers() if key.endswith('num_batches_tracked')}
    assert counts and set(counts.values()) == {101}  # the filled weights begin at 100


@pytest.mark.parametrize('name', CARE)
def test_published_layout_differs_only_in_names(name):
    ours = timm.create_model(name, device='meta').state_dict()
    renamed = rename_keys(ours, PUBLISHED_KEYS, to_published=True)
    assert {key: list(value.shape) for key, value in renamed.items()} == published_layout(name)


def test_evaluation_is_the_mean_of_both_heads():
    expected = golden('care_s0')
    assert np.abs((expected['head'] + expected['dist_head']) / 2 - expected['logits']).max() < 1e-15
    assert np.abs(expected['head'] - expected['dist_head']).max() > 1, 'the heads must differ for parity to mean this'


def test_missing_reference_data_is_an_error():
    with pytest.raises(FileNotFoundError, match='care_s9_golden'):
        golden('care_s9')
    with pytest.raises(FileNotFoundError, match='care_s9_official_layout'):
        published_state_dict('care_s9')


@pytest.mark.parametrize('broken', [dict(logits=np.ones((2, 2))), dict(logits=np.full((2, 3), np.nan)), {}])
def test_parity_check_refuses_wrong_shapes_nan_and_missing_arrays(broken):
    expected = dict(logits=np.ones((2, 3)), float32_max_abs_err=np.array(1.))
    assert assert_parity(expected, dict(logits=np.ones((2, 3)) + 1e-10), TOLERANCE[torch.float64]) != {}
    with pytest.raises(AssertionError):
        assert_parity(expected, broken, TOLERANCE[torch.float64])


@pytest.mark.parametrize('name', CARE)
def test_parameters_are_those_of_the_table(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    model.head_dist = nn.Identity()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS_ONE_HEAD[name]


@pytest.mark.parametrize('name', CARE)
def test_multiply_adds_are_those_of_the_table(name):
    counts = gmacs(timm.create_model(name, device='meta'))
    assert counts['total'] == pytest.approx(GMACS[name], rel=0.002)
    assert round(counts['bmm'], 4) == GMACS_ATTENTION[name]  # nothing else than the attention multiplies matrices


def test_every_care_model_has_a_row_in_the_tables():
    assert CARE == sorted(PARAMETERS) == sorted(PARAMETERS_ONE_HEAD) == sorted(GMACS) == sorted(GMACS_ATTENTION)
