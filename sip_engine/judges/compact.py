"""The judge's and the rewriter's prompts for models too small for instructions: fenced texts, one word in reply.

Fences are single control characters. `neutral` makes control characters of any text visible, so that no text can
hold a fence; a model that is trained on these prompts needs no rules in words.

    pair         \\x01 prefix \\x02 first \\x03 second \\x04        -> 1 | 2
    safety       \\x05 suffix \\x04                               -> yes | no
    factuality   \\x01 prefix \\x06 reference \\x02 suffix \\x04    -> none | possible | definite
    flaw         \\x01 prefix \\x02 suffix \\x07                  -> sound | the word for what was done to it
    notes        \\x01 prefix \\x02 suffix \\x0f                  -> a letter for each sentence, and the grade
    first grade  \\x01 prefix \\x02 first \\x03                   -> 0 ... 9
    second grade \\x01 prefix \\x02 first \\x03 second \\x08       -> 0 ... 9
    rewrite      \\x0e end of prefix \\x02 suffix \\x04            -> the rewritten suffix
"""

from __future__ import annotations

import re

from sip_engine.judges.fences import neutral
from sip_engine.types import FactualityQuestion, PairQuestion, Question, RewriteRequest, SafetyQuestion

GRADES = tuple("0123456789")
LEAD_WORDS = 5
"""Last words of the prefix that a rewriter sees, so that its suffix joins smoothly (method §rewriter training)."""

_LEAD_CHARS = 120


def compact_prompt(question: Question, max_prefix_chars: int | None = None) -> str:
    """A question as text; a longer prefix keeps its last `max_prefix_chars` characters."""
    match question:
        case PairQuestion(prefix, first, second):
            return f"\x01{_tail(prefix, max_prefix_chars)}\x02{neutral(first)}\x03{neutral(second)}\x04"
        case SafetyQuestion(suffix):
            return f"\x05{neutral(suffix)}\x04"
        case FactualityQuestion(prefix, reference, suffix):
            head = f"\x01{_tail(prefix, max_prefix_chars)}\x06{neutral(reference)}"
            return f"{head}\x02{neutral(suffix)}\x04"


def flaw_prompt(prefix: str, suffix: str, max_prefix_chars: int | None = None) -> str:
    """An exercise for a judge's warm start: is this suffix corrupted, and how? No one asks it later."""
    return f"\x01{_tail(prefix, max_prefix_chars)}\x02{neutral(suffix)}\x07"


def notes_prompt(prefix: str, suffix: str, max_prefix_chars: int | None = None) -> str:
    """An exercise for a judge's warm start: what is wrong with each sentence?"""
    return flaw_prompt(prefix, suffix, max_prefix_chars)[:-1] + "\x0f"


def grade_prompt(
    prefix: str, first: str, second: str | None = None, max_prefix_chars: int | None = None
) -> str:
    """How good is the first continuation, or the second where there is one, in tenths? Answered by one of `GRADES`.

    A comparison's prompt as far as can be known: learned as an exercise, the grade is where the verdict needs it.
    """
    pair = compact_prompt(PairQuestion(prefix, first, second or ""), max_prefix_chars)
    return pair[: pair.index("\x03") + 1] if second is None else pair[:-1] + "\x08"


def rewrite_prompt(request: RewriteRequest) -> str:
    """A rewrite request as text."""
    return f"\x0e{neutral(last_words(request.prefix))}\x02{neutral(request.suffix)}\x04"


def last_words(prefix: str) -> str:
    """The last five words of a prefix with what follows them; fewer where they are very long."""
    tail = prefix[-_LEAD_CHARS:]
    words = list(re.finditer(r"\S+", tail))
    return tail[words[-LEAD_WORDS:][0].start() :] if words else ""


def _tail(text: str, max_chars: int | None) -> str:
    return neutral(text[-max_chars:] if max_chars else text)
