"""decode_attention equals dense attention over prefix + suffix, whatever the pages, the groups and the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from paged import HALF, TOLERANCE, Pages, attend_one, draw_kv, fp8_scales, int32, padded, poisoned_device
from torch import Tensor

from sip_engine.kernels import decode_attention as module
from sip_engine.kernels.decode_attention import SPLIT, compile_cases, decode_attention

IMPLS = ("reference", "triton", "triton_ungrouped")
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def device_and_poison():
    with poisoned_device():
        yield


@dataclass(frozen=True)
class Batch:
    """Arguments of decode_attention, and the dense keys and values [n, H_kv, D] of every sequence."""

    arguments: dict[str, Any]
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, impl: str, **options) -> Tensor:
        return decode_attention(**self.arguments, impl=impl, **options)


def make_batch(
    group_sizes, prefix_lens, suffix_lens, num_kv_heads=2, ratio=1, head_dim=32, page_size=16,
    dtype=torch.float32, page_dtype=None,
) -> Batch:  # fmt: skip
    lens = (*prefix_lens, *suffix_lens)
    num_pages = sum(-(-length // page_size) for length in lens) + 3
    pages = Pages(num_pages, page_size, num_kv_heads, head_dim, page_dtype or dtype)
    shape = (num_kv_heads, head_dim, page_dtype or dtype)
    prefixes, suffixes = [draw_kv(n, *shape) for n in prefix_lens], [draw_kv(n, *shape) for n in suffix_lens]
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


def dense(batch: Batch, scale: float) -> Tensor:
    """Each query attends, in float64, to its group's prefix and its own suffix as one sequence."""
    kv = zip(batch.keys, batch.values, strict=True)
    q = batch.arguments["q"]
    return torch.stack([attend_one(q[b], keys, values, scale) for b, (keys, values) in enumerate(kv)])


def assert_equals_dense(batch: Batch, impl: str, **options) -> None:
    q = batch.arguments["q"]
    expected = dense(batch, options.get("scale", q.shape[-1] ** -0.5))
    out = batch.run(impl, **options)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    (
        {"ratio": 1, "head_dim": 64, "page_size": 16},
        {"ratio": 2, "head_dim": 48, "page_size": 24},
        {"ratio": 20, "head_dim": 16, "page_size": 5, "num_kv_heads": 1},
        {"ratio": 8, "head_dim": 96, "page_size": 32, "dtype": HALF},
        {"ratio": 3, "head_dim": 128, "page_size": 128, "dtype": HALF},
        {"ratio": 20, "head_dim": 160, "page_size": 64, "dtype": HALF, "num_kv_heads": 1},
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
@pytest.mark.parametrize(
    ("sizes", "ratio"),
    (
        ((2, 3, 15, 17, 31), 1),
        *(pytest.param(range(1, 33), ratio, marks=pytest.mark.slow) for ratio in (1, 2, 3, 8)),
    ),
)
def test_group_sizes(impl, sizes, ratio):
    suffix_lens = [b % 4 for b in range(sum(sizes))]
    prefix_lens = [(7 * size) % 40 for size in sizes]
    assert_equals_dense(make_batch(sizes, prefix_lens, suffix_lens, 1, ratio, head_dim=16), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_prefix_of_several_splits(impl, dtype):
    """Prefixes that end inside, at the end of, and just behind a split."""
    prefix_lens = [SPLIT + 1, 2 * SPLIT, 7]
    batch = make_batch([2, 1, 1], prefix_lens, [9, 0, 2, 70], 1, 2, page_size=64, dtype=dtype)
    assert_equals_dense(batch, impl)


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
    arguments: dict[str, Any] = batch.arguments | empty | {"group_starts": int32([0, 0])}
    assert decode_attention(**arguments, impl=impl).shape == (0, 2, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_float8_pages(impl, dtype):
    """Exact against the dequantised values, in both heads' scales."""
    scales = fp8_scales()
    batch = make_batch([3, 2], [37, 70], [5, 0, 18, 9, 1], ratio=2, dtype=dtype, page_dtype=FP8)
    k_scale, v_scale = (scales[name].double()[:, None] for name in ("k_scale", "v_scale"))
    dequantised = Batch(
        batch.arguments, [k * k_scale for k in batch.keys], [v * v_scale for v in batch.values]
    )
    error = batch.run(impl, scale=0.2, **scales).double() - dense(dequantised, scale=0.2)
    # TOLERANCE is for values below 5: relative to the size of a head's values
    assert (error.abs() <= TOLERANCE[dtype] * v_scale.repeat_interleave(2, 0)).all()


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
    exact = dense(batch, scale)
    # numbers below 2^-6, the smallest normal one, err by at most 2^-10 = unit * 2^-6
    size = dense(replace(batch, values=[v.abs() + 2**-6 for v in batch.values]), scale)
    for b, keys in enumerate(batch.keys):
        for head in range(q.shape[1]):
            delta = scale * unit * ((keys[:, head // 2].abs() + 2**-6) @ q[b, head].double().abs()).max()
            bound = (torch.exp(2 * delta) * (1 + unit) - 1) * size[b, head]
            error = (out[b, head] - exact[b, head]).abs()
            assert (error <= bound).all()
            assert error.max() > 1e-4  # the pages were rounded indeed


def alone(arguments: dict[str, Any], group: int, b: int) -> dict[str, Any]:
    """Sequence `b` of `group` as a batch of one, without the padding of its prefix table."""
    pages_used = -(-int(arguments["prefix_lens"][group]) // arguments["k_pages"].shape[1])
    return arguments | {
        "group_starts": int32([0, 1]),
        "prefix_tables": arguments["prefix_tables"][group : group + 1, :pages_used],
        "prefix_lens": arguments["prefix_lens"][group : group + 1],
        **{name: arguments[name][b : b + 1] for name in ("q", "suffix_tables", "suffix_lens")},
    }


@pytest.mark.parametrize("impl", ("triton", "triton_ungrouped"))
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_a_sequence_does_not_depend_on_its_batch(impl, dtype, monkeypatch):
    """Bitwise the same alone and among others; not so when its own sums are cut elsewhere."""
    sizes, suffix_lens = [4, 9, 1], [(7 * b) % 40 for b in range(14)]
    batch = make_batch(sizes, [37, SPLIT + 40, 64], suffix_lens, 1, 2, page_size=32, dtype=dtype)
    together = batch.run(impl)
    for group, b in ((0, 2), (1, 4), (1, 12), (2, 13)):
        assert torch.equal(decode_attention(**alone(batch.arguments, group, b), impl=impl)[0], together[b])
    monkeypatch.setattr(module, "SPLIT", SPLIT // 2)
    assert not torch.equal(batch.run(impl)[4:13], together[4:13])


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
        ({"q": torch.zeros(3, 2, 32).half()}, "q is torch.float16 but the pages are torch.float32"),
        ({"group_starts": torch.zeros(2, dtype=torch.int32)}, "group_starts has shape"),
        ({"group_starts": torch.zeros(3, dtype=torch.int64)}, "group_starts is torch.int64"),
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


OTHER_LAUNCHES = """
from dataclasses import replace
from sip_engine.kernels import decode_attention, prefill_attention
from sip_engine.kernels.compile_report import compile_case

for module in (decode_attention, prefill_attention):
    for case in module.compile_cases():
        if "D=128" not in case.name or "fp32" in case.name:
            continue
        ones = dict.fromkeys((name for name in case.signature if name.startswith("num_")), 1)
        ones["stride_table"] = 1
        odd = {name: "i32" if "stride" in name else kind for name, kind in case.signature.items()}
        odd = {name: kind for name, kind in odd.items() if name not in ones}
        for change in ({"R": 1, "H_KV": 16} | ones, {"R": 8, "PAGE": 16} | ones, {"PAGE": 24} | ones):
            other = replace(case, signature=odd, constexprs=case.constexprs | change)
            result = compile_case(other)
            if not result.ok:
                raise SystemExit(f"{case.name} with {change}: {result}")
"""


@pytest.mark.slow
def test_other_launches_compile_without_spills():
    """Triton compiles anew for each ratio and page size, and for an integer that is 1 or no multiple of 16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", OTHER_LAUNCHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
