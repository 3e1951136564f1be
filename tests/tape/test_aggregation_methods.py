"""AggregationMethod: the same sum, by another order of additions."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import AggregationMethod, GradientTape, Tensor, gradients
from distopt.tape.aggregation import Sums
from distopt.variables import IndexedSlices, Variable

_METHODS = [
    AggregationMethod.ADD_N,
    AggregationMethod.EXPERIMENTAL_TREE,
    AggregationMethod.EXPERIMENTAL_ACCUMULATE_N,
]


def test_the_numbers_are_tensorflows():
    assert AggregationMethod.ADD_N == AggregationMethod.DEFAULT == 0
    assert AggregationMethod.EXPERIMENTAL_TREE == 1
    assert AggregationMethod.EXPERIMENTAL_ACCUMULATE_N == 2


@pytest.mark.parametrize("method", [None, *_METHODS])
def test_every_method_gives_the_sum(method):
    v = Variable(1.0)  # the reference: L = v + 2v + 3v + 4v has the gradient 10
    with GradientTape(persistent=True) as tape:
        loss = v * 1.0 + v * 2.0 + v * 3.0 + v * 4.0
    assert float(tape.gradient(loss, v, aggregation_method=method)) == 10.0
    assert [float(g) for g, _ in tape.gradients(loss, [v], aggregation_method=method)] == [10.0]
    assert float(gradients(loss, v, aggregation_method=method)[0]) == 10.0


# In float32, 1 is lost beside 2**24 when it is added alone; two of them together are not.
_PARTS = [2.0**24, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (None, 2.0**24),  # ((2**24 + 1) + 1) + 1
        (AggregationMethod.ADD_N, 2.0**24),
        (AggregationMethod.EXPERIMENTAL_ACCUMULATE_N, 2.0**24),
        (AggregationMethod.EXPERIMENTAL_TREE, 2.0**24 + 2.0),  # (2**24 + 1) + (1 + 1)
    ],
)
def test_the_order_of_additions_is_that_of_the_method(method, expected):
    v = Variable(np.ones(3, "f4"))
    with GradientTape() as tape:
        # What is used last contributes first.
        uses = [v * np.float32(part) for part in reversed(_PARTS)]
        loss = ops.add_n(*uses)
    assert tape.gradient(loss, v, aggregation_method=method).tolist() == [expected] * 3


class _Counted(np.ndarray):
    """An array that counts the additions of its kind."""

    additions = 0

    def __add__(self, other):
        type(self).additions += 1
        return super().__add__(other)

    def __iadd__(self, other):
        type(self).additions += 1
        return super().__iadd__(other)


@pytest.mark.parametrize(
    ("method", "added_at"),
    [
        (AggregationMethod.ADD_N, [0, 0, 0, 0]),
        (AggregationMethod.EXPERIMENTAL_TREE, [0, 1, 1, 3]),
        (AggregationMethod.EXPERIMENTAL_ACCUMULATE_N, [0, 1, 2, 3]),
    ],
)
def test_contributions_are_added_when_the_method_says(method, added_at):
    sums, seen = Sums(method), []
    _Counted.additions = 0
    for value in (1.0, 2.0, 3.0, 4.0):
        sums.add(7, np.full(2, value).view(_Counted))
        seen.append(_Counted.additions)
    assert seen == added_at
    assert sums.pop(7).tolist() == [10.0, 10.0]
    assert _Counted.additions == 3


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_contributions_are_left_as_they_are(method, count):
    parts = [np.full(2, 1.0 + number) for number in range(count)]
    sums = Sums(method)
    for part in parts:
        sums.add(7, part)
    assert sums.pop(7).tolist() == [count * (count + 1) / 2] * 2
    assert [part[0] for part in parts] == [1.0 + number for number in range(count)]


@pytest.mark.parametrize("method", _METHODS)
def test_slices_stay_slices(method):
    table = Variable(np.zeros((3, 1)))
    with GradientTape() as tape:
        loss = ops.add_n(
            *(ops.reduce_sum(ops.gather(table, indices=np.array([row])) * (row + 1.0)) for row in (0, 2, 2))
        )
    found = tape.gradient(loss, table, aggregation_method=method)
    assert isinstance(found, IndexedSlices)
    assert found.to_dense().tolist() == [[1.0], [0.0], [6.0]]


def test_the_default_concatenates_slices_in_one_go(monkeypatch):
    calls = []
    original = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
    table = Variable(np.zeros((3, 1)))
    with GradientTape() as tape:
        loss = ops.add_n(*(ops.reduce_sum(ops.gather(table, indices=np.array([0]))) for _ in range(4)))
    tape.gradient(loss, table)
    assert calls == [4, 4]  # values, indices


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("dense_first", [True, False])
def test_slices_and_a_dense_gradient_become_dense(method, dense_first):
    table = Variable(np.ones((2, 1)))
    with GradientTape() as tape:
        parts = [ops.reduce_sum(ops.gather(table, indices=np.array([1]))) for _ in range(2)]
        parts.insert(len(parts) if dense_first else 0, ops.reduce_sum(table * 5.0))
        loss = ops.add_n(*parts)
    assert tape.gradient(loss, table, aggregation_method=method).tolist() == [[5.0], [7.0]]


@pytest.mark.parametrize("method", _METHODS)
def test_recorded_contributions_are_added_as_tensors(method):
    x = Variable(2.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x * x + x * x * x + x * 7.0
        first = inner.gradient(y, x, aggregation_method=method)
    assert isinstance(first, Tensor)
    assert float(first) == 4.0 + 12.0 + 7.0
    assert float(outer.gradient(first, x)) == 2.0 + 12.0


@pytest.mark.parametrize("method", [3, -1, "ADD_N", True, 1.5])
def test_another_method_is_refused_even_if_only_one_path_exists(method):
    x = Variable(1.0)
    with GradientTape() as tape:
        y = x * 2.0
    with pytest.raises(ValueError, match="Invalid aggregation_method specified"):
        tape.gradient(y, x, aggregation_method=method)
    with pytest.raises(ValueError, match="Invalid aggregation_method specified"):
        tape.gradients(y, [x], aggregation_method=method)
    assert float(tape.gradient(y, x)) == 2.0
