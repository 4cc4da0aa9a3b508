"""The folder of the page, its manifest and its server, without a browser."""
import dataclasses
import hashlib
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import LITERT_CHECKPOINT, LITERT_DATA, SIDE, serving, write_export_script

from caretrans.__main__ import main
from caretrans.data import EvalTransform
from caretrans.errors import CheckpointError, ConfigError, ExportError
from caretrans.evaluation import load_for_evaluation
from caretrans.export.phone_results import NAMES
from caretrans.page import litert, server, vendor
from caretrans.page.build import CROP_MODES, WEB, WEB_FILES, build_page, load_source, name_checkpoint
from caretrans.page.config import MODELS, PageConfig, ServerConfig
from caretrans.runtimes.onnx import INPUT, make_session


@pytest.fixture(scope='module')
def manifest(built):
    return json.loads((built / 'manifest.json').read_text(encoding='utf-8'))


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder that the server takes for a page."""
    folder = tmp_path / 'page'
    folder.mkdir()
    for name in ('index.html', 'page.js', 'manifest.json', 'program.wasm'):
        (folder / name).write_text(name, encoding='utf-8')
    (tmp_path / 'secret.txt').write_text('beside the page', encoding='utf-8')
    return folder


@pytest.mark.slow
def test_every_file_has_the_size_and_hash_of_the_manifest(built, manifest):
    listed = {runtime['folder'] + name: facts for runtime in manifest['runtimes'].values()
              for name, facts in runtime['files'].items()}
    listed.update({item['file']: item for program in manifest['programs'] for item in program['files'].values()})
    for name, facts in listed.items():
        content = (built / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (facts['bytes'], facts['sha256']), name
    assert {str(path.relative_to(built)) for path in built.rglob('*') if path.is_file()} == {
        *listed, *manifest['images'], *WEB_FILES, 'manifest.json', '_headers'}
    assert list(manifest['runtimes']) == ['onnxruntime']
    licence = built / manifest['runtimes']['onnxruntime']['folder'] / 'LICENSE.txt'
    assert 'Microsoft' in licence.read_text(encoding='utf-8')


@pytest.mark.slow
def test_litert_has_a_program_a_runtime_and_its_licence(built_litert, shared):
    manifest = json.loads((built_litert / 'manifest.json').read_text(encoding='utf-8'))
    files = manifest['programs'][0]['files']
    assert {name: (item['format'], item['form']) for name, item in files.items()} == {
        'onnxruntime': ('onnx', 'fused'), 'litert': ('litert', 'bmm')}
    assert (built_litert / files['litert']['file']).read_bytes() == (LITERT_DATA / 'tiny.tflite').read_bytes()
    assert 0 < files['litert']['error'] < 1e-5
    runtime = manifest['runtimes']['litert']
    assert runtime['name'].startswith('LiteRT.js 2') and runtime['licence'] == 'Apache-2.0'
    folder = built_litert / runtime['folder']
    assert 'Apache License' in (folder / 'LICENSE.txt').read_text(encoding='utf-8')
    imports = re.findall(r'^import .* from "(.*)"', (folder / 'index.js').read_text(encoding='utf-8'), re.MULTILINE)
    assert imports == ['./wasm-utils.js']  # no name of a package, which a browser cannot resolve
    assert (shared / 'flags.txt').read_text(encoding='utf-8').split('\n')[:4] == [
        '--checkpoint', str(LITERT_CHECKPOINT), '--format', 'litert']


@pytest.mark.slow
def test_litert_of_other_weights_or_a_failed_export_makes_no_page(tmp_path, monkeypatch, runtimes):
    config = PageConfig(checkpoint=[str(LITERT_CHECKPOINT)], litert=True, output=str(tmp_path / 'page'))
    monkeypatch.setattr(litert, 'SCRIPT', write_export_script(tmp_path, largest=2.))
    with pytest.raises(ExportError, match='care_s0-fp32: its weights differ in the other environment: largest logit'):
        build_page(config)
    litert.SCRIPT.write_text('exit 1', encoding='utf-8')
    with pytest.raises(ExportError, match='care_s0-fp32: the export for LiteRT failed, as said above; omit --litert'):
        build_page(config)
    litert.SCRIPT.unlink()
    with pytest.raises(ConfigError, match='--litert needs .*export.sh: build the page in a checkout'):
        build_page(config)
    assert list((tmp_path / 'page').iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize('index, precision, limit', [(0, 'fp32', 1e-4), (1, 'fp16', 2e-2)])
def test_expected_logits_are_those_of_the_checkpoint_and_of_the_program(
        built, shared, manifest, index, precision, limit):
    program = manifest['programs'][index]
    assert (program['precision'], program['tolerance'], program['size']) == (precision, limit, [SIDE, SIDE])
    assert program['weights'] == 'page.pth.tar' and program['top1'] is None  # not ImageNet's classes
    model, _, preparation = load_for_evaluation(str(shared / 'page.pth.tar'))
    session = make_session((built / program['files']['onnxruntime']['file']).read_bytes(), 1)
    for image, check in zip(manifest['images'], program['checks'], strict=True):
        content = (built / image).read_bytes()
        pixels = EvalTransform(preparation, as_uint8=True)(content)
        assert hashlib.sha256(pixels.permute(1, 2, 0).numpy().tobytes()).hexdigest() == check['pixels']
        ready = EvalTransform(preparation)(content)[None]
        with torch.no_grad():
            expected = model.double()(ready.double())[0].numpy()
        np.testing.assert_allclose(check['logits'], expected, atol=1e-5 * abs(expected).max())
        found = session.run(None, {INPUT: ready.numpy()})[0][0]
        assert 0 < abs(found - expected).max() <= limit * abs(expected).max()


@pytest.mark.slow
def test_manifest_names_the_columns_of_results(manifest):
    assert manifest['columns'] == NAMES


@pytest.mark.slow
def test_headers_of_server_service_worker_and_hosts_agree(built):
    worker = (WEB / 'sw.js').read_text(encoding='utf-8')
    hosts = (built / '_headers').read_text(encoding='utf-8')
    for name, value in server.HEADERS.items():
        assert f"'{name}': '{value}'" in worker and f'  {name}: {value}\n' in hosts


def test_service_worker_keeps_every_file_of_the_page():
    core = re.search(r'CORE = \[(.*?)\]', (WEB / 'sw.js').read_text(encoding='utf-8'), re.DOTALL)[1]
    expected = {*WEB_FILES, './', 'manifest.json'} - {'index.html', 'sw.js'}
    assert sorted(re.findall("'(.+?)'", core)) == sorted(expected)
    assert {path.name for path in WEB.glob('*.js')} < {*WEB_FILES}


def test_server_sends_isolation_and_types(small):
    with serving(small) as address:
        for name, kind in (('', 'text/html'), ('page.js', 'text/javascript'), ('manifest.json', 'application/json'),
                           ('program.wasm', 'application/wasm')):
            with urllib.request.urlopen(address + name) as response:
                assert response.headers.get_content_type() == kind
                assert {response.headers[name] for name in server.HEADERS} == {'same-origin', 'require-corp'}
        with pytest.raises(urllib.error.HTTPError, match='404'):
            urllib.request.urlopen(address + '../secret.txt')


def test_https_is_served_while_a_connection_is_idle(small, monkeypatch):
    keys = small.with_name('page-tls')
    monkeypatch.chdir(small)
    with serving(Path('.'), tls=True) as address:
        port = int(address.rsplit(':', 1)[1].rstrip('/'))
        with socket.create_connection(('localhost', port)):  # never sends anything
            context = ssl.create_default_context(cafile=keys / 'certificate.pem')
            with urllib.request.urlopen(address, timeout=60, context=context) as response:
                assert response.status == 200
    assert keys.stat().st_mode & 0o077 == 0


# Mistakes -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, said', [
    (['--model', 'care_s9'], '--model care_s9: no such model'),
    (['--model', 'care_s0', 'care_s0'], "model is ['care_s0', 'care_s0']: name each once."),
    (['--precision', 'int8'], "invalid choice: 'int8'"),
    (['--pretrained'], '--pretrained needs a model'),
    (['--litert', '--precision', 'fp16'], '--litert needs fp32 programs, but --precision is fp16: add fp32.'),
    (['--port', '65536'], 'port is 65536 but must be at least 0, at most 65535.'),
    (['--checkpoint', 'none.pth'], 'none.pth')])
def test_wrong_flags_are_one_line(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('caretrans.page.build.fetch_package', lambda package: tmp_path)
    assert main(['page', '--output', str(tmp_path / 'page'), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1


def test_default_is_random_weights_unless_there_is_a_checkpoint():
    assert PageConfig().model == list(MODELS) and PageConfig(checkpoint=['a.pth']).model == []
    kinds = [(item.checkpoint, item.model, item.random_weights) for item in PageConfig(
        checkpoint=['a.pth'], model=['rcvit_xs']).list_exports('x')]
    assert kinds == [('a.pth', '', False), ('', 'casvit_xs', True)]


@pytest.mark.parametrize('name, text', [('thesis.txt', 'mine'), ('manifest.json', '{"name": "an app"}')])
def test_a_folder_with_other_files_is_left_alone(name, text, tmp_path):
    (tmp_path / '.unfinished-mine').mkdir()
    (tmp_path / name).write_text(text, encoding='utf-8')
    with pytest.raises(ConfigError, match='holds other files'):
        build_page(PageConfig(output=str(tmp_path)))
    assert (tmp_path / name).read_text(encoding='utf-8') == text and len(list(tmp_path.iterdir())) == 2
    (tmp_path / 'manifest.json').unlink(missing_ok=True)
    with pytest.raises(ConfigError, match='holds no page: python -m caretrans page --output'):
        server.make_server(tmp_path, ServerConfig())


@pytest.mark.parametrize('manifest', [None, '{"programs": [], "runtimes": {}}'])
def test_what_a_killed_build_left_is_removed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr('caretrans.page.build.fetch_package', lambda package: 1 / 0)
    (tmp_path / '.unfinished-a1').mkdir()
    if manifest:
        (tmp_path / 'manifest.json').write_text(manifest, encoding='utf-8')
    with pytest.raises(ZeroDivisionError):
        build_page(PageConfig(output=str(tmp_path)))
    assert not (tmp_path / '.unfinished-a1').exists()


def test_what_keeps_the_server_from_starting_is_told_before_the_build(small, capsys, monkeypatch):
    monkeypatch.setattr('caretrans.page.build.build_page', None)
    with serving(small) as address:
        port = address.rsplit(':', 1)[1].rstrip('/')
        assert main(['page', '--serve', '--port', port]) == 2 and f'--port {port}: ' in capsys.readouterr().err
    monkeypatch.setenv('PATH', str(small))
    assert main(['page', '--serve', '--tls', '--port', '0']) == 2 and 'needs openssl' in capsys.readouterr().err


def test_checkpoints_of_one_name_are_told_apart_by_their_folders():
    files = ['runs/a/best.pth', 'runs/b/best.pth', 'other/b/best.pth', 'last.pth', './last.pth']
    assert [name_checkpoint(file, files) for file in files] == [
        'a/best.pth', 'runs/b/best.pth', 'other/b/best.pth', 'last.pth', 'last.pth']


@pytest.mark.slow
def test_a_preparation_that_the_page_cannot_do_is_refused(tmp_path, monkeypatch, shared, built):
    monkeypatch.setattr('caretrans.page.build.CROP_MODES', CROP_MODES[1:])
    with pytest.raises(ConfigError, match='care_s0: the page does not support crop mode center'):
        build_page(PageConfig(checkpoint=[str(shared / 'page.pth.tar')], output=str(tmp_path / 'new')))
    monkeypatch.undo()

    def load(config):
        source = load_source(config)
        return dataclasses.replace(source, eval_config=dataclasses.replace(source.eval_config, crop_pct=1.1))
    monkeypatch.setattr('caretrans.page.build.load_source', load)
    with pytest.raises(ConfigError, match='care_s0: the page does not support crop_pct 1.1, more than 1: omit'):
        build_page(PageConfig(checkpoint=[str(shared / 'page.pth.tar')], output=str(tmp_path / 'new')))
    assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.slow
def test_a_wrong_checkpoint_is_found_before_any_export(tmp_path, monkeypatch, shared, built):
    monkeypatch.setattr('caretrans.page.build.export', None)
    files = [str(shared / 'page.pth.tar'), str(tmp_path / 'missing.pth')]
    with pytest.raises(CheckpointError, match='missing.pth'):
        build_page(PageConfig(checkpoint=files, output=str(tmp_path / 'new')))


def test_a_port_in_use_is_named(small):
    with serving(small) as address:
        port = int(address.rsplit(':', 1)[1].rstrip('/'))
        with pytest.raises(ConfigError, match=f'--port {port}: .*in use; choose another'):
            server.make_server(small, ServerConfig(port=port))


def test_a_damaged_archive_and_a_missing_npm_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    [package] = vendor.ONNXRUNTIME.packages
    with pytest.raises(ConfigError, match=r'npm, .*is not installed: .*or copy onnxruntime-web-.*\.tgz into'):
        vendor.fetch_package(package, tmp_path / 'cache')
    npm = tmp_path / 'npm'
    npm.write_text(
        f'#!/bin/sh\nfor last; do :; done\necho damaged > "$last/{package.archive}"\n', encoding='utf-8')
    npm.chmod(0o755)
    with pytest.raises(ConfigError, match='its SHA-512 is another'):
        vendor.fetch_package(package, tmp_path / 'cache')
    npm.write_text('#!/bin/sh\necho "no network" >&2\nexit 1\n', encoding='utf-8')
    with pytest.raises(ConfigError, match='could not fetch onnxruntime-web 1.*: no network'):
        vendor.fetch_package(package, tmp_path / 'cache')
