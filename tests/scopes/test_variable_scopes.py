import numpy as np
import pytest

from distopt import initializers, regularizers, scopes
from distopt.scopes import (
    AUTO_REUSE,
    Graph,
    GraphKeys,
    get_name_scope,
    get_variable,
    name_scope,
    variable_scope,
)


@pytest.fixture(autouse=True)
def graph():
    with Graph(seed=7).as_default() as graph:
        yield graph


def test_names_are_prefixed_by_the_scopes():
    with variable_scope("a"), variable_scope("b/c"):
        assert get_variable("w", [1]).name == "a/b/c/w"
    assert get_variable("w", [1]).name == "w"


def test_a_second_variable_of_a_name_is_refused():
    get_variable("w", [1])
    with pytest.raises(ValueError, match="Variable w already exists, disallowed"):
        get_variable("w", [1])


def test_reuse_of_a_missing_variable_is_refused():
    with pytest.raises(ValueError, match="Variable a/w does not exist"), variable_scope("a", reuse=True):
        get_variable("w", [1])


def test_reuse_returns_the_same_object():
    with variable_scope("a"):
        first = get_variable("w", [2, 3])
    with variable_scope("a", reuse=True):
        assert get_variable("w", [2, 3]) is first
        assert get_variable("w") is first
        assert get_variable("w", [None, 3]) is first
    assert len(scopes.global_variables()) == 1
    assert len(scopes.trainable_variables()) == 1


def test_auto_reuse_makes_or_returns():
    made = []
    for _ in range(2):
        with variable_scope("a", reuse=AUTO_REUSE):
            made.append(get_variable("w", [2]))
    assert made[0] is made[1]


@pytest.mark.parametrize("shape", [[3], [2, 3], [], 3])
def test_reuse_with_another_shape_is_refused(shape):
    get_variable("w", [2])
    with pytest.raises(ValueError, match=r"share variable w, but specified shape .* \(2,\)"):
        get_variable("w", shape, reuse=AUTO_REUSE)


def test_reuse_with_another_dtype_is_refused():
    get_variable("w", [2], np.float64)
    with pytest.raises(ValueError, match="specified dtype float32 and found dtype float64"):
        get_variable("w", [2], reuse=True)
    with variable_scope("", dtype=np.float64):
        assert get_variable("w", [2], reuse=True).dtype == np.float64


def test_reuse_is_inherited_and_cannot_be_turned_off_inside():
    with variable_scope("a"), variable_scope("b"):
        first = get_variable("w", [1])
    with variable_scope("a", reuse=True):
        for reuse in (None, False):
            with variable_scope("b", reuse=reuse) as scope:
                assert scope.reuse is True
                assert get_variable("w", [1]) is first


def test_reuse_variables_ends_with_its_block():
    # The tutorial's towers: the first makes the variables, the others reuse them.
    found = []
    with variable_scope(scopes.get_variable_scope()):
        for _ in range(3):
            found.append(get_variable("w", [1]))
            scopes.get_variable_scope().reuse_variables()
    assert found[0] is found[1] is found[2]
    get_variable("another", [1])
    with pytest.raises(ValueError, match="already exists"):
        get_variable("w", [1])


def test_a_scope_object_is_entered_with_its_own_name_and_reuse_from_anywhere():
    with variable_scope("a") as captured:
        first = get_variable("w", [1])
    with variable_scope("elsewhere", reuse=True), variable_scope(captured) as again:
        assert again.name == "a"
        assert again.reuse is False
        assert get_variable("v", [1]).name == "a/v"
    with variable_scope(captured, reuse=True):
        assert get_variable("w", [1]) is first


def test_default_name_is_made_unique():
    names = []
    for _ in range(3):
        with variable_scope(None, "d"):
            names.append(get_variable("w", [1]).name)
    assert names == ["d/w", "d_1/w", "d_2/w"]


def test_default_name_is_not_used_beside_a_name():
    with variable_scope("a", "d"):
        assert get_variable("w", [1]).name == "a/w"


def test_default_names_inside_a_reopened_scope_start_anew_so_that_they_are_shared():
    found = []
    for reuse in (None, True):
        with variable_scope("a", reuse=reuse):
            for _ in range(2):
                with variable_scope(None, "d"):
                    found.append(get_variable("w", [1]))
    assert [v.name for v in found[:2]] == ["a/d/w", "a/d_1/w"]
    assert found[2:] == found[:2]


def test_default_name_with_reuse_is_refused():
    for reuse in (True, AUTO_REUSE):
        with (
            pytest.raises(ValueError, match="cannot be used without a name"),
            variable_scope(None, "d", reuse=reuse),
        ):
            raise AssertionError("the block was entered")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_scope": None}, TypeError, "default_name"),
        ({"name_or_scope": 3}, TypeError, "got 3"),
        ({"name_or_scope": "a b"}, ValueError, "not a valid name"),
        ({"name_or_scope": "a", "reuse": "yes"}, ValueError, "got 'yes'"),
    ],
)
def test_wrong_arguments_of_a_scope_are_refused(arguments, error, message):
    with pytest.raises(error, match=message), variable_scope(**arguments):
        raise AssertionError("the block was entered")


def test_a_scope_is_left_after_an_error():
    with pytest.raises(KeyError), variable_scope("a"):
        raise KeyError
    assert scopes.get_variable_scope().name == ""
    assert scopes.get_name_scope() == ""


def test_the_name_scope_of_a_variable_scope_is_numbered_and_variable_names_are_not():
    with scopes.name_scope("n"), variable_scope("s") as scope:
        assert scope.original_name_scope == "n/s/"
        assert scopes.get_name_scope() == "n/s"
        assert scopes.new_variable(1.0, name="b").name == "n/s/b"
        get_variable("w", [1])
    with scopes.name_scope("n"), variable_scope("s", reuse=True) as again:
        assert again.original_name_scope == "n_1/s/"
        assert get_variable("w", [1]).name == "s/w"
    with variable_scope(scope):
        assert scopes.get_name_scope() == "s"
        assert scopes.get_variable_scope().original_name_scope == "n/s/"


def test_initializer_dtype_and_constraint_are_inherited_and_overridden():
    def halve(value):
        return value / 2

    with variable_scope("a", initializer=initializers.Constant(2.0), dtype=np.float64, constraint=halve):
        with variable_scope("b"):
            inherited = get_variable("w", [2])
            own = get_variable("v", [2], np.float32, initializers.Ones(), constraint=np.abs)
        with variable_scope("c", initializer=initializers.Constant(3.0)):
            inner = get_variable("w", [2])
    np.testing.assert_array_equal(inherited.numpy(), [2.0, 2.0])
    assert inherited.dtype == np.float64
    assert inherited.constraint is halve
    np.testing.assert_array_equal(own.numpy(), [1.0, 1.0])
    assert own.dtype == np.float32
    assert own.constraint is np.abs
    np.testing.assert_array_equal(inner.numpy(), [3.0, 3.0])


def test_set_initializer_and_set_regularizer_hold_to_the_end_of_the_block():
    with variable_scope("a"):
        scope = scopes.get_variable_scope()
        scope.set_initializer(initializers.Ones())
        scope.set_regularizer(regularizers.l2_regularizer(1.0))
        np.testing.assert_array_equal(get_variable("w", [1]).numpy(), [1.0])
    assert [loss.name for loss in scopes.get_regularization_losses()] == ["a/w/Regularizer"]
    get_variable("w", [1])
    assert len(scopes.get_regularization_losses()) == 1


def test_random_values_follow_the_graphs_seed_and_the_full_name():
    with variable_scope("conv1"):
        weights = get_variable("weights", [3, 4])
    expected = initializers.GlorotUniform()((3, 4), np.float32, name="conv1/weights", seed=7)
    np.testing.assert_array_equal(weights.numpy(), expected)
    with Graph(seed=8).as_default(), variable_scope("conv1"):
        other = get_variable("weights", [3, 4]).numpy()
    assert (other != expected).all()


def test_values_do_not_depend_on_the_order_of_creation():
    def build(names):
        with Graph(seed=1).as_default():
            return {name: get_variable(name, [4]).numpy() for name in names}

    forward, backward = build("abc"), build("cba")
    for name in "abc":
        np.testing.assert_array_equal(forward[name], backward[name])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, bool])
def test_integers_and_booleans_start_at_zero(dtype):
    variable = get_variable("w", [2], dtype)
    assert variable.dtype == dtype
    np.testing.assert_array_equal(variable.numpy(), np.zeros(2, dtype))


def test_initializers_may_be_classes_functions_and_values():
    np.testing.assert_array_equal(get_variable("a", [2], initializer=initializers.Ones).numpy(), [1.0, 1.0])
    np.testing.assert_array_equal(
        get_variable("b", 2, initializer=lambda shape, dtype: np.full(shape, 2, dtype)).numpy(),
        [2.0, 2.0],
    )
    np.testing.assert_array_equal(get_variable("c", initializer=lambda: np.array([3.0])).numpy(), [3.0])
    value = get_variable("d", initializer=[1, 2])
    assert value.dtype == np.int32
    assert get_variable("e", initializer=0.5).dtype == np.float32
    assert get_variable("f", initializer=0.5, dtype=np.float64).dtype == np.float64
    assert get_variable("g", initializer=np.zeros(3)).dtype == np.float64


def test_a_variable_made_from_a_value_can_be_shared_by_the_same_call():
    first = get_variable("w", initializer=np.arange(3), reuse=AUTO_REUSE)
    assert get_variable("w", initializer=np.arange(3), reuse=AUTO_REUSE) is first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": [2], "initializer": [1.0, 2.0]}, ValueError, "do not specify a shape"),
        ({}, ValueError, "must be fully defined, but was None"),
        ({"shape": [None, 2]}, ValueError, r"must be fully defined, but was \(None, 2\)"),
        ({"initializer": initializers.Ones()}, ValueError, "must be fully defined"),
        (
            {"initializer": np.zeros(2), "dtype": np.float32},
            ValueError,
            "has dtype float64, and the explicit dtype float32",
        ),
        (
            {"shape": [2], "initializer": lambda shape, dtype: np.zeros(3)},
            ValueError,
            r"returned shape \(3,\) where \(2,\)",
        ),
        ({"shape": [2], "regularizer": abs}, TypeError, "must be a Regularizer"),
        ({"shape": [2], "dtype": np.int32, "initializer": initializers.HeNormal()}, TypeError, "w"),
    ],
)
def test_wrong_arguments_of_get_variable_are_refused_and_leave_nothing(arguments, error, message):
    with pytest.raises(error, match=message):
        get_variable("w", **arguments)
    assert scopes.global_variables() == []
    assert get_variable("w", [1]).name == "w"


def test_a_name_with_a_colon_is_refused():
    with pytest.raises(ValueError, match="'w:0' is not a valid name"):
        get_variable("w:0", [1])


def test_get_variable_does_not_return_or_shadow_a_new_variable():
    scopes.new_variable(1.0, name="w")
    with pytest.raises(ValueError, match="Variable w does not exist, or was not created with get_var"):
        get_variable("w", [], reuse=True)
    with pytest.raises(ValueError, match="Give one of the two another name"):
        get_variable("w", [])
    get_variable("v", [])
    assert scopes.new_variable(1.0, name="v").name == "v_1"


def test_new_variable_is_in_the_collections():
    first = scopes.new_variable(1.0, name="a")
    second = scopes.new_variable([1, 2], trainable=False, dtype=np.float64)
    third = scopes.new_variable(1.0, collections=[GraphKeys.LOCAL_VARIABLES])
    assert scopes.global_variables() == [first, second]
    assert scopes.trainable_variables() == [first, third]
    assert scopes.local_variables() == [third]
    assert second.dtype == np.float64


def test_a_regularizer_leaves_one_record_per_variable_and_none_on_reuse():
    for reuse in (None, True, True):
        with variable_scope("a", reuse=reuse, regularizer=regularizers.l2_regularizer(0.5)):
            weights = get_variable("w", [2], initializer=initializers.Constant([1.0, 3.0]))
    (loss,) = scopes.get_regularization_losses()
    assert loss.variable is weights
    assert loss.name == "a/w/Regularizer"
    assert loss.numpy() == pytest.approx(0.5 * 10 / 2)
    weights.assign([2.0, 0.0])
    assert loss.numpy() == pytest.approx(0.5 * 4 / 2)
    assert scopes.get_collection(GraphKeys.REGULARIZATION_LOSSES) == [loss]


def test_regularizers_are_inherited_and_overridden():
    with variable_scope("a", regularizer=regularizers.l2_regularizer(1.0)):
        with variable_scope("b"):
            get_variable("inherits", [1])
            get_variable("own", [1], regularizer=regularizers.l1_regularizer(1.0))
            get_variable("none", [1], regularizer=regularizers.no_regularizer)
            get_variable("zero", [1], regularizer=regularizers.l2_regularizer(0.0))
        with variable_scope("c", regularizer=regularizers.no_regularizer):
            get_variable("none", [1])
    losses = scopes.get_regularization_losses()
    assert [loss.name for loss in losses] == ["a/b/inherits/Regularizer", "a/b/own/Regularizer"]
    assert [loss.regularizer.get_config() for loss in losses] == [
        {"l1": 0.0, "l2": 1.0},
        {"l1": 1.0, "l2": 0.0},
    ]


def test_regularization_losses_are_filtered_by_scope():
    for name in ("tower_0", "tower_1"):
        with variable_scope(name, regularizer=regularizers.l2_regularizer(1.0)):
            get_variable("w", [1])
    (loss,) = scopes.get_regularization_losses("tower_1/")
    assert loss.variable.name == "tower_1/w"


def test_variables_of_a_scope():
    with variable_scope("a") as scope:
        weights = get_variable("w", [1])
        step = get_variable("step", [], np.int64, trainable=False)
    get_variable("w", [1])
    assert scope.global_variables() == [weights, step]
    assert scope.trainable_variables() == [weights]


def test_get_variable_of_a_scope_takes_a_reuse_of_its_own():
    with variable_scope("a") as scope:
        first = get_variable("w", [1])
    assert scope.get_variable("w", [1], reuse=True) is first
    with pytest.raises(ValueError, match="already exists"):
        scope.get_variable("w", [1], reuse=False)


def test_a_local_variable_is_neither_trained_nor_global_nor_penalised():
    with variable_scope("a", regularizer=regularizers.l2_regularizer(1.0)):
        counter = scopes.get_local_variable("counter", [], np.int64)
        assert scopes.get_local_variable("counter", [], np.int64, reuse=True) is counter
    assert (counter.name, counter.trainable) == ("a/counter", False)
    assert scopes.local_variables() == [counter]
    assert scopes.global_variables() == scopes.trainable_variables() == []
    assert scopes.get_regularization_losses() == []
    own = scopes.get_local_variable("own", [], collections=["own"])
    assert scopes.get_collection("own") == [own]


def test_a_default_name_is_made_unique_apart_for_variables_and_for_the_name_scope():
    # TensorFlow 2.15.1: variable_scope(None, "a") below name_scope("n"), after variable_scope("a") above it.
    with variable_scope("a"):
        pass
    with name_scope("n"), variable_scope(None, "a") as scope:
        assert (scope.name, get_name_scope()) == ("a_1", "n/a")
    with variable_scope(None, "a") as scope:
        assert (scope.name, get_name_scope()) == ("a_2", "a_1")
