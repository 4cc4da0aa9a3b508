"""`pip install .` alone: the networks, their checkpoints and their fused forms, without any of the extras."""
import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / 'data' / 'fruit14'
pytestmark = pytest.mark.slow

USE = """
import timm, torch, caretrans
from caretrans.checkpoint import create_from_checkpoint, load_checkpoint, save_checkpoint
from caretrans.config import read_recipe
from caretrans.fuse import fuse
assert not caretrans.__file__.startswith('ROOT')
model = timm.create_model('care_s0', num_classes=14).eval()
save_checkpoint('care.pth.tar', model, arch='care_s0', class_names=CLASSES)
loaded, checkpoint = create_from_checkpoint('care.pth.tar')
load_checkpoint(loaded, 'care.pth.tar')
x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    assert torch.equal(model(x), loaded.eval()(x))
    torch.testing.assert_close(fuse(loaded)(x), model(x), rtol=1e-4, atol=1e-4)
assert read_recipe('care_s0_imagenet')['model'] == 'care_s0'
"""


def list_closure(requirements) -> dict:
    """{name: distribution} of requirements and all that they need, markers of extras aside."""
    found, queue = {}, list(requirements)
    while queue:
        requirement = queue.pop()
        name = re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')
        if name in found or 'extra ==' in requirement:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of other systems
            continue
        queue += found[name].requires or []
    return found


@pytest.fixture(scope='module')
def core(tmp_path_factory) -> Path:
    """The Python of an environment with the core requirements, linked from the running one, and the package."""
    folder = tmp_path_factory.mktemp('core')
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    site = Path(subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], capture_output=True, text=True,
        check=True, encoding='utf-8').stdout.strip())
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    block = re.search(r'^dependencies = \[(.*?)^\]', project, re.MULTILINE | re.DOTALL)[1]
    for package in list_closure(re.findall(r'"(.+?)"', block)).values():
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ('..', '__pycache__')}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--no-build-isolation',
         '--disable-pip-version-check', '--target', site, ROOT], check=True)
    return python


def call(python, folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run(
        [python, *arguments], cwd=folder, capture_output=True, timeout=300, env=environment, encoding='utf-8')


def test_the_core_has_none_of_the_extras(core, tmp_path):
    script = 'import importlib.util, json; print(json.dumps([n for n in {!r} if importlib.util.find_spec(n)]))'
    names = ['tensorboard', 'simplejpeg', 'webdataset', 'matplotlib', 'torchmetrics', 'scipy', 'onnx', 'coremltools']
    assert json.loads(call(core, tmp_path, '-c', script.format(names)).stdout) == []


@pytest.fixture(scope='module')
def used(core, tmp_path_factory) -> Path:
    """The folder in which a model was made, saved, loaded and fused."""
    folder = tmp_path_factory.mktemp('used')
    classes = sorted(path.name for path in (DATA / 'val').iterdir())
    done = call(core, folder, '-c', USE.replace('ROOT', str(ROOT)).replace('CLASSES', repr(classes)))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_model_is_made_saved_loaded_fused_and_converted(core, used):
    done = call(core, used, '-m', 'caretrans', 'convert', 'care.pth.tar', 'care.safetensors', '--to', 'caretrans')
    assert done.returncode == 0 and (used / 'care.safetensors').exists(), done.stderr


@pytest.mark.parametrize('arguments, package', [
    (['-m', 'caretrans', 'shard', DATA, 'SHARDS'], 'webdataset'),
    ([ROOT / 'train.py', DATA, '--epochs', '1', '--warmup-epochs', '0', '--device', 'cpu'], 'simplejpeg'),
    ([ROOT / 'validate.py', 'care.pth.tar', DATA, '--device', 'cpu'], 'torchmetrics'),
], ids=['shard', 'train', 'validate'])
def test_a_command_without_its_extra_names_it_in_one_line(core, used, arguments, package):
    done = call(core, used, *arguments)
    lines = [line for line in done.stderr.splitlines() if 'is not installed' in line]
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    assert f'{package} is not installed: run `pip install ".[train]"`' in lines[0]
