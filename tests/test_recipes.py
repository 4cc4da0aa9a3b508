"""The bundled recipes: the settings of the paper, their learning rates, and a header that says what they are."""
import re
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2

from caretrans.config import ConfigError, TrainConfig, parse_train_config, read_recipe
from caretrans.training import build_schedule

RECIPES = Path(__file__).parent.parent / 'caretrans' / 'recipes'
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
    """Linear from 1e-6 to where the cosine is after 20 epochs, the cosine to 1e-5 at 300, then 10 epochs of that."""
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
