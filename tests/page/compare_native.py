"""Time the programs of a page in Chromium and by native ONNX Runtime, one thread each, in turns: for docs/browser.md.

    python tests/page/compare_native.py [FOLDER OF A PAGE] [--rounds 10] [--seconds 0.5]

Blocks of both last equally long, and the ratio is that of their means: on a machine that others use too, short runs fit
between the turns of other processes, long ones do not.
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pages import serving  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402
from tabs import CHROMIUM, FLAGS, ON_CPU  # noqa: E402

from caretrans.checkpoint.preparation import Preparation  # noqa: E402
from caretrans.data import EvalTransform  # noqa: E402
from caretrans.measure.tables import format_table  # noqa: E402
from caretrans.measure.timing import time_block  # noqa: E402
from caretrans.runtimes.onnx import INPUT, make_session  # noqa: E402

CPU = torch.device('cpu')
HEADER = ['program', 'runtime', 'native, ms', 'browser, ms', 'ratio', 'error', 'MB', 'load, ms', 'first, ms']
CALL = '''([name, action, options]) => new Promise((resolve, reject) => {
    self.workers ??= {};
    const worker = self.workers[name] ??= new Worker('start_worker.js');
    worker.onmessage = ({ data }) => data.error ? reject(data.error) : 'result' in data && resolve(data.result);
    worker.postMessage({ id: 0, action, options });
})'''


class Candidate:
    """A network in a worker of the page, and its ONNX program natively."""

    def __init__(self, page: Page, folder: Path, manifest: dict, program: dict, runtime: str) -> None:
        self.page, self.program, self.file = page, program, program['files'][runtime]
        self.runtime = manifest['runtimes'][runtime]['name']
        image = EvalTransform(Preparation(**program['preparation']))((folder / manifest['images'][0]).read_bytes())
        self.feed = {INPUT: image[None].numpy()}
        self.session = make_session((folder / program['files']['onnxruntime']['file']).read_bytes(), 1)
        self.times = ([], [])  # native and browser, ms, a list for each round
        self.facts = {
            **self.call('load', manifest=manifest, wanted=program, backend=dict(
                runtime=runtime, provider='wasm', threads=1)), **self.call('check'), **self.call('warmUp')}
        self.typical = np.median(self.time_native(10)), self.facts['typical']

    def call(self, action: str, **options):
        return self.page.evaluate(CALL, [self.file['file'], action, options])

    def time_native(self, runs: int) -> list[float]:
        return [1e3 * seconds for seconds in time_block(lambda: self.session.run(None, self.feed), runs, CPU)]

    def time(self, seconds: float) -> None:
        native, browser = (max(2, round(1e3 * seconds / typical)) for typical in self.typical)
        self.times[0].append(self.time_native(native))
        self.times[1].append(self.call('time', count=browser, block=1))

    def describe(self) -> list[str]:
        ratios = [np.mean(browser) / np.mean(native) for native, browser in zip(*self.times, strict=True)]
        ratio = '{1:.2f} [{0:.2f}, {2:.2f}]'.format(*np.percentile(ratios, (10, 50, 90)))
        runs = [np.concatenate(rounds) for rounds in self.times]
        medians = ['{1:.1f} [{0:.1f}, {2:.1f}]'.format(*np.percentile(times, (10, 50, 90))) for times in runs]
        side = self.program['size'][0]
        return [
            f'{self.program["model"]} {self.program["precision"]} {side}', self.runtime, *medians, ratio,
            f'{self.facts["error"]:.1e}', f'{self.file["bytes"] / 1e6:.1f}', f'{self.facts["load_ms"]:.0f}',
            f'{self.facts["first_ms"]:.0f}']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT / 'runs' / 'page')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--seconds', type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    manifest = json.loads((args.folder / 'manifest.json').read_text(encoding='utf-8'))
    with serving(args.folder) as address, sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS + ON_CPU).new_page()
        page.goto(address)
        page.locator('#check.good').wait_for(timeout=120_000)
        candidates = [Candidate(page, args.folder, manifest, program, runtime) for program in manifest['programs']
                      for runtime in program['files']]
        matrix, rates = torch.rand(1024, 1024), []
        for _ in range(args.rounds):
            rates += [2 * 1024 ** 3 / seconds / 1e9 for seconds in time_block(lambda: matrix @ matrix, 5, CPU)]
            for i in np.random.permutation(len(candidates)):
                candidates[i].time(args.seconds)
    print('matmul of 1024 x 1024, one thread: {1:.0f} [{0:.0f}, {2:.0f}] GFLOP/s'.format(
        *np.percentile(rates, (10, 50, 90))))
    print('\n'.join(format_table(HEADER, [candidate.describe() for candidate in candidates], markdown=True)))


if __name__ == '__main__':
    main()
