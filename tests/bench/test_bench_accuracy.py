"""benchmark.py --bench accuracy: predictions of each setup beside those of the original network."""
import json
from pathlib import Path

import pytest
import torch
from photos import copy_images
from reference import filled_model

from caretrans.bench import accuracy
from caretrans.bench.accuracy import measure_accuracy
from caretrans.bench.setups import Setup
from caretrans.checkpoint import save_checkpoint
from caretrans.evaluation import EvalConfig, evaluate_checkpoint


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return str(copy_images(tmp_path_factory.mktemp('data'), per_class=2))


@pytest.fixture(scope='module')
def checkpoint(data, tmp_path_factory):
    file = str(tmp_path_factory.mktemp('model') / 'model.pth')
    classes = sorted(path.name for path in (Path(data) / 'val').iterdir())
    config = dict(input_size=[3, 64, 64], interpolation='bilinear', crop_pct=1.0)
    save_checkpoint(
        file, filled_model('care_s0', num_classes=len(classes), depths=(1, 1, 1, 1)), arch='care_s0',
        class_names=classes, eval_config=config, model_args=dict(depths=[1, 1, 1, 1]),
        config=dict(data=data, val_split='val'))
    return file


@pytest.fixture(scope='module')
def expected(checkpoint):
    return evaluate_checkpoint(EvalConfig(checkpoint, workers=0))


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(accuracy, 'CALIBRATION', 32)


def test_every_setup_predicts_as_an_evaluation_of_the_checkpoint(checkpoint, expected):
    setups = [Setup('eager'), Setup('fused', 'float32', 'channels_last'), Setup('openvino'), Setup('onnxruntime')]
    for record in measure_accuracy(checkpoint, setups):
        assert record.images == expected.images and record.images % accuracy.BATCH, 'the last batch is smaller'
        assert (record.top1, record.agreement, record.top1_change) == (expected.top1, 100, 0)
        assert record.loss == pytest.approx(expected.loss, rel=1e-4)


def test_int8_is_calibrated_and_its_loss_differs(checkpoint, expected):
    record, = measure_accuracy(checkpoint, [Setup('openvino', 'int8')])
    assert 0 < record.agreement <= 100 and record.dtype == 'int8'
    assert record.loss != pytest.approx(expected.loss, rel=1e-6)


def test_wrong_predictions_and_failures_are_seen(checkpoint, monkeypatch, capsys):
    prepare = accuracy.prepare

    def prepare_wrongly(network, setup):
        print('a message of a runtime')
        if setup.backend == 'eager':
            raise ValueError('a kernel\nis missing')
        runner = prepare(network, setup)
        read = runner.read
        runner.read = lambda logits: read(logits).roll(1, dims=1)  # each image gets the next class
        return runner
    monkeypatch.setattr(accuracy, 'prepare', prepare_wrongly)
    failures = []
    record, = measure_accuracy(checkpoint, [Setup('eager'), Setup('fused')], failures=failures)
    assert record.backend == 'fused' and record.agreement == 0
    assert failures == ['accuracy of eager float32 nchw: ValueError: a kernel is missing']
    assert 'a message' not in capsys.readouterr().out
    with pytest.raises(ValueError, match='is missing'):
        measure_accuracy(checkpoint, [Setup('eager')])


def test_the_script_prints_and_writes_it(checkpoint, data, tmp_path, call):
    code, out, err = call(
        '--bench', 'accuracy', '--device', 'cpu', '--model', 'care_s0', '--checkpoint', checkpoint, '--data', data,
        '--backend', 'fused', '--dtype', 'bfloat16', '--output', tmp_path)
    assert code == 0, err
    record, = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['accuracy']
    assert list(record) == [
        'model', 'bench', 'checkpoint', 'data', 'device', 'height', 'width', 'versions', 'backend', 'dtype', 'layout',
        'kernels', 'images', 'top1', 'top5', 'loss', 'top1_change', 'agreement']
    assert (record['dtype'], record['layout'], record['kernels']) == ('bfloat16', 'channels_last', 'torch')
    assert 'channels_last' in out and f'{record["top1"]:.2f}' in out and (tmp_path / 'accuracy.csv').exists()


@pytest.mark.parametrize('flags, message', [
    ([], 'No weights: --checkpoint FILE loads a file'),
    (['--checkpoint', 'FILE', '--model', 'care_s0', '--data', 'no/such/folder'], 'no/such/folder'),
    (['--checkpoint', 'FILE', '--model', 'care_s1'], 'care_s1'),
    (['--checkpoint', 'FILE', '--model', 'care_s0', 'care_s1'], 'with 2 models'),
    (['--checkpoint', 'FILE', '--model', 'care_s0', '--img-size', '64x96'], 'use one square size')])
def test_invalid_evaluations_are_refused_in_one_line(checkpoint, flags, message, call):
    code, out, err = call('--bench', 'accuracy', '--device', 'cpu', *[
        checkpoint if flag == 'FILE' else flag for flag in flags])
    assert code == 2 and out == '' and message in err.splitlines()[-1]


def test_the_images_of_a_runner_are_its_own():
    network = accuracy.Network(
        filled_model('care_s0', depths=(1, 1, 1, 1)).eval(), torch.randn(2, 3, 64, 64))
    for setup in Setup('eager'), Setup('onnxruntime'), Setup('openvino'):
        runner, before = accuracy.prepare(network, setup), network.images.clone()
        found = runner.read(runner.run())
        runner.images.copy_(before.flip(0))
        torch.testing.assert_close(runner.read(runner.run()), found.flip(0), rtol=1e-3, atol=1e-3)
        assert torch.equal(network.images, before)
