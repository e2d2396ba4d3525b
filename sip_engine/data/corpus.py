"""The documents of a run, opened: tokenizer, token files, the training stream and the held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.data.documents import read_documents
from sip_engine.data.inventory import take_inventory
from sip_engine.data.permutation import hash_key, mix64
from sip_engine.data.prompts import PromptStream, read_prompts
from sip_engine.data.samples import SampleIndex, first_chunk
from sip_engine.data.stream import SampleStream
from sip_engine.data.token_files import TokenFiles, build_token_files
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import write_jsonl
from sip_engine.world import World, write_documents


@dataclass(frozen=True)
class Corpus:
    """What training and evaluation read."""

    tokenizer: Tokenizer
    stream: SampleStream | PromptStream
    held_out: list[Sample]
    train_path: Path
    files: TokenFiles | None
    """None for a task's prompts."""
    num_samples: int
    """Samples of one training epoch."""
    notes: Sequence[str] = ()
    """What a user must know of what is read and what is not."""

    @property
    def description(self) -> str:
        """Counts of the training data, in words."""
        if self.files is None:
            return f"{self.num_samples:,} prompts"
        documents, tokens = self.files.num_documents, self.files.num_tokens
        counts = f"{documents:,} documents, {tokens:,} tokens, {self.num_samples:,} samples"
        skipped = [f"skipped {self.files.skips}"] if self.files.skips else []
        return "; ".join([counts, *skipped, *self.notes])

    def texts(self, limit: int, text_column: str) -> list[str]:
        """The first documents of the training data, as text."""
        return list(islice(read_documents(self.train_path, text_column), limit))


def open_world(cfg: RunConfig) -> World | None:
    """The synthetic world that a run's documents are of, if they are."""
    spec = cfg.world
    return World(spec.seed, spec.num_people, spec.people_per_document) if spec else None


def open_corpus(cfg: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Corpus:
    """Build or open everything; the first process writes, the others wait and read.

    A judge's or rewriter's run reads prompts instead of documents.

    `tokenizer` is that of the checkpoint a run starts from, which wins over the settings.

    Raises:
        DataError: see `read_documents`, `SampleIndex`; ConfigError: neither a path nor a world.
    """
    if cfg.task != "policy":
        return _open_prompts(cfg, mesh, tokenizer)
    train_path, eval_path = _document_paths(cfg, mesh)
    built: tuple[list[Path], bytes] | None = None
    if mesh.is_main:
        tokenizer = tokenizer or _tokenizer(cfg, train_path)
        files = [_token_files(cfg, path, tokenizer) for path in (train_path, eval_path) if path is not None]
        built = [f.prefix_path for f in files], tokenizer.model
    prefixes, tokenizer_model = mesh.broadcast(built)
    tokenizer = Tokenizer(tokenizer_model)
    opened = [TokenFiles.open(prefix) for prefix in prefixes]
    train, held = opened[0], opened[-1]
    split = _split(cfg, train) if eval_path is None else _Split(train.lengths, held.lengths)
    index = _index(cfg, split.train, cfg.data.cut, cfg.seed, "training")
    stream = SampleStream(train, tokenizer, index)
    # The same held-out samples for every seed, so that runs can be compared.
    held_index = _index(cfg, split.held, "every_chunk", 0, "held-out", split.held_starts)
    count = min(cfg.eval.num_prefixes, held_index.num_samples)
    held_out = SampleStream(held, tokenizer, held_index).samples_at(0, count)
    notes = [*_passed_over(train_path), *split.notes]
    return Corpus(tokenizer, stream, held_out, train_path, train, index.num_samples, notes)


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
    return Corpus(tokenizer, stream, held, data.path, None, len(samples))


def _check_rewrites(samples: Sequence[Sample], path: Path) -> None:
    wanted = {"prefix": str, "suffix": str, "safe": bool}
    for s in samples:
        if s.labels is None and not all(isinstance(s.facts.get(name), kind) for name, kind in wanted.items()):
            raise DataError(
                f'{path}:{s.document + 1}: task="rewriter" needs the texts "prefix" and "suffix" and "safe" (true or '
                "false) with each prompt, as `sip data rewrites` writes them"
            )


def _document_paths(cfg: RunConfig, mesh: Mesh) -> tuple[Path, Path | None]:
    if cfg.world is None:
        if cfg.data.path is None:
            raise ConfigError("no documents: set data.path (--data.path PATH), or add a [world] section")
        return cfg.data.path, cfg.data.eval_path
    world, spec = open_world(cfg), cfg.world
    assert world is not None
    numbers = (
        spec.seed,
        spec.num_people,
        spec.people_per_document,
        spec.train_documents,
        spec.test_documents,
    )
    name = "-".join(["world", *map(str, numbers)])
    folder = cfg.data.cache / (name if spec.split == "train" else f"{name}-{spec.split}")
    # The rewriter's documents are more of the judge's kind, drawn with another seed.
    split, seed = ("judge", spec.seed + 1) if spec.split == "rewriter" else (spec.split, spec.seed)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if mesh.is_main:
        for path, part, count in (
            (train, split, spec.train_documents),
            (test, "test", spec.test_documents),
        ):
            if not path.is_file():
                documents = write_documents(world, part, count, seed)
                write_jsonl(path, ({"text": d.text, "style": d.style} for d in documents))
    mesh.barrier()
    return train, test


def _tokenizer(cfg: RunConfig, train_path: Path) -> Tokenizer:
    if cfg.data.tokenizer is not None:
        return Tokenizer.load(cfg.data.tokenizer)
    saved = cfg.out / "tokenizer.model"
    if saved.is_file():
        return Tokenizer.load(saved)
    texts = read_documents(train_path, cfg.data.text_column)
    try:
        return Tokenizer.train(texts, cfg.data.vocab_size, saved)
    except (ConfigError, DataError) as error:
        where = str(train_path)
        raise error if where in str(error) else type(error)(f"{where}: {error}") from None


def _token_files(cfg: RunConfig, path: Path, tokenizer: Tokenizer) -> TokenFiles:
    return build_token_files(path, tokenizer, cfg.data.cache, cfg.data.text_column)


@dataclass(frozen=True)
class _Split:
    """Which tokens of which documents are trained on and which are held back: lengths [num_documents]."""

    train: np.ndarray
    held: np.ndarray
    held_starts: np.ndarray | None = None
    """Tokens of each document before the held-out suffixes."""
    notes: Sequence[str] = ()


def _split(cfg: RunConfig, files: TokenFiles) -> _Split:
    """Some documents by a hash of their number, so that more documents move none across.

    Where none of them is long enough, as in a book, the end of the longest document.
    """
    data, lengths = cfg.data, files.lengths
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
            f"{files.num_documents} documents, of at most {lengths.max(initial=0)} tokens, are too few to train on "
            f"and to hold back some: suffixes of {data.suffix_tokens} need {shortest + data.suffix_tokens} in one; "
            "set data.eval_path, a smaller data.suffix_tokens or data.min_prefix_tokens, or give longer documents"
        )
    held, starts = np.zeros_like(lengths), np.zeros_like(lengths)
    held[longest], starts[longest] = lengths[longest], train[longest]
    note = f"held back: the last {num_held} suffixes of document {longest + 1}, for want of whole documents"
    return _Split(train, held, starts, [note])


def _passed_over(path: Path) -> list[str]:
    passed_over = take_inventory(path).passed_over
    return [f"passed over in {path}: {passed_over}"] if passed_over else []


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
