"""The linear probe and kNN: the published protocol, its figures, and neighbours found by definition."""
import pytest
import torch
import torch.nn as nn
from published import TAG, error, golden
from reference import fill_tensor, filled_input

from caretrans.errors import ConfigError, DataError
from caretrans.selfsup.features import Features, estimate_statistics, extract_features
from caretrans.selfsup.knn import KnnClassifier
from caretrans.selfsup.optimizer import build_optimizer
from caretrans.selfsup.pretraining import create_trunk
from caretrans.selfsup.probe import (
    FeatureBatches, ProbeSettings, build_classifier, probe_features, train_probe)


@pytest.fixture(scope='module')
def trunk():
    model = create_trunk('resnet50')
    model.load_state_dict({key: fill_tensor(f'student_encoder.{key}', tuple(value.shape))
                           for key, value in model.state_dict().items()})
    return model.double()


def test_a_probe_computes_what_the_published_one_computes(trunk):
    arrays, classifier = golden('linear_probe'), build_classifier(2048, 1000)
    classifier.load_state_dict({key: fill_tensor(f'classifier.{key}', tuple(value.shape))
                                for key, value in classifier.state_dict().items()})
    network, classifier = Features(trunk).eval(), classifier.double()
    x = filled_input((12, 3, 64, 64), f'{TAG}.probe').double()
    targets = torch.from_numpy(arrays['targets'])
    with torch.no_grad():
        features = network(x)
    errors = dict(features=error(features[:, ::8], arrays['features']))
    optimizer = build_optimizer(classifier, 1., weight_decay=0.)
    losses = []
    for lr in arrays['lrs']:
        optimizer.param_groups[0]['lr'] = float(lr)
        logits = classifier(features)
        errors.setdefault('train_logits', error(logits[:, ::10], arrays['train_logits_0']))
        loss = nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    errors['losses'] = error(losses, arrays['losses'])
    logits = classifier.eval()(features)
    errors['eval_logits'] = error(logits[:, ::10], arrays['eval_logits'])
    state = classifier.state_dict()
    errors['norms'] = error(torch.stack([state[key].double().norm() for key in arrays['keys']]), arrays['norms'])
    hits = logits.topk(5).indices == targets[:, None]
    errors['top'] = error([100 * hits[:, :k].any(1).double().mean() for k in (1, 5)], arrays['top15'])
    print({key: f'{value:.1e}' for key, value in errors.items()})
    assert max(value for key, value in errors.items() if key != 'top') < 1e-8 and errors['top'] < 1e-6


def make_clusters(count, seed):
    """Features of three classes that a linear classifier separates."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.eye(3)[labels] * 4 + torch.randn(count, 3, generator=generator) * .5 + 10, labels


def test_a_probe_learns_and_reports_last_and_best():
    settings = ProbeSettings(epochs=12, batch_size=32)
    result = probe_features(make_clusters(300, 0), make_clusters(90, 1), 3, settings)
    assert result.last.top1 > 95 and result.best.top1 >= result.last.top1
    assert result.best_epoch in (1, 2, 5, 7, 10, 12) and result.epochs == 12
    assert 'last epoch (12): top-1' in result.describe() and 'chosen on the test images' in result.describe()
    again = probe_features(make_clusters(300, 0), make_clusters(90, 1), 3, settings)
    assert again.last.loss == result.last.loss
    assert probe_features(make_clusters(300, 0), make_clusters(90, 1), 3, ProbeSettings(
        epochs=12, batch_size=32, batch_norm=False)).last.loss != result.last.loss


def test_the_published_epochs_are_evaluated():
    settings = ProbeSettings()
    assert [epoch for epoch in range(1, 81) if settings.is_evaluated(epoch)] == [1, 2, 5, 7, *range(10, 81, 10)]


def test_features_in_memory_come_once_per_epoch_in_another_order():
    batches = FeatureBatches(torch.arange(10.)[:, None], torch.arange(10), 3)
    first, second, in_order = (torch.cat([labels for _, labels in batches.run(epoch)]) for epoch in (0, 1, None))
    assert batches.steps == 3 and len(first) == len(set(first.tolist())) == 9 and not torch.equal(first, second)
    assert torch.equal(in_order, torch.arange(10))


def test_batches_that_do_not_fill_are_refused():
    with pytest.raises(ConfigError, match='do not fill a batch of 256'):
        train_probe(build_classifier(3, 2), lambda epoch: [], 0, FeatureBatches(*make_clusters(9, 0), 3))


def test_neighbours_vote_by_definition():
    bank, labels = make_clusters(40, 2)
    queries, _ = make_clusters(7, 3)
    votes = KnnClassifier(nn.Identity(), bank, labels, 3, k=5, temperature=.1)(queries)
    for query, found in zip(queries, votes, strict=True):
        similarities = torch.nn.functional.cosine_similarity(query[None], bank)
        wanted = torch.zeros(3)
        for index in similarities.argsort(descending=True)[:5]:
            wanted[labels[index]] += (similarities[index] / .1).exp()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert KnnClassifier(nn.Identity(), bank, labels, 3, k=100).k == 40
    with pytest.raises(DataError, match='labels must be 0 to 1'):
        KnnClassifier(nn.Identity(), bank, labels, 2)


def test_statistics_of_random_weights_come_from_the_data():
    trunk = create_trunk('test_resnet').eval()
    batches = [(3 + 2 * torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64)) for _ in range(3)]
    weights = {key: p.clone() for key, p in trunk.named_parameters()}
    estimate_statistics(trunk, [*batches, (torch.randn(1, 3, 32, 32), torch.zeros(1))])
    first = next(module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d))
    convolution = next(module for module in trunk.modules() if isinstance(module, nn.Conv2d))
    means = torch.stack([convolution(x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(first.running_mean, means, rtol=1e-4, atol=1e-4)
    assert first.momentum == .1 and not trunk.training
    assert all(torch.equal(p, weights[key]) for key, p in trunk.named_parameters())
    features, labels = extract_features(trunk, batches)
    assert features.shape == (48, trunk.num_features) and len(labels) == 48
    assert torch.equal(features[:16], Features(trunk)(batches[0][0]).float())
