"""What a step is summed up to: means over all processes of losses, rewards, rates and times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.policy import UpdateStats
from sip_engine.sampler.requests import Completion
from sip_engine.types import Candidate, Choice, Kind, Sample, Verdict
from sip_engine.utils import heartbeat
from sip_engine.utils.copied import copied_tokens


class Means:
    """Named running means that add up over processes: value and weight of each."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add `total`, the sum of `count` values."""
        entry = self._totals[name]
        entry[0] += total
        entry[1] += count

    def over(self, mesh: Mesh) -> dict[str, float]:
        """The means over the data axis; a name without values is left out."""
        merged: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in mesh.gather_replicas(dict(self._totals)):
            for name, (total, count) in part.items():
                merged[name][0] += total
                merged[name][1] += count
        return {name: total / count for name, (total, count) in merged.items() if count}


class Clock:
    """Seconds spent in each named part of a step, and when."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        """Part, begin and end (`time.perf_counter`), in order."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with heartbeat.phase(name):
            yield
        end = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        self.spans.append((name, start, end))

    def split(self, at: float, rest: str) -> None:
        """Call what came of the last span after `at` by another name; `seconds` stays as it is."""
        name, start, end = self.spans[-1]
        if start < at < end:
            self.spans[-1:] = [(name, start, at), (rest, at, end)]


def pool_means(
    means: Means,
    pools: Sequence[Sequence[Candidate]],
    verdicts: Sequence[Verdict],
    choices: Sequence[Choice | None],
) -> None:
    """Rewards by candidate kind, chosen and rejected rates by kind (the paper's Figure 8), diversity, failures.

    Of the candidates without a reward, `judge/skipped_candidates` is the share that the schedule never compared,
    `judge/dropped_candidates` the share of which a judgment failed.
    """
    kinds = {candidate.kind for pool in pools for candidate in pool}
    for pool, verdict in zip(pools, verdicts, strict=False):
        for number, candidate in enumerate(pool):
            for name in ("rewards", "quality", "safety", "factuality"):
                value = getattr(verdict, name)[number]
                if value is not None:
                    means.add(f"{name.removesuffix('s')}/{candidate.kind}", value)
            skipped = verdict.skipped[number]
            means.add("judge/skipped_candidates", float(skipped))
            means.add("judge/dropped_candidates", float(verdict.rewards[number] is None and not skipped))
        means.add("judge/failure_rate", len(verdict.failures), verdict.num_judgments)
        means.add("judge/calls_per_prefix", verdict.num_judgments)
        means.add("judge/tokens_per_prefix", verdict.cost.tokens)
    for choice in choices:
        means.add("pairs/dropped", float(choice is None))
        if choice is None:
            continue
        means.add("pairs/margin", choice.margin)
        for kind in kinds:
            means.add(f"chosen/{kind}", float(choice.candidates[choice.chosen].kind is kind))
            if choice.rejected is not None:
                means.add(f"rejected/{kind}", float(choice.candidates[choice.rejected].kind is kind))
    for pool in pools:
        rollouts = [c for c in pool if c.kind is Kind.ROLLOUT]
        if rollouts:
            means.add("diversity/distinct_2", distinct_ngrams([c.ids for c in rollouts], 2))
        for c in rollouts:
            assert c.logprobs is not None
            means.add("diversity/entropy", -float(c.logprobs.sum()), len(c.logprobs))


def copy_means(means: Means, samples: Sequence[Sample], pools: Sequence[Sequence[Candidate]]) -> None:
    """`copied/KIND`: the share of tokens that say the prefix again, four or more in a row, by candidate kind.

    `copied/document` is that of the documents' own suffixes, whether they are candidates or not.
    """
    for sample, pool in zip(samples, pools, strict=True):
        prefix = sample.prefix_ids.tolist()
        means.add("copied/document", float(copied_tokens(prefix, sample.suffix_ids.tolist()).mean()))
        for candidate in pool:
            if candidate.kind is not Kind.ORIGINAL and len(candidate.ids):
                share = copied_tokens(prefix, candidate.ids.tolist()).mean()
                means.add(f"copied/{candidate.kind}", float(share))


def group_means(
    means: Means,
    replies: Sequence[Sequence[str | None]],
    generations: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float | None]],
) -> None:
    """Rewards of a task's generations, their length and entropy, and how many prompts taught nothing."""
    for group, texts, values in zip(generations, replies, rewards, strict=True):
        known = [value for value in values if value is not None]
        means.add("reward", sum(known), len(known))
        means.add("judge/failure_rate", len(values) - len(known), len(values))
        means.add("groups/dropped", float(len(set(known)) < 2))
        means.add("generation/unfinished", sum(text is None for text in texts), len(texts))
        for completion in group:
            means.add("generation/tokens", len(completion.ids))
            means.add("diversity/entropy", -float(completion.logprobs.sum()), len(completion.logprobs))


def source_means(means: Means, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """`sources/NAME`: the share of a step's samples that are of each part of a mixture."""
    for name in names:
        means.add(f"sources/{name}", sum(sample.source == name for sample in samples), len(samples))


def update_metrics(stats: UpdateStats) -> dict[str, float]:
    """What every update is watched by, over all processes.

    Drift goes by the tokens that were sampled, `document/nll` (nats a token) by those of the documents' own suffixes.
    """
    out = {"loss": stats.loss, "lr": stats.lr, "grad_norm": stats.grad_norm}
    tokens = stats.sums.get("drift_tokens", 0.0)
    if tokens:
        out |= {"drift/mean": stats.sums["drift_sum"] / tokens, "drift/max": stats.maxima["drift_max"]}
    if documents := stats.sums.get("document_tokens", 0.0):
        out["document/nll"] = stats.sums["document_nll"] / documents
    return out


def distinct_ngrams(sequences: Sequence[np.ndarray], n: int) -> float:
    """Share of distinct n-grams among all n-grams of some token sequences; 1 where there are none."""
    grams = [tuple(ids[i : i + n].tolist()) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def flatten(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """{"a": 1} -> {"prefix/a": 1}."""
    return {f"{prefix}/{name}": value for name, value in values.items()}
