"""The page of a reproduction over made-up results: figures, verdicts and curves against plain computations."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sip_engine.experiments.reproduction import page as page_module
from sip_engine.experiments.reproduction.page import write_page
from sip_engine.experiments.reproduction.plan import Plan, arm_config, run_folder, scaled
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_json

HOSTILE = "<img src=x onerror=alert(1)></script><script>\"'`{{ 7 * 7 }} & \u2028"
VOID = {"meta", "line", "path", "use", "br", "img"}
JUDGE = {"backend": "local", "local": {"checkpoint": "root/judge"}}


class Page(HTMLParser):
    """A page's tables as rows of cells' texts by their label, its panels' drawings by heading, and all its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.panels: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self._label, self._heading = "", ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag not in VOID:
            self._open.append(tag)
        if named.get("role") == "region":
            self._label = str(named["aria-label"])
            self.tables[self._label] = []
        if tag == "tr":
            self.tables[self._label].append([])
        if tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        if tag == "h4":
            self._heading = ""
        if tag == "small":
            self.handle_data(" ")  # it is a block
        if tag == "svg" and named.get("role") == "img":
            self.panels.append((self._heading, named))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[self._label][-1][-1] += data
        if "h4" in self._open:
            self._heading += data

    def cells(self, table: str, row: str) -> list[str]:
        """The cells of the row whose name begins so, without its name."""
        (found,) = [cells for cells in self.tables[table] if cells and cells[0].strip().startswith(row)]
        return [" ".join(cell.split()) for cell in found[1:]]

    def alt(self, heading: str) -> str:
        (found,) = [str(svg["aria-label"]) for name, svg in self.panels if name == heading]
        return found


def a_plan(rows: Sequence[dict[str, Any]], **changes: Any) -> Plan:
    """Two tables; rows without `table` are in the first."""
    return Plan.model_validate(
        {
            "root": "root",
            "seeds": [1, 2, 3],
            "baseline": "base",
            "evaluation": {"judge": {"backend": "world"}},
            "common": {"init": "root/base", "steps": 40, "batch_size": 8, "world": {}, "judge": JUDGE},
            "stages": [{"name": name, "config": "c.toml"} for name in ("base", "judge")],
            "tables": [
                {"name": "main", "title": "Main", "figures": ["win_rate", "safety"]},
                {"name": "more", "title": "More", "figures": ["factuality"]},
            ],
            "rows": [{"label": f"row {row['name']}", "table": "main"} | row for row in rows],
        }
        | changes
    )


def a_cost(**changes: Any) -> dict[str, Any]:
    cost = {"steps": 40, "step_seconds": 0.5, "seconds": {"data": 0.1, "update": 0.4}, "elapsed": 20.0}
    return cost | {"peak_memory_mb": 100.0, "joules_per_step": None, "judge": {}} | changes


def a_result(
    plan: Plan, out: Path, name: str, seed: int, figures: Mapping[str, float], **changes: Any
) -> Path:
    """Write what a run of a row leaves, as the worker does; returns its folder."""
    row = next(row for row in plan.rows if row.name == name)
    folder = run_folder(out, row, seed)
    settings = arm_config(plan, row, seed, out).model_dump(mode="json")
    result = {"row": name, "seed": seed, "settings": settings, "figures": dict(figures), "num_prefixes": 300}
    result |= {"baseline": {"safety": 0.7, "factuality": 0.5}, "cost": a_cost()}
    write_json(folder / "result.json", result | changes)
    return folder


def metrics(folder: Path, rows: Mapping[int, Mapping[str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **values}) for step, values in rows.items()]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def written(plan: Plan, out: Path, failed: Mapping[str, str] | None = None) -> Page:
    path = write_page(plan, out, out / "reproduction.html", failed=failed or {})
    assert path == out / "reproduction.html"
    return Page(path.read_text(encoding="utf-8"))


# --- figures


def test_tables_show_means_and_deviations_beside_the_papers(tmp_path):
    rng = np.random.default_rng(0)
    plan = a_plan(
        [
            {"name": "a", "paper": {"win_rate": 86.3}, "also": ["more"]},
            {"name": "b", "paper": {"win_rate": 49.0, "safety": 75.5}},
            {"name": "c"},
        ]
    )
    values = rng.random((3, 3))
    for seed, (win, safety, factuality) in enumerate(values, start=1):
        a_result(plan, tmp_path, "a", seed, {"win_rate": win, "safety": safety, "factuality": factuality})
    for seed in (1, 3):
        a_result(plan, tmp_path, "b", seed, {"win_rate": seed / 4, "safety": 0.5})
    page = written(plan, tmp_path)

    means, deviations = 100 * values.mean(0), 100 * values.std(0, ddof=1)
    wanted = [f"{m:.1f} ± {d:.1f}" for m, d in zip(means, deviations, strict=True)]
    assert page.cells("Main", "row a") == [wanted[0], "86.3", wanted[1], "–"]
    assert page.cells("More", "row a") == [wanted[2], "–"]
    assert page.cells("Main", "row b") == ["50.0 ± 35.4 (n = 2)", "49.0", "50.0 ± 0.0 (n = 2)", "75.5"]
    assert page.cells("Main", "row c") == ["–"] * 4
    assert page.cells("Main", "base") == ["50.0", "50.0", "70.0", "76.9"]
    assert page.cells("More", "base") == ["50.0", "42.3"]
    names = [cells[0].split() for cells in page.tables["Main"] if cells[0].startswith("row ")]
    assert names == [["row", "a"], ["row", "b", "seed", "2", "not", "run"], ["row", "c", "not", "run"]]
    assert "5 of 9 runs done" in page.text and "300 held-out prefixes" in page.text


def test_targets_are_met_or_missed_by_the_mean(tmp_path):
    names = ("met", "missed", "near", "part", "none")
    target = {"figure": "safety", "at_least": 18.5, "relative": True}
    plan = a_plan(
        [{"name": name} for name in names],
        targets=[
            {"row": "met", "figure": "win_rate", "label": "win rate", "at_least": 86.3},
            *({"row": name, "label": f"safety of {name}", **target} for name in names[1:]),
        ],
    )
    for seed in (1, 2, 3):
        a_result(plan, tmp_path, "met", seed, {"win_rate": 0.86 + 0.01 * seed})
        a_result(plan, tmp_path, "missed", seed, {"safety": 0.56 + 0.007 * seed})
        a_result(plan, tmp_path, "near", seed, {"safety": 0.68 + 0.07 * seed})
    a_result(plan, tmp_path, "part", 2, {"safety": 0.84})
    page = written(plan, tmp_path)
    assert page.cells("Targets", "win rate") == ["≥ 86.3", "88.0 ± 1.0", "3 of 3", "met within seed noise"]
    assert page.cells("Targets", "safety of missed") == ["≥ +18.5", "−18.0 ± 1.0", "3 of 3", "missed"]
    near = page.cells("Targets", "safety of near")
    assert near == ["≥ +18.5", "+17.1 ± 10.0", "3 of 3", "missed within seed noise"]
    part = page.cells("Targets", "safety of part")
    assert part == ["≥ +18.5", "+20.0", "1 of 3", "met so far one seed: no deviation"]
    assert page.cells("Targets", "safety of none")[1:] == ["–", "0 of 3", "not run"]
    chosen = plan.model_copy(update={"rows": plan.rows[:1]})
    assert written(chosen, tmp_path).cells("Targets", "safety of near")[1:] == ["–", "0 of 3", "not run"]


def test_order_counts_pairs_and_lists_those_the_other_way(tmp_path):
    papers = {"a": 80.0, "b": 70.0, "c": 60.0, "d": 60.0, "e": 50.0}
    means = {"a": 0.5, "b": 0.9, "c": 0.51, "d": 0.1, "e": 0.09}
    plan = a_plan([{"name": name, "paper": {"win_rate": paper}} for name, paper in papers.items()])
    for name, mean in means.items():
        for seed, off in ((1, -0.02), (2, 0.0), (3, 0.02)):
            a_result(plan, tmp_path, name, seed, {"win_rate": mean + off})
    page = written(plan, tmp_path)
    # a > b is reversed, a > c and d > e within noise, the other six alike; c and d are tied in the paper.
    parted = ("ab", "ac", "ad", "ae", "bc", "bd", "be", "ce", "de")
    tau = sum(1 if means[x] > means[y] else -1 for x, y in parted) / (9 * 10) ** 0.5
    counts = page.cells("Order of rows", "quality win rate")
    assert counts == ["9", "7", "6", "1", "2", f"{tau:+.2f}"]
    text = " ".join(page.text.split())
    assert (
        "of 9 pairs of rows that the paper parts, our means order 7 alike. Beyond seed noise are 6 of them alike and "
        "1 the other way; 2 are undecided. If no two rows differed, about 0.45 would be beyond seed noise by chance "
        "(5 % of the 9 pairs with two seeds or more on both sides)."
    ) in text
    assert "clear" not in " ".join(
        page.text.split("Where the order agrees")[1].split("Cost of a step")[0].split()
    )
    error = 100 * 0.02 / 3**0.5 * 2**0.5
    listed = [" ".join(" ".join(cells).split()) for cells in page.tables["Pairs ordered the other way"][1:]]
    assert listed == [
        f"row a > row b Main quality win rate +10.0 −40.0 ± {error:.1f} beyond seed noise",
        f"row a > row c Main quality win rate +20.0 −1.0 ± {error:.1f} within seed noise",
    ]


def test_partial_and_empty_results(tmp_path):
    plan = a_plan([{"name": "a", "paper": {"win_rate": 1.0}}, {"name": "b", "paper": {"win_rate": 2.0}}])
    failed = {
        "stage judge": f"out of memory {HOSTILE}",
        "a, seed 2": f"drift {HOSTILE}",
        "b, seed 1": "judge failed",
    }
    page = written(plan, tmp_path, failed)
    text = " ".join(page.text.split())
    assert "0 of 6 runs done" in text and not page.panels
    assert f"stage judge failed: out of memory {' '.join(HOSTILE.split())}" in text
    assert "row a seeds 1, 3 not run" in text
    assert f"seed 2 failed: drift {' '.join(HOSTILE.split())}" in text
    assert "row b seeds 2, 3 not run seed 1 failed: judge failed" in text
    assert "No run is done yet." in text and "No two rows of a table" in text and "names no targets" in text
    a_result(plan, tmp_path, "a", 1, {"win_rate": 0.6})
    a_result(plan, tmp_path, "b", 2, {"win_rate": 0.5})
    page = written(plan, tmp_path)
    assert page.cells("Main", "row a") == ["60.0 (n = 1)", "1.0", "–", "–"]
    (listed,) = page.tables["Pairs ordered the other way"][1:]
    assert listed[-1] == "undecided a row has one seed only"


@pytest.mark.parametrize(("rows", "seeds"), [([], [1, 2]), ([{"name": "a"}], []), ([], [])])
def test_plans_without_rows_or_seeds(tmp_path, rows, seeds):
    # No file can say so; but a page may be asked for less than its plan.
    plan = a_plan([{"name": "a"}])
    left = {"rows": plan.rows if rows else (), "seeds": tuple(seeds), "targets": ()}
    page = written(plan.model_copy(update=left), tmp_path)
    text = " ".join(page.text.split())
    assert "0 of 0 runs done" in text and "No pair of rows" in text
    assert f"seeds {'1, 2' if seeds else 'none'} Written" in text
    assert ("No row was chosen." in text) == (not rows)
    assert page.cells("Main", "base")[0] == "–"


def test_what_deviations_leave_out_is_told(tmp_path):
    plan = a_plan([{"name": "a"}])
    assert "over training seeds only" in written(plan, tmp_path).text
    a_result(plan, tmp_path, "a", 1, {"win_rate": 0.5})
    a_result(plan, tmp_path, "a", 2, {"win_rate": 0.5}, num_prefixes=100)
    text = " ".join(written(plan, tmp_path).text.split())
    sides = [100 * np.std([0.0, 1.0]) / np.sqrt(n) for n in (100, 300)]
    assert f"about ± {sides[0]:.1f} for 100, ± {sides[1]:.1f} for 300 prefixes" in text


def test_next_token_rows_name_their_loss_where_it_differs(tmp_path):
    def loss(*, on: str) -> dict[str, Any]:
        return {"objective": {"kind": "next_token", "loss_on": on}}

    rows = [{"name": "a", "set": loss(on="all")}, {"name": "b", "set": loss(on="suffix")}, {"name": "c"}]
    names = [
        " ".join(cells[0].split())
        for cells in written(a_plan(rows), tmp_path).tables["Main"]
        if len(cells) > 4
    ]
    assert names[1:] == [
        "row a loss on all tokens (objective.loss_on) not run",
        "row b loss on the suffix only (objective.loss_on) not run",
        "row c not run",
    ]
    same = [rows[0], rows[1] | {"set": loss(on="all")}]
    assert "loss on" not in written(a_plan(same), tmp_path).text


def test_target_of_no_row_is_refused():
    with pytest.raises(ValueError, match="there is no row 'b'"):
        a_plan(
            [{"name": "a"}], targets=[{"row": "b", "figure": "safety", "label": "safety", "at_least": 1.0}]
        )


def test_short_runs_are_said_to_mean_nothing(tmp_path):
    plan = scaled(a_plan([{"name": "a"}]), 0.05)
    assert "Shortened to 0.05 of its steps" in written(plan, tmp_path).text
    assert "Shortened" not in written(a_plan([{"name": "a"}]), tmp_path).text


def test_texts_stay_texts_and_nothing_is_loaded(tmp_path):
    plan = a_plan(
        [
            {"name": "a", "label": HOSTILE, "set": {"judge": {"schedule": "pivot"}}},
            {"name": "b", "label": HOSTILE},
        ],
        tables=[{"name": "main", "title": HOSTILE, "figures": ["win_rate"]}],
        targets=[{"row": "a", "figure": "win_rate", "label": HOSTILE, "at_least": 1.0}],
    )
    for name, calls in (("a", 7.0), ("b", 28.0)):
        folder = a_result(
            plan, tmp_path, name, 1, {"win_rate": 0.5}, cost=a_cost(judge={"calls_per_prefix": calls})
        )
        metrics(folder, {step: {"chosen/original": 0.2, "chosen/rollout": 0.8} for step in range(1, 5)})
    stage = {"settings": {"task": "judge"}, "evaluations": [{"step": 0, "eval/<b>": 1.0, "eval/x": HOSTILE}]}
    write_json(tmp_path / "judge" / "stage.json", stage)
    page = written(plan, tmp_path, {"a, seed 2": HOSTILE})
    assert " ".join(HOSTILE.split()) in " ".join(page.tables[HOSTILE][3][0].split())
    assert {heading.split(": chosen")[0] for heading, _ in page.panels} == {HOSTILE, f"{HOSTILE}; {HOSTILE}"}
    tags = [tag for tag, _ in page.tags]
    assert not {"img", "link", "b", "iframe"} & set(tags) and tags.count("script") == 1
    links = [
        value for _, named in page.tags for key, value in named.items() if key in ("src", "href") and value
    ]
    assert {link for link in links if not link.startswith("#")} == {"https://arxiv.org/abs/2601.21343"}
    text = (tmp_path / "reproduction.html").read_text(encoding="utf-8")
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [str(named["content"]) for _, named in page.tags if "http-equiv" in named]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "the whole"),
        ("{}", "figures"),
        ('{"figures": {"win_rate": NaN}, "baseline": {}, "num_prefixes": 1, "cost": {}}', "figures.win_rate"),
    ],
)
def test_damaged_result_is_one_clear_line(tmp_path, text, why):
    plan = a_plan([{"name": "a"}])
    path = a_result(plan, tmp_path, "a", 2, {}) / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(why)) as caught:
        written(plan, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "remove" in str(caught.value)
    assert not (tmp_path / "reproduction.html").exists()


# --- plots


def test_chosen_rate_is_the_mean_over_finished_seeds(tmp_path):
    plan = a_plan(
        [
            {"name": "a", "label": "continual"},
            {"name": "b", "label": "fresh", "unset": ["init"]},
            {"name": "c", "label": "one kind", "set": {"candidates": [{"original": False, "rollouts": 4}]}},
            {"name": "d", "label": "unjudged", "set": {"objective": {"kind": "sft_rollout"}}},
        ]
    )
    rates = np.random.default_rng(0).random((3, 10))
    for name in "abcd":
        for seed in (1, 2, 3):
            folder = run_folder(tmp_path, plan.rows["abcd".index(name)], seed)
            if seed < 3:
                a_result(plan, tmp_path, name, seed, {})
            # Step 4 of seed 1 has no pair at all.
            metrics(
                folder,
                {
                    step + 1: {"chosen/rollout": rate, "chosen/original": 1 - rate}
                    for step, rate in enumerate(rates[seed - 1].tolist())
                    if (seed, step) != (1, 3)
                },
            )
    page = written(plan, tmp_path)
    assert [heading for heading, _ in page.panels] == ["continual", "fresh"]
    for _, svg in page.panels:
        lines = {line["label"]: line for line in json.loads(str(svg["data-readouts"]))["lines"]}
        rollout = lines["rollout"]
        assert rollout["steps"] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
        np.testing.assert_allclose(rollout["values"], np.delete(rates[:2].mean(0), 3), atol=1e-4)
        assert set(lines["rollout in the pool"]["values"]) == {0.8889}
    assert "Chosen rate by kind, continual" in page.text
    assert "Chosen rate by kind, from scratch" in page.text


def points(svg: str, color: str) -> np.ndarray:
    """Centres of the markers drawn in a colour, [n, 2] in the drawing's units."""
    uses = re.findall(r"<use ([^>]*)/>", svg)
    marked = [dict(re.findall(r'(\w+)="([^"]*)"', use)) for use in uses if f"var(--{color})" in use]
    return np.array([[float(use["x"]), float(use["y"])] for use in marked])


def test_rollouts_plot_stands_where_the_figures_are(tmp_path):
    def rows(
        prefix: str, weights: dict[str, float], figure: str, paper: dict[int, float]
    ) -> list[dict[str, Any]]:
        return [
            {
                "name": f"{prefix}{n}",
                "paper": {figure: value},
                "set": {"candidates": [{"original": False, "rollouts": n}], "judge": {"weights": weights}},
            }
            for n, value in paper.items()
        ]

    paper = {2: 69.9, 4: 75.5, 8: 84.3, 16: 86.3}
    quality = rows("q", {"quality": 1.0, "factuality": 0.0, "safety": 0.0}, "win_rate", paper)
    factual = rows("f", {"quality": 1.0, "factuality": 1.0, "safety": 0.0}, "factuality", {2: 46.2, 8: 56.9})
    plan = a_plan([*quality, *factual])
    ours, deviations = np.array([0.55, 0.6, 0.7]), np.array([0.01, 0.03, 0.02])
    for n, mean, deviation in zip((2, 4, 16), ours, deviations, strict=True):
        for seed, off in ((1, -deviation), (2, 0.0), (3, deviation)):
            a_result(plan, tmp_path, f"q{n}", seed, {"win_rate": mean + off, "factuality": 0.1})
    a_result(plan, tmp_path, "f2", 1, {"win_rate": 0.9, "factuality": 0.4})
    page = written(plan, tmp_path)
    assert [heading for heading, _ in page.panels] == [
        "quality win rate, judged for quality",
        "factuality, judged for quality + factuality",
    ]
    alt = page.alt("quality win rate, judged for quality")
    assert "ours 2: 55.0 ± 1.0 %, 4: 60.0 ± 3.0 %, 16: 70.0 ± 2.0 %" in alt
    assert "the paper's 2: 69.9 %, 4: 75.5 %, 8: 84.3 %, 16: 86.3 %" in alt
    assert "ours 2: 40.0 %; the paper's 2: 46.2 %, 8: 56.9 %" in page.alt(
        "factuality, judged for quality + factuality"
    )

    text = (tmp_path / "reproduction.html").read_text(encoding="utf-8")
    svg = text[text.index('role="img" aria-label="quality win rate') :].split("</svg>")[0]
    theirs = points(svg, "run-5")
    across = np.polyfit(np.log2(list(paper)), theirs[:, 0], 1)
    up = np.polyfit(list(paper.values()), theirs[:, 1], 1)
    assert across[0] > 0 > up[0]
    np.testing.assert_allclose(theirs[:, 0], np.polyval(across, [1, 2, 3, 4]), atol=0.05)
    drawn = points(svg, "run-2")
    centres = np.stack([np.polyval(across, [1, 2, 4]), np.polyval(up, 100 * ours)], 1)
    lower, upper = (np.polyval(up, 100 * (ours + side * deviations)) for side in (-1, 1))
    ends = [np.stack([centres[:, 0], end], 1) for end in (lower, upper)]
    wanted = np.concatenate([centres, *ends])
    assert len(drawn) == len(wanted)
    for point in wanted:
        assert np.abs(drawn - point).max(1).min() < 0.1, point


def test_schedules_are_compared_where_nothing_else_differs(tmp_path):
    plan = a_plan(
        [
            {"name": "all", "label": "all", "paper": {"win_rate": 84.3}},
            {
                "name": "pivot",
                "label": "pivot",
                "paper": {"win_rate": 72.1},
                "set": {"judge": {"schedule": "pivot"}},
            },
            {"name": "tour", "label": "tour", "set": {"judge": {"schedule": "tournament", "budget": 0.5}}},
            {
                "name": "other",
                "label": "other",
                "set": {"judge": {"schedule": "pivot"}, "candidates": [{"rollouts": 4}]},
            },
        ]
    )
    for name, calls, win in (
        ("all", 36.0, 0.8),
        ("pivot", 8.0, 0.6),
        ("tour", 14.5, 0.75),
        ("other", 4.0, 0.1),
    ):
        for seed in (1, 2):
            cost = a_cost(judge={"calls_per_prefix": calls + seed - 1.5, "tokens_per_prefix": 12345.6})
            a_result(plan, tmp_path, name, seed, {"win_rate": win}, cost=cost)
    page = written(plan, tmp_path)
    assert [heading for heading, _ in page.panels] == ["all; pivot; tour"]
    alt = page.alt("all; pivot; tour")
    assert "judge calls a prefix: ours 36: 80.0 ± 0.0 %, 8: 60.0 ± 0.0 %, 14.5: 75.0 ± 0.0 %" in alt
    assert "the paper's 36: 84.3 %, 8: 72.1 %." in alt
    assert page.cells("Cost of a step", "tour")[-2:] == ["14.5", "12,346"]


# --- costs, stages, signatures


def test_cost_is_against_standard_pretraining_from_the_same_beginning(tmp_path):
    next_token = {"objective": {"kind": "next_token"}}
    plan = a_plan(
        [
            {"name": "standard", "label": "standard", "set": next_token},
            {"name": "dpo", "label": "dpo", "set": {"sampler": {"kv_memory_mb": 64}}},
            {"name": "fresh", "label": "fresh", "unset": ["init"], "set": {"batch_size": 4}},
            {"name": "plain", "label": "plain", "unset": ["init"], "set": {"batch_size": 16, **next_token}},
        ]
    )
    parts = {"data": 0.1, "generate": 0.6, "judge": 0.25, "judge_busy": 0.2, "grade": 0.05, "update": 0.5}
    for seed, seconds in ((1, 1.0), (2, 2.0)):
        a_result(plan, tmp_path, "standard", seed, {}, cost=a_cost(step_seconds=0.5, joules_per_step=20.0))
        cost = a_cost(step_seconds=seconds, seconds=parts, peak_memory_mb=1250.0, joules_per_step=30.0)
        a_result(plan, tmp_path, "dpo", seed, {}, cost=cost)
    a_result(plan, tmp_path, "fresh", 1, {})
    page = written(plan, tmp_path)
    heads = page.tables["Cost of a step"][0]
    assert heads[3:8] == [f"of them {part}" for part in ("data", "generate", "judge", "update", "grade")]
    text = " ".join(page.text.split())
    assert "memory and joules are of the whole training" in text
    assert "the KV pages that sampler.kv_memory_mb reserves (64, 1024 MiB)" in text
    dpo = page.cells("Cost of a step", "dpo")
    assert dpo == [
        "8",
        "1.5 × 3.00",
        "0.1",
        "0.6",
        "0.25",
        "0.5",
        "0.05",
        "1,250 × 12.50",
        "30 × 1.50",
        "–",
        "–",
    ]
    assert page.cells("Cost of a step", "fresh")[:2] == ["4", "0.5"]
    assert page.cells("Cost of a step", "fresh")[8] == "not reported by this machine"
    a_result(plan, tmp_path, "plain", 1, {}, cost=a_cost(step_seconds=2.0))
    fresh = written(plan, tmp_path).cells("Cost of a step", "fresh, from scratch")
    assert fresh[:2] == ["4 standard: 16", "0.5 × 0.25"]


def test_stages_show_every_evaluation(tmp_path):
    plan = a_plan([{"name": "a"}])
    evaluations = [
        {"step": step, "eval/accuracy_quality": 0.5 + step / 1000, "eval/x/low": 0.0, "elapsed": 1.0}
        for step in (0, 100, 250)
    ]
    evaluations[1]["eval/overlap_safe"] = 0.98765
    stage = {
        "settings": {"task": "judge"},
        "cost": a_cost(steps=250, elapsed=90.0),
        "evaluations": evaluations,
    }
    write_json(tmp_path / "judge" / "stage.json", stage)
    write_json(tmp_path / "base" / "stage.json", stage | {"settings": {"task": "policy"}})
    page = written(plan, tmp_path)
    assert page.tables["Evaluations of judge"] == [
        ["step", "accuracy quality", "overlap safe"],
        ["0", "0.5", "–"],
        ["100", "0.6", "0.988"],
        ["250", "0.75", "–"],
    ]
    assert "Evaluations of base" not in page.tables
    assert "250 steps in 1.5 minutes" in page.text


def test_signatures_of_every_run_also_of_those_that_failed(tmp_path):
    plan = a_plan([{"name": "a"}, {"name": "b"}])

    def falling(end: float, monitor: dict[int, float]) -> dict[int, dict[str, float]]:
        values = np.linspace(1.0, end, 20).tolist()
        return {
            step: {"diversity/distinct_2": value, "reward/rollout": float(step), "drift/mean": 1e-6}
            | ({"monitor/falling_diversity": monitor[step]} if step in monitor else {})
            for step, value in enumerate(values, start=1)
        }

    for seed, end, monitor in (
        (1, 1.0, {5: 0.0, 10: 0.0}),
        (2, 0.2, {5: 0.0, 10: 1.0, 15: 1.0}),
        (3, 0.7, {15: 1.0}),
    ):
        metrics(a_result(plan, tmp_path, "a", seed, {}), falling(end, monitor))
    metrics(run_folder(tmp_path, plan.rows[1], 3), falling(0.9, {}))
    metrics(tmp_path / "judge", {step: {"drift/mean": 0.04} for step in range(1, 5)})
    page = written(plan, tmp_path, {"b, seed 3": "stopped"})
    heads = page.tables["Failure signatures"][0]
    fall, drift = (
        heads.index(head) - 1
        for head in ("Reward rising while diversity falls", "Sampler and trainer drifting apart")
    )
    a, b = page.cells("Failure signatures", "row a"), page.cells("Failure signatures", "row b")
    assert (a[fall], a[drift]) == ("seen 1 of 3 monitor: 2 runs, first at step 10", "clear 3 of 3")
    assert (b[fall], b[drift]) == ("clear", "clear")
    assert a.count("–") == b.count("–") == len(heads) - 3
    assert page.cells("Failure signatures", "stage judge")[drift] == "seen"
    evidence = [text.strip() for text in page.text.split("\n") if "(seen)" in text or "(watch)" in text]
    assert [text.split(" (")[0] for text in evidence] == [
        "row a, seed 2, falling diversity",
        "row a, seed 3, falling diversity",
        "stage judge, drift",
    ]
    assert "drift 0.5" in page.text.split("Settings of all runs")[1]


def test_records_are_read_again_only_if_they_changed(tmp_path, monkeypatch):
    plan = a_plan([{"name": "a"}])
    rows = {step: {"drift/mean": 1e-6} for step in range(1, 5)}
    folders = [a_result(plan, tmp_path, "a", seed, {}) for seed in (1, 2)]
    for folder in folders:
        metrics(folder, rows)
    loaded, load = [], page_module.load_runs
    monkeypatch.setattr(page_module, "load_runs", lambda paths: loaded.extend(paths) or load(paths))
    page = written(plan, tmp_path)
    drift = page.tables["Failure signatures"][0].index("Sampler and trainer drifting apart") - 1
    assert page.cells("Failure signatures", "row a")[drift] == "clear 2 of 2"
    written(plan, tmp_path)
    assert loaded == folders
    metrics(folders[1], {**rows, 5: {"drift/mean": 0.045}})
    assert written(plan, tmp_path).cells("Failure signatures", "row a")[drift] == "seen 1 of 2"
    assert loaded == [*folders, folders[1]]


def test_what_judged_is_told_as_it_was(tmp_path):
    world = {"judge": {"backend": "world"}}
    truth = {"common": {"init": "root/base", "world": {}, **world}}
    text = written(a_plan([{"name": "a"}]), tmp_path).text
    assert (
        "The world's own truth measured the final results only" in text and "local (judge) in 1 row" in text
    )
    assert "the same rules" not in " ".join(text.split())
    rows = [{"name": "a"}, {"name": "b"}, {"name": "plain", "set": {"objective": {"kind": "next_token"}}}]
    text = " ".join(written(a_plan(rows, **truth), tmp_path).text.split())
    assert "measured the final results;" in text and "world in 2 rows" in text and "the truth itself" in text
    same = 'of {} judged rows (judge.backend "world") the same rules judged the candidates in training and measured'
    assert f"In 2 {same.format(2)} the result" in text and "No judged row had another judge" in text
    rows.append({"name": "t", "set": {"judge": JUDGE}, "unset": ["init"]})
    text = " ".join(written(a_plan(rows, **truth), tmp_path).text.split())
    assert f"In 2 {same.format(3)} the result" in text
    assert "Another judge in training: row t, from scratch – local (judge)." in text
