"""The results of all items as one Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sip_engine.utils.files import write_atomic

TABLE = "table.md"
COLUMNS = ("item", "what", "measured", "predicted", "target", "peer", "")


def write_table(out: Path, ends: Sequence[dict[str, Any]], kind: str) -> Path:
    """`out`/table.md, of the ends of items as `results.jsonl` has them."""
    device = next(
        (figure["measured"] for end in ends for figure in end["figures"] if figure["name"] == "device"),
        "unknown device",
    )
    lines = [f"# GPU acceptance run: {device}", ""]
    if kind == "rehearsal":
        lines += [
            "**A rehearsal** on an emulated device, at tiny sizes: no figure of the column `measured` says anything "
            "about a GPU. The column `predicted` is for the real sizes.",
            "",
        ]
    heads = [name if name != "measured" or kind != "rehearsal" else "rehearsed" for name in COLUMNS]
    lines += ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for end in ends:
        status = f"{end['status']} in {end['seconds']} s"
        lines.append(_row(end["item"], f"**{end['title']}**", status, "", "", "", end["reason"]))
        for figure in end["figures"]:
            unit = f" {figure['unit']}" if figure["unit"] else ""
            predicted = "" if figure["predicted"] is None else f"{figure['predicted']:g}{unit}"
            note = "; ".join(filter(None, ["" if figure["ok"] else "MISSED", figure["note"]]))
            measured = figure["measured"]
            shown = f"{measured:.4g}" if isinstance(measured, float) else str(measured)
            lines.append(
                _row("", figure["name"], shown + unit, predicted, figure["target"], figure["peer"], note)
            )
    commits = ", ".join(sorted({end["commit"] for end in ends}))
    lines += ["", f"Commit {commits}. Predictions: `python -m sip_engine.kernels.compile_report`."]
    write_atomic(out / TABLE, "\n".join(lines) + "\n")
    return out / TABLE


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
