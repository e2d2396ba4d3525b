"""Replies of judges, of which only a strict verdict counts, whatever it is clothed in."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sip_engine.judges.parsing import read_verdict, settled
from sip_engine.judges.prompts import judge_prompt
from sip_engine.llm.replies import MAX_REPLY_CHARS
from sip_engine.types import FactualityQuestion, Failure, PairQuestion, Question, SafetyQuestion

PAIR = PairQuestion("The heron is a bird.", " It eats fish.", " It eats iron.")
SAFETY = SafetyQuestion("It eats fish.")
FACTUALITY = FactualityQuestion("The heron is a bird.", " It eats fish.", " It eats iron.")
QUESTIONS: list[Question] = [PAIR, SAFETY, FACTUALITY]
MARKED = judge_prompt(PAIR)
LINE = {type(q): judge_prompt(q) for q in QUESTIONS}
OBJECT = {type(q): judge_prompt(q, format="json_schema") for q in QUESTIONS}


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: type(question).__name__)
@pytest.mark.parametrize("style", ["reasoned", "direct"])
def test_every_word_asked_for_is_read(question: Question, style: Any) -> None:
    line = judge_prompt(question, style=style)
    answers = {"1": 1.0, "2": 0.0, "yes": 1.0, "no": 0.0, "none": 1.0, "possible": 0.5, "definite": 0.0}
    for word in line.verdicts:
        assert f"VERDICT {line.mark}: {word} " in line.user, "the prompt says so"
        assert read_verdict(f"Because.\n\nVERDICT {line.mark}: {word}\r\n \n", line) == answers[word]
        assert read_verdict(line.verdict_start + word, line) == answers[word]
        fenced = judge_prompt(question, style=style, format="json_schema")
        values = {"reasoning": "Because.", "id": fenced.mark, "verdict": word}
        reply = json.dumps({name: values[name] for name in fenced.schema["properties"]}, indent=1)
        assert read_verdict(reply, fenced) == answers[word]


MARK = MARKED.mark


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        ("\n \u2028\n", "empty"),
        ("```\n```", "empty"),
        ("1", "not a verdict"),
        ("VERDICT: 1", "not a verdict"),
        ("**1**", "not a verdict"),
        (f"URTEIL {MARK}: 1", "not a verdict"),
        ("VERDICT 00000000: 1", "wrong mark"),
        (f"VERDICT {MARK}: 3", "not one of the words"),
        (f"VERDICT {MARK}: yes", "not one of the words"),
        (f"VERDICT {MARK}: 1 or 2", "not one of the words"),
        (f"VERDICT {MARK}: 1/2", "not one of the words"),
        (f"VERDICT {MARK}: 1 (2 is worse)", "not one of the words"),
        (f"VERDICT {MARK}: 1 is what they say, but I say the other", "not one of the words"),
        (f"VERDICT {MARK}: 12", "not one of the words"),
        (f"VERDICT {MARK}: -1", "not one of the words"),
        (f"VERDICT {MARK}: <but rather 2> 1 <or 2>", "not one of the words"),
        (f"VERDICT {MARK.upper()}x: 1", "wrong mark"),
        (f"VERDICT {MARK}: 1\nI hope that helps.", "not a verdict"),
        (f"I would not say VERDICT {MARK}: 1", "not a verdict"),
        (f"VERDICT {MARK}: 1\nVERDICT {MARK}: 2", "more than one"),
        (f"VERDICT {MARK}: 2\n\nVERDICT {MARK}: 2", "more than one"),
        (f"It may be VERDICT {MARK}: 2, but\nVERDICT {MARK}: 1", "more than one"),
        (f"It may be **verdict** `{MARK}`: 2, but\nVERDICT {MARK}: 1", "more than one"),
        (f"so\u2028VERDICT {MARK}: 1", "not a verdict"),
        (f"so\rVERDICT {MARK}: 1", "not a verdict"),
        (f"<think>VERDICT {MARK}: 1", "thoughts do not end"),
        (f"<|START_THINKING|>VERDICT {MARK}: 1", "thoughts do not end"),
        (f'<think budget="9">VERDICT {MARK}: 1', "thoughts do not end"),
        (f"VERDICT {MARK}: 1\n<think>", "thoughts do not end"),
        (f"VERDICT {MARK}: 1\n</think>\n", "empty but for its thoughts"),
        (f"{'x' * MAX_REPLY_CHARS}\nVERDICT {MARK}: 1", "longer than"),
    ],
)
def test_anything_but_one_strict_line_is_a_failure(reply: str, reason: str) -> None:
    found = read_verdict(reply, MARKED)
    assert isinstance(found, Failure) and reason in found.reason


@pytest.mark.parametrize(
    "reply",
    [
        # thoughts in front, whatever they rehearse, and with the opening tag in the prompt
        f"<think>\nThe first holds together.\n</think>\n\nVERDICT {MARK}: 1",
        f"<THINKING>I end with VERDICT {MARK}: 2? No.</THINKING>VERDICT {MARK}: 1",
        f"I must write VERDICT {MARK}: 1 or 2.\n</think>\nVERDICT {MARK}: 1",
        f"[THINK]VERDICT {MARK}: 2[/THINK]VERDICT {MARK}: 1",
        f"<think>a</think>\n<reasoning>VERDICT {MARK}: 2</reasoning>\nVERDICT {MARK}: 1",
        f"\u25c1think\u25b7VERDICT {MARK}: 2\u25c1/think\u25b7VERDICT {MARK}: 1",
        f"<|channel|>analysis<|message|>VERDICT {MARK}: 2<|end|><|channel|>final<|message|>VERDICT {MARK}: 1",
        f"<|START_THINKING|>VERDICT {MARK}: 2<|END_THINKING|><|START_RESPONSE|>VERDICT {MARK}: 1<|END_RESPONSE|>",
        f"<seed:think>VERDICT {MARK}: 2</seed:think>VERDICT {MARK}: 1",
        f"<|think|>VERDICT {MARK}: 2<|/think|>VERDICT {MARK}: 1",
        f'<reasoning effort="high">VERDICT {MARK}: 2</reasoning>VERDICT {MARK}: 1',
        # markdown, quotes, fences, tags
        f"Reason.\n\n**VERDICT {MARK}: 1**",
        f"Reason.\n\n**VERDICT {MARK}:** 1",
        f"> _VERDICT {MARK}: 1_",
        f"## VERDICT `{MARK}`: `1`",
        f"- VERDICT {MARK}: **1**.",
        f"```text\nVERDICT {MARK}: 1\n```",
        f"```VERDICT {MARK}: 1```",
        f"~~~\nVERDICT {MARK}: 1\n~~~\n",
        f"Reason.\n<answer>VERDICT {MARK}: 1</answer>",
        f"Reason.\nVERDICT {MARK}: 1\n</answer>\n",
        f'"VERDICT {MARK}: 1"',
        f"$\\boxed{{VERDICT {MARK}: 1}}$",
        f"VERDICT {MARK}: \\boxed{{1}}",
        f"VERDICT {MARK}: 1\n---\n",
        f"Reason.<br>VERDICT {MARK}: 1<br/>",
        f"<p>Reason.</p><p>VERDICT {MARK}: 1</p>",
        f'<span style="color: green">VERDICT {MARK}: 1</span>',
        # tokens that leak
        f"VERDICT {MARK}: 1<|im_end|>",
        f"VERDICT {MARK}: 1</s>",
        f"VERDICT {MARK}: 1<|eot_id|>\n",
        f"VERDICT {MARK}: 1<\uff5cend\u2581of\u2581sentence\uff5c>",
        # blanks, case, punctuation
        f"  VERDICT {MARK}: 1 \u00a0",
        f"verdict {MARK}: 1!",
        f"VERDICT {MARK.upper()}: 1",
        f"VERDICT {MARK}:1",
        f"VERDICT {MARK} : (1)",
        f"VERDICT {MARK}\uff1a1\u3002",
        f"VERDICT [{MARK}]: [1]",
        f"VERDICT {MARK}:\n\n1",
        f"Final answer: VERDICT {MARK}: 1",
        # the prompt's own remark
        f"VERDICT {MARK}: 1   (if continuation_1 is better)",
        f"VERDICT {MARK}: 1 - continuation_1 is better.",
        f"VERDICT {MARK}: 1 (the better one)",
        f"VERDICT {MARK}: continuation_1",
    ],
)
def test_everyday_clothing_does_not_hide_a_verdict(reply: str) -> None:
    assert read_verdict(reply, MARKED) == 1.0


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("None", 1.0),
        ("possible (there is a possible one, and no definite one)", 0.5),
        ("**Definite**", 0.0),
    ],
)
def test_words_are_read_whatever_their_case(reply: str, answer: float) -> None:
    line = LINE[FactualityQuestion]
    assert read_verdict(f"VERDICT {line.mark}: {reply}", line) == answer
    word = judge_prompt(next(q for q in QUESTIONS if isinstance(q, FactualityQuestion)), style="compact")
    assert read_verdict(f"<think>x</think>\n{reply}", word) == answer


GOOD_OBJECT = {"reasoning": "r", "id": OBJECT[PairQuestion].mark, "verdict": "1"}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (json.dumps(GOOD_OBJECT)[:-1], "not one JSON object"),
        (json.dumps(GOOD_OBJECT) * 2, "more than one object"),
        ("[" * 50_000, "not one JSON object"),
        ('{"a":' * 20_000, "not one JSON object"),
        ("{" * 50_000, "not one JSON object"),
        ("9" * 10_000, "not one JSON object"),
        (json.dumps({"id": GOOD_OBJECT["id"], "answer": "1"}), "not the keys asked for"),
        (json.dumps({"verdict": "1"}), "not the keys asked for"),
        (json.dumps(GOOD_OBJECT)[:-1] + ', "verdict": "2"}', "each once"),
        (json.dumps(GOOD_OBJECT)[:-1] + ', "Verdict": "2"}', "each once"),
        (json.dumps({"a": GOOD_OBJECT, "b": GOOD_OBJECT | {"verdict": "2"}}), "more than one object"),
        (json.dumps(GOOD_OBJECT | {"verdict": ["1"]}), "not one of the words"),
        (json.dumps(GOOD_OBJECT | {"verdict": None}), "not one of the words"),
        (json.dumps(GOOD_OBJECT | {"verdict": -1}), "not one of the words"),
        (json.dumps(GOOD_OBJECT | {"verdict": 1.5}), "not one of the words"),
        (json.dumps(GOOD_OBJECT | {"verdict": "first"}), "not one of the words"),
        (json.dumps(GOOD_OBJECT | {"id": "00000000"}), "wrong mark"),
        (json.dumps(GOOD_OBJECT) + "\nNo: the second one.", "goes on behind"),
    ],
)
def test_anything_but_one_strict_object_is_a_failure(reply: str, reason: str) -> None:
    found = read_verdict(reply, OBJECT[PairQuestion])
    assert isinstance(found, Failure) and reason in found.reason


@pytest.mark.parametrize(
    "reply",
    [
        f"```json\n{json.dumps(GOOD_OBJECT, indent=2)}\n```",
        f"Here is the verdict:\n{json.dumps(GOOD_OBJECT)}",
        f"Of {{these}} two:\n\n{json.dumps(GOOD_OBJECT)}<|im_end|>",
        f"<think>\n{json.dumps(GOOD_OBJECT | {'verdict': '2'})}\n</think>\n{json.dumps(GOOD_OBJECT)}",
        json.dumps(GOOD_OBJECT | {"verdict": 1}),
        json.dumps(GOOD_OBJECT | {"verdict": 1.0}),
        json.dumps(GOOD_OBJECT | {"verdict": "continuation_1"}),
        json.dumps(GOOD_OBJECT | {"verdict": " 1. "}),
        json.dumps(GOOD_OBJECT | {"confidence": "high"}),
        json.dumps(GOOD_OBJECT | {"reasoning": None}),
        json.dumps({"id": GOOD_OBJECT["id"].upper(), "verdict": "1"}),
        json.dumps({"ID": GOOD_OBJECT["id"], "Verdict": "1"}),
        json.dumps([GOOD_OBJECT]),
        json.dumps({"answer": GOOD_OBJECT}),
        json.dumps(GOOD_OBJECT).replace('"r"', '"two\nlines"'),
    ],
)
def test_everyday_clothing_does_not_hide_an_object(reply: str) -> None:
    assert read_verdict(reply, OBJECT[PairQuestion]) == 1.0


def test_a_boolean_answers_yes_or_no() -> None:
    prompt = OBJECT[SafetyQuestion]
    assert read_verdict(json.dumps({"id": prompt.mark, "verdict": True}), prompt) == 1.0
    assert read_verdict(json.dumps({"id": prompt.mark, "verdict": False}), prompt) == 0.0
    pair = OBJECT[PairQuestion]
    assert isinstance(read_verdict(json.dumps({"id": pair.mark, "verdict": True}), pair), Failure)


VERDICT_PIECES = st.one_of(
    st.sampled_from(
        ["VERDICT ", MARK, ": ", "1", "2", "yes", "\n", "\r", " ", "\t", "\u2028", "\x0b", "\x85", "."]
    ),
    st.sampled_from(
        [f"VERDICT {MARK}: 1", f"VERDICT {MARK}: 2", f"\nVERDICT {MARK}: 1", "VERDICT 00000000: 1"]
    ),
    st.text(max_size=20),
)


@settings(max_examples=1000)
@given(st.lists(VERDICT_PIECES, max_size=8).map("".join))
@example(f"VERDICT {MARK}: 1\x0b")
@example(f"fine\nVERDICT {MARK}: 1\n\n\t")
def test_a_thousand_random_replies_invent_no_score(reply: str) -> None:
    """Whoever reads a verdict must find its mark once, and at the end, but for signs, this verdict and no more."""
    found = read_verdict(reply, MARKED)
    strict = re.fullmatch(rf"(.*\n)?VERDICT {MARK}: ([12])[ \t\r]*(\n[ \t\r]*)*", reply, re.DOTALL)
    if strict and MARK not in (strict[1] or ""):
        assert found == {"1": 1.0, "2": 0.0}[strict[2]]
    if isinstance(found, float):
        word = {1.0: "1", 0.0: "2"}[found]
        squeezed = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", reply)).lower()
        assert squeezed.endswith(f"verdict{MARK}{word}") and squeezed.count(f"verdict{MARK}") == 1


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(), st.sampled_from(["1", "2", "yes", MARK]), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(list(GOOD_OBJECT)), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=1000)
@given(
    st.one_of(
        JSON_VALUES.map(json.dumps),
        st.builds(
            lambda change: json.dumps(GOOD_OBJECT | change),
            st.dictionaries(st.sampled_from(list(GOOD_OBJECT)), JSON_VALUES),
        ),
        st.builds(
            lambda at, length, put: (text := json.dumps(GOOD_OBJECT))[:at] + put + text[at + length :],
            st.integers(0, 80),
            st.integers(0, 9),
            st.sampled_from(["", '"', "}", "{", ",", '"verdict": "2",', " ", "\n", "1", "\\u0031"]),
        ),
    )
)
def test_a_thousand_random_objects_invent_no_score(reply: str) -> None:
    """A score needs an object with the mark whose verdict it is, and no second one with the mark."""
    found = read_verdict(reply, OBJECT[PairQuestion])
    verdicts = []  # of every piece of the reply that is an object with the mark
    for at, end in itertools.product(*([n for n, c in enumerate(reply) if c == side] for side in "{}")):
        with contextlib.suppress(ValueError):
            pairs = json.loads(reply[at : end + 1], strict=False, object_pairs_hook=list)
            is_ours = str(dict(pairs).get("id")).strip().lower() == GOOD_OBJECT["id"]
            if is_ours and len(dict(pairs)) == len(pairs):
                verdicts.append(dict(pairs).get("verdict"))
    if isinstance(found, float):
        whole = int(verdicts[0]) if isinstance(verdicts[0], float) else verdicts[0]
        said = unicodedata.normalize("NFKC", str(whole))
        assert len(verdicts) == 1 and re.sub(r"[\W_]", "", said) == {1.0: "1", 0.0: "2"}[found]
    if verdicts in (["1"], ["2"]) and reply == json.dumps(GOOD_OBJECT | {"verdict": verdicts[0]}):
        assert found == {"1": 1.0, "2": 0.0}[str(verdicts[0])]


def test_a_text_does_not_differ_from_itself() -> None:
    assert settled(PairQuestion("p", "same", "same")) == 0.5
    assert all(settled(question) is None for question in QUESTIONS)
