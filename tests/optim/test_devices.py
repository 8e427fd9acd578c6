"""The simulated device: copies as late as allowed, and poison until then."""

import pytest
import torch

from qlora_lib.optim import SimulatedDevice

SIZE = 16


@pytest.fixture
def device():
    return SimulatedDevice(4 * SIZE)


def filled(value):
    return torch.full((SIZE,), value, dtype=torch.uint8)


def test_host_memory_is_zero(device):
    memory = device.host_memory(3 * SIZE)
    assert memory.dtype == torch.uint8
    assert memory.tolist() == [0] * 3 * SIZE


def test_memory_runs_out_and_comes_back(device):
    places = [device.allocate(SIZE) for _ in range(3)]
    assert device.free_bytes() == SIZE
    device.occupied = 1
    assert device.free_bytes() == SIZE - 1
    with pytest.raises(torch.OutOfMemoryError, match="16 bytes asked for, 64 in all"):
        device.allocate(SIZE)
    device.release(places.pop())
    assert device.free_bytes() == 2 * SIZE - 1
    device.allocate(SIZE)


def test_new_memory_is_poisoned(device):
    assert device.allocate(SIZE).view(torch.float32).isnan().all()


def test_a_copy_runs_when_it_is_waited_for(device):
    host, place = device.host_memory(SIZE), device.allocate(SIZE)
    host.fill_(1)
    place.zero_()
    event = device.copy_in(host, place, [])
    assert torch.equal(place, filled(255))
    host.fill_(2)  # too early: the copy has not run
    device.wait(event)
    assert torch.equal(place, filled(2))
    assert device.stalls() == 1
    device.wait(event)
    assert device.stalls() == 1
    assert device.log == [("in", 0)]


def test_a_copy_waits_for_what_comes_first(device):
    host, place = device.host_memory(2 * SIZE), device.allocate(SIZE)
    place.fill_(1)
    gone = device.copy_out(place, host[SIZE:])
    assert torch.equal(host[SIZE:], filled(255))
    arrival = device.copy_in(host[:SIZE], place, [gone])
    assert torch.equal(place, filled(1))  # it must not be touched yet
    device.wait(arrival)
    assert torch.equal(host[SIZE:], filled(1))
    assert torch.equal(place, filled(0))
    assert device.log == [("out", 1), ("in", 0)]


def test_a_copy_that_does_not_wait_destroys_what_is_still_to_be_read(device):
    host, place = device.host_memory(2 * SIZE), device.allocate(SIZE)
    place.fill_(1)
    device.copy_out(place, host[SIZE:])
    device.copy_in(host[:SIZE], place, [])
    device.synchronize()
    assert torch.equal(host[SIZE:], filled(255))


def test_synchronizing_runs_all_copies(device):
    host, place = device.host_memory(SIZE), device.allocate(SIZE)
    place.fill_(7)
    event = device.copy_out(place, host)
    device.synchronize()
    assert torch.equal(host, filled(7))
    device.wait(event)
    assert device.stalls() == 0
    assert device.log == [("out", 0)]
