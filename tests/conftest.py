"""Setup of all tests: one thread, and random numbers that do not depend on earlier tests."""
import pytest
import torch

# These small networks gain little from more threads, and lose much (20 times the time was measured on two cores) where
# another process works beside the tests and threads wait for one another. `pytest -n 2` uses two cores better.
torch.set_num_threads(1)


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
    """Runs of this process do not draw their curves, which takes a third of the time of a tiny run."""
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
