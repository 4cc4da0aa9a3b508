"""Programs of torch.export, saved and loaded."""
import pytest
import torch
import torch.nn as nn
from exports import (
    assert_break_is_caught,
    assert_truncation_is_named,
    check,
    make_cases,
    make_job,
    make_source,
    run_reference,
)

from caretrans.export.shapes import describe_shapes
from caretrans.runtimes.tracing import trace_any_size

JOB = make_job('torch')


def test_program_is_right_for_any_batch_and_size(programs):
    program = programs.read(JOB)
    assert check(JOB, program).max_error < 2e-5
    assert program.labels == make_source().class_names
    for shape in (1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 224, 320), (2, 3, 101, 75):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(program.run(images), run_reference(images), atol=2e-5), shape


def test_images_below_the_size_of_the_claim_are_refused(programs):
    program = programs.read(JOB)
    said = describe_shapes(make_source(), JOB, program, make_cases())
    assert said == ('any number of images of any height and width from 64 pixels on (run: 3 x 64 x 72, '
                    '2 x 101 x 70)')
    with pytest.raises(AssertionError, match='Guard failed'):
        program.run(torch.zeros(1, 3, 63, 64))


@pytest.mark.parametrize('size', [(32, 32), pytest.param((40, 64), marks=pytest.mark.slow)])
def test_program_for_images_too_small_for_any_size_takes_any_number_of_them(size, programs):
    job = make_job('torch', size=size)
    program = programs.read(job)
    assert check(job, program).max_error < 2e-5
    said = describe_shapes(make_source(), job, program, make_cases(size=size))
    assert said == f'any number of images of {size[0]} x {size[1]} pixels (run: 3 x {size[0]} x {size[1]})'


def test_operations_are_those_on_tensors(programs):
    program = programs.read(JOB)
    assert program.operations['conv2d'] == 45 and program.operations['gelu'] == 11
    assert not any('assert' in name or 'sym' in name or 'promote' in name for name in program.operations)
    assert sum('transpose' in line for line in program.shape_changes) == 3


def test_network_of_one_size_is_traced_for_that_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 3, 8, 8).mean((2, 3))

    program = trace_any_size(Fixed(), torch.randn(1, 3, 8, 8))
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(program.module()(images), Fixed()(images))
    with pytest.raises(AssertionError, match='Guard failed'):
        program.module()(torch.randn(2, 3, 8, 8))


def test_program_of_another_network_is_noticed_and_a_truncated_one_named(programs, tmp_path):
    assert_break_is_caught(JOB, programs.read(JOB))
    assert_truncation_is_named(JOB, programs.copy(JOB, tmp_path))
