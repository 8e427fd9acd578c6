"""The link that paged state goes over: bare copies between pinned host memory and GPU.

Nothing that moves state can be faster than these. A copy each way at the same time is
what a step of a paged optimizer costs at least if nothing stays on the card.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paging_timing import alternate
from qlora_lib.optim.devices import CudaDevice

PIECE_BYTES = 16 * 2**20  # a page
ROUNDS = 5
Step = Callable[[], None]


def measure(device: str, sizes: list[int]) -> dict[str, Any]:
    """Time the copies of each size: each way alone, and both at once."""
    return {"copies": [entry for size in sizes for entry in timed(device, size)]}


def timed(device: str, nbytes: int) -> list[dict[str, Any]]:
    link = Link(device, nbytes)
    ways: dict[tuple[str, int], Step] = {}
    for piece in (PIECE_BYTES, nbytes):
        ways["to the card", piece] = lambda piece=piece: link.copy(piece, out=False)
        ways["from the card", piece] = lambda piece=piece: link.copy(piece, into=False)
        ways["both at once", piece] = lambda piece=piece: link.copy(piece)
    entries = []
    for (way, piece), times in alternate(ways, device, ROUNDS).items():
        entry = {"way": way, "bytes_each_way": nbytes, "piece_bytes": piece, **times}
        if "seconds" in times:
            entry["gb_s_each_way"] = round(nbytes / times["seconds"] / 1e9, 2)
        entries.append(entry)
    return entries


class Link:
    """Memory of ``nbytes`` for each way on both ends, and a stream for each way."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.on_card = device == "cuda"
        # Random bytes: a copy of zeros need not take as long.
        self.card_in, self.card_out = (
            torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
            for _ in range(2)
        )
        self.host_in, self.host_out = (
            host_memory(device, nbytes).copy_(self.card_in) for _ in range(2)
        )
        if self.on_card:
            self.streams = torch.cuda.Stream(), torch.cuda.Stream()

    def copy(self, piece: int, into: bool = True, out: bool = True) -> None:
        """Copy all bytes in pieces, to the card or from it or both at once."""
        pairs = []
        if into:
            pairs.append((self.card_in, self.host_in))
        if out:
            pairs.append((self.host_out, self.card_out))
        if not self.on_card:
            for target, source in pairs:
                copy_pieces(target, source, piece)
            return
        caller = torch.cuda.current_stream()
        for (target, source), stream in zip(pairs, self.streams, strict=False):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                copy_pieces(target, source, piece)
        for _, stream in zip(pairs, self.streams, strict=False):
            caller.wait_stream(stream)


def host_memory(device: str, nbytes: int) -> Tensor:
    """Memory as the optimizer has it for its state."""
    if device == "cpu":
        return torch.zeros(nbytes, dtype=torch.uint8)
    return CudaDevice(torch.device(device)).host_memory(nbytes)


def copy_pieces(target: Tensor, source: Tensor, piece: int) -> None:
    for to, of in zip(target.split(piece), source.split(piece), strict=True):
        to.copy_(of, non_blocking=True)
