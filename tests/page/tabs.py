"""Shared by the tests of the page in a real browser, Debian's Chromium without a window, driven by playwright.

`cmd/test.sh --all` installs both. No test looks at a latency: a software GPU and a busy machine say nothing about it.
"""
import json
import re
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason='no Chromium: cmd/test.sh --all installs it on Debian')]
playwright = pytest.importorskip('playwright.sync_api', reason='no playwright: cmd/test.sh --all installs it')
expect = playwright.expect

FLAGS = ['--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--host-resolver-rules=MAP phone.test 127.0.0.1',
         '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
ON_CPU, ON_GPU = ['--disable-gpu'], ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader']
QUICK = 'rounds=2&runs=5&seconds=0&pause=0'
WAIT = 180_000  # ms, for busy machines


def edit_manifest(folder, edit) -> None:
    path = folder / 'manifest.json'
    manifest = json.loads(path.read_text(encoding='utf-8'))
    edit(manifest)
    path.write_text(json.dumps(manifest), encoding='utf-8')


class Tab:
    """A page of the size of a small phone, with the addresses that it asked for and what went wrong in it."""

    def __init__(self, browser, address: str, script: str = '', **context) -> None:
        self.context = browser.new_context(viewport=dict(width=360, height=780), **context)
        self.context.set_default_timeout(WAIT)
        self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.requests, self.problems = [], []
        self.context.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.problems.append(str(error)))
        self.page.goto(address)

    def wait(self, kind: str = 'good') -> str:
        """What the self-check says once it is done."""
        self.page.locator('#check.good, #check.bad').wait_for()
        text = self.page.inner_text('#check')
        assert self.page.locator(f'#check.{kind}').count() == 1, text
        return text

    def wait_measured(self) -> list[list[str]]:
        """The cells of the table after a measurement."""
        expect(self.page.locator('#measure-state')).to_have_text(re.compile('^Done|void'), timeout=WAIT)
        return [row.locator('th, td').all_text_contents() for row in self.page.locator('#rows tr').all()]

    def set_hidden(self, is_hidden: bool) -> None:
        self.page.evaluate('''(value) => {
            Object.defineProperty(document, 'hidden', { value, configurable: true });
            document.dispatchEvent(new Event('visibilitychange'));
        }''', is_hidden)

    def classify(self, path: Path) -> str:
        """Classify a file; the hash of its prepared pixels."""
        state = self.page.locator('#classify-state')
        expect(state).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
        self.page.evaluate("document.querySelector('#classify-state').textContent = ''")
        self.page.set_input_files('#photo', str(path))
        expect(state).to_have_text(re.compile('.'), timeout=WAIT)
        expect(state).not_to_have_text('Classifying…', timeout=WAIT)
        return self.page.get_attribute('#prediction', 'data-digest')
