"""The modes of a model, switched for a while and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the training mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def as_before(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Give a model back as it came.

    The Trainer leaves it in training mode and without a cache, which would make the
    generations after it random and slow.
    """
    was_training, used_cache = model.training, model.config.use_cache
    checkpointed = {m: m.gradient_checkpointing for m in _checkpointable(model)}
    try:
        yield
    finally:
        model.train(was_training)
        model.config.use_cache = used_cache
        for module, was_checkpointed in checkpointed.items():
            module.gradient_checkpointing = was_checkpointed


def _checkpointable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
