"""Settings: defaults, then the recipe, then flags; and the refusal of what cannot work."""
import re
from argparse import ArgumentTypeError
from dataclasses import fields

import pytest

from caretrans.config import TrainConfig, derive_batches, number, parse_train_config
from caretrans.errors import ConfigError


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('lr: 3e-4\nepochs: 7\nmodel_args: {ls_init_value: 0.1, ablation: stacked}\n', encoding='utf-8')
    config = parse_train_config(
        ['photos', '--recipe', str(recipe), '--epochs', '9', '--no-dataset-download', '--scale', '0.5', '1',
         '--model-args', 'ablation=no_inter1'])
    assert (config.data, config.lr, config.epochs, config.scale) == ('photos', 3e-4, 9, [0.5, 1.0])
    assert config.model_args == {'ls_init_value': 0.1, 'ablation': 'no_inter1'}
    assert config.opt == TrainConfig().opt and config.dataset_download is False


def test_model_args_of_a_recipe_apply_only_to_its_family(caplog):
    def parse(model, *flags):
        return parse_train_config(['--recipe', 'care_s0_fruit14', '--model', model, *flags]).model_args

    caplog.set_level('INFO', 'caretrans')
    assert parse('care_s1') == {'ls_init_value': 0.1} and not caplog.messages
    assert parse('rcvit_xs', '--model-args', 'drop_rate=0.1') == {'drop_rate': 0.1}
    assert caplog.messages == [
        'rcvit_xs ignores ls_init_value=0.1 of the recipe care_s0_fruit14, which is for the family of care_s0.']
    assert parse('mlla_t', '--model-args', 'ls_init_value=0.1') == {'ls_init_value': 0.1}  # asked for by name


@pytest.mark.parametrize('text, message', [
    ('epoch: 3', "unknown setting 'epoch', did you mean 'epochs'"),
    ('epochs: many', "epochs is 'many' but must be of type int"),
    ('epochs: 2.5', 'epochs is 2.5 but must be of type int'),
    ('channels_last: "yes"', "channels_last is 'yes' but must be of type bool"),
    ('scale: 0.5', 'scale is 0.5 but must be 2 numbers'),
    ('scale: [0.5, 0.1]', 'two positive numbers, smaller first'),
    ('amp: fp8', 'choose from off, bf16, fp16'),
    ('batch_size: 0', 'batch_size is 0 but must be at least 1'),
    ('img_size: 16', 'img_size is 16 but must be at least 32'),
    ('drop: 1.5', 'drop is 1.5 but must be at least 0, at most 0.99'),
    ('lr: 0', 'lr is 0.0 but must be positive'),
    ('interpolation: nonsense', 'choose from random, bilinear, bicubic'),
    ('epochs: 5\nwarmup_epochs: 5', 'warmup_epochs=5 must be below epochs=5'),
    ('teacher_checkpoint: file.pth', 'name its model with --teacher'),
    ('mesa: 1.5', 'mesa=1.5 learns from the averaged weights: add --ema'),
    ('mesa: 1.5\nema: true\nteacher: regnety_002', 'mesa=1.5 and teacher=regnety_002 exclude each other'),
    ('mesa: 1.5\nema: true\nloss: bce', 'mesa=1.5 is a cross entropy, but loss=bce'),
    ('mesa: 1.5\nema: true\nepochs: 10\nmesa_start: 1', 'mesa_start=1 of 10 epochs leaves no epochs for mesa'),
    ('mesa: -1', 'mesa is -1 but must be at least 0'),
    ('mesa_start: 0', 'mesa_start=0, but mesa=0: set --mesa as well'),
    ('- a list', 'must hold "name: value" lines'),
    ('a: b: c', 'is not YAML'),
])
def test_settings_that_cannot_work_are_refused(tmp_path, text, message):
    (tmp_path / 'bad.yaml').write_text(text, encoding='utf-8')
    with pytest.raises(ConfigError, match=message) as error:
        parse_train_config(['--recipe', str(tmp_path / 'bad.yaml')])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, name, expected', [
    ('amp: off', 'amp', 'off'), ('amp: no', 'amp', 'off'), ('amp:', 'amp', 'off'), ('amp: bf16', 'amp', 'bf16'),
    ('auto_augment: no', 'auto_augment', ''), ('auto_augment: none', 'auto_augment', ''),
    ('auto_augment: null', 'auto_augment', ''), ('teacher: off', 'teacher', 'none'), ('mixup: off', 'mixup', 0.),
    ('clip_grad: no', 'clip_grad', None), ('clip_grad: 0.5', 'clip_grad', 0.5), ('hflip: 0', 'hflip', 0.),
    ('save_steps: none', 'save_steps', 0), ('lr: "0.002"', 'lr', 0.002), ('lr: 2e-3', 'lr', 0.002),
    ('epochs: 1e2', 'epochs', 100), ('epochs: "30"', 'epochs', 30), ('epochs: 30.0', 'epochs', 30),
    ('train_img_sizes: 160', 'train_img_sizes', [160]), ('train_img_sizes: off', 'train_img_sizes', []),
    ('model_args:', 'model_args', {}), ('output: 2026-11-29', 'output', '2026-11-29'), ('ema: on', 'ema', True),
    ('base: no\nlr: 0.5', 'lr', 0.5), ('data: 7', 'data', '7'),
])
def test_values_of_yaml_mean_what_a_person_means(tmp_path, text, name, expected):
    (tmp_path / 'mine.yaml').write_text(text, encoding='utf-8')
    found = getattr(parse_train_config(['--recipe', str(tmp_path / 'mine.yaml')]), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize('text, message', [
    ('lr: .nan', 'lr is nan but must be a finite number'), ('mixup: .inf', 'mixup is inf but must be a finite number'),
    ('clip_grad: 0', 'clip_grad is 0.0 but must be positive'),
    ('clip_grad: -.inf', 'clip_grad is -inf but must be a finite number'),
    ('scale: [0.1, .nan]', 'scale is nan but must be'), ('lr: "nan"', 'lr is nan but must be a finite number'),
    ('epochs: .inf', 'epochs is inf but must be of type int'),
    ('epochs: .nan', 'epochs is nan but must be of type int'),
    ('model_args: {ls_init_value: .nan}', 'model_args.ls_init_value is nan but must be a finite number'),
    ('model_args: {depths: [1, .inf]}', 'model_args.depths.1 is inf but must be a finite number'),
    ('epochs: true', 'epochs is True but must be of type int: write a whole number'),
    ('lr: yes', 'lr is True but must be of type float: write a number'),
    ('mixup: on', 'mixup is True but must be of type float'), ('lr: off', 'lr is False but must be of type float'),
    ('lr:', 'lr is None but must be of type float'), ('lr: 1,5e-3', "lr is '1,5e-3' but must be of type float"),
    ('epochs: ten', "epochs is 'ten' but must be of type int"), ('epochs: [5]', r'epochs is \[5\] but must be of type'),
    ('model: on', 'model is True but must be of type str: write one text, in quotes'),
    ('opt: [adamw]', 'but must be of type str'), ('crop_mode: no', 'crop_mode is False but must be of type str'),
    ('ema: 1', 'ema is 1 but must be of type bool: write true or false'),
    ('model_args: ls_init_value=0.1', "model_args is 'ls_init_value=0.1' but must be of type dict: write {NAME: VALUE"),
    ('model_args: [depths]', r"model_args is \['depths'\] but must be of type dict"),
    ('ratio: [3:4, 4:3]', 'ratio is 184 but must be at least 0, at most 100'),
    ('scale: [0.5, 2]', 'scale is 2 but must be at least 0, at most 1'),
    ('lr: 1\nlr: 2', 'bad.yaml: lr is in line 1 and again in line 2: keep one'),
    ('output: 2026-13-45', 'is not YAML'), ('epochs: 1e400', "epochs is '1e400' but must be of type int"),
])
def test_what_a_recipe_cannot_mean_is_refused_with_file_and_key(tmp_path, text, message):
    (tmp_path / 'bad.yaml').write_text(text, encoding='utf-8')
    with pytest.raises(ConfigError, match=message) as error:
        parse_train_config(['--recipe', str(tmp_path / 'bad.yaml'), '--model', 'casvit_xs'])
    assert str(error.value).startswith(f'{tmp_path}/bad.yaml') and '\n' not in str(error.value)


def test_the_file_of_a_base_is_named(tmp_path):
    (tmp_path / 'base.yaml').write_text('epochs: true', encoding='utf-8')
    (tmp_path / 'mine.yaml').write_text(f'base: {tmp_path}/base.yaml\nlr: 1', encoding='utf-8')
    with pytest.raises(ConfigError, match=f'^{tmp_path}/base.yaml: epochs is True'):
        parse_train_config(['--recipe', str(tmp_path / 'mine.yaml')])


FLOATS = [item.name for item in fields(TrainConfig) if 'float' in str(item.type)]


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
@pytest.mark.parametrize('name', FLOATS)
def test_every_flag_of_a_number_refuses_what_is_not_finite(name, value):
    flag = f'--{name.replace("_", "-")}'
    values = ['0.5', value] if name in ('scale', 'ratio') else [value]
    with pytest.raises(ConfigError, match=f'^{name} is {value} but must be a finite number'):
        parse_train_config([flag, values[0], *values[1:]] if value[0] != '-' else [f'{flag}={value}'] if len(
            values) == 1 else [flag, '0.5', ' -inf'])


@pytest.mark.parametrize('flags, warmup', [
    (['--epochs', '1'], 0), (['--epochs', '5'], 2), (['--epochs', '6'], 5),
    (['--recipe', 'care_s0_fruit14', '--epochs', '2'], 1), (['--recipe', 'care_s0_fruit14', '--epochs', '3'], 2)])
def test_few_epochs_shorten_the_warm_up_that_nobody_named(flags, warmup, caplog):
    caplog.set_level('INFO')
    config = parse_train_config(flags)
    assert config.warmup_epochs == warmup < config.epochs
    assert (f'warmup_epochs is {warmup} instead of' in caplog.text) == (warmup in (0, 1) or flags[1] == '5')
    with pytest.raises(ConfigError, match='must be below epochs=1: set --warmup-epochs as well'):
        parse_train_config(['--epochs', '1', '--warmup-epochs', '1'])


def test_shared_number_flags_refuse_what_is_not_finite():
    for text in ('nan', 'inf'):
        with pytest.raises(ArgumentTypeError, match=f'{text} is not a finite number of at least 0.01'):
            number(float, 0.01)(text)


@pytest.mark.parametrize('argv, message', [
    (['--recipe', 'care_s9'], "No recipe 'care_s9': .*care_s0_fruit14"), (['a', '--data', 'b'], 'Two data folders'),
    (['--model-args', 'width'], "'width' is not NAME=VALUE; see --help"),
    (['--model-args', 'depths=[1,1'], r"'depths=\[1,1': '\[1,1' is not a value: write it as in YAML"),
    (['--model-args', 'a={b'], 'is not a value'), (['--model-args', '=3'], "'=3' is not NAME=VALUE"),
    (['--model-args', 'a=2026-13-45'], 'is not a value'), (['--model-args', 'a=.nan'], 'model_args.a is nan but must'),
    (['--epoch', 'x'], 'invalid int value')])
def test_command_lines_that_cannot_work_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_train_config(argv)


@pytest.mark.parametrize('batch_size, world_size, device_batch, even, expected', [
    (1536, 1, None, False, (1536, 1)), (1536, 12, 128, True, (128, 1)), (1536, 1, 128, True, (128, 12)),
    (1536, 4, 96, True, (96, 4)), (1536, 8, 128, True, (96, 2)), (1000, 1, 128, False, (125, 8)),
    (1000, 1, 130, True, (100, 10)), (7, 1, None, False, (7, 1)),
])
def test_the_global_batch_is_split_over_devices_and_time(batch_size, world_size, device_batch, even, expected):
    images, passes = derive_batches(batch_size, world_size, device_batch, even)
    assert (images, passes) == expected and images * passes * world_size == batch_size


@pytest.mark.parametrize('arguments, message', [
    ((1536, 5, 128), 'batch_size=1536 cannot .* 5 device.* use 1530 or 1540'),
    ((1536, 5, 128, True), 'cannot be shared equally by 5 devices: use 1530 or 1560'),
    ((31, 1, 8), 'use 30 or 32'),
    ((5, 1, None, True), 'an even number for mixup and cutmix: use 4 or 6'),
    ((2, 4, None), 'use 4'),
])
def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest_that_can(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        derive_batches(*arguments)
    for near in re.search(r'use ([\d or]+),', str(error.value))[1].split(' or '):
        assert derive_batches(int(near), *arguments[1:])


def test_larger_sizes_take_no_more_pixels_at_a_time():
    config = TrainConfig(batch_size=256, device_batch=64, img_size=224, train_img_sizes=[160, 224, 320])
    splits = config.split_steps(2)
    assert splits == [(64, 2), (64, 2), (16, 8)]
    for (images, passes), size in zip(splits, config.train_img_sizes, strict=True):
        assert images * passes * 2 == 256 and images * size ** 2 <= 64 * 224 ** 2


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(8)))
    assert TrainConfig().workers == 8
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert TrainConfig().workers == 2
