"""What the tests share: how kernels run here, and which tests do not."""

import os

import pytest
import torch

# Triton reads this when a kernel is defined. It stands here, where nothing has imported
# Triton yet: transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not torch.cuda.is_available():
        _skip(items, "gpu", "needs a CUDA device, and there is none")
    if "large" not in config.option.markexpr:
        _skip(items, "large", "takes much memory and minutes: choose it with -m large")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
