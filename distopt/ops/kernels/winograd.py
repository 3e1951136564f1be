"""Winograd (Toom-Cook) convolution of stride 1: 3x3 and 5x5 kernels with a third of the arithmetic.

F(m, r) computes m outputs of an r-tap correlation with t = m + r - 1 products instead of m * r:
inputs and taps are seen as polynomials, evaluated at t points, multiplied, and interpolated (A.
Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; S. Winograd,
"Arithmetic Complexity of Computations", 1980). In two dimensions a tile of t x t inputs gives m x m
outputs by

    Y = A^T [ (G g G^T) * (B^T d B) ] A,

and the products of all tiles and channels at one of the t * t places are one matrix product. Both
transforms are done as one product with a Kronecker square, because a 64 x 64 product runs at the
machine's peak where two 8 x 8 ones would not.

The gradients are the adjoint of the same expression. The transformed input is kept for the weight
gradient, and the transformed output gradient serves the data gradient and the weight gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from distopt.backend import Array
from distopt.ops.kernels.activation import BiasRelu
from distopt.ops.kernels.geometry import Axis
from distopt.ops.kernels.stages import Context, Saved, Scratch, Sum

__all__ = ["TILE", "WinogradKernel", "transforms"]

TILE = 4
"""Outputs per tile and axis. Errors grow with it: see docs/results/cpu_kernels.md."""

_POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2", "-1/2"))


@functools.cache
def transforms(outputs: int, taps: int) -> tuple[Array, Array, Array]:
    """Return A^T [m, t], G [t, r] and B^T [t, t] of F(m, r) in float64, exactly rounded.

    The points are 0, 1, -1, 2, -2, 1/2, -1/2 as far as needed, and infinity. With V_n the
    Vandermonde matrix of n columns at these points, A^T = V_m^T, G = V_r / N and B^T = N V_t^-T,
    where the scale N of a point is the product of its differences from the others (it makes B^T
    small integers).

    Raises:
        ValueError: m + r - 1 is not between 2 and 8.
    """
    tile = outputs + taps - 1
    if not 2 <= tile <= len(_POINTS) + 1:
        raise ValueError(f"F({outputs}, {taps}) needs {tile} points; 2 to {len(_POINTS) + 1} are possible.")
    points = _POINTS[: tile - 1]

    def vandermonde(columns: int) -> list[list[Fraction]]:
        finite = [[point**power for power in range(columns)] for point in points]
        return [*finite, [Fraction(int(power == columns - 1)) for power in range(columns)]]

    scales = [
        functools.reduce(lambda a, b: a * b, (p - q for q in points if q != p), Fraction(1)) for p in points
    ] + [Fraction(1)]
    inverse = _inverse(vandermonde(tile))
    analysis = [[scales[i] * inverse[j][i] for j in range(tile)] for i in range(tile)]
    kernel = [[value / scales[i] for value in row] for i, row in enumerate(vandermonde(taps))]
    synthesis = np.array(vandermonde(outputs), np.float64).T
    return synthesis, np.array(kernel, np.float64), np.array(analysis, np.float64)


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    size = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = next(k for k in range(i, size) if rows[k][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(size):
            if k != i and rows[k][i] != 0:
                factor = rows[k][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[size:] for row in rows]


@functools.cache
def _squares(taps: int) -> tuple[Array, Array, Array]:
    """Return the transforms of tiles: synthesis, kernel, and analysis in two halves.

    Along the columns of a tile the analysis is done for a point p and its opposite -p together: their
    rows of B^T agree in the even columns and differ by the sign in the odd ones. A product with half
    the columns gives the even part for (0, p1, p2, ...), another the odd part for (p1, p2, ...,
    infinity); sum and difference are the values at p and -p, so the places are in the order
    (half, row, column) with 0, p1, p2 ... in the first half and -p1, -p2, ..., infinity in the second.
    """
    synthesis, kernel, analysis = transforms(TILE, taps)
    tile = len(analysis)
    even, odd = [0, *range(1, tile - 1, 2)], [*range(2, tile - 1, 2), tile - 1]
    places = np.arange(tile * tile).reshape(tile, tile)
    order = np.concatenate([places[:, even].ravel(), places[:, odd].ravel()])
    halves = [
        np.kron(analysis, analysis[even, 0::2]),
        np.kron(analysis, analysis[[*even[1:], tile - 1], 1::2]),
    ]
    return (
        np.kron(synthesis, synthesis)[:, order],
        np.kron(kernel, kernel)[order],
        np.stack(halves),
    )


class WinogradKernel:
    """y = relu(conv(x, w) + b) for square kernels of 2 to 5 taps at stride 1, with the gradients.

    Args:
        context: what it is bound to.
        rows: the window over the height.
        columns: the window over the width.
        parameters: w [r, r, C, K], and a bias [K] or nothing.
        relu: whether negative results become zero.
    """

    def __init__(
        self, context: Context, rows: Axis, columns: Axis, parameters: Sequence[Array], relu: bool
    ) -> None:
        self._context, self._rows, self._columns = context, rows, columns
        self._xp = context.device.xp
        self._scratch = Scratch(context)
        weights = parameters[0]
        self._shape = weights.shape
        taps, _, self._depth, self._outputs = weights.shape
        self._tile = TILE + taps - 1
        synthesis, kernel, analysis = _squares(taps)
        self._synthesis = self._constant(synthesis)
        self._synthesis_adjoint = self._constant(synthesis.T)
        self._analysis = self._constant(analysis)
        self._analysis_adjoint = self._constant(analysis.transpose(0, 2, 1))
        self._kernel = self._constant(kernel)
        self._weights = weights
        places = self._tile * self._tile
        # Tiles over the height and the width; the last may reach beyond the output.
        self._tiles = (-(-rows.out // TILE), -(-columns.out // TILE))
        self._products = self._kernel @ weights.reshape(taps * taps, -1)
        self._products = self._products.reshape(places, self._depth, self._outputs)
        self._products_adjoint: Array | None = None
        self._sum = Sum(context, (places, self._depth, self._outputs))
        self._tail = BiasRelu(context, parameters[1:], relu)
        self._inside, self._tile_view = self._padded_input()

    def forward(self, x: Array, y: Array, keep: bool) -> Saved:
        """Compute one piece; see `Kernel.forward`."""
        n, xp, places = len(x), self._xp, self._tile * self._tile
        tiles = self._gather(x)
        count = n * self._tiles[0] * self._tiles[1]
        reserve = self._scratch.fresh if keep else self._scratch.take
        analysed = reserve("analysed", (places, count * self._depth))
        xp.matmul(self._analysis, tiles, out=analysed.reshape(tiles.shape))
        self._cross(analysed)
        analysed = analysed.reshape(places, count, self._depth)
        products = self._scratch.take("products", (places, count, self._outputs))
        xp.matmul(analysed, self._products, out=products)
        results = self._scratch.take("results", (TILE * TILE, count * self._outputs))
        xp.matmul(self._synthesis, products.reshape(places, -1), out=results)
        self._scatter(results, y)
        self._tail.forward(y)
        return (analysed, y) if keep else ()

    def backward(self, dy: Array, saved: Saved, dx: Array | None) -> None:
        """Go back through one piece; see `Kernel.backward`."""
        analysed, y = saved
        n, xp, places = len(dy), self._xp, self._tile * self._tile
        count = n * self._tiles[0] * self._tiles[1]
        results = self._gather_outputs(self._tail.backward(dy, y))
        products = self._scratch.take("products", (places, count * self._outputs))
        xp.matmul(self._synthesis_adjoint, results, out=products)
        products = products.reshape(places, count, self._outputs)
        self._sum.add_product(analysed.transpose(0, 2, 1), products)
        if dx is None:
            return
        if self._products_adjoint is None:
            self._products_adjoint = xp.ascontiguousarray(self._products.transpose(0, 2, 1))
        gradient = self._scratch.take("analysed gradient", (places, count, self._depth))
        xp.matmul(products, self._products_adjoint, out=gradient)
        self._cross(gradient)
        tiles = self._scratch.take("tiles", (2, places // 2, count * self._depth))
        xp.matmul(self._analysis_adjoint, gradient.reshape(tiles.shape), out=tiles)
        self._fold(tiles, dx)

    def parameter_gradients(self) -> list[Array]:
        """Return [dw] or [dw, db]; see `Kernel.parameter_gradients`."""
        places = self._tile * self._tile
        dw = self._kernel.T @ self._sum.result().reshape(places, -1)
        return [dw.reshape(self._shape), *self._tail.gradients()]

    def _cross(self, analysed: Array) -> None:
        """Turn even and odd parts into the values at p and at -p, in place (or back: the adjoint)."""
        parts = analysed.reshape(2, self._tile, self._tile // 2, -1)
        even, odd = parts[0, :, 1:], parts[1, :, :-1]
        difference = self._scratch.take("difference", even.shape)
        self._xp.subtract(even, odd, out=difference)
        even += odd
        odd[...] = difference

    def _constant(self, matrix: Array) -> Array:
        return self._context.device.asarray(np.ascontiguousarray(matrix), self._context.dtype)

    def _padded_input(self) -> tuple[Array, Array]:
        """Return where images go among zeros, and the view of that as overlapping tiles."""
        piece, tile, (down, across) = self._context.piece, self._tile, self._tiles
        border = tile - TILE
        padded = self._context.device.zeros(
            (piece, down * TILE + border, across * TILE + border, self._depth), self._context.dtype
        )
        image, row, column, value = padded.strides
        view = self._xp.lib.stride_tricks.as_strided(
            padded,
            (2, tile, tile // 2, piece, down, across, self._depth),
            (column, row, 2 * column, image, row * TILE, column * TILE, value),
        )
        top, left = self._rows.before, self._columns.before
        return padded[:, top : top + self._rows.size, left : left + self._columns.size], view

    def _gather(self, x: Array) -> Array:
        """Copy overlapping tiles to [2, tile * tile / 2, n * tile rows * tile columns * C].

        The even columns of a tile come first, then the odd ones.
        """
        n, tile, (down, across) = len(x), self._tile, self._tiles
        self._inside[:n] = x
        tiles = self._scratch.take("tiles", (2, tile, tile // 2, n, down, across, self._depth))
        self._xp.copyto(tiles, self._tile_view[:, :, :, :n])
        return tiles.reshape(2, tile * tile // 2, -1)

    def _fold(self, tiles: Array, dx: Array) -> None:
        """Add overlapping tiles up to dx [n, H, W, C]: the adjoint of `_gather`."""
        n, tile, (down, across), depth = len(dx), self._tile, self._tiles, self._depth
        tiles = tiles.reshape(2, tile, tile // 2, n, down, across, depth).transpose(1, 2, 0, 3, 4, 5, 6)
        parts = -(-tile // TILE)  # a tile reaches into this many of the TILE-sized blocks per axis
        # Place in the block first: so the sums run over whole rows of tiles.
        blocks = self._scratch.take(
            "blocks", (TILE, TILE // 2, 2, n, down + parts - 1, across + parts - 1, depth)
        )
        blocks.fill(0)
        for a in range(parts):
            rows = slice(a * TILE, min(tile, (a + 1) * TILE))
            for b in range(parts):
                columns = slice(b * TILE // 2, min(tile, (b + 1) * TILE) // 2)
                part = tiles[rows, columns]
                target = blocks[: len(part), : part.shape[1], :, :, a : a + down, b : b + across]
                target += part
        padded = self._scratch.take(
            "sums", (n, (down + parts - 1) * TILE, (across + parts - 1) * TILE, depth)
        )
        images = blocks.transpose(3, 4, 0, 5, 1, 2, 6)
        self._xp.copyto(padded.reshape(images.shape), images)
        top, left = self._rows.before, self._columns.before
        self._xp.copyto(dx, padded[:, top : top + dx.shape[1], left : left + dx.shape[2]])

    def _scatter(self, results: Array, y: Array) -> None:
        """Copy disjoint tiles [m * m, n * tile rows * tile columns * K] to y [n, H, W, K]."""
        n, (down, across), outputs = len(y), self._tiles, self._outputs
        tiles = results.reshape(TILE, TILE, n, down, across, outputs).transpose(2, 3, 0, 4, 1, 5)
        if y.shape[1:3] == (down * TILE, across * TILE):
            y.reshape(tiles.shape)[...] = tiles
            return
        whole = self._scratch.take("whole", tiles.shape)
        whole[...] = tiles
        y[...] = whole.reshape(n, down * TILE, across * TILE, outputs)[:, : y.shape[1], : y.shape[2]]

    def _gather_outputs(self, dy: Array) -> Array:
        """Copy dy [n, H, W, K] to disjoint tiles [m * m, n * tile rows * tile columns * K]."""
        n, (down, across), outputs = len(dy), self._tiles, self._outputs
        if dy.shape[1:3] != (down * TILE, across * TILE):
            whole = self._scratch.zeros(
                "whole gradient", (self._context.piece, down * TILE, across * TILE, outputs)
            )[:n]
            whole[:, : dy.shape[1], : dy.shape[2]] = dy
            dy = whole
        tiles = dy.reshape(n, down, TILE, across, TILE, outputs).transpose(2, 4, 0, 1, 3, 5)
        results = self._scratch.take("results", tiles.shape)
        results[...] = tiles
        return results.reshape(TILE * TILE, -1)
