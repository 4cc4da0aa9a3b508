"""timm's own loaders read published files and ours: factories, files, folders and hubs."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_stand_in import HubStandIn
from reference import published_model, published_state_dict
from timm.models import load_checkpoint as timm_load_checkpoint
from timm.models import save_for_hf

from caretrans.checkpoint import convert_checkpoint, create_from_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def expected():
    """care_s0 with the published weights."""
    return published_model('care_s0')


@pytest.fixture(scope='module')
def files(tmp_path_factory, expected):
    """The same weights in every layout and format: {kind: file}."""
    folder = tmp_path_factory.mktemp('files')
    files = {kind: folder / f'{kind}.pth.tar' for kind in ('published', 'wrapped', 'parallel', 'ours', 'saved')}
    published = published_state_dict('care_s0')
    torch.save(published, files['published'])
    torch.save(dict(model=published, epoch=3), files['wrapped'])
    torch.save(dict(state_dict={f'module.{key}': value for key, value in published.items()}), files['parallel'])
    torch.save(expected.state_dict(), files['ours'])
    save_checkpoint(files['saved'], expected, arch='care_s0')
    for kind, layout in (('published', 'published'), ('ours', 'caretrans')):
        files[f'{kind} safetensors'] = folder / f'{kind}.safetensors'
        convert_checkpoint(files['published'], files[f'{kind} safetensors'], layout)
    return files


KINDS = ['published', 'wrapped', 'parallel', 'ours', 'saved', 'published safetensors', 'ours safetensors']


def same(model, expected, *parts):
    """Whether all tensors, or those whose keys begin with one of `parts`, are equal."""
    a, b = model.state_dict(), expected.state_dict()
    keys = [key for key in b if key.startswith(parts or ('',))]
    return bool(keys) and all(torch.equal(a[key], b[key]) for key in keys)


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_loads_a_file(files, expected, kind):
    overlay = dict(file=files[kind])
    assert same(timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=overlay), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_checkpoint_path_loads_a_file(files, expected, kind):
    assert same(timm.create_model('care_s0', checkpoint_path=files[kind]), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_load_checkpoint_of_timm_loads_a_file(files, expected, kind):
    model = timm.create_model('care_s0')
    timm_load_checkpoint(model, files[kind])  # as validate.py --checkpoint and train.py --initial-checkpoint do
    assert same(model, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_keeps_fresh_classifiers_for_other_classes(files, expected, kind):
    model = timm.create_model(
        'care_s0', pretrained=True, pretrained_cfg_overlay=dict(file=files[kind]), num_classes=14)
    assert same(model, expected, 'stem', 'stages')
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 14)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.fc.bias.any() and not model.head_dist.fc.bias.any()


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_adapts_the_image_channels(files, expected, kind):
    model = timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=dict(file=files[kind]), in_chans=1)
    assert torch.equal(model.stem.conv.weight, expected.stem.conv.weight.sum(dim=1, keepdim=True))
    assert same(model, expected, 'stem.conv.bias', 'stem.norm', 'stages', 'head')


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_features_are_those_of_the_network(files, expected, kind):
    model = timm.create_model(
        'care_s0', pretrained=True, pretrained_cfg_overlay=dict(file=files[kind]), features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = expected.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(x), maps, strict=True))


def test_number_of_classes_of_a_file_can_be_stated(tmp_path):
    source = timm.create_model('care_s0', num_classes=14)
    save_checkpoint(tmp_path / 'x.pth', source, arch='care_s0')
    overlay = dict(file=tmp_path / 'x.pth', num_classes=14)
    assert same(timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=overlay), source)


@pytest.mark.parametrize('changed', [dict(num_classes=14), dict(features_only=True), {}])
@pytest.mark.parametrize('contents', [
    dict(net=dict(published_state_dict('care_s0'))), dict(weight=torch.ones(2)), published_state_dict('care_s1')])
def test_weights_that_do_not_fit_are_never_skipped(tmp_path, contents, changed):
    torch.save(contents, tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match='care_s0|CareTransformer'):
        timm.create_model(
            'care_s0', pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'x.pth'), **changed)


def test_missing_file_is_named():
    with pytest.raises(RuntimeError, match=r'No weights for care_s0: .*nowhere\.pth'):
        timm.create_model('care_s0', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))


def test_error_without_network_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='No weights for care_s2') as caught:
        timm.create_model('care_s2', pretrained=True, cache_dir=tmp_path)
    assert_tells_what_to_do(str(caught.value), 'CARETrans_S2.pth.tar')


# Folders --------------------------------------------------------------------------------------------------------------

def test_model_saved_for_the_hub_loads_from_its_folder(tmp_path):
    saved = timm.create_model('care_s0', num_classes=14, in_chans=1, ablation='no_inter1').eval()
    names = [f'fruit{i}' for i in range(14)]
    save_for_hf(saved, tmp_path, model_config=dict(label_names=names), safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {'model.safetensors', 'config.json'}
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(loaded(x), saved(x)) and loaded.pretrained_cfg['label_names'] == names
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)
    assert other.num_classes == 3 and same(other, saved, 'stem', 'stages')
    model, _ = create_from_checkpoint(tmp_path / 'model.safetensors', 'care_s0', ablation='no_inter1')
    assert same(model, saved)


@pytest.mark.parametrize('kind', KINDS)
def test_folder_loads_with_any_layout_of_the_weights(tmp_path, files, expected, kind):
    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture='care_s0', pretrained_cfg={})), encoding='utf-8')
    (tmp_path / files[kind].name).symlink_to(files[kind])
    assert same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), expected)


# The hub --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def hub(files, tmp_path_factory):
    """The stand-in after hub_client.py, with the outcomes of its steps."""
    config = json.dumps(dict(architecture='care_s0', pretrained_cfg=dict(hf_hub_filename='weights.pth.tar'))).encode()
    home = tmp_path_factory.mktemp('home')
    environment = dict(
        os.environ, HF_HOME=str(home), HF_TOKEN='stand-in', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1', OMP_NUM_THREADS='1')
    environment.pop('HF_HUB_OFFLINE', None)
    with HubStandIn() as stand_in:
        stand_in.repos['YuanZ1995/CARE-Transformer'] = {'CARETrans_S0.pth.tar': files['published'].read_bytes()}
        stand_in.repos['someone/wrapped'] = {'best.pth.tar': files['parallel'].read_bytes()}
        stand_in.repos['someone/published'] = {'config.json': config, 'weights.pth.tar': files['wrapped'].read_bytes()}
        process = subprocess.run(
            [sys.executable, Path(__file__).with_name('hub_client.py')], capture_output=True, text=True, timeout=120,
            env=dict(environment, HF_ENDPOINT=stand_in.endpoint), encoding='utf-8')
    assert process.returncode == 0, process.stderr
    stand_in.outcomes = json.loads(process.stdout.splitlines()[-1])
    stand_in.stderr = process.stderr
    return stand_in


@pytest.mark.parametrize('step', [
    'load_published', 'load_published_for_other_classes', 'load_wrapped', 'push_and_load',
    'load_pushed_for_other_classes', 'load_pushed_features', 'load_published_from_a_hub_model'])
def test_hub_serves_models(hub, step):
    assert hub.outcomes[step] is True


def test_published_file_is_fetched_from_the_repository_of_the_authors(hub):
    assert 'HEAD /YuanZ1995/CARE-Transformer/resolve/main/CARETrans_S0.pth.tar' in hub.requests
    assert 'GET /YuanZ1995/CARE-Transformer/resolve/main/CARETrans_S0.pth.tar' in hub.requests


def test_pushed_models_contain_safetensors_and_configuration(hub):
    pushed = hub.repos['me/care-fruit']
    assert {'model.safetensors', 'config.json', 'README.md'} <= set(pushed)
    config = json.loads(pushed['config.json'])
    assert (config['architecture'], config['num_classes']) == ('care_s0', 14)
    assert 'hf_hub_filename' not in config['pretrained_cfg'], 'or timm would look for the file of the authors'
    assert 'GET /me/care-fruit/resolve/main/model.safetensors' in hub.requests
    assert not any(request.endswith('/me/care-fruit/resolve/main/pytorch_model.bin') for request in hub.requests)


def assert_tells_what_to_do(message, file):
    for part in ('YuanZ1995/CARE-Transformer', file, 'could not be checked', 'Download the file by hand',
                 f'pretrained_cfg_overlay=dict(file="{file}")'):
        assert part in message


def test_error_of_a_missing_hub_file_names_the_remedy(hub):
    message = hub.outcomes['load_missing_file']
    assert re.match(r'RuntimeError: No weights for care_s1: \w*EntryNotFoundError: 404 ', message)
    assert_tells_what_to_do(message, 'CARETrans_S1.pth.tar')


def test_error_of_a_missing_repository_names_the_remedy(hub):
    message = hub.outcomes['load_missing_repository']
    assert message.startswith('RuntimeError: No weights for care_s0: RepositoryNotFoundError: 401 ')
    assert 'nobody/nothing' in message
    assert_tells_what_to_do(message, 'CARETrans_S0.pth.tar')
