"""What tests of the optimizer share."""

import pytest
import torch

from qlora_lib.optim import SimulatedDevice


class TroubledDevice(SimulatedDevice):
    """A simulated device that can be told to fail, and notes the most it has held."""

    def __init__(self, capacity=2**40):
        super().__init__(capacity)
        self.failures = self.peak = 0

    @property
    def used(self):
        return self._used

    def allocate(self, size):
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("told to fail")
        place = super().allocate(size)
        self.peak = max(self.peak, self.used)
        return place


class Bits:
    """What is compared: the bits, so that NaN equals NaN and zeros have signs."""

    @classmethod
    def of(cls, value):
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return str(value.dtype), tuple(value.shape), bytes(data.tolist())
        if isinstance(value, dict):
            return {name: cls.of(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [cls.of(each) for each in value]
        return value


@pytest.fixture(scope="session")
def troubled_device():
    return TroubledDevice


@pytest.fixture(scope="session")
def bits():
    return Bits.of


@pytest.fixture(scope="session")
def take_steps():
    """Give parameters random gradients and take steps; missing ones are left out."""

    def take(optimizer, parameters, steps=range(5), missing=(), scale=1.0):
        for step in steps:
            for number, parameter in enumerate(parameters):
                source = torch.Generator().manual_seed(1000 * step + number)
                gradient = torch.randn(parameter.shape, generator=source) * scale
                gradient = gradient.to(parameter.device, parameter.dtype)
                parameter.grad = None if (step, number) in missing else gradient
            optimizer.step()

    return take


@pytest.fixture(scope="session")
def make_parameters():
    """Make the same random parameters every time."""

    def make(shapes, dtypes=(torch.float32,), device="cpu"):
        source = torch.Generator().manual_seed(0)
        return [
            torch.nn.Parameter(
                torch.randn(shape, generator=source).to(
                    device, dtypes[number % len(dtypes)]
                )
            )
            for number, shape in enumerate(shapes)
        ]

    return make
