"""Fixtures of the tests of exports."""
import os

import pytest
from exports import Programs


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    """Converted programs on disk, shared by all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return Programs((folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'programs')
