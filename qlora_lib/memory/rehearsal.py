"""A training step on the meta device: nothing is computed, and every byte counted.

Tensors on the meta device have shapes and no numbers. So the code of the real step can
run on them, the model's own and that of autograd, in a second and without a GPU; what
it would have allocated, and when it would have freed it, is seen by watching storages
come and go.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lib.nn import Linear4bit

# CUDA's caching allocator hands out multiples of this.
ALLOCATION_UNIT = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that tensors are made of while it is active.

    Storages that exist before, those of the model, are not counted.

    Attributes:
        live: Bytes alive now, by part.
        kept: What was alive when the backward pass began, by part.
        peaks: For each phase, what was alive when most was.
        largest: For each part, the most bytes that it ever had.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.largest: Counter[str] = Counter()
        self._phase = ""
        self._vocabulary = vocabulary
        # Part and size of each live storage, by its address in C++, which is unique
        # among those that are alive.
        self._storages: dict[int, tuple[str, int]] = {}
        self._known = {
            tensor.untyped_storage()._cdata
            for tensor in (*model.parameters(), *model.buffers())
        }

    def begin(self, phase: str) -> None:
        """Start a phase, which has a peak of its own."""
        self._phase = phase
        self._note_peak()

    def assign(self, tensor: Tensor, part: str) -> None:
        """Count the storage of a tensor as that part from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = part, size
            self.live[old] -= size
            self.live[part] += size
            self._note_peak()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # transformers asks whether all tokens count and none begins a new text.
            return True
        if func is torch.ops.aten.addmm_.default and args[0].is_meta:
            # It allocates nothing, and takes half a millisecond to find that out.
            return args[0]
        results = func(*args, **(kwargs or {}))
        workspace = _dense_weight_bytes(func, args)
        known = len(self._storages)
        for result in (
            [results] if isinstance(results, Tensor) else tree_leaves(results)
        ):
            if isinstance(result, Tensor):
                self._watch(result, self._part_of(func, result))
        if workspace or len(self._storages) > known:
            self._note_peak(workspace)
        return results

    def _part_of(self, func: Any, result: Tensor) -> str:
        if func is torch.ops.qlora_lib.dequantize_blocks.default:
            return "workspace"
        if result.dim() > 1 and result.shape[-1] == self._vocabulary:
            return "logits"
        return "activations"

    def _watch(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
        self._storages[key] = part, size
        self.live[part] += size
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size

    def _note_peak(self, workspace: int = 0) -> None:
        now = self.live.copy()
        now["workspace"] += workspace
        self.largest |= now
        if now.total() >= self.peaks.get(self._phase, Counter()).total():
            self.peaks[self._phase] = now


def rehearse(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool,
    gradient_accumulation: int = 1,
) -> LiveBytes:
    """Run forward and backward pass of a causal model and watch its tensors.

    Args:
        model: The model with its adapters. On the meta device nothing is computed; on
            another one the step is real, and what tensors it makes is counted all the
            same.
        batch_size: Sequences of the step.
        sequence_length: Tokens of a sequence.
        gradient_checkpointing: Whether layers are computed once more.
        gradient_accumulation: How many such steps add to the same gradients. All after
            the first find them there, so two are run at most.

    Returns:
        The watcher, with the peaks of the phases ``"forward"``, up to the loss, and
        ``"backward"``. Its parts are ``checkpoints``, the inputs of layers that will be
        computed again; ``logits``, everything as wide as the vocabulary; ``gradients``
        of parameters; ``workspace``, weights that are dequantized for one product; and
        ``activations``, what is left.
    """
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    device = next(model.parameters()).device
    tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=device)
    _make_tables(model, device)
    live = LiveBytes(model, vocabulary)
    with _hooks(model, live, gradient_checkpointing), _flash_attention(), live:
        for _ in range(min(gradient_accumulation, 2)):
            live.begin("forward")
            loss = model.train()(input_ids=tokens, labels=tokens).loss
            live.kept = live.live.copy()
            live.begin("backward")
            loss.backward()
            del loss
    return live


def _make_tables(model: nn.Module, device: torch.device) -> None:
    """Make the codebooks' tables, which else the first step alone would count."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.codebook.table(device)
            module.scales_codebook.table(device)


@contextmanager
def _hooks(
    model: nn.Module, live: LiveBytes, gradient_checkpointing: bool
) -> Iterator[None]:
    """Tell checkpoints and gradients from the rest while the step runs."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from qlora_lib.integrations.transformers import enable_gradient_checkpointing

    def mark_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in (*args, kwargs.get("hidden_states")):
            if isinstance(tensor, Tensor):
                live.assign(tensor, "checkpoints")

    def mark_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.assign(parameter.grad, "gradients")

    handles = [
        parameter.register_post_accumulate_grad_hook(mark_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                handles.append(
                    module.register_forward_pre_hook(mark_input, with_kwargs=True)
                )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Have attention on the meta device take an operator that it takes on a GPU.

    It would take one that keeps the matrix of all scores.
    """
    original = nn.functional.scaled_dot_product_attention
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, **kwargs)
        if value.shape[-1] == query.shape[-1]:
            return flash(query, key, value)[0]
        return efficient(query, key, value, None, True)[0]

    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _dense_weight_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """The dequantized weight that a product with a 4-bit matrix holds while it runs.

    A kernel that multiplies few rows holds none, so there it is more than is needed.
    """
    operators = torch.ops.qlora_lib
    if func is operators.matmul.default:
        input, out_features = args[0], args[-2]
        return int(out_features * input.shape[-1] * input.element_size())
    if func is operators.matmul_input_gradient.default:
        grad_output, in_features = args[0], args[-1]
        return int(grad_output.shape[-1] * in_features * grad_output.element_size())
    return 0
