"""Keep what converters say of themselves off the screen: stdout is for results."""
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Iterator

__all__ = ['hush']


@contextmanager
def hush() -> Iterator[None]:
    """Without prints, warnings and log lines below errors; what fails still raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
