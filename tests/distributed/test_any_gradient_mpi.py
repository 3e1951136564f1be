"""Four ways to the same updates over MPI, each skipped where its library is missing."""

import gradient_page
import numpy as np
import pytest

from distopt.testing import world


@pytest.mark.parametrize("way", ["by hand", "tape", "torch", "jax"])
def test_all_ways_make_the_updates_of_one_process(communicator, way):
    found = gradient_page.updates(communicator, way)
    [expected] = world(1, lambda alone: gradient_page.updates(alone, "by hand"))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    for other in communicator.all_gather_object(found):
        for ours, theirs in zip(found, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
