"""The page in a real browser: its measurements and their rows."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import serving
from tabs import CHROMIUM, FLAGS, MARKS, ON_GPU, QUICK, WAIT, edit_manifest, expect

from caretrans.export.phone_results import NAMES, read_results

pytestmark = MARKS


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
    tab.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')); }")
    tab.page.get_by_role('button', name='Copy').click()
    expect(tab.page.locator('#send-state')).to_have_text('The rows are selected: copy them.')
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
        assert row['protocol'] == dict(rounds=2, runs=5, seconds=0, pause=0) and 'rounds 2' in row['remarks'][-1]
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
        files = [url.rpartition('/')[2] for url in tab.requests if url.endswith('.wasm')]
        for name in ('litert_wasm_internal.wasm', 'litert_wasm_threaded_internal.wasm'):
            assert files.count(name) == 2  # by the page, and for it by the service worker; not again by the runtime
        assert re.search(r'for LiteRT.js 0\.\d MB', tab.page.inner_text('#models'))
        for width in (360, 650, 800, 840, 1000):
            tab.page.set_viewport_size(dict(width=width, height=800))
            assert tab.page.evaluate("""() => [document.documentElement, document.querySelector('.scroll')]
                .map(({ clientWidth, scrollWidth }) => scrollWidth - clientWidth)""") == [0, 0], width
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

    def edit(manifest):  # as if there were an fp16 program, which LiteRT never has
        [single] = manifest['programs']
        manifest['programs'].append(dict(
            single, precision='fp16', files=dict(onnxruntime=single['files']['onnxruntime'])))
    edit_manifest(folder, edit)
    with serving(folder) as address:
        tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm,litert-wasm&{QUICK}')
        tab.wait()
        right, damaged, half, skipped = tab.wait_measured()
        assert float(half[2]) > 0 and skipped[7] == 'skipped: LiteRT.js runs fp32 only' and skipped[2] == ''
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


def test_a_hidden_page_is_not_measured(open_tab, address):
    hide = "Object.defineProperty(document, 'hidden', { value: true, configurable: true })"
    tab = open_tab(f'{address}?auto=1&models=care_s0&backends=wasm&rounds=200', script=hide)
    tab.wait()
    expect(tab.page.locator('#measure-state')).to_have_text('Waiting until the page is in front', timeout=WAIT)
    tab.set_hidden(False)
    expect(tab.page.locator('#measure-state')).to_have_text(re.compile('^Round'), timeout=WAIT)
    tab.set_hidden(True)
    assert all('void' in row[7] for row in tab.wait_measured())
    assert tab.page.input_value('#csv') == ''


def test_stop_ends_what_is_still_loading_and_the_keyboard_keeps_its_place(open_tab, address):
    tab = open_tab(f'{address}?models=care_s0&backends=wasm', permissions=['camera'])
    tab.wait()
    tab.page.get_by_role('button', name='Use the camera').click()
    tab.page.locator('#camera-view').wait_for()
    expect(tab.page.locator('#classify-state')).to_have_text(re.compile('^Prepared in'), timeout=WAIT)
    tab.page.evaluate('''() => { // as if the server did not answer
        const { postMessage } = Worker.prototype;
        Worker.prototype.postMessage = function post(data) {
            if (data.action !== 'load') postMessage.call(this, data);
        };
    }''')
    tab.page.focus('#start')
    tab.page.keyboard.press('Enter')
    expect(tab.page.locator('#stop')).to_be_focused()
    assert tab.page.locator('#camera-view').is_hidden()
    tab.page.keyboard.press('Enter')
    expect(tab.page.locator('#measure-state')).to_have_text('stopped', timeout=WAIT)
    expect(tab.page.locator('#start')).to_be_focused()


def test_a_wrong_address_is_told_and_nothing_is_measured(open_tab, address):
    tab = open_tab(f'{address}?auto=1&models=care_s9&backends=cpu&rounds=0&seconds=x')
    tab.wait()
    expect(tab.page.locator('#measure-state')).to_have_text(
        'rounds=0 in the address must be a whole number of at least 1. '
        'seconds=x in the address must be a number of at least 0. '
        'models=care_s9 in the address: choose from care_s0. '
        'backends=cpu in the address: choose from wasm, threads, webgpu, litert-wasm, litert-threads.')
    assert tab.page.locator('#start').is_disabled()
    counts = tab.page.evaluate('''async () => {
        const { countTimes } = await import(new URL('page.js', location.href));
        const warm = { typical: 1, block: 4, warm_up: 50 };
        return ['webgpu', 'wasm'].map((provider) => countTimes(
            { backend: { provider }, warm }, { rounds: 10, runs: 5, seconds: 0.5 }));
    }''')
    assert counts == [10, 125]  # at most 450 runs on WebGPU


def test_a_coarse_clock_still_gives_times(open_tab, address):
    """The worker's functions run in a page here, whose clock can be replaced."""
    tab = open_tab(f'{address}style.css')
    warm, times, loaded = tab.page.evaluate('''async (step) => {
        const { answer } = await import(new URL('worker.js', location.href));
        const manifest = await (await fetch('manifest.json')).json();
        const now = performance.now.bind(performance);
        performance.now = () => step * Math.floor(now() / step);
        const call = (action, options) => new Promise((resolve, reject) => {
            self.onmessage = ({ data: { result, error } }) => {
                if (error) reject(new Error(error));
                else if (result) resolve(result);
            };
            answer({ id: 0, action, options });
        });
        const backend = { runtime: 'onnxruntime', provider: 'wasm', threads: 1 };
        const loaded = await call('load', { manifest, wanted: manifest.programs[0], backend });
        const warm = await call('warmUp');
        return [warm, await call('time', { count: 2, block: warm.block }), loaded];
    }''', 5)
    assert loaded['clock'] == 5 and min(loaded['load_ms'], warm['first_ms']) >= 5
    assert warm['block'] > 1 and warm['block'] * warm['typical'] >= 100 and min(times) > 0
    assert warm['warm_up'] >= 10 + 2 * warm['block'] - 1


def test_browsers_that_say_less_are_named(open_tab, address):
    tab = open_tab(f'{address}style.css')
    names, described, backends = tab.page.evaluate('''async (agents) => {
        const { describeBrowser, listBackends, nameBrowser } = await import(new URL('device.js', location.href));
        const set = (name, value) => Object.defineProperty(navigator, name, { value });
        set('userAgentData', { platform: 'Android', getHighEntropyValues: async () => ({ platform: 'Android' }) });
        set('gpu', { requestAdapter: async () => ({ features: new Set() }) }); // without info
        const backends = await listBackends({}, { runtimes: { onnxruntime: { name: 'a 1' } } });
        return [agents.map(nameBrowser), await describeBrowser(), backends.map(({ name }) => name)];
    }''', [
        'Mozilla/5.0 (Linux; Android 10; K) Chrome/120.0.0.0 Mobile Safari/537.36 EdgA/120.1',
        'Mozilla/5.0 (Windows NT 10.0) Chrome/120.0.0.0 Safari/537.36 Edg/120.2',
        'Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) Version/17.0 EdgiOS/120.3 Mobile/15E148 Safari/605.1',
        'Mozilla/5.0 (Linux; Android 13) SamsungBrowser/23.0 Chrome/115.0.0.0 Mobile Safari/537.36',
        'Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) CriOS/120.4 Mobile/15E148 Safari/604.1',
        'Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) FxiOS/120.5 Mobile/15E148 Safari/605.1',
        'Mozilla/5.0 (X11; Linux; rv:121.0) Gecko/20100101 Firefox/121.0',
        'Mozilla/5.0 (Macintosh) AppleWebKit/605.1 Version/17.2 Safari/605.1', 'Something else'])
    assert names == ['Edge 120.1', 'Edge 120.2', 'Edge 120.3', 'Samsung Internet 23.0', 'Chrome 120.4', 'Firefox 120.5',
                     'Firefox 121.0', 'Safari 17.2', 'Something else']
    assert described['browser'].startswith('Chrome ') and 'webgpu' in backends
