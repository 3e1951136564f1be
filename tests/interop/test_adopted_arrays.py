"""Arrays of other libraries come in by each protocol, without a copy where memory allows."""

import sys
import types

import foreign_arrays
import ml_dtypes
import numpy as np
import pytest

from distopt import losses, ops
from distopt.aggregators import AllReduce, Ticket
from distopt.backend import Device, adopted, asnumpy
from distopt.errors import BackendError
from distopt.optimizers import SGD, Adam
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable, dense_gradient


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("kind", foreign_arrays.HOST)
@pytest.mark.parametrize(
    "values",
    [np.arange(6, dtype="f4").reshape(2, 3), np.arange(12.0)[::2], np.array(3.0), np.zeros((0, 4), "i8")],
    ids=["dense", "strided", "0-d", "empty"],
)
def test_host_memory_is_shared(kind, values):
    array = adopted(kind(values))
    assert type(array) is np.ndarray
    assert (array.shape, array.dtype) == (values.shape, values.dtype)
    assert array.strides == values.strides or not values.size
    assert address(array) == address(values)
    np.testing.assert_array_equal(array, values)


def test_what_is_no_array_of_another_library_stays_itself():
    for value in (1.5, [1.0], None, "text", np.float32(2), np.ones(2), ml_dtypes.bfloat16(1), Variable(1.0)):
        assert adopted(value) is value


def test_a_gradient_of_the_variables_dtype_is_not_copied():
    values = np.ones((2, 3), "f4")
    variable = Variable(np.zeros((2, 3), "f4"))
    assert address(dense_gradient(foreign_arrays.SpeaksDlpack(values), variable)) == address(values)
    seen = []
    optimizer = SGD(1.0, gradient_aggregator=lambda pairs: seen.extend(pairs) or pairs)
    optimizer.apply_gradients([(foreign_arrays.SpeaksDlpack(values), variable)])
    assert address(seen[0][0]) == address(values)
    assert (variable.numpy() == -1).all()


def test_what_is_watched_by_another_tape_is_detached():
    np.testing.assert_array_equal(adopted(foreign_arrays.NeedsDetaching([1.0, 2.0])), [1.0, 2.0])


class _FakeCupy(types.ModuleType):
    """CuPy as far as it is asked to take in memory."""

    def __init__(self):
        super().__init__("cupy")
        self.taken = []

    def from_dlpack(self, value):
        self.taken.append(("dlpack", value, value.__dlpack__(stream=7)))
        return "a CuPy array"

    def asarray(self, value):
        self.taken.append(("interface", value))
        return "a CuPy array"


def test_memory_of_a_gpu_goes_to_cupy_with_its_stream(monkeypatch):
    cupy = _FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    on_gpu, by_interface = foreign_arrays.OnGpuCopies(1), foreign_arrays.HasCudaInterface()
    assert adopted(on_gpu) == "a CuPy array"
    assert adopted(by_interface) == "a CuPy array"
    assert cupy.taken == [("dlpack", on_gpu, "capsule"), ("interface", by_interface)]
    assert on_gpu.streams == [{"stream": 7}]


def test_without_cupy_a_copy_is_taken_where_the_library_makes_one_and_else_cupy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    np.testing.assert_array_equal(adopted(foreign_arrays.OnGpuCopies()), [0.0, 1.0, 2.0])
    for missing in (foreign_arrays.OnGpu(), foreign_arrays.HasCudaInterface()):
        with pytest.raises(BackendError, match="CuPy can't be imported"):
            adopted(missing)


def test_memory_that_cannot_be_read_is_refused_with_the_type():
    class Elsewhere:
        def __dlpack__(self, **options):
            raise BufferError("it lies on the moon.")

    with pytest.raises(
        TypeError, match=r"of this .*Elsewhere can't be read as an array: it lies on the moon\. "
    ):
        adopted(Elsewhere())
    with pytest.raises(TypeError, match=r"Gradient must be convertible.*'w'.*Elsewhere.*moon"):
        SGD(1.0).apply_gradients([(Elsewhere(), Variable(1.0, name="w"))])


@pytest.mark.parametrize("kind", foreign_arrays.HOST)
def test_values_may_be_of_another_library_wherever_arrays_may(kind):
    given = kind(np.array([1.0, 2.0], "f4"))
    variable = Variable(given, name="w")
    assert variable.dtype == np.float32
    variable.assign_add(given)
    np.testing.assert_array_equal(variable.numpy(), [2.0, 4.0])
    variable.assign_sub(given)
    variable.assign(given)
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    np.testing.assert_array_equal((variable * given).numpy(), [1.0, 4.0])
    np.testing.assert_array_equal(ops.add(given, given).numpy(), [2.0, 4.0])
    np.testing.assert_array_equal(asnumpy(given), [1.0, 2.0])
    np.testing.assert_array_equal(Device("cpu", 1).asarray(given, np.float64), [1.0, 2.0])
    rows, zeros = kind(np.array([[1.0, 2.0]], "f4")), np.zeros((1, 2), "f4")
    assert losses.mean_squared_error(rows, zeros).numpy().tolist() == [2.5]
    assert losses.mean_squared_error(zeros, rows).numpy().tolist() == [2.5]
    slices = IndexedSlices(given, kind(np.array([1, 1])), (3,))
    np.testing.assert_array_equal(slices.to_dense(), [0.0, 3.0, 0.0])
    logits, labels = np.zeros((2, 4), "f4"), kind(np.array([1, 3]))
    loss = ops.sparse_softmax_cross_entropy(logits, labels=labels)
    assert float(loss) == pytest.approx(2 * np.log(4))


def test_a_variable_made_of_an_array_has_memory_of_its_own():
    values = np.ones(3, "f4")
    Variable(foreign_arrays.SpeaksDlpack(values)).assign_add(1.0)
    assert (values == 1).all()


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("kind", foreign_arrays.HOST)
def test_gradients_are_averaged_over_ranks_and_the_callers_memory_stays_as_it_is(kind, arena):
    def rank(communicator):
        variables = [Variable(np.zeros(shape, "f4"), name=str(shape)) for shape in ((2, 3), (), (0, 2), (5,))]
        if arena:
            Arena(variables)
        given = [np.full(v.shape, communicator.rank + 1.0) for v in variables]
        given[3] = np.arange(10.0)[::2]
        before = [array.copy() for array in given]
        optimizer = Adam(0.1, clipnorm=100.0, gradient_aggregator=AllReduce(communicator))
        pairs = [(kind(array), v) for array, v in zip(given, variables, strict=True)]
        averaged = optimizer.gradient_aggregator.aggregate(pairs, examples=2)
        optimizer.apply_gradients(pairs, examples=2)
        for array, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, copy)
        return [np.array(gradient) for gradient, _ in averaged]

    for averaged in world(3, rank):
        for gradient, expected in zip(averaged, (1.0, 1.0, 1.0, np.arange(0, 10, 2) / 2), strict=True):
            np.testing.assert_allclose(gradient, np.broadcast_to(expected, gradient.shape), rtol=1e-6)


def test_aggregate_is_reduce_with_a_number_of_examples():
    def rank(communicator):
        w = Variable([0.0, 0.0], name="w")
        aggregator = AllReduce(communicator)
        own = communicator.rank + 1
        [(first, _)] = aggregator.aggregate([(np.full(2, 3.0 * own), w)], examples=own)
        [(second, _)] = aggregator.reduce([(np.full(2, 3.0 * own), w)], Ticket(examples=own))
        with pytest.raises(ValueError, match="examples"):
            aggregator.aggregate([(np.ones(2), w)])
        return first.tolist(), second.tolist(), AllReduce(communicator, "sum").aggregate([(np.ones(2), w)])

    for first, second, [(summed, _)] in world(2, rank):
        assert first == second == [3.0, 3.0]
        assert summed.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (foreign_arrays.SpeaksDlpack(np.ones((3, 2))), ValueError, r"'w' has shape \(3, 2\).* has \(2, 3\)"),
        (foreign_arrays.HasArray(np.ones((2, 3), "c8")), TypeError, "Gradient must be convertible.*'w'"),
        (foreign_arrays.HasInterface(np.ones(())), ValueError, r"'w' has shape \(\)"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_name(gradient, error, message):
    w = Variable(np.zeros((2, 3), "f4"), name="w")
    with pytest.raises(error, match=message):
        SGD(1.0).apply_gradients([(gradient, w)])
    with pytest.raises(error, match=message):
        world(1, lambda communicator: AllReduce(communicator, "sum").aggregate([(gradient, w)]))
