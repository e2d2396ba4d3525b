"""logprob_head equals float64 log-softmax and its gradients, of any shard, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from peak_memory import PeakMemory
from torch import Tensor

from sip_engine.kernels import _logprob_triton as fused
from sip_engine.kernels import logprob_head as module
from sip_engine.kernels._logprob_gradients import _LibrarySums
from sip_engine.kernels.logprob_head import (
    IGNORED,
    ShardStats,
    logprob_head,
    merge_shards,
    shard_gradients,
    shard_stats,
)

IMPLS = ("reference", "chunked", "triton")
EVERY = (*IMPLS, "library")  # differs from "triton" in the sums of the gradients alone
HALF = (
    torch.float16 if DEVICE == "cpu" else torch.bfloat16
)  # the interpreter multiplies bfloat16 bits as integers
INF, NAN = torch.inf, torch.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, for NaN and infinity
SHAPES = ((1, 1, 1), (3, 33, 130), (130, 70, 257), (5, 128, 640))


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def many_chunks(monkeypatch):
    """Splits, chunks and tiles so small that a test's few tokens and columns need several of each."""
    monkeypatch.setattr(fused, "SPLIT", 256)
    monkeypatch.setattr(fused, "CHUNK_ROWS", 128)
    monkeypatch.setattr(fused, "CHUNK_COLUMNS", 64)
    monkeypatch.setattr(module, "TILE_COLUMNS", 50)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 350)


class Result(NamedTuple):
    log_prob: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def make(num_rows: int, hidden_size: int, num_columns: int, dtype: torch.dtype = torch.float32):
    """hidden, weight, targets, and a gradient of the log-probs."""
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    weight = (torch.randn(num_columns, hidden_size) * 2 / hidden_size**0.5).to(dtype)
    return hidden, weight, torch.randint(num_columns, (num_rows,)), torch.randn(num_rows)


def run(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, **options: Any) -> Result:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_prob, entropy = logprob_head(hidden, weight, targets, entropy=True, **options)
    assert not entropy.requires_grad
    log_prob.backward(grad.to(log_prob.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return Result(log_prob.detach(), entropy, hidden.grad, weight.grad)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, num_true: int | None = None):
    """torch's own log-softmax and autograd, in the dtype given; `targets` all inside the vocabulary."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_softmax = (hidden @ weight[:num_true].T).log_softmax(dim=1)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=1).detach()
    log_prob = log_softmax.gather(1, targets[:, None])[:, 0]
    log_prob.backward(grad.to(log_prob.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return Result(log_prob.detach(), entropy, hidden.grad, weight.grad)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, num_true: int | None = None):
    return plain(hidden.double(), weight.double(), targets, grad, num_true)


def assert_near(found: Result, expected: Result, atol: float, rtol: float = 0.0) -> None:
    for name, a, b in zip(Result._fields, found, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("num_rows", "hidden_size", "num_columns"), SHAPES)
def test_equals_float64(impl, num_rows, hidden_size, num_columns):
    inputs = make(num_rows, hidden_size, num_columns)
    found = run(*inputs, impl=impl)
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, exact(*inputs), 2e-5)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize(("num_rows", "hidden_size", "num_columns"), ((3, 33, 130), (130, 70, 257)))
def test_equals_float64_over_many_chunks(many_chunks, impl, num_rows, hidden_size, num_columns):
    inputs = make(num_rows, hidden_size, num_columns)
    assert_near(run(*inputs, impl=impl), exact(*inputs), 2e-5)


@pytest.mark.parametrize("impl", ("reference", "chunked"))
@pytest.mark.parametrize(("num_rows", "hidden_size", "num_columns"), SHAPES)
def test_float64_is_float64_throughout(many_chunks, impl, num_rows, hidden_size, num_columns):
    inputs = make(num_rows, hidden_size, num_columns, torch.float64)
    found = run(*inputs, impl=impl)
    assert all(x.dtype == torch.float64 for x in found)
    assert_near(found, plain(*inputs), 1e-12)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("chunks", (False, True))
def test_sixteen_bits_err_no_more_than_torch(request, impl, chunks):
    """Forward as good as float32; gradients as good as torch's of the same dtype, chunks or not."""
    if chunks:
        request.getfixturevalue("many_chunks")
    inputs = make(140, 70, 257, HALF)
    found, expected, theirs = run(*inputs, impl=impl), exact(*inputs), plain(*inputs)
    assert found.log_prob.dtype == torch.float32 and found.d_hidden.dtype == found.d_weight.dtype == HALF
    torch.testing.assert_close(found.log_prob.double(), expected.log_prob, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=0, atol=2e-5)
    for name in ("d_hidden", "d_weight"):
        ours, torchs, right = (getattr(x, name).double() for x in (found, theirs, expected))
        assert (ours - right).norm() <= 1.2 * (torchs - right).norm(), name


@pytest.mark.parametrize("transposed", (False, True))
def test_sixteen_bit_sums_keep_what_rounding_takes(transposed):
    """1 + 64 * 2^-14: alone, no addend would change a float16 (or bfloat16) 1."""
    a, b = torch.zeros(128, 256, dtype=HALF), torch.ones(1, 20, dtype=HALF)
    out, low = torch.full((3, 20), NAN, dtype=HALF), torch.full((3, 20), NAN, dtype=HALF)
    for step in range(65):
        (a.T if transposed else a)[:3, 0] = 2.0**-14 if step else 1.0
        fused._launch_accumulate(a, b, out, low, add=step > 0, transposed=transposed)
    assert ((out.double() + low.double()) == 1 + 2**-8).all()
    assert (out.double() - (1 + 2**-8)).abs().max() <= torch.finfo(HALF).eps / 2


def test_the_librarys_sums_keep_what_rounding_takes(monkeypatch):
    """The same over 65 chunks of one row or column."""
    monkeypatch.setattr(fused, "CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNK_COLUMNS", 1)
    one, many = torch.ones(1, 20, dtype=HALF), torch.ones(65, 20, dtype=HALF)
    of_hidden, of_weight = _LibrarySums(one, many, 1), _LibrarySums(many, one, 1)
    for step in range(65):
        dlogits = torch.full((1, 1), 2.0**-13 if step else 1.0, dtype=HALF)
        first, this = slice(0, 1), slice(step, step + 1)
        of_hidden.add(dlogits, one, many[this], first, this)
        of_weight.add(dlogits, many[this], one, this, first)
    for found in (of_hidden.results()[0], of_weight.results()[1]):
        assert found.dtype == HALF and (found == 1 + 2**-7).all()


def cut(num_columns: int, cuts: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise((0, *sorted(cuts), num_columns))]


def run_shards(
    shards: Sequence[slice], hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, **options: Any
) -> Result:
    """Each shard through `logprob_head`, given what the others find; d hidden summed, d weight put together."""
    found = [
        shard_stats(hidden, weight[s], targets, vocab_start=s.start, entropy=True, **options).pack()
        for s in shards
    ]

    def gather(mine: Tensor, number: int) -> Tensor:
        assert torch.equal(mine, found[number])
        return torch.stack(found)

    results = [
        run(
            hidden,
            weight[s],
            targets,
            grad,
            vocab_start=s.start,
            gather=lambda x, n=n: gather(x, n),
            **options,
        )
        for n, s in enumerate(shards)
    ]
    for result in results[1:]:  # the same on every shard
        assert torch.equal(result.log_prob, results[0].log_prob)
        assert torch.equal(result.entropy, results[0].entropy)
    return results[0]._replace(
        d_hidden=sum(r.d_hidden for r in results), d_weight=torch.cat([r.d_weight for r in results])
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cuts", ((), (120,), (100, 200)))
def test_shards_merge_to_the_same(impl, cuts):
    """1, 2 and 3 shards; with padding at the end, alone on the last of them in the second round."""
    inputs = make(7, 24, 300)
    for num_true in (300, 290, 150):
        inputs[2].remainder_(num_true)
        options = {"impl": impl, "true_vocab_size": num_true}
        found = run_shards(cut(300, cuts), *inputs, **options)
        assert_near(found, run(*inputs, **options), 1e-6, rtol=1e-6)
        assert_near(found, exact(*inputs, num_true), 2e-5)
        assert (found.d_weight[num_true:] == 0).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), num_true=st.integers(1, 60), sizes=st.integers(1, 90))
def test_shards_of_any_width_merge(cuts, num_true, sizes):
    """Empty shards and shards of nothing but padding included; tiles of any size."""
    hidden, weight, targets, grad = make(4, 5, 60, torch.float64)
    inputs = (hidden, weight, targets % num_true, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_ELEMENTS", sizes)
        patch.setattr(module, "TILE_COLUMNS", 1 + sizes // 3)
        found = run_shards(cut(60, cuts), *inputs, impl="chunked", true_vocab_size=num_true)
    assert_near(found, plain(*inputs, num_true), 1e-12)


@pytest.mark.parametrize("impl", EVERY)
def test_ignored_targets_have_no_part(impl):
    hidden, weight, targets, grad = make(9, 20, 70)
    targets[[0, 4, 5]] = IGNORED
    kept = targets != IGNORED
    for vocab_start in (0, 100):  # 100 - 100 is a column of the second shard
        moved = torch.where(kept, targets + vocab_start, targets)
        found = run(hidden, weight, moved, grad, impl=impl, vocab_start=vocab_start)
        expected = exact(hidden[kept], weight, targets[kept], grad[kept])
        for all_rows, rows in zip(found[:3], expected[:3], strict=True):
            assert (all_rows[~kept] == 0).all()
            torch.testing.assert_close(all_rows[kept].double(), rows, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.d_weight.double(), expected.d_weight, rtol=0, atol=2e-5)
    nothing = run(hidden, weight, torch.full_like(targets, IGNORED), grad, impl=impl)
    assert all((x == 0).all() for x in nothing)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinite_logits(many_chunks, impl):
    """Rows [positive, negative, NaN, +inf] against columns that are finite, or -inf for a positive row."""
    hidden = torch.tensor([[1.0], [-1.0], [NAN], [INF]])
    weight = torch.full((300, 1), -INF)
    weight[[140, 299]] = 0.5
    targets = torch.tensor([140, 140, 140, 140])
    log_prob, entropy = logprob_head(hidden, weight, targets, entropy=True, impl=impl)
    for found in (log_prob, entropy):
        torch.testing.assert_close(
            found, torch.tensor([0.6931472, NAN, NAN, NAN]).copysign(found), equal_nan=True
        )
    assert log_prob[0] < 0 < entropy[0]
    # a target that is itself -inf, and one that no shard has
    assert logprob_head(hidden[:1], weight, torch.tensor([7]), impl=impl).item() == -INF
    for nowhere in (300, -1, 2**32 + 140):
        assert logprob_head(hidden[:1], weight, torch.tensor([nowhere]), impl=impl).item() == -INF
    assert logprob_head(hidden[:1], weight[:100], torch.tensor([7]), impl=impl).isnan()  # nothing above -inf
    # shards without a column above -inf, before and after the others
    parts = [
        shard_stats(hidden[:1], weight[s], targets[:1], vocab_start=s.start, entropy=True, impl=impl)
        for s in cut(300, (100, 200))
    ]
    for order in ((0, 1, 2), (1, 0, 2)):
        stacked = ShardStats.unpack(torch.stack([parts[i].pack() for i in order]))
        merged, _, merged_entropy = merge_shards(stacked)
        torch.testing.assert_close(merged, log_prob[:1], rtol=0, atol=1e-6)
        torch.testing.assert_close(merged_entropy, entropy[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", EVERY)
def test_nan_reaches_what_depends_on_it(many_chunks, impl):
    """A NaN token spoils its own log-prob and d hidden, and d weight; a NaN gradient likewise."""
    hidden, weight, targets, grad = make(140, 20, 130)
    clean = run(hidden, weight, targets, grad, impl=impl)
    broken = hidden.clone()
    broken[[1, 135], 3] = NAN
    bad_grad = grad.clone()
    bad_grad[[1, 135]] = NAN
    others = torch.arange(140).remainder(134) != 1
    for found in (
        run(broken, weight, targets, grad, impl=impl),
        run(hidden, weight, targets, bad_grad, impl=impl),
    ):
        assert found.d_hidden[~others].isnan().all() and found.d_weight.isnan().all()
        torch.testing.assert_close(found.d_hidden[others], clean.d_hidden[others], rtol=0, atol=1e-6)
        torch.testing.assert_close(found.log_prob[others], clean.log_prob[others], rtol=0, atol=1e-6)
    log_prob = logprob_head(broken, weight, targets, impl=impl)
    assert log_prob[~others].isnan().all() and log_prob[others].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_knows_nothing_of_the_others(many_chunks, impl):
    hidden, weight = torch.randint(-4, 5, (140, 40)) / 8, torch.randint(-4, 5, (200, 40)) / 8
    targets = torch.randint(200, (140,))
    whole = shard_stats(hidden, weight, targets, entropy=True, impl=impl)
    rows = torch.tensor([139, 0, 60, 60, 128])
    some = shard_stats(hidden[rows], weight, targets[rows], entropy=True, impl=impl)
    for a, b in zip(some, whole, strict=True):
        assert a is not None and b is not None and torch.equal(a, b[rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    hidden, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    found = run(hidden, weight, torch.tensor([0, 0]), torch.ones(2), impl=impl)
    assert found.log_prob.tolist() == [0.0, -2e4] and found.entropy.tolist() == [0.0, 0.0]
    assert found.d_hidden.tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_changes_nothing_else(impl):
    hidden, weight, targets, _ = make(6, 10, 40)
    log_prob, entropy = logprob_head(hidden, weight, targets, entropy=True, impl=impl)
    assert torch.equal(logprob_head(hidden, weight, targets, impl=impl), log_prob)
    assert shard_stats(hidden, weight, targets, impl=impl).pack().shape == (6, 3)
    probs = (hidden.double() @ weight.double().T).softmax(1)
    torch.testing.assert_close(
        entropy.double(), torch.distributions.Categorical(probs).entropy(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_columns(impl):
    hidden, weight, targets, grad = make(3, 8, 20)
    empty = run(hidden[:0], weight, targets[:0], grad[:0], impl=impl)
    assert empty.log_prob.shape == empty.entropy.shape == (0,)
    assert empty.d_hidden.shape == (0, 8) and (empty.d_weight == 0).all() and empty.d_weight.shape == (20, 8)
    for shard, start in ((weight, 40), (weight[:0], 0)):
        options: dict[str, Any] = {"vocab_start": start, "true_vocab_size": 37, "impl": impl}
        found = shard_stats(hidden, shard, targets, entropy=True, **options)
        assert [x.tolist() for x in found] == [[-INF] * 3, [0.0] * 3, [-INF] * 3, [0.0] * 3]  # type: ignore
        d_hidden, d_weight = shard_gradients(hidden, shard, targets, grad, grad, **options)
        assert (d_hidden == 0).all() and (d_weight == 0).all() and d_weight.shape == shard.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_and_left_alone(impl):
    hidden, weight, targets, grad = make(10, 24, 60)
    before = hidden.clone(), weight.clone(), targets.clone(), grad.clone()
    expected = run(hidden[::2].clone(), weight, targets[::2].clone(), grad[::2].clone(), impl=impl)
    padded = torch.full((60, 30), NAN)
    padded[:, :24] = weight
    for h, w in ((hidden[::2], padded[:, :24]), (hidden.T.contiguous().T[::2], weight.T.contiguous().T)):
        assert_near(run(h, w, targets[::2], grad[::2], impl=impl), expected, 1e-6)
    for x, y in zip((hidden, weight, targets, grad), before, strict=True):
        assert torch.equal(x, y)


def test_offsets_beyond_two_to_the_31_elements_are_not_truncated():
    """Memory between the rows is never touched, so never resident."""
    hidden, weight, targets, grad = make(3, 16, 3, HALF)
    far = torch.empty(2**31 + 32, dtype=HALF).as_strided((3, 16), (2**30 + 8, 1))
    expected = run(hidden, weight, targets, grad, impl="triton")
    for name, near in (("hidden", hidden), ("weight", weight)):
        inputs = {"hidden": hidden, "weight": weight, name: far.copy_(near)}
        found = run(**inputs, targets=targets, grad=grad, impl="triton")
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_chunked_never_holds_the_logits():
    """Largest tensor and peak of all live ones, beside logits of 32 MB; the same watch sees the reference's."""
    num_rows, hidden_size, num_columns = 2048, 8, 4096
    inputs = make(num_rows, hidden_size, num_columns)
    logits_bytes, tile_bytes = 4 * num_rows * num_columns, 4 * module.TILE_ELEMENTS
    outputs = 4 * hidden_size * (num_rows + num_columns)
    with PeakMemory() as chunked:
        run(*inputs, impl="chunked")
    assert tile_bytes <= chunked.largest <= logits_bytes / 8
    assert chunked.peak <= 2.2 * tile_bytes + 2 * outputs  # a second tile for the entropy's sum
    with PeakMemory() as reference:
        run(*inputs, impl="reference")
    assert reference.largest >= logits_bytes and reference.peak >= 2 * logits_bytes


def test_memory_of_chunked_does_not_grow_with_the_logits():
    def peak(num_rows: int, num_columns: int) -> int:
        inputs = make(num_rows, 4, num_columns)
        with PeakMemory() as memory:
            run(*inputs, impl="chunked")
        return memory.peak

    small, large = peak(512, 2048), peak(2048, 8192)  # logits of 4 and of 64 MB
    vectors = 4 * (2048 * 40 + 8192 * 20)
    assert large <= small + vectors


@pytest.mark.parametrize("impl", ("triton", "library"))
def test_triton_allocates_one_chunk_and_a_few_numbers_a_token(many_chunks, monkeypatch, impl):
    """What is asked of torch, with the kernels left out: in bytes, for 16-bit inputs. Sums in float32 are as large
    as two in 16 bits; d hidden is rounded beside its own, and the CPU's product wants its factors widened.
    """
    for name in ("head_stats_kernel", "dlogits_kernel", "accumulate_kernel"):
        monkeypatch.setattr(
            fused, name, type("Nothing", (), {"__getitem__": lambda *_: lambda *_, **__: None})()
        )
    num_rows, hidden_size, num_columns = 4000, 2, 3000
    inputs = make(num_rows, hidden_size, num_columns, HALF)
    with PeakMemory() as memory:
        run(*inputs, impl=impl)
    findings = 4 * 4 * num_rows * -(-num_columns // fused.SPLIT)
    chunk = 2 * 128 * 256  # one tile of dlogits
    outputs_and_low_parts = 2 * 2 * hidden_size * (num_rows + num_columns)
    if impl == "library":
        outputs_and_low_parts += 2 * hidden_size * num_rows + 3 * chunk
    assert memory.peak <= 2.5 * findings + chunk + outputs_and_low_parts + 100 * num_rows
    assert memory.peak <= 0.1 * 4 * num_rows * num_columns


def test_the_default_follows_device_and_dtype():
    cpu = torch.zeros(1, 1, device="cpu")
    assert module._resolve(None, cpu) == "chunked"
    if DEVICE == "cuda":
        assert module._resolve(None, cpu.cuda()) == "triton"
        assert module._resolve(None, cpu.cuda().double()) == "chunked"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"hidden": torch.zeros(2, 9)}, r"\[2, 9\]"),
        ({"hidden": torch.zeros(2, 1, 8)}, r"\[2, 1, 8\]"),
        ({"hidden": torch.zeros(2, 8, dtype=torch.float16)}, "float16"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets .* int64 \[2\]"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets is torch.int32"),
        ({"impl": "cuda"}, "'reference', 'chunked', 'triton'"),
    ),
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(2, 8),
        "weight": torch.zeros(5, 8),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        logprob_head(**(arguments | change))


def test_triton_refuses_float64():
    hidden, weight, targets, _ = make(2, 4, 5, torch.float64)
    with pytest.raises(ValueError, match="impl='triton' has no float64: pass impl='reference'"):
        logprob_head(hidden, weight, targets, impl="triton")


OTHER_LAUNCHES = """
from dataclasses import replace
from sip_engine.kernels import dpo, logprob_head
from sip_engine.kernels.compile_report import compile_case

cases = [case for module in (dpo, logprob_head) for case in module.compile_cases()]
for case in cases:
    result = compile_case(case)
    assert result.ok, result
for case in {case.kernel.__name__: case for case in cases}.values():
    integers = [name for name, kind in case.signature.items() if kind.startswith("i32")]
    ones = {name: kind for name, kind in case.signature.items() if name not in integers}
    odd = {name: kind.split(":")[0] for name, kind in case.signature.items()}
    others = [replace(case, signature=ones, constexprs=case.constexprs | dict.fromkeys(integers, 1))]
    others.append(replace(case, signature=odd))
    for name, value in (("HIDDEN_SIZE", 1000), ("ADD", False)):
        if name in case.constexprs:
            others.append(replace(case, constexprs=case.constexprs | {name: value}))
    for other in others:
        assert compile_case(other).num_registers > 0
print(len(cases), sum(case.expect_wgmma for case in cases))
"""


@pytest.mark.slow
def test_compiles_for_sm_90_without_spills_and_with_wgmma():
    """And with integers that are 1 or no multiple of 16, other hidden sizes, and without earlier sums."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", OTHER_LAUNCHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["12", "10"]
