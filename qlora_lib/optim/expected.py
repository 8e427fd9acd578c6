"""What an optimizer was given, held against what it finds later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_lib.optim.state import FIELDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpectedParameter(NamedTuple):
    """What a parameter was when it was given to the optimizer."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def check(self, parameter: Tensor, gradient: Tensor, number: int) -> None:
        """Raise if a parameter has changed, or its gradient cannot be used.

        Args:
            parameter: As it is now.
            gradient: Of this step.
            number: Of the parameter, for the message.

        Raises:
            TypeError: If the gradient is sparse or of another type, or the parameter
                has been exchanged for one whose numbers lie in other tensors.
            ValueError: If shape, type or device are not as they were.
        """
        shape, dtype, device = self
        _refuse_wrapper(parameter, number)
        if parameter.shape != shape or parameter.device != device:
            self._complain(parameter, number)
        if gradient.dtype is not dtype or parameter.dtype is not dtype:
            self._complain(parameter, number)
            raise TypeError(
                f"the gradient of parameter {number} is {gradient.dtype}, and the "
                f"parameter {dtype}: convert the gradient"
            )
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"the gradient of parameter {number}, {list(shape)}, is "
                f"{gradient.layout}: PagedAdamW takes dense gradients, for example of "
                "nn.Embedding(sparse=False)"
            )

    def check_state(
        self, state: Mapping[str, Any], number: int, state_bits: int
    ) -> dict[str, Tensor]:
        """Return the moments in a parameter's saved state.

        Raises:
            ValueError: If they cannot be of this parameter.
        """
        fields = FIELDS[state_bits]
        names = {"step", *fields}
        if set(state) != names:
            raise ValueError(
                f"state_dict has {sorted(state)} for parameter {number}, and with "
                f"state_bits={state_bits} it would have {sorted(names)}: make the "
                "optimizer as it was when it was saved"
            )
        moments = {}
        for name, field in fields.items():
            shape = [*self.shape]
            if field.numbers > 1:
                shape = [field.length(self.shape.numel())]
            tensor = torch.as_tensor(state[name])
            if [*tensor.shape] != shape or (
                tensor.dtype != field.dtype
                and not (state_bits == 32 and tensor.is_floating_point())
            ):
                raise ValueError(
                    f"state_dict has {name} of parameter {number} as "
                    f"{_describe(tensor)}, expected {shape} {field.dtype}: make the "
                    "optimizer for the same parameters, in the same order"
                )
            moments[name] = tensor.to("cpu", field.dtype)
        return moments

    def _complain(self, parameter: Tensor, number: int) -> None:
        """Raise if a parameter is not what it was."""
        now = ExpectedParameter(parameter.shape, parameter.dtype, parameter.device)
        if now != self:
            raise ValueError(
                f"parameter {number} is {_describe(parameter)} now and was "
                f"{_describe(self)} when it was given to PagedAdamW: move and convert "
                "the model first, then make the optimizer"
            )


def expect(parameter: Tensor, others: list[ExpectedParameter]) -> ExpectedParameter:
    """Note what a parameter is.

    Args:
        parameter: A new one.
        others: Those that the optimizer has already.

    Raises:
        TypeError: If it is of a type that has no update here, or its numbers lie in
            other tensors.
        ValueError: If it is on another device than the others.
    """
    if parameter.dtype not in DTYPES or parameter.layout is not torch.strided:
        raise TypeError(
            f"parameter {len(others)} is {_describe(parameter)} {parameter.layout}: "
            "PagedAdamW takes dense float32, bfloat16 and float16 parameters"
        )
    _refuse_wrapper(parameter, len(others))
    if others and parameter.device != others[0].device:
        raise ValueError(
            f"parameter {len(others)} is on {parameter.device} and others are on "
            f"{others[0].device}: make one optimizer for each device, or use "
            "torch.optim.AdamW"
        )
    return ExpectedParameter(parameter.shape, parameter.dtype, parameter.device)


def check_saved(
    saved: Mapping[str, Any], expected: Sequence[ExpectedParameter], state_bits: int
) -> tuple[dict[int, dict[str, int]], dict[int, dict[str, Tensor]]]:
    """Return the steps and the moments of a state dict.

    Args:
        saved: What ``state_dict()`` of an optimizer has returned.
        expected: Parameters of the optimizer that shall have it.
        state_bits: 32 or 8, of that optimizer.

    Returns:
        ``{"step": ...}`` by the numbers that the state dict gives parameters, and
        moments by their place in ``expected``; of those alone that have taken a step.

    Raises:
        ValueError: If moments cannot be of their parameter.
    """
    ids = [key for group in saved["param_groups"] for key in group["params"]]
    steps, moments = {}, {}
    for number, (key, parameter) in enumerate(zip(ids, expected, strict=False)):
        state = saved["state"].get(key)
        # Before a first step there are no moments to speak of.
        if state and state.get("step", 1) > 0:
            moments[number] = parameter.check_state(state, number, state_bits)
            steps[key] = {"step": int(state["step"])}
    return steps, moments


def _refuse_wrapper(parameter: Tensor, number: int) -> None:
    """Raise if a parameter, as a DTensor, has no memory of its own to be updated."""
    kind = type(parameter)
    if kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):
        raise TypeError(
            f"parameter {number} is a {kind.__name__}, whose numbers lie in other "
            "tensors: give PagedAdamW plain tensors, or use torch.optim.AdamW"
        )


def _describe(tensor: Tensor | ExpectedParameter) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
