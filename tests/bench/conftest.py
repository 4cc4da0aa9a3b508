"""Fixtures of the tests of benchmarks."""
from types import SimpleNamespace

import pytest
import timm

from caretrans.bench import infer


@pytest.fixture
def small(monkeypatch):
    """Build networks of CARE with one block per stage, where the figures of the full network are not the subject."""
    def create(name, **kwargs):
        return timm.create_model(name, **(dict(depths=(1, 1, 1, 1)) if name.startswith('care') else {}), **kwargs)
    monkeypatch.setattr(infer, 'timm', SimpleNamespace(create_model=create))
