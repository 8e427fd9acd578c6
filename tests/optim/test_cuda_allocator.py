"""On a GPU: the caching allocator hands nothing out that a copy still uses."""

import pytest
import torch

from qlora_lib import PagedAdamW
from qlora_lib.optim import CudaDevice

pytestmark = pytest.mark.gpu

PAGE = 2**21  # large enough for the allocator to give it a block of its own
SHAPES = [(1500, 1000)]
# Clock cycles: some ten milliseconds, far longer than a step and its copies.
SLEEP = 50_000_000


class SlowlyOut(CudaDevice):
    """Copies to the host late."""

    def copy_out(self, place, host):
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            torch.cuda._sleep(SLEEP)
        return super().copy_out(place, host)


def make(parameters, pages, device=None):
    budget = pages * PAGE
    return PagedAdamW(parameters, page_bytes=PAGE, device_budget=budget, device=device)


def test_a_slot_is_not_handed_out_while_it_is_copied(make_parameters, take_steps, bits):
    expected = make_parameters(SHAPES, device="cuda:0")
    reference = make(expected, 1000)
    take_steps(reference, expected, range(2))
    parameters = make_parameters(SHAPES, device="cuda:0")
    optimizer = make(parameters, 4, SlowlyOut(torch.device("cuda:0")))
    take_steps(optimizer, parameters, range(2))
    others = [
        torch.full((PAGE,), 7, dtype=torch.uint8, device="cuda") for _ in range(9)
    ]
    assert bits(optimizer.state_dict()) == bits(reference.state_dict())
    assert all((other == 7).all() for other in others)


def test_a_slot_is_not_filled_while_it_is_used_by_what_was_there(
    make_parameters, take_steps
):
    parameters = make_parameters(SHAPES, device="cuda:0")
    optimizer = make(parameters, 1)
    take_steps(optimizer, parameters, range(2))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.full((PAGE,), 7, dtype=torch.uint8, device="cuda")
    clone = torch.empty_like(before)
    torch.cuda._sleep(SLEEP)
    clone.copy_(before)
    del before  # in the order of the stream: the first slot takes its place
    optimizer.step()
    assert (clone == 7).all()


def test_pages_are_not_cut_out_of_what_a_pass_will_need_whole(make_parameters):
    parameters = make_parameters(SHAPES, device="cuda:0")
    optimizer = make(parameters, 1000)
    parameters[0].grad = torch.ones_like(parameters[0])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = torch.empty(64 * PAGE, dtype=torch.uint8, device="cuda")
    size = large.nbytes
    del large  # to the cache, where there would be room for all pages
    optimizer.step()
    assert optimizer.resident_share == 1
    assert torch.cuda.memory_reserved() - before < size
