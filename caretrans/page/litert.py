"""Programs for LiteRT, whose converter cannot be installed beside training: cmd/export.sh runs it elsewhere."""
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, ExportError
from ..export.config import ExportConfig

__all__ = ['LiteRTProgram', 'check_script', 'export_litert']

SCRIPT = Path(__file__).parents[2] / 'cmd' / 'export.sh'


@dataclass(frozen=True)
class LiteRTProgram:
    """A verified program.

    Attributes:
        form: Of the network, one of `caretrans.fuse.FORMS`.
        largest: Largest logit of the original network in float64 on the images it was verified on.
        max_error: Largest error of a logit on them.
    """
    path: Path
    form: str
    largest: float
    max_error: float


def check_script() -> None:
    """Refuse --litert outside of the repository, where nothing can make the other environment."""
    if not SCRIPT.is_file():
        raise ConfigError(f'--litert needs {SCRIPT}: build the page in a checkout of the repository.')


def export_litert(config: ExportConfig, name: str) -> LiteRTProgram:
    """Write the float32 program of a network into the folder of an export.

    Args:
        config: Of the network's export to ONNX.
        name: Of the network, for messages.
    Raises:
        ExportError: It could not be made, or does not compute what the network does.
    """
    weights = ['--checkpoint', config.checkpoint] if config.checkpoint else [
        '--model', config.model, '--pretrained' if config.pretrained else '--random-weights']
    floor = [] if config.floor is None else ['--floor', str(config.floor)]
    done = subprocess.run([
        'bash', str(SCRIPT), *weights, *floor, '--format', 'litert', '--images', str(config.images), '--no-latency',
        '--threads', str(config.threads), '--output-dir', config.output_dir, '--json'],
        stdout=subprocess.PIPE, text=True, encoding='utf-8')  # messages and progress are shown
    if done.returncode:
        raise ExportError(f'{name}: the export for LiteRT failed, as said above; omit --litert for a page without it.')
    item = json.loads(done.stdout)['programs'][0]
    return LiteRTProgram(
        Path(item['path']), item['form'], item['verification']['largest'], item['verification']['max_error'])
