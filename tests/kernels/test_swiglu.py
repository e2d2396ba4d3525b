"""swiglu equals the float64 formula, at any size and magnitude."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, rounding_error
from torch import Tensor

from sip_engine.kernels.swiglu import swiglu

IMPLS = ("reference", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def exact(x: Tensor) -> Tensor:
    gate, value = x.double().tensor_split(2, dim=1)
    return gate * value / (1 + (-gate).exp())


def assert_rounded_once(y: Tensor, expected: Tensor, impl: str) -> None:
    """`y` is `expected` computed in float32 (1e-6) and rounded; float16 has subnormals below 2^-14."""
    torch.testing.assert_close(y.double(), expected, rtol=rounding_error(y.dtype, impl) + 1e-6, atol=2**-25)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_columns"), ((1, 1), (5, 33), (3, 1025), (0, 8), (4, 0)))
def test_equals_float64(impl, dtype, num_rows, num_columns):
    x = (torch.randn(num_rows, 2 * num_columns) * 4).to(dtype)
    y = swiglu(x, impl=impl)
    assert y.dtype == dtype and y.shape == (num_rows, num_columns)
    assert_rounded_once(y, exact(x), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_and_left_alone(impl):
    wide = torch.randn(50, 50)
    before = wide.clone()
    for x in (wide[:, 3:9], wide[::3, :20], wide.T, wide[:, ::2][:, :24]):
        assert_rounded_once(swiglu(x, impl=impl), exact(x), impl)
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_extremes(impl):
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([-1e4, -100.0, -80.0, 1e4, 3e38, nan, 1.0, inf, inf, 0.0, -inf])
    value = torch.tensor([5.0, 1.0, 1e30, 2.0, 1.0, 1.0, nan, 1.0, 0.0, inf, 1.0])
    y = swiglu(torch.cat([gate, value])[None], impl=impl)[0]
    expected = torch.tensor([0.0, 0.0, -80.0 * 1e30 * torch.e**-80, 2e4, 3e38, nan, nan, inf, nan, nan, nan])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_offsets_beyond_two_to_the_31_elements_are_not_truncated():
    """Memory between the rows is never touched, so never resident."""
    far = torch.empty(2**31 + 32, dtype=torch.float16).as_strided((3, 16), (2**30 + 8, 1))
    far.copy_(torch.randn(3, 16))
    assert_rounded_once(swiglu(far, impl="triton"), exact(far), "triton")


@pytest.mark.parametrize(
    ("x", "impl", "message"),
    (
        (torch.zeros(2, 7), None, r"\[2, 7\]"),
        (torch.zeros(2, 2, 8), None, r"\[2, 2, 8\]"),
        (torch.zeros(2, 8), "cuda", "'reference', 'triton'"),
    ),
)
def test_bad_input_is_named(x, impl, message):
    with pytest.raises(ValueError, match=message):
        swiglu(x, impl=impl)
