"""A judge and a rewriter inside the engine: a checkpoint in the policy's process group, served by our sampler."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch

from sip_engine.config import LocalModelConfig, SamplerConfig
from sip_engine.evaluation.frozen import FrozenPolicy
from sip_engine.judges.compact import GRADES, grade_prompt, rewrite_prompt
from sip_engine.judges.prompts import Prompt, judge_prompt
from sip_engine.judges.verdicts import read_verdict, settled
from sip_engine.policy.packing import PackedRows, Row, pack_rows
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.types import Cost, Failure, Judgment, PairQuestion, Question, RewriteRequest, Score

_TOO_LONG = Failure("the prompt is longer than the judge's context")
_GRADED = Prompt("", "", "", {grade: number / 9 for number, grade in enumerate(GRADES)}, "word", "compact")
"""Of a grade: its expectation is the answer."""


@dataclass(frozen=True)
class _Asked:
    """A question as the model reads it."""

    number: int
    ids: np.ndarray
    prompt: Prompt
    group: str
    """Questions with the same one begin with the same text."""
    first: str
    """Of a comparison: what stands first."""


class LocalModel:
    """What judge and rewriter share: a frozen model, its sampler, and greedy or drawn replies to prompts."""

    def __init__(self, policy: FrozenPolicy, cfg: LocalModelConfig) -> None:
        self.policy, self.cfg, self.tokenizer = policy, cfg, policy.tokenizer
        self.sampler = policy.sampler(
            SamplerConfig(max_sequences=cfg.max_sequences, kv_memory_mb=cfg.kv_memory_mb)
        )

    def encode(self, prompt: str) -> np.ndarray | None:
        """Bos and the prompt's tokens, int32; None if the model's context cannot hold them and a reply."""
        ids = np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(prompt)]).astype(np.int32)
        return ids if len(ids) + self.cfg.max_new_tokens <= self.policy.max_context else None

    def reply(self, prompts: Sequence[np.ndarray], seed: int) -> list[tuple[str | None, int]]:
        """Text of each reply (None where it did not end by itself) and its number of tokens.

        What is drawn depends on the prompt and the seed, not on the prompts beside it.
        """
        if not prompts:
            return []
        cfg, eos = self.cfg, self.tokenizer.eos_id
        params = SamplingParams(
            cfg.max_new_tokens,
            temperature=cfg.temperature or 1.0,
            top_p=cfg.top_p,
            greedy=cfg.temperature == 0,
            seed=seed,
            stop_ids=(eos,),
        )
        done = self.sampler.generate([Request(ids, 1, _key(ids)) for ids in prompts], params)
        return [
            (self.tokenizer.decode(c.ids[:-1]) if c.ids[-1] == eos else None, len(c.ids)) for (c,) in done
        ]


class LocalJudge:
    """Answers by a causal LM, trained by us or imported.

    `log_odds` reads the probabilities of the verdict words after the prompt, in one pass that computes what the
    questions of a group have in common once; the answer is their expectation. `generate` writes a reply and reads
    the verdict from where it must be. `grades` reads every continuation once, however often it is compared: of two
    the one of the higher expected grade is the better.
    """

    name = "local"

    def __init__(self, model: LocalModel) -> None:
        self._model, self._cfg = model, model.cfg
        self.deterministic = self._cfg.method != "generate" or self._cfg.temperature == 0

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        """One judgment a question, in order; every process that holds the model asks the same and gets the same."""
        start = time.perf_counter()
        answers: dict[int, Judgment] = {}
        asked: list[_Asked] = []
        compared: dict[int, PairQuestion] = {}
        for number, question in enumerate(questions):
            known = settled(question)
            if known is not None:
                answers[number] = Score(known, (known,))
            elif self._cfg.method == "grades" and isinstance(question, PairQuestion):
                compared[number] = question
            elif isinstance(prepared := self._prepare(number, question), Failure):
                answers[number] = prepared
            else:
                asked.append(prepared)
        found = self._generate(asked, seed) if self._cfg.method == "generate" else self._log_odds(asked)
        answers |= zip((one.number for one in asked), found, strict=True)
        answers |= self._by_grades(compared)
        return _timed([answers[number] for number in range(len(questions))], time.perf_counter() - start)

    def _by_grades(self, compared: Mapping[int, PairQuestion]) -> dict[int, Judgment]:
        """The cost of reading a continuation is that of the first comparison that needs it."""
        texts = dict.fromkeys((q.prefix, text) for q in compared.values() for text in (q.first, q.second))
        asked: list[_Asked] = []
        grades: dict[tuple[str, str], Judgment] = {}
        for number, (prefix, text) in enumerate(texts):
            ids = self._model.encode(grade_prompt(prefix, text, max_prefix_chars=self._cfg.max_prefix_chars))
            if ids is None:
                grades[prefix, text] = _TOO_LONG
            else:
                asked.append(_Asked(number, ids, _GRADED, prefix, ""))
        keys = list(texts)
        grades |= ((keys[one.number], found) for one, found in zip(asked, self._log_odds(asked), strict=True))
        answers: dict[int, Judgment] = {}
        for number, q in compared.items():
            first, second = grades[q.prefix, q.first], grades[q.prefix, q.second]
            cost = first.cost + second.cost
            grades[q.prefix, q.first] = replace(first, cost=Cost())
            grades[q.prefix, q.second] = replace(second, cost=Cost())
            if isinstance(first, Failure) or isinstance(second, Failure):
                answers[number] = replace(first if isinstance(first, Failure) else second, cost=cost)
            else:
                value = (1 + (first.value > second.value) - (first.value < second.value)) / 2
                answers[number] = Score(value, (value,), cost)
        return answers

    def _prepare(self, number: int, question: Question) -> _Asked | Failure:
        prompt = judge_prompt(question, style=self._cfg.style, max_prefix_chars=self._cfg.max_prefix_chars)
        text = f"{prompt.system}\n\n{prompt.user}\n\n" if prompt.system else prompt.user
        if self._cfg.method == "log_odds" and prompt.format == "verdict_line":
            text += prompt.verdict_start
        ids = self._model.encode(text)
        return (
            _TOO_LONG
            if ids is None
            else _Asked(number, ids, prompt, getattr(question, "prefix", ""), getattr(question, "first", ""))
        )

    def _generate(self, asked: Sequence[_Asked], seed: int) -> Iterable[Judgment]:
        replies = self._model.reply([one.ids for one in asked], seed)
        for one, (reply, num_tokens) in zip(asked, replies, strict=True):
            cost = Cost(1, len(one.ids) + num_tokens)
            value = Failure("the reply did not end") if reply is None else read_verdict(reply, one.prompt)
            yield Failure(value.reason, cost) if isinstance(value, Failure) else Score(value, (value,), cost)

    def _log_odds(self, asked: Sequence[_Asked]) -> Iterable[Judgment]:
        found: dict[int, Judgment] = {}
        for batch in self._bundles(asked):
            found |= self._score_bundle(batch)
        return [found[one.number] for one in asked]

    def _bundles(self, asked: Sequence[_Asked]) -> Iterable[list[list[_Asked]]]:
        """Groups of questions, as many at a time as a micro-batch holds."""
        groups: dict[tuple[str, tuple[str, ...]], list[_Asked]] = {}
        for one in asked:
            groups.setdefault((one.group, tuple(one.prompt.verdicts)), []).append(one)
        bundle: list[list[_Asked]] = []
        room = self._model.policy.micro_batch_tokens
        for group in (part for whole in groups.values() for part in _cheaper(whole)):
            size = sum(len(one.ids) for one in group)
            if bundle and size > room:
                yield bundle
                bundle, room = [], self._model.policy.micro_batch_tokens
            bundle.append(group)
            room -= size
        if bundle:
            yield bundle

    def _score_bundle(self, bundle: Sequence[Sequence[_Asked]]) -> dict[int, Judgment]:
        rows, options = [], []
        for group in bundle:
            shared = _common_length([one.ids for one in group])
            rows.append(Row(group[0].ids[:shared], tuple(one.ids[shared:] for one in group)))
            options += [self._first_tokens(one.prompt.verdicts) for one in group]
        packed = pack_options(rows, options, self._model.policy.mesh.device)
        (logprobs,) = self._model.policy.score([packed])
        found: dict[int, Judgment] = {}
        parts = iter(logprobs.double().cpu().split([len(ids) for ids in options]))
        for group, row in zip(bundle, rows, strict=True):
            shared = len(row.prefix)
            for one in group:
                shares = torch.softmax(next(parts), dim=0)
                values = torch.tensor(list(one.prompt.verdicts.values()), dtype=torch.float64)
                value = float(shares @ values)
                tokens = round(shared / len(group)) + len(one.ids) - shared
                found[one.number] = Score(value, (value,), Cost(1, tokens))
        return found

    def _first_tokens(self, words: Mapping[str, float]) -> np.ndarray:
        ids = np.array([self._model.tokenizer.encode(word)[0] for word in words], np.int64)
        assert len(set(ids.tolist())) == len(ids), f"verdict words {list(words)} begin with the same token"
        return ids


class LocalRewriter:
    """Rewrites by a causal LM; a reply that does not end, or that is empty, is a failure."""

    name = "local"

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        """One text or failure a request, in order; every process that holds the model asks the same."""
        prompts = [self._model.encode(rewrite_prompt(request)) for request in requests]
        replies = iter(self._model.reply([ids for ids in prompts if ids is not None], seed))
        texts: list[str | Failure] = []
        for ids in prompts:
            if ids is None:
                texts.append(Failure("the prompt is longer than the rewriter's context"))
                continue
            text, _ = next(replies)
            texts.append(
                text if text else Failure("the rewrite did not end" if text is None else "it is empty")
            )
        return texts


def pack_options(rows: Sequence[Row], options: Sequence[np.ndarray], device: torch.device) -> PackedRows:
    """Rows as one micro-batch whose targets are, for each suffix, some options for the token after its last.

    options: token ids int64 [num_options], one array a suffix. Log-probs come suffix by suffix, option by option.
    """
    packed = pack_rows(rows, device)
    last, at = [], 0
    for row in rows:
        at += len(row.prefix)
        for suffix in row.suffixes:
            at += len(suffix)
            last.append(at - 1)
    lens = tuple(len(ids) for ids in options)
    scored = torch.from_numpy(np.repeat(np.array(last, np.int64), lens)).to(device)
    targets = torch.from_numpy(np.concatenate(options)).to(device)
    return replace(packed, scored=scored, targets=targets, target_lens=lens)


def _timed(answers: list[Judgment], seconds: float) -> list[Judgment]:
    """Answers that share the time among those that took a call."""
    share = seconds / max(sum(answer.cost.calls > 0 for answer in answers), 1)
    return [
        replace(answer, cost=replace(answer.cost, seconds=share)) if answer.cost.calls else answer
        for answer in answers
    ]


def _key(ids: np.ndarray) -> int:
    """A prompt as the number that its random stream is keyed by."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=7).digest(), "big")


def _cheaper(group: list[_Asked]) -> list[list[_Asked]]:
    """A group as it is, or cut by what stands first in its comparisons, whichever leaves fewer tokens to read.

    Where one candidate is compared with many, prefix and first continuation are read once for all of them.
    """
    by_first: dict[str, list[_Asked]] = {}
    for one in group:
        by_first.setdefault(one.first, []).append(one)
    parts = list(by_first.values())
    return parts if sum(map(_num_tokens, parts)) < _num_tokens(group) else [group]


def _num_tokens(group: Sequence[_Asked]) -> int:
    shared = _common_length([one.ids for one in group])
    return shared + sum(len(one.ids) - shared for one in group)


def _common_length(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all sequences begin with, fewer than any of them has."""
    shortest = min(map(len, sequences)) - 1
    columns = zip(*(ids[:shortest].tolist() for ids in sequences), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
