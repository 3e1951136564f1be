import numpy as np
import pytest

from distopt import scopes
from distopt.scopes import Graph, GraphKeys
from distopt.variables import Variable


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


def test_it_is_an_int64_scalar_that_is_not_trained():
    step = scopes.create_global_step()
    assert (step.name, step.dtype, step.shape, int(step.numpy())) == ("global_step", np.int64, (), 0)
    assert scopes.global_variables() == [step]
    assert scopes.trainable_variables() == []
    assert scopes.get_collection(GraphKeys.GLOBAL_STEP) == [step]


def test_it_is_made_once():
    assert scopes.get_global_step() is None
    step = scopes.get_or_create_global_step()
    assert scopes.get_or_create_global_step() is step
    assert scopes.get_global_step() is step
    with pytest.raises(ValueError, match='"global_step" already exists'):
        scopes.create_global_step()


def test_it_is_found_by_its_name_too():
    made = scopes.get_variable("global_step", [], np.int32, trainable=False)
    assert scopes.get_global_step() is made


def test_it_belongs_to_a_graph(graph):
    other = Graph()
    step = scopes.get_or_create_global_step(other)
    assert scopes.get_global_step() is None
    assert other.get_collection(GraphKeys.GLOBAL_STEP) == [step]


def test_a_step_function_gets_the_same_one_every_time(graph):
    for number in range(3):
        with graph.step():
            step = scopes.get_or_create_global_step()
            assert int(step.numpy()) == number
            step.assign_add(1)
    assert scopes.global_variables() == [step]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Variable(0.0), "does not have integer type: float32"),
        (Variable([0, 0]), r"is not scalar: its shape is \(2,\)"),
        (0, "is not a Variable: 0"),
    ],
)
def test_what_cannot_count_is_refused(wrong, message):
    with pytest.raises(TypeError, match=f'Existing "global_step" {message}'):
        scopes.assert_global_step(wrong)
    scopes.add_to_collection(GraphKeys.GLOBAL_STEP, wrong)
    for function in (scopes.get_global_step, scopes.get_or_create_global_step, scopes.create_global_step):
        with pytest.raises(TypeError, match=message):
            function()


def test_several_in_the_collection_are_refused():
    scopes.create_global_step()
    scopes.add_to_collection(GraphKeys.GLOBAL_STEP, Variable(0))
    with pytest.raises(ValueError, match="Multiple tensors in global_step collection"):
        scopes.get_global_step()
