"""What a run's processes did when, as rows: its starts with the gaps between them, its last steps by rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sip_engine.monitoring.load import RunRecords
from sip_engine.monitoring.sessions import Session
from sip_engine.monitoring.timeline import Made, RankTimeline
from sip_engine.monitoring.trace import slowest
from sip_engine.report import svg as drawing
from sip_engine.report.plots import Key, Panel, Plot

PHASES = ("data", "generate", "judge", "grade", "update", "exchange", "evaluation", "save")
LAST_STEPS = 6
MOST_RANKS = 16
_AREA_LEFT = 0.075
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Start:
    """One time that a run was at work, as text."""

    number: int
    began: str
    worked: str
    steps: str
    ended: str
    gap: str
    """Time since the end of the one before."""
    again: str
    """Steps that it made once more, since they had not been saved."""


@dataclass(frozen=True)
class RunTimeline:
    """What the section shows of one run."""

    name: str
    state: str
    starts: tuple[Start, ...]
    slowest: str
    """A sentence; empty where one process is alone."""
    plot: Plot


def timelines(runs: Sequence[RunRecords]) -> list[RunTimeline]:
    """Of the runs that recorded any."""
    return [_of_run(run) for run in runs if run.sessions or run.timeline]


def _of_run(run: RunRecords) -> RunTimeline:
    ends = [_end(run, number) for number in range(len(run.sessions))]
    starts = tuple(_start(run, number, ends) for number in range(len(run.sessions)))
    panels: list[Panel] = []
    if run.sessions:
        panels.append(Panel("starts over time; grey where nobody was at work", _draw_starts(run, ends)))
    newest = _newest(run)
    window = _window(newest)
    found = slowest(newest, window) if window else None
    if window:
        ranks = _shown_ranks(newest, found.rank if found else 0)
        heading = f"steps {window[0]} to {window[-1]} by rank, seconds"
        panels.append(Panel(heading, _draw_steps(ranks, window, heading)))
    names = {
        phase for one in newest for made in one.made if made.step in window for phase, _, _ in made.spans
    }
    legend = tuple(Key(phase, f"part-{phase}", "area") for phase in PHASES if phase in names)
    caption = (
        "Every row is a process; white is waiting for the others. “update” is what a process does by itself, "
        "“exchange” the sum of gradients with the others and the optimizer. “sip trace” writes them for Perfetto."
    )
    plot = Plot("Timeline", caption, legend, tuple(panels))
    return RunTimeline(run.name, run.state, starts, f"{found}." if found else "", plot)


def _newest(run: RunRecords) -> list[RankTimeline]:
    """What was recorded since the last start that made a step."""
    for one in reversed(run.sessions):
        found = [
            replace(rank, made=tuple(made for made in rank.made if made.begin >= one.began))
            for rank in run.timeline
        ]
        if _window(found):
            return found
    return list(run.timeline)


def _window(ranks: Sequence[RankTimeline]) -> range:
    """The last steps that every process has recorded."""
    made = [[one.step for one in rank.made if one.is_update] for rank in ranks]
    if not made or not all(made):
        return range(0)
    first, last = max(map(min, made)), min(map(max, made))
    return range(max(first, last - LAST_STEPS + 1), last + 1)


def _shown_ranks(ranks: Sequence[RankTimeline], slow: int) -> list[RankTimeline]:
    """At most `MOST_RANKS`, evenly, the slowest among them."""
    if len(ranks) <= MOST_RANKS:
        return list(ranks)
    spread = {ranks[n * (len(ranks) - 1) // (MOST_RANKS - 2)].rank for n in range(MOST_RANKS - 1)} | {slow}
    return [one for one in ranks if one.rank in spread]


def _draw_steps(ranks: Sequence[RankTimeline], steps: range, heading: str) -> Markup:
    last = [_last_makings(one, steps) for one in ranks]
    begin = min(made.begin for row in last for made in row)
    figure, axes = drawing.new_panel((9.8, 0.62 + 0.24 * len(ranks)), (_AREA_LEFT, 0.0, 0.915, 1.0))
    _set_area(figure, axes)
    for row, one in enumerate(last):
        for phase in PHASES:
            bars = [(b - begin, e - b) for made in one for name, b, e in made.spans if name == phase]
            axes.broken_barh(
                bars, (row - 0.38, 0.76), facecolors=drawing.stand_in(f"part-{phase}"), linewidth=0
            )
    axes.set_yticks(range(len(ranks)), [f"rank {one.rank}" for one in ranks])
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.set_xlabel("seconds", loc="right", fontsize=8.5, color=drawing.stand_in("muted"), labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    return drawing.to_svg(figure, axes, [], f"{heading}. {_in_words(last, ranks)}", "linear")


def _last_makings(one: RankTimeline, steps: range) -> list[Made]:
    """Of the window's steps the newest making, with what stands between them."""
    newest = {made.step: made.begin for made in one.made if made.is_update and made.step in steps}
    begin = min(newest.values(), default=0.0)
    return [
        made
        for made in one.made
        if made.step in steps and made.begin >= (newest[made.step] if made.is_update else begin)
    ]


def _in_words(rows: Sequence[Sequence[Made]], ranks: Sequence[RankTimeline]) -> str:
    """Seconds by phase of each row, for readers who cannot see it."""
    told = []
    for row, one in zip(rows, ranks, strict=True):
        sums: dict[str, float] = {}
        for made in row:
            for name, begin, end in made.spans:
                sums[name] = sums.get(name, 0.0) + end - begin
        told.append(f"rank {one.rank}: " + ", ".join(f"{name} {s:.2f} s" for name, s in sums.items()))
    return "; ".join(told) + "."


def _draw_starts(run: RunRecords, ends: Sequence[float]) -> Markup:
    first = run.sessions[0].began
    unit, size = next((u for u in _UNITS if ends[-1] - first >= 2 * u[1]), _UNITS[-1])
    figure, axes = drawing.new_panel((9.8, 0.9), (_AREA_LEFT, 0.0, 0.915, 1.0))
    _set_area(figure, axes)
    bars = [((one.began - first) / size, (ends[n] - one.began) / size) for n, one in enumerate(run.sessions)]
    gaps = [(end, begin - end) for (a, b), (begin, _) in pairwise(bars) for end in (a + b,)]
    for spans, color in ((bars, "part-update"), (gaps, "gap")):
        axes.broken_barh(spans, (-0.38, 0.76), facecolors=drawing.stand_in(color), linewidth=0)
    axes.set_yticks([0], ["at work"])
    axes.set_ylim(0.6, -0.6)
    axes.set_xlabel(unit, loc="right", fontsize=8.5, color=drawing.stand_in("muted"), labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    told = "; ".join(f"start {n + 1}: {unit} {b:.2f} to {b + w:.2f}" for n, (b, w) in enumerate(bars))
    return drawing.to_svg(figure, axes, [], f"Starts over time. {told}.", "linear")


def _set_area(figure: Figure, axes: Axes) -> None:
    """Rows of equal height whatever their number: room for the numbers below, in inches."""
    height = figure.get_size_inches()[1]
    below = 0.42 / height
    axes.set_position((_AREA_LEFT, below, 0.915, 1 - below - 0.06 / height))
    axes.grid(visible=False, axis="y")


def _end(run: RunRecords, number: int) -> float:
    """When a start's work ended, or was last seen where it left no end."""
    one = run.sessions[number]
    if one.ended is not None:
        return one.ended
    until = run.sessions[number + 1].began if number + 1 < len(run.sessions) else float("inf")
    seen = [made.end for rank in run.timeline for made in rank.made if one.began <= made.end <= until]
    if number + 1 == len(run.sessions):
        seen.append(max(run.modified, one.began))
    return max(seen, default=one.began)


def _start(run: RunRecords, number: int, ends: Sequence[float]) -> Start:
    one, last = run.sessions[number], number + 1 == len(run.sessions)
    reached = one.step if one.step is not None else _seen_step(run, one, ends[number])
    before = run.sessions[number - 1] if number else None
    again = 0
    if before is not None:
        made = before.step if before.step is not None else _seen_step(run, before, ends[number - 1])
        again = max(0, made - one.from_step)
    how = one.how or (run.state if last else "killed, or its machine died: it left no end")
    return Start(
        number=number + 1,
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(one.began)),
        worked=_duration(ends[number] - one.began),
        steps=f"{one.from_step:,} → {reached:,}",
        ended=how,
        gap=_duration(one.began - ends[number - 1]) if number else "–",
        again=f"{again:,}" if again else "–",
    )


def _seen_step(run: RunRecords, one: Session, end: float) -> int:
    """Updates made by then as the first process' timeline tells."""
    makings = run.timeline[0].made if run.timeline else ()
    return max((m.step for m in makings if m.is_update and one.began <= m.end <= end), default=one.from_step)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
