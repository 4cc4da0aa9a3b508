"""Core ML: ML Programs (.mlpackage) and neural networks (.mlmodel) from PyTorch, on any system.

The network goes through `torch.export`, whose decompositions keep ELU, GELU and softmax whole, and through coremltools.
Pixels enter as they are, from 0 to 255: coremltools' own preprocessing knows one scale for all channels, ImageNet's
normalisation has three, and stands in the network instead.
"""
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import ConfigError, ExportError
from ..runtimes.quiet import quiet
from .config import Job
from .metadata import describe, describe_input, read_class_names
from .source import Source
from .torch_program import trace
from .verify import Program

__all__ = ['INPUT', 'LABEL', 'check', 'evaluate', 'import_coremltools', 'read', 'read_facts', 'write']

WANTED = '9.0'
INPUT, LABEL = 'input_1', 'classLabel'
LOGGERS = ('coremltools', 'torch.export')
SMALL = 2048  # weights of a convolution that are not worth compressing; coremltools' own measure for ML Programs


def import_coremltools() -> Any:
    """coremltools, without what it says about other packages."""
    with quiet(*LOGGERS):
        import coremltools
    return coremltools


# What cannot be -------------------------------------------------------------------------------------------------------

def _check_versions(job: Job) -> None:
    found = version('coremltools')
    if found.split('.')[0] != WANTED.split('.')[0]:
        raise ConfigError(
            f'--format {job.format}: coremltools {found} is installed; programs are checked for {WANTED}: '
            f'pip install coremltools=={WANTED}')
    if job.compress.startswith('palette') and find_spec('sklearn') is None:
        raise ConfigError(f'--compress {job.compress} needs scikit-learn: pip install scikit-learn')


def check(job: Job) -> None:
    """Stop what Core ML cannot do.

    Raises:
        ConfigError: Versions that do not fit, or settings that exclude one another.
    """
    _check_versions(job)
    if job.batch != 1 and job.input == 'image':
        raise ConfigError(
            f'--batch {job.batch} with --input image: a Core ML image is one image. Take --input tensor.')
    if job.batch != 1 and job.output == 'classes':
        raise ConfigError(
            f'--batch {job.batch} with --output classes: a Core ML classifier labels one image at a time. Take '
            f'--output probabilities or logits.')
    if job.format == 'mlpackage' and job.compress != 'none' and job.target == 'iOS15':
        raise ConfigError(
            f'--compress {job.compress} with --target iOS15: iOS reads such weights from 16 on. Take --target iOS16.')


# Conversion -----------------------------------------------------------------------------------------------------------

def _list_types(source: Source, job: Job) -> dict[str, Any]:
    """Inputs and outputs, in float32 for every precision and target, so that an app need not care."""
    ct = import_coremltools()
    shape = (job.batch, source.eval_config['input_size'][0], *job.size)
    image = job.input == 'image'
    types: dict[str, Any] = dict(inputs=[
        ct.ImageType(INPUT, shape=shape, color_layout=ct.colorlayout.RGB) if image
        else ct.TensorType(INPUT, shape=shape, dtype=np.float32)])
    if job.output == 'classes':
        types.update(classifier_config=ct.ClassifierConfig(source.class_names, predicted_feature_name=LABEL))
        if job.format == 'mlmodel':  # of ML Programs coremltools 9 ignores the name
            types.update(outputs=[ct.TensorType('probabilities')])
    else:
        types.update(outputs=[ct.TensorType(job.output, dtype=np.float32 if job.format == 'mlpackage' else None)])
    return types


def _convert(source: Source, job: Job) -> Any:
    """An MLModel, with full weights."""
    ct = import_coremltools()
    program = trace(source, job).run_decompositions({})
    pipeline = ct.PassPipeline.DEFAULT
    kind: dict[str, Any] = dict(convert_to='neuralnetwork')
    if job.format == 'mlmodel':  # would be taken apart again, into a sum of squares that overflows in float16
        pipeline.remove_passes({'common::fuse_layernorm_or_instancenorm'})
    if job.format == 'mlpackage':
        kind = dict(
            convert_to='mlprogram', minimum_deployment_target=getattr(ct.target, job.target),
            compute_precision=ct.precision.FLOAT16 if job.precision == 'fp16' else ct.precision.FLOAT32)
    return ct.convert(program, **_list_types(source, job), **kind, pass_pipeline=pipeline, skip_model_load=True)


def _rename_output(model: Any, old: str, new: str) -> Any:
    ct = import_coremltools()
    spec = model.get_spec()
    ct.utils.rename_feature(spec, old, new, rename_inputs=False)
    return ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


# Weights --------------------------------------------------------------------------------------------------------------

def _compress_program(model: Any, compress: str) -> Any:
    import coremltools.optimize.coreml as optimize
    if compress == 'int8':
        config = optimize.OptimizationConfig(optimize.OpLinearQuantizerConfig(mode='linear_symmetric'))
        return optimize.linear_quantize_weights(model, config)
    config = optimize.OptimizationConfig(optimize.OpPalettizerConfig(mode='kmeans', nbits=_count_bits(compress)))
    return optimize.palettize_weights(model, config)


def _count_bits(compress: str) -> int:
    return int(compress.removeprefix('palette'))


def _cluster(bits: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table of 2 ** bits values, and for each weight its place in the table.

    That of coremltools 9 makes a column of the table and then refuses it.
    """
    from sklearn.cluster import KMeans
    values = weight.reshape(-1, 1)
    number = min(2 ** bits, len(np.unique(values)))
    fitted = KMeans(number, tol=1e-2, n_init=1, random_state=0).fit(values)
    table = np.zeros(2 ** bits)
    table[:number] = fitted.cluster_centers_[:, 0]
    return table, fitted.labels_


def _compress_network(model: Any, job: Job) -> Any:
    """Weights as the job wants them; small ones, biases and scales are not compressed, as in ML Programs."""
    from coremltools.models.neural_network import quantization_utils
    selector = quantization_utils.AdvancedQuantizedLayerSelector(
        skip_layer_types=['batchnorm', 'bias', 'loadConstant', 'loadConstantND', 'scale'],
        minimum_conv_kernel_channels=1, minimum_conv_weight_count=SMALL)
    if job.compress == 'int8':
        model = quantization_utils.quantize_weights(model, 8, 'linear_symmetric', selector=selector)
    elif job.compress != 'none':
        model = quantization_utils.quantize_weights(
            model, _count_bits(job.compress), 'custom_lut', lut_function=_cluster, selector=selector)
    return quantization_utils.quantize_weights(model, 16) if job.precision == 'fp16' else model


# What a program says of itself ----------------------------------------------------------------------------------------

OUTPUTS = {
    'logits': 'Scores (batch, classes), before the softmax.',
    'probabilities': 'Probabilities (batch, classes).',
    'classes': 'The probability of each class, by its label.',
}


def _describe(model: Any, source: Source, job: Job) -> None:
    model.short_description = (
        f'{source.name}: an image to {len(source.class_names)} classes, at {job.size[0]} x {job.size[1]} pixels'
        + ('.' if source.checkpoint else '. RANDOM WEIGHTS: for measuring speed alone.'))
    model.author = 'caretrans; the weights are of their authors'
    model.license = 'MIT for the code; the weights have the licence of their authors'
    model.version = __version__
    model.input_description[INPUT] = describe_input(source, job)
    if job.output == 'classes':
        model.output_description[LABEL] = 'The likeliest class.'
    model.output_description['probabilities' if job.output == 'classes' else job.output] = OUTPUTS[job.output]
    model.user_defined_metadata.update(describe(source, job))


def read_facts(path: Path) -> dict[str, str]:
    """What a saved program says of itself: model, form, format, precision, input, size and more, as text.

    Raises:
        ExportError: It cannot be read, or is not one of ours.
    """
    ct = import_coremltools()
    try:
        with quiet(*LOGGERS):
            facts = dict(ct.utils.load_spec(str(path)).description.metadata.userDefined)
    except Exception as error:  # of protobuf, of the file system, of coremltools' library in C++
        raise ExportError(f'{path} cannot be read: {type(error).__name__}. Export it again.') from error
    if 'caretrans' not in facts:
        raise ExportError(f'{path} was not exported by coreml/export.py: it does not say what it is.')
    return facts


# Files ----------------------------------------------------------------------------------------------------------------

def _make(source: Source, job: Job) -> Any:
    model = _convert(source, job)
    if job.output == 'classes' and job.format == 'mlpackage':
        model = _rename_output(model, f'{LABEL}_probs', 'probabilities')
    if job.format == 'mlmodel':
        model = _compress_network(model, job)
    elif job.compress != 'none':
        model = _compress_program(model, job.compress)
    _describe(model, source, job)
    return model


def _save(model: Any, job: Job, path: Path) -> None:
    """Under the suffix that coremltools insists on, then moved: `path` is the whole program or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.coreml-') as folder:
        saved = Path(folder) / f'program{job.kind.suffix}'
        model.save(str(saved))
        if saved.is_dir():  # larger than the program's graph, for a debugger of another runtime
            (saved / 'executorch_debug_handle_mapping.json').unlink(missing_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(saved, path)


def write(source: Source, job: Job, path: Path) -> list[str]:
    """Convert, compress, describe and save.

    Raises:
        ConfigError: The network does not fit the settings.
        ExportError: coremltools failed; nothing is left at `path`.
    """
    import_coremltools()
    try:
        with quiet(*LOGGERS):
            _save(_make(source, job), job, path)
    except OSError as error:
        raise ExportError(f'{path} cannot be written: {error.strerror or error}.') from error
    except Exception as error:  # of whatever pass of coremltools meets what it does not know
        raise ExportError(
            f'{path}: coremltools {version("coremltools")} with torch {torch.__version__} could not convert '
            f'{source.name}: {type(error).__name__}: {" ".join(str(error).split())[:500]}') from error
    if job.format == 'mlmodel':
        return ['A neural network of iOS 13 and later, whatever --target says.']
    return []


def read(source: Source, job: Job, path: Path) -> Program:
    """What is in the file, evaluated operation by operation, as the phone rounds.

    Raises:
        ExportError: It is damaged, holds what the evaluator does not know, or names no classes where it should.
    """
    program = evaluate(path, job)
    if job.output == 'classes' and program.labels is None:
        raise ExportError(f'{path} has no labels, so it cannot give classes. Export it again.')
    if program.labels is None:
        try:
            program.labels = read_class_names(read_facts(path))
        except KeyError as error:
            raise ExportError(f'{path} names no classes. Export it again.') from error
    return program


def evaluate(path: Path, job: Job) -> Program:
    """The same of a file that need not say what it is; its labels are those of a classifier alone."""
    with quiet(*LOGGERS):
        if job.format != 'mlmodel':  # ML Programs, those inside other formats too
            from .mil_evaluator import read_ml_program
            return read_ml_program(path).to_program()
        from .network_evaluator import read_network
        program = read_network(path, half=job.precision == 'fp16').to_program()
    if job.precision == 'fp32':
        program.notes.append('computed in float32; a phone may compute it in float16')
    return program
