"""What tests/cli does not show through the commands."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig

from chapters import ROOT
from qlora_lib.finetuning import loading
from qlora_lib.finetuning.loading import (
    load_config,
    load_model,
    load_tokenizer,
    quantization_of,
)
from qlora_lib.nn import Linear4bit

BASE = str(ROOT / "models" / "base")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def quantized_by(**quantization):
    config = AutoConfig.from_pretrained(BASE)
    config.quantization_config = quantization
    return config


def test_a_model_is_quantized_as_asked_for():
    model = load_model(
        BASE, device="cpu", codebook="nf3", block_size=128, compute_dtype="float32"
    )
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert (layer.codebook.name, layer.block_size) == ("nf3", 128)
    assert layer.nested_scales is not None
    assert model.dtype == torch.float32


def test_a_dense_model_is_left_as_it_is():
    model = load_model(BASE, device="cpu", dense=True)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("no-one/nothing", ConnectionError, "run once with a connection"),
        ("nothing", ConnectionError, "pass the path of a folder"),
        ("./nothing", FileNotFoundError, "does not exist"),
        ("a/b/nothing", FileNotFoundError, "does not exist"),
        ("not an id", FileNotFoundError, "cannot be an id"),
    ],
)
def test_a_model_that_is_not_there(load, model, error, words):
    with pytest.raises(error, match=words):
        load(model)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match="without config.json"):
        load_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: pass the base model"):
        load_config(str(tmp_path))
    with pytest.raises(NotADirectoryError, match="pass the folder"):
        load_config(str(tmp_path / "adapter_config.json"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(GatedRepoError, "accept its terms"), (RepositoryNotFoundError, "spelling")],
)
def test_what_the_hub_refuses(monkeypatch, kind, words):
    class Refusal(kind):
        def __init__(self):
            Exception.__init__(self, "401")

    def ask(*args, **kwargs):
        raise OSError("a page of text") from Refusal()

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", ask)
    with pytest.raises(ValueError, match=words):
        load_config("some-one/some-model")


def test_a_model_of_another_kind_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "encoder")
    load_config(str(tmp_path / "encoder"))  # BERT can continue text, in a way
    path = tmp_path / "encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="'vit', which is no causal"):
        load_config(str(path.parent))


def test_a_folder_without_tokenizer_or_weights(tmp_path):
    AutoConfig.from_pretrained(BASE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_model(str(tmp_path))


def test_weights_that_are_cut_short(tmp_path):
    shutil.copytree(BASE, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="it may be cut short"):
        load_model(str(tmp_path / "cut"), device="cpu")


def test_weights_of_torch_that_are_cut_short(tmp_path):
    shutil.copytree(BASE, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    weights = tmp_path / "cut" / "pytorch_model.bin"
    torch.save({"lm_head.weight": torch.zeros(4096, 192)}, weights)
    whole = weights.read_bytes()
    for length in (len(whole) // 2, 10, 0):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="it may be cut short"):
            load_model(str(tmp_path / "cut"), device="cpu")


def test_nothing_is_asked_for_beside_dense():
    with pytest.raises(ValueError, match="leave out codebook"):
        load_model(BASE, device="cpu", dense=True, codebook="nf3")


def test_other_quantizations_are_refused():
    for quantization in (
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ):
        with pytest.raises(ValueError, match="is quantized already, by"):
            quantization_of(quantized_by(**quantization))


def test_the_quantization_of_a_checkpoint_is_read_from_its_config():
    ours = {"quant_method": "qlora_lib", "format_version": 1, "codebook": "nf3"}
    assert quantization_of(quantized_by(**ours)).codebook == "nf3"
    assert quantization_of(quantized_by(**ours), codebook="nf3").codebook == "nf3"
    with pytest.raises(ValueError, match="codebook='nf4' is asked for"):
        quantization_of(quantized_by(**ours), codebook="nf4")
    theirs = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }
    found = quantization_of(quantized_by(**theirs))
    assert (found.codebook, found.double_quant) == ("fp4_bitsandbytes", False)
    with pytest.raises(ValueError, match="double_quant=True is asked for"):
        quantization_of(quantized_by(**theirs), double_quant=True)


def test_a_quantized_model_is_not_dense(tmp_path):
    quantized_by(quant_method="qlora_lib", format_version=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without dense"):
        load_model(str(tmp_path), dense=True)


def test_a_16_bit_checkpoint_that_lacks_a_weight_is_not_filled_up(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "down_proj" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights, for example {lost}"):
        load_model(str(folder), device="cpu", dense=True)
