"""The public functions and their operators against float64 and the reference."""

import dataclasses
import importlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from qlora_lib import FP4, INT4, NF4, TOY, Codebook, QuantizedTensor, normal_float
from qlora_lib.kernels import dispatch, operators
from qlora_lib.kernels.ops import dequantize, matmul, quantize
from qlora_lib.kernels.storage import storage_of
from qlora_lib.numerics import DYNAMIC8
from qlora_lib.numerics import quantize as quantize_by_reference

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", CUDA])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = [(32, True), (64, False), (64, True), (128, True), (256, False), (None, True)]
# Those that kernels take, and other widths and tie rules, which the reference takes.
CODEBOOKS = [NF4, FP4, INT4, Codebook("upper", NF4.values, "upper"), TOY, DYNAMIC8]
CODEBOOKS += [normal_float(3)]


def by_name(codebook: Codebook) -> str:
    return codebook.name


def make_matrix(
    n: int,
    k: int,
    device: str = "cpu",
    codebook: Codebook = NF4,
    block_size: int | None = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    return quantize_by_reference(weight, codebook, block_size, double_quant).to(device)


def make_input(*shape: int, device: str = "cpu", dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def assert_product(actual, left, right, bias=0.0):
    """``actual = left right + bias``, but for the roundings of ``actual.dtype``.

    Every factor may be rounded once: such errors are independent, and their sum has
    the size of the root of the sum of squares. Then the result is rounded.
    """
    left, right = left.double(), right.double()
    expected = left @ right + bias
    spread = (left.square() @ right.square()).sqrt()
    tolerance = torch.finfo(actual.dtype).eps * (expected.abs() + 2 * spread)
    if actual.dtype == torch.float32:  # then the rounding of the sums counts as well
        tolerance *= math.sqrt(max(left.shape[-1], 1))
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert bool((error <= tolerance + 1e-30).all()), float((error / tolerance).max())


class TestMatmul:
    @EVERY_DEVICE
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("block_size", "double_quant"), LAYOUTS)
    @pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 5, 128)])
    def test_product_and_gradients(
        self, device, dtype, block_size, double_quant, shape
    ):
        q = make_matrix(80, 128, device, NF4, block_size, double_quant)
        x = make_input(*shape, device=device, dtype=dtype).requires_grad_()
        bias = make_input(80, device=device, dtype=dtype).requires_grad_()
        y = matmul(x, q, bias)
        grad = make_input(*y.shape, device=device, dtype=dtype)
        y.backward(grad)
        weight = q.dequantize(torch.float64)
        assert y.dtype == x.grad.dtype == bias.grad.dtype == dtype
        assert_product(y.detach(), x.detach(), weight.T, bias.detach().double())
        assert_product(x.grad, grad, weight)
        rows = grad.reshape(-1, 80)
        ones = torch.ones(1, len(rows), device=device)
        assert_product(bias.grad[None], ones, rows)

    @EVERY_DEVICE
    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_codebooks(self, device, codebook, double_quant):
        q = make_matrix(96, 64, device, codebook, 64, double_quant)
        x = make_input(7, 64, device=device)
        assert_product(matmul(x, q), x, q.dequantize(torch.float64).T)

    @EVERY_DEVICE
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (65, 33), (3, 257)])
    @pytest.mark.parametrize("m", [0, 1, 17, 130])
    def test_odd_sizes(self, device, m, n, k):
        q = make_matrix(n, k, device)
        x = make_input(m, k, device=device).requires_grad_()
        y = matmul(x, q)
        assert_product(y.detach(), x.detach(), q.dequantize(torch.float64).T)
        grad = make_input(m, n, device=device)
        y.backward(grad)
        assert_product(x.grad, grad, q.dequantize(torch.float64))

    @EVERY_DEVICE
    @pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (0, 0)])
    @pytest.mark.parametrize("shape", [(), (3,), (0, 2)])
    def test_empty_sizes(self, device, n, k, shape):
        q = make_matrix(n, k, device)
        x = torch.ones(*shape, k, device=device, requires_grad=True)
        bias = torch.arange(float(n), device=device)
        y = matmul(x, q, bias)
        assert torch.equal(y, bias.expand(*shape, n))
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))

    @EVERY_DEVICE
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_input_and_gradient_need_not_be_contiguous(self, device, dtype):
        q = make_matrix(80, 96, device)
        x = make_input(96, 4, 6, device=device, dtype=dtype).permute(2, 1, 0)
        grad = make_input(80, 4, 6, device=device, dtype=dtype).permute(2, 1, 0)
        x.requires_grad_()
        y = matmul(x, q)
        y.backward(grad)
        assert y.is_contiguous()
        assert_product(y.detach(), x.detach(), q.dequantize(torch.float64).T)
        assert_product(x.grad, grad, q.dequantize(torch.float64))

    @EVERY_DEVICE
    def test_codes_and_scales_need_not_be_contiguous(self, device):
        q = make_matrix(80, 96, device, double_quant=False)
        strided = dataclasses.replace(
            q,
            packed=q.packed.repeat_interleave(2)[::2],
            scales=q.scales.repeat_interleave(2)[::2],
        )
        x = make_input(3, 96, device=device)
        assert torch.equal(matmul(x, strided), matmul(x, q))

    @pytest.mark.parametrize("unusual", ["block size", "no offset", "nested twice"])
    def test_scales_that_are_quantized_in_an_unusual_way(self, unusual):
        q = make_matrix(64, 96, double_quant=False)
        scales = {
            "block size": quantize_by_reference(q.scales, DYNAMIC8, 64),
            "no offset": quantize_by_reference(q.scales, DYNAMIC8, 256),
            "nested twice": quantize_by_reference(q.scales, DYNAMIC8, 256, True),
        }
        q = dataclasses.replace(q, scales=scales[unusual])
        x = make_input(3, 96)
        assert_product(matmul(x, q), x, q.dequantize(torch.float64).T)
        assert torch.equal(dequantize(q), q.dequantize())

    @EVERY_DEVICE
    def test_bias_of_another_type(self, device):
        q = make_matrix(80, 96, device)
        x = make_input(3, 96, device=device, dtype=torch.bfloat16)
        bias = make_input(80, device=device).requires_grad_()
        y = matmul(x, q, bias)
        assert torch.equal(y, matmul(x, q, bias.bfloat16()))
        y.sum().backward()
        assert torch.equal(bias.grad, torch.full((80,), 3.0, device=device))

    def test_nothing_is_computed_for_an_input_that_needs_no_gradient(self):
        bias = torch.zeros(80, requires_grad=True)
        x = make_input(3, 96)
        matmul(x, make_matrix(80, 96), bias).sum().backward()
        assert x.grad is None
        assert torch.equal(bias.grad, torch.full((80,), 3.0))

    @EVERY_DEVICE
    def test_first_and_second_derivatives_in_float64(self, device):
        q = make_matrix(5, 8, device, block_size=8)
        x = make_input(3, 8, device=device, dtype=torch.float64).requires_grad_()
        bias = make_input(5, device=device, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *args: matmul(args[0], q, args[1]), (x, bias)
        )

        def cubed(x: torch.Tensor) -> torch.Tensor:
            return matmul(x, q) ** 3

        assert torch.autograd.gradgradcheck(cubed, x)

    @EVERY_DEVICE
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_nothing_dense_is_kept_for_the_backward_pass(self, device, double_quant):
        q = make_matrix(128, 256, device, double_quant=double_quant)
        x = make_input(3, 256, device=device).requires_grad_()
        kept: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            matmul(x, q)
        assert q.packed.data_ptr() in {tensor.data_ptr() for tensor in kept}
        tables = 4 * 16 + 4 * 256 * double_quant
        assert sum(tensor.nbytes for tensor in kept) == q.nbytes + tables

    @EVERY_DEVICE
    def test_after_inference_mode_it_still_trains(self, device):
        codebook = Codebook("new", NF4.values)
        q = make_matrix(80, 96, device, codebook, double_quant=False)
        x = make_input(3, 96, device=device).requires_grad_()
        with torch.inference_mode():
            matmul(x, q)
        matmul(x, q).sum().backward()
        assert x.grad is not None

    @EVERY_DEVICE
    def test_autocast(self, device):
        q = make_matrix(80, 96, device)
        x = make_input(3, 96, device=device).requires_grad_()
        bias = make_input(80, device=device)
        with torch.autocast(device, torch.bfloat16):
            y = matmul(x, q, bias)
            assert matmul(x.double(), q).dtype == torch.float64
        assert torch.equal(y, matmul(x.bfloat16(), q, bias))
        y.sum().backward()
        assert x.grad.dtype == torch.float32

    def test_a_way_for_every_number_of_rows(self):
        for crossovers in (dispatch.CROSSOVERS, dispatch.GRADIENT_CROSSOVERS):
            limits = [(rows, weights) for rows, weights, _ in crossovers]
            rows = [limit for limit, _ in limits]
            assert rows == sorted(rows) and len(set(limits)) == len(limits)
            # Every line is the first for something: where the one before it ends.
            for i, (limit, weights) in enumerate(limits):
                before = [limit for limit, weights in limits[:i] if weights == math.inf]
                assert limit > max(before, default=0) and weights > 0
            assert limits[-1] == (math.inf, math.inf)

    @pytest.mark.parametrize(
        ("m", "n", "has_kernel", "way"),
        [
            (1, 4, True, "few"),
            (4, 2**20, True, "few"),
            (5, 8, True, "few too"),
            (5, 9, True, "many"),
            (9, 4, True, "many"),
            (0, 4, True, "many"),  # there is nothing to launch
            (4, 0, True, "many"),
            (1, 4, False, "many"),
        ],
    )
    def test_rows_and_weights_choose_the_way(self, monkeypatch, m, n, has_kernel, way):
        monkeypatch.setattr(dispatch, "has_kernel", lambda *_: has_kernel)
        monkeypatch.setattr(dispatch, "_runs_matmuls", lambda _: True)
        crossovers = (
            (4, math.inf, "few"),
            (8, 8 * 128, "few too"),
            (math.inf, math.inf, "many"),
        )
        storage = storage_of(make_matrix(4, 128))
        chosen = dispatch._choose(crossovers, m, n, 128, torch.float16, storage)
        assert chosen == way

    @pytest.mark.parametrize(
        ("k", "block_size", "dtype"),
        [
            (192, 64, torch.float16),  # half a chunk is left
            (128, 256, torch.float16),  # a block is two rows
            (256, 64, torch.float32),
        ],
    )
    def test_what_the_kernels_do_not_take(self, monkeypatch, k, block_size, dtype):
        monkeypatch.setattr(dispatch, "has_kernel", lambda *_: True)
        monkeypatch.setattr(dispatch, "_runs_matmuls", lambda _: True)
        crossovers = ((math.inf, math.inf, "kernel"), (math.inf, math.inf, "any"))
        storage = storage_of(make_matrix(4, k, block_size=block_size))
        assert dispatch._choose(crossovers, 1, 4, k, dtype, storage) == "any"
        taken = dispatch._choose(crossovers, 1, 4, 256, torch.float16, storage)
        assert taken == "kernel"


# PyTorch's first use of forward mode scripts its own formulas.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
class TestTransforms:
    """torch.func and forward mode, of which the operators know nothing."""

    q = make_matrix(5, 8, block_size=8)
    weight = q.dequantize(torch.float64)
    x = make_input(3, 8, dtype=torch.float64)

    def test_grad(self):
        grad = torch.func.grad(lambda x: matmul(x, self.q).square().sum())(self.x)
        expected = 2 * self.x @ self.weight.T @ self.weight
        torch.testing.assert_close(grad, expected)

    def test_vmap(self):
        y = torch.func.vmap(lambda x: matmul(x, self.q))(self.x)
        torch.testing.assert_close(y, self.x @ self.weight.T)

    def test_jacobian(self):
        jacobian = torch.func.jacrev(lambda x: matmul(x, self.q))(self.x[0])
        torch.testing.assert_close(jacobian, self.weight)

    def test_jvp(self):
        _, tangent = torch.func.jvp(lambda x: matmul(x, self.q), (self.x,), (self.x,))
        torch.testing.assert_close(tangent, self.x @ self.weight.T)

    def test_forward_mode(self):
        with forward_ad.dual_level():
            y = matmul(forward_ad.make_dual(self.x, self.x), self.q)
            tangent = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(tangent, self.x @ self.weight.T)


# PyTorch scripts methods of its own when its compiler is first imported.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
class TestCompile:
    @EVERY_DEVICE
    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
    )
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_one_graph_that_trains_and_is_compiled_once(
        self, device, backend, double_quant
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        q = make_matrix(80, 128, device, double_quant=double_quant)
        bias = make_input(80, device=device).requires_grad_()
        x = make_input(3, 128, device=device).requires_grad_()

        def loss(x: torch.Tensor) -> torch.Tensor:
            return matmul(x.sin(), q, bias).square().sum()

        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        matmul(x, q)  # makes the tables of the codebooks on this device
        expected = torch.autograd.grad(loss(x), (x, bias))
        for _ in range(3):
            result = torch.autograd.grad(compiled(x), (x, bias))
            # inductor has a sine of its own
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1

    def test_a_codebook_that_is_new_to_the_device_costs_one_compilation_more(self):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        codebook = Codebook("new", NF4.values)
        q = make_matrix(80, 128, "cpu", codebook, double_quant=False).to("meta")
        compiled = torch.compile(
            lambda x: matmul(x, q), backend=counter, fullgraph=True
        )
        for _ in range(4):
            compiled(torch.ones(3, 128, device="meta"))
        assert counter.frame_count == 2

    @EVERY_DEVICE
    def test_dequantize(self, device):
        q = make_matrix(80, 128, device)
        compiled = torch.compile(
            lambda: dequantize(q, torch.bfloat16) * 2,
            backend="aot_eager",
            fullgraph=True,
        )
        assert torch.equal(compiled(), q.dequantize(torch.bfloat16) * 2)


class TestOperators:
    """What torch.library asks of an operator: schema, fake, autograd, compilation."""

    @EVERY_DEVICE
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_matmul(self, device, double_quant, dtype):
        storage = storage_of(make_matrix(80, 128, device, double_quant=double_quant))
        x = make_input(2, 3, 128, device=device, dtype=dtype).requires_grad_()
        bias = make_input(80, device=device, dtype=dtype).requires_grad_()
        torch.library.opcheck(operators.matmul, (x, *storage, 80, bias))
        torch.library.opcheck(operators.matmul, (x, *storage, 80, None))

    @EVERY_DEVICE
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_matmul_input_gradient(self, device, double_quant, dtype):
        storage = storage_of(make_matrix(80, 128, device, double_quant=double_quant))
        grad = make_input(2, 3, 80, device=device, dtype=dtype).requires_grad_()
        torch.library.opcheck(operators.matmul_input_gradient, (grad, *storage, 128))

    @EVERY_DEVICE
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("codebook", [NF4, TOY], ids=by_name)
    def test_dequantize_blocks(self, device, double_quant, codebook):
        q = make_matrix(7, 13, device, codebook, 64, double_quant)
        arguments = (*storage_of(q), 91, torch.float16)
        torch.library.opcheck(operators.dequantize_blocks, arguments)

    @EVERY_DEVICE
    @pytest.mark.parametrize("codebook", [NF4, TOY], ids=by_name)
    @pytest.mark.parametrize("count", [0, 1, 200])
    def test_quantize_blocks(self, device, codebook, count):
        numbers = make_input(count, device=device)
        values = codebook.values.tolist()
        arguments = (numbers, values, codebook.ties, 64)
        torch.library.opcheck(operators.quantize_blocks, arguments)
        packed, scales = operators.quantize_blocks(*arguments)
        expected = quantize_by_reference(numbers.cpu(), codebook, 64)
        assert torch.equal(packed.cpu(), expected.packed)
        assert torch.equal(scales.cpu(), expected.scales)


class TestDequantize:
    @EVERY_DEVICE
    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    @pytest.mark.parametrize(("block_size", "double_quant"), LAYOUTS)
    def test_the_bits_of_the_method(self, device, codebook, block_size, double_quant):
        q = make_matrix(65, 131, "cpu", codebook, block_size, double_quant)
        for dtype in (*DTYPES, torch.float64, None):
            numbers = dequantize(q.to(device), dtype)
            expected = q.dequantize(dtype)
            assert numbers.dtype == expected.dtype
            assert torch.equal(numbers.cpu(), expected)

    @EVERY_DEVICE
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5, 7), (2, 0)])
    def test_every_shape(self, device, shape):
        q = quantize(make_input(*shape, device=device), NF4, double_quant=True)
        assert dequantize(q).shape == shape
        assert torch.equal(dequantize(q), q.dequantize())

    def test_an_offset(self):
        scales = make_matrix(64, 96).scales
        assert scales.offset is not None
        assert torch.equal(dequantize(scales), scales.dequantize())

    def test_a_type_that_is_no_float(self):
        with pytest.raises(TypeError, match=r"dtype must be .* torch\.int64.*\.codes"):
            dequantize(make_matrix(2, 2), torch.int64)

    def test_a_dense_tensor(self):
        with pytest.raises(TypeError, match="q must be .* Tensor: quantize it first"):
            dequantize(torch.ones(2, 2))


class TestQuantize:
    @EVERY_DEVICE
    @pytest.mark.parametrize("codebook", CODEBOOKS, ids=by_name)
    @pytest.mark.parametrize("block_size", [32, 64, 128, 256, 48, None])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_the_bits_of_the_reference(self, device, codebook, block_size, dtype):
        x = make_input(37, 71, device=device, dtype=dtype)
        q = quantize(x, codebook, block_size)
        expected = quantize_by_reference(x.cpu(), codebook, block_size)
        assert torch.equal(q.packed.cpu(), expected.packed)
        assert torch.equal(q.scales.cpu(), expected.scales)
        assert (q.shape, q.dtype) == (x.shape, dtype)
        assert (q.codebook, q.block_size) == (codebook, block_size)

    @EVERY_DEVICE
    def test_double_quantization_is_the_reference_given_the_mean(self, device):
        x = make_input(300, 71, device=device)
        q = quantize(x, NF4, 64, double_quant=True)
        flat = quantize_by_reference(x.cpu(), NF4, 64)
        offset = q.scales.offset.cpu()
        torch.testing.assert_close(offset, flat.scales.mean())
        scales = quantize_by_reference(flat.scales - offset, DYNAMIC8, 256)
        assert torch.equal(q.packed.cpu(), flat.packed)
        assert torch.equal(q.scales.packed.cpu(), scales.packed)
        assert torch.equal(q.scales.scales.cpu(), scales.scales)

    @EVERY_DEVICE
    def test_non_contiguous(self, device):
        x = make_input(71, 37, device=device)
        assert torch.equal(
            quantize(x.t(), NF4).packed, quantize(x.t().contiguous(), NF4).packed
        )

    @EVERY_DEVICE
    def test_a_parameter(self, device):
        weight = torch.nn.Parameter(make_input(64, 64, device=device))
        q = quantize(weight, NF4)
        assert not q.scales.requires_grad

    @EVERY_DEVICE
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_number_that_is_not_finite(self, device, bad):
        x = make_input(300, device=device)
        x[123] = bad
        with pytest.raises(ValueError, match=f"tensor holds {bad} at flat index 123"):
            quantize(x, NF4)

    @EVERY_DEVICE
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"block_size": 64.0}, TypeError, "block_size must be .* got 64.0"),
            ({"block_size": 0}, ValueError, "block_size must be .* got 0"),
            ({"codebook": "nf4"}, TypeError, "codebook must be .* got 'nf4'"),
        ],
    )
    def test_bad_arguments(self, device, arguments, error, message):
        x = torch.ones(4, device=device)
        with pytest.raises(error, match=message):
            quantize(x, **{"codebook": NF4, **arguments})
        with pytest.raises(TypeError, match=r"tensor must be .* torch\.int64"):
            quantize(x.long(), NF4)


class TestErrors:
    q = make_matrix(4, 6)
    x = torch.ones(3, 6)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_types(self, dtype):
        with pytest.raises(TypeError, match=f"input must be a float .* got {dtype}"):
            matmul(self.x.to(dtype), self.q)
        with pytest.raises(TypeError, match=f"bias must be a float .* got {dtype}"):
            matmul(self.x, self.q, torch.ones(4).to(dtype))

    def test_a_list(self):
        with pytest.raises(TypeError, match="input must be a float tensor, got list"):
            matmul([[1.0] * 6], self.q)

    @pytest.mark.parametrize("shape", [(), (5,), (6, 5), (0, 4)])
    def test_last_dimension(self, shape):
        with pytest.raises(ValueError, match="input must have 6 numbers .* got shape"):
            matmul(torch.ones(shape), self.q)

    def test_bias_shape(self):
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\).*\(1,\)"):
            matmul(self.x, self.q, torch.ones(1))

    def test_what_is_no_matrix(self):
        vector = quantize_by_reference(torch.ones(6), NF4)
        with pytest.raises(ValueError, match=r"q must be .* a matrix.* \(6,\)"):
            matmul(self.x, vector)
        with pytest.raises(TypeError, match="q must be a QuantizedTensor, got Tensor"):
            matmul(self.x, torch.ones(4, 6))

    def test_an_offset(self):
        shifted = dataclasses.replace(self.q, offset=torch.ones(()))
        with pytest.raises(ValueError, match=r"q has an offset.* q\.dequantize\(\)"):
            matmul(self.x, shifted)

    def test_devices(self):
        with pytest.raises(ValueError, match="input must be on .* q, cpu, got meta"):
            matmul(self.x.to("meta"), self.q)
        with pytest.raises(ValueError, match="bias must be on .* q, cpu, got meta"):
            matmul(self.x, self.q, torch.ones(4, device="meta"))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU compiles the kernels and interprets none"
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_has_a_kernel_reaches_it(monkeypatch, double_quant):
    """Without a GPU the kernels run in Triton's interpreter, and on CPU tensors."""
    reached = []
    for name in ("quantize", "dequantize"):
        module = importlib.import_module(f"qlora_lib.kernels.{name}")
        launch = getattr(module, f"{name}_blocks")

        def spy(*arguments, name=name, launch=launch):
            reached.append(name)
            return launch(*arguments)

        monkeypatch.setattr(module, f"{name}_blocks", spy)
    monkeypatch.setattr(dispatch, "has_kernel", lambda *_: True)
    monkeypatch.setattr(dispatch, "_runs_matmuls", lambda _: True)
    weight, x = make_input(20, 48), make_input(3, 48)
    q = quantize(weight, NF4, 64, double_quant)
    expected = quantize_by_reference(weight, NF4, 64, double_quant)
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(dequantize(q), expected.dequantize())
    assert_product(matmul(x, q), x, expected.dequantize(torch.float64).T)
    assert reached[:2] == ["quantize", "dequantize"]


@pytest.mark.gpu
class TestOnTheGpu:
    # PyTorch says so when the mode is first set, which it is nevertheless.
    @pytest.mark.filterwarnings(
        "ignore:Synchronization debug mode is a prototype:UserWarning"
    )
    def test_the_second_call_copies_nothing_from_the_host(self):
        q = make_matrix(128, 256, "cuda")
        x = make_input(3, 256, device="cuda").requires_grad_()
        matmul(x, q).sum().backward()
        dequantize(q)
        try:
            torch.cuda.set_sync_debug_mode("error")  # such a copy waits for the device
            matmul(x, q).sum().backward()
            dequantize(q)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("m", [1, 16, 300])
    def test_capture_and_replay(self, m):
        q = make_matrix(128, 256, "cuda")
        x = make_input(m, 256, device="cuda", dtype=torch.bfloat16)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            matmul(x, q)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = matmul(x, q)
        x.copy_(-2 * x)
        graph.replay()
        assert_product(y, x, q.dequantize(torch.float64).T)

    def test_memory_of_the_backward_pass_is_that_of_the_codes(self):
        q = make_matrix(2048, 2048, "cuda")
        x = make_input(1, 2048, device="cuda").requires_grad_()
        matmul(x, q).sum().backward()  # allocates what libraries keep
        x.grad = None
        before = torch.cuda.memory_allocated()
        y = matmul(x, q)
        assert torch.cuda.memory_allocated() - before < 2048 * 2048 / 2
        y.sum().backward()

    def test_a_process_without_a_kernel_falls_back(self, monkeypatch):
        q = make_matrix(128, 256, "cuda")
        x = make_input(3, 256, device="cuda")
        monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
        assert_product(matmul(x, q), x, q.dequantize(torch.float64).T)
        assert torch.equal(dequantize(q), q.dequantize())


@pytest.mark.parametrize(
    ("hip", "capability", "codecs", "matmuls"),
    [
        (None, (7, 5), False, False),
        (None, (8, 0), True, False),
        (None, (8, 9), True, False),
        (None, (9, 0), True, True),
        (None, (10, 0), True, True),
        (None, (12, 0), True, False),
        ("7.0", (9, 4), True, False),
    ],
    ids=str,
)
def test_where_kernels_run(monkeypatch, hip, capability, codecs, matmuls):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "_capability", lambda _: capability)
    device = torch.device("cuda")
    assert dispatch.has_kernel(device, 4, 64, torch.bfloat16) == codecs
    assert dispatch._runs_matmuls(device) == matmuls
