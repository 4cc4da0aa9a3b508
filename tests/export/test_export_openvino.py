"""OpenVINO programs: what is saved computes what the network computes, in each precision."""
import pytest
from exports import (
    assert_break_is_caught,
    assert_truncation_is_named,
    make_job,
    make_source,
    prove,
    save,
    write_and_read,
)

from caretrans.errors import ExportError
from caretrans.export.openvino_program import MODEL

WEIGHTS = 'model.bin'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save('openvino', 'care_s0.openvino', tmp_path_factory)


def test_program_is_proven(saved):
    """With OpenVINO's own choice of bfloat16 the error would be thousands of times this."""
    job, path, program = saved
    result = prove(job, program, path)
    assert result.top1_agreement == 100 and result.max_error < 2e-5
    assert program.labels == make_source().class_names


def test_shapes_are_known(saved):
    _, _, program = saved
    assert 'ShapeOf' not in program.operations and program.operations['GroupConvolution'] == 66
    kinds = [line.split()[0] for line in program.shape_changes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {'Reshape': 37, 'Transpose': 12, 'Unsqueeze': 12}


def test_float16_is_of_the_weights(saved, tmp_path):
    job, path = make_job('openvino', 'fp16'), tmp_path / 'care_s0.openvino'
    program = write_and_read(job, path)
    result = prove(job, program, path)
    assert 1e-5 < result.max_error < 2e-2
    assert (path / WEIGHTS).stat().st_size < 0.52 * (saved[1] / WEIGHTS).stat().st_size


def test_int8_is_smaller_and_agrees(saved, tmp_path):
    job, path = make_job('openvino', 'int8', floor=40.), tmp_path / 'care_s0.openvino'
    program = write_and_read(job, path)
    assert program.operations['FakeQuantize'] > 100
    assert (path / WEIGHTS).stat().st_size < (saved[1] / WEIGHTS).stat().st_size / 2.5
    result = prove(job, program, path)
    assert 0.01 < result.max_error < result.largest / 2


def test_batch_and_oblong_pixels(tmp_path):
    job = make_job('openvino', input='image', output='probabilities', batch=2, size=(64, 96))
    path = tmp_path / 'care_s0.openvino'
    program = write_and_read(job, path)
    assert prove(job, program, path).max_error < 1e-5


def test_program_of_a_wrong_network_is_noticed_and_a_truncated_one_named(tmp_path):
    job, path = make_job('openvino'), tmp_path / 'care_s0.openvino'
    assert_break_is_caught(job, path)
    assert_truncation_is_named(job, path)


def test_missing_description_is_named(saved, tmp_path):
    with pytest.raises(ExportError, match='cannot be read'):
        saved[0].kind.load_module().read(make_source(), saved[0], tmp_path / MODEL)
