"""Pre-training module: a student and its momentum teacher, each a trunk with a T-stream beside it, and the losses.

The trunk is any network of timm or this package. The C-stream is its pooled features; the T-stream reads the map one
stage before the last. Both go through a projector, and in the student a predictor, to normalised outputs. The student
learns the teacher's outputs for the other view, and its C-stream also those of its T-stream for the same view.

Source: Ge et al. 2021, Revitalizing CNN attentions via transformers in self-supervised visual representation learning,
arXiv:2110.05340, and its published code.
"""
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import ResNet

from ..errors import ConfigError, list_names
from ..models.backbone import disable_drop_path
from .tstream import TStream

__all__ = ['METHODS', 'Design', 'Encoder', 'Pretraining', 'create_trunk', 'measure_spread', 'momentum_at']

METHODS = ('care', 'byol')
PROJECTOR = 4  # layers of a student's head that the teacher has as well


@dataclass(frozen=True)
class Design:
    """What decides the shapes and the losses of a pre-training module.

    Attributes:
        model, model_args: Of the trunk, for `timm.create_model`.
        img_size: Side of the images in pixels, on which the position code of the T-stream depends.
        method: 'care', or 'byol' without the T-stream.
        hidden, out: Widths of projectors and predictors.
        blocks, heads: Of the T-stream.
        head_dim: Of its attention; None for 1/16 of the trunk's features, 128 for a ResNet-50.
        factor: Its inner width is the trunk's features divided by it.
        relative: Code distances between positions instead of positions; unused by CARE.
        attention_weight: Of the mean square difference of the streams. That is a mean over `out` numbers, whose squares
            sum to 1: with half as many, half the weight gives the same loss.
        momentum: Of the teacher at the first step.
    """
    model: str = 'resnet50'
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int = 224
    method: str = 'care'
    hidden: int = 4096
    out: int = 256
    blocks: int = 5
    heads: int = 4
    head_dim: int | None = None
    factor: int = 4
    relative: bool = False
    attention_weight: float = 100.
    momentum: float = .99

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f'method is {self.method!r}: choose from {", ".join(METHODS)}.')
        for name in ('hidden', 'out', 'blocks', 'heads', 'factor'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)} but must be at least 1.')

    def to_dict(self) -> dict[str, Any]:
        """The values for a checkpoint."""
        return asdict(self)


# Trunk ----------------------------------------------------------------------------------------------------------------

def create_trunk(name: str, **model_args: Any) -> nn.Module:
    """A network without classifier. In a ResNet every BatchNorm starts from 1 and 0, as published.

    Raises:
        ConfigError: There is no such model, or it has no features before its classifier.
    """
    if not timm.is_model(name):
        near = list_names(timm.list_models(f'*{name.split("_")[0]}*'), 8) or 'none'
        raise ConfigError(f'No model {name!r}; near: {near}.')
    try:
        trunk = timm.create_model(name, num_classes=0, **model_args)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'{name}: {" ".join(str(error).split())}') from None
    if not hasattr(trunk, 'forward_head'):
        raise ConfigError(f'{name} has no forward_head, which returns its features: use another model.')
    if isinstance(trunk, ResNet):
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.is_meta:
                nn.init.ones_(module.weight)
    return trunk


class Maps(NamedTuple):
    """Sizes of a trunk: its features, and channels, height and width of the map before the last stage."""
    features: int
    channels: int
    size: tuple[int, int]


@torch.no_grad()
def _measure(trunk: nn.Module, design: Design) -> Maps:
    """Run a trunk once on an empty image.

    Raises:
        ConfigError: It does not take images of this size, or has no map for the T-stream.
    """
    name, x = design.model, torch.zeros(1, 3, design.img_size, design.img_size)
    training = trunk.training
    if design.method == 'care' and not hasattr(trunk, 'forward_intermediates'):
        raise ConfigError(f'{name} has no forward_intermediates, from which the T-stream takes a map: use another '
                          f'model, or --method byol.')
    try:
        features = trunk.eval().forward_head(trunk.forward_features(x), pre_logits=True)
        maps = trunk.forward_intermediates(x, intermediates_only=True)[-2:] if design.method == 'care' else []
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ConfigError(f'{name} does not take images of {design.img_size} pixels ({reason}).') from error
    finally:
        trunk.train(training)
    if features.ndim != 2:
        raise ConfigError(f'{name} does not pool its features: omit global_pool.')
    if design.method == 'byol':
        return Maps(features.shape[1], 0, (0, 0))
    _check_maps(design, maps)
    return Maps(features.shape[1], maps[0].shape[1], tuple(maps[0].shape[2:]))


def _check_maps(design: Design, maps: Sequence[torch.Tensor]) -> None:
    if len(maps) < 2 or any(y.ndim != 4 for y in maps):
        raise ConfigError(f'{design.model} has no map before its last stage for the T-stream: use --method byol.')
    before, last = (tuple(y.shape[2:]) for y in maps)
    if [2 * side for side in last] != list(before):
        raise ConfigError(
            f'The maps of {design.model} for {design.img_size} pixels are {before[0]} x {before[1]} before the last '
            f'stage and {last[0]} x {last[1]} after it, but the T-stream halves the first to the second: use an '
            f'img_size that is a multiple of 32, a network of stages, or --method byol.')


# Student and teacher --------------------------------------------------------------------------------------------------

def _make_head(features: int, hidden: int, out: int) -> nn.Sequential:
    """Projector and predictor; the last layer of the one and the first of the other are both linear."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out),
        nn.Linear(out, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Outputs(NamedTuple):
    """Normalised outputs (B, out) of the C-stream and, with one, of the T-stream."""
    c: torch.Tensor
    t: torch.Tensor | None


class Encoder(nn.Module):
    """Trunk, T-stream (`trans`), and the heads of both streams (`fc1`, `fc2`), named as in published files."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.trunk = create_trunk(design.model, **design.model_args)
        if not design.model_args.get('drop_path_rate'):
            disable_drop_path(self.trunk)
        maps = _measure(self.trunk, design)
        if design.method == 'care':
            self.trans = TStream(
                maps.channels, maps.features, maps.size, design.blocks, design.heads,
                design.head_dim or max(maps.features // 16, 1), design.factor, relative=design.relative)
        self.fc1 = _make_head(maps.features, design.hidden, design.out)
        if design.method == 'care':
            self.fc2 = _make_head(maps.features, design.hidden, design.out)

    def drop_predictors(self) -> None:
        """Keep the projectors only, as the teacher does."""
        for name in ('fc1', 'fc2'):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[:PROJECTOR])

    def forward(self, x: torch.Tensor) -> Outputs:
        """Normalised outputs for images (B, 3, img_size, img_size)."""
        if not hasattr(self, 'trans'):
            features = self.trunk.forward_head(self.trunk.forward_features(x), pre_logits=True)
            return Outputs(F.normalize(self.fc1(features)), None)
        before_last = len(self.trunk.feature_info) - 2
        last, maps = self.trunk.forward_intermediates(x, indices=[before_last])
        features = self.trunk.forward_head(last, pre_logits=True)
        return Outputs(F.normalize(self.fc1(features)), F.normalize(self.fc2(self.trans(maps[0]).mean((2, 3)))))


def momentum_at(step: int, total_steps: int, base: float = .99) -> float:
    """The teacher's momentum at an optimizer step, counted from 0: from `base` to 1 along a half cosine, then 1."""
    return 1 - (1 - base) * (math.cos(math.pi * min(step / total_steps, 1)) + 1) / 2


def measure_spread(outputs: torch.Tensor) -> torch.Tensor:
    """How far normalised outputs (B, D) of a batch spread: 1 if evenly over the sphere, 0 if all are the same."""
    return outputs.detach().float().std(0).mean() * outputs.shape[1] ** .5


def _distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the images of the squared distances to the teacher's outputs, summed over both views."""
    return (4 - 2 * sum((a * b).sum(1) for a, b in zip(student, teacher, strict=True))).mean()


class Pretraining(nn.Module):
    """Student and momentum teacher; calling it with both views of a batch returns the losses.

    Each view passes through student and teacher by itself, so that BatchNorm sees one view at a time: view 1 and view 2
    through the student, then view 2 and view 1 through the teacher. The teacher is in training mode as well, and keeps
    running statistics of its own, which are never averaged with those of the student.

    Attributes:
        student, teacher: An `Encoder` each; the teacher has no predictors, no gradients, and starts as a copy.
    Raises:
        ConfigError: The trunk does not exist, or cannot be used in this design.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.student = Encoder(design)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.teacher.drop_predictors()

    def forward(self, view1: torch.Tensor, view2: torch.Tensor, details: bool = False) -> dict[str, torch.Tensor]:
        """The losses of a batch.

        Args:
            view1, view2: (B, 3, img_size, img_size), normalised.
            details: Also return figures to watch.
        Returns:
            'c' and 't', 2 - 2 cos between student and teacher summed over both views, of each stream; 'attention', the
            mean square differences of the streams, weighted, of which the half of the teacher has no gradient; and
            'loss', their sum. Without T-stream, 'c' and 'loss'. Details are 'attention_student', the half with a
            gradient, and 'spread_c' and 'spread_t', see `measure_spread`, of the teacher's outputs: those of the
            student's predictors also come close to each other in runs that learn.
        """
        student = [self.student(view) for view in (view1, view2)]
        with torch.no_grad():
            teacher = [self.teacher(view) for view in (view2, view1)]
        losses = dict(c=_distance([s.c for s in student], [t.c for t in teacher]))
        seen = dict(spread_c=torch.stack([measure_spread(t.c) for t in teacher]).mean())
        if self.design.method == 'care':
            weight = self.design.attention_weight
            losses['t'] = _distance([s.t for s in student], [t.t for t in teacher])
            guided = weight * sum(F.mse_loss(s.c, s.t.detach()) for s in student)
            losses['attention'] = guided + weight * sum(F.mse_loss(t.c, t.t) for t in teacher)
            seen.update(
                spread_t=torch.stack([measure_spread(t.t) for t in teacher]).mean(), attention_student=guided.detach())
        return dict(losses, loss=sum(losses.values()), **(seen if details else {}))

    @torch.no_grad()
    def update_teacher(self, step: int, total_steps: int) -> None:
        """Move the teacher towards the student, with the momentum of this step, counted from 0.

        The published code does so before the forward pass of a step; after step n it is `update_teacher(n, ...)`, n
        counted from 1, because the first update of a copy changes nothing.
        """
        student = dict(self.student.named_parameters())
        teacher = dict(self.teacher.named_parameters())
        torch._foreach_lerp_(
            list(teacher.values()), [student[name] for name in teacher],
            1 - momentum_at(step, total_steps, self.design.momentum))
