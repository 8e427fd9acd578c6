"""What a step does to each parameter, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qlora_lib.optim.expected import ExpectedParameter
from qlora_lib.optim.update import Factors


class Work(NamedTuple):
    """What a step does to one parameter.

    Attributes:
        parameter: Contiguous.
        gradient: Of the same shape and type, contiguous.
        factors: Of this step of this parameter.
    """

    parameter: Tensor
    gradient: Tensor
    factors: Factors


def work_of_step(
    groups: Sequence[dict[str, Any]],
    expected: Sequence[ExpectedParameter],
    steps: Sequence[int],
) -> list[Work | None]:
    """Return what a step does to each parameter; None where it has no gradient.

    Args:
        groups: Parameter groups of an optimizer.
        expected: What its parameters were when they were given to it.
        steps: How many steps each has taken.

    Raises:
        TypeError: If a gradient is sparse or of another type than its parameter, or a
            parameter has been exchanged for one whose numbers lie in other tensors.
        ValueError: If a parameter is not what it was, or there are more or fewer.
    """
    work: list[Work | None] = []
    count = sum(len(group["params"]) for group in groups)
    if count != len(expected):
        raise ValueError(
            f"param_groups has {count} parameters, and PagedAdamW was given "
            f"{len(expected)}: to have one rest, set its gradient to None; to have "
            "more, call add_param_group"
        )
    for group in groups:
        factors: dict[int, Factors] = {}
        for parameter in group["params"]:
            gradient, number = parameter.grad, len(work)
            if gradient is None:
                work.append(None)
                continue
            expected[number].check(parameter, gradient, number)
            step = steps[number] + 1
            if step not in factors:
                factors[step] = _factors(group, step)
            work.append(
                Work(parameter.contiguous(), gradient.contiguous(), factors[step])
            )
    return work


def _factors(group: dict[str, Any], step: int) -> Factors:
    return Factors.of_step(
        step,
        float(group["lr"]),
        group["betas"],
        group["eps"],
        group["weight_decay"],
    )
