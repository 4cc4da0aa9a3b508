"""CARE as saved for Core ML computes what PyTorch computes in float64, and a file that is broken is caught."""
import copy

import pytest
import torch
from core_ml_programs import edit
from exports import change, check, make_cases, make_job, make_source

from caretrans.errors import ExportError
from caretrans.export.coreml import convert
from caretrans.export.source import build_network, load_cases
from caretrans.export.verify import VerificationError, compare, verify

pytestmark = pytest.mark.slow

IMAGES = 64
FEW = 4
ERRORS = {'fp16': 1e-2, 'fp32': 3e-6}  # of the largest logit; measured 3e-3 and 9e-7
EXACT = 1e-5  # likewise, against the network with weights of float16; measured 7e-7
FORMATS = ['mlpackage', 'mlmodel']
BOTH = pytest.mark.parametrize('job', [
    make_job(format, 'fp16', input='image', output='classes') for format in FORMATS], ids=FORMATS)

# care_s0 in full depth, (job, marks)
WHOLE = [(make_job(format, 'fp16', input='image', output='classes', size=(96, 96)), marks)
         for format, marks in (('mlpackage', ()), ('mlmodel', pytest.mark.slow))]


@pytest.mark.parametrize('precision', ['fp16', 'fp32'])
@pytest.mark.parametrize('format', FORMATS)
def test_file_equals_pytorch_in_float64(format, precision, programs):
    job = make_job(format, precision, input='image', output='classes')
    program = programs.read(job)
    result = check(job, program, count=IMAGES)
    assert result.max_error < ERRORS[precision] * result.largest
    assert result.exact_error < EXACT
    assert not [line for line in result.findings if 'not finite' in line]
    assert program.labels == make_source().class_names and not program.timed
    assert not [kind for kind in program.operations if 'transpose' in kind or 'permute' in kind]
    notes = ['computed in float32; a phone may compute it in float16']
    assert program.notes == (notes if (format, precision) == ('mlmodel', 'fp32') else [])


def compute_logits(program, kind, job, name='care'):
    """Outputs for the first images, by `run`, `run_exact` or `run_flushed`: (n, classes) float64."""
    found = []
    for pixels in make_cases(name, job.size, IMAGES).pixels[:FEW].split(1):
        output = getattr(program, kind)(make_source(name).make_ready(pixels, job))
        found.append(program.get_logits())
        assert (found[-1].softmax(dim=-1) - output).abs().max() < 1e-3
    return torch.cat(found).double()


@torch.no_grad()
def compute_expected(job, name='care'):
    """The outputs of the network in float64 with weights of float16."""
    network = build_network(make_source(name), job).half().double()
    network.probabilities = False
    return network(make_source(name).make_ready(make_cases(name, job.size, IMAGES).pixels[:FEW], job).double())


@BOTH
def test_an_exact_run_differs_from_pytorch_by_the_rounding_of_weights_alone(job, programs):
    program, expected = programs.read(job), compute_expected(job)
    exact, rounded, flushed = (compute_logits(program, kind, job) for kind in ('run_exact', 'run', 'run_flushed'))
    largest = expected.abs().max()
    assert (exact - expected).abs().max() < EXACT * largest
    for other in (rounded, flushed):
        assert 10 * EXACT * largest < (other - expected).abs().max() < ERRORS['fp16'] * largest
    assert not torch.equal(rounded, flushed)


# Deliberate breaks: each edits the file on disk, which holds operations (packages) or layers (networks) ---------------

def is_layer(item):
    return hasattr(item, 'convolution')


def of_type(items, operation, layer):
    return [item for item in items if (item.WhichOneof('layer') == layer if is_layer(item) else item.type == operation)]


def find_const(items, operation, parameter):
    """The constant that an operation takes."""
    name = operation.inputs[parameter].arguments[0].name
    const, = [item for item in items if name in [output.name for output in item.outputs]]
    return const


def shift_padding(spec, items):
    """Every 11x11 convolution looks two pixels too far up; shapes stay."""
    for item in of_type(items, 'conv', 'convolution'):
        if is_layer(item) and list(item.convolution.kernelSize) == [11, 11]:
            height = item.convolution.valid.paddingAmounts.borderAmounts[0]
            height.startEdgeSize, height.endEdgeSize = 7, 3
        elif not is_layer(item):
            padding = find_const(items, item, 'pad').attributes['val'].immediateValue.tensor.ints.values
            if list(padding) == [5, 5, 5, 5]:
                padding[:2] = [7, 3]


def drop_bias(spec, items, number=0):
    """A convolution loses its bias, by default the first."""
    chosen = of_type(items, 'conv', 'convolution')[number]
    if is_layer(chosen):
        chosen.convolution.hasBias = False
    else:
        del chosen.inputs['bias']


def drop_small_bias(spec, items):
    """A convolution far inside loses its bias, and the logits change less than rounding may change them."""
    drop_bias(spec, items, number=101)


def swap_slices(spec, items):
    """Queries and keys are swapped in all attentions: the slices of equal size."""
    for item in of_type(items, 'split', 'splitND'):
        if is_layer(item):
            sizes = list(item.splitND.splitSizes)
            if len(item.output) == 2 and (not sizes or sizes[0] == sizes[1]):
                item.output[0], item.output[1] = item.output[1], item.output[0]
        elif len(item.outputs) == 2 and item.outputs[0].type == item.outputs[1].type:
            item.outputs[0].name, item.outputs[1].name = item.outputs[1].name, item.outputs[0].name


def put_exp_for_gelu(spec, items):
    for item in of_type(items, 'gelu', 'gelu'):
        if is_layer(item):
            item.unary.type = item.unary.EXP
        else:
            item.type = 'exp'
            del item.inputs['mode']


def swap_labels(spec, items):
    if is_layer(items[0]):
        labels = spec.neuralNetworkClassifier.stringClassLabels.vector
        labels[0], labels[1] = labels[1], labels[0]
    else:
        classify, = of_type(items, 'classify', '')
        values = classify.inputs['classes'].arguments[0].value.immediateValue.list.values
        first = copy.deepcopy(values[0])
        values[0].CopyFrom(values[1])
        values[1].CopyFrom(first)


def put_inverse_for_division(spec, items):
    """x / y becomes x * inverse(y), which is x / (y + 1e-4)."""
    for number in reversed(range(len(items))):
        item = items[number]
        if item.type != 'real_div':
            continue
        inverse = copy.deepcopy(item)
        inverse.type = 'inverse'
        inverse.inputs['x'].CopyFrom(item.inputs['y'])
        del inverse.inputs['y']
        inverse.outputs[0].name += '_inverse'
        item.type = 'mul'
        item.inputs['y'].arguments[0].name = inverse.outputs[0].name
        divisor = inverse.inputs['x'].arguments[0].name
        inverse.outputs[0].type.CopyFrom(next(
            output.type for other in items for output in other.outputs if output.name == divisor))
        items.insert(number, inverse)


def read_broken(break_file, job, programs, folder, name='care'):
    broken = programs.copy(job, folder, name)
    edit(broken, break_file)
    return convert.read(job, broken)


@pytest.mark.parametrize('job, break_file, name', [
    *((make_job(format, 'fp16', input='image', output='classes'), break_file, 'care')
      for format in FORMATS for break_file in (shift_padding, drop_bias)),
    *(pytest.param(job, swap_slices, 'care_s0', marks=marks) for job, marks in WHOLE)])
def test_a_break_changes_predictions_and_is_refused(job, break_file, name, programs, tmp_path):
    program = read_broken(break_file, job, programs, tmp_path, name)
    with pytest.raises(VerificationError, match='jpg: outputs differ from PyTorch by'):
        check(job, program, name, count=IMAGES)
    cases = make_cases(name, job.size, IMAGES)
    outputs = torch.cat([program.run(make_source(name).make_ready(part, job)) for part in cases.pixels.split(1)])
    assert compare(outputs.double(), cases, job).top1_agreement < 80


@pytest.mark.parametrize('job', [pytest.param(job, marks=marks) for job, marks in WHOLE])
def test_a_missing_bias_hidden_by_rounding_is_detected_in_an_exact_run(job, programs, tmp_path):
    program = read_broken(drop_small_bias, job, programs, tmp_path, 'care_s0')
    expected = compute_expected(job, 'care_s0')
    errors = [(compute_logits(program, kind, job, 'care_s0') - expected).abs().max() / expected.abs().max()
              for kind in ('run', 'run_exact')]
    assert errors[0] < ERRORS['fp16'] and errors[1] > 100 * EXACT


@BOTH
def test_an_overflow_is_refused_with_its_operation(job, programs, tmp_path):
    program = read_broken(put_exp_for_gelu, job, programs, tmp_path)
    with pytest.raises(VerificationError, match=r'outputs are not finite; gelu\w* \(\w+\): .* values are not finite'):
        check(job, program)


@BOTH
def test_swapped_labels_are_refused(job, programs, tmp_path):
    program = read_broken(swap_labels, job, programs, tmp_path)
    with pytest.raises(VerificationError, match="class 0 is labelled 'class 1', expected 'class 0'"):
        check(job, program)


@pytest.mark.parametrize('format', FORMATS)
def test_a_file_without_labels_is_refused_where_classes_are_wanted(format, programs):
    path, _ = programs.write(make_job(format, 'fp32'), 'test_efficientnet')
    with pytest.raises(ExportError, match=f'.{format} has no labels, so it cannot name classes'):
        convert.read(make_job(format, 'fp32', output='classes'), path)


def test_an_inverse_with_its_silent_epsilon_is_refused_where_denominators_are_small(tmp_path):
    """Keys and queries that are all but 0 leave denominators of about 1e-4; the form that divides holds them."""
    def shrink(model):
        for module in model.modules():
            if hasattr(module, 'qk'):
                module.qk.bias.data -= 5
    source = change(make_source(), shrink)
    cases = load_cases(source, (64, 64), count=IMAGES)
    job, path = make_job('mlpackage', 'fp32', unfused=True), tmp_path / 'care.mlpackage'
    convert.write(source, job, path)
    assert verify(source, job, convert.read(job, path), cases).top1_agreement == 100
    edit(path, put_inverse_for_division)
    with pytest.raises(VerificationError, match='rounding does not explain it'):
        verify(source, job, convert.read(job, path), cases)
