"""LearningRate: arithmetic that is done when it is read."""

import pytest

from distopt.optimizers.learning_rate import LearningRate


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda rate: rate + 3, 5.0),
        (lambda rate: 3 + rate, 5.0),
        (lambda rate: rate - 3, -1.0),
        (lambda rate: 3 - rate, 1.0),
        (lambda rate: rate * 3, 6.0),
        (lambda rate: 3 * rate, 6.0),
        (lambda rate: rate / 4, 0.5),
        (lambda rate: 3 / rate, 1.5),
        (lambda rate: rate**3, 8.0),
        (lambda rate: rate * rate, 4.0),
        (lambda rate: rate * (lambda: 3), 6.0),
    ],
)
def test_arithmetic_follows_the_rate(compute, expected):
    now = [1.0]
    rate = LearningRate(lambda: now[0])
    computed = compute(rate)
    now[0] = 2.0
    assert computed() == float(computed) == expected
    assert repr(rate) == "<LearningRate 2.0>"
