"""One tensor of more than 2**31 elements, for real: `pytest -m large`."""

from pathlib import Path

import pytest
import torch

from qlora_lib.numerics import NF4, quantize

COUNT = 2**31 + 65
NEEDED_BYTES = 10 * 10**9  # it was seen to take 7.8


def available_bytes() -> int:
    """Free memory as Linux counts it; 0 where it does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":") for line in lines)
    return 1024 * int(fields.get("MemAvailable", "0 kB").split()[0])


@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    if available_bytes() < NEEDED_BYTES:
        pytest.skip(
            f"needs {NEEDED_BYTES:,} bytes, {available_bytes():,} are available"
        )
    # A pattern that repeats after a prime number of elements looks new to every block.
    period = 1_000_003
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(period, generator=generator).bfloat16()
    tensor = torch.empty(COUNT, dtype=torch.bfloat16)
    whole = COUNT - COUNT % period
    tensor[:whole].view(-1, period).copy_(pattern)
    tensor[whole:] = pattern[: COUNT - whole]
    tensor[2**31 + 3] = 100

    # Slices of whole blocks, quantized alone, at the start, across 2**31, at the end.
    starts = [0, 2**31 - 2**20, 2**31 - 64, 2**31]
    slices = [slice(start, min(start + 2**20, COUNT)) for start in starts]
    expected = [quantize(tensor[part], NF4, 64) for part in slices]

    q = quantize(tensor, NF4, 64)
    assert len(q.packed) == 2**30 + 33
    assert len(q.scales) == 2**25 + 2
    for part, alone in zip(slices, expected, strict=True):
        first_byte, first_block = part.start // 2, part.start // 64
        of_part = q.packed[first_byte : first_byte + len(alone.packed)]
        assert torch.equal(of_part, alone.packed)
        of_part = q.scales[first_block : first_block + len(alone.scales)]
        assert torch.equal(of_part, alone.scales)

    tensor[2**31 + 64] = torch.nan
    with pytest.raises(ValueError, match=f"holds nan at flat index {2**31 + 64}"):
        quantize(tensor, NF4, 64)

    del tensor
    numbers = q.dequantize()
    assert numbers.shape == (COUNT,)
    for part, alone in zip(slices, expected, strict=True):
        assert torch.equal(numbers[part], alone.dequantize())
    assert float(numbers[2**31 + 3]) == 100
