"""Objects beside the weights of a checkpoint, read without the code of their classes.

torch's `weights_only` unpickler calls only what it is given. It is given a stand-in for each harmless type, which makes
a plain value from the arguments in the file; the type itself is neither imported nor called.
"""
import _compat_pickle
import argparse
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta, timezone
from typing import Any

import numpy as np
import torch

__all__ = ['StandIns', 'simplify']

NUMBERS = re.compile(r'(b1|[iu][1248]|f[248]|c8|c16|[US]\d+)')  # types of NumPy that hold no objects
STANDARD = {  # modules of the standard library, also by their names in Python 2, which pickles use
    *sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING}
PACKAGES = ('numpy', 'torch', 'torchvision', 'yacs')  # of which only the types in `FUNCTIONS` are replaced
NUMPY_CORES = ('core', '_core')  # before version 2 of NumPy, and since
MARK = '__caretrans_arguments__'  # attribute of an `OrderedDict` that stands in for an object
Function = Callable[..., Any]


class _NumpyType:
    """Replaces numpy.dtype: the type of scalars and arrays, as a pickle describes it."""

    def __init__(self, code: str, *flags: Any) -> None:
        if not NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f'GLOBAL numpy.dtype({code})')  # the wording of torch for refused types
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def get(self) -> np.dtype:
        return np.dtype(self.order + self.code if self.order in '<>' else self.code)


class _NumpyArray:
    """Replaces numpy.ndarray."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = np.frombuffer(data, dtype.get()).reshape(shape, order='F' if is_fortran else 'C').copy()


def _make_record(*arguments: Any) -> OrderedDict:
    """What stands in for an object of an unknown class: its arguments, attributes and items, see `simplify`."""
    record = OrderedDict()
    vars(record)[MARK] = arguments
    return record


FUNCTIONS: dict[str, Function] = {  # type in a pickle: what makes a plain value from the arguments of an object
    **{f'{module}.{name}': lambda *parts: _join_path(parts)
       for module in ('pathlib', 'pathlib._local')
       for name in ('Path', 'PosixPath', 'WindowsPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath')},
    **{f'datetime.{kind.__name__}': kind for kind in (date, datetime, time, timedelta, timezone)},
    'collections.defaultdict': lambda *factory: {},
    'collections.deque': lambda items=(), *size: list(items),
    'types.SimpleNamespace': _make_record,
    'yacs.config.CfgNode': _make_record,
    'uuid.UUID': _make_record,
    'decimal.Decimal': str,
    'fractions.Fraction': str,
    **{f'builtins.{kind.__name__}': kind for kind in (
        bool, complex, dict, float, frozenset, int, list, range, set, str, tuple)},
    'torch.torch_version.TorchVersion': str,
    'typing.Any': _make_record,  # only named, never called, as are some types of NumPy
    'numpy.dtype': _NumpyType,
    **{f'numpy.{kind.__name__}': _make_record for kind in (
        np.ndarray, np.bool_, *np.sctypeDict.values())},
    **{f'numpy.{core}.multiarray._reconstruct': lambda *arguments: _NumpyArray() for core in NUMPY_CORES},
    **{f'numpy.{core}.multiarray.scalar': lambda dtype, data: np.frombuffer(data, dtype.get()).item()
       for core in NUMPY_CORES}}


def _join_path(parts: tuple[str, ...]) -> str:
    """A path as text; '/home/x' is pickled as '/', 'home', 'x'."""
    root = parts[0] if parts and parts[0].endswith(('/', '\\')) else ''
    return root + '/'.join(parts[bool(root):])


class StandIns:
    """The stand-ins for one file.

    Attributes:
        used: The types in the file that stand-ins replaced.
    """

    def __init__(self) -> None:
        self.used: list[str] = []
        self.types = [argparse.Namespace, _NumpyType, _NumpyArray]
        self.types += [self._replace(path, function) for path, function in FUNCTIONS.items()]

    def _replace(self, path: str, function: Function) -> type:
        """A class under the name `path` ('module.name') that calls `function` instead of creating an instance."""
        def create(cls: type, *arguments: Any) -> Any:
            if path not in self.used:
                self.used.append(path)
            return function(*arguments)

        module, _, name = path.rpartition('.')
        return type(name, (), dict(__module__=module, __new__=create))

    def add(self, path: str) -> bool:
        """Add a stand-in for a type that a file names, unless it may be meant to run code; returns whether it did.

        Only classes, by their capital letter, of other projects are replaced: an enum or the settings of a run. Nothing
        of the standard library is, nor of `PACKAGES`.
        """
        module, _, name = path.rpartition('.')
        root = module.partition('.')[0]
        if not name[:1].isupper() or root in {'', *PACKAGES, *STANDARD}:
            return False
        self.types.append(self._replace(path, _make_record))
        return True

    @contextmanager
    def allow(self) -> Iterator[None]:
        """Let `torch.load(weights_only=True)` use them."""
        with torch.serialization.safe_globals(self.types):
            yield


def simplify(value: Any) -> Any:
    """Plain values instead of namespaces and stand-ins, recursively; anything else is returned unchanged."""
    kind = type(value)
    if kind is argparse.Namespace:
        return simplify(vars(value))
    if kind in (list, tuple):
        return kind(simplify(item) for item in value)
    if kind is OrderedDict and MARK in vars(value):
        attributes = {name: item for name, item in vars(value).items() if not name.startswith('__')}
        contents, arguments = simplify({**attributes, **value}), simplify(vars(value)[MARK])
        if contents or not arguments:
            return contents
        return arguments[0] if len(arguments) == 1 else list(arguments)
    if kind in (dict, OrderedDict):
        return kind((key, simplify(item)) for key, item in value.items())
    if kind is _NumpyArray:
        return value.value
    if kind in (datetime, date, time):
        return value.isoformat()
    if kind in (timedelta, timezone):
        return str(value)
    if isinstance(value, type) and value.__new__.__qualname__.startswith('StandIns.'):
        return f'{value.__module__}.{value.__qualname__}'
    return value
