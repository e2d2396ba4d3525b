"""Cut positions against a twin that slices token lists, and the permutation that orders them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sip_engine.data.permutation import Permutation
from sip_engine.data.samples import SampleIndex
from sip_engine.utils.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=20)
SUFFIX = st.integers(1, 9)
MIN_PREFIX = st.integers(0, 20)


def naive_cuts(length: int, suffix_tokens: int, min_prefix_tokens: int) -> list[int]:
    """The cuts of one document, found by slicing it into lists of tokens."""
    tokens = ["bos", *range(length - 2), "eos"] if length >= 2 else []
    chunks = [tokens[start : start + suffix_tokens] for start in range(0, len(tokens), suffix_tokens)]
    cuts = []
    for number, chunk in enumerate(chunks):
        before = [token for earlier in chunks[:number] for token in earlier]
        is_usable = number > 0 and len(chunk) == suffix_tokens
        if is_usable and len([token for token in before if token != "bos"]) >= min_prefix_tokens:
            cuts.append(len(before))
    return cuts


def all_samples(index: SampleIndex, epoch: int = 0) -> list[tuple[int, int]]:
    documents, cuts = index.locate(np.arange(index.num_samples), epoch)
    return list(zip(documents.tolist(), cuts.tolist(), strict=True))


@given(LENGTHS, SUFFIX, MIN_PREFIX)
@example([256, 257, 0, 384], 9, 1)
def test_every_chunk_is_cut_as_the_twin_cuts(lengths: list[int], suffix: int, min_prefix: int) -> None:
    lengths = [length for length in lengths if length != 1]
    expected = [
        (document, cut)
        for document, length in enumerate(lengths)
        for cut in naive_cuts(length, suffix, min_prefix)
    ]
    if not expected:
        with pytest.raises(DataError):
            SampleIndex(np.array(lengths), suffix, 20, min_prefix)
        return
    index = SampleIndex(np.array(lengths, dtype=np.int32), suffix, 20, min_prefix)
    assert all_samples(index) == expected
    assert index.num_samples == len(expected)
    assert index.num_too_short == len(lengths) - len({document for document, _ in expected})


@given(LENGTHS, SUFFIX, MIN_PREFIX, st.integers(0, 2**63), st.integers(0, 1000))
def test_a_random_chunk_is_one_of_the_twins_in_every_document(
    lengths: list[int], suffix: int, min_prefix: int, seed: int, epoch: int
) -> None:
    lengths = [length for length in lengths if length != 1]
    cuts = [naive_cuts(length, suffix, min_prefix) for length in lengths]
    assume(any(cuts))
    index = SampleIndex(np.array(lengths), suffix, 20, min_prefix, "random_chunk", seed)
    samples = all_samples(index, epoch)
    assert [document for document, _ in samples] == [number for number, found in enumerate(cuts) if found]
    assert all(cut in cuts[document] for document, cut in samples)
    assert index.num_too_short == sum(not found for found in cuts)


def test_literal_cuts_of_the_papers_setting() -> None:
    index = SampleIndex(np.array([255, 256, 511, 512, 2200]), 128, 1920)
    by_document = [[cut for number, cut in all_samples(index) if number == document] for document in range(5)]
    assert by_document == [[], [128], [128, 256], [128, 256, 384], [128 * i for i in range(1, 17)]]
    assert index.num_too_short == 1
    assert [index.prefix_start(cut) for cut in (128, 1920, 2048)] == [0, 0, 128]


def test_random_chunks_are_drawn_anew_by_epoch_seed_and_document() -> None:
    lengths = np.full(2000, 11 * 8)
    index = SampleIndex(lengths, 8, 80, cut="random_chunk", seed=3)
    draws = {epoch: [cut for _, cut in all_samples(index, epoch)] for epoch in (0, 1)}
    other = SampleIndex(lengths, 8, 80, cut="random_chunk", seed=4)
    pairs = [(draws[0], draws[1]), (draws[0], [cut for _, cut in all_samples(other, 0)])]
    for first, second in pairs:
        assert 0.05 < np.mean(np.array(first) == np.array(second)) < 0.15  # one of ten by chance
    counts = np.unique(draws[0], return_counts=True)[1]
    assert len(counts) == 10
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert all_samples(index, 1) == all_samples(index, 1)


def test_memory_is_of_documents_not_of_samples() -> None:
    index = SampleIndex(np.array([2**31 - 1] * 1000, dtype=np.int32), 1, 1)
    assert index.num_samples == 1000 * (2**31 - 3)
    documents, cuts = index.locate(np.array([0, 2**31 - 3, index.num_samples - 1]))
    assert documents.tolist() == [0, 1, 999]
    assert cuts.tolist() == [2, 2, 2**31 - 2]


def test_documents_of_length_zero_are_left_out() -> None:
    whole = SampleIndex(np.array([20, 20, 20]), 5, 10)
    part = SampleIndex(np.array([20, 0, 20]), 5, 10)
    assert all_samples(part) == [(document, cut) for document, cut in all_samples(whole) if document != 1]
    assert part.fingerprint != whole.fingerprint
    assert part.fingerprint != SampleIndex(np.array([0, 20, 20]), 5, 10).fingerprint


def test_no_sample_at_all_names_the_longest_document() -> None:
    with pytest.raises(DataError) as error:
        SampleIndex(np.array([100, 255, 3]), 128, 1920)
    assert str(error.value) == (
        "no document is long enough for one sample: the longest has 255 tokens, and suffixes of 128 "
        "need 256; give longer documents or a smaller suffix_tokens"
    )


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ((0, 10, 1, "every_chunk"), "suffix_tokens is 0 but must be at least 1"),
        ((5, 10, 11, "every_chunk"), "min_prefix_tokens is 11 and max_prefix_tokens 10"),
        ((5, 10, -1, "every_chunk"), "min_prefix_tokens is -1 and max_prefix_tokens 10"),
        ((5, 0, 0, "every_chunk"), "min_prefix_tokens is 0 and max_prefix_tokens 0"),
        ((5, 10, 1, "sometimes"), "cut is 'sometimes' but must be 'every_chunk' or 'random_chunk'"),
    ],
)
def test_contradicting_settings_are_refused(settings: tuple, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        SampleIndex(np.array([100]), *settings)


@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 5))
@example(1, 0, 0)
@example(4, 0, 0)
@example(5, 0, 0)
@example(1024, 1, 1)
@example(1025, 1, 1)
def test_the_permutation_is_a_bijection_in_any_batching(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, seed, epoch)
    images = permutation(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))
    single = [int(permutation(np.array([place]))[0]) for place in range(0, size, 1 + size // 10)]
    assert single == images[:: 1 + size // 10].tolist()


@given(st.integers(2**40, 2**62), st.integers(0, 2**40))
def test_huge_permutations_stay_in_range_and_apart(size: int, seed: int) -> None:
    images = Permutation(size, seed, 0)(np.arange(64))
    assert len(set(images.tolist())) == 64
    assert all(0 <= image < size for image in images.tolist())


def test_the_order_of_a_seed_never_changes() -> None:
    """Checkpoints of earlier releases resume in this order."""
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [8, 4, 6, 3, 9, 1, 0, 2, 5, 7]
    assert Permutation(10**12, 17, 3)(np.arange(3)).tolist() == [220595240035, 198589877088, 922798490912]


def test_orders_differ_by_seed_and_epoch_like_random_ones() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 0)]
    orders = [Permutation(1000, *key)(np.arange(1000)) for key in keys]
    for i, first in enumerate([np.arange(1000), *orders]):
        for second in orders[i:]:
            assert (first == second).sum() < 10  # one on average by chance


def test_every_place_is_equally_likely() -> None:
    size, trials = 8, 1600
    images = np.array([Permutation(size, seed, 0)(np.arange(2)) for seed in range(trials)])
    for place in range(2):
        counts = np.bincount(images[:, place], minlength=size)
        assert ((counts - 200) ** 2 / 200).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001
    pairs = np.bincount(images[:, 0] * size + images[:, 1], minlength=size * size)
    pairs = np.delete(pairs, np.arange(size) * (size + 1))
    expected = trials / len(pairs)
    assert ((pairs - expected) ** 2 / expected).sum() < 93.2  # 55 degrees of freedom, p = 0.001
