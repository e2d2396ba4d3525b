"""Random numbers are Philox of (key, position, column), uniform or Gumbel, and depend on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from torch import Tensor

from sip_engine.kernels import random
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.random import (
    gumbel,
    gumbel_tile,
    philox_reference,
    philox_to_uniform,
    sequence_key,
    tile_columns,
    uniform,
    uniform_to_gumbel,
)

IMPLS = ("reference", "triton")
WORD, LONG = 2**32, 2**64
HALF_STEP, LAST = 2.0**-33, 1.0 - 2.0**-24
"""The smallest and the largest uniform number."""

# Known answers that come with Random123, the authors' library: counter, key, result.
PHILOX_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
SPLITMIX_ANSWERS = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
"""The first outputs of splitmix64 from state 0."""

signed = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(autouse=True)
def device_and_seed():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def int64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_int64(*shape: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape)


def philox_in_python(counter, key) -> tuple[int, ...]:
    """Philox4x32-10 as the paper draws it, in unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = right // WORD ^ c1 ^ k0, right % WORD, left // WORD ^ c3 ^ k1, left % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def uniform_in_python(key: int, position: int, column: int) -> float:
    key %= LONG
    words = philox_in_python((column // 4 % WORD, position % WORD, 0, 0), (key % WORD, key // WORD))
    v = np.float32(words[column % 4]) * np.float32(2.0**-32) + np.float32(HALF_STEP)
    return float(min(v, np.float32(LAST)))


def splitmix_in_python(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % LONG
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % LONG
    x = (x ^ x >> 27) * 0x94D049BB133111EB % LONG
    return x ^ x >> 31


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert philox_in_python(counter, key) == answer
    words = philox_reference(tuple(map(int64, counter)), tuple(map(int64, key)))
    assert tuple(map(int, words)) == answer
    c0, c1, c2, c3, k0, k1 = (np.array([word], dtype=np.uint64) for word in (*counter, *key))
    assert tuple(word.item() for word in philox_reference((c0, c1, c2, c3), (k0, k1))) == answer


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(signed, min_size=1, max_size=3),
    position=st.integers(0, 2**63 - 1),
    columns=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1)), min_size=1, max_size=9),
)
def test_uniform_is_philox_of_key_position_and_column(impl, keys, position, columns):
    v = uniform(int64(keys), int64([position] * len(keys)), int64(columns), impl=impl)
    assert v.tolist() == [[uniform_in_python(key, position, column) for column in columns] for key in keys]


@pytest.mark.parametrize("num_columns", (1, 511, 1030))
def test_implementations_agree(num_columns):
    keys, positions = random_int64(3), torch.tensor([0, 1, 2**40])
    for columns in (torch.arange(num_columns) + 3, torch.randint(200_000, (num_columns,))):
        v = [uniform(keys, positions, columns, impl=impl) for impl in IMPLS]
        assert torch.equal(*v)
        exact = -(-(-v[0].double()).log1p()).log()
        for impl in IMPLS:
            g = gumbel(keys, positions, columns, impl=impl)
            torch.testing.assert_close(g.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw", (uniform, gumbel))
@pytest.mark.parametrize("impl", IMPLS)
def test_a_number_depends_on_neither_batch_nor_columns(impl, draw):
    keys, positions, columns = random_int64(6), torch.tensor([5, 5, 0, 9, 1, 5]), torch.arange(700)
    all_numbers = draw(keys, positions, columns, impl=impl)
    rows, places = torch.tensor([4, 0, 0, 5]), torch.randperm(700)[:123]
    some = draw(keys[rows], positions[rows], columns[places], impl=impl)
    assert torch.equal(some, all_numbers[rows][:, places])
    shards = [draw(keys, positions, part, impl=impl) for part in columns.split([1, 130, 512, 57])]
    assert torch.equal(torch.cat(shards, dim=1), all_numbers)


@pytest.mark.parametrize("chunk", (7, 30))
def test_chunks_of_the_reference_do_not_show(monkeypatch, chunk):
    arguments = random_int64(9), torch.arange(9), torch.arange(50)
    whole = uniform(*arguments, impl="reference")
    monkeypatch.setattr(random, "CHUNK", chunk)
    assert torch.equal(uniform(*arguments, impl="reference"), whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("num_rows", "num_columns"), ((0, 5), (2, 0), (0, 0)))
def test_nothing_to_draw(impl, num_rows, num_columns):
    keys = torch.zeros(num_rows, dtype=torch.int64)
    assert gumbel(keys, keys, torch.arange(num_columns), impl=impl).shape == (num_rows, num_columns)


@jit
def transform_kernel(words_ptr, uniform_ptr, gumbel_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    v = philox_to_uniform(tl.load(words_ptr + index).to(tl.uint32))
    tl.store(uniform_ptr + index, v)
    tl.store(gumbel_ptr + index, uniform_to_gumbel(v))


def test_words_at_both_ends_and_at_the_seam_of_the_series():
    words = int64([0, 1, 2**28 - 1, 2**28, 2**28 + 1, 2**31, WORD - 513, WORD - 1])
    words = torch.cat([words, torch.arange(120) * (WORD // 120)])
    v, g = torch.full((2, 128), torch.nan)
    transform_kernel[(1,)](words, v, g, SIZE=128)
    exact = ((words.double() + 0.5) / WORD).clamp(max=LAST)
    torch.testing.assert_close(v.double(), exact, rtol=2**-23, atol=0)
    assert v[0] == HALF_STEP and v[7] == LAST
    torch.testing.assert_close(g.double(), -(-(-v.double()).log1p()).log(), rtol=1e-6, atol=1e-6)
    assert g.min() > -2.9 and g.max() < 22.9


def test_reference_stays_inside_the_open_interval(monkeypatch):
    def extreme_words(counter, key):
        zero = (counter[0] + counter[1] + key[0]) * 0
        return zero, zero + 1, zero + (WORD - 513), zero + (WORD - 1)

    monkeypatch.setattr(random, "philox_reference", extreme_words)
    arguments = int64([7]), int64([0]), torch.arange(4)
    v = uniform(*arguments, impl="reference")[0]
    assert v[0] == HALF_STEP and v[3] == LAST and ((v > 0) & (v < 1)).all()
    g = gumbel(*arguments, impl="reference")[0].double()
    torch.testing.assert_close(g, -(-(-v.double()).log1p()).log(), rtol=1e-6, atol=1e-6)


@jit
def tile_kernel(keys_ptr, positions_ptr, out_ptr, first, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.arange(0, BLOCK_B)[:, None]
    noise = gumbel_tile(tl.load(keys_ptr + row), tl.load(positions_ptr + row), first, BLOCK_B, BLOCK_C)
    tl.store(out_ptr + row * BLOCK_C + tile_columns(BLOCK_C)[None, :], noise)


def test_a_tile_of_noise_is_that_of_its_columns():
    keys, positions = random_int64(16), torch.arange(16)
    out = torch.full((16, 64), torch.nan)
    tile_kernel[(1,)](keys, positions, out, 1236, BLOCK_B=16, BLOCK_C=64)
    expected = gumbel(keys, positions, torch.arange(1236, 1236 + 64), impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def kolmogorov_smirnov(cdf: Tensor) -> float:
    """sqrt(n) * sup |F_n - F| for values of F; exceeds 1.95 with probability 0.001."""
    ordered = cdf.double().flatten().sort().values
    n = ordered.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))


def test_distribution():
    keys = sequence_key(1, 2, torch.arange(64), 0)
    arguments = keys, torch.arange(64) // 7, torch.arange(1000)
    assert kolmogorov_smirnov(uniform(*arguments)) < 1.95
    g = gumbel(*arguments)
    assert kolmogorov_smirnov((-(-g).exp()).exp()) < 1.95
    assert kolmogorov_smirnov((-(-0.95 * g).exp()).exp()) > 1.95  # the test has the power to fail


def test_neighbours_do_not_correlate():
    """Keys of neighbouring rollouts, neighbouring positions and columns: each step gives fresh numbers."""
    keys = sequence_key(0, 0, 0, torch.arange(30)).repeat_interleave(30)
    v = uniform(keys, torch.arange(30).repeat(30), torch.arange(60)).double().unflatten(0, (30, 30)) - 0.5
    for dim in range(3):
        pairs = v.narrow(dim, 0, v.shape[dim] - 1) * v.narrow(dim, 1, v.shape[dim] - 1) * 12
        assert abs(float(pairs.mean())) * math.sqrt(pairs.numel()) < 4  # standard normal if independent


def test_splitmix_gives_the_known_answers():
    states = [0x9E3779B97F4A7C15 * i % LONG for i in range(3)]
    assert tuple(map(splitmix_in_python, states)) == SPLITMIX_ANSWERS


@given(parts=st.tuples(signed, signed, signed, signed), wraps=st.integers(-2, 2))
@settings(max_examples=50, deadline=None)
def test_sequence_key_is_the_chain_of_hashes(parts, wraps):
    expected = 0
    for number, part in enumerate(parts):
        expected = splitmix_in_python(part % LONG if number == 0 else expected ^ part % LONG)
    assert int(sequence_key(*parts)) % LONG == expected
    assert int(sequence_key(*[part + wraps * LONG for part in parts])) % LONG == expected
    assert sequence_key(*[int64([part]) for part in parts]).tolist() == [int(sequence_key(*parts))]


def test_sequence_keys_broadcast_and_differ():
    steps, documents, rollouts = (torch.arange(20) + i for i in (0, 5, 9))
    keys = sequence_key(3, steps[:, None, None], documents[:, None], rollouts)
    assert keys.shape == (20, 20, 20) and keys.dtype == torch.int64
    assert keys.unique().numel() == 8000
    assert int(keys[4, 2, 1]) == int(sequence_key(3, 4, 7, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"positions": int64([1])}, r"positions is torch.int64 \[1\]: must be int64 \[2\]"),
        ({"keys": torch.zeros(2)}, "keys is torch.float32"),
        ({"columns": torch.zeros(2, dtype=torch.int32)}, "columns is torch.int32"),
        ({"columns": int64([[1]])}, r"columns is torch.int64 \[1, 1\]"),
        ({"impl": "numpy"}, "'reference', 'triton'"),
    ),
)
@pytest.mark.parametrize("draw", (uniform, gumbel))
def test_bad_input_is_named(draw, change, message):
    arguments = {"keys": int64([1, 2]), "positions": int64([0, 0]), "columns": int64([0])}
    with pytest.raises(ValueError, match=message):
        draw(**(arguments | change))
