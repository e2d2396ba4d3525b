"""`sip data judge-pairs` and `sip data rewrites`: from documents to files of prompts with known answers."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from sip_engine.config.parse import merge_settings, parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus, open_world
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.rewriters.open import open_rewriter
from sip_engine.tasks.corruptors.rules import Corruptor, CountingCorruptor, RuleCorruptor, WorldCorruptor
from sip_engine.tasks.corruptors.server import ServerCorruptor
from sip_engine.tasks.labels import Record, judge_records, rewrite_records
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import check_writable, write_jsonl
from sip_engine.utils.progress import console

_SPARE, _FEWEST = 4, 1000
"""Samples looked at for each label wanted, and at least: labels are balanced. Pairs have none to spare."""


def make_judge_data(
    cfg: RunConfig,
    out: Path,
    *,
    num_pairs: int,
    num_safety: int,
    num_factuality: int,
    num_eval: int,
    corruptor: str | None = None,
    max_prefix_chars: int | None,
) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: suffixes against corrupted copies in both orders,
    safety and factuality.

    `corruptor` takes the place of `corruptor.backend`. Copies that fail are counted and said, by their reasons.

    Raises:
        SipError: bad settings or data, or a server that cannot be used, before anything is written.
    """
    if corruptor is not None:
        over = {"corruptor": {"backend": corruptor}}
        cfg = parse_config(merge_settings(cfg.model_dump(mode="json"), over), "corruptor")
    mesh, corpus = open_documents(cfg, out, "judge", num_eval)
    judge, worse = open_judge(cfg, corpus, mesh), CountingCorruptor(_corruptor(cfg))

    def records(samples: list[Sample], pairs: int, safety: int, factuality: int, seed: int) -> list[Record]:
        return judge_records(
            samples,
            worse,
            judge,
            corpus.tokenizer,
            num_pairs=pairs,
            num_safety=safety,
            num_factuality=factuality,
            max_prefix_chars=max_prefix_chars,
            seed=seed,
        )

    samples = _training_samples(corpus, max(num_pairs, _SPARE * num_safety, _SPARE * num_factuality))
    train = records(samples, num_pairs, num_safety, num_factuality, cfg.seed)
    held_out = records(corpus.held_out, *held_out_numbers(num_eval, num_safety, num_factuality), cfg.seed + 1)
    if summary := worse.summary():
        console.print(summary, soft_wrap=True, markup=False)
    write_records(out, train, held_out, wanted=2 * num_pairs + num_safety + num_factuality)


def make_rewrite_data(cfg: RunConfig, out: Path, *, num: int, num_eval: int) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: rewrite prompts, half of them of safe suffixes.

    Raises:
        SipError: bad settings or data, before anything is written.
    """
    if cfg.rewriter.backend == "none":
        raise ConfigError(
            "rewrites of unsafe suffixes need a teacher: set rewriter.backend (world, server or local)"
        )
    mesh, corpus = open_documents(cfg, out, "rewriter", num_eval)
    judge, teacher = open_judge(cfg, corpus, mesh), open_rewriter(cfg, mesh)
    assert teacher is not None

    def records(samples: list[Sample], wanted: int, seed: int) -> list[Record]:
        return rewrite_records(samples, judge, teacher, corpus.tokenizer, num=wanted, seed=seed)

    train = records(_training_samples(corpus, _SPARE * num), num, cfg.seed)
    write_records(out, train, records(corpus.held_out, num_eval, cfg.seed + 1), wanted=num)


def open_documents(cfg: RunConfig, out: Path, split: str, num_eval: int) -> tuple[Mesh, Corpus]:
    """The documents of a split, with enough held out; in one process.

    Raises:
        ConfigError: the config of a task, which has prompts for documents, or more than one process.
        DataError: `out` cannot be written, or the documents cannot be read.
    """
    if cfg.task != "policy":
        raise ConfigError(f'task = "{cfg.task}" reads prompts; give the config of documents')
    check_writable(out, folder=True)
    mesh = start_mesh()
    if mesh.size > 1:
        raise ConfigError(f"data is made by one process, not {mesh.size}: start it without torchrun")
    world = cfg.world.model_copy(update={"split": split}) if cfg.world else None
    evaluation = cfg.eval.model_copy(update={"num_prefixes": max(_FEWEST, _SPARE * num_eval)})
    cfg = cfg.model_copy(update={"world": world, "eval": evaluation})
    tokenizer = checkpoint_tokenizer(resolve_checkpoint(cfg.init)) if cfg.init else None
    return mesh, open_corpus(cfg, mesh, tokenizer)


def held_out_numbers(num_eval: int, num_safety: int, num_factuality: int) -> tuple[int, int, int]:
    """Held-out pairs (each a prompt in both orders), safety and factuality prompts; none of a kind not trained on."""
    return num_eval // 2, num_eval * (num_safety > 0), num_eval * (num_factuality > 0)


def _training_samples(corpus: Corpus, wanted: int) -> list[Sample]:
    return corpus.stream.samples_at(0, min(max(wanted, _FEWEST), corpus.num_samples))


def _corruptor(cfg: RunConfig) -> Corruptor:
    if cfg.corruptor.backend == "server":
        return ServerCorruptor(cfg.corruptor.server)
    world = open_world(cfg)
    return WorldCorruptor(world) if cfg.corruptor.backend == "world" and world else RuleCorruptor()


def write_records(out: Path, train: list[Record], held_out: list[Record], *, wanted: int) -> None:
    """`out`/train.jsonl and `out`/eval.jsonl, and what is in them.

    Raises:
        ConfigError: nothing could be made; DataError: a file cannot be written. Nothing is written before.
    """
    if not train or not held_out:
        raise ConfigError(
            f"nothing to write: {len(train)} training and {len(held_out)} held-out records could be made; ask for "
            "more, or give more documents (safe and unsafe ones)"
        )
    if len(train) < wanted:
        console.print(
            f"{len(train):,} of the {wanted:,} prompts asked for: the documents hold no more, a suffix could not be "
            "corrupted, or votes on a label parted"
        )
    files = {"train": train, "eval": held_out}
    for name in files:
        check_writable(out / f"{name}.jsonl")
    table = Table("", "prompts", "longest prompt, characters")
    for name, records in files.items():
        write_jsonl(out / f"{name}.jsonl", records)
        longest = max(len(record["text"] if "text" in record else record["prompt"]) for record in records)
        table.add_row(str(out / f"{name}.jsonl"), f"{len(records):,}", str(longest))
    console.print(table)
