"""What a program says of itself in its file: where it comes from, what goes in, what comes out."""
import json
from typing import Dict, List, Mapping

from .. import __version__
from .config import Job
from .source import Source

__all__ = ['describe', 'describe_input', 'read_class_names']


def describe_input(source: Source, job: Job) -> str:
    """How photographs are made ready for a program, for people."""
    config = source.eval_config
    steps = [
        f'RGB, channels first, resized ({config["interpolation"]}) so that the centre of {job.size[0]}x{job.size[1]} '
        f'is {config["crop_pct"]:g} of it, cropped']
    if job.input == 'image':
        steps.append('values from 0 to 255; the program normalises them')
    else:
        mean, std = (', '.join(f'{value:g}' for value in config[name]) for name in ('mean', 'std'))
        steps.append(f'(values / 255 - ({mean})) / ({std}) by channel')
    return '; '.join(steps)


def describe(source: Source, job: Job) -> Dict[str, str]:
    """Names and values for the metadata of a file; `class_names` is a list in JSON."""
    facts = dict(
        model=source.name, exporter=f'caretrans {__version__}', checkpoint_sha256=source.sha256 or 'random weights',
        precision=job.precision, network='as trained' if job.unfused else 'fused',
        preprocessing=describe_input(source, job), output=job.output,
        class_names=json.dumps(source.class_names, ensure_ascii=False))
    if source.accuracy:
        facts['accuracy'] = source.accuracy
    return facts


def read_class_names(facts: Mapping[str, str]) -> List[str]:
    """The labels that a file names.

    Raises:
        KeyError: It has no such metadata, because it is cut off or not ours.
    """
    return json.loads(facts['class_names'])
