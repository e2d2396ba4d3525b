"""Figures of all arms over seeds: values with intervals, differences between arms, and what became of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sip_engine.evaluation.intervals import Estimate, differences, estimates
from sip_engine.experiments.real.measures import HIGHER_IS_BETTER, Measured
from sip_engine.experiments.real.plan import SELF_IMPROVING, STANDARD
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json, write_json

BASE = "base"
TARGET_WIN_RATE = 0.65
"""Over base, by the judge; with no independent measure worse than next-token training's."""
_OF_THE_JUDGE = "win_rate"
BETTER, NO_WORSE, WORSE = "better", "no worse", "worse"


@dataclass(frozen=True)
class Figure:
    """One figure of an experiment: each arm's over all seeds, and ours against next-token training."""

    name: str
    arms: dict[str, Estimate | float]
    """Arm -> value; a plain number where there is no interval."""
    by_seed: dict[str, list[float]]
    gain: Estimate | float
    """Self-improving less standard, prefix by prefix."""
    verdict: str
    """better, no worse (the difference may be 0) or worse, than standard."""


def save_measured(path: Path, measured: Measured) -> None:
    """Write one policy's figures, whole or not at all."""
    table = {name: rows.tolist() for name, rows in measured.table.items()}
    write_json(path, {**asdict(measured), "table": table})


def read_measured(path: Path) -> Measured:
    """What `save_measured` wrote. Raises DataError."""
    found = read_json(path)
    try:
        table = {name: np.array(rows, np.float64) for name, rows in found["table"].items()}
        return Measured([str(text) for text in found["continuations"]], table, float(found["distinct_3"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not what `sip real` writes ({error}); remove it to measure anew") from None


def read_numbers(path: Path, missing: Mapping[str, float]) -> dict[str, Any]:
    """A JSON object, with those of `missing` that it lacks, whose values must be numbers. Raises DataError."""
    found = read_json(path)
    if isinstance(found, dict):
        found = {**missing, **found}
        if all(isinstance(found[name], int | float) for name in missing):
            return found
    raise DataError(f"{path}: not what `sip real` writes; remove it, or choose another --out")


def read_rows(path: Path, *names: str) -> list[dict[str, Any]]:
    """A JSON list of objects that have all of `names`. Raises DataError."""
    found = read_json(path)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and set(names) <= set(one) for one in found
    ):
        raise DataError(f"{path}: not what `sip real` writes; remove it to make it anew")
    return found


def figures_of(base: Measured, arms: Mapping[str, Sequence[Measured]]) -> list[Figure]:
    """All figures of an experiment. `arms` holds each arm's policies, one a seed, all over the same prefixes.

    A prefix counts once, with its mean over seeds: intervals are over prefixes, `by_seed` shows the seeds.
    """
    tables = {BASE: base.table} | {arm: _over_seeds(found) for arm, found in arms.items()}
    values = {arm: estimates(table) for arm, table in tables.items()}
    gains = differences(tables[SELF_IMPROVING], tables[STANDARD])
    found = []
    for name, up in HIGHER_IS_BETTER.items():
        if name == "distinct_3":
            continue
        if all(name in arm for arm in values.values()):
            gain = gains[name]
            low, high = (gain.low, gain.high) if up else (-gain.high, -gain.low)
            verdict = BETTER if low > 0 else WORSE if high < 0 else NO_WORSE
            by_seed = {
                arm: [estimates(one.table)[name].value for one in group] for arm, group in arms.items()
            }
            found.append(
                Figure(name, {arm: one[name] for arm, one in values.items()}, by_seed, gain, verdict)
            )
    found.append(_distinct(base, arms))
    return sorted(found, key=lambda figure: list(HIGHER_IS_BETTER).index(figure.name))


def _distinct(base: Measured, arms: Mapping[str, Sequence[Measured]]) -> Figure:
    by_seed = {arm: [one.distinct_3 for one in group] for arm, group in arms.items()}
    means = {arm: float(np.mean(values)) for arm, values in by_seed.items()}
    gain = means[SELF_IMPROVING] - means[STANDARD]
    # No interval: a hundredth is what the order of a few words makes.
    verdict = BETTER if gain > 0.01 else WORSE if gain < -0.01 else NO_WORSE
    return Figure("distinct_3", {BASE: base.distinct_3, **means}, by_seed, gain, verdict)


def _over_seeds(group: Sequence[Measured]) -> dict[str, np.ndarray]:
    return {name: np.sum([one.table[name] for one in group], axis=0) for name in group[0].table}


def target_of(figures: Sequence[Figure]) -> dict[str, Any]:
    """Whether the target was met, and by which figures not."""
    wins = next(figure for figure in figures if figure.name == _OF_THE_JUDGE)
    reached = value_of(wins.arms[SELF_IMPROVING])
    worse = [f.name for f in figures if f.name != _OF_THE_JUDGE and f.verdict == WORSE]
    return {
        "win_rate": reached,
        "wanted": TARGET_WIN_RATE,
        "worse_than_standard": worse,
        "met": reached >= TARGET_WIN_RATE and not worse,
    }


def value_of(value: Estimate | float) -> float:
    """The number itself, with or without an interval."""
    return value.value if isinstance(value, Estimate) else value


def to_json(figures: Sequence[Figure]) -> dict[str, Any]:
    """An experiment's part of summary.json."""

    def one(value: Estimate | float) -> Any:
        return value.to_json() if isinstance(value, Estimate) else value

    return {
        "figures": {
            figure.name: {
                **{arm: one(value) for arm, value in figure.arms.items()},
                "by_seed": figure.by_seed,
                "self_improving_less_standard": one(figure.gain),
                "against_standard": figure.verdict,
            }
            for figure in figures
        },
        "target": target_of(figures),
    }
