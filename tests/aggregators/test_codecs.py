"""Each codec alone: its error against bounds from arithmetic, its bytes, and what it must never hide."""

import math

import ml_dtypes
import numpy as np
import pytest

from distopt.aggregators import codecs
from distopt.aggregators.codecs import BFloat16, ErrorFeedback, Half, Int8, Place, PowerSGD, Sign, TopK
from distopt.aggregators.codecs.error_feedback import split_again
from distopt.aggregators.codecs.powersgd import next_start, orthonormal, product

SIZES = [0, 1, 2, 63, 64, 65, 1000]
FLAT = [Half(64), BFloat16(), Int8(64), Int8(64, stochastic=True), Sign(64), TopK(0.1), TopK(5, Half(4))]
LARGEST = float(np.finfo(np.float32).max)


def _values(n, seed=0):
    """Numbers over twelve orders of magnitude, of both signs."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(n) * 10.0 ** random.uniform(-8, 4, n)).astype(np.float32)


def _there_and_back(codec, values):
    return codec.decode(codec.encode(values), values.size)


def _block_maxima(values, block):
    return np.repeat([np.abs(values[i : i + block]).max() for i in range(0, len(values), block)], block)[
        : len(values)
    ].astype(float)


@pytest.mark.parametrize("codec", FLAT, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_a_payload_has_the_bytes_that_were_told_and_gives_float32_back(codec, n):
    values = _values(n)
    before = values.copy()
    payload = codec.encode(values)
    assert payload.dtype == np.uint8
    assert payload.shape == (codec.wire_bytes(n),)
    decoded = codec.decode(payload, n)
    assert decoded.dtype == np.float32
    assert decoded.shape == (n,)
    np.testing.assert_array_equal(values, before)
    total = np.full(n, 2, np.float32)
    codec.add_decoded(payload, total)
    np.testing.assert_array_equal(total, decoded + np.float32(2))


@pytest.mark.parametrize(
    ("codec", "n", "expected"),
    [
        (Half(), 4097, 2 * 4097 + 2),
        (BFloat16(), 4097, 2 * 4097),
        (Int8(), 4097, 4097 + 2 * 4),
        (Sign(), 4097, 513 + 2 * 4),
        (TopK(0.01), 4097, 41 * 8),  # 40.97 numbers, rounded up
        (TopK(0.01, Half()), 4097, 41 * 6 + 1),
        (TopK(7), 4097, 7 * 8),
        (TopK(7), 3, 3 * 8),
        (Half(), 0, 0),
        (Int8(), 1, 5),
    ],
    ids=str,
)
def test_wire_bytes(codec, n, expected):
    assert codec.wire_bytes(n) == expected
    assert codec.encode(np.ones(n, np.float32)).size == expected


def test_wire_bytes_of_a_codec_that_does_not_tell_are_found_by_encoding():
    class Plain(codecs.Codec):
        name = "plain"

        def encode(self, values):
            return values.view(np.uint8)

        def decode(self, payload, n):
            return payload.view(np.float32)[:n].copy()

    assert Plain().wire_bytes(10) == 40


@pytest.mark.parametrize("n", SIZES)
def test_half_is_off_by_2_to_the_minus_11_of_a_number_or_2_to_the_minus_39_of_the_largest(n):
    values = _values(n)
    error = np.abs(_there_and_back(Half(64), values) - values.astype(float))
    bound = np.maximum(2.0**-11 * np.abs(values.astype(float)), 2.0**-39 * _block_maxima(values, 64))
    assert (error <= bound).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-8, 1e4, 1e20, 3e38])
def test_half_neither_overflows_nor_sinks(scale):
    # A plain cast ends at 65504 and at 6e-8. 1e-38 has denormals among its thirds.
    values = (np.array([1, -0.5, 1 / 3, 0.1]) * scale).astype(np.float32)
    np.testing.assert_allclose(_there_and_back(Half(), values), values, rtol=2.0**-11)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-20, 1.0, 2.0**100])
def test_half_keeps_small_integers_times_a_power_of_two_exactly(scale):
    values = (np.arange(-512, 512) * scale).astype(np.float32)
    np.testing.assert_array_equal(_there_and_back(Half(), values), values)


def test_bfloat16_is_what_another_program_rounds_to():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(_there_and_back(BFloat16(), values), expected)


def test_bfloat16_keeps_every_nan_and_infinity():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7F800000, 0xFF800000], np.uint32)
    decoded = _there_and_back(BFloat16(), bits.view(np.float32))
    assert np.isnan(decoded[:4]).all()
    assert decoded[4:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_int8_is_off_by_half_a_scale(n, factor):
    values = _values(n) * np.float32(factor)
    error = np.abs(_there_and_back(Int8(64), values) - values.astype(float))
    assert (error <= _block_maxima(values, 64) / 254 * (1 + 1e-5)).all()


def test_int8_rounds_ties_to_even_and_keeps_multiples_of_the_scale():
    values = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 126], np.float32)
    assert _there_and_back(Int8(), values).tolist() == [127, 0, 2, 2, 0, -2, -127, 126]


def test_int8_of_the_largest_numbers_stays_finite():
    values = np.array([LARGEST, -LARGEST, LARGEST / 2], np.float32)
    decoded = _there_and_back(Int8(), values).astype(float)
    assert np.abs(decoded - values.astype(float)).max() <= LARGEST / 254 * (1 + 1e-6)


@pytest.mark.parametrize("codec", [Int8(), Sign(), Int8(stochastic=True)], ids=str)
def test_denormals_are_not_turned_into_something_large(codec):
    values = np.array([1e-45, -1e-45, 1e-44, 0, 3e-40], np.float32)
    assert np.abs(_there_and_back(codec, values)).max() <= 3.1e-40


def test_stochastic_rounding_is_off_by_less_than_the_scale_and_right_in_the_mean():
    values = np.array([127, 0.25, -0.25, 3.7, -100.5, 0, 64], np.float32)
    codec, steps = Int8(stochastic=True, seed=3), 4000
    decoded = np.array(
        [_there_and_back(codec.at(Place(step, 0, "w", 0, 0)), values) for step in range(steps)], float
    )
    assert np.abs(decoded - values).max() < 1
    # Five deviations of the mean of numbers that are off by at most 1/2 in the root mean square.
    assert np.abs(decoded.mean(axis=0) - values).max() < 5 * 0.5 / math.sqrt(steps)


def test_stochastic_rounding_depends_on_the_place_and_can_be_repeated():
    values = _values(1000)
    codec = Int8(stochastic=True)
    places = [Place(0, 0, "w", 0, 0), Place(1, 0, "w", 0, 0), Place(0, 1, "w", 0, 0), Place(0, 0, "v", 0, 0)]
    places += [Place(0, 0, "w", 1, 0), Place(0, 0, "w", 0, 1)]
    payloads = [codec.at(place).encode(values).tobytes() for place in places]
    assert len(set(payloads)) == len(places)
    assert codec.at(places[0]).encode(values).tobytes() == payloads[0]
    assert Int8(stochastic=True, seed=1).at(places[0]).encode(values).tobytes() != payloads[0]
    inside = TopK(1000 - 1, codec)
    assert inside.at(places[0]).encode(values).tobytes() != inside.at(places[1]).encode(values).tobytes()


@pytest.mark.parametrize("n", [1, 2, 64, 65, 1000])
def test_sign_is_the_mean_size_with_the_sign(n):
    values = _values(n)
    decoded = _there_and_back(Sign(64), values)
    for start in range(0, n, 64):
        block = values[start : start + 64].astype(float)
        expected = np.where(block >= 0, 1, -1) * np.abs(block).mean()
        np.testing.assert_allclose(decoded[start : start + 64], expected, rtol=1e-6)


def test_sign_of_the_largest_numbers_stays_finite():
    values = np.full(4096, -LARGEST, np.float32)
    np.testing.assert_array_equal(_there_and_back(Sign(), values), values)


@pytest.mark.parametrize("codec", [Sign(64), TopK(0.1), TopK(5), TopK(5, BFloat16())], ids=str)
@pytest.mark.parametrize("n", [1, 64, 65, 1000])
def test_what_is_left_out_has_fewer_squares(codec, n):
    # Contraction: |x - C(x)|^2 <= (1 - delta) |x|^2. Sign: delta >= 1/64, top-k: delta >= k/n.
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    left = values.astype(float) - _there_and_back(codec, values)
    delta = codec.count(n) / n if isinstance(codec, TopK) else 1 / 64
    assert left @ left <= (1 - delta) * (values.astype(float) @ values) + 1e-4 * n * isinstance(codec, TopK)


def test_top_k_sends_the_largest_where_they_are():
    values = np.array([1, -9, 0, 4, -5, 2], np.float32)
    assert _there_and_back(TopK(3), values).tolist() == [0, -9, 0, 4, -5, 0]
    assert _there_and_back(TopK(100), values).tolist() == values.tolist()
    assert _there_and_back(TopK(0.5, Int8()), values)[[0, 2, 5]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("codec", FLAT, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 63, 64, 199])
def test_what_is_not_finite_is_never_hidden(codec, bad, where):
    values = _values(200)
    values[where] = bad
    decoded = _there_and_back(codec, values)
    assert not np.isfinite(decoded[where])
    # And only its own block suffers.
    assert np.isfinite(np.delete(decoded, np.arange(where // 64 * 64, where // 64 * 64 + 64) % 200)).all()


@pytest.mark.parametrize("codec", FLAT, ids=str)
def test_a_payload_of_nothing_but_bad_numbers_is_bad(codec):
    assert not np.isfinite(_there_and_back(codec, np.full(300, np.nan, np.float32))).all()


@pytest.mark.parametrize("codec", FLAT, ids=str)
@pytest.mark.parametrize("n", [1, 64, 300])
def test_zeros_stay_zeros(codec, n):
    assert not _there_and_back(codec, np.zeros(n, np.float32)).any()


@pytest.mark.parametrize("codec", FLAT[:3] + FLAT[4:], ids=str)
def test_a_power_of_two_passes_through(codec):
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    eight = np.float32(8)
    np.testing.assert_array_equal(_there_and_back(codec, values * eight), _there_and_back(codec, values) * 8)


def test_powersgd_finds_a_matrix_of_its_rank_exactly():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((40, 3)) @ random.standard_normal((3, 20))
    q = PowerSGD(3).first_q("w", (40, 20))
    p = orthonormal((q @ matrix.T).astype(np.float32))
    np.testing.assert_allclose(product(p, (p @ matrix).astype(np.float32)), matrix, atol=1e-4)


def test_powersgd_over_steps_comes_to_the_best_approximation():
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.standard_normal((30, 20)))
    right, _ = np.linalg.qr(random.standard_normal((20, 20)))
    sizes = 2.0 ** -np.arange(20)
    matrix = ((left * sizes) @ right.T).astype(np.float32)
    codec = PowerSGD(2)
    q = first = codec.first_q("w", matrix.shape)
    for _ in range(15):
        p = orthonormal(q @ matrix.T)
        found = p @ matrix
        q = next_start(found, first)
    error = np.linalg.norm(matrix - product(p, found))
    # Eckart and Young: what the best approximation of rank 2 leaves out.
    assert error == pytest.approx(np.sqrt((sizes[2:] ** 2).sum()), rel=1e-3)


def test_orthonormal_rows():
    rows = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    rows[2] = rows[0] - 2 * rows[1]  # depends on the others
    found = orthonormal(rows)
    np.testing.assert_allclose(found @ found.T, np.diag([1, 1, 0, 1]), atol=1e-6)
    assert not orthonormal(np.zeros((2, 5), np.float32)).any()
    assert np.isnan(orthonormal(np.array([[1, np.nan]], np.float32))).all()


def test_a_direction_of_zeros_is_replaced():
    q = np.array([[0, 3, 4], [0, 0, 0]], np.float32)
    fresh = np.array([[9, 9, 9], [1, 2, 3]], np.float32)
    np.testing.assert_allclose(next_start(q, fresh), [[0, 0.6, 0.8], [1, 2, 3]], rtol=1e-6)


def test_powersgd_says_what_it_saves():
    codec = PowerSGD(2)
    assert codec.wire_bytes((5, 5, 3, 64)) == 4 * 2 * (75 + 64)
    assert codec.saves((5, 5, 3, 64))
    assert not codec.saves((1000,))
    assert not codec.saves((3, 4))
    assert PowerSGD(1).saves((3, 4))
    assert not codec.saves((0, 4))


def test_residuals_divided_anew_have_the_same_sum():
    residuals = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    assert split_again(residuals, 3) is residuals
    total = residuals.astype(float).sum(axis=0)
    for ranks in (1, 2, 4, 7):
        parts = split_again(residuals, ranks)
        assert parts.shape == (ranks, 100)
        assert parts.dtype == np.float32
        np.testing.assert_allclose(parts.astype(float).sum(axis=0), total, atol=2e-7)
        np.testing.assert_allclose(parts, np.broadcast_to(total / ranks, parts.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp16", Half),
        ("fp16:64", Half),
        ("bf16", BFloat16),
        ("int8", Int8),
        ("int8:stochastic", Int8),
        ("int8:64:stochastic", Int8),
        ("sign:64", Sign),
        ("topk:0.01", TopK),
        ("topk:100", TopK),
        ("topk:0.01:int8:64", TopK),
        ("powersgd:4", PowerSGD),
    ],
)
def test_codecs_have_names(name, kind):
    assert isinstance(codecs.get(name), kind)
    assert codecs.get(name).name == name
    feedback = codecs.get(f"ef-{name}")
    assert isinstance(feedback, ErrorFeedback)
    assert isinstance(feedback.codec, kind)
    assert feedback.name == f"ef-{name}"
    assert repr(feedback) == f"<codec ef-{name}>"


def test_names_give_their_arguments():
    assert codecs.get("fp16:64").block == codecs.get("int8:64").block == codecs.get("sign:64").block == 64
    assert codecs.get("powersgd").rank == 2
    assert codecs.get("powersgd:4").rank == 4
    assert codecs.get("topk:100").amount == 100
    assert codecs.get("topk:0.25").amount == 0.25
    assert codecs.get("topk:100:fp16").values.name == "fp16"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp8",
        "ef-",
        "ef-ef-int8",
        "bf16:3",
        "int8:x",
        "int8:0",
        "fp16:-1",
        "sign:1:2",
        "topk",
        "topk:",
        "topk:0",
        "topk:1.5",
        "topk:x",
        "topk:nan",
        "topk:0.1:topk:3",
        "topk:0.1:ef-int8",
        "topk:0.1:powersgd",
        "powersgd:0",
    ],
)
def test_an_unknown_name_is_refused_with_a_list(name):
    with pytest.raises(ValueError, match=r"There are fp16.*powersgd") as error:
        codecs.get(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TopK(True), ValueError),
        (lambda: TopK(1.0), ValueError),
        (lambda: TopK(-3), ValueError),
        (lambda: TopK(0.1, TopK(3)), ValueError),
        (lambda: ErrorFeedback("int8"), TypeError),
        (lambda: ErrorFeedback(ErrorFeedback(Int8())), TypeError),
    ],
)
def test_what_makes_no_sense_is_refused(make, error):
    with pytest.raises(error):
        make()
