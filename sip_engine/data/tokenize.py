"""`sip data tokenize`: token files of a config's documents, made before a run, all or a part by each of many jobs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.build import Work, build_part, build_token_files
from sip_engine.data.indexed import find_token_files
from sip_engine.data.sources import document_sources, tokenizer_of
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.progress import console

Share = tuple[int, int]
"""Which part, from 0, of how many."""


def part_of(given: str, environment: Mapping[str, str]) -> Share | None:
    """The part of the work that is this job's: `I/N` as given, or that of a Slurm array's task; None: all of it.

    Raises:
        ConfigError: it is not of that form, or the array's numbers leave some out.
    """
    if given:
        found = re.fullmatch(r"(\d+)/(\d+)", given.strip())
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(f"--part {given}: must be I/N with 1 <= I <= N, such as 3/16")
        return number - 1, count
    if not environment.get("SLURM_ARRAY_TASK_ID"):
        return None
    names = ("ID", "MIN", "MAX", "COUNT")
    try:
        task, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    except (KeyError, ValueError):
        raise ConfigError(
            "SLURM_ARRAY_TASK_ID without MIN, MAX and COUNT beside it: give --part I/N"
        ) from None
    step = max(1, last - first) // max(1, count - 1)
    number, rest = divmod(task - first, max(1, step))
    if rest or ((count - 1) * step != last - first and count > 1):
        raise ConfigError(
            f"the Slurm array's {count} numbers from {first} to {last} are not evenly spaced: give --part I/N"
        )
    return number, count


def tokenize(cfg: RunConfig, carried: Tokenizer | None, part: Share | None, work: Work) -> None:
    """Makes what is not there yet, and says for each source what there is.

    carried: the tokenizer of the checkpoint that runs start from.

    Raises:
        ConfigError: a judge's or rewriter's run, which has no documents; or a part, and no tokenizer yet.
        DataError: as `build_token_files`.
    """
    if cfg.task != "policy":
        raise ConfigError(f'task="{cfg.task}" reads prompts, which are not tokenized ahead: just train')
    has_tokenizer = carried or cfg.data.tokenizer or (cfg.out / "tokenizer.model").is_file()
    if part is not None and not has_tokenizer:
        raise ConfigError(
            "a part of the documents needs a tokenizer that there is already: set data.tokenizer, or init"
        )
    sources, eval_path = document_sources(cfg)
    tokenizer = tokenizer_of(cfg, sources, carried)
    wanted = [(source.path, source.text_column) for source in sources]
    wanted += [(eval_path, cfg.data.text_column)] if eval_path else []
    for path, text_column in wanted:
        started = time.monotonic()
        found = _tokenize(cfg, path, text_column, tokenizer, part, work)
        console.print(f"{path}: {found} ({time.monotonic() - started:.0f} s)", soft_wrap=True)


def _tokenize(
    cfg: RunConfig, path: Path, text_column: str, tokenizer: Tokenizer, part: Share | None, work: Work
) -> str:
    if find_token_files(path):
        return "token files made elsewhere, read as they are"
    if part is not None:
        done = build_part(path, tokenizer, cfg.data.cache, text_column, part, work)
        return (
            f"part {part[0] + 1} of {part[1]}: {done.num_mine:,} of {done.num_files:,} files, "
            f"{done.num_tokenized:,} of them tokenized now"
        )
    files = build_token_files(path, tokenizer, cfg.data.cache, text_column, work=work)
    skipped = f"; skipped {files.skips}" if files.skips else ""
    return (
        f"{files.num_documents:,} documents, {files.num_tokens:,} tokens of {len(files.prefixes):,} files{skipped}; "
        f"{files.prefix_path.parent}"
    )
