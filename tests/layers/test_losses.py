import numpy as np
import pytest

from distopt import initializers, layers, ops, regularizers, scopes
from distopt.scopes import GraphKeys, get_variable
from distopt.tape import GradientTape
from distopt.variables import Variable


def _weights(name="w", value=(1.0, -2.0), **options):
    return get_variable(name, [len(value)], initializer=initializers.Constant(list(value)), **options)


def test_add_loss_adds_to_losses_or_another_collection_or_none():
    losses = [ops.square(float(n), name=f"loss{n}") for n in range(3)]
    layers.add_loss(losses[0])
    layers.add_loss(losses[1], "own")
    layers.add_loss(losses[2], None)
    assert layers.get_losses() == [losses[0]]
    assert layers.get_losses(loss_collection="own") == [losses[1]]


def test_get_losses_takes_a_scope():
    for number in (1, 10):
        with scopes.name_scope(f"tower_{number}"):
            layers.add_loss(ops.square(float(number)))
    assert [float(loss) for loss in layers.get_losses("tower_1/")] == [1.0]
    assert [float(loss) for loss in layers.get_losses("tower_1")] == [1.0, 100.0]


def test_the_regularization_loss_is_the_sum_at_the_present_values_and_is_differentiable():
    weights = _weights(regularizer=regularizers.l2_regularizer(0.1))
    _weights("v", (3.0,), regularizer=regularizers.l1_regularizer(2.0))
    assert float(layers.get_regularization_loss()) == pytest.approx(0.25 + 6.0)
    weights.assign([2.0, 0.0])
    with GradientTape() as tape:
        loss = layers.get_regularization_loss()
    assert loss.name == "total_regularization_loss_1"
    assert float(loss) == pytest.approx(0.2 + 6.0)
    np.testing.assert_allclose(tape.gradient(loss, weights), [0.2, 0.0])
    assert float(layers.get_regularization_loss("v")) == pytest.approx(6.0)


def test_without_regularizers_the_regularization_loss_is_zero():
    assert float(layers.get_regularization_loss()) == 0.0
    assert float(layers.get_regularization_loss("nothing")) == 0.0


def test_the_total_loss_is_the_losses_and_the_regularization():
    _weights(regularizer=regularizers.l2_regularizer(0.1))
    layers.add_loss(ops.square(2.0))
    layers.add_loss(ops.square(3.0))
    total = layers.get_total_loss()
    assert float(total) == pytest.approx(13.25)
    assert total.name == "total_loss"
    assert float(layers.get_total_loss(add_regularization_losses=False)) == 13.0


def test_regularization_alone_is_a_total_loss_and_nothing_is_an_error():
    with pytest.raises(
        ValueError, match="inputs must be a list of at least one Tensor: there are no losses in this"
    ):
        layers.get_total_loss()
    _weights(regularizer=regularizers.l2_regularizer(0.1))
    assert float(layers.get_total_loss()) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="there are no losses in this step"):
        layers.get_total_loss(add_regularization_losses=False)
    with pytest.raises(ValueError, match="there are no losses in scope 'tower_1/'"):
        layers.get_total_loss(scope="tower_1/")


def test_apply_regularization_returns_the_sum_and_adds_it_for_this_step(graph):
    weights = [_weights(), Variable([3.0])]
    for _ in range(2):
        with graph.step(), GradientTape() as tape:
            penalty = layers.apply_regularization(regularizers.l2_regularizer(0.1), weights)
            assert scopes.get_collection(GraphKeys.REGULARIZATION_LOSSES) == [penalty]
            assert float(layers.get_regularization_loss()) == pytest.approx(0.25 + 0.45)
        assert float(penalty) == pytest.approx(0.25 + 0.45)
        assert penalty.name == "apply_regularization"
        np.testing.assert_allclose(tape.gradient(penalty, weights[0]), [0.1, -0.2])
        assert scopes.get_regularization_losses() == []  # records only


def test_apply_regularization_takes_the_weights_collection():
    with pytest.raises(ValueError, match="No weights to regularize"):
        layers.apply_regularization(regularizers.l2_regularizer(0.1))
    with pytest.raises(ValueError, match="No weights to regularize"):
        layers.apply_regularization(regularizers.l2_regularizer(0.1), [])
    scopes.add_to_collection(GraphKeys.WEIGHTS, _weights())
    assert float(layers.apply_regularization(regularizers.l1_regularizer(0.5))) == pytest.approx(1.5)


def test_apply_regularization_takes_functions_and_counts_none_as_zero():
    weights = [_weights(), _weights("v", (3.0,))]
    squares = layers.apply_regularization(lambda w: ops.l2_loss(w) * 2.0, weights)
    assert float(squares) == pytest.approx(5.0 + 9.0)
    partly = layers.apply_regularization(lambda w: None if w is weights[0] else 2.0, weights)
    assert float(partly) == 2.0
    assert float(layers.apply_regularization(regularizers.l2_regularizer(0.0), weights)) == 0.0
    with pytest.raises(ValueError, match="must return a scalar Tensor instead of a Tensor with rank 1"):
        layers.apply_regularization(ops.square, weights)


def test_losses_do_not_pile_up_over_steps(graph):
    weights = _weights(regularizer=regularizers.l2_regularizer(0.1))
    for step in range(3):
        with graph.step(), GradientTape() as tape:
            layers.add_loss(ops.reduce_sum(weights * float(step)))
            total = layers.get_total_loss()
        assert float(total) == pytest.approx(0.25 - step)
        np.testing.assert_allclose(tape.gradient(total, weights), [0.1 + step, -0.2 + step], rtol=1e-6)
