"""`sip simulate`: the study of one config, printed, drawn and written as JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sip_engine.config.files import shipped_configs
from sip_engine.config.overrides import read_run_config
from sip_engine.config.schema import RunConfig
from sip_engine.planning.plan import Request, check_request
from sip_engine.planning.simulate.plots import draw_all
from sip_engine.planning.simulate.study import (
    AtScale,
    at_scales,
    best_interval,
    breaks_at,
    by_interval,
    judge_gpus_needed,
    scaled_scenarios,
)
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import check_writable, write_json

POLICIES = {"1.4B": ("paper/quality.toml", 8), "8B": ("scale/8b.toml", 8), "70B": ("scale/70b.toml", 32)}
"""Policies whose judge is sized: a shipped config, and the nodes that it is planned for."""


def study(
    cfg: RunConfig,
    request: Request,
    out: Path,
    *,
    hours: float,
    seed: int,
    save_every: int,
    changes: dict[str, Any],
) -> list[Table | str]:
    """Simulate, draw to `out`, write `out/simulate.json`; what to print.

    Raises:
        ConfigError: numbers that cannot be. DataError: `out` cannot be written.
    """
    if hours <= 0:
        raise ConfigError(f"--hours {hours:g}: must be above 0")
    check_request(cfg, request)
    check_writable(out, folder=True)
    seconds = hours * 3600
    scenario_of = scaled_scenarios(cfg, request, save_every=save_every, changes=changes)
    scales = at_scales(scenario_of, seconds=seconds, seed=seed)
    if not scales:
        raise ConfigError("no scale from 8 to 4,096 GPUs holds this layout: see sip plan")
    shown = {one.scenario.gpus: one for one in scales if one.scenario.gpus in (1024, 4096)}
    intervals = {}
    for gpus, one in shown.items():
        if points := by_interval(one.scenario, seed=seed):
            intervals[f"{gpus} GPUs"] = points, one.best_interval_s
    judges = _judges(request)
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw_all(out, scales, intervals, judges)
    verdict = breaks_at(scales)
    write_json(
        out / "simulate.json",
        {
            "simulation": True,
            "hours": hours,
            "seed": seed,
            "scales": [one.as_json() for one in scales],
            "intervals": {
                name: {"points": points, "daly_s": best} for name, (points, best) in intervals.items()
            },
            "judge_gpus": judges,
            "breaks": verdict,
        },
    )
    needs = ", ".join(
        f"{name}: {n if n else 'no number is enough, its latency is too long'}" for name, n in judges.items()
    )
    lines: list[Table | str] = [_table(scales), f"where it breaks: {verdict}"]
    if judges:
        lines.append(f"judge GPUs for a wait of a third of a step (policy on its config's GPUs): {needs}")
    return [*lines, f"plots and simulate.json in {out}: {', '.join(p.name for p in drawn)}"]


def _judges(request: Request) -> dict[str, int | None]:
    """Judge GPUs that a policy of each size needs, with the judge that was named."""
    if request.judge is None:
        return {}
    found = {}
    for name, (path, nodes) in POLICIES.items():
        cfg = read_run_config(shipped_configs() / path, [])
        found[name] = judge_gpus_needed(cfg, replace(request, nodes=nodes), request.judge)
    return found


def _table(scales: list[AtScale]) -> Table:
    table = Table(title="goodput by scale: simulated from predicted steps", title_justify="left", box=None)
    for name in (
        "GPUs",
        "step, s",
        "goodput",
        "failures",
        "a failure every",
        "save every",
        "judge waits",
        "restarts",
    ):
        table.add_column(name, justify="right")
    for one in scales:
        s, o = one.scenario, one.outcome
        table.add_row(
            f"{s.gpus:,}",
            f"{s.step_s:.2f}",
            f"{o.goodput:.1%}",
            str(o.failures),
            f"{s.mtbf / 3600:,.1f} h",
            f"{best_interval(s) / 60:,.1f} min",
            f"{o.seconds.get('judge', 0.0) / o.elapsed:.1%}",
            f"{o.seconds.get('restart', 0.0) / o.elapsed:.1%}",
        )
    return table
