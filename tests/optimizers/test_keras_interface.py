"""minimize, apply_gradients, hyperparameters, iterations and weights of Keras' OptimizerV2."""

import logging

import numpy as np
import pytest

from distopt import ops, regularizers, scopes
from distopt.optimizers import SGD, Adam, tf1
from distopt.schedules import ExponentialDecay, PiecewiseConstantDecay, exponential_decay
from distopt.tape import GradientTape, Tensor
from distopt.transforms import AdaptiveClipping, GradientNoise
from distopt.variables import IndexedSlices, Variable


def test_minimize_needs_variables_and_a_tape_for_a_tensor():
    w = Variable(1.0)
    optimizer = SGD(1.0)
    with pytest.raises(ValueError, match="`var_list` is required"):
        optimizer.minimize(lambda: w * 2.0, None)
    with GradientTape() as tape:
        loss = w * 2.0
    with pytest.raises(ValueError, match="`tape` is required when a `Tensor` loss is passed"):
        optimizer.minimize(loss, [w])
    optimizer.minimize(loss, [w], tape=tape)
    assert float(w) == -1.0


@pytest.mark.parametrize("wrong", [np.ones(1), 3, None, "w", Tensor(np.float32(1.0))])
def test_minimize_takes_variables_only(wrong):
    w = Variable(1.0)
    with pytest.raises(ValueError, match="`var_list` must hold variables, got"):
        SGD(1.0).minimize(lambda: w * 2.0, [w, wrong])
    if not isinstance(wrong, Tensor):
        with pytest.raises(ValueError, match="`var_list` must hold variables, got"):
            SGD(1.0).minimize(lambda: w * 2.0, lambda: [w, wrong])
    assert float(w) == 1.0


def test_a_list_is_watched_and_a_callable_list_is_not():
    fixed = Variable(1.0, trainable=False)
    SGD(1.0).minimize(lambda: fixed * 2.0, [fixed])
    assert float(fixed) == -1.0
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        SGD(1.0).minimize(lambda: fixed * 2.0, lambda: [fixed])


def test_a_callable_list_is_asked_after_the_loss():
    made = []

    def loss():
        made.append(Variable(3.0))
        return made[0] * 2.0

    SGD(1.0).minimize(loss, lambda: made)
    assert float(made[0]) == 1.0


def test_an_empty_list_is_no_update():
    optimizer = SGD(0.1)
    assert optimizer.apply_gradients([]) == 0
    assert optimizer.iterations == 0


def test_missing_gradients_are_told_once(caplog):
    a, b = Variable(1.0, name="a"), Variable(1.0, name="b")
    optimizer = SGD(0.1)
    with caplog.at_level(logging.WARNING, "distopt"):
        for _ in range(2):
            optimizer.apply_gradients([(1.0, a), (None, b)])
    assert [record.getMessage() for record in caplog.records] == [
        "Gradients do not exist for variables ['b'] when minimizing the loss."
    ]


def test_hyperparameters_can_be_read_and_set_whatever_they_were():
    optimizer = SGD(0.5, momentum=0.9)
    assert (optimizer.learning_rate, optimizer.lr, optimizer.momentum) == (0.5, 0.5, 0.9)
    schedule = ExponentialDecay(1.0, 1, 0.5)
    optimizer.learning_rate = schedule
    assert optimizer.learning_rate is schedule
    optimizer.lr = lambda: 0.25  # TensorFlow refuses this one after the first step; we don't
    assert optimizer.learning_rate == 0.25
    optimizer.lr = np.float32(2.0)
    assert optimizer.lr == 2.0
    with pytest.raises(AttributeError, match="SGD has no attribute or hyperparameter 'rho'"):
        _ = optimizer.rho
    with pytest.raises(TypeError, match="learning_rate must be a number, a schedule, or a callable"):
        optimizer.lr = "fast"


def test_a_schedule_sees_the_steps_0_1_2():
    w = Variable(0.0)
    optimizer = SGD(PiecewiseConstantDecay([0, 1], [1.0, 10.0, 100.0]))
    for expected in (-1.0, -11.0, -111.0):
        optimizer.apply_gradients([(1.0, w)])
        assert float(w) == expected


def test_decay_divides_the_rate_also_of_a_schedule():
    # 1/(1+0), 1/(1+1), then schedule 8: 8/(1+2)
    w = Variable(0.0, dtype="f8")
    optimizer = SGD(1.0, decay=1.0)
    optimizer.apply_gradients([(1.0, w)])
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == -1.5
    optimizer.learning_rate = PiecewiseConstantDecay([0], [1.0, 9.0])
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == -4.5


def test_momentum_set_after_it_was_0_has_no_effect_as_in_keras():
    w = Variable(0.0)
    optimizer = SGD(1.0)
    optimizer.momentum = 0.9
    optimizer.apply_gradients([(1.0, w)])
    optimizer.apply_gradients([(1.0, w)])
    assert (float(w), optimizer.get_slot_names()) == (-2.0, [])


def test_the_velocity_keeps_the_old_rate():
    # a = -1, w = -1; a = -0.5 - 0.1, w = -1.6
    w = Variable(0.0)
    optimizer = SGD(1.0, momentum=0.5)
    optimizer.apply_gradients([(1.0, w)])
    optimizer.learning_rate = 0.1
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == pytest.approx(-1.6)


def test_lr_is_an_old_name_that_warns():
    with pytest.warns(UserWarning, match="`lr` argument is deprecated"):
        assert SGD(lr=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clipnorn": 1.0}, TypeError, "Unexpected keyword argument passed to optimizer: clipnorn"),
        ({"decay": -1.0}, ValueError, "Expected decay >= 0, received: -1.0"),
        ({"clipvalue": -1.0}, ValueError, "Expected clipvalue >= 0, received: -1.0"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, ValueError, "both clipnorm and global_clipnorm"),
        ({"momentum": 1.5}, ValueError, r"`momentum` must be between \[0, 1\]"),
        ({"momentum": -0.5}, ValueError, r"`momentum` must be between \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SGD(0.1, **options)


def test_clips_can_be_set_later_and_refuse_each_other():
    w = Variable(0.0)
    optimizer = SGD(1.0, clipnorm=5.0)
    optimizer.clipvalue = 2.0
    optimizer.apply_gradients([(9.0, w)])
    assert (float(w), optimizer.clipnorm, optimizer.global_clipnorm) == (-2.0, 5.0, None)
    with pytest.raises(ValueError, match="both clipnorm and global_clipnorm"):
        optimizer.global_clipnorm = 1.0
    assert optimizer.global_clipnorm is None


def test_iterations_is_a_variable_that_can_be_replaced_only_before_its_first_use():
    optimizer = SGD(0.1)
    optimizer.iterations = counter = Variable(5, trainable=False, dtype=np.int64)
    optimizer.apply_gradients([(1.0, Variable(1.0))])
    assert optimizer.iterations is counter
    assert counter.numpy() == 6
    with pytest.raises(RuntimeError, match="Cannot set `iterations` to a new Variable"):
        optimizer.iterations = 3
    optimizer.iterations.assign(9)
    assert optimizer.step == 9
    with pytest.raises(ValueError, match="must be an integer variable without axes"):
        SGD(0.1).iterations = Variable(1.0)
    fresh = SGD(0.1)
    assert (fresh.iterations, fresh.iterations.dtype, int(fresh.iterations)) == (0, np.int64, 0)


def test_weights_are_the_count_then_slot_by_slot():
    a, b = Variable([1.0], name="a"), Variable([[2.0]], name="b")
    optimizer = Adam(0.1, amsgrad=True)
    assert optimizer.get_weights() == []
    optimizer.apply_gradients([(np.ones(1), a), (np.ones((1, 1)), b)])
    assert [w.name for w in optimizer.weights] == [
        "Adam/iter",
        *(f"Adam/{v}/{s}" for s in ("m", "v", "vhat") for v in "ab"),
    ]
    assert optimizer.get_slot_names() == ["m", "v", "vhat"]
    weights = optimizer.get_weights()
    assert [w.shape for w in weights] == [(), (1,), (1, 1), (1,), (1, 1), (1,), (1, 1)]
    optimizer.set_weights([np.int64(7), *(np.full(w.shape, 3.0) for w in weights[1:])])
    assert optimizer.iterations == 7
    assert optimizer.get_slot(b, "vhat").numpy() == [[3.0]]
    with pytest.raises(ValueError, match="weight list of length 2, but the optimizer was expecting 7"):
        optimizer.set_weights(weights[:2])
    with pytest.raises(ValueError, match=r"not compatible with provided weight shape \(2,\)"):
        optimizer.set_weights([weights[0], np.ones(2), *weights[2:]])
    assert optimizer.iterations == 7


def test_a_slot_that_is_not_there_is_a_key_error():
    w = Variable([1.0], name="w")
    optimizer = Adam(0.1)
    with pytest.raises(KeyError, match="no slot 'm' for variable 'w'"):
        optimizer.get_slot(w, "m")
    optimizer.apply_gradients([(np.ones(1), w)])
    assert optimizer.get_slot(w, "m") is optimizer.get_slot(w, "m")
    with pytest.raises(KeyError, match="no slot 'vhat'"):
        optimizer.get_slot(w, "vhat")


def test_configurations_round_trip_schedules_and_clips_included():
    first = Adam(
        ExponentialDecay(0.5, 10, 0.9), beta_1=lambda: 0.5, amsgrad=True, clipnorm=2.0, decay=0.25, name="A"
    )
    config = first.get_config()
    assert config == {
        "name": "A",
        "learning_rate": {
            "class_name": "ExponentialDecay",
            "config": ExponentialDecay(0.5, 10, 0.9).get_config(),
        },
        "beta_1": 0.5,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "decay": 0.25,
        "amsgrad": True,
        "clipnorm": 2.0,
    }
    second = Adam.from_config(config)
    assert second.get_config() == config
    assert second.learning_rate == ExponentialDecay(0.5, 10, 0.9)


@pytest.mark.parametrize("epsilon", [0, None])
def test_epsilon_0_silently_becomes_1e_7_as_in_keras(epsilon):
    assert Adam(epsilon=epsilon).epsilon == 1e-7


def test_aggregators_get_what_has_a_gradient_and_replace_the_all_reduce():
    a, b = Variable(1.0), Variable(1.0)
    seen = []

    def aggregator(pairs):
        seen.append([(float(g), v) for g, v in pairs])
        return [(2 * g, v) for g, v in pairs]

    optimizer = SGD(1.0, gradient_aggregator=aggregator)
    optimizer.apply_gradients([(None, a), (np.float32(3.0), b)])
    assert seen == [[(3.0, b)]]
    assert (float(a), float(b)) == (1.0, -5.0)


def test_hyperparameters_are_read_before_aggregation_with_the_old_count():
    events = []
    w = Variable(0.0)
    optimizer = SGD(
        lambda: events.append(("rate", optimizer.step)) or 1.0,
        gradient_aggregator=lambda pairs: events.append("aggregator") or pairs,
    )
    optimizer.apply_gradients([(1.0, w)])
    assert events == [("rate", 0), "aggregator"]
    assert optimizer.step == 1


def test_the_value_is_constrained_before_the_count_grows():
    seen = []

    def constraint(value):
        seen.append((value.tolist(), optimizer.step))
        return value / 2

    w = Variable([4.0], constraint=constraint)
    optimizer = SGD(1.0)
    optimizer.apply_gradients([(np.array([2.0]), w)])
    assert (seen, w.numpy().tolist(), optimizer.step) == ([([2.0], 0)], [1.0], 1)


def test_a_schedule_of_tensorflow_1_is_saved_without_its_global_step():
    step = Variable(3, trainable=False, dtype=np.int64)
    optimizer = SGD(exponential_decay(1.0, step, 1, 0.5))
    assert optimizer.learning_rate == 0.125
    copy = SGD.from_config(optimizer.get_config())
    assert copy.learning_rate == ExponentialDecay(1.0, 1, 0.5)


def test_what_transformers_keep_is_part_of_the_state():
    def fresh():
        return Adam(0.1, gradient_transformers=[GradientNoise(1.0, seed=3), AdaptiveClipping()])

    def train(optimizer, w, steps):
        for _ in range(steps):
            optimizer.apply_gradients([(np.ones(3, "f4"), w)])

    whole, first, second = fresh(), fresh(), fresh()
    one, two = (Variable(np.zeros(3, "f4"), name="w") for _ in range(2))
    train(whole, one, 4)
    train(first, two, 2)
    state = first.state()
    assert int(state["transformers/0/GradientNoise/step"]) == 2
    second.load_state(state, [two])
    train(second, two, 2)
    np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_loss_that_makes_its_variables_finds_them_again_in_the_next_step():
    with scopes.Graph(seed=0).as_default():
        optimizer = SGD(0.25)

        def loss():
            w = scopes.get_variable("w", initializer=2.0)
            scopes.add_to_collection("losses", ops.square(w))
            return ops.add_n(scopes.get_collection("losses"))

        for expected in (1.0, 0.5):  # w -= 0.25 * 2 w; were losses to pile up, the second step were larger
            optimizer.minimize(loss, scopes.trainable_variables)
            (w,) = scopes.trainable_variables()
            assert float(w) == expected


@pytest.mark.parametrize("given", [np.complex64(1j), IndexedSlices(np.ones((1, 1), "c8"), [0], (2, 1))])
def test_complex_gradients_and_integer_variables_are_refused_before_anything_changes(given):
    w, table, count = Variable(1.0), Variable(np.ones((2, 1))), Variable(3, name="count")
    optimizer = SGD(1.0, momentum=0.5)
    target = table if isinstance(given, IndexedSlices) else w
    with pytest.raises(TypeError, match="Gradient must be convertible"):
        optimizer.apply_gradients([(1.0, Variable(1.0)), (given, target)])
    with pytest.raises(ValueError, match="Invalid type int32 for variable 'count'"):
        optimizer.apply_gradients([(1.0, w), (1, count)])
    assert (float(w), int(count.value), optimizer.step) == (1.0, 3, 0)
    assert optimizer.get_slot_names() == []


def test_minimize_runs_no_update_operations_and_adds_no_penalties():
    with scopes.Graph().as_default():
        ran = []
        scopes.add_to_collection(scopes.GraphKeys.UPDATE_OPS, lambda: ran.append("update"))
        w = scopes.get_variable("w", initializer=4.0, regularizer=regularizers.l2_regularizer(1.0))
        for optimizer in (SGD(1.0), tf1.GradientDescentOptimizer(1.0)):
            optimizer.minimize(lambda: w * 1.0, var_list=[w])
        assert (float(w), ran) == (2.0, [])
        assert len(scopes.get_regularization_losses()) == 1
