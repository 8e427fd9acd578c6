"""quantize and dequantize: the toy example, counted bytes, and what always holds."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from qlora_lib.numerics import (
    DYNAMIC8,
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    TOY,
    Codebook,
    QuantizedTensor,
    dynamic,
    floating_point,
    integer,
    lloyd_max,
    normal_float,
    pack,
    quantize,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WITH_BOTH_ENDS = [
    *(normal_float(bits) for bits in range(2, 9)),
    *(integer(bits) for bits in range(2, 9)),
    floating_point(4, 3),
    FP4,
    FP4_E3M0,
    FP4_BITSANDBYTES,
    TOY,
    Codebook("one bit", (-1, 1)),
    Codebook("upper", INT4.values, ties="upper"),
]
CODEBOOKS = [
    *WITH_BOTH_ENDS,
    *(dynamic(bits) for bits in range(2, 9)),
    lloyd_max(4),
    Codebook("inside", (-0.5, 0.25)),
    Codebook("positive", (0.0, 0.5, 1.0)),
]
# Half a unit in the last place of 1, relative to the number that is rounded.
UNIT = 2.0**-24
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: UNIT}


def by_name(codebook: Codebook) -> str:
    return codebook.name


def worst_gap(codebook: Codebook) -> float:
    """How far a normalized number can be from the nearest value of the codebook."""
    values = codebook.values.double()
    half_gap = float(values.diff().max()) / 2
    return max(half_gap, float(values[0]) + 1, 1 - float(values[-1]))


@st.composite
def tensors(draw: st.DrawFn, largest: float = 2.0**126) -> Tensor:
    """Up to 40 numbers of one magnitude or of very different ones."""
    scales = [2.0**-125, 2.0**-60, 2.0**-20, 1.0, 2.0**60, largest]
    scale = draw(st.sampled_from([scale for scale in scales if scale <= largest]))
    few = st.floats(-1, 1, width=32).map(lambda x: float(np.float32(x * scale)))
    wide = st.floats(-largest, largest, width=32)
    elements = draw(st.sampled_from([few, few | wide]))
    shape = draw(st.integers(1, 40))
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)))


def has_normal_absmax(tensor: Tensor, block_size: int) -> bool:
    """No block is of subnormal numbers alone; TestScales covers those."""
    absmax = [float(block.abs().max()) for block in tensor.split(block_size)]
    return all(largest == 0 or largest >= 2.0**-126 for largest in absmax)


class TestToyExample:
    def test_step_by_step(self):
        tensor = torch.tensor([10.0, -3.0, 5.0, 4.0])
        q = quantize(tensor, TOY, block_size=None)
        assert q.scales.tolist() == [10]
        assert q.codes.tolist() == [3, 1, 2, 2]
        assert q.packed.tolist() == [0b11_01_10_10]
        assert q.dequantize().tolist() == [10.0, 3.0, 5.0, 5.0]

    def test_ties_to_the_lower_code_change_the_last_number(self):
        lower = Codebook("toy, lower", TOY.values)
        q = quantize(torch.tensor([10.0, -3.0, 5.0, 4.0]), lower, block_size=None)
        assert q.codes.tolist() == [3, 1, 2, 1]
        assert q.dequantize().tolist() == [10.0, 3.0, 5.0, 3.0]


class TestBytes:
    def test_the_papers_bits_per_parameter(self):
        tensor = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
        flat = quantize(tensor, NF4, 64)
        double = quantize(tensor, NF4, 64, double_quant=True)
        assert flat.bits_per_parameter == 4 + 32 / 64
        # The offset is one more float32 for the whole tensor.
        constants = 8 / 64 + 32 / (64 * 256)
        assert double.bits_per_parameter == 4 + constants + 32 / 2**20
        assert round(constants, 3) == 0.127
        assert round(double.bits_per_parameter, 3) == 4.127
        assert round(flat.bits_per_parameter - double.bits_per_parameter, 2) == 0.37

    def test_every_byte_is_counted(self):
        q = quantize(torch.randn(1000), NF4, 64, double_quant=True)
        tensors = [q.packed, q.scales.packed, q.scales.scales, q.scales.offset]
        assert [t.nbytes for t in tensors] == [500, 16, 4, 4]
        assert q.nbytes == 524
        assert q.bits_per_parameter == 8 * 524 / 1000

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_every_width_is_packed_densely(self, bits):
        q = quantize(torch.randn(803), normal_float(bits), block_size=None)
        assert q.nbytes == -(-803 * bits // 8) + 4


class TestRoundTrip:
    @given(st.data(), st.sampled_from(CODEBOOKS), st.sampled_from([1, 3, 8, None]))
    def test_error_bound(self, data, codebook, block_size):
        """|y - x| <= scale * (worst gap + rounding).

        With u = 2**-24: the normalized number is off by at most 2 u + u**2 (from a
        reciprocal and a product), the boundary by u, the product with the scale by u or
        by half of the smallest subnormal number.
        """
        x = data.draw(tensors())
        size = block_size or len(x)
        assume(has_normal_absmax(x, size))
        q = quantize(x, codebook, block_size)
        assert isinstance(q.scales, Tensor)
        scale = q.scales.double().repeat_interleave(size)[: len(x)]
        error = (q.dequantize().double() - x.double()).abs()
        bound = scale * (worst_gap(codebook) + 4 * UNIT + UNIT**2) + 2.0**-150
        assert bool((error <= bound).all())

    @given(st.data(), st.sampled_from(CODEBOOKS))
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_error_bound_of_half_precision(self, dtype, data, codebook):
        x = data.draw(tensors(largest=2.0**15)).to(dtype)
        assume(has_normal_absmax(x.float(), 8))
        q = quantize(x, codebook, 8)
        assert isinstance(q.scales, Tensor)
        scale = q.scales.double().repeat_interleave(8)[: len(x)]
        error = (q.dequantize().double() - x.double()).abs()
        # The result is rounded once more, to the type or to its subnormal numbers.
        rounding = 4 * UNIT + UNIT**2 + ROUNDING[dtype] * (1 + UNIT)
        smallest = torch.finfo(dtype).smallest_normal * ROUNDING[dtype]
        bound = scale * (worst_gap(codebook) + rounding) + smallest + 2.0**-150
        assert bool((error <= bound).all())

    @given(st.data(), st.sampled_from(WITH_BOTH_ENDS), st.sampled_from([1, 3, 8, None]))
    def test_idempotence(self, data, codebook, block_size):
        """A block's largest number comes back exactly, if -1 and 1 have codes."""
        x = data.draw(tensors())
        assume(has_normal_absmax(x, block_size or len(x)))
        q = quantize(x, codebook, block_size)
        again = quantize(q.dequantize(), codebook, block_size)
        assert torch.equal(again.packed, q.packed)
        assert torch.equal(again.scales, q.scales)

    @given(st.data(), st.sampled_from([NF4, INT4, FP4, FP4_E3M0, TOY]))
    def test_idempotence_of_bfloat16(self, data, codebook):
        # True where half a gap is wider than the 8 bits of a bfloat16 are off.
        x = data.draw(tensors()).bfloat16()
        assume(has_normal_absmax(x.float(), 8))
        q = quantize(x, codebook, 8)
        again = quantize(q.dequantize(), codebook, 8)
        assert torch.equal(again.packed, q.packed)
        assert torch.equal(again.scales, q.scales)

    def test_no_idempotence_without_an_end_code(self):
        # The dynamic map has 1 but not -1, so a block led by -1 shrinks each time.
        x = torch.full((8,), -1.0)
        once = quantize(x, DYNAMIC8, 8).dequantize()
        assert float(once[0]) == float(DYNAMIC8.values[0]) > -1
        assert float(quantize(once, DYNAMIC8, 8).dequantize()[0]) > float(once[0])


class TestSymmetries:
    @given(st.data(), st.sampled_from(CODEBOOKS), st.integers(1, 6))
    def test_permuting_blocks_permutes_codes_and_scales(self, data, codebook, size):
        blocks = data.draw(
            arrays(np.float32, (5, size), elements=st.floats(-9, 9, width=32))
        )
        blocks = torch.from_numpy(blocks)
        order = torch.tensor(data.draw(st.permutations(range(5))))
        q = quantize(blocks, codebook, size)
        permuted = quantize(blocks[order], codebook, size)
        assert torch.equal(permuted.codes, q.codes[order])
        assert torch.equal(permuted.scales, q.scales[order])

    @given(
        arrays(np.int16, st.integers(1, 40)),
        st.sampled_from(CODEBOOKS),
        st.integers(-60, 60),
        st.booleans(),
    )
    def test_a_power_of_two_changes_only_the_scales(
        self, integers, codebook, exponent, double_quant
    ):
        # 16-bit integers times 2**60 and more stay far from both ends of float32.
        x = torch.from_numpy(integers).float()
        factor = 2.0**exponent
        q = quantize(x, codebook, 8, double_quant)
        scaled = quantize(x * factor, codebook, 8, double_quant)
        assert torch.equal(scaled.packed, q.packed)
        if double_quant:
            assert torch.equal(scaled.scales.packed, q.scales.packed)
            assert torch.equal(scaled.scales.scales, q.scales.scales * factor)
            assert torch.equal(scaled.scales.offset, q.scales.offset * factor)
        else:
            assert torch.equal(scaled.scales, q.scales * factor)
        assert torch.equal(scaled.dequantize(), q.dequantize() * factor)


class TestDoubleQuantization:
    @given(
        arrays(np.float32, st.integers(1, 600), elements=st.floats(0, 9, width=32)),
        st.floats(0, 9, width=32),
    )
    def test_error_bound_of_the_scales(self, scales, outlier):
        """Bounded like any block-wise quantization, plus two sums with the offset."""
        scales = torch.from_numpy(scales)
        scales[0] += outlier
        assume(has_normal_absmax(scales, 1))
        # With one number a block, a block's scale is its number.
        q = quantize(scales, NF4, 1, double_quant=True)
        nested = q.scales
        assert isinstance(nested, QuantizedTensor)
        assert float(nested.offset) == float(scales.mean())
        assert nested.block_size == 256
        restored = nested.dequantize().double()
        largest = nested.scales.double().repeat_interleave(256)[: len(scales)]
        centered = (scales.double() - nested.offset.double()).abs()
        rounding = UNIT * (centered + restored.abs()) + 2.0**-125
        bound = largest * (worst_gap(DYNAMIC8) + 4 * UNIT + UNIT**2) + rounding
        assert bool(((restored - scales.double()).abs() <= bound).all())

    def test_scales_of_one_block_are_exact(self):
        x = torch.tensor([0.5, -2.0, 1.0])
        q = quantize(x, NF4, 64, double_quant=True)
        assert float(q.scales.offset) == 2.0
        assert q.scales.dequantize().tolist() == [2.0]
        assert torch.equal(q.dequantize(), quantize(x, NF4, 64).dequantize())

    def test_dequantizes_with_the_restored_scales(self):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        q = quantize(x, NF4, 64, double_quant=True)
        assert torch.equal(q.packed, quantize(x, NF4, 64).packed)
        scales = q.scales.dequantize().repeat_interleave(64)[:1000]
        assert torch.equal(q.dequantize(), NF4.lookup(q.codes) * scales)


class TestTypesAndShapes:
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_result_has_the_type_of_the_tensor(self, dtype, double_quant):
        x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
        q = quantize(x, NF4, 64, double_quant)
        single = quantize(x.float(), NF4, 64, double_quant)
        assert q.dtype == dtype
        assert q.shape == (3, 50)
        assert torch.equal(q.packed, single.packed)
        numbers = q.dequantize()
        assert numbers.dtype == dtype
        assert numbers.shape == (3, 50)
        # Computed in float32 and rounded once, to whatever type is asked for.
        for wanted in DTYPES:
            converted = q.dequantize(wanted)
            assert converted.dtype == wanted
            assert torch.equal(converted, single.dequantize().to(wanted))

    def test_float64_is_normalized_in_float32(self):
        # Exactly on a boundary in float32, above it in float64.
        boundary = float(NF4.boundaries[3])
        x = torch.tensor([1.0, boundary + 1e-12], dtype=torch.float64)
        assert quantize(x, NF4, 2).codes.tolist() == [15, 3]

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.t(),
            lambda x: x[:, ::2],
            lambda x: x[1:, 3:],
            lambda x: x.flip(0),
            lambda x: x[0, 0].expand(4, 5),
            lambda x: x[0, 0],
            lambda x: x.view(2, 5, 3, 4).permute(3, 1, 0, 2),
        ],
    )
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_views(self, view, double_quant):
        x = view(torch.randn(10, 12, generator=torch.Generator().manual_seed(0)))
        before = x.clone()
        q = quantize(x, NF4, 16, double_quant)
        expected = quantize(x.contiguous(), NF4, 16, double_quant)
        assert torch.equal(x, before)
        assert torch.equal(q.packed, expected.packed)
        assert q.shape == x.shape
        assert torch.equal(q.dequantize(), expected.dequantize())

    def test_codes_have_the_shape_of_the_tensor(self):
        x = torch.randn(3, 5)
        q = quantize(x, NF4, 4)
        assert q.codes.shape == (3, 5)
        assert torch.equal(pack(q.codes.view(-1), 4, padding=7), q.packed)

    @pytest.mark.parametrize("codebook", [NF4, TOY, FP4], ids=by_name)
    def test_unused_bits_hold_the_code_of_zero(self, codebook):
        zero = int(codebook.nearest(torch.zeros(1)))
        q = quantize(torch.ones(1), codebook, 64)
        digits = f"{int(q.packed):08b}"
        assert int(digits[codebook.bits : 2 * codebook.bits], 2) == zero

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_no_gradient_is_recorded(self, double_quant):
        x = torch.randn(4, 16, requires_grad=True)
        q = quantize(x * 2, NF4, 8, double_quant)
        assert not q.dequantize().requires_grad
        assert torch.equal(
            q.dequantize(), quantize(x.detach() * 2, NF4, 8, double_quant).dequantize()
        )

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_to_a_device(self, double_quant):
        q = quantize(torch.randn(100), NF4, 8, double_quant)
        moved = q.to("meta")
        assert moved.device == moved.scales.device == torch.device("meta")
        assert moved.nbytes == q.nbytes
        assert q.device == torch.device("cpu")
        assert torch.equal(q.to("cpu").dequantize(), q.dequantize())


class TestZerosAndNothing:
    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_an_all_zero_tensor(self, codebook, double_quant):
        x = torch.zeros(3, 100)
        q = quantize(x, codebook, 64, double_quant)
        assert torch.equal(q.dequantize(), x)

    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    def test_an_all_zero_block(self, codebook):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        x[2] = 0
        numbers = quantize(x, codebook, 64).dequantize()
        assert torch.equal(numbers[2], x[2])

    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    def test_an_all_zero_block_after_double_quantization(self, codebook):
        """Zeros if zero has a code, else the nearest value times a small scale."""
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        x[2] = 0
        q = quantize(x, codebook, 64, double_quant=True)
        zeros = q.dequantize()[2]
        if bool((codebook.values == 0).any()):
            assert torch.equal(zeros, x[2])
        else:
            nearest = float(codebook.lookup(codebook.nearest(torch.zeros(1))))
            scale_error = float(q.scales.scales) * (worst_gap(DYNAMIC8) + 1e-6)
            assert 0 < float(zeros.abs().max()) <= abs(nearest) * scale_error

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
    @pytest.mark.parametrize("block_size", [1, 64, None])
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_empty_tensor(self, shape, block_size, double_quant, dtype):
        x = torch.empty(shape, dtype=dtype)
        q = quantize(x, NF4, block_size, double_quant)
        assert q.codes.shape == q.shape == shape
        assert torch.equal(q.dequantize(), x)
        assert q.dequantize().dtype == dtype
        assert q.bits_per_parameter == 0


class TestBadInput:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("block_size", [1, 7, 64, None])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_first_number_without_a_place_is_named(self, dtype, block_size, bad):
        x = torch.ones(10, 30, dtype=dtype)
        x[4, 20] = bad
        x[4, 21] = float("inf")
        x[9, 9] = float("nan")
        with pytest.raises(
            ValueError, match=f"tensor holds {bad} at flat index 140, .* remove NaN"
        ):
            quantize(x, NF4, block_size)

    @pytest.mark.parametrize("number", [1e39, -1e300])
    def test_beyond_float32(self, number):
        x = torch.ones(200, dtype=torch.float64)
        x[150] = number
        with pytest.raises(
            ValueError, match="at flat index 150, .*scale the tensor down"
        ):
            quantize(x, NF4, 64)

    @pytest.mark.parametrize(
        "dtype",
        [
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.complex128,
            torch.float8_e4m3fn,
        ],
    )
    def test_no_float_tensor(self, dtype):
        with pytest.raises(
            TypeError, match=rf"tensor must be a .*{dtype}.*\.float\(\)"
        ):
            quantize(torch.zeros(4).to(dtype), NF4)

    def test_no_tensor(self):
        with pytest.raises(TypeError, match=r"tensor must be .* got list"):
            quantize([1.0, 2.0], NF4)

    def test_no_codebook(self):
        with pytest.raises(TypeError, match="codebook must be a Codebook .* got 'nf4'"):
            quantize(torch.zeros(4), "nf4")

    @pytest.mark.parametrize("block_size", [0, -1, -64])
    def test_block_size_too_small(self, block_size):
        with pytest.raises(
            ValueError,
            match=f"block_size must be at least 1, got {block_size}; use None",
        ):
            quantize(torch.zeros(4), NF4, block_size)

    @pytest.mark.parametrize("block_size", [64.0, 0.5, True, False, "64", (64,)])
    def test_block_size_no_integer(self, block_size):
        with pytest.raises(
            TypeError, match="block_size must be an integer or None, got"
        ):
            quantize(torch.zeros(4), NF4, block_size)


def test_scales_with_an_offset_are_rounded_once():
    torch.manual_seed(0)
    scales = quantize(torch.rand(64, 256) + 1, NF4, 64, double_quant=True).scales
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scales.dequantize(dtype), scales.dequantize().to(dtype))


@pytest.fixture
def default_dtype(request):
    """Another default type, as transformers sets while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default_dtype", [torch.bfloat16, torch.float64], indirect=True
)
def test_the_default_dtype_changes_nothing(default_dtype):
    assert torch.get_default_dtype() == default_dtype
    x = torch.linspace(-3, 3, 1000, dtype=torch.float32)
    flat, double = (quantize(x, NF4, 64, double) for double in (False, True))
    numbers = [flat.dequantize(), double.dequantize()]
    assert flat.scales.dtype == torch.float32
    assert double.scales.scales.dtype == double.scales.offset.dtype == torch.float32
    tables = {
        NF4: normal_float(4),
        DYNAMIC8: dynamic(),
        INT4: integer(4),
        FP4: floating_point(2, 1),
    }
    for expected, built in tables.items():
        assert torch.equal(built.values, expected.values)

    torch.set_default_dtype(torch.float32)
    for double_quant, found in enumerate(numbers):
        expected = quantize(x, NF4, 64, bool(double_quant)).dequantize()
        assert torch.equal(found, expected)


def test_the_default_device_changes_nothing():
    x = torch.linspace(-3, 3, 100)
    expected = quantize(x, NF4, 8)
    with torch.device("meta"):
        q = quantize(x, NF4, 8)
    assert torch.equal(q.packed, expected.packed)


def test_scales_whose_sum_leaves_float32():
    x = torch.full((1000,), 3e38)
    q = quantize(x, NF4, 64, double_quant=True)
    assert torch.equal(q.dequantize(), x)


def test_a_meta_tensor_has_nothing_to_quantize():
    with pytest.raises(ValueError, match="tensor is on the meta device"):
        quantize(torch.empty(4, device="meta"), NF4)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.complex64])
def test_dequantize_refuses_what_is_no_float_type(dtype, double_quant):
    q = quantize(torch.ones(4), NF4, 4, double_quant)
    with pytest.raises(TypeError, match=f"dtype must be a float type, got {dtype}"):
        q.dequantize(dtype)


def test_to_refuses_a_dtype():
    q = quantize(torch.ones(4), NF4)
    with pytest.raises(TypeError, match=r"device must be .* got torch\.float16"):
        q.to(torch.float16)
