import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.variables import Variable


def _kept(x, rate=0.5, **options):
    return ops.dropout(x, rate, **options).numpy() != 0


def test_a_share_is_zero_and_the_others_keep_the_mean():
    found = ops.dropout(np.ones((1000, 100), "f4"), 0.2).numpy()
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0.0, np.float32(1.25)]
    # 100,000 draws: the standard deviation of the share is 0.0013.
    assert counts[0] / found.size == pytest.approx(0.2, abs=0.006)
    assert found.mean() == pytest.approx(1.0, abs=0.008)


def test_the_gradient_goes_through_what_was_kept():
    x = Variable(np.full((50, 4), 3.0))
    with GradientTape() as tape:
        y = ops.dropout(x, 0.5)
    np.testing.assert_array_equal(tape.gradient(y, x), np.where(y.numpy() != 0, 2.0, 0.0))


def test_the_choice_depends_on_seed_stream_and_step():
    x = np.ones((20, 30))
    first = _kept(x)
    np.testing.assert_array_equal(_kept(x), first)
    for options in ({"seed": 1}, {"stream": "other"}, {"step": 1}):
        # Independent choices agree half of the time; 600 of them.
        assert np.mean(_kept(x, **options) == first) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("cuts", [[5], [1, 2, 19], [0, 20]])
def test_a_batch_that_is_cut_gets_the_same_choice(cuts):
    x = np.ones((20, 3, 2), "f4")
    whole = ops.dropout(x, 0.5, first_example=7).numpy()
    starts = [0, *cuts]
    parts = [
        ops.dropout(part, 0.5, first_example=7 + start).numpy()
        for part, start in zip(np.split(x, cuts), starts, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_noise_shape_shares_choices():
    x = np.ones((8, 5, 5, 16))
    by_channel = _kept(x, noise_shape=(None, 1, 1, None))
    np.testing.assert_array_equal(by_channel, np.broadcast_to(by_channel[:, :1, :1], x.shape))
    assert 0.3 < by_channel.mean() < 0.7
    shared = _kept(x, noise_shape=(1, 5, 5, 16), first_example=3)
    np.testing.assert_array_equal(shared, np.broadcast_to(_kept(x[:1]), x.shape))


def test_rate_zero_keeps_all_and_the_dtype_stays():
    x = np.arange(4.0).reshape(2, 2).astype(np.float16)
    assert ops.dropout(x, 0.0).numpy().tolist() == x.tolist()
    assert ops.dropout(x, 0.5).dtype == np.float16
    assert ops.dropout(np.zeros((0, 3), "f4"), 0.5).shape == (0, 3)


@pytest.mark.parametrize("rate", [1.0, -0.1, 2, float("nan")])
def test_a_rate_outside_of_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate must be a number in the range \[0, 1\), got"):
        ops.dropout(np.ones((2, 2)), rate)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 1)])
def test_a_noise_shape_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"can't be broadcast to the shape \(2, 3\)"):
        ops.dropout(np.ones((2, 3)), 0.5, noise_shape=shape)
    with pytest.raises(ValueError, match="got a scalar"):
        ops.dropout(np.float32(1.0), 0.5)
