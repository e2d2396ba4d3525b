"""The documents of a run, opened: tokenizer, token files, the training stream and the held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.data.build import build_token_files
from sip_engine.data.documents import read_documents
from sip_engine.data.indexed import find_token_files
from sip_engine.data.inventory import Inventory, take_inventory
from sip_engine.data.left_out import LeftOut, find_left_out
from sip_engine.data.mixture import MixtureStream, Source, shares
from sip_engine.data.permutation import hash_key, mix64
from sip_engine.data.prompts import PromptStream, read_prompts
from sip_engine.data.samples import SampleIndex, first_chunk
from sip_engine.data.sources import DocumentSource, document_sources, in_turn, tokenizer_of
from sip_engine.data.stream import SampleStream
from sip_engine.data.token_files import TokenFiles
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """One source of documents: all of a corpus, or a part of a mixture."""

    name: str
    """Empty where it is all."""
    path: Path
    text_column: str
    files: TokenFiles
    inventory: Inventory | None
    """None of token files made elsewhere."""
    num_samples: int
    """Samples of one epoch."""
    notes: Sequence[str] = ()

    @property
    def description(self) -> str:
        """Counts, and what a user must know of what is read and what is not."""
        files = self.files
        counts = (
            f"{files.num_documents:,} documents, {files.num_tokens:,} tokens, {self.num_samples:,} samples"
        )
        skipped = [f"skipped {files.skips}"] if files.skips else []
        return "; ".join([f"{self.name}: {counts}" if self.name else counts, *skipped, *self.notes])

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Its documents as text."""
        if self.inventory is not None:
            return read_documents(self.path, self.text_column)
        return (tokenizer.decode(self.files.tokens(number)) for number in range(self.files.num_documents))


@dataclass(frozen=True)
class Corpus:
    """What training and evaluation read."""

    tokenizer: Tokenizer
    stream: SampleStream | PromptStream | MixtureStream
    held_out: list[Sample]
    num_samples: int
    """Samples of one training epoch."""
    parts: Sequence[Part] = ()
    """Nothing for a task's prompts."""

    @property
    def description(self) -> str:
        """Counts of the training data, in words."""
        return "; ".join(part.description for part in self.parts) or f"{self.num_samples:,} prompts"

    @property
    def source_names(self) -> list[str]:
        """Of a mixture."""
        return [part.name for part in self.parts if part.name]

    def texts(self, limit: int) -> list[str]:
        """The first documents of the training data, as text."""
        return list(islice(in_turn([part.texts(self.tokenizer) for part in self.parts]), limit))


def open_corpus(cfg: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Corpus:
    """Build or open everything; the first process writes, the others wait and read.

    A judge's or rewriter's run reads prompts instead of documents.

    `tokenizer` is that of the checkpoint a run starts from, which wins over the settings.

    Raises:
        DataError: see `read_documents`, `SampleIndex`; ConfigError: neither a path nor a world.
    """
    if cfg.task != "policy":
        return _open_prompts(cfg, mesh, tokenizer)
    sources, eval_path = document_sources(cfg, mesh)
    built: tuple[list[_Built], _Built | None, list[LeftOut] | None, bytes] | None = None
    if mesh.is_main:
        tokenizer = tokenizer_of(cfg, sources, tokenizer)
        parts = [_build(cfg, source.path, source.text_column, tokenizer) for source in sources]
        held = _build(cfg, eval_path, cfg.data.text_column, tokenizer) if eval_path else None
        opened_parts = [part.open(tokenizer) for part in parts]
        left_out = find_left_out(cfg.data, opened_parts, held.open(tokenizer) if held else None, tokenizer)
        built = parts, held, left_out, tokenizer.model
    parts, held, left_out, tokenizer_model = mesh.broadcast(built)
    tokenizer = Tokenizer(tokenizer_model)
    held_files = held.open(tokenizer) if held is not None else None
    opened = [
        _open_part(cfg, source, part, tokenizer, held_files, out)
        for source, part, out in zip(sources, parts, left_out or [None] * len(parts), strict=True)
    ]
    if not cfg.data.sources:
        part, stream, held_stream = opened[0]
        held_out = held_stream.samples_at(0, min(cfg.eval.num_prefixes, held_stream.num_samples))
        return Corpus(tokenizer, stream, held_out, part.num_samples, [part])
    return _mix(cfg, tokenizer, opened, held_files is not None)


_Opened = tuple[Part, SampleStream, SampleStream]
"""A source, its training stream and its held-out stream."""


def _open_part(
    cfg: RunConfig,
    source: DocumentSource,
    built: _Built,
    tokenizer: Tokenizer,
    held_files: TokenFiles | None,
    left_out: LeftOut | None,
) -> _Opened:
    files = built.open(tokenizer)
    lengths = files.lengths if left_out is None else np.where(left_out.labels == 0, files.lengths, 0)
    split = _split(cfg, lengths) if held_files is None else _Split(lengths, held_files.lengths)
    what = f"{source.name}: " if source.name else ""
    index = _index(cfg, split.train, cfg.data.cut, cfg.seed, f"{what}training")
    # The same held-out samples for every seed, so that runs can be compared.
    held_index = _index(cfg, split.held, "every_chunk", 0, f"{what}held-out", split.held_starts)
    passed_over = built.inventory.passed_over if built.inventory else {}
    notes = [f"passed over in {source.path}: {passed_over}"] if passed_over else []
    notes += [*([left_out.note()] if left_out else []), *split.notes]
    part = Part(
        source.name, source.path, source.text_column, files, built.inventory, index.num_samples, notes
    )
    held_stream = SampleStream(held_files or files, tokenizer, held_index)
    return part, SampleStream(files, tokenizer, index), held_stream


def _mix(cfg: RunConfig, tokenizer: Tokenizer, opened: Sequence[_Opened], has_eval_path: bool) -> Corpus:
    """Training by weight; held-out samples too, but where they have a path of their own."""
    parts = [part for part, _, _ in opened]
    weights = [
        float(part.num_samples) if given.weight is None else given.weight
        for given, part in zip(cfg.data.sources, parts, strict=True)
    ]
    sources = [
        Source(given.name, stream, weight, given.epochs)
        for given, (_, stream, _), weight in zip(cfg.data.sources, opened, weights, strict=True)
    ]
    mixture = MixtureStream(sources, cfg.seed)
    wanted, end = cfg.steps * cfg.batch_size, mixture.num_positions
    if end is not None and end < wanted:
        raise DataError(
            f"data.sources are used up after {end:,} samples, and {cfg.steps} steps of {cfg.batch_size} need "
            f"{wanted:,}: raise an epochs, or lower steps"
        )
    held_out: list[Sample] = []
    counts = [cfg.eval.num_prefixes] if has_eval_path else shares(weights, cfg.eval.num_prefixes)
    for count, source, (_, _, stream) in zip(counts, sources, opened, strict=False):
        found = stream.samples_at(0, min(int(count), stream.num_samples))
        held_out += found if has_eval_path else [replace(sample, source=source.name) for sample in found]
    return Corpus(tokenizer, mixture, held_out, sum(part.num_samples for part in parts), parts)


def _open_prompts(cfg: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> Corpus:
    data = cfg.data
    assert data.path is not None and data.eval_path is not None
    model: bytes | None = None
    if mesh.is_main:
        if tokenizer is None and data.tokenizer is None:
            raise ConfigError(
                f'task="{cfg.task}" needs a tokenizer: start from a checkpoint (init), or set data.tokenizer'
            )
        model = (tokenizer or Tokenizer.load(data.tokenizer or "")).model
    tokenizer = Tokenizer(mesh.broadcast(model))

    def read(path: Path) -> list[Sample]:
        assert tokenizer is not None
        samples = read_prompts(
            path, tokenizer, max_prompt_tokens=data.max_prefix_tokens, max_answer_tokens=data.suffix_tokens
        )
        if cfg.task == "rewriter":
            _check_rewrites(samples, path)
        return samples

    samples, held_out = read(data.path), read(data.eval_path)
    labelled = next((s for s in samples if s.labels is not None), None)
    if labelled is not None and cfg.objective.facts.learns_from is LearnsFrom.GENERATIONS:
        raise DataError(
            f"{data.path}:{labelled.document + 1}: labels are not written in reply, so GRPO has nothing to grade: "
            'train on them with objective.kind = "next_token"'
        )
    stream = PromptStream(samples, data.path, cfg.seed)
    held = PromptStream(held_out, data.eval_path, 0).samples_at(0, min(cfg.eval.num_prefixes, len(held_out)))
    return Corpus(tokenizer, stream, held, len(samples))


def _check_rewrites(samples: Sequence[Sample], path: Path) -> None:
    wanted = {"prefix": str, "suffix": str, "safe": bool}
    for s in samples:
        if s.labels is None and not all(isinstance(s.facts.get(name), kind) for name, kind in wanted.items()):
            raise DataError(
                f'{path}:{s.document + 1}: task="rewriter" needs the texts "prefix" and "suffix" and "safe" (true or '
                "false) with each prompt, as `sip data rewrites` writes them"
            )


@dataclass(frozen=True)
class _Built:
    """Token files on disk, to be opened by every process."""

    prefixes: list[Path]
    inventory: Inventory | None
    """None of files made elsewhere."""

    def open(self, tokenizer: Tokenizer) -> TokenFiles:
        if self.inventory is None:
            return TokenFiles.open_foreign(self.prefixes, tokenizer)
        return TokenFiles.open(self.prefixes[0])


def _build(cfg: RunConfig, path: Path, text_column: str, tokenizer: Tokenizer) -> _Built:
    if prefixes := find_token_files(path):
        return _Built(prefixes, None)
    files = build_token_files(path, tokenizer, cfg.data.cache, text_column)
    return _Built([files.prefix_path], take_inventory(path))


@dataclass(frozen=True)
class _Split:
    """Which tokens of which documents are trained on and which are held back: lengths [num_documents]."""

    train: np.ndarray
    held: np.ndarray
    held_starts: np.ndarray | None = None
    """Tokens of each document before the held-out suffixes."""
    notes: Sequence[str] = ()


def _split(cfg: RunConfig, lengths: np.ndarray) -> _Split:
    """Some documents by a hash of their number, so that more documents move none across.

    Where none of them is long enough, as in a book, the end of the longest document.
    """
    data = cfg.data
    for share, what, remedy in ((0, "held-out", "raise it"), (1, "training", "lower it")):
        if data.holdout == share:
            raise DataError(
                f"data.holdout={data.holdout:g} leaves no {what} document: {remedy}, or set data.eval_path"
            )
    draws = mix64(np.arange(len(lengths), dtype=np.uint64) ^ hash_key(0, 0))
    is_held = draws < np.uint64(min(int(data.holdout * 2.0**64), 2**64 - 1))
    shortest = data.suffix_tokens * (1 + first_chunk(data.suffix_tokens, data.min_prefix_tokens))
    is_long = lengths >= shortest
    if (is_held & is_long).any() and (~is_held & is_long).any():
        return _Split(np.where(is_held, 0, lengths), np.where(is_held, lengths, 0))
    longest = int(lengths.argmax())
    num_cuts = (int(lengths[longest]) - shortest) // data.suffix_tokens + 1
    num_held = max(1, round(data.holdout * num_cuts))
    train = lengths.copy()
    train[longest] = (
        lengths[longest] // data.suffix_tokens * data.suffix_tokens - num_held * data.suffix_tokens
    )
    if train.max(initial=0) < shortest:
        raise DataError(
            f"{np.count_nonzero(lengths)} documents, of at most {lengths.max(initial=0)} tokens, are too few to "
            f"train on and to hold back some: suffixes of {data.suffix_tokens} need "
            f"{shortest + data.suffix_tokens} in one; set data.eval_path, a smaller data.suffix_tokens or "
            "data.min_prefix_tokens, or give longer documents"
        )
    held, starts = np.zeros_like(lengths), np.zeros_like(lengths)
    held[longest], starts[longest] = lengths[longest], train[longest]
    note = f"held back: the last {num_held} suffixes of document {longest + 1}, for want of whole documents"
    return _Split(train, held, starts, [note])


def _index(
    cfg: RunConfig, lengths: np.ndarray, cut: str, seed: int, what: str, starts: np.ndarray | None = None
) -> SampleIndex:
    data = cfg.data
    try:
        return SampleIndex(
            lengths,
            data.suffix_tokens,
            data.max_prefix_tokens,
            data.min_prefix_tokens,
            cut=cut,  # type: ignore[arg-type]
            seed=seed,
            starts=starts,
        )
    except DataError as error:
        raise DataError(f"{what} documents: {error}") from None
