"""The values of every codebook, and the rule that finds the nearest of them."""

import copy
import math
import pickle
from fractions import Fraction
from statistics import NormalDist

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlora_lib.numerics import (
    DYNAMIC8,
    DYNAMIC8_UNSIGNED,
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    TOY,
    Codebook,
    dynamic,
    floating_point,
    integer,
    lloyd_max,
    normal_float,
)

WIDTHS = range(2, 9)
CODEBOOKS = [
    TOY,
    INT4,
    FP4,
    FP4_E3M0,
    FP4_BITSANDBYTES,
    NF4,
    DYNAMIC8,
    DYNAMIC8_UNSIGNED,
    integer(2),
    floating_point(4, 3),
    normal_float(8),
    lloyd_max(3),
    Codebook("one boundary", (-0.25, 0.75)),
    Codebook("neighbors", (0.5, math.nextafter(0.5, 1) + 2**-24, 1.0)),
    Codebook("upper", NF4.values, ties="upper"),
]


def by_name(codebook: Codebook) -> str:
    return codebook.name


def float32(x: float) -> float:
    return float(np.float32(x))


class TestValues:
    def test_toy_is_the_map_of_the_talk(self):
        assert TOY.values.tolist() == [float32(v) for v in (-1.0, 0.3, 0.5, 1.0)]
        assert TOY.bits == 2

    def test_int4_is_the_integers_from_minus_7_to_7(self):
        assert INT4.values.tolist() == [float32(k / 7) for k in range(-7, 8)]

    def test_fp4_e2m1_by_hand(self):
        positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        expected = [-v for v in positive[:0:-1]] + positive
        assert FP4.values.tolist() == [float32(v / 6) for v in expected]

    def test_fp4_e3m0_by_hand(self):
        positive = [0, 1, 2, 4, 8, 16, 32, 64]
        expected = [-v for v in positive[:0:-1]] + positive
        assert FP4_E3M0.values.tolist() == [v / 64 for v in expected]

    def test_fp8_e4m3_by_hand(self):
        values = floating_point(4, 3).values.double() * 2**14 * 1.875
        positive = [2**e * (1 + m / 8) for e in range(15) for m in range(8)]
        positive = [m / 8 for m in range(8)] + positive
        torch.testing.assert_close(
            values[127:], torch.tensor(positive, dtype=torch.float64)
        )

    def test_nf4_as_the_paper_prints_it(self):
        printed = (
            "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 "
            "-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 "
            "0.07958029955625534 0.16093020141124725 0.24611230194568634 "
            "0.33791524171829224 0.44070982933044434 0.5626170039176941 "
            "0.7229568362236023 1.0"
        )
        assert NF4.values.tolist() == [float32(v) for v in map(float, printed.split())]

    def test_nf4_from_quantiles_of_another_library(self):
        p_max = 0.9677083
        assert round(1 - (1 / 32 + 1 / 30) / 2, 7) == p_max
        quantile = NormalDist().inv_cdf

        def half(count: int) -> list[float]:
            step = (p_max - 0.5) / count
            return [quantile(p_max - i * step) / quantile(p_max) for i in range(count)]

        expected = [-v for v in half(7)] + [0.0] + half(8)[::-1]
        np.testing.assert_allclose(NF4.values, expected, rtol=0, atol=2e-7)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_normal_float_of_every_width(self, bits):
        values = normal_float(bits).values
        assert len(values) == 2**bits
        assert {-1.0, 0.0, 1.0} <= set(values.tolist())
        assert values.tolist() == sorted(set(values.tolist()))
        assert int((values > 0).sum()) == 2 ** (bits - 1)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_integer_of_every_width(self, bits):
        values = integer(bits).values
        assert len(values) == 2**bits - 1
        assert integer(bits).bits == bits
        assert torch.equal(values, -values.flip(0))
        assert float(values[-1]) == 1

    def test_dynamic_maps_are_those_of_bitsandbytes(self):
        assert torch.equal(DYNAMIC8.values, bnb.create_dynamic_map())
        unsigned = bnb.create_dynamic_map(signed=False)
        assert torch.equal(DYNAMIC8_UNSIGNED.values, unsigned)

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_dynamic_map_by_hand(self, bits, signed):
        decades = bits - 1
        finer = 1 if signed else 2
        magnitudes = [
            10.0 ** (i - decades + 1) * (0.1 + 0.9 * (j + 0.5) / (finer * 2**i))
            for i in range(decades)
            for j in range(finer * 2**i)
        ]
        negative = [-m for m in magnitudes] if signed else []
        expected = sorted([*negative, 0.0, 1.0, *magnitudes])
        codebook = dynamic(bits, signed)
        assert len(codebook) == 2**bits
        assert codebook.name == f"dynamic{bits}" + "_unsigned" * (not signed)
        np.testing.assert_allclose(codebook.values, expected, rtol=1e-6)

    def test_bitsandbytes_values_of_both_4_bit_types(self):
        assert torch.equal(NF4.values, bnb.get_4bit_type("nf4", device="cpu"))
        fp4 = bnb.get_4bit_type("fp4", device="cpu")
        assert FP4_BITSANDBYTES.values.tolist() == sorted(set(fp4.tolist()))

    def test_bits_is_the_width_of_the_largest_code(self):
        counts = {2: 1, 3: 2, 4: 2, 5: 3, 16: 4, 17: 5, 255: 8, 256: 8}
        for count, bits in counts.items():
            assert Codebook("n", torch.linspace(-1, 1, count)).bits == bits


class TestNearest:
    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    def test_every_value_has_its_own_code(self, codebook):
        codes = codebook.nearest(codebook.values)
        assert codes.tolist() == list(range(len(codebook)))
        assert torch.equal(codebook.lookup(codes), codebook.values)

    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    def test_ties_and_their_neighbors(self, codebook):
        # numpy computes the midpoints, Python's fractions compare: nothing is shared.
        values = codebook.values.numpy()
        middle = (values[:-1] + values[1:]) / np.float32(2)
        below = np.nextafter(middle, np.float32(-2))
        above = np.nextafter(middle, np.float32(2))
        for numbers in (below, middle, above):
            codes = codebook.nearest(torch.from_numpy(numbers)).tolist()
            assert codes == [count_below(codebook, middle, x) for x in numbers]

    def test_a_tie_goes_down_by_default_and_up_for_toy(self):
        # 0.4 is exactly the midpoint of 0.3 and 0.5 in float32.
        values = (-1.0, 0.3, 0.5, 1.0)
        assert TOY.nearest(torch.tensor(0.4)).item() == 2
        assert Codebook("lower", values).nearest(torch.tensor(0.4)).item() == 1

    @given(st.sampled_from(CODEBOOKS), st.floats(-1.5, 1.5, width=32))
    def test_no_value_is_nearer(self, codebook, x):
        code = codebook.nearest(torch.tensor(x)).item()
        distances = [abs(Fraction(x) - Fraction(v)) for v in codebook.values.tolist()]
        # A midpoint is rounded to float32, so it is off by at most 2**-25.
        assert distances[code] <= min(distances) + Fraction(1, 2**24)

    @given(
        st.lists(st.integers(-(2**10), 2**10), min_size=2, max_size=256, unique=True),
        st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=20),
        st.sampled_from(["lower", "upper"]),
    )
    def test_any_table(self, steps, numbers, ties):
        codebook = Codebook("any", [s / 2**10 for s in sorted(steps)], ties)
        values = codebook.values.numpy()
        middle = (values[:-1] + values[1:]) / np.float32(2)
        x = np.concatenate([np.array(numbers, dtype=np.float32), middle])
        expected = [count_below(codebook, middle, number) for number in x]
        assert codebook.nearest(torch.from_numpy(x)).tolist() == expected

    @pytest.mark.parametrize("codebook", [TOY, NF4, DYNAMIC8], ids=by_name)
    def test_shape_is_kept(self, codebook):
        numbers = torch.linspace(-1, 1, 24).view(2, 3, 4)
        codes = codebook.nearest(numbers)
        assert codes.dtype == torch.uint8
        assert codes.shape == codebook.lookup(codes).shape == (2, 3, 4)
        assert torch.equal(codes.view(-1), codebook.nearest(numbers.view(-1)))
        assert codebook.nearest(torch.zeros(())).shape == ()
        assert codebook.nearest(torch.zeros(0)).shape == (0,)


class TestTable:
    """The copy of the values on a device; the meta device is a second one here."""

    meta = torch.device("meta")

    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    def test_it_has_a_place_for_every_code(self, codebook):
        table = codebook.table(torch.device("cpu"))
        assert len(table) == 2**codebook.bits
        assert torch.equal(table[: len(codebook)], codebook.values)
        assert not table[len(codebook) :].any()

    def test_it_is_made_once_for_each_device(self):
        codebook = Codebook("new", NF4.values)
        assert codebook.table(self.meta) is codebook.table(self.meta)
        assert codebook.table(self.meta).device == self.meta
        assert codebook.table(NF4.values.device) is codebook.table(NF4.values.device)

    def test_a_code_without_a_value_is_still_refused(self):
        with pytest.raises(IndexError):
            INT4.lookup(torch.tensor([15], dtype=torch.uint8))

    def test_no_tensor_of_inference_mode_is_kept(self):
        with torch.inference_mode():
            codebook = Codebook("new", NF4.values)
            codebook.table(self.meta)
        for device in (self.meta, torch.device("cpu")):
            assert not codebook.table(device).is_inference()

    def test_no_fake_tensor_is_kept(self):
        codebook = Codebook("new", NF4.values)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(codebook.table(self.meta), FakeTensor)
        assert type(codebook.table(self.meta)) is torch.Tensor

    def test_no_wrapped_tensor_is_kept(self):
        codebook = Codebook("new", NF4.values)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return (x * codebook.table(self.meta)).sum()

        x = torch.ones(16, device=self.meta)
        torch.func.grad(loss)(x)
        # What torch.func wrapped cannot be used once its transform has ended.
        assert (codebook.table(self.meta) * x).shape == (16,)

    def test_a_copy_leaves_the_tables_behind(self):
        codebook = Codebook("new", NF4.values, ties="upper")
        codebook.table(self.meta)
        for other in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
            assert (other, other.name) == (codebook, "new")
            assert set(other._tables) == {torch.device("cpu")}

    @pytest.mark.gpu
    def test_on_the_gpu(self):
        codes = torch.arange(16, dtype=torch.uint8, device="cuda")
        assert torch.equal(NF4.lookup(codes).cpu(), NF4.values)
        assert NF4.table(codes.device) is NF4.table(codes.device)


class TestEquality:
    def test_by_values_and_tie_rule(self):
        assert normal_float(4) == NF4
        assert hash(normal_float(4)) == hash(NF4)
        assert Codebook("upper", NF4.values, ties="upper") != NF4
        assert NF4 != FP4
        assert NF4 != "nf4"

    def test_values_are_a_copy(self):
        table = torch.tensor([-1.0, 1.0])
        codebook = Codebook("copy", table)
        table[0] = 0.5
        assert codebook.values.tolist() == [-1.0, 1.0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([0.5], r"values must be a sequence of 2 to 256 numbers, got shape \(1,\)"),
            ([], r"2 to 256 numbers, got shape \(0,\)"),
            (torch.linspace(-1, 1, 257), r"2 to 256 numbers, got shape \(257,\)"),
            (torch.zeros(2, 2), r"2 to 256 numbers, got shape \(2, 2\)"),
            (
                [-1, 0.5, 0.25, 1],
                r"strictly ascending.* 0.5 followed by 0.25 at index 1",
            ),
            ([-1, 0.5, 0.5, 1], r"ascending.* 0.5 followed by 0.5 .*remove duplicates"),
            ([0.5, 0.5 + 1e-9], r"strictly ascending in float32"),
            ([-1, math.nan, 1], r"values must be finite"),
            ([-1, 0, math.inf], r"values must be finite"),
            ([-1, 0, 1.5], r"lie in \[-1, 1\].* 1.5.*divide them"),
        ],
    )
    def test_values(self, values, message):
        with pytest.raises(ValueError, match=message):
            Codebook("bad", values)

    def test_ties(self):
        with pytest.raises(
            ValueError, match="ties must be 'lower' or 'upper', got 'up'"
        ):
            Codebook("bad", (-1, 1), ties="up")

    @pytest.mark.parametrize("make", [integer, normal_float, dynamic, lloyd_max])
    @pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4"])
    def test_bits(self, make, bits):
        with pytest.raises(ValueError, match=f"bits must be .* 2 to 8, got {bits!r}"):
            make(bits)

    @pytest.mark.parametrize(
        ("exponent_bits", "mantissa_bits", "message"),
        [
            (0, 3, "exponent_bits must be an integer of at least 1, got 0"),
            (2.0, 1, "exponent_bits must be an integer of at least 1, got 2.0"),
            (2, -1, "mantissa_bits must be an integer of at least 0, got -1"),
            (4, 4, "must be at most 7 together, beside the sign, got 4 and 4"),
        ],
    )
    def test_floating_point(self, exponent_bits, mantissa_bits, message):
        with pytest.raises(ValueError, match=message):
            floating_point(exponent_bits, mantissa_bits)


def count_below(codebook: Codebook, middle: np.ndarray, x: np.float32) -> int:
    """The code of ``x`` by definition: how many boundaries lie below it."""
    number = Fraction(float(x))
    boundaries = [Fraction(float(b)) for b in middle]
    if codebook.ties == "lower":
        return sum(boundary < number for boundary in boundaries)
    return sum(boundary <= number for boundary in boundaries)


def test_values_that_need_gradients_are_detached():
    values = torch.tensor([-1.0, 1.0], requires_grad=True)
    codebook = Codebook("one bit", values)
    assert not codebook.values.requires_grad
    assert not codebook.boundaries.requires_grad
