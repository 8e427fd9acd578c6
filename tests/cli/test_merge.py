import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lib.integrations.peft import (
    load_adapter,
    merge_dequantized,
    merge_into_4bit,
)
from qlora_lib.integrations.transformers import QLoRAConfig
from qlora_lib.nn import Linear4bit


@pytest.fixture
def adapted(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=QLoRAConfig(), device_map="cpu"
    )
    return load_adapter(model, adapter)


def same_parameters(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


def test_the_merged_model_is_an_ordinary_one(qlora, base, adapter, adapted, tmp_path):
    result = qlora("merge", base, adapter, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"out": str(tmp_path / "out"), "bits": 16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(isinstance(module, Linear4bit) for module in found.modules())
    assert same_parameters(found, merge_dequantized(adapted))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"]


def test_merging_into_4_bits_reports_its_error(qlora, base, adapter, adapted, tmp_path):
    words = ("merge", base, adapter, tmp_path / "out", "--into-4bit")
    result = qlora(*words, "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    expected = merge_into_4bit(adapted)
    assert shown["bits"] == 4
    assert shown["merge_error"] == {
        "weight": expected.total.weight,
        "update": expected.total.update,
    }
    assert shown["merge_error_of_layers"].keys() == expected.layers.keys()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert same_parameters(found, expected.model)
    text = qlora(*words, "--overwrite").stdout
    assert f"{expected.total.update:.2f} times what the adapter does" in text


def test_the_options_of_quantization_count(qlora, base, adapter, tmp_path):
    for out, options in (("nf4", []), ("nf2", ["--codebook", "nf2"])):
        result = qlora("merge", base, adapter, tmp_path / out, *options)
        assert result.exit_code == 0, result.stderr
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [
        load_file(tmp_path / out / "model.safetensors")[name] for out in ("nf4", "nf2")
    ]
    assert not torch.equal(*weights)


def test_nothing_that_is_read_is_replaced(failing, base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    words = ("merge", base, tmp_path / "adapter")
    assert "which is read" in failing(*words, tmp_path / "adapter", "--overwrite")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("whole")
    assert "not empty" in failing(*words, tmp_path / "full")
    kept = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert kept == {path.name for path in adapter.iterdir()}


def test_what_cannot_be_merged_leaves_no_folder(failing, base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    message = failing("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert "cannot be read" in message
    assert not (tmp_path / "out").exists()
