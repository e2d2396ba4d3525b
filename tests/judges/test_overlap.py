"""Judging beside generation: same verdicts, one wave behind at most, and no thread outlives an error."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Body, FaultServer, fenced_texts, rule_judge, verdict_reply
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from world_runs import metrics, pools, run_config

from sip_engine.config.judge import JudgeConfig, JudgeServerConfig
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.judges.distributed import ReplicaJudge
from sip_engine.judges.overlap import OverlappedJudge, split
from sip_engine.judges.rewards import judge_pools
from sip_engine.judges.server import ServerJudge
from sip_engine.llm.endpoint import EndpointError
from sip_engine.objectives.base import open_objective
from sip_engine.train import train
from sip_engine.types import Candidate, Failure, Judgment, Kind, Question, SafetyQuestion, Sample, Score
from sip_engine.utils.errors import DataError, SipError

PATIENCE = 30.0
"""Seconds after which a handshake that should have come is given up; nobody waits that long unless it is broken."""
IDS = np.array([1, 2], np.int32)
Pool = tuple[Sample, list[Candidate]]


def make_pools(number: int, size: int = 3) -> list[Pool]:
    """Pools whose texts all differ."""
    return [
        (
            Sample(n, 2, IDS, IDS, f"prefix {n} ", f"suffix {n}"),
            [Candidate(Kind.ROLLOUT, i, IDS, f"rollout {i} of {n}") for i in range(size)],
        )
        for n in range(number)
    ]


class Oracle:
    """A judge whose answers depend on question and seed alone; a few fail. `before` sees the number of each call."""

    name = "oracle"

    def __init__(self, before: Callable[[int], None] = lambda call: None) -> None:
        self.before = before
        self.calls = 0
        self.done = 0
        self.threads: set[threading.Thread] = set()

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        self.threads.add(threading.current_thread())
        self.calls += 1
        self.before(self.calls - 1)
        self.done += 1
        return [self._answer(zlib.crc32(f"{question} {seed}".encode())) for question in questions]

    def _answer(self, draw: int) -> Judgment:
        return Failure("no idea") if draw % 11 == 0 else Score(draw % 7 / 6)


class RemoteOracle(Oracle):
    stopped = False

    def stop(self) -> None:
        self.stopped = True


def waves_of(oracle: Oracle, mesh: Mesh, cfg: JudgeConfig | None = None) -> OverlappedJudge:
    return OverlappedJudge(ReplicaJudge(oracle, mesh), cfg or JudgeConfig(), mesh, seed=5)


def judge_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("judge")]


def test_the_next_wave_is_generated_while_one_is_judged(mesh: Mesh) -> None:
    begun, generated = threading.Event(), threading.Event()

    def before(call: int) -> None:
        begun.set()
        assert generated.wait(PATIENCE), "generation waited for the judge"

    first, second = split(make_pools(4), 2)
    with waves_of(RemoteOracle(before), mesh) as judging:
        judging.submit(first)
        assert begun.wait(PATIENCE)
        assert judging.lag == 0  # nothing was in judgement while the first wave was generated
        generated.set()
        judging.submit(second)
        assert len(judging.verdicts()) == 4
    assert judging.lag == 1
    assert judging.busy > 0
    assert not judge_threads()


def test_never_more_than_one_wave_is_behind(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge finishes a wave only when somebody waits for it: who does not wait gets ahead of it, and is seen."""
    waves = split(make_pools(5), 5)
    awaited = [threading.Event() for _ in waves]
    oracle = RemoteOracle(lambda call: None if awaited[call].wait(PATIENCE) else pytest.fail("not awaited"))
    result = Future.result

    def wait(self: Future[Any], timeout: float | None = None) -> Any:
        awaited[oracle.done].set()
        return result(self, timeout)

    monkeypatch.setattr(Future, "result", wait)
    with waves_of(oracle, mesh) as judging:
        try:
            for number, wave in enumerate(waves):
                assert oracle.done >= number - 1, "more than one wave is in judgement"
                judging.submit(wave)
            judging.verdicts()
        finally:
            for event in awaited:
                event.set()
    assert (oracle.done, judging.lag) == (5, 1)


def test_a_judge_that_computes_here_takes_turns_with_the_sampler(mesh: Mesh) -> None:
    oracle, all_pools = Oracle(), make_pools(5)
    with waves_of(oracle, mesh) as judging:
        for number, wave in enumerate(split(all_pools, 3)):
            judging.submit(wave)
            assert oracle.done == number + 1
    assert oracle.threads == {threading.current_thread()}
    assert (judging.lag, judging.busy > 0) == (0, True)
    assert judging.verdicts() == judge_pools(Oracle(), JudgeConfig(), all_pools, seed=5)


@given(
    number=st.integers(1, 7),
    waves=st.integers(1, 9),
    schedule=st.sampled_from(["all_pairs", "pivot", "tournament"]),
    votes=st.integers(1, 3),
    kind=st.sampled_from([Oracle, RemoteOracle]),
)
def test_verdicts_and_pairs_do_not_depend_on_the_waves(
    mesh: Mesh, number: int, waves: int, schedule: str, votes: int, kind: type[Oracle]
) -> None:
    cfg = JudgeConfig.model_validate({"schedule": schedule, "votes": {"quality": votes, "safety": 2}})
    all_pools = make_pools(number, size=5)
    want = judge_pools(Oracle(), cfg, all_pools, seed=5)
    with waves_of(kind(), mesh, cfg) as judging:
        for wave in split(all_pools, waves):
            judging.submit(wave)
        got = judging.verdicts()
    assert got == want
    dpo = open_objective(ObjectiveConfig())
    for (sample, pool), ours, theirs in zip(all_pools, got, want, strict=True):
        assert dpo.choose(sample, pool, ours, seed=1) == dpo.choose(sample, pool, theirs, seed=1)


def test_two_votes_on_a_question_and_two_questions_of_two_waves_draw_apart() -> None:
    """Waves share the judge's seed: the seeds that a server sees differ by question and vote all the same."""
    with FaultServer(rule_judge) as server:
        cfg = JudgeConfig.model_validate({"votes": {"quality": 2, "safety": 2, "factuality": 2}})
        judge = ServerJudge(JudgeServerConfig(url=server.url, model="rule"))
        for wave in split(make_pools(4), 4):
            judge_pools(judge, cfg, wave, seed=5)
        seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds) == 4 * 2 * (3 + 3 + 3)


@pytest.mark.parametrize("at", [0, 2])
def test_the_judges_error_is_raised_at_the_next_meeting(mesh: Mesh, at: int) -> None:
    def before(call: int) -> None:
        if call == at:
            raise DataError("the judge broke")

    oracle, handed_over = RemoteOracle(before), 0
    with pytest.raises(DataError, match="the judge broke"), waves_of(oracle, mesh) as judging:
        for wave in split(make_pools(3), 3):
            judging.submit(wave)
            handed_over += 1
        judging.verdicts()
    assert (oracle.calls, handed_over) == (at + 1, at + 1)
    assert not oracle.stopped  # there was nothing left to stop
    assert not judge_threads()


def server_settings(server: FaultServer, **changes: Any) -> JudgeServerConfig:
    """Should nobody cut the batch short, its requests fail one by one after 20 s."""
    values = {"url": server.url, "model": "rule", "request_s": 20, "max_retries": 0}
    return JudgeServerConfig.model_validate(values | changes)


def test_an_interrupt_cuts_the_judge_short_and_keeps_what_was_paid_for(mesh: Mesh, tmp_path: Path) -> None:
    """Interrupted with one reply in and the other requests hanging: they are dropped, the reply is in the cache."""
    hanging = threading.Event()

    def before(body: Body) -> None:
        if server.calls > 1:
            hanging.set()
            server.closing.wait(PATIENCE)

    with FaultServer(rule_judge, before=before) as server:
        cfg = server_settings(server, cache=tmp_path / "replies.sqlite")
        judging = OverlappedJudge(ReplicaJudge(ServerJudge(cfg), mesh), JudgeConfig(), mesh, seed=5)
        with pytest.raises(KeyboardInterrupt), judging:
            judging.submit(make_pools(2))
            assert hanging.wait(PATIENCE)
            raise KeyboardInterrupt
        assert not judge_threads()
        assert judging._future is not None
        assert isinstance(judging._future.exception(), asyncio.CancelledError)
        server.closing.set()
        server.bodies.clear()
        judge_pools(ServerJudge(cfg), JudgeConfig(), make_pools(2), seed=5)
        assert server.calls == 2 * (3 + 3 + 3) - 1


def test_a_stopped_judge_sends_nothing_any_more() -> None:
    """Stopped between two of its batches, the judge must not begin the next one."""
    with FaultServer(rule_judge) as server:
        judge = ServerJudge(server_settings(server))
        judge.stop()
        with pytest.raises(asyncio.CancelledError):
            judge.judge([SafetyQuestion("a bird")])
        assert server.calls == 0


@given(st.integers(0, 40), st.integers(1, 12))
def test_waves_are_even_and_in_order(number: int, waves: int) -> None:
    parts = split(range(number), waves)
    assert [item for part in parts for item in part] == list(range(number))
    assert len(parts) == min(number, waves)
    sizes = {len(part) for part in parts}
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)


def test_only_a_server_has_several_waves_unless_told() -> None:
    assert [JudgeConfig(backend=name).num_waves for name in ("heuristic", "world", "local", "server")] == [
        1,
        1,
        1,
        4,
    ]
    assert [JudgeConfig(backend=name, waves=2).num_waves for name in ("world", "server")] == [2, 2]


def noise_judge(body: Body) -> str:
    """A judge model whose verdict depends on the texts and the request's seed alone."""
    texts = fenced_texts(body)
    words = {"continuation_1": ("1", "2"), "passage": ("yes", "no")}
    choice = next((two for name, two in words.items() if name in texts), ("none", "definite"))
    return verdict_reply(body, choice[zlib.crc32(f"{texts} {body['seed']}".encode()) % 2])


def served_run(folder: Path, url: str, waves: int, **changes: Any) -> RunConfig:
    """Two steps of five prefixes, judged by a server; samples do not depend on the batch to the last bit."""
    return run_config(
        folder,
        steps=2,
        batch_size=5,
        judge={"backend": "server", "server": {"url": url, "model": "noise"}, "waves": waves},
        sampler={"batch_invariant": True},
        eval={"every": 0, "generate": False},
        **changes,
    )


def requests(server: FaultServer) -> list[str]:
    return sorted(json.dumps(body) for body in server.bodies)


def without_lag(folder: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name != "judge/lag"} for row in metrics(folder)]


@pytest.fixture(scope="module")
def sequential(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run in one wave: its folder, and what it asked the server."""
    folder = tmp_path_factory.mktemp("sequential")
    with FaultServer(noise_judge) as server:
        train(served_run(folder, server.url, waves=1), mesh)
        return folder, requests(server)


@pytest.mark.slow
def test_a_run_in_three_waves_is_the_run_in_one(
    mesh: Mesh, sequential: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the first question only when the second wave has been generated."""
    module = import_module("sip_engine.train")  # the package's own `train` is the function

    generated, propose, sizes, late = threading.Event(), module.propose, [], []

    def counting(samples: Sequence[Sample], *args: Any, **kwargs: Any) -> Any:
        proposed = propose(samples, *args, **kwargs)
        sizes.append(len(samples))
        if len(sizes) == 2:
            generated.set()
        return proposed

    def before(body: Body) -> None:
        if not generated.wait(PATIENCE):
            late.append(body)

    monkeypatch.setattr(module, "propose", counting)
    with FaultServer(noise_judge, before=before) as server:
        train(served_run(tmp_path, server.url, waves=3), mesh)
        assert requests(server) == sequential[1]
    assert not late, "generation waited for the judge"
    assert sizes == [1, 2, 2] * 2
    assert pools(tmp_path) == pools(sequential[0])
    assert without_lag(tmp_path) == without_lag(sequential[0])
    assert [row["judge/lag"] for row in metrics(tmp_path) if "loss" in row] == [1, 1]
    assert [row["judge/lag"] for row in metrics(sequential[0]) if "loss" in row] == [0, 0]
    assert any(pool["chosen"] is not None for pool in pools(tmp_path))


def train_on_ranks(folder: Path, good: str, bad: str) -> None:
    """On both ranks of a replica: a run with a judge that answers, then one with a judge that refuses."""
    mesh, layout = start_mesh(2), {"tensor": 2}
    train(served_run(folder, good, waves=3, parallel=layout), mesh)
    try:
        train(served_run(folder / "bad", bad, waves=3, parallel=layout), mesh)
    except SipError as error:
        (folder / f"error-{mesh.rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_processes_of_a_replica_share_the_verdicts_and_the_error(
    sequential: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """TP 2: one of two processes asks, beside the sampler's collectives; both learn what came of it."""
    with FaultServer(noise_judge) as good, FaultServer(noise_judge, ["401"]) as bad:
        run_ranks("test_overlap:train_on_ranks", 2, tmp_path, good.url, bad.url)
        assert requests(good) == sequential[1]
        assert bad.calls == 1
    assert [row["judge/lag"] for row in metrics(tmp_path) if "loss" in row] == [1, 1]
    for ours, theirs in zip(pools(tmp_path), pools(sequential[0]), strict=True):
        assert (ours["chosen"], ours["rejected"]) == (theirs["chosen"], theirs["rejected"])
        for mine, wanted in zip(ours["candidates"], theirs["candidates"], strict=True):
            assert (mine["text"], mine["reward"]) == (wanted["text"], wanted["reward"])
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{EndpointError.__name__}: judge.server: ")
