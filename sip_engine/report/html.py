"""Write the report: one HTML file that needs nothing else, whatever the texts in it contain."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sip_engine.monitoring.load import RunRecords, evenly, load_runs
from sip_engine.monitoring.signatures import all_signatures
from sip_engine.report.plots import all_plots
from sip_engine.report.speed import speed_table
from sip_engine.report.tables import comparison, overview
from sip_engine.report.timeline import timelines
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_atomic

MAX_PREFIX_CHARS = 4000
MAX_CANDIDATE_CHARS = 6000
MAX_POOL_BYTES = 4_000_000
"""Of the JSON of one run's pools; above it fewer pools are shown."""

# Inside <script> only these can end it or change how it is read; the last two end lines in old JavaScript.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def write_report(
    runs: Sequence[Path], out: Path, *, title: str, summary: dict[str, Any] | None = None
) -> Path:
    """Write the report of some run folders to `out` (HTML, a few MB at most) and return `out`.

    `summary` is what `sip_engine.experiments.quickstart.summarise` returns; with it the report begins with the
    comparison of base, standard and self-improving beside the paper's gains. Runs may lack any record, and
    may still be going.

    Raises:
        DataError: no run is given, a folder holds no records or damaged ones, or `out` is a folder.
    """
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of an HTML file to write")
    records = load_runs(runs)
    script = resources.files("sip_engine.report").joinpath("report.js").read_text(encoding="utf-8")
    page = _template().render(
        title=title,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison(summary) if summary else None,
        overview=overview(records),
        signatures=all_signatures(records),
        plots=all_plots(records),
        timelines=timelines(records),
        speed=speed_table(records),
        runs=records,
        settings={run.name: json.dumps(run.config, indent=1, ensure_ascii=False) for run in records},
        pools=script_json({"runs": [_pool_data(run) for run in records if run.pools]}),
        num_shown=sum(len(run.pools) for run in records),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    # Names of folders may hold bytes that are not UTF-8.
    write_atomic(out, page.encode("utf-8", "replace").decode("utf-8"))
    return out


def script_json(value: Any) -> Markup:
    """JSON that can stand inside a <script> element: nothing in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("sip_engine", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _pool_data(run: RunRecords) -> dict[str, Any]:
    """What the browser shows of a run's pools: long texts shortened, pools thinned to `MAX_POOL_BYTES`."""
    pools = [_shortened(pool) for pool in run.pools]
    size = len(json.dumps(pools, ensure_ascii=False).encode("utf-8", "replace"))
    if size > MAX_POOL_BYTES:
        pools = [pools[n] for n in evenly(len(pools), max(1, len(pools) * MAX_POOL_BYTES // size))]
    return {"name": run.name, "total": run.num_pools, "pools": pools}


def _shortened(pool: dict[str, Any]) -> dict[str, Any]:
    """The pool with the end of its prefix and the beginnings of its candidates; `cut_chars` count the rest."""
    prefix = str(pool["prefix"])
    candidates = []
    for candidate in pool["candidates"]:
        text = str(candidate.get("text", ""))
        left_out = max(0, len(text) - MAX_CANDIDATE_CHARS)
        candidates.append({**candidate, "text": text[:MAX_CANDIDATE_CHARS], "cut_chars": left_out})
    left_out = max(0, len(prefix) - MAX_PREFIX_CHARS)
    return {**pool, "prefix": prefix[left_out:], "cut_chars": left_out, "candidates": candidates}
