"""Asking a policy an evaluation set: greedy continuations judged, and given continuations compared by log-prob."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.held_out import interleave
from sip_engine.evaluation.intervals import Estimate, estimates
from sip_engine.evaluation.sets import Choices, EvalSet, Prompt
from sip_engine.policy.rows import Row
from sip_engine.sampler.frozen import FrozenPolicy, encode_continuation, encode_prompt, fit_prefix
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import FactualityQuestion, Failure, Judge, Question, SafetyQuestion
from sip_engine.utils.progress import steps

_CHUNK = 64

T = TypeVar("T")
Answer = tuple[dict[str, tuple[float, float]], dict[str, Any]]
"""One item's figure -> (total, weight), and its row of the record."""


@dataclass(frozen=True)
class SetAnswers:
    """What a policy made of a set."""

    name: str
    about: str
    figures: dict[str, Estimate]
    table: dict[str, np.ndarray]
    """Figure -> [items, 2] totals and weights, the same items for every policy."""
    rows: list[dict[str, Any]]
    """One row an item: what was asked, what came, and its scores."""


def answer_set(
    policy: FrozenPolicy, sampler: Sampler, eval_set: EvalSet, judge: Judge, *, max_new_tokens: int
) -> SetAnswers:
    """Ask every item of the set; the processes of a replica work together, replicas share the items.

    Raises:
        RequestError: an item cannot fit into the policy's context.
    """

    def continue_all(prompts: Sequence[Prompt]) -> list[Answer]:
        texts = _continue(policy, sampler, prompts, eval_set.name, max_new_tokens)
        return _judge(policy.mesh, judge, eval_set, prompts, texts)

    answers = [
        *_shared(policy.mesh, eval_set.prompts, continue_all),
        *_shared(policy.mesh, eval_set.choices, lambda mine: _compare(policy, mine, eval_set.name)),
    ]
    names = dict.fromkeys(name for sums, _ in answers for name in sums)
    table = {name: np.array([sums.get(name, (0.0, 0.0)) for sums, _ in answers]) for name in names}
    return SetAnswers(eval_set.name, eval_set.about, estimates(table), table, [row for _, row in answers])


def _shared(mesh: Mesh, items: Sequence[T], work: Callable[[Sequence[T]], list[Answer]]) -> list[Answer]:
    """Every item's answer on every process, of which each replica worked out its share."""
    mine = items[mesh.dp.rank :: mesh.dp.size]
    return interleave(mesh.gather_replicas(work(mine) if mine else []))


def _continue(
    policy: FrozenPolicy, sampler: Sampler, prompts: Sequence[Prompt], name: str, max_new_tokens: int
) -> list[str]:
    """Greedy continuations up to end-of-document; a long prompt keeps its last tokens."""
    tokenizer, texts = policy.tokenizer, []
    params = SamplingParams(max_new_tokens, greedy=True, stop_ids=tokenizer.eos_ids)
    with steps(name, -(-len(prompts) // _CHUNK), quiet=not policy.mesh.is_main) as bar:
        for first in range(0, len(prompts), _CHUNK):
            ids = [encode_prompt(tokenizer, prompt.text) for prompt in prompts[first : first + _CHUNK]]
            fitting = [fit_prefix(i, max_new_tokens, policy.max_context, f"{name}: an answer") for i in ids]
            done = sampler.generate([Request(prefix, 1) for prefix in fitting], params)
            texts += [tokenizer.decode(completions[0].ids) for completions in done]
            bar.advance({"prompts": len(texts)})
    return texts


def _judge(
    mesh: Mesh, judge: Judge, eval_set: EvalSet, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[Answer]:
    asked: list[tuple[int, str, Question]] = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if eval_set.asks_safety:
            asked.append((number, "safety", SafetyQuestion(text)))
        if prompt.reference is not None:
            asked.append((number, "factuality", FactualityQuestion(prompt.text, prompt.reference, text)))
    answers = judge.judge([question for _, _, question in asked])
    results: list[Answer] = [
        ({}, {"set": eval_set.name, "prompt": prompt.text, "continuation": text, **prompt.details})
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    for (number, name, _), answer in zip(asked, answers, strict=True):
        sums, row = results[number]
        failed = isinstance(answer, Failure)
        tried, wrong = sums.get("judge_failure_rate", (0.0, 0.0)), float(failed)
        sums["judge_failure_rate"] = (tried[0] + wrong, tried[1] + 1.0)
        row[name] = None if isinstance(answer, Failure) else answer.value
        if isinstance(answer, Failure):
            continue
        for part in ("", *(f", {group}" for group in prompts[number].groups)):
            sums[f"{name}{part}"] = (answer.value, 1.0)
    return results


def _compare(policy: FrozenPolicy, items: Sequence[Choices], name: str) -> list[Answer]:
    """Log-probs of all continuations; those of one text are one row, so that it is read once."""
    tokenizer, results = policy.tokenizer, []
    with steps(name, -(-len(items) // _CHUNK), quiet=not policy.mesh.is_main) as bar:
        for first in range(0, len(items), _CHUNK):
            part, rows = items[first : first + _CHUNK], []
            for item in part:
                ids = tuple(encode_continuation(tokenizer, item.text, c) for c in item.continuations)
                longest, text = max(map(len, ids)), encode_prompt(tokenizer, item.text)
                rows.append(Row(fit_prefix(text, longest, policy.max_context, f"{name}: an answer"), ids))
            for item, scored in zip(part, policy.score_rows(rows), strict=True):
                results.append(
                    _compared(item, [float(s.logprobs.sum(dtype=np.float64)) for s in scored], name)
                )
            bar.advance({"items": len(results)})
    return results


def _compared(item: Choices, logprobs: list[float], name: str) -> Answer:
    found: dict[str, float] = {}
    for measure, targets in item.targets.items():
        values = np.array([logprobs[number] for number, _ in targets])
        right = np.array([label for _, label in targets])
        if measure == "mc2":
            mass = np.exp(values - values.max())
            found["mc2"] = float(mass[right].sum() / mass.sum())
        elif measure == "mc1":
            found["mc1"] = _share_right(values, right)
        else:
            sizes = np.array([len(item.continuations[number].encode()) for number, _ in targets])
            found["accuracy"] = _share_right(values, right)
            found["accuracy_per_byte"] = _share_right(values / sizes, right)
    row = {"set": name, "prompt": item.text, "choices": item.continuations, "logprobs": logprobs}
    labels = {measure: [n for n, is_right in t if is_right] for measure, t in item.targets.items()}
    return {key: (value, 1.0) for key, value in found.items()}, {**row, "right": labels, **found}


def _share_right(values: np.ndarray, right: np.ndarray) -> float:
    """1 where the likeliest is right, 0 where not; equally likely ones count their share."""
    return float(right[values == values.max()].mean())
