"""PagedAdamW: AdamW whose state moves between host and GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from qlora_lib.kernels.parameter_table import PROGRAM
from qlora_lib.optim.arguments import (
    check_budget,
    check_bytes,
    check_group,
    check_options,
)
from qlora_lib.optim.devices import Device
from qlora_lib.optim.expected import ExpectedParameter, check_saved, expect
from qlora_lib.optim.paged_state import PagedState
from qlora_lib.optim.paging import STAGING_SLOTS, Counters
from qlora_lib.optim.spikes import attempt_with_room
from qlora_lib.optim.state import FIELDS, dequantized, state_bytes
from qlora_lib.optim.work import Work, work_of_step

# Large enough for a copy to run at the speed of the link and to take longer than the
# host needs to ask for the next; small enough that the first copy in and the last one
# out, which overlap with nothing, take little of a step.
PAGE_BYTES = 16 * 2**20


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, alg. 2) with state in pages (paper, section 3).

    ::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The moments ``m`` and ``v`` lie in pinned host memory. As many pages of them as the
    budget allows reside on the GPU; the others come in, are updated, and go out again
    in each step, all three at the same time. Whatever the budget is, the result is the
    same to the bit. With parameters on the CPU nothing moves, and the result is that of
    ``torch.optim.AdamW(foreach=False)``, to the bit for float32 parameters.

    State is float32, or 8-bit codes in blocks of 256 with a float32 scale each
    (Dettmers et al., 8-bit Optimizers via Block-wise Quantization), for parameters in
    float32, bfloat16 and float16. A parameter takes part in a step if it has a
    gradient, and has steps of its own. NaN and infinity in a gradient go into its
    parameter; nothing waits for the GPU to look for them. With 8-bit state a whole
    block of 256 is NaN from the next step on.

    Args:
        params: Parameters or parameter groups, all on one device.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        device_budget: Bytes of the GPU that state may take, staging slots included,
            which are there during a step only. None: what is free at the first step,
            less what forward and backward took and a reserve, looked up again now and
            then.
        state_bits: 32 or 8.
        page_bytes: Size of a page at most; smaller if all state is smaller.
        device: A device to move pages to, for parameters on the CPU: a
            :class:`~qlora_lib.optim.SimulatedDevice`.

    Raises:
        TypeError: If a parameter is not a dense one of these types, ``device_budget``
            or ``page_bytes`` not a whole number, or ``device`` no device for pages.
        ValueError: If the parameters are on several devices or not where ``device``
            is for, a number is out of range, or ``device_budget`` or ``page_bytes`` is
            too small, with the least that works.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        device_budget: int | None = None,
        state_bits: Literal[32, 8] = 32,
        page_bytes: int = PAGE_BYTES,
        device: Device | None = None,
    ) -> None:
        if state_bits not in FIELDS:
            raise ValueError(f"state_bits must be 32 or 8, got {state_bits!r}")
        check_bytes("page_bytes", page_bytes)
        least = state_bytes(PROGRAM, state_bits)
        if page_bytes < least:
            raise ValueError(f"page_bytes must be at least {least}, got {page_bytes}")
        self.state_bits = state_bits
        self._budget, self._device = device_budget, device
        self._largest_page = page_bytes // least * PROGRAM
        # Of all parameters, in the order of the groups.
        self._expected: list[ExpectedParameter] = []
        self._steps: list[int] = []
        self._paged: PagedState
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @property
    def minimum_budget(self) -> int:
        """Bytes of one page, the least ``device_budget``."""
        return self._paged.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of all pages."""
        return self._paged.layout.page_count * self._paged.page_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the GPU that a step takes with nothing resident, or its budget."""
        return min(self.state_bytes, STAGING_SLOTS * self._paged.page_bytes)

    @property
    def counters(self) -> Counters:
        """Bytes moved, stalls and evictions since the first step.

        A group that is added later makes new pages, which are counted from zero.
        """
        return self._paged.pages.counters if self._paged.is_in_use else Counters()

    @property
    def resident_share(self) -> float:
        """Share of the pages that stay on the GPU between steps, 0 to 1."""
        if not self._paged.is_in_use:
            return 0.0
        return self._paged.pages.resident / self._paged.layout.page_count

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; moments that there are already stay as they are.

        After a first step they are copied to new pages, which takes host memory for
        both and for a copy meanwhile, and the counters begin again.

        Raises:
            TypeError: If a parameter is not a dense one of the types of the class.
            ValueError: If an option is out of range, ``amsgrad`` or ``maximize`` is
                set, a parameter is on another device or given twice, or a page does not
                fit into the budget any more. The groups are as before then.
        """
        super().add_param_group(param_group)
        expected = list(self._expected)
        try:
            check_group(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                expected.append(expect(parameter, expected))
            paged = PagedState(
                expected,
                self.state_bits,
                self._largest_page,
                self._device,
                self._budget,
            )
            check_budget(self._budget, paged.page_bytes)
            if any(self._steps):
                moments = self._moments()
                self._paged.pages.forget()
                paged.write(moments)
        except BaseException:
            self.param_groups.pop()
            raise
        self._steps += [0] * (len(expected) - len(self._expected))
        self._expected, self._paged = expected, paged

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Clears the gradients, computes the loss and the gradients, and
                returns the loss. If GPU memory runs out in it, all pages are moved to
                the host and it is called once more, with the same random numbers.

        Returns:
            What ``closure`` has returned.

        Raises:
            TypeError: If a gradient is sparse or of another type than its parameter, or
                a parameter has been exchanged for one whose numbers lie in other
                tensors.
            ValueError: If a parameter has changed its shape, type or device since it
                was given to the optimizer, or the groups have more or fewer of them.
                Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = attempt_with_room(closure, self.evict)
        with torch.no_grad():
            work = work_of_step(self.param_groups, self._expected, self._steps)
            if any(work):
                self._paged.update(work)
                self._finish(work)
        return loss

    def evict(self) -> int:
        """Move all state to the host; it returns in later steps, if there is room.

        Returns:
            Bytes of the GPU that this has freed.
        """
        return self._paged.pages.evict() if self._paged.is_in_use else 0

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, on the CPU.

        With 32 bits it has the layout of ``torch.optim.AdamW``, which can load it:
        ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter. With 8 bits it has
        ``step``, and ``exp_avg_codes``, ``exp_avg_scales``, ``exp_avg_sq_codes`` and
        ``exp_avg_sq_scales``.
        """
        moments, marks = self._moments(), self.state
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for number, parameter in enumerate(self._parameters()):
            if number in moments:
                step = torch.tensor(float(self._steps[number]))
                state[parameter] = {"step": step, **moments[number]}
        self.state = state
        try:
            return super().state_dict()
        finally:
            self.state = marks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` has returned, or ``torch.optim.AdamW``'s.

        Moments go to the pages as they are: 8-bit codes and scales are not cast to the
        type of their parameter, nor moved to its device.

        Raises:
            ValueError: If the groups differ, state has other shapes, types or another
                number of bits than this optimizer's, or was kept with ``amsgrad`` or
                ``maximize``. Nothing has been loaded then.
        """
        moments: dict[int, dict[str, Tensor]] = {}

        # The base class would cast the moments, so it gets the steps alone. The hooks
        # stand beside those of others: the last before loading, the first after it.
        def keep_moments(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            # Another number of groups is refused by the base class.
            if len(saved["param_groups"]) == len(self.param_groups):
                for group in saved["param_groups"]:
                    check_options(group)
            steps, found = check_saved(saved, self._expected, self.state_bits)
            if found:  # before anything is changed
                self._paged.take_memory()
            moments.update(found)
            return {**saved, "state": steps}

        def write_moments(_: Optimizer) -> None:
            self._steps = [
                self.state[parameter]["step"] if number in moments else 0
                for number, parameter in enumerate(self._parameters())
            ]
            for parameter in self.state:
                self.state[parameter] = {}
            if moments or self._paged.is_in_use:
                self._paged.write(moments)

        hooks = (
            self.register_load_state_dict_pre_hook(keep_moments),
            self.register_load_state_dict_post_hook(write_moments, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def export_torch_state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim.AdamW`` has it, dequantized if need be."""
        exported = self.state_dict()
        if self.state_bits == 8:
            for index, saved in exported["state"].items():
                exported["state"][index] = {"step": saved["step"], **dequantized(saved)}
        return exported

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "PagedAdamW cannot be copied or pickled, since its pages belong to one "
            "device: save its state_dict()"
        )

    def _finish(self, work: Sequence[Work | None]) -> None:
        """Count the step, and give updated copies back to parameters with strides."""
        for number, parameter in enumerate(self._parameters()):
            if (done := work[number]) is not None:
                if not self._steps[number]:
                    # torch.distributed.checkpoint asks whether there is state, and
                    # takes a step of its own if there is none.
                    self.state[parameter] = {}
                self._steps[number] += 1
                if done.parameter is not parameter:
                    parameter.copy_(done.parameter)

    def _parameters(self) -> list[nn.Parameter]:
        return [each for group in self.param_groups for each in group["params"]]

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """Copy the moments of every parameter that has taken a step."""
        taken = [number for number, steps in enumerate(self._steps) if steps]
        return self._paged.read(taken) if taken else {}
