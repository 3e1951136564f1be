import numpy as np
import pytest

from distopt import counter_random

# kat_vectors of Random123, the reference implementation of the paper's authors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    assert tuple(counter_random.philox4x32(counter, key).tolist()) == answer


def test_philox_of_arrays_broadcasts_and_equals_philox_of_each_counter():
    blocks = np.arange(3)[:, None]
    indices = np.arange(5)
    whole = counter_random.philox4x32((blocks, indices, 7, 9), (1, 2))
    assert whole.shape == (3, 5, 4)
    single = counter_random.philox4x32((2, 4, 7, 9), (1, 2))
    np.testing.assert_array_equal(whole[2, 4], single)


def test_words_put_block_index_epoch_and_stream_in_the_counter_and_the_seed_in_the_key():
    seed = (0x299F31D0 << 32) | 0xA4093822
    bits = counter_random.words(seed, 0x03707344, 0x13198A2E, np.array([0x85A308D3]), 8)
    first = counter_random.philox4x32((0, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    second = counter_random.philox4x32((1, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    np.testing.assert_array_equal(bits[0], np.concatenate([first, second]))


@pytest.mark.parametrize("draw", ["words", "uniform", "normal", "truncated_normal"])
def test_the_numbers_of_an_example_do_not_depend_on_the_other_examples_of_the_call(draw):
    function = getattr(counter_random, draw)
    indices = np.array([5, 0, 4_000_000_000, 17, 3, 3])
    epochs = np.array([0, 1, 2, 0, 5, 6])
    whole = function(3, 1, epochs, indices, 9)
    assert whole.shape == (6, 9)
    for row in range(6):
        alone = function(3, 1, int(epochs[row]), int(indices[row]), 9)
        np.testing.assert_array_equal(whole[row], alone)


@pytest.mark.parametrize("draw", ["words", "uniform", "normal", "truncated_normal"])
def test_asking_for_more_numbers_gives_the_same_ones_first(draw):
    function = getattr(counter_random, draw)
    index = np.arange(3)
    np.testing.assert_array_equal(function(0, 1, 2, index, 5), function(0, 1, 2, index, 70_001)[:, :5])


def test_every_part_of_the_address_changes_the_numbers():
    base = counter_random.words(1, 2, 3, 4, 4)
    for other in ((9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9), (1 << 40 | 1, 2, 3, 4)):
        assert not np.array_equal(base, counter_random.words(*other, 4))


def test_uniforms_are_words_in_float32_on_the_grid_of_24_bits():
    bits = counter_random.words(0, 1, 2, 3, 1000)
    numbers = counter_random.uniform(0, 1, 2, 3, 1000)
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers.astype(np.float64) * 2**24, bits >> 8)


def test_a_million_uniforms_have_the_moments_and_the_histogram_of_the_uniform_distribution():
    numbers = counter_random.uniform(11, 1, 0, 0, 1_000_000).astype(np.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Five standard errors: sqrt(1/12/n), and sqrt(1/180/n) for the variance.
    assert abs(numbers.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / 1e6)
    assert abs(numbers.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 1e6)
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_squared = ((counts - 1e4) ** 2 / 1e4).sum()
    assert chi_squared < 99 + 5 * np.sqrt(2 * 99)


def test_a_million_normals_have_the_moments_of_the_normal_distribution():
    numbers = counter_random.normal(12, 1, 0, 0, 1_000_000)
    assert abs(numbers.mean()) < 5e-3
    assert abs(numbers.var() - 1) < 5 * np.sqrt(2 / 1e6)
    assert abs((numbers**3).mean()) < 5 * np.sqrt(15 / 1e6)
    assert abs((numbers**4).mean() - 3) < 5 * np.sqrt(96 / 1e6)
    assert abs((numbers[0::2] * numbers[1::2]).mean()) < 5 * np.sqrt(1 / 5e5)


def test_normals_follow_box_and_muller_for_one_group_of_words():
    w = counter_random.words(5, 6, 7, 8, 4).astype(np.float64)
    radius = np.sqrt(-2 * np.log((w[[0, 2]] + 0.5) / 2**32))
    angle = 2 * np.pi * w[[1, 3]] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    np.testing.assert_allclose(counter_random.normal(5, 6, 7, 8, 3), expected[:3], rtol=1e-13)


def test_truncated_normals_stay_within_the_bound_with_the_known_deviation():
    numbers = counter_random.truncated_normal(13, 1, 0, 0, 1_000_000)
    assert np.abs(numbers).max() <= 2
    # Of a normal truncated at two: variance 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.7737413.
    assert abs(numbers.var() - 0.7737413) < 5e-3
    assert abs(numbers.mean()) < 5e-3


def test_truncated_normals_keep_the_normals_that_are_within_the_bound():
    plain = counter_random.normal(13, 1, 0, 0, 10_000)
    truncated = counter_random.truncated_normal(13, 1, 0, 0, 10_000)
    inside = np.abs(plain) <= 2
    assert 0.94 < inside.mean() < 0.97
    np.testing.assert_array_equal(truncated[inside], plain[inside])
    assert len(np.unique(truncated)) == 10_000


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_a_permutation_holds_every_index_once(n):
    order = counter_random.permutation(0, 0, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_a_permutation_depends_on_seed_and_epoch_only():
    base = counter_random.permutation(4, 2, 1000)
    np.testing.assert_array_equal(base, counter_random.permutation(4, 2, 1000))
    assert not np.array_equal(base, counter_random.permutation(4, 3, 1000))
    assert not np.array_equal(base, counter_random.permutation(5, 2, 1000))


def test_all_orders_of_four_come_up_equally_often():
    orders = np.array([counter_random.permutation(1, epoch, 4) for epoch in range(2400)])
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 23 + 5 * np.sqrt(2 * 23)


def test_equal_keys_are_ordered_by_index(monkeypatch):
    keys = np.random.default_rng(0).integers(0, 3, 1000)
    words = np.stack([np.zeros(1000), keys], axis=1).astype(np.uint32).ravel()
    monkeypatch.setattr(counter_random, "words", lambda *_: words)
    expected = [index for key in range(3) for index in range(1000) if keys[index] == key]
    np.testing.assert_array_equal(counter_random.permutation(0, 0, 1000), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, 0, 1), "seed must be in"),
        ((1 << 64, 0, 0, 0, 1), "seed must be in"),
        ((0, 1 << 32, 0, 0, 1), "stream must be in"),
        ((0, 0, -1, 0, 1), r"epoch must be in \[0, 2\*\*32\), got values from -1 to -1"),
        ((0, 0, 0, np.array([1, 1 << 32]), 1), "index must be in"),
        ((0, 0, 0, 0, -1), "count must be in"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        counter_random.words(*arguments)


def test_a_float_index_is_refused():
    with pytest.raises(TypeError, match="index must be integer, got dtype float64"):
        counter_random.words(0, 0, 0, np.array([1.0]), 1)


def test_a_permutation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs 1 to"):
        counter_random.permutation(0, 0, 0)


def test_no_examples_and_no_numbers_give_empty_arrays():
    assert counter_random.uniform(0, 0, 0, np.empty(0, np.int64), 5).shape == (0, 5)
    assert counter_random.normal(0, 0, 0, np.arange(3), 0).shape == (3, 0)


def test_stream_numbers_are_fixed_for_ever():
    # CRC-32 of "123456789", the check value of the standard.
    assert counter_random.stream("123456789") == 0xCBF43926
