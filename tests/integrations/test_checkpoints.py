"""Quantized models on the disk, in this library's format and in bitsandbytes'."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
)

from qlora_lib.integrations.transformers import (
    FORMAT_VERSION,
    QLoRAConfig,
    load_bitsandbytes,
    save_bitsandbytes,
)
from qlora_lib.nn import Linear4bit, quantize_linears
from qlora_lib.numerics import FP4_BITSANDBYTES, NF4

from .conftest import GPT2, SMALL

UP_PROJ = "model.layers.1.mlp.up_proj"
CODEBOOKS = {"nf4": NF4, "fp4": FP4_BITSANDBYTES}
TOLERANCE = math.sqrt(42) * 2**-9  # of logits, see assert_close_logits


def reload(folder) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def load_theirs(folder, **options) -> nn.Module:
    return load_bitsandbytes(folder, device_map="cpu", **options)


@torch.no_grad()
def logits(model, tokens) -> Tensor:
    return model(tokens).logits


def assert_same_model(found, expected) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.fixture
def saved(load, llama_folder, tmp_path) -> Path:
    load(llama_folder).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


class TestReloading:
    @pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"double_quant": False, "compute_dtype": "float32"},
            {"codebook": "nf3", "block_size": 48},
            {"codebook": "int8", "block_size": None},
            {"skip_modules": ["down_proj"]},
        ],
    )
    def test_gives_the_same_bits(
        self, load, llama_folder, tmp_path, tokens, options, shard_size
    ):
        model = load(llama_folder, **options)
        model.save_pretrained(tmp_path, max_shard_size=shard_size)
        assert bool(shards(tmp_path)) == (shard_size == "20KB")
        again = reload(tmp_path)
        assert_same_model(again, model)
        assert torch.equal(logits(again, tokens), logits(model, tokens))
        assert again.is_quantized
        found = again.config.quantization_config
        assert found.to_dict() == model.config.quantization_config.to_dict()
        for name, module in again.named_modules():
            expected = model.get_submodule(name)
            assert type(module) is type(expected), name
            if isinstance(module, Linear4bit):
                assert str(module) == str(expected)
                assert module.weight_dtype == expected.weight_dtype
                assert not any(p.requires_grad for p in module.parameters())

    def test_keeps_tied_weights_once(self, load, base_folder, tmp_path, tokens):
        model = load(base_folder)
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        again = reload(tmp_path)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(logits(again, tokens), logits(model, tokens))

    def test_the_file_is_as_small_as_the_model(self, load, base_folder, tmp_path):
        model = load(base_folder)
        model.save_pretrained(tmp_path)
        size = (tmp_path / "model.safetensors").stat().st_size
        stored = sum(parameter.nbytes for parameter in model.parameters())
        assert stored < size < stored + 32_000  # the header

    def test_into_the_same_folder_and_once_more(self, saved, tokens):
        model = reload(saved)
        expected = logits(model, tokens)
        model.save_pretrained(saved)
        again = reload(saved)
        assert torch.equal(logits(again, tokens), expected)
        again.save_pretrained(saved)
        assert torch.equal(logits(reload(saved), tokens), expected)

    def test_with_experts_left_in_16_bits(self, save_random, load, tmp_path, tokens):
        config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
        model = load(save_random(config), skip_modules=["experts"])
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(reload(tmp_path), tokens), logits(model, tokens))

    def test_a_dtype_that_differs_is_told_and_not_taken(self, saved, caplog):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float16)
        assert model.dtype == torch.bfloat16
        assert "dtype is torch.float16, as asked for" in caplog.text

    def test_in_a_fresh_process(self, saved, tmp_path, tokens):
        script = (
            "import sys, torch\n"
            "import qlora_lib.integrations.transformers\n"
            "from transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "logits = model.cpu()(torch.arange(3, 35)[None]).logits.detach()\n"
            "torch.save(logits, sys.argv[2])\n"
        )
        done = python(script, saved, tmp_path / "logits")
        assert done.returncode == 0, done.stderr
        if not torch.cuda.is_available():
            found = torch.load(tmp_path / "logits")
            assert torch.equal(found, logits(reload(saved), tokens))

    def test_a_process_without_the_library_fails(self, saved):
        script = (
            "import sys\n"
            "from transformers import AutoModelForCausalLM\n"
            "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        )
        done = python(script, saved)
        assert done.returncode != 0
        assert "Unknown quantization type, got qlora_lib" in done.stderr
        assert re.search("mlp.up_proj.weight.*MISMATCH", done.stderr)


def python(script: str, *arguments) -> subprocess.CompletedProcess[str]:
    # So wide that the report of transformers does not leave out columns.
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


class TestDamagedCheckpoints:
    @pytest.mark.parametrize(
        "entry",
        [
            f"{UP_PROJ}.weight",
            f"{UP_PROJ}.scales",
            f"{UP_PROJ}.nested_scales",
            f"{UP_PROJ}.scales_offset",
            "model.layers.1.self_attn.q_proj.bias",
            "model.norm.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
        ],
    )
    def test_a_missing_entry_is_named(self, saved, edit_copy, entry):
        folder = edit_copy(saved, lambda tensors: tensors.pop(entry))
        with pytest.raises(ValueError, match=f"not complete, it has no {entry}:"):
            reload(folder)

    def test_many_missing_entries_are_counted(self, saved, edit_copy):
        def drop(tensors):
            for name in [n for n in tensors if n.startswith("model.layers.1.mlp")]:
                del tensors[name]

        with pytest.raises(ValueError, match=r"has no model.layers.1.*\(and 7 more\)"):
            reload(edit_copy(saved, drop))

    @pytest.mark.parametrize("entry", ["weight", "scales", "nested_scales"])
    def test_an_entry_cut_short_is_named(self, saved, edit_copy, entry):
        def cut(tensors):
            tensors[f"{UP_PROJ}.{entry}"] = tensors[f"{UP_PROJ}.{entry}"][:-4].clone()

        with pytest.raises(ValueError, match=rf"has {UP_PROJ}.{entry} of torch.uint8"):
            reload(edit_copy(saved, cut))

    def test_a_dense_weight_in_its_place_is_refused(self, saved, edit_copy):
        def replace(tensors):
            tensors[f"{UP_PROJ}.weight"] = torch.randn(128, 64)

        with pytest.raises(
            ValueError, match=rf"has {UP_PROJ}.weight of .* \(128, 64\)"
        ):
            reload(edit_copy(saved, replace))

    @pytest.mark.parametrize(
        "fields",
        [
            {"codebook": "nf3"},
            {"block_size": 128},
            {"block_size": None},
            {"double_quant": False},
        ],
    )
    def test_the_config_of_another_checkpoint_is_refused(
        self, saved, edit_copy, fields
    ):
        with pytest.raises(ValueError, match="config.json belongs to another"):
            reload(edit_copy(saved, **fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"codebook": "nf9"}, "got 'nf9'"),
            ({"format_version": FORMAT_VERSION + 1, "new": 1}, "upgrade"),
            ({"new": 1}, r"unknown \['new'\]"),
        ],
    )
    def test_a_config_that_is_not_understood_is_refused(
        self, saved, edit_copy, fields, message
    ):
        with pytest.raises(ValueError, match=message):
            reload(edit_copy(saved, **fields))

    def test_a_truncated_file_is_refused(self, saved):
        file = saved / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(Exception, match="file not fully covered"):
            reload(saved)

    def test_a_missing_shard_is_named(self, load, llama_folder, tmp_path):
        load(llama_folder).save_pretrained(tmp_path, max_shard_size="20KB")
        shard = shards(tmp_path)[1]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            reload(tmp_path)


def theirs(folder, **options) -> nn.Module:
    """A model that bitsandbytes and transformers quantize."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )


def their_weights(model) -> dict[str, Tensor]:
    """Each weight as bitsandbytes itself dequantizes it, in its own type."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            # Its AVX-512 kernel mistakes the scale of a block that goes on in the next
            # row, so it is given one long row.
            shape, state.shape = state.shape, torch.Size([state.shape.numel()])
            flat = bnb_functional.dequantize_4bit(module.weight.data, state)
            weights[name], state.shape = flat.view(shape), shape
    return weights


def our_weights(model) -> dict[str, Tensor]:
    return {
        name: module.quantized_weight.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def assert_same_weights(model, their_model) -> None:
    ours, theirs = our_weights(model), their_weights(their_model)
    assert ours.keys() == theirs.keys() != set()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name


def assert_close_logits(found: Tensor, expected: Tensor) -> None:
    """Two models of the same bits compute the same up to roundings to bfloat16.

    Both multiply the same bfloat16 weights, but the order of the sums is the library's
    own, so each product of a layer may be rounded otherwise, by 2^-9 at most. There are
    7 * 6 of them one after another or side by side in the base model; as independent
    errors they add up to sqrt(42) * 2^-9 = 1.3 %. Quantization itself is outside of
    that, see test_the_tolerance_tells_quantized_from_dense.
    """
    assert relative(found, expected) < TOLERANCE


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


FORMATS = [
    {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
]


def name_of(options) -> str:
    return "-".join(map(str, options.values()))


class TestReadingBitsandbytes:
    @pytest.mark.parametrize("shard_size", ["50GB", "500KB"])
    @pytest.mark.parametrize("options", FORMATS, ids=name_of)
    def test_weights_have_the_same_bits(
        self, base_folder, tmp_path, tokens, options, shard_size
    ):
        their_model = theirs(base_folder, **options)
        their_model.save_pretrained(tmp_path, max_shard_size=shard_size)
        assert bool(shards(tmp_path)) == (shard_size == "500KB")
        model = load_theirs(tmp_path)
        assert_same_weights(model, their_model)
        assert len(our_weights(model)) == 42
        assert_close_logits(logits(model, tokens), logits(their_model, tokens))
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                assert torch.equal(parameter, their_model.get_parameter(name))

    def test_the_tolerance_tells_quantized_from_dense(self, base_folder, tokens):
        quantized = AutoModelForCausalLM.from_pretrained(base_folder)
        exact = logits(quantized, tokens)
        quantize_linears(quantized)
        assert relative(logits(quantized, tokens), exact) > 2 * TOLERANCE

    @pytest.mark.parametrize("options", FORMATS, ids=name_of)
    def test_the_model_is_one_of_this_library(
        self, base_folder, tmp_path, tokens, options
    ):
        theirs(base_folder, **options).save_pretrained(tmp_path / "theirs")
        model = load_theirs(tmp_path / "theirs")
        config = model.config.quantization_config
        assert type(config) is QLoRAConfig
        assert config.values == CODEBOOKS[options["bnb_4bit_quant_type"]]
        assert config.double_quant is options["bnb_4bit_use_double_quant"]
        assert config.compute_dtype == "bfloat16"
        model.save_pretrained(tmp_path / "ours")
        again = reload(tmp_path / "ours")
        assert_same_model(again, model)
        assert torch.equal(logits(again, tokens), logits(model, tokens))

    @pytest.mark.parametrize("skipped", [["lm_head", "down_proj"], ["lm_head"]])
    def test_layers_they_left_dense_stay_dense(
        self, llama_folder, tmp_path, tokens, skipped
    ):
        their_model = theirs(llama_folder, llm_int8_skip_modules=skipped)
        their_model.save_pretrained(tmp_path / "theirs")
        model = load_theirs(tmp_path / "theirs")
        assert_same_weights(model, their_model)
        model.save_pretrained(tmp_path / "ours")
        assert_same_model(reload(tmp_path / "ours"), model)

    def test_dtype_is_that_of_everything_dense(self, base_folder, tmp_path):
        theirs(base_folder).save_pretrained(tmp_path)
        model = load_theirs(tmp_path, dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
        assert model.config.quantization_config.compute_dtype == "float32"
        assert_same_weights(model, theirs(base_folder))

    def test_a_transposed_layer(self, save_random, tmp_path):
        their_model = theirs(save_random(GPT2), bnb_4bit_quant_type="nf4")
        their_model.save_pretrained(tmp_path)
        assert_same_weights(load_theirs(tmp_path), their_model)

    @pytest.mark.parametrize(
        "suffix",
        [
            "",
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
        ],
    )
    def test_a_missing_entry_is_named(
        self, load, llama_folder, tmp_path, edit_copy, suffix
    ):
        save_bitsandbytes(load(llama_folder), tmp_path / "saved")
        name = f"{UP_PROJ}.weight"
        folder = edit_copy(tmp_path / "saved", lambda t: t.pop(f"{name}{suffix}"))
        with pytest.raises(ValueError, match=rf"{name}: entries must have .*{suffix}"):
            load_theirs(folder)

    def test_a_missing_weight_is_named(self, load, llama_folder, tmp_path, edit_copy):
        def drop(tensors):
            for key in [key for key in tensors if key.startswith(UP_PROJ)]:
                del tensors[key]

        save_bitsandbytes(load(llama_folder), tmp_path / "saved")
        folder = edit_copy(tmp_path / "saved", drop)
        with pytest.raises(ValueError, match=f"has no {UP_PROJ}.weight"):
            load_theirs(folder)

    def test_other_checkpoints_are_refused(self, llama_folder, saved, edit_copy):
        with pytest.raises(ValueError, match="says no quantization"):
            load_theirs(llama_folder)
        with pytest.raises(ValueError, match="says qlora_lib: load it with from_pre"):
            load_theirs(saved)

    def test_an_8_bit_checkpoint_is_refused(
        self, load, llama_folder, tmp_path, edit_copy
    ):
        save_bitsandbytes(load(llama_folder), tmp_path / "saved")
        folder = edit_copy(tmp_path / "saved", load_in_4bit=False, load_in_8bit=True)
        with pytest.raises(ValueError, match="must be a 4-bit checkpoint"):
            load_theirs(folder)

    def test_layers_of_several_kinds_are_refused(self, base_folder, tmp_path, load):
        model = load(base_folder)
        layer = model.model.layers[0].mlp
        dense = AutoModelForCausalLM.from_pretrained(base_folder)
        layer.up_proj = Linear4bit.from_linear(
            dense.model.layers[0].mlp.up_proj, block_size=128
        )
        save_bitsandbytes(model, tmp_path)
        with pytest.raises(ValueError, match=r"\('nf4', 128, True\)"):
            load_theirs(tmp_path)


class TestWritingBitsandbytes:
    @pytest.mark.parametrize("shard_size", ["50GB", "500KB"])
    @pytest.mark.parametrize("options", FORMATS, ids=name_of)
    def test_bitsandbytes_reads_the_same_bits(
        self, load, base_folder, tmp_path, tokens, options, shard_size
    ):
        model = load(
            base_folder,
            codebook=CODEBOOKS[options["bnb_4bit_quant_type"]].name,
            double_quant=options["bnb_4bit_use_double_quant"],
        )
        save_bitsandbytes(model, tmp_path, max_shard_size=shard_size)
        assert bool(shards(tmp_path)) == (shard_size == "500KB")
        their_model = reload(tmp_path)
        assert_same_weights(model, their_model)
        assert len(our_weights(model)) == 42
        assert_close_logits(logits(their_model, tokens), logits(model, tokens))
        assert their_model.lm_head.weight is their_model.model.embed_tokens.weight

    @pytest.mark.parametrize("options", FORMATS, ids=name_of)
    def test_config_json_is_what_transformers_writes(
        self, load, llama_folder, tmp_path, options
    ):
        theirs(
            llama_folder, llm_int8_skip_modules=["lm_head"], **options
        ).save_pretrained(tmp_path / "theirs")
        model = load(
            llama_folder,
            codebook=CODEBOOKS[options["bnb_4bit_quant_type"]].name,
            double_quant=options["bnb_4bit_use_double_quant"],
        )
        save_bitsandbytes(model, tmp_path / "ours")
        found, expected = (
            json.loads((tmp_path / folder / "config.json").read_text())
            for folder in ("ours", "theirs")
        )
        assert found == expected
        if not options["bnb_4bit_use_double_quant"]:
            files = [tmp_path / f / "model.safetensors" for f in ("ours", "theirs")]
            ours, theirs_ = map(load_file, files)
            assert ours.keys() == theirs_.keys()

    @pytest.mark.parametrize("block_size", [32, 256])
    def test_other_block_sizes(self, load, base_folder, tmp_path, block_size):
        model = load(base_folder, block_size=block_size)
        save_bitsandbytes(model, tmp_path)
        assert_same_weights(model, reload(tmp_path))
        again = load_theirs(tmp_path)
        assert again.config.quantization_config.block_size == block_size
        assert_same_model(again, model)

    def test_layers_left_dense_and_biases(self, load, llama_folder, tmp_path, tokens):
        model = load(llama_folder, skip_modules=["layers.0.mlp"])
        save_bitsandbytes(model, tmp_path)
        their_model = reload(tmp_path)
        assert_same_weights(model, their_model)
        assert_close_logits(logits(their_model, tokens), logits(model, tokens))
        assert_same_model(load_theirs(tmp_path), model)

    def test_transposed_layers_left_dense(self, load, save_random, tmp_path, tokens):
        model = load(save_random(GPT2), skip_modules=["c_proj"])
        save_bitsandbytes(model, tmp_path)
        their_model = reload(tmp_path)
        assert_same_weights(model, their_model)
        assert_close_logits(logits(their_model, tokens), logits(model, tokens))

    def test_the_model_is_left_as_it_is(self, load, llama_folder, tmp_path):
        model = load(llama_folder)
        config, quantizer = model.config.quantization_config, model.hf_quantizer
        save_bitsandbytes(model, tmp_path / "theirs")
        assert model.config.quantization_config is config
        assert model.hf_quantizer is quantizer
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError):
            save_bitsandbytes(model, tmp_path / "file" / "folder")
        assert model.config.quantization_config is config
        assert model.hf_quantizer is quantizer
        model.save_pretrained(tmp_path / "ours")
        assert_same_model(reload(tmp_path / "ours"), model)

    def test_a_model_quantized_in_place(self, base_folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        quantize_linears(model)
        save_bitsandbytes(model, tmp_path)
        assert not hasattr(model.config, "quantization_config")
        assert not hasattr(model, "hf_quantizer")
        assert_same_weights(model, reload(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"codebook": "int4"}, "q_proj cannot be saved: q has codebook 'int4'"),
            ({"codebook": "fp4_e2m1"}, "q has codebook 'fp4_e2m1'"),
            ({"block_size": 48}, "q has block_size 48: use one of"),
            ({"block_size": None}, "q has block_size None"),
            ({"compute_dtype": "float64"}, "q has dtype torch.float64"),
        ],
    )
    def test_what_the_format_cannot_hold_is_refused(
        self, load, llama_folder, tmp_path, options, message
    ):
        with pytest.raises(ValueError, match=message):
            save_bitsandbytes(load(llama_folder, **options), tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_other_models_are_refused(self, load, llama_folder, tmp_path):
        with pytest.raises(ValueError, match="has none: save it with save_pretrained"):
            save_bitsandbytes(
                AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "none"
            )
        model = load(llama_folder)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        with pytest.raises(TypeError, match="got PeftModel: merge"):
            save_bitsandbytes(adapted, tmp_path / "none")
        with pytest.raises(ValueError, match="has an adapter around model.layers.0"):
            save_bitsandbytes(adapted.get_base_model(), tmp_path / "none")
        assert not (tmp_path / "none").exists()
