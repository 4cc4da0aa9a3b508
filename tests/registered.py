"""Which models the tests are about: all that this package registers with timm, whatever they are."""
import sys
from typing import Dict, Tuple

import timm
import torch
import torch.nn as nn
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

import caretrans  # noqa: F401 (registers the models)

MODELS = [  # without aliases
    name for name in timm.list_models(name_matches_cfg=True)
    if model_entrypoint(name).__module__.startswith('caretrans.')]
CARE = [name for name in MODELS if name.startswith('care_')]


def one_of_each_file() -> Tuple[str, ...]:
    """The first model of every model file, as the file lists them, for tests that take long."""
    files = dict.fromkeys(model_entrypoint(name).__module__ for name in MODELS)
    return tuple(next(iter(sys.modules[file].default_cfgs)) for file in files)


def gmacs(model: nn.Module, size: int = 224) -> Dict[str, float]:
    """Billions of multiply-adds for one image, by kind of operation and in `total`; a model on `meta` costs nothing."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=device))
    counts = {str(op).removeprefix('aten.'): flops / 2e9 for op, flops in counter.get_flop_counts()['Global'].items()}
    return dict(counts, total=counter.get_total_flops() / 2e9)
