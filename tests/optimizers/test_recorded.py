"""Every optimizer against the trajectories recorded from TensorFlow."""

import pytest
from recorded import cases, replay

from distopt import optimizers
from distopt.optimizers import tf1


@pytest.mark.parametrize("case", cases("keras_v2"), ids=lambda case: case["name"])
def test_keras_v2(case):
    replay(case, getattr(optimizers, case["optimizer"])(**case["kwargs"]))


@pytest.mark.parametrize("case", cases("tf1"), ids=lambda case: case["name"])
def test_tf1(case):
    replay(case, getattr(tf1, case["optimizer"])(**case["kwargs"]))
