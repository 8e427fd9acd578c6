"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

SMALL_PROGRAM = 512


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, or the largest integer, before anything is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Let the interpreter run several programs on few numbers."""
    if device == "cpu":
        for module in (kernel_module("quantize"), kernel_module("dequantize")):
            monkeypatch.setattr(module, "NUMBERS_PER_PROGRAM", SMALL_PROGRAM)


def kernel_module(name: str) -> ModuleType:
    return importlib.import_module(f"qlora_lib.kernels.{name}")
