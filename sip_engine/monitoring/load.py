"""Read what runs left in their folders: settings, curves, and a sample of the judged pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import ValidationError

from sip_engine.config.schema import RunConfig
from sip_engine.monitoring.curves import LATEST_POOLS, Curves, RunState
from sip_engine.monitoring.records import METRICS, POOLS, checked_pool, read_records
from sip_engine.monitoring.sessions import Session, read_sessions, state_of
from sip_engine.monitoring.timeline import RankTimeline, read_timeline
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import read_json
from sip_engine.utils.jsonl import parse_object, tail_jsonl
from sip_engine.utils.regular import open_regular

CONFIG = "config.json"
RECORDS = (METRICS, POOLS, CONFIG)
MAX_POOLS = 200
MAX_POOLS_OF_LAST_STEP = 32


@dataclass(frozen=True)
class RunRecords(RunState):
    """What a run left behind."""

    pools: Sequence[dict[str, Any]]
    """At most `MAX_POOLS` evenly over the run and `MAX_POOLS_OF_LAST_STEP` of its last step, in order."""
    num_pools: int
    """How many the run recorded."""
    modified: float
    """Time of the newest record, seconds since the epoch."""
    state: str = ""
    """What it is doing, as `sessions.state_of` says it; empty where nothing tells."""
    sessions: Sequence[Session] = ()
    timeline: Sequence[RankTimeline] = ()
    """Of the first process all of it, of the others the last part."""


def load_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Load each folder once, named by the shortest end of its path that tells the runs apart.

    Raises:
        DataError: no folder is given, one holds no records, or a record is damaged.
    """
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not paths:
        raise DataError("no runs to report: give at least one run folder")
    names = _short_names(paths)
    return [_load_run(folder, name) for folder, name in zip(paths, names, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    depth, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def _load_run(folder: Path, name: str) -> RunRecords:
    found = [path for path in (folder / record for record in RECORDS) if path.exists()]
    if not any(path.stat().st_size for path in found):
        raise DataError(f"{folder}: holds no records ({', '.join(RECORDS)}); give the folder of a run")
    config, curves, sessions = (
        _read_config(folder / CONFIG),
        dict(_read_curves(folder / METRICS)),
        read_sessions(folder),
    )
    step = max((int(curve.steps[-1]) for curve in curves.values()), default=0)
    return RunRecords(
        name=name,
        config=config,
        curves=curves,
        **_read_pools(folder / POOLS),
        modified=max(path.stat().st_mtime for path in found),
        state=state_of(folder, sessions, step, config.get("steps")),
        sessions=sessions,
        timeline=read_timeline(folder, whole_ranks=1),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise DataError(f"{path}: a {type(config).__name__}, must be a JSON object; give the folder of a run")
    _check_types(config, path)
    return config


_OF_ANOTHER_TYPE = {
    "int_type",
    "int_from_float",
    "float_type",
    "bool_type",
    "string_type",
    "dict_type",
    "tuple_type",
    "model_type",
    "model_attributes_type",
}


def _check_types(config: dict[str, Any], path: Path) -> None:
    """Settings of another version are shown as they are, those of another type than ever are damage."""
    try:
        RunConfig.model_validate(_with_tuples(config), strict=True)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            if fault["type"] in _OF_ANOTHER_TYPE:
                where = ".".join(map(str, fault["loc"]))
                raise DataError(
                    f"{path}: {where}: {fault['msg']}; the run's settings are damaged, restore the file"
                ) from None


def _with_tuples(value: Any) -> Any:
    """As the settings hold it: JSON has no tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(one) for key, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _read_curves(path: Path) -> Curves:
    curves = Curves()
    for row in read_records(path):
        curves.add(row.pop("step"), row)
    return curves


def _read_pools(path: Path) -> dict[str, Any]:
    """The pools of a `RunRecords`: lines are indexed in one pass, only those that are wanted are parsed."""
    if not path.exists():
        return {"latest_pools": [], "pools": [], "num_pools": 0}
    with _opened(path) as file:
        starts = list(_line_starts(file))
        total = len(starts)
        latest = range(max(0, total - LATEST_POOLS), total)
        wanted = {*latest, *evenly(total, MAX_POOLS)}
        pools = {n: _pool_at(file, starts[n], f"{path}:{n + 1}") for n in sorted(wanted)}
    newest = [n for n in latest[-MAX_POOLS_OF_LAST_STEP:] if pools[n]["step"] == pools[total - 1]["step"]]
    shown = sorted({*newest, *evenly(total, MAX_POOLS)})
    return {
        "latest_pools": [pools[n] for n in latest],
        "pools": [pools[n] for n in shown],
        "num_pools": total,
    }


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None


def newest_values(path: Path) -> tuple[int, dict[str, float]]:
    """The last step of a metrics file, 0 where there is none, and each metric's newest value in its last part.

    Raises:
        DataError: a damaged line.
    """
    step, values = 0, {}
    for row in tail_jsonl(path) if path.exists() else ():
        number = row.pop("step", 0)
        step = max(step, number if isinstance(number, int) else 0)
        values |= {n: float(v) for n, v in row.items() if isinstance(v, int | float)}
    return step, values


def evenly(num_items: int, num_wanted: int) -> list[int]:
    """At most `num_wanted` indices of `num_items`, evenly spread from the first to the last."""
    wanted = min(num_items, num_wanted)
    return np.linspace(0, num_items - 1, wanted).round().astype(int).tolist() if wanted else []


def _line_starts(file: IO[bytes]) -> Iterator[int]:
    """Offsets of complete lines; one cut short by a crash is left out."""
    position = 0
    for line in file:
        if line.endswith(b"\n"):
            yield position
        position += len(line)


def _pool_at(file: IO[bytes], start: int, where: str) -> dict[str, Any]:
    file.seek(start)
    return checked_pool(parse_object(file.readline(), where), where)
