"""LoraLinear4bit: peft's LoRA layer around a 4-bit one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qlora_lib.kernels.ops import dequantize
from qlora_lib.nn import Linear4bit, lora_linear

# Those that leave the frozen weight alone. The others change it, or derive A and B from
# a weight that they take to be dense.
INITIALIZATIONS = (True, False, "gaussian")


class LoraLinear4bit(LoraLinear):
    """A :class:`~qlora_lib.Linear4bit` with adapters, as peft makes and saves them.

    With one active adapter the output is that of :func:`qlora_lib.nn.lora_linear`.
    Everything else (several active adapters, DoRA, ``lora_bias``, batches of mixed
    adapters, hooks on the 4-bit layer or on A or B) is composed by peft from the output
    of the 4-bit layer.

    ``merge`` adds the active adapters to the dequantized weight, in float32, and rounds
    the sum once to the type of the weight that was quantized. The dense result stands
    beside the codes, so that ``unmerge`` restores the layer bit for bit.

    Args:
        base_layer: The 4-bit layer, or another of peft's layers around it.
        adapter_name: Name of the first adapter.
        kwargs: What peft passes on from the LoraConfig.

    Raises:
        ValueError: If the config asks for an initialization or a variant of LoRA that
            needs the dense weight.
    """

    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # Not among the entries of the model: adapters can be saved while merged.
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    @property
    def quantized_layer(self) -> Linear4bit:
        """The 4-bit layer, also within other layers of peft."""
        base = self.get_base_layer()
        assert isinstance(base, Linear4bit)  # peft makes this class for no other
        return base

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return ``A [rank, in_features]`` and ``B [out_features, rank]``."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)
        return a, b

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; peft calls this with the fields of its config."""
        # peft 0.18 passes the fields, its successors the config.
        fields = kwargs.get("config")
        given = kwargs.get("init_lora_weights", getattr(fields, "init_lora_weights", 1))
        if given not in INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights={given!r} needs the dense weight, which a 4-bit "
                "layer no longer has: use True, False or 'gaussian'; for LoftQ use "
                "True and call qlora_lib.integrations.peft.loftq_init on the model "
                "afterwards"
            )
        # A weight of [in, out], like GPT-2's, was transposed when it was quantized.
        self.fan_in_fan_out = False
        super().update_layer(adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """Return the variant of LoRA that the config asks for: none, or DoRA."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise ValueError(
                f"{type(variant).__name__} is not supported beside a 4-bit layer: use "
                "LoRA, rank-stabilized LoRA or DoRA"
            )
        return variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, of the type of ``x``."""
        # With adapter_names or other arguments peft decides what to do.
        given = args or any(value is not None for value in kwargs.values())
        if not (given or self.disable_adapters):
            if self.merged_weight is not None:
                weight, bias = self.merged_weight, self.merged_bias
                return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
            adapter = self._single_adapter()
            if adapter is not None:
                return self._apply_single(x, adapter)
        output: Tensor = super().forward(x, *args, **kwargs)
        return output

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add adapters to the dequantized weight, beside which the codes are kept.

        Args:
            safe_merge: Whether to check the result for NaN and infinity.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: If ``safe_merge`` finds NaN or infinity; nothing is merged then.
            RuntimeError: If an adapter has a bias and the layer has none.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        adapters = [*self.merged_adapters, *names]
        weight = self.dense_weight(adapters).to(self.quantized_layer.weight_dtype)
        bias = self.dense_bias(adapters)
        if safe_merge and not all(
            torch.isfinite(tensor).all()
            for tensor in (weight, bias)
            if tensor is not None
        ):
            raise ValueError(
                f"the weight merged with {', '.join(adapters)} has NaN or infinity in "
                f"{weight.dtype}: the adapter is broken, or too large for this type"
            )
        self.merged_weight, self.merged_bias = weight, bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Go back to the codes, which merging has not touched."""
        if not self.merged:
            super().unmerge()  # warns
        self.merged_weight = self.merged_bias = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer that takes this one's place, as peft's models ask for it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if not merge or self.merged_weight is None:
            return self.quantized_layer
        return dense_linear(self.merged_weight, self.merged_bias)

    @torch.no_grad()
    def dense_weight(self, adapters: list[str]) -> Tensor:
        """Return the dequantized weight with these adapters, float32 ``[out, in]``.

        For each adapter in turn ``W <- W + scaling * B A``, or for DoRA
        ``W <- m / ||W_0 + scaling * B A|| * (W + scaling * B A)``, row by row with
        ``W_0`` the weight without any (arXiv 2402.09353, equation 5).
        """
        base = dequantize(self.quantized_layer.quantized_weight, torch.float32)
        weight = base
        for name in adapters:
            a, b = (matrix.float() for matrix in self.matrices(name))
            scaling = self.scaling[name]
            weight = torch.addmm(weight, b, a, alpha=scaling)
            if name in self.lora_variant:
                norm = torch.addmm(base, b, a, alpha=scaling).norm(dim=1, keepdim=True)
                magnitude = self.lora_magnitude_vector[name].weight
                assert isinstance(magnitude, Tensor)
                weight *= magnitude.float().view(-1, 1) / norm
        return weight

    @torch.no_grad()
    def dense_bias(self, adapters: list[str]) -> Tensor | None:
        """Return the bias with those of the adapters, in its own type."""
        bias: Tensor | None = self.quantized_layer.bias
        for name in adapters:
            if not self.lora_bias[name]:
                continue
            if bias is None:
                raise RuntimeError(
                    f"adapter {name} has a bias, which cannot be merged into a layer "
                    "without one: train with lora_bias=False"
                )
            update = self.lora_B[name].bias
            assert isinstance(update, Tensor)
            update = update * self.scaling[name]
            bias = (bias + update).to(bias.dtype)
        # As a Parameter it would become one of this layer, and no buffer.
        return None if bias is None else bias.detach()

    def _single_adapter(self) -> str | None:
        """Name of the adapter, if it is one and the product needs nothing else."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if (
            len(names) != 1
            or names[0] in self.lora_variant
            or self.lora_bias[names[0]]
            or type(base) is not Linear4bit
            or _has_hooks(base)
            or _has_hooks(self.lora_A[names[0]])
            or _has_hooks(self.lora_B[names[0]])
        ):
            return None
        return names[0]

    def _apply_single(self, x: Tensor, adapter: str) -> Tensor:
        base = self.base_layer
        assert isinstance(base, Linear4bit)  # _single_adapter has seen to it
        drop = self.lora_dropout[adapter]
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return lora_linear(
            x,
            base.quantized_weight,
            base.bias,
            *self.matrices(adapter),
            self.scaling[adapter],
            rate,
        )


def _has_hooks(module: nn.Module) -> bool:
    """Whether accelerate, a profiler or a user waits for the module to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ordinary, frozen layer around tensors that exist already."""
    out_features, in_features = weight.shape
    has_bias = bias is not None
    linear = nn.Linear(in_features, out_features, has_bias, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def check_adapters(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Refuse adapters that cannot be merged, before the first of their layers is.

    Raises:
        ValueError: If one of the adapters, by default the active ones, holds NaN or
            infinity.
        RuntimeError: If it has a bias where the layer has none.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLinear4bit):
            continue
        for adapter in adapter_names or layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            parts = [layer.lora_A[adapter], layer.lora_B[adapter]]
            if adapter in layer.lora_variant:
                parts.append(layer.lora_magnitude_vector[adapter])
            parameters = [p for part in parts for p in part.parameters()]
            if not all(torch.isfinite(p).all() for p in parameters):
                raise ValueError(
                    f"adapter {adapter} has NaN or infinity at layer {name}: nothing "
                    "was merged; go back to an earlier checkpoint"
                )
            layer.dense_bias([adapter])
