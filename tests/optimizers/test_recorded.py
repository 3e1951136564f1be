"""Every optimizer against the trajectories recorded from TensorFlow."""

import numpy as np
import pytest
from recorded import cases, recorded, replay

from distopt import optimizers
from distopt.optimizers import keras_new, tf1
from distopt.variables import Variable


@pytest.mark.parametrize("case", cases("keras_v2"), ids=lambda case: case["name"])
def test_keras_v2(case):
    replay(case, getattr(optimizers, case["optimizer"])(**case["kwargs"]))


@pytest.mark.parametrize("case", cases("tf1"), ids=lambda case: case["name"])
def test_tf1(case):
    make = getattr(tf1, case["optimizer"])
    if make is not tf1.AdagradDAOptimizer:
        replay(case, make(**case["kwargs"]))
        return
    global_step = Variable(np.int64(0), name="global_step", trainable=False)
    optimizer = make(global_step=global_step, **case["kwargs"])
    replay(case, optimizer, lambda pairs: optimizer.apply_gradients(pairs, global_step))


@pytest.mark.parametrize("case", cases("keras_new_2.15", *keras_new.__all__), ids=lambda case: case["name"])
def test_keras_new(case):
    replay(case, getattr(keras_new, case["optimizer"])(**case["kwargs"]))


def test_no_recorded_style_is_left_out():
    # The other two are in test_recorded_large_batch.py.
    styles = {case["style"] for case in recorded()["cases"]}
    assert styles == {"tf1", "keras_v2", "keras_new_2.15", "tf1_contrib_opt", "tfa_0.23"}
    elsewhere = {"AdamW", "Lion"}
    assert {c["optimizer"] for c in cases("keras_new_2.15")} == {*keras_new.__all__, *elsewhere} - {
        "Optimizer"
    }
