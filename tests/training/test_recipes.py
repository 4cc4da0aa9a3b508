"""The bundled recipes: the settings of the paper, their learning rates, and a header that says what they are."""
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from caretrans.config import TrainConfig, parse_train_config, read_recipe
from caretrans.errors import ConfigError
from caretrans.training.trainer import build_schedule

RECIPES = Path(__file__).parents[2] / 'caretrans' / 'recipes'
STEPS = 1281167 // 1536


def rates(config: TrainConfig, epochs, step: int = 0):
    """The rate at the first step of these epochs, as a run sets it."""
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), opt=config.opt, lr=config.lr)
    schedule, total = build_schedule(config, optimizer, STEPS)
    found = {}
    for epoch in range(total):
        if config.step_schedule:
            schedule.step_update(epoch * STEPS + step)
        else:
            schedule.step(epoch)
        found[epoch] = optimizer.param_groups[0]['lr']
    return total, [found[epoch] for epoch in epochs]


@pytest.mark.parametrize('name, model, published', [
    ('care_s0_imagenet', 'care_s0', '78.4'), ('care_s1_imagenet', 'care_s1', '80.1'),
    ('care_s2_imagenet', 'care_s2', '82.1')])
def test_the_recipe_of_the_paper(name, model, published):
    config = parse_train_config(['--recipe', name])
    expected = dict(
        model=model, batch_size=1536, device_batch=128, opt='adamw', lr=2.5e-3, min_lr=1e-5, warmup_lr=1e-6,
        weight_decay=0.05, epochs=300, warmup_epochs=20, cooldown_epochs=10, amp='off', clip_grad=None, ema=False,
        img_size=224, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3], interpolation='random', hflip=0.5,
        auto_augment='rand-m9-mstd0.5-inc1', random_erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.1,
        drop=0., teacher='regnety_160.deit_in1k', task_weight=0.5, step_schedule=False, crop_pct=0.875, loss='ce')
    assert {key: getattr(config, key) for key in expected} == expected
    assert f'# top-1     {published} %' in (RECIPES / f'{name}.yaml').read_text()
    assert config.split_steps(12) == [(128, 1)] and config.split_steps(8) == [(96, 2)]
    assert config.split_steps(1) == [(128, 12)]


def test_the_rate_of_the_paper():
    """Linear from 1e-6 to the peak in 20 epochs, from there the cosine to 1e-5 at 300, then 10 epochs of that."""
    total, found = rates(parse_train_config(['--recipe', 'care_s0_imagenet']), (0, 1, 19, 20, 150, 299, 309))
    assert total == 310
    assert found == pytest.approx([
        1e-6, 1.2595e-4, 2.37505e-3, 2.472793763e-3, 1.255e-3, 1.00682689e-5, 1e-5], rel=1e-6)


def test_the_rate_per_step_passes_the_same_points():
    config = parse_train_config(['--recipe', 'care_s0_imagenet', '--step-schedule'])
    epochs = (0, 1, 19, 20, 150, 299, 309)
    total, found = rates(config, epochs)
    assert total == 310
    assert found == pytest.approx(rates(parse_train_config(['--recipe', 'care_s0_imagenet']), epochs)[1], rel=1e-6)
    assert rates(config, (1,), step=STEPS // 2)[1][0] == pytest.approx(1.2595e-4 * 1.5, rel=1e-2)


@pytest.mark.parametrize('path', sorted(RECIPES.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_is(path):
    text = path.read_text()
    header = [line for line in text.splitlines() if line.startswith('#')]
    for word in ('command', 'hardware', 'time', 'top-1'):
        assert any(re.match(rf'#  ?{word} +\S', line) for line in header), word
    if 'fruit' not in path.stem:
        assert 'not measured' in text
    config = parse_train_config(['--recipe', path.stem])
    assert timm.is_model(config.model)
    assert config.split_steps(1) and f'--recipe {path.stem}' in text or path.stem == 'care_s0_fruit14'


def test_variants_change_what_they_say():
    paper = parse_train_config(['--recipe', 'care_s0_imagenet']).to_dict()

    def changes(name):
        other = parse_train_config(['--recipe', name]).to_dict()
        return {key for key in paper if other[key] != paper[key]}
    assert changes('care_s0_imagenet_no_teacher') == {'teacher'}
    assert changes('care_s0_imagenet_bf16') == {'amp', 'channels_last', 'compile'}
    assert {'img_size', 'lr', 'epochs'} < changes('care_s0_imagenet_384')


def test_a_recipe_stands_on_another(tmp_path):
    (tmp_path / 'mine.yaml').write_text('base: care_s1_imagenet\nlr: 1e-3\n')
    config = parse_train_config(['--recipe', str(tmp_path / 'mine.yaml'), '--epochs', '50'])
    assert (config.model, config.lr, config.epochs, config.batch_size) == ('care_s1', 1e-3, 50, 1536)
    mine = tmp_path / 'loop.yaml'
    mine.write_text(f'base: {mine}\n')
    with pytest.raises(ConfigError, match='leads back to itself'):
        read_recipe(str(mine))


# The comparison systems -----------------------------------------------------------------------------------------------

CASVIT = {  # top-1: v1, v2, v2 at 384
    'casvit_xs': ('77.5', '78.3', '78.7'), 'casvit_s': ('80.2', '80.9', '81.1'), 'casvit_m': ('81.4', '82.8', '83.0'),
    'casvit_t': ('82.3', '83.9', '84.1')}
MLLA = {  # top-1, drop_path, mesa, batch, per device, rate, ema_decay
    'mlla_t': ('83.5', 0.2, 1.0, 1024, 128, 1e-3, 0.9999), 'mlla_s': ('84.4', 0.3, 1.5, 512, 64, 5e-4, 0.99995),
    'mlla_b': ('85.3', 0.5, 2.0, 512, 64, 5e-4, 0.99995)}


def read_header(name: str) -> str:
    lines = (RECIPES / f'{name}.yaml').read_text().splitlines()
    return '\n'.join(line for line in lines if line.startswith('#'))


@pytest.mark.parametrize('model', CASVIT)
def test_the_recipe_of_casvit(model):
    config = parse_train_config(['--recipe', f'{model}_imagenet'])
    expected = dict(
        model=model, model_args={}, batch_size=2048, device_batch=128, opt='adamw', lr=6e-3, min_lr=1e-6, warmup_lr=0.,
        weight_decay=0.05, epochs=300, warmup_epochs=20, cooldown_epochs=0, step_schedule=True, amp='fp16',
        clip_grad=None, ema=True, ema_decay=0.9995, img_size=224, train_img_sizes=[160, 192, 224, 256, 288, 320],
        val_img_size=224, crop_pct=0.875, crop_mode=None, scale=[0.08, 1.0], interpolation='bicubic', hflip=0.5,
        auto_augment='rand-m9-mstd0.5-inc1', random_erasing=0., mixup=0., cutmix=0., smoothing=0.1, drop_path=0.1,
        teacher='none', mesa=0., seed=43)
    assert {key: getattr(config, key) for key in expected} == expected
    v1, v2, _ = CASVIT[model]
    assert f'top-1     {v1} % (v1 of the paper), {v2} % (v2' in read_header(f'{model}_imagenet')
    assert 'not measured again' in read_header(f'{model}_imagenet') and 'epartures' in read_header(f'{model}_imagenet')


def test_every_size_of_casvit_makes_the_same_step_with_no_more_pixels_at_a_time():
    for name, most in (('casvit_xs_imagenet', 128 * 224 ** 2), ('casvit_xs_384_finetune', 64 * 384 ** 2)):
        config = parse_train_config(['--recipe', name])
        for world_size in (1, 4, 8):
            for size, (images, passes) in zip(
                    config.list_sizes(), config.split_steps(world_size), strict=True):
                assert images * passes * world_size == config.batch_size and images * size ** 2 <= most


@pytest.mark.parametrize('model', CASVIT)
def test_the_recipe_of_casvit_at_384(model):
    config = parse_train_config(['--recipe', f'{model}_384_finetune'])
    expected = dict(
        model=model, epochs=30, warmup_epochs=0, lr=5e-5, min_lr=5e-5, drop_path=0., ema=True, ema_decay=0.9995,
        img_size=384, val_img_size=384, train_img_sizes=[160, 192, 256, 288, 320, 384], crop_pct=1., crop_mode='squash',
        device_batch=64, weight_decay=0.05, amp='fp16', mixup=0., cutmix=0.)
    assert {key: getattr(config, key) for key in expected} == expected
    _, v2, at_384 = CASVIT[model]
    assert f'top-1     {at_384} % at 384 (v2), {float(at_384) - float(v2):.1f} above the {v2} at 224' \
        in read_header(f'{model}_384_finetune')
    total, found = rates(config, (0, 1, 15, 29))
    assert total == 30 and found == [5e-5] * 4


@pytest.mark.parametrize('model', MLLA)
def test_the_recipe_of_mlla(model):
    top1, drop_path, mesa, batch, per_device, lr, ema_decay = MLLA[model]
    config = parse_train_config(['--recipe', f'{model}_imagenet'])
    expected = dict(
        model=model, model_args={}, batch_size=batch, device_batch=per_device, opt='adamw', lr=lr, weight_decay=0.05,
        epochs=300, warmup_epochs=20, step_schedule=True, amp='fp16', clip_grad=5., clip_mode='norm', ema=True,
        ema_decay=ema_decay, img_size=224, train_img_sizes=[], crop_pct=0.875, auto_augment='rand-m9-mstd0.5-inc1',
        random_erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=drop_path, teacher='none', mesa=mesa,
        mesa_epoch=75)
    assert {key: getattr(config, key) for key in expected} == expected
    assert [config.lr, config.warmup_lr, config.min_lr] == pytest.approx(
        [5e-4 * batch / 512, 5e-7 * batch / 512, 5e-6 * batch / 512])
    assert config.ema_decay == pytest.approx(0.9996 ** (batch / 4096), abs=1e-6)
    assert f'top-1     {top1} % with MESA, published at 224; not measured again' in read_header(f'{model}_imagenet')
    assert config.split_steps(8) == [(per_device, 1)]


def test_the_rates_of_the_comparison_systems():
    """Linear to the peak in 20 epochs, then on from where the cosine is by then, in every step."""
    epochs = (0, 1, 19, 20, 150, 299)
    assert rates(parse_train_config(['--recipe', 'casvit_xs_imagenet']), epochs)[1] == pytest.approx(
        [0., 3e-4, 5.7e-3, 5.93445373e-3, 3.0005e-3, 1.16446449e-6], rel=1e-6)
    assert rates(parse_train_config(['--recipe', 'mlla_t_imagenet']), epochs)[1] == pytest.approx(
        [1e-6, 5.095e-5, 9.5005e-4, 9.89183062e-4, 5.05e-4, 1.00271412e-5], rel=1e-6)


def test_variants_of_the_comparison_systems_change_what_they_say():
    def changes(name, other):
        mine, others = (parse_train_config(['--recipe', recipe]).to_dict() for recipe in (name, other))
        return {key for key in mine if mine[key] != others[key]}
    assert changes('casvit_t_imagenet', 'casvit_xs_imagenet') == {'model'}
    assert changes('casvit_t_384_finetune', 'casvit_xs_384_finetune') == {'model'}
    assert changes('mlla_b_imagenet', 'mlla_s_imagenet') == {'model', 'drop_path', 'mesa'}
    assert changes('cifar100', 'cifar10') == {'data', 'dataset'}


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_recipes_of_cifar_are_for_every_model(name):
    config = parse_train_config(['--recipe', name])
    assert (config.dataset, config.data) == (f'torch/{name}', f'data/{name}')
    assert config.model_args == {} and config.drop_path == 0. and config.checkpoint == ''
    assert 'starting values' in read_header(name) and '--dataset-download' in read_header(name)
