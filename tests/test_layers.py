"""The layers of the package: imports point down only, and no module is part of a circle."""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the bottom up; the packages of one layer do not know each other
    ('text',), ('errors',), ('devices', 'flags', 'seeds', 'progress', 'strict_json'), ('distributed',), ('models',),
    ('fuse', 'config'), ('kernels', 'runtimes'), ('checkpoint',), ('data', 'get_model'), ('evaluation', 'measure'),
    ('training',), ('dense', 'selfsup'), ('bench', 'export'), ('page',), ('__main__', 'openmm'))
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def list_imports(file: Path) -> set:
    """The modules of the package that `file` imports anywhere, inside functions too, as paths from the package."""
    package, found = ROOT / 'caretrans', set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = file.parents[node.level - 1].joinpath(*(node.module or '').split('.')).relative_to(package)
        for name in node.names:
            inner = base / name.name
            found.add(next((path for path in (inner, base) if (package / path).with_suffix('.py').is_file()
                            or (package / path).is_dir()), base))
    return found


GRAPH = {file.relative_to(ROOT / 'caretrans').with_suffix(''): list_imports(file)
         for file in sorted((ROOT / 'caretrans').rglob('*.py')) if file.name != '__init__.py'}


@pytest.mark.parametrize('module', [module for module in GRAPH if module.name != '__init__'], ids=str)
def test_imports_point_down(module):
    level = LEVELS[module.parts[0]]
    up = [str(path) for path in GRAPH[module] if path.parts and path.parts[0] != module.parts[0]
          and LEVELS[path.parts[0]] >= level]
    assert not up, f'{module} imports {", ".join(up)}, which is not below it'


def test_there_is_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f'circle: {" -> ".join(str(module) for module in error.args[1])}')
