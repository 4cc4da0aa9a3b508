"""ONNX programs: the file computes what the network computes, for any batch and size; a wrong one is noticed."""
import dataclasses
import json
from importlib.metadata import version

import onnx
import pytest
import torch
from exports import (
    assert_break_is_caught,
    assert_truncation_is_named,
    check,
    make_cases,
    make_job,
    make_source,
    run_reference,
    swap_two,
)

from caretrans import __version__
from caretrans.errors import ExportError
from caretrans.export.formats import onnx as onnx_format
from caretrans.export.shapes import describe_shapes
from caretrans.export.verify import VerificationError

pytestmark = pytest.mark.slow

JOB = make_job('onnx')


SHAPES = (1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 224, 320), (2, 3, 101, 75), (1, 3, 32, 40)


def test_program_is_right_for_any_batch_and_size(programs):
    program = programs.read(JOB)
    result = check(JOB, program)
    assert result.top1_agreement == 100 and result.max_error < 2e-5
    for shape in SHAPES:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(program.run(images), run_reference(images), atol=2e-5), shape


@pytest.mark.parametrize('size, name', [
    ((32, 32), 'care'), pytest.param((32, 40), 'mlla', marks=pytest.mark.slow),
    pytest.param((40, 96), 'casvit', marks=pytest.mark.slow)])
def test_program_for_small_images_takes_any_size(size, name, programs):
    """Maps of one position, when it is traced, must not become part of the program."""
    job = make_job('onnx', size=size, input='image')
    program, cases = programs.read(job, name), make_cases(name, size)
    assert check(job, program, name).max_error < 2e-5
    said = describe_shapes(make_source(name), job, program, cases)
    assert said == (f'any number of images of any height and width from 32 pixels on (run: 3 x 32 x 40, '
                    f'2 x {size[0] + 37} x {size[1] + 6})')
    pixels = torch.randint(256, (1, 3, 224, 160), dtype=torch.uint8)
    expected = run_reference(make_source(name).normalise(pixels), name)
    assert torch.allclose(program.run(pixels.float()), expected, atol=5e-5)


def run_at_own_size(program):
    """A stand-in for a program with free axes that fails, or is wrong, at sizes other than its own."""
    def fail(images):
        if images.shape[2:] != JOB.size:
            raise RuntimeError('cannot be\nreshaped')
        return program.run(images)
    return fail


def test_claim_is_what_was_run(programs):
    program, source, cases = programs.read(JOB), make_source(), make_cases()
    other = dataclasses.replace(program, run=run_at_own_size(program))
    assert describe_shapes(source, JOB, other, cases) == (
        'only images of 64 x 64 pixels, 1 at a time: RuntimeError: cannot be reshaped')
    fixed = dataclasses.replace(program, least={})
    assert describe_shapes(source, JOB, fixed, cases) == 'only images of 64 x 64 pixels, 1 at a time'
    batches = dataclasses.replace(other, least={'batch': 1})
    assert describe_shapes(source, JOB, batches, cases) == 'any number of images of 64 x 64 pixels (run: 3 x 64 x 64)'
    wrong = dataclasses.replace(program, run=lambda images: program.run(images) + (images.shape[2] == 101))
    with pytest.raises(VerificationError, match='takes 2 images of 101 x 70 pixels, but its outputs differ'):
        describe_shapes(source, JOB, wrong, cases)


def test_pixels_and_probabilities_of_three_heads(programs):
    job, source = make_job('onnx', input='image', output='probabilities', batch=2), make_source('care_3_heads')
    program = programs.read(job, 'care_3_heads')
    assert check(job, program, 'care_3_heads').max_error < 1e-5
    for shape in SHAPES:
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        expected = run_reference(source.normalise(pixels), 'care_3_heads').softmax(dim=-1)
        assert torch.allclose(program.run(pixels.float()), expected, atol=1e-5), shape


def test_file_has_its_metadata(programs):
    model = onnx.load(programs.write(JOB)[0])
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts['caretrans'] == __version__ and facts['checkpoint'] == 'random weights'
    assert (facts['torch'], facts['onnxscript']) == (torch.__version__, version('onnxscript'))
    assert '0.485' in facts['preprocessing'] and facts['precision'] == 'fp32' and facts['output'] == 'logits'
    assert json.loads(facts['class_names']) == programs.read(JOB).labels == make_source().class_names
    assert [(item.domain, item.version) for item in model.opset_import] == [('', onnx_format.OPSET)]
    axes = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert model.graph.input[0].name == 'input_1' and axes == ['batch', 3, 'height', 'width']
    assert model.graph.output[0].name == 'logits'


def test_operations_and_changes_of_shape_are_counted(programs):
    program = programs.read(JOB)
    assert program.operations['Conv'] == 45 and program.operations['Gelu'] == 11
    assert sum(program.operations.values()) == 188
    kinds = [line.split()[0] for line in program.shape_changes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {'Reshape': 10, 'Transpose': 3, 'Unsqueeze': 3}


def test_int8_is_smaller_and_agrees(programs):
    job = make_job('onnx', 'int8', floor=60.)
    program = programs.read(job)
    assert program.operations['QuantizeLinear'] > 100
    assert programs.write(job)[0].stat().st_size < programs.write(JOB)[0].stat().st_size / 2.5
    result = check(job, program)
    assert 0.01 < result.max_error < result.largest / 2


def drop_bias(model):
    conv = [node for node in model.graph.node if node.op_type == 'Conv'][12]
    bias = next(item for item in model.graph.initializer if item.name == conv.input[2])
    bias.raw_data = bytes(len(bias.raw_data))


def permute_classes(model):
    head, = (node for node in model.graph.node if node.op_type == 'Gemm')
    for item in model.graph.initializer:
        if item.name in head.input[1:]:
            step = len(item.raw_data) // 1000
            item.raw_data = item.raw_data[step:] + item.raw_data[:step]


def swap_labels(model):
    entry = next(entry for entry in model.metadata_props if entry.key == 'class_names')
    entry.value = json.dumps(swap_two(json.loads(entry.value)))


@pytest.mark.parametrize('spoil, message', [
    (drop_bias, 'rounding does not explain it'), (permute_classes, 'rounding does not explain it'),
    (swap_labels, 'class 2 is labelled')])
def test_spoiled_file_is_noticed(spoil, message, programs, tmp_path):
    model, broken = onnx.load(programs.write(JOB)[0]), tmp_path / 'broken.onnx'
    spoil(model)
    onnx.save(model, broken)
    with pytest.raises(VerificationError, match=message):
        check(JOB, onnx_format.read(JOB, broken))


def test_program_of_another_network_is_noticed_and_a_truncated_one_named(programs, tmp_path):
    assert_break_is_caught(JOB, programs.read(JOB))
    assert_truncation_is_named(JOB, programs.copy(JOB, tmp_path))


def test_slightly_truncated_file_is_named(programs, tmp_path):
    """Protocol buffers can be cut between two entries and still be read."""
    model, cut = onnx.load(programs.write(JOB)[0]), tmp_path / 'cut.onnx'
    del model.metadata_props[:]
    onnx.save(model, cut)
    with pytest.raises(ExportError, match='cut.onnx cannot be read'):
        onnx_format.read(JOB, cut)
