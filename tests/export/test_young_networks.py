"""Networks of no or little training, whose features are as small as the eps of a norm or smaller, in float16."""
import pytest
import timm
import torch
from exports import SHALLOW, make_cases, make_job, make_source

from caretrans.export.coreml import convert
from caretrans.export.source import Source, load_cases
from caretrans.export.verify import VerificationError, verify

pytestmark = pytest.mark.slow

HALF = torch.finfo(torch.float16)


def make_young(name: str, size: float = 1., seed: int = 0) -> Source:
    """One of `SHALLOW` as it is created.

    Args:
        size: Factor of the features before the head of CARE.
    """
    torch.manual_seed(seed)
    model_name, depths, _ = SHALLOW[name]
    model = timm.create_model(model_name, depths=depths, num_classes=14).eval()
    if name == 'care':
        last = model.stages[-1].blocks[-1].inter2.dwconv
        last.weight.data *= size
        last.bias.data *= size
    return Source(model_name, model, make_source(name).eval_config, [str(number) for number in range(14)])


def export(source: Source, job, folder):
    path = folder / f'program{job.kind.suffix}'
    convert.write(source, job, path)
    program = convert.read(job, path)
    return program, verify(source, job, program, load_cases(source, job.size, count=6))


@pytest.mark.parametrize('format, name, size', [
    ('mlpackage', 'care', 1.), ('mlmodel', 'care', 1.), ('mlpackage', 'care', 300.),
    pytest.param('mlpackage', 'mlla', 1., marks=pytest.mark.slow),
    pytest.param('mlpackage', 'care', 1e5, marks=pytest.mark.slow),
    pytest.param('mlmodel', 'care', 300., marks=pytest.mark.slow),
    pytest.param('mlmodel', 'mlla', 1., marks=pytest.mark.slow),
    pytest.param('mlpackage', 'casvit', 1., marks=pytest.mark.slow),
    pytest.param('mlpackage', 'care_3_heads', 1., marks=pytest.mark.slow)])
def test_young_network_is_exported_in_float16(format, name, size, tmp_path):
    source = make_young(name, size)
    if name == 'care':
        variances = []
        source.model.head.norm.register_forward_pre_hook(lambda module, args: variances.append(args[0].var(dim=-1)))
        source.model(source.normalise(make_cases().pixels[:4]))
        variance = torch.cat(variances).max().item()
        assert variance < 1e-10 if size == 1 else 1e-7 < variance < 1e-5 if size == 300 else variance > 1e-2
    job = make_job(format, 'fp16', input='image', output='classes', size=(64, 96), floor=0.)
    _, result = export(source, job, tmp_path)
    assert result.exact_error < 1e-5 and result.max_error < 1e-2 * result.largest
    assert result.flushed_error < 0.04 * result.largest


def test_eps_of_a_young_network_is_a_normal_number_of_float16(tmp_path):
    job = make_job('mlpackage', 'fp16')
    path = tmp_path / 'program.mlpackage'
    convert.write(make_young('care'), job, path)
    spec = convert.import_coremltools().utils.load_spec(str(path))
    block, = spec.mlProgram.functions['main'].block_specializations.values()
    norm, = (item for item in block.operations if item.type == 'layer_norm')
    name = norm.inputs['epsilon'].arguments[0].name
    const, = (item for item in block.operations if name in [output.name for output in item.outputs])
    value = torch.frombuffer(
        bytearray(const.attributes['val'].immediateValue.tensor.bytes.values), dtype=torch.float16).item()
    assert value > HALF.smallest_normal


def test_wrong_eps_of_a_young_network_is_refused(tmp_path):
    """An error of 1 %, which float16 makes of a subnormal one."""
    source, job = make_young('care', 300.), make_job('mlpackage', 'fp16', size=(64, 64), floor=0.)
    program, _ = export(source, job, tmp_path)
    other = make_young('care', 300.)
    for head in (other.model.head, other.model.head_dist):
        head.norm.eps *= 1.01
    with pytest.raises(VerificationError, match='without rounding, its logits differ'):
        verify(other, job, program, load_cases(other, job.size, count=6))
