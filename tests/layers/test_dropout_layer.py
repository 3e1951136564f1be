"""What keys the random numbers of dropout: seed, layer, step, example, place; not the rank."""

import numpy as np
import pytest

from distopt import layers, scopes
from distopt.scopes import Graph

_X = np.ones((16, 40), "f4")


def _drop(graph, x=_X, step=0, first_example=0, name="drop", **options):
    with graph.as_default(), graph.step(step, first_example):
        return layers.dropout(x, 0.5, training=True, name=name, **options).numpy()


def _agreement(a, b):
    """Independent choices agree half of the time; 640 of them."""
    return np.mean((a == 0) == (b == 0))


def test_outside_of_training_it_returns_its_input():
    np.testing.assert_array_equal(layers.dropout(_X).numpy(), _X)
    np.testing.assert_array_equal(layers.Dropout(0.9)(_X).numpy(), _X)
    np.testing.assert_array_equal(layers.dropout(_X, 0.0, training=True).numpy(), _X)


def test_the_same_step_gives_the_same_choice_and_another_step_another(graph):
    first = _drop(graph, step=3)
    np.testing.assert_array_equal(_drop(graph, step=3), first)
    assert _agreement(_drop(graph, step=4), first) == pytest.approx(0.5, abs=0.1)


def test_steps_that_are_not_numbered_differ(graph):
    choices = []
    for _ in range(2):
        with graph.step():
            choices.append(layers.dropout(_X, 0.5, training=True, name="drop").numpy())
    assert _agreement(*choices) == pytest.approx(0.5, abs=0.1)


def test_layers_and_seeds_differ(graph):
    first = _drop(graph)
    assert _agreement(_drop(graph, name="other"), first) == pytest.approx(0.5, abs=0.1)
    assert _agreement(_drop(Graph(seed=2)), first) == pytest.approx(0.5, abs=0.1)
    assert _agreement(_drop(graph, seed=2), first) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(_drop(Graph(seed=1)), first)  # the fixture's seed
    np.testing.assert_array_equal(_drop(Graph(seed=7), seed=2), _drop(graph, seed=2))


def test_a_layer_called_twice_in_a_step_draws_twice_and_alike_in_every_run(graph):
    layer = layers.Dropout(0.5, name="drop")
    runs = []
    for _ in range(2):
        with graph.step(5):
            runs.append([layer(_X, training=True).numpy() for _ in range(2)])
    assert _agreement(*runs[0]) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(runs[0], runs[1])


def test_the_object_and_the_function_of_one_name_choose_alike(graph):
    layer = layers.Dropout(0.5, name="drop")
    with graph.step(5):
        found = layer(_X, training=True).numpy()
    with Graph(seed=1).as_default():
        np.testing.assert_array_equal(_drop(scopes.get_default_graph(), step=5), found)


@pytest.mark.parametrize("cuts", [[4], [1, 2, 15], [0]])
def test_replicas_that_share_a_batch_choose_what_one_would(graph, cuts):
    whole = _drop(graph, step=2)
    starts = [0, *cuts]
    parts = [
        _drop(Graph(seed=1), part, step=2, first_example=start)
        for part, start in zip(np.split(_X, cuts), starts, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_outside_of_steps_every_call_draws_anew():
    first, second = (layers.dropout(_X, 0.5, training=True, name="drop").numpy() for _ in range(2))
    assert _agreement(first, second) == pytest.approx(0.5, abs=0.1)


def test_noise_shape_and_a_wrong_rate(graph):
    images = np.ones((4, 3, 3, 8), "f4")
    found = _drop(graph, images, noise_shape=(None, 1, 1, None))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1, :1], images.shape))
    with pytest.raises(ValueError, match=r"rate must be a number in the range \[0, 1\), got 1.0"):
        layers.dropout(_X, 1.0)
