"""Reading a judge model's reply: a verdict with the prompt's mark stands where it must, once, or there is none."""

from __future__ import annotations

import re
from typing import Any

from sip_engine.judges.prompts import MEANINGS, Prompt
from sip_engine.llm.replies import plain_line, plain_lines, read_object, reply_itself
from sip_engine.types import Failure, PairQuestion, Question

_NO_WORD = "the verdict is not one of the words asked for"
_LABEL = r"(?:(?:the |my |your )?(?:final )?(?:answer|verdict|result|decision|output)(?: is)?\s*[:=]\s*)?"


def settled(question: Question) -> float | None:
    """The answer to a question that no judge is needed for: two equal continuations do not differ."""
    if isinstance(question, PairQuestion) and question.first == question.second:
        return 0.5
    return None


def read_verdict(reply: str, prompt: Prompt) -> float | Failure:
    """The answer, in [0, 1], that a reply gives in the prompt's format; never raises.

    Thoughts in front (`<think>` and its like, closed), a code fence, markdown, quotes, leaked end tokens, letter case
    and a full stop are taken off first: the mark is known to nobody but the judge, so that they cost no safety.

    - verdict_line: the last line that says anything is `VERDICT <mark>: <word>`, perhaps with the remark that the
      prompt gives beside the word, and the reply has no other verdict with this mark.
    - word: the reply is one of the words.
    - json_schema: one object with the prompt's mark as `id` and one of its words as `verdict`; nothing behind it.

    Anything else is a Failure that says what was wrong.
    """
    text = reply_itself(reply)
    if isinstance(text, Failure):
        return text
    if prompt.format == "json_schema":
        value = read_object(text, ("id", "verdict"), prompt.mark)
        return value if isinstance(value, Failure) else _answer(value["verdict"], prompt)
    if prompt.format == "word":
        found = _answer(" ".join(plain_lines(text)), prompt)
        return Failure("the reply is not one of the words asked for") if isinstance(found, Failure) else found
    return _read_line(text, prompt)


def _read_line(text: str, prompt: Prompt) -> float | Failure:
    lines = plain_lines(text)
    if not lines:
        return Failure("the reply is empty")
    start = rf"\W*{_LABEL}verdict\W+"
    if re.match(rf"\W*(?:{'|'.join(prompt.verdicts)})\W*$", lines[-1], re.IGNORECASE):
        lines[-2:] = [" ".join(lines[-2:])]  # the word on a line of its own
    last = re.match(rf"{start}{prompt.mark}\b(?P<said>.*)$", lines[-1], re.IGNORECASE)
    if last is None:
        other = re.match(rf"{start}[0-9a-f]{{8}}", lines[-1], re.IGNORECASE)
        return Failure("the reply has a wrong mark" if other else "the last line is not a verdict")
    if len(re.findall(rf"verdict\W*{prompt.mark}", plain_line(text), re.IGNORECASE)) != 1:
        return Failure("there is more than one verdict")
    return _answer(last["said"], prompt)


def _answer(said: Any, prompt: Prompt) -> float | Failure:
    """What a verdict's word stands for, whatever its case, with the prompt's remark on it or another in brackets."""
    if isinstance(said, bool):
        said = "yes" if said else "no"
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    if not isinstance(said, str | int):
        return Failure(_NO_WORD)
    words = {word.lower(): word for word in prompt.verdicts}
    found = re.fullmatch(
        rf"\W*(?<!-)(?:continuation[_ ])?({'|'.join(words)})\b(.*)", plain_line(str(said)).lower(), re.DOTALL
    )
    if found is None:
        return Failure(_NO_WORD)
    word, remark = words[found[1]], found[2]
    meant = re.fullmatch(rf"\W*(?:if )?{re.escape(plain_line(MEANINGS[word]).lower())}\W*", remark)
    bracketed = re.fullmatch(r"\W*[(\[][^()\[\]]*[)\]]\W*", remark)
    others = [other for other in words if other != found[1]]
    names_other = re.search(rf"\b(?:{'|'.join(others)})\b", remark)
    if not re.search(r"\w", remark) or meant or (bracketed and not names_other):
        return prompt.verdicts[word]
    return Failure(_NO_WORD)
