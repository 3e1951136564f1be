import numpy as np
import pytest

from distopt.backend import Device
from distopt.tape import Tensor
from distopt.variables import Arena, IndexedSlices, Variable


def test_python_numbers_become_float32_and_arrays_keep_their_dtype():
    assert Variable(5.0).dtype == np.float32
    assert Variable([1, 2]).dtype == np.int32
    assert Variable(np.zeros(2)).dtype == np.float64
    assert Variable(1.0, dtype=np.float64).dtype == np.float64


def test_a_variable_owns_its_memory():
    source = np.ones(3)
    variable = Variable(source)
    source[:] = 7
    assert variable.numpy().tolist() == [1, 1, 1]
    copy = variable.numpy()
    copy[:] = 9
    assert variable.numpy().tolist() == [1, 1, 1]


def test_initial_value_may_be_a_callable_or_another_variable():
    first = Variable(lambda: [1.0, 2.0])
    assert Variable(first).numpy().tolist() == [1.0, 2.0]
    assert Variable(Tensor(np.float32(3.0))).numpy() == 3.0


def test_assign_checks_the_shape():
    variable = Variable([1.0, 2.0], name="w")
    variable.assign([3.0, 4.0]).assign_add(1.0).assign_sub([0.5, 0.25])
    assert variable.numpy().tolist() == [3.5, 4.75]
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\), the value to assign has \(3,\)"):
        variable.assign([1.0, 2.0, 3.0])


def test_wrong_values_and_constraints_are_refused():
    with pytest.raises(TypeError, match="must be numeric, got 'text'"):
        Variable("text", name="w")
    with pytest.raises(TypeError, match="constraint of variable 'w' must be callable"):
        Variable(1.0, name="w", constraint=3)


def test_operators_work_with_numbers_arrays_and_each_other():
    x = Variable([1.0, 2.0])
    assert (2 - x).numpy().tolist() == [1.0, 0.0]
    assert (2 / x).numpy().tolist() == [2.0, 1.0]
    assert (np.array([1.0, 1.0]) + x).numpy().tolist() == [2.0, 3.0]
    assert (-x * x**2).numpy().tolist() == [-1.0, -8.0]
    assert (2**x).numpy().tolist() == [2.0, 4.0]
    assert abs(x - 3)[1].numpy() == 1.0
    assert (Variable(np.eye(2)) @ np.ones((2, 1))).numpy().tolist() == [[1.0], [1.0]]


def test_arena_holds_variables_as_aligned_views_in_reverse_order():
    a, b = Variable(np.arange(3.0, dtype="f4"), name="a"), Variable(np.ones((2, 40), "f4"), name="b")
    arena = Arena([a, b])
    (slab,) = arena.slabs
    assert [v.name for v in slab.variables] == ["b", "a"]
    assert (b.start, a.start, slab.values.size) == (0, 128, 192)  # 256 bytes are 64 float32
    assert slab.values[128:131].tolist() == [0.0, 1.0, 2.0]
    assert slab.values.sum() == 83.0  # padding is zero
    slab.values[128] = 5.0
    assert a.numpy().tolist() == [5.0, 1.0, 2.0]
    assert a.gradient.base is not None
    assert a.gradient.shape == (3,)


def test_arena_has_one_slab_per_dtype():
    arena = Arena([Variable(1.0, name="a"), Variable(np.zeros(2), name="b"), Variable(2.0, name="c")])
    assert {str(s.dtype): [v.name for v in s.variables] for s in arena.slabs} == {
        "float32": ["c", "a"],
        "float64": ["b"],
    }
    assert arena.size == 4
    assert arena.schema() == [("c", (), "float32"), ("b", (2,), "float64"), ("a", (), "float32")]


def test_arena_refuses_what_it_cannot_hold():
    a = Variable(1.0, name="a")
    Arena([a])
    with pytest.raises(ValueError, match="'a' is in another arena"):
        Arena([a])
    with pytest.raises(ValueError, match="two variables are named 'b'"):
        Arena([Variable(1.0, name="b"), Variable(1.0, name="b")])
    with pytest.raises(ValueError, match="at least one variable"):
        Arena([])


def test_arena_of_a_logical_device_has_its_own_memory():
    first, second = Variable(1.0, name="a"), Variable(1.0, name="a", device=Device("cpu", 1))
    Arena([first])
    Arena([second])
    first.assign(2.0)
    assert (float(second), str(second.device)) == (1.0, "cpu:1")


def test_slices_deduplicate_by_summing_rows():
    slices = IndexedSlices([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [2, 0, 2], (3, 2))
    unique = slices.deduplicated()
    assert unique.indices.tolist() == [0, 2]
    assert unique.values.tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert slices.to_dense().tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]


def test_slices_without_repeats_come_sorted_and_empty_ones_are_legal():
    unique = IndexedSlices([[1.0], [2.0]], [1, 0], (2, 1)).deduplicated()
    assert (unique.indices.tolist(), unique.values.tolist()) == ([0, 1], [[2.0], [1.0]])
    empty = IndexedSlices(np.zeros((0, 2)), np.zeros(0, np.int64), (3, 2))
    assert empty.to_dense().tolist() == [[0, 0]] * 3
    assert len(empty.deduplicated().indices) == 0


@pytest.mark.parametrize(
    ("values", "indices", "shape", "message"),
    [
        ([[1.0]], [0, 1], (3, 1), "2 indices"),
        ([[1.0]], [0.5], (3, 1), "vector of integers"),
        ([[1.0, 2.0]], [0], (3, 1), "don't fit dense_shape"),
        ([[1.0]], [3], (3, 1), "from 3 to 3"),
        ([[1.0]], [-1], (3, 1), "from -1 to -1"),
    ],
)
def test_slices_that_do_not_fit_are_refused(values, indices, shape, message):
    with pytest.raises(ValueError, match=message):
        IndexedSlices(values, indices, shape)


def test_slices_without_a_shape_cannot_become_dense():
    with pytest.raises(ValueError, match="without dense_shape"):
        IndexedSlices([[1.0]], [0]).to_dense()
