"""rms_norm equals the float64 formula on the rounded sum, row by row, whatever the strides and the batch."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, rounding_error
from torch import Tensor

from sip_engine.kernels.rms_norm import rms_norm

IMPLS = ("reference", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def exact(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * weight.double() / (wide.pow(2).sum(1, keepdim=True) / x.shape[1] + EPS).sqrt()


def assert_rounded_once(y: Tensor, expected: Tensor, impl: str) -> None:
    """`y` is `expected` computed in float32 (5e-7) and rounded; float16 has subnormals below 2^-14."""
    torch.testing.assert_close(y.double(), expected, rtol=rounding_error(y.dtype, impl) + 5e-7, atol=2**-25)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size"), ((1, 1), (3, 7), (5, 130), (2, 1023)))
def test_equals_float64(impl, dtype, num_rows, hidden_size):
    x = (torch.randn(num_rows, hidden_size) * 3 + 1).to(dtype)
    weight = torch.randn(hidden_size).to(dtype)
    y = rms_norm(x, weight, EPS, impl=impl)
    assert y.dtype == dtype
    assert_rounded_once(y, exact(x, weight), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_rounded_before_the_norm(impl, dtype):
    x, residual = torch.randn(4, 77).to(dtype), torch.randn(4, 77).to(dtype)
    weight = torch.rand(77)  # float32, beside any dtype of x
    y, total = rms_norm(x, weight, EPS, residual=residual, impl=impl)
    torch.testing.assert_close(
        total.double(), x.double() + residual.double(), rtol=rounding_error(dtype, impl), atol=0
    )
    assert_rounded_once(y, exact(total, weight), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_and_left_alone(impl):
    wide = torch.randn(6, 100)
    before = wide.clone()
    for x in (wide[:, 3:40], wide[::2, :37], wide[:4, 5:].T[:37].T, wide.T[:37].T, wide.T[7:44, 1:5].T):
        residual = torch.randn(x.shape[1], x.shape[0]).T
        weight = torch.randn(2 * x.shape[1])[::2]
        assert_rounded_once(rms_norm(x, weight, EPS, impl=impl), exact(x, weight), impl)
        y, total = rms_norm(x, weight, EPS, residual=residual, impl=impl)
        assert torch.equal(total, x + residual)
        assert_rounded_once(y, exact(total, weight), impl)
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_knows_nothing_of_the_others(impl):
    x, residual, weight = torch.randn(5, 65), torch.randn(5, 65), torch.randn(65)
    y, _ = rms_norm(x, weight, EPS, residual=residual, impl=impl)
    x[1, 3], x[3, 64] = torch.nan, torch.inf
    broken, _ = rms_norm(x, weight, EPS, residual=residual, impl=impl)
    assert torch.equal(broken[[0, 2, 4]], y[[0, 2, 4]])
    assert broken[1].isnan().all()
    assert broken[3, 64].isnan() and (broken[3, :64] == 0).all()
    for row in (0, 2, 4):
        alone, _ = rms_norm(x[row : row + 1], weight, EPS, residual=residual[row : row + 1], impl=impl)
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_and_nothing(impl):
    assert (rms_norm(torch.zeros(2, 9), torch.ones(9), EPS, impl=impl) == 0).all()
    empty = torch.empty(0, 9)
    y, total = rms_norm(empty, torch.ones(9), EPS, residual=empty, impl=impl)
    assert y.shape == total.shape == (0, 9)


def test_offsets_beyond_two_to_the_31_elements_are_not_truncated():
    """Memory between the rows is never touched, so never resident."""
    far = torch.empty(2**31 + 32, dtype=torch.float16).as_strided((3, 16), (2**30 + 8, 1))
    far.copy_(torch.randn(3, 16))
    weight = torch.ones(16)
    y, total = rms_norm(far, weight, EPS, residual=far, impl="triton")
    assert torch.equal(total, far * 2)
    assert_rounded_once(y, exact(total, weight), "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": torch.zeros(2, 3, 8)}, r"\[2, 3, 8\]"),
        ({"weight": torch.zeros(7)}, r"weight \[7\]"),
        ({"residual": torch.zeros(2, 7)}, "residual is"),
        ({"residual": torch.zeros(2, 8, dtype=torch.bfloat16)}, "bfloat16"),
        ({"impl": "cuda"}, "'reference', 'triton'"),
    ),
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        rms_norm(**(arguments | change))
