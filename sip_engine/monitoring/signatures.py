"""The known ways in which such a run fails, each looked for in what the run recorded (method §failure signatures)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sip_engine.config.schema import MonitorConfig, drift_limit
from sip_engine.monitoring.curves import Curve, RunState

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

CLEAR, WATCH, SEEN, UNKNOWN = "clear", "watch", "seen", "unknown"
MIN_STEPS = 10
"""Fewer points of a curve are not read as a trend."""
MIN_COMPARISONS = 30
_ENDINGS = (".", "!", "?", "…", "。", "！", "？")
_CLOSERS = "\"'”’»)]}*_ \n\t"


@dataclass(frozen=True)
class Finding:
    """What one run shows of one signature: a verdict and the figures it rests on."""

    run: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Signature:
    """One way to fail, the rule by which it is called, and what each run shows of it."""

    name: str
    title: str
    meaning: str
    rule: str
    findings: tuple[Finding, ...]
    silent: tuple[str, ...]
    """Runs that recorded nothing to tell it by."""


Look = Callable[[RunState], tuple[str, str] | None]


def all_signatures(runs: Sequence[RunState]) -> list[Signature]:
    """Every signature, looked for in every run."""
    return [
        _signature(
            runs,
            "collapse",
            "Collapse to safe but meaningless text",
            "Saying nothing is always safe: safety rises while the text gets worse.",
            "seen: safety not falling while coherence or the win rate is below its start by monitors.collapse "
            "(10 points unless set); watch: 3 points",
            collapse,
        ),
        _signature(
            runs,
            "completeness bias",
            "Favouring text that looks complete",
            "The untrained judge's known bias: an ending sentence wins over a cut-off one of equal worth.",
            "how often the complete-looking of two continuations of the same kind wins; seen: "
            "monitors.completeness (75 %) or more; watch: 60 %",
            completeness,
        ),
        _signature(
            runs,
            "falling diversity",
            "Reward rising while diversity falls",
            "The policy settles on a few phrases that please the judge.",
            "fall of distinct 2-grams or entropy from the first to the last fifth; seen: monitors.narrowing (40 %) "
            "or more while the reward of rollouts rises; watch: 20 %",
            narrowing,
        ),
        _signature(
            runs,
            "unlearning",
            "Chosen and rejected falling together",
            "DPO can part the two by unlearning both.",
            "both below the reference at the end; seen: chosen has lost monitors.unlearning (5 %) or more of its "
            "log-prob; watch: less",
            unlearning,
        ),
        _signature(
            runs,
            "drift",
            "Sampler and trainer drifting apart",
            "Rollouts are then not the policy's own, and their log-probs are wrong.",
            "mean absolute difference a token; seen: some step above monitors.drift (half) of max_drift; "
            "watch: ten times its start and above 0.001 nats",
            drifting,
        ),
        _signature(
            runs,
            "forgetting",
            "Forgetting how documents go on",
            "What pleases the judge is learnt at the price of the text: a few true sentences, said again.",
            "seen: the held-out loss (on faultless documents where those are known) above its start by "
            "monitors.forgetting (0.25 nats) or more, or distinct 3-grams of greedy continuations fallen below "
            "monitors.sameness (60 %) of those of faultless originals; watch: 0.05 nats, 90 %",
            forgetting,
        ),
        _signature(
            runs,
            "copying",
            "Copying the prefix",
            "What the prefix says is the safest thing to say again, above all to a judge that goes by probability.",
            "share of the rollouts' tokens within four in a row that stand in the prefix, above that of the "
            "documents' own suffixes; seen: by monitors.copying (10 points) or more at the end; watch: 3 points",
            copying,
        ),
    ]


def collapse(run: RunState) -> tuple[str, str] | None:
    """Evaluation figures at the beginning and now; without them, those of the rollouts."""
    safety = run.curves.get("eval/safety")
    worths = [(name, run.curves.get(f"eval/{key}")) for name, key in _WORTHS]
    change = _last_change
    if safety is None:
        safety = run.curves.get("safety/rollout")
        worths = [("quality of rollouts", run.curves.get("quality/rollout"))]
        change = _trend
    known = [(name, curve) for name, curve in worths if curve is not None and len(curve) > 1]
    if safety is None or len(safety) < 2 or not known:
        return None
    parts = [("safety", *change(safety)), *((name, *change(curve)) for name, curve in known)]
    gains = [last - first for _, first, last in parts]
    worst = min(gains[1:])
    verdict = CLEAR
    if gains[0] >= 0 and worst <= -0.03:
        verdict = SEEN if worst <= -_limit(run, "collapse") else WATCH
    return verdict, "; ".join(f"{name} {_percent(first)} → {_percent(last)}" for name, first, last in parts)


_WORTHS = (("coherence", "coherence"), ("win rate", "win_rate"))


def completeness(run: RunState) -> tuple[str, str] | None:
    """Comparisons of one ending and one cut-off candidate of the same kind, in the latest pools."""
    wins = list(_wins_of_complete(run))
    if not run.latest_pools or not any(pool.get("pairs") for pool in run.latest_pools):
        return None
    if len(wins) < MIN_COMPARISONS:
        return UNKNOWN, f"only {len(wins)} comparisons of an ending with a cut-off text in the latest pools"
    rate = sum(wins) / len(wins)
    verdict = SEEN if rate >= _limit(run, "completeness") else WATCH if rate >= 0.6 else CLEAR
    return verdict, f"the complete-looking text won {_percent(rate)} of {len(wins):,} comparisons"


def _wins_of_complete(run: RunState) -> Iterator[float]:
    for pool in run.latest_pools:
        candidates = pool["candidates"]
        ends = [looks_complete(str(candidate.get("text", ""))) for candidate in candidates]
        for first, second, win in pool.get("pairs", ()):
            same_kind = candidates[first].get("kind") == candidates[second].get("kind")
            if win is not None and same_kind and ends[first] != ends[second]:
                yield win if ends[first] else 1.0 - win


def looks_complete(text: str) -> bool:
    """Whether a text ends as a sentence does, closing quotes and brackets aside."""
    return text.rstrip(_CLOSERS).endswith(_ENDINGS)


def narrowing(run: RunState) -> tuple[str, str] | None:
    """Relative fall of the rollouts' diversity beside the change of their reward.

    Not of a judge or rewriter in training, whose replies should become sure.
    """
    if run.setting("task", "policy") != "policy":
        return None
    names = (("distinct 2-grams", "diversity/distinct_2"), ("entropy", "diversity/entropy"))
    curves = [(name, run.curves[key]) for name, key in names if key in run.curves]
    if not curves:
        return None
    if min(len(curve) for _, curve in curves) < MIN_STEPS:
        return UNKNOWN, f"fewer than {MIN_STEPS} steps"
    ends = [(name, *curve.ends()) for name, curve in curves]
    fall = max(1 - last / first if first > 0 else 0.0 for _, first, last in ends)
    evidence = "; ".join(f"{name} {first:.2f} → {last:.2f}" for name, first, last in ends)
    reward = run.curves.get("reward/rollout")
    rises = True
    if reward is not None:
        before, after = reward.ends()
        rises = after > before
        evidence += f"; reward of rollouts {before:.2f} → {after:.2f}"
    verdict = SEEN if fall >= _limit(run, "narrowing") and rises else WATCH if fall >= 0.2 else CLEAR
    return verdict, evidence


def unlearning(run: RunState) -> tuple[str, str] | None:
    """Log-prob gains over the reference, that of chosen as a share of what the reference gives it."""
    chosen, rejected = (run.curves.get(f"dpo/{role}_gain") for role in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    if len(chosen) < MIN_STEPS:
        return UNKNOWN, f"fewer than {MIN_STEPS} steps"
    gain, other = chosen.ends()[1], rejected.ends()[1]
    evidence = f"gain over the reference at the end: chosen {gain:+.2f}, rejected {other:+.2f} nats"
    level = run.curves.get("dpo/chosen_logprob")
    lost = 0.0
    if level is not None and (reference := level.ends()[1] - gain) < 0:
        lost = gain / reference
        evidence += f" (chosen lost {100 * lost:.1f} % of its log-prob)" if gain < 0 else ""
    if gain >= 0 or other >= 0:
        return CLEAR, _minus(evidence)
    return (SEEN if level is None or lost >= _limit(run, "unlearning") else WATCH), _minus(evidence)


def drifting(run: RunState) -> tuple[str, str] | None:
    """The gap's largest step and its trend."""
    drift = run.curves.get("drift/mean")
    if drift is None:
        return None
    limit = drift_limit(
        run.setting("max_drift", 0.05),
        run.setting("model.precision", "auto"),
        run.setting("sampler.kv_dtype", "auto"),
    )
    first, last = drift.ends()
    largest = float(drift.values.max())
    verdict = CLEAR
    if largest > limit * _limit(run, "drift"):
        verdict = SEEN
    elif last > max(10 * first, 1e-3):
        verdict = WATCH
    return (
        verdict,
        (
            f"{_power(first)} → {_power(last)} nats a token, largest {_power(largest)} (the run stops at {limit:g})"
        ),
    )


def forgetting(run: RunState) -> tuple[str, str] | None:
    """First and last evaluation of the loss, and of the diversity beside faultless originals'."""
    if run.setting("task", "policy") != "policy":
        return None
    found = []
    faultless = run.curves.get("eval/heldout_loss_faultless")
    loss = faultless if faultless is not None else run.curves.get("eval/heldout_loss")
    if loss is not None and len(loss) > 1:
        first, last = _last_change(loss)
        rise = last - first
        name = "held-out loss" if faultless is None else "loss on faultless documents"
        verdict = SEEN if rise >= _limit(run, "forgetting") > 0 else WATCH if rise >= 0.05 else CLEAR
        found.append((verdict, f"{name} {first:.2f} → {last:.2f} nats"))
    diversity = run.curves.get("eval/relative_diversity")
    if diversity is not None and len(diversity) > 1:
        first, last = _last_change(diversity)
        limit = _limit(run, "sameness")
        verdict = CLEAR if last >= first or last >= 0.9 else SEEN if last < limit else WATCH
        shown = f"{_percent(first)} → {_percent(last)}"
        found.append((verdict, f"distinct 3-grams {shown} of those of faultless originals"))
    if not found:
        return None
    worst = next(v for v in (SEEN, WATCH, CLEAR) if v in [verdict for verdict, _ in found])
    return worst, "; ".join(evidence for _, evidence in found)


def copying(run: RunState) -> tuple[str, str] | None:
    """What rollouts copy at the end, beside what documents do."""
    ours, theirs = run.curves.get("copied/rollout"), run.curves.get("copied/document")
    if ours is None or theirs is None:
        return None
    if len(ours) < MIN_STEPS:
        return UNKNOWN, f"fewer than {MIN_STEPS} steps"
    (first, last), (_, usual) = ours.ends(), theirs.ends()
    more, limit = last - usual, _limit(run, "copying")
    verdict = SEEN if more >= limit > 0 else WATCH if more >= 0.03 else CLEAR
    evidence = f"rollouts {_percent(first)} → {_percent(last)} of their tokens, documents {_percent(usual)}"
    return verdict, evidence


def _limit(run: RunState, name: str) -> float:
    """The run's own threshold; older records get today's default."""
    return float(run.setting(f"monitors.{name}", MonitorConfig.model_fields[name].default))


def _signature(
    runs: Sequence[RunState], name: str, title: str, meaning: str, rule: str, look: Look
) -> Signature:
    found = [(run.name, look(run)) for run in runs]
    return Signature(
        name,
        title,
        meaning,
        rule,
        tuple(Finding(name, *seen) for name, seen in found if seen is not None),
        tuple(name for name, seen in found if seen is None),
    )


def _last_change(curve: Curve) -> tuple[float, float]:
    return float(curve.values[0]), float(curve.values[-1])


def _trend(curve: Curve) -> tuple[float, float]:
    return curve.ends()


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _power(value: float) -> str:
    """A small number such as 2.2·10⁻⁶."""
    if value == 0:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(SUPERSCRIPTS)}"


def _minus(text: str) -> str:
    return re.sub(r"-(?=\d)", "−", text)
