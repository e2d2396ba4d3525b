"""`sip runs` and `sip trace`: what the records of runs tell without a tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_monitoring_commands(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("runs")(runs)
    app.command("trace")(trace)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder; the runs in it and below are listed.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a run.")] = False,
) -> None:
    """List runs: state (running, finished, dead, preempted, ...), step, newest figures."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from sip_engine.monitoring.listing import list_runs, table_of

    found = list_runs(folder)
    if as_json:
        for one in found:
            typer.echo(json.dumps(asdict(one), ensure_ascii=False))
        return
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    console.print(table_of(found))


def trace(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[
        Path, typer.Option(help="JSON file to write, for ui.perfetto.dev or chrome://tracing.")
    ] = Path("trace.json"),
    steps: Annotated[str, typer.Option(help="FIRST:LAST; default: the last 200 that were made.")] = "",
) -> None:
    """Write what every process of a run did when, as a trace for Perfetto, and name the slowest one."""
    from sip_engine.monitoring.trace import write_trace

    typer.echo(write_trace(run, out, steps))
