"""How fast a run is and what a step costs, as a table: what the machine cannot tell is n/a, never an estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sip_engine.monitoring.load import RunRecords

NOT_TOLD = "n/a"
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds a step", "machine/step_seconds", lambda v: f"{v:,.3g}"),
    ("tokens written and trained on, a second", "machine/tokens_per_second", lambda v: f"{v:,.0f}"),
    ("model operations, TFLOP/s", "machine/model_tflop_s", lambda v: f"{v:,.3g}"),
    ("model FLOPs utilisation", "machine/mfu", lambda v: f"{100 * v:.1f} %"),
    ("memory: weights, GiB", "machine/memory_weights_gib", lambda v: f"{v:,.3g}"),
    ("memory: gradients, GiB", "machine/memory_gradients_gib", lambda v: f"{v:,.3g}"),
    ("memory: optimizer, GiB", "machine/memory_optimizer_gib", lambda v: f"{v:,.3g}"),
    ("memory: reference, GiB", "machine/memory_reference_gib", lambda v: f"{v:,.3g}"),
    ("memory: KV pages, GiB", "machine/memory_kv_gib", lambda v: f"{v:,.3g}"),
    ("memory: activations and other, GiB", "machine/memory_other_gib", lambda v: f"{v:,.3g}"),
    ("memory: peak of the fullest GPU, GiB", "machine/memory_peak_gib", lambda v: f"{v:,.3g}"),
    ("memory: resident on the host, GiB", "machine/memory_resident_gib", lambda v: f"{v:,.3g}"),
    ("energy a step by NVML, kJ", "machine/joules", lambda v: f"{v / 1e3:,.3g}"),
    ("judge calls a step", "judge/calls", lambda v: f"{v:,.0f}"),
    ("judge tokens a step", "judge/tokens", lambda v: f"{v:,.0f}"),
    ("judge dollars a step", "judge/dollars", lambda v: f"{v:,.3g}"),
)


def speed_table(runs: Sequence[RunRecords]) -> list[tuple[str, tuple[str, ...]]]:
    """(what, a value of each run): means over the last fifth of the steps; empty where no run recorded any."""
    if not any(name in run.curves for run in runs for _, name, _ in _ROWS):
        return []
    return [(what, tuple(_value(run, name, show) for run in runs)) for what, name, show in _ROWS]


def _value(run: RunRecords, name: str, show: Callable[[float], str]) -> str:
    curve = run.curves.get(name)
    return NOT_TOLD if curve is None else show(curve.ends()[1])
