import numpy as np
import pytest

from distopt.counter_random import permutation
from distopt.data import Sampler, evaluation_batches, shard


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 10), (10, 1), (7, 20), (1, 4), (6, 3)])
def test_every_example_comes_exactly_once_per_epoch(n, batch):
    sampler = Sampler(n, batch, seed=3)
    steps = -(-4 * n // batch)
    batches = [sampler.batch(step) for step in range(steps)]
    epochs = np.concatenate([epochs for epochs, _ in batches])
    indices = np.concatenate([indices for _, indices in batches])
    assert all(len(part) == batch for part, _ in batches)
    np.testing.assert_array_equal(epochs, np.arange(steps * batch) // n)
    for epoch in range(4):
        np.testing.assert_array_equal(np.sort(indices[epochs == epoch]), np.arange(n))


def test_a_batch_across_the_end_of_an_epoch_takes_from_both_permutations():
    epochs, indices = Sampler(10, 4, seed=5).batch(2)
    np.testing.assert_array_equal(epochs, [0, 0, 1, 1])
    expected = [*permutation(5, 0, 10)[8:], *permutation(5, 1, 10)[:2]]
    np.testing.assert_array_equal(indices, expected)
    assert epochs.dtype == indices.dtype == np.int64


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = Sampler(11, 2, seed=1), Sampler(11, 6, seed=1)
    for step in range(5):
        parts = [small.batch(3 * step + part) for part in range(3)]
        for whole, pieces in zip(large.batch(step), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_another_batch_size_goes_on_from_the_same_data_position():
    before, after = Sampler(13, 4, seed=1), Sampler(13, 3, seed=1)
    np.testing.assert_array_equal(before.examples(8, 5), after.examples(8, 5))
    np.testing.assert_array_equal(before.batch(2), after.examples(8, 4))


def test_epochs_are_shuffled_differently_and_seeds_too():
    sampler = Sampler(100, 100, seed=1)
    assert not np.array_equal(sampler.batch(0)[1], sampler.batch(1)[1])
    assert not np.array_equal(sampler.batch(0)[1], Sampler(100, 100, seed=2).batch(0)[1])


def test_a_late_step_needs_no_walk_through_the_earlier_ones():
    epochs, indices = Sampler(50_000, 256, seed=0).batch(10**9)
    assert epochs[0] == 256 * 10**9 // 50_000
    assert indices[0] == permutation(0, int(epochs[0]), 50_000)[256 * 10**9 % 50_000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "num_examples must be at least 1, got 0"),
        ((5, 0, 0), "global_batch must be at least 1, got 0"),
        ((5, -3, 0), "global_batch must be at least 1, got -3"),
        ((5, 1, -1), "seed must be in"),
    ],
)
def test_a_sampler_refuses_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -4"):
        Sampler(5, 4, 0).batch(-1)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 256])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 300])
def test_shards_cover_everything_in_order_and_differ_by_one_at_most(length, parts):
    slices = [shard(length, part, parts) for part in range(parts)]
    covered = [i for part in slices for i in range(length)[part]]
    assert covered == list(range(length))
    sizes = [part.stop - part.start for part in slices]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_shards_of_seven_examples_for_three_owners_are_three_two_two():
    assert [shard(7, part, 3) for part in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (5, 0, 0), (5, 3, 3), (5, -1, 3)])
def test_a_shard_that_does_not_exist_is_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        shard(*arguments)


@pytest.mark.parametrize("length", [1, 5, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 3, 128, 5000])
def test_an_evaluation_sees_every_example_exactly_once(length, parts, batch):
    slices = [s for part in range(parts) for s in evaluation_batches(length, part, parts, batch)]
    assert all(0 < s.stop - s.start <= batch for s in slices)
    seen = np.concatenate([np.arange(length)[s] for s in slices])
    np.testing.assert_array_equal(seen, np.arange(length))


@pytest.mark.parametrize("arguments", [(0, 0, 1, 1), (5, 0, 1, 0), (5, 1, 1, 1)])
def test_an_impossible_evaluation_is_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        evaluation_batches(*arguments)
