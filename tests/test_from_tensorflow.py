"""The programs of docs/from-tensorflow.md run, and give what arithmetic says they should.

What they promise in comments is compared with what they print, and both with computations in plain NumPy
that know nothing of distopt but its data and initial values.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, needs_mpirun, run_python

from distopt.data import digits
from distopt.initializers import TruncatedNormal

_PAGE = (Path(__file__).parent.parent / "docs" / "from-tensorflow.md").read_text()
SCRIPT, KERAS, OPTIMIZE_LOSS, TOWERS, CUSTOM = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)
BEFORE = re.findall(r"```python no-run\n(.*?)```", _PAGE, re.DOTALL)
_RANKS = [1, pytest.param(2, marks=needs_mpirun), pytest.param(3, marks=needs_mpirun)]


@pytest.fixture
def printed(tmp_path):
    def run(block, ranks=1):
        script = tmp_path / "block.py"  # a file: formulas are read from their source
        script.write_text(block)
        if ranks == 1:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, script], capture_output=True, text=True, check=False, env=environment
            )
        else:
            done = run_python(ranks, [str(script)], 100)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def _promised(block):
    return [line.rpartition("  # ")[2] for line in block.splitlines() if re.match(r" *print\(.*  # ", line)]


def _numbers(text):
    return np.array(re.findall(r"-?\d+\.?\d*", text), float)


def _same(lines, block):
    """Assert that lines are those promised, numbers to one unit of their third decimal."""
    promised = _promised(block)
    assert len(lines) == len(promised) > 0
    for line, promise in zip(lines, promised, strict=True):
        assert re.sub(r"[-\d. ]", "", line) == re.sub(r"[-\d. ]", "", promise)
        np.testing.assert_allclose(_numbers(line), _numbers(promise), atol=0.0011)


def test_every_program_has_its_tensorflow_beside_it():
    assert len(BEFORE) == 5
    for block in BEFORE:
        ast.parse(block)


def test_a_tensorflow_1_script(printed):
    x = np.arange(4.0)
    weights = np.zeros(2)  # slope and intercept
    accumulated = np.zeros(2)
    for step in range(100):
        errors = weights[0] * x + weights[1] - (2 * x - 1)
        accumulated = 0.9 * accumulated + 2 * np.array([(errors * x).mean(), errors.mean()])
        weights -= 0.05 * 0.5 ** (step // 50) * accumulated
    lines = printed(SCRIPT)
    np.testing.assert_allclose(_numbers(lines[0]), [*weights, 100], atol=0.001)
    _same(lines, SCRIPT)


@pytest.mark.parametrize("ranks", _RANKS)
def test_a_keras_training_loop(printed, ranks):
    weights, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for step in range(20):
        x = np.random.default_rng(step).standard_normal((10, 2))
        gradient = 2 * ((x @ (weights - [1.0, -2.0]))[:, None] * x).mean(axis=0)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        rate = 0.05 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        weights -= rate * m / (np.sqrt(v) + 1e-7)
    lines = printed(KERAS, ranks)
    np.testing.assert_allclose(_numbers(lines[0]), weights, atol=0.001)
    _same(lines, KERAS)


def test_optimize_loss(printed):
    # The gradient has one element and more than norm 1, so each step is the rate.
    rates = [0.1, 0.1, 0.05, 0.05]
    weights = 10.0 - np.cumsum([0.0, *rates])
    lines = printed(OPTIMIZE_LOSS)
    np.testing.assert_allclose(_numbers(lines[0]), 5.0 * weights[:4], atol=0.001)
    np.testing.assert_allclose(_numbers(lines[1]), [weights[4], 4], atol=0.001)
    np.testing.assert_allclose(_numbers(lines[2]), rates, atol=0.001)
    _same(lines, OPTIMIZE_LOSS)


def _tower(weights, x, labels):
    """Return the gradients of one tower: of the mean cross-entropy plus the decay of the first weights."""
    w1, b1, w2, b2 = weights
    before = x @ w1 + b1
    hidden = np.maximum(before, 0)
    logits = hidden @ w2 + b2
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (powers / powers.sum(axis=1, keepdims=True) - np.eye(10)[labels]) / len(x)
    back = (error @ w2.T) * (before > 0)
    return [x.T @ back + 0.004 * w1, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


@pytest.fixture(scope="module")
def trained_by_towers():
    """Norms of weights and averages after the tutorial's loop over two towers with average_gradients."""
    data = digits.load("train")
    pixels = data.images.reshape(-1, 64) / 16 - 0.5
    weights = [
        TruncatedNormal(stddev=0.04)((64, 32), np.float32, name="local1/weights", seed=0).astype("f8"),
        np.full(32, 0.1),
        TruncatedNormal(stddev=1 / 32)((32, 10), np.float32, name="softmax_linear/weights", seed=0).astype(
            "f8"
        ),
        np.zeros(10),
    ]
    averages = [w.copy() for w in weights]
    for step in range(30):
        batch = np.random.default_rng(step).choice(len(pixels), 64, replace=False)
        towers = [_tower(weights, pixels[part], data.labels[part]) for part in (batch[:32], batch[32:])]
        rate = 0.1 * 0.5 ** (step // 20)
        decay = min(0.9999, (1 + step + 1) / (10 + step + 1))
        for w, average, *gradients in zip(weights, averages, *towers, strict=True):
            w -= rate * np.mean(gradients, axis=0)
            average -= (1 - decay) * (average - w)
    return [[np.linalg.norm(value) for value in values] for values in (weights, averages)]


@pytest.mark.parametrize("ranks", _RANKS)
def test_the_multi_gpu_script(printed, ranks, trained_by_towers):
    lines = printed(TOWERS, ranks)
    np.testing.assert_allclose(_numbers(lines[1]), trained_by_towers[0], atol=0.001)
    np.testing.assert_allclose(_numbers(lines[2]), trained_by_towers[1], atol=0.001)
    _same(lines, TOWERS)


def test_a_custom_optimizer_with_its_hooks_and_as_a_rule(printed):
    momentum = np.full((3, 2), 0.5 * 2.0)
    table = -0.25 * np.sign(momentum)
    momentum = 0.5 * momentum + 0.5 * np.array([[0, 0], [-1, -8], [0, 0]])
    table -= 0.25 * np.sign(momentum)
    lines = printed(CUSTOM)
    assert len(lines) == 2
    for line in lines:
        np.testing.assert_array_equal(_numbers(line), [*table.ravel(), *momentum[1]])
        _same([line], CUSTOM)


def test_names_in_the_tables_exist():
    names = set(re.findall(r"`(distopt(?:\.\w+)+)", _PAGE.partition("## Names")[2]))
    assert len(names) > 10
    for name in names:
        module, _, last = name.rpartition(".")
        package = importlib.import_module(module)
        if not hasattr(package, last):
            importlib.import_module(name)
