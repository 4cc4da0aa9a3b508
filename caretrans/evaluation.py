"""Use a checkpoint: score it on a data set, or name what is on images."""
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions

from .checkpoint import Checkpoint, create_from_checkpoint
from .data import DataError, build_eval_loader, describe_classes, list_classes, open_dataset, resolve_eval_config
from .engine import autocast, evaluate
from .progress import Progress

__all__ = ['evaluate_checkpoint', 'find_images', 'load_for_evaluation', 'predict_images']

CPU = torch.device('cpu')
EVAL_SETTINGS = ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')


def load_for_evaluation(
        checkpoint: str,
        model_name: Optional[str] = None,
        entry: Optional[str] = None,
        device: torch.device = CPU,
        **overrides: Any,
) -> Tuple[nn.Module, Checkpoint, Dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, the checkpoint, and how images are made ready for it.

    `overrides` (img_size, crop_pct, interpolation; None is no override) go over what the checkpoint was evaluated with
    in training, which goes over the `pretrained_cfg` of the model.
    """
    model, loaded = create_from_checkpoint(checkpoint, model_name, entry)
    stored = loaded.meta.get('eval_config') or {}
    settings = {name: stored.get(name) for name in EVAL_SETTINGS}
    if 'input_size' in stored:
        settings['img_size'] = stored['input_size'][-1]
    settings.update({name: value for name, value in overrides.items() if value is not None})
    return model.eval().to(device), loaded, resolve_eval_config(model, **settings)


def evaluate_checkpoint(
        checkpoint: str,
        data: str = '',
        split: str = '',
        dataset: str = '',
        model_name: Optional[str] = None,
        entry: Optional[str] = None,
        device: torch.device = CPU,
        batch_size: int = 64,
        workers: int = 2,
        amp: str = 'off',
        progress_stream: Any = None,
        **overrides: Any,
) -> Dict[str, Any]:
    """Top-1, top-5 and loss of a checkpoint over a data set.

    Args:
        data, dataset, split: As in `open_dataset`; what the checkpoint was trained with, if not given.
        overrides: See `load_for_evaluation`.
    Returns:
        What `engine.evaluate` returns, and checkpoint, model, entry, data, eval_config.
    Raises:
        CheckpointError, DataError: The file or the data cannot be used, or the classes of the two differ.
    """
    model, loaded, eval_config = load_for_evaluation(checkpoint, model_name, entry, device, **overrides)
    trained = loaded.meta.get('config') or {}
    if not data and not dataset:
        data, dataset = trained.get('data', ''), trained.get('dataset', '')
        if not data and not dataset:
            raise DataError(f'{checkpoint} does not say which data it is for: name a folder.')
    images = open_dataset(
        data, split or trained.get('val_split') or 'val', dataset, classes=loaded.meta.get('class_names'))
    classes = list_classes(images)
    if classes is not None and len(classes) != model.num_classes:
        raise DataError(f'{data} has {len(classes)} classes, {checkpoint} has {model.num_classes}: take its own data.')
    loader = build_eval_loader(images, eval_config, batch_size, workers, device)
    with Progress(len(images), stream=progress_stream) as progress:
        progress.describe('evaluation')
        result = evaluate(model, loader, device, amp, lambda seen: progress.update(seen - progress.count))
    return dict(
        result, checkpoint=str(checkpoint), entry=loaded.entry, model=model.pretrained_cfg['architecture'],
        data=data or dataset, eval_config=eval_config)


def find_images(paths: Iterable[str]) -> Iterator[Path]:
    """The files named, and the images in the folders named, at any depth and in order.

    Raises:
        DataError: A path is not there, or a folder has no images.
    """
    endings = get_img_extensions(as_set=True)
    for path in map(Path, paths):
        if path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(p for p in path.rglob('*') if p.suffix.lower() in endings)
            if not found:
                raise DataError(f'No images in {path}: {", ".join(sorted(endings))} are looked for.')
            yield from found
        else:
            raise DataError(f'No image or folder {path}: check the path.')


def predict_images(
        checkpoint: str,
        images: Iterable[str],
        topk: int = 5,
        model_name: Optional[str] = None,
        entry: Optional[str] = None,
        device: torch.device = CPU,
        amp: str = 'off',
        **overrides: Any,
) -> Iterator[Dict[str, Any]]:
    """The likeliest classes of each image.

    Args:
        images: Files and folders. A photograph is turned upright as its EXIF data say.
        topk: How many classes, at most as many as there are.
        overrides: See `load_for_evaluation`.
    Yields:
        {'image': path, 'classes': names, 'labels': their numbers, 'probabilities': 0 to 1}, or for a file that is no
        image {'image': path, 'error': why}.
    Raises:
        CheckpointError, DataError: Before the first image.
    """
    paths = list(find_images(images))
    model, loaded, eval_config = load_for_evaluation(checkpoint, model_name, entry, device, **overrides)
    names = describe_classes(loaded.meta.get('class_names'), model.num_classes)
    transform = create_transform(**{**eval_config, 'input_size': tuple(eval_config['input_size'])})
    for path in paths:
        try:
            with Image.open(path) as file:
                image = transform(ImageOps.exif_transpose(file).convert('RGB'))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            yield dict(image=str(path), error=f'is no image that can be read ({type(error).__name__})')
            continue
        with torch.inference_mode(), autocast(device, amp):
            probabilities = model(image[None].to(device)).float().softmax(dim=-1)[0].cpu()
        best: List[int] = probabilities.topk(min(topk, len(names))).indices.tolist()
        yield dict(
            image=str(path), classes=[names[i] for i in best], labels=best,
            probabilities=[probabilities[i].item() for i in best])
