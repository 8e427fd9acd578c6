"""The pager: what resides, what is streamed, what gives way and returns."""

import pytest
import torch

from qlora_lib.optim import HostPages, Pager, SimulatedDevice
from qlora_lib.optim.paging import STAGING_SLOTS

PAGE = 64


def test_the_first_pages_reside_and_the_rest_is_streamed(walk_all):
    device = SimulatedDevice(2**20)
    pager = Pager(9, PAGE, device, (STAGING_SLOTS + 2) * PAGE)
    batches = [list(pages.numbers) for pages in pager.walk()]
    assert batches == [[0, 1], *([page] for page in range(2, 9))]
    assert pager.resident == 2
    pager.write_back()
    device.log.clear()
    walk_all(pager)
    device.synchronize()
    # A cycle: what resides is not moved, the rest comes and goes once.
    assert sorted(device.log) == sorted(
        (way, page) for way in ("in", "out") for page in range(2, 9)
    )
    counters = pager.counters
    walk_all(pager)
    assert pager.counters.bytes_in - counters.bytes_in == 7 * PAGE
    assert pager.counters.bytes_out - counters.bytes_out == 7 * PAGE
    assert pager.counters.evictions == 0


@pytest.mark.parametrize("pages", range(1, 14))
@pytest.mark.parametrize("rest", [0, PAGE - 1])
def test_a_budget_is_used_as_far_as_it_goes(troubled_device, walk_all, pages, rest):
    device = troubled_device()
    pager = Pager(9, PAGE, device, pages * PAGE + rest)
    walk_all(pager, times=2)
    assert pager.resident == (9 if pages >= 9 else max(0, pages - STAGING_SLOTS))
    assert device.peak == min(pages, 9) * PAGE


def test_several_pages_are_on_their_way_at_once():
    device = SimulatedDevice(2**20)
    pager = Pager(6, PAGE, device, STAGING_SLOTS * PAGE)
    walk = pager.walk()
    next(walk)
    assert pager.counters.bytes_in == STAGING_SLOTS * PAGE
    assert device.log == [("in", 0)]  # the others need not have arrived
    walk.close()


def test_without_a_budget_pages_take_what_is_free_and_follow_it(walk_all):
    device = SimulatedDevice(20 * PAGE)
    pager = Pager(30, PAGE, device)
    walk_all(pager)
    assert pager.resident == 20 - STAGING_SLOTS
    device.occupied = 10 * PAGE
    walk_all(pager, times=4)
    assert pager.resident == 10 - STAGING_SLOTS
    device.occupied = 19 * PAGE
    walk_all(pager)
    assert pager.resident == 0
    device.occupied = 0
    walk_all(pager, times=20)
    assert pager.resident == 20 - STAGING_SLOTS
    device.capacity = 40 * PAGE
    walk_all(pager, times=40)
    assert pager.resident == 30


def test_evicted_pages_stay_away_a_while_and_return(walk_all):
    pager = Pager(6, PAGE, SimulatedDevice(2**20), 100 * PAGE)
    away = []
    for _ in range(4):
        walk_all(pager)
        assert pager.evict() == 6 * PAGE
        assert pager.resident == 0 and pager.evict() == 0
        walks = 0
        while not pager.resident:
            walk_all(pager)
            walks += 1
        away.append(walks)
    # A run that evicts them again and again moves them less and less often.
    assert away == [2, 3, 5, 9]
    assert pager.counters.evictions == 4


def test_many_pages_that_give_way_in_one_walk_wait_no_longer_for_it(walk_all):
    device = SimulatedDevice(20 * PAGE)
    pager = Pager(30, PAGE, device)
    walk_all(pager)
    device.occupied = 19 * PAGE
    walk_all(pager)
    assert pager.counters.evictions > 10
    device.occupied = 0
    walk_all(pager, times=4)
    assert pager.resident == 20 - STAGING_SLOTS


def test_no_room_for_one_page_is_an_error_that_changes_nothing(walk_all):
    device = SimulatedDevice(PAGE - 1)
    pager = Pager(3, PAGE, device)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            walk_all(pager)
    pager.write_back()
    assert not pager.host.any()
    device.capacity = PAGE
    walk_all(pager)
    expected = HostPages(3, PAGE)
    walk_all(expected)
    pager.write_back()
    assert torch.equal(pager.host, expected.host)


def test_a_walk_that_is_given_up_holds_nothing():
    device = SimulatedDevice(2**20)
    pager = Pager(9, PAGE, device, 3 * PAGE)
    walk = pager.walk()
    next(walk)
    assert device.free_bytes() == 2**20 - 3 * PAGE
    walk.close()
    assert device.free_bytes() == 2**20


def test_pages_are_forgotten_for_new_ones(walk_all):
    device = SimulatedDevice(2**20)
    pager = Pager(9, PAGE, device, 6 * PAGE)
    walk_all(pager, times=2)
    pager.forget()
    pager.host.zero_()
    assert (pager.resident, device.free_bytes()) == (0, 2**20)
    walk_all(pager)
    expected = HostPages(9, PAGE)
    walk_all(expected)
    pager.write_back()
    assert torch.equal(pager.host, expected.host)
    assert pager.resident == 2


def test_host_pages_are_where_they_are_used():
    pages = HostPages(3, PAGE)
    assert pages.resident == 3 and pages.evict() == 0
    batches = list(pages.walk([0, 2]))
    assert [list(batch.numbers) for batch in batches] == [[0, 2]]
    assert batches[0].places[1].data_ptr() == pages.host[2].data_ptr()


@pytest.mark.parametrize("budget", [-1, 0, PAGE - 1])
def test_a_budget_below_a_page_is_refused(budget):
    with pytest.raises(ValueError, match=f"at least one page, 64 bytes, got {budget}"):
        Pager(3, PAGE, SimulatedDevice(2**20), budget)


def test_a_budget_is_a_whole_number():
    with pytest.raises(TypeError, match="whole number of bytes, got 1000.0"):
        Pager(3, PAGE, SimulatedDevice(2**20), 1e3)
