"""A plan on one screen; every figure of it is called a prediction."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sip_engine.accounting.hardware import Hardware
from sip_engine.accounting.memory import MemoryInTurns
from sip_engine.planning.plan import Plan
from sip_engine.planning.sweep import Proposal


def plan_screen(plan: Plan, hardware: Hardware, title: str) -> RenderableType:
    """Memory by part, time by phase, cost beside standard pretraining, and what to change if it does not fit."""
    rates = (
        f"measured: {', '.join(hardware.measured)}" if hardware.measured else "none of them measured by us"
    )
    layout = " ".join(f"{name}={value}" for name, value in plan.layout.items())
    head = Text(
        f"{title} on {plan.gpus} x {plan.gpu}"
        + (f" and {plan.judge_gpus} for the judge" if plan.judge_gpus else "")
        + f": a prediction, not a measurement (rates of rates.toml and gpus.toml; {rates})\n{layout}"
    )
    rows = Table.grid(padding=(0, 4))
    rows.add_row(memory_table(plan), phase_table(plan))
    lines = [
        f"step {_seconds(plan.seconds)}, {plan.tokens_per_second:,.0f} tokens/s written and trained on, "
        f"model FLOPs utilisation {plan.mfu:.1%}, {plan.judge_calls:,} judge calls",
        f"waves of {plan.wave.sequences} sequences, {plan.wave.waves} a step; the memory left takes "
        f"{plan.largest_wave} of the longest prefixes",
    ]
    if plan.fits:
        lines.append("it fits")
    else:
        lines.append("[bold]it does not fit[/]; what would help, most first:")
        lines += [f"  {line}" for line in plan.advice]
    return Group(head, rows, cost_table(plan), *[Text.from_markup(line) for line in lines])


def memory_table(plan: Plan) -> Table:
    """GiB of the fullest GPU, by part."""
    table = Table(title="memory of the fullest GPU, GiB", title_justify="left", box=None)
    table.add_column("part")
    table.add_column("", justify="right")
    for name, size in vars(plan.memory).items():
        if size:
            table.add_row({"kv": "KV pages"}.get(name, name.replace("_", " ")), f"{size / 2**30:.2f}")
    table.add_row(
        "most at once" if isinstance(plan.memory, MemoryInTurns) else "sum",
        f"{plan.memory.total / 2**30:.2f}",
        style="bold",
    )
    table.add_row("there are", f"{plan.capacity / 2**30:.2f}")
    return table


def phase_table(plan: Plan) -> Table:
    """Seconds of a step by phase, and what bounds each."""
    table = Table(title="a step, seconds", title_justify="left", box=None)
    for name in ("phase", "seconds", "share", "bound by", "TFLOP a GPU", "GB sent"):
        table.add_column(name, justify="left" if name in ("phase", "bound by") else "right")
    for phase in plan.phases:
        table.add_row(
            phase.name,
            f"{phase.seconds:.3f}",
            f"{phase.seconds / plan.seconds:.0%}",
            phase.bound,
            f"{phase.flops / 1e12:.1f}",
            f"{phase.wire_bytes / 1e9:.2f}",
        )
    return table


def cost_table(plan: Plan) -> Table:
    """A step beside one of next-token training on the same documents."""
    table = Table(title="cost of a step", title_justify="left", box=None)
    for name in ("", "self-improving", "standard", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    ours, theirs = plan.step, plan.standard
    table.add_row(
        "seconds", f"{ours.seconds:.2f}", f"{theirs.seconds:.2f}", _ratio(ours.seconds, theirs.seconds)
    )
    table.add_row(
        "memory, GiB a GPU",
        f"{ours.peak_gib:.1f}",
        f"{theirs.peak_gib:.1f}",
        _ratio(ours.peak_gib, theirs.peak_gib),
    )
    table.add_row(
        "energy at most, kJ",
        f"{ours.kilojoules:.0f}",
        f"{theirs.kilojoules:.0f}",
        _ratio(ours.kilojoules, theirs.kilojoules),
    )
    if ours.dollars is not None and theirs.dollars is not None:
        table.add_row(
            "dollars", f"{ours.dollars:.3f}", f"{theirs.dollars:.3f}", _ratio(ours.dollars, theirs.dollars)
        )
    total = f"{plan.total_days:.2f} days"
    if plan.total_dollars is not None:
        total += f", ${plan.total_dollars:,.0f}"
    table.add_row("the whole run", total, "", "")
    return table


def sweep_screen(proposals: Sequence[Proposal]) -> Table:
    """The proposed layouts, best first, each with its reason."""
    table = Table(title="layouts, best first (predictions)", title_justify="left", box=None)
    columns = ("tensor", "pipeline", "data", "recompute", "micro_batch_tokens", "kv_dtype", "kv_memory_mb")
    for name in (*columns, "seconds", "GiB", "why"):
        table.add_column(name, overflow="fold")
    for proposal in proposals:
        plan = proposal.plan
        table.add_row(
            *(str(plan.layout[name]) for name in columns),
            f"{plan.seconds:.2f}",
            f"{plan.memory.total / 2**30:.1f}",
            proposal.reason,
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 120 else f"{value / 60:.1f} min"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.1f}x" if theirs else "-"
