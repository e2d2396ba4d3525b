"""The study as plots, SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sip_engine.planning.simulate.study import AtScale

_PARTS = ("generate", "judge", "update", "save", "restart")
_NOTE = "a simulation of predicted steps, not a measurement"


def draw_all(
    folder: Path,
    scales: Sequence[AtScale],
    intervals: Mapping[str, tuple[Sequence[tuple[float, float, float]], float]],
    judges: Mapping[str, int | None],
) -> list[Path]:
    """Write every plot to `folder`; returns the files.

    intervals: name -> ((seconds between saves, goodput, goodput by Daly) ..., Daly's interval in seconds).
    judges: policy -> judge GPUs for each of its own, None where no number was enough.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written: list[Path] = []

    def save(name: str) -> None:
        plt.figtext(0.99, -0.03, _NOTE, ha="right", fontsize=7, color="gray")
        for kind in ("svg", "png"):
            path = folder / f"{name}.{kind}"
            plt.savefig(path, dpi=150, bbox_inches="tight")
            written.append(path)
        plt.close()

    gpus = [one.scenario.gpus for one in scales]
    names = [str(number) for number in gpus]
    _, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True)
    above.plot(names, [100 * one.outcome.goodput for one in scales], marker="o")
    above.set_ylabel("goodput, %")
    above.set_ylim(0, 105)
    above.grid(alpha=0.3)
    bottom = [0.0] * len(scales)
    for part in _PARTS:
        shares = [100 * one.outcome.seconds.get(part, 0.0) / one.outcome.elapsed for one in scales]
        below.bar(names, shares, bottom=bottom, label=part)
        bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    below.set_xlabel("GPUs of the policy")
    below.set_ylabel("time, % (lost steps included)")
    below.set_ylim(0, 105)
    below.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.13))
    save("goodput_by_scale")

    plt.figure(figsize=(7, 4))
    for name, (points, best) in intervals.items():
        line = plt.plot(
            [p[0] for p in points], [100 * p[1] for p in points], marker="o", linestyle="", label=name
        )[0]
        plt.plot([p[0] for p in points], [100 * p[2] for p in points], color=line.get_color(), linewidth=1)
        plt.axvline(best, color=line.get_color(), linestyle=":")
    plt.xscale("log")
    plt.xlabel(
        fontsize=8,
        xlabel="work between saves, s (points: simulated; lines: Daly's closed form; dotted: his best interval)",
    )
    plt.ylabel("goodput, %")
    plt.grid(alpha=0.3)
    plt.legend()
    save("goodput_by_interval")

    if judges:
        plt.figure(figsize=(6, 3.5))
        bars = plt.bar(list(judges), [float(number or 0) for number in judges.values()])
        plt.bar_label(bars, [f"{number:,}" if number else "none is enough" for number in judges.values()])
        plt.margins(y=0.15)
        plt.xlabel("parameters of the policy")
        plt.ylabel("judge GPUs that keep the wait\nunder a third of a step")
        save("judge_gpus")
    return written
