"""PagedAdamW with pages that move: any budget equals any other, to the bit."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_lib import PagedAdamW
from qlora_lib.optim import Counters, SimulatedDevice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(parameters, optimizer, take_steps, before_step=None, steps=5, missing=()):
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        take_steps(optimizer, parameters, steps=[step], missing=missing)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("pages", [1, 2, 5, 7, 1000, None])
def test_budgets_are_equal(
    make_parameters,
    edge_shapes,
    make_optimizer,
    make_simulated,
    take_steps,
    bits,
    state_bits,
    pages,
):
    shapes = [*edge_shapes, (3000,), (90, 90)]
    plain, moved = make_parameters(shapes, DTYPES), make_parameters(shapes, DTYPES)
    expected = make_optimizer(plain, state_bits)
    optimizer = make_simulated(moved, state_bits, pages)
    for both in ((plain, expected), (moved, optimizer)):
        run(*both, take_steps)
    assert bits(moved) == bits(plain)
    assert bits(optimizer.state_dict()) == bits(expected.state_dict())
    page_count = optimizer.state_bytes // optimizer.minimum_budget
    assert page_count > 10
    resident = page_count if pages in (1000, None) else max(0, pages - 4)
    assert optimizer.resident_share == resident / page_count
    assert expected.counters == Counters() and expected.resident_share == 1


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 7000), st.sampled_from(DTYPES)), min_size=1, max_size=6
    ),
    state_bits=st.sampled_from([32, 8]),
    page_programs=st.integers(1, 3),
    pages=st.none() | st.integers(1, 14),
    capacity=st.integers(0, 14),
    troubles=st.lists(
        st.tuples(
            st.sampled_from(["occupy", "fail", "evict", "save", "nothing"]),
            st.integers(0, 14),
        ),
        min_size=1,
        max_size=6,
    ),
    missing=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))),
)
@example([(7000, DTYPES[0])], 8, 1, None, 6, [("occupy", 6), ("evict", 0)] * 3, {})
def test_whatever_happens_bits_are_the_same(
    troubled_device,
    make_parameters,
    page_sizes,
    take_steps,
    bits,
    sizes,
    state_bits,
    page_programs,
    pages,
    capacity,
    troubles,
    missing,
):
    shapes, dtypes = zip(*sizes, strict=True)
    page = page_programs * page_sizes[state_bits]
    device = troubled_device(capacity * page)
    plain, moved = make_parameters(shapes, dtypes), make_parameters(shapes, dtypes)
    expected = PagedAdamW(plain, state_bits=state_bits, page_bytes=page)
    optimizer = PagedAdamW(
        moved,
        state_bits=state_bits,
        page_bytes=page,
        device=device,
        device_budget=None if pages is None else pages * page,
    )
    for step, (trouble, amount) in enumerate(troubles):
        if trouble == "occupy":
            device.occupied = amount * page
        elif trouble == "fail":
            device.failures = amount
        elif trouble == "evict":
            assert optimizer.evict() >= 0
            assert device.used == 0
        elif trouble == "save":
            optimizer.load_state_dict(optimizer.state_dict())
        before = bits(moved), bits(optimizer.state_dict())
        try:
            take_steps(optimizer, moved, [step], missing)
        except torch.OutOfMemoryError:
            assert (bits(moved), bits(optimizer.state_dict())) == before
            assert device.used == 0
        else:
            take_steps(expected, plain, [step], missing)
        assert bits(moved) == bits(plain)
        assert bits(optimizer.state_dict()) == bits(expected.state_dict())
        assert pages is None or device.peak <= pages * page


def test_a_step_without_room_changes_nothing(
    make_parameters, make_optimizer, take_steps, bits
):
    device = SimulatedDevice(10**6)
    parameters, plain = make_parameters([(9000,)]), make_parameters([(9000,)])
    optimizer = make_optimizer(parameters, device=device)
    expected = make_optimizer(plain)
    take_steps(optimizer, parameters)
    take_steps(expected, plain)
    before = bits(parameters), bits(optimizer.state_dict())
    optimizer.evict()
    device.occupied = device.capacity
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            take_steps(optimizer, parameters, steps=[5])
    assert (bits(parameters), bits(optimizer.state_dict())) == before
    device.occupied = 0
    take_steps(optimizer, parameters, steps=[5])
    take_steps(expected, plain, steps=[5])
    assert bits(parameters) == bits(plain)
    assert bits(optimizer.state_dict()) == bits(expected.state_dict())


def test_a_closure_that_runs_out_of_memory_is_called_again(
    make_parameters, make_optimizer, take_steps
):
    device = SimulatedDevice(10**6)
    (parameter,) = make_parameters([(9000,)])
    optimizer = make_optimizer([parameter], device=device)
    take_steps(optimizer, [parameter])
    assert optimizer.resident_share == 1
    drawn = []

    def closure():
        drawn.append(torch.rand(()).item())
        if device.free_bytes() < 10**6:
            raise torch.OutOfMemoryError("activations")
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert drawn[0] == drawn[1] and len(drawn) == 2
    assert optimizer.counters.evictions == 1
    assert optimizer.state_dict()["state"][0]["step"] == 6


def test_sizes_can_be_read_beforehand(make_parameters, page_sizes, make_simulated):
    parameters = make_parameters([(5000,), (3000,)], DTYPES[:1])
    optimizer = make_simulated(parameters)
    page = page_sizes[32]
    assert optimizer.minimum_budget == page
    assert optimizer.state_bytes == (3 + 2) * page
    assert optimizer.staging_bytes == 4 * page
    assert optimizer.resident_share == 0 and optimizer.evict() == 0
    assert optimizer.counters == Counters()
    # A page is no larger than all state.
    small = PagedAdamW(parameters[1:])
    assert small.minimum_budget == small.state_bytes == small.staging_bytes == 2 * page
