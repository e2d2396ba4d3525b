"""The page of `sip real`: figures of both experiments, chosen kinds over steps, samples to read, sources."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sip_engine.evaluation.intervals import Estimate
from sip_engine.experiments.real.exam import HELD_OUT, INFORMATION, LONGER, OTHER_TEXT, OTHER_WAYS
from sip_engine.experiments.real.judge import BEFORE, GRPO, WARM, JudgeFigures
from sip_engine.experiments.real.plan import ARMS, EXPERIMENTS, SELF_IMPROVING, Experiment, Plan
from sip_engine.experiments.real.results import (
    BASE,
    BETTER,
    WORSE,
    Figure,
    read_measured,
    read_rows,
    target_of,
)
from sip_engine.monitoring.load import evenly, load_runs
from sip_engine.report.plots import Plot, choices, losses, rewards
from sip_engine.utils.files import write_atomic
from sip_engine.utils.versions import versions

NUM_SAMPLES = 12
LABELS = {
    "win_rate": (
        "win rate over base",
        "by the judge in training: mutual information of the frozen real model",
    ),
    "factuality": ("agreement with the true suffix", "the same model's other objective, never trained on"),
    "rules_win_rate": ("win rate over base, by rules", "the heuristic judge, which is no model"),
    "similarity": ("similarity to the true suffix", "cosine of sentence embeddings (all-MiniLM-L6-v2)"),
    "repetition": ("repetition", "share of word 3-grams said before; lower is better"),
    "distinct_3": ("distinct 3-grams", "of all continuations together; no interval"),
    "heldout_loss": ("held-out loss, nats a token", "next tokens of the true suffix; lower is better"),
}
EXAMS = {
    HELD_OUT: (
        "held-out documents",
        "made like its lessons: words shuffled, doubled, sentences moved, repeated, another passage",
    ),
    OTHER_WAYS: (
        "other corruptions",
        "facts turned, words of another text, neighbours swapped, the prefix copied",
    ),
    OTHER_TEXT: ("another kind of text", "licences of software, corrupted as in its lessons"),
    LONGER: ("twice the length", "prefix and suffix, corrupted as in its lessons"),
}
JUDGED = {
    INFORMATION: "as it comes, by mutual information",
    BEFORE: "as it comes, asked",
    WARM: "after the warm start",
    GRPO: "after GRPO",
}
_IN_PERCENT = {"win_rate", "factuality", "rules_win_rate", "repetition", "distinct_3"}
_MARKS = {BETTER: "clear", WORSE: "seen"}


@dataclass(frozen=True)
class Shown:
    """What the page shows of one experiment."""

    experiment: Experiment
    figures: Sequence[Figure]
    target: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]]
    settings: Mapping[str, str]


def write_page(
    plan: Plan,
    figures: Mapping[str, Sequence[Figure]],
    judge: JudgeFigures | None,
    about: Mapping[str, Any],
    page: Path,
) -> Path:
    """Write one HTML file that needs nothing else; returns `page`.

    `figures` holds the experiments that there is something to show of; `judge` is None where none was trained.

    Raises:
        DataError: a run's records or measurements are damaged.
    """
    shown = [
        Shown(one, figures[one.name], target_of(figures[one.name]), _samples(plan, one), _settings(plan, one))
        for one in EXPERIMENTS
        if one.name in figures
    ]
    script = resources.files("sip_engine.report").joinpath("report.js").read_text(encoding="utf-8")
    text = _template().render(
        shown=shown,
        judge=judge,
        judged=JUDGED,
        exams=EXAMS,
        labels=LABELS,
        marks=_MARKS,
        base=BASE,
        arms=(BASE, *ARMS),
        about=about,
        plots=_plots(plan, [one.experiment for one in shown]),
        seeds=plan.form.seeds,
        num_prefixes=plan.form.num_prefixes,
        versions=versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomic(page, text.encode("utf-8", "replace").decode("utf-8"))
    return page


def show(name: str, value: Estimate | float, *, sign: bool = False) -> str:
    """A figure in its unit: percent, nats, or plain."""
    number = value.value if isinstance(value, Estimate) else value
    return _number(name, number, sign)


def interval(name: str, value: Estimate | float) -> str:
    """Its 95 % interval, or nothing."""
    if not isinstance(value, Estimate):
        return ""
    return f"{_number(name, value.low, False)} to {_number(name, value.high, False)}"


def spread(name: str, values: Sequence[float]) -> str:
    """Sample standard deviation of two or more values, in the figure's unit."""
    return _number(name, float(np.std(values, ddof=1)), False)


def _number(name: str, number: float, sign: bool) -> str:
    value, form = (100 * number, ".1f") if name in _IN_PERCENT else (number, ".3f")
    text = f"{value:{'+' if sign else ''}{form}}" + ("\u00a0%" if name in _IN_PERCENT else "")
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _template() -> Any:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("sip_engine", f) for f in ("experiments/real", "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"show": show, "interval": interval, "spread": spread}
    return environment.get_template("page.html.j2")


def _plots(plan: Plan, experiments: Sequence[Experiment]) -> list[Plot]:
    """Chosen kinds, rewards and losses of the first seed's runs."""
    seed = plan.form.seeds[0]
    improving = load_runs([plan.folder(one, SELF_IMPROVING, seed) for one in experiments])
    every = load_runs([plan.folder(one, arm, seed) for one in experiments for arm in ARMS])
    return [plot for plot in (choices(improving), rewards(improving), losses(every)) if plot.panels]


def _samples(plan: Plan, experiment: Experiment) -> list[dict[str, str]]:
    """Some prefixes, evenly over all, with what each policy of the first seed went on with."""
    seed = plan.form.seeds[0]
    paths = {BASE: plan.out / f"{experiment.name}_base.json"}
    paths |= {arm: plan.folder(experiment, arm, seed) / "measured.json" for arm in ARMS}
    texts = {arm: read_measured(path).continuations for arm, path in paths.items()}
    prefixes = read_rows(plan.prefixes(experiment), "prefix", "original")
    return [
        {**prefixes[n], **{arm: found[n] for arm, found in texts.items()}}
        for n in evenly(len(prefixes), NUM_SAMPLES)
    ]


def _settings(plan: Plan, experiment: Experiment) -> dict[str, str]:
    seed = plan.form.seeds[0]
    configs = {arm: plan.config(experiment, arm, seed) for arm in ARMS}
    if experiment.from_scratch:
        configs = {BASE: plan.base_config(experiment), **configs}
    return {
        arm: json.dumps(cfg.model_dump(mode="json"), indent=1, ensure_ascii=False)
        for arm, cfg in configs.items()
    }
