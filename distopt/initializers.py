"""Initializers: the first values of variables, functions of shape, dtype, seed and name alone.

    initializer(shape, dtype, name="conv1/weights", seed=0) -> NumPy array

Names, arguments and defaults are those of `tf.keras.initializers`. Random ones are counter-based:
NumPy's Philox generator is keyed by a hash of (seed, name), so a value depends neither on the rank,
nor on the order in which variables are made, nor on which others there are; and it is computed in
float64, so float32 and float64 models start from the same numbers. Variables of one shape and
different names get different values. `get_variable` passes the full name and the graph's seed;
where an initializer is called without a name, equal shapes give equal values.

    >>> GlorotUniform()((2, 3), name="a").tolist() == GlorotUniform()((2, 3), name="a").tolist()
    True
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from distopt.backend import Array

__all__ = [
    "Initializer",
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "LecunNormal",
    "Ones",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "VarianceScaling",
    "Zeros",
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "ones",
    "random_normal",
    "random_uniform",
    "truncated_normal",
    "variance_scaling",
    "zeros",
]

# Standard deviation of a standard normal distribution cut off at two.
_TRUNCATED_STDDEV = 0.87962566103423978


class Initializer(abc.ABC):
    """Base of the initializers."""

    @abc.abstractmethod
    def __call__(
        self,
        shape: Sequence[int],
        dtype: Any = np.float32,
        *,
        name: str = "",
        seed: int = 0,
    ) -> Array:
        """Return the first value of a variable.

        Args:
            shape: shape of the value.
            dtype: NumPy dtype of the value.
            name: full name of the variable. Only random initializers look at it.
            seed: the model's seed. Only random initializers without a seed of their own look at it.
        """

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Zeros(Initializer):
    """All zeros (False for booleans)."""

    def __call__(
        self, shape: Sequence[int], dtype: Any = np.float32, *, name: str = "", seed: int = 0
    ) -> Array:
        """Return zeros."""
        return np.zeros(tuple(shape), dtype)

    def get_config(self) -> dict[str, Any]:
        """Return an empty dictionary: there are no arguments."""
        return {}


class Ones(Initializer):
    """All ones."""

    def __call__(
        self, shape: Sequence[int], dtype: Any = np.float32, *, name: str = "", seed: int = 0
    ) -> Array:
        """Return ones."""
        return np.ones(tuple(shape), dtype)

    def get_config(self) -> dict[str, Any]:
        """Return an empty dictionary: there are no arguments."""
        return {}


class Constant(Initializer):
    """One number everywhere, or given numbers in row-major order.

    Args:
        value: a number, or an array-like with as many elements as the variable.
    """

    def __init__(self, value: Any = 0.0) -> None:
        self.value = value

    def __call__(
        self, shape: Sequence[int], dtype: Any = np.float32, *, name: str = "", seed: int = 0
    ) -> Array:
        """Return the constant in the shape asked for.

        Raises:
            ValueError: it has neither one element nor as many as the shape.
        """
        values = np.asarray(self.value)
        if values.ndim == 0:
            return np.full(tuple(shape), values, dtype)
        if values.size != math.prod(shape):
            raise ValueError(
                f"Constant has {values.size} values, but variable {name!r} of shape {tuple(shape)} "
                f"needs {math.prod(shape)}. Give one number, or as many as the shape has elements."
            )
        return values.reshape(tuple(shape)).astype(dtype)

    def get_config(self) -> dict[str, Any]:
        """Return {"value": ...}, arrays as lists."""
        return {"value": np.asarray(self.value).tolist()}


class _Random(Initializer):
    """Base of the random ones: opens the stream of (seed, name), and casts what `_draw` returns."""

    seed: int | None

    def __call__(
        self, shape: Sequence[int], dtype: Any = np.float32, *, name: str = "", seed: int = 0
    ) -> Array:
        """Return random numbers that depend on (seed, name) and on the shape only.

        Raises:
            TypeError: `dtype` is no floating-point type.
        """
        dtype = np.dtype(dtype)
        # Kind "V" is what ml_dtypes' bfloat16 shows.
        if dtype.kind not in "fV":
            raise TypeError(
                f"{type(self).__name__} makes floating-point numbers; variable {name!r} is to have "
                f"dtype {dtype}. Use a floating-point dtype, or Zeros, Ones or Constant."
            )
        return self._draw(_stream(seed if self.seed is None else self.seed, name), shape).astype(dtype)

    @abc.abstractmethod
    def _draw(self, stream: np.random.Generator, shape: Sequence[int]) -> Array:
        """Return float64 numbers of the shape."""


class RandomNormal(_Random):
    """Normal distribution.

    Args:
        mean: mean.
        stddev: standard deviation.
        seed: used instead of the model's seed.

    Raises:
        ValueError: `stddev` is negative.
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        _check_not_negative("stddev", stddev)
        self.mean = mean
        self.stddev = stddev
        self.seed = seed

    def _draw(self, stream: np.random.Generator, shape: Sequence[int]) -> Array:
        return self.mean + self.stddev * stream.standard_normal(tuple(shape))

    def get_config(self) -> dict[str, Any]:
        """Return the three arguments."""
        return {"mean": self.mean, "stddev": self.stddev, "seed": self.seed}


class TruncatedNormal(RandomNormal):
    """Normal distribution whose values beyond two standard deviations are drawn again.

    As in TensorFlow `stddev` is that of the uncut distribution: the values have 0.88 of it.

    Args:
        mean: mean.
        stddev: standard deviation before the cut.
        seed: used instead of the model's seed.

    Raises:
        ValueError: `stddev` is negative.
    """

    def _draw(self, stream: np.random.Generator, shape: Sequence[int]) -> Array:
        return self.mean + self.stddev * _truncated(stream, shape)


class RandomUniform(_Random):
    """Uniform distribution over [minval, maxval).

    Args:
        minval: lower end.
        maxval: upper end.
        seed: used instead of the model's seed.

    Raises:
        ValueError: `minval` is above `maxval`.
    """

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        if not minval <= maxval:
            raise ValueError(f"minval must not be above maxval, got {minval} and {maxval}.")
        self.minval = minval
        self.maxval = maxval
        self.seed = seed

    def _draw(self, stream: np.random.Generator, shape: Sequence[int]) -> Array:
        return self.minval + (self.maxval - self.minval) * stream.random(tuple(shape))

    def get_config(self) -> dict[str, Any]:
        """Return the three arguments."""
        return {"minval": self.minval, "maxval": self.maxval, "seed": self.seed}


class VarianceScaling(_Random):
    """Random numbers of variance `scale / fan`, so that signals keep their size through a layer.

    The fans of a shape [..., inputs, outputs] are the inputs and the outputs times the product of
    the axes before them (the area of a filter); a vector has its length for both.

    Args:
        scale: the variance times the fan.
        mode: "fan_in", "fan_out" or their mean "fan_avg".
        distribution: "truncated_normal" (cut at two standard deviations of the uncut distribution
            and widened so that the variance holds), "untruncated_normal" or "uniform"; "normal" is
            the first.
        seed: used instead of the model's seed.

    Raises:
        ValueError: `scale` is not positive, or `mode` or `distribution` is another word.

    Source: He et al., 2015, https://arxiv.org/abs/1502.01852 (scale 2, fan_in); Glorot and Bengio,
    AISTATS 2010 (scale 1, fan_avg).
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
        distribution: Literal[
            "truncated_normal", "untruncated_normal", "uniform", "normal"
        ] = "truncated_normal",
        seed: int | None = None,
    ) -> None:
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {scale}.")
        if mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ValueError(f"mode must be 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}.")
        if distribution not in ("truncated_normal", "untruncated_normal", "uniform", "normal"):
            raise ValueError(
                "distribution must be 'truncated_normal', 'untruncated_normal' or 'uniform', "
                f"got {distribution!r}."
            )
        self.scale = scale
        self.mode = mode
        self.distribution = distribution
        self.seed = seed

    def _draw(self, stream: np.random.Generator, shape: Sequence[int]) -> Array:
        fan_in, fan_out = _fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        variance = self.scale / max(1.0, fan)
        if self.distribution == "uniform":
            limit = math.sqrt(3.0 * variance)
            return limit * (2.0 * stream.random(tuple(shape)) - 1.0)
        if self.distribution == "untruncated_normal":
            return math.sqrt(variance) * stream.standard_normal(tuple(shape))
        return math.sqrt(variance) / _TRUNCATED_STDDEV * _truncated(stream, shape)

    def get_config(self) -> dict[str, Any]:
        """Return the four arguments."""
        return {
            "scale": self.scale,
            "mode": self.mode,
            "distribution": self.distribution,
            "seed": self.seed,
        }


class _Preset(VarianceScaling):
    """A `VarianceScaling` of which only the seed is left to choose."""

    def get_config(self) -> dict[str, Any]:
        """Return {"seed": ...}."""
        return {"seed": self.seed}


class GlorotUniform(_Preset):
    """Uniform over +-sqrt(6 / (fan_in + fan_out)); also called Xavier. The default of get_variable.

    Args:
        seed: used instead of the model's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(1.0, "fan_avg", "uniform", seed)


class GlorotNormal(_Preset):
    """Truncated normal of variance 2 / (fan_in + fan_out).

    Args:
        seed: used instead of the model's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(1.0, "fan_avg", "truncated_normal", seed)


class HeNormal(_Preset):
    """Truncated normal of variance 2 / fan_in, for layers with ReLU.

    Args:
        seed: used instead of the model's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(2.0, "fan_in", "truncated_normal", seed)


class HeUniform(_Preset):
    """Uniform over +-sqrt(6 / fan_in), for layers with ReLU.

    Args:
        seed: used instead of the model's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(2.0, "fan_in", "uniform", seed)


class LecunNormal(_Preset):
    """Truncated normal of variance 1 / fan_in.

    Args:
        seed: used instead of the model's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(1.0, "fan_in", "truncated_normal", seed)


constant = Constant
glorot_normal = GlorotNormal
glorot_uniform = GlorotUniform
he_normal = HeNormal
he_uniform = HeUniform
lecun_normal = LecunNormal
ones = Ones
random_normal = RandomNormal
random_uniform = RandomUniform
truncated_normal = TruncatedNormal
variance_scaling = VarianceScaling
zeros = Zeros


def _stream(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _truncated(stream: np.random.Generator, shape: Sequence[int]) -> Array:
    values = np.asarray(stream.standard_normal(math.prod(shape)))
    beyond = np.flatnonzero(np.abs(values) > 2.0)
    while beyond.size:
        values[beyond] = stream.standard_normal(beyond.size)
        beyond = beyond[np.abs(values[beyond]) > 2.0]
    return values.reshape(tuple(shape))


def _fans(shape: Sequence[int]) -> tuple[float, float]:
    if len(shape) < 2:
        length = float(math.prod(shape))
        return length, length
    area = math.prod(shape[:-2])
    return float(shape[-2] * area), float(shape[-1] * area)


def _check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value}.")
