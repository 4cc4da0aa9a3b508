"""CAS-ViT and MLLA are the published networks: outputs, keys, parameters and multiply-adds."""
import numpy as np
import pytest
import timm
import torch
from checkpoints import PUBLISHED_NAMES, each_peer
from reference import filled_input, filled_model, golden, published_layout, published_state_dict
from registered import CARE, MODELS, gmacs

from caretrans.models.casvit import CasVit
from caretrans.models.mlla import rotary_code
from caretrans.models.published_keys import rename_keys

PARAMETERS = {  # with one head, with two
    'casvit_xs': (2_979_700, 3_200_700), 'casvit_s': (5_507_224, 5_764_224), 'casvit_m': (12_036_520, 12_421_520),
    'casvit_t': (21_250_120, 21_763_120), 'mlla_t': (24_392_200, 24_905_200), 'mlla_s': (43_015_048, 43_528_048),
    'mlla_b': (95_983_960, 96_752_960)}
MILLIONS = {  # as the authors and those who counted theirs give them: with one head, with two
    'casvit_xs': (2.98, 3.20), 'casvit_s': (5.51, 5.76), 'casvit_m': (12.04, 12.42), 'casvit_t': (21.25, 21.76),
    'mlla_t': (24.39, None), 'mlla_s': (43.02, None), 'mlla_b': (95.98, None)}
GMACS = {  # at 224 x 224, with the heads of the layouts
    'casvit_xs': 0.547, 'casvit_s': 0.912, 'casvit_m': 1.859, 'casvit_t': 3.557,
    'mlla_t': 4.131, 'mlla_s': 7.249, 'mlla_b': 16.114}
# The reference of MLLA computed its position code in float32, also where all else was float64.
TOLERANCES = {('casvit_xs', torch.float64): 1e-12, ('casvit_xs', torch.float32): 1e-6,
              ('mlla_t', torch.float64): 1e-8, ('mlla_t', torch.float32): 5e-6}


def heads_of(name):
    return dict(distilled=True) if name.startswith('casvit') else {}


def logits_of(model):
    with torch.no_grad():
        return model(filled_input((2, 3, 224, 224)).to(next(model.parameters()).dtype)).numpy()


def load_published(name, dtype=torch.float64):
    model = timm.create_model(name, **heads_of(name))
    model.load_state_dict(published_state_dict(PUBLISHED_NAMES[name]))
    return model.to(dtype).eval()


def test_all_models_beside_care_are_here():
    assert set(PUBLISHED_NAMES) == set(MODELS) - set(CARE)


@pytest.mark.parametrize('name, dtype', TOLERANCES)
def test_evaluation_reproduces_the_published_logits(name, dtype):
    expected = golden(PUBLISHED_NAMES[name])['logits']
    error = np.abs(logits_of(load_published(name, dtype)) - expected).max()
    print(f'{name} {dtype}: logits off by {error:.1e}, the largest is {np.abs(expected).max():.2f}')
    assert error <= TOLERANCES[name, dtype]


@each_peer
def test_published_layout_differs_only_in_names(name):
    model = timm.create_model(name, device='meta', **heads_of(name))
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    published = published_layout(PUBLISHED_NAMES[name])
    renamed = rename_keys(published, model.published_keys)
    assert renamed == ours and len(renamed) == len(published)
    assert rename_keys(ours, model.published_keys, to_published=True) == published
    assert rename_keys(ours, model.published_keys) == ours
    assert rename_keys(published, model.published_keys, to_published=True) == published


@each_peer
def test_parameters_and_gmacs_are_those_published(name):
    for distilled, parameters, millions in zip((False, True), PARAMETERS[name], MILLIONS[name], strict=True):
        model = timm.create_model(name, device='meta', distilled=distilled)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert millions is None or round(parameters / 1e6, 2) == millions
        expected = GMACS[name] + (0 if distilled == bool(heads_of(name)) else 1 if distilled else -1) * (
            model.num_features * 1000 / 1e9)
        assert gmacs(model)['total'] == pytest.approx(expected, abs=6e-4)


def test_rotation_tables_of_a_file_are_ignored():
    model = timm.create_model('mlla_t')
    published = published_state_dict('mlla_t')
    tables = {f'layers.{s}.blocks.0.attn.rope.rotations': torch.zeros(56 >> s, 56 >> s, 32 << s, 2) for s in range(4)}
    model.load_state_dict({**published, **tables})
    nested = torch.nn.Sequential(timm.create_model('mlla_t'))
    nested.load_state_dict({f'0.{key}': value for key, value in {**published, **tables}.items()})
    for key, value in model.state_dict().items():
        assert torch.equal(value, nested[0].state_dict()[key])


def test_rotary_code_rotates_the_first_half_by_rows_and_the_second_by_columns():
    """theta_i = 10000^(-i / n), n = C / 4: pair p turns by row * theta_p, pair n + p by column * theta_p."""
    code = rotary_code(torch.zeros(1, 32, 5, 7, dtype=torch.float64))
    assert code.shape == (2, 16, 5, 7) and code.dtype == torch.float64
    for i in range(8):
        for row in range(5):
            for column in range(7):
                theta = 10000 ** (-i / 8)
                expected = [np.cos(row * theta), np.sin(row * theta), np.cos(column * theta), np.sin(column * theta)]
                found = [*code[:, i, row, column], *code[:, 8 + i, row, column]]
                assert found == pytest.approx(expected, abs=1e-12)
    assert rotary_code(torch.zeros(1, 32, 5, 7, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize('part, gate', enumerate(['gate_q', 'gate_k']))
def test_each_gate_of_cas_vit_sees_its_own_third_of_the_projection(part, gate):
    mixer = filled_model('casvit_xs').stages[0].blocks[0].mixer
    seen = []
    getattr(mixer, gate).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(1, 48, 8, 8)
    with torch.no_grad():
        mixer(x)
        torch.testing.assert_close(seen, [mixer.qkv(x)[:, 48 * part:48 * (part + 1)]])


def test_cas_vit_has_an_evaluation_at_384_that_squashes():
    cfg = timm.create_model('casvit_xs.r384_in1k', device='meta').pretrained_cfg
    assert (cfg['input_size'], cfg['crop_pct'], cfg['crop_mode']) == ((3, 384, 384), 1.0, 'squash')
    cfg = timm.create_model('casvit_xs', device='meta').pretrained_cfg
    assert (cfg['input_size'], cfg['crop_pct'], cfg['crop_mode']) == ((3, 224, 224), 0.875, 'center')


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match='per stage'):
        CasVit(depths=(1, 1), widths=(8, 8, 8))
    with pytest.raises(ValueError, match='width=48'):
        timm.create_model('mlla_t', width=48)
