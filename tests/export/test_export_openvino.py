"""OpenVINO programs: the file computes what the network computes, in each precision."""
import pytest
from exports import assert_break_is_caught, assert_truncation_is_named, check, make_job, make_source

from caretrans.errors import ExportError
from caretrans.export.formats import openvino

pytestmark = pytest.mark.slow

JOB = make_job('openvino')


def measure_weights(programs, job):
    return (programs.write(job)[0] / 'model.bin').stat().st_size


def test_program_is_verified(programs):
    """With OpenVINO's own choice of bfloat16 the error would be thousands of times this."""
    program = programs.read(JOB)
    result = check(JOB, program)
    assert result.top1_agreement == 100 and result.max_error < 2e-5
    assert program.labels == make_source().class_names


def test_shapes_are_known(programs):
    program = programs.read(JOB)
    assert 'ShapeOf' not in program.operations and program.operations['GroupConvolution'] == 19
    kinds = [line.split()[0] for line in program.shape_changes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {'Reshape': 10, 'Transpose': 3, 'Unsqueeze': 3}


def test_only_weights_are_float16(programs):
    job = make_job('openvino', 'fp16')
    assert 1e-5 < check(job, programs.read(job)).max_error < 2e-2
    assert measure_weights(programs, job) < 0.52 * measure_weights(programs, JOB)


def test_int8_is_smaller_and_agrees(programs):
    job = make_job('openvino', 'int8', floor=40.)
    program = programs.read(job)
    assert program.operations['FakeQuantize'] > 40
    assert measure_weights(programs, job) < measure_weights(programs, JOB) / 2.5
    result = check(job, program)
    assert 0.01 < result.max_error < result.largest / 2


def test_batch_and_oblong_pixels(programs):
    job = make_job('openvino', input='image', output='probabilities', batch=2, size=(64, 96))
    assert check(job, programs.read(job)).max_error < 1e-5


def test_program_of_another_network_is_noticed_and_a_damaged_one_named(programs, tmp_path):
    assert_break_is_caught(JOB, programs.read(JOB))
    assert_truncation_is_named(JOB, programs.copy(JOB, tmp_path))
    with pytest.raises(ExportError, match='cannot be read'):
        openvino.read(JOB, tmp_path / 'nowhere')
