"""Linear4bit against the dense layer that holds the same, dequantized weight."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from qlora_lib import INT4, NF4, Codebook, Linear4bit, quantize
from qlora_lib.nn import quantize_linears
from qlora_lib.numerics import DYNAMIC8

LAYOUTS = [(64, False), (64, True), (32, True), (None, False)]


def make_linear(
    bias: bool = True, dtype: torch.dtype = torch.float32, width: int = 96
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 80, bias=bias, dtype=dtype)


def dense_twin(layer: Linear4bit) -> nn.Linear:
    """An nn.Linear whose weight is what the quantized layer stands for."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight.data = layer.quantized_weight.dequantize(torch.float32)
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.float()
    return twin


@pytest.mark.parametrize(("block_size", "double_quant"), LAYOUTS)
@pytest.mark.parametrize("codebook", [NF4, INT4], ids=lambda codebook: codebook.name)
def test_quantized_weight_is_what_quantize_returns(codebook, block_size, double_quant):
    linear = make_linear()
    layer = Linear4bit.from_linear(linear, codebook, block_size, double_quant)
    expected = quantize(linear.weight, codebook, block_size, double_quant)
    weight = layer.quantized_weight
    assert torch.equal(weight.packed, expected.packed)
    assert torch.equal(weight.dequantize(), expected.dequantize())
    assert weight.nbytes == expected.nbytes
    assert sum(p.nbytes for p in layer.parameters()) == expected.nbytes + 80 * 4


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 5, 96), (0, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_match_the_dense_twin(shape, bias):
    layer = Linear4bit.from_linear(make_linear(bias))
    twin = dense_twin(layer)
    x = torch.randn(shape, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    y, y_twin = layer(x), twin(x_twin)
    torch.testing.assert_close(y, y_twin, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_twin.backward(grad)
    torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-5, atol=1e-6)


def test_gradient_passes_gradcheck_in_float64():
    layer = Linear4bit.from_linear(nn.Linear(8, 4, dtype=torch.float64), block_size=8)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_non_contiguous_input():
    layer = Linear4bit.from_linear(make_linear())
    x = torch.randn(96, 7).t()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_type_of_the_input(dtype):
    layer = Linear4bit.from_linear(make_linear())
    x = torch.randn(4, 96)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=tolerance)


def test_autocast_runs_forward_and_backward():
    layer = Linear4bit.from_linear(make_linear())
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_no_parameter_trains_and_nothing_dense_is_kept_for_the_backward_pass():
    layer = Linear4bit.from_linear(make_linear(bias=False))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    y = layer(torch.randn(4, 96, requires_grad=True))
    kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert layer.weight.data_ptr() in {tensor.data_ptr() for tensor in kept}
    tables = layer.codebook.values.nbytes + layer.scales_codebook.values.nbytes
    assert (
        sum(tensor.nbytes for tensor in kept) == layer.quantized_weight.nbytes + tables
    )


def test_an_adapter_before_the_layer_gets_its_gradient():
    layer = Linear4bit.from_linear(make_linear())
    adapter = nn.Linear(96, 96, bias=False)
    x = torch.randn(4, 96)
    layer(adapter(x)).square().sum().backward()
    y = dense_twin(layer)(x @ adapter.weight.detach().T)
    expected = 2 * (y @ dense_twin(layer).weight.detach()).T @ x
    torch.testing.assert_close(adapter.weight.grad, expected)


# PyTorch 2.11 scripts a module of its own when the compiler is first imported.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
)
def test_it_compiles_to_one_graph_once(device, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    layer = Linear4bit.from_linear(make_linear()).to(device)
    x = torch.randn(4, 96, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(grad, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_can_be_exported(double_quant):
    layer = Linear4bit.from_linear(make_linear(), double_quant=double_quant)
    x = torch.randn(4, 96)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_input_must_have_as_many_numbers_as_the_weight_has_columns():
    layer = Linear4bit.from_linear(make_linear())
    with pytest.raises(ValueError, match=r"input must have 96 .* got shape \(2, 80\)"):
        layer(torch.ones(2, 80))


def test_casting_the_module_leaves_codes_and_scales_alone():
    layer = Linear4bit.from_linear(make_linear())
    before = layer.quantized_weight.dequantize(torch.float32)
    layer.half()
    assert torch.equal(layer.quantized_weight.dequantize(torch.float32), before)


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_and_deepcopy_round_trip(double_quant):
    layer = Linear4bit.from_linear(make_linear(), double_quant=double_quant)
    other = Linear4bit.from_linear(nn.Linear(96, 80), double_quant=double_quant)
    x = torch.randn(2, 96)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_source_layer_is_left_as_it_was():
    linear = make_linear()
    before = copy.deepcopy(linear.state_dict())
    layer = Linear4bit.from_linear(linear)
    layer.bias.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items())
    assert linear.weight.requires_grad


def test_repr_names_the_data_type():
    text = repr(Linear4bit.from_linear(make_linear()))
    assert "codebook=nf4" in text and "block_size=64" in text


@pytest.mark.parametrize("source", ["quantized", "conv", "tensor"])
def test_from_linear_refuses_what_is_no_dense_linear(source):
    sources = {
        "quantized": Linear4bit.from_linear(make_linear()),
        "conv": nn.Conv1d(1, 1, 1),
        "tensor": torch.ones(2, 2),
    }
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear"):
        Linear4bit.from_linear(sources[source])


def test_a_vector_is_no_weight():
    with pytest.raises(ValueError, match=r"matrix.*\(4,\)"):
        Linear4bit(quantize(torch.ones(4), NF4))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(64, 64))
    model.add_module("inner", nn.Sequential(nn.ReLU(), nn.Linear(64, 64)))
    model.add_module("lm_head", nn.Linear(64, 8))
    return model


def test_quantize_linears_replaces_all_but_the_skipped():
    model = make_model()
    assert quantize_linears(model) == ["first", "inner.1"]
    assert isinstance(model.first, Linear4bit)
    assert isinstance(model.inner[1], Linear4bit)
    assert type(model.lm_head) is nn.Linear
    assert model(torch.randn(2, 64)).shape == (2, 8)


def test_quantize_linears_changes_nothing_when_a_layer_cannot_be_quantized():
    model = make_model()
    model.inner[1].weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layer inner\.1.*nan.*index 197"):
        quantize_linears(model)
    assert type(model.first) is nn.Linear


def test_quantize_linears_twice_says_so():
    model = make_model()
    quantize_linears(model)
    with pytest.raises(
        ValueError, match=r"no nn\.Linear to replace.*quantized already"
    ):
        quantize_linears(model)


def test_a_model_that_is_itself_a_linear_layer_is_refused():
    linear = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"model .* use Linear4bit\.from_linear"):
        quantize_linears(linear)
    assert not list(linear.children())


def test_a_shared_layer_stays_shared():
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    assert quantize_linears(model) == ["0", "2"]
    assert isinstance(model[0], Linear4bit)
    assert model[2] is model[0]


def test_skip_is_no_string():
    # In a string, "in" would look for a part of it: "head" in "lm_head".
    with pytest.raises(TypeError, match=r"skip must be .* pass \('lm_head',\)"):
        quantize_linears(make_model(), skip="lm_head")


def test_quantize_linears_names_the_argument_and_the_layer():
    with pytest.raises(ValueError, match="at layer first: block_size must be"):
        quantize_linears(make_model(), block_size=0)
    with pytest.raises(TypeError, match="at layer first: codebook must be"):
        quantize_linears(make_model(), codebook="nf4")
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="at layer first: tensor is on the meta"):
        quantize_linears(model)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_input_must_be_float(dtype):
    # A weight that is cut to integers would turn every output to zero.
    layer = Linear4bit.from_linear(make_linear())
    with pytest.raises(TypeError, match=f"input must be a float tensor, got {dtype}"):
        layer(torch.ones(2, 96).to(dtype))


def test_the_constructor_points_to_from_linear():
    with pytest.raises(TypeError, match=r"weight must be .* Linear4bit\.from_linear"):
        Linear4bit(96, 80)


def test_bias_has_a_number_for_each_row():
    weight = quantize(torch.ones(4, 4), NF4)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\).*got \(1,\)"):
        Linear4bit(weight, torch.ones(1))


def test_a_weight_that_the_layer_could_not_hold_is_refused():
    weight = quantize(torch.randn(4, 512), NF4, 4, double_quant=True)
    zero = torch.zeros(())
    other_block_size = quantize(weight.scales.dequantize(), DYNAMIC8, 64)
    other_width = quantize(weight.scales.dequantize(), INT4, 256)
    for unfit in (
        replace(weight, offset=zero),
        replace(weight, scales=replace(weight.scales, offset=None)),
        replace(weight, scales=replace(other_block_size, offset=zero)),
        replace(weight, scales=replace(other_width, offset=zero)),
        replace(weight, scales=weight.scales.scales, offset=zero),
    ):
        with pytest.raises(ValueError, match="quantized otherwise than by"):
            Linear4bit(unfit)


def test_the_table_of_the_scales_is_kept():
    # A file from another processor has one that differs in its last bits.
    weight = quantize(torch.randn(64, 64), NF4, double_quant=True)
    table = Codebook("from a file", DYNAMIC8.values * (1 - 1e-6))
    weight = replace(weight, scales=replace(weight.scales, codebook=table))
    layer = Linear4bit(weight)
    assert torch.equal(layer.quantized_weight.dequantize(), weight.dequantize())


def test_scales_need_not_be_contiguous():
    weight = quantize(torch.randn(64, 64), NF4)
    strided = replace(weight, scales=weight.scales.repeat_interleave(2)[::2])
    restored = Linear4bit(strided).quantized_weight
    assert torch.equal(restored.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 3), (5, 1)])
def test_odd_shapes(in_features, out_features):
    layer = Linear4bit.from_linear(nn.Linear(in_features, out_features))
    x = torch.randn(2, in_features)
    torch.testing.assert_close(layer(x), dense_twin(layer)(x))


# What nn.Linear warns of is the case under test.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_empty_weight(in_features, out_features, double_quant):
    linear = nn.Linear(in_features, out_features)
    layer = Linear4bit.from_linear(linear, double_quant=double_quant)
    x = torch.randn(3, in_features)
    torch.testing.assert_close(layer(x), linear(x))


def test_pickle_round_trip():
    layer = Linear4bit.from_linear(make_linear())
    x = torch.randn(2, 96)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


# What the layer keeps between two calls


def weight_bits(layer):
    return layer.quantized_weight.dequantize()


def test_the_weight_is_put_together_once():
    layer = Linear4bit.from_linear(nn.Linear(128, 64))
    assert layer.quantized_weight is layer.quantized_weight


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_that_was_called_in_inference_mode_trains(double_quant):
    layer = Linear4bit.from_linear(nn.Linear(128, 64), double_quant=double_quant)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x.detach())
    output = layer(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    torch.testing.assert_close(x.grad, weight_bits(layer).sum(0).expand(3, -1))


def test_a_transform_leaves_no_wrapped_weight_behind():
    layer = Linear4bit.from_linear(nn.Linear(128, 64))
    torch.func.grad(lambda x: layer(x).sum())(torch.randn(3, 128))
    packed = layer.quantized_weight.packed
    assert not torch._C._functorch.is_functorch_wrapped_tensor(packed)


@pytest.mark.parametrize("assign", [False, True])
def test_the_weight_is_that_of_the_parameters_after_they_change(assign):
    layer, other = (Linear4bit.from_linear(nn.Linear(128, 64)) for _ in range(2))
    before = weight_bits(layer)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert not torch.equal(weight_bits(layer), before)
    assert torch.equal(weight_bits(layer), weight_bits(other))


@pytest.mark.parametrize("name", ["weight", "scales", "nested_scales", "scales_offset"])
def test_the_weight_is_that_of_a_single_parameter_that_is_replaced(name):
    layer, other = (Linear4bit.from_linear(nn.Linear(128, 64)) for _ in range(2))
    before = weight_bits(layer)
    setattr(layer, name, nn.Parameter(getattr(other, name), requires_grad=False))
    assert not torch.equal(weight_bits(layer), before)


def test_a_copy_and_a_pickled_layer_hold_the_parameters_once():
    layer = Linear4bit.from_linear(nn.Linear(128, 64))
    before = weight_bits(layer)
    size = len(pickle.dumps(layer.state_dict()))
    assert len(pickle.dumps(layer)) < 1.5 * size
    copied = copy.deepcopy(layer)
    assert copied.quantized_weight.packed.data_ptr() == copied.weight.data_ptr()
    assert torch.equal(weight_bits(copied), before)


def test_a_moved_layer_gives_the_old_memory_back():
    layer = Linear4bit.from_linear(nn.Linear(128, 64))
    old = weakref.ref(layer.quantized_weight)
    layer.to("meta")
    gc.collect()
    assert old() is None
    assert layer.quantized_weight.packed.is_meta
