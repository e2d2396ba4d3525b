"""The cache of replies: the same request is paid for once, and no file, good or bad, stops a run."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer, rule_judge
from server_judges import PAIR, judge, several, value

from sip_engine.llm.reply_cache import ReplyCache, request_key
from sip_engine.types import Failure
from sip_engine.utils.errors import DataError


def test_the_same_request_is_paid_for_once(tmp_path: Path) -> None:
    cache = tmp_path / "sub" / "replies.sqlite"
    with FaultServer(rule_judge) as server:
        questions = several(10)
        paid = judge(server, cache=cache).judge(questions, seed=1)
        kept = judge(server, cache=cache).judge(questions, seed=1)
        assert server.calls == 10
        assert [value(one) for one in kept] == [value(one) for one in paid]
        assert all(one.cost.calls == one.cost.tokens == one.cost.seconds == 0 for one in kept)
        others: list[dict[str, Any]] = [
            {"model": "other"},
            {"temperature": 0.5},
            {"extra_body": {"min_p": 0.1}},
            {"style": "direct"},
        ]
        for other in others:
            judge(server, cache=cache, **other).judge(questions[:1], seed=1)
        judge(server, cache=cache).judge(questions[:1], seed=2)
        judge(server, cache=cache, omit=["seed"]).judge(questions[:1], seed=1)
        judge(server, cache=cache, omit=["seed"]).judge(questions[:1], seed=2)
        assert server.calls == 17, "another model, body or seed is another request"
    with FaultServer(rule_judge) as elsewhere:
        judge(elsewhere, cache=cache).judge(questions[:1], seed=1)
        assert elsewhere.calls == 1


def test_only_verdicts_are_kept(tmp_path: Path) -> None:
    cache = tmp_path / "replies.sqlite"
    with FaultServer(rule_judge, ["say: no verdict", "length", "400", "ok"]) as server:
        for _ in range(3):
            assert isinstance(judge(server, cache=cache).judge([PAIR])[0], Failure)
        with sqlite3.connect(cache) as db:
            assert db.execute("SELECT count(*) FROM replies").fetchone() == (0,)
        assert value(judge(server, cache=cache).judge([PAIR])[0]) == 1.0
        assert value(judge(server, cache=cache).judge([PAIR])[0]) == 1.0
        assert server.calls == 4


def test_a_kept_reply_is_read_as_strictly_as_a_new_one(tmp_path: Path) -> None:
    cache = tmp_path / "replies.sqlite"
    with FaultServer(rule_judge) as server:
        judge(server, cache=cache).judge([PAIR])
        with sqlite3.connect(cache) as db:
            db.execute("UPDATE replies SET reply = 'VERDICT 00000000: 2'")
        assert value(judge(server, cache=cache).judge([PAIR])[0]) == 1.0 and server.calls == 2
        with sqlite3.connect(cache) as db:
            db.execute("UPDATE replies SET reply = x'ff00'")
        assert value(judge(server, cache=cache).judge([PAIR])[0]) == 1.0 and server.calls == 3


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"not a database at all" * 100)
    folder = tmp_path / "folder"
    folder.mkdir()
    with FaultServer(rule_judge) as server:
        for path, reason in (
            (other, "another program"),
            (damaged, "not a database"),
            (folder, "folder"),
        ):
            before = path.read_bytes() if path.is_file() else b""
            with pytest.raises(DataError, match=reason) as caught:
                judge(server, cache=path)
            assert str(path) in str(caught.value) and "choose another path" in str(caught.value)
            assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_reply_changed_on_disk_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with ReplyCache(path) as cache:
        cache.put("key", "score: 71")
    path.write_bytes(path.read_bytes().replace(b"score: 71", b"score: 17"))
    with ReplyCache(path) as cache:
        assert cache.get("key") is None
        cache.put("key", "score: 71")
    with ReplyCache(path) as cache:
        assert cache.get("key") == "score: 71"


def test_a_cache_without_checksums_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            "CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID;"
            f"PRAGMA application_id = {0x51BE7A11}; INSERT INTO replies VALUES ('old', 'paid for');"
        )
    with ReplyCache(path) as cache:
        assert cache.get("old") == "paid for"
        cache.put("new", "too")
    with ReplyCache(path) as cache:
        assert (cache.get("old"), cache.get("new")) == ("paid for", "too")


def test_a_cache_damaged_in_mid_run_does_not_stop_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "replies.sqlite"
    with FaultServer(rule_judge) as server:
        one = judge(server, cache=cache)
        one.judge(several(300))
        data = bytearray(cache.read_bytes())
        data[4096:] = b"\xa5" * (len(data) - 4096)  # tables are gone, the first page is not
        cache.write_bytes(data)
        assert [value(found) for found in one.judge(several(30))] == [float(n % 3 != 0) for n in range(30)]
        cache.write_bytes(b"nothing")
        assert value(one.judge([PAIR])[0]) == 1.0
    said = capfd.readouterr().err
    assert said.count("going on without it") == 1 and str(cache) in said.replace("\n", "")


@pytest.mark.parametrize("reading", [True, False])
def test_a_cache_that_fails_while_open_is_given_up(
    reading: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "replies.sqlite"
    with ReplyCache(path) as cache:
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE replies")
        if reading:
            assert cache.get("x") is None and cache.failed
        for n in range(100):
            cache.put(str(n), "reply")
        assert cache.get("x") is None
    assert cache.failed
    assert capfd.readouterr().err.count("going on without it") == 1


JUDGE = """
import sys
sys.path[:0] = sys.argv[3:]
from server_judges import JudgeServerConfig, ServerJudge, several
settings = {"url": sys.argv[1], "model": "rule", "concurrency": 1, "cache": sys.argv[2]}
print(len(ServerJudge(JudgeServerConfig.model_validate(settings)).judge(several(20))))
"""


def test_what_was_paid_for_before_a_kill_is_not_asked_again(tmp_path: Path) -> None:
    """Killed when the 13th request arrives, by when the 12 replies are in the file; the next process asks for 8."""
    cache = tmp_path / "replies.sqlite"
    processes: list[subprocess.Popen[bytes]] = []

    def count() -> int:
        with closing(sqlite3.connect(cache)) as db:
            return int(db.execute("SELECT count(*) FROM replies").fetchone()[0])

    def kill_in_the_13th(body: dict[str, Any]) -> None:
        if len(server.bodies) == 13 and processes[0].poll() is None:
            until = time.monotonic() + 20
            while count() < 12 and time.monotonic() < until:
                time.sleep(0.01)
            processes[0].kill()
            processes[0].wait()

    with FaultServer(rule_judge, before=kill_in_the_13th) as server:
        command = [sys.executable, "-c", JUDGE, server.url, str(cache), str(Path(__file__).parents[1])]
        processes.append(subprocess.Popen(command))
        assert processes[0].wait(timeout=100) == -signal.SIGKILL
        assert count() == 12 and server.calls == 13
        assert subprocess.check_output(command, timeout=100) == b"20\n"
        assert server.calls == 13 + 8
    paid = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(set(paid)) == 20 and paid.count(paid[12]) == 2, "only what was on its way is asked twice"


WRITER = """
import sys
from pathlib import Path
from sip_engine.llm.reply_cache import ReplyCache
for batch in range(4):
    with ReplyCache(Path(sys.argv[1])) as cache:
        for n in range(100):
            key = f"{sys.argv[2]}-{batch}-{n}"
            assert cache.get(key) is None
            cache.put(key, key)
            cache.put(f"both-{n}", "same")
"""


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)]) for n in range(3)]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0, 0]
    with ReplyCache(path) as cache:
        for writer in range(3):
            for batch in range(4):
                for n in range(100):
                    key = f"{writer}-{batch}-{n}"
                    assert cache.get(key) == key
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM replies").fetchone() == (1300,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_key_of_a_request_is_its_content() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    keys = {
        request_key(url, other, seed)
        for url in ("a", "b")
        for other in (body, {**body, "n": 1})
        for seed in (0, 1)
    }
    assert len(keys) == 8 and request_key("a", dict(reversed(body.items())), 0) in keys
