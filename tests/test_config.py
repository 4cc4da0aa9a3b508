"""Settings: defaults, then the recipe, then flags; and the refusal of what cannot work."""
import re

import pytest

from caretrans.config import TrainConfig, derive_batches, parse_train_config
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


@pytest.mark.parametrize('argv, message', [
    (['--recipe', 'care_s9'], "No recipe 'care_s9': .*care_s0_fruit14"), (['a', '--data', 'b'], 'Two data folders'),
    (['--model-args', 'width'], "'width' is not NAME=VALUE; see --help"), (['--epoch', 'x'], 'invalid int value')])
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
    for number in re.search(r'use ([\d or]+),', str(error.value))[1].split(' or '):
        assert derive_batches(int(number), *arguments[1:])


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
