"""Random cases, recorded from TensorFlow 2.15.1.

The generator draws style, optimizer and each argument from a list with its edge values (momentum 0 and 1,
epsilon 0 and 10, all powers of Ftrl, clips, decay, weight decay, averages, schedules), two variables of
shapes (), (3,) or (3, 2), and for each of up to four steps and each variable None, zeros, or a dense or
sparse gradient (repeated, unsorted or no rows), and for some cases a new rate before some step. It left out
what is nothing but rounding (centered with rho 0) or infinite (Ftrl that starts at 0).
For float64 all arguments are float32 numbers, as TensorFlow rounds them.
"""

import numpy as np
import pytest
from recorded import cases, replay

from distopt import optimizers
from distopt.optimizers import keras_new, tf1
from distopt.variables import Variable

FILE = "tensorflow_random_cases"
DIALECTS = {"tf1": tf1, "keras_v2": optimizers, "keras_new_2.15": keras_new}
CASES = [case for style in DIALECTS for case in cases(style, file=FILE)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_random_case(case):
    make = getattr(DIALECTS[case["style"]], case["optimizer"])
    if make is not tf1.AdagradDAOptimizer:
        replay(case, make(**case["kwargs"]))
        return
    global_step = Variable(np.int64(0), name="global_step", trainable=False)
    optimizer = make(global_step=global_step, **case["kwargs"])
    replay(case, optimizer, lambda pairs: optimizer.apply_gradients(pairs, global_step))


def test_every_optimizer_of_the_three_dialects_has_cases():
    assert len(CASES) >= 150
    seen = {(case["style"], case["optimizer"]) for case in CASES}
    assert {name for style, name in seen if style == "tf1"} == {*tf1.__all__} - {"Optimizer"}
    assert {name for style, name in seen if style == "keras_new_2.15"} == {*keras_new.__all__} - {"Optimizer"}
    assert {name for style, name in seen if style == "keras_v2"} == {
        "SGD",
        "Adagrad",
        "Adadelta",
        "Adam",
        "Adamax",
        "Nadam",
        "RMSprop",
        "Ftrl",
    }
