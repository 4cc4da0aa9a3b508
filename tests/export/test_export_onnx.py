"""ONNX programs: what is saved computes what the network computes, for any batch and size; a wrong one is noticed."""
import json
from importlib.metadata import version

import onnx
import pytest
import torch
from exports import (
    assert_truncation_is_named,
    make_cases,
    make_job,
    make_source,
    prove,
    run_reference,
    save,
    write_and_read,
)

from caretrans import __version__
from caretrans.errors import ExportError
from caretrans.export import onnx_program
from caretrans.export.source import load_cases
from caretrans.export.verify import VerificationError, verify


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save('onnx', 'care_s0.onnx', tmp_path_factory)


def test_program_is_proven(saved):
    job, path, program = saved
    result = prove(job, program, path)
    assert result.top1_agreement == 100 and result.max_error < 2e-5


@pytest.mark.parametrize('name', ['care_s1', 'care_s2'])
def test_larger_networks_are_proven(name, tmp_path):
    source = make_source(name)
    job, path = make_job('onnx'), tmp_path / f'{name}.onnx'
    program = write_and_read(job, path, source)
    assert verify(source, job, program, load_cases(source, job.size, count=4), path).max_error < 2e-5
    images = torch.randn(2, 3, 96, 64)
    assert torch.allclose(program.run(images), run_reference(images, name), atol=2e-5)


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 224, 320), (2, 3, 101, 75), (1, 3, 32, 40)])
def test_program_is_right_for_any_batch_and_size(saved, shape):
    _, _, program = saved
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(program.run(images), run_reference(images), atol=2e-5)


def test_file_says_what_it_is(saved):
    _, path, program = saved
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts['caretrans'] == __version__ and facts['checkpoint'] == 'random weights'
    assert (facts['torch'], facts['onnxscript']) == (torch.__version__, version('onnxscript'))
    assert '0.485' in facts['preprocessing'] and facts['precision'] == 'fp32' and facts['output'] == 'logits'
    assert json.loads(facts['class_names']) == program.labels == make_source().class_names
    assert [(item.domain, item.version) for item in model.opset_import] == [('', onnx_program.OPSET)]
    axes = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert model.graph.input[0].name == 'input_1' and axes == ['batch', 3, 'height', 'width']
    assert model.graph.output[0].name == 'logits'


def test_operations_and_changes_of_shape_are_counted(saved):
    _, _, program = saved
    assert program.operations['Conv'] == 153 and program.operations['Gelu'] == 37
    assert sum(program.operations.values()) <= 624
    kinds = [line.split()[0] for line in program.shape_changes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {'Reshape': 37, 'Transpose': 12, 'Unsqueeze': 12}


def test_pixels_and_probabilities(tmp_path):
    job, path = make_job('onnx', input='image', output='probabilities', batch=2), tmp_path / 'care_s0.onnx'
    program = write_and_read(job, path)
    assert prove(job, program, path).max_error < 1e-5
    assert float(program.run(make_cases().pixels[:2].float()).sum()) == pytest.approx(2)


def test_int8_is_smaller_and_agrees(saved, tmp_path):
    job, path = make_job('onnx', 'int8', floor=60.), tmp_path / 'int8.onnx'
    program = write_and_read(job, path)
    assert program.operations['QuantizeLinear'] > 100
    assert path.stat().st_size < saved[1].stat().st_size / 2.5
    result = prove(job, program, path)
    assert 0.01 < result.max_error < result.largest / 2


def lose_bias(model):
    conv = [node for node in model.graph.node if node.op_type == 'Conv'][40]
    bias = next(item for item in model.graph.initializer if item.name == conv.input[2])
    bias.raw_data = bytes(len(bias.raw_data))


def permute_classes(model):
    head, = (node for node in model.graph.node if node.op_type == 'Gemm')
    for item in model.graph.initializer:
        if item.name in head.input[1:]:
            step = len(item.raw_data) // 1000
            item.raw_data = item.raw_data[step:] + item.raw_data[:step]


@pytest.mark.parametrize('spoil, said', [
    (lose_bias, 'first answers are those of PyTorch|rounding does not explain'),
    (permute_classes, 'first answers are those of PyTorch')])
def test_spoiled_file_is_noticed(spoil, said, saved, tmp_path):
    job, path, _ = saved
    model, broken = onnx.load(path), tmp_path / 'broken.onnx'
    spoil(model)
    onnx.save(model, broken)
    with pytest.raises(VerificationError, match=said):
        verify(make_source(), job, onnx_program.read(make_source(), job, broken), make_cases(), broken)


def test_swapped_labels_are_noticed(saved, tmp_path):
    job, path, _ = saved
    model, names = onnx.load(path), list(make_source().class_names)
    names[2], names[5] = names[5], names[2]
    next(entry for entry in model.metadata_props if entry.key == 'class_names').value = json.dumps(names)
    onnx.save(model, tmp_path / 'swapped.onnx')
    program = onnx_program.read(make_source(), job, tmp_path / 'swapped.onnx')
    with pytest.raises(VerificationError, match='class 2 is labelled'):
        verify(make_source(), job, program, make_cases())


def test_truncated_file_is_named(saved, tmp_path):
    copy = tmp_path / 'cut.onnx'
    copy.write_bytes(saved[1].read_bytes())
    assert_truncation_is_named(saved[0], copy)


def test_file_that_lost_its_end_alone_is_named(saved, tmp_path):
    """Protocol buffers can be cut between two entries and still be read."""
    cut = tmp_path / 'cut.onnx'
    model = onnx.load(saved[1])
    del model.metadata_props[:]
    onnx.save(model, cut)
    with pytest.raises(ExportError, match='cut.onnx cannot be read'):
        onnx_program.read(make_source(), saved[0], cut)
