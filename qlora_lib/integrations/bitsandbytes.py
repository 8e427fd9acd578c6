"""Read and write the state-dict entries of a 4-bit weight as bitsandbytes stores it.

bitsandbytes (0.50) spreads one weight over several entries, whose keys begin with the
weight's own key. ``TYPE`` is ``nf4`` or ``fp4``; the two nested entries exist after
double quantization only.

==========================================  =========  ===============================
Key                                         dtype      Content
==========================================  =========  ===============================
``weight``                                  uint8      ``[ceil(count / 2), 1]``, two
                                                       codes a byte
``weight.absmax``                           float32    ``[blocks]``, the scales, or
                                            or uint8   their 8-bit codes
``weight.quant_map``                        float32    ``[16]``, the value of each code
``weight.nested_absmax``                    float32    ``[ceil(blocks / 256)]``, the
                                                       scales of the scales
``weight.nested_quant_map``                 float32    ``[256]``, the value of each
                                                       code of a scale
``weight.quant_state.bitsandbytes__TYPE``   uint8      JSON: block sizes, dtype, shape,
                                                       mean of the scales
==========================================  =========  ===============================

Only this format is implemented here; bitsandbytes itself is never imported.

NF4 bytes are the same in both libraries. FP4 codes are not: bitsandbytes numbers them
by bit pattern and has two of them for zero, while a :class:`~qlora_lib.Codebook` is
sorted and has one. So FP4 codes are translated: both zeros are read, code 0 is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_lib.numerics import (
    FP4_BITSANDBYTES,
    NF4,
    Codebook,
    QuantizedTensor,
)
from qlora_lib.numerics.packing import packed_size
from qlora_lib.numerics.quantized_tensor import SCALE_BLOCK_SIZE, SCALE_CODEBOOK

CODEBOOKS = {"nf4": NF4, "fp4": FP4_BITSANDBYTES}
# bitsandbytes' tables, in the order of its codes.
TABLES = {
    "nf4": NF4.values,
    "fp4": torch.tensor(
        [s * m / 12 for s in (1, -1) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)],
        dtype=torch.float32,
    ),
}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# Packed codes may be stored under another type of the same bytes (`quant_storage`).
STORAGE_DTYPES = (torch.uint8, *DTYPES.values())
DAMAGED = "the state dict is truncated or altered, load it again from its source"


def to_state_dict(q: QuantizedTensor, prefix: str = "weight") -> dict[str, Tensor]:
    """Return the entries that bitsandbytes reads as this tensor.

    NF4 codes and all scales are not copied: the entries share their memory with ``q``.

    Args:
        q: A tensor that was quantized from float16, bfloat16 or float32 to ``NF4`` or
            ``FP4_BITSANDBYTES`` in blocks of 32, 64, ..., 4096, with or without double
            quantization.
        prefix: Key of the weight, with which the other keys begin.

    Returns:
        The entries by key, on the device of ``q``; the JSON is on the CPU.

    Raises:
        ValueError: If the format has no place for ``q``: another codebook, block size
            or dtype, an offset, or scales quantized otherwise than by ``double_quant``.
    """
    quant_type = _writable_type(q)
    table = TABLES[quant_type]
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": tuple(q.shape),
    }
    packed = q.packed
    if quant_type == "fp4":
        packed = _translate(packed, _positions(q.codebook.values, table))
    # The tables are cloned, since safetensors refuses entries that share memory.
    entries = {
        prefix: packed.view(-1, 1),
        f"{prefix}.quant_map": table.clone().to(q.device),
    }
    if isinstance(q.scales, Tensor):
        entries[f"{prefix}.absmax"] = q.scales
    else:
        assert isinstance(q.scales.scales, Tensor) and q.scales.offset is not None
        nested_table = q.scales.codebook.values.clone().to(q.device)
        entries[f"{prefix}.absmax"] = q.scales.packed
        entries[f"{prefix}.nested_absmax"] = q.scales.scales
        entries[f"{prefix}.nested_quant_map"] = nested_table
        state["nested_blocksize"] = SCALE_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = q.scales.offset.item()
    encoded = list(json.dumps(state).encode())
    entries[_state_key(prefix, quant_type)] = torch.tensor(encoded, dtype=torch.uint8)
    return entries


def from_state_dict(
    entries: Mapping[str, Tensor], prefix: str = "weight"
) -> QuantizedTensor:
    """Return the tensor that bitsandbytes stored in these entries.

    NF4 codes and all scales are not copied if they are contiguous: the result shares
    their memory.

    Args:
        entries: A state dict; entries of other weights in it are left alone.
        prefix: Key of the weight, with which the other keys begin.

    Raises:
        ValueError: If an entry is missing or has another dtype or length than the shape
            and the block sizes ask for, if a scale is not finite, if a codebook is not
            that of the type, or if the JSON does not describe a 4-bit weight.
    """
    state = _read_state(entries, prefix)
    quant_type, block_size = state["quant_type"], state["blocksize"]
    shape = torch.Size(state["shape"])
    count = math.prod(shape)
    blocks = -(-count // block_size)
    table = TABLES[quant_type]
    _table(entries, f"{prefix}.quant_map", table)
    codebook = CODEBOOKS[quant_type]
    packed = _entry(entries, prefix, STORAGE_DTYPES, packed_size(count, bits=4))
    packed = packed.view(torch.uint8)
    if quant_type == "fp4":
        packed = _translate(packed, _positions(table, codebook.values))
    scales: Tensor | QuantizedTensor
    if "nested_offset" not in state:
        scales = _floats(entries, f"{prefix}.absmax", blocks)
    else:
        nested_table = _table(
            entries, f"{prefix}.nested_quant_map", SCALE_CODEBOOK.values
        )
        nested_blocks = -(-blocks // SCALE_BLOCK_SIZE)
        scales = QuantizedTensor(
            packed=_entry(entries, f"{prefix}.absmax", [torch.uint8], blocks),
            scales=_floats(entries, f"{prefix}.nested_absmax", nested_blocks),
            codebook=Codebook(SCALE_CODEBOOK.name, nested_table),
            block_size=SCALE_BLOCK_SIZE,
            shape=torch.Size((blocks,)),
            dtype=torch.float32,
            offset=torch.tensor(
                state["nested_offset"], dtype=torch.float32, device=packed.device
            ),
        )
    return QuantizedTensor(
        packed=packed,
        scales=scales,
        codebook=codebook,
        block_size=block_size,
        shape=shape,
        dtype=DTYPES[state["dtype"]],
    )


def _writable_type(q: QuantizedTensor) -> str:
    """The name of the tensor's type; ValueError if the format has no place for it."""
    names = [name for name, codebook in CODEBOOKS.items() if codebook == q.codebook]
    if not names:
        raise ValueError(
            f"q has codebook {q.codebook.name!r}, which bitsandbytes does not store: "
            "quantize to NF4 or FP4_BITSANDBYTES"
        )
    if q.block_size not in BLOCK_SIZES:
        raise ValueError(f"q has block_size {q.block_size}: use one of {BLOCK_SIZES}")
    if q.dtype not in DTYPES.values():
        raise ValueError(
            f"q has dtype {q.dtype}, which bitsandbytes does not know: quantize from "
            f"{', '.join(DTYPES)}"
        )
    has_their_table = isinstance(q.scales, Tensor) or _is_table(
        q.scales.codebook.values, SCALE_CODEBOOK.values
    )
    if not (q.has_standard_scales and has_their_table):
        raise ValueError(
            "q has an offset, or scales that are quantized otherwise than bitsandbytes "
            "does: quantize with double_quant=True or False"
        )
    return names[0]


def _read_state(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The JSON entry, with every field that is used known to be possible."""
    found = [key for key in entries if key.startswith(_state_key(prefix, ""))]
    known = {_state_key(prefix, quant_type): quant_type for quant_type in CODEBOOKS}
    if len(found) != 1 or found[0] not in known:
        raise ValueError(
            f"entries must have one of {' and '.join(known)}, got {found}: check "
            f"prefix={prefix!r}; if it is right, {DAMAGED}"
        )
    key = found[0]
    encoded = _entry(entries, key, [torch.uint8])
    try:
        state = json.loads(bytes(encoded.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON ({error}): {DAMAGED}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{key} must be a JSON object, got {state!r}: {DAMAGED}")
    _check_field(key, state, "quant_type", [known[key]])
    _check_field(key, state, "blocksize", BLOCK_SIZES)
    _check_field(key, state, "dtype", list(DTYPES))
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(
        type(size) is int and 0 <= size < 2**63 for size in shape
    ):
        raise ValueError(
            f"{key} must have a shape of sizes from 0 up, got {shape!r}: {DAMAGED}"
        )
    if any(name.startswith("nested_") for name in state):
        _check_field(key, state, "nested_blocksize", [SCALE_BLOCK_SIZE])
        _check_field(key, state, "nested_dtype", ["float32"])
        offset = state.get("nested_offset")
        largest = torch.finfo(torch.float32).max
        if not (isinstance(offset, float) and abs(offset) <= largest):
            raise ValueError(
                f"{key} must have a finite nested_offset, got {offset!r}: {DAMAGED}"
            )
    return state


def _check_field(
    key: str, state: dict[str, Any], name: str, allowed: Sequence[int | str]
) -> None:
    value = state.get(name)
    # Python holds 64 == 64.0 and 1 == True, but they are not the same JSON.
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise ValueError(
            f"{key} must have {name} {' or '.join(map(repr, allowed))}, got {value!r}: "
            f"{DAMAGED}"
        )


def _table(entries: Mapping[str, Tensor], key: str, expected: Tensor) -> Tensor:
    """The values of the codes, on the CPU; ValueError if they are not the expected."""
    table = _floats(entries, key, len(expected)).cpu()
    if not _is_table(table, expected):
        where = int((table - expected).abs().argmax())
        raise ValueError(
            f"{key} must be the table of its type, with {float(expected[where]):.7g} "
            f"at index {where}, got {float(table[where]):.7g}: {DAMAGED}"
        )
    return table


def _floats(entries: Mapping[str, Tensor], key: str, length: int) -> Tensor:
    """The entry as one line of ``length`` finite float32 numbers."""
    numbers = _entry(entries, key, [torch.float32], 4 * length)
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{key} must be finite, got NaN or infinity: {DAMAGED}")
    return numbers


def _entry(
    entries: Mapping[str, Tensor],
    key: str,
    dtypes: Sequence[torch.dtype],
    nbytes: int | None = None,
) -> Tensor:
    """The entry as one line of numbers, after a check of its type and size."""
    entry = entries.get(key)
    if not isinstance(entry, Tensor):
        found = "nothing" if entry is None else type(entry).__name__
        raise ValueError(f"entries must have a tensor {key}, got {found}: {DAMAGED}")
    if entry.dtype not in dtypes:
        names = " or ".join(map(str, dtypes))
        raise ValueError(f"{key} must be {names}, got {entry.dtype}: {DAMAGED}")
    if nbytes is not None and entry.nbytes != nbytes:
        raise ValueError(
            f"{key} must have {nbytes} bytes for this shape and block size, got "
            f"{entry.nbytes}: {DAMAGED}"
        )
    # What bitsandbytes' own layers hold is a subclass of Tensor; and only what is
    # contiguous can be viewed as bytes.
    return entry.detach().as_subclass(Tensor).reshape(-1).contiguous()


def _is_table(table: Tensor, expected: Tensor) -> bool:
    """Whether two tables agree, up to how processors round when they compute them."""
    return table.shape == expected.shape and torch.allclose(
        table, expected, rtol=1e-6, atol=0
    )


def _state_key(prefix: str, quant_type: str) -> str:
    return f"{prefix}.quant_state.bitsandbytes__{quant_type}"


def _positions(values: Tensor, table: Tensor) -> list[int]:
    """The code, in ``table``, of each of ``values``: the first if there are two."""
    codes = table.tolist()
    return [codes.index(value) for value in values.tolist()]


def _translate(packed: Tensor, new_codes: list[int]) -> Tensor:
    """Replace both 4-bit codes of each byte: ``new_codes[c]`` for ``c``."""
    unused = [0] * (16 - len(new_codes))
    codes = torch.tensor(new_codes + unused, dtype=torch.uint8)
    new_bytes = (codes[:, None] << 4 | codes).view(-1)
    return new_bytes.to(packed.device).index_select(0, packed.int())
