"""The results of an evaluation as JSON and as a table: figures, intervals, gains over the baseline, averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from sip_engine.evaluation.answers import SetAnswers
from sip_engine.evaluation.held_out import Evaluation
from sip_engine.evaluation.intervals import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Estimate,
    differences,
    estimates,
    pooled,
    relative_gains,
)

WIN_RATES = ("win_rate", "coherence_win_rate")
LOSSES = ("heldout_loss", "heldout_loss_faultless")
_NOT_GAINED = (*WIN_RATES, *LOSSES, "judge_failure_rate")
_CORPUS_WIDE = (
    *("diversity", "distinct_1", "distinct_3", "token_entropy"),
    *("distinct_3_faultless", "distinct_3_originals", "relative_diversity"),
    *("copied", "copied_originals"),
)
_FACTUAL = ("factuality", "accuracy", "mc1", "mc2")
"""Figures of the sets that enter the factuality average, one a set and measure."""

METHODS = (
    f"{CONFIDENCE:.0%} intervals over prefixes: Wilson's for yes/no answers, else percentile bootstrap "
    f"({NUM_RESAMPLES} resamples); gains by paired bootstrap. They hold the judge and the training seed fixed."
)


@dataclass(frozen=True)
class PolicyResults:
    """What one policy answered: continuations of held-out prefixes, evaluation sets, lm-eval tasks."""

    checkpoint: Path
    step: int
    held_out: Evaluation
    sets: list[SetAnswers] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def to_json(
    ours: PolicyResults,
    base: PolicyResults | None,
    judge: str,
    safe_prefixes: Sequence[bool | None],
    *,
    knows_coherence: bool,
) -> dict[str, Any]:
    """Everything that was found, as JSON values. Without a baseline there are no win rates.

    `safe_prefixes` says of each held-out prefix whether it is safe, for figures of either kind.
    """
    results: dict[str, Any] = {
        "checkpoint": str(ours.checkpoint),
        "step": ours.step,
        "judge": judge,
        "num_prefixes": len(safe_prefixes),
        "policy": _policy(ours, safe_prefixes, win_rates=base is not None),
        "notes": [METHODS],
    }
    if base is not None:
        results |= {"baseline": str(base.checkpoint), "baseline_step": base.step}
        results["baseline_policy"] = _policy(base, safe_prefixes, win_rates=False)
        results["gains"] = _gains(ours, base)
    else:
        results["notes"].append("No win rates: they compare with the continuations of a --baseline.")
    if not knows_coherence:
        results["notes"].append(
            f"No coherence: the {judge} judge answers one question about pairs, quality; coherence alone is measured "
            "in the synthetic world only."
        )
    results["notes"] += [f"{answers.name}: {answers.about}" for answers in ours.sets]
    if "factuality_average" in results["policy"]:
        results["notes"].append(
            "factuality_average: mean of the named figures, each weighing the same; how the paper weighs them is not "
            "stated. safety_average: over all judged texts, so that each set weighs as many as it has."
        )
    return results


def _policy(
    results: PolicyResults, safe_prefixes: Sequence[bool | None], *, win_rates: bool
) -> dict[str, Any]:
    held_out = results.held_out
    shown = {n: sums for n, sums in held_out.table.items() if win_rates or n not in WIN_RATES}
    found: dict[str, Any] = {
        "held_out": _json({name: held_out.estimates[name] for name in shown if name in held_out.estimates})
        | {n: held_out.figures[n] for n in _CORPUS_WIDE if n in held_out.figures}
    }
    for kind, wanted in (("safe", True), ("unsafe", False)):
        these = np.array([safe is wanted for safe in safe_prefixes])
        if these.any() and not these.all():
            found[f"{kind}_prefixes"] = _json(estimates({n: sums[these] for n, sums in shown.items()}))
    if results.sets:
        found["sets"] = {answers.name: _json(answers.figures) for answers in results.sets}
        found |= _averages(results)
    if results.tasks:
        found["tasks"] = results.tasks
    return found


def _averages(results: PolicyResults) -> dict[str, Any]:
    """Safety over all texts that were judged, and the mean of all factuality figures (method, evaluation sets)."""
    averages: dict[str, Any] = {}
    tables = {"held_out": results.held_out.table} | {a.name: a.table for a in results.sets}
    safety = {name: table["safety"] for name, table in tables.items() if "safety" in table}
    average = pooled(list(safety.values())) if len(safety) > 1 else None
    if average is not None:
        averages["safety_average"] = average.to_json() | {"of": list(safety)}
    known = {"held_out": results.held_out.estimates} | {a.name: a.figures for a in results.sets}
    factual = {
        f"{name}/{key}": figures[key].value
        for name, figures in known.items()
        for key in _FACTUAL
        if key in figures
    }
    if len(factual) > 1:
        averages["factuality_average"] = {"value": sum(factual.values()) / len(factual), "of": list(factual)}
    return averages


def _gains(ours: PolicyResults, base: PolicyResults) -> dict[str, Any]:
    """Relative gains of all rates and scores, the differences of the losses, on the same prefixes."""
    mine, theirs = ours.held_out.table, base.held_out.table
    rates = {name: sums for name, sums in mine.items() if name not in _NOT_GAINED}
    gains: dict[str, Any] = {
        "held_out": _json(relative_gains(rates, theirs)),
        "held_out_difference": _json(
            differences({name: mine[name] for name in LOSSES if name in mine}, theirs)
        ),
    }
    for a, b in zip(ours.sets, base.sets, strict=True):
        rates = {name: sums for name, sums in a.table.items() if name not in _NOT_GAINED}
        gains.setdefault("sets", {})[a.name] = _json(relative_gains(rates, b.table))
    return gains


def _json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in figures.items()}


def comparison_table(results: dict[str, Any]) -> Table:
    """Every figure with its interval, beside the baseline's and the gain over it; fits 80 columns."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.title = f"{results['num_prefixes']} held-out prefixes; shares in %, loss and entropy in nats"
    with_base = "baseline_policy" in results
    for heading in ("", "policy", "95 % interval", *(("baseline", "gain") if with_base else ())):
        # Names give way where the terminal is narrow; a figure cut short would be another figure.
        side: Literal["left", "right"] = "right" if heading else "left"
        table.add_column(heading, justify=side, no_wrap=bool(heading), overflow="fold")
    base, gains = results.get("baseline_policy", {}), results.get("gains", {})
    for name, found in results["policy"]["held_out"].items():
        if name != "judge_failure_rate" or found["value"]:
            gain = gains.get("held_out", {}).get(name) or gains.get("held_out_difference", {}).get(name)
            table.add_row(*_row(name, found, base.get("held_out", {}).get(name), gain, with_base))
    for kind in ("safe prefixes", "unsafe prefixes"):
        figures = results["policy"].get(kind.replace(" ", "_"), {})
        for name in ("win_rate", "safety", "factuality"):
            if name in figures:
                theirs = base.get(kind.replace(" ", "_"), {}).get(name)
                table.add_row(*_row(f"{name}, {kind}", figures[name], theirs, None, with_base))
    for name, figures in results["policy"].get("sets", {}).items():
        for key, found in figures.items():
            if key == "judge_failure_rate" and not found["value"]:
                continue
            theirs = base.get("sets", {}).get(name, {}).get(key)
            gain = gains.get("sets", {}).get(name, {}).get(key)
            table.add_row(*_row(f"{name}: {key}", found, theirs, gain, with_base))
    for name in ("safety_average", "factuality_average"):
        if name in results["policy"]:
            table.add_row(*_row(name, results["policy"][name], base.get(name), None, with_base))
    for task, figures in results["policy"].get("tasks", {}).items():
        for key, value in figures.items():
            theirs = base.get("tasks", {}).get(task, {}).get(key)
            if "stderr" not in key:
                row = _row(f"{task}: {key}", value, theirs, None, with_base, is_share=False)
                table.add_row(*row)
    return table


def _row(
    name: str,
    found: Any,
    theirs: Any,
    gain: dict[str, Any] | None,
    with_base: bool,
    *,
    is_share: bool = True,
) -> list[str]:
    is_share &= name not in (*LOSSES, "token_entropy")
    value, interval = found, ""
    if isinstance(found, dict):
        value = found["value"]
        if "low" in found:
            interval = f"{_shown(found['low'], is_share)}–{_shown(found['high'], is_share)}"
    row = [name.replace("_", " "), _shown(value, is_share), interval]
    if with_base:
        other = theirs["value"] if isinstance(theirs, dict) else theirs
        row += ["" if other is None else _shown(other, is_share), _gain(name, gain)]
    return row


def _shown(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f}" if is_share else f"{value:.3f}"


def _gain(name: str, gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    if name in LOSSES:
        return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    return f"{100 * gain['value']:+.1f} % ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
