"""Which curves a report shows, in which figure, and how each figure is to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sip_engine.config.objective import recorded_facts
from sip_engine.monitoring.curves import Curve
from sip_engine.monitoring.load import RunRecords
from sip_engine.report.svg import Line, draw_lines, draw_stack
from sip_engine.types import Kind

OBJECTIVES = ("quality", "safety", "factuality")
PARTS = ("data", "generate", "judge", "update")
SHARE = (-0.02, 1.02)
_KIND_DASHES = {Kind.ORIGINAL: "dashed", Kind.REWRITE: "dashdot", Kind.ROLLOUT: "solid"}
_ROLE_DASHES = {"chosen": "solid", "rejected": "dashed"}
_RUN_COLORS = 6
_RUN_DASHES = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True)
class Panel:
    """One drawing and what it shows."""

    heading: str
    svg: Markup


@dataclass(frozen=True)
class Key:
    """One entry of a legend; `dash` is that of the line, or `area`."""

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
        choices,
        evaluations,
        diversity,
        losses,
        preferences,
        drift,
        time_split,
        health,
    )
    return [plot for plot in (make(runs) for make in makers) if plot.panels]


def rewards(runs: Sequence[RunRecords]) -> Plot:
    panels = _each_run(runs, "total reward", lambda run: _by_kind(run, "reward"))
    for objective in OBJECTIVES:
        panels += _each_run(
            runs, f"{objective}, 0 to 1", lambda run, o=objective: _by_kind(run, o), limits=SHARE
        )
    return Plot(
        "Reward by candidate kind",
        "The total is the weighted sum of the objectives beside it. Training works while rollouts rise towards "
        "originals and rewrites; quality is relative to the pool, so one kind gains it only at the others' expense, "
        "and a total that rises by one objective alone shows as one panel climbing while the others stay flat.",
        _kind_keys(runs, "reward", *OBJECTIVES),
        panels,
    )


def choices(runs: Sequence[RunRecords]) -> Plot:
    panels = [
        panel
        for role in ("chosen", "rejected")
        for panel in _each_run(
            runs,
            f"{role}, share of pairs",
            lambda run, r=role: _by_kind(run, r) + _chance(run, r),
            scale="percent",
            limits=SHARE,
        )
    ]
    keys = _kind_keys(runs, "chosen", "rejected")
    return Plot(
        "Chosen and rejected by kind",
        "Share of pairs in which each kind is the chosen (the paper's Figure 8) and the rejected side. Dotted is the "
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
        ("true_claims", "factuality as the world measures it"),
        ("measured_quality", "quality as the world measures it"),
    )
    panels = [
        panel
        for name, heading in shown
        for panel in _overlaid(runs, heading, f"eval/{name}", scale="percent", marked=True)
    ]
    return Plot(
        "Evaluation on held-out prefixes",
        "Greedy continuations of prefixes that are never trained on. At step 0 a run meets itself, so its win rate "
        "starts at 50 %, and all should rise together.",
        _run_keys(runs, *(f"eval/{name}" for name, _ in shown)),
        tuple(panels),
    )


def losses(runs: Sequence[RunRecords]) -> Plot:
    def training(run: RunRecords) -> list[Line]:
        n = runs.index(run)
        return (
            [Line("loss", _run_color(n), run.curves["loss"], _run_dash(runs, n))]
            if "loss" in run.curves
            else []
        )

    panels = [
        panel
        for run in runs
        for panel in _each_run([run], f"{_heading(runs, run, 'training loss')}, {_loss_unit(run)}", training)
    ]
    return Plot(
        "Losses",
        "The training loss is that of each run's own objective, so compare it within a run only; the held-out loss "
        "(next tokens of the suffix) may be compared between runs.",
        _run_keys(runs, "loss", "eval/heldout_loss"),
        (*panels, *_overlaid(runs, "held-out loss, nats a token", "eval/heldout_loss", marked=True)),
    )


def _loss_unit(run: RunRecords) -> str:
    facts = recorded_facts(run.setting("objective", {}))
    return facts.loss_unit if facts is not None else "in its own unit"


def diversity(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Diversity",
        "Share of distinct 2-grams among the rollouts of a prefix and among all greedy continuations, and mean "
        "surprise of the sampled tokens: a slow fall is sharpening, a steep one while rewards rise is the policy "
        "settling on what pleases the judge.",
        _run_keys(runs, "diversity/distinct_2", "diversity/entropy", "eval/diversity"),
        (
            *_overlaid(
                runs, "distinct 2-grams of rollouts, share of all", "diversity/distinct_2", scale="percent"
            ),
            *_overlaid(runs, "entropy of rollouts, nats a token", "diversity/entropy"),
            *_overlaid(
                runs,
                "distinct 2-grams of greedy continuations, share of all",
                "eval/diversity",
                scale="percent",
                marked=True,
            ),
        ),
    )


def preferences(runs: Sequence[RunRecords]) -> Plot:
    """What DPO does to the log-probs of the two sides."""
    panels: tuple[Panel, ...] = ()
    for what, suffix in (("log-prob", "logprob"), ("gain over the reference", "gain")):
        for run in runs:
            unit = "nats a token" if run.setting("objective.length_normalised") else "nats a suffix"
            heading = f"{_heading(runs, run, what)}, {unit}"
            panels += _each_run([run], heading, lambda run, s=suffix: _by_role(run, s))
    singles = (
        *_overlaid(
            runs, "implicit margin β·(gain of chosen − gain of rejected), nats", "dpo/implicit_margin"
        ),
        *_overlaid(
            runs,
            "pairs whose gains are in the right order",
            "dpo/implicit_accuracy",
            scale="percent",
            limits=SHARE,
        ),
    )
    roles = tuple(Key(role, role, dash) for role, dash in _ROLE_DASHES.items())
    paired = any(f"dpo/{role}_gain" in run.curves for role in _ROLE_DASHES for run in runs)
    return Plot(
        "Inside the preference update",
        "Log-probs of chosen and rejected under the policy, and their gain over the reference: the gains should "
        "part, and both falling below zero together means that the policy only unlearns.",
        (*(roles if paired else ()), *_run_keys(runs, "dpo/implicit_margin")),
        (*panels, *singles),
    )


def drift(runs: Sequence[RunRecords]) -> Plot:
    return Plot(
        "Sampler against trainer",
        "Absolute difference between the log-probs that the sampler and the trainer give the same tokens, on a log "
        "scale with zero drawn at the bottom; it should stay flat, whatever its level.",
        _run_keys(runs, "drift/mean", "drift/max"),
        (
            *_overlaid(runs, "mean difference, nats a token", "drift/mean", scale="log"),
            *_overlaid(runs, "largest difference, nats", "drift/max", scale="log"),
        ),
    )


def time_split(runs: Sequence[RunRecords]) -> Plot:
    panels = []
    for run in runs:
        curves = {part: run.curves[f"seconds/{part}"] for part in PARTS if f"seconds/{part}" in run.curves}
        if curves:
            heading = f"{_heading(runs, run, 'seconds a step')} ({_shares(curves)})"
            steps = np.unique(np.concatenate([curve.steps for curve in curves.values()]))
            lines = [Line(part, f"part-{part}", _filled(curve, steps)) for part, curve in curves.items()]
            panels.append(Panel(heading, draw_stack(lines, f"{heading}.")))
    shown = [part for part in PARTS if any(f"seconds/{part}" in run.curves for run in runs)]
    return Plot(
        "Where the time goes",
        "Seconds of each step spent on its parts, stacked: the upper edge is the cost of a step, the widest band is "
        "what to make faster. Evaluation and checkpoints come on top.",
        tuple(Key(part, f"part-{part}", "area") for part in shown),
        tuple(panels),
    )


def health(runs: Sequence[RunRecords]) -> Plot:
    shown = (
        ("grad_norm", "gradient norm before clipping", "linear"),
        ("lr", "learning rate", "linear"),
        ("pairs/margin", "reward of chosen − reward of rejected", "linear"),
        ("pairs/dropped", "prefixes without a pair", "percent"),
        ("groups/dropped", "prompts whose replies earn the same", "percent"),
        ("judge/failure_rate", "judgments that failed", "percent"),
        ("rewriter/failure_rate", "rewrites that failed", "percent"),
    )
    panels = [
        panel
        for name, what, scale in shown
        for panel in _overlaid(runs, what, name, scale=scale, plain=name == "lr")
    ]
    return Plot(
        "Health of the runs" if len(runs) > 1 else "Health of the run",
        "A gradient norm that jumps, many prefixes without a pair, prompts whose replies earn the same or many "
        "failed judgments weaken every other curve.",
        _run_keys(runs, *(name for name, _, _ in shown)),
        tuple(panels),
    )


def _shares(curves: dict[str, Curve]) -> str:
    """Each part's share of the time of all steps, the largest first."""
    totals = {part: float(curve.values.sum()) for part, curve in curves.items()}
    whole = sum(totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {100 * total / whole:.0f}\u00a0%" for part, total in ordered)


def _filled(curve: Curve, steps: np.ndarray) -> Curve:
    """The curve at all `steps`, 0 where it has no value."""
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, curve.steps)] = curve.values
    return Curve(steps, values)


def _by_kind(run: RunRecords, metric: str) -> list[Line]:
    curves = {kind: run.curves.get(f"{metric}/{kind}") for kind in Kind}
    return [
        Line(kind, kind, curve, _KIND_DASHES[kind]) for kind, curve in curves.items() if curve is not None
    ]


def _by_role(run: RunRecords, what: str) -> list[Line]:
    curves = {role: run.curves.get(f"dpo/{role}_{what}") for role in _ROLE_DASHES}
    return [Line(role, role, c, _ROLE_DASHES[role]) for role, c in curves.items() if c is not None]


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
            numbers = {key: int(stage.get(key, 0)) for key in ("original", "rewrite", "rollouts")}
            own, size = numbers["rollouts" if kind is Kind.ROLLOUT else kind], sum(numbers.values())
            shares[curve.steps > stage.get("from_step", 0)] = own / size if size else 0.0
        lines.append(Line(f"{kind} in the pool", kind, Curve(curve.steps, shares), "dotted", plain=True))
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
    runs: Sequence[RunRecords],
    heading: str,
    metric: str,
    *,
    scale: str = "linear",
    marked: bool = False,
    plain: bool = False,
    limits: tuple[float, float] | None = None,
) -> tuple[Panel, ...]:
    """One panel with the curve of each run that has the metric.

    Runs that began from different checkpoints have different step 0s: each beginning gets a panel.
    """
    groups: dict[str, list[tuple[str, Line]]] = {}
    for n, run in enumerate(runs):
        if metric in run.curves:
            line = Line(
                run.name,
                _run_color(n),
                run.curves[metric],
                _run_dash(runs, n),
                plain=plain or marked,
                marked=marked,
            )
            groups.setdefault(str(run.setting("init", "")), []).append((run.name, line))
    panels = []
    for members in groups.values():
        names = ", ".join(name for name, _ in members)
        full = f"{names}: {heading}" if len(runs) > 1 and len(groups) > 1 else heading
        drawing = draw_lines([line for _, line in members], f"{full}.", scale=scale, limits=limits)
        panels.append(Panel(full, drawing))
    return tuple(panels)


def _common_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    values = np.concatenate([curve.thinned().values for curve in curves])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _heading(runs: Sequence[RunRecords], run: RunRecords, what: str) -> str:
    return f"{run.name}: {what}" if len(runs) > 1 else what


def _run_color(number: int) -> str:
    return f"run-{number % _RUN_COLORS + 1}"


def _run_dash(runs: Sequence[RunRecords], number: int) -> str:
    """The last run, usually the one that matters, is solid."""
    return _RUN_DASHES[(len(runs) - 1 - number) % len(_RUN_DASHES)]


def _run_keys(runs: Sequence[RunRecords], *metrics: str) -> tuple[Key, ...]:
    """The runs that have any of the metrics; none where there is but one run to speak of."""
    return tuple(
        Key(run.name, _run_color(n), _run_dash(runs, n))
        for n, run in enumerate(runs)
        if len(runs) > 1 and any(metric in run.curves for metric in metrics)
    )


def _kind_keys(runs: Sequence[RunRecords], *metrics: str) -> tuple[Key, ...]:
    present = {
        kind for kind in Kind for run in runs for metric in metrics if f"{metric}/{kind}" in run.curves
    }
    return tuple(Key(kind, kind, _KIND_DASHES[kind]) for kind in Kind if kind in present)
