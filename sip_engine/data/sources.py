"""Where a run's documents and its tokenizer come from, as its settings have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sip_engine.config.schema import RunConfig
from sip_engine.data.documents import read_documents
from sip_engine.data.indexed import find_token_files
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.data.world_files import world_documents
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import write_atomic
from sip_engine.utils.regular import read_bytes
from sip_engine.world import World

if TYPE_CHECKING:
    from sip_engine.distributed.mesh import Mesh


def open_world(cfg: RunConfig) -> World | None:
    """The synthetic world that a run's documents are of, if they are."""
    spec = cfg.world
    return World(spec.seed, spec.num_people, spec.people_per_document) if spec else None


@dataclass(frozen=True)
class DocumentSource:
    """A source of training documents, as the settings have it."""

    name: str
    path: Path
    text_column: str


def document_sources(cfg: RunConfig, mesh: Mesh | None = None) -> tuple[list[DocumentSource], Path | None]:
    """Where training documents come from, and the path of held-out ones where they have their own.

    Without a mesh, in one process. Raises ConfigError: neither a path nor a world.
    """
    data = cfg.data
    if cfg.world is not None:
        train, test = _world_paths(cfg, mesh)
        return [DocumentSource("", train, data.text_column)], test
    if data.sources:
        sources = [DocumentSource(s.name, s.path, s.text_column or data.text_column) for s in data.sources]
        return sources, data.eval_path
    if data.path is None:
        raise ConfigError("no documents: set data.path (--data.path PATH), or add a [world] section")
    return [DocumentSource("", data.path, data.text_column)], data.eval_path


def _world_paths(cfg: RunConfig, mesh: Mesh | None) -> tuple[Path, Path]:
    """The synthetic world's documents, written where they are not yet."""
    world = open_world(cfg)
    assert world is not None and cfg.world is not None
    paths = world_documents(world, cfg.world, cfg.data.cache, write=mesh is None or mesh.is_main)
    if mesh is not None:
        mesh.barrier()
    return paths


def tokenizer_of(cfg: RunConfig, sources: Sequence[DocumentSource], carried: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a run: that of the checkpoint it starts from, the given one, its own of before, or a new one.

    Raises:
        DataError: it is not the checkpoint's; ConfigError: token files made elsewhere, and no tokenizer.
    """
    given = Tokenizer.load(cfg.data.tokenizer) if cfg.data.tokenizer is not None else None
    if carried is not None:
        if given is not None and given.fingerprint != carried.fingerprint:
            raise DataError(
                f"{cfg.data.tokenizer}: not the tokenizer of the checkpoint that this run starts from; leave "
                "data.tokenizer out, or start from another checkpoint"
            )
        return carried
    if given is not None:
        return given
    saved = cfg.out / "tokenizer.model"
    if saved.exists():
        return _trained_before(saved)
    where = ", ".join(str(source.path) for source in sources)
    if any(find_token_files(source.path) for source in sources):
        raise ConfigError(
            f"{where}: token files need the tokenizer that they were made with: set data.tokenizer, or init"
        )
    try:
        texts = in_turn([read_documents(source.path, source.text_column) for source in sources])
        tokenizer = Tokenizer.train(texts, cfg.data.vocab_size, saved)
        write_atomic(_fingerprint_of(saved), f"{tokenizer.fingerprint}\n")
        return tokenizer
    except (ConfigError, DataError) as error:
        raise error if where in str(error) else type(error)(f"{where}: {error}") from None


def _trained_before(saved: Path) -> Tokenizer:
    """The tokenizer of a run that has no checkpoint yet. Raises DataError where it is not what was trained."""
    tokenizer, beside = Tokenizer.load(saved), _fingerprint_of(saved)
    if beside.is_file() and read_bytes(beside).strip() != tokenizer.fingerprint.encode():
        raise DataError(f"{saved}: damaged (not what {beside.name} says); remove both, they are made anew")
    return tokenizer


def _fingerprint_of(tokenizer: Path) -> Path:
    return tokenizer.with_suffix(".sha256")


def in_turn(readers: list[Iterator[str]]) -> Iterator[str]:
    """One of each in turn, so that the beginning has some of all."""
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text
