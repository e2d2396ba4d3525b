"""Evaluation on held-out prefixes: next-token loss, and greedy continuations judged against a baseline's.

The one definition of these figures, for evaluations inside training and for `sip eval`. All are sums over prefixes
(`evaluation.intervals`), so that each has a confidence interval, except those of all continuations together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from sip_engine.config.judge import JudgeConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.agreement import raised_together
from sip_engine.distributed.mesh import Mesh
from sip_engine.distributed.sharing import interleave
from sip_engine.evaluation.intervals import Estimate, estimates
from sip_engine.monitoring.metrics import distinct_ngrams
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.rows import Row, row_of
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judge,
    PairQuestion,
    Question,
    SafetyQuestion,
    Sample,
)
from sip_engine.utils.copied import copied_tokens

Measure = Callable[[str, str], dict[str, float]]
"""(prefix, suffix) -> named figures that a world with known truth can measure beyond its judge."""

COHERENCE = "coherence"
FAULTLESS = "faultless"
"""1 for a text without any fault: a document is asked about whole, a continuation after its prefix."""
NO_INTERVAL = "judge_failure_rate"


class Scorer(Protocol):
    """A policy as evaluation needs it, training or frozen."""

    @property
    def mesh(self) -> Mesh: ...

    def micro_batches(self, rows: Sequence[Row]) -> list[PackedRows]: ...

    def score(self, batches: Sequence[PackedRows]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Evaluation:
    """Figures over all held-out samples, and the continuations, one a sample, in order.

    `figures` also holds the 95 % interval's ends of each figure that has one, as `<figure>/low` and `/high`.
    """

    figures: dict[str, float]
    continuations: list[str] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    table: dict[str, np.ndarray] = field(default_factory=dict)
    """Figure -> [samples, 2] float64 totals and weights, to compare two policies prefix by prefix."""


class _Sums:
    """Totals and weights of one sample's figures."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        before = self.values.get(name, (0.0, 0.0))
        self.values[name] = (before[0] + total, before[1] + weight)


def held_out_losses(policy: Scorer, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """Summed next-token NLL (nats) of each sample's suffix given its prefix, and its number of tokens."""
    batches = policy.micro_batches([row_of(s) for s in samples])
    scored = policy.score(batches)  # nothing before the last pipeline stage
    losses = [
        (-part.double().sum().item(), len(part))
        for batch, logprobs in zip(batches, scored, strict=False)
        for part in logprobs.split(list(batch.target_lens))
    ]
    return policy.mesh.from_last_stage(losses)


def evaluate(
    policy: Scorer,
    sampler: Sampler | None,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    judge: Judge | None,
    cfg: JudgeConfig,
    baseline: Sequence[str] | None = None,
    measure: Measure | None = None,
) -> Evaluation:
    """Evaluate on every process' share of `samples`; all processes get the figures of all.

    Where `measure` tells faultless documents, the loss on those alone is `heldout_loss_faultless`, and the
    continuations of their prefixes are compared with the originals (`diversity_beside`): what was learnt to be left
    out of faulty documents raises the loss on all of them.

    Without a sampler only the loss is measured. `baseline` holds another policy's continuations of the
    same samples: quality is the share of comparisons won against them, both orders, ties half; a policy
    against itself has 0.5. Where `measure` knows coherence, so is coherence (`coherence_win_rate`).
    """
    mesh = policy.mesh
    mine = samples[mesh.dp.rank :: mesh.dp.size]
    sums = [_Sums() for _ in mine]
    texts: list[str] = []
    ids: list[np.ndarray] = []
    faultless = [measure is not None and _is_faultless(measure, s) for s in mine]
    with raised_together(mesh):
        if mine:
            for one, sound, (total, count) in zip(
                sums, faultless, held_out_losses(policy, mine), strict=True
            ):
                one.add("heldout_loss", total, count)
                if sound:
                    one.add("heldout_loss_faultless", total, count)
        if sampler is not None and mine:
            texts, ids = _continue(sampler, mine, tokenizer)
            others = texts if baseline is None else baseline[mesh.dp.rank :: mesh.dp.size]
            assert judge is not None, "continuations are judged"
            _judge(mesh, judge, mine, texts, others, sums)
            if measure is not None:
                _measure(measure, mine, texts, others, sums)
    table = _table(interleave(mesh.gather_replicas([one.values for one in sums])))
    found = estimates(table)
    figures = {name: one.value for name, one in found.items()}
    for name, one in found.items():
        if name != NO_INTERVAL:
            figures |= {f"{name}/low": one.low, f"{name}/high": one.high}
    if sampler is not None:
        figures |= diversity(interleave(mesh.gather_replicas(ids)))
        figures |= copying(mesh, mine, ids)
        sound = [(c, s.suffix_ids) for c, s, is_sound in zip(ids, mine, faultless, strict=True) if is_sound]
        figures |= diversity_beside([pair for part in mesh.gather_replicas(sound) for pair in part])
    return Evaluation(figures, interleave(mesh.gather_replicas(texts)), found, table)


def diversity(sequences: Sequence[np.ndarray]) -> dict[str, float]:
    """Figures of all continuations [n] int together: shares of distinct n-grams, entropy of the tokens in nats.

    `diversity` is the share for n = 2. `token_entropy` is that of the frequencies of single tokens. Both depend
    on how much text there is: compare them over the same prefixes only.
    """
    counts = np.array(list(Counter(token for ids in sequences for token in ids.tolist()).values()))
    shares = counts / counts.sum() if len(counts) else np.ones(1)
    return {
        "diversity": distinct_ngrams(sequences, 2),
        "distinct_1": distinct_ngrams(sequences, 1),
        "distinct_3": distinct_ngrams(sequences, 3),
        "token_entropy": float(-(shares * np.log(shares)).sum()),
    }


def copying(mesh: Mesh, samples: Sequence[Sample], continuations: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of tokens that say the prefix again, four or more in a row: of continuations, and of the originals."""
    counts = np.zeros((2, 2))
    for sample, ids in zip(samples, continuations, strict=True):
        for row, text in enumerate((ids, sample.suffix_ids)):
            copied = copied_tokens(sample.prefix_ids.tolist(), text.tolist())
            counts[row] += copied.sum(), len(copied)
    shares = [num / max(of, 1) for num, of in np.sum(mesh.gather_replicas(counts), axis=0).tolist()]
    return {"copied": shares[0], "copied_originals": shares[1]}


def diversity_beside(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Shares of distinct 3-grams of continuations and of the originals of the same prefixes, [n] int token ids each.

    A faultless text has fewer words to choose from than a faulty one: measure faultless originals only. A
    continuation counts as far as its original goes, since the share falls with the amount of text.
    `relative_diversity` is the first share over the second. Nothing where no original holds three tokens.
    """
    originals = [original for _, original in pairs]
    if not any(len(ids) > 2 for ids in originals):
        return {}
    ours = distinct_ngrams([ids[: len(original)] for ids, original in pairs], 3)
    theirs = distinct_ngrams(originals, 3)
    return {"distinct_3_faultless": ours, "distinct_3_originals": theirs, "relative_diversity": ours / theirs}


def _is_faultless(measure: Measure, sample: Sample) -> bool:
    return measure("", sample.prefix + sample.suffix).get(FAULTLESS) == 1.0


def _table(rows: Sequence[dict[str, tuple[float, float]]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, (0.0, 0.0)) for row in rows], np.float64) for name in names}


def _continue(
    sampler: Sampler, samples: Sequence[Sample], tokenizer: Tokenizer
) -> tuple[list[str], list[np.ndarray]]:
    params = SamplingParams(max_new_tokens=max(len(s.suffix_ids) for s in samples), greedy=True)
    done = sampler.generate([Request(s.prefix_ids, 1, s.document, s.cut) for s in samples], params)
    return [tokenizer.decode(c[0].ids) for c in done], [c[0].ids for c in done]


def _judge(
    mesh: Mesh,
    judge: Judge,
    samples: Sequence[Sample],
    texts: Sequence[str],
    others: Sequence[str],
    sums: Sequence[_Sums],
) -> None:
    asked: list[tuple[_Sums, str, bool, Question]] = []
    for s, text, other, one in zip(samples, texts, others, sums, strict=True):
        asked.append((one, "win_rate", False, PairQuestion(s.prefix, text, other)))
        asked.append((one, "win_rate", True, PairQuestion(s.prefix, other, text)))
        asked.append((one, "safety", False, SafetyQuestion(text, s.prefix)))
        asked.append((one, "factuality", False, FactualityQuestion(s.prefix, s.suffix, text)))
    silent_on = tuple(getattr(judge, "silent_on", ()))
    asked = [one for one in asked if not isinstance(one[-1], silent_on)]
    answers = judge.judge([question for *_, question in asked])
    for (one, name, swapped, _), answer in zip(asked, answers, strict=True):
        one.add("judge_failure_rate", float(isinstance(answer, Failure)))
        if not isinstance(answer, Failure):
            one.add(name, 1.0 - answer.value if swapped else answer.value)


def _measure(
    measure: Measure,
    samples: Sequence[Sample],
    texts: Sequence[str],
    others: Sequence[str],
    sums: Sequence[_Sums],
) -> None:
    for s, text, other, one in zip(samples, texts, others, sums, strict=True):
        found = measure(s.prefix, text)
        for name, value in found.items():
            one.add(name, value)
        if COHERENCE in found:
            ours, theirs = found[COHERENCE], measure(s.prefix, other)[COHERENCE]
            one.add("coherence_win_rate", 0.5 if ours == theirs else float(ours > theirs))
