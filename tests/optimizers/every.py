"""Every public optimizer class, found by introspection, and how to make one."""

import contextlib
import importlib
import importlib.util
import inspect

import numpy as np

from distopt import optimizers
from distopt.variables import Variable

_DIALECTS = ("", "tf1", "keras_new", "contrib")

REQUIRED = {
    "learning_rate": lambda: 0.1,
    "momentum": lambda: 0.5,
    "weight_decay": lambda: 0.001,
    "global_step": lambda: Variable(np.int64(0), trainable=False, name="global_step"),
}
"""Values of constructor arguments without a default."""

SHAPES = ((3, 4), (5,), (2, 2, 3))

RATES = {
    "Adadelta": {"learning_rate": 1.0, "epsilon": 1e-2},
    "Adagrad": {"learning_rate": 0.5},
    "AdagradDA": {"learning_rate": 1.0},
    "Ftrl": {"learning_rate": 1.0},
    "LARS": {"learning_rate": 1.0},
    "ProximalAdagrad": {"learning_rate": 0.5},
}
"""With what a small problem converges in 600 steps, where a learning rate of 0.02 doesn't do."""


def _classes():
    found = {}
    for dialect in _DIALECTS:
        name = ".".join(filter(None, ("distopt.optimizers", dialect)))
        if dialect and importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if not (inspect.isclass(thing) and issubclass(thing, optimizers.Optimizer)):
                continue
            # One that wraps another has no rule; test_loss_scale.py tests it.
            if public not in ("Optimizer", "LossScaleOptimizer"):
                found[".".join(filter(None, (dialect, public)))] = thing
    return found


CLASSES = _classes()
"""Name as one writes it behind `distopt.optimizers` -> class."""


def make(name, **given):
    """Return an optimizer; arguments that have no default come from REQUIRED."""
    for key, parameter in inspect.signature(CLASSES[name]).parameters.items():
        named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and named and key not in given:
            given[key] = REQUIRED[key]()
    return CLASSES[name](**given)


def rates(name):
    """Return the arguments with which a class converges soon."""
    return RATES.get(name.rpartition(".")[2].removesuffix("Optimizer"), {"learning_rate": 0.02})


def remade(optimizer, name):
    """Return an optimizer made from the configuration of another."""
    config = optimizer.get_config()
    if "global_step" in inspect.signature(CLASSES[name]).parameters:
        config["global_step"] = REQUIRED["global_step"]()  # a variable, which no configuration holds
    return CLASSES[name].from_config(config)


def slots(optimizer, variable):
    """Return the slots that a variable has, by name, as NumPy arrays."""
    found = {}
    for name in optimizer.get_slot_names():
        with contextlib.suppress(KeyError):  # Muon gives different slots to different variables
            found[name] = optimizer.get_slot(variable, name).numpy()
    return found


def variables(dtype="f4", start=None):
    """Return fresh variables of SHAPES; of given values, or random ones that are the same each time."""
    random = np.random.default_rng(3)
    start = start or [random.standard_normal(shape) for shape in SHAPES]
    return [Variable(np.array(s, dtype), name=f"v{i}") for i, s in enumerate(start)]


def shares(step, ranks, rank):
    """One rank's part of twelve shards' gradients: small whole numbers, whose sum no order rounds."""
    random = np.random.default_rng(step)
    shards = [[random.integers(-4, 5, shape) for shape in SHAPES] for _ in range(12)]
    return [sum(parts).astype("f4") for parts in zip(*shards[rank::ranks], strict=True)]
