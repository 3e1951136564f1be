"""Trajectories recorded from TensorFlow, and how to replay one."""

import functools
import gzip
import json
from pathlib import Path

import numpy as np

from distopt.variables import IndexedSlices, Variable

_DATA = Path(__file__).parent.parent / "data"


@functools.cache
def recorded(file="tensorflow_cases"):
    """Return a whole file; its "format" says what is in it."""
    return json.loads(gzip.decompress((_DATA / f"{file}.json.gz").read_bytes()))


def cases(style, *optimizers, file="tensorflow_cases"):
    """Return the recorded cases of a style ("tf1", "keras_v2" ...), of some optimizers or of all."""
    return [
        c
        for c in recorded(file)["cases"]
        if c["style"] == style and c["optimizer"] in (optimizers or [c["optimizer"]])
    ]


def gradient(entry, dtype):
    if entry is None:
        return None
    if "dense" in entry:
        return np.array(entry["dense"], dtype)
    shape = (len(entry["indices"]), *entry["dense_shape"][1:])  # an empty list has lost its width
    values = np.array(entry["values"], dtype).reshape(shape)
    return IndexedSlices(values, np.array(entry["indices"], np.int64), entry["dense_shape"])


def replay(case, optimizer, apply=None):
    """Apply a case's gradients step by step; assert the recorded values and slots."""
    variables = {
        name: Variable(np.array(value, case["dtype"]), name=name)
        for name, value in case["initial_vars"].items()
    }
    close = functools.partial(np.testing.assert_allclose, rtol=case["rtol"], atol=case["atol"])
    for step, given in enumerate(case["grads"][: case["steps"]], 1):
        for key, value in case.get("set", {}).get(str(step), {}).items():
            setattr(optimizer, key, value)
        pairs = [(gradient(entry, case["dtype"]), variables[name]) for name, entry in given.items()]
        (apply or optimizer.apply_gradients)(pairs)
        if "iterations" in case:
            assert optimizer.iterations == case["iterations"][step - 1]
        for name, expected in case["expected_vars_after"].get(str(step), {}).items():
            close(variables[name].numpy(), expected, err_msg=f"{case['name']}: {name} after step {step}")
    for name, slots in case.get("expected_slots_final", {}).items():
        for slot, expected in slots.items():
            close(
                optimizer.get_slot(variables[name], slot).numpy(), expected, err_msg=f"{case['name']}: {slot}"
            )
    return variables
