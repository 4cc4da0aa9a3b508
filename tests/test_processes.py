"""The environment of a launcher: what is missing or wrong in it is one line."""
import pytest
import torch
from launch import run

from caretrans.distributed import Processes, find_processes, is_primary, join_processes
from caretrans.errors import ConfigError

pytestmark = pytest.mark.slow

VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


@pytest.fixture
def environment(monkeypatch):
    """Set these variables and no others of a launcher."""
    def set_variables(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return set_variables


@pytest.mark.parametrize('variables, expected', [
    ({}, Processes()), (dict(WORLD_SIZE='8'), Processes()), (dict(RANK='0', WORLD_SIZE='1'), Processes()),
    (dict(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1', MASTER_ADDR='host', MASTER_PORT='1'), Processes(1, 4, 1)),
    (dict(RANK='', WORLD_SIZE=''), Processes())])
def test_processes_are_found_in_the_environment(environment, variables, expected):
    environment(**variables)
    assert find_processes() == expected


@pytest.mark.parametrize('variables, message', [
    (dict(RANK='one', WORLD_SIZE='2'), "RANK is 'one' in the environment but must be a number"),
    (dict(RANK='0', WORLD_SIZE='two'), "WORLD_SIZE is 'two' in the environment"),
    (dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='-1', MASTER_ADDR='host', MASTER_PORT='1'), "LOCAL_RANK is '-1' in the"),
    (dict(RANK='2', WORLD_SIZE='2'), 'RANK=2 in the environment must be below WORLD_SIZE=2')])
def test_contradictions_are_refused(environment, variables, message):
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        find_processes()
    assert is_primary(), 'some process has to print it'


@pytest.mark.parametrize('variables, message', [
    ({}, 'but not MASTER_ADDR and MASTER_PORT: start with torchrun'),
    (dict(MASTER_ADDR='127.0.0.1'), 'but not MASTER_PORT: start with torchrun'),
    (dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='many'), 'cannot connect to the others at 127.0.0.1:many'),
    (dict(MASTER_ADDR='256.0.0.1', MASTER_PORT='29500'), 'cannot connect to the others at 256.0.0.1:29500'),
    (dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='1'), 'cannot connect to the others at 127.0.0.1:1 ')])
def test_processes_that_cannot_connect_say_why(environment, variables, message):
    environment(RANK='1', WORLD_SIZE='2', **variables)
    with pytest.raises(ConfigError, match=message) as error:
        join_processes(torch.device('cpu'), timeout=2.)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('rank', ['0', '1'])
@pytest.mark.parametrize('script, flags', [
    ('train.py', ['data/fruit14', '--device', 'cpu']), ('validate.py', ['gone.pth', '--device', 'cpu'])])
def test_scripts_say_in_one_line_what_is_missing(script, flags, rank):
    out, err = run(script, *flags, code=2, RANK=rank, WORLD_SIZE='2')
    assert out == '' and err.count('\n') == 1
    assert err.startswith(f'{script}: RANK={rank} and WORLD_SIZE=2 are set in the environment, but not MASTER_ADDR')


def test_a_rank_that_is_no_number_is_one_line():
    out, err = run('train.py', 'data/fruit14', code=2, RANK='x', WORLD_SIZE='2')
    assert out == '' and err.count('\n') == 1 and "train.py: RANK is 'x' in the environment" in err
