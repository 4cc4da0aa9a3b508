"""The main use: train on real images, then evaluate and predict with the checkpoint."""
import csv
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import yaml
from filelock import FileLock
from launch import ENVIRONMENT, ROOT, command, configure, run
from photos import FRUIT

from caretrans.__main__ import main
from caretrans.checkpoint import read_checkpoint
from caretrans.config import TrainConfig
from caretrans.training.losses import build_task
from caretrans.training.run import train
from caretrans.training.classification import build_model

FLOOR = 25  # percent top-1 after three short epochs; chance is 7


def refuse(*flags):
    """The one line of a script that exits with 2, for bad input."""
    line, = (line for line in run(*flags, code=2)[1].splitlines() if not line.startswith('Loaded '))
    return line


@pytest.fixture(scope='module')
def sample_run(tmp_path_factory):
    """A short version of `bash cmd/train.sh` in a new interpreter, once for all workers: (its folder, its output)."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if 'PYTEST_XDIST_WORKER' in os.environ else shared
    folder, printed = shared / 'sample_run', shared / 'sample_run.txt'
    with FileLock(shared / 'sample_run.lock'):
        if not printed.exists():
            printed.write_text(subprocess.run(
                command('train.py', '--recipe', 'care_s0_fruit14', '--epochs', 3, '--warmup-epochs', 1, '--img-size',
                        48, '--val-img-size', 64, '--val-interval', 2, '--output', folder),
                cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True, encoding='utf-8').stdout,
                encoding='utf-8')
    return folder, printed.read_text(encoding='utf-8')


def read_rows(folder: Path):
    with open(folder / 'summary.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_care_s0_learns_real_images(sample_run):
    last = read_rows(sample_run[0])[-1]
    assert float(last['val_top1']) > FLOOR
    assert float(last['train_loss']) < float(read_rows(sample_run[0])[0]['train_loss']) < math.log(14)


def test_a_run_records_its_results_and_prints_the_next_command(sample_run):
    folder, printed = sample_run
    assert yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))['img_size'] == 48
    environment = json.loads((folder / 'environment.json').read_text(encoding='utf-8'))
    assert environment['torch'] in torch.__version__ and environment['num_classes'] == 14 and environment['threads']
    assert [row['epoch'] for row in read_rows(folder)] == ['1', '2', '3']
    assert [bool(row['val_top1']) for row in read_rows(folder)] == [False, True, True]
    assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG') and list(folder.glob('events.out.tfevents*'))
    assert f'next: bash cmd/eval.sh {folder}/best.pth.tar' in printed
    assert 'images/s' in printed and 'batch of 16 = 16 images x 1 forward pass, 45 steps per epoch' in printed
    assert 'optimizer' in read_checkpoint(folder / 'last.pth.tar').meta


def test_evaluation_of_the_best_checkpoint_reproduces_its_score(sample_run):
    folder, _ = sample_run
    best = max(read_rows(folder), key=lambda row: float(row['val_top1'] or 0))
    result = json.loads(run('validate.py', folder / 'best.pth.tar', '--json', '--batch-size', 50)[0])
    assert result['images'] == 661 and result['eval_config']['input_size'] == [3, 64, 64]
    assert result['top1'] == pytest.approx(float(best['val_top1']), abs=0.16)  # one borderline image of 661
    assert result['loss'] == pytest.approx(float(best['val_loss']), rel=1e-4)
    printed, _ = run('validate.py', folder / 'best.pth.tar', FRUIT)
    assert f'top-1 {result["top1"]:.3f} %' in printed and '661 images' in printed and 'crop_pct 1.0' in printed


def test_plain_timm_opens_the_checkpoint(sample_run):
    path = sample_run[0] / 'best.pth.tar'
    model = timm.create_model('care_s0', num_classes=14, ls_init_value=0.1, checkpoint_path=str(path))
    assert torch.equal(model.state_dict()['stem.conv.weight'], read_checkpoint(path).state_dict['stem.conv.weight'])


def test_prediction_names_the_classes_of_files_and_folders(sample_run, tmp_path, capsys):
    checkpoint = str(sample_run[0] / 'best.pth.tar')
    shutil.copy(next(FRUIT.glob('val/orange/*.jpg')), tmp_path / 'a.jpg')
    (tmp_path / 'b.jpg').write_bytes(b'not an image')
    assert main(['predict', '--checkpoint', checkpoint, '--model', 'care_s0', '--json', str(tmp_path)]) == 1
    captured = capsys.readouterr()
    good, bad = map(json.loads, captured.out.splitlines())
    assert len(good['classes']) == 5 and set(good['classes']) <= {p.name for p in (FRUIT / 'val').iterdir()}
    assert good['probabilities'] == sorted(good['probabilities'], reverse=True) and sum(good['probabilities']) <= 1.001
    assert 'error' in bad and 'b.jpg' in captured.err
    assert main(['predict', '--checkpoint', checkpoint, '--topk', '2', str(tmp_path / 'a.jpg')]) == 0
    assert capsys.readouterr().out.count(' %  ') == 2


def test_a_checkpoint_converts_to_the_published_layout_and_back(sample_run, tmp_path, capsys):
    source, published, ours = sample_run[0] / 'best.pth.tar', tmp_path / 'p.pth.tar', tmp_path / 'o.safetensors'
    assert main(['convert', str(source), str(published), '--to', 'published']) == 0
    assert '--img-size 64 --crop-pct 1.0 --interpolation bicubic' in capsys.readouterr().out
    assert main(['convert', str(published), str(ours), '--to', 'caretrans']) == 0
    assert 'token_mixer' in ''.join(torch.load(published, weights_only=True))
    before, after = read_checkpoint(source).state_dict, read_checkpoint(ours).state_dict
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


TINY = ['--recipe', 'care_s0_fruit14', '--epochs', 1, '--warmup-epochs', 0, '--batch-size', 24, '--img-size', 32,
        '--val-img-size', 32, '--workers', 0, '--device', 'cpu']
SHALLOW = ['--model-args', 'depths=[1,1,1,1]']


def train_tiny(data, output, *flags):
    train(configure(data, *TINY, '--output', output, *flags))
    return read_checkpoint(output / 'last.pth.tar')


def test_a_run_repeats_itself_bit_for_bit_from_its_seed(data, tmp_path):
    seeds = dict(first=1, second=1, other=2)
    first, second, other = (
        train_tiny(data, tmp_path / name, '--seed', seed, *SHALLOW).state_dict for name, seed in seeds.items())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first['stem.conv.weight'], other['stem.conv.weight'])


def test_training_starts_from_a_checkpoint_of_other_classes(sample_run, data, tmp_path, capsys, caplog):
    caplog.set_level('INFO', 'caretrans')
    flags = ['--checkpoint', sample_run[0] / 'best.pth.tar', '--new-heads', '--lr', 1e-12, '--min-lr', 1e-12]
    tuned = train_tiny(data, tmp_path / 'tuned', *flags)
    printed = capsys.readouterr().err + caplog.text
    start = read_checkpoint(sample_run[0] / 'best.pth.tar').state_dict
    assert 'The heads of care_s0 are fresh' in printed and 'entry state_dict' in printed
    assert tuned.state_dict['head.fc.weight'].shape == (2, 1024) and tuned.meta['class_names'] == ['kaiser', 'orange']
    assert torch.allclose(tuned.state_dict['stem.conv.weight'], start['stem.conv.weight'], atol=1e-6)


@pytest.mark.parametrize('flags', [
    ['--mixup', 0.8, '--cutmix', 1.0], ['--device-batch', 12], ['--amp', 'bf16'], ['--amp', 'fp16'],
    ['--auto-augment', 'rand-m9-mstd0.5-inc1', '--random-erasing', 1], ['--no-step-schedule', '--drop-path', 0.1],
    ['--no-channels-last', '--drop', 0.1], ['--ema'], ['--grad-checkpointing'], ['--sync-bn'], ['--clip-grad', 1],
    ['--clip-grad', 0.01, '--clip-mode', 'agc'], ['--loss', 'bce', '--mixup', 0.8], ['--train-img-sizes', 32, 64],
    ['--model', 'mobilenetv2_035', '--model-args', 'drop_path_rate=0.1'],
], ids=lambda flags: '-'.join(str(flag) for flag in flags[:3])[2:])
def test_every_mode_of_training_runs(data, tmp_path, flags):
    assert train_tiny(data, tmp_path / 'run', *SHALLOW, *flags).meta['epoch'] == 1


def test_plain_labels_train_both_heads():
    config = TrainConfig(model='care_s0', drop_path=0.)
    model = build_model(config, 3)
    task = build_task(config, model, torch.device('cpu'))
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(head.fc.weight.grad.norm() > 0 for head in (model.head, model.head_dist))


@pytest.mark.parametrize('flags, message', [
    (['nowhere'], "No data at 'nowhere'"),
    (['nowhere', '--kernels', '--device', 'cpu'], 'kernels with device=cpu: the kernels run on CUDA GPUs, not on cpu'),
    ([], 'No data named'),
    ([FRUIT, '--model', 'care_s7'], "No model 'care_s7'; near: care_s0"),
    ([FRUIT, '--model-args', 'width=3'], "unexpected keyword argument 'width'"),
    ([FRUIT, '--model-args', 'ablation=foo'], "Unknown ablation 'foo'"),
    ([FRUIT, '--model-args', 'depths=5'], 'care_s0: '),
    ([FRUIT, '--model-args', 'depths=[1,1'], 'is not a value: write it'),
    ([FRUIT, '--model-args', 'slice_chs=[-4,4,8,8]'], 'care_s0'),
    ([FRUIT, '--model', 'casvit_xs', '--model-args', 'features_only=true'], 'does not return one number per class'),
    ([FRUIT, '--model-args', 'num_classes=5'], 'The model_args name num_classes: use --num-classes.'),
    ([FRUIT, '--model-args', 'pretrained=true'], 'model_args name pretrained: use --pretrained or --checkpoint'),
    ([FRUIT, '--lr', 'nan'], 'lr is nan but must be a finite number'),
    ([FRUIT, '--pretrained', '--checkpoint', 'x.pth'], 'checkpoint=x.pth and --pretrained exclude each other'),
    ([FRUIT, '--model-args', 'in_chans=1'], 'takes 1 channels, but images have 3'),
    ([FRUIT, '--opt', 'nonsense'], 'These settings do not work'),
    ([FRUIT, '--auto-augment', 'nonsense'], 'These settings do not work'),
    ([FRUIT, '--mixup', 0.8, '--batch-size', 5], 'an even number for mixup and cutmix: use 4 or 6'),
    ([FRUIT, '--teacher', 'resnet18', '--teacher-checkpoint', 'gone.pth'], 'gone.pth: no such file'),
    ([FRUIT, '--model', 'resnet18', '--teacher', 'resnet18'], 'resnet18 has no second head'),
    ([FRUIT, '--num-classes', 20], 'num_classes=20, but the data has 14'),
    ([FRUIT, '--batch-size', 1000, '--device-batch', 100], '732 training images do not fill a batch of 1000'),
    ([FRUIT, '--batch-size', 1000], '732 training images do not fill a batch of 1000'),
    ([FRUIT, '--batch-size', 31, '--device-batch', 12], 'use 30 or 32'),
    ([FRUIT, '--device', 'cuda:9'] if not torch.cuda.is_available() else [FRUIT, '--device', 'xpu'], 'there is only'),
    ([FRUIT, '--recipe', 'mine'], "No recipe 'mine'"),
    ([FRUIT, '--checkpoint', 'gone.pth'], 'gone.pth: no such file'),
    ([FRUIT, '--recipe', 'care_s0_finetune'], 'new_heads: there are no weights to fine-tune: add --checkpoint FILE or'),
    ([FRUIT, '--output', '/proc/run'], '/proc/run cannot be written'),
], ids=lambda value: str(value)[:30])
def test_bad_input_is_one_line_and_exit_code_2(flags, message):
    assert message in refuse('train.py', *flags)


def test_a_run_is_not_written_over_another(sample_run):
    assert 'holds a finished run' in refuse('train.py', '--recipe', 'care_s0_fruit14', '--output', sample_run[0])


def test_evaluation_refuses_unknown_classes(sample_run, data, tmp_path):
    other = shutil.copytree(data, tmp_path / 'other')
    (other / 'val' / 'orange').rename(other / 'val' / 'lemon')
    line = refuse('validate.py', sample_run[0] / 'best.pth.tar', other)
    assert f'{other} has 1 of 2 classes that' in line and 'does not know: lemon' in line


@pytest.mark.parametrize('flags', [
    ['--batch-size', 1], ['--batch-size', 4, '--device-batch', 1],
    ['--train-img-sizes', 32, 64, '--batch-size', 2, '--device-batch', 1], ['--model', 'resnet10t', '--batch-size', 1],
    ['--model', 'levit_128s', '--img-size', 224, '--batch-size', 1]], ids=lambda flags: ' '.join(map(str, flags)))
def test_a_pass_of_one_image_with_one_value_per_channel_is_refused_before_any_data(flags):
    """The folder does not even exist. LeViT normalises pooled features, whatever the size of the image."""
    line = refuse('train.py', 'nowhere', '--img-size', 32, *flags, '--workers', 0, '--device', 'cpu')
    assert 'train.py: A forward pass of 1 image of ' in line and 'leaves BatchNorm of ' in line
    assert 'use 2 or more per pass and process with --batch-size or --device-batch, or --img-size 64.' in line


def test_a_pass_of_one_image_of_several_values_trains(data, tmp_path):
    assert train_tiny(data, tmp_path / 'run', *SHALLOW, '--img-size', 64, '--batch-size', 2, '--device-batch', 1,
                      '--train-split', 'val').meta['epoch'] == 1
