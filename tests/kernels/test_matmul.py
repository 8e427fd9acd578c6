"""The matmul kernels against sums in float64, element by element.

The kernels multiply by ``weight = round(round(value) * round(scale))``, where ``round``
is to the type of x, of relative error ``u = eps / 2`` each, or half the distance ``d``
of subnormal numbers. Two references follow from that:

- The numbers of ``q.dequantize(torch.float64)``, from which such a weight is at most
  ``(1 + u)**3 - 1`` away, and ``d / 2`` for each rounding times what multiplies it.
- The rounded weights themselves, computed here in PyTorch. Only the sum and the output
  round then: one wrong weight, position or scale shows.

Sums are float32 in an unknown order. Each of k additions adds at most ``2**-23`` of the
sum of the magnitudes, since tensor cores cut bits off where others round to nearest. At
last the bias is added (``2**-23``) and the output is rounded (``u`` or ``d / 2``).
"""

import ast
import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qlora_lib
from qlora_lib import FP4, INT4, NF4, Codebook, QuantizedTensor
from qlora_lib.kernels import (
    adding,
    arranging,
    dispatch,
    matmul_few_rows,
    matmul_gradient,
    matmul_many_rows,
    tiles,
)
from qlora_lib.kernels.storage import Storage, storage_of
from qlora_lib.numerics import quantize as quantize_by_reference
from qlora_lib.numerics import unpack
from qlora_lib.numerics.quantized_tensor import SCALE_BLOCK_SIZE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # What poisons memory asks for deterministic algorithms too, and cuBLAS warns.
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]

CUSTOM = Codebook("custom", [-1, -0.7, -0.3, -1e-3, 0.01, 0.2, 0.21, 0.5, 0.9, 1])
CODEBOOKS = [NF4, INT4, FP4, CUSTOM]
BLOCK_SIZES = [32, 64, 128, 256]
DTYPES = [torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "row stride", "column stride", "transposed"]
REAL_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)]

few = matmul_few_rows.matmul_few_rows
many = matmul_many_rows.matmul_many_rows
Product = Callable[[Tensor, Storage, int, Tensor | None], Tensor]
PRODUCTS = pytest.mark.parametrize("product", [few, many])


def make_matrix(
    n: int,
    k: int,
    device: str,
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Codebook = NF4,
) -> QuantizedTensor:
    """A quantized matrix with scales of different magnitudes, to tell them apart."""
    generator = torch.Generator(device).manual_seed(n * k + block_size)
    weight = torch.randn(n * k, generator=generator, device=device) / 16
    magnitudes = torch.randint(
        -3, 3, (-(-n * k // 32),), generator=generator, device=device
    )
    weight *= (2.0**magnitudes).repeat_interleave(32)[: n * k]
    quantize = quantize_by_reference if device == "cpu" else qlora_lib.quantize
    return quantize(weight.view(n, k), codebook, block_size, double_quant)


def make_rows(
    m: int,
    k: int,
    dtype: torch.dtype,
    device: str,
    layout: str = "contiguous",
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator(device).manual_seed(m + k + seed)
    x = torch.randn(2 * m, 2 * k, generator=generator, device=device).to(dtype)
    return {
        "contiguous": x[:m, :k].contiguous(),
        "row stride": x[:m, 1 : k + 1],
        "column stride": x[:m, ::2],
        "transposed": x[:m, :k].T.contiguous().T,
    }[layout]


def weight_bounds(q: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and greatest weight that the kernels may compute with, float32.

    They are the same, except that a GPU may round the product and the sum of nested
    scales at once.
    """
    n, k = q.shape
    codes = unpack(q.packed, 4, n * k).long().view(-1, q.block_size)
    values = torch.cat([q.codebook.values, torch.zeros(16)])[:16].to(q.device)
    if isinstance(q.scales, Tensor):
        scales, slack = q.scales, torch.zeros_like(q.scales)
    else:
        nested = q.scales.scales.repeat_interleave(SCALE_BLOCK_SIZE)
        table = q.scales.codebook.values.to(q.device)
        products = table[q.scales.packed.long()] * nested[: len(q.scales.packed)]
        scales = products + q.scales.offset
        slack = 2.0**-23 * (products.abs() + scales.abs()) * (q.device.type == "cuda")
    ends = []
    for scale in (scales - slack, scales + slack):
        factor = scale.to(dtype).float()[:, None]
        weight = values.to(dtype).float()[codes] * factor
        ends.append(weight.to(dtype).float().view(n, k))
    return torch.minimum(*ends), torch.maximum(*ends)


def check_gradient(grad: Tensor, q: QuantizedTensor) -> Tensor:
    x = matmul_gradient.matmul_gradient(grad, storage_of(q), q.shape[1])
    check_sums(x, grad, q, of_gradient=True)
    return x


def check_sums(
    actual: Tensor,
    left: Tensor,
    q: QuantizedTensor,
    bias: Tensor | None = None,
    of_gradient: bool = False,
) -> None:
    """``actual = left W^T + bias`` within the limits of the docstring of this module.

    For ``left [m, k]`` and W of q, or ``of_gradient`` for ``left [m, n]`` and W^T.
    """
    dtype = left.dtype
    assert actual.dtype == dtype and actual.is_contiguous()
    low, high = weight_bounds(q, dtype)
    exact = q.dequantize(torch.float64)
    if not of_gradient:
        low, high, exact = low.T, high.T, exact.T
    assert actual.shape == (left.shape[0], exact.shape[1])
    added = 0.0 if bias is None else bias.double()
    u = torch.finfo(dtype).eps / 2
    d = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    roundings = len(exact) * 2.0**-23
    # Rows in parts, and W in parts, so that float64 copies of a large W fit.
    for columns in torch.arange(exact.shape[1]).split(4096):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        x, y = left.double(), actual[:, part].double()
        plus = added[part] if bias is not None else added
        size = x.abs() @ torch.maximum(low, high).abs()[:, part].double()
        size += x.abs() @ (high - low)[:, part].double()
        rounded = x @ low[:, part].double() + plus
        limit = roundings * size + u * rounded.abs() + d / 2
        limit += x.abs() @ (high - low)[:, part].double() + 2.0**-23 * abs(plus)
        assert_close(y, rounded, limit)

        ideal = x @ exact[:, part] + plus
        size = x.abs() @ exact[:, part].abs()
        limit = (3 * u + 4 * u**2 + roundings) * size + u * ideal.abs() + d / 2
        # A value is at most 1 and a scale at most the largest weight of its row.
        largest = float(exact.abs().max()) * 2 + 1
        limit += 1.5 * d * largest * x.abs().sum(1, keepdim=True)
        assert_close(y, ideal, limit * (1 + 2 * u) + 2.0**-23 * abs(plus))


def assert_close(actual: Tensor, expected: Tensor, limit: Tensor) -> None:
    error = (actual - expected).abs()
    wrong = ~(error <= limit)
    message = f"{int(wrong.sum())} wrong, first at {wrong.nonzero()[:1].tolist()}"
    assert not bool(wrong.any()), message


def check_product(
    product: Product,
    q: QuantizedTensor,
    x: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    y = product(x, storage_of(q), q.shape[0], bias)
    check_sums(y, x, q, bias)
    return y


def cases(ms: list[int], ns: list[int], ks: list[int]) -> list[tuple]:
    """Every m with every n, and the rest by lot: the same lot every time."""
    draw = random.Random(0)

    def case(m: int, n: int) -> tuple:
        k = draw.choice(ks)
        block_size = draw.choice([size for size in BLOCK_SIZES if k % size == 0])
        double_quant, has_bias = draw.random() < 0.5, draw.random() < 0.5
        rest = [draw.choice(each) for each in (DTYPES, CODEBOOKS, LAYOUTS)]
        return (m, n, k, block_size, double_quant, *rest, has_bias)

    return [case(m, n) for m, n in itertools.product(ms, ns)]


def case_name(value: object) -> str | None:
    return value.name if isinstance(value, Codebook) else None


CASE = "m, n, k, block_size, double_quant, dtype, codebook, layout, has_bias"
# Multiples of 128 with and without a remainder against four or eight warps and spans.
KS = [128, 256, 384, 640]


@pytest.mark.parametrize(
    CASE,
    cases([1, 2, 3, 7, 8, 9, 16, 17, 31, 32], [1, 16, 33], KS),
    ids=case_name,
)
def test_few_rows(
    m, n, k, block_size, double_quant, dtype, codebook, layout, has_bias, device
):
    q = make_matrix(n, k, device, block_size, double_quant, codebook)
    bias = make_rows(1, n, dtype, device)[0] if has_bias else None
    check_product(few, q, make_rows(m, k, dtype, device, layout), bias)


@pytest.mark.parametrize(
    CASE, cases([1, 32, 33, 65, 130], [1, 17, 129], KS), ids=case_name
)
def test_many_rows(
    m, n, k, block_size, double_quant, dtype, codebook, layout, has_bias, device
):
    q = make_matrix(n, k, device, block_size, double_quant, codebook)
    bias = make_rows(1, n, dtype, device)[0] if has_bias else None
    check_product(many, q, make_rows(m, k, dtype, device, layout), bias)


@pytest.mark.parametrize(
    CASE, cases([1, 9, 16, 17, 64], [1, 64, 65, 129], [128, 256]), ids=case_name
)
def test_gradient(
    m, n, k, block_size, double_quant, dtype, codebook, layout, has_bias, device
):
    q = make_matrix(n, k, device, block_size, double_quant, codebook)
    grad = make_rows(m, n, dtype, device, layout)
    check_gradient(grad, q)


def force_slices(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    """Cut the columns, which is done for speed alone and never on a CPU."""

    def choose(tilings, *_):
        return tilings[-1], slices

    monkeypatch.setattr(matmul_many_rows, "choose_tiling", choose)


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("m", [33, 65, 130])
def test_slices_of_columns(monkeypatch, m, block_size, has_bias, slices, device):
    force_slices(monkeypatch, slices)
    q = make_matrix(70, 512 * slices, device, block_size)
    x = make_rows(m, 512 * slices, torch.bfloat16, device)
    bias = make_rows(1, 70, torch.bfloat16, device)[0] if has_bias else None
    check_product(many, q, x, bias)


LONG_KS = [1024, 1152, 1280]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("k", "block_size"),
    [(k, size) for k in LONG_KS for size in BLOCK_SIZES if k % size == 0],
)
def test_scales_of_long_rows(k, block_size, double_quant, device):
    """Several spans of scales a warp, more than 256 of them, and idle warps."""
    q = make_matrix(9, k, device, block_size, double_quant)
    check_product(few, q, make_rows(3, k, torch.float16, device))
    check_product(many, q, make_rows(3, k, torch.float16, device))


def test_gradient_of_many_slices(device):
    n = (matmul_gradient.SLICES + 1) * int(matmul_gradient.STEP) + 1
    q = make_matrix(n, 128, device, 32)
    grad = make_rows(2, n, torch.bfloat16, device)
    check_gradient(grad, q)


@pytest.mark.parametrize(
    ("rows", "k", "block_size", "double_quant", "dtype"),
    [
        (8, 384, 32, True, torch.bfloat16),
        (32, 640, 128, False, torch.float16),
        (32, 768, 256, True, torch.bfloat16),
        pytest.param(8, 4352, 256, False, torch.float16, marks=pytest.mark.gpu),
        pytest.param(8, 4224, 64, True, torch.float16, marks=pytest.mark.gpu),
        pytest.param(16, 4224, 32, True, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(32, 4224, 32, False, torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_every_column_is_multiplied_by_its_own_weight(
    rows, k, block_size, double_quant, dtype, device
):
    """One 1 among zeros picks a column of W: exactly, and each in turn.

    The shapes leave less to do for some warps than for others.
    """
    q = make_matrix(16, k, device, block_size, double_quant)
    check_columns(few, q, rows, dtype, device)


def check_columns(product, q, rows: int, dtype: torch.dtype, device: str) -> None:
    n, k = q.shape
    low, high = weight_bounds(q, dtype)
    storage = storage_of(q)
    for columns in torch.arange(k, device=device).split(rows):
        x = torch.zeros(len(columns), k, dtype=dtype, device=device)
        x[torch.arange(len(columns)), columns] = 1
        y = product(x, storage, n, None).float().T
        within = (low[:, columns] <= y) & (y <= high[:, columns])
        assert bool(within.all()), columns[~within.all(0)]


@pytest.mark.parametrize("double_quant", [False, True])
def test_every_column_with_many_rows(double_quant, device):
    q = make_matrix(70, 384, device, 64, double_quant)
    check_columns(many, q, 128, torch.bfloat16, device)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_row_of_the_gradient(block_size, device):
    q = make_matrix(130, 256, device, block_size)
    low, high = weight_bounds(q, torch.float16)
    for rows in torch.arange(130, device=device).split(64):
        grad = torch.zeros(len(rows), 130, dtype=torch.float16, device=device)
        grad[torch.arange(len(rows)), rows] = 1
        x = matmul_gradient.matmul_gradient(grad, storage_of(q), 256).float()
        assert bool(((low[rows] <= x) & (x <= high[rows])).all())


# NumPy, which the interpreter computes with, warns of infinity times zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestExtremes:
    @PRODUCTS
    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_what_is_not_finite_stays_in_its_row(self, product, bad, device):
        q = make_matrix(17, 640, device, 32)
        x = make_rows(11, 640, torch.float16, device)
        for row, column in ((3, 0), (8, 639)):
            x[row, column] = bad
        expected = x.double() @ weight_bounds(q, x.dtype)[0].double().T
        # Where the weight is 0, infinity gives NaN; elsewhere an infinity of its sign.
        y = product(x, storage_of(q), 17, None).double()
        special = ~expected.isfinite()
        assert int(special.sum()) == 2 * 17 and bool(special[[3, 8]].all())
        assert torch.equal(
            y[special].nan_to_num(0.5),
            expected[special].half().double().nan_to_num(0.5),
        )
        keep = [row for row in range(11) if row not in (3, 8)]
        check_sums(y[keep].half(), x[keep], q)

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_gradient_that_is_not_finite_stays_in_its_row(self, bad, device):
        q = make_matrix(65, 128, device, 32)
        grad = make_rows(5, 65, torch.bfloat16, device)
        grad[1, 64] = bad
        x = matmul_gradient.matmul_gradient(grad, storage_of(q), 128)
        assert not bool(x[1].isfinite().any())
        keep = [0, 2, 3, 4]
        check_sums(x[keep], grad[keep], q, of_gradient=True)

    @PRODUCTS
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_zero_and_huge_scales(self, product, double_quant, device):
        weight = torch.zeros(16, 256)
        weight[1:, 64:] = torch.randn(15, 192, generator=torch.manual_seed(0))
        weight[2, 70] = 1e30
        q = quantize_by_reference(weight, NF4, 64, double_quant).to(device)
        x = make_rows(3, 256, torch.bfloat16, device)
        y = check_product(product, q, x)
        if not double_quant:
            assert not y[:, 0].any()
        grad = make_rows(3, 16, torch.bfloat16, device)
        check_gradient(grad, q)

    @PRODUCTS
    def test_subnormal_weights(self, product, device):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, 128, generator=generator) * 1e-6
        q = quantize_by_reference(weight, NF4, 32).to(device)
        x = make_rows(3, 128, torch.float16, device) * 1000
        assert check_product(product, q, x).any()


@PRODUCTS
@pytest.mark.parametrize("double_quant", [False, True])
def test_it_reads_nothing_beyond_the_weight(product, double_quant, device):
    """Codes and scales stand between others, which would give other numbers."""
    n, k = 17, 384
    q = make_matrix(n, k, device, 32, double_quant)
    x = make_rows(9, k, torch.bfloat16, device)
    storage = storage_of(q)

    def embed(part: Tensor | None) -> Tensor | None:
        if part is None or part.dim() == 0:
            return part
        other = 255 if part.dtype == torch.uint8 else float("nan")
        around = part.new_full((64,), other)
        return torch.cat([around, part, around])[64:-64]

    embedded = Storage(*(embed(part) for part in storage[:6]), storage.block_size)
    expected = product(x, storage, n, None)
    assert torch.equal(product(x, embedded, n, None), expected)


@PRODUCTS
def test_rows_that_overlap(product, device):
    """One row many times over: a row stride of zero."""
    q = make_matrix(17, 256, device)
    row = make_rows(1, 256, torch.bfloat16, device)
    y = check_product(product, q, row.expand(9, 256))
    assert torch.equal(y, y[:1].expand(9, 17))


def test_gradient_of_a_sum(device):
    """Its gradient is one number for all: both strides are zero."""
    q = make_matrix(65, 128, device)
    grad = torch.ones((), dtype=torch.bfloat16, device=device).expand(3, 65)
    check_gradient(grad, q)


# A GPU compiles the kernels anew for every example, and would for every smaller one.
IS_COMPILED = torch.cuda.is_available()


@settings(
    max_examples=4 if IS_COMPILED else 8,
    phases=[Phase.generate] if IS_COMPILED else Phase,
    deadline=None,
    derandomize=True,
)
@given(
    m=st.integers(1, 32),
    n=st.integers(1, 40),
    chunks=st.integers(1, 5),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(m, n, chunks, block_size, double_quant, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k = chunks * max(128, block_size)
    q = make_matrix(n, k, device, block_size, double_quant)
    x = make_rows(m, k, dtype, device)
    check_product(few, q, x)
    check_product(many, q, x)
    grad = make_rows(m, n, dtype, device)
    check_gradient(grad, q)


class TestLaunch:
    @pytest.fixture
    def h200(self, monkeypatch) -> torch.device:
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return torch.device("cuda")

    @pytest.mark.parametrize(
        ("n", "tiling"), [(28672, 0), (11008, 1), (4096, 2)], ids=str
    )
    def test_the_tiling_that_was_faster_on_an_h200(self, h200, n, tiling):
        tilings = matmul_few_rows.TILINGS[8]
        assert tiles.choose_tiling(tilings, n, 1, h200) == (tilings[tiling], 1)

    @pytest.mark.parametrize(
        ("programs", "repeats", "outputs"),
        [
            # Four share each of 132 multiprocessors: 32 programs of any tiling are one
            # round, which the narrow ones finish first.
            (32, 1, 16),
            # 528 wide ones are one round as well, and the narrow ones two.
            (528, 1, 32),
            # As many in three times the columns.
            (176, 3, 32),
            # One more, and all but that one wait a round of wide ones for it.
            (529, 1, 16),
        ],
    )
    def test_the_fewest_rows_of_a_multiprocessor(
        self, h200, programs, repeats, outputs
    ):
        wide, narrow = tiles.Tiling(32, 4, 4), tiles.Tiling(16, 4, 4)
        n = 32 * programs - 31
        chosen, slices = tiles.choose_tiling((wide, narrow), n, repeats, h200)
        assert chosen.outputs == outputs and slices == 1

    @pytest.mark.parametrize(
        ("programs", "slices"),
        # Up to a quarter of what is a round, up to half of it, and all of it.
        [(132, 4), (133, 2), (264, 2), (528, 1)],
    )
    def test_slices_fill_a_round(self, h200, programs, slices):
        tiling = tiles.Tiling(64, 4, sharing=4)
        n = 64 * programs
        chosen = tiles.choose_tiling((tiling,), n, 1, h200, (1, 2, 4))
        assert chosen == (tiling, slices)

    @pytest.mark.parametrize(
        ("n", "m", "outputs", "slices"),
        [(28672, 64, 128, 1), (4096, 64, 64, 4), (28672, 256, 128, 1)],
    )
    def test_small_matrices_are_cut_narrower(self, h200, n, m, outputs, slices):
        """Wide programs would use only a quarter of the multiprocessors."""
        tile = min(m, 128)
        tiling, cut = tiles.choose_tiling(
            matmul_many_rows.TILINGS[tile],
            n,
            m // tile,
            h200,
            matmul_many_rows.SLICES,
            matmul_many_rows.OVERHEAD,
        )
        assert (tiling.outputs, cut) == (outputs, slices)

    @pytest.mark.parametrize(
        ("chunks", "block_size", "slices"),
        [
            (1, 64, (1,)),
            (16, 64, (1, 2)),
            (32, 256, (1, 2, 4)),
            (86, 128, (1, 2)),
            (86, 256, (1,)),
        ],
    )
    def test_slices_are_whole_and_not_too_short(self, chunks, block_size, slices):
        assert matmul_many_rows._possible_slices(chunks, block_size) == slices

    @pytest.mark.parametrize("m", [1, 16, 40])
    def test_every_kernel_runs_on_the_device_of_x(self, monkeypatch, m, device):
        """Triton launches on the current device, which may be another one."""
        entered = []

        class Entered:
            def __init__(self, tensor):
                pass

            def __enter__(self):
                entered.append(True)

            def __exit__(self, *_):
                entered.pop()

        class Spy:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                assert entered, "launched on the current device"
                launches.append(self.kernel)
                return self.kernel[grid]

        launches = []
        force_slices(monkeypatch, 2)
        modules = (
            adding,
            arranging,
            matmul_few_rows,
            matmul_many_rows,
            matmul_gradient,
        )
        for module in modules:
            monkeypatch.setattr(module, "on_device_of", Entered)
            for name in vars(module).copy():
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, Spy(getattr(module, name)))
        q = make_matrix(16, 512, device)
        x = make_rows(m, 512, torch.float16, device)
        is_few = m <= matmul_few_rows.MAX_ROWS
        (few if is_few else many)(x, storage_of(q), 16, None)
        grad = make_rows(m, 16, torch.float16, device)
        matmul_gradient.matmul_gradient(grad, storage_of(q), 512)
        of_gradient = 2
        of_product = 1 + (m >= matmul_few_rows.ARRANGED_ROWS) + (not is_few)
        assert len(launches) == of_gradient + of_product

    def test_every_masked_load_says_what_else_it_gives(self):
        """The interpreter gives zeros where a GPU gives what a register held before."""
        loads = masked = 0
        for path in Path(tiles.__file__).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                    names = {keyword.arg for keyword in node.keywords}
                    loads += 1
                    masked += "mask" in names
                    assert "mask" not in names or "other" in names, (
                        f"{path.name}:{node.lineno}"
                    )
        assert loads > 20 and masked == 15  # all that there are, one in tiles.load_tile


def test_the_tables_ask_no_kernel_for_more_rows_than_it_takes():
    few_rows = [
        limit
        for limit, _, way in dispatch.CROSSOVERS
        if way is dispatch._multiply_few_rows
    ]
    assert max(few_rows) == matmul_few_rows.MAX_ROWS
    gradients = [
        limit
        for limit, _, way in dispatch.GRADIENT_CROSSOVERS
        if way is dispatch._multiply_gradient
    ]
    assert max(gradients) == matmul_gradient.MAX_ROWS


class TestWays:
    """Through the public function, so that each line of the tables is used."""

    @pytest.fixture
    def taken(self, monkeypatch, device) -> list[str]:
        taken = []

        def spy(way):
            def multiply(*arguments):
                taken.append(way.__name__)
                return way(*arguments)

            return multiply

        for table in ("CROSSOVERS", "GRADIENT_CROSSOVERS"):
            lines = [
                (rows, weights, spy(way))
                for rows, weights, way in getattr(dispatch, table)
            ]
            monkeypatch.setattr(dispatch, table, tuple(lines))
        if device == "cpu":  # the interpreter takes its tensors
            monkeypatch.setattr(dispatch, "has_kernel", lambda *_: True)
            monkeypatch.setattr(dispatch, "_runs_matmuls", lambda _: True)
        return taken

    @pytest.mark.parametrize(
        ("m", "way", "gradient"),
        [
            (16, "_multiply_few_rows", "_multiply_gradient"),
            (32, "_multiply_few_rows", "_dequantize_then_multiply_gradient"),
            (64, "_multiply_many_rows", "_dequantize_then_multiply_gradient"),
            (256, "_multiply_many_rows", "_dequantize_then_multiply_gradient"),
            (257, "_dequantize_then_multiply", "_dequantize_then_multiply_gradient"),
        ],
    )
    def test_rows(self, m, way, gradient, taken, device):
        q = make_matrix(16, 128, device)
        x = make_rows(m, 128, torch.bfloat16, device).requires_grad_()
        bias = make_rows(1, 32, torch.bfloat16, device)[0, ::2]
        y = qlora_lib.matmul(x, q, bias)
        grad = make_rows(m, 16, torch.bfloat16, device)
        y.backward(grad)
        assert taken == [way, gradient]
        check_close_to_dense(y.detach(), x.detach(), q, bias)
        check_close_to_dense(x.grad, grad, q, of_gradient=True)

    @pytest.mark.parametrize("unaligned", ["packed", "scales"])
    def test_what_cannot_be_loaded_wide_goes_the_last_way(
        self, unaligned, taken, device
    ):
        q = make_matrix(16, 1024, device, 32)
        x = make_rows(1, 1024, torch.bfloat16, device)
        storage = storage_of(q)
        part = getattr(storage, unaligned)
        shifted = torch.cat([part.new_zeros(1), part])[1:]
        dispatch.multiply(x, storage._replace(**{unaligned: shifted}), 16, None)
        assert taken == ["_dequantize_then_multiply"]

    @pytest.mark.gpu
    def test_weights(self, taken, device):
        q = make_matrix(2**14 + 16, 2**13, device)
        x = make_rows(32, 2**13, torch.bfloat16, device).requires_grad_()
        y = qlora_lib.matmul(x, q)
        grad = make_rows(32, 2**14 + 16, torch.bfloat16, device)
        y.backward(grad)
        assert taken == ["_multiply_many_rows", "_multiply_gradient"]
        check_sums(y.detach(), x.detach(), q)
        check_sums(x.grad, grad, q, of_gradient=True)


def check_close_to_dense(actual, left, q, bias=None, of_gradient=False) -> None:
    """As :func:`check_sums`, by whichever way: weights rounded once or three times."""
    exact = q.dequantize(torch.float64)
    exact = exact if of_gradient else exact.T
    u = torch.finfo(actual.dtype).eps / 2
    added = 0.0 if bias is None else bias.double()
    expected = left.double() @ exact + added
    size = left.double().abs() @ exact.abs()
    limit = (3 * u + 4 * u**2 + len(exact) * 2.0**-23) * size + u * expected.abs()
    assert_close(actual.double(), expected, limit * (1 + 2 * u) + 2.0**-23)


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
    def test_real_sizes(self, shape, dtype, device):
        """Twice, and with the same bits."""
        n, k = shape
        q = make_matrix(n, k, device)
        storage = storage_of(q)
        bias = make_rows(1, n, dtype, device)[0]
        for m in (1, 3, 16, 20, 32, 64, 100, 256):
            x = make_rows(m, k, dtype, device)
            for product in (few, many)[m > matmul_few_rows.MAX_ROWS :]:
                y = check_product(product, q, x, bias)
                assert torch.equal(product(x, storage, n, bias), y)
            if m <= matmul_gradient.MAX_ROWS:
                grad = make_rows(m, n, dtype, device)
                gradient = check_gradient(grad, q)
                again = matmul_gradient.matmul_gradient(grad, storage, k)
                assert torch.equal(again, gradient)

    @pytest.mark.parametrize(
        ("n", "k", "m"), [(4096, 4096, 64), (4096, 11008, 128)], ids=str
    )
    def test_slices_give_the_same_bits_every_time(self, n, k, m, device):
        q = make_matrix(n, k, device)
        x = make_rows(m, k, torch.bfloat16, device)
        y = check_product(many, q, x)
        for _ in range(200):
            assert torch.equal(many(x, storage_of(q), n, None), y)

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", REAL_SHAPES[:3], ids=str)
    def test_layouts_of_scales_at_real_sizes(
        self, shape, double_quant, block_size, device
    ):
        n, k = shape
        q = make_matrix(n, k, device, block_size, double_quant)
        for m in (1, 16, 32, 64, 128):
            x = make_rows(m, k, torch.float16, device)
            for product in (few, many)[m > matmul_few_rows.MAX_ROWS :]:
                check_product(product, q, x)
            if m <= matmul_gradient.MAX_ROWS:
                grad = make_rows(m, n, torch.float16, device)
                check_gradient(grad, q)

    @pytest.mark.large
    def test_a_weight_of_more_than_2_to_the_31_numbers(self, device):
        n, k = 2**18 + 34, 2**13
        generator = torch.Generator(device).manual_seed(0)
        seeded = {"generator": generator, "device": device}
        small = make_matrix(32, k, device)  # for the kinds of its parts
        storage = storage_of(small)._replace(
            packed=torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, **seeded),
            scales=torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, **seeded),
            nested_scales=torch.rand(n * k // 64 // 256, **seeded),
        )
        # Of 8192 columns two rows are one block of nested scales.
        starts = (0, 2**18 - 32, n - 32)
        for m, product in ((1, few), (16, few), (32, few), (64, many), (128, many)):
            x = make_rows(m, k, torch.bfloat16, device)
            y = product(x, storage, n, None)
            for start in starts:
                part = slice_rows(storage, start, k, small)
                check_sums(y[:, start : start + 32].contiguous(), x, part)
            assert bool(y.isfinite().all())
        for start in starts:
            grad = torch.zeros(3, n, dtype=torch.bfloat16, device=device)
            rows = make_rows(3, 32, torch.bfloat16, device)
            grad[:, start : start + 32] = rows
            gradient = matmul_gradient.matmul_gradient(grad, storage, k)
            part = slice_rows(storage, start, k, small)
            check_sums(gradient, rows, part, of_gradient=True)


def slice_rows(
    storage: Storage, start: int, k: int, like: QuantizedTensor
) -> QuantizedTensor:
    """32 rows as a tensor of their own, with the codebooks of ``like``."""

    def of(part: Tensor, per_part: int) -> Tensor:
        return part[start * k // per_part : (start + 32) * k // per_part].clone()

    scales = dataclasses.replace(
        like.scales,
        packed=of(storage.scales, 64),
        scales=of(storage.nested_scales, 64 * 256),
    )
    return dataclasses.replace(like, packed=of(storage.packed, 2), scales=scales)
