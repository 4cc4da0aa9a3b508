"""Names of models and sizes of images on command lines."""
import difflib
import re
from collections.abc import Sequence

import timm

from ..errors import ConfigError
from ..models.backbone import MIN_SIDE, resolve_alias
from .published import list_paper_models

__all__ = ['expand_models', 'parse_size']


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of '224' or '224x320' (HEIGHTxWIDTH)."""
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < MIN_SIDE:
        raise ConfigError(f'img_size is {text!r}: use a side or HEIGHTxWIDTH, at least {MIN_SIDE} pixels.')
    return size


def expand_models(names: Sequence[str], flag: str = '--model') -> list[str]:
    """The models that names, wildcards and 'paper' stand for, each once; wildcards skip aliases.

    Raises:
        ConfigError: No model has such a name; the message lists the nearest names.
    """
    found: list[str] = []
    known = timm.list_models(include_tags=False)
    for name in names:
        if name == 'paper':
            matches = list_paper_models()
        elif set(name) & set('*?['):
            matches = [match for match in timm.list_models(name) if resolve_alias(match) == match]
        else:
            matches = [name] if timm.is_model(name) else []
        if not matches:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise ConfigError(
                f'{flag} {name}: no such model' + (f', the nearest are {", ".join(near)}.' if near else '.'))
        found += [match for match in matches if match not in found]
    return found
