"""docs/numerics.md names every optimizer, and its recurrences are what the optimizers do."""

import re
from pathlib import Path

import numpy as np
import pytest

from distopt import optimizers
from distopt.variables import Variable

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "numerics.md").read_text()
BLOCKS = re.findall(r"```python\n# (.*?)\n(.*?)```", TEXT, re.DOTALL)
LARGE_BATCH = {"AdamW", "LAMB", "LARS", "LazyAdam", "Lion", "Muon", "SGDW"}

# Settings that make every part of a recurrence matter.
REGULARIZED = {"l1_regularization_strength": 0.25, "l2_regularization_strength": 0.5}
SETTINGS = {
    "SGD": [{"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}],
    "tf1.MomentumOptimizer": [{"momentum": 0.5}, {"momentum": 0.5, "use_nesterov": True}],
    "Adam": [{}, {"amsgrad": True}],
    "keras_new.Adam": [{}, {"amsgrad": True}],
    "Nadam": [{}, {"schedule_decay": 0.5}],
    "RMSprop": [{"momentum": 0.5}, {"momentum": 0.5, "centered": True}],
    "RMSprop(momentum=0)": [{}, {"centered": True}],
    "tf1.RMSPropOptimizer": [{}, {"momentum": 0.5, "centered": True}],
    "keras_new.RMSprop": [{}, {"momentum": 0.5, "centered": True}],
    "Ftrl": [
        {**REGULARIZED, "l2_shrinkage_regularization_strength": 0.5, "beta": 0.5},
        {"learning_rate_power": -0.25},
    ],
    "keras_new.SGD": [{"momentum": 0.5, "nesterov": True}],
    "keras_new.Ftrl": [{**REGULARIZED, "beta": 0.5}],
    "tf1.FtrlOptimizer": [{**REGULARIZED, "l2_shrinkage_regularization_strength": 0.5}],
    "tf1.AdagradDAOptimizer": [REGULARIZED],
    "tf1.ProximalGradientDescentOptimizer": [REGULARIZED],
    "tf1.ProximalAdagradOptimizer": [REGULARIZED],
}
CASES = [
    (name, settings, code)
    for names, code in BLOCKS
    for name in names.split(", ")
    for settings in SETTINGS.get(name, [{}])
]
DEFAULTS = {"amsgrad": False, "momentum": 0.0, "schedule_decay": 0.004, "beta": 0.0}
FLOAT32_POWERS = {"tf1.AdamOptimizer", "contrib.NadamOptimizer", "contrib.AdaMaxOptimizer"}
FIXED = {"keras_new.Nadam": {"schedule_decay": 1.0}}


def optimizer_of(name, settings):
    module, _, cls = name.partition("(")[0].rpartition(".")
    settings = {"learning_rate": 0.5, **settings}
    if "DA" in name:
        step = Variable(np.int64(0), trainable=False, name="global_step")
        return getattr(getattr(optimizers, module), cls)(global_step=step, **settings), step
    return getattr(getattr(optimizers, module) if module else optimizers, cls)(**settings), None


@pytest.mark.parametrize(
    ("name", "settings", "code"), CASES, ids=lambda value: str(value).partition("\n")[0][:60]
)
def test_a_recurrence_is_what_the_optimizer_does(name, settings, code):
    optimizer, global_step = optimizer_of(name, settings)
    config = {**DEFAULTS, **optimizer.get_config(), **settings, **FIXED.get(name, {})}
    config |= {f"beta_{i}": config[f"beta{i}"] for i in (1, 2) if f"beta{i}" in config}
    names = {key: getattr(np, key) for key in ("sqrt", "sign", "maximum", "where", "abs")}
    names |= {**config, "lr": 0.5}
    random = np.random.default_rng(4)
    w = Variable(random.standard_normal(7), name="w")
    names["w"] = w.numpy()
    for start in re.findall(r"^# start: (.*)$", code, re.MULTILINE):
        exec(start, names)
    for t in range(1, 5):
        g = random.standard_normal(7)
        exec(code, names | {"g": g, "t": t, "T": t}, local := {})
        names |= local
        optimizer.apply_gradients([(g, w)], **({} if global_step is None else {"global_step": global_step}))
        # The powers of the betas of these are float32.
        rtol = 1e-4 if name in FLOAT32_POWERS else 1e-11
        np.testing.assert_allclose(w.numpy(), names["w"], rtol=rtol, atol=1e-14)


def test_every_family_of_optimizers_has_a_recurrence():
    shown = {name.partition("(")[0].rpartition(".")[2] for names, _ in BLOCKS for name in names.split(", ")}
    public = {
        name
        for module in (optimizers, optimizers.tf1)
        for name in module.__all__
        if isinstance(thing := getattr(module, name), type) and issubclass(thing, optimizers.Optimizer)
    }
    elsewhere = {"Optimizer", "LossScaleOptimizer"} | LARGE_BATCH
    assert {name for name in public - elsewhere if name not in shown} == set()


@pytest.mark.parametrize("dialect", ["", "tf1", "keras_new", "contrib"])
def test_every_public_optimizer_is_named(dialect):
    module = getattr(optimizers, dialect, None) if dialect else optimizers
    written = "".join(path.read_text() for path in DOCS.glob("numerics*.md"))
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        if isinstance(thing, type) and issubclass(thing, optimizers.Optimizer) and public != "Optimizer":
            assert re.search(rf"\b{public}\b", written), f"{dialect} {public} is not in docs/numerics*.md"
