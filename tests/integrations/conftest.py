"""Models small enough to be loaded in every test."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from qlora_lib.integrations.transformers import QLoRAConfig

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

GPT2 = GPT2Config(
    vocab_size=64,
    n_embd=64,
    n_layer=1,
    n_head=2,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def base_folder() -> Path:
    return ROOT / "models" / "base"


@pytest.fixture(scope="session")
def save_random(tmp_path_factory) -> Callable[..., Path]:
    """Save a model of random weights, whose output layer is not tied."""

    def save(config=None, dtype=torch.bfloat16, model_class=None) -> Path:
        torch.manual_seed(0)
        config = config or LlamaConfig(**SMALL, attention_bias=True)
        make = model_class or AutoModelForCausalLM.from_config
        model = make(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide one that is lost
                parameter.data.normal_()
        folder = tmp_path_factory.mktemp("dense")
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(save_random) -> Path:
    return save_random()


@pytest.fixture
def load() -> Callable[..., PreTrainedModel]:
    """``from_pretrained`` with a QLoRAConfig of the given options."""

    def load(folder, auto=AutoModelForCausalLM, **options) -> PreTrainedModel:
        config = QLoRAConfig(**options)
        return auto.from_pretrained(
            folder, quantization_config=config, device_map="cpu"
        )

    return load


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.arange(3, 35)[None]


@pytest.fixture
def edit_copy(tmp_path) -> Callable[..., Path]:
    """Copy a checkpoint of one file and change its tensors, or its config's fields."""

    def edit(folder, change=lambda tensors: None, **fields) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        weights = copy / "model.safetensors"
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})
        config = json.loads((copy / "config.json").read_text())
        config.get("quantization_config", {}).update(fields)
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return edit
