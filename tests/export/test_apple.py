"""Measurements that need a Mac, with stand-ins for Core ML: the bookkeeping, not the calls to Apple.

Classes of coremltools that need no Mac are the real ones: the benchmarker, the devices of a plan.
"""
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from exports import check, make_cases, make_job, make_source
from launch import ROOT
from PIL import Image

from caretrans.errors import ExportError
from caretrans.export import run
from caretrans.export.config import ExportConfig
from caretrans.export.coreml import apple, convert
from caretrans.export.phone_results import COLUMNS, read_results
from caretrans.export.report import describe_exports

PATH = Path('program.mlpackage')


@pytest.fixture
def perf_utils():
    convert.import_coremltools()
    from coremltools.models.ml_program.experimental import perf_utils
    return perf_utils


class CoreML:
    """An MLModel that answers what a network of PyTorch computes."""

    def __init__(self, job, shift=0.):
        self.job, self.shift, self.asked = job, shift, []
        self.load_duration_in_nano_seconds, self.last_predict_duration_in_nano_seconds = 7e6, None

    def predict(self, features):
        (name, feature), = features.items()
        assert name == 'input_1'
        self.asked.append(feature)
        self.last_predict_duration_in_nano_seconds = 1e6 * len(self.asked)
        source = make_source()
        if self.job.input == 'image':
            assert isinstance(feature, Image.Image) and feature.mode == 'RGB'
            images = source.normalise(torch.from_numpy(np.array(feature)).permute(2, 0, 1)[None])
        else:
            assert feature.dtype == np.float32
            images = torch.from_numpy(feature)
        with torch.no_grad():
            logits = source.model(images) + self.shift
        if self.job.output != 'classes':
            return {self.job.output: logits.numpy()}
        named = list(zip(source.class_names, logits.softmax(dim=-1)[0].tolist(), strict=True))
        return dict(classLabel='whatever', probabilities=dict(reversed(named)))


# Predictions ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [
    dict(input='image', output='classes'), dict(input='tensor', output='logits', batch=2)])
def test_predictions_are_compared_like_those_of_any_program(settings, monkeypatch):
    job = make_job('mlpackage', 'fp16', **settings)
    monkeypatch.setattr(apple, '_open', lambda path, units: CoreML(job))
    program = apple.read_by_core_ml(make_source(), job, PATH, 'cpu_and_ne')
    result = check(job, program)
    assert program.runner == 'Core ML, compute units cpu_and_ne' and program.timed
    assert result.top1_agreement == 100 and result.max_error < 1e-4


def test_a_mac_examines_each_program_before_it_is_kept(monkeypatch, programs, tmp_path):
    placements = [apple.Placement('conv', 'Neural Engine', 141, 90.), apple.Placement('cast', 'CPU', 2, 0.5)]
    latency = apple.Latency(1.25, 1.1, 2.5, 80., 500, 50, 'all', 'MLModelBenchmarker')
    job = make_job('mlpackage', 'fp16', input='image')
    path, _ = programs.write(job)
    monkeypatch.setattr(run, 'is_available', lambda: True)
    monkeypatch.setattr(run, 'load_source', lambda config: make_source())
    monkeypatch.setattr(convert, 'write', lambda source, job, target: shutil.copytree(path, target) and [])
    monkeypatch.setattr(apple, 'list_placements', lambda path: placements)
    monkeypatch.setattr(apple, 'measure_latency', lambda path, job, images: latency)
    monkeypatch.setattr(apple, '_open', lambda path, units: CoreML(job))
    config = ExportConfig(
        model='care_s0', random_weights=True, img_size='64', images=3, output='logits', output_dir=str(tmp_path))
    facts, exports = run.export(config)
    text = '\n'.join(describe_exports(facts, exports))
    assert 'Core ML on this Mac: max error' in text and 'Neural Engine: 141 operations, 90.0 % of the' in text
    assert '1.25 ms, median of 500' in text
    report = json.loads((tmp_path / 'care_s0-64x64-logits.mlpackage.json').read_text(encoding='utf-8'))
    assert report['core_ml']['latency']['median'] == 1.25 and report['core_ml']['verification']['images'] == 3

    monkeypatch.setattr(apple, '_open', lambda path, units: CoreML(job, shift=1.))
    _, (refused,) = run.export(config)
    assert 'rounding does not explain it' in refused.failure


def test_images_keep_rows_columns_and_colours():
    pixels = make_cases().pixels[:1, :, :40]
    feature = apple.make_feature(pixels.float(), 'image')
    assert feature.size == (64, 40)
    assert feature.getpixel((3, 2)) == tuple(pixels[0, :, 2, 3].tolist())


@pytest.mark.skipif(apple.is_available(), reason='Core ML is here')
def test_elsewhere_core_ml_cannot_predict(programs):
    job = make_job('mlmodel')
    path, _ = programs.write(job, 'test_efficientnet')
    for use in (lambda: apple.read_by_core_ml(make_source(), job, path), lambda: apple.list_placements(path),
                lambda: apple.measure_latency(path, job, torch.zeros(1, 3, 64, 64))):
        with pytest.raises(ExportError, match='.mlmodel: Core ML cannot load it .* Core ML needs macOS'):
            use()


# Where operations run -------------------------------------------------------------------------------------------------

def make_device(name):
    convert.import_coremltools()
    from coremltools.models import compute_device
    return object.__new__(getattr(compute_device, name))


def make_usage(engine):
    return Namespace(preferred_compute_device=make_device(f'ML{engine}ComputeDevice'))


class Plan:
    """A compute plan of operations (type, engine or None, share of the cost or None)."""

    def __init__(self, operations, program=True):
        named = [Namespace(operator_name=f'ios16.{kind}', type=kind, engine=engine, share=share)
                 for kind, engine, share in operations]
        main = Namespace(block=Namespace(operations=named))
        self.model_structure = Namespace(
            program=Namespace(functions={'main': main}) if program else None,
            neuralnetwork=None if program else Namespace(layers=named))

    def get_compute_device_usage_for_mlprogram_operation(self, item):
        return item.engine and make_usage(item.engine)

    get_compute_device_usage_for_neuralnetwork_layer = get_compute_device_usage_for_mlprogram_operation

    def get_estimated_cost_for_mlprogram_operation(self, item):
        return None if item.share is None else Namespace(weight=item.share)


OPERATIONS = [
    ('const', None, None), ('conv', 'NeuralEngine', 0.5), ('conv', 'NeuralEngine', 0.25), ('conv', 'CPU', 0.05),
    ('softmax', 'GPU', 0.2), ('reshape', 'NeuralEngine', None)]


def test_plan_becomes_a_table_of_operations_and_devices():
    rows = apple.summarise_plan(Plan(OPERATIONS))
    assert [(row.operation, row.device, row.count) for row in rows] == [
        ('conv', 'Neural Engine', 2), ('softmax', 'GPU', 1), ('conv', 'CPU', 1), ('reshape', 'Neural Engine', 1)]
    assert [row.share for row in rows] == [75, pytest.approx(20), pytest.approx(5), None]


def test_table_lists_device_by_device():
    assert apple.describe_placements(apple.summarise_plan(Plan(OPERATIONS))) == [
        'Neural Engine: 3 operations, 75.0 % of the estimated cost',
        '  conv: 2 operations, 75.0 % of the estimated cost', '  reshape: 1 operations',
        'GPU: 1 operations, 20.0 % of the estimated cost', '  softmax: 1 operations, 20.0 % of the estimated cost',
        'CPU: 1 operations, 5.0 % of the estimated cost', '  conv: 1 operations, 5.0 % of the estimated cost']


def test_layers_of_networks_have_devices_and_no_cost():
    rows = apple.summarise_plan(Plan([('convolution', 'GPU', None)] * 2, program=False))
    assert rows == [apple.Placement('convolution', 'GPU', 2, None)]
    assert apple.describe_placements(rows) == ['GPU: 2 operations', '  convolution: 2 operations']


# Latency --------------------------------------------------------------------------------------------------------------

class Loaded:
    """Stand-in for the model that coremltools' benchmarker loads: predictions of 1, 2, 3 ... ms."""

    def __init__(self):
        self.inputs = []
        self.load_duration_in_nano_seconds = 5e6

    def make_state_if_needed(self):
        return None

    async def predict(self, inputs, state=None):
        self.inputs.append(inputs)

    @property
    def last_predict_duration_in_nano_seconds(self):
        return 1e6 * len(self.inputs)


@pytest.fixture
def loaded(perf_utils, monkeypatch):
    """The benchmarker with a stand-in for the model that it loads; `loaded.where` says on which devices."""
    stand_in = Loaded()
    stand_in.where = []

    async def load(model, device):
        stand_in.where.append(device)
        return stand_in
    monkeypatch.setattr(perf_utils.MLModelBenchmarker, '_create_loaded_model', staticmethod(load))
    monkeypatch.setattr(
        apple, '_open', lambda path, units, load=True: Namespace(get_spec=lambda: None, units=units, loaded=load))
    return stand_in


def test_latency_is_the_median_after_a_warm_up_on_one_loaded_model(loaded):
    images = make_cases().pixels[:1].float()
    latency = apple.measure_latency(
        PATH, make_job('mlpackage', input='image'), images, 'cpu_only', warm_up=10, runs=5)
    assert (latency.median, latency.minimum, latency.maximum) == (13, 11, 15)
    assert (latency.load, latency.runs, latency.warm_up, latency.units) == (5, 5, 10, 'cpu_only')
    assert loaded.where == [None] and len(loaded.inputs) == 15
    assert all(inputs['input_1'].size == (64, 64) for inputs in loaded.inputs)
    assert str(latency).startswith(
        '13.00 ms, median of 5 (11.00 to 15.00) after 10 to warm up, load 5 ms; compute units cpu_only, this Mac, '
        'MLModelBenchmarker of coremltools 9')


def test_networks_are_timed_without_the_benchmarker(monkeypatch):
    job = make_job('mlmodel', input='image')
    model = CoreML(job)
    monkeypatch.setattr(apple, '_open', lambda path, units: model)
    latency = apple.measure_latency(PATH, job, make_cases().pixels[:1].float(), warm_up=2, runs=3)
    assert (latency.median, latency.load, latency.runs) == (4, 7, 3) and len(model.asked) == 5


def test_failure_of_the_measurement_is_named(loaded, monkeypatch):
    async def fail(inputs, state=None):
        raise ValueError('Failed to load model')
    monkeypatch.setattr(loaded, 'predict', fail)
    with pytest.raises(ExportError, match='program.mlpackage could not be measured: ValueError: Failed to load model'):
        apple.measure_latency(PATH, make_job('mlpackage'), torch.zeros(1, 3, 64, 64))


# The command ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def measure(monkeypatch, capsys):
    """Run coreml/measure.py on a Mac that is simulated: its exit code, stdout and stderr."""
    def call(path, model='MacBook Air (M2)'):
        monkeypatch.setattr('platform.mac_ver', lambda: ('15.1', ('', '', ''), 'arm64'))
        monkeypatch.setattr('sys.argv', [
            'measure.py', str(path), '--device-model', model, '--reporter', 'Nobody', '--runs', '11', '--warm-up', '2'])
        monkeypatch.setattr('sys.path', list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'coreml' / 'measure.py'), run_name='__main__')
        return end.value.code, *capsys.readouterr()
    return call


def test_command_prints_a_row_for_the_results(measure, loaded, monkeypatch, programs, tmp_path):
    """From a program that was exported here to a line of the file of results."""
    monkeypatch.setattr(apple, 'list_placements', lambda path, units: apple.summarise_plan(Plan(OPERATIONS)))
    path, _ = programs.write(make_job('mlpackage', 'fp16', input='image', output='classes'))
    code, text, _ = measure(path)
    lines = text.splitlines()
    assert code == 0 and lines[0] == 'Neural Engine: 3 operations, 75.0 % of the estimated cost'
    assert lines[-2].startswith('8.00 ms, median of 11')
    results = tmp_path / 'results.csv'
    results.write_text(','.join(column.name for column in COLUMNS) + '\n' + lines[-1] + '\n', encoding='utf-8')
    row, = read_results(results)
    assert (row['model'], row['latency_ms'], row['runs'], row['warm_up']) == ('care_s0', '8.000', '11', '2')
    assert (row['os'], row['input']) == ('macOS 15.1', 'image')


def test_command_names_wrong_flags_and_files_before_it_measures(measure, loaded, programs, tmp_path):
    path, _ = programs.write(make_job('mlmodel'), 'test_efficientnet')
    for args, message in ((path, 'my phone'), "is 'my phone', it must be Apple's name of the device"), (
            (tmp_path / 'nowhere.mlpackage',), 'nowhere.mlpackage cannot be read'):
        code, _, error = measure(*args)
        assert code == 2 and error.startswith('measure.py: ') and message in error and error.count('\n') == 1
    assert not loaded.inputs
