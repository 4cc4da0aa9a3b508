"""Shared by tests of the page: a small checkpoint, and a server."""
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from photos import FRUIT

from caretrans.checkpoint import save_checkpoint
from caretrans.measure.sample_network import load_sample_images, randomize
from caretrans.page.config import ServerConfig
from caretrans.page.server import make_server

SIDE = 64
CLASSES = sorted(path.name for path in (FRUIT / 'val').iterdir())
LITERT_DATA = Path(__file__).parents[1] / 'data' / 'page'  # of write_litert.py
LITERT_CHECKPOINT = LITERT_DATA / 'tiny.pth.tar'


def write_checkpoint(path: Path, **model_args: Any) -> Path:
    """A care_s0 of few blocks for images of 64 pixels, with random weights that spread its predictions."""
    model_args = model_args or dict(depths=(1, 1, 1, 1))
    model = timm.create_model('care_s0', num_classes=len(CLASSES), **model_args).eval()
    randomize(model, load_sample_images(model, (SIDE, SIDE), 8))
    torch.nn.init.normal_(model.head.fc.weight, std=0.5)
    save_checkpoint(path, model, arch='care_s0', class_names=CLASSES, model_args=model_args, eval_config={
        'input_size': [3, SIDE, SIDE], 'crop_pct': 0.875, 'orientation': 'exif'})
    return path


def write_export_script(folder: Path, largest: float | None = None) -> Path:
    """A stand-in for cmd/export.sh, which "exports" the kept program into its --output-dir.

    Args:
        largest: Largest logit that it reports, if not the true one.
    """
    item = json.loads((LITERT_DATA / 'export.json').read_text(encoding='utf-8'))
    item['verification']['largest'] = largest or item['verification']['largest']
    item['path'] = str(folder / 'exported.tflite')
    (folder / 'export.json').write_text(json.dumps(dict(programs=[item])), encoding='utf-8')
    script = folder / 'export.sh'
    script.write_text(
        f'printf "%s\\n" "$@" > "{folder}/flags.txt"\ncp "{LITERT_DATA}/tiny.tflite" "{item["path"]}"\n'
        f'cat "{folder}/export.json"\n', encoding='utf-8')
    return script


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[str]:
    """The address of a server of a folder while it runs; connections that a browser keeps end with it."""
    server = make_server(folder, ServerConfig(port=0, **settings))
    connections = []

    def accept():
        connections.append(type(server).get_request(server))
        return connections[-1]
    server.get_request = accept
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield f'http{"s" * bool(settings.get("tls"))}://localhost:{server.server_port}/'
    finally:
        server.shutdown()
        server.server_close()
        for connection, _ in connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
