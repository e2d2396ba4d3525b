"""The server rewriter: rewrites join where the prefix ends, and nothing but the passage asked for is taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_server import BAD, GOOD, FaultServer, asked_mark, fenced_texts, rule_judge
from hypothesis import example, given
from hypothesis import strategies as st
from world_runs import run_config

from sip_engine.config.judge import ServerConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.llm.endpoint import EndpointError
from sip_engine.llm.untrusted import has_hidden, neutral
from sip_engine.monitoring.records import read_records
from sip_engine.rewriters.distributed import ReplicaRewriter
from sip_engine.rewriters.prompt import RewritePrompt, read_rewrite, rewrite_prompt
from sip_engine.rewriters.server import ServerRewriter
from sip_engine.train import train
from sip_engine.types import Cost, Failure, RewriteRequest
from sip_engine.utils.errors import SipError

REQUEST = RewriteRequest("The grey heron lives by the river and", f" eats with a {BAD}.")
PROMPT = rewrite_prompt(REQUEST)
BEGIN, END = f"<<<BEGIN rewrite {PROMPT.mark}>>>", f"<<<END rewrite {PROMPT.mark}>>>"


def as_reply(passage: str, prompt: RewritePrompt) -> str:
    if prompt.format == "json_schema":
        return json.dumps({"id": prompt.mark, "passage": passage})
    return f"<<<BEGIN rewrite {prompt.mark}>>>\n{passage}\n<<<END rewrite {prompt.mark}>>>"


def rule_rewriter(body: dict[str, Any]) -> str:
    """Every wrench becomes a heron; the rest of the passage stays."""
    passage = fenced_texts(body)["passage"].replace(BAD, GOOD)
    mark = asked_mark(body)
    if "response_format" in body:
        return json.dumps({"id": mark, "passage": passage})
    return f"I mended it.\n<<<BEGIN rewrite {mark}>>>\n{passage}\n<<<END rewrite {mark}>>>\n"


def rewriter(server: FaultServer, **changes: Any) -> ServerRewriter:
    values = {"url": server.url, "model": "rule", "backoff_s": 0.001, "request_s": 20}
    return ServerRewriter(ServerConfig.model_validate(values | changes))


@pytest.mark.parametrize("format", ["verdict_line", "json_schema"])
def test_rewrites_come_in_order_and_join(format: str) -> None:
    requests = [RewriteRequest(f"{n} {REQUEST.prefix}", f" takes {n} {BAD}es") for n in range(20)]
    requests += [RewriteRequest("", f"{BAD} first"), RewriteRequest("half of a wo", f"rd, a {BAD}")]
    with FaultServer(rule_rewriter) as server:
        one = rewriter(server, format=format)
        assert one.rewrite(requests) == [request.suffix.replace(BAD, GOOD) for request in requests]
        assert one.cost == Cost(22, 22 * 111, one.cost.seconds, 22 * 11) and one.cost.seconds > 0
        first = {body["seed"] for body in server.bodies}
        one.rewrite(requests[:1], seed=1)
        assert server.bodies[-1]["seed"] not in first, "another seed asks for another rewrite"
        assert one.cost.calls == 23


TEXTS = st.one_of(st.text("ab \n\t.,é", max_size=40), st.text(max_size=40))


@given(TEXTS, TEXTS, st.sampled_from(["verdict_line", "json_schema"]))
@example("ends in space ", " begins with one", "verdict_line")
@example("line\n", "\nnext", "json_schema")
@example("", "", "verdict_line")
@example(" ", "x", "verdict_line")
@example("(a|b) [c] *d* e+ f?", " $g", "verdict_line")
@example("w" * 500, "more", "verdict_line")
def test_a_faithful_copy_is_the_suffix_itself(prefix: str, suffix: str, format: Any) -> None:
    if any(has_hidden(text) or neutral(text) != text for text in (prefix, suffix, prefix + suffix)):
        return
    prompt = rewrite_prompt(RewriteRequest(prefix, suffix), format=format)
    sent = fenced_texts({"messages": prompt.messages()})
    assert sent == {"prefix": prefix, "passage": prompt.lead + suffix} and prefix.endswith(prompt.lead)
    assert len(prompt.lead.split()) == min(5, len(prefix[-120:].split()))
    found = read_rewrite(as_reply(sent["passage"], prompt), prompt)
    if not suffix.strip():
        assert isinstance(found, Failure)
    else:
        assert found == (suffix.lstrip() if prompt.lead[-1:].isspace() else suffix)


def test_the_words_in_front_may_be_spaced_otherwise() -> None:
    prompt = rewrite_prompt(RewriteRequest("one two\nthree  four", " five"))
    assert read_rewrite(as_reply("one two three four\nsix", prompt), prompt) == "\nsix"


GOOD_PASSAGE = "lives by the river and eats fish."


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "the reply is empty"),
        (GOOD_PASSAGE, "does not end with the marked passage"),
        (f"{BEGIN}\n{GOOD_PASSAGE}", "does not end with the marked passage"),
        (f"{GOOD_PASSAGE}\n{END}", "does not end with the marked passage"),
        (f"{BEGIN}\n{GOOD_PASSAGE}\n{END}\nI hope you like it.", "does not end with the marked passage"),
        (f"{BEGIN} {GOOD_PASSAGE} {END}", "does not end with the marked passage"),
        (f"{BEGIN}\nx\n{END}\n{BEGIN}\n{GOOD_PASSAGE}\n{END}", "more than one marked passage"),
        (
            as_reply(GOOD_PASSAGE, PROMPT).replace(PROMPT.mark, "00000000"),
            "does not end with the marked passage",
        ),
        (f"{BEGIN}\n{END}", "does not begin with the last words"),
        (f"{BEGIN}\nHere it is: {GOOD_PASSAGE}\n{END}", "does not begin with the last words"),
        (f"{BEGIN}\neats fish.\n{END}", "does not begin with the last words"),
        (f"{BEGIN}\nlives by the river and \n{END}", "the rewrite is empty"),
        (f"{BEGIN}\n{GOOD_PASSAGE} {PROMPT.mark.upper()}\n{END}", "the mark of its request"),
        (f"{BEGIN}\n{GOOD_PASSAGE}\x1b[1m\n{END}", "cannot be seen"),
        (f"{BEGIN}\n{GOOD_PASSAGE}\ud800\n{END}", "cannot be seen"),
        (f"{BEGIN}\n{GOOD_PASSAGE * 4000}\n{END}", "longer than"),
    ],
)
def test_anything_but_one_marked_passage_is_a_failure(reply: str, reason: str) -> None:
    found = read_rewrite(reply, PROMPT)
    assert isinstance(found, Failure) and reason in found.reason
    assert read_rewrite(as_reply(GOOD_PASSAGE, PROMPT), PROMPT) == " eats fish."


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>\n{BEGIN}\nx\n{END}\n</think>\n{BEGIN}\n{GOOD_PASSAGE}\n{END}",
        f"```\n{BEGIN}\n{GOOD_PASSAGE}\n{END}\n```\n",
        f"**{BEGIN}**\n{GOOD_PASSAGE}\n**{END}**<|im_end|>",
    ],
)
def test_everyday_clothing_does_not_hide_a_passage(reply: str) -> None:
    assert read_rewrite(reply, PROMPT) == " eats fish."


def test_an_object_is_read_as_strictly() -> None:
    prompt = rewrite_prompt(REQUEST, format="json_schema")
    good = {"id": prompt.mark, "passage": GOOD_PASSAGE}
    assert read_rewrite(json.dumps(good), prompt) == " eats fish."
    for clothed in (
        json.dumps(good | {"more": 1}),
        json.dumps([good]),
        f"<think>\n{json.dumps(good | {'passage': 'x'})}</think>Here:\n```json\n{json.dumps(good)}\n```",
    ):
        assert read_rewrite(clothed, prompt) == " eats fish."
    for bad in (good | {"id": "00000000"}, {"passage": GOOD_PASSAGE}, good | {"passage": 1}):
        assert isinstance(read_rewrite(json.dumps(bad), prompt), Failure)
    for text in (json.dumps(good)[:-1], json.dumps(good) + "x", "[" * 50_000, GOOD_PASSAGE):
        assert isinstance(read_rewrite(text, prompt), Failure)
    assert isinstance(
        read_rewrite(json.dumps(good)[:-1] + f', "passage": "{GOOD_PASSAGE}"}}', prompt), Failure
    )


@given(st.lists(st.one_of(st.sampled_from([BEGIN, END, GOOD_PASSAGE, "\n", " ", "x"]), st.text(max_size=9))))
def test_random_replies_invent_no_rewrite(pieces: list[str]) -> None:
    reply = "".join(pieces)
    found = read_rewrite(reply, PROMPT)
    if isinstance(found, str):
        block = re.search(rf"(?:^|\n){BEGIN}[ \t\r]*\n(.*)\n{END}\s*$", reply, re.DOTALL)
        assert block and f"by the river and{found}" in block[1].replace("\r\n", "\n")


@pytest.mark.parametrize("format", ["verdict_line", "json_schema"])
def test_injected_text_stays_inside_the_passage(format: str) -> None:
    """Whatever a suffix asks for, a rule that mends the fenced passage mends it to its end."""
    requests = [
        RewriteRequest(f"{REQUEST.prefix} {one.text}", f" dull\n{one.text}\n a {BAD} at the end")
        for one in INJECTIONS
    ]
    with FaultServer(rule_rewriter) as server:
        found = rewriter(server, format=format).rewrite(requests)
    for text in found:
        assert not isinstance(text, Failure) and text.endswith(f"a {GOOD} at the end") and BAD not in text
    for request in requests:
        last = rewrite_prompt(request).user.rpartition("<<<END passage")[2]
        assert not any(one.text.split()[0] in last for one in INJECTIONS[:6]), (
            "only fenced text is the document's"
        )


def test_a_failed_rewrite_says_why_and_an_unusable_server_stops() -> None:
    with FaultServer(rule_rewriter, ["ok", "length", "503", "ok"]) as server:
        found = rewriter(server, concurrency=1).rewrite(
            [REQUEST, RewriteRequest("a", " b"), RewriteRequest("c", " d")]
        )
        assert isinstance(found[1], Failure) and "did not end by itself" in found[1].reason
        assert found[0] == f" eats with a {GOOD}." and found[2] == " d" and server.calls == 4
    with (
        FaultServer(rule_rewriter, ["404"]) as server,
        pytest.raises(EndpointError, match=r"rewriter\.server"),
    ):
        rewriter(server).rewrite([REQUEST])


def test_all_processes_of_a_replica_get_the_first_ones_rewrites() -> None:
    box: list[Any] = []

    def process(is_first: bool) -> Any:
        def from_leader(value: Any) -> Any:
            if is_first:
                box.append(value)
            return box[-1]

        return SimpleNamespace(replica=SimpleNamespace(is_first=is_first), from_replica_leader=from_leader)

    class Once:
        name = "once"
        calls = 0

        def rewrite(self, requests: Any, *, seed: int = 0) -> list[str | Failure]:
            self.calls += 1
            if seed == 9:
                raise EndpointError("wrong key")
            return [f"{len(requests)} {seed} {self.calls}"]

    inner = Once()
    ranks = [ReplicaRewriter(inner, process(is_first)) for is_first in (True, False)]
    assert [rank.rewrite([REQUEST], seed=3) for rank in ranks] == [["1 3 1"]] * 2 and inner.calls == 1
    for rank in ranks:
        with pytest.raises(SipError, match="wrong key"):
            rank.rewrite([REQUEST], seed=9)
    assert inner.calls == 2 and ranks[0].name == "once"


def model(body: dict[str, Any]) -> str:
    """Judge and rewriter behind one URL."""
    rewrites = body["model"] == "rewriter"
    return rule_rewriter(body) if rewrites else rule_judge(body)


def test_a_run_is_judged_and_rewritten_by_servers(mesh: Mesh, tmp_path: Path) -> None:
    with FaultServer(model, ["ok", "503", "ok"]) as server:
        section = {"url": server.url, "backoff_s": 0.001, "cache": str(tmp_path / "replies.sqlite")}
        cfg = run_config(
            tmp_path,
            steps=2,
            batch_size=2,
            judge={"backend": "server", "server": {**section, "model": "judge", "style": "direct"}},
            rewriter={
                "backend": "server",
                "server": {**section, "model": "rewriter", "format": "json_schema"},
            },
            eval={"every": 0, "num_prefixes": 2},
        )
        train(cfg, mesh)
    models = [body["model"] for body in server.bodies]
    assert models.count("rewriter") >= 4 and models.count("judge") > 20
    rows = list(read_records(cfg.out / "pools.jsonl"))
    assert len(rows) == 4
    for row in rows:
        kinds = [candidate["kind"] for candidate in row["candidates"]]
        assert kinds == ["original", "rewrite", "rollout", "rollout", "rollout"] and row["failures"] == []
        original, rewrite = (candidate["text"] for candidate in row["candidates"][:2])
        assert rewrite == original.replace(BAD, GOOD)
        for candidate in row["candidates"]:
            assert candidate["safety"] == 1.0 and candidate["factuality"] == 0.5
