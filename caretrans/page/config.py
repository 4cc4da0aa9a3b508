"""Settings of `python -m caretrans page`: which networks, where to, and how the folder is served."""
from dataclasses import dataclass

from ..errors import ConfigError
from ..export.config import ExportConfig
from ..flags import PRETRAINED_HELP, check_settings, setting
from ..measure.names import expand_models
from ..models.backbone import resolve_alias

__all__ = ['MODELS', 'PageConfig', 'ServerConfig']

MODELS = ('care_s0', 'casvit_xs', 'fastvit_t8', 'mobilenetv4_conv_small', 'mobileone_s0', 'mlla_t')
VERIFIED = 14  # bundled images that each program is verified on, one of each class


@dataclass
class ServerConfig:
    """Settings of the server; each field is a flag."""

    host: str = setting('127.0.0.1', 'address to listen on; 0.0.0.0 for other devices in the network')
    port: int = setting(8000, 'port to listen on; 0 for any free one', bounds=(0, 65535))
    tls: bool = setting(False, 'serve https with a certificate of its own, which browsers warn about')

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class PageConfig(ServerConfig):
    """All settings of a page; each field is a flag."""

    model: list[str] = setting([], (
        'models of caretrans or timm; without --pretrained they get random weights, to measure speed only (default, '
        f'without --checkpoint: {" ".join(MODELS)})'))
    checkpoint: list[str] = setting([], 'weights to classify with: .pth, .pth.tar or .safetensors')
    pretrained: bool = setting(False, PRETRAINED_HELP)
    precision: list[str] = setting(
        ['fp32'], 'of the weights; fp16 halves the download, and is not faster on the CPU', choices=['fp32', 'fp16'])
    litert: bool = setting(False, (
        'export the networks for LiteRT.js too, the runtime nearest to Android apps; cmd/export.sh makes the '
        'environment of its converter, .venv-export, on first use'))
    output: str = setting('runs/page', 'folder of the page')
    serve: bool = setting(False, 'serve the folder afterwards')
    threads: int = setting(1, 'CPU threads', bounds=(1, None))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('model', 'checkpoint', 'precision'):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f'{name} is {getattr(self, name)}: name each once.')
        if not self.precision:
            raise ConfigError('precision is empty, choose from fp32, fp16.')
        if self.litert and 'fp32' not in self.precision:
            raise ConfigError(f'--litert needs fp32 programs, but --precision is {" ".join(self.precision)}: add fp32.')
        if self.pretrained and not self.model:
            raise ConfigError('--pretrained needs a model: add --model, e.g. --model care_s0.')
        if not self.model and not self.checkpoint:
            self.model = list(MODELS)
        self.model = list(dict.fromkeys(resolve_alias(name) for name in expand_models(self.model)))

    def list_exports(self, folder: str) -> list[ExportConfig]:
        """The settings of the exports into a folder, a config for each network, those of checkpoints first."""
        shared = dict(
            format=['onnx'], precision=self.precision, output_dir=folder, images=VERIFIED, latency=False,
            threads=self.threads)
        weights = dict(pretrained=True) if self.pretrained else dict(
            random_weights=True, floor=0.)  # whose top-1 classes are nearly equal; errors are limited all the same
        return [
            *(ExportConfig(checkpoint=file, **shared) for file in self.checkpoint),
            *(ExportConfig(model=name, **weights, **shared) for name in self.model)]
