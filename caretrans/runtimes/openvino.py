"""OpenVINO: read ONNX programs, quantize to int8 with NNCF, compile for the CPU.

OpenVINO's converter of PyTorch models sends telemetry, its ONNX reader does not. NNCF's telemetry is switched off.
"""
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ['compile_model', 'get_core', 'make_model', 'quantize']


@lru_cache(maxsize=None)
def get_core() -> Any:
    """OpenVINO's entry point, one for the life of the process.

    It sets a signal stack for the process and leaves it unmapped when destroyed: the next signal that Python handles,
    such as the end of a child process, would then kill this one.
    """
    import openvino
    return openvino.Core()


def make_model(program: bytes) -> Any:
    """An ONNX program as a model of OpenVINO."""
    from openvino.passes import ConstantFolding, Manager
    model = get_core().read_model(program)
    manager = Manager()
    manager.register_pass(ConstantFolding())  # the reader looks up shapes that are known
    manager.run_passes(model)
    return model


def quantize(model: Any, batches: Sequence[np.ndarray]) -> Any:
    """An OpenVINO model with weights and activations as 8-bit integers, ranges of activations from images."""
    os.environ.setdefault('NNCF_CI', '1')  # its switch against telemetry; before it is loaded
    import nncf

    return nncf.quantize(
        model, nncf.Dataset(list(batches)), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))


def compile_model(model: Any, threads: int, hint: str = 'f32') -> Any:
    """A model for the CPU, for latency: one stream, the requested number format.

    Args:
        model: Of OpenVINO.
        hint: 'f32', 'f16' or 'bf16', in OpenVINO's words; without one it takes bfloat16 where the CPU has it.
    Raises:
        RuntimeError: It would compute in another format.
    """
    compiled = get_core().compile_model(model, 'CPU', {
        'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': '1', 'INFERENCE_NUM_THREADS': str(threads),
        'INFERENCE_PRECISION_HINT': hint})
    taken = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
    if taken != hint:
        raise RuntimeError(f'OpenVINO computes in {taken} although {hint} was requested')
    return compiled
