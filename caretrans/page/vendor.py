"""The browser runtime, onnxruntime-web: fetched by npm, checked against a fixed hash, never part of the repository."""
import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

from ..errors import ConfigError, list_names

__all__ = ['RUNTIME', 'VERSION', 'fetch_runtime', 'unpack_runtime']

PACKAGE, VERSION = 'onnxruntime-web', '1.30.0'
RUNTIME = f'{PACKAGE} {VERSION}'
INTEGRITY = 'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='  # SHA-512
ARCHIVE = f'{PACKAGE}-{VERSION}.tgz'
FILES = (  # a script and its WebAssembly for the CPU; for WebGPU, with and without promises in WebAssembly (JSPI)
    'ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm',
    'ort.jspi.min.mjs', 'ort-wasm-simd-threaded.jspi.mjs', 'ort-wasm-simd-threaded.jspi.wasm',
    'ort.webgpu.min.mjs', 'ort-wasm-simd-threaded.asyncify.mjs', 'ort-wasm-simd-threaded.asyncify.wasm')
ROOT = Path(__file__).parents[2]
CACHE = (ROOT if (ROOT / 'pyproject.toml').is_file() else Path()) / 'build' / 'npm'


def _is_whole(archive: Path) -> bool:
    return archive.is_file() and base64.b64encode(
        hashlib.sha512(archive.read_bytes()).digest()).decode() == INTEGRITY


def fetch_runtime(cache: Path = CACHE) -> Path:
    """The package's archive, from the cache or else by `npm pack`; about 33 MB.

    Raises:
        ConfigError: There is no npm, it fails, or the file is not the expected one.
    """
    archive = cache / ARCHIVE
    if _is_whole(archive):
        return archive
    npm = shutil.which('npm')
    if npm is None:
        raise ConfigError(
            f'npm, which fetches {RUNTIME}, is not installed: install Node.js (Debian: apt-get install npm), or copy '
            f'{ARCHIVE} into {cache}.')
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, 'pack', f'{PACKAGE}@{VERSION}', '--silent', '--pack-destination', str(cache)], capture_output=True,
        text=True, encoding='utf-8', errors='replace')
    if done.returncode:
        reason = ' '.join(done.stderr.split())[:200] or f'exit code {done.returncode}'
        raise ConfigError(f'npm could not fetch {RUNTIME}: {reason}; or copy {ARCHIVE} into {cache}.')
    if not _is_whole(archive):
        raise ConfigError(f'{archive} is not {RUNTIME}: its SHA-512 is another. Delete it and try again.')
    return archive


def unpack_runtime(archive: Path, folder: Path) -> list[Path]:
    """Write the files that a page needs, and their licence, into a folder.

    Raises:
        ConfigError: The archive lacks some of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        found = {member.name: member for member in package.getmembers() if member.isfile()}
        missing = [name for name in FILES if f'package/dist/{name}' not in found]
        if missing:
            raise ConfigError(f'{archive} lacks {list_names(missing)}.')
        for name in FILES:
            (folder / name).write_bytes(package.extractfile(found[f'package/dist/{name}']).read())
    shutil.copy(Path(__file__).parent / 'web' / 'onnxruntime-LICENSE.txt', folder / 'LICENSE.txt')
    return [folder / name for name in (*FILES, 'LICENSE.txt')]
