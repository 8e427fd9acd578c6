"""State that is saved and loaded: by this optimizer and by torch's, to the bit."""

import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from qlora_lib import PagedAdamW

SCRIPT = Path(__file__).with_name("resumed_updates.py")
SHAPES = [(0,), (), (5000,), (64, 33)]
DTYPES = [torch.float32, torch.bfloat16]
KEYS = {
    32: {"step", "exp_avg", "exp_avg_sq"},
    8: {
        "step",
        *(
            f"{m}_{array}"
            for m in ("exp_avg", "exp_avg_sq")
            for array in ("codes", "scales")
        ),
    },
}


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=[32, 8])
def trained(request, make_parameters, make_simulated, take_steps):
    parameters = make_parameters(SHAPES, DTYPES)
    optimizer = make_simulated(parameters, request.param)
    take_steps(optimizer, parameters)
    return parameters, optimizer


# The form


def test_the_arrays_have_their_names_types_and_shapes(trained):
    _, optimizer = trained
    state_dict = optimizer.state_dict()
    assert sorted(state_dict["state"]) == [0, 1, 2, 3]
    for number, state in state_dict["state"].items():
        assert set(state) == KEYS[optimizer.state_bits]
        count = torch.Size(SHAPES[number]).numel()
        for name, array in state.items():
            if name == "step":
                assert array.shape == () and array.dtype == torch.float32
                assert array == 5
            elif name.endswith("scales"):
                assert array.shape == (-(-count // 256),)
                assert array.dtype == torch.float32
            else:
                is_code = name.endswith("codes")
                assert array.shape == SHAPES[number]
                assert array.dtype == (torch.uint8 if is_code else torch.float32)
    [group] = state_dict["param_groups"]
    assert group["params"] == [0, 1, 2, 3] and group["lr"] == 0.01


def test_what_is_returned_is_a_copy(trained, take_steps, bits):
    parameters, optimizer = trained
    state_dict = optimizer.state_dict()
    before = bits(state_dict)
    take_steps(optimizer, parameters)
    assert bits(state_dict) == before
    now = bits(optimizer.state_dict())
    assert now != before
    for state in state_dict["state"].values():
        for array in state.values():
            array.zero_()
    assert bits(optimizer.state_dict()) == now


def test_a_new_optimizer_has_no_state(make_parameters, make_simulated, bits):
    optimizer = make_simulated(make_parameters(SHAPES))
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("kept", [set(), {2}])
def test_what_is_not_loaded_begins_anew(
    trained, make_parameters, make_simulated, take_steps, bits, kept
):
    parameters, optimizer = trained
    saved = optimizer.state_dict()
    saved["state"] = {number: saved["state"][number] for number in kept}
    fresh = make_parameters(SHAPES, DTYPES)
    for mine, other in zip(fresh, parameters, strict=True):
        mine.data.copy_(other)
    expected = make_simulated(fresh, optimizer.state_bits)
    for each, own in ((optimizer, parameters), (expected, fresh)):
        each.load_state_dict(saved)
        assert set(each.state_dict()["state"]) == kept
        take_steps(each, own)
    assert bits(fresh) == bits(parameters)
    assert bits(expected.state_dict()) == bits(optimizer.state_dict())


# There and back


@pytest.mark.parametrize("pages", [1, 6, 1000])
def test_a_loaded_optimizer_goes_on_as_the_saved_one(
    trained, make_parameters, make_simulated, take_steps, bits, pages
):
    parameters, optimizer = trained
    others = make_parameters(SHAPES, DTYPES)
    for mine, other in zip(others, parameters, strict=True):
        mine.data.copy_(other)
    loaded = make_simulated(others, optimizer.state_bits, pages)
    take_steps(loaded, others, steps=[77])  # what was there is replaced
    for mine, other in zip(others, parameters, strict=True):
        mine.data.copy_(other)
    saved = through_a_file(optimizer.state_dict())
    loaded.load_state_dict(saved)
    assert bits(loaded.state_dict()) == bits(optimizer.state_dict()) == bits(saved)
    for both in ((loaded, others), (optimizer, parameters)):
        take_steps(*both, steps=range(5, 9))
    assert bits(others) == bits(parameters)
    assert bits(loaded.state_dict()) == bits(optimizer.state_dict())


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_new_process_goes_on_to_the_bit(tmp_path, capsys, state_bits):
    def run_here(file, *words):
        runpy.run_path(str(SCRIPT))["main"](str(tmp_path / file), *words)
        return capsys.readouterr().out

    bits = str(state_bits)
    whole = run_here("whole", bits, "5", "0", "6")
    part = run_here("parts", bits, "1", "0", "3")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "parts"), bits, "100"]
    done = subprocess.run(
        [*command, "3", "6"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole != part


def test_torch_goes_on_and_comes_back(make_parameters, take_steps, bits):
    ours, theirs = make_parameters(SHAPES), make_parameters(SHAPES)
    optimizer = PagedAdamW(ours, lr=0.01, page_bytes=16384)
    reference = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for both in ((optimizer, ours), (reference, theirs)):
        take_steps(*both)
    saved, other = optimizer.state_dict(), through_a_file(reference.state_dict())
    assert bits(saved["state"]) == bits(other["state"])
    # They change places.
    reference.load_state_dict(through_a_file(saved))
    optimizer.load_state_dict(other)
    for both in ((optimizer, ours), (reference, theirs)):
        take_steps(*both, steps=range(5, 10))
    assert bits(ours) == bits(theirs)
    saved = optimizer.state_dict()
    assert bits(saved["state"]) == bits(reference.state_dict()["state"])
    # What torch adds to the groups is kept for it.
    torch.optim.AdamW(theirs).load_state_dict(saved)
    PagedAdamW(ours).load_state_dict(saved)


def test_torch_loads_what_is_exported(trained, make_parameters, take_steps, bits):
    parameters, optimizer = trained
    before = bits(optimizer.state_dict())
    exported = through_a_file(optimizer.export_torch_state_dict())
    assert bits(optimizer.state_dict()) == before
    others = [torch.nn.Parameter(each.detach().float()) for each in parameters]
    reference = torch.optim.AdamW(others, lr=0.01)
    reference.load_state_dict(exported)
    assert set(exported["state"][2]) == KEYS[32]
    for number, saved in optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = reference.state[others[number]][name]
            assert moment.shape == SHAPES[number] and moment.dtype == torch.float32
            if optimizer.state_bits == 32:
                assert torch.equal(moment, saved[name])
                continue
            values = dynamic_values(name)[saved[f"{name}_codes"].long()].flatten()
            scales = saved[f"{name}_scales"].repeat_interleave(256)[: len(values)]
            assert torch.equal(moment.flatten(), values * scales)
    take_steps(reference, others)


def dynamic_values(name):
    from qlora_lib.numerics.codebooks import DYNAMIC8, DYNAMIC8_UNSIGNED

    return (DYNAMIC8 if name == "exp_avg" else DYNAMIC8_UNSIGNED).values


def test_moments_of_other_types_are_widened(
    make_parameters, make_simulated, take_steps
):
    # torch keeps the moments of bfloat16 parameters in bfloat16.
    theirs, ours = (make_parameters(SHAPES, DTYPES[1:]) for _ in range(2))
    reference = torch.optim.AdamW(theirs, foreach=False)
    take_steps(reference, theirs)
    optimizer = make_simulated(ours)
    optimizer.load_state_dict(reference.state_dict())
    moment = optimizer.state_dict()["state"][2]["exp_avg"]
    expected = reference.state[theirs[2]]["exp_avg"]
    assert expected.dtype == torch.bfloat16 and moment.dtype == torch.float32
    assert torch.equal(moment, expected.float())


# What others do with it


def test_hooks_see_the_moments_and_may_change_them(
    trained, make_parameters, make_simulated, bits
):
    _, optimizer = trained
    name = "exp_avg" if optimizer.state_bits == 32 else "exp_avg_codes"
    seen = []

    def after_saving(_, state_dict):
        seen.append(bits(state_dict["state"][2][name]))
        state_dict["note"] = "kept"

    optimizer.register_state_dict_post_hook(after_saving)
    saved = optimizer.state_dict()
    assert seen == [bits(saved["state"][2][name])] and saved["note"] == "kept"

    loaded = make_simulated(make_parameters(SHAPES, DTYPES), optimizer.state_bits)
    after = []

    def before_loading(_, state_dict):
        state = {**state_dict["state"]}
        state[2] = {**state[2], name: torch.ones_like(state[2][name])}
        return {**state_dict, "state": state}

    loaded.register_load_state_dict_pre_hook(before_loading)
    loaded.register_load_state_dict_post_hook(
        lambda optimizer: after.append(optimizer.state_dict()["state"][2])
    )
    loaded.load_state_dict(saved)
    assert (after[0][name] == 1).all() and after[0]["step"] == 5
    assert (loaded.state_dict()["state"][2][name] == 1).all()
    assert not (saved["state"][2][name] == 1).all()


def test_parameters_may_have_other_numbers(
    trained, make_parameters, make_simulated, bits
):
    _, optimizer = trained
    saved = optimizer.state_dict()
    names = {0: 30, 1: "b", 2: 10, 3: 0}
    renamed = {
        "state": {names[number]: saved["state"][number] for number in (3, 2, 1, 0)},
        "param_groups": [{**saved["param_groups"][0], "params": [*names.values()]}],
    }
    loaded = make_simulated(make_parameters(SHAPES, DTYPES), optimizer.state_bits)
    loaded.load_state_dict(renamed)
    assert bits(loaded.state_dict()) == bits(saved)


def test_a_distributed_checkpoint_does_not_change_training(take_steps, bits):
    # It takes a step with gradients of zero where an optimizer seems to have no state.
    model = torch.nn.Linear(3, 2)
    optimizer = PagedAdamW(model.parameters())
    take_steps(optimizer, [*model.parameters()])
    before = optimizer.state_dict()
    for action in (lambda: None, lambda: optimizer.load_state_dict(before)):
        action()
        optimizer.zero_grad()
        saved = get_optimizer_state_dict(model, optimizer)
        assert bits(optimizer.state_dict()) == bits(before)
        assert bits(saved["state"]["weight"]) == bits(before["state"][0])
