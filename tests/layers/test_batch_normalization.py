import numpy as np
import pytest

from distopt import initializers, layers, ops, scopes
from distopt.regularizers import l1_regularizer
from distopt.scopes import GraphKeys
from distopt.tape import GradientTape
from distopt.testing import world

_X = np.array([[1.0, 10.0], [3.0, 30.0]], "f4")  # means 2 and 20, variances 1 and 100


def _averages():
    return {
        v.name.rpartition("/")[2]: v.numpy().tolist() for v in scopes.model_variables() if not v.trainable
    }


def test_it_makes_gamma_and_beta_trainable_and_the_averages_not():
    layers.batch_normalization(_X, name="bn")
    names = ["bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance"]
    assert [v.name for v in scopes.model_variables()] == names
    assert [v.name for v in scopes.trainable_variables()] == names[:2]
    assert scopes.global_variables() == scopes.model_variables()
    assert _averages() == {"moving_mean": [0.0, 0.0], "moving_variance": [1.0, 1.0]}


def test_inference_takes_the_moving_averages_and_updates_nothing():
    options = {
        "moving_mean_initializer": initializers.Constant([1.0, 10.0]),
        "moving_variance_initializer": initializers.Constant([3.0, 99.0]),
        "gamma_initializer": initializers.Constant(2.0),
        "beta_initializer": initializers.Constant([0.0, 5.0]),
    }
    y = layers.batch_normalization(_X, epsilon=1.0, **options)
    np.testing.assert_allclose(y.numpy(), [[0.0, 5.0], [2.0, 9.0]], rtol=1e-6)
    assert scopes.get_collection(GraphKeys.UPDATE_OPS) == []


def test_training_takes_the_batch_and_the_averages_follow_when_the_update_runs(graph):
    with graph.step():
        y = layers.batch_normalization(_X, momentum=0.9, epsilon=1e-9, training=True, name="bn")
        np.testing.assert_allclose(y.numpy(), [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-6)
        (update,) = scopes.get_collection(GraphKeys.UPDATE_OPS)
        assert update.name == "bn/AssignMovingAvg"
        assert _averages() == {"moving_mean": [0.0, 0.0], "moving_variance": [1.0, 1.0]}
        with scopes.control_dependencies(scopes.get_collection(GraphKeys.UPDATE_OPS)):
            pass
        assert scopes.run_update_ops() == 0
    np.testing.assert_allclose(_averages()["moving_mean"], [0.2, 2.0], rtol=1e-6)
    np.testing.assert_allclose(_averages()["moving_variance"], [0.9 + 0.1, 0.9 + 10.0], rtol=1e-6)


def test_updates_do_not_pile_up_over_steps_and_follow_the_recurrence(graph):
    mean, batches = 0.0, [1.0, 5.0, -2.0]
    for value in batches:
        with graph.step():
            layers.batch_normalization(np.full((2, 1), value, "f4"), momentum=0.9, training=True, name="bn")
            assert scopes.run_update_ops() == 1
        mean = 0.9 * mean + 0.1 * value
    assert _averages()["moving_mean"] == pytest.approx([mean], rel=1e-5)


def test_updates_of_towers_run_both_in_order(graph):
    with graph.step(), scopes.variable_scope(scopes.get_variable_scope()):
        for number, value in enumerate((1.0, 3.0)):
            with scopes.name_scope(f"tower_{number}"):
                x = np.full((2, 1), value, "f4")
                layers.batch_normalization(x, momentum=0.5, training=True, name="bn")
                scopes.get_variable_scope().reuse_variables()
        names = [op.name for op in scopes.get_collection(GraphKeys.UPDATE_OPS)]
        assert names == ["tower_0/bn/AssignMovingAvg", "tower_1/bn/AssignMovingAvg"]
        assert scopes.run_update_ops("tower_0/") == 1
        assert _averages()["moving_mean"] == [0.5]
        assert scopes.run_update_ops() == 1
    assert _averages()["moving_mean"] == [0.5 * 0.5 + 0.5 * 3.0]


def test_an_update_can_be_done_at_once():
    layers.batch_normalization(_X, momentum=0.5, training=True, updates_collection=None)
    assert _averages()["moving_mean"] == [1.0, 10.0]
    assert scopes.get_collection(GraphKeys.UPDATE_OPS) == []
    layers.batch_normalization(_X, training=True, updates_collection="own")
    assert len(scopes.get_collection("own")) == 1


def test_an_object_updates_its_averages_at_once_and_nothing_piles_up(graph):
    layer = layers.BatchNormalization(momentum=0.5)
    layer(_X)
    names = dict(graph._names_in_use)
    for expected in ([1.0, 10.0], [1.5, 15.0]):  # towards the mean, [2, 20]
        layer(_X, training=True)
        assert layer.non_trainable_variables[0].numpy().tolist() == expected
    layer(_X)
    assert layer.non_trainable_variables[0].numpy().tolist() == [1.5, 15.0]
    assert scopes.get_collection(GraphKeys.UPDATE_OPS) == []
    assert not [name for name in graph._names_in_use.keys() - names.keys() if "assign" in name]
    deferred = layers.BatchNormalization(momentum=0.5, updates_collection=GraphKeys.UPDATE_OPS)
    deferred(_X, training=True)
    assert deferred.non_trainable_variables[0].numpy().tolist() == [0.0, 0.0]
    assert scopes.run_update_ops() == 1
    assert deferred.non_trainable_variables[0].numpy().tolist() == [1.0, 10.0]


def test_the_variance_of_images_is_averaged_without_bias_as_tensorflows_fused_kernel_does():
    images = np.array([1.0, 3.0, 1.0, 3.0], "f4").reshape(2, 2, 1, 1)  # variance 1; 4/3 unbiased
    options = {"momentum": 0.0, "training": True, "updates_collection": None}
    layers.batch_normalization(images, name="image", **options)
    layers.batch_normalization(images, unbiased_moving_variance=False, name="biased", **options)
    layers.batch_normalization(images.reshape(4, 1), name="matrix", **options)
    layers.batch_normalization(images.reshape(4, 1), unbiased_moving_variance=True, name="own", **options)
    layers.batch_normalization(images[:1, :1], name="one", **options)
    variances = scopes.get_collection(GraphKeys.MODEL_VARIABLES, ".*/moving_variance")
    found = {v.name.partition("/")[0]: float(v.numpy()[0]) for v in variances}
    assert found == pytest.approx({"image": 4 / 3, "biased": 1.0, "matrix": 1.0, "own": 4 / 3, "one": 0.0})


def test_an_empty_batch_gives_nothing_and_changes_no_average(graph):
    with graph.step():
        y = layers.batch_normalization(np.zeros((0, 2), "f4"), training=True)
        assert y.shape == (0, 2)
        scopes.run_update_ops()
    assert _averages() == {"moving_mean": [0.0, 0.0], "moving_variance": [1.0, 1.0]}


def test_center_scale_trainable_regularizers_and_activation():
    layers.batch_normalization(_X, center=False, scale=False, name="plain")
    assert scopes.trainable_variables() == []
    layers.batch_normalization(_X, trainable=False, name="frozen")
    assert scopes.trainable_variables() == []
    layers.batch_normalization(
        _X, beta_regularizer=l1_regularizer(1.0), gamma_regularizer=l1_regularizer(2.0), name="penalised"
    )
    records = [(r.variable.name, r.regularizer.l1) for r in scopes.get_regularization_losses()]
    assert sorted(records) == [("penalised/beta", 1.0), ("penalised/gamma", 2.0)]
    y = layers.batch_normalization(_X, training=True, activation="relu", epsilon=1e-9, name="relu")
    np.testing.assert_allclose(y.numpy(), [[0.0, 0.0], [1.0, 1.0]], atol=1e-6)


def test_half_precision_has_float32_variables_and_a_half_precision_result():
    x = _X.astype(np.float16)
    for training in (False, True):
        y = layers.batch_normalization(x, training=training, updates_collection=None)
        assert y.dtype == np.float16
    assert {v.dtype for v in scopes.model_variables()} == {np.dtype(np.float32)}


def test_slims_function_has_slims_defaults(graph):
    with graph.step():
        y = layers.batch_norm(_X)
        np.testing.assert_allclose(y.numpy(), [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-3)
        assert scopes.run_update_ops() == 1
    names = [v.name for v in scopes.model_variables()]
    assert names == ["BatchNorm/beta", "BatchNorm/moving_mean", "BatchNorm/moving_variance"]
    np.testing.assert_allclose(_averages()["moving_mean"], [0.002, 0.02], rtol=1e-4)
    layers.batch_norm(_X, is_training=False, scale=True, scope="other")
    assert scopes.get_collection(GraphKeys.UPDATE_OPS, "other") == []


def test_an_input_without_examples_axis_is_refused():
    with pytest.raises(ValueError, match=r"needs \[examples, ..., channels\], got shape \(3,\)"):
        layers.batch_normalization(np.zeros(3, "f4"))


@pytest.mark.parametrize("cuts", [[3, 5], [0, 4], [4, 4, 7]], ids=str)
def test_with_a_communicator_ranks_do_what_one_process_does(cuts):
    images = np.random.default_rng(0).normal(5.0, 3.0, (8, 2, 2, 3))

    def run(part, communicator):
        with scopes.Graph(seed=1).as_default() as graph, graph.step(), GradientTape() as tape:
            y = layers.batch_normalization(
                part, training=True, momentum=0.5, communicator=communicator, name="bn"
            )
            loss = ops.reduce_sum(y * y * y)
            scopes.run_update_ops()
            gradients = tape.gradient(loss, scopes.trainable_variables())
            averages = [v.numpy() for v in scopes.model_variables() if not v.trainable]
        return y.numpy(), gradients, averages

    whole = run(images, None)
    parts = np.split(images, cuts)
    found = world(len(parts), lambda ranks: run(parts[ranks.rank], ranks))
    np.testing.assert_allclose(np.concatenate([y for y, _, _ in found]), whole[0], rtol=1e-9, atol=1e-12)
    for number, gradient in enumerate(whole[1]):
        total = sum(gradients[number] for _, gradients, _ in found)
        np.testing.assert_allclose(total, gradient, rtol=1e-9, atol=1e-9)
    for _, _, averages in found:
        for average, expected in zip(averages, whole[2], strict=True):
            np.testing.assert_allclose(average, expected, rtol=1e-9)


def test_with_a_communicator_a_global_batch_without_examples_changes_no_average():
    def run(ranks):
        with scopes.Graph().as_default():
            layers.batch_normalization(
                np.zeros((0, 1, 1, 2), "f4"), training=True, updates_collection=None, communicator=ranks
            )
            return _averages()

    expected = {"moving_mean": [0.0, 0.0], "moving_variance": [1.0, 1.0]}
    assert world(2, run) == [expected] * 2
