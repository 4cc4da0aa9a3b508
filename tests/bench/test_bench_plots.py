"""Plots show what was measured, with the facts that a reader needs; softmax attention of the growth is correct."""
import math

import pytest
import torch
from matplotlib.figure import Figure
from reference import filled_model

from caretrans.bench.growth import SoftmaxAttention, make_softmax_twin, measure_growth
from caretrans.bench.plots import draw_accuracy_by_gmacs, draw_accuracy_by_latency, draw_growth, draw_parts
from caretrans.bench.record import Record
from caretrans.errors import ConfigError, PlotError
from caretrans.models.care import LinearAttention


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: (figures.append(self), save(
        self, *args, **kwargs)))
    return figures


def record(model, median_ms, backend='eager', **changes):
    return Record(**{**dict(
        model=model, backend=backend, device='cpu: Model', batch=1, height=224, width=224, threads=2,
        median_ms=median_ms), **changes})


def list_texts(figure):
    axes = figure.axes
    texts = [text.get_text() for ax in axes for text in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]]
    return texts + [text.get_text() for text in [*figure.texts, figure._suptitle]] + [
        text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().get_texts()]


def is_png(path):
    return path.read_bytes().startswith(b'\x89PNG')


def test_accuracy_against_latency_labels_published_and_measured_values(tmp_path, drawn):
    records = [record('care_s2', 40.), record('care_s0', 30.), record('care_s0', 10., 'fused'),
               record('fastvit_t8', 25.), record('resnet18', 20.), record('care_s1', None)]
    assert is_png(draw_accuracy_by_latency(records, tmp_path / 'plots' / 'latency.png'))
    texts = list_texts(drawn[0])
    assert any('cpu: Model, float32, batch 1, 224 px, threads 2' in text for text in texts)
    assert {'CARE', 'S0', 'FastViT', 'T8', 'eager, float32, nchw', 'fused, float32, nchw'} <= set(texts)
    assert 'ImageNet-1K top-1, %, published' in texts and 'S1' not in texts
    assert any('not measured here. CARE: with a teacher' in text for text in texts)
    panels = [{line.get_label(): [tuple(xy) for xy in line.get_xydata()] for line in axes.lines}
              for axes in drawn[0].axes if axes.get_visible()]
    assert panels == [dict(CARE=[(30., 78.4), (40., 82.1)], FastViT=[(25., 76.7)]), dict(CARE=[(10., 78.4)])]


def test_accuracy_against_gmacs(tmp_path, drawn):
    assert is_png(draw_accuracy_by_gmacs(dict(care_s0=0.72, care_s1=1.03, resnet18=1.8), tmp_path / 'gmacs.png'))
    texts = list_texts(drawn[0])
    assert {'CARE', 'S0', 'S1', 'GMACs'} <= set(texts)
    assert [len(line.get_xydata()) for line in drawn[0].axes[0].lines] == [2]


def test_bars_are_the_milliseconds_of_the_profiles(tmp_path, drawn):
    cells = {('stem', 'conv other'): 1., ('stages.2', 'conv 1x1'): 2., ('stages.2', 'attention'): 4.}
    profiles = {name: [record('care_s0', None, bench='profile', part=part, kind=kind, ms=factor * ms, total_ms=9.)
                       for (part, kind), ms in cells.items()] for name, factor in (('a', 1), ('b', 2))}
    assert is_png(draw_parts(profiles, tmp_path / 'parts.png'))
    for axes in drawn[0].axes:
        for place, total in enumerate((7., 14.)):
            bars = [bar for bar in axes.patches if math.isclose(bar.get_x() + bar.get_width() / 2, place, abs_tol=0.01)]
            assert sum(bar.get_height() for bar in bars) == pytest.approx(total)
    assert {'conv 1x1', 'attention', 'stages.2', '9.0 ms'} <= set(list_texts(drawn[0]))


@pytest.mark.parametrize('draw, message', [
    (lambda path: draw_accuracy_by_latency([record('resnet18', 1.)], path), 'No accuracy is published for any'),
    (lambda path: draw_accuracy_by_latency([record('care_s0', 1.), record('care_s0', 1., batch=8)], path),
     'several values of batch'),
    (lambda path: draw_accuracy_by_gmacs(dict(resnet18=1.), path), 'No accuracy is published for resnet18'),
    (lambda path: draw_growth([record('care_s0', 1.)], path), 'No records of growth'),
    (lambda path: draw_parts({}, path), 'No profiles')])
def test_plots_without_data_are_refused(tmp_path, draw, message):
    with pytest.raises(PlotError, match=message):
        draw(tmp_path / 'plot.png')
    assert not (tmp_path / 'plot.png').exists()


# Growth ---------------------------------------------------------------------------------------------------------------

def test_growth_is_measured_and_drawn(tmp_path, drawn):
    records = measure_growth('care_s0', (32, 64), rounds=2)
    assert [(r.attention, r.height) for r in records] == [
        ('linear', 32), ('softmax', 32), ('linear', 64), ('softmax', 64)]
    assert all(r.median_ms > 0 and r.bench == 'growth' for r in records)
    assert all(r.ratio == 1 for r in records if r.attention == 'softmax')
    assert is_png(draw_growth(records, tmp_path / 'growth.png'))
    texts = list_texts(drawn[0])
    assert {'care_s0, linear attention', 'care_s0, softmax attention'} <= set(texts)
    assert any('float32, batch 1, threads' in text for text in texts)
    assert any('no network was trained' in text for text in texts)


def test_softmax_attention_is_its_definition():
    linear = LinearAttention(8, 2)
    attention, x = SoftmaxAttention(linear), torch.randn(2, 8, 3, 5)
    q, k = linear.qk(x).flatten(2).chunk(2, dim=1)
    expected = torch.empty(2, 8, 15)
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[:, head].transpose(1, 2) @ k[:, head] / 4 ** 0.5).softmax(-1)  # (B, query, key)
        expected[:, head] = (weights @ x.flatten(2)[:, head].transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(attention(x).flatten(2), expected, atol=1e-5)


def test_the_twin_differs_in_its_attention_alone_and_leaves_the_network_unchanged():
    model = filled_model('care_s0', depths=(1, 1, 2, 1))
    twin, images = make_softmax_twin(model), torch.randn(1, 3, 64, 64)
    replaced = [name for name, module in twin.named_modules() if isinstance(module, SoftmaxAttention)]
    assert len(replaced) == 3 and all(isinstance(model.get_submodule(name), LinearAttention) for name in replaced)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        early, twin_early = (network.stages[:2](network.stem(images)) for network in (model, twin))
        assert torch.equal(early, twin_early) and not torch.allclose(model(images), twin(images))


def test_a_network_without_linear_attention_has_no_twin():
    with pytest.raises(ConfigError, match='ResNet has no LinearAttention'):
        measure_growth('resnet18', (64,))
