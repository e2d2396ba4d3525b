"""Corruptors by name: a server spoils each suffix in the way drawn for it, and only a whole copy is taken."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from fault_server import BAD, GOOD, FaultServer, asked_mark, fenced_texts
from label_settings import config

from sip_engine import cli
from sip_engine.config.judge import ServerConfig
from sip_engine.config.schema import RunConfig
from sip_engine.data.corpus import Corpus
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.llm.endpoint import EndpointError
from sip_engine.llm.untrusted import neutral
from sip_engine.tasks import judge_pairs
from sip_engine.tasks.corruptors.base import Corruption, CountingCorruptor
from sip_engine.tasks.corruptors.open import open_corruptor
from sip_engine.tasks.corruptors.rules import RuleCorruptor
from sip_engine.tasks.corruptors.server import (
    CORRUPT_RULES,
    FLAWS,
    ServerCorruptor,
    corrupt_prompt,
    draw_flaw,
)
from sip_engine.tasks.corruptors.world import WorldCorruptor
from sip_engine.tasks.specs import JudgePairs
from sip_engine.types import Cost, Failure, RewriteRequest
from sip_engine.utils.errors import ConfigError

REQUEST = RewriteRequest("The grey heron lives by the river and", f" waits for fish like every {GOOD}.")
FORMATS = pytest.mark.parametrize("format", ["verdict_line", "json_schema"])


def passage_reply(body: dict[str, Any], passage: str) -> str:
    mark = asked_mark(body)
    if "response_format" in body:
        return json.dumps({"id": mark, "passage": passage})
    return f"Spoilt as asked.\n<<<BEGIN rewrite {mark}>>>\n{passage}\n<<<END rewrite {mark}>>>\n"


def rule_corruptor(body: dict[str, Any]) -> str:
    """Every heron becomes a wrench; the rest of the passage stays."""
    return passage_reply(body, fenced_texts(body)["passage"].replace(GOOD, BAD))


def asked_flaw(body: dict[str, Any]) -> str:
    """The one way that a request's rules ask for."""
    (flaw,) = [name for name, way in FLAWS.items() if way in body["messages"][0]["content"]]
    return flaw


def corruptor(server: FaultServer, **changes: Any) -> ServerCorruptor:
    values = {"url": server.url, "model": "rule", "backoff_s": 0.001, "request_s": 20}
    return ServerCorruptor(ServerConfig.model_validate(values | changes))


@FORMATS
def test_copies_come_in_order_and_name_the_way_that_was_asked_for(format: str) -> None:
    requests = [RewriteRequest(f"{n} by the", f" {n} {GOOD}s") for n in range(40)]
    requests += [RewriteRequest("", f"{GOOD} first"), RewriteRequest("half of a wo", f"rd, a {GOOD}")]
    with FaultServer(rule_corruptor) as server:
        one = corruptor(server, format=format)
        found = one.corrupt(requests)
        asked = {fenced_texts(body)["passage"]: asked_flaw(body) for body in server.bodies}
        assert one.cost == Cost(42, 42 * 111, one.cost.seconds, 42 * 11) and one.cost.seconds > 0
        seeds = {body["seed"] for body in server.bodies}
        again = one.corrupt(requests, seed=1)
        assert not seeds & {body["seed"] for body in server.bodies[42:]}, "another seed asks for other copies"
    for request, copy, other in zip(requests, found, again, strict=True):
        assert isinstance(copy, Corruption) and isinstance(other, Corruption)
        assert copy.text == request.suffix.replace(GOOD, BAD)
        (passage,) = [
            text for text in asked if text.endswith(request.suffix) and text in request.prefix + text
        ]
        assert copy.flaw == asked[passage]
    assert any(a.flaw != b.flaw for a, b in zip(found, again, strict=True))  # type: ignore[union-attr]


def test_ways_are_words_drawn_equally_often() -> None:
    drawn = Counter(draw_flaw(RewriteRequest("p", f"{n}"), seed) for n in range(300) for seed in range(4))
    assert drawn.keys() == FLAWS.keys() and all(name.isalpha() for name in FLAWS)
    assert max(drawn.values()) < 1.3 * min(drawn.values())  # 200 each, a standard deviation of 13
    assert draw_flaw(REQUEST, 5) == draw_flaw(REQUEST, 5)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("length", "did not end by itself"),
        ("say: I cannot help with making texts worse.", "does not end with the marked passage"),
        ("truncated", ""),
        ("no content", ""),
        ("400", "HTTP 400"),
    ],
)
def test_what_is_refused_or_cut_off_is_a_failure(step: str, reason: str) -> None:
    requests = [RewriteRequest("p", f" {n} {GOOD}") for n in range(3)]
    with FaultServer(rule_corruptor, ["ok", step, "ok"]) as server:
        one = CountingCorruptor(corruptor(server, concurrency=1))
        found = one.corrupt(requests)
    assert [getattr(copy, "text", None) for copy in found] == [f" 0 {BAD}", None, f" 2 {BAD}"]
    failed = found[1]
    assert isinstance(failed, Failure) and reason in failed.reason and failed.cost.calls >= 1
    what, said, words = failed.reason.partition("; it said: ")
    assert one.asked == 3 and one.failures == {what: 1}, "counted by reason, not by what was said"
    assert one.summary() == f"server corruptor: 1 of 3 copies failed: {what} (1){said}{words}"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda passage: passage, "no other than the suffix"),
        (lambda passage: "  ".join(passage.split(" ")), "no other than the suffix"),
        (lambda passage: passage[:-20], "much shorter"),
        (lambda passage: passage.partition("waits")[0], "is empty"),
        (lambda passage: f"Here it is: {passage} {BAD}", "does not begin with the last words"),
        (lambda passage: f"{passage}\x1b[2K {BAD}", "cannot be seen"),
    ],
)
def test_a_copy_that_would_teach_nothing_or_too_much_is_a_failure(spoil: Any, reason: str) -> None:
    with FaultServer(lambda body: passage_reply(body, spoil(fenced_texts(body)["passage"]))) as server:
        (found,) = corruptor(server).corrupt([REQUEST])
    assert isinstance(found, Failure) and reason in found.reason
    with FaultServer(lambda body: passage_reply(body, f"{fenced_texts(body)['passage']} {BAD}")) as server:
        assert corruptor(server).corrupt([REQUEST]) == [
            Corruption(f"{REQUEST.suffix} {BAD}", draw_flaw(REQUEST, 0))
        ]


@FORMATS
def test_injected_text_stays_inside_the_passage(format: Any) -> None:
    """Orders, guessed marks and delimiters of a suffix change neither the way asked for nor what is read."""
    requests = [
        RewriteRequest(f"{REQUEST.prefix} {one.text} so", f" dull\n{one.text}\n a {GOOD} at the end")
        for one in INJECTIONS
    ]
    with FaultServer(rule_corruptor) as server:
        found = corruptor(server, format=format).corrupt(requests)
    for request, copy in zip(requests, found, strict=True):
        assert isinstance(copy, Corruption) and copy.flaw == draw_flaw(request, 0)
        assert copy.text == neutral(request.suffix).replace(GOOD, BAD)
        prompt = corrupt_prompt(request, copy.flaw, format=format)
        assert prompt.system.startswith(CORRUPT_RULES.partition("{way}")[0])
        _, _, last = prompt.user.rpartition("<<<END passage")
        assert prompt.mark not in neutral(request.prefix + request.suffix).lower() and GOOD not in last
        assert not any(one.text.split()[0] in last for one in INJECTIONS[:6]), (
            "only fenced text is the document's"
        )


@pytest.mark.parametrize("status", ["401", "404"])
def test_an_unusable_server_stops_at_the_first_request(status: str) -> None:
    with FaultServer(rule_corruptor, [status]) as server:
        with pytest.raises(EndpointError, match=r"corruptor\.server"):
            corruptor(server).corrupt([RewriteRequest("p", f" {n} {GOOD}") for n in range(20)])
        assert server.calls == 1


def test_what_the_cache_knows_costs_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "replies.sqlite"
    requests = [REQUEST, RewriteRequest("p", " refused"), REQUEST]
    script = ["ok", "say: No.", "ok"]
    with FaultServer(rule_corruptor, script) as server:
        first = corruptor(server, cache=cache, concurrency=1).corrupt(requests)
        assert server.calls == 2, "equal requests are sent once"
        one = corruptor(server, cache=cache)
        again = one.corrupt([REQUEST, REQUEST])
        assert server.calls == 2 and one.cost == Cost()
        assert again == [first[0], first[0]] == [first[0], first[2]]
        one.corrupt(requests)
        assert server.calls == 3, "a refusal is not kept"
        one.corrupt([REQUEST], seed=1)
        assert server.calls == 4


def test_records_are_made_with_a_server_and_failures_are_said(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six suffixes for training, of which the second and the third get no copy, and one held out."""

    def backwards(body: dict[str, Any]) -> str:
        passage = fenced_texts(body)["passage"]
        lead = " ".join(passage.split(" ")[:6])
        return passage_reply(body, lead + " ".join(reversed(passage.removeprefix(lead).split(" "))))

    def make(server: FaultServer, out: Path) -> None:
        section = {"url": server.url, "model": "m", "concurrency": 1}
        cfg = config(tmp_path, corruptor={"backend": "server", "server": section})
        JudgePairs(pairs=6, safety=0, held_out=2).make(cfg, out)

    with FaultServer(backwards, ["ok", "say: No.", "say: No.", "ok"]) as server:
        make(server, tmp_path / "made")
        assert server.calls == 7
        ways = {asked_flaw(body) for body in server.bodies}
    said = capsys.readouterr().err
    assert (
        "server corruptor: 2 of 7 copies failed: the reply does not end with the marked passage (2)"
        in " ".join(said.split())
    )
    rows = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert Counter(row["kind"] for row in rows)["quality"] == 2 * 4
    assert {row["corruption"] for row in rows} <= ways
    with FaultServer(backwards, ["say: No."]) as server, pytest.raises(ConfigError, match="0 training"):
        make(server, tmp_path / "none")
    assert "7 of 7 copies failed" in capsys.readouterr().err and not (tmp_path / "none").exists()


SERVER = {"url": "http://127.0.0.1:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({"backend": "server"}, {}, 'corruptor.backend = "server" needs corruptor.server.url: set it'),
        ({"server": SERVER}, {}, 'corruptor.backend is "rules": set corruptor.backend = "server", or remove'),
        (
            {"backend": "world"},
            {"world": None, "judge": {}, "rewriter": {}},
            "knows the synthetic world only",
        ),
        (
            {"backend": "none"},
            {},
            "corruptor.backend: unknown corruptor 'none'; known: rules, edits, world, server",
        ),
    ],
)
def test_settings_in_conflict_are_refused(
    tmp_path: Path, section: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, corruptor=section, **changes)


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [([], "rules"), (["--corruptor", "world"], "world"), (["--corruptor", "server"], "server")],
)
def test_the_command_line_names_the_corruptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], backend: str
) -> None:
    monkeypatch.setattr(cli, "_leave_process_group", lambda: None)  # the other tests' group
    taken: list[RunConfig] = []
    monkeypatch.setattr(judge_pairs, "make_judge_pairs", lambda cfg, out, spec: taken.append(cfg))
    settings = '[world]\n[judge]\nbackend = "world"\n'
    if backend == "server":
        settings += '[corruptor.server]\nurl = "http://127.0.0.1:1/v1"\nmodel = "m"\n'
    (tmp_path / "data.toml").write_text(settings)
    command = ["data", "judge-pairs", str(tmp_path / "data.toml"), "--out", str(tmp_path / "made")]
    cli.main([*command, *arguments])
    (cfg,) = taken
    assert cfg.corruptor.backend == backend
    made = open_corruptor(cfg, cast(Corpus, None), cast(Mesh, None))
    kind = {"rules": RuleCorruptor, "world": WorldCorruptor, "server": ServerCorruptor}[backend]
    assert type(made) is kind and made.name == backend
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--corruptor", "nobody"])
    assert left.value.code == 2 and len(taken) == 1


# --- by edits


def test_edits_reach_every_way_and_are_none_of_the_rules() -> None:
    from sip_engine.tasks.corruptors.edits import EditCorruptor

    requests = [
        RewriteRequest(
            f"Number {n} lives by the river and waits there.",
            f" It is {n} days old, and Fish {n} is its prey.",
        )
        for n in range(60)
    ]
    found = EditCorruptor().corrupt(requests, seed=4)
    assert found == EditCorruptor().corrupt(requests, seed=4) and found != EditCorruptor().corrupt(
        requests, seed=5
    )
    counts: Counter[str] = Counter()
    for number, (request, copy) in enumerate(zip(requests, found, strict=True)):
        assert isinstance(copy, Corruption)
        counts[copy.flaw] += 1
        words, before = copy.text.split(), request.suffix.split()
        if copy.flaw == "swap":
            assert (
                sorted(words) == sorted(before)
                and words[:2] == before[1::-1]
                and words[2:4] == before[3:1:-1]
            )
        elif copy.flaw == "copy":
            assert request.prefix.endswith(copy.text) and len(copy.text) == min(
                len(request.suffix), len(request.prefix)
            )
        elif copy.flaw == "misstate":
            assert copy.text.count(" is not ") == 2 and copy.text.startswith(" It is not ")
            assert words[3] != str(number) and words[3][:-1] == str(number)[:-1]
        else:
            assert len(words) == len(before) and words != before
            assert all(word.strip(",.") in " ".join(one.suffix for one in requests) for word in words)
    assert set(counts) == {"swap", "copy", "misstate", "substitute"} and min(counts.values()) > 5


def test_what_no_edit_changes_is_a_failure() -> None:
    from sip_engine.tasks.corruptors.edits import EditCorruptor

    assert isinstance(EditCorruptor().corrupt([RewriteRequest("", " ?!")])[0], Failure)
    assert isinstance(EditCorruptor().corrupt([RewriteRequest("a ?!", " ?!")])[0], Failure)
