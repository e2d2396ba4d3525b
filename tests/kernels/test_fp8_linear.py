"""fp8_linear: quantised as e4m3 codes looked up one by one say, and multiplied as float64 does."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import DEVICE
from torch import Tensor

from sip_engine.kernels.fp8_linear import Fp8Weight, Recipe, fp8_linear, quantise

IMPLS = ("reference", "triton")
RECIPES: tuple[Recipe, ...] = ("current", "blockwise")


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def codes() -> list[float]:
    """All finite e4m3 numbers from 0 on, by the definition of the format: four exponent bits, three of mantissa."""
    found = [m / 8 * 2.0**-6 for m in range(8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return found


def nearest(x: Tensor) -> Tensor:
    """The nearest code to each float64, of two as near the even one."""
    known = torch.tensor(codes(), dtype=torch.float64)
    middles = (known[1:] + known[:-1]) / 2
    size = x.abs().contiguous()
    below = torch.searchsorted(middles, size)
    tie = (below < len(middles)) & (middles[below.clamp(max=len(middles) - 1)] == size)
    return known[below + (tie & (below % 2 == 1))].copysign(x)


def quantised(x: Tensor, rows: int, columns: int, power_of_two: bool) -> Tensor:
    """What values come back as, float64, block by block."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            block = x[top : top + rows, left : left + columns]
            largest = float(block.abs().max())
            scale = 448.0 / largest if largest else 1.0
            scale = 2.0 ** math.floor(math.log2(scale)) if power_of_two else torch.tensor(scale).item()
            at = (block * scale).double()  # rounded to float32 before it is a code
            out[top : top + rows, left : left + columns] = nearest(at) / scale
    return out


def test_values_are_rounded_to_the_nearest_code_of_their_block():
    x = torch.randn(5, 9) * torch.logspace(-3, 3, 9)
    x[:2, :4] = 0.0
    x[4, 8] = -448.0
    for block, power_of_two in (((5, 9), False), ((1, 4), True), ((2, 3), True)):
        values, scale = quantise(x, block, power_of_two=power_of_two)
        spread = scale.repeat_interleave(block[0], 0)[:5].repeat_interleave(block[1], 1)[:, :9]
        want = quantised(x, *block, power_of_two)
        torch.testing.assert_close(values.double() * spread.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("rows", "inner", "outputs"), ((1, 16, 5), (19, 256, 130), (40, 144, 128)))
def test_equals_float64(impl: str, recipe: Recipe, rows: int, inner: int, outputs: int):
    x = torch.randn(rows, inner) * torch.logspace(-2, 2, rows)[:, None]
    x[0, : inner // 2] = 0.0
    size_of = torch.logspace(-3, 0, outputs)[:, None] * torch.logspace(
        0, 2, inner
    )  # a block's scale is its own
    matrix, bias = torch.randn(outputs, inner) * size_of, torch.randn(outputs)
    weight = Fp8Weight.like(matrix, recipe)
    weight.take(matrix)
    side = 128 if recipe == "blockwise" else max(outputs, inner)
    w = quantised(matrix, side, side, recipe == "blockwise")
    rows_as = quantised(x, 1, 128, True) if recipe == "blockwise" else x.double()
    exact = rows_as @ w.T
    for given in (None, bias):
        want = exact if given is None else exact + given.double()
        found = fp8_linear(x, weight, given, impl=impl)  # pyright: ignore[reportArgumentType]
        size = rows_as.abs() @ w.abs().T + 1
        assert ((found.double() - want).abs() / size).max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_depends_on_itself_alone(impl: str, recipe: Recipe):
    x, matrix = torch.randn(3, 128), torch.randn(16, 128)
    weight = Fp8Weight.like(matrix, recipe)
    weight.take(matrix)
    alone = fp8_linear(x[:1], weight, impl=impl)  # pyright: ignore[reportArgumentType]
    x[1:] *= 1000.0
    beside = fp8_linear(x, weight, impl=impl)[:1]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(alone, beside, rtol=1e-6, atol=1e-6)


def test_scales_at_the_edges_of_a_power_of_two():
    """The kernel finds them from bits, the reference by dividing; 448, the next numbers, tiny and huge ones."""
    edges = torch.tensor([448.0, 447.9999, 448.0001, 224.0, 1.75, 1.7500001, 1e-38, 1e-42, 3e38, 0.0])
    # Below the smallest step of a scale, and halfway between two codes: what a scale twice as large rounds otherwise.
    parts = (1.0, 1.3e-5, 17 / 448, 19 / 448)
    x = torch.zeros(len(edges), 128)
    x[:, : len(parts)] = edges[:, None] * torch.tensor(parts)
    weight = Fp8Weight.like(torch.zeros(16, 128), "blockwise")
    weight.take(torch.eye(16, 128))
    found = [fp8_linear(x, weight, impl=impl) for impl in ("reference", "triton")]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_named():
    weight = Fp8Weight.like(torch.zeros(4, 16), "current")
    with pytest.raises(ValueError, match=r"x \[2, 8\] must be \[M, K\] for a matrix of \[4, 16\]"):
        fp8_linear(torch.zeros(2, 8), weight)
