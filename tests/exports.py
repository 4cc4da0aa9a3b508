"""What tests of exports share: small photographs, a source with lively weights, jobs."""
from functools import lru_cache
from typing import Any

from caretrans.export.config import ExportConfig, Job
from caretrans.export.source import Cases, Source, load_cases, load_source
from caretrans.export.verify import Program, Verification, verify

SIZE = (64, 64)


@lru_cache(maxsize=None)
def make_source(name: str = 'care_s0') -> Source:
    """Random weights under which all parts count."""
    return load_source(ExportConfig(model=name, random_weights=True))


@lru_cache(maxsize=None)
def make_cases(name: str = 'care_s0', size: tuple = SIZE, count: int = 14) -> Cases:
    return load_cases(make_source(name), size, count=count)


def make_job(format: str = 'torch', precision: str = 'fp32', **kwargs: Any) -> Job:
    return Job(**{**dict(
        format=format, precision=precision, input='tensor', output='logits', size=SIZE, floor=99.), **kwargs})


def prove(job: Job, program: Program, path: Any = 'program') -> Verification:
    """Verify a program of the source above on the photographs above."""
    return verify(make_source(), job, program, make_cases(size=job.size), path)
