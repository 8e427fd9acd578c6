"""The tiles that the matmuls cut a 4-bit matrix into."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qlora_lib.kernels.decoding import INTERPRETED

# Columns of W that are multiplied in one step: four threads load 16 bytes of each row.
CHUNK = tl.constexpr(128)

# Triton gives the axes of a tile to the lanes of a warp, then to the warps, then to
# registers: first those along which numbers are contiguous in memory, then the others,
# until 3.6 in ascending order and since 3.7 in descending order.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
IS_DESCENDING = tl.constexpr(_VERSION >= (3, 7))


class Tiling(NamedTuple):
    """How the work is cut into programs.

    Attributes:
        outputs: Rows of W that a program multiplies.
        warps: Warps of a program.
        sharing: Programs that share a multiprocessor, by their registers and their
            shared memory, lookup tables included.
        registers: The most registers that a thread may have; None leaves it to the
            compiler.
    """

    outputs: int
    warps: int
    sharing: int
    registers: int | None = None


@functools.lru_cache  # it is asked before every launch
def choose_tiling(
    tilings: tuple[Tiling, ...],
    n: int,
    repeats: int,
    device: torch.device,
    slices: tuple[int, ...] = (1,),
    overhead: int = 0,
) -> tuple[Tiling, int]:
    """The tiling, and into how many slices the columns are cut, that take least time.

    Programs that fit on the GPU at once are a round, and a round takes its time even if
    only one program is left for it. In the time for which a multiprocessor multiplies
    one row of W:

    ``time = rounds * sharing * (outputs + overhead) / slices``,
    ``rounds = ceil(programs / (multiprocessors * sharing))``

    Args:
        tilings: The first is the one that costs least for each row. Each of the others,
            and more slices, have to save a sixth to be chosen.
        n: Rows of W.
        repeats: How many programs multiply the same rows of W.
        device: Where the programs run.
        slices: What may be chosen from, in ascending order. Several are chosen only if
            all programs then are one round: each begins anew, and writes its sums.
        overhead: What a program does besides, in rows of W.
    """
    best = tilings[0], slices[0]
    if device.type != "cuda":
        return best
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def rounds(tiling: Tiling, cut: int) -> int:
        programs: int = triton.cdiv(n, tiling.outputs) * repeats * cut
        return triton.cdiv(programs, multiprocessors * tiling.sharing)

    def time(tiling: Tiling, cut: int) -> float:
        rows = tiling.sharing * (tiling.outputs + overhead)
        return rounds(tiling, cut) * rows / cut

    for cut in slices:
        for tiling in tilings:
            if cut > 1 and rounds(tiling, cut) > 1:
                continue
            if 6 * time(tiling, cut) <= 5 * time(*best):
                best = tiling, cut
    return best


def has_tables(device: torch.device) -> bool:
    """Whether :mod:`~qlora_lib.kernels.lookup` may use shared memory there."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and not INTERPRETED.value


@triton.jit
def add_product(left, right, sums):
    """``sums + left @ right`` on the tensor cores, in float32."""
    if INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 as if they were integers.
        left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    else:
        sums = tl.dot(left, right, sums)
    return sums


@triton.jit
def load_tile(pointers, exists, CONTIGUOUS: tl.constexpr, ONCE: tl.constexpr):
    """Load a tile whose axes go to lanes, warps and registers in this order.

    The matmuls depend on which thread holds what: not for their result, but to find the
    numbers where the tensor cores want them.

    Args:
        pointers: A tile of four or five axes.
        exists: Which pointers to follow, broadcast to them; zero elsewhere. None for
            all.
        CONTIGUOUS: Whether the last axis is contiguous in memory. One load of a thread
            is then along that axis.
        ONCE: Whether it is hardly read again, so that it leaves the cache first.
    """
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    if exists is None:
        tile = tl.load(_reordered(pointers, CONTIGUOUS), eviction_policy=POLICY)
    else:
        exists = tl.broadcast_to(exists, pointers.shape)
        tile = tl.load(
            _reordered(pointers, CONTIGUOUS),
            mask=_reordered(exists, CONTIGUOUS),
            other=0,
            eviction_policy=POLICY,
        )
    return _reordered(tile, CONTIGUOUS)


@triton.jit
def _reordered(tile, CONTIGUOUS: tl.constexpr):
    """Axes in the order of importance for this Triton; its own inverse."""
    if IS_DESCENDING:
        if len(tile.shape) == 5:
            tile = tl.permute(tile, (3, 2, 1, 0, 4))
        elif CONTIGUOUS:
            tile = tl.permute(tile, (2, 1, 0, 3))
        else:
            tile = tl.permute(tile, (3, 2, 1, 0))
    return tile


@triton.jit
def spread_scales(s):
    """``[4, 8, A, B]`` -> ``[8, A, B, 16]``: a thread has one scale for four words."""
    s = tl.permute(s, (1, 2, 3, 0))[:, :, :, :, None]
    s = tl.broadcast_to(s, (s.shape[0], s.shape[1], s.shape[2], 4, 4))
    return tl.reshape(s, (s.shape[0], s.shape[1], s.shape[2], 16))
