"""What all makers of prompts share: the documents of a split to read, files to mix in, and files to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus, open_corpus
from sip_engine.data.prompts import prompt_records
from sip_engine.distributed.mesh import Mesh, start_alone
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.types import Sample
from sip_engine.utils.errors import ConfigError, DataError
from sip_engine.utils.files import check_writable, write_jsonl
from sip_engine.utils.progress import console

Record = dict[str, Any]
SPARE = 4
"""Samples looked at for each label wanted: labels are balanced. Pairs have none to spare."""
FEWEST = 1000
"""Samples looked at, at least."""


def open_documents(cfg: RunConfig, out: Path, split: str, num_eval: int) -> tuple[Mesh, Corpus]:
    """The documents of a split, with enough held out; in one process.

    Raises:
        ConfigError: the config of a task, which has prompts for documents, or more than one process.
        DataError: `out` cannot be written, or the documents cannot be read.
    """
    if cfg.task != "policy":
        raise ConfigError(f'task = "{cfg.task}" reads prompts; give the config of documents')
    check_writable(out, folder=True)
    mesh = start_alone()
    if mesh.size > 1:
        raise ConfigError(f"data is made by one process, not {mesh.size}: start it without torchrun")
    world = cfg.world.model_copy(update={"split": split}) if cfg.world else None
    evaluation = cfg.eval.model_copy(update={"num_prefixes": max(FEWEST, SPARE * num_eval)})
    cfg = cfg.model_copy(update={"world": world, "eval": evaluation})
    tokenizer = checkpoint_tokenizer(resolve_checkpoint(cfg.init)) if cfg.init else None
    return mesh, open_corpus(cfg, mesh, tokenizer)


def held_out_numbers(num_eval: int, num_safety: int, num_factuality: int) -> tuple[int, int, int]:
    """Held-out pairs (each a prompt in both orders), safety and factuality prompts; none of a kind not trained on."""
    return num_eval // 2, num_eval * (num_safety > 0), num_eval * (num_factuality > 0)


def training_samples(corpus: Corpus, wanted: int) -> list[Sample]:
    """The first samples of a corpus' stream: `wanted`, but not below a thousand, as far as there are so many."""
    return corpus.stream.samples_at(0, min(max(wanted, FEWEST), corpus.num_samples))


def read_mix(folder: Path | None) -> tuple[list[Record], list[Record]]:
    """The training and held-out records that `sip data` wrote for a judge, to be mixed with others; or none.

    Raises:
        DataError: a file is missing, or a line of it is no record for a judge.
    """
    return (_read_made(folder / "train.jsonl"), _read_made(folder / "eval.jsonl")) if folder else ([], [])


def _read_made(path: Path) -> list[Record]:
    records = prompt_records(path)
    for number, record in records:
        if "kind" not in record:
            raise DataError(
                f"{path}:{number}: no record for a judge: --mix takes a folder of `sip data judge-pairs`, "
                "`… rollout-pairs` or `… notes`"
            )
    if not records:
        raise DataError(f"{path}: holds no prompts; leave --mix out, or make them anew")
    return [record for _, record in records]


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


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """Records in an order drawn by `seed`."""
    return [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
