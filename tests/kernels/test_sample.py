"""sample draws the argmax of logits / T + noise, of any shard, and with it exact softmax frequencies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from chi_square import chi_square_score
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from torch import Tensor

from sip_engine.kernels.random import sequence_key, uniform
from sip_engine.kernels.sample import ShardSample, finish_sample, merge_shards, sample, sample_from_logits

IMPLS = ("reference", "triton")
HALF = (
    torch.float16 if DEVICE == "cpu" else torch.bfloat16
)  # the interpreter multiplies bfloat16 bits as integers
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def make_keys(num_rows: int) -> tuple[Tensor, Tensor]:
    return sequence_key(1, 2, 3, torch.arange(num_rows)), torch.arange(num_rows) % 5


def make_integers(num_rows: int, hidden_size: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Hidden states and weights whose logits are exact, in whatever order they are summed."""
    hidden = torch.randint(-4, 5, (num_rows, hidden_size)) / 8
    return hidden, torch.randint(-4, 5, (num_columns, hidden_size)) / 8


def merge(*shards: ShardSample) -> tuple[Tensor, Tensor]:
    return merge_shards(ShardSample(*(torch.stack(parts) for parts in zip(*shards, strict=True))))


def exact_perturbed(logits: Tensor, keys: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """float64 logits / T + noise."""
    if temperature == 0:
        return logits
    v = uniform(keys, positions, torch.arange(logits.shape[1]), impl="reference").double()
    return logits / temperature - (-(-v).log1p()).log()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, HALF))
@pytest.mark.parametrize("temperature", (0.0, 0.6, 1.0))
@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "num_columns"), ((1, 1, 1), (3, 33, 130), (130, 70, 257), (5, 128, 640))
)
def test_equals_float64(impl, dtype, temperature, num_rows, hidden_size, num_columns):
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    weight = (torch.randn(num_columns, hidden_size) * 2 / hidden_size**0.5).to(dtype)
    keys, positions = make_keys(num_rows)
    found = sample(hidden, weight, keys, positions, temperature=temperature, impl=impl)
    logits = hidden.double() @ weight.double().T
    perturbed = exact_perturbed(logits, keys, positions, temperature)
    near: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
    best = perturbed.max(dim=1)
    assert (perturbed.gather(1, found.token[:, None])[:, 0] >= best.values - 1e-4).all()
    assert (found.token == best.indices).sum() >= num_rows - 1  # unless two lie within float error
    torch.testing.assert_close(found.perturbed.double(), best.values, **near)
    torch.testing.assert_close(found.max.double(), logits.amax(dim=1), **near)
    at_token = logits.gather(1, found.token[:, None])[:, 0]
    torch.testing.assert_close(found.logit.double(), at_token, **near)
    token, logprob = merge(found)
    assert torch.equal(token, found.token) and logprob.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), at_token - logits.logsumexp(dim=1), **near)


def test_bfloat16_reference_multiplies_in_float32():
    hidden, weight = torch.randn(4, 50).bfloat16(), torch.randn(90, 50).bfloat16()
    found = sample(hidden, weight, *make_keys(4), temperature=0.0, impl="reference")
    assert torch.equal(found.token, (hidden.double() @ weight.double().T).argmax(dim=1))
    torch.testing.assert_close(found.max.double(), (hidden.double() @ weight.double().T).amax(dim=1))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 75), max_size=3),
    vocab_size=st.integers(1, 300),
    temperature=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_merged_shards_draw_what_one_shard_draws(impl, cuts, vocab_size, temperature):
    """Shards of any width, empty and all padding included; cuts at multiples of 4."""
    hidden, weight = make_integers(6, 16, 300)
    keys, positions = make_keys(6)
    options = {"temperature": temperature, "vocab_size": vocab_size, "impl": impl}
    token, logprob = merge(sample(hidden, weight, keys, positions, **options))
    assert ((token >= 0) & (token < vocab_size)).all()
    bounds = [0, *sorted(4 * cut for cut in cuts), 300]
    shards = [
        sample(hidden, weight[start:end], keys, positions, vocab_start=start, **options)
        for start, end in pairwise(bounds)
    ]
    merged_token, merged_logprob = merge(*shards)
    assert torch.equal(merged_token, token)
    torch.testing.assert_close(merged_logprob, logprob, rtol=0, atol=2e-6)
    given_logits = sample_from_logits(hidden @ weight.T, keys, positions, **options)
    assert torch.equal(given_logits.token, token)
    torch.testing.assert_close(merge(given_logits)[1], logprob, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_a_row_knows_nothing_of_the_others(impl, temperature):
    hidden, weight = make_integers(140, 40, 200)
    keys, positions = make_keys(140)
    whole = sample(hidden, weight, keys, positions, temperature=temperature, impl=impl)
    hidden[[1, 77]] = NAN
    rows = torch.tensor([139, 0, 60, 60, 128])
    some = sample(hidden[rows], weight, keys[rows], positions[rows], temperature=temperature, impl=impl)
    alone = sample(hidden[60:61], weight, keys[60:61], positions[60:61], temperature=temperature, impl=impl)
    broken = sample(hidden, weight, keys, positions, temperature=temperature, impl=impl)
    for field, part, one, beside_nan in zip(whole, some, alone, broken, strict=True):
        assert torch.equal(part, field[rows])
        assert torch.equal(one[0], field[60])
        assert torch.equal(beside_nan[rows], field[rows])
    assert (broken.token[[1, 77]] == -1).all() and (whole.token >= 0).all()


@pytest.mark.parametrize(
    ("impl", "temperature"), (("reference", 0.5), ("reference", 1.0), ("reference", 1.7), ("triton", 0.7))
)
def test_frequencies_are_those_of_softmax(impl, temperature):
    """Rollouts of one hidden state, in two tiles; the same draws refuse a slightly wrong temperature."""
    num_rows = 2000 if impl == "triton" and DEVICE == "cpu" else 20_000  # the interpreter is slow
    hidden, weight = torch.randn(1, 8), torch.randn(140, 8)
    keys = sequence_key(7, 0, 0, torch.arange(num_rows))
    found = sample(
        hidden.expand(num_rows, 8), weight, keys, torch.zeros_like(keys), temperature=temperature, impl=impl
    )
    logits = (hidden.double() @ weight.double().T)[0]
    assert chi_square_score(found.token, (logits / temperature).softmax(0)) < 4
    assert chi_square_score(found.token, (logits / (1.2 * temperature)).softmax(0)) > 4


def test_frequencies_along_one_sequence():
    """Positions of one key are as independent as keys."""
    logits = torch.randn(20) * 2
    positions = torch.arange(50_000)
    keys = sequence_key(7, 0, 0, 0).expand(50_000)
    tokens = sample_from_logits(logits.expand(50_000, 20), keys, positions).token
    probs = logits.softmax(0)
    assert chi_square_score(tokens, probs) < 4
    pairs = tokens[:-1:2] * 20 + tokens[1::2]
    assert chi_square_score(pairs, torch.outer(probs, probs).flatten()) < 4


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_takes_the_lowest_id_of_a_tie(impl):
    """Ties inside a tile, between tiles and between shards."""
    hidden, weight = torch.ones(2, 4), torch.zeros(400, 4)
    weight[[37, 38, 129, 300]] = 1.0
    options = {"temperature": 0.0, "impl": impl}
    keys = make_keys(2)
    assert sample(hidden, weight, *keys, **options).token.tolist() == [37, 37]
    shards = [
        sample(hidden, weight[a : a + 100], *keys, vocab_start=a, **options) for a in range(0, 400, 100)
    ]
    assert merge(*shards)[0].tolist() == [37, 37]
    assert merge(*shards[1:])[0].tolist() == [129, 129]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_nan_and_infinite_logits(impl, temperature):
    """Rows [positive, negative, NaN, +inf] against columns that are finite, or -inf for a positive row."""
    hidden = torch.tensor([[1.0], [-1.0], [NAN], [INF]])
    keys, options = make_keys(4), {"temperature": temperature, "impl": impl}
    weight = torch.full((300, 1), -INF)
    weight[[140, 299]] = 0.5
    found = sample(hidden, weight, *keys, **options)
    token, logprob = merge(found)
    assert token[0] in (140, 299) and token[1:].tolist() == [-1, -1, -1]
    torch.testing.assert_close(logprob, torch.tensor([-0.6931472, NAN, NAN, NAN]), equal_nan=True)
    assert found.sum_exp[1:].isnan().all()
    # a shard without a column to choose from does not disturb the others
    nothing = sample(hidden[:1], weight[:100], keys[0][:1], keys[1][:1], **options)
    assert [part.item() for part in nothing] == [-INF, -1, -INF, -INF, 0.0]
    rest = sample(hidden[:1], weight[100:], keys[0][:1], keys[1][:1], vocab_start=100, **options)
    assert merge(nothing, rest)[0] == token[0]
    assert merge(nothing, nothing)[0] == -1 and merge(nothing, nothing)[1].isnan()
    # and a shard with a NaN disturbs all
    poisoned = rest._replace(sum_exp=torch.full((1,), NAN))
    assert merge(nothing, poisoned, rest)[0] == -1


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    hidden, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    token, logprob = merge(sample(hidden, weight, *make_keys(2), temperature=0.01, impl=impl))
    assert token.tolist() == [0, 1] and logprob.tolist() == [0.0, 0.0]
    coldest = sample(hidden * 1e-4, weight, *make_keys(2), temperature=1e-30, impl=impl)
    assert coldest.token.tolist() == [0, 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_columns(impl):
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    keys, positions = make_keys(3)
    empty = sample(hidden[:0], weight, keys[:0], positions[:0], impl=impl)
    assert all(part.shape == (0,) for part in empty)
    for shard, start in ((weight, 40), (weight[:0], 0)):
        found = sample(hidden, shard, keys, positions, vocab_start=start, vocab_size=37, impl=impl)
        assert [part.tolist() for part in found] == [[-INF] * 3, [-1] * 3, [-INF] * 3, [-INF] * 3, [0.0] * 3]
    assert merge(found)[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read(impl):
    hidden, weight = make_integers(10, 24, 60)
    keys, positions = make_keys(10)
    plain = sample(hidden[::2].clone(), weight, keys[::2].clone(), positions[::2].clone(), impl=impl)
    padded = torch.full((60, 30), NAN)
    padded[:, :24] = weight
    views = sample(hidden.T.contiguous().T[::2], padded[:, :24], keys[::2], positions[::2], impl=impl)
    for a, b in zip(plain, views, strict=True):
        assert torch.equal(a, b)


def test_findings_travel_as_twenty_bytes():
    token = torch.tensor([0, -1, 2**31 - 1, 123_456])
    found = ShardSample(
        torch.randn(4), token, torch.randn(4), torch.tensor([NAN, -INF, INF, 0.0]), torch.rand(4)
    )
    packed = found.pack()
    assert packed.shape == (4, 5) and packed.dtype == torch.float32
    for sent, received in zip(found, ShardSample.unpack(packed.clone()), strict=True):
        torch.testing.assert_close(received, sent, rtol=0, atol=0, equal_nan=True)
    assert ShardSample.unpack(torch.stack([packed, packed])).token.tolist() == [token.tolist()] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"hidden": torch.zeros(2, 9)}, r"\[2, 9\]"),
        ({"hidden": torch.zeros(2, 8, dtype=torch.float16)}, "float16"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys .* int64 \[2\]"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions is torch.int32"),
        ({"temperature": -0.5}, "temperature=-0.5 must be finite"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"temperature": INF}, "temperature=inf"),
        ({"temperature": 1e-40}, r"0 \(greedy\) or at least 1e-30"),
        ({"vocab_start": 6}, "vocab_start=6 must be a multiple of 4"),
        ({"impl": "cuda"}, "'reference', 'triton'"),
    ),
)
def test_bad_input_is_named(change, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(5, 8), "keys": zeros, "positions": zeros}
    with pytest.raises(ValueError, match=message):
        sample(**(arguments | {"impl": "triton"} | change))


def test_bad_input_beside_logits_is_named():
    logits, zeros = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature=-1"):
        sample_from_logits(logits, zeros, zeros, temperature=-1)
    with pytest.raises(ValueError, match="keys"):
        sample_from_logits(logits, zeros[:1], zeros)


def test_one_shard_is_finished_with_the_same_bits() -> None:
    """With rows that have nothing to choose from and rows that are not finite."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[1], logits[2, 3], logits[3, 5] = -torch.inf, torch.nan, torch.inf
    numbers = torch.arange(6, device=DEVICE)
    found = sample_from_logits(logits, numbers, numbers)
    want = merge_shards(ShardSample(*(part[None] for part in found)))
    for ours, theirs in zip(finish_sample(found), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
