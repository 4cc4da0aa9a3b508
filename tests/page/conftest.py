"""Fixtures of the tests of the page: its folder with a small network, built once for all processes."""
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from pages import LITERT_CHECKPOINT, serving, write_checkpoint, write_export_script

from caretrans.errors import ConfigError
from caretrans.page import litert
from caretrans.page.build import build_page
from caretrans.page.config import PageConfig
from caretrans.page.vendor import LITERT, ONNXRUNTIME, fetch_package


@pytest.fixture(scope='session')
def shared(tmp_path_factory) -> Path:
    """A folder that all processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


@pytest.fixture(scope='session')
def runtimes() -> None:
    """The archives of the browser runtimes."""
    try:
        for runtime in (ONNXRUNTIME, LITERT):
            for package in runtime.packages:
                fetch_package(package)
    except ConfigError as error:
        pytest.skip(f'no browser runtime: {error}')


@pytest.fixture(scope='session')
def built(shared, runtimes) -> Path:
    """The folder of a page with a checkpoint in fp32 and fp16. Do not change it."""
    folder = shared / 'page'
    with FileLock(f'{folder}.lock'):
        if not (folder / 'manifest.json').exists():
            torch.manual_seed(0)
            checkpoint = write_checkpoint(shared / 'page.pth.tar')
            build_page(PageConfig(checkpoint=[str(checkpoint)], precision=['fp32', 'fp16'], output=str(folder)))
    return folder


@pytest.fixture(scope='session')
def built_litert(shared, runtimes) -> Path:
    """The folder of a page with a program for LiteRT, of a converter that is a stand-in. Do not change it."""
    folder = shared / 'page-litert'
    with FileLock(f'{folder}.lock'), pytest.MonkeyPatch.context() as patch:
        if not (folder / 'manifest.json').exists():
            patch.setattr(litert, 'SCRIPT', write_export_script(shared))
            build_page(PageConfig(checkpoint=[str(LITERT_CHECKPOINT)], litert=True, output=str(folder)))
    return folder


@pytest.fixture
def copied(built, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(built, tmp_path / 'page'))


@pytest.fixture(scope='module')
def chromium():
    from tabs import playwright  # skips what needs a browser where there is none

    with playwright.sync_playwright() as driver:
        yield driver.chromium


@pytest.fixture(scope='module')
def browser(chromium):
    from tabs import CHROMIUM, FLAGS, ON_CPU

    with chromium.launch(executable_path=CHROMIUM, args=FLAGS + ON_CPU) as browser:
        yield browser


@pytest.fixture(scope='module')
def address(built):
    with serving(built) as address:
        yield address


@pytest.fixture
def open_tab(browser):
    """Open a page in a fresh profile; checks at the end that nothing went wrong and nobody else was asked."""
    from tabs import Tab

    tabs = []

    def call(address, with_browser=browser, **context):
        tabs.append((address, Tab(with_browser, address, **context)))
        return tabs[-1][1]
    yield call
    for address, tab in tabs:
        base = address.partition('?')[0].removesuffix('style.css')
        assert [url for url in tab.requests if not url.startswith((base, f'blob:{base}', 'data:'))] == []
        assert tab.problems == []
        tab.context.close()
