"""Figures of an evaluation, compared with values computed by hand."""
import copy
import csv
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode)

from caretrans.errors import DataError
from caretrans.evaluation.metrics import (
    ClassScore, Mistake, Predictions, evaluate, evaluate_in_detail, list_worst, tabulate_classes, write_classes)

CPU = torch.device('cpu')


class Batches:
    """A loader of given batches."""

    def __init__(self, batches, unreadable=()):
        self.batches, self.unreadable = batches, list(unreadable)

    def run(self):
        return iter(self.batches)


class Given(nn.Module):
    """A model that returns its input as logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes, self.calls = num_classes, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def make_images(count: int, classes: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


# Six classes; per row the logits, then the label.
LOGITS = [
    ([9., 5., 4., 3., 2., 1.], 0),  # right
    ([9., 5., 4., 3., 2., 1.], 1),  # mistaken for 0, second
    ([9., 5., 4., 3., 2., 1.], 5),  # mistaken for 0, sixth: not within five
    ([1., 2., 3., 4., 5., 9.], 5),  # right
    ([1., 2., 3., 4., 9., 5.], 5),  # mistaken for 4, second
    ([1., 9., 3., 4., 2., 5.], 0),  # mistaken for 1, sixth
    ([0., 9., 3., 4., 2., 5.], 1),  # right
]
CONFUSION = [
    [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6, [0] * 6, [0] * 6, [1, 0, 0, 0, 1, 1]]


def make_batch():
    return torch.tensor([logits for logits, _ in LOGITS]), torch.tensor([label for _, label in LOGITS])


def test_figures_equal_those_computed_by_hand():
    logits, labels = make_batch()
    result, details = evaluate_in_detail(Given(6), Batches([(logits[:4], labels[:4]), (logits[4:], labels[4:])]), CPU)
    losses = [math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in LOGITS]
    assert result.images == 7 and result.top1 == 100 * 3 / 7 and result.top5 == 100 * 5 / 7
    assert result.loss == pytest.approx(sum(losses) / 7, rel=1e-6) and result.unreadable == []
    assert details.confusion.tolist() == CONFUSION and details.top5_correct.tolist() == [1, 2, 0, 0, 0, 2]
    assert details.predictions[:, 0].tolist() == [0, 0, 0, 5, 4, 1, 1]
    assert details.predictions[6].tolist() == [1, 5, 3, 2, 4]


def test_figures_of_many_images_equal_their_ranks():
    logits, labels = make_images(501, 10)
    result = evaluate(Given(10), Batches(list(zip(logits.split(64), labels.split(64), strict=True))), CPU)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert result.images == 501
    assert result.top1 == 100 * (ranks < 1).sum().item() / 501
    assert result.top5 == 100 * (ranks < 5).sum().item() / 501
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)


def test_figures_do_not_depend_on_the_batches():
    logits, labels = make_images(101, 10)
    results = [evaluate(Given(10), Batches(list(zip(logits.split(size), labels.split(size), strict=True))), CPU)
               for size in (1, 7, 101)]
    for result in results:
        assert (result.images, result.top1, result.top5) == (results[0].images, results[0].top1, results[0].top5)
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


@pytest.mark.parametrize('classes', [2, 3, 4, 5])
def test_top5_of_at_most_five_classes_is_always_right(classes):
    logits, labels = make_images(20, classes)
    result = evaluate(Given(classes), Batches([(logits, labels)]), CPU)
    assert result.top5 == 100 and result.top1 == 100 * (logits.argmax(1) == labels).sum().item() / 20


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_equal_logits_count_as_one_prediction(dtype):
    """Ties score one class in ten for top-1 and five in ten for top-5, not all of them."""
    labels = torch.arange(10).repeat(3)
    result, details = evaluate_in_detail(Given(10), Batches([(torch.ones(30, 10, dtype=dtype), labels)]), CPU)
    assert result.top1 == 10 and result.top5 == 50 and result.loss == pytest.approx(math.log(10), rel=1e-6)
    assert details.confusion.diag().sum() == 3 and details.top5_correct.sum() == 15


@pytest.mark.parametrize('labels, named', [([0, -1, 2], 'labels -1,'), ([0, 7, 3], 'labels 3, 7,')])
@pytest.mark.parametrize('first', [True, False])
def test_labels_outside_the_classes_are_refused_and_named(labels, named, first):
    model, good = Given(3), (torch.randn(3, 3), torch.tensor([0, 1, 2]))
    bad = (torch.randn(3, 3), torch.tensor(labels))
    with pytest.raises(DataError, match=f'{named} the model has the classes 0 to 2'):
        evaluate(model, Batches([bad, good] if first else [good, bad]), CPU)
    assert model.calls == (0 if first else 2), 'labels of the first batch are checked before any forward pass'


def test_empty_data_is_refused():
    with pytest.raises(DataError, match='No image could be read'):
        evaluate(Given(3), Batches([]), CPU)


def test_logits_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r'4 classes, but the logits are of shape \(2, 3\)'):
        evaluate(Given(3), Batches([(torch.randn(2, 3), torch.tensor([0, 1]))]), CPU, num_classes=4)


def test_unreadable_images_are_reported():
    loader = Batches([(torch.randn(2, 3), torch.tensor([0, 1]))], [('b.jpg', 'OSError: why'), ('a.jpg', 'EOFError: x')])
    result = evaluate(Given(3), loader, CPU)
    assert result.images == 2 and result.unreadable == [('a.jpg', 'EOFError: x'), ('b.jpg', 'OSError: why')]


@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_evaluation_runs_in_every_precision_and_changes_nothing(amp):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6)).train()
    before, images = copy.deepcopy(model.state_dict()), make_batch()
    expected = F.cross_entropy(copy.deepcopy(model).eval()(images[0]), images[1]).item()
    result = evaluate(model, Batches([images]), CPU, amp, num_classes=6)
    assert result.loss == pytest.approx(expected, rel=1e-6 if amp == 'off' else 0.02)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_progress_is_reported_after_every_batch():
    logits, labels = make_images(10, 5)
    seen = []
    evaluate(Given(5), Batches(list(zip(logits.split(4), labels.split(4), strict=True))), CPU, report=seen.append)
    assert seen == [4, 8, 10]


@pytest.mark.skipif(torch.__version__ < '2.7', reason='PyTorch 2.6 needs a driver even for fake GPU tensors')
def test_counting_a_batch_never_synchronises_the_device():
    """Fake tensors refuse operations that read their values on the host: .item(), bincount, unique, masks."""
    predictions, gpu = Predictions(10, CPU), torch.device('cuda')
    with FakeTensorMode():
        for metric in (predictions.top1, predictions.top5):
            for name, value in metric.metric_state.items():
                setattr(metric, name, torch.zeros(value.shape, dtype=value.dtype, device=gpu))
        predictions.update(torch.zeros(4, 10, device=gpu), torch.zeros(4, dtype=torch.int64, device=gpu))
        with pytest.raises(DataDependentOutputException):
            predictions.top1.tp.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            predictions.labels[0][predictions.labels[0] < 0]


# Classes --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def rows():
    details = evaluate_in_detail(Given(6), Batches([make_batch()]), CPU)[1]
    return tabulate_classes(details, ['a', 'b', 'c', 'd', 'e', 'ph\u00f6nix, "f"'])


def test_classes_are_tabulated_with_what_they_are_mistaken_for(rows):
    assert [row.images for row in rows] == [2, 2, 0, 0, 0, 3]
    assert rows[0] == ClassScore(0, 'a', images=2, top1=50., top5=50., taken_for=[Mistake(1, 'b', images=1)])
    assert rows[2] == ClassScore(2, 'c', images=0, top1=None, top5=None, taken_for=[])
    assert rows[5].top1 == 100 / 3 and rows[5].top5 == 200 / 3
    assert [(other.name, other.images) for other in rows[5].taken_for] == [('a', 1), ('e', 1)]


def test_worst_classes_come_first_and_classes_without_images_never(rows):
    assert [row.label for row in list_worst(rows, 2)] == [5, 0]
    assert [row.label for row in list_worst(rows, 9)] == [5, 0, 1]


def test_csv_contains_each_class(rows, tmp_path):
    write_classes(tmp_path / 'classes.csv', rows)
    with open(tmp_path / 'classes.csv', newline='', encoding='utf-8') as file:
        header, *lines = csv.reader(file)
    assert header == ['class', 'name', 'images', 'top1', 'top5', 'taken_for', 'taken_for_images']
    assert lines[0] == ['0', 'a', '2', '50.000', '50.000', 'b', '1']
    assert lines[2] == ['2', 'c', '0', '', '', '', '0']
    assert lines[5] == ['5', 'ph\u00f6nix, "f"', '3', '33.333', '66.667', 'a', '1'] and len(lines) == 6
    with pytest.raises(DataError, match='cannot be written'):
        write_classes(tmp_path, rows)
