"""The page in a real browser: its check, photos, hosts and looks."""
import base64
import csv
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from pages import CLASSES, serving
from photos import FRUIT
from PIL import Image
from tabs import MARKS, QUICK, WAIT, edit_manifest, expect, playwright

from caretrans.checkpoint.preparation import Preparation
from caretrans.data import EvalTransform
from caretrans.evaluation import load_for_evaluation, predict_images
from caretrans.page import server

pytestmark = MARKS


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


@pytest.mark.parametrize('name', ['models/*fp32*', 'vendor/*/ort-wasm-simd-threaded.wasm'])
def test_damaged_program_or_runtime_is_reported(name, open_tab, copied):
    file = next(copied.glob(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with serving(copied) as address:
        assert f'{file.relative_to(copied)} is damaged' in open_tab(address).wait('bad')


@pytest.mark.parametrize('name, said', [('runtimes.js', 'The page cannot start'), ('worker.js', 'worker.js')])
def test_a_missing_script_is_reported(name, said, open_tab, copied):
    (copied / name).unlink()
    with serving(copied) as address:
        tab = open_tab(address)
        assert said in tab.wait('bad')
        if name == 'worker.js':  # the service worker keeps all of them or none
            assert 'no: the service worker could not be installed' in tab.page.inner_text('#facts')


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
    assert tab.page.input_value('#photo') == ''  # the same file can be chosen again
    tab.page.evaluate("document.querySelector('#prediction').dataset.digest = ''")
    tab.page.select_option('#classify-model', '1')
    expect(tab.page.locator('#prediction')).to_have_attribute('data-digest', digest, timeout=WAIT)
    (tmp_path / 'notes.jpg').write_text('not an image', encoding='utf-8')
    tab.classify(tmp_path / 'notes.jpg')
    assert 'cannot be read as an image' in tab.page.inner_text('#classify-state.bad')


def test_preparation_equals_pillow_for_every_setting(open_tab, address):
    """Sizes whose crop is half a pixel off the centre among them, where Python rounds to even."""
    tab = open_tab(f'{address}style.css')
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


# Hosts ----------------------------------------------------------------------------------------------------------------

def test_page_works_without_a_network_once_loaded(open_tab, built_litert):
    """With what was used once; its cache holds only what it may use again, and other caches are left alone."""
    fill = '''async ([name, file]) => {
        const cache = await caches.open(name ?? (await caches.keys()).find((key) => key.includes(location.href)));
        await cache.put(file, new Response('x'));
    }'''
    with serving(built_litert) as address:
        tab = open_tab(address)
        tab.wait()
        expect(tab.page.locator('#classify-state')).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
        for files in (['another', 'models/theirs'], [None, 'models/old']):
            tab.page.evaluate(fill, files)
        tab.page.goto(f'{address}?auto=1&backends=wasm,litert-wasm&{QUICK}')
        tab.wait_measured()
    with pytest.raises(playwright.Error, match='Failed to fetch'):
        tab.page.evaluate("fetch('nothing')")
    tab.page.goto(f'{address}?auto=1&backends=wasm,litert-wasm,litert-threads&{QUICK}')
    tab.wait()
    assert tab.page.evaluate('crossOriginIsolated') is True
    first, second, unused = tab.wait_measured()
    assert float(first[2]) > 0 and float(second[2]) > 0
    assert unused[7] == ('litert_wasm_threaded_internal.js is not stored in this browser yet, and the server does not '
                         'send it: connect, and load it once.')
    kept = 'Promise.all(["theirs", "old"].map((file) => caches.match(`models/${file}`).then(Boolean)))'
    assert tab.page.evaluate(kept) == [True, False]


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
        address = address.replace('localhost', 'phone.test')
        tab = open_tab(f'{address}?auto=1&backends=wasm&rounds=1&runs=5&seconds=0&pause=0')
        assert 'from the file' not in tab.wait()  # no hash without a secure context
        assert tab.page.evaluate('[isSecureContext, crossOriginIsolated]') == [False, False]
        row = tab.wait_measured()[0]
        assert 'hash not checked' in row[7] and float(row[2]) > 0
        assert 'fewer than 10 runs: no row to send' in row[7] and tab.page.input_value('#csv') == ''
        assert 'one: the page is not isolated' in tab.page.inner_text('#facts')


# Looks ----------------------------------------------------------------------------------------------------------------

def test_a_small_phone_needs_no_sideways_scrolling_and_every_control_has_a_name(open_tab, address):
    tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm&{QUICK}')
    tab.wait()
    tab.wait_measured()
    for details in tab.page.locator('details').all():
        details.evaluate('element => { element.open = true; }')
    backgrounds = set()
    for scheme in ('light', 'dark'):
        tab.page.emulate_media(color_scheme=scheme)
        assert tab.page.evaluate('document.documentElement.scrollWidth') == 360
        backgrounds.add(tab.page.evaluate('getComputedStyle(document.body).backgroundColor'))
    assert len(backgrounds) == 2
    assert tab.page.evaluate('''() => [
        ...document.querySelectorAll('input, select, textarea, button, meter, canvas, svg'),
    ].filter((item) => !item.labels?.length && !item.textContent && !item.ariaLabel && item.ariaHidden !== 'true')
        .map((item) => item.outerHTML)''') == []
    assert tab.page.locator('html[lang=en]').count() == 1 and tab.page.locator('[role=status]').count() >= 4
    names = tab.page.locator('#models label').all_text_contents()
    assert len(names) == 2 and all(' MB' in name for name in names)
    assert CLASSES and list(csv.reader([tab.page.input_value('#csv').splitlines()[0]]))[0][4] == 'care_s0'
