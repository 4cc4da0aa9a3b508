"""Prediction of detectors and segmenters: boxes, masks and maps of classes, as JSON and drawn into images."""
import colorsys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..data.decode import describe_error, open_image
from ..errors import DataError
from ..evaluation.predict import find_images
from .detect import detect
from .load import open_model
from .semantic_fpn import SemanticFpn

__all__ = ['encode_mask', 'list_results', 'predict_images']

CPU = torch.device('cpu')


def encode_mask(mask: torch.Tensor) -> dict[str, Any]:
    """A mask (H, W) of 0 and 1 as COCO's uncompressed RLE: lengths of runs, column by column, beginning with zeros."""
    values = mask.T.flatten().tolist()
    counts = [len(list(run)) for _, run in groupby(values)]
    return dict(size=list(mask.shape), counts=[0, *counts] if values[:1] == [1] else counts)


def list_results(number: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of an image in the format of COCO's results, with `image_id` its number, and its `file_name`.

    Masks are compressed, as scorers read them, where faster-coco-eval is installed.
    """
    found = [dict(image_id=number, file_name=result['image'], **{
        name: value for name, value in entry.items() if name != 'category'}) for entry in result.get('objects', ())]
    if find_spec('faster_coco_eval'):
        from faster_coco_eval.core import mask as rle

        for entry in found:
            if 'segmentation' in entry:
                packed = rle.frPyObjects(entry['segmentation'], *entry['segmentation']['size'])
                entry['segmentation'] = dict(packed, counts=packed['counts'].decode())
    return found


def predict_images(
        checkpoint: str | PathLike, images: Iterable[str], output: str | PathLike, score: float = .5,
        device: torch.device = CPU, entry: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects of each image, or the class of each pixel.

    Args:
        checkpoint, entry: See `create_from_checkpoint`.
        images: Files and folders. Images are rotated upright as their EXIF data say.
        output: Folder for the drawings, created; a PNG per image, numbered if names repeat.
        score: Least score of an object that is drawn.
    Yields:
        For a detector {'image': path, 'drawing': path, 'objects': [{'category_id', 'category', 'bbox': [x, y, width,
        height], 'score', 'segmentation' with masks}]} in pixels, as in COCO's results, categories from 0; for a
        segmenter {'image', 'drawing', 'pixels': {class: share}}; or {'image': path, 'error': reason}.
    Raises:
        CheckpointError, DataError, EvaluationError: Before the first image; the last if weights are not finite.
    """
    paths = list(find_images(images))
    model, loaded = open_model(checkpoint, entry)
    model.to(device)
    count = model.dense_config['num_classes']
    names = loaded.meta.get('class_names') or [str(i) for i in range(count)]
    folder, used = Path(output), set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f'{folder} cannot be made ({error.strerror}): choose another --output.') from None
    for path in map(str, paths):
        try:
            pixels = pil_to_tensor(open_image(Path(path).read_bytes(), 'exif'))
        except Exception as error:  # one damaged file must not cost the answers for the others
            yield dict(image=path, error=f'cannot be read as an image ({describe_error(error)})')
            continue
        stem = Path(path).stem
        name = next(n for n in (stem, *(f'{stem}-{i}' for i in range(2, len(paths) + 2))) if n not in used)
        used.add(name)
        drawing = folder / f'{name}.png'
        segment = _segment if isinstance(model, SemanticFpn) else _detect
        try:
            found, picture = segment(model, pixels, names, score, device)
        except (RuntimeError, ValueError) as error:  # of images so thin that resizing leaves no pixel
            yield dict(image=path, error=f'cannot be used at {pixels.shape[1]} x {pixels.shape[2]} '
                                         f'pixels ({describe_error(error)})')
            continue
        picture.save(drawing)
        yield dict(image=path, drawing=str(drawing), **found)


def _color(label: int) -> tuple[int, ...]:
    """A bright colour of a class, far from those of its neighbours."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(.6 + label * .618034, 1., 1.))


def _detect(
        model: nn.Module, pixels: torch.Tensor, names: list[str], score: float, device: torch.device,
) -> tuple[dict[str, Any], Image.Image]:
    found = detect(model, pixels.to(device) / 255)
    masks = found['masks'][:, 0] >= .5 if 'masks' in found else None
    objects = []
    for i, (box, value, label) in enumerate(zip(
            found['boxes'].tolist(), found['scores'].tolist(), found['labels'].tolist(), strict=True)):
        left, top, right, bottom = box
        objects.append(dict(
            category_id=label, category=names[label], bbox=[left, top, right - left, bottom - top], score=value,
            **dict(segmentation=encode_mask(masks[i].int())) if masks is not None else {}))
    shown = found['scores'] >= score
    if shown.any():
        if masks is not None:
            pixels = draw_segmentation_masks(pixels, masks[shown], alpha=.5)
        texts = [f'{objects[i]["category"]} {objects[i]["score"]:.2f}' for i in shown.nonzero()[:, 0].tolist()]
        colors = [_color(label) for label in found['labels'][shown].tolist()]
        width = max(2, max(pixels.shape[1:]) // 250)
        pixels = draw_bounding_boxes(pixels, found['boxes'][shown], texts, colors, width=width)
    return dict(objects=objects), to_pil_image(pixels)


@torch.inference_mode()
def _segment(
        model: nn.Module, pixels: torch.Tensor, names: list[str], score: float, device: torch.device,
) -> tuple[dict[str, Any], Image.Image]:
    logits = model.segment(pixels.to(device))
    if not logits.isfinite().all():
        raise ValueError('the logits are not finite')
    classes = logits.argmax(0).cpu()
    shares = torch.bincount(classes.flatten(), minlength=len(names)) / classes.numel()
    masks = F.one_hot(classes, len(names)).permute(2, 0, 1).bool()
    present = shares.nonzero()[:, 0].tolist()
    picture = draw_segmentation_masks(pixels, masks[present], alpha=.5, colors=[_color(i) for i in present])
    return dict(pixels={names[i]: shares[i].item() for i in present}), to_pil_image(picture)
