"""A server for the folder of a page, with the headers that threads need, and https where asked for."""
import argparse
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..errors import ConfigError
from ..flags import FlagParser, add_flags
from .config import ServerConfig

__all__ = ['HEADERS', 'MANIFEST', 'check_server', 'list_addresses', 'main', 'make_server', 'serve']

MANIFEST = 'manifest.json'
HEADERS = {  # without them a browser gives a page no shared memory, so no threads, and a coarse clock
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Embedder-Policy': 'require-corp',
    'Cross-Origin-Resource-Policy': 'same-origin',
}
DAYS = 30  # that a certificate is valid


class PageHandler(SimpleHTTPRequestHandler):
    """Files with the headers of isolation; the browser asks each time whether a file has changed."""

    protocol_version = 'HTTP/1.1'
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map, '.js': 'text/javascript', '.mjs': 'text/javascript',
        '.wasm': 'application/wasm', '.onnx': 'application/octet-stream'}

    def end_headers(self) -> None:
        for name, value in {**HEADERS, 'Cache-Control': 'no-cache'}.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal for the address."""


class PageServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing when a browser closes a connection or refuses the certificate; show any other error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _find_address() -> str:
    """This machine's address in its network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(('10.255.255.255', 1))
            return probe.getsockname()[0]
        except OSError:
            return '127.0.0.1'


def _require_openssl() -> None:
    if shutil.which('openssl') is None:
        raise ConfigError('--tls needs openssl to make a certificate: install it, or omit --tls.')


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate of this machine's address, and its key, by openssl.

    Raises:
        ConfigError: There is no openssl, or it fails.
    """
    _require_openssl()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate, key = folder / 'certificate.pem', folder / 'key.pem'
    done = subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', str(DAYS), '-subj', '/CN=caretrans',
         '-addext', f'subjectAltName=IP:{_find_address()},IP:127.0.0.1,DNS:localhost', '-keyout', str(key), '-out',
         str(certificate)], capture_output=True, text=True, encoding='utf-8', errors='replace')
    if done.returncode:
        raise ConfigError(f'--tls: openssl failed: {" ".join(done.stderr.split())[-200:]}')
    return certificate, key


def _listen(folder: Path, config: ServerConfig) -> PageServer:
    try:
        return PageServer((config.host, config.port), partial(PageHandler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f'--host {config.host} --port {config.port}: {getattr(error, "strerror", None) or error}; choose '
            f'another.') from None


def check_server(config: ServerConfig) -> None:
    """Find what would keep `make_server` from listening.

    Raises:
        ConfigError: The address cannot be listened on, or nothing can make a certificate.
    """
    if config.tls:
        _require_openssl()
    _listen(Path(), config).server_close()


def make_server(folder: Path, config: ServerConfig) -> ThreadingHTTPServer:
    """A server that listens already.

    Raises:
        ConfigError: The folder holds no page, the address cannot be listened on, or there is no certificate.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f'{folder} holds no page: python -m caretrans page --output {folder} makes one.')
    folder, context = folder.resolve(), None
    if config.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*_make_certificate(folder.with_name(f'{folder.name}-tls')))
    server = _listen(folder, config)
    if context:  # the handshake in the thread of a connection: in accept() one idle connection would block all others
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def list_addresses(server: ThreadingHTTPServer, config: ServerConfig) -> list[str]:
    """The addresses of a page, the one for this machine first."""
    hosts = ['localhost', _find_address()] if config.host in ('0.0.0.0', '') else [config.host]
    hosts = ['localhost' if host == '127.0.0.1' else host for host in hosts]
    return [f'http{"s" * config.tls}://{host}:{server.server_port}/' for host in dict.fromkeys(hosts)]


def serve(folder: Path, config: ServerConfig) -> int:
    """Serve a folder until Ctrl-C."""
    with make_server(folder, config) as server:
        print(f'Serving {folder}, stop it with Ctrl-C:')
        print('\n'.join(f'  {address}' for address in list_addresses(server, config)), flush=True)
        server.serve_forever()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m caretrans serve`."""
    parser = FlagParser(
        prog='python -m caretrans serve', description='Serve the folder of a page.', argument_default=argparse.SUPPRESS)
    parser.add_argument('folder', nargs='?', default='runs/page', help='(default: runs/page)')
    add_flags(parser, ServerConfig)
    options = vars(parser.parse_args(argv))
    folder = Path(options.pop('folder'))
    return serve(folder, ServerConfig(**options))
