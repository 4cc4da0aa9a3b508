"""Programs of ExecuTorch, LiteRT and Core AI, whose packages cmd/export.sh installs beside those of training."""
import subprocess
import sys

import pytest
import torch
from exports import (
    assert_break_is_caught,
    assert_swapped_labels_are_caught,
    assert_truncation_is_named,
    make_cases,
    make_job,
    make_source,
    prove,
    write_and_read,
)
from launch import ROOT

from caretrans.export.formats import FORMATS, find_obstacle
from caretrans.export.verify import verify
from caretrans.fuse import fuse, to_form

OWN = ['executorch', 'litert', 'coreai']


def skip_without(form):
    obstacle = find_obstacle(FORMATS[form])
    return pytest.mark.skipif(bool(obstacle), reason=f'{form}: {obstacle}')


each = pytest.mark.parametrize('form', [pytest.param(form, marks=skip_without(form)) for form in OWN])


@each
def test_program_is_proven(form, tmp_path):
    job, path = make_job(form), tmp_path / f'care_s0{FORMATS[form].suffix}'
    program = write_and_read(job, path)
    result = prove(job, program, path)
    assert result.top1_agreement == 100 and result.max_error < 2e-5
    assert program.labels == make_source().class_names and program.operations
    assert program.timed == (form != 'coreai')


@each
def test_wrong_program_is_noticed_and_a_truncated_one_named(form, tmp_path):
    job, path = make_job(form), tmp_path / f'care_s0{FORMATS[form].suffix}'
    assert_break_is_caught(job, path)
    assert_truncation_is_named(job, path)


@pytest.mark.parametrize('form', [pytest.param(form, marks=skip_without(form)) for form in ('executorch', 'litert')])
def test_int8_is_smaller_and_agrees(form, tmp_path):
    job, path = make_job(form, 'int8', floor=50.), tmp_path / f'care_s0{FORMATS[form].suffix}'
    program = write_and_read(job, path)
    assert path.stat().st_size < 10e6
    result = prove(job, program, path)
    assert 0.01 < result.max_error < result.largest / 2


@skip_without('executorch')
def test_xnnpack_takes_all_but_one_operation(tmp_path):
    program = write_and_read(make_job('executorch'), tmp_path / 'care_s0.pte')
    assert program.operations == {'native_layer_norm': 1, 'calls of XNNPACK': 2} and not program.shape_changes


@skip_without('coreai')
def test_core_ai_in_float16(tmp_path):
    job, path = make_job('coreai', 'fp16', floor=90.), tmp_path / 'care_s0.aimodel'
    result = verify(make_source(), job, write_and_read(job, path), make_cases(), path)
    assert 1e-4 < result.max_error < 0.1


@skip_without('executorch-coreml')
@pytest.mark.parametrize('precision', ['fp16', 'fp32'])
def test_program_for_core_ml_in_an_executorch_file_is_proven(precision, tmp_path):
    job, path = make_job('executorch-coreml', precision, floor=90.), tmp_path / 'care_s0.coreml.pte'
    program = write_and_read(job, path)
    assert prove(job, program, path).top1_agreement >= 90
    assert program.labels == make_source().class_names
    assert any('Apple' in note for note in program.notes) and not program.timed
    assert_truncation_is_named(job, path)


@skip_without('executorch-coreml')
@pytest.mark.parametrize('assert_caught', [assert_break_is_caught, assert_swapped_labels_are_caught])
def test_wrong_program_for_core_ml_in_an_executorch_file_is_noticed(assert_caught, tmp_path):
    assert_caught(make_job('executorch-coreml', 'fp32'), tmp_path / 'care_s0.coreml.pte')


# Anywhere -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch', [1, 3])
def test_form_for_xnnpack_is_exact(batch):
    model = make_source().model
    images = torch.randn(batch, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = fuse(model.double())(images)
        found = to_form(model, 'bmm')(images)
        model.float()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('flags, own', [
    ([], ''), (['--format', 'onnx', 'mlpackage'], ''), (['--model', 'care_s0', '--format', 'onnx', 'litert'], 'litert'),
    (['--format=coreai', '--json'], 'coreai'),
    (['--format', 'executorch-coreml', '--no-latency'], 'executorch-coreml')])
def test_formats_that_need_their_own_environment_are_found(flags, own):
    command = [sys.executable, str(ROOT / 'cmd' / 'list_own_environment.py'), *flags]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == own
