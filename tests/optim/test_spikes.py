"""Second attempts at what ran out of memory; the errors are raised by hand."""

import gc
import weakref

import pytest
import torch

from qlora_lib.optim.spikes import RandomState, attempt_with_room


class Attempts:
    """Fails with each error in turn, then succeeds; draws numbers, holds a tensor."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.drawn = []
        self.held = []

    def __call__(self):
        # What an earlier attempt held has to be gone before this one allocates.
        assert all(tensor() is None for tensor in self.held)
        activations = torch.rand(4)
        self.drawn.append(activations.tolist())
        self.held.append(weakref.ref(activations))
        if self.errors:
            raise self.errors.pop(0)
        return len(self.drawn)


def test_what_succeeds_makes_no_room():
    attempt = Attempts()
    made = attempt_with_room(attempt, lambda: pytest.fail("nothing ran out"))
    assert made == len(attempt.drawn) == 1


def test_a_second_attempt_follows_and_draws_the_same_numbers():
    attempt, freed = Attempts(torch.OutOfMemoryError()), []

    def make_room():
        freed.append(torch.rand(3))  # may draw numbers too
        return 1

    torch.manual_seed(5)
    assert attempt_with_room(attempt, make_room) == 2
    after = torch.rand(4).tolist()
    assert len(freed) == 1
    torch.manual_seed(5)
    expected = [torch.rand(4).tolist() for _ in range(2)]
    assert attempt.drawn == [expected[0], expected[0]]
    assert after == expected[1]


def test_what_is_done_again_may_be_something_else():
    attempt = Attempts(torch.OutOfMemoryError())
    assert attempt_with_room(attempt, lambda: 1, lambda: "again") == "again"
    assert len(attempt.drawn) == 1
    assert attempt_with_room(attempt, lambda: 1, lambda: "again") == 2


def test_an_attempt_may_return_nothing():
    results = iter([torch.OutOfMemoryError(), None])

    def attempt():
        if (result := next(results)) is not None:
            raise result

    assert attempt_with_room(attempt, lambda: 1) is None
    assert next(results, "no third attempt") == "no third attempt"


def test_without_room_the_error_is_raised_as_it_was():
    error = torch.OutOfMemoryError("CUDA out of memory")
    attempt = Attempts(error)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        attempt_with_room(attempt, lambda: 0)
    assert raised.value is error
    assert len(attempt.drawn) == 1


def test_a_second_failure_is_raised():
    second = torch.OutOfMemoryError("second")
    attempt, room = Attempts(torch.OutOfMemoryError("first"), second), iter([1])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        attempt_with_room(attempt, lambda: next(room))
    assert raised.value is second
    assert raised.value.__context__ is None
    assert len(attempt.drawn) == 2


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyboardInterrupt()])
def test_other_errors_are_none_of_its_business(error):
    attempt = Attempts(error)
    with pytest.raises(type(error)) as raised:
        attempt_with_room(attempt, lambda: pytest.fail("no room is needed"))
    assert raised.value is error
    assert len(attempt.drawn) == 1


def test_reference_cycles_of_the_failed_attempt_are_freed_too():
    held = []

    def attempt():
        assert all(tensor() is None for tensor in held)
        cycle = [torch.rand(4)]
        cycle.append(cycle)
        held.append(weakref.ref(cycle[0]))
        if len(held) == 1:
            raise torch.OutOfMemoryError

    gc.disable()
    try:
        attempt_with_room(attempt, lambda: 1)
    finally:
        gc.enable()
    assert len(held) == 2


def test_autograd_holds_nothing_of_an_attempt_that_failed_in_its_backward_pass():
    held, left = [], [1]

    def fail(gradient):
        if left and left.pop():
            raise torch.OutOfMemoryError

    def attempt():
        assert all(tensor() is None for tensor in held)
        weight = torch.ones(3, requires_grad=True)
        weight.register_hook(fail)
        hidden = weight.exp()
        held.append(weakref.ref(hidden))
        hidden.square().sum().backward()
        return weight.grad

    expected = 2 * torch.ones(3).mul(2).exp()
    torch.testing.assert_close(attempt_with_room(attempt, lambda: 1), expected)
    assert len(held) == 2


def test_the_state_is_left_alone_where_cuda_is_not_in_use():
    if not torch.cuda.is_initialized():
        assert RandomState.now().cuda == []
        assert not torch.cuda.is_initialized()


@pytest.mark.gpu
def test_a_spike_of_the_gpu_is_survived_once_there_is_room():
    free = torch.cuda.mem_get_info()[0]
    resident = [torch.empty(free // 2, dtype=torch.uint8, device="cuda")]
    drawn = []

    def make_room():
        size = resident[0].nbytes
        resident.clear()
        return size

    def attempt():
        drawn.append(torch.rand(4, device="cuda").tolist())
        return torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda").nbytes

    assert attempt_with_room(attempt, make_room) == free * 3 // 4
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    torch.cuda.empty_cache()
