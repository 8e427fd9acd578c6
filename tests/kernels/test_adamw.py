"""update_pages against float64, torch's optimizers and the block-wise reference."""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lib.kernels import adamw
from qlora_lib.kernels.adamw import search_tree, state_tables, update_pages
from qlora_lib.kernels.parameter_table import (
    PROGRAM,
    STATE_CODEBOOKS,
    ParameterTable,
)
from qlora_lib.numerics import DYNAMIC8, Codebook
from qlora_lib.numerics.blockwise import (
    absmax_scales,
    dequantize_blockwise,
    quantize_blockwise,
)
from qlora_lib.optim.update import Factors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_BITS = [32, 8]
CODEBOOKS = list(STATE_CODEBOOKS.values())
# Several in a program's worth of pages, one over three pages, with every remainder.
COUNTS = [1, 5000, 255, 257, 2048, 2049]
FACTORS = Factors.of_step(3, 1e-3, (0.9, 0.999), 1e-8, 0.01)
OTHER_FACTORS = Factors.of_step(1000, 0.05, (0.8, 0.95), 1e-3, 0.3)
UNIT = 2.0**-24
TINY = 2.0**-149
# The bytes of pages wherever nothing is kept: small numbers, or the last code of
# all and NaN for scales.
FILLING = {32: 0x2B, 8: 0xFF}


def normal(count: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, generator=generator)


class Slab:
    """Parameters and gradients of a type, and pages with their state, on a device.

    Every page is a tensor of its own. Padding behind the numbers of a parameter, and
    behind those of the last one, keeps the bytes that all of it is filled with.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        factors: Sequence[Factors],
        device: str,
        state_bits: int = 32,
        page_programs: int = 2,
        filling: int | None = None,
    ) -> None:
        self.parameters = [each.clone().to(device) for each in parameters]
        self.gradients = [
            None if each is None else each.clone().to(device) for each in gradients
        ]
        self.factors, self.device, self.bits = factors, device, state_bits
        self.page_size = page_programs * PROGRAM
        programs = [-(-each.numel() // PROGRAM) for each in parameters]
        self.first = [sum(programs[:i]) for i in range(len(programs))]
        self.parameter_of = [i for i, n in enumerate(programs) for _ in range(n)]
        self.parameter_of += [-1] * (-len(self.parameter_of) % page_programs)
        self.page_count = len(self.parameter_of) // page_programs
        page_bytes = self.page_size * (8 if state_bits == 32 else 2) + (
            0 if state_bits == 32 else self.page_size // 256 * 8
        )
        self.filling = FILLING[state_bits] if filling is None else filling
        self.pages = [
            torch.full((page_bytes,), self.filling, dtype=torch.uint8, device=device)
            for _ in range(self.page_count)
        ]

    def update(
        self, pages: Sequence[int] | None = None, aligned: bool = False
    ) -> "Slab":
        pages = range(self.page_count) if pages is None else pages

        def table(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        addresses = [
            [each.data_ptr() for each in self.parameters],
            [0 if each is None else each.data_ptr() for each in self.gradients],
        ]
        update_pages(
            table(list(pages), torch.int32),
            table([self.pages[i].data_ptr() for i in pages], torch.int64),
            ParameterTable(
                table(self.parameter_of, torch.int32),
                table(self.first, torch.int64),
                table([each.numel() for each in self.parameters], torch.int64),
                table(addresses, torch.int64),
                table(self.factors, torch.float64).T.contiguous(),
            ),
            self.parameters[0].dtype,
            self.page_size,
            self.bits,
            aligned,
        )
        return self

    def views(self, kind: int) -> list[Tensor]:
        """Of each page the numbers or codes of moment 0 or 1, or its scales, 2 or 3."""
        size = self.page_size
        if self.bits == 32:
            return [
                page.view(torch.float32)[kind * size :][:size] for page in self.pages
            ]
        if kind < 2:
            return [page[kind * size :][:size] for page in self.pages]
        scales = [page[2 * size :].view(torch.float32) for page in self.pages]
        return [each[(kind - 2) * size // 256 :][: size // 256] for each in scales]

    def read(self, kind: int, parameter: int) -> Tensor:
        """What belongs to a parameter, on the CPU."""
        step = 1 if self.bits == 32 or kind < 2 else 256
        start = self.first[parameter] * PROGRAM // step
        stop = start + -(-self.parameters[parameter].numel() // step)
        return torch.cat(self.views(kind))[start:stop].cpu()

    def state(self, parameter: int) -> list[Tensor]:
        """All that belongs to a parameter: two moments, or codes and scales of each."""
        return [
            self.read(kind, parameter) for kind in range(2 if self.bits == 32 else 4)
        ]

    def write(self, kind: int, parameter: int, values: Tensor) -> None:
        step = 1 if self.bits == 32 or kind < 2 else 256
        start = self.first[parameter] * PROGRAM // step
        line = torch.cat(self.views(kind))
        line[start : start + len(values)] = values.to(line)
        for view, part in zip(
            self.views(kind), line.split(len(line) // self.page_count), strict=True
        ):
            view.copy_(part)

    def moment(self, kind: int, parameter: int) -> Tensor:
        """float32, dequantized by the reference."""
        if self.bits == 32:
            return self.read(kind, parameter)
        codes, scales = self.read(kind, parameter), self.read(kind + 2, parameter)
        return dequantize_blockwise(codes, scales, CODEBOOKS[kind].values, 256)

    def set_moments(self, parameter: int, *moments: Tensor) -> None:
        for kind, moment in enumerate(moments):
            if self.bits == 32:
                self.write(kind, parameter, moment)
                continue
            scales = absmax_scales(moment, 256)
            codes = quantize_blockwise(moment, scales, CODEBOOKS[kind], 256)
            self.write(kind, parameter, codes)
            self.write(kind + 2, parameter, scales)

    def results(self) -> list[Tensor]:
        """All bytes that a step may change."""
        parameters = [each.view(torch.uint8) for each in self.parameters]
        return [each.cpu() for each in [*parameters, *self.pages]]


def random_slab(
    counts: Sequence[int],
    device: str,
    dtype: torch.dtype = torch.float32,
    state_bits: int = 32,
    **rest: Any,
) -> Slab:
    """Parameters with magnitudes and factors of their own, and moments as of a run."""
    parameters, gradients = [], []
    for seed, count in enumerate(counts):
        parameters.append(normal(count, seed, 10.0 ** (seed % 4 - 2)).to(dtype))
        gradients.append(normal(count, 100 + seed, 10.0 ** -(seed % 3)).to(dtype))
    factors = list(
        itertools.islice(itertools.cycle([FACTORS, OTHER_FACTORS]), len(counts))
    )
    slab = Slab(parameters, gradients, factors, device, state_bits, **rest)
    for seed, count in enumerate(counts):
        scale = 10.0 ** -(seed % 3)
        exp_avg = normal(count, 200 + seed, 0.3 * scale)
        slab.set_moments(seed, exp_avg, normal(count, 300 + seed, scale).square())
    return slab


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reference(
    parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor, factors: Factors
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameter and moments after a step in float64, and the bound of their errors.

    ``u = 2**-24`` is the largest relative error of rounding to float32. Each operation
    of the kernel adds ``u`` times its result, each factor enters with an error of ``u``
    of itself, and errors of operands pass on by the derivative. Fused multiplications
    and additions round once, but not in the interpreter, so products count as rounded.

    - ``w (g - m)``: factor, difference and product ``3 u``; the sum ``u m'``.
    - ``v``: ``b2 v`` rounds once, ``w2 g g`` with its factor three times. Of ``b2``
      the kernel has the rest, so its error of ``u**2`` does not count; the products
      with that rest, below ``u v``, lie within the slack, their sum with ``w2 g g``
      adds ``u w2 g g``.
    - ``r = sqrt(v')``: ``|sqrt(a) - sqrt(b)| <= |a - b| / sqrt(b)`` and
      ``<= sqrt(|a - b|)``; then ``u r``.
    - ``d = r / c + eps``: ``r``'s error divided by ``c``, factor and quotient ``2 u
      r / c``, factor ``u eps``, sum ``u d``.
    - ``q = m' / d``: ``(error of m' + q error of d) / d + u q``.
    - ``p'``: ``p s`` with factor and product ``2 u``, sum ``u``; ``step q`` with factor
      and product ``2 u``; the sum ``u p'``, and half a unit of the type at the end.

    Second-order terms are below 2 % of all that. Below the normal numbers an operation
    adds up to ``TINY / 2`` instead, which the factor that follows may enlarge.
    """
    p, g, m, v = (each.double() for each in (parameter, gradient, m, v))
    f = factors
    shrink = (1 - f.decay) * p
    p1 = p - shrink
    step_m = f.beta1_complement * (g - m)
    m1 = m + step_m
    square = f.beta2_complement * g * g
    v1 = f.beta2 * v + square
    d = v1.sqrt() / f.root_correction + f.eps
    q = m1 / d
    p2 = p1 - f.step_size * q

    error_m = 3 * UNIT * step_m.abs() + UNIT * m1.abs() + 2 * TINY
    error_v = UNIT * (f.beta2 * v + 4 * square + v1) + TINY * (3 + g.abs())
    root = v1.sqrt()
    error_root = torch.minimum(error_v / root, error_v.sqrt()) + UNIT * root
    quotient = root / f.root_correction
    error_d = (
        error_root / f.root_correction + UNIT * (2 * quotient + f.eps + d) + 2 * TINY
    )
    error_q = (error_m + q.abs() * error_d) / d + UNIT * q.abs() + TINY
    error_p = UNIT * (2 * shrink.abs() + p1.abs() + 2 * f.step_size * q.abs())
    error_p += f.step_size * error_q + UNIT * p2.abs() + 3 * TINY
    bounds = [1.02 * each for each in (error_p, error_m, error_v)]
    if parameter.dtype != torch.float32:
        info = torch.finfo(parameter.dtype)
        bounds[0] += info.eps / 2 * (p2.abs() + bounds[0]) + info.smallest_normal
    return [p2, m1, v1], bounds


def check_step(slab: Slab, aligned: bool = False) -> None:
    """One update of 32-bit state stays within the bounds, element by element."""
    before = [
        (p.cpu().clone(), slab.moment(0, i), slab.moment(1, i))
        for i, p in enumerate(slab.parameters)
    ]
    slab.update(aligned=aligned)
    for i, (p, m, v) in enumerate(before):
        gradient = slab.gradients[i]
        assert gradient is not None
        exact, bounds = reference(p, gradient.cpu(), m, v, slab.factors[i])
        actual = slab.parameters[i].cpu(), slab.moment(0, i), slab.moment(1, i)
        for name, a, e, bound in zip("pmv", actual, exact, bounds, strict=True):
            error = (a.double() - e).abs()
            assert bool((error <= bound).all()), (i, name, (error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_bound_of_float64(dtype, device):
    check_step(random_slab(COUNTS, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_bound_if_aligned(dtype, device):
    check_step(random_slab([8, 2040, 4096, 2056], device, dtype), aligned=True)


def test_the_bound_is_tight(device):
    """It would see an error of a few units in the last place."""
    slab = random_slab([2048], device)
    p, g = slab.parameters[0].cpu(), slab.gradients[0].cpu()
    exact, bounds = reference(p, g, slab.moment(0, 0), slab.moment(1, 0), FACTORS)
    for result, bound in zip(exact, bounds, strict=True):
        assert float((bound / (UNIT * result.abs())).median()) < 8


@pytest.mark.parametrize("state_bits", STATE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_changes_no_bit(dtype, state_bits, device):
    counts = [8, 2040, 4096, 2056]
    aligned = random_slab(counts, device, dtype, state_bits).update(aligned=True)
    other = random_slab(counts, device, dtype, state_bits).update(aligned=False)
    assert same(aligned.results(), other.results())


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_does(dtype, device):
    """Over some steps; narrow parameters are rounded after each, as is theirs here."""
    count, steps, settings = 3000, 4, (1e-2, (0.9, 0.999), 1e-8, 0.1)
    slab = Slab([normal(count, 1).to(dtype)], [None], [FACTORS], device)
    slab.set_moments(0, torch.zeros(count), torch.zeros(count))
    theirs = slab.parameters[0].cpu().float().requires_grad_()
    lr, betas, eps, decay = settings
    optimizer = torch.optim.AdamW(
        [theirs], lr=lr, betas=betas, eps=eps, weight_decay=decay, foreach=False
    )
    for step in range(1, steps + 1):
        gradient = normal(count, 50 + step).to(dtype)
        slab.gradients = [gradient.to(device)]
        slab.factors = [Factors.of_step(step, *settings)]
        slab.update()
        theirs.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            theirs.copy_(theirs.to(dtype))
        # A number close to the middle between two of the type may go either way.
        apart = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        actual = slab.parameters[0].cpu().float()
        torch.testing.assert_close(actual, theirs.detach(), rtol=apart, atol=1e-6)
        if dtype != torch.float32:
            assert float((actual != theirs).float().mean()) < 0.01
        with torch.no_grad():
            theirs.copy_(actual)
    state = optimizer.state[theirs]
    close = {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(slab.moment(0, 0), state["exp_avg"], **close)
    torch.testing.assert_close(slab.moment(1, 0), state["exp_avg_sq"], **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_have_the_bits_of_the_reference(dtype, device):
    """Those of float32 moments from the 32-bit kernel, quantized by numerics.

    Between the parameters lie the largest codes, and NaN for scales.
    """
    narrow = random_slab(COUNTS, device, dtype, 8)
    wide = Slab(
        [each.cpu() for each in narrow.parameters],
        [None if each is None else each.cpu() for each in narrow.gradients],
        narrow.factors,
        device,
    )
    for i in range(len(COUNTS)):
        wide.set_moments(i, narrow.moment(0, i), narrow.moment(1, i))
    for each in (narrow, wide):
        each.update()
    for i in range(len(COUNTS)):
        assert torch.equal(narrow.parameters[i], wide.parameters[i])
        for kind, codebook in enumerate(CODEBOOKS):
            moment = wide.moment(kind, i)
            scales = absmax_scales(moment, 256)
            assert torch.equal(narrow.read(kind + 2, i), scales)
            codes = quantize_blockwise(moment, scales, codebook, 256)
            assert torch.equal(narrow.read(kind, i), codes)


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_the_search_is_that_of_the_codebook(codebook: Codebook):
    """At every value, boundary and neighbor of one, and at both zeros."""
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    points = torch.cat([codebook.values, codebook.boundaries, torch.zeros(1)])
    points = torch.cat([points, points.nextafter(up), points.nextafter(down), -points])
    tree, node = search_tree(codebook), torch.ones(len(points), dtype=torch.int64)
    assert sorted(tree[1:].tolist()) == codebook.boundaries.tolist()
    for _ in range(8):
        node = 2 * node + (points > tree[node])
    assert torch.equal((node - 256).to(torch.uint8), codebook.nearest(points))
    kind = CODEBOOKS.index(codebook)
    tables = state_tables(torch.device("cpu"))[kind]
    assert torch.equal(tables, torch.stack([codebook.values, tree]))


@pytest.mark.parametrize("sign", [1, -1])
def test_8_bits_around_every_boundary(sign, device):
    """Moments that a step leaves as they are, at the boundaries of the codes."""
    boundaries = DYNAMIC8.boundaries * sign
    blocks = [torch.cat([boundaries, torch.ones(1)])]
    for end in (2.0, -2.0):
        near = boundaries.nextafter(torch.tensor(end))
        blocks.append(torch.cat([near, torch.ones(1)]))
    gradient = torch.cat(blocks)
    still = FACTORS._replace(beta1_complement=1.0, decay=1.0)
    slab = Slab([torch.zeros(len(gradient))], [gradient], [still], device, 8)
    slab.set_moments(0, torch.zeros(len(gradient)), torch.zeros(len(gradient)))
    slab.update()
    expected = quantize_blockwise(gradient, torch.ones(3), DYNAMIC8, 256)
    assert slab.read(2, 0).tolist() == [1, 1, 1]
    assert torch.equal(slab.read(0, 0), expected)


def test_the_smallest_scale(device):
    """The smallest normal number is one; of less, a block keeps zeros."""
    smallest = torch.tensor(2.0**-126)
    gradient = torch.zeros(512)
    gradient[3], gradient[300] = smallest, smallest.nextafter(torch.tensor(0.0))
    still = FACTORS._replace(beta1_complement=1.0)
    slab = Slab([torch.zeros(512)], [gradient], [still], device, 8)
    slab.set_moments(0, torch.zeros(512), torch.zeros(512))
    slab.update()
    assert slab.read(2, 0).tolist() == [float(smallest), 0]
    assert slab.moment(0, 0).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("state_bits", STATE_BITS)
def test_what_lies_behind_the_numbers(state_bits, device):
    """Unused programs keep their bytes, and padding does not reach a number."""
    slabs = [
        random_slab(
            [3, 2049], device, state_bits=state_bits, page_programs=4, filling=filling
        )
        for filling in (None, 0x7F)
    ]
    for slab in slabs:
        # First moments become so small that padding would be the largest of a block.
        slab.factors = [FACTORS._replace(beta1_complement=0.5)] * 2
        slab.gradients = [-slab.moment(0, i).to(device) for i in range(2)]
        slab.update()
        for kind in (0, 1):
            unused = slab.views(kind)[0][3 * PROGRAM :].view(torch.uint8)
            assert bool((unused == slab.filling).all())
    one, other = slabs
    for i in range(2):
        assert torch.equal(one.parameters[i], other.parameters[i])
        assert same(one.state(i), other.state(i))


@pytest.mark.parametrize("state_bits", STATE_BITS)
def test_without_a_gradient_nothing_changes(state_bits, device):
    counts = [2049, 300, 4096]
    slab = random_slab(counts, device, state_bits=state_bits)
    slab.gradients[1] = None
    before = slab.state(1), slab.parameters[1].clone()
    slab.update()
    assert same(slab.state(1), before[0])
    assert torch.equal(slab.parameters[1], before[1])
    complete = random_slab(counts, device, state_bits=state_bits).update()
    assert not same(complete.state(1), before[0])
    for i in (0, 2):
        assert torch.equal(slab.parameters[i], complete.parameters[i])
        assert same(slab.state(i), complete.state(i))


@pytest.mark.parametrize("state_bits", STATE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_are_not_aligned(dtype, state_bits, device):
    """Tensors in the middle of others, whose neighbors stay as they are."""
    count = 2500
    expected = random_slab([count], device, dtype, state_bits)
    slab = random_slab([count], device, dtype, state_bits)
    around = torch.full((count + 8,), 7.0, dtype=dtype, device=device)
    around[1:-7] = slab.parameters[0]
    slab.parameters[0] = around[1:-7]
    gradient = torch.full((count + 8,), math.nan, dtype=dtype, device=device)
    gradient[3:-5] = slab.gradients[0]
    slab.gradients[0] = gradient[3:-5]
    slab.update()
    expected.update()
    assert bool((around[:1] == 7).all()) and bool((around[-7:] == 7).all())
    assert same(slab.results(), expected.results())


@pytest.mark.parametrize("state_bits", STATE_BITS)
def test_launches_may_be_cut_and_ordered_anyhow(state_bits, device):
    counts = [5000, 300, 4097, 2049]
    at_once = random_slab(counts, device, state_bits=state_bits).update()
    assert at_once.page_count == 5
    for launches in ([[4, 1, 0, 3, 2]], [[2], [0], [1], [4], [3]], [[3, 0], [1, 2, 4]]):
        slab = random_slab(counts, device, state_bits=state_bits)
        for pages in launches:
            slab.update(pages)
        assert same(slab.results(), at_once.results())
    part = random_slab(counts, device, state_bits=state_bits)
    kept = [page.clone() for page in part.pages]
    part.update([1, 3])
    for page in range(5):
        is_done = torch.equal(part.pages[page], at_once.pages[page])
        assert is_done == (page in (1, 3))
        assert is_done or torch.equal(part.pages[page], kept[page])


def test_no_page_is_no_work(device):
    slab = random_slab([3000], device)
    before = slab.results()
    assert same(slab.update([]).results(), before)


def quietly(action: Callable[[], object]) -> None:
    """NumPy, which the interpreter computes with, warns of what is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        action()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_gradients_stay_where_they_are(dtype, bad, device):
    slab = random_slab([3000], device, dtype)
    slab.gradients[0][[5, 2900]] = bad
    quietly(slab.update)
    expected = torch.zeros(3000, dtype=torch.bool)
    expected[[5, 2900]] = True
    # As in torch: inf / inf.
    assert torch.equal(slab.parameters[0].isnan().cpu(), expected)
    for kind in (0, 1):
        assert torch.equal(~slab.moment(kind, 0).isfinite(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradients_spoil_their_block_of_8_bits(bad, device):
    slab = random_slab([3000], device, state_bits=8)
    good = random_slab([3000], device, state_bits=8).update()
    slab.gradients[0][600] = bad
    quietly(slab.update)
    bad_block = torch.arange(12) == 2
    for kind in (0, 1):
        scales = slab.read(kind + 2, 0)
        assert torch.equal(~scales.isfinite(), bad_block)
        assert math.isnan(bad) == bool(scales.isnan().any())
        is_nan = slab.moment(kind, 0)[512:768].isnan()
        is_nan[600 - 512] |= math.isinf(bad)  # may be infinite still
        assert bool(is_nan.all())
        codes, expected = slab.read(kind, 0), good.read(kind, 0)
        assert torch.equal(codes[:512], expected[:512])
        assert torch.equal(codes[768:], expected[768:])
    # In this step only the number itself, in the next all of its block.
    assert slab.parameters[0].isnan().nonzero().tolist() == [[600]]
    slab.gradients[0][600] = 0
    quietly(slab.update)
    spoiled = torch.arange(3000) // 256 == 2
    assert torch.equal(slab.parameters[0].isnan().cpu(), spoiled)


def test_a_second_moment_that_overflowed_stays_infinite(device):
    """As in torch, where such a parameter stands still, if beta2 rounds up or down."""
    for beta2 in (0.999, 0.95, 0.99, 0.5):
        factors = Factors.of_step(7, 1e-3, (0.9, beta2), 1e-8, 0.0)
        slab = Slab([torch.ones(4)], [torch.ones(4)], [factors], device)
        slab.set_moments(0, torch.ones(4), torch.full((4,), math.inf))
        quietly(slab.update)
        assert slab.moment(1, 0).tolist() == [math.inf] * 4
        assert slab.parameters[0].tolist() == [1] * 4


@pytest.mark.parametrize("state_bits", STATE_BITS)
def test_zeros(state_bits, device):
    """Zero gradients and moments: the parameter decays, and by nothing else."""
    zeros, parameter = torch.zeros(300), normal(300, 0)
    slab = Slab([parameter], [zeros], [FACTORS], device, state_bits)
    slab.set_moments(0, zeros, zeros)
    slab.update()
    exact = parameter.double() * FACTORS.decay
    error = (slab.parameters[0].cpu().double() - exact).abs()
    assert bool((error <= 1.01 * UNIT * exact.abs()).all())
    for kind in (0, 1):
        assert not slab.moment(kind, 0).any()
    slab.factors = [FACTORS._replace(decay=1.0)]
    before = slab.parameters[0].clone()
    slab.update()
    assert torch.equal(slab.parameters[0], before)


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -110, -70, -64])
def test_tiny_numbers(exponent, device):
    """Subnormal gradients, moments, and squares of gradients."""
    sizes = normal(600, 1).double()
    tiny = (sizes * 2.0**exponent).float()
    slab = Slab([normal(600, 2)], [tiny], [OTHER_FACTORS], device)
    slab.set_moments(0, tiny.flip(0), tiny.abs().roll(7))
    check_step(slab)
    narrow = Slab([normal(600, 2)], [tiny], [OTHER_FACTORS], device, 8)
    narrow.set_moments(0, torch.zeros(600), torch.zeros(600))
    narrow.update()
    wide = Slab([normal(600, 2)], [tiny], [OTHER_FACTORS], device)
    wide.set_moments(0, torch.zeros(600), torch.zeros(600))
    wide.update()
    for kind in (0, 1):
        scales = absmax_scales(wide.moment(kind, 0), 256)
        assert torch.equal(narrow.read(kind + 2, 0), scales)


def test_beta2_does_not_drift(device):
    """A constant gradient of 1 keeps v at 1: beta2 and its complement add up."""
    ones, factors = torch.ones(16), FACTORS
    slab = Slab([ones], [ones], [factors._replace(step_size=0.0)], device)
    slab.set_moments(0, ones, ones)
    for _ in range(50):
        slab.update()
    drift = (slab.moment(1, 0).double() - 1).abs().max()
    # Without the rest of beta2 it would be 50 * 1.3e-8.
    assert float(drift) < 3e-7


@pytest.mark.gpu
@pytest.mark.parametrize("state_bits", STATE_BITS)
def test_one_binary_for_any_number_of_pages(state_bits, monkeypatch):
    """Nor does it matter where in a longer list the launch's pages stand."""
    kernel, compiled = adamw.adamw_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *a, **k: compiled.append(kernel[grid](*a, **k))

    monkeypatch.setattr(adamw, "adamw_kernel", Recorder())
    for page_programs, counts in ((1, [5000]), (16, [5000, 70000]), (2, [9] * 16)):
        slab = random_slab(
            counts, "cuda", state_bits=state_bits, page_programs=page_programs
        )
        slab.update()
        for page in range(slab.page_count):
            slab.update([page])
    assert len(compiled) > 10
    assert all(each is compiled[0] for each in compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_no_less_accurate_than_fused(steps, weight_decay):
    """Errors of parameters and moments against float64, on the same data."""
    count, settings = 2**18, (1e-3, (0.9, 0.999), 1e-8, weight_decay)
    start = normal(count, 0)
    lr, betas, eps, decay = settings
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
    exact = start.double().cuda().requires_grad_()
    fused = start.cuda().requires_grad_()
    optimizers = [
        torch.optim.AdamW([exact], foreach=False, **options),
        torch.optim.AdamW([fused], fused=True, **options),
    ]
    slab = Slab([start], [None], [FACTORS], "cuda", page_programs=8)
    slab.set_moments(0, torch.zeros(count), torch.zeros(count))
    for step in range(1, steps + 1):
        gradient = normal(count, step).cuda()
        exact.grad, fused.grad = gradient.double(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        slab.gradients = [gradient]
        slab.factors = [Factors.of_step(step, *settings)]
        slab.update(aligned=True)
    states = [o.state[p] for o, p in zip(optimizers, (exact, fused), strict=True)]
    names = ("exp_avg", "exp_avg_sq")
    triples = [
        (exact, fused, slab.parameters[0]),
        *(
            (states[0][name], states[1][name], slab.moment(kind, 0).cuda())
            for kind, name in enumerate(names)
        ),
    ]
    for name, (truth, theirs, ours) in zip(("p", *names), triples, strict=True):
        their_error = (theirs.detach().double() - truth.detach()).abs()
        our_error = (ours.double() - truth.detach()).abs()
        print(f"{name}: mean {our_error.mean():.3e} of {their_error.mean():.3e}, ")
        print(f"max {our_error.max():.3e} of {their_error.max():.3e}")
        # Both round at the end: the largest of many errors is a matter of chance.
        assert float(our_error.mean()) <= 1.05 * float(their_error.mean())
        assert float(our_error.max()) <= 1.25 * float(their_error.max())


@pytest.mark.gpu
@pytest.mark.parametrize("state_bits", STATE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_pages(dtype, state_bits):
    """Page after page, and all at once, of 10 million numbers."""
    counts = [4096 * 1024, 5_000_003, 11, 1_000_000]
    rest = {"dtype": dtype, "state_bits": state_bits, "page_programs": 64}
    at_once = random_slab(counts, "cuda", **rest).update()
    one_by_one = random_slab(counts, "cuda", **rest)
    for page in reversed(range(one_by_one.page_count)):
        one_by_one.update([page])
    assert same(at_once.results(), one_by_one.results())
    if state_bits == 32:
        check_step(random_slab(counts, "cuda", **rest))


def test_8_bits_never_round_a_second_moment_to_zero(device):
    """A parameter whose next gradient is zero would jump: it is divided by the root."""
    gradient = torch.full((256,), 1e-4)
    gradient[0] = 1.0
    factors = [Factors.of_step(step, 1.0, (0.9, 0.999), 1e-8, 0.0) for step in (1, 2)]
    slab = Slab([torch.zeros(256)], [gradient], [factors[0]], device, 8)
    slab.set_moments(0, torch.zeros(256), torch.zeros(256))
    slab.update()
    assert slab.read(1, 0).tolist() == [255, *[1] * 255]
    after_one = slab.parameters[0].clone()
    slab.gradients[0].zero_()
    slab.factors = [factors[1]]
    slab.update()
    assert (slab.parameters[0] - after_one).abs().max() < 1
