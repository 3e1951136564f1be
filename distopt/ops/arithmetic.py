"""Elementwise arithmetic, casts and the matrix product, each with its vector-Jacobian product beside it."""

from __future__ import annotations

from typing import Any

from distopt.backend import namespace
from distopt.ops.broadcasting import unbroadcast
from distopt.ops.selection import select
from distopt.tape import Context, primitive
from distopt.variables import operators, value_of

__all__ = [
    "absolute",
    "add",
    "cast",
    "divide",
    "exp",
    "log",
    "matmul",
    "maximum",
    "minimum",
    "multiply",
    "negative",
    "power",
    "sqrt",
    "square",
    "subtract",
    "tanh",
]


@primitive
def add(context: Context, a: Any, b: Any) -> Any:
    """Return `a + b`, broadcast."""
    return a + b


@add.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    return _for_both(context, a, b, lambda: upstream, lambda: upstream)


@primitive
def subtract(context: Context, a: Any, b: Any) -> Any:
    """Return `a - b`, broadcast."""
    return a - b


@subtract.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    return _for_both(context, a, b, lambda: upstream, lambda: -upstream)


@primitive
def multiply(context: Context, a: Any, b: Any) -> Any:
    """Return `a * b`, broadcast."""
    return a * b


@multiply.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    return _for_both(context, a, b, lambda: upstream * b, lambda: upstream * a)


@primitive
def divide(context: Context, a: Any, b: Any) -> Any:
    """Return `a / b`, broadcast."""
    return a / b


@divide.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    return _for_both(context, a, b, lambda: upstream / b, lambda: -upstream * a / (b * b))


@primitive
def power(context: Context, a: Any, b: Any) -> Any:
    """Return `a ** b`, broadcast. The gradient by the exponent is taken as 0 where `a` is not positive."""
    return a**b


@power.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs

    def by_base() -> Any:
        if isinstance(b, int | float) and b == 0:
            return upstream * 0  # 0 * a ** -1 would be NaN where a is 0
        return upstream * b * a ** (b - 1)

    def by_exponent() -> Any:
        positive = namespace(value_of(upstream)).asarray(value_of(a)) > 0
        logarithm = log.alike(select.alike(a, 1, condition=positive))
        return upstream * select.alike(context.output * logarithm, 0, condition=positive)

    return _for_both(context, a, b, by_base, by_exponent)


@primitive
def maximum(context: Context, a: Any, b: Any) -> Any:
    """Return the larger of `a` and `b`, broadcast; at a tie the gradient goes to `a`."""
    return namespace(a, b).maximum(a, b)


@maximum.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = map(value_of, context.inputs)
    return _for_both(context, a, b, lambda: upstream * (a >= b), lambda: upstream * (a < b))


@primitive
def minimum(context: Context, a: Any, b: Any) -> Any:
    """Return the smaller of `a` and `b`, broadcast; at a tie the gradient goes to `a`."""
    return namespace(a, b).minimum(a, b)


@minimum.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = map(value_of, context.inputs)
    return _for_both(context, a, b, lambda: upstream * (a <= b), lambda: upstream * (a > b))


def _for_both(context: Context, a: Any, b: Any, by_a: Any, by_b: Any) -> tuple[Any, Any]:
    return (
        unbroadcast(by_a(), a) if context.needs[0] else None,
        unbroadcast(by_b(), b) if context.needs[1] else None,
    )


@primitive
def negative(context: Context, x: Any) -> Any:
    """Return `-x`."""
    return -x


@negative.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (-upstream,)


@primitive
def absolute(context: Context, x: Any) -> Any:
    """Return `|x|`; its gradient at 0 is 0."""
    return abs(x)


@absolute.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    x = value_of(context.inputs[0])
    return (upstream * namespace(x).sign(x),)


@primitive
def square(context: Context, x: Any) -> Any:
    """Return `x * x`."""
    return x * x


@square.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (2 * upstream * context.inputs[0],)


@primitive
def sqrt(context: Context, x: Any) -> Any:
    """Return the square root of `x`."""
    return namespace(x).sqrt(x)


@sqrt.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream / (2 * context.output),)


@primitive
def exp(context: Context, x: Any) -> Any:
    """Return `e ** x`."""
    return namespace(x).exp(x)


@exp.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream * context.output,)


@primitive
def log(context: Context, x: Any) -> Any:
    """Return the natural logarithm of `x`."""
    return namespace(x).log(x)


@log.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream / context.inputs[0],)


@primitive
def tanh(context: Context, x: Any) -> Any:
    """Return the hyperbolic tangent of `x`."""
    return namespace(x).tanh(x)


@tanh.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream * (1 - context.output * context.output),)


@primitive
def cast(context: Context, x: Any, *, dtype: Any) -> Any:
    """Return `x` with elements of another dtype; gradients flow between floating dtypes."""
    return x.astype(dtype)


@cast.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream.astype(context.inputs[0].dtype),)


@primitive
def matmul(context: Context, a: Any, b: Any) -> Any:
    """Return the matrix product of `a` [n, k] and `b` [k, m].

    Raises:
        ValueError: they are not matrices whose inner lengths agree.
    """
    shapes = tuple(getattr(a, "shape", ())), tuple(getattr(b, "shape", ()))
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
        raise ValueError(f"matmul needs shapes [n, k] and [k, m], got {shapes[0]} and {shapes[1]}")
    return a @ b


@matmul.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    return (
        _product(upstream, b.T, context.destination(0)) if context.needs[0] else None,
        _product(a.T, upstream, context.destination(1)) if context.needs[1] else None,
    )


def _product(a: Any, b: Any, out: Any) -> Any:
    return a @ b if out is None else namespace(a).matmul(a, b, out=out)


for _linear in (add, subtract, negative, cast):
    _linear.linear = True

operators.update(
    add=add,
    subtract=subtract,
    multiply=multiply,
    divide=divide,
    power=power,
    negative=negative,
    absolute=absolute,
    cast=cast,
    matmul=matmul,
)
