"""Take the pictures of README.md and docs/browser.md, of a page that measures: run it on a quiet machine.

    python tests/page/take_pictures.py [FOLDER OF A PAGE] [--query 'models=care_s0,casvit_xs']
"""
import argparse
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]

from pages import serving  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402
from tabs import CHROMIUM, FLAGS, ON_CPU  # noqa: E402

TARGET = ROOT / 'docs' / 'images'
LONG = 1_800_000  # ms


def save(page: Page, name: str, **options) -> None:
    """A picture with 128 colours, which keeps it small."""
    picture = Image.open(io.BytesIO(page.screenshot(**options))).convert('RGB')
    picture.quantize(128).save(TARGET / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT / 'runs' / 'page')
    parser.add_argument('--query', default='', help='which networks are measured, and how')
    args = parser.parse_args()
    with serving(args.folder) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *ON_CPU, '--hide-scrollbars'])
        page = browser.new_page(viewport=dict(width=360, height=760), device_scale_factor=1.5)
        page.goto(f'{address}?auto=1&{args.query}')
        expect(page.locator('#measure-state')).to_have_text(re.compile('^Done'), timeout=LONG)
        page.evaluate("scrollTo(0, document.querySelector('#classify-title').getBoundingClientRect().top - 16)")
        save(page, 'browser_phone.png')
        page.emulate_media(color_scheme='dark')
        page.evaluate("document.querySelector('#results').scrollIntoView()")
        save(page, 'browser_phone_dark.png')
        page.emulate_media(color_scheme='light')
        page.set_viewport_size(dict(width=1000, height=800))
        page.wait_for_timeout(500)
        save(page, 'browser_desktop.png', full_page=True)
        top, bottom = page.evaluate("""['#results', '#plot'].map((name, i) => {
            const box = document.querySelector(name).getBoundingClientRect();
            return scrollY + (i ? box.bottom : box.top);
        })""")
        save(page, 'browser_results.png', full_page=True, clip=dict(x=50, y=top, width=900, height=bottom - top))


if __name__ == '__main__':
    main()
