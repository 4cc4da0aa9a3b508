"""Core ML files: ML Programs (.mlpackage) and neural networks (.mlmodel) from PyTorch, on any system.

The network goes through `torch.export`, whose decompositions keep ELU, GELU and softmax whole, and through coremltools.
Pixels enter as they are, from 0 to 255: coremltools' own preprocessing has one scale for all channels, ImageNet's
normalisation has three, so the network normalises instead.
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

from ... import __version__
from ...errors import ConfigError, ExportError
from ...runtimes.quiet import quiet
from ..config import Job
from ..metadata import describe, describe_input, read_class_names
from ..program import Program, reading
from ..source import Source, trace
from .ml_program import read_ml_program
from .network import read_network

__all__ = ['INPUT', 'LABEL', 'check', 'evaluate', 'import_coremltools', 'read', 'read_facts', 'write']

WANTED = '9.0'
INPUT, LABEL = 'input_1', 'classLabel'
LOGGERS = ('coremltools', 'torch.export')
SMALL = 2048  # weights of a convolution that are not worth compressing; coremltools' own limit for ML Programs
OUTPUTS = {
    'logits': 'Scores (batch, classes), before the softmax.',
    'probabilities': 'Probabilities (batch, classes).',
    'classes': 'The probability of each class, by its label.',
}


def import_coremltools() -> Any:
    """coremltools, without its remarks on other packages."""
    with quiet(*LOGGERS):
        import coremltools
    return coremltools


def check(job: Job) -> None:
    """Refuse settings that Core ML does not support.

    Raises:
        ConfigError: Versions that do not fit, or settings that exclude one another.
    """
    found = version('coremltools')
    if found.split('.')[0] != WANTED.split('.')[0]:
        raise ConfigError(
            f'--format {job.format}: coremltools {found} is installed; programs are checked for {WANTED}: '
            f'pip install coremltools=={WANTED}')
    if job.compress.startswith('palette') and find_spec('sklearn') is None:
        raise ConfigError(f'--compress {job.compress} needs scikit-learn: pip install scikit-learn')
    if job.batch != 1 and job.input == 'image':
        raise ConfigError(
            f'--batch {job.batch} with --input image: a Core ML image input holds one image. Use --input tensor.')
    if job.batch != 1 and job.output == 'classes':
        raise ConfigError(
            f'--batch {job.batch} with --output classes: a Core ML classifier labels one image at a time. Use '
            f'--output probabilities or logits.')
    if job.format == 'mlpackage' and job.compress != 'none' and job.target == 'iOS15':
        raise ConfigError(
            f'--compress {job.compress} with --target iOS15: compressed weights need iOS 16. Use --target iOS16.')


# Conversion -----------------------------------------------------------------------------------------------------------

def _drop_aliases(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without nodes that hand on their input, such as slices of everything; coremltools 9 knows none."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return program


def _convert(source: Source, job: Job) -> Any:
    """An MLModel with full weights; inputs and outputs are float32 for every precision and target, for simple apps."""
    ct = import_coremltools()
    shape = (job.batch, source.eval_config.input_size[0], *job.size)
    settings: dict[str, Any] = dict(inputs=[
        ct.ImageType(INPUT, shape=shape, color_layout=ct.colorlayout.RGB) if job.input == 'image'
        else ct.TensorType(INPUT, shape=shape, dtype=np.float32)])
    if job.output == 'classes':
        settings.update(classifier_config=ct.ClassifierConfig(source.class_names, predicted_feature_name=LABEL))
        if job.format == 'mlmodel':  # for ML Programs coremltools 9 ignores the name
            settings.update(outputs=[ct.TensorType('probabilities')])
    else:
        settings.update(outputs=[ct.TensorType(job.output, dtype=np.float32 if job.format == 'mlpackage' else None)])
    pipeline = ct.PassPipeline.DEFAULT
    if job.format == 'mlpackage':
        settings.update(
            convert_to='mlprogram', minimum_deployment_target=getattr(ct.target, job.target),
            compute_precision=ct.precision.FLOAT16 if job.precision == 'fp16' else ct.precision.FLOAT32)
    else:  # the backend would split it again, into a sum of squares that overflows in float16
        settings.update(convert_to='neuralnetwork')
        pipeline.remove_passes({'common::fuse_layernorm_or_instancenorm'})
    program = _drop_aliases(trace(source, job).run_decompositions({}))
    model = ct.convert(program, **settings, pass_pipeline=pipeline, skip_model_load=True)
    if job.output == 'classes' and job.format == 'mlpackage':
        spec = model.get_spec()
        ct.utils.rename_feature(spec, f'{LABEL}_probs', 'probabilities', rename_inputs=False)
        model = ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)
    return model


# Weights --------------------------------------------------------------------------------------------------------------

def _compress_program(model: Any, job: Job) -> Any:
    import coremltools.optimize.coreml as optimize
    if job.compress == 'none':
        return model
    if job.compress == 'int8':
        config = optimize.OptimizationConfig(optimize.OpLinearQuantizerConfig(mode='linear_symmetric'))
        return optimize.linear_quantize_weights(model, config)
    config = optimize.OptimizationConfig(optimize.OpPalettizerConfig(mode='kmeans', nbits=int(job.compress[-1])))
    return optimize.palettize_weights(model, config)


def _cluster(bits: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table of 2 ** bits values, and the index of each weight in it.

    The function of coremltools 9 makes a column of the table and then refuses it.
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
            model, int(job.compress[-1]), 'custom_lut', lut_function=_cluster, selector=selector)
    return quantization_utils.quantize_weights(model, 16) if job.precision == 'fp16' else model


# Files ----------------------------------------------------------------------------------------------------------------

def _describe(model: Any, source: Source, job: Job) -> None:
    """Add the metadata of a job."""
    model.short_description = (
        f'{source.name}: {source.purpose}, at {job.size[0]} x {job.size[1]} pixels'
        + ('.' if source.checkpoint else '. RANDOM WEIGHTS: for measuring speed alone.'))
    model.author = 'caretrans; the weights are of their authors'
    model.license = 'MIT for the code; the weights have the licence of their authors'
    model.version = __version__
    model.input_description[INPUT] = describe_input(source, job)
    if job.output == 'classes':
        model.output_description[LABEL] = 'The likeliest class.'
    model.output_description['probabilities' if job.output == 'classes' else job.output] = source.list_facts(job).get(
        'outputs', OUTPUTS[job.output])
    model.user_defined_metadata.update(describe(source, job))


def _save(model: Any, job: Job, path: Path) -> None:
    """Save under the suffix that coremltools insists on, then move: `path` is the whole program or nothing."""
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
        ExportError: coremltools failed; nothing is left at `path`.
    """
    import_coremltools()
    try:
        with quiet(*LOGGERS):
            model = (_compress_program if job.format == 'mlpackage' else _compress_network)(_convert(source, job), job)
            _describe(model, source, job)
            _save(model, job, path)
    except OSError as error:
        raise ExportError(f'{path} cannot be written: {error.strerror or error}.') from error
    except Exception as error:  # of any pass of coremltools
        raise ExportError(
            f'{path}: coremltools {version("coremltools")} with torch {torch.__version__} could not convert '
            f'{source.name}: {type(error).__name__}: {" ".join(str(error).split())[:500]}') from error
    return ['A neural network of iOS 13 and later, whatever --target says.'] if job.format == 'mlmodel' else []


def read_facts(path: Path) -> dict[str, str]:
    """The metadata in a saved program: model, form, format, precision, input, size and more, as text.

    Raises:
        ExportError: It cannot be read, or was not written by coreml/export.py.
    """
    with quiet(*LOGGERS), reading(path):
        facts = dict(import_coremltools().utils.load_spec(str(path)).description.metadata.userDefined)
    if 'caretrans' not in facts:
        raise ExportError(f'{path} was not exported by coreml/export.py: its metadata are missing.')
    return facts


def read(job: Job, path: Path) -> Program:
    """The program in a file, evaluated operation by operation, with the rounding of phones.

    Raises:
        ExportError: It is damaged, has an unknown operation, or names no classes.
    """
    program = evaluate(path, job)
    if job.output == 'classes' and program.labels is None:
        raise ExportError(f'{path} has no labels, so it cannot name classes. Export it again.')
    if program.labels is None:
        with reading(path):
            program.labels = read_class_names(read_facts(path))
    return program


def evaluate(path: Path, job: Job) -> Program:
    """The same for files without our metadata; only classifiers have labels."""
    with quiet(*LOGGERS):
        if job.format != 'mlmodel':  # ML Programs, also those inside other formats
            return read_ml_program(path).to_program()
        program = read_network(path, half=job.precision == 'fp16').to_program()
    if job.precision == 'fp32':
        program.notes.append('computed in float32; a phone may compute it in float16')
    return program
