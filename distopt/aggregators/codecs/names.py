"""Codecs by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from distopt.aggregators.codecs.casts import BFloat16, Half
from distopt.aggregators.codecs.codec import Codec
from distopt.aggregators.codecs.error_feedback import Compression, ErrorFeedback
from distopt.aggregators.codecs.int8 import Int8
from distopt.aggregators.codecs.powersgd import PowerSGD
from distopt.aggregators.codecs.sign import Sign
from distopt.aggregators.codecs.topk import TopK

__all__ = ["NAMES", "get"]

NAMES = {
    "fp16": "fp16[:BLOCK]",
    "bf16": "bf16",
    "int8": "int8[:BLOCK][:stochastic]",
    "sign": "sign[:BLOCK]",
    "topk": "topk:FRACTION or topk:COUNT, then [:CODEC] of the values",
    "powersgd": "powersgd[:RANK]",
}
"""How each codec is written."""


def get(name: str) -> Compression:
    """Return the codec of a name.

    Args:
        name: such as "fp16", "int8:1024:stochastic", "ef-topk:0.01" or "ef-topk:0.01:fp16"; "ef-" in front
            is error feedback.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    feedback = name.startswith("ef-")
    kind, *arguments = name.removeprefix("ef-").split(":")
    maker = _MAKERS.get(kind)
    if maker is None:
        raise _unreadable(name, "there is no such codec")
    try:
        codec = maker(arguments)
    except ValueError as error:
        raise _unreadable(name, str(error)) from error
    return ErrorFeedback(codec) if feedback else codec


def _unreadable(name: str, reason: str) -> ValueError:
    return ValueError(
        f"codec {name!r}: {reason}. There are {', '.join(NAMES.values())}; with ef- in front for error "
        "feedback, as in ef-topk:0.01:fp16"
    )


def _int8(arguments: list[str]) -> Int8:
    stochastic = arguments[-1:] == ["stochastic"]
    return Int8(*_integers(arguments[:-1] if stochastic else arguments), stochastic=stochastic)


def _bfloat16(arguments: list[str]) -> BFloat16:
    if arguments:
        raise ValueError(f"bf16 has no arguments, got {':'.join(arguments)!r}")
    return BFloat16()


def _topk(arguments: list[str]) -> TopK:
    amount = arguments[0] if arguments else ""
    values: Compression | None = get(":".join(arguments[1:])) if arguments[1:] else None
    if values is not None and not isinstance(values, Codec):
        raise ValueError(f"{values.name} can't encode the values of top-k")
    return TopK(int(amount) if amount.isdigit() else _fraction(amount), values)


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"topk needs a fraction or a number, as in topk:0.01; got {text!r}") from None


def _integers(arguments: list[str]) -> list[int]:
    if len(arguments) > 1 or not all(text.isdigit() for text in arguments):
        raise ValueError(f"expected one whole number at most, got {':'.join(arguments)!r}")
    return [int(text) for text in arguments]


_MAKERS: dict[str, Callable[[list[str]], Codec | PowerSGD]] = {
    "fp16": lambda arguments: Half(*_integers(arguments)),
    "bf16": _bfloat16,
    "int8": _int8,
    "sign": lambda arguments: Sign(*_integers(arguments)),
    "topk": _topk,
    "powersgd": lambda arguments: PowerSGD(*_integers(arguments)),
}
