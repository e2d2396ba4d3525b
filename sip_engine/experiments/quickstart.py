"""`sip quickstart`: base, standard and self-improving pretraining in a synthetic world, compared in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from sip_engine.config.files import shipped_configs
from sip_engine.config.parse import parse_config, read_toml
from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import start_alone
from sip_engine.experiments.scale import check_scale, shortened
from sip_engine.monitoring.records import METRICS, read_records
from sip_engine.monitoring.supervision import supervised
from sip_engine.train import train
from sip_engine.utils.files import write_json
from sip_engine.utils.progress import console

STAGES = ("base", "standard", "self_improving")
NOTE = "The world's own rules both judged the candidates and measured the results here."
ABOUT_ROWS = (
    "faultless: the loss on documents without a fault alone. diversity: distinct 3-grams of continuations, as a "
    "share of those of faultless documents' own suffixes."
)
ABOUT_PAPER = (
    "paper: win rate, and gains over base, of its 1.4 B model's quality, factuality and safety runs."
)
NAMES = {
    "win_rate": "win rate",
    "coherence": "coherence",
    "factuality": "factuality",
    "safety": "safety",
    "heldout_loss": "loss, nats",
    "heldout_loss_faultless": "faultless",
    "relative_diversity": "diversity",
}
LOSSES = ("heldout_loss", "heldout_loss_faultless")
PAPER = {"win_rate": "86.3 %", "factuality": "+36.2 %", "safety": "+18.5 %"}
"""arXiv 2601.21343: quality, factuality and safety run, each against its own base."""

_LEAST = {"steps": 2, "optimizer": {"warmup_steps": 2}, "eval": {"num_prefixes": 8}}


def quickstart(out: Path, scale: float = 1.0) -> dict[str, Any]:
    """Run all stages into `out`, resuming what is there; print the table, write report and summary.

    `scale` shortens every stage; results below 1 are a smoke test. Returns the summary.

    Raises:
        ConfigError: scale is not in (0, 1].
    """
    check_scale(scale)
    mesh = start_alone()
    for stage in STAGES:
        cfg = stage_config(stage, out, scale)
        with supervised(cfg):
            train(cfg, mesh)
    summary = summarise(out)
    if mesh.is_main:
        write_json(out / "summary.json", summary)
        # Needs matplotlib, which the GPU benchmark runs the stages without.
        from sip_engine.report.html import write_report

        report = write_report(
            [out / stage for stage in STAGES], out / "report.html", title="Quickstart", summary=summary
        )
        console.print(comparison_table(summary))
        console.print(f"{NOTE}\n{ABOUT_ROWS}\n{ABOUT_PAPER}", soft_wrap=True)
        if scale < 1:
            console.print(f"Shortened to {scale:g} of its steps: a smoke test.")
        console.print(f"report  {report}\nsummary {out / 'summary.json'}", soft_wrap=True)
    return summary


def stage_config(stage: str, out: Path, scale: float) -> RunConfig:
    """A stage's config from configs/quickstart, moved to `out` and shortened."""
    path = shipped_configs() / "quickstart" / f"{stage}.toml"
    values = shortened(read_toml(path), scale, _LEAST)
    values["out"] = out / stage
    values["data"]["cache"] = out / "cache"
    if "init" in values:
        values["init"] = out / "base"
    return parse_config(values, str(path))


def summarise(out: Path) -> dict[str, Any]:
    """The figures of base (the self-improving run's evaluation before its first update) and of both ends.

    `seconds` is each stage's wall time over all its restarts.
    """
    seconds = {stage: list(read_records(out / stage / METRICS))[-1]["elapsed"] for stage in STAGES}
    standard, improved = (_evaluations(out / stage) for stage in STAGES[1:])
    rows = {"base": improved[0], "standard": standard[-1], "self_improving": improved[-1]}
    return {
        **{name: {key: figures[f"eval/{key}"] for key in NAMES} for name, figures in rows.items()},
        "seconds": {**seconds, "total": sum(seconds.values())},
        "notes": [NOTE],
    }


def comparison_table(summary: dict[str, Any]) -> Table:
    """Base, standard and self-improving, with gains beside the paper's; fits 80 columns."""
    table = Table(box=SIMPLE, title="Greedy continuations of held-out prefixes", pad_edge=False)
    headings = ("", "base", "standard", "self-impr.", "over base", "over std.", "paper")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for key, name in NAMES.items():
        base, standard, ours = (summary[row][key] for row in STAGES)
        if key in LOSSES:
            shown = [f"{value:.3f}" for value in (base, standard, ours)]
            gains = [f"{ours - other:+.3f}" for other in (base, standard)]
        else:
            shown = [f"{100 * value:.1f} %" for value in (base, standard, ours)]
            gains = [_gain(ours, other) for other in (base, standard)]
        table.add_row(name, *shown, *gains, PAPER.get(key, ""))
    times = [f"{summary['seconds'].get(stage, 0.0):.0f} s" for stage in STAGES]
    table.add_row("wall time", *times, "", "", "")
    return table


def _gain(ours: float, other: float) -> str:
    return f"{100 * (ours / other - 1):+.1f} %" if other else "n/a"


def _evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_records(run / METRICS) if "eval/heldout_loss" in row]
