"""Mixtures: every source in proportion, each sample of an epoch once, until its epochs are given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pydantic import ValidationError
from test_data_corpus import book, every_sample_of, run_config, tokenizer, write  # noqa: F401

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import open_corpus
from sip_engine.data.mixture import CYCLE, MixtureStream, Source, shares
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.train import train
from sip_engine.types import Sample
from sip_engine.utils.errors import CheckpointError, ConfigError, DataError
from sip_engine.utils.jsonl import read_jsonl


class Counted:
    """A stream of a number of samples, each of which says its place."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def samples_of(self, positions: np.ndarray) -> list[Sample]:
        assert (np.diff(positions) >= 0).all()
        none = np.zeros(0, np.int32)
        return [Sample(place, 0, none, none, "", "") for place in positions.tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"position": 0, "order": {"num_samples": self.num_samples}}


def mixture(*sources: tuple[int, float, float | None], seed: int = 3) -> MixtureStream:
    made = [Source(f"s{i}", Counted(n), w, e) for i, (n, w, e) in enumerate(sources)]  # pyright: ignore
    return MixtureStream(made, seed)


def places(samples: list[Sample], name: str) -> list[int]:
    return [sample.document for sample in samples if sample.source == name]


def test_shares_are_exact_in_every_cycle_and_each_place_comes_once() -> None:
    stream = mixture((50, 0.5, None), (9000, 0.3, None), (10**9, 0.2, None))
    for cycle in range(2):
        samples = stream.samples_at(cycle * CYCLE, CYCLE)
        counts = Counter(sample.source for sample in samples)
        assert [counts[f"s{i}"] for i in range(3)] == [2048, 1229, 819]
        for number, count in enumerate([2048, 1229, 819]):
            found = places(samples, f"s{number}")
            assert sorted(found) == list(range(cycle * count, (cycle + 1) * count))
            assert found != sorted(found)
    assert stream.num_positions is None


@settings(max_examples=25)
@given(
    sources=st.lists(
        st.tuples(st.integers(1, 900), st.floats(0, 5), st.floats(0.4, 3)), min_size=1, max_size=4
    ).filter(lambda found: any(weight > 0 for _, weight, _ in found))
)
def test_every_source_ends_after_its_epochs(sources: list[tuple[int, float, float]]) -> None:
    stream = mixture(*sources)
    limits = [int(epochs * num) * (weight > 0) for num, weight, epochs in sources]
    assert stream.num_positions == sum(limits)
    if sum(limits) == 0:
        return
    samples = stream.samples_at(0, sum(limits))
    for number, limit in enumerate(limits):
        assert sorted(places(samples, f"s{number}")) == list(range(limit))
    with pytest.raises(DataError, match="used up after"):
        stream.samples_at(sum(limits), 1)


def test_what_is_left_keeps_its_proportions() -> None:
    stream = mixture((100, 1, 1), (10**6, 2, None), (10**6, 1, None))
    late = Counter(sample.source for sample in stream.samples_at(5 * CYCLE, 3 * CYCLE))
    assert late["s0"] == 0
    assert late["s1"] == pytest.approx(2 * late["s2"], rel=0.01)


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda found: sum(found) > 0.01),
    total=st.integers(6, 5000),
)
def test_shares_add_up_and_leave_nobody_out(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert counts.sum() == total
    assert all((count > 0) == (weight > 0) for count, weight in zip(counts, weights, strict=True))
    exact = np.array(weights) / sum(weights) * total
    assert all(
        abs(count - want) < 1 or want < 1 or count < want for count, want in zip(counts, exact, strict=True)
    )


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    num_ranks=st.sampled_from([1, 2, 4]),
    cut=st.integers(0, 4),
)
def test_batches_ranks_and_resumption_only_divide_the_sequence(
    sizes: list[int], num_ranks: int, cut: int
) -> None:
    sources = ((60, 1.0, 5.0), (400, 2.0, None), (30, 0.5, 1.5))
    whole = [(s.source, s.document) for s in mixture(*sources).samples_at(0, sum(sizes))]
    streams = [mixture(*sources) for _ in range(num_ranks)]
    seen = []
    for number, size in enumerate(sizes):
        if number == cut:
            states = [stream.state_dict() for stream in streams]
            streams = [mixture(*sources) for _ in range(num_ranks)]
            for stream, state in zip(streams, states, strict=True):
                stream.load_state_dict(state)
        parts = [stream.next_batch(size, rank, num_ranks) for rank, stream in enumerate(streams)]
        batch = [parts[i % num_ranks][i // num_ranks] for i in range(size)]
        seen += [(s.source, s.document) for s in batch]
    assert seen == whole


@pytest.mark.parametrize(
    "other", [((60, 1.0, None),), ((60, 1.0, 2.0), (40, 2.0, None)), ((60, 1.0, None), (41, 2.0, None))]
)
def test_a_state_of_another_mixture_is_refused(other: tuple[tuple[int, float, float | None], ...]) -> None:
    saved = mixture((60, 1.0, None), (40, 2.0, None))
    with pytest.raises(CheckpointError, match="the checkpoint's mixture has source s"):
        mixture(*other).load_state_dict(saved.state_dict())


def sources(folder: Path, *more: dict[str, Any]) -> list[dict[str, Any]]:
    write(folder / "books", [book(seed, 200) for seed in range(3)])
    write(folder / "notes.jsonl", [book(seed, 60) for seed in range(50, 80)])
    given: list[dict[str, Any]] = [
        {"name": "books", "path": folder / "books", "weight": 3},
        {"name": "notes", "path": folder / "notes.jsonl", "weight": 1},
    ]
    return [one | (more[i] if i < len(more) else {}) for i, one in enumerate(given)]


def test_a_run_shows_its_sources_by_name(mesh: Mesh, tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    cfg = run_config(tmp_path, tokenizer, path=None, sources=sources(tmp_path))
    small = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ffn_size": 24,
        "max_context": 64,
    }
    settings = cfg.model_dump() | {"model": small, "steps": 3, "batch_size": 32, "eval": {"num_prefixes": 8}}
    settings |= {"objective": {"kind": "next_token"}, "candidates": [{"rollouts": 0}]}
    cfg = RunConfig.model_validate(settings)
    train(cfg, mesh)
    rows = [row for _, row in read_jsonl(cfg.out / "metrics.jsonl") if "sources/books" in row]
    assert len(rows) == 3
    assert all(row["sources/books"] + row["sources/notes"] == pytest.approx(1) for row in rows)
    assert 0.6 < np.mean([row["sources/books"] for row in rows]) < 0.9
    corpus = open_corpus(cfg, mesh)
    assert Counter(sample.source for sample in corpus.held_out)["notes"] >= 1
    assert "books: 3 documents" in corpus.description and "notes: 30 documents" in corpus.description


def test_without_weights_sources_are_in_proportion_to_their_samples(
    mesh: Mesh,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
) -> None:
    unset = {"weight": None, "epochs": 1}
    cfg = run_config(tmp_path, tokenizer, path=None, sources=sources(tmp_path, unset, unset))
    cfg = cfg.model_copy(update={"steps": 1, "batch_size": 1})
    corpus = open_corpus(cfg, mesh)
    found = Counter((s.source, s.document, s.cut) for s in corpus.stream.samples_at(0, corpus.num_samples))
    assert set(found.values()) == {1} and len(found) == corpus.num_samples
    with pytest.raises(DataError, match=r"used up after .* raise an epochs, or lower steps"):
        open_corpus(cfg.model_copy(update={"steps": 10**6}), mesh)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"weight": 0}, {"weight": 0}], "all weights are 0"),
        ([{"weight": None}], "give all a weight, or none"),
        ([{"name": "notes"}], "two are called 'notes'"),
        ([{"weight": -1}], "greater than or equal to 0"),
        ([{"epochs": 0}], "greater than 0"),
        ([{"name": "a b"}], "match pattern"),
    ],
)
def test_bad_mixtures_are_named(tmp_path: Path, changes: list[dict[str, Any]], words: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=words):
        RunConfig.model_validate({"data": {"sources": sources(tmp_path, *changes)}})


def foreign(prefix: Path, documents: list[list[list[int]]], dtype: type[np.number]) -> Path:
    """Files as Megatron makes them: documents of one sequence or more."""
    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        ids = [token for sequence in sequences for token in sequence]
        builder.add_document(np.array(ids), [len(sequence) for sequence in sequences])  # pyright: ignore
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    ("named", "dtype"),
    [("files/a.bin", np.uint16), ("files/a.idx", np.int32), ("files/a", np.uint16), ("files", np.int32)],
)
def test_token_files_made_elsewhere_are_trained_on(
    mesh: Mesh,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    named: str,
    dtype: type[np.number],
) -> None:
    ids = [Tokenizer.load(tokenizer).encode(book(seed, 60)).tolist() for seed in range(40)]
    foreign(tmp_path / "files" / "a", [[one[:9], one[9:]] for one in ids[:30]], dtype)
    foreign(tmp_path / "files" / "b", [[one] for one in ids[30:]], DType.optimal_dtype(300))
    expected = ids if named == "files" else ids[:30]
    corpus = open_corpus(run_config(tmp_path, tokenizer, path=tmp_path / named, holdout=0.1), mesh)
    files = corpus.parts[0].files
    assert [files.tokens(number).tolist() for number in range(files.num_documents)] == expected
    for sample in every_sample_of(corpus, 0)[:20]:
        document = expected[sample.document]
        assert sample.suffix_ids.tolist() == document[sample.cut : sample.cut + 8]
        assert sample.prefix_ids.tolist() == document[max(0, sample.cut - 24) : sample.cut]
    assert corpus.texts(1) == [book(0, 60)]


@pytest.mark.parametrize("damage", ["ids", "index", "tokens", "missing", "none"])
def test_token_files_that_do_not_fit_are_named(
    mesh: Mesh,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    damage: str,
) -> None:
    top = 301 if damage == "ids" else 299
    prefix = foreign(tmp_path / "files" / "a", [[[top] * 90]] * 9, np.int32)
    if damage in ("index", "tokens"):
        path = Path(f"{prefix}.{'idx' if damage == 'index' else 'bin'}")
        path.write_bytes(path.read_bytes()[:-5])
    if damage == "missing":
        Path(f"{prefix}.bin").unlink()
    given = None if damage == "none" else tokenizer
    words = {
        "ids": "holds token 301, but the tokenizer has 300; set data.tokenizer",
        "none": "need the tokenizer that they were made with",
    }
    with pytest.raises((DataError, ConfigError), match=words.get(damage, "make the")) as error:
        open_corpus(run_config(tmp_path, given, path=Path(f"{prefix}.idx")), mesh)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(
    mesh: Mesh,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
) -> None:
    write(tmp_path / "corpus", [book(0, 900)])
    other = Tokenizer.train([book(0, 400)], 290, tmp_path / "other.model")
    with pytest.raises(DataError, match="not the tokenizer of the checkpoint"):
        open_corpus(run_config(tmp_path, tokenizer), mesh, other)
    assert open_corpus(run_config(tmp_path, None), mesh, other).tokenizer.fingerprint == other.fingerprint
