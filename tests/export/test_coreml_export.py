"""Core ML programs as they are written: the contents of the file, its metadata, and that it computes the same."""
import dataclasses
import json
import logging
import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn as nn
from exports import SIZE, check, make_cases, make_job, make_source

from caretrans.errors import ConfigError, ExportError
from caretrans.export.config import ExportConfig
from caretrans.export.coreml import convert
from caretrans.export.source import Cases, Source, name_classes

# Of care_s0, which tools and phones show; a change of these numbers is a change of the program.
OPERATIONS = {
    'mlpackage': dict(
        conv=141, add=77, split=42, gelu=36, mul=32, concat=30, softmax=25, reshape=24, clip=24, matmul=24, log=12,
        reduce_log_sum_exp=12, cast=2, reduce_mean=1, erf=1, layer_norm=1, linear=1),
    'mlmodel': dict(
        convolution=141, add=65, splitND=42, gelu=36, concat=30, softmaxND=25, clip=24, batchedMatmul=24,
        reshapeStatic=26, multiply=20, multiplyBroadcastable=12, unary=12, reduceLogSumExp=12, addBroadcastable=12,
        reduceMean=1, erf=1, mvn=1, scale=1, innerProduct=1)}
TENSOR = make_job('mlpackage', 'fp32', size=(64, 96), batch=2, target='iOS17')  # two oblong images


@pytest.fixture(params=[
    ('mlpackage', 'fp16'), ('mlpackage', 'fp32'), ('mlmodel', 'fp16'), ('mlmodel', 'fp32')], ids='-'.join)
def job(request):
    return make_job(*request.param, input='image', output='classes')


def load(path):
    return convert.import_coremltools().utils.load_spec(str(path))


@pytest.mark.slow
@pytest.mark.parametrize('format', ['mlpackage', pytest.param('mlmodel', marks=pytest.mark.slow)])
def test_operations_of_a_whole_network_are_counted(format, programs):
    """Its program in float16 has few reshapes and no transposes."""
    job = make_job(format, 'fp16', input='image', output='classes', size=(96, 96))
    program = programs.read(job, 'care_s0')
    assert program.operations == OPERATIONS[format] and sum(program.operations.values()) <= 486
    assert len(program.shape_changes) == (24 if format == 'mlpackage' else 26)
    assert not [line for line in program.shape_changes if 'transpose' in line or 'permute' in line]
    result = check(job, program, 'care_s0', 64)
    assert result.max_error < 1e-2 * result.largest and result.exact_error < 1e-5


def test_tensors_of_any_size_and_batch(programs):
    result = check(TENSOR, programs.read(TENSOR))
    assert result.top1_agreement == 100 and result.max_error < 1e-4 * result.largest


# The contents of the file ---------------------------------------------------------------------------------------------

def test_description_is_that_of_an_image_classifier(job, programs):
    path, notes = programs.write(job)
    spec = load(path)
    feature, = spec.description.input
    image = feature.type.imageType
    assert (feature.name, image.height, image.width) == ('input_1', *SIZE)
    assert image.colorSpace == image.ColorSpace.Value('RGB')
    assert {item.name for item in spec.description.output} == {'classLabel', 'probabilities'}
    assert spec.description.predictedFeatureName == 'classLabel'
    assert spec.description.predictedProbabilitiesName == 'probabilities'
    assert all(item.shortDescription for item in [*spec.description.input, *spec.description.output])
    assert spec.specificationVersion == (7 if job.format == 'mlpackage' else 4)
    assert notes == ([] if job.format == 'mlpackage' else
                     ['A neural network of iOS 13 and later, whatever --target says.'])
    if job.format == 'mlmodel':
        scaler = spec.neuralNetworkClassifier.preprocessing[0].scaler
        assert (scaler.channelScale, scaler.redBias, scaler.greenBias, scaler.blueBias) == (1, 0, 0, 0)


def test_tensor_input_and_logits_are_float32(programs):
    spec = load(programs.write(TENSOR)[0])
    (taken,), (given,) = spec.description.input, spec.description.output
    kind = given.type.multiArrayType
    assert (taken.name, given.name) == ('input_1', 'logits')
    assert list(taken.type.multiArrayType.shape) == [2, 3, 64, 96]
    assert taken.type.multiArrayType.dataType == kind.dataType == kind.ArrayDataType.Value('FLOAT32')
    assert spec.specificationVersion == 8  # iOS 17


# Metadata -------------------------------------------------------------------------------------------------------------

def test_file_has_its_metadata(job, programs):
    path, _ = programs.write(job)
    facts = convert.read_facts(path)
    expected = dict(
        model='care_s0', form='phone', format=job.format, precision=job.precision, compress='none', input='image',
        output='classes', size='64x64', batch='1', channels='3')
    assert {key: facts[key] for key in expected} == expected
    assert facts['checkpoint'] == 'random weights' and 'checkpoint_sha256' not in facts and 'accuracy' not in facts
    assert (facts['torch'], facts['coremltools']) == (torch.__version__, version('coremltools'))
    metadata = load(path).description.metadata
    assert 'RANDOM WEIGHTS' in metadata.shortDescription and 'MIT' in metadata.license
    assert metadata.author and metadata.versionString
    inside, outside = facts['preprocessing'], convert.read_facts(programs.write(TENSOR)[0])['preprocessing']
    assert 'bicubic' in inside and '64 x 64' in inside and '87.5 %' in inside
    assert '0.485, 0.456, 0.406' in inside and 'the program normalises' in inside
    assert 'Normalise before the program' in outside


def test_checkpoint_and_its_figures_are_in_the_file(tmp_path):
    cases = Cases('/where/it/was/fruit, 2 of 9 validation images', torch.zeros(2, 3, 4, 4), torch.eye(2), ['a', 'b'],
                  torch.tensor([0, 0]))
    known = dataclasses.replace(
        make_small(), checkpoint='/where/it/was/best.pth.tar', sha256='ab' * 32, accuracy=cases.describe_accuracy(),
        meta=dict(metrics=dict(val_top1=57.)))
    path = tmp_path / 'program.mlmodel'
    convert.write(known, make_job('mlmodel', 'fp32', output='classes'), path)
    facts = convert.read_facts(path)
    assert (facts['checkpoint'], facts['checkpoint_sha256']) == ('best.pth.tar', 'ab' * 32)
    assert facts['accuracy'] == 'top-1 50.00 % on fruit, 2 of 9 validation images'  # without their paths
    assert json.loads(facts['training_metrics']) == {'val_top1': 57}
    assert 'RANDOM' not in load(path).description.metadata.shortDescription


LOGITS = make_job('mlmodel')  # a program without a classifier


def spoil_facts(programs, folder, spoil):
    """A copy of a small network whose metadata are changed."""
    path = programs.copy(LOGITS, folder, 'test_efficientnet')
    spec = load(path)
    spoil(spec.description.metadata.userDefined)
    path.write_bytes(spec.SerializeToString())
    return path


def test_file_of_others_is_refused(programs, tmp_path):
    path = spoil_facts(programs, tmp_path, lambda facts: facts.clear())
    with pytest.raises(ExportError, match='copy.mlmodel was not exported by coreml/export.py'):
        convert.read_facts(path)
    path.write_bytes(b'nothing')
    with pytest.raises(ExportError, match='copy.mlmodel cannot be read'):
        convert.read_facts(path)


@pytest.mark.parametrize('spoil, message', [
    (lambda facts: facts.update(class_names=json.dumps(json.loads(facts['class_names'])[::-1])),
     'class 0 is labelled'),
    (lambda facts: facts.pop('class_names'), r"cannot be read \(KeyError: 'class_names'\)")])
def test_labels_of_a_program_without_classifier_are_checked(spoil, message, programs, tmp_path):
    assert programs.read(LOGITS, 'test_efficientnet').labels == make_source('test_efficientnet').class_names
    path = spoil_facts(programs, tmp_path, spoil)
    with pytest.raises(ExportError, match=message):
        check(LOGITS, convert.read(LOGITS, path), 'test_efficientnet')


# Compressed weights ---------------------------------------------------------------------------------------------------

def make_small():
    """Two convolutions, of which the second is large enough to be compressed, and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 8, 8), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 14)).eval()
    model.pretrained_cfg = {}
    return Source('small', model, make_source().eval_config, [str(number) for number in range(14)])


@pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])
def test_compressed_weights_are_smaller_and_still_agree(format, tmp_path):
    source, sizes, errors = make_small(), {}, {}
    images = make_cases().pixels[:4]
    with torch.no_grad():
        expected = source.model(source.normalise(images))
    for compress in ('none', 'int8', 'palette6', 'palette4'):
        job, path = make_job(format, 'fp16', compress=compress), tmp_path / f'{compress}.{format}'
        convert.write(source, job, path)
        sizes[compress] = sum(file.stat().st_size for file in [path, *path.rglob('*')] if file.is_file())
        program = convert.read(job, path)
        assert not [kind for kind in program.operations if 'const' in kind]
        outputs = torch.cat([program.run(source.make_ready(part, job)) for part in images.split(1)])
        errors[compress] = ((outputs - expected).norm() / expected.norm()).item()
    assert sizes['int8'] < 0.75 * sizes['none'] and sizes['palette6'] < 0.9 * sizes['int8']
    assert sizes['palette4'] < 0.9 * sizes['palette6']
    assert errors['none'] < errors['int8'] < errors['palette6'] < errors['palette4'] < 1
    assert errors['int8'] < 0.05


# Refusals and failures ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, said', [
    (dict(batch=2, input='image', output='logits'), r'--batch 2 with --input image: .* Use --input tensor'),
    (dict(batch=2, output='classes'), r'--batch 2 with --output classes: .* Use --output probabilities'),
    (dict(compress='int8', target='iOS15'), r'--compress int8 with --target iOS15: .* Use --target iOS16'),
    (dict(compress='palette4', target='iOS15'), '--compress palette4 with --target iOS15'),
])
def test_conflicting_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        convert.check(make_job('mlpackage', 'fp16', **settings))


def test_networks_are_of_no_target():
    convert.check(make_job('mlmodel', 'fp16', compress='int8', target='iOS15'))


@pytest.mark.parametrize('found, refused', [('8.3.0', True), ('10.0', True), ('9.0', False), ('9.1', False)])
def test_converter_of_another_version_is_refused(found, refused, monkeypatch):
    monkeypatch.setattr(convert, 'version', lambda name: found)
    if not refused:
        return convert.check(make_job('mlpackage', 'fp16'))
    with pytest.raises(ConfigError, match=rf'coremltools {found} is installed.*pip install coremltools==9\.0'):
        ExportConfig(model='care_s0', random_weights=True).list_jobs((224, 224))


def test_palettes_ask_for_scikit_learn(monkeypatch):
    monkeypatch.setattr(convert, 'find_spec', lambda name: None)
    convert.check(make_job('mlpackage', 'fp16', compress='int8'))
    with pytest.raises(ConfigError, match='--compress palette6 needs scikit-learn: pip install scikit-learn'):
        convert.check(make_job('mlpackage', 'fp16', compress='palette6'))


@pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])
def test_failed_conversion_is_one_line_and_leaves_nothing(format, tmp_path, monkeypatch):
    ct = convert.import_coremltools()

    def fail(*args, **kwargs):
        raise NotImplementedError('no such\noperation')
    monkeypatch.setattr(ct, 'convert', fail)
    with pytest.raises(ExportError, match='not convert small: NotImplementedError: no such operation'):
        convert.write(make_small(), make_job(format), tmp_path / f'program.{format}')
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def converted(programs, monkeypatch):
    """Conversion returns a model that was converted before, for the format asked for."""
    made = {format: programs.write(make_job(format), 'test_efficientnet')[0] for format in ('mlpackage', 'mlmodel')}
    load_model = convert.import_coremltools().models.MLModel
    monkeypatch.setattr(
        convert, '_convert', lambda source, job: load_model(str(made[job.format]), skip_model_load=True))


def test_failed_saving_leaves_nothing(converted, tmp_path, monkeypatch):
    model_type = convert.import_coremltools().models.MLModel
    save = model_type.save

    def fill_the_disk(self, path):
        save(self, path)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(model_type, 'save', fill_the_disk)
    with pytest.raises(ExportError, match='program.mlmodel cannot be written: No space left on device'):
        convert.write(make_source('test_efficientnet'), make_job('mlmodel'), tmp_path / 'program.mlmodel')
    assert list(tmp_path.iterdir()) == []


def test_earlier_file_is_replaced(converted, tmp_path):
    path = tmp_path / 'program.mlpackage'
    (path / 'Data').mkdir(parents=True)
    (path / 'Data' / 'of an earlier one').touch()
    convert.write(make_source('test_efficientnet'), make_job('mlpackage'), path)
    assert {file.name for file in path.iterdir()} == {'Data', 'Manifest.json'}
    assert not (path / 'Data' / 'of an earlier one').exists()


def test_quiet_ends(capfd):
    level = logging.getLogger('coremltools').level
    convert.import_coremltools()
    assert logging.getLogger('coremltools').level == level
    print('heard', file=sys.stderr)
    assert capfd.readouterr().err == 'heard\n'


def test_classes_of_one_name_get_their_numbers():
    config = ExportConfig(model='care_s0', random_weights=True)
    assert name_classes(config, 3, ['crane', 'kite', 'crane']) == ['crane (class 0)', 'kite', 'crane (class 2)']
    assert len(set(name_classes(config, 1000))) == 1000
