"""Within `Graph.step` a model's code runs again and again as if it built the model for the first time."""

import contextlib

import numpy as np
import pytest

from distopt import ops, regularizers, scopes
from distopt.scopes import AUTO_REUSE, Graph, GraphKeys, get_variable, variable_scope
from distopt.tape import GradientTape
from distopt.variables import Variable


@pytest.fixture(autouse=True)
def graph():
    with Graph(seed=7).as_default() as graph:
        yield graph


def test_get_variable_finds_again_what_the_same_code_made_in_an_earlier_step(graph):
    found = []
    for _ in range(3):
        with graph.step(), variable_scope("conv1"):
            found.append(get_variable("w", [2]))
            found[-1].assign_add(1.0)
    assert found[0] is found[1] is found[2]
    assert found[0].name == "conv1/w"
    assert scopes.trainable_variables() == [found[0]]


def test_rules_of_reuse_hold_within_each_step(graph):
    for _ in range(2):
        with graph.step():
            first = get_variable("w", [1])
            with pytest.raises(ValueError, match="Variable w already exists, disallowed"):
                get_variable("w", [1])
            assert get_variable("w", [1], reuse=True) is first


def test_a_variable_made_outside_of_steps_is_shared_only_with_reuse(graph):
    outside = get_variable("w", [1])
    for _ in range(2):
        with graph.step():
            with pytest.raises(ValueError, match="already exists"):
                get_variable("w", [1])
            assert get_variable("w", [1], reuse=AUTO_REUSE) is outside


def test_outside_of_steps_a_variable_made_in_one_exists(graph):
    with graph.step():
        get_variable("w", [1])
    with pytest.raises(ValueError, match="already exists"):
        get_variable("w", [1])


def test_a_variable_asked_for_with_another_shape_in_a_later_step_is_refused(graph):
    with graph.step():
        get_variable("w", [2])
        scopes.new_variable(np.zeros(2), name="v")
    with graph.step():
        with pytest.raises(ValueError, match=r"specified shape \(3,\) and found shape \(2,\)"):
            get_variable("w", [3])
        with pytest.raises(ValueError, match=r"with shape \(2,\); this one .* of shape \(3,\)"):
            scopes.new_variable(np.zeros(3), name="v")


def test_new_variable_finds_its_variable_of_the_step_before(graph):
    steps = []
    for _ in range(2):
        with graph.step(), scopes.name_scope("n"):
            steps.append([scopes.new_variable(1.0), scopes.new_variable(2.0)])
    assert steps[0] == steps[1]
    assert [v.name for v in steps[0]] == ["n/Variable", "n/Variable_1"]
    assert scopes.global_variables() == steps[0]


def test_losses_are_those_of_this_step(graph):
    weights = Variable([3.0, 4.0])
    for step in range(3):
        with graph.step(), GradientTape() as tape:
            assert scopes.get_collection(GraphKeys.LOSSES) == []
            scopes.add_to_collection(GraphKeys.LOSSES, ops.l2_loss(weights))
            scopes.add_to_collection(GraphKeys.LOSSES, ops.reduce_sum(weights * float(step)))
            total = ops.add_n(scopes.get_collection(GraphKeys.LOSSES), name="total_loss")
        assert total.name == "total_loss"
        assert float(total) == 12.5 + 7.0 * step
        assert tape.gradient(total, weights).tolist() == [3.0 + step, 4.0 + step]
        assert len(scopes.get_collection(GraphKeys.LOSSES)) == 2  # to be looked at until the next step


def test_any_key_and_any_object_passes_but_variables_and_what_was_there_before_stay(graph):
    variable, thing = Variable(0.0, name="v"), object()
    scopes.add_to_collection("own", "before")
    for _ in range(3):
        with graph.step():
            scopes.add_to_collection("own", variable)
            scopes.add_to_collection("own", thing)
            scopes.get_collection_ref("own").append("appended")
            assert scopes.get_collection("own").count("appended") == 1
            assert scopes.get_collection("own").count(thing) == 1
    with graph.step():
        assert scopes.get_collection("own") == ["before", variable]


def test_what_is_added_between_steps_stays(graph):
    with graph.step():
        scopes.add_to_collection("own", 1)
    scopes.add_to_collection("own", 2)
    with graph.step():
        scopes.add_to_collection("own", 2)
        assert scopes.get_collection("own") == [2, 2]
    with graph.step():
        assert scopes.get_collection("own") == [2]


def test_a_reference_to_a_collection_stays_live_over_steps(graph):
    losses = scopes.get_collection_ref(GraphKeys.LOSSES)
    with graph.step():
        scopes.add_to_collection(GraphKeys.LOSSES, 1)
    with graph.step():
        assert losses == []
        scopes.add_to_collection(GraphKeys.LOSSES, 2)
        assert losses == [2]


def test_a_value_taken_out_of_a_collection_is_not_missed(graph):
    with graph.step():
        scopes.add_to_collection("own", 1)
        scopes.get_collection_ref("own").clear()
    with graph.step():
        scopes.add_to_collection("own", 2)
    scopes.get_collection_ref("own").clear()
    with graph.step():
        assert scopes.get_collection("own") == []


def test_records_of_regularizers_made_in_a_step_stay_and_are_made_once(graph):
    for _ in range(3):
        with graph.step():
            get_variable("w", [1], regularizer=regularizers.l2_regularizer(1.0))
            assert [r.name for r in scopes.get_regularization_losses()] == ["w/Regularizer"]


def test_name_scopes_start_anew_in_every_step(graph):
    for _ in range(2):
        with graph.step():
            for number in range(2):
                with scopes.name_scope("tower") as scope:
                    assert scope == ("tower/", "tower_1/")[number]
    with scopes.name_scope("tower") as scope:
        assert scope == "tower/"


def test_default_names_and_reuse_variables_end_with_the_step(graph):
    assert scopes.get_variable_scope().reuse is False
    for _ in range(2):
        with graph.step():
            names = []
            for _ in range(2):
                with variable_scope(None, "d"):
                    names.append(get_variable("w", [1]).name)
            assert names == ["d/w", "d_1/w"]
            scopes.get_variable_scope().reuse_variables()
    assert scopes.get_variable_scope().reuse is False


def test_towers_share_variables_and_get_the_losses_of_their_own_scope(graph):
    def tower(images):
        with variable_scope("layer") as scope:
            weights = get_variable("w", [], initializer=lambda shape, dtype: np.array(3.0, dtype))
            scopes.add_to_collection("losses", ops.multiply(weights, 0.5, name="weight_loss"))
            scopes.add_to_collection("losses", ops.multiply(weights, images, name=scope.name))

    for _ in range(2):
        totals = []
        with graph.step(), variable_scope(scopes.get_variable_scope()):
            for number in range(2):
                with scopes.name_scope(f"tower_{number}") as scope:
                    tower(10.0 ** (number + 1))
                    scopes.get_variable_scope().reuse_variables()
                    losses = scopes.get_collection("losses", scope)
                    totals.append(float(ops.add_n(losses, name="total_loss")))
        assert totals == [31.5, 301.5]
        names = [loss.name for loss in scopes.get_collection("losses")]
        ends = ("weight_loss", "layer")
        assert names == [f"tower_{number}/layer/{end}" for number in range(2) for end in ends]
    assert len(scopes.trainable_variables()) == 1


def test_a_tensor_without_a_name_gets_one_in_its_name_scope(graph):
    with graph.step(), scopes.name_scope("tower_0"):
        tensor = ops.square(2.0)
        assert tensor.name is None
        scopes.add_to_collection(GraphKeys.LOSSES, tensor)
        assert tensor.name == "tower_0/Tensor"
    assert scopes.get_collection(GraphKeys.LOSSES, "tower_0/") == [tensor]


def test_the_name_of_a_result_is_below_the_name_scope_and_numbered():
    with scopes.name_scope("a"):
        assert ops.square(1.0, name="b").name == "a/b"
        assert ops.square(1.0, name="b").name == "a/b_1"
    with pytest.raises(ValueError, match="'a b' is not a valid name"):
        ops.square(1.0, name="a b")


def test_names_are_numbered_around_variables_alike_in_every_step(graph):
    for _ in range(2):
        with graph.step():
            get_variable("w", [1])
            assert ops.square(1.0, name="w").name == "w_1"
            assert scopes.new_variable(1.0, name="w").name == "w_2"


def test_steps_are_numbered(graph):
    numbers = []
    for number in (None, None, 10, None):
        with graph.step(number, first_example=4) as step:
            numbers.append(step.number)
            assert step.first_example == 4
    assert numbers == [0, 1, 10, 11]
    with scopes.step() as step:  # of the default graph
        assert step.number == 12


@pytest.mark.parametrize("arguments", [{"number": -1}, {"first_example": -1}])
def test_negative_numbers_of_a_step_are_refused(graph, arguments):
    with pytest.raises(ValueError, match=r"must be 0 or more, got .*-1"), graph.step(**arguments):
        raise AssertionError("the block was entered")


def test_steps_cannot_be_nested_and_end_after_an_error(graph):
    with (
        graph.step(),
        pytest.raises(RuntimeError, match="step 0 of this graph is open already"),
        graph.step(),
    ):
        raise AssertionError("the block was entered")
    with contextlib.suppress(KeyError), graph.step():
        scopes.add_to_collection("own", 1)
        raise KeyError
    with graph.step():
        assert scopes.get_collection("own") == []
    with graph.step(), Graph().step():  # another graph has steps of its own
        pass


def test_ensure_step_opens_one_only_where_none_is_open(graph):
    with scopes.ensure_step() as alone:
        assert graph.open_step is alone
        with scopes.ensure_step() as inner:
            assert inner is alone
        assert graph.open_step is alone
    assert graph.open_step is None
