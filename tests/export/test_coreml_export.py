"""Core ML programs as they are written: what is in the file, what it says of itself, and that it computes the same."""
import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version

import pytest
import torch
from exports import make_cases, make_job, make_source, prove

from caretrans.errors import ConfigError, ExportError
from caretrans.export import coreml
from caretrans.export.config import ExportConfig
from caretrans.export.source import _make_distinct

PHOTO = (224, 224)
# Of care_s0 at 224 x 224, which tools and phones show; a change of these numbers is a change of the program.
PROGRAM = dict(
    conv=141, add=76, split=42, gelu=37, concat=30, softmax=25, reshape=24, clip=24, matmul=24, mul=17, log=12,
    reduce_log_sum_exp=12, reduce_mean=1, layer_norm=1, linear=1)
NETWORK = dict(
    convolution=141, add=64, splitND=42, gelu=37, concat=30, softmaxND=25, clip=24, batchedMatmul=24, reshapeStatic=26,
    multiply=17, unary=12, reduceLogSumExp=12, addBroadcastable=12, reduceMean=1, mvn=1, scale=1,
    innerProduct=1)


def make(tmp_path_factory, name='care_s0', **settings):
    job = make_job(**{**dict(input='image', output='classes'), **settings})
    path = tmp_path_factory.mktemp('coreml') / f'program{job.kind.suffix}'
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        notes = coreml.write(make_source(name), job, path)
    assert out.getvalue() + err.getvalue() == '', 'converters are silent'
    return job, path, notes


@pytest.fixture(scope='module', params=[
    ('mlpackage', 'fp16'), ('mlpackage', 'fp32'), ('mlmodel', 'fp16'), ('mlmodel', 'fp32')], ids='-'.join)
def written(request, tmp_path_factory):
    """care_s0 as each format and precision."""
    return make(tmp_path_factory, format=request.param[0], precision=request.param[1], size=PHOTO)


@pytest.fixture(scope='module')
def tensor(tmp_path_factory):
    """Two images of no square, normalised outside."""
    return make(
        tmp_path_factory, format='mlpackage', precision='fp32', size=(64, 96), batch=2, input='tensor',
        output='logits', target='iOS17')


def load(path):
    return coreml.import_coremltools().utils.load_spec(str(path))


def measure_size(path):
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    return sum(file.stat().st_size for file in files)


# What it computes -----------------------------------------------------------------------------------------------------

def test_file_computes_what_the_network_computes(written):
    job, path, _ = written
    program = coreml.read(make_source(), job, path)
    result = prove(job, program, path)
    assert result.images == 14 and result.top1_agreement == 100
    assert result.max_error < (2e-2 if job.precision == 'fp16' else 1e-4) * result.largest
    assert not program.timed


def test_tensors_of_any_size_and_batch(tensor):
    job, path, _ = tensor
    result = prove(job, coreml.read(make_source(), job, path), path)
    assert result.top1_agreement == 100 and result.max_error < 1e-4 * result.largest


# What is in the file --------------------------------------------------------------------------------------------------

def test_operations_are_counted(written):
    job, path, _ = written
    program = coreml.read(make_source(), job, path)
    expected = dict(PROGRAM) if job.format == 'mlpackage' else dict(NETWORK)
    if job.precision == 'fp16':
        expected['mul' if job.format == 'mlpackage' else 'multiply'] += 1  # of the pixels
        if job.format == 'mlpackage':
            expected['cast'] = 2  # of the pixels and of the probabilities
    assert program.operations == expected
    assert sum(expected.values()) <= 471


def test_reshapes_that_are_left_are_listed_and_transposes_are_none(written):
    job, path, _ = written
    changes = coreml.read(make_source(), job, path).shape_changes
    assert len(changes) == (24 if job.format == 'mlpackage' else 26)
    assert not [line for line in changes if 'transpose' in line or 'permute' in line]


def test_input_is_an_rgb_image_without_preprocessing(written):
    job, path, _ = written
    spec = load(path)
    feature, = spec.description.input
    image = feature.type.imageType
    assert (feature.name, image.height, image.width) == ('input_1', *PHOTO)
    assert image.colorSpace == image.ColorSpace.Value('RGB')
    if job.format == 'mlmodel':
        step, = spec.neuralNetworkClassifier.preprocessing
        scaler = step.scaler
        assert scaler.channelScale == 1
        assert (scaler.redBias, scaler.greenBias, scaler.blueBias) == (0, 0, 0)


def test_outputs_are_the_label_and_the_probabilities(written):
    _, path, _ = written
    description = load(path).description
    assert {item.name for item in description.output} == {'classLabel', 'probabilities'}
    assert description.predictedFeatureName == 'classLabel'
    assert description.predictedProbabilitiesName == 'probabilities'


def test_labels_are_those_of_the_source(written):
    job, path, _ = written
    assert coreml.read(make_source(), job, path).labels == make_source().class_names


def test_tensor_goes_in_and_logits_come_out_in_float32(tensor):
    _, path, _ = tensor
    description = load(path).description
    (taken,), (given,) = description.input, description.output
    kind = given.type.multiArrayType
    assert (taken.name, given.name) == ('input_1', 'logits')
    assert list(taken.type.multiArrayType.shape) == [2, 3, 64, 96]
    assert taken.type.multiArrayType.dataType == kind.dataType == kind.ArrayDataType.Value('FLOAT32')


def test_target_decides_the_version_of_the_file(tensor, written):
    assert load(tensor[1]).specificationVersion == 8  # iOS 17
    assert load(written[1]).specificationVersion == (7 if written[0].format == 'mlpackage' else 4)
    assert bool(written[2]) == (written[0].format == 'mlmodel')  # says that the target means nothing to it


# What it says of itself -----------------------------------------------------------------------------------------------

def test_file_says_what_it_is(written):
    job, path, _ = written
    facts = coreml.read_facts(path)
    expected = dict(
        model='care_s0', form='phone', format=job.format, precision=job.precision, compress='none', input='image',
        output='classes', size='224x224', batch='1', channels='3')
    assert {key: facts[key] for key in expected} == expected
    assert facts['checkpoint'] == 'random weights' and 'checkpoint_sha256' not in facts and 'accuracy' not in facts
    assert (facts['torch'], facts['coremltools']) == (torch.__version__, version('coremltools'))
    metadata = load(path).description.metadata
    assert 'RANDOM WEIGHTS' in metadata.shortDescription and 'MIT' in metadata.license
    assert metadata.author and metadata.versionString
    features = [*load(path).description.input, *load(path).description.output]
    assert all(feature.shortDescription for feature in features)


def test_preparation_of_images_is_in_words(written, tensor):
    inside, outside = (coreml.read_facts(path)['preprocessing'] for _, path, _ in (written, tensor))
    assert 'bicubic' in inside and '224 x 224' in inside and '87.5 %' in inside
    assert '0.485, 0.456, 0.406' in inside and 'the program normalises' in inside
    assert 'Normalise before the program' in outside


def test_checkpoint_and_its_figures_are_in_the_file(tmp_path):
    source = make_source('test_efficientnet')
    known = type(source)(**{**vars(source), 'checkpoint': '/where/it/was/best.pth.tar', 'sha256': 'ab' * 32,
                            'accuracy': 'top-1 57.00 % on fruit', 'meta': dict(metrics=dict(val_top1=57.))})
    path = tmp_path / 'program.mlmodel'
    coreml.write(known, make_job('mlmodel', 'fp32', output='classes'), path)
    facts = coreml.read_facts(path)
    assert (facts['checkpoint'], facts['checkpoint_sha256']) == ('best.pth.tar', 'ab' * 32)
    assert facts['accuracy'] == 'top-1 57.00 % on fruit' and json.loads(facts['training_metrics']) == {'val_top1': 57}
    assert 'RANDOM' not in load(path).description.metadata.shortDescription


def test_file_of_others_is_refused(tmp_path):
    path = tmp_path / 'program.mlmodel'
    coreml.write(make_source('test_efficientnet'), make_job('mlmodel', 'fp32'), path)
    spec = load(path)
    spec.description.metadata.userDefined.clear()
    path.write_bytes(spec.SerializeToString())
    with pytest.raises(ExportError, match='program.mlmodel was not exported by coreml/export.py'):
        coreml.read_facts(path)
    path.write_bytes(b'nothing')
    with pytest.raises(ExportError, match='program.mlmodel cannot be read'):
        coreml.read_facts(path)


@pytest.mark.parametrize('spoil, said', [
    (lambda names: json.dumps(names[::-1]), 'its class 0 is labelled'), (lambda names: None, 'names no classes')])
def test_labels_of_a_program_without_classifier_are_checked(spoil, said, tmp_path):
    job, path, source = make_job('mlmodel', 'fp32'), tmp_path / 'program.mlmodel', make_source('test_efficientnet')
    coreml.write(source, job, path)
    assert coreml.read(source, job, path).labels == source.class_names
    spec = load(path)
    facts = spec.description.metadata.userDefined
    names = spoil(json.loads(facts.pop('class_names')))
    facts.update({'class_names': names} if names else {})
    path.write_bytes(spec.SerializeToString())
    with pytest.raises(ExportError, match=said):
        prove(job, coreml.read(source, job, path), path, 'test_efficientnet')


# Compressed weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])
def test_compressed_weights_are_smaller_and_still_agree(format, tmp_path_factory):
    name, sizes, errors = 'test_efficientnet', {}, {}
    source, cases = make_source(name), make_cases(name)
    for compress in ('none', 'int8', 'palette6', 'palette4'):
        job, path, _ = make(tmp_path_factory, name, format=format, precision='fp16', compress=compress, output='logits')
        sizes[compress] = measure_size(path)
        program = coreml.read(source, job, path)
        assert not [kind for kind in program.operations if 'const' in kind]
        outputs = torch.cat([program.run(source.make_ready(part, job)) for part in cases.batches(1)])
        errors[compress] = ((outputs - cases.logits).norm() / cases.logits.norm()).item()
    assert sizes['int8'] < 0.75 * sizes['none'] and sizes['palette6'] < 0.9 * sizes['int8']
    assert sizes['palette4'] < 0.9 * sizes['palette6']
    assert errors['none'] < errors['int8'] < errors['palette6'] < errors['palette4'] < 1
    assert errors['int8'] < 0.05


# What cannot be -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, said', [
    (dict(batch=2, input='image', output='logits'), r'--batch 2 with --input image: .* Take --input tensor'),
    (dict(batch=2, output='classes'), r'--batch 2 with --output classes: .* Take --output probabilities'),
    (dict(compress='int8', target='iOS15'), r'--compress int8 with --target iOS15: .* Take --target iOS16'),
    (dict(compress='palette4', target='iOS15'), '--compress palette4 with --target iOS15'),
])
def test_what_excludes_one_another_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        coreml.check(make_job('mlpackage', 'fp16', **settings))


def test_networks_are_of_no_target():
    coreml.check(make_job('mlmodel', 'fp16', compress='int8', target='iOS15'))


@pytest.mark.parametrize('found, refused', [('8.3.0', True), ('10.0', True), ('9.0', False), ('9.1', False)])
def test_converter_of_another_version_is_refused(found, refused, monkeypatch):
    monkeypatch.setattr(coreml, 'version', lambda name: found)
    if not refused:
        return coreml.check(make_job('mlpackage', 'fp16'))
    with pytest.raises(ConfigError, match=rf'coremltools {found} is installed.*pip install coremltools==9\.0'):
        ExportConfig(model='care_s0', random_weights=True).list_jobs((224, 224))


def test_palettes_ask_for_scikit_learn(monkeypatch):
    monkeypatch.setattr(coreml, 'find_spec', lambda name: None)
    coreml.check(make_job('mlpackage', 'fp16', compress='int8'))
    with pytest.raises(ConfigError, match='--compress palette6 needs scikit-learn: pip install scikit-learn'):
        coreml.check(make_job('mlpackage', 'fp16', compress='palette6'))


@pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])
def test_failed_conversion_is_one_line_and_leaves_nothing(format, tmp_path, monkeypatch):
    ct = coreml.import_coremltools()

    def fail(*args, **kwargs):
        raise NotImplementedError('no such\noperation')
    monkeypatch.setattr(ct, 'convert', fail)
    with pytest.raises(ExportError, match='not convert test_efficientnet: NotImplementedError: no such operation'):
        coreml.write(make_source('test_efficientnet'), make_job(format), tmp_path / f'program.{format}')
    assert list(tmp_path.iterdir()) == []


def test_failed_saving_leaves_nothing(tmp_path, monkeypatch):
    ct = coreml.import_coremltools()
    save = ct.models.MLModel.save

    def fill_the_disk(self, path):
        save(self, path)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(ct.models.MLModel, 'save', fill_the_disk)
    with pytest.raises(ExportError, match='program.mlmodel cannot be written: No space left on device'):
        coreml.write(make_source('test_efficientnet'), make_job('mlmodel'), tmp_path / 'program.mlmodel')
    assert list(tmp_path.iterdir()) == []


def test_earlier_file_is_replaced(tmp_path):
    path = tmp_path / 'program.mlpackage'
    (path / 'Data').mkdir(parents=True)
    (path / 'Data' / 'of an earlier one').touch()
    coreml.write(make_source('test_efficientnet'), make_job('mlpackage'), path)
    assert {file.name for file in path.iterdir()} == {'Data', 'Manifest.json'}
    assert not (path / 'Data' / 'of an earlier one').exists()


def test_silence_ends(capfd):
    level = logging.getLogger('coremltools').level
    coreml.import_coremltools()
    assert logging.getLogger('coremltools').level == level
    print('heard', file=sys.stderr)
    assert capfd.readouterr().err == 'heard\n'


def test_classes_of_one_name_get_their_numbers():
    assert _make_distinct(['crane', 'kite', 'crane']) == ['crane (class 0)', 'kite', 'crane (class 2)']
    assert len(set(make_source().class_names)) == 1000
