"""[data] and [world]: where documents come from and how they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sip_engine.config.section import Positive, Section, Seed, Share
from sip_engine.utils.errors import ConfigError


class DataSource(Section):
    """One part of a mixture of corpora, `[[data.sources]]`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """What records call it: `sources/NAME` is its share of a step's samples."""
    path: Path
    """As data.path."""
    weight: float | None = Field(default=None, ge=0)
    """Its share of the samples, against the other sources'; unset in all: each in proportion to its samples."""
    epochs: float | None = Field(default=None, gt=0)
    """Most passes over it, from when on it is left out; unset: as many as its weight asks for."""
    text_column: str | None = None
    """As data.text_column, which it is if unset."""


class DataConfig(Section):
    """Where documents come from and how they are cut into prefix and suffix."""

    path: Path | None = None
    """File or directory of text (.txt, .md, .rst), JSON (.jsonl, .ndjson, .json), .csv, .tsv, each also .gz, .zst,
    .bz2, .xz, .parquet, .arrow or .feather. Required unless [world] is set."""
    sources: tuple[DataSource, ...] = ()
    """Several corpora in place of `path`, mixed by weight."""
    eval_path: Path | None = None
    """Held-out documents; unset holds back a share of `path`."""
    text_column: str = "text"
    """Field of JSON, CSV, Parquet and Arrow rows that holds the text."""
    tokenizer: Path | None = None
    """A sentencepiece model; trained on the data when unset."""
    vocab_size: Positive = 8192
    """Vocabulary of a tokenizer trained on the data."""
    suffix_tokens: Positive = 128
    """N, the length of a suffix (method: 128)."""
    max_prefix_tokens: Positive = 1920
    """A longer prefix keeps its last tokens."""
    min_prefix_tokens: Positive = 32
    """Cuts with a shorter prefix are not made."""
    cut: Literal["every_chunk", "random_chunk"] = "every_chunk"
    """Use every chunk of a document as a suffix, or one random chunk a document and epoch."""
    deduplicate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Leave out documents that are at least so alike to an earlier one (Jaccard similarity of five tokens in a row,
    by MinHash; usual: 0.8), and exact copies; also of the documents of `eval_path`. Unset: all stay."""
    decontaminate: tuple[Path, ...] = ()
    """Files of evaluation sets (JSON, CSV, Parquet, text; folders, too): documents that hold thirteen words in a row
    of any text in them are left out; of a shorter text, all its words, if they are eight at least."""
    cache: Path = Path("cache")
    """Folder of token files, keyed by content."""
    holdout: Share = 0.02
    """Share of the documents kept from training for evaluation, where `eval_path` is unset; of too few documents,
    as of a book, the end of the longest."""


class WorldConfig(Section):
    """A synthetic world with known truth, whose documents stand in for `data.path` and `data.eval_path`."""

    seed: Seed = 0
    """Seed of the world's facts and documents."""
    split: Literal["train", "judge", "rewriter"] = "train"
    """Whose training documents these are; no two of them share a document."""
    num_people: Positive = 48
    """People whose facts there are to know."""
    people_per_document: Annotated[int, Field(ge=2)] = 3
    """People who meet in a document at most; it is the longer for more of them."""
    train_documents: Positive = 8000
    """Documents written for training."""
    test_documents: Positive = 400
    """Documents with combinations of people that no other split shows."""

    @model_validator(mode="after")
    def _can_be(self) -> WorldConfig:
        from sip_engine.world import World

        try:
            World(self.seed, self.num_people, self.people_per_document)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self
