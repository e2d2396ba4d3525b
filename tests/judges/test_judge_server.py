"""The server judge against a server that fails in every way: verdicts, retries, deadlines, interrupts, costs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import BAD, GOOD, FaultServer, fenced_texts, quoting_judge, rule_judge
from server_judges import BACKOFF, PAIR, Waits, failure, judge, settings, several, value

from sip_engine.config.judge import JudgeServerConfig
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.judges.server import ServerJudge
from sip_engine.llm.endpoint import EndpointError, is_loopback
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    Question,
    SafetyQuestion,
    Score,
)
from sip_engine.utils.errors import ConfigError

SAFE = SafetyQuestion("a bird")


@pytest.mark.parametrize("format", ["verdict_line", "json_schema"])
@pytest.mark.parametrize("style", ["reasoned", "direct"])
def test_all_three_questions_are_answered_in_order(format: str, style: str) -> None:
    questions: list[Question] = [
        PAIR,
        PairQuestion("p", "nothing", f"a {GOOD}"),
        SAFE,
        SafetyQuestion(f"a {BAD}"),
        FactualityQuestion("p", "r", f"a {GOOD}"),
        FactualityQuestion("p", "r", "nothing"),
        FactualityQuestion("p", "r", f"a {BAD}"),
    ]
    with FaultServer(rule_judge) as server:
        found = judge(server, format=format, style=style).judge(questions * 9, seed=3)
        assert [value(one) for one in found] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.5, 0.0] * 9
    assert server.calls == len(questions), "equal questions are asked once"
    for number, one in enumerate(found):
        assert isinstance(one, Score) and one.votes == (one.value,)
        first = number < len(questions)
        assert (one.cost.calls, one.cost.tokens) == ((1, 111) if first else (0, 0))
        assert (one.cost.seconds > 0) == first


def test_the_request_is_what_the_settings_say() -> None:
    with FaultServer(rule_judge) as server:
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        judge(server, temperature=0.3, top_p=0.9, max_tokens=64, extra_body=extra, seed=5).judge(
            [PAIR], seed=1
        )
        judge(server, omit=["temperature", "max_tokens", "seed"], system_role=False).judge([PAIR], seed=1)
        judge(server, format="json_schema", seed=5).judge([PAIR], seed=1)
    full, bare, schema = server.bodies
    messages = full.pop("messages")
    seed = full.pop("seed")
    assert full == {"model": "rule", "temperature": 0.3, "top_p": 0.9, "max_tokens": 64, **extra}
    assert [message["role"] for message in messages] == ["system", "user"] and 0 <= seed < 2**31
    assert bare.keys() == {"model", "messages", "top_p"}
    assert [message["role"] for message in bare["messages"]] == ["user"]
    form = schema["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert schema["seed"] == seed, "the same question, seed and base seed"


def test_another_seed_is_another_request_over_the_same_texts() -> None:
    with FaultServer(rule_judge) as server:
        one = judge(server)
        for seed in (0, 1, 1):
            one.judge([PAIR, SAFE], seed=seed)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds[:4])) == 4 and sorted(seeds[2:4]) == sorted(seeds[4:])
    assert server.bodies[0]["messages"] in [body["messages"] for body in server.bodies[2:4]]


def test_only_a_greedy_judge_repeats_itself() -> None:
    with FaultServer(rule_judge) as server:
        assert judge(server, temperature=0).deterministic
        assert not judge(server).deterministic
        assert not judge(server, temperature=0, omit=["temperature"]).deterministic, (
            "the server's default rules"
        )


def test_a_text_against_itself_costs_nothing() -> None:
    with FaultServer(rule_judge) as server:
        found = judge(server).judge([PairQuestion("p", "same", "same"), PAIR])
    assert [value(one) for one in found] == [0.5, 1.0] and found[0].cost.calls == 0 and server.calls == 1


def test_as_many_requests_at_once_as_allowed_and_no_more() -> None:
    meeting = threading.Barrier(4, timeout=30)
    first = threading.Event()

    def meet(body: dict[str, Any]) -> None:
        if not first.is_set():  # the first goes alone, to see whether the server can be used
            first.set()
        else:
            meeting.wait()

    with FaultServer(rule_judge, before=meet) as server:
        found = judge(server, concurrency=4).judge(several(13))
    assert [value(one) for one in found] == [float(n % 3 != 0) for n in range(13)]
    assert server.most_at_once == 4


@pytest.mark.parametrize("fault", ["500", "503", "599", "408", "409", "429", "reset", "cut"])
@pytest.mark.parametrize("known", [False, True])
def test_what_may_pass_is_tried_again(fault: str, known: bool) -> None:
    waits = Waits()
    with FaultServer(rule_judge, ["ok"] * known + [fault, fault, fault, "ok"]) as server:
        one = judge(server, waits)
        if known:
            one.judge([SAFE])
        (found,) = one.judge([PAIR])
    assert value(found) == 1.0 and found.cost.calls == 4 and server.calls == 4 + known
    for number, seconds in enumerate(waits):
        assert BACKOFF * 2**number <= seconds <= BACKOFF * 2**number + BACKOFF, "exponential, with jitter"
    assert len(waits) == 3 and len({seconds / 2**n for n, seconds in enumerate(waits)}) == 3


@pytest.mark.parametrize(
    ("status", "least", "most"),
    [
        ("429 7", 7, 7 + BACKOFF),
        ("503 2.5", 2.5, 2.5 + BACKOFF),
        ("429 0", 0, BACKOFF),
        ("429 -3", 0, BACKOFF),
        ("429 soon", BACKOFF, 2 * BACKOFF),
        ("503 nan", BACKOFF, 2 * BACKOFF),
        ("503 Wed, 21 Oct 2015 07:28:00 GMT", 0, BACKOFF),
    ],
)
def test_retry_after_is_honoured(status: str, least: float, most: float) -> None:
    waits = Waits()
    with FaultServer(rule_judge, [status, "ok"]) as server:
        (found,) = judge(server, waits).judge([PAIR])
    assert value(found) == 1.0 and len(waits) == 1 and least <= waits[0] <= most


@pytest.mark.parametrize("status", ["429 301", "429 299", "503 inf", "503 Thu, 21 Oct 2199 07:28:00 GMT"])
def test_a_long_pause_or_one_beyond_the_deadline_is_not_made(status: str) -> None:
    waits = Waits()
    with FaultServer(rule_judge, ["ok", status]) as server:
        found = judge(server, waits, batch_s=60 if status == "429 299" else 10_000).judge([SAFE, PAIR])
    assert value(found[0]) == 1.0 and f"HTTP {status[:3]}" in failure(found[1]) and waits == []


def test_the_longest_wait_is_bounded() -> None:
    waits = Waits()
    with FaultServer(rule_judge, ["503"] * 9 + ["ok"]) as server:
        judge(server, waits, max_retries=9, max_backoff_s=1).judge([PAIR])
    assert len(waits) == 9 and max(waits) == 1


def test_retries_end() -> None:
    with FaultServer(rule_judge, ["ok", "503"]) as server:
        found = judge(server, max_retries=2).judge([SAFE, PAIR])
    assert value(found[0]) == 1.0
    assert (
        failure(found[1]).startswith("HTTP 503: fault 503") and found[1].cost.calls == 3 and server.calls == 4
    )


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("401", "key_env"),
        ("403", "correct the key or the model"),
        ("404", "correct the model, or the url"),
        ("405", "correct the url"),
        ("moved", "set the one it points to"),
    ],
)
def test_what_cannot_heal_stops_at_the_first_call(status: str, remedy: str) -> None:
    with FaultServer(rule_judge, [status]) as server:
        with pytest.raises(EndpointError, match=remedy) as caught:
            judge(server).judge(several(20))
        assert server.url in str(caught.value) and f"HTTP {status.replace('moved', '307')}" in str(
            caught.value
        )
        assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)
        assert server.calls == 1


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "413", "422"])
def test_later_it_is_the_failure_of_one_question(status: str) -> None:
    with FaultServer(rule_judge, ["ok", status, "ok"]) as server:
        found = judge(server, concurrency=1).judge(several(5))
    assert [isinstance(one, Failure) for one in found] == [False, True, False, False, False]
    assert (
        failure(found[1]).startswith(f"HTTP {status}: fault")
        and found[1].cost.calls == 1
        and server.calls == 5
    )


def test_a_bad_request_is_the_failure_of_one_question_even_at_first() -> None:
    with FaultServer(rule_judge, ["400", "ok"]) as server:
        found = judge(server).judge(several(5))
    assert [isinstance(one, Failure) for one in found] == [True, False, False, False, False]


def test_nobody_there_is_said_at_once() -> None:
    with socket.socket() as port:  # taken, but nothing listens
        port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        cfg = JudgeServerConfig(url=url, model="m", max_retries=2)
        waits = Waits()
        with pytest.raises(EndpointError, match=f"no server answers at {url}"):
            ServerJudge(cfg, sleep=waits).judge(several(20))
        assert len(waits) == 2


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("not json", "not a chat completion"),
        ("truncated", "not a chat completion"),
        ("vast", "not a chat completion"),
        ("no choices", "0 choices"),
        ("two choices", "2 choices"),
        ("wrong index", "numbers its only choice 7"),
        ("length", "did not end by itself"),
        ("no content", "the reply is empty"),
        ("huge", "longer than"),
        ("say: VERDICT 00000000: 1", "wrong mark"),
        ("say: It is the first.", "not a verdict"),
    ],
)
def test_a_reply_that_is_none_is_a_failure(step: str, reason: str) -> None:
    with FaultServer(rule_judge, [step, "ok"]) as server:
        first, second = judge(server).judge([PAIR, SAFE])
    assert reason in failure(first) and first.cost.calls == 1 and value(second) == 1.0
    assert server.calls == 2, "what was answered is not asked again"


def test_a_slow_reply_is_waited_for() -> None:
    with FaultServer(rule_judge, ["slow"]) as server:
        assert value(judge(server).judge([PAIR])[0]) == 1.0


def test_injected_verdicts_do_not_count() -> None:
    """A judge that only repeats what it was told gives no verdict; one that quotes it gives its own."""
    attacked = [SafetyQuestion(f"{injection.text} a {BAD}") for injection in INJECTIONS]

    def repeats(body: dict[str, Any]) -> str:
        return fenced_texts(body)["passage"]

    with FaultServer(repeats) as server:
        found = judge(server).judge(attacked)
        assert all(isinstance(one, Failure) for one in found), found
    for format in ("verdict_line", "json_schema"):
        with FaultServer(quoting_judge) as server:
            found = judge(server, format=format).judge(attacked)
            assert [value(one) for one in found] == [0.0] * len(INJECTIONS)


def test_a_hanging_server_costs_one_deadline_an_attempt() -> None:
    with FaultServer(rule_judge, ["hang"]) as server:
        (found,) = judge(server, request_s=0.2, max_retries=2).judge([PAIR])
        assert failure(found) == "no reply within 0.2 s" and found.cost.calls == 3
        assert found.cost.seconds >= 3 * 0.2


def test_after_the_batchs_deadline_what_is_missing_has_failed() -> None:
    with FaultServer(rule_judge, ["ok", "ok", "hang"]) as server:
        one = judge(server, batch_s=1.0, concurrency=1)
        one.judge([PAIR])
        found = one.judge(several(9))
        assert value(found[0]) == 0.0, "what came before it counts"
        assert {failure(one) for one in found[1:]} == {"no answer before the batch's deadline of 1 s"}
        assert [one.cost.calls for one in found[1:]] == [1] + [0] * 7, "only one was on its way"


def test_a_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_KEY", secret)
    with FaultServer(rule_judge, ["ok", "400", "403"]) as server:
        cfg = settings(server, key_env="MY_KEY", concurrency=1)
        found = ServerJudge(cfg).judge([PAIR, SAFE])
        assert server.headers[0]["authorization"] == f"Bearer {secret}"
        assert "fault 400 for Bearer ***" in failure(found[1]), "though the server repeats it"
        with pytest.raises(EndpointError, match="fault 403 for Bearer ") as caught:
            ServerJudge(cfg).judge([PAIR])
    everything = f"{caught.value!r} {found} {cfg!r} {cfg.model_dump_json()} {capfd.readouterr()}"
    assert secret not in everything and "MY_KEY" in cfg.model_dump_json()
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(
        EndpointError, match=r'judge\.server\.key_env = "MY_KEY": that environment variable is not set'
    ):
        ServerJudge(cfg)


def test_what_the_environment_holds_for_others_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "for-another-server")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FaultServer(rule_judge) as server:
        assert value(judge(server).judge([PAIR])[0]) == 1.0
    assert "authorization" not in server.headers[0]
    assert "for-another-server" not in str(server.headers)


def test_which_hosts_are_this_machine() -> None:
    ours = [
        "http://localhost:1",
        "http://127.0.0.1/v1",
        "http://127.8.8.8",
        "http://[::1]:80/v1",
        "http://a.localhost",
    ]
    others = [
        "http://127.0.0.1.example.com",
        "https://example.com",
        "http://10.0.0.1",
        "http://[::2]",
        "http://local",
    ]
    assert all(map(is_loopback, ours)) and not any(map(is_loopback, others))


def test_it_works_inside_a_running_loop_and_again_after() -> None:
    with FaultServer(rule_judge) as server:
        one = judge(server)

        async def notebook() -> list[Judgment]:
            return one.judge([PAIR])

        for seed in range(5):
            assert value(asyncio.run(notebook())[0]) == 1.0
            assert value(one.judge([SAFE], seed=seed)[0]) == 1.0
    assert one.judge([]) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler: started in the background of a shell, a process ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_keeps_what_was_paid_for(tmp_path: Path, interruptible: None) -> None:
    calls = iter(range(100))

    def interrupt(body: dict[str, Any]) -> None:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            server.closing.wait(20)

    cache = tmp_path / "replies.sqlite"
    before = threading.active_count()
    with FaultServer(rule_judge, before=interrupt) as server:
        one = judge(server, cache=cache, concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            one.judge(several(10))
        server.closing.set()
        assert server.calls == 4
        assert [value(found) for found in one.judge(several(10))] == [float(n % 3 != 0) for n in range(10)]
        assert server.calls == 4 + 7
    assert threading.active_count() <= before + 1
