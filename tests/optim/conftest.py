"""What tests of the optimizer share."""

import pytest
import torch

from qlora_lib import PagedAdamW
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


@pytest.fixture(scope="session")
def edge_shapes():
    """Nothing, a scalar, one number, just over a program, over two pages, matrices."""
    return [(0,), (), (1,), (2049,), (5000,), (3, 0, 2), (64, 33), (7, 5, 3)]


@pytest.fixture(scope="session")
def page_sizes():
    """For each ``state_bits`` the smallest page in bytes: one program."""
    return {32: 16384, 8: 4160}


@pytest.fixture(scope="session")
def make_optimizer(page_sizes):
    """Make an optimizer with the smallest pages and a budget counted in them."""

    def make(parameters, state_bits=32, pages=None, device=None):
        page = page_sizes[state_bits]
        return PagedAdamW(
            parameters,
            lr=0.01,
            weight_decay=0.1,
            state_bits=state_bits,
            page_bytes=page,
            device_budget=None if pages is None else pages * page,
            device=device,
        )

    return make


@pytest.fixture(scope="session")
def make_simulated(make_optimizer):
    """Make such an optimizer on a simulated device of its own."""

    def make(parameters, state_bits=32, pages=None):
        return make_optimizer(parameters, state_bits, pages, SimulatedDevice(10**6))

    return make


@pytest.fixture(scope="session")
def update_page():
    """What stands for a step: it shows a page that is missed, or comes twice."""

    def update(page, place, walk):
        place.view(torch.float32).mul_(0.5).add_(page + 1 + 16 * walk)

    return update


@pytest.fixture(scope="session")
def walk_all(update_page):
    """Walk through all pages of a pager and update each."""

    def walk(pager, times=1):
        for time in range(times):
            for pages in pager.walk():
                for page, place in zip(pages.numbers, pages.places, strict=True):
                    update_page(page, place, time)

    return walk
