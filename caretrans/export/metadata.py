"""Metadata in the files of programs: their origin, converter, input and output."""
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import __version__
from ..checkpoint.file import is_plain
from ..strict_json import replace_non_finite, to_json
from ..text import escape
from .config import AIMED, Job
from .formats.table import list_versions
from .source import Source

__all__ = ['describe', 'describe_input', 'read_class_names']


def describe_input(source: Source, job: Job) -> str:
    """Preparation of images for a program, for people."""
    config, text = source.eval_config, source.describe_resizing(job.size)
    mean, std = (', '.join(f'{value:g}' for value in values) for values in (config.mean, config.std))
    figures = f'mean {mean}, standard deviation {std} of values from 0 to 1'
    if job.input == 'image':
        return text + f'The input is RGB pixels from 0 to 255; the program normalises them: {figures}.'
    return text + f'Normalise before the program, per channel in RGB order: {figures}.'


def describe(source: Source, job: Job) -> dict[str, str]:
    """Names and values for the metadata of a file, the same for every format.

    `class_names` is a list in JSON, `training_metrics` an object; packages have the names of pip, with versions.
    """
    height, width = job.size
    facts = dict(
        model=source.name, form=job.get_form(), format=job.format, precision=job.precision, compress=job.compress,
        input=job.input, output=job.output, size=f'{height}x{width}', batch=str(job.batch),
        channels=str(source.eval_config.input_size[0]), target=job.target if job.format in AIMED else '',
        checkpoint=Path(source.checkpoint).name if source.sha256 else source.checkpoint or 'random weights',
        preprocessing=describe_input(source, job),
        class_names=json.dumps(source.class_names, ensure_ascii=False), caretrans=__version__, **source.list_facts(job),
        **list_versions(job.kind, job.precision))
    facts['torch'] = torch.__version__  # with the platform it was built for
    if source.sha256:
        facts['checkpoint_sha256'] = source.sha256
    if source.accuracy:
        facts['accuracy'] = source.accuracy
    if source.meta.get('metrics') and is_plain(source.meta['metrics']):
        facts['training_metrics'] = to_json(replace_non_finite(source.meta['metrics']))
    return {name: escape(value) for name, value in facts.items()}


def read_class_names(facts: Mapping[str, str]) -> list[str]:
    """The labels in the metadata of a file.

    Raises:
        KeyError: The metadata are missing, because the file is truncated or was not exported by this package.
    """
    return json.loads(facts['class_names'])
