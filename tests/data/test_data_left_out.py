"""Copies, near-duplicates and text of evaluation sets are found as by comparing everything with everything."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sip_engine.config.schema import RunConfig
from sip_engine.data.contamination import EvaluationText, evaluation_items
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.left_out import find_left_out
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.utils.errors import DataError

RNG = np.random.default_rng(5)
VOCABULARY = ["".join(RNG.choice(list("abcdefghijklmno"), size=4)) for _ in range(400)]


def text(num_words: int = 120) -> str:
    return " ".join(RNG.choice(VOCABULARY, size=num_words))


def changed(original: str, num_words: int) -> str:
    words = original.split()
    for place in RNG.choice(len(words), size=num_words, replace=False):
        words[place] = str(RNG.choice(VOCABULARY))
    return " ".join(words)


ORIGINALS = [text() for _ in range(24)]
DOCUMENTS = [
    *ORIGINALS,
    *(changed(original, 1) for original in ORIGINALS[:6]),
    *(changed(original, 60) for original in ORIGINALS[6:12]),
    *ORIGINALS[12:15],
    "short",
    "short",
    "shorter",
]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    sets = [{tuple(ids[at : at + 5].tolist()) for at in range(len(ids) - 4)} for ids in (one, other)]
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def settings(folder: Path, documents: list[str], **data: object) -> RunConfig:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    cuts = {"suffix_tokens": 8, "max_prefix_tokens": 32, "min_prefix_tokens": 4, "holdout": 0.2}
    values = {"path": path, "cache": folder / "cache", "vocab_size": 400, **cuts, **data}
    return RunConfig.model_validate({"out": folder / "run", "data": values})


def documents_of(corpus: Corpus) -> set[int]:
    """Numbers of the documents that one epoch shows."""
    return {sample.document for sample in corpus.stream.samples_at(0, corpus.num_samples)}


def test_copies_and_near_duplicates_are_left_out(tmp_path: Path, mesh: Mesh) -> None:
    cfg = settings(tmp_path, DOCUMENTS, deduplicate=0.7)
    corpus = open_corpus(cfg, mesh)
    files = corpus.parts[0].files
    ids = [files.tokens(number) for number in range(files.num_documents)]
    alike = {}
    for number in range(len(ids)):
        alike[number] = max((jaccard(ids[number], ids[other]) for other in range(number)), default=0.0)
    assert not any(0.5 < one < 0.85 for one in alike.values()), "no case near the border"
    wanted = {number for number, one in alike.items() if one > 0.7}
    assert wanted == {*range(24, 30), 36, 37, 38, 40}
    left_out = find_left_out(cfg.data, [files], None, corpus.tokenizer)
    assert left_out is not None
    assert set(np.flatnonzero(left_out[0].labels).tolist()) == wanted
    assert "left out: 6 near-duplicates, 4 copies" in corpus.description
    plain = open_corpus(settings(tmp_path, DOCUMENTS), mesh)
    held_back = {number for number in range(len(ids)) if len(ids[number]) > 16} - documents_of(plain)
    assert documents_of(corpus) == documents_of(plain) - wanted
    held = {sample.document for sample in corpus.held_out}
    assert held and held <= held_back - wanted


def test_what_was_found_is_found_again(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(tmp_path, DOCUMENTS, deduplicate=0.7)
    first = open_corpus(cfg, mesh)
    monkeypatch.setattr("sip_engine.data.left_out._label", lambda *_: pytest.fail("labelled again"))
    assert open_corpus(cfg, mesh).description == first.description


def test_held_out_documents_go_before_training_documents(tmp_path: Path, mesh: Mesh) -> None:
    held = tmp_path / "held.txt"
    held.write_text(changed(ORIGINALS[3], 1))
    corpus = open_corpus(settings(tmp_path, ORIGINALS, deduplicate=0.7, eval_path=held), mesh)
    assert "left out: 1 near-duplicates" in corpus.description
    assert documents_of(corpus) == set(range(24)) - {3}
    assert corpus.held_out


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def test_text_of_evaluation_sets_is_left_out(tmp_path: Path, mesh: Mesh) -> None:
    """Thirteen words in a row, whatever their case and punctuation; twelve are none; of eight to twelve, all."""
    long, short, tiny = text(40), text(9), text(7)
    words = long.split()
    documents = [
        f"{text(30)} {', '.join(words[20:33]).upper()}! {text(30)}",
        f"{text(30)} {' '.join(words[20:32])} {text(30)}",
        f"{text(30)} ({short}) {text(30)}",
        f"{text(30)} {tiny} {text(30)}",
        *(text() for _ in range(20)),
    ]
    items = [{"question": long, "answers": [{"text": short}, tiny, 7, None]}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    cfg = settings(tmp_path, documents, decontaminate=[tmp_path / "set.jsonl"])
    corpus = open_corpus(cfg, mesh)
    left_out = find_left_out(cfg.data, [corpus.parts[0].files], None, corpus.tokenizer)
    assert left_out is not None
    by_hand = [
        bool(runs(one, 13) & runs(long, 13)) or bool(runs(one, 9) & runs(short, 9)) for one in documents
    ]
    assert by_hand[:4] == [True, False, True, False]
    assert (left_out[0].labels == 3).tolist() == by_hand
    assert "left out: 2 with text of evaluation sets" in corpus.description
    known = EvaluationText(evaluation_items(cfg.data.decontaminate))
    assert (known.num_items, known.num_short) == (3, 1)


def test_sets_of_every_format_are_read(tmp_path: Path) -> None:
    wanted = ['one "quoted", text', "two\nlines", "drei ä"]
    rows = [{"a": wanted[0], "b": {"c": [wanted[1]]}}, {"a": wanted[2], "b": {"c": []}}]
    folder = tmp_path / "sets"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "b.json").write_text(json.dumps({"rows": rows}, indent=1))
    (folder / "c.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pa.CompressedOutputStream(str(folder / "d.jsonl.gz"), "gzip") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["h", "i"], wanted[:2], [wanted[2], ""]])
    (folder / "g.txt").write_text("\n\n".join([wanted[0], "  ", wanted[1], wanted[2]]))
    for file in sorted(folder.iterdir()):
        found = [item for item in evaluation_items([file]) if item not in ("h", "i", "")]
        assert found == wanted, file
    (folder / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json: cannot be read as an evaluation set"):
        list(evaluation_items([folder]))


def test_copies_of_held_out_documents_are_left_out(tmp_path: Path) -> None:
    """At the largest threshold, too, for which there is no index of its own."""
    from sip_engine.data.build import build_token_files

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in ORIGINALS))
    tokenizer = Tokenizer.train(ORIGINALS, 380, tmp_path / "bpe.model")
    files = build_token_files(tmp_path / "d.jsonl", tokenizer, tmp_path / "cache")
    data = settings(tmp_path, ORIGINALS, deduplicate=1.0).data
    left_out = find_left_out(data, [files], files, tokenizer)
    assert left_out is not None
    assert (left_out[0].labels == 1).all(), "against themselves as held-out documents"
