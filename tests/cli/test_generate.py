import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_lib.finetuning.generation import generate
from qlora_lib.finetuning.reading import alpaca_pair
from qlora_lib.integrations.peft import load_adapter
from qlora_lib.integrations.transformers import QLoRAConfig

PROMPT = "def add(a, b):"
SHORT = ("--max-new-tokens", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def expected(base):
    """What the library answers."""

    def answer(prompt=PROMPT, adapter=None, cue="", **quantization):
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=QLoRAConfig(**quantization), device_map="cpu"
        )
        if adapter:
            model = load_adapter(model, adapter)
        tokenizer = AutoTokenizer.from_pretrained(base)
        return generate(model, tokenizer, prompt, cue=cue, max_new_tokens=8)

    return answer


def test_the_answer_is_that_of_the_4bit_model(qlora, base, expected):
    result = qlora("generate", base, "--prompt", PROMPT, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected() + "\n"
    coarse = qlora("generate", base, "--prompt", PROMPT, "--codebook", "nf2", *SHORT)
    assert coarse.stdout == expected(codebook="nf2") + "\n" != result.stdout


def test_the_prompt_may_come_from_the_standard_input(qlora, base, expected):
    result = qlora("generate", base, "--json", *SHORT, input=PROMPT)
    assert json.loads(result.stdout) == {"prompt": PROMPT, "answer": expected()}


def test_an_adapter_changes_the_answer(qlora, base, adapter, expected):
    words = ("--prompt", PROMPT, "--adapter", adapter, *SHORT)
    result = qlora("generate", base, *words)
    assert result.stdout == expected(adapter=adapter) + "\n" != expected() + "\n"


def test_an_instruction_is_laid_out_as_in_training(qlora, base, expected):
    words = ("--prompt", "Add.", "--instruction", *SHORT)
    result = qlora("generate", base, *words)
    pair = alpaca_pair("Add.")
    assert result.stdout == expected(pair.prompt, cue=pair.cue) + "\n"
    assert result.stdout != expected("Add.") + "\n"


def test_a_model_may_stay_dense(qlora, base):
    result = qlora("generate", base, "--dense", "--prompt", PROMPT, *SHORT)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert result.stdout == generate(model, tokenizer, PROMPT, max_new_tokens=8) + "\n"


def test_samples_follow_the_seed(qlora, base):
    def sample(seed):
        words = ("--prompt", PROMPT, "--temperature", "2", "--seed", str(seed), *SHORT)
        return qlora("generate", base, *words).stdout

    assert sample(1) == sample(1) != sample(2)


def test_wrong_use_is_told_before_anything_is_loaded(failing):
    assert "blank" in failing("generate", "no/model", "--prompt", " ", code=2)
    message = failing(
        *("generate", "no/model", "--dense", "--prompt", "x", "--codebook", "nf4"),
        code=2,
    )
    assert "leave out codebook" in message


def test_an_adapter_of_another_model_is_refused(failing, base, adapter, tmp_path):
    config = AutoConfig.from_pretrained(base)
    config.hidden_size, config.num_attention_heads = 96, 3
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    message = failing(
        *("generate", tmp_path / "other", "--adapter", adapter, "--prompt", "x")
    )
    assert "the adapter" in message and base in message
    assert "load the base model of the adapter" in message


def test_a_doubtful_adapter_is_a_warning(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "renamed")
    words = ["generate", tmp_path / "renamed", "--adapter", adapter, "--prompt", "x"]
    command = [sys.executable, "-c", "from qlora_lib.cli import app; app()"]
    answer = subprocess.run(
        [*command, *words, *SHORT], capture_output=True, text=True, check=True
    )
    (warning,) = [w for w in answer.stderr.splitlines() if w.startswith("warning: ")]
    assert "shapes fit, but the adapter" in warning


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_adapter_is_refused(failing, base, adapter, tmp_path, lost):
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / lost).write_text("{")
    words = ("generate", base, "--adapter", tmp_path / "broken", "--prompt", "x")
    assert lost in failing(*words)
    (tmp_path / "broken" / lost).unlink()
    assert f"has no {lost}" in failing(*words)


def test_a_model_without_connection_says_what_to_pass(failing):
    message = failing("generate", "some-one/some-model", "--prompt", "x")
    assert "pass the path of a folder, or run once with a connection" in message


def test_no_token_to_draw_is_wrong_use(failing, base, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    words = ("generate", base, "--prompt", "a", "--top-p", "0")
    assert "--top-p 0" in failing(*words, code=2)
