"""A run's documents, opened: any corpus of one document or more trains, and what is held back is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.types import Sample
from sip_engine.utils.errors import DataError

WORDS = ["river", "stone", "green", "walks", "over", "the", "old", "bridge", "at", "night"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    Tokenizer.train([book(0, 400)], 300, path)
    return path


def book(seed: int, num_words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words))


def run_config(folder: Path, tokenizer: Path | None, **data: object) -> RunConfig:
    given = {"path": folder / "corpus", "cache": folder / "cache", "tokenizer": tokenizer, "vocab_size": 300}
    cut = {"suffix_tokens": 8, "max_prefix_tokens": 24, "min_prefix_tokens": 4}
    return RunConfig.model_validate({"out": folder / "run", "data": {**given, **cut, **data}})


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        for number, text in enumerate(texts):
            path.mkdir(exist_ok=True)
            (path / f"{number}.txt").write_text(text)


def suffixes_of(samples: list[Sample]) -> set[tuple[int, int]]:
    return {(sample.document, sample.cut) for sample in samples}


def every_sample(corpus: Corpus) -> list[Sample]:
    return corpus.stream.samples_at(0, corpus.num_samples)


@pytest.mark.parametrize("cut", ["every_chunk", "random_chunk"])
@pytest.mark.parametrize("lengths", [[900], [400, 900, 5], [60] * 9, [12, 30, 12], [3] * 40 + [300]])
def test_a_few_documents_are_enough(
    mesh: Mesh, tmp_path: Path, tokenizer: Path, lengths: list[int], cut: str
) -> None:
    write(tmp_path / "corpus", [book(seed, length) for seed, length in enumerate(lengths)])
    cfg = run_config(tmp_path, tokenizer, cut=cut, holdout=0.05)
    corpus = open_corpus(cfg, mesh)
    assert corpus.held_out
    longest = int(np.argmax(lengths))
    number = corpus.held_out[0].document
    assert {sample.document for sample in corpus.held_out} == {number}
    assert corpus.parts[0].files.lengths[number] == corpus.parts[0].files.lengths.max()
    trained = [sample for epoch in range(8) for sample in every_sample_of(corpus, epoch)]
    assert not suffixes_of(trained) & suffixes_of(corpus.held_out)
    assert max(s.cut for s in trained if s.document == number) < min(s.cut for s in corpus.held_out)
    num_chunks = int(corpus.parts[0].files.lengths[number]) // 8 - 1
    assert len(corpus.held_out) == max(1, round(0.05 * num_chunks))
    assert "held back: the last" in corpus.description
    assert lengths[longest] > 20


def every_sample_of(corpus: Corpus, epoch: int) -> list[Sample]:
    return corpus.stream.samples_at(epoch * corpus.num_samples, corpus.num_samples)


def test_whole_documents_are_held_back_where_there_are_enough(
    mesh: Mesh, tmp_path: Path, tokenizer: Path
) -> None:
    write(tmp_path / "corpus", [book(seed, 40) for seed in range(60)])
    corpus = open_corpus(run_config(tmp_path, tokenizer, holdout=0.2), mesh)
    held = {sample.document for sample in corpus.held_out}
    assert 5 < len(held) < 20
    assert held.isdisjoint(sample.document for sample in every_sample(corpus))
    assert corpus.parts[0].notes == []


@pytest.mark.parametrize(
    ("texts", "data", "words"),
    [
        ([book(0, 900)], {"holdout": 0}, ["data.holdout=0 leaves no held-out", "data.eval_path"]),
        ([book(0, 40)] * 50, {"holdout": 1}, ["data.holdout=1 leaves no training", "data.eval_path"]),
        (["the river"], {}, ["1 documents", "suffixes of 8 need 24", "data.eval_path"]),
        (["stone"] * 20, {}, ["20 documents", "data.suffix_tokens"]),
        ([book(0, 12)], {"suffix_tokens": 16, "max_prefix_tokens": 16}, ["suffixes of 16 need 48"]),
    ],
)
def test_too_little_says_what_to_set(
    mesh: Mesh, tmp_path: Path, tokenizer: Path, texts: list[str], data: dict[str, object], words: list[str]
) -> None:
    write(tmp_path / "corpus", texts)
    with pytest.raises(DataError) as error:
        open_corpus(run_config(tmp_path, tokenizer, **data), mesh)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_short_document_held_out_by_its_own_path_still_names_its_need(
    mesh: Mesh, tmp_path: Path, tokenizer: Path
) -> None:
    write(tmp_path / "corpus", [book(0, 900)])
    write(tmp_path / "held.jsonl", ["stone"])
    with pytest.raises(DataError, match="held-out documents: no document is long enough"):
        open_corpus(run_config(tmp_path, tokenizer, eval_path=tmp_path / "held.jsonl"), mesh)


def test_what_is_passed_over_is_said(mesh: Mesh, tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "corpus", [book(0, 900)])
    (tmp_path / "corpus" / "README.md").write_text("a card")
    shutil.copy(tokenizer, tmp_path / "corpus" / "bpe.model")
    (tmp_path / "corpus" / "blank.txt").write_text(" ")
    corpus = open_corpus(run_config(tmp_path, tokenizer), mesh)
    assert "1 card or licence" in corpus.description and "1 .model" in corpus.description
    assert "skipped 1 empty" in corpus.description
