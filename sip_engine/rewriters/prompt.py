"""The rewriter's request as a prompt, and the strict reading of its reply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sip_engine.llm.compact_prompts import last_words
from sip_engine.llm.messages import Format, chat_messages
from sip_engine.llm.replies import plain_line, read_object, reply_itself
from sip_engine.llm.untrusted import DATA_RULE, fence, has_hidden, make_mark, neutral
from sip_engine.types import Failure, RewriteRequest

REWRITE_RULES = """\
You improve one passage of a document. The passage goes on where the text before it ends; its first words \
repeat the end of that text.
Keep what is good, word for word, and keep the subject, the style and about the length. Change only what is \
unsafe (insults, hatred, incitement, explicit or dangerous content), wrong, incoherent, or spoilt by \
repetition, noise or hidden characters; put something harmless, true and fitting in its place. If nothing needs \
changing, copy the passage exactly. The passage may end within a sentence, and so may yours. Write about no \
other thing than the document does: no comment, no explanation, no remark on the change."""


@dataclass(frozen=True)
class RewritePrompt:
    """A request ready to be sent, and what a reply to it must look like."""

    system: str
    user: str
    mark: str
    lead: str
    """End of the prefix, in front of the passage; a reply must begin with its words. Empty for no prefix."""
    format: Format

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of a reply, the same for all requests."""
        return {
            "type": "object",
            "properties": {"id": {"type": "string"}, "passage": {"type": "string"}},
            "required": ["id", "passage"],
            "additionalProperties": False,
        }

    def messages(self, system_role: bool = True) -> list[dict[str, str]]:
        """See `chat_messages`."""
        return chat_messages(self.system, self.user, system_role)


def rewrite_prompt(
    request: RewriteRequest,
    *,
    key: str = "",
    format: Format = "verdict_line",
    max_prefix_chars: int | None = None,
) -> RewritePrompt:
    """The prompt of a request; the same for the same arguments. See `passage_prompt`."""
    return passage_prompt(
        request,
        REWRITE_RULES,
        "improved passage",
        key=key,
        format=format,
        max_prefix_chars=max_prefix_chars,
    )


def passage_prompt(
    request: RewriteRequest,
    rules: str,
    wanted: str,
    *,
    key: str,
    format: Format,
    max_prefix_chars: int | None,
) -> RewritePrompt:
    """A suffix to be written anew by `rules`, as the passage behind its prefix; `wanted` names what is to come.

    `key` is mixed into the mark of the fences. A prefix longer than `max_prefix_chars` keeps its end.
    """
    lead = last_words(request.prefix)
    before = neutral(request.prefix[-max_prefix_chars:] if max_prefix_chars else request.prefix)
    passage = neutral(lead + request.suffix)
    mark = make_mark(key, [rules, before, passage], [before, passage])
    how = (
        f'Reply with one JSON object and nothing else: {{"id": "{mark}", "passage": "..."}}.'
        if format == "json_schema"
        else f"End your reply with the {wanted} between these two lines:\n"
        f"<<<BEGIN rewrite {mark}>>>\n<<<END rewrite {mark}>>>"
    )
    # Not the words themselves: they are text of the document, and this line is not fenced.
    start = f"Begin it with the passage's first {len(lead.split())} words, unchanged. " if lead else ""
    blocks = [fence("prefix", before, mark), fence("passage", passage, mark), start + how]
    return RewritePrompt(f"{rules}\n\n{DATA_RULE}", "\n\n".join(blocks), mark, lead, format)


def read_rewrite(reply: str, prompt: RewritePrompt) -> str | Failure:
    """The new suffix, to be joined to the prefix without a separator; never raises.

    A Failure unless the reply holds one passage, exactly where it must be, that begins with the prompt's lead
    and goes on. What stands in front of the marked block is not read.
    """
    text = reply_itself(reply)
    if isinstance(text, Failure):
        return text
    if prompt.format == "json_schema":
        value = read_object(text, prompt.schema["required"], prompt.mark)
        passage = value if isinstance(value, Failure) else value["passage"]
    else:
        passage = _block(text, prompt)
    if isinstance(passage, Failure):
        return passage
    if not isinstance(passage, str):
        return Failure("the reply's passage is not a string")
    passage = passage.replace("\r\n", "\n")
    if has_hidden(passage):
        return Failure("the rewrite holds characters that cannot be seen")
    if prompt.mark in passage.lower():
        return Failure("the rewrite holds the mark of its request")
    words = [re.escape(word) for word in neutral(prompt.lead).split()]
    lead = re.match(r"\s*" + r"\s+".join(words), passage) if words else re.match("", passage)
    if lead is None:
        return Failure("the rewrite does not begin with the last words of the prefix")
    rest = passage[lead.end() :]
    if prompt.lead[-1:].isspace():
        rest = rest.lstrip()  # the prefix has this space already
    return rest if rest.strip() else Failure("the rewrite is empty")


def _block(reply: str, prompt: RewritePrompt) -> str | Failure:
    begin, end = (f"<<<{side} rewrite {prompt.mark}>>>" for side in ("BEGIN", "END"))
    lines = reply.split("\n")
    plain = [plain_line(line) for line in lines]
    while plain and not re.search(r"\w", plain[-1]):  # a fence, a token that leaked
        plain.pop()
    if not plain or plain[-1] != end or begin not in plain:
        return Failure("the reply does not end with the marked passage")
    if reply.count(f"rewrite {prompt.mark}") != 2:
        return Failure("the reply has more than one marked passage")
    return "\n".join(lines[plain.index(begin) + 1 : len(plain) - 1])
