"""The scripts in cmd/ hand every argument on as it is. A script stands in for Python."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ODD = ['a b', '[x]*?', 'two\nlines', '$HOME', '{a,b}', "it's", '', 'caf\udce9', 'data/*']
STAND_IN = r'''#!/usr/bin/env bash
case "$1" in
    *check_requirements.py | *list_own_environment.py | -c) ;;
    *) printf '%s\0' "$@" ;;
esac
'''


@pytest.fixture
def environment(tmp_path):
    """With a stand-in for Python that prints its arguments, and a CDPATH, which makes `cd` print and look elsewhere."""
    python = tmp_path / 'bin dir' / 'python3'
    python.parent.mkdir()
    python.write_text(STAND_IN, encoding='utf-8')
    python.chmod(0o755)
    (tmp_path / 'cmd').mkdir()
    return dict(os.environ, PATH=f'{python.parent}:{os.environ["PATH"]}', CDPATH=f'{tmp_path}:.', NPROC='1')


@pytest.mark.parametrize('script, command', [
    ('cmd/train.sh', ['train.py']), ('cmd/eval.sh', ['validate.py']), ('cmd/export.sh', ['coreml/export.py']),
    ('cmd/compare.sh', ['-m', 'caretrans', 'compare']), ('cmd/page.sh', ['-m', 'caretrans', 'page', '--serve']),
    ('cmd/pretrain.sh', ['-m', 'caretrans', 'pretrain']), ('cmd/probe.sh', ['-m', 'caretrans', 'probe']),
    ('cmd/benchmark.sh', ['benchmark.py']),
    ('data/extract_ILSVRC.sh', ['-m', 'caretrans.data.imagenet'])])
def test_arguments_arrive_as_they_were_given(environment, script, command):
    done = subprocess.run(['bash', script, *ODD], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    arguments = [os.fsdecode(argument) for argument in done.stdout.split(b'\0')[:-1]]
    assert arguments[-len(ODD):] == ODD
    wanted = [str(ROOT / part) if part.endswith('.py') else part for part in command]
    assert arguments[:len(command)] == wanted


@pytest.mark.parametrize('script, command', [
    ('cmd/eval.sh', [str(ROOT / 'validate.py')]), ('cmd/train.sh', [str(ROOT / 'train.py')]),
    ('cmd/pretrain.sh', ['-m', 'caretrans', 'pretrain'])])
def test_several_processes_get_them_too(environment, script, command):
    done = subprocess.run(
        ['bash', script, *ODD], cwd=ROOT, env=dict(environment, NPROC='2', OMP_NUM_THREADS='1'),
        capture_output=True)
    arguments = [os.fsdecode(argument) for argument in done.stdout.split(b'\0')[:-1]]
    assert done.returncode == 0 and arguments[-len(ODD) - len(command):] == [*command, *ODD]


def test_a_data_folder_of_the_gpu_benchmark_is_one_argument(environment, tmp_path):
    folder = tmp_path / 'out [1] $x'
    done = subprocess.run(
        ['bash', 'cmd/benchmark_gpu.sh', folder], cwd=ROOT, capture_output=True,
        env=dict(environment, STEPS='published compare', CIFAR10='my data [1]', MODELS='care_s0 care_s[12]'))
    assert done.returncode == 0, done.stderr
    published = (folder / 'published.txt').read_bytes().split(b'\0')[:-1]
    assert published[-3:] == [b'care_s0', b'care_s[12]', b'--published']
    assert b'my data [1]' in (folder / 'compare.txt').read_bytes().split(b'\0')
