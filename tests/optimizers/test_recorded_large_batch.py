"""The large-batch optimizers against trajectories of tf.contrib.opt, TensorFlow Addons and Keras 2.15."""

import pytest
from recorded import cases, replay

from distopt import optimizers
from distopt.optimizers import contrib


@pytest.mark.parametrize("case", cases("tf1_contrib_opt"), ids=lambda case: case["name"])
def test_contrib_opt(case):
    optimizer = getattr(contrib, case["optimizer"])(**case["kwargs"])
    replay(case, optimizer)
    assert optimizer.get_slot_names() == case["slot_names"]


@pytest.mark.parametrize("case", cases("tfa_0.23"), ids=lambda case: case["name"])
def test_addons(case):
    replay(case, getattr(contrib, case["optimizer"])(**case["kwargs"]))
    # The same through the Keras forms and their flag.
    flag = {"decay_convention": "tfa"} if case["optimizer"] in ("AdamW", "SGDW") else {}
    replay(case, getattr(optimizers, case["optimizer"])(**case["kwargs"], **flag))


@pytest.mark.parametrize("case", cases("keras_new_2.15", "AdamW", "Lion"), ids=lambda case: case["name"])
def test_new_keras(case):
    replay(case, getattr(optimizers, case["optimizer"])(**case["kwargs"]))
    replay(case, getattr(optimizers.keras_new, case["optimizer"])(**case["kwargs"]))
