"""Reader of saved ML Programs (`.mlpackage`), for the evaluator.

coremltools reads the file, decodes compressed weights and fills in the parameters that a file leaves to their defaults,
such as the epsilon of 1e-4 in `inverse`.
"""
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ExportError
from ..program import reading
from .evaluator import Evaluator, Findings, ImageInput, Step, Weight
from .operations import OPERATIONS

__all__ = ['read_ml_program']

MOVES = (  # float16 inputs to float16 outputs without rounding
    'abs', 'clip', 'concat', 'expand_dims', 'identity', 'maximum', 'minimum', 'pad', 'relu', 'reshape', 'select',
    'slice_by_index', 'split', 'squeeze', 'transpose', 'upsample_nearest_neighbor')


def _is_constant(op: Any) -> bool:
    return op is not None and (op.op_type == 'const' or op.op_type.startswith('constexpr_'))


def _is_half(var: Any) -> bool:
    return var.dtype.__name__ == 'fp16'


def _get_shape(var: Any) -> list[int]:
    return [size if isinstance(size, (int, np.integer)) else -1 for size in var.shape]


def _decode(var: Any) -> Any:
    """A constant as operations take it: floats as weights, all else as numbers, lists and strings."""
    value = var.val if var.op.op_type == 'const' else var.op.materialized_val_inference()
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    if value.dtype.kind != 'f':
        return value.tolist()
    return Weight(torch.from_numpy(np.array(value, dtype=np.float32)), _is_half(var))


def _read_input(path: Path, spec: Any, function: Any) -> ImageInput:
    features = {feature.name: feature.type for feature in spec.description.input}
    if len(function.inputs) != 1:
        raise ExportError(f'{path} has {len(function.inputs)} inputs; one, of images, can be evaluated.')
    (name, var), = function.inputs.items()
    if name not in features:
        raise ExportError(f'{path}: its program takes {name}, its description has {", ".join(features)}.')
    shape = _get_shape(var)
    if len(shape) != 4 or -1 in shape:
        raise ExportError(
            f'{path}: its input {name} is {tuple(shape)}; images of a fixed (B, C, H, W) can be evaluated.')
    image = features[name].imageType if features[name].WhichOneof('Type') == 'imageType' else None
    if image is not None and (image.height, image.width) != tuple(shape[2:]):
        raise ExportError(
            f'{path}: its description says {image.height} x {image.width} pixels, its program takes {tuple(shape)}.')
    reverse = image is not None and image.colorSpace == image.ColorSpace.Value('BGR')
    return ImageInput(name, tuple(shape), _is_half(var), reverse)


def _read_step(path: Path, op: Any, constants: dict[str, Weight], findings: Findings) -> Step:
    """An operation as a step; adds to the constants and the findings."""
    if op.op_type not in OPERATIONS:
        raise ExportError(
            f'{path}: {op.name} is an operation {op.op_type!r}, which the evaluator does not know. Export without it, '
            'or add it to caretrans/export/coreml/operations.py.')
    fixed: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for key, var in op.inputs.items():
        if isinstance(var, (list, tuple)):
            inputs[key] = [item.name for item in var]
            constants.update({item.name: _decode(item) for item in var if _is_constant(item.op)})
        elif var is not None and _is_constant(var.op):
            fixed[key] = _decode(var)
            if isinstance(fixed[key], Weight) and fixed[key].stored.dim():
                findings.record_weight(f'{key} of {op.name} ({op.op_type})', fixed[key])
        elif var is not None:
            inputs[key] = var.name
    return Step(
        op.name, op.op_type, OPERATIONS[op.op_type], fixed, inputs, [var.name for var in op.outputs],
        [_get_shape(var) for var in op.outputs], _is_half(op.outputs[0]), op.op_type in MOVES)


def read_ml_program(path: str | Path) -> Evaluator:
    """Read a saved package, for evaluation on any system.

    Values that the file declares as float16 are rounded to it after every operation, float32 ones are not.

    Args:
        path: A folder `.mlpackage` with an ML Program of one function, one input of images (B, C, H, W) and one output
            (B, classes) or (B, classes, rows, columns), or a classifier.
    Raises:
        ExportError: The package is damaged, inconsistent, or has an unknown operation.
    """
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models.utils import load_spec
    path = Path(path)
    with reading(path):
        spec = load_spec(str(path))
        if spec.WhichOneof('Type') != 'mlProgram':
            raise ValueError('it holds no ML Program: its model file is empty or of another kind')
        program = load(spec, spec.specificationVersion, str(path / 'Data' / 'com.apple.CoreML' / 'weights'))
    if list(program.functions) != ['main']:
        raise ExportError(f'{path} has the functions {", ".join(program.functions)}; only `main` can be evaluated.')
    function = program.functions['main']
    image_input = _read_input(path, spec, function)
    constants, findings, steps = {}, Findings(), []
    outputs, labels = [var.name for var in function.outputs], None
    for op in function.operations:
        if op.op_type == 'classify':
            outputs, labels = [op.probabilities.name], [str(label) for label in op.classes.val]
        elif not _is_constant(op):
            steps.append(_read_step(path, op, constants, findings))
    if len(outputs) != 1:
        raise ExportError(f'{path} has the outputs {", ".join(outputs)}; one can be evaluated.')
    return Evaluator(str(path), steps, constants, image_input, outputs[0], labels, findings)
