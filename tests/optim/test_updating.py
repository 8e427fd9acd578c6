"""Updates by the kernel, on a GPU or in Triton's interpreter."""

import pytest
import torch

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice, paged_state
from qlora_lib.optim.updating import KernelUpdater

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0,), (3000,), (), (40, 70)]
PAGE = {32: 16384, 8: 4160}


@pytest.fixture
def by_kernel(monkeypatch):
    """Where the kernel runs: on a GPU if there is one, else in the interpreter."""
    if torch.cuda.is_available():
        return "cuda:0"
    monkeypatch.setattr(paged_state, "runs_triton", lambda device: True)
    monkeypatch.setattr(KernelUpdater, "_upload", lambda self, table: table.clone())
    return "cpu"


def paged(parameters, state_bits, pages=1000):
    page = PAGE[state_bits]
    return PagedAdamW(
        [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}],
        state_bits=state_bits,
        page_bytes=page,
        device_budget=pages * page,
        device=None if parameters[0].is_cuda else SimulatedDevice(10**6),
    )


@pytest.mark.parametrize("state_bits", [32, 8])
def test_it_does_what_the_reference_does(
    request, make_parameters, take_steps, bits, state_bits
):
    def run(pages, device):
        parameters = make_parameters(SHAPES, DTYPES, device)
        optimizer = paged(parameters, state_bits, pages)
        take_steps(optimizer, parameters, range(3), missing={(1, 1), (2, 0), (2, 3)})
        return parameters, optimizer.state_dict()["state"]

    expected = run(2, "cpu")
    device = request.getfixturevalue("by_kernel")
    found, other = run(2, device), run(1000, device)
    assert bits(found) == bits(other)
    for mine, its in zip(found[0], expected[0], strict=True):
        if state_bits == 32:
            torch.testing.assert_close(mine.cpu(), its)
        # Of 8 bits, single codes may go either way; on average that is nothing.
        differences = (mine.cpu() - its).abs().double().sum()
        assert differences <= 1e-3 * mine.numel()
    for number, state in expected[1].items():
        assert found[1][number]["step"] == state["step"]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_autograd_notices_the_update(by_kernel, make_parameters, state_bits):
    """The kernel writes where it is told to, and autograd does not see that."""
    used, unused = parameters = make_parameters([(3000,), (3000,)], device=by_kernel)
    optimizer = paged(parameters, state_bits)
    loss = (used * used).sum()
    used.grad = torch.ones_like(used)
    version = unused._version
    optimizer.step()
    assert unused._version == version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_of_no_numbers(by_kernel, take_steps):
    nothing = torch.nn.Parameter(torch.empty(0, device=by_kernel))
    optimizer = paged([nothing], 32)
    take_steps(optimizer, [nothing])
    assert optimizer.state_dict()["state"][0]["step"] == 5
