import pytest
from communicator_contract import CONTRACT
from contract_details import calls_that_differ_raise_on_every_rank_and_leave_all_usable

from distopt.communicators import LocalCommunicator
from distopt.testing import world


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_one_rank_by_itself(check):
    with LocalCommunicator() as communicator:
        check(communicator)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_threads_as_ranks(check, ranks):
    world(ranks, check)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_threads_that_call_different_things_all_raise_and_work_on(ranks):
    world(ranks, calls_that_differ_raise_on_every_rank_and_leave_all_usable)
