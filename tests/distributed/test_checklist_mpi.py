"""Rows of TensorFlow's checklist that are about ranks, under mpirun; see test_tensorflow_checklist.py."""

import checklist_of_ranks
import numpy as np


def test_clip_after_sum_of_real_ranks(communicator):
    found = checklist_of_ranks.clipped_sum(communicator)
    # 1 alone; 1 + 2 clipped to 2 on two ranks, and not clip(1) + clip(2) = 3; 1 + 2 + 2 ... likewise.
    assert found == (1.0 if communicator.size == 1 else 2.0)


def test_n_real_ranks_equal_one_rank_on_the_big_batch(communicator):
    found = checklist_of_ranks.trained(communicator)
    np.testing.assert_allclose(found, checklist_of_ranks.expected(), rtol=1e-9)
    for other in communicator.all_gather_object(found):
        np.testing.assert_array_equal(other, found)
