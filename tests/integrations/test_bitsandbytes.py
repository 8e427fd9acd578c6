"""The file format of bitsandbytes: written as it writes, read as it reads."""

import json
import math

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lib.integrations.bitsandbytes import from_state_dict, to_state_dict
from qlora_lib.numerics import (
    DYNAMIC8,
    FP4,
    FP4_BITSANDBYTES,
    INT4,
    NF4,
    QuantizedTensor,
    quantize,
)

CODEBOOKS = {"nf4": NF4, "fp4": FP4_BITSANDBYTES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (65,), (1, 1000), (8, 3, 5), (300, 96)]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


def their_entries(x: Tensor, prefix: str = "weight", **options) -> dict[str, Tensor]:
    """The state-dict entries of bitsandbytes itself."""
    packed, state = bnb_functional.quantize_4bit(x, **options)
    extra = {f"{prefix}.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {prefix: packed, **extra}


def their_numbers(entries: dict[str, Tensor], prefix: str = "weight") -> Tensor:
    """What bitsandbytes itself makes of the entries."""
    entries = dict(entries)
    packed = entries.pop(prefix)
    state = bnb_functional.QuantState.from_dict(entries, device="cpu")
    # Its AVX-512 kernel mistakes the scale of a block that goes on in the next row, so
    # it is given one long row.
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return bnb_functional.dequantize_4bit(packed, state).view(shape)


def assert_same_entries(
    entries: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    assert entries.keys() == expected.keys()
    for key, entry in entries.items():
        assert entry.dtype == expected[key].dtype, key
        assert entry.shape == expected[key].shape, key
        as_bytes = entry.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(
            as_bytes, expected[key].contiguous().view(-1).view(torch.uint8)
        ), key


class TestWriting:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_flat_nf4_is_what_bitsandbytes_writes(self, dtype, shape):
        x = normal(shape, dtype)
        entries = to_state_dict(quantize(x, NF4, 64))
        assert_same_entries(entries, their_entries(x, quant_type="nf4"))

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_every_block_size(self, block_size):
        x = normal((300, 128))
        entries = to_state_dict(quantize(x, NF4, block_size))
        theirs = their_entries(x, quant_type="nf4", blocksize=block_size)
        assert_same_entries(entries, theirs)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    def test_double_quantization_but_for_the_codes_of_scales(
        self, quant_type, dtype, shape
    ):
        x = normal(shape, dtype)
        q = quantize(x, CODEBOOKS[quant_type], 64, double_quant=True)
        entries = to_state_dict(q)
        theirs = their_entries(x, quant_type=quant_type, compress_statistics=True)
        # Its CPU path rounds the codes of scales otherwise; see tests/numerics.
        assert torch.equal(entries["weight.absmax"], q.scales.codes)
        theirs["weight.absmax"] = entries["weight.absmax"]
        if quant_type == "fp4":
            # It has two codes for zero.
            theirs["weight"] = entries["weight"]
        assert_same_entries(entries, theirs)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_flat_fp4_but_for_the_second_zero(self, dtype, shape):
        x = normal(shape, dtype)
        entries = to_state_dict(quantize(x, FP4_BITSANDBYTES, 64))
        theirs = their_entries(x, quant_type="fp4")
        high, low = theirs["weight"] >> 4, theirs["weight"] & 15
        one_zero = (high % 8 > 0) * high << 4 | (low % 8 > 0) * low
        theirs["weight"] = one_zero.to(torch.uint8)
        assert_same_entries(entries, theirs)

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    def test_bitsandbytes_reads_it(self, quant_type, shape, dtype, double_quant):
        q = quantize(normal(shape, dtype), CODEBOOKS[quant_type], 64, double_quant)
        numbers = their_numbers(to_state_dict(q))
        assert numbers.dtype == dtype
        assert torch.equal(numbers, q.dequantize())

    def test_a_layer_of_bitsandbytes_loads_it(self):
        q = quantize(normal((48, 64)), NF4, 64, double_quant=True)
        entries = to_state_dict(q)
        weight = bnb.nn.Params4bit.from_prequantized(
            data=entries.pop("weight"), quantized_stats=entries, device="cpu"
        )
        x = normal((5, 64))
        output = bnb.matmul_4bit(x, weight.t(), weight.quant_state)
        torch.testing.assert_close(output, x @ q.dequantize().t())

    def test_other_prefixes(self):
        q = quantize(normal((48, 64)), NF4, 64, double_quant=True)
        entries = to_state_dict(q, "layers.0.weight")
        expected = {f"layers.0.{k}": v for k, v in to_state_dict(q).items()}
        assert_same_entries(entries, expected)

    def test_an_empty_tensor(self):
        x = torch.empty(0, 4)
        assert_same_entries(
            to_state_dict(quantize(x, NF4, 64)), their_entries(x, quant_type="nf4")
        )
        double = to_state_dict(quantize(x, NF4, 64, double_quant=True))
        assert from_state_dict(double).dequantize().shape == (0, 4)

    @pytest.mark.parametrize(
        ("codebook", "block_size", "dtype", "message"),
        [
            (INT4, 64, torch.float32, "codebook 'int4'.*quantize to NF4"),
            (FP4, 64, torch.float32, "codebook 'fp4_e2m1'.*FP4_BITSANDBYTES"),
            (NF4, None, torch.float32, "block_size None: use one of .*32, 64"),
            (NF4, 48, torch.float32, "block_size 48: use one of"),
            (NF4, 8192, torch.float32, "block_size 8192: use one of"),
            (NF4, 64, torch.float64, "dtype torch.float64.*quantize from float16"),
        ],
    )
    def test_no_place_in_the_format(self, codebook, block_size, dtype, message):
        q = quantize(normal((100,), dtype), codebook, block_size)
        with pytest.raises(ValueError, match=f"q has {message}"):
            to_state_dict(q)

    @pytest.mark.parametrize(
        "scales",
        [
            quantize(torch.ones(2), NF4, 256),
            quantize(torch.ones(2), DYNAMIC8, 256),
            quantize(torch.ones(2), DYNAMIC8, 256, double_quant=True),
            quantize(torch.ones(128), NF4, 64, double_quant=True).scales.scales,
        ],
    )
    def test_scales_of_another_kind(self, scales):
        q = QuantizedTensor(
            packed=torch.zeros(64, dtype=torch.uint8),
            scales=scales,
            codebook=NF4,
            block_size=64,
            shape=torch.Size([128]),
            dtype=torch.float32,
            offset=torch.tensor(0.0) if isinstance(scales, Tensor) else None,
        )
        with pytest.raises(
            ValueError, match="quantize with double_quant=True or False"
        ):
            to_state_dict(q)


class TestReading:
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    def test_the_same_numbers(self, quant_type, shape, dtype, double_quant):
        x = normal(shape, dtype)
        entries = their_entries(
            x, quant_type=quant_type, compress_statistics=double_quant
        )
        q = from_state_dict(entries)
        assert q.codebook == CODEBOOKS[quant_type]
        assert q.shape == shape
        assert q.dtype == dtype
        numbers = q.dequantize()
        assert numbers.dtype == dtype
        assert torch.equal(numbers, their_numbers(entries))

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_every_block_size(self, block_size, double_quant):
        x = normal((300, 128))
        entries = their_entries(
            x,
            quant_type="nf4",
            blocksize=block_size,
            compress_statistics=double_quant,
        )
        q = from_state_dict(entries)
        assert q.block_size == block_size
        assert torch.equal(q.dequantize(), their_numbers(entries))

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_written_again_it_is_the_same(self, shape, double_quant):
        entries = their_entries(
            normal(shape), quant_type="nf4", compress_statistics=double_quant
        )
        assert_same_entries(to_state_dict(from_state_dict(entries)), entries)

    def test_all_codes_of_fp4(self):
        entries = their_entries(normal((256, 2)), quant_type="fp4")
        entries["weight"] = torch.arange(256, dtype=torch.uint8)[:, None]
        numbers = from_state_dict(entries).dequantize()
        assert torch.equal(numbers, their_numbers(entries))
        table = bnb_functional.get_4bit_type("fp4", device="cpu")
        assert table.unique().numel() == 15
        scales = entries["weight.absmax"].repeat_interleave(64)
        expected = table.repeat_interleave(16), table.repeat(16)
        by_hand = torch.stack(expected, 1).view(-1) * scales
        assert torch.equal(numbers.view(-1), by_hand)

    def test_the_state_dict_of_a_layer(self):
        layer = bnb.nn.Linear4bit(64, 48, bias=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            normal((48, 64)), quant_type="nf4", compress_statistics=True
        )
        layer = layer.to("cpu")
        entries = layer.state_dict()
        q = from_state_dict(entries)
        assert type(q.packed) is Tensor
        expected = bnb_functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        assert torch.equal(q.dequantize(), expected)

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
    def test_codes_stored_as_another_type(self, storage):
        x = normal((16, 64))
        entries = their_entries(x, quant_type="nf4", quant_storage=storage)
        assert entries["weight"].dtype == storage
        q = from_state_dict(entries)
        assert torch.equal(q.packed, quantize(x, NF4, 64).packed)

    def test_a_file_of_several_weights(self, tmp_path):
        weights = {
            f"layers.{i}.weight": quantize(normal((64, 32 + i)), NF4, 64, True)
            for i in range(3)
        }
        weights["fp4.weight"] = quantize(normal((64, 32)), FP4_BITSANDBYTES, 32)
        entries = {}
        for prefix, q in weights.items():
            entries |= to_state_dict(q, prefix)
        save_file(entries, tmp_path / "model.safetensors")
        loaded = load_file(tmp_path / "model.safetensors")
        assert_same_entries(loaded, entries)
        for prefix, q in weights.items():
            again = from_state_dict(loaded, prefix)
            assert torch.equal(again.dequantize(), q.dequantize())

    def test_nothing_is_copied_or_changed(self):
        entries = their_entries(
            normal((64, 64)), quant_type="nf4", compress_statistics=True
        )
        before = {key: entry.clone() for key, entry in entries.items()}
        q = from_state_dict(entries)
        assert q.packed.data_ptr() == entries["weight"].data_ptr()
        assert q.scales.packed.data_ptr() == entries["weight.absmax"].data_ptr()
        assert_same_entries(entries, before)

    def test_strided_entries(self):
        q = quantize(normal((300, 96)), NF4, double_quant=True)
        entries = to_state_dict(q)
        entries["weight"] = entries["weight"].view(-1).view(torch.bfloat16)
        strided = {k: v.repeat_interleave(2, dim=0)[::2] for k, v in entries.items()}
        assert torch.equal(from_state_dict(strided).dequantize(), q.dequantize())

    def test_the_mean_is_float32_whatever_the_default(self):
        q = quantize(normal((300, 96)), NF4, double_quant=True)
        entries = to_state_dict(q)
        torch.set_default_dtype(torch.bfloat16)
        try:
            offset = from_state_dict(entries).scales.offset
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(offset, q.scales.offset)

    def test_a_table_that_another_processor_rounded(self):
        # torch.linspace, and so the dynamic map, ends in other bits elsewhere.
        entries = their_entries(
            normal((64, 64)), quant_type="nf4", compress_statistics=True
        )
        table = entries["weight.nested_quant_map"]
        entries["weight.nested_quant_map"] = torch.nextafter(table, 0 * table)
        q = from_state_dict(entries)
        assert not torch.equal(q.scales.codebook.values, DYNAMIC8.values)
        assert torch.equal(q.dequantize(), their_numbers(entries))
        assert_same_entries(to_state_dict(q), entries)


def with_state(entries: dict[str, Tensor], **fields) -> None:
    """Change fields of the JSON; None removes one."""
    key = next(key for key in entries if "quant_state" in key)
    state = json.loads(bytes(entries[key].tolist()))
    state.update(fields)
    state = {name: value for name, value in state.items() if value is not None}
    set_json(entries, json.dumps(state).encode())


def set_json(entries: dict[str, Tensor], encoded: bytes) -> None:
    key = next(key for key in entries if "quant_state" in key)
    entries[key] = torch.tensor(list(encoded), dtype=torch.uint8)


class TestBadInput:
    @pytest.fixture
    def entries(self) -> dict[str, Tensor]:
        """300 * 128 numbers: 19,200 bytes, 600 scales, 3 scales of scales."""
        return to_state_dict(quantize(normal((300, 128)), NF4, 64, double_quant=True))

    def check(self, entries: dict[str, Tensor], message: str) -> None:
        before = dict(entries)
        with pytest.raises(ValueError, match=message):
            from_state_dict(entries)
        assert entries == before

    @pytest.mark.parametrize(
        "name", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
    )
    def test_a_missing_entry(self, entries, name):
        del entries[f"weight{name}"]
        self.check(
            entries, f"must have a tensor weight{name}, got nothing: .*load it again"
        )

    def test_no_state(self, entries):
        del entries["weight.quant_state.bitsandbytes__nf4"]
        self.check(entries, r"one of weight.quant_state.bitsandbytes__nf4 .* got \[\]")

    def test_another_prefix(self, entries):
        with pytest.raises(ValueError, match="check prefix='model.weight'"):
            from_state_dict(entries, "model.weight")

    def test_two_states(self, entries):
        state = entries["weight.quant_state.bitsandbytes__nf4"]
        entries["weight.quant_state.bitsandbytes__fp4"] = state
        self.check(entries, "entries must have one of .*nf4.*fp4.* got .*nf4.*fp4")

    def test_an_unknown_type(self, entries):
        state = entries.pop("weight.quant_state.bitsandbytes__nf4")
        entries["weight.quant_state.bitsandbytes__af4"] = state
        self.check(entries, r"entries must have one of .* got \['.*__af4'\]")

    @pytest.mark.parametrize(
        ("name", "nbytes"),
        [
            ("", 19_200),
            (".absmax", 600),
            (".quant_map", 64),
            (".nested_absmax", 12),
            (".nested_quant_map", 1024),
        ],
    )
    @pytest.mark.parametrize("change", [-1, 1])
    def test_a_wrong_length(self, entries, name, nbytes, change):
        entry = entries[f"weight{name}"].view(-1)
        longer = torch.cat([entry, entry[:1]])
        entries[f"weight{name}"] = entry[:-1] if change < 0 else longer
        found = nbytes + change * entry.itemsize
        self.check(entries, f"weight{name} must have {nbytes} bytes .* got {found}: ")

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("", torch.int64),
            ("", torch.bool),
            (".absmax", torch.float32),
            (".absmax", torch.int8),
            (".quant_map", torch.float64),
            (".nested_absmax", torch.bfloat16),
            (".nested_quant_map", torch.uint8),
            (".quant_state.bitsandbytes__nf4", torch.int32),
        ],
    )
    def test_a_wrong_dtype(self, entries, name, dtype):
        entries[f"weight{name}"] = entries[f"weight{name}"].to(dtype)
        self.check(
            entries, f"weight{name} must be torch.*, got {dtype}: .*load it again"
        )

    def test_no_tensor(self, entries):
        entries["weight.absmax"] = [1.0, 2.0]
        self.check(entries, r"must have a tensor weight.absmax, got list")

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_scale_that_is_not_finite(self, entries, bad):
        entries["weight.nested_absmax"] = torch.tensor([1.0, bad, 1.0])
        self.check(entries, "weight.nested_absmax must be finite, got NaN or infinity")

    @pytest.mark.parametrize("name", ["quant_map", "nested_quant_map"])
    def test_another_table(self, entries, name):
        table = entries[f"weight.{name}"].clone()
        table[5] = 0.25
        entries[f"weight.{name}"] = table
        self.check(
            entries, f"weight.{name} must be the table .* at index 5, got 0.25: "
        )

    def test_the_table_of_the_other_type(self, entries):
        fp4 = to_state_dict(quantize(normal((64,)), FP4_BITSANDBYTES, 64))
        entries["weight.quant_map"] = fp4["weight.quant_map"]
        self.check(entries, "weight.quant_map must be the table of its type")

    @pytest.mark.parametrize(
        "encoded",
        [
            b"",
            b"{",
            b"nf4",
            b'{"quant_type": "nf4"',
            b"\xff\xfe\x00",
            b"\x80abc",
            b"[" * 100_000,
        ],
    )
    def test_no_json(self, entries, encoded):
        set_json(entries, encoded)
        self.check(
            entries, "weight.quant_state.bitsandbytes__nf4 is not JSON .*load it"
        )

    @pytest.mark.parametrize("encoded", [b"[]", b"null", b'"nf4"', b"4", b"NaN"])
    def test_no_json_object(self, entries, encoded):
        set_json(entries, encoded)
        self.check(entries, "bitsandbytes__nf4 must be a JSON object, got ")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("quant_type", None),
            ("quant_type", "fp4"),
            ("quant_type", 4),
            ("blocksize", None),
            ("blocksize", -64),
            ("blocksize", 0),
            ("blocksize", 63),
            ("blocksize", 64.0),
            ("blocksize", True),
            ("blocksize", "64"),
            ("blocksize", [64]),
            ("dtype", None),
            ("dtype", "float64"),
            ("dtype", "torch.float32"),
            ("dtype", "nonsense"),
            ("dtype", 32),
            ("shape", None),
            ("shape", 38_400),
            ("shape", [300, -128]),
            ("shape", [-300, -128]),
            ("shape", [300, 128.0]),
            ("shape", ["300", 128]),
            ("shape", [True, 38_400]),
            ("shape", {"rows": 300}),
            ("shape", [0, 10**30]),
            ("nested_blocksize", None),
            ("nested_blocksize", 255),
            ("nested_blocksize", -256),
            ("nested_blocksize", "256"),
            ("nested_dtype", None),
            ("nested_dtype", "float16"),
            ("nested_offset", None),
            ("nested_offset", "0.1"),
            ("nested_offset", 1),
            ("nested_offset", math.nan),
            ("nested_offset", -math.inf),
            ("nested_offset", 1e300),
        ],
    )
    def test_an_impossible_field(self, entries, field, value):
        with_state(entries, **{field: value})
        self.check(
            entries,
            rf"bitsandbytes__nf4 must have .*{field}.*, got .*: .*load it again",
        )

    @pytest.mark.parametrize(
        ("shape", "nbytes"),
        [
            ((300, 127), 19_050),
            ((301, 128), 19_264),
            ((0, 128), 0),
            ((10**12,), 5 * 10**11),
        ],
    )
    def test_a_shape_of_another_size(self, entries, shape, nbytes):
        with_state(entries, shape=shape)
        self.check(entries, f"weight must have {nbytes} bytes .* got 19200")

    def test_another_block_size(self, entries):
        with_state(entries, blocksize=128)
        self.check(entries, "weight.absmax must have 300 bytes .* got 600")

    def test_codes_of_scales_without_their_state(self, entries):
        nested = ("nested_blocksize", "nested_dtype", "nested_offset")
        with_state(entries, **dict.fromkeys(nested))
        self.check(entries, "weight.absmax must be torch.float32, got torch.uint8")
