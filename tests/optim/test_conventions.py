"""What holds for every torch optimizer holds for this one."""

import copy
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice

SHAPES = [(3000,), (40, 70), ()]


class Pair:
    """The same model twice, with this optimizer and with torch's."""

    def __init__(self, make_parameters, bits, **options):
        self.bits = bits
        self.ours, self.theirs = make_parameters(SHAPES), make_parameters(SHAPES)
        device = SimulatedDevice(10**6)
        budget = {"page_bytes": 16384, "device_budget": 2 * 16384}
        self.optimizer = PagedAdamW(self.ours, **options, **budget, device=device)
        self.reference = torch.optim.AdamW(self.theirs, **options, foreach=False)

    def __iter__(self):
        yield self.optimizer, self.ours
        yield self.reference, self.theirs

    def check(self):
        assert self.bits(self.ours) == self.bits(self.theirs)
        ours, theirs = self.optimizer.state_dict(), self.reference.state_dict()
        assert self.bits(ours["state"]) == self.bits(theirs["state"])


@pytest.fixture
def pair(make_parameters, bits):
    return Pair(make_parameters, bits, lr=0.01)


def square_loss(parameters):
    return sum((parameter * (parameter - 1)).sum() for parameter in parameters)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=4),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    ],
)
def test_schedulers(pair, take_steps, schedule):
    rates = []
    for optimizer, parameters in pair:
        scheduler = schedule(optimizer)
        for step in range(15):
            take_steps(optimizer, parameters, steps=[step])
            scheduler.step()
        rates.append((scheduler.get_last_lr(), optimizer.param_groups[0]["betas"]))
    assert rates[0] == rates[1]
    pair.check()


def test_closures(pair):
    for optimizer, parameters in pair:

        def closure(optimizer=optimizer, parameters=parameters):
            optimizer.zero_grad()
            loss = square_loss(parameters)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    pair.check()


def test_gradients_are_cleared(pair, take_steps):
    take_steps(pair.optimizer, pair.ours)
    pair.optimizer.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in pair.ours)
    pair.optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in pair.ours)
    before = pair.bits(pair.ours)
    pair.optimizer.step()
    assert pair.bits(pair.ours) == before
    assert pair.optimizer.state_dict()["state"][0]["step"] == 5


def test_a_grad_scaler_skips_what_overflowed(pair, take_steps):
    scales = []
    for optimizer, parameters in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for step in range(8):
            optimizer.zero_grad()
            loss = square_loss(parameters)
            scaler.scale(loss).backward()
            if step == 4:
                parameters[0].grad[7] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] != 2.0**10
    pair.check()
    assert pair.optimizer.state_dict()["state"][0]["step"] == 7


def test_step_hooks(pair, take_steps):
    calls = []
    for optimizer, parameters in pair:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        take_steps(optimizer, parameters, steps=range(2))
    assert calls == ["before", "after"] * 4
    pair.check()


@pytest.mark.parametrize("state_bits", [32, 8])
def test_groups_may_come_later(make_parameters, take_steps, bits, state_bits):
    dtypes = [torch.float32, torch.bfloat16, torch.float32]

    def run(make, **options):
        parameters = make_parameters(SHAPES, dtypes)
        optimizer = make(parameters[:1], lr=0.01, **options)
        take_steps(optimizer, parameters[:1], steps=range(3))
        optimizer.add_param_group({"params": parameters[1], "lr": 0.1})
        take_steps(optimizer, parameters[:2], steps=range(3, 6))
        optimizer.add_param_group({"params": parameters[2:], "weight_decay": 0.0})
        take_steps(optimizer, parameters, steps=range(6, 9))
        return parameters, optimizer

    plain = run(PagedAdamW, state_bits=state_bits)
    budget = {"page_bytes": 16384, "device": SimulatedDevice(10**6)}
    moved = run(PagedAdamW, state_bits=state_bits, device_budget=6 * 16384, **budget)
    assert bits(moved[0]) == bits(plain[0])
    state = moved[1].state_dict()["state"]
    assert bits(state) == bits(plain[1].state_dict()["state"])
    assert [int(state[number]["step"]) for number in range(3)] == [9, 6, 3]
    if state_bits == 32:
        parameters, reference = run(torch.optim.AdamW, foreach=False)
        for number in (0, 2):
            assert bits(parameters[number]) == bits(plain[0][number])
            expected = reference.state_dict()["state"][number]
            assert bits(state[number]) == bits(expected)


def test_named_parameters(make_parameters, take_steps, bits):
    parameters = make_parameters(SHAPES)
    names = ["a", "b", "c"]
    optimizer = PagedAdamW(zip(names, parameters, strict=True))
    take_steps(optimizer, parameters)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == names
    optimizer.load_state_dict(saved)
    assert bits(optimizer.state_dict()) == bits(saved)


def test_a_graph_is_not_built(pair):
    for optimizer, parameters in pair:
        square_loss(parameters).backward()
        optimizer.step()
        for parameter in parameters:
            assert parameter.is_leaf and parameter.requires_grad
    pair.check()


def test_versions_count_the_update(pair):
    # Autograd notices that a parameter was changed between forward and backward.
    for optimizer, parameters in pair:
        loss = square_loss(parameters)
        take = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, take, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_it_cannot_be_copied(pair, take_steps, duplicate):
    take_steps(pair.optimizer, pair.ours)
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        duplicate(pair.optimizer)


def test_it_is_printed_with_its_options(pair):
    assert "lr: 0.01" in repr(pair.optimizer)
