"""`caretrans.openmm` inside OpenMMLab's mmpretrain, which only `bash cmd/test_openmm.sh` installs."""
import copy

import pytest
import timm
import torch
from examples import example
from golden import filled, golden, map_error
from photos import FRUIT
from reference import SHALLOW, filled_input, published_state_dict

from caretrans.checkpoint import CheckpointError, convert_checkpoint, create_from_checkpoint
from caretrans.errors import ConfigError
from caretrans.measure.published import find_published

mmpretrain = pytest.importorskip(
    'mmpretrain', reason='needs mmpretrain: run bash cmd/test_openmm.sh', exc_type=ModuleNotFoundError)

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import load_checkpoint, save_checkpoint  # noqa: E402
from mmpretrain.apis import ImageClassificationInferencer, ModelHub  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402
from PIL import Image  # noqa: E402

import caretrans.openmm  # noqa: E402, F401 (registers backbones and names)

ALL_STAGES = (0, 1, 2, 3)
FILES = ('published.pth', 'mmpretrain.pth', 'caretrans.pth')
NAMES = {'casvit-xsmall_8xb256_in1k': 'rcvit_xs', 'casvit-small_8xb256_in1k': 'rcvit_s',
         'casvit-middle_8xb256_in1k': 'rcvit_m', 'casvit-tiny_8xb256_in1k': 'rcvit_t'}


def one_head(name: str) -> dict:
    """Filled weights of a published file."""
    return {key: value for key, value in published_state_dict(name).items() if 'dist' not in key}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of casvit_xs: published, in the layout of mmpretrain, and ours."""
    folder = tmp_path_factory.mktemp('files')
    torch.save(dict(model=one_head('rcvit_xs'), epoch=299), folder / 'published.pth')
    for layout in ('mmpretrain', 'caretrans'):
        convert_checkpoint(folder / 'published.pth', folder / f'{layout}.pth', layout)
    return folder


@pytest.fixture(scope='module')
def expected(files):
    """Our network with the weights of `files`."""
    return create_from_checkpoint(files / 'published.pth')[0].eval()


def build(kind: str, arch: str, **options):
    return MODELS.build(dict(type=kind, arch=arch, **options)).eval()


# Names ----------------------------------------------------------------------------------------------------------------

def test_the_names_are_listed():
    assert mmpretrain.list_models('casvit*', task='Image Classification') == sorted(NAMES)
    for name, published in NAMES.items():
        assert ModelHub.get(name).results[0].metrics == {'Top 1 Accuracy': find_published(published).top1}


@pytest.mark.parametrize('name, published', NAMES.items())
@torch.no_grad()
def test_models_by_name_compute_what_ours_do(name, published, tmp_path):
    torch.save(one_head(published), tmp_path / 'x.pth')
    convert_checkpoint(tmp_path / 'x.pth', tmp_path / 'mm.pth', 'mmpretrain')
    model = mmpretrain.get_model(name, pretrained=str(tmp_path / 'mm.pth'))
    assert (type(model).__name__, type(model.head).__name__) == ('ImageClassifier', 'LinearClsHead')
    ours, x = caretrans.get_model(name, pretrained=tmp_path / 'x.pth'), torch.randn(2, 3, 64, 96)
    assert torch.equal(model(x), ours(x)) and ours(x).abs().max() > .1
    features = model.extract_feat(x)
    assert isinstance(features, tuple) and torch.equal(features[0], ours.extract_feat(x)[0])


@pytest.mark.parametrize('file', FILES)
@torch.no_grad()
def test_files_of_all_layouts_load_and_what_is_saved_loads_here(file, files, expected, tmp_path):
    model = mmpretrain.get_model('casvit-xsmall_8xb256_in1k', pretrained=str(files / file))
    save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(tmp_path / 'saved.pth'))
    saved = torch.load(tmp_path / 'saved.pth')['state_dict']
    converted = torch.load(files / 'mmpretrain.pth')['state_dict']
    assert saved.keys() == converted.keys() and all(torch.equal(saved[key], converted[key]) for key in saved)
    x = torch.randn(1, 3, 100, 132)
    assert torch.equal(create_from_checkpoint(tmp_path / 'saved.pth')[0].eval()(x), expected(x))
    again = mmpretrain.get_model('casvit-xsmall_8xb256_in1k')
    load_checkpoint(again, str(tmp_path / 'saved.pth'), strict=True)
    assert torch.equal(again(x), expected(x))
    assert torch.equal(copy.deepcopy(again)(x), expected(x))


@torch.no_grad()
def test_an_image_is_prepared_as_here(files, expected, tmp_path):
    image = Image.open(next(FRUIT.glob('val/kaiser/*.jpg'))).convert('RGB').resize((400, 300))
    image.save(tmp_path / 'x.png')
    model = mmpretrain.get_model('casvit-xsmall_8xb256_in1k', pretrained=str(files / 'mmpretrain.pth'))
    prepare = timm.data.create_transform(**timm.data.resolve_data_config({}, model=expected))
    wanted = prepare(image)[None]
    batch, = ImageClassificationInferencer(model).preprocess([str(tmp_path / 'x.png')])
    assert abs(model.data_preprocessor(batch)['inputs'] - wanted).max() < 1e-5
    result = mmpretrain.inference_model(model, str(tmp_path / 'x.png'))
    assert result['pred_label'] == expected(wanted).argmax() and isinstance(result['pred_class'], str)


def test_a_model_trains_in_mmpretrain(files):
    model = mmpretrain.get_model(
        'casvit-xsmall_8xb256_in1k', backbone=dict(depths=SHALLOW, drop_path_rate=.1), head=dict(num_classes=5)).train()
    samples = [DataSample().set_gt_label(label) for label in (1, 4)]
    model(torch.randn(2, 3, 64, 64), samples, mode='loss')['loss'].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_the_examples_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(one_head('rcvit_s'), 'rcvit_s.pth')
    names = {}
    exec(example('OpenMMLab'), names)
    assert names['features'].shape == (2, 256)
    assert [tuple(y.shape) for y in names['maps']] == [(2, 64, 28, 28), (2, 128, 14, 14), (2, 256, 7, 7)]
    config = Config.fromstring(example('OpenMMLab', 1), '.py')
    backbone = MODELS.build(config.backbone)
    backbone.init_weights()
    ours, x = create_from_checkpoint('rcvit_s.pth')[0].eval(), torch.randn(1, 3, 64, 96)
    assert torch.equal(backbone.eval()(x)[2], ours.forward_features(x))
    timm_backbone = dict(type='TIMMBackbone', model_name='care_s0', features_only=True, out_indices=ALL_STAGES)
    assert [y.shape[1] for y in mmpretrain.registry.MODELS.build(timm_backbone)(x)] == [32, 64, 128, 1024]


# Backbones ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, arch, source, bound', [
    ('CASViT', 'xsmall', 'rcvit_xs_fork_feat', 1e-12), ('MLLA', 't', 'mlla_t_fork_feat', 1e-6)])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@torch.no_grad()
def test_published_dense_backbones_give_the_published_maps(kind, arch, source, bound, prefix, tmp_path):
    torch.save(dict(state_dict={prefix + key: value for key, value in filled(source).items()}), tmp_path / 'x.pth')
    model = build(
        kind, arch, out_indices=ALL_STAGES, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    model.init_weights()
    arrays = golden(f'{source}_160x224')
    maps = model.double().eval()(filled_input((2, 3, 160, 224)).double())
    assert isinstance(maps, tuple) and max(map_error(arrays, f'out{i}', y) for i, y in enumerate(maps)) < bound
    again = build(kind, arch, out_indices=ALL_STAGES).double()
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(y, wanted) for y, wanted in zip(
        again.eval()(filled_input((2, 3, 160, 224)).double()), maps, strict=True))


@pytest.mark.parametrize('out_indices', [ALL_STAGES, (1, 3)])
@torch.no_grad()
def test_care_gives_the_maps_of_its_file(out_indices, tmp_path):
    torch.save(published_state_dict('care_s0'), tmp_path / 'x.pth')
    model = build('CARETransformer', 's0', out_indices=out_indices, norm='none')
    load_checkpoint(model, str(tmp_path / 'x.pth'))
    ours, x = create_from_checkpoint(tmp_path / 'x.pth')[0].eval(), torch.randn(1, 3, 64, 96)
    wanted = ours.forward_intermediates(x, list(out_indices), intermediates_only=True)
    assert model.out_indices == out_indices and len(wanted) == len(out_indices)
    assert all(torch.equal(y, map) for y, map in zip(model(x), wanted, strict=True))
    again = build('CARETransformer', 's0', out_indices=out_indices, norm='none')
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x)[-1], wanted[-1])


@torch.no_grad()
def test_the_norm_of_a_classification_file_becomes_that_of_the_last_stage(files, expected):
    x = torch.randn(1, 3, 64, 96)
    for file in FILES:
        model = build('CASViT', 'xs', out_indices=ALL_STAGES)
        load_checkpoint(model, str(files / file))
        maps = expected.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model.eval()(x)[3], expected.norm(maps[3]))
        assert torch.allclose(model(x)[2], maps[2], atol=1e-4)  # a fresh BatchNorm, but for its eps


def test_norm_eval_keeps_statistics():
    def modes(**options):
        model = build('CASViT', 'xs', depths=SHALLOW, **options).train()
        return {module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}

    assert modes() == {True} and modes(norm_eval=True) == {False}


# Errors ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, message', [
    (dict(arch='large'), "no model 'casvit_large'"),
    (dict(arch='small', out_indices=(0, 4)), r'out_indices of casvit_s is \(0, 4\)'),
    (dict(arch='small', out_indices=3), "CASViT: 'int' object is not iterable"),
    (dict(arch='small', last_map='residual'), 'only CARE has'),
    (dict(arch='small', frozen_stages=1), "CASViT: .*unexpected keyword argument 'frozen_stages'")])
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build('CASViT', **options)


def test_weights_of_another_network_are_refused_instead_of_skipped(files, tmp_path):
    with pytest.raises(CheckpointError, match='do not fit CASViT small: .* are missing or of another shape'):
        mmpretrain.get_model('casvit-small_8xb256_in1k', pretrained=str(files / 'mmpretrain.pth'))
    torch.save(published_state_dict('care_s0'), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='have two heads, an ImageClassifier one'):
        mmpretrain.get_model('casvit-small_8xb256_in1k', pretrained=str(tmp_path / 'x.pth'))
