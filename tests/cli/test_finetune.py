import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lib.finetuning.checkpoints import CheckpointTrainer
from qlora_lib.finetuning.data import encode_pairs
from qlora_lib.finetuning.reading import read_jsonl
from qlora_lib.finetuning.training import add_adapters, finetune
from qlora_lib.integrations.transformers import QLoRAConfig

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def no_training(monkeypatch):
    """Fail if anything is trained."""

    def train(*args, **kwargs):
        raise AssertionError("was trained")

    monkeypatch.setattr(CheckpointTrainer, "train", train)


@pytest.fixture
def no_weights(monkeypatch, no_training):
    """Fail if weights are loaded."""

    def load(*args, **kwargs):
        raise AssertionError("was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def in_saving(monkeypatch, step, happen):
    """Let something happen in the middle of the checkpoint of a step."""
    save = CheckpointTrainer._save_rng_state

    def save_and_more(self, folder):
        save(self, folder)
        if self.state.global_step == step:
            happen()

    monkeypatch.setattr(CheckpointTrainer, "_save_rng_state", save_and_more)


def test_it_trains_as_the_library_does(qlora, base, pairs, short_run, tmp_path):
    options = ("--alpha", "8", "--dropout", "0", "--seed", "3", "--max-length", "24")
    options += ("--learning-rate", "0.02", "--gradient-accumulation", "2", "--json")
    # On a CPU it is asked for, and shown as `qlora memory` shows it.
    options += ("--gpu", "4")
    out = tmp_path / "out"
    result = qlora("finetune", base, pairs, out, *short_run, *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=QLoRAConfig(), device_map="cpu"
    )
    model = add_adapters(model, rank=4, alpha=8, dropout=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = encode_pairs(read_jsonl(pairs), tokenizer, 24)
    losses = finetune(
        model,
        tokenizer,
        examples,
        steps=4,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=0.02,
        seed=3,
    )
    assert report["losses"] == losses
    assert (report["pairs"], report["steps"]) == (6, 4)
    longest = max(len(example["input_ids"]) for example in examples)
    run = f"--rank 4 --gradient-accumulation 2 --sequence-length {longest}"
    run += " --gpu 4 --json"
    planned = json.loads(qlora("memory", base, *run.split()).stdout)
    assert report["estimated_bytes"] == planned["on_card"]
    model.save_pretrained(str(tmp_path / "expected"))
    ours, expected = (load_file(f / WEIGHTS) for f in (out, tmp_path / "expected"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_adapter_is_an_ordinary_one(adapter, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    assert adapted.peft_config["default"].r == 4
    files = {path.name for path in adapter.iterdir()}
    assert files >= {WEIGHTS, "adapter_config.json", "checkpoint-2", "checkpoint-4"}
    assert "adapter" not in files


def test_packed_rows_are_fewer_and_train_on_the_same(
    qlora, base, pairs, short_run, tmp_path, monkeypatch
):
    lengths = []

    def note(self, *args, **kwargs):
        lengths.append(len(self.train_dataset))
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointTrainer, "train", note)
    for number, option in enumerate(([], ["--pack"])):
        out = tmp_path / str(number)
        qlora("finetune", base, pairs, out, *short_run, *option)
    assert lengths[0] == 6 > lengths[1]


def test_progress_goes_to_the_standard_error(qlora, base, pairs, short_run, tmp_path):
    result = qlora("finetune", base, pairs, tmp_path / "out", *short_run)
    assert result.exit_code == 0, result.stderr
    assert "Step 4 of 4: loss" in result.stderr
    assert "Step" not in result.stdout
    command = result.stdout.split("Ask it: ")[1].removesuffix(" --prompt TEXT\n")
    assert shlex.split(command)[:2] == ["qlora", "generate"]


def test_the_next_command_quantizes_and_asks_as_in_training(
    qlora, base, short_run, tmp_path
):
    data = tmp_path / "alpaca.jsonl"
    data.write_text(json.dumps({"instruction": "Add 1 to 2.", "output": "3"}) + "\n")
    asked = "--codebook fp4_e2m1 --block-size 32 --no-double-quant".split()
    asked += "--skip-module down_proj --skip-module o_proj".split()
    result = qlora("finetune", base, data, tmp_path / "out", *short_run, *asked)
    assert result.exit_code == 0, result.stderr
    command = result.stdout.split("Ask it: ")[1].removesuffix(" --prompt TEXT\n")
    words = shlex.split(command)
    assert "--instruction" in words
    for option in ("--codebook fp4_e2m1", "--block-size 32", "--no-double-quant"):
        assert option in command
    assert words.count("--skip-module") == 2
    answer = qlora(*words[1:], "--prompt", "Add.", "--max-new-tokens", "2")
    assert answer.exit_code == 0, answer.stderr


def test_a_dropout_of_all_is_wrong_use(failing, base, pairs, tmp_path, no_weights):
    words = ("finetune", base, pairs, tmp_path / "out", "--dropout", "1")
    assert "--dropout 1" in failing(*words, code=2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "answer": ', "not JSON"),
        ('{"question": "a", "answer": "b"}', "needed are 'prompt' and 'answer'"),
        ('{"prompt": "a", "answer": ""}', "'answer' is blank"),
    ],
)
def test_a_broken_line_is_told_before_anything_is_loaded(
    failing, base, pairs, tmp_path, no_weights, line, reason
):
    data = tmp_path / "broken.jsonl"
    data.write_text(pairs.read_text() + line + "\n")
    message = failing("finetune", base, data, tmp_path / "out")
    assert f"{data}, line 7: " in message and reason in message
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there_are_told(failing, base, tmp_path, no_weights):
    out = tmp_path / "out"
    message = failing("finetune", base, tmp_path / "no.jsonl", out)
    assert "does not exist" in message
    message = failing("finetune", base, "some-one/some-data", out)
    assert "the hub cannot be reached" in message and "jsonl" in message
    assert not out.exists()


def test_data_may_be_a_folder_or_another_format(
    qlora, base, pairs, tmp_path, no_training
):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(pairs, folder / "train.jsonl")
    for data in (folder, folder / "train.json"):
        result = qlora("finetune", base, data, tmp_path / "out", "--device", "cpu")
        assert "Read 6 pairs" in result.stderr, result.stderr
        assert "was trained" in result.stderr
        shutil.copy(pairs, folder / "train.json")
        (folder / "train.jsonl").unlink(missing_ok=True)


def test_an_answer_that_is_too_long_is_told(failing, base, pairs, tmp_path, no_weights):
    message = failing(*("finetune", base, pairs, tmp_path / "out", "--max-length", "2"))
    assert "pairs[0]" in message and "max_length" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_is_told_with_what_would(
    qlora, base, pairs, tmp_path, no_weights
):
    words = ("finetune", base, pairs, tmp_path / "out", "--batch-size", "8")
    words += ("--no-gradient-checkpointing", "--rank", "16")
    result = qlora(*words, "--gpu", "0.5", "--json")
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert "no option makes it fit" in shown["error"]["message"]
    assert shown["suggestions"] == []

    gpu = str(shown["on_card"] / 2**30 - 0.001)
    result = qlora(*words, "--gpu", gpu, "--json")
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    message, suggestions = shown["error"]["message"], shown["suggestions"]
    assert "what would fit: no --no-gradient-checkpointing, or " in message
    assert {"gradient_accumulation": 2} in suggestions
    assert not (tmp_path / "out").exists()
    # What it says is so: weights would be loaded.
    for change in suggestions[1:]:
        options = [f"--{name.replace('_', '-')}={v}" for name, v in change.items()]
        assert options[0].replace("=", " ") in message
        result = qlora(*words, "--gpu", gpu, *options)
        assert "was loaded" in result.stderr, result.stderr
    assert "was loaded" in qlora(*words, "--gpu", gpu, "--force").stderr


def test_the_memory_that_is_free_is_asked_of_the_gpu(
    failing, base, pairs, tmp_path, no_weights, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**29, 2**40))
    message = failing("finetune", base, pairs, tmp_path / "out", code=3)
    assert "0.50 GiB are free" in message


def test_a_folder_with_something_in_it_is_left_alone(
    failing, base, pairs, adapter, tmp_path, no_weights
):
    (tmp_path / "thesis.tex").write_text("whole")
    message = failing("finetune", base, pairs, tmp_path)
    assert "not empty" in message and "name another" in message
    assert "no checkpoint" in failing("finetune", base, pairs, tmp_path, "--resume")
    message = failing("finetune", base, pairs, adapter)
    assert "pass --resume to go on from checkpoint-4" in message
    assert "is a file" in failing("finetune", base, pairs, tmp_path / "thesis.tex")


@pytest.mark.parametrize("ending", ["interrupt", "full disk"])
def test_a_run_that_ends_early_keeps_its_checkpoint_and_resumes(
    qlora, base, pairs, short_run, adapter, tmp_path, monkeypatch, ending
):
    def happen():
        if ending == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    words = ["finetune", base, pairs, out, *short_run, "--learning-rate", "0.02"]
    with monkeypatch.context() as patched:
        in_saving(patched, 4, happen)
        result = qlora(*words)
    assert result.exit_code == (130 if ending == "interrupt" else 1)
    last_line = result.stderr.splitlines()[-1]
    assert ("interrupted" if ending == "interrupt" else "disk is full") in last_line
    assert f"{out / 'checkpoint-2'} is whole" in last_line
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]

    command = last_line.split("To go on from it: ")[1]
    resumed = qlora(*shlex.split(command)[1:])
    assert resumed.exit_code == 0, resumed.stderr
    assert (out / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_the_interrupt_is_json_too(
    qlora, base, pairs, short_run, tmp_path, monkeypatch
):
    in_saving(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    words = ("finetune", base, pairs, tmp_path / "out", *short_run, "--json")
    result = qlora(*words)
    assert result.exit_code == 130
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 130 and error["type"] == "KeyboardInterrupt"
    assert "no checkpoint yet" in error["message"]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert qlora(*words).exit_code == 0


def test_a_finished_run_resumes_to_its_adapter(
    qlora, base, pairs, short_run, adapter, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    (out / WEIGHTS).unlink()
    words = ("finetune", base, pairs, out, *short_run, "--learning-rate", "0.02")
    assert qlora(*words, "--resume").exit_code == 0
    assert (out / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_a_full_disk_at_the_end_leaves_no_half_adapter(
    qlora, base, pairs, short_run, tmp_path, monkeypatch
):
    save = PeftModel.save_pretrained

    def fill_the_disk(self, folder, **kwargs):
        save(self, folder, **kwargs)
        if "checkpoint" not in folder:
            raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    words = ("finetune", base, pairs, out, *short_run)
    with monkeypatch.context() as patched:
        patched.setattr(PeftModel, "save_pretrained", fill_the_disk)
        result = qlora(*words)
    assert result.exit_code == 1 and "checkpoint-4 is whole" in result.stderr
    assert {p.name for p in out.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert qlora(*words, "--resume").exit_code == 0
    assert (out / "adapter_config.json").is_file()


def test_an_adapter_has_its_configuration_last(
    qlora, base, pairs, short_run, adapter, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    for name in (WEIGHTS, "adapter_config.json", "README.md"):
        (out / name).unlink()
    words = ("finetune", base, pairs, out, *short_run, "--learning-rate", "0.02")
    move, moved = Path.replace, []

    def interrupt_the_second(self, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return move(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupt_the_second)
        assert qlora(*words, "--resume").exit_code == 130
    assert moved and not (out / "adapter_config.json").exists()
    assert qlora(*words, "--resume").exit_code == 0
    assert (out / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert (out / "adapter_config.json").exists() and not (out / "adapter").exists()


def test_a_checkpoint_cut_short_or_of_a_newer_format_is_refused(
    failing, base, pairs, short_run, adapter, tmp_path, no_training
):
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    words = ("finetune", base, pairs, out, *short_run, "--learning-rate", "0.02")
    words += ("--resume",)
    manifest = out / "checkpoint-4" / "checkpoint.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    assert "format 2" in failing(*words)
    manifest.write_text(text)
    weights = out / "checkpoint-4" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    message = failing(*words)
    assert "is no whole checkpoint" in message and "delete the folder" in message
    assert weights.is_file()


def test_another_run_is_not_resumed(
    failing, base, pairs, short_run, adapter, no_training
):
    words = ("finetune", base, pairs, adapter, *short_run, "--resume")
    assert "learning_rate is 0.0002" in failing(*words)


def test_ctrl_c_in_a_terminal(base, pairs, tmp_path):
    out = tmp_path / "out"
    # Ctrl-C is ignored where a shell has started the tests in the background.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qlora_lib.cli import app; app()"
    )
    options = "--steps 9999 --save-every 2 --batch-size 2 --rank 4 --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "finetune", base, pairs, out, *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not list(out.glob("checkpoint-*")) and time.monotonic() < until:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "is whole. To go on from it: qlora finetune" in stderr.splitlines()[-1]
    checkpoints = sorted(out.glob("checkpoint-*"))
    assert {p.name for p in out.iterdir()} == {path.name for path in checkpoints}
    for checkpoint in checkpoints:
        files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
        for name, (size, _) in files.items():
            assert (checkpoint / name).stat().st_size == size


def test_a_batch_in_unequal_parts_is_wrong_use(failing, base, pairs, tmp_path):
    words = ("finetune", base, pairs, tmp_path / "out", "--batch-size", "16")
    message = failing(*words, "--gradient-accumulation", "3", code=2)
    assert "3 equal parts" in message


def test_layers_are_compiled_on_demand(
    qlora, base, pairs, short_run, tmp_path, monkeypatch
):
    from qlora_lib.finetuning import training

    asked = {}

    def note(*args, **options):
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finetune", note)
    for number, (words, compiled) in enumerate((([], False), (["--compile"], True))):
        out = tmp_path / str(number)
        qlora("finetune", base, pairs, out, *short_run, *words)
        assert asked["compile_layers"] is compiled


def test_a_run_that_diverges_is_no_success(qlora, base, pairs, short_run, tmp_path):
    out = tmp_path / "out"
    result = qlora(
        "finetune", base, pairs, out, *short_run, "--learning-rate", "1e30", "--json"
    )
    assert result.exit_code == 1
    message = json.loads(result.stdout)["error"]["message"]
    assert "the loss of step" in message and "smaller --learning-rate" in message
    assert not (out / WEIGHTS).exists()
