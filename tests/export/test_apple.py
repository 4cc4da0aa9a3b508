"""What only Apple's systems can tell, with stand-ins in the place of Core ML: the bookkeeping, not the calls to Apple.

Classes of coremltools that need no Mac are the real ones: the benchmarker, the devices, the plan's devices.
"""
import asyncio
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from exports import make_cases, make_job, make_source, prove
from launch import ROOT
from PIL import Image

from caretrans.errors import ExportError
from caretrans.export import apple, coreml, run
from caretrans.export.config import ExportConfig
from caretrans.export.phone_results import COLUMNS, read_results
from caretrans.export.report import describe_exports

PATH = Path('program.mlpackage')


@pytest.fixture
def perf_utils():
    coreml.import_coremltools()
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
    result = prove(job, program, PATH)
    assert program.runner == 'Core ML, compute units cpu_and_ne' and program.timed
    assert result.top1_agreement == 100 and result.max_error < 1e-4


def test_a_mac_examines_each_program_before_it_is_kept(monkeypatch, tmp_path):
    placements = [apple.Placement('conv', 'Neural Engine', 141, 90.), apple.Placement('cast', 'CPU', 2, 0.5)]
    latency = apple.Latency(1.25, 1.1, 2.5, 80., 500, 50, 'all', 'MLModelBenchmarker')
    monkeypatch.setattr(run, 'is_available', lambda: True)
    monkeypatch.setattr(apple, 'list_placements', lambda path: placements)
    monkeypatch.setattr(apple, 'measure_latency', lambda path, job, images: latency)
    config = ExportConfig(
        model='care_s0', random_weights=True, img_size='64', images=3, output='logits', output_dir=str(tmp_path))
    job = make_job(format='mlpackage', precision='fp16', input='image')
    monkeypatch.setattr(apple, '_open', lambda path, units: CoreML(job))
    facts, exports = run.export(config)
    text = '\n'.join(describe_exports(facts, exports))
    assert 'Core ML on this Mac: max error' in text and 'Neural Engine: 141 operations, 90.0 % of the' in text
    assert '1.25 ms, median of 500' in text
    report = json.loads((tmp_path / 'care_s0-64x64-logits.mlpackage.json').read_text())
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
def test_elsewhere_core_ml_says_that_it_cannot_predict(tmp_path):
    path = tmp_path / 'program.mlmodel'
    job = make_job('mlmodel')
    coreml.write(make_source('test_efficientnet'), job, path)
    for use in (lambda: apple.read_by_core_ml(make_source(), job, path), lambda: apple.list_placements(path),
                lambda: apple.measure_latency(path, job, torch.zeros(1, 3, 64, 64))):
        with pytest.raises(ExportError, match='program.mlmodel: Core ML cannot load it .* It runs on macOS alone'):
            use()


# Where operations run -------------------------------------------------------------------------------------------------

def make_device(name):
    coreml.import_coremltools()
    from coremltools.models import compute_device
    return object.__new__(getattr(compute_device, name))


def make_usage(engine):
    return Namespace(preferred_compute_device=make_device(f'ML{engine}ComputeDevice'))


class Plan:
    """Of operations (type, engine or None, share of the cost or None)."""

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


def test_table_is_told_device_by_device():
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
    """What the benchmarker of coremltools loads: predictions of 1, 2, 3 ... ms."""

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


# Connected devices ----------------------------------------------------------------------------------------------------

@pytest.fixture
def remote():
    coreml.import_coremltools()
    from coremltools.models.ml_program.experimental import remote_device
    return remote_device


@pytest.fixture
def connect(remote, monkeypatch):
    """Let devices (name, kind, state) be connected."""
    def make(*devices):
        found = [remote.Device(
            name=name, type=remote.DeviceType(kind), identifier=name, udid=name, os_version='18.1',
            os_build_number='22B', developer_mode_state='enabled', state=remote.DeviceState(state), session=None)
            for name, kind, state in devices]
        monkeypatch.setattr(remote.Device, 'get_devices', staticmethod(lambda: found))
        return found
    return make


def test_one_connected_device_is_found(connect):
    devices = connect(('Mac', 'mac', 'connected'), ('Ann', 'iphone', 'connected'), ('Bob', 'iphone', 'disconnected'))
    assert apple.find_device() is devices[1]


def test_several_devices_are_chosen_by_name(connect):
    devices = connect(('Ann', 'iphone', 'connected'), ('Tab', 'ipad', 'connected'))
    assert apple.find_device('Tab') is devices[1]
    for name in ('', 'Eve'):
        with pytest.raises(ExportError, match='Connected devices: Ann, Tab. Choose one by its name'):
            apple.find_device(name)


def test_no_device_is_named_with_what_to_do(connect):
    connect()
    with pytest.raises(ExportError, match='Connected devices: none. Connect one by cable, unlock it'):
        apple.find_device()


@pytest.mark.skipif(apple.is_available(), reason='devicectl may be here')
def test_missing_tools_are_named():
    with pytest.raises(ExportError, match="cannot be listed: The 'devicectl' command is required"):
        apple.find_device()


def test_device_is_prepared_measured_and_left(connect, loaded, remote, monkeypatch):
    device, = connect(('Ann', 'iphone', 'connected'))
    stopped, asked = [], []
    ready = Namespace(session=Namespace(stop=lambda: stopped.append(True)))

    async def prepare(self, credentials, working_directory):
        asked.append((credentials.development_team, credentials.bundle_identifier, working_directory.is_dir()))
        await asyncio.sleep(0)
        return ready
    monkeypatch.setattr(remote.Device, 'prepare_for_model_debugging', prepare)
    images = make_source().normalise(make_cases().pixels[:1])
    latency = apple.measure_on_device(
        PATH, make_job('mlpackage'), images, device, 'TEAM', 'com.example.runner', warm_up=1, runs=3)
    assert asked == [('TEAM', 'com.example.runner', True)] and stopped == [True]
    assert loaded.where == [ready] and latency.median == 3 and latency.device == 'Ann (iphone 18.1)'
    assert all(isinstance(inputs['input_1'], np.ndarray) for inputs in loaded.inputs)


@pytest.mark.parametrize('settings, team, said', [
    (dict(format='mlmodel'), 'TEAM', 'measures .mlpackage alone on devices'),
    (dict(format='mlpackage', input='image'), 'TEAM', 'Export with --input tensor --output logits'),
    (dict(format='mlpackage', output='classes'), 'TEAM', 'Export with --input tensor --output logits'),
    (dict(format='mlpackage'), '', 'name the development team'),
])
def test_what_cannot_be_measured_on_a_device_is_refused(settings, team, said):
    with pytest.raises(ExportError, match=said):
        apple.measure_on_device(PATH, make_job(**settings), torch.zeros(1, 3, 64, 64), None, team)


# The command ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('phone', [False, True])
def test_command_prints_a_row_for_the_results(phone, loaded, connect, remote, monkeypatch, capsys, tmp_path):
    """coreml/measure.py, from a program that was exported here to a line that the file of results takes."""
    path = tmp_path / 'program.mlpackage'
    kind = dict(input='tensor', output='logits') if phone else dict(input='image', output='classes')
    coreml.write(make_source('test_efficientnet'), make_job('mlpackage', 'fp16', **kind), path)
    connect(('Ann', 'iphone', 'connected'))

    async def prepare(self, credentials, working_directory):
        return Namespace(session=Namespace(stop=lambda: None))
    monkeypatch.setattr(remote.Device, 'prepare_for_model_debugging', prepare)
    monkeypatch.setattr(apple, 'list_placements', lambda path, units: apple.summarise_plan(Plan(OPERATIONS)))
    monkeypatch.setattr('platform.mac_ver', lambda: ('15.1', ('', '', ''), 'arm64'))
    where = ['--phone', '--team', 'TEAM', '--device-model', 'iPhone 15 Pro'] if phone else \
        ['--device-model', 'MacBook Air (M2)']
    monkeypatch.setattr('sys.argv', [
        'measure.py', str(path), *where, '--reporter', 'Nobody', '--runs', '11', '--warm-up', '2'])
    monkeypatch.setattr('sys.path', list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'coreml' / 'measure.py'), run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[-2].startswith('8.00 ms, median of 11')
    assert (lines[0] == 'Neural Engine: 3 operations, 75.0 % of the estimated cost') is not phone
    results = tmp_path / 'results.csv'
    results.write_text(','.join(column.name for column in COLUMNS) + '\n' + lines[-1] + '\n')
    row, = read_results(results)
    assert (row['model'], row['latency_ms'], row['runs'], row['warm_up']) == ('test_efficientnet', '8.000', '11', '2')
    assert row['os'] == ('iOS 18.1' if phone else 'macOS 15.1') and row['input'] == kind['input']


def test_command_checks_what_was_typed_before_it_measures(loaded, monkeypatch, capsys, tmp_path):
    path = tmp_path / 'program.mlmodel'
    coreml.write(make_source('test_efficientnet'), make_job('mlmodel'), path)
    monkeypatch.setattr('platform.mac_ver', lambda: ('15.1', ('', '', ''), 'arm64'))
    monkeypatch.setattr('sys.argv', ['measure.py', str(path), '--device-model', 'my phone', '--reporter', 'Nobody'])
    monkeypatch.setattr('sys.path', list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'coreml' / 'measure.py'), run_name='__main__')
    assert end.value.code == 2 and "is 'my phone', it must be Apple's name of the device" in capsys.readouterr().err
    assert not loaded.inputs


def test_command_names_what_it_cannot_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.argv', [
        'measure.py', str(tmp_path / 'nowhere.mlpackage'), '--device-model', 'MacBook', '--reporter', 'Nobody'])
    monkeypatch.setattr('sys.path', list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'coreml' / 'measure.py'), run_name='__main__')
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('measure.py: ') and 'nowhere.mlpackage cannot be read' in error
    assert error.count('\n') == 1
