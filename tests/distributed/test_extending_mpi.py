"""docs/extending.md's aggregator over MPI."""

import extending_page
import pytest


@pytest.mark.parametrize("arena", [False, True])
def test_the_aggregator_takes_the_median_of_the_ranks_that_have_examples(communicator, arena):
    results = extending_page.medians(communicator, arena=arena)
    extending_page.check_medians(communicator, results)
