"""Setup of all tests: one thread, little garbage collection, random numbers that do not depend on earlier tests."""
import gc

import pytest
import torch

# These small networks gain little from more threads, and lose much (20 times the time was measured on two cores) where
# another process works beside the tests and threads wait for one another. `pytest -n 2` uses two cores better.
torch.set_num_threads(1)

# Modules and tests stay until the end: looking for garbage among them took 9 of the 33 seconds of a few tests.
gc.disable()


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope='module', autouse=True)
def little_garbage():
    """Garbage collection looks only at what the tests of this module make."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape names of files that are not UTF-8 in what a test printed: xdist cannot send them."""
    report = yield
    report.sections = [
        (name, text.encode('utf-8', 'backslashreplace').decode('utf-8')) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def no_curves():
    """Runs of this process do not draw their curves, which takes up to half of the time of a tiny run."""
    from caretrans.training.folder import RunFolder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, 'draw_curves', lambda self: None)
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """Run benchmark.py in this process: its exit code, stdout and stderr."""
    import benchmark

    def main(*flags):
        monkeypatch.setattr('sys.argv', ['benchmark.py', *map(str, flags)])
        code = benchmark.main()
        return code, *capsys.readouterr()
    return main
