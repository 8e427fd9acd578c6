"""On a GPU the reference gives the same codes, scales and numbers as on the CPU."""

import pytest
import torch

from qlora_lib.numerics import DYNAMIC8, FP4, NF4, TOY, normal_float, quantize

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CODEBOOKS = [TOY, FP4, NF4, normal_float(3), normal_float(7), DYNAMIC8]


def normal(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 65, 1_000_003])
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit(dtype, codebook, count):
    x = normal(count, dtype)
    expected = quantize(x, codebook, 64)
    q = quantize(x.cuda(), codebook, 64)
    assert q.device.type == q.scales.device.type == "cuda"
    assert torch.equal(q.scales.cpu(), expected.scales)
    assert torch.equal(q.packed.cpu(), expected.packed)
    assert torch.equal(q.dequantize().cpu(), expected.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantization(dtype):
    """The mean of the scales is summed in another order, so it may differ a little."""
    x = normal(1_000_003, dtype)
    expected = quantize(x, NF4, 64, double_quant=True)
    q = quantize(x.cuda(), NF4, 64, double_quant=True)
    assert torch.equal(q.packed.cpu(), expected.packed)
    scales, expected_scales = q.scales.dequantize().cpu(), expected.scales.dequantize()
    same_code = q.scales.codes.cpu() == expected.scales.codes
    assert float(same_code.float().mean()) > 0.999
    torch.testing.assert_close(
        scales[same_code], expected_scales[same_code], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_to_the_gpu(dtype, double_quant):
    q = quantize(normal(10_001, dtype), NF4, 64, double_quant)
    assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


def test_subnormal_blocks():
    x = torch.tensor([1e-39, -3e-40, 0.0, 5e-39] * 16)
    q = quantize(x.cuda(), NF4, 64)
    assert q.scales.tolist() == [0]
    assert torch.equal(q.dequantize().cpu(), torch.zeros(64))
