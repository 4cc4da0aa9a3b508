"""The models the tests are about, all that this package registers with timm, and what the tests ask of any of them."""
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

import caretrans  # noqa: F401 (registers the models)
from reference import SHALLOW

MODELS = [  # without aliases
    name for name in timm.list_models(name_matches_cfg=True)
    if model_entrypoint(name).__module__.startswith('caretrans.')]
CARE = [name for name in MODELS if name.startswith('care_')]


def one_of_each_file() -> tuple[str, ...]:
    """The first model of every model file, as the file lists them, for tests that take long."""
    files = dict.fromkeys(model_entrypoint(name).__module__ for name in MODELS)
    return tuple(next(iter(sys.modules[file].default_cfgs)) for file in files)


each_model = pytest.mark.parametrize('name', MODELS)
each_model_some_later = pytest.mark.parametrize('name', [  # the others in the second tier
    name if name in one_of_each_file() else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
each_file = pytest.mark.parametrize('name', one_of_each_file())
each_care_model = pytest.mark.parametrize('name', CARE)


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without weights and with few blocks, for what concerns only its structure and shapes."""
    return timm.create_model(name, device='meta', **{'depths': SHALLOW, **kwargs}).eval()


def images(*shape: int, device: str = 'cpu') -> torch.Tensor:
    return torch.randn(shape, device=device)


def classifiers_of(model: nn.Module) -> Sequence[nn.Module]:
    classifiers = model.get_classifier()
    return classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gmacs(model: nn.Module, size: int = 224) -> dict[str, float]:
    """Billions of multiply-adds for one image, by kind of operation and in `total`; a model on `meta` costs nothing."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=device))
    counts = {str(op).removeprefix('aten.'): flops / 2e9 for op, flops in counter.get_flop_counts()['Global'].items()}
    return dict(counts, total=counter.get_total_flops() / 2e9)
