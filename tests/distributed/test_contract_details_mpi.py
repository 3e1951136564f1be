"""What the contract says of calls that differ between ranks, over MPI."""

from contract_details import calls_that_differ_raise_on_every_rank_and_leave_all_usable, wrong_calls

from distopt.communicators.mpi import MpiCommunicator


def test_a_checked_communicator_compares_every_operation(communicator):
    with MpiCommunicator(checked=True) as checked:
        calls_that_differ_raise_on_every_rank_and_leave_all_usable(checked)


def test_groups_of_a_checked_communicator_are_checked_too(communicator):
    with MpiCommunicator(checked=True) as checked, checked.split(checked.rank // 3) as group:
        calls_that_differ_raise_on_every_rank_and_leave_all_usable(group)


def test_a_wrong_argument_on_one_rank_sends_nothing_so_that_the_others_need_not_know(communicator):
    if communicator.rank == communicator.size - 1:
        for kind, _, name, call in wrong_calls(communicator):
            try:
                call()
            except kind:
                continue
            raise AssertionError(f"{name} took what it should refuse")
    assert communicator.all_gather_object(communicator.rank) == list(range(communicator.size))
