"""Export of detectors and segmenters: programs compute what the networks do, and others are refused."""
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn as nn
from torchvision.models.detection.image_list import ImageList

from caretrans.dense import create_dense_model, save_checkpoint
from caretrans.dense.decode import Decoding, decode_detections, fit_image
from caretrans.errors import ConfigError, DataError
from caretrans.export.config import ExportConfig, Job
from caretrans.export.coreml.convert import read_facts
from caretrans.export.dense import load_dense_cases, load_dense_source, restrict_config
from caretrans.export.dense_verify import verify_dense
from caretrans.export.run import export
from caretrans.export.verify import VerificationError
from caretrans.measure.sample_network import randomize
from caretrans.runtimes.onnx import make_session

NAMES = ['cat', 'dog', 'crane', 'crane', 'owl']
SIZE = (64, 96)


class Raw(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return self.model.raw(x)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Shallow networks in which an error in any layer shows."""
    folder = tmp_path_factory.mktemp('dense')
    for task, options in dict(
            semantic_fpn=dict(head_channels=16, norm='batch', min_size=64),
            retinanet=dict(min_size=64, max_size=96, score_thresh=.3), mask_rcnn=dict(hidden=16)).items():
        model = create_dense_model(
            task, 'care_s0', len(NAMES), channels=16, model_args=dict(depths=(1, 1, 1, 1)), **options)
        randomize(Raw(model), torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)))
        save_checkpoint(folder / f'{task}.pth', model, NAMES)
    return folder


def run_export(files, task, folder, formats, **settings):
    return export(ExportConfig(
        checkpoint=str(files / f'{task}.pth'), format=formats, output_dir=str(folder), latency=False, images=2,
        **settings))[1]


@pytest.fixture(scope='module')
def segmenters(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmenters')
    return {item.job.format: item for item in run_export(
        files, 'semantic_fpn', folder, ['onnx', 'openvino', 'mlpackage'])}


@pytest.fixture(scope='module')
def detector(files, tmp_path_factory):
    """A RetinaNet in ONNX and OpenVINO."""
    return run_export(files, 'retinanet', tmp_path_factory.mktemp('detectors'), ['onnx', 'openvino'])


def load(files, task, **settings):
    config = restrict_config(ExportConfig(checkpoint=str(files / f'{task}.pth'), format=['onnx'], images=2, **settings))
    source = load_dense_source(config)
    return source, load_dense_cases(source, source.size, count=2)


# Segmenters -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format, tolerance', [('onnx', 1e-5), ('openvino', 1e-5), ('mlpackage', 1e-2)])
def test_a_segmenter_computes_what_the_network_does(segmenters, format, tolerance):
    item = segmenters[format]
    result = item.verification
    assert not item.failure and item.path.exists() and result.top1_agreement > 97 and result.top5_agreement is None
    assert 0 < result.max_error < tolerance * result.largest and result.compared == 'logits'
    assert 'only images of 64 x 64 pixels, 1 at a time' in item.notes


def test_a_core_ml_segmenter_is_exact_without_its_rounding(segmenters):
    item = segmenters['mlpackage']
    assert item.verification.exact_error < 1e-5  # BatchNorms are folded, and attention is that of phones
    operations = item.program.operations
    assert 'batch_norm' not in operations and operations['upsample_bilinear'] == 6
    assert operations['upsample_nearest_neighbor'] == 3 and operations['softmax'] and 'elu' not in operations


def test_metadata_of_a_core_ml_segmenter(segmenters):
    facts = read_facts(segmenters['mlpackage'].path)
    assert json.loads(facts['class_names']) == ['cat', 'dog', 'crane (class 2)', 'crane (class 3)', 'owl']
    assert facts['task'] == 'semantic_fpn' and facts['form'] == 'phone' and facts['input'] == 'image'
    assert facts['preprocessing'].startswith(
        'Rotate the image upright as its EXIF data say. Resize (bilinear) to 64 x 64 pixels, whatever the aspect.')
    assert 'mean 0.485, 0.456, 0.406' in facts['preprocessing'] and 'height / 4' in facts['outputs']


def test_a_changed_bias_is_caught(files, segmenters):
    """In float16 too, where rounding hides it."""
    source, cases = load(files, 'semantic_fpn')
    for format in ('onnx', 'mlpackage'):
        item = segmenters[format]
        verify_dense(source, item.job, item.program, cases)
        changed = dataclasses.replace(source, model=copy.deepcopy(source.model))
        changed.model.model.classifier.bias.data[1] += 2e-3 * cases.logits.abs().max()
        with pytest.raises(VerificationError, match='rounding does not explain|without rounding'):
            verify_dense(changed, item.job, item.program, load_dense_cases(changed, source.size, count=2))
    with pytest.raises(VerificationError, match="class 0 is labelled 'cat', expected 'dog'"):
        verify_dense(dataclasses.replace(source, class_names=source.class_names[1::-1] + source.class_names[2:]),
                     item.job, item.program, cases)


def test_programs_of_other_outputs_are_refused(files, segmenters):
    source, cases = load(files, 'semantic_fpn')
    item = segmenters['onnx']
    for change, message in ((lambda y: y[:, :4], '1,024 numbers per image, the network 1,280'),
                            (lambda y: y.where(y < y.max(), float('nan')), 'logits are not finite'),
                            (lambda y: y.flip(1), 'logits differ from PyTorch by')):
        program = dataclasses.replace(item.program, run=lambda x, change=change: change(item.program.run(x)))
        with pytest.raises(VerificationError, match=message):
            verify_dense(source, item.job, program, cases)
    with pytest.raises(VerificationError, match='of the pixels have the likeliest class of PyTorch, at least 100 %'):
        program = dataclasses.replace(item.program, run=lambda x: item.program.run(x).roll(1, 1))
        verify_dense(source, dataclasses.replace(item.job, precision='int8', floor=100.), program, cases)


# Detectors ------------------------------------------------------------------------------------------------------------

def test_a_retinanet_computes_what_the_network_does(detector):
    for item in detector:
        assert not item.failure and item.verification.compared == 'logits, codes'
        assert 0 < item.verification.max_error < 1e-5 * item.verification.largest


def test_decoded_outputs_are_the_detections_of_the_network(files, detector):
    source, _ = load(files, 'retinanet')
    model, content = source.model.model, detector[0].path.read_bytes()
    session = make_session(content, 1)
    decoding = Decoding.from_json(session.get_modelmeta().custom_metadata_map['decoding'])
    assert decoding == dataclasses.replace(Decoding.from_model(model, SIZE), **{
        item.name: getattr(decoding, item.name) for item in dataclasses.fields(decoding)
        if isinstance(getattr(decoding, item.name), list)})  # JSON has no tuples
    assert [output.name for output in session.get_outputs()] == [
        f'{kind}_p{level}' for kind in ('cls', 'reg') for level in range(3, 8)]
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1)) * 255
    pixels, fitted = fit_image(image, decoding.size)
    assert fitted == SIZE and torch.equal(pixels, image)
    outputs = session.run(None, {'input_1': decoding.normalise(pixels)[None].numpy()})
    found = decode_detections(outputs, decoding, fitted, SIZE)
    with torch.no_grad():
        expected = model([image / 255])[0]
    assert 10 < len(expected['boxes']) <= 100 and torch.equal(found['labels'], expected['labels'])
    for name, tolerance in (('boxes', 1e-2), ('scores', 1e-4)):
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0)
    few = decode_detections(outputs, dataclasses.replace(decoding, detections=3, candidates=50), fitted, SIZE)
    assert len(few['boxes']) == 3


@torch.no_grad()
def test_boxes_of_a_fitted_image_are_in_pixels_of_the_original(files):
    source, _ = load(files, 'retinanet')
    model, decoding = source.model.model, Decoding.from_model(source.model.model, SIZE)
    image = torch.rand(3, 128, 80, generator=torch.Generator().manual_seed(2)) * 255
    pixels, fitted = fit_image(image, SIZE)
    x = decoding.normalise(pixels)[None]
    found = decode_detections(source.model(x), decoding, fitted, (128, 80))

    maps = list(model.backbone(x).values())  # the steps of torchvision's forward
    levels = [9 * y.shape[-2] * y.shape[-1] for y in maps]
    heads = {name: list(y.split(levels, dim=1)) for name, y in model.head(maps).items()}
    anchors = [list(some.split(levels)) for some in model.anchor_generator(ImageList(x, [fitted]), maps)]
    expected = model.postprocess_detections(heads, anchors, [fitted])[0]
    assert fitted == (64, 40) and len(expected['boxes']) > 10
    torch.testing.assert_close(found['boxes'], 2 * expected['boxes'])
    assert torch.equal(found['labels'], expected['labels']) and found['boxes'][:, 2].max() <= 80


def test_images_are_fitted_without_a_change_of_aspect():
    image = torch.full((3, 100, 50), 7.)
    pixels, fitted = fit_image(image, (64, 96))
    assert fitted == (64, 32) and (pixels[:, :, :32] == 7).all()
    assert torch.allclose(pixels[:, 0, 32], 255 * torch.tensor([.485, .456, .406]))
    with pytest.raises(ConfigError, match='is no decoding of a RetinaNet, an object of size, mean'):
        Decoding.from_json('{"size": [1, 2]}')


def test_a_changed_box_code_of_one_level_is_caught(files, detector):
    source, cases = load(files, 'retinanet')
    item = detector[0]
    codes = source.split(cases.logits)[7]  # of P5, 6 times smaller than those of P3

    def run(x):
        y = source.split(item.program.run(x))
        y[7] = y[7] + 2e-4 * codes.abs().max()
        return torch.cat([part.flatten(1) for part in y], dim=1)

    with pytest.raises(VerificationError, match='reg_p5 differ from PyTorch by'):
        verify_dense(source, item.job, dataclasses.replace(item.program, run=run), cases)


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task, settings, message', [
    ('mask_rcnn', {}, 'mask_rcnn cannot be exported: what its heads look at depends on the proposals'),
    ('retinanet', dict(format=['onnx', 'mlpackage']), '--format mlpackage with retinanet: choose from onnx, openvino'),
    ('semantic_fpn', dict(format=['executorch']), '--format executorch with semantic_fpn'),
    ('semantic_fpn', dict(model='care_s0'), '--model cannot be used with a detector or segmenter'),
    ('semantic_fpn', dict(format=['mlpackage'], compress='int8'), '--compress cannot be used with a detector'),
    ('semantic_fpn', dict(batch=2, unfused=True), '--batch, --unfused cannot be used with a detector'),
    ('semantic_fpn', dict(output='classes'), '--output cannot be used'),
    ('semantic_fpn', dict(precision=['int8']), '--precision int8 cannot be used with a detector or segmenter'),
    ('semantic_fpn', dict(img_size='100x64'), '--img-size 100x64: take multiples of 32'),
    ('semantic_fpn', dict(labels='no.txt'), 'no.txt'),
])
def test_what_cannot_be_exported_is_refused(files, tmp_path, task, settings, message):
    settings = dict(dict(format=['onnx']), **settings)
    with pytest.raises(ConfigError, match=message):
        export(ExportConfig(
            checkpoint=str(files / f'{task}.pth'), output_dir=str(tmp_path / 'out'), latency=False, **settings))
    assert not list((tmp_path / 'out').glob('*')) if (tmp_path / 'out').exists() else True


def test_damaged_images_are_named(files, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    with pytest.raises(DataError, match='broken.jpg cannot be read as an image'):
        run_export(files, 'retinanet', tmp_path / 'out', ['onnx'], data=str(tmp_path))


def test_the_default_size_follows_training(files):
    sizes = {task: load_dense_source(restrict_config(ExportConfig(checkpoint=str(files / f'{task}.pth'), format=[
        'onnx']))).size for task in ('semantic_fpn', 'retinanet')}
    assert sizes == dict(semantic_fpn=(64, 64), retinanet=SIZE)
    assert Job('onnx', 'fp32', 'tensor', 'logits', SIZE).get_form() == 'fused'
