"""Table of the formats that a network can be exported to. It imports nothing of the package: cmd/ reads it alone."""
import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

__all__ = ['FORMATS', 'Format', 'find_obstacle', 'list_versions']

PINS = Path(__file__).parents[3] / 'coreml' / 'requirements.txt'  # in the repository; pip installs none
REMEDY = '`bash cmd/export.sh` makes an environment that has it'


@dataclass(frozen=True)
class Format:
    """A format and its limits.

    Attributes:
        module: Of `caretrans.export`; it provides `program.FormatModule`.
        suffix: Of the file or folder.
        precisions, inputs, outputs: Choices, the default first.
        packages: {module to import: what to pip install}.
        precision_packages: {precision: further packages}.
        own_environment: Whether its packages conflict with training, so that it needs a separate environment.
    """
    name: str
    module: str
    suffix: str
    precisions: tuple[str, ...]
    packages: dict[str, str]
    inputs: tuple[str, ...] = ('tensor', 'image')
    outputs: tuple[str, ...] = ('logits', 'probabilities')
    own_environment: bool = False
    precision_packages: dict[str, dict[str, str]] = field(default_factory=dict)

    def get_packages(self, precision: str) -> dict[str, str]:
        return {**self.packages, **self.precision_packages.get(precision, {})}

    def load_module(self) -> ModuleType:
        return importlib.import_module(f'..{self.module}', __package__)


_COREML = dict(
    packages={'coremltools': 'coremltools==9.0'}, inputs=('image', 'tensor'),
    outputs=('classes', 'logits', 'probabilities'), precisions=('fp16', 'fp32'))
_ONNX = {'onnx': 'onnx', 'onnxscript': 'onnxscript'}

FORMATS: dict[str, Format] = {item.name: item for item in [
    Format('mlpackage', 'coreml.convert', '.mlpackage', **_COREML),
    Format('mlmodel', 'coreml.convert', '.mlmodel', **_COREML),
    Format('onnx', 'formats.onnx', '.onnx', ('fp32', 'fp16', 'int8'), {**_ONNX, 'onnxruntime': 'onnxruntime'}),
    Format('openvino', 'formats.openvino', '.openvino', ('fp32', 'fp16', 'int8'), {
        **_ONNX, 'openvino': 'openvino'}, precision_packages={'int8': {'nncf': 'nncf'}}),
    Format('torch', 'formats.torch_export', '.pt2', ('fp32',), {}),
    Format('executorch', 'formats.executorch', '.pte', ('fp32', 'int8'), {'executorch': 'executorch'},
           own_environment=True, precision_packages={'int8': {'torchao': 'torchao'}}),
    Format('executorch-coreml', 'formats.executorch', '.coreml.pte', ('fp16', 'fp32'), {
        'executorch': 'executorch', 'coremltools': 'coremltools==9.0'}, own_environment=True),
    Format('litert', 'formats.litert', '.tflite', ('fp32', 'int8'), {
        'litert_torch': 'litert-torch', 'ai_edge_litert': 'ai-edge-litert'}, own_environment=True,
        precision_packages={'int8': {'ai_edge_quantizer': 'ai-edge-quantizer'}}),
    Format('coreai', 'formats.coreai', '.aimodel', ('fp32', 'fp16'), {
        'coreai_torch': 'coreai-torch', 'coreai': 'coreai-core'}, own_environment=True),
]}


def list_versions(item: Format, precision: str) -> dict[str, str]:
    """{package: installed version} of torch and of what a format needs; packages without a version are skipped."""
    found = {}
    for package in ['torch', *item.get_packages(precision).values()]:
        name = package.partition('==')[0]
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_pins() -> dict[str, str]:
    """{package: version} of the other environment; {} outside of the repository."""
    text = PINS.read_text(encoding='utf-8') if PINS.is_file() else ''
    return dict(re.findall(r'^([\w-]+)==([^\s#]+)', text, re.MULTILINE))


def find_obstacle(item: Format, precision: str = '') -> str:
    """Obstacle to a format here, with the remedy; '' if there is none.

    Args:
        precision: Include what this precision needs.
    """
    missing = [package for module, package in item.get_packages(precision).items()
               if importlib.util.find_spec(module) is None]
    if not item.own_environment:
        return f'it is not installed: pip install {" ".join(missing)}' if missing else ''
    if missing:
        return f'{", ".join(missing)} is not installed here: {REMEDY}'
    pins = read_pins()
    others = [f'{name} {version} is installed, but {pins[name]} is required'
              for name, version in list_versions(item, precision).items()
              if name in pins and version.partition('+')[0] != pins[name]]
    return f'{"; ".join(others)}: {REMEDY}' if others else ''
