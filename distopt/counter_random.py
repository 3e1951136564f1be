"""Random numbers as pure functions of (seed, stream, epoch, example index): Philox4x32-10.

There is no generator and no state. Whoever needs the numbers of an example computes them, on
whichever rank, in whichever order and however the batch is split, and gets the same bits; nothing
has to be saved in a checkpoint. A number's address is a 128-bit counter of four 32-bit words,

    (block, index, epoch, stream)        under the 64-bit key `seed`,

where `block` counts the groups of four words that one address gives, `index` is the example,
and `stream` separates the purposes (see `stream`), so that shuffling, augmentation and each dropout
layer never see each other's numbers.

The function is Philox4x32 with 10 rounds: J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011. All of it is integer arithmetic, so words, uniforms
and permutations are the same bits on every machine and device. Normals go through `log` and `cos`,
whose last bit depends on the processor: initial values are therefore broadcast, not drawn on each
rank.
"""

from __future__ import annotations

import zlib
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, namespace

__all__ = [
    "normal",
    "permutation",
    "philox4x32",
    "stream",
    "truncated_normal",
    "uniform",
    "words",
]

Integers: TypeAlias = "int | Array"

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_CHUNK = 8192  # counters at a time: six uint64 arrays of this length stay in a core's L2 cache
_REDRAW_BLOCKS = 1 << 27  # blocks between two attempts of the truncated normal


def stream(purpose: str) -> int:
    """Return the number of the stream named `purpose`: its CRC-32, the same everywhere.

    >>> stream("shuffle") == stream("augment")
    False
    """
    return zlib.crc32(purpose.encode())


_SHUFFLE = stream("distopt.shuffle")


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Array:
    """Apply the Philox4x32-10 bijection to counters.

    Args:
        counter: four words of 32 bits each: integers, or arrays of them that broadcast together.
        key: two words of 32 bits.

    Returns:
        uint32 array of shape [..., 4], where ... is the broadcast shape of the counter's words.
    """
    xp = namespace(*counter)
    c0, c1, c2, c3 = (xp.asarray(word, dtype=xp.uint64) for word in counter)
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    state = [xp.array(xp.broadcast_to(word, shape)) for word in (c0, c1, c2, c3)]
    _permute(state, key, xp)
    return xp.stack(state, axis=-1).astype(xp.uint32)  # type: ignore[no-any-return]


def _permute(state: list[Array], key: tuple[int, int], xp: Any) -> None:
    """Run the ten rounds in place on four uint64 arrays that hold 32-bit words."""
    c0, c1, c2, c3 = state
    product_0, product_1 = xp.empty_like(c0), xp.empty_like(c0)
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        xp.multiply(c0, _MULTIPLIERS[0], out=product_0)
        xp.multiply(c2, _MULTIPLIERS[1], out=product_1)
        xp.right_shift(product_1, _HALF, out=c0)
        xp.bitwise_xor(c0, c1, out=c0)
        xp.bitwise_xor(c0, np.uint64(key_0), out=c0)
        xp.bitwise_and(product_1, _LOW, out=c1)
        xp.right_shift(product_0, _HALF, out=c2)
        xp.bitwise_xor(c2, c3, out=c2)
        xp.bitwise_xor(c2, np.uint64(key_1), out=c2)
        xp.bitwise_and(product_0, _LOW, out=c3)
        key_0 = (key_0 + _KEY_INCREMENTS[0]) & 0xFFFFFFFF
        key_1 = (key_1 + _KEY_INCREMENTS[1]) & 0xFFFFFFFF


def words(seed: int, stream: int, epoch: Integers, index: Integers, count: int) -> Array:
    """Return `count` random 32-bit words for each example.

    Asking for more words gives the same ones first.

    Args:
        seed: any integer in [0, 2**64).
        stream: number of the purpose, from `stream`.
        epoch: integer or integer array in [0, 2**32).
        index: example index, integer or integer array in [0, 2**32); broadcasts with `epoch`.
        count: words per example, at most 2**34.

    Returns:
        uint32 array of shape [*broadcast shape of epoch and index, count], on the device of
        `index`.

    Raises:
        TypeError: `epoch` or `index` is not of an integer dtype.
        ValueError: an argument is out of its range.

    Cost: about 6 ns per word on a CPU core.
    """
    xp, shape, epochs, indices = _addresses(seed, stream, epoch, index, count)
    blocks = -(-count // 4)
    total = epochs.size * blocks
    result = xp.empty((total, 4), dtype=xp.uint32)
    # CuPy runs one kernel per line: there, pieces would only cost launches.
    chunk = _CHUNK if xp is np else max(total, 1)
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        flat = xp.arange(begin, end, dtype=xp.int64)
        rows = flat // blocks
        flat -= rows * blocks
        _fill(result[begin:end], seed, stream, epochs[rows], indices[rows], flat, xp)
    return result.reshape((*shape, blocks * 4))[..., :count]  # type: ignore[no-any-return]


def _addresses(
    seed: int, stream: int, epoch: Integers, index: Integers, count: int
) -> tuple[Any, tuple[int, ...], Array, Array]:
    """Check arguments; return the namespace, broadcast shape, flat epochs and indices."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= stream < 1 << 32:
        raise ValueError(
            f"stream must be in [0, 2**32), got {stream}; counter_random.stream(purpose) gives one"
        )
    if not 0 <= count <= 1 << 34:
        raise ValueError(f"count must be in [0, 2**34], got {count}")
    xp = namespace(epoch, index)
    epochs, indices = _counter_word(epoch, "epoch", xp), _counter_word(index, "index", xp)
    shape = np.broadcast_shapes(epochs.shape, indices.shape)
    epochs = xp.broadcast_to(epochs, shape).reshape(-1)
    indices = xp.broadcast_to(indices, shape).reshape(-1)
    return xp, shape, epochs, indices


def _counter_word(value: Integers, name: str, xp: Any) -> Array:
    array = xp.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer, got dtype {array.dtype}")
    # On a GPU the check would have to wait for the device.
    if xp is np and array.size and not (array.min() >= 0 and array.max() < 1 << 32):
        raise ValueError(f"{name} must be in [0, 2**32), got values from {array.min()} to {array.max()}")
    return array.astype(xp.uint64)  # type: ignore[no-any-return]


def _fill(out: Array, seed: int, stream: int, epochs: Array, indices: Array, blocks: Array, xp: Any) -> None:
    """Write the groups of four words at flat arrays of addresses to `out`, uint32 [n, 4]."""
    state = [
        blocks.astype(xp.uint64),
        indices.astype(xp.uint64),
        epochs.astype(xp.uint64),
        xp.full(blocks.size, stream, dtype=xp.uint64),
    ]
    _permute(state, (seed & 0xFFFFFFFF, seed >> 32), xp)
    for position, column in enumerate(state):
        out[:, position] = column


def uniform(seed: int, stream: int, epoch: Integers, index: Integers, count: int) -> Array:
    """Return `count` numbers for each example, uniform on the multiples of 2**-24 in [0, 1).

    Args, shape and errors are those of `words`; the dtype is float32.
    """
    bits = words(seed, stream, epoch, index, count)
    result = (bits >> np.uint32(8)).astype(np.float32)
    result *= np.float32(2.0**-24)
    return result


def normal(seed: int, stream: int, epoch: Integers, index: Integers, count: int) -> Array:
    """Return `count` standard normal numbers for each example (Box and Muller).

    Args, shape and errors are those of `words`; the dtype is float64. G. Box and M. Muller, "A note
    on the generation of random normal deviates", 1958. Two 32-bit words each: values reach 6.8 at
    most.
    """
    bits = words(seed, stream, epoch, index, count + count % 2)
    return _box_muller(bits)[..., :count]


def _box_muller(bits: Array) -> Array:
    """Turn pairs of words, uint32 [..., 2 n], into pairs of normals, float64."""
    xp = namespace(bits)
    # Contiguous copies: NumPy may take another routine, with another last bit, for strided input.
    first = xp.ascontiguousarray(bits[..., 0::2], dtype=xp.float64)
    second = xp.ascontiguousarray(bits[..., 1::2], dtype=xp.float64)
    radius = xp.sqrt(-2.0 * xp.log((first + 0.5) * 2.0**-32))
    angle = second * (2.0 * np.pi * 2.0**-32)
    result = xp.empty(bits.shape, dtype=xp.float64)
    result[..., 0::2] = radius * xp.cos(angle)
    result[..., 1::2] = radius * xp.sin(angle)
    return result  # type: ignore[no-any-return]


def truncated_normal(
    seed: int, stream: int, epoch: Integers, index: Integers, count: int, bound: float = 2.0
) -> Array:
    """Return standard normal numbers; those beyond `bound` are drawn again, as in TensorFlow.

    The realised standard deviation is 0.8796 for the usual bound of two. Args, shape and errors are
    those of `words`; the dtype is float64. On a GPU each attempt waits for the device.

    Raises:
        ValueError: `bound` is below 0.5 (more than 60 % of the draws would be thrown away), or
            `count` is above 2**29.
    """
    if not bound >= 0.5:
        raise ValueError(f"bound must be at least 0.5 standard deviations, got {bound}; 2 is usual")
    if count > 4 * _REDRAW_BLOCKS:
        raise ValueError(f"count must be at most 2**29, got {count}; draw by rows instead")
    xp, _, epochs, indices = _addresses(seed, stream, epoch, index, count)
    result = xp.ascontiguousarray(normal(seed, stream, epoch, index, count))
    flat = result.reshape(-1)
    rejected = xp.flatnonzero(xp.abs(flat) > bound)
    attempt = 0
    while rejected.size:
        # Attempt k of a number stands k * 2**27 groups after its first draw, at the same place.
        # There is room for 32; with the widest rejection allowed, 0.62**31 of the numbers would
        # need more.
        attempt += 1
        rows, places = rejected // count, rejected % count
        blocks = places // 4 + (attempt * _REDRAW_BLOCKS & 0xFFFFFFFF)
        bits = xp.empty((rejected.size, 4), dtype=xp.uint32)
        _fill(bits, seed, stream, epochs[rows], indices[rows], blocks, xp)
        drawn = _box_muller(bits)[xp.arange(rejected.size), places % 4]
        flat[rejected] = drawn
        rejected = rejected[xp.abs(drawn) > bound]
    return result  # type: ignore[no-any-return]


def permutation(seed: int, epoch: int, n: int) -> Array:
    """Return the order in which the epoch visits `n` examples: a permutation, int64 [n], NumPy.

    The examples are sorted by 64-bit random keys; equal keys by their index.

    Raises:
        ValueError: `n` is below 1 or above 2**33, or `seed` or `epoch` is out of range.
    """
    if not 1 <= n <= 1 << 33:
        raise ValueError(f"a permutation needs 1 to 2**33 examples, got {n}")
    bits = words(seed, _SHUFFLE, epoch, 0, 2 * n).astype(np.uint64)
    keys = (bits[0::2] << _HALF) | bits[1::2]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
