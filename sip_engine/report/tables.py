"""The tables of a report: the comparison beside the paper's gains, and what each run is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sip_engine.config.objective import LearnsFrom, recorded_facts
from sip_engine.monitoring.load import RunRecords

UNKNOWN_STATE = "going on or stopped"
STAGES = ("base", "standard", "self_improving")


@dataclass(frozen=True)
class Figure:
    """A figure of the comparison; `paper` holds base, next-token baseline and self-improving in percent."""

    key: str
    label: str
    meaning: str
    paper: tuple[float, float, float] | None = None
    """arXiv 2601.21343, each objective's own run."""
    is_loss: bool = False
    """In nats a token, lower is better; else a share."""


FIGURES = (
    Figure("win_rate", "quality win rate", "pairwise against the base's continuations", (50.0, 49.0, 86.3)),
    Figure("coherence", "coherence", "share of the text that is sound and to the point"),
    Figure("factuality", "factuality", "true 1, unverifiable ½, false 0", (42.3, 44.0, 57.6)),
    Figure("safety", "safety", "share of continuations without abuse", (76.9, 75.5, 91.1)),
    Figure("heldout_loss", "held-out loss", "next-token, nats a token; lower is better", is_loss=True),
    Figure(
        "heldout_loss_faultless", "loss, faultless", "the same on documents without a fault", is_loss=True
    ),
    Figure("relative_diversity", "diversity", "distinct 3-grams, of those of faultless originals"),
)


@dataclass(frozen=True)
class ComparisonRow:
    """One figure over the three policies, as text; `best` is the number of the best of them."""

    label: str
    meaning: str
    values: tuple[str, ...]
    best: int | None
    over_base: str
    over_standard: str
    paper: str
    paper_over_base: str
    paper_over_standard: str


@dataclass(frozen=True)
class Comparison:
    """The summary as a table, and what must be said with it."""

    notes: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    times: tuple[str, ...]
    total_time: str


def comparison(summary: dict[str, Any]) -> Comparison:
    """The table of a summary as `quickstart.summarise` builds it; figures that it lacks are left out."""
    rows = [_row(figure, summary) for figure in FIGURES]
    seconds = summary.get("seconds", {})
    if not isinstance(seconds, dict):
        seconds = {"total": seconds}
    return Comparison(
        notes=tuple(summary.get("notes", ())),
        rows=tuple(row for row in rows if any(value != "–" for value in row.values)),
        times=tuple(_duration(seconds.get(stage)) for stage in STAGES),
        total_time=_duration(seconds.get("total")),
    )


def _row(figure: Figure, summary: dict[str, Any]) -> ComparisonRow:
    values = [_finite(summary.get(stage, {}).get(figure.key)) for stage in STAGES]
    is_loss = figure.is_loss
    known = [value for value in values if value is not None]
    best = values.index(min(known) if is_loss else max(known)) if len(set(known)) > 1 else None
    gain = _difference if is_loss else _relative_gain
    base, standard, ours = values
    paper = figure.paper
    return ComparisonRow(
        label=figure.label,
        meaning=figure.meaning,
        values=tuple(_value(value, is_loss) for value in values),
        best=best,
        over_base=gain(ours, base),
        over_standard=gain(ours, standard),
        paper=f"{paper[0]} → {paper[2]} %" if paper else "–",
        paper_over_base=_relative_gain(paper[2], paper[0]) if paper else "–",
        paper_over_standard=_relative_gain(paper[2], paper[1]) if paper else "–",
    )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _value(value: float | None, is_loss: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if is_loss else f"{100 * value:.1f}\u00a0%"


def _relative_gain(ours: float | None, other: float | None) -> str:
    return "–" if ours is None or not other else _signed(f"{100 * (ours / other - 1):+.1f}\u00a0%")


def _difference(ours: float | None, other: float | None) -> str:
    return "–" if ours is None or other is None else _signed(f"{ours - other:+.3f} nats")


def _signed(text: str) -> str:
    return text.replace("-", "−", 1)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class RunRow:
    """What a run is and how far it has come, as text."""

    name: str
    objective: str
    candidates: str
    judge: str
    progress: str
    elapsed: str
    newest: str
    ends: tuple[tuple[str, str, str], ...]
    """(figure, first, last) of each evaluation figure that the run recorded."""


def overview(runs: Sequence[RunRecords]) -> list[RunRow]:
    """One row a run."""
    return [_run_row(run) for run in runs]


def _run_row(run: RunRecords) -> RunRow:
    elapsed = run.curves.get("elapsed")
    objective = str(run.setting("objective.kind", "–"))
    facts = recorded_facts(run.setting("objective", {}))
    pools = facts is None or facts.learns_from is LearnsFrom.POOLS
    judged = facts is not None and facts.needs_judge
    ends = []
    for figure in FIGURES:
        curve = run.curves.get(f"eval/{figure.key}")
        if curve is not None:
            is_loss = figure.is_loss
            first, last = (_value(float(curve.values[at]), is_loss) for at in (0, -1))
            ends.append((figure.label, first, last))
    return RunRow(
        name=run.name,
        objective=objective,
        candidates=_candidates(run) if pools and objective != "–" else "–",
        judge=str(run.setting("judge.backend", "–")) if judged else "–",
        progress=_progress(run),
        elapsed=_duration(float(elapsed.values[-1])) if elapsed is not None else "–",
        newest=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.modified)),
        ends=tuple(ends),
    )


def _progress(run: RunRecords) -> str:
    steps = [curve.steps[-1] for curve in run.curves.values()]
    done, planned = (int(max(steps)) if steps else 0), run.setting("steps")
    if not isinstance(planned, int):
        return f"{done:,} steps"
    return (
        f"{done:,} steps"
        if done >= planned
        else f"{done:,} of {planned:,} steps ({run.state or UNKNOWN_STATE})"
    )


def _candidates(run: RunRecords) -> str:
    """The kinds of each stage, such as `original + rewrite + 8 rollouts`."""
    stages = []
    for stage in run.setting("candidates", []):
        kinds = [kind for kind in ("original", "rewrite") if stage.get(kind)]
        rollouts = stage.get("rollouts", 0)
        kinds += [f"{rollouts} rollout{'s' * (rollouts != 1)}"] if rollouts else []
        begin = f"from step {stage['from_step']}: " if stage.get("from_step") else ""
        stages.append(begin + " + ".join(kinds))
    return "; ".join(stages) or "–"
