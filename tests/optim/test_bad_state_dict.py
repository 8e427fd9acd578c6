"""State that cannot be loaded changes nothing."""

import pytest
import torch

SHAPES = [(0,), (), (5000,), (64, 33)]
DTYPES = [torch.float32, torch.bfloat16]


def without(name):
    return lambda saved: saved["state"][2].pop(name)


def put(name, value):
    return lambda saved: saved["state"][2].update({name: value})


def group(**options):
    return lambda saved: saved["param_groups"][0].update(options)


BAD = [
    (32, put("exp_avg", torch.zeros(4999)), r"exp_avg of parameter 2 as \[4999\]"),
    (32, put("exp_avg", torch.zeros(5000, dtype=torch.uint8)), "torch.uint8"),
    (32, put("exp_avg_sq", torch.zeros(5000, dtype=torch.cfloat)), "complex64"),
    (32, put("max_exp_avg_sq", torch.zeros(5000)), "state_bits=32"),
    (32, without("exp_avg_sq"), "for parameter 2"),
    (32, without("step"), "for parameter 2"),
    (32, group(amsgrad=True), "amsgrad=True.*torch.optim.AdamW"),
    (32, group(maximize=True), "maximize=True"),
    (32, group(betas=(1.0, 0.9)), "betas must be two numbers"),
    (32, lambda saved: saved["param_groups"][0].pop("eps"), r"lacks \['eps'\]"),
    (32, put("exp_avg", [0.0]), r"exp_avg of parameter 2 as \[1\]"),
    (32, group(params=[0, 1, 2]), "size of optimizer's group"),
    (32, lambda saved: saved["param_groups"].append({"params": []}), "groups"),
    (8, put("exp_avg_codes", torch.zeros(5000)), "expected .* torch.uint8"),
    (8, put("exp_avg_scales", torch.zeros(19)), r"as \[19\].*expected \[20\]"),
    (8, put("exp_avg_scales", torch.zeros(20).bfloat16()), "torch.bfloat16"),
    (8, without("exp_avg_codes"), "state_bits=8"),
]


@pytest.mark.parametrize(("state_bits", "spoil", "message"), BAD)
def test_what_does_not_fit_changes_nothing(
    make_parameters, make_simulated, take_steps, bits, state_bits, spoil, message
):
    parameters = make_parameters(SHAPES, DTYPES)
    optimizer = make_simulated(parameters, state_bits)
    take_steps(optimizer, parameters)
    saved = optimizer.state_dict()
    take_steps(optimizer, parameters, steps=[5])
    before = bits(optimizer.state_dict())
    spoil(saved)
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert bits(optimizer.state_dict()) == before


@pytest.mark.parametrize("state_bits", [32, 8])
def test_other_bits_are_refused_with_the_cure(
    make_parameters, make_simulated, take_steps, state_bits
):
    parameters = make_parameters(SHAPES)
    optimizer = make_simulated(parameters, state_bits)
    take_steps(optimizer, parameters)
    with pytest.raises(ValueError, match="make the optimizer as it was when it was"):
        make_simulated(parameters, {32: 8, 8: 32}[state_bits]).load_state_dict(
            optimizer.state_dict()
        )
