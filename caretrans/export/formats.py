"""The formats that a network can be exported to: what each is called, needs and allows."""
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Dict, List, Tuple

__all__ = ['FORMATS', 'Format', 'find_obstacle']


@dataclass(frozen=True)
class Format:
    """A format; its module, of this package, writes and reads programs.

        check(job) -> None                      ConfigError for what cannot work: targets, versions, combinations
        write(source, job, path) -> List[str]   a finished file or folder at `path`; remarks for people
        read(source, job, path) -> Program      what is in the file, ready to be run; ExportError where it is damaged

    Attributes:
        suffix: Of the file or folder.
        precisions, inputs, outputs: What can be asked for, the default first.
        packages: {module to import: what to pip install}.
        own_environment: Whether its packages clash with those of training, and cmd/export.sh makes another environment.
    """
    name: str
    module: str
    suffix: str
    precisions: Tuple[str, ...]
    packages: Dict[str, str]
    inputs: Tuple[str, ...] = ('tensor', 'image')
    outputs: Tuple[str, ...] = ('logits', 'probabilities')
    own_environment: bool = False

    def load_module(self) -> ModuleType:
        return importlib.import_module(f'.{self.module}', __package__)


_COREML = dict(
    packages={'coremltools': 'coremltools==9.0'}, inputs=('image', 'tensor'),
    outputs=('classes', 'logits', 'probabilities'), precisions=('fp16', 'fp32'))
_ONNX = {'onnx': 'onnx', 'onnxscript': 'onnxscript'}

FORMATS: Dict[str, Format] = {item.name: item for item in [
    Format('mlpackage', 'coreml', '.mlpackage', **_COREML),
    Format('mlmodel', 'coreml', '.mlmodel', **_COREML),
    Format('onnx', 'onnx_program', '.onnx', ('fp32', 'int8'), {**_ONNX, 'onnxruntime': 'onnxruntime'}),
    Format('openvino', 'openvino_program', '.openvino', ('fp32', 'fp16', 'int8'), {
        **_ONNX, 'openvino': 'openvino', 'nncf': 'nncf'}),
    Format('torch', 'torch_program', '.pt2', ('fp32',), {}),
    Format('executorch', 'executorch_program', '.pte', ('fp32', 'int8'), {'executorch': 'executorch'},
           own_environment=True),
    Format('executorch-coreml', 'executorch_program', '.coreml.pte', ('fp16', 'fp32'), {
        'executorch': 'executorch', 'coremltools': 'coremltools==9.0'}, own_environment=True),
    Format('litert', 'litert_program', '.tflite', ('fp32', 'int8'), {
        'litert_torch': 'litert-torch', 'ai_edge_litert': 'ai-edge-litert'}, own_environment=True),
    Format('coreai', 'coreai_program', '.aimodel', ('fp32', 'fp16'), {
        'coreai_torch': 'coreai-torch', 'coreai': 'coreai-core'}, own_environment=True),
]}


def find_obstacle(item: Format) -> str:
    """What a format lacks here, with the remedy; '' if nothing."""
    missing: List[str] = []
    for module, package in item.packages.items():
        if importlib.util.find_spec(module) is None:
            missing.append(package)
    if not missing:
        return ''
    where = '; `bash cmd/export.sh` makes an environment that has it' if item.own_environment else ''
    return f'it is not installed: pip install {" ".join(missing)}{where}'
