"""Draw one panel of curves as inline SVG whose colours are CSS variables, so that it follows the page's theme."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from sip_engine.monitoring.curves import Curve
from sip_engine.monitoring.signatures import SUPERSCRIPTS

SIZE_INCHES = (4.9, 2.55)
PLOT_AREA = (0.115, 0.165, 0.87, 0.795)
"""Left, bottom, width and height of the axes as shares of the drawing."""
MAX_READOUTS = 250
LOG_FLOOR = 1e-9
_SMOOTH_FROM = 40
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_DASHES = {"solid": "-", "dashed": (0, (5, 2.5)), "dotted": (0, (1, 2)), "dashdot": (0, (6, 2, 1, 2))}
# matplotlib draws with stand-ins for CSS variables; each becomes var(--name) in the SVG.
_STAND_INS: dict[str, str] = {}
# Drawings are inlined: no page-wide style, no ids twice, no clipping (nothing leaves the axes), no foreign font.
_CLEANING = tuple(
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<(style|clipPath).*?</\1>\s*</defs>", ""),
        (r'<g id="[^"]*"', "<g"),
        (r' clip-path="[^"]*"| font-family: [^;]*;', ""),
        (r"xlink:href", "href"),
        (r"\s*\n\s*", "\n"),
    )
)


@dataclass(frozen=True)
class Line:
    """One curve of a panel. `color` names a CSS variable (without dashes in front)."""

    label: str
    color: str
    curve: Curve
    dash: str = "solid"
    plain: bool = False
    """Draw the points as they are: no running mean."""
    marked: bool = False
    """Mark each point."""


def draw_lines(
    lines: Sequence[Line], alt: str, *, scale: str = "linear", limits: tuple[float, float] | None = None
) -> Markup:
    """The curves over steps; `scale` is linear, percent (shares in [0, 1]) or log.

    A long noisy curve is drawn pale, with its running mean over it.
    """
    figure, axes = new_panel()
    for line in lines:
        curve = line.curve.thinned()
        values = np.maximum(curve.values, LOG_FLOOR) if scale == "log" else curve.values
        style = {"color": stand_in(line.color), "linestyle": _DASHES[line.dash]}
        if line.plain or len(curve) < _SMOOTH_FROM:
            # A single point has no line to be seen by.
            marker = "o" if line.marked or len(curve) == 1 else None
            axes.plot(curve.steps, values, marker=marker, markersize=3.2, **style)
        else:
            axes.plot(curve.steps, values, color=style["color"], alpha=0.22, linewidth=0.8)
            axes.plot(curve.steps, running_mean(values, len(curve) // 20), **style)
    scale_axis(axes, scale, limits)
    return to_svg(figure, axes, lines, alt, scale)


def draw_stack(lines: Sequence[Line], alt: str) -> Markup:
    """Curves over the same steps as areas on top of each other, the first at the bottom."""
    figure, axes = new_panel()
    curves = [line.curve.thinned(100) for line in lines]
    colors = [stand_in(line.color) for line in lines]
    axes.stackplot(curves[0].steps, *(curve.values for curve in curves), colors=colors, linewidth=0)
    axes.set_ylim(bottom=0)
    return to_svg(figure, axes, lines, alt, "linear")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and its neighbours up to `window // 2` to either side, fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def stand_in(color: str) -> str:
    """The hex colour that stands for a CSS variable until the SVG is written."""
    return _STAND_INS.setdefault(color, f"#f{len(_STAND_INS):02x}e0d")


def new_panel(
    size: tuple[float, float] = SIZE_INCHES, area: tuple[float, float, float, float] = PLOT_AREA
) -> tuple[Figure, Axes]:
    """An empty drawing of so many inches, its axes in the part of it that `area` says."""
    figure = Figure(size)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_axes(area)
    axes.patch.set_visible(False)
    axes.margins(x=0.01)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=stand_in("axis"), linewidth=0.8)
    axes.grid(axis="y", color=stand_in("grid"), linewidth=0.7)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=stand_in("muted"), pad=4)
    axes.set_xlabel("step", loc="right", fontsize=8.5, color=stand_in("muted"), labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_axisbelow(True)
    return figure, axes


def scale_axis(axes: Axes, scale: str, limits: tuple[float, float] | None) -> None:
    low, high = axes.get_xlim()
    if high - low < 2:
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    if scale == "log":
        axes.set_yscale("log")
        # Whole decades, two at least: a narrower range would have no labelled line.
        low, high = (np.log10(limit) for limit in axes.get_ylim())
        axes.set_ylim(10.0 ** np.floor(low), 10.0 ** max(np.ceil(high), np.floor(low) + 2))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        axes.minorticks_off()
        return
    if scale == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 3):g} %"))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    limits = limits or _limits_of_flat(axes, scale)
    if limits is not None:
        axes.set_ylim(*limits)


def _limits_of_flat(axes: Axes, scale: str) -> tuple[float, float] | None:
    """Limits where all values are equal but for rounding, which would else be blown up to fill the panel."""
    low, high = axes.dataLim.intervaly
    size = max(abs(low), abs(high))
    if high - low > 1e-6 * size:
        return None
    if size == 0:
        return (-0.002, 0.1) if scale == "percent" else (-0.05, 1.0)
    return (0.0, 2 * high) if low > 0 else (2 * low, 0.0)


def _power_of_ten(value: float, _: object) -> str:
    return f"10{str(round(np.log10(value))).translate(SUPERSCRIPTS)}"


def _in_words(line: Line, scale: str) -> str:
    """First and last value of a curve, for readers who cannot see it."""
    unit = "{:.1%}" if scale == "percent" else "{:.3g}"
    first, last = (unit.format(value) for value in line.curve.ends())
    steps = f"{line.curve.steps[0]:.0f} to {line.curve.steps[-1]:.0f}"
    return f"{line.label}: {first} at first, {last} at last (steps {steps})."


def _readouts(axes: Axes, lines: Sequence[Line], scale: str) -> str:
    """JSON for the page's script: where the axes are in the drawing, and the values under the pointer."""
    width, height = (72 * inches for inches in SIZE_INCHES)
    left, bottom, across, up = PLOT_AREA
    curves = [
        {
            "label": line.label,
            "color": line.color,
            "steps": [round(step, 1) for step in curve.steps.tolist()],
            "values": [float(f"{value:.4g}") for value in curve.values.tolist()],
        }
        for line in lines
        for curve in [line.curve.thinned(MAX_READOUTS)]
    ]
    area = [left * width, (left + across) * width, (1 - bottom - up) * height, (1 - bottom) * height]
    shown = {
        "scale": scale,
        "steps": axes.get_xlim(),
        "area": [round(edge, 1) for edge in area],
        "lines": curves,
    }
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


def to_svg(figure: Figure, axes: Axes, lines: Sequence[Line], alt: str, scale: str) -> Markup:
    """The figure as an SVG element in the page's own font, its curves in words as its text alternative."""
    alt = f"{alt} {' '.join(_in_words(line, scale) for line in lines)}"
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The salt makes the ids of marker shapes differ between the drawings of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    drawing = buffer.getvalue()
    body = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    for pattern, replacement in _CLEANING:
        body = pattern.sub(replacement, body)
    body = re.sub(r"#f([0-9a-f]{2})e0d", lambda match: f"var(--{list(_STAND_INS)[int(match[1], 16)]})", body)
    body = re.sub(r"<[^>]+>", lambda tag: _LONG_NUMBER.sub(lambda n: f"{float(n[0]):.2f}", tag[0]), body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    # What the page's script shows under the pointer are curves over steps.
    readouts = f' data-readouts="{escape(_readouts(axes, lines, scale))}"' if lines else ""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}"{readouts}>{body}'
    )
