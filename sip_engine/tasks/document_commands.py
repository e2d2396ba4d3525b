"""The commands of `sip data` that read documents: `inspect` says what they hold, `tokenize` prepares a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from sip_engine.config.schema import RunConfig
    from sip_engine.data.tokenizer import Tokenizer

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
_CONFIG: Any = typer.Argument(help="A TOML file whose data section says what to read.")


class ReadConfig(Protocol):
    """A config's file and the command line that overrides it -> the config."""

    def __call__(self, config: Path, context: typer.Context, /) -> RunConfig: ...


def add_document_commands(app: typer.Typer, read_config: ReadConfig) -> None:
    """Add both; every other option of theirs is a setting of the config."""

    @app.command("inspect", context_settings=_OVERRIDES)
    def _inspect(context: typer.Context, config: Annotated[Path, _CONFIG]) -> None:
        """Read, tokenize and cut the documents of a config, and say what was found; trains nothing."""
        from sip_engine.data.inspect import describe_data

        cfg = read_config(config, context)
        describe_data(cfg, _tokenizer_of_init(cfg))

    @app.command("tokenize", context_settings=_OVERRIDES)
    def _tokenize(
        context: typer.Context,
        config: Annotated[Path, _CONFIG],
        part: Annotated[
            str,
            typer.Option(
                help="I/N: every Nth file, from the Ith; default: that of a Slurm array's task, or all."
            ),
        ] = "",
        jobs: Annotated[int, typer.Option(min=0, help="Processes at once; 0: one a core.")] = 0,
        verify: Annotated[
            bool, typer.Option("--verify", help="Read all input, in case it changed unnoticed.")
        ] = False,
    ) -> None:
        """Make the token files of a config's documents ahead of a run, on all cores; goes on where it was stopped.

        As a job array, each task takes a part of the files; a run then finds all. `data.cache` must be shared.
        """
        from sip_engine.data.build import Work
        from sip_engine.data.tokenize import part_of, tokenize

        cfg = read_config(config, context)
        mine = part_of(part, os.environ)
        tokenize(cfg, _tokenizer_of_init(cfg), mine, Work(jobs or None, verify))


def _tokenizer_of_init(cfg: RunConfig) -> Tokenizer | None:
    if cfg.init is None:
        return None
    from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint

    return checkpoint_tokenizer(resolve_checkpoint(cfg.init))
