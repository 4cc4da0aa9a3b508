"""The README and the package metadata agree with the code."""
import re
from pathlib import Path

from registered import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_table_of_models_has_a_row_for_each():
    """Its figures are counted again by `benchmark.py --check`, which tests/bench/test_benchmark.py runs."""
    rows = set(re.findall(r'^\| `(\w+)` \| [\d,]+ \| [\d,]+ \| [\d.]+ \|', README, re.MULTILINE))
    assert rows >= set(MODELS)


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r'\]\(([^)#:]+)\)', README) + re.findall(r'\bbash (cmd/\w+\.sh)', README)
    assert len(links) > 8 and [link for link in links if not (ROOT / link).exists()] == []


def test_no_page_has_a_place_left_to_fill():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'coreml' / 'README.md']
    assert [page.name for page in pages if re.search(r'^[A-Z]+_[A-Z_]+$|TODO|TBD|FIXME', page.read_text(), re.M)] == []


def test_requirements_and_package_ask_for_the_same():
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    assert all('#' in line for line in lines), 'each requirement has its reason'
    extras = {'benchmark.py': 'benchmark', 'coreml/export.py': 'export'}
    wanted = {name: set() for name in ['dependencies', *extras.values()]}
    for line in lines:
        requirement, reason = (part.strip() for part in line.split('#'))
        if not reason.startswith('cmd/test.sh'):
            wanted[extras.get(reason.split(':')[0], 'dependencies')].add(requirement)
    package = (ROOT / 'pyproject.toml').read_text()
    for name, listed in wanted.items():
        block = re.search(rf'^{name} = \[(.*?)^\]', package, re.MULTILINE | re.DOTALL)[1]
        assert listed and listed == set(re.findall(r'"(.+?)"', block)), name


def test_a_folder_named_like_a_standard_module_is_no_package():
    assert not (ROOT / 'cmd' / '__init__.py').exists()
