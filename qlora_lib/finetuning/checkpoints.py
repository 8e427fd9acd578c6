"""Checkpoints of a run: written whole, checked when read, and exact to the bit.

A checkpoint is a folder ``checkpoint-STEP`` with the adapter, in the ordinary files of
peft, the optimizer, the state of the random number generators, the losses so far, and
``checkpoint.json``: what the run was set to, and a checksum of every file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from qlora_lib.finetuning.data import Example
from qlora_lib.finetuning.saving import whole_folder

FORMAT_VERSION = 1
KEPT = 2
"""Checkpoints that a run keeps: the last, and the one before should it be damaged."""

_MANIFEST = "checkpoint.json"
_TRAINER_STATE = "trainer_state.json"
_SAMPLED_BYTES = 256

Settings = Mapping[str, Any]


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are whole, and that resumes to the bit.

    Args:
        settings: What the run is set to, of JSON types, kept in each checkpoint.
        kwargs: Those of ``transformers.Trainer``.
    """

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        root = Path(str(self.args.output_dir))
        path = root / f"checkpoint-{self.state.global_step}"
        with whole_folder(path, replace=True) as folder:
            cast(PeftModel, self.model).save_pretrained(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / _TRAINER_STATE))
            _write_manifest(folder, self.settings)
        for older in checkpoints(root)[:-KEPT]:
            shutil.rmtree(older)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_adapter_exactly(cast(PeftModel, self.model), Path(resume_from_checkpoint))


def checkpoints(root: Path) -> list[Path]:
    """List the checkpoints in a folder, by step."""
    found = {}
    for path in root.glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def checkpoint_to_resume(root: Path, settings: Settings) -> Path:
    """Return the last checkpoint of a run, if it is whole and of the same run.

    Args:
        root: Folder of the checkpoints.
        settings: What the run that goes on is set to.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the last one is not whole, of a newer format, or of a run with
            other settings.
    """
    found = checkpoints(root)
    if not found:
        raise FileNotFoundError(
            f"output_dir={str(root)!r} holds no checkpoint to resume from: start the "
            "run without resume"
        )
    path = found[-1]
    manifest = _read_manifest(path)
    for name in sorted(settings.keys() | manifest["settings"].keys()):
        now, then = settings.get(name), manifest["settings"].get(name)
        if now != then:
            raise ValueError(
                f"{name} is {now!r}, but the run in {path} had {then!r}: a run resumes "
                "with its own settings; set it back, or start another run elsewhere"
            )
    return path


def losses_of(checkpoint: Path) -> list[float]:
    """Return the training losses of the steps before a checkpoint."""
    state = TrainerState.load_from_json(str(checkpoint / _TRAINER_STATE))
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's adapter under their names in its file.

    Raises:
        ValueError: If the model has no adapter ``"default"``, or trains a parameter
            that is not part of it, and so would be missing in a checkpoint.
    """
    if not isinstance(model, PeftModel) or "default" not in model.peft_config:
        raise ValueError(
            "model has no adapter 'default', which is what a checkpoint holds: add it "
            "with add_adapters, or train without output_dir"
        )
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model)
    saved = {tensor.data_ptr() for tensor in tensors.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in saved:
            raise ValueError(
                f"model trains {name}, which is not part of the adapter 'default' and "
                "would be missing in a checkpoint: freeze it, or train without "
                "output_dir"
            )
    return tensors


def load_adapter_exactly(model: nn.Module, folder: Path) -> None:
    """Copy a saved adapter into a model's own, bit by bit.

    The loader of peft casts: an adapter of 16 bits comes back in 32, and the run that
    goes on is another one. Here names, shapes and data types have to be equal.

    Raises:
        ValueError: If they are not.
    """
    own = adapter_tensors(model)
    saved = load_file(folder / "adapter_model.safetensors")
    for name in sorted(own.keys() | saved.keys()):
        now, then = (
            f"{t.dtype} {list(t.shape)}" if t is not None else "missing"
            for t in (own.get(name), saved.get(name))
        )
        if now != then:
            raise ValueError(
                f"model's adapter has {name}: {now}, but that in {folder} has {then}: "
                "add the adapters as for the run that was saved"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Return a checksum of examples and of their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for key in sorted(example):
            digest.update(f"{key} {len(example[key])} ".encode())
            digest.update(array("q", example[key]).tobytes())
    return digest.hexdigest()


def fingerprint_base(model: nn.Module) -> str:
    """Return a checksum of a model's frozen tensors.

    Of each tensor the name, the shape, the data type and the first 256 bytes count:
    enough to tell two models apart, without reading all of a large one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            continue
        sample = tensor.detach().flatten()[:_SAMPLED_BYTES].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(sample.view(torch.uint8)[:_SAMPLED_BYTES].cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_manifest(folder: Path, settings: Settings) -> None:
    files = {
        str(file.relative_to(folder)): _checksum(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT_VERSION, "settings": settings, "files": files}
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    cure = "delete the folder to resume from the checkpoint before it, if there is one"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no whole checkpoint, its {_MANIFEST} cannot be read: {cure}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has the format {version}, and this version of qlora_lib reads "
            f"{FORMAT_VERSION}: resume with the version that wrote it"
        )
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or _checksum(file) != expected:
            raise ValueError(
                f"{folder} is no whole checkpoint, {name} is missing or differs from "
                f"what was written: {cure}"
            )
    return dict(manifest)


def _checksum(file: Path) -> list[int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
