"""prefill_attention equals dense causal attention, whatever the chunks, the pages and the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from paged import HALF, TOLERANCE, Pages, attend_one, draw_kv, fp8_scales, int32, padded, poisoned_device
from torch import Tensor

from sip_engine.kernels._attend import find_tile, num_tiles
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.prefill_attention import compile_cases, prefill_attention

IMPLS = ("reference", "triton")
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def device_and_poison():
    with poisoned_device():
        yield


@dataclass(frozen=True)
class Batch:
    """Arguments of prefill_attention, and the dense keys and values [n, H_kv, D] of every sequence."""

    arguments: dict[str, Any]
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, impl: str, **options) -> Tensor:
        return prefill_attention(**self.arguments, impl=impl, **options)


def make_batch(
    chunks, contexts, num_kv_heads=2, ratio=1, head_dim=32, page_size=16, dtype=torch.float32, page_dtype=None
) -> Batch:
    """`chunks` new tokens of sequences that are `contexts` long with them."""
    num_pages = sum(-(-length // page_size) for length in contexts) + 3
    pages = Pages(num_pages, page_size, num_kv_heads, head_dim, page_dtype or dtype)
    drawn = [draw_kv(length, num_kv_heads, head_dim, page_dtype or dtype) for length in contexts]
    arguments = {
        "q": torch.randn(sum(chunks), num_kv_heads * ratio, head_dim).to(dtype),
        "tables": padded([pages.store(*kv) for kv in drawn]),
        "cu_seqlens": int32([0, *accumulate(chunks)]),
        "context_lens": int32(contexts),
        "k_pages": pages.k,
        "v_pages": pages.v,
    }
    return Batch(arguments, [kv[0] for kv in drawn], [kv[1] for kv in drawn])


def dense(batch: Batch, scale: float) -> Tensor:
    """Each query attends, in float64, to the keys up to its own position."""
    q, rows = batch.arguments["q"], []
    for sequence, (first, last) in enumerate(pairwise(batch.arguments["cu_seqlens"].tolist())):
        keys, values = batch.keys[sequence], batch.values[sequence]
        for token in range(first, last):
            seen = len(keys) - (last - first) + (token - first) + 1
            rows.append(attend_one(q[token], keys[:seen], values[:seen], scale))
    return torch.stack(rows)


def assert_equals_dense(batch: Batch, impl: str, **options) -> None:
    q = batch.arguments["q"]
    out = batch.run(impl, **options)
    assert out.dtype == q.dtype
    expected = dense(batch, options.get("scale", q.shape[-1] ** -0.5))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    (
        {"ratio": 1, "head_dim": 64, "page_size": 16},
        {"ratio": 3, "head_dim": 48, "page_size": 24},
        {"ratio": 8, "head_dim": 16, "page_size": 5, "num_kv_heads": 1},
        {"ratio": 2, "head_dim": 96, "page_size": 32, "dtype": HALF},
        {"ratio": 4, "head_dim": 160, "page_size": 64, "dtype": HALF, "num_kv_heads": 1},
    ),
)
def test_ragged_chunks(impl, shape):
    """A whole prompt, no token at all, the last token, a chunk behind a cached prefix, a prompt of one token."""
    assert_equals_dense(make_batch([37, 0, 1, 19, 1], [37, 20, 70, 64, 1], **shape), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_chunks_of_many_tiles_behind_long_contexts(impl, dtype):
    """Tiles end inside a token's heads, and keys that a whole tile sees come before the diagonal."""
    batch = make_batch([50, 3, 90], [211, 260, 90], num_kv_heads=1, ratio=3, dtype=dtype, page_size=48)
    assert_equals_dense(batch, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_strided_queries(impl):
    batch = make_batch([9, 4], [20, 31], ratio=2)
    wide = torch.randn(13, 9, 32)
    arguments = batch.arguments | {"q": wide[:, ::2][:, :4]}
    assert_equals_dense(replace(batch, arguments=arguments), impl, scale=0.5)


def test_reference_keeps_float64():
    assert_equals_dense(make_batch([9, 20], [37, 20], ratio=2, dtype=torch.float64), "reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token(impl):
    out = make_batch([0, 0], [5, 3]).run(impl)
    assert out.shape == (0, 2, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_float8_pages(impl, dtype):
    """Exact against the dequantised values, in both heads' scales."""
    scales = fp8_scales()
    batch = make_batch([21, 5], [21, 70], ratio=2, dtype=dtype, page_dtype=FP8)
    k_scale, v_scale = (scales[name].double()[:, None] for name in ("k_scale", "v_scale"))
    dequantised = Batch(
        batch.arguments, [k * k_scale for k in batch.keys], [v * v_scale for v in batch.values]
    )
    error = batch.run(impl, scale=0.2, **scales).double() - dense(dequantised, scale=0.2)
    # TOLERANCE is for values below 5: relative to the size of a head's values
    assert (error.abs() <= TOLERANCE[dtype] * v_scale.repeat_interleave(2, 0)).all()


@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_a_sequence_does_not_depend_on_its_batch(dtype):
    """Bitwise the same alone with narrower tables, and in chunks of any size."""
    batch = make_batch([75, 5, 41], [75, 40, 150], num_kv_heads=1, ratio=2, head_dim=40, dtype=dtype)
    together, arguments = batch.run("triton"), batch.arguments
    for sequence, (first, last) in enumerate(pairwise(arguments["cu_seqlens"].tolist())):
        context = int(arguments["context_lens"][sequence])
        for begin, end in ((first, last), (first, first + 3), (first + 3, last)):
            seen = context - (last - end)
            alone = arguments | {
                "q": arguments["q"][begin:end],
                "tables": arguments["tables"][sequence : sequence + 1, : -(-seen // 16)],
                "cu_seqlens": int32([0, end - begin]),
                "context_lens": int32([seen]),
            }
            assert torch.equal(prefill_attention(**alone, impl="triton"), together[begin:end])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_is_seen_from_its_own_position_on(impl):
    """A NaN at position 12 of the first sequence, whose chunk begins at 5, reaches its queries from 7 on."""
    batch = make_batch([15, 4], [20, 20])
    page = batch.arguments["tables"][0, 0]
    batch.arguments["k_pages"][page, 12] = torch.nan
    out = batch.run(impl)
    assert out[:7].isfinite().all() and out[7:15].isnan().all() and out[15:].isfinite().all()


@jit
def _find_tile_kernel(out_ptr, slots_ptr, starts_ptr, num_spans, R: tl.constexpr, BLOCK_M: tl.constexpr):
    slot = tl.load(slots_ptr + tl.program_id(0))
    span, first, rows, tile_row = find_tile(starts_ptr, num_spans, slot, R, BLOCK_M)
    out_ptr += 4 * tl.program_id(0)
    tl.store(out_ptr, span)
    tl.store(out_ptr + 1, first)
    tl.store(out_ptr + 2, rows)
    tl.store(out_ptr + 3, tile_row)


def check_slots(lengths: list[int], ratio: int, block_m: int, slots: list[int]) -> None:
    """Every tile has one slot among `slots`, in order; the others have no row."""
    starts = [0, *accumulate(lengths)]
    out = torch.full((len(slots), 4), -1, dtype=torch.int32)
    _find_tile_kernel[(len(slots),)](out, int32(slots), int32(starts), len(lengths), ratio, block_m)
    assert [tile for tile in out.tolist() if tile[3] < tile[2]] == [
        [span, starts[span], length * ratio, row]
        for span, length in enumerate(lengths)
        for row in range(0, length * ratio, block_m)
    ]


@pytest.mark.parametrize(
    ("lengths", "ratio"),
    (([0], 1), ([0, 0, 5, 0, 16, 17, 0, 1], 1), ([5, 7, 33, 0, 11], 3), ([2, 1] * 8, 40)),
)
def test_every_tile_has_one_slot(lengths, ratio):
    check_slots(lengths, ratio, 16, list(range(num_tiles(len(lengths), sum(lengths), ratio, 16))))


def test_tiles_are_found_among_more_spans_than_one_load_holds():
    lengths = [0] * 1030 + [3, 0, 20] + [0] * 1024 + [1]
    num_slots = num_tiles(len(lengths), sum(lengths), 2, 16)
    check_slots(lengths, 2, 16, [*range(1026, 1042), *range(num_slots - 6, num_slots)])


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q": torch.zeros(5, 3, 32)}, "q .*must be"),
        ({"q": torch.zeros(5, 32, 2).transpose(1, 2)}, "contiguous"),
        (
            {"q": torch.zeros(5, 2, 32, dtype=torch.float16)},
            "q is torch.float16 but the pages are torch.float32",
        ),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens has shape"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32)}, "context_lens has shape"),
        ({"context_lens": torch.zeros(2, dtype=torch.int64)}, "context_lens is torch.int64"),
        ({"v_scale": torch.ones(2)}, "v_scale is given"),
        ({"impl": "flash"}, "'reference', 'triton'"),
    ),
)
def test_bad_input_is_named(change, message):
    batch = make_batch([3, 2], [20, 2])
    with pytest.raises(ValueError, match=message):
        prefill_attention(**(batch.arguments | change))


def test_head_dims_beyond_the_kernels_are_refused():
    with pytest.raises(ValueError, match="at most 256"):
        make_batch([1], [3], head_dim=288).run("triton")
    with pytest.raises(ValueError, match="float64"):
        make_batch([1], [3], dtype=torch.float64).run("triton")


def test_every_case_names_its_arguments():
    for case in compile_cases():
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
