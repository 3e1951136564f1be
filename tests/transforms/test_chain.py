import numpy as np
import pytest

from distopt import transforms
from distopt.optimizers import SGD
from distopt.transforms import Chain, GlobalClipNorm, GradientMultipliers, GradientNoise
from distopt.variables import Variable


def scale(factor):
    return lambda pairs: [(gradient * factor, variable) for gradient, variable in pairs]


def add(term):
    return lambda pairs: [(gradient + term, variable) for gradient, variable in pairs]


def test_a_chain_runs_from_the_first_to_the_last():
    chain = Chain([add(1.0), scale(10.0), add(2.0)])
    ((result, variable),) = chain([(np.array([3.0]), "v")])
    assert result.tolist() == [42.0]
    assert variable == "v"


def test_chains_nest_and_take_generators():
    chain = Chain([Chain([add(1.0), scale(2.0)]), lambda pairs: (pair for pair in pairs)])
    assert chain(pair for pair in [(np.array([3.0]), "v")]) == [(np.array([8.0]), "v")]


def test_an_empty_chain_changes_nothing():
    gradient = np.ones(2)
    assert Chain([])([(gradient, "v")])[0][0] is gradient


def test_the_state_of_a_chain_is_that_of_its_parts():
    noise, adaptive = GradientNoise(1.0), transforms.AdaptiveClipping()
    chain = Chain([noise, scale(1.0), Chain([adaptive])])
    assert chain.variables() == [*noise.variables(), *adaptive.variables()]


def test_the_order_of_optimize_loss_as_a_chain():
    variable = Variable(np.array([10.0], np.float32), name="test")
    # TensorFlow recorded that a multiplied gradient is clipped: 5 * 7 to 10.
    chain = Chain([GradientNoise(0.0), GradientMultipliers({"test:0": 7.0}), GlobalClipNorm(10.0)])
    ((result, _),) = chain([(np.array([5.0], np.float32), variable)])
    assert result.tolist() == [10.0]


def test_an_optimizers_own_clips_come_before_its_transformers():
    variable = Variable(np.array([0.0], np.float32), name="v")
    optimizer = SGD(1.0, clipvalue=2.0, gradient_transformers=[Chain([scale(10.0)])])
    optimizer.apply_gradients([(np.array([5.0], np.float32), variable)])
    assert variable.numpy().tolist() == [-20.0]


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match=r"callable, pairs -> pairs; got 1\.0"):
        Chain([1.0])


@pytest.mark.parametrize("returned", [None, [np.ones(2)], 3.0])
def test_a_transform_that_returns_no_pairs_is_named(returned):
    def forgetful(pairs):
        return returned

    with pytest.raises(TypeError, match=r"forgetful.* must return a list of"):
        Chain([forgetful])([(np.ones(2), "v")])
