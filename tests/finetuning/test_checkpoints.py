"""Runs that are interrupted and resumed, and checkpoints that must not be resumed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from qlora_lib.finetuning.checkpoints import (
    CheckpointTrainer,
    adapter_tensors,
    checkpoints,
    fingerprint_base,
    fingerprint_examples,
)
from qlora_lib.finetuning.training import finetune
from qlora_lib.optim import PagedAdamW

SCRIPT = Path(__file__).with_name("resumed_run.py")
RUN = {"steps": 5, "batch_size": 3, "save_every": 2, "learning_rate": 1e-2}
# As the optimizer of finetune, with changes.
RECIPE = partial(PagedAdamW, betas=(0.9, 0.999), weight_decay=0.0)


# In separate processes


def run(folder: Path, *words: str, ends: int = 0) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == ends, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if not ends else {}


@pytest.fixture(scope="module", params=["bits=32", "bits=8"])
def whole_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return request.param, run(folder, request.param), folder


def same_bits(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_bits(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second


def test_a_run_that_is_killed_twice_resumes_bit_for_bit(
    whole_run: tuple[str, dict, Path], tmp_path: Path
) -> None:
    bits, expected, whole = whole_run
    # A step is computed in two parts, so the seventh pass is in the fourth step.
    run(tmp_path, bits, "forward=7", ends=-signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    # The state of a run may be paged in another way each time.
    run(tmp_path, bits, "resume", "save=4", "budget=400000", ends=-signal.SIGKILL)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", ".checkpoint-4.partial"}
    assert run(tmp_path, bits, "resume", "budget=65536") == expected
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-4", "checkpoint-5"}
    for name in left:
        first, second = (folder / name for folder in (tmp_path, whole))
        file = "adapter_model.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
        states = [torch.load(f / "optimizer.pt") for f in (first, second)]
        assert same_bits(*states)


# In one process


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def interrupted(fresh, byte_tokenizer, examples, tmp_path, monkeypatch) -> Path:
    """The folder of a run that ended by Ctrl-C in its fourth step."""
    with monkeypatch.context() as patch:
        step = Trainer.training_step

        def stopped(self, *arguments, **options):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *arguments, **options)

        patch.setattr(Trainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune(fresh(), byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    return tmp_path


def resume(model, tokenizer, examples, folder, **options):
    return finetune(
        model, tokenizer, examples, output_dir=folder, resume=True, **{**RUN, **options}
    )


@pytest.fixture
def expected(fresh, byte_tokenizer, examples):
    model = fresh()
    losses = finetune(model, byte_tokenizer, examples, **{**RUN, "save_every": None})
    return losses, {n: t.clone() for n, t in adapter_tensors(model).items()}


def assert_resumes(fresh, byte_tokenizer, examples, folder, expected):
    model = fresh()
    assert resume(model, byte_tokenizer, examples, folder) == expected[0]
    assert same_bits(adapter_tensors(model), expected[1])


def test_ctrl_c_and_resume(fresh, byte_tokenizer, examples, interrupted, expected):
    assert_resumes(fresh, byte_tokenizer, examples, interrupted, expected)


@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_any_step_can_be_resumed_from(
    fresh, byte_tokenizer, examples, tmp_path, expected, save_every
):
    # An epoch has 3 steps: a checkpoint within it, at its end, and after it.
    finetune(
        fresh(),
        byte_tokenizer,
        examples,
        output_dir=tmp_path,
        **{**RUN, "save_every": save_every},
    )
    for path in checkpoints(tmp_path)[1:]:
        shutil.rmtree(path)
    assert_resumes(fresh, byte_tokenizer, examples, tmp_path, expected)


def test_a_finished_run_gives_its_result_again(
    fresh, byte_tokenizer, examples, interrupted, expected
):
    for _ in range(2):
        assert_resumes(fresh, byte_tokenizer, examples, interrupted, expected)


def test_recomputation_may_change(
    fresh, byte_tokenizer, examples, interrupted, expected
):
    losses = resume(
        fresh(), byte_tokenizer, examples, interrupted, gradient_checkpointing=False
    )
    assert losses == expected[0]


def test_adapters_in_16_bits_stay_so(fresh, byte_tokenizer, examples, tmp_path):
    def build():
        model = fresh()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return model

    whole, resumed = build(), build()
    losses = finetune(whole, byte_tokenizer, examples, **{**RUN, "save_every": None})
    finetune(build(), byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert resume(resumed, byte_tokenizer, examples, tmp_path) == losses
    tensors = adapter_tensors(resumed)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert same_bits(tensors, adapter_tensors(whole))


def test_a_checkpoint_is_an_adapter_of_peft_and_no_model(
    fresh, byte_tokenizer, examples, tmp_path
):
    model = fresh()
    finetune(model, byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    path = tmp_path / "checkpoint-5"
    assert {file.name for file in path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert same_bits(
        load_file(path / "adapter_model.safetensors"), dict(adapter_tensors(model))
    )
    base = fresh().unload()
    loaded = PeftModel.from_pretrained(base, path)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_a_run_that_stops_early_saves_its_last_step(
    fresh, byte_tokenizer, examples, tmp_path, expected
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 3

    run = {**RUN, "save_every": None, "output_dir": tmp_path}
    losses = finetune(fresh(), byte_tokenizer, examples, callbacks=[Stop()], **run)
    assert losses == expected[0][:3]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert_resumes(fresh, byte_tokenizer, examples, tmp_path, expected)


# What must not be resumed from


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 6}, "steps is 6, but .* had 5"),
        ({"batch_size": 4}, "batch_size is 4"),
        ({"gradient_accumulation": 3}, "gradient_accumulation is 3"),
        ({"learning_rate": 1e-3}, "learning_rate is 0.001, but .* had 0.01"),
        ({"seed": 1}, "seed is 1"),
        ({"optimizer": torch.optim.AdamW}, "optimizer is 'AdamW', .* 'PagedAdamW'"),
        ({"optimizer": partial(RECIPE, state_bits=8)}, "state_bits is 8, .* 32"),
        ({"optimizer": partial(RECIPE, eps=1e-6)}, "optimizer's eps is 1e-06"),
    ],
)
def test_other_settings_are_refused_by_name(
    fresh, byte_tokenizer, examples, interrupted, options, named
):
    before = snapshot(interrupted)
    with pytest.raises(ValueError, match=named):
        resume(fresh(), byte_tokenizer, examples, interrupted, **options)
    assert snapshot(interrupted) == before


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ({"rank": 8}, "adapter's r is 8, but .* had 4"),
        ({"alpha": 16}, "adapter's lora_alpha is 16"),
        ({"dropout": 0.2}, "adapter's lora_dropout is 0.2"),
    ],
)
def test_other_adapters_are_refused(
    fresh, byte_tokenizer, examples, interrupted, adapter, named
):
    with pytest.raises(ValueError, match=named):
        resume(fresh(**adapter), byte_tokenizer, examples, interrupted)


def test_other_examples_are_refused(fresh, byte_tokenizer, examples, interrupted):
    with pytest.raises(ValueError, match="checksum of the examples"):
        resume(fresh(), byte_tokenizer, examples[::-1], interrupted)


def test_another_base_model_is_refused(fresh, byte_tokenizer, examples, interrupted):
    model = fresh()
    model.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="checksum of the base model"):
        resume(model, byte_tokenizer, examples, interrupted)


def test_fingerprints_see_the_bits():
    one, other = ([{"input_ids": [1, 2], "labels": [x, 2]}] for x in (-100, 1))
    assert fingerprint_examples(one) != fingerprint_examples(other)
    cut = [{"input_ids": [1, 2, -100], "labels": [2]}]
    assert fingerprint_examples(one) != fingerprint_examples(cut)
    linear = torch.nn.Linear(4, 4).requires_grad_(False)
    before = fingerprint_base(linear)
    assert fingerprint_base(linear.bfloat16()) != before


def test_adapters_of_another_data_type_are_refused(
    fresh, byte_tokenizer, examples, interrupted
):
    model = fresh()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16 .* has torch\.float32"):
        resume(model, byte_tokenizer, examples, interrupted)


NAMES = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]


@pytest.mark.parametrize("name", [*NAMES, "trainer_state.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_whole(
    fresh, byte_tokenizer, examples, tmp_path, name, damage
):
    path = finished(fresh, byte_tokenizer, examples, tmp_path) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])
    with pytest.raises(ValueError, match=f"no whole checkpoint.*{name}.*delete"):
        resume(fresh(), byte_tokenizer, examples, tmp_path)
    shutil.rmtree(path.parent)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-4"


def finished(fresh, byte_tokenizer, examples, folder) -> Path:
    finetune(fresh(), byte_tokenizer, examples, output_dir=folder, **RUN)
    return folder / "checkpoint-5"


def test_a_newer_format_is_refused(fresh, byte_tokenizer, examples, tmp_path):
    path = finished(fresh, byte_tokenizer, examples, tmp_path) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="format 2, .* reads 1"):
        resume(fresh(), byte_tokenizer, examples, tmp_path)


def test_nothing_to_resume_from(fresh, byte_tokenizer, examples, tmp_path):
    # A partial folder, as a killed save leaves it, is none.
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / "checkpoint-9.zip").write_text("")
    (tmp_path / "checkpoint-old").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume(fresh(), byte_tokenizer, examples, tmp_path)


def test_an_earlier_run_is_not_overwritten(
    fresh, byte_tokenizer, examples, interrupted
):
    before = snapshot(interrupted)
    with pytest.raises(FileExistsError, match="checkpoint-2 of an earlier run"):
        finetune(fresh(), byte_tokenizer, examples, output_dir=interrupted, **RUN)
    assert snapshot(interrupted) == before


# Saves that fail


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt()]
)
def test_a_save_that_fails_leaves_the_checkpoint_before_it(
    fresh, byte_tokenizer, examples, tmp_path, monkeypatch, expected, method, failure
):
    written = []
    with monkeypatch.context() as patch:
        save = getattr(CheckpointTrainer, method)

        def failing(self, output_dir):
            save(self, output_dir)
            if self.state.global_step == 4:
                raise failure
            written.append(snapshot(Path(output_dir)))

        patch.setattr(CheckpointTrainer, method, failing)
        with pytest.raises(type(failure)):
            finetune(fresh(), byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert written[0].items() <= snapshot(tmp_path / "checkpoint-2").items()
    assert_resumes(fresh, byte_tokenizer, examples, tmp_path, expected)


def test_what_no_checkpoint_would_hold_is_refused_before_the_first_step(
    fresh, tiny_model, byte_tokenizer, examples, tmp_path
):
    model = fresh()
    model.get_submodule("base_model.model.model.norm").requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains .*model\.norm\.weight, which is not"):
        finetune(model, byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    tiny_model.requires_grad_(False)
    tiny_model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        finetune(tiny_model, byte_tokenizer, examples, output_dir=tmp_path, **RUN)
    assert list(tmp_path.iterdir()) == []
