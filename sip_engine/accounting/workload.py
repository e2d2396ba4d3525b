"""What one step asks for: how many prefixes, tokens, suffixes to train on and questions to judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sip_engine.config.judge import JudgeConfig
from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.utils.errors import ConfigError

REPLY_TOKENS = {"reasoned": 200, "direct": 8, "compact": 1}
"""Tokens of a judge's answer by `judge.server.style`: a brief reasoning and a line, a line, a word (estimates)."""
INSTRUCTION_TOKENS = {"reasoned": 250, "direct": 150, "compact": 20}
"""Tokens of a judge's prompt beside the texts (estimates)."""


@dataclass(frozen=True)
class Workload:
    """A step of one data-parallel replica. `prefix` is the mean length that time is reckoned with, `longest` the
    length that memory must hold; all in tokens. `trained` suffixes of a prefix are in the update, `scored` tokens
    of a row are targets."""

    prefixes: int
    prefix: float
    longest: int
    suffix: int
    rollouts: int
    candidates: int
    trained: int
    scores_prefix: bool
    needs_reference: bool

    @property
    def sequences(self) -> int:
        """Rollouts of the replica's step."""
        return self.prefixes * self.rollouts

    @property
    def row(self) -> float:
        """Mean tokens of a packed row."""
        return self.prefix + self.trained * self.suffix

    @property
    def longest_row(self) -> int:
        return self.longest + self.trained * self.suffix

    @property
    def scored(self) -> float:
        """Mean targets of a row."""
        return self.prefix + self.suffix - 1 if self.scores_prefix else self.trained * self.suffix


def workload_of(
    cfg: RunConfig, replicas: int, *, prefix: float | None = None, rollouts: int | None = None
) -> Workload:
    """The step of the last candidate stage, or with `rollouts` in its place.

    `prefix`: mean prefix tokens; None is the middle of the shortest and the longest that the settings allow.

    Raises:
        ConfigError: more replicas than prefixes, or a mean outside what the settings allow.
    """
    data, objective = cfg.data, cfg.objective
    source = objective.facts.learns_from
    if cfg.batch_size < replicas:
        raise ConfigError(
            f"batch_size={cfg.batch_size} is below the {replicas} data-parallel replicas; raise it or use fewer GPUs"
        )
    mean = (data.min_prefix_tokens + data.max_prefix_tokens) / 2 if prefix is None else prefix
    if not data.min_prefix_tokens <= mean <= data.max_prefix_tokens:
        raise ConfigError(
            f"--prefix-tokens {mean:g}: must lie between data.min_prefix_tokens={data.min_prefix_tokens} and "
            f"data.max_prefix_tokens={data.max_prefix_tokens}"
        )
    stage = cfg.candidates[-1]
    if source is LearnsFrom.GENERATIONS:
        sampled = candidates = trained = objective.generations
    elif source is LearnsFrom.POOLS:
        # An objective with a reference compares two of a pool's candidates.
        sampled, candidates, trained = stage.rollouts, stage.num_candidates, 1 + cfg.needs_reference
        trained += objective.document_nll_weight > 0  # the document's own suffix
    else:
        sampled, candidates, trained = 0, 0, 1
    return Workload(
        prefixes=math.ceil(cfg.batch_size / replicas),
        prefix=mean,
        longest=data.max_prefix_tokens,
        suffix=data.suffix_tokens,
        rollouts=sampled if rollouts is None else rollouts,
        candidates=candidates,
        trained=trained,
        scores_prefix=source is LearnsFrom.SAMPLES and cfg.task == "policy" and objective.loss_on == "all",
        needs_reference=cfg.needs_reference,
    )


@dataclass(frozen=True)
class Judging:
    """Questions about one prefix's candidates, and the tokens a model judge reads and writes for them."""

    calls: int
    read: float
    """Tokens that are read once for all questions of the prefix (the prefix itself), plus each question's own."""
    written: float


def judging_of(cfg: RunConfig, load: Workload) -> Judging:
    """What a model that judges has to do for one prefix; nothing where nothing is judged in the step."""
    facts = cfg.objective.facts
    judged = facts.learns_from is LearnsFrom.POOLS and facts.needs_judge and load.candidates > 1
    grades = facts.learns_from is LearnsFrom.GENERATIONS and cfg.task == "rewriter"
    if not judged and not grades:
        return Judging(0, 0.0, 0.0)
    judge, n = cfg.judge, load.candidates
    weights, votes = judge.weights, judge.votes
    pairs = num_comparisons(judge, n) if judged else n
    quality = pairs * votes.quality if weights.quality else 0
    safety = n * votes.safety if weights.safety else 0
    factuality = n * votes.factuality if weights.factuality else 0
    if judge.backend not in ("server", "local"):
        return Judging(quality + safety + factuality, 0.0, 0.0)
    asked = judge.server if judge.backend == "server" else judge.local
    if asked.method in (
        "sentence_labels",
        "mutual_information",
    ):  # each candidate is read once, however often compared
        return Judging(n, load.prefix + n * load.suffix, 0.0)
    style, replies = asked.style, judge.backend == "server" or asked.method == "generate"
    own = INSTRUCTION_TOKENS[style]
    read = (
        load.prefix
        + quality * (2 * load.suffix + own)
        + safety * (load.suffix + own)
        + factuality * (2 * load.suffix + own)
    )
    calls = quality + safety + factuality
    return Judging(calls, read, float(calls * REPLY_TOKENS[style] if replies else 0))


def num_comparisons(judge: JudgeConfig, n: int) -> int:
    """Most comparisons of `n` candidates under the judge's schedule, both orders counted."""
    every = n * (n - 1) // 2
    if judge.schedule == "pivot":
        pairs = n - 1
    elif judge.schedule == "tournament":
        pairs = min(every, max((3 * n + 1) // 2 - 2, math.floor(judge.budget * every + 1e-9)))
    else:
        pairs = every
    return pairs * (1 + judge.both_orders)
