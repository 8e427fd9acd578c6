"""What is refused, and that nothing is lost by it."""

import pytest
import torch
from torch import nn

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice

SHAPES = [(3000,), (40, 70), ()]


@pytest.fixture(params=[32, 8])
def trained(request, make_parameters, take_steps):
    parameters = make_parameters(SHAPES)
    optimizer = PagedAdamW(
        parameters,
        state_bits=request.param,
        page_bytes=16384,
        device=SimulatedDevice(10**6),
        device_budget=6 * 16384,
    )
    take_steps(optimizer, parameters)
    return parameters, optimizer


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"lr": torch.nan}, "lr must be at least 0, got nan"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        (
            {"betas": (1.0, 0.9)},
            r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)",
        ),
        ({"betas": (0.9,)}, "betas must be two"),
        ({"betas": (0.9, -0.1)}, "betas must be two"),
        ({"state_bits": 16}, "state_bits must be 32 or 8, got 16"),
        ({"state_bits": 4}, "state_bits must be 32 or 8"),
        ({"page_bytes": 16383}, "page_bytes must be at least 16384, got 16383"),
        ({"page_bytes": 0}, "page_bytes must be at least 16384"),
        ({"page_bytes": 4159, "state_bits": 8}, "page_bytes must be at least 4160"),
        # The page is as small as the state: two programs.
        ({"device_budget": 32767}, "at least one page, 32768 bytes, got 32767"),
        ({"device_budget": 8319, "state_bits": 8}, "at least one page, 8320 bytes"),
        ({"device_budget": 0}, "at least one page"),
        ({"device_budget": -1}, "at least one page"),
    ],
)
def test_options_out_of_range(make_parameters, options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(make_parameters([(3000,)]), **options)


def test_a_budget_that_is_no_whole_number(make_parameters):
    with pytest.raises(TypeError, match=r"whole number of bytes, got 8000000000.0"):
        PagedAdamW(make_parameters(SHAPES), device_budget=8e9)


def test_a_page_that_is_no_whole_number(make_parameters):
    with pytest.raises(TypeError, match=r"page_bytes must be a whole .* got 1000000.0"):
        PagedAdamW(make_parameters(SHAPES), page_bytes=1e6)


@pytest.mark.parametrize("device", ["cuda", torch.device("cpu"), 0])
def test_a_device_that_pages_cannot_move_to(make_parameters, device):
    with pytest.raises(TypeError, match="a SimulatedDevice, got .*leave it out"):
        PagedAdamW(make_parameters(SHAPES), device=device)


def test_a_simulated_device_is_for_parameters_on_the_cpu():
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="SimulatedDevice, and .* on meta: leave"):
        PagedAdamW([elsewhere], device=SimulatedDevice(10**6))


# Parameters


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        PagedAdamW([])


@pytest.mark.parametrize("parameters", [[], [torch.nn.Parameter(torch.empty(0))]])
def test_groups_of_nothing_take_steps(parameters, take_steps):
    optimizer = PagedAdamW([{"params": parameters}])
    take_steps(optimizer, parameters)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert len(optimizer.state_dict()["state"]) == len(parameters)


def test_parameters_of_no_numbers_need_no_room(take_steps):
    nothing = torch.nn.Parameter(torch.empty(0))
    optimizer = PagedAdamW([nothing], device=SimulatedDevice(0))
    take_steps(optimizer, [nothing])
    assert optimizer.state_dict()["state"][0]["step"] == 5


class Wrapper(torch.Tensor):
    """As a DTensor: it has a shape, and its numbers lie in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(function)


def test_parameters_whose_numbers_lie_elsewhere(trained, take_steps, bits):
    wrapped = torch.nn.Parameter(Wrapper(torch.ones(3)))
    message = "parameter {} is a Wrapper, whose numbers lie in other tensors: give"
    with pytest.raises(TypeError, match=message.format(0)):
        PagedAdamW([wrapped])
    with pytest.raises(TypeError, match=message.format(3)):
        add(trained, bits, wrapped)
    # Sharding puts them into the groups of an optimizer that there is already.
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([plain])
    wrapped.grad = Wrapper(torch.ones(3))
    optimizer.param_groups[0]["params"][0] = wrapped
    with pytest.raises(TypeError, match=message.format(0)):
        optimizer.step()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.float64), r"\[3\] torch.float64.*takes dense"),
        (torch.ones(3, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(3, dtype=torch.int64), "torch.int64"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_parameters_of_other_types(trained, take_steps, bits, tensor, message):
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(TypeError, match=f"parameter 0 is {message}|{message}"):
        PagedAdamW([parameter])
    with pytest.raises(TypeError, match="parameter 3 is"):
        add(trained, bits, parameter)


def test_parameters_on_two_devices(trained, bits):
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="on meta and others are on cpu: make one"):
        PagedAdamW([torch.nn.Parameter(torch.ones(3)), elsewhere])
    with pytest.raises(ValueError, match="parameter 3 is on meta"):
        add(trained, bits, elsewhere)


def add(trained, bits, parameter):
    """Add a group, which fails, and check that nothing has changed."""
    _, optimizer = trained
    before, share = bits(optimizer.state_dict()), optimizer.resident_share
    try:
        optimizer.add_param_group({"params": [parameter]})
    finally:
        assert bits(optimizer.state_dict()) == before
        assert optimizer.resident_share == share
        assert len(optimizer.param_groups) == 1


def test_a_group_whose_pages_are_larger_than_the_budget(make_parameters, take_steps):
    small, large = make_parameters([(100,), (9000,)])
    optimizer = PagedAdamW([small], device_budget=16384, device=SimulatedDevice(10**6))
    take_steps(optimizer, [small])
    with pytest.raises(ValueError, match="at least one page, 98304 bytes, got 16384"):
        optimizer.add_param_group({"params": [large]})
    take_steps(optimizer, [small])
    assert optimizer.minimum_budget == 16384
    assert optimizer.state_dict()["state"][0]["step"] == 10


def test_a_group_that_there_is_no_host_memory_for(make_parameters, take_steps, bits):
    class Poor(SimulatedDevice):
        def host_memory(self, size):
            if size > 10**5:
                raise RuntimeError("not enough memory")
            return super().host_memory(size)

    parameters, plain = make_parameters(SHAPES[:1]), make_parameters(SHAPES[:1])
    optimizer, expected = PagedAdamW(parameters, device=Poor(10**6)), PagedAdamW(plain)
    take_steps(optimizer, parameters)
    with pytest.raises(RuntimeError, match="not enough memory"):
        optimizer.add_param_group({"params": make_parameters([(40000,)])})
    assert len(optimizer.param_groups) == 1
    take_steps(optimizer, parameters)
    for _ in range(2):
        take_steps(expected, plain)
    assert bits(parameters) == bits(plain)
    assert bits(optimizer.state_dict()) == bits(expected.state_dict())


# In a step


def refuse(trained, take_steps, bits, spoil, error, message):
    """Check that a step fails and changes nothing, and the next one is as ever."""
    parameters, optimizer = trained
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    own, spoiled = parameters[1].data, parameters[1]
    before = bits(parameters), bits(optimizer.state_dict())
    spoil(spoiled)
    with pytest.raises(error, match=message):
        optimizer.step()
    spoiled.grad, spoiled.grad_dtype = None, torch.float32
    spoiled.data = own
    assert (bits(parameters), bits(optimizer.state_dict())) == before
    take_steps(optimizer, parameters, steps=[5])
    assert optimizer.state_dict()["state"][1]["step"] == 6


@pytest.mark.parametrize(
    ("data", "now"),
    [
        (torch.ones(40, 70, dtype=torch.bfloat16), r"\[40, 70\] torch.bfloat16 on cpu"),
        (torch.ones(40, 70, dtype=torch.float64), "torch.float64"),
        (torch.ones(70, 40), r"\[70, 40\] torch.float32"),
        (torch.ones(2), r"\[2\] torch.float32"),
    ],
)
def test_parameters_that_change(trained, take_steps, bits, data, now):
    def spoil(parameter):
        parameter.grad, parameter.grad_dtype = None, data.dtype
        parameter.data = data
        parameter.grad = torch.ones_like(data)

    message = (
        rf"parameter 1 is .*{now}.* now and was \[40, 70\] torch.float32 on cpu"
        ".*make the optimizer"
    )
    refuse(trained, take_steps, bits, spoil, ValueError, message)


@pytest.mark.parametrize("by", [-1, 1])
def test_groups_that_are_edited(trained, take_steps, bits, by):
    parameters, optimizer = trained
    before = bits(parameters), bits(optimizer.state_dict())
    own = optimizer.param_groups[0]["params"]
    changed = own[:-1] if by < 0 else [*own, nn.Parameter(torch.ones(3))]
    optimizer.param_groups[0]["params"] = changed
    with pytest.raises(ValueError, match=f"has {3 + by} parameters, .* was given 3: "):
        take_steps(optimizer, changed)
    optimizer.param_groups[0]["params"] = own
    assert (bits(parameters), bits(optimizer.state_dict())) == before
    take_steps(optimizer, parameters)


def test_sparse_gradients(trained, take_steps, bits):
    def spoil(parameter):
        parameter.grad = torch.ones_like(parameter).to_sparse()

    message = r"gradient of parameter 1, \[40, 70\], is torch.sparse_coo.*sparse=False"
    refuse(trained, take_steps, bits, spoil, TypeError, message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_gradients_of_other_types(trained, take_steps, bits, dtype):
    def spoil(parameter):
        parameter.grad, parameter.grad_dtype = None, dtype
        parameter.grad = torch.ones(parameter.shape, dtype=dtype)

    message = f"gradient of parameter 1 is {dtype}.*parameter torch.float32"
    refuse(trained, take_steps, bits, spoil, TypeError, message)


def test_an_embedding_with_sparse_gradients(bits):
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = PagedAdamW(embedding.parameters())
    before = bits([*embedding.parameters()])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"nn.Embedding\(sparse=False\)"):
        optimizer.step()
    assert bits([*embedding.parameters()]) == before
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"maximize": True}, "maximize=True"),
        ({"amsgrad": True}, "amsgrad=True"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
    ],
)
def test_options_of_a_group_are_checked(option, message):
    trained = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        PagedAdamW([{"params": [trained], **option}])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with dupl")
def test_a_parameter_twice_is_refused():
    trained = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="params has a parameter twice"):
        PagedAdamW([trained, trained])
