"""Pre-training through the run folder, with everything that the training of classifiers has."""
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import create_pretrained, load_checkpoint, read_checkpoint
from ..checkpoint.preparation import resolve_eval_config
from ..data.datasets import list_classes, open_dataset, open_unlabelled, thin_out
from ..data.loaders import Pass, TrainLoader, build_eval_loader, make_samples, normalise
from ..distributed import Processes
from ..errors import ConfigError, DataError, TrainingError
from ..evaluation.metrics import evaluate
from ..text import count_noun
from ..training.state import EpochRow, Evaluation
from ..training.trainer import Trainer, save_memory
from .config import PretrainConfig
from .features import PUBLISHED, Features, extract_features
from .knn import KnnClassifier
from .pretraining import Pretraining, momentum_at
from .views import TwoViews
from .weights import ENTRY, is_pretraining, load_pretraining, save_pretraining

__all__ = ['PretrainTask', 'PretrainTrainer']

FEW_IMAGES = 32  # in a forward pass; with fewer, BatchNorm of trunk and heads hardly keeps the outputs from collapsing
TERMS = {  # figures of each step that are reported, by method
    'care': ('c', 't', 'attention', 'attention_student', 'spread_c', 'spread_t', 'momentum'),
    'byol': ('c', 'spread_c', 'momentum')}


class PretrainTask(TrainingTask):
    """Forward pass and losses; called with both views of a batch and its labels, of which only the number is used.

    Args:
        total_steps: Optimizer steps of the run, over which the teacher's momentum rises to 1.
    Attributes:
        terms: Names of the figures among the results that are reported.
    """

    def __init__(self, module: Pretraining, total_steps: int, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module, self.total_steps, self.step = module, total_steps, 0
        self.terms = TERMS[module.design.method]

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: Any) -> 'PretrainTask':
        """Average the gradients of the student; the teacher has none."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def forward(self, views: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        module = unwrap_model(self.trainable_module)
        momentum = momentum_at(self.step, self.total_steps, module.design.momentum)
        return dict(self.trainable_module(*views, details=True), momentum=torch.tensor(momentum, device=self.device))

    def update_ema(self, step: int | None = None) -> None:
        """Move the teacher after an optimizer step, counted from 1."""
        self.step = step
        unwrap_model(self.trainable_module).update_teacher(step, self.total_steps)


class PretrainTrainer(Trainer):
    """Pre-training of a trunk, scored by nearest neighbours where the data have labels.

    Attributes:
        eval_config: Preparation of the images whose neighbours are found.
    """

    config: PretrainConfig
    best_score = 'val_knn'
    score_title = 'nearest neighbours, %'
    weights_entry = ENTRY
    counted = ', with projectors, predictors and T-stream'
    has_fixed_size = True

    @classmethod
    def check(cls, config: PretrainConfig, processes: Processes, device: torch.device) -> None:
        images, _ = config.split_steps(processes.world_size)[0]
        if images < 2 and not (config.sync_bn and processes.world_size > 1):
            raise ConfigError(
                f'A forward pass of 1 image leaves BatchNorm of the heads one value per channel (batch_size='
                f'{config.batch_size}, device_batch={config.device_batch}, '
                f'{count_noun(processes.world_size, "process", "processes")}): use 2 or more per pass and process.')
        if config.dataset_download:  # once per machine
            processes.together(lambda: open_dataset(
                config.data, config.train_split, config.dataset, download=True) if processes.local_rank == 0 else None)

    def open_data(self) -> None:
        config = self.config
        self.train_set, has_labels = open_unlabelled(
            config.data, config.train_split, config.dataset, batch_size=self.device_batch, seed=config.seed)
        self.classes, self.num_classes, self.val_set = None, 0, None  # of the trunk, which has none
        if has_labels:
            self._open_labelled()
        if len(self.train_set) < config.batch_size:
            raise DataError(f'The {len(self.train_set)} training images do not fill a batch of {config.batch_size}: '
                            f'use a smaller --batch-size.')

    def _open_labelled(self) -> None:
        """Open both splits for the nearest neighbours; without an evaluation split there are none."""
        config, options = self.config, dict(name=self.config.dataset, seed=self.config.seed)
        classes = list_classes(self.train_set)
        try:
            self.val_set = open_dataset(config.data, config.val_split, classes=classes, **options)
            self.bank_set = thin_out(
                open_dataset(config.data, config.train_split, classes=classes, **options), config.knn_bank)
        except DataError as error:
            self.val_set, self.no_scores = None, str(error)

    def build_model(self) -> nn.Module:
        config = self.config
        model = Pretraining(config.design)
        trunk = model.student.trunk
        if getattr(trunk, 'in_chans', 3) != 3:
            raise ConfigError(f'The model takes {trunk.in_chans} channels, but images have 3: remove in_chans.')
        if config.checkpoint and is_pretraining(read_checkpoint(config.checkpoint)):
            self._copy_pretraining(model)
        elif config.checkpoint or config.pretrained:
            if config.checkpoint:
                load_checkpoint(trunk, config.checkpoint, new_heads=True)
            else:
                weights = create_pretrained(config.model, num_classes=0, **config.design.model_args)[0].state_dict()
                trunk.load_state_dict(weights)
            model.teacher.trunk.load_state_dict(trunk.state_dict())
        if config.grad_checkpointing:
            save_memory(trunk, config.model)
        return model

    def _copy_pretraining(self, model: Pretraining) -> None:
        """Start from the student and the teacher of another run."""
        config, loaded = self.config, load_pretraining(self.config.checkpoint)
        try:
            model.load_state_dict(loaded.state_dict())
        except RuntimeError:
            raise ConfigError(
                f'{config.checkpoint} was pre-trained with other settings ({loaded.design}), this run has '
                f'{config.design}: use those.') from None

    def synchronise(self, model: nn.Module) -> nn.Module:
        """BatchNorm over all devices in trunks and heads, but not in the T-stream, as published."""
        for encoder in (model.student, model.teacher):
            for name, part in list(encoder.named_children()):
                if name != 'trans':
                    setattr(encoder, name, convert_sync_batchnorm(part))
        return model

    @property
    def trained(self) -> nn.Module:
        return self.model.student

    def build_parts(self) -> None:
        config, device = self.config, self.device
        preparation = resolve_eval_config(
            self.model.student.trunk, img_size=config.img_size, orientation=config.orientation, **PUBLISHED)
        self.eval_config = replace(preparation, **{
            name: getattr(config, name) for name in ('mean', 'std') if getattr(config, name)})
        views = TwoViews(config.img_size, config.views, config.orientation)
        samples = make_samples(self.train_set, [views], config, self.splits, self.processes)
        self.train_loader = TrainLoader(
            samples, config, normalise(self.eval_config, device), self.splits, self.processes, device)
        self.task = PretrainTask(self.model, max(config.epochs * self.train_loader.steps, 1), device)

    def run_passes(self, epoch: int, start_step: int) -> Iterator[Pass]:
        for batch in self.train_loader.run(epoch, start_step):
            views = (view.contiguous(memory_format=self.memory_format) for view in batch.images.unbind(1))
            yield batch._replace(images=tuple(views))

    def check_terms(self, epoch: int, terms: dict[str, float]) -> None:
        for name in ('c', 't'):
            spread = terms.get(f'spread_{name}', 1.)
            if spread < self.config.collapse:
                raise TrainingError(
                    f'The outputs of the {name.upper()}-stream collapsed in epoch {epoch}: they spread {spread:.3f}, 1 '
                    f'is evenly, 0 all the same. Start a run with more images per forward pass, a lower rate or '
                    f'momentum closer to 1; the same command with --collapse 0 continues this one all the same.',
                    is_shared=True, has_remedy=True)

    # Evaluation

    def evaluate(self, check: Callable[[int], None]) -> Evaluation:
        config, trunk = self.config, self.model.student.trunk
        options = dict(
            batch_size=self.device_batch, workers=config.workers, processes=self.processes, device=self.device)
        bank, test = (build_eval_loader(data, self.eval_config, **options) for data in (self.bank_set, self.val_set))

        def checked() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for number, batch in enumerate(bank.run()):
                check(number)
                yield batch

        features, labels = extract_features(trunk, checked(), config.amp, self.processes)
        count = len(list_classes(self.train_set) or ()) or int(labels.max()) + 1
        model = KnnClassifier(Features(trunk), features, labels, count, config.knn_k, config.knn_temperature)
        scores = evaluate(model.to(self.device), test, self.device, config.amp, check, self.processes)
        return Evaluation(dict(val_knn=scores.top1), scores.seconds, scores.unreadable)

    def empty_scores(self) -> dict[str, float | None]:
        return dict(val_knn=None)

    def describe_scores(self, row: EpochRow) -> str:
        return f'nearest neighbours {row.scores["val_knn"]:.1f} %'

    def write_checkpoint(self, path: Path, **entries: Any) -> None:
        save_pretraining(
            path, self.model, eval_config=self.eval_config.to_dict(), config=self.settings, **entries)

    def load_state(self, weights: dict[str, Any], averaged: dict[str, Any] | None, meta: dict[str, Any]) -> None:
        super().load_state(weights, averaged, meta)
        self.task.step = self.stepper.steps

    # What is said

    def list_facts(self) -> dict[str, Any]:
        return dict(method=self.config.method, eval_config=self.eval_config.to_dict())

    def introduce(self) -> Iterator[str]:
        config, images = self.config, self.device_batch
        yield f'{config.method}: {len(self.train_set)} images without labels, two views of {config.img_size} pixels'
        if self.val_set is not None:
            yield (f'every {config.val_interval} epochs {config.knn_k} nearest neighbours (temperature '
                   f'{config.knn_temperature:g}) among {len(self.bank_set)} of them classify the {len(self.val_set)} '
                   f'images of {config.val_split}')
        else:
            yield f'no scores while training: {getattr(self, "no_scores", "the images have no labels")}'
        yield from super().introduce()
        seen = images * (self.processes.world_size if config.sync_bn else 1)
        if seen < FEW_IMAGES:
            yield (f'BatchNorm sees {seen} images at a time; with fewer than {FEW_IMAGES} the outputs may collapse. '
                   f'Accumulation does not help, a larger --device-batch or --sync-bn does')
        if not any(isinstance(module, _BatchNorm) for module in self.model.student.trunk.modules()):
            yield f'{config.model} has no BatchNorm, so only the heads and the T-stream have'
