"""lora_linear against the formula, its gradients against float64, what it keeps."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qlora_lib import NF4, QuantizedTensor, dequantize, matmul, quantize
from qlora_lib.nn import lora_linear

IN, OUT, RANK = 192, 128, 8
SCALING = 0.75
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (5, IN),
    adapter_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[torch.Tensor, QuantizedTensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUT, IN), NF4, 64, double_quant=True).to(device)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    bias = torch.randn(OUT).to(device, dtype)
    lora_a = torch.randn(RANK, IN).to(device, adapter_dtype).requires_grad_()
    lora_b = torch.randn(OUT, RANK).to(device, adapter_dtype).requires_grad_()
    return x, weight, bias, lora_a, lora_b


def formula(x, weight, bias, lora_a, lora_b, scaling=SCALING):
    dense = weight.dequantize(x.dtype)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    return F.linear(x, dense, bias) + scaling * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_are_those_of_the_formula(shape, has_bias):
    x, weight, bias, lora_a, lora_b = make_case(torch.float64, shape, torch.float64)
    bias = bias.requires_grad_() if has_bias else None
    inputs = [x, lora_a, lora_b] + ([bias] if has_bias else [])
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    expected = formula(x, weight, bias, lora_a, lora_b)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_first_and_second_derivatives_pass_gradcheck(dropout):
    torch.manual_seed(1)
    weight = quantize(torch.randn(4, 6), NF4, 8)

    def run(x, a, b, bias):
        torch.manual_seed(2)  # the same mask for each of gradcheck's points
        return lora_linear(x, weight, bias, a, b, SCALING, dropout)

    shapes = [(3, 6), (2, 6), (4, 2), (4,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [5, 40, 300])
def test_bfloat16_gradients_equal_float64_within_their_rounding(device, rows):
    x, weight, bias, lora_a, lora_b = make_case(
        torch.bfloat16, (rows, IN), device=device
    )
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    g = torch.randn(y.shape).to(y)
    grads = torch.autograd.grad(y, (x, lora_a, lora_b), g)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + 2 * [torch.float32]

    w = dequantize(weight, torch.bfloat16).double()
    x64, g64, a, b = (t.detach().double() for t in (x, g, lora_a, lora_b))
    exact_x = g64 @ w + SCALING * (g64 @ b) @ a
    exact_a = SCALING * (g64 @ b).T @ x64
    exact_b = SCALING * g64.T @ (x64 @ a.T)
    # Each factor that is rounded to bfloat16, and each sum, adds one unit roundoff of
    # the sum of the magnitudes. W counts two more where a kernel rounds scale and value
    # to bfloat16. One per cent covers the squares of the roundoff and float32 sums.
    u = torch.finfo(torch.bfloat16).eps / 2 * 1.01
    x64, g64, w, a, b = (t.abs() for t in (x64, g64, w, a, b))
    update = SCALING * (g64 @ b) @ a
    bounds = (
        (2 + 2 * (device == "cuda")) * u * (g64 @ w) + 4 * u * update,
        3 * u * SCALING * (g64 @ b).T @ x64,
        3 * u * SCALING * g64.T @ (x64 @ a.T),
    )
    for grad, exact, bound in zip(
        grads, (exact_x, exact_a, exact_b), bounds, strict=True
    ):
        error = (grad.double() - exact).abs()
        assert (error <= bound).all(), (error / bound).max()
        # The bound is no blank check: half as much again would be seen.
        assert (0.5 * exact.abs() > bound).any()


@pytest.mark.gpu
def test_weight_gradients_are_not_rounded_to_bfloat16_on_a_gpu():
    x, weight, _, lora_a, lora_b = make_case(torch.bfloat16, device="cuda")
    lora_linear(x, weight, None, lora_a, lora_b, SCALING).sum().backward()
    for grad in (lora_a.grad, lora_b.grad):
        assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_types(dtype, adapter_dtype):
    x, weight, bias, lora_a, lora_b = make_case(dtype, adapter_dtype=adapter_dtype)
    y = lora_linear(x, weight, bias.float(), lora_a, lora_b, SCALING)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert lora_a.grad.dtype == lora_b.grad.dtype == adapter_dtype
    expected = formula(x.double(), weight, bias.double(), lora_a, lora_b)
    # Six roundings of magnitudes that sum to a few hundred.
    atol = 6 * 200 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


def test_non_contiguous_input_and_gradient():
    _, weight, bias, lora_a, lora_b = make_case()
    x = torch.randn(IN, 7).t().requires_grad_()
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    expected = formula(x, weight, bias, lora_a, lora_b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-4)


def saved_for_backward(run):
    """The tensors that autograd saves, and those that the function holds itself."""
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    function = output.grad_fn
    held = [] if function is None else [*function.matrices, *function.storage]
    return saved + [part for part in held if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(40, IN), (2, 20, IN)])
def test_neither_a_dense_weight_nor_a_copy_of_the_input_is_kept(dropout, shape):
    x, weight, bias, lora_a, lora_b = make_case(torch.bfloat16, shape)
    saved = saved_for_backward(
        lambda: lora_linear(x, weight, bias, lora_a, lora_b, SCALING, dropout)
    )
    pointers = [tensor.data_ptr() for tensor in saved]
    for tensor in (x, lora_a, lora_b, weight.packed, weight.scales.packed):
        assert pointers.count(tensor.data_ptr()) == 1
    tables = weight.codebook.values.nbytes + weight.scales.codebook.values.nbytes
    known = x.nbytes + lora_a.nbytes + lora_b.nbytes + weight.nbytes + tables
    rank_sized = 40 * RANK * x.element_size()
    assert sum(tensor.nbytes for tensor in saved) == known + rank_sized


def test_what_nobody_trains_is_not_kept_or_computed():
    x, weight, bias, lora_a, lora_b = make_case()
    x = x.detach()
    kept = saved_for_backward(
        lambda: lora_linear(x, weight, bias, lora_a.detach(), lora_b, SCALING)
    )
    assert x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert not saved_for_backward(
        lambda: lora_linear(x, weight, bias, lora_a.detach(), lora_b.detach(), SCALING)
    )
    x.requires_grad_()
    frozen = saved_for_backward(
        lambda: lora_linear(x, weight, bias, lora_a.detach(), lora_b.detach(), SCALING)
    )
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in frozen}
    y = lora_linear(x, weight, bias, lora_a.detach(), lora_b.detach(), SCALING)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = formula(x, weight, bias, lora_a, lora_b)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-4)


def test_nothing_is_kept_without_gradients():
    x, weight, bias, lora_a, lora_b = make_case()
    with torch.no_grad():
        y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    assert y.grad_fn is None
    alive = weakref.ref(y)
    del y
    gc.collect()
    assert alive() is None


def test_dropout_has_its_rate_and_keeps_the_mean():
    weight = quantize(torch.zeros(1, 10_000), NF4)
    ones, identity = torch.ones(50, 10_000), torch.ones(1, 1)
    a = torch.ones(1, 10_000)
    torch.manual_seed(0)
    y = lora_linear(ones, weight, None, a, identity, 2.0, dropout=0.25)
    counts = y / (2.0 / 0.75)
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=0.01)
    # The mean of 500,000 draws has a standard deviation of 0.0006.
    assert abs(counts.mean().item() / 10_000 - 0.75) < 0.003
    assert len(set(counts.flatten().tolist())) > 10


def test_dropout_reaches_the_update_alone():
    x, weight, bias, lora_a, _ = make_case()
    y = lora_linear(x, weight, bias, lora_a, torch.zeros(OUT, RANK), SCALING, 0.5)
    torch.testing.assert_close(y, F.linear(x, weight.dequantize(), bias))


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_of_the_backward_pass_is_that_of_the_forward_pass(device):
    dropout = 0.4
    # With A = I and B = I the update shows the mask.
    n = OUT
    weight = quantize(torch.zeros(n, n), NF4).to(device)
    eye = torch.eye(n, dtype=torch.float64, device=device)
    a, b = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    x = torch.rand(6, n, dtype=torch.float64, device=device) + 1
    x.requires_grad_()
    y = lora_linear(x, weight, None, a, b, 1.0, dropout)
    mask = (y != 0).double() / (1 - dropout)
    assert 0 < (y == 0).double().mean() < 1
    torch.testing.assert_close(y, x * mask)
    g = torch.randn_like(y)
    torch.manual_seed(99)  # what is drawn in between does not matter
    grad_x, grad_a, grad_b = torch.autograd.grad(y, (x, a, b), g)
    torch.testing.assert_close(grad_x, g * mask)
    torch.testing.assert_close(grad_a, g.T @ (x * mask))
    torch.testing.assert_close(grad_b, g.T @ (x * mask))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_the_same_under_gradient_checkpointing(device, use_reentrant):
    x, weight, bias, lora_a, lora_b = make_case(device=device)

    def run(x):
        return lora_linear(x, weight, bias, lora_a, lora_b, SCALING, 0.5).square()

    results = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = call(x)
        torch.manual_seed(4)
        y.sum().backward()
        results.append((y.detach(), x.grad, lora_a.grad, lora_b.grad))
        x.grad = lora_a.grad = lora_b.grad = None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_dropout_differs_from_call_to_call_and_follows_the_seed():
    case = make_case()
    torch.manual_seed(5)
    first, second = (lora_linear(*case, SCALING, 0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(lora_linear(*case, SCALING, 0.5), first)
    assert not torch.equal(first, second)


def test_the_seed_is_drawn_on_the_cpu_whatever_the_default_device():
    case = make_case()
    torch.manual_seed(5)
    expected = lora_linear(*case, SCALING, 0.5)
    torch.manual_seed(5)
    with torch.device("meta"):  # another default device, such as a GPU
        found = lora_linear(*case, SCALING, 0.5)
    assert torch.equal(found, expected)


def test_without_dropout_no_random_number_is_drawn():
    case = make_case()
    before = torch.get_rng_state()
    lora_linear(*case, SCALING).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("during_backward", [False, True])
def test_autocast(during_backward):
    x, weight, bias, lora_a, lora_b = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=during_backward):
        y.sum().backward()
    cast = x.detach().bfloat16()
    expected = lora_linear(cast, weight, bias, lora_a, lora_b, SCALING)
    assert torch.equal(y, expected)
    assert x.grad.dtype == lora_a.grad.dtype == lora_b.grad.dtype == torch.float32


def test_a_backward_pass_under_autocast_keeps_float32():
    x, weight, bias, lora_a, lora_b = make_case()
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    grads = torch.autograd.grad(y.sum(), (x, lora_a, lora_b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        others = torch.autograd.grad(y.sum(), (x, lora_a, lora_b))
    assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))


# PyTorch's first use of forward mode scripts its own formulas.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_transforms():
    x, weight, bias, lora_a, lora_b = (
        tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
        for tensor in make_case(torch.float64, adapter_dtype=torch.float64)
    )

    def run(x, a):
        return lora_linear(x, weight, bias, a, lora_b, SCALING)

    def reference(x, a):
        return formula(x, weight, bias, a, lora_b)

    tangents = torch.randn_like(x), torch.randn_like(lora_a)
    for compute in (
        lambda f: torch.func.jvp(f, (x, lora_a), tangents),
        lambda f: torch.func.jacrev(f, argnums=1)(x, lora_a),
        lambda f: torch.func.vmap(f, in_dims=(0, None))(x, lora_a),
    ):
        torch.testing.assert_close(compute(run), compute(reference))


# PyTorch 2.11 scripts a module of its own when the compiler is first imported.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
# The compiler instantiates what PyTorch says not to instantiate.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# On a GPU it advises to round to 19 bits, which the comparison would not survive.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
)
def test_compiled_numbers_are_the_same(backend, device):
    torch._dynamo.reset()
    x, weight, bias, lora_a, lora_b = make_case(device=device)

    def run():
        return lora_linear(x, weight, bias, lora_a, lora_b, SCALING)

    results = []
    for call in (run, torch.compile(run, backend=backend, fullgraph=True)):
        y = call()
        grads = torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b))
        results.append((y.detach(), *grads))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)


# As above: only the first of these two tests imports the compiler.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
def test_compiled_dropout_has_one_mask_for_both_passes():
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUT, IN), NF4, 64, double_quant=True)
    x = torch.ones(50, IN)
    a, b = torch.ones(1, IN, requires_grad=True), torch.ones(OUT, 1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run():
        return lora_linear(x, weight, None, a, b, 1.0, dropout=0.25)

    update = run() - matmul(x, weight)
    (grad_a,) = torch.autograd.grad(update.sum(), a)
    kept = 0.75 * update[:, 0] / IN
    assert kept.std() > 0
    torch.testing.assert_close(kept.mean().item(), 0.75, rtol=0, atol=0.03)
    # Both are OUT times the number of kept elements, divided by 0.75.
    torch.testing.assert_close(grad_a.sum(), update.detach().sum())


def test_a_step_of_training_lowers_the_loss():
    x, weight, bias, lora_a, lora_b = make_case(torch.bfloat16)
    target = torch.randn(5, OUT)
    optimizer = torch.optim.Adam([lora_a, lora_b], lr=0.01)
    losses = []
    for _ in range(20):
        y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
        loss = F.mse_loss(y.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(2, IN + 1)}, f"input must have {IN} numbers"),
        ({"lora_a": torch.ones(RANK, IN + 1)}, r"lora_a must have shape \[rank, 192\]"),
        ({"lora_a": torch.ones(IN)}, r"lora_a must have .* got \(192,\)"),
        ({"lora_b": torch.ones(RANK, OUT)}, r"lora_b must have shape \(128, 8\)"),
        ({"lora_b": torch.ones(OUT, RANK, device="meta")}, "lora_b .* got meta"),
        ({"dropout": 1.0}, r"dropout must be .* got 1\.0"),
        ({"dropout": -0.1}, r"dropout must be .* got -0\.1"),
        ({"dropout": float("nan")}, "dropout must be .* got nan"),
    ],
)
def test_values_that_do_not_fit_are_named(change, message):
    names = ("input", "weight", "bias", "lora_a", "lora_b")
    arguments = dict(zip(names, make_case(), strict=True), scaling=SCALING) | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)


def test_types_that_do_not_fit_are_named():
    x, weight, bias, lora_a, lora_b = make_case()
    with pytest.raises(TypeError, match=r"lora_a must be a float.*int64"):
        lora_linear(x, weight, bias, lora_a.long(), lora_b, SCALING)
    with pytest.raises(TypeError, match="QuantizedTensor, got Tensor"):
        lora_linear(x, torch.ones(OUT, IN), bias, lora_a, lora_b, SCALING)


def test_a_matrix_that_changes_between_the_passes_is_refused():
    x, weight, bias, lora_a, lora_b = make_case()
    y = lora_linear(x, weight, bias, lora_a, lora_b, SCALING)
    with torch.no_grad():
        lora_b.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between the forward and"):
        y.sum().backward()
