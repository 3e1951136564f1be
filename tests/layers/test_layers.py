import numpy as np
import pytest

from distopt import initializers, layers, ops, regularizers, scopes
from distopt.constraints import NonNeg
from distopt.tape import GradientTape
from distopt.variables import IndexedSlices


def test_dense_creates_its_variables_once_and_computes_with_them():
    x = np.array([[1.0, 2.0]], "f4")
    options = {
        "kernel_initializer": initializers.Constant([[1.0, -3.0], [2.0, 1.0]]),
        "bias_initializer": initializers.Constant(0.5),
    }
    assert layers.dense(x, 2, name="d", **options).numpy().tolist() == [[5.5, -0.5]]
    with scopes.variable_scope(scopes.get_variable_scope(), reuse=True):
        assert layers.dense(x, 2, relu=True, name="d", **options).numpy().tolist() == [[5.5, 0.0]]
    assert [v.name for v in scopes.trainable_variables()] == ["d/weights", "d/biases"]
    with pytest.raises(ValueError, match="already exists"):
        layers.dense(x, 2, name="d")


def test_a_sequence_is_its_layers_one_after_the_other():
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 8, 8, 2)).astype("f4")
    make = [
        layers.Convolution(4, 3, relu=True, name="c1"),
        layers.MaxPool(2, 2, "SAME"),
        layers.LocalResponseNormalization(1, 1.0, 0.1, 0.75),
    ]
    whole = layers.sequence(x, make).numpy()
    with scopes.variable_scope(scopes.get_variable_scope(), reuse=True):
        step = x
        for layer in make:
            step = layers.sequence(step, [layer])
    np.testing.assert_allclose(step.numpy(), whole, rtol=1e-6, atol=1e-7)
    assert whole.shape == (3, 4, 4, 4)
    shapes = {v.name: v.shape for v in scopes.trainable_variables()}
    assert shapes == {"c1/weights": (3, 3, 2, 4), "c1/biases": (4,)}


def test_conv2d_without_bias_and_with_constraint_and_regularizer():
    layers.conv2d(
        np.zeros((1, 4, 4, 1), "f4"),
        2,
        (1, 2),
        use_bias=False,
        kernel_constraint=NonNeg(),
        kernel_regularizer=regularizers.l2_regularizer(0.1),
        name="c",
    )
    (weights,) = scopes.trainable_variables()
    assert weights.shape == (1, 2, 1, 2)
    assert isinstance(weights.constraint, NonNeg)
    (record,) = scopes.get_regularization_losses()
    assert record.variable is weights


def test_flatten_keeps_the_examples_even_when_there_are_none():
    assert layers.flatten(np.zeros((2, 3, 4))).shape == (2, 12)
    assert layers.flatten(np.zeros((0, 3, 4))).shape == (0, 12)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        layers.dense(np.zeros((1, 2)), 0)
    with pytest.raises(ValueError, match=r"dense needs \[examples, inputs\], got shape \(1, 2, 3\)"):
        layers.dense(np.zeros((1, 2, 3)), 1)
    with pytest.raises(ValueError, match="filters must be at least 1, got 0"):
        layers.Convolution(0, 3)
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        layers.Convolution(1, (3, 0))


def test_the_variables_of_layers_belong_to_the_model():
    layers.conv2d(np.zeros((1, 4, 4, 1), "f4"), 2, 3, name="c")
    layers.sequence(np.zeros((1, 4, 4, 1), "f4"), [layers.Convolution(2, 3, name="s")])
    names = [v.name for v in scopes.model_variables()]
    assert names == ["c/weights", "c/biases", "s/weights", "s/biases"]
    assert scopes.global_variables() == scopes.model_variables()


def test_names_of_functions_are_made_unique_unless_they_are_given():
    x = np.zeros((1, 2), "f4")
    for _ in range(2):
        layers.dense(x, 2)
    assert [v.name for v in scopes.trainable_variables()][::2] == ["dense/weights", "dense_1/weights"]
    layers.dense(x, 2, name="dense", reuse=True)
    with scopes.variable_scope("dense") as scope:
        pass
    layers.dense(x, 2, name=scope, reuse=True)
    assert len(scopes.trainable_variables()) == 4
    with pytest.raises(ValueError, match="cannot be used without a name"):
        layers.dense(x, 2, reuse=True)
    with pytest.raises(ValueError, match="Variable new/weights does not exist"):
        layers.dense(x, 2, name="new", reuse=True)


def test_a_conv2d_is_the_convolution_of_a_sequence_bit_by_bit():
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 2)).astype("f4")
    found = layers.conv2d(x, 4, 3, activation="relu", name="c").numpy()
    with scopes.variable_scope(scopes.get_variable_scope(), reuse=True):
        expected = layers.sequence(x, [layers.Convolution(4, 3, relu=True, name="c")]).numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("activation", [*sorted(layers.ACTIVATIONS), "linear", None, ops.tanh])
def test_activations_go_by_name_or_function(activation):
    x = np.array([[-1.0, 2.0]], "f4")
    eye = {"kernel_initializer": initializers.Constant(np.eye(2))}
    dense = layers.dense(x, 2, activation=activation, name="d", **eye).numpy()
    function = layers.ACTIVATIONS.get(activation, activation) if activation != "linear" else None
    expected = x if function is None else function(x).numpy()
    np.testing.assert_allclose(dense, expected, rtol=1e-6)
    image = x.reshape(1, 1, 1, 2)
    one = {"kernel_initializer": initializers.Constant(np.eye(2).reshape(1, 1, 2, 2))}
    conv = layers.conv2d(image, 2, 1, activation=activation, name="c", **one).numpy()
    np.testing.assert_allclose(conv.reshape(1, 2), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "rleu"}, ValueError, "unknown activation 'rleu'; there are 'linear', elu"),
        ({"activation": 3}, TypeError, "must be a name, a function or None, got 3"),
        ({"activation": "tanh", "relu": True}, ValueError, "relu=True is activation='relu'"),
    ],
)
def test_wrong_activations_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        layers.dense(np.zeros((1, 2), "f4"), 2, **options)
    with pytest.raises(error, match=message):
        layers.conv2d(np.zeros((1, 2, 2, 1), "f4"), 2, 1, **options)


def test_dense_without_biases_and_with_all_its_options():
    x = np.array([[1.0, 2.0]], "f4")
    found = layers.dense(x, 1, use_bias=False, kernel_initializer=initializers.Constant(1.0), name="d")
    assert found.numpy().tolist() == [[3.0]]
    layers.dense(
        x,
        1,
        bias_regularizer=regularizers.l1_regularizer(1.0),
        bias_constraint=NonNeg(),
        trainable=False,
        name="e",
    )
    assert [v.name for v in scopes.trainable_variables()] == ["d/weights"]
    assert [v.name for v in scopes.model_variables()] == ["d/weights", "e/weights", "e/biases"]
    assert [r.name for r in scopes.get_regularization_losses()] == ["e/biases/Regularizer"]
    assert isinstance(scopes.model_variables()[2].constraint, NonNeg)


def test_fully_connected_has_slims_defaults():
    x = np.array([[[1.0], [-4.0]]], "f4")  # flattened to [1, 2]
    ones = initializers.Ones()
    assert layers.fully_connected(x, 1, weights_initializer=ones).numpy().tolist() == [[0.0]]
    linear = layers.fully_connected(x, 1, activation_fn=None, weights_initializer=ones, scope="fc")
    assert linear.numpy().tolist() == [[-3.0]]
    layers.fully_connected(x, 1, biases_initializer=None, scope="no_biases")
    names = [v.name for v in scopes.trainable_variables()]
    assert names == [
        "fully_connected/weights",
        "fully_connected/biases",
        "fc/weights",
        "fc/biases",
        "no_biases/weights",
    ]


def test_fully_connected_puts_a_normalizer_in_the_place_of_biases():
    x = np.array([[1.0], [3.0]], "f4")
    y = layers.fully_connected(
        x,
        1,
        normalizer_fn=layers.batch_norm,
        normalizer_params={"epsilon": 1e-9},
        weights_initializer=initializers.Ones(),
        scope="fc",
    )
    np.testing.assert_allclose(y.numpy(), [[0.0], [1.0]], atol=1e-6)
    names = [v.name for v in scopes.trainable_variables()]
    assert names == ["fc/weights", "fc/BatchNorm/beta"]


def test_pools_take_the_window_for_the_stride():
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    assert layers.max_pool2d(image).numpy().ravel().tolist() == [5, 7, 13, 15]
    assert layers.max_pool2d(image, 3, 1).numpy().ravel().tolist() == [10, 11, 14, 15]
    assert layers.average_pool2d(image, 4).numpy().ravel().tolist() == [7.5]
    assert layers.max_pool2d(image, (1, 4), padding="SAME").numpy().ravel().tolist() == [3, 7, 11, 15]
    assert layers.global_average_pool(np.stack([image[0], 2 * image[0]])).numpy().tolist() == [[7.5], [15.0]]
    with pytest.raises(ValueError, match=r"needs images \[N, H, W, C\], got shape \(4, 4\)"):
        layers.global_average_pool(image[0, :, :, 0])
    channels = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    found = layers.local_response_normalization(channels, 1, 1.0, 1.0, 0.5).numpy().ravel()
    np.testing.assert_allclose(found, [1 / 6**0.5, 2 / 15**0.5, 3 / 14**0.5], rtol=1e-12)


def test_an_embedding_looks_rows_up_and_has_a_sparse_gradient():
    table = np.arange(8.0).reshape(4, 2)
    indices = np.array([[3, 0], [3, 3]])
    with GradientTape() as tape:
        y = layers.embedding(indices, 4, 2, embeddings_initializer=initializers.Constant(table))
    np.testing.assert_array_equal(y.numpy(), table[indices])
    (embeddings,) = scopes.trainable_variables()
    assert embeddings.name == "embedding/embeddings"
    gradient = tape.gradient(y, embeddings)
    assert isinstance(gradient, IndexedSlices)
    assert gradient.to_dense().tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]
    assert layers.embedding([1, 2], 4, 2, name="embedding", reuse=True).shape == (2, 2)
    with pytest.raises(ValueError, match="rows 0 to 3"):
        layers.embedding(np.array([4]), 4, 2, name="embedding", reuse=True)
    for sizes in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            layers.embedding(np.array([0]), *sizes)


def test_images_and_matrices_are_not_taken_for_each_other():
    with pytest.raises(ValueError, match=r"conv2d needs images \[N, H, W, C\], got shape \(1, 2\)"):
        layers.conv2d(np.zeros((1, 2), "f4"), 2, 1)


_DECORATED = [
    layers.average_pool2d,
    layers.batch_norm,
    layers.batch_normalization,
    layers.conv2d,
    layers.dense,
    layers.dropout,
    layers.embedding,
    layers.fully_connected,
    layers.local_response_normalization,
    layers.max_pool2d,
]


@pytest.mark.parametrize("function", _DECORATED, ids=lambda f: f.__name__)
def test_every_function_takes_defaults_from_an_arg_scope(function):
    assert scopes.has_arg_scope(function)
    assert scopes.arg_scoped_arguments(function)


def test_an_arg_scope_gives_layers_their_defaults_and_a_call_overrides_them():
    x = np.array([[1.0, -2.0]], "f4")
    decay = regularizers.l2_regularizer(0.5)
    with (
        scopes.arg_scope([layers.dense, layers.conv2d], kernel_regularizer=decay, activation="relu"),
        scopes.arg_scope([layers.dense], kernel_initializer=initializers.Constant(np.eye(2))),
    ):
        assert layers.dense(x, 2, name="a").numpy().tolist() == [[1.0, 0.0]]
        assert layers.dense(x, 2, activation=None, name="b").numpy().tolist() == [[1.0, -2.0]]
        layers.conv2d(np.zeros((1, 2, 2, 1), "f4"), 1, 1, name="c")
        with pytest.raises(TypeError, match="unexpected keyword argument 'activaton'"):
            layers.dense(x, 2, activaton="relu")
    assert layers.dense(x, 1, name="d").shape == (1, 1)
    regularized = [record.variable.name for record in scopes.get_regularization_losses()]
    assert regularized == ["a/weights", "b/weights", "c/weights"]
