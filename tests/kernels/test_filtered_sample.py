"""filtered_sample draws from exactly what top-k and top-p leave, and reports log-probs of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chi_square import chi_square_score
from interpreter import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sip_engine.kernels._cut_off import CANDIDATES, keep_mask
from sip_engine.kernels._cut_off import IMPLS as CUT_OFF_IMPLS
from sip_engine.kernels.filtered_sample import filtered_sample
from sip_engine.kernels.random import sequence_key
from sip_engine.kernels.sample import ShardSample, merge_shards, sample_from_logits

IMPLS = ("reference", "triton")
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def make_keys(num_rows: int) -> tuple[Tensor, Tensor]:
    return sequence_key(1, 2, 3, torch.arange(num_rows)), torch.arange(num_rows) % 5


def kept_ids(logits: Tensor, temperature: float, top_k: int, top_p: float) -> set[int]:
    """The definition for one row, in float64 and in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[:top_k]
    probs = (logits[order].double() / temperature).softmax(0).tolist()
    kept, total = set(), 0.0
    for i, prob in zip(order, probs, strict=True):
        if total >= top_p and top_p < 1:
            break
        kept.add(i)
        total += prob
    return kept


FILTERS = ((1, 1.0), (7, 1.0), (200, 1.0), (50, 0.9), (50, 0.3), (7, 0.999), (50, 1e-9), (20, 0.999999))


@pytest.mark.parametrize("impl", CUT_OFF_IMPLS)
@pytest.mark.parametrize("temperature", (0.4, 1.0, 3.0))
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_mask_equals_its_definition(temperature, top_k, top_p, impl):
    logits = torch.randn(6, 50) * 3
    logits[1] = torch.randint(-2, 3, (50,)).float()  # many ties
    logits[2, 5:] = -INF
    mask = keep_mask(logits, temperature, top_k, top_p, impl=impl)
    for row, kept in zip(logits, mask, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == kept_ids(row, temperature, top_k, top_p)


def rows_of_every_kind(num_columns: int) -> Tensor:
    """Spread, ties, one value, both zeros, one peak, a long flat tail, and rows that end at -inf."""
    shape = (num_columns,)
    rows = [torch.randn(shape) * 4, torch.randint(-1, 2, shape).float(), torch.zeros(shape)]
    rows.append(torch.where(torch.rand(shape) < 0.5, 0.0, -0.0))
    rows.append(torch.where(torch.arange(num_columns) == num_columns // 2, 40.0, 0.0))
    rows.append(torch.randn(shape) * 1e-3)
    rows.append(torch.randn(shape).masked_fill(torch.rand(shape) < 0.7, -INF))
    rows[-1][-1] = 1e30
    rows.append(-torch.rand(shape) * 1e-38)  # below the normal numbers
    return torch.stack(rows)


@pytest.mark.parametrize("num_columns", (1, 2, 7, CANDIDATES - 1, CANDIDATES + 3, 5000))
def test_every_implementation_keeps_the_same_columns(num_columns):
    """5000 columns are three blocks of the kernel, and beyond the candidates that the CPU looks at first."""
    logits = rows_of_every_kind(num_columns)
    options = [(k, p) for k in (1, 3, num_columns // 2 + 1, num_columns + 5) for p in (1.0, 0.95, 0.5, 1e-12)]
    for top_k, top_p in [*options, (num_columns, 0.999999), (num_columns, 1 - 2**-53)]:
        want = keep_mask(logits, 0.7, top_k, top_p, impl="reference")
        for impl in (
            ("candidates", "triton") if num_columns < 5000 or top_p in (1.0, 0.5) else ("candidates",)
        ):
            found = keep_mask(logits, 0.7, top_k, top_p, impl=impl)
            assert torch.equal(found, want), (impl, top_k, top_p)
        assert want.any(1).all() and want.sum(1).max() <= top_k


def test_equal_probabilities_are_counted_exactly():
    """Ten of a tenth each: p = 0.3 is three of them, however they are summed."""
    for impl in CUT_OFF_IMPLS:
        for kept in range(1, 10):
            mask = keep_mask(torch.full((1, 10), 2.5), 1.0, 10, kept / 10, impl=impl)
            assert mask.sum() == kept and mask[0, :kept].all(), (impl, kept)


def test_nothing_is_sorted_by_default():
    class Sorts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket is not torch.ops.aten.sort, "a whole row is sorted"
            return func(*args, **(kwargs or {}))

    logits = torch.randn(4, 3000)
    every: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.9}]
    with Sorts():
        for options in every:
            filtered_sample(logits, *make_keys(4), **options)
        with pytest.raises(AssertionError, match="sorted"):
            filtered_sample(logits, *make_keys(4), top_p=0.9, impl="reference")


def test_top_k_alone_never_cuts_a_tail():
    """Behind a token of nearly all the mass, sums reach 1 long before the k-th token."""
    logits = torch.zeros(1, 40)
    logits[0, 3] = 45.0
    assert keep_mask(logits, 1.0, 30, 1.0).sum() == 30


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), ((1.0, 8, 1.0), (1.0, None, 0.8), (0.7, 12, 0.9), (1.6, 30, 0.95))
)
def test_frequencies_are_those_of_the_cut_softmax(temperature, top_k, top_p):
    """The same draws refuse a set with one token fewer, and one with one token more."""
    logits = torch.randn(60) * 2
    keys = sequence_key(5, 0, 0, torch.arange(20_000))
    found = filtered_sample(
        logits.expand(20_000, 60),
        keys,
        torch.zeros_like(keys),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    kept = kept_ids(logits, temperature, top_k or 60, top_p)
    order = logits.argsort(descending=True)
    for change, holds in ((0, True), (-1, False), (1, False)):
        probs = torch.zeros(60, dtype=torch.float64)
        ids = order[: len(kept) + change]
        probs[ids] = (logits[ids].double() / temperature).softmax(0)
        assert (chi_square_score(found.token, probs) < 4) == holds


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_p", (1.0, 0.6))
def test_tokens_agree_and_logprobs_are_of_all_raw_logits(impl, top_p):
    logits = torch.randn(40, 70) * 2
    found = filtered_sample(logits, *make_keys(40), temperature=0.5, top_k=9, top_p=top_p, impl=impl)
    reference = filtered_sample(
        logits, *make_keys(40), temperature=0.5, top_k=9, top_p=top_p, impl="reference"
    )
    assert torch.equal(found.token, reference.token)
    token, logprob = merge_shards(ShardSample(*(part[None] for part in found)))
    expected = logits.double().log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options", ({}, {"top_k": 70}, {"top_k": 999, "top_p": 1.0}, {"temperature": 0, "top_k": 3, "top_p": 0.1})
)
def test_nothing_cut_off_is_plain_sampling(impl, options):
    logits, keys = torch.randn(30, 70), make_keys(30)
    found = filtered_sample(logits, *keys, **options, impl=impl)
    plain = sample_from_logits(logits, *keys, temperature=options.get("temperature", 1.0), impl=impl)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


def test_the_token_is_the_best_perturbed_of_those_kept():
    """The same noise as in plain sampling: where that draws a kept token, both agree."""
    logits, keys = torch.randn(200, 50) * 2, make_keys(200)
    plain = sample_from_logits(logits, *keys, temperature=1.3)
    kept = keep_mask(logits, 1.3, 10, 0.9).gather(1, plain.token[:, None])[:, 0]
    found = filtered_sample(logits, *keys, temperature=1.3, top_k=10, top_p=0.9)
    assert 20 < kept.sum() < 180
    assert torch.equal(found.token == plain.token, kept)
    assert torch.equal(found.perturbed[kept], plain.perturbed[kept])
    assert (found.perturbed[~kept] < plain.perturbed[~kept]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_is_never_chosen(impl):
    logits, keys = torch.randn(50, 30), make_keys(50)
    padded = torch.cat([logits, torch.full((50, 10), 99.0)], dim=1)
    options = {"top_k": 35, "top_p": 0.9, "impl": impl}
    for a, b in zip(
        filtered_sample(padded, *keys, vocab_size=30, **options),
        filtered_sample(logits, *keys, **options),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_knows_nothing_of_the_others_and_logits_stay(impl):
    logits, (keys, positions) = torch.randn(9, 300), make_keys(9)
    before = logits.clone()
    options = {"top_k": 40, "top_p": 0.7, "impl": impl}
    whole = filtered_sample(logits, keys, positions, **options)
    assert torch.equal(logits, before)
    rows = torch.tensor([8, 0, 3, 3])
    logits[5] = NAN
    some = filtered_sample(logits[rows], keys[rows], positions[rows], **options)
    beside_nan = filtered_sample(logits, keys, positions, **options)
    for field, part, broken in zip(whole, some, beside_nan, strict=True):
        assert torch.equal(part, field[rows]) and torch.equal(broken[rows], field[rows])


@pytest.mark.parametrize("options", ({"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.9}, {}))
def test_nan_and_infinite_logits(options):
    logits = torch.tensor([[NAN, 0.0, 1.0, 2.0], [0.0, INF, 1.0, 0.0], [-INF] * 4, [-INF, 3.0, -INF, -INF]])
    found = filtered_sample(logits, *make_keys(4), **options)
    token, logprob = merge_shards(ShardSample(*(part[None] for part in found)))
    assert token.tolist() == [-1, -1, -1, 1]
    assert logprob[:3].isnan().all() and logprob[3] == 0
    assert found.token.tolist() == [-1, -1, -1, 1]
    assert found.sum_exp[:2].isnan().all() and found.sum_exp[2:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    keys = torch.zeros(0, dtype=torch.int64)
    assert filtered_sample(torch.zeros(0, 9), keys, keys, top_k=2, top_p=0.5, impl=impl).token.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"top_k": 2, "temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 2, "keys": torch.zeros(3, dtype=torch.int64)}, r"keys .* int64 \[2\]"),
    ),
)
def test_bad_input_is_named(options, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        filtered_sample(**({"logits": torch.zeros(2, 8), "keys": zeros, "positions": zeros} | options))
