"""On a GPU: any budget equals any other, whatever copies are under way."""

import warnings

import pytest
import torch

from qlora_lib import PagedAdamW
from qlora_lib.optim import CudaDevice

pytestmark = pytest.mark.gpu

SHAPES = [(0,), (), (2049,), (40000,), (64, 33), (9001,), (128, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = 4
# Clock cycles, about a millisecond: far longer than any step here.
SLEEP = 2_000_000


class SlowDevice(CudaDevice):
    """Copies late, and poisons what it will copy to."""

    def copy_in(self, host, place, after):
        for event in after:
            self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            place.fill_(255)
            torch.cuda._sleep(SLEEP)
        return super().copy_in(host, place, [])

    def copy_out(self, place, host):
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            torch.cuda._sleep(SLEEP)
        return super().copy_out(place, host)


@pytest.fixture
def run(make_parameters, make_optimizer, take_steps):
    """Take some steps and return the parameters and the optimizer."""

    def run(*args, missing=((1, 3), (2, 2), (2, 4)), dtypes=DTYPES, **options):
        parameters = make_parameters(SHAPES, dtypes, "cuda:0")
        optimizer = make_optimizer(parameters, *args, **options)
        take_steps(optimizer, parameters, range(STEPS), missing)
        return parameters, optimizer

    return run


@pytest.fixture
def no_waiting():
    torch.cuda.synchronize()

    def switch(mode):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode(mode)

    yield lambda: switch("error")
    switch("default")


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("pages", [1, 2, 5, 9, 1000, None])
def test_budgets_are_equal(run, bits, state_bits, pages):
    expected = run(state_bits, 3)
    found = run(state_bits, pages)
    assert bits(found[0]) == bits(expected[0])
    assert bits(found[1].state_dict()) == bits(expected[1].state_dict())
    assert not any(parameter.isnan().any() for parameter in found[0])
    share = found[1].resident_share
    if pages in (1000, None):
        assert share == 1
    else:
        page_count = found[1].state_bytes // found[1].minimum_budget
        assert share == max(0, pages - 4) / page_count


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("pages", [1, 2, 5, 1000])
def test_nothing_is_read_before_it_has_arrived(run, bits, state_bits, pages):
    expected = run(state_bits, pages)
    slow = SlowDevice(torch.device("cuda:0"))
    parameters, optimizer = run(state_bits, pages, device=slow)
    # Both are read at once, while copies are under way.
    assert bits(parameters) == bits(expected[0])
    assert bits(optimizer.state_dict()) == bits(expected[1].state_dict())
    assert optimizer.counters.stalls > 0


@pytest.mark.parametrize("state_bits", [32, 8])
def test_evicting_and_loading_wait_for_copies(
    run, page_sizes, take_steps, bits, state_bits
):
    expected, reference = run(state_bits, 1000)
    slow = SlowDevice(torch.device("cuda:0"))
    parameters, optimizer = run(state_bits, 9, device=slow)
    assert optimizer.evict() == 5 * page_sizes[state_bits]
    take_steps(optimizer, parameters, [10])
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, parameters, [11])
    take_steps(reference, expected, [10, 11])
    assert bits(parameters) == bits(expected)
    assert bits(optimizer.state_dict()) == bits(reference.state_dict())


def test_the_next_forward_sees_the_update(run, take_steps, bits):
    slow = SlowDevice(torch.device("cuda:0"))
    parameters, optimizer = run(32, 2, device=slow)
    expected, reference = run(32, 1000)
    for step in range(20, 23):
        for each, own in ((optimizer, parameters), (reference, expected)):
            take_steps(each, own, [step])
        # Not waited for: copies out of the last pages are still under way.
        sums = [
            torch.stack([each.double().sum() for each in own])
            for own in (parameters, expected)
        ]
        assert torch.equal(*sums)
    assert bits(parameters) == bits(expected)


def test_strides_make_no_difference(make_optimizer, bits):
    def parameters():
        source = torch.Generator().manual_seed(0)
        base = torch.randn(70, 60, generator=source).cuda()
        line = torch.randn(9001, generator=source).cuda()
        return [
            torch.nn.Parameter(base.clone().t()),
            torch.nn.Parameter(base.clone()[::2, 1::3]),
            torch.nn.Parameter(line[1:]),  # not at an address divisible by 16
        ]

    results = []
    for pages in (1, 1000):
        own = parameters()
        optimizer = make_optimizer(own, pages=pages)
        flat = [
            torch.nn.Parameter(
                each.detach().clone(memory_format=torch.contiguous_format)
            )
            for each in own
        ]
        other = make_optimizer(flat, pages=pages)
        for step in range(STEPS):
            for mine, its in zip(own, flat, strict=True):
                source = torch.Generator().manual_seed(step)
                gradient = torch.randn(mine.shape[::-1], generator=source).cuda()
                mine.grad = gradient.permute(*range(mine.dim())[::-1])
                its.grad = mine.grad.contiguous()
            optimizer.step()
            other.step()
        assert bits(own) == bits(flat)
        results.append(bits(own))
    assert results[0] == results[1]


def test_the_kernel_is_near_to_torch(run, make_parameters, take_steps):
    dtypes = [torch.float32]
    parameters, optimizer = run(32, 2, dtypes=dtypes)
    others = make_parameters(SHAPES, dtypes, "cuda:0")
    reference = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, fused=True)
    take_steps(reference, others, range(STEPS), ((1, 3), (2, 2), (2, 4)))
    for mine, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for number, saved in optimizer.state_dict()["state"].items():
        expected = reference.state[others[number]]
        assert saved["step"] == expected["step"].cpu()
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                saved[name], expected[name].cpu(), rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("pages", [2, 9, 1000, None])
def test_a_step_waits_for_nothing(run, state_bits, pages, no_waiting):
    parameters, optimizer = run(state_bits, pages)
    parameters[3].grad[7] = torch.nan
    parameters[5].grad = None
    optimizer.param_groups[0]["lr"] = 0.02
    before = parameters[5].detach().clone()
    no_waiting()
    optimizer.step()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(parameters[5], before)
    lost = torch.arange(40000, device="cuda") == 7
    if state_bits == 8:
        lost = torch.arange(40000, device="cuda") // 256 == 0
    assert torch.equal(parameters[3].isnan(), lost)


def test_state_moves_between_cpu_and_gpu(run, make_parameters, make_optimizer, bits):
    _, optimizer = run(8, 2)
    saved = optimizer.state_dict()
    arrays = [each for state in saved["state"].values() for each in state.values()]
    assert {array.device.type for array in arrays} == {"cpu"}
    moved = make_optimizer(make_parameters(SHAPES, DTYPES), 8)
    moved.load_state_dict(saved)
    assert bits(moved.state_dict()["state"]) == bits(saved["state"])
    on_gpu = {
        number: {name: array.cuda() for name, array in state.items()}
        for number, state in saved["state"].items()
    }
    moved.load_state_dict({**saved, "state": on_gpu})
    assert bits(moved.state_dict()["state"]) == bits(saved["state"])


@pytest.mark.parametrize(
    "change",
    [lambda data: data.cpu(), lambda data: data.bfloat16(), lambda data: data[:5]],
)
def test_parameters_that_change(run, bits, change):
    parameters, optimizer = run(32, 2, dtypes=[torch.float32])
    own = [parameter.data for parameter in parameters]
    before = bits(own), bits(optimizer.state_dict())
    parameters[3].grad = None
    parameters[3].data = change(own[3])
    parameters[3].grad_dtype = None
    parameters[3].grad = torch.ones_like(parameters[3])
    with pytest.raises(ValueError, match="parameter 3 is .* now and was .* on cuda:0"):
        optimizer.step()
    assert (bits(own), bits(optimizer.state_dict())) == before


def test_parameters_on_two_devices():
    parameters = [torch.nn.Parameter(torch.ones(3, device=d)) for d in ("cpu", "cuda")]
    with pytest.raises(ValueError, match="make one optimizer for each device"):
        PagedAdamW(parameters)
