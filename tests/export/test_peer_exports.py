"""CAS-ViT and MLLA in each format: read back from the file, evaluated, compared; a broken one is refused."""
import pytest
import torch
import torch.nn as nn
from core_ml_programs import edit
from exports import change, check, make_cases, make_job, make_source, run_reference

from caretrans.export.coreml import convert
from caretrans.export.source import load_cases
from caretrans.export.verify import VerificationError, verify
from caretrans.models import mlla
from caretrans.models.inference import mlla_phone

pytestmark = pytest.mark.slow

NAMES = ('casvit', 'mlla')
FEW = 4
ERRORS = {'fp16': 5e-3, 'fp32': 5e-6}  # of the largest logit; measured 2.5e-3 and 1.5e-6
EXACT = 5e-5  # without rounding; measured 1e-5
OPERATIONS = {  # in float32; a change of these numbers is a change of the program
    'casvit': dict(conv=62, mul=20, add=16, sigmoid=16, relu=10, reduce_mean=9, gelu=8, split=4, linear=1),
    'mlla': dict(
        conv=51, add=21, matmul=16, mul=16, split=16, relu=9, layer_norm=9, silu=8, reshape=8, clip=8, concat=8,
        sub=4, log=4, softmax=4, reduce_log_sum_exp=4, exp=4, reduce_sum=4, expand_dims=4, real_div=4,
        gelu=4, reduce_mean=1, linear=1),
    'casvit_xs': dict(conv=146, mul=50, add=40, sigmoid=40, relu=22, reduce_mean=21, gelu=20, split=10, linear=1),
    'mlla_t': dict(
        conv=177, add=91, matmul=72, mul=72, split=72, layer_norm=37, silu=36, reshape=36, clip=36, concat=36,
        sub=18, log=18, softmax=18, reduce_log_sum_exp=18, exp=18, reduce_sum=18, expand_dims=18,
        real_div=18, gelu=18, relu=9, reduce_mean=1, linear=1)}
HALF = make_job('mlpackage', 'fp16', input='image', output='classes', floor=0.)  # random classes are nearly equal


# What the file computes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in ('casvit_xs', 'mlla_t'))])
def test_ml_program_in_float16_is_verified(name, programs):
    program = programs.read(HALF, name)
    result = check(HALF, program, name, FEW)
    assert result.max_error < ERRORS['fp16'] * result.largest and result.exact_error < EXACT
    assert program.operations == dict(OPERATIONS[name], cast=2, softmax=OPERATIONS[name].get('softmax', 0) + 1)
    assert len(program.shape_changes) == program.operations.get('reshape', 0)
    assert not [line for line in result.findings if 'not finite' in line]


@pytest.mark.parametrize('format, precision', [
    ('mlpackage', 'fp32'), ('mlmodel', 'fp16'), pytest.param('mlmodel', 'fp32', marks=pytest.mark.slow),
    ('onnx', 'fp32'), ('openvino', 'fp32')])
@pytest.mark.parametrize('name', NAMES)
def test_program_of_oblong_images_by_two_is_verified(name, format, precision, programs):
    job = make_job(format, precision, size=(64, 96), batch=2)
    program = programs.read(job, name)
    result = check(job, program, name, 2 * FEW)
    assert result.top1_agreement == 100 and result.max_error < ERRORS[precision] * result.largest
    assert program.labels == make_source(name).class_names
    if precision == 'fp16':
        assert result.exact_error < EXACT
    if format == 'mlmodel':
        assert not [line for line in program.shape_changes if 'transpose' in line or 'permute' in line]
    if format == 'onnx':  # one file for all sizes: the rotary code follows the image
        images = torch.randn(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(program.run(images), run_reference(images, name), atol=5e-5)


# Breaks: a program and a network that differ --------------------------------------------------------------------------

def drop_bias(model):
    convs = [module for module in model.stages[2].modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    next(conv for conv in convs[2:] if conv.bias is not None).bias.data.zero_()


def drop_gate(model):
    """The gate of the channels of the queries, or that of the attention."""
    block = model.stages[2].blocks[0]
    if hasattr(block, 'mixer'):
        block.mixer.gate_q[1] = nn.Identity().eval()
    else:
        block.act_proj.weight.data.zero_()
        block.act_proj.bias.data.fill_(1.2785)  # of which SiLU makes 1


@pytest.mark.parametrize('alter', [drop_bias, drop_gate])
@pytest.mark.parametrize('name', NAMES)
def test_program_is_refused_for_an_altered_network(name, alter, programs):
    source = change(make_source(name), alter)
    with pytest.raises(VerificationError, match='rounding does not explain it|something else; no'):
        verify(source, HALF, programs.read(HALF, name), load_cases(source, HALF.size, count=FEW))


def test_swapped_rows_and_columns_of_the_rotation_are_refused(programs, monkeypatch):
    right, job = mlla.rotary_code, make_job('mlpackage', size=(64, 96), batch=2, floor=0.)
    program = programs.read(job, 'mlla')

    def swap(x):
        return right(x.transpose(-2, -1)).transpose(-2, -1).contiguous()
    with monkeypatch.context() as patch:
        patch.setattr(mlla, 'rotary_code', swap)
        patch.setattr(mlla_phone, 'rotary_code', swap)
        with pytest.raises(VerificationError, match='rounding does not explain it'):
            verify(make_source('mlla'), job, program, load_cases(make_source('mlla'), job.size, count=FEW))
    assert check(job, program, 'mlla', FEW).max_error < 1e-4


@pytest.mark.parametrize('name, gate', [('casvit', 'sigmoid'), ('mlla', 'silu')])
def test_missing_gate_in_the_file_is_refused(name, gate, programs, tmp_path):
    def lose(spec, items):
        next(item for item in items if item.type == gate).type = 'identity'
    path = programs.copy(HALF, tmp_path, name)
    edit(path, lose)
    with pytest.raises(VerificationError, match='rounding does not explain it'):
        check(HALF, convert.read(HALF, path), name, FEW)


# float16 --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('unfused', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_phone_form_is_finite_where_the_stream_overflows_float16(unfused, tmp_path):
    """Values of the residual stream beyond 65504, which the original network cannot hold."""
    def enlarge(model):
        last = model.stages[1].downsample.project.norm
        last.weight.data *= 3e4
        last.bias.data *= 3e4
    source = change(make_source('mlla'), enlarge)
    cases = load_cases(source, (64, 64), count=FEW)
    job, path = make_job('mlpackage', 'fp16', floor=100., unfused=unfused), tmp_path / 'program.mlpackage'
    convert.write(source, job, path)
    if unfused:
        with pytest.raises(VerificationError, match='not finite'):
            verify(source, job, convert.read(job, path), cases)
        return
    result = verify(source, job, convert.read(job, path), cases)
    line = next(line for line in result.findings if line.startswith('largest magnitude'))
    assert 65504 < float(line.split()[2]) / mlla_phone.STREAM < 8 * 65504


def test_outputs_of_random_weights_stay_small():
    """Products of features amplify rounding; with weights of full size CAS-ViT reached 400."""
    assert make_cases('casvit_xs', count=FEW).logits.abs().max() < 10
