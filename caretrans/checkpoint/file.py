"""Read checkpoint files without running code in them, and write them atomically."""
import io
import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..errors import CheckpointError, ResultsError, list_names
from ..strict_json import to_json
from ..text import utf8_path
from .stand_ins import StandIns, simplify

__all__ = [
    'Checkpoint', 'is_plain', 'read_checkpoint', 'write_bytes', 'write_safetensors', 'write_torch']

WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # entries of weights, in the order timm prefers
WRAPPER_MODULES = re.compile(  # in keys: DistributedDataParallel at the start, torch.compile and others anywhere
    r'^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
OWNERS = ('module', 'model', 'net', 'network', 'backbone', 'encoder')  # attributes that hold a whole network
MMPRETRAIN_STEM = 'backbone.downsample_layers.0.'  # of a layout of its own, whose prefix stays
COUNTERS = ('n_averaged', 'total_ops', 'total_params')  # of torch's AveragedModel and of thop, in no network of timm

PathLike = str | os.PathLike

_logger = logging.getLogger(__name__)


# Reading --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: The file, or in words where published weights are from.
        entry: The entry of the file with the weights, '' if they are not wrapped.
        entries: The other entries with weights.
        state_dict: The weights, on the CPU, under the keys of the file without the names of wrappers.
        meta: Everything else (`arch`, `class_names`, `epoch`, `optimizer` ...), with objects of other projects
            converted to plain values: namespaces to dicts, paths to texts, NumPy scalars to numbers.
        remarks: See `log_remarks`.
    """
    path: Path | str
    entry: str
    entries: tuple[str, ...]
    state_dict: dict[str, torch.Tensor] = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    remarks: tuple[str, ...] = field(default=(), repr=False)

    def get_class_names(self, num_classes: int) -> list[str] | None:
        """One name per class in the order of the labels; None if the file has no such list."""
        names = self.meta.get('class_names')
        names = names.tolist() if hasattr(names, 'tolist') else names  # an array
        if not isinstance(names, (list, tuple)) or len(names) != num_classes:
            return None
        return [str(name) for name in names]

    def log_remarks(self) -> None:
        """Log in one line what of the file was removed, skipped or read as plain values; nothing for most files."""
        if self.remarks:
            _logger.info('%s: %s', self.path, '; '.join(self.remarks))


def read_checkpoint(path: PathLike, entry: str | None = None) -> Checkpoint:
    """Read a checkpoint without running code in it.

    Args:
        path: The file; its format is detected by content, not by name.
        entry: The entry of the file with the weights, '' for the file itself. By default the first of `WRAPPERS` that
            exists, in which averaged weights (EMA) come first, then the file itself.
    Raises:
        CheckpointError: The file cannot be read, or holds no weights (in `entry`).
    """
    path = Path(path)
    contents, meta, types = _read_contents(path)
    if not isinstance(contents, Mapping):
        raise CheckpointError(f'{path}: holds a {type(contents).__name__}, not weights by name: take another file.')
    weights = {key: _take_tensors(value) for key, value in contents.items() if _take_tensors(value)}
    if not weights and _take_tensors(contents):
        weights = {'': _take_tensors(contents)}
    if not weights:
        only = f', only {list_names(contents)}' if contents else ''
        raise CheckpointError(f'{path}: holds no weights{only}: take another file.')
    if entry is None:
        entry = next((name for name in (*WRAPPERS, '') if name in weights), None)
    if entry not in weights:
        problem = 'no entry of a usual name holds weights' if entry is None else f'entry {entry!r} holds no weights'
        raise CheckpointError(f'{path}: {problem}: choose entry={" or ".join(map(repr, weights))} (--entry).')

    bare = weights.get('', {})
    for key, value in contents.items():
        if key not in weights and key not in bare:
            meta[key] = simplify(value)
    state_dict, remarks = _clean_keys(path, weights[entry])
    if types:
        remarks.append(f'objects of {list_names(types)} were read as plain values, without their code')
    others = tuple(name for name in weights if name != entry)
    return Checkpoint(path, entry, others, state_dict, meta, tuple(remarks))


def _clean_keys(path: Path, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights under keys without wrappers, and remarks on what else was removed: counters, and common prefixes."""
    kept, remarks = {}, []
    counters = {key: value for key, value in weights.items() if key.rpartition('.')[2] in COUNTERS}
    for key, value in weights.items():
        if key not in counters:
            kept[WRAPPER_MODULES.sub('', key)] = value
    if len(kept) < len(weights) - len(counters):
        raise CheckpointError(f'{path}: has keys both with and without module. or _orig_mod.: save each weight once.')
    if counters:
        remarks.append(f'{list_names(counters, 3)} are no weights and were skipped')
    prefix = ''.join(_find_owners(list(kept)))
    if prefix:
        remarks.append(f'the prefix {prefix} was removed from all keys')
    return {key[len(prefix):]: value for key, value in kept.items()}, remarks


def _find_owners(keys: list[str]) -> Iterator[str]:
    """The parts of the prefix of all keys, if each is a usual name of an attribute that holds a network."""
    while keys:
        owner = keys[0].partition('.')[0]
        if owner not in OWNERS or not all(key.startswith(f'{owner}.') for key in keys) \
                or any(key.startswith(MMPRETRAIN_STEM) for key in keys):
            return
        keys = [key.partition('.')[2] for key in keys]
        yield f'{owner}.'


def _take_tensors(value: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict; an empty dict for anything else."""
    if not isinstance(value, Mapping):
        return {}
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    return tensors if any(tensor.is_floating_point() for tensor in tensors.values()) else {}


def _read_contents(path: Path) -> tuple[Any, dict[str, Any], list[str]]:
    """The content of `path`, on the CPU, the metadata of a safetensors file, and the types replaced by stand-ins.

    The format is detected by the first bytes, not by the name.

    Raises:
        CheckpointError: It does not exist, is not a checkpoint, is damaged, or would run code.
    """
    head = _read_head(path)
    if head.startswith(b'PK'):
        _check_zip(path)
    try:
        if head.startswith((b'PK', b'\x80')):
            return _unpickle(path)
        with utf8_path(path) as name, safetensors.safe_open(name, framework='pt') as file:
            metadata = {key: _parse_text(value) for key, value in (file.metadata() or {}).items()}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata, []
    except Exception as error:  # damaged bytes make torch.load raise nearly anything
        refused = _find_refused(error)
        if refused:
            raise CheckpointError(
                f'{path}: wants to run code when opened ({refused}), so it was not opened: get its weights alone, '
                f'as a state dict or safetensors.') from error
        raise CheckpointError(
            f'{path}: is truncated or damaged ({_shorten(error)}): download or copy it again.') from error


def _unpickle(path: Path) -> tuple[Any, dict[str, Any], list[str]]:
    """The content of a file of torch.save, with stand-ins for objects that are not weights."""
    stand_ins = StandIns()
    while True:  # once for each type that is not known before
        try:
            # given a name instead of a file, torch.load decides by its ending
            with open(path, 'rb') as file, stand_ins.allow():
                return torch.load(file, map_location='cpu', weights_only=True), {}, stand_ins.used
        except pickle.UnpicklingError as error:
            refused = _find_refused(error)
            if not refused or not stand_ins.add(refused):
                raise


def _find_refused(error: Exception) -> str:
    """The function or type that torch refused to load; '' for other errors."""
    found = re.search(r'GLOBAL (\S+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1] if found else ''


def _read_head(path: Path) -> bytes:
    """The first bytes of a file that may be a checkpoint."""
    try:
        with open(path, 'rb') as file:
            head = file.read(200)
    except FileNotFoundError:
        raise CheckpointError(f'{path}: no such file: check the path.') from None
    except IsADirectoryError:
        raise CheckpointError(f'{path}: is a folder: name a file in it.') from None
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror}): check path and permissions.') from error
    if not head:
        raise CheckpointError(f'{path}: is empty (0 bytes): download or copy it again.')
    if head.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
        raise CheckpointError(f'{path}: is a web page saved under this name: download the file itself in a browser.')
    if head.startswith(b'version https://git-lfs'):
        raise CheckpointError(f'{path}: is a Git-LFS pointer, not the weights: run `git lfs pull` in its repository.')
    if not head.startswith((b'PK', b'\x80')) and head[8:9] != b'{' and path.suffix != '.safetensors':
        raise CheckpointError(
            f'{path}: is neither a file of torch.save nor safetensors (it begins with {head[:8]!r}): unpack or '
            f'download it again.')
    return head


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f'{path}: is truncated (its zip archive has no end): download or copy it again.')
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith('/constants.pkl') for name in names):
        raise CheckpointError(f'{path}: is a TorchScript program: take the checkpoint that it was made from.')
    if not any(name.endswith('/data.pkl') for name in names):
        raise CheckpointError(f'{path}: is a zip archive of {list_names(names)}: unpack it and take the file inside.')


def _shorten(error: Exception) -> str:
    reason = str(error).partition('WeightsUnpickler error:')[2] or str(error) or type(error).__name__
    reason = ' '.join(reason.partition('\n\nCheck the documentation')[0].split())
    return reason if len(reason) <= 160 else f'{reason[:160]} ...'


def _parse_text(text: str) -> Any:
    """The value of a metadata text of safetensors, which `write_safetensors` stores as JSON."""
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


# Writing --------------------------------------------------------------------------------------------------------------

def write_torch(path: Path, contents: dict[str, Any]) -> None:
    """Write a dict of the types that `read_checkpoint` accepts.

    Raises:
        TypeError: It contains another type; names the entry.
        CheckpointError: The file cannot be written.
    """
    _check_types(contents)
    buffer = io.BytesIO()  # torch.save does not report a full disk
    torch.save(contents, buffer)
    write_bytes(path, buffer.getbuffer())


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors, and metadata as JSON.

    Raises:
        CheckpointError: The file cannot be written.
    """
    texts = {}
    for key, value in metadata.items():
        try:
            texts[key] = value if isinstance(value, str) else to_json(value)
        except ResultsError as error:  # a best loss of infinity, for instance
            _logger.info('%s: without the entry %s: %s', path, key, error)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    write_bytes(path, safetensors.torch.save(tensors, {**texts, 'format': 'pt'}))


def is_plain(value: Any) -> bool:
    """Whether `value` consists of numbers, texts and None only, as metadata must."""
    try:
        _check_types(value, tensors=False)
    except TypeError:
        return False
    return True


def _check_types(value: Any, name: str = '', tensors: bool = True) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f'{name or "the checkpoint"} has the key {key!r}: make it a text or an integer.')
            _check_types(item, f'{name}.{key}' if name else str(key), tensors)
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_types(item, f'{name}[{i}]', tensors)
    elif tensors and isinstance(value, (torch.Tensor, torch.dtype)):
        return
    elif type(value) not in (type(None), bool, int, float, str):
        raise TypeError(
            f'{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: '
            f'make it a tensor, a number, a text, or a list, tuple or dict of them.')


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary file, flush it to the disk, then rename it to `path`.

    Raises:
        CheckpointError: The file cannot be written.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f'{path}: could not be written ({error.strerror or error}): make room for {len(data) / 1e6:.1f} MB or '
            f'choose another folder; a file that was there is unchanged.') from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # Windows and some network file systems cannot flush a folder; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
