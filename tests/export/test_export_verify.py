"""Verification notices what is wrong with a program."""
import pytest
import torch
from exports import check, make_cases, make_job, make_source

from caretrans.errors import DataError
from caretrans.export.program import Program
from caretrans.export.source import build_network, load_cases
from caretrans.export.verify import VerificationError, compare


def make_program(job, change=lambda logits: logits, **kwargs):
    network = build_network(make_source(), job)

    def run(images):
        with torch.no_grad():
            return change(network(images))
    return Program(run, 'a stand-in', **kwargs)


@pytest.mark.parametrize('kwargs', [
    {}, dict(input='image'), dict(output='probabilities'), dict(batch=4), dict(unfused=True), dict(format='mlpackage'),
    dict(format='mlpackage', input='image', output='classes', batch=3)])
def test_right_program_passes(kwargs):
    job = make_job(**kwargs)
    result = check(job, make_program(job, labels=make_source().class_names))
    assert result.images == 14
    assert result.max_error < 1e-5 * result.largest
    assert result.top1_agreement == result.top5_agreement == 100


def test_wrong_normalisation_is_noticed():
    job = make_job(input='image')
    wrong = make_program(make_job(), lambda logits: logits)  # does not normalise
    with pytest.raises(VerificationError, match='rounding does not explain it'):
        check(job, wrong)


@pytest.mark.parametrize('precision, shift, noticed', [
    ('fp32', 1e-2, True), ('fp32', 1e-5, False), ('fp16', 0.2, True), ('fp16', 1e-2, False), ('int8', 0.2, False)])
def test_errors_that_rounding_does_not_explain_are_noticed(precision, shift, noticed):
    """A constant added to all classes changes no prediction."""
    program = make_program(make_job(), lambda logits: logits + shift)
    job = make_job(format='onnx', precision=precision)
    if noticed:
        with pytest.raises(VerificationError, match='rounding does not explain it'):
            check(job, program)
    else:
        assert check(job, program).top1_agreement == 100


@pytest.mark.parametrize('precision, said', [
    ('fp32', 'rounding does not explain it'), ('int8', '0.00 % of 3 images .* at least 85 % of 14 must')])
def test_swapped_classes_are_noticed(precision, said):
    job = make_job('onnx', precision)
    with pytest.raises(VerificationError, match=said):
        check(job, make_program(job, lambda logits: logits.flip(1)))


@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('spoil, said', [
    (lambda logits: logits + 1, 'outputs differ from PyTorch by 1, more than 0.0001 of the largest'),
    (lambda logits: logits * float('nan'), 'outputs are not finite')])
def test_verification_stops_at_the_first_image_that_fails_and_names_it(batch, spoil, said):
    job, seen = make_job(batch=batch), []
    network = build_network(make_source(), job)

    def run(images):
        first = len(seen)
        seen.extend(images)
        logits = network(images).detach()
        if first <= 9 < len(seen):
            logits[9 - first] = spoil(logits[9 - first])
        return logits
    with pytest.raises(VerificationError, match=said) as caught:
        check(job, Program(run, 'a stand-in'))
    assert make_cases().images[9] in str(caught.value) and make_cases().images[9].endswith('.jpg')
    assert len(seen) == (10 if batch == 1 else 12) == caught.value.verification.images


def test_outputs_that_are_not_finite_are_noticed_with_their_operation():
    job = make_job(floor=0.)
    program = make_program(
        job, lambda logits: logits * float('inf'), find=lambda: ['op_7 (conv): 3 values are not finite'])
    with pytest.raises(VerificationError, match=r'jpg: outputs are not finite; op_7 \(conv\)'):
        check(job, program)


def test_one_image_that_is_not_finite_is_noticed():
    job, calls = make_job(floor=0.), []

    def spoil(logits):
        calls.append(1)
        return logits / (0. if len(calls) == 9 else 1.)
    with pytest.raises(VerificationError, match='not finite'):
        check(job, make_program(job, spoil))


def test_other_number_of_classes_is_noticed():
    job = make_job()
    with pytest.raises(VerificationError, match='returns 999 numbers per image, the network has 1000 classes'):
        check(job, make_program(job, lambda logits: logits[:, 1:]))


def test_swapped_labels_are_noticed():
    job = make_job()
    labels = list(make_source().class_names)
    labels[3], labels[7] = labels[7], labels[3]
    with pytest.raises(VerificationError, match='class 3 is labelled'):
        check(job, make_program(job, labels=labels))
    with pytest.raises(VerificationError, match='the program has 2 labels for 1000 classes'):
        check(job, make_program(job, labels=make_source().class_names[:2]))


def drop_bias(network):
    """A bias of the last expansion of the third stage: rounding to float16 hides it."""
    network.network.stages[2].blocks[-1].inter1.expand.bias.data[3] += 0.02


def make_half_program(job, spoil=lambda network: None):
    """A program read from a float16 file: weights are rounded, and outputs of `run` too."""
    network = build_network(make_source(), job)
    spoil(network)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.copy_(tensor.half())
    seen = []

    def run(images):
        with torch.no_grad():
            seen[:] = [network.network(network.prepare(images))]
            return network(images)
    return Program(
        lambda images: run(images).half().float(), 'a stand-in', make_source().class_names, run_exact=run,
        run_flushed=lambda images: run(images) + 0.125, get_logits=lambda: seen[0])


@pytest.mark.parametrize('output', ['logits', 'probabilities', 'classes'])
def test_mistakes_below_the_rounding_are_noticed_where_it_can_be_skipped(output):
    job = make_job(format='mlpackage', precision='fp16', input='image', output=output)
    result = check(job, make_half_program(job))
    assert result.compared == 'logits' and result.largest > 1
    assert 0 < result.exact_error < 1e-5
    wrong = make_half_program(job, drop_bias)
    wrong_without = Program(**{**vars(wrong), 'run_exact': None})
    assert check(job, wrong_without).exact_error is None  # goes unseen
    with pytest.raises(VerificationError, match='without rounding, its logits differ .* something else'):
        check(job, wrong)


def test_weights_that_converters_round_after_folding_are_not_held_to_those_of_the_file():
    job = make_job(format='mlpackage', precision='fp16', input='image', unfused=True)
    result = check(job, make_half_program(job))
    assert result.exact_error is None and result.flushed_error is not None


def test_flushing_is_measured():
    job = make_job(format='mlpackage', precision='fp16', input='image')
    program = make_half_program(job)
    program = Program(**{**vars(program), 'get_logits': None})
    result = check(job, program)
    assert result.flushed_error == pytest.approx(0.125, abs=0.02)


def test_effect_of_flushing_is_limited():
    job = make_job(format='mlpackage', precision='fp16', input='image')
    program = make_half_program(job)
    flushed = lambda images: program.run(images) + 0.1 * make_cases().logits.abs().max()  # noqa: E731
    with pytest.raises(VerificationError, match='flushed to 0, .* more than 0.05 of the largest.* --precision fp32'):
        check(job, Program(**{**vars(program), 'run_flushed': flushed, 'get_logits': None}))


def test_classifier_without_labels_is_noticed():
    job = make_job(format='mlpackage', output='classes')
    with pytest.raises(VerificationError, match='the program has no class labels'):
        check(job, make_program(job))


def test_figures_are_those_of_their_definition():
    cases = make_cases()
    outputs = cases.logits.clone()
    outputs[0] = outputs[0].roll(1)
    outputs[1] += 0.25
    result = compare(outputs, cases, make_job())
    assert result.top1_agreement == pytest.approx(100 * 13 / 14)
    expected = (outputs - cases.logits).abs()
    assert result.max_error == expected.max().item() and result.mean_error == expected.mean().item()
    best, found = cases.logits[0].topk(5).indices.tolist(), outputs[0].topk(5).indices.tolist()
    assert result.top5_agreement == pytest.approx(100 * (13 + len(set(best) & set(found)) / 5) / 14)


def test_last_batch_is_filled_up_and_cut_again():
    job, sizes = make_job(batch=4), []
    check(job, make_program(job, lambda logits: sizes.append(len(logits)) or logits))
    assert sizes == [4, 4, 4, 4]


def test_missing_images_are_named(tmp_path):
    with pytest.raises(DataError, match='No images at .*nowhere: name a folder'):
        load_cases(make_source(), (64, 64), str(tmp_path / 'nowhere'))
