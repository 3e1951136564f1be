"""What the kernels must compute, written as the definitions say, in float64 and slowly."""

from __future__ import annotations

import math

import numpy as np


def same(size: int, window: int, stride: int) -> tuple[int, int]:
    """Outputs and padding before, by TensorFlow's documentation."""
    out = math.ceil(size / stride)
    total = max(window - (size % stride or stride), 0)
    return out, total // 2


def valid(size: int, window: int, stride: int) -> tuple[int, int]:
    return math.ceil((size - window + 1) / stride), 0


def windows(shape, window, strides, padding):
    """Yield (output row, output column, input rows, input columns, window rows, window columns)."""
    rule = same if padding == "SAME" else valid
    (out_rows, top), (out_columns, left) = (rule(shape[axis], window[axis], strides[axis]) for axis in (0, 1))
    for a in range(out_rows):
        for b in range(out_columns):
            row, column = a * strides[0] - top, b * strides[1] - left
            rows = slice(max(row, 0), min(row + window[0], shape[0]))
            columns = slice(max(column, 0), min(column + window[1], shape[1]))
            yield (
                a,
                b,
                rows,
                columns,
                slice(rows.start - row, rows.stop - row),
                slice(columns.start - column, columns.stop - column),
            )


def output_shape(shape, window, strides, padding):
    rule = same if padding == "SAME" else valid
    return tuple(rule(shape[axis], window[axis], strides[axis])[0] for axis in (0, 1))


def convolution(x, w, b=None, strides=(1, 1), padding="SAME", relu=False):
    x, w = x.astype(np.float64), w.astype(np.float64)
    y = np.zeros((len(x), *output_shape(x.shape[1:3], w.shape[:2], strides, padding), w.shape[3]))
    for a, c, rows, columns, wrows, wcolumns in windows(x.shape[1:3], w.shape[:2], strides, padding):
        y[:, a, c] = np.einsum("nhwc,hwck->nk", x[:, rows, columns], w[wrows, wcolumns])
    if b is not None:
        y = y + b.astype(np.float64)
    return np.where(y > 0, y, 0) if relu else y


def convolution_gradients(x, w, dy, strides=(1, 1), padding="SAME"):
    """dx, dw and db of the convolution without relu."""
    x, w, dy = (array.astype(np.float64) for array in (x, w, dy))
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for a, c, rows, columns, wrows, wcolumns in windows(x.shape[1:3], w.shape[:2], strides, padding):
        dx[:, rows, columns] += np.einsum("nk,hwck->nhwc", dy[:, a, c], w[wrows, wcolumns])
        dw[wrows, wcolumns] += np.einsum("nk,nhwc->hwck", dy[:, a, c], x[:, rows, columns])
    return dx, dw, dy.sum((0, 1, 2))


def pool(x, kind, window, strides, padding):
    y = np.zeros((len(x), *output_shape(x.shape[1:3], window, strides, padding), x.shape[3]))
    for a, b, rows, columns, _, _ in windows(x.shape[1:3], window, strides, padding):
        part = x[:, rows, columns].astype(np.float64)
        y[:, a, b] = part.max((1, 2)) if kind == "max" else part.mean((1, 2))
    return y


def pool_gradient(x, dy, kind, window, strides, padding):
    dx = np.zeros(x.shape)
    for a, b, rows, columns, _, _ in windows(x.shape[1:3], window, strides, padding):
        part = x[:, rows, columns]
        n, height, width, channels = part.shape
        if kind == "average":
            dx[:, rows, columns] += (dy[:, a, b] / (height * width))[:, None, None, :]
            continue
        first = part.reshape(n, height * width, channels).argmax(1)
        for image in range(n):
            for channel in range(channels):
                i, j = divmod(int(first[image, channel]), width)
                dx[image, rows.start + i, columns.start + j, channel] += dy[image, a, b, channel]
    return dx


def lrn(x, depth_radius, bias, alpha, beta):
    x = x.astype(np.float64)
    total = np.zeros(x.shape)
    for channel in range(x.shape[3]):
        near = slice(max(0, channel - depth_radius), channel + depth_radius + 1)
        total[..., channel] = np.square(x[..., near]).sum(-1)
    return x / (bias + alpha * total) ** beta
