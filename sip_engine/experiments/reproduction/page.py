"""The page of a reproduction: our tables beside the paper's, where the orders agree, costs, curves and monitors."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, reduce
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter
from pydantic import ValidationError

from sip_engine.config.judge import JudgeConfig, RewriterConfig
from sip_engine.config.parse import changed_settings
from sip_engine.experiments.reproduction.plan import SHIFTS, Arm, Plan, arm_config, arm_recipe, run_folder
from sip_engine.experiments.reproduction.provenance import RESULT, STAGE_RESULT
from sip_engine.experiments.reproduction.statistics import (
    ArmRuns,
    Result,
    Spread,
    StageResult,
    alike_rows,
    all_pairs,
    losses_to_truth,
    standard_row,
    table_bases,
    table_orders,
)
from sip_engine.monitoring.curves import Curve
from sip_engine.monitoring.load import RECORDS, RunRecords, load_runs
from sip_engine.monitoring.signatures import CLEAR, SEEN, UNKNOWN, WATCH, all_signatures
from sip_engine.report import svg as drawing
from sip_engine.report.plots import PARTS, Key, Panel, Plot, choices
from sip_engine.report.tables import FIGURES
from sip_engine.types import Kind
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json, write_atomic

NAMES = {
    "win_rate": "quality win rate",
    "win_rate_safe": "quality win rate, safe prefixes",
    "coherence_win_rate": "coherence win rate",
    "factuality": "factuality",
    "safety": "safety",
    "faultless": "faultless continuations",
    "heldout_loss_faultless": "loss on faultless documents, 0.01 nats",
    "relative_diversity": "distinct 3-grams, of faultless originals'",
}
PAPER_BASE = {"coherence_win_rate": 50.1} | {f.key: f.paper[0] for f in FIGURES if f.paper}
"""The paper's base model, in percent (arXiv 2601.21343)."""


@dataclass(frozen=True)
class _Seen:
    """What one run shows of the failure signatures, and whom it chose."""

    chosen: dict[str, Curve]
    found: dict[str, tuple[str, str]]
    """Signature -> verdict and evidence, from all that is recorded."""
    warned: dict[str, int]
    """Signature -> first step at which the run's own monitor saw it."""


def write_page(plan: Plan, out: Path, page: Path, *, failed: Mapping[str, str]) -> Path:
    """Write what there is of a reproduction in `out` as one HTML file that needs nothing else; returns `page`.

    `failed` holds the reason of each job that failed, by the job's title. Rows, seeds and stages may be missing.

    Raises:
        DataError: a result or a run's records are damaged, or `page` cannot be written.
    """
    rows = [_load_arm(plan, row, out, failed) for row in plan.rows]
    named = {one.row.name: one for one in rows}
    stages = {s.name: found for s in plan.stages if (found := _load_stage(out / s.name)) is not None}
    seen = {n: {s: _look(run_folder(out, one.row, s)) for s in plan.seeds} for n, one in named.items()}
    monitored: list[tuple[str, Mapping[int | None, _Seen | None]]] = [
        *((one.title, {**seen[one.row.name]}) for one in rows),
        *(
            (f"stage {stage.name}", {None: _look(out / stage.name)})
            for stage in plan.stages
            if stage.data is None
        ),
    ]
    script = resources.files("sip_engine.report").joinpath("report.js").read_text(encoding="utf-8")
    parts = {part for one in rows for result in one.results.values() for part in result.cost.seconds}
    parts -= {*PARTS, "judge_busy"}  # the judge's own time runs beside generation and is no part of the sum
    orders = [(table, table_orders(table, rows)) for table in plan.tables]
    text = _template().render(
        plan=plan,
        rows=rows,
        names=NAMES,
        paper_base=PAPER_BASE,
        bases={table.name: table_bases(table, rows) for table in plan.tables},
        targets=[(target, named.get(target.row)) for target in plan.targets],
        orders=orders,
        total=all_pairs(found for _, found in orders),
        labels={name: one.row.label for name, one in named.items()},
        plots=[
            plot for plot in (*_chosen(rows, seen), _rollouts(rows), _schedules(rows)) if plot and plot.panels
        ],
        parts=[*PARTS, *sorted(parts)],
        standards={one.row.name: standard_row(one, rows) for one in rows},
        stages={n: s for n, s in stages.items() if s.settings.get("task") in ("judge", "rewriter")},
        stage_figures=_stage_figures,
        shifts={s.name: found for s in plan.stages if (found := _load_shifts(out / s.name)) is not None},
        losses_to_truth=losses_to_truth(rows, list(NAMES)),
        signatures=all_signatures([]),
        monitored=[(label, runs) for label, runs in monitored if any(runs.values())],
        over_runs=_over_runs,
        failed=failed,
        prefixes=sorted({result.num_prefixes for one in rows for result in one.results.values()}),
        **_settings(plan, rows),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        torch=torch.__version__,
        machine=_machine(),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    # Reasons of failures may hold bytes that are not UTF-8.
    write_atomic(page, text.encode("utf-8", "replace").decode("utf-8"))
    return page


def _settings(plan: Plan, rows: Sequence[ArmRuns]) -> dict[str, Any]:
    """What the page tells of the rows' settings."""
    judged = [one for one in rows if one.is_judged]
    truth = plan.evaluation.get("judge", {}).get("backend")
    losses = {
        one.row.name: one.cfg.objective.loss_on for one in rows if one.cfg.objective.kind == "next_token"
    }
    return {
        "monitors": list(dict.fromkeys(one.cfg.monitors for one in rows)),
        "judges": _counted(_who(one.cfg.judge) for one in judged),
        "rewriters": _counted(_who(one.cfg.rewriter) for one in rows if one.cfg.rewriter.backend != "none"),
        "truth": truth,
        "by_truth": [one for one in judged if one.cfg.judge.backend == "world"],
        "by_others": [(one, _who(one.cfg.judge)) for one in judged if one.cfg.judge.backend != "world"],
        "losses": losses if len({*losses.values()}) > 1 else {},
        "reserved": sorted(
            {one.cfg.sampler.kv_memory_mb for one in rows}, key=lambda size: (isinstance(size, str), size)
        ),
        "lengths": _counted(f"{one.cfg.steps:,} steps of {one.cfg.batch_size} prefixes" for one in rows),
        "worlds": _counted(
            f"{world.num_people} people, {world.train_documents:,} documents"
            for one in rows
            if (world := one.cfg.world)
        ),
        "first": rows[0].cfg if rows else None,
    }


def _template() -> Any:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("sip_engine", f) for f in ("experiments/reproduction", "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spread": _spread, "signed": _signed, "short": _short}
    return environment.get_template("page.html.j2")


def _spread(value: Spread | None, planned: int, *, sign: bool = False) -> str:
    """84.3 ± 1.2, with the number of seeds where some are missing."""
    if value is None:
        return "–"
    text = f"{value.mean:+.1f}" if sign else f"{value.mean:.1f}"
    text += "" if value.deviation is None else f" ± {value.deviation:.1f}"
    return _minus(text) + (f" (n = {value.count})" if value.count < planned else "")


def _signed(value: float) -> str:
    return _minus(f"{value:+.1f}")


def _short(value: Any) -> str:
    """A number to three places; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return _minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def _minus(text: str) -> str:
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


# --- what was found


def _load_arm(plan: Plan, row: Arm, out: Path, failed: Mapping[str, str]) -> ArmRuns:
    """The results of a row's runs; those made with other settings than the plan's are not among them."""
    results, reasons = {}, {}
    for seed in plan.seeds:
        path = run_folder(out, row, seed) / RESULT
        if path.is_file():
            found = _read(Result, path)
            if changes := changed_settings(found.recipe, arm_recipe(plan, row, seed)):
                reasons[seed] = f"not shown, since it was made with other settings ({changes[0]})"
            else:
                results[seed] = found
        elif (title := f"{row.name}, seed {seed}") in failed:
            reasons[seed] = f"failed: {failed[title]}"
    seed = next(iter(plan.seeds), 0)
    return ArmRuns(row, arm_config(plan, row, seed, out), results, reasons, len(plan.seeds))


def _load_stage(folder: Path) -> StageResult | None:
    path = folder / STAGE_RESULT
    return _read(StageResult, path) if path.is_file() else None


def _load_shifts(folder: Path) -> dict[str, Any] | None:
    path = folder / SHIFTS
    return read_json(path) if path.is_file() else None


def _read(model: type[Any], path: Path) -> Any:
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise DataError(
            f"{path}: not what a job of a reproduction writes ({where}: {fault['msg']}); remove its folder and run "
            "it again"
        ) from None


def _look(folder: Path) -> _Seen | None:
    """What a run recorded, also one that failed or goes on; None if it recorded nothing."""
    files = [folder / name for name in RECORDS]
    stamps = tuple((f.stat().st_mtime_ns, f.stat().st_size) if f.is_file() else (0, 0) for f in files)
    return _look_at(folder, stamps) if any(size for _, size in stamps) else None


@cache
def _look_at(folder: Path, stamps: tuple[tuple[int, int], ...]) -> _Seen:
    """The page is written after every run: records that have not changed since are not read again."""
    del stamps
    (run,) = load_runs([folder])
    signatures = all_signatures([run])
    return _Seen(
        chosen={name: run.curves[name] for kind in Kind if (name := f"chosen/{kind}") in run.curves},
        found={s.name: (s.findings[0].verdict, s.findings[0].evidence) for s in signatures if s.findings},
        warned={
            s.name: int(curve.steps[np.argmax(curve.values > 0)])
            for s in signatures
            if (curve := run.curves.get(f"monitor/{s.name.replace(' ', '_')}")) and curve.values.any()
        },
    )


def _over_runs(runs: Mapping[int | None, _Seen | None], signature: str) -> tuple[str, int, int, list[int]]:
    """The worst verdict over some runs, how many have it, how many could be told, and when monitors saw it."""
    known = [run for run in runs.values() if run is not None]
    found = [run.found[signature][0] for run in known if signature in run.found]
    worst = next((verdict for verdict in (SEEN, WATCH, CLEAR, UNKNOWN) if verdict in found), "")
    warned = [run.warned[signature] for run in known if signature in run.warned]
    return worst, found.count(worst), len(found), warned


def _stage_figures(stage: StageResult) -> list[str]:
    """Names of all figures of a stage's evaluations but the ends of intervals."""
    names = dict.fromkeys(name for row in stage.evaluations for name in row if name.startswith("eval/"))
    return [name for name in names if not name.endswith(("/low", "/high"))]


def _who(section: JudgeConfig | RewriterConfig) -> str:
    """A backend, with its checkpoint if it has one."""
    checkpoint = section.local.checkpoint if section.backend == "local" else None
    return f"{section.backend} ({checkpoint.name})" if checkpoint else section.backend


def _counted(names: Iterable[str]) -> list[str]:
    """Different texts with the number of rows that have them."""
    return [f"{name} in {number} row{'s' * (number > 1)}" for name, number in Counter(names).items()]


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU"


# --- plots


def _chosen(rows: Sequence[ArmRuns], seen: Mapping[str, Mapping[int, _Seen | None]]) -> list[Plot]:
    """Chosen rate by kind, mean over the seeds that are done: continual rows, then rows from scratch."""
    plots = []
    for from_scratch, title in ((False, "continual"), (True, "from scratch")):
        runs = []
        for one in rows:
            done = [s.chosen for seed, s in seen[one.row.name].items() if s and seed in one.results]
            if one.is_judged and one.from_scratch == from_scratch and len(one.kinds) > 1 and any(done):
                config = one.cfg.model_dump(mode="json")
                runs.append(RunRecords(one.row.label, config, _mean_curves(done), [], [], 0, 0.0))
        plot = choices(runs)
        panels = plot.panels if len(runs) != 1 else (Panel(runs[0].name, plot.panels[0].svg),)
        caption = (
            "Share of pairs in which each kind is the chosen side (the paper's Figure 8), mean over seeds. Dotted is "
            "the kind's share of the pool, where a judge that tosses coins would put it."
        )
        plots.append(replace(plot, title=f"Chosen rate by kind, {title}", caption=caption, panels=panels))
    return plots


def _mean_curves(runs: Sequence[dict[str, Curve]]) -> dict[str, Curve]:
    """Mean of each curve over the runs that have it, at the steps that all of these recorded."""
    means = {}
    for name in {name for run in runs for name in run}:
        curves = [run[name] for run in runs if name in run]
        steps = reduce(np.intersect1d, [curve.steps for curve in curves])
        if len(steps):
            values = [curve.values[np.searchsorted(curve.steps, steps)] for curve in curves]
            means[name] = Curve(steps, np.mean(values, axis=0))
    return means


def _rollouts(rows: Sequence[ArmRuns]) -> Plot:
    """Figures over the number of rollouts, among rows that differ in nothing else."""
    panels = []
    for members in alike_rows(rows, judge=set(), candidates={"rollouts"}):
        numbered = sorted(
            ((one.cfg.candidates[-1].rollouts, one) for one in members), key=lambda pair: pair[0]
        )
        weights = members[0].cfg.judge.weights
        for figure in ("win_rate", "factuality"):
            paper = [
                (float(n), one.row.paper[figure]) for n, one in numbered if n and figure in one.row.paper
            ]
            ours = [(float(n), value) for n, one in numbered if n and (value := one.spread(figure))]
            if len(paper) > 1 and ours:
                heading = (
                    f"{NAMES[figure]}, judged for {' + '.join(name for name, weight in weights if weight)}"
                )
                panels.append(Panel(heading, _draw_points(heading, "rollouts", ours, paper, joined=True)))
    caption = (
        "Rows that differ in the number of rollouts only. Bars are standard deviations over seeds of ours."
    )
    return Plot("Number of rollouts", caption, _POINT_KEYS, tuple(panels))


def _schedules(rows: Sequence[ArmRuns]) -> Plot:
    """Win rate over what judging cost, among rows that differ in the judge's schedule only."""
    panels = []
    for members in alike_rows(rows, judge={"schedule", "pivot", "budget"}, candidates=set()):
        ours, paper, names = [], [], []
        for one in members:
            calls, value = one.cost("judge", "calls_per_prefix"), one.spread("win_rate")
            if calls is None or value is None:
                continue
            ours.append((calls.mean, value))
            names.append(one.cfg.judge.schedule.replace("_", " "))
            paper += [(calls.mean, one.row.paper["win_rate"])] if "win_rate" in one.row.paper else []
        if len(set(names)) > 1:
            heading = "; ".join(one.row.label for one in members)
            panels.append(Panel(heading, _draw_points(heading, "judge calls a prefix", ours, paper, names)))
    caption = (
        "Quality win rate against the number of judgments that a prefix took, among rows that differ in the judge's "
        "schedule only. The paper's points stand at our number of calls."
    )
    return Plot("What judging costs and brings", caption, _POINT_KEYS, tuple(panels))


_POINT_KEYS = (Key("ours, mean ± standard deviation", "run-2"), Key("the paper's", "run-5", "dashed"))


def _draw_points(
    heading: str,
    x_label: str,
    ours: Sequence[tuple[float, Spread]],
    paper: Sequence[tuple[float, float]],
    names: Sequence[str] = (),
    *,
    joined: bool = False,
) -> Markup:
    """Ours with deviations beside the paper's points, in percent. With `joined`, x is on a log scale."""
    figure, axes = drawing.new_panel()
    axes.margins(x=0.12)
    style: dict[str, Any] = {"color": drawing.stand_in("run-5"), "linestyle": "--" if joined else "none"}
    axes.plot([x for x, _ in paper], [v / 100 for _, v in paper], marker="s", markersize=4.5, **style)
    x, y = zip(*((at, value.mean / 100) for at, value in ours), strict=True)
    error = [np.nan if value.deviation is None else value.deviation / 100 for _, value in ours]
    style = {"color": drawing.stand_in("run-2"), "linestyle": "-" if joined else "none"}
    axes.errorbar(x, y, yerr=error, marker="o", markersize=4.5, capsize=3, **style)
    drawing.scale_axis(axes, "percent", None)
    axes.set_xlabel(x_label, loc="right", fontsize=8.5, color=drawing.stand_in("muted"), labelpad=1)
    if joined:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({at for at, *_ in (*ours, *paper)})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.minorticks_off()
    style = {"textcoords": "offset points", "fontsize": 8.5, "color": drawing.stand_in("ink")}
    for at, value, name in zip(x, y, names, strict=False):
        is_left = at < (min(x) + max(x)) / 2
        side = "left" if is_left else "right"
        axes.annotate(name, (at, value), (7 if is_left else -7, 4), horizontalalignment=side, **style)
    told = [f"{at:g}: {_spread(value, value.count)} %" for at, value in ours]
    alt = f"{heading}. {x_label}: ours {', '.join(told)}; the paper's {', '.join(f'{x:g}: {v} %' for x, v in paper)}."
    svg = drawing.to_svg(figure, axes, [], alt, "percent")
    # What the page's script shows under the pointer are curves over steps.
    return Markup(re.sub(r' data-readouts="[^"]*"', "", svg, count=1))
