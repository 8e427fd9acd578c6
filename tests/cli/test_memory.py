import dataclasses
import json
import shutil

import pytest
from transformers import AutoConfig

from qlora_lib import estimate_memory
from qlora_lib.memory import llama_config
from qlora_lib.memory.optimizers import OPTIMIZERS

CONFIG = {"num_hidden_layers": 1, "vocab_size": 512}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> str:
    """A layer of the shape of the 7B model, which only a large card trains."""
    folder = tmp_path_factory.mktemp("narrow")
    config = llama_config("llama-7b")
    for name, value in CONFIG.items():
        setattr(config, name, value)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def test_it_shows_the_estimate_of_the_library(qlora, narrow):
    result = qlora(
        *("memory", narrow, "--gpu", "24", "--batch-size", "2", "--rank", "8"),
        *("--sequence-length", "64", "--json"),
    )
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    expected = estimate_memory(
        AutoConfig.from_pretrained(narrow),
        batch_size=2,
        rank=8,
        sequence_length=64,
        device_gib=24,
    )
    assert shown["peak"] == expected.peak and shown["on_card"] == expected.on_card
    assert shown["fits"] is True and shown["suggestions"] == []
    phases = {name: dataclasses.asdict(p) for name, p in expected.phases.items()}
    assert shown["phases"] == phases


def test_the_options_of_quantization_count(qlora, narrow):
    words = ("memory", narrow, "--gpu", "24", "--sequence-length", "16", "--json")

    def held(*options):
        parts = json.loads(qlora(*words, *options).stdout)["phases"]["forward"]
        return parts["weights"], parts["scales"]

    weights, scales = held()
    assert held("--codebook", "int8") == (2 * weights, scales)
    assert held("--block-size", "128")[1] < scales < held("--no-double-quant")[1]
    assert held("--weights", "16bit") == (4 * weights, 0)


def test_a_run_that_does_not_fit_ends_with_3_and_what_would(qlora, narrow):
    words = ("memory", narrow, "--batch-size", "4", "--sequence-length", "512")
    needed = (
        json.loads(qlora(*words, "--gpu", "80", "--json").stdout)["on_card"] / 2**30
    )
    gpu = f"{needed - 0.05:.3f}"
    table = qlora(*words, "--gpu", gpu)
    assert table.exit_code == 3
    assert "Does not fit" in table.stdout
    result = qlora(*words, "--gpu", gpu, "--json")
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert shown["fits"] is False and shown["suggestions"]
    for change in shown["suggestions"]:
        options = [f"--{k.replace('_', '-')}={v}" for k, v in change.items()]
        assert " ".join(options).replace("=", " ") in table.stdout
        assert qlora(*words, *options, "--gpu", gpu).exit_code == 0


def test_without_a_gpu_there_is_no_verdict(qlora, narrow, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = qlora("memory", narrow, "--sequence-length", "16")
    assert result.exit_code == 0
    assert "Pass --gpu" in result.stdout


def test_the_models_of_the_paper_need_no_files(qlora):
    result = qlora("memory", "llama-7b", "--gpu", "4", "--sequence-length", "16")
    assert result.exit_code == 3
    assert "llama-7b" in result.stdout and "No setting makes it fit" in result.stdout


@pytest.mark.parametrize(
    ("quantized", "codebook"),
    [
        ({"quant_method": "qlora_lib", "format_version": 1, "codebook": "nf3"}, "nf3"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4",
        ),
    ],
)
def test_a_quantized_checkpoint_counts_as_it_is(
    qlora, base, tmp_path, quantized, codebook
):
    shutil.copytree(base, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": quantized}))
    words = ("--gpu", "24", "--json", "--sequence-length", "16")
    shown = json.loads(qlora("memory", path.parent, *words).stdout)
    plain = json.loads(qlora("memory", base, "--codebook", codebook, *words).stdout)
    assert shown["phases"] == plain["phases"]


def test_a_model_without_linear_layers_is_refused(failing, tmp_path, base):
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = 0
    config.save_pretrained(tmp_path)
    assert "no linear layer" in failing("memory", tmp_path, "--gpu", "24")


def test_help_names_every_optimizer(qlora):
    words = qlora("memory", "--help").stdout.replace(",", " ").replace(".", " ").split()
    assert set(OPTIMIZERS) <= set(words)


def test_nonsense_is_refused(failing, base):
    assert "device_gib" in failing("memory", base, "--gpu", "-1")
    message = failing("memory", base, "--optimizer", "sgd")
    assert "qlora_paged_adamw_32bit" in message
    message = failing("memory", base, "--trained", "all")
    assert "16bit" in message
