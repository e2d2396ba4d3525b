"""The report: curves and verdicts against plain computations, and a page that no text can break or run code in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_records import a_pool, records_of

from sip_engine.monitoring.curves import Curve
from sip_engine.monitoring.load import MAX_POOLS, RunRecords, load_runs
from sip_engine.monitoring.records import METRICS, POOLS, Records
from sip_engine.report import html as report_html
from sip_engine.report.html import script_json, write_report
from sip_engine.report.plots import all_plots, time_split
from sip_engine.report.svg import Line, draw_lines, running_mean
from sip_engine.report.tables import comparison, overview
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_json, write_jsonl

HOSTILE: tuple[str, ...] = (
    "</script><script>document.title = 'broken'</script>",
    "<!--<script>",
    "]]><img src=x onerror=alert(1)>",
    "\"'`><svg onload=alert(2)>",
    "\u2028\u2029\u0000\u202e{{ 7 * 7 }} {% raw %} ${x} &lt;b&gt; \\u003c",
    "naïve 漢字 \U0001f600",
)
VOID = {"meta", "line", "path", "use", "rect", "br", "input"}


class Page(HTMLParser):
    """The elements of a page and the text within those of some kinds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def a_run(
    folder: Path, rows: dict[int, dict[str, float]], pools: dict[int, list] | None = None, **config: Any
):
    """Write a run's records the way a run does."""
    records = Records(folder, from_step=0, enabled=True)
    for step, row in rows.items():
        records.metrics(step, row)
    records.close()
    write_jsonl(
        folder / POOLS,
        [{"step": step, **entry} for step, entries in (pools or {}).items() for entry in entries],
    )
    write_json(folder / "config.json", {"steps": 20, **config})
    return folder


def judged_rows(num_steps: int = 20) -> dict[int, dict[str, float]]:
    """Metrics of a short DPO run under the names that a run gives them."""
    rng, rows = np.random.default_rng(0), {}
    names = [
        *(f"{m}/{k}" for m in ("reward", "quality", "safety", "chosen", "rejected") for k in ("original", "rollout")),
        *(f"dpo/{role}_{what}" for role in ("chosen", "rejected") for what in ("logprob", "gain")),
        *("dpo/implicit_margin", "dpo/implicit_accuracy", "diversity/distinct_2", "diversity/entropy", "loss"),
        *("drift/mean", "drift/max", "seconds/generate", "seconds/judge", "seconds/update", "lr", "grad_norm"),
        *("pairs/dropped", "pairs/margin", "judge/failure_rate", "elapsed"),
    ]  # fmt: skip
    for step in range(1, num_steps + 1):
        rows[step] = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
    for step in (0, num_steps):
        rows[step] = rows.get(step, {}) | {
            f"eval/{name}": float(rng.random())
            for name in (
                "win_rate",
                "coherence",
                "factuality",
                "safety",
                "heldout_loss",
                "diversity",
                "true_claims",
            )
        }
    return rows


FEW_ROWS = {step: {"loss": 1 / step, "reward/rollout": 0.5 * step} for step in range(1, 9)}


def report_text(folders: list[Path], out: Path, **options: Any) -> str:
    return write_report(folders, out, title="t", **options).read_text(encoding="utf-8")


def pool_data(page: Page) -> Any:
    scripts = zip(page.attributes("script"), page.texts["script"], strict=True)
    (data,) = [text for attributes, text in scripts if attributes.get("type") == "application/json"]
    return json.loads(data)


# --- the page


def test_hostile_texts_stay_texts(tmp_path):
    """Every place that takes a text gets hostile ones: the page has the same elements as with harmless ones."""
    pages = []
    for name, texts in (("harmless", ["plain"] * len(HOSTILE)), ("hostile", list(HOSTILE))):
        folder = tmp_path / name / re.sub(r"[/\0]", "", texts[0])
        pools = {1: [a_pool(texts, prefix=text, failures=[text]) for text in texts]}
        a_run(
            folder,
            FEW_ROWS,
            pools,
            note=texts,
            objective={"kind": texts[0]},
            judge={"backend": texts[2]},
        )
        summary = {"base": {"win_rate": 0.5}, "seconds": {}, "notes": texts}
        out = write_report([folder], tmp_path / f"{name}.html", title=texts[0], summary=summary)
        pages.append((Page(out.read_text(encoding="utf-8")), texts))
    (harmless, _), (page, texts) = pages
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on") or a == "src"]
    shown = pool_data(page)["runs"][0]["pools"]
    assert [pool["prefix"] for pool in shown] == texts
    assert all([c["text"] for c in pool["candidates"]] == texts for pool in shown)
    assert page.texts["title"][0].startswith(texts[0])
    assert [text for text in page.texts["p"] if text in texts] == texts
    assert page.texts["h1"] == [texts[0]]
    assert json.loads(page.texts["pre"][0])["note"] == texts


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=8))
@example(["</script>", "<!--<script>", "<", ">", "&", "\u2028", "\u2029"])
@settings(max_examples=100)
def test_script_json_is_json_without_markup(value):
    text = str(script_json(value))
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_page_needs_nothing_else_and_runs_its_own_script_only(tmp_path):
    folder = a_run(tmp_path / "run", FEW_ROWS, {8: [a_pool()]})
    text = report_text([folder], tmp_path / "report.html")
    page = Page(text)
    assert not [
        a for _, attributes in page.tags for a in attributes if a in ("src", "srcset", "data", "action")
    ]
    links = {a["href"] for tag, a in page.tags if "href" in a}
    assert {link for link in links if not str(link).startswith("#")} == {"https://arxiv.org/abs/2601.21343"}
    targets = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert links - targets == {"https://arxiv.org/abs/2601.21343"}
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|innerHTML|document\.write|eval\(", text)
    (policy,) = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    own = page.texts["script"][-1]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in str(policy)


def test_ids_are_unique(tmp_path):
    runs = [a_run(tmp_path / name, FEW_ROWS, {8: [a_pool()]}) for name in ("a", "b")]
    page = Page(report_text(runs, tmp_path / "report.html"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) > 5 and len(set(ids)) == len(ids)


def test_every_recorded_curve_is_drawn(tmp_path):
    """Whatever the loop records for its charts is in one: names that drift apart would leave a chart out."""
    folder = a_run(tmp_path / "run", judged_rows(), candidates=[{"original": True, "rollouts": 2}])
    (run,) = load_runs([folder])
    drawn = [
        values
        for panel in (panel for plot in all_plots([run]) for panel in plot.panels)
        for values in re.findall(r"&#34;values&#34;:\[([^]]*)\]", str(panel.svg))
    ]
    for name, curve in run.curves.items():
        if name != "elapsed":
            wanted = ",".join(json.dumps(float(f"{value:.4g}")) for value in curve.values)
            assert wanted in drawn, name


# --- records that lack something


@pytest.mark.parametrize("missing", [METRICS, POOLS, "config.json"])
def test_a_missing_record_leaves_the_rest(tmp_path, missing):
    folder = a_run(tmp_path / "run", FEW_ROWS, {8: [a_pool()]})
    (folder / missing).unlink()
    page = Page(report_text([folder], tmp_path / "report.html"))
    assert ("figure" in page.texts) == (missing != METRICS)
    assert len(pool_data(page)["runs"]) == (missing != POOLS)


def test_a_running_run(tmp_path):
    """Lines that are still being written, NaN, text and null are left out; a single point is no obstacle."""
    folder = tmp_path / "run"
    a_run(folder, {1: {"loss": 3.0, "lr": 0.1}}, {1: [a_pool()]}, steps=50)
    with (folder / METRICS).open("a") as file:
        file.write(
            '{"step": 3, "loss": 1.0, "grad_norm": Infinity}\n{"step": 2, "loss": NaN, "lr": "high"}\n'
        )
        file.write('{"step": 4, "loss": null}\n{"step": 5, "lo')
    with (folder / POOLS).open("a") as file:
        file.write('{"step": 2, "prefix": "half')
    (run,) = load_runs([folder])
    assert set(run.curves) == {"loss", "lr"} and run.num_pools == 1
    assert run.curves["loss"].steps.tolist() == [1, 3] and run.curves["loss"].values.tolist() == [3.0, 1.0]
    assert overview([run])[0].progress == "3 of 50 steps (stopped)"
    report_text([folder], tmp_path / "report.html")


def test_equal_and_tiny_and_huge_values_are_drawn(tmp_path):
    values = {"lr": 3e-4, "loss": 1e30, "drift/mean": 0.0, "pairs/dropped": 0.0, "grad_norm": -2e-300}
    folder = a_run(tmp_path / "run", {step: values for step in range(1, 60)})
    text = report_text([folder], tmp_path / "report.html")
    assert "nan" not in re.sub(r"data-readouts=\"[^\"]*\"", "", text).lower().replace("nance", "")


@pytest.mark.parametrize(
    "content", ["[1]\n", '{"loss": 1}\n', "junk\n", '{"step": "x", "loss": 1}\n{"step": 1, "loss": 1}\n']
)
def test_damaged_metrics_are_named(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / METRICS).write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: ") as caught:
        write_report([folder], tmp_path / "report.html", title="t")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "content", ["{}\n", "[]\n", "junk\n", '{"step": 1, "prefix": "p", "candidates": 3}\n']
)
def test_damaged_pools_are_named(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / POOLS).write_text(content)
    with pytest.raises(DataError, match=r"pools\.jsonl:1: "):
        write_report([folder], tmp_path / "report.html", title="t")


@pytest.mark.parametrize("make_folder", [True, False])
def test_a_folder_without_records(tmp_path, make_folder):
    folder = tmp_path / "run"
    if make_folder:
        a_run(folder, {})
        for name in (METRICS, POOLS, "config.json"):
            (folder / name).write_text("")
    with pytest.raises(DataError, match="run: holds no records") as caught:
        write_report([folder], tmp_path / "report.html", title="t")
    assert "\n" not in str(caught.value)


def test_out_may_not_be_a_folder(tmp_path):
    folder = a_run(tmp_path / "run", FEW_ROWS)
    with pytest.raises(DataError, match="is a folder"):
        write_report([folder], tmp_path, title="t")


def test_runs_are_told_apart_by_the_shortest_names(tmp_path):
    a, b, c = (a_run(tmp_path / path, {1: {"loss": 1.0}}) for path in ("x/run", "y/run", "y/other"))
    assert [run.name for run in load_runs([a, c])] == ["run", "other"]
    assert [run.name for run in load_runs([a, b, a])] == ["x/run", "y/run"]


# --- what the curves and tables say


def test_thinned_curve_and_running_mean_against_loops():
    rng = np.random.default_rng(1)
    for size, most in ((1, 500), (499, 500), (1001, 500), (7, 3)):
        curve = Curve(np.arange(size, dtype=np.float64), rng.normal(size=size))
        width = next(w for w in range(1, size + 1) if -(-size // w) <= most)
        bins = [curve.values[i : i + width] for i in range(0, size, width)]
        np.testing.assert_allclose(curve.thinned(most).values, [b.mean() for b in bins], rtol=1e-12)
        for window in (0, 1, 5, 50):
            half = window // 2
            wanted = [curve.values[max(0, i - half) : i + half + 1].mean() for i in range(size)]
            np.testing.assert_allclose(running_mean(curve.values, window), wanted, rtol=1e-9, atol=1e-12)


def test_readouts_point_at_the_drawn_curve():
    """Where the page's script expects a step, the drawing has the point of that step."""
    values = np.array([1.0, 5.0, 2.0, 8.0, 3.0])
    svg = str(draw_lines([Line("l", "run-1", Curve(np.array([0, 10, 20, 30, 50.0]), values))], "alt"))
    (data,) = Page(svg).attributes("svg")
    shown = json.loads(str(data["data-readouts"]))
    left, right, top, bottom = shown["area"]
    low, high = shown["steps"]
    (path,) = re.findall(r'<path d="([^"]*)" style="fill: none; stroke: var\(--run-1\)', svg)
    points = np.array([[float(x) for x in point.split()] for point in re.findall(r"[ML] (\S+ \S+)", path)])
    steps = np.array(shown["lines"][0]["steps"])
    np.testing.assert_allclose(points[:, 0], left + (steps - low) / (high - low) * (right - left), atol=0.2)
    slope, offset = np.polyfit(values, points[:, 1], 1)
    assert slope < 0
    np.testing.assert_allclose(points[:, 1], offset + slope * values, atol=0.02)
    assert points[:, 1].min() > top and points[:, 1].max() < bottom


def test_time_split_stacks_parts_and_names_their_shares():
    run = records_of(seconds__generate=[3.0, 3.0], seconds__update=[1.0, 1.0])
    (panel,) = time_split([run]).panels
    assert panel.heading == "seconds a step (generate 75\u00a0%, update 25\u00a0%)"


def test_runs_from_different_checkpoints_are_not_overlaid():
    run = records_of(eval__heldout_loss=[3.0, 2.0])
    runs = [
        RunRecords(name, {"init": init}, run.curves, [], [], 0, 0.0)
        for name, init in (("base", None), ("one", "b"), ("two", "b"))
    ]
    (losses,) = all_plots(runs)
    assert [panel.heading for panel in losses.panels] == [
        "base: held-out loss, nats a token",
        "one, two: held-out loss, nats a token",
    ]


def test_comparison_shows_gains_beside_the_papers():
    summary = {
        "base": {"win_rate": 0.5, "factuality": 0.4, "safety": 0.0, "heldout_loss": 1.25},
        "standard": {"win_rate": 0.6, "factuality": 0.5, "safety": float("nan"), "heldout_loss": 1.0},
        "self_improving": {"win_rate": 0.75, "factuality": 0.45, "safety": 0.9, "heldout_loss": 1.125},
        "seconds": {"base": 59.6, "standard": 7384.0, "total": 61.0},
        "notes": ["Rules judged."],
    }
    table = comparison(summary)
    rows = {row.label: row for row in table.rows}
    assert list(rows) == ["quality win rate", "factuality", "safety", "held-out loss"]
    win, facts, safety, loss = rows.values()
    assert win.values == ("50.0\u00a0%", "60.0\u00a0%", "75.0\u00a0%")
    assert (win.over_base, win.over_standard) == ("+50.0\u00a0%", "+25.0\u00a0%")
    assert (facts.over_base, facts.over_standard) == ("+12.5\u00a0%", "−10.0\u00a0%")
    assert (facts.paper_over_base, facts.best) == ("+36.2\u00a0%", 1)
    assert (safety.over_base, safety.values[1], safety.paper_over_base) == ("–", "–", "+18.5\u00a0%")
    assert (loss.over_base, loss.over_standard, loss.best) == ("−0.125 nats", "+0.125 nats", 1)
    assert "86.3" in win.paper
    assert (table.times, table.total_time) == (("1 min 0 s", "2 h 3 min", "–"), "1 min 1 s")
    assert table.notes == ("Rules judged.",)


# --- the sample of pools


def test_pools_are_sampled_evenly_and_the_last_step_whole(tmp_path):
    pools = {step: [a_pool(prefix=f"{step} {n}") for n in range(8)] for step in range(1, 101)}
    (run,) = load_runs([a_run(tmp_path / "run", {1: {"loss": 1.0}}, pools)])
    steps = [pool["step"] for pool in run.pools]
    assert run.num_pools == 800 and MAX_POOLS <= len(steps) <= MAX_POOLS + 8
    assert steps == sorted(steps) and steps.count(100) == 8
    assert max(b - a for a, b in pairwise(steps)) <= 1
    assert len({pool["prefix"] for pool in run.pools}) == len(steps)


def test_long_texts_and_many_pools_are_shortened(tmp_path, monkeypatch):
    monkeypatch.setattr(report_html, "MAX_POOL_BYTES", 60_000)
    monkeypatch.setattr(report_html, "MAX_PREFIX_CHARS", 100)
    monkeypatch.setattr(report_html, "MAX_CANDIDATE_CHARS", 50)
    prefix, text = "a" * 300 + "z" * 100, "b" * 50 + "c" * 7
    pools = {step: [a_pool([text, " short"] * 4, prefix=prefix)] for step in range(1, 151)}
    page = Page(report_text([a_run(tmp_path / "run", {1: {"loss": 1.0}}, pools)], tmp_path / "report.html"))
    (run,) = pool_data(page)["runs"]
    assert run["total"] == 150 and 20 < len(run["pools"]) < 150
    assert len(json.dumps(run["pools"])) < 70_000
    assert (run["pools"][0]["step"], run["pools"][-1]["step"]) == (1, 150)
    pool = run["pools"][0]
    assert (pool["prefix"], pool["cut_chars"]) == ("z" * 100, 300)
    assert [(c["text"], c["cut_chars"]) for c in pool["candidates"][:2]] == [("b" * 50, 7), (" short", 0)]
