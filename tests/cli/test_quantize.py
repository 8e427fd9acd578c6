import errno
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qlora_lib.integrations.transformers import QLoRAConfig, load_bitsandbytes
from qlora_lib.nn import Linear4bit

TOKENS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["qlora", "bitsandbytes"])
def test_the_folder_is_the_quantized_model_with_its_tokenizer(
    qlora, base, tmp_path, format
):
    out = tmp_path / "parent" / "out"
    result = qlora("quantize", base, out, "--format", format, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["layers"] == 42 and report["codebook"] == "nf4"
    assert 4.12 < report["bits_per_parameter"] < 4.14
    load = AutoModelForCausalLM.from_pretrained
    expected = load(base, quantization_config=QLoRAConfig(), device_map="cpu")
    found = (load if format == "qlora" else load_bitsandbytes)(out, device_map="cpu")
    assert torch.equal(logits(found), logits(expected))
    text = "def f(x):"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, out)]
    assert tokenizers[0](text) == tokenizers[1](text)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_options_reach_the_model(qlora, base, tmp_path):
    result = qlora(
        *(
            "quantize",
            base,
            tmp_path / "out",
            "--codebook",
            "int8",
            "--block-size",
            "32",
        ),
        *("--no-double-quant", "--compute-dtype", "float32", "--device", "cpu"),
        *("--skip-module", "down_proj", "--skip-module", "layers.0.mlp"),
    )
    assert result.exit_code == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    config = model.config.quantization_config
    assert (config.codebook, config.block_size, config.double_quant) == (
        *("int8", 32),
        False,
    )
    assert model.dtype == torch.float32
    dense = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert dense == {
        "lm_head",
        *(f"model.layers.{n}.mlp.down_proj" for n in range(6)),
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert "34 layers" in result.stdout


def test_a_4bit_model_changes_its_format_and_not_its_weights(qlora, base, tmp_path):
    for model, out, format in (
        (base, "theirs", "bitsandbytes"),
        (tmp_path / "theirs", "ours", "qlora"),
    ):
        words = ("quantize", model, tmp_path / out, "--format", format)
        assert qlora(*words).exit_code == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    direct = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=QLoRAConfig(), device_map="cpu"
    )
    assert torch.equal(logits(found), logits(direct))


def test_what_is_quantized_already_is_not_quantized_again(
    qlora, failing, base, tmp_path
):
    assert qlora("quantize", base, tmp_path / "once").exit_code == 0
    message = failing(
        *("quantize", tmp_path / "once", tmp_path / "twice", "--codebook", "nf3")
    )
    assert "codebook='nf3' is asked for" in message and "'nf4'" in message
    assert not (tmp_path / "twice").exists()


def test_a_folder_with_something_in_it_is_left_alone(qlora, failing, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("whole")
    message = failing("quantize", base, tmp_path / "out")
    assert "not empty" in message and "--overwrite" in message
    assert contents(tmp_path / "out") == {"thesis.tex": b"whole"}
    assert qlora("quantize", base, tmp_path / "out", "--overwrite").exit_code == 0
    assert "thesis.tex" not in contents(tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "is a file" in failing("quantize", base, tmp_path / "file")


def test_the_model_that_is_read_is_never_replaced(failing, base, tmp_path):
    shutil.copytree(base, tmp_path / "models" / "base")
    model = tmp_path / "models" / "base"
    for out in (model, model.parent):
        message = failing("quantize", model, out, "--overwrite")
        assert "which is read" in message
    assert contents(model).keys() == {p.name for p in model.iterdir()}
    assert contents(model)["config.json"]


@pytest.mark.parametrize("was_there", [True, False])
def test_a_full_disk_leaves_what_was_there(
    failing, base, tmp_path, monkeypatch, was_there
):
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
        (out / "old").write_text("whole")
    save = PreTrainedTokenizerBase.save_pretrained

    def fill_the_disk(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fill_the_disk)
    message = failing("quantize", base, out, "--overwrite")
    assert "the disk is full" in message and "free some space" in message
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if was_there else [])
    assert not was_there or contents(out) == {"old": b"whole"}


def test_ctrl_c_leaves_what_was_there(qlora, base, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("whole")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupt)
    result = qlora("quantize", base, tmp_path / "out", "--overwrite")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == {"old": b"whole"}


def test_what_the_other_format_has_no_place_for_is_refused(failing, base, tmp_path):
    words = ("quantize", base, tmp_path / "out", "--format", "bitsandbytes")
    assert "nf3" in failing(*words, "--codebook", "nf3")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_cut_short_is_refused(failing, base, tmp_path):
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = failing("quantize", tmp_path / "cut", tmp_path / "out")
    assert "cut short" in message
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_newer_format_is_refused(qlora, failing, base, tmp_path):
    assert qlora("quantize", base, tmp_path / "model").exit_code == 0
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    message = failing("generate", tmp_path / "model", "--prompt", "x")
    assert "format_version 2" in message and "upgrade" in message


def test_bitsandbytes_is_not_needed(base, tmp_path):
    import subprocess

    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from qlora_lib.cli import app\n"
        f"app(['quantize', {base!r}, {str(tmp_path / 'out')!r}, "
        "'--format', 'bitsandbytes', '--device', 'cpu'])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
