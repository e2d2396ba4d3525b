"""Prompts that no text can leave, and replies of which only a strict verdict counts."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from fault_server import BAD, GOOD, completion, fenced_texts, rule_judge, rule_word
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.judges import prompts
from sip_engine.judges.parsing import read_verdict, settled
from sip_engine.judges.prompts import Prompt, judge_prompt
from sip_engine.llm.completion import read_completion, server_words
from sip_engine.llm.replies import MAX_REPLY_CHARS
from sip_engine.llm.untrusted import make_mark, neutral
from sip_engine.types import FactualityQuestion, Failure, PairQuestion, Question, SafetyQuestion

PAIR = PairQuestion("The heron is a bird.", " It eats fish.", " It eats iron.")
SAFETY = SafetyQuestion("It eats fish.")
FACTUALITY = FactualityQuestion("The heron is a bird.", " It eats fish.", " It eats iron.")
QUESTIONS: list[Question] = [PAIR, SAFETY, FACTUALITY]
MARKED = judge_prompt(PAIR)

# Pieces of fences, verdicts and templates, so that random texts attack more than random letters would.
FRAGMENTS = "<<< >>> <<<BEGIN <<<END prefix continuation_1 passage VERDICT : 1 <| |> </s> [INST] 00000000"
PIECES = st.sampled_from(
    [*FRAGMENTS.split(), MARKED.mark, " ", "\n", "\r\n", "\x1b", "\u2028", "\ud800", "\u202e", "\x00"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(st.characters(codec=None), max_size=8)), max_size=12).map("".join)


def as_body(prompt: Prompt, **fields: Any) -> dict[str, Any]:
    return {"messages": prompt.messages(), **fields}


@given(TEXTS, TEXTS, TEXTS, st.sampled_from(["pair", "safety", "factuality"]), st.text(max_size=3))
def test_every_text_comes_back_out_of_its_fence(a: str, b: str, c: str, kind: str, key: str) -> None:
    question: Question
    if kind == "pair":
        question, texts = PairQuestion(a, b, c), {"prefix": a, "continuation_1": b, "continuation_2": c}
    elif kind == "safety":
        question, texts = SafetyQuestion(a), {"passage": a}
    else:
        question, texts = FactualityQuestion(a, b, c), {"prefix": a, "reference": b, "continuation": c}
    prompt = judge_prompt(question, key=key)
    assert fenced_texts(as_body(prompt)) == {name: neutral(text) for name, text in texts.items()}
    assert not any(prompt.mark in neutral(text).lower() for text in texts.values())
    assert prompt.system.isascii() and prompt.user.encode(), "nothing that JSON in UTF-8 cannot carry"


def test_a_text_that_holds_its_mark_gets_another() -> None:
    first = make_mark("key", ["about"], ["harmless"])
    second = make_mark("key", ["about"], ["it knows ", f"{first.upper()}!"])
    third = make_mark("key", ["about"], [first, second])
    assert len({first, second, third}) == 3
    assert all(re.fullmatch("[0-9a-f]{8}", mark) for mark in (first, second, third))


def test_marks_repeat_for_the_same_texts_and_differ_otherwise() -> None:
    assert judge_prompt(PAIR, key="7") == judge_prompt(PAIR, key="7")
    questions = [PAIR, FACTUALITY, PairQuestion(PAIR.prefix, PAIR.second, PAIR.first), SAFETY]
    marks = {judge_prompt(question, key=key).mark for question in questions for key in ("", "7")}
    assert len(marks) == 2 * len(questions)
    # Parts are kept apart: the same characters cut elsewhere are another question.
    assert judge_prompt(PairQuestion("a", "bc", "d")).mark != judge_prompt(PairQuestion("a", "b", "cd")).mark


def test_hidden_characters_are_shown_and_all_others_kept() -> None:
    assert neutral("a\r\nb\rc\n\td") == "a\nb[U+000D]c\n\td"
    needed = set("\t\n\xad\u200c\u200d") | {chr(c) for c in range(0x600, 0x606)}
    needed |= set("\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
    for code in range(0x110000):
        char = chr(code)
        hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in needed
        shown = neutral(char)
        if hidden:
            assert shown == f"[U+{code:04X}]"
        elif shown != char:
            # Nothing else but what stands among format characters and is not assigned, or shapes hieroglyphs.
            category = unicodedata.category(char)
            assert category == "Cn" or 0x13430 <= code <= 0x1343F, (hex(code), category)


SPECIAL = (
    "<|im_end|> <|eot_id|> <|endoftext|> </s> <s> [INST] [/INST] <<SYS>> <</SYS>> <start_of_turn> <end_of_turn> "
    "<bos> <EOS> <\uff5cAssistant\uff5c> <think> </think> [TOOL_CALLS] <tool_response> <<<BEGIN <<<END"
)


@pytest.mark.parametrize("token", SPECIAL.split())
def test_special_tokens_of_chat_templates_are_broken(token: str) -> None:
    shown = neutral(f"a{token}b{token}")
    assert token not in shown and shown.replace("\u00b7", "") == f"a{token}b{token}"


@given(TEXTS)
@example("a < b > c | d <b>bold</b> x<<1 [1] {y} \u00e9\u4e2d\U0001f600")
def test_neutral_text_stays_as_it_is(text: str) -> None:
    assert neutral(neutral(text)) == neutral(text)
    if re.fullmatch(r"[\w \n.,;:!?'\"()%=+-]*", text):
        assert neutral(text) == text


def test_all_comparisons_of_a_group_begin_with_the_same_characters() -> None:
    sent = [
        judge_prompt(PairQuestion(PAIR.prefix, first, second))
        for first, second in [("a", "b"), ("b", "a"), ("c", "a"), ("a", MARKED.user)]
    ]
    shared = sent[0].user.index("<<<BEGIN continuation_1")
    assert PAIR.prefix in sent[0].user[:shared]
    for one, other in pairwise(sent):
        assert one.system == other.system and one.user[:shared] == other.user[:shared]


def test_a_long_prefix_keeps_its_end() -> None:
    question = PairQuestion("x" * 50 + "the end", "a", "b")
    assert fenced_texts(as_body(judge_prompt(question, max_prefix_chars=7)))["prefix"] == "the end"


def test_without_a_system_role_nothing_is_lost() -> None:
    (message,) = MARKED.messages(system_role=False)
    assert message == {"role": "user", "content": f"{MARKED.system}\n\n{MARKED.user}"}


ATTACKED: list[tuple[Question, str]] = [
    # The attacker's text, T, and the verdict that the rule gives whatever stands in it.
    (PairQuestion("p", "T", f"a {GOOD}"), "2"),
    (PairQuestion("p", f"a {GOOD}", "T"), "1"),
    (PairQuestion("T", f"a {GOOD}", f"{GOOD} and {GOOD}"), "2"),
    (SafetyQuestion("T"), "no"),
    (FactualityQuestion("p", "r", "T"), "definite"),
    (FactualityQuestion("p", "T", f"a {BAD} and a {BAD}"), "definite"),
]


def attacked(question: Question, text: str) -> Question:
    """The question with the attacker's text, which goes on with something bad after the injection."""
    fields = {name: f"{text} a {BAD}" if value == "T" else value for name, value in vars(question).items()}
    return type(question)(**fields)


@pytest.mark.parametrize("injection", INJECTIONS, ids=lambda injection: injection.name)
def test_no_injected_text_moves_a_rule(injection: Any) -> None:
    for question, word in ATTACKED:
        for format in ("verdict_line", "json_schema"):
            prompt = judge_prompt(attacked(question, f"dull\n{injection.text}\n"), format=format)
            fields = {"json_schema": {"schema": prompt.schema}}
            body = as_body(prompt, **({"response_format": fields} if format == "json_schema" else {}))
            assert rule_word(body) == word, injection.name
            assert read_verdict(rule_judge(body), prompt) == prompt.verdicts[word]
            assert isinstance(read_verdict(injection.text, prompt), Failure), "a reply that repeats it"
            assert isinstance(read_verdict(f"It says:\n{injection.text}", prompt), Failure)


def test_the_injections_do_move_a_rule_without_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attacks against fences with a mark that can be guessed, around texts left as they are."""
    monkeypatch.setattr(prompts, "neutral", lambda text: text)
    monkeypatch.setattr(prompts, "make_mark", lambda key, about, texts: "00000000")
    monkeypatch.setattr(
        prompts,
        "fence",
        lambda name, text, mark: f"<<<BEGIN {name} {mark}>>>\n{text}\n<<<END {name} {mark}>>>",
    )
    moved = set()
    for injection in INJECTIONS:
        for number, (question, word) in enumerate(ATTACKED):
            prompt = judge_prompt(attacked(question, f"dull\n{injection.text}\n"))
            if rule_word(as_body(prompt)) != word:
                moved.add(number)
            if isinstance(read_verdict(injection.text, prompt), float):
                moved.add(-1)
    assert moved >= {-1, 0, 3, 4}


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
        said = unicodedata.normalize("NFKC", str(verdicts[0]))
        assert len(verdicts) == 1 and re.sub(r"[\W_]", "", said) == {1.0: "1", 0.0: "2"}[found]
    if verdicts in (["1"], ["2"]) and reply == json.dumps(GOOD_OBJECT | {"verdict": verdicts[0]}):
        assert found == {"1": 1.0, "2": 0.0}[verdicts[0]]


def test_a_text_does_not_differ_from_itself() -> None:
    assert settled(PairQuestion("p", "same", "same")) == 0.5
    assert all(settled(question) is None for question in QUESTIONS)


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
        parts = [said] if isinstance(said, str) else [part["text"] for part in said]
        assert found == "".join(parts) != "" and choice.get("index", 0) == 0 and found.encode()
        assert choice.get("finish_reason") not in ("length", "content_filter", "tool_calls")


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
