"""Export of detectors and segmenters: backbone, neck and head as a program for images of one size.

The program of a RetinaNet returns what its `raw` does, for each level class logits and box codes;
`caretrans.dense.decode` makes boxes of them. That of a segmenter returns logits at a quarter of the size. Two-stage
detectors are refused: what their heads look at depends on the proposals of each image.
"""
import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import pil_to_tensor

from ..checkpoint import is_dense, read_checkpoint
from ..checkpoint.preparation import Preparation
from ..data.decode import describe_error, open_image
from ..dense import create_from_checkpoint
from ..dense.decode import Decoding, fit_image
from ..dense.retinanet import RetinaNet
from ..dense.semantic_fpn import SemanticFpn
from ..errors import ConfigError, DataError, EvaluationError
from ..evaluation.metrics import explain_non_finite
from ..evaluation.predict import find_images
from ..flags import keep_flags
from ..fuse import to_form
from ..measure.sample_network import SAMPLE_IMAGES
from ..models.backbone import Backbone, find_family
from ..models.folding import fold_norm_into_next, fold_norm_into_previous
from .config import ExportConfig, Job
from .program import join_outputs
from .source import Cases, Normalisation, Source, name_classes

__all__ = ['DenseSource', 'is_dense_config', 'load_dense_cases', 'load_dense_source', 'restrict_config']

FLAGS = (  # of a config that apply
    'checkpoint', 'entry', 'format', 'output_dir', 'input', 'precision', 'labels', 'img_size', 'target', 'data',
    'images', 'floor', 'latency', 'threads', 'json')
FORMATS = {RetinaNet: ('onnx', 'openvino', 'torch'), SemanticFpn: ('onnx', 'openvino', 'torch', 'mlpackage')}
MULTIPLE = 32  # of the sides of images
ASPECT = 1.6  # of the images of detectors, 1280 x 800, unless --img-size is given
IMAGES = 4  # to verify on, unless --images is given: they are large


class RawOutputs(nn.Module):
    """A model whose forward is `raw`: (B, 3, H, W) to logits, or to a tuple of class logits and box codes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        outputs = self.model.raw(x)
        return outputs if isinstance(outputs, torch.Tensor) else (*outputs['cls'], *outputs['reg'])


@dataclass
class DenseSource(Source):
    """A detector or segmenter; `model` is its `RawOutputs`.

    Attributes:
        task: 'retinanet' or 'semantic_fpn'.
        shapes: Of the outputs, without the batch, once they are known.
    """
    task: str = ''
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    has_fixed_size: ClassVar[bool] = True

    @property
    def is_segmenter(self) -> bool:
        return self.task == 'semantic_fpn'

    @property
    def purpose(self) -> str:
        return f'{"the class of each pixel" if self.is_segmenter else "objects"} of {len(self.class_names)} classes'

    def describe_resizing(self, size: tuple[int, int]) -> str:
        height, width = size
        how = ('whatever the aspect' if self.is_segmenter else
               'until it fits, and fill the right or the bottom with the mean colour, which is 0 once normalised')
        return (f'Rotate the image upright as its EXIF data say. Resize (bilinear) to {height} x {width} pixels, '
                f'{how}. ')

    def fit(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """An image (3, H, W) of uint8 at the size of a program."""
        if not self.is_segmenter:
            pixels = fit_image(image, size, self.eval_config.mean)[0]
        else:
            pixels = F.interpolate(image[None].float(), size, mode='bilinear', align_corners=False)[0]
        return pixels.round().to(torch.uint8)

    def name_outputs(self, job: Job) -> list[str]:
        if self.is_segmenter:
            return [job.output]
        levels = [stride.bit_length() - 1 for stride in self.model.model.anchor_generator.strides]
        return [f'{name}_p{level}' for name in ('cls', 'reg') for level in levels]

    def list_facts(self, job: Job) -> dict[str, str]:
        facts = dict(task=self.task)
        if self.is_segmenter:
            return dict(facts, outputs='Scores (batch, classes, height / 4, width / 4): resize them to the image '
                                       '(bilinear), then take the largest.')
        decoding = Decoding.from_model(self.model.model, job.size)
        return dict(facts, decoding=decoding.to_json(), outputs=(
            'Class logits (batch, 9 x classes, rows, columns) and box codes (batch, 36, rows, columns) of each level: '
            'caretrans.dense.decode.decode_detections makes boxes of them.'))

    def build(self, job: Job) -> nn.Module:
        network = copy.deepcopy(self.model)
        _fold(network.model, job)
        prepare = Normalisation(self.eval_config.mean, self.eval_config.std) if job.input == 'image' else nn.Identity()
        return nn.Sequential(prepare, network).eval().requires_grad_(False)

    def make_calibration(self, job: Job, count: int = 256) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, 3, *job.size), dtype=torch.uint8, generator=generator)
        return self.make_ready(pixels, job)

    def split(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a program from their row, (B, numbers)."""
        parts = outputs.split([torch.Size(shape).numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def find_classes(self, outputs: torch.Tensor) -> torch.Tensor:
        """The likeliest class of each pixel or anchor, (B, places)."""
        logits = self.split(outputs)[:1 if self.is_segmenter else len(self.shapes) // 2]
        return torch.cat([y.unflatten(1, (-1, len(self.class_names))).argmax(2).flatten(1) for y in logits], dim=1)


def _fold(model: nn.Module, job: Job) -> None:
    """Fold what a form folds, in place: the backbone as in classification, and the BatchNorms of neck and head."""
    pyramid = model.backbone
    body = pyramid.body
    if isinstance(body.network, Backbone):
        scales_maps = find_family(model.dense_config['backbone']) == 'mlla'  # in its phone form
        body.network = to_form(body.network, 'fused' if scales_maps else job.get_form())
    if not isinstance(model, SemanticFpn):
        return
    for i, norm in enumerate(body.norms):
        if isinstance(norm, nn.BatchNorm2d):
            lateral = pyramid.fpn.inner_blocks[i]
            lateral[0] = fold_norm_into_next(norm, lateral[0])
            body.norms[i] = nn.Identity()
    for branch in model.branches:
        for layers in branch:
            if isinstance(layers, nn.Sequential):
                layers[0], layers[1] = fold_norm_into_previous(layers[0], layers[1]), nn.Identity()


# Loading --------------------------------------------------------------------------------------------------------------

def is_dense_config(config: ExportConfig) -> bool:
    """Whether the checkpoint of a config holds a detector or segmenter."""
    return bool(config.checkpoint) and is_dense(read_checkpoint(config.checkpoint, config.entry or None))


def restrict_config(config: ExportConfig) -> ExportConfig:
    """The config for a detector or segmenter, with its defaults.

    Raises:
        ConfigError: A flag does not apply, or a format or precision.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    keep_flags({name: value for name, value in vars(config).items() if name in defaults}, FLAGS,
               'a detector or segmenter', defaults)
    if 'int8' in config.precision:
        raise ConfigError('--precision int8 cannot be used with a detector or segmenter: use fp32 or fp16.')
    return dataclasses.replace(config, output='logits', images=config.images or IMAGES)


def load_dense_source(config: ExportConfig) -> DenseSource:
    """Load the detector or segmenter of a config.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: Its kind cannot be exported, or not to a requested format or size.
    """
    model, loaded = create_from_checkpoint(config.checkpoint, config.entry or None)
    settings = model.dense_config
    task = settings['task']
    if type(model) not in FORMATS:
        raise ConfigError(
            f'{config.checkpoint}: {task} cannot be exported: what its heads look at depends on the proposals of each '
            f'image, so that there is no program of fixed shapes. Export a retinanet or semantic_fpn.')
    wrong = [name for name in config.format if name not in FORMATS[type(model)]]
    if wrong:
        raise ConfigError(f'--format {wrong[0]} with {task}: choose from {", ".join(FORMATS[type(model)])}.')
    names = loaded.meta.get('class_names')
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if task == 'semantic_fpn' else (
        model.transform.image_mean, model.transform.image_std)
    prepared = Preparation(
        (3, *_choose_size(model)), interpolation='bilinear', mean=mean, std=std, crop_pct=1., crop_mode='squash',
        orientation='exif')
    return DenseSource(
        f'{task}_{settings["backbone"]}', RawOutputs(model), prepared,
        name_classes(config, settings['num_classes'], names), str(loaded.path),
        hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest(), meta=dict(loaded.meta), task=task)


def _choose_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a program unless --img-size is given: about those of training."""
    if isinstance(model, SemanticFpn):
        side = -(-model.min_size // MULTIPLE) * MULTIPLE
        return side, side
    short = model.transform.min_size[0]
    return tuple(-(-int(side) // MULTIPLE) * MULTIPLE for side in (
        short, min(short * ASPECT, model.transform.max_size)))


@torch.no_grad()
def load_dense_cases(source: DenseSource, size: tuple[int, int], data: str = '', count: int | None = None) -> Cases:
    """Evenly spaced images of a folder, the bundled ones if none is named, and the float64 outputs in a row.

    Raises:
        ConfigError: The size is no multiple of 32.
        DataError: There are no images, or one is damaged.
        EvaluationError: An output is not finite.
    """
    if any(side % MULTIPLE for side in size):
        raise ConfigError(f'--img-size {size[0]}x{size[1]}: take multiples of {MULTIPLE} for a detector or segmenter.')
    folder = data or str(SAMPLE_IMAGES / 'val')
    paths = list(find_images([folder]))
    total = min(count or IMAGES, len(paths))
    chosen = [paths[i * len(paths) // total] for i in range(total)]
    pixels = torch.stack([source.fit(_read(path), size) for path in chosen])
    model, rows = copy.deepcopy(source.model).double(), []
    for image in pixels.split(1):
        outputs = model(source.normalise(image, torch.float64))
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        source.shapes = [tuple(y.shape[1:]) for y in outputs]
        rows.append(join_outputs([y.flatten(1) for y in outputs]))
    expected = torch.cat(rows)
    broken = int((~expected.isfinite().all(dim=1)).sum())
    if broken:
        raise EvaluationError(
            f'The outputs of {broken} of {total} images are not finite, so there is nothing to compare with: '
            f'{explain_non_finite(model)}.')
    return Cases(f'{folder}, {total} of {len(paths)} images', pixels, expected, [Path(path).name for path in chosen])


def _read(path: str) -> torch.Tensor:
    """An image (3, H, W) of uint8."""
    try:
        return pil_to_tensor(open_image(Path(path).read_bytes(), 'exif'))
    except Exception as error:  # whatever Pillow raises on a damaged file
        raise DataError(f'{path} cannot be read as an image ({describe_error(error)}): remove it.') from None
