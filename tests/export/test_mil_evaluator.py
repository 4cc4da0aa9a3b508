"""ML Programs, read back from disk and evaluated operation by operation, compute what PyTorch computes."""
import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_ml_programs import (
    CASES,
    PROGRAM_CASES,
    SHAPE,
    compress_operation,
    edit,
    save_cases,
    save_operation,
    split_cases,
    values,
)
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

from caretrans.errors import ExportError
from caretrans.export.coreml.evaluator import round_half_
from caretrans.export.coreml.ml_program import read_ml_program
from caretrans.export.coreml.operations import OPERATIONS

FLOAT32 = 2e-6  # of the largest value
WEIGHT, BIAS = values(4, 6, 3, 3, seed=1), values(4, seed=2)


def assert_close(found, expected, tolerance=FLOAT32):
    assert found.shape == (1, expected.numel())
    assert (found.flatten() - expected.flatten()).abs().max() <= tolerance * expected.abs().max()


ALL = {**CASES, **PROGRAM_CASES}


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    """All operations in one program."""
    return read_ml_program(save_cases(ALL, tmp_path_factory.mktemp('operations') / 'a.mlpackage'))


@pytest.fixture(scope='module')
def compared(program):
    x = values(*SHAPE)
    return split_cases(ALL, program.run(x), x)


@pytest.mark.parametrize('name', ALL)
def test_an_operation_equals_that_of_pytorch(name, compared):
    found, expected = compared[name]
    assert (found - expected).abs().max() <= FLOAT32 * expected.abs().max()


def test_each_operation_that_is_known_is_tested(program):
    assert set(program.operations) == set(OPERATIONS)


@pytest.mark.parametrize('target', [ct.target.iOS15, ct.target.iOS16, ct.target.iOS18, ct.target.iOS26])
def test_programs_of_all_targets_are_read(target, tmp_path):
    operation, expected = CASES['conv 3x3, custom padding of four sizes']
    x = values(*SHAPE)
    assert_close(read_ml_program(save_operation(operation, tmp_path / 'a.mlpackage', target)).run(x), expected(x))


# Numbers --------------------------------------------------------------------------------------------------------------

def conv(x, weight=WEIGHT, bias=BIAS):
    dtype = types.nptype_from_builtin(x.dtype)
    return mb.conv(x=x, weight=weight.numpy().astype(dtype), bias=bias.numpy().astype(dtype), pad_type='valid')


def test_float16_is_rounded_after_each_operation_and_summed_in_float32(tmp_path):
    path = save_operation(lambda x: mb.exp(x=conv(x)), tmp_path / 'a.mlpackage', half=True)
    x = values(*SHAPE)
    y = F.conv2d(x.half().float(), WEIGHT.half().float(), BIAS.half().float()).half().float()
    found = read_ml_program(path).run(x)
    assert torch.equal(found.flatten(), y.exp().half().float().flatten())
    assert not torch.equal(found, found.bfloat16().float())
    assert not torch.equal(read_ml_program(save_operation(
        lambda x: mb.exp(x=conv(x)), tmp_path / 'b.mlpackage')).run(x), found)


def test_rounding_to_float16_is_that_of_numpy():
    x = torch.cat([values(1000) * 10. ** values(1000, seed=1), torch.tensor([65519., 65520., 1e-8, 0., -70000.])])
    with np.errstate(over='ignore'):
        expected = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32))
    assert torch.equal(round_half_(x.clone()), expected)


def test_an_overflow_is_found_with_its_operation_and_count(tmp_path):
    path = save_operation(
        lambda x: mb.tanh(x=mb.exp(x=x, name='grow'), name='squash'), tmp_path / 'a.mlpackage', half=True)
    program = read_ml_program(path)
    x = torch.zeros(SHAPE)
    x[0, 0, 0, :3] = 12.  # exp(12) = 162755
    assert bool(program.run(x).isfinite().all())
    assert program.findings.describe() == [
        'largest magnitude: 1 of 65504 in squash (tanh)',  # of the finite ones: exp gave infinity and 1
        'grow (exp): 3 of 210 values are not finite']
    assert bool(program.run_exact(x).isfinite().all())


def test_numbers_that_are_not_numbers_are_found(tmp_path):
    program = read_ml_program(save_operation(lambda x: mb.sqrt(x=x, name='root'), tmp_path / 'a.mlpackage'))
    program.run(-torch.ones(SHAPE))
    assert program.findings.describe() == ['root (sqrt): 210 of 210 values are not finite']


def test_subnormal_numbers_are_found_and_flushed_where_asked(tmp_path):
    path = save_operation(lambda x: mb.exp(x=mb.exp(x=x, name='tiny'), name='one'), tmp_path / 'a.mlpackage', half=True)
    x = torch.zeros(SHAPE)
    x[0, 1] = -10.  # exp(-10) = 4.5e-5
    program = read_ml_program(path)
    assert bool((program.run(x)[0, 35:70] == 1).all())
    lines = program.findings.describe()
    assert lines == ['largest magnitude: 2.719 of 65504 in one (exp)',
                     'tiny (exp): 35 of 210 values are subnormal in float16 (16.67%)']
    program.run_flushed(x)
    program.run_exact(x)
    assert program.findings.describe() == lines


def test_flushing_changes_subnormal_numbers(tmp_path):
    program = read_ml_program(save_operation(
        lambda x: mb.mul(x=mb.exp(x=x), y=np.float16(1000)), tmp_path / 'a.mlpackage', half=True))
    x = torch.full(SHAPE, -10.)
    assert bool((program.run(x) > .04).all())
    assert bool((program.run_flushed(x) == 0).all())
    assert bool((program.run(x) > .04).all())


def test_subnormal_weights_are_found_and_flushed_where_asked(tmp_path):
    weight = torch.where(torch.arange(6) < 2, 1e-5, 1.).expand(4, 6)[..., None, None]
    path = save_operation(
        lambda x: mb.conv(x=x, weight=weight.numpy().astype(np.float16), pad_type='valid', name='small'),
        tmp_path / 'a.mlpackage', half=True)
    x = torch.zeros(SHAPE)
    x[0, 0] = 1000.
    program = read_ml_program(path)
    assert program.findings.describe() == ['weight of small (conv): 8 of 24 values are subnormal in float16 (33.33%)']
    assert bool((program.run(x) > 9e-3).all()) and bool((program.run_flushed(x) == 0).all())


def test_subnormal_constants_in_a_list_are_flushed_where_asked(tmp_path):
    constant = np.full((1, 6, 5, 1), 1e-5, np.float16)
    program = read_ml_program(save_operation(
        lambda x: mb.concat(values=[x, constant], axis=-1), tmp_path / 'a.mlpackage', half=True))
    kept, flushed = (run(torch.ones(SHAPE)).reshape(6, 5, 8) for run in (program.run, program.run_flushed))
    assert bool((kept[..., 7] > 0).all()) and bool((flushed[..., 7] == 0).all())
    assert torch.equal(kept[..., :7], flushed[..., :7])


def test_all_findings_are_listed_the_worst_first(tmp_path):
    """Ten operations with subnormal results, one that loses numbers, one that overflows."""
    def operation(x):
        for number in range(10):
            x = mb.mul(x=mb.mul(x=x, y=np.float16(.25), name=f'tiny_{number}'), y=np.float16(4), name=f'mul_{number}')
        x = mb.mul(x=x, y=np.float16(1e-4), name='lost')
        return mb.mul(x=x, y=np.float16(60000), name='back')
    program = read_ml_program(save_operation(operation, tmp_path / 'a.mlpackage', half=True))
    x = torch.zeros(SHAPE)
    x[0, 0], x[0, 1, 0, 0], x[0, 2, 0, :2] = 2. ** -13, 65504, 65000
    program.run(x)
    lines = program.findings.describe()
    assert lines[0] == 'largest magnitude: 6.55e+04 of 65504 in mul_0 (mul)'
    assert lines[1] == 'back (mul): 3 of 210 values are not finite'
    assert lines[2] == 'lost (mul): 35 of 210 values underflow to 0 in float16 (16.67%)'
    assert [line.split(' ')[0] for line in lines[3:]] == [f'tiny_{number}' for number in range(10)]


def test_a_program_in_float32_has_one_result_for_all_kinds_of_runs(tmp_path):
    program = read_ml_program(save_operation(lambda x: mb.exp(x=conv(x), name='e'), tmp_path / 'a.mlpackage'))
    x = values(*SHAPE)
    wanted = program.run(x)
    assert torch.equal(program.run_exact(x), wanted) and torch.equal(program.run_flushed(x), wanted)
    line, = program.findings.describe()
    assert line.startswith('largest magnitude: ') and line.endswith(' in e (exp)') and '65504' not in line


def test_an_exact_run_rounds_the_weights_alone(tmp_path):
    operation = lambda x: mb.cast(x=mb.exp(x=conv(mb.cast(x=x, dtype='fp16'))), dtype='fp32')  # noqa: E731
    program = read_ml_program(save_operation(operation, tmp_path / 'a.mlpackage'))
    x = values(*SHAPE)
    exact = F.conv2d(x.double(), WEIGHT.half().double(), BIAS.half().double()).exp().float()
    assert_close(program.run_exact(x), exact, 1e-5)
    assert (program.run(x).flatten() - exact.flatten()).abs().max() > 1e-4 * exact.max()
    assert not torch.equal(program.run_exact(x), program.run_exact(x).half().float())


# Logits ---------------------------------------------------------------------------------------------------------------

def scores(x):
    return mb.reduce_mean(x=mb.mul(x=x, y=np.float16(3)), axes=[2, 3], keep_dims=False)


def test_logits_are_the_input_of_the_last_softmax_in_the_last_run(tmp_path):
    program = read_ml_program(save_operation(
        lambda x: mb.cast(x=mb.softmax(x=scores(x), axis=-1), dtype='fp32'), tmp_path / 'a.mlpackage', half=True))
    x, program = values(*SHAPE) * 1e-4, program.to_program()
    found = []
    for run in (program.run, program.run_exact, program.run_flushed):
        output = run(x)
        found.append(program.get_logits())
        assert found[-1].shape == (1, 6) and found[-1].dtype == torch.float32
        assert (found[-1].softmax(dim=-1) - output).abs().max() < 1e-3
    rounded, exact, flushed = found
    assert_close(exact, 3 * x.mean(dim=(2, 3)), 1e-5)
    assert torch.equal(rounded, rounded.half().float()) and not torch.equal(rounded, exact)
    assert bool((flushed == 0).any()) and not torch.equal(rounded, flushed)


@pytest.mark.parametrize('operation', [
    lambda x: scores(mb.softmax(x=x, axis=-1)),
    lambda x: mb.mul(x=mb.softmax(x=scores(x), axis=-1), y=np.float16(2)),
    lambda x: mb.slice_by_index(x=mb.softmax(x=scores(x), axis=-1), begin=[0, 0], end=[1, 3])])
def test_programs_that_end_otherwise_have_no_logits(operation, tmp_path):
    program = read_ml_program(save_operation(operation, tmp_path / 'a.mlpackage', half=True)).to_program()
    assert program.get_logits is None


def test_images_that_are_given_stay_as_they_are(tmp_path):
    program = read_ml_program(save_operation(lambda x: mb.exp(x=x), tmp_path / 'a.mlpackage', half=True))
    x = values(*SHAPE)
    before = x.clone()
    assert torch.equal(program.run(x), program.run(x)) and torch.equal(x, before)


# Weights that are compressed ------------------------------------------------------------------------------------------

def quantise(mode, **settings):
    config = cto.OpLinearQuantizerConfig(mode=mode, weight_threshold=0, **settings)
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))


def palettise(bits, **settings):
    config = cto.OpPalettizerConfig(mode='uniform', nbits=bits, weight_threshold=0, **settings)
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))


@pytest.mark.parametrize('name, target, compress, steps', [
    ('int8', ct.target.iOS16, quantise('linear_symmetric'), 254),
    ('int8 with a zero point', ct.target.iOS16, quantise('linear'), 255),
    ('int8', ct.target.iOS18, quantise('linear_symmetric'), 254),
    ('int4 by blocks', ct.target.iOS18,
     quantise('linear', dtype='int4', granularity='per_block', block_size=3), 15),
    ('palette of 6 bits', ct.target.iOS16, palettise(6), 63),
    ('palette of 4 bits', ct.target.iOS16, palettise(4), 15),
    ('palette of 4 bits for each two channels', ct.target.iOS18,
     palettise(4, granularity='per_grouped_channel', group_size=2), 15)])
def test_compressed_weights_are_decoded(name, target, compress, steps, tmp_path):
    """Each weight is off by half a step at most, so that an output is off by less than half of all steps together."""
    x = values(*SHAPE)
    program = read_ml_program(compress_operation(conv, tmp_path / 'a.mlpackage', target, compress))
    exact = F.conv2d(x, WEIGHT, BIAS).flatten()
    error = (program.run(x).flatten() - exact).abs().max()
    step = (WEIGHT.max() - WEIGHT.min()) / steps
    bound = F.conv2d(x.abs(), torch.ones_like(WEIGHT)).max() * step / 2
    assert 0 < error < bound
    assert program.operations == {'conv': 1, 'reshape': 1}


def test_weights_of_a_palette_are_those_of_its_table(tmp_path):
    """A kernel that picks single pixels shows each weight as it was decoded."""
    path = compress_operation(
        lambda x: mb.conv(x=x, weight=values(8, 6, 1, 1, seed=3).numpy(), pad_type='valid'), tmp_path / 'a.mlpackage',
        ct.target.iOS16, palettise(2))
    x = torch.zeros(SHAPE)
    x[0, range(5), range(5), range(5)] = 1
    weight = read_ml_program(path).run(x).reshape(8, 5, 7)[:, range(5), range(5)]
    table = values(8, 6, 1, 1, seed=3).aminmax()
    table = torch.linspace(float(table.min), float(table.max), 4)
    nearest = table[(values(8, 6, 1, 1, seed=3)[:, :5, 0, 0, None] - table).abs().argmin(dim=-1)]
    assert (weight - nearest).abs().max() < 1e-6


# Files ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def package(tmp_path):
    return save_operation(conv, tmp_path / 'a.mlpackage')


def test_missing_files_are_named_with_the_remedy(package, tmp_path):
    with pytest.raises(ExportError, match='none.mlpackage cannot be read .* or export it again'):
        read_ml_program(tmp_path / 'none.mlpackage')
    (package / 'Data' / 'com.apple.CoreML' / 'weights' / 'weight.bin').unlink()
    with pytest.raises(ExportError, match='a.mlpackage cannot be read .*weight.bin.* Copy the complete file again'):
        read_ml_program(package)


@pytest.mark.parametrize('name', ['weights/weight.bin', 'model.mlmodel', '../../Manifest.json'])
def test_a_truncated_file_is_an_error_with_the_remedy(name, package):
    file = package / 'Data' / 'com.apple.CoreML' / name
    content = file.read_bytes()
    for share in 0, .3, .99:
        file.write_bytes(content[:int(share * len(content))])
        with pytest.raises(ExportError, match='a.mlpackage cannot be read .* export it again'):
            read_ml_program(package)


def test_a_shape_other_than_declared_is_an_error(package):
    def change(spec, operations):
        operation, = [item for item in operations if item.type == 'conv']
        operation.outputs[0].type.tensorType.dimensions[2].constant.size += 1
    edit(package, change)
    with pytest.raises(ExportError, match='a.mlpackage'):
        read_ml_program(package)


def test_images_of_another_shape_are_refused(package):
    with pytest.raises(ExportError, match=r'expects images of \(1, 6, 5, 7\), not \(1, 6, 7, 5\)'):
        read_ml_program(package).run(values(1, 6, 7, 5))


@pytest.mark.parametrize('operation, message', [
    (lambda x: mb.cumsum(x=x, name='odd'), "odd is an operation 'cumsum', which the evaluator does not know"),
    (lambda x: mb.conv(x=x, weight=WEIGHT.numpy(), pad_type='same', strides=[2, 2]),
     "padding 'same' .* strides .* is not modelled"),
    (lambda x: mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=np.float32(1.5), scale_factor_width=np.float32(2)),
     'upsampling by .* is not modelled')])
def test_an_operation_that_cannot_be_evaluated_is_named(operation, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_ml_program(save_operation(operation, tmp_path / 'a.mlpackage'))


def test_operations_are_counted_and_changes_of_shape_listed(tmp_path):
    path = save_operation(
        lambda x: mb.transpose(x=mb.exp(x=mb.reshape(x=x, shape=(2, 3, 35), name='a')), perm=[2, 0, 1], name='b'),
        tmp_path / 'a.mlpackage')
    program = read_ml_program(path).to_program()
    assert program.operations == {'reshape': 2, 'exp': 1, 'transpose': 1}
    assert program.shape_changes == [
        'a (reshape): (1, 6, 5, 7) -> (2, 3, 35)', 'b (transpose): (2, 3, 35) -> (35, 2, 3)',
        'row (reshape): (35, 2, 3) -> (1, 210)']
    assert not program.timed and program.labels is None
