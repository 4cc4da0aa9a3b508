"""Numbers that are not finite: no accuracy, no best checkpoint, no JSON, and a remedy."""
import json
import math
import sys

import pytest
import timm
import torch
import torch.nn as nn
from launch import configure
from photos import copy_images
from validate import main as validate

import caretrans.training.classification
import caretrans.training.run
from caretrans.__main__ import main as caretrans_main
from caretrans.checkpoint import save_checkpoint
from caretrans.errors import CheckpointError, ConfigError, EvaluationError, ResultsError, TrainingError
from caretrans.evaluation import EvalConfig, evaluate_checkpoint, predict_images
from caretrans.evaluation.metrics import Scores, evaluate
from caretrans.strict_json import to_json
from caretrans.training.folder import RunFolder
from caretrans.training.run import train

NAN, INF = float('nan'), float('inf')
CPU = torch.device('cpu')


def save(path, name='', value=NAN, scale=1.):
    """A checkpoint of two classes of which one tensor is spoiled, or whose last features are scaled."""
    torch.manual_seed(0)
    model = timm.create_model('care_s0', num_classes=2, depths=(1, 1, 1, 1))
    if name:
        model.state_dict()[name].view(-1)[0] = value
    model.head.fc.weight.data.mul_(scale)
    save_checkpoint(path, model, arch='care_s0', class_names=['kaiser', 'orange'],
                    model_args=dict(depths=(1, 1, 1, 1)), eval_config=dict(input_size=[3, 32, 32], crop_pct=1.))
    return str(path)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return copy_images(tmp_path_factory.mktemp('data'), per_class=5)


def call(main, capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['validate.py', *map(str, argv)])
    code = main() if main is validate else main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if not line.startswith('Loaded ')]


class Given(nn.Module):
    """A model that returns its input as logits."""

    num_classes = 3

    def forward(self, x):
        return x


class Batches:
    def __init__(self, *batches):
        self.batches = batches

    def run(self):
        return iter(self.batches)


@pytest.mark.parametrize('value', [NAN, INF, -INF])
@pytest.mark.parametrize('late', [False, True])
def test_logits_that_are_not_finite_are_counted(value, late):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    bad = logits.clone()
    bad[1, 2], bad[3, 0] = value, value
    batches = [(logits, labels), (bad, labels)]
    count = '2 of 8' if late else '2 of the first 4'
    with pytest.raises(EvaluationError, match=f'^The logits of {count} images are not finite, so there is no accuracy'):
        evaluate(Given(), Batches(*(batches if late else batches[::-1])), CPU)


def test_losses_that_overflow_are_not_finite_either():
    logits = torch.tensor([[3e38, -3e38, 0.], [0., 1., 2.]])
    with pytest.raises(EvaluationError, match='^The logits of 1 of the first 2 images are not finite'):
        evaluate(Given(), Batches((logits, torch.tensor([1, 2]))), CPU)


@pytest.mark.parametrize('name, value', [
    ('stem.conv.weight', NAN), ('head.fc.bias', INF), ('stem.norm.running_var', NAN)])
def test_evaluation_and_prediction_of_spoiled_weights_stop_with_the_remedy(
        tmp_path, data, capsys, monkeypatch, name, value):
    checkpoint = save(tmp_path / 'x.pth.tar', name, value)
    code, out, lines = call(validate, capsys, monkeypatch, checkpoint, data, '--json', '--workers', 0)
    assert code == 2 and out == '' and len(lines) == 1
    assert lines[0].startswith(
        'validate.py: The logits of 10 of the first 10 images are not finite, so there is no accuracy: 1 of ')
    assert f'tensors of the weights are not finite either ({name}): use another checkpoint.' in lines[0]
    image = next(data.glob('val/*/*.jpg'))
    code, out, lines = call(caretrans_main, capsys, monkeypatch, 'predict', image, '--checkpoint', checkpoint, '--json')
    assert code == 2 and out == '' and f'are not finite either ({name}): use another checkpoint.' in lines[0]


def test_other_weights_of_the_file_are_named(tmp_path, data):
    """As in files of older runs, whose averaged weights could become NaN."""
    good, bad = (timm.create_model('care_s0', num_classes=2, depths=(1, 1, 1, 1)) for _ in range(2))
    bad.stem.conv.weight.data.fill_(NAN)
    save_checkpoint(tmp_path / 'x.pth', good, arch='care_s0', ema=bad, model_args=dict(depths=(1, 1, 1, 1)))
    options = dict(data=str(data), img_size=32, workers=0)
    with pytest.raises(EvaluationError, match="another checkpoint, or other weights of this file with --entry 'state"):
        evaluate_checkpoint(EvalConfig(str(tmp_path / 'x.pth'), **options))
    assert evaluate_checkpoint(EvalConfig(str(tmp_path / 'x.pth'), entry='state_dict', **options)).images == 10


def test_overflow_in_half_precision_names_amp(tmp_path, data, capsys, monkeypatch):
    checkpoint = save(tmp_path / 'x.pth.tar', scale=1e6)
    code, out, (line,) = call(validate, capsys, monkeypatch, checkpoint, data, '--amp', 'fp16', '--workers', 0)
    assert code == 2 and line.endswith('the weights are finite, but numbers overflow with amp=fp16: use --amp off.')
    code, out, _ = call(validate, capsys, monkeypatch, checkpoint, data, '--workers', 0)
    assert code == 0 and 'top-1' in out
    results = list(predict_images(checkpoint, [str(data)], amp='fp16'))
    assert len(results) == 20 and all('use --amp off' in result.error for result in results)


# Training -------------------------------------------------------------------------------------------------------------

FLAGS = ['--recipe', 'care_s0_fruit14', '--epochs', 2, '--warmup-epochs', 0, '--batch-size', 5, '--img-size', 32,
         '--val-img-size', 32, '--val-interval', 1, '--workers', 0, '--device', 'cpu', '--ema',
         '--model-args', 'depths=[1,1,1,1]']


@pytest.mark.parametrize('part, message', [
    ('ema', r'tensors of the weights are not finite \(ema: stem.conv.weight\); no checkpoint was written'),
    ('statistics', r'tensors of the weights are not finite \(.*stem.norm.running_mean.*\); no checkpoint was written')])
def test_no_checkpoint_is_written_from_an_average_that_is_not_finite(tmp_path, data, monkeypatch, part, message):
    """Nor from running statistics; the weights themselves are finite, and training would go on."""
    original = caretrans.training.run.Run._sum_up

    def spoil(self):
        original(self)
        if self.state.epoch == 1:
            key = 'stem.conv.weight' if part == 'ema' else 'stem.norm.running_mean'
            dict((self.trainer.ema if part == 'ema' else self.trainer.model).state_dict())[key].fill_(NAN)
    monkeypatch.setattr(caretrans.training.run.Run, '_sum_up', spoil)
    monkeypatch.setattr(
        caretrans.training.classification, 'evaluate', lambda *_: Scores(1., 50., 100., 10, [], 1., 10., None))
    with pytest.raises(TrainingError, match=message):
        train(configure(data, *FLAGS, '--output', tmp_path / 'run'))
    for name in ('best', 'last'):
        saved = torch.load(tmp_path / 'run' / f'{name}.pth.tar')
        assert saved['epoch'] == 1
        for entry in ('state_dict', 'state_dict_ema'):
            assert all(value.isfinite().all() for value in saved[entry].values())


def test_training_from_weights_that_are_not_finite_is_refused_before_the_first_step(tmp_path, data):
    checkpoint = save(tmp_path / 'x.pth.tar', 'head.fc.weight')
    with pytest.raises(CheckpointError, match=r'1 tensors of the weights are not finite \(head.fc.weight\)'):
        train(configure(data, *FLAGS, '--checkpoint', checkpoint, '--output', tmp_path / 'run'))
    with pytest.raises(ConfigError, match=r'The teacher care_s0 has 1 tensors that are not finite \(head.fc.weight\)'):
        train(configure(data, *FLAGS, '--teacher', 'care_s0', '--teacher-checkpoint', checkpoint,
                        '--output', tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_best_scores_of_older_runs_that_are_not_finite_do_not_stay(tmp_path):
    folder = RunFolder(tmp_path / 'run', configure('data'), {})
    row = dict(epoch=1, train_loss=1., val_loss=NAN, val_top1=99., val_top5=99., lr=1., images_per_s=1., seconds=1.,
               data_wait=0.)
    folder.restore([row], row)
    assert folder.best is None
    folder.restore([], dict(row, val_loss=2.))
    assert folder.best.scores['val_top1'] == 99.
    folder.close()


def test_validation_whose_logits_are_not_finite_ends_training(tmp_path, data, monkeypatch):
    original = caretrans.training.run.Run._sum_up

    def spoil(self):
        original(self)
        if self.state.epoch == 1:
            self.trainer.ema.state_dict()['stem.conv.weight'].fill_(NAN)
    monkeypatch.setattr(caretrans.training.run.Run, '_sum_up', spoil)
    with pytest.raises(TrainingError, match=(
            '^The logits of 5 of the first 5 images are not finite, .* '
            r'\(stem.conv.weight\): .* averaged weights after epoch 2; .*Last good checkpoint: .*last.pth.tar')):
        train(configure(data, *FLAGS, '--output', tmp_path / 'run'))
    assert torch.load(tmp_path / 'run' / 'best.pth.tar')['epoch'] == 1
    assert not (tmp_path / 'run' / 'result.json').exists()


# JSON -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('value, where', [
    (dict(a=[1, dict(b=NAN)]), 'a.1.b is nan'), ([INF], '0 is inf'), (dict(loss=-INF), 'loss is -inf')])
def test_json_refuses_what_is_not_finite(value, where):
    with pytest.raises(ResultsError, match=f'^{where}, which JSON cannot hold'):
        to_json(value)


def test_json_of_an_evaluation_is_strict(tmp_path, data, capsys, monkeypatch):
    code, out, _ = call(validate, capsys, monkeypatch, save(tmp_path / 'x.pth.tar'), data, '--json', '--workers', 0,
                        '--confusion', 1, '--per-class', tmp_path / 'x.csv')
    result = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 0 and math.isfinite(result['loss']) and result['worst'][0]['taken_for'] is not None
    assert evaluate_checkpoint(EvalConfig(str(tmp_path / 'x.pth.tar'), str(data), workers=0)).to_dict().keys() == \
        result.keys() - {'worst', 'per_class'}
