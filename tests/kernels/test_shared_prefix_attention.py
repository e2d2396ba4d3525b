"""shared_prefix_attention equals attention of separate sequences, outputs and gradients, whatever the layout."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from compile_runs import run_python, run_report
from flash_twins import TWINS
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import HALF, poisoned_device
from torch import Tensor

from sip_engine.kernels import _flash_attn as packages
from sip_engine.kernels import _shared_prefix_flash as flash
from sip_engine.kernels import shared_prefix_attention as module
from sip_engine.kernels.shared_prefix_attention import (
    RowLayout,
    attention_cost,
    rows_of,
    shared_prefix_attention,
)

RAGGED = ((20, (5, 3)), (0, (9, 1, 4)), (37, ()), (5, (1,) * 4), (16, (32,)), (1, (1,)))
LONG = ((70, (33, 3, 50)), (0, (41, 60)), (49, ()))
layouts = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 7), max_size=5)).filter(
        lambda row: row[0] or row[1]
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(autouse=True)
def device_and_poison():
    with poisoned_device():
        yield


def layout_of(rows) -> RowLayout:
    return rows_of([prefix for prefix, _ in rows], [suffixes for _, suffixes in rows], torch.empty(0).device)


def draw(rows, num_kv_heads=1, ratio=1, head_dim=32, dtype=torch.float32) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient."""
    num_tokens = sum(prefix + sum(suffixes) for prefix, suffixes in rows)
    heads = (num_kv_heads * ratio, num_kv_heads, num_kv_heads, num_kv_heads * ratio)
    return tuple(torch.randn(num_tokens, h, head_dim).to(dtype) for h in heads)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain attention of the last queries of one sequence, in float64, one head at a time."""
    keys = torch.arange(len(k)) - (len(k) - len(q))
    hidden = keys[None] > torch.arange(len(q))[:, None]
    outs = []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        s = (q[:, head] @ k[:, kv_head].T * scale).masked_fill(hidden, float("-inf"))
        outs.append(s.softmax(-1) @ v[:, kv_head])
    return torch.stack(outs, 1)


def separate(q: Tensor, k: Tensor, v: Tensor, rows, scale: float) -> Tensor:
    """Each prefix alone, and each suffix behind a copy of its prefix."""
    outs, start = [], 0
    for prefix, suffixes in rows:
        shared = slice(start, start + prefix)
        outs.append(causal(q[shared], k[shared], v[shared], scale))
        start += prefix
        for n in suffixes:
            own = slice(start, start + n)
            keys, values = (torch.cat([x[shared], x[own]]) for x in (k, v))
            outs.append(causal(q[own], keys, values, scale))
            start += n
    return torch.cat(outs)


def differentiate(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def run(impl, rows, tensors, scale=0.2) -> tuple[Tensor, ...]:
    layout = layout_of(rows)
    return differentiate(
        lambda q, k, v: shared_prefix_attention(q, k, v, layout, scale=scale, impl=impl), *tensors
    )


def assert_equals_separate(impl, rows, tensors, scale=0.2) -> None:
    got = run(impl, rows, tensors, scale)
    wide = [x.double() for x in tensors]
    expected = differentiate(lambda q, k, v: separate(q, k, v, rows, scale), *wide)
    # In 16 bits p, ds and the results are rounded once each, and what they are multiplied with is below 5.
    rounding = torch.finfo(tensors[0].dtype).eps / 2
    atol, rtol = {8: (1e-12, 0), 4: (5e-6, 2e-6), 2: (8 * rounding, 4 * rounding)}[tensors[0].element_size()]
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == tensors[0].dtype
        torch.testing.assert_close(x.double(), y, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ratio", (1, 2, 3))
@pytest.mark.parametrize(
    "rows",
    (RAGGED, ((4, (3, 2)), (5, (4,)), (9, ())), ((7, (5,)), (9, (3,)), (3, ()), (0, (2,)), (2, ()))),
    ids=("ragged", "uniform", "causal"),
)
@pytest.mark.parametrize("impl", ("reference", "split"))
def test_plain_torch_equals_separate_sequences(impl, rows, ratio):
    assert_equals_separate(impl, rows, draw(rows, 2, ratio, 8, torch.float64))


@pytest.mark.parametrize(
    "shape",
    (
        {"ratio": 1, "head_dim": 16, "num_kv_heads": 2},
        {"ratio": 2, "head_dim": 64},
        {"ratio": 3, "head_dim": 40},
        {"ratio": 5, "head_dim": 128},
    ),
    ids=lambda shape: f"R={shape['ratio']} D={shape['head_dim']}",
)
def test_ragged_rows(shape):
    """Empty prefixes, suffixes of one token, rows of a prefix only; tiles hold several suffixes."""
    assert_equals_separate("triton", RAGGED, draw(RAGGED, **shape))


@pytest.mark.parametrize("head_dim", (24, 100))
def test_rows_of_many_tiles(head_dim):
    """Suffixes longer than a tile, that begin inside one and see whole tiles of their own keys."""
    assert_equals_separate("triton", LONG, draw(LONG, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", (64, 128))
def test_sixteen_bits(head_dim):
    rows = ((140, (150, 2, 9)), (0, (130, 30)), (3, (1,)))
    assert_equals_separate("triton", rows, draw(rows, ratio=2, head_dim=head_dim, dtype=HALF), head_dim**-0.5)


@pytest.mark.parametrize("impl", ("triton", "split"))
def test_one_to_eighteen_suffixes(impl):
    lengths = (1, 4, 2, 7, 1, 3)
    rows = [(n % 5 * 4, [lengths[(n + i) % 6] for i in range(n)]) for n in range(1, 19)]
    assert_equals_separate(impl, rows, draw(rows, head_dim=16))


@pytest.mark.parametrize("impl", ("triton", "split"))
@pytest.mark.parametrize("rows", (((1, ()),), ((0, (1,)),), ((0, (1, 1)),), ((1, (1,) * 18),)), ids=str)
def test_single_tokens(impl, rows):
    assert_equals_separate(impl, rows, draw(rows, num_kv_heads=2, ratio=2))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(rows=layouts, ratio=st.integers(1, 4), head_dim=st.sampled_from((16, 33, 72)), seed=st.integers(0, 99))
def test_any_layout(rows, ratio, head_dim, seed):
    torch.manual_seed(seed)
    rows = [(3 * prefix, [2 * n for n in suffixes]) for prefix, suffixes in rows]
    assert_equals_separate("triton", rows, draw(rows, 1, ratio, head_dim))


@pytest.mark.filterwarnings("ignore:overflow")  # of what is masked afterwards
def test_large_logits_do_not_overflow():
    """Scores of hundreds, of both signs: only the differences to the row's log-sum-exp may be exponentiated."""
    rows = ((20, (12, 9)),)
    q, k, v, dout = draw(rows)
    got = run("triton", rows, (q * 30, k, v, dout), scale=2.0)
    expected = differentiate(
        lambda q, k, v: separate(q, k, v, rows, 2.0), *(x.double() for x in (q * 30, k, v, dout))
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-3, rtol=2e-3)


def test_gradients_conserve_what_softmax_does():
    """Weights sum to one, so each row's dv sums to its dout; a shift of all a row's keys changes nothing, so
    its dk sums to zero."""
    layout = layout_of(RAGGED)
    tensors = draw(RAGGED, ratio=2)
    _, _, dk, dv = run("triton", RAGGED, tensors)
    by_kv_head = tensors[3].sum(1, keepdim=True)
    for first, last in pairwise(layout.row_starts):
        torch.testing.assert_close(dv[first:last].sum(0), by_kv_head[first:last].sum(0), atol=2e-5, rtol=0)
        torch.testing.assert_close(dk[first:last].sum(0), torch.zeros(1, 32), atol=2e-5, rtol=0)


def test_a_suffix_and_a_row_know_nothing_of_others():
    """Other keys and values in one suffix of one row change no bit of its siblings, of its prefix's output,
    or of any other row; other output gradients change none either, but for the prefix's dk and dv."""
    rows = ((20, (5, 30, 3)), (9, (4,)), (6, ()))
    tensors = draw(rows, ratio=2)
    changed = slice(25, 55)
    other = [x.clone() for x in tensors]
    for x in other:
        x[changed] = torch.randn_like(x[changed])
    before, after = run("triton", rows, tensors), run("triton", rows, other)
    for name, x, y in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[changed] = False
        if name in ("dk", "dv"):
            assert not torch.equal(x[:20], y[:20])
            kept[:20] = False
        assert torch.equal(x[kept], y[kept]), name


def test_views_of_a_fused_projection():
    """q, k and v as strided views, and an output gradient that is an expanded scalar."""
    num_tokens = layout_of(RAGGED).num_tokens
    fused = torch.randn(num_tokens, 2, 4 * 32)
    q, k, v = fused.split((64, 32, 32), dim=2)
    tensors = q.reshape(num_tokens, 4, 32)[:, ::2], k, v, torch.ones(()).expand(num_tokens, 2, 32)
    assert_equals_separate("triton", RAGGED, tensors)
    columns = torch.randn(num_tokens, 32, 2).transpose(1, 2)
    assert_equals_separate("triton", RAGGED, (tensors[0], columns, columns, tensors[3]))


@pytest.mark.parametrize("rows", (RAGGED, ((4, (3,)), (5, ()))), ids=str)
def test_the_default_on_a_cpu_pads_nothing(rows):
    q, k, v, _ = (x.cpu() for x in draw(rows))
    layout = rows_of([row[0] for row in rows], [row[1] for row in rows], torch.device("cpu"))
    default = shared_prefix_attention(q, k, v, layout, scale=0.2)
    assert torch.equal(default, shared_prefix_attention(q, k, v, layout, scale=0.2, impl="split"))


def visible_pairs(rows) -> set[tuple[int, int]]:
    """(query, key) by the definition, from the lengths alone."""
    token_rows, segments = [], []
    for row, (prefix, suffixes) in enumerate(rows):
        for segment, n in enumerate((prefix, *suffixes)):
            token_rows += [row] * n
            segments += [segment] * n
    return {
        (i, j)
        for i in range(len(segments))
        for j in range(i + 1)
        if token_rows[i] == token_rows[j] and segments[j] in (0, segments[i])
    }


@given(rows=layouts, block=st.integers(1, 8))
def test_tables_say_which_query_sees_which_key(rows, block):
    layout, expected = layout_of(rows), visible_pairs(rows)
    starts, until = layout.segment_start.tolist(), layout.seen_until.tolist()
    pairs, work = [], []
    for first, last, row, prefix, own, seen_by_all in layout.query_tiles(block).tolist():
        keys = [*range(row, row + prefix), *range(own, last)]
        work.append(len(keys))
        for i in range(first, last):
            seen = [j for n, j in enumerate(keys) if n < prefix or starts[i] <= j <= i]
            assert seen[:seen_by_all] == keys[:seen_by_all] and last - first <= block
            pairs += [(i, j) for j in seen]
    assert len(pairs) == len(expected) and set(pairs) == expected
    assert work == sorted(work, reverse=True)

    pairs, work = [], []
    for first, last, seen_by_all, end in layout.key_tiles(block).tolist():
        work.append(end - first)
        for i in range(first, end):
            seen = [j for j in range(first, last) if j <= i < until[j]]
            assert i < seen_by_all or len(seen) == last - first <= block
            pairs += [(i, j) for j in seen]
    assert len(pairs) == len(expected) and set(pairs) == expected
    assert work == sorted(work, reverse=True)


def test_tables_are_built_once():
    layout = layout_of(RAGGED)
    assert layout.query_tiles(16) is layout.query_tiles(16) is not layout.query_tiles(32)
    assert layout.key_tiles(16) is layout.key_tiles(16)
    assert layout.seen_until is layout.seen_until
    assert layout == layout_of(RAGGED) and hash(layout) == hash(layout_of(RAGGED))


@given(rows=layouts, num_heads=st.integers(1, 4), head_dim=st.integers(1, 9))
def test_cost_equals_a_count(rows, num_heads, head_dim):
    alone = [(p + n, ()) for p, suffixes in rows for n in suffixes or (0,)]
    for shared, sequences in ((True, rows), (False, alone)):
        cost = attention_cost(layout_of(rows), num_heads=num_heads, head_dim=head_dim, shared=shared)
        assert cost.tokens == layout_of(sequences).num_tokens
        assert cost.pairs == len(visible_pairs(sequences))
        assert cost.forward_flops == sum(2 * 2 * head_dim for _ in range(cost.pairs * num_heads))
        assert cost.backward_flops * 2 == cost.forward_flops * 5


@pytest.mark.parametrize("line", (2, 4))
@pytest.mark.parametrize("rows", (RAGGED, ((3, ()), (0, (2, 1))), ((2, (1, 1)),)), ids=str)
def test_flash_calls_are_joined_exactly(monkeypatch, rows, line):
    monkeypatch.setattr(packages, "find_flash", lambda: (line, TWINS[line]))
    tensors = draw(rows, 2, 3, 8, torch.float64)
    plan = flash.make_plan(layout_of(rows))
    got = differentiate(lambda q, k, v: flash._FlashAttention.apply(q, k, v, plan, 0.3), *tensors)
    expected = differentiate(lambda q, k, v: separate(q, k, v, rows, 0.3), *tensors)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_flash_is_refused_where_it_cannot_run(monkeypatch):
    layout = layout_of(RAGGED)
    q, k, v, _ = draw(RAGGED, head_dim=16, dtype=HALF)

    def attend(number: int = 16) -> torch.Tensor:
        packages.find_flash.cache_clear()
        q_heads, k_heads, v_heads = (x[..., :number] for x in (q, k, v))
        return shared_prefix_attention(q_heads, k_heads, v_heads, layout, scale=0.2, impl="flash")

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="flash-attn cannot be imported"):
        attend()
    old = SimpleNamespace(__version__="2.6.3", flash_attn_interface=TWINS[2])
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    with pytest.raises(ValueError, match=r"flash-attn 2\.6\.3 is not supported"):
        attend()
    new = SimpleNamespace(__version__="2.8.3", flash_attn_interface=TWINS[2])
    monkeypatch.setitem(sys.modules, "flash_attn", new)
    with pytest.raises(ValueError, match="multiple of 8"):
        attend(12)
    out = attend()
    packages.find_flash.cache_clear()
    expected = separate(q.double(), k.double(), v.double(), RAGGED, 0.2)
    torch.testing.assert_close(out.double(), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q_THD": torch.zeros(5, 2, 16)}, "stream of 5 tokens, but the layout's rows hold 6"),
        ({"q_THD": torch.zeros(6, 3, 16)}, "H a multiple of G"),
        ({"v_TGD": torch.zeros(6, 2, 8)}, "H a multiple of G"),
        ({"k_TGD": torch.zeros(6, 2, 16).half()}, "give them one dtype"),
        ({"impl": "cudnn"}, "'reference', 'split', 'triton', 'flash'"),
        ({"impl": "triton", "scale": 0.0}, "need a positive one"),
        ({"impl": "triton", "layout": rows_of([6], [()], torch.device("meta"))}, "layout is on meta"),
    ),
)
def test_bad_input_is_named(change, message):
    heads = dict.fromkeys(("q_THD", "k_TGD", "v_TGD"), torch.zeros(6, 2, 16))
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**({"layout": layout_of([(4, (2,))]), "scale": 0.2} | heads | change))


@pytest.mark.parametrize(("head_dim", "dtype"), ((136, torch.float32), (16, torch.float64)))
def test_what_the_kernels_cannot_hold_is_refused(head_dim, dtype):
    with pytest.raises(ValueError, match="at most 128"):
        run("triton", RAGGED, draw(RAGGED, head_dim=head_dim, dtype=dtype))


def test_a_row_beyond_32_bits_is_refused():
    rows = [(2**20, ())]
    q = torch.empty(1, 1, 1).expand(2**20, 32, 128)
    with pytest.raises(ValueError, match="beyond 32-bit offsets"):
        shared_prefix_attention(q, q, q, layout_of(rows), scale=0.2, impl="triton")


def test_every_case_names_its_arguments():
    for case in module.compile_cases():
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name


OTHER_LAUNCHES = """
from dataclasses import replace
from sip_engine.kernels.compile_report import compile_case
from sip_engine.kernels.shared_prefix_attention import compile_cases

for case in compile_cases():
    if "fp32" in case.name:
        continue
    odd = {name: kind.split(":")[0] for name, kind in case.signature.items()}
    one = {name: kind for name, kind in case.signature.items() if name != "num_tokens"}
    others = {
        "MHA": replace(case, constexprs=case.constexprs | {"R": 1}),
        "MQA": replace(case, constexprs=case.constexprs | {"R": 16, "H_KV": 1}),
    }
    if case.constexprs["D"] == 128:
        others |= {
            "short heads": replace(case, constexprs=case.constexprs | {"D": 80}),
            "unaligned": replace(case, signature=odd),
            "one token": replace(case, signature=one, constexprs=case.constexprs | {"num_tokens": 1}),
        }
    for label, other in others.items():
        result = compile_case(other)
        if label != "unaligned" and not result.ok:
            raise SystemExit(f"{case.name} {label}: {result.spill_bytes} bytes spilled, wgmma {result.uses_wgmma}")
"""


@pytest.mark.slow
def test_tuned_tiles_compile_for_sm_90():
    """Without spills, and with wgmma in 16 bits."""
    done: subprocess.CompletedProcess[str] = run_report("shared_prefix")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 12 and sum(" yes " in line for line in lines) == 6


@pytest.mark.slow
def test_other_launches_compile_for_sm_90():
    done = run_python("-c", OTHER_LAUNCHES)
    assert done.returncode == 0, done.stdout + done.stderr
