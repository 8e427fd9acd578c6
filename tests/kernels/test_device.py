"""Kernels are launched where their tensors are."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qlora_lib.kernels.device import on_device_of


def test_a_tensor_on_the_cpu_needs_no_device():
    assert isinstance(on_device_of(torch.ones(1)), nullcontext)


@pytest.mark.parametrize(("index", "is_entered"), [(0, False), (1, True)])
def test_another_device_is_entered(monkeypatch, index, is_entered):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", entered.append)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    on_device_of(tensor)
    assert entered == ([tensor] if is_entered else [])


@pytest.mark.gpu
def test_the_current_device_is_left_as_it_is():
    with on_device_of(torch.ones(1, device="cuda")):
        assert torch.cuda.current_device() == 0
