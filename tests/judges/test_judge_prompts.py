"""Prompts of judges that no text can leave."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from fault_server import BAD, GOOD, fenced_texts, rule_judge, rule_word
from hypothesis import example, given
from hypothesis import strategies as st

from sip_engine.evaluation.injection_texts import INJECTIONS
from sip_engine.judges import prompts
from sip_engine.judges.parsing import read_verdict
from sip_engine.judges.prompts import Prompt, judge_prompt
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
