"""Steps of PagedAdamW in a process of its own.

    python resumed_updates.py FILE BITS PAGES FIRST END

Loads parameters and state from FILE if it is there, takes steps FIRST to END - 1 with a
budget of PAGES pages, saves both to FILE, and prints a checksum of them.
"""

import hashlib
import sys
from pathlib import Path

import torch

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice

SHAPES = [(5000,), (64, 33), (), (3000,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
PAGE_BYTES = {32: 16384, 8: 4160}


def main(file: str, bits: str, pages: str, first: str, end: str) -> None:
    page_bytes = PAGE_BYTES[int(bits)]
    source = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype))
        for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ]
    optimizer = PagedAdamW(
        parameters,
        lr=1e-2,
        state_bits=int(bits),
        page_bytes=page_bytes,
        device_budget=int(pages) * page_bytes,
        device=SimulatedDevice(2**30),
    )
    if Path(file).exists():
        saved = torch.load(file, weights_only=True)
        for parameter, tensor in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(tensor)
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(int(first), int(end)):
        for number, parameter in enumerate(parameters):
            source = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(parameter.shape, generator=source)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    tensors = [parameter.detach() for parameter in parameters]
    state = optimizer.state_dict()
    torch.save({"parameters": tensors, "optimizer": state}, file)
    digest = hashlib.sha256()
    for arrays in state["state"].values():
        tensors += [arrays[name] for name in sorted(arrays)]
    for tensor in tensors:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
