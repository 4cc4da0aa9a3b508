"""The README and the package metadata agree with the code."""
import re
from pathlib import Path

import pytest
import timm
from registered import MODELS, gmacs

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', MODELS)
def test_the_table_of_models_is_measured(name):
    """Counted here, independently of `benchmark.py --check`."""
    model = timm.create_model(name, device='meta')
    two_headed = model if model.distilled else timm.create_model(name, device='meta', distilled=True)
    two_heads = sum(p.numel() for p in two_headed.parameters())
    one_head = two_heads - sum(p.numel() for p in two_headed.head_dist.parameters())
    row = re.search(rf'^\| `{name}` \|(.*)\|$', README, re.MULTILINE)[1].split('|')
    assert [cell.strip() for cell in row[:3]] == [f'{two_heads:,}', f'{one_head:,}', f'{gmacs(model)["total"]:.3f}']


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r'\]\(([^)#:]+)\)', README) + re.findall(r'\bbash (cmd/\w+\.sh)', README)
    assert len(links) > 8 and [link for link in links if not (ROOT / link).exists()] == []


def test_no_page_has_a_place_left_to_fill():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'coreml' / 'README.md']
    marks = re.compile(r'^[A-Z]+_[A-Z_]+$|TODO|TBD|FIXME', re.MULTILINE)
    assert [page.name for page in pages if marks.search(page.read_text(encoding='utf-8'))] == []


def test_requirements_and_package_ask_for_the_same():
    """Each requirement states its reason, after the group that it belongs to."""
    wanted = {}
    for line in (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines():
        requirement, reason = (part.strip() for part in line.split('#', 1))
        wanted.setdefault(reason.split(':')[0], set()).add(requirement)
    package = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    for name in 'core', 'train', 'imagenet', 'dense', 'lmdb', 'benchmark', 'export':
        key = 'dependencies' if name == 'core' else name
        block = re.search(rf'^{key} = \[(.*?)^\]', package, re.MULTILINE | re.DOTALL)[1]
        found = {item for item in re.findall(r'"(.+?)"', block) if not item.startswith('caretrans[')}
        assert found and found == wanted[name], name
    assert set(wanted) == {'core', 'train', 'imagenet', 'dense', 'lmdb', 'benchmark', 'export', 'tests'}


def test_a_folder_named_like_a_standard_module_is_no_package():
    assert not (ROOT / 'cmd' / '__init__.py').exists()
