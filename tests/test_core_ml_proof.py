"""care_s0 as saved for Core ML computes what PyTorch computes in float64, and a file that is broken is caught."""
import copy
import shutil

import pytest
import torch
from core_ml_programs import edit, save_network

from caretrans.export.config import FLOORS, ExportConfig, Job
from caretrans.export.mil_evaluator import read_ml_program
from caretrans.export.network_evaluator import read_network
from caretrans.export.source import load_cases, load_source
from caretrans.export.verify import VerificationError, verify

SIZE = (96, 96)
PHOTOGRAPHS = 24
ERRORS = {'fp16': 3e-2, 'fp32': 2e-5}  # of the largest logit


@pytest.fixture(scope='module')
def source():
    return load_source(ExportConfig(model='care_s0', random_weights=True))


@pytest.fixture(scope='module')
def cases(source):
    return load_cases(source, SIZE, count=PHOTOGRAPHS)


def make_job(format, precision, **settings):
    return Job(format, precision, **{**dict(input='image', output='logits', size=SIZE, floor=FLOORS[precision]), **settings})


def read(path, job):
    if job.format == 'mlmodel':
        return read_network(path, half=job.precision == 'fp16')
    return read_ml_program(path)


@pytest.fixture(scope='module')
def saved(source, tmp_path_factory):
    """Saves the network of a job once, and gives the path."""
    paths = {}

    def save(job):
        if job not in paths:
            folder = tmp_path_factory.mktemp('saved')
            paths[job] = save_network(source, job, folder / f'care_s0.{job.format}')
        return paths[job]
    return save


@pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])
@pytest.mark.parametrize('precision', ['fp16', 'fp32'])
def test_care_s0_equals_pytorch_in_float64(format, precision, source, cases, saved):
    job = make_job(format, precision)
    evaluator = read(saved(job), job)
    result = verify(source, job, evaluator.to_program(), cases)
    print(result)
    assert result.max_error < ERRORS[precision] * result.largest
    assert not [line for line in result.findings if 'not finite' in line]
    assert evaluator.input.shape == (1, 3, *SIZE)
