"""What an objective is, and how one is registered and opened.

Settings ask an objective what it needs before anything heavy is loaded, so its file imports torch where it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ValidationError

from sip_engine.config.objective import OBJECTIVES, LearnsFrom, ObjectiveConfig
from sip_engine.config.schema import RunConfig
from sip_engine.config.section import Section
from sip_engine.objectives.document_term import with_document
from sip_engine.policy.rows import LossSums, Row, row_of
from sip_engine.types import Candidate, Choice, Kind, Sample, Verdict
from sip_engine.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from sip_engine.policy.packing import PackedRows
    from sip_engine.sampler.requests import Completion

register_objective = OBJECTIVES.register
"""`@register_objective("name")` before an `Objective` makes `objective.kind = "name"` mean it."""


def open_objective(cfg: ObjectiveConfig) -> Objective:
    """The objective of `cfg.kind`: built in, registered, or of an installed package (group `sip_engine.objectives`).

    Raises:
        ConfigError: its package cannot be loaded, it is no `Objective`, or it refuses its options.
    """
    found = cfg.facts
    if not isinstance(found, Objective):
        raise ConfigError(f"objective {cfg.kind!r} is no sip_engine.objectives.base.Objective")
    return found


class Objective:
    """Which part of a step teaches, and how: the base of all objectives.

    As it stands it maximises the likelihood of what it is shown. Override what differs: `choose` for one that learns
    from pools, the row of its material where more than tokens is needed, `loss`, and `metrics`.
    """

    learns_from: LearnsFrom = LearnsFrom.POOLS
    needs_judge: bool = False
    """It chooses by rewards; without, no pool is judged."""
    needs_reference: bool = False
    """`loss` gets the reference policy's log-probs."""
    loss_unit: str = "nats a token"
    """What the loss is measured in, for the report."""
    least_candidates: ClassVar[int] = 1
    """POOLS: fewest candidates a prefix."""
    needs_kinds: ClassVar[tuple[Kind, ...]] = ()
    """POOLS: kinds of candidates that every stage must have."""
    Options: ClassVar[type[Section] | None] = None
    """Settings of its own, read from `objective.options` to `self.options`."""

    def __init__(self, cfg: ObjectiveConfig) -> None:
        """Raises ConfigError where the options are not what `Options` says."""
        self.cfg = cfg
        self.options: Any = _read_options(self.Options, cfg)

    def check(self, cfg: RunConfig) -> None:
        """Raise ValueError, with the remedy, where the other settings of a run do not suit."""
        if self.learns_from is LearnsFrom.POOLS:
            _check_pools(self, cfg)

    def choose(
        self, sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, *, seed: int
    ) -> Choice | None:
        """POOLS: what a pool teaches, or None where that is nothing (a tie, too few verdicts).

        verdict: of the pool's candidates, in order; None where nothing was judged. Equal rewards are to be broken by
        `seed`, never by the candidates' order, so that no kind is favoured.
        """
        raise NotImplementedError

    def row_of_sample(self, sample: Sample) -> Row:
        """SAMPLES: what is trained on of a sample; here its suffix, or the suffix's labels."""
        return row_of(sample)

    def row_of_choice(self, choice: Choice) -> Row:
        """POOLS: what is trained on of a choice; here its prefix with the trained candidates."""
        trained = choice.trained()
        return Row(
            choice.sample.prefix_ids,
            tuple(c.ids for c in trained),
            sampled=tuple(c.logprobs for c in trained),
            document=choice.sample.document,
        )

    def row_units(self, row: Row) -> int:
        """POOLS: what a row counts for in the mean of the loss (`LossSums.units`); here its scored tokens."""
        return sum(row.num_scored)

    def row_of_group(
        self, sample: Sample, group: Sequence[Completion], rewards: Sequence[float | None]
    ) -> Row | None:
        """GENERATIONS: what is trained on of a prompt's graded generations; None where they teach nothing.

        rewards: one a generation, None where grading failed.
        """
        raise NotImplementedError

    def loss(self, log_probs: Tensor, rows: PackedRows, reference: Tensor | None) -> LossSums:
        """The loss of one micro-batch; here the negative log-likelihood of its targets.

        log_probs: [num_targets] float32 nats, the policy's now, differentiable. reference: the same of the reference
        policy, without gradient; None unless `needs_reference`.
        """
        weighted = log_probs if rows.weights is None else log_probs * rows.weights
        return LossSums(-weighted.sum(), len(log_probs))

    def metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a step from what `loss` logged: sums and maxima over all micro-batches and processes."""
        return {}


def rows_of_choices(objective: Objective, choices: Sequence[Choice | None]) -> list[Row]:
    """What is trained on of a step's choices: the objective's rows, with the documents' own suffixes if wanted."""
    weight = objective.cfg.document_nll_weight
    made = [(choice, objective.row_of_choice(choice)) for choice in choices if choice is not None]
    return [with_document(row, choice.sample, weight, objective.row_units(row)) for choice, row in made]


def best_and_worst(sample: Sample, rewards: Sequence[float | None], seed: int) -> tuple[int, int] | None:
    """Numbers of a candidate of the highest reward and one of the lowest; equal ones are drawn by `seed`.

    None if no candidate has a reward; twice the same number if one has.
    """
    judged = [n for n, reward in enumerate(rewards) if reward is not None]
    if not judged:
        return None
    order = np.random.default_rng([seed, sample.document, sample.cut]).permutation(judged)
    best, worst = max(order, key=lambda n: rewards[n]), min(order[::-1], key=lambda n: rewards[n])
    return int(best), int(worst)


def first_of(pool: Sequence[Candidate], kind: Kind) -> int | None:
    """Number of the first candidate of a kind; None if the pool has none."""
    return next((n for n, candidate in enumerate(pool) if candidate.kind is kind), None)


def _read_options(model: type[Section] | None, cfg: ObjectiveConfig) -> Section | None:
    if model is None:
        if cfg.options:
            raise ConfigError(f'objective.options is set, but "{cfg.kind}" has no options: remove it')
        return None
    try:
        return model.model_validate(cfg.options)
    except ValidationError as error:
        faults = "; ".join(
            ".".join(["objective.options", *map(str, fault["loc"])])
            + f": {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ConfigError(f'{faults}; "{cfg.kind}" knows {", ".join(model.model_fields)}') from None


def _check_pools(objective: Objective, cfg: RunConfig) -> None:
    kind = cfg.objective.kind
    if cfg.task != "policy":
        raise ValueError(f'task="{cfg.task}" trains with objective.kind "next_token" or "grpo", not "{kind}"')
    for stage in cfg.candidates:
        if stage.rewrite and cfg.rewriter.backend == "none":
            raise ValueError("candidates.rewrite needs a rewriter: set rewriter.backend, or rewrite=false")
        if objective.needs_judge and stage.num_candidates < objective.least_candidates:
            raise ValueError(
                f"{kind} needs {objective.least_candidates} or more candidates a prefix, stage "
                f"from_step={stage.from_step} has {stage.num_candidates}: add original, rewrite or rollouts"
            )
        if Kind.REWRITE in objective.needs_kinds and not stage.rewrite:
            raise ValueError(f"{kind} trains on rewrites: set candidates.rewrite=true")
        if Kind.ROLLOUT in objective.needs_kinds and not stage.rollouts:
            raise ValueError(f"{kind} trains on a rollout: set candidates.rollouts to 1 or more")
        if Kind.ORIGINAL in objective.needs_kinds and not stage.original:
            raise ValueError(f"{kind} trains on originals: set candidates.original=true")
