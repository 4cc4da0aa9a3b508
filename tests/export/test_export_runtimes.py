"""Programs of ExecuTorch, LiteRT and Core AI, whose packages cmd/export.sh installs beside those of training."""
import subprocess
import sys

import pytest
import torch
from exports import (
    assert_break_is_caught,
    assert_swapped_labels_are_caught,
    assert_truncation_is_named,
    check,
    make_job,
    make_source,
)
from launch import ROOT

from caretrans.export.formats.table import FORMATS, find_obstacle
from caretrans.fuse import fuse, to_form

pytestmark = pytest.mark.slow


def skip_without(form):
    obstacle = find_obstacle(FORMATS[form])
    return pytest.mark.skipif(bool(obstacle), reason=f'{form}: {obstacle}')


def each(*forms):
    return pytest.mark.parametrize('form', [pytest.param(form, marks=skip_without(form)) for form in forms])


@each('executorch', 'litert', 'coreai')
def test_program_is_verified_and_a_wrong_or_truncated_one_is_named(form, programs, tmp_path):
    job = make_job(form)
    program = programs.read(job)
    result = check(job, program)
    assert result.top1_agreement == 100 and result.max_error < 2e-5
    assert program.labels == make_source().class_names and program.operations
    assert program.timed == (form != 'coreai')
    if form == 'executorch':  # XNNPACK takes all but one operation
        assert program.operations == {'native_layer_norm': 1, 'calls of XNNPACK': 2} and not program.shape_changes
    assert_break_is_caught(job, program)
    assert_truncation_is_named(job, programs.copy(job, tmp_path))


@each('executorch', 'litert')
def test_int8_is_smaller_and_agrees(form, programs):
    job = make_job(form, 'int8', floor=50.)
    program = programs.read(job)
    assert programs.write(job)[0].stat().st_size < programs.write(make_job(form))[0].stat().st_size / 2
    result = check(job, program)
    assert 0.01 < result.max_error < result.largest / 2


@each('coreai')
def test_float16(form, programs):
    job = make_job(form, 'fp16', floor=90.)
    assert 1e-4 < check(job, programs.read(job)).max_error < 0.1


@pytest.mark.parametrize('precision', ['fp16', 'fp32'])
@each('executorch-coreml')
def test_core_ml_program_in_an_executorch_file(form, precision, programs, tmp_path):
    job = make_job(form, precision, floor=90.)
    program = programs.read(job)
    assert check(job, program).top1_agreement >= 90
    assert program.labels == make_source().class_names
    assert any('Apple' in note for note in program.notes) and not program.timed
    assert_truncation_is_named(job, programs.copy(job, tmp_path))
    assert_swapped_labels_are_caught(job, program)
    if precision == 'fp32':
        assert_break_is_caught(job, program)


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
    command = [sys.executable, '-S', str(ROOT / 'cmd' / 'list_own_environment.py'), *flags]  # without any package
    assert subprocess.run(command, capture_output=True, text=True, check=True, encoding='utf-8').stdout.strip() == own
