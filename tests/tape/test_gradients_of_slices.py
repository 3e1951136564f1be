"""Gradients of gathers: IndexedSlices, and what becomes of several of them."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.variables import IndexedSlices, Variable


def test_gathers_of_one_table_concatenate_and_a_dense_use_makes_it_dense():
    table = Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape(persistent=True) as tape:
        rows = ops.reduce_sum(ops.gather(table, indices=np.array([0, 0]))) + ops.reduce_sum(
            ops.gather(table, indices=np.array([2]))
        )
        mixed = rows + ops.reduce_sum(table)
    sparse = tape.gradient(rows, table)
    assert isinstance(sparse, IndexedSlices)
    assert sorted(sparse.indices.tolist()) == [0, 0, 2]
    assert tape.gradient(mixed, table).tolist() == [[3, 3], [1, 1], [2, 2]]


def test_a_gather_out_of_range_is_refused():
    table = Variable(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="from -1 to 1"):
        ops.gather(table, indices=np.array([1, -1]))


def test_an_index_with_arrays_is_refused():
    x = Variable([1.0, 2.0, 3.0])
    assert x[np.int64(1)].numpy() == 2.0
    for key in (np.array([0, 0]), [0, 0], (slice(None), np.array([1]))):
        with pytest.raises(TypeError, match=r"use ops\.gather"):
            x[key]


def test_several_gathers_concatenate_into_one_indexed_slices():
    table = Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape() as tape:
        rows = [ops.reduce_sum(ops.gather(table, indices=np.array(i))) for i in ([0], [2, 0], [1])]
        total = rows[0] * 1.0 + rows[1] * 10.0 + rows[2] * 100.0
    found = tape.gradient(total, table)
    assert isinstance(found, IndexedSlices)
    assert len(found.indices) == 4
    assert found.to_dense().tolist() == [[11.0, 11.0], [100.0, 100.0], [10.0, 10.0]]


def test_a_gather_of_something_computed_has_a_dense_gradient():
    table = Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape() as tape:
        total = ops.reduce_sum(ops.gather(table * table, indices=np.array([2, 2])))
    assert tape.gradient(total, table).tolist() == [[0, 0], [0, 0], [16, 20]]


def test_a_gather_through_identity_stays_sparse():
    table = Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape() as tape:
        total = ops.reduce_sum(ops.gather(ops.identity(table), indices=np.array([2])))
    assert isinstance(tape.gradient(total, table), IndexedSlices)


def test_slices_as_output_gradients_of_slices():
    table = Variable(np.array([[1.0], [2.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            total = ops.reduce_sum(ops.square(ops.gather(table, indices=np.array([1, 0]))))
        first = inner.gradient(total, table)
    upstream = IndexedSlices(np.array([[10.0], [1.0]]), np.array([1, 0]), (2, 1))
    assert outer.gradient(first, table, upstream).to_dense().tolist() == [[2.0], [20.0]]
