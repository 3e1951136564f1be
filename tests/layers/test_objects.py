import numpy as np
import pytest

from distopt import initializers, layers, scopes
from distopt.scopes import Graph
from distopt.tape import GradientTape

_X = np.array([[1.0, -2.0]], "f4")


def _names(variables):
    return [variable.name for variable in variables]


def test_the_first_call_makes_the_variables_and_the_second_uses_them_again():
    layer = layers.Dense(3, name="d")
    assert (layer.built, layer.variables, layer.name) == (False, [], "d")
    first = layer(_X).numpy()
    assert layer.built
    np.testing.assert_array_equal(layer(_X).numpy(), first)
    assert _names(layer.variables) == ["d/weights", "d/biases"]
    assert layer.variables[0].shape == (2, 3)
    assert layer.weights == layer.trainable_variables == layer.variables == scopes.trainable_variables()


def test_an_object_computes_what_the_function_computes():
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("f4")
    lrn = (2, 1.0, 0.5, 0.75)
    pairs = [
        (layers.Conv2D(4, 3, activation="relu", name="n"), layers.conv2d, (4, 3), {"activation": "relu"}),
        (layers.MaxPool2D(3, 2, "SAME"), layers.max_pool2d, (3, 2, "SAME"), {}),
        (layers.AveragePool2D(2), layers.average_pool2d, (2,), {}),
        (layers.LocalResponseNorm(*lrn), layers.local_response_normalization, lrn, {}),
        (layers.GlobalAveragePool(), layers.global_average_pool, (), {}),
        (layers.Flatten(), layers.flatten, (), {}),
    ]
    for layer, function, arguments, options in pairs:
        with Graph(seed=3).as_default():
            found = layer(images).numpy()
        with Graph(seed=3).as_default():
            if function is layers.conv2d:
                options = {**options, "name": "n"}
            np.testing.assert_array_equal(found, function(images, *arguments, **options).numpy())
    with Graph(seed=3).as_default():
        found = layers.Embedding(5, 2, name="e")(np.array([4, 1])).numpy()
    with Graph(seed=3).as_default():
        np.testing.assert_array_equal(found, layers.embedding(np.array([4, 1]), 5, 2, name="e").numpy())


def test_names_of_objects_are_made_unique_within_their_scope():
    with scopes.variable_scope("model"):
        objects = [layers.Dense(1), layers.Dense(1), layers.Dropout(), layers.Dropout()]
        for layer in objects:
            layer(_X)
        layers.dense(_X, 1)
    names = ["model/dense", "model/dense_1", "model/dropout", "model/dropout_1"]
    assert [layer.name for layer in objects] == names


def test_two_objects_cannot_have_one_name_even_where_variables_are_reused(graph):
    layers.Dense(1, name="d")(_X)
    other = layers.Dense(1, name="d")
    with pytest.raises(ValueError, match="a layer or variables named 'd' already exist"):
        other(_X)
    with (
        scopes.variable_scope(scopes.get_variable_scope(), reuse=scopes.AUTO_REUSE),
        pytest.raises(ValueError, match="already exist"),
    ):
        other(_X)
    layers.Dropout(name="drop")(_X)
    with pytest.raises(ValueError, match="named 'drop' already exist"):
        layers.Dropout(name="drop")(_X)


def test_a_function_does_not_take_over_the_variables_of_an_object(graph):
    with graph.step():
        layers.Dense(1, name="d")(_X)
    with graph.step(), pytest.raises(ValueError, match="Variable d/weights already exists"):
        layers.dense(_X, 1, name="d")


def test_an_object_works_in_steps_and_inside_a_reused_scope(graph):
    layer = layers.Dense(1, name="d")
    values = []
    for _ in range(2):
        with graph.step(), scopes.variable_scope("s", reuse=scopes.AUTO_REUSE):
            values.append(layer(_X).numpy())
    np.testing.assert_array_equal(*values)
    assert layer.name == "s/d"
    assert len(scopes.trainable_variables()) == 2
    with (
        graph.step(),
        scopes.variable_scope("s"),
        pytest.raises(ValueError, match="Make a layer object once"),
    ):
        layers.Dense(1, name="d")(_X)


def test_an_object_makes_its_variables_where_a_function_would_have_to_reuse():
    with scopes.variable_scope("s", reuse=True):
        assert layers.Dense(1, name="d")(_X).shape == (1, 1)
        with pytest.raises(ValueError, match="Variable s/e/weights does not exist"):
            layers.dense(_X, 1, name="e")


def test_an_object_has_variables_of_its_own_in_every_graph(graph):
    layer = layers.Dense(3, name="d")
    first = layer(_X).numpy()
    own = layer.variables
    with Graph(seed=1).as_default():
        assert not layer.built
        np.testing.assert_array_equal(layer(_X).numpy(), first)  # seed and name are the same
        assert layer.variables[0] is not own[0]
    with Graph(seed=2).as_default():
        assert (layer(_X).numpy() != first).any()
    assert layer.variables == own


def test_a_layer_that_cannot_be_built_leaves_its_name_free():
    layer = layers.Dense(2, name="d")
    with pytest.raises(ValueError, match="dense needs"):
        layer(np.zeros((1, 2, 3), "f4"))
    assert not layer.built
    assert layer(_X).shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Dense(0), "units must be at least 1, got 0"),
        (lambda: layers.Conv2D(0, 3), "filters must be at least 1, got 0"),
        (lambda: layers.Conv2D(1, (3, 0)), "kernel_size must be at least 1, got 0"),
        (lambda: layers.Embedding(0, 3), "rows must be at least 1, got 0"),
        (lambda: layers.Dropout(1.0), r"rate must be a number in the range \[0, 1\), got 1.0"),
        (lambda: layers.LocalResponseNorm(-1), "depth_radius must be at least 0, got -1"),
        (lambda: layers.BatchNormalization(momentum=1.5), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: layers.BatchNormalization(epsilon=0.0), "epsilon must be above 0, got 0.0"),
    ],
)
def test_wrong_sizes_are_refused_when_a_layer_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _model(name=None):
    return layers.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPool(2, 2, "SAME"),
            layers.BatchNormalization(),
            layers.Conv2D(3, 3, activation="tanh"),
            layers.MaxPool2D(2),
            layers.LocalResponseNorm(1),
            layers.Flatten(),
            layers.Sequential([layers.Dense(5, activation="relu"), layers.Dropout(0.5)]),
            layers.Dense(2),
        ],
        name=name,
    )


def test_a_sequential_model_is_its_layers_one_after_the_other():
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("f4")
    model = _model("m")
    assert model.variables == []
    with GradientTape() as tape:
        found = model(images)
    gradients = tape.gradient(found, model.trainable_variables)
    assert _names(model.variables) == [
        "m/conv2d/weights",
        "m/conv2d/biases",
        "m/batch_normalization/gamma",
        "m/batch_normalization/beta",
        "m/conv2d_1/weights",
        "m/conv2d_1/biases",
        "m/dense/weights",
        "m/dense/biases",
        "m/dense_1/weights",
        "m/dense_1/biases",
        "m/batch_normalization/moving_mean",
        "m/batch_normalization/moving_variance",
    ]
    assert _names(model.non_trainable_variables) == _names(model.weights)[-2:]

    def step_by_step(x):
        for layer in model.layers:
            x = layers.sequence(x, [layer]) if isinstance(layer, layers.MaxPool) else layer(x)
        return x

    with GradientTape() as tape:
        expected = step_by_step(images)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    for gradient, own in zip(tape.gradient(expected, model.trainable_variables), gradients, strict=True):
        np.testing.assert_allclose(own, gradient, rtol=1e-4, atol=1e-6)


def test_neighbouring_convolutions_are_one_chain_with_the_channels_between_them():
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("f4")
    parts = [layers.Conv2D(5, 3, activation="relu"), layers.AveragePool2D(2), layers.Conv2D(2, 3)]
    found = layers.Sequential(parts)(images)
    assert [v.shape for v in parts[2].variables] == [(3, 3, 5, 2), (2,)]
    step_by_step = parts[2](parts[1](parts[0](images))).numpy()
    np.testing.assert_allclose(found.numpy(), step_by_step, rtol=1e-5, atol=1e-6)


def test_a_sequential_model_tells_its_layers_whether_they_train(graph):
    model = layers.Sequential([layers.Dropout(0.5), layers.BatchNormalization()])
    x = np.ones((64, 2), "f4")
    np.testing.assert_allclose(model(x).numpy(), x, rtol=1e-3)
    assert scopes.get_collection("update_ops") == []
    with graph.step():
        assert np.unique(model(x, training=True).numpy()).size > 2
    mean, _ = model.layers[1].non_trainable_variables
    assert (mean.numpy() > 0).all()


def test_a_layer_that_stands_twice_in_a_model_is_one_layer():
    layer = layers.Dense(2, kernel_initializer=initializers.Constant([[0.0, 1.0], [2.0, 0.0]]))
    model = layers.Sequential([layer, layer])
    assert model(_X).numpy().tolist() == [[2.0, -4.0]]
    assert len(model.variables) == 2


def test_an_empty_sequential_model_returns_its_input():
    np.testing.assert_array_equal(layers.Sequential([])(_X).numpy(), _X)


@pytest.mark.parametrize("wrong", [np.tanh, "dense", None])
def test_a_sequential_model_takes_layers_only(wrong):
    with pytest.raises(TypeError, match="Sequential takes layers, got"):
        layers.Sequential([wrong])
