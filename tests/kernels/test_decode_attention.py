"""decode_attention equals dense attention over prefix + suffix, whatever the pages, the groups and the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from sip_engine.kernels._triton import INTERPRETED
from sip_engine.kernels.decode_attention import SPLIT, compile_cases, decode_attention

IMPLS = ("reference", "triton", "triton_ungrouped")
FP8 = torch.float8_e4m3fn
# 16 bit: the weights and the output are rounded once each, and |v| < 5
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.float16: 2 * 5 * 2**-11,
    torch.bfloat16: 2 * 5 * 2**-8,
}
HALF = (
    torch.float16 if INTERPRETED else torch.bfloat16
)  # the interpreter multiplies bfloat16 bits as integers


@pytest.fixture(autouse=True)
def device_and_poison():
    """Seed, choose the device, and fill every torch.empty with NaN: outputs and partials start poisoned."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield
    torch.use_deterministic_algorithms(False)


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Pages:
    """Pages in shuffled order, all NaN until a token is written."""

    def __init__(self, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.k = torch.full((num_pages, page_size, num_kv_heads, head_dim), torch.nan).to(dtype)
        self.v = self.k.clone()
        self.free = torch.randperm(num_pages).tolist()

    def store(self, keys: Tensor, values: Tensor) -> list[int]:
        page_size = self.k.shape[1]
        table = [self.free.pop() for _ in range(-(-len(keys) // page_size))]
        for token in range(len(keys)):
            self.k[table[token // page_size], token % page_size] = keys[token].to(self.k.dtype)
            self.v[table[token // page_size], token % page_size] = values[token].to(self.v.dtype)
        return table


def padded(tables: list[list[int]]) -> Tensor:
    width = max([len(table) for table in tables]) + 1
    return int32([table + [-1] * (width - len(table)) for table in tables])


@dataclass(frozen=True)
class Batch:
    """Arguments of decode_attention, and the dense keys and values [n, H_kv, D] of every sequence."""

    arguments: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, impl: str, **options) -> Tensor:
        return decode_attention(**self.arguments, impl=impl, **options)


def make_batch(
    group_sizes, prefix_lens, suffix_lens, num_kv_heads=2, ratio=1, head_dim=32, page_size=16,
    dtype=torch.float32, page_dtype=None,
) -> Batch:  # fmt: skip
    def draw(length):
        keys_and_values = torch.randn(2, length, num_kv_heads, head_dim, dtype=torch.float64)
        return keys_and_values.to(page_dtype or dtype).double()  # what the pages can hold

    lens = (*prefix_lens, *suffix_lens)
    num_pages = sum(-(-length // page_size) for length in lens) + 3
    pages = Pages(num_pages, page_size, num_kv_heads, head_dim, page_dtype or dtype)
    prefixes, suffixes = [draw(n) for n in prefix_lens], [draw(n) for n in suffix_lens]
    arguments = {
        "q": torch.randn(len(suffix_lens), num_kv_heads * ratio, head_dim).to(dtype),
        "group_starts": int32([0, *accumulate(group_sizes)]),
        "prefix_tables": padded([pages.store(*prefix) for prefix in prefixes]),
        "prefix_lens": int32(prefix_lens),
        "suffix_tables": padded([pages.store(*suffix) for suffix in suffixes]),
        "suffix_lens": int32(suffix_lens),
        "k_pages": pages.k,
        "v_pages": pages.v,
    }
    group_of = [group for group, size in enumerate(group_sizes) for _ in range(size)]
    whole = [torch.cat((prefixes[group], suffixes[b]), 1) for b, group in enumerate(group_of)]
    return Batch(arguments, [w[0] for w in whole], [w[1] for w in whole])


def dense(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """softmax(scale * q K^T) V in float64, one sequence and one head at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        for head in range(q.shape[1] if len(k) else 0):
            kv_head = head // (q.shape[1] // k.shape[1])
            weights = (k[:, kv_head] @ q[b, head].double() * scale).softmax(0)
            out[b, head] = weights @ v[:, kv_head]
    return out


def assert_equals_dense(batch: Batch, impl: str, **options) -> None:
    q = batch.arguments["q"]
    expected = dense(q, batch.keys, batch.values, options.get("scale", q.shape[-1] ** -0.5))
    out = batch.run(impl, **options)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    (
        {"ratio": 1, "head_dim": 64, "page_size": 16},
        {"ratio": 2, "head_dim": 48, "page_size": 32},
        {"ratio": 4, "head_dim": 16, "page_size": 16, "num_kv_heads": 1},
        {"ratio": 8, "head_dim": 96, "page_size": 32, "dtype": HALF},
        {"ratio": 3, "head_dim": 128, "page_size": 128, "dtype": HALF},
    ),
)
def test_ragged_groups(impl, shape):
    """Odd prefix lengths, an empty suffix, an empty prefix, both empty, an empty group, one of one rollout."""
    suffix_lens = [5, 0, 33, 16, 1, 17, 0, 40]
    assert_equals_dense(make_batch([3, 0, 1, 3, 1], [37, 20, 1, 0, 64], suffix_lens, **shape), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_larger_than_a_tile(impl):
    """32 rollouts of 8 heads are 256 rows, more than any tile; they begin inside one, as do the 5 after them."""
    batch = make_batch([1, 32, 5], [19, 33, 48], [3] * 38, num_kv_heads=1, ratio=8, dtype=HALF)
    assert_equals_dense(batch, impl)


def test_any_tile_gives_the_same_result():
    batch = make_batch([1, 32, 5], [19, 33, 48], [3] * 38, num_kv_heads=1, ratio=2, dtype=HALF)
    for group_size in (1, 16, 32, 1000):
        assert_equals_dense(batch, "triton", group_size=group_size)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_prefix_of_several_splits(impl, dtype):
    """Prefixes that end inside, at the end of, and just behind a split."""
    prefix_lens = [SPLIT + 1, 2 * SPLIT, 7]
    assert_equals_dense(
        make_batch([2, 1, 1], prefix_lens, [9, 0, 2, 70], 1, 2, page_size=64, dtype=dtype), impl
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_prefix_page_at_all(impl):
    batch = make_batch([2], [0], [9, 17])
    arguments = batch.arguments | {"prefix_tables": torch.empty(1, 0, dtype=torch.int32)}
    assert_equals_dense(replace(batch, arguments=arguments), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_strided_queries(impl):
    batch = make_batch([2, 2], [20, 31], [4, 5, 6, 7], ratio=2)
    wide = torch.randn(4, 9, 32)
    arguments = batch.arguments | {"q": wide[:, ::2][:, :4]}
    assert_equals_dense(replace(batch, arguments=arguments), impl, scale=0.5)


def test_reference_keeps_float64():
    assert_equals_dense(make_batch([2, 1], [37, 20], [5, 0, 9], ratio=2, dtype=torch.float64), "reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sequence(impl):
    batch = make_batch([1], [5], [3])
    empty = {name: batch.arguments[name][:0] for name in ("q", "suffix_tables", "suffix_lens")}
    assert (
        decode_attention(**(batch.arguments | empty | {"group_starts": int32([0, 0])}), impl=impl).shape[0]
        == 0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_float8_pages(impl, dtype):
    """Exact against the dequantised values; within e4m3's rounding of the values before."""
    scales = {"k_scale": torch.tensor([0.03, 1.7]), "v_scale": torch.tensor([2.0, 0.011])}
    batch = make_batch([3, 2], [37, 70], [5, 0, 18, 9, 1], ratio=2, dtype=dtype, page_dtype=FP8)
    # the pages hold values / scale: choose values that are multiples of it
    keys = [k * scales["k_scale"][:, None].double() for k in batch.keys]
    values = [v * scales["v_scale"][:, None].double() for v in batch.values]
    q = batch.arguments["q"]
    expected = dense(q, keys, values, scale=0.2)
    out = batch.run(impl, scale=0.2, **scales)
    # float16 weights inside, output rounded to the dtype of q; relative to the size of the values
    size = 5 * scales["v_scale"].repeat_interleave(2)[:, None]
    assert ((out.double() - expected).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_float8_pages_err_by_their_rounding_only(impl):
    """Half a unit of e4m3 is 2^-4 of a value. With logits off by at most `delta`, weights are off by a factor
    within exp(+-2 delta), so |out - exact| <= (exp(2 delta) (1 + 2^-4) - 1) * sum of weights |v|."""
    batch = make_batch([3], [37], [5, 0, 18], ratio=2)
    arguments, one = dict(batch.arguments), torch.ones(2)
    for name in ("k_pages", "v_pages"):
        arguments[name] = arguments[name].to(FP8)
    q, scale, unit = arguments["q"], 0.1, 2.0**-4
    out = decode_attention(**arguments, scale=scale, k_scale=one, v_scale=one, impl=impl).double()
    exact = dense(q, batch.keys, batch.values, scale)
    size = dense(
        q, batch.keys, [v.abs() + 2**-6 for v in batch.values], scale
    )  # subnormals err by less than 2^-10
    for b, keys in enumerate(batch.keys):
        for head in range(q.shape[1]):
            delta = scale * unit * ((keys[:, head // 2].abs() + 2**-6) @ q[b, head].double().abs()).max()
            bound = (torch.exp(2 * delta) * (1 + unit) - 1) * size[b, head]
            error = (out[b, head] - exact[b, head]).abs()
            assert (error <= bound).all()
            assert error.max() > 1e-4  # the pages were rounded indeed


@pytest.mark.parametrize("impl", ("triton", "triton_ungrouped"))
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_a_sequence_does_not_depend_on_its_batch(impl, dtype):
    """Bitwise the same alone, beside its group, and in a batch of other groups with wider tables."""
    sizes, suffix_lens = [4, 9, 1], [(7 * b) % 40 for b in range(14)]
    batch = make_batch(sizes, [37, SPLIT + 40, 64], suffix_lens, 1, 2, page_size=32, dtype=dtype)
    together = batch.run(impl)
    arguments = batch.arguments
    starts = arguments["group_starts"].tolist()
    for group, b in ((0, 2), (1, 4), (1, 12), (2, 13)):
        pages_used = -(-int(arguments["prefix_lens"][group]) // 32)
        alone = arguments | {
            "group_starts": int32([0, 1]),
            "prefix_tables": arguments["prefix_tables"][group : group + 1, :pages_used],
            "prefix_lens": arguments["prefix_lens"][group : group + 1],
            **{name: arguments[name][b : b + 1] for name in ("q", "suffix_tables", "suffix_lens")},
        }
        assert starts[group] <= b < starts[group + 1]
        assert torch.equal(decode_attention(**alone, impl=impl)[0], together[b])


def test_true_nan_is_not_hidden():
    """A NaN in a visible key reaches every query that sees it, and no other."""
    for impl in IMPLS:
        batch = make_batch([2, 1], [20, 20], [3, 3, 3])
        first_page = batch.arguments["prefix_tables"][0, 0]
        batch.arguments["k_pages"][first_page, 5] = torch.nan
        out = batch.run(impl)
        assert out[:2].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q": torch.zeros(3, 3, 32)}, "q .*must be"),
        ({"q": torch.zeros(3, 32, 2).transpose(1, 2)}, "contiguous"),
        ({"group_starts": torch.zeros(2, dtype=torch.int32)}, "group_starts has shape"),
        ({"prefix_lens": torch.zeros(3, dtype=torch.int32)}, "prefix_lens has shape"),
        ({"suffix_lens": torch.zeros(2, dtype=torch.int32)}, "suffix_lens has shape"),
        ({"suffix_tables": torch.zeros(2, 5, dtype=torch.int32)}, "suffix_tables has shape"),
        ({"k_scale": torch.ones(2)}, "k_scale is given"),
        ({"impl": "flash"}, "'reference', 'triton', 'triton_ungrouped'"),
    ),
)
def test_bad_input_is_named(change, message):
    batch = make_batch([2, 1], [20, 20], [3, 3, 3])
    with pytest.raises(ValueError, match=message):
        decode_attention(**(batch.arguments | change))


def test_head_dims_beyond_the_kernels_are_refused():
    with pytest.raises(ValueError, match="at most 256"):
        make_batch([1], [3], [3], head_dim=288).run("triton")
    with pytest.raises(ValueError, match="float64"):
        make_batch([1], [3], [3], dtype=torch.float64).run("triton")


def test_every_case_names_its_arguments():
    for case in compile_cases():
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
