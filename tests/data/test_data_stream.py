"""The order of samples: one for any number of ranks and batch sizes, exact after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sip_engine.data.build import build_token_files
from sip_engine.data.samples import SampleIndex
from sip_engine.data.stream import SampleStream
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.types import Sample
from sip_engine.utils.errors import CheckpointError, DataError

TEXTS = [
    f"Document {number}. " + "".join(f"Fact {number * i} is {i}. " for i in range(number * 3))
    for number in range(1, 9)
]
SUFFIX, MAX_PREFIX = 8, 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe.model")


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFiles:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return build_token_files(folder, tokenizer, folder / "cache")


@pytest.fixture(scope="module", params=["every_chunk", "random_chunk"])
def index(files: TokenFiles, request: pytest.FixtureRequest) -> SampleIndex:
    return SampleIndex(files.lengths, SUFFIX, MAX_PREFIX, cut=request.param, seed=5)


@pytest.fixture
def stream(files: TokenFiles, tokenizer: Tokenizer, index: SampleIndex) -> SampleStream:
    return SampleStream(files, tokenizer, index)


def keys(samples: list[Sample]) -> list[tuple[int, int]]:
    return [(sample.document, sample.cut) for sample in samples]


def test_a_sample_is_a_slice_of_its_document(
    stream: SampleStream, tokenizer: Tokenizer, index: SampleIndex
) -> None:
    samples = stream.samples_at(0, index.num_samples)
    for sample in samples:
        whole = [tokenizer.bos_id, *tokenizer.encode(TEXTS[sample.document]).tolist(), tokenizer.eos_id]
        start = max(0, sample.cut - MAX_PREFIX)
        assert sample.prefix_ids.tolist() == whole[start : sample.cut]
        assert sample.suffix_ids.tolist() == whole[sample.cut : sample.cut + SUFFIX]
        before = tokenizer.decode(whole[:start])
        assert TEXTS[sample.document].startswith(before + sample.prefix + sample.suffix)
        assert sample.prefix_ids.dtype == sample.suffix_ids.dtype == "int32"
    assert any(sample.prefix_ids[0] == tokenizer.bos_id for sample in samples)


def test_an_epoch_shows_every_sample_once_and_each_epoch_in_another_order(
    stream: SampleStream, index: SampleIndex
) -> None:
    size = index.num_samples
    epochs = [keys(stream.samples_at(epoch * size, size)) for epoch in range(3)]
    documents = [sorted(document for document, _ in epoch) for epoch in epochs]
    assert documents[0] == documents[1] == documents[2]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert [document for document, _ in epochs[0]] != [document for document, _ in epochs[1]]
    if index.cut == "every_chunk":
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    else:
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3


def test_batches_run_across_the_end_of_epochs(stream: SampleStream, index: SampleIndex) -> None:
    size = index.num_samples
    sequence = keys(stream.samples_at(0, 4 * size))
    assert keys(stream.samples_at(size - 2, 2 * size + 4)) == sequence[size - 2 : 3 * size + 2]
    batch_size = 3 * size + 1
    assert keys(stream.next_batch(batch_size)) == sequence[:batch_size]
    assert stream.position == batch_size


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_share_the_same_batches(
    files: TokenFiles, tokenizer: Tokenizer, index: SampleIndex, num_ranks: int
) -> None:
    ranks = [SampleStream(files, tokenizer, index) for _ in range(num_ranks)]
    expected = keys(SampleStream(files, tokenizer, index).samples_at(0, 60))
    for step in range(4):
        shares = [keys(stream.next_batch(15, rank, num_ranks)) for rank, stream in enumerate(ranks)]
        assert [shares[i % num_ranks][i // num_ranks] for i in range(15)] == expected[
            15 * step : 15 * step + 15
        ]
        assert sum(map(len, shares)) == 15


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), resume_at=st.integers(0, 6))
def test_a_resumed_stream_equals_an_uninterrupted_one(
    files: TokenFiles, tokenizer: Tokenizer, index: SampleIndex, sizes: list[int], resume_at: int
) -> None:
    expected = keys(SampleStream(files, tokenizer, index).samples_at(0, sum(sizes)))
    stream = SampleStream(files, tokenizer, index)
    seen: list[tuple[int, int]] = []
    for step, batch_size in enumerate(sizes):
        if step == resume_at:
            state = json.loads(json.dumps(stream.state_dict()))
            stream = SampleStream(files, tokenizer, index)
            stream.load_state_dict(state)
        seen.extend(keys(stream.next_batch(batch_size)))
    assert seen == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 6}, "seed 5 but this run has 6"),
        ({"suffix_tokens": 9}, "suffix_tokens 8 but this run has 9"),
        ({"max_prefix_tokens": 21}, "max_prefix_tokens 20 but this run has 21"),
        ({"min_prefix_tokens": 2}, "min_prefix_tokens 1 but this run has 2"),
        ({"cut": "random_chunk"}, "cut every_chunk but this run has random_chunk"),
    ],
)
def test_a_state_of_another_order_is_refused(
    files: TokenFiles, tokenizer: Tokenizer, change: dict[str, Any], field: str
) -> None:
    original: dict[str, Any] = {"suffix_tokens": SUFFIX, "max_prefix_tokens": MAX_PREFIX, "seed": 5}
    saved = SampleStream(files, tokenizer, SampleIndex(files.lengths, **original))
    saved.next_batch(7)
    stream = SampleStream(files, tokenizer, SampleIndex(files.lengths, **(original | change)))
    with pytest.raises(CheckpointError, match=f"the checkpoint's data order has {field}; resume with"):
        stream.load_state_dict(saved.state_dict())
    assert stream.position == 0


def test_a_state_of_other_data_or_other_documents_is_refused(
    files: TokenFiles, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved = SampleStream(files, tokenizer, SampleIndex(files.lengths, SUFFIX, MAX_PREFIX))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text + "!"}) + "\n" for text in TEXTS))
    other_files = build_token_files(tmp_path, tokenizer, tmp_path / "cache")
    other = SampleStream(other_files, tokenizer, SampleIndex(other_files.lengths, SUFFIX, MAX_PREFIX))
    with pytest.raises(CheckpointError, match="data order has data "):
        other.load_state_dict(saved.state_dict())

    without_first, without_last = files.lengths.copy(), files.lengths.copy()
    without_first[0] = without_last[-1] = 0
    halves = [SampleIndex(lengths, SUFFIX, MAX_PREFIX) for lengths in (without_first, without_last)]
    first, last = (SampleStream(files, tokenizer, half) for half in halves)
    with pytest.raises(CheckpointError, match=r"data order has (num_samples|cuts) "):
        first.load_state_dict(last.state_dict())


@pytest.mark.parametrize("state", [{}, {"position": 3}, {"order": {}}])
def test_a_state_that_is_none_is_refused(stream: SampleStream, state: dict) -> None:
    with pytest.raises(CheckpointError):
        stream.load_state_dict(state)


def test_parts_that_do_not_belong_together_are_refused(
    files: TokenFiles, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = Tokenizer.train(TEXTS, 290, tmp_path / "other.model")
    with pytest.raises(DataError, match=r"written by tokenizer .*; build the token files with the tokenizer"):
        SampleStream(files, other, SampleIndex(files.lengths, SUFFIX, MAX_PREFIX))
    with pytest.raises(DataError, match="8 documents, but the index counts 7; make the index from"):
        SampleStream(files, tokenizer, SampleIndex(files.lengths[1:], SUFFIX, MAX_PREFIX))
