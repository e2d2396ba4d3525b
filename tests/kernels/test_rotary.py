"""rotary turns the pairs (x1 + i x2) of a head by e^(i angle), each token by the angles of its own position."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, rounding_error
from torch import Tensor

from sip_engine.kernels.rotary import rotary, rotate_pair

IMPLS = ("reference", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_POSITIONS = 50


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def make_tables(dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(NUM_POSITIONS, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def exact(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[2] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    return torch.cat([turned.real, turned.imag], dim=2)


def assert_rounded_once(y: Tensor, expected: Tensor, impl: str) -> None:
    """`y` is `expected` computed in float32 and rounded; two products of up to 5 may cancel."""
    torch.testing.assert_close(y.double(), expected, rtol=rounding_error(y.dtype, impl), atol=3 * 5 * 2**-24)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "dim"), ((1, 1, 2), (7, 3, 6), (4, 17, 80), (5, 16, 64), (0, 2, 8), (3, 0, 8))
)
def test_equals_complex_product(impl, dtype, num_tokens, num_heads, dim):
    x = torch.randn(num_tokens, num_heads, dim).to(dtype)
    positions = torch.randint(NUM_POSITIONS, (num_tokens,))
    cos, sin = make_tables(dim)
    y = rotary(x, cos, sin, positions, impl=impl)
    assert y.dtype == dtype and y.is_contiguous()
    assert_rounded_once(y, exact(x, cos, sin, positions), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_reads_views(impl):
    """Queries and keys are slices of one projection, which stays as it is."""
    mixed = torch.randn(6, 5, 24)
    q, k, v = mixed[:, :3], mixed[:, 3:4], mixed[:, 4:]
    before, (cos, sin) = mixed.clone(), make_tables(24)
    positions = torch.tensor([49, 0, 7, 7, 1, 30])
    expected = exact(before, cos, sin, positions)
    assert_rounded_once(rotary(q, cos, sin, positions, impl=impl), expected[:, :3], impl)
    assert torch.equal(mixed, before)
    assert_rounded_once(rotary(k, cos, sin, positions, impl=impl), expected[:, 3:4], impl)
    assert torch.equal(mixed, before) and torch.equal(v, before[:, 4:])


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_of_any_stride(impl):
    cos, sin = (table.T.contiguous().T for table in make_tables(8))
    positions = torch.tensor([3, 3, 5, 5, 9, 9])[::2]
    x = torch.randn(2, 3, 8).transpose(0, 1)
    assert_rounded_once(rotary(x, cos, sin, positions, impl=impl), exact(x, cos, sin, positions), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_products_depend_on_the_distance_only(impl):
    q, k = torch.randn(2, 1, 1, 16)
    cos, sin = make_tables(16)
    products = [
        (
            rotary(q, cos, sin, torch.tensor([p + 11]), impl=impl)
            * rotary(k, cos, sin, torch.tensor([p]), impl=impl)
        ).sum()
        for p in (0, 5, 38)
    ]
    torch.testing.assert_close(products[1:], products[:1] * 2, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_pair(impl):
    x, (cos, sin) = torch.randn(2, 2, 8), make_tables(8)
    positions = torch.tensor([4, 9])
    y = rotary(x, cos, sin, positions, impl=impl)
    x[1, 0, 6] = torch.nan
    broken = rotary(x, cos, sin, positions, impl=impl)
    assert broken[1, 0, [2, 6]].isnan().all() and broken.isnan().sum() == 2
    assert torch.equal(broken.nan_to_num(0.0), torch.where(broken.isnan(), 0.0, y))


def test_offsets_beyond_two_to_the_31_elements_are_not_truncated():
    """Memory between the tokens is never touched, so never resident."""
    far = torch.empty(2**31 + 32, dtype=torch.float16).as_strided((3, 1, 16), (2**30 + 8, 16, 1))
    far.copy_(torch.randn(3, 1, 16))
    cos, sin = make_tables(16)
    positions = torch.tensor([1, 2, 3])
    expected = exact(far, cos, sin, positions)
    assert_rounded_once(rotary(far, cos, sin, positions, impl="triton"), expected, "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": torch.zeros(3, 8)}, r"\[3, 8\]"),
        ({"x": torch.zeros(3, 2, 10)}, r"\[3, 2, 10\]"),
        ({"sin": torch.zeros(9, 4)}, r"sin \[9, 4\]"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions .* int64 \[3\]"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "int32"),
        ({"impl": "cuda"}, "'reference', 'triton'"),
    ),
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.zeros(3, 2, 8),
        "cos": torch.zeros(NUM_POSITIONS, 4),
        "sin": torch.zeros(NUM_POSITIONS, 4),
        "positions": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        rotary(**(arguments | change))


def test_kernel_refuses_split_heads():
    cos, sin = make_tables(8)
    x = torch.zeros(3, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="last stride"):
        rotary(x, cos, sin, torch.tensor([0, 1, 2]), impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "dim"), ((7, 3, 1, 6), (4, 17, 17, 80), (5, 32, 8, 64), (0, 2, 1, 8))
)
def test_a_pair_is_turned_and_its_gradient_turned_back(impl, dtype, num_tokens, heads, kv_heads, dim):
    """Queries and keys are strided views of one projection; conj(e^(i angle)) is the transpose of e^(i angle)."""
    mixed = torch.randn(num_tokens, heads + kv_heads + 2, dim).to(dtype)
    q = mixed[:, 1 : heads + 1].detach().requires_grad_()
    k = mixed[:, heads + 1 : -1].detach().requires_grad_()
    cos, sin = make_tables(dim)
    positions = torch.randint(NUM_POSITIONS, (num_tokens,))
    found = rotate_pair(q, k, cos[positions], sin[positions], impl=impl)
    gradients = [torch.randn_like(y) for y in found]
    torch.autograd.backward(found, gradients)
    for x, y, gradient in zip((q, k), found, gradients, strict=True):
        assert y.is_contiguous() and y.dtype == dtype and x.grad is not None
        assert_rounded_once(y.detach(), exact(x.detach(), cos, sin, positions), impl)
        assert_rounded_once(x.grad, exact(gradient, cos, -sin, positions), impl)


def test_gradients_of_a_pair_in_float64():
    cos, sin = (table[:3].double() for table in make_tables(6))
    q, k = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    assert torch.autograd.gradcheck(lambda q, k: rotate_pair(q, k, cos, sin), (q, k))


def test_pairs_that_do_not_fit_are_named():
    table = torch.zeros(2, 4)
    q, k = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8)
    for arguments in ((q, k[:1], table, table), (q, k.double(), table, table), (q, k, table, table[:, :3])):
        with pytest.raises(ValueError, match=r"\[N, heads, D\] and \[N, kv_heads, D\] of one dtype"):
            rotate_pair(*arguments)
