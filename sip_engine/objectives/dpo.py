"""Direct preference optimisation (arXiv 2305.18290): the best candidate over the worst, or rewrite over rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sip_engine.objectives.base import Objective, best_and_worst, first_of
from sip_engine.policy.rows import LossSums, Row
from sip_engine.types import Candidate, Choice, Kind, Sample, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from sip_engine.policy.packing import PackedRows


DIAGNOSTICS = (
    "chosen_logprob",
    "rejected_logprob",
    "chosen_gain",
    "rejected_gain",
    "implicit_margin",
    "implicit_accuracy",
)


class PairedDPO(Objective):
    """The loss (eq. 7) on pairs of suffixes of one prefix, chosen first; who is preferred is left to `choose`."""

    needs_reference = True
    loss_unit = "nats a pair"

    def row_units(self, row: Row) -> int:
        return 1  # a pair

    def loss(self, log_probs: Tensor, rows: PackedRows, reference: Tensor | None) -> LossSums:
        from sip_engine.kernels.dpo import dpo

        assert reference is not None
        found = dpo(
            log_probs,
            rows.suffix_starts,
            rows.sum_by_suffix(reference),
            beta=self.cfg.beta,
            length_normalised=self.cfg.length_normalised,
            nll_weight=self.cfg.nll_weight,
        )
        logged = diagnostics(found.policy, found.reference, self.cfg.beta)
        return LossSums(found.losses.sum(), len(found.losses), logged)

    def metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        return mean_diagnostics("dpo", logged)


class DPO(PairedDPO):
    """Prefer the candidate of the highest reward to that of the lowest (method §updates)."""

    needs_judge = True
    least_candidates = 2

    def choose(
        self, sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, *, seed: int
    ) -> Choice | None:
        assert verdict is not None
        found = best_and_worst(sample, verdict.rewards, seed)
        if found is None:
            return None
        best, worst = found
        high, low = verdict.rewards[best], verdict.rewards[worst]
        assert high is not None and low is not None
        margin = high - low
        tie = margin == 0 and self.cfg.ties == "drop"
        if _alike(pool, best, worst) or tie or 0 < margin <= self.cfg.min_margin:
            return None
        return Choice(sample, tuple(pool), best, worst, margin)


class RewriteOverRollout(PairedDPO):
    """Prefer the rewrite to a rollout, without a judge (a baseline of the paper)."""

    needs_kinds = (Kind.REWRITE, Kind.ROLLOUT)

    def choose(
        self, sample: Sample, pool: Sequence[Candidate], verdict: Verdict | None, *, seed: int
    ) -> Choice | None:
        rewrite, rollout = first_of(pool, Kind.REWRITE), first_of(pool, Kind.ROLLOUT)
        if rewrite is None or rollout is None or _alike(pool, rewrite, rollout):
            return None
        return Choice(sample, tuple(pool), rewrite, rollout)


def _alike(pool: Sequence[Candidate], one: int, other: int) -> bool:
    """Whether two candidates say the same: there is nothing to prefer."""
    return pool[one].text == pool[other].text


def diagnostics(policy: Tensor, reference: Tensor, beta: float) -> dict[str, float | Tensor]:
    """Sums over pairs [n, 2] (chosen, rejected) of what a run should watch; all without gradient.

    Chosen and rejected falling together is a known failure of DPO (method §failure signatures).
    """
    gain = policy - reference
    found = (
        policy[:, 0].sum(),
        policy[:, 1].sum(),
        gain[:, 0].sum(),
        gain[:, 1].sum(),
        (gain[:, 0] - gain[:, 1]).sum().double() * beta,
        (gain[:, 0] > gain[:, 1]).sum(),
    )
    return {"pairs": float(len(policy)), **dict(zip(DIAGNOSTICS, found, strict=True))}


def mean_diagnostics(name: str, logged: Mapping[str, float]) -> dict[str, float]:
    """`name/…` of each of `diagnostics`: its sum, divided by the number of pairs; nothing without pairs."""
    pairs = logged.get("pairs", 0.0)
    return {f"{name}/{key}": logged[key] / pairs for key in DIAGNOSTICS if pairs}
