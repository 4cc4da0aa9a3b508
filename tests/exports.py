"""What tests of exports share: lively networks, photographs, jobs, and ways to spoil a program."""
import copy
import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from caretrans.errors import ExportError
from caretrans.export.config import FLOORS, ExportConfig, Job
from caretrans.export.source import Cases, Source, load_cases, load_source
from caretrans.export.verify import Program, Verification, VerificationError, verify

SIZE = (64, 64)


@lru_cache(maxsize=None)
def make_source(name: str = 'care_s0') -> Source:
    """Random weights under which all parts count; shared, do not change it."""
    return load_source(ExportConfig(model=name, random_weights=True))


@lru_cache(maxsize=None)
def make_cases(name: str = 'care_s0', size: tuple = SIZE, count: int = 14) -> Cases:
    return load_cases(make_source(name), size, count=count)


def make_job(format: str = 'torch', precision: str = 'fp32', **kwargs: Any) -> Job:
    settings = dict(input='tensor', output='logits', size=SIZE, floor=FLOORS[precision])
    return Job(format, precision, **{**settings, **kwargs})


def prove(job: Job, program: Program, path: Any = 'program', name: str = 'care_s0') -> Verification:
    """Verify a program of the source above on the photographs above."""
    return verify(make_source(name), job, program, make_cases(name, job.size), path)


def write_and_read(job: Job, path: Any, source: Source | None = None) -> Program:
    """The program as it comes back from its file."""
    source = source or make_source()
    module = job.kind.load_module()
    module.write(source, job, path)
    return module.read(source, job, path)


def run_reference(images: torch.Tensor, name: str = 'care_s0') -> torch.Tensor:
    with torch.no_grad():
        return make_source(name).model(images)


# Deliberate breaks ----------------------------------------------------------------------------------------------------

def lose_bias() -> Source:
    """A source whose network lost one bias of its attentions."""
    model = copy.deepcopy(make_source().model)
    model.stages[2].blocks[7].mixer.long_range.qk.bias.data.zero_()
    return dataclasses.replace(make_source(), model=model)


def swap_labels() -> Source:
    """A source that calls two classes by each other's names."""
    names = list(make_source().class_names)
    names[2], names[5] = names[5], names[2]
    return dataclasses.replace(make_source(), class_names=names)


def assert_break_is_caught(job: Job, path: Any) -> None:
    program = write_and_read(job, path, lose_bias())
    with pytest.raises(VerificationError, match='rounding does not explain'):
        prove(job, program, path)


def assert_swapped_labels_are_caught(job: Job, path: Any) -> None:
    program = write_and_read(job, path, swap_labels())
    with pytest.raises(VerificationError, match='class 2 is labelled'):
        prove(job, program, path)


def assert_truncation_is_named(job: Job, path: Any) -> None:
    """The largest file of a finished program is cut in half."""
    largest = path if path.is_file() else max(
        (file for file in path.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:len(content) // 2])
    with pytest.raises(ExportError, match='cannot be read') as error:
        job.kind.load_module().read(make_source(), job, path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def save(form: str, name: str, tmp_path_factory: Any) -> tuple[Job, Path, Program]:
    """A job of a format, its file of this name and the program read from it; do not change the file."""
    job, path = make_job(form), tmp_path_factory.mktemp(form) / name
    return job, path, write_and_read(job, path)
