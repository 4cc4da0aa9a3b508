"""Programs of torch.export, saved and loaded."""
import pytest
import torch
import torch.nn as nn
from exports import (
    assert_break_is_caught,
    assert_truncation_is_named,
    make_job,
    make_source,
    prove,
    run_reference,
    save,
)

from caretrans.export.torch_program import ANY_SIZE
from caretrans.runtimes.tracing import trace_any_size


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save('torch', 'care_s0.pt2', tmp_path_factory)


def test_program_is_proven(saved):
    job, path, program = saved
    assert prove(job, program, path).max_error < 2e-5
    assert program.labels == make_source().class_names


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 224, 320), (2, 3, 101, 75)])
def test_program_is_right_for_any_batch_and_size(saved, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(saved[2].run(images), run_reference(images), atol=2e-5)


def test_images_below_the_size_of_the_remark_are_refused(saved, tmp_path):
    job, _, program = saved
    assert job.kind.load_module().write(make_source(), job, tmp_path / 'care_s0.pt2') == [ANY_SIZE]
    assert 'from 64 pixels on' in ANY_SIZE
    with pytest.raises(AssertionError, match='Guard failed'):
        program.run(torch.zeros(1, 3, 63, 64))


def test_operations_are_those_on_tensors(saved):
    _, _, program = saved
    assert program.operations['conv2d'] == 153 and program.operations['gelu'] == 37
    assert not any('assert' in name or 'sym' in name or 'promote' in name for name in program.operations)
    assert sum('transpose' in line for line in program.shape_changes) == 12


def test_network_of_one_size_is_traced_for_that_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 3, 8, 8).mean((2, 3))

    program, remark = trace_any_size(Fixed(), torch.randn(1, 3, 8, 8))
    assert 'only images of shape (1, 3, 8, 8)' in remark and '\n' not in remark
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(program.module()(images), Fixed()(images))


def test_program_of_a_wrong_network_is_noticed(tmp_path):
    assert_break_is_caught(make_job('torch'), tmp_path / 'care_s0.pt2')


def test_truncated_file_is_named(saved, tmp_path):
    copy = tmp_path / 'cut.pt2'
    copy.write_bytes(saved[1].read_bytes())
    assert_truncation_is_named(saved[0], copy)
