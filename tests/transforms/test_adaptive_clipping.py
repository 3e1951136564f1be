import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from distopt.transforms import AdaptiveClipping, adaptive_clipping_fn
from distopt.variables import IndexedSlices, Variable

_FILE = Path(__file__).parents[1] / "data" / "tensorflow_cases.json.gz"
_CASES = json.loads(gzip.decompress(_FILE.read_bytes()))
RECORDED = _CASES["adaptive_clipping"]
(OPTIMIZE_LOSS,) = [case for case in _CASES["optimize_loss"] if case["name"] == "adaptive gs"]


def clipped(clip, gradient):
    ((result, _),) = clip([(np.array(gradient, np.float32), None)])
    return result


@pytest.mark.parametrize("case", RECORDED, ids=[case["name"] for case in RECORDED])
def test_clipped_gradients_equal_those_recorded_from_tensorflow(case):
    assert not case["global_step_passed"]
    clip = adaptive_clipping_fn(**case["kwargs"])
    for gradient, expected in zip(case["grads"], case["clipped"], strict=True):
        np.testing.assert_allclose(clipped(clip, gradient), expected, rtol=2e-5)


def test_updates_with_a_global_step_equal_those_recorded_from_optimize_loss():
    case = OPTIMIZE_LOSS
    step = Variable(np.int64(0), name="global_step")
    clip = adaptive_clipping_fn(global_step=step)
    variable = case["init_var"]
    for x, expected in zip(case["x_feeds"], case["var_after"], strict=True):
        gradient = math.copysign(x, variable * x)  # the loss is abs(var * x)
        variable -= 0.1 * float(clipped(clip, [gradient])[0])
        step.assign_add(1)
        assert variable == pytest.approx(expected, rel=1e-5)


def test_first_norm_with_a_global_step_becomes_the_mean():
    clip = AdaptiveClipping(global_step=lambda: 0)
    clipped(clip, [3.0, 4.0])
    assert float(clip.mean) == pytest.approx(math.log(5.0))
    assert float(clip.sq_mean) == pytest.approx(math.log(5.0) ** 2)


def test_the_recurrence_of_the_docstring():
    clip = AdaptiveClipping(std_factor=1.5, decay=0.9, report_summary=True)
    mean = squares = 0.0
    for norm in (5.0, 0.1, 30.0, 2.0, 2.0):
        x = math.log(norm + 1e-8)
        mean += 0.1 * (x - mean)
        squares += 0.1 * (x * x - squares)
        largest = math.exp(mean + 1.5 * math.sqrt(max(1e-8, squares - mean * mean)))
        expected = norm if norm < largest else math.exp(mean)
        assert clipped(clip, [norm])[0] == pytest.approx(expected, rel=1e-5)
        assert float(clip.max_norm) == pytest.approx(largest, rel=1e-5)


def test_all_gradients_get_one_factor_and_none_and_slices_stay_what_they_are():
    slices = IndexedSlices(np.array([[4.0]], np.float32), np.array([1]), (3, 1))
    pairs = [(np.array([3.0], np.float32), "a"), (None, "b"), (slices, "c")]
    (dense, _), (none, _), (rows, _) = AdaptiveClipping()(pairs)
    assert none is None
    assert rows.indices.tolist() == [1]
    assert rows.values[0, 0] / dense[0] == pytest.approx(4 / 3)
    assert dense[0] == pytest.approx(RECORDED[0]["clipped"][0][0], rel=1e-5)
    assert slices.values.tolist() == [[4.0]]


def test_a_static_limit_bounds_the_norm_as_well():
    clip = AdaptiveClipping(static_max_norm=2.0, global_step=0)
    # decay is 0 at step 0: each norm is its own mean, so only the static limit acts.
    np.testing.assert_allclose(clipped(clip, [3.0, 4.0]), [1.2, 1.6], rtol=1e-6)
    np.testing.assert_allclose(clipped(clip, [0.3, 0.4]), [0.3, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(clipped(clip, [0.0, 0.0]), [0.0, 0.0])


def test_the_averages_are_variables_that_carry_the_state():
    clip = AdaptiveClipping(name="Norms")
    assert [variable.name for variable in clip.variables()] == ["Norms/mean", "Norms/sq_mean"]
    assert [v.name for v in AdaptiveClipping().variables()] == [
        "AdaptiveMaxNorm/mean",
        "AdaptiveMaxNorm/sq_mean",
    ]
    for gradient in ([3.0, 4.0], [30.0, 40.0]):
        clipped(clip, gradient)
    resumed = AdaptiveClipping()
    for to, source in zip(resumed.variables(), clip.variables(), strict=True):
        to.assign(source)
    np.testing.assert_array_equal(clipped(resumed, [6.0, 8.0]), clipped(clip, [6.0, 8.0]))


def test_the_largest_norm_is_kept_only_where_it_is_asked_for():
    clip = AdaptiveClipping()
    clipped(clip, [3.0, 4.0])
    assert clip.max_norm is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay must be .* got 1\.5"),
        ({"static_max_norm": -1.0}, r"static_max_norm must be .* got -1\.0"),
        ({"epsilon": 0.0}, r"epsilon must be .* got 0\.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adaptive_clipping_fn(**arguments)
