"""--pretrained of every command: the published weights from the hub, or from its cache, and one line without either."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import publish
from hub_stand_in import HubStandIn
from photos import FRUIT
from reference import published_state_dict
from timm.data import ImageNetInfo

from caretrans.checkpoint import read_checkpoint
from caretrans.errors import ConfigError
from caretrans.flags import check_weights

pytestmark = pytest.mark.slow
IMAGES = sorted((FRUIT / 'val').glob('*/*.jpg'))[::60]
SIZE = ['--img-size', '64']
SOURCE = 'published weights care_s0.in1k (YuanZ1995/CARE-Transformer/CARETrans_S0.pth.tar)'


def environment(endpoint, home, **more):
    found = dict(
        os.environ, HF_HOME=str(home), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1', OMP_NUM_THREADS='1', **more)
    return {name: value for name, value in found.items() if name != 'HF_HUB_OFFLINE' or name in more}


def run_all(commands, env):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('hub_commands.py')], env=env, capture_output=True, text=True,
        input=json.dumps([[str(part) for part in command] for command in commands]), timeout=600, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two classes of ImageNet, with a training split too."""
    folder = tmp_path_factory.mktemp('data')
    for i, image in enumerate(IMAGES):
        for split in ('train', 'val'):
            path = folder / split / ImageNetInfo().label_names()[(2, 7)[i % 2]] / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(image.resolve())
    return folder


@pytest.fixture(scope='module')
def outcomes(data, tmp_path_factory):
    """{name: (code, stdout, stderr)} of the commands with the hub, then from its cache without it; and the folder.

    Among those without it are the `REFUSED`.
    """
    folder = tmp_path_factory.mktemp('out')
    weights = folder / 'CARETrans_S0.pth.tar'
    torch.save(published_state_dict('care_s0'), weights)
    taken = ['--pretrained', '--model', 'care_s0']
    given = ['--checkpoint', weights]
    small = ['--img-size', '32', '--val-img-size', '32', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '4',
             '--workers', '0', '--device', 'cpu', '--lr', '1e-12', '--min-lr', '0', '--warmup-lr', '0']
    options, cpu = [*SIZE, '--json'], ['--device', 'cpu']
    commands = {
        'export': ['coreml/export.py', *taken, *options, '--format', 'torch', '--images', '4', '--no-latency',
                   '--output-dir', folder / 'export'],
        'accuracy': ['benchmark.py', *taken, *options, *cpu, '--bench', 'accuracy', '--data', data, '--backend',
                     'eager', '--output', folder / 'accuracy']}
    for kind, flags in (('file', given), ('hub', taken)):
        commands.update({
            f'predict {kind}': ['-m', 'caretrans', 'predict', IMAGES[0], *flags, *options, *cpu],
            f'validate {kind}': ['validate.py', *flags, *options, *cpu, data, '--workers', '0']})
    commands['train hub'] = ['train.py', data, *taken, *small, '--output', folder / 'run']
    commands['other model'] = ['validate.py', '--pretrained', '--model', 'care_s1', data]
    with HubStandIn() as hub:
        hub.repos['YuanZ1995/CARE-Transformer'] = {weights.name: weights.read_bytes()}
        found = dict(zip(commands, run_all(commands.values(), environment(hub.endpoint, folder / 'home')), strict=True))
    offline = {'cache': commands['validate hub'], 'no cache': commands['other model'],
               'no cache of a model of timm': [
                   '-m', 'caretrans', 'predict', IMAGES[0], '--pretrained', '--model', 'resnet10t'],
               'no cache for training': [
                   'train.py', data, '--pretrained', '--model', 'care_s2', *small, '--output', folder / 'none']}
    offline.update({' '.join(flags): flags for flags, _ in REFUSED})
    found.update(zip(offline, run_all(offline.values(), environment(
        'http://127.0.0.1:9', folder / 'home', HF_HUB_OFFLINE='1')), strict=True))
    return found, folder


def read(outcomes, name):
    code, out, err = outcomes[0][name]
    assert code == 0, out + err
    return json.loads(out), err


@pytest.mark.parametrize('command', ['predict', 'validate'])
def test_published_weights_give_the_results_of_their_file(outcomes, command):
    (taken, said), (given, _) = read(outcomes, f'{command} hub'), read(outcomes, f'{command} file')
    assert f'Loaded care_s0 with {SOURCE}' in said
    if command == 'predict':
        assert taken == given and taken['labels'][0] < 1000
    else:
        same = ('top1', 'top5', 'loss', 'images', 'subset', 'eval_config')
        assert [taken[key] for key in same] == [given[key] for key in same]
        assert taken['checkpoint'] == SOURCE and taken['images'] == len(IMAGES) and taken['subset']['classes'] == 2


def test_the_accuracy_bench_takes_published_weights(outcomes):
    (record,), result = read(outcomes, 'accuracy')[0]['accuracy'], read(outcomes, 'validate file')[0]
    assert (record['top1'], record['checkpoint']) == (result['top1'], SOURCE)
    assert record['loss'] == pytest.approx(result['loss'], rel=1e-5)


def test_exports_take_published_weights(outcomes):
    result, said = read(outcomes, 'export')
    assert f'Loaded care_s0 with {SOURCE}' in said and result['weights'] == SOURCE and result['sha256'] == ''
    program, = result['programs']
    assert program['verification']['top1_agreement'] == 100 and not program['failure']


def test_training_starts_from_published_weights_with_fresh_heads(outcomes):
    code, out, err = outcomes[0]['train hub']
    assert code == 0, out + err
    assert f'Loaded care_s0 with {SOURCE}' in err and 'The heads of care_s0 are fresh: train them' in err
    found = publish(read_checkpoint(outcomes[1] / 'run' / 'last.pth.tar').state_dict)
    parameters = [key for key, value in published_state_dict('care_s0').items()
                  if value.is_floating_point() and 'running' not in key and 'head' not in key]
    assert len(parameters) > 100 and found['head.fc.weight'].shape[0] == 2
    for key in parameters:
        assert torch.allclose(found[key], published_state_dict('care_s0')[key], atol=1e-6), key


def test_weights_are_taken_from_the_cache_without_a_network(outcomes):
    cached, said = read(outcomes, 'cache')
    assert f'Loaded care_s0 with {SOURCE}' in said
    assert {**cached, 'seconds': 0, 'images_per_s': 0} == {
        **read(outcomes, 'validate hub')[0], 'seconds': 0, 'images_per_s': 0}


@pytest.mark.parametrize('name, model, remedy', [
    ('other model', 'care_s1', 'Download the file by hand'), ('no cache', 'care_s1', 'Download the file by hand'),
    ('no cache for training', 'care_s2', 'Download the file by hand'),
    ('no cache of a model of timm', 'resnet10t', '')])
def test_without_weights_one_line_names_the_remedy(outcomes, name, model, remedy):
    code, out, err = outcomes[0][name]
    assert code == 2 and out == '' and err.count('\n') == 1, err
    assert re.match(rf'\S+( predict)?: The weights of {model} could not be downloaded \(', err) and remedy in err
    assert err.endswith('use a downloaded file with --checkpoint instead of --pretrained.\n')


REFUSED = [
    (['validate.py'], 'No weights: --checkpoint FILE loads a file, --pretrained --model NAME the published weights of'),
    (['-m', 'caretrans', 'predict', 'x.jpg'], 'No weights: --checkpoint FILE loads a file, --pretrained'),
    (['benchmark.py', '--bench', 'accuracy'], 'No weights: --checkpoint FILE loads a file, --pretrained'),
    (['coreml/export.py'], 'and --random-weights makes random ones to measure speed.'),
    (['-m', 'caretrans', 'predict', 'x.jpg', '--pretrained', '--checkpoint', 'x.pth'], 'exclude each other: use one'),
    (['validate.py', '--pretrained', 'data/fruit14'], '--pretrained needs a model: add --model'),
    (['validate.py', 'x.pth', 'a', 'b'], 'a b: name one folder of data.'),
    (['validate.py', '--checkpoint', 'x.pth', '--pretrained'], '--checkpoint and --pretrained exclude each other'),
    (['validate.py', '--pretrained', '--model', 'care_s0', '--entry', 'model'], '--entry model is for a file'),
    (['validate.py', '--pretrained', '--model', 'care_s9'], "No model 'care_s9' with published weights"),
    (['benchmark.py', '--pretrained'], '--pretrained with --bench infer: it is for --bench accuracy')]


@pytest.mark.parametrize('flags, message', REFUSED)
def test_commands_say_what_the_kinds_of_weights_are(outcomes, flags, message):
    code, out, err = outcomes[0][' '.join(flags)]
    assert code == 2 and out == '' and err.count('\n') == 1 and message in err, err


def test_kinds_of_weights_exclude_each_other():
    check_weights('x.pth', False, None)
    check_weights('', True, 'care_s0')
    check_weights('', False, 'care_s0', random_weights=True)
    with pytest.raises(ConfigError, match='--checkpoint and --pretrained and --random-weights exclude each other'):
        check_weights('x.pth', True, 'care_s0', random_weights=True)
    with pytest.raises(ConfigError, match='the published weights of a model.$'):
        check_weights('', False, 'care_s0')
