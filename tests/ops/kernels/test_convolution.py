"""Convolution against its definition, TensorFlow's padding, and its gradients."""

from __future__ import annotations

import direct
import numpy as np
import pytest

from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.geometry import axis
from distopt.ops.kernels.piecewise import Chain

# Height, width, C, K, kernel, strides, padding, batch; first the tutorial's second convolution.
CASES = [
    (12, 12, 64, 64, (5, 5), (1, 1), "SAME", 5),
    (24, 24, 3, 64, (5, 5), (1, 1), "SAME", 3),
    (13, 9, 32, 16, (5, 5), (1, 1), "VALID", 3),
    (8, 8, 16, 32, (3, 3), (1, 1), "SAME", 40),
    (7, 5, 16, 16, (3, 3), (1, 1), "VALID", 2),
    (3, 2, 16, 16, (5, 5), (1, 1), "SAME", 2),
    (9, 7, 4, 5, (3, 3), (2, 2), "SAME", 3),
    (8, 8, 4, 5, (3, 3), (2, 2), "SAME", 3),
    (11, 8, 3, 4, (2, 5), (3, 1), "VALID", 2),
    (8, 7, 4, 5, (1, 1), (1, 1), "VALID", 3),
    (8, 7, 4, 5, (1, 1), (2, 2), "SAME", 3),
    (10, 9, 2, 3, (2, 2), (3, 3), "VALID", 2),
    (16, 16, 3, 8, (7, 7), (2, 2), "SAME", 2),
]


def _example(case, dtype, seed=0):
    height, width, depth, outputs, kernel, strides, padding, batch = case
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, height, width, depth)).astype(dtype)
    w = random.standard_normal((*kernel, depth, outputs)).astype(dtype)
    b = random.standard_normal(outputs).astype(dtype)
    return x, w, b, strides, padding, random


def _relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_agree_with_the_definition(case, dtype, tolerance):
    x, w, b, strides, padding, random = _example(case, dtype)
    run = Chain([Convolution(strides, padding, relu=True)]).forward(x, [(w, b)])
    expected = direct.convolution(x, w, b, strides, padding, relu=True)
    assert run.output.dtype == dtype
    assert _relative_error(run.output, expected) < tolerance
    dy = random.standard_normal(expected.shape).astype(dtype)
    dx, (dw, db) = run.backward(dy)
    # The mask is that of the computed values: a rounded zero belongs to neither side.
    masked = dy * (run.output > 0)
    expected_dx, expected_dw, expected_db = direct.convolution_gradients(x, w, masked, strides, padding)
    assert _relative_error(dx, expected_dx) < tolerance
    assert _relative_error(dw, expected_dw) < tolerance
    assert _relative_error(db, expected_db) < tolerance


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]])
def test_gradients_agree_with_finite_differences(case):
    x, w, b, strides, padding, random = _example(case, "float64")
    chain = Chain([Convolution(strides, padding)])
    dy = random.standard_normal(chain.forward(x, [(w, b)], keep=False).output.shape)
    dx, (dw, db) = chain.forward(x, [(w, b)]).backward(dy)
    arrays, gradients = (x, w, b), (dx, dw, db)
    for number in range(3):
        direction = random.standard_normal(arrays[number].shape)
        values = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[number] = arrays[number] + sign * direction
            y = chain.forward(moved[0], [(moved[1], moved[2])], keep=False).output
            values.append(float((y * dy).sum()))
        # The function is linear in each argument, so a step of 1 is exact but for rounding.
        slope = (values[0] - values[1]) / 2
        assert slope == pytest.approx(float((gradients[number] * direction).sum()), rel=1e-7)


def test_without_bias_only_the_filter_has_a_gradient():
    x, w, _, strides, padding, random = _example(CASES[6], "float32")
    run = Chain([Convolution(strides, padding)]).forward(x, [(w,)])
    expected = direct.convolution(x, w, None, strides, padding)
    assert _relative_error(run.output, expected) < 1e-6
    _, gradients = run.backward(random.standard_normal(expected.shape).astype("float32"))
    assert [g.shape for g in gradients] == [w.shape]


@pytest.mark.parametrize("case", [CASES[0], CASES[1]])
def test_parameter_gradients_are_written_where_they_are_wanted(case):
    x, w, b, strides, padding, random = _example(case, "float32")
    chain = Chain([Convolution(strides, padding, relu=True)])
    dy = random.standard_normal(chain.forward(x, [(w, b)]).output.shape).astype("float32")
    _, expected = chain.forward(x, [(w, b)]).backward(dy)
    arena = np.full(w.size + b.size, np.nan, "float32")
    out = (arena[: w.size].reshape(w.shape), arena[w.size :])
    dx, gradients = chain.forward(x, [(w, b)]).backward(dy, input_gradient=False, out=out)
    assert dx is None
    assert gradients[0] is out[0]
    np.testing.assert_array_equal(arena[: w.size], expected[0].ravel())
    np.testing.assert_array_equal(arena[w.size :], expected[1])


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]])
def test_an_image_gives_the_same_result_in_any_batch(case):
    x, w, b, strides, padding, random = _example((*case[:7], 21), "float32")
    chain = Chain([Convolution(strides, padding)])
    whole = chain.forward(x, [(w, b)])
    dy = random.standard_normal(whole.output.shape).astype("float32")
    dx, _ = whole.backward(dy)
    for first, last in ((0, 1), (3, 4), (1, 8), (5, 21), (20, 21)):
        run = chain.forward(np.ascontiguousarray(x[first:last]), [(w, b)])
        # Not the same bits: some BLAS kernels round the last rows of a matrix differently.
        assert _relative_error(run.output, whole.output[first:last]) < 3e-5
        assert _relative_error(run.backward(dy[first:last])[0], dx[first:last]) < 3e-5


@pytest.mark.parametrize(
    ("case", "is_winograd"),
    [
        (CASES[0], True),
        (CASES[1], False),  # too few channels
        (CASES[3], True),
        ((4, 4, 128, 128, (3, 3), (1, 1), "SAME", 1), True),
        ((5, 5, 64, 64, (3, 3), (1, 1), "SAME", 1), False),  # 64 positions computed for 25
        ((12, 12, 64, 64, (5, 5), (2, 2), "SAME", 1), False),
        ((12, 12, 64, 64, (3, 5), (1, 1), "SAME", 1), False),
        ((12, 12, 64, 64, (7, 7), (1, 1), "SAME", 1), False),
    ],
)
def test_winograd_is_chosen_where_it_saves_work(case, is_winograd):
    x, w, b, strides, padding, _ = _example(case, "float32")
    assert Convolution(strides, padding).is_winograd(x.shape[1:], (w, b)) is is_winograd


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[9]])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(case):
    x, w, b, strides, padding, _ = _example((*case[:7], 0), "float32")
    run = Chain([Convolution(strides, padding, relu=True)]).forward(x, [(w, b)])
    assert run.output.shape[0] == 0
    dx, (dw, db) = run.backward(run.output.copy())
    assert dx.shape == x.shape
    np.testing.assert_array_equal(dw, np.zeros(w.shape))
    np.testing.assert_array_equal(db, np.zeros(b.shape))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]])
def test_values_and_gradients_agree_with_torch(case):
    torch = pytest.importorskip("torch")
    x, w, b, strides, _, random = _example(case, "float32")
    padded = [
        direct.same(size, kernel, stride)
        for size, kernel, stride in zip(x.shape[1:3], w.shape[:2], strides, strict=True)
    ]
    sides = []
    for (out, before), size, kernel, stride in zip(padded, x.shape[1:3], w.shape[:2], strides, strict=True):
        sides.append((before, max((out - 1) * stride + kernel - size, 0) - before))
    tensors = [
        torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True),
        torch.tensor(w.transpose(3, 2, 0, 1), requires_grad=True),
        torch.tensor(b, requires_grad=True),
    ]
    image = torch.nn.functional.pad(tensors[0], (*sides[1], *sides[0]))
    y = torch.nn.functional.conv2d(image, tensors[1], tensors[2], stride=strides)
    run = Chain([Convolution(strides)]).forward(x, [(w, b)])
    assert _relative_error(run.output, y.detach().numpy().transpose(0, 2, 3, 1)) < 3e-5
    dy = random.standard_normal(run.output.shape).astype("float32")
    y.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    dx, (dw, db) = run.backward(dy)
    assert _relative_error(dx, tensors[0].grad.numpy().transpose(0, 2, 3, 1)) < 3e-5
    assert _relative_error(dw, tensors[1].grad.numpy().transpose(2, 3, 1, 0)) < 3e-5
    assert _relative_error(db, tensors[2].grad.numpy()) < 3e-5


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_tensorflows(size, window, stride):
    line = axis(size, window, stride, "SAME")
    assert (line.out, line.before) == direct.same(size, window, stride)
    # The odd position of padding stands after the inputs.
    assert line.after - line.before in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 0, 1, "SAME"), "window and stride must be at least 1, got 0 and 1"),
        ((5, 3, -1, "SAME"), "got 3 and -1"),
        ((2, 3, 1, "VALID"), "a window of 3 does not fit into 2 inputs"),
        ((5, 3, 1, "FULL"), "must be 'SAME' or 'VALID', got 'FULL'"),
    ],
)
def test_a_bad_window_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        axis(*arguments)


@pytest.mark.parametrize(
    ("shape", "parameters", "message"),
    [
        ((2, 8, 8, 3), [((3, 3, 4, 5), "float32")], "the images have 3 channels"),
        (
            (2, 8, 8, 3),
            [((3, 3, 3, 5), "float32"), ((4,), "float32")],
            r"the bias has shape \(4,\)",
        ),
        ((2, 8, 8, 3), [((3, 3, 3, 5), "float64")], "is float64, the images are float32"),
        ((8, 8, 3), [((3, 3, 3, 5), "float32")], r"an array of shape \(8, 8, 3\)"),
        ((2, 8, 8, 3), [], "got 0 arrays"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(shape, parameters, message):
    arrays = [np.zeros(s, dtype) for s, dtype in parameters]
    with pytest.raises(ValueError, match=message):
        Chain([Convolution()]).forward(np.zeros(shape, "float32"), [arrays])
