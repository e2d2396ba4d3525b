"""Monitors look at what the run has in hand; they must see what its report reads in the files, resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import start_mesh
from sip_engine.monitoring.curves import LATEST_POOLS, RunState
from sip_engine.monitoring.load import load_runs
from sip_engine.monitoring.monitors import Monitors
from sip_engine.monitoring.records import METRICS, POOLS, Records
from sip_engine.monitoring.signatures import UNKNOWN, all_signatures
from sip_engine.types import Candidate, Cost, Kind, Sample, Verdict
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_json

NAMES = (
    *("eval/safety", "eval/coherence", "safety/rollout", "quality/rollout", "reward/rollout", "drift/mean"),
    *(
        "diversity/distinct_2",
        "diversity/entropy",
        "dpo/chosen_gain",
        "dpo/rejected_gain",
        "dpo/chosen_logprob",
        "eval/heldout_loss_faultless",
        "eval/relative_diversity",
        "copied/rollout",
        "copied/document",
    ),
)


def config(folder: Path) -> RunConfig:
    return RunConfig.model_validate({"out": folder, "steps": 99, "monitors": {"every": 1}})


def record(records: Records, step: int) -> None:
    """What a step writes down, by the step alone: falling, jumping and missing figures, and some pools."""
    draw = np.random.default_rng(step)
    named = {name: float(draw.normal(-step if "gain" in name else 1 / step, 0.1)) for name in NAMES}
    if step % 7 == 0:
        named["drift/mean"] = float("nan")
    records.metrics(step, {name: value for name, value in named.items() if draw.random() < 0.8})
    none = np.zeros(0, np.int32)
    samples = [Sample(0, 0, none, none, "Once", "more") for _ in range(int(draw.integers(0, 12)))]
    pools, verdicts = [], []
    for _ in samples:
        texts = ["It ended." if draw.random() < 0.5 else "It went on and" for _ in range(4)]
        pools.append([Candidate(Kind.ROLLOUT, n, none, text) for n, text in enumerate(texts)])
        wins = [(i, j, float(draw.choice([0.0, 1 / 3, 1.0]))) for i in range(4) for j in range(i)]
        unknown = (None,) * 4
        pairs = (*wins, (0, 1, None))
        verdicts.append(Verdict(unknown, unknown, unknown, unknown, (False,) * 4, pairs, (), Cost()))
    records.pools(step - 1, samples, pools, verdicts, [None] * len(samples))


def findings(state: RunState) -> list[Any]:
    return [[(found.verdict, found.evidence) for found in s.findings] for s in all_signatures([state])]


def in_hand(records: Records, cfg: RunConfig) -> RunState:
    return RunState("", cfg.model_dump(mode="json"), records.curves, tuple(records.latest_pools))


@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(1, 59), max_size=3), last=st.just(60))
def test_a_run_in_hand_is_a_run_in_its_files(tmp_path_factory, stops: list[int], last: int) -> None:
    """However often it stops, a few steps behind its records, and goes on from an earlier checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    cfg = config(folder)
    write_json(folder / "config.json", cfg.model_dump(mode="json"))
    step = 0
    for stop in [*stops, last]:
        records = Records(folder, from_step=step + (step > 0), enabled=True)
        while step < stop:
            step += 1
            record(records, step)
            if step % 20 == 0:
                (run,) = load_runs([folder])
                assert findings(in_hand(records, cfg)) == findings(run)
        records.close()
        if stop != last:
            step = max(0, step - 3)
    (run,) = load_runs([folder])
    assert findings(in_hand(records, cfg)) == findings(run)
    assert list(records.latest_pools) == list(run.latest_pools) and len(run.latest_pools) == LATEST_POOLS
    told = [verdicts[0][0] for verdicts in findings(run)]
    assert len(told) == 7 and UNKNOWN not in told, "the test should reach every signature"


def test_a_signature_is_said_once_over_restarts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, mesh = config(tmp_path), start_mesh()
    for step in (1, 2, 3):
        records = Records(tmp_path, from_step=step, enabled=True)
        monitors = Monitors(cfg, records, mesh)
        records.metrics(step, {"drift/mean": 1.0})
        found = monitors.check(step)
        assert found == {"monitor/drift": 1.0}
        records.metrics(step, found)
        records.close()
    assert capsys.readouterr().err.count("watch out:") == 1


@pytest.mark.parametrize("name", [METRICS, POOLS])
@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "1"}', b"\xff", "[" * 100_000])
def test_a_damaged_line_is_named_whoever_reads_it(tmp_path: Path, name: str, line: str | bytes) -> None:
    records = Records(tmp_path, from_step=0, enabled=True)
    record(records, 4)
    records.close()
    path = tmp_path / name
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines, line if isinstance(line, bytes) else line.encode(), b""]))
    for read in (lambda: Records(tmp_path, from_step=5, enabled=True), lambda: load_runs([tmp_path])):
        with pytest.raises(DataError, match=rf"{name}:{len(lines) + 1}: ") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    records = Records(tmp_path, from_step=0, enabled=True)
    record(records, 4)
    records.close()
    (before,) = load_runs([tmp_path])
    for name in (METRICS, POOLS):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 5, "lo')
    (after,) = load_runs([tmp_path])
    again = Records(tmp_path, from_step=5, enabled=True)
    assert after.curves.keys() == before.curves.keys() == again.curves.keys()
    assert after.latest_pools == before.latest_pools == list(again.latest_pools)
    again.close()
