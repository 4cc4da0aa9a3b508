"""Our networks in torchvision's detectors and segmentation_models_pytorch, as docs/other-libraries.md shows."""
import pytest
import segmentation_models_pytorch as smp
import torch
from examples import example
from golden import published_file
from reference import published_state_dict
from torch.nn.functional import pad

from caretrans.checkpoint import convert_checkpoint
from caretrans.dense import create_dense_backbone, create_from_checkpoint
from caretrans.models import CasVit
from caretrans.models.published_keys import rename_keys

MODELS = ['care_s0', 'casvit_xs', 'mlla_t']
DECODERS = ['Linknet', 'MAnet', 'PSPNet', 'Segformer', 'UPerNet', 'UnetPlusPlus']


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory has the files that the examples load."""
    monkeypatch.chdir(tmp_path)
    torch.save(published_state_dict('care_s0'), 'CARETrans_S0.pth.tar')
    torch.save(dict(model={key: value for key, value in published_state_dict('rcvit_s').items() if 'dist' not in key}),
               'rcvit_s.pth')


def without_gradients(model) -> list:
    return [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_the_example_of_get_model(files):
    names = {}
    exec(example('caretrans.get_model'), names)
    assert names['features'].shape == (2, 256) and names['logits'].shape == (2, 1000)
    assert torch.equal(names['model'].state_dict()['head.weight'], published_state_dict('rcvit_s')['head.weight'])


@torch.no_grad()
def test_dense_models_take_the_layout_of_mmpretrain(tmp_path):
    """As classification files, and as detectors that mmdet saves with the backbone of caretrans.openmm have it."""
    torch.save(dict(model={key: value for key, value in published_state_dict('rcvit_xs').items() if 'dist' not in key}),
               tmp_path / 'a.pth')
    convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'mm.pth', 'mmpretrain')
    x = torch.randn(1, 3, 64, 96)
    wanted, found = (create_dense_backbone('casvit_xs', tmp_path / file).eval()(x) for file in ('a.pth', 'mm.pth'))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))

    weights = torch.load(published_file('retinanet', tmp_path))['state_dict']
    body = {key[9:]: value for key, value in weights.items() if key.startswith('backbone.')}
    norms = {f'backbone.norm{int(key[4]) // 2}{key[5:]}': body.pop(key) for key in list(body) if key.startswith('norm')}
    rest = {key: value for key, value in weights.items() if not key.startswith('backbone.')}
    torch.save(dict(state_dict={**rename_keys(body, CasVit.mmpretrain_keys), **norms, **rest}), tmp_path / 'mmdet.pth')
    expected, _ = create_from_checkpoint(tmp_path / 'retinanet.pth')
    model, _ = create_from_checkpoint(tmp_path / 'mmdet.pth')
    assert all(torch.equal(a, b) for a, b in zip(model.raw(x)['cls'], expected.raw(x)['cls'], strict=True))


def test_the_example_of_segmentation_models(files):
    names = {}
    exec(example('segmentation_models_pytorch'), names)
    assert names['logits'].shape == (2, 5, 70, 90)
    weights = names['model'].encoder.model.state_dict()
    assert torch.equal(weights['stem.conv.weight'], published_state_dict('care_s0')['stem.0.weight'])


@pytest.mark.parametrize('name', MODELS)
def test_torchvision_detects_with_our_maps(name):
    names = {}
    small = 'out_channels=256', 'out_channels=32', 'min_size=320, max_size=480', 'min_size=64, max_size=96'
    text = example("torchvision's detectors").replace("'care_s0'", repr(name))
    exec(text.replace(*small[:2]).replace(*small[2:]), names)
    sum(names['losses'].values()).backward()
    assert without_gradients(names['model']) == []
    assert set(names['model'].eval()([torch.rand(3, 70, 90)])[0]) == {'boxes', 'labels', 'scores'}


@pytest.mark.parametrize('name', MODELS)
def test_segmentation_models_take_our_encoders(name):
    for architecture in (smp.FPN, smp.Unet):
        model = architecture(f'tu-{name}', encoder_weights=None, classes=5)
        logits = model(torch.randn(2, 3, 64, 96))
        logits.sum().backward()
        assert logits.shape == (2, 5, 64, 96) and without_gradients(model) == []


@pytest.mark.slow
@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('name', MODELS)
def test_other_decoders_work(name, decoder):
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=5)
    logits = model(torch.randn(2, 3, 64, 96))
    logits.sum().backward()
    assert logits.shape == (2, 5, 64, 96)


def test_dpt_leaves_heads_without_gradients():
    model = smp.DPT('tu-care_s0', encoder_weights=None, classes=5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert {key.split('.')[2] for key in without_gradients(model)} == {'head', 'head_dist'}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('architecture', ['PAN', 'DeepLabV3', 'DeepLabV3Plus'])
def test_decoders_that_need_dilation_are_refused_in_one_line(architecture, name):
    with pytest.raises(ValueError, match=f'^{name} has an output_stride of 32 only: choose a decoder that .*[.]$'):
        getattr(smp, architecture)(f'tu-{name}', encoder_weights=None)


def test_sides_that_32_does_not_divide_are_padded_by_the_caller():
    model, x = smp.FPN('tu-casvit_xs', encoder_weights=None, classes=5).eval(), torch.randn(1, 3, 70, 90)
    with pytest.raises(RuntimeError, match='^Wrong input shape height=70, width=90.*divisible by 32.*$'):
        model(x)
    with torch.no_grad():
        assert model(pad(x, (0, -90 % 32, 0, -70 % 32)))[..., :70, :90].shape == (1, 5, 70, 90)
