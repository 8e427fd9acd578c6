"""Looking codes up: every byte, in shared memory and without it, to the bit."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib import NF4
from qlora_lib.kernels.lookup import fill_tables, look_up_scales, look_up_words
from qlora_lib.numerics import DYNAMIC8

# Words of four bytes each, in which every byte stands once at each of the four places.
WORDS = 256
DTYPES = [torch.float16, torch.bfloat16]
SCALES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1 / 3,
    1 + 2.0**-8,
    1 + 3 * 2.0**-12,
    1e-3,
    1e4,
    65519.9,
]
SCALES += [2.0**-14, 2.0**-20, 2.0**-24, 3.1e-5, 2.0**-126, 2.0**-133, 1e-38, 1e20]
SCALES += [65520.0, 3.4e38, float("inf"), float("nan")]


@triton.jit
def look_up_words_kernel(
    words, scales, values, scale_values, numbers, SHARED: tl.constexpr
):
    dtype = numbers.dtype.element_ty
    tables = fill_tables(values, scale_values, dtype, False, SHARED)
    index = tl.arange(0, 256)
    c0, c1, c2, c3, c4, c5, c6, c7 = look_up_words(
        tl.load(words + index),
        tl.load(scales + index),
        values,
        tables,
        dtype,
        SHARED,
    )
    numbers += index * 8
    tl.store(numbers, c0)
    tl.store(numbers + 1, c1)
    tl.store(numbers + 2, c2)
    tl.store(numbers + 3, c3)
    tl.store(numbers + 4, c4)
    tl.store(numbers + 5, c5)
    tl.store(numbers + 6, c6)
    tl.store(numbers + 7, c7)


@triton.jit
def look_up_scales_kernel(values, scale_values, numbers, SHARED: tl.constexpr):
    tables = fill_tables(values, scale_values, tl.bfloat16, True, SHARED)
    index = tl.arange(0, 256)
    tl.store(numbers + index, look_up_scales(index, scale_values, tables, SHARED))


def packed_words() -> Tensor:
    """uint8 ``[WORDS, 4]``."""
    places = [torch.arange(WORDS).roll(17 * place) for place in range(4)]
    return torch.stack(places, 1).to(torch.uint8)


def look_up(scale: float, dtype: torch.dtype, device: str, shared: bool) -> Tensor:
    numbers = torch.full((WORDS, 8), 7.0, dtype=dtype, device=device)
    look_up_words_kernel[(1,)](
        packed_words().to(device).view(torch.int32),
        torch.full((WORDS,), scale, dtype=torch.float64).float().to(device),
        NF4.values.to(device),
        DYNAMIC8.values.to(device),
        numbers,
        SHARED=shared,
    )
    return numbers.cpu()


# NumPy, which the interpreter computes with, warns where a float16 overflows.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_without_shared_memory(scale, dtype, device):
    """Value, scale and product are rounded each: the first code is the high half."""
    if device == "cpu" and dtype == torch.bfloat16 and 0 < abs(scale) < 2.0**-126:
        pytest.skip("Triton's interpreter reads subnormal bfloat16 as other numbers")
    packed = packed_words().long()
    codes = torch.stack([packed >> 4, packed & 15], 2).view(WORDS, 8)
    rounded = torch.tensor([scale], dtype=torch.float64).float().to(dtype).double()
    expected = (NF4.values.to(dtype).double()[codes] * rounded).to(dtype)
    numbers = look_up(scale, dtype, device, shared=False)
    if scale != scale:
        assert bool(numbers.isnan().all())
        return
    assert torch.equal(numbers.isnan(), expected.isnan())
    known = ~expected.isnan()
    bits = torch.int16  # 0 and -0 differ
    assert torch.equal(numbers[known].view(bits), expected[known].view(bits))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_shared_memory_gives_the_same_bits(scale, dtype, device):
    shared = look_up(scale, dtype, device, shared=True)
    plain = look_up(scale, dtype, device, shared=False)
    assert torch.equal(shared.isnan(), plain.isnan())
    known = ~plain.isnan()
    assert torch.equal(shared[known].view(torch.int16), plain[known].view(torch.int16))


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_scales(shared, device):
    numbers = torch.full((256,), 7.0, device=device)
    table = DYNAMIC8.values.to(device)
    look_up_scales_kernel[(1,)](NF4.values.to(device), table, numbers, SHARED=shared)
    assert torch.equal(numbers, table)
