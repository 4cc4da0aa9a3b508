"""Training of detectors and segmenters: losses, schedules, recipes, resuming, refusals."""
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from launch import kill, list_differences, read_tensors, run, start, wait_for
from timm.optim import create_optimizer_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.functional import normalize
from train import report

import caretrans
from caretrans.config import RECIPES, parse_train_config
from caretrans.dense import create_dense_model, create_from_checkpoint, save_checkpoint
from caretrans.dense.config import DenseConfig, find_dense_task
from caretrans.dense.evaluate import evaluate_dense
from caretrans.dense.load import load_weights
from caretrans.dense.training import DenseTask, DenseTrainer, DeviceBatches
from caretrans.distributed import Processes
from caretrans.errors import CheckpointError, ConfigError, DataError, EvaluationError, TrainingError
from caretrans.training.run import TrainResult, train
from caretrans.training.state import EpochRow
from caretrans.training.trainer import build_schedule

DATA = Path(caretrans.__file__).parent.parent / 'data'
CPU = torch.device('cpu')
SMALL = [
    '--model', 'care_s0', '--model-args', 'depths=[1,1,1,1]', '--channels', 16, '--hidden', 32, '--proposals', 20,
    '--rois', 16, '--mask-convs', 1, '--head-channels', 16, '--no-frozen-bn', '--min-sizes', 64, '--max-size', 96,
    '--photometric', '--scale', .8, 1.2, '--schedule', 'cosine', '--batch-size', 4, '--epochs', 2, '--lr', 1e-3,
    '--warmup-steps', 2, '--warmup-lr', 1e-6, '--workers', 1, '--device', 'cpu']
TASKS = {'retinanet': 'cards', 'faster_rcnn': 'cards', 'mask_rcnn': 'nuclei', 'semantic_fpn': 'nuclei'}


def configure(*flags) -> DenseConfig:
    return parse_train_config([str(flag) for flag in flags], '', DenseConfig)


@pytest.fixture(scope='session')
def small_data(tmp_path_factory) -> Path:
    """Eight training and three evaluation images of each bundled data set."""
    root = tmp_path_factory.mktemp('dense')
    for name in ('cards', 'nuclei'):
        for split, count in (('train', 8), ('val', 3)):
            content = json.loads((DATA / name / f'{split}.json').read_text(encoding='utf-8'))
            content['images'] = content['images'][:count]
            ids = {image['id'] for image in content['images']}
            content['annotations'] = [entry for entry in content['annotations'] if entry['image_id'] in ids]
            (root / name / split).mkdir(parents=True)
            (root / name / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')
            for image in content['images']:
                shutil.copy(DATA / name / split / image['file_name'], root / name / split)
                mask = Path(f'{split}_masks', Path(image['file_name']).with_suffix('.png').name)
                if (DATA / name / mask).exists():
                    (root / name / mask).parent.mkdir(exist_ok=True)
                    shutil.copy(DATA / name / mask, root / name / mask)
        if (DATA / name / 'classes.txt').exists():
            shutil.copy(DATA / name / 'classes.txt', root / name)
    return root


def build(task: str, data: Path, *flags) -> DenseTrainer:
    return DenseTrainer(configure(data / TASKS[task], '--task', task, *SMALL, '--workers', 0, *flags), Processes(), CPU)


# Losses ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
def test_a_prepared_batch_has_the_losses_of_the_list_of_its_images(task):
    """Sides that are multiples of 32, so that the model neither resizes nor pads the list."""
    model = create_dense_model(
        task, 'care_s0', 2, model_args=dict(depths=[1, 1, 1, 1]), channels=16, min_size=64, max_size=96).double()
    model.transform._skip_resize = True  # it would draw a size, even from a single one
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, 8:40, 8:60] = 1
    target = dict(boxes=torch.tensor([[8., 8., 60., 40.]]).double(), labels=torch.tensor([1]), masks=masks)
    nothing = dict(boxes=torch.zeros(0, 4).double(), labels=torch.zeros(0, dtype=torch.int64), masks=masks[:0])
    losses = []
    for batch in (list(images), ImageList(
            normalize(images, model.transform.image_mean, model.transform.image_std), [(64, 96)] * 2)):
        torch.manual_seed(0)
        losses.append(model.train()(batch, [target, nothing]))
    for name, value in losses[0].items():
        assert value > 0 and abs(value - losses[1][name]) < 1e-9 * value, name


def test_the_loss_of_a_segmenter_is_the_mean_over_all_pixels_ignored_ones_count_as_zero():
    model = create_dense_model(
        'semantic_fpn', 'care_s0', 3, model_args=dict(depths=[1, 1, 1, 1]), channels=16, head_channels=16).eval()
    images, labels = torch.rand(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    labels[:, :32] = 255
    loss = DenseTask(model, 'semantic_fpn', CPU)(images, labels)['loss']
    by_hand = F.log_softmax(model(images), dim=1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    assert torch.isclose(loss, -by_hand[labels != 255].sum() / labels.numel(), rtol=1e-5)
    assert DenseTask(model, 'semantic_fpn', CPU)(images, torch.full_like(labels, 255))['loss'] == 0


def test_batches_are_normalised_then_padded_and_label_maps_padded_with_the_ignored_value():
    images = [torch.full((3, 40, 64), 255, dtype=torch.uint8), torch.zeros(3, 33, 20, dtype=torch.uint8)]
    (batch, maps), = DeviceBatches([(images, [x[0] for x in images])], CPU, torch.contiguous_format)
    assert batch.shape == (2, 3, 64, 64) and maps.shape == (2, 64, 64) and maps.dtype == torch.int64
    assert not batch[0, :, 40:].any() and not batch[1, :, 33:].any() and not batch[1, :, :, 20:].any()
    assert torch.allclose(batch[0, :, 0, 0], torch.tensor([(1 - .485) / .229, (1 - .456) / .224, (1 - .406) / .225]))
    assert (maps[1, 33:] == 255).all() and (maps[1, :, 20:] == 255).all() and not maps[1, :33, :20].any()
    targets = [dict(boxes=torch.zeros(0, 4))] * 2
    (batch, _), = DeviceBatches([(images, targets)], CPU, torch.contiguous_format)
    assert batch.image_sizes == [(40, 64), (33, 20)] and batch.tensors.shape == (2, 3, 64, 64)


# Schedules and recipes ------------------------------------------------------------------------------------------------

def rates(config: DenseConfig, steps_per_epoch: int, steps) -> list[float]:
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **config.optimizer_options())
    schedule, epochs = build_schedule(config, optimizer, steps_per_epoch)
    assert epochs == config.epochs
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]['lr'])
    return found


def test_the_rate_of_casvit_on_coco_and_ade20k():
    """Linear from a millionth in 500 steps, a tenth after 8 and 11 epochs; power 0.9 to 0."""
    coco = configure('--recipe', 'retinanet_casvit_xs_coco', '--checkpoint', 'file')
    found = rates(coco, 3696, [0, 250, 500, 8 * 3696 - 1, 8 * 3696, 11 * 3696, 12 * 3696 - 1])
    assert found == pytest.approx([2e-10, 1.000001e-4, 2e-4, 2e-4, 2e-5, 2e-6, 2e-6], rel=1e-9)
    ade = configure('--recipe', 'semantic_fpn_casvit_m_ade20k', '--checkpoint', 'file')
    steps = [0, 10000, 20192, 64 * 631 - 1]
    assert rates(ade, 631, steps) == pytest.approx([2e-4 * (1 - step / (64 * 631)) ** .9 for step in steps], rel=1e-9)


def test_weight_decay_of_norms_is_that_of_the_recipe():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for name, expected in (('retinanet_casvit_xs_coco', {1e-4}), ('mask_rcnn_mlla_t_coco', {.05, 0.})):
        config = configure('--recipe', name, '--checkpoint', 'file')
        groups = create_optimizer_v2(model, **config.optimizer_options()).param_groups
        assert {group['weight_decay'] for group in groups} == expected


@pytest.mark.parametrize('path', sorted((RECIPES / 'dense').glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_described(path):
    text = path.read_text(encoding='utf-8')
    for word in ('command', 'hardware', 'time', 'score'):
        assert any(re.match(rf'#  ?{word} +\S', line) for line in text.splitlines()), word
    sample = path.stem.endswith(('_cards', '_nuclei'))
    assert sample or 'not measured' in text
    config = configure('--recipe', path.stem, *([] if sample else ['--checkpoint', 'file']))
    assert path.stem.startswith(f'{config.task}_{config.model}_')
    assert DenseConfig(**yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    if not sample:
        assert f'--recipe {path.stem} ' in text and config.split_steps(8) == [(4 if config.batch_size == 32 else 2, 1)]
        assert config.frozen_bn and config.drop_path == (
            .1 if config.model in ('casvit_m', 'casvit_t') or config.model.startswith('mlla') else 0)


def test_the_data_the_recipe_or_the_flag_decide_what_is_trained(small_data):
    for argv, task in (
            ([small_data / 'cards'], 'faster_rcnn'), ([small_data / 'nuclei', '--epochs', 3], 'mask_rcnn'),
            ([small_data / 'nuclei', '--task', 'semantic_fpn'], 'semantic_fpn'), ([DATA / 'fruit14'], ''),
            (['--data', small_data / 'cards', '--min-sizes', 64, 96], 'faster_rcnn'),
            (['X', '--recipe', 'retinanet_care_s0_coco'], 'retinanet'), (['X', '--recipe', 'care_s0_fruit14'], ''),
            ([], '')):
        assert find_dense_task([str(x) for x in argv]) == task, argv


# Runs -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task', TASKS)
def test_a_run_writes_losses_scores_and_a_checkpoint_that_gives_its_score(task, small_data, tmp_path):
    flags = ['--epochs', 1, '--warmup-steps', 1, *(['--amp', 'bf16'] if task == 'retinanet' else []),
             *(['--device-batch', 2] if task == 'faster_rcnn' else ['--ema'])]
    config = configure(small_data / TASKS[task], '--task', task, *SMALL, *flags, '--output', tmp_path / 'run')
    result = train(config, DenseTrainer)
    row = result.last
    assert math.isfinite(row.train_loss) and all(math.isfinite(term) for term in row.terms.values())
    if row.terms:
        assert sum(row.terms.values()) == pytest.approx(row.train_loss, rel=1e-5)
    header = (tmp_path / 'run' / 'summary.csv').read_text(encoding='utf-8').splitlines()[0]
    assert header == ','.join(['epoch', 'train_loss', *row.terms, *row.scores, 'lr', 'images_per_s', 'seconds',
                               'data_wait'])
    scores = evaluate_dense(tmp_path / 'run' / 'last.pth.tar', str(config.data), amp=config.amp)
    found = scores.pixel or scores.mask or scores.box
    assert row.scores[result.best_score] == pytest.approx(next(iter(found.values())), abs=1e-9)
    assert (tmp_path / 'run' / 'curves.png').exists()


def test_a_killed_run_ends_with_the_same_bits(small_data, tmp_path):
    flags = [small_data / 'cards', '--recipe', 'faster_rcnn_care_s0_cards', *SMALL, '--save-steps', 1,
             '--val-interval', 2]
    train(configure(*flags, '--output', tmp_path / 'undisturbed'), DenseTrainer)
    log = tmp_path / 'log.txt'
    process = start('train.py', *flags, '--output', tmp_path / 'run', log=log)
    state = tmp_path / 'run' / 'last.pth.tar'
    assert wait_for(state.exists, process), log.read_text(encoding='utf-8')
    kill(process)
    assert not (tmp_path / 'run' / 'result.json').exists()
    train(configure(*flags, '--output', tmp_path / 'run', '--workers', 2), DenseTrainer)
    assert not list_differences(read_tensors(state), read_tensors(tmp_path / 'undisturbed' / 'last.pth.tar'))
    mine, theirs = (torch.load(path, weights_only=True) for path in (
        state, tmp_path / 'undisturbed' / 'last.pth.tar'))
    timed = ('images_per_s', 'seconds', 'data_wait')
    assert [{k: v for k, v in row.items() if k not in timed} for row in mine['rows']] == [
        {k: v for k, v in row.items() if k not in timed} for row in theirs['rows']]
    for key, entry in theirs['optimizer']['state'].items():
        assert all(torch.equal(value, mine['optimizer']['state'][key][name]) for name, value in entry.items())


def test_an_evaluation_that_fails_costs_no_step(small_data, tmp_path, monkeypatch):
    config = configure(small_data / 'nuclei', '--task', 'semantic_fpn', *SMALL, '--epochs', 1, '--warmup-steps', 1,
                       '--output', tmp_path / 'run')
    with monkeypatch.context() as patch:
        def fail(self, check):
            raise EvaluationError('The logits are not finite.')
        patch.setattr(DenseTrainer, 'evaluate', fail)
        with pytest.raises(TrainingError, match='after epoch 1; start a run with other settings'):
            train(config, DenseTrainer)
    weights = read_tensors(tmp_path / 'run' / 'last.pth.tar')
    result = train(config, DenseTrainer)  # resumes, and only evaluates
    assert result.last.epoch == 1 and result.best is not None
    assert not list_differences(read_tensors(tmp_path / 'run' / 'last.pth.tar'), weights)


def test_a_run_without_anything_to_score_ends_with_its_last_checkpoint():
    row = EpochRow(1, 1., {}, dict(val_AP=None), 1., 1., 1., 0.)
    lines = list(report('data/nuclei', TrainResult(Path('run'), row, None, 'val_AP', 'AP, %')))
    assert lines[0] == 'no AP: the evaluation images have nothing to score'
    assert lines[-1] == 'next: bash cmd/eval.sh run/last.pth.tar data/nuclei'  # detectors do not know their data
    best = EpochRow(1, 1., {}, dict(val_AP=40.), 1., 1., 1., 0.)
    assert next(report('data/nuclei', TrainResult(Path('run'), best, best, 'val_AP', 'AP, %'))) == \
        'best AP 40.0 % after epoch 1, last 40.0 %'


@pytest.mark.slow
def test_two_processes_train_together(small_data, tmp_path):
    run('train.py', small_data / 'nuclei', '--task', 'mask_rcnn', *SMALL, '--output', tmp_path / 'run', processes=2)
    model, _ = create_from_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    rows = (tmp_path / 'run' / 'summary.csv').read_text(encoding='utf-8').splitlines()
    assert len(rows) == 3 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_detector_learns_one_image_by_heart(small_data):
    """Steps on two images of cards lower every part of the loss."""
    trainer = build('faster_rcnn', small_data, '--no-photometric', '--scale', 1, 1)
    batch = next(trainer.run_passes(0, 0))
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=3e-3)
    trainer.task.train()
    losses = []
    for _ in range(25):
        torch.manual_seed(0)
        result = trainer.task(batch.images, batch.targets)
        losses.append([result[name].item() for name in trainer.terms])
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    assert sum(losses[-1]) < .6 * sum(losses[0])


def test_batch_norm_keeps_its_statistics_with_weights_and_few_images_only(small_data, tmp_path):
    from caretrans.checkpoint import save_checkpoint
    from timm import create_model

    file = tmp_path / 'care_s0.pth.tar'
    save_checkpoint(file, create_model('care_s0', depths=[1, 1, 1, 1]), arch='care_s0',
                    model_args=dict(depths=[1, 1, 1, 1]))
    flags = [small_data / 'cards', '--task', 'faster_rcnn', *(x for x in SMALL if x != '--no-frozen-bn')]
    for more, frozen in (([], False), (['--checkpoint', file], True),
                         (['--checkpoint', file, '--no-frozen-bn'], False)):
        trainer = DenseTrainer(configure(*flags, '--workers', 0, *more), Processes(), CPU)
        assert trainer.model.backbone.body.frozen_bn is frozen
        assert any('keeps its statistics' in line for line in trainer.introduce()) is frozen


def test_fine_tuning_of_a_detector_needs_new_heads_for_other_classes(small_data, tmp_path):
    train(configure(small_data / 'nuclei', '--task', 'mask_rcnn', *SMALL, '--epochs', 1, '--warmup-steps', 1,
                    '--output', tmp_path / 'run'), DenseTrainer)
    file, data = tmp_path / 'run' / 'last.pth.tar', shutil.copytree(small_data / 'nuclei', tmp_path / 'two')
    for split in ('train', 'val'):
        content = json.loads((data / f'{split}.json').read_text(encoding='utf-8'))
        content['categories'].append(dict(id=7, name='other'))
        (data / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')
    flags = ['--task', 'mask_rcnn', *SMALL, '--workers', 0, '--checkpoint', file]
    with pytest.raises(CheckpointError, match=r'has 1 classes .nucleus., the data 2 .nucleus, other.: add --new-heads'):
        DenseTrainer(configure(data, *flags), Processes(), CPU)
    trainer = DenseTrainer(configure(data, *flags, '--new-heads'), Processes(), CPU)
    weights, saved = trainer.model.state_dict(), read_tensors(file)
    other = {key for key in saved if weights[key].shape != saved[key].shape}
    assert other == {f'roi_heads.{part}.{kind}' for kind in ('weight', 'bias') for part in (
        'box_predictor.cls_score', 'box_predictor.bbox_pred', 'mask_predictor.mask_fcn_logits')}
    assert not list_differences({k: weights[k] for k in saved if k not in other},
                                {k: saved[k] for k in saved if k not in other})
    for more, message in (
            (['--channels', 32], 'or have other sizes: use the settings .* --channels 16'),
            (['--model-args', 'depths=[2,1,1,1]'], r"are missing here .* --model-args .'depths': \[1, 1, 1, 1\]"),
            (['--norm', 'batch'], 'its norm is layer, not batch'),
            (['--last-map', 'expanded'], 'its last_map is residual, not expanded')):
        with pytest.raises(CheckpointError, match=message):
            DenseTrainer(configure(data, *flags, '--new-heads', *more), Processes(), CPU)


def test_classes_of_other_names_are_other_classes(small_data, tmp_path):
    model = create_dense_model('retinanet', 'care_s0', 2, model_args=dict(depths=[1, 1, 1, 1]), channels=16)
    save_checkpoint(tmp_path / 'x.pth', model, ['a', 'b'])
    other = create_dense_model('retinanet', 'care_s0', 2, model_args=dict(depths=[1, 1, 1, 1]), channels=16)
    with pytest.raises(CheckpointError, match=r'has 2 classes \(a, b\), the data 2 \(b, a\): add --new-heads'):
        load_weights(other, tmp_path / 'x.pth', ['b', 'a'])
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_weights(other, tmp_path / 'x.pth', ['b', 'a'], new_heads=True)
    for key, value in other.state_dict().items():
        assert torch.equal(value, (before if 'cls_logits' in key else model.state_dict())[key]), key
    load_weights(other, tmp_path / 'x.pth', ['a', 'b'])
    assert not list_differences(dict(other.state_dict()), dict(model.state_dict()))


def test_a_run_resumes_with_the_batch_norm_that_it_had(small_data, tmp_path):
    folder = tmp_path / 'run'
    flags = [small_data / 'cards', '--task', 'faster_rcnn', *SMALL, '--epochs', 1, '--warmup-steps', 1]
    train(configure(*flags, '--output', folder), DenseTrainer)
    assert DenseTrainer.adopt(configure(*flags), folder) == dict(frozen_bn=False)
    content = torch.load(folder / 'last.pth.tar', weights_only=True)
    content['dense']['frozen_bn'] = True
    torch.save(content, folder / 'last.pth.tar')
    assert DenseTrainer.adopt(configure(*flags), folder) == dict(frozen_bn=True)
    assert DenseTrainer.adopt(configure(*flags), tmp_path) == {}


# Refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, message', [
    (['--frozen-bn'], 'frozen_bn with random weights .*--checkpoint or --pretrained, or use --no-frozen-bn'),
    (['--schedule', 'step', '--milestones', '8'], r'milestones=\[8\] are not below epochs=2: set --milestones'),
    (['--no-step-schedule'], 'warmup_steps=2 needs a rate per step: add --step-schedule'),
    (['--task', 'yolo'], "invalid choice: 'yolo'"), (['--norm', 'group'], "invalid choice: 'group'"),
    (['--scale', '2', '1'], r'scale of the augmentation is \(2.0, 1.0\): it must be'),
    (['--max-size', '32'], 'max_size of the augmentation is 32'),
    (['--num-classes', '7'], 'num_classes=7 is for masks, the data of mask_rcnn state their classes: omit it'),
    (['--reduce-zero-label'], 'reduce_zero_label=True is for masks'),
    (['--new-heads'], 'new_heads=True without weights'),
    (['--mixup', '1'], 'unrecognized arguments: --mixup'), (['--min-sizes', '16'], 'min_sizes is 16 but must be'),
])
def test_settings_that_cannot_work_are_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        configure('DATA', *SMALL, *flags)
    assert '\n' not in str(error.value)


def test_a_warm_up_that_does_not_fit_becomes_half_of_the_run(small_data):
    trainer = build('faster_rcnn', small_data, '--warmup-steps', 500)
    assert 'the warm-up of 500 steps does not fit: it takes 2' in list(trainer.introduce())
    found = rates(trainer.config, 2, range(4))
    assert found[1] == pytest.approx(trainer.config.lr / 2, rel=1e-2) and found[3] < found[2] <= trainer.config.lr / 2


def test_data_that_cannot_be_trained_on_are_one_line(small_data, tmp_path):
    flags = [*SMALL, '--workers', 0]

    def refuse(data, task, message, *more):
        with pytest.raises((DataError, ConfigError), match=message) as error:
            DenseTrainer(configure(data, '--task', task, *flags, *more), Processes(), CPU)
        assert '\n' not in str(error.value)

    refuse(small_data / 'cards', 'semantic_fpn', 'has no images and masks of train')
    refuse(small_data / 'cards', 'mask_rcnn', r'json: \d+ objects have no segmentation')
    refuse(small_data / 'cards', 'faster_rcnn', '8 training images do not fill a batch of 16', '--batch-size', 16)
    refuse(small_data / 'cards', 'faster_rcnn', 'faster_rcnn with care_s0: .*nonsense', '--model-args', 'nonsense=1')
    refuse(small_data / 'cards', 'faster_rcnn', "No model|no model", '--model', 'care_s9')
    data = shutil.copytree(small_data / 'cards', tmp_path / 'renamed')
    content = json.loads((data / 'val.json').read_text(encoding='utf-8'))
    content['categories'][0]['name'] = 'joker'
    (data / 'val.json').write_text(json.dumps(content), encoding='utf-8')
    refuse(data, 'faster_rcnn', 'has the classes .*joker.* both splits must have the same')


def test_a_run_of_other_classes_is_not_resumed(small_data, tmp_path):
    flags = ['--recipe', 'retinanet_care_s0_cards', *SMALL, '--save-steps', 1, '--output', tmp_path / 'run']
    process = start('train.py', small_data / 'cards', *flags, log=tmp_path / 'log')
    assert wait_for((tmp_path / 'run' / 'last.pth.tar').exists, process), (tmp_path / 'log').read_text(encoding='utf-8')
    kill(process)
    time.sleep(.1)
    with pytest.raises(ConfigError, match='was trained on 6 classes .* the data has 1 '):
        train(configure(small_data / 'nuclei', *flags), DenseTrainer)
