"""The network that is exported, from a checkpoint or with random weights, and the images it is compared on."""
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn as nn

from ..checkpoint.preparation import Preparation, resolve_eval_config
from ..data.datasets import describe_classes, list_classes, name_image, open_dataset
from ..data.decode import EvalTransform
from ..data.samples import load_images
from ..errors import CheckpointError, ConfigError, DataError, EvaluationError
from ..evaluation.evaluate import load_for_evaluation
from ..evaluation.metrics import explain_non_finite
from ..fuse import to_form
from ..measure.sample_network import SAMPLE_IMAGES, load_sample_images, randomize
from ..models.folding import fold_pixels
from ..runtimes.tracing import trace_network
from ..text import escape, read_text
from .config import ExportConfig, Job

__all__ = [
    'Cases', 'ExportedNetwork', 'Normalisation', 'Source', 'build_network', 'load_cases', 'load_source', 'name_classes',
    'trace']

SCALED = 4  # images for the scales of the phone form
SIDES = dict(  # by crop mode
    center='the shorter side', squash='each side, whatever the aspect',
    border='the longer side, the rest of a square in the mean colour')


@dataclass
class Source:
    """A trained network and its facts; `dense.DenseSource` is that of a detector or segmenter.

    Attributes:
        name: Of the model.
        model: The original network, in evaluation mode, float32, on the CPU.
        eval_config: Preparation of images.
        class_names: For people, one for each output.
        checkpoint: The file, or where published weights are from; '' for random weights.
        sha256: Of the file; '' without one.
        accuracy: Measured accuracy of the original network, in words; '' if unknown.
        meta: Of the file.
    """
    name: str
    model: nn.Module
    eval_config: Preparation
    class_names: list[str]
    checkpoint: str = ''
    sha256: str = ''
    accuracy: str = ''
    meta: dict[str, Any] = field(default_factory=dict, repr=False)

    has_fixed_size: ClassVar[bool] = False  # of its programs, whatever their format allows

    @property
    def purpose(self) -> str:
        """What a program does, for its description."""
        return f'an image to {len(self.class_names)} classes'

    @property
    def size(self) -> tuple[int, int]:
        return self.eval_config.size

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 pixels (B, C, H, W) as the network takes them in evaluation."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None]
                     for values in (self.eval_config.mean, self.eval_config.std))
        return ((pixels.double() / 255 - mean) / std).to(dtype)

    def describe_resizing(self, size: tuple[int, int]) -> str:
        """How images are brought to the size of a program, for people."""
        config, (height, width) = self.eval_config, size
        text = (f'Resize ({config.interpolation}) until the centre crop of {height} x {width} pixels is '
                f'{100 * config.crop_pct:g} % of {SIDES[config.crop_mode]}, and crop. ')
        upright = 'Rotate the image upright as its EXIF data say. ' if config.orientation == 'exif' else ''
        return upright + text

    def name_outputs(self, job: Job) -> list[str]:
        """The outputs of a program, in order."""
        return [job.output]

    def list_facts(self, job: Job) -> dict[str, str]:
        """Metadata of its programs beside those of every network."""
        return {}

    def build(self, job: Job) -> nn.Module:
        """See `build_network`."""
        images = self.make_calibration(replace(job, input='tensor'), SCALED) if job.get_form() == 'phone' else None
        network = to_form(self.model, job.get_form(), images)
        prepare: nn.Module = nn.Identity()
        if job.input == 'image':
            mean, std = self.eval_config.mean, self.eval_config.std
            name = self.model.pretrained_cfg.get('first_conv') or ''
            conv = dict(network.named_modules()).get(name)  # another form may have other names
            if isinstance(conv, nn.Conv2d) and not any(conv.padding):
                half = job.precision == 'fp16'
                prepare = _Darkening() if half else prepare
                network.set_submodule(name, fold_pixels(conv, mean, std, 255 / 256 if half else 255, half))
            else:
                prepare = Normalisation(mean, std)
        return ExportedNetwork(network, prepare, job.output != 'logits')

    def make_ready(self, pixels: torch.Tensor, job: Job) -> torch.Tensor:
        """uint8 pixels as the program of a job takes them, float32."""
        return pixels.float() if job.input == 'image' else self.normalise(pixels)

    def make_example(self, job: Job) -> torch.Tensor:
        """Images (batch, C, H, W) as the program takes them; real ones where the bundled ones are installed."""
        return self.make_calibration(job, job.batch)

    def make_calibration(self, job: Job, count: int = 256) -> torch.Tensor:
        """Training images, (count, C, H, W) as the program takes them, for the ranges of int8."""
        prepared = self.eval_config.at_size(job.size)
        if SAMPLE_IMAGES.is_dir():
            dataset = open_dataset(str(SAMPLE_IMAGES), 'train')
            chosen = [i * len(dataset) // count for i in range(count)]
            pixels, _ = load_images(dataset, chosen, EvalTransform(prepared, as_uint8=True))
        else:
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randint(256, (count, *prepared.input_size), dtype=torch.uint8, generator=generator)
        return self.make_ready(pixels, job)


def name_classes(config: ExportConfig, count: int, own: list[str] | None = None) -> list[str]:
    """Labels from the file, if given, else from the checkpoint, else ImageNet's labels or numbers.

    Several classes of one name get their numbers, because Core ML returns probabilities by name: of ImageNet's classes
    two are cranes, the bird and the machine.
    """
    names = describe_classes(own, count)
    if config.labels:
        names = read_text(config.labels, ConfigError, '--labels').rstrip().splitlines()
        empty = [number for number, name in enumerate(names, 1) if not name.strip()]
        if empty:
            raise ConfigError(f'--labels {config.labels}: line {empty[0]} is empty: give each class a name.')
    if len(names) != count:
        raise ConfigError(
            f'{config.labels or config.checkpoint} names {len(names)} classes, the network has {count}: '
            f'use --labels FILE with one class on each of {count} lines.')
    names = [escape(name) for name in names]
    counts = Counter(names)
    return [f'{name} (class {number})' if counts[name] > 1 else name for number, name in enumerate(names)]


def load_source(config: ExportConfig) -> Source:
    """Load the checkpoint of a config or published weights, or make random sample weights.

    Raises:
        CheckpointError: The file cannot be read, belongs to another model, or expects another channel order.
    """
    if not config.random_weights:
        model, loaded, eval_config = load_for_evaluation(
            config.checkpoint, config.model or None, config.entry or None, pretrained=config.pretrained)
        if eval_config.channel_order != 'rgb':
            raise CheckpointError(
                f'{config.checkpoint}: expects images in channel order {eval_config.channel_order}, exports need '
                f'RGB: `python -m caretrans convert {config.checkpoint} rgb.pth.tar --to caretrans` converts it.')
        return Source(
            model.pretrained_cfg['architecture'], model, eval_config,
            name_classes(config, model.num_classes, loaded.get_class_names(model.num_classes)), str(loaded.path),
            hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest() if config.checkpoint else '',
            meta=dict(loaded.meta, class_names=loaded.get_class_names(model.num_classes)))
    model = timm.create_model(config.model).eval()
    eval_config = resolve_eval_config(model)
    size = eval_config.size
    images = load_sample_images(model, size, 8)
    noise = torch.randn(8, model.in_chans, *size, generator=torch.Generator().manual_seed(0))
    randomize(model, noise if images is None else images)
    return Source(config.model, model, eval_config, name_classes(config, model.num_classes))


# The network ----------------------------------------------------------------------------------------------------------

class Normalisation(nn.Conv2d):
    """Pixels from 0 to 255 to normalised ones, per channel: (B, C, H, W) to the same shape.

    A convolution, which converters keep as it is: they split a BatchNorm with an eps into two operations.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__(len(mean), len(mean), 1, groups=len(mean))
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        with torch.no_grad():
            self.weight.copy_((1 / (255 * std))[:, None, None, None])
            self.bias.copy_(-mean / std)


class _Darkening(nn.Module):
    """Pixels from 0 to 255 divided by 256, exact in float16, so that the weights behind it are normal numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 / 256)


class ExportedNetwork(nn.Module):
    """Images as a program takes them, (B, C, H, W), to logits or probabilities (B, classes)."""

    def __init__(self, network: nn.Module, prepare: nn.Module, probabilities: bool) -> None:
        super().__init__()
        self.prepare, self.network, self.probabilities = prepare, network, probabilities
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(self.prepare(images))
        return logits.softmax(dim=-1) if self.probabilities else logits


def build_network(source: Source, job: Job) -> nn.Module:
    """The network that a job exports, with its normalisation and softmax.

    The normalisation is folded into the first convolution where that does not pad; else it precedes it. In float16
    folded weights would be too small for pixels up to 255, so the pixels are scaled down first.
    """
    return source.build(job)


def trace(source: Source, job: Job) -> torch.export.ExportedProgram:
    """The network of a job as a program of torch.export, for images of its batch and size."""
    return trace_network(build_network(source, job), source.make_example(job))


# Images ---------------------------------------------------------------------------------------------------------------

@dataclass
class Cases:
    """Images to compare programs on, with the float64 logits of the original network.

    Attributes:
        name: Of the data.
        pixels: (n, C, H, W) uint8, resized and cropped as in evaluation.
        logits: (n, classes) float64.
        images: Name of each, for messages.
        labels: (n,) where the data has the classes of the network, else None.
    """
    name: str
    pixels: torch.Tensor
    logits: torch.Tensor
    images: list[str]
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def describe_accuracy(self) -> str:
        """Top-1 of the original network in float64, if the labels match its classes; else ''."""
        if self.labels is None:
            return ''
        top1 = 100 * (self.logits.argmax(dim=-1) == self.labels).double().mean().item()
        folder, _, images = self.name.rpartition(', ')  # programs are given away: no path of this machine
        return f'top-1 {top1:.2f} % on {Path(folder).name}, {images}'

    def select(self, count: int, first: int | None = None) -> 'Cases':
        """`count` of them at most, evenly spaced, and of these the first."""
        chosen = sorted({i * len(self) // count for i in range(count)})[:first]
        labels = None if self.labels is None else self.labels[chosen]
        return Cases(self.name, self.pixels[chosen], self.logits[chosen], [self.images[i] for i in chosen], labels)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """The pixels in batches of one size, the last filled up with the first images."""
        for start in range(0, len(self), size):
            yield self.pixels[[i % len(self) for i in range(start, start + size)]]


@torch.no_grad()
def load_cases(source: Source, size: tuple[int, int], data: str = '', count: int | None = None) -> Cases:
    """Evenly spaced validation images, the bundled ones if no folder is named, and their float64 logits.

    Args:
        count: Number of images; all if not given.
    Raises:
        DataError: There are no images there.
        ConfigError: The network does not support this image size.
        EvaluationError: Its outputs are not finite.
    """
    folder = data or str(SAMPLE_IMAGES)
    if not Path(folder).is_dir():
        raise DataError(f'No images at {folder}: name a folder with val/CLASS/*.jpg with --data.')
    dataset = open_dataset(folder, 'val')
    total = min(count or len(dataset), len(dataset))
    chosen = [i * len(dataset) // total for i in range(total)]
    pixels, labels = load_images(dataset, chosen, EvalTransform(source.eval_config.at_size(size), as_uint8=True))
    model = copy.deepcopy(source.model).double()
    try:
        logits = torch.cat([model(source.normalise(part, torch.float64)) for part in pixels.split(8)])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f'--img-size {size[0]}x{size[1]}: {source.name} does not support this size: '
            f'{" ".join(str(error).split())}') from error
    broken = int((~logits.isfinite().all(dim=1)).sum())
    if broken:
        raise EvaluationError(
            f'The logits of {broken} of {total} images are not finite, so there is nothing to compare with: '
            f'{explain_non_finite(model)}.')
    own = source.meta.get('class_names')
    labels = labels if own and own == list_classes(dataset) else None
    name = f'{folder}, {total} of {len(dataset)} validation images'
    return Cases(name, pixels, logits, [name_image(dataset, i) for i in chosen], labels)
