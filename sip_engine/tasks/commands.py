"""The commands of `sip data` that make prompts: their options are the fields of a spec, with its limits and words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sip_engine.config.schema import RunConfig
from sip_engine.config.section import former
from sip_engine.tasks.specs import SPECS, DataSpec

ReadConfig = Callable[[Path, typer.Context, dict[str, Any]], RunConfig]
"""A config's file, the command line that overrides it, and settings on top -> the config."""


def add_spec_commands(app: typer.Typer, read_config: ReadConfig) -> None:
    """Add a command for each spec; every other option of it is a setting of the config."""
    for spec in SPECS:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(spec.command, context_settings=settings)(_command(spec, read_config))
        if spec.former:
            app.command(spec.former, context_settings=settings, hidden=True)(_command(spec, read_config))


def _command(spec: type[DataSpec], read_config: ReadConfig) -> Callable[..., None]:
    def command(context: typer.Context, config: Path, out: Path, **options: Any) -> None:
        if spec.former:
            former(context.command.name, spec.command, spec.former)
        wanted = spec(**options)
        wanted.make(read_config(config, context, wanted.settings()), out)

    types: dict[str, Any] = {
        "context": typer.Context,
        "config": Annotated[Path, typer.Argument(help=spec.reads)],
        "out": Annotated[Path, typer.Option(help="Folder for train.jsonl and eval.jsonl.")],
    }
    defaults: dict[str, Any] = {}
    for name, field in spec.model_fields.items():
        least = next((limit.ge for limit in field.metadata if hasattr(limit, "ge")), None)
        types[name] = Annotated[field.annotation, typer.Option(help=field.description, min=least)]
        defaults[name] = field.default
    # What typer looks at.
    command.__doc__, command.__annotations__ = spec.__doc__, {**types, "return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=annotation,
                default=defaults.get(name, inspect.Parameter.empty),
            )
            for name, annotation in types.items()
        ]
    )
    return command
