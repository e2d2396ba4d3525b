"""`sip plan`, `sip launch` and `sip simulate`: their options, read and checked; the work is in the other modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sip_engine.config.overrides import read_run_config

if TYPE_CHECKING:
    from rich.console import Console


_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[Path, typer.Argument(help="A TOML file; configs/ holds examples.")]
GpuName = Annotated[str, typer.Option(help="A GPU of the table of rates: a100, h100, h200.")]
Nodes = Annotated[int, typer.Option(help="Nodes of the policy.")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs of a node; default: the table's.")]


def add_planning_commands(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("plan", context_settings=_OVERRIDES)(plan)


def plan(
    context: typer.Context,
    config: Config,
    gpu: GpuName = "h100",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    price: Annotated[float | None, typer.Option(help="Dollars for a GPU hour.")] = None,
    judge: Annotated[str | None, typer.Option(help="Size of the model that judges: 8b, 32b, 70b.")] = None,
    judge_gpus: Annotated[int, typer.Option(help="GPUs of a judge's server, beside the policy's.")] = 0,
    vocab_size: Annotated[
        int | None, typer.Option(help="Vocabulary, where a tokenizer file sets it; default: data.vocab_size.")
    ] = None,
    prefix_tokens: Annotated[
        float | None, typer.Option(help="Mean prefix; default: the middle of shortest and longest.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Propose the best layouts, best first.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything there as JSON too.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="Measured rates; default: benchmarks/results/gpu_rates.csv.")
    ] = None,
) -> None:
    """Predict memory, time and cost of a run on GPUs, without one; exits with 9 if it does not fit.

    Every setting can be overridden: `--parallel.tensor 2`. `sip settings` lists them.
    """
    from sip_engine.planning.hardware import MEASURED, load_hardware, load_judge
    from sip_engine.planning.plan import DoesNotFitError, Request, make_plan
    from sip_engine.planning.screen import plan_screen, sweep_screen
    from sip_engine.planning.sweep import sweep as find_layouts
    from sip_engine.utils.files import check_writable, write_json

    cfg = read_run_config(config, context.args)
    if json_file is not None:
        check_writable(json_file)
    hardware = load_hardware(gpu, gpus_per_node=gpus_per_node, measured=rates or MEASURED)
    request = Request(
        hardware,
        nodes,
        vocab_size,
        prefix_tokens,
        load_judge(judge) if judge else None,
        judge_gpus,
        price,
    )
    screen = _wide_console()
    found = make_plan(cfg, request)
    screen.print(plan_screen(found, hardware, str(config)))
    written = found.as_json()
    if sweep:
        proposals = find_layouts(cfg, request)
        screen.print(sweep_screen(proposals))
        written["sweep"] = [{"reason": p.reason, **p.plan.as_json()} for p in proposals]
    if json_file is not None:
        write_json(json_file, json.loads(json.dumps(written)))
    if not found.fits:
        raise DoesNotFitError(
            f"{config}: needs {found.memory.total / 2**30:.1f} GiB of a {gpu}'s {found.capacity / 2**30:.1f}; "
            f"first: {found.advice[0]}"
        )


def _wide_console() -> Console:
    """Standard output, never narrower than a plan's tables where it is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
