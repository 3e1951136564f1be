import threading

import numpy as np
import pytest

from distopt import scopes
from distopt.scopes import Graph, GraphKeys


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


class Named:
    def __init__(self, name):
        self.name = name


def test_a_collection_keeps_order_and_duplicates():
    for value in (3, 1, 3):
        scopes.add_to_collection("numbers", value)
    assert scopes.get_collection("numbers") == [3, 1, 3]


def test_get_collection_copies_and_get_collection_ref_does_not():
    scopes.add_to_collection("numbers", 1)
    scopes.get_collection("numbers").append(2)
    assert scopes.get_collection("numbers") == [1]
    scopes.get_collection_ref("numbers").append(3)
    assert scopes.get_collection("numbers") == [1, 3]


def test_a_missing_collection_is_empty_and_its_ref_is_live():
    assert scopes.get_collection("nothing") == []
    scopes.get_collection_ref("nothing").append(1)
    assert scopes.get_collection("nothing") == [1]


def test_scope_of_get_collection_is_a_regular_expression_matched_at_the_beginning():
    items = [Named("tower_1/a"), Named("tower_10/a"), Named("x/tower_1/a"), "no name", 7]
    for item in items:
        scopes.add_to_collection("losses", item)
    assert scopes.get_collection("losses", "tower_1") == items[:2]
    assert scopes.get_collection("losses", "tower_1/") == items[:1]
    assert scopes.get_collection("losses", ".*tower_1/") == [items[0], items[2]]
    assert scopes.get_collection("losses") == items


def test_add_to_collections_adds_once_to_each():
    scopes.add_to_collections(["a", "b", "a"], 1)
    scopes.add_to_collections("c", 2)
    assert [scopes.get_collection(key) for key in "abc"] == [[1], [1], [2]]


def test_trainable_variables_are_global_and_trainable_and_others_global_only():
    first = scopes.get_variable("first", [2])
    second = scopes.get_variable("second", [2], trainable=False)
    assert scopes.global_variables() == [first, second]
    assert scopes.trainable_variables() == [first]
    assert scopes.trainable_variables("s") == []
    assert scopes.global_variables("s") == [second]


def test_collections_argument_replaces_global_but_trainable_is_added():
    variable = scopes.get_variable("a", [2], collections=[GraphKeys.LOCAL_VARIABLES])
    both = scopes.get_variable(
        "b", [2], collections=[GraphKeys.MODEL_VARIABLES, GraphKeys.TRAINABLE_VARIABLES]
    )
    assert scopes.global_variables() == []
    assert scopes.local_variables() == [variable]
    assert scopes.model_variables() == [both]
    assert scopes.trainable_variables() == [variable, both]


def test_collection_names_are_those_of_tensorflow():
    lower_case = [
        "ACTIVATIONS",
        "BIASES",
        "GLOBAL_STEP",
        "LOCAL_VARIABLES",
        "LOSSES",
        "MODEL_VARIABLES",
        "MOVING_AVERAGE_VARIABLES",
        "REGULARIZATION_LOSSES",
        "SUMMARIES",
        "TRAINABLE_VARIABLES",
        "TRAIN_OP",
        "UPDATE_OPS",
        "WEIGHTS",
    ]
    keys = {key: value for key, value in vars(GraphKeys).items() if key.isupper()}
    assert keys == {**{key: key.lower() for key in lower_case}, "GLOBAL_VARIABLES": "variables"}


def test_every_thread_has_its_own_default_graph():
    # Two ranks as threads build a model at the same time; neither sees the other's variables.
    barrier = threading.Barrier(2)
    seen = {}

    def build(rank):
        with scopes.variable_scope("conv1"):
            barrier.wait(10)
            variable = scopes.get_variable("weights", [2, 2])
            barrier.wait(10)
        seen[rank] = (variable, scopes.global_variables())

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0][1] == [seen[0][0]]
    assert seen[1][1] == [seen[1][0]]
    assert seen[0][0] is not seen[1][0]
    np.testing.assert_array_equal(seen[0][0].numpy(), seen[1][0].numpy())
    assert scopes.global_variables() == []


def test_as_default_nests_and_keeps_the_graphs_apart(graph):
    outer = scopes.get_variable("w", [1])
    with Graph().as_default() as other:
        assert scopes.get_default_graph() is other
        inner = scopes.get_variable("w", [1])
        assert scopes.global_variables() == [inner]
    assert scopes.get_default_graph() is graph
    assert scopes.global_variables() == [outer]


def test_as_default_is_left_after_an_error(graph):
    with pytest.raises(KeyError), Graph().as_default():
        raise KeyError
    assert scopes.get_default_graph() is graph


def test_reset_default_graph_empties_the_threads_own_graph_only():
    with pytest.raises(RuntimeError, match="as_default"):
        scopes.reset_default_graph()
    counts = []

    def run():
        scopes.get_variable("w", [1])
        counts.append(len(scopes.global_variables()))
        scopes.reset_default_graph(seed=5)
        counts.append(len(scopes.global_variables()))
        counts.append(scopes.get_default_graph().seed)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counts == [1, 0, 5]


def test_name_scope_yields_its_name_and_is_numbered_on_the_second_time():
    with scopes.name_scope("tower") as first:
        assert first == "tower/"
        with scopes.name_scope("loss") as inner:
            assert inner == "tower/loss/"
            assert scopes.get_name_scope() == "tower/loss"
    with scopes.name_scope("tower") as second:
        assert second == "tower_1/"
    with scopes.name_scope("Tower") as third:
        assert third == "Tower_2/"
    assert scopes.get_name_scope() == ""


def test_name_scope_with_a_slash_at_its_end_comes_back_to_the_same():
    with scopes.name_scope("a"), scopes.name_scope("b") as captured:
        pass
    with scopes.name_scope("c"), scopes.name_scope(captured) as again:
        assert again == "a/b/"
        assert scopes.get_name_scope() == "a/b"


def test_name_scope_none_goes_to_the_top_or_takes_the_default():
    with scopes.name_scope("a"):
        with scopes.name_scope(None) as top:
            assert top == ""
            assert scopes.get_name_scope() == ""
        with scopes.name_scope(None, "fallback") as fallback:
            assert fallback == "a/fallback/"


@pytest.mark.parametrize("name", ["_a", "a b", "a:0", "/a"])
def test_names_with_wrong_characters_are_refused(name):
    with pytest.raises(ValueError, match="not a valid name"), scopes.name_scope(name):
        raise AssertionError("the block was entered")


def test_name_scope_prefixes_new_variable_but_not_get_variable():
    with scopes.name_scope("n"):
        assert scopes.get_variable("w", [1]).name == "w"
        assert scopes.new_variable(1.0, name="w").name == "n/w"
        assert scopes.new_variable(1.0).name == "n/Variable"
        assert scopes.new_variable(1.0).name == "n/Variable_1"


def test_numbered_names_skip_those_taken():
    graph = scopes.get_default_graph()
    names = [graph.unique_name(name) for name in ("a", "a_1", "a", "a", "a_1")]
    assert names == ["a", "a_1", "a_2", "a_3", "a_1_1"]
