"""Bodies of completions: one finished reply with its tokens, or why there is none in the server's own words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fault_server import completion
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sip_engine.llm.completion import read_completion, server_words
from sip_engine.types import Failure

JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.sampled_from(["1", "2", "yes"]), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["content", "text", "type"]), inner, max_size=3),
    ),
    max_leaves=6,
)


def test_a_completion_is_read_with_its_tokens() -> None:
    assert read_completion(completion("hello \U0001f600")) == ("hello \U0001f600", (100, 11))
    assert read_completion(completion("x").replace(b"100", b"-5")) == ("x", (0, 11))
    assert read_completion(completion("x").replace(b'"usage"', b'"use"')) == ("x", (0, 0))


@settings(max_examples=1000)
@given(
    st.one_of(
        st.binary(max_size=50),
        JSON_VALUES.map(lambda value: json.dumps({"choices": value}).encode()),
        JSON_VALUES.map(lambda value: json.dumps({"choices": [{"message": value}]}).encode()),
        JSON_VALUES.map(lambda value: json.dumps({"usage": value, "choices": []}).encode()),
        JSON_VALUES.map(lambda value: completion(value)),
        JSON_VALUES.map(lambda value: completion("x", finish_reason=value)),
        JSON_VALUES.map(lambda value: completion("x", index=value)),
        st.builds(
            lambda at, put: completion("hello")[:at] + put + completion("hello")[at + 1 :],
            st.integers(0, 200),
            st.sampled_from([b"", b"\xff", b'"', b"}", b"[", b"\\ud800"]),
        ),
    )
)
@example(completion("x").replace(b'"x"', b'"\\ud800"'))
@example(b"[" * 100_000)
@example(completion("x", index="0"))
def test_a_thousand_random_bodies_invent_no_reply(data: bytes) -> None:
    found, tokens = read_completion(data)
    assert min(tokens) >= 0
    if isinstance(found, str):
        (choice,) = json.loads(data)["choices"]
        said = choice["message"]["content"] if "message" in choice else choice["text"]
        parts = [said] if isinstance(said, str) else [_said_by(part) for part in said]
        assert found == "".join(parts) != "" and choice.get("index") in (0, None) and found.encode()
        assert choice.get("finish_reason") not in ("length", "content_filter", "tool_calls")


def _said_by(part: Any) -> str:
    if isinstance(part, str):
        return part
    is_text = part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str)
    return part["text"] if is_text else ""


PARTS = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": "It is "},
    {"type": "text", "text": "1"},
]


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (completion("1", finish_reason=None), "1"),
        (completion("1", finish_reason="STOP"), "1"),
        (completion("1", finish_reason="end_turn"), "1"),
        (completion("1").replace(b', "finish_reason": "stop"', b""), "1"),
        (completion(PARTS), "It is 1"),
        (completion(["It is ", "1"]), "It is 1"),
        (completion("1", index=None), "1"),
        (completion("1", message={"content": "1", "reasoning_content": "long"}), "1"),
        (b"\xef\xbb\xbf" + completion("1"), "1"),
        (b"\n\n " + completion("1"), "1"),
        (json.dumps({"choices": [{"text": "1", "finish_reason": "stop"}]}).encode(), "1"),
    ],
)
def test_a_completion_in_everyday_clothing_is_read(data: bytes, reply: str) -> None:
    assert read_completion(data)[0] == reply


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"error": {"message": "no credits left", "code": 402}}', "no credits left"),
        (b"<!DOCTYPE html><style>p {}</style><h1>Sign in &amp; go</h1>", "it said: Sign in & go"),
        (b'data: {"choices": []}\n\ndata: [DONE]', "it said: data: {"),
        (
            completion(None, message={"content": None, "refusal": "I cannot judge this."}),
            "I cannot judge this.",
        ),
        (completion("", message={"content": "", "reasoning": "First, the"}), "enable_thinking = false"),
        (
            completion(None, message={"content": None, "reasoning_content": "Hm, the first"}),
            "it said: Hm, the first",
        ),
        (completion("<think>Let me", finish_reason="length"), "raise max_tokens = 512"),
        (completion("<think>Let me", finish_reason="length"), "it said: <"),
        (completion("No.", finish_reason="content_filter"), "it said: No."),
        (completion(None, message={"content": None, "reasoning_text": "Hm, the first"}), "it said: Hm, the"),
        (completion("", message={"content": "", "thinking": "Hm, the first"}), "enable_thinking = false"),
        # where nothing is known by its name, all of it
        (completion("", message={"content": "", "reasoning_details": [{"text": "Hm"}]}), "it said: {"),
        (completion([{"text": {"value": "1"}}]), "is empty; it said: {"),
        (
            completion(None, finish_reason="tool_calls", message={"tool_calls": [{"name": "f"}]}),
            '"tool_calls"',
        ),
        (
            b'{"choices": [{"error": {"message": "upstream died"}, "finish_reason": "error"}]}',
            "upstream died",
        ),
    ],
)
def test_what_the_server_said_is_shown(data: bytes, said: str) -> None:
    found, _ = read_completion(data, max_tokens=512)
    assert isinstance(found, Failure) and said in found.reason and "\n" not in found.reason


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b'{"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}',
            "body.seed: Extra inputs",
        ),
        (b'{"object": "error", "message": "too long", "code": 400}', "too long"),
        (b'{"error": "model not loaded"}', "model not loaded"),
        (b'{"errors": [{"message": "a"}, {"message": "b"}]}', "a; b"),
        (b"<html><title>502 Bad Gateway</title><hr>nginx</html>", "502 Bad Gateway nginx"),
        (b"upstream\tconnect\nerror \xff", "upstream connect error \ufffd"),
        (b'{"error": null, "trace": [1]}', '{"error": null, "trace": [1]}'),
        (b"[" * 100_000, "[" * 200),
        (b"", ""),
    ],
)
def test_a_servers_words_are_found(data: bytes, words: str) -> None:
    assert server_words(data).startswith(words) and len(server_words(data)) <= 200
