"""Codecs: gradients in fewer bytes, for `aggregators.Compressed`. See docs/codecs.md."""

from distopt.aggregators.codecs.casts import BFloat16, Half
from distopt.aggregators.codecs.codec import Codec, Place
from distopt.aggregators.codecs.error_feedback import Compression, ErrorFeedback
from distopt.aggregators.codecs.int8 import Int8
from distopt.aggregators.codecs.names import NAMES, get
from distopt.aggregators.codecs.powersgd import PowerSGD
from distopt.aggregators.codecs.sign import Sign
from distopt.aggregators.codecs.topk import TopK

__all__ = [
    "NAMES",
    "BFloat16",
    "Codec",
    "Compression",
    "ErrorFeedback",
    "Half",
    "Int8",
    "Place",
    "PowerSGD",
    "Sign",
    "TopK",
    "get",
]
