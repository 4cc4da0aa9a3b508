"""Silencing of converters, which print progress bars, untested versions and what Linux lacks."""
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ['quiet']


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep stdout, stderr, warnings and the named loggers quiet for a while; errors come through as exceptions."""
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    try:
        for logger in named:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)
