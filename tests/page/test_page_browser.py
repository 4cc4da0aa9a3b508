"""The page in a real browser: Debian's Chromium without a window, driven by playwright.

`cmd/test.sh --all` installs both. No test looks at a latency: a software GPU and a busy machine say nothing about it.
"""
import base64
import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import CLASSES, serving
from photos import FRUIT
from PIL import Image

from caretrans.checkpoint.preparation import Preparation
from caretrans.data import EvalTransform
from caretrans.evaluation import load_for_evaluation, predict_images
from caretrans.export.phone_results import NAMES, read_results
from caretrans.page import server

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [
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


@pytest.fixture(scope='module')
def chromium():
    with playwright.sync_playwright() as driver:
        yield driver.chromium


@pytest.fixture(scope='module')
def browser(chromium):
    with chromium.launch(executable_path=CHROMIUM, args=FLAGS + ON_CPU) as browser:
        yield browser


@pytest.fixture(scope='module')
def address(built):
    with serving(built) as address:
        yield address


class Tab:
    """A page of the size of a small phone, with the addresses that it asked for and what went wrong in it."""

    def __init__(self, browser, address: str, **context) -> None:
        self.context = browser.new_context(viewport=dict(width=360, height=780), **context)
        self.context.set_default_timeout(WAIT)
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

    def classify(self, path: Path) -> str:
        """Classify a file; the hash of its prepared pixels."""
        state = self.page.locator('#classify-state')
        expect(state).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
        self.page.evaluate("document.querySelector('#classify-state').textContent = ''")
        self.page.set_input_files('#photo', str(path))
        expect(state).to_have_text(re.compile('.'), timeout=WAIT)
        expect(state).not_to_have_text('Classifying…', timeout=WAIT)
        return self.page.get_attribute('#prediction', 'data-digest')


@pytest.fixture
def open_tab(browser):
    """Open a page in a fresh profile; checks at the end that nothing went wrong and nobody else was asked."""
    tabs = []

    def call(address, with_browser=browser, **context) -> Tab:
        tabs.append((address, Tab(with_browser, address, **context)))
        return tabs[-1][1]
    yield call
    for address, tab in tabs:
        base = address.partition('?')[0]
        assert [url for url in tab.requests if not url.startswith((base, f'blob:{base}', 'data:'))] == []
        assert tab.problems == []
        tab.context.close()


# 1. Check -------------------------------------------------------------------------------------------------------------

def test_page_checks_itself_and_is_isolated(open_tab, address):
    tab = open_tab(address)
    text = tab.wait()
    assert 'care_s0 computes what PyTorch computes' in text and 'from the file that was built' in text
    error = float(re.search(r'error ([\d.e-]+) of', text)[1])
    assert 0 < error < 1e-4
    assert tab.page.evaluate('crossOriginIsolated') is True
    assert re.search(r'Step of the clock\s+0\.0\d* ms', tab.page.inner_text('#facts'))
    assert any(url.endswith('.onnx') for url in tab.requests)


def edit_manifest(folder, edit) -> None:
    path = folder / 'manifest.json'
    manifest = json.loads(path.read_text(encoding='utf-8'))
    edit(manifest)
    path.write_text(json.dumps(manifest), encoding='utf-8')


def test_damaged_program_is_reported(open_tab, copied):
    program = next((copied / 'models').glob('*fp32*'))
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    with serving(copied) as address:
        assert f'models/{program.name} is damaged' in open_tab(address).wait('bad')


def test_program_that_computes_something_else_is_told_in_red_and_has_no_time(open_tab, copied):
    def edit(manifest):  # as if this browser were off by a part in a thousand
        check = manifest['programs'][0]['checks'][1]
        check['logits'][3] += 1e-3 * max(map(abs, check['logits']))
    edit_manifest(copied, edit)
    with serving(copied) as address:
        tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm&{QUICK}')
        assert 'computes something else here: error 1.0e-3 of the largest logit, 0.0001 is allowed' in tab.wait('bad')
        wrong, right = tab.wait_measured()
        assert wrong[2:6] == [''] * 4 and 'computes something else here' in wrong[7]
        assert right[0] == 'care_s0, fp16' and float(right[2]) > 0
        assert tab.page.locator('#rows tr').first.locator('td.bad').count() == 1
        assert tab.page.input_value('#csv').count('\n') == 0  # the fp16 row alone


def test_other_pixels_are_told_in_red(open_tab, copied):
    edit_manifest(copied, lambda manifest: manifest['programs'][0]['checks'][0].update(pixels='0' * 64))
    with serving(copied) as address:
        assert 'images are prepared differently here' in open_tab(address).wait('bad')


# 2. Classify ----------------------------------------------------------------------------------------------------------

def write_photos(folder) -> list[Path]:
    """Files as cameras and programs write them: sizes, chroma, orientation, formats."""
    generator = np.random.default_rng(0)
    source = Image.open(FRUIT / 'val' / 'kaiser' / 'kaiser_001.jpg')
    paths = []

    def write(name, size, **options):
        noise = generator.normal(0, 12, (size[1], size[0], 3))
        image = Image.fromarray(np.clip(np.asarray(source.resize(size)) + noise, 0, 255).astype(np.uint8))
        paths.append(folder / name)
        image.save(paths[-1], **options)

    write('chroma-full.jpg', (333, 501), quality=95, subsampling=0)
    write('chroma-half.jpg', (500, 375), quality=85, subsampling=1)
    write('large.jpg', (1613, 1210), quality=80, subsampling=2, progressive=True)
    write('small.png', (40, 31))
    write('thin.png', (900, 7))
    for orientation in (3, 6, 7):
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(f'turned-{orientation}.jpg', (400, 301), quality=90, exif=exif)
    grey = folder / 'grey.jpg'
    source.convert('L').save(grey)
    return [*paths, grey]


def test_photos_are_prepared_bit_for_bit_and_get_the_classes_of_python(open_tab, address, tmp_path, shared):
    checkpoint = str(shared / 'page.pth.tar')
    photos = [*write_photos(tmp_path), *sorted((FRUIT / 'val').glob('*/*_002.jpg'))[:4]]
    transform = EvalTransform(load_for_evaluation(checkpoint)[2], as_uint8=True)
    predictions = list(predict_images(checkpoint, map(str, photos)))
    assert len({prediction.classes[0] for prediction in predictions}) > 1
    tab = open_tab(address)
    tab.wait()
    for photo, prediction in zip(photos, predictions, strict=True):
        digest = tab.classify(photo)
        pixels = transform(photo.read_bytes()).permute(1, 2, 0).numpy()
        assert digest == hashlib.sha256(pixels.tobytes()).hexdigest(), photo.name
        shown = tab.page.locator('#classes li span').all_text_contents()
        assert shown[::2] == prediction.classes, photo.name
        shares = [float(text.removesuffix(' %')) for text in shown[1::2]]
        assert shares == pytest.approx([100 * share for share in prediction.probabilities], abs=0.06)


def test_a_file_that_is_no_image_is_told(open_tab, address, tmp_path):
    (tmp_path / 'notes.jpg').write_text('not an image', encoding='utf-8')
    tab = open_tab(address)
    tab.wait()
    tab.classify(tmp_path / 'notes.jpg')
    assert 'cannot be read as an image' in tab.page.inner_text('#classify-state.bad')


def test_preparation_equals_pillow_for_every_setting(open_tab, address):
    """Sizes whose crop is half a pixel off the centre among them, where Python rounds to even."""
    tab = open_tab(address)
    generator = np.random.default_rng(0)
    for width, height in ((50, 50), (57, 58), (131, 72), (31, 45), (20, 301), (2100, 20)):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for settings in ({}, dict(crop_pct=1.), dict(crop_mode='squash', crop_pct=0.9), dict(interpolation='bilinear')):
            preparation = Preparation((3, 50, 50), **settings)
            found = tab.page.evaluate('''async ([width, height, values, preparation]) => {
                const { normalise, prepare } = await import(new URL('prepare.js', location.href));
                const data = Uint8Array.from(atob(values), (letter) => letter.charCodeAt());
                const tensor = normalise(prepare({ width, height, data }, preparation), preparation);
                return btoa(String.fromCharCode(...new Uint8Array(tensor.buffer)));
            }''', [width, height, base64.b64encode(pixels).decode(), preparation.to_dict()])
            expected = EvalTransform(preparation)(Image.fromarray(pixels))
            values = np.frombuffer(base64.b64decode(found), np.float32).reshape(expected.shape)
            assert np.array_equal(values, expected.numpy()), (width, height, settings)


def test_a_photo_of_the_camera_is_classified(open_tab, address):
    tab = open_tab(address, permissions=['camera'])
    tab.wait()
    expect(tab.page.locator('#classify-state')).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
    before = tab.page.get_attribute('#prediction', 'data-digest')
    tab.page.get_by_role('button', name='Use the camera').click()
    tab.page.get_by_role('button', name='Take the photo').click()
    expect(tab.page.locator('#prediction')).not_to_have_attribute('data-digest', before, timeout=WAIT)
    assert tab.page.locator('#classes li').count() == 5 and tab.page.locator('#camera-view').is_hidden()


def test_random_weights_do_not_classify(open_tab, copied):
    def edit(manifest):
        for program in manifest['programs']:
            program['weights'] = ''
    edit_manifest(copied, edit)
    with serving(copied) as address:
        tab = open_tab(address)
        tab.wait()
        tab.page.get_by_text('they recognise nothing').wait_for()
        assert tab.page.locator('#photo').is_hidden()
        assert 'speed only' in tab.page.inner_text('#models')


# 3. Measure -----------------------------------------------------------------------------------------------------------

def test_rows_are_shown_and_accepted_as_results(open_tab, address, tmp_path):
    tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm,threads&{QUICK}')
    tab.wait()
    rows = tab.wait_measured()
    labels = [row[1] for row in rows]
    assert [row[0] for row in rows[::len(rows) // 2]] == ['care_s0', 'care_s0, fp16']
    assert labels[0] == 'CPU, 1 thread' and re.fullmatch(r'CPU, \d threads', labels[1])
    for name, text in dict(device='Pixel, 8', os='Android 15', reporter='Nobody', note='"warm"').items():
        tab.page.fill(f'#{name}', text)
    file = tmp_path / 'results.csv'
    with tab.page.expect_download() as download:
        tab.page.get_by_text('CSV file').click()
    download.value.save_as(file)
    results = read_results(file)
    assert ','.join(NAMES) + '\n' + tab.page.input_value('#csv') == file.read_text(encoding='utf-8').rstrip()
    for result, shown in zip(results, rows, strict=True):
        assert (result['device'], result['reporter'], result['runs']) == ('Pixel, 8', 'Nobody', '10')
        assert float(result['latency_ms']) == pytest.approx(float(shown[2]), rel=0.01)
        assert float(result['first_ms']) == pytest.approx(float(shown[4]), rel=0.01)
        assert float(result['error']) == float(shown[6])
        assert result['note'].startswith('"warm"; ') and 'not the standard protocol: rounds 2' in result['note']
    with tab.page.expect_download() as download:
        tab.page.get_by_text('JSON file').click()
    whole = json.loads(Path(download.value.path()).read_text(encoding='utf-8'))
    for row, result in zip(whole['rows'], results, strict=True):
        times = np.concatenate(row['rounds_ms'])
        assert len(times) == 10 and row['sha256'].startswith(result['program'])
        for name, share in (('p10_ms', 10), ('latency_ms', 50), ('p90_ms', 90)):
            assert float(result[name]) == pytest.approx(np.percentile(times, share), abs=1e-3)


def test_litert_computes_the_same_and_its_rows_are_accepted(open_tab, built_litert, tmp_path):
    with serving(built_litert) as address:
        tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm,litert-wasm,litert-threads&{QUICK}')
        tab.wait()
        rows = tab.wait_measured()
        assert [re.sub(r'\d threads', 'threads', row[1]) for row in rows] == [
            'onnxruntime-web, CPU, 1 thread', 'LiteRT.js, CPU, 1 thread', 'LiteRT.js, CPU, threads']
        assert all(0 < float(row[6]) < 1e-5 and float(row[2]) > 0 for row in rows), rows
        assert len({row[6] for row in rows[:2]}) == 2  # another program
        for name, text in dict(device='Pixel 8', os='Android 15', reporter='Nobody').items():
            tab.page.fill(f'#{name}', text)
        file = tmp_path / 'results.csv'
        file.write_text(','.join(NAMES) + '\n' + tab.page.input_value('#csv') + '\n', encoding='utf-8')
        assert [(row['format'], row['form'], re.sub(r'[\d.]+ ', '', row['runtime'])) for row in read_results(file)] == [
            ('onnx', 'fused', 'onnxruntime-web wasm'), *[('litert', 'bmm', 'LiteRT.js wasm')] * 2]
        assert 'LiteRT.js' in tab.page.inner_text('#version') and 'Apache-2.0' in tab.page.inner_text('#version')


def test_a_damaged_program_of_litert_has_no_time(open_tab, built_litert, tmp_path):
    folder = Path(shutil.copytree(built_litert, tmp_path / 'page'))
    program = next((folder / 'models').glob('*.tflite'))
    program.write_bytes(program.read_bytes()[:-1] + b'!')
    with serving(folder) as address:
        tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm,litert-wasm&{QUICK}')
        tab.wait()
        right, damaged = tab.wait_measured()
        assert float(right[2]) > 0 and f'models/{program.name} is damaged' in damaged[7] and damaged[2] == ''


def test_webgpu_of_a_software_adapter_is_checked_not_timed(open_tab, address, chromium):
    with chromium.launch(executable_path=CHROMIUM, args=FLAGS + ON_GPU) as browser:
        tab = open_tab(f'{address}?auto=1&models=care_s0&backends=webgpu&{QUICK}', browser)
        tab.wait()
        full, half = tab.wait_measured()
        assert 'Right, but computed by a software stand-in' in full[7] and 0 < float(full[6]) < 1e-4
        assert 'shader-f16' in half[7] or 'Right' in half[7] and float(half[6]) < 2e-2
        assert tab.page.input_value('#csv') == ''
        tab.context.close()


def test_a_hidden_page_voids_the_measurement(open_tab, address):
    tab = open_tab(f'{address}?models=care_s0&backends=wasm&rounds=200')
    tab.wait()
    tab.page.get_by_role('button', name='Measure').click()
    expect(tab.page.locator('#measure-state')).to_have_text(re.compile('^Round'), timeout=WAIT)
    tab.page.evaluate('''() => {
        Object.defineProperty(document, 'hidden', { value: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }''')
    assert all('void' in row[7] for row in tab.wait_measured())
    assert tab.page.input_value('#csv') == ''


# Hosts ----------------------------------------------------------------------------------------------------------------

def test_page_works_without_a_network_once_loaded(open_tab, built):
    with serving(built) as address:
        tab = open_tab(address)
        tab.wait()
        expect(tab.page.locator('#classify-state')).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
    tab.page.reload()
    tab.wait()
    assert tab.page.evaluate('crossOriginIsolated') is True


def test_a_host_without_headers_is_isolated_after_one_reload(open_tab, built, monkeypatch):
    monkeypatch.setattr(server, 'HEADERS', {})
    with serving(built) as address:
        tab = open_tab(address)
        tab.wait()
        assert tab.page.evaluate('crossOriginIsolated') is True


def test_https_with_its_own_certificate_is_secure_and_isolated(open_tab, built):
    with serving(built, tls=True) as address:
        tab = open_tab(address, ignore_https_errors=True)
        tab.wait()
        assert tab.page.evaluate('[isSecureContext, crossOriginIsolated]') == [True, True]


def test_plain_http_in_a_network_works_with_less(open_tab, built):
    with serving(built) as address:
        tab = open_tab(f'{address.replace("localhost", "phone.test")}?auto=1&models=care_s0&backends=wasm&{QUICK}')
        assert 'from the file' not in tab.wait()  # no hash without a secure context
        assert tab.page.evaluate('[isSecureContext, crossOriginIsolated]') == [False, False]
        row = tab.wait_measured()[0]
        assert 'hash not checked' in row[7] and float(row[2]) > 0
        assert 'one: the page is not isolated' in tab.page.inner_text('#facts')


# Looks ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_small_phone_needs_no_sideways_scrolling_and_every_control_has_a_name(open_tab, address, scheme):
    tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm&{QUICK}', color_scheme=scheme)
    tab.wait()
    tab.wait_measured()
    for details in tab.page.locator('details').all():
        details.evaluate('element => { element.open = true; }')
    assert tab.page.evaluate('document.documentElement.scrollWidth') == 360
    assert tab.page.evaluate('''() => [
        ...document.querySelectorAll('input, select, textarea, button, meter, canvas, svg'),
    ].filter((item) => !item.labels?.length && !item.textContent && !item.ariaLabel && item.ariaHidden !== 'true')
        .map((item) => item.outerHTML)''') == []
    assert tab.page.locator('html[lang=en]').count() == 1 and tab.page.locator('[role=status]').count() >= 4
    names = tab.page.locator('#models label').all_text_contents()
    assert len(names) == 2 and all(' MB' in name for name in names)
    assert CLASSES and list(csv.reader([tab.page.input_value('#csv').splitlines()[0]]))[0][4] == 'care_s0'
