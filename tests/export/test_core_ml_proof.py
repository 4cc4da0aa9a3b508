"""care_s0 as saved for Core ML computes what PyTorch computes in float64, and a file that is broken is caught."""
import copy
import functools
import shutil

import exports
import pytest
import torch
from core_ml_programs import edit, save_network
from exports import make_cases, make_source

from caretrans.errors import ExportError
from caretrans.export import coreml
from caretrans.export.mil_evaluator import read_ml_program
from caretrans.export.network_evaluator import read_network
from caretrans.export.source import build_network, load_cases
from caretrans.export.verify import VerificationError, verify

SIZE = (96, 96)
SAMPLE_IMAGES = 64
FEW = 4
ERRORS = {'fp16': 1e-2, 'fp32': 3e-6}  # of the largest logit; measured 3e-3 and 9e-7
EXACT = 1e-5  # likewise, against the network with weights of float16; measured 7e-7
BOTH = pytest.mark.parametrize('format', ['mlpackage', 'mlmodel'])


@pytest.fixture(scope='module')
def source():
    return make_source()


@pytest.fixture(scope='module')
def cases():
    return make_cases(size=SIZE, count=SAMPLE_IMAGES)


make_job = functools.partial(exports.make_job, input='image', size=SIZE)


def read(path, job):
    if job.format == 'mlmodel':
        return read_network(path, half=job.precision == 'fp16')
    return read_ml_program(path)


@pytest.fixture(scope='module')
def saved(source, tmp_path_factory):
    """Saves the network of a job once, and gives the path."""
    paths = {}

    def save(job):
        if job not in paths:
            paths[job] = save_network(source, job, tmp_path_factory.mktemp('saved') / f'care_s0.{job.format}')
        return paths[job]
    return save


@BOTH
@pytest.mark.parametrize('precision, output', [('fp16', 'classes'), ('fp32', 'logits')])
def test_care_s0_equals_pytorch_in_float64(format, precision, output, source, cases, saved):
    job = make_job(format, precision, output=output)
    evaluator = read(saved(job), job)
    result = verify(source, job, evaluator.to_program(), cases)
    assert result.max_error < ERRORS[precision] * result.largest
    assert not [line for line in result.findings if 'not finite' in line]
    assert evaluator.labels == (source.class_names if output == 'classes' else None)
    assert 'transpose' not in evaluator.operations


def compute_logits(program, kind, source, job, cases):
    """Of the first photographs, by `run`, `run_exact` or `run_flushed`: (n, classes) float64."""
    found = []
    for pixels in cases.pixels[:FEW].split(1):
        output = getattr(program, kind)(source.make_ready(pixels, job))
        found.append(program.get_logits())
        assert (found[-1].softmax(dim=-1) - output).abs().max() < 1e-3
    return torch.cat(found).double()


@torch.no_grad()
def compute_expected(source, job, cases):
    """What the network gives in float64 when its weights are those of float16."""
    network = build_network(source, job).half().double()
    network.probabilities = False
    return network(source.make_ready(cases.pixels[:FEW], job).double())


@BOTH
def test_an_exact_run_differs_from_pytorch_by_the_rounding_of_weights_alone(format, source, cases, saved):
    job = make_job(format, 'fp16', output='classes')
    program = read(saved(job), job).to_program()
    expected = compute_expected(source, job, cases)
    exact, rounded, flushed = (
        compute_logits(program, kind, source, job, cases) for kind in ('run_exact', 'run', 'run_flushed'))
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


def lose_bias(spec, items, number=0):
    """A convolution loses its bias, the first if nothing is said."""
    chosen = of_type(items, 'conv', 'convolution')[number]
    if is_layer(chosen):
        chosen.convolution.hasBias = False
    else:
        del chosen.inputs['bias']


def lose_small_bias(spec, items):
    """A convolution far inside loses its bias, and the logits change less than rounding may change them."""
    lose_bias(spec, items, number=101)


def swap_slices(spec, items):
    """Queries and keys change places, wherever there are attentions: the slices that are equal in size."""
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


def save_broken(break_file, path, folder):
    """Break a copy of what is saved; gives its path."""
    broken = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, broken)
    edit(broken, break_file)
    return broken


def verify_broken(break_file, job, source, cases, saved, folder):
    broken = save_broken(break_file, saved(job), folder)
    return verify(source, job, read(broken, job).to_program(), cases, broken)


@BOTH
@pytest.mark.parametrize('break_file', [shift_padding, lose_bias, swap_slices])
def test_a_break_changes_answers_and_is_refused(break_file, format, source, cases, saved, tmp_path):
    job = make_job(format, 'fp16', output='classes')
    with pytest.raises(VerificationError, match='first answers are those of PyTorch, at least 97 % must be') as caught:
        verify_broken(break_file, job, source, cases, saved, tmp_path)
    assert caught.value.verification.top1_agreement < 80


@BOTH
def test_a_lost_bias_that_rounding_hides_is_seen_in_an_exact_run(format, source, cases, saved, tmp_path):
    job = make_job(format, 'fp16', output='classes')
    program = read(save_broken(lose_small_bias, saved(job), tmp_path), job).to_program()
    expected = compute_expected(source, job, cases)
    errors = [(compute_logits(program, kind, source, job, cases) - expected).abs().max() / expected.abs().max()
              for kind in ('run', 'run_exact')]
    assert errors[0] < ERRORS['fp16'] and errors[1] > 100 * EXACT


@BOTH
def test_a_file_without_labels_is_refused_where_classes_are_wanted(format, source, saved):
    path = saved(make_job(format, 'fp32'))
    with pytest.raises(ExportError, match=f'care_s0.{format} has no labels, so it cannot give classes'):
        coreml.read(source, make_job(format, 'fp32', output='classes'), path)


@BOTH
def test_a_network_in_float32_says_that_phones_may_round(format, saved):
    job = make_job(format, 'fp32')
    notes = coreml.evaluate(saved(job), job).notes
    assert notes == (['computed in float32; a phone may compute it in float16'] if format == 'mlmodel' else [])


@BOTH
def test_an_overflow_is_refused_with_its_operation(format, source, cases, saved, tmp_path):
    job = make_job(format, 'fp16', output='classes')
    with pytest.raises(VerificationError, match=r'outputs are not finite; gelu\w* \(\w+\): .* values are not finite'):
        verify_broken(put_exp_for_gelu, job, source, cases, saved, tmp_path)


@BOTH
def test_swapped_labels_are_refused(format, source, cases, saved, tmp_path):
    job = make_job(format, 'fp16', output='classes')
    first, second = source.class_names[:2]
    with pytest.raises(VerificationError) as caught:
        verify_broken(swap_labels, job, source, cases, saved, tmp_path)
    assert f'class 0 is labelled {second!r}, it should be {first!r}' in str(caught.value)


def test_an_inverse_with_its_silent_epsilon_is_refused_where_denominators_are_small(source, tmp_path_factory, tmp_path):
    """Keys and queries that are all but 0 leave denominators of about 1e-4; the form that divides holds them."""
    model = copy.deepcopy(source.model)
    for module in model.modules():
        if hasattr(module, 'qk'):
            module.qk.bias.data -= 5
    small = copy.copy(source)
    small.model = model
    cases = load_cases(small, (64, 64), count=SAMPLE_IMAGES)
    job = make_job('mlpackage', 'fp32', size=(64, 64), unfused=True)
    path = save_network(small, job, tmp_path_factory.mktemp('saved') / 'care_s0.mlpackage')
    assert verify(small, job, read(path, job).to_program(), cases).top1_agreement == 100
    with pytest.raises(VerificationError, match='first answers are those of PyTorch'):
        verify_broken(put_inverse_for_division, job, small, cases, lambda job: path, tmp_path)
