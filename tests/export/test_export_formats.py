"""Packages that formats need: missing ones and other versions are named, with the remedy."""
import importlib.metadata
import importlib.util
import json
import subprocess

import pytest
import torch
from exports import make_job, make_source
from launch import ENVIRONMENT, ROOT

from caretrans import __version__
from caretrans.export.formats import table
from caretrans.export.formats.table import FORMATS, REMEDY, find_obstacle, list_versions
from caretrans.export.metadata import describe


@pytest.fixture
def install(monkeypatch):
    """Simulate an environment in which everything is installed as pinned, except what is given."""
    pins = table.read_pins()

    def play(missing=(), **versions):
        found = {**pins, **{name.replace('_', '-'): version for name, version in versions.items()}}

        def find(name):
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in missing else name)
        monkeypatch.setattr(importlib.metadata, 'version', find)
    return play


@pytest.mark.parametrize('form', FORMATS)
def test_pinned_environment_has_everything(form, install):
    install()
    assert [find_obstacle(FORMATS[form], precision) for precision in ('', *FORMATS[form].precisions)] == \
        [''] * (1 + len(FORMATS[form].precisions))


@pytest.mark.parametrize('form, module, package', [
    ('litert', 'ai_edge_quantizer', 'ai-edge-quantizer'), ('executorch', 'torchao', 'torchao')])
def test_packages_of_int8_are_named_when_int8_is_requested(form, module, package, install):
    install(missing=[module])
    assert find_obstacle(FORMATS[form], 'fp32') == ''
    assert find_obstacle(FORMATS[form], 'int8') == f'{package} is not installed here: {REMEDY}'


def test_remedy_is_the_script_alone_where_pip_would_change_torch(install):
    install(missing=['executorch', 'coremltools', 'onnx', 'nncf'])
    said = find_obstacle(FORMATS['executorch-coreml'])
    assert said == f'executorch, coremltools==9.0 is not installed here: {REMEDY}' and 'pip' not in said
    assert find_obstacle(FORMATS['openvino'], 'int8') == 'it is not installed: pip install onnx nncf'
    assert find_obstacle(FORMATS['openvino'], 'fp16') == 'it is not installed: pip install onnx'


@pytest.mark.parametrize('form, precision, versions, said', [
    ('executorch', 'fp32', dict(executorch='1.4.0'), 'executorch 1.4.0 is installed, but 1.5.1 is required'),
    ('litert', 'fp32', dict(torch='2.15.0+cpu'), 'torch 2.15.0+cpu is installed, but 2.14.1 is required'),
    ('litert', 'int8', dict(ai_edge_quantizer='0.9'), 'ai-edge-quantizer 0.9 is installed, but 0.10.0 is required'),
    ('litert', 'fp32', dict(ai_edge_quantizer='0.9'), ''),
    ('coreai', 'fp32', dict(torch='2.14.1+cpu', executorch='1.4.0'), ''),
    ('onnx', 'fp32', dict(torch='2.15.0', onnx='1.0'), '')])
def test_version_that_is_not_the_pinned_one_is_named(form, precision, versions, said, install):
    install(**versions)
    assert find_obstacle(FORMATS[form], precision) == (f'{said}: {REMEDY}' if said else '')


def test_two_other_versions_are_both_named(install):
    install(coreai_core='1.0', torch='2.13')
    assert find_obstacle(FORMATS['coreai']).startswith(
        'torch 2.13 is installed, but 2.14.1 is required; coreai-core 1.0 is installed')


def test_without_the_repository_nothing_is_compared(install, monkeypatch, tmp_path):
    install(executorch='0.1')
    assert find_obstacle(FORMATS['executorch'])
    monkeypatch.setattr(table, 'PINS', tmp_path / 'requirements.txt')
    assert find_obstacle(FORMATS['executorch']) == ''


def test_pins_cover_the_packages_of_formats_of_that_environment():
    pins = table.read_pins()
    for item in FORMATS.values():
        for precision in item.precisions if item.own_environment else ():
            assert {package.partition('==')[0] for package in item.get_packages(precision).values()} <= set(pins)


# Metadata -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', FORMATS)
def test_every_format_has_the_same_metadata_and_names_its_converter(form, install):
    kind, source = FORMATS[form], make_source()
    install()
    facts = describe(source, make_job(form, kind.precisions[-1], target='iOS17'))
    assert facts['torch'] == torch.__version__ and facts['caretrans'] == __version__
    versions = list_versions(kind, kind.precisions[-1])
    assert len(versions) == 1 + len(kind.get_packages(kind.precisions[-1]))
    assert {name: facts[name] for name in versions if name != 'torch'} == {
        name: version for name, version in versions.items() if name != 'torch'}
    assert facts['target'] == ('iOS17' if form in ('mlpackage', 'executorch-coreml') else '')
    assert json.loads(facts['class_names']) == source.class_names
    assert all(isinstance(value, str) for value in facts.values())


# Scripts --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['export', 'eval'])
def test_script_without_python_names_it(name, tmp_path):
    (tmp_path / 'dirname').symlink_to('/usr/bin/dirname')
    done = subprocess.run(
        ['/bin/bash', f'cmd/{name}.sh', '--format', 'litert'], cwd=ROOT, capture_output=True, text=True,
        env=dict(ENVIRONMENT, PATH=str(tmp_path)), encoding='utf-8')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == 'No python3 on the PATH: install Python 3.10 or newer.\n'


def test_installation_does_not_write_to_stdout(tmp_path):
    """A stand-in for Python that lacks everything until pip has run."""
    (tmp_path / 'cmd').mkdir()
    for name in ('env.sh', 'python.sh'):
        (tmp_path / 'cmd' / name).write_text((ROOT / 'cmd' / name).read_text(encoding='utf-8'), encoding='utf-8')
    stand_in = tmp_path / 'bin' / 'python3'
    stand_in.parent.mkdir()
    stand_in.write_text(f'''#!/bin/bash
echo "says $*"
case "$*" in
    *check_requirements*) [ -e {tmp_path}/installed ];;
    *venv*) mkdir -p {tmp_path}/.venv/bin; cp "$0" {tmp_path}/.venv/bin/python;;
    *pip*) touch {tmp_path}/installed;;
esac
''', encoding='utf-8')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ['bash', '-euc', 'source cmd/env.sh; echo "$python"'], cwd=tmp_path, capture_output=True, text=True,
        env=dict(ENVIRONMENT, PATH=f'{stand_in.parent}:{ENVIRONMENT["PATH"]}'), encoding='utf-8')
    assert (done.returncode, done.stdout) == (0, f'{tmp_path}/.venv/bin/python\n'), done.stderr
    assert 'Creating the environment .venv' in done.stderr and 'Installing into .venv' in done.stderr
