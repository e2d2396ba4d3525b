"""The judge's and the rewriter's prompts for models too small for instructions: fenced texts, one word in reply.

Fences are single control characters. `neutral` makes control characters of any text visible, so that no text can
hold a fence; a model that is trained on these prompts needs no rules in words.

    pair         \\x01 prefix \\x02 first \\x03 second \\x04        -> 1 | 2
    safety       \\x05 suffix \\x04                               -> yes | no
    factuality   \\x01 prefix \\x06 reference \\x02 suffix \\x04    -> none | possible | definite
    notes        \\x01 prefix \\x02 suffix                       -> a letter at the end of each sentence
    rewrite      \\x0e end of prefix \\x02 suffix \\x04            -> the rewritten suffix
"""

from __future__ import annotations

import re

from sip_engine.llm.untrusted import neutral
from sip_engine.types import FactualityQuestion, PairQuestion, Question, RewriteRequest, SafetyQuestion

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


def reading_prompt(prefix: str, suffix: str, max_prefix_chars: int | None = None) -> tuple[str, int]:
    """What is read to be noted sentence by sentence, and the number of the suffix's first character in it."""
    before = f"\x01{_tail(prefix, max_prefix_chars)}\x02"
    return before + neutral(suffix), len(before)


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
