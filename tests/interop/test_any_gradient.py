"""docs/any-gradient.md: four ways to the same updates, and PyTorch models trained in place."""

import importlib.util

import gradient_page
import numpy as np
import pytest

from distopt.testing import world

_WAYS = ["by hand", "tape", "torch", "jax"]


@pytest.fixture(scope="module")
def expected():
    """Five steps of Adam on the whole batch in float64, in plain NumPy that knows nothing of distopt."""
    page = gradient_page.program("shared", "by hand")
    values = [value.astype(np.float64) for value in page["initial_values"]().values()]
    start = [value.copy() for value in values]
    m, v = ([np.zeros_like(value) for value in values] for _ in range(2))
    for step in range(5):
        x, y = (part.astype(np.float64) for part in page["batch"](step))
        rate = 0.01 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        for i, gradient in enumerate(page["gradients"](values, x, y)):
            m[i] += 0.1 * (gradient / len(x) - m[i])
            v[i] += 0.001 * ((gradient / len(x)) ** 2 - v[i])
        for i, value in enumerate(values):
            value -= rate * m[i] / (np.sqrt(v[i]) + 1e-7)
    return [new - old for new, old in zip(values, start, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])  # of 12, two have no example
@pytest.mark.parametrize("way", _WAYS)
def test_all_ways_make_the_same_updates_on_any_number_of_ranks(expected, way, ranks):
    found = world(ranks, lambda communicator: gradient_page.updates(communicator, way))
    for update in found:
        for ours, theirs in zip(update, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_every_block_of_the_page_is_run_here():
    assert set(gradient_page.BLOCKS) == {"shared", *_WAYS, "torch model", "torch optimizer"}


@pytest.mark.parametrize("ranks", [1, 3, 12])
def test_a_torch_model_is_trained_in_place(expected, ranks):
    page = gradient_page.program("shared", "torch", "torch model")

    def rank(communicator):
        model = gradient_page.torch_model(page)
        before = [p.detach().clone() for p in model.parameters()]
        page["train_model"](model, communicator)
        changed = [(p.detach() - b).numpy() for p, b in zip(model.parameters(), before, strict=True)]
        return changed, float(model(page["torch"].ones(1, 4)).detach())

    w1, b1, w2, b2 = expected
    outputs = set()
    for update, output in world(ranks, rank):
        outputs.add(output)
        for ours, theirs in zip(update, (w1.T, b1, w2.T, b2), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert len(outputs) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_torch_optimizer_steps_by_the_mean_over_the_global_batch(ranks):
    page = gradient_page.program("shared", "torch", "torch optimizer")
    torch = page["torch"]
    alone = gradient_page.torch_model(page)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    for step in range(5):
        x, y = (torch.from_numpy(part) for part in page["batch"](step))
        optimizer.zero_grad()
        ((alone(x) - y) ** 2).sum(dim=1).mean().backward()
        optimizer.step()

    def rank(communicator):
        model = gradient_page.torch_model(page)
        page["train_by_torch"](model, communicator)
        return [p.detach().numpy() for p in model.parameters()]

    for values in world(ranks, rank):
        for ours, theirs in zip(values, alone.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_a_torch_models_parameters_and_gradients_are_the_arenas_memory():
    page = gradient_page.program("shared", "torch", "torch model")
    model = gradient_page.torch_model(page)

    def rank(communicator):
        optimizer = page["train_model"](model, communicator, steps=2)
        return optimizer, [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()]

    _, before = world(1, rank)[0]
    grown = sorted(pointer for pointer, _ in before)
    assert max(grown) - min(grown) == 3 * 256  # four segments of up to 256 bytes each
    gradients = sorted(pointer for _, pointer in before)
    assert max(gradients) - min(gradients) == 3 * 256
