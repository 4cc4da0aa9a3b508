"""Images and results that several tests of training share."""
import pytest
from photos import copy_images


@pytest.fixture(scope='module', autouse=True)
def quick_runs(no_curves):
    """test_training.py has curves, of a run in a new interpreter."""


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Two classes of 24 images each for training and validation; tests do not change it."""
    return copy_images(tmp_path_factory.mktemp('data'), per_class=24)
