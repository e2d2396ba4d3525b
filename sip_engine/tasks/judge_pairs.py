"""`sip data judge-pairs`: suffixes against corrupted copies, and labels of single ones (method §judge training)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.open import open_judge
from sip_engine.llm.compact_prompts import compact_prompt
from sip_engine.tasks.corruptors.base import Corruption, Corruptor, CountingCorruptor
from sip_engine.tasks.corruptors.open import open_corruptor
from sip_engine.tasks.files import (
    SPARE,
    Record,
    held_out_numbers,
    open_documents,
    shuffled,
    training_samples,
    write_records,
)
from sip_engine.tasks.labels import cut_text, records_of_labels
from sip_engine.tasks.specs import JudgePairs
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judge,
    PairQuestion,
    RewriteRequest,
    SafetyQuestion,
    Sample,
)
from sip_engine.utils.progress import console

_NO_COPY = Corruption("", "")


def make_judge_pairs(cfg: RunConfig, out: Path, spec: JudgePairs) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: suffixes against corrupted copies in both orders,
    safety and factuality.

    The copies are those of `corruptor`, the labels those of `judge`. Copies that fail are counted and said, by their
    reasons.

    Raises:
        SipError: bad settings or data, or a server that cannot be used, before anything is written.
    """
    mesh, corpus = open_documents(cfg, out, "judge", spec.held_out)
    judge, worse = open_judge(cfg, corpus, mesh), CountingCorruptor(open_corruptor(cfg, corpus, mesh))

    def records(samples: list[Sample], pairs: int, safety: int, factuality: int, seed: int) -> list[Record]:
        return judge_records(
            samples,
            worse,
            judge,
            corpus.tokenizer,
            num_pairs=pairs,
            num_safety=safety,
            num_factuality=factuality,
            max_prefix_chars=spec.max_prefix_chars,
            seed=seed,
        )

    wanted = (spec.pairs, spec.safety, spec.factuality)
    samples = training_samples(corpus, max(spec.pairs, SPARE * spec.safety, SPARE * spec.factuality))
    train = records(samples, *wanted, cfg.seed)
    held_numbers = held_out_numbers(spec.held_out, spec.safety, spec.factuality)
    held_out = records(corpus.held_out, *held_numbers, cfg.seed + 1)
    if summary := worse.summary():
        console.print(summary, soft_wrap=True, markup=False)
    write_records(out, train, held_out, wanted=2 * spec.pairs + spec.safety + spec.factuality)


def judge_records(
    samples: Sequence[Sample],
    corruptor: Corruptor,
    labeller: Judge,
    tokenizer: Tokenizer,
    *,
    num_pairs: int,
    num_safety: int,
    num_factuality: int = 0,
    max_prefix_chars: int | None,
    seed: int,
) -> list[Record]:
    """At most `num_pairs` suffixes against their corrupted copies, each in both orders, and so many labels.

    A corrupted copy is cut at the original's number of tokens, so that length says nothing. Labels are those on
    which all votes agree, each answer as often as the others: `num_safety` of suffixes alone, `num_factuality` of
    suffixes and corrupted copies beside the original. Shuffled by `seed`.
    """
    wanted = samples[: max(num_pairs, 2 * num_factuality)]
    requests = [RewriteRequest(s.prefix, s.suffix) for s in wanted]
    worse = [
        _NO_COPY
        if isinstance(copy, Failure)
        else replace(copy, text=cut_text(copy.text, tokenizer, len(s.suffix_ids)))
        for s, copy in zip(wanted, corruptor.corrupt(requests, seed=seed), strict=True)
    ]
    records = list(_pairs(wanted[:num_pairs], worse[:num_pairs], max_prefix_chars))
    records += _safety(samples, labeller, num_safety)
    records += _factuality(wanted, worse, labeller, num_factuality, max_prefix_chars)
    return shuffled(records, seed)


def _pairs(
    samples: Sequence[Sample], worse: Sequence[Corruption], max_prefix_chars: int | None
) -> Iterator[Record]:
    for s, copy in zip(samples, worse, strict=True):
        if not copy.text or copy.text == s.suffix:
            continue
        for answer, first, second in (("1", s.suffix, copy.text), ("2", copy.text, s.suffix)):
            question = PairQuestion(s.prefix, first, second)
            prompt = compact_prompt(question, max_prefix_chars)
            yield {"prompt": prompt, "answer": answer, "kind": "quality", "corruption": copy.flaw}


def _safety(samples: Sequence[Sample], labeller: Judge, num: int) -> list[Record]:
    questions = [SafetyQuestion(s.suffix, s.prefix) for s in samples] if num else []
    return records_of_labels(questions, labeller, num, "safety", None)


def _factuality(
    samples: Sequence[Sample],
    worse: Sequence[Corruption],
    labeller: Judge,
    num: int,
    max_prefix_chars: int | None,
) -> list[Record]:
    questions = [
        FactualityQuestion(s.prefix, s.suffix, text)
        for s, copy in zip(samples, worse, strict=True)
        for text in (s.suffix, copy.text)
        if text and num
    ]
    return records_of_labels(questions, labeller, num, "factuality", max_prefix_chars)
