"""The pager against a model of it, on a device that delays, poisons and fails."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_lib.optim import HostPages, Pager, SimulatedDevice

PAGE = 64
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("walk"), st.sets(st.integers(0, 11))),
        st.tuples(st.just("walk"), st.just(set(range(12)))),
        st.tuples(st.just("abandon"), st.integers(0, 6)),
        st.tuples(st.just("evict within"), st.integers(0, 6)),
        st.tuples(st.just("fail"), st.integers(1, 14)),
        st.tuples(st.just("occupy"), st.integers(0, 14)),
        st.tuples(st.sampled_from(["evict", "write back"]), st.just(0)),
    ),
    max_size=12,
)


class Model:
    """Runs a pager and, beside it, what it has to amount to."""

    def __init__(self, update_page, page_count, device, budget):
        self.pager = Pager(page_count, PAGE, device, budget)
        self.device, self.budget = device, budget
        self.expected = HostPages(page_count, PAGE)
        self.update_page = update_page
        self.walks = 0

    def walk(self, pages, after=-1, then=None):
        """Walk, and after so many batches of pages do something else."""
        self.walks += 1
        wanted = sorted(page for page in pages if page < self.pager.page_count)
        done = []
        walk = self.pager.walk(wanted)
        try:
            for number, batch in enumerate(walk):
                if number == 0 and self.pager.resident:
                    # All that reside come at once, first of all: a prefix.
                    here = [page for page in wanted if page < self.pager.resident]
                    assert list(batch.numbers) == (here or wanted[:1])
                if number == after and then is None:
                    walk.close()
                    break
                for page, place in zip(batch.numbers, batch.places, strict=True):
                    self.update_page(page, place, self.walks)
                    self.update_page(page, self.expected.host[page], self.walks)
                    done.append(page)
                if number == after:
                    then()
            else:
                assert done == wanted
        except torch.OutOfMemoryError:
            assert not done and not self.pager.resident
        self.check()

    def do(self, act, value):
        if act == "walk":
            self.walk(value)
        elif act == "abandon":
            self.walk(range(12), after=value)
        elif act == "evict within":
            self.walk(range(12), after=value, then=self.pager.evict)
        elif act == "fail":
            self.device.failures = value
        elif act == "occupy":
            self.device.occupied = value * PAGE
        elif act == "evict":
            before = self.device.used
            assert self.pager.evict() == before
            assert self.device.used == 0
            if before:  # all of it has arrived
                assert torch.equal(self.pager.host, self.expected.host)
        else:
            self.compare()
        self.check()

    def check(self):
        assert self.device.used == self.pager.resident * PAGE
        assert self.pager.resident <= self.pager.page_count
        assert self.device.peak <= self.device.capacity
        if self.budget is not None:
            assert self.device.peak <= self.budget

    def compare(self):
        self.pager.write_back()
        assert torch.equal(self.pager.host, self.expected.host)
        counters, log = self.pager.counters, self.device.log
        assert counters.bytes_in == PAGE * sum(way == "in" for way, _ in log)
        assert counters.bytes_out == PAGE * sum(way == "out" for way, _ in log)


@settings(deadline=None, max_examples=300)
@given(
    page_count=st.integers(1, 12),
    capacity=st.integers(0, 14),
    budget=st.none() | st.integers(PAGE, 14 * PAGE),
    acts=ACTS,
)
@example(9, 9, None, [("walk", set(range(12))), ("occupy", 9), ("walk", {8})] * 4)
@example(6, 1, None, [("abandon", 1), ("walk", {0, 5}), ("evict within", 0)])
def test_whatever_happens_pages_are_those_of_the_model(
    troubled_device, update_page, page_count, capacity, budget, acts
):
    device = troubled_device(capacity * PAGE)
    model = Model(update_page, page_count, device, budget)
    for act, value in acts:
        model.do(act, value)
    model.compare()
    # What went wrong is over: with room for one page, everything is reached again.
    device.failures = device.occupied = 0
    device.capacity = max(device.capacity, PAGE)
    model.walk(range(12))
    model.compare()


# What the poison is there to show: pagers that forget to wait for something.


class ForgetsArrival(SimulatedDevice):
    def wait(self, event):
        pass


class ForgetsToSynchronize(SimulatedDevice):
    def synchronize(self):
        pass


class ForgetsWhatASlotHeld(Pager):
    def _copy_in(self, page, place, *after):
        return super()._copy_in(page, place)


class ForgetsWhatItWrote(Pager):
    def _copy_in(self, page, place, *after):
        self._written.clear()
        return super()._copy_in(page, place, *after)


class ForgetsToBringBack(Pager):
    def _copy_out(self, page, place):
        return self._device.copy_out(place, self.host[page].clone())


@pytest.mark.parametrize(
    ("pager_type", "device_type", "right"),
    [
        (Pager, SimulatedDevice, True),
        (Pager, ForgetsArrival, False),
        (Pager, ForgetsToSynchronize, False),
        (ForgetsWhatASlotHeld, SimulatedDevice, False),
        (ForgetsWhatItWrote, SimulatedDevice, False),
        (ForgetsToBringBack, SimulatedDevice, False),
    ],
)
def test_a_pager_that_forgets_to_wait_is_found_out(
    walk_all, pager_type, device_type, right
):
    expected = HostPages(9, PAGE)
    walk_all(expected, times=3)
    pager = pager_type(9, PAGE, device_type(2**20), 5 * PAGE)
    walk_all(pager, times=3)
    pager.write_back()
    assert torch.equal(pager.host, expected.host) == right
