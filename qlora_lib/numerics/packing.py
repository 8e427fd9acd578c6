"""Packing: codes of 1 to 8 bits laid end to end in bytes.

The codes form one stream of bits, most significant bit first. For 4 bits that puts code
``2 i`` into the high half and code ``2 i + 1`` into the low half of byte ``i``, which
is the layout of bitsandbytes; for widths that do not divide 8 a code may straddle two
bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Codes packed at a time: the working set stays within a processor's cache.
PIECE = 2**20


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take: ``ceil(count * bits / 8)``."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int, padding: int = 0) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8 of any shape, each below ``2**bits``, read in row-major order.
        bits: Width of a code, 1 to 8.
        padding: The code that fills the unused bits of the last byte.

    Returns:
        uint8 ``[ceil(count * bits / 8)]``.

    Raises:
        TypeError: If ``codes`` is not uint8.
        ValueError: If ``bits`` is not in 1..8.
    """
    group, group_bytes = _group(bits)
    codes = _flat_bytes("codes", codes)
    count = len(codes)
    packed = codes.new_empty(packed_size(count, bits))
    for start in range(0, count, PIECE):
        piece = codes[start : start + PIECE]
        short = -len(piece) % group
        if short:
            piece = torch.cat([piece, piece.new_full((short,), padding)])
        first_byte = start * bits // 8
        whole = _pack_groups(piece.view(-1, group), bits, group_bytes).view(-1)
        target = packed[first_byte : first_byte + len(whole)]
        target.copy_(whole[: len(target)])
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first ``count`` codes; the inverse of :func:`pack`.

    Args:
        packed: uint8 ``[ceil(count * bits / 8)]``, or another shape of that many bytes.
        bits: Width of a code, 1 to 8.
        count: How many codes there are.

    Returns:
        uint8 ``[count]``.

    Raises:
        TypeError: If ``packed`` is not uint8.
        ValueError: If ``bits`` is not in 1..8 or ``packed`` has another length.
    """
    group, group_bytes = _group(bits)
    packed = _flat_bytes("packed", packed)
    if len(packed) != packed_size(count, bits):
        raise ValueError(
            f"packed must have {packed_size(count, bits)} bytes to hold {count} codes "
            f"of {bits} bits, got {len(packed)}"
        )
    codes = packed.new_empty(count)
    for start in range(0, count, PIECE):
        first_byte = start * bits // 8
        piece = packed[first_byte : first_byte + PIECE * bits // 8]
        short = -len(piece) % group_bytes
        if short:
            piece = torch.cat([piece, piece.new_zeros(short)])
        whole = _unpack_groups(piece.view(-1, group_bytes), bits, group).view(-1)
        target = codes[start : start + PIECE]
        target.copy_(whole[: len(target)])
    return codes


def _group(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and the number of those bytes."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _flat_bytes(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8:
        raise TypeError(
            f"{name} must be uint8, got {tensor.dtype}: convert it with "
            ".to(torch.uint8)"
        )
    return tensor.reshape(-1)


def _pack_groups(codes: Tensor, bits: int, group_bytes: int) -> Tensor:
    """uint8 ``[groups, codes of a group]`` -> uint8 ``[groups, bytes of a group]``."""
    packed = codes.new_zeros(len(codes), group_bytes)
    for byte, code, shift in _overlaps(bits, group_bytes):
        part = codes[:, code]
        packed[:, byte] |= part << shift if shift >= 0 else part >> -shift
    return packed


def _unpack_groups(packed: Tensor, bits: int, group: int) -> Tensor:
    """uint8 ``[groups, bytes of a group]`` -> uint8 ``[groups, codes of a group]``."""
    codes = packed.new_zeros(len(packed), group)
    for byte, code, shift in _overlaps(bits, packed.shape[1]):
        part = packed[:, byte]
        codes[:, code] |= part >> shift if shift >= 0 else part << -shift
    return codes.bitwise_and_(2**bits - 1)


def _overlaps(bits: int, group_bytes: int) -> list[tuple[int, int, int]]:
    """Every (byte, code, shift) of a group in which the code has bits in that byte.

    Shifting the code left by ``shift`` (right, if negative) aligns it with the byte.
    """
    overlaps = []
    for byte in range(group_bytes):
        for code in range(group_bytes * 8 // bits):
            shift = 8 * (byte + 1) - bits * (code + 1)
            if -bits < shift < 8:
                overlaps.append((byte, code, shift))
    return overlaps
