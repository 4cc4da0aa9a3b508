"""Every model passes through what captures graphs: TorchScript, FX, torch.export, torch.compile.

The first model of every file, and care_s2 for its other number of heads.
"""
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import SHALLOW, shallow_model
from registered import one_of_each_file
from timm.models._features import FeatureGetterNet
from torch.export import Dim, export

SOME = sorted({*one_of_each_file(), 'care_s2'})
some_models = pytest.mark.parametrize('name', SOME)
first_models = pytest.mark.parametrize('name', one_of_each_file())

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@some_models
def test_scripted_model_computes_the_same_at_any_size(name):
    model = shallow_model(name)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in (64, 96), (33, 47):
            x = torch.randn(2, 3, *size)
            same(scripted(x), model(x))
    with pytest.raises(torch.jit.Error, match='31 x 64'):
        scripted(torch.randn(1, 3, 31, 64))


@first_models
def test_scripted_model_trains_on_the_mean_of_the_heads(name):
    model = shallow_model(name).train()
    if model.distilled:
        model.set_distilled_training(True)
    torch.jit.script(model)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@some_models
def test_scripted_features_compute_the_same(name):
    extractor = FeatureGetterNet(shallow_model(name), out_indices=(0, 2)).eval()
    scripted = torch.jit.script(extractor)
    x = torch.randn(1, 3, 65, 96)
    with torch.no_grad():
        for found, expected in zip(scripted(x), extractor(x), strict=True):
            same(found, expected)


@some_models
def test_traced_model_computes_the_same_at_any_size(name):
    model = shallow_model(name)
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 3, 96, 101)
    with torch.no_grad():
        same(traced(x), model(x))


@some_models
def test_fx_traces_in_evaluation_and_training(name):
    x = torch.randn(2, 3, 64, 96)
    for training in False, True:
        model = shallow_model(name).train(training)
        traced = torch.fx.symbolic_trace(model)
        model.load_state_dict(model.state_dict())
        with torch.no_grad():
            same(traced(x), model(x))
        with pytest.raises(ValueError, match='31 x 64'):  # a leaf of the graph, not decided while tracing
            traced(torch.randn(2, 3, 31, 64))


@some_models
def test_exported_model_takes_batches_and_sizes_of_its_range(name):
    model = shallow_model(name)
    side = Dim.AUTO(min=64, max=512) if callable(Dim.AUTO) else Dim.AUTO  # PyTorch 2.6 takes no range
    sizes = {0: Dim('batch', min=1, max=64), 2: side, 3: side}
    exported = export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        for shape in (1, 3, 64, 64), (5, 3, 96, 64), (2, 3, 75, 99):
            x = torch.randn(shape)
            same(exported(x), model(x))


@pytest.mark.parametrize('name', sorted(set(SOME) - set(one_of_each_file())))  # the rest is below
def test_compiled_model_is_one_graph_and_computes_the_same(name):
    model = shallow_model(name)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        same(compiled(x), model(x))


@first_models
def test_compiled_model_takes_batches_and_sizes_without_compiling_each(name):
    model = shallow_model(name)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in (2, 3, 64, 96), (3, 3, 96, 64), (5, 3, 128, 75):
            x = torch.randn(shape)
            same(compiled(x), model(x))
    assert len(graphs) == 1


@first_models
def test_compiled_training_is_one_graph_with_the_same_gradients(name):
    x = torch.randn(2, 3, 64, 64)
    results = []
    for compile_it in False, True:
        model = shallow_model(name).train()
        run = torch.compile(model, backend='aot_eager', fullgraph=True) if compile_it else model
        logits = run(x)
        F.cross_entropy(logits, torch.arange(2)).backward()
        results.append([logits, *(p.grad for p in model.parameters()), *model.buffers()])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_compiled_distilled_training_is_one_graph():
    model = shallow_model('care_s0').train()
    model.set_distilled_training(True)
    x = torch.randn(2, 3, 64, 64)
    pair = torch.compile(model, backend='eager', fullgraph=True)(x)
    for found, expected in zip(pair, model(x), strict=True):
        same(found, expected)


@first_models
@pytest.mark.parametrize('kwargs', [
    dict(drop_rate=0.1, drop_path_rate=0.1), dict(features_only=True)], ids=['drop', 'features'])
def test_no_graph_breaks_under_autocast_checkpointing_and_dropping(name, kwargs):
    model = timm.create_model(name, depths=SHALLOW, **kwargs).train()
    model.set_grad_checkpointing('features_only' not in kwargs)

    def run(x):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return model(x)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        explained = torch._dynamo.explain(run)(torch.randn(2, 3, 64, 64))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
