"""What Keras 2.11 changed: epsilon, sparse gradients, weight decay and averages for all."""

import numpy as np
import pytest
from every import CLASSES, make

from distopt.optimizers import keras_new
from distopt.schedules import ExponentialDecay
from distopt.variables import Arena, IndexedSlices, Variable

NEW = [name for name, cls in CLASSES.items() if issubclass(cls, keras_new.Optimizer)]


def after(optimizer, *gradients, start=1.0):
    w = Variable(np.array(start, np.float64), name="w")
    for gradient in gradients:
        optimizer.apply_gradients([(np.array(gradient, np.float64), w)])
    return w


def test_adagrad_and_rmsprop_have_epsilon_inside_the_root():
    # A = 0 + 9, epsilon 7: 1 - 0.5 * 3 / 4.
    assert float(after(keras_new.Adagrad(0.5, 0.0, 7.0), 3.0)) == 0.625
    # rho 0.75, g 2: r = 1, epsilon 3: 1 - 0.5 * 2 / 2, with momentum or without.
    for momentum in (0.0, 0.5):
        assert float(after(keras_new.RMSprop(0.5, 0.75, momentum, 3.0), 2.0)) == 0.5


@pytest.mark.parametrize("name", ["Adam", "Adagrad", "Adadelta", "Adamax", "Nadam", "RMSprop"])
def test_epsilon_0_stays_0(name):
    optimizer = getattr(keras_new, name)(epsilon=0.0)
    assert optimizer.get_config()["epsilon"] == 0.0
    with pytest.raises(TypeError, match="epsilon must be a number"):
        getattr(keras_new, name)(epsilon=None)


def test_nadams_momentum_has_a_fast_schedule_and_takes_learning_rate_schedules():
    # g = 2, b1 = 0.5, b2 = 0.75, epsilon 1: m = 1, v / 0.25 = 4.
    first, second = (0.5 * (1 - 0.5 * 0.96**t) for t in (1, 2))
    mean = (1 - first) * 2 / (1 - first) + second * 1 / (1 - first * second)
    optimizer = keras_new.Nadam(ExponentialDecay(0.5, 1, 0.5), 0.5, 0.75, 1.0)
    assert float(after(optimizer, 2.0)) == pytest.approx(1.0 - 0.5 * mean / (2 + 1), rel=1e-14)
    assert "decay" not in optimizer.get_config()


def test_weight_decay_comes_first_and_is_multiplied_by_the_rate():
    # w = 2 - 0.5 * 0.25 * 2 = 1.75; the update sees that: 1.75 - 0.5 * 1.
    assert float(after(keras_new.SGD(0.5, weight_decay=0.25), 1.0, start=2.0)) == 1.25
    scheduled = keras_new.SGD(ExponentialDecay(0.5, 1, 0.5), weight_decay=0.25)
    assert float(after(scheduled, 0.0, 0.0, start=2.0)) == 1.75 * (1 - 0.0625)


@pytest.mark.parametrize("arena", [False, True])
def test_weight_decay_shrinks_all_rows_of_what_has_a_gradient(arena):
    w, idle = Variable(np.full((3, 1), 2.0), name="w"), Variable(np.full(1, 2.0), name="idle")
    if arena:
        Arena([w, idle])
    optimizer = keras_new.Adagrad(0.5, 0.0, 7.0, weight_decay=0.25)
    optimizer.apply_gradients([(IndexedSlices([[3.0]], [1], (3, 1)), w), (None, idle)])
    assert w.numpy().ravel().tolist() == [1.75, 1.75 - 0.375, 1.75]
    assert idle.numpy().tolist() == [2.0]


def test_variables_can_be_left_out_of_weight_decay():
    names = ["layer/kernel", "layer/bias", "norm/scale"]
    kernel, bias, scale = own = [Variable(np.full(1, 2.0), name=name) for name in names]
    optimizer = keras_new.SGD(0.5, weight_decay=0.25)
    optimizer.exclude_from_weight_decay(var_list=[scale], var_names=["bias$"])
    optimizer.apply_gradients([(np.zeros(1), w) for w in own])
    assert [float(w.value[0]) for w in (kernel, bias, scale)] == [1.75, 2.0, 2.0]


def test_nothing_has_decayed_when_a_gradient_is_refused():
    w = Variable(np.full(2, 2.0), name="w")
    with pytest.raises(ValueError, match="shape"):
        keras_new.SGD(0.5, weight_decay=0.25).apply_gradients([(np.zeros(3), w)])
    assert w.numpy().tolist() == [2.0, 2.0]


def test_averages_follow_and_overwrite_every_so_often():
    # w: 8 -> 6 -> 4; averages: 8 -> 7.5 -> 6.625, which w is set to after the second update.
    optimizer = keras_new.SGD(1.0, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=2)
    w = after(optimizer, 2.0, start=8.0)
    assert (float(w), float(optimizer.get_slot(w, "average"))) == (6.0, 7.5)
    optimizer.apply_gradients([(2.0, w)])
    assert (float(w), float(optimizer.get_slot(w, "average"))) == (6.625, 6.625)


def test_averages_can_be_taken_at_the_end():
    optimizer = keras_new.SGD(1.0, use_ema=True, ema_momentum=0.75)
    w, idle = after(optimizer, 2.0, 2.0, start=8.0), Variable(1.0, name="idle")
    assert float(w) == 4.0
    optimizer.finalize_variable_values([w])
    assert float(w) == 6.625
    with pytest.raises(KeyError, match="no slot 'average' for variable 'idle'"):
        optimizer.finalize_variable_values([idle])
    with pytest.raises(RuntimeError, match="pass use_ema=True"):
        keras_new.SGD().finalize_variable_values([w])


@pytest.mark.parametrize("name", NEW)
def test_decay_and_averages_work_in_all_and_survive_a_checkpoint(name):
    options = {
        "weight_decay": 0.01,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 4,
        "jit_compile": False,
        "clipnorm": 5.0,
    }
    results = []
    for stops in (False, True):
        w = Variable(np.linspace(-1, 1, 6, dtype="f4").reshape(2, 3), name="w")
        optimizer = make(name, **options)
        for step in range(6):
            if stops and step == 3:
                state, value, config = optimizer.state(), w.numpy(), optimizer.get_config()
                optimizer, w = CLASSES[name].from_config(config), Variable(value, name="w")
                optimizer.load_state(state, [w])
                assert {key: config[key] for key in options} == options
            optimizer.apply_gradients([(np.arange(6, dtype="f4").reshape(2, 3) - step, w)])
        results.append([w.numpy(), optimizer.get_slot(w, "average").numpy()])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("arguments", [{"lr": 0.5}, {"rate": 0.5}])
def test_arguments_that_keras_dropped_are_unknown(name, arguments):
    with pytest.raises(TypeError, match="Unexpected keyword argument"):
        make(name, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"ema_momentum": 1.5}, r"`ema_momentum` must be in the range \[0, 1\]"),
        ({"ema_overwrite_frequency": 0}, "`ema_overwrite_frequency` must be an integer >= 1 or None"),
        ({"ema_overwrite_frequency": 2.5}, "Received: 2.5"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "both clipnorm and global_clipnorm"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        keras_new.SGD(**options)


def test_build_makes_the_slots():
    w = Variable(np.ones(2), name="w")
    optimizer = keras_new.Adam(use_ema=True)
    optimizer.build([w])
    assert optimizer.get_slot_names() == ["m", "v", "average"]
    assert optimizer.iterations == 0


def test_the_name_is_the_class_unless_given():
    assert keras_new.SGD().get_name() == "SGD"
    assert keras_new.RMSprop(name="mine").get_config()["name"] == "mine"
    with pytest.raises(ValueError, match="specify the optimizer name"):
        keras_new.SGD(name="")


def test_zero_is_no_clip_and_the_first_given_clip_acts_alone():
    # Keras 2.15's order: clipnorm, global_clipnorm, clipvalue. |(3, 4)| = 5.
    def step(**clips):
        w = after(keras_new.SGD(1.0, **clips), [3.0, 4.0], start=[0.0, 0.0])
        return (-w.numpy()).round(12).tolist()

    assert step(clipnorm=0.0) == step(clipvalue=0.0) == step(global_clipnorm=0.0) == [3.0, 4.0]
    assert step(clipnorm=1.0, clipvalue=0.5) == [0.6, 0.8]
    assert step(global_clipnorm=1.0, clipvalue=0.5) == [0.6, 0.8]
    assert step(clipnorm=0.0, clipvalue=0.5) == [0.5, 0.5]
    optimizer = keras_new.SGD(1.0, clipvalue=0.5)
    optimizer.clipvalue = 2.0
    assert after(optimizer, [3.0, 1.0], start=[0.0, 0.0]).numpy().tolist() == [-2.0, -1.0]


def test_rmsprop_alone_overwrites_every_hundred_updates_by_default():
    assert keras_new.RMSprop().ema_overwrite_frequency == 100
    assert keras_new.RMSprop(ema_overwrite_frequency=None).ema_overwrite_frequency is None
    others = [make(name).ema_overwrite_frequency for name in NEW if not name.endswith("RMSprop")]
    assert others == [None] * 9


def test_configurations_have_keras_keys():
    # The keys of tf.keras.optimizers.*.get_config() in Keras 2.15.
    common = {
        "name",
        "weight_decay",
        "clipnorm",
        "global_clipnorm",
        "clipvalue",
        "use_ema",
        "ema_momentum",
        "ema_overwrite_frequency",
        "jit_compile",
        "is_legacy_optimizer",
        "learning_rate",
    }
    adam = {"beta_1", "beta_2", "epsilon"}
    own = {
        "SGD": {"momentum", "nesterov"},
        "Adam": adam | {"amsgrad"},
        "AdamW": adam | {"amsgrad"},
        "Adamax": adam,
        "Nadam": adam,
        "Lion": {"beta_1", "beta_2"},
        "Adagrad": {"initial_accumulator_value", "epsilon"},
        "Adadelta": {"rho", "epsilon"},
        "RMSprop": {"rho", "momentum", "epsilon", "centered"},
    }
    for name, keys in own.items():
        config = getattr(keras_new, name)().get_config()
        assert set(config) == common | keys, name
        assert (config["clipnorm"], config["clipvalue"], config["is_legacy_optimizer"]) == (None, None, False)


def test_adamw_and_lion_have_the_defaults_of_keras():
    config = keras_new.AdamW().get_config()
    assert (config["learning_rate"], config["weight_decay"], config["epsilon"]) == (0.001, 0.004, 1e-7)
    assert keras_new.AdamW(0.5, 0.25).get_config()["weight_decay"] == 0.25
    with pytest.raises(ValueError, match="Missing value of `weight_decay`"):
        keras_new.AdamW(weight_decay=None)
    config = keras_new.Lion().get_config()
    assert (config["learning_rate"], config["weight_decay"], config["beta_2"]) == (0.0001, None, 0.99)
    with pytest.raises(ValueError, match=r"`beta_1`=0.0 must be between \]0, 1\]"):
        keras_new.Lion(beta_1=0.0)


def test_adamw_takes_epsilon_0_and_averages():
    # Adam's first step with epsilon 0 is lr * sign(g): w = 2 - 0.5 * 0.25 * 2 - 0.5; average of 2 and that.
    optimizer = keras_new.AdamW(0.5, 0.25, epsilon=0.0, use_ema=True, ema_momentum=0.5)
    w = after(optimizer, 3.0, start=2.0)
    assert float(w) == pytest.approx(1.25, rel=1e-12)
    assert float(optimizer.get_slot(w, "average")) == pytest.approx(1.625, rel=1e-12)


def test_decay_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"decay is deprecated in the new Keras .*optimizers\.Adam$"):
        keras_new.Adam(decay=0.1)
