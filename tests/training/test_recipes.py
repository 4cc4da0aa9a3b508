"""The bundled recipes: the published settings, their learning rates, and headers that describe them."""
import re

import pytest
import timm
import torch
import yaml
from launch import configure
from timm.optim import create_optimizer_v2

from caretrans.config import RECIPES, TrainConfig, read_recipe
from caretrans.errors import ConfigError
from caretrans.training.trainer import build_schedule

STEPS = 1281167 // 1536
LONG = dict(opt='adamw', weight_decay=0.05, epochs=300, warmup_epochs=20, img_size=224, crop_pct=0.875,
            scale=[0.08, 1.0], hflip=0.5, auto_augment='rand-m9-mstd0.5-inc1', smoothing=0.1, loss='ce', drop=0.)
PAPER = {'care_s0': '78.4', 'care_s1': '80.1', 'care_s2': '82.1'}  # top-1
CASVIT = {  # top-1: v1, v2, v2 at 384
    'casvit_xs': ('77.5', '78.3', '78.7'), 'casvit_s': ('80.2', '80.9', '81.1'), 'casvit_m': ('81.4', '82.8', '83.0'),
    'casvit_t': ('82.3', '83.9', '84.1')}
MLLA = {  # top-1, drop_path, mesa, batch, per device, rate, ema_decay
    'mlla_t': ('83.5', 0.2, 1.0, 1024, 128, 1e-3, 0.9999), 'mlla_s': ('84.4', 0.3, 1.5, 512, 64, 5e-4, 0.99995),
    'mlla_b': ('85.3', 0.5, 2.0, 512, 64, 5e-4, 0.99995)}


def parse(name, *flags) -> TrainConfig:
    return configure('--recipe', name, *flags)


def check(name: str, header: str, expected: dict) -> TrainConfig:
    """The recipe of that name, which must have these settings, and these words in its header."""
    config = parse(name)
    assert {key: getattr(config, key) for key in expected} == expected
    lines = (RECIPES / f'{name}.yaml').read_text(encoding='utf-8').splitlines()
    text = '\n'.join(line for line in lines if line.startswith('#'))
    assert header in text
    return config


def rates(config: TrainConfig, epochs, step: int = 0):
    """The number of epochs, and the learning rate at the first step of these epochs, as a run sets it."""
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


@pytest.mark.parametrize('model', PAPER)
def test_the_recipe_of_the_paper(model):
    config = check(f'{model}_imagenet', f'# top-1     {PAPER[model]} %', dict(
        LONG, model=model, batch_size=1536, device_batch=128, lr=2.5e-3, min_lr=1e-5, warmup_lr=1e-6,
        cooldown_epochs=10, amp='off', clip_grad=None, ema=False, ratio=[3 / 4, 4 / 3], interpolation='random',
        random_erasing=0.25, mixup=0.8, cutmix=1.0, drop_path=0.1, teacher='regnety_160.deit_in1k', task_weight=0.5,
        step_schedule=False))
    assert config.split_steps(12) == [(128, 1)] and config.split_steps(8) == [(96, 2)]
    assert config.split_steps(1) == [(128, 12)]


def test_the_rate_of_the_paper():
    """Linear from 1e-6 to the peak in 20 epochs, then the cosine to 1e-5 at 300, then 10 epochs of that."""
    epochs = (0, 1, 19, 20, 150, 299, 309)
    expected = [1e-6, 1.2595e-4, 2.37505e-3, 2.472793763e-3, 1.255e-3, 1.00682689e-5, 1e-5]
    for flags in [], ['--step-schedule']:
        total, found = rates(parse('care_s0_imagenet', *flags), epochs)
        assert total == 310 and found == pytest.approx(expected, rel=1e-6)
    assert rates(parse('care_s0_imagenet', '--step-schedule'), (1,), step=STEPS // 2)[1][0] == \
        pytest.approx(1.2595e-4 * 1.5, rel=1e-2)


@pytest.mark.parametrize(
    'path', sorted(path for path in RECIPES.glob('*.yaml') if not path.stem.startswith('selfsup')),
    ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_described(path):
    text = path.read_text(encoding='utf-8')
    for word in ('command', 'hardware', 'time', 'top-1'):
        assert any(re.match(rf'#  ?{word} +\S', line) for line in text.splitlines()), word
    assert 'not measured' in text or 'fruit' in path.stem
    config = parse(path.stem)
    assert timm.is_model(config.model)
    assert config.split_steps(1) and f'--recipe {path.stem}' in text or path.stem == 'care_s0_fruit14'
    assert TrainConfig(**yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize('name, base, expected', [
    ('care_s0_imagenet_no_teacher', 'care_s0_imagenet', {'teacher'}),
    ('care_s0_imagenet_bf16', 'care_s0_imagenet', {'amp', 'channels_last', 'compile'}),
    ('care_s0_imagenet_384', 'care_s0_imagenet', {
        'img_size', 'crop_pct', 'batch_size', 'device_batch', 'lr', 'warmup_lr', 'epochs', 'warmup_epochs',
        'cooldown_epochs'}),
    ('casvit_t_imagenet', 'casvit_xs_imagenet', {'model'}), ('cifar100', 'cifar10', {'data', 'dataset'}),
    ('casvit_t_384_finetune', 'casvit_xs_384_finetune', {'model'}),
    ('mlla_b_imagenet', 'mlla_s_imagenet', {'model', 'drop_path', 'mesa'})])
def test_variants_change_only_the_stated_settings(name, base, expected):
    mine, others = (parse(recipe).to_dict() for recipe in (name, base))
    assert {key for key in mine if mine[key] != others[key]} == expected


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / 'mine.yaml').write_text('base: care_s1_imagenet\nlr: 1e-3\n', encoding='utf-8')
    config = parse(tmp_path / 'mine.yaml', '--epochs', 50)
    assert (config.model, config.lr, config.epochs, config.batch_size) == ('care_s1', 1e-3, 50, 1536)
    mine = tmp_path / 'loop.yaml'
    mine.write_text(f'base: {mine}\n', encoding='utf-8')
    with pytest.raises(ConfigError, match='leads back to itself'):
        read_recipe(str(mine))


# The comparison systems -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('model', CASVIT)
def test_the_recipe_of_casvit(model):
    v1, v2, _ = CASVIT[model]
    name = f'{model}_imagenet'
    check(name, f'top-1     {v1} % (v1 of the paper), {v2} % (v2', dict(
        LONG, model=model, model_args={}, batch_size=2048, device_batch=128, lr=6e-3, min_lr=1e-6, warmup_lr=0.,
        cooldown_epochs=0, step_schedule=True, amp='fp16', clip_grad=None, ema=True, ema_decay=0.9995,
        train_img_sizes=[160, 192, 224, 256, 288, 320], val_img_size=224, crop_mode=None, interpolation='bicubic',
        random_erasing=0., mixup=0., cutmix=0., drop_path=0.1, teacher='none', mesa=0., seed=43))
    check(name, 'not measured again', {})
    check(name, 'epartures', {})


def test_every_size_of_casvit_makes_the_same_step_with_no_more_pixels_at_a_time():
    for name, most in (('casvit_xs_imagenet', 128 * 224 ** 2), ('casvit_xs_384_finetune', 64 * 384 ** 2)):
        config = parse(name)
        for world_size in (1, 4, 8):
            for size, (images, passes) in zip(
                    config.list_sizes(), config.split_steps(world_size), strict=True):
                assert images * passes * world_size == config.batch_size and images * size ** 2 <= most


@pytest.mark.parametrize('model', CASVIT)
def test_the_recipe_of_casvit_at_384(model):
    _, v2, at_384 = CASVIT[model]
    gain = float(at_384) - float(v2)
    config = check(f'{model}_384_finetune', f'top-1     {at_384} % at 384 (v2), {gain:.1f} above the {v2} at 224', dict(
        model=model, epochs=30, warmup_epochs=0, lr=5e-5, min_lr=5e-5, drop_path=0., ema=True, ema_decay=0.9995,
        img_size=384, val_img_size=384, train_img_sizes=[160, 192, 256, 288, 320, 384], crop_pct=1., crop_mode='squash',
        device_batch=64, weight_decay=0.05, amp='fp16', mixup=0., cutmix=0.))
    assert rates(config, (0, 1, 15, 29)) == (30, [5e-5] * 4)


@pytest.mark.parametrize('model', MLLA)
def test_the_recipe_of_mlla(model):
    top1, drop_path, mesa, batch, per_device, lr, ema_decay = MLLA[model]
    config = check(f'{model}_imagenet', f'top-1     {top1} % with MESA, published at 224; not measured again', dict(
        LONG, model=model, model_args={}, batch_size=batch, device_batch=per_device, lr=lr, step_schedule=True,
        amp='fp16', clip_grad=5., clip_mode='norm', ema=True, ema_decay=ema_decay, train_img_sizes=[],
        random_erasing=0.25, mixup=0.8, cutmix=1.0, drop_path=drop_path, teacher='none', mesa=mesa, mesa_epoch=75))
    assert [config.lr, config.warmup_lr, config.min_lr] == pytest.approx(
        [5e-4 * batch / 512, 5e-7 * batch / 512, 5e-6 * batch / 512])
    assert config.ema_decay == pytest.approx(0.9996 ** (batch / 4096), abs=1e-6)
    assert config.split_steps(8) == [(per_device, 1)]


@pytest.mark.parametrize('name, expected', [
    ('casvit_xs_imagenet', [0., 3e-4, 5.7e-3, 5.93445373e-3, 3.0005e-3, 1.16446449e-6]),
    ('mlla_t_imagenet', [1e-6, 5.095e-5, 9.5005e-4, 9.89183062e-4, 5.05e-4, 1.00271412e-5])])
def test_the_rates_of_the_comparison_systems(name, expected):
    """Linear to the peak in 20 epochs, then the cosine from its value there, changed every step."""
    assert rates(parse(name), (0, 1, 19, 20, 150, 299))[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_recipes_of_cifar_are_for_every_model(name):
    config = check(name, '--dataset-download', dict(
        dataset=f'torch/{name}', data=f'data/{name}', model_args={}, drop_path=0., checkpoint=''))
    assert check(name, 'starting values', {}) == config
