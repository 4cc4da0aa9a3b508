"""Shared by tests of exports: networks with sample weights, images, jobs, and programs that are converted once."""
import contextlib
import copy
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock

from caretrans.checkpoint.preparation import resolve_eval_config
from caretrans.errors import ExportError
from caretrans.export.config import COREML, FLOORS, ExportConfig, Job
from caretrans.export.program import Program
from caretrans.export.run import name_program
from caretrans.export.source import Cases, Source, load_cases, load_source
from caretrans.export.verify import Verification, VerificationError, verify
from caretrans.measure.sample_network import load_sample_images, randomize

SIZE = (64, 64)
SHALLOW = {  # networks with all their parts in few blocks: (model, depths, classes)
    'care': ('care_s0', (1, 1, 2, 1), 1000), 'care_3_heads': ('care_s2', (1, 1, 2, 1), 1000),
    'casvit': ('casvit_xs', (1, 1, 1, 1), 14), 'mlla': ('mlla_t', (1, 1, 1, 1), 14)}


@lru_cache(maxsize=None)
def make_source(name: str = 'care') -> Source:
    """One of `SHALLOW`, or a model of timm, with random weights; shared, do not change it."""
    if name not in SHALLOW:
        return load_source(ExportConfig(model=name, random_weights=True))
    model_name, depths, num_classes = SHALLOW[name]
    model = timm.create_model(model_name, depths=depths, num_classes=num_classes).eval()
    randomize(model, load_sample_images(model, SIZE, 8))
    return Source(model_name, model, resolve_eval_config(model), [f'class {number}' for number in range(num_classes)])


def change(source: Source, alter: Callable) -> Source:
    """A source whose network is altered."""
    model = copy.deepcopy(source.model)
    alter(model)
    return dataclasses.replace(source, model=model)


@lru_cache(maxsize=None)
def make_cases(name: str = 'care', size: tuple = SIZE, count: int = 14) -> Cases:
    return load_cases(make_source(name), size, count=count)


def make_job(format: str = 'torch', precision: str = 'fp32', **kwargs: Any) -> Job:
    settings = dict(input='tensor', output='logits', size=SIZE, floor=FLOORS[precision])
    return Job(format, precision, **{**settings, **kwargs})


def check(job: Job, program: Program, name: str = 'care', count: int = 14, path: Any = 'program') -> Verification:
    """Verify a program of a source above on images."""
    return verify(make_source(name), job, program, make_cases(name, job.size, count), path)


def run_reference(images: torch.Tensor, name: str = 'care') -> torch.Tensor:
    with torch.no_grad():
        return make_source(name).model(images)


class Programs:
    """Programs on disk, each converted once per session, by the process that asks first. Do not change the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read_already: dict[tuple, Program] = {}

    def write(self, job: Job, name: str = 'care') -> tuple[Path, list[str]]:
        """The file of a job, and the remarks of its converter."""
        source = make_source(name)
        path = self.folder / name / name_program(source, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = path.with_name(f'{path.name}.notes')
        with FileLock(f'{path}.lock'):
            if not notes.exists():
                text = io.StringIO()
                with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                    found = job.kind.load_module().write(source, job, path)
                assert job.format not in COREML or text.getvalue() == '', 'conversion is quiet'
                notes.write_text(json.dumps(found), encoding='utf-8')
        return path, json.loads(notes.read_text(encoding='utf-8'))

    def read(self, job: Job, name: str = 'care') -> Program:
        """The program read back from its file, shared by the tests of this process."""
        key = dataclasses.replace(job, floor=0.), name
        if key not in self.read_already:
            self.read_already[key] = job.kind.load_module().read(job, self.write(job, name)[0])
        return self.read_already[key]

    def copy(self, job: Job, folder: Path, name: str = 'care') -> Path:
        """A copy of the file, to be changed."""
        path, _ = self.write(job, name)
        target = folder / f'copy{job.kind.suffix}'
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
        return target


# Deliberate breaks ----------------------------------------------------------------------------------------------------

def drop_bias(model: torch.nn.Module) -> None:
    """One bias of the attentions of 'care'."""
    model.stages[2].blocks[1].mixer.long_range.qk.bias.data.zero_()


def swap_two(names: list[str]) -> list[str]:
    """Labels with classes 2 and 5 swapped."""
    return [*names[:2], names[5], *names[3:5], names[2], *names[6:]]


def assert_break_is_caught(job: Job, program: Program) -> None:
    """A program and a network that differ in one bias do not pass as equal."""
    source = change(make_source(), drop_bias)
    with pytest.raises(VerificationError, match='rounding does not explain'):
        verify(source, job, program, load_cases(source, job.size, count=14), 'program')


def assert_swapped_labels_are_caught(job: Job, program: Program) -> None:
    source = dataclasses.replace(make_source(), class_names=swap_two(make_source().class_names))
    with pytest.raises(VerificationError, match='class 2 is labelled'):
        verify(source, job, program, make_cases(size=job.size), 'program')


def assert_truncation_is_named(job: Job, path: Path) -> None:
    """Cut the largest file of a program in half."""
    largest = path if path.is_file() else max(
        (file for file in path.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:len(content) // 2])
    with pytest.raises(ExportError, match='cannot be read') as error:
        job.kind.load_module().read(job, path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
