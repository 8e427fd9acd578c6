"""PagedAdamW against torch.optim.AdamW, to the bit."""

import pytest
import torch

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice

PAGE = 16384  # one program


def compare(ours, theirs, optimizer, reference, bits):
    assert bits(ours) == bits(theirs)
    assert bits(optimizer.state_dict()["state"]) == bits(
        reference.state_dict()["state"]
    )


@pytest.mark.parametrize("page_bytes", [PAGE, 3 * PAGE, 2**24])
def test_100_steps_are_those_of_torch(
    make_parameters, edge_shapes, take_steps, bits, page_bytes
):
    ours, theirs = make_parameters(edge_shapes), make_parameters(edge_shapes)
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
    optimizer = PagedAdamW(ours, **options, page_bytes=page_bytes)
    reference = torch.optim.AdamW(theirs, **options, foreach=False)
    for both in ((optimizer, ours), (reference, theirs)):
        take_steps(*both, steps=range(100))
    compare(ours, theirs, optimizer, reference, bits)


def test_the_defaults_are_those_of_torch(make_parameters):
    parameters = make_parameters([(3,)])
    defaults = torch.optim.AdamW(parameters).defaults
    assert PagedAdamW(parameters).defaults.items() <= defaults.items()


def test_groups_have_options_of_their_own(
    make_parameters, edge_shapes, take_steps, bits
):
    def groups(parameters):
        return [
            {"params": parameters[:2], "lr": 0.1, "weight_decay": 0},
            {"params": []},
            {"params": parameters[2:5], "betas": (0.5, 0.6), "weight_decay": 0.3},
            {"params": parameters[5:], "eps": 0.1, "lr": 0.0},
        ]

    ours, theirs = make_parameters(edge_shapes), make_parameters(edge_shapes)
    optimizer = PagedAdamW(groups(ours), page_bytes=PAGE)
    reference = torch.optim.AdamW(groups(theirs), foreach=False)
    for both in ((optimizer, ours), (reference, theirs)):
        take_steps(*both, steps=range(20))
    compare(ours, theirs, optimizer, reference, bits)


def test_parameters_without_a_gradient_rest(
    make_parameters, edge_shapes, take_steps, bits
):
    ours, theirs = make_parameters(edge_shapes), make_parameters(edge_shapes)
    optimizer = PagedAdamW(ours, page_bytes=PAGE)
    reference = torch.optim.AdamW(theirs, foreach=False)
    # The last one never has a gradient, and nobody has one in step 3.
    missing = {(step, 7) for step in range(20)} | {(3, number) for number in range(8)}
    missing |= {(step, step % 7) for step in range(20)} | {(0, 3), (0, 4), (1, 4)}
    for both in ((optimizer, ours), (reference, theirs)):
        take_steps(*both, steps=range(20), missing=missing)
    compare(ours, theirs, optimizer, reference, bits)
    assert 7 not in optimizer.state_dict()["state"]


@pytest.mark.parametrize("device", [None, SimulatedDevice(10**6)])
def test_strides_make_no_difference(make_parameters, make_optimizer, bits, device):
    """Parameters and gradients that are transposed, sliced and repeated."""

    def parameters():
        wide, tall, last = make_parameters([(70, 60), (50, 90), (4000,)])
        weight = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return [
            torch.nn.Parameter(wide.detach().t()),
            torch.nn.Parameter(tall.detach()[::2, 1::3]),
            torch.nn.Parameter(last.detach()[1:]),  # not at an even address
            torch.nn.Parameter(weight.to(memory_format=torch.channels_last)),
        ]

    ours, theirs = parameters(), parameters()
    strides = [parameter.stride() for parameter in ours]
    optimizer = make_optimizer(ours, pages=None if device is None else 2, device=device)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, foreach=False)
    for step in range(20):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            source = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(mine.shape[::-1], generator=source)
            if step % 3 == 0:
                gradient = gradient[..., :1].expand(mine.shape[::-1])
            mine.grad = gradient.permute(*range(mine.dim())[::-1])
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    compare(ours, theirs, optimizer, reference, bits)
    assert [parameter.stride() for parameter in ours] == strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_rounded_once_a_step(
    make_parameters, edge_shapes, take_steps, dtype
):
    ours, theirs = make_parameters(edge_shapes, [dtype]), make_parameters(edge_shapes)
    for mine, other in zip(ours, theirs, strict=True):
        other.data = mine.detach().float()
    optimizer = PagedAdamW(ours, page_bytes=PAGE)
    reference = torch.optim.AdamW(theirs, foreach=False)
    for step in range(20):
        take_steps(optimizer, ours, steps=[step])
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.float()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            other.data = other.detach().to(dtype).float()
            assert torch.equal(mine.float(), other)
    for number, saved in optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert saved[name].dtype == torch.float32
            assert torch.equal(saved[name], reference.state[theirs[number]][name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_what_is_not_finite_goes_into_the_parameter(make_optimizer, value, state_bits):
    parameter = torch.nn.Parameter(torch.ones(3000))
    optimizer = make_optimizer([parameter], state_bits)
    for _ in range(3):
        parameter.grad = torch.ones(3000)
        parameter.grad[700] = value
        optimizer.step()
    lost = torch.arange(3000) == 700
    if state_bits == 8:
        lost = torch.arange(3000) // 256 == 700 // 256
    assert torch.equal(parameter.isnan(), lost)
