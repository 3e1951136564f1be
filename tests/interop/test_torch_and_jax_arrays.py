"""The same with real PyTorch tensors and JAX arrays."""

import ml_dtypes
import numpy as np
import pytest

from distopt.aggregators import AllReduce
from distopt.backend import adopted
from distopt.optimizers import SGD
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable, dense_gradient, value_of


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'distopt[interop]'")


@pytest.fixture
def jnp():
    return pytest.importorskip("jax.numpy", reason="JAX is not installed; pip install 'distopt[interop]'")


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_a_tensors_memory_is_shared(torch, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    for view in (
        tensor,
        tensor.t(),
        tensor[:, 1:],
        tensor[1, 1],
        tensor[:0],
        torch.nn.Parameter(tensor, False),
    ):
        array = adopted(view)
        assert str(array.dtype) == dtype
        assert array.shape == tuple(view.shape)
        if view.numel():
            assert address(array) == view.data_ptr()
        assert array.astype(float).tolist() == view.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_a_jax_arrays_memory_is_shared(jnp, dtype):
    given = jnp.arange(6).reshape(2, 3).astype(dtype)
    array = adopted(given)
    assert str(array.dtype) == dtype
    assert address(array) == given.unsafe_buffer_pointer()
    assert not array.flags.writeable
    assert array.astype(float).tolist() == given.tolist()


def test_bfloat16_is_read_through_dlpack_and_keeps_its_owner_alive(torch):
    array = adopted(torch.full((1000,), 1.5, dtype=torch.bfloat16))
    torch.full((1000,), 2.5, dtype=torch.bfloat16)  # would take the memory if it were free
    assert array.dtype == ml_dtypes.bfloat16
    assert (array.astype(np.float32) == 1.5).all()


def test_a_gradient_and_a_parameter_that_require_gradients_are_read(torch):
    parameter = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    (parameter**3).sum().backward(create_graph=False)
    variable = Variable(parameter, name="p")
    gradient = dense_gradient(parameter.grad, variable)
    assert address(gradient) == parameter.grad.data_ptr()
    [twice] = torch.autograd.grad((parameter**3).sum(), parameter, create_graph=True)
    assert twice.requires_grad
    np.testing.assert_array_equal(dense_gradient(twice, variable), [12.0, 27.0])
    SGD(1.0).apply_gradients([(twice, variable)])
    np.testing.assert_array_equal(variable.numpy(), [-10.0, -24.0])
    assert parameter.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("arena", [False, True])
def test_bfloat16_gradients_of_float32_variables_are_averaged(torch, jnp, arena):
    def rank(communicator):
        variables = [Variable(np.zeros(2, "f4"), name=name) for name in ("torch", "jax")]
        if arena:
            Arena(variables)
        own = [2.0 + communicator.rank, 4.0]
        given = [torch.tensor(own, dtype=torch.bfloat16), jnp.array(own, jnp.bfloat16)]
        pairs = list(zip(given, variables, strict=True))
        averaged = AllReduce(communicator).aggregate(pairs, examples=1)
        assert given[0].tolist() == given[1].tolist() == own
        return [gradient.tolist() for gradient, _ in averaged]

    assert world(3, rank) == [[[3.0, 4.0]] * 2] * 3


def test_a_sparse_embeddings_gradient_becomes_slices(torch):
    def rank(communicator):
        table = torch.nn.Embedding(4, 2, sparse=True)
        variable = Variable(np.zeros((4, 2), "f4"), name="table")
        table(torch.tensor([communicator.rank, 3, 3])).sum().backward()
        assert isinstance(value_of(table.weight.grad), IndexedSlices)
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
        optimizer.apply_gradients([(table.weight.grad, variable)])
        return variable.numpy()[:, 0].tolist()

    assert world(2, rank) == [[-1.0, -1.0, 0.0, -4.0]] * 2


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
def test_tensors_without_plain_memory_are_refused(torch):
    w = Variable(np.zeros((2, 2), "f4"), name="w")
    for tensor in (
        torch.ones(2, 2, device="meta"),
        torch.ones(2, 2).to_sparse_csr(),
        torch.ones(2, 2).to(torch.float8_e4m3fn),
        torch.ones(2, 2).to_sparse(),
    ):
        with pytest.raises(TypeError, match=r"can't be read as an array|2 sparse axes is no set of rows"):
            value_of(tensor)
        with pytest.raises(TypeError):
            SGD(1.0).apply_gradients([(tensor, w)])
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\)"):
        SGD(1.0).apply_gradients([(torch.ones(2), w)])
    with pytest.raises(TypeError, match="Gradient must be convertible"):
        SGD(1.0).apply_gradients([(torch.ones(2, 2, dtype=torch.complex64), w)])
    assert not w.numpy().any()


def test_integer_gradients_are_converted(torch, jnp):
    w = Variable(np.zeros(2, "f4"), name="w")
    SGD(1.0).apply_gradients([(torch.tensor([1, 2]), w)])
    SGD(1.0).apply_gradients([(jnp.array([1, 2]), w)])
    assert w.numpy().tolist() == [-2.0, -4.0]
