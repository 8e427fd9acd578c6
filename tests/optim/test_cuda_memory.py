"""On a GPU: pinned host memory, and memory that really runs out."""

import gc

import pytest
import torch

from qlora_lib import PagedAdamW

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(make_parameters, take_steps):
    """Take some steps with two pages and return the parameters and the optimizer."""

    def run():
        parameters = make_parameters([(9001,), (64, 33), ()], device="cuda:0")
        optimizer = PagedAdamW(parameters, page_bytes=16384, device_budget=2 * 16384)
        take_steps(optimizer, parameters)
        return parameters, optimizer

    return run


class Runtime:
    """The CUDA runtime, with a note of what it returned; it may fail to pin."""

    def __init__(self, fails=False):
        self._runtime, self.fails, self.unpinned = torch.cuda.cudart(), fails, []

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def cudaHostRegister(self, address, size, flags):
        # Nothing lies at address 0, so this fails as it does when memory is short.
        return self._runtime.cudaHostRegister(0 if self.fails else address, size, flags)

    def cudaHostUnregister(self, address):
        self.unpinned.append(int(self._runtime.cudaHostUnregister(address)))
        return self.unpinned[-1]


def test_host_memory_is_pinned_as_long_as_it_lives(run, monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    optimizer = run()[1]
    assert optimizer._paged.pages.host.is_pinned()
    gc.collect()
    assert runtime.unpinned == []
    del optimizer
    gc.collect()
    assert runtime.unpinned == [0]


def test_without_pinned_memory_there_is_a_warning_and_the_same(run, monkeypatch, bits):
    expected = run()
    runtime = Runtime(fails=True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.warns(UserWarning, match="cannot be pinned .*raise the limit"):
        parameters, optimizer = run()
    assert not optimizer._paged.pages.host.is_pinned()
    assert bits(parameters) == bits(expected[0])
    assert bits(optimizer.state_dict()) == bits(expected[1].state_dict())
    del optimizer
    gc.collect()
    assert runtime.unpinned == []


def test_pages_give_way_when_memory_runs_out():
    parameter = torch.nn.Parameter(torch.ones(2**25, device="cuda"))
    optimizer = PagedAdamW([parameter], device_budget=2**29)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.resident_share == 1
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    calls = []

    def closure():
        calls.append(optimizer.resident_share)
        activations = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        return activations.nbytes

    limit = (torch.cuda.memory_reserved() + 2**26) / total
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        assert optimizer.step(closure) == 2**28
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert calls == [1, 0]
    assert optimizer.counters.evictions >= 1
    other = torch.nn.Parameter(torch.ones(2**25, device="cuda"))
    reference = PagedAdamW([other], device_budget=2**29)
    other.grad = parameter.grad
    for _ in range(2):
        reference.step()
    assert torch.equal(parameter, other)


def test_the_budget_is_kept(make_parameters):
    [parameter] = make_parameters([(2**22,)], device="cuda:0")
    optimizer = PagedAdamW([parameter], page_bytes=2**21, device_budget=6 * 2**21)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.cuda.synchronize()
    assert optimizer.resident_share == 2 / 16
    optimizer.evict()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        optimizer.step()
    torch.cuda.synchronize()
    assert optimizer.resident_share == 2 / 16
    # Beside the pages there are only small tables.
    assert torch.cuda.max_memory_allocated() - before <= 6 * 2**21 + 2**18
    assert torch.cuda.memory_allocated() - before <= 2 * 2**21 + 2**18
