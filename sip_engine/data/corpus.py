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
from sip_engine.data.permutation import hash_key, mix64
from sip_engine.data.prompts import PromptStream, read_prompts
from sip_engine.data.samples import SampleIndex
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

    @property
    def description(self) -> str:
        """Counts of the training data, in words."""
        if self.files is None:
            return f"{self.num_samples:,} prompts"
        documents, tokens = self.files.num_documents, self.files.num_tokens
        return f"{documents:,} documents, {tokens:,} tokens, {self.num_samples:,} samples"

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
    train_lengths = held_lengths = train.lengths
    if eval_path is None:
        is_held = _held_out(train.num_documents, cfg.data.holdout)
        train_lengths = np.where(is_held, 0, train.lengths)
        held_lengths = np.where(is_held, train.lengths, 0)
    else:
        held_lengths = held.lengths
    index = _index(cfg, train_lengths, cfg.data.cut, cfg.seed, "training")
    stream = SampleStream(train, tokenizer, index)
    # The same held-out samples for every seed, so that runs can be compared.
    held_index = _index(cfg, held_lengths, "every_chunk", 0, "held-out")
    count = min(cfg.eval.num_prefixes, held_index.num_samples)
    held_out = SampleStream(held, tokenizer, held_index).samples_at(0, count)
    return Corpus(tokenizer, stream, held_out, train_path, train, index.num_samples)


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


def _held_out(num_documents: int, share: float) -> np.ndarray:
    """[num_documents] bool: by a hash of the number, so that more documents move none across."""
    draws = mix64(np.arange(num_documents, dtype=np.uint64) ^ hash_key(0, 0))
    return draws < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def _index(cfg: RunConfig, lengths: np.ndarray, cut: str, seed: int, what: str) -> SampleIndex:
    data = cfg.data
    try:
        return SampleIndex(
            lengths,
            data.suffix_tokens,
            data.max_prefix_tokens,
            data.min_prefix_tokens,
            cut=cut,  # type: ignore[arg-type]
            seed=seed,
        )
    except DataError as error:
        raise DataError(f"{what} documents: {error}") from None
