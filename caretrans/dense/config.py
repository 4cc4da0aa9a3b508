"""Settings of the training of a detector or segmenter."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig, TrainConfig, find_task, peek_flags, setting
from ..errors import ConfigError
from .backbone import LAST_MAPS, NORMS
from .load import TASKS
from .masks import has_masks
from .objects import has_objects, read_objects
from .transforms import DenseAugment

__all__ = ['SAMPLE_RECIPES', 'DenseConfig', 'find_dense_task']

OPTIONS = {  # of `create_dense_model`, for each task
    'retinanet': ('channels',),
    'faster_rcnn': ('channels', 'hidden', 'proposals', 'rois'),
    'mask_rcnn': ('channels', 'hidden', 'proposals', 'rois', 'mask_convs'),
    'semantic_fpn': ('channels', 'head_channels')}
SAMPLE_RECIPES = {  # for data without a recipe, by task
    'faster_rcnn': 'faster_rcnn_care_s0_cards', 'mask_rcnn': 'mask_rcnn_care_s0_nuclei',
    'retinanet': 'retinanet_care_s0_cards', 'semantic_fpn': 'semantic_fpn_care_s0_nuclei'}


@dataclass
class DenseConfig(RunConfig):
    """Everything that decides what the training of a detector or segmenter computes.

    The defaults are those of CAS-ViT's detectors on COCO, for one device.
    """

    task: str = setting('mask_rcnn', 'detector or segmenter to train', choices=list(TASKS))
    num_classes: int | None = setting(
        None, 'number of classes, for masks without a file classes.txt', bounds=(1, 255))
    reduce_zero_label: bool | None = setting(
        None, 'masks: 0 is no class, 1 is the first one (default: only in the layout of ADE20K with 150 classes)')
    new_heads: bool = setting(
        False, 'initialize the layers of the classes randomly if the detector or segmenter of --checkpoint has others')

    channels: int = setting(256, 'width of the FPN', bounds=(8, None))
    hidden: int = setting(1024, 'width of the box head of Faster and Mask R-CNN', bounds=(8, None))
    proposals: int = setting(1000, 'proposals of Faster and Mask R-CNN that are kept', bounds=(1, None))
    rois: int = setting(512, 'proposals per image on which the heads are trained', bounds=(1, None))
    mask_convs: int = setting(4, 'convolutions of the mask head', bounds=(1, None))
    head_channels: int = setting(128, 'width of the head of Semantic FPN', bounds=(8, None))
    norm: str = setting('layer', 'norm of each map of the backbone', choices=list(NORMS))
    frozen_bn: bool | None = setting(
        None, 'BatchNorm of the backbone keeps its statistics (default: with pretrained weights and fewer than 16 '
        'images per device)')
    last_map: str | None = setting(
        None, 'last map of CARE: before its last block, or as its heads see it (default: residual)',
        choices=list(LAST_MAPS))

    min_sizes: list[int] = setting(
        [800], 'short sides of training images in pixels, one drawn per image; the last one also for evaluation',
        bounds=(32, None))
    max_size: int = setting(1333, 'maximum of the long side in pixels', bounds=(32, None))
    scale: list[float] = setting([1., 1.], 'range of a random factor on the image size', size=2, bounds=(0, 100))
    crop_size: int = setting(0, 'side of random crops in pixels, 0 for none', bounds=(0, None), off=0)
    hflip: float = setting(.5, 'probability of a horizontal flip', bounds=(0, 1), off=0.)
    vflip: float = setting(0., 'probability of a vertical flip', bounds=(0, 1), off=0.)
    photometric: bool = setting(False, 'random brightness, contrast, saturation and hue')
    detr_crop: bool = setting(False, 'half of the time, a random crop of the image as in DETR')

    schedule: str = setting(
        'step', 'step: a tenth after each of the milestones; poly: power 0.9; or cosine',
        choices=['step', 'poly', 'cosine'])
    milestones: list[int] = setting([8, 11], 'epochs after which the learning rate falls', bounds=(1, None))
    warmup_steps: int = setting(500, 'steps of linear warm-up; replaces warmup_epochs', bounds=(0, None), off=0)
    decay_norms: bool = setting(True, 'weight decay of norms and biases, too')

    drop_path: float = setting(0., 'stochastic depth rate of the last block', bounds=(0, 0.99), off=0.)
    batch_size: int = setting(16, 'images per optimizer step, over all devices', bounds=(1, None))
    lr: float = setting(1e-4, 'peak learning rate', positive=True)
    min_lr: float = setting(0., 'final learning rate', bounds=(0, None))
    warmup_lr: float = setting(1e-10, 'initial learning rate', bounds=(0, None))
    weight_decay: float = setting(1e-4, 'weight decay', bounds=(0, None), off=0.)
    epochs: int = setting(12, 'epochs of the schedule', bounds=(1, None))
    warmup_epochs: int = setting(0, 'epochs of linear warm-up', bounds=(0, None), off=0)
    step_schedule: bool = setting(True, 'update the learning rate every step instead of every epoch')

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment  # noqa: B018 (refuses what cannot be used)
        if self.schedule == 'step' and any(epoch >= self.epochs for epoch in self.milestones):
            raise ConfigError(
                f'milestones={self.milestones} are not below epochs={self.epochs}: set --milestones as well.')
        for name in ('num_classes', 'reduce_zero_label'):
            if self.task != 'semantic_fpn' and getattr(self, name) is not None:
                raise ConfigError(f'{name}={getattr(self, name)} is for masks, the data of {self.task} state their '
                                  f'classes: omit it.')
        if self.new_heads and not self.checkpoint:
            raise ConfigError('new_heads=True without weights: all are new; name a file with --checkpoint, or omit it.')
        if self.frozen_bn and not (self.checkpoint or self.pretrained):
            raise ConfigError('frozen_bn with random weights keeps statistics that fit no image: name weights with '
                              '--checkpoint or --pretrained, or use --no-frozen-bn.')
        if self.warmup_steps and not self.step_schedule:
            raise ConfigError(f'warmup_steps={self.warmup_steps} needs a rate per step: add --step-schedule, or use '
                              f'--warmup-steps 0 --warmup-epochs N.')

    @property
    def run_name(self) -> str:
        return f'{self.task}-{super().run_name}'

    @property
    def augment(self) -> DenseAugment:
        """The augmentation of training images."""
        return DenseAugment(
            tuple(self.min_sizes), self.max_size, tuple(self.scale), self.crop_size, self.hflip, self.vflip,
            self.photometric, self.detr_crop)

    def model_options(self) -> dict[str, Any]:
        """Options of `create_dense_model` besides task, backbone, classes and weights."""
        return dict(
            {name: getattr(self, name) for name in OPTIONS[self.task]}, norm=self.norm, last_map=self.last_map,
            min_size=self.min_sizes[-1], max_size=self.max_size)

    def schedule_options(self, steps_per_epoch: int) -> dict[str, Any]:
        half = .5 / (steps_per_epoch if self.step_schedule else 1)  # timm's falls one step before a milestone
        kinds = dict(
            step=dict(sched='multistep', decay_milestones=[epoch + half for epoch in self.milestones], decay_rate=.1),
            poly=dict(sched='poly', decay_rate=.9), cosine={})
        warmup = dict(warmup_epochs=self.fit_warmup(steps_per_epoch) / steps_per_epoch) if self.warmup_steps else {}
        return {**super().schedule_options(steps_per_epoch), **kinds[self.schedule], **warmup}

    def fit_warmup(self, steps_per_epoch: int) -> int:
        """Steps of warm-up: half of the run where it is shorter than `warmup_steps`."""
        steps = self.epochs * steps_per_epoch
        return self.warmup_steps if self.warmup_steps < steps else steps // 2

    def optimizer_options(self) -> dict[str, Any]:
        return dict(super().optimizer_options(), filter_bias_and_bn=not self.decay_norms)


def find_dense_task(argv: Sequence[str]) -> str:
    """The detector or segmenter that a command line of train.py means, '' for a classifier.

    It is that of --task, or of the recipe, or else the one that the data are for: with the format of COCO or VOC, a
    detector, with masks if every object has one; with images and masks, a segmenter.
    """
    given = peek_flags(argv, DenseConfig, TrainConfig)
    if 'task' in given or 'recipe' in given:
        return given.get('task') or find_task(given['recipe'])
    data = given.get('data_folder') or given.get('data')
    if not data:
        return ''
    split = given.get('train_split', DenseConfig.train_split)
    if has_objects(data, split):
        objects = [entry for image in read_objects(data, split).images for entry in image.objects]
        return 'mask_rcnn' if objects and all('segmentation' in entry for entry in objects) else 'faster_rcnn'
    return 'semantic_fpn' if has_masks(data, split) else ''
