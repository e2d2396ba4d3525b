"""Strict reading of a judge model's reply: a verdict stands where it must, once, or there is none."""

from __future__ import annotations

from sip_engine.judges.prompts import Prompt
from sip_engine.llm.messages import MAX_REPLY_CHARS, read_object
from sip_engine.types import Failure, PairQuestion, Question


def settled(question: Question) -> float | None:
    """The answer to a question that no judge is needed for: two equal continuations do not differ."""
    if isinstance(question, PairQuestion) and question.first == question.second:
        return 0.5
    return None


def read_verdict(reply: str, prompt: Prompt) -> float | Failure:
    """The answer, in [0, 1], that a reply gives in the prompt's format; never raises.

    - verdict_line: the last line that is not blank is `VERDICT <mark>: <word>`, character by character (blanks at
      its end aside), with the prompt's mark and one of its words, and the reply has no other with this mark.
    - word: the reply is one of the words, and nothing else but blanks around it.
    - json_schema: the whole reply is one JSON object with the schema's keys, each once, the prompt's mark as
      `id`, and one of its words as `verdict`.

    Anything else is a Failure that says what was wrong.
    """
    if len(reply) > MAX_REPLY_CHARS:
        return Failure(f"the reply is longer than {MAX_REPLY_CHARS:,} characters")
    if not reply.strip():
        return Failure("the reply is empty")
    if prompt.format == "word":
        return prompt.verdicts.get(reply.strip(), Failure("the reply is not one of the words asked for"))
    return _read_json(reply, prompt) if prompt.format == "json_schema" else _read_line(reply, prompt)


def _read_line(reply: str, prompt: Prompt) -> float | Failure:
    # Not splitlines(): its notion of a line end is wider than that of the model that was asked for a line.
    last = [line for line in reply.split("\n") if line.strip(" \t\r")][-1].rstrip(" \t\r")
    if not last.startswith(prompt.verdict_start):
        other = last.startswith("VERDICT ")
        return Failure("the reply has a wrong mark" if other else "the last line is not a verdict")
    if reply.count(f"VERDICT {prompt.mark}") != 1:
        return Failure("there is more than one verdict")
    word = last.removeprefix(prompt.verdict_start)
    return prompt.verdicts.get(word, Failure("the verdict is not one of the words asked for"))


def _read_json(reply: str, prompt: Prompt) -> float | Failure:
    value = read_object(reply, prompt.schema["required"], prompt.mark)
    if isinstance(value, Failure):
        return value
    return prompt.verdicts.get(value["verdict"], Failure("the verdict is not one of the words asked for"))
