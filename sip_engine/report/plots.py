"""Which curves a report shows, in which figure, and how each figure is to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sip_engine.report.load import Curve, RunRecords
from sip_engine.report.svg import Line, draw_lines, draw_stack
from sip_engine.types import Kind

OBJECTIVES = ("quality", "safety", "factuality")
PARTS = ("data", "generate", "judge", "update")
SHARE = (-0.02, 1.02)
_RUN_COLORS = 6
_RUN_DASHES = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True)
class Panel:
    """One drawing and what it shows."""

    heading: str
    svg: Markup


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Plot:
    """A figure: panels that are read together, one legend, one sentence on how to read it."""

    title: str
    caption: str
    legend: tuple[Key, ...]
    panels: tuple[Panel, ...]


def all_plots(runs: Sequence[RunRecords]) -> list[Plot]:
    """The figures for which some run has data."""
    makers = (
        rewards,
        objectives,
        choices,
        evaluations,
        losses,
        diversity,
        preference_gain,
        drift,
        time_split,
    )
    return [plot for plot in (make(runs) for make in makers) if plot.panels]


def rewards(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Reward by candidate kind",
        "Read the gap between the lines: training works while rollouts rise towards originals and rewrites; "
        "the quality part is relative to the pool, so one kind can only gain it at the others' expense.",
        _kind_keys(runs, "reward"),
        _each_run(runs, "reward", lambda run: _by_kind(run, "reward")),
    )


def objectives(runs: Sequence[RunRecords]) -> Plot:
    panels = [
        panel
        for objective in OBJECTIVES
        for panel in _each_run(runs, objective, lambda run, o=objective: _by_kind(run, o), limits=SHARE)
    ]
    return Plot(
        "What the reward is made of",
        "Each objective's score before weighting, between 0 and 1; a reward that rises by one objective alone "
        "shows here as one panel climbing while the others stay flat.",
        _kind_keys(runs, *OBJECTIVES),
        tuple(panels),
    )


def choices(runs: Sequence[RunRecords]) -> Plot:
    panels = [
        panel
        for role in ("chosen", "rejected")
        for panel in _each_run(
            runs, role, lambda run, r=role: _by_kind(run, r) + _chance(run, r), scale="percent", limits=SHARE
        )
    ]
    keys = _kind_keys(runs, "chosen", "rejected")
    return Plot(
        "Chosen and rejected by kind",
        "Share of pairs in which each kind is the chosen (the paper's Figure 8) and the rejected side; dotted is the "
        "kind's share of the pool, where a judge that tosses coins would put it.",
        (*keys, Key("share of the pool", "muted", "dotted")) if keys else (),
        tuple(panels),
    )


def evaluations(runs: Sequence[RunRecords]) -> Plot:
    shown = (
        ("win_rate", "win rate against the first policy"),
        ("coherence", "coherence"),
        ("factuality", "factuality"),
        ("safety", "safety"),
    )
    panels = [
        panel
        for name, heading in shown
        for panel in _overlaid(runs, heading, f"eval/{name}", scale="percent", marked=True)
    ]
    return Plot(
        "Evaluation on held-out prefixes",
        "Greedy continuations of prefixes that are never trained on; at step 0 a run meets itself, so its win rate "
        "starts at 50 %, and all four should rise together.",
        _run_keys(runs),
        tuple(panels),
    )


def losses(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Losses",
        "The training loss is that of each run's own objective, so compare it within a run only; the held-out loss "
        "(next-token, nats a token of the suffix) may be compared between runs.",
        _run_keys(runs),
        (
            *_overlaid(runs, "training loss", "loss"),
            *_overlaid(runs, "held-out loss", "eval/heldout_loss", marked=True),
        ),
    )


def diversity(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Diversity of rollouts",
        "Share of distinct 2-grams and mean surprise of the sampled tokens: a slow fall is sharpening, a steep one "
        "while rewards rise is the policy settling on what pleases the judge.",
        _run_keys(runs),
        (
            *_overlaid(runs, "distinct 2-grams", "diversity/distinct_2"),
            *_overlaid(runs, "entropy, nats a token", "diversity/entropy"),
        ),
    )


def preference_gain(runs: Sequence[RunRecords]) -> Plot:
    def lines(run: RunRecords) -> list[Line]:
        roles = [role for role in ("chosen", "rejected") if f"dpo/{role}_gain" in run.curves]
        return [Line(role, role, run.curves[f"dpo/{role}_gain"]) for role in roles]

    panels = _each_run(runs, "gain over the reference, nats a suffix", lines)
    keys = (Key("chosen", "chosen"), Key("rejected", "rejected")) if panels else ()
    return Plot(
        "Log-prob gain of chosen and rejected",
        "How much likelier the policy finds each side than the reference does: the lines should part, and both "
        "falling below zero together means that it only unlearns.",
        keys,
        panels,
    )


def drift(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Sampler against trainer",
        "Absolute difference between the log-probs that the sampler and the trainer give the same tokens, on a log "
        "scale with zero drawn at the bottom; it should stay flat, whatever its level.",
        _run_keys(runs),
        (
            *_overlaid(runs, "mean, nats a token", "drift/mean", scale="log"),
            *_overlaid(runs, "largest, nats", "drift/max", scale="log"),
        ),
    )


def time_split(runs: Sequence[RunRecords]) -> Plot:
    panels = []
    for run in runs:
        parts = [part for part in PARTS if f"seconds/{part}" in run.curves]
        if parts:
            heading = _heading(runs, run, "seconds a step")
            steps = np.unique(np.concatenate([run.curves[f"seconds/{part}"].steps for part in parts]))
            lines = [
                Line(part, f"part-{part}", _filled(run.curves[f"seconds/{part}"], steps)) for part in parts
            ]
            panels.append(Panel(heading, draw_stack(lines, f"{heading}.")))
    shown = [part for part in PARTS if any(f"seconds/{part}" in run.curves for run in runs)]
    return Plot(
        "Where the time goes",
        "Seconds of each step spent on its parts, stacked: the upper edge is the cost of a step, the widest band "
        "is what to make faster.",
        tuple(Key(part, f"part-{part}") for part in shown),
        tuple(panels),
    )


def _filled(curve: Curve, steps: np.ndarray) -> Curve:
    """The curve at all `steps`, 0 where it has no value."""
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, curve.steps)] = curve.values
    return Curve(steps, values)


def _by_kind(run: RunRecords, metric: str) -> list[Line]:
    curves = {kind: run.curves.get(f"{metric}/{kind}") for kind in Kind}
    return [Line(kind, kind, curve) for kind, curve in curves.items() if curve is not None]


def _chance(run: RunRecords, role: str) -> list[Line]:
    """Each kind's share of the pool as configured; a record of step s was made with the stage in force at s - 1."""
    stages = run.setting("candidates", [])
    lines = []
    for kind in Kind:
        curve = run.curves.get(f"{role}/{kind}")
        if curve is None or not stages:
            continue
        shares = np.zeros(len(curve))
        for stage in stages:
            size = stage["original"] + stage["rewrite"] + stage["rollouts"]
            own = stage["rollouts" if kind is Kind.ROLLOUT else kind]
            shares[curve.steps > stage["from_step"]] = own / size if size else 0.0
        lines.append(
            Line(f"{kind}, share of the pool", kind, Curve(curve.steps, shares), "dotted", plain=True)
        )
    return lines


def _each_run(
    runs: Sequence[RunRecords],
    what: str,
    lines_of: Callable[[RunRecords], list[Line]],
    *,
    scale: str = "linear",
    limits: tuple[float, float] | None = None,
) -> tuple[Panel, ...]:
    """One panel a run that has lines, all with the same limits."""
    drawn = [(run, lines) for run in runs if (lines := lines_of(run))]
    if drawn and limits is None:
        limits = _common_limits([line.curve for _, lines in drawn for line in lines])
    headings = [_heading(runs, run, what) for run, _ in drawn]
    return tuple(
        Panel(heading, draw_lines(lines, f"{heading}.", scale=scale, limits=limits))
        for heading, (_, lines) in zip(headings, drawn, strict=True)
    )


def _overlaid(
    runs: Sequence[RunRecords], heading: str, metric: str, *, scale: str = "linear", marked: bool = False
) -> tuple[Panel, ...]:
    """One panel with the curve of each run that has the metric; none if no run has it."""
    lines = [
        Line(run.name, _run_color(n), run.curves[metric], _run_dash(n), plain=marked, marked=marked)
        for n, run in enumerate(runs)
        if metric in run.curves
    ]
    return (Panel(heading, draw_lines(lines, f"{heading}.", scale=scale)),) if lines else ()


def _common_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    values = np.concatenate([curve.thinned().values for curve in curves])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _heading(runs: Sequence[RunRecords], run: RunRecords, what: str) -> str:
    return f"{run.name}: {what}" if len(runs) > 1 else what


def _run_color(number: int) -> str:
    return f"run-{number % _RUN_COLORS + 1}"


def _run_dash(number: int) -> str:
    return _RUN_DASHES[number % len(_RUN_DASHES)]


def _run_keys(runs: Sequence[RunRecords]) -> tuple[Key, ...]:
    return (
        tuple(Key(run.name, _run_color(n), _run_dash(n)) for n, run in enumerate(runs))
        if len(runs) > 1
        else ()
    )


def _kind_keys(runs: Sequence[RunRecords], *metrics: str) -> tuple[Key, ...]:
    present = {
        kind for kind in Kind for run in runs for metric in metrics if f"{metric}/{kind}" in run.curves
    }
    return tuple(Key(kind, kind) for kind in Kind if kind in present)
