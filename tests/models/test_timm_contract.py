"""timm's own tests of models, run on ours.

They are no part of the timm that pip installs, but of its source distribution: `bash cmd/test.sh` puts that into
build/timm-<installed version>. Without it test_model_contract.py and test_model_tracing.py stand alone.
"""
import importlib.util
import inspect
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from reference import SHALLOW
from registered import MODELS, one_of_each_file
from timm.models import get_pretrained_cfg

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / 'build' / f'timm-{timm.__version__}' / 'tests' / 'test_models.py'

FOR_ALL_MODELS = (
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
)
FOR_SOME_MODELS = (  # timm runs these on a few models of its own; what they ask is no less asked of ours
    'test_reset_classifier_keeps_pool', 'test_features_only_grad_checkpointing_backward',
    'test_prune_intermediate_layers_params_used', 'test_forward_after_prune_intermediate_layers',
    'test_prune_intermediate_layers_last_feature', 'test_forward_intermediates_stop_early_final_norm',
    'test_feature_getter_stage_ends_torchscript',
)
NOT_FOR_OURS = {
    'test_model_inference': 'it downloads weights of timm and their outputs',
    'test_model_default_cfgs_non_std': 'it is for networks without maps of features',
    'test_model_load_pretrained': 'it downloads weights',
    'test_model_features_pretrained': 'it downloads weights',
}


@pytest.fixture(scope='module')
def timm_tests(pytestconfig) -> ModuleType:
    """timm's module of tests, imported from its path after our models are registered."""
    if not SOURCE.exists():
        pytest.skip(f'timm\'s tests are not at {SOURCE}: `bash cmd/test.sh` fetches them (our own tests stand in)')
    for marker in sorted(set(re.findall(r'@pytest\.mark\.(\w+)', SOURCE.read_text(encoding='utf-8')))):
        pytestconfig.addinivalue_line('markers', f'{marker}: of timm')
    spec = importlib.util.spec_from_file_location('timm_test_models', SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.create_model = partial(timm.create_model, depths=SHALLOW)  # blocks after these repeat them
    yield module
    torch._C._jit_set_profiling_mode(True)  # which importing it switches off


def runs_over_all_models(function) -> bool:
    """Whether timm runs the test `function` on hundreds of models by name."""
    names = [mark.args[1] for mark in getattr(function, 'pytestmark', []) if mark.args[:1] == ('model_name',)]
    return bool(names) and len(names[0]) > 100


def run(module: ModuleType, test: str, name: str) -> None:
    """Call one of timm's tests with our model `name`, and for the rest with the first values timm calls it with."""
    function = getattr(module, test, None)
    if function is None:
        pytest.skip(f'timm {timm.__version__} has no {test}')
    arguments = {'cfg_device': 'meta', 'model_kwargs': {}, 'stop_early_final': True}
    for mark in function.pytestmark:
        if mark.name == 'parametrize' and ',' not in mark.args[0]:
            arguments[mark.args[0]] = mark.args[1][0]
    arguments['model_name'] = name
    function(**{key: arguments[key] for key in inspect.signature(function).parameters})


FIRST = one_of_each_file()  # the other models run the cheap tests
CHEAP = [test for test in FOR_ALL_MODELS if not any(word in test for word in ('backward', 'torchscript', 'fx'))]


@pytest.mark.parametrize('name, test', [
    (name, test) for name in MODELS for test in (FOR_ALL_MODELS if name in FIRST else CHEAP)])
def test_timm(timm_tests, name, test):
    if test == 'test_model_default_cfgs':
        name = f'{name}.{get_pretrained_cfg(name).tag}'
    run(timm_tests, test, name)


@pytest.mark.parametrize('test', FOR_SOME_MODELS)
@pytest.mark.parametrize('name', FIRST)
def test_timm_beyond_its_own_models(timm_tests, name, test):
    model = timm.create_model(name, device='meta')
    if test == 'test_forward_after_prune_intermediate_layers' and not isinstance(model.norm, torch.nn.Identity):
        pytest.skip('timm asks this of networks whose last map is not normalised: it wants final map and tap equal')
    run(timm_tests, test, name)


def test_every_test_that_timm_runs_on_all_models_runs_on_these_models(timm_tests):
    functions = {name for name, f in vars(timm_tests).items() if name.startswith('test_') and runs_over_all_models(f)}
    ran = functions & set(FOR_ALL_MODELS)
    left_out = functions - ran - set(NOT_FOR_OURS)
    print(f'{len(ran)} of the {len(functions)} tests that timm {timm.__version__} runs on all models ran on '
          f'{", ".join(MODELS)}, and {len(FOR_SOME_MODELS)} others; new ones: {sorted(left_out) or "none"}')
    assert len(ran) >= 10, 'timm must have renamed its tests'
    if timm.__version__ == '1.0.31':  # of later versions we cannot know
        assert not left_out
