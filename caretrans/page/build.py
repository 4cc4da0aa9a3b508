"""The folder of a page: verified ONNX programs, the browser runtime, test images with their logits, and a manifest."""
import copy
import hashlib
import io
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import __version__
from ..checkpoint.preparation import Preparation
from ..data.decode import EvalTransform, open_image
from ..errors import ConfigError, DataError, ExportError, require
from ..export.config import ExportConfig
from ..export.phone_results import NAMES
from ..export.run import Export, export, make_folder
from ..export.source import Source, load_source
from ..flags import parse_flags
from ..measure.published import find_published
from ..measure.sample_network import SAMPLE_IMAGES
from ..strict_json import to_json
from ..text import escape, write_text
from .config import PageConfig
from .litert import check_script, export_litert
from .server import HEADERS, MANIFEST, check_server, serve
from .vendor import LITERT, ONNXRUNTIME, Runtime, fetch_package, unpack_runtime

__all__ = ['PageProgram', 'build_page', 'main']

WEB = Path(__file__).parent / 'web'
WEB_FILES = (
    'index.html', 'style.css', 'page.js', 'classify.js', 'device.js', 'dom.js', 'job.js', 'offline.js', 'results.js',
    'start.js', 'start_worker.js', 'worker.js', 'runtimes.js', 'prepare.js', 'sw.js')
CROP_MODES, INTERPOLATIONS = ('center', 'squash'), ('bicubic', 'bilinear')  # of prepare.js
UNFINISHED = '.unfinished-'  # starts the name of a folder inside the page's while it is made
TEST_IMAGES = ('orange/orange_001.jpg', 'watermelon/watermelon_001.jpg')  # of the bundled validation images
SHORT = 12  # hexadecimal digits of a hash in a name
SAME = 1e-3  # largest relative difference of the largest logit of equal weights in two environments

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """A test image as a network sees it.

    Attributes:
        pixels: SHA-256 of its prepared pixels, (H, W, 3) uint8.
        logits: Of the original network in float64.
    """
    pixels: str
    logits: list[float]


@dataclass(frozen=True)
class ProgramFile:
    """The file of a program for a runtime.

    Attributes:
        file: Path in the folder; its name contains the start of its SHA-256.
        format, form: Of the export.
        error: Largest error of a logit on the images it was verified on, natively, as a share of the largest logit.
    """
    file: str
    format: str
    form: str
    bytes: int
    sha256: str
    error: float


@dataclass(frozen=True)
class PageProgram:
    """A network of the page in one precision.

    Attributes:
        files: {runtime of the manifest: its program}.
        weights: The file or publication, for people; '' for random weights, which do not classify.
        top1: Published accuracy on ImageNet-1K of this model, %; None where none is known, or for other classes.
        top1_note: How that accuracy was reached, where it was not by plain training.
        classes: Number of its list of class names in the manifest.
        tolerance: Largest error of a logit that rounding explains, as a share of the largest logit.
        checks: One for each test image.
    """
    model: str
    precision: str
    files: dict[str, ProgramFile]
    size: tuple[int, int]
    weights: str
    top1: float | None
    top1_note: str
    classes: int
    tolerance: float
    preparation: Preparation
    checks: list[Check]


@dataclass
class Page:
    """What a page consists of.

    Attributes:
        runtimes: {name in the manifest: runtime}.
        checkpoints: Files of weights.
        class_lists: The lists of class names that its programs share.
    """
    runtimes: dict[str, Runtime]
    checkpoints: list[str]
    programs: list[PageProgram] = field(default_factory=list)
    class_lists: list[list[str]] = field(default_factory=list)

    def add_classes(self, names: list[str]) -> int:
        if names not in self.class_lists:
            self.class_lists.append(names)
        return self.class_lists.index(names)


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Checks ---------------------------------------------------------------------------------------------------------------

def _check_source(source: Source) -> None:
    """Refuse networks whose images the page cannot prepare."""
    preparation = source.eval_config
    problems = [
        (source.size[0] != source.size[1], f'images of {source.size[0]} x {source.size[1]} pixels, not square'),
        (preparation.input_size[0] != 3, f'{preparation.input_size[0]} input channels'),
        (preparation.crop_pct > 1, f'crop_pct {preparation.crop_pct:g}, more than 1'),
        (preparation.crop_mode not in CROP_MODES, f'crop mode {preparation.crop_mode}'),
        (preparation.interpolation not in INTERPOLATIONS, f'interpolation {preparation.interpolation}')]
    for found, problem in problems:
        if found:
            raise ConfigError(f'{source.name}: the page does not support {problem}: omit this network.')


def _is_page(folder: Path) -> bool:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {'programs', 'runtimes'} <= content.keys()


def _check_output(folder: Path) -> None:
    """Create the folder, without what a killed build left; refuse one with anything else in it."""
    make_folder(folder, '--output')
    leftovers = [path for path in folder.iterdir() if path.name.startswith(UNFINISHED)]
    if len(leftovers) < len(list(folder.iterdir())) and not _is_page(folder):
        raise ConfigError(f'--output {folder} holds other files: name an empty folder, or one of an earlier page.')
    for path in leftovers:
        shutil.rmtree(path)


def _load_test_images() -> list[bytes]:
    """Two bundled images as PNG, which every browser decodes to the same pixels."""
    if not SAMPLE_IMAGES.is_dir():
        raise DataError(f'No images at {SAMPLE_IMAGES}: build the page in a checkout of the repository.')
    images = []
    for name in TEST_IMAGES:
        content = io.BytesIO()
        pixels = open_image((SAMPLE_IMAGES / 'val' / name).read_bytes())
        Image.frombytes('RGB', pixels.size, pixels.tobytes()).save(content, 'png')  # without metadata
        images.append(content.getvalue())
    return images


@torch.no_grad()
def _check_images(source: Source, images: Sequence[bytes]) -> list[Check]:
    """Prepared pixels and float64 logits of the test images."""
    transform = EvalTransform(source.eval_config, as_uint8=True)
    model = copy.deepcopy(source.model).double()
    checks = []
    for image in images:
        pixels = transform(image)
        logits = model(source.normalise(pixels[None], torch.float64))[0]
        checks.append(Check(
            hash_bytes(pixels.permute(1, 2, 0).contiguous().numpy().tobytes()),
            [float(f'{value:.9g}') for value in logits.tolist()]))
    return checks


# Files ----------------------------------------------------------------------------------------------------------------

def name_checkpoint(file: str, files: Sequence[str]) -> str:
    """The name of a file, with as many folders as no other file shares."""
    paths = {Path(item).resolve() for item in files} - {Path(file).resolve()}
    parts = Path(file).resolve().parts
    depth = next(depth for depth in range(1, len(parts) + 1)
                 if all(path.parts[-depth:] != parts[-depth:] for path in paths))
    return '/'.join(parts[-depth:])


def _describe_program(
        source: Source, item: Export, files: dict[str, ProgramFile], page: Page, checks: list[Check]) -> PageProgram:
    weights = name_checkpoint(source.checkpoint, page.checkpoints) if source.sha256 else source.checkpoint
    published = find_published(source.name) if source.model.num_classes == 1000 else None
    return PageProgram(
        source.name, item.job.precision, files, source.size, escape(weights),
        published and published.top1, published.accuracy_note.partition(':')[0] if published else '',
        page.add_classes(source.class_names), item.job.tolerance, source.eval_config, checks)


def _move_program(path: Path, format: str, form: str, stem: str, error: float, folder: Path) -> ProgramFile:
    """Move a program into the folder of the page, under a name with its hash."""
    digest = hash_bytes(path.read_bytes())
    file = f'models/{stem}-{digest[:SHORT]}{path.suffix}'
    shutil.move(path, folder / file)
    return ProgramFile(file, format, form, (folder / file).stat().st_size, digest, error)


def _add_litert(config: ExportConfig, item: Export, stem: str, folder: Path) -> ProgramFile:
    """Export a network for LiteRT as well."""
    program = export_litert(config, stem)
    largest = item.verification.largest
    if abs(program.largest / largest - 1) > SAME:
        raise ExportError(
            f'{stem}: its weights differ in the other environment: largest logit {program.largest:.6g} instead of '
            f'{largest:.6g}; random ones depend on the version of PyTorch: use --checkpoint.')
    return _move_program(program.path, 'litert', program.form, stem, program.max_error / program.largest, folder)


def _add_network(config: ExportConfig, source: Source, folder: Path, page: Page, images: Sequence[bytes]) -> None:
    """Export a network, verified, and move its programs into the folder of the page."""
    _logger.info('Exporting %s.', config.checkpoint or config.model)
    _, exports = export(config, sys.stderr, source)
    checks = _check_images(source, images)
    for item in exports:
        if item.failure:
            raise ExportError(f'{source.name}: {item.failure}')
        error = item.verification.max_error / item.verification.largest
        stem = f'{source.name}-{item.job.precision}'
        files = {'onnxruntime': _move_program(item.path, 'onnx', item.job.get_form(), stem, error, folder)}
        if 'litert' in page.runtimes and item.job.precision == 'fp32':
            files['litert'] = _add_litert(config, item, stem, folder)
        page.programs.append(_describe_program(source, item, files, page, checks))


def _unpack(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Write a runtime into the folder of the page; what the manifest says of it."""
    paths = unpack_runtime(runtime, folder / runtime.folder)
    return dict(
        name=runtime.title, licence=runtime.licence, folder=runtime.folder,
        files={path.name: dict(bytes=path.stat().st_size, sha256=hash_bytes(path.read_bytes())) for path in paths})


def _write_manifest(folder: Path, page: Page, images: Sequence[str]) -> None:
    content = dict(
        version=__version__, columns=NAMES, images=images,
        runtimes={name: _unpack(runtime, folder) for name, runtime in page.runtimes.items()},
        class_lists=page.class_lists, programs=[asdict(program) for program in page.programs])
    write_text(folder / MANIFEST, to_json(content) + '\n')


def _write_web(folder: Path) -> None:
    """Our own files, and the headers in the form that Netlify and Cloudflare Pages read."""
    for name in WEB_FILES:
        shutil.copy(WEB / name, folder / name)
    lines = [f'  {name}: {value}' for name, value in HEADERS.items()]
    write_text(folder / '_headers', '\n'.join(['/*', *lines]) + '\n')


def build_page(config: PageConfig) -> Page:
    """Write the folder of a page; programs of an earlier page in it are removed at the end.

    Raises:
        CheckpointError, ConfigError, DataError: Something cannot work, found before anything is exported.
        ExportError: A program could not be made or does not compute what the network does; no page is written then.
    """
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        require(package)
    folder = Path(config.output)
    _check_output(folder)
    page = Page({'onnxruntime': ONNXRUNTIME}, config.checkpoint)
    if config.litert:
        check_script()
        page.runtimes['litert'] = LITERT
    for package in (package for runtime in page.runtimes.values() for package in runtime.packages):
        fetch_package(package)
    images = _load_test_images()
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
        new = Path(unfinished) / 'page'
        (new / 'models').mkdir(parents=True)
        (new / 'images').mkdir()
        exports = config.list_exports(str(Path(unfinished) / 'exports'))
        sources = [load_source(item) for item in exports]
        for source in sources:
            _check_source(source)
        for item, source in zip(exports, sources, strict=True):
            _add_network(item, source, new, page, images)
        names = [f'images/test-{number}-{hash_bytes(image)[:SHORT]}.png' for number, image in enumerate(images, 1)]
        for name, image in zip(names, images, strict=True):
            (new / name).write_bytes(image)
        _write_manifest(new, page, names)
        _write_web(new)
        for path in new.iterdir():
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    return page


def _describe_page(folder: Path, page: Page) -> list[str]:
    lines = [f'{item.bytes / 1e6:6.1f} MB  {program.model} {program.precision} {item.format}, '
             f'{program.weights or "random weights: speed only"}'
             for program in page.programs for item in program.files.values()]
    lines += [f'{path.stat().st_size / 1e6:6.1f} MB  {path.name}' for path in sorted(folder.glob('vendor/*/*.wasm'))]
    return [f'{folder}:', *lines]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m caretrans page`."""
    logging.getLogger('torch').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='torch')
    config = parse_flags(PageConfig, argv, __doc__, 'python -m caretrans page')
    folder = Path(config.output)
    if config.serve:
        check_server(config)  # before a build of minutes
    print('\n'.join(_describe_page(folder, build_page(config))))
    if not config.serve:
        print(f'Serve it: python -m caretrans serve {folder}')
        return 0
    return serve(folder, config)
