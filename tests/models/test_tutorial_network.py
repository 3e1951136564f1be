"""The tutorial's network against the facts of its source (layer by layer) and a float64 re-computation."""

import numpy as np
import pytest

from distopt.backend import Device
from distopt.models import TASKS, cifar10, digits
from distopt.replica import Batch, Replica

_SHAPES = {
    "conv1/weights": (5, 5, 3, 64),
    "conv1/biases": (64,),
    "conv2/weights": (5, 5, 64, 64),
    "conv2/biases": (64,),
    "local3/weights": (2304, 384),
    "local3/biases": (384,),
    "local4/weights": (384, 192),
    "local4/biases": (192,),
    "softmax_linear/weights": (192, 10),
    "softmax_linear/biases": (10,),
}


@pytest.fixture(scope="module")
def replica():
    return Replica(cifar10.network, (24, 24, 3), Device(), seed=0)


def test_it_has_the_tutorials_1068298_parameters(replica):
    assert {v.name: v.shape for v in replica.variables} == _SHAPES
    assert sum(v.size for v in replica.variables) == 1_068_298


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("conv1", 0.05), ("conv2", 0.05), ("local3", 0.04), ("local4", 0.04), ("softmax_linear", 1 / 192)],
)
def test_weights_start_truncated_normal_at_two_sigma(replica, name, sigma):
    (weights,) = (v.numpy() for v in replica.variables if v.name == f"{name}/weights")
    assert np.abs(weights).max() <= 2 * sigma * (1 + 1e-6)
    assert weights.std() == pytest.approx(0.8796 * sigma, rel=0.05)  # what is left of sigma after the cut


def test_biases_start_as_in_the_tutorial(replica):
    biases = {v.name.partition("/")[0]: v.numpy() for v in replica.variables if v.name.endswith("biases")}
    for name, value in {"conv1": 0, "conv2": 0.1, "local3": 0.1, "local4": 0.1, "softmax_linear": 0}.items():
        assert (biases[name] == np.float32(value)).all()


def test_weight_decay_is_on_the_two_local_layers(replica):
    values = {v.name: v.numpy().astype("f8") for v in replica.variables}
    expected = sum(0.004 * 0.5 * (values[f"{n}/weights"] ** 2).sum() for n in ("local3", "local4"))
    assert replica.regularization() == pytest.approx(expected, rel=1e-5)


def _reference(values, images):
    """The forward pass written naively in float64, from the tutorial's table of layers."""

    def convolve(x, w, b):
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        out = np.zeros((*x.shape[:3], w.shape[3])) + b
        for i in range(5):
            for j in range(5):
                out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ w[i, j]
        return np.maximum(out, 0)

    def pool(x):
        padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
        size = x.shape[1] // 2
        taps = [padded[:, i : i + 2 * size : 2, j : j + 2 * size : 2] for i in range(3) for j in range(3)]
        return np.max(taps, axis=0)

    def normalize(x):
        squares = np.pad(x * x, ((0, 0),) * 3 + ((4, 4),))
        total = sum(squares[..., k : k + x.shape[3]] for k in range(9))
        return x / (1 + 0.001 / 9 * total) ** 0.75

    x = normalize(pool(convolve(images, values["conv1/weights"], values["conv1/biases"])))
    x = pool(normalize(convolve(x, values["conv2/weights"], values["conv2/biases"])))
    x = x.reshape(len(x), -1)
    for name in ("local3", "local4"):
        x = np.maximum(x @ values[f"{name}/weights"] + values[f"{name}/biases"], 0)
    return x @ values["softmax_linear/weights"] + values["softmax_linear/biases"]


def test_loss_agrees_with_a_naive_float64_network(replica):
    random = np.random.default_rng(0)
    images = random.standard_normal((5, 24, 24, 3)).astype("f4")
    labels = np.array([0, 9, 3, 3, 1])
    values = {v.name: v.numpy().astype("f8") for v in replica.variables}
    logits = _reference(values, images.astype("f8"))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(5), labels]).sum()
    ticket = replica.evaluate(Batch(images, labels))
    assert ticket.loss == pytest.approx(expected, rel=1e-5)
    assert ticket.examples == 5
    assert ticket.correct == (logits.argmax(1) == labels).sum()


def test_an_empty_batch_gives_zero_gradients(replica):
    tape, loss, ticket = replica.forward(Batch(np.zeros((0, 24, 24, 3), "f4"), np.zeros(0, np.int64)))
    assert (float(loss), ticket.examples) == (0.0, 0)
    for gradient, _ in replica.gradients(tape, loss):
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("global_batch", [128, 256, 384])
def test_the_rate_decays_by_examples_seen_whatever_the_batch(global_batch):
    optimizer = TASKS["cifar10"].optimizer(None, 50_000, global_batch)
    steps = 350 * 50_000 / global_batch
    for before, after in ((steps - 1, 0.1), (steps + 1, 0.01), (2 * steps + 1, 0.001)):
        optimizer.iterations.assign(int(before))
        assert optimizer.hyperparameter("learning_rate") == pytest.approx(after)


def test_the_network_without_normalization_has_the_same_parameters():
    other = Replica(cifar10.network_without_normalization, (24, 24, 3), Device(), seed=0)
    assert {v.name: v.shape for v in other.variables} == _SHAPES


def test_replicas_start_from_the_same_bits_whatever_the_device():
    first = Replica(digits.network, (8, 8, 1), Device("cpu", 0), seed=3)
    second = Replica(digits.network, (8, 8, 1), Device("cpu", 1), seed=3)
    other = Replica(digits.network, (8, 8, 1), Device("cpu", 0), seed=4)
    for a, b in zip(first.variables, second.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert any(
        not np.array_equal(a.numpy(), b.numpy())
        for a, b in zip(first.variables, other.variables, strict=True)
    )
