"""Training of detectors and segmenters through the run folder, with everything that the training of classifiers has."""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import TrainingTask
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.functional import normalize

from ..checkpoint import is_dense, read_checkpoint
from ..data.loaders import TrainLoader
from ..distributed import Processes
from ..errors import CheckpointError, ConfigError, DataError
from ..models.backbone import disable_drop_path
from ..training.folder import list_checkpoints
from ..training.state import EpochRow, Evaluation
from ..training.trainer import Trainer, save_memory
from .coco import encode_masks
from .config import DenseConfig
from .evaluate import score_model
from .load import create_dense_model, load_weights, save_checkpoint
from .masks import IGNORE, check_masks, read_masks
from .objects import read_objects
from .samples import DetectionSamples, SegmentationSamples, Target, collate
from .transforms import build_transform

__all__ = ['DenseTask', 'DenseTrainer']

FEW_IMAGES = 16  # per device; with fewer, BatchNorm of a pretrained backbone keeps its statistics
PAD_TO = 32
TERMS = {  # parts of the loss, by task
    'retinanet': ('classification', 'bbox_regression'),
    'faster_rcnn': ('loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg'),
    'mask_rcnn': ('loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask'),
    'semantic_fpn': ()}
COLUMNS = {  # of the table, and the scores of `DenseScores` in them: part and name
    'val_AP': ('box', 'AP'), 'val_AP50': ('box', 'AP50'), 'val_mask_AP': ('mask', 'AP'),
    'val_mask_AP50': ('mask', 'AP50'), 'val_mIoU': ('pixel', 'mIoU'), 'val_accuracy': ('pixel', 'accuracy')}
SCORES = {  # columns of a task; the first one chooses the best epoch
    'retinanet': ('val_AP', 'val_AP50'), 'faster_rcnn': ('val_AP', 'val_AP50'),
    'mask_rcnn': ('val_mask_AP', 'val_mask_AP50', 'val_AP', 'val_AP50'), 'semantic_fpn': ('val_mIoU', 'val_accuracy')}


class DenseTask(TrainingTask):
    """Forward pass and losses of a detector or segmenter.

    Called with a normalised batch, (images, targets): of a detector, an ImageList and a list of dicts; of a segmenter,
    images (B, 3, H, W) and label maps (B, H, W). The loss of a segmenter is the cross entropy, averaged over all pixels
    as in mmseg, where pixels that are ignored count as 0.

    Attributes:
        terms: Names of the parts of the loss among the results.
    """

    def __init__(self, model: nn.Module, task: str, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module, self.terms = model, TERMS[task]

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: Any) -> 'DenseTask':
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def forward(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:
        if self.terms:
            losses = self.trainable_module(images, targets)
            return dict(losses, loss=sum(losses.values()))
        logits = self.trainable_module(images)
        with torch.autocast(logits.device.type, enabled=False):
            return dict(loss=F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='none').mean())


class DeviceBatches:
    """Batches of a loader on the device, normalised and then padded, right and at the bottom, to multiples of 32.

    Label maps are padded with the value that is ignored.
    """

    def __init__(
            self, loader: Iterable[tuple[list[torch.Tensor], list[Target]]], device: torch.device,
            memory_format: torch.memory_format) -> None:
        self.loader, self.device, self.memory_format = loader, device, memory_format

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for images, targets in self.loader:
            sizes = [tuple(image.shape[-2:]) for image in images]
            height, width = (-(-max(sides) // PAD_TO) * PAD_TO for sides in zip(*sizes, strict=True))
            batch = torch.zeros(len(images), 3, height, width, device=self.device)
            for place, image in zip(batch, images, strict=True):
                pixels = image.to(self.device, non_blocking=True).float() / 255
                place[:, :image.shape[1], :image.shape[2]] = normalize(
                    pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            batch = batch.contiguous(memory_format=self.memory_format)
            if isinstance(targets[0], dict):
                yield ImageList(batch, sizes), [
                    {name: value.to(self.device, non_blocking=True) for name, value in target.items()}
                    for target in targets]
            else:
                maps = [F.pad(target, (0, width - target.shape[1], 0, height - target.shape[0]), value=IGNORE)
                        for target in targets]
                yield batch, torch.stack(maps).to(self.device).long()


class DenseTrainer(Trainer):
    """Training of a detector or segmenter."""

    config: DenseConfig
    counted = ' in all'
    saves_before_evaluation = True  # an image that cannot be used ends it

    @classmethod
    def adopt(cls, config: DenseConfig, path: Path) -> dict[str, Any]:
        """Whether BatchNorm is frozen: by default it depends on the images per device, which may change."""
        for file in list_checkpoints(path):
            try:
                return dict(frozen_bn=read_checkpoint(file).meta['dense']['frozen_bn'])
            except (CheckpointError, KeyError):
                continue
        return {}

    def __init__(self, config: DenseConfig, processes: Processes, device: torch.device) -> None:
        self.scores = SCORES[config.task]
        self.best_score = self.scores[0]
        self.score_title = f'{self.best_score.removeprefix("val_").replace("_", " ")}, %'
        super().__init__(config, processes, device)

    def open_data(self) -> None:
        config, transform = self.config, build_transform(self.config.augment)
        if config.task == 'semantic_fpn':
            data, self.val_data = (
                read_masks(config.data, split, config.num_classes, config.reduce_zero_label)
                for split in (config.train_split, config.val_split))
            self.train_set: Any = SegmentationSamples(data, transform)
            self.val_data = replace(self.val_data, notes=[*self.val_data.notes, *check_masks(self.val_data)])
            self.classes, self.num_classes = data.classes or None, data.num_classes
            if self.classes and len(self.classes) != self.num_classes:
                raise ConfigError(f'num_classes={self.num_classes}, but {config.data} names {len(self.classes)} '
                                  f'classes: omit --num-classes.')
        else:
            data, self.val_data = (
                read_objects(config.data, split) for split in (config.train_split, config.val_split))
            masks = config.task == 'mask_rcnn'
            if masks:
                self.val_data = encode_masks(self.val_data)
            self.train_set = DetectionSamples(data, transform, masks)
            self.classes, self.num_classes = data.classes, len(data.classes)
            if self.val_data.classes != self.classes:
                raise DataError(
                    f'{self.val_data.file} has the classes {", ".join(self.val_data.classes)}, {data.file} has '
                    f'{", ".join(self.classes)}: both splits must have the same, in one order.')
        self.val_set = self.val_data.images

    def build_model(self) -> nn.Module:
        config = self.config
        frozen = config.frozen_bn
        if frozen is None:
            frozen = bool(config.checkpoint or config.pretrained) and self.device_batch < FEW_IMAGES
        rates = dict(drop_path_rate=config.drop_path) if config.drop_path else {}
        whole = config.checkpoint and is_dense(read_checkpoint(config.checkpoint))
        model = create_dense_model(
            config.task, config.model, self.num_classes, config.checkpoint if config.checkpoint and not whole else None,
            {**rates, **config.model_args}, pretrained=config.pretrained, frozen_bn=frozen, **config.model_options())
        if not {**rates, **config.model_args}.get('drop_path_rate'):
            disable_drop_path(model)
        if whole:
            load_weights(model, config.checkpoint, self.classes, config.new_heads)
        if config.grad_checkpointing:
            save_memory(model.backbone.body.network, config.model)
        return model

    def build_parts(self) -> None:
        config = self.config
        self.train_loader = TrainLoader(
            self.train_set, config, lambda batches: DeviceBatches(batches, self.device, self.memory_format),
            self.splits, self.processes, self.device, collate=collate)
        self.task = DenseTask(self.model, config.task, self.device)

    def evaluate(self, check: Callable[[int], None]) -> Evaluation:
        scores = score_model(
            (self.model if self.ema is None else self.ema).eval(), self.val_data, self.list_names(), self.device,
            self.config.amp, self.processes, check)
        values = {name: getattr(scores, COLUMNS[name][0])[COLUMNS[name][1]] for name in self.scores}
        return Evaluation(values, scores.seconds)

    def list_names(self) -> list[str]:
        """Names of the classes, or their numbers."""
        return self.classes or [str(i) for i in range(self.num_classes)]

    def empty_scores(self) -> dict[str, float | None]:
        return dict.fromkeys(self.scores)

    def describe_scores(self, row: EpochRow) -> str:
        return '  '.join(f'{name.removeprefix("val_").replace("_", " ")} {"-" if value is None else f"{value:.1f} %"}'
                         for name, value in row.scores.items())

    def write_checkpoint(self, path: Path, **entries: Any) -> None:
        settings = dict(self.settings, reduce_zero_label=getattr(self.val_data, 'reduce_zero_label', None))
        save_checkpoint(path, self.model, self.classes or (), ema=self.ema, config=settings, **entries)

    def list_facts(self) -> dict[str, Any]:
        return dict(num_classes=self.num_classes, task=self.config.task, frozen_bn=self.model.backbone.body.frozen_bn)

    def introduce(self) -> Iterator[str]:
        yield (f'{self.config.task}: {len(self.train_set)} training, {len(self.val_set)} validation images, '
               f'{self.num_classes} classes')
        notes = dict.fromkeys([*self.train_set.notes, *self.val_data.notes])
        yield from notes
        yield from super().introduce()
        warmup = self.config.fit_warmup(self.train_loader.steps)
        if warmup < self.config.warmup_steps:
            yield f'the warm-up of {self.config.warmup_steps} steps does not fit: it takes {warmup}'
        if self.model.backbone.body.frozen_bn:
            yield 'BatchNorm of the backbone keeps its statistics (--no-frozen-bn trains them)'
