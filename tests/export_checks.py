"""What the tests of all formats share: small networks, photographs, and ways to spoil a program."""
import copy
import dataclasses
from functools import lru_cache

import pytest
import torch

from caretrans.export.config import FLOORS, ExportConfig, Job
from caretrans.export.source import load_cases, load_source
from caretrans.export.verify import ExportError, VerificationError, verify

SIZE = (64, 64)


@lru_cache(maxsize=None)
def get_source(name='care_s0'):
    """Lively random weights; shared, do not change it."""
    return load_source(ExportConfig(model=name, random_weights=True))


@lru_cache(maxsize=None)
def get_cases(name='care_s0', size=SIZE):
    return load_cases(get_source(name), size, count=24)


def make_job(form, precision='fp32', **kwargs):
    settings = dict(input='tensor', output='logits', size=SIZE, floor=FLOORS[precision])
    return Job(form, precision, **{**settings, **kwargs})


def write_and_read(job, path, source=None):
    """The program as it comes back from its file."""
    source = source or get_source()
    module = job.kind.load_module()
    module.check(job)
    module.write(source, job, path)
    return module.read(source, job, path)


def run_reference(images, name='care_s0'):
    with torch.no_grad():
        return get_source(name).model(images)


def spoil(which):
    """A source whose network is wrong in one place."""
    source = get_source()
    model = copy.deepcopy(source.model)
    if which == 'lost bias':
        model.stages[2].blocks[7].mixer.long_range.qk.bias.data.zero_()
    else:
        for head in (model.head, model.head_dist):
            head.fc.weight.data, head.fc.bias.data = head.fc.weight.data.roll(1, 0), head.fc.bias.data.roll(1, 0)
    return dataclasses.replace(source, model=model)


def assert_break_is_caught(job, path, which):
    program = write_and_read(job, path, spoil(which))
    said = 'rounding does not explain' if which == 'lost bias' else 'first answers are those of PyTorch'
    with pytest.raises(VerificationError, match=said):
        verify(get_source(), job, program, get_cases(), path)


def assert_truncation_is_named(job, path):
    """The largest file of a finished program is cut in half."""
    largest = path if path.is_file() else max(
        (file for file in path.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:len(content) // 2])
    with pytest.raises(ExportError, match='cannot be read') as error:
        job.kind.load_module().read(get_source(), job, path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
