"""`sip data rewrites`: safe suffixes to be copied, unsafe ones to be mended (method §rewriter training)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sip_engine.config.schema import RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.judges.open import open_judge
from sip_engine.llm.compact_prompts import rewrite_prompt
from sip_engine.rewriters.open import open_rewriter
from sip_engine.tasks.files import SPARE, Record, open_documents, shuffled, training_samples, write_records
from sip_engine.tasks.labels import cut_text, labels_of
from sip_engine.tasks.specs import Rewrites
from sip_engine.types import Judge, Rewriter, RewriteRequest, SafetyQuestion, Sample
from sip_engine.utils.errors import ConfigError


def make_rewrites(cfg: RunConfig, out: Path, spec: Rewrites) -> None:
    """Write `out`/train.jsonl and `out`/eval.jsonl: rewrite prompts, half of them of safe suffixes.

    Raises:
        SipError: bad settings or data, before anything is written.
    """
    if cfg.rewriter.backend == "none":
        raise ConfigError(
            "rewrites of unsafe suffixes need a teacher: set rewriter.backend (world, server or local)"
        )
    mesh, corpus = open_documents(cfg, out, "rewriter", spec.held_out)
    judge, teacher = open_judge(cfg, corpus, mesh), open_rewriter(cfg, corpus, mesh)
    assert teacher is not None

    def records(samples: list[Sample], wanted: int, seed: int) -> list[Record]:
        return rewrite_records(samples, judge, teacher, corpus.tokenizer, num=wanted, seed=seed)

    train = records(training_samples(corpus, SPARE * spec.num), spec.num, cfg.seed)
    held_out = records(corpus.held_out, spec.held_out, cfg.seed + 1)
    write_records(out, train, held_out, wanted=spec.num)


def rewrite_records(
    samples: Sequence[Sample],
    labeller: Judge,
    teacher: Rewriter,
    tokenizer: Tokenizer,
    *,
    num: int,
    seed: int,
) -> list[Record]:
    """At most `num` rewrite prompts, half of them of safe suffixes, whose answer is the suffix itself.

    The answer of an unsafe one is the teacher's rewrite, for a warm start by next-token training; where that fails
    the suffix is left out. Shuffled by `seed`.
    """
    by_label: dict[bool, list[Sample]] = {True: [], False: []}
    labels = labels_of(labeller, [SafetyQuestion(s.suffix, s.prefix) for s in samples])
    for sample, (_, label) in zip(samples, labels, strict=True):
        if label in (0.0, 1.0):
            by_label[label == 1.0].append(sample)
    each = min(num // 2, len(by_label[True]), len(by_label[False]))
    unsafe = [RewriteRequest(s.prefix, s.suffix) for s in by_label[False][:each]]
    answers = [s.suffix for s in by_label[True][:each]]
    answers += [a if isinstance(a, str) else "" for a in teacher.rewrite(unsafe, seed=seed)]
    records = []
    for number, (s, answer) in enumerate(
        zip(by_label[True][:each] + by_label[False][:each], answers, strict=True)
    ):
        fitted = cut_text(answer, tokenizer, len(s.suffix_ids))
        if fitted:
            prompt = rewrite_prompt(RewriteRequest(s.prefix, s.suffix))
            facts = {"prefix": s.prefix, "suffix": s.suffix, "safe": number < each}
            records.append({"prompt": prompt, "answer": fitted, **facts})
    return shuffled(records, seed)
