"""`sip plan`, `sip launch` and `sip simulate`: their options, read and checked; the work is in the other modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sip_engine.config.overrides import read_run_config
from sip_engine.policy.inherit import with_model_of_init

if TYPE_CHECKING:
    from rich.console import Console

    from sip_engine.config.schema import RunConfig


_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[Path, typer.Argument(help="A TOML file; configs/ holds examples.")]
GpuName = Annotated[str, typer.Option(help="A GPU of the table of rates: a100, h100, h200.")]
Nodes = Annotated[int, typer.Option(help="Nodes of the policy.")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs of a node; default: the table's.")]


def add_planning_commands(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("plan", context_settings=_OVERRIDES)(plan)
    app.command("simulate", context_settings=_OVERRIDES)(simulate)
    launch = typer.Typer(
        no_args_is_help=True, help="Write the script that starts a run on a cluster, and submit it."
    )
    launch.command("slurm", context_settings=_OVERRIDES)(launch_slurm)
    launch.command("skypilot", context_settings=_OVERRIDES)(launch_skypilot)
    app.add_typer(launch, name="launch")


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
    from sip_engine.accounting.hardware import MEASURED, load_hardware, load_judge
    from sip_engine.planning.plan import Request, make_plan, refuse
    from sip_engine.planning.screen import plan_screen, sweep_screen
    from sip_engine.planning.sweep import sweep as find_layouts
    from sip_engine.utils.files import check_writable, write_json

    cfg = read_run_config(config, context.args, complete=with_model_of_init)
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
        refuse(found, str(config))


def _wide_console() -> Console:
    """Standard output, never narrower than a plan's tables where it is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def launch_slurm(
    context: typer.Context,
    config: Config,
    nodes: Nodes = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    script: Annotated[Path | None, typer.Option(help="File to write; default: NAME.sbatch.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and print the script, submit nothing.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the job; default: that of the run's folder.")
    ] = None,
    time: Annotated[str, typer.Option(help="Time limit, [days-]hours:minutes:seconds.")] = "24:00:00",
    signal_seconds: Annotated[
        int, typer.Option(help="Seconds before the limit at which the run is told to save and end.")
    ] = 600,
    max_requeues: Annotated[int, typer.Option(help="Most times that the job is started again.")] = 100,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores of a node for the run.")] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface for NCCL's sockets.")] = None,
    venv: Annotated[Path | None, typer.Option(help="Virtual environment, seen by all nodes.")] = None,
    container: Annotated[str | None, typer.Option(help="Image, for pyxis and enroot.")] = None,
    mounts: Annotated[
        str | None, typer.Option(help="The container's mounts, HOST:INSIDE with commas.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Folder of the job's log and one a node.")] = Path("logs"),
    gpu: Annotated[
        str | None, typer.Option(help="Plan it for this GPU first; what does not fit is not submitted.")
    ] = None,
) -> None:
    """Write an sbatch script for a run and submit it; it saves, requeues and goes on by itself.

    Every setting can be overridden: `--parallel.tensor 2`. `sip settings` lists them.
    """
    from sip_engine.planning.launch.job import Job
    from sip_engine.planning.launch.submit import submit_slurm, write_script

    cfg = read_run_config(config, context.args)
    job = Job(
        cfg, config, tuple(context.args), nodes, gpus_per_node, name or cfg.out.name, time, signal_seconds,
        max_requeues, logs=logs, partition=partition, account=account, cpus=cpus, interface=interface, venv=venv,
        container=container, mounts=mounts,
    )  # fmt: skip
    job.check()
    if gpu is not None:
        _check_fit(cfg, config, gpu, nodes, gpus_per_node)
    path = script or Path(f"{job.name}.sbatch")
    text = write_script(job, "slurm", path)
    typer.echo(text if dry_run else submit_slurm(path))


def launch_skypilot(
    context: typer.Context,
    config: Config,
    nodes: Nodes = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    script: Annotated[Path | None, typer.Option(help="File to write; default: NAME.yaml.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job; default: that of the run's folder.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="SkyPilot's name of the GPU.")] = "H100",
    spot: Annotated[bool, typer.Option(help="Take machines that may be taken back.")] = True,
    venv: Annotated[Path, typer.Option(help="Virtual environment that `make install` makes.")] = Path(
        ".venv"
    ),
    container: Annotated[str | None, typer.Option(help="Docker image to run in.")] = None,
) -> None:
    """Write a SkyPilot task for a run: `sky jobs launch FILE` then starts it, and starts it again when preempted."""
    from sip_engine.planning.launch.job import Job
    from sip_engine.planning.launch.submit import write_script

    cfg = read_run_config(config, context.args)
    job = Job(
        cfg, config, tuple(context.args), nodes, gpus_per_node, name or cfg.out.name, spot=spot,
        accelerator=accelerator, venv=None if container else venv, container=container,
    )  # fmt: skip
    path = script or Path(f"{job.name}.yaml")
    typer.echo(write_script(job, "skypilot", path))


def _check_fit(cfg: RunConfig, config: Path, gpu: str, nodes: int, gpus_per_node: int) -> None:
    """Raise DoesNotFitError unless the run fits GPUs of that kind."""
    from sip_engine.accounting.hardware import load_hardware
    from sip_engine.planning.plan import Request, make_plan, refuse

    found = make_plan(cfg, Request(load_hardware(gpu, gpus_per_node=gpus_per_node), nodes))
    if not found.fits:
        refuse(found, str(config))


def simulate(
    context: typer.Context,
    config: Config,
    gpu: GpuName = "h100",
    nodes: Nodes = 8,
    gpus_per_node: GpusPerNode = None,
    judge: Annotated[str | None, typer.Option(help="Size of the model that judges: 8b, 32b, 70b.")] = None,
    judge_gpus: Annotated[int, typer.Option(help="GPUs of a judge's server at that many nodes.")] = 0,
    judge_latency: Annotated[float, typer.Option(help="Seconds of one judge call.")] = 1.0,
    rate_limit: Annotated[
        float | None, typer.Option(help="Judge calls a second that its server takes.")
    ] = None,
    failures: Annotated[
        float | None, typer.Option(help="Failures of a GPU an hour; default: 2.0e-5, arXiv 2407.21783.")
    ] = None,
    restart: Annotated[float, typer.Option(help="Seconds from a failure to the next step.")] = 300.0,
    stragglers: Annotated[float, typer.Option(help="Spread of a node's times (of their logarithm).")] = 0.03,
    hours: Annotated[float, typer.Option(help="Hours to simulate at each scale.")] = 240.0,
    seed: Annotated[int, typer.Option(help="Seed of all chance.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the plots and simulate.json.")] = Path("simulation"),
) -> None:
    """Simulate a run on 8 to 4,096 GPUs: goodput, best checkpoint interval, judge GPUs needed, where it breaks.

    Steps are those that `sip plan` predicts; the batch and the judge's GPUs grow with the policy's.
    """
    from sip_engine.accounting.hardware import load_hardware, load_judge
    from sip_engine.planning.plan import Request
    from sip_engine.planning.simulate.command import study
    from sip_engine.planning.simulate.scenario import FAILURES_PER_GPU_HOUR

    cfg = read_run_config(config, context.args)
    request = Request(
        load_hardware(gpu, gpus_per_node=gpus_per_node),
        nodes,
        judge=load_judge(judge) if judge else None,
        judge_gpus=judge_gpus,
    )
    changes = {
        "judge_shared": cfg.judge.backend == "local",
        "judge_latency_s": judge_latency if cfg.judge.backend == "server" else 0.0,
        "rate_limit": rate_limit,
        "failures_per_gpu_hour": FAILURES_PER_GPU_HOUR if failures is None else failures,
        "restart_s": restart,
        "straggler_spread": stragglers,
    }
    screen = _wide_console()
    save_every = cfg.checkpoint.every or 100
    for part in study(cfg, request, out, hours=hours, seed=seed, save_every=save_every, changes=changes):
        screen.print(part)
