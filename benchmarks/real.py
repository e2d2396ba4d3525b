"""The figures of a `sip real` as a CSV file: measures nothing, reads the run's summary.json.

    sip real --minutes 10 && python -m benchmarks real --run runs/real

A row a figure and arm, with its 95 % interval over held-out prefixes; `gain` rows are self-improving less next-token
training, prefix by prefix. Of a judge that was trained, a row for every exam and stage; there `gain` is trained less
as it comes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, header, write_csv
from sip_engine.utils.errors import DataError, SipError
from sip_engine.utils.files import check_writable, read_json

_ROWS = {
    "base": "base",
    "standard": "standard",
    "self_improving": "self_improving",
    "gain": "self_improving_less_standard",
}


def rows_of(summary: dict[str, Any]) -> Iterator[dict[str, object]]:
    """A row for every figure and arm of every experiment in a summary, and for every exam of a trained judge."""
    spent = {
        "minutes": summary["minutes"],
        "wall_s": round(summary["wall_seconds"]),
        "cpu_s": round(summary["cpu_seconds"]),
    }
    for experiment, found in summary["experiments"].items():
        for figure, values in found["figures"].items():
            for arm, key in _ROWS.items():
                value = values[key]
                ends = value if isinstance(value, dict) else {"value": value}
                yield {
                    "experiment": experiment,
                    "figure": figure,
                    "arm": arm,
                    **{name: ends.get(name, "") for name in ("value", "low", "high", "n")},
                    "against_standard": values["against_standard"] if arm == "gain" else "",
                    "seeds": len(values["by_seed"]["self_improving"]),
                    **spent,
                }
    judge = summary.get("judge", {"accuracy": {}})
    for name, accuracy in judge["accuracy"].items():
        for who, ends in {**accuracy, "gain": judge["trained_less_before"][name]}.items():
            yield {
                "experiment": "judge",
                "figure": f"accuracy, {name}",
                "arm": who,
                **{end: ends[end] for end in ("value", "low", "high", "n")},
                "against_standard": "",
                "seeds": 1,
                **spent,
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Read the summary, write the CSV file; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `sip real`")
    parser.add_argument("--out", type=Path, default=RESULTS / "real.csv", help="CSV file")
    args = parser.parse_args(argv)
    try:
        check_writable(args.out)
        summary = read_json(args.run / "summary.json")
        try:
            rows = list(rows_of(summary))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{args.run}: its summary.json is none of `sip real` ({error})") from None
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_csv(args.out, [{**header("real"), **row} for row in rows])
    print(args.out)
    return 0
